"""E3, whatever the vectors are."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from nsq_ref import (
    bounds,
)
from nsq_ref.bounds import Interval


@settings(max_examples=200)
@given(st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(0.01, 3))
def test_chords_hold_for_any_vectors(head_dim: int, seed: int, size: float) -> None:
    """E3, whatever the vectors are; and for two vectors in the worst position it is exact."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((20, head_dim))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    y = x + rng.standard_normal((20, head_dim)) * size * rng.random((20, 1))
    error = np.linalg.norm(x - y, axis=-1)
    apart = np.linalg.norm(x - y / np.linalg.norm(y, axis=-1, keepdims=True), axis=-1)
    assert (apart <= bounds.chord(error) + 1e-12).all()
    unit = Interval(np.ones(()), np.ones(()))
    known = bounds.chord(error, y, length=unit)
    np.testing.assert_allclose(known, apart, atol=1e-5)
    length = Interval(np.full(20, 0.5), np.full(20, 2.0))
    scaled = bounds.chord(error, y, length=length)
    assert (scaled >= known - 1e-9).all()
    for other in (0.5, 0.8, 1.3, 2.0):
        distance = np.linalg.norm(other * x - y, axis=-1)
        assert (apart <= bounds.chord(distance, y, length=length) + 1e-12).all()
        assert (apart <= bounds.chord(distance, length=length) + 1e-12).all()
    if size < 0.5:  # the worst of all y at this distance is at a right angle to the error
        sine = error[0]
        worst = np.array([[1 - sine**2, sine * np.sqrt(1 - sine**2)]])
        np.testing.assert_allclose(bounds.chord([sine], worst), bounds.chord([sine]), rtol=1e-5)

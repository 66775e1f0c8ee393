"""E9: what is stored tells the norm."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from nsq_ref import (
    Scheme,
    bounds,
    quantize,
    rounding,
)
from nsq_ref.bounds import Interval
from nsq_ref.scheme import FLOAT_DTYPES
from tests.support.bounds_truth import (
    Array,
    coded_tokens,
    dequantized,
    dot,
    fractions,
    quantized_or_none,
    squared,
    wide,
)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrowing_intervals_are_exact(dtype: Any) -> None:
    """E9: what lies within narrows to the stored value, what lies beyond does not (S3, M4)."""
    kind = FLOAT_DTYPES[dtype]
    stored = np.arange(2**16, dtype=np.uint16).view(kind)
    with np.errstate(invalid="ignore"):
        stored = stored[np.isfinite(stored.astype(np.float32))]
    stored = stored[(stored != 0) | ~np.signbit(stored)]
    low, high = bounds.narrowing_interval(stored, dtype)
    for end, outwards in ((low, -np.inf), (high, np.inf)):
        with np.errstate(over="ignore"):
            single = end.astype(np.float32)
            held = single == end  # all but the one beyond the largest bfloat16
            inner = np.nextafter(single, np.float32(-outwards))
            beyond = np.nextafter(single, np.float32(outwards))
            assert held.sum() >= len(held) - 1
            assert (rounding.narrow(inner, kind) == stored)[held].all()
            assert (rounding.narrow(beyond, kind) != stored)[held].all()
    values = np.float32([0, 1 / 3, -3e38])
    for end in bounds.narrowing_interval(values, "float32"):
        np.testing.assert_array_equal(end, values)


@settings(max_examples=100)
@given(wide(), st.sampled_from(["norm", "gain", "lsq"]), st.sampled_from(list(FLOAT_DTYPES)))
def test_factors_tell_the_norm(x: Array, magnitude: Any, dtype: Any) -> None:
    """E9: the norm of N1 lies where the stored factor says (M1, M2, M3, M4)."""
    scheme = Scheme(magnitude=magnitude, norm_dtype=dtype, scale_dtype="float32")
    quantized = quantized_or_none(x, scheme)
    if quantized is None:
        return
    known = bounds.certificate(quantized)
    y = dequantized(quantized)[0]
    norm = coded_tokens(x, quantized)[1]
    assert quantized.norm is not None
    told = bounds.norm_interval(quantized.norm, y, known.direction, scheme=scheme)
    assert ((told.low <= norm) & (norm <= told.high)).all()
    if magnitude == "norm":
        low, high = bounds.factor_error(quantized.norm, dtype)
        for index in map(tuple, np.argwhere(norm > 0)):
            square = dot(*[fractions(x.astype(np.float32)[index])] * 2)
            stored = squared(float(quantized.norm[index]))
            assert squared(1 + low[index]) * square <= stored * (1 + Fraction(1, 2**50))
            assert stored <= squared(1 + high[index]) * square * (1 + Fraction(1, 2**50))


def test_the_error_of_a_narrowed_norm_is_attained() -> None:
    """E9: a norm half way between two of float16 (M1), and the law of cosines."""
    exact = 1 + 2.0**-11
    quantized = quantize(np.float32([[exact, 0]]))
    assert quantized.norm is not None
    assert quantized.norm.tolist() == [1.0]
    least = bounds.factor_error(quantized.norm, "float16").low[0]
    assert least <= 1 / exact - 1 <= least * (1 - 2.0**-11)
    # A little longer, but N1 rounds that away before M1 narrows.
    longer = np.float32([exact, 2.0**-13])
    assert rounding.norm(longer[None]) == exact
    assert squared(1 + least) * dot(fractions(longer), fractions(longer)) <= 1
    for ratio_ in (0.25, 1.0, 1.75):
        for angle in (0.01, 1.0, 2.0):
            error = Interval(np.array(ratio_ - 1), np.array(ratio_ - 1))
            missed = abs(1 - ratio_ * np.exp(1j * angle))
            bound = bounds.relative_error(2 * np.sin(angle / 2), error)
            np.testing.assert_allclose(bound, missed, rtol=1e-12)
            if angle < np.pi / 2:
                missed = abs(1 - ratio_ * np.cos(angle) * np.exp(1j * angle))
                bound = bounds.relative_error(2 * np.sin(angle / 2), error, magnitude="lsq")
                np.testing.assert_allclose(bound, max(missed, abs(ratio_ - 1)), rtol=1e-12)
            else:
                bound = bounds.relative_error(2 * np.sin(angle / 2), error, magnitude="lsq")
                np.testing.assert_allclose(bound, 1, rtol=1e-12)

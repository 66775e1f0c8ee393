"""E1 to E6 and E9 of balanced norms (N3), whose directions are not unit vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from nsq_ref import Scheme, bounds, dequantize, quantize, rounding, spec
from nsq_ref.strategies import schemes
from tests.support.bounds_truth import (
    Float32,
    check_a_priori,
    check_all,
    coded_tokens,
    dequantized,
    quantized_or_none,
    uneven,
)

BALANCED = Scheme(magnitude="gain", norm_rule="balanced")


@settings(max_examples=150)
@given(
    uneven(),
    schemes(
        norm_rule="balanced",
        axis="channel",
        separate_norm=True,
        magnitude=st.sampled_from(["gain", "lsq"]),
        block_size=st.sampled_from([None, 2, 5, 16]),
    ),
)
def test_everything_holds_of_balanced_norms(x: Float32, scheme: Scheme) -> None:
    """E1 to E6, E9 and what is known before: heavy tails, offsets, outliers, zeros, both ends."""
    if (quantized := quantized_or_none(x, scheme)) is not None:
        check_all(x, quantized, bounds.certificate(quantized))
        check_all(x, quantized, bounds.encoder_bounds(x, quantized))
        check_a_priori(x, quantized)


def test_what_directions_of_balanced_norms_are() -> None:
    """L5: no longer than 1, as short as 2**-12, and of length 1 over the sizes."""
    x = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    x[:, 0] *= 2.0**14
    x[7, 0] = 0
    norm, size = spec.norms_and_sizes(x, BALANCED)
    assert (norm >= rounding.norm(x)).all()
    direction = x / norm.astype(np.float64)[:, None]
    length = np.linalg.norm(direction, axis=-1)
    assert length.max() <= 1 + 2.0**-24
    assert 2.0**-12 * (1 - 2.0**-24) <= length.min() < 2.0**-11
    assert (size >= np.abs(direction).max(axis=0) * (1 - 2.0**-24)).all()
    np.testing.assert_allclose(np.linalg.norm(direction / size, axis=-1), 1, atol=5 * 2.0**-24)


def test_a_gain_may_make_a_token_many_times_as_long() -> None:
    """E4 M2: of a token of which one channel is left, the outlier; nothing is known before."""
    x = np.concatenate([np.eye(64), np.ones((2, 64))]).astype(np.float32)
    x[0], x[65, 0] = 1, 0.51
    x[:, 0] *= 100
    scheme = replace(BALANCED, bits=2)
    quantized = quantize(x, scheme)
    error = np.linalg.norm(x - dequantize(quantized), axis=-1)[65] / np.linalg.norm(x[65])
    assert error > 14
    assert 0.99 < error / bounds.encoder_bounds(x, quantized).relative[65] <= 1
    assert 0.94 < error / bounds.certificate(quantized).relative[65] <= 1
    known = bounds.a_priori(scheme, 64)
    assert known.relative == np.inf
    assert known.direction_error == bounds.a_priori(Scheme(bits=2), 64).direction_error
    least_squares = replace(scheme, magnitude="lsq")
    assert bounds.a_priori(least_squares, 64).relative == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("bits", "apart"), [(8, 0.03), (4, 0.6)])
def test_a_block_tells_its_norms(bits: Any, apart: float) -> None:
    """E9 M2: the more narrowly, the finer the codes; a token alone tells next to nothing."""
    x = np.random.default_rng(0).standard_normal((128, 64)).astype(np.float32)
    x[:, [3, 40]] *= 30
    x[5] = 0
    quantized = quantize(x, replace(BALANCED, bits=bits))
    norm = coded_tokens(x, quantized)[1]
    known = bounds.certificate(quantized).norm
    assert (known.low <= norm).all()
    assert (norm <= known.high).all()
    some = norm > 0
    assert np.median((known.high - known.low)[some] / norm[some]) < apart
    y, direction = dequantized(quantized)[0], bounds.certificate(quantized).direction
    one = slice(9, 10)
    assert quantized.norm is not None
    alone = bounds.norm_interval(
        quantized.norm[one],
        y[one],
        bounds.Interval(direction.low[one], direction.high[one]),
        scheme=quantized.scheme,
    )
    assert alone.low <= norm[9] <= alone.high
    assert alone.high - alone.low > 3 * (known.high - known.low)[9]


def test_norms_of_one_block_say_nothing_of_another() -> None:
    """E9 B1: outliers are in other channels, so that sizes are others."""
    x = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    x[:32, 0] *= 200
    x[32:, 5] *= 200
    quantized = quantize(x, replace(BALANCED, bits=8, block_size=32))
    check_all(x, quantized, bounds.certificate(quantized))
    check_all(x, quantized, bounds.encoder_bounds(x, quantized))

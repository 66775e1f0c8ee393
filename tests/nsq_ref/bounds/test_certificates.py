"""Certificates and bounds of an encoder hold of any scheme, also of tokens that are lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
from hypothesis import example, given, settings

from nsq_ref import (
    Quantized,
    Scheme,
    bounds,
    dequantize,
    packing,
    quantize,
    rounding,
    spec,
)
from nsq_ref.scheme import FLOAT_DTYPES
from nsq_ref.strategies import schemes
from tests.support.bounds_truth import (
    Array,
    Float32,
    check_all,
    coded_tokens,
    dequantized,
    quantized_or_none,
    wide,
)


@settings(max_examples=250)
@given(wide(), schemes())
def test_certificates_hold(x: Array, scheme: Scheme) -> None:
    """E1 to E6 and E9 from what is stored, of any scheme (I1, K1, B1, O1, S1 to S4, M1 to M3)."""
    if (quantized := quantized_or_none(x, scheme)) is not None:
        known = bounds.certificate(quantized)
        np.testing.assert_array_equal(known.x_hat, dequantize(quantized))
        check_all(x, quantized, known)


@settings(max_examples=150)
@given(wide(), schemes())
def test_bounds_of_an_encoder_hold(x: Array, scheme: Scheme) -> None:
    """E1 to E6 from the norms and the clamped elements, of any scheme."""
    if (quantized := quantized_or_none(x, scheme)) is not None:
        check_all(x, quantized, bounds.encoder_bounds(x, quantized))


def recoded(x: Float32, frozen: Quantized) -> Quantized | None:
    """Code tokens with the scales of others, as the rules have it but for where scales are from."""
    scheme = frozen.scheme
    zero = np.zeros_like(frozen.scale) if frozen.zero is None else frozen.zero
    with np.errstate(all="ignore"):
        norm, size = spec.norms_and_sizes(x, scheme)
        direction = x / np.where(norm == 0, np.inf, norm).astype(np.float32)[..., None]
        codes = spec.code(direction, frozen.scale, zero, scheme)
        codes = np.where(norm[..., None] != 0, codes, 0).astype(np.int16)
        y = spec.dequantize(codes, frozen.scale, zero)
        factor = spec.factor(x, y, norm, scheme, size=size)
        stored = rounding.narrow(factor, FLOAT_DTYPES[scheme.norm_dtype])
    result = replace(
        frozen,
        shape=x.shape,
        dtype=x.dtype,
        packed=packing.pack(codes, scheme),
        norm=stored if scheme.separate_norm else None,
    )
    return result if np.isfinite(stored).all() and np.isfinite(dequantize(result)).all() else None


@settings(max_examples=150)
@given(
    wide(),
    schemes(block_size=None, sink_tokens=0, outlier_channels=0, axis="channel"),
    st.sampled_from([1.0, 0.5, 3.0, 1e-3]),
)
def test_bounds_of_an_encoder_hold_for_frozen_scales(
    x: Array, scheme: Scheme, larger: float
) -> None:
    """E1 with scales that are not those of the tokens: Q1 then clamps what is beyond them (Q2)."""
    tokens = np.clip(x.astype(np.float64) * larger, -3e38, 3e38).astype(np.float32)
    frozen = quantized_or_none(x[..., :1, :], scheme)
    quantized = recoded(tokens, frozen) if frozen is not None else None
    if quantized is None or frozen is None:
        return
    known = bounds.encoder_bounds(tokens, quantized)
    check_all(tokens, quantized, known)
    norm = coded_tokens(tokens, quantized)[1].astype(np.float64)[..., None]
    direction = tokens / np.where(norm == 0, np.inf, norm)
    before = bounds.element_error(frozen.scale, frozen.zero, scheme=scheme, direction=direction)
    some = np.broadcast_to(norm > 0, direction.shape)
    y = dequantized(quantized)[0]
    assert (before >= np.abs(direction - y) * (1 - 2.0**-50))[some].all()


@settings(max_examples=200)
@example([[112, 69], [104, -126]], 8, "lsq", True, 0)
@given(
    st.lists(st.lists(st.integers(-300, 300), min_size=2, max_size=2), min_size=1, max_size=3),
    st.sampled_from([4, 8]),
    st.sampled_from(["norm", "gain", "lsq"]),
    st.booleans(),
    st.sampled_from([0, 3, 20]),
)
def test_certificates_hold_where_everything_is_subnormal(
    numbers: list[list[int]], bits: int, magnitude: Any, symmetric: bool, up: int
) -> None:
    """E1 to E6 and E9 of tokens, norms, gains and decoded values next to 2**-149 (M1 to M3, D1)."""
    x = np.array(numbers, np.float32) * np.float32(2.0 ** (up - 149))
    scheme = Scheme(
        bits=bits,
        magnitude=magnitude,
        symmetric=symmetric,
        scale_dtype="float32",
        norm_dtype="float32",
    )
    quantized = quantize(x, scheme)
    check_all(x, quantized, bounds.certificate(quantized))


def test_a_subnormal_norm_makes_no_unit_vector() -> None:
    """E2 of a token whose block has one that N1 cannot give a norm: not what is known before."""
    x = np.float32([[3 * 2.0**-149, 3 * 2.0**-149, 0], [0.0535, 0.0535, 0.997]])
    scheme = Scheme(block_size=2, scale_dtype="float32", norm_dtype="float32")
    quantized = quantize(x, scheme)
    known = bounds.certificate(quantized)
    assert known.direction_error[1] > bounds.a_priori(scheme, 3).direction_error
    check_all(x, quantized, known)


def test_sinks_have_no_error() -> None:
    """E1 to E6 of the tokens that K1 keeps, also where it keeps all of them."""
    x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(ml_dtypes.bfloat16)
    for sinks in (3, 5, 9):
        quantized = quantize(x, Scheme(sink_tokens=sinks, symmetric=False))
        for known in (bounds.certificate(quantized), bounds.encoder_bounds(x, quantized)):
            for values in (known.element, known.token, known.relative, known.chord):
                assert not values[:, :sinks].any()
                assert (values[:, sinks:] > 0).all()
            assert not known.logit(np.ones((2, 3, 8)))[..., :sinks].any()
            assert known.element.shape == x.shape


def test_lost_tokens_have_an_error_of_their_own_size() -> None:
    """E4: where x_hat is 0 the relative error is 1 (D2), and a gain tells nothing of the norm."""
    x = np.zeros((197, 196), np.float32)
    x[:196] = np.eye(196)
    x[196] = 1
    for magnitude in ("norm", "gain", "lsq"):
        scheme = Scheme(scale_dtype="float32", magnitude=magnitude)  # type: ignore[arg-type]
        quantized = quantize(x, scheme)
        assert quantized.collapsed_tokens == 1
        known = bounds.certificate(quantized)
        np.testing.assert_allclose(known.relative[-1], 1, rtol=1e-12)
        assert known.chord[-1] == 2
        assert np.isinf(known.element[-1]).all() == (magnitude != "norm")
        assert np.isfinite(bounds.encoder_bounds(x, quantized).element).all()
        logit = known.logit_interval(np.ones((1, 196)))
        assert np.isinf(logit.high[0, -1]) == (magnitude != "norm")
        assert bounds.total_variation(logit) == 1 or magnitude == "norm"


def test_norms_that_are_flushed_to_zero_leave_little() -> None:
    """E9: float16 stores 0 for a norm of up to 2**-25 (M4)."""
    x = np.float32([[2.0**-25, 0], [0, 0], [1, 1]])
    known = bounds.certificate(quantize(x, Scheme()))
    np.testing.assert_allclose(known.token[0], 2.0**-25, rtol=2e-3)
    assert known.token[1] <= 2.0**-25 * (1 + 1e-6)
    np.testing.assert_allclose(known.relative[:2], 1, rtol=1e-12)
    known = bounds.certificate(quantize(x, Scheme(norm_dtype="float32")))
    assert known.token[1] == known.relative[1] == 0


def test_a_certificate_is_what_plain_arrays_give() -> None:
    """E1 to E6 for whoever has codes, scales and norms of another encoder, of one block (D1)."""
    x = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    for magnitude in ("norm", "gain", "lsq"):
        scheme = Scheme(magnitude=magnitude, symmetric=False)  # type: ignore[arg-type]
        q = quantize(x, scheme)
        known = bounds.certificate(q)
        direction = bounds.direction_interval(q.codes, q.scale, q.zero, scheme=scheme)
        y = dequantized(q)[0]
        norm = bounds.norm_interval(q.norm, y, direction, scheme=scheme)
        error = bounds.reconstruction_error(direction, norm, dequantize(q))
        np.testing.assert_array_equal(direction, known.direction)
        np.testing.assert_array_equal(norm, known.norm)
        np.testing.assert_array_equal(np.minimum(error, known.token[:, None]), known.element)
        query = np.ones((1, 5))
        np.testing.assert_array_equal(
            bounds.logit_error(query, direction, norm, dequantize(q)), known.logit_interval(query)
        )

"""E1 next to ties and to the ends of ranges."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nsq_ref import (
    Scheme,
    bounds,
    quantize,
    rounding,
    spec,
)
from nsq_ref.scheme import FLOAT_DTYPES
from tests.support.bounds_truth import (
    Float32,
    Float64,
)


def moved(values: Float64, ulps: npt.NDArray[np.int64]) -> Float32:
    """Return the float32 nearest to each value, moved by that many units in the last place."""
    nearest = values.astype(np.float32)
    step = np.spacing(np.abs(nearest)).astype(np.float64)
    return (nearest + ulps * step).astype(np.float32)


def drawn_scales(rng: np.random.Generator, scheme: Scheme, count: int) -> tuple[Float32, Float32]:
    """Scales and zeros of a scheme: of any significand, some subnormal, some negative."""
    dtype = FLOAT_DTYPES[scheme.scale_dtype]
    exponents = [-131, -15, -12, -8, -5, -3, -2] if scheme.symmetric else [-8, -5, -3, -2]
    scale = rng.uniform(0.5, 1, count) * 2.0 ** rng.choice(exponents, count)
    zero = np.zeros(count)
    if not scheme.symmetric:
        scale *= rng.choice([1, 1, 1, -1], count)
        levels = scheme.code_range[1]
        # Next to small directions the subtraction of the zero rounds, next to large ones D1's sum.
        zero = -scale * levels * rng.choice([0, 0.5, 1, 3, 2**6, 2**9], count)
        zero += scale * rng.uniform(-1, 1, count)
    return scale.astype(dtype).astype(np.float32), zero.astype(dtype).astype(np.float32)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("separate_norm", [True, False])
def test_elements_next_to_ties_lie_within_their_interval(
    scale_dtype: Any, symmetric: bool, separate_norm: bool
) -> None:
    """E1 where a rounding of N2, Q1 or D1 could make a difference: at the ends of the intervals."""
    for bits in (2, 3, 4, 8):
        scheme = Scheme(
            bits=bits,
            separate_norm=separate_norm,
            symmetric=symmetric,
            scale_dtype=scale_dtype,
        )
        rng = np.random.default_rng(bits)
        count = 1500
        scale, zero = drawn_scales(rng, scheme, count)
        scale, zero = scale[scale != 0], zero[scale != 0]
        count = len(scale)
        least, greatest = scheme.code_range
        half = rng.integers(least, greatest, count) + 0.5
        if scale_dtype == "float32" and symmetric:  # products next to a power of two round most
            code = half + rng.choice([-0.5, 0.5], count)
            scale = moved(2.0**-3 / np.where(code == 0, 1, np.abs(code)), rng.integers(0, 3, count))
        direction = moved(zero.astype(np.float64) + scale * half, rng.integers(-2, 3, count))
        norm = np.ones(count, np.float32)
        x = direction
        if separate_norm:
            norm = rng.uniform(1, 2, count).astype(np.float32)
            x = moved(direction.astype(np.float64) * norm, rng.integers(-1, 2, count))
            direction = x / norm
        codes = np.clip(np.rint((direction - zero) / scale), least, greatest).astype(int)
        y = codes.astype(np.float32) * scale + zero
        kept = (codes > least) & (codes < greatest) & (np.abs(x) <= norm)
        codes, scale, zero, x, norm, y = (v[kept] for v in (codes, scale, zero, x, norm, y))
        shift = None if symmetric else zero
        known = x / norm.astype(np.float64)  # these scales are no conforming encoder's
        low, high = bounds.direction_interval(codes, scale, shift, scheme=scheme, direction=known)
        error = bounds.element_error(scale, shift, scheme=scheme, direction=known)
        for i in range(len(codes)):
            exact = Fraction(float(x[i])) / Fraction(float(norm[i]))
            assert Fraction(float(low[i])) <= exact <= Fraction(float(high[i])), (scheme, i)
            assert abs(exact - Fraction(float(y[i]))) <= Fraction(float(error[i])), (scheme, i)


@pytest.mark.parametrize("scale_rule", ["range", "search"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_ends_of_a_range_lie_within_their_interval(symmetric: bool, scale_rule: Any) -> None:
    """E1 of the extremes that a scale comes from (S1, S2, S3, S4), next to where S3 narrows up."""
    for scale_dtype in ("float16", "bfloat16", "float32"):
        for bits in (2, 4, 8):
            scheme = Scheme(
                bits=bits,
                separate_norm=False,
                symmetric=symmetric,
                scale_dtype=scale_dtype,
                scale_rule=scale_rule,
            )
            rng = np.random.default_rng(bits)
            count = 1500
            greatest = scheme.code_range[1]
            exponent = rng.choice([-24, -22, -14, -3, 0, 3, -130, -126], count)
            above = rng.uniform(1, 2, count).astype(FLOAT_DTYPES[scale_dtype]) * 2.0**exponent
            with np.errstate(under="ignore"):
                above = above.astype(FLOAT_DTYPES[scale_dtype])
                tie = bounds.narrowing_interval(above, scale_dtype).high * greatest
            low = moved(tie * rng.uniform(-3, 1, count) * (not symmetric), 0 * exponent)
            zero = rounding.narrow(low, FLOAT_DTYPES[scale_dtype]).astype(np.float64)
            share = rng.choice(spec.SHRINK, count) if symmetric else 1
            high = moved(zero * (not symmetric) + tie / share, rng.integers(-2, 3, count))
            low = np.minimum(low, high)
            if symmetric:
                low = -high * rng.random(count).astype(np.float32)
            candidates = [spec.range_scale(low, high, scheme)]
            if scale_rule == "search":
                candidates = list(zip(*spec.shrunken_scales(low, high, scheme), strict=True))
            for scale, stored_zero in candidates:
                for extreme in (low, high):
                    shift = None if symmetric else stored_zero
                    codes = spec.code(extreme, scale, stored_zero, scheme).astype(int)
                    ends = bounds.direction_interval(codes, scale, shift, scheme=scheme)
                    assert (ends.low <= extreme).all(), (scheme, np.argmax(ends.low > extreme))
                    assert (extreme <= ends.high).all(), (scheme, np.argmax(extreme > ends.high))


def test_half_a_scale_is_attained() -> None:
    """E1: without norm separation a narrowed scale needs no slack at all (Q1, S3)."""
    x = np.float32([[7], [0.5], [-2.5], [3.5]])
    known = bounds.certificate(quantize(x, Scheme(separate_norm=False)))
    np.testing.assert_allclose(known.direction_element.ravel(), [0.5] * 4, rtol=1e-3)
    np.testing.assert_allclose(known.direction_element[1:].ravel(), 0.5, rtol=1e-12)
    np.testing.assert_array_equal(np.abs(x - known.x_hat)[1:], 0.5)


def test_frozen_scales_are_exceeded_by_no_more() -> None:
    """E1 of an element beyond the range of a frozen scale: what Q2 clamps, and no more."""
    for symmetric, zero, values in ((True, None, [1.5, -3]), (False, [-1.0], [2.0, -4])):
        scheme = Scheme(separate_norm=False, symmetric=symmetric)
        top = 0.125 * scheme.code_range[1] + (zero[0] if zero else 0)
        bottom = -top if symmetric else zero[0]  # type: ignore[index]
        error = bounds.element_error([0.125], zero, scheme=scheme, direction=values)
        np.testing.assert_allclose(error, [values[0] - top, bottom - values[1]], rtol=1e-12)

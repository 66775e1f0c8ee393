"""Every bound of docs/bounds.md holds, is nearly attained, and needs each of its terms.

The truth is computed here from definitions: from x, what is stored, and what `dequantize` returns.
Where an error comes close to its bound, exact fractions decide.
"""

from __future__ import annotations

import decimal
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings

from nsq_ref import (
    Quantized,
    RangeError,
    Scheme,
    bounds,
    dequantize,
    packing,
    quantize,
    rounding,
    spec,
)
from nsq_ref.bounds import Bounds, Interval
from nsq_ref.scheme import FLOAT_DTYPES
from nsq_ref.strategies import inputs, schemes
from tests.support.adversary import climb

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Index = tuple[int, ...]

WIDTHS = [1, 2, 3, 4, 5, 7, 8, 35, 36, 37, 64, 127, 128, 129, 195, 196, 197, 255, 256, 511, 512]
SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126}


@st.composite
def wide(draw: st.DrawFn) -> Array:
    """The tensors of `inputs`, in every dtype, their channels drawn to 1 to 512 of them."""
    x = draw(inputs())
    head_dim = draw(st.one_of(st.sampled_from(WIDTHS), st.integers(1, 512)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    columns = rng.integers(0, x.shape[-1], head_dim)
    changed = x[..., columns] * rng.choice([1.0, -1.0, 0.5], (*x.shape[:-1], head_dim))
    if draw(st.sampled_from([0, 0, 0, 1])):  # norms and factors that are subnormal in float32
        largest = max(float(np.abs(changed).max()), 1e-30)
        changed = changed / largest * 2.0 ** -draw(st.integers(120, 148))
    elif draw(st.booleans()) and x.shape[-2] > 1:  # one-hot tokens make scales as large as may be
        changed[..., :-1, :] = 0
        for t in range(x.shape[-2] - 1):
            changed[..., t, rng.integers(head_dim)] = rng.choice([1.0, -2.0])
    return changed.astype(x.dtype)


# --- exact comparison ---------------------------------------------------------------------------


def fractions(values: Any) -> list[Fraction]:
    return [Fraction(float(value)) for value in np.ravel(values)]


def dot(a: list[Fraction], b: list[Fraction]) -> Fraction:
    return sum((u * v for u, v in zip(a, b, strict=True)), Fraction())


def check(measured: Float64, bound: Float64, exact: Callable[[Index], bool]) -> None:
    """What is clearly below its bound is; of what is not, `exact` decides.

    `measured` may be off by 2**-40 of itself: differences, and sums of squares of 512 of them,
    are off by much less.
    """
    measured, bound = np.broadcast_arrays(measured, bound)
    for found in np.argwhere(~(measured * (1 + 2.0**-40) <= bound)):
        index = tuple(int(i) for i in found)
        assert exact(index), f"{measured[index]!r} at {index} is beyond {bound[index]!r}"


def squared(value: float) -> Fraction:
    return Fraction(float(value)) ** 2


# --- the truth ----------------------------------------------------------------------------------


def dequantized(quantized: Quantized) -> tuple[Float32, Float32]:
    """Return y (D1) and the scale of each coded element, from what is stored."""
    scheme, tokens = quantized.scheme, quantized.packed.shape[-2]
    size = max(min(scheme.block_size or tokens, tokens), 1)

    def each(part: Array) -> Array:
        return np.repeat(part, size, axis=-2)[..., :tokens, :]

    per_block = scheme.axis == "channel"
    scale = (each(quantized.scale) if per_block else quantized.scale).astype(np.float32)
    y = quantized.codes.astype(np.float32) * scale
    if quantized.zero is not None:
        y = y + (each(quantized.zero) if per_block else quantized.zero).astype(np.float32)
    if quantized.outlier_index is not None:
        outliers = quantized.outliers.astype(np.float32)
        np.put_along_axis(y, each(quantized.outlier_index), outliers, -1)
    return y, np.broadcast_to(scale, y.shape)


def coded_tokens(x: Array, quantized: Quantized) -> tuple[Float32, Float32]:
    """Return the tokens after the sinks as rule I1 takes them, and their norms of rule N1."""
    tokens = x.astype(np.float32)[..., quantized.scheme.sink_tokens :, :]
    if quantized.scheme.separate_norm:
        return tokens, rounding.norm(tokens)
    return tokens, np.ones(tokens.shape[:-1], np.float32)


def chord_at_most(x: Array, x_hat: Array, chord: float) -> bool:
    """Decide exactly whether the cosine of the angle is at least ``1 - chord**2 / 2``."""
    a, b, least = fractions(x), fractions(x_hat), 1 - squared(chord) / 2
    product, square = dot(a, b), least**2 * dot(a, a) * dot(b, b)
    if product >= 0:
        return least <= 0 or product**2 >= square
    return least <= 0 and product**2 <= square


def check_chords(x: Float32, x_hat: Float32, chord: Float64) -> None:
    """E3, of tokens that are neither zero nor decoded to zero."""
    lengths = [np.sqrt(np.sum(np.square(side, dtype=np.float64), axis=-1)) for side in (x, x_hat)]
    both = (lengths[0] > 0) & (lengths[1] > 0)
    units = (
        side / np.where(both, length, 1)[..., None]
        for side, length in zip((x, x_hat), lengths, strict=True)
    )
    apart = np.sqrt(np.sum(np.square(np.subtract(*units)), axis=-1))
    check(
        np.where(both, apart + 2.0**-40, 0),
        chord,
        lambda i: chord_at_most(x[i], x_hat[i], float(chord[i])),
    )


def check_direction(x: Array, quantized: Quantized, known: Bounds) -> None:
    """E1, E2 and the norm: what the bounds say of tokens that are not zero (N2)."""
    tokens, norm = coded_tokens(x, quantized)
    sinks = x.shape[-2] - tokens.shape[-2]
    y = dequantized(quantized)[0]
    some = norm > 0
    assert (known.norm.low[..., sinks:] <= norm).all()
    assert (norm <= known.norm.high[..., sinks:]).all()
    size = norm.astype(np.float64)[..., None]
    product = size * y  # exact
    error = np.where(some[..., None], np.abs(tokens - product), 0)

    def element(index: Index) -> Fraction:
        return abs(Fraction(float(tokens[index])) - Fraction(float(product[index])))

    limit = known.direction_element[..., sinks:, :]
    check(
        error,
        limit * size * (1 - 2.0**-52),
        lambda i: element(i) <= Fraction(float(limit[i])) * Fraction(float(norm[i[:-1]])),
    )
    total = known.direction_error[..., sinks:]
    check(
        np.sqrt(np.sum(np.square(error), axis=-1)),
        total * norm * (1 - 2.0**-52),
        lambda i: (
            sum(element((*i, j)) ** 2 for j in range(x.shape[-1]))
            <= squared(total[i]) * squared(norm[i])
        ),
    )
    for end, sign in zip(known.direction, (1, -1), strict=True):
        outside = sign * (end[..., sinks:, :] * size - tokens)
        check(
            np.where(some[..., None], outside, -1),
            np.full(outside.shape, -(2.0**-40)) * np.abs(tokens),
            lambda i, end=end, sign=sign: (  # type: ignore[misc]
                not norm[i[:-1]]
                or sign * Fraction(float(end[..., sinks:, :][i])) * Fraction(float(norm[i[:-1]]))
                <= sign * Fraction(float(tokens[i]))
            ),
        )


def check_tokens(x: Array, known: Bounds) -> None:
    """E3, E4 and E5: what the bounds say of every decoded token (D1)."""
    given, x_hat = x.astype(np.float32), known.x_hat
    error = np.abs(given.astype(np.float64) - x_hat)

    def element(index: Index) -> Fraction:
        return abs(Fraction(float(given[index])) - Fraction(float(x_hat[index])))

    def total(index: Index) -> Fraction:
        return sum((element((*index, j)) ** 2 for j in range(x.shape[-1])), Fraction())

    check(error, known.element, lambda i: element(i) <= Fraction(float(known.element[i])))
    distance = np.sqrt(np.sum(np.square(error), axis=-1))
    check(distance, known.token, lambda i: total(i) <= squared(known.token[i]))
    length = np.sqrt(np.sum(np.square(given, dtype=np.float64), axis=-1))
    claimed = np.isfinite(known.relative)
    check(
        np.where(claimed, distance, 0),
        np.where(claimed, known.relative, 1) * length,
        lambda i: total(i) <= squared(known.relative[i]) * dot(*[fractions(given[i])] * 2),
    )
    check_chords(given, x_hat, known.chord)
    cosine = 1 - known.chord**2 / 2
    assert (known.cosine <= cosine).all()
    assert (np.cos(known.angle) <= cosine + 1e-14).all()


def check_logits(x: Array, known: Bounds, query: Float64) -> None:
    """E6: what the bounds say of the inner product with a query (D1)."""
    given, x_hat = (side.astype(np.float32).astype(np.float64) for side in (x, known.x_hat))
    low, high = known.logit_interval(query)
    error = query @ np.swapaxes(x_hat - given, -1, -2)
    rough = 2.0**-40 * (np.abs(query) @ np.swapaxes(np.abs(x_hat) + np.abs(given), -1, -2))

    def exact(index: Index) -> Fraction:
        *lead, q, t = index
        a, b, c = (fractions(v) for v in (query[(*lead, q)], x_hat[(*lead, t)], given[(*lead, t)]))
        return dot(a, b) - dot(a, c)

    for index in map(tuple, np.argwhere(~((low <= error - rough) & (error + rough <= high)))):
        if np.isfinite(low[index]):
            assert Fraction(float(low[index])) <= exact(index) <= Fraction(float(high[index]))
    assert (known.logit(query) >= np.maximum(-low, high)).all()


def check_all(x: Array, quantized: Quantized, known: Bounds) -> None:
    for name in ("direction_element", "direction_error", "chord", "relative", "token", "element"):
        values = getattr(known, name)
        assert values.shape == x.shape[: values.ndim]
        assert (values >= 0).all(), name
    check_direction(x, quantized, known)
    check_tokens(x, known)
    rng = np.random.default_rng(0)
    check_logits(x, known, rng.standard_normal((*x.shape[:-2], 2, x.shape[-1])))


def quantized_or_none(x: Array, scheme: Scheme) -> Quantized | None:
    try:
        return quantize(x, scheme)
    except RangeError:
        return None


# --- the bounds hold ----------------------------------------------------------------------------


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
    norm = rounding.norm(x) if scheme.separate_norm else np.ones(x.shape[:-1], np.float32)
    zero = np.zeros_like(frozen.scale) if frozen.zero is None else frozen.zero
    with np.errstate(all="ignore"):
        direction = x / np.where(norm == 0, np.inf, norm).astype(np.float32)[..., None]
        codes = spec.code(direction, frozen.scale, zero, scheme)
        codes = np.where(norm[..., None] != 0, codes, 0).astype(np.int16)
        y = spec.dequantize(codes, frozen.scale, zero)
        factor = spec.factor(x, y, norm, scheme)
        stored = rounding.narrow(factor, FLOAT_DTYPES[scheme.norm_dtype])
    result = replace(
        frozen,
        shape=x.shape,
        dtype=x.dtype,
        packed=packing.pack(codes, scheme),
        norm=stored if scheme.separate_norm else None,
    )
    return result if np.isfinite(stored).all() and np.isfinite(dequantize(result)).all() else None


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


@settings(max_examples=500)
@given(st.one_of(inputs(), wide()), schemes())
def test_what_is_known_before_any_data_holds(x: Array, scheme: Scheme) -> None:
    """E1 to E4 from the scheme and the head size alone (S1, S2, S4, O1)."""
    quantized = quantized_or_none(x, scheme)
    if quantized is not None:
        check_a_priori(x, quantized)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_known_of_short_blocks_holds(symmetric: bool, scale_dtype: Any) -> None:
    """E1 to E4 where the ends of ranges are most of the error (B1, S3)."""
    rng = np.random.default_rng(0)
    for bits in (2, 4, 8):
        for block_size in (1, 2, 3):
            for scale_rule in ("range", "search"):
                scheme = Scheme(
                    bits=bits,
                    symmetric=symmetric,
                    block_size=block_size,
                    scale_rule=scale_rule,  # type: ignore[arg-type]
                    scale_dtype=scale_dtype,
                )
                x = rng.standard_normal((40, block_size, 5)).astype(np.float32)
                check_a_priori(x, quantize(x, scheme))


def check_a_priori(x: Array, quantized: Quantized) -> None:
    scheme, head_dim = quantized.scheme, x.shape[-1]
    known = bounds.a_priori(scheme, head_dim)
    tokens, norm = coded_tokens(x, quantized)
    small = (norm > 0) & (norm < 2.0**-126)
    if small.any() if scheme.separate_norm else np.abs(tokens).max(initial=0) > 2.0**126:
        return  # it says nothing of such blocks
    y, scale = dequantized(quantized)
    decoded = dequantize(quantized)[..., scheme.sink_tokens :, :]
    size = np.sqrt(np.sum(np.square(tokens, dtype=np.float64), axis=-1))
    stored, dtype = quantized.norm, scheme.norm_dtype
    if stored is None:
        dtype = scheme.scale_dtype
        stored = (
            np.broadcast_to(quantized.scale[..., 0], norm.shape) if scheme.axis == "token" else 1
        )
    normal = (size > 0) & (norm >= 2.0**-126)
    normal &= np.abs(np.asarray(stored, np.float64)) >= SMALLEST_NORMAL[dtype]
    if scheme.separate_norm:
        some = norm > 0
        assert (np.abs(scale[some]) <= known.scale).all()
        direction = tokens / np.where(some, norm, 1).astype(np.float64)[..., None]
        error = np.abs(direction - y)[some]
        assert (error <= known.direction_element * (1 + 2.0**-50)).all()
        total = np.sqrt(np.sum(np.square(error), axis=-1))
        assert (total <= known.direction_error * (1 + 2.0**-40)).all()
    elif not scheme.separate_norm and np.isfinite(known.direction_error):
        total = np.sqrt(np.sum(np.square(tokens - y.astype(np.float64)), axis=-1))
        assert (total <= known.direction_error * size * (1 + 2.0**-40))[normal].all()
    missed = np.sqrt(np.sum(np.square(tokens - decoded.astype(np.float64)), axis=-1))
    if np.isfinite(known.relative):
        assert (missed <= known.relative * size * (1 + 2.0**-40))[normal].all()
    some = np.where(normal[..., None], tokens, 0)
    check_chords(some, decoded, np.full(normal.shape, known.chord))


# --- next to ties and to the ends of ranges -----------------------------------------------------


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


# --- attention ----------------------------------------------------------------------------------


def weights(logits: list[Decimal]) -> list[Decimal]:
    """Softmax, to fifty digits."""
    largest = max(logits)
    shares = [(logit - largest).exp() for logit in logits]
    return [share / sum(shares) for share in shares]


def capped(logit: Decimal, softcap: float | None) -> Decimal:
    if softcap is None:
        return logit
    cap = Decimal(softcap)
    turn = (-2 * abs(logit) / cap).exp()
    return cap * ((1 - turn) / (1 + turn)).copy_sign(logit)


def varied(exact: list[Decimal], decoded: list[Decimal]) -> Decimal:
    before, after = weights(exact), weights(decoded)
    return sum((abs(a - b) for a, b in zip(before, after, strict=True)), Decimal()) / 2


@st.composite
def logit_errors(draw: st.DrawFn) -> tuple[list[float], list[float], Interval, list[bool]]:
    """Logits, their errors, an interval around each error, and which tokens are seen."""
    count = draw(st.integers(1, 6))
    size = draw(st.sampled_from([0.01, 1.0, 20.0]))
    # Smaller ones would be lost in the digits that the oracle has.
    number = st.floats(-size, size).map(lambda value: value if abs(value) > 1e-20 else 0.0)
    wide_number = st.floats(-3 * size, 3 * size)
    logits = draw(st.lists(wide_number, min_size=count, max_size=count))
    errors = draw(st.lists(number, min_size=count, max_size=count))
    slack = draw(st.sampled_from([0.0, 0.1, 1.0]))
    low = np.array(errors) - slack * np.array(
        draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    )
    seen = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return logits, errors, Interval(low, np.array(errors) + slack), seen


@settings(max_examples=300)
@given(
    logit_errors(),
    st.sampled_from([1.0, 0.125, 3.0]),
    st.sampled_from([None, 0.5, 5.0, 50.0]),
)
def test_total_variation_holds(
    drawn: tuple[list[float], list[float], Interval, list[bool]],
    scale: float,
    softcap: float | None,
) -> None:
    """E7, with softmax scale, softcap and tokens that are not seen."""
    logits, errors, interval, seen = drawn
    bound = bounds.total_variation(
        interval, softmax_scale=scale, softcap=softcap, where=np.array(seen)
    )
    if not any(seen):
        assert bound == 0
        return
    with decimal.localcontext(prec=50):
        exact, decoded = (
            [
                capped(Decimal(scale) * value, softcap)
                for value, s in zip(both, seen, strict=True)
                if s
            ]
            for both in (
                [Decimal(logit) for logit in logits],
                [
                    Decimal(logit) + Decimal(error)
                    for logit, error in zip(logits, errors, strict=True)
                ],
            )
        )
        assert varied(exact, decoded) <= Decimal(float(bound))


@settings(max_examples=60)
@given(inputs(), schemes(), st.integers(0, 2**32 - 1))
def test_outputs_of_attention_hold(x: Array, scheme: Scheme, seed: int) -> None:
    """E6, E7 and E8 from stored keys and values to the output, causal and softcapped."""
    rng = np.random.default_rng(seed)
    keys = np.clip(x[0].astype(np.float64), -1e4, 1e4).astype(np.float32)
    values = rng.permutation(keys, axis=-1) * np.float32(rng.choice([1.0, -0.3]))
    tokens, head_dim = keys.shape
    stored = [quantized_or_none(part, scheme) for part in (keys, values)]
    if stored[0] is None or stored[1] is None:
        return
    of_keys, of_values = (bounds.certificate(part) for part in stored)
    size = max(float(np.abs(keys).max()), 1e-30)
    query = rng.standard_normal((tokens, head_dim)) / size * rng.choice([0.1, 1.0, 5.0])
    where = np.tri(tokens, dtype=bool)
    softcap = rng.choice([None, 2.0])
    limit = bounds.total_variation(
        of_keys.logit_interval(query), softmax_scale=0.5, softcap=softcap, where=where
    )
    apart = bounds.spread(of_values.x_hat, of_values.token, where)
    assert (apart <= bounds.spread(of_values.x_hat, of_values.token) * (1 + 1e-12)).all()
    with decimal.localcontext(prec=50):
        for q in range(tokens):
            shares = []
            for side in (keys, of_keys.x_hat):
                logits = [
                    capped(exactly(dot(fractions(query[q]), fractions(side[t]))) / 2, softcap)
                    for t in range(q + 1)
                ]
                shares.append(weights(logits))
            moved = sum(abs(a - b) for a, b in zip(*shares, strict=True)) / 2
            assert moved <= Decimal(float(limit[q]))
            square = Decimal()
            for j in range(head_dim):
                outputs = [
                    sum(share * Decimal(float(side[t, j])) for t, share in enumerate(by))
                    for by, side in zip(shares, (values, of_values.x_hat), strict=True)
                ]
                square += (outputs[0] - outputs[1]) ** 2
            decoded = np.array([[float(share) for share in shares[1]]])
            bound = bounds.output_error(
                decoded, of_values.token[: q + 1], limit[q : q + 1], apart[q : q + 1]
            )
            # The weights given are rounded, to 2**-53 of themselves.
            assert square.sqrt() <= Decimal(float(bound[0])) * (1 + Decimal(2) ** -50)


def exactly(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def test_an_attained_total_variation() -> None:
    """E7: weights that swap, and stored keys that make them swap (Q1 rounds each to its bound)."""
    for h in (0.01, 1.0, 6.0):
        interval = Interval(np.array([-h, -h]), np.array([h, h]))
        exact = 1 / (1 + np.exp(h))  # of the first token; afterwards it is the second's
        assert bounds.total_variation(interval) <= (1 - 2 * exact) * (1 + 1e-12)
    keys = np.float32([[7, 7], [0.5, 1.5], [1.5, 1.5]])
    keys[1, 0], keys[2] = np.nextafter(keys[1, 0], 1), np.nextafter(keys[2], 1)
    quantized = quantize(keys, Scheme(separate_norm=False))
    np.testing.assert_array_equal(quantized.codes[1:], [[1, 2], [1, 1]])
    known = bounds.certificate(quantized)
    seen = np.array([False, True, True])
    for size in (0.1, 1.0, 4.0):
        query = np.array([[size, size]])
        limit = bounds.total_variation(known.logit_interval(query), where=seen)
        with decimal.localcontext(prec=50):
            exact_, decoded = (
                [exactly(dot(fractions(query), fractions(side[t]))) for t in (1, 2)]
                for side in (keys, known.x_hat)
            )
            assert varied(exact_, decoded) >= Decimal(float(limit[0])) * Decimal("0.9999")


def test_a_softcap_shrinks_errors_but_lets_none_cancel() -> None:
    """E7: the two things a softcap does to errors, both attained."""
    error = Interval(np.array([40.0, -40.0]), np.array([40.0, -40.0]))  # logits -20 and 20
    swapped = bounds.total_variation(error, softcap=0.5)
    np.testing.assert_allclose(swapped, np.tanh(0.5), rtol=1e-12)  # from -cap to cap
    error = Interval(np.full(2, 3.0), np.full(2, 3.0))
    assert bounds.total_variation(error) < 1e-12
    with decimal.localcontext(prec=50):
        before, after = (
            [capped(Decimal(logit), 2.0) for logit in logits] for logits in ((0, 100), (3, 103))
        )
        limit = bounds.total_variation(error, softcap=2.0)
        assert Decimal("0.3") < varied(before, after) <= Decimal(float(limit))


def test_an_attained_output_error() -> None:
    """E8: two values as far apart as their codes allow, and weights that swap (Q1)."""
    values = np.float32([[127], [126.5], [-126.5]])
    known = bounds.certificate(quantize(values, Scheme(bits=8, separate_norm=False)))
    assert known.x_hat.ravel().tolist() == [127, 126, -126]
    seen = np.array([[False, True, True]])
    apart = bounds.spread(known.x_hat, known.token, seen)
    np.testing.assert_allclose(apart, [253], rtol=1e-12)
    moved = 0.4
    exact, decoded = np.array([0.3, 0.7]), np.array([0.7, 0.3])
    output = decoded @ known.x_hat[1:, 0] - exact @ values[1:, 0].astype(np.float64)
    limit = bounds.output_error([[0, *decoded]], known.token, [moved], apart)
    assert 0.99 * limit <= abs(output) <= limit


def test_spread_is_little_more_than_the_largest_distance() -> None:
    """E8: by Jung's theorem at most sqrt(2) of it for the best centre; 1 for two points."""
    rng = np.random.default_rng(0)
    for head_dim in (1, 2, 64):
        values = rng.standard_normal((5, 33, head_dim))
        gap = np.linalg.norm(values[:, :, None] - values[:, None], axis=-1).max(axis=(-1, -2))
        ratio = bounds.spread(values, np.zeros((5, 33)))[..., 0] / gap
        assert (ratio >= 1).all()
        assert (ratio <= 1.25).all()
    two = rng.standard_normal((2, 3))
    apart = bounds.spread(two, [0.25, 0.5])
    np.testing.assert_allclose(apart, np.linalg.norm(two[0] - two[1]) + 0.75, rtol=1e-12)
    assert bounds.spread(two[:1], [0.25]) == 0


# --- how close an error comes to its bound -------------------------------------------------------


def ratio(what: str, knowledge: str) -> Callable[[Float32, Scheme], float]:
    """Return what the search climbs: measured over bound, of the last token."""

    def objective(x: Float32, scheme: Scheme) -> float:
        quantized = quantize(x, scheme)
        known: Any
        if knowledge == "a priori":
            known = bounds.a_priori(scheme, x.shape[-1])
        elif knowledge == "encoder":
            known = bounds.encoder_bounds(x, quantized)
        else:
            known = bounds.certificate(quantized)
        x_hat, norm = dequantize(quantized)[-1].astype(np.float64), coded_tokens(x, quantized)[1]
        token, y = x[-1].astype(np.float64), dequantized(quantized)[0][-1]
        length, decoded = np.linalg.norm(token), np.linalg.norm(x_hat)
        if decoded == 0 or length < 1e-6:
            return -np.inf  # a token that is lost attains every bound
        measured = {
            "direction_element": np.abs(token / norm[-1] - y),
            "direction_error": np.linalg.norm(token / norm[-1] - y),
            "chord": np.linalg.norm(token / length - x_hat / decoded),
            "relative": np.linalg.norm(token - x_hat) / length,
            "element": np.abs(token - x_hat),
        }
        if what == "logit":
            query = np.sign(token - x_hat)[None]
            return float((query @ (token - x_hat))[0] / -known.logit_interval(query).low[0, -1])
        bound = getattr(known, what)
        limit = bound if knowledge == "a priori" else bound[-1]
        if knowledge == "a priori" and what == "direction_error" and not scheme.separate_norm:
            limit = limit * length
        return float(np.max(measured[what] / limit))

    return objective


FAMILY: dict[str, dict[str, Any]] = {
    "nsep+pchan4": {},
    "nsep4": {"axis": "token"},
    "asymmetric": {"symmetric": False},
    "asymmetric, a token": {"symmetric": False, "axis": "token"},
    "gain": {"magnitude": "gain"},
    "lsq": {"magnitude": "lsq", "symmetric": False},
    "2 bits": {"bits": 2},
    "8 bits": {"bits": 8, "scale_dtype": "bfloat16"},
    "float32": {"scale_dtype": "float32", "norm_dtype": "float32"},
    "pchan4": {"separate_norm": False},
    "naive4": {"separate_norm": False, "axis": "token"},
    "search": {"scale_rule": "search"},
    "outliers": {"outlier_channels": 1},
    "blocks of 2": {"block_size": 2},
}
HEAD_DIM, STEPS = 24, 300

# The last is the seed of a search of so few steps. docs/bounds.md has what longer ones reach.
REACHED = [
    ("certificate", "nsep+pchan4", "direction_element", 0),
    ("certificate", "nsep+pchan4", "direction_error", 0),
    ("certificate", "nsep+pchan4", "chord", 0),
    ("certificate", "nsep+pchan4", "relative", 0),
    ("certificate", "nsep+pchan4", "element", 0),
    ("certificate", "nsep+pchan4", "logit", 0),
    ("certificate", "nsep4", "relative", 0),
    ("certificate", "asymmetric", "direction_error", 0),
    ("certificate", "asymmetric, a token", "relative", 0),
    ("certificate", "gain", "relative", 0),
    ("certificate", "gain", "logit", 0),
    ("certificate", "lsq", "relative", 1),
    ("certificate", "lsq", "logit", 0),
    ("certificate", "2 bits", "relative", 0),
    ("certificate", "8 bits", "relative", 0),
    ("certificate", "float32", "relative", 0),
    ("certificate", "pchan4", "direction_error", 0),
    ("certificate", "naive4", "logit", 0),
    ("certificate", "naive4", "relative", 0),
    ("certificate", "search", "relative", 0),
    ("certificate", "outliers", "relative", 0),
    ("certificate", "blocks of 2", "relative", 0),
    ("encoder", "nsep+pchan4", "relative", 0),
    ("encoder", "asymmetric, a token", "relative", 0),
    ("encoder", "lsq", "logit", 0),
    ("encoder", "search", "relative", 0),
    ("a priori", "nsep+pchan4", "relative", 0),
    ("a priori", "8 bits", "relative", 0),
    ("a priori", "asymmetric", "direction_error", 0),
    ("a priori", "blocks of 2", "relative", 0),
]


@pytest.mark.parametrize(("knowledge", "name", "what", "seed"), REACHED)
def test_a_search_comes_close_to_the_bounds_and_never_beyond(
    knowledge: str, name: str, what: str, seed: int
) -> None:
    """E1 to E6 on what a search finds (Q1, S1 to S4, M1 to M3)."""
    scheme = Scheme(**FAMILY[name])
    tokens = scheme.block_size or 2 * HEAD_DIM + 1
    found = climb(ratio(what, knowledge), scheme, tokens, HEAD_DIM, seed=seed, steps=STEPS)
    assert found.ratio >= 0.95
    quantized = quantize(found.x, scheme)
    last = bounds.certificate(quantized), bounds.encoder_bounds(found.x, quantized)
    for known in last:
        check_all(found.x, quantized, known)
    check_a_priori(found.x, quantized)


# --- inputs that attain a bound -----------------------------------------------------------------


def last_ratios(x: Float32, scheme: Scheme, knowledge: str) -> dict[str, float]:
    """Return how much of its bounds the last token attains, none of which it may exceed."""
    quantized = quantize(x, scheme)
    check_a_priori(x, quantized)
    check_all(x, quantized, bounds.certificate(quantized))
    names = ("direction_element", "direction_error", "chord", "relative")
    return {name: ratio(name, knowledge)(x, scheme) for name in names}


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


@pytest.mark.parametrize("head_dim", [2, 12, 196, 512])
def test_a_scale_a_token_attains_what_is_known_before_any_data(head_dim: int) -> None:
    """E2, E3, E4: one element that makes the scale, and all others half of it (S1, Q1)."""
    x = np.full((1, head_dim), 0.999, np.float32)
    x[0, 0] = 14
    reached = last_ratios(x, Scheme(axis="token", norm_dtype="float32"), "a priori")
    for name in ("direction_error", "chord", "relative"):
        assert reached[name] > 0.99, name
    x[0] = 0
    x[0, :2] = 1, -1
    scheme = Scheme(axis="token", symmetric=False, norm_dtype="float32")
    if head_dim > 2:
        assert last_ratios(x, scheme, "a priori")["direction_error"] > 0.99


def test_a_scale_a_channel_attains_what_is_known_before_any_data() -> None:
    """E1, E2 and E4: one-hot tokens, and one token whose elements are all half way (S1, S2)."""
    x = np.zeros((29, 28), np.float32)
    x[:28] = np.eye(28)
    x[28], x[28, 0] = 1, 13  # length 14: the directions are half and thirteen halves of 1/7
    scheme = Scheme(scale_dtype="float32", norm_dtype="float32")
    for knowledge in ("a priori", "certificate"):
        reached = last_ratios(x, scheme, knowledge)
        assert min(reached["direction_element"], reached["direction_error"]) > 0.9999
        assert min(reached["chord"], reached["relative"]) > 0.95
    x = np.concatenate([np.eye(64), -np.eye(64), np.eye(64)[:1]]).astype(np.float32)
    reached = last_ratios(x, Scheme(symmetric=False), "a priori")
    assert reached["direction_element"] > 0.99
    assert reached["direction_error"] > 0.98


def test_a_block_of_one_token_errs_by_its_narrowed_scales() -> None:
    """E2: the ends of a range err by what S3 narrowed, here half way between two float16."""
    x = np.full((1, 6), 7 * (1 + 2.0**-11), np.float32)
    x[0, 5] = np.sqrt(256 - np.sum(np.square(x[0, :5], dtype=np.float64)))
    assert last_ratios(x, Scheme(block_size=1), "a priori")["direction_error"] > 0.97


def test_a_search_cuts_as_much_as_is_known_before_any_data() -> None:
    """E1 with rule S4: many tokens on the grid of the shortest range, and one at the end."""
    grid = np.tile(np.arange(-6, 7) / 10, 60)
    x = np.stack([grid, np.sqrt(1 - grid**2)], -1).astype(np.float32)
    x = np.concatenate([x, np.float32([[1, 0]])])
    scheme = Scheme(scale_rule="search")
    assert last_ratios(x, scheme, "a priori")["direction_element"] > 0.99
    assert last_ratios(x, scheme, "certificate")["direction_element"] > 0.95
    # In a block of 170 tokens no search cuts off more than it saves on these: ties of the whole
    # range, and on the grid of the next shorter one.
    ties = np.resize([9.5, 28.5, 47.5, 66.5, 85.5, 104.5], 169) / 127
    x = np.stack([np.append(ties, 1), np.sqrt(1 - np.append(ties, 1) ** 2)], -1).astype(np.float32)
    scheme = Scheme(bits=8, scale_rule="search", block_size=170, scale_dtype="float32")
    assert last_ratios(x, scheme, "a priori")["direction_element"] > 0.95


def test_an_angle_may_be_right_where_nothing_is_known_before_any_data() -> None:
    """E3 and E4 beyond 4 qmax^2 channels: all elements but a small one are coded as 0 (Q1)."""
    x = np.zeros((6, 5), np.float32)
    x[0, :2] = 0.02, 1
    x[1:5, 1:] = np.eye(4)
    x[5] = 0.012, 0.4999, 0.4999, 0.4999, 0.4999
    reached = last_ratios(x, Scheme(bits=2, norm_dtype="float32"), "a priori")
    assert min(reached["chord"], reached["relative"]) > 0.98
    # Two elements that are coded as the smallest float32, whose norm then rounds to that too.
    x = np.concatenate([np.full((6, 1), 0, np.float32), x], axis=-1)
    x[0, :2], x[5, :2] = 2.0**-149, 2.0**-149
    scheme = Scheme(bits=2, scale_dtype="float32", norm_dtype="float32")
    quantized = quantize(x, scheme)
    missed = np.linalg.norm(x[5] - dequantize(quantized)[5]) / np.linalg.norm(x[5])
    assert missed > 1.7
    check_a_priori(x, quantized)
    check_all(x, quantized, bounds.certificate(quantized))


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


# --- tokens that are not coded, or lost ----------------------------------------------------------


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


def test_the_estimate_is_near_on_random_data_and_no_bound() -> None:
    """The RMS estimate of D1's errors, kept apart from the bounds by its name."""
    rng = np.random.default_rng(0)
    x, query = rng.standard_normal((2, 512, 64)).astype(np.float32)
    for scheme in (Scheme(), Scheme.named("streaming3"), Scheme.named("naive4")):
        known = bounds.certificate(quantize(x, scheme))
        error = np.abs(query @ (x - known.x_hat).T)[:, scheme.sink_tokens :]
        estimate = known.estimate_logit_rms(query)[:, scheme.sink_tokens :]
        assert 0.85 < np.sqrt(np.mean(estimate**2) / np.mean(error**2)) < 1.15
        assert (error > estimate).any()
    by_scale = bounds.estimate_logit_rms(query, np.full((3, 64), 0.1), np.ones(3))
    expected = np.linalg.norm(query, axis=-1) * 0.1 / 12**0.5
    np.testing.assert_allclose(by_scale[:, 0], expected, rtol=1e-6)


# --- refusals -----------------------------------------------------------------------------------

ONE = np.ones((1, 2))
UNIT_INTERVAL = Interval(ONE, ONE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds.certificate(ONE), "quantized must be what quantize returns, got ndarray"),
        (lambda: bounds.encoder_bounds(ONE, 3), "quantized must be what quantize returns, got int"),
        (
            lambda: bounds.encoder_bounds(np.ones((3, 2)), quantize(ONE)),
            r"x has shape \[3, 2\]; what was quantized has \[1, 2\]",
        ),
        (lambda: bounds.encoder_bounds([[1, np.nan]], quantize(ONE)), r"x\[0, 1\] is nan"),
        (lambda: bounds.a_priori(4, 64), "scheme must be a Scheme or a name .*, got 4"),
        (lambda: bounds.a_priori(Scheme(), 0), "head_dim=0 must be an integer of at least 1"),
        (
            lambda: bounds.narrowing_interval([0.1], "float16"),
            r"stored\[0\] is 0.1, which is not a",
        ),
        (lambda: bounds.narrowing_interval([1.0], "float8"), "dtype='float8' is not one of"),
        (lambda: bounds.narrowing_interval(["1"], "float16"), "stored has dtype <U1"),
        (
            lambda: bounds.direction_interval([[8]], [[1.0]], scheme=Scheme()),
            r"codes\[0, 0\] is 8, which is not within -7 to 7",
        ),
        (
            lambda: bounds.direction_interval([[1.0]], [[1.0]], scheme=Scheme()),
            "codes has dtype float64; give integers",
        ),
        (
            lambda: bounds.direction_interval([[1]], [[1.0]], [[0.0]], scheme=Scheme()),
            "has no zero; leave it out",
        ),
        (
            lambda: bounds.element_error([[1.0]], scheme=Scheme(symmetric=False)),
            "needs a zero",
        ),
        (
            lambda: bounds.direction_interval(
                np.ones((2, 3), int), np.ones((2, 2)), scheme=Scheme()
            ),
            r"shapes do not fit together: codes \[2, 3\], scale \[2, 2\]",
        ),
        (
            lambda: bounds.element_error([np.inf], scheme=Scheme()),
            r"scale\[0\] is inf, which is not",
        ),
        (
            lambda: bounds.direction_error([[-1.0]]),
            r"element\[0, 0\] is -1.0, which is not a bound",
        ),
        (lambda: bounds.chord([np.nan]), r"error\[0\] is nan, which is not a bound"),
        (lambda: bounds.chord([1.0, 1.0], np.ones((3, 2))), "shapes do not fit together: error"),
        (lambda: bounds.relative_error([2.5]), r"chord\[0\] is 2.5, which is more than 2"),
        (lambda: bounds.relative_error([1.0], magnitude="rms"), "magnitude='rms' is not one of"),
        (
            lambda: bounds.relative_error([1.0], Interval(np.array(-2.0), np.array(0.0))),
            r"factor_error is -2.0, which is below -1",
        ),
        (
            lambda: bounds.norm_interval(
                [1.0, 2.0], np.ones((3, 2)), UNIT_INTERVAL, scheme=Scheme()
            ),
            "shapes do not fit together: factor",
        ),
        (
            lambda: bounds.logit_error(
                np.ones(2), UNIT_INTERVAL, Interval(ONE[:, 0], ONE[:, 0]), ONE
            ),
            r"query has shape \[2\]; give \[..., queries, 2\]",
        ),
        (
            lambda: bounds.total_variation(UNIT_INTERVAL, softcap=0.0),
            "softcap=0.0 is not a positive finite number",
        ),
        (
            lambda: bounds.total_variation(UNIT_INTERVAL, where=[1, 0]),
            "where has dtype int64; give True",
        ),
        (lambda: bounds.spread(np.ones((3, 2)), [1.0, 2.0]), "shapes do not fit together: error"),
        (
            lambda: bounds.output_error([[-1.0]], [1.0], [0.0], [1.0]),
            r"weights\[0, 0\] is -1.0, which is not a bound",
        ),
        (
            lambda: bounds.output_error([[1.0, 0.0]], [1.0], [0.0], [1.0]),
            r"weights has shape \[1, 2\] and error \[1\]",
        ),
    ],
)
def test_bad_input_gets_one_clear_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()

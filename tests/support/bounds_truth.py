"""The truth about errors, from x, what is stored, and what `dequantize` returns; and its bounds.

Where an error comes close to its bound, exact fractions decide.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt

from nsq_ref import (
    Quantized,
    RangeError,
    Scheme,
    bounds,
    dequantize,
    quantize,
    rounding,
    spec,
)
from nsq_ref.bounds import Bounds
from nsq_ref.strategies import inputs

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


@st.composite
def uneven(draw: st.DrawFn) -> Array:
    """Tensors whose channels are of sizes of their own, so that norms may be balanced (N3)."""
    heads, tokens = draw(st.integers(1, 2)), draw(st.integers(2, 40))
    head_dim = draw(st.one_of(st.sampled_from([2, 3, 8, 64]), st.integers(2, 130)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (heads, tokens, head_dim)
    if draw(st.booleans()):
        x = rng.standard_normal(shape)
    else:
        x = np.clip(rng.standard_t(1.5, shape), -1e3, 1e3)
    sizes = np.ones(head_dim)
    few = rng.permutation(head_dim)[: draw(st.sampled_from([1, 2, max(head_dim // 2, 1)]))]
    sizes[few] = draw(st.sampled_from([1.0, 20.0, 50.0, 3e3, 1e5]))
    offset = rng.standard_normal(head_dim) * draw(st.sampled_from([0.0, 0.0, 1.0, 30.0]))
    x = (x + offset) * sizes
    x = x * 10.0 ** rng.uniform(-1, 1, (heads, tokens, 1)) ** draw(st.sampled_from([0, 1, 8]))
    x[:, rng.random(tokens) < draw(st.sampled_from([0.0, 0.2]))] = 0
    x[..., rng.random(head_dim) < draw(st.sampled_from([0.0, 0.2]))] = 0
    largest = max(float(np.abs(x).max()), 1e-30)
    exponent = draw(st.sampled_from([0, 0, 0, 1, 2]))
    if exponent:  # norms and quotients that are subnormal, or beyond float32
        x = x / largest * 2.0 ** draw(st.integers(-148, -115) if exponent == 1 else st.just(124))
    return x.astype(np.float32)


def quantized_or_none(x: Array, scheme: Scheme) -> Quantized | None:
    try:
        return quantize(x, scheme)
    except RangeError:
        return None


def fractions(values: Any) -> list[Fraction]:
    return [Fraction(float(value)) for value in np.ravel(values)]


def dot(a: list[Fraction], b: list[Fraction]) -> Fraction:
    return sum((u * v for u, v in zip(a, b, strict=True)), Fraction())


def squared(value: float) -> Fraction:
    return Fraction(float(value)) ** 2


def check(measured: Float64, bound: Float64, exact: Callable[[Index], bool]) -> None:
    """What is clearly below its bound is; of what is not, `exact` decides.

    `measured` may be off by 2**-40 of itself: differences, and sums of squares of 512 of them,
    are off by much less.
    """
    measured, bound = np.broadcast_arrays(measured, bound)
    for found in np.argwhere(~(measured * (1 + 2.0**-40) <= bound)):
        index = tuple(int(i) for i in found)
        assert exact(index), f"{measured[index]!r} at {index} is beyond {bound[index]!r}"


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
    """Return the tokens after the sinks as rule I1 takes them, and their norms (N1, N3)."""
    scheme = quantized.scheme
    tokens = x.astype(np.float32)[..., scheme.sink_tokens :, :]
    norm = np.ones(tokens.shape[:-1], np.float32)
    with np.errstate(all="ignore"):
        for rows in spec.block_slices(tokens.shape[-2], scheme):
            norm[..., rows] = spec.norms_and_sizes(tokens[..., rows, :], scheme)[0]
    return tokens, norm


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


def check_a_priori(x: Array, quantized: Quantized) -> None:
    scheme, head_dim = quantized.scheme, x.shape[-1]
    known = bounds.a_priori(scheme, head_dim)
    tokens, norm = coded_tokens(x, quantized)
    plain = rounding.norm(tokens) if scheme.separate_norm else norm
    small = (plain > 0) & (plain < 2.0**-126)
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
    normal = (size > 0) & (plain >= 2.0**-126)
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

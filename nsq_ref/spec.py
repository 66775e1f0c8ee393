"""NSQ-1 in plain NumPy, one line a rule. docs/spec.md says why.

Everything is float32 and every operation rounds once, half to even. ``x`` is [..., T, D], sinks
already removed (K1); but for `encode_blocks` and `decode_blocks` it is the tokens of one block
(B1). Speed is the business of `kernels`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref import rounding
from nsq_ref.dtypes import FLOAT_DTYPES, Array, Float32, Float64
from nsq_ref.environment import in_default_environment
from nsq_ref.feedback import HeadFeedback
from nsq_ref.scheme import Scheme

SHRINK = np.array([1, 0.95, 0.9, 0.85, 0.8, 0.7], np.float32)  # S4, widest first
LEAST_SIZE = np.float32(2.0**-12)  # N3


class Block(NamedTuple):
    """What a block stores, and what it need not store because the scheme implies it.

    No function of this library writes to one, so that threads may share it.

    Without norm separation every norm is 1, without asymmetry every zero is -0, which added to a
    product leaves it as it is, and without outlier channels those arrays have a last axis of
    length 0.
    """

    codes: Array  # [..., T, D]
    norm: Array  # [..., T]
    scale: Array  # [..., 1, D] or [..., T, 1]
    zero: Array  # like scale
    outlier_index: npt.NDArray[np.int32]  # [..., 1, k]
    outliers: npt.NDArray[np.float16]  # [..., T, k]
    collapsed: npt.NDArray[np.bool_]  # [..., T], tokens that decode to zero but are not (D2)


class FedBack(NamedTuple):
    """What rule F1 makes of the directions of one block.

    No function of this library writes to one, so that threads may share it.
    """

    w: Float32  # [..., T, D], coded in place of the directions
    error: Float32  # [..., T, D], of each step
    seen: Float32  # [..., T, D], the directions as the weights see them (M2)
    scale: Array  # as in Block
    zero: Array


@in_default_environment
def encode(x: Float32, scheme: Scheme, feedback: HeadFeedback | None = None) -> Block:
    """Quantize one block ``x[..., T, D]``, with ``feedback`` all of one key/value head.

    Examples
    --------
    >>> import numpy as np
    >>> block = encode(np.float32([[3, 4], [-1.5, 2]]), Scheme())
    >>> block.codes
    array([[ 7,  7],
           [-7,  7]], dtype=int16)
    >>> block.norm
    array([5. , 2.5], dtype=float16)
    """
    norm, size = norms_and_sizes(x, scheme)  # N1 N3
    direction = direction_of(x, norm)  # N2
    index = outlier_channels(direction, scheme)  # O1
    coded = ~mark(index, x.shape[-1])
    if feedback is None:
        w, length = direction, None
        scale, zero = scale_and_zero(direction, coded, scheme)  # S1 S2 S3 S4
    else:
        fed = fed_back(direction, coded, norm, feedback, scheme)  # F1
        w, scale, zero = fed.w, fed.scale, fed.zero
        length = length_kept(fed, feedback)
    rounded = code(w, scale, zero, scheme)  # Q1 Q2
    codes = without_codes(rounded, coded, norm)  # N2 O1
    outliers = kept_outliers(w, index)  # O1
    y = dequantized_direction(codes, scale, zero, index, outliers)
    stored = stored_factor(x, y, norm, scheme, length, size)  # M1 M2 M3 M4
    lost = collapsed(x, reconstruct(y, stored, scheme))  # D2
    return Block(codes, stored, scale, zero, index, outliers, lost)


@in_default_environment
def decode(block: Block, scheme: Scheme) -> Float32:
    """Reconstruct one block as float32 [..., T, D] (rule D1).

    Examples
    --------
    >>> import numpy as np
    >>> scheme = Scheme()
    >>> decode(encode(np.float32([[3, 4], [-1.5, 2]]), scheme), scheme)
    array([[ 3. ,  4. ],
           [-1.5,  2. ]], dtype=float32)
    """
    y = dequantized_direction(
        block.codes, block.scale, block.zero, block.outlier_index, block.outliers
    )
    return reconstruct(y, block.norm, scheme)


def reconstruct(y: Float32, norm: Array, scheme: Scheme) -> Float32:
    """Return ``x_hat`` of rule D1 from the dequantized directions and what was stored for them."""
    if scheme.separate_norm and scheme.magnitude == "norm":
        y = y / where_zero(rounding.norm(y), np.inf)[..., None]
    return norm.astype(np.float32)[..., None] * y


def block_slices(tokens: int, scheme: Scheme) -> list[slice]:
    """Cut the tokens after the sinks into blocks (rule B1)."""
    size = scheme.tokens_per_block(tokens)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


@in_default_environment
def encode_blocks(x: Float32, scheme: Scheme, feedback: HeadFeedback | None = None) -> Block:
    """Quantize all tokens after the sinks, block by block (rule B1).

    Examples
    --------
    >>> import numpy as np
    >>> x = np.float32([[3, 4], [-1.5, 2], [6, 8]])
    >>> encode_blocks(x, Scheme(block_size=2)).scale.shape
    (2, 2)
    """
    slices = block_slices(x.shape[-2], scheme)
    blocks = [encode(x[..., rows, :], scheme, feedback) for rows in slices]
    axes = (-2, -1, -2, -2, -2, -2, -1)  # of the tokens or blocks in each part
    parts = zip(axes, zip(*blocks, strict=True), strict=True)
    return Block(*(np.concatenate(part, axis) for axis, part in parts))


@in_default_environment
def decode_blocks(block: Block, scheme: Scheme) -> Float32:
    """Reconstruct what `encode_blocks` returned.

    Examples
    --------
    >>> import numpy as np
    >>> scheme = Scheme(block_size=1)
    >>> decode_blocks(encode_blocks(np.float32([[3, 4], [-1.5, 2]]), scheme), scheme)
    array([[ 3. ,  4. ],
           [-1.5,  2. ]], dtype=float32)
    """
    decoded = []
    for b, rows in enumerate(block_slices(block.codes.shape[-2], scheme)):
        one = slice(b, b + 1)
        scales = one if scheme.axis == "channel" else rows
        part = Block(
            block.codes[..., rows, :], block.norm[..., rows], block.scale[..., scales, :],
            block.zero[..., scales, :], block.outlier_index[..., one, :],
            block.outliers[..., rows, :], block.collapsed[..., rows],
        )  # fmt: skip
        decoded.append(decode(part, scheme))
    return np.concatenate(decoded, axis=-2)


def norms_and_sizes(x: Float32, scheme: Scheme) -> tuple[Float32, Float32]:
    """Return norms [..., T] and the sizes [..., 1, D] by which channels count (rules N1, N3)."""
    plain, ones = np.ones(x.shape[:-1], np.float32), np.ones_like(x[..., :1, :])
    if scheme.separate_norm:
        plain = rounding.norm(x)
    if scheme.norm_rule == "plain":
        return plain, ones
    size = channel_sizes(np.max(np.abs(x), axis=-2, keepdims=True))
    balanced = length_if_finite(x / size)
    gains = np.isfinite(balanced).all(axis=-1) & (spread(x, balanced) < spread(x, plain))
    return (
        np.where(gains[..., None], balanced, plain),
        np.where(gains[..., None, None], size, ones),
    )


def channel_sizes(peak: Float32) -> Float32:
    """Return each channel's largest magnitude over that of the block, bounded below (N3)."""
    share = peak / where_zero(np.max(peak, axis=-1, keepdims=True), np.inf)
    sizes: Float32 = np.maximum(share, LEAST_SIZE)
    return sizes


def spread(x: Float32, norm: Float32) -> Float64:
    """Return by how much these norms spread the directions of a block (rule N3)."""
    direction = direction_of(x, norm)
    return spread_of(np.ptp(direction, axis=-2), np.ptp(x, axis=-2), norm)


def spread_of(range_of_direction: Float32, range_of_x: Float32, norm: Float32) -> Float64:
    """Return the sum of squared norms times that of the squared growth of ranges (rule N3)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        growth = range_of_direction / range_of_x
    growth = np.where(range_of_direction == 0, np.float32(0), growth)
    squares, growths = np.square(norm, dtype=np.float64), np.square(growth, dtype=np.float64)
    # Accumulated, not np.sum: N3 names the order, and np.sum has its own.
    sums = [np.add.accumulate(part, axis=-1)[..., -1] for part in (squares, growths)]
    return np.asarray(sums[0] * sums[1])


def direction_of(x: Float32, norm: Float32) -> Float32:
    """Return ``x / norm``, 0 where the norm is 0 (rule N2)."""
    return x / where_zero(norm, np.inf)[..., None]


def fed_back(
    direction: Float32,
    coded: npt.NDArray[np.bool_],
    norm: Float32,
    feedback: HeadFeedback,
    scheme: Scheme,
    stored: Block | None = None,
) -> FedBack:
    """Return what is coded in place of the directions, and with which scales (rule F1).

    With ``stored``, what an encoder made of the same tokens, w is what it had to code: errors are
    those of its own codes, scales and outliers.
    """
    w, seen, error = direction.copy(), direction.copy(), np.zeros_like(direction)
    given = None
    if stored is None:
        scale, zero = scale_and_zero(direction, coded, scheme)  # of axis channel they change below
    else:
        scale, zero = stored.scale, stored.zero
        given = dequantized_direction(
            stored.codes, scale, zero, stored.outlier_index, stored.outliers
        )
    for p, j in enumerate(feedback.order):
        one = slice(j, j + 1)
        for moved in (w, seen):
            moved[..., j] = np.where(np.isfinite(moved[..., j]), moved[..., j], direction[..., j])
        if given is not None:
            y = given[..., one]
        else:
            pair = scale, zero
            if scheme.axis == "channel":
                pair = scale_and_zero(w[..., one], coded[..., one], scheme, fourth_powers=True)
                scale[..., one], zero[..., one] = pair
            kept = rounding.narrow(w[..., one], np.dtype(np.float16)).astype(np.float32)
            y = dequantize(code(w[..., one], *pair, scheme), *pair)
            y = np.where(coded[..., one], y, kept)
        error[..., one] = w[..., one] - y
        error[norm == 0] = 0
        later, shares = feedback.order[p + 1 :], feedback.factor[p, p + 1 :]
        w[..., later] -= error[..., one] * shares
        seen[..., later] -= seen[..., one] * shares
    return FedBack(w, error, seen, scale, zero)


def length_kept(fed: FedBack, feedback: HeadFeedback) -> Float32:
    """Return how much longer directions are than what is coded, as the weights see both (M2)."""
    weights = np.empty(len(feedback.order), np.float32)
    weights[feedback.order] = np.diagonal(feedback.factor)
    return length_ratio(weights * fed.seen, weights * (fed.seen - fed.error))


def length_ratio(before: Float32, after: Float32) -> Float32:
    """Return ``||before|| / ||after||``, 0 where that divides by 0, infinity where one is (M2)."""
    whole, kept = length_if_finite(before), length_if_finite(after)
    beyond = np.isinf(whole) | np.isinf(kept)
    return np.where(beyond, np.float32(np.inf), whole / where_zero(kept, np.inf))


def length_if_finite(values: Float32) -> Float32:
    """Return the norm (N1), infinity where a value is none."""
    finite = np.asarray(np.isfinite(values).all(axis=-1))
    norm = rounding.norm(np.where(finite[..., None], values, np.float32(0)))
    return np.where(finite, norm, np.float32(np.inf))


def without_codes(
    codes: Float32, coded: npt.NDArray[np.bool_], norm: Float32
) -> npt.NDArray[np.int16]:
    """Set the codes of outlier channels and of zero tokens to 0 (rules O1, N2)."""
    return np.where(coded & (norm[..., None] != 0), codes, 0).astype(np.int16)


def outlier_channels(direction: Float32, scheme: Scheme) -> npt.NDArray[np.int32]:
    """Return the channels of largest magnitude, ascending, as [..., 1, k] (rule O1)."""
    peak = np.max(np.abs(direction), axis=-2, keepdims=True)
    largest = np.argsort(-peak, axis=-1, kind="stable")[..., : scheme.outlier_channels]
    return np.sort(largest, axis=-1).astype(np.int32)


def kept_outliers(direction: Float32, index: npt.NDArray[np.int32]) -> npt.NDArray[np.float16]:
    """Return the directions of outlier channels as they are stored (rule O1)."""
    return rounding.narrow(np.take_along_axis(direction, index, -1), np.dtype(np.float16))


def mark(index: npt.NDArray[np.int32], head_dim: int) -> npt.NDArray[np.bool_]:
    """Return True at the channels of ``index[..., 1, k]``, shape [..., 1, D]."""
    marked = np.zeros((*index.shape[:-1], head_dim), bool)
    np.put_along_axis(marked, index, True, -1)
    return marked


def extent(
    direction: Float32, coded: npt.NDArray[np.bool_], scheme: Scheme
) -> tuple[Float32, Float32]:
    """Return the least and greatest coded value of each scale's elements, 0 where it has none."""
    axis = -2 if scheme.axis == "channel" else -1
    low = np.min(direction, axis=axis, keepdims=True, where=coded, initial=np.inf)
    high = np.max(direction, axis=axis, keepdims=True, where=coded, initial=-np.inf)
    return np.where(low > high, np.float32(0), low), np.where(low > high, np.float32(0), high)


def scale_and_zero(
    direction: Float32,
    coded: npt.NDArray[np.bool_],
    scheme: Scheme,
    *,
    fourth_powers: bool = False,
) -> tuple[Array, Array]:
    """Return scale and zero of the full range, or of the best shrunken one (rule S4)."""
    low, high = extent(direction, coded, scheme)
    if scheme.scale_rule == "range":
        return range_scale(low, high, scheme)
    scales, zeros = shrunken_scales(low, high, scheme)
    axis = -2 if scheme.axis == "channel" else -1
    errors = []
    for scale, zero in zip(scales, zeros, strict=True):
        y = dequantize(code(direction, scale, zero, scheme), scale, zero)
        lost = losses(np.where(coded, direction - y, np.float32(0)), fourth_powers)
        # Accumulated, not np.sum: S4 names the order, and np.sum has its own.
        errors.append(np.add.accumulate(lost, axis=axis).take([-1], axis=axis))
    return best_scale(scales, zeros, np.stack(errors))


def losses(error: Float32, fourth_powers: bool) -> Float64:
    """Return squares of errors (rule S4) or, for scales under feedback, fourth powers (rule F1)."""
    square = np.square(error, dtype=np.float64)
    return np.square(square) if fourth_powers else square


def range_scale(low: Float32, high: Float32, scheme: Scheme) -> tuple[Array, Array]:
    """Return scale and zero that make ``[low, high]`` the code range (rules S1, S2, S3)."""
    zero = range_zero(low, scheme)
    return scale_of(range_span(low, high, zero, scheme), scheme), zero


def range_zero(low: Float32, scheme: Scheme) -> Array:
    """Return the narrowed minimum (rule S2); -0 if symmetric, which adds nothing (rule S1)."""
    if scheme.symmetric:
        return np.full(low.shape, -0.0, FLOAT_DTYPES[scheme.scale_dtype])
    return rounding.narrow(low, FLOAT_DTYPES[scheme.scale_dtype])


def range_span(low: Float32, high: Float32, zero: Array, scheme: Scheme) -> Float32:
    """Return what the codes from 0 to the greatest must span (rules S1, S2)."""
    if scheme.symmetric:
        return np.maximum(high, -low)
    return high - zero.astype(np.float32)


def scale_of(span: Float32, scheme: Scheme) -> Array:
    """Return the narrowed scale (rules S1, S2, S3)."""
    levels = np.float32(scheme.code_range[1])
    return rounding.narrow(span / levels, FLOAT_DTYPES[scheme.scale_dtype])


def shrunken_scales(low: Float32, high: Float32, scheme: Scheme) -> tuple[Array, Array]:
    """Return the candidates of rule S4, widest first, on a new leading axis."""
    candidates = [range_scale(low, high, scheme)]
    half = np.float32(0.5)
    middle, radius = half * high + half * low, half * high - half * low
    for shrink in SHRINK[1:]:
        if scheme.symmetric:
            candidates.append(range_scale(shrink * low, shrink * high, scheme))
        else:
            shorter = shrink * radius
            candidates.append(range_scale(middle - shorter, middle + shorter, scheme))
    scales, zeros = zip(*candidates, strict=True)
    return np.stack(scales), np.stack(zeros)


def best_scale(scales: Array, zeros: Array, errors: Float64) -> tuple[Array, Array]:
    """Pick the candidate of least error, of equals the widest (rule S4).

    A full range that does not fit the dtype is chosen, and so refused (S5), even where a
    shrunken one would fit, and never the other way round: what is refused does not depend on the
    scale rule.
    """
    fits = np.isfinite(scales) & np.isfinite(zeros)
    best = np.where(fits[0], np.argmin(np.where(fits, errors, np.inf), axis=0), 0)[None]
    return np.take_along_axis(scales, best, 0)[0], np.take_along_axis(zeros, best, 0)[0]


def code(direction: Float32, scale: Array, zero: Array, scheme: Scheme) -> Float32:
    """Return ``round_half_even((direction - zero) / scale)``, then clamped (rules Q1, Q2)."""
    shifted = direction - zero.astype(np.float32)
    quotient = shifted / where_zero(scale.astype(np.float32), np.inf)
    low, high = map(np.float32, scheme.code_range)
    codes: Float32 = np.clip(np.rint(quotient), low, high)
    return codes


def dequantize(codes: Array, scale: Array, zero: Array) -> Float32:
    """Return ``codes * scale + zero``, two roundings (rule D1)."""
    product = codes.astype(np.float32) * scale.astype(np.float32)
    return product + zero.astype(np.float32)


def dequantized_direction(
    codes: Array,
    scale: Array,
    zero: Array,
    index: npt.NDArray[np.int32],
    outliers: npt.NDArray[np.float16],
) -> Float32:
    """Return ``y`` of rule D1: dequantized codes, outlier channels as stored."""
    y = dequantize(codes, scale, zero)
    at = np.broadcast_to(index, outliers.shape)
    np.put_along_axis(y, at, outliers.astype(np.float32), -1)
    return y


def stored_factor(
    x: Float32,
    y: Float32,
    norm: Float32,
    scheme: Scheme,
    length: Float32 | None = None,
    size: Float32 | float = 1,
) -> Array:
    """Return the narrowed factor of each token (rule M4)."""
    wide = factor(x, y, norm, scheme, length, size)
    return rounding.narrow(wide, FLOAT_DTYPES[scheme.norm_dtype])


def factor(
    x: Float32,
    y: Float32,
    norm: Float32,
    scheme: Scheme,
    length: Float32 | None = None,
    size: Float32 | float = 1,
) -> Float32:
    """Return the factor of each token before it is narrowed (rules M1, M2, M3).

    ``length`` is what `length_kept` returns of keys under feedback, and ``size`` what
    `norms_and_sizes` returns beside norms. A norm beyond float32 stays
    infinite, and is refused, whatever is stored in its place (N1).
    """
    if not scheme.separate_norm or scheme.magnitude == "norm":
        return norm
    if scheme.magnitude == "gain" and length is not None:
        gain = norm * length
    elif scheme.magnitude == "gain":
        gain = norm / where_zero(length_if_finite(y / size), np.inf)
    else:
        gain = rounding.least_squares_gain(x, y)
    return np.where(np.isinf(norm), norm, gain)


def collapsed(x: Float32, x_hat: Float32) -> npt.NDArray[np.bool_]:
    """Return the tokens that are not zero but decode to zero (rule D2)."""
    return np.asarray(np.any(x != 0, axis=-1) & ~np.any(x_hat != 0, axis=-1))


def where_zero(value: Float32, otherwise: float) -> Float32:
    """Return `value` with its zeros replaced: dividing by infinity gives the zero we want."""
    return np.where(value == 0, np.float32(otherwise), value)

"""Drawn data next to ties, and how cases are picked from it.

Where it cannot be computed on which data a mistake shows, many blocks are drawn, a *pool*, and
those are picked on which an encoder with that mistake differs most from the specification.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref import rounding, spec
from nsq_ref.conformance.cases.encoders import Encoder, Step
from nsq_ref.conformance.mistakes.arithmetic import in_order
from nsq_ref.dtypes import FLOAT_DTYPES, Array, Float32, Float64
from nsq_ref.scheme import Scheme

POOL = 1024  # blocks
FLOAT16 = FLOAT_DTYPES["float16"]


class Format(NamedTuple):
    """What a float dtype can hold."""

    precision: int  # bits
    least: int  # exponent of the least subnormal
    end: float  # the least that rounds to infinity; of float32, which is not narrowed, the largest


FORMATS = {
    "float16": Format(11, -24, 65520.0),
    "bfloat16": Format(8, -133, 2.0**128 - 2.0**119),
    "float32": Format(24, -149, float(np.finfo(np.float32).max)),
}


class Draw:
    """Random numbers that every platform and every version of NumPy draws alike.

    They come from the raw words of `numpy.random.PCG64`, not from NumPy's distributions. Other
    names, of what is drawn, have other numbers.

    Examples
    --------
    >>> Draw(0, "ordinary").integers(0, 10, 5)
    array([2, 6, 9, 2, 0])
    """

    def __init__(self, seed: int, name: str) -> None:
        self._words = np.random.PCG64([seed, zlib.crc32(name.encode())])

    def _raw(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint64]:
        return np.asarray(self._words.random_raw(int(np.prod(shape, dtype=int)))).reshape(shape)

    def uniform(self, low: float, high: float, *shape: int) -> Float64:
        """Return numbers of ``[low, high)``."""
        fraction = (self._raw(shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.asarray(low + (high - low) * fraction)

    def integers(self, low: int, high: int, *shape: int) -> npt.NDArray[np.int64]:
        """Return integers of ``[low, high)``."""
        return np.asarray(low + (self._raw(shape) % np.uint64(high - low)).astype(np.int64))

    def signs(self, *shape: int) -> Float64:
        """Return 1 and -1."""
        return self.integers(0, 2, *shape).astype(np.float64) * -2.0 + 1.0

    def bell(self, *shape: int) -> Float32:
        """Return nearly normal numbers: sums of twelve uniform ones of 16 bits."""
        words = self._raw((3, *shape))
        parts = [(words >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4)]
        total = np.sum(parts, axis=(0, 1), dtype=np.int64)
        return ((total - 6 * 0xFFFF) * 2.0**-16).astype(np.float32)


# --- picking --------------------------------------------------------------------------------------


def differences(some: Iterable[Array], others: Iterable[Array]) -> npt.NDArray[np.int64]:
    """Count, for each block of a pool, the elements that differ.

    Examples
    --------
    >>> differences([np.array([[1, 2], [3, 4]])], [np.array([[1, 2], [4, 3]])])
    array([0, 2])
    """
    pairs = zip(some, others, strict=True)
    counts = [np.sum((a != b).reshape(len(a), -1), axis=-1) for a, b in pairs]
    return np.asarray(np.sum(counts, axis=0))


class Pool(NamedTuple):
    """Blocks ``[N, T, D]``, and how they are to be encoded, which many wrong encoders differ from.

    Examples
    --------
    >>> Pool.of(np.float32([[[7], [3.2]]]), Scheme(separate_norm=False)).right[0].tolist()
    [[[7], [3]]]
    """

    blocks: Float32
    begun: Step
    right: list[Array]

    @classmethod
    def of(cls, blocks: Float32, scheme: Scheme) -> Pool:
        """Encode the blocks."""
        begun = Encoder().begun(blocks, scheme)
        right = Encoder()(blocks, scheme, begun)
        return cls(blocks, begun._replace(right=(right[2], right[3])), right)


def telling(
    pool: Float32 | Pool, scheme: Scheme, wrong: Iterable[Encoder], most: int = 2, *,
    same_scales: bool = False,
) -> Iterator[Float32]:  # fmt: skip
    """Yield the blocks of a pool on which wrong encoders differ most, at most some of each.

    One block is enough where four elements differ. With ``same_scales``, blocks of which an encoder
    makes other scales do not count: where they are its choice, they tell nothing.
    """
    yielded: set[int] = set()
    blocks, begun, right = pool if isinstance(pool, Pool) else Pool.of(pool, scheme)
    for encoder in wrong:
        given = encoder(blocks, scheme, begun)
        counts = differences(right, given)
        if same_scales:
            counts = np.where(differences(right[2:4], given[2:4]) == 0, counts, 0)
        order = np.argsort(-counts, kind="stable")[:most]
        found = 0
        for index in order[counts[order] > 0].tolist():
            if index not in yielded:
                yield blocks[index]
            yielded.add(index)
            found += int(counts[index])
            if found >= 4:
                break


# --- pools --------------------------------------------------------------------------------------


def midpoint(value: Float64, dtype: np.dtype[Any]) -> Float64:
    """Return the tie of `dtype` that follows each positive value once it is narrowed.

    Examples
    --------
    >>> midpoint(np.array([1.0]), FLOAT16) - 1 == 2.0**-11
    array([ True])
    """
    narrowed = rounding.narrow(value.astype(np.float32), dtype)
    bits = narrowed.view(f"u{dtype.itemsize}")
    above = (bits + bits.dtype.type(1)).view(dtype)
    middle: Float64 = (narrowed.astype(np.float64) + above.astype(np.float64)) / 2
    return middle


def near_ties(
    scheme: Scheme, draw: Draw, *, scale_ties: bool = False, exponent: int = 0, shrink: int = 0
) -> Float32:
    """Return blocks ``[POOL, T, D]`` whose quotients lie within an ulp or two of ties.

    The extremes of each scale are drawn, so that scales and ties follow; what a direction needs to
    have length 1 goes into channels of its own, which are the outlier channels where there are any.

    With ``scale_ties``, scales, zeros and outliers lie next to ties of their dtypes as well. Norms,
    or values where no norm is separated, are about two to the power of ``exponent``. ``shrink``
    makes scales smaller by that power of two; where channels share a scale, it adds channels.
    """
    by_channel, search = scheme.axis == "channel", scheme.scale_rule == "search"
    symmetric, kept = scheme.symmetric, scheme.outlier_channels
    tokens = min(scheme.block_size or 6, 6)
    if by_channel and tokens <= (1 if symmetric else 2) and not scale_ties:
        return _subnormal_ties(scheme, draw, tokens)
    coded = 4 if by_channel else 5
    fillers = kept + 1 if kept else 0
    if scheme.separate_norm and not kept:
        fillers = 1 if by_channel else coded + 2 + 6 * shrink
    own = (1, coded) if by_channel else (tokens, 1)  # one scale a channel, or one a token
    if not by_channel and not kept and scheme.separate_norm:  # fillers are to be no extremes
        least = 1.03 / np.sqrt(fillers + 1)
        widest = min(1.3 * least, 0.99 / np.sqrt(coded))
    else:
        widest = float(np.ldexp(0.94 / np.sqrt(coded + fillers), -shrink))
        least = 0.6 * widest
    low, high = _extremes(scheme, draw, least, widest, own, scale_ties)
    low32, high32 = low.astype(np.float32), high.astype(np.float32)
    if search:
        chosen = draw.integers(0, len(spec.SHRINK), 1, *high.shape)
        candidates = spec.shrunken_scales(low32, high32, scheme)
        scale, zero = (np.take_along_axis(part, chosen, 0)[0] for part in candidates)
    else:
        scale, zero = spec.range_scale(low32, high32, scheme)
    ties = draw.integers(*scheme.code_range, POOL, tokens, coded) + 0.5
    if search:  # among ties alone, another scale would have less error
        ties += 0.5 * (draw.integers(0, 3, *ties.shape) > 0)
    signs = draw.signs(POOL, *own) if symmetric else np.ones((POOL, *own))
    steps = draw.integers(-1, 2, POOL, tokens, coded + fillers).astype(np.int32)
    length = np.ldexp(
        draw.uniform(1, 2, POOL, tokens, 1), exponent + draw.integers(-2, 3, POOL, tokens, 1)
    )
    outlier_signs = draw.signs(1, 1, kept)
    for _ in range(3 if search else 1):
        target = zero.astype(np.float64) + ties * scale.astype(np.float64)
        target = np.clip(target, low, high)
        # The second axis of this view is that of the elements that share a scale.
        members = target if by_channel else target.swapaxes(1, 2)
        ends = [high * signs] if symmetric else [high * signs, low]
        for i, end in enumerate(ends[: members.shape[1]]):
            members[:, i] = end[:, 0] if by_channel else end[..., 0]
        if fillers:
            target = np.concatenate([_fill(target, fillers, outlier_signs), target], axis=-1)
        if scheme.separate_norm:
            x = (target * length).astype(np.float32)
        else:
            x = np.ldexp(target, exponent).astype(np.float32)
            x = np.where(x == 0, x, (x.view(np.int32) + steps).view(np.float32))
        if search:  # which scale is chosen depends on the block
            scale, zero = (part[..., -coded:] for part in Encoder()(x, scheme)[2:4])
            if not scheme.separate_norm:
                scale, zero = (
                    np.ldexp(part.astype(np.float64), -exponent) for part in (scale, zero)
                )
    return np.asarray(x)


def _extremes(
    scheme: Scheme, draw: Draw, least: float, widest: float, own: tuple[int, ...], scale_ties: bool
) -> tuple[Float64, Float64]:
    """Draw the least and the greatest value of each scale's elements."""
    high = draw.uniform(least, widest, POOL, *own)
    low = -draw.uniform(0.3 * least, widest, POOL, *own)
    low = np.where(draw.integers(0, 4, POOL, *own) == 0, -0.4 * low, low)  # one-sided
    if scheme.axis == "token":
        low = np.clip(low, -high, None)
    if scale_ties:
        dtype, levels = FLOAT_DTYPES[scheme.scale_dtype], scheme.code_range[1]
        if not scheme.symmetric:
            low = np.copysign(midpoint(np.abs(low) * 0.98, dtype), low)
        zero = 0.0 if scheme.symmetric else rounding.narrow(low.astype(np.float32), dtype)
        step = (high * 0.98 - zero) / levels
        # Just above a power of two, the product with a reciprocal is nearest to another float32.
        power = np.ldexp(draw.uniform(0.5, 0.503, *step.shape), np.frexp(step)[1])
        step = np.where(draw.integers(0, 3, *step.shape) == 0, power, step)
        high = zero + levels * midpoint(step, dtype)
    return -high if scheme.symmetric else low, high


def _subnormal_ties(scheme: Scheme, draw: Draw, tokens: int) -> Float32:
    """Return near-ties of blocks that hold the extremes alone.

    Then a quotient is far from the greatest code only where the scale is subnormal.
    """
    least = FORMATS[scheme.scale_dtype].least
    levels = scheme.code_range[1]
    steps = draw.integers(1, min(levels, 40) + 1, POOL, 1, 8)
    ties = np.rint(draw.uniform(0.6, 1.2, *steps.shape) * levels) - 0.5
    target = np.zeros((POOL, tokens, 8))
    if not scheme.symmetric and tokens == 1:  # minimum and maximum, but for the narrowing of zero
        zero = np.ldexp(draw.uniform(0.5, 1, POOL, 1, 8), least + 21).astype(np.float32)
        target += rounding.narrow(zero, FLOAT_DTYPES[scheme.scale_dtype]).astype(np.float64)
    target[:, -1:] += np.ldexp(steps * ties, least)
    front = max(scheme.outlier_channels, int(scheme.separate_norm))
    if front:
        rest = 1 - in_order(target, target)[..., None]
        target = np.concatenate([np.repeat(np.sqrt(rest / front), front, axis=-1), target], axis=-1)
    if scheme.separate_norm:
        target *= draw.uniform(1, 16, POOL, tokens, 1)
    return target.astype(np.float32)


def _fill(target: Float64, fillers: int, outlier_signs: Float64) -> Float64:
    """Return channels that make each row of length 1; outlier channels on ties of float16."""
    rest = np.maximum(1 - in_order(target, target)[..., None], 0)
    kept = outlier_signs.shape[-1]
    if not kept:
        return np.repeat(np.sqrt(rest / fillers), fillers, axis=-1)
    outliers = midpoint(0.98 * np.sqrt(rest / kept), FLOAT16)
    absorbed = np.sqrt(np.maximum(rest - kept * outliers * outliers, 0))
    return np.concatenate([absorbed, np.repeat(outliers, kept, axis=-1) * outlier_signs], axis=-1)


def factor_ties(scheme: Scheme, draw: Draw, head_dim: int) -> Float32:
    """Return blocks whose stored factors lie within an ulp or two of ties of their dtype."""
    tokens = min(scheme.block_size or 5, 5)
    x: Float32 = draw.bell(POOL // 2, tokens, head_dim) * np.float32(2)
    if scheme.norm_dtype == "float32":
        return x
    for _ in range(2):  # the second time undoes what the first one's roundings moved
        block = spec.encode(x, scheme)
        y = spec.dequantized_direction(
            block.codes, block.scale, block.zero, block.outlier_index, block.outliers
        )
        factor = np.abs(spec.factor(x, y, rounding.norm(x), scheme).astype(np.float64))
        factor = np.where(factor == 0, 1, factor)
        tie = midpoint(factor, FLOAT_DTYPES[scheme.norm_dtype])
        x = (x * (tie / factor)[..., None]).astype(np.float32)
    return x


def stored_blocks(
    scheme: Scheme, draw: Draw, count: int, tokens: int, head_dim: int, exponent: int = 0
) -> spec.Block:
    """Return blocks ``[count, tokens, head_dim]`` as an encoder might have stored them.

    Examples
    --------
    >>> stored_blocks(Scheme(), Draw(0, "decode"), 2, 3, 5).scale.shape
    (2, 1, 5)
    """
    tokens = min(tokens, scheme.block_size or tokens)
    kept = min(scheme.outlier_channels, head_dim)
    own = (1, head_dim) if scheme.axis == "channel" else (tokens, 1)
    dtype = FLOAT_DTYPES[scheme.scale_dtype]

    def stored(low: float, high: float, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        values = np.ldexp(draw.uniform(low, high, count, *shape), exponent)
        return rounding.narrow(values.astype(np.float32), dtype)

    least, levels = scheme.code_range
    codes = draw.integers(least, levels + 1, count, tokens, head_dim).astype(np.int16)
    scale = stored(0.3 / levels, 1 / levels, own, dtype)
    zero = np.zeros_like(scale) if scheme.symmetric else stored(-0.7, 0.1, own, dtype)
    norm: Array = np.ones((count, tokens), np.float32)
    if scheme.separate_norm:
        values = draw.uniform(1, 64, count, tokens).astype(np.float32)
        norm = rounding.narrow(values, FLOAT_DTYPES[scheme.norm_dtype])
    order = np.argsort(draw.uniform(0, 1, count, 1, head_dim), axis=-1, kind="stable")
    index = np.sort(order[..., :kept], axis=-1).astype(np.int32)
    outliers = stored(-1, 1, (tokens, kept), FLOAT16)
    marked = spec.mark(index, head_dim)
    codes[np.broadcast_to(marked, codes.shape)] = 0
    if scheme.axis == "channel":
        scale[marked], zero[marked] = 0, 0
    collapsed = np.zeros((count, tokens), bool)
    return spec.Block(codes, norm, scale, zero, index, outliers, collapsed)

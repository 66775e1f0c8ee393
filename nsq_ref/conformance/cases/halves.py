"""Ties in float16 and bfloat16 inputs, whose few bits leave no near-tie to chance.

A norm is a sum of many squares, so that it can be tuned where no element can: channels behind the
others, each a thousandth of the one before, bring it to within an ulp of what makes a tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from nsq_ref import rounding, spec
from nsq_ref.conformance.cases.encoders import Encoder, further_encoders, wrong_encoders
from nsq_ref.conformance.cases.pools import FORMATS, Draw, Pool, midpoint, telling
from nsq_ref.conformance.cases.ties import squares_of
from nsq_ref.conformance.mistakes.arithmetic import divisor
from nsq_ref.dtypes import FLOAT_DTYPES, Array, Float32, Float64
from nsq_ref.scheme import Scheme

BLOCKS = 256  # of a pool
MANY = 4096  # of a pool of which few are taken
NORM = 64.0  # about which norms lie, so that small channels are not subnormal in float16

CODES = (
    "half-even", "reciprocal-of-scale", "merged-division", "double-precision-quotient",
    "unnarrowed-scale", "reciprocal-of-norm", "norm-before-narrowing", "norm-accumulation",
)  # fmt: skip
# The pool from which cases of a flag are picked.
FLAGS = {
    **dict.fromkeys(CODES, "codes"),
    "scale-narrowing": "scales", "outlier-narrowing": "scales", "range-precision": "scales",
    "factor-narrowing": "factors", "narrow-range": "ranges", "norm-epsilon": "tiny",
    "scale-epsilon": "small",
}  # fmt: skip


def narrow_ties(scheme: Scheme, seed: int, dtype: str) -> Iterator[tuple[str, Array]]:
    """Yield flags and inputs of a narrow dtype that wrong encoders of the flag code otherwise."""
    kind = FLOAT_DTYPES[dtype]

    def draw(name: str) -> Draw:
        return Draw(seed, f"{name} in {dtype}")

    pools = {
        "codes": tuned_ties(scheme, draw("codes"), dtype),
        "scales": tuned_ties(scheme, draw("scales"), dtype, scale_ties=True),
        "small": tuned_ties(scheme, draw("small"), dtype, shrink=16),
    }
    if scheme.separate_norm:
        pools["factors"] = factor_ties(scheme, draw("factors"), dtype)
        pools["tiny"] = _tiny(scheme, draw("tiny"), dtype)
        if scheme.axis == "channel" and not scheme.symmetric:
            pools["ranges"] = _narrow_ranges(scheme, draw("ranges"), dtype)
    for x in midpoints(scheme, draw("midpoints"), dtype):
        yield "norm-midpoint", x
    for x in _small_scales(scheme, draw("small scales"), dtype):
        yield "scale-range", x.astype(kind)
    if not scheme.separate_norm and scheme.symmetric:
        for flag, x in _exhausted(scheme, dtype):
            yield flag, x.astype(kind)
    search = scheme.scale_rule == "search"
    encoded = {name: Pool.of(pool, scheme) for name, pool in pools.items()}
    for flag, name in FLAGS.items():
        encoders = wrong_encoders(flag, scheme) + further_encoders(flag, scheme)
        if flag == "outlier-narrowing" and not (scheme.outlier_channels and scheme.separate_norm):
            continue
        names = [name, "factors"] if flag == "norm-accumulation" else [name]
        names += ["codes"] if flag == "scale-epsilon" else []
        for pool in (encoded[name] for name in names if name in encoded):
            for x in telling(pool, scheme, encoders, 1, same_scales=search):
                yield flag, x.astype(kind)


def rounded(value: Any, dtype: str) -> Float64:
    """Return the numbers of a dtype nearest to float64, as float64."""
    return np.asarray(
        np.asarray(value, np.float64).astype(np.float32).astype(FLOAT_DTYPES[dtype]), np.float64
    )


def cut_off(value: Float64, dtype: str) -> Float64:
    """Return the largest numbers of the dtype's precision that are no larger than positive ones."""
    mantissa, exponent = np.frexp(value)
    precision = FORMATS[dtype].precision
    return np.asarray(np.ldexp(np.floor(np.ldexp(mantissa, precision)), exponent - precision))


def filled(row: Float64, norm: Float64, bulk: int, dtype: str) -> Float64:
    """Return channels that bring rows ``[..., D]`` to norms ``[...]``, nearly: first equal ones."""
    rest = np.maximum(norm**2 - np.sum(row * row, axis=-1), 0)
    each = cut_off(np.sqrt(rest / max(bulk, 1)), dtype)
    channels = [each] * bulk
    rest = np.maximum(rest - bulk * each * each, 0)
    for _ in range(3 if dtype == "float16" else 5):
        one = rounded(cut_off(np.sqrt(rest), dtype), dtype)
        rest = np.maximum(rest - one * one, 0)
        channels.append(one)
    return np.stack(channels, axis=-1)


def tuned_ties(
    scheme: Scheme, draw: Draw, dtype: str, *, scale_ties: bool = False, shrink: int = 0
) -> Float32:
    """Return blocks of a dtype with quotients within an ulp of ties.

    With ``scale_ties``, scales and zeros too lie next to ties of their dtype. ``shrink`` makes
    scales smaller by that power of two, where other channels may hold the norm, and less elsewhere.
    """
    if not scheme.separate_norm:
        return _plain_ties(scheme, draw, dtype)
    if scheme.axis == "token":
        return _ties_of_tokens(scheme, draw, dtype, scale_ties, shrink)
    return _ties_of_channels(scheme, draw, dtype, scale_ties)


def _bulk(scheme: Scheme) -> int:
    """How many channels hold most of a norm: the outlier channels, where there are any."""
    return scheme.outlier_channels or (1 if scheme.axis == "channel" else 6)


def _widest(scheme: Scheme) -> float:
    """How large a coded direction may be: less than those of outlier channels, if there are any."""
    kept = scheme.outlier_channels
    return 0.6 / np.sqrt(kept) if kept else 0.4


def _ties_of_channels(scheme: Scheme, draw: Draw, dtype: str, scale_ties: bool) -> Float32:
    """Tune a norm so that one channel of the token is next to a tie of the channel's scale."""
    count = BLOCKS if scheme.scale_rule == "range" else 4 * BLOCKS  # where it may be another one
    tokens, coded, bulk = min(scheme.block_size or 6, 6), 4, _bulk(scheme)
    ends, widest = 1 + (not scheme.symmetric), _widest(scheme)
    levels, stored = scheme.code_range[1], FLOAT_DTYPES[scheme.scale_dtype]
    rows: list[Array] = []
    zero = np.zeros((count, coded))
    steps = draw.integers(-1, 2, tokens + 16, count) * 2.0**-24
    for end in range(min(ends, tokens)):  # the least values first, as zeros come of them
        least = end == 0 and not scheme.symmetric
        wanted = draw.uniform(0.5 * widest, widest, count, coded)
        row = rounded(NORM * wanted, dtype)
        row *= -1.0 if least else 1.0
        norm = NORM * draw.uniform(0.9, 1.1, count)
        if scale_ties:  # of the first channel
            value = np.abs(row[:, 0]) / norm
            if least:
                tie = midpoint(value, stored)
            else:
                tie = zero[:, 0] + levels * _tie((value - zero[:, 0]) / levels, scheme, draw, count)
            norm = np.abs(row[:, 0]) / tie * (1 + steps[end])
        rows.append(np.concatenate([filled(row, norm, bulk, dtype), row], axis=-1))
        direction = row / rounding.norm(rows[-1].astype(np.float32)).astype(np.float64)[:, None]
        if least:
            zero = rounding.narrow(direction.astype(np.float32), stored).astype(np.float64)
        else:
            high = direction
    if scheme.scale_rule == "search" and (scheme.block_size or 32) >= 32:
        rows *= 8  # or a shrunken range would have less error
        tokens += 7 * ends
    if tokens < ends:
        high = np.zeros((count, coded))
    span = (high - zero).astype(np.float32) / np.float32(levels)
    scale = np.maximum(rounding.narrow(span, stored).astype(np.float64), 2.0**-20)
    for t in range(len(rows), tokens):
        inner = draw.uniform(0.1, 0.9, count, coded)
        signs = draw.signs(count, coded) if scheme.symmetric else np.ones((count, coded))
        row = np.asarray(signs * rounded(NORM * (zero + inner * levels * scale), dtype))
        least_code, most = scheme.code_range
        place = draw.integers(least_code, most, count) + 0.5
        if scheme.scale_rule == "search" and t < tokens - 1:  # and for the same reason
            place += 0.5
        target = zero[:, 0] + place * scale[:, 0]
        about = NORM * draw.uniform(0.9, 1.1, count)  # a power of two would divide exactly
        about = np.where(draw.integers(0, 2, count) == 0, NORM, about)
        row[:, 0] = rounded(about * target, dtype)
        safe = np.where(np.abs(target) < 2.0**-6, np.inf, target)
        norm = np.where(np.isinf(safe), NORM, row[:, 0] / safe)
        norm = np.clip(norm, NORM / 1.2, NORM * 1.2) * (1 + steps[t])
        rows.append(np.concatenate([filled(row, norm, bulk, dtype), row], axis=-1))
    return np.stack(rows, axis=1).astype(np.float32)


def _tie(value: Float64, scheme: Scheme, draw: Draw, *shape: int) -> Float64:
    """Return ties of the dtype of scales near values; of few that tell, one of those.

    At 8 bits, a product with a reciprocal is another float32 next to few of all ties.
    """
    stored, levels = FLOAT_DTYPES[scheme.scale_dtype], np.float32(scheme.code_range[1])
    if levels < 100 or scheme.scale_dtype == "float32":
        return midpoint(value, stored)
    precision = FORMATS[scheme.scale_dtype].precision
    ties = 1 + (2 * np.arange(2 ** (precision - 1)) + 1) * 2.0**-precision
    near = (levels * ties).astype(np.float32)[:, None].view(np.int32) + np.arange(-2, 3)
    wide = near.astype(np.int32).view(np.float32)
    right, wrong = wide / levels, wide * (np.float32(1) / levels)
    tells = rounding.narrow(right, stored) != rounding.narrow(wrong, stored)
    if not tells.any():
        return midpoint(value, stored)
    chosen = ties[tells.any(axis=1)]
    exponent = np.frexp(value)[1] - 1 - (scheme.axis == "token")
    return np.asarray(np.ldexp(chosen[draw.integers(0, len(chosen), *shape)], exponent))


def _ties_of_tokens(
    scheme: Scheme, draw: Draw, dtype: str, scale_ties: bool, shrink: int
) -> Float32:
    """Tune norms so that all channels of a token, odd multiples of half a step, are ties.

    Or so that the scale is one.
    """
    tokens, coded = min(scheme.block_size or 6, 6), 5
    least_code, levels = scheme.code_range
    widest, bulk = _widest(scheme), _bulk(scheme)
    precision = FORMATS[dtype].precision
    # A step is 2 m: of the extremes, and of ties between them, every value fits the dtype.
    most = max(2 ** (precision - 1) // levels, 1)
    m = draw.integers(max(most // 2, 1), most + 1, BLOCKS, tokens).astype(np.float64)
    zeros = np.zeros((BLOCKS, tokens))
    if not scheme.symmetric:
        zeros = -draw.integers(1, levels, BLOCKS, tokens).astype(np.float64)
    ties = draw.integers(least_code, levels, BLOCKS, tokens, coded) + 0.5
    row = (2 * m * zeros)[..., None] + 2 * m[..., None] * ties
    row[..., 0] = 2 * m * (zeros + levels)
    if not scheme.symmetric:
        row[..., 1] = 2 * m * zeros
    largest = np.max(np.abs(row), axis=-1)
    if scheme.outlier_channels:  # one of the fine channels is larger than what is shrunken
        bulk -= shrink > 0
    elif shrink or (scale_ties and scheme.bits == 8):  # many, as none may be much larger
        bulk, widest, shrink = 64, 0.15 if shrink else 0.4, 0
    wanted = largest / (np.ldexp(widest, -shrink) * draw.uniform(0.9, 1.1, BLOCKS, tokens))
    step = 2 * m / wanted
    stored = FLOAT_DTYPES[scheme.scale_dtype]
    # A zero that is a whole number of steps is exact if a step has few bits.
    few = "bfloat16" if not scheme.symmetric or stored.name == "bfloat16" else "float16"
    scale = _tie(step, scheme, draw, BLOCKS, tokens) if scale_ties else rounded(step, few)
    norm = 2 * m / scale * (1 + draw.integers(-2, 3, BLOCKS, tokens) * 2.0**-24)
    exponent = np.round(np.log2(np.ldexp(NORM, shrink // 3) / norm)).astype(np.int64)
    row, norm = np.ldexp(row, exponent[..., None]), np.ldexp(norm, exponent)
    row = rounded(row, dtype)
    return np.concatenate([filled(row, norm, bulk, dtype), row], axis=-1).astype(np.float32)


def _narrow_ranges(scheme: Scheme, draw: Draw, dtype: str) -> Float32:
    """Return blocks whose channels are nearly constant: only norms differ, by ever less."""
    tokens, coded, kept = min(scheme.block_size or 4, 4), 4, scheme.outlier_channels
    row = rounded(NORM * draw.uniform(0.2, 0.4, BLOCKS, 1, coded), dtype)
    row = np.broadcast_to(row * draw.signs(BLOCKS, 1, coded), (BLOCKS, tokens, coded))
    spread = np.ldexp(1.0, draw.integers(-24, -5, BLOCKS, 1))
    norm = NORM * (1 + spread * draw.uniform(0, 1, BLOCKS, tokens))
    return np.concatenate([filled(row, norm, kept or 1, dtype), row], axis=-1).astype(np.float32)


def _tiny(scheme: Scheme, draw: Draw, dtype: str) -> Float32:
    """Return many blocks of few of the smallest steps of float16, to which an epsilon is much."""
    tokens = min(scheme.block_size or 6, 6)
    many = MANY if dtype == "float16" else BLOCKS
    most = np.array([1, 2, 6, 24])[draw.integers(0, 4, many, tokens, 1)]
    x = np.rint(most * draw.uniform(-1, 1, many, tokens, 6))
    if scheme.outlier_channels:
        front = draw.integers(25, 60, many, tokens, scheme.outlier_channels).astype(np.float64)
        x = np.concatenate([front, x], axis=-1)
    return np.ldexp(x, -24).astype(np.float32)


def _small_scales(scheme: Scheme, draw: Draw, dtype: str) -> Iterator[Float64]:
    """Yield channels of the smallest elements behind large ones, with directions smaller yet."""
    least = FORMATS[dtype].least
    front = max(scheme.outlier_channels, int(scheme.separate_norm))
    for top in (2.0**15, 2.0**4):
        x = np.zeros((6, front + 8))
        x[:, :front] = top
        steps = draw.integers(-24, 25, 6, 8).astype(np.float64)
        x[:, front:] = np.ldexp(steps, least + 3 * np.arange(8))
        yield x
        few = np.clip(steps, -5, 4)  # of a scale of 10 / 7 least steps, which is rounded to 1
        few[0, ::2] = -5
        x[:, front:] = np.ldexp(few, least)
        yield x


def _exhausted(scheme: Scheme, dtype: str) -> Iterator[tuple[str, Float64]]:
    """Yield what tells a reciprocal from a quotient, looked for among all numbers of a dtype."""
    kind, levels = FLOAT_DTYPES[dtype], np.float32(scheme.code_range[1])
    stored = FLOAT_DTYPES[scheme.scale_dtype]
    every = np.arange(1, 2**15, dtype=np.uint16).view(kind).astype(np.float32)
    every = every[np.isfinite(every) & (every < 2**15)]
    right, wrong = every / levels, every * (np.float32(1) / levels)
    tells = rounding.narrow(right, stored) != rounding.narrow(wrong, stored)
    front = [1024.0] * scheme.outlier_channels
    for most in every[tells][:2].tolist():
        row = np.array([most, most / 2, most, -most / 4])
        yield "scale-narrowing", _in_block(row, scheme, front)
    found = 0
    some = every[(every >= 1) & (every < 2)][:: 1 if dtype == "bfloat16" else 37]
    small = every[(every / levels >= 2.0**-23) & (every / levels < 2.0**-14)][::3]
    for most in (*some, *(small if dtype == "bfloat16" else ())):
        scale = rounding.narrow(np.array([most], np.float32) / levels, stored).astype(np.float32)
        x = every[(every <= most) & (every >= scale / 4)]
        apart = np.rint(x / scale) != np.rint(x * (np.float32(1) / scale))
        if apart.any() and found < 2:
            row = np.array([most, *x[apart][:4]], np.float64)
            yield "reciprocal-of-scale", _in_block(row, scheme, front)
            found += 1


def _in_block(row: Float64, scheme: Scheme, front: list[float]) -> Float64:
    """Return values that share a scale, behind outlier channels."""
    x = row[None] if scheme.axis == "token" else row[:, None]
    x = np.concatenate([np.tile(front, (len(x), 1)), x], axis=1) if front else x
    return np.asarray(x, np.float64)


def _plain_ties(scheme: Scheme, draw: Draw, dtype: str) -> Float32:
    """Return values that are odd multiples of half a scale, or nearest to such: no norm helps."""
    tokens, coded, kept = min(scheme.block_size or 6, 6), 5, scheme.outlier_channels
    least_code, levels = scheme.code_range
    own = (1, coded) if scheme.axis == "channel" else (tokens, 1)
    high = rounded(draw.uniform(1, 4, BLOCKS, *own), dtype)
    most = max(2 ** (FORMATS[dtype].precision - 1) // levels, 1)
    step = draw.integers(1, most + 1, BLOCKS, *own) * 2.0
    whole = draw.integers(0, 2, BLOCKS, 1, 1) > 0
    zeros = np.zeros(high.shape)
    if not scheme.symmetric:
        zeros = -draw.integers(0, levels, BLOCKS, *own).astype(np.float64)
    high = np.where(whole, np.ldexp(step * (levels + zeros), -6), high)
    low = -high if scheme.symmetric else np.where(whole, np.ldexp(step * zeros, -6),
        rounded(high - draw.uniform(1, 6, BLOCKS, *own), dtype))  # fmt: skip
    low, high = rounded(low, dtype), rounded(high, dtype)
    scale, zero = (
        part.astype(np.float64)
        for part in spec.range_scale(low.astype(np.float32), high.astype(np.float32), scheme)
    )
    ties = draw.integers(least_code, levels, BLOCKS, tokens, coded) + 0.5
    x = np.clip(rounded(zero + ties * scale, dtype), low, high)
    members = x if scheme.axis == "channel" else x.swapaxes(1, 2)
    ends = [high] if scheme.symmetric else [high, low]
    for i, end in enumerate(ends[: members.shape[1]]):
        members[:, i] = end[:, 0] if scheme.axis == "channel" else end[..., 0]
    if kept:
        front = rounded(draw.uniform(16, 64, BLOCKS, tokens, kept), dtype)
        x = np.concatenate([front, x], axis=-1)
    return x.astype(np.float32)


def factor_ties(scheme: Scheme, draw: Draw, dtype: str) -> Float32:
    """Return blocks whose stored factors are nearest to ties."""
    tokens = min(scheme.block_size or 5, 5)
    if scheme.magnitude == "norm":  # which can be tuned
        row = rounded(NORM / 4 * draw.bell(BLOCKS, tokens, 4), dtype)
        norm = midpoint(draw.uniform(NORM, 1.9 * NORM, BLOCKS, tokens), _stored(scheme))
        norm *= 1 + draw.integers(-2, 3, BLOCKS, tokens) * 2.0**-26
        return np.concatenate([row, filled(row, norm, 1, dtype)], axis=-1).astype(np.float32)
    kind = _stored(scheme)
    x = draw.bell(8 * BLOCKS, tokens, 12) * np.float32(16)
    x[..., 6:] *= np.array([0.25, 0.09, 0.03, 0.01, 0.004, 0.0014], np.float32)
    x = rounded(x, dtype).astype(np.float32)
    if scheme.norm_dtype == "float32":
        return x[:BLOCKS]
    wide_steps = np.arange(len(x))[:, None] % 2 == 0  # for sums in float32, and in float64
    steps = draw.integers(-2, 3, *x.shape[:2]) * np.where(wide_steps, 2.0**-24, 2.0**-26)
    for channel in range(6, 12):  # each moves a factor by what the one before leaves
        factor, y = _factor(x, scheme)
        factor = np.where(factor == 0, 1, factor)
        narrow = rounding.narrow(factor.astype(np.float32), kind).astype(np.float64)
        half = np.ldexp(0.5, np.frexp(narrow)[1] - FORMATS[scheme.norm_dtype].precision)
        tie = (narrow + np.copysign(half, factor - narrow)) * (1 + steps)
        wide = x.astype(np.float64)
        squares = np.sum(y * y, axis=-1)
        if scheme.magnitude == "lsq":
            slope = y[..., channel] / divisor(squares)
        else:
            norm = np.sqrt(np.sum(wide * wide, axis=-1))
            slope = wide[..., channel] / divisor(norm * np.sqrt(squares))
        moved = (tie - factor) / divisor(slope)
        most = 0.03 * np.max(np.abs(x[..., channel]), axis=-1, keepdims=True)
        x[..., channel] = rounded(x[..., channel] + np.clip(moved, -most, most), dtype)
    many = draw.bell(MANY if scheme.scale_rule == "range" else MANY // 4, tokens, 12)
    many = rounded(many * np.float32(2), dtype).astype(np.float32)
    factor = np.abs(_factor(many, scheme)[0])  # some lie on a tie by chance
    narrow = rounding.narrow(factor.astype(np.float32), kind).astype(np.float64)
    ulp = np.ldexp(1.0, np.frexp(factor)[1] - FORMATS[scheme.norm_dtype].precision)
    nearest = np.min(np.abs(np.abs(factor - narrow) / ulp - 0.5), axis=-1)
    return np.concatenate([x, many[np.argsort(nearest, kind="stable")[:BLOCKS]]])


def _stored(scheme: Scheme) -> np.dtype[Any]:
    """The dtype next to whose ties factors are put: of float32 itself, that of half the bits."""
    return FLOAT_DTYPES[scheme.norm_dtype if scheme.norm_dtype != "float32" else "float16"]


def _factor(x: Float32, scheme: Scheme) -> tuple[Float64, Float64]:
    """Return factors, before they are narrowed, and dequantized directions."""
    codes, _, scale, zero, outliers = Encoder()(x, scheme)
    norm = rounding.norm(x)
    index = spec.outlier_channels(spec.direction_of(x, norm), scheme)
    y = spec.dequantized_direction(codes, scale, zero, index, outliers)
    factor = spec.factor(x, y, norm, scheme)
    return factor.astype(np.float64), y.astype(np.float64)


# --- midpoints ----------------------------------------------------------------------------------


def midpoints(scheme: Scheme, draw: Draw, dtype: str) -> Iterator[Array]:
    """Yield norms half way between two float32, and off it by less than float64 can see.

    Elements are powers of two, which every dtype holds.
    """
    if not scheme.separate_norm:
        return
    kind = FLOAT_DTYPES[dtype]
    below = 1 - 2.0 ** -FORMATS[dtype].precision  # in place of a 1
    step = 2 ** (24 - FORMATS[scheme.norm_dtype].precision)
    for root in (2**24 + step + 1, 2**24 + 3 * step - 1) if step > 1 else (2**24 + 1, 2**24 + 3):
        exact = [float(value) for value in squares_of(root * root, 2**24)]
        rows = [[*exact, 0.0], [*exact, 2.0**-6], [*exact[:-1], below, 0.0]]
        yield np.ldexp(np.array(rows), 6 - 24).astype(kind)
    pool = _coded_midpoints(scheme, draw, dtype, below)
    if pool is not None:
        for x in telling(pool, scheme, wrong_encoders("norm-midpoint", scheme)):
            yield x.astype(kind)


def _coded_midpoints(scheme: Scheme, draw: Draw, dtype: str, below: float) -> Float32 | None:
    """Return blocks whose norms float64 gets wrong, and with each a quotient next to a tie."""
    if scheme.axis == "token" or scheme.outlier_channels or (scheme.block_size or 4) < 4:
        return None
    low, high = np.array([[0.0 if scheme.symmetric else -0.375], [0.5]], np.float32)
    scale, zero = (float(part[0]) for part in spec.range_scale(low, high, scheme))
    blocks, width = [], 72
    for _ in range(96):
        rows: list[list[float]] = []
        for sign in (1, -1):
            tie = zero + (float(draw.integers(*scheme.code_range, 1)[0]) + 0.5) * scale
            value = tie * float(draw.uniform(1.1, 1.9, 1)[0]) * 2**24
            value = float(np.copysign(cut_off(np.abs(np.float64(value)), dtype), value))
            root = int(value / tie) // 2 * 2 + 1 if tie else 2**24 + 1
            rest = root * root - int(value) ** 2
            squares = [float(one) for one in squares_of(rest, 2**23)]
            if sign > 0:
                squares.append(2.0**-6)
            elif rest % 2:
                squares[-1] = below
            rows.append([0.0] * int(draw.integers(0, 4, 1)[0]) + [value])
            rows[-1] += [0.0] * (4 - len(rows[-1])) + squares
        rows.insert(0, [0.5 * 2**24] * 4)
        if not scheme.symmetric:
            rows.insert(0, [v * 2**24 for v in (-0.375, -0.375, 0.75, 0.375, 0.125)])
        if max(map(len, rows)) <= width:
            blocks.append(np.array([[*row, *[0.0] * (width - len(row))] for row in rows]))
    x = np.ldexp(np.array(blocks), 6 - 24)
    return rounded(x, dtype).astype(np.float32)

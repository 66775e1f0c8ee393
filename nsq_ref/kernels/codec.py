"""Numba twins of `spec`: the heavy loops over a slab of tokens, equal to it bit for bit.

No rule originates here. What is small (scales from extents, narrowing, outlier choice) calls
the functions of `spec` and `rounding`. A row whose float64 arithmetic cannot prove how its norm
or gain rounds is left as NaN, and `rounding`, which can, decides it: one definition, no second
exact path.

Every kernel takes a range of tasks and touches only the rows of those tasks, so that how the
tasks are spread over threads cannot change a bit. No fast-math, no libm, no float reductions:
sums that must be fast are sums of integers, which are exact in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np

from nsq_ref import packing, rounding, spec
from nsq_ref.dtypes import FLOAT_DTYPES, Array
from nsq_ref.feedback import Feedback
from nsq_ref.kernels.compilation import compiled
from nsq_ref.kernels.feedback import DROPPED, feed_back
from nsq_ref.kernels.rows import (
    CHUNK_TOKENS,
    INFINITY_BITS,
    code_row,
    divisor_of,
    fill_scale_row,
    gain_of_row,
    largest_bits,
    norm_of_row,
    ordered,
    pack_row,
    span_of_task,
    unpack_row,
)
from nsq_ref.kernels.threads import in_shares
from nsq_ref.scheme import Scheme

SERIAL_ELEMENTS = 1 << 17  # below this, starting a thread costs more than it saves

# Below these a factor may be flushed to zero, or its products with a direction underflow.
SMALL_FACTOR = {"float16": 2.0**-24, "bfloat16": 2.0**-100, "float32": 2.0**-100}
MAGNITUDE_NORM, MAGNITUDE_GAIN, MAGNITUDE_LSQ = 0, 1, 2
MAGNITUDES = {"norm": MAGNITUDE_NORM, "gain": MAGNITUDE_GAIN, "lsq": MAGNITUDE_LSQ}


jit = partial(compiled, keep=True, nogil=True, fastmath=False)  # what is called from Python


# --- many rows: every kernel takes tasks [first, last) -----------------------------------------


@jit
def measure(
    first: int, last: int, x: Array, sinks: int, block_size: int, separate_norm: bool,
    with_extent: bool, size: Array, norm: Array, low: Array, high: Array,
) -> None:  # fmt: skip
    """Norms (N1; 1 without separation) and each channel's extent over the tokens of a task.

    With ``size[N, blocks, D]`` norms are those of elements over it (N3), unless it has no blocks.
    """
    sized = np.empty((1, x.shape[2]), np.float32)
    sized_bits = sized.view(np.int32)
    for task in range(first, last):
        n, block, start, stop = span_of_task(task, x.shape[1] - sinks, block_size)
        rows, task_norm = x[n, sinks:], norm[n]
        bits = rows.view(np.int32)
        if with_extent:
            low[task] = np.inf
            high[task] = -np.inf
        for t in range(start, stop):
            if size.shape[1]:
                for j in range(rows.shape[1]):
                    sized[0, j] = rows[t, j] / size[n, block, j]
                token_norm = norm_of_row(sized, sized_bits, 0)
            elif separate_norm:
                token_norm = norm_of_row(rows, bits, t)
            else:
                finite = largest_bits(bits, t) < INFINITY_BITS
                token_norm = np.float32(1.0) if finite else np.float32(np.nan)
            task_norm[t] = token_norm
            if with_extent:
                divisor = divisor_of(token_norm)
                for j in range(rows.shape[1]):
                    direction = rows[t, j] / divisor
                    # A NaN divisor leaves the extents as they are; `encode` comes back to it.
                    low[task, j] = direction if direction < low[task, j] else low[task, j]
                    high[task, j] = direction if direction > high[task, j] else high[task, j]


@jit
def token_extents(
    first: int, last: int, x: Array, sinks: int, block_size: int, norm: Array, outlier_index: Array,
    low: Array, high: Array,
) -> None:  # fmt: skip
    """Extent of each token over its coded channels, 0 where it has none."""
    coded = np.empty(x.shape[2], np.bool_)
    for task in range(first, last):
        n, block, start, stop = span_of_task(task, x.shape[1] - sinks, block_size)
        rows = x[n, sinks:]
        bits = rows.view(np.int32)
        coded[:] = True
        for j in outlier_index[n, block]:
            coded[j] = False
        for t in range(start, stop):
            least, greatest = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
            for j in range(x.shape[2]):
                key = ordered(bits[t, j])
                least = min(least, key if coded[j] else np.int32(0x7FFFFFFF))
                greatest = max(greatest, key if coded[j] else np.int32(-0x80000000))
            divisor = divisor_of(norm[n, t])
            some = least <= greatest
            # Division by a positive number keeps the order: two divisions a token are enough.
            lowest = np.int32(ordered(least)).view(np.float32) / divisor
            highest = np.int32(ordered(greatest)).view(np.float32) / divisor
            low[n, t, 0] = lowest if some else np.float32(0)
            high[n, t, 0] = highest if some else np.float32(0)


@jit
def gather_outliers(
    first: int, last: int, x: Array, sinks: int, block_size: int, norm: Array, outlier_index: Array,
    kept: Array,
) -> None:  # fmt: skip
    """Directions of the outlier channels (O1), before they are narrowed."""
    for task in range(first, last):
        n, block, start, stop = span_of_task(task, x.shape[1] - sinks, block_size)
        for t in range(start, stop):
            divisor = divisor_of(norm[n, t])
            for k in range(kept.shape[2]):
                kept[n, t, k] = x[n, sinks + t, outlier_index[n, block, k]] / divisor


@jit
def squared_errors(
    first: int, last: int, x: Array, sinks: int, block_size: int, norm: Array, scales: Array,
    zeros: Array, per_channel: bool, low: np.float32, high: np.float32, outlier_index: Array,
    errors: Array,
) -> None:  # fmt: skip
    """Rule S4's sums for each candidate, in the order of the tokens or of the channels."""
    head_dim = x.shape[2]
    blocks = outlier_index.shape[1]
    scale_row = np.empty(head_dim, np.float32)
    zero_row = np.empty(head_dim, np.float32)
    codes = np.empty(head_dim, np.float32)
    counted = np.empty(head_dim, np.float64)
    for task in range(first, last):  # one task a block: its sums must not be cut
        n, block = task // blocks, task % blocks
        rows = x[n, sinks:]
        counted[:] = 1
        for j in outlier_index[n, block]:
            counted[j] = 0
        for candidate in range(scales.shape[0]):
            sums = errors[candidate, n]
            for t in range(block * block_size, min((block + 1) * block_size, rows.shape[0])):
                at = block if per_channel else t
                if t == block * block_size or not per_channel:
                    fill_scale_row(scales[candidate, n], at, scale_row)
                    fill_scale_row(zeros[candidate, n], at, zero_row)
                code_row(rows, t, norm[n, t], scale_row, zero_row, low, high, codes)
                divisor = divisor_of(norm[n, t])
                for j in range(head_dim):
                    y = codes[j] * scale_row[j] + zero_row[j]
                    error = np.float64(rows[t, j] / divisor - y)
                    sums[at, j if per_channel else 0] += counted[j] * (error * error)


@jit
def encode_rows(
    first: int, last: int, x: Array, sinks: int, block_size: int, norm: Array, size: Array,
    moved: Array, length: Array, magnitude: int, scale: Array, zero: Array, low: np.float32,
    high: np.float32, per_channel: bool, offset: np.float32, bits: int, outlier_index: Array,
    outliers: Array, packed: Array, factor: Array, collapsed: Array,
) -> None:  # fmt: skip
    """Codes (Q1, Q2), bytes (P1), and the factor to store before it is narrowed (M1, M2, M3).

    ``size[N, blocks, D]`` is what channels count by (N3), unless it has no blocks;
    ``moved[N, T, D]`` is coded in place of the directions (F1), unless it has no tokens, and
    ``length[N, T]`` is by how much the weights see it as too short (M2), unless it has none.
    """
    head_dim = x.shape[2]
    scale_row = np.empty(head_dim, np.float32)
    zero_row = np.empty(head_dim, np.float32)
    values = np.empty(head_dim, np.float32)
    value_bits = values.reshape(1, head_dim).view(np.int32)
    y = np.empty((1, head_dim), np.float32)
    y_bits = y.view(np.int32)
    codes = np.full((head_dim + 7) // 8 * 8, np.uint8(offset), np.uint8)
    # Symmetric codes are all zero just where y is: no need of y for rule D2.
    codes_alone = low < 0 and magnitude == MAGNITUDE_NORM and outliers.shape[2] == 0
    for task in range(first, last):
        n, block, start, stop = span_of_task(task, x.shape[1] - sinks, block_size)
        rows, packed_rows = x[n, sinks:], packed[n]
        row_bits = rows.view(np.int32)
        for t in range(start, stop):
            if t == start or not per_channel:
                at = block if per_channel else t
                fill_scale_row(scale[n], at, scale_row)
                fill_scale_row(zero[n], at, zero_row)
            token_norm = norm[n, t]
            if moved.shape[1]:
                code_row(moved[n], t, np.float32(1), scale_row, zero_row, low, high, values)
            else:
                code_row(rows, t, token_norm, scale_row, zero_row, low, high, values)
            if token_norm == 0:
                values[:] = 0
            for k in range(outliers.shape[2]):
                values[outlier_index[n, block, k]] = 0
            for j in range(head_dim):
                codes[j] = np.uint8(np.int32(values[j] + offset))
            pack_row(codes, head_dim, bits, packed_rows, t)
            if codes_alone:
                alive = largest_bits(value_bits, 0) != 0
            else:
                for j in range(head_dim):
                    y[0, j] = values[j] * scale_row[j] + zero_row[j]
                for k in range(outliers.shape[2]):
                    y[0, outlier_index[n, block, k]] = outliers[n, t, k]
                alive = largest_bits(y_bits, 0) != 0
            if not alive and largest_bits(row_bits, t) != 0:
                collapsed[n, t] = True
            if np.isinf(token_norm):
                factor[n, t] = token_norm
            elif magnitude == MAGNITUDE_GAIN and length.size:
                factor[n, t] = token_norm * length[n, t]
            elif magnitude == MAGNITUDE_GAIN:
                if size.shape[1]:
                    for j in range(head_dim):
                        y[0, j] = y[0, j] / size[n, block, j]
                factor[n, t] = token_norm / divisor_of(norm_of_row(y, y_bits, 0))
            elif magnitude == MAGNITUDE_LSQ:
                factor[n, t] = gain_of_row(rows, row_bits, t, y, y_bits)
            else:
                factor[n, t] = token_norm


@jit
def decode_rows(
    first: int, last: int, packed: Array, sinks: int, block_size: int, factor: Array,
    separate_norm: bool, magnitude: int, scale: Array, zero: Array, per_channel: bool,
    offset: np.float32, bits: int, outlier_index: Array, outliers: Array, out: Array,
    undecided: Array,
) -> None:  # fmt: skip
    """Rule D1; rows whose norm this arithmetic cannot tell are marked in ``undecided``."""
    head_dim = out.shape[2]
    scale_row = np.empty(head_dim, np.float32)
    zero_row = np.empty(head_dim, np.float32)
    y = np.empty((1, head_dim), np.float32)
    y_bits = y.view(np.int32)
    codes = np.empty((1, (head_dim + 7) // 8 * 8), np.uint8)
    for task in range(first, last):
        n, block, start, stop = span_of_task(task, packed.shape[1], block_size)
        packed_rows, out_rows = packed[n], out[n, sinks:]
        for t in range(start, stop):
            if t == start or not per_channel:
                at = block if per_channel else t
                fill_scale_row(scale[n], at, scale_row)
                fill_scale_row(zero[n], at, zero_row)
            unpack_row(packed_rows, t, head_dim, bits, codes, 0)
            for j in range(head_dim):
                y[0, j] = (np.float32(codes[0, j]) - offset) * scale_row[j] + zero_row[j]
            for k in range(outliers.shape[2]):
                y[0, outlier_index[n, block, k]] = outliers[n, t, k]
            token_factor = factor[n, t]
            if separate_norm and magnitude == MAGNITUDE_NORM:
                length = norm_of_row(y, y_bits, 0)
                undecided[n, t] = np.isnan(length)
                divisor = divisor_of(length)
                for j in range(head_dim):
                    out_rows[t, j] = token_factor * (y[0, j] / divisor)
            else:
                # Without separation the factor is 1, and a product with 1 is exact.
                for j in range(head_dim):
                    out_rows[t, j] = token_factor * y[0, j]


# --- a slab, from scales to threads -------------------------------------------------------------


def encode(
    x: Array,
    sinks: int,
    scheme: Scheme,
    packed: Array,
    feedback: Feedback | None = None,
    heads: Array | None = None,
) -> spec.Block:
    """Quantize ``x[N, sinks + T, D]`` but for its sinks, writing ``packed[N, T, row_bytes]``.

    With ``feedback`` (F1) ``heads[N]`` are the key/value heads of the sequences.

    Returns what `spec.encode` does, the codes being in ``packed``, the scales of all blocks along
    their second axis. Raises FloatingPointError where a coded token is not finite.
    """
    count, tokens, head_dim = x.shape[0], x.shape[1] - sinks, x.shape[2]
    block_size = scheme.tokens_per_block(tokens)
    blocks = -(-tokens // block_size)
    chunks = -(-block_size // CHUNK_TOKENS)
    tasks = count * blocks * chunks
    per_channel = scheme.axis == "channel"
    makes_scales = per_channel and feedback is not None  # F1 does, of what it codes
    with_extent = (
        (per_channel and not makes_scales)
        or scheme.outlier_channels > 0
        or scheme.norm_rule == "balanced"
    )
    low_code, high_code = map(np.float32, scheme.code_range)

    size = np.empty((count, 0, head_dim), np.float32)
    norm, low, high = measured(x, sinks, scheme, scheme.separate_norm, with_extent, size)
    if scheme.norm_rule == "balanced":
        norm, low, high, size = balanced(x, sinks, scheme, norm, low, high)

    index = np.zeros((count, blocks, 0), np.int32)
    outliers = np.zeros((count, tokens, 0), np.float16)
    if scheme.outlier_channels:
        index = spec.outlier_channels(np.maximum(high, -low)[:, :, None], scheme)[:, :, 0]
        kept = np.empty((count, tokens, index.shape[2]), np.float32)
        run(gather_outliers, tasks, x, sinks, block_size, norm, index, kept)
        outliers = rounding.narrow(kept, np.dtype(np.float16))
        np.put_along_axis(low, index, 0, -1)
        np.put_along_axis(high, index, 0, -1)
    if not per_channel:
        low = np.empty((count, tokens, 1), np.float32)
        high = np.empty_like(low)
        run(token_extents, tasks, x, sinks, block_size, norm, index, low, high)

    moved, length = np.empty((count, 0, head_dim), np.float32), np.empty((count, 0), np.float32)
    if makes_scales:
        scale, zero = np.empty((2, count, blocks, head_dim), FLOAT_DTYPES[scheme.scale_dtype])
    elif scheme.scale_rule == "range":
        scale, zero = spec.range_scale(low, high, scheme)
    else:
        scales, zeros = spec.shrunken_scales(low, high, scheme)
        errors = np.zeros(scales.shape, np.float64)
        run(
            squared_errors, count * blocks, x, sinks, block_size, norm, float32(scales),
            float32(zeros), per_channel, low_code, high_code, index, errors,
        )  # fmt: skip
        scale, zero = spec.best_scale(scales, zeros, errors)

    if feedback is not None:
        moved = np.empty((count, tokens, head_dim), np.float32)
        seen = scheme.separate_norm and scheme.magnitude == "gain"
        length = np.empty((count, tokens if seen else 0), np.float32)
        before, after = np.empty((2, count, length.shape[1], head_dim), np.float32)
        made = float32(scale), float32(zero)
        run(
            feed_back, count * blocks, x, sinks, block_size, norm, per_channel, scheme.symmetric,
            spec.SHRINK if scheme.scale_rule == "search" else spec.SHRINK[:1], low_code, high_code,
            DROPPED[scheme.scale_dtype], index, heads, feedback.order, feedback.factor, *made,
            moved, before, after, length,
        )  # fmt: skip
        scale, zero = (part.astype(FLOAT_DTYPES[scheme.scale_dtype]) for part in made)
        outliers = rounding.narrow(
            np.take_along_axis(moved, index[:, np.arange(tokens) // block_size], -1),
            np.dtype(np.float16),
        )
        if (at := places(np.isnan(length))) is not None:
            length[at] = spec.length_ratio(before[at], after[at])

    factor = np.empty((count, tokens), np.float32)
    collapsed = np.zeros((count, tokens), np.bool_)
    run(
        encode_rows, tasks, x, sinks, block_size, norm, size, moved, length,
        MAGNITUDES[scheme.magnitude], float32(scale), float32(zero), low_code, high_code,
        per_channel, np.float32(scheme.code_offset), scheme.bits, index, float32(outliers), packed,
        factor, collapsed,
    )  # fmt: skip
    block = spec.Block(packed, factor, scale, zero, index, outliers, collapsed)
    if (at := places(np.isnan(factor))) is not None:
        y = directions(block, at, block_size, head_dim, scheme)
        known = length[at] if length.size else None
        n, t = at
        counts = size[n, t // block_size] if size.shape[1] else 1
        factor[at] = spec.factor(x[:, sinks:][at], y, norm[at], scheme, known, counts)
    stored = rounding.narrow(factor, FLOAT_DTYPES[scheme.norm_dtype])
    small = np.abs(factor) < np.float32(SMALL_FACTOR[scheme.norm_dtype])
    if (at := places(small & (norm != 0))) is not None:
        y = directions(block, at, block_size, head_dim, scheme)
        x_hat = spec.reconstruct(y, stored[at], scheme)
        collapsed[at] = spec.collapsed(x[:, sinks:][at], x_hat)
    return block._replace(norm=stored)


def measured(
    x: Array, sinks: int, scheme: Scheme, separate_norm: bool, with_extent: bool, size: Array
) -> tuple[Array, Array, Array]:
    """Norms ``[N, T]`` and, of each block, the extents ``[N, blocks, D]`` of directions by them.

    ``size`` is as `measure` takes it. Without extents those have no rows.
    """
    count, tokens, head_dim = x.shape[0], x.shape[1] - sinks, x.shape[2]
    block_size = scheme.tokens_per_block(tokens)
    blocks, chunks = -(-tokens // block_size), -(-block_size // CHUNK_TOKENS)
    tasks = count * blocks * chunks
    norm = np.empty((count, tokens), np.float32)
    low = np.empty((tasks if with_extent else 0, head_dim), np.float32)
    high = np.empty_like(low)
    run(measure, tasks, x, sinks, block_size, separate_norm, with_extent, size, norm, low, high)
    if (at := places(np.isnan(norm))) is not None:
        rows = x[:, sinks:][at]
        if not np.isfinite(rows).all():
            raise FloatingPointError
        n, t = at
        sized = rows / size[n, t // block_size] if size.shape[1] else rows
        norm[at] = spec.length_if_finite(sized)
        if with_extent:
            direction = spec.direction_of(rows, norm[at])
            task = (n * blocks + t // block_size) * chunks + t % block_size // CHUNK_TOKENS
            np.minimum.at(low, task, direction)
            np.maximum.at(high, task, direction)
    if with_extent:
        low = low.reshape(count, blocks, chunks, head_dim).min(axis=2)
        high = high.reshape(count, blocks, chunks, head_dim).max(axis=2)
    return norm, low, high


def balanced(
    x: Array, sinks: int, scheme: Scheme, norm: Array, low: Array, high: Array
) -> tuple[Array, Array, Array, Array]:
    """Norms, extents and sizes of rule N3, from what `measured` returned of plain norms."""
    none = np.empty((len(x), 0, x.shape[2]), np.float32)
    _, least, greatest = measured(x, sinks, scheme, False, True, none)
    size = spec.channel_sizes(np.maximum(greatest, -least))
    other_norm, other_low, other_high = measured(x, sinks, scheme, True, True, size)
    block_size = scheme.tokens_per_block(norm.shape[1])
    token_block = np.arange(norm.shape[1]) // block_size
    spreads = []
    for norms, extent in ((norm, high - low), (other_norm, other_high - other_low)):
        whole = np.zeros((len(x), size.shape[1] * block_size), np.float32)
        whole[:, : norms.shape[1]] = norms
        by_block = whole.reshape(len(x), -1, block_size)
        spreads.append(spec.spread_of(extent, greatest - least, by_block))
    chosen = np.isfinite(by_block).all(axis=-1) & (spreads[1] < spreads[0])
    by_channel = chosen[..., None]
    return (
        np.where(chosen[:, token_block], other_norm, norm),
        np.where(by_channel, other_low, low),
        np.where(by_channel, other_high, high),
        np.where(by_channel, size, np.float32(1)),
    )


def decode(block: spec.Block, sinks: int, scheme: Scheme, out: Array) -> None:
    """Reconstruct into ``out[N, sinks + T, D]`` what `encode` returned (rule D1)."""
    packed = block.codes
    count, tokens, _ = packed.shape
    head_dim = out.shape[2]
    block_size = scheme.tokens_per_block(tokens)
    tasks = count * -(-tokens // block_size) * -(-block_size // CHUNK_TOKENS)
    undecided = np.zeros((count, tokens), np.bool_)
    run(
        decode_rows, tasks, packed, sinks, block_size, float32(block.norm), scheme.separate_norm,
        MAGNITUDES[scheme.magnitude], float32(block.scale), float32(block.zero),
        scheme.axis == "channel", np.float32(scheme.code_offset), scheme.bits,
        block.outlier_index, float32(block.outliers), out, undecided,
    )  # fmt: skip
    if (at := places(undecided)) is not None:
        y = directions(block, at, block_size, head_dim, scheme)
        out[:, sinks:][at] = spec.reconstruct(y, block.norm[at], scheme)


def directions(
    block: spec.Block,
    at: tuple[Array, Array],
    block_size: int,
    head_dim: int,
    scheme: Scheme,
) -> Array:
    """Dequantize the directions of some tokens, ``[..., D]``, the plain way."""
    n, t = at
    scale_at = (n, t // block_size if scheme.axis == "channel" else t)
    return spec.dequantized_direction(
        packing.unpack(block.codes[at], scheme, head_dim),
        block.scale[scale_at],
        block.zero[scale_at],
        block.outlier_index[n, t // block_size],
        block.outliers[at],
    )


def places(mask: Array) -> tuple[Array, Array] | None:
    """Return where a mask is true, for indexing, or None in the usual case that it is nowhere."""
    if not mask.any():
        return None
    n, t = np.nonzero(mask)
    return n, t


def float32(values: Array) -> Array:
    """Widen what is stored; exact."""
    return np.ascontiguousarray(values, np.float32)


def run(kernel: Callable[..., None], tasks: int, *arguments: Any) -> None:
    """Run a kernel over all tasks, on as many threads as Numba is set to use."""
    serial = arguments[0].size < SERIAL_ELEMENTS
    in_shares(kernel, tasks, 1 if serial else numba.config.NUMBA_NUM_THREADS, *arguments)

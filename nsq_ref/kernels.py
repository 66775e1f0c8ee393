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
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from nsq_ref import packing, rounding, spec
from nsq_ref.scheme import FLOAT_DTYPES, Scheme

Array = npt.NDArray[Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])

CHUNK_TOKENS = 1024  # tokens a task, where blocks are longer
SERIAL_ELEMENTS = 1 << 17  # below this, starting a thread costs more than it saves

# Adding 1.5 * 2**52 rounds a float64 below 2**51 to an integer that its low bits then hold.
MAGIC = 1.5 * 2.0**52
MAGIC_BITS = np.int64(np.float64(MAGIC).view(np.int64))
SUMMED_CHANNELS = 4096  # integers below 2**50 whose sum fits int64, with room to spare
MAGNITUDE_NORM, MAGNITUDE_GAIN, MAGNITUDE_LSQ = 0, 1, 2
MAGNITUDES = {"norm": MAGNITUDE_NORM, "gain": MAGNITUDE_GAIN, "lsq": MAGNITUDE_LSQ}


def jit(function: _Function) -> _Function:
    """Compile with what every kernel shares; ``error_model`` makes division IEEE's."""
    decorate = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=False)
    return cast(_Function, decorate(function))


# --- one row ----------------------------------------------------------------------------------


@jit
def largest_bits(bits: Array) -> np.int32:
    """The largest magnitude of a row, as the bits of a float32 without its sign."""
    largest = np.int32(0)
    for j in range(bits.shape[0]):
        largest = max(largest, np.int32(bits[j] & np.int32(0x7FFFFFFF)))
    return largest


@jit
def power_of_two(exponent: int) -> float:
    """``2.0 ** exponent`` within the normal range of float64."""
    return np.int64((np.int64(exponent) + 1023) << 52).view(np.float64)


@jit
def lift(largest: np.int32) -> float:
    """The power of two that brings a row of this magnitude below 2**25."""
    return power_of_two(24 - ((largest >> np.int32(23)) - 127))


@jit
def fixed_point_dot(a: Array, b: Array, lift_a: float, lift_b: float) -> float:
    """Sum of products in units of ``1 / (lift_a * lift_b)``, each rounded to an integer.

    A product of two lifted float32 is exact in float64 and below 2**50. Integers add up exactly
    in any order, so the compiler may use vectors. Off by at most half a unit a channel, and a
    float64 rounding of 2**-53 for each run of `SUMMED_CHANNELS`.
    """
    total = 0.0
    for start in range(0, a.shape[0], SUMMED_CHANNELS):
        part = np.int64(0)
        for j in range(start, min(start + SUMMED_CHANNELS, a.shape[0])):
            product = (np.float64(a[j]) * lift_a) * (np.float64(b[j]) * lift_b)
            part += np.float64(product + MAGIC).view(np.int64) - MAGIC_BITS
        total += np.float64(part)
    return total


@jit
def norm_of_row(row: Array, bits: Array) -> np.float32:
    """Rule N1, or NaN where this arithmetic cannot tell, or where the row is not finite."""
    largest = largest_bits(bits)
    if largest == 0:
        return np.float32(0)
    if largest >= 0x7F800000:
        return np.float32(np.nan)
    lifted = lift(largest)
    squares = fixed_point_dot(row, row, lifted, lifted)
    slack = 2.0 * row.shape[0]
    lower = np.float32(np.sqrt(max(squares - slack, 0.0)) / lifted)
    upper = np.float32(np.sqrt(squares + slack) / lifted)
    return lower if lower == upper else np.float32(np.nan)


@jit
def gain_of_row(row: Array, bits: Array, y: Array, y_bits: Array) -> np.float32:
    """Rule M3, or NaN where this arithmetic cannot tell."""
    largest, y_largest = largest_bits(bits), largest_bits(y_bits)
    if largest == 0 or y_largest == 0:
        return np.float32(0)
    lifted, y_lifted = lift(largest), lift(y_largest)
    slack = 2.0 * row.shape[0]
    above = fixed_point_dot(row, y, lifted, y_lifted)
    below = fixed_point_dot(y, y, y_lifted, y_lifted)
    if above <= slack or below <= slack:
        return np.float32(np.nan)
    ratio = y_lifted / lifted
    lower = np.float32((above - slack) / (below + slack) * ratio)
    upper = np.float32((above + slack) / (below - slack) * ratio)
    return lower if lower == upper else np.float32(np.nan)


@jit
def pack_row(codes: Array, head_dim: int, bits: int, out: Array) -> None:
    """Rule P1 for codes with their offset added, padded to whole words with code 0."""
    if bits == 8:
        for j in range(head_dim):
            out[j] = codes[j]
    elif bits == 4:
        # Two neighbours read as one little-endian 16-bit word: a shift and an or join them.
        words = codes.view(np.uint16)
        for i in range((head_dim + 1) // 2):
            out[i] = np.uint8(words[i] | (words[i] >> 4))
    else:
        quads = (head_dim + 3) // 4
        words = codes.view(np.uint32)
        for i in range(quads):
            word = words[i] & np.uint32(0x03030303)
            word |= word >> np.uint32(6)
            out[i] = np.uint8((word | (word >> np.uint32(12))) & np.uint32(0xFF))
        if bits == 3:
            octets = codes.view(np.uint64)
            for i in range((head_dim + 7) // 8):
                # The multiplication gathers bit 2 of eight bytes into the top byte.
                high = (octets[i] >> np.uint64(2)) & np.uint64(0x0101010101010101)
                out[quads + i] = np.uint8((high * np.uint64(0x0102040810204080)) >> np.uint64(56))


@jit
def unpack_row(packed: Array, head_dim: int, bits: int, codes: Array) -> None:
    """The inverse of `pack_row`; the offset stays added."""
    if bits == 8:
        for j in range(head_dim):
            codes[j] = packed[j]
    elif bits == 4:
        words = codes.view(np.uint16)
        for i in range((head_dim + 1) // 2):
            byte = np.uint16(packed[i])
            words[i] = (byte | (byte << np.uint16(4))) & np.uint16(0x0F0F)
    else:
        quads = (head_dim + 3) // 4
        words = codes.view(np.uint32)
        for i in range(quads):
            byte = np.uint32(packed[i])
            byte |= byte << np.uint32(12)
            words[i] = (byte | (byte << np.uint32(6))) & np.uint32(0x03030303)
        if bits == 3:
            for j in range(head_dim):
                bit = (packed[quads + (j >> 3)] >> np.uint8(j & 7)) & np.uint8(1)
                codes[j] |= np.uint8(bit << np.uint8(2))


@jit
def fill_scale_row(values: Array, at: int, out: Array) -> None:
    """Copy a row of per-channel values, or spread a token's single one over the channels."""
    if values.shape[1] == out.shape[0]:
        for j in range(out.shape[0]):
            out[j] = values[at, j]
    else:
        for j in range(out.shape[0]):
            out[j] = values[at, 0]


@jit
def span_of_task(task: int, tokens: int, block_size: int) -> tuple[int, int, int, int]:
    """Return the sequence, its block, and the first and last token of a task.

    Each block is cut into chunks of `CHUNK_TOKENS`; the last block may lack some of them, which
    are then empty.
    """
    chunks = (block_size + CHUNK_TOKENS - 1) // CHUNK_TOKENS
    blocks = (tokens + block_size - 1) // block_size
    chunk = task % chunks
    block = task // chunks % blocks
    start = block * block_size + chunk * CHUNK_TOKENS
    stop = min(start + CHUNK_TOKENS, (block + 1) * block_size, tokens)
    return task // (chunks * blocks), block, min(start, stop), stop


@jit
def code_row(
    row: Array, divisor: np.float32, scale: Array, zero: Array, low: np.float32, high: np.float32, codes: Array
) -> None:
    """Rules N2, Q1 and Q2; ``codes`` are float32."""
    for j in range(row.shape[0]):
        quotient = np.rint((row[j] / divisor - zero[j]) / scale[j])
        codes[j] = min(max(quotient, low), high)


@jit
def zeros_to_infinity(values: Array) -> None:
    """Make 0 a divisor that gives 0."""
    for j in range(values.shape[0]):
        if values[j] == 0:
            values[j] = np.inf


# --- many rows: every kernel takes tasks [first, last) -----------------------------------------


@jit
def measure(
    first: int,
    last: int,
    x: Array,
    block_size: int,
    separate_norm: bool,
    with_extent: bool,
    norm: Array,
    low: Array,
    high: Array,
) -> None:
    """Norms (N1; 1 without separation) and each channel's extent over the tokens of a task."""
    bits = x.view(np.int32)
    for task in range(first, last):
        n, _, start, stop = span_of_task(task, x.shape[1], block_size)
        if with_extent:
            task_low, task_high = low[task], high[task]
            task_low[:] = np.inf
            task_high[:] = -np.inf
        for t in range(start, stop):
            row = x[n, t]
            if separate_norm:
                norm[n, t] = norm_of_row(row, bits[n, t])
            else:
                finite = largest_bits(bits[n, t]) < 0x7F800000
                norm[n, t] = 1.0 if finite else np.nan
            if with_extent:
                divisor = norm[n, t] if norm[n, t] != 0 else np.float32(np.inf)
                for j in range(row.shape[0]):
                    direction = row[j] / divisor
                    # A NaN divisor leaves the extents as they are; `encode` comes back to it.
                    task_low[j] = direction if direction < task_low[j] else task_low[j]
                    task_high[j] = direction if direction > task_high[j] else task_high[j]


@jit
def token_extents(
    first: int,
    last: int,
    x: Array,
    block_size: int,
    norm: Array,
    outlier_index: Array,
    low: Array,
    high: Array,
) -> None:
    """Extent of each token over its coded channels, 0 where it has none."""
    coded = np.empty(x.shape[2], np.bool_)
    for task in range(first, last):
        n, block, start, stop = span_of_task(task, x.shape[1], block_size)
        coded[:] = True
        for j in outlier_index[n, block]:
            coded[j] = False
        for t in range(start, stop):
            divisor = norm[n, t] if norm[n, t] != 0 else np.float32(np.inf)
            least, greatest = np.float32(np.inf), np.float32(-np.inf)
            for j in range(x.shape[2]):
                if coded[j]:
                    direction = x[n, t, j] / divisor
                    least = min(least, direction)
                    greatest = max(greatest, direction)
            low[n, t, 0] = least if least <= greatest else np.float32(0)
            high[n, t, 0] = greatest if least <= greatest else np.float32(0)


@jit
def squared_errors(
    first: int,
    last: int,
    x: Array,
    block_size: int,
    norm: Array,
    scales: Array,
    zeros: Array,
    per_channel: bool,
    low: np.float32,
    high: np.float32,
    outlier_index: Array,
    errors: Array,
) -> None:
    """Rule S4's sums for each candidate, in the order of the tokens or of the channels."""
    head_dim = x.shape[2]
    blocks = outlier_index.shape[1]
    divisor_row = np.empty(head_dim, np.float32)
    scale_row = np.empty(head_dim, np.float32)
    zero_row = np.empty(head_dim, np.float32)
    codes = np.empty(head_dim, np.float32)
    coded = np.empty(head_dim, np.bool_)
    for task in range(first, last):  # one task a block: its sums must not be cut
        n, block = task // blocks, task % blocks
        coded[:] = True
        for j in outlier_index[n, block]:
            coded[j] = False
        for candidate in range(scales.shape[0]):
            sums = errors[candidate, n]
            for t in range(block * block_size, min((block + 1) * block_size, x.shape[1])):
                at = block if per_channel else t
                fill_scale_row(scales[candidate, n], at, scale_row)
                fill_scale_row(zeros[candidate, n], at, zero_row)
                divisor_row[:] = scale_row
                zeros_to_infinity(divisor_row)
                divisor = norm[n, t] if norm[n, t] != 0 else np.float32(np.inf)
                code_row(x[n, t], divisor, divisor_row, zero_row, low, high, codes)
                for j in range(head_dim):
                    if coded[j]:
                        y = codes[j] * scale_row[j] + zero_row[j]
                        error = np.float64(x[n, t, j] / divisor - y)
                        sums[at, j if per_channel else 0] += error * error


@jit
def encode_rows(
    first: int,
    last: int,
    x: Array,
    block_size: int,
    norm: Array,
    magnitude: int,
    scale: Array,
    zero: Array,
    low: np.float32,
    high: np.float32,
    per_channel: bool,
    offset: int,
    bits: int,
    outlier_index: Array,
    outliers: Array,
    packed: Array,
    factor: Array,
    lost: Array,
) -> None:
    """Codes (Q1, Q2), bytes (P1), and the factor to store before it is narrowed (M1, M2, M3)."""
    head_dim = x.shape[2]
    x_bits = x.view(np.int32)
    divisor_row = np.empty(head_dim, np.float32)
    scale_row = np.empty(head_dim, np.float32)
    zero_row = np.empty(head_dim, np.float32)
    values = np.empty(head_dim, np.float32)
    y = np.empty(head_dim, np.float32)
    y_bits = y.view(np.int32)
    codes = np.full((head_dim + 7) // 8 * 8, offset, np.uint8)
    for task in range(first, last):
        n, block, start, stop = span_of_task(task, x.shape[1], block_size)
        index = outlier_index[n, block]
        for t in range(start, stop):
            if t == start or not per_channel:
                at = block if per_channel else t
                fill_scale_row(scale[n], at, scale_row)
                fill_scale_row(zero[n], at, zero_row)
                divisor_row[:] = scale_row
                zeros_to_infinity(divisor_row)
            row = x[n, t]
            if norm[n, t] == 0:
                values[:] = 0
            else:
                code_row(row, norm[n, t], divisor_row, zero_row, low, high, values)
            for j in index:
                values[j] = 0
            for j in range(head_dim):
                codes[j] = np.uint8(np.int32(values[j]) + offset)
            pack_row(codes, head_dim, bits, packed[n, t])
            factor[n, t] = norm[n, t]
            for j in range(head_dim):
                y[j] = values[j] * scale_row[j] + zero_row[j]
            for k in range(index.shape[0]):
                y[index[k]] = outliers[n, t, k]
            if largest_bits(y_bits) == 0 and largest_bits(x_bits[n, t]) != 0:
                lost[n, t] = True
            if norm[n, t] != 0 and magnitude == MAGNITUDE_GAIN:
                length = norm_of_row(y, y_bits)
                factor[n, t] = norm[n, t] / (length if length != 0 else np.float32(np.inf))
            elif magnitude == MAGNITUDE_LSQ:
                factor[n, t] = gain_of_row(row, x_bits[n, t], y, y_bits)


@jit
def decode_rows(
    first: int,
    last: int,
    packed: Array,
    block_size: int,
    factor: Array,
    separate_norm: bool,
    magnitude: int,
    scale: Array,
    zero: Array,
    per_channel: bool,
    offset: int,
    bits: int,
    outlier_index: Array,
    outliers: Array,
    sink_tokens: int,
    out: Array,
    undecided: Array,
) -> None:
    """Rule D1; rows whose norm this arithmetic cannot tell are marked in ``undecided``."""
    head_dim = out.shape[2]
    scale_row = np.empty(head_dim, np.float32)
    zero_row = np.empty(head_dim, np.float32)
    y = np.empty(head_dim, np.float32)
    y_bits = y.view(np.int32)
    codes = np.empty((head_dim + 7) // 8 * 8, np.uint8)
    for task in range(first, last):
        n, block, start, stop = span_of_task(task, packed.shape[1], block_size)
        index = outlier_index[n, block]
        for t in range(start, stop):
            if t == start or not per_channel:
                at = block if per_channel else t
                fill_scale_row(scale[n], at, scale_row)
                fill_scale_row(zero[n], at, zero_row)
            unpack_row(packed[n, t], head_dim, bits, codes)
            for j in range(head_dim):
                y[j] = np.float32(np.int32(codes[j]) - offset) * scale_row[j] + zero_row[j]
            for k in range(index.shape[0]):
                y[index[k]] = outliers[n, t, k]
            row = out[n, sink_tokens + t]
            if not separate_norm:
                row[:] = y
            elif magnitude == MAGNITUDE_NORM:
                length = norm_of_row(y, y_bits)
                if np.isnan(length):
                    undecided[n, t] = True
                divisor = length if length != 0 else np.float32(np.inf)
                for j in range(head_dim):
                    row[j] = factor[n, t] * (y[j] / divisor)
            else:
                for j in range(head_dim):
                    row[j] = factor[n, t] * y[j]


# --- a slab, from scales to threads -------------------------------------------------------------


def encode(x: Array, scheme: Scheme, packed: Array) -> spec.Block:
    """Quantize ``x[N, T, D]`` of whole blocks, writing ``packed[N, T, row_bytes]``.

    Returns what `spec.encode` does, the codes being in ``packed``, the scales of all blocks along
    their second axis. Raises FloatingPointError where ``x`` is not finite.
    """
    count, tokens, head_dim = x.shape
    block_size = scheme.tokens_per_block(tokens)
    blocks = -(-tokens // block_size)
    chunks = -(-block_size // CHUNK_TOKENS)
    tasks = count * blocks * chunks
    per_channel = scheme.axis == "channel"
    with_extent = per_channel or scheme.outlier_channels > 0
    low_code, high_code = np.float32(scheme.code_range)

    norm = np.empty((count, tokens), np.float32)
    low = np.empty((tasks if with_extent else 0, head_dim), np.float32)
    high = np.empty_like(low)
    run(measure, tasks, x, block_size, scheme.separate_norm, with_extent, norm, low, high)
    for n, t in np.argwhere(np.isnan(norm)):
        row = x[n, t]
        if not np.isfinite(row).all():
            raise FloatingPointError
        norm[n, t] = rounding.norm(row[None])[0]
        if with_extent:
            direction = row / spec.where_zero(norm[n, t], np.inf)
            at = (n * blocks + t // block_size) * chunks + t % block_size // CHUNK_TOKENS
            np.minimum(low[at], direction, out=low[at])
            np.maximum(high[at], direction, out=high[at])

    index = np.zeros((count, blocks, 0), np.int32)
    outliers = np.zeros((count, tokens, 0), np.float16)
    if with_extent:
        low = low.reshape(count, blocks, chunks, head_dim).min(axis=2)
        high = high.reshape(count, blocks, chunks, head_dim).max(axis=2)
    if scheme.outlier_channels:
        index = spec.outlier_channels(np.maximum(high, -low)[:, :, None], scheme)[:, :, 0]
        at_token = np.repeat(index, block_size, axis=1)[:, :tokens]
        kept = np.take_along_axis(x, at_token, -1) / spec.where_zero(norm, np.inf)[..., None]
        outliers = rounding.narrow(kept, np.dtype(np.float16))
        np.put_along_axis(low, index, 0, -1)
        np.put_along_axis(high, index, 0, -1)
    if not per_channel:
        low = np.empty((count, tokens, 1), np.float32)
        high = np.empty_like(low)
        run(token_extents, tasks, x, block_size, norm, index, low, high)

    if scheme.scale_rule == "range":
        scale, zero = spec.range_scale(low, high, scheme)
    else:
        scales, zeros = spec.shrunken_scales(low, high, scheme)
        errors = np.zeros(scales.shape, np.float64)
        run(
            squared_errors, count * blocks, x, block_size, norm, float32(scales), float32(zeros),
            per_channel, low_code, high_code, index, errors,
        )  # fmt: skip
        scale, zero = spec.best_scale(scales, zeros, errors)

    factor = np.empty((count, tokens), np.float32)
    collapsed = np.zeros((count, tokens), np.bool_)
    run(
        encode_rows, tasks, x, block_size, norm, MAGNITUDES[scheme.magnitude], float32(scale),
        float32(zero), low_code, high_code, per_channel, scheme.code_offset, scheme.bits, index,
        float32(outliers), packed, factor, collapsed,
    )  # fmt: skip
    block = spec.Block(packed, factor, scale, zero, index, outliers, collapsed)
    for n, t in np.argwhere(np.isnan(factor)):
        y = direction_of_row(block, n, t, block_size, head_dim, scheme)
        factor[n, t] = spec.factor(x[n, t][None], y, norm[n, t][None], scheme)[0]
    stored = rounding.narrow(factor, FLOAT_DTYPES[scheme.norm_dtype])
    collapsed |= (stored == 0) & (norm != 0)
    return block._replace(norm=stored)


def decode(block: spec.Block, scheme: Scheme, out: Array, sink_tokens: int) -> None:
    """Reconstruct into ``out[N, sinks + T, D]`` what `encode` returned (rule D1)."""
    packed = block.codes
    count, tokens, _ = packed.shape
    head_dim = out.shape[2]
    block_size = scheme.tokens_per_block(tokens)
    blocks = -(-tokens // block_size)
    tasks = count * blocks * -(-block_size // CHUNK_TOKENS)
    zero = np.zeros_like(block.scale) if block.zero is None else block.zero
    norm = np.ones((count, tokens), np.float32) if block.norm is None else float32(block.norm)
    index = np.zeros((count, blocks, 0), np.int32) if block.outlier_index is None else block.outlier_index
    outliers = np.zeros((count, tokens, 0), np.float16) if block.outliers is None else block.outliers
    undecided = np.zeros((count, tokens), np.bool_)
    run(
        decode_rows, tasks, packed, block_size, norm, scheme.separate_norm,
        MAGNITUDES[scheme.magnitude], float32(block.scale), float32(zero),
        scheme.axis == "channel", scheme.code_offset, scheme.bits, index, float32(outliers),
        sink_tokens, out, undecided,
    )  # fmt: skip
    whole = block._replace(zero=zero, norm=norm, outlier_index=index, outliers=outliers)
    for n, t in np.argwhere(undecided):
        y = direction_of_row(whole, n, t, block_size, head_dim, scheme)
        length = spec.where_zero(rounding.norm(y), np.inf)[..., None]
        out[n, sink_tokens + t] = (norm[n, t] * (y / length))[0]


def direction_of_row(
    block: spec.Block, n: int, t: int, block_size: int, head_dim: int, scheme: Scheme
) -> Array:
    """Dequantize the direction of one token, ``[1, D]``, the plain way."""
    at = t // block_size if scheme.axis == "channel" else t
    return spec.dequantized_direction(
        packing.unpack(block.codes[n, t], scheme, head_dim)[None],
        block.scale[n, at][None],
        block.zero[n, at][None],
        block.outlier_index[n, t // block_size][None],
        block.outliers[n, t][None],
    )


def float32(values: Array) -> Array:
    """Widen what is stored; exact."""
    return np.ascontiguousarray(values, np.float32)


def run(kernel: Callable[..., None], tasks: int, *arguments: Any) -> None:
    """Run a kernel over all tasks, in equal shares, on as many threads as Numba is set to use."""
    threads = min(tasks, numba.config.NUMBA_NUM_THREADS)
    if threads <= 1 or arguments[0].size < SERIAL_ELEMENTS:
        kernel(0, tasks, *arguments)
        return
    edges = [tasks * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda a, b: kernel(a, b, *arguments), edges[:-1], edges[1:]))

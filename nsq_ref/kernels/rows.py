"""Numba twins of `spec`, row by row: norm, gain, codes and their bytes.

A row is ``rows[t]``, indexed and never sliced, since a slice counts references. Where float64
arithmetic cannot prove how the norm or the gain of a row rounds, it is NaN, and `rounding`, which
can, decides it: one definition, no second exact path.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from nsq_ref.dtypes import Array
from nsq_ref.kernels.compilation import compiled

# Adding 1.5 * 2**52 units rounds a float64 below 2**51 units to a whole number of them, which the
# low bits then hold.
MAGIC = 1.5 * 2.0**52
MOST_CHANNELS = 4096  # integers below 2**50 whose sum fits int64, with room to spare
ROUNDINGS = 2.0**-50  # more than the few float64 operations between a sum and its use
CHUNK_TOKENS = 1024  # tokens a task, where blocks are longer
INFINITY_BITS = 0x7F800000  # of float32; beyond it lie the NaNs

# Compiles what works on one row, where a call would cost more than the work.
jit_row = partial(compiled, fastmath=False, forceinline=True)


@jit_row
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


@jit_row
def largest_bits(bits: Array, t: int) -> np.int32:
    """The largest magnitude of a row, as the bits of a float32 without its sign."""
    largest = np.int32(0)
    for j in range(bits.shape[1]):
        largest = max(largest, np.int32(bits[t, j] & np.int32(0x7FFFFFFF)))
    return largest


@jit_row
def ordered(bits: np.int32) -> np.int32:
    """Map the bits of a float32 to an integer of the same order, or such an integer back."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@jit_row
def power_of_two(exponent: int) -> float:
    """``2.0 ** exponent`` within the normal range of float64."""
    return np.int64((np.int64(exponent) + 1023) << 52).view(np.float64)


@jit_row
def lift(largest: np.int32) -> int:
    """The exponent of the power of two that brings a row of this magnitude below 2**25."""
    return 24 - ((largest >> np.int32(23)) - 127)


@jit_row
def without_magic(total: np.uint64, count: int, magic: float) -> np.int64:
    """Take ``count`` times the bits of ``magic`` off a sum that may have wrapped."""
    return np.int64(total - np.uint64(count) * np.float64(magic).view(np.uint64))


@jit_row
def fixed_point_dot(a: Array, at: int, b: Array, bt: int, lifted: int) -> float:
    """Sum of products in units of ``2**-lifted``, for at most `MOST_CHANNELS`.

    A product of two float32 is exact in float64. ``MAGIC`` units added round it to an integer,
    below 2**50, that the low bits then hold; integers add up exactly in any order, so the compiler
    may use vectors. Off by at most half a unit a channel.
    """
    magic = MAGIC * power_of_two(-lifted)
    total = np.uint64(0)  # wraps, and back; signed integers must not
    for j in range(a.shape[1]):
        total += np.float64(np.float64(a[at, j]) * np.float64(b[bt, j]) + magic).view(np.uint64)
    return np.float64(without_magic(total, a.shape[1], magic))


@jit_row
def certain_float32(value: float, error: float, provable: bool | np.bool_) -> np.float32:
    """The float32 that all of ``value`` plus or minus ``error`` rounds to, or NaN."""
    lower, upper = np.float32(value - error), np.float32(value + error)
    return lower if provable and lower == upper else np.float32(np.nan)


@jit_row
def norm_of_row(rows: Array, bits: Array, t: int) -> np.float32:
    """Rule N1, or NaN where this arithmetic cannot tell, or where the row is not finite."""
    largest = largest_bits(bits, t)
    result = np.float32(0)
    if largest != 0:
        channels, lifted = rows.shape[1], lift(largest)
        squares = fixed_point_dot(rows, t, rows, t, 2 * lifted)
        root = np.sqrt(squares) * power_of_two(-lifted)
        provable = largest < INFINITY_BITS and channels <= MOST_CHANNELS
        # Half a unit a channel in the square is a quarter in the root: taken twofold, and as
        # ROUNDINGS those of float64 itself.
        result = certain_float32(root, root * (0.5 * channels / squares + ROUNDINGS), provable)
    return result


@jit_row
def gain_of_row(rows: Array, bits: Array, t: int, y: Array, y_bits: Array) -> np.float32:
    """Rule M3 for ``y[0]``, or NaN where this arithmetic cannot tell."""
    largest, y_largest = largest_bits(bits, t), largest_bits(y_bits, 0)
    result = np.float32(0)
    if largest != 0 and y_largest != 0:
        channels, lifted, y_lifted = rows.shape[1], lift(largest), lift(y_largest)
        # `fixed_point_dot` of <x, y> and <y, y>, in one loop.
        magic = MAGIC * power_of_two(-(lifted + y_lifted))
        y_magic = MAGIC * power_of_two(-2 * y_lifted)
        total, y_total = np.uint64(0), np.uint64(0)
        for j in range(channels):
            value = np.float64(y[0, j])
            total += np.float64(np.float64(rows[t, j]) * value + magic).view(np.uint64)
            y_total += np.float64(value * value + y_magic).view(np.uint64)
        above = np.float64(without_magic(total, channels, magic))
        below = np.float64(without_magic(y_total, channels, y_magic))
        unit = power_of_two(y_lifted - lifted)
        quotient = above / below * unit
        provable = channels <= MOST_CHANNELS and above > channels and below > channels
        relative = channels / above + channels / below + ROUNDINGS
        result = certain_float32(quotient, quotient * relative, provable)
    return result


@jit_row
def pack_row(codes: Array, head_dim: int, bits: int, out: Array, t: int) -> None:
    """Rule P1 for codes with their offset added, padded to a multiple of 8 with code 0."""
    if bits == 8:
        for j in range(head_dim):
            out[t, j] = codes[j]
    elif bits == 4:
        for i in range((head_dim + 1) // 2):
            out[t, i] = codes[2 * i] | (codes[2 * i + 1] << np.uint8(4))
    else:
        quads = (head_dim + 3) // 4
        for i in range(quads):
            byte = np.uint8(0)
            for k in range(4):
                byte |= (codes[4 * i + k] & np.uint8(3)) << np.uint8(2 * k)
            out[t, i] = byte
        if bits == 3:
            for i in range((head_dim + 7) // 8):
                byte = np.uint8(0)
                for k in range(8):
                    byte |= (codes[8 * i + k] >> np.uint8(2)) << np.uint8(k)
                out[t, quads + i] = byte


@jit_row
def unpack_row(packed: Array, t: int, head_dim: int, bits: int, codes: Array, at: int) -> None:
    """The inverse of `pack_row`, into ``codes[at]``; the offset stays added."""
    if bits == 8:
        for j in range(head_dim):
            codes[at, j] = packed[t, j]
    elif bits == 4:
        for i in range((head_dim + 1) // 2):
            codes[at, 2 * i] = packed[t, i] & np.uint8(15)
            codes[at, 2 * i + 1] = packed[t, i] >> np.uint8(4)
    else:
        quads = (head_dim + 3) // 4
        for i in range(quads):
            for k in range(4):
                codes[at, 4 * i + k] = (packed[t, i] >> np.uint8(2 * k)) & np.uint8(3)
        if bits == 3:
            for i in range((head_dim + 7) // 8):
                for k in range(8):
                    bit = (packed[t, quads + i] >> np.uint8(k)) & np.uint8(1)
                    codes[at, 8 * i + k] |= bit << np.uint8(2)


@jit_row
def fill_scale_row(values: Array, at: int, out: Array) -> None:
    """Copy a row of per-channel values, or spread a token's single one over the channels."""
    if values.shape[1] == out.shape[0]:
        for j in range(out.shape[0]):
            out[j] = values[at, j]
    else:
        for j in range(out.shape[0]):
            out[j] = values[at, 0]


@jit_row
def divisor_of(value: np.float32) -> np.float32:
    """Replace 0 by infinity, which as a divisor gives 0."""
    return value if value != 0 else np.float32(np.inf)


@jit_row
def code_row(
    rows: Array, t: int, norm: np.float32, scale: Array, zero: Array, low: np.float32,
    high: np.float32, codes: Array,
) -> None:  # fmt: skip
    """Rules N2, Q1 and Q2; ``codes`` are float32."""
    divisor = divisor_of(norm)
    for j in range(rows.shape[1]):
        quotient = np.rint((rows[t, j] / divisor - zero[j]) / divisor_of(scale[j]))
        codes[j] = min(max(quotient, low), high)

"""Attention over stored keys and values without decoding them: the rank-one form (A3), in Numba.

Codes are taken as P1 stores them, offset included, and the zero takes the offset back, so that one
form serves every scheme: element j of token t decodes to

    gain_t * (slope_j * (step_t * code_tj + base_t) + level_j)

With channel scales, ``slope`` is the scale and ``level`` the zero, ``step`` is 1 and ``base`` 0. With
token scales, ``step`` and ``base`` are the token's, ``slope`` is 1, in outlier channels 0, and
``level`` 0. So slopes and levels join the query, or the output, once in a run of tokens; gains
join the scores, or the weights. Outlier channels are added on their own.

Encoding and decoding are held by bits, attention by a tolerance: here, and only here, sums may be
reordered and fused. No flag assumes that values are finite. Where float32 overflows, or a direction
cancels so far that D1's roundings decide what is left of it, the plain form is taken, in float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from numba.core import cgutils, types
from numba.extending import intrinsic

from nsq_ref.kernels import jit_row, threads_of

Array = npt.NDArray[Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])

TILE, HALF = 8, 4  # tokens at once: with one row of queries, and with ROWS of them
ROWS = 4
RUN = 128  # most tokens that are added up in float32; a multiple of TILE
NARROW, WIDE = 64, 128  # channels at once: in small heads, and in others
LINE = 64  # bytes: vectors that start at a multiple of it never straddle two cache lines
SERIAL_PRODUCTS = 1 << 22  # below this, starting a thread costs more than it saves

# A squared direction below this share of the squares it is made of, or outside these bounds, is
# left to the plain form.
CANCELLED, TINY, HUGE = np.float32(2.0**-40), np.float32(2.0**-90), np.float32(2.0**120)
MOST = float(np.finfo(np.float32).max)

FLOAT16, BFLOAT16, FLOAT32 = 0, 1, 2  # kinds of stored floats; all are read as 16-bit halves

# A piece is a row of integers: where its arrays lie in memory, how far apart those of two heads are,
# and what they hold. Calling Numba for one piece, array by array, takes as long as the work itself.
CODES, NORMS, SCALES, ZEROS, INDEX, OUTLIERS = range(6)
STRIDES = 6  # from here on, in the same order, in bytes
TOKENS, HEAD_DIM, BITS, OFFSET, BLOCK_SIZE, KEPT = range(12, 18)
PER_CHANNEL, SYMMETRIC, RENORMALIZE, SCALE_KIND, NORM_KIND = range(18, 23)
FIRST, LAST, COLUMN = range(23, 26)  # the tokens to work on, and the column of the first
PIECE_FIELDS = 26
UNQUANTIZED = 0  # in place of bits: then CODES are floats of kind NORM_KIND


_LOOSE = {"reassoc", "contract"}


def jit(function: _Function) -> _Function:
    """Compile what is called from Python."""
    decorate = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_LOOSE)
    return cast(_Function, decorate(function))


def jit_loop(function: _Function) -> _Function:
    """Compile an inner part whose sums may be reordered and fused."""
    decorate = numba.njit(error_model="numpy", fastmath=_LOOSE, forceinline=True, _nrt=False)
    return cast(_Function, decorate(function))


def jit_nrt(function: _Function) -> _Function:
    decorate = numba.njit(error_model="numpy", fastmath=_LOOSE, forceinline=True)
    return cast(_Function, decorate(function))


def jit_plain(function: _Function) -> _Function:
    """Compile an inner part that rounds as written."""
    return cast(_Function, numba.njit(error_model="numpy", fastmath=False, _nrt=False)(function))


@intrinsic  # type: ignore[untyped-decorator]
def pointer(_context: Any, address: Any) -> Any:
    """Return an address as a pointer, for `numba.carray`."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@jit_row
def halves_at(piece: Array, part: int, h: int, count: int) -> Array:
    """One head of a stored part, as unsigned 16-bit integers; ``count`` of them or more."""
    return numba.carray(pointer(piece[part] + h * piece[STRIDES + part]), count, np.uint16)


@jit_row
def halves_of(count: int, kind: int) -> int:
    """How many halves as many floats have."""
    return 2 * count if kind == FLOAT32 else count


@jit_row
def row_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one packed token (P1)."""
    low = (head_dim * (2 if bits == 3 else bits) + 7) // 8
    return low + (head_dim + 7) // 8 if bits == 3 else low


# --- what is stored, as float32 and as codes -----------------------------------------------------
# Indices are unsigned where they are computed: Numba then need not ask whether they are negative,
# which would keep the compiler from using vectors.


@jit_loop
def widen(halves: Array, first: int, count: int, kind: int, out: Array, at: int) -> None:
    """Floats [first, first + count) of a part, as float32."""
    source, to = np.uint64(first), np.uint64(at)
    if kind == FLOAT32:
        for i in range(np.uint64(count)):
            pair = np.uint64(2) * (source + i)
            low, high = np.uint32(halves[pair]), np.uint32(halves[pair + np.uint64(1)])
            out[to + i] = np.uint32(low | np.uint32(high << np.uint32(16))).view(np.float32)
    elif kind == BFLOAT16:
        for i in range(np.uint64(count)):
            half = np.uint32(halves[source + i])
            out[to + i] = np.uint32(half << np.uint32(16)).view(np.float32)
    else:
        for i in range(np.uint64(count)):
            half = np.uint32(halves[source + i])
            sign = np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
            rest = np.uint32(np.uint32(half & np.uint32(0x7FFF)) << np.uint32(13))
            # The exponents differ by 112; a product mends that, and normalizes subnormals.
            value = np.float32(rest.view(np.float32) * np.float32(2.0**112))
            out[to + i] = np.uint32(value.view(np.uint32) | sign).view(np.float32)


def spread_of(bits: int) -> Callable[[Array, int, int, Array, int], None]:
    """Return the loop for codes of one width, which divides a byte."""
    planes, mask = 8 // bits, 2**bits - 1

    @jit_loop
    def spread(row: Array, start: int, count: int, tile: Array, at: int) -> None:
        """Codes of ``count`` bytes, a byte each, channels in order."""
        source, to = np.uint64(start), np.uint64(at)
        for i in range(np.uint64(count)):
            byte = row[source + i]
            for p in range(planes):
                code = np.uint8(np.uint8(byte >> np.uint8(p * bits)) & np.uint8(mask))
                tile[to + i * np.uint64(planes) + np.uint64(p)] = code

    return spread


spread_2, spread_4, spread_8 = spread_of(2), spread_of(4), spread_of(8)


@jit_loop
def add_high_bits(row: Array, start: int, count: int, tile: Array, at: int) -> None:
    """The third bits of 3-bit codes, which are a row of their own (P1)."""
    source, to = np.uint64(start), np.uint64(at)
    for i in range(np.uint64(count)):
        byte = row[source + i]
        for p in range(8):
            bit = np.uint8(np.uint8(byte >> np.uint8(p)) & np.uint8(1))
            tile[to + i * np.uint64(8) + np.uint64(p)] |= np.uint8(bit << np.uint8(2))


@jit_loop
def unpack_bytes(row: Array, start: int, count: int, bits: int, tile: Array, at: int) -> None:
    """Codes of ``count`` bytes, a byte each, channels in order."""
    if bits == 4:
        spread_4(row, start, count, tile, at)
    elif bits == 8:
        spread_8(row, start, count, tile, at)
    else:
        spread_2(row, start, count, tile, at)


@jit_loop
def unpack(row: Array, first: int, count: int, piece: Array, width: int, tile: Array) -> None:
    """Codes of ``count`` tokens as ``tile[chunk][TILE][width]``; what lies behind D is anything."""
    bits, head_dim = piece[BITS], piece[HEAD_DIM]
    low_bits = 2 if bits == 3 else bits
    low_bytes, all_bytes = (head_dim * low_bits + 7) // 8, row_bytes(head_dim, bits)
    if head_dim == width and bits != 3:  # rows without gaps: one loop
        unpack_bytes(row, first * all_bytes, count * all_bytes, bits, tile, 0)
        return
    for chunk in range((head_dim + width - 1) // width):
        low = chunk * width * low_bits // 8
        low_count = min(width * low_bits // 8, low_bytes - low)
        high = low_bytes + chunk * width // 8
        for k in range(count):
            start, at = (first + k) * all_bytes, (chunk * TILE + k) * width
            unpack_bytes(row, start + low, low_count, low_bits, tile, at)
            if bits == 3:
                add_high_bits(row, start + high, min(width // 8, all_bytes - high), tile, at)


@jit_loop
def clear(values: Array, count: int) -> None:
    """Zeros."""
    for i in range(np.uint64(count)):
        values[i] = 0


@jit_nrt
def aligned(count: int) -> Array:
    """Float32 zeros that start at a cache line."""
    flat = np.zeros(count + LINE // 4, np.float32)
    start = (-flat.ctypes.data % LINE) // 4
    return flat[start : start + count]


# --- TILE tokens, some channels of each ----------------------------------------------------------


def loops_of(width: int) -> tuple[Callable[..., None], ...]:
    """Return the loops over tiles ``[TILE][width]``: to the compiler, the width is a constant."""

    @jit_loop
    def add_dots(
        tile: Array, to: np.uint64, query: Array, at: np.uint64, out: Array, o: int
    ) -> None:
        """Products of one row of queries with eight tokens."""
        a = b = c = d = e = f = g = h = np.float32(0)
        for i in range(width):
            j, q = to + np.uint64(i), query[at + np.uint64(i)]
            a += q * np.float32(tile[j])
            b += q * np.float32(tile[j + np.uint64(width)])
            c += q * np.float32(tile[j + np.uint64(2 * width)])
            d += q * np.float32(tile[j + np.uint64(3 * width)])
            e += q * np.float32(tile[j + np.uint64(4 * width)])
            f += q * np.float32(tile[j + np.uint64(5 * width)])
            g += q * np.float32(tile[j + np.uint64(6 * width)])
            h += q * np.float32(tile[j + np.uint64(7 * width)])
        out[o] += a
        out[o + 1] += b
        out[o + 2] += c
        out[o + 3] += d
        out[o + 4] += e
        out[o + 5] += f
        out[o + 6] += g
        out[o + 7] += h

    @jit_loop
    def add_dots_of_four(
        tile: Array, to: np.uint64, query: Array, at: np.uint64, out: Array, o: int
    ) -> None:
        """Products of four rows of queries with four tokens; ``out`` has TILE places a row."""
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
        c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
        for i in range(width):
            j, k = to + np.uint64(i), at + np.uint64(i)
            a, b = query[k], query[k + np.uint64(width)]
            c, d = query[k + np.uint64(2 * width)], query[k + np.uint64(3 * width)]
            x = np.float32(tile[j])
            a0, b0, c0, d0 = a0 + a * x, b0 + b * x, c0 + c * x, d0 + d * x
            x = np.float32(tile[j + np.uint64(width)])
            a1, b1, c1, d1 = a1 + a * x, b1 + b * x, c1 + c * x, d1 + d * x
            x = np.float32(tile[j + np.uint64(2 * width)])
            a2, b2, c2, d2 = a2 + a * x, b2 + b * x, c2 + c * x, d2 + d * x
            x = np.float32(tile[j + np.uint64(3 * width)])
            a3, b3, c3, d3 = a3 + a * x, b3 + b * x, c3 + c * x, d3 + d * x
        four = ((a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3))
        for r in range(4):
            for k in range(4):
                out[o + TILE * r + k] += four[r][k]

    @jit_loop
    def add_squares(
        tile: Array, to: np.uint64, slope: Array, level: Array, at: np.uint64, out: Array
    ) -> None:
        """Squared lengths of eight directions with channel scales."""
        a = b = c = d = e = f = g = h = np.float32(0)
        for i in range(width):
            j, s, z = to + np.uint64(i), slope[at + np.uint64(i)], level[at + np.uint64(i)]
            y = s * np.float32(tile[j]) + z
            a += y * y
            y = s * np.float32(tile[j + np.uint64(width)]) + z
            b += y * y
            y = s * np.float32(tile[j + np.uint64(2 * width)]) + z
            c += y * y
            y = s * np.float32(tile[j + np.uint64(3 * width)]) + z
            d += y * y
            y = s * np.float32(tile[j + np.uint64(4 * width)]) + z
            e += y * y
            y = s * np.float32(tile[j + np.uint64(5 * width)]) + z
            f += y * y
            y = s * np.float32(tile[j + np.uint64(6 * width)]) + z
            g += y * y
            y = s * np.float32(tile[j + np.uint64(7 * width)]) + z
            h += y * y
        out[0] += a
        out[1] += b
        out[2] += c
        out[3] += d
        out[4] += e
        out[5] += f
        out[6] += g
        out[7] += h

    @jit_loop
    def add_weighted(
        tile: Array, to: np.uint64, weight: Array, o: int, total: Array, at: np.uint64
    ) -> None:
        """Add eight tokens, each times its weight, to one row of totals."""
        a, b, c, d = weight[o], weight[o + 1], weight[o + 2], weight[o + 3]
        e, f, g, h = weight[o + 4], weight[o + 5], weight[o + 6], weight[o + 7]
        for i in range(width):
            j, k = to + np.uint64(i), at + np.uint64(i)
            s = total[k]
            s += a * np.float32(tile[j])
            s += b * np.float32(tile[j + np.uint64(width)])
            s += c * np.float32(tile[j + np.uint64(2 * width)])
            s += d * np.float32(tile[j + np.uint64(3 * width)])
            s += e * np.float32(tile[j + np.uint64(4 * width)])
            s += f * np.float32(tile[j + np.uint64(5 * width)])
            s += g * np.float32(tile[j + np.uint64(6 * width)])
            s += h * np.float32(tile[j + np.uint64(7 * width)])
            total[k] = s

    @jit_loop
    def add_weighted_to_four(
        tile: Array, to: np.uint64, weight: Array, o: int, total: Array, at: np.uint64
    ) -> None:
        """Add four tokens to four rows of totals; ``weight`` has TILE places a row."""
        a0, a1, a2, a3 = weight[o], weight[o + 1], weight[o + 2], weight[o + 3]
        b0, b1, b2, b3 = weight[o + 8], weight[o + 9], weight[o + 10], weight[o + 11]
        c0, c1, c2, c3 = weight[o + 16], weight[o + 17], weight[o + 18], weight[o + 19]
        d0, d1, d2, d3 = weight[o + 24], weight[o + 25], weight[o + 26], weight[o + 27]
        for i in range(width):
            j, k = to + np.uint64(i), at + np.uint64(i)
            a, b = total[k], total[k + np.uint64(width)]
            c, d = total[k + np.uint64(2 * width)], total[k + np.uint64(3 * width)]
            x = np.float32(tile[j])
            a, b, c, d = a + a0 * x, b + b0 * x, c + c0 * x, d + d0 * x
            x = np.float32(tile[j + np.uint64(width)])
            a, b, c, d = a + a1 * x, b + b1 * x, c + c1 * x, d + d1 * x
            x = np.float32(tile[j + np.uint64(2 * width)])
            a, b, c, d = a + a2 * x, b + b2 * x, c + c2 * x, d + d2 * x
            x = np.float32(tile[j + np.uint64(3 * width)])
            a, b, c, d = a + a3 * x, b + b3 * x, c + c3 * x, d + d3 * x
            total[k] = a
            total[k + np.uint64(width)] = b
            total[k + np.uint64(2 * width)] = c
            total[k + np.uint64(3 * width)] = d

    return add_dots, add_dots_of_four, add_squares, add_weighted, add_weighted_to_four


(
    add_dots_narrow,
    add_dots_of_four_narrow,
    add_squares_narrow,
    add_weighted_narrow,
    add_weighted_to_four_narrow,
) = loops_of(NARROW)
(
    add_dots_wide,
    add_dots_of_four_wide,
    add_squares_wide,
    add_weighted_wide,
    add_weighted_to_four_wide,
) = loops_of(WIDE)


# --- runs of tokens that share slopes and levels, and their tiles --------------------------------


@jit_row
def run_end(first: int, piece: Array) -> int:
    """Where the tokens from ``first`` on leave its block, or are RUN."""
    size = piece[BLOCK_SIZE]
    return min(first + RUN, piece[LAST], (first // size + 1) * size)


@jit_loop
def set_channels(
    scales: Array, zeros: Array, index: Array, block: int, piece: Array, slope: Array, level: Array
) -> np.float32:
    """Slopes and levels of a block; return the squares that they allow, added up."""
    head_dim, kept, kind = piece[HEAD_DIM], piece[KEPT], piece[SCALE_KIND]
    if piece[PER_CHANNEL]:
        widen(scales, block * head_dim, head_dim, kind, slope, 0)
        if piece[SYMMETRIC]:
            clear(level, head_dim)
        else:
            widen(zeros, block * head_dim, head_dim, kind, level, 0)
        take_offset(level, slope, head_dim, piece)
    else:
        for j in range(head_dim):
            slope[j] = 1
    for i in range(block * kept, (block + 1) * kept):
        slope[index[i]] = 0
        level[index[i]] = 0
    most, total = np.float32(2 ** piece[BITS]), np.float32(0)
    for j in range(head_dim):
        reach = most * abs(slope[j]) + abs(level[j])
        total += reach * reach
    return total


@jit_loop
def take_offset(zero: Array, scale: Array, count: int, piece: Array) -> None:
    """Let zeros take back the offset that codes are stored with."""
    offset = np.float32(piece[OFFSET])
    for j in range(np.uint64(count)):
        zero[j] -= offset * scale[j]


@jit_loop
def set_tokens(
    norms: Array, scales: Array, zeros: Array, first: int, count: int, piece: Array, reach: np.float32,
    step: Array, base: Array, gain: Array, limit: Array,
) -> None:  # fmt: skip
    """Steps, bases and stored factors of a run, and the squares that are too small to trust.

    Behind the run there are gains of 0.
    """
    widen(norms, first, count, piece[NORM_KIND], gain, 0)
    for k in range(TILE):
        gain[count + k] = 0
    if piece[PER_CHANNEL]:
        for k in range(np.uint64(count)):
            limit[k] = max(reach * CANCELLED, TINY)
        return
    widen(scales, first, count, piece[SCALE_KIND], step, 0)
    if piece[SYMMETRIC]:
        clear(base, count)
    else:
        widen(zeros, first, count, piece[SCALE_KIND], base, 0)
    take_offset(base, step, count, piece)
    most, head_dim = np.float32(2 ** piece[BITS]), np.float32(piece[HEAD_DIM])
    for k in range(np.uint64(count)):
        largest = most * abs(step[k]) + abs(base[k])
        limit[k] = max(head_dim * largest * largest * CANCELLED, TINY)


@jit_loop
def renormalize(
    tile: Array, first: int, count: int, outliers: Array, piece: Array, width: int, slope: Array,
    level: Array, step: Array, base: Array, limit: Array, gain: Array, at: int, square: Array,
) -> None:  # fmt: skip
    """Divide the norms of a tile by the lengths of its directions: NaN for the plain form."""
    head_dim, kept = piece[HEAD_DIM], piece[KEPT]
    clear(square, TILE)
    for chunk in range((head_dim + width - 1) // width):
        if piece[PER_CHANNEL]:
            to, here = np.uint64(chunk * TILE * width), np.uint64(chunk * width)
            if width == NARROW:
                add_squares_narrow(tile, to, slope, level, here, square)
            else:
                add_squares_wide(tile, to, slope, level, here, square)
        else:
            for k in range(count):
                square[k] += token_square(
                    tile, (chunk * TILE + k) * width, slope, chunk * width, width, step[at + k],
                    base[at + k],
                )  # fmt: skip
    for k in range(count):
        for i in range(kept):
            widen(outliers, (first + k) * kept + i, 1, FLOAT16, square, TILE)
            square[k] += square[TILE] * square[TILE]
    start, nothing, unknown = np.uint64(at), np.float32(0), np.float32(np.nan)
    for k in range(TILE):
        i = start + np.uint64(k)
        sure = square[k] > limit[i] and square[k] < HUGE
        otherwise = nothing if gain[i] == 0 else unknown
        gain[i] = gain[i] / np.sqrt(square[k]) if sure else otherwise


@jit_loop
def token_square(
    tile: Array, start: int, slope: Array, at: int, width: int, step: float, base: float
) -> float:
    """Squared length of one direction with a token scale."""
    to, j, total = np.uint64(start), np.uint64(at), np.float32(0)
    for i in range(np.uint64(width)):
        y = slope[j + i] * (step * np.float32(tile[to + i]) + base)
        total += y * y
    return total


@jit_loop
def tile_dots(
    tile: Array, query: Array, r: int, rows: int, many: int, width: int, chunks: int, out: Array
) -> None:
    """Products of ``many`` rows, ROWS or 1, of ``query[chunk][row][width]`` with a tile."""
    clear(out, ROWS * TILE)
    half = np.uint64(HALF * width)
    for chunk in range(chunks):
        to, at = np.uint64(chunk * TILE * width), np.uint64((chunk * rows + r) * width)
        if many == 1 and width == NARROW:
            add_dots_narrow(tile, to, query, at, out, 0)
        elif many == 1:
            add_dots_wide(tile, to, query, at, out, 0)
        elif width == NARROW:
            add_dots_of_four_narrow(tile, to, query, at, out, 0)
            add_dots_of_four_narrow(tile, to + half, query, at, out, HALF)
        else:
            add_dots_of_four_wide(tile, to, query, at, out, 0)
            add_dots_of_four_wide(tile, to + half, query, at, out, HALF)


@jit_loop
def tile_totals(
    tile: Array, weight: Array, r: int, rows: int, many: int, width: int, chunks: int, total: Array
) -> None:
    """Add a tile, weighted, to ``many`` rows of ``total[chunk][row][width]``."""
    half = np.uint64(HALF * width)
    for chunk in range(chunks):
        to, at = np.uint64(chunk * TILE * width), np.uint64((chunk * rows + r) * width)
        if many == 1 and width == NARROW:
            add_weighted_narrow(tile, to, weight, 0, total, at)
        elif many == 1:
            add_weighted_wide(tile, to, weight, 0, total, at)
        elif width == NARROW:
            add_weighted_to_four_narrow(tile, to, weight, 0, total, at)
            add_weighted_to_four_narrow(tile, to + half, weight, HALF, total, at)
        else:
            add_weighted_to_four_wide(tile, to, weight, 0, total, at)
            add_weighted_to_four_wide(tile, to + half, weight, HALF, total, at)


@jit_loop
def all_finite(values: Array, at: int, count: int) -> bool:
    """Whether all are finite: anything else times 0 is NaN."""
    check, start = np.float32(0), np.uint64(at)
    for i in range(np.uint64(count)):
        check += values[start + i] * np.float32(0)
    return check == 0


# --- the plain form, in float64 ------------------------------------------------------------------


@jit_plain
def plain_token(
    tile: Array, k: int, token: int, norms: Array, scales: Array, zeros: Array, index: Array,
    outliers: Array, piece: Array, width: int, y: Array, some: Array,
) -> float:  # fmt: skip
    """The direction of one token, rounded as D1 says, into ``y``; return its gain."""
    head_dim, kept, kind = piece[HEAD_DIM], piece[KEPT], piece[SCALE_KIND]
    block = token // piece[BLOCK_SIZE]
    for j in range(head_dim):
        at = block * head_dim + j if piece[PER_CHANNEL] else token
        some[1] = 0
        widen(scales, at, 1, kind, some, 0)
        if not piece[SYMMETRIC]:
            widen(zeros, at, 1, kind, some, 1)
        code = np.float32(tile[(j // width * TILE + k) * width + j % width])
        y[j] = (code - np.float32(piece[OFFSET])) * some[0] + some[1]
    for i in range(kept):
        widen(outliers, token * kept + i, 1, FLOAT16, y, index[block * kept + i])
    widen(norms, token, 1, piece[NORM_KIND], some, 2)
    gain = np.float64(some[2])
    if piece[RENORMALIZE]:
        square = 0.0
        for j in range(head_dim):
            square += np.float64(y[j]) * np.float64(y[j])
        gain = gain / np.sqrt(square) if square > 0 else 0.0
    return gain


@jit_plain
def plain_float(tile: Array, k: int, width: int, y: Array) -> None:
    """One unquantized token of a tile into ``y``."""
    for j in range(y.shape[0]):
        y[j] = tile[(j // width * TILE + k) * width + j % width]


@jit_plain
def plain_dot(query: Array, h: int, r: int, y: Array, gain: float) -> np.float32:
    """``gain * <query, y>``; what float32 cannot hold becomes the largest that it can."""
    total = 0.0
    for j in range(y.shape[0]):
        total += np.float64(query[h, r, j]) * np.float64(y[j])
    return np.float32(min(max(gain * total, -MOST), MOST))


@jit_plain
def plain_add(weight: float, gain: float, y: Array, part: int, r: int, out: Array) -> None:
    """Add ``weight * gain * y``."""
    for j in range(y.shape[0]):
        out[part, r, j] += np.float64(weight) * (gain * np.float64(y[j]))


# --- one head of one piece -----------------------------------------------------------------------


@jit_loop
def fold(query: Array, h: int, slope: Array, width: int, chunks: int, folded: Array) -> None:
    """Queries times slopes as ``folded[chunk][row][width]``."""
    rows, head_dim = query.shape[1], query.shape[2]
    for chunk in range(chunks):
        for r in range(rows):
            at = (chunk * rows + r) * width
            for i in range(min(width, head_dim - chunk * width)):
                folded[at + i] = query[h, r, chunk * width + i] * slope[chunk * width + i]


@jit_loop
def product(query: Array, h: int, r: int, channels: Array) -> np.float32:
    """One row of queries times slopes, or levels."""
    total = np.float32(0)
    for j in range(query.shape[2]):
        total += query[h, r, j] * channels[j]
    return total


@jit_nrt
def score_codes(piece: Array, h: int, query: Array, scores: Array) -> None:
    """Products of queries and quantized tokens, into ``scores[h, row, column]``."""
    tokens, kept, kind = piece[TOKENS], piece[KEPT], piece[SCALE_KIND]
    rows, head_dim = query.shape[1], query.shape[2]
    width = NARROW if head_dim <= NARROW else WIDE
    chunks = (head_dim + width - 1) // width
    blocks = (tokens + piece[BLOCK_SIZE] - 1) // piece[BLOCK_SIZE]
    scale_count = halves_of(blocks * head_dim if piece[PER_CHANNEL] else tokens, kind)
    codes = codes_at(piece, h)
    norms = halves_at(piece, NORMS, h, halves_of(tokens, piece[NORM_KIND]))
    scales = halves_at(piece, SCALES, h, scale_count)
    zeros = halves_at(piece, ZEROS, h, scale_count)
    index = index_at(piece, h, blocks * kept)
    outliers = halves_at(piece, OUTLIERS, h, tokens * kept)

    tile = np.zeros(chunks * TILE * width, np.uint8)
    slope, level = aligned(chunks * width), aligned(chunks * width)
    step, base = aligned(RUN + TILE), aligned(RUN + TILE)
    gain, limit = aligned(RUN + TILE), aligned(RUN + TILE)
    folded, dot = aligned(chunks * rows * width), aligned(ROWS * TILE)
    slopes, levels = np.empty(rows, np.float32), np.empty(rows, np.float32)
    y, some, extra = np.empty(head_dim, np.float32), np.empty(kept, np.float32), aligned(TILE)
    spare = np.empty(3, np.float32)
    for k in range(RUN + TILE):
        step[k] = 1
    first = piece[FIRST]
    while first < piece[LAST]:
        last, block = run_end(first, piece), first // piece[BLOCK_SIZE]
        reach = set_channels(scales, zeros, index, block, piece, slope, level)
        set_tokens(norms, scales, zeros, first, last - first, piece, reach, step, base, gain, limit)
        fold(query, h, slope, width, chunks, folded)
        for r in range(rows):
            slopes[r], levels[r] = product(query, h, r, slope), product(query, h, r, level)
        for t in range(first, last, TILE):
            count, at = min(TILE, last - t), t - first
            column = piece[COLUMN] + t - piece[FIRST]
            unpack(codes, t, count, piece, width, tile)
            if piece[RENORMALIZE]:
                renormalize(
                    tile, t, count, outliers, piece, width, slope, level, step, base, limit, gain, at,
                    dot,
                )  # fmt: skip
            r = 0
            while r < rows:
                many = ROWS if r + ROWS <= rows else 1
                tile_dots(tile, folded, r, rows, many, width, chunks, dot)
                for s in range(many):
                    o = s * TILE
                    if kept:
                        clear(extra, TILE)
                        for k in range(count):
                            widen(outliers, (t + k) * kept, kept, FLOAT16, some, 0)
                            for i in range(kept):
                                extra[k] += query[h, r + s, index[block * kept + i]] * some[i]
                    finite = np.float32(0)
                    for k in range(TILE):
                        i, j = np.uint64(at) + np.uint64(k), np.uint64(o) + np.uint64(k)
                        coded = step[i] * dot[j] + base[i] * slopes[r + s] + levels[r + s]
                        dot[j] = gain[i] * (coded + extra[k])
                        finite += dot[j] * np.float32(0)
                    if finite != 0:
                        for k in range(count):
                            if not np.isfinite(dot[o + k]):
                                exact = plain_token(
                                    tile, k, t + k, norms, scales, zeros, index, outliers, piece,
                                    width, y, spare,
                                )  # fmt: skip
                                dot[o + k] = plain_dot(query, h, r + s, y, exact)
                    store(dot, o, count, scores, h, r + s, column)
                r += many
        first = last


@jit_loop
def store(values: Array, o: int, count: int, scores: Array, h: int, row: int, column: int) -> None:
    """Copy ``count`` values, at most TILE, next to each other."""
    if count == TILE:
        for k in range(TILE):
            scores[h, row, np.uint64(column) + np.uint64(k)] = values[np.uint64(o) + np.uint64(k)]
    else:
        for k in range(count):
            scores[h, row, column + k] = values[o + k]


@jit_nrt
def add_codes(piece: Array, h: int, weights: Array, part: int, out: Array) -> None:
    """Add quantized tokens times ``weights[h, row, column]`` to ``out[part, row]``."""
    tokens, kept, kind = piece[TOKENS], piece[KEPT], piece[SCALE_KIND]
    rows, head_dim = weights.shape[1], piece[HEAD_DIM]
    width = NARROW if head_dim <= NARROW else WIDE
    chunks = (head_dim + width - 1) // width
    blocks = (tokens + piece[BLOCK_SIZE] - 1) // piece[BLOCK_SIZE]
    scale_count = halves_of(blocks * head_dim if piece[PER_CHANNEL] else tokens, kind)
    codes = codes_at(piece, h)
    norms = halves_at(piece, NORMS, h, halves_of(tokens, piece[NORM_KIND]))
    scales = halves_at(piece, SCALES, h, scale_count)
    zeros = halves_at(piece, ZEROS, h, scale_count)
    index = index_at(piece, h, blocks * kept)
    outliers = halves_at(piece, OUTLIERS, h, tokens * kept)

    tile = np.zeros(chunks * TILE * width, np.uint8)
    slope, level = aligned(chunks * width), aligned(chunks * width)
    step, base = aligned(RUN + TILE), aligned(RUN + TILE)
    gain, limit = aligned(RUN + TILE), aligned(RUN + TILE)
    total, weight = aligned(chunks * rows * width), aligned(ROWS * TILE)
    gains, bases = np.empty(rows, np.float32), np.empty(rows, np.float32)
    of_outliers = np.empty(rows * kept, np.float32)
    y, some = np.empty(head_dim, np.float32), np.empty(kept, np.float32)
    spare = np.empty(3, np.float32)
    for k in range(RUN + TILE):
        step[k] = 1
    first = piece[FIRST]
    while first < piece[LAST]:
        last, block = run_end(first, piece), first // piece[BLOCK_SIZE]
        reach = set_channels(scales, zeros, index, block, piece, slope, level)
        set_tokens(norms, scales, zeros, first, last - first, piece, reach, step, base, gain, limit)
        clear(total, chunks * rows * width)
        clear(gains, rows)
        clear(bases, rows)
        clear(of_outliers, rows * kept)
        for t in range(first, last, TILE):
            count, at = min(TILE, last - t), t - first
            column = piece[COLUMN] + t - piece[FIRST]
            unpack(codes, t, count, piece, width, tile)
            if piece[RENORMALIZE]:
                renormalize(
                    tile, t, count, outliers, piece, width, slope, level, step, base, limit, gain, at,
                    weight,
                )  # fmt: skip
            r = 0
            while r < rows:
                many = ROWS if r + ROWS <= rows else 1
                for s in range(many):
                    sum_of_gains, sum_of_bases = np.float32(0), np.float32(0)
                    for k in range(TILE):
                        i, j = np.uint64(at) + np.uint64(k), np.uint64(column) + np.uint64(k)
                        gained = weights[h, r + s, j] * gain[i]
                        sum_of_gains += gained
                        sum_of_bases += gained * base[i]
                        weight[np.uint64(s * TILE) + np.uint64(k)] = gained * step[i]
                    gains[r + s] += sum_of_gains
                    bases[r + s] += sum_of_bases
                    if kept:
                        for k in range(count):
                            gained = weights[h, r + s, column + k] * gain[at + k]
                            widen(outliers, (t + k) * kept, kept, FLOAT16, some, 0)
                            for i in range(kept):
                                of_outliers[(r + s) * kept + i] += gained * some[i]
                tile_totals(tile, weight, r, rows, many, width, chunks, total)
                r += many
        for r in range(rows):
            finite = np.isfinite(gains[r]) and np.isfinite(bases[r])
            finite = finite and all_finite(of_outliers, r * kept, kept)
            for chunk in range(chunks):
                finite = finite and all_finite(total, (chunk * rows + r) * width, width)
            if finite:
                for j in range(head_dim):
                    coded = np.float64(total[(j // width * rows + r) * width + j % width])
                    coded = np.float64(slope[j]) * (coded + np.float64(bases[r]))
                    out[part, r, j] += coded + np.float64(level[j]) * np.float64(gains[r])
                for i in range(kept):
                    out[part, r, index[block * kept + i]] += of_outliers[r * kept + i]
            else:
                for t in range(first, last, TILE):
                    count, column = min(TILE, last - t), piece[COLUMN] + t - piece[FIRST]
                    unpack(codes, t, count, piece, width, tile)
                    for k in range(count):
                        exact = plain_token(
                            tile, k, t + k, norms, scales, zeros, index, outliers, piece, width, y, spare
                        )
                        plain_add(weights[h, r, column + k], exact, y, part, r, out)
        first = last


@jit_row
def codes_at(piece: Array, h: int) -> Array:
    """One head of the packed codes."""
    count = piece[TOKENS] * row_bytes(piece[HEAD_DIM], piece[BITS])
    return numba.carray(pointer(piece[CODES] + h * piece[STRIDES + CODES]), count, np.uint8)


@jit_row
def index_at(piece: Array, h: int, count: int) -> Array:
    """One head of the indices of outlier channels."""
    return numba.carray(pointer(piece[INDEX] + h * piece[STRIDES + INDEX]), count, np.int32)


@jit_loop
def widen_tokens(
    halves: Array, first: int, count: int, piece: Array, width: int, tile: Array
) -> None:
    """Unquantized tokens as ``tile[chunk][TILE][width]``; what lies behind D stays 0."""
    head_dim, kind = piece[HEAD_DIM], piece[NORM_KIND]
    for chunk in range((head_dim + width - 1) // width):
        for k in range(count):
            start = (first + k) * head_dim + chunk * width
            many = min(width, head_dim - chunk * width)
            widen(halves, start, many, kind, tile, (chunk * TILE + k) * width)


@jit_nrt
def score_floats(piece: Array, h: int, query: Array, scores: Array) -> None:
    """`score_codes` for tokens that are not quantized."""
    rows, head_dim = query.shape[1], query.shape[2]
    width = NARROW if head_dim <= NARROW else WIDE
    chunks = (head_dim + width - 1) // width
    halves = halves_at(piece, CODES, h, halves_of(piece[TOKENS] * head_dim, piece[NORM_KIND]))
    tile, ones = aligned(chunks * TILE * width), aligned(chunks * width)
    folded, dot = aligned(chunks * rows * width), aligned(ROWS * TILE)
    y = np.empty(head_dim, np.float32)
    for j in range(head_dim):
        ones[j] = 1
    fold(query, h, ones, width, chunks, folded)
    for t in range(piece[FIRST], piece[LAST], TILE):
        count, column = min(TILE, piece[LAST] - t), piece[COLUMN] + t - piece[FIRST]
        widen_tokens(halves, t, count, piece, width, tile)
        r = 0
        while r < rows:
            many = ROWS if r + ROWS <= rows else 1
            tile_dots(tile, folded, r, rows, many, width, chunks, dot)
            for s in range(many):
                for k in range(count):
                    if not np.isfinite(dot[s * TILE + k]):
                        plain_float(tile, k, width, y)
                        dot[s * TILE + k] = plain_dot(query, h, r + s, y, 1.0)
                    scores[h, r + s, column + k] = dot[s * TILE + k]
            r += many


@jit_nrt
def add_floats(piece: Array, h: int, weights: Array, part: int, out: Array) -> None:
    """`add_codes` for tokens that are not quantized."""
    rows, head_dim = weights.shape[1], piece[HEAD_DIM]
    width = NARROW if head_dim <= NARROW else WIDE
    chunks = (head_dim + width - 1) // width
    halves = halves_at(piece, CODES, h, halves_of(piece[TOKENS] * head_dim, piece[NORM_KIND]))
    tile, total = aligned(chunks * TILE * width), aligned(chunks * rows * width)
    weight, y = aligned(ROWS * TILE), np.empty(head_dim, np.float32)
    for first in range(piece[FIRST], piece[LAST], RUN):
        last = min(first + RUN, piece[LAST])
        clear(total, chunks * rows * width)
        for t in range(first, last, TILE):
            count, column = min(TILE, last - t), piece[COLUMN] + t - piece[FIRST]
            widen_tokens(halves, t, count, piece, width, tile)
            clear(weight, ROWS * TILE)
            r = 0
            while r < rows:
                many = ROWS if r + ROWS <= rows else 1
                for s in range(many):
                    for k in range(count):
                        weight[s * TILE + k] = weights[h, r + s, column + k]
                tile_totals(tile, weight, r, rows, many, width, chunks, total)
                r += many
        for r in range(rows):
            finite = True
            for chunk in range(chunks):
                finite = finite and all_finite(total, (chunk * rows + r) * width, width)
            if finite:
                for j in range(head_dim):
                    out[part, r, j] += np.float64(
                        total[(j // width * rows + r) * width + j % width]
                    )
            else:
                for t in range(first, last, TILE):
                    count, column = min(TILE, last - t), piece[COLUMN] + t - piece[FIRST]
                    widen_tokens(halves, t, count, piece, width, tile)
                    for k in range(count):
                        plain_float(tile, k, width, y)
                        plain_add(weights[h, r, column + k], 1.0, y, part, r, out)


# --- all pieces: a task is one head of one segment, pieces edges[i] to edges[i + 1] --------------


@jit
def score_pieces(
    first: int, last: int, pieces: Array, edges: Array, query: Array, scores: Array
) -> None:
    """Write ``scores[kv_head, row, column]``, tasks [first, last)."""
    segments = edges.shape[0] - 1
    for task in range(first, last):
        h, segment = task // segments, task % segments
        for i in range(edges[segment], edges[segment + 1]):
            piece = pieces[i]
            if piece[BITS] == UNQUANTIZED:
                score_floats(piece, h, query, scores)
            else:
                score_codes(piece, h, query, scores)


@jit
def add_pieces(
    first: int, last: int, pieces: Array, edges: Array, weights: Array, out: Array
) -> None:
    """Add values times ``weights[kv_head, row, column]`` to ``out[task, row]``, tasks [first, last)."""
    segments = edges.shape[0] - 1
    for task in range(first, last):
        h, segment = task // segments, task % segments
        for i in range(edges[segment], edges[segment + 1]):
            piece = pieces[i]
            if piece[BITS] == UNQUANTIZED:
                add_floats(piece, h, weights, task, out)
            else:
                add_codes(piece, h, weights, task, out)


def run(work: Callable[..., None], tasks: int, products: int, *arguments: Any) -> None:
    """Do tasks [0, ``tasks``) in equal shares, on as many threads as Numba is set to use."""
    threads = min(tasks, numba.config.NUMBA_NUM_THREADS)
    if threads <= 1 or products < SERIAL_PRODUCTS:
        work(0, tasks, *arguments)
        return
    edges = [tasks * i // threads for i in range(threads + 1)]
    shares = [(edges[i], edges[i + 1]) for i in range(threads)]
    list(threads_of(os.getpid(), threads).map(lambda share: work(*share, *arguments), shares))

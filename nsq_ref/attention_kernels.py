"""Attention over stored keys and values without decoding them: the rank-one form (A3), in Numba.

Codes are taken as P1 stores them, offset included, and the zero takes the offset back, so that one
form serves every scheme: element j of token t decodes to

    gain_t * (slope_j * (step_t * code_tj + base_t) + level_j)

With channel scales, ``slope`` is the scale and ``level`` the zero, ``step`` is 1 and ``base`` 0.
With token scales, ``step`` and ``base`` are the token's, ``slope`` is 1, in outlier channels 0, and
``level`` 0. So slopes and levels join the query, or the output, once in a run of tokens; gains
join the scores, or the weights. Outlier channels are added on their own.

Encoding and decoding are held by bits, attention by a tolerance: here, and only here, sums may be
reordered and fused. No flag assumes that values are finite. Where float32 overflows, or a direction
cancels so far that D1's roundings decide what is left of it, the plain form is taken, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray
from numba.core import cgutils, types
from numba.extending import intrinsic

from nsq_ref.compilation import compiled
from nsq_ref.kernels import jit_row
from nsq_ref.threads import in_shares

Array = npt.NDArray[Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])

RUN = 128  # most tokens that are unpacked at once, and added up in float32
TILE, HALF = 8, 4  # tokens at once in one loop: for one row of queries, and for ROWS of them
ROWS = 4
NARROW, WIDE = 64, 128  # channels at once: of small heads, and of others
LINE = 64  # bytes: vectors that start at a multiple of it never straddle two cache lines
SERIAL_PRODUCTS = 1 << 22  # below this, starting a thread costs more than it saves

# A squared direction below this share of the squares it is made of, or outside these bounds, is
# left to the plain form.
CANCELLED, TINY, HUGE = np.float32(2.0**-40), np.float32(2.0**-90), np.float32(2.0**120)
MOST = float(np.finfo(np.float32).max)

FLOAT16, BFLOAT16, FLOAT32 = 0, 1, 2  # kinds of stored floats; all are read as 16-bit halves

# A piece is a row of integers: where its arrays lie in memory, how far apart two heads are, and
# what they hold. Calling Numba for one piece, array by array, would take as long as the work.
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
    return compiled(function, keep=True, slow=True, fastmath=_LOOSE, nogil=True)


def jit_head(function: _Function) -> _Function:
    """Compile the work on one head of one piece, which allocates what it needs."""
    return compiled(function, fastmath=_LOOSE)


def jit_loop(function: _Function) -> _Function:
    """Compile an inner part, whose sums may be reordered and fused.

    It allocates nothing, so that it need not count who refers to its arrays, which would take
    longer than the part itself.
    """
    return compiled(function, fastmath=_LOOSE, forceinline=True, _nrt=False)


def jit_plain(function: _Function) -> _Function:
    """Compile an inner part that rounds as written."""
    return compiled(function, fastmath=False, _nrt=False)


# --- what is stored, as float32 and as codes -----------------------------------------------------
# Indices are unsigned where they are computed: Numba then need not ask whether they are negative,
# which would keep the compiler from using vectors.


def _pointer(_context: Any, address: Any) -> Any:
    """Return an address as a pointer, for `numba.carray`."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


pointer = cast(Callable[[int], Any], intrinsic(_pointer))


def _prefetch(_context: Any, address: Any) -> Any:
    """Ask for the cache line at an address, without waiting for it; any address will do."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        declare = cast(Any, cgutils.get_or_insert_function)
        function = declare(builder.module, kind, "llvm.prefetch.p0")
        at = builder.inttoptr(arguments[0], cgutils.voidptr_t)
        builder.call(function, [at, number(0), number(3), number(1)])  # read, keep, data
        return context.get_dummy_value()

    return types.void(address), generate


prefetch = cast(Callable[[int], None], intrinsic(_prefetch))


@jit_row
def codes_at(piece: Array, h: int) -> Array:
    """One head of the packed codes."""
    count = piece[TOKENS] * row_bytes(piece[HEAD_DIM], piece[BITS])
    return carray(pointer(piece[CODES] + h * piece[STRIDES + CODES]), count, np.uint8)


@jit_row
def floats_at(piece: Array, part: int, h: int, count: int, kind: int) -> Array:
    """One head of stored floats, ``count`` of them, in halves."""
    halves = 2 * count if kind == FLOAT32 else count
    return carray(pointer(piece[part] + h * piece[STRIDES + part]), halves, np.uint16)


@jit_row
def index_at(piece: Array, h: int, count: int) -> Array:
    """One head of the indices of outlier channels."""
    return carray(pointer(piece[INDEX] + h * piece[STRIDES + INDEX]), count, np.int32)


@jit_row
def row_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one packed token (P1)."""
    low = (head_dim * (2 if bits == 3 else bits) + 7) // 8
    return low + (head_dim + 7) // 8 if bits == 3 else low


@jit_row
def blocks_of(piece: Array) -> int:
    """Blocks of a piece; the last may be shorter."""
    return (piece[TOKENS] + piece[BLOCK_SIZE] - 1) // piece[BLOCK_SIZE]


@jit_row
def scales_of(piece: Array) -> int:
    """Scales of a head of a piece."""
    return blocks_of(piece) * piece[HEAD_DIM] if piece[PER_CHANNEL] else piece[TOKENS]


@jit_loop
def widen(halves: Array, first: int, count: int, kind: int, out: Array, at: int) -> None:
    """Stored floats [first, first + count), as float32."""
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
    def spread(row: Array, start: int, count: int, codes: Array, at: int) -> None:
        """Codes of ``count`` bytes, a byte each, channels in order."""
        source, to = np.uint64(start), np.uint64(at)
        for i in range(np.uint64(count)):
            byte = row[source + i]
            for p in range(planes):
                code = np.uint8(np.uint8(byte >> np.uint8(p * bits)) & np.uint8(mask))
                codes[to + i * np.uint64(planes) + np.uint64(p)] = code

    return spread


spread_2, spread_4, spread_8 = spread_of(2), spread_of(4), spread_of(8)


@jit_row
def fetch(ahead: int, token: int, row_bytes: int) -> None:
    """Ask for the packed tokens that will be read a run later, while there is other work."""
    for i in range(0, TILE * row_bytes if ahead else 0, LINE):
        prefetch(ahead + token * row_bytes + i)


@jit_loop
def spread_any(row: Array, start: int, count: int, bits: int, codes: Array, at: int) -> None:
    """Codes of ``count`` bytes, a byte each, channels in order."""
    if bits == 4:
        spread_4(row, start, count, codes, at)
    elif bits == 8:
        spread_8(row, start, count, codes, at)
    else:
        spread_2(row, start, count, codes, at)


@jit_loop
def add_high_bits(row: Array, start: int, count: int, codes: Array, at: int) -> None:
    """The third bits of 3-bit codes, which are a row of their own (P1)."""
    source, to = np.uint64(start), np.uint64(at)
    for i in range(np.uint64(count)):
        byte = row[source + i]
        for p in range(8):
            bit = np.uint8(np.uint8(byte >> np.uint8(p)) & np.uint8(1))
            codes[to + i * np.uint64(8) + np.uint64(p)] |= np.uint8(bit << np.uint8(2))


@jit_loop
def unpack(row: Array, first: int, count: int, piece: Array, width: int, codes: Array) -> None:
    """Codes of ``count`` tokens as ``codes[chunk][RUN][width]``; those behind D may be any."""
    bits, head_dim = piece[BITS], piece[HEAD_DIM]
    low_bits = 2 if bits == 3 else bits
    low_bytes, all_bytes = (head_dim * low_bits + 7) // 8, row_bytes(head_dim, bits)
    if head_dim == width and bits != 3:  # rows without gaps: one loop
        spread_any(row, first * all_bytes, count * all_bytes, bits, codes, 0)
        return
    for chunk in range((head_dim + width - 1) // width):
        low = chunk * width * low_bits // 8
        low_count = min(width * low_bits // 8, low_bytes - low)
        high = low_bytes + chunk * width // 8
        for k in range(count):
            start, at = (first + k) * all_bytes, (chunk * RUN + k) * width
            spread_any(row, start + low, low_count, low_bits, codes, at)
            if bits == 3:
                add_high_bits(row, start + high, min(width // 8, all_bytes - high), codes, at)


@jit_loop
def widen_tokens(
    halves: Array, first: int, count: int, piece: Array, width: int, tokens: Array
) -> None:
    """Unquantized tokens as ``tokens[chunk][RUN][width]``; what lies behind D stays 0."""
    head_dim, kind = piece[HEAD_DIM], piece[NORM_KIND]
    for chunk in range((head_dim + width - 1) // width):
        many = min(width, head_dim - chunk * width)
        for k in range(count):
            start = (first + k) * head_dim + chunk * width
            widen(halves, start, many, kind, tokens, (chunk * RUN + k) * width)


@jit_loop
def clear(values: Array, count: int) -> None:
    """Zeros."""
    for i in range(np.uint64(count)):
        values[i] = 0


@jit_head
def aligned(count: int) -> Array:
    """Float32 zeros that start at a cache line."""
    flat = np.zeros(count + LINE // 4, np.float32)
    start = (-flat.ctypes.data % LINE) // 4
    return flat[start : start + count]


# --- TILE tokens, some channels of each ----------------------------------------------------------


def loops_of(width: int) -> tuple[Callable[..., None], ...]:
    """Return the loops over ``tokens[TILE][width]``: to the compiler, the width is a constant.

    Tokens are codes or floats. Places of two rows of queries are RUN apart.
    """

    @jit_loop
    def add_dots(
        tokens: Array, at: np.uint64, query: Array, to: np.uint64, out: Array, o: int
    ) -> None:
        """Products of a row of queries with eight tokens."""
        a = b = c = d = e = f = g = h = np.float32(0)
        for i in range(width):
            j, q = at + np.uint64(i), query[to + np.uint64(i)]
            a += q * np.float32(tokens[j])
            b += q * np.float32(tokens[j + np.uint64(width)])
            c += q * np.float32(tokens[j + np.uint64(2 * width)])
            d += q * np.float32(tokens[j + np.uint64(3 * width)])
            e += q * np.float32(tokens[j + np.uint64(4 * width)])
            f += q * np.float32(tokens[j + np.uint64(5 * width)])
            g += q * np.float32(tokens[j + np.uint64(6 * width)])
            h += q * np.float32(tokens[j + np.uint64(7 * width)])
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
        tokens: Array, at: np.uint64, query: Array, to: np.uint64, out: Array, o: int
    ) -> None:
        """Products of four rows of queries with four tokens."""
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
        c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
        for i in range(width):
            j, k = at + np.uint64(i), to + np.uint64(i)
            a, b = query[k], query[k + np.uint64(width)]
            c, d = query[k + np.uint64(2 * width)], query[k + np.uint64(3 * width)]
            x = np.float32(tokens[j])
            a0, b0, c0, d0 = a0 + a * x, b0 + b * x, c0 + c * x, d0 + d * x
            x = np.float32(tokens[j + np.uint64(width)])
            a1, b1, c1, d1 = a1 + a * x, b1 + b * x, c1 + c * x, d1 + d * x
            x = np.float32(tokens[j + np.uint64(2 * width)])
            a2, b2, c2, d2 = a2 + a * x, b2 + b * x, c2 + c * x, d2 + d * x
            x = np.float32(tokens[j + np.uint64(3 * width)])
            a3, b3, c3, d3 = a3 + a * x, b3 + b * x, c3 + c * x, d3 + d * x
        four = ((a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3))
        for r in range(4):
            for k in range(4):
                out[o + RUN * r + k] += four[r][k]

    @jit_loop
    def add_squares(
        tokens: Array, at: np.uint64, slope: Array, level: Array, to: np.uint64, out: Array, o: int
    ) -> None:
        """Squared lengths of eight directions with channel scales."""
        a = b = c = d = e = f = g = h = np.float32(0)
        for i in range(width):
            j, s, z = at + np.uint64(i), slope[to + np.uint64(i)], level[to + np.uint64(i)]
            y = s * np.float32(tokens[j]) + z
            a += y * y
            y = s * np.float32(tokens[j + np.uint64(width)]) + z
            b += y * y
            y = s * np.float32(tokens[j + np.uint64(2 * width)]) + z
            c += y * y
            y = s * np.float32(tokens[j + np.uint64(3 * width)]) + z
            d += y * y
            y = s * np.float32(tokens[j + np.uint64(4 * width)]) + z
            e += y * y
            y = s * np.float32(tokens[j + np.uint64(5 * width)]) + z
            f += y * y
            y = s * np.float32(tokens[j + np.uint64(6 * width)]) + z
            g += y * y
            y = s * np.float32(tokens[j + np.uint64(7 * width)]) + z
            h += y * y
        out[o] += a
        out[o + 1] += b
        out[o + 2] += c
        out[o + 3] += d
        out[o + 4] += e
        out[o + 5] += f
        out[o + 6] += g
        out[o + 7] += h

    @jit_loop
    def add_dots_and_squares(
        tokens: Array, at: np.uint64, query: Array, slope: Array, level: Array, to: np.uint64,
        out: Array, square: Array, o: int,
    ) -> None:  # fmt: skip
        """Products of a row of queries with four directions, and the squared lengths of those."""
        a = b = c = d = e = f = g = h = np.float32(0)
        for i in range(width):
            j, k = at + np.uint64(i), to + np.uint64(i)
            q, s, z = query[k], slope[k], level[k]
            y = s * np.float32(tokens[j]) + z
            a, e = a + q * y, e + y * y
            y = s * np.float32(tokens[j + np.uint64(width)]) + z
            b, f = b + q * y, f + y * y
            y = s * np.float32(tokens[j + np.uint64(2 * width)]) + z
            c, g = c + q * y, g + y * y
            y = s * np.float32(tokens[j + np.uint64(3 * width)]) + z
            d, h = d + q * y, h + y * y
        out[o] += a
        out[o + 1] += b
        out[o + 2] += c
        out[o + 3] += d
        square[o] += e
        square[o + 1] += f
        square[o + 2] += g
        square[o + 3] += h

    @jit_loop
    def add_weighted(
        tokens: Array, at: np.uint64, weight: Array, o: int, total: Array, to: np.uint64
    ) -> None:
        """Add eight tokens, each times its weight, to a row of totals."""
        a, b, c, d = weight[o], weight[o + 1], weight[o + 2], weight[o + 3]
        e, f, g, h = weight[o + 4], weight[o + 5], weight[o + 6], weight[o + 7]
        for i in range(width):
            j, k = at + np.uint64(i), to + np.uint64(i)
            s = total[k]
            s += a * np.float32(tokens[j])
            s += b * np.float32(tokens[j + np.uint64(width)])
            s += c * np.float32(tokens[j + np.uint64(2 * width)])
            s += d * np.float32(tokens[j + np.uint64(3 * width)])
            s += e * np.float32(tokens[j + np.uint64(4 * width)])
            s += f * np.float32(tokens[j + np.uint64(5 * width)])
            s += g * np.float32(tokens[j + np.uint64(6 * width)])
            s += h * np.float32(tokens[j + np.uint64(7 * width)])
            total[k] = s

    @jit_loop
    def add_weighted_to_four(
        tokens: Array, at: np.uint64, weight: Array, o: int, total: Array, to: np.uint64
    ) -> None:
        """Add four tokens, each times its weights, to four rows of totals."""
        p, r, t = o + RUN, o + 2 * RUN, o + 3 * RUN
        a0, a1, a2, a3 = weight[o], weight[o + 1], weight[o + 2], weight[o + 3]
        b0, b1, b2, b3 = weight[p], weight[p + 1], weight[p + 2], weight[p + 3]
        c0, c1, c2, c3 = weight[r], weight[r + 1], weight[r + 2], weight[r + 3]
        d0, d1, d2, d3 = weight[t], weight[t + 1], weight[t + 2], weight[t + 3]
        for i in range(width):
            j, k = at + np.uint64(i), to + np.uint64(i)
            a, b = total[k], total[k + np.uint64(width)]
            c, d = total[k + np.uint64(2 * width)], total[k + np.uint64(3 * width)]
            x = np.float32(tokens[j])
            a, b, c, d = a + a0 * x, b + b0 * x, c + c0 * x, d + d0 * x
            x = np.float32(tokens[j + np.uint64(width)])
            a, b, c, d = a + a1 * x, b + b1 * x, c + c1 * x, d + d1 * x
            x = np.float32(tokens[j + np.uint64(2 * width)])
            a, b, c, d = a + a2 * x, b + b2 * x, c + c2 * x, d + d2 * x
            x = np.float32(tokens[j + np.uint64(3 * width)])
            a, b, c, d = a + a3 * x, b + b3 * x, c + c3 * x, d + d3 * x
            total[k] = a
            total[k + np.uint64(width)] = b
            total[k + np.uint64(2 * width)] = c
            total[k + np.uint64(3 * width)] = d

    return (
        add_dots,
        add_dots_of_four,
        add_squares,
        add_dots_and_squares,
        add_weighted,
        add_weighted_to_four,
    )


(
    add_dots_narrow,
    add_dots_of_four_narrow,
    add_squares_narrow,
    add_dots_and_squares_narrow,
    add_weighted_narrow,
    add_weighted_to_four_narrow,
) = loops_of(NARROW)
(
    add_dots_wide,
    add_dots_of_four_wide,
    add_squares_wide,
    add_dots_and_squares_wide,
    add_weighted_wide,
    add_weighted_to_four_wide,
) = loops_of(WIDE)


# --- a run of tokens, which share slopes and levels ----------------------------------------------


@jit_row
def run_end(first: int, piece: Array) -> int:
    """Where the tokens from ``first`` on leave its block, or are RUN."""
    size = piece[BLOCK_SIZE]
    return min(first + RUN, piece[LAST], (first // size + 1) * size)


@jit_loop
def take_offset(zero: Array, scale: Array, count: int, piece: Array) -> None:
    """Let zeros take back the offset that codes are stored with."""
    offset = np.float32(piece[OFFSET])
    for j in range(np.uint64(count)):
        zero[j] -= offset * scale[j]


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
def set_tokens(
    norms: Array, scales: Array, zeros: Array, first: int, count: int, piece: Array,
    reach: np.float32, step: Array, base: Array, gain: Array, limit: Array,
) -> None:  # fmt: skip
    """Steps, bases and stored factors of a run, and the squares that are too small to trust."""
    widen(norms, first, count, piece[NORM_KIND], gain, 0)
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
def run_squares(
    codes: Array, count: int, piece: Array, width: int, slope: Array, level: Array, step: Array,
    base: Array, ahead: int, square: Array,
) -> None:  # fmt: skip
    """Squared lengths of the directions of a run, but for outlier channels."""
    clear(square, RUN)
    row = row_bytes(piece[HEAD_DIM], piece[BITS])
    for chunk in range((piece[HEAD_DIM] + width - 1) // width):
        to = np.uint64(chunk * width)
        if not piece[PER_CHANNEL]:
            for k in range(count):
                at = np.uint64((chunk * RUN + k) * width)
                square[k] += token_square(codes, at, slope, to, width, step[k], base[k])
        elif width == NARROW:
            for k in range(0, count, TILE):
                fetch(0 if chunk else ahead, k, row)
                at = np.uint64((chunk * RUN + k) * width)
                add_squares_narrow(codes, at, slope, level, to, square, k)
        else:
            for k in range(0, count, TILE):
                fetch(0 if chunk else ahead, k, row)
                at = np.uint64((chunk * RUN + k) * width)
                add_squares_wide(codes, at, slope, level, to, square, k)


@jit_loop
def run_dots_and_squares(
    codes: Array, count: int, query: Array, piece: Array, width: int, slope: Array, level: Array,
    ahead: int, dot: Array, square: Array,
) -> None:  # fmt: skip
    """The same with channel scales, and products with one row of ``query[channel]`` beside."""
    clear(dot, RUN)
    clear(square, RUN)
    row = row_bytes(piece[HEAD_DIM], piece[BITS])
    for chunk in range((piece[HEAD_DIM] + width - 1) // width):
        to = np.uint64(chunk * width)
        for k in range(0, count, HALF):
            fetch(0 if chunk or k % TILE else ahead, k, row)
            at = np.uint64((chunk * RUN + k) * width)
            if width == NARROW:
                add_dots_and_squares_narrow(codes, at, query, slope, level, to, dot, square, k)
            else:
                add_dots_and_squares_wide(codes, at, query, slope, level, to, dot, square, k)


@jit_loop
def renormalize(
    count: int, kept: int, outlier: Array, limit: Array, gain: Array, square: Array
) -> None:
    """Divide the norms of a run by the lengths of its directions: NaN for the plain form."""
    for i in range(kept):
        for k in range(count):
            square[k] += outlier[k * kept + i] * outlier[k * kept + i]
    nothing, unknown = np.float32(0), np.float32(np.nan)
    for k in range(np.uint64(count)):
        sure = square[k] > limit[k] and square[k] < HUGE
        otherwise = nothing if gain[k] == 0 else unknown
        gain[k] = gain[k] / np.sqrt(square[k]) if sure else otherwise


@jit_loop
def token_square(
    codes: Array, at: np.uint64, slope: Array, to: np.uint64, width: int, step: float, base: float
) -> float:
    """Squared length of one direction with a token scale."""
    total = np.float32(0)
    for i in range(np.uint64(width)):
        y = slope[to + i] * (step * np.float32(codes[at + i]) + base)
        total += y * y
    return total


@jit_loop
def fold(query: Array, h: int, slope: Array, width: int, chunks: int, folded: Array) -> None:
    """Queries times slopes as ``folded[chunk][row][width]``."""
    rows, head_dim = query.shape[1], query.shape[2]
    for chunk in range(chunks):
        start, count = np.uint64(chunk * width), np.uint64(min(width, head_dim - chunk * width))
        for r in range(rows):
            at = np.uint64((chunk * rows + r) * width)
            for i in range(count):
                folded[at + i] = query[h, r, start + i] * slope[start + i]


@jit_loop
def product(query: Array, h: int, r: int, channels: Array) -> np.float32:
    """One row of queries times slopes, or levels."""
    total = np.float32(0)
    for j in range(query.shape[2]):
        total += query[h, r, j] * channels[j]
    return total


@jit_loop
def run_dots(
    tokens: Array, count: int, query: Array, r: int, rows: int, many: int, width: int, chunks: int,
    ahead: int, row: int, out: Array,
) -> None:  # fmt: skip
    """Products of ``many`` rows, ROWS or 1, of ``query[chunk][row][width]`` with a run."""
    clear(out, many * RUN)
    half = np.uint64(HALF * width)
    for chunk in range(chunks):
        to = np.uint64((chunk * rows + r) * width)
        for k in range(0, count, TILE):
            fetch(0 if chunk else ahead, k, row)
            at = np.uint64((chunk * RUN + k) * width)
            if many == 1 and width == NARROW:
                add_dots_narrow(tokens, at, query, to, out, k)
            elif many == 1:
                add_dots_wide(tokens, at, query, to, out, k)
            elif width == NARROW:
                add_dots_of_four_narrow(tokens, at, query, to, out, k)
                add_dots_of_four_narrow(tokens, at + half, query, to, out, k + HALF)
            else:
                add_dots_of_four_wide(tokens, at, query, to, out, k)
                add_dots_of_four_wide(tokens, at + half, query, to, out, k + HALF)


@jit_loop
def run_totals(
    tokens: Array, count: int, weight: Array, many: int, width: int, chunks: int, ahead: int,
    row: int, total: Array,
) -> None:  # fmt: skip
    """Add a run, times weights, to ``many`` rows, ROWS or 1, of ``total[chunk][ROWS][width]``."""
    half = np.uint64(HALF * width)
    for chunk in range(chunks):
        to = np.uint64(chunk * ROWS * width)
        for k in range(0, count, TILE):
            fetch(0 if chunk else ahead, k, row)
            at = np.uint64((chunk * RUN + k) * width)
            if many == 1 and width == NARROW:
                add_weighted_narrow(tokens, at, weight, k, total, to)
            elif many == 1:
                add_weighted_wide(tokens, at, weight, k, total, to)
            elif width == NARROW:
                add_weighted_to_four_narrow(tokens, at, weight, k, total, to)
                add_weighted_to_four_narrow(tokens, at + half, weight, k + HALF, total, to)
            else:
                add_weighted_to_four_wide(tokens, at, weight, k, total, to)
                add_weighted_to_four_wide(tokens, at + half, weight, k + HALF, total, to)


@jit_loop
def add_run(
    total: Array, s: int, width: int, bases: float, gains: float, slope: Array, level: Array,
    part: int, row: int, out: Array,
) -> None:  # fmt: skip
    """Add the totals of a run to the output, from here on in float64."""
    head_dim = out.shape[2]
    for chunk in range((head_dim + width - 1) // width):
        start, at = np.uint64((chunk * ROWS + s) * width), np.uint64(chunk * width)
        for i in range(np.uint64(min(width, head_dim - chunk * width))):
            coded = np.float64(total[start + i]) + np.float64(bases)
            direction = np.float64(slope[at + i]) * coded
            direction += np.float64(level[at + i]) * np.float64(gains)
            out[part, row, at + i] += direction


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
    codes: Array, k: int, token: int, norms: Array, scales: Array, zeros: Array, index: Array,
    outliers: Array, piece: Array, width: int, spare: Array, y: Array,
) -> float:  # fmt: skip
    """The direction of one token, rounded as D1 says, into ``y``; return its gain."""
    head_dim, kept, kind = piece[HEAD_DIM], piece[KEPT], piece[SCALE_KIND]
    block = token // piece[BLOCK_SIZE]
    spare[1] = 0
    for j in range(head_dim):
        at = block * head_dim + j if piece[PER_CHANNEL] else token
        widen(scales, at, 1, kind, spare, 0)
        if not piece[SYMMETRIC]:
            widen(zeros, at, 1, kind, spare, 1)
        code = np.float32(codes[(j // width * RUN + k) * width + j % width])
        y[j] = (code - np.float32(piece[OFFSET])) * spare[0] + spare[1]
    for i in range(kept):
        widen(outliers, token * kept + i, 1, FLOAT16, y, index[block * kept + i])
    widen(norms, token, 1, piece[NORM_KIND], spare, 2)
    gain = np.float64(spare[2])
    if piece[RENORMALIZE]:
        square = 0.0
        for j in range(head_dim):
            square += np.float64(y[j]) * np.float64(y[j])
        gain = gain / np.sqrt(square) if square > 0 else 0.0
    return gain


@jit_plain
def plain_float(tokens: Array, k: int, width: int, y: Array) -> None:
    """One unquantized token of a run into ``y``."""
    for j in range(y.shape[0]):
        y[j] = tokens[(j // width * RUN + k) * width + j % width]


@jit_plain
def plain_dot(query: Array, h: int, r: int, y: Array, gain: float) -> np.float32:
    """``gain * <query, y>``; what float32 cannot hold becomes the largest that it can."""
    total = 0.0
    for j in range(y.shape[0]):
        total += np.float64(query[h, r, j]) * np.float64(y[j])
    return np.float32(min(max(gain * total, -MOST), MOST))


@jit_plain
def plain_add(weight: float, gain: float, y: Array, part: int, row: int, out: Array) -> None:
    """Add ``weight * gain * y``."""
    for j in range(y.shape[0]):
        out[part, row, j] += np.float64(weight) * (gain * np.float64(y[j]))


# --- one head of one piece -----------------------------------------------------------------------


@jit_head
def score_codes(piece: Array, h: int, query: Array, scores: Array, following: int) -> None:
    """Products of queries and quantized tokens, into ``scores[h, row, column]``."""
    tokens, kept = piece[TOKENS], piece[KEPT]
    rows, head_dim = query.shape[1], query.shape[2]
    width = NARROW if head_dim <= NARROW else WIDE
    chunks = (head_dim + width - 1) // width
    packed, all_bytes = codes_at(piece, h), row_bytes(head_dim, piece[BITS])
    norms = floats_at(piece, NORMS, h, tokens, piece[NORM_KIND])
    scales = floats_at(piece, SCALES, h, scales_of(piece), piece[SCALE_KIND])
    zeros = floats_at(piece, ZEROS, h, scales_of(piece), piece[SCALE_KIND])
    index = index_at(piece, h, blocks_of(piece) * kept)
    outliers = floats_at(piece, OUTLIERS, h, tokens * kept, FLOAT16)

    codes = np.zeros(chunks * RUN * width, np.uint8)
    slope, level = aligned(chunks * width), aligned(chunks * width)
    step, base, gain, limit = aligned(RUN), aligned(RUN), aligned(RUN), aligned(RUN)
    folded, dot, square = aligned(chunks * rows * width), aligned(ROWS * RUN), aligned(RUN)
    outlier, extra = aligned(RUN * kept), aligned(RUN)
    ones, spare, y = aligned(head_dim), aligned(3), aligned(head_dim)
    for k in range(RUN):
        step[k] = 1
    for j in range(head_dim):
        ones[j] = 1
    # One row then needs no slopes: they are in the directions, which are formed for their lengths.
    alone = rows == 1 and piece[PER_CHANNEL] != 0 and piece[RENORMALIZE] != 0
    fold(query, h, ones, width, chunks, folded)
    first = piece[FIRST]
    while first < piece[LAST]:
        last, block = run_end(first, piece), first // piece[BLOCK_SIZE]
        count, column = last - first, piece[COLUMN] + first - piece[FIRST]
        ahead = piece[CODES] + h * piece[STRIDES + CODES] + last * all_bytes
        if last == piece[LAST]:
            ahead = following
        unpack(packed, first, count, piece, width, codes)
        reach = set_channels(scales, zeros, index, block, piece, slope, level)
        set_tokens(norms, scales, zeros, first, count, piece, reach, step, base, gain, limit)
        widen(outliers, first * kept, count * kept, FLOAT16, outlier, 0)
        if alone:
            run_dots_and_squares(
                codes, count, folded, piece, width, slope, level, ahead, dot, square
            )
        else:
            fold(query, h, slope, width, chunks, folded)
            if piece[RENORMALIZE]:
                run_squares(codes, count, piece, width, slope, level, step, base, ahead, square)
        if piece[RENORMALIZE]:
            renormalize(count, kept, outlier, limit, gain, square)
        r = 0
        while r < rows:
            many = ROWS if r + ROWS <= rows else 1
            if not alone:
                run_dots(
                    codes, count, folded, r, rows, many, width, chunks,
                    0 if r or piece[RENORMALIZE] else ahead, all_bytes, dot,
                )  # fmt: skip
            for row in range(r, r + many):
                slopes, levels = np.float32(0), np.float32(0)
                if not alone:
                    slopes, levels = product(query, h, row, slope), product(query, h, row, level)
                for i in range(kept):
                    q = query[h, row, index[block * kept + i]]
                    for k in range(count):
                        extra[k] = (extra[k] if i else np.float32(0)) + q * outlier[k * kept + i]
                start, to, check = np.uint64((row - r) * RUN), np.uint64(column), np.float32(0)
                for k in range(np.uint64(count)):
                    coded = step[k] * dot[start + k] + base[k] * slopes + levels
                    score = gain[k] * (coded + extra[k])
                    check += score * np.float32(0)  # NaN if the score is not finite
                    scores[h, row, to + k] = score
                if check != 0:
                    for k in range(count):
                        if not np.isfinite(scores[h, row, column + k]):
                            exact = plain_token(
                                codes, k, first + k, norms, scales, zeros, index, outliers, piece,
                                width, spare, y,
                            )  # fmt: skip
                            scores[h, row, column + k] = plain_dot(query, h, row, y, exact)
            r += many
        first = last


@jit_head
def add_codes(piece: Array, h: int, weights: Array, part: int, out: Array, following: int) -> None:
    """Add quantized tokens times ``weights[h, row, column]`` to ``out[part, row]``."""
    tokens, kept = piece[TOKENS], piece[KEPT]
    rows, head_dim = weights.shape[1], piece[HEAD_DIM]
    width = NARROW if head_dim <= NARROW else WIDE
    chunks = (head_dim + width - 1) // width
    packed, all_bytes = codes_at(piece, h), row_bytes(head_dim, piece[BITS])
    norms = floats_at(piece, NORMS, h, tokens, piece[NORM_KIND])
    scales = floats_at(piece, SCALES, h, scales_of(piece), piece[SCALE_KIND])
    zeros = floats_at(piece, ZEROS, h, scales_of(piece), piece[SCALE_KIND])
    index = index_at(piece, h, blocks_of(piece) * kept)
    outliers = floats_at(piece, OUTLIERS, h, tokens * kept, FLOAT16)

    codes = np.zeros(chunks * RUN * width, np.uint8)
    slope, level = aligned(chunks * width), aligned(chunks * width)
    step, base, gain, limit = aligned(RUN), aligned(RUN), aligned(RUN), aligned(RUN)
    total, weight, square = aligned(chunks * ROWS * width), aligned(ROWS * RUN), aligned(RUN)
    gains, bases = aligned(ROWS), aligned(ROWS)
    outlier, extra = aligned(RUN * kept), aligned(ROWS * kept)
    spare, y = aligned(3), aligned(head_dim)
    for k in range(RUN):
        step[k] = 1
    first = piece[FIRST]
    while first < piece[LAST]:
        last, block = run_end(first, piece), first // piece[BLOCK_SIZE]
        count, column = last - first, piece[COLUMN] + first - piece[FIRST]
        ahead = piece[CODES] + h * piece[STRIDES + CODES] + last * all_bytes
        if last == piece[LAST]:
            ahead = following
        unpack(packed, first, count, piece, width, codes)
        reach = set_channels(scales, zeros, index, block, piece, slope, level)
        set_tokens(norms, scales, zeros, first, count, piece, reach, step, base, gain, limit)
        widen(outliers, first * kept, count * kept, FLOAT16, outlier, 0)
        if piece[RENORMALIZE]:
            run_squares(codes, count, piece, width, slope, level, step, base, ahead, square)
            renormalize(count, kept, outlier, limit, gain, square)
        r = 0
        while r < rows:
            many = ROWS if r + ROWS <= rows else 1
            clear(total, chunks * ROWS * width)
            clear(weight, ROWS * RUN)
            for s in range(many):
                start, source = np.uint64(s * RUN), np.uint64(column)
                sum_of_gains, sum_of_bases = np.float32(0), np.float32(0)
                for k in range(np.uint64(count)):
                    gained = weights[h, r + s, source + k] * gain[k]
                    sum_of_gains += gained
                    sum_of_bases += gained * base[k]
                    weight[start + k] = gained * step[k]
                gains[s], bases[s] = sum_of_gains, sum_of_bases
                for i in range(kept):
                    sum_of_outliers = np.float32(0)
                    for k in range(count):
                        gained = weights[h, r + s, column + k] * gain[k]
                        sum_of_outliers += gained * outlier[k * kept + i]
                    extra[s * kept + i] = sum_of_outliers
            run_totals(
                codes, count, weight, many, width, chunks,
                0 if r or piece[RENORMALIZE] else ahead, all_bytes, total,
            )  # fmt: skip
            for s in range(many):
                row = r + s
                finite = np.isfinite(gains[s]) and np.isfinite(bases[s])
                finite = finite and all_finite(extra, s * kept, kept)
                for chunk in range(chunks):
                    finite = finite and all_finite(total, (chunk * ROWS + s) * width, width)
                if finite:
                    add_run(total, s, width, bases[s], gains[s], slope, level, part, row, out)
                    for i in range(kept):
                        out[part, row, index[block * kept + i]] += extra[s * kept + i]
                else:
                    for k in range(count):
                        exact = plain_token(
                            codes, k, first + k, norms, scales, zeros, index, outliers, piece,
                            width, spare, y,
                        )  # fmt: skip
                        plain_add(weights[h, row, column + k], exact, y, part, row, out)
            r += many
        first = last


@jit_head
def score_floats(piece: Array, h: int, query: Array, scores: Array) -> None:
    """`score_codes` for tokens that are not quantized."""
    rows, head_dim = query.shape[1], query.shape[2]
    width = NARROW if head_dim <= NARROW else WIDE
    chunks = (head_dim + width - 1) // width
    halves = floats_at(piece, CODES, h, piece[TOKENS] * head_dim, piece[NORM_KIND])
    tokens, ones = aligned(chunks * RUN * width), aligned(chunks * width)
    folded, dot, y = aligned(chunks * rows * width), aligned(ROWS * RUN), aligned(head_dim)
    for j in range(head_dim):
        ones[j] = 1
    fold(query, h, ones, width, chunks, folded)
    for first in range(piece[FIRST], piece[LAST], RUN):
        count, column = min(RUN, piece[LAST] - first), piece[COLUMN] + first - piece[FIRST]
        widen_tokens(halves, first, count, piece, width, tokens)
        r = 0
        while r < rows:
            many = ROWS if r + ROWS <= rows else 1
            run_dots(tokens, count, folded, r, rows, many, width, chunks, 0, 0, dot)
            for row in range(r, r + many):
                for k in range(count):
                    score = dot[(row - r) * RUN + k]
                    if not np.isfinite(score):
                        plain_float(tokens, k, width, y)
                        score = plain_dot(query, h, row, y, 1.0)
                    scores[h, row, column + k] = score
            r += many


@jit_head
def add_floats(piece: Array, h: int, weights: Array, part: int, out: Array) -> None:
    """`add_codes` for tokens that are not quantized."""
    rows, head_dim = weights.shape[1], piece[HEAD_DIM]
    width = NARROW if head_dim <= NARROW else WIDE
    chunks = (head_dim + width - 1) // width
    halves = floats_at(piece, CODES, h, piece[TOKENS] * head_dim, piece[NORM_KIND])
    tokens, total = aligned(chunks * RUN * width), aligned(chunks * ROWS * width)
    slope, level = aligned(chunks * width), aligned(chunks * width)
    weight, y = aligned(ROWS * RUN), aligned(head_dim)
    for j in range(head_dim):
        slope[j] = 1
    for first in range(piece[FIRST], piece[LAST], RUN):
        count, column = min(RUN, piece[LAST] - first), piece[COLUMN] + first - piece[FIRST]
        widen_tokens(halves, first, count, piece, width, tokens)
        r = 0
        while r < rows:
            many = ROWS if r + ROWS <= rows else 1
            clear(total, chunks * ROWS * width)
            clear(weight, ROWS * RUN)
            for s in range(many):
                for k in range(count):
                    weight[s * RUN + k] = weights[h, r + s, column + k]
            run_totals(tokens, count, weight, many, width, chunks, 0, 0, total)
            for s in range(many):
                finite = True
                for chunk in range(chunks):
                    finite = finite and all_finite(total, (chunk * ROWS + s) * width, width)
                if finite:
                    add_run(total, s, width, 0.0, 0.0, slope, level, part, r + s, out)
                else:
                    for k in range(count):
                        plain_float(tokens, k, width, y)
                        plain_add(weights[h, r + s, column + k], 1.0, y, part, r + s, out)
            r += many


# --- all pieces: a task is one head of one segment, pieces edges[i] to edges[i + 1] --------------


@jit_row
def next_codes(pieces: Array, i: int, h: int) -> int:
    """Where the codes of the next piece begin, or 0."""
    if i + 1 == len(pieces) or pieces[i + 1, BITS] == UNQUANTIZED:
        return 0
    start = pieces[i + 1, FIRST] * row_bytes(pieces[i + 1, HEAD_DIM], pieces[i + 1, BITS])
    return pieces[i + 1, CODES] + h * pieces[i + 1, STRIDES + CODES] + start


@jit
def score_pieces(
    first: int, last: int, pieces: Array, edges: Array, query: Array, scores: Array
) -> None:
    """Write ``scores[kv_head, row, column]``, tasks [first, last)."""
    segments = edges.shape[0] - 1
    for task in range(first, last):
        h, segment = task // segments, task % segments
        for i in range(edges[segment], edges[segment + 1]):
            if pieces[i, BITS] == UNQUANTIZED:
                score_floats(pieces[i], h, query, scores)
            else:
                score_codes(pieces[i], h, query, scores, next_codes(pieces, i, h))


@jit
def add_pieces(
    first: int, last: int, pieces: Array, edges: Array, weights: Array, out: Array
) -> None:
    """Add values times ``weights[kv_head, row, column]`` to ``out[task, row]``."""
    segments = edges.shape[0] - 1
    for task in range(first, last):
        h, segment = task // segments, task % segments
        for i in range(edges[segment], edges[segment + 1]):
            if pieces[i, BITS] == UNQUANTIZED:
                add_floats(pieces[i], h, weights, task, out)
            else:
                add_codes(pieces[i], h, weights, task, out, next_codes(pieces, i, h))


def run(work: Callable[..., None], tasks: int, products: int, *arguments: Any) -> None:
    """Do tasks [0, ``tasks``), on as many threads as Numba is set to use."""
    serial = products < SERIAL_PRODUCTS
    in_shares(work, tasks, 1 if serial else numba.config.NUMBA_NUM_THREADS, *arguments)

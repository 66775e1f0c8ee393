"""Attention over stored keys and values without decoding them: the rank-one form (A3), in Numba.

A run of tokens that share their scales is unpacked once, for all queries that share a key/value
head, into a panel of float32. Element j of token t decodes to

    gain_t * (slope_j * panel_tj + level_j)

With channel scales the panel holds codes, ``slope`` is the scale and ``level`` the zero: they join
the queries, or the output, once a run. With token scales the panel holds directions; outliers and
unquantized tokens are in it as they are stored. There ``slope`` is 1 and ``level`` 0. Gains join
the scores, or the weights.

Encoding and decoding are held by bits, attention by a tolerance: here, and only here, sums are
reordered and fused. No flag assumes that values are finite, and what leaves float32 is formed again
in float64. A run is added up in float32, runs in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from nsq_ref.kernels.compilation import compiled
from nsq_ref.kernels.rows import fill_scale_row, unpack_row
from nsq_ref.kernels.threads import in_shares

__all__ = ["run", "visit"]

Array = npt.NDArray[Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])

RUN = 128  # most tokens of a panel, which then fits a core's own cache; even
SERIAL_PRODUCTS = 1 << 22  # below this, starting a thread costs more than it saves
LEAST, MOST_SQUARE = np.float32(2.0**-90), np.float32(2.0**120)  # squared lengths float32 can tell
FLOAT32, FLOAT16, BFLOAT16 = range(3)  # how floats are stored
LOW, HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)  # halves of a float32
MOST = float(np.finfo(np.float32).max)
# Of what only kernels call: in line, as a call counts references to arrays, and, to compile less,
# not to be called from Python.
WITHIN = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def jit(function: _Function) -> _Function:
    """Compile what is called from Python."""
    return compiled(function, keep=True, nogil=True, fastmath=False)


def jit_sum(function: _Function) -> _Function:
    """Compile sums that may be reordered and fused."""
    return compiled(function, **WITHIN, fastmath={"reassoc", "contract"})


def jit_exact(function: _Function) -> _Function:
    """Compile what rounds as it is written."""
    return compiled(function, **WITHIN, fastmath=False)


def jit_square(function: _Function) -> _Function:
    """Compile sums that may be reordered, of terms that round as they are written."""
    return compiled(function, **WITHIN, fastmath={"reassoc"})


# --- floats --------------------------------------------------------------------------------------


@jit_exact
def widened(units: Array, kind: int) -> Array:
    """Floats that are given in units of 16 bits, as Numba knows neither float16 nor bfloat16."""
    rows, columns = units.shape
    if kind == FLOAT32:
        columns //= 2
    wide = np.empty((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            if kind == FLOAT32:
                high = np.uint32(units[i, 2 * j + HIGH]) << np.uint32(16)
                wide[i, j] = np.uint32(high | units[i, 2 * j + LOW]).view(np.float32)
            elif kind == BFLOAT16:
                wide[i, j] = np.uint32(np.uint32(units[i, j]) << np.uint32(16)).view(np.float32)
            else:
                wide[i, j] = float16_of(np.uint32(units[i, j]))
    return wide


@jit_exact
def float16_of(bits: np.uint32) -> np.float32:
    """The value that these bits mean."""
    magnitude = np.uint32(bits & np.uint32(0x7FFF))
    special = np.uint32(0x70000000) if magnitude >= 0x7C00 else np.uint32(0)  # infinite, or NaN
    sign = np.uint32(bits & np.uint32(0x8000)) << np.uint32(16)
    shifted = np.uint32(sign | (magnitude << np.uint32(13)) | special)
    return shifted.view(np.float32) * np.float32(2.0**112)


# --- a run of tokens -----------------------------------------------------------------------------
# Rows are indexed, not sliced, as slices and calls count references to arrays: little for a run,
# much for a token.


@jit_exact
def set_panel(
    t: int, count: int, head_dim: int, block: int, packed: Array, scale: Array, zero: Array,
    index: Array, outliers: Array, bits: int, offset: np.float32, per_channel: bool, codes: Array,
    panel: Array,
) -> None:  # fmt: skip
    """Fill ``panel[:count]`` with tokens from ``t`` on; ``codes`` has the same shape."""
    if packed.shape[1]:
        for k in range(count):
            unpack_row(packed, t + k, head_dim, bits, codes, k)
        # One long loop is quicker than a short one for each token.
        flat, flat_codes = panel.reshape(-1), codes.reshape(-1)
        for i in range(count * panel.shape[1]):
            flat[i] = np.float32(flat_codes[i]) - offset
        if not per_channel:
            for k in range(count):
                step = scale[t + k, 0]
                base = zero[t + k, 0] if zero.shape[1] else np.float32(0)
                for j in range(head_dim):
                    panel[k, j] = panel[k, j] * step + base
    for k in range(count):
        for i in range(index.shape[1]):
            panel[k, index[block, i]] = outliers[t + k, i]


@jit_exact
def set_channels(
    block: int, scale: Array, zero: Array, index: Array, per_channel: bool, slope: Array,
    level: Array,
) -> None:  # fmt: skip
    """Slopes and levels of a block."""
    for j in range(slope.shape[0]):
        slope[j], level[j] = 1, 0
    if per_channel:
        fill_scale_row(scale, block, slope)
        if zero.shape[1]:
            fill_scale_row(zero, block, level)
        for i in range(index.shape[1]):
            j = index[block, i]
            slope[j], level[j] = 1, 0


@jit_exact
def set_gains(
    t: int, count: int, factor: Array, renormalize: bool, levels: bool, panel: Array, slope: Array,
    level: Array, square: Array, gain: Array,
) -> None:  # fmt: skip
    """The stored factor of each token; with M1 over the length of its direction."""
    for k in range(count):
        gain[k] = factor[0, t + k]
    if renormalize:
        if levels:
            set_squares(panel, count, slope, level, square)
        else:
            set_squares_without_level(panel, count, slope, square)
        for k in range(count):
            if not LEAST < square[k] < MOST_SQUARE:
                square[k] = 0
                for j in range(slope.shape[0]):
                    y = np.float64(panel[k, j] * slope[j] + level[j])
                    square[k] += y * y
        for k in range(count):
            gain[k] = gain[k] / np.sqrt(square[k]) if square[k] > 0 else 0.0


@jit_square
def set_squares(panel: Array, count: int, slope: Array, level: Array, square: Array) -> None:
    """Squares of directions that are rounded as D1 says, so that what cancels there does here."""
    for k in range(count):
        total = np.float32(0)
        for j in range(slope.shape[0]):
            y = panel[k, j] * slope[j] + level[j]
            total += y * y
        square[k] = total


@jit_sum
def set_squares_without_level(panel: Array, count: int, slope: Array, square: Array) -> None:
    """The same where all levels are 0: what may be fused is no part of a direction."""
    for k in range(count):
        total = np.float32(0)
        for j in range(slope.shape[0]):
            y = panel[k, j] * slope[j]
            total += y * y
        square[k] = total


# --- sums over channels, and over tokens ---------------------------------------------------------


@jit_sum
def fold(query: Array, h: int, slope: Array, level: Array, folded: Array, constant: Array) -> None:
    """Queries of a head times slopes, and what levels add to each of their products."""
    for r in range(query.shape[1]):
        total = np.float32(0)
        for j in range(query.shape[2]):
            folded[r, j] = query[h, r, j] * slope[j]
            total += query[h, r, j] * level[j]
        constant[r] = total


@jit_sum
def multiply(query: Array, panel: Array, count: int, dot: Array) -> None:
    """Products ``dot[row, token]`` of all rows of queries with ``count`` tokens, and one more."""
    rows, head_dim = query.shape
    together = rows // 4 * 4
    for r in range(0, together, 4):  # rows share what is loaded of tokens, and tokens of rows
        for k in range(0, count, 2):
            a = b = c = d = np.float32(0)
            e = f = g = h = np.float32(0)
            for j in range(head_dim):
                x, y = panel[k, j], panel[k + 1, j]
                a += query[r, j] * x
                b += query[r + 1, j] * x
                c += query[r + 2, j] * x
                d += query[r + 3, j] * x
                e += query[r, j] * y
                f += query[r + 1, j] * y
                g += query[r + 2, j] * y
                h += query[r + 3, j] * y
            dot[r, k], dot[r + 1, k], dot[r + 2, k], dot[r + 3, k] = a, b, c, d
            dot[r, k + 1], dot[r + 1, k + 1], dot[r + 2, k + 1], dot[r + 3, k + 1] = e, f, g, h
    for r in range(together, rows):
        for k in range(count):
            a = np.float32(0)
            for j in range(head_dim):
                a += query[r, j] * panel[k, j]
            dot[r, k] = a


@jit_sum
def scale_products(dot: Array, r: int, constant: Array, gain: Array, out: Array) -> None:
    """Scores of one row of queries with the tokens of a run."""
    for k in range(out.shape[0]):
        out[k] = np.float32(gain[k] * np.float64(dot[r, k] + constant[r]))


@jit_sum
def add_weighted(weight: Array, panel: Array, count: int, total: Array) -> None:
    """Set ``total[rows, D]`` to the tokens of a panel, times their weights of each row."""
    rows, head_dim = total.shape
    for r in range(rows):
        for j in range(head_dim):
            total[r, j] = 0
    together, pairs = rows // 4 * 4, count // 2 * 2
    for k in range(0, pairs, 2):
        for r in range(0, together, 4):
            m = k + 1
            a, b, c, d = weight[r, k], weight[r + 1, k], weight[r + 2, k], weight[r + 3, k]
            e, f, g, h = weight[r, m], weight[r + 1, m], weight[r + 2, m], weight[r + 3, m]
            for j in range(head_dim):
                x, y = panel[k, j], panel[m, j]
                total[r, j] += a * x + e * y
                total[r + 1, j] += b * x + f * y
                total[r + 2, j] += c * x + g * y
                total[r + 3, j] += d * x + h * y
        for r in range(together, rows):
            a, e = weight[r, k], weight[r, k + 1]
            for j in range(head_dim):
                total[r, j] += a * panel[k, j] + e * panel[k + 1, j]
    for k in range(pairs, count):
        for r in range(rows):
            for j in range(head_dim):
                total[r, j] += weight[r, k] * panel[k, j]


# --- what left float32, in float64 ---------------------------------------------------------------


@jit_exact
def plain_score(
    query: Array, h: int, r: int, panel: Array, k: int, slope: Array, level: Array, gain: float
) -> float:
    """One product; what float32 cannot hold becomes the largest that it can."""
    total = 0.0
    for j in range(query.shape[2]):
        y = np.float64(slope[j]) * np.float64(panel[k, j]) + np.float64(level[j])
        total += np.float64(query[h, r, j]) * y
    return min(max(gain * total, -MOST), MOST)


@jit_exact
def plain_add(
    weights: Array, h: int, r: int, at: int, count: int, gain: Array, panel: Array, slope: Array,
    level: Array, out: Array,
) -> None:  # fmt: skip
    """Add the tokens of a run, times weights and gains, to one row of ``out``."""
    for k in range(count):
        weight = np.float64(weights[h, r, at + k]) * gain[k]
        for j in range(out.shape[2]):
            y = np.float64(slope[j]) * np.float64(panel[k, j]) + np.float64(level[j])
            out[h, r, j] += weight * y


@jit_sum
def sum_of(values: Array) -> np.float32:
    """All of them, added up."""
    total = np.float32(0)
    for i in range(values.shape[0]):
        total += values[i]
    return total


# --- all tokens of a piece -----------------------------------------------------------------------


@jit
def visit(
    query: Array, scores: Array, out: Array, packed: Array, factor: Array, scale: Array,
    zero: Array, index: Array, outliers: Array, kinds: tuple[int, int, int], block_size: int,
    bits: int, offset: np.float32, per_channel: bool, renormalize: bool, first: int, column: int,
) -> None:  # fmt: skip
    """Take the tokens of a piece, for some heads, from token ``first`` of each on.

    Write their products with ``query[heads, rows, D]`` into ``scores[heads, rows, columns]``, the
    first into column ``column``; or, if there is an ``out[heads, rows, D]``, add them to it, the
    scores being their weights. Heads lie one behind the other: ``packed[heads * T, row_bytes]``,
    and so on.
    """
    heads, rows = scores.shape[:2]
    adds = out.shape[0] > 0
    head_dim = out.shape[2] if adds else query.shape[2]
    tokens = packed.shape[0] // heads
    blocks = -(-tokens // block_size)
    levels = per_channel and zero.shape[1] > 0  # else they are all 0
    factors, scales = widened(factor, kinds[0]), widened(scale, kinds[1])
    zeros, kept = widened(zero, kinds[1]), widened(outliers, kinds[2])
    shape = (RUN, -(-head_dim // 8) * 8)  # rows of packed codes are whole bytes
    codes, panel = np.empty(shape, np.uint8), np.empty(shape, np.float32)
    slope, level = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
    square, gain = np.empty(RUN), np.empty(RUN)
    product, constant = np.empty((rows, RUN), np.float32), np.empty(rows, np.float32)
    folded = np.empty((rows, head_dim), np.float32)
    weight, total = np.empty((rows, RUN), np.float32), np.empty((rows, head_dim), np.float32)
    for h in range(heads):
        t = first
        while t < tokens:
            count = min(RUN, block_size - t % block_size, tokens - t)
            block, token, at = h * blocks + t // block_size, h * tokens + t, column + t - first
            set_panel(
                token, count, head_dim, block, packed, scales, zeros, index, kept, bits, offset,
                per_channel, codes, panel,
            )  # fmt: skip
            begins = t == first or t % block_size == 0
            if begins:
                set_channels(block, scales, zeros, index, per_channel, slope, level)
            set_gains(token, count, factors, renormalize, levels, panel, slope, level, square, gain)
            if not adds:
                if begins:
                    fold(query, h, slope, level, folded, constant)
                multiply(folded, panel, count, product)
                for r in range(rows):
                    written = scores[h, r, at : at + count]
                    scale_products(product, r, constant, gain, written)
                    if not np.isfinite(sum_of(written)):
                        for k in range(count):
                            if not np.isfinite(written[k]):
                                y = plain_score(query, h, r, panel, k, slope, level, gain[k])
                                written[k] = y
            else:
                for r in range(rows):
                    given = scores[h, r, at : at + count]
                    for k in range(count):
                        weight[r, k] = np.float32(np.float64(given[k]) * gain[k])
                add_weighted(weight, panel, count, total)
                for r in range(rows):
                    gained = sum_of(weight[r, :count])
                    if np.isfinite(gained) and np.isfinite(sum_of(total[r])):
                        for j in range(head_dim):
                            coded = np.float64(slope[j]) * np.float64(total[r, j])
                            out[h, r, j] += coded + np.float64(level[j]) * np.float64(gained)
                    else:
                        plain_add(scores, h, r, at, count, gain, panel, slope, level, out)
            t += count


def run(work: Callable[..., None], tasks: int, products: int, *arguments: Any) -> None:
    """Do tasks [0, ``tasks``), on as many threads as Numba is set to use."""
    serial = products < SERIAL_PRODUCTS
    in_shares(work, tasks, 1 if serial else numba.config.NUMBA_NUM_THREADS, *arguments)

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

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from nsq_ref.kernels.compilation import compiled
from nsq_ref.kernels.rows import fill_scale_row, unpack_row
from nsq_ref.kernels.threads import in_shares

__all__ = ["add", "run", "score"]

Array = npt.NDArray[Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])

RUN = 64  # most tokens of a panel; even
SERIAL_PRODUCTS = 1 << 22  # below this, starting a thread costs more than it saves
LEAST, MOST_SQUARE = np.float32(2.0**-90), np.float32(2.0**120)  # squared lengths float32 can tell
MOST = float(np.finfo(np.float32).max)


def jit(function: _Function) -> _Function:
    """Compile what is called from Python."""
    return compiled(function, keep=True, nogil=True, fastmath=False)


def jit_sum(function: _Function) -> _Function:
    """Compile sums that may be reordered and fused."""
    return compiled(function, fastmath={"reassoc", "contract"})


def jit_exact(function: _Function) -> _Function:
    """Compile what rounds as it is written."""
    return compiled(function, fastmath=False)


def jit_square(function: _Function) -> _Function:
    """Compile sums that may be reordered, of terms that round as they are written."""
    return compiled(function, fastmath={"reassoc"})


# --- a run of tokens -----------------------------------------------------------------------------


@jit_exact
def unpack_run(first: int, count: int, packed: Array, head_dim: int, bits: int, row: Array) -> None:
    """Codes of ``count`` tokens (P1), one behind the other."""
    for k in range(count):  # a row may reach into the next, which is yet to come
        unpack_row(packed, first + k, head_dim, bits, row[k * head_dim :])


@jit_exact
def set_panel(
    first: int, packed: Array, scale: Array, zero: Array, index: Array, outliers: Array, bits: int,
    offset: np.float32, per_channel: bool, row: Array, flat: Array, panel: Array,
) -> None:  # fmt: skip
    """Fill ``panel[n, D]`` with tokens from ``first`` on, ``index`` being their outlier channels.

    ``flat`` is the same memory: one long loop is quicker than a short one for each token.
    """
    count, head_dim = panel.shape
    if packed.shape[1]:
        unpack_run(first, count, packed, head_dim, bits, row)
        for i in range(count * head_dim):
            flat[i] = np.float32(row[i]) - offset
        if not per_channel:
            for k in range(count):
                step, base = scale[first + k, 0], zero[first + k, 0]
                for j in range(head_dim):
                    panel[k, j] = panel[k, j] * step + base
    for k in range(count):
        for i in range(index.shape[0]):
            panel[k, index[i]] = outliers[first + k, i]


@jit_exact
def set_channels(
    block: int, scale: Array, zero: Array, index: Array, per_channel: bool, slope: Array,
    level: Array,
) -> None:  # fmt: skip
    """Slopes and levels of a block."""
    slope[:] = 1
    level[:] = 0
    if per_channel:
        fill_scale_row(scale, block, slope)
        fill_scale_row(zero, block, level)
        for j in index:
            slope[j], level[j] = 1, 0


@jit_exact
def set_gains(
    first: int, factor: Array, renormalize: bool, panel: Array, slope: Array, level: Array,
    gain: Array,
) -> None:  # fmt: skip
    """The stored factor of each token; with M1 over the length of its direction."""
    for k in range(panel.shape[0]):
        gain[k] = factor[first + k]
        if renormalize:
            square = np.float64(squared_length(panel, k, slope, level))
            if not LEAST < square < MOST_SQUARE:
                square = 0.0
                for j in range(panel.shape[1]):
                    y = np.float64(panel[k, j] * slope[j] + level[j])
                    square += y * y
            gain[k] = gain[k] / np.sqrt(square) if square > 0 else 0.0


@jit_square
def squared_length(panel: Array, k: int, slope: Array, level: Array) -> np.float32:
    """Squares of a direction that is rounded as D1 says, so that what cancels there does here."""
    total = np.float32(0)
    for j in range(panel.shape[1]):
        y = panel[k, j] * slope[j] + level[j]
        total += y * y
    return total


@jit_exact
def read_run(
    t: int, first: int, packed: Array, factor: Array, scale: Array, zero: Array, index: Array,
    outliers: Array, block_size: int, bits: int, offset: np.float32, per_channel: bool,
    renormalize: bool, row: Array, flat: Array, slope: Array, level: Array, gains: Array,
) -> tuple[int, bool]:  # fmt: skip
    """Read a run of one head, from token ``t`` on, into ``flat`` and ``gains``.

    Returns how many tokens it has, and whether slopes and levels are new: it is the first, or the
    first of its block.
    """
    block = t // block_size
    count = min(RUN, (block + 1) * block_size - t, packed.shape[0] - t)
    panel = flat.reshape(RUN, slope.shape[0])[:count]
    set_panel(
        t, packed, scale, zero, index[block], outliers, bits, offset, per_channel, row, flat, panel
    )
    begins = t == first or t % block_size == 0
    if begins:
        set_channels(block, scale, zero, index[block], per_channel, slope, level)
    set_gains(t, factor, renormalize, panel, slope, level, gains[:count])
    return count, begins


# --- sums over channels, and over tokens ---------------------------------------------------------


@jit_sum
def fold(query: Array, slope: Array, level: Array, folded: Array, constant: Array) -> None:
    """Queries times slopes, and what levels add to each of their products."""
    for r in range(query.shape[0]):
        total = np.float32(0)
        for j in range(query.shape[1]):
            folded[r, j] = query[r, j] * slope[j]
            total += query[r, j] * level[j]
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
def scale_products(dot: Array, constant: np.float32, gain: Array, out: Array) -> None:
    """Scores of one row of queries with the tokens of a run."""
    for k in range(out.shape[0]):
        out[k] = np.float32(gain[k] * np.float64(dot[k] + constant))


@jit_sum
def add_weighted(weight: Array, panel: Array, total: Array) -> None:
    """Add all tokens of a panel, times their weights, to ``total[D]``."""
    together = panel.shape[0] // 4 * 4
    for k in range(0, together, 4):
        a, b, c, d = weight[k], weight[k + 1], weight[k + 2], weight[k + 3]
        for j in range(panel.shape[1]):
            total[j] += (
                a * panel[k, j] + b * panel[k + 1, j] + c * panel[k + 2, j] + d * panel[k + 3, j]
            )
    for k in range(together, panel.shape[0]):
        for j in range(panel.shape[1]):
            total[j] += weight[k] * panel[k, j]


# --- what left float32, in float64 ---------------------------------------------------------------


@jit_exact
def plain_score(
    query: Array, panel: Array, k: int, slope: Array, level: Array, gain: float
) -> float:
    """One product; what float32 cannot hold becomes the largest that it can."""
    total = 0.0
    for j in range(query.shape[0]):
        y = np.float64(slope[j]) * np.float64(panel[k, j]) + np.float64(level[j])
        total += np.float64(query[j]) * y
    return min(max(gain * total, -MOST), MOST)


@jit_exact
def plain_add(
    weights: Array, gain: Array, panel: Array, slope: Array, level: Array, out: Array
) -> None:
    """Add the tokens of a run, times weights and gains, to ``out[D]``."""
    for k in range(panel.shape[0]):
        for j in range(panel.shape[1]):
            y = np.float64(slope[j]) * np.float64(panel[k, j]) + np.float64(level[j])
            out[j] += np.float64(weights[k]) * gain[k] * y


# --- all tokens of a piece -----------------------------------------------------------------------
# Both take some heads of a piece, ``packed[heads, T, row_bytes]`` and what belongs to them. They
# work on its tokens from ``first`` on, which is in column ``column`` of scores and weights.


@jit
def score(
    query: Array, packed: Array, factor: Array, scale: Array, zero: Array, index: Array,
    outliers: Array, block_size: int, bits: int, offset: np.float32, per_channel: bool,
    renormalize: bool, first: int, column: int, scores: Array,
) -> None:  # fmt: skip
    """Write the products of ``query[heads, rows, D]`` into ``scores[heads, rows, columns]``."""
    rows, head_dim = query.shape[1:]
    row, flat = np.zeros(RUN * head_dim + 7, np.uint8), np.zeros(RUN * head_dim, np.float32)
    panels = flat.reshape(RUN, head_dim)
    slope, level = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
    gains, constant = np.empty(RUN), np.empty(rows, np.float32)
    folded, dot = np.empty((rows, head_dim), np.float32), np.empty((rows, RUN), np.float32)
    for h in range(packed.shape[0]):
        t = first
        while t < packed.shape[1]:
            count, begins = read_run(
                t, first, packed[h], factor[h], scale[h], zero[h], index[h], outliers[h],
                block_size, bits, offset, per_channel, renormalize, row, flat, slope, level, gains,
            )  # fmt: skip
            panel, gain = panels[:count], gains[:count]
            if begins:
                fold(query[h], slope, level, folded, constant)
            multiply(folded, panels, count, dot)
            at = column + t - first
            for r in range(rows):
                written = scores[h, r, at : at + count]
                scale_products(dot[r], constant[r], gain, written)
                if not np.isfinite(sum_of(written)):
                    for k in range(count):
                        if not np.isfinite(written[k]):
                            written[k] = plain_score(query[h, r], panel, k, slope, level, gain[k])
            t += count


@jit
def add(
    weights: Array, packed: Array, factor: Array, scale: Array, zero: Array, index: Array,
    outliers: Array, block_size: int, bits: int, offset: np.float32, per_channel: bool,
    renormalize: bool, first: int, column: int, out: Array,
) -> None:  # fmt: skip
    """Add values times ``weights[heads, rows, columns]`` to ``out[heads, rows, D]``."""
    rows, head_dim = out.shape[1:]
    row, flat = np.zeros(RUN * head_dim + 7, np.uint8), np.zeros(RUN * head_dim, np.float32)
    panels = flat.reshape(RUN, head_dim)
    slope, level = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
    gains, weight = np.empty(RUN), np.empty(RUN, np.float32)
    total = np.empty(head_dim, np.float32)
    for h in range(packed.shape[0]):
        t = first
        while t < packed.shape[1]:
            count, _ = read_run(
                t, first, packed[h], factor[h], scale[h], zero[h], index[h], outliers[h],
                block_size, bits, offset, per_channel, renormalize, row, flat, slope, level, gains,
            )  # fmt: skip
            panel, gain = panels[:count], gains[:count]
            for r in range(rows):
                given = weights[h, r, column + t - first : column + t - first + count]
                for k in range(count):
                    weight[k] = np.float32(np.float64(given[k]) * gain[k])
                total[:] = 0
                add_weighted(weight, panel, total)
                gained = sum_of(weight[:count])
                if np.isfinite(gained) and np.isfinite(sum_of(total)):
                    for j in range(head_dim):
                        coded = np.float64(slope[j]) * np.float64(total[j])
                        out[h, r, j] += coded + np.float64(level[j]) * np.float64(gained)
                else:
                    plain_add(given, gain, panel, slope, level, out[h, r])
            t += count


@jit_sum
def sum_of(values: Array) -> np.float32:
    """All of them, added up."""
    total = np.float32(0)
    for value in values:
        total += value
    return total


def run(work: Callable[..., None], tasks: int, products: int, *arguments: Any) -> None:
    """Do tasks [0, ``tasks``), on as many threads as Numba is set to use."""
    serial = products < SERIAL_PRODUCTS
    in_shares(work, tasks, 1 if serial else numba.config.NUMBA_NUM_THREADS, *arguments)

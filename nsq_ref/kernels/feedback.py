"""The Numba twin of rule F1: what is coded in place of directions, equal to `spec` bit for bit.

The channels of a block wait for one another, its tokens do not: they lie side by side. No float is
summed in another order than that of F1 and S4.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from nsq_ref.dtypes import Array
from nsq_ref.kernels.compilation import compiled
from nsq_ref.kernels.rows import divisor_of, jit_row, norm_of_row

# Digits of a float32 that narrowing drops.
DROPPED = {"float16": 13, "bfloat16": 16, "float32": 0}

jit = partial(compiled, keep=True, nogil=True, fastmath=False)


@jit_row
def narrowed(value: np.float32, dropped: int) -> np.float32:
    """Round a float32 to a narrower dtype, half to even, without -0 (Z1), and widen it again."""
    size = np.float32(abs(value))
    if dropped == 0:
        rounded = size
    elif dropped == 13 and size < np.float32(2.0**-14):  # whole numbers of the smallest subnormal
        rounded = np.rint(size * np.float32(2.0**24)) * np.float32(2.0**-24)
    else:
        bits = np.float32(size).view(np.int32)
        odd = (bits >> np.int32(dropped)) & np.int32(1)
        bits = (bits + np.int32((1 << (dropped - 1)) - 1) + odd) & np.int32(-1 << dropped)
        rounded = np.int32(bits).view(np.float32)
        if dropped == 13:
            rounded = rounded if rounded < np.float32(65536) else np.float32(np.inf)
    return np.float32(-rounded if value < 0 and rounded != 0 else rounded)


@jit_row
def range_pair(
    low: np.float32, high: np.float32, symmetric: bool, levels: np.float32, dropped: int
) -> tuple[np.float32, np.float32]:
    """Scale and zero that make ``[low, high]`` the code range (S1, S2, S3)."""
    zero = np.float32(-0.0) if symmetric else narrowed(low, dropped)
    span = max(high, np.float32(-low)) if symmetric else np.float32(high - zero)
    return narrowed(np.float32(span / levels), dropped), zero


@jit_row
def error_of(
    value: np.float32, scale: np.float32, zero: np.float32, least: np.float32, greatest: np.float32
) -> np.float32:
    """What its code loses of a value (Q1, Q2, D1)."""
    quotient = np.rint((value - zero) / divisor_of(scale))
    code = min(max(quotient, least), greatest)
    return np.float32(value - (np.float32(code * scale) + zero))


@jit_row
def column_scale(
    values: Array, symmetric: bool, shrinks: Array, least: np.float32, greatest: np.float32,
    dropped: int, errors: Array,
) -> tuple[np.float32, np.float32]:  # fmt: skip
    """Scale and zero of one channel's values (S1 to S4, with the fourth powers of F1).

    ``shrinks`` are the factors of S4, widest first, or 1 alone. They are no constant here, as kept
    kernels would outlive another one.
    """
    low, high = np.float32(np.inf), np.float32(-np.inf)
    for t in range(values.size):
        low, high = min(low, values[t]), max(high, values[t])
    scale, zero = range_pair(low, high, symmetric, greatest, dropped)
    if shrinks.size == 1 or not (np.isfinite(scale) and np.isfinite(zero)):
        return scale, zero
    half = np.float32(0.5)
    middle = np.float32(np.float32(half * high) + np.float32(half * low))
    radius = np.float32(np.float32(half * high) - np.float32(half * low))
    fewest = np.inf
    for candidate in range(shrinks.size):
        shrink = shrinks[candidate]
        if candidate == 0:
            pair = scale, zero
        elif symmetric:
            pair = range_pair(shrink * low, shrink * high, symmetric, greatest, dropped)
        else:
            shorter = np.float32(shrink * radius)
            pair = range_pair(
                np.float32(middle - shorter), np.float32(middle + shorter), symmetric, greatest,
                dropped,
            )  # fmt: skip
        if not (np.isfinite(pair[0]) and np.isfinite(pair[1])):
            continue
        for t in range(values.size):
            errors[t] = error_of(values[t], pair[0], pair[1], least, greatest)
        total = 0.0
        for t in range(values.size):
            square = np.float64(errors[t]) * np.float64(errors[t])
            total += square * square
        if candidate == 0 or total < fewest:
            fewest = total
            scale, zero = pair
    return scale, zero


@jit_row
def take_errors(errors: Array, shares: Array, count: int, start: Array, values: Array) -> None:
    """Take the errors of the first channels from the values of the next (F1)."""
    for p in range(count):
        share = shares[p]
        for t in range(values.size):
            values[t] -= errors[p, t] * share
    for t in range(values.size):
        values[t] = values[t] if np.isfinite(values[t]) else start[t]


@jit
def feed_back(
    first: int, last: int, x: Array, sinks: int, block_size: int, norm: Array, per_channel: bool,
    symmetric: bool, shrinks: Array, least: np.float32, greatest: np.float32, dropped: int,
    outlier_index: Array, heads: Array, order: Array, factor: Array, scale: Array, zero: Array,
    w: Array, before: Array, after: Array, length: Array,
) -> None:  # fmt: skip
    """What is coded of ``x[N, sinks + T, D]``, as ``w[N, T, D]``; a task is a block.

    With axis channel scales and zeros are written, else read. ``before`` and ``after``, as w, get
    what the weights see (M2), and ``length[N, T]`` the quotient of their norms, NaN where this
    arithmetic cannot tell; they have no tokens where none of it is asked for.
    """
    head_dim = x.shape[2]
    blocks = outlier_index.shape[1]
    room = min(block_size, x.shape[1] - sinks)
    directions, values, seen, errors = np.empty((4, head_dim, room), np.float32)
    shares = np.empty(head_dim, np.float32)
    coded = np.empty(head_dim, np.bool_)
    for task in range(first, last):
        n, block = task // blocks, task % blocks
        start = block * block_size
        count = min(block_size, x.shape[1] - sinks - start)
        head = heads[n]
        coded[:] = True
        for j in outlier_index[n, block]:
            coded[j] = False
        for t in range(count):
            divisor = divisor_of(norm[n, start + t])
            for p in range(head_dim):
                directions[p, t] = x[n, sinks + start + t, order[head, p]] / divisor
        for p in range(head_dim):
            j = order[head, p]
            for q in range(p):
                shares[q] = factor[head, q, p]
            direction, value, error = directions[p, :count], values[p, :count], errors[p, :count]
            value[:] = direction
            take_errors(errors, shares, p, direction, value)
            if not coded[j]:
                for t in range(count):
                    error[t] = value[t] - narrowed(value[t], 13)
                if per_channel:
                    scale[n, block, j] = 0
                    zero[n, block, j] = np.float32(-0.0) if symmetric else np.float32(0)
            elif per_channel:
                pair = column_scale(value, symmetric, shrinks, least, greatest, dropped, error)
                for t in range(count):
                    error[t] = error_of(value[t], pair[0], pair[1], least, greatest)
                scale[n, block, j], zero[n, block, j] = pair
            else:
                for t in range(count):
                    pair = scale[n, start + t, 0], zero[n, start + t, 0]
                    error[t] = error_of(value[t], pair[0], pair[1], least, greatest)
            for t in range(count):
                error[t] = error[t] if norm[n, start + t] != 0 else np.float32(0)
                w[n, start + t, j] = value[t]
            if length.size:
                look = seen[p, :count]
                look[:] = direction
                take_errors(seen, shares, p, direction, look)
                weight = factor[head, p, p]
                for t in range(count):
                    before[n, start + t, j] = weight * look[t]
                    after[n, start + t, j] = weight * np.float32(look[t] - error[t])
        if length.size:
            before_bits, after_bits = before[n].view(np.int32), after[n].view(np.int32)
            for t in range(start, start + count):
                kept = norm_of_row(after[n], after_bits, t)
                whole = norm_of_row(before[n], before_bits, t)
                length[n, t] = whole / divisor_of(kept) if np.isfinite(kept) else np.float32(np.nan)

"""The Numba twin of rule F1: what is coded in place of directions, equal to `spec` bit for bit.

The channels of a token wait for one another, tokens do not: they go through in groups. No token
sees another, and no float is summed in another order than that of F1.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from nsq_ref.dtypes import Array
from nsq_ref.kernels.compilation import compiled
from nsq_ref.kernels.rows import divisor_of, jit_row, span_of_task

LANES = 16  # tokens at a time, which share each row of the factor

jit = partial(compiled, keep=True, nogil=True, fastmath=False)


@jit_row
def through_float16(value: np.float32) -> np.float32:
    """Round a float32 to float16, half to even, and widen it again."""
    size = np.float32(abs(value))
    if size < np.float32(2.0**-14):  # a whole number of the smallest subnormal
        rounded = np.rint(size * np.float32(2.0**24)) * np.float32(2.0**-24)
    else:
        bits = np.float32(size).view(np.int32)
        bits = (bits + np.int32(0xFFF) + ((bits >> np.int32(13)) & np.int32(1))) & np.int32(-0x2000)
        rounded = np.int32(bits).view(np.float32)
        rounded = rounded if rounded < np.float32(65536) else np.float32(np.inf)
    return np.float32(-rounded if value < 0 else rounded)


@jit
def feed_back(
    first: int, last: int, x: Array, sinks: int, block_size: int, norm: Array, scale: Array,
    zero: Array, per_channel: bool, low: np.float32, high: np.float32, outlier_index: Array,
    heads: Array, order: Array, factor: Array, out: Array,
) -> None:  # fmt: skip
    """What is coded of ``x[N, sinks + T, D]``, as ``out[N, T, D]``; tasks as in `codec`."""
    head_dim = x.shape[2]
    directions = np.empty((LANES, head_dim), np.float32)  # columns are channels in their order
    w = np.empty((LANES, head_dim), np.float32)
    value, step, base, error = np.zeros((4, LANES), np.float32)
    moves = np.empty(LANES, np.bool_)  # what is no zero token
    coded = np.empty(head_dim, np.bool_)
    for task in range(first, last):
        n, block, start, stop = span_of_task(task, x.shape[1] - sinks, block_size)
        head = heads[n]
        coded[:] = True
        for j in outlier_index[n, block]:
            coded[j] = False
        for begin in range(start, stop, LANES):
            count = min(LANES, stop - begin)
            for i in range(count):
                t = begin + i
                divisor = divisor_of(norm[n, t])
                moves[i] = norm[n, t] != 0
                for p in range(head_dim):
                    directions[i, p] = x[n, sinks + t, order[head, p]] / divisor
                    w[i, p] = directions[i, p]
            for p in range(head_dim):
                j = order[head, p]
                at = j if per_channel else 0
                for i in range(count):
                    value[i] = w[i, p] if np.isfinite(w[i, p]) else directions[i, p]
                    w[i, p] = value[i]
                    row = block if per_channel else begin + i
                    step[i] = scale[n, row, at]
                    base[i] = zero[n, row, at]
                if coded[j]:
                    for i in range(LANES):
                        quotient = np.rint((value[i] - base[i]) / divisor_of(step[i]))
                        code = min(max(quotient, low), high)
                        error[i] = value[i] - (np.float32(code * step[i]) + base[i])
                else:
                    for i in range(count):
                        error[i] = value[i] - through_float16(value[i])
                shares = factor[head, p, p + 1 :]
                for i in range(count):
                    moved = error[i] if moves[i] else np.float32(0)
                    later = w[i, p + 1 :]
                    for r in range(shares.size):
                        later[r] -= moved * shares[r]
            for i in range(count):
                for p in range(head_dim):
                    out[n, begin + i, order[head, p]] = w[i, p]

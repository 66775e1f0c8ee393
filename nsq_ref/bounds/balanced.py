"""What gains of balanced norms (N3) tell of their divisors, as nobody stores the sizes (E9)."""

from __future__ import annotations

import numpy as np

from nsq_ref.bounds.intervals import (
    DOWN,
    OUTWARD,
    SMALLEST_NORMAL,
    TERM,
    TINY,
    UNIT,
    UP,
    Interval,
    euclidean,
    farthest,
    rounding_of_norm,
)
from nsq_ref.dtypes import Float64
from nsq_ref.spec import LEAST_SIZE

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def sized_length(factor: Float64, y: Float64, direction: Interval, norm: Float64) -> Interval:
    """Enclose the float32 length of ``y / size`` of tokens of one block.

    Parameters
    ----------
    factor : [..., T]
        Stored gains. Where one is 0 the token may be zero, and tells nothing of sizes.
    y, direction : [..., T, D]
    norm : [..., T]
        Lower bounds of the norms.
    """
    root, rounded = np.sqrt(y.shape[-1]), rounding_of_norm(norm)
    inner = np.maximum(0, np.maximum(direction.low, -direction.high))
    inner = np.where((factor > 0)[..., None], inner, 0)
    # No element is larger than the size of its channel: norms are not less than what is in them.
    size = np.max(inner * (1 - rounded)[..., None], axis=-2, keepdims=True, initial=0) * DOWN
    size = np.maximum(size, float(LEAST_SIZE))
    error = _sized_error(farthest(direction, y), inner, size, norm)
    underflow = root * TINY / np.maximum(norm, 2 * TINY)
    least = (1 - rounded - underflow) / (1 + UNIT) * DOWN - error
    most = (1 + rounded + underflow) / (1 - UNIT) * UP + error
    most = np.minimum(most, euclidean(y / size).high)
    slack = (root + 1) * TINY * UP
    twice = 2 * UNIT + UNIT**2
    low = np.maximum(least, 0) * (1 - twice) * DOWN - slack
    high = most * (1 + twice) * UP + slack
    unbounded = np.isnan(high) | (high > LARGEST_FLOAT32)
    return Interval(np.maximum(low, 0), np.where(unbounded, np.inf, high))


def _sized_error(error: Float64, inner: Float64, size: Float64, norm: Float64) -> Float64:
    """Bound the length of ``(direction - y) / size`` by what every direction over size is.

    ``a``, the squares of the sizes' inverses, lie between 1 and ``1 / size**2``, and their sum
    weighted by the mean squares of directions is at most 1 but for roundings: a linear program,
    whose dual is at least as large whatever its one variable, `price`.
    """
    channels = inner.shape[-1]
    relative = OUTWARD + TERM * (channels + inner.shape[-2])
    sure = np.broadcast_to((norm >= SMALLEST_NORMAL)[..., None], inner.shape)
    count = np.sum(sure, axis=-2, keepdims=True)
    mean = np.sum(np.square(inner), axis=-2, keepdims=True, where=sure) / np.maximum(count, 1)
    mean = mean * (1 - relative)
    longest = (1 + (np.sqrt(channels) + 1) * UNIT) / (1 - UNIT) * UP
    budget = np.square(longest) * UP - np.sum(mean, axis=-1, keepdims=True) * (1 - relative)
    budget = np.maximum(budget, 0)  # [..., 1, 1]
    extra = (1 / np.square(size)) * UP - 1
    weight = np.square(error)

    def dual(weights: Float64, price: Float64) -> Float64:
        over = np.maximum(weights - price * mean, 0)
        total = np.sum(weights + over * extra, axis=-1) + (price * budget)[..., 0]
        return np.asarray(total * (1 + 2 * relative))

    with np.errstate(all="ignore"):  # unbounded directions bound nothing
        typical = np.mean(weight, axis=-2, keepdims=True)
        prices = np.swapaxes(np.where(mean > 0, typical / np.where(mean > 0, mean, 1), 0), -1, -2)
        best = np.argmin(dual(typical, prices), axis=-1)[..., None, None]
        price = np.take_along_axis(prices, best, -2)
        found = np.sqrt(np.minimum(dual(weight, price), dual(weight, 0 * price))) * UP
    return np.where(np.isnan(found), np.inf, found)

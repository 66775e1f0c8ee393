"""Intervals in float64 that enclose real numbers ("Words and small facts" of docs/bounds.md).

Every function of this package rounds in float64 as well. A result is moved outwards by `OUTWARD` of
the terms it is made of, which covers a hundred roundings, and by `TERM` more for each term of a
sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

OUTWARD, TERM = 2.0**-46, 2.0**-52
UP, DOWN = 1 + OUTWARD, 1 - OUTWARD  # for numbers that are not negative


class Interval(NamedTuple):
    """Two float64 arrays that enclose real numbers, elementwise.

    Nothing changes one, so that threads may share it.

    Examples
    --------
    >>> interval = Interval(np.array([-0.5]), np.array([0.25]))
    >>> interval.high - interval.low
    array([0.75])
    """

    low: Float64
    high: Float64


def euclidean(vectors: Float64) -> Interval:
    """Enclose Euclidean norms over the last axis."""
    root = np.sqrt(np.sum(np.square(vectors), axis=-1))
    relative = vectors.shape[-1] * TERM + OUTWARD
    return Interval(root * (1 - relative), root * (1 + relative))


def inner_product(direction: Interval, y: Float64) -> Interval:
    """Enclose the inner product of the direction and ``y`` over the last axis."""
    ends = Interval(direction.low * y, direction.high * y)
    slack = np.sum(largest(ends), axis=-1) * (y.shape[-1] * TERM + OUTWARD)
    return Interval(
        np.sum(np.minimum(*ends), axis=-1) - slack, np.sum(np.maximum(*ends), axis=-1) + slack
    )


def largest(values: Interval) -> Float64:
    """Bound absolute values."""
    return np.maximum(np.abs(values.low), np.abs(values.high))


def farthest(direction: Interval, y: Float64) -> Float64:
    """Bound ``abs(direction - y)``."""
    return np.maximum(direction.high - y, y - direction.low) + OUTWARD * largest(direction)


def divide(above: Any, below: Any, otherwise: float) -> Float64:
    """Return the quotient; where the divisor is 0, 0 if the dividend is too, else `otherwise`."""
    zero = below == 0
    quotient = above / np.where(zero, 1, below)
    return np.asarray(np.where(zero, np.where(above == 0, 0, otherwise), quotient))

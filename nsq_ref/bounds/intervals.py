"""Intervals of real numbers, and what roundings leave open ("Words and small facts": L1, L4, L5).

Every function of this package rounds in float64 as well. A result is moved outwards by `OUTWARD` of
the terms it is made of, which covers a hundred roundings, and by `TERM` more for each term of a
sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nsq_ref.dtypes import Float64
from nsq_ref.scheme import Scheme
from nsq_ref.spec import LEAST_SIZE

OUTWARD, TERM = 2.0**-46, 2.0**-52
UP, DOWN = 1 + OUTWARD, 1 - OUTWARD  # for numbers that are not negative


class Precision(NamedTuple):
    """Significant bits of a format, and the exponent of its smallest normal number."""

    bits: int
    least_exponent: int

    @property
    def unit(self) -> float:
        """Largest relative error of rounding to a normal number."""
        return float(2.0**-self.bits)

    @property
    def tiny(self) -> float:
        """Largest error of rounding to a subnormal number: half the smallest one."""
        return float(2.0 ** (self.least_exponent - self.bits))


PRECISIONS = {
    "float16": Precision(11, -14),
    "bfloat16": Precision(8, -126),
    "float32": Precision(24, -126),
}
UNIT, TINY = PRECISIONS["float32"].unit, PRECISIONS["float32"].tiny  # u and eta
SMALLEST_NORMAL = 2.0**-126


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


NORMAL_LENGTH = Interval(np.array(1 - UNIT), np.array(1 + UNIT))  # L4, of normal norms


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


def before_rounding(value: Interval) -> Interval:
    """Enclose the real numbers that round to float32 numbers between these (L1)."""
    return Interval(value.low - _rounding(value.low), value.high + _rounding(value.high))


def undivided(start: Any, offset: Any, side: int, roundings: float, scheme: Scheme) -> Float64:
    """Move ``start + offset`` to that side by what the offset and the division of N2 rounded."""
    end = start + offset
    end = end + side * (np.abs(offset) * roundings + np.abs(end) * OUTWARD)
    return np.asarray(end + side * _rounding(end) if scheme.separate_norm else end)


def _rounding(value: Any) -> Float64:
    """Bound what rounding to this float32, or rounding this real number to one, changes (L1)."""
    return np.asarray(np.maximum(UNIT * UP * np.abs(value), TINY))


def rounding_of_norm(norm: Float64) -> Float64:
    """Bound the relative error of the root of rule N1, from a lower bound of what it made (L4).

    No token but zero has a norm below 2**-149.
    """
    small = TINY / np.maximum(norm, 2 * TINY)
    return np.asarray(np.where(norm < SMALLEST_NORMAL, small, UNIT) + TERM)


def direction_length(norm: Float64, scheme: Scheme) -> Interval:
    """Enclose the Euclidean norm of ``x / norm``, from a lower bound of the norm (L4, L5)."""
    off = rounding_of_norm(norm)
    least = float(LEAST_SIZE) if scheme.norm_rule == "balanced" else 1.0
    return Interval((1 - off) * least, 1 + off)

"""What roundings of NSQ-1 leave open: L1, L3 and L4 of docs/bounds.md ("Words and small facts")."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nsq_ref.bounds import arguments
from nsq_ref.bounds.intervals import OUTWARD, TERM, UP, Float64, Interval
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import FloatName, Scheme


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
NORMAL_LENGTH = Interval(np.array(1 - UNIT), np.array(1 + UNIT))  # L4, of normal norms


@in_default_environment
def narrowing_interval(stored: Any, dtype: FloatName) -> Interval:
    """Enclose the float32 numbers that rules S3 and M4 narrow to these stored ones (E9).

    Parameters
    ----------
    stored : array
        Finite values of `dtype`.
    dtype : {"float16", "bfloat16", "float32"}

    Returns
    -------
    Interval
        From half way to the next lower stored value to half way to the next higher one, exactly;
        for float32 the value itself.

    Raises
    ------
    TypeError, ValueError
        For another dtype, and for values that it cannot hold.

    Examples
    --------
    >>> low, high = narrowing_interval([0.0, 1.0], "float16")
    >>> low.tolist() == [-(2.0**-25), 1 - 2.0**-12], high.tolist() == [2.0**-25, 1 + 2.0**-11]
    (True, True)
    """
    values = arguments.stored("stored", stored, dtype)
    if dtype == "float32":
        return Interval(values, values)
    precision = PRECISIONS[dtype]
    significand, exponent = np.frexp(np.maximum(np.abs(values), 2.0**precision.least_exponent))
    half = np.ldexp(1.0, exponent - 1 - precision.bits)  # frexp's significand is in [0.5, 1)
    at_power = (significand == 0.5) & (exponent - 1 > precision.least_exponent)
    inner = np.where(at_power, half / 2, half)
    negative = values < 0
    return Interval(
        values - np.where(negative, half, inner), values + np.where(negative, inner, half)
    )


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


def direction_length(norm: Float64) -> Interval:
    """Enclose the Euclidean norm of ``x / norm``, from a lower bound of the norm of N1 (L4).

    Only the rounding of that norm keeps it from 1. No token but zero has a norm below 2**-149.
    """
    small = TINY / np.maximum(norm, 2 * TINY)
    off = np.where(norm < SMALLEST_NORMAL, small, UNIT) + TERM
    return Interval(1 - off, 1 + off)

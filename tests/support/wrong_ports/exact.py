"""Exact numbers: integers and fractions, rounded once."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np

F16, F32, F64 = np.float16, np.float32, np.float64
MOST = float(np.finfo(F32).max)
Array = Any
Parts = dict[str, Any]


def nearest(value: Fraction) -> np.float32:
    """Return the float32 nearest to a number, of two equally near the even one."""
    wide = float(value)
    if Fraction(wide) != value:  # to odd, so that the second rounding is right
        other = math.nextafter(wide, math.inf if Fraction(wide) < value else -math.inf)
        if np.float64(wide).view(np.int64) % 2 == 0:
            wide = other
    return F32(wide)


def integers(row: Array) -> list[int]:
    """Return the elements as multiples of 2^-149."""
    return [int(math.ldexp(v, 149)) for v in row.tolist()]


def exact_length(row: Array) -> np.float32:
    """Return the Euclidean length, correctly rounded; ports of one test are asked the same rows."""
    return _exact_length(row.tobytes(), row.dtype)


@functools.lru_cache(maxsize=1 << 15)
def _exact_length(row_bytes: bytes, dtype: np.dtype[Any]) -> np.float32:
    row = np.frombuffer(row_bytes, dtype)
    total = sum(v * v for v in integers(row)) << 128
    root = math.isqrt(total)
    return nearest(Fraction(2 * root + (root * root != total), 1 << (1 + 64 + 149)))


def nothing(divisor: Array) -> Array:
    """What divides by zero gives zero."""
    divisor = np.asarray(divisor)
    return np.where(divisor == 0, np.asarray(np.inf, divisor.dtype), divisor)


def ratio(x: Array, y: Array) -> np.float32:
    """Return ``<x, y> / <y, y>``, correctly rounded."""
    a, b = integers(x), integers(y)
    below = sum(v * v for v in b)
    return (
        nearest(Fraction(sum(v * w for v, w in zip(a, b, strict=True)), below)) if below else F32(0)
    )

"""All rounding that NSQ-1 names beyond single IEEE operations; nothing else rounds.

float32 arithmetic in NumPy rounds each operation once, half to even, which is what the
specification asks of division, multiplication, addition and subtraction. This module holds
the roundings that are not one such operation.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from nsq_ref.arrays import as_float_array
from nsq_ref.dtypes import Array, Float32
from nsq_ref.environment import in_default_environment

__all__ = ["least_squares_gain", "narrow", "norm", "saturate"]

_UNIT = 2.0**-53  # relative error of one float64 operation
_BEYOND_FLOAT32 = 2.0**128  # the value after the largest float32, were there one more


@in_default_environment
def narrow(value: Any, dtype: npt.DTypeLike) -> Array:
    """Round once, half to even, to `dtype`; no negative zero is stored (rules S3, M4, Z1).

    Parameters
    ----------
    value : float32 array
    dtype : numpy dtype
        float16, bfloat16 or float32.

    Returns
    -------
    array of `dtype`
        Infinity where the value is beyond the range of `dtype`.

    Examples
    --------
    >>> import numpy as np
    >>> narrow(np.float32([1 / 7, -1e-9]), np.dtype(np.float16))
    array([0.1428, 0.    ], dtype=float16)
    """
    given, dtype = as_float_array("value", value), np.dtype(dtype)
    with np.errstate(over="ignore", under="ignore"):
        narrowed = np.array(given, dtype, ndmin=1)
    bits = narrowed.view(f"u{dtype.itemsize}")
    bits[bits == 1 << (8 * dtype.itemsize - 1)] = 0  # all bits but the sign: -0
    return narrowed.reshape(given.shape)


@in_default_environment
def saturate(value: Any, dtype: npt.DTypeLike) -> Array:
    """Round once, half to even, to `dtype`; what is beyond it becomes its largest (rule C1).

    Parameters
    ----------
    value : float32 array
        Finite.
    dtype : numpy dtype
        float16, bfloat16 or float32.

    Returns
    -------
    array of `dtype`

    Examples
    --------
    >>> import numpy as np
    >>> saturate(np.float32([1 / 3, -70000]), np.dtype(np.float16))
    array([ 3.333e-01, -6.550e+04], dtype=float16)
    """
    value, dtype = as_float_array("value", value), np.dtype(dtype)
    before_infinity = np.array([np.inf], dtype).view(f"u{dtype.itemsize}") - 1
    most = before_infinity.astype(f"u{dtype.itemsize}").view(dtype).astype(np.float32)
    return np.asarray(np.clip(value, -most, most)).astype(dtype)


@in_default_environment
def norm(x: Any) -> Float32:
    """Return the correctly rounded Euclidean norm over the last axis (rule N1).

    Parameters
    ----------
    x : float32 array, shape [..., T, D]
        Finite.

    Returns
    -------
    float32 array, shape [..., T]
        The float32 nearest to the exact root of the exact sum of squares, ties to even;
        infinity where that is beyond float32.

    Notes
    -----
    The square of a float32 is exact in float64. A float64 sum of D of them, in whatever
    order, is off by at most (D - 1) units of 2**-53; where both ends of that interval round
    to one float32, that is the answer. The rare others are decided in exact integers.

    Examples
    --------
    >>> import numpy as np
    >>> norm(np.float32([[3, 4], [1e-30, 0]]))
    array([5.e+00, 1.e-30], dtype=float32)
    """
    x = _float32(as_float_array("x", x))
    root = np.sqrt(np.sum(np.square(x, dtype=np.float64), axis=-1))
    relative = (x.shape[-1] + 8) * _UNIT
    lower, upper = _float32(root * (1 - relative)), _float32(root * (1 + relative))
    for index in zip(*np.nonzero(lower < upper), strict=True):
        exact = Fraction(sum(step * step for step in _in_least_steps(x[index])), 2**298)
        lower[index] = _nearer(lower[index], upper[index], exact, power=2)
    return lower


@in_default_environment
def least_squares_gain(x: Any, y: Any) -> Float32:
    """Return the correctly rounded quotient <x, y> / <y, y> over the last axis (rule M3).

    Parameters
    ----------
    x, y : float32 arrays, shape [..., T, D]
        The vectors and their dequantized directions, finite.

    Returns
    -------
    float32 array, shape [..., T]
        The factor that makes ``factor * y`` closest to ``x``; 0 where ``y`` is zero.

    Examples
    --------
    >>> import numpy as np
    >>> least_squares_gain(np.float32([[2, 2]]), np.float32([[1, 0.5]]))
    array([2.4], dtype=float32)
    """
    x, y = _float32(as_float_array("x", x)), _float32(as_float_array("y", y))
    products = np.multiply(x, y, dtype=np.float64)
    above = np.sum(products, axis=-1)
    below = np.sum(np.square(y, dtype=np.float64), axis=-1)
    divisor = np.where(below == 0, np.inf, below)
    quotient = above / divisor
    relative = (x.shape[-1] + 8) * _UNIT
    slack = relative * (np.sum(np.abs(products), axis=-1) / divisor + np.abs(quotient))
    lower, upper = _float32(quotient - slack), _float32(quotient + slack)
    for index in zip(*np.nonzero(lower < upper), strict=True):
        a, b = _in_least_steps(x[index]), _in_least_steps(y[index])
        exact = Fraction(sum(u * v for u, v in zip(a, b, strict=True)), sum(v * v for v in b))
        # Cancellation may leave a wide interval: the float64 nearest to the quotient narrows it.
        nearest = float(exact) * np.array([1 - 4 * _UNIT, 1 + 4 * _UNIT])
        least, greatest = np.sort(_float32(nearest))
        lower[index] = _nearer(least, greatest, exact, power=1)
    return lower


def _in_least_steps(values: Float32) -> list[int]:
    """Return each value as a number of the least subnormals of float32, 2^-149."""
    return [int(value) for value in (values.astype(np.float64) * 2.0**149).tolist()]


def _float32(value: Array) -> Float32:
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(value, np.float32)


def _nearer(lower: np.float32, upper: np.float32, exact: Fraction, power: int) -> np.float32:
    """Choose, of two neighbours, the one nearer to the root of order `power` of `exact`."""
    if lower == upper:
        return lower
    ends = [min(max(float(end), -_BEYOND_FLOAT32), _BEYOND_FLOAT32) for end in (lower, upper)]
    middle = (ends[0] + ends[1]) / 2  # 25 significant bits: exact in float64
    beyond = exact - Fraction(middle) ** power
    if beyond == 0:
        half_even: np.float32 = _float32(np.array([middle]))[0]
        return half_even
    return upper if beyond > 0 else lower

"""What was narrowed (L3), and the norm, from the factor that is stored for it (E9)."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref import rounding
from nsq_ref.bounds import arguments
from nsq_ref.bounds.balanced import sized_length
from nsq_ref.bounds.intervals import (
    DOWN,
    OUTWARD,
    PRECISIONS,
    UP,
    Interval,
    before_rounding,
    direction_length,
    divide,
    euclidean,
    farthest,
    inner_product,
)
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import FloatName, Scheme, as_scheme


@in_default_environment
def narrowing_interval(stored: Any, dtype: FloatName) -> Interval:
    """Enclose the float32 numbers that rules S3 and M4 narrow to these stored ones (L3, E9).

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


@in_default_environment
def factor_error(factor: Any, dtype: FloatName) -> Interval:
    """Enclose the relative error of a stored factor, ``stored / exact - 1`` (E9).

    Parameters
    ----------
    factor : array
        Stored norms, or least-squares factors.
    dtype : {"float16", "bfloat16", "float32"}

    Returns
    -------
    Interval
        Against the real number that was rounded to float32 and then narrowed: within
        2**-11 + 2**-23 for normal float16; -1 where 0 is stored.

    Raises
    ------
    TypeError, ValueError
        As `narrowing_interval`.

    Examples
    --------
    >>> low, high = factor_error([1.5, 0.0], "float16")
    >>> (low * 2**11).round(2).tolist(), (high * 2**11).round(2).tolist()
    ([-0.67, -2048.0], [0.67, -2048.0])
    """
    values = np.abs(arguments.finite("factor", factor))
    exact = before_rounding(narrowing_interval(values, dtype))
    some = values > 0  # and then the ends are positive too
    low, high = (values / np.where(some, end, 1) for end in (exact.high, exact.low))
    return Interval(
        np.where(some, np.maximum(low * DOWN - 1, -1), -1), np.where(some, high * UP - 1, -1)
    )


@in_default_environment
def norm_interval(factor: Any, y: Any, direction: Interval, *, scheme: Scheme | str) -> Interval:
    """Enclose the norm of rule N1 or N3, from the factor that is stored in its place (E9).

    Parameters
    ----------
    factor : array, [..., T], or None
        Stored norms (rule M1) or gains (M2, M3); None without norm separation.
    y : array, [..., T, D]
        Dequantized directions. Of balanced norms (N3) T are tokens of one block, or some of them:
        what each tells of the channels' sizes holds for all.
    direction : Interval of [..., T, D]
        Of `direction_interval`; only ``lsq`` and balanced norms look at it.
    scheme : Scheme or str

    Returns
    -------
    Interval of [..., T]
        1 without norm separation. Unbounded where a gain is no evidence, as where ``y`` is zero.

    Raises
    ------
    TypeError, ValueError
        As `narrowing_interval`, and for shapes that do not fit.

    Examples
    --------
    >>> y = np.array([[0.6, 0.75]])
    >>> low, high = norm_interval([2.0], y, Interval(y, y), scheme=Scheme(magnitude="gain"))
    >>> low.round(3), high.round(3)  # twice the length of y
    (array([1.92]), array([1.922]))
    """
    dequantized, scheme = arguments.finite("y", y), as_scheme("scheme", scheme)
    if not scheme.separate_norm:
        ones = np.ones(dequantized.shape[:-1])
        return Interval(ones, ones)
    values = arguments.finite("factor", factor)
    arguments.one_a_vector("factor", values, "y", dequantized)
    if scheme.norm_rule == "balanced" and dequantized.ndim < 2:
        shape = list(dequantized.shape)
        raise ValueError(f"y has shape {shape}; give [..., tokens, D] of one block")
    narrowed = narrowing_interval(values, scheme.norm_dtype)
    if scheme.magnitude == "norm":
        return Interval(np.maximum(narrowed.low, 0), narrowed.high)
    ratio = before_rounding(narrowed)
    if scheme.magnitude == "gain":
        # The divisor of rule M2 is itself a float32.
        plain = rounding.norm(dequantized.astype(np.float32)).astype(np.float64)
        divisor, ratio_low = Interval(plain, plain), np.maximum(ratio.low, 0)
        if scheme.norm_rule == "balanced":
            inside = arguments.interval("direction", direction)
            sized = sized_length(values, dequantized, inside, ratio_low * plain * DOWN)
            divisor = Interval(np.maximum(plain, sized.low), sized.high)
        low, high = ratio_low * divisor.low * DOWN, ratio.high * divisor.high * UP
        return Interval(low, np.where(plain == 0, np.inf, high))
    direction = arguments.interval("direction", direction)
    size, projection = euclidean(dequantized), inner_product(direction, dequantized)
    error = euclidean(farthest(direction, dequantized)).high
    low = np.zeros(values.shape)
    for _ in range(2):  # how long the direction may be depends on how small the norm may be
        length = direction_length(low, scheme)
        most = np.minimum(projection.high, length.high * size.high * UP)
        low = divide(np.maximum(ratio.low, 0) * np.square(size.low), most, 0) * DOWN
    squares = np.square(length.low), np.square(size.low), np.square(error)
    least = (squares[0] + squares[1] - squares[2]) / 2 - OUTWARD * sum(squares)
    least = np.maximum(projection.low, least)
    known = (least > 0) & (ratio.high >= 0)
    high = np.maximum(ratio.high, 0) * np.square(size.high) * UP
    return Interval(low, np.where(known, high / np.where(known, least, 1), np.inf))

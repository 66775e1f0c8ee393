"""The direction, from codes and scales: its elements (E1) and its Euclidean norm (E2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref import spec
from nsq_ref.bounds import arguments
from nsq_ref.bounds.intervals import (
    OUTWARD,
    SMALLEST_NORMAL,
    TINY,
    UNIT,
    UP,
    Interval,
    euclidean,
    largest,
    undivided,
)
from nsq_ref.bounds.norm import narrowing_interval
from nsq_ref.dtypes import Float64
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import Scheme, as_scheme

LEAST_SHRINK = float(spec.SHRINK[-1])


@in_default_environment
def direction_interval(
    codes: Any, scale: Any, zero: Any = None, *, scheme: Scheme | str, direction: Any = None
) -> Interval:
    """Enclose the directions that an encoder gives these codes (E1).

    Parameters
    ----------
    codes : integer array, [..., T, D]
    scale, zero : array
        Stored scales and zeros that broadcast with the codes: [..., 1, D] or [..., T, 1] for one
        block. No zero if symmetric.
    scheme : Scheme or str
    direction : array, [..., T, D], optional
        ``x / norm``, or ``x`` without norm separation, as an encoder knows it. Only elements
        whose code may have been clamped are looked at, and the scales may be any. Without it,
        they must be those of a conforming encoder.

    Returns
    -------
    Interval of [..., T, D]

    Raises
    ------
    TypeError, ValueError
        For codes outside the range, values that are not finite or not of the scheme's dtype,
        shapes that do not fit, and a zero that is missing or not wanted.

    Examples
    --------
    >>> low, high = direction_interval([[3, 7]], [[0.125, 0.125]], scheme=Scheme())
    >>> low.round(4).tolist(), high.round(4).tolist()
    ([[0.3125, 0.8125]], [[0.4375, 0.8754]])
    """
    scheme = as_scheme("scheme", scheme)
    numbers = arguments.codes(codes, scheme)
    scales, zeros = arguments.scale_and_zero(scale, zero, scheme)
    shape = arguments.common_shape(codes=numbers, scale=scales, zero=zeros)
    # The subtraction of a zero rounds, and the division by a scale that was not narrowed.
    count = (not scheme.symmetric) + (scheme.scale_dtype == "float32")
    roundings = count * UNIT * (1 + 2 * UNIT)
    step, rising = np.abs(scales), np.where(scales < 0, -1.0, 1.0)
    steps = rising * numbers
    low, high = (
        undivided(zeros, step * (steps + side / 2), side, roundings, scheme) for side in (-1, 1)
    )
    ends = [rising * end for end in scheme.code_range]
    open_below = (steps == np.minimum(*ends)) | (step == 0)
    open_above = (steps == np.maximum(*ends)) | (step == 0)
    if direction is None:
        reach = _reach(scales, zeros, scheme)
        low = np.where(open_below, reach.low, np.maximum(low, reach.low))
        high = np.where(open_above, reach.high, np.minimum(high, reach.high))
    else:
        known = arguments.finite("direction", direction)
        arguments.common_shape(codes=numbers, direction=known)
        margin = np.abs(known) * OUTWARD
        low = np.where(open_below, np.minimum(low, known - margin), low)
        high = np.where(open_above, np.maximum(high, known + margin), high)
    # The codes of a zero token say nothing of its direction, and the ends may have crossed.
    return Interval(
        np.broadcast_to(np.minimum(low, high), shape), np.broadcast_to(np.maximum(low, high), shape)
    )


@in_default_environment
def element_error(
    scale: Any, zero: Any = None, *, scheme: Scheme | str, direction: Any = None
) -> Float64:
    """Bound ``abs(direction - y)`` whatever the code turns out to be (E1).

    Half a scale and a slack for float32. Where a code may be clamped, how far the range ends
    short of the largest direction that this scale can come from, or of `direction` where given,
    which makes the bound hold for any scale, such as one frozen before the token was known.

    Parameters
    ----------
    scale, zero : array
        Stored scales and zeros. No zero if symmetric.
    scheme : Scheme or str
    direction : array, optional
        What broadcasts with `scale`: the directions ``x / norm`` that an encoder knows.

    Returns
    -------
    float64 array

    Raises
    ------
    TypeError, ValueError
        As `direction_interval`.

    Examples
    --------
    >>> element_error([0.125], scheme=Scheme()).round(4)
    array([0.0625])
    >>> element_error([0.125], scheme=Scheme(), direction=[1.0]).round(4)  # 1 - 7 * 0.125
    array([0.125])
    """
    scheme = as_scheme("scheme", scheme)
    scales, zeros = arguments.scale_and_zero(scale, zero, scheme)
    greatest = scheme.code_range[1]
    step = np.abs(scales)
    single = np.float32(scales), np.float32(zeros)
    decoded = (spec.dequantize(np.full(step.shape, code), *single) for code in scheme.code_range)
    ends = Interval(*(y.astype(np.float64) for y in decoded))  # in the float32 of rule D1
    far = largest(ends)
    # The operations of rules N2, Q1 and D1 that round: with a narrowed scale, neither the division
    # by it nor the product with a code does.
    slack = np.zeros(step.shape)
    if scheme.scale_dtype == "float32":
        slack = slack + (2 * greatest - 0.5) * step
    if not scheme.symmetric:
        slack = slack + (greatest - 0.5) * step + far
    if scheme.separate_norm:
        slack = slack + far
    rounded = step / 2 + slack * UNIT * (1 + 2.0**-20) + TINY * scheme.separate_norm
    if direction is None:
        reach = _reach(scales, zeros, scheme)
    else:
        known = arguments.finite("direction", direction)
        arguments.common_shape(scale=scales, direction=known)
        reach = Interval(known, known)
    beyond = np.maximum(np.minimum(*ends) - reach.low, reach.high - np.maximum(*ends))
    beyond += OUTWARD * (far + largest(reach))
    return np.asarray(np.maximum(rounded * UP, beyond))


@in_default_environment
def direction_error(element: Any) -> Float64:
    """Bound the Euclidean norm of ``direction - y`` over the last axis (E2).

    Parameters
    ----------
    element : array, [..., D]
        Bounds of its elements (E1).

    Returns
    -------
    float64 array, [...]

    Raises
    ------
    TypeError, ValueError
        For bounds that are not real numbers, negative or NaN.

    Examples
    --------
    >>> direction_error([[0.3, 0.4]]).round(4)
    array([0.5])
    """
    return euclidean(arguments.bounds("element", element)).high


def _reach(scale: Float64, zero: Float64, scheme: Scheme) -> Interval:
    """Enclose all directions of the block or token that a conforming encoder scaled like this."""
    quotient = narrowing_interval(scale, scheme.scale_dtype).high
    searched = scheme.scale_rule == "search"
    # What was divided by the greatest code. The division rounds only to a float32 scale, or to a
    # subnormal; the subtraction before it rounds, and the product of a search.
    if scheme.scale_dtype == "float32":
        quotient = quotient + UNIT * np.abs(quotient)
    quotient = quotient + TINY * (np.abs(quotient) < SMALLEST_NORMAL)
    span = scheme.code_range[1] * quotient
    if scheme.symmetric:
        high = span * (1 + UNIT) / LEAST_SHRINK if searched else span
        low = -high
    else:
        low = narrowing_interval(zero, scheme.scale_dtype).low
        high = zero + span + UNIT * np.abs(span)
        if searched:
            middle, radius = (low + high) / 2, (high - low) / (2 * LEAST_SHRINK)
            slack = 9 * UNIT * (np.abs(middle) + np.abs(radius)) + 2.0**-146
            low, high = middle - radius - slack, middle + radius + slack
    margin = OUTWARD * (np.abs(low) + np.abs(high) + np.abs(zero))
    low = undivided(low - margin, 0.0, -1, 0.0, scheme)
    high = undivided(high + margin, 0.0, 1, 0.0, scheme)
    if scheme.separate_norm:
        low, high = np.maximum(low, -1), np.minimum(high, 1)
    return Interval(low, high)

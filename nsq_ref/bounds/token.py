"""The token: its angle (E3), its relative error (E4) and its elements (E5)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from nsq_ref.arrays import require
from nsq_ref.bounds import arguments
from nsq_ref.bounds.intervals import (
    DOWN,
    NORMAL_LENGTH,
    OUTWARD,
    UP,
    Interval,
    divide,
    euclidean,
    inner_product,
)
from nsq_ref.dtypes import Float64
from nsq_ref.environment import in_default_environment

Magnitude = Literal["norm", "gain", "lsq"]


@in_default_environment
def chord(error: Any, y: Any = None, *, length: Interval = NORMAL_LENGTH) -> Float64:
    """Bound ``norm(x / norm(x) - y / norm(y))``, which is ``2 * sin(angle / 2)`` (E3, E4).

    Parameters
    ----------
    error : array, [...]
        Bounds of the Euclidean norm of ``direction - y`` (E2).
    y : array, [..., D], optional
        The dequantized directions, which a decoder knows. Without them, the worst ones are taken.
    length : Interval of [...], optional
        Encloses the Euclidean norm of the direction; 1 up to one rounding of float32 by default,
        which holds with norm separation for plain norms (N1) of at least 2**-126. A direction of
        balanced norms (N3) may be as short as 2**-12.

    Returns
    -------
    float64 array, [...]
        From 0 to 2, which says nothing.

    Raises
    ------
    TypeError, ValueError
        For values that are not real numbers, or negative, and shapes that do not fit.

    Examples
    --------
    >>> chord([0.1, 0.6, 1.0]).round(4)
    array([0.1001, 0.6325, 2.    ])
    """
    errors = arguments.bounds("error", error)
    low, high = arguments.interval("length", length)
    if y is None:
        return np.sqrt(np.minimum(_free_chord(errors, low), 4))
    vectors = arguments.finite("y", y)
    size = euclidean(vectors)
    arguments.one_a_vector("error", errors, "y", vectors)
    # Of all lengths of the direction the farthest is sqrt(norm(y)^2 - error^2) or, where that
    # cannot be its length, the end next to it.
    short = np.square(size.high) * UP - np.square(errors) * DOWN
    long = np.square(size.low) * DOWN - np.square(errors) * UP
    square = np.select(
        [np.square(low) > short, np.square(high) < long],
        [_chord_at(low, errors, size), _chord_at(high, errors, size)],
        _free_chord(errors, size.low),
    )
    return np.asarray(np.sqrt(np.minimum(square, 4)))


def _free_chord(error: Float64, length: Float64) -> Float64:
    """Bound the squared chord between any vector and one of this length, this far apart."""
    square = np.square(divide(error, length, np.inf)) * UP
    within = np.where(square < 1, square, 0)
    free = 2 * within / (1 + np.sqrt(1 - within)) * UP
    return np.asarray(np.where(square < 1, free, np.inf))


def _chord_at(length: Float64, error: Float64, size: Interval) -> Float64:
    """Bound the squared chord between two vectors of these lengths, this far apart."""
    gap = np.maximum(np.maximum(length - size.high, size.low - length), 0) * DOWN
    above = np.maximum(np.square(error) * UP - np.square(gap), 0)
    return divide(above * UP, length * size.low, np.inf)


def chord_of_product(direction: Interval, y: Float64, length: Interval) -> Float64:
    """Bound the distance of the unit vectors by the least inner product of the interval (E3)."""
    size, least = euclidean(y), inner_product(direction, y).low
    by = np.where(least > 0, length.high * size.high, length.low * size.low)
    cosine = np.maximum(divide(least, by, -np.inf), -1)
    return np.asarray(np.sqrt(np.maximum(2 - 2 * cosine, 0) + OUTWARD))


@in_default_environment
def relative_error(
    chord: Any, factor_error: Interval | None = None, *, magnitude: Magnitude = "norm"
) -> Float64:
    """Bound ``norm(x - x_hat) / norm(x)`` from the angle (E4) and the stored factor (E9).

    Parameters
    ----------
    chord : array
        Bounds of the distance of the unit vectors, of `chord`.
    factor_error : Interval, optional
        Encloses the relative error of the factor, of `factor_error`; none by default. With ``norm``
        and ``gain`` it is ``norm(x_hat) / norm(x) - 1``, which gains of balanced norms (N3) do not
        keep near 0: there it must be given.
    magnitude : {"norm", "gain", "lsq"}
        As in `Scheme`: ``norm`` and ``gain`` restore the norm of ``x``, up to `factor_error`;
        ``lsq`` makes the error least, up to `factor_error`.

    Returns
    -------
    float64 array
        For decoding in real arithmetic. `certificate` accounts for the float32 of rule D1 as well.

    Raises
    ------
    TypeError, ValueError
        For chords outside 0 to 2, errors below -1, and another magnitude.

    Examples
    --------
    >>> relative_error([0.2], magnitude="norm").round(4)
    array([0.2])
    >>> relative_error([0.2], magnitude="lsq").round(4)
    array([0.199])
    """
    chords = arguments.bounds("chord", chord)
    require("chord", chords, chords <= 2, ", which is more than 2")
    if magnitude not in ("norm", "gain", "lsq"):
        raise ValueError(f"magnitude={magnitude!r} is not one of norm, gain, lsq")
    known = (0.0, 0.0) if factor_error is None else factor_error
    errors = arguments.interval("factor_error", known)
    require("factor_error", errors.low, errors.low >= -1, ", which is below -1")
    square = np.square(chords)
    if magnitude == "lsq":
        # Past a right angle the least-squares factor is negative, and turns x_hat back.
        cosine = np.maximum(1 - square / 2, 0)
        sine_square = np.where(square < 2, square * (1 - square / 4), 1)
        squares = [np.maximum(sine_square + np.square(cosine * e), np.square(e)) for e in errors]
    else:
        squares = [np.square(e) + (1 + e) * square for e in errors]
    return np.asarray(np.sqrt(np.maximum(*squares)) * UP)


def worst_ratio(direction: Interval, y: Float64) -> Float64:
    """Bound ``norm(direction - y) / norm(direction)`` by the worst of its elements (E4)."""
    around = (direction.low <= 0) & (direction.high >= 0)
    ratios = [
        np.abs(end - y) / np.where(around, 1, np.abs(end)) * UP + OUTWARD for end in direction
    ]
    worst = np.where(around, np.where(y == 0, 1, np.inf), np.maximum(*ratios))
    return np.asarray(np.max(worst, axis=-1))


@in_default_environment
def reconstruction_error(direction: Interval, norm: Interval, x_hat: Any) -> Float64:
    """Bound ``abs(x - x_hat)`` elementwise (E5).

    Parameters
    ----------
    direction : Interval of [..., T, D]
        Encloses ``x / norm``, of `direction_interval`.
    norm : Interval of [..., T]
        Encloses the norm, of `norm_interval`.
    x_hat : array, [..., T, D]
        Decoded tokens.

    Returns
    -------
    float64 array, [..., T, D]

    Raises
    ------
    TypeError, ValueError
        For an `x_hat` that is not finite, and shapes that do not fit.

    Examples
    --------
    >>> direction = Interval(np.array([[0.5]]), np.array([[0.75]]))
    >>> norm = Interval(np.array([4.0]), np.array([4.0]))
    >>> reconstruction_error(direction, norm, [[2.5]]).round(6)
    array([[0.5]])
    """
    (low, high), (short, long), decoded = arguments.decoded(direction, norm, x_hat)
    # Of the two norms the one that leads further out; an infinite one never meets a zero.
    below = np.where(low < 0, np.where(low < 0, long, 1) * low, short * low)
    above = np.where(high > 0, np.where(high > 0, long, 1) * high, short * high)
    ends = (decoded - below + OUTWARD * np.abs(below), above - decoded + OUTWARD * np.abs(above))
    return np.maximum(np.maximum(*ends) * UP, 0)

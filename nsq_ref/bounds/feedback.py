"""Directions that were coded with feedback (E10): their errors, and the length that queries see."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.bounds import arguments
from nsq_ref.bounds.intervals import (
    DOWN,
    OUTWARD,
    TERM,
    TINY,
    UNIT,
    UP,
    Interval,
    divide,
    euclidean,
)
from nsq_ref.dtypes import Float64
from nsq_ref.environment import in_default_environment
from nsq_ref.feedback import HeadFeedback

MOST_CHANNELS = 4096  # so that (1 + u)^(2 D) is below 1 + 2^-10


@in_default_environment
def feedback_element_error(direction: Any, step_error: Any, feedback: HeadFeedback) -> Float64:
    """Bound ``abs(direction - y)`` of keys that were coded with feedback (E10).

    Parameters
    ----------
    direction : array, [..., T, D]
        ``x / norm``, or ``x`` without norm separation. What is at least as large in absolute value
        will do, such as 1 with norm separation.
    step_error : array that broadcasts with it
        Bounds of ``abs(w - y)``, w being what rule F1 codes: `element_error` of a scheme without
        norm separation, with w as its ``direction`` or, where each channel has a scale of its own,
        from stored scales alone.
    feedback : HeadFeedback
        Of the head, `Feedback.head`, with which they were coded.

    Returns
    -------
    float64 array, [..., T, D]

    Raises
    ------
    TypeError, ValueError
        For values that are not real numbers, shapes that do not fit, what is no HeadFeedback, and
        more than 4096 channels.

    Examples
    --------
    >>> from nsq_ref.feedback import Feedback
    >>> feedback = Feedback([[0, 1]], np.float32([[[1, -2], [0, 1]]])).head(0)
    >>> feedback_element_error([[0.5, 0.5]], [[0.1, 0.1]], feedback).round(4)
    array([[0.1, 0.3]])
    """
    directions, steps, factor = _taken(direction, step_error, feedback)
    moved = steps @ np.abs(factor)
    return _in_channels((moved + _rounded(directions, moved)) * UP, feedback)


@in_default_environment
def feedback_logit_error(
    query: Any, direction: Any, step_error: Any, feedback: HeadFeedback
) -> Float64:
    """Bound ``abs(query . (direction - y))`` of keys that were coded with feedback (E10).

    Parameters
    ----------
    query : array, [..., Q, D]
        Queries, whose leading axes broadcast with those of the tokens.
    direction, step_error, feedback
        As in `feedback_element_error`.

    Returns
    -------
    float64 array, [..., Q, T]

    Raises
    ------
    TypeError, ValueError
        As `feedback_element_error`.

    Examples
    --------
    >>> from nsq_ref.feedback import Feedback
    >>> feedback = Feedback([[0, 1]], np.float32([[[1, -2], [0, 1]]])).head(0)
    >>> feedback_logit_error([[2.0, 1.0]], [[0.5, 0.5]], [[0.1, 0.1]], feedback).round(4)
    array([[0.1]])
    """
    directions, steps, factor = _taken(direction, step_error, feedback)
    queries = arguments.queries(query, steps.shape[-1])[..., feedback.order]
    seen = np.abs(queries @ factor.T) + _slack(np.abs(queries) @ np.abs(factor.T))
    rounded = _rounded(directions, steps @ np.abs(factor))
    steps, rounded = np.broadcast_arrays(steps, rounded)
    total = seen @ np.swapaxes(steps, -1, -2) + np.abs(queries) @ np.swapaxes(rounded, -1, -2)
    return np.asarray(total + _slack(total, steps.shape[-1]))


@in_default_environment
def feedback_metric_error(
    moment: Any, direction: Any, step_error: Any, feedback: HeadFeedback
) -> Float64:
    """Bound ``e^T H e``, e being ``direction - y``, of keys that were coded with feedback (E10).

    Parameters
    ----------
    moment : array, [D, D]
        H, positive semidefinite: that of the queries that feedback was made of, with its damping or
        without, or any other.
    direction, step_error, feedback
        As in `feedback_element_error`.

    Returns
    -------
    float64 array, [..., T]

    Raises
    ------
    TypeError, ValueError
        As `feedback_element_error`.

    Examples
    --------
    >>> from nsq_ref.feedback import Feedback
    >>> moment = np.float64([[4, 2], [2, 2]])
    >>> feedback = Feedback.from_moment(moment[None], damping=0).head(0)
    >>> feedback_metric_error(moment, [[0.5, 0.5]], [[0.1, 0.1]], feedback).round(4)
    array([0.04])
    """
    directions, steps, factor = _taken(direction, step_error, feedback)
    given = arguments.finite("moment", moment)
    if given.shape != factor.shape:
        raise ValueError(f"moment has shape {list(given.shape)}; give {list(factor.shape)}")
    metric = given[np.ix_(feedback.order, feedback.order)]
    size = np.abs(factor) @ np.abs(metric) @ np.abs(factor.T)
    left = np.abs(factor @ metric @ factor.T) + 2 * _slack(size)
    rounded = _rounded(directions, steps @ np.abs(factor))
    steps, rounded = np.broadcast_arrays(steps, rounded)
    parts = [
        np.einsum("...i,ij,...j->...", vectors, weights, vectors)
        for vectors, weights in ((steps, left), (rounded, np.abs(metric)))
    ]
    root = sum(np.sqrt(part + _slack(part, 2 * len(metric))) for part in parts)
    return np.asarray(np.square(root) * UP)


@in_default_environment
def feedback_gain_error(
    direction: Any, step_error: Any, feedback: HeadFeedback, y: Any = None
) -> Interval:
    """Enclose how much longer queries see a key than they did, in the gain of rule M2 (E10).

    Parameters
    ----------
    direction, step_error, feedback
        As in `feedback_element_error`, but that `direction` must be the directions themselves.
    y : array, [..., T, D], optional
        The dequantized directions. Without them, the shortest that the steps allow are taken.

    Returns
    -------
    Interval of [..., T]
        Of ``ratio * seen(y) / seen(direction) - 1``: `ratio` is the ``a / b`` that the norm is
        multiplied by, before what is stored is narrowed (`factor_error`), and ``seen(v)`` the
        length of v in the metric of the feedback. From -1 to infinity where nothing may be left of
        a direction.

    Raises
    ------
    TypeError, ValueError
        As `feedback_element_error`.

    Examples
    --------
    >>> from nsq_ref.feedback import Feedback
    >>> feedback = Feedback([[0, 1]], np.float32([[[1, -2], [0, 0.5]]])).head(0)
    >>> low, high = feedback_gain_error([[0.6, 0.8]], [[0.1, 0.1]], feedback)
    >>> (low * 2**20).round(2).tolist(), (high * 2**20).round(2).tolist()
    ([-1.57], [1.57])
    """
    directions, steps, factor = _taken(direction, step_error, feedback)
    weights = np.diagonal(feedback.factor).astype(np.float64)
    dequantized = None if y is None else _in_order("y", arguments.finite("y", y), feedback)
    if dequantized is not None:
        arguments.common_shape(direction=directions, step_error=steps, y=dequantized)
    with np.errstate(all="ignore"):  # what is infinite or NaN in between bounds nothing
        inverse = _Inverse(factor)
        seen, off = inverse.times(directions)
        count = np.arange(len(factor)) + 2.0
        rounded = _rounded(directions, (np.abs(seen) + off) @ np.abs(factor))
        again = count * UNIT * (1 + 2.0**-10) * UP * (inverse.at_most(rounded) @ np.abs(factor))
        share = np.max(again / rounded, axis=-1, keepdims=True) * UP
        rounded = np.where(share < 1, rounded / (1 - share) * UP, np.inf)
        of_seen = _length(weights * inverse.at_most(rounded))
        moved = _rounded(directions, steps @ np.abs(factor))
        of_steps = _length(weights * (inverse.at_most(moved) + UNIT * steps))
        before = _between(weights * seen, weights * off)
        if dequantized is None:
            most = _length(weights * steps) + _length(weights * inverse.at_most(moved))
            after = Interval(np.maximum(before.low - most, 0) * DOWN, (before.high + most) * UP)
        else:
            given, off = inverse.times(dequantized)
            after = _between(weights * given, weights * off)
        tiny = (np.sqrt(len(factor)) + 3) * TINY
        first = 2.01 * UNIT + divide((of_seen * (1 + 4 * UNIT) + tiny) * UP, before.low, np.inf)
        second = 3.01 * UNIT + divide(
            ((of_seen + of_steps) * (1 + 5 * UNIT) + tiny) * UP, after.low, np.inf
        )
        divided = UNIT + TINY * divide(
            after.high * (1 + second) * UP, before.low * np.maximum(1 - first, 0) * DOWN, np.inf
        )
        high = (1 + first) * (1 + divided) / np.maximum(1 - second, 0) * UP - 1
        low = np.maximum(1 - first, 0) * np.maximum(1 - divided, 0) / (1 + second) * DOWN - 1
    known = np.isfinite(high) & np.isfinite(low)
    return Interval(np.where(known, low, -1), np.where(known, high, np.inf))


def _taken(
    direction: Any, step_error: Any, feedback: HeadFeedback
) -> tuple[Float64, Float64, Float64]:
    """Take directions and steps in the order of coding, and what moves errors in it."""
    if not isinstance(feedback, HeadFeedback):
        raise TypeError(
            f"feedback must be a HeadFeedback, of Feedback.head, got {type(feedback).__name__}"
        )
    if (head_dim := len(feedback.order)) > MOST_CHANNELS:
        raise ValueError(f"feedback is of {head_dim} channels; E10 holds up to {MOST_CHANNELS}")
    directions = _in_order("direction", arguments.finite("direction", direction), feedback)
    steps = _in_order("step_error", arguments.bounds("step_error", step_error), feedback)
    arguments.common_shape(direction=directions, step_error=steps)
    return directions, steps, _with_unit_diagonal(feedback)


def _in_order(name: str, values: Float64, feedback: HeadFeedback) -> Float64:
    """Put channels in the order of coding."""
    head_dim = len(feedback.order)
    if values.ndim < 2 or values.shape[-1] != head_dim:
        raise ValueError(f"{name} has shape {list(values.shape)}; give [..., tokens, {head_dim}]")
    return np.asarray(values[..., feedback.order])


def _with_unit_diagonal(feedback: HeadFeedback) -> Float64:
    """Return the factor as errors move by it: all of a step's error stays in its own channel."""
    factor = feedback.factor.astype(np.float64)
    np.fill_diagonal(factor, 1)
    return factor


class _Inverse:
    """The inverse of F in float64, and what is certain of products with it.

    With X the inverse as computed and ``E = I - X F``, that of F is ``X + E inv(F)``. So the
    columns of its absolute values add up to at most those of X over 1 less the most that a column
    of E does.
    """

    def __init__(self, factor: Float64) -> None:
        self.values = np.triu(np.linalg.inv(factor))
        self.sizes, one = np.abs(self.values), np.eye(len(factor))
        size = self.sizes @ np.abs(factor) + one
        self.residual = np.abs(one - self.values @ factor) + 2 * _slack(size)
        off = self.residual.sum(axis=0).max() * (UP + 2 * TERM * len(factor))
        self.columns = self.sizes.sum(axis=0) / (1 - off) if off < 1 else np.inf

    def times(self, vectors: Float64) -> tuple[Float64, Float64]:
        """Return products of vectors with the inverse, and how far they may be off."""
        sizes = np.abs(vectors)
        off = self.at_most(sizes @ self.residual) + _slack(sizes @ self.sizes)
        return vectors @ self.values, off * UP

    def at_most(self, vectors: Float64) -> Float64:
        """Bound products of vectors with the absolute values of the inverse."""
        most = (vectors @ self.residual).max(axis=-1, keepdims=True)
        total = vectors @ self.sizes + most * self.columns
        return np.asarray(total + 2 * _slack(total))


def _between(vectors: Float64, off: Float64) -> Interval:
    """Enclose the Euclidean norms of vectors whose elements may be off."""
    length, slack = euclidean(vectors), _length(off)
    return Interval(np.maximum(length.low - slack, 0) * DOWN, (length.high + slack) * UP)


def _length(vectors: Float64) -> Float64:
    """Bound Euclidean norms."""
    return euclidean(vectors).high


def _rounded(directions: Float64, moved: Float64) -> Float64:
    """Bound what the float32 arithmetic of F1 adds to each element."""
    count = np.arange(directions.shape[-1]) + 2.0
    return np.asarray(count * (UNIT * (1 + 2.0**-10) * (np.abs(directions) + moved) + TINY) * UP)


def _in_channels(values: Float64, feedback: HeadFeedback) -> Float64:
    """Put what is in the order of coding back into that of the channels."""
    found = np.empty_like(values)
    found[..., feedback.order] = values
    return found


def _slack(size: Float64, terms: int | None = None) -> Float64:
    """What sums of float64 round, from the sums of absolute values."""
    return np.asarray(size * (OUTWARD + 2 * TERM * (size.shape[-1] if terms is None else terms)))

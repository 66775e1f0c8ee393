"""Errors of directions that were coded with feedback (E10): of elements, logits, and the metric."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.bounds import arguments
from nsq_ref.bounds.intervals import OUTWARD, TERM, TINY, UNIT, UP
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
        ``x / norm``, or ``x`` without norm separation.
    step_error : array that broadcasts with it
        Bounds of ``abs(w - y)``, w being what rule F1 codes: `element_error` with w as its
        ``direction``, or without clamped codes half a scale as there.
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


def _taken(
    direction: Any, step_error: Any, feedback: HeadFeedback
) -> tuple[Float64, Float64, Float64]:
    """Take directions and steps in the order of coding, and the factor."""
    if not isinstance(feedback, HeadFeedback):
        raise TypeError(
            f"feedback must be a HeadFeedback, of Feedback.head, got {type(feedback).__name__}"
        )
    directions = arguments.finite("direction", direction)
    steps = arguments.bounds("step_error", step_error)
    head_dim = len(feedback.order)
    for name, array in (("direction", directions), ("step_error", steps)):
        if array.ndim < 2 or array.shape[-1] != head_dim:
            raise ValueError(
                f"{name} has shape {list(array.shape)}; give [..., tokens, {head_dim}]"
            )
    if head_dim > MOST_CHANNELS:
        raise ValueError(f"feedback is of {head_dim} channels; E10 holds up to {MOST_CHANNELS}")
    arguments.common_shape(direction=directions, step_error=steps)
    order = feedback.order
    return directions[..., order], steps[..., order], feedback.factor.astype(np.float64)


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

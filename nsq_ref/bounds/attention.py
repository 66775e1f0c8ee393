"""Attention: logits (E6), weights (E7) and output (E8), from decoded keys and values."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.bounds import arguments
from nsq_ref.bounds.intervals import OUTWARD, TERM, UP, Interval, euclidean, largest
from nsq_ref.dtypes import Float64
from nsq_ref.environment import in_default_environment


@in_default_environment
def logit_error(query: Any, direction: Interval, norm: Interval, x_hat: Any) -> Interval:
    """Enclose ``query . x_hat - query . x`` (E6).

    Parameters
    ----------
    query : array, [..., Q, D]
        Queries, whose leading axes broadcast with those of the tokens.
    direction, norm, x_hat
        As in `reconstruction_error`.

    Returns
    -------
    Interval of [..., Q, T]

    Raises
    ------
    TypeError, ValueError
        As `reconstruction_error`.

    Examples
    --------
    >>> direction = Interval(np.array([[0.5, 0.5]]), np.array([[0.75, 0.75]]))
    >>> norm = Interval(np.array([4.0]), np.array([4.0]))
    >>> low, high = logit_error([[1.0, -1.0]], direction, norm, [[2.5, 2.5]])
    >>> low.round(6), high.round(6)
    (array([[-1.]]), array([[1.]]))
    """
    direction, norm, decoded = arguments.decoded(direction, norm, x_hat)
    queries = arguments.queries(query, decoded.shape[-1])
    known = np.isfinite(norm.high)
    up, down = np.maximum(queries, 0), np.maximum(-queries, 0)
    lows, highs = [], []
    for size in (norm.low, np.where(known, norm.high, norm.low)):
        ends = Interval(size * direction.low, size * direction.high)
        margin = OUTWARD * (np.abs(decoded) + largest(ends))
        least = np.swapaxes(decoded - ends.high - margin, -1, -2)
        most = np.swapaxes(decoded - ends.low + margin, -1, -2)
        slack = (up + down) @ largest(Interval(least, most))
        slack = slack * (2 * decoded.shape[-1] * TERM + OUTWARD)
        lows.append(up @ least - down @ most - slack)
        highs.append(up @ most - down @ least + slack)
    unknown = np.swapaxes(~known, -1, -2)
    return Interval(
        np.where(unknown, -np.inf, np.minimum(*lows)), np.where(unknown, np.inf, np.maximum(*highs))
    )


@in_default_environment
def estimate_logit_rms(query: Any, scale: Any, norm: Any) -> Float64:
    """Estimate, not bound, the root mean square of ``query . (x - x_hat)``.

    ``norm * ||query * scale|| / sqrt(12)``: as if rounding errors were uniform over a scale and
    independent.

    Parameters
    ----------
    query : array, [..., Q, D]
        Queries, whose leading axes broadcast with those of the tokens.
    scale : array, [..., T, D]
        The scale of each element.
    norm : array, [..., T]
        Stored norms; 1 without norm separation.

    Returns
    -------
    float64 array, [..., Q, T]

    Raises
    ------
    TypeError, ValueError
        For values that are not real numbers, and shapes that do not fit.

    Examples
    --------
    >>> estimate_logit_rms([[3.0, 4.0]], [[0.1, 0.1]], [12.0]).round(4)
    array([[1.7321]])
    """
    steps, norms = arguments.finite("scale", scale), arguments.bounds("norm", norm)
    arguments.one_a_vector("norm", norms, "scale", steps)
    queries = arguments.queries(query, steps.shape[-1])
    variance = np.square(queries) @ np.swapaxes(np.square(steps), -1, -2) / 12
    return np.sqrt(variance) * norms[..., None, :]


@in_default_environment
def total_variation(
    error: Interval, *, softmax_scale: float = 1.0, softcap: float | None = None, where: Any = None
) -> Float64:
    """Bound the total variation between the exact attention weights and the decoded ones (E7).

    Parameters
    ----------
    error : Interval of [..., T]
        Encloses what is added to each exact logit, of `logit_error`.
    softmax_scale : float
        What logits are multiplied by before softmax.
    softcap : float, optional
        Scaled logits become ``softcap * tanh(logit / softcap)``.
    where : bool array, optional
        Tokens that are attended to, such as broadcasts to the shape of `error`; all by default.

    Returns
    -------
    float64 array, [...]
        Bounds of half the sum of ``abs(weight - exact weight)``, from 0 to 1.

    Raises
    ------
    TypeError, ValueError
        For a scale or softcap that is not positive and finite, and shapes that do not fit.

    Examples
    --------
    >>> error = Interval(np.array([-0.5, -0.5]), np.array([0.5, 0.5]))
    >>> total_variation(error).round(4), np.tanh(0.25).round(4)
    (np.float64(0.2449), np.float64(0.2449))
    """
    softmax_scale = arguments.positive("softmax_scale", softmax_scale)
    softcap = None if softcap is None else arguments.positive("softcap", softcap)
    low, high = (end * softmax_scale for end in arguments.interval("error", error))
    low, high = low - OUTWARD * np.abs(low), high + OUTWARD * np.abs(high)
    if softcap is not None:
        low, high = np.clip(low, -2 * softcap, 0), np.clip(high, 0, 2 * softcap)
    if where is not None:
        attended = np.broadcast_to(arguments.attended(where), low.shape)
        low, high = np.where(attended, low, np.inf), np.where(attended, high, -np.inf)
    # The two errors that lie furthest apart are those of two tokens.
    first = np.argmin(low, axis=-1)[..., None]
    alone = np.arange(low.shape[-1]) == first
    second = np.min(np.where(alone, np.inf, low), axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # an unbounded token alone: infinity - infinity
        apart = high - np.where(alone, second, np.take_along_axis(low, first, -1))
    widest = np.fmax.reduce(apart, axis=-1, initial=0)
    return np.asarray(np.minimum(np.tanh(widest * UP / 4) * UP, 1))


@in_default_environment
def spread(values: Any, error: Any, where: Any = None) -> Float64:
    """Bound the distance between any two exact value vectors, from the decoded ones (E8).

    Parameters
    ----------
    values : array, [..., T, D]
        Decoded values.
    error : array, [..., T]
        Bounds of ``norm(values - exact values)``, such as `Bounds.token`.
    where : bool array, [..., Q, T], optional
        Tokens that each query attends to; all by default.

    Returns
    -------
    float64 array, [..., 1], or [..., Q] where `where` is given

    Raises
    ------
    TypeError, ValueError
        For values that are not finite, and shapes that do not fit.

    Examples
    --------
    >>> spread([[3.0, 4.0], [-3.0, -4.0], [0.0, 0.0]], [0.5, 0.5, 0.5]).round(6)
    array([11.])
    """
    vectors, errors = arguments.finite("values", values), arguments.bounds("error", error)
    arguments.one_a_vector("error", errors, "values", vectors)
    radii = (euclidean(vectors - _centre(vectors)).high + errors)[..., None, :]
    if where is not None:
        radii = np.where(arguments.attended(where), radii, -np.inf)
    if radii.shape[-1] == 1:
        return np.zeros(radii.shape[:-1])
    two = np.partition(radii, -2, axis=-1)[..., -2:]
    return np.maximum((two[..., 0] + two[..., 1]) * UP, 0)


def _centre(vectors: Float64) -> Float64:
    """Return a point whose largest distance to the vectors is small: any point will do."""
    ends = np.max(vectors, axis=-2, keepdims=True), np.min(vectors, axis=-2, keepdims=True)
    chosen = centre = np.asarray((ends[0] + ends[1]) / 2)
    best = np.full((*vectors.shape[:-2], 1, 1), np.inf)
    for step in range(2, 18):  # Badoiu and Clarkson: a shorter step each time to the farthest one
        distance = np.sum(np.square(vectors - centre), axis=-1)
        far = np.argmax(distance, axis=-1)[..., None, None]
        radius = np.take_along_axis(distance[..., None], far, -2)
        chosen, best = np.where(radius < best, centre, chosen), np.minimum(radius, best)
        centre = centre + (np.take_along_axis(vectors, far, -2) - centre) / step
    return np.asarray(chosen)


@in_default_environment
def output_error(weights: Any, error: Any, total_variation: Any, spread: Any) -> Float64:
    """Bound ``norm(output - exact output)`` of attention (E8).

    Parameters
    ----------
    weights : array, [..., Q, T]
        Attention weights from decoded keys; each row sums to one.
    error : array, [..., T]
        Bounds of ``norm(values - exact values)``, such as `Bounds.token`.
    total_variation : array, [..., Q]
        Of E7.
    spread : array, [..., 1] or [..., Q]
        Bounds of the distance between two exact values, of `spread`.

    Returns
    -------
    float64 array, [..., Q]

    Raises
    ------
    TypeError, ValueError
        For weights that are negative, and shapes that do not fit.

    Examples
    --------
    >>> output_error([[0.25, 0.75]], [0.1, 0.2], [0.05], [3.0]).round(4)
    array([0.325])
    """
    shares, errors = arguments.bounds("weights", weights), arguments.bounds("error", error)
    varied = arguments.bounds("total_variation", total_variation)
    distance = arguments.bounds("spread", spread)
    if shares.ndim < 2 or errors.ndim < 1 or shares.shape[-1] != errors.shape[-1]:
        raise ValueError(
            f"weights has shape {list(shares.shape)} and error {list(errors.shape)}; give "
            "[..., queries, tokens] and [..., tokens]"
        )
    direct = (shares @ errors[..., None])[..., 0]
    arguments.common_shape(weights=direct, total_variation=varied, spread=distance)
    moved = np.where(varied == 0, 0, varied * np.where(varied == 0, 0, distance))
    return np.asarray((direct + moved) * (1 + errors.shape[-1] * TERM + OUTWARD))

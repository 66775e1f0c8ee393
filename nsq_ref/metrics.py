"""A few measures of what quantization does to vectors, accumulated in float64."""

from __future__ import annotations

from typing import Any, overload

import numpy as np

from nsq_ref.arrays import as_integer, as_integers, as_real_array
from nsq_ref.bounds.intervals import divide
from nsq_ref.dtypes import Float64
from nsq_ref.environment import in_default_environment

__all__ = ["cosine_similarity", "outlier_ratio", "relative_error"]


@overload
def relative_error(x: Any, x_hat: Any, axis: None = None) -> float: ...
@overload
def relative_error(x: Any, x_hat: Any, axis: int | tuple[int, ...]) -> Float64: ...
@in_default_environment
def relative_error(
    x: Any, x_hat: Any, axis: int | tuple[int, ...] | None = None
) -> float | Float64:
    """Return the norm of ``x - x_hat`` over the norm of ``x``.

    Parameters
    ----------
    x, x_hat : array
        Original and reconstruction, of equal shape.
    axis : int or tuple of int, optional
        Axes the norm goes over; all by default.

    Returns
    -------
    float or array
        0 where both are zero, infinity where only ``x`` is.

    Raises
    ------
    TypeError, ValueError
        For arrays that are not real numbers, empty or of different shapes.

    Examples
    --------
    >>> relative_error([3.0, 4.0], [3.0, 3.5])
    0.1
    >>> relative_error([[3, 4], [0, 0]], [[3, 3.5], [0, 0]], axis=-1)
    array([0.1, 0. ])
    """
    original, restored = _pair(x, x_hat)
    if axis is not None:
        several = isinstance(axis, tuple)
        axis = tuple(as_integers("axis", axis)) if several else as_integer("axis", axis)
    error = np.sqrt(np.sum(np.square(original - restored), axis=axis))
    size = np.sqrt(np.sum(np.square(original), axis=axis))
    ratio = divide(error, size, np.inf)
    return float(ratio) if axis is None else ratio


@in_default_environment
def cosine_similarity(x: Any, x_hat: Any) -> Float64:
    """Return the cosine of the angle between vectors along the last axis.

    Parameters
    ----------
    x, x_hat : array, shape [..., D]
        Original and reconstruction, of equal shape.

    Returns
    -------
    float64 array, shape [...]
        1 where both vectors are zero, 0 where one is.

    Raises
    ------
    TypeError, ValueError
        For arrays that are not real numbers, empty, of different shapes or without an axis.

    Examples
    --------
    >>> cosine_similarity([[1, 0], [1, 1]], [[0, 2], [3, 3]])
    array([0., 1.])
    """
    original, restored = _pair(x, x_hat)
    if original.ndim < 1:
        raise ValueError("x is a single number; at least [head_dim] is needed")
    # Unit vectors first: the product of two norms leaves float64 before either norm does.
    lengths = [np.linalg.norm(side, axis=-1, keepdims=True) for side in (original, restored)]
    units = divide(original, lengths[0], 0), divide(restored, lengths[1], 0)
    cosine = np.clip(np.sum(units[0] * units[1], axis=-1), -1, 1)
    both_zero = (lengths[0] == 0) & (lengths[1] == 0)
    return np.where(both_zero[..., 0], 1.0, cosine)


@in_default_environment
def outlier_ratio(x: Any) -> Float64:
    """Return how far the largest channel of each head stands out.

    The largest absolute value of each channel over the tokens; of these, the greatest over
    the mean.

    Parameters
    ----------
    x : array, shape [..., T, D]
        Tokens by channels.

    Returns
    -------
    float64 array, shape [...]
        From 1, all channels alike (also for a head of zeros), to D, one channel alone.

    Raises
    ------
    TypeError, ValueError
        For an array that is not of real numbers, empty, or has less than two axes.

    Examples
    --------
    >>> outlier_ratio([[[1, -6, 1], [2, 3, 1]], [[1, 1, 1], [1, 1, 1]]])
    array([2., 1.])
    """
    values = _real("x", x)
    if values.ndim < 2:
        shape = list(values.shape)
        raise ValueError(f"x has shape {shape}; at least [tokens, head_dim] is needed")
    peak = np.max(np.abs(values), axis=-2)
    mean = np.mean(peak, axis=-1)
    return np.where(mean == 0, 1.0, divide(np.max(peak, axis=-1), mean, 1))


def _pair(x: Any, x_hat: Any) -> tuple[Float64, Float64]:
    original, restored = _real("x", x), _real("x_hat", x_hat)
    if original.shape != restored.shape:
        shapes = f"{list(original.shape)} and x_hat {list(restored.shape)}"
        raise ValueError(f"x has shape {shapes}; give arrays of equal shape")
    return original, restored


def _real(name: str, values: Any) -> Float64:
    given = as_real_array(name, values)
    if given.size == 0:
        raise ValueError(f"{name} has shape {list(given.shape)}, which is empty")
    return given

"""What callers give to the functions on plain arrays, and how it is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nsq_ref.arrays import as_array, as_float, as_integer_array, as_real_array, require
from nsq_ref.bounds.intervals import Interval
from nsq_ref.dtypes import FLOAT_DTYPES, Array, Float64
from nsq_ref.scheme import FloatName, Scheme


def finite(name: str, values: Any) -> Float64:
    """Take real numbers that are finite."""
    numbers = as_real_array(name, values)
    require(name, numbers, np.isfinite(numbers), ", which is not finite")
    return numbers


def bounds(name: str, values: Any) -> Float64:
    """Take real numbers of 0 or more, infinity among them."""
    numbers = as_real_array(name, values)
    require(name, numbers, numbers >= 0, ", which is not a bound: it must be 0 or more")
    return numbers


def interval(name: str, ends: Any) -> Interval:
    """Take two arrays, of whatever kind."""
    if not isinstance(ends, tuple) or len(ends) != 2:
        raise TypeError(f"{name} must be an Interval, got {type(ends).__name__}")
    low, high = ends
    return Interval(as_real_array(f"{name}.low", low), as_real_array(f"{name}.high", high))


def stored(name: str, values: Any, dtype: FloatName) -> Float64:
    """Take finite values of a dtype."""
    numbers = finite(name, values)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(FLOAT_DTYPES)}")
    with np.errstate(over="ignore"):
        held = numbers.astype(FLOAT_DTYPES[dtype]) == numbers
    require(name, numbers, held, f", which is not a value of {dtype}")
    return numbers


def codes(values: Any, scheme: Scheme) -> Float64:
    """Take integers within the range of codes."""
    given = as_integer_array("codes", values)
    least, greatest = scheme.code_range
    inside = (given >= least) & (given <= greatest)
    require("codes", given, inside, f", which is not within {least} to {greatest}")
    return given.astype(np.float64)


def scale_and_zero(scale: Any, zero: Any, scheme: Scheme) -> tuple[Float64, Float64]:
    """Take stored scales and zeros, which are 0 if symmetric."""
    if (zero is None) != scheme.symmetric:
        wanted = "has no zero; leave it out" if scheme.symmetric else "needs a zero"
        raise ValueError(f"zero={zero!r:.40}, but {scheme} {wanted}")
    scales = stored("scale", scale, scheme.scale_dtype)
    zeros = np.zeros(()) if zero is None else stored("zero", zero, scheme.scale_dtype)
    common_shape(scale=scales, zero=zeros)
    return scales, zeros


def decoded(direction: Any, norm: Any, x_hat: Any) -> tuple[Interval, Interval, Float64]:
    """Take what E5 and E6 are made of; the norms get an axis for channels."""
    tokens = finite("x_hat", x_hat)
    directions, norms = interval("direction", direction), interval("norm", norm)
    norms = Interval(norms.low[..., None], norms.high[..., None])
    common_shape(direction=directions.low, x_hat=tokens, norm=norms.low)
    return directions, norms, tokens


def queries(query: Any, head_dim: int) -> Float64:
    """Take queries of this many channels."""
    given = finite("query", query)
    if given.ndim < 2 or given.shape[-1] != head_dim:
        raise ValueError(f"query has shape {list(given.shape)}; give [..., queries, {head_dim}]")
    return given


def attended(where: Any) -> npt.NDArray[np.bool_]:
    """Take a mask."""
    given = as_array("where", where)
    if given.dtype != np.bool_:
        raise TypeError(f"where has dtype {given.dtype}; give True where a token is attended to")
    return given


def positive(name: str, value: Any) -> float:
    """Take one positive, finite number."""
    number = as_float(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}={number} is not a positive finite number")
    return number


def common_shape(**arrays: Array) -> tuple[int, ...]:
    """Return the shape that all broadcast to."""
    return _broadcast({name: array.shape for name, array in arrays.items()})


def one_a_vector(name: str, numbers: Array, vectors_name: str, vectors: Array) -> None:
    """Require numbers that broadcast with the vectors along the last axis of an array."""
    _broadcast({name: numbers.shape, f"{vectors_name} without its last axis": vectors.shape[:-1]})


def _broadcast(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"shapes do not fit together: {listed}") from None

"""Arithmetic that implementers write in place of the specification's, and that rounds elsewhere.

Each function is one such mistake in plain NumPy: roundings of a quotient, quotients, sums of
products, narrowings, divisions by a norm. Cases are picked from pools by means of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from nsq_ref.scheme import FLOAT_DTYPES

Array = npt.NDArray[Any]
Sum = Callable[[Array, Array], Array]


def divisor(value: Array) -> Array:
    """Return what is divided by so that a division by zero gives zero."""
    return np.where(value == 0, value.dtype.type(np.inf), value)


# --- roundings of a quotient --------------------------------------------------------------------


def half_away(quotient: Array) -> Array:
    """Round ties away from zero.

    Examples
    --------
    >>> half_away(np.float32([-0.5, 1.4, 2.5]))
    array([-1.,  1.,  3.])
    """
    return np.copysign(np.floor(np.abs(quotient).astype(np.float64) + 0.5), quotient)


def half_toward_zero(quotient: Array) -> Array:
    """Round ties toward zero."""
    return np.copysign(np.ceil(np.abs(quotient).astype(np.float64) - 0.5), quotient)


def half_up(quotient: Array) -> Array:
    """Round ties up."""
    return np.asarray(np.floor(quotient.astype(np.float64) + 0.5))


def half_up_in_float32(quotient: Array) -> Array:
    """Round ties up by a sum that rounds itself, and lifts what lies below 1/2."""
    return np.asarray(np.floor(quotient + np.float32(0.5)))


def wrapped(quotient: Array, dtype: type[np.integer[Any]]) -> Array:
    """Cast to an integer before the clamp, as C does where it does not trap: the low bits.

    Examples
    --------
    >>> wrapped(np.float32([130, np.inf]), np.int8)
    array([-126,    0], dtype=int8)
    """
    whole = np.clip(np.nan_to_num(np.rint(quotient.astype(np.float64))), -(2.0**62), 2.0**62)
    return np.asarray(whole.astype(np.int64).astype(dtype))


# --- quotients of a direction, less a zero, and a scale -----------------------------------------


def quotient_by_reciprocal(direction: Array, scale: Array, zero: Array) -> Array:
    """Multiply by ``1 / scale``."""
    return np.asarray((direction - zero) * (np.float32(1) / divisor(scale)))


def double_quotient(direction: Array, scale: Array, zero: Array) -> Array:
    """Divide in float64."""
    return np.asarray((direction - zero).astype(np.float64) / divisor(scale))


def fused_subtraction(direction: Array, scale: Array, zero: Array) -> Array:
    """Subtract in float64, and round the quotient alone."""
    quotient = (direction.astype(np.float64) - zero) / divisor(scale)
    return np.asarray(quotient.astype(np.float32))


def divided_apart(direction: Array, scale: Array, zero: Array) -> Array:
    """Divide direction and zero, and subtract the quotients."""
    return np.asarray(direction / divisor(scale) - zero / divisor(scale))


# --- sums of products over the last axis --------------------------------------------------------


def in_order(left: Array, right: Array) -> Array:
    """Add one product after the other, in the dtype of the arguments.

    In float64 this is what cases are computed with: the order of `numpy.sum` is that of its
    version.

    Examples
    --------
    >>> x = np.float32([2.0**-12, 1, 2.0**-12])
    >>> [float(total(x, x)) - 1 for total in (in_order, in_halves)]
    [0.0, 1.1920928955078125e-07]
    """
    return np.asarray(np.add.accumulate(left * right, axis=-1)[..., -1])


def in_halves(left: Array, right: Array) -> Array:
    """Add the second half of the products to the first, until one is left."""
    terms = left * right
    while terms.shape[-1] > 1:
        if terms.shape[-1] % 2:
            terms = np.concatenate([terms, np.zeros_like(terms[..., :1])], axis=-1)
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return np.asarray(terms[..., 0])


def in_lanes(left: Array, right: Array) -> Array:
    """Keep eight running sums, as vector instructions do."""
    count = min(8, left.shape[-1])
    lanes = [in_order(left[..., i::8], right[..., i::8]) for i in range(count)]
    return np.asarray(np.add.accumulate(np.stack(lanes, axis=-1), axis=-1)[..., -1])


def fused(left: Array, right: Array) -> Array:
    """Add one product after the other by fused multiply-adds."""
    total = np.zeros(left.shape[:-1], np.float32)
    for j in range(left.shape[-1]):
        total = (left[..., j].astype(np.float64) * right[..., j] + total).astype(np.float32)
    return total


FLOAT32_SUMS: tuple[Sum, ...] = (in_order, in_halves, in_lanes, fused)


# --- norms, narrowing, decoding -----------------------------------------------------------------


def direction_by_reciprocal(x: Array, norm: Array) -> Array:
    """Multiply by ``1 / norm``."""
    return np.asarray(x * (np.float32(1) / divisor(norm))[..., None])


def narrowed_at_once(value: Array, dtype: str) -> Array:
    """Round float64 to `dtype` without a stop at float32.

    Examples
    --------
    >>> above = 1 + 2.0**-8 + 2.0**-40  # a float32 cannot tell it from a tie of bfloat16
    >>> narrowed_at_once(np.array([above]), "bfloat16")
    array([1.00781], dtype=bfloat16)
    """
    if dtype != "bfloat16":
        return value.astype(FLOAT_DTYPES[dtype])
    # A cast to bfloat16 stops there. To odd at 24 bits first, the second rounding is right.
    near = value.astype(np.float32)
    toward = np.where(np.abs(near) > np.abs(value), np.nextafter(near, np.float32(0)), near)
    odd = (toward.view(np.uint32) | (toward != value)).astype(np.uint32)
    return np.asarray(odd.view(np.float32).astype(FLOAT_DTYPES[dtype]))


def fused_dequantize(codes: Array, scale: Array, zero: Array) -> Array:
    """Return ``codes * scale + zero`` by a fused multiply-add."""
    wide = codes.astype(np.float64) * scale.astype(np.float64) + zero.astype(np.float64)
    return np.asarray(wide.astype(np.float32))

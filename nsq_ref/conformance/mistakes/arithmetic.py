"""Arithmetic that implementers write in place of the specification's, and that rounds elsewhere.

Functions of plain NumPy, each of them one mistake: roundings of a quotient, quotients, sums of
products, narrowings. `MISTAKES` are made of them, and cases are picked by them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nsq_ref.dtypes import Array
from nsq_ref.scheme import FLOAT_DTYPES

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


def quotient(direction: Any, scale: Any, zero: Any) -> Any:
    """Divide as Q1 says."""
    return (direction - zero) / divisor(scale)


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


def in_eight_lanes(left: Array, right: Array) -> Array:
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


def compensated(left: Array, right: Array) -> Array:
    """Add one product after the other and carry what each sum lost (Kahan)."""
    total = lost = np.zeros(left.shape[:-1], left.dtype)
    for j in range(left.shape[-1]):
        term = left[..., j] * right[..., j] - lost
        larger = total + term
        lost = (larger - total) - term
        total = larger
    return total


FLOAT32_SUMS: tuple[Sum, ...] = (in_order, in_halves, in_eight_lanes, fused)


def in_float64(left: Any, right: Any) -> Any:
    """Add the products in float64, one after the other."""
    return in_order(left.astype(np.float64), right.astype(np.float64))


def length_in_float64(x: Any) -> Any:
    """Return the Euclidean norm, not rounded to float32."""
    return np.sqrt(in_float64(x, x))


def in_float16(left: Any, right: Any) -> Any:
    """Add the products in float16, one after the other."""
    return in_order(left.astype(np.float16), right.astype(np.float16)).astype(np.float32)


def padded_with_zeros(terms: Any, count: int) -> Any:
    """Add so many zeros behind the last axis."""
    return np.concatenate([terms, np.zeros((*terms.shape[:-1], count), np.float32)], axis=-1)


def added_by_halves(terms: Any) -> Any:
    """Add a power of two of terms as a tree."""
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def pairwise(left: Any, right: Any) -> Any:
    """Add the products as a tree over the next power of two, by halves."""
    terms = left * right
    size = 1 << (terms.shape[-1] - 1).bit_length()
    return added_by_halves(padded_with_zeros(terms, size - terms.shape[-1]))


def neighbours_first(left: Any, right: Any) -> Any:
    """Add the products as a tree, by neighbours."""
    terms = left * right
    while terms.shape[-1] > 1:
        terms = padded_with_zeros(terms, terms.shape[-1] % 2)
        terms = terms[..., ::2] + terms[..., 1::2]
    return terms[..., 0]


def in_lanes(lanes: int) -> Sum:
    """Keep so many running sums, which are then added as a tree."""

    def total(left: Any, right: Any) -> Any:
        terms = padded_with_zeros(left * right, -left.shape[-1] % lanes)
        rows = terms.reshape(*terms.shape[:-1], terms.shape[-1] // lanes, lanes)
        return added_by_halves(np.add.accumulate(rows, axis=-2)[..., -1, :])

    return total


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


def toward_zero(narrowed: Any, value: Any, dtype: Any) -> Any:
    """Narrow by truncation."""
    wide = narrowed.astype(np.float64)
    with np.errstate(invalid="ignore"):
        beyond = np.abs(wide) > np.abs(np.asarray(value, np.float64))
    return np.where(beyond, np.nextafter(narrowed, dtype.type(0)), narrowed).astype(dtype)


def upward(narrowed: Any, value: Any, dtype: Any) -> Any:
    """Narrow to the next number that is no smaller."""
    with np.errstate(invalid="ignore"):
        below = narrowed.astype(np.float64) < np.asarray(value, np.float64)
    return np.where(below, np.nextafter(narrowed, dtype.type(np.inf)), narrowed).astype(dtype)


def half_away_narrowed(narrowed: Any, value: Any, dtype: Any) -> Any:
    """Narrow with ties away from zero."""
    wide = narrowed.astype(np.float64)
    value = np.asarray(value, np.float64)
    outward = np.nextafter(narrowed, np.copysign(dtype.type(np.inf), narrowed)).astype(np.float64)
    tie = (np.abs(value) > np.abs(wide)) & (value - wide == outward - value)
    return np.where(tie, outward, wide).astype(dtype)


def flushed(values: Any, *_: Any) -> Any:
    """Set subnormal numbers to 0."""
    least = 2.0**-14 if values.dtype == np.float16 else 2.0**-126
    return np.where(np.abs(values.astype(np.float64)) < least, values.dtype.type(0), values)


def fused_dequantize(codes: Array, scale: Array, zero: Array) -> Array:
    """Return ``codes * scale + zero`` by a fused multiply-add."""
    wide = codes.astype(np.float64) * scale.astype(np.float64) + zero.astype(np.float64)
    return np.asarray(wide.astype(np.float32))

"""Floats as bits, as places among all floats, and as text: what judging compares and shows."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.dtypes import Array


def bits_of(array: Array) -> Array:
    """Return integers as they are, and the bits of floats as integers."""
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    return np.ascontiguousarray(array).view(f"u{array.itemsize}").astype(np.int64)


def is_subnormal(array: Array) -> Array:
    """Return where floats are subnormal."""
    info = {2: 0x0400, 4: 0x00800000}[array.itemsize]
    least = 0x0080 if array.dtype.name == "bfloat16" else info
    size = bits_of(array) & ((1 << (8 * array.itemsize - 1)) - 1)
    return np.asarray((size > 0) & (size < least))


def first_of(wrong: Array) -> tuple[int, ...]:
    """Return the index of the first True."""
    return tuple(int(i) for i in np.argwhere(wrong)[0])


def ordered(value: Any) -> Any:
    """Return the place of a float32 among all of them, as an integer."""
    bits = np.asarray(value, np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def moved(value: Array, steps: int) -> Array:
    """Return float32 so many steps away; zero stays."""
    bits = np.asarray(value, np.float32).view(np.int32)
    return np.where(value == 0, value, (bits + steps).astype(np.int32).view(np.float32))


def place_of(part: Array, at: tuple[int, ...]) -> tuple[int, ...]:
    """Return where the scale of an element lies: axes of length 1 hold one for all."""
    return tuple(0 if size == 1 else i for i, size in zip(at, part.shape, strict=True))


def element_of(
    direction: Array, scale: Array, zero: Array, at: tuple[int, ...]
) -> tuple[np.float32, np.float32, np.float32]:
    """Return direction, scale and zero of one element, as float32."""
    return (
        np.float32(direction[at]),
        np.float32(scale[place_of(scale, at)]),
        np.float32(zero[place_of(zero, at)]),
    )


def text_of(value: Any) -> str:
    """Return a number as its bits and in decimal; integers as they are."""
    value = np.asarray(value)
    if value.dtype.kind in "iu":
        return str(int(value))
    bits = int(value.reshape(1).view(f"u{value.itemsize}")[0])
    return f"0x{bits:0{2 * value.itemsize}x}  {float(value)!r}"

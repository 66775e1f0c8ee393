"""The block formats of ggml that llama.cpp uses for caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from nsq_ref.dtypes import Array, Float32
from nsq_ref.rivals.codec import Codec, Part, Parts, Values, half
from nsq_ref.rivals.grouped import by_channels

__all__ = ["GgmlBlocks"]


@dataclass(frozen=True)
class GgmlBlocks(Codec):
    """Blocks of 32 channels with a float16 scale: ``q4_0``, ``q5_0`` and ``q8_0``.

    Below 8 bits the element of the largest magnitude gets the lowest code exactly, so that one side
    has a code more; halves are rounded upwards there, and away from zero at 8 bits.

    Examples
    --------
    >>> GgmlBlocks("q4_0")(np.ones((1, 32), np.float32)).bits_per_element
    4.5
    """

    kind: Literal["q4_0", "q5_0", "q8_0"]

    def encode(self, x: Float32) -> Parts:
        """Code each block."""
        bits = int(self.kind[1])
        blocks = by_channels(x, 32, self.kind)
        place = np.abs(blocks).argmax(axis=-1, keepdims=True)
        largest = np.take_along_axis(blocks, place, axis=-1)
        if bits == 8:
            scale = np.abs(largest) / np.float32(127)
            codes = away_from_zero(blocks * inverse(scale)).astype(np.int8)
        else:
            middle = 2 ** (bits - 1)
            scale = largest / np.float32(-middle)
            shifted = np.trunc(blocks * inverse(scale) + np.float32(middle + 0.5))
            codes = np.clip(shifted, 0, 2 * middle - 1).astype(np.uint8)
        return {"codes": Part(codes, bits), "scale": Part(half("a scale", scale), 16)}

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Scale times code, less what stands for 0."""
        middle = 0 if self.kind == "q8_0" else 2 ** (int(self.kind[1]) - 1)
        codes = parts["codes"].astype(np.float32) - np.float32(middle)
        restored: Float32 = codes * parts["scale"].astype(np.float32)
        return restored.reshape(shape)


def inverse(scale: Float32) -> Array:
    """Return 1 over a scale; 0 where that is not finite.

    Examples
    --------
    >>> inverse(np.float32([4, 0]))
    array([0.25, 0.  ], dtype=float32)
    """
    with np.errstate(all="ignore"):
        inverted = np.float32(1) / scale
    usable: Array = np.where(np.isfinite(inverted), inverted, np.float32(0))
    return usable


def away_from_zero(x: Array) -> Array:
    """Round to integers, halves away from zero, as C's ``roundf``.

    Examples
    --------
    >>> away_from_zero(np.float32([0.5, -1.5, 0.49999997]))
    array([ 1., -2.,  0.], dtype=float32)
    """
    towards = np.trunc(x)
    rounded: Array = towards + np.where(np.abs(x - towards) >= 0.5, np.sign(x), np.float32(0))
    return rounded

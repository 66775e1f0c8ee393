"""NVFP4: 4-bit floats in blocks of 16, each with an 8-bit float as its scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nsq_ref.dtypes import Array, Float32
from nsq_ref.rivals.codec import Codec, Part, Parts, Values, divided
from nsq_ref.rivals.grouped import by_channels

__all__ = ["Nvfp4"]

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of E2M1
LARGEST_SCALE = 448.0  # of E4M3


@dataclass(frozen=True)
class Nvfp4(Codec):
    """E2M1 codes, an E4M3 scale a block of 16 channels, a float32 scale a tensor.

    A tensor is all tokens and heads of a layer of a sequence: the last three axes.

    Examples
    --------
    >>> Nvfp4()(np.float32([[6] + [4] * 15])).x_hat[0, :2]
    array([6., 4.], dtype=float32)
    """

    def encode(self, x: Float32) -> Parts:
        """Scale the largest of the tensor to the largest number there is, and code blocks."""
        blocks = by_channels(x, 16, "NVFP4")
        largest = np.abs(blocks).max(axis=-1, keepdims=True)
        together = tuple(range(max(blocks.ndim - 4, 0), blocks.ndim))
        tensor = largest.max(axis=together, keepdims=True) / np.float32(6 * LARGEST_SCALE)
        scale = e4m3(divided(largest / np.float32(6), tensor))
        ratio = divided(blocks, scale * tensor)
        magnitude = e2m1(np.abs(ratio))
        codes = np.searchsorted(MAGNITUDES, magnitude).astype(np.uint8)
        codes |= (ratio < 0).astype(np.uint8) << np.uint8(3)
        return {"codes": Part(codes, 4), "scale": Part(scale, 8), "tensor": Part(tensor, 32)}

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Code times both scales."""
        codes = parts["codes"]
        number = np.where(codes >= 8, -MAGNITUDES[codes & 7], MAGNITUDES[codes & 7])
        restored: Float32 = (number * (parts["scale"] * parts["tensor"])).reshape(shape)
        return restored


def e4m3(x: Array) -> Float32:
    """Round magnitudes to the nearest E4M3 number, halves to even; at most 448.

    Examples
    --------
    >>> e4m3(np.float32([0.3, 17, 500, 0.001]))
    array([3.125000e-01, 1.600000e+01, 4.480000e+02, 1.953125e-03],
          dtype=float32)
    """
    return _rounded(x, fraction_bits=3, least_exponent=-6, largest=LARGEST_SCALE)


def e2m1(x: Array) -> Float32:
    """Round magnitudes to the nearest E2M1 number, halves to even; at most 6.

    Examples
    --------
    >>> e2m1(np.float32([0.25, 0.75, 2.5, 5, 7]))
    array([0., 1., 2., 4., 6.], dtype=float32)
    """
    return _rounded(x, fraction_bits=1, least_exponent=0, largest=6)


def _rounded(x: Array, fraction_bits: int, least_exponent: int, largest: float) -> Float32:
    _, exponent = np.frexp(x)
    step = np.ldexp(np.float32(1), np.maximum(exponent - 1, least_exponent) - fraction_bits)
    rounded: Float32 = np.minimum(np.rint(x / step) * step, np.float32(largest))
    return rounded.astype(np.float32)

"""OScaR: Hadamard's rotation, norms that the heads share, groups with a rounded zero point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from nsq_ref.dtypes import Float32
from nsq_ref.rivals.codec import Codec, Part, Parts, Values, half, length
from nsq_ref.rivals.grouped import asymmetric_back, by_channels, by_tokens
from nsq_ref.rivals.rotation import hadamard, power_of_two

__all__ = ["Oscar"]


@dataclass(frozen=True)
class Oscar(Codec):
    """Rotated channels; keys: a norm a token over all heads, then as KIVI; values: as KIVI.

    The zero point of a group is a whole number of scales, and stored times the scale.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((4, 256, 64), dtype=np.float32)
    >>> Oscar("key", bits=2)(x).bits_per_element, Oscar("value", bits=2)(x).bits_per_element
    (3.0625, 3.0)
    """

    side: Literal["key", "value"]
    bits: int
    group: int = 32
    residual: int = 128

    def coded(self, tokens: int) -> tuple[int, int]:
        """Return all whole runs of ``residual``; none as long as there is only one."""
        return 0, 0 if tokens <= self.residual else tokens - tokens % self.residual

    def encode(self, x: Float32) -> Parts:
        """Rotate, take norms of keys, and code groups."""
        rotated = hadamard(x, power_of_two(x.shape, "OScaR"))
        if self.side == "value":
            return rounded_zero(by_channels(rotated, self.group, "OScaR"), self.bits, -1)
        norm = np.maximum(length(rotated, (-3, -1) if x.ndim > 2 else -1), np.float32(1e-4))
        parts = rounded_zero(by_tokens(rotated / norm, self.group), self.bits, -2)
        return parts | {"norm": Part(half("a norm", norm), 16)}

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Read groups back, give keys their norms, and rotate back."""
        rotated = asymmetric_back(parts).reshape(shape)
        if self.side == "key":
            rotated = rotated * parts["norm"].astype(np.float32)
        return hadamard(rotated, shape[-1])


def rounded_zero(x: Float32, bits: int, axis: int) -> Parts:
    """Code along an axis about a zero point that is a whole number of scales.

    Examples
    --------
    >>> parts = rounded_zero(np.float32([[1, 2, 4]]), 2, -1)
    >>> parts["codes"].values, parts["minimum"].values
    (array([[0, 1, 3]], dtype=uint8), array([[1.]], dtype=float16))
    """
    levels = np.float32(2**bits - 1)
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    nothing = (low == 0) & (high == 0)
    low, high = np.where(nothing, np.float32(-1), low), np.where(nothing, np.float32(1), high)
    scale = (high - low) / levels
    step = np.where(scale == 0, np.float32(1), scale)
    zero = np.where(scale == 0, np.float32(0), np.rint(-low / step))
    codes = np.clip(np.rint(x / step) + zero, 0, levels)
    codes = np.where(scale == 0, 0, codes).astype(np.uint8)
    minimum = np.where(scale == 0, low, -zero * scale)
    return {
        "codes": Part(codes, bits), "scale": Part(half("a scale", scale), 16),
        "minimum": Part(half("a zero point", minimum), 16),
    }  # fmt: skip

"""Groups of elements with a scale and a minimum: KIVI, and what other codecs take from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nsq_ref.dtypes import Array, Float32
from nsq_ref.rivals.codec import Codec, Part, Parts, Values, half, whole

__all__ = ["KiviKeys", "KiviValues"]


@dataclass(frozen=True)
class KiviKeys(Codec):
    """KIVI's keys: codes from the minimum upwards, a scale a channel of each group of tokens.

    The last ``T % residual`` tokens are kept.

    Examples
    --------
    >>> KiviKeys(bits=2)(np.ones((1, 300, 4), np.float32)).sealed_bits / (256 * 4)
    3.0
    """

    bits: int
    group: int = 32
    residual: int = 128

    def coded(self, tokens: int) -> tuple[int, int]:
        """Return all runs of ``residual`` tokens."""
        return 0, tokens - tokens % self.residual

    def encode(self, x: Float32) -> Parts:
        """Code each channel of each group of tokens."""
        return asymmetric(by_tokens(x, self.group), self.bits, -2)

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Scale times code, plus minimum."""
        return asymmetric_back(parts).reshape(shape)


@dataclass(frozen=True)
class KiviValues(Codec):
    """KIVI's values: the same, a scale a group of channels of each token.

    The last ``residual`` tokens are kept.

    Examples
    --------
    >>> KiviValues(bits=2)(np.ones((1, 300, 32), np.float32)).kept_elements / 32
    128.0
    """

    bits: int
    group: int = 32
    residual: int = 128

    def coded(self, tokens: int) -> tuple[int, int]:
        """Return all tokens but the last ones."""
        return 0, max(tokens - self.residual, 0)

    def encode(self, x: Float32) -> Parts:
        """Code each group of channels of each token."""
        return asymmetric(by_channels(x, self.group, "KIVI"), self.bits, -1)

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Scale times code, plus minimum."""
        return asymmetric_back(parts).reshape(shape)


def by_tokens(x: Float32, group: int) -> Float32:
    """Cut tokens into groups, ``[..., groups, group, D]``.

    Examples
    --------
    >>> by_tokens(np.zeros((8, 3), np.float32), 4).shape
    (2, 4, 3)
    """
    return x.reshape(*x.shape[:-2], x.shape[-2] // group, group, x.shape[-1])


def by_channels(x: Float32, group: int, method: str) -> Float32:
    """Cut channels into groups, ``[..., T, groups, group]``.

    Examples
    --------
    >>> by_channels(np.zeros((3, 8), np.float32), 4, "KIVI").shape
    (3, 2, 4)
    """
    whole(x.shape, -1, group, method)
    return x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def asymmetric(x: Float32, bits: int, axis: int) -> Parts:
    """Code along an axis from the minimum upwards; scale and minimum are stored in float16.

    Examples
    --------
    >>> asymmetric(np.float32([[1, 2, 4]]), 2, -1)["codes"].values
    array([[0, 1, 3]], dtype=uint8)
    """
    levels = 2**bits - 1
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    minimum = half("a minimum", low)
    scale = half("a scale", (high - low) / np.float32(levels))
    step, start = scale.astype(np.float32), minimum.astype(np.float32)
    codes = np.rint(np.clip((x - start) / np.where(step == 0, 1, step), 0, levels))
    codes = np.where(step == 0, 0, codes).astype(np.uint8)
    return {"codes": Part(codes, bits), "scale": Part(scale, 16), "minimum": Part(minimum, 16)}


def asymmetric_back(parts: Values) -> Float32:
    """Read `asymmetric` codes back.

    Examples
    --------
    >>> parts = asymmetric(np.float32([[1, 2, 4]]), 2, -1)
    >>> asymmetric_back({name: part.values for name, part in parts.items()})
    array([[1., 2., 4.]], dtype=float32)
    """
    scale, minimum = (parts[name].astype(np.float32) for name in ("scale", "minimum"))
    codes: Array = parts["codes"]
    restored: Float32 = codes.astype(np.float32) * scale + minimum
    return restored

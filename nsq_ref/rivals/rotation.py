"""Rotations of the channels: Hadamard's, block by block, and one drawn at random."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from nsq_ref.dtypes import Float32, Float64
from nsq_ref.rivals.codec import Codec, Parts, Values, whole

__all__ = ["Rotated"]


@dataclass(frozen=True)
class Rotated(Codec):
    """Hadamard's rotation of the channels as preprocessing of another codec.

    Parameters
    ----------
    inner : Codec
    least : int
        The head_dim must be a multiple of it.
    largest : int, optional
        Channels that are rotated together at most. Without it, as many as the largest power of two
        that divides the head_dim.

    Examples
    --------
    >>> from nsq_ref import Scheme
    >>> from nsq_ref.rivals import SchemeCodec
    >>> x = np.zeros((1, 64), np.float32)
    >>> x[0, 3] = 1
    >>> plain, rotated = SchemeCodec(Scheme.named("naive8")), np.abs(hadamard(x, 64))
    >>> float(rotated.min()), float(rotated.max())
    (0.125, 0.125)
    >>> bool(np.allclose(Rotated(plain)(x).x_hat, x, atol=1e-4))
    True
    """

    inner: Codec
    least: int = 64
    largest: int | None = None

    def coded(self, tokens: int) -> tuple[int, int]:
        """Return what the other codec codes."""
        return self.inner.coded(tokens)

    def encode(self, x: Float32) -> Parts:
        """Rotate, and encode."""
        return self.inner.encode(hadamard(x, self._size(x.shape)))

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Decode, and rotate back."""
        return hadamard(self.inner.decode(parts, shape), self._size(shape))

    def _size(self, shape: tuple[int, ...]) -> int:
        whole(shape, -1, self.least, "the rotation")
        size = shape[-1] & -shape[-1]
        return size if self.largest is None else min(size, self.largest)


def hadamard(x: Float32, size: int) -> Float32:
    """Rotate every ``size`` channels by Hadamard's matrix of length 1; it is its own inverse.

    Examples
    --------
    >>> hadamard(np.float32([[1, 0, 1, 1]]), 2).round(3)
    array([[0.707, 0.707, 1.414, 0.   ]], dtype=float32)
    """
    rotated, step = x, 1
    while step < size:
        pairs = rotated.reshape(*x.shape[:-1], -1, 2, step)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        rotated = np.stack([first + second, first - second], axis=-2).reshape(x.shape)
        step *= 2
    scaled: Float32 = rotated * np.float32(size**-0.5)
    return scaled


def power_of_two(shape: tuple[int, ...], method: str) -> int:
    """Return the head_dim, refusing one that is no power of two.

    Examples
    --------
    >>> power_of_two((10, 64), "OScaR")
    64
    """
    size = shape[-1]
    if size & (size - 1):
        raise ValueError(
            f"x has head_dim {size}; {method} rotates a power of two, as published; take another "
            "codec for this model"
        )
    return size


@functools.lru_cache(maxsize=8)
def haar(size: int, seed: int = 0) -> Float64:
    """Draw a rotation of so many channels, all alike probable; the same for a seed.

    Examples
    --------
    >>> bool(np.allclose(haar(5) @ haar(5).T, np.eye(5)))
    True
    """
    drawn = np.random.default_rng(seed).standard_normal((size, size))
    q, r = np.linalg.qr(drawn)
    rotation: Float64 = q * np.sign(np.diagonal(r))
    rotation.flags.writeable = False
    return rotation

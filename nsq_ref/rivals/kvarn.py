"""KVarN: tiles whose tokens and channels are brought to one variance in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from nsq_ref.dtypes import Array, Float32
from nsq_ref.rivals.codec import Codec, Part, Parts, Values, half
from nsq_ref.rivals.grouped import by_tokens
from nsq_ref.rivals.rotation import hadamard, power_of_two

__all__ = ["Kvarn"]


@dataclass(frozen=True)
class Kvarn(Codec):
    """Rotated channels, a scale a token and a scale a channel of each tile, codes by row.

    Rows are channels for keys, tokens for values; each has a scale and a minimum, in which its
    variance is contained. The first ``sinks`` tokens and a tile that is not full are kept.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((1, 300, 64), dtype=np.float32)
    >>> stored = Kvarn("key", bits=4)(x)
    >>> stored.kept_elements / 64, stored.sealed_bits / stored.sealed_elements
    (172.0, 4.5)
    """

    side: Literal["key", "value"]
    bits: int
    tile: int = 128
    sinks: int = 128
    iterations: int = 16

    def coded(self, tokens: int) -> tuple[int, int]:
        """Return the full tiles behind the sinks."""
        first = min(self.sinks, tokens)
        return first, tokens - (tokens - first) % self.tile

    def encode(self, x: Float32) -> Parts:
        """Balance each tile and code its rows."""
        tiles = self._tiles(hadamard(x, power_of_two(x.shape, "KVarN")))
        column, row = balance(tiles, self.iterations)
        even = tiles / column / row
        low, high = even.min(axis=-1, keepdims=True), even.max(axis=-1, keepdims=True)
        levels = np.float32(2**self.bits - 1)
        scale = np.maximum((high - low) / levels, np.float32(1e-10))
        codes = np.clip(np.rint((even - low) / scale), 0, levels).astype(np.uint8)
        return {
            "codes": Part(codes, self.bits), "scale": Part(half("a scale", row * scale), 16),
            "minimum": Part(half("a minimum", row * low), 16),
            "other_scale": Part(half("a scale", column), 16),
        }  # fmt: skip

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Read rows back, scale columns, and rotate back."""
        scale, minimum, column = (
            parts[name].astype(np.float32) for name in ("scale", "minimum", "other_scale")
        )
        tiles = (parts["codes"].astype(np.float32) * scale + minimum) * column
        tiles = np.swapaxes(tiles, -1, -2) if self.side == "key" else tiles
        return hadamard(tiles.reshape(shape), shape[-1])

    def _tiles(self, x: Float32) -> Float32:
        tiles = by_tokens(x, self.tile)
        return np.swapaxes(tiles, -1, -2) if self.side == "key" else tiles


def balance(tiles: Float32, iterations: int) -> tuple[Float32, Float32]:
    """Return scales of columns and of rows under which standard deviations differ least.

    Examples
    --------
    >>> tile = np.array([[1, -1], [2, -3]], np.float32)
    >>> column, row = balance(tile, 16)
    >>> (tile / column / row).std(axis=-1, ddof=1).round(2)
    array([1., 1.], dtype=float32)
    """
    column: Array = np.zeros_like(tiles[..., :1, :])
    row: Array = np.zeros_like(tiles[..., :, :1])
    best, least = (np.exp(column), np.exp(row)), imbalance(tiles)
    for _ in range(iterations):
        column = np.clip(column + _log_deviation(_scaled(tiles, column, row), -2), -0.3, 10)
        row = np.clip(row + _log_deviation(_scaled(tiles, column, row), -1), -0.3, 10)
        reached = imbalance(_scaled(tiles, column, row))
        better = reached <= least
        least = np.where(better, reached, least)
        best = (np.where(better, np.exp(column), best[0]), np.where(better, np.exp(row), best[1]))
    return best


def imbalance(tiles: Float32) -> Float32:
    """Return the largest over the smallest deviation, of columns plus of rows.

    Examples
    --------
    >>> imbalance(np.float32([[1, -1], [2, -2]])).item()
    3.0
    """
    total = np.zeros((*tiles.shape[:-2], 1, 1), np.float32)
    for axis in (-2, -1):
        deviation = tiles.std(axis=axis, ddof=1, keepdims=True)
        smallest = np.maximum(deviation.min(axis=(-2, -1), keepdims=True), np.float32(1e-8))
        total = total + deviation.max(axis=(-2, -1), keepdims=True) / smallest
    return total


def _scaled(tiles: Float32, column: Array, row: Array) -> Float32:
    scaled: Float32 = (tiles / np.exp(column) / np.exp(row)).astype(np.float32)
    return scaled


def _log_deviation(tiles: Float32, axis: int) -> Array:
    deviation = tiles.std(axis=axis, ddof=1, keepdims=True)
    logarithm: Array = np.log(np.clip(deviation, np.float32(1e-3), np.float32(1e3)))
    return logarithm

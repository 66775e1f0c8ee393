"""Codes from codebooks that no data made: NSNQuant and TurboQuant."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from nsq_ref.dtypes import Array, Float32, Float64
from nsq_ref.rivals.codec import Codec, Part, Parts, Values, divided, half, length, whole
from nsq_ref.rivals.grouped import by_tokens
from nsq_ref.rivals.rotation import haar, hadamard, power_of_two

__all__ = ["NsnQuant", "TurboQuant"]


@dataclass(frozen=True)
class NsnQuant(Codec):
    """Normalise, shift, normalise, rotate; then 8 channels at a time by a codebook of 256.

    At 2 bits the codebook has magnitudes, and signs are stored apart. Tokens that do not fill a
    ``chunk`` are kept.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((1, 64, 64), dtype=np.float32)
    >>> NsnQuant(bits=2)(x).bits_per_element  # signs and indices 2, two scales .5, the shift .25
    2.75
    """

    bits: int
    chunk: int = 64

    def coded(self, tokens: int) -> tuple[int, int]:
        """Return all full chunks."""
        return 0, tokens - tokens % self.chunk

    def encode(self, x: Float32) -> Parts:
        """Bring chunks to a standard normal distribution, and find the codes of best direction."""
        whole(x.shape, -1, 8, "NSNQuant")
        root = np.float32(x.shape[-1] ** 0.5)
        chunks = by_tokens(x, self.chunk)
        first = half("a norm", length(chunks) / root)
        unit = divided(chunks, first)
        shift = half("a mean", unit.mean(axis=-2, keepdims=True))
        centred = unit - shift
        second = half("a norm", length(centred) / root)
        rotated = hadamard(divided(centred, second), power_of_two(x.shape, "NSNQuant"))
        eights = rotated.reshape(*rotated.shape[:-1], -1, 8)
        wanted = np.abs(eights) if self.bits == 2 else eights
        index = nearest(wanted, directions(self.bits == 2))
        parts = {
            "index": Part(index, 8), "first": Part(first, 16), "shift": Part(shift, 16),
            "second": Part(second, 16),
        }  # fmt: skip
        return parts | ({"signs": Part(eights < 0, 1)} if self.bits == 2 else {})

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Look codes up, give tokens their length, and undo the steps in turn."""
        first, shift, second = (
            parts[name].astype(np.float32) for name in ("first", "shift", "second")
        )
        eights = directions(self.bits == 2)[parts["index"]]
        if self.bits == 2:
            eights = np.where(parts["signs"], -eights, eights)
        rotated = eights.reshape(*first.shape[:-1], shape[-1])
        rotated = divided(rotated, length(rotated)) * np.float32(shape[-1] ** 0.5)
        centred = hadamard(rotated, shape[-1]) * second
        restored: Float32 = ((centred + shift) * first).reshape(shape)
        return restored


@dataclass(frozen=True)
class TurboQuant(Codec):
    """A random rotation, each coordinate by the best scalar codebook of a sphere, a norm a token.

    With the correction of the norm that implementations have, the norm stored is that over the
    length of what the codes decode to.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((4, 128), dtype=np.float32)
    >>> TurboQuant(bits=4)(x).bits_per_element
    4.125
    """

    bits: int
    correct_norm: bool = True
    seed: int = 0

    def encode(self, x: Float32) -> Parts:
        """Rotate directions and take the nearest code of each coordinate."""
        norm = length(x)
        book = sphere_codebook(x.shape[-1], self.bits)
        rotated = divided(x, norm).astype(np.float64) @ haar(x.shape[-1], self.seed).T
        codes = np.searchsorted((book[1:] + book[:-1]) / 2, rotated).astype(np.uint8)
        reached = length(book[codes].astype(np.float32))
        stored = divided(norm, reached) if self.correct_norm else norm
        return {"codes": Part(codes, self.bits), "norm": Part(half("a norm", stored), 16)}

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Look codes up, rotate back, and multiply by the norm."""
        book = sphere_codebook(shape[-1], self.bits)
        direction = (book[parts["codes"]] @ haar(shape[-1], self.seed)).astype(np.float32)
        restored: Float32 = direction * parts["norm"].astype(np.float32)
        return restored


def nearest(x: Float32, book: Float32, rows: int = 1 << 15) -> Array:
    """Return the index of the direction next to each vector, a few vectors at a time.

    Examples
    --------
    >>> nearest(np.float32([[3, 1], [1, 2]]), np.eye(2, dtype=np.float32))
    array([0, 1], dtype=uint8)
    """
    flat = x.reshape(-1, x.shape[-1])
    index = np.empty(len(flat), np.uint8)
    for start in range(0, len(flat), rows):
        index[start : start + rows] = (flat[start : start + rows] @ book.T).argmax(axis=-1)
    return index.reshape(x.shape[:-1])


@functools.lru_cache(maxsize=2)
def directions(positive: bool, samples: int = 1 << 14, steps: int = 12) -> Float32:
    """Return 256 directions of 8 coordinates: spherical k-means of a normal distribution.

    Examples
    --------
    >>> book = directions(positive=True)
    >>> book.shape, bool((book >= 0).all()), bool(np.allclose(length(book), 1))
    ((256, 8), True, True)
    """
    drawn = np.random.default_rng(0).standard_normal((samples, 8))
    drawn = np.abs(drawn) if positive else drawn
    drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
    book = drawn[:256]
    for _ in range(steps):
        sums = np.zeros_like(book)
        np.add.at(sums, (drawn @ book.T).argmax(axis=-1), drawn)
        size = np.linalg.norm(sums, axis=-1, keepdims=True)
        book = np.where(size > 0, sums / np.where(size > 0, size, 1), book)
    return _frozen(book.astype(np.float32))


@functools.lru_cache(maxsize=32)
def sphere_codebook(head_dim: int, bits: int) -> Float64:
    """Return the Lloyd-Max codebook of one coordinate of a random direction.

    Examples
    --------
    >>> (sphere_codebook(128, 1) * 128**0.5).round(2)  # nearly that of a normal distribution
    array([-0.8,  0.8])
    """
    if head_dim < 3:
        raise ValueError(f"x has head_dim {head_dim}; TurboQuant's codebook needs at least 3")
    grid = np.linspace(-1, 1, (1 << 16) + 1)
    density = (1 - grid**2) ** ((head_dim - 3) / 2)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    moments = grid * density
    moment = np.concatenate([[0], np.cumsum((moments[1:] + moments[:-1]) / 2)])
    count = 2**bits
    book = np.interp((np.arange(count) + 0.5) / count * mass[-1], mass, grid)
    for _ in range(2000):
        edges = np.concatenate([[-1], (book[1:] + book[:-1]) / 2, [1]])
        better = np.diff(np.interp(edges, grid, moment)) / np.diff(np.interp(edges, grid, mass))
        moved, book = np.abs(better - book).max(), better
        if moved < 1e-12:
            break
    return _frozen((book - book[::-1]) / 2)


def _frozen(book: Array) -> Array:
    book.flags.writeable = False
    return book

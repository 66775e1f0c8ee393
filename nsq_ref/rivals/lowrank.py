"""Low rank: principal components of a head, and GEAR, which codes and mends the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from nsq_ref.dtypes import Array, Float32
from nsq_ref.rivals.codec import Codec, Part, Parts, Values, half
from nsq_ref.rivals.grouped import asymmetric, asymmetric_back, by_channels

__all__ = ["Gear", "LowRank"]


@dataclass(frozen=True)
class LowRank(Codec):
    """The mean token of a head, its first principal components, and coefficients, in float16.

    Examples
    --------
    >>> x = np.arange(12, dtype=np.float32).reshape(1, 4, 3)  # of rank 1 about its mean
    >>> bool(np.allclose(LowRank(1)(x).x_hat, x, atol=0.02))
    True
    """

    rank: int

    def encode(self, x: Float32) -> Parts:
        """Take the components of largest variance."""
        rank = min(self.rank, *x.shape[-2:])
        mean = half("a mean", x.mean(axis=-2, keepdims=True))
        centred = x.astype(np.float64) - mean
        _, vectors = np.linalg.eigh(np.swapaxes(centred, -1, -2) @ centred)
        basis = half("a component", np.swapaxes(vectors[..., -rank:], -1, -2))
        coefficients = centred @ np.swapaxes(basis.astype(np.float64), -1, -2)
        return {
            "mean": Part(mean, 16), "basis": Part(basis, 16),
            "coefficients": Part(half("a coefficient", coefficients), 16),
        }  # fmt: skip

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Coefficients times components, plus mean."""
        mean, basis, coefficients = (
            parts[name].astype(np.float32) for name in ("mean", "basis", "coefficients")
        )
        restored: Float32 = coefficients @ basis + mean
        return restored


@dataclass(frozen=True)
class Gear(Codec):
    """GEAR: outliers apart in float16, the rest as KIVI, and a low rank of the error.

    Vectors are channels of all tokens for keys, tokens of all heads for values; half of
    ``sparsity`` of the elements of each are its largest, half its smallest.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((2, 130, 32), dtype=np.float32)
    >>> stored = Gear("key", bits=4)(x)
    >>> stored.kept_elements / (2 * 32), stored.sealed_bits / stored.sealed_elements
    (2.0, 7.5)
    """

    side: Literal["key", "value"]
    bits: int
    group: int = 64
    sparsity: float = 0.02
    rank: int = 4
    loops: int = 3
    seed: int = 0

    def coded(self, tokens: int) -> tuple[int, int]:
        """Return all whole groups of tokens."""
        return 0, tokens - tokens % self.group

    def encode(self, x: Float32) -> Parts:
        """Code without the outliers; then the low rank of what is wrong."""
        vectors = np.swapaxes(x, -1, -2) if self.side == "key" else tokens_of_all_heads(x)
        size = vectors.shape[-1]
        count = int(size * self.sparsity / 2)
        order = np.argsort(vectors, axis=-1, kind="stable")
        place = np.concatenate([order[..., :count], order[..., size - count :]], axis=-1)
        outliers = half("an outlier", np.take_along_axis(vectors, place, -1))
        filled = vectors.copy()
        np.put_along_axis(filled, place, vectors.mean(axis=-1, keepdims=True), -1)
        parts = asymmetric(by_channels(filled, self.group, "GEAR"), self.bits, -1)
        parts["outliers"] = Part(outliers, 16)
        parts["index"] = Part(place.astype(np.uint32), 16 if size <= 2**16 else 32)
        error = x - self._coarse({name: part.values for name, part in parts.items()}, x.shape)
        left, right = power_iteration(error, self.rank, self.loops, self.seed)
        factors = {"left": half("a factor", left), "right": half("a factor", right)}
        return parts | {name: Part(factor, 16) for name, factor in factors.items()}

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Codes and outliers, plus the low rank."""
        left, right = (parts[name].astype(np.float32) for name in ("left", "right"))
        restored: Float32 = self._coarse(parts, shape) + left @ np.swapaxes(right, -1, -2)
        return restored

    def _coarse(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        groups = asymmetric_back(parts)
        vectors = groups.reshape(*groups.shape[:-2], -1)
        outliers = parts["outliers"].astype(np.float32)
        np.put_along_axis(vectors, parts["index"].astype(np.int64), outliers, -1)
        return np.swapaxes(vectors, -1, -2) if self.side == "key" else heads_apart(vectors, shape)


def tokens_of_all_heads(x: Float32) -> Float32:
    """Put the channels of all heads of a token side by side, ``[..., T, H * D]``.

    Examples
    --------
    >>> tokens_of_all_heads(np.zeros((3, 5, 4), np.float32)).shape
    (5, 12)
    """
    if x.ndim == 2:
        return x
    together = np.moveaxis(x, -3, -2)
    return together.reshape(*together.shape[:-2], -1)


def heads_apart(vectors: Float32, shape: tuple[int, ...]) -> Float32:
    """Undo `tokens_of_all_heads`.

    Examples
    --------
    >>> heads_apart(np.zeros((5, 12), np.float32), (3, 5, 4)).shape
    (3, 5, 4)
    """
    if len(shape) == 2:
        return vectors
    apart = vectors.reshape(*shape[:-3], shape[-2], shape[-3], shape[-1])
    return np.moveaxis(apart, -2, -3)


def power_iteration(x: Float32, rank: int, loops: int, seed: int) -> tuple[Array, Array]:
    """Return factors of a low rank of ``x``, ``[..., T, rank]`` and ``[..., D, rank]``.

    Examples
    --------
    >>> left, right = power_iteration(np.outer([1, 2], [3, 4]).astype(np.float32), 1, 2, 0)
    >>> (left @ right.T).round(3)
    array([[3., 4.],
           [6., 8.]])
    """
    wide, across = x.astype(np.float64), np.swapaxes(x, -1, -2).astype(np.float64)
    rank = min(rank, *x.shape[-2:])
    start = np.random.default_rng(seed).random((x.shape[-1], rank))
    right = np.broadcast_to(start, (*x.shape[:-2], *start.shape))
    left = wide @ right
    for loop in range(loops):
        last = loop == loops - 1
        right = np.linalg.qr(right).Q if last else right
        left = wide @ right
        left = np.linalg.qr(left).Q if last else left
        right = across @ left
    return left, right

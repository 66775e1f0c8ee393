"""Large inputs from a seed: integers that every language makes alike (`docs/vectors.md`)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nsq_ref.dtypes import Array


class Recipe(NamedTuple):
    """How an input is made: integers of a seed, and some elements that are set.

    Examples
    --------
    >>> Recipe((2, 3), 7, ((1, 2, 4096),)).make("float32").tolist()
    [[49.0, 7.0, 4.0], [13.0, -25.0, 4096.0]]
    """

    shape: tuple[int, ...]
    seed: int
    set: tuple[tuple[int, ...], ...] = ()  # index and value

    def make(self, dtype: str | np.dtype[np.generic]) -> Array:
        """Return the array; all its values are whole, and exact in every dtype of inputs."""
        z = np.arange(math.prod(self.shape), dtype=np.uint32) * np.uint32(0x9E3779B9)
        z += np.uint32(self.seed)
        z ^= z >> np.uint32(16)
        z *= np.uint32(0x21F0AAAD)
        z ^= z >> np.uint32(15)
        z *= np.uint32(0x735A2D97)
        z ^= z >> np.uint32(15)
        values = (z & np.uint32(63)).astype(np.int64) + (z >> np.uint32(8) & np.uint32(63)) - 63
        x = values.reshape(self.shape).astype(np.float32)
        for *index, value in self.set:
            x[tuple(index)] = value
        return np.asarray(x.astype(dtype))

"""Rows that rounding gets wrong, for tests of rounding itself."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


def neighbours(values: Float32) -> Float32:
    """Each value with its two float32 neighbours."""
    down = np.nextafter(values, np.float32(-np.inf))
    up = np.nextafter(values, np.float32(np.inf))
    return np.concatenate([down, values, up]).astype(np.float32)


def norm_ties() -> Float32:
    """Norms on a float32 midpoint, and off it by less than float64 can see (N1)."""
    rows = []
    for exponent, last in itertools.product((0, -40, 40), (0, 1, -1)):
        unit = 2.0**exponent
        tie = [unit, unit * 2.0**-12, unit * 2.0**-12, unit * 2.0**-24]
        rows.append([*tie, unit * 2.0**-30 if last == 1 else 0.0])
        if last == -1:  # a little below the tie: the last square is what would complete it
            rows[-1][3] = float(np.nextafter(np.float32(rows[-1][3]), np.float32(0)))
    return np.float32(rows)


def norm_order(count: int = 64) -> Float32:
    """Norms that float32 accumulation gets wrong."""
    return np.random.default_rng(2).standard_normal((count, 96)).astype(np.float32)


def spread(shape: tuple[int, int]) -> Float32:
    """Norms from 1e-30 to 1e30, an outlier channel of 1000 times, a zero token and channel."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal(shape) * 10.0 ** np.linspace(-30, 30, shape[0])[:, None]
    x[:, 0] *= 1000
    x[shape[0] // 2] = 0
    x[:, -1] = -0.0
    return x.astype(np.float32)

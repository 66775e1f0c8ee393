"""A search for the inputs on which an error comes closest to its bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref import RangeError, Scheme, bounds, quantize

Float32 = npt.NDArray[np.float32]
Objective = Callable[[Float32, Scheme], float]


class Found(NamedTuple):
    """The input found, and its measured error over the bound."""

    x: Float32
    ratio: float


def climb(
    objective: Objective, scheme: Scheme, tokens: int, head_dim: int, *, seed: int, steps: int
) -> Found:
    """Climb from a random block ``[T, D]`` to one of larger `objective`, a change at a time.

    Starts with one-hot tokens, which make the scales as large as they can be, positive ones before
    negative ones, and one dense token last, which the objective is about. Most changes move one
    element next to a tie between two codes, where its error is largest.
    """
    rng = np.random.default_rng(seed)
    x = np.zeros((tokens, head_dim), np.float32)
    rows = np.arange(tokens - 1)
    x[rows, rows % head_dim] = (-1.0) ** (rows // head_dim)
    x[-1] = rng.standard_normal(head_dim)
    best = Found(x, _value(objective, x, scheme))
    for _ in range(steps):
        x = _changed(best.x, scheme, rng)
        ratio = _value(objective, x, scheme)
        if np.isfinite(ratio) and ratio >= best.ratio:
            best = Found(x, ratio)
    return best


def _value(objective: Objective, x: Float32, scheme: Scheme) -> float:
    try:
        return objective(x, scheme)
    except RangeError:
        return -np.inf


def _changed(x: Float32, scheme: Scheme, rng: np.random.Generator) -> Float32:
    """Return the block with a token rescaled, an element jittered, or elements put on ties."""
    x = x.copy()
    token = -1 if rng.random() < 0.8 else rng.integers(len(x))
    channel = rng.integers(x.shape[1])
    kind = rng.random()
    if kind < 0.1:
        x[token] *= np.float32(2.0 ** rng.uniform(-2, 2))
    elif kind < 0.3:
        x[token, channel] += np.float32(rng.normal() * 10.0 ** rng.uniform(-6, 0))
    elif kind < 0.35:
        x[token, channel] *= -1
    else:
        known = bounds.encoder_bounds(x, quantize(x, scheme))
        ends = known.direction[rng.integers(2)][token] * known.norm.high[token]
        chosen = slice(None) if kind > 0.9 else channel
        x[token, chosen] = ends[chosen]
        x[token, channel] = np.nextafter(x[token, channel], np.float32(rng.choice([-9, 9])))
    return np.clip(x, -1e30, 1e30)

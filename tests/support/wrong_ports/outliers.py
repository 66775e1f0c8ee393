"""Outlier channels (rule O1)."""

from __future__ import annotations

import numpy as np

from tests.support.wrong_ports.exact import F64, Array
from tests.support.wrong_ports.knobs import Knobs


def outlier_channels(direction: Array, kept: int, knobs: Knobs) -> Array:
    """Return the ascending indices of the channels that are kept."""
    size = np.abs(direction.astype(F64))
    ranks = {
        "peak": lambda: size.max(axis=0),
        "mean": lambda: size.mean(axis=0),
        "square": lambda: (size**2).sum(axis=0),
        "value": lambda: direction.max(axis=0),
        "median": lambda: np.median(size, axis=0),
    }
    rank = ranks[knobs.rank]()
    sign = -1 if knobs.equals == "higher" else 1
    order = sorted(range(len(rank)), key=lambda j: (-rank[j], sign * j))
    return np.array(sorted(order[:kept]), int)

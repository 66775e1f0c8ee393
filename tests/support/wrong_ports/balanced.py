"""Balanced norms (rule N3): the sizes of channels, and whether they count."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from nsq_ref import Scheme
from tests.support.wrong_ports.exact import F32, F64, Array, exact_length, nothing
from tests.support.wrong_ports.knobs import Knobs

PEAKS: dict[str, Callable[[Array], Any]] = {
    "largest": lambda column: np.max(np.abs(column)),
    "mean square": lambda column: F32(np.sqrt(np.mean(column.astype(F64) ** 2))),
    "mean": lambda column: F32(np.mean(np.abs(column.astype(F64)))),
    "signed": lambda column: np.abs(np.max(column)),
    "median": lambda column: np.median(np.abs(column)),
    "range": lambda column: np.max(column) - np.min(column),
}


def sizes_of(x: Array, scheme: Scheme, knobs: Knobs, whole: Array | None = None) -> Array:
    """Return by what the channels of a block count: 1 where its norms are plain."""
    x = x.astype(F32)
    ones = np.ones(x.shape[1], F32)
    if scheme.norm_rule == "plain" or knobs.choice == "never":
        return ones
    measured = x if whole is None or knobs.size_of == "block" else whole.astype(F32)
    peaks = np.array([PEAKS[knobs.peak](column) for column in measured.T], F32)
    largest = F32(1) if knobs.peak_share == "itself" else nothing(np.max(peaks))
    size = np.maximum(peaks / largest, F32(knobs.least_size))
    size = np.where(size == 0, F32(1), size)
    balanced = norms_over(x, size, knobs)
    if not np.isfinite(balanced).all():
        if knobs.balanced_overflow == "refuse":
            raise OverflowError("a balanced norm is beyond float32")
        return ones
    spreads = spread(x, balanced, knobs), spread(x, norms_over(x, ones, knobs), knobs)
    taken = {
        "less": spreads[0] < spreads[1], "always": True, "or equal": spreads[0] <= spreads[1],
    }[knobs.choice]  # fmt: skip
    return size if taken else ones


def norms_over(x: Array, size: Array, knobs: Knobs) -> Array:
    """Return the lengths of the tokens' elements over size; infinity where one is not finite."""
    over = x * (F32(1) / size) if knobs.over_size == "reciprocal" else x / size
    return np.array([exact_length(row) if np.isfinite(row).all() else F32(np.inf) for row in over])


def spread(x: Array, norm: Array, knobs: Knobs) -> float:
    """Return by how much norms spread the directions of a block."""
    kept = norm != 0 if knobs.zero_tokens_out else np.ones(len(norm), bool)
    direction, x = (x / nothing(norm)[:, None])[kept], x[kept]
    if math.inf in norm or not len(x):
        return math.inf if len(x) else 0.0
    power = 1 if knobs.growth == "plain" else 2
    norms = growths = 0.0
    for one in norm[kept].tolist():
        norms += one * one
    for after, before in zip(np.ptp(direction, axis=0), np.ptp(x, axis=0), strict=True):
        if after:
            growths += float(after / before) ** power if before else math.inf
    if knobs.growth == "left out":
        return norms
    return growths if knobs.spread == "growth" else norms * growths

"""Norms and directions (rules N1, N2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from nsq_ref import Scheme
from nsq_ref.dtypes import FLOAT_DTYPES
from tests.support.wrong_ports.balanced import norms_over
from tests.support.wrong_ports.exact import F16, F32, F64, Array, exact_length, integers, nothing
from tests.support.wrong_ports.knobs import Knobs
from tests.support.wrong_ports.narrowing import narrowed


def one_by_one(row: Array) -> Any:
    total = row.dtype.type(0)
    for v in row:
        total = total + v * v
    return total


def fused(row: Array) -> np.float32:
    total = F32(0)
    for v in row:
        total = F32(F64(v) * F64(v) + F64(total))
    return total


def tree(row: Array) -> np.float32:
    terms = list(row * row)
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(terms) - len(terms) % 2 :]
    return F32(terms[0])


def lanes(row: Array, count: int) -> np.float32:
    sums = [F32(0)] * count
    for j, v in enumerate(row):
        sums[j % count] = sums[j % count] + v * v
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
    return sums[0]


def rounded_down(row: Array) -> np.float32:
    right = exact_length(row)
    exact = sum(v * v for v in integers(row))
    inside = Fraction(float(right)) ** 2 * 2**298 <= exact
    return right if inside else np.nextafter(right, F32(0))


def by_logarithm(row: Array) -> np.float32:
    largest = np.max(np.abs(row))
    if largest == 0:
        return F32(0)
    total = math.fsum((v / float(largest)) ** 2 for v in row.tolist())
    return F32(np.exp(F32(0.5) * np.log(F32(total))) * largest)


NORMS: dict[str, Callable[[Array], Any]] = {
    "exact": exact_length,
    "one by one": lambda row: np.sqrt(one_by_one(row)),
    "last to first": lambda row: np.sqrt(one_by_one(row[::-1])),
    "fused": lambda row: np.sqrt(fused(row)),
    "tree": lambda row: np.sqrt(tree(row)),
    "np.sum": lambda row: np.sqrt(np.sum(row * row)),
    "np.linalg": lambda row: F32(np.linalg.norm(row)),
    "4 lanes": lambda row: np.sqrt(lanes(row, 4)),
    "32 lanes": lambda row: np.sqrt(lanes(row, 32)),
    "float16": lambda row: F32(np.sqrt(one_by_one(row.astype(F16)))),
    "float64": lambda row: F32(np.sqrt(np.sum(row.astype(F64) ** 2))),
    "order 1": lambda row: F32(np.sum(np.abs(row.astype(F64)))),
    "order -1": lambda row: F32(np.linalg.norm(row.astype(F64), -1)),
    "order inf": lambda row: np.max(np.abs(row)),
    "square": lambda row: F32(np.sum(row.astype(F64) ** 2)),
    "mean": lambda row: F32(np.sqrt(np.mean(row.astype(F64) ** 2))),
    "rounded down": rounded_down,
    "logarithm": by_logarithm,
    "even channels": lambda row: exact_length(row[::2]),
    "first 64": lambda row: exact_length(row[:64]),
    "last one out": lambda row: exact_length(row[:-1]),
    "hypot": lambda row: F32(np.hypot.reduce(row)),
}


def norms_of(x: Array, knobs: Knobs, how: str = "") -> Array:
    function = NORMS[how or knobs.norm]
    return np.array([function(row) for row in x], F32).reshape(len(x))


def normed(
    x: Array, scheme: Scheme, knobs: Knobs, size: Array | None = None
) -> tuple[Array, Array]:
    """Return norms, of elements over the sizes of channels if these count, and directions."""
    if not scheme.separate_norm:
        return np.ones(len(x), F32), x.astype(F32)
    if knobs.compute == "input" and x.dtype != F32:
        norm = np.array([np.sqrt(one_by_one(row)) for row in x], x.dtype)
        return norm.astype(F32), (x / nothing(norm)[:, None]).astype(F32)
    wide = x.astype(F32)
    norm = norms_of(wide, knobs)
    if size is not None and (size != 1).any():
        norm = norms_over(wide, size, knobs)
        wide = wide / size if knobs.sized_direction else wide
    if np.isinf(norm).any() and knobs.factor_overflow == "refuse":
        raise OverflowError("a norm is beyond float32")
    if (norm > F32(knobs.most_norm)).any():
        raise OverflowError("a norm is too large")
    if knobs.least_valid_norm:
        norm = np.where(norm < F32(knobs.least_valid_norm), F32(0), norm)
    by = norm
    if knobs.direction == "narrowed":
        by = narrowed(norm, FLOAT_DTYPES[scheme.norm_dtype]).astype(F32)
    if knobs.epsilon:
        by = by + F32(knobs.epsilon)
    if knobs.least_norm:
        by = np.maximum(by, F32(knobs.least_norm))
    if knobs.square_epsilon:
        total = np.sum(wide.astype(F64) ** 2, axis=1) + knobs.square_epsilon
        by = np.sqrt(total).astype(F32)
    by = nothing(by)[:, None]
    if knobs.direction == "reciprocal":
        return norm, wide * (F32(1) / by)
    if knobs.direction == "float64":
        length = nothing(np.sqrt(np.sum(wide.astype(F64) ** 2, axis=1)))
        return norm, (wide / length[:, None]).astype(F32)
    if knobs.direction == "float16":
        return norm, (wide / by).astype(F16).astype(F32)
    return norm, wide / by

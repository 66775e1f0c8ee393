"""The stored factor (rules M1 to M4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nsq_ref import Scheme
from nsq_ref.dtypes import FLOAT_DTYPES
from tests.support.wrong_ports.exact import F16, F32, F64, Array, nothing, ratio
from tests.support.wrong_ports.knobs import RIGHT, Knobs
from tests.support.wrong_ports.narrowing import narrowed, overflowing, positive_zero
from tests.support.wrong_ports.norms import norms_of, one_by_one


def factors(x: Array, y: Array, norm: Array, scheme: Scheme, knobs: Knobs, size: Array) -> Array:
    dtype = FLOAT_DTYPES[scheme.norm_dtype]
    how = "saturate" if knobs.factor_overflow == "saturate" else knobs.factor_narrowing
    x64, y64 = x.astype(F64), y.astype(F64)
    wide: Array = norm
    if scheme.magnitude == "norm":
        if knobs.stored_norm == "float64":
            wide, how = np.sqrt((x64**2).sum(axis=1)), "float64"
        elif knobs.stored_norm == "gain":
            wide = norm / nothing(norms_of(y, RIGHT))
        elif knobs.stored_norm == "float16 first":
            wide = norm.astype(F16).astype(F32)
    elif scheme.magnitude == "gain":
        y = y / size if knobs.sized_gain else y
        length = nothing(norms_of(y, RIGHT))
        ways: dict[str, Callable[[], Array]] = {
            "right": lambda: norm / length,
            "norm": lambda: norm,
            "reciprocal": lambda: norm * (F32(1) / length),
            "float32 length": lambda: norm / nothing(norms_of(y, RIGHT, "one by one")),
            "inverse": lambda: length / nothing(norm),
            "float64": lambda: np.sqrt((x64**2).sum(1)) / nothing(np.sqrt((y64**2).sum(1))),
            "mean ratio": lambda: np.sum(np.abs(x64), 1) / nothing(np.sum(np.abs(y64), 1)),
        }
        wide = ways[knobs.gain]()
        how = "float64" if knobs.gain == "float64" else how
        wide = np.where(np.any(y != 0, axis=1) | (knobs.gain == "norm"), wide, 0)
    else:
        squares = nothing(np.array([one_by_one(row) for row in y], F32))
        products = np.array([np.add.accumulate(a * b)[-1] for a, b in zip(x, y, strict=True)], F32)
        ways = {
            "right": lambda: np.array([ratio(a, b) for a, b in zip(x, y, strict=True)], F32),
            "float32": lambda: products / squares,
            "float64": lambda: (x64 * y64).sum(1) / nothing((y64**2).sum(1)),
            "float64 rounded": lambda: (
                (x64 * y64).sum(1) / nothing((y64**2).sum(1))).astype(F32),
            "over x": lambda: ((x64 * y64).sum(1) / nothing((x64**2).sum(1))).astype(F32),
            "gain": lambda: norm / nothing(norms_of(y, RIGHT)),
            "norm": lambda: norm,
            "direction": lambda: np.array(
                [ratio(a / nothing(n), b) for a, b, n in zip(x, y, norm, strict=True)], F32),
            "norm times direction": lambda: norm * np.array(
                [ratio(a / nothing(n), b) for a, b, n in zip(x, y, norm, strict=True)], F32),
        }  # fmt: skip
        wide = ways[knobs.lsq]()
        how = "float64" if knobs.lsq == "float64" else how
    stored = positive_zero(narrowed(wide, dtype, how), knobs)
    return overflowing(stored, knobs.factor_overflow, "a factor")

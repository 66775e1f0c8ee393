"""Narrowing to what is stored (rules S3, S5, M4, Z1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.wrong_ports.exact import F16, F32, F64, MOST, Array
from tests.support.wrong_ports.knobs import Knobs


def narrowed(value: Array, dtype: Any, how: str = "even") -> Array:
    value = np.asarray(value)
    if how == "float64":  # one rounding of what is wider
        return value.astype(dtype)
    value = value.astype(F32)
    result = value.astype(dtype)
    if how in ("truncate", "away"):
        wide = result.astype(F64)
        if how == "truncate":
            beyond = np.abs(wide) > np.abs(value)
            return np.where(beyond, np.nextafter(result, dtype.type(0)), result).astype(dtype)
        outward = np.nextafter(result, np.copysign(dtype.type(np.inf), result))
        tie = (np.abs(value) > np.abs(wide)) & (value - wide == outward.astype(F64) - value)
        return np.where(tie, outward, result).astype(dtype)
    if how == "saturate":
        top = {"float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120, "float32": MOST}[dtype.name]
        return np.clip(value, -top, top).astype(dtype)
    if how == "flush":
        least = 2.0**-14 if dtype == F16 else 2.0**-126
        return np.where(np.abs(result.astype(F64)) < least, dtype.type(0), result)
    return result


def positive_zero(value: Array, knobs: Knobs) -> Array:
    return value if knobs.negative_zero else np.where(value == 0, value.dtype.type(0), value)


def overflowing(value: Array, how: str, what: str) -> Array:
    """Refuse infinity, or store it, or the largest number in its place."""
    if how == "refuse" and not np.isfinite(value.astype(F64)).all():
        raise OverflowError(f"{what} is beyond {value.dtype}")
    return value


def cut_off(value: Array, dtype: Any) -> Array:
    return narrowed(narrowed(value, dtype, "truncate"), dtype, "saturate")

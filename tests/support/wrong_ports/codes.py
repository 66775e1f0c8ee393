"""Codes (rules Q1, Q2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nsq_ref import Scheme
from tests.support.wrong_ports.exact import F16, F32, F64, Array, nothing
from tests.support.wrong_ports.knobs import Knobs


def half_away(value: Array) -> Array:
    return np.copysign(np.floor(np.abs(value).astype(F64) + 0.5), value)


def half_odd(value: Array) -> Array:
    even = np.rint(value)
    return np.where(np.abs(value - np.trunc(value)) == 0.5, 2 * value.astype(F64) - even, even)


ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "half-even": np.rint,
    "half away": half_away,
    "half up": lambda v: np.floor(v.astype(F64) + 0.5),
    "half down": lambda v: np.ceil(v.astype(F64) - 0.5),
    "half to zero": lambda v: np.copysign(np.ceil(np.abs(v).astype(F64) - 0.5), v),
    "half odd": half_odd,
    "truncate": np.trunc,
    "floor": np.floor,
    "ceil": np.ceil,
    "plus half": lambda v: np.copysign(np.floor(np.abs(v) + F32(0.5)), v),
    "plus half, floor": lambda v: np.floor(v + F32(0.5)),
    "almost half": lambda v: np.trunc(v + np.copysign(F32(0.49999), v)),
    "tenths first": lambda v: np.rint(np.round(v, 1)),
}


def codes_of(
    x: Array, norm: Any, direction: Array, scale: Array, zero: Array, scheme: Scheme, knobs: Knobs
) -> Array:
    shifted = direction - zero
    by = nothing(scale + F32(knobs.scale_epsilon))
    ways: dict[str, Callable[[], Array]] = {
        "divide": lambda: shifted / by,
        "reciprocal": lambda: shifted * (F32(1) / by),
        "float64": lambda: shifted.astype(F64) / by,
        "float64 throughout": lambda: (direction.astype(F64) - zero) / by,
        "merged": lambda: x / nothing(nothing(norm)[:, None] * by) - zero / by,
        "apart": lambda: direction / by - zero / by,
        "float16": lambda: (shifted / by).astype(F16).astype(F32),
    }
    way = "divide" if norm is None and knobs.quotient == "merged" else knobs.quotient
    quotient = ways[way]()
    whole = ROUNDINGS[knobs.rounding](np.asarray(quotient))
    if knobs.code_noise:
        whole = whole + (np.arange(whole.shape[1]) == 1)
    least, most = 0, 2**scheme.bits - 1
    if scheme.symmetric:
        most = 2 ** (scheme.bits - 1) - 1
        least = -most
    if knobs.cast_first:
        whole = np.clip(np.nan_to_num(whole.astype(F64)), -(2.0**62), 2.0**62)
        whole = whole.astype(np.int64).astype(np.int8)
    whole = np.clip(whole, least - (knobs.most_negative and scheme.symmetric), most)
    return np.nan_to_num(whole).astype(np.int64)

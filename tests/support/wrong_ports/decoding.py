"""Decoding (rules D1, D3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nsq_ref import Scheme
from tests.support.wrong_ports.exact import F16, F32, F64, Array, Parts, nothing
from tests.support.wrong_ports.knobs import RIGHT, Knobs
from tests.support.wrong_ports.norms import norms_of
from tests.support.wrong_ports.packed import unpacked_rows


def dequantized(codes: Array, scale: Array, zero: Array, knobs: Knobs = RIGHT) -> Array:
    scale, zero = scale.astype(F32), zero.astype(F32)
    if knobs.product == "fused":
        return (codes.astype(F64) * scale + zero).astype(F32)
    if knobs.product == "middle":  # (u - 8) * scale + (zero + 8 * scale)
        half = F32(codes.max() // 2 + 1)
        return (codes.astype(F32) - half) * scale + (zero + half * scale)
    if knobs.zero_left_out:
        return codes.astype(F32) * scale
    return codes.astype(F32) * scale + zero


def rebuilt(y: Array, factor: Any, scheme: Scheme, knobs: Knobs) -> Array:
    if factor is None:
        return y
    factor = factor.astype(F32)[:, None]
    if scheme.magnitude != "norm" and not knobs.renormalize_gain:
        return factor * y
    length = norms_of(y, RIGHT, knobs.length)[:, None] + F32(knobs.length_epsilon)
    by = nothing(length)
    ways: dict[str, Callable[[], Array]] = {
        "right": lambda: factor * (y / by),
        "merged": lambda: (factor / by) * y,
        "product first": lambda: (factor * y) / by,
        "reciprocal": lambda: factor * (y * (F32(1) / by)),
        "float64": lambda: factor.astype(F64) * (
            y.astype(F64) / nothing(np.sqrt((y.astype(F64) ** 2).sum(1, keepdims=True)))),
        "not renormalised": lambda: factor * y,
        "by the stored norm": lambda: factor * (y / nothing(factor)),
        "unit": lambda: np.where(factor != 0, y / by, 0),
        "float16": lambda: (factor * (y / by)).astype(F16),
        "renormalised twice": lambda: factor * (
            (y / by) / nothing(norms_of(y / by, RIGHT))[:, None]),
    }  # fmt: skip
    return ways[knobs.decode]().astype(F32)


def decode_block(parts: Parts, scheme: Scheme, head_dim: int, knobs: Knobs) -> Array:
    codes = unpacked_rows(parts["packed"], scheme, head_dim, knobs)
    scale = parts["scale"]
    y = dequantized(codes, scale, parts.get("zero", np.zeros_like(scale)), knobs)
    late = scheme.outlier_channels and knobs.outliers_late
    if scheme.outlier_channels and not knobs.outliers_late and not knobs.outliers_forgotten:
        y[:, parts["outlier_index"][0]] = parts["outliers"].astype(F32)
    if knobs.decode_flush:
        y = np.where(np.abs(y) < 2.0**-126, F32(0), y)
    x_hat = rebuilt(y, parts.get("norm"), scheme, knobs)
    if late:
        kept = parts["outliers"].astype(F32)
        x_hat[:, parts["outlier_index"][0]] = (
            kept if "norm" not in parts else parts["norm"].astype(F32)[:, None] * kept
        )
    return np.where(np.abs(x_hat) < 2.0**-126, F32(0), x_hat) if knobs.decode_flush else x_hat

"""Scales and zeros (rules S1 to S5)."""

from __future__ import annotations

import numpy as np

from nsq_ref import Scheme
from nsq_ref.dtypes import FLOAT_DTYPES
from tests.support.wrong_ports.codes import codes_of
from tests.support.wrong_ports.decoding import dequantized
from tests.support.wrong_ports.exact import F32, F64, Array
from tests.support.wrong_ports.knobs import Knobs
from tests.support.wrong_ports.narrowing import narrowed, positive_zero


def extents(direction: Array, enters: Array, scheme: Scheme, knobs: Knobs) -> tuple[Array, Array]:
    """Return minimum and maximum of each scale's elements."""
    axis = 0 if scheme.axis == "channel" else 1
    if knobs.extent == "wrong axis":
        axis = 1 - axis
    chosen = np.where(enters, direction, F32(0)) if axis == 0 else direction[:, enters]
    if not chosen.shape[axis]:
        empty = np.zeros((1, chosen.shape[1]) if axis == 0 else (len(chosen), 1), F32)
        return empty, empty
    low, high = chosen.min(axis, keepdims=True), chosen.max(axis, keepdims=True)
    if knobs.extent == "quantile":
        low = np.quantile(chosen, 0.02, axis, keepdims=True).astype(F32)
        high = np.quantile(chosen, 0.98, axis, keepdims=True).astype(F32)
    elif knobs.extent == "all":
        low, high = np.broadcast_to(low.min(), low.shape), np.broadcast_to(high.max(), high.shape)
    elif knobs.extent == "signed":
        low = np.zeros_like(low)
    elif knobs.extent == "pairs" and axis == 0:  # channels 2j and 2j + 1 share a range
        for j in range(0, low.shape[1] - 1, 2):
            low[:, j : j + 2], high[:, j : j + 2] = (
                low[:, j : j + 2].min(),
                high[:, j : j + 2].max(),
            )
    elif knobs.extent == "with zero":  # a range always reaches to 0
        low, high = np.minimum(low, F32(0)), np.maximum(high, F32(0))
    elif knobs.extent == "wrong axis":
        width = direction.shape[1] if scheme.axis == "channel" else len(direction)
        low = np.resize(low.ravel(), width)
        high = np.resize(high.ravel(), width)
        shape = (1, width) if scheme.axis == "channel" else (width, 1)
        return low.reshape(shape), high.reshape(shape)
    return low, high


SHRUNKEN = (1, 0.95, 0.9, 0.85, 0.8, 0.7)


def scale_and_zero(
    low: Array, high: Array, direction: Array, enters: Array, scheme: Scheme, knobs: Knobs
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Return scale, zero and both before they were narrowed."""
    if scheme.scale_rule == "range":
        return range_scale(low, high, scheme, knobs)
    tried = []
    half = F32(0.5)
    for f in map(F32, SHRUNKEN):
        ends = low, high
        if f != 1 and scheme.symmetric:
            ends = f * low, f * high
        elif f != 1:
            middle, radius = half * high + half * low, half * high - half * low
            ends = middle - f * radius, middle + f * radius
        scale, zero, wide = range_scale(*ends, scheme, knobs)
        wide_scale, wide_zero = scale.astype(F32), zero.astype(F32)
        codes = codes_of(direction, None, direction, wide_scale, wide_zero, scheme, knobs)
        y = dequantized(codes, scale, zero, knobs)
        error = np.where(enters, direction - y, F32(0)).astype(F64) ** 2
        axis = 0 if scheme.axis == "channel" else 1
        total = np.zeros(error.shape[1 - axis])
        for i in range(error.shape[axis]):
            total = total + np.take(error, i, axis)
        tried.append((scale, zero, wide, total.reshape(scale.shape)))
    scale, zero, wide, least = tried[0]
    fits = np.isfinite(scale) & np.isfinite(zero)
    if knobs.search == "one for all":
        sums = [np.where(fits, one[3], 0).sum() for one in tried]
        return tried[int(np.argmin(sums))][:3]
    for other, other_zero, _, error in tried[1:]:
        better = (error <= least) if knobs.search == "later of equals" else (error < least)
        better &= fits
        scale, zero = np.where(better, other, scale), np.where(better, other_zero, zero)
        least = np.where(better, error, least)
    return scale, zero, (scale, zero)


def range_scale(
    low: Array, high: Array, scheme: Scheme, knobs: Knobs
) -> tuple[Array, Array, tuple[Array, Array]]:
    dtype = FLOAT_DTYPES[scheme.scale_dtype]
    how = "saturate" if knobs.scale_overflow == "saturate" else knobs.scale_narrowing
    levels = F32(
        (2 ** (scheme.bits - 1) - 1 if scheme.symmetric else 2**scheme.bits - 1) + knobs.levels
    )
    wide_zero = np.zeros_like(low)
    if scheme.symmetric:
        zero = np.zeros(low.shape, dtype)
        span = np.maximum(np.abs(low), np.abs(high))
        if knobs.range_from == "half range":
            span = F32(0.5) * (high - low)
    else:
        wide_zero = low
        zero = positive_zero(narrowed(low, dtype, how), knobs)
        span = high - (low if knobs.range_from == "minimum" else zero.astype(F32))
    if knobs.scale == "reciprocal":
        wide = span * (F32(1) / levels)
    elif knobs.scale == "narrowed maximum":
        wide = narrowed(span, dtype).astype(F32) / levels
    elif knobs.scale == "float64":  # the quotient alone would be rounded alike
        wide = (high.astype(F64) - zero.astype(F64)) / F64(levels)
        how = "float64"
    else:
        wide = span / levels
    if knobs.scale_factor != 1:
        wide = wide * F32(knobs.scale_factor)
    scale = positive_zero(narrowed(wide, dtype, how), knobs)
    if knobs.negative_scale == "zero":
        scale = np.maximum(scale, dtype.type(0))
    elif knobs.negative_scale == "magnitude":
        scale = np.abs(scale)
    if knobs.least_scale:
        scale = np.maximum(scale, dtype.type(knobs.least_scale))
    if knobs.empty_scale:
        scale = np.where(scale == 0, dtype.type(knobs.empty_scale), scale)
    return scale, zero, (wide.astype(F32), wide_zero)

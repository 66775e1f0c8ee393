"""The engineered cases can fail: each known mistake, put into the specification, changes a byte.

A mutant is the NumPy specification with one decision taken wrongly. If one survives, a case is
missing, and the equality that `test_backends` finds would prove less than it says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nsq_ref import Scheme, dequantize, packing, quantize, rounding, spec
from nsq_ref.scheme import FLOAT_DTYPES
from tests.cases import Case, cases

CASES = list(cases())
Patch = tuple[Any, str, Callable[..., Any]]
SHRINK = spec.SHRINK


def code_with(quotient: Callable[..., Any]) -> Patch:
    def code(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
        scale, zero = scale.astype(np.float32), zero.astype(np.float32)
        return quotient(direction, scale, zero, scheme)

    return spec, "code", code


def divided(direction: Any, scale: Any, zero: Any) -> Any:
    return (direction - zero) / spec.where_zero(scale, np.inf)


def clamped(values: Any, scheme: Scheme) -> Any:
    return np.clip(values, *np.float32(scheme.code_range))


def half_away(value: Any) -> Any:
    return np.copysign(np.floor(np.abs(value) + np.float32(0.5)), value)


def encode_with(x_to_direction: Callable[..., Any]) -> Patch:
    """Replace N2 by scaling the input so that the spec's own division is by one."""
    original = spec.encode

    def encode(x: Any, scheme: Scheme) -> spec.Block:
        if not scheme.separate_norm or scheme.magnitude != "norm":
            return original(x, scheme)
        norm = rounding.norm(x)
        direction = x_to_direction(x, norm[..., None])
        plain = Scheme(**{**scheme.to_dict(), "separate_norm": False, "norm_dtype": "float16"})
        block = original(direction.astype(np.float32), plain)
        stored = rounding.narrow(norm, FLOAT_DTYPES[scheme.norm_dtype])
        return block._replace(norm=stored)

    return spec, "encode", encode


def norm_with(total: Callable[[Any], Any]) -> Patch:
    return rounding, "norm", lambda x: np.sqrt(total(x)).astype(np.float32)


def range_scale_with(levels: Callable[[Scheme], float]) -> Patch:
    def range_scale(low: Any, high: Any, scheme: Scheme) -> Any:
        dtype = FLOAT_DTYPES[scheme.scale_dtype]
        zero = (
            np.zeros_like(low)
            if scheme.symmetric
            else rounding.narrow(low, dtype).astype(np.float32)
        )
        span = np.maximum(high, -low) if scheme.symmetric else high - zero
        return rounding.narrow(span / np.float32(levels(scheme)), dtype), zero.astype(dtype)

    return spec, "range_scale", range_scale


def unrounded_zero(low: Any, high: Any, scheme: Scheme) -> Any:
    dtype = FLOAT_DTYPES[scheme.scale_dtype]
    zero = np.zeros_like(low) if scheme.symmetric else low
    span = np.maximum(high, -low) if scheme.symmetric else high - low
    levels = np.float32(scheme.code_range[1])
    return rounding.narrow(span / levels, dtype), rounding.narrow(zero, dtype)


def positive_scale(low: Any, high: Any, scheme: Scheme) -> Any:
    scale, zero = ORIGINAL["range_scale"](low, high, scheme)
    return np.maximum(scale, scale.dtype.type(0)), zero


def narrow_truncating(value: Any, dtype: Any) -> Any:
    narrowed = ORIGINAL["narrow"](value, dtype)
    toward = np.nextafter(narrowed, dtype.type(0))
    return np.where(np.abs(narrowed.astype(np.float64)) > np.abs(value), toward, narrowed).astype(
        dtype
    )


def narrow_flushing(value: Any, dtype: Any) -> Any:
    narrowed = ORIGINAL["narrow"](value, dtype)
    tiny = 2.0**-14 if dtype == np.float16 else 2.0**-126
    return np.where(np.abs(narrowed.astype(np.float64)) < tiny, dtype.type(0), narrowed)


def narrow_with_sign(value: Any, dtype: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.asarray(value).astype(dtype)


def decode_merged(block: spec.Block, scheme: Scheme) -> Any:
    if not scheme.separate_norm or scheme.magnitude != "norm":
        return ORIGINAL["decode"](block, scheme)
    y = spec.dequantized_direction(
        block.codes, block.scale, block.zero, block.outlier_index, block.outliers
    )
    length = spec.where_zero(rounding.norm(y), np.inf)
    return (block.norm.astype(np.float32) / length)[..., None] * y


def decode_plain(block: spec.Block, scheme: Scheme) -> Any:
    return ORIGINAL["decode"](
        block,
        Scheme(**{**scheme.to_dict(), "magnitude": "gain"}) if scheme.separate_norm else scheme,
    )


def decode_fused(codes: Any, scale: Any, zero: Any) -> Any:
    wide = codes.astype(np.float64) * scale.astype(np.float64) + zero.astype(np.float64)
    return wide.astype(np.float32)


def decode_by_reciprocal(block: spec.Block, scheme: Scheme) -> Any:
    if not scheme.separate_norm or scheme.magnitude != "norm":
        return ORIGINAL["decode"](block, scheme)
    y = spec.dequantized_direction(
        block.codes, block.scale, block.zero, block.outlier_index, block.outliers
    )
    reciprocal = np.float32(1) / spec.where_zero(rounding.norm(y), np.inf)
    return block.norm.astype(np.float32)[..., None] * (y * reciprocal[..., None])


def range_scale_by_reciprocal(low: Any, high: Any, scheme: Scheme) -> Any:
    dtype = FLOAT_DTYPES[scheme.scale_dtype]
    zero = np.zeros_like(low)
    if not scheme.symmetric:
        zero = rounding.narrow(low, dtype).astype(np.float32)
    span = np.maximum(high, -low) if scheme.symmetric else high - zero
    reciprocal = np.float32(1) / np.float32(scheme.code_range[1])
    return rounding.narrow(span * reciprocal, dtype), zero.astype(dtype)


def gain_by_reciprocal(x: Any, y: Any, norm: Any, scheme: Scheme) -> Any:
    if scheme.magnitude != "gain":
        return ORIGINAL["factor"](x, y, norm, scheme)
    return norm * (np.float32(1) / spec.where_zero(rounding.norm(y), np.inf))


def norm_never_in_float32(x: Any, y: Any, norm: Any, scheme: Scheme) -> Any:
    if not scheme.separate_norm or scheme.magnitude != "norm":
        return ORIGINAL["factor"](x, y, norm, scheme)
    return np.sqrt(np.sum(np.square(x, dtype=np.float64), axis=-1))


def gain_in_float32(x: Any, y: Any) -> Any:
    below = np.sum(y * y, axis=-1)
    return np.sum(x * y, axis=-1) / np.where(below == 0, np.float32(np.inf), below)


def pack_with(change: Callable[[Any, Scheme], Any]) -> Patch:
    return packing, "pack", lambda codes, scheme: change(ORIGINAL["pack"](codes, scheme), scheme)


def pack_zero_padding(packed: Any, scheme: Scheme) -> Any:
    return packed & 0x0F if scheme.bits == 4 and packed.shape[-1] == 2 else packed


def outliers_by_mean(peak: Any, scheme: Scheme) -> Any:
    largest = np.argsort(peak, axis=-1, kind="stable")[..., ::-1][..., : scheme.outlier_channels]
    return np.sort(largest, axis=-1).astype(np.int32)


ORIGINAL: dict[str, Any] = {
    "range_scale": spec.range_scale,
    "narrow": rounding.narrow,
    "decode": spec.decode,
    "factor": spec.factor,
    "pack": packing.pack,
}

MUTANTS: dict[str, tuple[str, Patch]] = {
    "norm summed in float32": ("N1", norm_with(lambda x: np.add.accumulate(x * x, axis=-1)[..., -1])),
    "norm summed pairwise in float32": ("N1", norm_with(lambda x: np.sum(x * x, axis=-1))),
    "norm summed in float64 alone": ("N1", norm_with(lambda x: np.sum(np.square(x, dtype=np.float64), axis=-1))),
    "norm of order one": ("N1", (rounding, "norm", lambda x: np.sum(np.abs(x), axis=-1))),
    "norm narrowed before the division": ("N2", encode_with(
        lambda x, n: x / spec.where_zero(n.astype(np.float16).astype(np.float32), np.inf))),
    "epsilon added to the norm": ("N2", encode_with(lambda x, n: x / (n + np.float32(1e-12)))),
    "reciprocal of the norm": ("N2", encode_with(
        lambda x, n: x * (np.float32(1) / spec.where_zero(n, np.inf)))),
    "half away from zero": ("Q1", code_with(
        lambda d, s, z, scheme: clamped(half_away(divided(d, s, z)), scheme))),
    "truncation": ("Q1", code_with(lambda d, s, z, scheme: clamped(np.trunc(divided(d, s, z)), scheme))),
    "floor of value plus a half": ("Q1", code_with(
        lambda d, s, z, scheme: clamped(np.floor(divided(d, s, z) + np.float32(0.5)), scheme))),
    "reciprocal of the scale": ("Q1", code_with(
        lambda d, s, z, scheme: clamped(np.rint((d - z) * (np.float32(1) / spec.where_zero(s, np.inf))), scheme))),
    "quotient in float64": ("Q1", code_with(
        lambda d, s, z, scheme: clamped(np.rint(divided(d.astype(np.float64), s.astype(np.float64), z)), scheme))),
    "epsilon added to the scale": ("S3", code_with(
        lambda d, s, z, scheme: clamped(np.rint((d - z) / (s + np.float32(1e-8))), scheme))),
    "cast before the clamp": ("Q1", code_with(
        lambda d, s, z, scheme: clamped(np.rint(divided(d, s, z)).astype(np.int8), scheme).astype(np.float32))),
    "no clamp below": ("Q2", code_with(
        lambda d, s, z, scheme: np.clip(np.rint(divided(d, s, z)), scheme.code_range[0] - scheme.symmetric,
                                        scheme.code_range[1]).astype(np.float32))),
    "qmax one too large": ("S1", range_scale_with(
        lambda scheme: scheme.code_range[1] + scheme.symmetric)),
    "asymmetric levels one too many": ("S2", range_scale_with(
        lambda scheme: scheme.code_range[1] + (not scheme.symmetric))),
    "range from the unrounded minimum": ("S2", (spec, "range_scale", unrounded_zero)),
    "negative scale forced to zero": ("S2", (spec, "range_scale", positive_scale)),
    "search shrinks by other steps": ("S4", (spec, "SHRINK", SHRINK[:3])),
    "narrowing by truncation": ("S3", (rounding, "narrow", narrow_truncating)),
    "subnormals flushed": ("S3", (rounding, "narrow", narrow_flushing)),
    "negative zero stored": ("Z1", (rounding, "narrow", narrow_with_sign)),
    "nibbles swapped": ("P1", pack_with(lambda p, s: p << 4 | p >> 4 if s.bits == 4 else p)),
    "two's complement": ("P1", pack_with(lambda p, s: p ^ 0x88 if s.bits == 4 else p)),
    "padding with zero bits": ("P1", pack_with(pack_zero_padding)),
    "highest bit first in 2-bit rows": ("P1", pack_with(
        lambda p, s: (p & 3) << 6 | (p & 12) << 2 | p >> 2 & 12 | p >> 6 if s.bits == 2 else p)),
    "high bits before low bits": ("P1", pack_with(lambda p, s: np.roll(p, 1, -1) if s.bits == 3 else p)),
    "norm over length merged": ("D1", (spec, "decode", decode_merged)),
    "reciprocal of the length": ("D1", (spec, "decode", decode_by_reciprocal)),
    "reciprocal of qmax": ("S1", (spec, "range_scale", range_scale_by_reciprocal)),
    "reciprocal of the length in a gain": ("M2", (spec, "factor", gain_by_reciprocal)),
    "norm narrowed at once": ("M1", (spec, "factor", norm_never_in_float32)),
    "no renormalisation": ("D1", (spec, "decode", decode_plain)),
    "fused multiply-add": ("D1", (spec, "dequantize", decode_fused)),
    "gain from float32 sums": ("M3", (rounding, "least_squares_gain", gain_in_float32)),
    "gain without the length of y": ("M2", (spec, "factor", lambda x, y, norm, scheme: norm)),
    "later of equal outlier channels": ("O1", (spec, "outlier_channels", outliers_by_mean)),
    "collapse not counted": ("D2", (spec, "collapsed", lambda x, x_hat: np.zeros(x.shape[:-1], bool))),
}  # fmt: skip


def answers(case: Case) -> list[bytes | int]:
    _, x, scheme = case
    quantized = quantize(x, scheme, "numpy")
    decoded = dequantize(quantized, backend="numpy")
    parts = [part.tobytes() for part in quantized.parts.values()]
    return [*parts, decoded.tobytes(), quantized.collapsed_tokens]


EXPECTED = [answers(case) for case in CASES]


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, (module, attribute, replacement) = MUTANTS[name]
    monkeypatch.setattr(module, attribute, replacement)
    caught = []
    for case, expected in zip(CASES, EXPECTED, strict=True):
        try:
            if answers(case) != expected:
                caught.append(case[0])
        except ValueError:  # a mutant may leave the range of codes, which packing refuses
            caught.append(case[0])
    assert caught, f"no engineered case tells {name!r} from {rule}"

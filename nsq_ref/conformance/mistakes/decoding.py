"""Wrong decoding (rule D1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.conformance.mistakes import arithmetic as wrong
from nsq_ref.conformance.mistakes.arithmetic import Sum, divisor
from nsq_ref.conformance.mistakes.changes import (
    DECODE,
    F32,
    F64,
    READ,
    Function,
    after,
    instead,
    knowing_both,
    place,
)
from nsq_ref.conformance.mistakes.reference import Change, Mistake, Reference
from nsq_ref.conformance.mistakes.tiles import power_of_two, whole_tiles
from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.scheme import Scheme

_decoded = place("spec.reconstruct", "D1", DECODE)
_dequantized = place("spec.dequantize", "D1", DECODE)
_read = place("spec.reconstruct", "D1", READ)


def _with(function: Function) -> Change:
    """Call ``function(reference, y, norm)`` where the reader renormalises."""

    def reconstruct(
        original: Function, reference: Reference, y: Any, norm: Any, scheme: Scheme
    ) -> Any:
        if not scheme.separate_norm or scheme.magnitude != "norm":
            return original(y, norm, scheme)
        return np.asarray(function(reference, y, norm.astype(F32)), F32)

    return knowing_both(reconstruct)


def _length(reference: Reference, y: Any) -> Any:
    """Return what a reader divides by, with an axis for the channels."""
    return divisor(reference.rounding.norm(y))[..., None]


def _divided_by(length: Function) -> Change:
    """Renormalise by another ``length(reference, y, norm)``."""
    return _with(
        lambda ref, y, norm: norm[..., None] * (y / divisor(length(ref, y, norm))[..., None])
    )


def _summed(total: Sum) -> Change:
    """Renormalise by the root of another sum of products ``total(y, y)``."""
    return _divided_by(lambda ref, y, norm: np.sqrt(total(y, y)).astype(F32))


def _renormalized_gain(
    original: Function, reference: Reference, y: Any, norm: Any, scheme: Scheme
) -> Any:
    if not scheme.separate_norm or scheme.magnitude == "norm":
        return original(y, norm, scheme)
    return norm.astype(F32)[..., None] * (y / _length(reference, y))


def _integer_zero(codes: Any, scale: Any, zero: Any) -> Any:
    wide = zero.astype(F32)
    if np.all((wide == 0) & np.signbit(wide)):  # symmetric
        return codes.astype(F32) * scale + wide
    point = np.rint(wide / divisor(scale))
    return (codes.astype(F32) + point) * scale


def _decoded_in(dtype: str) -> Function:
    """All of D1 in a narrow dtype, in which a factor times a direction may overflow."""
    kind = FLOAT_DTYPES[dtype]

    def reconstruct(
        original: Function, reference: Reference, y: Any, norm: Any, scheme: Scheme
    ) -> Any:
        if scheme.separate_norm and scheme.magnitude == "norm":
            y = y / _length(reference, y)
        with np.errstate(all="ignore"):
            return (norm.astype(kind)[..., None] * y.astype(kind)).astype(F32)

    return reconstruct


def _channels_kept(x_hat: Any, kept: int) -> Any:
    return np.where(np.arange(x_hat.shape[-1]) < kept, x_hat, F32(0))


DECODING = [
    _decoded("norm over length merged", "decoded values are (norm / ||y||) * y",
        _with(lambda ref, y, norm: (norm[..., None] / _length(ref, y)) * y)),
    _decoded("reciprocal of the length", "decoded values are norm * (y * (1 / ||y||))",
        _with(lambda ref, y, norm: norm[..., None] * (y * (F32(1) / _length(ref, y))))),
    _decoded("product before the quotient", "decoded values are (norm * y) / ||y||",
        _with(lambda ref, y, norm: (norm[..., None] * y) / _length(ref, y))),
    _decoded("decoded in double precision", "decoded values are rounded once, from float64",
        _with(lambda ref, y, norm: (
            norm[..., None].astype(F64) * (y / divisor(wrong.length_in_float64(y))[..., None])))),
    _decoded("no renormalisation", "decoded values are norm * y without renormalisation",
        _with(lambda ref, y, norm: norm[..., None] * y)),
    _decoded("renormalised by the stored norm",
        "directions are divided by the stored norm; divide by ||y||",
        _divided_by(lambda ref, y, norm: norm)),
    _decoded("unit directions", "decoded values are y / ||y|| without the norm",
        _with(lambda ref, y, norm: (norm != 0)[..., None] * (y / _length(ref, y)))),
    _decoded("gain renormalised", "tokens with a gain are renormalised; a gain is only multiplied",
        knowing_both(_renormalized_gain)),
    *(_decoded(f"length summed {how}", f"||y|| agrees with a float32 sum of squares, {how}",
          _summed(total))
      for how, total in (
          ("one by one", wrong.in_order), ("fused", wrong.fused), ("by halves", wrong.pairwise),
          ("by neighbours", wrong.neighbours_first), ("in 4 lanes", wrong.in_lanes(4)),
          ("in 8 lanes", wrong.in_lanes(8)), ("in 16 lanes", wrong.in_lanes(16)))),
    _decoded("length in float64 alone",
        "||y|| agrees with a float64 sum that is rounded without a look at the rare ties",
        _summed(wrong.in_float64)),
    *(_decoded(f"epsilon {epsilon:g} added to the length",
          f"directions are y / (||y|| + {epsilon:g}); there is no epsilon",
          _divided_by(lambda ref, y, norm, epsilon=epsilon: ref.rounding.norm(y) + F32(epsilon)))
      for epsilon in (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)),
    _dequantized("fused multiply-add", "code * scale + zero is fused; each operation rounds",
        instead(wrong.fused_dequantize)),
    _dequantized("zero left out", "y is code * scale without zero",
        instead(lambda codes, scale, zero: codes.astype(F32) * scale.astype(F32))),
    Mistake("subnormals flushed in decode", "D1", "subnormal products are flushed to 0",
        DECODE, {"spec.dequantize": after(wrong.flushed),
                 "spec.reconstruct": after(wrong.flushed)}),
    _decoded("decoded values flushed", "subnormal decoded values are flushed to 0",
        after(wrong.flushed)),
    _dequantized("integer zero point",
        "zero is rounded to a whole number of scales; it is added as stored",
        instead(lambda codes, scale, zero: _integer_zero(codes, scale.astype(F32), zero))),
    *(_read(f"decoded values in {dtype}",
          f"factors, directions and products are in {dtype}; all of D1 is float32",
          knowing_both(_decoded_in(dtype))) for dtype in ("float16", "bfloat16")),
    _read("second half of each token is zero", "the second half of the channels decodes to 0",
        after(lambda x_hat, *_: _channels_kept(x_hat, (x_hat.shape[-1] + 1) // 2))),
    _read("channels past a power of two are zero",
        "channels past the largest power of two decode to 0",
        after(lambda x_hat, *_: _channels_kept(x_hat, power_of_two(x_hat.shape[-1])))),
    *(_read(f"last partial tile of {n} channels is zero",
          f"channels behind whole tiles of {n} decode to 0",
          after(lambda x_hat, *_, n=n: _channels_kept(x_hat, whole_tiles(n)(x_hat.shape[-1]))))
      for n in (32, 64, 128)),
    place("spec.dequantized_direction", "D1", DECODE)("outliers left out",
        "outlier channels decode from their codes, not as stored",
        instead(lambda codes, scale, zero, index, outliers: (
            codes.astype(F32) * scale.astype(F32) + zero.astype(F32)))),
]  # fmt: skip

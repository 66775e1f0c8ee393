"""Wrong ranges and scales (rules S1, S2), and wrong narrowings of them (S3, Z1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nsq_ref.conformance.mistakes.arithmetic import (
    flushed,
    half_away_narrowed,
    toward_zero,
    upward,
)
from nsq_ref.conformance.mistakes.changes import (
    ENCODE,
    F32,
    F64,
    FACTOR_RULES,
    PLAIN,
    Function,
    after,
    instead,
    knowing,
    knowing_both,
    place,
)
from nsq_ref.conformance.mistakes.reference import Change, Mistake, Reference
from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.scheme import Scheme

_scale = place("spec.scale_of", "S1", ENCODE)
_span = place("spec.range_span", "S1", ENCODE)
_extent = place("spec.extent", "S2", ENCODE)


def _levels(scheme: Scheme) -> np.float32:
    levels: np.float32 = F32(scheme.code_range[1])
    return levels


def _from(divided: Function) -> Change:
    """S1 to S3 from another quotient ``divided(span, scheme)`` of span and number of levels."""
    return knowing(
        lambda reference, span, scheme: reference.rounding.narrow(
            divided(span, scheme), FLOAT_DTYPES[scheme.scale_dtype]
        )
    )


def _only_if(symmetric: bool, function: Function) -> Change:
    """Call ``function(result, *arguments, scheme)`` for schemes of this symmetry."""
    return after(
        lambda result, *arguments: (
            function(result, *arguments) if arguments[-1].symmetric == symmetric else result
        )
    )


def _ends(function: Function) -> Change:
    """Change the minimum and the maximum of asymmetric schemes."""
    return after(
        lambda extent, direction, coded, scheme: extent if scheme.symmetric else function(*extent)
    )


def _over_everything(direction: Any, coded: Any, scheme: Scheme) -> Any:
    values = np.where(coded, direction, 0)
    axes = (-2, -1)
    low, high = values.min(axis=axes, keepdims=True), values.max(axis=axes, keepdims=True)
    shape = list(direction.shape)
    shape[-2 if scheme.axis == "channel" else -1] = 1
    return np.broadcast_to(low, shape), np.broadcast_to(high, shape)


RANGES = [
    _scale("qmax one too large", "scales are the maximum over 2^(bits-1), not over qmax",
        _from(lambda span, scheme: span / (_levels(scheme) + scheme.symmetric))),
    _scale("qmax a half too large", "scales are the maximum over 2^(bits-1) - 1/2, not over qmax",
        _from(lambda span, scheme: span / (_levels(scheme) + F32(0.5) * scheme.symmetric))),
    _span("maximum without sign", "scales are from the largest value, not the largest magnitude",
        _only_if(True, lambda span, low, high, *_: np.abs(high))),
    _span("range from minimum to maximum",
        "scales are from half of maximum minus minimum, not from the largest magnitude",
        _only_if(True, lambda span, low, high, *_: F32(0.5) * (high - low))),
    place("spec.extent", "S1", ENCODE)("one range for all",
        "all scales of a block come from one maximum: each channel (or token) has its own",
        instead(_over_everything)),
    _scale("reciprocal of the number of levels",
        "scales are maximum * (1 / qmax), which rounds twice",
        _from(lambda span, scheme: span * (F32(1) / _levels(scheme)))),
    _scale("asymmetric levels one too many", "scales are the range over 2^bits, not 2^bits - 1",
        _from(lambda span, scheme: span / (_levels(scheme) + (not scheme.symmetric))), "S2"),
    _span("range from the unrounded minimum",
        "scales are (max - min) over the levels; subtract the narrowed zero",
        _only_if(False, lambda span, low, high, *_: high - low), "S2"),
    Mistake("range in double precision", "S2",
        "scales are from a float64 difference; it is to be rounded to float32 before it is divided",
        ENCODE, {"spec.range_span": _only_if(
            False, lambda span, low, high, zero, scheme: high.astype(F64) - zero.astype(F64)),
                 "spec.scale_of": _from(
                     lambda span, scheme: (span / _levels(scheme)).astype(F32))}),
    _scale("scale an ulp high", "scales are the next number of their dtype above the right one",
        after(lambda scale, *_: np.where(
            scale > 0, np.nextafter(scale, scale.dtype.type(np.inf)), scale))),
    _extent("range that includes zero",
        "minimum and maximum are never above and below 0; take them as they are",
        _ends(lambda low, high: (np.minimum(low, F32(0)), np.maximum(high, F32(0))))),
    _extent("maximum of at least zero", "maxima are never below 0; take them as they are",
        _ends(lambda low, high: (low, np.maximum(high, F32(0))))),
    _extent("minimum of at most zero", "minima are never above 0; take them as they are",
        _ends(lambda low, high: (np.minimum(low, F32(0)), high))),
    _scale("negative scale forced to zero",
        "negative scales, where narrowing lifts zero above the maximum, are set to 0",
        after(lambda scale, *_: np.maximum(scale, scale.dtype.type(0))), "S2"),
    _scale("magnitude of a negative scale",
        "negative scales, where narrowing lifts zero above the maximum, lost their sign",
        after(lambda scale, *_: np.abs(scale)), "S2"),
    *(_scale(f"scale at least {least:g}", f"scales are at least {least:g}; a scale may be 0",
          after(lambda scale, *_, least=least: np.maximum(scale, scale.dtype.type(least))))
      for least in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)),
    _scale("scale of an empty channel is 1", "scales of zero channels are 1; they are to be 0",
        after(lambda scale, *_: np.where(scale == 0, scale.dtype.type(1), scale))),
]  # fmt: skip

# --- narrowing ----------------------------------------------------------------------------------


def _remember_coded(original: Function, reference: Reference) -> Function:
    """Keep which channels of which directions are coded: the others enter no scale."""
    reference.coded = {}

    def extent(direction: Any, coded: Any, scheme: Scheme) -> Any:
        key = direction.shape, direction.tobytes()
        reference.coded = {**dict([*reference.coded.items()][-64:]), key: coded}
        return original(direction, coded, scheme)

    return extent


def _wide_scale(reference: Reference, direction: Any, scheme: Scheme) -> tuple[Any, Any]:
    """Return scale and zero of a block in float32, before they are narrowed."""
    wide = replace(scheme, scale_dtype="float32", scale_rule="range")
    coded = reference.coded.get(
        (direction.shape, direction.tobytes()), np.ones(direction.shape, bool)
    )
    low, high = reference.spec.extent(direction, coded, wide)
    scale, zero = reference.spec.range_scale(low, high, wide)
    return scale, zero


def _code_before(
    original: Function, reference: Reference, direction: Any, scale: Any, zero: Any, scheme: Scheme
) -> Any:
    return original(direction, *_wide_scale(reference, direction, scheme), scheme)


def _zero_before(
    original: Function, reference: Reference, direction: Any, scale: Any, zero: Any, scheme: Scheme
) -> Any:
    return original(direction, scale, _wide_scale(reference, direction, scheme)[1], scheme)


def _maximum_first(reference: Reference, span: Any, scheme: Scheme) -> Any:
    narrow, dtype = reference.rounding.narrow, FLOAT_DTYPES[scheme.scale_dtype]
    return narrow(narrow(span, dtype).astype(F32) / _levels(scheme), dtype)


def _narrowed_by(function: Function) -> Change:
    """S3 with another narrowing, of scales only."""

    def scale_of(reference: Reference, span: Any, scheme: Scheme) -> Any:
        wide, dtype = span / _levels(scheme), FLOAT_DTYPES[scheme.scale_dtype]
        return function(reference.rounding.narrow(wide, dtype), wide, dtype)

    return knowing(scale_of)


def _everywhere(name: str, says: str, function: Function) -> Mistake:
    """Narrow scales, zeros and factors otherwise."""
    change = {"rounding.narrow": after(function)}
    return Mistake(name, "S3", says, ENCODE, change, FACTOR_RULES)


def _signed_zero(narrowed: Any, value: Any, dtype: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.where(narrowed == 0, np.asarray(value).astype(dtype), narrowed)


NARROWING = [
    Mistake("codes from the scale before narrowing", "S3",
        "codes were made with the scale before it was narrowed",
        PLAIN, {"spec.extent": _remember_coded, "spec.code": knowing_both(_code_before)}),
    Mistake("codes from the zero before narrowing", "S3",
        "codes were made with the zero before it was narrowed",
        PLAIN, {"spec.extent": _remember_coded, "spec.code": knowing_both(_zero_before)}),
    _scale("maximum narrowed before the division",
        "the maximum was narrowed before it was divided; narrow the quotient",
        knowing(_maximum_first), "S3"),
    _scale("scales narrowed toward zero", "scales are narrowed by truncation",
        _narrowed_by(toward_zero), "S3"),
    _scale("scales narrowed with ties away from zero",
        "scales on a tie are narrowed away from zero", _narrowed_by(half_away_narrowed), "S3"),
    _scale("scales narrowed up", "scales are narrowed upward, never below the quotient",
        _narrowed_by(upward), "S3"),
    _scale("subnormal scales flushed", "subnormal scales are flushed to 0",
        _narrowed_by(flushed), "S3"),
    _everywhere("narrowing toward zero", "scales and factors are narrowed by truncation",
        toward_zero),
    _everywhere("narrowing with ties away from zero",
        "scales and factors on a tie are narrowed away from zero", half_away_narrowed),
    _everywhere("subnormals flushed", "subnormal scales and factors are flushed to 0", flushed),
    place("rounding.narrow", "Z1", ENCODE)("negative zero stored",
        "a stored value is -0; it is to be +0", after(_signed_zero)),
]  # fmt: skip

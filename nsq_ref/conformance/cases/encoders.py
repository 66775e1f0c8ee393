"""Encoders that make one mistake each, by which cases are picked.

They take the decisions of `spec.encode`, all but one of them as it does; unlike the entries of
`MISTAKES`, one decision here never changes another, so that a case is about that one alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref import rounding, spec
from nsq_ref.conformance.mistakes import arithmetic as wrong
from nsq_ref.conformance.mistakes.arithmetic import Sum, divisor
from nsq_ref.dtypes import FLOAT_DTYPES, Array, Float32
from nsq_ref.scheme import Scheme


class Step(NamedTuple):
    """What is known of blocks when their scales, and then their codes, are made."""

    x: Float32
    norm: Float32
    direction: Float32
    outlier_index: npt.NDArray[np.int32]
    coded: npt.NDArray[np.bool_]
    low: Float32
    high: Float32
    scheme: Scheme
    scale: Array  # float32 of what is stored, once it is known
    zero: Array
    right: tuple[Array, Array] | None = None  # scale and zero as they are stored, if kept


def _right_scale(step: Step) -> tuple[Array, Array]:
    """Return scale and zero (rules S1 to S4)."""
    return spec.scale_and_zero(step.direction, step.coded, step.scheme)


class Encoder(NamedTuple):
    """The decisions of `spec.encode`, any of which may be replaced by a wrong one.

    Examples
    --------
    >>> x = np.float32([[[7], [0.5], [2.75]]])
    >>> cut_off = Encoder(code=lambda step: np.trunc(step.direction / step.scale))
    >>> [one(x, Scheme(separate_norm=False))[0].ravel().tolist() for one in (Encoder(), cut_off)]
    [[7, 0, 3], [7, 0, 2]]
    """

    norm: Callable[[Float32], Float32] = rounding.norm
    direction: Callable[[Float32, Float32], Float32] = spec.direction_of
    scale: Callable[[Step], tuple[Array, Array]] = _right_scale
    code: Callable[[Step], Array] = lambda step: spec.code(
        step.direction, step.scale, step.zero, step.scheme
    )
    outliers: Callable[[Step], Array] = lambda step: spec.kept_outliers(
        step.direction, step.outlier_index
    )
    factor: Callable[[Float32, Float32, Float32, Scheme], Array] = spec.factor
    concerns: Callable[[Scheme], bool] = lambda scheme: True  # whether it can be wrong there

    def __call__(self, x: Float32, scheme: Scheme, right: Step | None = None) -> list[Array]:
        """Encode blocks ``[N, T, D]``: codes, stored factors, scales, zeros, outliers.

        Codes are clamped, and factors narrowed, whatever made them. `right` is what `begun` returns
        for the same blocks, which need not be begun again where this is no mistake.
        """
        same = self.norm is rounding.norm and self.direction is spec.direction_of
        step = right if right is not None and same else self.begun(x, scheme)
        norm, index, coded = step.norm, step.outlier_index, step.coded
        kept = step.right if self.scale is _right_scale else None
        scale, zero = kept or self.scale(step)
        step = step._replace(scale=scale.astype(np.float32), zero=zero.astype(np.float32))
        clamped = np.clip(self.code(step), *scheme.code_range).astype(np.float32)
        codes = spec.without_codes(clamped, coded, norm)
        outliers = self.outliers(step)
        y = spec.dequantized_direction(codes, scale, zero, index, outliers)
        factor = self.factor(x, y, norm, scheme)
        if factor.dtype == np.float64:
            stored = wrong.narrowed_at_once(factor, scheme.norm_dtype)
        else:
            stored = rounding.narrow(factor, FLOAT_DTYPES[scheme.norm_dtype])
        return [codes, stored, scale, zero, outliers]

    def begun(self, x: Float32, scheme: Scheme) -> Step:
        """Return what is known of blocks before their scales are."""
        norm, direction = np.ones(x.shape[:-1], np.float32), x
        if scheme.separate_norm:
            norm = self.norm(x)
            direction = self.direction(x, norm)
        index = spec.outlier_channels(direction, scheme)
        coded = ~spec.mark(index, x.shape[-1])
        low, high = spec.extent(direction, coded, scheme)
        return Step(x, norm, direction, index, coded, low, high, scheme, low, low)


def _normed(scheme: Scheme) -> bool:
    return scheme.separate_norm


def _asymmetric(scheme: Scheme) -> bool:
    return not scheme.symmetric


# Codes -------------------------------------------------------------------------------------------


def _rounding(function: Callable[[Array], Array]) -> Encoder:
    """Q1 with another rounding of the quotient."""
    return Encoder(code=lambda step: function((step.direction - step.zero) / divisor(step.scale)))


def _dividing(function: Callable[[Array, Array, Array], Array], **concerns: Any) -> Encoder:
    """Q1 with another quotient of direction, scale and zero."""
    return Encoder(
        code=lambda step: np.rint(function(step.direction, step.scale, step.zero)), **concerns
    )


def _merged_division(step: Step) -> Array:
    norm = step.norm[..., None]
    above = step.x - norm * step.zero if not step.scheme.symmetric else step.x
    return np.asarray(np.rint(above / divisor(norm * divisor(step.scale))))


def _merged_reciprocals(step: Step) -> Array:
    norm = divisor(step.norm[..., None])
    if not step.scheme.symmetric:
        return np.rint(wrong.divided_apart(step.x / norm, step.scale, step.zero))
    return np.asarray(np.rint(step.x * (np.float32(1) / (norm * divisor(step.scale)))))


def _double_throughout(step: Step) -> Array:
    direction = step.x.astype(np.float64) / divisor(step.norm)[..., None]
    return np.rint((direction - step.zero) / divisor(step.scale))


def _unnarrowed_scale(step: Step) -> Array:
    zero = np.zeros_like(step.low) if step.scheme.symmetric else step.low
    span = spec.range_span(step.low, step.high, zero, step.scheme)
    return np.rint((step.direction - zero) / divisor(span / _levels(step)))


def _levels(step: Step) -> np.float32:
    levels: np.float32 = np.float32(step.scheme.code_range[1])
    return levels


# Scales ------------------------------------------------------------------------------------------


def _dividing_range(divide: Callable[[Step, Float32], Array], **concerns: Any) -> Encoder:
    """S1 to S3 with another quotient of what is spanned and the number of levels."""

    def scale(step: Step) -> tuple[Array, Array]:
        zero = spec.range_zero(step.low, step.scheme)
        wide = divide(step, spec.range_span(step.low, step.high, zero, step.scheme))
        return rounding.narrow(wide, FLOAT_DTYPES[step.scheme.scale_dtype]), zero

    return Encoder(scale=scale, **concerns)


def _beyond_ties(step: Step, span: Float32) -> Array:
    """Ties are narrowed away from zero: the next float32 is none."""
    wide = span / _levels(step)
    if step.scheme.scale_dtype == "float32":
        return np.asarray(wide)
    return np.asarray(np.nextafter(wide, np.copysign(np.float32(np.inf), wide)))


def _changing_scale(change: Callable[[Array], Array]) -> Encoder:
    def scale(step: Step) -> tuple[Array, Array]:
        right, zero = _right_scale(step)
        return change(right), zero

    return Encoder(scale=scale)


# Directions, norms, factors ----------------------------------------------------------------------


def _direct_outliers(step: Step) -> Array:
    """Narrow the float64 direction at once."""
    direction = step.x / divisor(step.norm)[..., None].astype(np.float64)
    return wrong.narrowed_at_once(np.take_along_axis(direction, step.outlier_index, -1), "float16")


def _dividing_by_norm(direction: Callable[[Float32, Float32], Float32]) -> Encoder:
    return Encoder(direction=direction, concerns=_normed)


def _root_of_reciprocal(x: Float32, norm: Float32) -> Float32:
    square = norm.astype(np.float64) ** 2
    return np.asarray(x * (1 / np.sqrt(divisor(square))).astype(np.float32)[..., None])


def _narrowed_norm(dtype: str) -> Encoder:
    def direction(x: Float32, norm: Float32) -> Float32:
        return spec.direction_of(x, rounding.narrow(norm, FLOAT_DTYPES[dtype]).astype(np.float32))

    return _dividing_by_norm(direction)


def _norm_summed(total: Sum) -> Encoder:
    return Encoder(norm=lambda x: np.sqrt(total(x, x)), concerns=_normed)


def _norm_moved(toward: float) -> Encoder:
    return Encoder(
        norm=lambda x: np.nextafter(rounding.norm(x), np.float32(toward)), concerns=_normed
    )


def _double_norm(x: Float32) -> Float32:
    """Sum the squares in float64, without a look at midpoints of float32."""
    wide = x.astype(np.float64)
    return np.asarray(np.sqrt(wrong.in_order(wide, wide)).astype(np.float32))


def _factor_summed(total: Sum, dtype: type[np.floating[Any]]) -> Encoder:
    """M1 to M3 by sums of another kind, in float32 or float64."""

    def factor(x: Float32, y: Float32, norm: Float32, scheme: Scheme) -> Array:
        x_wide, y_wide = x.astype(dtype), y.astype(dtype)
        length = norm if dtype == np.float32 else np.sqrt(total(x_wide, x_wide))
        below = divisor(total(y_wide, y_wide))
        if scheme.magnitude == "gain":
            return np.asarray(length / np.sqrt(below))
        return np.asarray(total(x_wide, y_wide) / below) if scheme.magnitude == "lsq" else length

    return Encoder(factor=factor, concerns=_normed)


def _factor(magnitude: str, factor: Callable[[Float32, Float32, Float32], Array]) -> Encoder:
    """M2 or M3 with another factor of x, y and norm."""
    return Encoder(
        factor=lambda x, y, norm, scheme: factor(x, y, norm),
        concerns=lambda scheme: scheme.magnitude == magnitude,
    )


_RECIPROCAL_OF_NORM = _dividing_by_norm(wrong.direction_by_reciprocal)
_UNROUNDED_MINIMUM = _dividing_range(
    lambda step, span: (step.high - step.low) / _levels(step), concerns=_asymmetric
)

# What the cases of a flag tell from the specification.
WRONG_ENCODERS: dict[str, tuple[Encoder, ...]] = {
    "half-even": (
        _rounding(wrong.half_away),
        _rounding(wrong.half_up),
        _rounding(wrong.half_toward_zero),
        _rounding(wrong.half_up_in_float32),
    ),
    "reciprocal-of-scale": (_dividing(wrong.quotient_by_reciprocal),),
    "merged-division": (
        Encoder(code=_merged_division, concerns=_normed),
        Encoder(code=_merged_reciprocals, concerns=_normed),
        _dividing(wrong.divided_apart, concerns=_asymmetric),
        _dividing(wrong.fused_subtraction, concerns=_asymmetric),
    ),
    "double-precision-quotient": (
        _dividing(wrong.double_quotient),
        Encoder(code=_double_throughout),
    ),
    "unnarrowed-scale": (
        Encoder(code=_unnarrowed_scale),
        Encoder(code=lambda step: np.rint((step.direction - step.low) / divisor(step.scale))),
    ),
    "scale-epsilon": (
        _dividing(lambda d, scale, zero: (d - zero) / (divisor(scale) + np.float32(1e-8))),
    ),
    "scale-narrowing": (
        _dividing_range(lambda step, span: span * (np.float32(1) / _levels(step))),
        _dividing_range(_beyond_ties),
        _UNROUNDED_MINIMUM,
    ),
    "outlier-narrowing": (Encoder(outliers=_direct_outliers), _RECIPROCAL_OF_NORM),
    "reciprocal-of-norm": (_RECIPROCAL_OF_NORM, _dividing_by_norm(_root_of_reciprocal)),
    "norm-epsilon": (_dividing_by_norm(lambda x, norm: x / (norm + np.float32(1e-12))[..., None]),),
    "norm-before-narrowing": (_narrowed_norm("bfloat16"), _narrowed_norm("float16")),
    "norm-accumulation": (
        *map(_norm_summed, wrong.FLOAT32_SUMS),
        _norm_moved(np.inf),
        _norm_moved(0),
    ),
    "norm-midpoint": (Encoder(norm=_double_norm),),
    "factor-narrowing": (
        _factor_summed(wrong.in_order, np.float64),
        *(_factor_summed(total, np.float32) for total in wrong.FLOAT32_SUMS),
        _factor("gain", lambda x, y, norm: norm * (np.float32(1) / divisor(rounding.norm(y)))),
        # Least squares on the direction, times the norm: a rounding more.
        _factor(
            "lsq",
            lambda x, y, norm: norm * rounding.least_squares_gain(spec.direction_of(x, norm), y),
        ),
    ),
    "range-precision": (
        _dividing_range(
            lambda step, span: (
                (step.high.astype(np.float64) - spec.range_zero(step.low, step.scheme))
                / _levels(step)
            ).astype(np.float32),
            concerns=_asymmetric,
        ),
    ),
    "narrow-range": (
        _changing_scale(lambda scale: np.maximum(scale, scale.dtype.type(0))),
        _changing_scale(np.abs),
        _UNROUNDED_MINIMUM,
        _rounding(lambda quotient: wrong.wrapped(quotient, np.int8)),
        _rounding(lambda quotient: wrong.wrapped(quotient, np.int16)),
        _rounding(lambda quotient: wrong.wrapped(quotient, np.uint8)),  # clamps only above
    ),
}


def _stored_away(step: Step) -> tuple[Array, Array]:
    """Narrow scales on a tie away from zero."""
    zero, dtype = spec.range_zero(step.low, step.scheme), FLOAT_DTYPES[step.scheme.scale_dtype]
    wide = spec.range_span(step.low, step.high, zero, step.scheme) / _levels(step)
    return wrong.half_away_narrowed(rounding.narrow(wide, dtype), wide, dtype), zero


def _factor_away(x: Float32, y: Float32, norm: Float32, scheme: Scheme) -> Array:
    """Narrow factors on a tie away from zero."""
    wide, dtype = spec.factor(x, y, norm, scheme), FLOAT_DTYPES[scheme.norm_dtype]
    return np.asarray(
        wrong.half_away_narrowed(rounding.narrow(wide, dtype), wide, dtype).astype(np.float32)
    )


def _adding_to_norm(epsilon: float) -> Encoder:
    return _dividing_by_norm(lambda x, norm: x / (norm + np.float32(epsilon))[..., None])


def _least_norm(least: float) -> Encoder:
    return _dividing_by_norm(lambda x, norm: x / np.maximum(norm, np.float32(least))[..., None])


def _adding_to_scale(epsilon: float) -> Encoder:
    return _dividing(lambda d, scale, zero: (d - zero) / (divisor(scale) + np.float32(epsilon)))


# What cases of narrow inputs are picked by besides: there, fewer blocks tell more than one mistake.
FURTHER_ENCODERS: dict[str, tuple[Encoder, ...]] = {
    "scale-narrowing": (Encoder(scale=_stored_away),),
    "factor-narrowing": (Encoder(factor=_factor_away, concerns=_normed),),
    "norm-epsilon": (
        *(_adding_to_norm(epsilon) for epsilon in (1e-10, 1e-8)),
        *(_least_norm(least) for least in (1e-7, 1e-6)),
    ),
    "scale-epsilon": (*(_adding_to_scale(epsilon) for epsilon in (1e-12, 1e-10)),),
}


def wrong_encoders(flag: str, scheme: Scheme) -> list[Encoder]:
    """Return the encoders that the cases of a flag tell from the specification's.

    Examples
    --------
    >>> len(wrong_encoders("half-even", Scheme()))
    4
    """
    return [encoder for encoder in WRONG_ENCODERS[flag] if encoder.concerns(scheme)]


def further_encoders(flag: str, scheme: Scheme) -> list[Encoder]:
    """Return the encoders that cases of a flag and of narrow input tell besides.

    Examples
    --------
    >>> len(further_encoders("scale-narrowing", Scheme()))
    1
    """
    return [one for one in FURTHER_ENCODERS.get(flag, ()) if one.concerns(scheme)]

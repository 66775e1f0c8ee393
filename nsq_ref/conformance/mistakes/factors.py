"""Wrong stored factors: norms, gains, least squares (rules M1, M2, M3)."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.conformance.mistakes.arithmetic import (
    divisor,
    flushed,
    half_away_narrowed,
    in_float64,
    in_order,
    length_in_float64,
    narrowed_at_once,
    toward_zero,
)
from nsq_ref.conformance.mistakes.changes import (
    ENCODE,
    F32,
    FACTOR_RULES,
    Function,
    knowing,
    knowing_both,
    place,
)
from nsq_ref.conformance.mistakes.reference import Change, Mistake, Reference
from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.scheme import Scheme

_stored = place("spec.stored_factor", "M1", ENCODE)


def _narrowed(name: str, says: str, function: Function) -> Mistake:
    """Narrow factors otherwise, and nothing else."""

    def stored_factor(
        reference: Reference, x: Any, y: Any, norm: Any, scheme: Scheme, length: Any = None,
        size: Any = 1,
    ) -> Any:  # fmt: skip
        wide = reference.spec.factor(x, y, norm, scheme, length, size)
        dtype = FLOAT_DTYPES[scheme.norm_dtype]
        return function(reference.rounding.narrow(wide, dtype), wide, dtype)

    change = {"spec.stored_factor": knowing(stored_factor)}
    return Mistake(name, "M1", says, ENCODE, change, FACTOR_RULES)


def _where_stored(
    magnitude: str, function: Function, fed: bool = False, sized: bool = True
) -> Change:
    """Call ``function(reference, x, y, norm, scheme)`` where the scheme has this magnitude.

    But, unless `fed`, not for gains under feedback, which are none of ``||y||``. If `sized`, x and
    y are over the channels' sizes where gains are of these (N3).
    """

    def factor(
        original: Function, reference: Reference, x: Any, y: Any, norm: Any, scheme: Scheme,
        length: Any = None, size: Any = 1,
    ) -> Any:  # fmt: skip
        other = magnitude == "gain" and length is not None and not fed
        if not scheme.separate_norm or scheme.magnitude != magnitude or other:
            return original(x, y, norm, scheme, length, size)
        if magnitude == "gain" and sized:
            x, y = x / size, y / size
        return function(reference, x, y, norm, scheme)

    return knowing_both(factor)


def _factor(
    magnitude: str, name: str, says: str, function: Function, fed: bool = False, sized: bool = True
) -> Mistake:
    """Give another float32 factor ``function(reference, x, y, norm)`` for this magnitude."""
    change = _where_stored(
        magnitude,
        lambda reference, x, y, norm, scheme: np.where(
            np.isinf(norm), norm, function(reference, x, y, norm)
        ),
        fed, sized,
    )  # fmt: skip
    return Mistake(name, FACTOR_RULES[magnitude], says, ENCODE, {"spec.factor": change})


def _at_once(magnitude: str, function: Function) -> Change:
    """Store what ``function(x, y)`` gives in float64 for this magnitude, rounded once."""

    def stored(reference: Reference, x: Any, y: Any, norm: Any, scheme: Scheme) -> Any:
        wide = np.where(np.isinf(norm), norm, function(x, y))
        narrowed = narrowed_at_once(wide, scheme.norm_dtype)
        # Nothing is left to round, but -0 is still stored as +0.
        return reference.rounding.narrow(narrowed, FLOAT_DTYPES[scheme.norm_dtype])

    return _where_stored(magnitude, stored)


FACTORS = [
    _stored("norm narrowed at once from float64",
        "stored norms are narrowed from float64; round to float32 first",
        _at_once("norm", lambda x, y: length_in_float64(x))),
    _narrowed("factors narrowed toward zero", "stored factors are narrowed by truncation",
        toward_zero),
    _narrowed("factors narrowed with ties away from zero",
        "stored factors on a tie are narrowed away from zero", half_away_narrowed),
    _narrowed("subnormal factors flushed", "subnormal stored factors are flushed to 0", flushed),
    _factor("gain", "gain without the length",
        "the stored gain is the norm itself; divide by ||y||", lambda ref, x, y, norm: norm, True),
    _factor("gain", "reciprocal of the length in a gain",
        "gains are norm * (1 / ||y||), which rounds twice",
        lambda ref, x, y, norm: norm * (F32(1) / divisor(ref.spec.length_if_finite(y)))),
    _factor("gain", "gain from a float32 length",
        "gains agree with ||y|| from a sequential float32 sum",
        lambda ref, x, y, norm: norm / divisor(np.sqrt(in_order(y, y)))),
    _stored("gain in double precision",
        "gains are narrowed from a float64 quotient; "
        "norm, ||y|| and quotient each round to float32",
        _at_once("gain", lambda x, y: length_in_float64(x) / divisor(length_in_float64(y))), "M2"),
    _factor("gain", "least squares for a gain", "stored gains are those of least squares (M3)",
        lambda ref, x, y, norm: ref.rounding.least_squares_gain(x, y), True, False),
    _factor("lsq", "least squares in float32", "gains agree with sequential float32 dot products",
        lambda ref, x, y, norm: in_order(x, y) / divisor(in_order(y, y))),
    _stored("least squares in float64 alone",
        "gains are narrowed from a float64 quotient; round to float32 first",
        _at_once("lsq", lambda x, y: in_float64(x, y) / divisor(in_float64(y, y))), "M3"),
    _factor("lsq", "least squares over x", "gains are <x, y> / <x, x>; divide by <y, y>",
        lambda ref, x, y, norm: (in_float64(x, y) / divisor(in_float64(x, x))).astype(F32)),
    _factor("lsq", "norm over length for least squares", "stored gains are norm / ||y|| (M2)",
        lambda ref, x, y, norm: norm / divisor(ref.rounding.norm(y))),
    _factor("lsq", "norm for least squares", "the stored gain is the norm (M1)",
        lambda ref, x, y, norm: norm),
    _factor("lsq", "least squares of the direction",
        "gains are those of the direction; multiply by the norm",
        lambda ref, x, y, norm: ref.rounding.least_squares_gain(ref.spec.direction_of(x, norm), y)),
]  # fmt: skip

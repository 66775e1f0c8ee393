"""Wrong codes (rules Q1, Q2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.conformance.mistakes import arithmetic as wrong
from nsq_ref.conformance.mistakes.arithmetic import divisor
from nsq_ref.conformance.mistakes.changes import ENCODE, F32, F64, Function, instead, place
from nsq_ref.conformance.mistakes.packed import stored_as
from nsq_ref.conformance.mistakes.reference import Change, Mistake
from nsq_ref.scheme import Scheme

_code = place("spec.code", "Q1", ENCODE)


def _dividing_with(divided: Function, rounded: Function = np.rint) -> Change:
    """Q1 with another quotient of ``direction``, float32 ``scale`` and ``zero``."""

    def code(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
        codes = rounded(divided(direction, scale.astype(F32), zero.astype(F32)))
        return np.clip(codes, *map(F32, scheme.code_range)).astype(F32)

    return instead(code)


def _rounding_with(rounded: Function) -> Change:
    """Q1 with another rounding of the quotient."""
    return _dividing_with(wrong.quotient, rounded)


def _half_odd(value: Any) -> Any:
    tie = np.abs(value - np.trunc(value)) == 0.5
    return np.where(tie, 2 * value - np.rint(value), np.rint(value))


def _with_most_negative(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
    codes = np.rint(wrong.quotient(direction, scale.astype(F32), zero.astype(F32)))
    low, high = scheme.code_range
    return np.clip(codes, low - scheme.symmetric, high)


CODES = [
    _code("half away from zero", "exact ties are rounded away from zero",
        _rounding_with(wrong.half_away)),
    _code("half toward zero", "exact ties are rounded toward zero",
        _rounding_with(wrong.half_toward_zero)),
    _code("half up", "exact ties are rounded up", _rounding_with(wrong.half_up)),
    _code("half down", "exact ties are rounded down",
        _rounding_with(lambda value: np.ceil(value.astype(F64) - 0.5))),
    _code("half to odd", "exact ties are rounded to odd", _rounding_with(_half_odd)),
    _code("one half added in float32",
        "a half is added in float32 and the sum cut off, which also lifts what lies below the tie",
        _rounding_with(lambda value: np.copysign(np.floor(np.abs(value) + F32(0.5)), value))),
    _code("truncation", "quotients are cut off toward zero", _rounding_with(np.trunc)),
    _code("floor", "quotients are rounded down", _rounding_with(np.floor)),
    _code("reciprocal of the scale", "quotients are direction * (1 / scale), which rounds twice",
        _dividing_with(wrong.quotient_by_reciprocal)),
    _code("quotient in double precision",
        "quotients are in float64; a float32 quotient may round to a tie",
        _dividing_with(wrong.double_quotient)),
    _code("difference and quotient in double precision",
        "differences and quotients are in float64; each rounds to float32",
        _dividing_with(lambda d, scale, zero: (d.astype(F64) - zero) / divisor(scale))),
    _code("zero divided apart", "quotients are direction / scale - zero / scale; subtract first",
        _dividing_with(wrong.divided_apart)),
    *(_code(f"epsilon {epsilon:g} added to the scale",
          f"quotients are direction / (scale + {epsilon:g}); there is no epsilon",
          _dividing_with(lambda d, scale, zero, epsilon=epsilon: (
              (d - zero) / (scale + F32(epsilon)))))
      for epsilon in (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)),
    _code("cast before the clamp", "quotients are cast to int8 before the clamp, and wrap",
        _rounding_with(lambda quotient: wrong.wrapped(quotient, np.int8).astype(F32))),
    Mistake("most negative code allowed", "Q2",
        "the most negative code is written; symmetric codes end at -qmax",
        ENCODE, {"spec.code": instead(_with_most_negative),
                 **stored_as(
                     lambda codes, scheme: codes + np.int16(scheme.code_offset),
                     lambda numbers, scheme: numbers - np.int16(scheme.code_offset))}),
]  # fmt: skip

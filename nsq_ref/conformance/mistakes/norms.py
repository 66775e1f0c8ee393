"""Wrong norms and directions (rules N1, N2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.conformance.mistakes import arithmetic as wrong
from nsq_ref.conformance.mistakes.arithmetic import Sum, divisor
from nsq_ref.conformance.mistakes.changes import (
    ENCODE,
    F32,
    F64,
    Function,
    after,
    around,
    instead,
    knowing_both,
    place,
)
from nsq_ref.conformance.mistakes.reference import Change, Reference
from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.scheme import Scheme

_norm = place("rounding.norm", "N1", ENCODE)
_direction = place("spec.direction_of", "N2", ENCODE)


def _root_of(total: Sum) -> Change:
    return instead(lambda x: np.sqrt(total(x, x)).astype(F32))


NORMS = [
    _norm("norm summed in float32", "norms agree with a sequential float32 sum of squares",
        _root_of(wrong.in_order)),
    _norm("norm summed in float32, fused",
        "norms agree with a sequential float32 sum of squares by fused multiply-adds",
        _root_of(wrong.fused)),
    _norm("norm summed pairwise in float32", "norms agree with a float32 tree of sums by halves",
        _root_of(wrong.pairwise)),
    _norm("norm summed by neighbours in float32",
        "norms agree with a float32 tree of sums by neighbours", _root_of(wrong.neighbours_first)),
    *(_norm(f"norm summed in {lanes} float32 lanes",
          f"norms agree with float32 sums in {lanes} lanes, added as a tree",
          _root_of(wrong.in_lanes(lanes)))
      for lanes in (4, 8, 16, 32)),
    _norm("norm summed in float64 alone",
        "norms agree with a float64 sum that is rounded without a look at the rare ties",
        _root_of(wrong.in_float64)),
    _norm("norm summed in float16", "norms agree with a float16 sum of squares",
        _root_of(wrong.in_float16)),
    _norm("norm of order 1", "norms are sums of magnitudes (order 1), not Euclidean",
        instead(lambda x: np.sum(np.abs(x, dtype=F64), axis=-1).astype(F32))),
    _norm("norm of order -1",
        "norms are of order -1: the -1 meant as the axis was taken for the order",
        instead(lambda x: (1 / np.sum(1 / np.abs(x.astype(F64)), axis=-1)).astype(F32))),
    _norm("norm of order infinity", "norms are the largest magnitude, not Euclidean",
        instead(lambda x: np.max(np.abs(x), axis=-1))),
    _norm("norm without its root", "norms are sums of squares without the root",
        instead(lambda x: wrong.in_float64(x, x).astype(F32))),
    _norm("root of the mean square", "norms are roots of the mean square, not of the sum",
        instead(lambda x: np.sqrt(wrong.in_float64(x, x) / x.shape[-1]).astype(F32))),
    _norm("norm summed in float32, compensated",
        "norms agree with a compensated (Kahan) float32 sum of squares",
        _root_of(wrong.compensated)),
    _norm("subnormal norms flushed", "subnormal norms are 0, and their tokens coded as zero tokens",
        after(wrong.flushed)),
    *(_norm(f"norms below {least:g} taken for 0",
          f"tokens of a norm below {least:g} are coded as zero tokens; only a norm of 0 is one",
          after(lambda norm, *_, least=least: np.where(norm < F32(least), F32(0), norm)), "N2")
      for least in (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)),
]  # fmt: skip


def _in_float64(x: Any, norm: Any) -> Any:
    if np.all(norm == 1):  # without norm separation
        return x
    return (x / divisor(wrong.length_in_float64(x))[..., None]).astype(F32)


def _norm_as_stored(dtype: str) -> Change:
    def direction(original: Function, reference: Reference, x: Any, norm: Any) -> Any:
        narrowed = reference.rounding.narrow(norm, FLOAT_DTYPES[dtype])
        return original(x, narrowed.astype(F32))

    return knowing_both(direction)


def _narrowed(dtype: str) -> Change:
    def direction(original: Function, reference: Reference, x: Any, norm: Any) -> Any:
        return reference.rounding.narrow(original(x, norm), FLOAT_DTYPES[dtype]).astype(F32)

    return knowing_both(direction)


def _divided_by(length: Function) -> Change:
    return instead(lambda x, norm: x / length(x, norm)[..., None])


def _without_zero_tokens(original: Function, direction: Any, coded: Any, scheme: Scheme) -> Any:
    zero = ~np.any(direction != 0, axis=-1, keepdims=True)
    return original(direction, coded & ~zero, scheme)


DIRECTIONS = [
    _direction("reciprocal of the norm", "directions are x * (1 / norm), which rounds twice",
        instead(wrong.direction_by_reciprocal)),
    _direction("reciprocal root", "directions are x * (1 / root), the root in float64",
        instead(lambda x, norm: x * (1 / np.sqrt(divisor(wrong.in_float64(x, x)))).astype(F32)[
            ..., None] if np.any(norm != 1) else x)),
    _direction("direction from the float64 norm",
        "directions are x over a float64 norm; it is to be rounded to float32 first",
        instead(_in_float64)),
    *(_direction(f"norm narrowed to {dtype} before the division",
          f"directions are x over the norm as stored in {dtype}; divide by the float32 norm",
          _norm_as_stored(dtype))
      for dtype in ("float16", "bfloat16")),
    *(_direction(f"directions in {dtype}", f"directions are narrowed to {dtype}; they are float32",
          _narrowed(dtype))
      for dtype in ("float16", "bfloat16")),
    *(_direction(f"epsilon {epsilon:g} added to the norm",
          f"directions are x / (norm + {epsilon:g}); there is no epsilon",
          _divided_by(lambda x, norm, epsilon=epsilon: norm + F32(epsilon)))
      for epsilon in (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)),
    *(_direction(f"norm at least {epsilon:g}",
          f"directions are x / max(norm, {epsilon:g}); there is no epsilon",
          _divided_by(lambda x, norm, epsilon=epsilon: np.maximum(norm, F32(epsilon))))
      for epsilon in (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)),
    *(_direction(f"epsilon {epsilon:g} added to the sum of squares",
          f"directions are x / sqrt(sum of squares + {epsilon:g}); there is no epsilon",
          _divided_by(lambda x, norm, epsilon=epsilon: (
              np.sqrt(wrong.in_float64(x, x) + epsilon).astype(F32))))
      for epsilon in (1e-12, 1e-10, 1e-8, 1e-6, 1e-5)),
    place("spec.without_codes", "N2", ENCODE)("codes of a zero token",
        "zero tokens are coded like others; all their codes are to be 0",
        instead(lambda codes, coded, norm: np.where(coded, codes, 0).astype(np.int16))),
    place("spec.without_codes", "N2", ENCODE)("zero test on the norm in float16",
        "tokens whose norm is 0 in float16 are coded as zero tokens; test the float32 norm",
        around(lambda original, codes, coded, norm: original(
            codes, coded, norm.astype(np.float16).astype(F32)))),
    place("model.split_sinks", "N1", ("encode",))("subnormal inputs flushed",
        "subnormal float32 input is flushed to 0",
        after(lambda split, x, scheme: (split[0], wrong.flushed(split[1])))),
    place("model.split_sinks", "I1", ("encode",))("subnormal float16 inputs flushed",
        "subnormal float16 input is flushed to 0",
        after(lambda split, x, scheme: (
            split[0], np.where(np.abs(split[1]) < 2.0**-14, F32(0), split[1])
            if x.dtype == np.float16 else split[1]))),
    place("spec.extent", "N2", ENCODE)("zero tokens outside the range",
        "zero tokens do not count in minimum and maximum; their direction 0 does",
        around(_without_zero_tokens)),
]  # fmt: skip

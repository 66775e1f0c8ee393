"""Diagnoses claim what is so: values that are a few steps off, parts, chance, one case alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from nsq_ref import Scheme, rounding, spec
from nsq_ref.conformance import as_text, check
from nsq_ref.conformance.check import run
from nsq_ref.conformance.findings import Diagnosis, Report
from nsq_ref.conformance.mistakes.arithmetic import half_away
from nsq_ref.conformance.mistakes.reference import Mistake, Reference
from nsq_ref.conformance.ports import Callables
from tests.support.cases import cases_made_once

__all__ = ["cases_made_once"]  # the fixture

PAPER = Scheme()
F32 = np.float32


def moved(values: Any, steps: Any) -> Any:
    """Float32 so many steps away; zero and infinity stay."""
    values = np.asarray(values, F32)
    stays = (values == 0) | ~np.isfinite(values)
    return np.where(stays, values, (values.view(np.int32) + np.int32(steps)).view(F32))


def scattered(values: Any, of: int) -> Any:
    """True for one in so many, by the bits of a value."""
    bits = np.asarray(values, F32).view(np.uint32).astype(np.uint64)
    return (bits * np.uint64(2654435761) >> np.uint64(7)) % np.uint64(of) == 0


def port_with(**changes: Any) -> Any:
    """An encoder with functions of the specification replaced: ``spec__code=function``."""
    named = {name.replace("__", "."): change for name, change in changes.items()}
    mistake = Mistake("of the port", "", "", ("encode",), {
        name: lambda original, reference, function=function: function
        for name, function in named.items()
    })  # fmt: skip
    reference = Reference([mistake])

    def encode(x: Any, scheme: Scheme) -> Any:
        import nsq_ref as nsq

        nsq.quantize(x, scheme)  # refuses what is to be refused
        with np.errstate(all="ignore"):
            return reference.model.encode(x, scheme)

    return encode


def found_in(encode: Any, scheme: Scheme = PAPER) -> tuple[Report, list[Diagnosis]]:
    report = check(encode, scheme=scheme)
    return report, list(report.schemes[0].diagnoses)


def divided(x: Any, norm: Any) -> Any:
    """A division of two units in the last place."""
    right = spec.direction_of(x, norm)
    return moved(right, np.where(scattered(right, 3), 2, 0))


def quotient(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
    """A quotient that is a step off, and codes from it."""
    right = (direction - zero.astype(F32)) / spec.where_zero(scale.astype(F32), np.inf)
    off = moved(right, np.where(scattered(right, 3), 1, 0))
    return np.clip(np.rint(off), *map(F32, scheme.code_range))


def test_a_norm_a_step_off_is_named_first() -> None:
    """N1, though scales and codes are wrong by way of it, and nothing else is said."""

    def root(x: Any) -> Any:
        right = rounding.norm(x)
        return moved(right, np.where(scattered(right, 4), 1, 0))

    _, found = found_in(port_with(rounding__norm=root))
    assert [(one.rule, one.mistake, one.steps) for one in found] == [("N1", "", 1)]
    assert {"norm", "codes"} <= set(found[0].stages)


def test_a_direction_two_steps_off_is_named_first() -> None:
    """N2. The scales are right on what they are made of, which is not what it should be."""
    _, found = found_in(port_with(spec__direction_of=divided))
    assert found[0].rule == "N2"
    assert found[0].mistake == ""
    assert found[0].steps <= 2
    assert set(found[0].stages) == {"scale", "codes"}
    assert len(found) == 1


def test_a_quotient_a_step_off_is_no_wrong_direction() -> None:
    """Q1. All scales are right, and so directions are."""
    _, found = found_in(port_with(spec__code=quotient))
    assert [(one.rule, one.mistake, one.steps) for one in found] == [("Q1", "", 1)]


def test_ties_that_are_rounded_otherwise_are_no_approximation() -> None:
    """Q1. Only some channels round half away: no known mistake, and no quotient that is off."""

    def code(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
        right = (direction - zero.astype(F32)) / spec.where_zero(scale.astype(F32), np.inf)
        even = np.arange(right.shape[-1]) % 2 == 0
        whole = np.where(even, half_away(right), np.rint(right))
        return np.clip(whole, *map(F32, scheme.code_range)).astype(F32)

    _, found = found_in(port_with(spec__code=code))
    assert [(one.rule, one.mistake, one.steps) for one in found] == [("Q1", "", 0)]
    assert "all of them on ties" in found[0].says


def test_what_is_explained_in_part_says_which_part() -> None:
    """Q1. Half away, and one code of one channel: the numbers add up."""

    def code(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
        right = (direction - zero.astype(F32)) / spec.where_zero(scale.astype(F32), np.inf)
        codes = np.clip(half_away(right), *map(F32, scheme.code_range)).astype(F32)
        if codes.shape[-1] == 11:
            codes[..., -1, -1] = 0
        return codes

    report, found = found_in(port_with(spec__code=code))
    named = [one for one in found if one.mistake]
    assert [one.mistake for one in named] == ["half away from zero"]
    rest = sum(f.wrong for one in found if not one.mistake for f in one.findings)
    assert rest > 0
    assert f"This does not explain the other {rest}." in named[0].says
    assert f"the other {rest}" in " ".join(as_text(report).split())


def test_chance_is_told_as_chance() -> None:
    """Q1. A race that spoils codes: neither state nor any known mistake."""
    calls = itertools.count()

    def code(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
        codes = spec.code(direction, scale, zero, scheme)
        if next(calls) % 5 in (1, 2, 4):
            codes[..., -1, :] = 0
        return codes

    _, found = found_in(port_with(spec__code=code))
    assert found[0].rule == "Q1"
    assert "not deterministic" in found[0].says
    assert not [one for one in found if one.mistake or one.rule == "B2"]


def test_what_is_kept_between_calls_is_not_chance() -> None:
    """B2. Later answers agree with each other, and not with the first."""
    seen: set[bytes] = set()

    def code(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
        codes = spec.code(direction, scale, zero, scheme)
        if direction.tobytes() in seen:
            codes[..., -1, :] = 0
        seen.add(direction.tobytes())
        return codes

    _, found = found_in(port_with(spec__code=code))
    assert "B2" in {one.rule for one in found}
    assert not [one for one in found if "deterministic" in one.says]


def test_one_case_alone_is_explained_by_its_own_stage() -> None:
    """Q1. Earlier rules explain a single wrong code, too; they are named as not told apart."""
    port = Callables("mine", encode=port_with(spec__code=quotient))
    full = run(port, [("nsep+pchan4", PAPER)], ["encode"])
    names = [f"encode/{f.case.id}" for f in full.schemes[0].diagnoses[0].findings]
    for name in names[:4]:
        report = run(port, [("nsep+pchan4", PAPER)], ["encode"], only=name)
        assert report.schemes[0].diagnoses[0].rule == "Q1", name

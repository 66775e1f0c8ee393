"""Key feedback in the kit: an operation that is asked of those who say that they have it."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nsq_ref import Feedback, Scheme, quantize
from nsq_ref.conformance import as_text, check
from nsq_ref.conformance.cases import cases
from nsq_ref.conformance.cases.feedback import SHOWN
from nsq_ref.conformance.check import run
from nsq_ref.conformance.coverage import answered as answer_of
from nsq_ref.conformance.coverage import reason
from nsq_ref.conformance.family import FAMILY
from nsq_ref.conformance.judge import Latitudes, judge
from nsq_ref.conformance.mistakes import MISTAKES, Reference
from nsq_ref.conformance.mistakes.feedback import FED_BACK, GAINS_SEEN
from nsq_ref.conformance.mistakes.reference import Mistake
from nsq_ref.conformance.operations import OPERATIONS, USUAL, Answer, Case
from nsq_ref.conformance.ports import Callables, hello_frame, open_port, read_hello, write_requests
from nsq_ref.conformance.ports.frames import read_frame
from nsq_ref.conformance.ports.messages import case_of
from tests.support.asked import FUNCTIONS, answered, equal
from tests.support.cases import cases_made_once, cases_of

__all__ = ["cases_made_once"]  # the fixture

RICH = Scheme(symmetric=False, magnitude="lsq", block_size=5, sink_tokens=2, outlier_channels=2)
GAINS = replace(RICH, magnitude="gain")
SCHEMES: dict[str, Scheme] = {
    "rich": RICH,
    "gains": GAINS,
    "search a token": Scheme(
        bits=2, axis="token", scale_rule="search", symmetric=False, magnitude="gain"
    ),
    "plain": Scheme(bits=3, separate_norm=False, scale_dtype="float32", outlier_channels=1),
    "blocks of 1": Scheme(bits=8, block_size=1, scale_dtype="bfloat16", norm_dtype="float32"),
}


def with_feedback(case: Case) -> Feedback:
    return Feedback(case.inputs["order"], case.inputs["factor"])


@pytest.mark.parametrize("name", SCHEMES)
def test_cases_are_what_the_library_says(name: str) -> None:
    """F1 I2 O1. All of its backends, of which the oracle shares no code with the kit."""
    some = cases_of(SCHEMES[name], ["feedback"])
    assert len({case.id for case in some}) == len(some)
    for case in some:
        assert case.flags[0] == case.id.split("/")[0]
        size = case.inputs["x"].size
        for backend in ("numpy", "numba", *(("oracle",) if size < 32 else ())):
            arguments: Any = case.inputs["x"], case.scheme, backend
            if case.refused_by is not None:
                with pytest.raises(ValueError, match=r"not finite|beyond|is (nan|inf|-inf)"):
                    quantize(*arguments, feedback=with_feedback(case))
                continue
            coded = quantize(*arguments, feedback=with_feedback(case))
            assert not judge(case, Answer(0, coded.parts)).findings, (case, backend)


def test_cases_without_it_stay() -> None:
    """Their ids, their order and so their numbers; it is asked where it is named, and last."""
    usual, named = cases(RICH, quick=True), cases(RICH, OPERATIONS, quick=True)
    assert {case.operation for case in usual} == set(USUAL)
    assert [case.id for case in named[: len(usual)]] == [case.id for case in usual]
    assert {case.operation for case in named[len(usual) :]} == {"feedback", "stream_feedback"}


@pytest.mark.parametrize(
    ("scheme", "mistakes"),
    [
        (RICH, FED_BACK),
        (GAINS, GAINS_SEEN),
        (replace(RICH, outlier_channels=0), [MISTAKES["scales of all blocks"]]),
        (Scheme(axis="token"), [MISTAKES["scales of moved tokens"]]),
    ],
)
def test_every_mistake_has_a_case_of_its_own(scheme: Scheme, mistakes: list[Mistake]) -> None:
    """F1 M2. All that are known, and each where it can show, in every dtype."""
    for mistake in mistakes:
        if reason(mistake, scheme, "float32") is not None:
            continue
        flags = {one.flag for one in SHOWN if one.mistake == mistake.name} or {"feedback-tokens"}
        for first in (0, 100, 200):
            told = (
                case.id
                for case in cases_of(scheme, ["feedback"])
                if case.flags[0] in flags
                and first <= int(case.id.split("/")[1]) < first + 100
                and case.refused_by is None
                and is_wrong(case, mistake.name)
            )
            assert any(told), (mistake.name, first)


def test_no_mistake_breaks_off_under_feedback() -> None:
    """F1. All that encoders do wrong can be looked for here, too."""
    flags = ("feedback-of-heads", "feedback-outliers")
    some = [
        [case for case in cases_of(scheme, ["feedback"]) if case.flags[0] in flags]
        for scheme in (RICH, replace(GAINS, axis="token"))
    ]
    for mistake in MISTAKES.values():
        if "feedback" in mistake.operations:
            reference = Reference([mistake])
            for case in (some[0][0], some[0][-1], some[1][0]):
                given = answer_of(reference, case)
                assert given is not None, mistake.name
                assert not judge(case, given, Latitudes(), reference).findings, mistake.name


def is_wrong(case: Case, mistake: str) -> bool:
    port = port_with(mistake)
    return bool(judge(case, answered(port.ask(0, case))).findings)


def port_with(*mistakes: str) -> Callables:
    model = Reference([MISTAKES[name] for name in mistakes]).model

    def feedback(x: Any, scheme: Scheme, feedback: Feedback) -> Any:
        quantize(x, scheme, feedback=feedback)  # refuses what is to be refused
        with np.errstate(all="ignore"):
            return model.encode_with_feedback(x, scheme, feedback.order, feedback.factor)

    def encode(x: Any, scheme: Scheme) -> Any:
        quantize(x, scheme)
        with np.errstate(all="ignore"):
            return model.encode(x, scheme)

    return Callables("mine", encode=encode, feedback=feedback)


@pytest.mark.parametrize(
    ("mistake", "rule"),
    [
        ("feedback fused", "F1"),
        ("factor in the order of channels", "F1"),
        ("errors of outlier channels left out", "F1"),
        ("errors over their weight", "F1"),
        ("scales of the directions", "F1"),
        ("half away from zero", "Q1"),
        ("zero tokens outside the range", "N2"),
        ("gain of the plain length", "M2"),
        ("weights in the order of channels", "M2"),
        ("product before the quotient in a gain", "M2"),
        ("what is seen moved by errors", "M2"),
    ],
)
def test_a_mistake_is_named(mistake: str, rule: str) -> None:
    """F1 M2 N2 Q1. By the report, with the rule; of other cases nothing is left."""
    scheme = GAINS if rule == "M2" else RICH
    report = run(port_with(mistake), [("mine", scheme)], ["feedback"], dtypes=["float32"])
    (found,) = report.schemes[0].diagnoses
    assert (found.rule, found.mistake) == (rule, mistake)
    text = as_text(report)
    assert "Answered: feedback" in text
    assert f"\n{rule}  " in text


def test_a_mistake_of_encode_explains_its_part_here() -> None:
    """Q1 F1: what both have in common is told once."""
    schemes = [("mine", RICH)]
    port = port_with("truncation")
    report = run(port, schemes, ["encode", "feedback"], dtypes=["float32"], quick=True)
    (found,) = report.schemes[0].diagnoses
    assert found.mistake == "truncation"
    assert {f.case.operation for f in found.findings} == {"encode", "feedback"}


def test_what_follows_from_a_wrong_code_is_right() -> None:
    """F1: its error has moved on, into codes, scales and gains, which are judged for that."""
    case = next(c for c in cases_of(GAINS, ["feedback"]) if c.id == "moved-errors/0")
    order = case.inputs["order"][0]
    place = next(p for p in range(2, 8) if order[p] > 1)  # behind others, and no outlier
    reference, calls = Reference(), itertools.count()
    right = reference.spec.code

    def code(w: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
        codes = right(w, scale, zero, scheme)
        if w.shape == (5, 1) and next(calls) % 8 == place:
            codes[..., 2, 0] = np.where(codes[..., 2, 0] > 7, 1, 14)
        elif w.shape == (5, 8):  # once more, of all w
            codes[..., 2, order[place]] = np.where(codes[..., 2, order[place]] > 7, 1, 14)
        return codes

    vars(reference.spec)["code"] = code
    answer = answer_of(reference, case)
    assert answer is not None
    (found,) = judge(case, answer).findings
    assert (found.stage, found.rule, found.wrong) == ("codes", "F1", 1)
    assert found.index == (2, int(order[place]))
    assert [name for name, _ in found.shown] == ["x", "norm", "w", "scale", "zero", "quotient"]


def test_another_choice_of_scales_conforms() -> None:
    """S4 F1. Whatever is searched, what follows is judged for the scales that are stored."""
    scheme = Scheme(scale_rule="search", symmetric=False, magnitude="gain", bits=2)
    for case in cases_of(scheme, ["feedback"], 0, ["float32"]):
        if case.refused_by is None:
            for mistake in ("squares under feedback", "ranges of other lengths"):
                answer = answer_of(Reference([MISTAKES[mistake]]), case)
                assert answer is not None
                assert not judge(case, answer).findings, (case, mistake)


# --- how it is asked ----------------------------------------------------------------------------


def test_callables_conform() -> None:
    """F1: by the signature of `quantize`; others are refused before anything is asked."""
    report = check(
        quantize, feedback=quantize, scheme="nsep+pchan4-outliers", require=["feedback"], quick=True
    )
    assert report.conforms
    assert "feedback" not in report.not_asked
    with pytest.raises(TypeError, match=r"it is called as feedback\(x, scheme, \*, feedback\)"):
        check(feedback=lambda x, scheme: x)
    report = check(quantize, scheme="naive4", require=["feedback"], quick=True)
    assert report.unmet == ["feedback"]


def test_what_it_is_not_implemented_is_told() -> None:
    """A port that cannot is no wrong one, unless it is claimed."""

    def without(x: Any, scheme: Scheme, feedback: Feedback) -> Any:
        raise NotImplementedError("no feedback")

    port = Callables("mine", encode=quantize, feedback=without)
    options: Any = {"quick": True, "dtypes": ["float32"]}
    schemes, operations = [("naive4", FAMILY["naive4"])], ["encode", "feedback"]
    report = run(port, schemes, operations, required=["encode"], **options)  # type: ignore[arg-type]
    assert report.conforms
    assert not report.is_whole
    assert "Not implemented: feedback.\n" in as_text(report)
    assert not run(port, schemes, operations, **options).conforms  # type: ignore[arg-type]


def test_behind_pipes_and_in_frames() -> None:
    """F1: the same question comes out of a frame, and the same answer through a pipe."""
    case = next(c for c in cases_of(RICH, ["feedback"]) if c.flags[0] == "feedback-of-heads")
    stream = io.BytesIO()
    write_requests(stream, hello_frame(operations=OPERATIONS), [case])
    stream.seek(0)
    assert read_hello(stream).operations == list(OPERATIONS)
    frame = read_frame(stream)
    assert frame is not None
    assert frame["operation"].tolist() == [4]
    number, read = case_of(frame)
    assert (number, read.operation) == (0, "feedback")
    equal(read.inputs, case.inputs)
    port = open_port(f"{FUNCTIONS}:encode", feedback=f"{FUNCTIONS}:feedback")
    try:
        got = answered(port.ask(0, case)).arrays
    finally:
        port.close()
    equal(got, quantize(case.inputs["x"], RICH, feedback=with_feedback(case)).parts)


def test_a_program_is_named_again(tmp_path: Any) -> None:
    """It answers all that it is asked; another one beside it makes no sense."""
    for name in ("mine", "other"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\ncat\n")
        program.chmod(0o755)
    mine, other = str(tmp_path / "mine"), str(tmp_path / "other")
    open_port(mine, feedback=mine).close()
    for targets in ({"encode": mine, "feedback": other}, {"feedback": mine}):
        with pytest.raises(ValueError, match="given first and alone"):
            open_port(**targets)

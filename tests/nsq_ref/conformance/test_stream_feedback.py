"""Caches of keys with feedback in the kit: an operation, and what is done wrong there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nsq_ref import Feedback, Scheme, quantize
from nsq_ref.cli import conformance
from nsq_ref.conformance import as_text
from nsq_ref.conformance.check import run
from nsq_ref.conformance.judge import judge
from nsq_ref.conformance.mistakes import MISTAKES, Reference
from nsq_ref.conformance.mistakes.feedback_caches import FED_CACHES
from nsq_ref.conformance.operations import CASE_DTYPES, OPERATIONS, USUAL, Answer, Case
from nsq_ref.conformance.ports import Callables, Hello, open_port
from nsq_ref.conformance.vectors import exact
from tests.ports import functions
from tests.support.asked import FUNCTIONS, answered, equal
from tests.support.cases import cases_made_once, cases_of
from tests.support.command import said

__all__ = ["cases_made_once"]  # the fixture

RICH = Scheme(symmetric=False, magnitude="lsq", block_size=5, sink_tokens=2, outlier_channels=2)
SCHEMES = {
    "rich": RICH,
    "streaming4": Scheme.named("streaming4"),
    "search a token": Scheme(
        bits=2, axis="token", scale_rule="search", symmetric=False, magnitude="gain", block_size=4
    ),
    "blocks of 1": Scheme(bits=8, block_size=1, scale_dtype="bfloat16", norm_dtype="float32"),
}
OPERATION = ["stream_feedback"]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_cache_of_the_library_conforms(name: str) -> None:
    """F1 B1 C1 K1. It shares no code with the reference of the kit but the rules' own."""
    some = cases_of(SCHEMES[name], OPERATION)
    assert len({case.id for case in some}) == len(some)
    port = Callables("nsq", stream_feedback=functions.stream)
    for case in some:
        assert case.flags[0] == case.id.split("/")[0]
        assert case.refused_by is None
        assert not judge(case, answered(port.ask(0, case))).findings, case


@pytest.mark.parametrize("name", ["rich", "search a token", "blocks of 1"])
def test_the_oracle_stores_the_same(name: str) -> None:
    """F1 B1 C1 K1: a list of tokens, encoded in fractions."""
    for case in cases_of(SCHEMES[name], OPERATION, 0, ["float32"]):
        expected = exact.answer(case).expected
        assert not judge(case, Answer(0, expected)).findings, case


@pytest.mark.parametrize("scheme", [RICH, SCHEMES["streaming4"]], ids=["rich", "streaming4"])
@pytest.mark.parametrize(
    "mistake",
    [
        *(one.name for one in FED_CACHES),
        "no feedback",
        "factor of the first head for all",
        "factors of the heads turned round",
    ],
)
def test_every_mistake_shows_in_every_dtype(mistake: str, scheme: Scheme) -> None:
    """F1 C1: blocks, tail, crops and heads."""
    model = Reference([MISTAKES[mistake]]).model
    for dtype in ("float32", "float16", "bfloat16"):
        some = cases_of(scheme, OPERATION, 0, [dtype])
        assert any(judge(case, Answer(0, stored(model, case))).findings for case in some), dtype


def stored(model: Any, case: Case) -> dict[str, Any]:
    inputs = case.inputs
    given = inputs["x"], case.scheme, inputs["steps"], int(inputs["row"].item())
    made: dict[str, Any] = model.stream_with_feedback(*given, inputs["order"], inputs["factor"])
    return made


def port_with(mistake: str) -> Callables:
    model = Reference([MISTAKES[mistake]]).model

    def stream(x: Any, scheme: Scheme, steps: Any, row: int, *, feedback: Feedback) -> Any:
        return model.stream_with_feedback(x, scheme, steps, row, feedback.order, feedback.factor)

    return Callables("mine", stream_feedback=stream)


@pytest.mark.parametrize(
    "mistake", [*(one.name for one in FED_CACHES), "factors of the heads turned round"]
)
def test_a_mistake_is_named(mistake: str) -> None:
    """F1. By the report, with the rule; of what is wrong in other cases nothing is left."""
    report = run(port_with(mistake), [("mine", RICH)], ["stream_feedback"], dtypes=["float32"])
    (found,) = report.schemes[0].diagnoses
    assert (found.rule, found.mistake) == ("F1", mistake)
    assert MISTAKES[mistake].says in " ".join(as_text(report).split())


# --- how it is asked ----------------------------------------------------------------------------


def test_it_is_asked_where_it_is_named() -> None:
    """And last, so that the numbers of all others stay; without blocks there is nothing to ask."""
    usual = cases_of(RICH, quick=True)
    named = cases_of(RICH, [*USUAL, *OPERATION], quick=True)
    assert "stream_feedback" not in {case.operation for case in usual}
    assert [case.id for case in named[: len(usual)]] == [case.id for case in usual]
    assert {case.operation for case in named[len(usual) :]} == {"stream_feedback"}
    assert cases_of(replace(RICH, block_size=None), OPERATION) == []


def test_behind_pipes() -> None:
    """F1: the same answer through a pipe, from a function that streams without it, too."""
    case = next(c for c in cases_of(RICH, OPERATION) if c.id == "feedback-of-rows/1")
    port = open_port(f"{FUNCTIONS}:encode", stream_feedback=f"{FUNCTIONS}:stream")
    try:
        got = dict(answered(port.ask(0, case)).arrays)
    finally:
        port.close()
    expected = stored(Reference().model, case)
    equal(got, {name: expected[name] for name in got})
    assert got.keys() == expected.keys()


def test_by_the_command() -> None:
    """F1: it says how it was asked, and so does what was asked by `nsq gen`."""
    target = f"{FUNCTIONS}:stream"
    options = ["--scheme", "streaming4", "--case", "stream_feedback/sealed-feedback/1"]
    text = said("check", "--stream-feedback", target, *options)
    assert text.startswith(f"nsq check --stream-feedback {target}\n")
    assert "RIGHT in this one case: streaming4, stream_feedback/sealed-feedback/1.\n" in text
    for operations, words in (
        ([*USUAL, "stream_feedback"], ["--stream-feedback"]),
        (list(OPERATIONS), ["--feedback", "--stream-feedback"]),
        (["stream_feedback"], ["--operation", "stream_feedback"]),
    ):
        assert conformance._questions(Hello(0, [], operations, list(CASE_DTYPES))) == words


@pytest.mark.parametrize(
    "change", [lambda parts: parts.pop("packed"), lambda parts: parts.update(tail=parts["sinks"])]
)
def test_what_is_missing_is_told(change: Callable[[dict[str, Any]], Any]) -> None:
    """B1: the structure is judged as without feedback."""
    case = cases_of(RICH, OPERATION)[0]
    parts = stored(Reference().model, case)
    change(parts)
    (found,) = judge(case, Answer(0, parts)).findings
    assert found.stage == "structure"


def test_without_feedback_the_identity_is_no_other() -> None:
    """F1 B1: nothing but what is coded differs, so that a port has one cache for both."""
    case = cases_of(RICH, OPERATION, 0, ["float32"])[0]
    inputs = dict(case.inputs)
    inputs["factor"] = np.eye(inputs["factor"].shape[-1], dtype=np.float32)[None]
    model = Reference().model
    with_identity = stored(model, replace(case, inputs=inputs))
    row = int(inputs["row"].item())
    equal(with_identity, model.stream(inputs["x"], RICH, inputs["steps"], row))
    assert quantize(inputs["x"][row, 2:], replace(RICH, sink_tokens=0)).packed.tobytes() == (
        with_identity["packed"].tobytes()
    )

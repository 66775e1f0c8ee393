"""The headline: conforming is said of what was asked and answered, and the rest is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nsq_ref as nsq
from nsq_ref import Scheme
from nsq_ref.conformance import as_junit, as_text, check
from nsq_ref.conformance.check import run
from nsq_ref.conformance.findings import Report
from nsq_ref.conformance.operations import Answer, Case, Failure, Port
from nsq_ref.conformance.ports import Callables, Process
from tests.ports.functions import attend, decode, encode, feedback
from tests.support.cases import cases_made_once

__all__ = ["cases_made_once"]  # the fixture

ALL = {"encode": encode, "decode": decode, "attend": attend}


def first_line(report: Report) -> str:
    return as_text(report).splitlines()[3]


def test_all_that_a_scheme_has_is_asked_before_it_conforms() -> None:
    """Without blocks no cache grows, so that nothing is missing without stream."""
    for functions, told in ((ALL, ["Not asked: feedback."]), (ALL | {"feedback": feedback}, [])):
        report = check(**functions, scheme="naive2")
        assert report.is_whole
        assert first_line(report).startswith("CONFORMS to naive2: encode ")
        assert as_text(report).splitlines()[4:] == told


@pytest.mark.parametrize(
    ("functions", "options", "missing"),
    [
        (("encode", "decode"), {}, "attend"),
        (("encode", "decode", "attend"), {"dtypes": ["float32"]}, "float16 and bfloat16 input"),
        (("encode", "decode", "attend"), {"quick": True}, "this was a quick run"),
    ],
)
def test_less_is_so_far(functions: tuple[str, ...], options: Any, missing: str) -> None:
    """Operations, dtypes, cases."""
    report = check(**{name: ALL[name] for name in functions}, scheme="naive2", **options)
    assert report.conforms
    assert first_line(report).startswith("CONFORMS SO FAR to naive2")
    (told,) = [line for line in as_text(report).splitlines() if line.startswith("Not asked: ")]
    assert missing in told


def test_widths_and_dtypes_that_are_not_implemented_are_named() -> None:
    """In a partial check they are no failure, and no conformance."""

    def four_bits(x: Any, scheme: Scheme) -> Any:
        if scheme.bits != 4 or x.dtype == np.float16:
            raise NotImplementedError
        return nsq.quantize(x, scheme)

    schemes = [(name, Scheme.named(name)) for name in ("naive4", "naive3")]  # type: ignore[arg-type]
    port = Callables("mine", encode=four_bits)
    report = run(port, schemes, ["encode"], partial=True, quick=True)
    assert report.conforms
    assert first_line(report).startswith("CONFORMS SO FAR to naive4: ")
    assert "Not implemented: float16 input, 3 bits." in as_text(report).replace(
        "3 bits, float16 input", "float16 input, 3 bits"
    )
    assert not run(port, schemes, ["encode"], quick=True).conforms


def test_what_is_required_must_be_asked_and_answered() -> None:
    """For CI: an operation, a dtype; stream where there are no blocks."""
    options: dict[str, Any] = {"scheme": "naive2", "quick": True}
    assert check(**ALL, **options, require=["encode", "attend", "float16"]).conforms
    for functions, require in (
        ({"encode": encode}, "decode"), (ALL, "stream"),
    ):  # fmt: skip
        report = check(**functions, **options, require=["encode", require])
        assert report.unmet == [require]
        assert not report.conforms
        assert f"Required, but not asked or not implemented: {require}." in as_text(report)
        assert f"{require} is required" in as_junit(report)
    some = check(encode, **options, dtypes=["float32"], require=["bfloat16"])
    assert some.unmet == ["bfloat16"]
    with pytest.raises(ValueError, match="require='decoding' is not one of encode, decode"):
        check(encode, **options, require=["decoding"])


def test_a_port_that_refuses_everything_is_told_so_once() -> None:
    """I1."""

    def refuses(x: Any, scheme: Scheme) -> Any:
        raise ValueError("no kernel")

    report = check(refuses, scheme="naive2", quick=True)
    (found,) = report.schemes[0].diagnoses
    assert found.rule == "I1"
    assert "every valid case of encode is refused" in found.says
    assert "no kernel" in found.says


def test_a_port_that_refuses_a_dtype_is_told_which() -> None:
    """I1."""

    def refuses(x: Any, scheme: Scheme) -> Any:
        if x.dtype != np.float32:
            raise ValueError("float32 only")
        return nsq.quantize(x, scheme)

    report = check(refuses, scheme="naive2", quick=True)
    (found,) = report.schemes[0].diagnoses
    assert found.rule == "I1"
    assert "all valid float16 and bfloat16 input is refused" in found.says


@pytest.mark.parametrize("functions", [
    {"encode": lambda x: x}, {"feedback": lambda x, scheme: x},
    {"decode": lambda parts, scheme: parts},
    {"attend": lambda query, keys, values, scale: query},
    {"stream": lambda x, scheme, steps, row, more: x},
])  # fmt: skip
def test_a_wrong_signature_ends_at_once(functions: Any) -> None:
    with pytest.raises(TypeError, match=r"takes \(.*\); it is called as [a-z]+\("):
        check(**functions)


class Dies(Port):
    """Answers nothing, as a process that is given up."""

    name = "mine"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, number: int, case: Case) -> Answer | Failure:
        if len(self.asked) == 2:
            return Failure("not asked", "2 earlier cases got no answer")
        self.asked.append(f"encode/{case.id}")
        return Failure("crash", "it ended with exit code 3")


def test_what_was_not_asked_is_no_missing_answer_and_is_not_offered() -> None:
    """Only a case that was asked is offered to be asked again."""
    port = Dies()
    report = run(port, [("naive2", Scheme.named("naive2"))], ["encode"], command="nsq check mine")
    text = as_text(report)
    count = len(report.schemes[0].cases)
    assert f"2 without an answer, {count - 2} not asked any more." in text
    offered = [line.split("--case ")[1] for line in text.splitlines() if "--case" in line]
    assert offered == port.asked[:1]


def test_a_process_is_not_asked_any_more_after_three_failures(tmp_path: Any) -> None:
    port = tmp_path / "port.py"
    port.write_text("import os\n\ndef encode(x, scheme):\n    os._exit(3)\n")
    from nsq_ref.conformance.ports import open_port

    opened = open_port(f"{port}:encode")
    assert isinstance(opened, Process)
    case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    kinds = [getattr(opened.ask(i, case), "kind", "") for i in range(4)]
    opened.close()
    assert kinds == ["crash", "crash", "crash", "not asked"]

"""What people read: rules in the words of the specification, and reports."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nsq_ref import Scheme
from nsq_ref.conformance.cases.flags import FLAGS
from nsq_ref.conformance.findings import Diagnosis, Explained, Finding, SchemeReport
from nsq_ref.conformance.operations import Failure
from nsq_ref.conformance.report import as_junit, as_text, axes_of, finding_text
from nsq_ref.conformance.rules import RULES
from tests.support.reports import (
    COMMAND,
    a_case,
    a_finding,
    report_of,
    right_report,
    tie_report,
)

SPEC = Path(__file__).parents[4] / "docs" / "spec.md"


def test_rules_are_those_of_the_specification() -> None:
    """I1 Q1 A3. Ids, titles and sections are those of the page; D1 has no title of its own."""
    expected: dict[str, tuple[str, str]] = {}
    section = ""
    for line in SPEC.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:].lower().replace(" ", "-")
        heading = re.match(r"\*\*([A-Z]\d)\. ?(?:(.+?)\.)?\*\*", line)
        if heading:
            expected[heading[1]] = ((heading[2] or "Decode").replace("`", ""), section)
    assert {rule: (one.title, one.section) for rule, one in RULES.items()} == expected


@pytest.mark.parametrize("rule", RULES)
def test_rules_speak_in_the_words_of_the_specification(rule: str) -> None:
    """Every rule. The words stand in its own section, between its heading and the next one."""
    text = SPEC.read_text(encoding="utf-8")
    start = text.index(f"**{rule}.")
    after = [text.find(mark, start + 1) for mark in ("\n**", "\n## ")]
    body = text[start : min(at for at in after if at > 0)]
    assert RULES[rule].words in " ".join(re.sub(r"`|\*\*|```text", "", body).split())


def test_text_of_a_known_mistake() -> None:
    """Q1. The mistake, its clearest case from input to code, and the command that repeats it."""
    text = as_text(report_of(tie_report(), command=COMMAND))
    assert text == (
        """\
nsq check ./libmine.so
NSQ-1, seed 7, latitudes: none

DOES NOT CONFORM to nsep+pchan4
Of 6 cases: 4 wrong.
Answered: encode 6 cases.
Not asked: decode, attend, feedback.

Q1  Round, then clamp  (docs/spec.md#codes)
    code = round_half_even((direction - zero) / scale)

    All 12 wrong codes in 4 cases are exact ties rounded away from zero.

    encode/exact-tie/0, stage codes, at [token 2, channel 5]; 3 of 18 elements are wrong
      An exact tie is rounded away from zero.
      x         0x40a00000  5.0
      quotient  0x40200000  2.5
      got       3
      expected  2
      Just this case:
        nsq check ./libmine.so --scheme nsep+pchan4 --case encode/exact-tie/0

    All 4 cases that show it: encode/exact-tie/0 to 2, 4

Cases in which each stage is right, given the port's own stage before it:
  encode: norm 6/6, codes 2/6
"""
    )


def test_text_of_a_port_that_conforms() -> None:
    """What was asked, what was not, and what latitudes allowed: no more is claimed."""
    case = a_case("sum/0")
    allowed = Explained(case, "norm", "norm-ulp=1", (1,), "0x3f800001, the root is 1.0", 2)
    one = right_report(explained=[allowed])
    text = as_text(report_of(one, latitudes=("norm-ulp=1",), notes=["Asked twice."]))
    assert text == (
        """\
nsq check ./libmine.so
NSQ-1, seed 7, latitudes: norm-ulp=1

CONFORMS SO FAR to pchan4: encode 2 cases, decode 1.
Not asked: attend, feedback.

Allowed by norm-ulp=1: 2 differences in 1 case
  encode/sum/0, stage norm, at [token 1]: 0x3f800001, the root is 1.0

Note: Asked twice.
"""
    )


def test_text_of_one_case_shows_its_input() -> None:
    """Q1. All findings, and every element of the input by its bits."""
    case = a_case("exact-tie/3")
    second = Finding(case, "packed", "P1", "A byte is wrong.", (2, 2), "0x8b", "0x8a")
    found = Diagnosis("Q1", "", "Two stages are wrong.", ("codes",), (a_finding(case), second))
    one = SchemeReport("nsep+pchan4", Scheme(), {"encode": 1}, {}, [found], cases=[case])
    text = as_text(report_of(one, command=COMMAND))
    assert text.startswith(
        """\
nsq check ./libmine.so
NSQ-1, seed 7, latitudes: none

WRONG in this one case: nsep+pchan4, encode/exact-tie/3.

Q1 """
    )
    why = FLAGS["exact-tie"].description
    assert " ".join(text.split()).count(f"Input of encode/exact-tie/3 exact-tie: {why} x: ") == 1
    assert (
        """
    encode/exact-tie/3, stage packed, at [token 2, byte 2]
      A byte is wrong.
      got       0x8b
      expected  0x8a
"""
        in text
    )
    assert text.endswith(
        """
  x: float32 [3, 6]
    00000000 3f800000 40000000 40400000 40800000 40a00000
    40c00000 40e00000 41000000 41100000 41200000 41300000
    41400000 41500000 41600000 41700000 41800000 41880000
  row: int32 [1]
    7
"""
    )
    assert "--case" not in text


def test_one_right_case_is_no_verdict_on_the_scheme() -> None:
    """A report on one case does not claim that the port conforms."""
    case = a_case("ones/0")
    one = SchemeReport("pchan4", Scheme.named("pchan4"), {"encode": 1}, {}, cases=[case])
    text = as_text(report_of(one))
    assert "RIGHT in this one case: pchan4, encode/ones/0." in text
    assert "CONFORM" not in text


def test_text_of_many_schemes_tells_a_mistake_once() -> None:
    """Q1. A line a scheme, and each diagnosis once, with the schemes that share it."""
    schemes = [tie_report(), right_report(), tie_report("nsep4"), tie_report("naive4")]
    text = as_text(report_of(*schemes, command=COMMAND))
    assert (
        """
DOES NOT CONFORM to 3 of 4 schemes
Of 21 cases: 12 wrong.
Answered: encode 20 cases, decode 1.
Not asked: decode of nsep+pchan4, nsep4, naive4; attend; feedback.

  nsep+pchan4  does not conform      6 cases  Q1
  pchan4       conforms              3 cases
  nsep4        does not conform      6 cases  Q1
  naive4       does not conform      6 cases  Q1
"""
        in text
    )
    assert "\n    nsep+pchan4: All 12 wrong" in text
    assert "\n    The same with nsep4, naive4.\n" in text
    assert text.count("Round, then clamp") == 1
    assert "  encode: norm 18/18, codes 6/18\n" in text


def test_cases_without_an_answer_come_first_and_alike_ones_together() -> None:
    """A crash is told before any wrong code, with the start and the end of what the port said."""
    said = "\n".join(["line one", *(f"frame {i}" for i in range(40)), "cause: out of memory"])
    failures = [(a_case(f"long/{i}"), Failure("crash", said)) for i in range(3)]
    failures.append((a_case("long/3"), Failure("hang", "no answer within 30 s")))
    text = as_text(report_of(tie_report(failures=failures), command=COMMAND))
    assert text.index("No answer.") < text.index("Q1  Round")
    assert (
        """
  crash: encode/long/0 to 2
      line one
      frame 0
      frame 1
      frame 2
      ... 30 lines left out ...
"""
        in text
    )
    assert "\n      cause: out of memory\n" in text
    assert "\n  hang: encode/long/3\n      no answer within 30 s\n" in text
    assert "--case encode/long/0\n" in text
    assert "Of 10 cases: 4 wrong, 4 without an answer." in text


def test_an_unknown_mistake_shows_three_findings_and_a_second_diagnosis_is_marked() -> None:
    """Q1 P1. Without a known mistake the reader needs more than one example."""
    cases = [a_case(f"sum/{i}") for i in range(5)]
    byte = Diagnosis(
        "P1",
        "",
        "No known mistake gives these bytes.",
        ("packed",),
        tuple(
            Finding(case, "packed", "P1", "A byte is wrong.", (0, 1), f"0x{got}")
            for case, got in zip(cases, (0, 0, 1, 0, 2), strict=True)
        ),
        alike=("swapped nibbles",),
    )
    one = tie_report()
    text = as_text(report_of(tie_report(diagnoses=[*one.diagnoses, byte]), command=COMMAND))
    chief, rest = text.split("Also wrong, as a consequence or on its own:")
    assert chief.count("Just this case:") == 1
    assert re.findall("--case (.*)", rest) == [f"encode/sum/{i}" for i in (0, 2, 4)]
    assert "cannot tell it from: swapped nibbles." in rest
    assert "All 5 cases that show it: encode/sum/0 to 4\n" in rest


def test_long_lists_of_cases_are_counted() -> None:
    """No list of case ids grows with the number of families."""
    missing = [a_case(f"family-{i}/{j}") for i in range(30) for j in range(2)]
    text = as_text(report_of(right_report(not_implemented=missing)))
    assert "Not implemented, which fails the check: 60 cases" in text
    assert "encode/family-7/0, 1; and 44 more cases" in " ".join(text.split())
    assert "family-8" not in text


def test_a_partial_port_conforms_in_what_it_implements() -> None:
    """Not implemented is no failure in a partial check, and is told."""
    missing = [a_case("sum/0", "attend")]
    one = right_report(not_implemented=missing)
    text = as_text(report_of(one, partial=True))
    assert (
        "CONFORMS SO FAR to pchan4: encode 2 cases, decode 1.\nNot asked: feedback.\n"
        "Not implemented: attend.\n" in text
    )
    assert "Not implemented, listed, not failed: 1 case\n  attend/sum/0\n" in text


def test_nothing_asked_is_no_success() -> None:
    """An empty check does not conform, in text, exit code and JUnit."""
    nothing = report_of(SchemeReport("pchan4", Scheme.named("pchan4"), {}, {}))
    cases = [a_case("ones/0"), a_case("ones/1")]  # of an operation that the port need not have
    unclaimed = SchemeReport("pchan4", Scheme.named("pchan4"), {}, {}, cases=cases)
    for report in (report_of(), nothing, report_of(unclaimed)):
        assert "NOTHING WAS CHECKED" in as_text(report)
        assert not report.conforms
    assert ElementTree.fromstring(as_junit(nothing)).get("errors") == "1"


def test_color_changes_no_words_and_commands_are_never_broken() -> None:
    """Lines are wrapped at the width, but for what is there to be copied."""
    long = COMMAND + " --decode " + "./" + "a" * 120
    report = report_of(tie_report(), right_report(), command=long)
    plain = as_text(report, width=60)
    colored = as_text(report, width=60, color=True)
    assert "\x1b" not in plain
    assert "\x1b[1;31mDOES NOT CONFORM" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == plain
    assert f"{long} --scheme nsep+pchan4 --case encode/exact-tie/0\n" in plain
    assert {len(line) > 60 for line in plain.splitlines() if long not in line} == {False}


@pytest.mark.parametrize(
    ("stage", "scheme", "index", "axes"),
    [
        ("codes", Scheme(), (0, 2, 5), ("head", "token", "channel")),
        ("codes", Scheme(), (3, 0, 2, 5), ("batch", "head", "token", "channel")),
        ("norm", Scheme(), (2,), ("token",)),
        ("scale", Scheme(), (1, 5), ("block", "channel")),
        ("zero", Scheme(axis="token"), (1, 0), ("token", "column")),
        ("packed", Scheme(), (1, 3), ("token", "byte")),
        ("output", Scheme(), (1, 0, 3), ("head", "query", "channel")),
        ("codes", Scheme(), (5,), ("axis 0",)),
        ("structure", Scheme(), (), ()),
    ],
)
def test_an_index_names_its_axes(
    stage: str, scheme: Scheme, index: tuple[int, ...], axes: tuple[str, ...]
) -> None:
    """Parts. What a number of an index counts depends on the array."""
    finding = Finding(a_case("ones/0", scheme=scheme), stage, "Q1", "", index)
    assert axes_of(finding) == axes


def test_a_finding_without_a_rule_of_the_page_is_told_all_the_same() -> None:
    """Structure is held by the table "Parts", which has no id."""
    finding = Finding(a_case("ones/0"), "structure", "Parts", "packed is missing.")
    assert finding_text(finding, "nsq check x") == (
        "Parts  (docs/spec.md)\nencode/ones/0, stage structure\n  packed is missing.\n  nsq check x"
    )

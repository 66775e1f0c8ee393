"""The report of the conformance kit: text, JSON and JUnit XML from hand-made verdicts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from nsq_ref import Scheme
from nsq_ref.conformance.findings import Diagnosis, Explained, Finding, Report, SchemeReport
from nsq_ref.conformance.flags import FLAGS
from nsq_ref.conformance.operations import Case, Failure, Operation
from nsq_ref.conformance.report import as_json, as_junit, as_text, axes_of, exit_code, finding_text
from nsq_ref.conformance.rules import RULES

SPEC = Path(__file__).parents[3] / "docs" / "spec.md"
GARBAGE = "\x00\x1b[2J\x1b]0;title\x07 \udcff \u202e <&'\"> \x85\u2028 ]]> \uffff"
COMMAND = "nsq check ./libmine.so"


def a_case(name: str, operation: Operation = "encode", scheme: Scheme | None = None) -> Case:
    x = np.arange(18, dtype=np.float32).reshape(3, 6)
    return Case(name, operation, scheme or Scheme(), ("exact-tie",), {"x": x, "row": np.int32([7])})


def a_finding(case: Case) -> Finding:
    return Finding(
        case,
        "codes",
        "Q1",
        "An exact tie is rounded away from zero.",
        (2, 5),
        "3",
        "2",
        (("x", "0x40a00000  5.0"), ("quotient", "0x40200000  2.5")),
        wrong=3,
        of=18,
    )


def tie_report(name: str = "nsep+pchan4", **changes: Any) -> SchemeReport:
    cases = [a_case(f"exact-tie/{i}", scheme=Scheme.named(name)) for i in range(6)]
    found = tuple(a_finding(cases[i]) for i in (0, 1, 2, 4))
    says = "All 12 wrong codes in 4 cases are exact ties rounded away from zero."
    chief = Diagnosis("Q1", "half away from zero", says, ("codes",), found)
    stages = {("encode", "norm"): (6, 0), ("encode", "codes"): (6, 4)}
    fields: dict[str, Any] = {"diagnoses": [chief], "cases": cases, **changes}
    return SchemeReport(name, Scheme.named(name), {"encode": 6}, stages, **fields)


def right_report(name: str = "pchan4", **changes: Any) -> SchemeReport:
    scheme = Scheme.named(name)
    cases = [a_case("ones/0"), a_case("ones/1"), a_case("ones/0", "decode")]
    fields: dict[str, Any] = {"cases": cases, **changes}
    return SchemeReport(name, scheme, {"encode": 2, "decode": 1}, {}, **fields)


def report_of(*schemes: SchemeReport, **changes: Any) -> Report:
    return Report("./libmine.so", 7, changes.pop("latitudes", ()), schemes, **changes)


# --- rules --------------------------------------------------------------------------------------


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


# --- text ---------------------------------------------------------------------------------------


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
Not checked: decode, attend, stream.

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

CONFORMS to pchan4 in all that was asked: encode 2 cases, decode 1.
Not checked: attend, stream.

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
Not checked: attend, stream.

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
    assert "CONFORMS to pchan4 in what it implements: encode 2 cases, decode 1." in text
    assert "Not implemented, listed, not failed: 1 case\n  attend/sum/0\n" in text


def test_nothing_asked_is_no_success() -> None:
    """An empty check does not conform, in text, exit code and JUnit."""
    nothing = report_of(SchemeReport("pchan4", Scheme.named("pchan4"), {}, {}))
    cases = [a_case("ones/0"), a_case("ones/1")]  # of an operation that the port need not have
    unclaimed = SchemeReport("pchan4", Scheme.named("pchan4"), {}, {}, cases=cases)
    for report in (report_of(), nothing, report_of(unclaimed)):
        assert "NOTHING WAS CHECKED" in as_text(report)
        assert exit_code(report) == 1
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


# --- for programs -------------------------------------------------------------------------------


def full_report() -> Report:
    case = a_case("sum/0")
    one = tie_report(
        failures=[(case, Failure("garbage", GARBAGE))],
        explained=[Explained(a_case("exact-tie/3"), "norm", "norm-ulp=1", (0,), GARBAGE, 1)],
        not_implemented=[a_case("sum/1", "decode")],
        cases=[*tie_report().cases, case, a_case("sum/1", "decode")],
    )
    return report_of(one, right_report(), command=COMMAND, notes=[GARBAGE])


def test_json_survives_a_round_trip_and_keeps_its_keys() -> None:
    """Keys are a promise: they are only ever added."""
    report = full_report()
    found = json.loads(json.dumps(as_json(report)))
    assert found == as_json(report)
    assert " ".join(found) == (
        "specVersion port command seed latitudes partial conforms notes notChecked schemes"
    )
    first, second = found["schemes"]
    assert " ".join(first) == (
        "name scheme conforms cases judged stages diagnoses explained failures notImplemented "
        "reasons"
    )
    (diagnosis,) = first["diagnoses"]
    assert " ".join(diagnosis) == "rule title mistake says stages alike findings"
    assert diagnosis["findings"][0] == {
        "case": "encode/exact-tie/0",
        "flags": ["exact-tie"],
        "stage": "codes",
        "rule": "Q1",
        "what": "An exact tie is rounded away from zero.",
        "index": [2, 5],
        "axes": ["token", "channel"],
        "got": "3",
        "expected": "2",
        "shown": [
            {"name": "x", "value": "0x40a00000  5.0"},
            {"name": "quotient", "value": "0x40200000  2.5"},
        ],
        "wrong": 3,
        "of": 18,
        "command": f"{COMMAND} --scheme nsep+pchan4 --case encode/exact-tie/0",
    }
    assert len(diagnosis["findings"]) == 4
    assert first["stages"][1] == {"operation": "encode", "stage": "codes", "judged": 6, "wrong": 4}
    assert " ".join(first["explained"][0]) == "case stage latitude index what count"
    assert set(first["failures"][0]) == {"case", "kind", "message"}
    assert first["notImplemented"] == ["decode/sum/1"]
    assert first["cases"][-2:] == ["encode/sum/0", "decode/sum/1"]
    assert (found["conforms"], first["conforms"], second["conforms"]) == (False, False, True)
    assert Scheme.from_dict(first["scheme"]) == Scheme()


def test_json_takes_numbers_of_numpy() -> None:
    """Indices and counts come from arrays."""
    index = tuple(np.argwhere(np.eye(3) == 1)[2])
    found = Finding(a_case("ones/0"), "codes", "Q1", "", index, wrong=np.int64(1), of=np.int64(9))
    one = tie_report(diagnoses=[Diagnosis("Q1", "", "", ("codes",), (found,))])
    text = json.dumps(as_json(report_of(one)))
    assert json.loads(text)["schemes"][0]["diagnoses"][0]["findings"][0]["index"] == [2, 2]


def test_junit_has_a_case_for_every_case() -> None:
    """Wrong cases fail with rule, stage and command; hangs and crashes are errors."""
    root = ElementTree.fromstring(as_junit(full_report()))
    counts = [{k: v for k, v in one.attrib.items() if k != "name"} for one in (root, *root)]
    assert counts == [
        {"tests": "11", "failures": "5", "errors": "1", "skipped": "0"},
        {"tests": "8", "failures": "5", "errors": "1", "skipped": "0"},
        {"tests": "3", "failures": "0", "errors": "0", "skipped": "0"},
    ]
    names = [one.get("name") for one in root[0]]
    assert names == [f"exact-tie/{i}" for i in range(6)] + ["sum/0", "sum/1"]
    assert [one.tag for one in root[0][3]] == ["system-out"]
    assert [one.tag for one in root[0][5]] == []
    failure = root[0][0][0]
    assert failure.tag == "failure"
    assert failure.get("type") == "Q1"
    assert failure.get("message") == "Q1, stage codes: An exact tie is rounded away from zero."
    assert failure.text is not None
    assert "at [token 2, channel 5]" in failure.text
    assert failure.text.endswith("--scheme nsep+pchan4 --case encode/exact-tie/0")
    assert root[0][0].get("classname") == "nsq.nsep+pchan4.encode"


def test_junit_skips_what_a_partial_port_does_not_implement() -> None:
    """Not implemented is skipped in a partial check and fails otherwise."""
    one = right_report(not_implemented=[a_case("sum/0", "attend")])
    for partial, expected in ((True, ("0", "1")), (False, ("1", "0"))):
        root = ElementTree.fromstring(as_junit(report_of(one, partial=partial)))
        assert (root.get("failures"), root.get("skipped")) == expected


def test_operations_that_a_port_does_not_claim_are_not_passed() -> None:
    """What was asked and not implemented by a port that need not is skipped, and told."""
    one = right_report()
    one = right_report(cases=[*one.cases, a_case("ones/0", "attend")])
    root = ElementTree.fromstring(as_junit(report_of(one)))
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("4", "0", "1")
    assert "Not checked: attend, stream." in as_text(report_of(one))


def test_junit_loses_no_finding_on_a_case_that_is_not_listed() -> None:
    """A verdict without its list of cases still shows what is wrong."""
    root = ElementTree.fromstring(as_junit(report_of(tie_report(cases=()))))
    assert (root.get("tests"), root.get("failures")) == ("4", "4")


def test_what_a_port_says_cannot_hurt_its_reader() -> None:
    """Control characters, escapes and half surrogates are shown as escapes, and XML stays XML."""
    report = full_report()
    root = ElementTree.fromstring(as_junit(report).encode())
    texts = [as_text(report), json.dumps(as_json(report)), *root.itertext()]
    for text in texts:
        assert all(c.isprintable() or c == "\n" for c in text)
        text.encode()
    escaped = r"\x00\x1b[2J\x1b]0;title\x07 \udcff \u202e <&'" + '"' + r"> \x85\u2028 ]]> \uffff"
    assert escaped in texts[0]
    assert as_json(report)["schemes"][0]["failures"][0]["message"] == escaped
    assert escaped in list(root.itertext())


def test_exit_codes() -> None:
    """0 if the port conforms, else 1."""
    assert exit_code(report_of(right_report())) == 0
    assert exit_code(report_of(right_report(), tie_report())) == 1

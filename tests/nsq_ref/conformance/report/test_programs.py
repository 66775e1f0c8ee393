"""What programs read: JSON, JUnit XML, exit codes."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np

from nsq_ref import Scheme
from nsq_ref.conformance.findings import Diagnosis, Explained, Finding, Report
from nsq_ref.conformance.operations import Failure
from nsq_ref.conformance.report import as_json, as_junit, as_text
from tests.support.reports import (
    COMMAND,
    GARBAGE,
    a_case,
    report_of,
    right_report,
    tie_report,
)


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
        "specVersion port command seed latitudes partial conforms whole notAsked required unmet "
        "notes notChecked schemes"
    )
    first, second = found["schemes"]
    assert " ".join(first) == (
        "name scheme conforms cases judged stages diagnoses explained failures notImplemented "
        "reasons known mended"
    )
    (diagnosis,) = first["diagnoses"]
    assert " ".join(diagnosis) == "rule title mistake says stages alike steps findings"
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
    assert "Not implemented: attend." in as_text(report_of(one))


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
    assert report_of(right_report()).conforms
    assert not report_of(right_report(), tie_report()).conforms

"""Reports, right and wrong, that are shown."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref import Scheme
from nsq_ref.conformance.findings import Diagnosis, Finding, Report, SchemeReport
from nsq_ref.conformance.operations import Case, Operation

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

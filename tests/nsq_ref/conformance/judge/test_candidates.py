"""A search for a mistake leaves out what cannot change its result: the slow way finds the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nsq_ref import Scheme
from nsq_ref.conformance.coverage import answered
from nsq_ref.conformance.findings import Finding
from nsq_ref.conformance.judge import STAGES, Latitudes, judge
from nsq_ref.conformance.judge.candidates import LEAST_SHARE, Judged, Search
from nsq_ref.conformance.mistakes import MISTAKES, Mistake, Reference
from tests.support.cases import cases_of

PAPER, STREAMING = Scheme(), Scheme.named("streaming4")
SMALL = replace(STREAMING, block_size=4, sink_tokens=2)
TOKEN = Scheme(axis="token", symmetric=False, outlier_channels=2)
Found = list[tuple[str, list[Finding]]]


def is_wrong(one: Judged) -> bool:
    return bool(one.findings)


def judged(
    scheme: Scheme, operation: Any, made: list[Mistake], known: list[Mistake]
) -> list[Judged]:
    """Two small answers of a port that are wrong beside what is known, and one that is right."""
    port, reference = Reference(made), Reference(known)
    found: list[Judged] = []
    some = [case for case in cases_of(scheme, [operation]) if case.refused_by is None]
    for case in sorted(some, key=lambda case: sum(x.size for x in case.inputs.values())):
        answer = answered(port, case)
        if answer is not None:
            findings = judge(case, answer, reference=reference).findings
            one = Judged(case, answer, findings)
            if sum(is_wrong(one) == is_wrong(other) for other in found) < 1 + is_wrong(one):
                found.append(one)
    assert [is_wrong(one) for one in sorted(found, key=is_wrong)] == [False, True, True]
    return found


@pytest.mark.parametrize(
    ("scheme", "operation", "made", "known"),
    [
        (PAPER, "encode", ["half away from zero"], []),
        (PAPER, "encode", ["highest bits first", "norm of order 1"], ["highest bits first"]),
        (TOKEN, "encode", ["codes from the scale before narrowing"], []),
        (STREAMING, "decode", ["scales of the block before"], []),
        (STREAMING, "attend", ["window one too long"], []),
        (SMALL, "stream", ["old scales after a crop"], []),
        (TOKEN, "feedback", ["errors added"], []),
    ],
)
def test_the_slow_way_finds_the_same(
    scheme: Scheme, operation: Any, made: list[str], known: list[str]
) -> None:
    """B1 C1 D1 A2 F1 N1 P1 Q1 S3. Every mistake is judged with, on all answers, in all stages."""
    explained = [MISTAKES[name] for name in known]
    answers = judged(scheme, operation, [MISTAKES[name] for name in made], explained)
    findings = [f for one in answers for f in one.findings]
    stage = min((f.stage for f in findings), key=list(STAGES).index)
    others = [m for m in MISTAKES.values() if operation in m.operations and m not in explained]
    left = {m.name: left_by(Reference([*explained, m]), answers) for m in others}
    for part in (True, False):
        search = Search(stage, answers, Latitudes(), explained, findings, part)
        best = search.among(others, lambda tried, count: None)
        assert [(one.mistake.name, one.findings) for one in best] == slowly(
            left, findings, stage, part
        )
        assert made[-1] in [one.mistake.name for one in best]


def left_by(reference: Reference, answers: list[Judged]) -> list[Finding]:
    return [f for one in answers for f in judge(*one[:2], reference=reference).findings]


def slowly(left: dict[str, list[Finding]], before: list[Finding], stage: str, part: bool) -> Found:
    """The mistakes that explain most, of those that explain enough and spoil nothing."""
    order = list(STAGES).index

    def wrong(findings: list[Finding]) -> int:
        return sum(f.wrong for f in findings if f.stage == stage)

    def earlier(findings: list[Finding]) -> int:
        return sum(f.wrong for f in findings if order(f.stage) < order(stage))

    most = (1 - LEAST_SHARE) * wrong(before) * part
    ranks = {
        name: (wrong(found), 0 if wrong(found) else len(found))
        for name, found in left.items()
        if wrong(found) <= most and earlier(found) <= earlier(before) and len(found) < len(before)
    }
    return [(name, left[name]) for name, rank in ranks.items() if rank == min(ranks.values())]

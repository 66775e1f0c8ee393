"""The matrix: every mistake, in every scheme and dtype, has a case that shows it or a proof.

Two schemes are asked whole; with ``NSQ_MEASURE=all`` in the environment all named ones are, and
all proofs are held against all cases.
"""

from __future__ import annotations

import importlib
import os
import random
from functools import cache

import pytest

from nsq_ref import Scheme
from nsq_ref.conformance.cases import input_dtype
from nsq_ref.conformance.coverage import REASONS, REFUSALS, answered, coverage, reason, shows
from nsq_ref.conformance.family import FAMILY
from nsq_ref.conformance.judge.candidates import reference_with
from nsq_ref.conformance.mistakes import MISTAKES
from nsq_ref.conformance.operations import CASE_DTYPES, OPERATIONS
from tests.support.cases import cases_of

matrix = importlib.import_module("nsq_ref.conformance.coverage.matrix")
ALL = os.environ.get("NSQ_MEASURE") == "all"
ASKED = list(FAMILY) if ALL else ["naive4", "streaming4"]
PROOFS = len(MISTAKES) if ALL else 12  # mistakes of which the proofs are held against the cases


@pytest.fixture(autouse=True)
def cases_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As all tests of this process share them."""
    monkeypatch.setattr(matrix, "cases", cases_of)


@pytest.mark.parametrize("name", ASKED)
def test_no_cell_without_a_case_or_a_proof(name: str) -> None:
    """N1 N2 N3 S1 S2 S3 Q1 Q2 P1 M1 M2 M3 O1 B1 B2 C1 D1 Z1 A1 A2 I2 M4 S5 D3 F1."""
    cells = coverage(name)
    assert not [(cell.mistake, cell.dtype) for cell in cells if cell.is_hole]
    assert len(cells) == (len(MISTAKES) + len(REFUSALS)) * len(CASE_DTYPES)
    shown = {cell.shown_by for cell in cells if cell.shown_by}
    assert shown <= {f"{case.operation}/{case.id}" for case in cases_of(name, OPERATIONS)}


@pytest.mark.parametrize("name", ASKED)
def test_no_case_contradicts_a_proof(name: str) -> None:
    """What is said to show nowhere is shown by no case."""
    scheme, right = FAMILY[name], reference_with()
    answers = cache(lambda at: answered(right, cases_of(name, OPERATIONS)[at]))
    for mistake in random.Random(name).sample(sorted(MISTAKES), PROOFS):
        proved = [dtype for dtype in CASE_DTYPES if reason(mistake, scheme, dtype)]
        wrong = reference_with(mistake)
        for at, case in enumerate(cases_of(name, OPERATIONS)):
            of = input_dtype(case)
            concerned = of in proved if of else len(proved) == len(CASE_DTYPES)
            if not concerned or case.operation not in matrix.shown_in(MISTAKES[mistake]):
                continue
            if case.refused_by is None and (answer := answers(at)) is not None:
                assert not shows(case, answer, wrong), (mistake, case)


def test_a_mistake_that_no_case_shows_is_a_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the cases that are about it, a lost tile is not seen."""
    lost = "last partial tile of 1024 tokens out of the range"
    monkeypatch.setattr(matrix, "MISTAKES", {lost: MISTAKES[lost]})
    assert not any(cell.is_hole for cell in coverage("pchan4", ["float32"]))
    monkeypatch.setattr(
        matrix, "cases",
        lambda *given: [case for case in cases_of(*given) if case.recipe is None],
    )  # fmt: skip
    holes = [cell.mistake for cell in coverage("pchan4", ["float32"]) if cell.is_hole]
    assert holes == [lost]


def test_proofs_are_of_mistakes_that_there_are() -> None:
    refusals = {f"takes what {rule} refuses" for rule in REFUSALS}
    for one in REASONS:
        assert one.mistakes
        assert one.mistakes <= {*MISTAKES, *refusals}
    assert reason("half away from zero", Scheme(), "float32") is None

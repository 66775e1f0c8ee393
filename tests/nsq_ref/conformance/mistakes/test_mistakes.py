"""Every known mistake shows in the cases of a scheme, and is what makes the difference there."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsq_ref import Scheme, rounding
from nsq_ref.conformance import mistakes, model
from nsq_ref.conformance.coverage import answered, reason
from nsq_ref.conformance.judge import Latitudes, judge
from nsq_ref.conformance.mistakes import MISTAKES
from nsq_ref.conformance.mistakes.reference import Mistake, Reference
from nsq_ref.conformance.operations import (
    CASE_DTYPES,
    Answer,
    Case,
    Operation,
    same_arrays,
)
from nsq_ref.conformance.rules import RULES
from tests.support.cases import cases_of

PREFIX = f"{mistakes.__name__}."
PAPER = Scheme()
PLAIN = Scheme(separate_norm=False)
SCHEMES = [
    PAPER,
    Scheme.named("streaming4"),
    replace(PAPER, scale_dtype="float32", norm_dtype="float32"),
    replace(PAPER, symmetric=False),
    PLAIN,
    replace(PLAIN, symmetric=False),
    replace(PAPER, bits=3),
    replace(PAPER, bits=2),
    replace(PAPER, bits=8),
    replace(PAPER, magnitude="gain"),
    replace(PAPER, magnitude="lsq"),
    Scheme.named("nsep+out4"),
    Scheme.named("outlier4"),
    replace(PLAIN, outlier_channels=2),
    replace(PAPER, symmetric=False, outlier_channels=2),
    replace(PAPER, block_size=5, sink_tokens=2),
    replace(PAPER, symmetric=False, scale_dtype="float32", norm_dtype="float32"),
    Scheme.named("naive4"),
    replace(PLAIN, scale_dtype="float32"),
    replace(PAPER, block_size=5, scale_dtype="bfloat16", norm_dtype="bfloat16"),
    replace(PAPER, bits=2, scale_rule="search", block_size=24),
    Scheme(norm_rule="balanced", magnitude="gain", block_size=5, outlier_channels=1),
]  # fmt: skip


@cache
def asked(scheme: Scheme, operation: Operation) -> list[tuple[Case, Answer]]:
    """What every mistake is asked, with the right answers."""
    asked = [case for case in cases_of(scheme, [operation]) if case.refused_by is None]
    if operation != "attend":  # whose cases are short, and the one-hot ones before the long
        asked.sort(key=lambda case: sum(array.size for array in case.inputs.values()))
    reference = Reference()
    return [(case, right) for case in asked if (right := answered(reference, case)) is not None]


def first_difference(mistake: Mistake) -> tuple[Case, Answer] | None:
    """A case in which a port with the mistake is found wrong."""
    reference = Reference([mistake])
    for scheme in SCHEMES:
        if all(reason(mistake, scheme, dtype) for dtype in CASE_DTYPES):
            continue
        for case, right in asked(scheme, mistake.operations[0]):
            given = answered(reference, case)
            if given is None:  # it breaks off
                continue
            if not same_arrays(given.arrays, right.arrays) and judge(case, given).findings:
                return case, given
    return None


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_caught_and_explained(name: str) -> None:
    """N1 N2 N3 S1 S2 S3 Q1 Q2 F1 P1 M1 M2 M3 O1 B1 B2 C1 D1 Z1 A1 A2."""
    mistake = MISTAKES[name]
    found = first_difference(mistake)
    assert found, f"no case of any scheme shows {name!r}"
    assert not judge(*found, Latitudes(), Reference([mistake])).findings


def test_no_mistake_breaks_off_where_there_are_no_sequences() -> None:
    """B2. An error in a mistake itself would be taken for a case that shows it."""
    empty = [
        case
        for case in cases_of(PAPER)
        if case.refused_by is None and any(array.size == 0 for array in case.inputs.values())
    ]
    assert {case.operation for case in empty} == {"encode", "decode"}
    for mistake in MISTAKES.values():
        reference = Reference([mistake])
        for case in empty:
            if case.operation in mistake.operations:
                assert answered(reference, case) is not None, (mistake.name, case)


def test_each_rule_module_is_taken_and_names_are_unique() -> None:
    lists = [found for found in vars(mistakes).values() if isinstance(found, list)]
    listed = [one.name for found in lists for one in found if isinstance(one, Mistake)]
    assert sorted(listed) == sorted(MISTAKES)
    modules = {path.stem for path in Path(mistakes.__file__).parent.glob("*.py")}
    shared = {"__init__", "arithmetic", "changes", "reference", "watched"}
    loaded = {name.rpartition(".")[2] for name in sys.modules if name.startswith(PREFIX)}
    assert modules - shared == loaded - shared


def test_rules_of_mistakes_exist() -> None:
    for mistake in MISTAKES.values():
        assert {mistake.rule, *mistake.factor_rules.values()} <= set(RULES)


@pytest.mark.parametrize(
    ("name", "magnitude"),
    [
        ("norm narrowed at once from float64", "norm"),
        ("gain in double precision", "gain"),
        ("least squares in float64 alone", "lsq"),
    ],
)
def test_float64_factors_do_not_stop_at_float32(name: str, magnitude: Any) -> None:
    """M1 M2 M3. They lie above a tie of bfloat16, on which they are once they are float32."""
    x, y = np.float32([[1 + 2.0**-8, 2.0**-15]]), np.float32([[1, 2.0**-20]])
    scheme = Scheme(magnitude=magnitude, norm_dtype="bfloat16")
    right, wrong = (
        Reference(mistakes).spec.stored_factor(x, y, rounding.norm(x), scheme)
        for mistakes in ([], [MISTAKES[name]])
    )
    assert (float(right[0]), float(wrong[0])) == (1, 1 + 2.0**-7)


def test_reference_without_mistakes_is_the_specification() -> None:
    """The copy answers as the original does, and a mistake in it does not reach the original."""
    x = np.float32([[3, -4, 0.5], [1, 2, 3]])
    right = model.encode(x, PAPER)
    wrong = Reference([MISTAKES["norm of order 1"]]).model.encode(x, PAPER)
    again = Reference().model.encode(x, PAPER)
    assert wrong["norm"].tolist() != right["norm"].tolist()
    for name, part in model.encode(x, PAPER).items():
        assert part.tobytes() == right[name].tobytes() == again[name].tobytes()

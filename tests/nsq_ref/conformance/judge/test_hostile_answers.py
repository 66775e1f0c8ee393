"""Whatever a port answers, the kit has a verdict: no answer makes the judging itself fail."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nsq_ref.conformance.family import FAMILY
from nsq_ref.conformance.judge import Latitudes, judge
from nsq_ref.conformance.judge.candidates import Judged
from nsq_ref.conformance.judge.diagnose import diagnose
from nsq_ref.conformance.mistakes import MISTAKES
from nsq_ref.conformance.mistakes.reference import Reference
from nsq_ref.conformance.operations import DONE, Answer, Case
from nsq_ref.conformance.ports import Callables
from tests.ports import functions
from tests.support.cases import small_cases_of

RIGHT = Callables("right", functions.encode, functions.decode, functions.attend, functions.stream)
SCHEMES = (
    "nsep+pchan4-outliers", "nsep+pchan4-blocks", "streaming3", "nsep+out2", "naive2",
    "nsep+pchan4-lsq-float32", "nsep+pchan4-bfloat16",
)  # fmt: skip
CASES: list[tuple[Case, Answer]] = []


def answered() -> list[tuple[Case, Answer]]:
    """Cases of many schemes with the right answers, made once."""
    if not CASES:
        for name in SCHEMES:
            for case in small_cases_of(name):
                answer = RIGHT.ask(0, case)
                if isinstance(answer, Answer) and answer.status == DONE:
                    CASES.append((case, answer))
    return CASES


def garbled(array: Any, how: str, seed: int) -> Any:
    """The same dtype and shape, and other bits: NaN, infinity, indices of no channel, any code."""
    drawn = np.random.default_rng(seed)
    raw = np.frombuffer(array.tobytes(), np.uint8).copy()
    if how == "any":
        raw[:] = drawn.integers(0, 256, raw.size)
    elif how == "one bit" and raw.size:
        raw[drawn.integers(raw.size)] ^= 1 << drawn.integers(8)
    elif how == "reversed":
        raw[:] = raw[::-1]
    else:
        raw[:] = {"ones": 255, "zeros": 0}.get(how, raw)
    return raw.view(array.dtype).reshape(array.shape)


@st.composite
def answers(draw: Any) -> tuple[Case, Answer]:
    case, right = draw(st.sampled_from(answered()))
    how = draw(st.sampled_from(["any", "one bit", "reversed", "ones", "zeros"]))
    arrays = {
        name: garbled(array, how, draw(st.integers(0, 99))) if draw(st.booleans()) else array
        for name, array in right.arrays.items()
    }
    return case, Answer(DONE, arrays)


@given(answers(), st.sampled_from([Latitudes(), Latitudes(1, 2, 2, True)]))
@settings(max_examples=30)
def test_any_bits_are_judged_and_diagnosed(given_: Any, latitudes: Latitudes) -> None:
    """Every finding goes into a diagnosis, and none is an error of the kit."""
    case, answer = given_
    verdict = judge(case, answer, latitudes)
    diagnoses = diagnose([Judged(case, answer, verdict.findings)], latitudes)
    assert bool(diagnoses) == bool(verdict.findings)


@given(answers(), st.permutations(sorted(MISTAKES)))
@settings(max_examples=100)
def test_mistakes_are_tried_together(given_: Any, order: list[str]) -> None:
    """K1 S3 and the rest: a reference with two mistakes judges all that one with one judges."""
    case, answer = given_
    two = [one for one in order if case.operation in MISTAKES[one].operations][:2]
    judge(case, answer, reference=Reference([MISTAKES[name] for name in two]))


def test_sinks_in_a_scale_that_is_not_narrowed() -> None:
    """K1 S3: a port with both mistakes gets a verdict, and it names both."""
    names = "codes from the scale before narrowing", "sinks in the range"
    both = Reference([MISTAKES[name] for name in names])
    judged = []
    for case, _ in answered():
        if case.operation == "encode" and case.scheme == FAMILY["nsep+pchan4-blocks"]:
            answer = Answer(DONE, both.model.encode(case.inputs["x"], case.scheme))
            judged.append(Judged(case, answer, judge(case, answer).findings))
            assert not judge(case, answer, reference=both).findings
    assert set(names) <= {one.mistake for one in diagnose(judged, Latitudes())}

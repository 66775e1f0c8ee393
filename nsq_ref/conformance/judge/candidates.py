"""Look for the mistakes that explain a stage: each is put into the reference, and judged with.

A search tries some hundred mistakes on as many answers. Most are given up after a few answers, or
cannot make a difference there, and are not judged with at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nsq_ref.conformance.findings import Finding
from nsq_ref.conformance.judge import STAGES, Latitudes, judge
from nsq_ref.conformance.mistakes import MISTAKES
from nsq_ref.conformance.mistakes.reference import Mistake, Reference
from nsq_ref.conformance.mistakes.watched import Call, WatchedReference, gives
from nsq_ref.conformance.operations import Answer, Case

ORDER = tuple(STAGES)
UNEXPLAINABLE = ("chance", "refusal", "structure", "again")  # no other arithmetic explains them
FIRST_STAGES = ("chance", "again")  # of what goes on to be judged
LEAST_SHARE = 0.8  # of the wrong elements that a mistake must explain if it does not explain all
FIRST_CASES = 8  # after which a mistake is given up that explains less than half of these


class Judged(NamedTuple):
    """An answer, and what was found in it."""

    case: Case
    answer: Answer
    findings: Sequence[Finding]


class Candidate(NamedTuple):
    """A mistake, and what is still wrong where the reference makes it."""

    mistake: Mistake
    findings: list[Finding]
    spoiled: int  # elements of the stage that it does not explain

    @property
    def rank(self) -> tuple[int, int]:
        """The lower, the better: what explains the whole stage comes first."""
        return self.spoiled, 0 if self.spoiled else len(self.findings)


@functools.lru_cache(maxsize=512)
def reference_with(*mistakes: str) -> Reference:
    """Make a reference once: every scheme of a run needs those of the single mistakes."""
    return Reference([MISTAKES[name] for name in mistakes])


def findings_of(one: Judged, reference: Reference, latitudes: Latitudes) -> Sequence[Finding]:
    """Return what is still wrong with an answer where the reference makes some mistakes."""
    kept = [f for f in one.findings if f.stage in UNEXPLAINABLE]
    if any(f.stage not in FIRST_STAGES for f in kept):  # the others end the judging
        return kept
    return [*kept, *judge(one.case, one.answer, latitudes, reference).findings]


@dataclass
class Search:
    """The search for what explains a stage, behind the mistakes that are known already."""

    stage: str
    answers: Sequence[Judged]
    latitudes: Latitudes
    known: Sequence[Mistake]
    findings: Sequence[Finding]  # with those mistakes
    part: bool  # whether to take what explains most of the stage, too
    _watched: list[list[Call]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        wrong = {id(f.case): f.wrong for f in self.findings if f.stage == self.stage}
        self._wrong, self._before = wrong, sum(wrong.values())
        self._failing = [one for one in self.answers if id(one.case) in wrong]
        # What is wrong in most of few elements comes first: the sooner is a candidate given up.
        self._failing.sort(key=lambda one: -wrong[id(one.case)] / _size(one.case))
        self._others = [one for one in self.answers if id(one.case) not in wrong]
        self._others.sort(key=lambda one: _size(one.case))
        self._spoilable = (1 - LEAST_SHARE) * self._before * self.part

    def among(
        self, mistakes: Sequence[Mistake], told: Callable[[int, int], None]
    ) -> list[Candidate]:
        """Return the best of some mistakes: all that explain equally much, in their order.

        ``told`` gets how many were tried, and how many there are.
        """
        best: list[Candidate] = []
        for number, mistake in enumerate(mistakes):
            told(number, len(mistakes))
            if not self._explains(mistake):
                continue
            one = self._on_all(mistake, best[0] if best else None)
            if one is not None:
                best = [one] if best and one.rank < best[0].rank else [*best, one]
        return best

    def _reference(self, mistake: Mistake) -> Reference:
        return reference_with(*(m.name for m in (*self.known, mistake)))

    def _explains(self, mistake: Mistake) -> bool:
        """Whether a mistake explains enough of the cases that fail to be judged with in all."""
        still = seen = 0
        for asked, one in enumerate(self._failing):
            still += self._still_wrong(asked, one, mistake)
            seen += self._wrong[id(one.case)]
            if still > self._spoilable or (asked + 1 >= FIRST_CASES and still > seen / 2):
                return False
        return True

    def _still_wrong(self, asked: int, one: Judged, mistake: Mistake) -> int:
        """Count what is wrong at the stage in a case that fails, where a mistake is made."""
        # A mistake of several functions may remember at one stage what it takes at another.
        if any(len(m.changes) > 1 for m in (*self.known, mistake)):
            return self._of_stage(findings_of(one, self._reference(mistake), self.latitudes))
        if asked < FIRST_CASES:
            if asked == len(self._watched):
                self._watched.append(self._watch(one))
            calls = [call for call in self._watched[asked] if call.function in mistake.changes]
            if not calls or gives(self._reference(mistake), calls):
                return self._wrong[id(one.case)]
        return self._of_stage(self._judged(one, self._reference(mistake)))

    def _watch(self, one: Judged) -> list[Call]:
        """Note what is computed for the stage with what is known."""
        reference = WatchedReference(self.known)
        self._judged(one, reference)
        return reference.calls

    def _judged(self, one: Judged, reference: Reference) -> Sequence[Finding]:
        return judge(one.case, one.answer, self.latitudes, reference, self.stage).findings

    def _on_all(self, mistake: Mistake, best: Candidate | None) -> Candidate | None:
        """Judge all cases with a mistake; None once it spoils too much or is behind the best."""
        reference, found = self._reference(mistake), {}
        count = earlier = spoiled = 0
        for one in (*self._failing, *self._others):
            here = found[id(one.case)] = findings_of(one, reference, self.latitudes)
            count += len(here)
            earlier += _before(self.stage, here)
            spoiled += self._of_stage(here)
            if (
                count >= len(self.findings)  # it spoils more than it explains
                or earlier > _before(self.stage, self.findings)
                or spoiled > self._spoilable
                or (best is not None and (spoiled, 0 if spoiled else count) > best.rank)
            ):
                return None
        left = [f for one in self.answers for f in found[id(one.case)]]
        return Candidate(mistake, left, spoiled)

    def _of_stage(self, findings: Iterable[Finding]) -> int:
        return sum(f.wrong for f in findings if f.stage == self.stage)


def _before(stage: str, findings: Iterable[Finding]) -> int:
    """Count the elements that are wrong in earlier stages."""
    return sum(f.wrong for f in findings if ORDER.index(f.stage) < ORDER.index(stage))


def _size(case: Case) -> int:
    return sum(array.size for array in case.inputs.values()) + 1

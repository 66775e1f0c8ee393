"""Say which mistake a port makes: put known mistakes into the reference until it agrees with it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nsq_ref.conformance.findings import Diagnosis, Finding
from nsq_ref.conformance.judge import STAGES, Latitudes, default_rule, judge
from nsq_ref.conformance.mistakes import MISTAKES
from nsq_ref.conformance.mistakes.reference import Mistake, Reference
from nsq_ref.conformance.operations import OPERATIONS, Answer, Case, Operation
from nsq_ref.environment import in_default_environment

ORDER = tuple(STAGES)
UNEXPLAINABLE = ("refusal", "structure", "again")  # stages that no other arithmetic explains
STORED_FACTORS = ("norm", "gain")  # the stages at which they are compared
LEAST_SHARE = 0.8  # of the wrong elements that a mistake must explain if it does not explain all
PLAIN = ("ordinary", "attention", "stream-append")  # chief flags of cases that nothing is odd about


class Judged(NamedTuple):
    """An answer, and what was found in it."""

    case: Case
    answer: Answer
    findings: Sequence[Finding]


@in_default_environment
def diagnose(
    judged: Sequence[Judged],
    latitudes: Latitudes,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Diagnosis]:
    """Explain all findings of a run over one scheme, the first wrong stage first.

    Takes all answers, the right ones too: a mistake must not be seen where it would show. Each
    finding belongs to one diagnosis; ``progress`` is told as `check.run` tells it.

    Examples
    --------
    >>> diagnose([], Latitudes())
    []
    """
    found: dict[str, Diagnosis] = {}
    known: list[Mistake] = []
    for operation in OPERATIONS:
        answers = [one for one in judged if one.case.operation == operation]
        if any(one.findings for one in answers):
            _Search(operation, answers, latitudes, known, found, progress).run()
    # What is wrong on plain data comes first: input that is taken or refused by way of it follows.
    unexplained = sorted(
        (one for one in found.values() if not one.mistake),
        key=lambda one: not any(_is_plain(f) for f in one.findings),
    )
    return [*(one for one in found.values() if one.mistake), *unexplained]


@functools.lru_cache(maxsize=512)
def reference_with(*mistakes: str) -> Reference:
    """Make a reference once: every scheme of a run needs those of the single mistakes."""
    return Reference([MISTAKES[name] for name in mistakes])


@dataclass
class _Search:
    """The diagnosis of one operation."""

    operation: Operation
    answers: Sequence[Judged]
    latitudes: Latitudes
    known: list[Mistake]
    found: dict[str, Diagnosis]
    progress: Callable[[str, int, int], None] | None

    def run(self) -> None:
        for stage in UNEXPLAINABLE:
            self._unexplained(stage, [f for one in self.answers for f in one.findings])
        findings = [f for one in self.answers for f in one.findings]
        mistakes = [m for m in self.known if self.operation in m.operations]
        if mistakes:  # what another operation has shown explains its part here
            reference = reference_with(*(m.name for m in mistakes))
            left = [f for one in self.answers for f in self._findings(one, reference)]
            for mistake in mistakes:
                self._explain(mistake, findings, left, ())
            findings = left
        given_up: set[str] = set(UNEXPLAINABLE)
        while stages := {f.stage for f in findings} - given_up:
            stage = min(stages, key=ORDER.index)
            # Behind a stage that is not understood, what explains only a part is no explanation.
            chosen = self._best(stage, mistakes, findings, given_up == set(UNEXPLAINABLE))
            if chosen is None:
                self._unexplained(stage, findings)
                given_up.add(stage)
                continue
            mistake, left, alike = chosen
            self._explain(mistake, findings, left, alike)
            mistakes.append(mistake)
            self.known.append(mistake)
            findings = left

    def _findings(self, one: Judged, reference: Reference) -> Sequence[Finding]:
        kept = [f for f in one.findings if f.stage in UNEXPLAINABLE]
        if any(f.stage != "again" for f in kept):  # the others end the judging
            return kept
        return [*kept, *judge(one.case, one.answer, self.latitudes, reference).findings]

    def _best(
        self, stage: str, mistakes: Sequence[Mistake], findings: Sequence[Finding], part: bool
    ) -> tuple[Mistake, list[Finding], tuple[str, ...]] | None:
        """Return the mistake that explains a stage, or `part` of it, what it leaves, and others."""
        wrong = {id(f.case): f.wrong for f in findings if f.stage == stage}
        failing = [one for one in self.answers if id(one.case) in wrong]
        failing.sort(key=lambda one: -wrong[id(one.case)])  # the sooner is a candidate given up
        others = [one for one in self.answers if id(one.case) not in wrong]
        candidates = [
            m for m in MISTAKES.values() if self.operation in m.operations and m not in mistakes
        ]
        explained: list[tuple[int, Mistake, list[Finding]]] = []
        partly: list[tuple[int, Mistake, list[Finding]]] = []
        before = sum(wrong.values())
        for number, mistake in enumerate(candidates):
            if self.progress:
                self.progress("looking for the mistake", number, len(candidates))
            reference = reference_with(*(m.name for m in (*mistakes, mistake)))
            found: dict[int, Sequence[Finding]] = {}
            still = 0
            for one in failing:
                here = found[id(one.case)] = self._findings(one, reference)
                still += sum(f.wrong for f in here if f.stage == stage)
                if still > (1 - LEAST_SHARE) * before:
                    break
            else:
                found |= {id(one.case): self._findings(one, reference) for one in others}
                left = [f for one in self.answers for f in found[id(one.case)]]
                spoiled = sum(f.wrong for f in left if f.stage == stage)
                if len(left) >= len(findings) or _before(stage, left) > _before(stage, findings):
                    continue  # it spoils more than it explains
                if spoiled == 0:
                    explained.append((len(left), mistake, left))
                elif part and spoiled <= (1 - LEAST_SHARE) * before:
                    partly.append((spoiled, mistake, left))
        ranked = sorted(explained or partly, key=lambda one: one[0])
        if not ranked:
            return None
        least, mistake, left = ranked[0]
        alike = tuple(m.name for size, m, _ in ranked[1:] if size == least)
        return mistake, left, alike

    def _explain(
        self, mistake: Mistake, findings: Sequence[Finding], left: Sequence[Finding],
        alike: tuple[str, ...],
    ) -> None:  # fmt: skip
        """Record a mistake, with the findings that it makes vanish."""
        remaining = {(id(f.case), f.stage) for f in left}
        gone = [f for f in findings if (id(f.case), f.stage) not in remaining]
        before = self.found.get(mistake.name)
        if before is not None:
            gone = [*before.findings, *gone]
            alike = before.alike
        if not gone:
            return
        gone.sort(key=lambda f: (OPERATIONS.index(f.case.operation), ORDER.index(f.stage)))
        stages = tuple(dict.fromkeys(f.stage for f in gone))
        operation = gone[0].case.operation
        first = [f for f in gone if (f.case.operation, f.stage) == (operation, stages[0])]
        says = f"{_amount(first)}: {mistake.says}."
        rule = mistake.rule
        if stages[0] in STORED_FACTORS:
            rule = mistake.factor_rules.get(gone[0].case.scheme.magnitude, rule)
        self.found[mistake.name] = Diagnosis(rule, mistake.name, says, stages, tuple(gone), alike)

    def _needs_blocks(self, findings: Sequence[Finding]) -> bool:
        """Whether half of what has several blocks is wrong, and all that has one right: B1."""
        if self.operation not in ("encode", "decode"):
            return False
        wrong = {id(f.case) for f in findings}
        several = [one.case for one in self.answers if _blocks(one.case) > 1]
        return all(_blocks(f.case) > 1 for f in findings) and (len(wrong) >= len(several) / 2)

    def _unexplained(self, stage: str, findings: Iterable[Finding]) -> None:
        """Record what no known mistake explains, one entry a rule."""
        here = [f for f in findings if f.stage == stage]
        if not here:
            return
        rules = [f.rule for f in here]
        if stage not in UNEXPLAINABLE:
            # Where plain random data is wrong too, the engineered cases tell nothing more.
            plain = [f.rule for f in here if _is_plain(f)]
            rule, count = Counter(plain or rules).most_common(1)[0]
            if self.operation == "encode" and count < LEAST_SHARE * len(plain or rules):
                rule = default_rule(stage, here[0].case.scheme)  # the flags disagree
            rules = ["B1" if self._needs_blocks(here) else rule] * len(here)
        for rule in dict.fromkeys(rules):
            of_rule = [f for f, r in zip(here, rules, strict=True) if r == rule]
            name = f"{self.operation} {stage} {rule}"
            if stage in UNEXPLAINABLE:
                says = f"{_cases(of_rule)}: {of_rule[0].what}."
            else:
                says = f"{_amount(of_rule)}; no mistake that is known here gives these values."
            self.found[name] = Diagnosis(rule, "", says, (stage,), tuple(of_rule))


def _before(stage: str, findings: Iterable[Finding]) -> int:
    """Count the elements that are wrong in earlier stages."""
    return sum(f.wrong for f in findings if ORDER.index(f.stage) < ORDER.index(stage))


def _is_plain(finding: Finding) -> bool:
    return finding.case.flags[0] in PLAIN


def _blocks(case: Case) -> int:
    """Count the blocks of a case of `encode` or `decode` (rule B1)."""
    shape = case.inputs["x"].shape if case.operation == "encode" else case.inputs["shape"]
    coded = max(int(shape[-2]) - case.scheme.sink_tokens, 0)
    return -(-coded // (case.scheme.block_size or max(coded, 1)))


def _amount(findings: Sequence[Finding]) -> str:
    wrong, stage = sum(f.wrong for f in findings), findings[0].stage
    return f"{wrong} wrong {STAGES[stage]} in {_cases(findings)}"


def _cases(findings: Sequence[Finding]) -> str:
    count = len({id(f.case) for f in findings})
    return "1 case" if count == 1 else f"{count} cases"

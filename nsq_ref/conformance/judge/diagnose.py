"""Say which mistake a port makes: put known mistakes into the reference until it agrees with it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nsq_ref.conformance import model
from nsq_ref.conformance.findings import Diagnosis, Finding
from nsq_ref.conformance.judge import STAGES, Latitudes, default_rule
from nsq_ref.conformance.judge.candidates import (
    LEAST_SHARE,
    ORDER,
    UNEXPLAINABLE,
    Candidate,
    Judged,
    Search,
    findings_of,
    reference_with,
)
from nsq_ref.conformance.judge.stages import ON_TIES
from nsq_ref.conformance.mistakes import MISTAKES
from nsq_ref.conformance.mistakes.changes import READ
from nsq_ref.conformance.mistakes.reference import Mistake
from nsq_ref.conformance.operations import OPERATIONS, Case, Operation
from nsq_ref.conformance.rules import RULES
from nsq_ref.environment import in_default_environment

STORED_FACTORS = ("norm", "gain")  # the stages at which they are compared
PLAIN = ("ordinary", "attention", "stream-append")  # chief flags of cases that nothing is odd about
MOST_STEPS = 3  # by which something may be off that is taken for arithmetic of less precision

# Rules of a stage itself, not of what it is made from.
OWN_RULES: dict[str, tuple[str, ...]] = {
    "sinks": ("K1",),
    "norm": ("N1", "M1"),
    "outlier_index": ("O1",),
    "outliers": ("O1", "F1"),
    "zero": ("S2", "S3"),
    "scale": ("S1", "S2", "S3", "S4"),
    "codes": ("Q1", "Q2", "F1"),
    "packed": ("P1",),
    "gain": ("M2", "M3"),
    "tail": ("B1", "C1"),
    "x_hat": ("D1",),
    "output": ("A1", "A2"),
}
# What a few steps may be off at each stage, in the order in which it is believed: a norm moves all
# channels of a token alike, and a direction shows in scales, too.
OFF: dict[str, tuple[str, ...]] = {
    "norm": ("norm",),
    "outliers": ("norm", "direction"),
    "zero": ("norm", "direction"),
    "scale": ("norm", "scale", "direction"),
    "codes": ("norm", "quotient", "direction"),
    "gain": ("norm", "gain"),
    "x_hat": ("decoded",),
}
# What is said of each, and what does that.
OFF_BY: dict[str, tuple[str, str]] = {
    "norm": ("norms", "an approximate root or reciprocal root, or a sum in float32"),
    "direction": ("directions", "an approximate division, or a product with a reciprocal"),
    "scale": ("scales, before they are narrowed,", "an approximate division"),
    "quotient": ("quotients", "an approximate division, or a product with a reciprocal"),
    "gain": ("gains, before they are narrowed,", "an approximate division or root"),
    "decoded": ("decoded values", "an approximate root, division or product"),
}


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
            _Diagnosing(operation, answers, latitudes, known, found, progress).run()
    # What is wrong on plain data comes first: input that is taken or refused by way of it follows.
    ranked = sorted(found.values(), key=_place)
    return [one for one in ranked if one.findings]


def _place(one: Diagnosis) -> int:
    if "chance" in one.stages:
        return 0
    if one.mistake or one.steps:
        return 1
    return 2 if any(_is_plain(f) for f in one.findings) else 3


@dataclass
class _Diagnosing:
    """The diagnosis of one operation."""

    operation: Operation
    answers: Sequence[Judged]
    latitudes: Latitudes
    known: list[Mistake]
    found: dict[str, Diagnosis]
    progress: Callable[[str, int, int], None] | None

    def __post_init__(self) -> None:
        self._by_chance = any(f.stage == "chance" for one in self.answers for f in one.findings)

    def run(self) -> None:
        for stage in UNEXPLAINABLE:
            self._unexplained(stage, [f for one in self.answers for f in one.findings])
        findings = [f for one in self.answers for f in one.findings]
        mistakes = [m for m in self.known if self.operation in m.operations]
        if mistakes:  # what another operation has shown explains its part here
            reference = reference_with(*(m.name for m in mistakes))
            left = [f for one in self.answers for f in findings_of(one, reference, self.latitudes)]
            for mistake in mistakes:
                self._explain(mistake, findings, left, ())
            findings = left
        given_up: set[str] = set(UNEXPLAINABLE)
        misshapen = _cases_of([f for f in findings if f.stage == "structure"])
        while stages := {f.stage for f in findings} - given_up:
            stage = min(stages, key=ORDER.index)
            # Behind a stage that is not understood, what explains only a part is no explanation.
            part = given_up == set(UNEXPLAINABLE) and not self._by_chance
            best: list[Candidate] = []
            # Where most answers have another shape, the others are no evidence.
            if misshapen <= _cases_of([f for f in findings if f.stage not in UNEXPLAINABLE]):
                best = self._candidates(stage, mistakes, findings, part)
            whole = bool(best) and not best[0].spoiled
            less = None if whole else self._off_by_steps(stage, mistakes, findings)
            if less is not None:
                findings = less
                continue
            if not best:
                self._unexplained(stage, findings)
                given_up.add(stage)
                continue
            mistake, left, _ = best[0]
            self._explain(mistake, findings, left, tuple(one.mistake.name for one in best[1:]))
            mistakes.append(mistake)
            self.known.append(mistake)
            findings = left

    def _candidates(
        self, stage: str, mistakes: Sequence[Mistake], findings: Sequence[Finding], part: bool
    ) -> list[Candidate]:
        """Return the mistakes that explain a stage best, the likeliest first.

        They explain all of it or, with `part`, most of it.
        """

        def told(tried: int, count: int) -> None:
            if self.progress:
                self.progress("looking for the mistake", tried, count)

        search = Search(stage, self.answers, self.latitudes, mistakes, findings, part)
        some = [
            m for m in MISTAKES.values() if self.operation in m.operations and m not in mistakes
        ]
        best = search.among(some, told)
        if len(self.answers) == 1:
            # A single case tells little: what its stage itself may do wrong is the likelier.
            best.sort(key=lambda one: one.mistake.rule not in OWN_RULES[stage])
        return best

    def _off_by_steps(
        self, stage: str, mistakes: Sequence[Mistake], findings: Sequence[Finding]
    ) -> list[Finding] | None:
        """Explain a stage by a value that is a few steps off, and return what that leaves."""
        if all(f.what.endswith(ON_TIES) for f in findings if f.stage == stage):
            return None  # they are rounded otherwise
        failing = {id(f.case) for f in findings}
        wrong = [one for one in self.answers if id(one.case) in failing]
        reference = reference_with(*(m.name for m in mistakes))
        before, found = self.latitudes.supposed, []
        for steps, (place, what) in itertools.product(
            range(1, MOST_STEPS + 1), enumerate(self._suspects(stage))
        ):
            supposed = replace(before, **{what: steps})
            if steps <= getattr(before, what):
                continue
            latitudes = replace(self.latitudes, supposed=supposed)
            left: list[Finding] = []
            for one in wrong:
                here = findings_of(one, reference, latitudes)
                if any(f.stage == stage for f in here):
                    break
                left += here
            else:
                found.append((len(left), steps, place, what, left))
        if not found:
            return None
        count, steps, _, what, left = min(found, key=lambda one: one[:3])
        alike = {_rule_of(other, self.answers[0].case) for size, _, _, other, _ in found
                 if size == count and other != what}  # fmt: skip
        self.latitudes = replace(self.latitudes, supposed=replace(before, **{what: steps}))
        many, cause = OFF_BY[what]
        by = "a float32 step" if steps == 1 else f"up to {steps} float32 steps"
        says = f"{many} that are {by} off explain all of them, as {cause} gives"
        rule = _rule_of(what, self.answers[0].case)
        self._record(f"{self.operation} {what}", rule, "", says, findings, left,
                     tuple(sorted(alike - {rule})), steps)  # fmt: skip
        return left

    def _suspects(self, stage: str) -> list[str]:
        """What may be off: not a norm or direction where there is none, nor what was right."""
        scheme = self.answers[0].case.scheme
        if stage not in OFF or self.operation not in ("encode", "decode"):
            return []
        found = list(OFF[stage])
        if not scheme.separate_norm:
            found = [one for one in found if one not in ("norm", "direction")]
        elif stage != "norm" and scheme.magnitude == "norm" and "norm" in found:
            found.remove("norm")  # a stored norm was judged before
        return found

    def _explain(
        self, mistake: Mistake, findings: Sequence[Finding], left: Sequence[Finding],
        alike: tuple[str, ...],
    ) -> None:  # fmt: skip
        """Record a mistake, with the findings that it makes vanish."""
        rule = mistake.rule
        gone = _gone(findings, left)
        if gone and gone[0].stage in STORED_FACTORS:
            rule = mistake.factor_rules.get(gone[0].case.scheme.magnitude, rule)
        self._record(mistake.name, rule, mistake.name, mistake.says, findings, left, alike)

    def _record(
        self, name: str, rule: str, mistake: str, says: str, findings: Sequence[Finding],
        left: Sequence[Finding], alike: tuple[str, ...], steps: int = 0,
    ) -> None:  # fmt: skip
        """Record what makes findings vanish, and say how much of their first stage it explains."""
        gone = _gone(findings, left)
        if (before := self.found.get(name)) is not None:
            gone = sorted([*before.findings, *gone], key=_order)
            alike = before.alike
        if not gone:
            return
        stages = tuple(dict.fromkeys(f.stage for f in gone))
        operation = gone[0].case.operation
        first = [f for f in gone if (f.case.operation, f.stage) == (operation, stages[0])]
        rest = sum(f.wrong for f in left
                   if (f.case.operation, f.stage) == (operation, stages[0]))  # fmt: skip
        amount = _amount(first)
        if rest:
            whole = sum(f.wrong for f in first) + rest
            amount = f"{amount}, of {whole} in all"
            says = f"{says}. This does not explain the other {rest}"
        says = f"{amount}: {says}."
        self.found[name] = Diagnosis(rule, mistake, says, stages, tuple(gone), alike, steps)

    def _needs_blocks(self, findings: Sequence[Finding]) -> bool:
        """Whether half of what has several blocks is wrong, and all that has one right: B1."""
        if self.operation not in ("encode", "decode"):
            return False
        wrong = {id(f.case) for f in findings}
        several = [one.case for one in self.answers if _blocks(one.case) > 1]
        return all(_blocks(f.case) > 1 for f in findings) and (len(wrong) >= len(several) / 2)

    def _needs_balanced(self, findings: Sequence[Finding]) -> bool:
        """Whether half of what has balanced norms is wrong, and all that has none right: N3."""
        if self.answers[0].case.scheme.norm_rule == "plain" or self.operation in READ:
            return False
        wrong = {id(f.case) for f in findings}
        cases = [one.case for one in self.answers if one.case.refused_by is None]
        some = {id(case) for case in cases if _takes_balanced(case)}
        return wrong <= some and len(wrong) >= len(some) / 2

    def _unexplained(self, stage: str, findings: Iterable[Finding]) -> None:
        """Record what no known mistake explains, one entry a rule."""
        here = [f for f in findings if f.stage == stage]
        if stage == "refusal":
            here = self._refused_throughout(here)
        if not here:
            return
        rules = [f.rule for f in here]
        if stage == "chance":
            first = min(rules, key=list(RULES).index)  # rules are in the order of computation
            rules = [first] * len(rules)
        elif stage not in UNEXPLAINABLE:
            # Where plain random data is wrong too, the engineered cases tell nothing more.
            plain = [f.rule for f in here if _is_plain(f)]
            rule, count = Counter(plain or rules).most_common(1)[0]
            if self.operation == "encode" and count < LEAST_SHARE * len(plain or rules):
                rule = default_rule(stage, here[0].case.scheme)  # the flags disagree
            if self._needs_blocks(here):
                rule = "B1"
            elif self._needs_balanced(here):
                rule = "N3"
            rules = [rule] * len(here)
        for rule in dict.fromkeys(rules):
            of_rule = [f for f, r in zip(here, rules, strict=True) if r == rule]
            name = f"{self.operation} {stage} {rule}"
            if stage == "chance":
                says = (
                    f"the port is not deterministic, as with a race, atomic sums or memory that "
                    f"nobody wrote. {_cases(of_rule)}: {of_rule[0].what}."
                )
            elif stage in UNEXPLAINABLE:
                says = f"{_cases(of_rule)}: {of_rule[0].what}."
            elif all(f.what.endswith(ON_TIES) for f in of_rule):
                says = f"{_amount(of_rule)}, all of them on ties, which are not rounded to even."
            elif self._by_chance:
                self._add_to_chance(of_rule)
                continue
            else:
                says = f"{_amount(of_rule)}; no mistake that is known here gives these values."
            self.found[name] = Diagnosis(rule, "", says, (stage,), tuple(of_rule))

    def _add_to_chance(self, findings: Sequence[Finding]) -> None:
        """Let what cannot be explained belong to a port that is not deterministic."""
        name = next(one for one in self.found if one.startswith(f"{self.operation} chance"))
        before = self.found[name]
        self.found[name] = replace(
            before,
            says=f"{before.says} {_amount(findings)} may come of it.",
            stages=(*before.stages, findings[0].stage),
            findings=(*before.findings, *findings),
        )

    def _refused_throughout(self, findings: Sequence[Finding]) -> list[Finding]:
        """Record once that all valid input is refused, or all of some dtypes; return the others."""
        refused = {id(f.case) for f in findings if f.case.refused_by is None}
        valid = [one.case for one in self.answers if one.case.refused_by is None]
        of_dtype: dict[str, set[int]] = {}
        for case in valid:
            if "x" in case.inputs:
                of_dtype.setdefault(case.inputs["x"].dtype.name, set()).add(id(case))
        dtypes = [dtype for dtype, of_it in of_dtype.items() if of_it <= refused]
        if len(valid) > 1 and len(refused) == len(valid):
            what, group = f"every valid case of {self.operation}", refused
        else:
            what = f"all valid {' and '.join(dtypes)} input"
            group = set().union(*(of_dtype[dtype] for dtype in dtypes))
        if len(group) < 2:
            return list(findings)
        of_it = [f for f in findings if id(f.case) in group]
        says = (
            f"{what} is refused, {_cases(of_it)}, so that nothing else can be judged there; "
            f"the first answer: {of_it[0].what}."
        )
        self.found[f"{self.operation} refuses"] = Diagnosis(
            _REFUSING[self.operation], "", says, ("refusal",), tuple(of_it)
        )
        return [f for f in findings if id(f.case) not in group]


_REFUSING = {
    "encode": "I1", "decode": "D1", "attend": "A1", "stream": "B1", "feedback": "F1",
    "stream_feedback": "F1",
}  # fmt: skip


def _rule_of(what: str, case: Case) -> str:
    """The rule that is broken where a value is a few steps off."""
    at = {"norm": "N1", "direction": "N2", "quotient": "Q1", "decoded": "D1"}
    return at.get(what) or default_rule(what, case.scheme)


def _gone(findings: Sequence[Finding], left: Sequence[Finding]) -> list[Finding]:
    """Return the findings that are no longer there, the first stage first."""
    remaining = {(id(f.case), f.stage) for f in left}
    gone = [f for f in findings if (id(f.case), f.stage) not in remaining]
    return sorted(gone, key=_order)


def _order(finding: Finding) -> tuple[int, int]:
    return OPERATIONS.index(finding.case.operation), ORDER.index(finding.stage)


def _is_plain(finding: Finding) -> bool:
    return finding.case.flags[0] in PLAIN


def _blocks(case: Case) -> int:
    """Count the blocks of a case of `encode` or `decode` (rule B1)."""
    shape = case.inputs["x"].shape if case.operation == "encode" else case.inputs["shape"]
    coded = max(int(shape[-2]) - case.scheme.sink_tokens, 0)
    return -(-coded // (case.scheme.block_size or max(coded, 1)))


def _takes_balanced(case: Case) -> bool:
    """Whether a block of a case has balanced norms (rule N3); of a cache as if nothing was cut."""
    x, scheme = case.inputs["x"], case.scheme
    if x.shape[-2] <= scheme.sink_tokens or not x.size:
        return False
    with np.errstate(all="ignore"):
        _, size = model.norms_and_sizes(x[..., scheme.sink_tokens :, :].astype(np.float32), scheme)
    return bool((size != 1).any())


def _amount(findings: Sequence[Finding]) -> str:
    wrong, stage = sum(f.wrong for f in findings), findings[0].stage
    return f"{wrong} wrong {STAGES[stage]} in {_cases(findings)}"


def _cases_of(findings: Sequence[Finding]) -> int:
    return len({id(f.case) for f in findings})


def _cases(findings: Sequence[Finding]) -> str:
    count = _cases_of(findings)
    return "1 case" if count == 1 else f"{count} cases"

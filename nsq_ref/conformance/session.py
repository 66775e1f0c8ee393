"""One port and one scheme: what is asked, asked again, judged, and known to fail."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from nsq_ref.conformance.findings import Deviation, Explained, Finding, SchemeReport
from nsq_ref.conformance.judge import Latitudes, judge
from nsq_ref.conformance.judge.arrays import bits_of
from nsq_ref.conformance.judge.candidates import Judged
from nsq_ref.conformance.judge.diagnose import diagnose
from nsq_ref.conformance.judge.stages import STAGES, Verdict, default_rule, stage_of
from nsq_ref.conformance.known import KnownLine
from nsq_ref.conformance.operations import (
    NOT_IMPLEMENTED,
    Answer,
    Case,
    Failure,
    Operation,
    Port,
    same_arrays,
)
from nsq_ref.scheme import Scheme

ASKED_AGAIN = 3  # cases of each operation, whatever they show; the largest one, too
WRONG_ASKED_AGAIN = 4  # cases of each operation and first wrong stage
ANSWERS = 4  # to a question that is asked again, where the first two do not tell
Progress = Callable[[str, int, int], None]


@dataclass
class Session:
    """The questions about one scheme, and what became of them.

    Parameters
    ----------
    name : str
        Of the scheme.
    scheme : Scheme
    latitudes : Latitudes
    claimed : sequence of str
        Operations that the port must implement.
    known : mapping of int to KnownLine
        Cases that fail, by their ``id()``.
    repeats : bool
        Whether the port can be asked again.
    """

    name: str
    scheme: Scheme
    latitudes: Latitudes
    claimed: Sequence[Operation]
    known: Mapping[int, KnownLine]
    repeats: bool = True
    asked: list[tuple[int, Case, Answer | Failure]] = field(default_factory=list)
    verdicts: dict[int, Verdict] = field(default_factory=dict)

    def ask(
        self, port: Port, questions: Sequence[tuple[int, Case]],
        told: Callable[[Operation], None] = lambda operation: None,
    ) -> None:  # fmt: skip
        """Ask and judge all, then ask some again: what a port keeps, or leaves to chance, shows."""
        for number, case in questions:
            told(case.operation)
            self.take(number, case, port.ask(number, case))
        if self.repeats:
            self.ask_again(port)

    def take(self, number: int, case: Case, answer: Answer | Failure) -> Verdict | None:
        """Judge an answer, if there is one."""
        self.asked.append((number, case, answer))
        if isinstance(answer, Failure) or answer.status == NOT_IMPLEMENTED:
            return None
        self.verdicts[id(case)] = verdict = judge(case, answer, self.latitudes)
        return verdict

    def ask_again(self, port: Port) -> None:
        """Find out what a port keeps between questions, or leaves to chance."""
        found = [
            finding for number, case, answer in self._worth_asking_again()
            if (finding := asked_again(
                port, number, case, answer, bool(self.verdicts[id(case)].findings)
            )) is not None
        ]  # fmt: skip
        by_chance = {one.case.operation for one in found if one.stage == "chance"}
        for one in found:
            if one.stage == "again" and one.case.operation in by_chance:
                continue  # chance may give the same answer for a while
            verdict = self.verdicts[id(one.case)]
            verdict.findings.insert(0, one)
            verdict.stages.insert(0, one.stage)

    def _worth_asking_again(self) -> Iterator[tuple[int, Case, Answer]]:
        """The first cases of each operation, its largest, and some of those that are wrong."""
        largest: dict[str, int] = {}
        sizes: Counter[str] = Counter()
        for _, case, _ in self.asked:
            size = sum(array.size for array in case.inputs.values())
            if id(case) in self.verdicts and size > sizes[case.operation]:
                largest[case.operation], sizes[case.operation] = id(case), size
        seen: Counter[tuple[str, str]] = Counter()
        for number, case, answer in self.asked:
            verdict = self.verdicts.get(id(case))
            if verdict is None or not isinstance(answer, Answer):
                continue
            first = verdict.findings[0].stage if verdict.findings else ""
            seen[case.operation, ""] += 1
            seen[case.operation, first] += bool(first)
            if (
                seen[case.operation, ""] <= ASKED_AGAIN
                or largest[case.operation] == id(case)
                or (first and seen[case.operation, first] <= WRONG_ASKED_AGAIN)
            ):
                yield number, case, answer

    def report(self, progress: Progress | None = None) -> SchemeReport:
        """Diagnose all that was found."""
        judged: list[Judged] = []
        failures: list[tuple[Case, Failure]] = []
        missing: list[Case] = []
        reasons: dict[str, None] = {}
        explained: list[Explained] = []
        known: list[Deviation] = []
        mended: list[Deviation] = []
        counts: Counter[str] = Counter()
        stages: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for _, case, answer in self.asked:
            verdict = self.verdicts.get(id(case))
            if (line := self.known.get(id(case))) is not None and not _was_not_asked(answer):
                wrong = _wrong_in(answer, verdict)
                (known if wrong else mended).append(Deviation(case, line.reason, wrong))
                if wrong:
                    continue
            if isinstance(answer, Failure):
                failures.append((case, answer))
            elif verdict is None:
                missing.append(case)
                if answer.message:
                    reasons[answer.message] = None
            else:
                judged.append(Judged(case, answer, verdict.findings))
                explained += verdict.explained
                counts[case.operation] += 1
                wrong_stages = {f.stage for f in verdict.findings}
                for stage in verdict.stages:
                    tally = stages[case.operation, stage]
                    tally[0] += 1
                    tally[1] += stage in wrong_stages
        unclaimed = self._unclaimed(missing)
        missing = [case for case in missing if case.operation not in unclaimed]
        return SchemeReport(
            name=self.name,
            scheme=self.scheme,
            judged=dict(counts),
            stages={key: (done, wrong) for key, (done, wrong) in stages.items()},
            diagnoses=diagnose(judged, self.latitudes, progress),
            explained=explained,
            failures=failures,
            not_implemented=missing,
            reasons=list(reasons) if missing else [],
            cases=[case for _, case, _ in self.asked],
            known=known,
            mended=mended,
        )

    def _unclaimed(self, missing: Sequence[Case]) -> set[Operation]:
        """Operations that the port need not have and implements in no case."""
        asked, lacking = (
            Counter(case.operation for case in cases)
            for cases in ([case for _, case, _ in self.asked], missing)
        )
        return {
            name for name, count in asked.items()
            if lacking[name] == count and name not in self.claimed
        }  # fmt: skip


def _was_not_asked(answer: Answer | Failure) -> bool:
    return isinstance(answer, Failure) and answer.kind == "not asked"


def _wrong_in(answer: Answer | Failure, verdict: Verdict | None) -> str:
    """Say what is wrong with an answer; nothing of a right one."""
    if isinstance(answer, Failure):
        return answer.kind
    if verdict is None:
        return "not implemented"
    if not verdict.findings:
        return ""
    first = verdict.findings[0]
    return f"{first.rule}, stage {first.stage}: {first.what}"


def asked_again(port: Port, number: int, case: Case, answer: Answer, wrong: bool) -> Finding | None:
    """Ask a case once more, and again where that tells chance from what is kept between calls.

    A `wrong` answer that comes twice is asked for all the same: chance may hit upon it again.
    """
    answers = [answer]
    for _ in range(ANSWERS):
        one = port.ask(number, case)
        if isinstance(one, Failure):
            if one.kind in ("missing", "not asked"):
                return None  # a port that failed too often is not asked any more: told as that
            what = f"the same question got an answer first, and later none: {one.kind}"
            return Finding(case, "chance", _rule_of(case, None), what)
        answers.append(one)
        if len(answers) > 2 and (differs := _difference(answers[-2], one)) is not None:
            name, words = differs
            what = f"the same question gets other answers, one right after the other: {words}"
            return Finding(case, "chance", _rule_of(case, name), what)
        if len(answers) == 2 and not wrong and _difference(answer, one) is None:
            return None
    if _difference(answer, answers[1]) is not None:
        what = "the same question got another answer later: something is kept between calls"
        return Finding(case, "again", "B2", what)
    return None


def _difference(one: Answer, other: Answer) -> tuple[str | None, str] | None:
    """Return the first array in which answers differ, in the order of stages, and where."""
    if one.status != other.status:
        return None, "once it is refused, once not"
    if same_arrays(one.arrays, other.arrays):
        return None
    for name in sorted({*one.arrays, *other.arrays}, key=_place):
        left, right = one.arrays.get(name), other.arrays.get(name)
        if left is None or right is None or (left.shape, left.dtype) != (right.shape, right.dtype):
            return name, f"{name} has another dtype or shape"
        if count := int((bits_of(left) != bits_of(right)).sum()):
            return name, f"{name} differs in {count} of {left.size} elements"
    return None, "its arrays come in another order"


def _place(name: str) -> int:
    stages = list(STAGES)
    return stages.index(stage_of(name)) if stage_of(name) in stages else len(stages)


def _rule_of(case: Case, name: str | None) -> str:
    """The rule of the first stage that differs."""
    if name is None:
        return {
            "encode": "I2", "decode": "D1", "attend": "A1", "stream": "B1", "feedback": "I2",
            "stream_feedback": "B1",
        }[case.operation]  # fmt: skip
    stage = stage_of(name)
    if stage == "norm" and case.scheme.magnitude != "norm":
        stage = "gain"
    return default_rule(stage if stage in STAGES else "packed", case.scheme)

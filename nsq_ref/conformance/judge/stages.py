"""What the judging of all operations shares: stages, the rules they can break, comparing arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nsq_ref.conformance.cases.flags import FLAGS
from nsq_ref.conformance.findings import Explained, Finding
from nsq_ref.conformance.judge.arrays import bits_of, first_of, is_subnormal, text_of
from nsq_ref.conformance.judge.latitudes import Latitudes
from nsq_ref.conformance.mistakes.reference import Reference
from nsq_ref.conformance.operations import REFUSED, Answer, Case
from nsq_ref.dtypes import Array
from nsq_ref.scheme import Field, Scheme

# What each stage compares, in the order in which an implementer writes and mends them.
STAGES = {
    "chance": "answers",
    "again": "answers",
    "refusal": "refusals",
    "structure": "arrays",
    "sinks": "sinks",
    "norm": "norms",
    "outlier_index": "outlier channels",
    "outliers": "outliers",
    "zero": "zeros",
    "scale": "scales",
    "codes": "codes",
    "packed": "bytes",
    "gain": "gains",
    "tail": "elements of the tail",
    "x_hat": "decoded values",
    "output": "outputs",
}

ON_TIES = "by one, and on ties only"  # what is wrong with codes that another rounding makes

# The rules that a stage can break: the one that is named where nothing tells more, then others
# that a case's chief flag may point to.
_RULES: dict[str, tuple[str, ...]] = {
    "sinks": ("K1", "I1"),
    "outlier_index": ("O1", "N1", "N2", "N3", "I1"),
    "norm": ("N1", "M1", "M4", "Z1", "I1"),
    "outliers": ("O1", "N2", "N3", "Z1", "I1", "F1"),
    "zero": ("S2", "S3", "Z1", "N1", "N2", "N3", "B1", "B2", "K1", "O1", "I1", "F1"),
    "scale": (
        "S1", "S2", "S3", "S5", "Z1", "N1", "N2", "N3", "B1", "B2", "K1", "O1", "I1", "F1",
    ),
    "codes": ("Q1", "Q2", "N1", "N2", "N3", "S3", "O1", "B1", "B2", "K1", "I1", "F1"),
    "packed": ("P1",),
    "gain": ("M2", "M3", "M4", "Z1", "N1", "N3", "I1"),
    "tail": ("B1", "C1", "K1", "B2", "I1"),
    "x_hat": ("D1", "D2", "K1", "O1", "P1", "B1", "N1", "N2"),
    "output": ("A1", "A2"),
}  # fmt: skip
_PART_RULES = {
    "packed": "P1", "norm": "M1", "scale": "S1", "zero": "S2", "outlier_index": "O1",
    "outliers": "O1", "sinks": "K1", "tail": "B1", "x_hat": "D1", "output": "A1",
}  # fmt: skip


def stage_of(part: str) -> str:
    """Return the stage at which an array is compared first.

    Examples
    --------
    >>> stage_of("packed"), stage_of("scale")
    ('codes', 'scale')
    """
    return "codes" if part == "packed" else part


def default_rule(stage: str, scheme: Scheme) -> str:
    """Return the rule that a stage breaks where nothing tells more.

    Examples
    --------
    >>> default_rule("scale", Scheme()), default_rule("scale", Scheme(symmetric=False))
    ('S1', 'S2')
    """
    if stage == "scale" and not scheme.symmetric:
        return "S2"
    if stage == "gain":
        return {"gain": "M2", "lsq": "M3"}.get(scheme.magnitude, "M1")
    return _RULES[stage][0]


@dataclass
class Verdict:
    """What the judge makes of one answer."""

    findings: list[Finding] = field(default_factory=list)  # wrong stages, the first one first
    explained: list[Explained] = field(default_factory=list)  # what a latitude allows
    stages: list[str] = field(default_factory=list)  # those that were judged


class MeaninglessError(Exception):
    """What was found makes all later stages meaningless."""


class Judging:
    """One answer while it is judged; the stages append to the verdict.

    Each operation has a subclass, which names its stages and the rules of what it can find.
    """

    def __init__(
        self, case: Case, answer: Answer, latitudes: Latitudes, reference: Reference, only: str
    ) -> None:
        self.case, self.answer, self.latitudes, self.only = case, answer, latitudes, only
        self.reference, self.scheme = reference, case.scheme
        self.verdict = Verdict()

    def run(self) -> None:
        """Judge the answer, as far as what was found leaves a meaning to later stages."""
        with contextlib.suppress(MeaninglessError):
            self._refusal()
            self.stages()

    def stages(self) -> None:
        """Judge the stages of the operation."""
        raise NotImplementedError

    def _is_asked(self, *stages: str) -> bool:
        """Whether one of these stages is to be judged; all are unless one is asked for alone."""
        return not self.only or self.only in stages

    def _refusal(self) -> None:
        self.verdict.stages.append("refusal")
        refused = self.answer.status == REFUSED
        if refused == (self.case.refused_by is not None):
            if refused:
                raise MeaninglessError
            return
        if refused:
            said = f": {self.answer.message}" if self.answer.message else ""
            what = f"valid input was refused{said}"
        else:
            what = "input that must be refused was taken"
        rule = self.case.refused_by
        if rule is None and self._collapses():
            rule = "D2"
        rule = rule or self._flag_rule(("I1", "I2", "M4", "S5", "D3", "N1", "N3", "O1"))
        self._wrong("refusal", what, rule=rule, got="refused" if refused else "an answer",
                    expected="an answer" if refused else "a refusal")  # fmt: skip
        raise MeaninglessError

    def _collapses(self) -> bool:
        """Whether a token of the input decodes to zero, which is no reason to refuse it."""
        return False

    def _structure(self, layout: Mapping[str, Field]) -> dict[str, Array]:
        """Check names, dtypes and shapes of the answer."""
        self.verdict.stages.append("structure")
        arrays = self.answer.arrays

        def wrong(name: str, what: str, got: str, expected: str) -> None:
            rule, shown = self._part_rule(name, layout), self._history()
            self._wrong("structure", what, rule=rule, got=got, expected=expected, shown=shown)

        for name, (shape, dtype) in layout.items():
            got = arrays.get(name)
            if got is None:
                if 0 not in shape:  # what has no elements need not be there
                    wrong(name, f"{name} is missing", "nothing", f"{dtype} {list(shape)}")
            elif (got.shape, got.dtype) != (shape, dtype):
                differing = {"dtype": got.dtype != dtype, "shape": got.shape != shape}
                which = " and ".join(one for one, differs in differing.items() if differs)
                what = f"{name} has another {which}"
                wrong(name, what, f"{got.dtype} {list(got.shape)}", f"{dtype} {list(shape)}")
        for name in arrays:
            if name not in layout:
                what = f"{name} is not stored by this scheme"
                wrong(name, what, f"{arrays[name].dtype}", "nothing")
        if self.verdict.findings:
            raise MeaninglessError
        return {
            name: arrays.get(name, np.empty(shape, dtype))
            for name, (shape, dtype) in layout.items()
        }

    def _part_rule(self, name: str, layout: Mapping[str, Field]) -> str:
        """The rule that says which array this is: how many tokens, blocks or bytes there are."""
        got, expected = self.answer.arrays.get(name), layout.get(name)
        if name == "norm" and self.scheme.magnitude != "norm":
            return {"gain": "M2", "lsq": "M3"}[self.scheme.magnitude]
        if name == "scale" and not self.scheme.symmetric:
            rule = "S2"
        else:
            rule = _PART_RULES.get(name, "P1")
        if got is None or expected is None or got.ndim != len(expected.shape):
            return rule
        tokens = -1 if name == "norm" else -2
        if got.shape != expected.shape and name != "sinks":
            same = [a == b for a, b in zip(got.shape, expected.shape, strict=True)]
            if not same[tokens] and all(s for i, s in enumerate(same) if i - len(same) != tokens):
                if name in ("scale", "zero", "outlier_index") and self.scheme.axis == "channel":
                    return "B1" if self.scheme.block_size else rule
                return "K1" if self.scheme.sink_tokens else rule
        if got.dtype != expected.dtype and got.shape == expected.shape:
            return {"scale": "S3", "zero": "S3", "norm": "M4"}.get(name, rule)
        return rule

    def _flag_rule(self, candidates: tuple[str, ...]) -> str:
        """The rule of the case's chief flag, if it is one of the candidates, else the first."""
        for flag in self.case.flags:
            if FLAGS[flag].rule in candidates:
                return FLAGS[flag].rule
        return candidates[0]

    def _rule(self, stage: str) -> str:
        chief = FLAGS[self.case.flags[0]].rule
        return chief if chief in _RULES[stage][1:] else default_rule(stage, self.scheme)

    def _wrong(self, stage: str, what: str, *, rule: str | None = None, **details: Any) -> None:
        finding = Finding(self.case, stage, rule or self._rule(stage), what, **details)
        self.verdict.findings.append(finding)

    def _compare(
        self, stage: str, got: Array, expected: Array, allowed: Mapping[str, Array] | None = None,
        shown: Callable[[tuple[int, ...]], Iterator[tuple[str, str]]] | None = None, what: str = "",
    ) -> None:  # fmt: skip
        """Compare bits; where a latitude allows a difference, keep a witness."""
        self.verdict.stages.append(stage)
        wrong = bits_of(got) != bits_of(expected)
        for latitude, where in (allowed or {}).items():
            taken = wrong & where
            if taken.any():
                index = first_of(taken)
                differs = f"{text_of(got[index])}, exactly {text_of(expected[index])}"
                said = f"{stage}{list(index)} is {differs}"
                self.verdict.explained.append(
                    Explained(self.case, stage, latitude, index, said, int(taken.sum()))
                )
                wrong &= ~where
        if not wrong.any():
            return
        index = first_of(wrong)
        only_signs = stage != "x_hat" and bool((got == expected)[wrong].all())
        self._wrong(
            stage, what or f"{STAGES[stage]} differ", rule="Z1" if only_signs else None,
            index=index, got=text_of(got[index]),
            expected=text_of(expected[index]), shown=tuple(shown(index)) if shown else (),
            wrong=int(wrong.sum()), of=wrong.size,
        )  # fmt: skip

    def _storable(self, stage: str, part: Array) -> None:
        """Find what no encoder may store, whatever it chooses (rules S5, Z1)."""
        self.verdict.stages.append(stage)
        for wrong, rule, expected in (
            (~np.isfinite(part), "S5", "a finite value"),
            ((part == 0) & np.signbit(part), "Z1", "+0"),
        ):
            if wrong.any():
                index = first_of(wrong)
                self._wrong(
                    stage, f"{STAGES[stage]} differ", rule=rule, index=index,
                    got=text_of(part[index]), expected=expected, wrong=int(wrong.sum()),
                    of=wrong.size,
                )  # fmt: skip

    def _flushed(self, got: Array, expected: Array) -> dict[str, Array]:
        if not self.latitudes.flush_subnormals:
            return {}
        return {"flush-subnormals": (got == 0) & is_subnormal(expected)}

    def _each_token(self, part: Array, rows: list[slice]) -> Array:
        """Scales or zeros, one for each token."""
        if self.scheme.axis == "token":
            return part
        counts = [one.stop - one.start for one in rows]
        return np.repeat(part, counts, axis=-2)

    def _history(self) -> tuple[tuple[str, str], ...]:
        """What the row of a cache went through; nothing in other operations."""
        return ()

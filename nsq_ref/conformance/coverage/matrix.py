"""Which case shows which mistake: each is put into the reference, and asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsq_ref.conformance.cases import cases, input_dtype
from nsq_ref.conformance.cases.flags import FLAGS
from nsq_ref.conformance.coverage.reasons import REFUSALS, Reason, reason
from nsq_ref.conformance.family import family_scheme
from nsq_ref.conformance.judge import judge
from nsq_ref.conformance.judge.candidates import reference_with
from nsq_ref.conformance.mistakes import MISTAKES
from nsq_ref.conformance.mistakes.reference import Mistake, Reference
from nsq_ref.conformance.operations import (
    CASE_DTYPES,
    DONE,
    OPERATIONS,
    USUAL,
    Answer,
    Case,
    attention_options,
    same_arrays,
    stored_side,
)
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import Scheme

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Cell:
    """What the kit knows of one mistake in one scheme and one dtype of input.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    mistake : str
        Its name in `mistakes.MISTAKES`, or ``takes what RULE refuses``.
    rule : str
        The rule that it breaks.
    dtype : str
    shown_by : str
        A case that shows it, as ``encode/exact-tie/3``; empty where none does.
    reason : Reason or None
        Why none can. A cell with neither is a hole.
    """

    mistake: str
    rule: str
    dtype: str
    shown_by: str = ""
    reason: Reason | None = None

    @property
    def is_hole(self) -> bool:
        """Whether nothing shows the mistake, and nobody knows why."""
        return not self.shown_by and self.reason is None


def coverage(
    scheme: Scheme | str,
    dtypes: Sequence[str] = CASE_DTYPES,
    progress: Progress | None = None,
    *,
    seed: int = 0,
) -> list[Cell]:
    """Ask every known mistake the cases of a scheme.

    Parameters
    ----------
    scheme : Scheme or str
        A name is one of `family.FAMILY`.
    dtypes : sequence of {"float32", "float16", "bfloat16"}
        Of the inputs.
    progress : callable, optional
        Told what is done, how many steps are done and how many there are.
    seed : int
        Of the drawn cases.

    Returns
    -------
    list of Cell
        One for each mistake and dtype, mistakes in the order of computation.

    Examples
    --------
    >>> cells = coverage("naive2", ["float32"])
    >>> any(cell.is_hole for cell in cells)
    False
    >>> next(cell for cell in cells if cell.mistake == "half down").rule
    'Q1'
    """
    scheme = family_scheme("scheme", scheme)
    everything = cases(scheme, OPERATIONS, seed, dtypes)
    cells = [_refusal(rule, scheme, dtype, everything) for rule in REFUSALS for dtype in dtypes]
    asked = [_Asked(case) for case in everything if case.refused_by is None]
    telling: list[str] = []  # cases that showed mistakes lately are asked first
    for number, (name, mistake) in enumerate(MISTAKES.items()):
        if progress is not None:
            progress(name, number, len(MISTAKES))
        why = {dtype: reason(name, scheme, dtype) for dtype in dtypes}
        shown = dict.fromkeys(dtypes, "")
        open_dtypes = {dtype for dtype in dtypes if why[dtype] is None}
        chosen = [one for one in asked if one.case.operation in shown_in(mistake)]
        chosen.sort(key=lambda one: one.place(mistake.rule, telling))
        for one in chosen:
            concerned = open_dtypes if one.dtype is None else open_dtypes & {one.dtype}
            if concerned and one.shows(name):
                shown |= dict.fromkeys(concerned, one.name)
                open_dtypes -= concerned
                telling = [one.case.id, *telling[:7]]
            if not open_dtypes:
                break
        cells += [Cell(name, mistake.rule, dtype, shown[dtype], why[dtype]) for dtype in dtypes]
    return cells


def shown_in(mistake: Mistake) -> set[str]:
    """Return the operations whose cases are to show a mistake: those that all are asked for.

    What can show without feedback is to show so, and reasons speak of that.

    Examples
    --------
    >>> [sorted(shown_in(MISTAKES[name])) for name in ("half up", "feedback fused")]
    [['encode', 'stream'], ['feedback', 'stream_feedback']]
    """
    return set(mistake.operations) & set(USUAL) or set(mistake.operations)


def _refusal(rule: str, scheme: Scheme, dtype: str, everything: Sequence[Case]) -> Cell:
    name = f"takes what {rule} refuses"
    shown = (
        f"{case.operation}/{case.id}"
        for case in everything
        if case.refused_by == rule and input_dtype(case) == dtype and case.operation in USUAL
    )
    return Cell(name, rule, dtype, next(shown, ""), reason(name, scheme, dtype))


class _Asked:
    """A case, and the right answer to it once it is needed."""

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, input_dtype(case)
        self.name = f"{case.operation}/{case.id}"
        self._right: Answer | None = None

    def place(self, rule: str, telling: Sequence[str]) -> tuple[int, int]:
        """When the case is to be asked: what told before, then what is about the rule."""
        if self.case.id in telling:
            return 0, telling.index(self.case.id)
        about = any(FLAGS[flag].rule == rule for flag in self.case.flags)
        size = sum(array.size for array in self.case.inputs.values())
        return 1 if about else 2, size

    def shows(self, name: str) -> bool:
        """Whether a port with the mistake is found wrong."""
        if self._right is None:
            self._right = answered(reference_with(), self.case)
        return self._right is None or shows(self.case, self._right, reference_with(name))


def shows(case: Case, right: Answer, wrong: Reference) -> bool:
    """Return whether a port that is this reference is found wrong in a case."""
    given = answered(wrong, case)
    if given is None:
        return True
    return not same_arrays(right.arrays, given.arrays) and bool(judge(case, given).findings)


@in_default_environment
def answered(reference: Reference, case: Case) -> Answer | None:
    """Return what a port that is this reference answers; None where it breaks off.

    Examples
    --------
    >>> case = cases("naive4", ["encode"])[0]
    >>> sorted(answered(Reference(), case).arrays)
    ['packed', 'scale']
    """
    given: dict[str, Any] = dict(case.inputs)
    model, scheme = reference.model, case.scheme
    try:
        with np.errstate(all="ignore"):
            if case.operation == "encode":
                return Answer(DONE, model.encode(given["x"], scheme))
            if case.operation == "feedback":
                feedback = given["order"], given["factor"]
                return Answer(DONE, model.encode_with_feedback(given["x"], scheme, *feedback))
            if case.operation == "decode":
                shape = tuple(given.pop("shape").tolist())
                return Answer(DONE, {"x_hat": model.decode(given, scheme, shape)})
            if case.operation in ("stream", "stream_feedback"):
                history = given["x"], scheme, given["steps"], int(given["row"].item())
                if case.operation == "stream":
                    return Answer(DONE, model.stream(*history))
                feedback = given["order"], given["factor"]
                return Answer(DONE, model.stream_with_feedback(*history, *feedback))
            decoded = model.decode_sides(stored_side(case, "keys"), stored_side(case, "values"))
            wide = given["query"].astype(np.float64)
            output = model.attend(wide, *decoded, attention_options(given))
            return Answer(DONE, {"output": output.astype(np.float32)})
    except ValueError:  # a code beyond the range, which packing refuses
        return None

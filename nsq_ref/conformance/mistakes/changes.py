"""How a mistake is put into the specification, and what many mistakes are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from nsq_ref.conformance.mistakes.reference import Change, Mistake, Reference

Function = Callable[..., Any]
F32, F64 = np.float32, np.float64

# The operations in which a mistake can show.
PLAIN = ("encode", "stream")  # what is not looked for under feedback
ENCODE = (*PLAIN, "feedback")
DECODE = ("decode", "stream")
CODED = (*ENCODE, "decode")
STREAM = ("stream",)
ATTEND = ("attend",)
READ = ("decode", "attend")

# The rule that is broken where a wrong narrowing shows in stored factors first.
FACTOR_RULES = {"norm": "M1", "gain": "M2", "lsq": "M3"}


class _Place(Protocol):
    def __call__(self, name: str, says: str, change: Change, rule: str = "", /) -> Mistake: ...


def place(function: str, rule: str, operations: tuple[str, ...]) -> _Place:
    """Return what makes mistakes in one function, most of which break one rule.

    Examples
    --------
    >>> norm = place("rounding.norm", "N1", ENCODE)
    >>> norm("no norm", "norms are 1", instead(lambda x: np.ones(x.shape[:-1], F32))).rule
    'N1'
    """

    def mistake(name: str, says: str, change: Change, other: str = "", /) -> Mistake:
        return Mistake(name, other or rule, says, operations, {function: change})

    return mistake


def instead(function: Function) -> Change:
    """Put a function in place of the right one."""
    return lambda original, reference: function


def after(function: Function) -> Change:
    """Change what the right function returns: ``function(result, *arguments)``."""

    def change(original: Function, reference: Reference) -> Function:
        return lambda *arguments: function(original(*arguments), *arguments)

    return change


def around(function: Function) -> Change:
    """Call ``function(original, *arguments)``."""

    def change(original: Function, reference: Reference) -> Function:
        return lambda *arguments, **options: function(original, *arguments, **options)

    return change


def knowing(function: Function) -> Change:
    """Call ``function(reference, *arguments)``, for changes that need the other rules."""

    def change(original: Function, reference: Reference) -> Function:
        return lambda *arguments: function(reference, *arguments)

    return change


def knowing_both(function: Function) -> Change:
    """Call ``function(original, reference, *arguments)``."""

    def change(original: Function, reference: Reference) -> Function:
        return lambda *arguments: function(original, reference, *arguments)

    return change

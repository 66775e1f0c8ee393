"""Cases of the kit, made once in a process: they are the same for all who ask."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from nsq_ref import Scheme
from nsq_ref.conformance.cases import cases, input_dtype
from nsq_ref.conformance.family import family_scheme
from nsq_ref.conformance.operations import CASE_DTYPES, OPERATIONS, OPTIONAL, USUAL, Case

checking = importlib.import_module("nsq_ref.conformance.check")  # the package has a function so


def cases_of(
    scheme: Scheme | str,
    operations: Sequence[str] = USUAL,
    seed: int = 0,
    dtypes: Sequence[str] = CASE_DTYPES,
    *,
    quick: bool = False,
) -> list[Case]:
    """Return what `cases` does. Nobody may write to them."""
    if quick:
        return _quick(family_scheme("scheme", scheme), tuple(operations), seed, tuple(dtypes))
    chosen = family_scheme("scheme", scheme)
    made = [
        case
        for together in (("encode", "decode", "stream"), ("attend",), *((one,) for one in OPTIONAL))
        if set(operations) & set(together)
        for case in _all(chosen, seed, together)
    ]
    made.sort(key=lambda case: OPERATIONS.index(case.operation))
    asked = (None, *dtypes)
    return [one for one in made if one.operation in operations and input_dtype(one) in asked]


def small_cases_of(*arguments: Any) -> list[Case]:
    """Return those of them that are small: the large ones take most of the time."""
    return [
        case
        for case in cases_of(*arguments)
        if sum(array.size for array in case.inputs.values()) < 10_000
    ]


@functools.cache
def _all(scheme: Scheme, seed: int, operations: tuple[str, ...]) -> list[Case]:
    made = cases(scheme, operations, seed)
    for case in made:
        for array in case.inputs.values():
            array.flags.writeable = False
    return made


@functools.cache
def _quick(
    scheme: Scheme, operations: tuple[str, ...], seed: int, dtypes: tuple[str, ...]
) -> list[Case]:
    return cases(scheme, operations, seed, dtypes, quick=True)


@pytest.fixture(scope="module", autouse=True)
def cases_made_once() -> Iterator[None]:
    """For a module that imports it: all checks in this process ask the same cases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking, "cases", cases_of)
        yield


@pytest.fixture(scope="module", autouse=True)
def small_cases_made_once() -> Iterator[None]:
    """The same, without the large cases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking, "cases", small_cases_of)
        yield

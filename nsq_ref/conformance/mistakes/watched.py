"""What a reference computes, call by call, and whether another one would compute it too.

A judgement follows from what the functions return in which mistakes can be made. A reference with
a mistake that returns the same at each call judges the same, and need not be judged with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nsq_ref.conformance.mistakes import MISTAKES
from nsq_ref.conformance.mistakes.reference import Mistake, Reference
from nsq_ref.environment import in_default_environment

FUNCTIONS = tuple(dict.fromkeys(path for one in MISTAKES.values() for path in one.changes))


class Call(NamedTuple):
    """One call of a function in which mistakes can be made."""

    function: str  # "module.function"
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    result: Any
    repeatable: bool  # not if it is about a sequence, which may be another one since


class WatchedReference(Reference):
    """A reference that notes the calls of the functions in which mistakes can be made.

    Examples
    --------
    >>> from nsq_ref import Scheme
    >>> reference = WatchedReference()
    >>> parts = reference.model.encode(np.ones((2, 4), np.float32), Scheme())
    >>> [call.function for call in reference.calls][:3]
    ['model.split_sinks', 'rounding.norm', 'spec.norms_and_sizes']
    """

    def __init__(self, mistakes: Sequence[Mistake] = ()) -> None:
        super().__init__(mistakes)
        self.calls: list[Call] = []
        for path in FUNCTIONS:
            module, name = _place(self, path)
            setattr(module, name, self._noting(path, getattr(module, name)))

    def _noting(self, path: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            repeatable = not any(isinstance(one, self.model.Sequence) for one in arguments)
            self.calls.append(Call(path, arguments, options, result, repeatable))
            return result

        return noting


@in_default_environment
def gives(reference: Reference, calls: Iterable[Call]) -> bool:
    """Whether a reference returns at each of these calls what was returned, to the bit.

    Give the calls of all functions that it changes, in their order. Then it computes what was
    computed: the first thing that differs could only be what one of them returns.

    Examples
    --------
    >>> from nsq_ref import Scheme
    >>> right, away = WatchedReference(), Reference([MISTAKES["half away from zero"]])
    >>> coded = []
    >>> for x in ([[7], [0.4]], [[7], [0.5]]):
    ...     right.calls.clear()
    ...     block = right.spec.encode(np.float32(x), Scheme(separate_norm=False))
    ...     coded.append([call for call in right.calls if call.function == "spec.code"])
    >>> [gives(away, calls) for calls in coded]
    [True, False]
    """
    with np.errstate(all="ignore"):
        for path, arguments, options, result, repeatable in calls:
            module, name = _place(reference, path)
            if not repeatable or not _same(getattr(module, name)(*arguments, **options), result):
                return False
    return True


def _place(reference: Reference, path: str) -> tuple[Any, str]:
    module, name = path.split(".")
    return getattr(reference, module), name


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray | np.generic):
        # Sums that are not exact may depend on the order in memory.
        return (
            isinstance(other, np.ndarray | np.generic)
            and (one.dtype, one.shape, one.strides) == (other.dtype, other.shape, other.strides)
            and one.tobytes() == other.tobytes()
        )
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and _same([*one.items()], [*other.items()])
    if isinstance(one, tuple | list):
        # References have classes of their own.
        alike = type(one).__qualname__ == type(other).__qualname__ and len(one) == len(other)
        return alike and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)

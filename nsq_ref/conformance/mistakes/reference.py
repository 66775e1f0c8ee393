"""The specification, and the specification with known mistakes put into it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, ModuleType
from typing import Any

MODULES = {
    "rounding": "nsq_ref.rounding",
    "packing": "nsq_ref.packing",
    "spec": "nsq_ref.spec",
    "attention": "nsq_ref.attention.tolerance",  # attend, reach, tolerance
    "model": "nsq_ref.conformance.model",
}

Change = Callable[[Callable[..., Any], "Reference"], Any]
"""Makes the wrong function from the right one and the reference whose function it is to be."""


@dataclass(frozen=True)
class Mistake:
    """One decision taken wrongly, as implementers are known to take it."""

    name: str  # unique
    rule: str  # the id of the rule that it breaks
    says: str  # what a report tells the implementer, behind "12 wrong codes in 3 cases: "
    operations: tuple[str, ...]  # those in which it can show
    changes: Mapping[str, Change]  # by "module.function"
    # By the magnitude of a scheme, the rule that is broken where stored factors are wrong first.
    factor_rules: Mapping[str, str] = field(default_factory=dict)


class Reference:
    """The modules of the specification, in a copy of their own, with mistakes in them, if any.

    Examples
    --------
    >>> import numpy as np
    >>> from nsq_ref import Scheme
    >>> from nsq_ref.conformance.mistakes import MISTAKES
    >>> x = np.float32([[7], [0.5], [2.5]])
    >>> plain = Scheme(separate_norm=False)
    >>> away = Reference([MISTAKES["half away from zero"]])
    >>> [one.spec.encode(x, plain).codes.ravel().tolist() for one in (Reference(), away)]
    [[7, 0, 2], [7, 1, 3]]
    """

    rounding: Any
    packing: Any
    spec: Any
    attention: Any
    model: Any
    sinks: Any  # what mistakes remember
    coded: Any
    whole: Any
    sizes: Any

    def __init__(self, mistakes: Sequence[Mistake] = ()) -> None:
        self.mistakes = tuple(mistakes)
        modules = {name: _copy(path) for name, path in MODULES.items()}
        for name, module in modules.items():
            setattr(self, name, module)
            for other, one in modules.items():
                if hasattr(module, other) and isinstance(getattr(module, other), ModuleType):
                    setattr(module, other, one)
        for mistake in self.mistakes:
            for path, change in mistake.changes.items():
                name, function = path.split(".")
                setattr(modules[name], function, change(getattr(modules[name], function), self))


def _copy(path: str) -> ModuleType:
    """Load a module once more, beside the one that everybody shares."""
    spec = importlib.import_module(path).__spec__  # dataclasses look their module up by name
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{path} has no source to load")
    module = importlib.util.module_from_spec(spec)
    exec(_code(path), vars(module))
    return module


@functools.cache
def _code(path: str) -> CodeType:
    """Compile a module once: a diagnosis loads each of them a hundred times."""
    module = importlib.import_module(path)
    source = inspect.getsource(module)
    return compile(source, module.__file__ or path, "exec", dont_inherit=True)

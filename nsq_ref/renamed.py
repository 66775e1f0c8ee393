"""Public modules under the names that they had before: both names give one module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class Renamed(MetaPathFinder, Loader):
    """Finds modules under earlier names; to be put into `sys.meta_path`.

    ``names`` lead from each earlier name to the one of today, both from the top.

    Examples
    --------
    >>> import sys
    >>> sys.meta_path.append(Renamed({"nsq_ref.lengths": "nsq_ref.metrics"}))
    >>> import nsq_ref.lengths, nsq_ref.metrics
    >>> nsq_ref.lengths is nsq_ref.metrics
    True
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how to load a module that has another name today, else None."""
        del path, target
        return ModuleSpec(fullname, self) if fullname in self.names else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of today in place of ``module``."""
        sys.modules[module.__name__] = importlib.import_module(self.names[module.__name__])

"""How Numba compiles our kernels, and where it keeps them: one place for all of them.

Kept kernels are a convenience, never a condition: where no folder can be written they are compiled
in every process, and what was kept and cannot be read is compiled again.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba.core import caching

from nsq_ref.environment import CompilationWarning

_Function = TypeVar("_Function", bound=Callable[..., Any])

# What reading a damaged file may raise: so says the documentation of pickle.
UNREADABLE = (
    pickle.UnpicklingError, OSError, EOFError, AttributeError, ImportError, IndexError, KeyError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
INNER = {"nsq_ref", "numba", "concurrent", "threading"}  # not whoever called us


def compiled(function: _Function, *, keep: bool = False, **options: Any) -> _Function:
    """Compile a function when it is first called; ``error_model`` makes division IEEE's.

    ``keep`` keeps the result on disk, if there is a place: for what is called from Python. Options
    are those of `numba.njit`.

    Examples
    --------
    >>> @compiled
    ... def inverse(x: float) -> float:
    ...     return 1 / x
    >>> inverse(0.0)
    inf
    """
    dispatcher = cast(Any, numba.njit)(error_model="numpy", **options)(function)
    if keep:
        dispatcher._cache = _Kept(function)
    return cast(_Function, dispatcher)


class _Kept:
    """What a dispatcher of Numba asks before it compiles, and tells what it has compiled."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.obstacle: object = None  # to keeping
        try:
            self.store: Any = _WritableStore(function)
        except (OSError, RuntimeError):
            self.obstacle = "no folder of the installation or of a home can be written"
            try:
                self.store = _FilledStore(function)
            except (OSError, RuntimeError):
                self.store = caching.NullCache()

    @property
    def cache_path(self) -> str | None:
        """Where the kernels lie."""
        return cast("str | None", self.store.cache_path)

    def load_overload(self, signature: Any, context: Any) -> Any:
        """Return what was kept for these types, or None; then Numba compiles."""
        try:
            found = self.store.load_overload(signature, context)
        except UNREADABLE:
            found = None
            if self.obstacle is None:
                self._try(self.store.flush)
        # Processes that keep kernels for different types at once may overwrite each other's file.
        if found is not None and tuple(found.signature.args) == tuple(signature):
            return found
        if self.obstacle is not None:
            _say_not_kept(self.obstacle)
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep what was compiled, if possible."""
        if self.obstacle is None:
            self._try(self.store.save_overload, signature, result)

    def _try(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except OSError as error:  # the disk is full, or the folder can no longer be written
            self.obstacle = error
            _say_not_kept(error)


# --- places ---------------------------------------------------------------------------------------


class _InHome(caching.UserWideCacheLocator):
    """Where Numba looks for a home, but not for a folder named "~" where there is none."""

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> Any:
        home = os.path.isabs(cls(function, file).get_cache_path())
        return super().from_function(function, file) if home else None


class _Writable(caching.CompileResultCacheImpl):
    _locator_classes = [  # noqa: RUF012
        _InHome if place is caching.UserWideCacheLocator else place
        for place in caching.CompileResultCacheImpl._locator_classes
    ]


class _WritableStore(caching.FunctionCache):
    _impl_class = _Writable


class _AsItIs:
    """A folder that an image or an administrator filled need not be writable."""

    def ensure_cache_path(self) -> None:
        """Do not try to write."""


class _FilledByUser(_AsItIs, caching.UserProvidedCacheLocator):
    pass


class _FilledInTree(_AsItIs, caching.InTreeCacheLocator):
    pass


class _Filled(caching.CompileResultCacheImpl):
    _locator_classes = [_FilledByUser, _FilledInTree]  # noqa: RUF012


class _FilledStore(caching.FunctionCache):
    _impl_class = _Filled


# --- the notice -----------------------------------------------------------------------------------

_said: list[object] = []  # in this process; Numba lets only one thread compile


def _say_not_kept(obstacle: object) -> None:
    """Warn once, on behalf of whoever called the library."""
    if _said:
        return
    _said.append(obstacle)
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"compiled kernels cannot be kept ({obstacle}): every process compiles them anew, some "
        "seconds for the first quantize and for the first attend. Set NUMBA_CACHE_DIR to a folder "
        "that can be written, or that was filled before",
        CompilationWarning,
        stacklevel=level,
    )

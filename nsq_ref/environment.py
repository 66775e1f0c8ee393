"""The floating-point environment: results that do not depend on what others left on.

A thread has a floating-point environment: how operations round, and whether numbers below the
normal range are flushed to zero. A library that likes speed sets it for all who come after it in
the thread (onnxruntime with ``session.set_denormal_as_zero``, torch with ``set_flush_denormal``),
and new threads begin with that of who starts them. Results must not depend on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])


class CompilationWarning(UserWarning):
    """Compiled kernels cannot be kept from run to run, so that every process compiles them."""


# From bytes, as a thread that flushes may read the literal as 0.
(_SUBNORMAL,) = struct.unpack("<d", (1 << 51).to_bytes(8, "little"))
_ONE, _LITTLE = 1.0, 2.0**-60


def is_default_environment() -> bool:
    """Whether this thread rounds to the nearest and flushes nothing to zero.

    Examples
    --------
    >>> is_default_environment()
    True
    """
    # Half of a subnormal is 0 where operands or results are flushed; next to 1, the little one is
    # lost in both directions only where operations round to the nearest.
    return _SUBNORMAL * 0.5 != 0.0 and _ONE + _LITTLE == _ONE == _ONE - _LITTLE


def in_default_environment(function: _Function) -> _Function:
    """Run a function as if nobody had changed the floating-point environment of the thread.

    It is as it was when the function returns. Where it cannot be changed, the call is refused.

    Raises
    ------
    RuntimeError
        By the function returned, where the environment is another one and cannot be changed.

    Examples
    --------
    >>> @in_default_environment
    ... def half(x: float) -> float:
    ...     return x / 2
    >>> half(5e-324)
    0.0
    """

    @functools.wraps(function)
    def guarded(*arguments: Any, **options: Any) -> Any:
        if is_default_environment():
            return function(*arguments, **options)
        with default_environment(function.__qualname__):
            return function(*arguments, **options)

    return cast(_Function, guarded)


@contextlib.contextmanager
def default_environment(caller: str) -> Iterator[None]:
    """Set the environment that C programs start with, and in the end the one that was there.

    RuntimeError where that does not help; ``caller`` names who needs it.

    Examples
    --------
    >>> with default_environment("example"):
    ...     is_default_environment()
    True
    """
    kept = ctypes.create_string_buffer(_ROOM)
    changed = _standard is not None
    if _standard is not None:
        library, address = _standard
        changed = library.fegetenv(kept) == 0 and library.fesetenv(address) == 0
    try:
        if not is_default_environment():
            raise RuntimeError(
                f"{caller}: this thread flushes small floats to zero or does not round to the "
                "nearest, which would change results, and it cannot be changed from here; undo "
                "what set it (onnxruntime's session.set_denormal_as_zero, torch's "
                "set_flush_denormal, fesetround), or call from another thread"
            )
        yield
    finally:
        if changed and _standard is not None:
            _standard[0].fesetenv(kept)


_ROOM = 256  # bytes, more than any fenv_t has


def _find_standard() -> tuple[Any, ctypes.c_void_p] | None:
    """Return who has fegetenv and fesetenv, and the address that C calls FE_DFL_ENV."""
    if os.name != "posix" or platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"):
        return None
    for name in (None, "libm.so.6"):  # the process as it is has them mostly
        try:
            library = ctypes.CDLL(name)
            if not (library.fegetenv and library.fesetenv):
                continue
            if sys.platform == "darwin":
                start = ctypes.c_char.in_dll(library, "_FE_DFL_ENV")
                return library, ctypes.c_void_p(ctypes.addressof(start))
            return library, ctypes.c_void_p(-1)
        except (OSError, AttributeError, ValueError):
            continue
    return None


_standard = _find_standard()

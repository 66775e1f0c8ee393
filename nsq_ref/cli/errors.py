"""How the command fails: one line on stderr and an exit code, never a traceback for bad input."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn an error of the user or the machine into a line and exit code 2; 1 for a closed pipe."""
    try:
        yield
    except BrokenPipeError:  # nobody reads on
        forget_output()
        sys.exit(1)
    except OSError as error:
        forget_output()
        name = f"{error.filename}: " if error.filename else ""
        _fail(f"{name}{error.strerror or error}")
    except (MemoryError, TypeError, ValueError) as error:
        _fail(str(error) or type(error).__name__)


@contextlib.contextmanager
def about(where: str) -> Iterator[None]:
    """Say which file and array an error is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


@contextlib.contextmanager
def extra(name: str, verb: str) -> Iterator[None]:
    """Say what to install where an optional package is missing that a verb imports."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{verb} needs {error.name}; pip install 'nsq-ref[{name}]' brings all it uses"
        ) from error


def forget_output() -> None:
    """Drop what could not be printed: Python would try it again at its end, and exit with 120."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stdout.flush()
        return
    with contextlib.suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> NoReturn:
    from nsq_ref.conformance.report import printable  # what a file says may be anything

    print(f"nsq: {printable(' '.join(message.splitlines()))}", file=sys.stderr)
    raise SystemExit(2)

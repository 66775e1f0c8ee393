"""The native library: operators of the domain ``nsq`` for onnxruntime."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

__all__ = ["library_path", "register"]

_FILE_NAMES = {"win32": "nsq_onnx.dll", "darwin": "libnsq_onnx.dylib"}


def library_path() -> Path:
    """Return the path of the native library.

    The environment variable ``NSQ_CUSTOM_OPS`` names another one.

    Returns
    -------
    Path
        A shared library with onnxruntime's entry point ``RegisterCustomOps``.

    Raises
    ------
    FileNotFoundError
        If ``NSQ_CUSTOM_OPS`` names no file, or the package was installed without its library.

    Examples
    --------
    >>> library_path().is_file()
    True
    """
    if named := os.environ.get("NSQ_CUSTOM_OPS"):
        if not Path(named).is_file():
            raise FileNotFoundError(f"NSQ_CUSTOM_OPS={named!r} is not a file; unset it or build it")
        return Path(named)
    name = _FILE_NAMES.get(sys.platform, "libnsq_onnx.so")
    # Two folders if the package is installed from a clone: sources, and what was built.
    folders = [Path(folder) for folder in __path__]
    for folder in folders:
        if (path := folder / name).is_file():
            return path
    notes = [note for folder in folders if (note := folder / "without_library.txt").is_file()]
    reason = f": {notes[0].read_text(encoding='utf-8')} when it was installed" if notes else ""
    raise FileNotFoundError(
        f"{name} is not in {', '.join(__path__)}{reason}. Install a C++17 compiler (GCC 8 or "
        "Clang 7, or newer), then nsq-ref anew: pip install --force-reinstall --no-deps "
        "--no-cache-dir nsq-ref, or . in a clone; or set NSQ_CUSTOM_OPS to where it is"
    )


def register(options: SessionOptions) -> None:
    """Let sessions that are made with these options run nodes of ``nsq`` in the native library.

    Parameters
    ----------
    options : onnxruntime.SessionOptions
        Changed in place; once is enough, and twice does no harm.

    Raises
    ------
    FileNotFoundError
        As `library_path`.

    Examples
    --------
    >>> import onnxruntime
    >>> options = onnxruntime.SessionOptions()
    >>> register(options)
    """
    options.register_custom_ops_library(str(library_path()))

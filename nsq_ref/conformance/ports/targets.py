"""What a command line names as what is to be checked, and how it is started."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from nsq_ref.conformance.operations import OPERATIONS, OPTIONAL, Port
from nsq_ref.conformance.ports.frames import Frame
from nsq_ref.conformance.ports.process import Process

# Not from this directory, where files may be named like modules that the worker imports.
WORKER = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from nsq_ref.conformance.ports.worker import main; sys.exit(main())"
)
_LIBRARY = re.compile(r".+\.(so(\.[0-9]+)*|dylib|dll)")  # libmine.so.1 is one, too


def open_port(
    encode: str | None = None,
    decode: str | None = None,
    attend: str | None = None,
    stream: str | None = None,
    custom_ops: str | None = None,
    timeout: float = 30.0,
    header: Frame | None = None,
    feedback: str | None = None,
    stream_feedback: str | None = None,
) -> Port:
    """Start what is to be checked, in a process of its own.

    Each operation is done by a Python function (``package.module:function`` or
    ``path/to/file.py:function``, see `Callables`), a shared library that implements ``nsq.h``
    (``.so``, ``.dylib``, ``.dll``), or an ONNX model, whose operators ``custom_ops`` may bring. A
    library given as ``encode`` does also those of the others that are left out. A program, which
    can only be given as ``encode`` and alone, does all of them; given as ``feedback`` or
    ``stream_feedback`` once more, these too. ValueError for what does not exist, cannot be loaded,
    or makes no sense together; ``timeout`` and ``header`` are those of `Process`.

    Examples
    --------
    >>> port = open_port("nsq_ref:quantize")
    >>> port.name
    'nsq_ref:quantize'
    >>> port.close()
    """
    named = encode, decode, attend, stream, feedback, stream_feedback
    given = zip(OPERATIONS, named, strict=True)
    targets = {operation: target for operation, target in given if target is not None}
    if not targets:
        raise ValueError("nothing to check was given; name at least what encodes or what decodes")
    kinds = {operation: target_kind(target) for operation, target in targets.items()}
    if custom_ops is not None:
        if "model" not in kinds.values():
            raise ValueError(f"custom_ops={custom_ops} is for ONNX models, and none was given")
        if not Path(custom_ops).is_file():
            raise ValueError(f"custom_ops: there is no file {custom_ops}")
    name = ", ".join(dict.fromkeys(targets.values()))
    if "program" in kinds.values():
        # A program answers what it is asked: named once more, it is asked for that, too.
        others = {name: one for name, one in targets.items() if name not in OPTIONAL}
        if list(others) != ["encode"] or len(set(targets.values())) > 1:
            raise ValueError(
                "a program answers all operations, so that it is given first and alone; got "
                + ", ".join(f"{operation}={target}" for operation, target in targets.items())
            )
        argv = [os.path.abspath(targets["encode"])]  # links kept: some programs go by their name
    else:
        argv = [sys.executable, "-c", WORKER]
        argv.append(json.dumps({**targets, "custom_ops": custom_ops}))
    return Process(name, argv, timeout, header)


def target_kind(target: str) -> str:
    """Return ``function``, ``library``, ``model`` or ``program``."""
    if not target:
        raise ValueError("a target is empty; name what is to be checked, or leave the option out")
    path = Path(target)
    if path.is_file():
        if _LIBRARY.fullmatch(path.name):
            return "library"
        if path.suffix == ".onnx":
            return "model"
        if path.suffix == ".py" and not os.access(path, os.X_OK):
            raise ValueError(f"{target} is a file; name a function in it: {target}:encode")
        if not os.access(path, os.X_OK):
            raise ValueError(
                f"{target} is not executable; for a program, run chmod +x {target}; libraries end "
                "in .so, .dylib or .dll, models in .onnx"
            )
        return "program"
    if path.is_dir():
        raise ValueError(
            f"{target} is a folder; name what is in it, or judge the answers in it with "
            f"nsq check --dir {target}"
        )
    module, colon, function = target.rpartition(":")
    if not colon:
        raise ValueError(
            f"there is no file {target}; for a Python function, name it as package.module:function "
            "or path/to/file.py:function"
        )
    if module.endswith(".py") and not Path(module).is_file():
        raise ValueError(f"there is no file {module}, named in {target}")
    names = function if module.endswith(".py") else f"{module}.{function}"
    if not all(part.isidentifier() for part in names.split(".")):
        raise ValueError(
            f"{target} names no Python function; write package.module:function or "
            "path/to/file.py:function"
        )
    return "function"

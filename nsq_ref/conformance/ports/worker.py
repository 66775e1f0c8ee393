"""The process in which code under test runs: ``python -m nsq_ref.conformance.ports.worker SPEC``.

SPEC is a JSON object that names what does each operation, as `targets.open_port` takes it. Whatever
goes wrong here, the process at the other end of the pipes, `process.Process`, lives on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from nsq_ref.conformance.operations import (
    FAILED,
    NOT_IMPLEMENTED,
    OPERATIONS,
    Answer,
    Failure,
    Port,
    TargetError,
)
from nsq_ref.conformance.ports.frames import read_frame, write_frame
from nsq_ref.conformance.ports.functions import Callables, function_named, require_signature
from nsq_ref.conformance.ports.library import Library
from nsq_ref.conformance.ports.messages import case_of, reply_of, text_array
from nsq_ref.conformance.ports.onnx_model import Model
from nsq_ref.conformance.ports.targets import target_kind


def main(arguments: list[str] | None = None) -> int:
    """Answer the requests on standard input until it ends; return the exit code."""
    (text,) = sys.argv[1:] if arguments is None else arguments
    # What the code under test prints, or reads, must not get among the frames.
    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(1), "wb") as answers:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(2, 1)
        try:
            ports = _load(json.loads(text))
        except TargetError as error:
            read_frame(requests)
            status = np.array([FAILED], np.int32)
            write_frame(answers, {"status": status, "message": text_array(str(error))})
            return 1
        serve(ports, requests, answers)
    return 0


def serve(ports: Mapping[str, Port], requests: BinaryIO, answers: BinaryIO) -> None:
    """Copy the first frame, then answer every request by the port of its operation.

    Examples
    --------
    >>> import io
    >>> from nsq_ref import Scheme
    >>> from nsq_ref.conformance import ports
    >>> from nsq_ref.conformance.operations import Case
    >>> requests, answers = io.BytesIO(), io.BytesIO()
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> ports.write_requests(requests, ports.hello_frame(), [case])
    >>> _ = requests.seek(0)
    >>> serve({}, requests, answers)
    >>> _ = answers.seek(0)
    >>> [list(read_frame(answers)) for _ in range(2)]
    [['hello'], ['case', 'status', 'message']]
    """
    header = read_frame(requests)
    if header is None:
        return
    write_frame(answers, header)
    while (frame := read_frame(requests)) is not None:
        number, case = case_of(frame)
        port = ports.get(case.operation)
        if port is None:
            absent = f"nothing was given for {case.operation}"
            result: Answer | Failure = Answer(NOT_IMPLEMENTED, {}, absent)
        else:
            result = port.ask(number, case)
        write_frame(answers, reply_of(number, result))


def _load(spec: Mapping[str, str | None]) -> dict[str, Port]:
    """Return the port of each operation."""
    custom_ops = spec.get("custom_ops")
    ports: dict[str, Port] = {}
    for operation in OPERATIONS:
        target = spec.get(operation)
        if target is None:
            continue
        kind = target_kind(target)
        if kind == "library":
            ports[operation] = Library(target)
        elif kind == "model":
            ports[operation] = Model(target, operation, custom_ops)
        else:
            function = function_named(target)
            try:
                require_signature(operation, function, target)
            except TypeError as error:
                raise TargetError(str(error)) from None
            ports[operation] = Callables(target, **{operation: function})
    if isinstance(library := ports.get("encode"), Library):
        ports = dict.fromkeys(OPERATIONS, library) | ports
    return ports


if __name__ == "__main__":
    sys.exit(main())

"""The frames of a run: its header, the question of each case, and the answer to it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple, get_args

import numpy as np

from nsq_ref.conformance.operations import (
    FAILED,
    OPERATIONS,
    USUAL,
    Answer,
    Case,
    Failure,
    FailureKind,
    Operation,
    scheme_array,
    scheme_of,
)
from nsq_ref.conformance.ports.frames import Frame, read_frame, write_frame
from nsq_ref.dtypes import Array
from nsq_ref.scheme import SPEC_VERSION, FloatName, Scheme

PROTOCOL = 1
MESSAGE_BYTES = 2000
KINDS: tuple[FailureKind, ...] = get_args(FailureKind)
RESERVED = ("case", "status", "message", "kind")


class Hello(NamedTuple):
    """The parameters of a run, from which its cases can be made again."""

    seed: int
    schemes: list[tuple[str, Scheme]]
    operations: list[Operation]
    dtypes: list[FloatName]


def hello_frame(
    seed: int = 0,
    schemes: Iterable[tuple[str, Scheme]] = (),
    operations: Iterable[Operation] = USUAL,
    dtypes: Iterable[FloatName] = get_args(FloatName),
) -> Frame:
    """Return the frame that begins a run; a port copies it to its output.

    Examples
    --------
    >>> frame = hello_frame(7, [("pchan4", Scheme.named("pchan4"))], ["encode"], ["float32"])
    >>> frame["hello"].tobytes()[:46]
    b'{"specVersion": "NSQ-1", "protocol": 1, "seed"'
    """
    text = json.dumps({
        "specVersion": SPEC_VERSION,
        "protocol": PROTOCOL,
        "seed": seed,
        "schemes": [{"name": name, **scheme.to_dict()} for name, scheme in schemes],
        "operations": list(operations),
        "dtypes": list(dtypes),
    })  # fmt: skip
    return {"hello": text_array(text)}


def read_hello(stream: BinaryIO) -> Hello:
    """Read the frame that begins a run.

    ValueError for anything else, and for a run of another version of specification or protocol.

    Examples
    --------
    >>> import io
    >>> stream = io.BytesIO()
    >>> write_frame(stream, hello_frame(7, operations=["decode"], dtypes=["float16"]))
    >>> _ = stream.seek(0)
    >>> read_hello(stream)
    Hello(seed=7, schemes=[], operations=['decode'], dtypes=['float16'])
    """
    frame = read_frame(stream)
    if frame is None:
        raise ValueError("the stream is empty; it begins with the first frame that nsq gen wrote")
    if list(frame) != ["hello"]:
        raise ValueError(
            f"the stream begins with a frame of {sorted(frame)}; a port copies the first frame, "
            "which holds the array 'hello', to its output as it is"
        )
    try:
        fields = json.loads(frame["hello"].tobytes())
        versions = fields["specVersion"], fields["protocol"]
        if versions != (SPEC_VERSION, PROTOCOL):
            raise ValueError(
                f"the run is of {versions[0]} and protocol {versions[1]}; this kit judges "
                f"{SPEC_VERSION} and protocol {PROTOCOL}"
            )
        schemes = [(one.pop("name"), Scheme.from_dict(one)) for one in fields["schemes"]]
        hello = Hello(fields["seed"], schemes, fields["operations"], fields["dtypes"])
    except (
        KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError,
        RecursionError,
    ) as error:  # fmt: skip
        raise ValueError(f"the first frame is not one that nsq gen wrote: {error!r}") from None
    if type(hello.seed) is not int or hello.seed < 0:
        raise ValueError(f"the seed of the run is {hello.seed!r}; it is an integer from 0 on")
    if not all(isinstance(name, str) for name, _ in schemes):
        raise ValueError(f"the schemes of the run are named {[name for name, _ in schemes]}")
    for name, given, known in (
        ("operations", hello.operations, OPERATIONS),
        ("dtypes", hello.dtypes, get_args(FloatName)),
    ):
        if not isinstance(given, list) or not all(one in known for one in given):
            raise ValueError(f"{name} of the run are {given}; known are {', '.join(known)}")
    return hello


def request_of(number: int, case: Case) -> Frame:
    """Return the frame that asks a case.

    Examples
    --------
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> list(request_of(0, case))
    ['case', 'operation', 'scheme', 'x']
    """
    return {
        "case": np.array([number], np.int32),
        "operation": np.array([OPERATIONS.index(case.operation)], np.int32),
        "scheme": scheme_array(case.scheme),
        **case.inputs,
    }


def case_of(frame: Frame) -> tuple[int, Case]:
    """Return the number and the case that a request asks; the inverse of `request_of`.

    Examples
    --------
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> case_of(request_of(7, case))
    (7, Case(encode 7))
    """
    inputs = dict(frame)
    number = int(inputs.pop("case")[0])
    operation = OPERATIONS[int(inputs.pop("operation")[0])]
    return number, Case(str(number), operation, scheme_of(inputs.pop("scheme")), (), inputs)


def write_requests(stream: BinaryIO, header: Frame, cases: Iterable[Case]) -> None:
    """Write the frames of a run: the header and one a case.

    Examples
    --------
    >>> import io
    >>> stream = io.BytesIO()
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> write_requests(stream, hello_frame(), [case])
    >>> _ = stream.seek(0)
    >>> [list(read_frame(stream)) for _ in range(2)]
    [['hello'], ['case', 'operation', 'scheme', 'x']]
    """
    write_frame(stream, header)
    for number, case in enumerate(cases):
        write_frame(stream, request_of(number, case))


def reply_of(number: int, result: Answer | Failure) -> Frame:
    """Return the frame that answers a case.

    Examples
    --------
    >>> from nsq_ref.conformance.operations import REFUSED
    >>> list(reply_of(3, Answer(REFUSED, {}, "x[0, 1] is nan")))
    ['case', 'status', 'message']
    """
    if isinstance(result, Failure):
        status, arrays = FAILED, {"kind": text_array(result.kind)}
    else:
        status, arrays = result.status, dict(result.arrays)
    frame: Frame = {
        "case": np.array([number], np.int32),
        "status": np.array([status], np.int32),
    }
    if result.message:
        frame["message"] = text_array(result.message)
    return frame | arrays


def answer_of(frame: Frame, number: int) -> Answer | Failure:
    """Return what a frame answers to a case; the inverse of `reply_of`."""
    answered, status = number_in(frame), number_in(frame, "status")
    if answered is None or status is None:
        return Failure("garbage", no_answer(frame))
    if answered != number:
        return Failure("garbage", f"case {number} was asked, and case {answered} answered")
    if status not in range(FAILED + 1):
        return Failure("garbage", f"status {status} is none; it is 0 to {FAILED}")
    message = text_of(frame["message"]) if "message" in frame else ""
    if status == FAILED:
        named = text_of(frame["kind"]) if "kind" in frame else ""
        kind: FailureKind = next((kind for kind in KINDS if kind == named), "garbage")
        return Failure(kind, message or "the port says that it failed, and not why")
    arrays = {name: array for name, array in frame.items() if name not in RESERVED}
    return Answer(status, arrays, message)


def no_answer(frame: Frame) -> str:
    """Say what a frame holds that is no answer."""
    found = {name: f"{array.dtype} {list(array.shape)}" for name, array in frame.items()}
    return f"an answer has case and status, int32 [1]; this one has {found}"


def number_in(frame: Frame, name: str = "case") -> int | None:
    """Return the number that a frame holds under a name, if it does."""
    array = frame.get(name)
    well = array is not None and array.dtype == np.int32 and array.shape == (1,)
    return int(array[0]) if array is not None and well else None


def text_array(text: str) -> Array:
    """Return text as frames hold it; the inverse of `text_of`."""
    return np.frombuffer(text.encode("utf-8", "backslashreplace"), np.uint8)


def text_of(array: Array) -> str:
    """Return the beginning of a text that a port wrote."""
    return array.tobytes()[:MESSAGE_BYTES].decode("utf-8", "backslashreplace")

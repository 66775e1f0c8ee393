"""Runs that are written, answered and read: headers, files, streams."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nsq_ref as nsq
from nsq_ref import Scheme
from nsq_ref.conformance import ports
from nsq_ref.conformance.operations import (
    DONE,
    FAILED,
    NOT_IMPLEMENTED,
    REFUSED,
    Answer,
    Failure,
)
from nsq_ref.conformance.ports import (
    Callables,
    Folder,
    Stream,
    request_of,
    worker,
)
from nsq_ref.conformance.ports.frames import Frame, read_frame
from tests.ports import functions
from tests.support.asked import (
    ALL_PARTS,
    PCHAN,
    answered,
    arrays_of,
    case,
    decode_case,
    equal,
    failed,
    normal,
    stream_of,
)


def test_the_header_tells_the_run() -> None:
    schemes = [("pchan4", PCHAN), ("all", ALL_PARTS)]
    hello = ports.Hello(7, schemes, ["decode", "stream"], ["bfloat16"])
    assert ports.read_hello(stream_of(ports.hello_frame(*hello))) == hello


def hello_with(**changes: Any) -> Frame:
    fields = json.loads(ports.hello_frame()["hello"].tobytes()) | changes
    return {"hello": np.frombuffer(json.dumps(fields).encode(), np.uint8)}


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (stream_of(), "the stream is empty"),
        (stream_of(behind=b"hello, world"), "a frame begins with"),
        (stream_of({"case": np.int32([0])}), r"a frame of \['case'\]"),
        (stream_of({"hello": np.zeros(3, np.uint8)}), "not one that nsq gen wrote"),
        (stream_of({"hello": np.frombuffer(b"[3]", np.uint8)}), "not one that nsq gen wrote"),
        (stream_of({"hello": np.frombuffer(b"\xff{}", np.uint8)}), "not one that nsq gen wrote"),
        (stream_of(hello_with(specVersion="NSQ-9")), "the run is of NSQ-9 and protocol 1"),
        (stream_of(hello_with(protocol=2)), "the run is of NSQ-1 and protocol 2"),
        (stream_of(hello_with(schemes=[{"name": "x"}])), "a scheme has the fields"),
        (stream_of(hello_with(operations=["paint"])), "operations of the run are"),
        (stream_of(hello_with(seed="7")), "the seed of the run is '7'"),
        (stream_of(hello_with(seed=-1)), "the seed of the run is -1"),
        (stream_of({"hello": np.frombuffer(b"[" * 10**5, np.uint8)}), "not one that nsq gen wrote"),
        (
            stream_of(hello_with(schemes=[{"name": 3, **Scheme().to_dict()}])),
            r"the schemes of the run are named \[3\]",
        ),
        (stream_of(hello_with(dtypes="float32")), "dtypes of the run are"),
    ],
)
def test_headers_that_are_none(stream: io.BytesIO, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ports.read_hello(stream)


def test_files(tmp_path: Path) -> None:
    """Requests go to files, and each answer is a file of the same name."""
    cases = [case(x=normal(1, 4)) for _ in range(8)]
    ports.write_files(tmp_path / "inputs", ports.hello_frame(3), cases)
    with (tmp_path / "inputs" / "header.nsq").open("rb") as file:
        assert ports.read_hello(file).seed == 3
    with (tmp_path / "inputs" / "00002.nsq").open("rb") as file:
        equal(read_frame(file), request_of(2, cases[2]))

    outputs = tmp_path / "outputs"
    with pytest.raises(ValueError, match="there is no directory"):
        Folder("mine", outputs)
    outputs.mkdir()
    right = {"packed": np.uint8([3])}
    frame = stream_of(ports.reply_of(0, Answer(DONE, right, "well"))).getvalue()
    for number, data in enumerate([frame, frame, b"", b"text", frame[:-1], frame + b"\n"]):
        (outputs / f"{number:05d}.nsq").write_bytes(data)
    (outputs / "00006.nsq").mkdir()
    os.mkfifo(outputs / "00008.nsq")
    port = Folder("mine", outputs)
    equal(arrays_of(port.ask(0, cases[0])), right)
    answers = [failed(port.ask(number, cases[0])) for number in range(1, 9)]
    for answer, (kind, says) in zip(
        answers,
        [
            ("garbage", "case 1 was asked, and case 0 answered"),
            ("garbage", "00002.nsq is empty"),
            ("garbage", "00003.nsq cannot be read: a frame begins with"),
            ("garbage", "00004.nsq cannot be read: the stream ended 1 bytes before"),
            ("garbage", "00005.nsq goes on behind its first frame"),
            ("garbage", "00006.nsq cannot be read: "),
            ("missing", "there is no 00007.nsq"),
            ("garbage", "00008.nsq cannot be read: it is no file"),
        ],
        strict=True,
    ):
        assert (answer.kind, says in answer.message) == (kind, True), answer
    port.close()


def test_a_stream() -> None:
    """Answers come in order; what is left out or cut off is told by its place."""
    replies = [ports.reply_of(number, Answer(DONE, {})) for number in (0, 1, 3)]
    refused = ports.reply_of(4, Answer(REFUSED, {}, "no"))
    bounds = ports.reply_of(5, Failure("out of bounds", "wrote behind packed"))
    port = Stream("mine", stream_of(*replies, refused, bounds, behind=b"NSQ1\1"))
    answers = [port.ask(number, case()) for number in range(8)]
    assert [getattr(one, "status", None) for one in answers[:5]] == [0, 0, None, 0, REFUSED]
    assert answers[2] == Failure("missing", "after case 1 the stream goes on with case 3")
    assert answers[5] == Failure("out of bounds", "wrote behind packed")
    ended = "the stream ended after case 5 in the midst of an answer (the stream ended 3 bytes "
    assert answers[6] == answers[7]
    assert failed(answers[6]).message.startswith(ended)
    assert failed(Stream("mine", stream_of()).ask(0, case())).message == (
        "the stream ended before any answer"
    )
    port.close()


def test_garbage_in_a_stream() -> None:
    """It is told of the case behind whose answer it comes, and the next one is judged."""
    first, second = (stream_of(ports.reply_of(n, Answer(DONE, {}))).getvalue() for n in (0, 1))
    port = Stream("mine", io.BytesIO(first + b"some text\n" + second))
    kinds = [getattr(port.ask(number, case()), "kind", "") for number in range(4)]
    assert kinds == ["garbage", "", "missing", "missing"]


def test_a_pipeline() -> None:
    """What nsq gen writes, a port answers: the worker's loop on streams."""
    requests, answers = io.BytesIO(), io.BytesIO()
    x = normal(2, 4)
    cases = [case(x=x), case(x=np.float32([[np.inf]])), decode_case(x, PCHAN)]
    ports.write_requests(requests, ports.hello_frame(5, [("nsep+pchan4", Scheme())]), cases)
    requests.seek(0)
    worker.serve({"encode": Callables("f", encode=functions.encode)}, requests, answers)
    answers.seek(0)
    assert ports.read_hello(answers).schemes == [("nsep+pchan4", Scheme())]
    port = Stream("mine", answers)
    equal(arrays_of(port.ask(0, cases[0])), nsq.quantize(x).parts)
    statuses = [answered(port.ask(number, cases[number])).status for number in (1, 2)]
    assert statuses == [REFUSED, NOT_IMPLEMENTED]


def test_failures_survive_frames() -> None:
    for kind in ("hang", "crash", "garbage", "out of bounds", "missing"):
        failure = Failure(kind, "why")  # type: ignore[arg-type]
        frame = ports.reply_of(2, failure)
        assert frame["status"].tolist() == [FAILED]
        assert Stream("s", stream_of(frame)).ask(2, case()) == failure

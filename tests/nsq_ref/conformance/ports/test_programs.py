"""Programs as ports, and that the kit outlives whatever they do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from nsq_ref import Scheme
from nsq_ref.conformance.operations import (
    Answer,
    Failure,
)
from nsq_ref.conformance.ports import (
    Process,
)
from tests.support.asked import (
    PORTS,
    arrays_of,
    case,
    equal,
    failed,
    normal,
    stream_case,
)

ENDS_OF_STDERR = 5 * "line\n" + "...\n" + 4 * "line\n" + "out of memory"


def program(what: str, timeout: float = 30.0) -> Process:
    return Process(what, [sys.executable, str(PORTS / "program.py"), what], timeout)


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("crashes", "crash", "it ended with signal SIGSEGV"),
        ("exits", "crash", "it ended with exit code 3; stderr:\n" + ENDS_OF_STDERR),
        ("closes its output", "crash", "it closed its output without an answer"),
        ("writes text", "garbage", r"read b'norm = 3.5\xff\n'"),
        ("writes text for ever", "garbage", "read b'no end"),
        ("claims much", "garbage", "would take"),
        ("stops within an answer", "crash", "it ended with exit code 2"),
        ("answers another case", "garbage", "case 4 was asked, and case 5 answered"),
        ("gives no status", "garbage", "has case and status, int32 [1]; this one has {'case': "),
        ("gives a status that is none", "garbage", "status 9 is none; it is 0 to 3"),
        ("says that it failed", "garbage", r"no \xe9"),
        ("leaves a child in a session of its own", "crash", "it ended with exit code 8"),
    ],
)  # fmt: skip
def test_programs_that_fail(what: str, kind: str, says: str) -> None:
    """Each failure is told for what it is."""
    port = program(what)
    answer = failed(port.ask(4, case()))
    assert (answer.kind, says in answer.message) == (kind, True), answer
    port.close()


def test_children_end_with_the_program(tmp_path: Path) -> None:
    """A child that holds the pipes does not hold up the kit, and is killed."""
    watched = tmp_path / "fifo"
    os.mkfifo(watched)
    reader = os.open(watched, os.O_RDONLY | os.O_NONBLOCK)
    port = Process(
        "port", [sys.executable, str(PORTS / "program.py"), "leaves a child", str(watched)]
    )
    assert failed(port.ask(0, case())) == Failure("crash", "it ended with exit code 7")
    os.set_blocking(reader, True)
    assert os.read(reader, 5) == b""
    os.close(reader)
    port.close()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("hangs", "no answer in 1 s; stderr:\nwaiting for a lock"),
        ("reads nothing", "no answer in 1 s"),
        ("answers without reading", "it answered, but did not read all of the case in 1 s"),
    ],
)
def test_programs_that_hang(what: str, says: str) -> None:
    port = program(what, timeout=1.0)
    answer = failed(port.ask(0, case(x=normal(512, 1024))))
    port.close()
    assert (answer.kind, answer.message) == ("hang", says)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("exits at the start", "exit code 1; stderr:\nno licence was found"),
        ("greets", "what it wrote is no frame: a frame begins with b'NSQ1'; read b'Welcome to the"),
        ("cannot start", "no GPU"),
        ("answers the header", "its first frame has ['hello']; it should be a copy"),
    ],
)  # fmt: skip
def test_programs_that_do_not_start(what: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"{what} did not start: ") as error:
        program(what)
    assert says in str(error.value)


def test_programs_that_are_slow_to_start() -> None:
    argv = [sys.executable, str(PORTS / "program.py"), "is slow to start"]
    with pytest.raises(ValueError, match="slow did not start: no answer in 1 s"):
        Process("slow", argv, start_timeout=1.0)


def test_large_frames_in_both_directions() -> None:
    """A program that answers before it has read the case does not block the kit."""
    port = program("writes before it reads")
    assert arrays_of(port.ask(0, case(x=normal(1024, 1024))))["packed"].nbytes == 1 << 22
    port.close()
    port = program("right")
    x = normal(1024, 1024)
    equal(arrays_of(port.ask(0, case(x=x))), {"packed": x.view(np.uint8)})
    port.close()


def test_output_behind_an_answer() -> None:
    port = program("goes on")
    arrays_of(port.ask(0, case()))
    answer = failed(port.ask(1, case()))
    assert (answer.kind, r"read b'done.\n" in answer.message) == ("garbage", True), answer
    port.close()


def test_a_program_is_given_up_after_three_failures_of_an_operation() -> None:
    port = program("crashes at odd cases")
    kinds = [port.ask(number, case()) for number in range(8)]
    done = [isinstance(one, Answer) for one in kinds]
    assert done == [True, False, True, False, True, False, False, False]
    last = "3 earlier cases of encode got no answer"
    assert kinds[6] == kinds[7] == Failure("not asked", last)
    assert failed(port.ask(9, stream_case(Scheme(block_size=2), [[0, 1, 1]]))).kind == "crash"
    port.close()


def test_a_program_that_does_not_start_again(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.write_text(f"#!/bin/sh\nexec {sys.executable} {PORTS / 'program.py'} crashes\n")
    file.chmod(0o755)
    port = Process("mine", [str(file)])
    assert failed(port.ask(0, case())).kind == "crash"
    file.unlink()
    answer = failed(port.ask(1, case()))
    assert "it did not start again: " in answer.message
    assert "No such file" in answer.message
    port.close()


def test_close_ends_the_program() -> None:
    port = program("tells its process")
    (process,) = arrays_of(port.ask(0, case()))["packed"].tolist()
    port.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    port.close()

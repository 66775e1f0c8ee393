"""Programs that read questions from a pipe and write answers to another, in any language.

Libraries, models and Python code of others run so, too, in `worker`: the kit outlives what they do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from nsq_ref.conformance.operations import FAILED, Answer, Case, Failure, Port, same_arrays
from nsq_ref.conformance.ports.frames import (
    Frame,
    FrameError,
    StreamEndedError,
    read_frame,
    write_frame,
)
from nsq_ref.conformance.ports.messages import (
    answer_of,
    hello_frame,
    number_in,
    request_of,
    text_of,
)

MOST_FAILURES = 3  # of one operation: a port that hangs on every case would take hours
START_SECONDS = 120.0  # importing torch or compiling kernels takes long
ENDING_SECONDS = 2.0  # for a process to end that closed its output, and for its pipes to run dry
STDERR_BYTES = 1 << 14  # that are kept of either end
STDERR_LINES = 5  # that a message shows of either end
STDERR_CHARACTERS = 300  # of a line


class Process(Port):
    """A program that reads requests from its standard input and writes answers to its output.

    For one thread at a time: questions and answers share two pipes.

    The program, ``argv``, copies the first frame, ``header``, to its output when it is ready, for
    which it has ``start_timeout`` seconds; ValueError where it cannot be started. After a failure,
    such as no answer in ``timeout`` seconds, it is killed, together with the processes that it
    started, and started again for the next case. After three failures of an operation its cases
    are no longer asked.

    Examples
    --------
    >>> import sys
    >>> import numpy as np
    >>> from nsq_ref import Scheme
    >>> worker = [sys.executable, "-m", "nsq_ref.conformance.ports.worker"]
    >>> port = Process("nsq", [*worker, '{"encode": "nsq_ref:quantize"}'])
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> list(port.ask(0, case).arrays)
    ['packed', 'scale', 'norm']
    >>> port.close()
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        timeout: float = 30.0,
        header: Frame | None = None,
        start_timeout: float = START_SECONDS,
    ) -> None:
        self.name = name
        self._argv = list(argv)
        self._timeout = timeout
        self._start_timeout = start_timeout
        self._header = hello_frame() if header is None else header
        self._failures: Counter[str] = Counter()
        started = self._start()
        if isinstance(started, Failure):
            raise ValueError(f"{name} did not start: {started.message}")
        self._program: _Program | None = started

    def ask(self, number: int, case: Case) -> Answer | Failure:
        """Send a case and wait for its answer."""
        if self._failures[case.operation] >= MOST_FAILURES:
            return Failure(
                "not asked", f"{MOST_FAILURES} earlier cases of {case.operation} got no answer"
            )
        result = self._ask(request_of(number, case), number)
        if isinstance(result, Failure):
            self._failures[case.operation] += 1
            self._kill()
        return result

    def close(self) -> None:
        """End the program: close its input, and kill it if it does not end."""
        if self._program is not None:
            self._program.finish()
            self._program = None

    def _ask(self, request: Frame, number: int) -> Answer | Failure:
        if self._program is None:
            started = self._start()
            if isinstance(started, Failure):
                return Failure(started.kind, f"it did not start again: {started.message}")
            self._program = started
        frame = self._program.exchange(request, self._timeout)
        return frame if isinstance(frame, Failure) else answer_of(frame, number)

    def _start(self) -> _Program | Failure:
        try:
            program = _Program(self._argv)
        except OSError as error:
            return Failure("crash", f"{self._argv[0]} cannot be run: {error.strerror}")
        frame = program.exchange(self._header, self._start_timeout)
        if not isinstance(frame, Failure) and not same_arrays(frame, self._header):
            if number_in(frame, "status") == FAILED and "message" in frame:
                frame = Failure("crash", text_of(frame["message"]))
            else:
                frame = Failure(
                    "garbage",
                    f"its first frame has {sorted(frame)}; it should be a copy of the first frame "
                    "that it was given",
                )
        if isinstance(frame, Failure):
            program.kill()
            return frame
        return program

    def _kill(self) -> None:
        if self._program is not None:
            self._program.kill()
            self._program = None


class _Program:
    """A running program.

    Each pipe has a thread: a program may write before it has read all, or read nothing, or write
    to the one pipe until the other is read.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        # A session of its own, so that the processes that it starts can be killed with it.
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        self._words = b""
        self._given_up = False
        self._patience = ENDING_SECONDS
        self._writer = _thread(lambda: None)
        self._reader = _thread(lambda: None)
        self._listener = _thread(self._listen)

    def exchange(self, request: Frame, seconds: float) -> Frame | Failure:
        """Write a frame and read one."""
        read: list[Frame | FrameError | None] = []
        self._reader = _thread(lambda: read.append(self._read()))
        self._writer = _thread(lambda: self._write(request))
        deadline = time.monotonic() + seconds
        for thread in (self._reader, self._writer):
            while thread.is_alive() and time.monotonic() < deadline:
                thread.join(min(0.05, max(deadline - time.monotonic(), 0)))
                if self._process.poll() is not None:
                    # What it started may hold its pipes open; what it wrote can still be read.
                    self._kill_group()
                    self._wait_for(thread)
                    break
        frame = read[0] if read else None
        if isinstance(frame, FrameError) and not isinstance(frame, StreamEndedError):
            return Failure("garbage", f"what it wrote is no frame: {frame}{self._stderr()}")
        if frame is None or isinstance(frame, FrameError):
            if not read and self._process.poll() is None:
                return Failure("hang", f"no answer in {seconds:g} s{self._stderr()}")
            return Failure("crash", f"{self._ending()}{self._stderr()}")
        if self._writer.is_alive():
            return Failure(
                "hang", f"it answered, but did not read all of the case in {seconds:g} s"
            )
        return frame

    def finish(self) -> None:
        """Close the program's input, and kill it if it does not end by itself."""
        if not self._writer.is_alive():
            _close(self._process.stdin)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Kill the program and what it started."""
        self._given_up = True
        self._kill_group()
        self._process.kill()
        self._process.wait()
        for thread, pipe in (
            (self._writer, self._process.stdin),
            (self._reader, self._process.stdout),
            (self._listener, self._process.stderr),
        ):
            self._wait_for(thread)
            # A process that left the session may hold the pipe; then its thread closes it.
            if not thread.is_alive():
                _close(pipe)

    def _kill_group(self) -> None:
        # macOS says PermissionError where only the ended program itself is left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _wait_for(self, thread: threading.Thread) -> None:
        """Wait for a pipe of an ended program, but for all of them not for ever."""
        begun = time.monotonic()
        thread.join(self._patience)
        self._patience = max(self._patience - (time.monotonic() - begun), 0)

    def _read(self) -> Frame | FrameError | None:
        with self._pipe(self._process.stdout) as stdout:
            try:
                return read_frame(stdout)
            except FrameError as error:
                return error

    def _write(self, request: Frame) -> None:
        # A program that no longer reads is noticed by the answer that does not come.
        with contextlib.suppress(OSError), self._pipe(self._process.stdin) as stdin:
            write_frame(stdin, request)

    def _listen(self) -> None:
        with self._pipe(self._process.stderr) as stderr:
            while chunk := os.read(stderr.fileno(), STDERR_BYTES):
                words = self._words + chunk
                if len(words) > 2 * STDERR_BYTES:
                    words = words[:STDERR_BYTES] + words[-STDERR_BYTES:]
                self._words = words

    @contextlib.contextmanager
    def _pipe(self, pipe: IO[bytes] | None) -> Iterator[Any]:
        try:
            yield pipe
        finally:
            if self._given_up:
                _close(pipe)

    def _ending(self) -> str:
        try:
            code = self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its output without an answer"
        if code >= 0:
            return f"it ended with exit code {code}"
        with contextlib.suppress(ValueError):
            return f"it ended with signal {signal.Signals(-code).name}"
        return f"it ended with signal {-code}"

    def _stderr(self) -> str:
        """Return the ends of the standard error, of a program that is given up."""
        self._kill_group()
        self._wait_for(self._listener)
        text = self._words.decode("utf-8", "backslashreplace")
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        if not lines:
            return ""
        # Some languages say first why they end, and some last.
        if len(lines) > 2 * STDERR_LINES:
            lines = [*lines[:STDERR_LINES], "...", *lines[-STDERR_LINES:]]
        return "; stderr:\n" + "\n".join(line[:STDERR_CHARACTERS] for line in lines)


def _thread(work: Callable[[], None]) -> threading.Thread:
    # A daemon, as a pipe that is never closed must not keep the kit from ending.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        with contextlib.suppress(OSError):  # what could not be written to it
            pipe.close()

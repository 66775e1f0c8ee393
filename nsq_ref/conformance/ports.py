"""The ways to an implementation: Python callables, programs, libraries, models, files, a stream.

All but `Callables` speak the frames of `frames`; libraries, models and Python code of others run in
a process of their own, `worker`, so that the kit outlives whatever they do.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from nsq_ref.arrays import as_array
from nsq_ref.codec import PARTS
from nsq_ref.conformance.frames import (
    DTYPES,
    MOST_AXES,
    MOST_BYTES,
    Frame,
    FrameError,
    Frames,
    StreamEndedError,
    read_frame,
    scheme_of,
    write_frame,
)
from nsq_ref.conformance.operations import (
    DONE,
    FAILED,
    NOT_IMPLEMENTED,
    OPERATIONS,
    REFUSED,
    Answer,
    Case,
    Failure,
    Operation,
    Port,
    attention_options,
    request_of,
)
from nsq_ref.files import atomic
from nsq_ref.scheme import SPEC_VERSION, FloatName, Scheme

__all__ = [
    "Callables",
    "Folder",
    "Hello",
    "Process",
    "Stream",
    "hello_frame",
    "open_port",
    "read_hello",
    "reply_of",
    "write_files",
    "write_requests",
]

Array = npt.NDArray[Any]

PROTOCOL = 1
MOST_FAILURES = 3  # of one operation: a port that hangs on every case would take hours
START_SECONDS = 120.0  # importing torch or compiling kernels takes long
ENDING_SECONDS = 2.0  # for a process to end that closed its output, and for its pipes to run dry
STDERR_BYTES = 1 << 14  # that are kept of either end
STDERR_LINES = 5  # that a message shows of either end
STDERR_CHARACTERS = 300  # of a line
MESSAGE_BYTES = 2000
MOST_ODDITIES = 3  # that a message names

HEADER_FILE = "header.nsq"
_Kind = Literal["hang", "crash", "garbage", "out of bounds", "missing"]
# Not from this directory, where files may be named like modules that the worker imports.
_WORKER = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from nsq_ref.conformance.worker import main; sys.exit(main())"
)
_KINDS: tuple[_Kind, ...] = get_args(_Kind)
_RESULTS = {"decode": "x_hat", "attend": "output"}  # operations that return one array
_LIBRARY = re.compile(r".+\.(so(\.[0-9]+)*|dylib|dll)")  # libmine.so.1 is one, too


# --- the run ------------------------------------------------------------------------------------


class Hello(NamedTuple):
    """The parameters of a run, from which its cases can be made again."""

    seed: int
    schemes: list[tuple[str, Scheme]]
    operations: list[Operation]
    dtypes: list[FloatName]


def hello_frame(
    seed: int = 0,
    schemes: Iterable[tuple[str, Scheme]] = (),
    operations: Iterable[Operation] = OPERATIONS,
    dtypes: Iterable[FloatName] = get_args(FloatName),
) -> Frame:
    """Return the frame that begins a run; a port copies it to its output.

    Parameters
    ----------
    seed : int
    schemes : iterable of (str, Scheme)
        Names and schemes.
    operations : iterable of str
    dtypes : iterable of str
        Of the inputs.

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
    return {"hello": _text_array(text)}


def read_hello(stream: BinaryIO) -> Hello:
    """Read the frame that begins a run.

    Raises
    ------
    ValueError
        For anything else, and for a run of another version of the specification or the protocol.

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


def write_files(directory: str | Path, header: Frame, cases: Iterable[Case]) -> None:
    """Write the frames of a run as files: ``header.nsq`` and ``00000.nsq`` onwards, all or none.

    Raises
    ------
    OSError
        Where the directory cannot be made or written to.

    Examples
    --------
    >>> import tempfile
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write_files(directory, hello_frame(), [case, case])
    ...     print(sorted(os.listdir(directory)))
    ['00000.nsq', '00001.nsq', 'header.nsq']
    """
    folder = Path(directory)

    def files() -> Iterator[tuple[Path, bytes]]:
        yield folder / HEADER_FILE, _as_bytes(header)
        for number, case in enumerate(cases):
            yield folder / _file_name(number), _as_bytes(request_of(number, case))

    atomic.write(files(), make_folders=True)


def _as_bytes(frame: Frame) -> bytes:
    stream = io.BytesIO()
    write_frame(stream, frame)
    return stream.getvalue()


def reply_of(number: int, result: Answer | Failure) -> Frame:
    """Return the frame that answers a case.

    Examples
    --------
    >>> list(reply_of(3, Answer(REFUSED, {}, "x[0, 1] is nan")))
    ['case', 'status', 'message']
    """
    if isinstance(result, Failure):
        status, arrays = FAILED, {"kind": _text_array(result.kind)}
    else:
        status, arrays = result.status, dict(result.arrays)
    frame: Frame = {
        "case": np.array([number], np.int32),
        "status": np.array([status], np.int32),
    }
    if result.message:
        frame["message"] = _text_array(result.message)
    return frame | arrays


def _answer_of(frame: Frame, number: int) -> Answer | Failure:
    """Return what a frame answers to a case; the inverse of `reply_of`."""
    answered, status = _number(frame), _number(frame, "status")
    if answered is None or status is None:
        return Failure("garbage", _no_answer(frame))
    if answered != number:
        return Failure("garbage", f"case {number} was asked, and case {answered} answered")
    if status not in range(FAILED + 1):
        return Failure("garbage", f"status {status} is none; it is 0 to {FAILED}")
    message = _text(frame["message"]) if "message" in frame else ""
    if status == FAILED:
        named = _text(frame["kind"]) if "kind" in frame else ""
        kind: _Kind = next((kind for kind in _KINDS if kind == named), "garbage")
        return Failure(kind, message or "the port says that it failed, and not why")
    arrays = {name: array for name, array in frame.items() if name not in _RESERVED}
    return Answer(status, arrays, message)


_RESERVED = {"case", "status", "message", "kind"}


def _no_answer(frame: Frame) -> str:
    found = {name: f"{array.dtype} {list(array.shape)}" for name, array in frame.items()}
    return f"an answer has case and status, int32 [1]; this one has {found}"


def _number(frame: Frame, name: str = "case") -> int | None:
    array = frame.get(name)
    well = array is not None and array.dtype == np.int32 and array.shape == (1,)
    return int(array[0]) if array is not None and well else None


def _text_array(text: str) -> Array:
    return np.frombuffer(text.encode("utf-8", "backslashreplace"), np.uint8)


def _text(array: Array) -> str:
    return array.tobytes()[:MESSAGE_BYTES].decode("utf-8", "backslashreplace")


def _file_name(number: int) -> str:
    return f"{number:05d}.nsq"


# --- Python callables ---------------------------------------------------------------------------


class Callables:
    """Python functions in this process.

    Threads may share one if they may share the functions.

    Parameters
    ----------
    name : str
    encode : callable, optional
        ``encode(x, scheme)`` returns the parts: a mapping of names to arrays, a `Quantized`, or any
        object with attributes of these names.
    decode : callable, optional
        ``decode(parts, scheme, shape)`` returns ``x_hat``.
    attend : callable, optional
        ``attend(query, keys, values, key_scheme, value_scheme, *, scale, causal, softcap,
        sliding_window)`` returns the output; keys and values are mappings of the parts and
        ``"shape"``.
    stream : callable, optional
        ``stream(x, scheme, steps, row)`` returns, as ``encode`` does, the parts of the sealed
        blocks, the sinks and the ``tail`` of one row.

    Notes
    -----
    Arrays may be NumPy's or whatever speaks DLPack. ValueError and OverflowError refuse a case,
    NotImplementedError leaves it out; other exceptions are not caught.

    Examples
    --------
    >>> from nsq_ref import quantize
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> answer = Callables("nsq", encode=quantize).ask(0, case)
    >>> answer.status == DONE, list(answer.arrays)
    (True, ['packed', 'scale', 'norm'])
    """

    def __init__(
        self,
        name: str,
        encode: Callable[..., Any] | None = None,
        decode: Callable[..., Any] | None = None,
        attend: Callable[..., Any] | None = None,
        stream: Callable[..., Any] | None = None,
    ) -> None:
        self.name = name
        self._functions = {"encode": encode, "decode": decode, "attend": attend, "stream": stream}

    def ask(self, number: int, case: Case) -> Answer | Failure:
        """Call the function of the case's operation."""
        function = self._functions[case.operation]
        if function is None:
            return Answer(NOT_IMPLEMENTED, {}, f"no function for {case.operation} was given")
        given = {name: np.array(array) for name, array in case.inputs.items()}
        positional, named = _arguments(case, given)
        try:
            result = function(*positional, **named)
        except (ValueError, OverflowError) as error:
            return Answer(REFUSED, {}, f"{error} ({_origin(error)})")
        except NotImplementedError as error:
            return Answer(NOT_IMPLEMENTED, {}, str(error))
        for name, array in given.items():
            if array.tobytes() != case.inputs[name].tobytes():
                return Failure("out of bounds", f"{name} was written to; it is the caller's")
        return _answer(result, case)

    def close(self) -> None:
        """Do nothing: there is nothing to let go of."""


def _origin(error: Exception) -> str:
    """Say where an error was raised: one that nobody meant reads as a refusal, too."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{type(error).__name__}, {Path(frame.f_code.co_filename).name} line {line}"


def _arguments(case: Case, given: Mapping[str, Array]) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and the named arguments of a function of the case's operation."""

    def parts(prefix: str) -> dict[str, Any]:
        stored: dict[str, Any] = {
            name.removeprefix(prefix): array
            for name, array in given.items()
            if name.startswith(prefix)
        }
        return stored | {"shape": tuple(stored["shape"].tolist())}

    if case.operation == "encode":
        return [given["x"], case.scheme], {}
    if case.operation == "decode":
        stored = parts("")
        shape = stored.pop("shape")
        return [stored, case.scheme, shape], {}
    if case.operation == "stream":
        return [given["x"], case.scheme, given["steps"], given["row"].item()], {}
    schemes = case.scheme, scheme_of(given["value_scheme"])
    return [given["query"], parts("keys."), parts("values."), *schemes], attention_options(given)


def _answer(result: Any, case: Case) -> Answer | Failure:
    """Turn what a function returned into an answer."""
    operation = case.operation
    if operation in _RESULTS:
        named: Mapping[Any, Any] = {_RESULTS[operation]: result}
        names: tuple[str, ...] = (_RESULTS[operation],)
    else:
        names = PARTS if operation == "encode" else (*PARTS, "tail")
        named = (
            result
            if isinstance(result, Mapping)
            else {name: getattr(result, name) for name in names if hasattr(result, name)}
        )
        if not named:
            return Failure(
                "garbage",
                f"{operation} returned {type(result).__name__}; return a mapping of the names of "
                "parts to arrays",
            )
    arrays = {}
    for name, value in named.items():
        if name not in names:
            return Failure(
                "garbage",
                f"{operation} returned a part {name!r:.40}; the parts are {', '.join(names)}",
            )
        if value is None and operation not in _RESULTS:
            continue
        try:
            array = as_array(name, value)
        except TypeError as error:
            return Failure("garbage", str(error))
        got = f"{name} is {array.dtype} {list(array.shape)}"
        if array.dtype not in DTYPES or array.ndim > MOST_AXES:
            return Failure("garbage", f"{got}; {_expected(name, case)}")
        if array.nbytes > MOST_BYTES:
            return Failure("garbage", f"{got}, more than the {MOST_BYTES} bytes of any answer")
        arrays[name] = np.array(array)
    return Answer(DONE, arrays)


def _expected(name: str, case: Case) -> str:
    """Say of what dtype a returned array should be."""
    if name in _RESULTS.values():
        return "it should be float32"
    x = case.inputs["x"]
    layout = case.scheme.layout(x.shape[-2], x.shape[-1], x.dtype)
    if name == "tail":
        return f"it should be {x.dtype}, as x is"
    return f"the scheme stores {layout[name].dtype if name in layout else 'no such part'}"


# --- programs -----------------------------------------------------------------------------------


class Process:
    """A program that reads requests from its standard input and writes answers to its output.

    For one thread at a time: questions and answers share two pipes.

    Parameters
    ----------
    name : str
    argv : sequence of str
        The program and its arguments.
    timeout : float
        Seconds for an answer.
    header : frame, optional
        The first frame, `hello_frame`, which the program copies to its output when it is ready.
    start_timeout : float
        Seconds until it does.

    Raises
    ------
    ValueError
        Where the program cannot be started.

    Notes
    -----
    After a failure the program is killed, together with the processes that it started, and started
    again for the next case. After three failures of an operation its cases are no longer asked.

    Examples
    --------
    >>> worker = [sys.executable, "-m", "nsq_ref.conformance.worker"]
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
                "missing",
                f"not asked: {MOST_FAILURES} earlier cases of {case.operation} failed",
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
        return frame if isinstance(frame, Failure) else _answer_of(frame, number)

    def _start(self) -> _Program | Failure:
        try:
            program = _Program(self._argv)
        except OSError as error:
            return Failure("crash", f"{self._argv[0]} cannot be run: {error.strerror}")
        frame = program.exchange(self._header, self._start_timeout)
        if not isinstance(frame, Failure) and not _same(frame, self._header):
            if _number(frame, "status") == FAILED and "message" in frame:
                frame = Failure("crash", _text(frame["message"]))
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
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
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


def _same(one: Frame, other: Frame) -> bool:
    return list(one) == list(other) and all(
        (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape)
        and one[name].tobytes() == other[name].tobytes()
        for name in one
    )


# --- files and streams --------------------------------------------------------------------------


class Folder:
    """Answers that lie in a directory, each as a file with the name of its request.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    name : str
    directory : str or path

    Raises
    ------
    ValueError
        Where there is no such directory.

    Examples
    --------
    >>> import tempfile
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     Folder("mine", directory).ask(7, case)
    Failure(kind='missing', message='there is no 00007.nsq')
    """

    def __init__(self, name: str, directory: str | Path) -> None:
        self.name = name
        self._directory = Path(directory)
        if not self._directory.is_dir():
            raise ValueError(f"there is no directory {directory}")

    def ask(self, number: int, case: Case) -> Answer | Failure:
        """Read the answer to a case."""
        path = self._directory / _file_name(number)
        if path.exists() and not path.is_file():  # a named pipe would be waited for
            return Failure("garbage", f"{path.name} cannot be read: it is no file")
        try:
            with path.open("rb") as file:
                frame = read_frame(file)
                behind = file.read(1)
        except FileNotFoundError:
            return Failure("missing", f"there is no {path.name}")
        except (FrameError, OSError) as error:
            return Failure("garbage", f"{path.name} cannot be read: {error}")
        if frame is None or behind:
            reason = "is empty" if frame is None else "goes on behind its first frame"
            return Failure("garbage", f"{path.name} {reason}; it should hold one frame")
        return _answer_of(frame, number)

    def beyond(self, cases: int) -> list[str]:
        """Return the names of answers to no case of a run of so many.

        Examples
        --------
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     (Path(directory) / "00007.nsq").touch()
        ...     Folder("mine", directory).beyond(7)
        ['00007.nsq']
        """
        numbers = {path.name: path.stem for path in self._directory.glob("*.nsq")}
        return sorted(name for name, stem in numbers.items()
                      if re.fullmatch("[0-9]{5,9}", stem) and int(stem) >= cases)  # fmt: skip

    def close(self) -> None:
        """Do nothing: files are open only while they are read."""


class Stream:
    """Answers that come one after the other, in the order of the cases.

    Whatever else comes is a failure of the case in whose place it comes, or behind whose answer:
    another answer to a case, one to a case that was not asked or whose turn is over, and what is no
    frame. The cases that follow are judged as if it were not there.

    For one thread: it is read from its beginning to its end.

    Parameters
    ----------
    name : str
    stream : binary file
        Behind the header, which `read_hello` reads.

    Examples
    --------
    >>> import io
    >>> stream = io.BytesIO()
    >>> write_frame(stream, reply_of(0, Answer(NOT_IMPLEMENTED, {})))
    >>> _ = stream.seek(0)
    >>> port = Stream("mine", stream)
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> port.ask(0, case).status == NOT_IMPLEMENTED
    True
    >>> port.ask(1, case)
    Failure(kind='missing', message='the stream ended after case 0')
    """

    def __init__(self, name: str, stream: BinaryIO) -> None:
        self.name = name
        self.cases: int | None = None  # of the run, where all of them are asked
        self._frames = Frames(stream)
        self._ahead: Frame | None = None  # the next answer
        self._coming = -1  # the case that it answers
        self._last = -1  # the case of the answer before it
        self._passed: set[int] = set()  # all cases of earlier answers
        self._odd: list[str] = []  # what came between these two
        self._ended = ""  # why there is no next answer

    def ask(self, number: int, case: Case) -> Answer | Failure:
        """Return the answer to a case, which is missing if the stream goes on with a later one."""
        frame = self._next()
        before = self._oddity() if self._last < 0 else None
        while frame is not None and self._coming < number:  # a case that nobody asks about
            frame, before = self._pass(), None
        if frame is None or self._coming > number:
            gone_on = f"{self._place()} the stream goes on with case {self._coming}"
            return before or self._oddity() or Failure("missing", self._ended or gone_on)
        answer = _answer_of(frame, number)
        behind = self._pass()
        # What came in place of the next answer is told of the case that has none.
        if (behind is None and self.cases in (None, number + 1)) or self._coming == number + 1:
            return before or self._oddity() or answer
        return before or answer

    def close(self) -> None:
        """Do nothing: the stream is the caller's."""

    def _place(self) -> str:
        return "before any answer" if self._last < 0 else f"after case {self._last}"

    def _oddity(self) -> Failure | None:
        odd, self._odd = self._odd, []
        if not odd:
            return None
        more = [f"and {len(odd) - MOST_ODDITIES} more"] if len(odd) > MOST_ODDITIES else []
        came = "; ".join([*odd[:MOST_ODDITIES], *more])
        return Failure("garbage", f"{self._place()} came {came}")

    def _pass(self) -> Frame | None:
        """Let go of the next answer, and return the one that follows."""
        self._passed.add(self._coming)
        self._last, self._ahead, self._odd = self._coming, None, []
        return self._next()

    def _next(self) -> Frame | None:
        """Return the next answer to a case whose turn is not over."""
        while self._ahead is None and not self._ended:
            try:
                frame = self._frames.read_frame()
            except FrameError as error:
                self._skip(error)
                continue
            if frame is None:
                self._ended = f"the stream ended {self._place()}"
                continue
            number = _number(frame)
            if number is None:
                self._odd.append(_no_answer(frame))
            elif number < 0 or (self.cases is not None and number >= self.cases):
                self._odd.append(f"an answer to case {number}, which was not asked")
            elif number in self._passed:
                self._odd.append(f"another answer to case {number}")
            elif number < self._last:
                self._odd.append(f"the answer to case {number}, out of order")
            else:
                self._ahead, self._coming = frame, number
        return self._ahead

    def _skip(self, error: FrameError) -> None:
        """Go on to the next frame behind what is none."""
        cut = isinstance(error, StreamEndedError)
        if self._frames.skip():
            self._odd.append(f"what is no frame: {error}")
        elif cut and self.cases != self._last + 1:
            self._ended = f"the stream ended {self._place()} in the midst of an answer ({error})"
        else:
            self._odd.append(f"what is no frame: {error}")
            self._ended = f"{self._place()} no other frame came"


# --- targets ------------------------------------------------------------------------------------


def open_port(
    encode: str | None = None,
    decode: str | None = None,
    attend: str | None = None,
    stream: str | None = None,
    custom_ops: str | None = None,
    timeout: float = 30.0,
    header: Frame | None = None,
) -> Port:
    """Start what is to be checked, in a process of its own.

    Parameters
    ----------
    encode, decode, attend, stream : str, optional
        What does each of the operations: a Python function (``package.module:function`` or
        ``path/to/file.py:function``, see `Callables`), a shared library that implements
        ``nsq.h`` (``.so``, ``.dylib``, ``.dll``), or an ONNX model. A library given as
        ``encode`` does also those of the others that are left out. A program, which can only be
        given as ``encode`` and alone, does all of them.
    custom_ops : str, optional
        A library of operators for ONNX Runtime.
    timeout : float
        Seconds for an answer.
    header : frame, optional
        `hello_frame` of the run.

    Returns
    -------
    Port

    Raises
    ------
    ValueError
        For what does not exist, cannot be loaded, or makes no sense together.

    Examples
    --------
    >>> port = open_port("nsq_ref:quantize")
    >>> port.name
    'nsq_ref:quantize'
    >>> port.close()
    """
    given = zip(OPERATIONS, (encode, decode, attend, stream), strict=True)
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
        if list(targets) != ["encode"]:
            raise ValueError(
                "a program answers all operations, so that it is given first and alone; got "
                + ", ".join(f"{operation}={target}" for operation, target in targets.items())
            )
        argv = [os.path.abspath(targets["encode"])]  # links kept: some programs go by their name
    else:
        argv = [sys.executable, "-c", _WORKER]
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

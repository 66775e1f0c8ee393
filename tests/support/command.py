"""The command ``nsq``: in this process, which is quick, or in one of its own, as users run it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from nsq_ref import cli

NSQ = Path(sys.executable).with_name("nsq")
ROOT = Path(__file__).parents[2]
PORTS_FIND_TESTS = {"PYTHONPATH": str(ROOT)}
Done = subprocess.CompletedProcess[str]


def nsq(*arguments: object, cwd: Path = ROOT, code: int = 0, stdin: bytes = b"") -> Done:
    """Run the command in this process, whose folder and streams are those of the command."""
    command = ["nsq", *map(str, arguments)]
    streams = [io.TextIOWrapper(io.BytesIO(data), "utf-8") for data in (stdin, b"", b"")]
    before = Path.cwd()
    os.chdir(cwd)
    try:
        with (
            mock.patch.multiple(sys, argv=command, **dict(zip(STREAMS, streams, strict=True))),
            mock.patch.dict(os.environ, PORTS_FIND_TESTS),
        ):
            cli.main()
        ended: object = 0
    except SystemExit as end:
        ended = end.code
    finally:
        os.chdir(before)
    return _done(command, ended, *map(_text, streams[1:]), code)


def process(*arguments: object, cwd: Path = ROOT, code: int = 0) -> Done:
    """Run the command in a process of its own."""
    command = [str(NSQ), *map(str, arguments)]
    environment = {**os.environ, **PORTS_FIND_TESTS}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    return _done(command, done.returncode, done.stdout, done.stderr, code)


def said(*arguments: object, code: int = 0, cwd: Path = ROOT) -> str:
    """Run the command in this process; return what it prints, on stderr where it is used badly."""
    done = nsq(*arguments, code=code, cwd=cwd)
    return done.stderr if code == 2 else done.stdout


def refused(*arguments: object, cwd: Path) -> str:
    """Run what must fail, and leave nothing behind; return the one line on stderr."""
    before = {path: path.read_bytes() for path in cwd.rglob("*") if path.is_file()}
    done = nsq(*arguments, cwd=cwd, code=2)
    assert {path: path.read_bytes() for path in cwd.rglob("*") if path.is_file()} == before
    assert done.stdout == ""
    assert done.stderr.startswith("nsq: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


STREAMS = ("stdin", "stdout", "stderr")


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode()  # type: ignore[attr-defined]


def _done(command: list[str], ended: object, stdout: str, stderr: str, code: int) -> Done:
    assert ended == code, stdout[-3000:] + stderr[-3000:]
    return subprocess.CompletedProcess(command, code, stdout, stderr)

"""Answers that were given already: ``nsq verify`` of a pipe, ``nsq check --dir`` of files."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nsq_ref import Scheme
from nsq_ref.conformance.ports import hello_frame
from nsq_ref.conformance.ports.frames import Frame, read_frame, write_frame
from tests.support.cases import cases_made_once
from tests.support.command import NSQ, ROOT, nsq, said

__all__ = ["cases_made_once"]  # the fixture

HALF = """#!{python}
import sys
import nsq_ref as nsq
from nsq_ref.conformance.ports.frames import read_frame, scheme_of, write_frame
import numpy as np
requests, answers = sys.stdin.buffer, sys.stdout.buffer
write_frame(answers, read_frame(requests))
while (request := read_frame(requests)) is not None:
    reply = {{"case": request["case"], "status": np.int32([0])}}
    scheme = scheme_of(request["scheme"])
    try:
        parts = dict(nsq.quantize(request["x"], scheme).parts)
        if scheme.bits == 3:  # wrong
            parts["packed"] = parts["packed"] ^ 1
        write_frame(answers, {{**reply, **parts}})
    except ValueError:
        write_frame(answers, {{**reply, "status": np.int32([1])}})
"""
ABOUT_TWO = ("--scheme", "nsep3", "--scheme", "pchan4", "--operation", "encode")


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> list[Frame]:
    """What a program answers to questions about two schemes; it is wrong in the first."""
    folder = tmp_path_factory.mktemp("half")
    program = folder / "half"
    program.write_text(HALF.format(python=sys.executable))
    program.chmod(0o755)
    line = f'"{NSQ}" gen {shlex.join(ABOUT_TWO)} | "{program}"'
    done = subprocess.run(
        line, shell=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        check=True,
    )  # fmt: skip
    stream, found = io.BytesIO(done.stdout), []
    while (frame := read_frame(stream)) is not None:
        found.append(frame)
    return found


def bytes_of(frames: list[Frame]) -> bytes:
    stream = io.BytesIO()
    for frame in frames:
        write_frame(stream, frame)
    return stream.getvalue()


def verified(data: bytes, *options: str, code: int = 0) -> str:
    done = nsq("verify", *options, code=code, stdin=data)
    return done.stderr if code == 2 else done.stdout


def judged(how: str, folder: Path, frames: list[Frame], *options: str, code: int = 0) -> str:
    """Judge answers in a pipe, or in files."""
    if how == "pipe":
        return verified(bytes_of(frames), *options, code=code)
    for number, frame in enumerate(frames, -1):
        name = "header.nsq" if number < 0 else f"{number:05d}.nsq"
        (folder / name).write_bytes(bytes_of([frame]))
    return said("check", "--dir", folder, *options, code=code)


@pytest.mark.parametrize("how", ["pipe", "files"])
def test_the_scheme_that_is_asked_for_is_judged(tmp_path, frames, how) -> None:
    """Whichever it is, by the answers to its own questions, and no other."""
    assert "CONFORMS SO FAR to pchan4: " in judged(how, tmp_path, frames, "--scheme", "pchan4")
    first = judged(how, tmp_path, frames, "--scheme", "nsep3", code=1)
    assert "DOES NOT CONFORM to nsep3" in first
    assert "without an answer" not in first
    both = judged(how, tmp_path, frames, code=1)
    assert "DOES NOT CONFORM to nsep3\n" in both
    assert both == judged(how, tmp_path, frames, "--scheme", "pchan4", "--scheme", "nsep3", code=1)
    for options in (["nsep8"], ["pchan4", "--scheme", "nsep8"], ["nsep+pchan4"], [""]):
        text = judged(how, tmp_path, frames, "--scheme", *options, code=2)
        assert text.startswith(
            f"nsq: --scheme {options[-1]}: the questions are about nsep3, pchan4"
        )


@pytest.mark.parametrize("how", ["pipe", "files"])
def test_one_case_of_answers_is_found_by_its_number(tmp_path, frames, how) -> None:
    """In the second scheme, too; a case that is not in all of them is asked of one."""
    one = ("--case", "encode/ordinary/3")
    assert "RIGHT in this one case: pchan4, encode/ordinary/3." in judged(
        how, tmp_path, frames, "--scheme", "pchan4", *one
    )
    assert "WRONG in this one case: nsep3, encode/ordinary/3." in judged(
        how, tmp_path, frames, *one, code=1
    )
    absent = judged(how, tmp_path, frames, "--case", "encode/absent/0", code=2)
    assert "there is no case 'encode/absent/0' of nsep3" in absent
    other = judged(how, tmp_path, frames, "--case", "decode/ordinary/0", code=2)
    assert "case decode/ordinary/0 of nsep3 is not among what is asked" in other


@pytest.mark.parametrize("how", ["pipe", "files"])
def test_the_command_of_a_case_judges_it_alike(tmp_path, frames, how) -> None:
    """With the same latitudes and the same questions."""
    options = ("--allow", "norm-ulp=1", "--allow", "tie-ulp=2", "--partial")
    text = judged(how, tmp_path, frames, *options, code=1)
    (command, *_) = (line.strip() for line in text.splitlines() if "--case" in line)
    questions, _, verdict = command.rpartition(" | ")
    if how == "pipe":
        assert questions == f"nsq gen {shlex.join(ABOUT_TWO)} | YOUR PROGRAM"
    words = shlex.split(verdict)
    assert words[-9:-1] == [*options, "--scheme", "nsep3", "--case"]


@pytest.mark.parametrize(
    ("edit", "frame", "says"),
    [
        (lambda f: f[:-40] + f[-41:], -41, "garbage: encode/.* came another answer to case {}"),
        (lambda f: [*f, f[-1]], -1, "garbage: encode/.* came another answer to case {}"),
        (lambda f: f[:-40] + f[-39:], -39, "missing: encode/.* the stream goes on with case {}"),
        (lambda f: [*f[:-40], f[-39], f[-40], *f[-38:]], -40, "answer to case {}, out of order"),
        (lambda f: f[:-1], -2, "missing: encode/.* the stream ended after case {}"),
    ],
)
def test_what_breaks_a_stream_is_told_where_it_does(frames, edit, frame, says) -> None:
    """Every other case is judged."""
    text = verified(bytes_of(edit(frames)), "--scheme", "pchan4", code=1)
    case = frames[frame]["case"].item()
    assert re.search(says.format(case), " ".join(text.split())), text
    (asked,) = re.findall(r"Of (\d+) cases: (\d) without an answer", text)
    assert 1 <= int(asked[1]) <= 2
    (answered,) = re.findall(r"Answered: encode (\d+) cases", text)
    assert int(answered) == int(asked[0]) - int(asked[1])


@pytest.mark.parametrize("behind", [b"done.\n", b"NSQ1", b"NSQ1\1\0\0\0"])
def test_bytes_behind_the_last_answer_are_named(frames, behind) -> None:
    """They fail the case behind whose answer they come, also where all else is right."""
    text = verified(bytes_of(frames) + behind, "--scheme", "pchan4", code=1)
    assert "1 without an answer" in text
    last = frames[-1]["case"].item()
    assert f"after case {last} came what is no frame" in " ".join(text.split())


def test_a_cut_last_answer_is_named(frames) -> None:
    text = verified(bytes_of(frames)[:-1], "--scheme", "pchan4", code=1)
    assert f"after case {frames[-2]['case'].item()} in the midst of an answer" in text


@pytest.mark.parametrize(
    "options",
    [
        ("--set", "bits=3"), ("--all",), ("--seed", "0"), ("--dtype", "float32"),
        ("--operation", "encode"), ("--timeout", "30"), ("--custom-ops", "ops.so"),
        ("--decode", "nsq_ref:dequantize"), ("--attend", "a:b"), ("--stream", "a:b"),
    ],
)  # fmt: skip
def test_what_has_no_effect_on_answers_is_refused(tmp_path, frames, options) -> None:
    text = judged("files", tmp_path, frames, *options, code=2)
    assert text.startswith(f"nsq: {options[0]} has no effect with --dir")
    assert verified(bytes_of(frames), *options, code=2)  # there is no such option


def test_what_a_file_says_does_not_reach_the_terminal(tmp_path) -> None:
    """Names in a header are escaped."""
    frame = hello_frame(0, [("\x1b[31mred", Scheme())])
    text = verified(bytes_of([frame]), "--scheme", "pchan4", code=2)
    assert text == "nsq: --scheme pchan4: the questions are about \\x1b[31mred\n"

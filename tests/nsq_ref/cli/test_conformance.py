"""``nsq check`` and its options; ``gen`` and ``verify`` in real pipes, and ``vectors``."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nsq_ref.conformance.ports.frames import read_frame, write_frame
from tests.support.cases import cases_made_once
from tests.support.command import NSQ, ROOT, process, said
from tests.support.compilers import compile_library

__all__ = ["cases_made_once"]  # the fixture

C_EXAMPLE = ROOT / "docs" / "examples" / "nsq_port.c"
RIGHT = "tests/ports/functions.py"

WRONG = '''
import numpy as np
import nsq_ref as nsq

def away(x, scheme):
    """Q1 with ties away from zero."""
    q = nsq.quantize(x, scheme)
    parts = dict(q.parts)
    with np.errstate(all="ignore"):
        quotient = x.astype(np.float32) / np.where(q.scale == 0, np.inf, q.scale).astype(np.float32)
    codes = np.clip(np.copysign(np.floor(abs(quotient) + np.float64(0.5)), quotient), -7, 7)
    parts["packed"] = nsq.packing.pack(codes.astype(int), scheme)
    return parts

def half(x, scheme):
    if x.shape[-1] % 2:
        raise NotImplementedError("odd head_dim")
    return nsq.quantize(x, scheme)
'''

PROGRAM = """#!{python}
import sys
import nsq_ref as nsq
from nsq_ref.conformance.ports.frames import read_frame, scheme_of, write_frame
import numpy as np
requests, answers = sys.stdin.buffer, sys.stdout.buffer
write_frame(answers, read_frame(requests))
while (request := read_frame(requests)) is not None:
    reply = {{"case": request["case"], "status": np.int32([2])}}
    if request["operation"][0] == 0:
        try:
            parts = nsq.quantize(request["x"], scheme_of(request["scheme"])).parts
            reply = {{**reply, "status": np.int32([0]), **parts}}
        except ValueError:
            reply["status"] = np.int32([1])
    if {ends_at} in request["case"]:
        sys.exit(5)
    write_frame(answers, reply)
"""


def pipe(
    folder: Path, program: Path, *options: str, verify: tuple[str, ...] = ()
) -> tuple[int, str]:
    """nsq gen | program | nsq verify, as a shell does it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = f'"{NSQ}" gen {" ".join(options)} | "{program}" | "{NSQ}" verify {" ".join(verify)}'
    done = subprocess.run(
        line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def wrong(tmp_path) -> Path:
    path = tmp_path / "wrong.py"
    path.write_text(WRONG.replace("nsq.packing", "nsq_ref.packing").replace(
        "import nsq_ref as nsq", "import nsq_ref as nsq, nsq_ref, nsq_ref.packing"))  # fmt: skip
    return path


def program_at(path: Path, ends_at: int = -1) -> Path:
    path.write_text(PROGRAM.format(python=sys.executable, ends_at=ends_at))
    path.chmod(0o755)
    return path


def test_right_functions_conform() -> None:
    """All operations of a cache's scheme."""
    done = process(
        "check", f"{RIGHT}:encode", "--decode", f"{RIGHT}:decode", "--attend", f"{RIGHT}:attend",
        "--stream", f"{RIGHT}:stream", "--scheme", "streaming4",
    )  # fmt: skip
    assert "CONFORMS to streaming4" in done.stdout
    for operation in ("encode", "decode", "attend", "stream"):
        assert f"{operation} " in done.stdout


def test_every_named_scheme_of_a_right_port_conforms() -> None:
    text = said("check", "nsq_ref:quantize", "--all")
    assert "CONFORMS SO FAR to all 40 schemes" in text


def test_wrong_function_is_told_the_rule(wrong) -> None:
    """Q1: exit code 1, the rule first, and a command that shows just one case."""
    text = said("check", f"{wrong}:away", "--scheme", "pchan4", "--dtype", "float32", code=1)
    rules = [line for line in text.splitlines() if line[:2] in ("Q1", "S1", "N1", "P1", "D1")]
    assert rules[0].startswith("Q1")
    assert "away from zero" in text
    command = next(line.split() for line in text.splitlines() if "--case" in line)
    assert command[:2] == ["nsq", "check"]
    one = said(*command[1:], code=1)
    assert "Q1" in one
    assert "0x" in one


def test_json_and_junit(wrong, tmp_path) -> None:
    """Q1 in both."""
    text = said(
        "check", f"{wrong}:away", "--scheme", "pchan4", "--dtype", "float32", "--json", "--junit",
        tmp_path / "report.xml", code=1,
    )  # fmt: skip
    report = json.loads(text)
    assert report["conforms"] is False
    assert report["schemes"][0]["diagnoses"][0]["rule"] == "Q1"
    suites = ElementTree.parse(tmp_path / "report.xml").getroot()
    assert suites.findall(".//failure")
    assert len(suites.findall(".//testcase")) > len(suites.findall(".//failure"))


def test_c_example_conforms(tmp_path) -> None:
    """Within seconds, with no latitude: N1 S3 Q1 P1 M1 D1."""
    library = tmp_path / "libport.so"
    compile_library(C_EXAMPLE, library)
    text = said("check", library, "--feedback", library)
    assert "CONFORMS SO FAR to nsep+pchan4: encode" in text
    assert re.search(r"decode \d+, feedback \d+\.\nNot implemented: attend\.\n", text)


def test_report_in_the_porting_page_is_real(tmp_path) -> None:
    """Q1: the page shows what the command prints."""
    source = tmp_path / "nsq_port.c"
    source.write_text(C_EXAMPLE.read_text().replace("rintf(", "roundf("))
    compile_library(source, tmp_path / "libport.so")
    printed = said("check", "./libport.so", code=1, cwd=tmp_path)
    page = (ROOT / "docs" / "porting.md").read_text()
    shown = page.partition("```text\n$ nsq check ./libport.so\n")[2].partition("```")[0]
    assert printed == "nsq check ./libport.so\n" + shown


def test_what_is_not_implemented_fails_unless_partial(wrong) -> None:
    arguments = ("check", f"{wrong}:half", "--scheme", "naive4")
    text = said(*arguments, code=1)
    assert "not implemented" in text.lower()
    assert "odd head_dim" in text
    assert "not implemented" in said(*arguments, "--partial").lower()


def test_program_is_run_and_asked(tmp_path) -> None:
    """Encode only: the operations that it does not implement are named."""
    text = said("check", program_at(tmp_path / "mine"), "--scheme", "nsep3")
    assert "CONFORMS SO FAR to nsep3" in text
    assert "decode" in text


def test_pipe(tmp_path) -> None:
    program = program_at(tmp_path / "mine")
    code, text = pipe(tmp_path, program, "--seed 7 --scheme nsep3")
    assert code == 0, text
    assert "CONFORMS SO FAR to nsep3" in text
    ends = program_at(tmp_path / "ends", ends_at=40)
    code, text = pipe(tmp_path, ends, "--seed 7 --scheme nsep3")
    assert code == 1, text
    assert "after case 39" in text


def test_pipe_without_frames(tmp_path) -> None:
    code, text = pipe(tmp_path, Path("/bin/cat"), "--scheme nsep3")  # the questions themselves
    assert code == 1, text
    assert "garbage" in text
    empty = tmp_path / "empty"
    empty.write_text("#!/bin/sh\nexit 0\n")
    empty.chmod(0o755)
    code, text = pipe(tmp_path, empty, "--scheme nsep3")
    assert code == 2, text
    assert text.count("\n") == 1


def test_files(tmp_path) -> None:
    """The answers lie in a folder beside a copy of the header; one is missing."""
    questions, answers = tmp_path / "questions", tmp_path / "answers"
    said("gen", "--scheme", "nsep3", "--operation", "encode", "--dir", questions)
    answers.mkdir()
    program = program_at(tmp_path / "mine")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    header = (questions / "header.nsq").read_bytes()
    names = sorted(path.name for path in questions.iterdir() if path.name != "header.nsq")
    stream = header + b"".join((questions / name).read_bytes() for name in names)
    done = subprocess.run([program], input=stream, env=environment, capture_output=True, check=True)
    replies = io.BytesIO(done.stdout)
    for name in ["header.nsq", *names]:
        frame = read_frame(replies)
        assert frame is not None
        with (answers / name).open("wb") as file:
            write_frame(file, frame)
    assert "CONFORMS SO FAR to nsep3" in said("check", "--dir", answers)
    shutil.copy(answers / names[3], answers / "01000.nsq")
    shutil.copy(answers / names[3], answers / "99999.nsq")
    text = said("check", "--dir", answers)
    assert "Note: not judged: 01000.nsq, which answers no case; there are 2" in text
    (answers / names[3]).unlink()
    assert "missing" in said("check", "--dir", answers, code=1)
    (answers / "header.nsq").unlink()
    assert "header.nsq" in said("check", "--dir", answers, code=2)


# --- what is asked --------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [("check", "nsq_ref:quantize"), ("gen", "--dir", "never")])
def test_all_schemes_and_some_are_a_contradiction(tmp_path, verb) -> None:
    text = said(*verb, "--all", "--scheme", "nsep3", code=2, cwd=tmp_path)
    assert text == "nsq: --all takes every named scheme; leave --scheme out\n"
    assert not list(tmp_path.iterdir())


def test_several_schemes_are_checked() -> None:
    text = said("check", "nsq_ref:quantize", "--scheme", "naive2", "--scheme", "naive3")
    assert "CONFORMS SO FAR to naive2 and naive3: encode" in text


# --- what was not asked -------------------------------------------------------------------------


def test_a_verdict_names_what_was_not_asked() -> None:
    """Operations, dtypes, all but one case: in words and for programs."""
    check = ("check", "nsq_ref:quantize", "--scheme", "naive2")
    for options, verdict, notes in (
        ((), "CONFORMS SO FAR to naive2: encode", []),
        (("--dtype", "float32"), "CONFORMS SO FAR to naive2", ["float16 and bfloat16 input"]),
        (("--dtype", "float32", "--dtype", "bfloat16"), "CONFORMS", ["float16 input"]),
        (
            ("--case", "encode/ordinary/0"),
            "RIGHT in this one case: naive2, encode/ordinary/0.",
            ["all cases but encode/ordinary/0"],
        ),
    ):
        text = said(*check, *options)
        assert verdict in text
        told = [line for line in text.splitlines() if line.startswith("Not asked: ")]
        if "--case" not in options:  # of which the verdict says that it is about one case
            assert told == [f"Not asked: {', '.join(['decode', 'attend', 'feedback', *notes])}."]
        report = json.loads(said(*check, *options, "--json"))
        assert report["notes"] == [f"not asked: {note}" for note in notes]
        others = ["decode", "attend", "stream", "feedback", "stream_feedback"]
        assert report["notChecked"] == others


def test_what_is_required_and_what_is_known_decide_the_exit_code(tmp_path, wrong) -> None:
    """Q1. 1 where something required was not asked; 0 where all that fails is known."""
    quick = ("--scheme", "pchan4", "--dtype", "float32", "--quick")
    said("check", "nsq_ref:quantize", *quick, "--require", "encode,float32")
    text = said("check", "nsq_ref:quantize", *quick, "--require", "encode, decode", code=1)
    assert "Required, but not asked or not implemented: decode.\n" in text
    text = said("check", f"{wrong}:away", *quick, code=1)
    found = json.loads(said("check", f"{wrong}:away", *quick, "--json", code=1))
    cases = {f["case"] for one in found["schemes"][0]["diagnoses"] for f in one["findings"]}
    known = tmp_path / "known"
    known.write_text("".join(f"{case}: ties\n" for case in cases))
    text = said("check", f"{wrong}:away", *quick, "--known", known)
    assert f"but for {len(cases)} known deviation" in text


def test_one_case_of_many_schemes_is_no_conformance() -> None:
    text = said("check", "nsq_ref:quantize", "--all", "--case", "encode/ordinary/0")
    assert "CONFORMS" not in text
    assert "RIGHT in this one case: 40 schemes, encode/ordinary/0." in text


def test_latitude_is_named_in_the_report() -> None:
    text = said("check", "nsq_ref:quantize", "--scheme", "nsep4", "--allow", "norm-ulp=1")
    assert "norm-ulp=1" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["check"], "nothing to check"),
        (["check", "nsq_ref:absent"], "absent"),
        (["check", "no_such_module:encode"], "no_such_module"),
        (["check", "nsq_ref:quantize", "--scheme", "nsep5"], "nsep5"),
        (["check", "nsq_ref:quantize", "--scheme", "KIVI-K2V4"], "pair"),
        (["check", "nsq_ref:quantize", "--all", "--set", "bits=3"], "--set"),
        (["check", "nsq_ref:quantize", "--case", "encode/absent/0"], "encode/absent/0"),
        (["check", "nsq_ref:quantize", "--allow", "norm-ulp"], "norm-ulp"),
        (["check", "nsq_ref:quantize", "--allow", "anything"], "anything"),
        (
            ["check", "nsq_ref:quantize", "--set", "bits=3", "--set", "bits=2"],
            "--set bits is given",
        ),
        (["check", "nsq_ref:quantize", "--operation", "decode"], "decode"),
        (["check", "nsq_ref:quantize", "--custom-ops", "ops.so"], "custom_ops"),
        (["check", "absent.so"], "absent.so"),
        (["check", ""], "a target is empty"),
        (["check", "tests"], "tests is a folder; name what is in it, or judge the answers in it"),
        (["check", "nsq_ref:quantize", "--junit", "absent/r.xml"], "there is no folder"),
        (["check", "nsq_ref:quantize", "--junit", "tests"], "is not a regular file"),
        (["check", "nsq_ref:quantize", "--set", f"block_size={2**40}"], "block_size="),
        (["gen", "--set", f"sink_tokens={2**31}", "--dir", "never"], "sink_tokens=2147483648"),
        (["check", "--dir", "absent"], "absent"),
        (["check", "nsq_ref:quantize", "--dir", "tests"], "--dir"),
        (["check", "nsq_ref:quantize", "--require", "luck"], "require='luck' is not one of"),
        (["check", "nsq_ref:quantize", "--known", "absent"], "absent: No such file"),
        (["check", "math:sqrt"], "it is called as encode(x, scheme)"),
        (["gen", "--scheme", "nsep5", "--dir", "never"], "nsep5"),
        (["vectors", "--output", "/proc/never/vectors.zip"], "never"),
    ],
)
def test_bad_use_is_one_line(arguments, named) -> None:
    """And nothing is written."""
    text = said(*arguments, code=2)
    assert text.startswith("nsq: ")
    assert text.count("\n") == 1
    assert named in text
    assert not any((ROOT / name).exists() for name in ("never", "absent"))


@pytest.mark.parametrize("line", ["verify <&-", "gen >&-"])
def test_closed_pipes(line) -> None:
    """A shell can close what is read or written."""
    done = subprocess.run(
        f'"{NSQ}" {line}', shell=True, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert re.fullmatch("nsq: [^\n]* pipe[^\n]*\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    "line", ["info", "info --json", "check nsq_ref:quantize --case encode/ordinary/0"]
)
def test_what_nobody_can_read_is_no_fault(line) -> None:
    done = subprocess.run(
        f'"{NSQ}" {line} >&-', shell=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_vectors_are_written(tmp_path) -> None:
    process("vectors", "--output", tmp_path / "vectors.tar.gz")
    said("vectors", "--output", tmp_path / "vectors")
    shutil.unpack_archive(tmp_path / "vectors.tar.gz", tmp_path / "unpacked")
    (inner,) = (tmp_path / "unpacked").iterdir()
    names = sorted(path.name for path in (tmp_path / "vectors").iterdir())
    assert names == sorted(path.name for path in inner.iterdir())
    assert {"README.md", "manifest.json", "nsq.h", "encode-nsep+pchan4.json"} <= set(names)

"""``nsq check``, ``gen``, ``verify``, ``vectors`` as users run them: real processes and pipes."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nsq_ref.conformance.frames import Frame, read_frame, write_frame
from tests.support.command import NSQ, ROOT, nsq, process
from tests.support.compilers import compile_library

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
from nsq_ref.conformance.frames import read_frame, scheme_of, write_frame
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


def run(*arguments: object, code: int = 0, cwd: Path = ROOT) -> str:
    done = nsq(*arguments, code=code, cwd=cwd)
    return done.stderr if code == 2 else done.stdout


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
    text = run("check", "nsq_ref:quantize", "--all")
    assert "CONFORMS to all 38 schemes" in text


def test_wrong_function_is_told_the_rule(wrong) -> None:
    """Q1: exit code 1, the rule first, and a command that shows just one case."""
    text = run("check", f"{wrong}:away", "--scheme", "pchan4", "--dtype", "float32", code=1)
    rules = [line for line in text.splitlines() if line[:2] in ("Q1", "S1", "N1", "P1", "D1")]
    assert rules[0].startswith("Q1")
    assert "away from zero" in text
    command = next(line.split() for line in text.splitlines() if "--case" in line)
    assert command[:2] == ["nsq", "check"]
    one = run(*command[1:], code=1)
    assert "Q1" in one
    assert "0x" in one


def test_json_and_junit(wrong, tmp_path) -> None:
    """Q1 in both."""
    text = run(
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
    assert "CONFORMS to nsep+pchan4 in all that was asked" in run("check", library)


def test_report_in_the_porting_page_is_real(tmp_path) -> None:
    """Q1: the page shows what the command prints."""
    source = tmp_path / "nsq_port.c"
    source.write_text(C_EXAMPLE.read_text().replace("rintf(", "roundf("))
    compile_library(source, tmp_path / "libport.so")
    printed = run("check", "./libport.so", code=1, cwd=tmp_path)
    page = (ROOT / "docs" / "porting.md").read_text()
    shown = page.partition("```text\n$ nsq check ./libport.so\n")[2].partition("```")[0]
    assert printed == "nsq check ./libport.so\n" + shown


def test_what_is_not_implemented_fails_unless_partial(wrong) -> None:
    arguments = ("check", f"{wrong}:half", "--scheme", "naive4")
    text = run(*arguments, code=1)
    assert "not implemented" in text.lower()
    assert "odd head_dim" in text
    assert "not implemented" in run(*arguments, "--partial").lower()


def test_program_is_run_and_asked(tmp_path) -> None:
    """Encode only: the operations that it does not implement are named."""
    text = run("check", program_at(tmp_path / "mine"), "--scheme", "nsep3")
    assert "CONFORMS to nsep3" in text
    assert "decode" in text


def test_pipe(tmp_path) -> None:
    program = program_at(tmp_path / "mine")
    code, text = pipe(tmp_path, program, "--seed 7 --scheme nsep3")
    assert code == 0, text
    assert "CONFORMS to nsep3" in text
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
    run("gen", "--scheme", "nsep3", "--operation", "encode", "--dir", questions)
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
    assert "CONFORMS to nsep3" in run("check", "--dir", answers)
    shutil.copy(answers / names[3], answers / "01000.nsq")
    shutil.copy(answers / names[3], answers / "99999.nsq")
    text = run("check", "--dir", answers)
    assert "Note: not judged: 01000.nsq, which answers no case; there are 2" in text
    (answers / names[3]).unlink()
    assert "missing" in run("check", "--dir", answers, code=1)
    (answers / "header.nsq").unlink()
    assert "header.nsq" in run("check", "--dir", answers, code=2)


# --- answers that were given already ------------------------------------------------------------

HALF = """#!{python}
import sys
import nsq_ref as nsq
from nsq_ref.conformance.frames import read_frame, scheme_of, write_frame
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
    return run("check", "--dir", folder, *options, code=code)


@pytest.mark.parametrize("how", ["pipe", "files"])
def test_the_scheme_that_is_asked_for_is_judged(tmp_path, frames, how) -> None:
    """Whichever it is, by the answers to its own questions, and no other."""
    assert "CONFORMS to pchan4 in" in judged(how, tmp_path, frames, "--scheme", "pchan4")
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
    ("edit", "says"),
    [
        (lambda f: f[:120] + f[119:], "garbage: encode/.* came another answer to case 118"),
        (lambda f: [*f, f[-1]], "garbage: encode/.* came another answer to case 162"),
        (lambda f: f[:120] + f[121:], "missing: encode/.* the stream goes on with case 120"),
        (lambda f: [*f[:120], f[121], f[120], *f[122:]], "the answer to case 119, out of order"),
        (lambda f: f[:-1], "missing: encode/.* the stream ended after case 161"),
    ],
)
def test_what_breaks_a_stream_is_told_where_it_does(frames, edit, says) -> None:
    """Every other case is judged."""
    assert len(frames) == 1 + 163
    text = verified(bytes_of(edit(frames)), "--scheme", "pchan4", code=1)
    assert re.search(says, " ".join(text.split())), text
    (asked,) = re.findall(r"Of (\d+) cases: (\d) without an answer", text)
    assert 1 <= int(asked[1]) <= 2
    (answered,) = re.findall(r"Answered: encode (\d+) cases", text)
    assert int(answered) == int(asked[0]) - int(asked[1])


@pytest.mark.parametrize("behind", [b"done.\n", b"NSQ1", b"NSQ1\1\0\0\0"])
def test_bytes_behind_the_last_answer_are_named(frames, behind) -> None:
    """They fail the case behind whose answer they come, also where all else is right."""
    text = verified(bytes_of(frames) + behind, "--scheme", "pchan4", code=1)
    assert "1 without an answer" in text
    assert "after case 162 came what is no frame" in " ".join(text.split())


def test_a_cut_last_answer_is_named(frames) -> None:
    text = verified(bytes_of(frames)[:-1], "--scheme", "pchan4", code=1)
    assert "after case 161 in the midst of an answer" in text


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


@pytest.mark.parametrize("verb", [("check", "nsq_ref:quantize"), ("gen", "--dir", "never")])
def test_all_schemes_and_some_are_a_contradiction(tmp_path, verb) -> None:
    text = run(*verb, "--all", "--scheme", "nsep3", code=2, cwd=tmp_path)
    assert text == "nsq: --all takes every named scheme; leave --scheme out\n"
    assert not list(tmp_path.iterdir())


def test_several_schemes_are_checked() -> None:
    text = run("check", "nsq_ref:quantize", "--scheme", "naive2", "--scheme", "naive3")
    assert "CONFORMS to naive2 and naive3 in all that was asked" in text


# --- what was not asked -------------------------------------------------------------------------


def test_a_verdict_names_what_was_not_asked() -> None:
    """Operations, dtypes, all but one case: in words and for programs."""
    check = ("check", "nsq_ref:quantize", "--scheme", "naive2")
    for options, verdict, notes in (
        ((), "CONFORMS to naive2 in all that was asked: encode", []),
        (("--dtype", "float32"), "CONFORMS to naive2 in all", ["float16 and bfloat16 input"]),
        (("--dtype", "float32", "--dtype", "bfloat16"), "CONFORMS", ["float16 input"]),
        (
            ("--case", "encode/ordinary/0"),
            "RIGHT in this one case: naive2, encode/ordinary/0.",
            ["all cases but encode/ordinary/0"],
        ),
    ):
        text = run(*check, *options)
        assert verdict in text
        assert [line for line in text.splitlines() if line.startswith("Note: not asked: ")] == [
            f"Note: not asked: {note}" for note in notes
        ]
        report = json.loads(run(*check, *options, "--json"))
        assert report["notes"] == [f"not asked: {note}" for note in notes]
        assert report["notChecked"] == ["decode", "attend", "stream"]


def test_one_case_of_many_schemes_is_no_conformance() -> None:
    text = run("check", "nsq_ref:quantize", "--all", "--case", "encode/ordinary/0")
    assert "CONFORMS" not in text
    assert "RIGHT in this one case: 38 schemes, encode/ordinary/0." in text


def test_latitude_is_named_in_the_report() -> None:
    text = run("check", "nsq_ref:quantize", "--scheme", "nsep4", "--allow", "norm-ulp=1")
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
        (["gen", "--scheme", "nsep5", "--dir", "never"], "nsep5"),
        (["vectors", "--output", "/proc/never/vectors.zip"], "never"),
    ],
)
def test_bad_use_is_one_line(arguments, named) -> None:
    """And nothing is written."""
    text = run(*arguments, code=2)
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


def test_what_a_file_says_does_not_reach_the_terminal(tmp_path) -> None:
    """Names in a header are escaped."""
    from nsq_ref import Scheme
    from nsq_ref.conformance.ports import hello_frame

    frame = hello_frame(0, [("\x1b[31mred", Scheme())])
    text = verified(bytes_of([frame]), "--scheme", "pchan4", code=2)
    assert text == "nsq: --scheme pchan4: the questions are about \\x1b[31mred\n"


def test_vectors_are_written(tmp_path) -> None:
    process("vectors", "--output", tmp_path / "vectors.tar.gz")
    run("vectors", "--output", tmp_path / "vectors")
    shutil.unpack_archive(tmp_path / "vectors.tar.gz", tmp_path / "unpacked")
    (inner,) = (tmp_path / "unpacked").iterdir()
    names = sorted(path.name for path in (tmp_path / "vectors").iterdir())
    assert names == sorted(path.name for path in inner.iterdir())
    assert {"README.md", "manifest.json", "nsq.h", "encode-nsep+pchan4.json"} <= set(names)

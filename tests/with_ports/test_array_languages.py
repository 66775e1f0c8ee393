"""The ports in JAX, on its CPU, and in Triton, in its interpreter, conform, and mistakes show."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import programs
from tests.support.command import said

NAMES = ("nsq_port_jax.py", "nsq_port_triton.py")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own, which runs kernels without a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def targets(path: Path) -> list[str]:
    """What to check of a file: it decodes and attends, too."""
    return [f"{path}:encode", "--decode", f"{path}:decode", "--attend", f"{path}:attend"]


@pytest.mark.parametrize("name", NAMES)
def test_it_conforms(name: str) -> None:
    """I1 I2 N1 N2 S1 S3 Q1 Q2 P1 M1 M4 D1 A1 A2 A3: but for values of another scheme."""
    path = programs.EXAMPLES / name
    report = " ".join(said("check", *targets(path), "--quick", "--partial").split())
    assert "latitudes: none CONFORMS SO FAR to nsep+pchan4" in report
    left_out = report.partition("Not implemented, listed, not failed: ")[2]
    assert left_out.startswith("1 case attend/value-scheme/0 ")


@pytest.mark.parametrize("name", NAMES)
def test_it_conforms_with_blocks_and_gains(name: str) -> None:
    """B1 M2 M4 D1."""
    path = programs.EXAMPLES / name
    fields = programs.set_options("magnitude=gain block_size=16")
    report = said("check", f"{path}:encode", "--decode", f"{path}:decode", "--quick", *fields)
    assert "CONFORMS SO FAR to nsep+pchan4" in report


@pytest.mark.parametrize("name", NAMES)
def test_balanced_norms_are_left_out(name: str) -> None:
    """N3: and said to be."""
    fields = programs.set_options("norm_rule=balanced magnitude=gain")
    given = [f"{programs.EXAMPLES / name}:encode", "--case", "encode/ordinary/0", *fields]
    report = " ".join(said("check", *given, "--partial", code=1).split())
    assert "Not implemented, listed, not failed: 1 case encode/ordinary/0 " in report


@pytest.mark.parametrize(
    ("name", "right", "wrong", "found", "case"),
    [
        (
            "nsq_port_jax.py",
            "lax.optimization_barrier(jnp.broadcast_to(divisor, x.shape))",
            "divisor",
            ("D1", "decoded values are norm * (y * (1 / ||y||))"),
            "decode/ordinary/0",
        ),
        (
            "nsq_port_jax.py",
            "return low + is_more",
            "return low",
            ("N1", ""),
            "encode/norm-midpoint/0",
        ),
        (
            "nsq_port_jax.py",
            "jnp.where(bits >> 23 & 255 == 0, tiny, x.astype(jnp.float64))",
            "x.astype(jnp.float64)",
            ("N1", "subnormal"),
            "encode/subnormal-norm/0",
        ),
        (
            "nsq_port_triton.py",
            "(quotient + 12582912.0) - 12582912.0",
            "tl.floor(tl.abs(quotient) + 0.5) * tl.where(quotient < 0, -1.0, 1.0)",
            programs.HALF_AWAY,
            "encode/half-even/0",
        ),
        (
            "nsq_port_triton.py",
            "return (low + is_more.to(tl.int32)).to(tl.float32, bitcast=True)",
            "return low.to(tl.float32, bitcast=True)",
            ("N1", ""),
            "encode/norm-midpoint/0",
        ),
        (
            "nsq_port_triton.py",
            "for first in range(number * block, end, T):",
            "for first in range(number * block, end // T * T, T):",
            ("S1", ""),
            "encode/ordinary/0",
        ),
    ],
)
def test_a_mistake_in_it_is_found(
    name: str, right: str, wrong: str, found: tuple[str, str], case: str, tmp_path: Path
) -> None:
    """D1 N1 Q1 S1: what a compiler does if it may, a tie, a tile that is lost."""
    path = tmp_path / name
    path.write_text(programs.wrong(programs.source(name), right, wrong), encoding="utf-8")
    given = targets(path) if case.startswith("decode") else targets(path)[:1]
    programs.does_not_conform(given, found, "--case", case)

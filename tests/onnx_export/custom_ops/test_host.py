"""The C host of the documentation, with the runtime that the Python package brings."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import nsq_ref as nsq
from nsq_ref import Scheme
from nsq_ref.scheme import SchemeName
from onnx_export import custom_ops
from onnx_export.operators import quantize_model
from tests.support.compilers import compile_program

ROOT = Path(__file__).parents[3]
X = np.random.default_rng(7).standard_normal((33, 24)).astype(np.float32)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = ROOT / "docs" / "examples" / "onnx_host.c"
    headers = ROOT / "onnx_export" / "custom_ops" / "runtime"
    output = tmp_path_factory.mktemp("host") / "onnx_host"
    strict = ("-std=c99", "-Wall", "-Wextra", "-Werror")
    return compile_program(source, output, *strict, f"-I{headers}", "-ldl")


def runtime() -> Path:
    folder = Path(onnxruntime.__file__).parent / "capi"
    return next(path for path in folder.glob("libonnxruntime.*") if "providers" not in path.name)


def run(
    host: Path, model: Path, x: np.ndarray[tuple[int, int], np.dtype[np.float32]]
) -> subprocess.CompletedProcess[bytes]:
    files = (runtime(), custom_ops.library_path().resolve(), model)
    sizes = (str(size) for size in x.shape)
    command = [host, *files, *sizes]
    return subprocess.run(command, input=x.tobytes(), capture_output=True, check=False)


@pytest.mark.parametrize("name", ["nsep+pchan4", "naive3", "streaming2"])
def test_a_host_in_c_gets_the_codes_of_the_reference(
    name: SchemeName, host: Path, tmp_path: Path
) -> None:
    """N1 Q1 P1. Bit for bit."""
    scheme = Scheme.named(name)
    onnx.save(quantize_model(scheme), tmp_path / "quantize.onnx")
    done = run(host, tmp_path / "quantize.onnx", X)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == nsq.quantize(X, scheme).packed.tobytes()


def test_a_host_in_c_hears_why(host: Path, tmp_path: Path) -> None:
    """I2."""
    onnx.save(quantize_model(Scheme()), tmp_path / "quantize.onnx")
    done = run(host, tmp_path / "quantize.onnx", np.full_like(X, np.inf))
    assert done.returncode == 1
    assert b"nsq.Quantize: " in done.stderr
    assert b"I2" in done.stderr

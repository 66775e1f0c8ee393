"""What the kernels compile to: nothing that rounds otherwise than the specification says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What must not be in the code: fused operations, and the flags that let LLVM reorder or contract.
FORBIDDEN = re.compile(
    r"llvm\.fma\b|llvm\.fma\.|fmuladd|@fmaf?\b|\bf(?:add|sub|mul|div|cmp|neg)[a-z ]*? "
    r"(?:fast|reassoc|contract|arcp|afn|nnan|ninf|nsz)\b|\bcall (?:fast|reassoc|contract|nnan)\b"
    r"|llvm\.vector\.reduce\.f(?:add|mul)"
)
FUSED_INSTRUCTION = re.compile(r"\bvfn?m(?:add|sub)\w*")

INSPECT = """
import json, sys
import numpy as np
import numba
from nsq_ref import Scheme, dequantize, kernels, quantize

x = np.random.default_rng(0).standard_normal((2, 40, 24)).astype(np.float32)
for scheme in (Scheme(),
               Scheme(symmetric=False, magnitude="lsq", scale_rule="search", block_size=8),
               Scheme(axis="token", outlier_channels=2, magnitude="gain", bits=3)):
    dequantize(quantize(x, scheme))
found = {}
for name, value in vars(kernels).items():
    if isinstance(value, numba.core.dispatcher.Dispatcher) and value.targetoptions.get("nogil"):
        found[name] = [(value.inspect_llvm(s), value.inspect_asm(s)) for s in value.signatures]
json.dump(found, sys.stdout)
"""


def run_python(code: str, folder: Path, **variables: str) -> str:
    """Run in a process of its own: what is loaded from the kernel cache cannot be inspected."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_kernel_fuses_or_reorders(tmp_path: Path) -> None:
    import json

    found = json.loads(run_python(INSPECT, tmp_path))
    assert set(found) == {
        "measure",
        "gather_outliers",
        "token_extents",
        "squared_errors",
        "encode_rows",
        "decode_rows",
    }
    for name, compiled in found.items():
        assert compiled, f"{name} was not compiled"
        for llvm, assembly in compiled:
            assert "fdiv" in llvm or "fmul" in llvm or "fcmp" in llvm
            assert not FORBIDDEN.findall(llvm), name
            assert not FUSED_INSTRUCTION.findall(assembly), name


@pytest.mark.parametrize("flags", ["True", "{'contract'}", "{'reassoc'}"])
def test_the_search_would_find_them(tmp_path: Path, flags: str) -> None:
    """The expressions above match what Numba emits once it is allowed to."""
    code = f"""
import numba
@numba.njit(fastmath={flags})
def total(a, b):
    s = 0.0
    for i in range(a.shape[0]):
        s += a[i] * b[i] / 3
    return s
import numpy as np
total(np.ones(9), np.ones(9))
print(total.inspect_llvm(total.signatures[0]))
"""
    assert FORBIDDEN.findall(run_python(code, tmp_path))


def test_core_on_a_generic_processor(tmp_path: Path) -> None:
    """D1: without AVX or FMA, whose rounding instruction is then a library call, equal bytes."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": "generic"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["tests/test_backends.py", "-k", "engineered or any_tensor"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d{3} passed", done.stdout)

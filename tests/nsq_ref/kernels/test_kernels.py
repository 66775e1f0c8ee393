"""What the kernels compile to: nothing that rounds otherwise than the specification says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from nsq_ref import Scheme, oracle
from nsq_ref.kernels import rows as kernel_rows

ROOT = Path(__file__).parents[3]

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
from nsq_ref import Feedback, Scheme, dequantize, quantize
from nsq_ref.kernels import codec

x = np.random.default_rng(0).standard_normal((2, 40, 24)).astype(np.float32)
for scheme in (Scheme(),
               Scheme(symmetric=False, magnitude="lsq", scale_rule="search", block_size=8),
               Scheme(axis="token", outlier_channels=2, magnitude="gain", bits=3)):
    dequantize(quantize(x, scheme))
    quantize(x, scheme, feedback=Feedback.from_queries(x, 2))
found = {}
for name, value in vars(codec).items():
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
        "feed_back",
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
    code = """
from tests.nsq_ref import test_backends, test_feedback
test_backends.ORACLE_SIZE = 0  # the oracle is asked where it is compared with the specification
for name in test_backends.SCHEMES:
    test_backends.test_engineered_cases(name)
for name in test_feedback.WHOLE:
    test_feedback.test_whole_heads(name, 40)
print(len(test_backends.SCHEMES))
"""
    assert int(run_python(code, tmp_path, NUMBA_CPU_NAME="generic")) > 20


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows = st.one_of(
    st.lists(floats, min_size=1, max_size=8),
    st.lists(st.integers(-15, 15).map(float), min_size=1, max_size=8),
)
TIE = [1, 2.0**-12, 2.0**-12, 2.0**-24]


def bits_of(row: np.ndarray) -> np.ndarray:
    return row.view(np.int32)


@settings(max_examples=300)
@given(rows)
@example([*TIE, 2.0**-30])  # more than half way, by less than the sum can hold
@example([*TIE, 0.0])
@example([3.4e38, 3.4e38])
def test_norm_of_a_row_is_right_or_undecided(values: list[float]) -> None:
    """N1."""
    row = np.float32([values])
    known = kernel_rows.norm_of_row(row, bits_of(row), 0)
    assert np.isnan(known) or known == oracle.exact_norm(row[0].tolist())


@settings(max_examples=300)
@given(
    rows.flatmap(
        lambda row: st.tuples(st.just(row), st.lists(floats, min_size=len(row), max_size=len(row)))
    )
)
@example(([4, 2.0**-22, 2.0**-60, 0], [1, 1, 1, 1]))  # the quotient is a tie but for 2**-62
@example(([4, 2.0**-22, -(2.0**-60), 0], [1, 1, 1, 1]))
@example(([4 + 2.0**-20, 2.0**-22, 2.0**-60, 0], [1, 1, 1, 1]))
def test_gain_of_a_row_is_right_or_undecided(pair: tuple[list[float], list[float]]) -> None:
    """M3."""
    x, y = np.float32([pair[0]]), np.float32([pair[1]])
    known = kernel_rows.gain_of_row(x, bits_of(x), 0, y, bits_of(y))
    scheme = Scheme(magnitude="lsq")
    ones = [1.0] * len(pair[0])
    expected = oracle.factor(x[0].tolist(), y[0].tolist(), 1.0, ones, scheme)
    assert np.isnan(known) or known == expected


def test_ordinary_rows_are_decided() -> None:
    """Or the two tests above would hold for a kernel that never knows."""
    x = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    y = (x + np.float32(0.1)).astype(np.float32)
    norms = [kernel_rows.norm_of_row(x, bits_of(x), t) for t in range(200)]
    gains = [
        kernel_rows.gain_of_row(x, bits_of(x), t, y[t : t + 1], bits_of(y[t : t + 1]))
        for t in range(200)
    ]
    assert np.isfinite(norms).all()
    assert np.isfinite(gains).all()

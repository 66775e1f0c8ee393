"""The examples of docs/porting.md are the files beside it, and the C one agrees bit by bit."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from nsq_ref import Scheme, dequantize, quantize, rounding
from nsq_ref.conformance.cases import cases as conformance_cases
from nsq_ref.conformance.ports.frames import DTYPES, scheme_array
from nsq_ref.strategies import inputs
from tests.support import rows as hard_rows
from tests.support.compilers import compile_library

Float32 = npt.NDArray[np.float32]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
DONE, REFUSED, NOT_IMPLEMENTED = range(3)
PARTS = ("packed", "scale", "norm", "zero", "outlier_index", "outliers", "sinks")  # of nsq.h

# What the functions do that `nsq.h` does not declare, so that each is tested on its own.
HARNESS = """
#include "nsq_port.c"
void harness_norm(const float *x, int64_t rows, int64_t head_dim, float *out)
{
    for (int64_t i = 0; i < rows; i++)
        out[i] = norm(x + i * head_dim, head_dim);
}
void harness_narrow(const float *x, int64_t size, uint16_t *out)
{
    for (int64_t i = 0; i < size; i++)
        out[i] = narrow(x[i]);
}
"""


@pytest.mark.parametrize("name", ["nsq_port.c", "nsq_port_torch.py"])
def test_the_page_shows_the_file(name: str) -> None:
    page = (ROOT / "docs" / "porting.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:c|python)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert blocks.count((EXAMPLES / name).read_text(encoding="utf-8")) == 1


# --- the library --------------------------------------------------------------------------------


class Port:
    """The compiled example, called as `nsq.h` says."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def encode(
        self, x: npt.NDArray[Any], scheme: Scheme, dtype: int | None = None
    ) -> tuple[int, dict[str, npt.NDArray[Any]]]:
        """Return the status, and the parts, which hold garbage where nothing was written."""
        x = np.ascontiguousarray(x)
        parts = {
            name: np.full((*x.shape[:-2], *part.shape), 99, part.dtype)
            for name, part in scheme.layout(*x.shape[-2:], x.dtype).items()
        }
        dtype = DTYPES.index(x.dtype) if dtype is None else dtype
        status = self.library.nsq_encode(
            scheme_array(scheme).ctypes, x.ctypes, dtype, *shape_of(x.shape), pointers(parts)
        )
        return status, parts

    def decode(
        self, parts: dict[str, npt.NDArray[Any]], scheme: Scheme, shape: tuple[int, ...]
    ) -> tuple[int, Float32]:
        """Return the status and the decoded vectors."""
        x_hat = np.full(shape, np.nan, np.float32)
        status = self.library.nsq_decode(
            scheme_array(scheme).ctypes, pointers(parts), 0, *shape_of(shape), x_hat.ctypes
        )
        return status, x_hat

    def norm(self, x: Float32) -> Float32:
        """Return the norms of the rows of ``x[T, D]``."""
        out = np.empty(len(x), np.float32)
        x = np.ascontiguousarray(x)
        self.library.harness_norm(x.ctypes, *map(ctypes.c_int64, x.shape), out.ctypes)
        return out

    def narrow(self, x: Float32) -> npt.NDArray[np.float16]:
        """Return float16 of each element of ``x[T]``."""
        out = np.empty(len(x), np.float16)
        self.library.harness_narrow(x.ctypes, ctypes.c_int64(len(x)), out.ctypes)
        return out


def shape_of(shape: tuple[int, ...]) -> Iterator[ctypes.c_int64]:
    return map(ctypes.c_int64, (int(np.prod(shape[:-2])), *shape[-2:]))


def pointers(parts: dict[str, npt.NDArray[Any]]) -> Any:
    return (ctypes.c_void_p * len(PARTS))(
        *(parts[name].ctypes.data if name in parts else None for name in PARTS)
    )


@pytest.fixture(scope="module", params=[["-O0"], ["-O2"], ["-O3", "-mcpu=baseline"]], ids=" ".join)
def port(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Port:
    folder = tmp_path_factory.mktemp("port")
    source, library = folder / "harness.c", folder / "libport.so"
    source.write_text(HARNESS, encoding="utf-8")
    strict = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror"]
    compile_library(source, library, *strict, *request.param, f"-I{EXAMPLES}", "-lm")
    return Port(library)


def agrees(port: Port, x: npt.NDArray[Any], scheme: Scheme) -> bool:
    """Whether the example refuses what the reference refuses; what it stores must be equal."""
    status, parts = port.encode(x, scheme)
    try:
        expected = quantize(x, scheme)
    except ValueError:
        return bool(status == REFUSED)
    assert parts.keys() == expected.parts.keys()
    for name, part in expected.parts.items():
        assert parts[name].tobytes() == part.tobytes(), name
    decoded = port.decode(parts, scheme, x.shape)
    assert decoded[1].tobytes() == dequantize(expected).tobytes()
    return bool(status == decoded[0] == DONE)


# --- stages -------------------------------------------------------------------------------------


def squares(total: int, count: int = 4) -> list[int]:
    """Four integers whose squares have a given sum, the first as large as can be."""
    root = math.isqrt(total)
    if count == 1:
        return [root] if root * root == total else []
    for first in range(root, -1, -1):
        if rest := squares(total - first * first, count - 1):
            return [first, *rest]
        if count == 2 and 2 * first * first < total:
            break
    return []


def norm_at(middle: int) -> Float32:
    """Rows whose norms are the middle of two float32 in [2^24, 2^25], and a little less and more.

    By so little that a float64 sum does not show it.
    """
    row = [middle - 1, *squares(2 * middle - 2), 1, 0]
    assert middle % 2 == 1
    assert sum(v * v for v in row) == middle**2
    less, more = [*row[:-2], 1 - 2.0**-24, 0], [*row[:-1], 2.0**-10]
    return np.float32([row, less, more])


def test_norms_are_correctly_rounded(port: Port) -> None:
    """N1: on the middle of two float32 and beside it, through the whole range of float32."""
    drawn = np.random.default_rng(0).integers(2**23, 2**24, 6) * 2 + 1
    rows = np.concatenate([norm_at(int(middle)) for middle in [*drawn, 2**25 - 1]])
    with np.errstate(over="ignore", under="ignore"):  # 2^103: the last norm is half way to 2^128
        ties = np.concatenate([np.ldexp(rows, exponent) for exponent in range(-150, 104, 2)])
        ties = np.concatenate([ties, np.ldexp(rows[-3:], 103)])
    ties = ties[np.isfinite(ties).all(axis=-1)]
    assert np.isinf(rounding.norm(ties)[[-3, -1]]).all()
    assert np.isfinite(rounding.norm(ties)[-2])
    subnormal = np.arange(64, dtype=np.float32).reshape(16, 4) * np.float32(2.0**-149)
    for x in (
        ties,
        subnormal,
        hard_rows.norm_ties(),
        hard_rows.norm_order(),
        hard_rows.spread((60, 7)),
    ):
        assert port.norm(x).tobytes() == rounding.norm(x).tobytes()


def test_narrowing_rounds_half_to_even(port: Port) -> None:
    """S3 M1 Z1: every float16, every middle of two, and their float32 neighbours."""
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (every + np.append(every[1:], np.float32(65536))) / 2
    positive = hard_rows.neighbours(np.concatenate([every[1:], middles]))
    values = np.concatenate([positive, -positive, np.float32([0, -0.0, 2.0**-149, 1e38, np.inf])])
    assert port.narrow(values).tobytes() == rounding.narrow(values, np.dtype(np.float16)).tobytes()


# --- the whole ----------------------------------------------------------------------------------


@settings(max_examples=150)
@given(inputs())
def test_the_example_agrees_on_drawn_input(port: Port, x: npt.NDArray[Any]) -> None:
    """I1 N2 S1 Q1 P1 D1: in every dtype, with and without blocks."""
    x = x.astype(np.float32) if x.dtype == np.float64 else x
    for block_size in (None, 1, 3, 100):
        assert agrees(port, x, Scheme(block_size=block_size))


def test_the_example_agrees_on_engineered_input(port: Port) -> None:
    """N1 N2 S1 Q1 P1: near-ties, one-hot tokens, norms about ties of float32 and of float16."""
    # The norm next to a middle of two float16: which float32 it is decides which float16.
    middles = [k * 2**13 + side for k in (2049, 2051, 3077) for side in (-1, 1)]
    ties = np.ldexp(np.concatenate([norm_at(middle) for middle in middles]), -24)
    kit = [case.inputs["x"] for case in conformance_cases(Scheme(), ["encode"])]
    for x in (ties, *kit):
        assert agrees(port, x, Scheme())
        assert agrees(port, x.astype(ml_dtypes.bfloat16), Scheme(block_size=2))
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    assert agrees(port, np.concatenate([every, -every]).reshape(-1, 64), Scheme(block_size=32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_example_refuses(port: Port, dtype: Any) -> None:
    """I1 I2 M4 N1: in the last place of the last sequence too, and in a later block."""
    fine = np.ones((2, 5, 3), dtype)
    assert port.encode(fine, Scheme())[0] == DONE
    assert port.encode(fine, Scheme(), dtype=3)[0] == REFUSED
    for bad in (np.nan, np.inf, -np.inf, *([3e38, -65520] if dtype != np.float16 else [])):
        for index in ((0, 0, 0), (1, 4, 2)):
            x = fine.copy()
            x[index] = bad
            for scheme in (Scheme(), Scheme(block_size=2)):
                assert port.encode(x, scheme)[0] == REFUSED
    for empty in ((1, 0, 1), (1, 1, 0), (0, 0, 1)):
        assert port.encode(np.ones(empty, dtype), Scheme())[0] == REFUSED
    assert agrees(port, np.ones((0, 1, 1), dtype), Scheme())  # no sequences are no reason


@pytest.mark.parametrize(
    "field",
    [
        {"bits": 3},
        {"separate_norm": False},
        {"axis": "token"},
        {"symmetric": False},
        {"scale_rule": "search"},
        {"magnitude": "gain"},
        {"norm_rule": "balanced", "magnitude": "gain"},
        {"sink_tokens": 1},
        {"outlier_channels": 1},
        {"scale_dtype": "bfloat16"},
        {"norm_dtype": "float32"},
    ],
    ids=str,
)
def test_the_example_says_what_it_leaves_out(port: Port, field: dict[str, Any]) -> None:
    x, scheme = np.ones((2, 3, 4), np.float32), Scheme(**field)
    assert port.encode(x, scheme)[0] == NOT_IMPLEMENTED
    assert port.decode(quantize(x, scheme).parts, scheme, x.shape)[0] == NOT_IMPLEMENTED

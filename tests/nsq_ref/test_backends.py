"""Kernels, specification and oracle agree in every bit, on drawn and on engineered tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from nsq_ref import Quantized, RangeError, Scheme, dequantize, quantize, scheme_names
from nsq_ref.codec import Backend
from nsq_ref.strategies import inputs, schemes
from tests.support.cases import cases_of

BACKENDS = get_args(Backend)
ORACLE_SIZE = 40  # elements; the test vectors are the oracle's answers to larger cases
SCHEMES = {name: Scheme.named(name) for name in scheme_names()} | {
    "gain": Scheme(magnitude="gain", norm_dtype="float32"),
    "lsq": Scheme(magnitude="lsq", scale_dtype="bfloat16", norm_dtype="bfloat16"),
    "float32": Scheme(scale_dtype="float32", norm_dtype="float32"),
    "float32 a token": Scheme(axis="token", symmetric=False, scale_dtype="float32"),
    "plain": Scheme(separate_norm=False, symmetric=False, scale_dtype="float32"),
    "search": Scheme(bits=2, scale_rule="search"),
    "search a token": Scheme(bits=3, scale_rule="search", axis="token", symmetric=False),
    "blocks": Scheme(block_size=4, sink_tokens=1, outlier_channels=2),
    "blocks of one": Scheme(block_size=1, symmetric=False, magnitude="gain"),
}


def outcome(x: npt.NDArray[Any], scheme: Scheme, backend: Backend) -> Quantized | str:
    try:
        return quantize(x, scheme, backend)
    except RangeError as error:
        return str(error)


def require_equal_bits(
    x: npt.NDArray[Any], scheme: Scheme, backends: Sequence[Backend] = BACKENDS
) -> None:
    *others, oracle = (outcome(x, scheme, backend) for backend in backends)
    if isinstance(oracle, str):
        assert all(other == oracle for other in others)
        return
    for other in others:
        assert isinstance(other, Quantized)
        assert other.parts.keys() == oracle.parts.keys()
        for name, part in oracle.parts.items():
            got = other.parts[name]
            assert (got.dtype, got.shape) == (part.dtype, part.shape)
            assert got.tobytes() == part.tobytes(), name
        assert other.collapsed_tokens == oracle.collapsed_tokens
    decoded = {dequantize(oracle, backend=backend).tobytes() for backend in backends}
    assert len(decoded) == 1


@settings(max_examples=600)
@given(inputs(), schemes())
def test_any_tensor_any_scheme(x: npt.NDArray[Any], scheme: Scheme) -> None:
    require_equal_bits(x, scheme)


@settings(max_examples=150)
@given(inputs(), schemes(separate_norm=True, magnitude="lsq"))
def test_least_squares_gain(x: npt.NDArray[Any], scheme: Scheme) -> None:
    """M3: the one factor with cancellation."""
    require_equal_bits(x, scheme)


@pytest.mark.parametrize("name", SCHEMES)
def test_engineered_cases(name: str) -> None:
    """N1 N2 O1 S1 S2 S3 S4 Z1 Q1 Q2 P1 M1 M2 M3 D1 D2 B1 K1, where each is decided."""
    for case in cases_of(SCHEMES[name], ["encode"]):
        x = case.inputs["x"]
        if case.refused_by != "I2":
            backends = BACKENDS if x.size <= ORACLE_SIZE else BACKENDS[:2]
            require_equal_bits(x, case.scheme, backends)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_float16_alone(bits: int, symmetric: bool) -> None:
    """I1: each finite float16 as a sequence of one token and one channel, and as a channel."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    for separate_norm in (True, False):
        scheme = Scheme(bits=bits, symmetric=symmetric, separate_norm=separate_norm)
        for x in (finite[:, None, None], finite[None, :, None]):
            numba, numpy = (quantize(x, scheme, backend) for backend in BACKENDS[:2])
            for name, part in numpy.parts.items():
                assert numba.parts[name].tobytes() == part.tobytes(), name
            decoded = [dequantize(numba, backend=backend) for backend in BACKENDS[:2]]
            assert decoded[0].tobytes() == decoded[1].tobytes()


def test_norm_separated_single_channel_is_exact() -> None:
    """N2 M1 D1: a lone channel has direction 1 or -1, and its norm is itself."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)][:, None, None]
    for backend in BACKENDS[:2]:
        decoded = dequantize(quantize(finite, Scheme(), backend), backend=backend)
        assert np.array_equal(decoded, finite.astype(np.float32))


@pytest.mark.parametrize("head_dim", [4096, 4097, 16400])
def test_head_dim_beyond_the_fast_norm(head_dim: int) -> None:
    """N1: kernels hand rows that are too wide for their sums to the exact path."""
    x = np.random.default_rng(0).standard_normal((3, head_dim)).astype(np.float32)
    x[1] = np.nextafter(np.float32(2), np.float32(0))  # squares whose sum would leave 64 bits
    for magnitude in ("norm", "gain", "lsq"):
        scheme = replace(Scheme(), magnitude=magnitude)
        numba, numpy = (quantize(x, scheme, backend) for backend in BACKENDS[:2])
        assert numba.packed.tobytes() == numpy.packed.tobytes()
        assert numba.parts["norm"].tobytes() == numpy.parts["norm"].tobytes()
        assert dequantize(numba).tobytes() == dequantize(numba, backend="numpy").tobytes()


def test_undecided_norms_in_every_chunk_of_long_blocks() -> None:
    """N1 S2 B1: rows that the kernels come back to count in the ranges of their own blocks."""
    x = np.random.default_rng(0).standard_normal((2, 3200, 8)).astype(np.float32)
    tie = [1, 2.0**-12, 2.0**-12, 2.0**-24, 2.0**-30, 0, 0, 0]
    for t in (3, 1030, 1490, 1510, 2600, 3100):  # each the extreme of another channel of its block
        x[:, t] = np.roll(np.float32(tie), t)
        x[1, t] *= -1
    for symmetric in (True, False):
        scheme = Scheme(block_size=1500, symmetric=symmetric)
        numba, numpy = (quantize(x, scheme, backend) for backend in BACKENDS[:2])
        for name, part in numpy.parts.items():
            assert numba.parts[name].tobytes() == part.tobytes(), name

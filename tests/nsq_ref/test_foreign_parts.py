"""Parts that no encoder of ours writes, read as the page says: each sign of zero included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from nsq_ref import Quantized, Scheme, dequantize, packing, rounding
from nsq_ref.codec import PARTS, Backend
from nsq_ref.conformance import model
from nsq_ref.strategies import schemes
from onnx_export import custom_ops
from onnx_export.operators import dequantize_model
from tests.support.onnx_runners import RUNNERS, Run, array_of, value_of

Float32 = NDArray[np.float32]
BACKENDS: tuple[Backend, ...] = ("numba", "numpy", "oracle")
# Zeros of both signs, subnormals whose products underflow, ordinary and negative numbers.
TELLING = (0.0, -0.0, 1.0, -1.0, 0.125, -3.0, 2.0**-24, -(2.0**-24), 2.0**-149, 2.0**-126, 1e10)


def as_the_page_says(quantized: Quantized) -> Float32:
    """D1, one line of the page after the other."""
    scheme, shape = quantized.scheme, quantized.shape
    sinks = min(scheme.sink_tokens, shape[-2])
    tokens = shape[-2] - sinks
    x_hat = np.zeros(shape, np.float32)
    if quantized.sinks is not None:
        x_hat[..., :sinks, :] = quantized.sinks
    if not tokens:
        return x_hat
    block = np.arange(tokens) // (scheme.block_size or tokens)
    rows = block if scheme.axis == "channel" else np.arange(tokens)
    scale = quantized.scale.astype(np.float32)[..., rows, :]
    y = quantized.codes.astype(np.float32) * scale
    if quantized.zero is not None:
        y = y + quantized.zero.astype(np.float32)[..., rows, :]
    if quantized.outliers is not None and quantized.outlier_index is not None:
        index = quantized.outlier_index[..., block, :]
        np.put_along_axis(y, index, quantized.outliers.astype(np.float32), -1)
    if quantized.norm is not None:
        factor = quantized.norm.astype(np.float32)[..., None]
        if scheme.magnitude == "norm":
            length = rounding.norm(y)[..., None]
            y = np.where(length == 0, y, y / np.where(length == 0, np.float32(1), length))
        y = factor * y
    x_hat[..., sinks:, :] = y
    return x_hat


@st.composite
def foreign_parts(draw: st.DrawFn) -> Quantized:
    """Any codes with any finite scales, zeros, factors and outliers."""
    scheme = draw(schemes())
    tokens, head_dim = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    few = draw(st.lists(st.sampled_from(TELLING), min_size=1, max_size=5))
    parts: dict[str, NDArray[Any]] = {}
    for name, field in scheme.layout(tokens, head_dim).items():
        shape = (2, *field.shape)
        if name == "packed":
            low, high = scheme.code_range
            codes = rng.integers(low, high + 1, (*shape[:-1], head_dim))
            parts[name] = packing.pack(codes, scheme)
        elif name == "outlier_index":
            every = np.broadcast_to(np.arange(head_dim), (*shape[:-1], head_dim))
            parts[name] = np.sort(rng.permuted(every, axis=-1)[..., : shape[-1]]).astype(np.int32)
        else:
            numbers = np.clip(np.float32(few), -65504, 65504).astype(field.dtype)
            parts[name] = numbers[rng.integers(0, len(few), shape)]
    return Quantized(scheme, (2, tokens, head_dim), np.dtype(np.float32), **parts)


@settings(max_examples=400)
@given(foreign_parts())
def test_every_reader_gives_the_bits_of_the_page(quantized: Quantized) -> None:
    """D1."""
    with np.errstate(all="ignore"):
        expected = as_the_page_says(quantized)
        own = model.decode(quantized.parts, quantized.scheme, quantized.shape)
    assert own.tobytes() == expected.tobytes()
    for backend in BACKENDS:
        assert dequantize(quantized, backend=backend).tobytes() == expected.tobytes(), backend


def native(model: onnx.ModelProto) -> Run:
    """The library alone, as the model carries no bodies."""
    del model.functions[:]
    options = onnxruntime.SessionOptions()
    custom_ops.register(options)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [one.name for one in session.get_outputs()]

    def run(feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        values = {name: value_of(array) for name, array in feeds.items()}
        results = session.run_with_ort_values(names, values)
        return {name: array_of(value) for name, value in zip(names, results, strict=True)}

    return run


@pytest.mark.parametrize("runner", [*RUNNERS, "native"])
def test_operators_give_the_bits_of_the_page(runner: str) -> None:
    """D1: the functions' bodies, and the library."""

    @settings(max_examples=25)
    @given(foreign_parts())
    def agrees(quantized: Quantized) -> None:
        run = (RUNNERS | {"native": native})[runner](dequantize_model(quantized.scheme))
        with np.errstate(all="ignore"):
            expected = as_the_page_says(quantized)
        found = run({**quantized.parts, "shape": np.int32(quantized.shape)})["x_hat"]
        assert found.tobytes() == expected.tobytes()

    agrees()


@pytest.mark.parametrize("backend", BACKENDS)
def test_signs_of_zero_by_hand(backend: Backend) -> None:
    """D1: a product that is -0 stays -0 where nothing is added; a zero direction keeps its sign."""
    plain, separated = Scheme(separate_norm=False), Scheme(sink_tokens=0)
    codes = packing.pack(np.array([[-3, 3]]), plain)
    for scheme, zero, norm, expected in (
        (plain, None, None, [-0.0, 0.0]),
        (separated, None, np.float16([2]), [-0.0, 0.0]),
        (separated, None, np.float16([-2]), [0.0, -0.0]),
        (Scheme(magnitude="gain"), None, np.float16([2]), [-0.0, 0.0]),
    ):
        parts: dict[str, Any] = {"packed": codes, "scale": np.float16([[0, 0]])}
        parts |= {name: part for name, part in (("zero", zero), ("norm", norm)) if part is not None}
        quantized = Quantized(scheme, (1, 2), np.dtype(np.float32), **parts)
        decoded = dequantize(quantized, backend=backend)
        assert decoded.tobytes() == np.float32([expected]).tobytes()
    asymmetric = Scheme(separate_norm=False, symmetric=False)
    parts = {"packed": np.uint8([[0x30]]), "scale": np.float16([[-0.0, 0]])}
    for zero, expected in (([[0, 0]], [0.0, 0.0]), ([[-0.0, -0.0]], [-0.0, 0.0])):
        quantized = Quantized(
            asymmetric, (1, 2), np.dtype(np.float32), **parts, zero=np.float16(zero)
        )
        decoded = dequantize(quantized, backend=backend)
        assert decoded.tobytes() == np.float32([expected]).tobytes()


def test_the_parts_drawn_are_all() -> None:
    """Or a part that a later scheme stores would not be drawn."""
    every = Scheme(symmetric=False, sink_tokens=1, outlier_channels=1).layout(4, 4)
    assert set(every) == set(PARTS)

"""Every backend gives what the vectors say."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from nsq_ref import (
    Feedback,
    KVCache,
    Quantized,
    Scheme,
    attention,
    dequantize,
    quantize,
    rounding,
)
from nsq_ref.codec import Backend, block_of
from nsq_ref.conformance import model, vectors
from nsq_ref.conformance.operations import Case, attention_options, scheme_of

MANIFEST: dict[str, Any] = json.loads((vectors.FOLDER / "manifest.json").read_bytes())
FILES = list(MANIFEST["files"])
LARGE_FILES = [file for file in FILES if file.endswith(".safetensors")]
BACKENDS: tuple[Backend, ...] = ("numba", "numpy")


def document(file: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((vectors.FOLDER / file).read_bytes())
    return parsed


def same_bytes(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> bool:
    return (got.dtype, got.shape, got.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


def quantized(parts: dict[str, Any], scheme: Scheme, shape: tuple[int, ...]) -> Quantized:
    kind = parts["sinks"].dtype if "sinks" in parts else np.dtype(np.float32)
    return Quantized(scheme, shape, kind, **parts)


def of_operation(operation: str) -> list[str]:
    return [name for name in vectors.names() if name.startswith(f"{operation}-")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", of_operation("encode") + of_operation("feedback"))
def test_backends_encode_the_vectors(name: str, backend: Backend) -> None:
    """I1 I2 K1 B1 N1 N2 N3 O1 S1 S2 S3 S4 S5 Z1 Q1 Q2 P1 M1 M2 M3 M4 D1 D3 F1."""
    for vector in vectors.load(name):
        x, scheme = vector.case.inputs["x"], vector.case.scheme
        given = [one for name, one in vector.case.inputs.items() if name in ("order", "factor")]
        feedback = Feedback(*given) if given else None
        if vector.case.refused_by is not None:
            assert not vector.expected
            with pytest.raises(ValueError, match=r"."):
                quantize(x, scheme, backend, feedback=feedback)
            continue
        q = quantize(x, scheme, backend, feedback=feedback)
        assert q.parts.keys() == vector.expected.keys()
        for part, array in q.parts.items():
            assert same_bytes(array, vector.expected[part]), (vector.case, part)
        stages = vector.intermediates
        assert same_bytes(q.codes, stages["codes"]), vector.case
        assert same_bytes(dequantize(q, backend=backend), stages["x_hat"]), vector.case
        coded = x[..., min(scheme.sink_tokens, x.shape[-2]) :, :].astype(np.float32)
        if scheme.separate_norm:
            norm, size = model.norms_and_sizes(coded, scheme)
            if "size" in stages:
                of_tokens = np.repeat(stages["size"], scheme.block_size or coded.shape[-2], axis=-2)
                assert same_bytes(size, of_tokens[..., : coded.shape[-2], :]), vector.case
            divisor = np.where(norm == 0, np.float32(np.inf), norm)[..., None]
            assert same_bytes(norm, stages["norm"]), vector.case
            # By value: the sign of a zero token's direction has no effect, and no rule gives it.
            assert np.array_equal(coded / divisor, stages["direction"]), vector.case
        if "length" in stages:
            sized = stages["y"] / size if "size" in stages else stages["y"]
            assert same_bytes(rounding.norm(sized), stages["length"]), vector.case


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", of_operation("decode"))
def test_backends_decode_the_vectors(name: str, backend: Backend) -> None:
    """D1 P1 O1 K1 B1 M1 M2 M3."""
    for vector in vectors.load(name):
        shape = tuple(vector.case.inputs["shape"].tolist())
        parts = {part: one for part, one in vector.case.inputs.items() if part != "shape"}
        q = quantized(parts, vector.case.scheme, shape)
        assert same_bytes(q.codes, vector.intermediates["codes"]), vector.case
        assert same_bytes(dequantize(q, backend=backend), vector.expected["x_hat"]), vector.case


def stored_side(case: Case, side: str, scheme: Scheme) -> Quantized:
    """The keys or the values of a case of attention."""
    parts = {
        name.removeprefix(f"{side}."): part
        for name, part in case.inputs.items()
        if name.startswith(f"{side}.")
    }
    return quantized(parts, scheme, tuple(parts.pop("shape").tolist()))


def pieces(q: Quantized) -> list[attention.Piece]:
    sinks = [] if q.sinks is None else [q.sinks]
    return [*sinks, block_of(q)] if q.packed.size else [*sinks]


@pytest.mark.parametrize("name", of_operation("attend"))
def test_backends_attend_as_the_vectors(name: str) -> None:
    """A1 A2 A3."""
    for vector in vectors.load(name):
        case = vector.case
        schemes = case.scheme, scheme_of(case.inputs["value_scheme"])
        keys, values = (
            stored_side(case, side, scheme)
            for side, scheme in zip(("keys", "values"), schemes, strict=True)
        )
        options = attention_options(case.inputs)
        query, output = case.inputs["query"], vector.expected["output"]
        x_hat = [dequantize(q) for q in (keys, values)]
        for side, decoded in zip(("keys", "values"), x_hat, strict=True):
            assert same_bytes(decoded, vector.intermediates[f"{side}.x_hat"]), case
        wide = attention.attend(*(array[None] for array in (query, *x_hat)), **options)
        assert np.allclose(wide.output[0], output, rtol=1e-12, atol=1e-12), case
        assert np.allclose(wide.weights[0], vector.intermediates["weights"], 1e-12, 1e-12), case
        single, _ = attention.attend_quantized(
            query, pieces(keys), pieces(values), *schemes, value_head_dim=output.shape[2], **options
        )
        assert (np.abs(single - output) <= vector.expected["tolerance"]).all(), case


@pytest.mark.parametrize("name", of_operation("stream"))
def test_backends_stream_as_the_vectors(name: str) -> None:
    """B1 B2 C1 K1."""
    for vector in vectors.load(name):
        x, scheme = vector.case.inputs["x"], vector.case.scheme
        steps, row = vector.case.inputs["steps"], int(vector.case.inputs["row"].item())
        stored = model.stream(x, scheme, steps, row)
        assert stored.keys() == vector.expected.keys()
        for part, array in stored.items():
            assert same_bytes(array, vector.expected[part]), (vector.case, part)
        rows, _, head_dim = x.shape
        cache = KVCache(rows, 1, head_dim, scheme, scheme, dtype=x.dtype)
        taken = [0] * rows
        for kind, *numbers in steps.tolist():
            if kind == 1:
                cache.crop(numbers)
                continue
            chunk = np.zeros((rows, 1, max(numbers), head_dim), x.dtype)
            for one, number in enumerate(numbers):
                chunk[one, 0, :number] = x[one, taken[one] : taken[one] + number]
                taken[one] += number
            cache.append(chunk, chunk, numbers)
        held = cache.stored(row).keys.arrays
        held.pop("collapsed", None)
        wanted = {part: array for part, array in vector.expected.items() if array.size}
        assert held.keys() == wanted.keys()
        for part, array in wanted.items():
            assert same_bytes(held[part][0], array), (vector.case, part)


@pytest.mark.parametrize("file", LARGE_FILES)
def test_backends_encode_the_large_vectors(file: str) -> None:
    """B1 K1 N1 S1 S2 Q1 M1 M3 D1."""
    data = (vectors.FOLDER / file).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    description = json.loads(header["__metadata__"]["nsq_vector"])
    assert (description["specVersion"], description["formatVersion"]) == ("NSQ-1", 1)
    name = description["scheme"].pop("name")
    scheme = Scheme.from_dict(description["scheme"])
    assert scheme == vectors.SCHEMES[name]
    arrays = load_safetensors(data)
    for backend in BACKENDS:
        q = quantize(arrays["x"], scheme, backend)
        assert {*q.parts, "x", "x_hat"} == arrays.keys()
        for part, array in q.parts.items():
            assert same_bytes(array, arrays[part]), part
        assert same_bytes(dequantize(q, backend=backend), arrays["x_hat"])

"""Weights kept in the bits that a file stores them in: the same values, in fewer bytes."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
from gguf import GGMLQuantizationType as GGMLType
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nsq_ref import Scheme
from onnx_export.models.attention_forms import AttentionForm, QuantizedAttention
from onnx_export.models.built import build_onnx
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.llama import PLAIN, Weights
from onnx_export.models.nodes import Graph
from onnx_export.models.stored import Stored, add_product, add_rows
from onnx_export.models.tiny import tiny_gguf
from onnx_export.models.tokenizer import byte_symbols
from onnx_export.running import Session
from tests.support.command import refused, said
from tests.support.llama_oracle import IDS, TinyModel, write_gguf

SIZES = {GGMLType.Q4_0: 18, GGMLType.Q4_1: 20, GGMLType.Q8_0: 34}  # bytes of a block
KEPT_BITS = {GGMLType.Q4_0: 5, GGMLType.Q4_1: 6, GGMLType.Q8_0: 9}  # of a weight, with its scale
# Bytes of a block of each type, where its float16 numbers are, and whether it has an offset.
LAYOUTS = {
    GGMLType.Q4_0: (18, (0,), False),
    GGMLType.Q4_1: (20, (0, 2), True),
    GGMLType.Q5_0: (22, (0,), False),
    GGMLType.Q5_1: (24, (0, 2), True),
    GGMLType.Q8_0: (34, (0,), False),
    GGMLType.Q4_K: (144, (0, 2), True),
    GGMLType.Q5_K: (176, (0, 2), True),
    GGMLType.Q6_K: (210, (208,), False),
}

BASE = TinyModel(feed_forward=64)
MODELS = {
    **{f"llama {kind.name}": replace(BASE, weights={}, tensor_type=kind) for kind in SIZES},
    "untied Q4_1": replace(BASE, weights={}, tensor_type=GGMLType.Q4_1, tied=False),
    "qwen2 Q4_0": TinyModel(
        "qwen2", feed_forward=64, biases=("attn_q", "attn_k", "attn_v"), tensor_type=GGMLType.Q4_0
    ),
    "qwen3 Q4_1": TinyModel("qwen3", feed_forward=64, tensor_type=GGMLType.Q4_1),
    "biased Q8_0, untied": replace(
        BASE, weights={}, tensor_type=GGMLType.Q8_0, biases=("attn_q", "attn_k"), tied=False
    ),
}
UNSEALED = replace(Scheme.named("streaming4"), block_size=64)


def write_stored(
    path: Path, keys: dict[str, object], tensors: dict[str, tuple[NDArray[Any], GGMLType]]
) -> None:
    """Write a file of tensors that are quantized, each with its type."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
    for name, (raw, kind) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def built(gguf_path: Path, weights: Weights, attention: AttentionForm = PLAIN) -> Path:
    folder = gguf_path.with_name(weights)
    build_onnx(GGUFFile(gguf_path), folder, attention=attention, weights=weights)
    return folder / "model.onnx"


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_float32(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    path = model.write(tmp_path / "tiny.gguf")
    expected, _, _ = model.forward(IDS)
    most = 1e-5 * np.abs(expected).max()
    found, plain = (
        Session(built(path, weights)).forward(IDS, num_logits=None)[0]
        for weights in ("stored", "float32")
    )
    assert np.abs(found - expected).max() < most
    assert np.abs(found - plain).max() < most
    session = Session(tmp_path / "stored" / "model.onnx")
    for start, stop in ((0, 12), (12, 13)):  # one token and several are computed apart
        logits = session.forward(IDS[start:stop], num_logits=None)[0]
        assert np.abs(logits - expected[start:stop]).max() < most
    assert session.forward(IDS[:2], num_logits=0).shape == (1, 0, model.vocab)


def test_the_cache_may_be_quantized_too(tmp_path: Path) -> None:
    model = MODELS["qwen3 Q4_1"]
    form = QuantizedAttention(UNSEALED, UNSEALED)
    session = Session(built(model.write(tmp_path / "tiny.gguf"), "stored", form))
    expected, _, _ = model.forward(IDS)
    found = session.forward(IDS, num_logits=None)[0]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", SIZES)
def test_bytes_are_those_of_codes_and_scales(kind: GGMLType, tmp_path: Path) -> None:
    model = TinyModel(layers=1, head_dim=32, embedding=128, feed_forward=256, tensor_type=kind)
    path = model.write(tmp_path / "tiny.gguf")
    folders = {weights: built(path, weights).parent for weights in ("float32", "stored")}
    graph = onnx.load(str(folders["stored"] / "model.onnx"), load_external_data=False).graph
    lengths = {
        one.name: int(place.value)
        for one in graph.initializer
        for place in one.external_data
        if place.key == "length"
    }
    for name, values in model.tensors().items():
        own = sum(length for key, length in lengths.items() if key.startswith(name))
        kept = values.ndim == 2  # the tied embedding, too, and once
        assert own * 8 == values.size * (KEPT_BITS[kind] if kept else 32), name
    assert "Gemm" not in {node.op_type for node in graph.node}
    sizes = {one: (folder / "weights.bin").stat().st_size for one, folder in folders.items()}
    assert sizes["stored"] < 0.5 * sizes["float32"]


def weights_by_onnxruntime(path: Path) -> NDArray[np.float32]:
    """Multiply unit vectors, whose products are the weights themselves; rows must be the same."""
    file = GGUFFile(path)
    features, width = file.tensors["w"].shape
    graph = Graph("weights.bin")
    graph.stream = io.BytesIO()
    graph.input("x", "rows", width)
    graph.output("y", "rows", features)
    add_product(graph, "x", Stored(file, "w"), "w", "y")
    graph.input("ids", "batch", "sequence", dtype="int64")
    graph.output("z", "batch", "sequence", width)
    add_rows(graph, "ids", Stored(file, "w"), "w", "z")
    path.with_name("weights.bin").write_bytes(graph.stream.getvalue())
    onnx_path = path.with_name("product.onnx")
    onnx_path.write_bytes(graph.model("product", {}).SerializeToString())
    session = onnxruntime.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
    ids = np.arange(features)[None]
    found, rows = session.run(None, {"x": np.eye(width, dtype=np.float32), "ids": ids})
    empty = {"x": np.empty((0, width), np.float32), "ids": np.empty((1, 0), np.int64)}
    assert session.run(None, empty)[0].shape == (0, features)
    assert (rows[0] == found.T).all()
    return np.ascontiguousarray(found.T)


HALVES = st.floats(width=16, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("kind", LAYOUTS)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), scale=HALVES, minimum=HALVES)
@example(seed=0, scale=0.0, minimum=-3.0)  # a block of equal weights has no scale
@example(seed=1, scale=2.0**-24, minimum=65504.0)
@example(seed=2, scale=-65504.0, minimum=2.0**-24)
def test_every_weight_is_that_of_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    kind: GGMLType, seed: int, scale: float, minimum: float,
) -> None:  # fmt: skip
    """Of any bytes: bit by bit, and with offsets, which are rounded once more, to rounding."""
    random = np.random.default_rng(seed)
    rows, blocks = 3, 3
    size, places, offset = LAYOUTS[kind]
    raw = random.integers(0, 256, (rows, blocks, size), np.uint8)
    for place, number in zip(places, (scale, minimum), strict=False):
        raw[..., place : place + 2] = np.array([number], np.float16).view(np.uint8)
    raw = raw.reshape(rows, -1)
    path = tmp_path_factory.mktemp("w") / "w.gguf"
    write_stored(path, {}, {"w": (raw, kind)})
    found, expected = weights_by_onnxruntime(path), gguf.dequantize(raw, kind)
    if not offset:
        assert (found == expected).all()
    else:  # factors of blocks in a block have 6 bits
        largest = (32 * abs(scale) + abs(minimum)) * (63 if size > 100 else 1)
        assert np.abs(found.astype(np.float64) - expected).max() <= 2.0**-22 * largest


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    path = BASE.write(tmp_path / "tiny.gguf")
    with pytest.raises(
        ValueError, match=r"tiny\.gguf: no matrix is stored as one of Q4_0, Q4_1, Q5_0, "
    ):
        built(path, "stored")
    with pytest.raises(ValueError, match="weights='int4' is unknown"):
        built(path, "int4")  # type: ignore[arg-type]
    model = MODELS["llama Q4_1"]
    path = model.write(tmp_path / "tiny.gguf")
    for number in (0, 2):  # scale and minimum
        content = bytearray(path.read_bytes())
        start = GGUFFile(path).tensors["blk.1.ffn_up.weight"].start + number
        content[start : start + 2] = np.array([np.inf], np.float16).tobytes()
        damaged = tmp_path / "damaged.gguf"
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=r"'blk\.1\.ffn_up\.weight' has elements that are not"):
            built(damaged, "stored")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["damaged.gguf", "tiny.gguf"]


def test_other_types_are_float32_beside_them(tmp_path: Path) -> None:
    """A file may mix types; norms are float32 anyway."""
    model = MODELS["llama Q8_0"]
    path = tmp_path / "tiny.gguf"
    tensors = {}
    for name, values in model.tensors().items():
        kind = GGMLType.Q8_0 if "attn" in name and values.ndim == 2 else GGMLType.F32
        tensors[name] = gguf.quantize(values, kind), kind
    write_stored(path, model.keys(), tensors)
    built(path, "stored")
    graph = onnx.load(str(tmp_path / "stored" / "model.onnx"), load_external_data=False).graph
    operators = [node.op_type for node in graph.node if node.name.startswith("blk.0.")]
    assert operators.count("MatMulNBits") == 8  # two halves of each code
    expected, _, _ = model.forward(IDS)
    found = Session(tmp_path / "stored" / "model.onnx").forward(IDS, num_logits=None)[0]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_option_of_the_command(tmp_path: Path) -> None:
    tokens = ["<|end|>", *byte_symbols(), "th"]
    model = TinyModel(feed_forward=1024, vocab=len(tokens), tensor_type=GGMLType.Q4_0)
    keys = model.keys() | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * 257,
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    path = write_gguf(
        tmp_path / "q.gguf", "llama", keys, model.tensors(), tensor_type=GGMLType.Q4_0
    )
    printed = {}
    for weights in ("float32", "stored"):
        out = said("onnx", "build", path, tmp_path / weights, "--weights", weights).strip()
        printed[weights] = said("onnx", "run", out, "on", "--tokens", 8)
    assert printed["stored"] == printed["float32"]
    sizes = [(tmp_path / one / "weights.bin").stat().st_size for one in ("stored", "float32")]
    assert sizes[0] < sizes[1]
    error = refused(
        "onnx", "build", tiny_gguf(tmp_path), tmp_path / "out", "--weights", "stored", cwd=tmp_path
    )
    assert "no matrix is stored as one of Q4_0, Q4_1, Q5_0, " in error
    assert not (tmp_path / "out" / "model.onnx").exists()

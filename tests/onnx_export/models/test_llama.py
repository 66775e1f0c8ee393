"""The graph against an independent forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest

from onnx_export.models.built import cached_onnx
from onnx_export.models.decoder import Decoder
from tests.support.llama_oracle import IDS, TinyModel

ALL_LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


MODELS = {
    "llama tied, 2 groups": TinyModel(),
    "llama untied": TinyModel(tied=False),
    "one group": TinyModel(kv_heads=4),
    "four groups": TinyModel(kv_heads=1),
    "odd sizes": TinyModel(
        layers=3, heads=3, kv_heads=1, head_dim=6, embedding=18, feed_forward=13, vocab=37
    ),
    "one layer, head_dim 2": TinyModel(layers=1, heads=6, kv_heads=3, head_dim=2, embedding=12),
    "own head_dim": TinyModel(heads=3, kv_heads=3, head_dim=10, explicit_head_dim=True),
    "biases everywhere": TinyModel(biases=ALL_LINEAR),
    "rope factors": TinyModel(rope_factors=(1.0, 1.5, 4.0, 8.0)),
    "large eps and theta": TinyModel(eps=0.5, theta=1e6),
    "F16": TinyModel(tensor_type=gguf.GGMLQuantizationType.F16),
    "BF16": TinyModel(tensor_type=gguf.GGMLQuantizationType.BF16),
    "Q8_0": TinyModel(feed_forward=64, tensor_type=gguf.GGMLQuantizationType.Q8_0),
    "Q4_1": TinyModel(feed_forward=64, tensor_type=gguf.GGMLQuantizationType.Q4_1),
    "qwen2": TinyModel("qwen2", biases=("attn_q", "attn_k", "attn_v")),
    "qwen2 untied, 4 groups": TinyModel(
        "qwen2", kv_heads=1, tied=False, biases=("attn_q", "attn_k", "attn_v")
    ),
    "qwen3": TinyModel("qwen3", head_dim=16, explicit_head_dim=True, theta=1e6),
    "qwen3 untied, one group, large eps": TinyModel("qwen3", kv_heads=4, tied=False, eps=0.5),
    "qwen3 Q8_0": TinyModel("qwen3", feed_forward=64, tensor_type=gguf.GGMLQuantizationType.Q8_0),
}


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_an_independent_forward_pass(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    decoder = Decoder.from_gguf(model.write(tmp_path / "tiny.gguf"), cache_dir=tmp_path)
    logits, keys, values = decoder.forward([IDS])
    expected_logits, expected_keys, expected_values = model.forward(IDS)
    assert np.abs(logits[0] - expected_logits).max() < 1e-5 * np.abs(expected_logits).max()
    assert np.abs(keys[:, 0] - expected_keys).max() < 1e-5 * np.abs(expected_keys).max()
    assert np.abs(values[:, 0] - expected_values).max() < 1e-5 * np.abs(expected_values).max()


def test_the_oracle_tells_models_apart() -> None:
    """Each setting above changes the logits by far more than the tolerance."""
    base, _, _ = TinyModel().forward(IDS)
    for change in ({"eps": 0.5}, {"theta": 500.0}, {"rope_factors": (1.0, 1.0, 1.0, 2.0)}):
        other, _, _ = replace(TinyModel(), weights={}, **change).forward(IDS)
        assert np.abs(other - base).max() > 1e-2


def test_the_graph_is_standard_onnx(tmp_path: Path) -> None:
    path = cached_onnx(TinyModel().write(tmp_path / "tiny.gguf"), cache_dir=tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
    assert {node.domain for node in model.graph.node} == {""}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    empty = np.empty((1, 2, 0, 8), np.float32)
    feeds = {
        item.name: np.array([IDS]) if item.name == "input_ids" else empty
        for item in session.get_inputs()
        if item.name != "num_logits"
    }
    logits = session.run(["logits"], feeds)[0]
    expected, _, _ = TinyModel().forward(IDS)
    assert np.abs(logits[0] - expected).max() < 1e-4
    assert {item.name for item in session.get_outputs()} == {
        "logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value",
    }  # fmt: skip

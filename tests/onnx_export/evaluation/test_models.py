"""Models of every kind: what is read in pieces is what is read at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nsq_ref import Scheme
from onnx_export.evaluation import Decode, Opened, Prefill, evaluate, open_model
from onnx_export.evaluation.exported import side_of
from onnx_export.models.attention_forms import QuantizedAttention
from onnx_export.models.built import build_onnx
from onnx_export.models.decoder import Decoder
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.tiny import tiny_gguf
from tests.support.exports import EXPORTS, Floats, Text

IDS = np.random.default_rng(0).integers(3, 96, (1, 12))
REFUSED = {
    "decoder-whisper-18": "no output is what 'past_key_values.0.encoder.key' has grown to",
    "mobius-llama-static": "'key_cache.0' has 3 axes; known are caches of four",
}
CONFIGURED = {"genai-llama-cpu-fp32": (1, 16), "genai-phi-cpu-fp32": (1, 32)}
EXPORTED = [
    "dynamo-gemma3-18-sdpa", "dynamo-llama-20-sdpa-fp16", "dynamo-llama-24-sdpa",
    "genai-qwen2-cpu-fp32", "genai011-gemma3small-cpu-fp32", "genai011-phi-cuda-fp32",
    "mobius-qwen3-default",
    "optimum-bloom-18", "optimum-deepseek_v3-18", "optimum-gpt_oss-18", "optimum-phi-17",
]  # fmt: skip


@pytest.mark.parametrize("name", [*EXPORTED, *CONFIGURED])
def test_what_exporters_write(tmp_path: Path, name: str) -> None:
    path = EXPORTS / f"{name}.onnx"
    if name in CONFIGURED:
        path = Path(shutil.copy(path, tmp_path))
        heads, channels = CONFIGURED[name]
        decoder = {"num_key_value_heads": heads, "head_size": channels}
        config = {"model": {"context_length": 64, "decoder": decoder}}
        (tmp_path / "genai_config.json").write_text(json.dumps(config))
    model = open_model(path)
    assert model.context_length == (64 if name in CONFIGURED else None)
    assert model.vocab_size == 96
    text = Text([0])
    logits, keys, values = model.forward(IDS)
    feeds = {**text.step(12), "input_ids": IDS}
    tolerance = 2e-3 if "fp16" in name else 2e-5
    np.testing.assert_allclose(logits, Floats(path, 1).step(feeds), atol=tolerance)
    none, first, second = model.forward(IDS[:, :7], num_logits=0)
    assert none.shape == (1, 0, 96)
    again, more, others = model.forward(IDS[:, 7:], (first, second), num_logits=3)
    np.testing.assert_allclose(again, logits[:, -3:], atol=tolerance)
    np.testing.assert_allclose(more, keys, atol=tolerance)
    np.testing.assert_allclose(others, values, atol=tolerance)
    changed, _, _ = model.forward(IDS[:, 7:], (first * 2, second))
    assert np.abs(changed[:, -3:] - again).max() > 1e-3  # what is given is what is read
    found = evaluate(model, np.tile(IDS, (2, 1)), ["naive2"], protocol=Prefill(8, 3))
    assert found.figures("naive2").mean("kl")[0] > 1e-6


@pytest.mark.parametrize("name", REFUSED)
def test_caches_that_are_not_known(name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]):
        open_model(EXPORTS / f"{name}.onnx")


def test_the_same_model_however_it_is_given(tmp_path: Path) -> None:
    gguf = tiny_gguf(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 260, (2, 200))
    decoder = Decoder.from_gguf(gguf, cache_dir=tmp_path, threads=2)
    given = (decoder, Opened(str(gguf), 1, str(tmp_path)), decoder.model.path)
    results = [
        evaluate(model, tokens, ["naive3"], protocol=Decode(150, 40)).records for model in given
    ]
    assert results[0] == results[1] == results[2]


def test_what_is_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no model '.*missing\.onnx'"):
        open_model(tmp_path / "missing.onnx")
    with pytest.raises(ValueError, match=r"holds neither model\.onnx nor config\.json"):
        open_model(tmp_path)
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match=r"text\.onnx: .*INVALID_PROTOBUF"):
        open_model(tmp_path / "text.onnx")
    gguf = tiny_gguf(tmp_path)
    scheme = Scheme.named("streaming4")
    build_onnx(GGUFFile(gguf), tmp_path, attention=QuantizedAttention(scheme, scheme))
    with pytest.raises(ValueError, match="has a quantized cache; give the model that it was"):
        open_model(tmp_path / "model.onnx")


def test_the_fingerprint_is_of_every_weight(tmp_path: Path) -> None:
    source = Decoder.from_gguf(tiny_gguf(tmp_path), cache_dir=tmp_path).model.path
    prints = []
    for at in (None, 0, 5, -1):
        folder = tmp_path / str(at)
        folder.mkdir()
        for name in ("model.onnx", "weights.bin"):
            shutil.copy(source.with_name(name), folder)
        if at is not None:
            data = bytearray((folder / "weights.bin").read_bytes())
            data[at] ^= 1
            (folder / "weights.bin").write_bytes(data)
        prints.append(open_model(folder).fingerprint)
    assert len(set(prints)) == 4


def test_sides_by_name() -> None:
    names = {"past_key_values.0.key": 0, "past_key_values.11.value": 1, "key_cache.0": 0}
    assert {name: side_of(name) for name in names} == names
    assert side_of("attention_mask") is None

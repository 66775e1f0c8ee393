"""Keys, values and queries are those that a model attends with: its own attention says so."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import tokenizers

from onnx_export.evaluation import captured as module
from onnx_export.evaluation.captured import Captured, captured
from onnx_export.evaluation.surveyed import in_heads
from onnx_export.models.decoder import Decoder
from onnx_export.models.tiny import tiny_gguf
from onnx_export.models.tokenizer import Tokenizer
from onnx_export.rewrite import files
from onnx_export.rewrite.found import Found
from onnx_export.rewrite.graph import Graph
from onnx_export.rewrite.patterns import PATTERNS
from onnx_export.rewrite.survey import survey
from tests.support.exports import EXPORTS, Text

TEXT = "WE HOLD THESE TRUTHS TO BE SELF-EVIDENT"
Float = npt.NDArray[np.float64]


def attended(found: Captured, layer: int) -> Float:
    """Causal attention ``[heads, T, D]`` of what was captured, in NumPy."""
    one = found.layers[layer]
    assert one.queries is not None
    outputs = []
    for head in range(one.queries.shape[1]):
        keys, values = (x[0, head // one.group].astype(np.float64) for x in one[1:3])
        logits = one.queries[0, head].astype(np.float64) @ keys.T * one.scale
        logits[np.triu_indices(len(keys), 1)] = -np.inf
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        outputs.append(weights / weights.sum(axis=-1, keepdims=True) @ values)
    return np.array(outputs)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_gguf_decoder(architecture: str, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, architecture)  # type: ignore[arg-type]
    told: list[str] = []
    found = captured(path, TEXT, progress=lambda what, done, total: told.append(what))
    tokens = Tokenizer(path).encode(TEXT)
    assert (found.tokens, found.text_tokens, found.without_queries) == (
        len(tokens),
        len(tokens),
        "",
    )
    decoder = Decoder.from_gguf(path)
    _, keys, values = decoder.forward(tokens[None], num_logits=0)
    for layer, one in enumerate(found.layers):
        np.testing.assert_array_equal(one.keys, keys[layer])
        np.testing.assert_array_equal(one.values, values[layer])
    proto = onnx.load(decoder.model.path, load_external_data=False)
    config = decoder.config
    empty = np.zeros((1, config.kv_heads, 0, config.head_dim), np.float32)
    feeds = {f"past_key_values.{i}.{side}": empty for i in range(2) for side in ("key", "value")}
    names = [f"blk.{i}.attention.heads" for i in range(2)]
    own = module._run(proto, decoder.model.path, feeds | {"input_ids": tokens[None]}, [], names)
    for layer, name in enumerate(names):
        np.testing.assert_allclose(attended(found, layer), own[name][0], atol=2e-5)


def export(name: str, folder: Path) -> Path:
    """Put an export beside a tokenizer whose 96 tokens are letters."""
    vocabulary = {chr(32 + i): i for i in range(96)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(EXPORTS / f"{name}.onnx", folder / "model.onnx")
    return folder / "model.onnx"


EXPORTED = [
    "dynamo-llama-18-eager", "dynamo-qwen3-23-sdpa", "genai-llama-cpu-fp32", "genai-phi-cpu-fp32",
    "genai-phi3long-cpu-fp32", "genai-qwen2-cpu-fp32", "mobius-llama-default", "optimum-llama-18",
    "optimum-phi-17",
]  # fmt: skip


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_decoder(name: str, tmp_path: Path) -> None:
    path = export(name, tmp_path)
    found = captured(path, TEXT)
    assert found.tokens == len(TEXT)
    proto = files.inlined(files.read(path), {one for p in PATTERNS for one in p.ANCHORS})
    every = [one for one in survey(Graph(files.as_ir(proto, tmp_path))) if isinstance(one, Found)]
    assert len(every) == len(found.layers)
    feeds = {**Text([0]).step(len(TEXT)), "input_ids": [[ord(letter) - 32 for letter in TEXT]]}
    feeds = {one.name: feeds[one.name] for one in proto.graph.input if one.name in feeds}
    feeds = {name: np.array(given) for name, given in feeds.items()}
    for one in every:
        for cache in (one.key_cache, one.value_cache):
            feeds[str(cache.past.name)] = np.zeros((1, one.kv_heads, 0, one.head_dim), one.dtype)
    outputs = [str(one.output.value.name) for one in every]
    values = module._run(proto, path, feeds, [], outputs)
    for layer, (one, output) in enumerate(zip(every, outputs, strict=True)):
        own = in_heads(values[output], one.output.layout, one.heads)
        np.testing.assert_allclose(attended(found, layer), own[0], atol=2e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mobius-llama-static", "'key_cache.0' has 3 axes; known are caches of four"),
        ("decoder-whisper-18", "no output is what 'past_key_values.0.encoder.key' has grown to"),
        ("genai-qwen3-webgpu-int4", "ONNX Runtime does not run it"),
    ],
)
def test_what_is_not_understood(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model") as raised:
        captured(export(name, tmp_path), TEXT)
    assert message in str(raised.value)


def test_a_model_without_its_tokenizer_and_no_model(tmp_path: Path) -> None:
    path = export(EXPORTED[0], tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"there is no tokenizer .*tokenizer\.json"):
        captured(path, TEXT)
    path = export(EXPORTED[0], tmp_path)
    path.write_bytes(b"%PDF-1.5 and so on")
    with pytest.raises(ValueError, match=r"model\.onnx"):
        captured(path, TEXT)
    np.savez(tmp_path / "kv.npz", x=np.ones(3))
    with pytest.raises(ValueError, match=r"kv\.npz is a NumPy \.npz file"):
        captured(tmp_path / "kv.npz", TEXT)
    with pytest.raises(ValueError, match="tokens=3 must be an integer of at least 16"):
        captured(tiny_gguf(tmp_path), TEXT, tokens=3)

"""Models that the graph would not compute, or that contradict themselves, are refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from nsq_ref import Scheme
from onnx_export.models.attention_forms import QuantizedAttention
from onnx_export.models.built import build_onnx, cached_onnx
from onnx_export.models.config import DecoderConfig, read_config
from onnx_export.models.gguf import GGUFFile
from onnx_export.running import Session
from tests.support.llama_oracle import IDS, TinyModel, write_gguf


def convert(path: Path) -> None:
    cached_onnx(path, cache_dir=path.parent / "cache")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("key_name", TinyModel().keys())
@pytest.mark.parametrize("value", ["text", -1.0, [1, 2], True, math.nan, math.inf])
def test_metadata_of_the_wrong_type_is_refused(key_name: str, value: object, path: Path) -> None:
    model = TinyModel()
    write_gguf(path, "llama", {**model.keys(), key_name: value}, model.tensors())
    with pytest.raises(ValueError, match=f"model.gguf: key '{key_name}' must be"):
        convert(path)


REQUIRED_KEYS = [
    key
    for key in TinyModel().keys()  # noqa: SIM118
    if not key.endswith(("head_count_kv", "freq_base"))
]


@pytest.mark.parametrize("name", REQUIRED_KEYS)
def test_missing_metadata_is_named(name: str, path: Path) -> None:
    model = TinyModel()
    keys = {key: value for key, value in model.keys().items() if key != name}
    write_gguf(path, "llama", keys, model.tensors())
    with pytest.raises(ValueError, match=f"model.gguf: key '{name}' is missing; convert"):
        convert(path)


def test_optional_metadata_has_the_defaults_of_the_format(path: Path) -> None:
    model = TinyModel(kv_heads=4, theta=10000.0)
    keys = {key: value for key, value in model.keys().items() if key in REQUIRED_KEYS}
    write_gguf(path, "llama", keys, model.tensors())
    bare = cached_onnx(path, cache_dir=path.parent).parent
    full = cached_onnx(model.write(path), cache_dir=path.parent).parent
    for name in ("model.onnx", "weights.bin"):
        assert (bare / name).read_bytes() == (full / name).read_bytes()


@pytest.mark.parametrize("name", TinyModel(layers=1).tensors())
def test_missing_and_misshapen_tensors_are_named(name: str, path: Path) -> None:
    model = TinyModel(layers=1)
    tensors = model.tensors()
    values = tensors.pop(name)
    write_gguf(path, "llama", model.keys(), tensors)
    with pytest.raises(ValueError, match=f"model.gguf: tensor '{name}' is missing"):
        convert(path)
    write_gguf(
        path, "llama", model.keys() | {"llama.vocab_size": 40}, {**tensors, name: values[1:]}
    )
    with pytest.raises(ValueError, match=f"model.gguf: tensor '{name}' must have shape"):
        convert(path)
    damaged = values.copy()
    damaged.flat[3] = np.inf
    write_gguf(path, "llama", model.keys(), {**tensors, name: damaged})
    with pytest.raises(ValueError, match=f"model.gguf: tensor '{name}' has elements that are not"):
        convert(path)


UNSUPPORTED = {
    "architecture": (
        "gemma",
        {},
        {},
        "architecture 'gemma' is not supported; use llama, qwen2, qwen3 or gemma3",
    ),
    "experts": ("llama", {"llama.expert_count": 8}, {}, "key 'llama.expert_count' asks for"),
    "sliding window": (
        "llama",
        {"llama.attention.sliding_window": 16},
        {},
        "'llama.attention.sliding_window' is 16, shorter than the context of 64",
    ),
    "rope scaling": (
        "llama",
        {"llama.rope.scaling.type": "yarn"},
        {},
        "'llama.rope.scaling.type' is 'yarn', which is not supported",
    ),
    "rope scaling by no number": (
        "llama",
        {"llama.rope.scaling.factor": "2"},
        {},
        "key 'llama.rope.scaling.factor' must be a positive number, got '2'",
    ),
    "attention to what comes": (
        "llama",
        {"llama.attention.causal": False},
        {},
        "key 'llama.attention.causal' asks for",
    ),
    "a constant beyond float32": (
        "llama",
        {"llama.rope.freq_base": 3e38},
        {},
        "key 'llama.rope.freq_base' must be a positive number, got 3",
    ),
    "partial rotary": (
        "llama",
        {"llama.rope.dimension_count": 4},
        {},
        r"'llama.rope.dimension_count' \(4\) must equal the head dimension \(8\)",
    ),
    "other value length": (
        "llama",
        {"llama.attention.value_length": 4},
        {},
        r"'llama.attention.value_length' \(4\) must equal",
    ),
    "odd head_dim": (
        "llama",
        {"llama.attention.key_length": 7, "llama.attention.value_length": 7},
        {},
        "the head dimension must be even, got 7",
    ),
    "heads": (
        "llama",
        {"llama.attention.head_count_kv": 3},
        {},
        r"\(4\) must be a multiple of 'llama.attention.head_count_kv' \(3\)",
    ),
    "indivisible": (
        "llama",
        {"llama.attention.head_count": 5, "llama.attention.head_count_kv": 5},
        {},
        "'llama.attention.key_length' is missing",
    ),
    "more heads than channels": (
        "llama",
        {"llama.attention.head_count": 64, "llama.attention.head_count_kv": 64},
        {},
        "'llama.attention.key_length' is missing",
    ),
    "a billion layers": (
        "llama",
        {"llama.block_count": 10**9},
        {},
        "tensor 'blk.2.attn_norm.weight' is missing",
    ),
    "query norm": (
        "llama",
        {},
        {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)},
        "tensor 'blk.0.attn_q_norm.weight' is not part of the llama graph",
    ),
    "bias of the wrong length": (
        "llama",
        {},
        {"blk.0.attn_q.bias": np.ones(8, np.float32)},
        r"'blk.0.attn_q.bias' must have shape \(32,\), got \(8,\)",
    ),
    "rope factor 0": (
        "llama",
        {},
        {"rope_freqs.weight": np.zeros(4, np.float32)},
        "'rope_freqs.weight' must be positive",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_refused(name: str, path: Path) -> None:
    architecture, keys, tensors, message = UNSUPPORTED[name]
    model = TinyModel()
    write_gguf(path, architecture, model.keys() | keys, model.tensors() | tensors)
    with pytest.raises(ValueError, match=message) as error:
        convert(path)
    assert str(error.value).startswith(f"{path}: ")
    assert not list(path.parent.glob("cache/onnx/*"))


@pytest.mark.parametrize("keys", [{}, {"llama.rope.scaling.type": "linear"}])
def test_linear_rope_scaling_divides_every_position(keys: dict[str, object], path: Path) -> None:
    """As in llama.cpp, also where a file only has the factor."""
    model = TinyModel(rope_factors=(4.0,) * 4)
    tensors = model.tensors()
    del tensors["rope_freqs.weight"]
    write_gguf(path, "llama", model.keys() | keys | {"llama.rope.scaling.factor": 4.0}, tensors)
    expected, _, _ = model.forward(IDS)
    found = Session(cached_onnx(path, cache_dir=path.parent)).forward(IDS, num_logits=None)[0]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_keys_that_change_nothing(path: Path) -> None:
    """Converters of some time wrote these of every model; a window may be as wide as the text."""
    model = TinyModel()
    keys = {
        "llama.use_parallel_residual": True,
        "llama.attention.causal": True,
        "llama.attention.sliding_window": 64,
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.expert_count": 0,
    }
    bare = cached_onnx(model.write(path), cache_dir=path.parent).read_bytes()
    write_gguf(path, "llama", model.keys() | keys, model.tensors())
    assert cached_onnx(path, cache_dir=path.parent).read_bytes() == bare


def test_a_context_that_no_table_holds_is_refused(path: Path) -> None:
    file = GGUFFile(TinyModel(context=2**31).write(path))
    scheme = Scheme.named("streaming4")
    with pytest.raises(ValueError, match="context of 2147483648 tokens is more than the 4194304"):
        build_onnx(file, path.parent / "out", attention=QuantizedAttention(scheme, scheme))
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_metadata_of_an_onnx_model_holds_the_configuration(path: Path) -> None:
    config = read_config(GGUFFile(TinyModel(theta=0.1, eps=1e-5).write(path)))
    metadata = config.to_metadata()
    assert all(type(value) is str for value in metadata.values())
    assert DecoderConfig.from_metadata({**metadata, "graph_version": "1"}) == config

"""Gemma 3, most of whose layers see a window and rotate faster, in every form of attention."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from nsq_ref import Scheme
from onnx_export.models.attention_forms import (
    AttentionForm,
    GroupedAttention,
    PlainAttention,
    QuantizedAttention,
)
from onnx_export.models.built import cached_onnx
from onnx_export.models.config import DecoderConfig, read_config
from onnx_export.models.decoder import Decoder
from onnx_export.models.gguf import GGUFFile
from onnx_export.running import Model, Session
from tests.support.command import said
from tests.support.llama_oracle import IDS, TinyModel, write_gguf

# Layers 0 to 4 and 6 see five positions, layer 5 all.
TINY = TinyModel("gemma3", layers=7, kv_heads=1, head_dim=16, explicit_head_dim=True)
# Blocks longer than the context: nothing is sealed, and the cache is what was computed.
UNSEALED = replace(Scheme.named("streaming4"), block_size=64)
# In its tokens.
TEXT = "the|▁|c|a|c|he|▁|o|f|▁|the|▁|he|a|d|s|▁|i|s|▁|w|h|a|t|▁|the|y|▁|s|e|e|▁|o|f|▁|the|n"
FORMS: dict[str, AttentionForm] = {
    "plain": PlainAttention(),
    "gqa": GroupedAttention(),
    "nsq": QuantizedAttention(UNSEALED, UNSEALED),
    "nsq of opset 24": QuantizedAttention(UNSEALED, UNSEALED, opset=24),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_agrees_with_an_independent_forward_pass(form: str, tmp_path: Path) -> None:
    path = TINY.write(tmp_path / "tiny.gguf")
    session = Session(Model(cached_onnx(path, cache_dir=tmp_path, attention=FORMS[form])))
    expected, _, _ = TINY.forward(IDS)
    for start, stop in ((0, 3), (3, 11), (11, 12), (12, 13)):
        logits = session.forward(IDS[start:stop], num_logits=None)
        assert np.abs(logits[0] - expected[start:stop]).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("form", ["plain", "nsq"])
def test_so_does_one_whose_weights_stay_as_they_are_stored(form: str, tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q8_0
    model = replace(TINY, layers=6, feed_forward=64, tensor_type=kind, weights={})
    path = model.write(tmp_path / "tiny.gguf")
    built = cached_onnx(path, cache_dir=tmp_path, attention=FORMS[form], weights="stored")
    logits = Session(Model(built)).forward(IDS, num_logits=None)
    expected, _, _ = model.forward(IDS)
    assert np.abs(logits[0] - expected).max() < 1e-5 * np.abs(expected).max()


def test_the_cache_is_that_of_the_forward_pass(tmp_path: Path) -> None:
    decoder = Decoder.from_gguf(TINY.write(tmp_path / "tiny.gguf"), cache_dir=tmp_path)
    found = decoder.forward([IDS])[1:]
    for side, expected in zip(found, TINY.forward(IDS)[1:], strict=True):
        assert np.abs(side[:, 0] - expected).max() < 1e-5 * np.abs(expected).max()


def test_it_is_evaluated_from_the_token_that_begins_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    letters = ["the", "he", *string.ascii_lowercase, "▁"]
    tokens = ["<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    named = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [6] * 256 + [1] * len(letters),
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    model = replace(TINY, vocab=len(tokens), weights={})
    write_gguf(tmp_path / "tiny.gguf", "gemma3", model.keys() | named, model.tensors())
    pieces = TEXT.split("|")
    (tmp_path / "text.txt").write_text("".join(pieces).replace("▁", " "))
    quick = ("--prefill", 12, "--continuation", 6, "--passages", 2, "--text", "text.txt", "--json")
    printed = said("eval", "tiny.gguf", *quick, "--scheme", "streaming4", cwd=tmp_path)
    (table,) = json.loads(printed)["evaluations"][0]["tables"]
    ids = [tokens.index(one) for one in pieces]
    for number, found in enumerate(table["baseline"]["nll"]):
        passage = [1, *ids[18 * number : 18 * (number + 1)]]
        scores = model.forward(passage)[0][12:-1]
        highest = scores.max(axis=1)
        log_sum = highest + np.log(np.exp(scores - highest[:, None]).sum(axis=1))
        expected = (log_sum - scores[np.arange(6), passage[13:]]).mean()
        assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < table["schemes"]["streaming4"]["kl"]["mean"] < 1


@pytest.mark.parametrize("change", [{"window": 6}, {"local_theta": 9000.0}, {"theta": 900.0}])
def test_the_oracle_tells_windows_and_rotations_apart(change: dict[str, float]) -> None:
    base, _, _ = TINY.forward(IDS)
    other = replace(TINY, **change)  # type: ignore[arg-type]
    assert np.abs(other.forward(IDS)[0] - base).max() > 1e-3 * np.abs(base).max()


def test_both_bases_are_those_of_the_file_and_only_one_is_scaled(tmp_path: Path) -> None:
    """A linear factor is of the layers that see all; the oracle has it as factors of channels."""
    model = replace(TINY, local_theta=500.0, weights={})
    keys = model.keys() | {"gemma3.rope.freq_base_swa": 500.0, "gemma3.rope.scaling.factor": 8.0}
    path = write_gguf(tmp_path / "tiny.gguf", "gemma3", keys, model.tensors())
    found, _, _ = Decoder.from_gguf(path, cache_dir=tmp_path).forward([IDS])
    plain, _, _ = model.forward(IDS)
    assert np.abs(found[0] - plain).max() > 1e-3 * np.abs(plain).max()
    expected, _, _ = replace(model, global_factor=8.0).forward(IDS)
    assert np.abs(found[0] - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_configuration_is_read_back_and_says_which_layers_see_a_window(tmp_path: Path) -> None:
    config = read_config(GGUFFile(TINY.write(tmp_path / "tiny.gguf")))
    assert DecoderConfig.from_metadata(config.to_metadata()) == config
    assert [config.window(layer) for layer in range(7)] == [5, 5, 5, 5, 5, None, 5]
    llama = read_config(GGUFFile(TinyModel().write(tmp_path / "llama.gguf")))
    assert "sliding_window" not in llama.to_metadata()
    assert llama.window(0) is None


@pytest.mark.parametrize("name", ["post_attention_norm", "post_ffw_norm", "attn_k_norm"])
def test_norms_that_are_missing_are_named(name: str, tmp_path: Path) -> None:
    tensors = TINY.tensors()
    del tensors[f"blk.3.{name}.weight"]
    path = write_gguf(tmp_path / "model.gguf", "gemma3", TINY.keys(), tensors)
    with pytest.raises(ValueError, match=rf"model\.gguf: tensor 'blk\.3\.{name}\.weight' is miss"):
        read_config(GGUFFile(path))


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "no window": ({"attention.sliding_window": 0}, "sliding_window' must be one positive integer"),
    "the largest": ({"block_count": 62}, "Gemma 3 of 62 layers scales its scores in another way"),
    "no base": ({"rope.freq_base_swa": 0.0}, "freq_base_swa' must be a positive number, got 0.0"),
    "a cap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping' asks for something"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_graph_would_not_compute_is_refused(case: str, tmp_path: Path) -> None:
    keys, message = REFUSED[case]
    named = {f"gemma3.{key}": value for key, value in keys.items()}
    path = write_gguf(tmp_path / "model.gguf", "gemma3", TINY.keys() | named, TINY.tensors())
    with pytest.raises(ValueError, match=message):
        read_config(GGUFFile(path))

"""Models of transformers under `nsq eval`: what is read in pieces is what is read at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from onnx_export.evaluation import Decode, Prefill, evaluate, open_model
from onnx_export.evaluation.captured import captured
from onnx_export.models.json_tokenizer import tokenizer_of
from tests.with_torch.tiny_decoders import FAMILIES, OTHERS, SHAPE, VOCABULARY

IDS = np.random.default_rng(0).integers(3, VOCABULARY, (1, 40))


def saved(folder: Path, name: str) -> Path:
    """Write a model of random weights to a folder."""
    import transformers

    kind, options = (FAMILIES | OTHERS)[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**(SHAPE | options)))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [*FAMILIES, "deepseek v3"])
def test_a_model_reads_what_it_is_given(tmp_path: Path, name: str) -> None:
    import transformers

    model = open_model(saved(tmp_path, name), threads=1)
    assert (model.vocab_size, model.context_length) == (VOCABULARY, 512)
    logits, keys, values = model.forward(IDS)
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = own(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert keys.shape[:2] == values.shape[:2] == (2, 1)
    assert keys.shape[3] == values.shape[3] == 40  # also of layers with a window
    none, first, second = model.forward(IDS[:, :25], num_logits=0)
    assert none.shape == (1, 0, VOCABULARY)
    again, more, _ = model.forward(IDS[:, 25:], (first, second), num_logits=5)
    np.testing.assert_allclose(again, logits[:, -5:], atol=1e-4)
    np.testing.assert_allclose(more, keys, atol=1e-4)
    changed, _, _ = model.forward(IDS[:, 25:], (first, 2 * second), num_logits=5)
    assert np.abs(changed - again).max() > 1e-3
    tokens = np.random.default_rng(1).integers(3, VOCABULARY, (2, 60))
    for protocol in (Prefill(40, 10), Decode(40, 10, block=16)):
        found = evaluate(model, tokens, ["naive2", "naive8"], protocol=protocol)
        worse, better = (found.figures(one).mean("kl")[0] for one in ("naive2", "naive8"))
        assert worse > 10 * better > 0


def test_layers_without_keys_of_their_own(tmp_path: Path) -> None:
    """Such layers use those of others, which are cached once."""
    model = open_model(saved(tmp_path, "gemma3n"), threads=1)
    logits, keys, _ = model.forward(IDS)
    assert len(keys) == 2  # of four
    again, _, _ = model.forward(IDS[:, 25:], model.forward(IDS[:, :25])[1:])
    np.testing.assert_allclose(again, logits[:, 25:], atol=1e-4)


def test_layers_without_a_cache_of_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers of linear_attention, which have no cache"):
        open_model(saved(tmp_path, "qwen3 next"), threads=1)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=f"does not open {tmp_path}: .*no file named"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"does not open {tmp_path}: .*not a valid JSON"):
        open_model(tmp_path)
    t5 = {"model_type": "t5", "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(t5))
    with pytest.raises(ValueError, match="it is an encoder with a decoder; only decoders"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="vit is no causal language model"):
        open_model(tmp_path)


def test_weights_that_are_damaged_or_not_all_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Transformers would make up those that are missing, and tell of it between two bars."""
    saved(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    deeper = config | {"num_hidden_layers": 1 + config["num_hidden_layers"], "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(deeper))
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"has no weights of 'model\.layers\.2\..*', as Llama"):
        open_model(tmp_path)
    assert capfd.readouterr().err == ""
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"does not open {tmp_path}: "):
        open_model(tmp_path)


def test_a_model_of_transformers_is_audited(tmp_path: Path) -> None:
    model = open_model(saved(tmp_path, "llama"), threads=1)
    words = {chr(32 + i): i for i in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "!#%+ WE HOLD"[:VOCABULARY] * 4
    found = captured(tmp_path, text)
    assert (found.tokens, found.layers[0].queries) == (len(text), None)
    assert "gives no queries out" in found.without_queries
    _, keys, values = model.forward(tokenizer_of(tmp_path).encode(text)[None], num_logits=0)
    for one, *sides in zip(found.layers, keys, values, strict=True):
        np.testing.assert_allclose(one.keys, sides[0], atol=1e-6)
        np.testing.assert_allclose(one.values, sides[1], atol=1e-6)

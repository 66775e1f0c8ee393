"""SmolLM2-135M-Instruct against PyTorch on the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnx_export.models.decoder import Decoder
from onnx_export.models.tokenizer import Tokenizer

FIXTURE = Path(__file__).parents[2] / "fixtures" / "smollm2_logits.npz"


def test_logits_agree_with_pytorch(smollm2_decoder: Decoder, smollm2_tokenizer: Tokenizer) -> None:
    """tests/fixtures/make_smollm2_logits.py made the expected ones, in float32 as here."""
    fixture = np.load(FIXTURE)
    ids = smollm2_tokenizer.encode(str(fixture["text"]))
    np.testing.assert_array_equal(ids, fixture["input_ids"])
    logits = smollm2_decoder.forward(ids[None])[0][0]
    assert np.abs(logits[:, fixture["vocabulary"]] - fixture["logits"]).max() < 5e-4
    assert np.abs(logits.max(-1) - fixture["highest"]).max() < 5e-4
    np.testing.assert_array_equal(logits.argmax(-1), fixture["argmax"])
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    logsumexp = np.log(np.exp(shifted).sum(-1)) + logits.max(-1)
    assert np.abs(logsumexp - fixture["logsumexp"]).max() < 5e-4


def test_cached_and_full_forward_agree(smollm2_decoder: Decoder) -> None:
    ids = np.load(FIXTURE)["input_ids"][None, :96]
    full_logits, full_keys, full_values = smollm2_decoder.forward(ids)
    for sizes in ([1] * 96, [64, 31, 1], [7] * 13 + [5]):
        past = smollm2_decoder.empty_cache()
        for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
            logits, keys, values = smollm2_decoder.forward(ids[:, stop - size : stop], past)
            past = keys, values
            assert np.abs(logits - full_logits[:, stop - size : stop]).max() < 5e-4
        assert np.abs(past[0] - full_keys).max() < 5e-4
        assert np.abs(past[1] - full_values).max() < 5e-4


def test_it_answers_in_english(smollm2_decoder: Decoder, smollm2_tokenizer: Tokenizer) -> None:
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    stop = smollm2_tokenizer.eos_token_id
    answer = smollm2_decoder.generate(smollm2_tokenizer.encode(prompt), 40, stop_token=stop)
    assert smollm2_tokenizer.decode(answer.tokens) == "The capital of France is Paris.<|im_end|>"

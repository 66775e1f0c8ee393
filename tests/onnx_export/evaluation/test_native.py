"""Decoding in ONNX Runtime beside the plain decoder, through the command and through its parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from onnx_export.evaluation.native import run_native, why_not
from onnx_export.models.decoder import Decoder
from onnx_export.models.texts import REPORTING_START, passages
from onnx_export.models.tiny import tiny_gguf
from onnx_export.models.tokenizer import Tokenizer
from tests.support.command import nsq

NAMES = ["GQA float32", "GQA int4", "nsq streaming4", "nsq streaming3"]
LAYERS, KV_HEADS, HEAD_DIM, CONTEXT = 2, 2, 16, 512


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("tiny"), "qwen3")


def test_likelihoods_and_text_are_those_of_the_plain_decoder(gguf: Path) -> None:
    """While no block is sealed; ONNX Runtime's int4 is another cache from the first token on."""
    prefill, continuation, new_tokens = 60, 37, 12
    result = run_native(
        gguf_path=gguf, prefill_length=prefill, continuation_length=continuation,
        new_tokens=new_tokens, cache_dir=gguf.parent,
    )  # fmt: skip
    assert list(result.caches) == NAMES
    decoder, tokenizer = Decoder.from_gguf(gguf, cache_dir=gguf.parent), Tokenizer(gguf)
    tokens = passages(tokenizer, prefill + continuation + 1, 2, start=REPORTING_START)
    expected = []
    for row in tokens:
        logits = decoder.forward(row[None, :-1])[0][0].astype(np.float64)
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        scored = shares[np.arange(prefill, len(row) - 1), row[prefill + 1 :]]
        expected.append(-np.log(scored).mean())
    text = tokenizer.decode(decoder.generate(tokens[1, : prefill + 1], new_tokens).tokens)
    for name, cache in result.caches.items():
        apart = np.abs(np.subtract(cache.fidelity.nll, expected)).max()
        assert 1e-4 < apart < 0.5 if name == "GQA int4" else apart < 1e-5
        assert name == "GQA int4" or cache.text == text.partition("<|endoftext|>")[0]
        assert list(cache.tokens_per_second) == [prefill, CONTEXT]
        assert min(cache.tokens_per_second.values()) > 0
        assert cache.fidelity.baseline_nll == result.caches["GQA float32"].fidelity.nll
    assert tokenizer.decode(tokens[1, : prefill + 1]).endswith(result.prompt)


def test_sealed_blocks_cost_likelihood_and_take_less(gguf: Path) -> None:
    result = run_native(
        gguf_path=gguf, prefill_length=300, continuation_length=20, cache_dir=gguf.parent
    )
    four, three = (result.caches[f"nsq streaming{bits}"] for bits in (4, 3))
    for one in (four, three):  # which may be either way, as the model is random
        assert 1e-4 < np.abs(np.subtract(one.fidelity.nll, one.fidelity.baseline_nll)).max() < 0.2
    assert four.fidelity.nll != three.fidelity.nll
    for tokens in (300, CONTEXT):
        elements = 2 * LAYERS * KV_HEADS * HEAD_DIM * tokens
        sizes = [result.caches[name].used_bytes[tokens] for name in NAMES]
        assert sizes[:2] == [4 * elements, elements // 2]
        assert sizes[0] > sizes[2] > sizes[3]
        # Codes of two blocks, at least: the last tokens are float32.
        sealed = (tokens - 1) // 128 * 128
        unsealed = 4 * elements * (tokens - sealed) // tokens
        assert sizes[3] > unsealed + 3 * elements * sealed // tokens // 8
        assert all(cache.float16_bytes[tokens] == 2 * elements for cache in result.caches.values())


def test_command(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table and the JSON tell the same; a second run builds nothing, and may leave it out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ("--gguf", gguf, "--passages", 2, "--prefill", 20, "--continuation", 4)
    out = tmp_path / "out"
    table = nsq("demo", *arguments, "-o", out).stdout
    native = json.loads((out / "demo.json").read_text(encoding="utf-8"))["native"]
    assert list(native["caches"]) == NAMES
    for name, one in native["caches"].items():
        (line, text) = [line for line in table.splitlines() if line.startswith(name)]
        sizes = {"20": one["bytes"]["20"], **one["resident_bytes"]}
        assert list(sizes) == ["20", str(CONTEXT)]
        for tokens, taken in sizes.items():
            assert f"{taken / 1e6:.1f} ({taken / (256 * int(tokens)):.1%})" in line
        for speed in one["tokens_per_second"].values():
            assert f" {speed:.1f} " in line
        assert (f"{one['nll_change']:+.4f} ± " in line) == (name != NAMES[0])
        assert text == f"{name}: {one['text']!r}"
    built = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.onnx")}
    assert len(built) == 1 + len(NAMES)
    assert "native" not in json.loads(
        nsq("demo", *arguments, "-o", out, "--no-native", "--json").stdout
    )
    assert {path: path.stat().st_mtime_ns for path in built} == built


def test_without_the_library_it_is_left_out(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NSQ_CUSTOM_OPS", str(tmp_path / "nowhere.so"))
    arguments = ("--gguf", gguf, "--passages", 2, "--prefill", 20, "--continuation", 4)
    table = nsq("demo", *arguments, "-o", tmp_path / "out").stdout
    (line,) = [line for line in table.splitlines() if "left out" in line]
    assert "nowhere.so' is not a file" in line
    assert line.endswith(str(why_not(gguf)))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.so"):
        run_native(gguf_path=gguf, cache_dir=tmp_path)


def test_refusals(gguf: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("--long", "--no-native"), "--long is of the native path; leave --no-native out"),
        (("--keys", "kv.npz", "--long"), "leave --long out"),
    ):
        stderr = nsq("demo", *arguments, "-o", tmp_path / "out", code=2).stderr
        assert stderr.startswith("nsq: ")
        assert message in stderr
        assert stderr.count("\n") == 1
    for name, value in (("passages", 1), ("new_tokens", 1), ("prefill_length", 0)):
        with pytest.raises(ValueError, match=name):
            run_native(gguf_path=gguf, **{name: value})
    with pytest.raises(ValueError, match="context"):
        run_native(gguf_path=gguf, prefill_length=500, cache_dir=tmp_path)

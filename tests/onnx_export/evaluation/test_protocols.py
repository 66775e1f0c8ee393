"""Protocols, against loops that share no code with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special

import nsq_ref as nsq
from nsq_ref.comparison import CacheRoundTrip
from onnx_export.evaluation import (
    Decode,
    Evaluation,
    Free,
    Lengths,
    Prefill,
    Windows,
    evaluate,
)
from onnx_export.evaluation.fidelity import measure_fidelity
from onnx_export.evaluation.protocols import PROTOCOLS, protocol_named
from onnx_export.models.attention_forms import QuantizedAttention
from onnx_export.models.built import build_onnx
from onnx_export.models.decoder import Decoder
from onnx_export.models.gguf import GGUFFile
from onnx_export.running import Session
from tests.support.llama_oracle import TinyModel

MODEL = TinyModel(context=512)
TEXT = np.random.default_rng(0).integers(0, 40, (3, 341))


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODEL.write(tmp_path_factory.mktemp("protocols") / "tiny.gguf")


@pytest.fixture(scope="module")
def decoder(gguf: Path) -> Decoder:
    return Decoder.from_gguf(gguf, cache_dir=gguf.parent)


def divergence(exact: np.ndarray, other: np.ndarray) -> np.ndarray:
    p, q = (special.softmax(one.astype(np.float64), axis=-1) for one in (exact, other))
    return np.asarray(special.rel_entr(p, q).sum(axis=-1))


def kl(found: Evaluation, name: str, label: str = "") -> np.ndarray:
    """All that was recorded of a method, a row for each passage."""
    return np.array([record["kl"] for record in found.records[name][label]])


def after(decoder: Decoder, row: np.ndarray, context: int, scheme: str | None) -> np.ndarray:
    """Logits of a row behind a context that is quantized at once."""
    _, keys, values = decoder.forward(row[None, :context])
    if scheme is not None:
        keys, values = CacheRoundTrip(scheme)(keys, values)
    return decoder.forward(row[None, context:], (keys, values))[0][0]


def test_prefill_is_what_measure_fidelity_does(decoder: Decoder) -> None:
    names = ["naive4", "streaming3"]
    found = evaluate(decoder, TEXT, names, protocol=Prefill(200, 40))
    same = measure_fidelity(
        decoder,
        TEXT,
        {name: CacheRoundTrip(name) for name in names},
        prefill_length=200,
        continuation_length=40,
    )
    for name in names:
        figures = found.figures(name)
        np.testing.assert_allclose(figures.passages("nll"), same[name].nll, rtol=1e-6)
        np.testing.assert_allclose(
            figures.baseline_passages("nll"), same[name].baseline_nll, rtol=1e-6
        )
        for row, recorded in zip(TEXT, kl(found, name), strict=True):
            exact, other = (after(decoder, row[:240], 200, one) for one in (None, name))
            np.testing.assert_allclose(recorded, divergence(exact, other), rtol=1e-6, atol=1e-9)


def test_windows_slide(decoder: Decoder) -> None:
    found = evaluate(decoder, TEXT, ["naive4"], protocol=Windows(context=128, stride=48))
    starts = [0, 48, 96, 144, 192]
    assert len(found.records["naive4"][""]) == 3 * len(starts)
    every = iter(kl(found, "naive4"))
    for row in TEXT:
        for start in starts:
            window = row[start : start + 128]
            exact, other = (after(decoder, window[:-1], 80, one) for one in (None, "naive4"))
            np.testing.assert_allclose(next(every), divergence(exact, other), rtol=1e-6, atol=1e-9)


def test_all_lengths_score_the_same_tokens(decoder: Decoder) -> None:
    found = evaluate(decoder, TEXT, ["naive4"], protocol=Lengths((32, 300), 40))
    assert found.labels == ("32", "300")
    for length in (32, 300):
        for row, recorded in zip(TEXT, kl(found, "naive4", str(length)), strict=True):
            text = row[300 - length : 340]
            exact, other = (after(decoder, text, length, one) for one in (None, "naive4"))
            np.testing.assert_allclose(recorded, divergence(exact, other), rtol=1e-6, atol=1e-9)
    longest = Lengths().tokens_needed(512)
    assert longest == 513
    assert Lengths().chosen(8192) == (256, 512, 1024, 2048, 4096, 8064)


def decoded(decoder: Decoder, row: np.ndarray, scheme: str, pieces: list[int]) -> np.ndarray:
    """Logits of all tokens, each past read back from caches of `KVCache`."""
    sizes: dict[str, Any] = {
        "batch": 1,
        "kv_heads": 2,
        "head_dim": 8,
        "key": scheme,
        "value": scheme,
    }
    caches = [nsq.KVCache(**sizes) for _ in range(2)]
    logits, start = [], 0
    for piece in pieces:
        past = [cache.dequantize() for cache in caches] if start else []
        both = tuple(np.stack(side) for side in zip(*past, strict=True)) or None
        one, keys, values = decoder.forward(row[None, start : start + piece], both)
        for cache, new_keys, new_values in zip(caches, keys, values, strict=True):
            cache.append(new_keys[..., start:, :], new_values[..., start:, :])
        logits.append(one[0])
        start += piece
    return np.concatenate(logits)


def test_decoding_reads_what_a_cache_has_sealed(decoder: Decoder) -> None:
    found = evaluate(decoder, TEXT, ["streaming3"], protocol=Decode(0, 300))
    part = evaluate(decoder, TEXT, ["streaming3"], protocol=Decode(250, 50))
    for row, recorded, last in zip(
        TEXT, kl(found, "streaming3"), kl(part, "streaming3"), strict=True
    ):
        exact = decoder.forward(row[None, :300])[0][0]
        other = decoded(decoder, row, "streaming3", [129, 128, 43])
        expected = divergence(exact, other)
        np.testing.assert_allclose(recorded, expected, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(last, expected[250:], rtol=1e-4, atol=1e-8)
        assert not recorded[:129].round(8).any()
        assert (recorded[129:] > 0).all()


def test_bits_of_decoding_are_of_every_step(decoder: Decoder) -> None:
    """As `KVCache` has them in float16, before the block is sealed that a token fills."""
    found = evaluate(decoder, TEXT[:1], ["streaming3"], protocol=Decode(200, 100))
    scheme = nsq.Scheme.named("streaming3")
    bits = elements = 0.0
    for length in range(201, 301):
        sealed = (length - 2) // 128 * 128
        blocks = replace(scheme, sink_tokens=0).bits_per_element(sealed, 8) * sealed * 8
        bits += blocks + 16 * 8 * (length - sealed)
        elements += 8 * length
    size = found.figures("streaming3").size.to_dict()
    assert size["bits_per_element"] == pytest.approx(bits / elements)
    assert size["sealed_bits_per_element"] == pytest.approx(3 + 16 / 8 + 32 / 128)


def test_decoding_costs_what_the_deployed_cache_costs(gguf: Path, decoder: Decoder) -> None:
    """Token by token in the native library, whose last token of a block reads it from its codes."""
    scheme = nsq.Scheme.named("streaming3")
    build_onnx(GGUFFile(gguf), gguf.parent / "q", attention=QuantizedAttention(scheme, scheme))
    found = evaluate(decoder, TEXT, ["streaming3"], protocol=Decode(0, 300))
    deployed = []
    for row in TEXT:
        session = Session(gguf.parent / "q" / "model.onnx")
        logits = np.stack([session.forward([token])[0, -1] for token in row[:300]])
        deployed.append(divergence(decoder.forward(row[None, :300])[0][0], logits))
    ratio = kl(found, "streaming3").mean() / np.mean(deployed)
    assert 0.95 < ratio < 1.05  # seen: 0.996


def test_free_text_is_greedy(decoder: Decoder) -> None:
    found = evaluate(decoder, TEXT, ["float32", "streaming2"], protocol=Free(150, 12))
    for number, row in enumerate(TEXT):
        expected = decoder.generate(row[:150], 12).tokens.tolist()
        exact = found.records["float32"][""][number]
        assert found.baseline[""][number]["tokens"] == exact["tokens"] == expected
        assert (exact["first_divergence"], exact["agreement"]) == (12, 1.0)
        record = found.records["streaming2"][""][number]
        text, written = list(row[:150]), []
        pieces = [129, 21]
        while len(written) < 12:
            logits = decoded(decoder, np.array(text), "streaming2", pieces)
            written.append(int(logits[-1].argmax()))
            text.append(written[-1])
            pieces.append(1)
        assert record["tokens"] == written
        same = [a == b for a, b in zip(written, expected, strict=True)]
        assert record["agreement"] == sum(same) / 12
        assert record["first_divergence"] == ([*same, False].index(False))
        trigrams = [tuple(written[at : at + 3]) for at in range(10)]
        assert record["diversity"] == len(set(trigrams)) / 10
    assert found.figures("streaming2").mean("first_divergence")[0] < 12


SHORT = {
    "prefill": (Prefill(340, 1), "passage 0 has 341 tokens, and prefill needs 342"),
    "windows": (Windows(342, 10), "windows needs 342"),
    "lengths": (Lengths((10, 340), 1), "lengths needs 342"),
    "the model": (
        Lengths((600,), 1),
        "lengths needs a context of 601 tokens, more than the .* 512",
    ),
    "free": (Free(500, 20), "a prompt of 500 tokens and 20 new ones"),
}


@pytest.mark.parametrize("name", SHORT)
def test_what_is_too_short_is_refused_before_the_work(decoder: Decoder, name: str) -> None:
    protocol, message = SHORT[name]
    with pytest.raises(ValueError, match=message):
        evaluate(decoder, TEXT, ["naive4"], protocol=protocol)


def test_wrong_protocols() -> None:
    with pytest.raises(ValueError, match="protocol 'stream' is unknown; there are prefill, windo"):
        protocol_named("stream")
    with pytest.raises(ValueError, match="prefill_length=0 must be an integer of at least 1"):
        Prefill(0)
    with pytest.raises(ValueError, match="stride=8 must be less than context=8"):
        Windows(8, 8)
    with pytest.raises(ValueError, match="the model does not say how long its context is"):
        Lengths().chosen(None)
    for name, kind in PROTOCOLS.items():
        assert type(protocol_named(name)) is kind
        assert protocol_named(name).to_dict()["name"] == name

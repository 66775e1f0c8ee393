"""Every export is rewritten and right, or refused with a reason: the original is the oracle."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nsq_ref as nsq
from onnx_export.rewrite import rewrite
from onnx_export.rewrite.report import RewriteReport
from tests.support.exports import EXPORTS, STEPS, Floats, Quantized, Text

FIXTURES = sorted(path.stem for path in EXPORTS.glob("*.onnx") if "whisper" not in path.stem)
COUNTS_ITS_MASK = ("genai-", "genai011-gemma3", "mobius-llama-cpu")  # GroupQueryAttention
# Their masks are of a prompt, or of one token.
NO_CHUNKS = ("genai011-llama-cpu-fp16", "genai011-phi-cuda-fp32")
# It normalizes within its attention, which onnxruntime has on GPUs only.
ORACLES = {"genai-qwen3-webgpu-int4": "genai-qwen3-webgpu-int4-apart"}
SEALED = (
    "dynamo-gemma2-18-eager", "dynamo-llama-23-sdpa", "dynamo-phi3-18-sdpa",
    "mobius-gemma3-default", "mobius-llama-static", "optimum-deepseek_v3-18",
    "optimum-gpt_oss-18", "optimum-qwen3-18",
)  # fmt: skip
SEALING = replace(nsq.Scheme.named("streaming4"), block_size=4)


def rewritten(name: str, folder: Path, **options: object) -> tuple[Path, RewriteReport]:
    out = folder / f"{name}.onnx"
    report = rewrite(EXPORTS / f"{name}.onnx", out, **options)  # type: ignore[arg-type]
    return out, report


def text(name: str) -> Text:
    """Return a batch if the model can have one, padded on the left if it has a mask."""
    if name.startswith(COUNTS_ITS_MASK):  # and takes several tokens after others of one row only
        return Text([0])
    return Text([0, 0] if name.endswith("static") else [0, 2])


def tolerance(name: str) -> float:
    if "fp16" in name:
        return 2e-2
    # MatMulNBits of genai rounds what it multiplies to 8 bits, and a last bit may round otherwise.
    return 1e-4 if "int4" not in name else 5e-2


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_are_the_original_ones_while_nothing_is_sealed(name: str, tmp_path: Path) -> None:
    path, report = rewritten(name, tmp_path)
    assert report.complete, [one.reason for one in report.attentions]
    given = text(name)
    original = Floats(EXPORTS / f"{ORACLES.get(name, name)}.onnx", given.batch)
    ours = Quantized(path, given.batch, native=True)
    for new in (6, 1, 1, 1) if name in NO_CHUNKS else STEPS:
        feeds = given.step(new)
        want, got = original.step(feeds), ours.step(feeds)
        seen = given.real(new)
        assert abs(want[seen]).max() > 0.1
        np.testing.assert_allclose(got[seen], want[seen], rtol=0, atol=tolerance(name))


@pytest.mark.parametrize("name", SEALED)
def test_sealed_tokens_are_the_reference_reconstructions(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original, fed with what `nsq_ref` makes of the stored caches before every token."""
    monkeypatch.setenv("NSQ_EXACT", "1")
    path, _ = rewritten(name, tmp_path, key=SEALING, value=SEALING)
    given = text(name)
    original, exact = (Floats(EXPORTS / f"{name}.onnx", given.batch) for _ in range(2))
    ours, lossy = Quantized(path, given.batch, native=True), 0.0
    for new in (6, *[1] * 11):
        for past in original.pasts:
            layer, side = side_of(past)
            array = original.cache[past]
            tokens = ours.decoded(layer, side, given.length)
            if array.ndim == 3:
                array[:, : given.length] = tokens.swapaxes(1, 2).reshape(
                    given.batch, given.length, array.shape[2]
                )
            else:
                original.cache[past] = tokens.astype(array.dtype)
        before = given.length
        feeds = given.step(new)
        want, got, plain = original.step(feeds), ours.step(feeds), exact.step(feeds)
        # The original attends to the new tokens before their block is coded, nsq.Attention after.
        sealed = [(length - 1) // 4 for length in (max(before, 1), given.length)]
        if sealed[0] == sealed[1]:
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance(name))
            lossy = max(lossy, float(abs(plain - want).max()))
    assert lossy > 1e-2  # or the reconstructions had no part in it


def side_of(past: str) -> tuple[int, str]:
    """Return layer and side of a past by its name."""
    layer = int(next(part for part in past.split(".") if part.isdigit()))
    return layer, "key" if "key" in past.replace("past_key_values", "") else "value"


def test_rows_of_a_static_cache_grow_apart(tmp_path: Path) -> None:
    """Each row alone in the original, and both together, padded on the right."""
    name = "mobius-llama-static"
    path, _ = rewritten(name, tmp_path)
    ours = Quantized(path, 2, native=True)
    alone = [Floats(EXPORTS / f"{name}.onnx", 1) for _ in range(2)]
    assert ours.layout.roles["past_lengths"] == "write_indices"
    assert not ours.layout.right_padding
    rng, past = np.random.default_rng(0), np.zeros(2, np.int64)
    for counts in ([5, 3], [1, 1], [2, 4], [1, 1]):
        real = np.array(counts)
        ids = rng.integers(3, 96, (2, real.max()))
        places = past[:, None] + np.arange(real.max())
        feeds = {
            "input_ids": ids, "position_ids": places, "write_indices": past,
            "nonpad_kv_seqlen": past + real,
        }  # fmt: skip
        got = ours.step(feeds)
        for row, (original, count) in enumerate(zip(alone, counts, strict=True)):
            one = slice(row, row + 1)
            want = original.step(
                {
                    "input_ids": ids[one, :count], "position_ids": places[one, :count],
                    "write_indices": past[one], "nonpad_kv_seqlen": past[one] + count,
                }
            )  # fmt: skip
            np.testing.assert_allclose(got[row, :count], want[0], rtol=0, atol=1e-4)
        past = past + real


@pytest.mark.parametrize("name", ["mobius-gemma3-default", "optimum-llama-18"])
def test_without_the_library(name: str, tmp_path: Path) -> None:
    path, _ = rewritten(name, tmp_path)
    given = text(name)
    original = Floats(EXPORTS / f"{name}.onnx", given.batch)
    ours = Quantized(path, given.batch, native=False)
    for new in STEPS[:4]:
        feeds = given.step(new)
        seen = given.real(new)
        want, got = original.step(feeds)[seen], ours.step(feeds)[seen]
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance(name))


def test_caches_of_an_encoder_stay_as_they_are(tmp_path: Path) -> None:
    """Attention over what nothing is appended to is no attention with a cache."""
    name, rng, encoded = "decoder-whisper-18", np.random.default_rng(0), 7
    path, report = rewritten(name, tmp_path)
    assert report.complete
    assert len(report.attentions) == 2
    original = Floats(EXPORTS / f"{name}.onnx", 2)
    ours = Quantized(path, 2, native=True)
    assert not any("encoder" in one.past for one in ours.layout.tensors)
    for past in [one for one in original.pasts if "encoder" in one]:
        _, heads, _, channels = original.cache.pop(past).shape
        given = rng.standard_normal((2, heads, encoded, channels)).astype(np.float32)
        original.cache[past] = ours.cache[past] = given
    original.pasts = [one for one in original.pasts if "encoder" not in one]
    for length in range(4):
        feeds = {"input_ids": rng.integers(3, 96, (2, 1)), "past_lengths": np.full(2, length)}
        kept = {one: array for one, array in ours.cache.items() if "encoder" in one}
        want, got = original.step(feeds), ours.step(feeds)
        ours.cache |= kept
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_most_attentions_of_every_exporter_are_rewritten(tmp_path: Path) -> None:
    """The table of docs/onnx.md."""
    all_of, done = Counter[str](), Counter[str]()
    for name in FIXTURES:
        report = rewrite(EXPORTS / f"{name}.onnx", tmp_path / "no.onnx", dry_run=True)
        exporter = name.split("-")[0]
        all_of[exporter] += len(report.attentions)
        done[exporter] += report.rewritten
        for one in report.attentions:
            assert one.schemes is not None or one.reason
    assert sum(done.values()) >= 0.95 * sum(all_of.values()), (done, all_of)
    assert all(done[exporter] >= 0.9 * count for exporter, count in all_of.items()), done

"""Running a decoder: its cache, generation, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_export.models.built import cached_onnx
from onnx_export.models.decoder import Decoder
from tests.support.llama_oracle import IDS, TinyModel
from tests.support.tensors import Tensor


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("decoder")
    return Decoder.from_gguf(TinyModel().write(folder / "tiny.gguf"), cache_dir=folder)


@pytest.mark.parametrize("sizes", [[1] * 13, [12, 1], [1, 12], [5, 5, 3]])
def test_cached_and_full_forward_agree(decoder: Decoder, sizes: list[int]) -> None:
    full_logits, full_keys, full_values = decoder.forward([IDS])
    keys, values = decoder.empty_cache()
    parts = []
    for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
        logits, keys, values = decoder.forward([IDS[stop - size : stop]], (keys, values))
        parts.append(logits)
    assert np.abs(np.concatenate(parts, axis=1) - full_logits).max() < 1e-5
    assert np.abs(keys - full_keys).max() < 1e-5
    assert np.abs(values - full_values).max() < 1e-5


def test_the_past_is_used_as_it_is_given(decoder: Decoder) -> None:
    _, keys, values = decoder.forward([IDS[:6]])
    same, _, _ = decoder.forward([IDS[6:]], (keys, values))
    other, new_keys, _ = decoder.forward([IDS[6:]], (keys, 2 * values))
    assert np.abs(same - other).max() > 1e-3
    np.testing.assert_array_equal(new_keys[..., :6, :], keys)


def test_rows_of_a_batch_are_independent(decoder: Decoder) -> None:
    rows = [IDS, IDS[::-1], [7] * 13]
    logits, keys, values = decoder.forward(rows)
    assert keys.shape == values.shape == (2, 3, 2, 13, 8)
    logits, keys, values = decoder.forward(rows, (keys, values))
    for index, row in enumerate(rows):
        _, *past = decoder.forward([row])
        alone, alone_keys, _ = decoder.forward([row], (past[0], past[1]))
        assert np.abs(logits[index] - alone[0]).max() < 1e-5
        assert np.abs(keys[:, index] - alone_keys[:, 0]).max() < 1e-5


@pytest.mark.parametrize(("num_logits", "expected"), [(None, 13), (0, 0), (1, 1), (5, 5), (99, 13)])
def test_num_logits_selects_the_last_positions(
    decoder: Decoder, num_logits: int | None, expected: int
) -> None:
    every, keys, _ = decoder.forward([IDS, IDS])
    logits, same_keys, _ = decoder.forward([IDS, IDS], num_logits=num_logits)
    assert logits.shape == (2, expected, 40)
    assert np.abs(logits - every[:, 13 - expected :]).max(initial=0) < 1e-5
    np.testing.assert_array_equal(keys, same_keys)


def test_tensors_of_other_frameworks(decoder: Decoder) -> None:
    """Tokens and caches through DLPack, integers of NumPy and arrays of no axes."""
    ids = np.array([IDS])
    _, keys, values = decoder.forward(ids)
    again, *_ = decoder.forward(Tensor(ids), num_logits=np.array(2))  # type: ignore[arg-type]
    np.testing.assert_array_equal(again, decoder.forward(ids, num_logits=2)[0])
    past: Any = Tensor(keys), Tensor(values)
    next_logits, *_ = decoder.forward(ids[:, :1], past)
    np.testing.assert_array_equal(next_logits, decoder.forward(ids[:, :1], (keys, values))[0])
    prompt: Any = Tensor(ids[0])
    tokens, ended_by = decoder.generate(prompt, np.int64(4), stop_token=np.array(-1))  # type: ignore[arg-type]
    expected = decoder.generate(IDS, 4)
    assert (tokens.tolist(), ended_by) == (expected.tokens.tolist(), expected.ended_by)
    with pytest.raises(TypeError, match=r"max_new_tokens=2\.0 is not an integer"):
        decoder.generate(IDS, 2.0)  # type: ignore[arg-type]


def test_generate_takes_the_most_likely_token_each_time(decoder: Decoder) -> None:
    generated, ended_by = decoder.generate(IDS, 6)
    text = list(IDS)
    for token in generated:
        logits, _, _ = TinyModel().forward(text)
        assert token == logits[-1].argmax()
        text.append(int(token))
    assert (len(generated), generated.dtype, ended_by) == (6, np.int64, "max_new_tokens")
    stop = int(generated[2])
    first = generated.tolist().index(stop)
    stopped, ended_by = decoder.generate(IDS, 6, stop_token=stop)
    assert (stopped.tolist(), ended_by) == (generated[: first + 1].tolist(), "stop_token")


@pytest.mark.parametrize("prompt", [1, 40, 63, 64])
@pytest.mark.parametrize("more", [-1, 0, 1, 1000])
def test_the_end_of_the_context_ends_the_text(decoder: Decoder, prompt: int, more: int) -> None:
    """The context holds 64 tokens; the last that is generated need not be read."""
    room = 64 - prompt + 1
    if room + more < 1:
        return
    tokens, ended_by = decoder.generate([7] * prompt, room + more)
    assert len(tokens) == min(room, room + more)
    assert ended_by == ("context_length" if more > 0 else "max_new_tokens")
    streamed = decoder.stream([7] * prompt, room + more)
    assert list(streamed) == tokens.tolist()
    last = int(tokens[-1])
    first = tokens.tolist().index(last)
    assert decoder.generate([7] * prompt, room + more, stop_token=last)[1] == "stop_token"
    assert first <= len(tokens)


def test_a_stream_checks_at_once_and_keeps_what_it_gave(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="65 tokens together, more than the model's context of 64"):
        decoder.stream([7] * 65, 1)
    with pytest.raises(ValueError, match=r"input_ids\[0, 1\] is 40, outside the vocabulary"):
        decoder.stream([7, 40], 1)
    stream = decoder.stream(IDS, 1000)
    kept = [next(stream) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert kept == decoder.generate(IDS, 3).tokens.tolist()


def test_one_thread_gives_the_same(decoder: Decoder, tmp_path: Path) -> None:
    path = TinyModel().write(tmp_path / "tiny.gguf")
    single = Decoder.from_gguf(path, cache_dir=tmp_path, threads=1)
    assert single.model.session.get_session_options().intra_op_num_threads == 1
    assert np.abs(single.forward([IDS])[0] - decoder.forward([IDS])[0]).max() < 1e-5


BAD_CALLS = {
    "one dimension": ([1, 2], None, None, r"input_ids must have shape \[batch, sequence\]"),
    "no tokens": (np.empty((1, 0), int), None, None, "none of them 0"),
    "floats": ([[1.0]], None, None, "input_ids has dtype float64; give integers"),
    "too large": ([[1, 40]], None, None, r"input_ids\[0, 1\] is 40, outside the vocabulary of 40"),
    "negative": ([[-1]], None, None, r"input_ids\[0, 0\] is -1"),
    "too long": ([[1] * 65], None, None, "65 tokens together, more than the model's context of 64"),
    "negative num_logits": ([[1]], None, -1, "num_logits=-1 must be an integer of at least 0"),
    "float64 past": (
        [[1]],
        (np.zeros((2, 1, 2, 3, 8)), np.zeros((2, 1, 2, 3, 8))),
        None,
        "past keys must be a float32 array, got float64",
    ),
    "other batch": (
        [[1], [1]],
        (np.zeros((2, 1, 2, 3, 8), np.float32),) * 2,
        None,
        r"\(2, 2, 2, 3, 8\), got \(2, 1, 2, 3, 8\)",
    ),
    "values too short": (
        [[1]],
        (np.zeros((2, 1, 2, 3, 8), np.float32), np.zeros((2, 1, 2, 2, 8), np.float32)),
        None,
        "past values must have shape",
    ),
    "flat past": ([[1]], (np.zeros(3, np.float32),) * 2, None, "past keys must have shape"),
    "past of one": ([[1]], (np.zeros(3, np.float32),), None, "past must be"),
    "long past": (
        [[1]],
        (np.zeros((2, 1, 2, 64, 8), np.float32),) * 2,
        None,
        "65 tokens together",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_wrong_arguments_are_refused(decoder: Decoder, name: str) -> None:
    input_ids, past, num_logits, message = BAD_CALLS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        decoder.forward(input_ids, past, num_logits=num_logits)


def test_generate_and_init_refuse_wrong_arguments(decoder: Decoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input_ids must have shape \[sequence\]"):
        decoder.generate([[1]], 3)
    with pytest.raises(ValueError, match="max_new_tokens=0 must be an integer of at least 1"):
        decoder.generate([1], 0)
    path = cached_onnx(TinyModel().write(tmp_path / "tiny.gguf"), cache_dir=tmp_path)
    with pytest.raises(ValueError, match="threads=0 must be an integer of at least 1"):
        Decoder(path, threads=0)
    with pytest.raises(FileNotFoundError, match="build it with cached_onnx"):
        Decoder(tmp_path / "no.onnx")
    model = onnx.load(str(path), load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, metadata | {"graph_version": "0"})
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="not a decoder of graph version"):
        Decoder(path)

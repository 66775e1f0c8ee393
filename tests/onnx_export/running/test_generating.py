"""Text: greedy tokens beside an oracle, batches beside single rows, prefixes reused, ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nsq_ref import Scheme
from onnx_export.models.attention_forms import (
    AttentionForm,
    GroupedAttention,
    PlainAttention,
    QuantizedAttention,
)
from onnx_export.models.built import cached_onnx
from onnx_export.models.decoder import Decoder
from onnx_export.running import Generated, Model, Sampling, Session
from tests.support import lookup_decoder
from tests.support.llama_oracle import IDS, TinyModel
from tests.support.lookup_decoder import HEAD_DIM, VOCAB

TINY = TinyModel(head_dim=16, explicit_head_dim=True)
# Blocks longer than the context: nothing is sealed, and the cache is what was computed.
UNSEALED = replace(Scheme.named("streaming4"), block_size=64)
FORMS: dict[str, AttentionForm] = {
    "plain": PlainAttention(),
    "gqa": GroupedAttention(),
    "nsq": QuantizedAttention(UNSEALED, replace(UNSEALED, bits=3)),
}
PROMPTS = [IDS, IDS[:2], [7, 7, 8, 30]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module", params=FORMS)
def tiny(request: pytest.FixtureRequest, folder: Path) -> Model:
    path = TINY.write(folder / "tiny.gguf")
    return Model(cached_onnx(path, cache_dir=folder, attention=FORMS[request.param]))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Sealed blocks, whose bytes do not depend on how tokens are read."""
    folder = tmp_path_factory.mktemp("lookup")
    return Model(lookup_decoder.quantized(folder, context_length=40))


def texts(results: list[Generated]) -> list[list[int]]:
    return [text.tokens.tolist() for text in results]


def test_greedy_tokens_are_those_of_an_independent_forward_pass(tiny: Model) -> None:
    (found,) = Session(tiny).generate(IDS, 12)
    text = list(IDS)
    for token in found.tokens:
        logits, _, _ = TINY.forward(text)
        assert token == logits[-1].argmax()
        text.append(int(token))
    assert (len(found.tokens), found.tokens.dtype) == (12, np.int64)
    assert found.ended_by == "max_new_tokens"


def test_logits_are_those_of_an_independent_forward_pass(tiny: Model) -> None:
    session = Session(tiny, batch=2)
    expected, _, _ = TINY.forward(IDS)
    for number, (start, stop) in enumerate([(0, 5), (5, 6), (6, 13)]):
        if number == 2 and tiny.padding == "right" and not any(tiny.layout.schemes):
            break  # GroupQueryAttention reads several tokens after others for one row only
        logits = session.forward([IDS[start:stop]] * 2, num_logits=None)
        assert np.abs(logits - expected[start:stop]).max() < 1e-5 * np.abs(expected).max()


def test_the_decoder_is_the_float_case(folder: Path) -> None:
    path = cached_onnx(TINY.write(folder / "tiny.gguf"), cache_dir=folder)
    decoder, session = Decoder(path), Session(path)
    assert texts(session.generate(IDS, 20)) == [decoder.generate(IDS, 20).tokens.tolist()]
    logits, keys, values = decoder.forward([IDS])
    session.crop(0)
    assert (session.forward(IDS, num_logits=None) == logits).all()
    for layer in range(2):
        assert (session.tensors()[f"past_key_values.{layer}.key"] == keys[layer]).all()
        assert (session.tensors()[f"past_key_values.{layer}.value"] == values[layer]).all()


def test_a_decoder_refuses_another_cache(folder: Path) -> None:
    path = cached_onnx(TINY.write(folder / "tiny.gguf"), cache_dir=folder, attention=FORMS["nsq"])
    with pytest.raises(ValueError, match=r"onnx_export\.running\.Session runs it"):
        Decoder(path)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, top_p=0.9, seed=3)])
def test_rows_of_a_batch_have_the_tokens_of_single_rows(
    tiny: Model, quantized: Model, sampling: Sampling
) -> None:
    for model in (tiny, quantized):
        prompts = [[token % VOCAB for token in prompt] for prompt in PROMPTS]
        if model.padding is None:
            prompts = [prompt[:2] for prompt in prompts]
        found = Session(model, batch=3).generate(prompts, 14, sampling=sampling)
        alone = [
            Session(model).generate(prompt, 14, sampling=sampling)[0].tokens.tolist()
            for prompt in prompts
        ]
        if sampling.temperature:
            assert texts(found)[0] == alone[0]  # rows draw from streams of their own
            assert texts(Session(model, batch=3).generate(prompts, 14, sampling=sampling)) == texts(
                found
            )
        else:
            assert texts(found) == alone


def test_rows_end_apart(tiny: Model, quantized: Model) -> None:
    for model in (tiny, quantized):
        prompts = [prompt[:2] for prompt in PROMPTS]
        free = texts(Session(model, batch=3).generate(prompts, 9))
        stop = free[1][2]
        session = Session(model, batch=3)
        found = session.generate(prompts, 9, stop_tokens=stop)
        for row, (text, ended_by) in enumerate(found):
            end = free[row].index(stop) + 1 if stop in free[row] else 9
            assert text.tolist() == free[row][:end]
            assert ended_by == ("stop_token" if stop in free[row] else "max_new_tokens")
            if model.skips_rows:  # the last token is not read, nor anything for a row that ended
                assert session.lengths[row] == 2 + len(text) - 1
        several = session.fork()
        several.crop(0)
        assert texts(several.generate(prompts, 9, stop_tokens=[VOCAB + 99, stop])) == texts(found)


@pytest.mark.parametrize(
    ("capacity", "room", "ended_by"), [(None, 40, "context_length"), (11, 16, "capacity")]
)
def test_the_end_of_the_room_ends_the_text(
    quantized: Model, capacity: int | None, room: int, ended_by: str
) -> None:
    """The last token needs no place. Rows have room apart."""
    session = Session(quantized, capacity=capacity, batch=2)
    assert session.limit == room
    first, second = session.generate([[1, 2, 3], [4]], 100)
    assert (first.ended_by, second.ended_by) == (ended_by, ended_by)
    assert (len(first.tokens), len(second.tokens)) == (room - 2, room)
    assert session.lengths == (room, room)
    with pytest.raises(ValueError, match=rf"row 0 has {room} tokens and input_ids 1 more"):
        session.forward([[1], [1]])
    single = Session(quantized, capacity=capacity).generate([4], 100)
    assert texts(single) == [second.tokens.tolist()]


@pytest.mark.parametrize("positions", [True, False])
def test_a_model_with_only_a_mask_is_padded_on_the_left(tmp_path: Path, positions: bool) -> None:
    model = Model(lookup_decoder.masked(tmp_path, positions=positions))
    assert (model.padding, model.skips_rows) == ("left", positions)
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
    alone = [Session(model).generate(prompt, 8)[0].tokens.tolist() for prompt in prompts]
    session = Session(model, batch=3)
    assert texts(session.generate(prompts, 8)) == alone
    assert session.lengths == (12, 8, 9)
    session.crop([5, 1, 2])  # as many of each row, to where they began
    assert session.lengths == (5, 1, 2)
    assert session.fork([2]).lengths == (2,)
    path = tmp_path / "state.safetensors"
    session.save(path)
    other = Session(model, batch=3)
    other.restore(path)
    assert other.lengths == (5, 1, 2)
    rows = [[9], [10], [11]]
    expected = [
        Session(model).forward([*prompt, *row]) for prompt, row in zip(prompts, rows, strict=True)
    ]
    found = other.forward(rows)
    for row in range(3):
        assert np.abs(found[row] - expected[row][0]).max() < 1e-4
    if not positions:
        with pytest.raises(ValueError, match="which this model cannot hide"):
            other.crop([6, 1, 3])
    else:
        other.crop([6, 1, 3])
        more = other.forward([[1, 2], [3, 4], [5, 6]])
        whole = Session(model).forward([*prompts[1], 3, 4])
        assert np.abs(more[1] - whole[0]).max() < 1e-4


def test_prefixes_are_reused(tiny: Model) -> None:
    fresh = texts(Session(tiny).generate([*IDS, 5, 6], 8))
    session = Session(tiny)
    session.generate([*IDS, 30, 31, 32], 8)
    session.crop(len(IDS))
    assert texts(session.generate([5, 6], 8)) == fresh


def test_forks_go_their_own_ways(tiny: Model, quantized: Model) -> None:
    for model in (tiny, quantized):
        prefix = [token % VOCAB for token in IDS[:11]]
        session = Session(model)
        session.forward(prefix)
        before = {name: array.copy() for name, array in session.tensors().items()}
        one, other = session.fork(), session.fork([0])
        ways = texts(one.generate([1], 9)), texts(other.generate([2], 9))
        assert ways == tuple(texts(Session(model).generate([*prefix, t], 9)) for t in (1, 2))
        assert ways[0] != ways[1]
        for name, array in session.tensors().items():
            assert array.tobytes() == before[name].tobytes()
        fan = session.fork([0, 0])
        assert texts(fan.generate([[1], [2]], 9)) == [way[0] for way in ways]
        assert texts(session.generate([1], 9)) == ways[0]


def test_pretended_tokens_leave_nothing_behind(tiny: Model, quantized: Model) -> None:
    for model in (tiny, quantized):
        session = Session(model, batch=2)
        if any(tensor.grows for tensor in model.layout.tensors):
            with pytest.raises(ValueError, match="grows; only a cache of fixed size can pretend"):
                session.pretend(5)
            continue
        session.pretend(21)
        assert session.lengths == (21, 21)
        ones = sum(int(array.sum()) * array.itemsize for array in session.tensors().values())
        other = Session(model, batch=2)
        other.forward([[1] * 21] * 2)
        assert ones == session.memory().used == other.memory().used
        session.forward([[2], [3]])
        session.crop(0)
        assert texts(session.generate([IDS[:2]] * 2, 9)) == texts(
            Session(model, batch=2).generate([IDS[:2]] * 2, 9)
        )


def test_a_state_goes_through_a_file(tiny: Model, quantized: Model, tmp_path: Path) -> None:
    for model in (tiny, quantized):
        session = Session(model)
        session.forward([token % VOCAB for token in IDS])
        session.save(tmp_path / "state.safetensors")
        other = Session(model, capacity=32)  # of another size
        other.restore(tmp_path / "state.safetensors")
        assert texts(other.generate([3], 9)) == texts(session.generate([3], 9))


def test_what_was_yielded_is_kept(quantized: Model) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary of 24"):
        Session(quantized).stream([VOCAB], 3)  # at once
    session = Session(quantized)
    stream = session.stream([1, 2], 100)
    kept = [next(stream) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert [kept] == texts(Session(quantized).generate([1, 2], 3))
    assert session.lengths == (4,)  # all but the last of them were read
    # What comes next is what would have come.
    assert (
        texts(session.generate([kept[-1]], 5))[0]
        == (texts(Session(quantized).generate([1, 2], 8))[0][3:])
    )


def bad(function: str, *arguments: Any, **options: Any) -> Any:
    return function, arguments, options


REFUSED = {
    "other rows": (bad("forward", [[1], [2], [3]]), "with 2 rows of at least one token"),
    "one row": (bad("forward", [1, 2]), "with 2 rows"),
    "no tokens": (bad("forward", [[], []]), "at least one token"),
    "one empty row": (bad("forward", [[1], []]), "at least one token"),
    "floats": (bad("forward", [[1.0], [2.0]]), "input_ids has dtype float64; give integers"),
    "ragged floats": (bad("forward", [[1.0], [2, 3]]), r"input_ids\[0\] has dtype float64"),
    "a string": (bad("forward", "ab"), "input_ids"),
    "unknown": (bad("forward", [[1], [VOCAB]]), r"input_ids\[1\]\[0\] is 24, outside"),
    "negative": (bad("forward", [[1], [-1]]), r"input_ids\[1\]\[0\] is -1"),
    "too many": (bad("forward", [[1] * 41, [2]]), r"row 0 has 9 tokens and input_ids 41 more"),
    "ragged logits": (bad("forward", [[1, 2], [2]], num_logits=2), "num_logits=2 of rows"),
    "negative logits": (bad("forward", [[1], [2]], num_logits=-1), "num_logits=-1"),
    "no new tokens": (bad("generate", [[1], [2]], 0), "max_new_tokens=0"),
    "half a token": (bad("generate", [[1], [2]], 1.5), r"max_new_tokens=1\.5 is not an integer"),
    "stop words": (bad("generate", [[1], [2]], 5, stop_tokens="end"), "stop_tokens"),
    "no sampling": (bad("generate", [[1], [2]], 5, sampling=0.7), "must be a Sampling, got float"),
    "a stream of two": (bad("stream", [[1], [2]], 5), "the session has batch=2"),
    "crop beyond": (bad("crop", 10), r"length\[0\]=10 must be an integer from 0 to 9"),
    "crop of three": (bad("crop", [1, 1, 1]), r"length has shape \[3\]; give 2"),
    "crop by half": (bad("crop", 0.5), "is not an integer"),
    "no rows": (bad("fork", []), "rows is empty"),
    "other rows of a fork": (bad("fork", [2]), r"rows\[0\]=2"),
    "resume": (bad("resume", {}), "does not only grow"),
    "too much pretended": (bad("pretend", 41), "length=41 must be an integer from 0 to 40"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_nothing(quantized: Model, name: str) -> None:
    (function, arguments, options), message = REFUSED[name]
    session = Session(quantized, batch=2)
    session.forward([list(range(9)), list(range(4, 13))])
    before = {name: array.copy() for name, array in session.tensors().items()}
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(session, function)(*arguments, **options)
    assert session.lengths == (9, 9)
    for tensor, array in session.tensors().items():
        assert array.tobytes() == before[tensor].tobytes()


def test_rows_of_one_length_only(folder: Path) -> None:
    path = cached_onnx(TINY.write(folder / "tiny.gguf"), cache_dir=folder)
    session = Session(path, batch=2)
    with pytest.raises(ValueError, match=r"rows of \[2, 1\] tokens.* rows of one length"):
        session.forward([[1, 2], [3]])
    session.forward([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="rows of this model are equally long"):
        session.crop([2, 1])
    assert session.lengths == (2, 2)


def test_arrays_of_other_frameworks(quantized: Model) -> None:
    ids: npt.NDArray[Any] = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    session = Session(quantized, batch=2)
    found = session.forward(ids, num_logits=np.int64(2))  # type: ignore[arg-type]
    assert found.shape == (2, 2, VOCAB)
    assert session.tensors()["past_key_values.0.key.tail"].shape[-1] == HEAD_DIM
    ragged = session.forward([ids[0], ids[1][:1]])
    assert ragged.shape == (2, 1, VOCAB)
    assert session.lengths == (6, 4)

"""Conversations: each turn reads what is new, and answers as if it had read everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from onnx_export.models.attention_forms import GroupedAttention
from onnx_export.models.built import build_onnx
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.json_tokenizer import JsonTokenizer, read_tokenizer
from onnx_export.running import Model, Sampling, Session
from onnx_export.running.conversation import Conversation
from tests.support.chat import chat_gguf

SAMPLING = Sampling(1.5, top_p=0.95, seed=3)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    return read_tokenizer(chat_gguf(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    build_onnx(GGUFFile(chat_gguf(folder)), folder, attention=GroupedAttention())
    return Model(folder / "model.onnx", threads=1)


def fresh(model: Model, words: JsonTokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    ids = words.encode_chat(messages)
    return list(Session(model).stream(ids, 9, stop_tokens=words.stop_tokens, sampling=SAMPLING))


def test_turns_are_those_of_who_reads_everything(model: Model, words: JsonTokenizer) -> None:
    talk = Conversation(Session(model), words.encode_chat, words.decode, "be on time")
    read: list[int] = []
    forward = talk.session._cache.read
    talk.session._cache.read = (  # type: ignore[method-assign]
        lambda rows, count: (read.append(len(rows[0])), forward(rows, count))[1]
    )
    for text in ("on the hour", "the other", "th"):
        before = list(talk.messages)
        start = talk.read
        read.clear()
        found = list(talk.answer(text, 9, stop_tokens=words.stop_tokens, sampling=SAMPLING))
        said = [*before, {"role": "user", "content": text}]
        assert found == fresh(model, words, said)
        answer = words.decode([token for token in found if token not in words.stop_tokens])
        assert talk.messages == [*said, {"role": "assistant", "content": answer}]
        ids = words.encode_chat(said)
        assert talk.read == len(ids) + len(found) - 1 == talk.session.lengths[0]
        if start:  # but for what an answer's text is in other tokens
            assert read[0] < len(ids) // 2


def test_an_answer_that_is_cut_is_part_of_it(model: Model, words: JsonTokenizer) -> None:
    talk = Conversation(Session(model), words.encode_chat, words.decode)
    answer = talk.answer("on", 9, sampling=SAMPLING)
    begun = [next(answer), next(answer)]
    answer.close()
    assert talk.messages[1] == {"role": "assistant", "content": words.decode(begun)}
    assert talk.read == talk.session.lengths[0]
    found = list(talk.answer("the", 9, stop_tokens=words.stop_tokens, sampling=SAMPLING))
    assert found == fresh(model, words, talk.messages[:3])


def test_what_is_refused_changes_nothing(model: Model, words: JsonTokenizer) -> None:
    talk = Conversation(Session(model, capacity=100), words.encode_chat, words.decode)
    list(talk.answer("on", 3))
    kept = list(talk.messages), talk.read
    with pytest.raises(ValueError, match="more than there is room for"):
        talk.answer("the " * 100, 3)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        talk.answer("the", 0)
    assert kept[0] == talk.messages
    list(talk.answer("the", 3))
    with pytest.raises(ValueError, match="batch=2; a conversation is one row"):
        Conversation(Session(model, batch=2), words.encode_chat, words.decode)


def test_a_cache_that_cannot_go_back_is_read_anew(model: Model, words: JsonTokenizer) -> None:
    session = Session(model)

    def refuse(length: object) -> None:
        raise ValueError(f"{length} is no place to go back to")

    session.crop = refuse  # type: ignore[method-assign]
    talk = Conversation(session, words.encode_chat, words.decode)
    list(talk.answer("on", 9, sampling=SAMPLING))
    talk.messages.clear()
    found = list(talk.answer("the", 9, stop_tokens=words.stop_tokens, sampling=SAMPLING))
    assert talk.session is not session
    assert found == fresh(model, words, talk.messages[:1])


def test_the_folder_is_enough(tmp_path: Path, words: JsonTokenizer) -> None:
    assert words.chat_template is not None
    lone = read_tokenizer(chat_gguf(tmp_path, template=None))
    with pytest.raises(ValueError, match="the model has no chat template"):
        lone.encode_chat([])

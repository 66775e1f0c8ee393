"""Haystacks: what is in them and where, and what counts as found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnx_export.evaluation.needle import (
    FORMS,
    NAMES,
    Haystack,
    Question,
    haystack,
    measure_needles,
)
from onnx_export.models.decoder import Decoder, KeyValueCache
from tests.support.llama_oracle import IDS, TinyModel

TEXT = " ".join(f"This is sentence {number} of many." for number in range(200))
Float = NDArray[np.float32]


def encode(text: str) -> NDArray[np.int64]:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)


def decode(tokens: NDArray[np.int64]) -> str:
    return bytes(tokens.tolist()).decode()


@given(
    st.integers(700, 4000),
    st.lists(st.floats(0, 1), min_size=1, max_size=5).map(sorted),
    st.sampled_from(list(FORMS)),
    st.integers(0, 99),
)
def test_needles_are_where_they_were_put_and_questions_are_answered(
    length: int, depths: list[float], name: str, seed: int
) -> None:
    form = FORMS[name]
    made = haystack(encode, TEXT, length, depths, form=form, seed=seed)
    text = decode(made.tokens)
    assert len(made.tokens) == length
    assert [asked.depth for asked in made.questions] == depths
    places = []
    for asked in made.questions:
        (who,) = [one for one in NAMES if form.question.format(name=one) == decode(asked.tokens)]
        needle = form.needle.format(name=who, number=decode(asked.answer).strip())
        assert text.count(needle) == 1
        places.append(text.index(needle))
    assert places == sorted(places)
    hay = length - sum(len(form.needle.format(name="", number=1234)) + 8 for _ in depths)
    for place, depth, before in zip(places, depths, range(len(depths)), strict=True):
        assert abs(place - depth * hay) < 80 + 50 * before, "within a sentence of its depth"
    for asked in made.questions:
        text = text.replace(form.needle.format(
            name=next(n for n in NAMES if form.question.format(name=n) == decode(asked.tokens)),
            number=decode(asked.answer).strip()), "")  # fmt: skip
    assert TEXT.startswith(text), "the rest is the text"


def test_found_is_what_greedy_decoding_writes(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("needle")
    decoder = Decoder.from_gguf(TinyModel().write(folder / "tiny.gguf"), cache_dir=folder)
    asked = np.array([7, 8], np.int64)
    written = decoder.generate([*IDS, 7, 8], 3).tokens
    right, wrong = np.array(written), np.array([*written[:2], (written[2] + 1) % 40])
    made = Haystack(
        np.array(IDS), tuple(Question(asked, answer.astype(np.int64), 0.5)
                             for answer in (right, wrong))
    )  # fmt: skip

    def forgetful(keys: Float, values: Float) -> KeyValueCache:
        return keys, -values

    answers = measure_needles(decoder, [made], {"forgetful": forgetful})
    assert [one.found for one in answers["float32"][0]] == [True, False]
    assert answers["float32"][0][0].nll < answers["float32"][0][1].nll
    assert not answers["forgetful"][0][0].found, "the transform must be felt"
    probabilities = []
    for end in range(3):
        logits, _, _ = decoder.forward([[*IDS, 7, 8, *written[:end]]])
        row = logits[0, -1].astype(np.float64)
        probabilities.append(np.exp(row[written[end]]) / np.exp(row).sum())
    expected = -np.log(probabilities).mean()
    assert answers["float32"][0][0].nll == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("length", "depths", "wrong"),
    [
        (9000, [0.5], "text has .* tokens, and length=9000"),
        (30, [0.5], "give a longer text or another length"),
        (900, [], "depths must be 1 to 16 numbers, got 0"),
        (900, [0.9, 0.1], "must ascend from 0 to 1"),
        (900, [1.5], "must ascend from 0 to 1"),
    ],
)
def test_what_cannot_be_made_is_refused(length: int, depths: list[float], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        haystack(encode, TEXT, length, depths)


def test_a_haystack_that_is_longer_than_the_context_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("needle")
    decoder = Decoder.from_gguf(TinyModel().write(folder / "tiny.gguf"), cache_dir=folder)
    question = Question(np.array([1]), np.array([2]), 0.0)
    with pytest.raises(ValueError, match="haystack 0"):
        measure_needles(decoder, [Haystack(np.ones(63, np.int64), (question,))], {})

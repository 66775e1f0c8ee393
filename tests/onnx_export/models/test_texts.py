"""The State of the Union addresses in the package."""

from __future__ import annotations

import itertools
from importlib import resources

import numpy as np
import pytest

from onnx_export.models.texts import ADDRESSES, REPORTING_START, passages, read_address
from onnx_export.models.tokenizer import Tokenizer


def test_the_files_are_those_of_the_list_and_clean() -> None:
    folder = resources.files("onnx_export") / "data"
    files = {file.name for file in folder.iterdir() if file.name.endswith(".txt")}
    assert files == {f"{name}.txt" for name in ADDRESSES}
    texts = [read_address(name) for name in ADDRESSES]
    assert sum(len(text.encode()) for text in texts) < 200_000
    for text in texts:
        assert not set(text) & set("[]<>\r\t\u00a0\ufffd")
        assert all(len(paragraph.split()) > 2 for paragraph in text.split("\n\n"))
        assert "  " not in text
        assert "\n\n\n" not in text
        assert text.endswith("\n")
    source = (folder / "SOURCE.md").read_text(encoding="utf-8")
    assert all(f"`{name}.txt`" in source for name in ADDRESSES)


def test_passages_do_not_overlap(smollm2_tokenizer: Tokenizer) -> None:
    length = 1281
    found = passages(smollm2_tokenizer, length, 24)
    assert found.shape == (24, length)
    assert found.dtype == np.int64
    texts = {name: smollm2_tokenizer.encode(read_address(name)) for name in ADDRESSES}
    places = []
    for passage in found:
        for name, tokens in texts.items():
            windows = np.lib.stride_tricks.sliding_window_view(tokens, length)
            for start in np.flatnonzero((windows == passage).all(axis=1)):
                places.append((name, int(start)))
    assert len(places) == 24
    assert [name for name, _ in places[: len(ADDRESSES)]] == list(ADDRESSES)
    places.sort()
    for (name, start), (next_name, next_start) in itertools.pairwise(places):
        assert name != next_name or next_start >= start + length


def test_reporting_passages_are_none_of_the_development_set(smollm2_tokenizer: Tokenizer) -> None:
    """docs/fidelity.md: 18 passages of 641 tokens, and 37 others of what follows."""
    texts = [smollm2_tokenizer.encode(read_address(name)) for name in ADDRESSES]
    development = passages(smollm2_tokenizer, 641, 18)
    reporting = passages(smollm2_tokenizer, 641, 37, start=REPORTING_START)
    with pytest.raises(ValueError, match="holds 37 passages of 641 tokens, fewer than 38"):
        passages(smollm2_tokenizer, 641, 38, start=REPORTING_START)
    for which, text in enumerate(texts):
        np.testing.assert_array_equal(development[which], text[:641])
        np.testing.assert_array_equal(development[len(texts) + which], text[641:1282])
        np.testing.assert_array_equal(reporting[which], text[1282:1923])
    every = passages(smollm2_tokenizer, 641, 18 + 37)
    np.testing.assert_array_equal(np.concatenate([development, reporting]), every)
    fewer = passages(smollm2_tokenizer, 641, 16, start=REPORTING_START)
    np.testing.assert_array_equal(fewer, reporting[:16])


def test_wrong_arguments_are_refused(smollm2_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no address '1900-nobody'; choose one of 1801-jefferson"):
        read_address("1900-nobody")
    with pytest.raises(ValueError, match="fewer than 1000; give more text, or ask for fewer"):
        passages(smollm2_tokenizer, 1281, 1000)
    with pytest.raises(ValueError, match="length=0 must be an integer of at least 1"):
        passages(smollm2_tokenizer, 0, 1)
    with pytest.raises(ValueError, match="start=-1 must be an integer of at least 0"):
        passages(smollm2_tokenizer, 8, 1, start=-1)

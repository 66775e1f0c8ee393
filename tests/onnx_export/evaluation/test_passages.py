"""Passages that are evaluated begin as the tokenizer begins texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from onnx_export.evaluation.passages import choosing, reporting
from onnx_export.models.texts import ADDRESSES, REPORTING_START, cut, read_address

BEGIN, END = 1000, 1001


@dataclass
class Letters:
    """A tokenizer of code points, with tokens around every text."""

    before: Sequence[int] = ()
    after: Sequence[int] = ()

    def encode(self, text: str) -> NDArray[np.int64]:
        """The code points and what is around them."""
        return np.array([*self.before, *map(ord, text), *self.after], np.int64)


TEXTS = [Letters().encode(read_address(name)) for name in ADDRESSES]


@pytest.mark.parametrize("stride", [None, 50])
def test_each_begins_with_the_token_that_begins_texts(stride: int | None) -> None:
    found = reporting(Letters([BEGIN]), 101, 12, stride=stride)
    np.testing.assert_array_equal(found[:, 0], BEGIN)
    rest = [text[REPORTING_START:] for text in TEXTS]
    # Nothing is left out between a passage and the next.
    np.testing.assert_array_equal(found[:, 1:], cut(rest, 100, 12, stride=stride))
    np.testing.assert_array_equal(found[9, 1:], rest[0][stride or 100 :][:100])


def test_so_do_those_for_static_scales() -> None:
    found = choosing(Letters([BEGIN], [END]))
    assert found.shape == (4, 512)
    np.testing.assert_array_equal(found[:, 0], BEGIN)
    np.testing.assert_array_equal(found[2, 1:], TEXTS[2][:511])


def test_without_such_a_token_all_are_of_the_text(tmp_path: Path) -> None:
    rest = [text[REPORTING_START:] for text in TEXTS]
    for tokenizer in (Letters(), Letters(after=[END])):
        np.testing.assert_array_equal(reporting(tokenizer, 100, 12), cut(rest, 100, 12))
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh")
    assert reporting(Letters(), 4, 2, files=[path]).tolist() == [[97, 98, 99, 100], [*b"efgh"]]
    assert reporting(Letters([BEGIN]), 4, 2, files=[path]).tolist() == [
        [BEGIN, *b"abc"], [BEGIN, *b"def"],
    ]  # fmt: skip

"""Tokenizers whose merges are told by scores, against merging by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onnx_export.models.json_tokenizer import read_tokenizer
from onnx_export.models.scored_bpe import merges_by_score
from onnx_export.models.tokenizer import Tokenizer
from tests.support.llama_oracle import write_gguf

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# From the highest score to the lowest; some are never reached.
MERGED = ["▁t", "he", "▁the", "in", "an", "▁▁", "aa", "and", "▁an", "hen", "the", "éa"]
LETTERS = [*"abdehint▁é.\t"]
TOKENS = ["<pad>", "<bos>", "<unk>", "\n\n", *BYTES, *MERGED, *LETTERS]
CONTROL, USER, BYTE, NORMAL = 3, 4, 6, 1
TYPES = [CONTROL] * 3 + [USER] + [BYTE] * 256 + [NORMAL] * (len(MERGED) + len(LETTERS))
IDS = {token: index for index, token in enumerate(TOKENS)}


def write(path: Path, **changes: object) -> Path:
    """A GGUF file with the tokenizer above, after these changes of its keys; None removes one."""
    keys: dict[str, object] = {
        "model": "llama",
        "tokens": TOKENS,
        "token_type": TYPES,
        "scores": [-1000.0] * 4 + [0.0] * 256 + [-float(i) for i in range(len(TOKENS) - 260)],
        "bos_token_id": 1,
        "add_bos_token": True,
        "add_space_prefix": False,
    } | changes
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    return write_gguf(path, "gemma3", named, {})


def encode_by_hand(text: str) -> list[int]:
    """Cut whole tokens out, then merge the pair whose token scores highest, leftmost first."""
    found = []
    for number, piece in enumerate(text.split("\n\n")):
        found += [IDS["\n\n"]] if number else []
        parts = list(piece.replace(" ", "▁"))
        while True:
            pairs = [a + b for a, b in itertools.pairwise(parts)]
            known = [(MERGED.index(pair), at) for at, pair in enumerate(pairs) if pair in MERGED]
            if not known:
                break
            _, at = min(known)
            parts[at : at + 2] = [pairs[at]]
        for part in parts:
            found += [IDS[part]] if part in IDS else [IDS[BYTES[one]] for one in part.encode()]
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write(tmp_path_factory.mktemp("scored") / "t.gguf"))


PIECES = [*"abdehint .\t\n\0zéÄ日", "the", "and ", "  ", "aaa"]


@given(text=st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
@settings(max_examples=200, deadline=None)
@example(text="and  the then\n\n\n\nthen aaa\tqzéa \0 日 \U0001f600")
def test_text_is_encoded_by_the_definition_and_given_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.tolist() == encode_by_hand(text)
    assert tokenizer.decode(ids) == text


def test_texts_begin_with_a_token_where_the_file_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "t.gguf")
    assert read_tokenizer(path).encode("the").tolist() == [1, IDS["the"]]
    write(path, add_bos_token=False)
    assert read_tokenizer(path).encode("").tolist() == []


def without(names: Iterable[str]) -> dict[str, object]:
    kept = [i for i, token in enumerate(TOKENS) if token not in names]
    return {
        "tokens": [TOKENS[i] for i in kept],
        "token_type": [TYPES[i] for i in kept],
        "scores": [0.0] * len(kept),
    }


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "a space before": ({"add_space_prefix": True}, "add_space_prefix' is not false"),
    "by default": ({"add_space_prefix": None}, "add_space_prefix' is not false"),
    "no scores": ({"scores": None}, "'tokenizer.ggml.scores' is missing"),
    "too few": ({"scores": [0.0, 1.0]}, rf"scores' are not {len(TOKENS)} numbers, one a token"),
    "no number": ({"scores": [float("nan")] * len(TOKENS)}, "scores' are not .* numbers"),
    "no byte": (without(["<0x41>"]), "the byte 0x41 has no token of its own"),
    "a byte that is none": ({"token_type": [NORMAL] * len(TOKENS)}, "the byte 0x00 has no token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_not_understood_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    path = write(tmp_path / "t.gguf", **changes)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(path)
    assert str(error.value).startswith(f"{path}: ")


def test_ways_to_one_token_are_in_the_order_of_ids() -> None:
    scores = {"b": 0.0, "ab": -1.0, "a": 0.0, "ba": -2.0, "aba": -3.0}
    pairs = [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "ba")]
    assert merges_by_score(scores) == pairs

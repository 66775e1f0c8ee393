"""Tokenizers rebuilt from GGUF files, against byte-pair encoding written out by hand."""

from __future__ import annotations

import itertools
import re
import string
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onnx_export.models.gguf import GGUFFile
from onnx_export.models.texts import ADDRESSES, read_address
from onnx_export.models.tokenizer import Tokenizer, byte_symbols
from tests.support.llama_oracle import write_gguf

# GPT-2's rule for ASCII; `smollm` cuts every digit out first.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}"
    r"| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")

SYMBOLS = byte_symbols()
BYTES = {symbol: byte for byte, symbol in enumerate(SYMBOLS)}
MERGES = [
    ("1", "9"), ("19", "4"), ("194", "5"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ"),
    ("Ġ", "1"), ("i", "n"), ("'", "s"), ("'", "S"), ("Ċ", "Ċ"), ("!", "Ċ"), ("(", "the"),
    (".", "."), ("Ã", "©"), ("Ã", "¤"), ("c", "a"), ("ca", "f"), ("Ġ", "ĠĠ"),
]  # fmt: skip
TOKENS = [
    "<|end|>", "<think>", *SYMBOLS, *dict.fromkeys(left + right for left, right in MERGES),
    "th in",
]  # fmt: skip


def write_tokenizer(path: Path, pre: str, **changes: object) -> Path:
    """A GGUF file with the tokenizer above, after these changes of its keys; None removes one."""
    keys: dict[str, object] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": TOKENS,
        "token_type": [3, 4] + [1] * (len(TOKENS) - 2),
        "merges": [f"{left} {right}" for left, right in MERGES],
        "eos_token_id": 0,
    } | changes
    named = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    return write_gguf(path, "llama", named, {})


def encode_by_hand(
    text: str, pre: str, tokens: list[str], merges: dict[tuple[str, str], int]
) -> list[int]:
    """Byte-pair encoding by its definition: split, then merge the pair of the lowest rank."""
    ids = {token: index for index, token in enumerate(tokens)}
    if pre == "smollm":
        pieces = [
            piece
            for part in re.split(r"([0-9])", text)
            for piece in re.findall(r"[0-9]" if part.isdigit() else GPT2, part)
        ]
    else:
        rule = {"gpt-2": GPT2, "llama-bpe": LLAMA3, "qwen2": QWEN2}[pre]
        pieces = re.findall(rule, text)
    assert "".join(pieces) == text
    result = []
    for piece in pieces:
        parts = [SYMBOLS[byte] for byte in piece.encode()]
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in merges]:
            best = min(pairs, key=merges.__getitem__)
            at = next(i for i, pair in enumerate(itertools.pairwise(parts)) if pair == best)
            parts[at : at + 2] = ["".join(best)]
        result += [ids[part] for part in parts]
    return result


@pytest.fixture(scope="module", params=["smollm", "gpt-2", "llama-bpe", "qwen2"])
def small(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Tokenizer]:
    path = tmp_path_factory.mktemp("tokenizer") / "t.gguf"
    return request.param, Tokenizer(write_tokenizer(path, request.param))


RANKS = {pair: rank for rank, pair in enumerate(MERGES)}
ASCII = st.text(
    st.sampled_from(string.ascii_letters[:6] + "tThhees1945  \n\n\r\t'().,!<|"), max_size=40
)


@given(text=ASCII)
@settings(max_examples=300, deadline=None)
@example(text="in 1945,  the\n\n 19450 (the'S  \r\n the")
def test_ascii_is_encoded_by_the_definition(small: tuple[str, Tokenizer], text: str) -> None:
    pre, tokenizer = small
    assert tokenizer.encode(text).tolist() == encode_by_hand(text, pre, TOKENS, RANKS)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=300, deadline=None)
@example(text="<|end|> in\r\n\r\n  <think>th'S 1945x² Ⅻ ٣ \0\x7f é e\u0301 日本 \U0001f600\ufeff")
def test_decoding_gives_the_text_back(small: tuple[str, Tokenizer], text: str) -> None:
    pre, tokenizer = small
    expected = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
    assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_digits_are_split_as_the_rule_says(tmp_path: Path) -> None:
    pieces = {}
    for pre in ("smollm", "gpt-2", "llama-bpe", "qwen2"):
        tokenizer = Tokenizer(write_tokenizer(tmp_path / "t.gguf", pre))
        pieces[pre] = [TOKENS[token] for token in tokenizer.encode("the 1945")]
    assert pieces == {
        "smollm": ["the", "Ġ", "1", "9", "4", "5"],
        "gpt-2": ["the", "Ġ", "1945"],
        "llama-bpe": ["the", "Ġ", "194", "5"],
        "qwen2": ["the", "Ġ", "1", "9", "4", "5"],
    }


def test_control_and_user_defined_tokens_are_whole(small: tuple[str, Tokenizer]) -> None:
    _, tokenizer = small
    ids = tokenizer.encode("<|end|><think>the<|en")
    assert ids[:2].tolist() == [0, 1]
    assert tokenizer.decode(ids) == "<|end|><think>the<|en"
    assert (tokenizer.eos_token_id, tokenizer.vocab_size) == (0, len(TOKENS))
    assert ids.dtype == np.int64


def test_llama3_keeps_a_piece_that_is_a_token(tmp_path: Path) -> None:
    tokens = [*TOKENS, "cab"]  # a token that no merge leads to
    types = [3, 4] + [1] * (len(tokens) - 2)
    path = tmp_path / "t.gguf"
    for pre, expected in (("llama-bpe", ["cab"]), ("qwen2", ["ca", "b"])):
        tokenizer = Tokenizer(write_tokenizer(path, pre, tokens=tokens, token_type=types))
        assert [tokens[token] for token in tokenizer.encode("cab")] == expected


BAD = {
    "other rule": ({"pre": "deepseek-llm"}, "'tokenizer.ggml.pre' is 'deepseek-llm'; supp"),
    "default rule": ({"pre": "default"}, "'tokenizer.ggml.pre' is 'default'; supported are"),
    "no rule": ({"pre": None}, "'tokenizer.ggml.pre' is missing"),
    "other kind": ({"model": "t5"}, "only BPE, byte-level \\('gpt2'\\) or by scores"),
    "no model": ({"model": None}, "'tokenizer.ggml.model' is missing"),
    "no tokens": ({"tokens": None}, "'tokenizer.ggml.tokens' is missing"),
    "numbers as tokens": ({"tokens": [1, 2]}, "'tokenizer.ggml.tokens' has the wrong type"),
    "no types": ({"token_type": None}, "'tokenizer.ggml.token_type' is missing"),
    "too few types": ({"token_type": [1, 1]}, f"has 2 items for {len(TOKENS)} tokens"),
    "no merges": ({"merges": None}, "'tokenizer.ggml.merges' is missing"),
    "merge of no token": ({"merges": ["t h", "q z"]}, "item 1 of 'tokenizer.ggml.merges' is 'q z'"),
    "merge of one part": ({"merges": ["th"]}, "item 0 of 'tokenizer.ggml.merges' is 'th'"),
    "token twice": ({"tokens": [*TOKENS[:-1], "a"]}, "lists a token twice"),
    "eos outside": ({"eos_token_id": 9999}, "'tokenizer.ggml.eos_token_id' is 9999, not one of"),
    "eos as text": ({"eos_token_id": "x"}, "'tokenizer.ggml.eos_token_id' is 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_other_tokenizers_are_refused(name: str, tmp_path: Path) -> None:
    changes, message = BAD[name]
    path = write_tokenizer(tmp_path / "t.gguf", **({"pre": "smollm"} | changes))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(path)
    assert str(error.value).startswith(f"{path}: ")


def test_bytes_that_the_vocabulary_lacks_are_refused(tmp_path: Path) -> None:
    tokens = [token for token in TOKENS if token != SYMBOLS[4]]
    path = tmp_path / "t.gguf"
    types = [3, 4] + [1] * (len(tokens) - 2)
    tokenizer = Tokenizer(write_tokenizer(path, "smollm", tokens=tokens, token_type=types))
    assert tokenizer.decode(tokenizer.encode("a\x05")) == "a\x05"
    with pytest.raises(ValueError, match="text holds the byte 0x04, which this vocabulary lacks"):
        tokenizer.encode("a\x04")


@pytest.mark.parametrize("token", [-1, len(TOKENS)])
def test_ids_outside_the_vocabulary_are_refused(small: tuple[str, Tokenizer], token: int) -> None:
    with pytest.raises(ValueError, match=rf"token_ids\[1\] is {token}, outside the vocabulary"):
        small[1].decode([0, token])


def test_smollm2_encodes_real_text_by_the_definition(
    smollm2: Path, smollm2_tokenizer: Tokenizer
) -> None:
    metadata = GGUFFile(smollm2).metadata
    ranks = {
        tuple(merge.split(" ")): rank
        for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])
    }
    text = "".join(read_address(name)[:6000] for name in ADDRESSES).replace("—", "--")
    text += "In 1790,  13 States.\n\n\n 3,929,214 \t people's  4th"
    expected = encode_by_hand(text, "smollm", metadata["tokenizer.ggml.tokens"], ranks)
    assert smollm2_tokenizer.encode(text).tolist() == expected


def test_smollm2_gives_every_address_back(smollm2_tokenizer: Tokenizer) -> None:
    assert smollm2_tokenizer.vocab_size == 49152
    assert smollm2_tokenizer.decode([smollm2_tokenizer.eos_token_id or 0]) == "<|im_end|>"
    for name in ADDRESSES:
        text = read_address(name)
        assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text)) == text

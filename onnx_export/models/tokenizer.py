"""BPE tokenizers, rebuilt from the vocabulary and the merges, or scores, in a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsq_ref.extras import extra
from onnx_export.models.chat_template import ChatTemplate
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.scored_bpe import scored_bpe

with extra("onnx", __name__):
    import gguf
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

# How Llama 3 and Qwen2 split text; they differ only in how many digits make one piece.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# Names of one rule, as llama.cpp has them; these models begin every text with a token.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_ENDINGS = ("eos", "eot", "eom")  # of a text, a turn, and a message
# Control tokens that end a turn, where a file only says what ends a text.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


def byte_symbols() -> list[str]:
    """Return the characters by which byte-level BPE writes the bytes 0 to 255.

    Returns
    -------
    list of str
        256 different printable characters; printable ASCII and Latin-1 stand for themselves.

    Examples
    --------
    >>> byte_symbols()[ord("A")], byte_symbols()[ord(" ")]
    ('A', 'Ġ')
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]


class Tokenizer:
    """Tokenizer of a GGUF file; it keeps nothing of a call, so that threads may share one.

    Parameters
    ----------
    gguf_path : str or os.PathLike
        The GGUF file. Of byte-level BPE its ``tokenizer.ggml.pre``, the rule that splits text
        before the merges, must be one of ``smollm``, ``gpt-2``, ``llama-bpe`` (also ``llama3``,
        ``llama-v3``) and ``qwen2``; a wrong guess would tokenize wrongly without a sign of it. With
        ``qwen2``, which Qwen3 has too, text is normalized to NFC, as those models were trained;
        with the others decoding gives back exactly the text that was encoded. So it does with the
        tokenizer of Gemma, whose tokens have scores, unless the text holds a ``▁``.

    Attributes
    ----------
    vocab_size : int
        Number of tokens.
    eos_token_id : int or None
        The token that ends a text, or a turn of a chat model.
    stop_tokens : tuple of int
        All that end a text, a turn or a message, that one first.
    special_tokens : dict of str to str
        Texts of ``bos_token`` and ``eos_token``, where the file says which they are.
    template : str or None
        The chat template.

    Raises
    ------
    ValueError
        If the file is damaged, or its tokenizer is missing, inconsistent or of another kind.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> tokenizer = Tokenizer(tiny_gguf(tempfile.mkdtemp()))
    >>> tokenizer.encode("on the 4th")
    array([112, 111, 259,  33,  53, 257])
    >>> tokenizer.decode(tokenizer.encode("on the 4th"))
    'on the 4th'
    """

    def __init__(self, gguf_path: str | os.PathLike[str]) -> None:
        file = GGUFFile(gguf_path)
        kind = _metadata(file, "model", str)
        if kind not in ("gpt2", "llama"):
            raise ValueError(
                f"{file.path}: key 'tokenizer.ggml.model' is {kind!r}; only BPE, byte-level "
                "('gpt2') or by scores ('llama'), is supported"
            )
        tokens: list[str] = _metadata(file, "tokens", list)
        types = _metadata(file, "token_type", np.ndarray)
        if len(types) != len(tokens):
            raise ValueError(
                f"{file.path}: 'tokenizer.ggml.token_type' has {len(types)} items for "
                f"{len(tokens)} tokens; convert the model again"
            )
        vocabulary = {token: index for index, token in enumerate(tokens)}
        if len(vocabulary) != len(tokens):
            raise ValueError(
                f"{file.path}: 'tokenizer.ggml.tokens' lists a token twice; convert the model again"
            )
        self.vocab_size = len(tokens)
        named = {name: _token_id(file, name, len(tokens)) for name in ("bos", *_ENDINGS)}
        self.eos_token_id = named["eos"]
        turns = [vocabulary[text] for text in _TURN_ENDS if text in vocabulary]
        ends = [named[name] for name in _ENDINGS]
        ends += [token for token in turns if types[token] == gguf.TokenType.CONTROL]
        self.stop_tokens = tuple(dict.fromkeys(token for token in ends if token is not None))
        self.special_tokens = {
            f"{name}_token": tokens[token]
            for name in ("bos", "eos")
            if (token := named[name]) is not None
        }
        self.template = _optional(file, "tokenizer.chat_template", str)
        self._origin = f"the chat template of {file.path}"
        self._missing_bytes: set[int] = set()
        if kind == "llama":
            self._tokenizer = scored_bpe(
                file, vocabulary, types.tolist(), _scores(file, len(tokens))
            )
        else:
            self._missing_bytes.update(
                byte for byte, symbol in enumerate(byte_symbols()) if symbol not in vocabulary
            )
            self._tokenizer = _byte_level_bpe(file, vocabulary, _merges(file, vocabulary))
        control, user_defined = (
            [
                tokenizers.AddedToken(token, normalized=False)
                for token, token_type in zip(tokens, types.tolist(), strict=True)
                if token_type == wanted
            ]
            for wanted in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
        )
        self._tokenizer.add_special_tokens(control)
        self._tokenizer.add_tokens(user_defined)
        begins = file.metadata.get("tokenizer.ggml.pre") in _LLAMA3 and named["bos"] is not None
        if _optional(file, "tokenizer.ggml.add_bos_token", bool, default=begins):
            if named["bos"] is None:
                raise ValueError(
                    f"{file.path}: key 'tokenizer.ggml.bos_token_id' is missing, with which texts "
                    "begin; convert the model again"
                )
            first = tokens[named["bos"]]
            self._tokenizer.post_processor = processors.TemplateProcessing(
                single=[first, "$A"], special_tokens=[(first, named["bos"])]
            )

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the token ids of a text.

        The text of a control token, such as ``<|im_end|>``, becomes that token. No token is added
        at the beginning or the end.

        Parameters
        ----------
        text : str
            The text.

        Returns
        -------
        numpy.ndarray
            int64 ``[tokens]``.

        Raises
        ------
        ValueError
            If the vocabulary cannot express a byte of the text.

        Examples
        --------
        >>> import tempfile
        >>> from onnx_export.models.tiny import tiny_gguf
        >>> Tokenizer(tiny_gguf(tempfile.mkdtemp())).encode("<|endoftext|> the")
        array([  0, 259])
        """
        self.require_bytes(text)
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def require_bytes(self, text: str) -> None:
        """Refuse a text that the vocabulary cannot express.

        Raises
        ------
        ValueError
            If it lacks a byte of it.

        Examples
        --------
        >>> import tempfile
        >>> from onnx_export.models.tiny import tiny_gguf
        >>> Tokenizer(tiny_gguf(tempfile.mkdtemp())).require_bytes("all of them")
        """
        missing = self._missing_bytes.intersection(text.encode("utf-8"))
        if missing:
            raise ValueError(
                f"text holds the byte {min(missing):#04x}, which this vocabulary lacks; remove "
                "unusual control characters from it"
            )

    def chat_template(self) -> ChatTemplate | None:
        """Return how the model wants a conversation written down, if the file says so.

        Examples
        --------
        >>> import tempfile
        >>> from onnx_export.models.tiny import tiny_gguf
        >>> Tokenizer(tiny_gguf(tempfile.mkdtemp())).chat_template() is None
        True
        """
        if self.template is None:
            return None
        return ChatTemplate(self.template, self.special_tokens, self._origin)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of token ids, control tokens included.

        Parameters
        ----------
        token_ids : iterable of int
            Token ids.

        Returns
        -------
        str
            The text; bytes that are not UTF-8 become U+FFFD.

        Raises
        ------
        ValueError
            If an id is not in the vocabulary.

        Examples
        --------
        >>> import tempfile
        >>> from onnx_export.models.tiny import tiny_gguf
        >>> Tokenizer(tiny_gguf(tempfile.mkdtemp())).decode([259, 0])
        ' the<|endoftext|>'
        """
        ids = [int(token) for token in token_ids]
        for index, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token_ids[{index}] is {token}, outside the vocabulary of {self.vocab_size}"
                )
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def to_json(self) -> str:
        """Return the tokenizer as the ``tokenizer.json`` that other libraries read.

        Examples
        --------
        >>> import tempfile
        >>> from onnx_export.models.tiny import tiny_gguf
        >>> Tokenizer(tiny_gguf(tempfile.mkdtemp())).to_json()[:1]
        '{'
        """
        return self._tokenizer.to_str()


def _metadata(file: GGUFFile, key: str, kind: type) -> Any:
    full_key = f"tokenizer.ggml.{key}"
    file.value(full_key)  # which refuses a file that lacks it
    return _optional(file, full_key, kind)


def _optional(file: GGUFFile, key: str, kind: type, *, default: Any = None) -> Any:
    value = file.metadata.get(key, default)
    if value is not default and not isinstance(value, kind):
        raise ValueError(
            f"{file.path}: key {key!r} has the wrong type ({type(value).__name__}); "
            "convert the model again"
        )
    return value


def _token_id(file: GGUFFile, name: str, count: int) -> int | None:
    """Return which token has a part of its own, if the file says so."""
    key = f"tokenizer.ggml.{name}_token_id"
    token = file.metadata.get(key)
    if token is not None and not (type(token) is int and 0 <= token < count):
        raise ValueError(
            f"{file.path}: key {key!r} is {token!r}, not one of the {count} tokens; convert the "
            "model again"
        )
    return token


def _scores(file: GGUFFile, count: int) -> NDArray[np.float32]:
    scores: NDArray[np.float32] = _metadata(file, "scores", np.ndarray)
    if len(scores) != count or scores.dtype != np.float32 or np.isnan(scores).any():
        raise ValueError(
            f"{file.path}: 'tokenizer.ggml.scores' are not {count} numbers, one a token; convert "
            "the model again"
        )
    return scores


def _merges(file: GGUFFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Split the merges, and check that every part and every result is a token."""
    pairs = []
    for index, merge in enumerate(_metadata(file, "merges", list)):
        left, _, right = merge.partition(" ")
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise ValueError(
                    f"{file.path}: item {index} of 'tokenizer.ggml.merges' is {merge!r}, but "
                    f"{token!r} is not a token; convert the model again"
                )
        pairs.append((left, right))
    return pairs


def _byte_level_bpe(
    file: GGUFFile, vocabulary: dict[str, int], merges: list[tuple[str, str]]
) -> tokenizers.Tokenizer:
    """Return the tokenizer that splits text as ``tokenizer.ggml.pre`` says."""
    pre = _metadata(file, "pre", str)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre in ("smollm", "gpt-2"):
        splitter: pre_tokenizers.PreTokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=True
        )
        if pre == "smollm":
            splitter = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), splitter]
            )
    elif pre in (*_LLAMA3, "qwen2"):
        pattern = tokenizers.Regex(_SPLIT.replace("DIGITS", "{1,3}" if pre in _LLAMA3 else ""))
        splitter = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(pattern, behavior="isolated"), byte_level]
        )
    else:
        raise ValueError(
            f"{file.path}: key 'tokenizer.ggml.pre' is {pre!r}; supported are smollm, gpt-2, "
            "llama-bpe and qwen2"
        )
    # Llama 3 takes a piece that is a token as it is, whatever the merges would make of it.
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _LLAMA3)
    )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

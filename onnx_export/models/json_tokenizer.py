"""Tokenizers in the files of Hugging Face: ``tokenizer.json``, with the stop tokens beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsq_ref.extras import extra
from onnx_export.models.chat_template import CONFIG, ChatTemplate, read_chat_template
from onnx_export.models.tokenizer import Tokenizer

with extra("onnx", __name__):
    import tokenizers

__all__ = [
    "TOKENIZER", "JsonTokenizer", "context_length", "read_tokenizer", "tokenizer_files",
    "tokenizer_of",
]  # fmt: skip

GGUF = b"GGUF"  # how such files begin
TOKENIZER = "tokenizer.json"
GENERATION = "generation_config.json"
# Where exporters say which tokens end a text, and how long one may be; the first is believed.
CONFIGS = (GENERATION, "config.json", "genai_config.json")


class JsonTokenizer:
    """The tokenizer of a ``tokenizer.json``; it keeps nothing of a call.

    Parameters
    ----------
    path : str or os.PathLike

    Attributes
    ----------
    stop_tokens : tuple of int
        What ends a text, as the ``generation_config.json``, ``config.json`` or
        ``genai_config.json`` beside it says; empty where there is none.

    Raises
    ------
    ValueError
        If it is no such file.
    OSError
        If it cannot be read.

    Examples
    --------
    >>> JsonTokenizer("missing.json")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'missing.json'
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        data, folder = Path(path).read_bytes(), Path(path).parent
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except ValueError as error:
            raise ValueError(f"{path} is no tokenizer.json: {error}") from error
        # Some are saved as they were used to train.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.stop_tokens = _stop_tokens(folder)
        self._folder = folder

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """How a conversation is written down, as the files beside it say, or None.

        Raises
        ------
        ValueError
            If these files are not what they should be.
        """
        return read_chat_template(self._folder)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the token ids of a text, with those that the tokenizer puts around it.

        Examples
        --------
        See `read_tokenizer`.
        """
        return self._ids(text, whole=True)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> NDArray[np.int64]:
        """Return the token ids of a conversation, as `ChatTemplate.render` takes it.

        Raises
        ------
        ValueError
            If there is no chat template, or it refuses these messages.

        Examples
        --------
        See `read_tokenizer`.
        """
        if self.chat_template is None:
            raise ValueError(
                "the model has no chat template, in tokenizer_config.json or chat_template.jinja "
                "beside it; continue a text with nsq onnx run --no-chat"
            )
        text = self.chat_template.render(messages)
        # The template has written whatever stands around.
        return self._ids(text, whole=False)

    def _ids(self, text: str, *, whole: bool) -> NDArray[np.int64]:
        return np.array(self._tokenizer.encode(text, add_special_tokens=whole).ids, np.int64)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of token ids, without those that only control.

        Examples
        --------
        See `read_tokenizer`.
        """
        return self._tokenizer.decode([int(token) for token in token_ids])


class _OfGGUF(JsonTokenizer):
    """The tokenizer of a GGUF file, in the same words."""

    def __init__(self, path: Path) -> None:
        self._own = Tokenizer(path)
        self._tokenizer = tokenizers.Tokenizer.from_str(self._own.to_json())
        self.stop_tokens = self._own.stop_tokens

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        return self._own.chat_template()

    def _ids(self, text: str, *, whole: bool) -> NDArray[np.int64]:
        self._own.require_bytes(text)
        return super()._ids(text, whole=whole)


def read_tokenizer(path: str | os.PathLike[str]) -> JsonTokenizer:
    """Return the tokenizer of a file: a GGUF file or a ``tokenizer.json``.

    Raises
    ------
    ValueError
        If it is neither.
    OSError
        If it cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> tokenizer = read_tokenizer(tiny_gguf(tempfile.mkdtemp()))
    >>> tokenizer.decode(tokenizer.encode("the end")), tokenizer.stop_tokens
    ('the end', (0,))
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(4)
    return _OfGGUF(path) if start == GGUF else JsonTokenizer(path)


def tokenizer_of(
    model: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None
) -> JsonTokenizer:
    """Return the tokenizer of a model: of its GGUF file, or that beside it or in its folder.

    Parameters
    ----------
    model : str or os.PathLike
        A file or folder.
    tokenizer : str or os.PathLike, optional
        Another one than the model's own.

    Raises
    ------
    ValueError
        If there is none.
    OSError
        If it cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> tokenizer_of(tempfile.mkdtemp())
    Traceback (most recent call last):
    ValueError: there is no tokenizer '...tokenizer.json'; give one with --tokenizer
    """
    path, found = Path(model), None if tokenizer is None else Path(tokenizer)
    if found is None and path.is_file():
        with path.open("rb") as file:
            found = path if file.read(4) == GGUF else path.with_name(TOKENIZER)
    found = found or path / TOKENIZER
    if not found.is_file():
        raise ValueError(f"there is no tokenizer {str(found)!r}; give one with --tokenizer")
    return read_tokenizer(found)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files by which `JsonTokenizer` is what a tokenizer of a GGUF file is.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> list(tokenizer_files(Tokenizer(tiny_gguf(tempfile.mkdtemp()))))
    ['tokenizer.json', 'generation_config.json']
    """
    files = {TOKENIZER: tokenizer.to_json().encode()}
    if stops := tokenizer.stop_tokens:
        ends = stops[0] if len(stops) == 1 else list(stops)
        files[GENERATION] = json.dumps({"eos_token_id": ends}).encode()
    if tokenizer.template is not None:
        config = {**tokenizer.special_tokens, "chat_template": tokenizer.template}
        files[CONFIG] = json.dumps(config, indent=2).encode()
    return files


def context_length(folder: Path) -> int | None:
    """Return how many tokens a model was made for, as the configuration in its folder says.

    Raises
    ------
    ValueError
        If a file is no JSON.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> context_length(folder) is None
    True
    >>> _ = (folder / "config.json").write_text('{"max_position_embeddings": 2048}')
    >>> context_length(folder)
    2048
    """
    for values in _configurations(folder):
        for key in ("context_length", "max_position_embeddings"):
            if type(found := values.get(key)) is int and found > 0:
                return found
    return None


def _stop_tokens(folder: Path) -> tuple[int, ...]:
    for values in _configurations(folder):
        found = values.get("eos_token_id")
        found = found if isinstance(found, list) else [found]
        if all(type(token) is int for token in found):
            return tuple(found)
    return ()


def _configurations(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what the files of a folder say of a model."""
    for name in CONFIGS:
        try:
            values: Any = json.loads((folder / name).read_bytes())
        except FileNotFoundError:
            continue
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{folder / name} is no JSON: {error}") from error
        if isinstance(values, dict):
            yield values
            # genai's has the model apart, and those of models that see have their text apart.
            for part in ("model", "text_config"):
                if isinstance(values.get(part), dict):
                    yield values[part]

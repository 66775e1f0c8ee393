"""Passages of text: those that report, and, apart from them, those by which anything is chosen."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from onnx_export.models.texts import ADDRESSES, REPORTING_START, read_address

__all__ = ["choosing", "cut", "reporting"]

Ids = NDArray[np.int64]
CALIBRATING = 4  # passages
CALIBRATED = 512  # tokens of each


class Encodes(Protocol):
    """A tokenizer."""

    def encode(self, text: str) -> Ids:
        """Return the token ids of a text."""


def reporting(
    tokenizer: Encodes,
    length: int,
    count: int,
    *,
    stride: int | None = None,
    files: Iterable[str | os.PathLike[str]] = (),
) -> NDArray[np.int64]:
    """Return passages to report of: of files, or of what docs/fidelity.md keeps for that.

    Parameters
    ----------
    tokenizer : Encodes
    length, count : int
        Tokens of a passage, and how many passages.
    stride : int, optional
        From the start of a passage to that of the next of the same text; ``length`` by default.
    files : paths
        Texts in UTF-8.

    Raises
    ------
    OSError
        If a file cannot be read.
    ValueError
        If one is no text, or they hold too few passages.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> from onnx_export.models.tokenizer import Tokenizer
    >>> reporting(Tokenizer(tiny_gguf(tempfile.mkdtemp())), 641, 10).shape
    (10, 641)
    """
    texts = [tokenizer.encode(_read(Path(file))) for file in files]
    if not texts:
        texts = [tokenizer.encode(read_address(name))[REPORTING_START:] for name in ADDRESSES]
    return cut(texts, length, count, stride=stride)


def choosing(tokenizer: Encodes) -> NDArray[np.int64]:
    """Return passages for static scales, none of which is ever reported of.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> from onnx_export.models.tokenizer import Tokenizer
    >>> choosing(Tokenizer(tiny_gguf(tempfile.mkdtemp()))).shape
    (4, 512)
    """
    addresses = [tokenizer.encode(read_address(name))[:REPORTING_START] for name in ADDRESSES]
    return cut(addresses, CALIBRATED, CALIBRATING)


def cut(texts: Sequence[Ids], length: int, count: int, *, stride: int | None = None) -> Ids:
    """Cut passages, the first of every text before the second of any.

    Where no text is as long as a passage, all are joined.

    Raises
    ------
    ValueError
        If there are too few.

    Examples
    --------
    >>> cut([np.arange(5), np.arange(10, 14)], 2, 3)
    array([[ 0,  1],
           [10, 11],
           [ 2,  3]])
    """
    step = length if stride is None else stride
    longest = max((len(text) for text in texts), default=0)
    if longest < length and len(texts) > 1:
        texts = [np.concatenate(texts)]
        longest = len(texts[0])
    found = [
        text[begin : begin + length]
        for begin in range(0, max(longest - length, -1) + 1, step)
        for text in texts
        if begin + length <= len(text)
    ]
    if len(found) < count:
        raise ValueError(
            f"the text holds {len(found)} passages of {length} tokens, fewer than {count}; give "
            "more text, or ask for fewer or shorter ones"
        )
    return np.stack(found[:count])


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error

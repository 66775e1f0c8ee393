"""Texts, and the passages that are cut out of them.

Real English text for measurements is here: nine State of the Union addresses, 1791 to 2002.

The addresses are in the public domain; ``data/SOURCE.md`` says where they come from.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nsq_ref.arrays import as_integer

__all__ = [
    "ADDRESSES", "REPORTING_START", "Encodes", "cut", "passages", "read_address", "read_text",
    "require_tokens",
]  # fmt: skip

Ids = NDArray[np.int64]

ADDRESSES = (
    "1801-jefferson", "1863-lincoln", "1941-roosevelt", "2002-bush", "1791-washington",
    "1913-wilson", "1985-reagan", "1793-washington", "1964-johnson",
)  # fmt: skip
"""Names of the addresses; neighbours are far apart in time, so that any few of them differ."""

REPORTING_START = 2 * 641
"""Token of each address from which on it is for reporting (docs/fidelity.md). Schemes were chosen
by looking at what comes before: two passages of 512 tokens, 128 scored ones and one more."""


def read_address(name: str) -> str:
    """Return the text of one address, its paragraphs separated by empty lines.

    Parameters
    ----------
    name : str
        One of `ADDRESSES`.

    Returns
    -------
    str
        The text.

    Raises
    ------
    ValueError
        If there is no such address.

    Examples
    --------
    >>> read_address("1913-wilson").splitlines()[0]
    'Gentlemen of the Congress:'
    """
    if name not in ADDRESSES:
        raise ValueError(f"there is no address {name!r}; choose one of {', '.join(ADDRESSES)}")
    path = resources.files("onnx_export") / "data" / f"{name}.txt"
    return path.read_text(encoding="utf-8")


class Encodes(Protocol):
    """A tokenizer."""

    def encode(self, text: str) -> Ids:
        """Return the token ids of a text."""


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a file.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is no text in UTF-8, or empty.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "empty.txt")
    >>> path.touch()
    >>> read_text(path)
    Traceback (most recent call last):
    ValueError: ...empty.txt is empty; give a text of some hundred words
    """
    try:
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason}); convert it") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; give a text of some hundred words")
    return text


def require_tokens(ids: Ids, least: int, what: str = "the text") -> None:
    """Refuse a text that has fewer tokens than are needed.

    Examples
    --------
    >>> require_tokens(np.arange(3), 16)
    Traceback (most recent call last):
    ValueError: the text has 3 tokens; give one of at least 16
    """
    if len(ids) < least:
        raise ValueError(f"{what} has {len(ids)} tokens; give one of at least {least}")


def cut(texts: Sequence[Ids], length: int, count: int, *, stride: int | None = None) -> Ids:
    """Cut passages, the first of every text before the second of any.

    Where no text is as long as a passage, all are joined.

    Parameters
    ----------
    texts : sequence of numpy.ndarray
        int64 ``[tokens]`` each.
    length, count : int
        Tokens of a passage, and how many passages.
    stride : int, optional
        From the start of a passage to that of the next of the same text; ``length`` by default.

    Returns
    -------
    numpy.ndarray
        int64 ``[count, length]``.

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
    length, count = as_integer("length", length, least=1), as_integer("count", count, least=1)
    step = length if stride is None else as_integer("stride", stride, least=1)
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


def passages(tokenizer: Encodes, length: int, count: int, *, start: int = 0) -> Ids:
    """Cut passages out of the addresses that do not overlap, in the order of `ADDRESSES`.

    A smaller count gives the first of a larger one.

    Parameters
    ----------
    tokenizer : Encodes
        The tokenizer of the model that shall read them.
    length : int
        Tokens in a passage.
    count : int
        Number of passages.
    start : int
        First token of each address that is used: 0, or `REPORTING_START`.

    Returns
    -------
    numpy.ndarray
        int64 ``[count, length]``.

    Raises
    ------
    ValueError
        If the addresses do not hold so many passages of that length.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> from onnx_export.models.tokenizer import Tokenizer
    >>> tokenizer = Tokenizer(tiny_gguf(tempfile.mkdtemp()))
    >>> tokenizer.decode(passages(tokenizer, 24, 2)[1])
    'Fellow-Citizens of the Sena'
    """
    start = as_integer("start", start, least=0)
    addresses = [tokenizer.encode(read_address(name))[start:] for name in ADDRESSES]
    return cut(addresses, length, count)

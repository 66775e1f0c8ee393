"""Passages of text: those that report, and, apart from them, those by which anything is chosen."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from onnx_export.models.texts import (
    ADDRESSES,
    REPORTING_START,
    Encodes,
    cut,
    read_address,
    read_text,
)

__all__ = ["CALIBRATED", "choosing", "reporting"]

Ids = NDArray[np.int64]
CALIBRATING = 4  # passages
CALIBRATED = 512  # tokens of each


def reporting(
    tokenizer: Encodes,
    length: int,
    count: int,
    *,
    stride: int | None = None,
    files: Iterable[str | os.PathLike[str]] = (),
) -> NDArray[np.int64]:
    """Return passages to report of: of files, or of what docs/fidelity.md keeps for that.

    Each begins with the token that the tokenizer puts before every text, if it does.

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
    start, given = 0, [read_text(file) for file in files]
    if not given:
        start, given = REPORTING_START, [read_address(name) for name in ADDRESSES]
    begins, texts = _encoded(tokenizer, given)
    texts = [text[start:] for text in texts]
    return _beginning(begins, cut(texts, length - len(begins), count, stride=stride))


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
    begins, texts = _encoded(tokenizer, [read_address(name) for name in ADDRESSES])
    texts = [text[:REPORTING_START] for text in texts]
    return _beginning(begins, cut(texts, CALIBRATED - len(begins), CALIBRATING))


def _encoded(tokenizer: Encodes, texts: Iterable[str]) -> tuple[Ids, list[Ids]]:
    """Return the token that begins every text, if there is one, and the texts without it."""
    encoded = [tokenizer.encode(text) for text in texts]
    begins = tokenizer.encode("")[:1]
    if any(ids[: len(begins)].tolist() != begins.tolist() for ids in encoded):
        begins = begins[:0]  # it ends them
    return begins, [ids[len(begins) :] for ids in encoded]


def _beginning(begins: Ids, passages: Ids) -> Ids:
    return np.concatenate([np.tile(begins, (len(passages), 1)), passages], axis=1)

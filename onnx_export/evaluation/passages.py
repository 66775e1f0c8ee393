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
    passages,
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
    texts = [tokenizer.encode(read_text(file)) for file in files]
    if not texts and stride is None:
        return passages(tokenizer, length, count, start=REPORTING_START)
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

"""Static scales of GroupQueryAttention's int4 cache, from what a text's keys and values are."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnx_export.models.attention_forms import GroupedAttention
from onnx_export.models.built import build_onnx
from onnx_export.models.config import read_config
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.llama import Progress, Weights
from onnx_export.models.texts import require_tokens
from onnx_export.running import Session

__all__ = ["LEAST", "TOKENS", "calibrated", "largest_by_channel", "scales_of", "static_scales"]

TOKENS = 1024
"""So many tokens of a text are used, if it has them and the model's context does."""

LEAST = 64
"""Fewer tokens say too little of how large keys and values become."""

STEPS = 7  # of 4 bits, to each side of zero
CHUNK = 512  # tokens that are read at once


def static_scales(session: Session, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the step of each channel by which the text's largest value is 7 of them.

    Parameters
    ----------
    session : Session
        Of a model with `GroupedAttention` and a float32 cache, of one row, which is empty again
        afterwards.
    ids : numpy.ndarray
        Tokens of a text; the first `TOKENS` are read.

    Returns
    -------
    numpy.ndarray
        float32 ``[layers, 2, kv_heads, head_dim]``, as `GroupedAttention` takes them.

    Examples
    --------
    See `calibrated`, which uses it.
    """
    ids = ids[: min(TOKENS, session.limit)]
    for start in range(0, len(ids), CHUNK):
        session.forward(ids[start : start + CHUNK])
    scales = scales_of(largest_by_channel(session))
    session.crop(0)
    return scales


def largest_by_channel(session: Session) -> NDArray[np.float32]:
    """Return the largest value of each channel that a float32 cache of fixed size holds.

    Returns
    -------
    numpy.ndarray
        float32 ``[layers, 2, kv_heads, head_dim]``, of keys and of values.

    Examples
    --------
    >>> from onnx_export.models.tiny import tiny_onnx
    >>> session = Session(tiny_onnx())
    >>> _ = session.forward([3, 1, 4])
    >>> largest_by_channel(session).shape
    (2, 2, 2, 8)
    """
    cache, (tokens, *_) = session.tensors(), session.lengths
    sides = [
        np.abs(cache[tensor.past][0, :, :tokens]).max(axis=1)
        for tensor in session.model.layout.tensors
    ]
    return np.stack(sides).reshape(-1, 2, *sides[0].shape).astype(np.float32)


def scales_of(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return steps of which each channel's largest value is 7; of channels of zeros tiny ones."""
    steps: NDArray[np.float32] = np.maximum(largest, np.float32(1e-6)) / np.float32(STEPS)
    return steps


def calibrated(
    file: GGUFFile,
    ids: NDArray[np.int64],
    folder: str | os.PathLike[str],
    *,
    weights: Weights = "float32",
    progress: Progress | None = None,
) -> GroupedAttention:
    """Return the form of attention whose cache has 4 bits, its scales those of a text.

    The model is built for it with a float32 cache, in a folder of its own that is then removed.

    Parameters
    ----------
    file : GGUFFile
    ids : numpy.ndarray
        Tokens of the text, at least `LEAST`, or as many as the model's context has.
    folder : str or os.PathLike
        Where there is room for the model.
    weights, progress
        As `build_onnx` takes them.

    Raises
    ------
    ValueError
        If the text is too short, or the model is not supported.
    OSError
        If nothing can be written to the folder.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> calibrated(GGUFFile(tiny_gguf(tempfile.mkdtemp())), np.arange(3), tempfile.gettempdir())
    Traceback (most recent call last):
    ValueError: the text to calibrate with has 3 tokens; give one of at least 64
    """
    least = min(LEAST, read_config(file).context_length)
    require_tokens(ids, least, "the text to calibrate with")
    with tempfile.TemporaryDirectory(prefix=".calibrating-", dir=folder) as temporary:
        build_onnx(file, temporary, progress, attention=GroupedAttention(), weights=weights)
        session = Session(Path(temporary) / "model.onnx", capacity=min(TOKENS, len(ids)))
        return GroupedAttention(static_scales(session, ids))

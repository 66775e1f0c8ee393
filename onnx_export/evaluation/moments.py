"""Second moments of a decoder's queries, of which feedback for its keys (F1) is made.

A text is read once, in float32, and of every layer the queries are taken as they meet the keys.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nsq_ref.audit import Layer
from nsq_ref.feedback import Moments, second_moment
from onnx_export.evaluation.captured import captured
from onnx_export.models.built import Progress
from onnx_export.models.texts import ADDRESSES, read_address

__all__ = ["DEFAULT_TEXTS", "TOKENS", "QueryMoments", "ReadText", "query_moments"]

Float64 = NDArray[np.float64]

TOKENS = 1024
"""So many tokens of each text are read, if it has them and the model's context does.

Queries are rotated by their positions, and feedback serves positions like those that it is made of.
"""

DEFAULT_TEXTS = ADDRESSES[:4]
"""Addresses whose beginnings are read where no text is given; figures are of what comes later."""


class ReadText(NamedTuple):
    """How many tokens of a text were read, and how many it has.

    Nothing changes one, so that threads may share it.
    """

    tokens: int
    of: int


@dataclass(frozen=True, eq=False)
class QueryMoments(Moments):
    """What queries of a model were found, and in how much text.

    Nothing changes one, so that threads may share it.

    Attributes
    ----------
    layers : mapping of int to numpy.ndarray
        Sums of ``q q^T``, float64 ``[kv_heads, head_dim, head_dim]``, by the number of the layer.
    texts : tuple of ReadText

    Examples
    --------
    See `query_moments`.
    """

    texts: tuple[ReadText, ...] = ()


def query_moments(
    model: str | os.PathLike[str],
    texts: Iterable[str] | None = None,
    *,
    tokens: int = TOKENS,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> QueryMoments:
    """Read texts once and add up the second moments of the queries of every layer.

    Queries are those that meet the keys of the cache, after the rotary embedding: all queries of
    the heads that share a key/value head count alike, whether exporters scale them or not.

    Parameters
    ----------
    model : str or os.PathLike
        A GGUF file of the Llama family, or an exported ONNX decoder with a cache of floats, or its
        folder.
    texts : iterable of str, optional
        Each is read from an empty cache; by default the beginnings of four addresses that this
        package has, none of which is ever reported of.
    tokens : int
        So many of the first tokens of each are read, if it has them and the model's context does.
    tokenizer : str or os.PathLike, optional
        Another one than that in the file, or beside it.
    progress : callable, optional
        Called as ``progress(what, done, total)``.

    Returns
    -------
    QueryMoments

    Raises
    ------
    TypeError, ValueError
        For a text that is too short, and a model that is not understood: one with an attention
        whose queries are not found is refused as a whole, with the layer.
    OSError
        Where a file cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> path = tiny_gguf(tempfile.mkdtemp())
    >>> found = query_moments(path, ["A text of some tokens, which are bytes."])
    >>> found.texts, found.layers[1].shape
    ((ReadText(tokens=39, of=39),), (2, 8, 8))
    >>> found.feedback()
    {'0': Feedback(kv_heads=2, head_dim=8), '1': Feedback(kv_heads=2, head_dim=8)}
    """
    if isinstance(texts, str):
        raise TypeError("texts must be several, got str; give [text]")
    every = [read_address(one) for one in DEFAULT_TEXTS] if texts is None else list(texts)
    if not every:
        raise ValueError("texts is empty; give at least one, or leave it out")
    whole = Moments({})
    read = []
    for number, text in enumerate(every):
        if progress is not None:
            progress(f"text {number + 1} of {len(every)}", number, len(every))
        found = captured(
            model, text, tokens=tokens, tokenizer=tokenizer, require_queries=True, progress=progress
        )
        whole += Moments(_moments(found.layers))
        read.append(ReadText(found.tokens, found.text_tokens))
    return QueryMoments(whole.layers, tuple(read))


def _moments(layers: Sequence[Layer]) -> dict[int, Float64]:
    """Return the second moment of the queries of each layer that has some."""
    moments = {}
    for one in layers:
        if one.queries is not None:
            try:
                moments[one.number] = second_moment(one.queries, one.keys.shape[1])
            except ValueError as error:
                raise ValueError(f"layer {one.number}: {error}") from error
    return moments

"""Attention of a batch of queries to the rows of a cache, each of its own length."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref import attention
from nsq_ref.arrays import as_float_array, as_integers
from nsq_ref.cache.arguments import as_tokens, finite
from nsq_ref.cache.state import Sides, State
from nsq_ref.dtypes import Float32


def attend(
    sides: Sides,
    state: State,
    query: Any,
    query_lengths: Any,
    return_weights: bool,
    ahead: tuple[Any, Any] | None = None,
    **options: Any,
) -> Float32 | tuple[Float32, Float32]:
    """Attend as `KVCache.attend` does; ``options`` are those of `attention.attend_quantized`.

    ``ahead`` are keys and values that follow those of the cache and are attended to as they are, as
    they would be if none of them filled a block.
    """
    lengths, more = state.lengths, 0
    if ahead is not None:
        keys, values, _ = as_tokens(sides, len(lengths), state.dtype, *ahead, None)
        more = keys.shape[2]
        lengths = [length + more for length in lengths]
    query, counts = _queries(sides, lengths, query, query_lengths)
    output = np.zeros((*query.shape[:3], sides.values.head_dim), np.float32)
    weights = None
    if return_weights:
        weights = np.zeros((*query.shape[:3], max(lengths)), np.float32)
    for index, (row, count) in enumerate(zip(state.rows, counts, strict=True)):
        if not count:
            continue
        pieces = row.keys.pieces(), row.values.pieces()
        if more:
            pieces = [*pieces[0], keys[index]], [*pieces[1], values[index]]
        attended, row_weights = attention.attend_quantized(
            query[index, :, :count], *pieces,
            sides.keys.scheme, sides.values.scheme, value_head_dim=sides.values.head_dim,
            weights=return_weights, **options,
        )  # fmt: skip
        output[index, :, :count] = attended
        if weights is not None and row_weights is not None:
            weights[index, :, :count, : row_weights.shape[-1]] = row_weights
    return output if weights is None else (output, weights)


def _queries(
    sides: Sides, lengths: list[int], query: Any, query_lengths: Any
) -> tuple[Float32, list[int]]:
    """Return the queries as float32, and how many each row has."""
    batch, kv_heads, head_dim = len(lengths), sides.keys.kv_heads, sides.keys.head_dim
    query = as_float_array("query", query)
    heads = query.shape[1] if query.ndim == 4 else 0
    if not heads or heads % kv_heads or query.shape[::3] != (batch, head_dim):
        raise ValueError(
            f"query has shape {list(query.shape)}; this cache takes "
            f"[{batch}, heads, query_tokens, {head_dim}], heads a multiple of {kv_heads}"
        )
    counts = [query.shape[2]] * batch
    if query_lengths is not None:
        counts = as_integers("query_lengths", query_lengths, batch, least=0, most=query.shape[2])
    for index, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if count > length:
            raise ValueError(
                f"row {index} has {count} query tokens and {length} in the cache; append their "
                "keys and values first, or give query_lengths"
            )
    return np.asarray(finite("query", query, counts), np.float32), counts

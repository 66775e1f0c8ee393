"""Attention in float64 over decoded keys and values (A1, A2): NumPy that reads like the formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref.attention.options import finite, floats, group_of, require_lengths, require_options
from nsq_ref.dtypes import Array, Float64
from nsq_ref.environment import in_default_environment

__all__ = ["Attention", "attend"]


class Attention(NamedTuple):
    """What attention gives: the output, and the weights that made it.

    Nothing changes one, so that threads may share it.
    """

    output: Float64  # [batch, heads, query_tokens, D_v]
    weights: Float64  # [batch, heads, query_tokens, T]


@in_default_environment
def attend(
    query: Array,
    keys: Array,
    values: Array,
    *,
    lengths: Array | Sequence[int] | None = None,
    query_lengths: Array | Sequence[int] | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> Attention:
    """Attend in float64 over keys and values as a decoder sees them (rules A1, A2).

    Parameters
    ----------
    query : float array, shape [batch, heads, query_tokens, D]
        The last tokens of each sequence. Heads are a multiple of kv_heads: query head h uses key
        and value head ``h // (heads // kv_heads)``.
    keys : float array, shape [batch, kv_heads, T, D]
    values : float array, shape [batch, kv_heads, T, D_v]
    lengths : int array, shape [batch], optional
        Valid tokens of each row, padding behind them; T by default. What padding holds, NaN
        included, does not matter.
    query_lengths : int array, shape [batch], optional
        Valid query tokens of each row, padding behind them; all by default. Query i of row r stands
        at position ``lengths[r] - query_lengths[r] + i``.
    scale : float, optional
        Factor of the products; 1 / sqrt(D) by default.
    causal : bool
        A query sees no later position than its own.
    softcap : float, optional
        Scores s become ``softcap * tanh(s / softcap)``, after the scale and before the mask.
    sliding_window : int, optional
        A query sees only so many latest positions, its own among them. Causal attention only.

    Returns
    -------
    Attention
        float64; output and weights of padding queries, and weights of what is not seen, are 0.

    Raises
    ------
    TypeError, ValueError
        Where shapes do not fit, options make no sense, or valid input is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> query = np.zeros((1, 2, 1, 4))  # sees all keys alike
    >>> keys, values = np.ones((1, 1, 3, 4)), np.arange(6).reshape(1, 1, 3, 2) * 1.0
    >>> attend(query, keys, values).output[0, :, 0]
    array([[2., 3.],
           [2., 3.]])
    >>> attend(query, keys, values, sliding_window=1).weights[0, 0]
    array([[0., 0., 1.]])
    """
    query, keys, values = floats(4, query=query, keys=keys, values=values)
    batch, heads, query_tokens, head_dim = query.shape
    kv_heads, tokens = keys.shape[1:3]
    if values.shape[:3] != keys.shape[:3] or keys.shape[0] != batch or keys.shape[3] != head_dim:
        raise ValueError(
            f"query {list(query.shape)}, keys {list(keys.shape)} and values {list(values.shape)} "
            "do not fit; they are [batch, heads, query_tokens, D], [batch, kv_heads, T, D] and "
            "[batch, kv_heads, T, D_v]"
        )
    group = group_of(heads, kv_heads)
    scale, softcap, window = require_options(head_dim, scale, causal, softcap, sliding_window)
    valid = require_lengths("lengths", lengths, batch, tokens)
    valid_queries = require_lengths("query_lengths", query_lengths, batch, query_tokens)
    output = np.zeros((batch, heads, query_tokens, values.shape[3]))
    weights = np.zeros((batch, heads, query_tokens, tokens))
    for row, (n, m) in enumerate(zip(valid, valid_queries, strict=True)):
        if m > n:
            raise ValueError(
                f"query_lengths[{row}] is {m}, but lengths[{row}] is {n}: queries are the last "
                "tokens of their sequence, whose keys must be there"
            )
        q, k, v = (
            finite(name, array[row, :, :count].astype(np.float64), row)
            for name, array, count in (
                ("query", query, m),
                ("keys", keys, n),
                ("values", values, n),
            )
        )
        q = q.reshape(kv_heads, group, m, head_dim)
        s = scale * (q @ k[:, None].swapaxes(-1, -2))
        if not np.isfinite(s).all():
            raise ValueError(f"scores of row {row} are beyond float64; scale the query down")
        if softcap is not None:
            s = softcap * np.tanh(s / softcap)
        s = np.where(visible_tokens(n, m, causal, window), s, -np.inf)
        e = np.exp(s - s.max(axis=-1, keepdims=True, initial=-np.inf))
        w = e / e.sum(axis=-1, keepdims=True)
        output[row, :, :m] = (w @ v[:, None]).reshape(heads, m, values.shape[3])
        weights[row, :, :m, :n] = w.reshape(heads, m, n)
    return Attention(output, weights)


def visible_tokens(
    tokens: int,
    query_tokens: int,
    causal: bool,
    sliding_window: int | None,
    start: int = 0,
    stop: int | None = None,
    low: int = 0,
    high: int | None = None,
) -> npt.NDArray[np.bool_]:
    """Whether query i of [start, stop) sees position t of [low, high): [queries, tokens] (A2)."""
    position = np.arange(start, query_tokens if stop is None else stop)[:, None]
    position = position + tokens - query_tokens
    token = np.arange(low, tokens if high is None else high)
    visible = np.ones((len(position), len(token)), bool)
    if causal:
        visible &= token <= position
    if sliding_window is not None:
        visible &= token > position - sliding_window
    return visible

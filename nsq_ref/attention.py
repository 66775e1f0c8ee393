"""Attention over decoded keys and values in float64, and over the quantized ones directly (A1-A3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref import spec
from nsq_ref.scheme import Scheme

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Piece = Array | spec.Block


class Attention(NamedTuple):
    """What attention gives: the output, and the weights that made it."""

    output: Float64  # [batch, heads, query_tokens, D_v]
    weights: Float64  # [batch, heads, query_tokens, T]


def attend_quantized(
    query: Array,
    keys: Sequence[Piece],
    values: Sequence[Piece],
    key_scheme: Scheme,
    value_scheme: Scheme,
    *,
    value_head_dim: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sliding_window: int | None = None,
    weights: bool = False,
) -> tuple[Float32, Float32 | None]:
    """Attend over one sequence as it is stored, without decoding it (rule A3).

    Parameters
    ----------
    query : float array, shape [heads, query_tokens, D]
        The last `query_tokens` tokens of the sequence; `heads` a multiple of kv_heads.
    keys, values : sequence of pieces, in the order of the tokens
        A piece is a float array [kv_heads, n, D] of float32, float16 or bfloat16 (sinks, tail), or
        a `spec.Block` as `kernels.encode` returns it: packed codes [kv_heads, n, row_bytes], norm
        [kv_heads, n], scale and zero [kv_heads, blocks, D] or [kv_heads, n, 1], outlier_index
        [kv_heads, blocks, k], outliers [kv_heads, n, k]; ``collapsed`` is not read. Blocks have
        ``scheme.block_size`` tokens (None: the piece is one block). Keys and values together
        hold as many tokens, but may be cut differently. Views are taken as they are.
    value_head_dim : int, optional
        D_v; the query's D by default.
    weights : bool
        Return the weights, too.

    Returns
    -------
    output : float32 array, shape [heads, query_tokens, D_v]
    weights : float32 array, shape [heads, query_tokens, T], or None
    """
    from nsq_ref import kernels

    def decoded(pieces: Sequence[Piece], scheme: Scheme, head_dim: int) -> Array:
        parts = []
        for piece in pieces:
            if isinstance(piece, spec.Block):
                part = np.empty((*piece.codes.shape[:2], head_dim), np.float32)
                whole = spec.Block(*map(np.ascontiguousarray, piece))
                kernels.decode(whole, 0, scheme, part)
                parts.append(part)
            else:
                parts.append(np.asarray(piece, np.float32))
        return np.concatenate(parts, axis=1).astype(np.float64)

    head_dim = query.shape[2]
    k = decoded(keys, key_scheme, head_dim)
    v = decoded(values, value_scheme, value_head_dim or head_dim)
    heads, rows, _ = query.shape
    group = heads // k.shape[0]
    k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
    s = query.astype(np.float64) @ k.transpose(0, 2, 1)
    s *= 1 / math.sqrt(head_dim) if scale is None else scale
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
    position = np.arange(k.shape[1] - rows, k.shape[1])[:, None]
    at = np.arange(k.shape[1])
    if causal:
        s = np.where(at <= position, s, -np.inf)
    if sliding_window is not None:
        s = np.where(at > position - sliding_window, s, -np.inf)
    s = np.exp(s - s.max(-1, keepdims=True))
    w = (s / s.sum(-1, keepdims=True)).astype(np.float32)
    return (w @ v).astype(np.float32), w if weights else None

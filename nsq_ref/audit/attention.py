"""Attention of some of a text's own queries, with what a scheme makes of keys or of values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nsq_ref.audit.layers import Layer
from nsq_ref.dtypes import Array, Float32, Float64
from nsq_ref.environment import in_default_environment

__all__ = ["MOST_QUERIES", "AttentionLoss", "SampledAttention"]

MOST_QUERIES = 64
"""So many positions are asked, evenly spaced, the last among them."""


class AttentionLoss(NamedTuple):
    """What the sampled queries lose, the mean over them.

    Attributes
    ----------
    output_error : float
        Norm of the error of the outputs over their norm, over all heads and queries.
    divergence : float
        Kullback-Leibler divergence of the attention weights, in nats.
    """

    output_error: float
    divergence: float


class SampledAttention:
    """What some queries of a layer read, each of the tokens up to its own.

    Parameters
    ----------
    layer : Layer
        With queries.

    Attributes
    ----------
    positions : int array, [n]
        Of the queries.
    weights : float64 array, [batch, kv_heads, group * n, T]

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((1, 2, 9, 4)).astype(np.float32)
    >>> exact = SampledAttention(Layer(0, x, x, x))
    >>> exact.loss(x, x)
    AttentionLoss(output_error=0.0, divergence=0.0)
    >>> exact.loss(keys=0 * x).output_error > 0.1
    True
    """

    def __init__(self, layer: Layer) -> None:
        if layer.queries is None:
            raise ValueError(f"layer {layer.number} has no queries; give some")
        batch, kv_heads, tokens, head_dim = layer.keys.shape
        count = min(MOST_QUERIES, tokens)
        positions = np.unique(np.linspace(0, tokens - 1, count).round().astype(np.int64))
        asked = layer.queries[:, :, positions].astype(np.float64) * layer.scale
        self.positions: Array = positions
        self._queries = asked.reshape(batch, kv_heads, -1, head_dim)
        hidden = np.arange(tokens) > positions[:, None]
        self._hidden = np.tile(hidden, (layer.group, 1))
        self._values = layer.values.astype(np.float64)
        self._logs = self._log_weights(layer.keys)
        self.weights: Float64 = np.exp(self._logs)
        self._output = self.weights @ self._values

    @in_default_environment
    def loss(self, keys: Float32 | None = None, values: Float32 | None = None) -> AttentionLoss:
        """Return what is lost where the same queries read these keys, or these values, or both."""
        weights, divergence = self.weights, 0.0
        if keys is not None:
            logs = self._log_weights(keys)
            weights = np.exp(logs)
            with np.errstate(invalid="ignore"):  # nothing is lost of what no query sees
                terms = np.where(self._hidden, 0, self.weights * (self._logs - logs))
            divergence = max(float(terms.sum()) * logs.shape[-1] / logs.size, 0.0)
        output = weights @ (self._values if values is None else values.astype(np.float64))
        size, error = np.linalg.norm(self._output), np.linalg.norm(output - self._output)
        return AttentionLoss(float(error / size) if size else float(error > 0), divergence)

    def received(self) -> tuple[Float64, Float64]:
        """Return the share of the attention that each token gets of later queries, and a fair one.

        Both are float64 ``[T]``, of the mean over heads and later queries; 0 where there are too
        few of these. What is fair is an equal share of all tokens that a query sees.
        """
        tokens = self.weights.shape[-1]
        by_query = self.weights.mean(axis=(0, 1)).reshape(-1, len(self.positions), tokens).mean(0)
        later = self.positions[:, None] > np.arange(tokens)
        count = later.sum(axis=0)
        enough = count >= min(8, len(self.positions) // 2 + 1)
        counted = np.where(enough, count, 1)
        share = np.where(enough, (by_query * later).sum(axis=0) / counted, 0.0)
        fair = np.where(enough, (later / (self.positions[:, None] + 1)).sum(axis=0) / counted, 0.0)
        return share, fair

    def _log_weights(self, keys: Float32) -> Float64:
        logits = self._queries @ keys.astype(np.float64).swapaxes(-1, -2)
        logits[..., self._hidden] = -np.inf
        logits -= logits.max(axis=-1, keepdims=True)
        logs: Float64 = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return logs

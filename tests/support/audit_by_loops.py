"""Figures of an audit by plain loops over Python's numbers: what `nsq_ref.audit` must say."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["attention_output_error", "logit_error", "side"]


def side(x: Any) -> list[dict[str, float]]:
    """Figures of keys or values ``[batch, heads, T, D]``, a dict for each head."""
    found = []
    for head in range(len(x[0])):
        rows = [[float(v) for v in token] for row in x for token in row[head]]
        channels = list(zip(*rows, strict=True))
        peaks = [max(abs(v) for v in channel) for channel in channels]
        biases = []
        for channel in channels:
            mean = math.fsum(channel) / len(channel)
            variance = math.fsum((v - mean) ** 2 for v in channel) / len(channel)
            biases.append(abs(mean) / math.sqrt(variance) if variance else 0.0)
        norms = sorted(math.sqrt(math.fsum(v * v for v in row)) for row in rows)
        mean = math.fsum(norms) / len(norms)
        spread = math.sqrt(math.fsum((n - mean) ** 2 for n in norms) / len(norms))
        middle = (norms[(len(norms) - 1) // 2] + norms[len(norms) // 2]) / 2
        found.append(
            {
                "outlier_ratio": max(peaks) / (math.fsum(peaks) / len(peaks)),
                "outlier_channel": peaks.index(max(peaks)),
                "bias": max(biases),
                "bias_channel": biases.index(max(biases)),
                "norm_variation": spread / mean,
                "norm_least": norms[0] / middle,
                "norm_greatest": norms[-1] / middle,
            }
        )
    return found


def logit_error(x: Any, x_hat: Any, queries: Any, scale: float) -> list[float]:
    """Root mean square of ``scale * q . (x - x_hat)`` of each head, every query and every token."""
    found = []
    group = len(queries[0]) // len(x[0])
    for head in range(len(x[0])):
        squares: list[float] = []
        every = [
            q for row in queries for one in row[head * group : (head + 1) * group] for q in one
        ]
        for before, after in zip(x, x_hat, strict=True):
            for token, restored in zip(before[head], after[head], strict=True):
                error = [float(a) - float(b) for a, b in zip(restored, token, strict=True)]
                for query in every:
                    dot = math.fsum(float(q) * e for q, e in zip(query, error, strict=True))
                    squares.append((scale * dot) ** 2)
        found.append(math.sqrt(math.fsum(squares) / len(squares)))
    return found


def attention_output_error(
    queries: Any, keys: Any, values: Any, keys_hat: Any, scale: float, positions: list[int]
) -> float:
    """Relative error of the outputs of some queries, of one row of a batch."""
    errors, sizes = [], []
    group = len(queries) // len(keys)
    for head, own in enumerate(queries):
        of = head // group
        for position in positions:
            outputs = []
            for known in (keys[of], keys_hat[of]):
                logits = [
                    scale
                    * math.fsum(
                        float(a) * float(b) for a, b in zip(own[position], key, strict=True)
                    )
                    for key in known[: position + 1]
                ]
                weights = [math.exp(logit - max(logits)) for logit in logits]
                total = math.fsum(weights)
                outputs.append(
                    [
                        math.fsum(w * float(v) for w, v in zip(weights, channel, strict=True))
                        / total
                        for channel in zip(*values[of][: position + 1], strict=True)
                    ]
                )
            exact, lossy = outputs
            errors += [(a - b) ** 2 for a, b in zip(exact, lossy, strict=True)]
            sizes += [a * a for a in exact]
    return math.sqrt(math.fsum(errors) / math.fsum(sizes))

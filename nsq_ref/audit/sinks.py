"""Tokens that stand out: by their norm, or by the attention that they get."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from nsq_ref.audit.attention import SampledAttention
from nsq_ref.audit.figures import token_norms
from nsq_ref.audit.layers import Layer
from nsq_ref.dtypes import Float32
from nsq_ref.environment import in_default_environment

__all__ = ["Sink", "leading_sinks", "sinks_of"]

FACTOR = 2.0
"""By norm, a token is a sink that is so many times larger or smaller than the median token ..."""

DEVIATIONS = 5.0
"""... and so many robust deviations of the logarithm away, in most heads."""

ATTENTION_SHARE = 0.1
"""By attention, one that gets so much of the attention of later queries, on average ..."""

ATTENTION_FACTOR = 8.0
"""... and so many times its fair share."""


class Sink(NamedTuple):
    """A token that stands out in a layer.

    Attributes
    ----------
    layer, token : int
        The token's position in the sequence.
    by : {"key norm", "value norm", "attention"}
    figure : float
        Its norm over the median, of the median head; or its share of the attention.
    """

    layer: int
    token: int
    by: Literal["key norm", "value norm", "attention"]
    figure: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return self._asdict()


@in_default_environment
def sinks_of(layer: Layer, attention: SampledAttention | None = None) -> list[Sink]:
    """Return the tokens of a layer that stand out, of all rows of the batch together.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((1, 2, 99, 16)).astype(np.float32)
    >>> keys = x.copy()
    >>> keys[:, :, 0] *= 0.1
    >>> [sink[:3] for sink in sinks_of(Layer(4, keys, x))]
    [(4, 0, 'key norm')]
    """
    found = [Sink(layer.number, token, "key norm", f) for token, f in _by_norm(layer.keys)]
    found += [Sink(layer.number, token, "value norm", f) for token, f in _by_norm(layer.values)]
    if attention is not None:
        share, fair = attention.received()
        sinks = np.flatnonzero((share >= ATTENTION_SHARE) & (share >= ATTENTION_FACTOR * fair))
        found += [Sink(layer.number, int(t), "attention", float(share[t])) for t in sinks]
    return found


def leading_sinks(sinks: list[Sink]) -> int:
    """Return how many of the first tokens are sinks, one way or another, without a gap.

    Examples
    --------
    >>> leading_sinks([Sink(0, t, "attention", 0.3) for t in (0, 1, 5)])
    2
    """
    tokens, count = {sink.token for sink in sinks}, 0
    while count in tokens:
        count += 1
    return count


def _by_norm(x: Float32) -> Iterator[tuple[int, float]]:
    norms = token_norms(x)
    median = np.median(norms, axis=-1, keepdims=True)
    ratio = norms / np.where(median == 0, 1, median)
    with np.errstate(divide="ignore"):
        distance = np.abs(np.log(ratio))
    spread = 1.4826 * np.median(distance, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        apart = (distance >= np.log(FACTOR)) & (distance >= DEVIATIONS * spread) & (median > 0)
    most = apart.mean(axis=(0, 1)) > 0.5
    typical = np.median(ratio, axis=(0, 1))
    return ((int(token), float(typical[token])) for token in np.flatnonzero(most))

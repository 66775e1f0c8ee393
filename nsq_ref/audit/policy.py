"""Which scheme each layer should have: by rules that are written down here, and no others.

1. Every layer begins with the default scheme of keys and that of values.
2. Where more of the first tokens are sinks than the scheme keeps as they are, it keeps them, at
   most `MOST_SINKS`.
3. Where float16 does not hold a norm or a scale of the layer, norms and scales are float32.
4. Where what the scheme loses by a round trip on the layer is more than the limit, it gets the next
   width of 3, 4 and 8 bits. What is judged is the error of the attention's output for real queries,
   this side alone; without queries, the error over what tells tokens apart, every channel alike.
5. Where 8 bits are not within the limit either, the layer stays in floating point, both sides of
   it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from nsq_ref.audit.losses import SideLoss
from nsq_ref.policy import policy_json, scheme_text
from nsq_ref.scheme import KeyValueSchemes, Scheme

__all__ = ["LIMIT", "MOST_SINKS", "Choice", "Recommendation", "choose"]

LIMIT = 0.25
"""A quarter: of the attention's output, or of what tells keys apart."""

MOST_SINKS = 4

WIDTHS = (2, 3, 4, 8)
CONTEXT = 4096
FLOAT_BITS = 16  # of a layer that is left alone

Measure = Callable[[Scheme], SideLoss]


class Choice(NamedTuple):
    """What one side of a layer gets.

    Attributes
    ----------
    scheme : Scheme or None
        None where no width is within the limit.
    loss : SideLoss or None
        By a round trip with exactly that scheme.
    reasons : tuple of str
        Why it is not the default; empty where it is.
    """

    scheme: Scheme | None
    loss: SideLoss | None
    reasons: tuple[str, ...]


def choose(default: Scheme, sinks: int, limit: float, measure: Measure) -> Choice:
    """Choose the scheme of one side of a layer, by the rules of this module.

    Parameters
    ----------
    default : Scheme
    sinks : int
        Leading tokens that are sinks.
    limit : float
    measure : callable
        Makes the round trip.

    Examples
    --------
    >>> import numpy as np
    >>> def measure(scheme):
    ...     return SideLoss(scheme, *[np.array([0.8 / scheme.bits])] * 3)
    >>> choose(Scheme.named("streaming2"), 1, 0.25, measure).reasons
    ('streaming2 loses 40.0%, streaming3 26.7%; more than 25%',)
    """
    reasons: list[str] = []
    start = default
    if min(sinks, MOST_SINKS) > default.sink_tokens:
        start = replace(default, sink_tokens=min(sinks, MOST_SINKS))
        reasons.append(f"the first {sinks} tokens stand out: {start.sink_tokens} stay as they are")
    refused: list[str] = []
    for scheme in _wider(start):
        loss = measure(scheme)
        if loss.judged <= limit:
            if refused:
                reasons.append(f"{', '.join(refused)}; more than {limit:.0%}")
            if loss.scheme != scheme:
                reasons.append("float16 does not hold its norms or scales: they are float32")
            return Choice(loss.scheme, loss, tuple(reasons))
        verb = " loses" if not refused else ""
        refused.append(f"{scheme_text(scheme)}{verb} {loss.judged:.1%}")
    reasons.append(f"{', '.join(refused)}; more than {limit:.0%}: stays in floating point")
    return Choice(None, None, tuple(reasons))


def _wider(start: Scheme) -> list[Scheme]:
    """Return the scheme itself and the same with more bits, as names of its family have them."""
    schemes = [start]
    for bits in WIDTHS:
        if bits > start.bits:
            rule = "range" if start.bits == 2 else start.scale_rule
            schemes.append(replace(start, bits=bits, scale_rule=rule))
    return schemes


@dataclass(frozen=True)
class Recommendation:
    """The policy that follows: schemes of all layers, why, and what they take; it never changes.

    Attributes
    ----------
    default : KeyValueSchemes
    layers : dict of int to KeyValueSchemes or None
        Of every layer; None stays in floating point.
    reasons : dict of int to tuple of str
        Of layers that do not have the default, what led to it.
    cache_nbytes, float16_nbytes : int
        Of the cache of what was audited, sinks and layers in floating point counted as float16.
    bits_per_element : float
        Of the same.
    bits_at_4096 : float
        At 4096 tokens in a row.

    Examples
    --------
    >>> four = KeyValueSchemes(*[Scheme.named("streaming4")] * 2)
    >>> eight = KeyValueSchemes(Scheme.named("streaming8"), four.value)
    >>> policy = Recommendation(four, {0: eight, 1: four, 2: None}, {}, 1, 2, 4.5, 4.5)
    >>> policy.to_rewrite()["layers"]
    {'0': {'key': 'streaming8', 'value': 'streaming4'}, '2': None}
    """

    default: KeyValueSchemes
    layers: dict[int, KeyValueSchemes | None]
    reasons: dict[int, tuple[str, ...]]
    cache_nbytes: int
    float16_nbytes: int
    bits_per_element: float
    bits_at_4096: float

    @property
    def is_default(self) -> bool:
        """Whether every layer has the default."""
        return all(one == self.default for one in self.layers.values())

    def to_rewrite(self) -> dict[str, Any]:
        """Return it as `nsq_ref.policy` has files, which rewriting and evaluating read.

        Layers that are not named have the default.
        """
        others = {layer: one for layer, one in self.layers.items() if one != self.default}
        return policy_json(self.default, others)

    def to_cache(self) -> dict[int, tuple[Scheme, Scheme] | None]:
        """Return it as ``NsqCache(policy=...)`` of `nsq_ref.transformers` takes it."""
        return {layer: None if one is None else (*one,) for layer, one in self.layers.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, ready for JSON."""
        return {
            "policy": self.to_rewrite(),
            "is_default": self.is_default,
            "reasons": {str(layer): list(why) for layer, why in self.reasons.items()},
            "bytes": self.cache_nbytes,
            "float16_bytes": self.float16_nbytes,
            "bits_per_element": self.bits_per_element,
            "bits_per_element_at_4096_tokens": self.bits_at_4096,
        }

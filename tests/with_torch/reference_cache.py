"""What an `NsqCache` shall hold, by way of dense tokens and of `nsq_ref.quantize` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
)

import nsq_ref as nsq


def reconstructed(x: Any, scheme: nsq.Scheme, feedback: nsq.Feedback | None = None) -> Any:
    """``x[kv_heads, T, D]`` with every full block behind the sinks as it decodes."""
    size, sinks = scheme.block_size or 1, scheme.sink_tokens
    full = max(x.shape[1] - sinks, 0) // size * size
    result = x.clone()
    if full:
        sealed = replace(scheme, sink_tokens=0)
        blocks = nsq.quantize(x[:, sinks : sinks + full], sealed, feedback=feedback)
        result[:, sinks : sinks + full] = torch.from_numpy(nsq.dequantize(blocks))
    return result


class ReferenceLayer(DynamicLayer):  # type: ignore[misc, unused-ignore]
    """A layer of a `DynamicCache` that shows what came before a pass as the codec gives it back."""

    def __init__(
        self,
        key: nsq.Scheme,
        value: nsq.Scheme,
        leads: Sequence[int] | None = None,
        key_feedback: nsq.Feedback | None = None,
    ) -> None:
        super().__init__()
        self.schemes, self.leads = ((key, key_feedback), (value, None)), leads

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
        past = self.get_seq_length()
        dense = super().update(key_states, value_states)
        if not past:
            return dense
        both = zip(dense, self.schemes, strict=True)
        return tuple(self.shown(x, past, *scheme) for x, scheme in both)

    def shown(self, x: Any, past: int, *scheme: Any) -> Any:
        """The first ``past`` positions as they are stored, padding as zeros if it is not."""
        result, leads = x.clone(), self.leads or [0]
        for row in range(len(x)):
            lead = leads[row * len(leads) // len(x)]
            result[row, :, :lead] = 0
            result[row, :, lead:past] = reconstructed(x[row, :, lead:past], *scheme)
        return result


class ReferenceHybridLayer(  # type: ignore[misc, unused-ignore]
    ReferenceLayer, LinearAttentionAndFullAttentionLayer
):
    """The same of a layer that has recurrent states as well."""


KINDS = {DynamicLayer: ReferenceLayer, LinearAttentionAndFullAttentionLayer: ReferenceHybridLayer}


def reference_cache(
    config: Any,
    key: nsq.Scheme,
    value: nsq.Scheme,
    leads: Sequence[int] | None = None,
    key_feedback: Mapping[int, nsq.Feedback] | None = None,
) -> Any:
    layers = DynamicCache(config=config).layers
    for index, layer in enumerate(layers):
        if kind := KINDS.get(type(layer)):
            layers[index] = kind(key, value, leads, (key_feedback or {}).get(index))
    return Cache(layers=layers)

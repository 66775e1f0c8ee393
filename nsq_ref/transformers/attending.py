"""The attention function ``"nsq"``: to the cache as it is stored, where that is possible."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nsq_ref.transformers.passes import Pass, Stored, Tensor

__all__ = ["attention", "computes_itself"]

MOST_QUERIES = 16  # tokens of one pass for which reading codes is quicker than decoding them all


@torch.compiler.disable
def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend to the cache as it is stored: ``attn_implementation="nsq"``.

    So it does in a layer of an `NsqCache` for passes of few tokens, once a block is sealed, where
    the mask is causal but for padding that is not stored. Everything else, the prompt first of all,
    is attended to on decoded keys and values: by PyTorch's ``scaled_dot_product_attention``, or,
    where scores are capped or there are learned sinks, by the model's own ``"eager"`` function.

    Parameters
    ----------
    module : torch.nn.Module
        The layer.
    query, key, value : tensors, shape [batch, heads, T, head_dim]
    attention_mask : bool or additive tensor, shape [batch, 1, queries, tokens], or None
    **options
        What else the layer has: ``scaling``, ``dropout``, ``softcap``, ``s_aux``.

    Returns
    -------
    output : tensor, shape [batch, queries, heads, value_head_dim]
    weights : None
        They are not kept.

    Raises
    ------
    ValueError
        For layers with capped scores or learned sinks whose model has no such function.
    """
    if isinstance(key, Stored) and isinstance(value, Stored):
        if not module.training and _can_be_read(key.source, query, attention_mask, options):
            return _read(key.source, query, options), None
        key, value = key.plain(), value.plain()
    inputs = module, query, key, value
    if options.get("softcap") is None and options.get("s_aux") is None:
        return sdpa_attention_forward(*inputs, attention_mask, **options)[0], None
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(
            f"attn_implementation='nsq' cannot cap scores or add learned sinks (s_aux) for "
            f"{type(module).__name__}, whose model has no eager_attention_forward; use 'eager'"
        )
    return eager(*inputs, _additive(module, attention_mask, query, key), **options)[0], None


def _can_be_read(source: Pass, query: Tensor, mask: Tensor | None, options: Any) -> bool:
    """Whether the result is that of attention to what is stored, and has it sooner."""
    cache, queries = source.before, query.shape[2]
    sealed = any(scheme.cut(len(cache)).sealed for scheme in (cache.key, cache.value))
    if not sealed or queries > MOST_QUERIES:
        return False
    if options.get("s_aux") is not None or options.get("position_bias") is not None:
        return False
    leads = source.start - torch.from_numpy(cache.lengths)
    if mask is None:
        return queries == 1 and not leads.any()
    total = source.start + source.tokens
    if mask.dtype != torch.bool or mask.shape[-2:] != (queries, total):
        return False
    positions = torch.arange(total)
    own = positions <= torch.arange(total - queries, total)[:, None]
    return bool((mask == (own & (positions >= leads[:, None, None, None]))).all())


def _read(source: Pass, query: Tensor, options: Any) -> Tensor:
    """Attend to what is stored, and to what the pass brings."""
    output = source.before.attend(
        query, ahead=(source.keys, source.values),
        scale=options.get("scaling"), softcap=options.get("softcap"),
    )  # fmt: skip
    return torch.from_numpy(output).to(query.dtype).transpose(1, 2).contiguous()


def _additive(module: Any, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Return a mask as ``"eager"`` functions take it; PyTorch's needs none for what is causal."""
    if mask is None:
        if not getattr(module, "is_causal", True):
            return None
        queries, tokens = query.shape[2], key.shape[2]
        mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)[None, None]
    if mask.dtype != torch.bool:
        return mask
    return query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)


def computes_itself(config: Any) -> str | None:
    """Return the name of a model that calls no attention function; None of others.

    Examples
    --------
    >>> from transformers import BloomConfig, LlamaConfig
    >>> computes_itself(BloomConfig()), computes_itself(LlamaConfig())
    ('BloomForCausalLM', None)
    """
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is None or hasattr(sys.modules[model.__module__], "ALL_ATTENTION_FUNCTIONS"):
        return None
    return str(model.__name__)


def _mask(*args: Any, config: Any = None, **options: Any) -> Tensor | None:
    """Make the mask of PyTorch's function; models that would take it for another are refused."""
    name = computes_itself(config)
    if name is not None:
        raise ValueError(
            f"attn_implementation='nsq' is not for {name}, which computes its attention "
            "itself; use 'eager', which goes with NsqCache as well"
        )
    return sdpa_mask(*args, config=config, **options)


AttentionInterface.register("nsq", attention)
AttentionMaskInterface.register("nsq", _mask)

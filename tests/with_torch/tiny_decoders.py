"""Decoders of several families for transformers, tiny and of random weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers

VOCABULARY = 97
# What `generate` and models call it; its name was another one before.
CACHE = (
    "cache"
    if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    else "past_key_values"
)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,  # so large that what is attended to decides on the token
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "gemma2": (transformers.Gemma2Config, {**ALTERNATING, "attn_logit_softcapping": 5.0}),
    "gemma3": (transformers.Gemma3TextConfig, ALTERNATING),
}


def config_of(family: str, **changes: Any) -> Any:
    make, own = FAMILIES[family]
    return make(**SHAPE | own | changes)


def decoder(family: str, attention: str = "sdpa", dtype: Any = torch.float32, seed: int = 0) -> Any:
    """A model in evaluation mode; ``"sdpa"`` means what the family has for it."""
    if (family, attention) == ("gemma2", "sdpa"):
        attention = "eager"  # the one that transformers has for capped scores
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(
        config_of(family), attn_implementation=attention, dtype=dtype
    )
    return made.eval()


def prompt(rows: int = 1, tokens: int = 30, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)

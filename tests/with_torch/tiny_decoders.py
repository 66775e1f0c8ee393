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
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# One for each way of attending, or of keeping layers, that those do not have.
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    # keys and values of different head_dim
    "deepseek v3": (transformers.DeepseekV3Config, {
        **EXPERTS, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
        "head_dim": 8,
    }),
    # layers that use the keys and values of others
    "gemma3n": (transformers.Gemma3nTextConfig, {
        "num_hidden_layers": 4, "layer_types": ALTERNATING["layer_types"] * 2,
        "sliding_window": 12, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 8, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    }),
    # layers of linear attention
    "qwen3 next": (transformers.Qwen3NextConfig, {
        **EXPERTS, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4,
        "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }),
    # layers of attention and linear attention
    "zamba2": (transformers.Zamba2Config, {
        "num_hidden_layers": 3, "layer_types": ["linear_attention", "hybrid", "linear_attention"],
        "hybrid_layer_ids": [1], "num_key_value_heads": 4, "head_dim": 24, "n_mamba_heads": 4,
        "mamba_d_state": 8, "chunk_size": 8, "adapter_rank": 8, "use_mamba_kernels": False,
    }),
    # chunks that are attended to by themselves, and layers without positions
    "llama4": (transformers.Llama4TextConfig, {
        "layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 16,
        "no_rope_layers": [1, 0], "num_local_experts": 2, "intermediate_size_mlp": 64,
    }),
    # one projection of queries, keys and values; learned positions; scales of its own
    "gpt2": (transformers.GPT2Config, {
        "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512,
    }),
    "gpt neox": (transformers.GPTNeoXConfig, {}),
    "granite": (transformers.GraniteConfig, {"attention_multiplier": 0.2}),
    "cohere2": (transformers.Cohere2Config, ALTERNATING),
    # sinks that are learned, which "nsq" leaves to the model's own function
    "gpt oss": (transformers.GptOssConfig, {
        **ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2,
    }),
    # attention that asks for no function, and adds its mask
    "bloom": (transformers.BloomConfig, {"n_layer": 2, "n_head": 4}),
}  # fmt: skip


def config_of(family: str, **changes: Any) -> Any:
    make, own = (FAMILIES | OTHERS)[family]
    return make(**SHAPE | own | changes)


def decoder(family: str, attention: str = "sdpa", dtype: Any = torch.float32, seed: int = 0) -> Any:
    """A model in evaluation mode; ``"sdpa"`` means what the family has for it."""
    if family in ("gemma2", "gpt oss", "bloom") and attention == "sdpa":
        attention = "eager"  # the one that transformers has for these
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(
        config_of(family), attn_implementation=attention, dtype=dtype
    )
    return made.eval()


def prompt(rows: int = 1, tokens: int = 30, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)

"""Decoders of other families as optimum writes them with TorchScript: one of each kind of scores.

    python other_families.py

Made with optimum-onnx 0.1.0, optimum 2.3.0, transformers 4.57.6 and torch 2.13.0.
"""

import tempfile
from pathlib import Path

import torch
import transformers
from one_file import keep
from optimum.exporters.onnx import onnx_export_from_model

SMALL = {"vocab_size": 96, "initializer_range": 0.25}
MADE = {
    # Batch and heads are one axis; a mask is added to alibi.
    "bloom": (
        "BloomForCausalLM", "eager", {**SMALL, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    ),
    # The mask is added before scores are scaled, and the present stands behind a Cast.
    "codegen": (
        "CodeGenForCausalLM", "eager",
        {**SMALL, "n_embd": 32, "n_inner": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
         "rotary_dim": 4},
    ),
    # The mask says what is hidden, beside alibi.
    "mpt": (
        "MptForCausalLM", "eager",
        {**SMALL, "d_model": 16, "n_layers": 2, "n_heads": 2, "expansion_ratio": 2,
         "max_seq_len": 64},
    ),
    # Sinks join the softmax, and one of the layers has a window.
    "gpt_oss": (
        "GptOssForCausalLM", "eager",
        {**SMALL, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8,
         "num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 64,
         "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0},
    ),
    # Keys and values have heads of different sizes.
    "deepseek_v3": (
        "DeepseekV3ForCausalLM", "sdpa",
        {**SMALL, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 2,
         "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1,
         "moe_intermediate_size": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 12, "max_position_embeddings": 64, "pad_token_id": 0},
    ),
}  # fmt: skip
WHISPER = {
    "vocab_size": 96, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "max_target_positions": 64, "num_mel_bins": 8, "init_std": 0.25,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """Give weights that initialisation leaves at 0 or 1, and small ones, some content."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif not torch.isfinite(parameter).all() or parameter.std() < 0.05:
                parameter.copy_(0.25 * torch.randn_like(parameter))
    return model.eval()


def main() -> None:
    for family, (name, attention, options) in MADE.items():
        cls = getattr(transformers, name)
        torch.manual_seed(0)
        model = filled(cls._from_config(cls.config_class(**options), attn_implementation=attention))
        with tempfile.TemporaryDirectory() as out:
            onnx_export_from_model(
                model, Path(out), task="text-generation-with-past", opset=18, do_validation=False
            )
            keep(Path(out) / "model.onnx", f"optimum-{family}-18")
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER))
    with tempfile.TemporaryDirectory() as out:
        onnx_export_from_model(
            filled(model), Path(out), task="automatic-speech-recognition-with-past", opset=18,
            do_validation=False,
        )  # fmt: skip
        keep(Path(out) / "decoder_with_past_model.onnx", "decoder-whisper-18")


if __name__ == "__main__":
    main()

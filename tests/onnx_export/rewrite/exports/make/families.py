"""Tiny random decoders of each family, as folders that exporters read.

    python families.py FOLDER [few]

With `few`, models whose heads would have 8 channels have half as many heads of 16, since
GroupQueryAttention in onnxruntime refuses fewer.

Made with torch 2.13.0 and transformers 5.24.0; for `genai_older.py` with transformers 4.57.6.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi3": ("Phi3", {"original_max_position_embeddings": 256}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8,
         "attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": 8}),
    "phi": ("Phi", {"num_key_value_heads": 4}),
    "phi3long": (
        "Phi3",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
         "original_max_position_embeddings": 8,
         "rope_scaling": {"type": "longrope", "short_factor": [1 + i / 10 for i in range(8)],
                          "long_factor": [2 + i / 3 for i in range(8)]}},
    ),
    "gptoss": (
        "GptOss",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "sliding_window": 8,
         "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 16,
         "max_position_embeddings": 64,
         "layer_types": ["sliding_attention", "full_attention"],
         "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                          "truncate": False, "original_max_position_embeddings": 4096}},
    ),
}  # fmt: skip
FAMILIES["gemma3small"] = (
    "Gemma3",
    {**FAMILIES["gemma3"][1], "intermediate_size": 16, "max_position_embeddings": 64},
)
FEW = ("phi3long", "gptoss")


def make(family: str, folder: Path, **changes: object) -> Path:
    """Write a random model of a family as transformers does, and return its folder."""
    name, options = FAMILIES[family]
    config_name = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**{**SHAPE, **options, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # norms, biases and so on, which initialisation leaves at 0 or 1
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif family == "gptoss":  # whose experts are left as they are in memory
                parameter.normal_(0, 0.25)
    path = folder / family
    model.save_pretrained(path)
    _write_tokenizer(path)
    settings = json.loads((path / "config.json").read_text())
    settings["architectures"] = [f"{name}ForCausalLM"]
    (path / "config.json").write_text(json.dumps(settings))
    return path


def _write_tokenizer(path: Path) -> None:
    """Exporters copy a tokenizer, which nothing reads here."""
    from tokenizers import Tokenizer, models

    words = {f"<{i}>": i for i in range(SHAPE["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


if __name__ == "__main__":
    for each, (_, own) in FAMILIES.items():
        few = {}
        if sys.argv[2:] == ["few"] and each not in FEW and own.get("head_dim") != 16:
            few = {"num_attention_heads": 2, "num_key_value_heads": 1}
            if each == "phi":  # which rotates half of its channels
                few["num_attention_heads"] = 1
            few |= {"head_dim": 16} if "head_dim" in own else {}
        print(make(each, Path(sys.argv[1]), **few))

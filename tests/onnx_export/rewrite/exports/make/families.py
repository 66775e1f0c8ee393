"""Tiny random decoders of each family, as folders that exporters read.

    python families.py FOLDER [few]

With `few`, models whose heads would have 8 channels have half as many heads of 16, since
GroupQueryAttention in onnxruntime refuses fewer.

Made with torch 2.13.0 and transformers 5.24.0.
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
}  # fmt: skip


def make(family: str, folder: Path, **changes: object) -> Path:
    """Write a random model of a family as transformers does, and return its folder."""
    name, options = FAMILIES[family]
    config_name = "Gemma3TextConfig" if family == "gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**{**SHAPE, **options, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # norms, biases and so on, which initialisation leaves at 0 or 1
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
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
        if sys.argv[2:] == ["few"] and own.get("head_dim") != 16:
            few = {"num_attention_heads": 2, "num_key_value_heads": 1}
            if each == "phi":  # which rotates half of its channels
                few["num_attention_heads"] = 1
            few |= {"head_dim": 16} if "head_dim" in own else {}
        print(make(each, Path(sys.argv[1]), **few))

"""A tiny random chat model: control tokens, and a template in the manner of ChatML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from onnx_export.models.tokenizer import byte_symbols
from tests.support.llama_oracle import TinyModel, write_gguf

__all__ = ["CHATML", "chat_gguf"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_gguf(
    folder: Path,
    *,
    pre: str = "smollm",
    add_bos: bool | None = None,
    bos: int | None = 1,
    template: str | None = CHATML,
    changes: Mapping[str, object] | None = None,
) -> Path:
    """Write the model's GGUF file, whose texts end with token 0 or 2 and begin with 1."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_symbols(), "th"]
    model = TinyModel(vocab=len(tokens), context=512, head_dim=16)
    keys: dict[str, object] = {
        **model.keys(),
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 257,
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 0,
    }
    optional = {
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.add_bos_token": add_bos,
        "tokenizer.chat_template": template,
    }
    keys |= {name: value for name, value in optional.items() if value is not None}
    keys |= changes or {}
    return write_gguf(folder / "chat.gguf", "llama", keys, model.tensors())

"""What torch.onnx makes of transformers' models, with a cache as inputs and outputs.

    python dynamo.py FOLDER_OF_FAMILIES

Made with torch 2.13.0, onnxscript 0.7.2 and transformers 5.24.0.
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers
from one_file import keep

MADE = [
    ("llama", 18, "sdpa"),
    ("llama", 23, "sdpa"),
    ("llama", 18, "eager"),
    ("llama", 24, "sdpa"),
    ("qwen2", 20, "sdpa"),
    ("qwen3", 23, "sdpa"),
    ("phi3", 18, "sdpa"),
    ("gemma2", 18, "eager"),
    ("gemma3", 18, "sdpa"),
    ("gemma3", 23, "sdpa"),
    ("mistral", 18, "sdpa"),
    ("llama", 20, "sdpa", torch.float16),
    ("qwen3", 20, "eager", torch.float16),
]


class WithCache(torch.nn.Module):
    """Keys and values as plain tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past):
        cache = transformers.DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        return out.logits, present


def main(families: Path) -> None:
    for family, opset, attention, *other in MADE:
        dtype = other[0] if other else torch.float32
        model = transformers.AutoModelForCausalLM.from_pretrained(
            families / family, attn_implementation=attention, dtype=dtype
        ).eval()
        config = model.config
        layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        batch, tokens, length = 2, 3, 5
        past = [
            tuple(torch.randn(batch, kv_heads, length, head_dim, dtype=dtype) for _ in range(2))
            for _ in range(layers)
        ]
        arguments = (
            torch.randint(0, config.vocab_size, (batch, tokens)),
            torch.ones(batch, length + tokens, dtype=torch.int64),
            torch.arange(length, length + tokens).expand(batch, -1),
            past,
        )
        size = torch.export.Dim
        rows, new, old, total = size("batch"), size("sequence"), size("past"), size.AUTO
        shapes = (
            {0: rows, 1: new},
            {0: rows, 1: total},
            {0: rows, 1: new},
            [tuple({0: rows, 2: old} for _ in range(2)) for _ in range(layers)],
        )
        names = [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
        presents = [name.replace("past_key_values", "present") for name in names]
        program = torch.onnx.export(
            WithCache(model),
            arguments,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            input_names=["input_ids", "attention_mask", "position_ids", *names],
            output_names=["logits", *presents],
            verbose=False,
        )
        with tempfile.TemporaryDirectory() as out:
            path = Path(out) / "model.onnx"
            program.save(path)
            keep(path, f"dynamo-{family}-{opset}-{attention}" + "-fp16" * bool(other))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Write a tiny decoder with a quantized cache, for this page and its test: random, and of bytes.

Run as ``python docs/examples/browser/tiny_model.py tiny.onnx``. Its tokens are the 256 bytes. Its
inputs are ``input_ids``, ``past_lengths`` and the cache, its outputs ``logits``,
``present_lengths`` and the cache, whose names begin with ``past`` and ``present``. All of its axes
but the number of new tokens are fixed, so that a loop can make the cache from what a session tells
of its inputs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx

from nsq_ref import Scheme
from onnx_export.operators import attention_node, cache_fields, functions
from onnx_export.operators.nodes import Nodes, make_model

KEY = Scheme(bits=4, symmetric=False, magnitude="lsq", block_size=16, sink_tokens=1)
VALUE = Scheme(bits=3, symmetric=False, magnitude="lsq", block_size=16, sink_tokens=1)
LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 2, 4, 2, 16, 256
WIDTH = HEADS * HEAD_DIM
CONTEXT = 512


def tiny_model(opset: int = 24, seed: int = 1) -> onnx.ModelProto:
    """Return the decoder; the functions that it carries are of this opset."""
    rng = np.random.default_rng(seed)

    def weights(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    add = Nodes()
    angle = np.arange(CONTEXT)[:, None] * 100.0 ** -(np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    cos, sin = (add.constant(turn(angle).astype(np.float32)) for turn in (np.cos, np.sin))
    shape = {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    fields = cache_fields(KEY, VALUE, capacity=CONTEXT, **shape)
    axes = {name: (field.dtype.name, (1, *field.shape)) for name, field in fields.items()}
    inputs = {"input_ids": ("int64", (1, "tokens")), "past_lengths": ("int64", (1,))}
    outputs = {"logits": ("float32", (1, "tokens", VOCABULARY)), "present_lengths": ("int64", (1,))}
    x = add("Gather", weights(VOCABULARY, WIDTH) * np.float32(np.sqrt(VOCABULARY)), "input_ids")
    for layer in range(LAYERS):
        inputs |= {f"past.{layer}.{name}": axes[name] for name in axes}
        outputs |= {f"present.{layer}.{name}": axes[name] for name in axes}
        width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        names = {
            "query": add("MatMul", x, weights(WIDTH, width) * np.float32(1.5)),
            "cos": cos,
            "sin": sin,
            "output": f"attended_{layer}",
            "present_lengths": "present_lengths" if layer == 0 else f"lengths_{layer}",
            "past_lengths": "past_lengths",
            **{f"past_{name}": f"past.{layer}.{name}" for name in axes},
            **{f"present_{name}": f"present.{layer}.{name}" for name in axes},
        }
        node = attention_node(KEY, VALUE, heads=HEADS, kv_heads=KV_HEADS, inputs=["cos", "sin"])
        node.input[:] = [names[name] if name else "" for name in node.input]
        node.output[:] = [names[name] if name else "" for name in node.output]
        add.nodes.append(node)
        mixed = add("MatMul", names["output"], weights(WIDTH, WIDTH))
        x = add("Add", x, add("Tanh", mixed))
    add("MatMul", x, weights(WIDTH, VOCABULARY), name="logits")
    return make_model("tiny", add.nodes, inputs, outputs, functions=functions(opset), opset=opset)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} MODEL.onnx, the file to write")
    Path(sys.argv[1]).write_bytes(tiny_model().SerializeToString())

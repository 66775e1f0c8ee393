"""Decoders that look keys and values up: what they cache is exact, whatever the order of reading.

`quantized` has two layers of nsq.Attention, one beside the other, whose queries, keys and values
are rows of tables, so that `KVCache` can say every byte. Each of `POISONS` has a key that no block
can hold, in a layer of its own. `masked` has a float32 cache that grows, and a mask of padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from nsq_ref import Feedback, Scheme
from nsq_ref.scheme import KeyValueSchemes
from onnx_export.operators import attention_node, functions
from onnx_export.operators.cache_layout import CacheLayout, CacheTensor, quantized_tensors
from onnx_export.operators.nodes import Nodes, make_model

Float32 = npt.NDArray[np.float32]

VOCAB, POISONS = 24, (22, 23)
HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 4, 2, 8, 6
KEY = Scheme(block_size=4, sink_tokens=1, magnitude="gain", bits=4)
VALUE = Scheme(block_size=8, bits=3, symmetric=False, magnitude="lsq")
LAYERS = 2


class Tables:
    """Rows for each token: queries, keys and values of a layer, and the weights of the logits."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)

        def table(*shape: int) -> Float32:
            return rng.standard_normal(shape, dtype=np.float32)

        self.query = [table(VOCAB, HEADS * HEAD_DIM) for _ in range(LAYERS)]
        self.key = [table(VOCAB, KV_HEADS * HEAD_DIM) for _ in range(LAYERS)]
        self.value = [table(VOCAB, KV_HEADS * VALUE_DIM) for _ in range(LAYERS)]
        self.head = table(LAYERS * HEADS * VALUE_DIM, VOCAB)
        for layer, token in enumerate(POISONS):
            self.key[layer][token] = 1e6

    def cached(self, layer: int, tokens: npt.ArrayLike) -> tuple[Float32, Float32]:
        """Keys and values of tokens, ``[kv_heads, tokens, D]``."""
        keys, values = self.key[layer][tokens], self.value[layer][tokens]
        return (
            keys.reshape(-1, KV_HEADS, HEAD_DIM).swapaxes(0, 1),
            values.reshape(-1, KV_HEADS, VALUE_DIM).swapaxes(0, 1),
        )


def some_feedback(seed: int = 0) -> Feedback:
    """Return that of a layer whose queries have much in common."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((KV_HEADS, HEAD_DIM, HEAD_DIM))
    queries = rng.standard_normal((KV_HEADS, 5, HEAD_DIM)) @ mixing
    return Feedback.from_queries(queries, KV_HEADS)


def quantized(
    folder: Path,
    seed: int = 0,
    context_length: int | None = None,
    *,
    new_lengths: bool = True,
    counted: bool = False,
    feedback: Mapping[int, Feedback] | None = None,
) -> Path:
    """Write the model with a quantized cache, whose lengths are inputs or counted in a mask.

    Layers may code their keys with feedback (F1).
    """
    feedback = feedback or {}
    optional = {"new_lengths": "new"} if new_lengths else {}
    tables, add = Tables(seed), Nodes()
    inputs: dict[str, Any] = {
        "ids": ("int64", ("batch", "sequence")),
        **dict.fromkeys(["past", *optional.values()], ("int64", ("batch",))),
    }
    if counted:
        inputs = {"ids": inputs["ids"], "seen": ("int64", ("batch", "total"))}
        ones = add("ReduceSum", "seen", [1], keepdims=0)
        add("Min", ones, add("Squeeze", add("Shape", "ids", start=1, end=2)), name="new")
        add("Sub", ones, "new", name="past")
    outputs: dict[str, Any] = {"scores": ("float32", ("batch", "sequence", VOCAB))}
    tensors: tuple[CacheTensor, ...] = ()
    parts = []
    for layer in range(LAYERS):
        names = {"past_lengths": "past", "output": f"output.{layer}", **optional}
        for name in ("query", "key", "value"):
            table = getattr(tables, name)[layer]
            names[name] = add("Gather", table, "ids", name=f"{name}.{layer}")
        own = quantized_tensors(
            layer, KEY, VALUE, kv_heads=KV_HEADS, head_dim=HEAD_DIM, value_head_dim=VALUE_DIM
        )
        for tensor in own:
            names |= {f"past_{tensor.part}": tensor.past, f"present_{tensor.part}": tensor.present}
            axes = [
                f"{tensor.past}.{i}" if isinstance(s, str) else s
                for i, s in enumerate(tensor.shape)
            ]
            inputs[tensor.past] = outputs[tensor.present] = (tensor.dtype, axes)
        tensors += own
        fed: dict[str, str] = {}
        if (one := feedback.get(layer)) is not None:
            arrays = {"key_order": one.order, "key_factor": one.factor}
            fed = {name: add("Identity", array) for name, array in arrays.items()}
            names |= fed
        node = attention_node(
            KEY, VALUE, heads=HEADS, kv_heads=KV_HEADS, inputs=("key", "value", *optional, *fed)
        )
        for sides in (node.input, node.output):
            for index, name in enumerate(sides):
                sides[index] = names.get(name, name and f"{name}.{layer}")
        add.nodes.append(node)
        parts.append(f"output.{layer}")
    add("MatMul", add("Concat", *parts, axis=2), tables.head, name="scores")
    lengths = {"attention_mask": "seen"} if counted else {"past_lengths": "past", **optional}
    layout = CacheLayout(
        {"input_ids": "ids", **lengths, "logits": "scores"},
        tensors,
        (KeyValueSchemes(KEY, VALUE),) * LAYERS,
        8,
        context_length,
        right_padding=counted,
        key_feedback=tuple(
            feedback[layer].digest if layer in feedback else None for layer in range(LAYERS)
        )
        if feedback
        else (),
    )
    return _write(folder / "quantized.onnx", add, inputs, outputs, layout, functions())


def masked(folder: Path, *, positions: bool = True) -> Path:
    """Write the model with a cache that grows, and a mask that hides padding on the left."""
    tables, add = Tables(), Nodes()
    shape = ("batch", "past", HEAD_DIM)
    inputs: dict[str, Any] = {
        "ids": ("int64", ("batch", "sequence")),
        "seen": ("int64", ("batch", "total")),
        "old": ("float32", ("batch", "past", HEAD_DIM)),
    }
    keys = add("Gather", tables.key[0][:, :HEAD_DIM], "ids")
    if positions:
        inputs["places"] = ("int64", ("batch", "sequence"))
        angles = np.sin(np.arange(64 * HEAD_DIM, dtype=np.float32).reshape(64, HEAD_DIM))
        keys = add("Add", keys, add("Gather", angles, "places"))
    add("Concat", "old", keys, axis=1, name="new")
    query = add("Gather", tables.query[0][:, :HEAD_DIM], "ids")
    scores = add("MatMul", query, add("Transpose", "new", perm=[0, 2, 1]))
    past = add("Squeeze", add("Shape", "old", start=1, end=2))
    total = add("Squeeze", add("Shape", "new", start=1, end=2))
    rows = add("Unsqueeze", add("Range", past, total, 1), [1])
    future = add("Greater", add("Range", 0, total, 1), rows)
    hidden = add("Or", future, add("Equal", add("Unsqueeze", "seen", [1]), 0))
    scores = add("Where", hidden, np.float32(-1e30), scores)
    mixed = add("MatMul", add("Softmax", scores, axis=-1), "new")
    add("MatMul", mixed, tables.head[:HEAD_DIM], name="scores")
    outputs = {
        "scores": ("float32", ("batch", "sequence", VOCAB)),
        "new": ("float32", ("batch", "total", HEAD_DIM)),
    }
    roles = {"input_ids": "ids", "attention_mask": "seen", "logits": "scores"}
    if positions:
        roles["position_ids"] = "places"
    tensors = (CacheTensor("old", "new", "float32", shape),)
    layout = CacheLayout(roles, tensors, (None,), context_length=64)
    return _write(folder / f"masked{positions}.onnx", add, inputs, outputs, layout, [])


def _write(
    path: Path,
    add: Nodes,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    layout: CacheLayout,
    used: list[onnx.FunctionProto],
) -> Path:
    model = make_model(
        "lookup", add.nodes, inputs, outputs, functions=used, metadata=layout.to_metadata()
    )
    path.write_bytes(model.SerializeToString())
    return path


def changed_metadata(path: Path, old: str, new: str) -> Path:
    """Write a model beside this one, with another word in its metadata."""
    model = onnx.load(str(path))
    for entry in model.metadata_props:
        assert old in entry.value
        entry.value = entry.value.replace(old, new)
    other = path.with_name("changed.onnx")
    other.write_bytes(model.SerializeToString())
    return other

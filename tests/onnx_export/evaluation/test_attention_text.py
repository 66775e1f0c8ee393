"""A real model whose attention is nsq.Attention: the same text with and without the library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from nsq_ref import Scheme
from onnx_export.custom_ops import register
from onnx_export.models.built import cached_onnx
from onnx_export.models.texts import read_address
from onnx_export.models.tokenizer import Tokenizer
from onnx_export.operators import DOMAIN, VERSION, attention_node, cache_fields, functions

SCHEME = Scheme(symmetric=False, magnitude="lsq", block_size=32, sink_tokens=1)
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 9, 3, 64, 30
CAPACITY = 160
SENTENCE, TIMES = 24, 4  # tokens: two blocks are sealed in the prefill, and one right after it
CONTINUATION = 12
FIELDS = cache_fields(
    SCHEME, SCHEME, kv_heads=KV_HEADS, head_dim=HEAD_DIM, capacity=CAPACITY
)  # fmt: skip
ELEMENT = {
    "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8
}  # fmt: skip


def with_quantized_cache(path: Path) -> onnx.ModelProto:
    """Replace what lies between the rotated heads and the output projection of each layer."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    made = {node.name: node for node in graph.node}
    merged = {f"blk.{layer}.attention.merged": layer for layer in range(LAYERS)}
    # Where tokens and heads are kept, and channels of all heads follow each other.
    graph.initializer.append(numpy_helper.from_array(np.array([0, 0, -1]), "all heads"))
    nodes = []
    for node in graph.node:
        if node.name == "past":  # the length of the one row
            nodes.append(helper.make_node("Squeeze", ["past_lengths"], ["past"]))
        elif node.name in merged:
            nodes += attention_of(merged[node.name], made)
        else:
            nodes.append(node)
    info = helper.make_tensor_value_info
    inputs = [one for one in graph.input if not one.name.startswith("past_key_values")]
    inputs.append(info("past_lengths", TensorProto.INT64, ["batch"]))
    outputs = [graph.output[0]]
    for layer in range(LAYERS):
        for name, field in FIELDS.items():
            kind, shape = ELEMENT[field.dtype.name], ["batch", *field.shape]
            inputs.append(info(f"past_{name}.{layer}", kind, shape))
            outputs.append(info(f"present_{name}.{layer}", kind, shape))
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(needed(nodes, {output.name for output in outputs}))
    graph.input.extend(inputs)
    graph.output.extend(outputs)
    model.functions.extend(functions(21))
    model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    return model


def attention_of(layer: int, made: dict[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return nsq.Attention of a layer and what brings its inputs into shape."""
    heads = {
        "query": made[f"blk.{layer}.query.scaled"].input[0],
        "key": made[f"present.{layer}.key"].input[1],
        "value": made[f"present.{layer}.value"].input[1],
    }
    names = {"past_lengths": "past_lengths", "output": f"blk.{layer}.attention.merged"}
    nodes = []
    for name, one in heads.items():
        names[name] = f"{one}.flat"
        nodes += [
            helper.make_node("Transpose", [one], [f"{one}.by_token"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"{one}.by_token", "all heads"], [names[name]]),
        ]
    node = attention_node(SCHEME, SCHEME, heads=HEADS, kv_heads=KV_HEADS)
    for places in (node.input, node.output):
        for i, name in enumerate(places):
            places[i] = names.get(name, name and f"{name}.{layer}")
    return [*nodes, node]


def needed(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """Leave out nodes whose results nobody needs."""
    kept = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def continuation(path: Path, prompt: np.ndarray[Any, Any], library: bool) -> list[int]:
    """Return the most likely tokens after a prompt, one by one."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library:
        register(options)
    else:  # optimizing 30 bodies takes most of a minute; small models are run in both ways
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options)
    cache = {
        f"past_{name}.{layer}": np.zeros((1, *field.shape), field.dtype)
        for layer in range(LAYERS)
        for name, field in FIELDS.items()
    }
    names = [output.name for output in session.get_outputs()]
    text: list[int] = []
    tokens, past = prompt[None], 0
    for _ in range(CONTINUATION):
        feeds = {"input_ids": tokens, "past_lengths": np.array([past]), "num_logits": np.array(1)}
        logits, *present = session.run(names, feeds | cache)
        past += tokens.shape[1]
        cache = {
            name.replace("present_", "past_"): array
            for name, array in zip(names[1:], present, strict=True)
        }
        tokens = logits[:, -1:].argmax(axis=-1)
        text.append(int(tokens[0, 0]))
    return text


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Iterator[Path]:
    path = cached_onnx(smollm2)
    changed = path.with_name(f"quantized-cache-{os.getpid()}.onnx")
    changed.write_bytes(with_quantized_cache(path).SerializeToString())
    yield changed
    changed.unlink()


def test_same_text_with_and_without_the_library(
    model: Path, smollm2_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A1 B1 K1: on a bare runtime, and in the library, by integers and in float32."""
    # Blocks turn differences in the last bit into differences of codes, which later layers enlarge:
    # logits of two correct runs differ by up to 0.5. In a text that repeats the model is sure.
    sentence = smollm2_tokenizer.encode(read_address("1793-washington"))[:SENTENCE]
    prompt = np.tile(sentence, TIMES)
    bare = continuation(model, prompt, library=False)
    assert bare == list(sentence[:CONTINUATION])
    for exact in ("0", "1"):
        monkeypatch.setenv("NSQ_EXACT", exact)
        assert continuation(model, prompt, library=True) == bare

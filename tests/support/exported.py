"""Small decoders in the shapes in which exporters write them, and what runs them token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from onnx_export import custom_ops
from onnx_export.operators.cache_layout import CacheLayout

__all__ = ["Decoder", "Graph", "Original", "Rewritten", "gqa_model", "mha_model", "save", "session"]

Array = npt.NDArray[Any]
VOCABULARY = 17


class Graph:
    """Nodes, weights, inputs and outputs as they are added, for tests to change."""

    def __init__(self, dtype: str = "float32", seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.dtype = np.dtype(dtype)
        self.kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        self._rng = np.random.default_rng(seed)

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(
            helper.make_node(operator, inputs, [output], name=f"/{output}/{operator}", **attributes)
        )
        return output

    def array(self, name: str, value: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, name: str, *shape: int, scale: float = 1.0) -> str:
        drawn = self._rng.standard_normal(shape) * scale / np.sqrt(shape[0])
        return self.array(name, drawn.astype(self.dtype))

    def input(self, name: str, kind: int, *axes: Any) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, axes))
        return name

    def output(self, name: str, kind: int, *axes: Any) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, kind, axes))
        return name

    def model(self, opset: int, ir_version: int = 10) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, self.weights)
        domains = {"": opset, "com.microsoft": 1}
        domains |= {one.domain: 1 for one in self.functions}
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(*one) for one in domains.items()],
            ir_version=ir_version,
            producer_name="an exporter",
            functions=self.functions,
        )
        helper.set_model_props(model, {"made by": "a test"})
        return model


@dataclass(frozen=True)
class Decoder:
    """What a decoder has; attributes of the attention are those of its operator."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    dtype: str = "float32"
    packed: bool = True
    rotary: int = 16  # channels that are rotated, 0 for none
    interleaved: bool = False
    position_ids: bool = False
    bias: bool = False
    sink: bool = False
    qk_norm: bool = False
    symbolic: bool = False  # head_dim of the caches is a name
    attributes: tuple[tuple[str, Any], ...] = ()
    opset: int = 21
    positions: int = 512

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


def gqa_model(config: Decoder, change: Callable[[Graph], None] | None = None) -> onnx.ModelProto:
    """Return a decoder as onnxruntime-genai's builder writes it: GroupQueryAttention."""
    return _model(config, _gqa_layer, change)


def mha_model(config: Decoder, change: Callable[[Graph], None] | None = None) -> onnx.ModelProto:
    """Return a decoder as the optimizer of onnxruntime fuses it: MultiHeadAttention."""
    return _model(config, _mha_layer, change)


def _model(
    config: Decoder,
    make_layer: Callable[[Graph, Decoder, int, str], str],
    change: Callable[[Graph], None] | None,
) -> onnx.ModelProto:
    graph = Graph(config.dtype)
    node, hidden = graph.node, config.hidden
    ids = graph.input("input_ids", TensorProto.INT64, "batch_size", "sequence_length")
    mask = graph.input("attention_mask", TensorProto.INT64, "batch_size", "total_sequence_length")
    if config.position_ids:
        graph.input("position_ids", TensorProto.INT64, "batch_size", "sequence_length")
    if config.bias:
        axes = ("batch_size", 1, "sequence_length", "total_sequence_length")
        graph.input("bias", graph.kind, *axes)
    graph.output("logits", graph.kind, "batch_size", "sequence_length", VOCABULARY)
    channels = "head_size" if config.symbolic else config.head_dim
    for time, add, length in (
        ("past_key_values", graph.input, "past_sequence_length"),
        ("present", graph.output, "total_sequence_length"),
    ):
        for layer in range(config.layers):
            for side in ("key", "value"):
                axes = ("batch_size", config.kv_heads, length, channels)
                add(f"{time}.{layer}.{side}", graph.kind, *axes)

    one = graph.array("one", np.array([1], np.int64))
    sums = node("ReduceSum", [mask, one], "mask.sums", keepdims=0)
    node("Cast", [node("Sub", [sums, one], "mask.less")], "seqlens_k", to=TensorProto.INT32)
    shape = node("Shape", [mask], "mask.shape")
    index = graph.array("index", np.array(1, np.int64))
    total = node("Gather", [shape, index], "mask.total", axis=0)
    node("Cast", [total], "total_sequence_length", to=TensorProto.INT32)
    if config.rotary:
        angles = np.outer(
            np.arange(config.positions), 100.0 ** -(np.arange(config.rotary // 2) / 8)
        )
        graph.array("cos_cache", np.cos(angles).astype(graph.dtype))
        graph.array("sin_cache", np.sin(angles).astype(graph.dtype))

    x = node("Gather", [graph.weight("embedding", VOCABULARY, hidden, scale=4), ids], "embedded")
    for layer in range(config.layers):
        attended = make_layer(graph, config, layer, x)
        projected = node(
            "MatMul", [attended, graph.weight(f"o.{layer}", hidden, hidden)], f"p.{layer}"
        )
        added = node("Add", [x, projected], f"residual.{layer}")
        gains = graph.array(f"norm.{layer}", np.ones(hidden, graph.dtype))
        x = node(
            "SimplifiedLayerNormalization", [added, gains], f"normal.{layer}", axis=-1, epsilon=1e-6
        )
    node("MatMul", [x, graph.weight("head", hidden, VOCABULARY)], "logits")
    if change is not None:
        change(graph)
    return graph.model(config.opset)


def _gqa_layer(graph: Graph, config: Decoder, layer: int, x: str) -> str:
    node, hidden = graph.node, config.hidden
    narrow = config.kv_heads * config.head_dim
    parts = {"q": hidden, "k": narrow, "v": narrow}
    if config.packed:
        weight = graph.weight(f"qkv.{layer}", hidden, hidden + 2 * narrow, scale=1.5)
        given = [node("MatMul", [x, weight], f"qkv_out.{layer}"), "", ""]
    else:
        given = []
        for name, width in parts.items():
            weight = graph.weight(f"{name}.{layer}", hidden, width, scale=1.5)
            made = node("MatMul", [x, weight], f"{name}_out.{layer}")
            if config.qk_norm and name != "v":
                made = _normalized(graph, config, made, width)
            given.append(made)
    given += [f"past_key_values.{layer}.{side}" for side in ("key", "value")]
    given += ["seqlens_k", "total_sequence_length"]
    given += ["cos_cache", "sin_cache"] if config.rotary else ["", ""]
    given += ["position_ids" if config.position_ids else "", "bias" if config.bias else ""]
    sinks = np.linspace(-1, 2, config.heads).astype(graph.dtype)
    given.append(graph.array(f"sink.{layer}", sinks) if config.sink else "")
    graph.nodes.append(
        helper.make_node(
            "GroupQueryAttention",
            given,
            [f"attended.{layer}", f"present.{layer}.key", f"present.{layer}.value"],
            name=f"/model/layers.{layer}/attn/GroupQueryAttention",
            domain="com.microsoft",
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            do_rotary=int(config.rotary > 0),
            rotary_interleaved=int(config.interleaved),
            **dict(config.attributes),
        )
    )
    return f"attended.{layer}"


def _mha_layer(graph: Graph, config: Decoder, layer: int, x: str) -> str:
    given = [
        graph.node(
            "MatMul",
            [x, graph.weight(f"{name}.{layer}", config.hidden, config.hidden, scale=1.5)],
            f"{name}_out.{layer}",
        )
        for name in "qkv"
    ]
    given += ["", "", "bias" if config.bias else ""]
    given += [f"past_key_values.{layer}.{side}" for side in ("key", "value")]
    graph.nodes.append(
        helper.make_node(
            "MultiHeadAttention",
            given,
            [f"attended.{layer}", f"present.{layer}.key", f"present.{layer}.value"],
            name=f"/model/layers.{layer}/attn/MultiHeadAttention",
            domain="com.microsoft",
            num_heads=config.heads,
            **dict(config.attributes),
        )
    )
    return f"attended.{layer}"


def _normalized(graph: Graph, config: Decoder, name: str, width: int) -> str:
    by_head = graph.array(f"{name}.heads", np.array([0, -1, config.head_dim], np.int64))
    together = graph.array(f"{name}.all", np.array([0, -1, width], np.int64))
    gains = graph.array(f"{name}.gains", np.linspace(0.5, 1.5, config.head_dim).astype(graph.dtype))
    split = graph.node("Reshape", [name, by_head], f"{name}.split")
    normal = graph.node(
        "SimplifiedLayerNormalization", [split, gains], f"{name}.normal", axis=-1, epsilon=1e-6
    )
    return graph.node("Reshape", [normal, together], f"{name}.merged")


def save(model: onnx.ModelProto, path: Path, *, external: bool = False) -> Path:
    """Write a model, with its weights beside it if ``external``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if external:
        onnx.save_model(
            model, path, save_as_external_data=True, location=f"{path.name}.data",
            size_threshold=64,
        )  # fmt: skip
    else:
        onnx.save_model(model, path)
    return path


def session(
    path: Path, *, native: bool = False, reuse: bool = True
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.enable_mem_reuse = reuse
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if native:
        custom_ops.register(options)
    return onnxruntime.InferenceSession(path, options)


class Original:
    """A decoder with a cache of floats, which grows."""

    def __init__(self, path: Path, batch: int = 1, *, head_dim: int = 16, past: int = 0) -> None:
        self.session = session(path)
        sizes = {"batch_size": batch, "past_sequence_length": past, "head_size": head_dim}
        self.cache = {
            one.name: np.zeros([sizes.get(size, size) for size in one.shape], _dtype(one.type))
            for one in self.session.get_inputs()
            if one.name.startswith("past")
        }
        self._outputs = [one.name for one in self.session.get_outputs()]

    def step(self, feeds: Mapping[str, Array]) -> Array:
        results = self.session.run(self._outputs, {**feeds, **self.cache})
        made = dict(zip(self._outputs, results, strict=True))
        for name in self.cache:
            self.cache[name] = made[name.replace("past_key_values", "present")]
        return made["logits"]


class Rewritten:
    """A decoder as its metadata describes it."""

    def __init__(
        self, path: Path, batch: int = 1, capacity: int = 256, *, native: bool = False
    ) -> None:
        self.session = session(path, native=native)
        self.layout = CacheLayout.from_metadata(self.session.get_modelmeta().custom_metadata_map)
        capacity = self.layout.rounded(capacity)
        types = {one.name: _dtype(one.type) for one in self.session.get_inputs()}
        self.cache = {
            one.past: np.zeros(one.sizes(batch, capacity), types[one.past])
            for one in self.layout.tensors
        }
        self.lengths = np.zeros(batch, np.int64)

    def step(self, feeds: Mapping[str, Array]) -> Array:
        if "past_lengths" in self.layout.roles:
            feeds = {**feeds, "past_lengths": self.lengths}
        outputs = {one.past: one.present for one in self.layout.tensors}
        names = ["logits", *outputs.values()]
        results = self.session.run(names, {**feeds, **self.cache})
        made = dict(zip(names, results, strict=True))
        self.cache = {past: made[present] for past, present in outputs.items()}
        self.lengths = self.lengths + feeds["input_ids"].shape[1]
        return made["logits"]


def _dtype(kind: str) -> np.dtype[Any]:
    return np.dtype({"float": "float32"}.get(kind[7:-1], kind[7:-1]))

"""How the attention of a decoder is written down, and what its cache then is.

A form adds what depends on positions, once, and the attention of every layer, from the projections
of its new tokens. What the rest of the graph is does not depend on it.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsq_ref.arrays import as_integer
from nsq_ref.extras import extra
from nsq_ref.feedback import Feedback
from nsq_ref.policy import feedback_of_layers
from nsq_ref.scheme import KeyValueSchemes, Scheme
from onnx_export.models.config import LOCAL, DecoderConfig
from onnx_export.models.nodes import Graph
from onnx_export.operators import attention_node, functions
from onnx_export.operators.attention import SCATTER_OPSET
from onnx_export.operators.attention_models import feedback_tensors
from onnx_export.operators.cache_layout import CacheLayout, CacheTensor, quantized_tensors
from onnx_export.operators.schema import OPSET

with extra("onnx", __name__):
    import onnx
    from onnx import TensorProto

__all__ = ["AttentionForm", "GroupedAttention", "PlainAttention", "QuantizedAttention"]

Frequencies = Mapping[str, NDArray[np.float64]]
"""Angles by which a position turns each channel, as `rotary_frequencies` gives them."""

MOST_POSITIONS = 1 << 22
TABLE_ROWS = 1 << 13  # that are in memory at a time

DECODER_ROLES = {"input_ids": "input_ids", "num_logits": "num_logits", "logits": "logits"}
LENGTHS = {"past_lengths": "past_lengths", "new_lengths": "new_lengths"}


class AttentionForm(ABC):
    """A way to write attention down; it never changes, so that graphs and threads may share one.

    Attributes
    ----------
    opset : int
        Of the standard operators in the model.
    """

    opset: int = OPSET

    @abstractmethod
    def tensors(self, config: DecoderConfig) -> tuple[CacheTensor, ...]:
        """Return the tensors of the cache."""

    @abstractmethod
    def prepare(self, graph: Graph, config: DecoderConfig, frequencies: Frequencies) -> None:
        """Add what all layers need, given the angles by which a position turns each channel."""

    @abstractmethod
    def attend(self, graph: Graph, config: DecoderConfig, layer: int, new: tuple[str, ...]) -> str:
        """Add the attention of a layer to queries, keys and values ``[batch, sequence, width]``."""

    def layout(self, config: DecoderConfig) -> CacheLayout:
        """Return what the metadata says of the cache."""
        return CacheLayout(
            DECODER_ROLES, self.tensors(config), (None,) * config.layers,
            context_length=config.context_length,
        )  # fmt: skip

    def functions(self, nodes: Iterable[onnx.NodeProto] = ()) -> list[onnx.FunctionProto]:
        """Return the functions that the nodes of the model call."""
        return []

    def label(self) -> str:
        """Return what tells a file of this form from one of another, beside the same model.

        Examples
        --------
        >>> PlainAttention().label() != GroupedAttention().label()
        True
        """
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PlainAttention(AttentionForm):
    """Standard operators over a float32 cache that grows: for every ONNX runtime.

    Nothing changes one, so that threads may share it.

    Examples
    --------
    >>> PlainAttention()
    PlainAttention()
    """

    def tensors(self, config: DecoderConfig) -> tuple[CacheTensor, ...]:
        """Return keys and values of every layer."""
        shape = ("batch", config.kv_heads, "past", config.head_dim)
        return tuple(
            CacheTensor(f"past_key_values.{i}.{kind}", f"present.{i}.{kind}", "float32", shape)
            for i in range(config.layers)
            for kind in ("key", "value")
        )

    def prepare(self, graph: Graph, config: DecoderConfig, frequencies: Frequencies) -> None:
        """Add ``cosine`` and ``sine`` of the rotary angles, and the causal ``mask``.

        Layers that see a window have their own, whose names begin with `LOCAL`. Angles are computed
        in float64: in float32 the angle of a late position has lost digits.
        """
        zero = graph.initializer("zero", np.array(0, np.int64))
        one = graph.initializer("one", np.array(1, np.int64))
        past = graph.add("Shape", "past_key_values.0.key", start=2, end=3, name="past.shape")
        past = graph.add("Squeeze", past, name="past")
        total = graph.add("Add", past, "sequence", name="total")
        queries = graph.add("Range", past, total, one, name="queries")
        queries = graph.add("Unsqueeze", queries, graph.ints(1), name="query_positions")
        keys = graph.add("Range", zero, total, one, name="key_positions")

        future = graph.add("Greater", keys, queries, name="future")
        masked = graph.initializer("masked", np.array(-np.inf, np.float32))
        visible = graph.initializer("visible", np.array(0, np.float32))
        graph.add("Where", future, masked, visible, name="mask")
        if config.sliding_window:
            window = graph.initializer("window", np.array(config.sliding_window, np.int64))
            before = graph.add("Sub", queries, window, name="before_window")
            earlier = graph.add("LessOrEqual", keys, before, name="earlier")
            hidden = graph.add("Or", future, earlier, name="outside_window")
            graph.add("Where", hidden, masked, visible, name=f"{LOCAL}mask")

        positions = graph.add("Cast", queries, to=TensorProto.DOUBLE, name="positions")

        def add_sine(name: str, angle: str) -> None:
            exact = graph.add("Sin", angle, name=f"{name}.float64")
            graph.add("Cast", exact, to=TensorProto.FLOAT, name=name)

        for prefix, own in frequencies.items():
            both_halves = graph.initializer(f"{prefix}rotary_frequencies", np.tile(own, 2))
            angles = graph.add("Mul", positions, both_halves, name=f"{prefix}angles")
            # Sine only: older runtimes have no cosine in float64.
            quarter_turn = graph.initializer("quarter_turn", np.array(math.pi / 2))
            shifted = graph.add("Add", angles, quarter_turn, name=f"{prefix}angles.shifted")
            add_sine(f"{prefix}cosine", shifted)
            add_sine(f"{prefix}sine", angles)

    def attend(self, graph: Graph, config: DecoderConfig, layer: int, new: tuple[str, ...]) -> str:
        """Add grouped-query attention, with past and present cache."""
        block = f"blk.{layer}."
        heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim

        def split_heads(flat: str, count: int) -> str:
            shape = graph.ints(0, 0, count, head_dim)
            split = graph.add("Reshape", flat, shape, name=f"{flat}.split")
            return graph.add("Transpose", split, perm=[0, 2, 1, 3], name=f"{flat}.heads")

        def cache(kind: str, tokens: str) -> str:
            past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
            graph.output(present, "batch", kv_heads, "past + sequence", head_dim)
            graph.add("Concat", past, tokens, axis=2, name=present)
            # [batch, kv_heads, 1, tokens, head_dim]: one cache row serves its group of query heads.
            return graph.add("Unsqueeze", present, graph.ints(2), name=f"{block}{kind}")

        query = _rotary(graph, config, layer, split_heads(new[0], heads))
        key = cache("key", _rotary(graph, config, layer, split_heads(new[1], kv_heads)))
        value = cache("value", split_heads(new[2], kv_heads))

        scale = graph.initializer("attention_scale", np.array(head_dim**-0.5, np.float32))
        query = graph.add("Mul", query, scale, name=f"{block}query.scaled")
        groups = graph.ints(0, kv_heads, heads // kv_heads, -1, head_dim)
        query = graph.add("Reshape", query, groups, name=f"{block}query")
        key = graph.add("Transpose", key, perm=[0, 1, 2, 4, 3], name=f"{block}key.transposed")
        scores = graph.add("MatMul", query, key, name=f"{block}scores")
        mask = f"{_prefix(config, layer)}mask"
        scores = graph.add("Add", scores, mask, name=f"{block}scores.masked")
        weights = graph.add("Softmax", scores, axis=-1, name=f"{block}attention_weights")
        mixed = graph.add("MatMul", weights, value, name=f"{block}attention")
        by_head = graph.ints(0, heads, -1, head_dim)
        mixed = graph.add("Reshape", mixed, by_head, name=f"{block}attention.heads")
        mixed = graph.add("Transpose", mixed, perm=[0, 2, 1, 3], name=f"{block}attention.tokens")
        merged = graph.ints(0, 0, heads * head_dim)
        return graph.add("Reshape", mixed, merged, name=f"{block}attention.merged")


@dataclass(frozen=True, eq=False)
class GroupedAttention(AttentionForm):
    """ONNX Runtime's ``com.microsoft.GroupQueryAttention`` over a cache of fixed size.

    Where a model has windows, ONNX Runtime before 1.24 lets a query see one position more.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    scales : numpy.ndarray, optional
        Static scales of its packed int4 cache, float32 ``[layers, 2, kv_heads, head_dim]``, of keys
        and of values, for ONNX Runtime 1.27; without them the cache is float32.

    Examples
    --------
    >>> GroupedAttention()
    GroupedAttention(scales=None)
    """

    scales: NDArray[np.float32] | None = None

    def label(self) -> str:
        """Return what tells a file of this form from one of another, beside the same model."""
        own = b"" if self.scales is None else self.scales.tobytes()
        return hashlib.sha256(b"GroupedAttention" + own).hexdigest()[:16]

    def tensors(self, config: DecoderConfig) -> tuple[CacheTensor, ...]:
        """Return keys and values of every layer."""
        return tuple(
            CacheTensor(f"past_key_values.{i}.{kind}", f"present.{i}.{kind}", *self._stored(config))
            for i in range(config.layers)
            for kind in ("key", "value")
        )

    def layout(self, config: DecoderConfig) -> CacheLayout:
        """Return what the metadata says of the cache, unless the operator refuses the model."""
        _require_positions(config)
        if config.head_dim % 16:
            raise ValueError(
                f"head_dim={config.head_dim} is not a multiple of 16, which GroupQueryAttention "
                "wants to rotate; choose another form of attention"
            )
        wanted = (config.layers, 2, config.kv_heads, config.head_dim)
        if self.scales is not None and self.scales.shape != wanted:
            raise ValueError(f"scales has shape {list(self.scales.shape)}; give {list(wanted)}")
        return CacheLayout(
            DECODER_ROLES | LENGTHS, self.tensors(config), (None,) * config.layers,
            context_length=config.context_length,
        )  # fmt: skip

    def _stored(self, config: DecoderConfig) -> tuple[str, tuple[int | str, ...]]:
        leading = ("batch", config.kv_heads, "capacity")
        if self.scales is None:
            return "float32", (*leading, config.head_dim)
        return "uint8", (*leading, config.head_dim // 2)

    def prepare(self, graph: Graph, config: DecoderConfig, frequencies: Frequencies) -> None:
        """Add the tables of the rotation, and lengths as the operator counts them."""
        _add_lengths(graph)
        _add_tables(graph, config, frequencies)
        one = graph.initializer("one", np.array(1, np.int64))
        # A row without a new token writes behind its own, where nothing looks.
        real = graph.add("Max", "new_lengths", one, name="real_lengths")
        total = graph.add("Add", "past_lengths", real, name="total_lengths")
        last = graph.add("Sub", total, one, name="last_positions.int64")
        graph.add("Cast", last, to=TensorProto.INT32, name="last_positions")
        most = graph.add("ReduceMax", "past_lengths", keepdims=0, name="most_past")
        total = graph.add("Add", most, "sequence", name="total.int64")
        graph.add("Cast", total, to=TensorProto.INT32, name="total")

    def attend(self, graph: Graph, config: DecoderConfig, layer: int, new: tuple[str, ...]) -> str:
        """Add the operator."""
        cache = [f"{layer}.key", f"{layer}.value"]
        dtype, shape = self._stored(config)
        for name in cache:
            graph.output(f"present.{name}", *shape, dtype=dtype)
        output = f"blk.{layer}.attention"
        inputs = [*new, *(f"past_key_values.{name}" for name in cache)]
        inputs += ["last_positions", "total", *_tables(config, layer)]
        packed: dict[str, Any] = {}
        if self.scales is not None:
            kinds = zip(cache, self.scales[layer], strict=True)
            steps = [graph.initializer(f"{name}.scale", one[:, None]) for name, one in kinds]
            inputs += ["", "", "", *steps]
            packed = {f"{side}_quant_type": "PER_CHANNEL" for side in "kv"}
            packed["kv_cache_bit_width"] = 4
        if (window := config.window(layer)) is not None:
            packed["local_window_size"] = window
        graph.several(
            "GroupQueryAttention", inputs, [output, *(f"present.{name}" for name in cache)],
            name=output, domain="com.microsoft", num_heads=config.heads,
            kv_num_heads=config.kv_heads, do_rotary=1, **packed,
        )  # fmt: skip
        return output


@dataclass(frozen=True)
class QuantizedAttention(AttentionForm):
    """``nsq.Attention`` over a quantized cache.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    key, value : Scheme
        With a block size and without outlier channels.
    opset : int
        From 21 on; from 24 on the cache is appended to in place without the native library, too.
    feedback : mapping of str or int to Feedback
        With which keys are coded (F1), by the number of the layer, as `nsq_ref.files.load_feedback`
        gives it; layers that are not named have none.

    Raises
    ------
    TypeError, ValueError
        If the opset is older, or newer than 24. Feedback that does not fit is refused when the
        model is known.

    Examples
    --------
    >>> scheme = Scheme.named("streaming4")
    >>> QuantizedAttention(scheme, scheme).key.block_size
    128
    """

    key: Scheme
    value: Scheme
    opset: int = OPSET
    feedback: Mapping[Any, Feedback] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        as_integer("opset", self.opset, least=OPSET, most=SCATTER_OPSET)

    def _feedback(self, config: DecoderConfig) -> dict[int, Feedback]:
        """Return the feedback of each layer that has some, if it fits the model."""
        heads = dict.fromkeys(range(config.layers), (config.kv_heads, config.head_dim))
        return feedback_of_layers(self.feedback, heads) if self.feedback else {}

    def tensors(self, config: DecoderConfig) -> tuple[CacheTensor, ...]:
        """Return the parts of every layer."""
        return tuple(
            tensor
            for layer in range(config.layers)
            for tensor in quantized_tensors(
                layer, self.key, self.value, kv_heads=config.kv_heads, head_dim=config.head_dim
            )
        )

    def layout(self, config: DecoderConfig) -> CacheLayout:
        """Return what the metadata says of the cache, unless the context is too long."""
        _require_positions(config)
        given = self._feedback(config)
        digests = [given[i].digest if i in given else None for i in range(config.layers)]
        return CacheLayout(
            DECODER_ROLES | LENGTHS, self.tensors(config),
            (KeyValueSchemes(self.key, self.value),) * config.layers,
            math.lcm(self.key.block_size or 1, self.value.block_size or 1),
            config.context_length, key_feedback=tuple(digests) if given else (),
        )  # fmt: skip

    def functions(self, nodes: Iterable[onnx.NodeProto] = ()) -> list[onnx.FunctionProto]:
        """Return those of the domain."""
        return functions(self.opset, nodes)

    def prepare(self, graph: Graph, config: DecoderConfig, frequencies: Frequencies) -> None:
        """Add the tables of the rotation, and the lengths."""
        _add_lengths(graph)
        _add_tables(graph, config, frequencies)

    def attend(self, graph: Graph, config: DecoderConfig, layer: int, new: tuple[str, ...]) -> str:
        """Add the operator."""
        feedback = self._feedback(config).get(layer)
        tables = {} if feedback is None else feedback_tensors(feedback, f"blk.{layer}.")
        node = attention_node(
            self.key, self.value, heads=config.heads, kv_heads=config.kv_heads,
            inputs=("key", "value", "new_lengths", "cos", "sin", *tables),
            sliding_window=config.window(layer),
        )  # fmt: skip
        output = f"blk.{layer}.attention"
        given = (*new, *_tables(config, layer))
        names = dict(zip(("query", "key", "value", "cos", "sin"), given, strict=True))
        names |= {"output": output, "present_lengths": f"{output}.lengths"}
        names |= {name: graph.tensor(table) for name, table in tables.items()}
        for tensor in self.tensors(config):
            if tensor.layer == layer:
                names |= {
                    f"past_{tensor.part}": tensor.past,
                    f"present_{tensor.part}": tensor.present,
                }
                graph.output(tensor.present, *_axes(tensor), dtype=tensor.dtype)
        node.name = output
        for tensors in (node.input, node.output):
            for index, name in enumerate(tensors):
                tensors[index] = names.get(name, name)
        graph.nodes.append(node)
        return output


def add_inputs(graph: Graph, tensors: tuple[CacheTensor, ...]) -> None:
    """Add the tensors of a cache as inputs."""
    for tensor in tensors:
        graph.input(tensor.past, *_axes(tensor), dtype=tensor.dtype)


def _axes(tensor: CacheTensor) -> tuple[int | str, ...]:
    """Return the axes of a tensor, those of schemes that differ apart."""
    own = f"{tensor.part}_rows"
    return tuple(
        own if tensor.part and str(size).startswith("capacity") else size for size in tensor.shape
    )


def _add_lengths(graph: Graph) -> None:
    graph.input("past_lengths", "batch", dtype="int64")
    graph.input("new_lengths", "batch", dtype="int64")


def _add_tables(graph: Graph, config: DecoderConfig, frequencies: Frequencies) -> None:
    """Add cosine and sine of every position that the model was made for."""
    for prefix, own in frequencies.items():
        for name, function in (("cosine", np.cos), ("sine", np.sin)):
            shape = (config.context_length, len(own))
            rows = _turns(config.context_length, own, function)
            graph.weight_parts(f"{prefix}{name}_table", shape, np.dtype(np.float32), rows)


def _turns(
    count: int, frequencies: NDArray[np.float64], function: np.ufunc
) -> Iterator[NDArray[np.float64]]:
    """Yield a function of the angles of so many positions, some rows at a time."""
    for start in range(0, count, TABLE_ROWS):
        positions = np.arange(start, min(start + TABLE_ROWS, count), dtype=np.float64)
        yield function(positions[:, None] * frequencies)


def _prefix(config: DecoderConfig, layer: int) -> str:
    """Return what begins the names of the mask and the rotation of a layer."""
    return "" if config.window(layer) is None else LOCAL


def _tables(config: DecoderConfig, layer: int) -> tuple[str, str]:
    """Return the names of the tables of cosine and sine of a layer."""
    prefix = _prefix(config, layer)
    return f"{prefix}cosine_table", f"{prefix}sine_table"


def _require_positions(config: DecoderConfig) -> None:
    """Refuse a context for which tables would fill the disk."""
    if config.context_length > MOST_POSITIONS:
        raise ValueError(
            f"the model's context of {config.context_length} tokens is more than the "
            f"{MOST_POSITIONS} for which rotations are kept in tables; choose plain attention"
        )


def _rotary(graph: Graph, config: DecoderConfig, layer: int, x: str) -> str:
    """Rotate ``x`` of shape ``[batch, heads, sequence, head_dim]``."""
    prefix = _prefix(config, layer)
    middle, end = graph.ints(config.head_dim // 2), graph.ints(config.head_dim)
    first = graph.add("Slice", x, graph.ints(0), middle, graph.ints(3), name=f"{x}.first")
    second = graph.add("Slice", x, middle, end, graph.ints(3), name=f"{x}.second")
    negative = graph.add("Neg", second, name=f"{x}.negative")
    turned = graph.add("Concat", negative, first, axis=3, name=f"{x}.turned")
    straight = graph.add("Mul", x, f"{prefix}cosine", name=f"{x}.cosine")
    across = graph.add("Mul", turned, f"{prefix}sine", name=f"{x}.sine")
    return graph.add("Add", straight, across, name=f"{x}.rotary")

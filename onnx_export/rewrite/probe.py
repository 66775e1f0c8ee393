"""What nodes make of small inputs of known sizes, in NumPy.

Exporters compute the shapes of keys in many ways: by Concat, by ConstantOfShape, Mul, Equal and
Where, by Shape of this or that. What comes of it is the same for all: a probe looks at what comes
of it. Whatever depends on weights has a shape and no content.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref.extras import extra
from onnx_export.rewrite.graph import Graph
from onnx_export.rewrite.sizes import input_roles

with extra("rewrite", __name__):
    import onnx_ir as ir

__all__ = ["MOVING", "Probe", "Seen", "apply", "axes_of", "probes"]

Array = npt.NDArray[Any]
LARGEST = 1 << 20  # elements that are computed; more have a shape only
SIZES = ((2, 3, 5), (1, 7, 1), (3, 0, 4))  # batch, past, new: of a step, a chunk, a prompt


MOVING = frozenset(
    {"Cast", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
"""Operators that move elements, by shapes alone."""


class Seen(NamedTuple):
    """What a value has in it; content of weights and of what comes of them is not known."""

    array: Array
    known: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.array.shape


class Probe:
    """The values of a graph at one batch size, length of the past and number of new tokens.

    Parameters
    ----------
    graph : Graph
    batch, past, new : int
    """

    def __init__(self, graph: Graph, batch: int, past: int, new: int) -> None:
        self.batch, self.past, self.new = batch, past, new
        self._graph = graph
        self._seen: dict[ir.Value, Seen | None] = {}
        self._roles = {value: name for name, value in input_roles(graph).items()}

    @property
    def total(self) -> int:
        """Past and new tokens."""
        return self.past + self.new

    def value(self, value: ir.Value | None) -> Seen | None:
        """Return what a value has in it, None where that cannot be told."""
        if value is None:
            return None
        waiting = [value]
        while waiting:
            one = waiting[-1]
            if one in self._seen:
                waiting.pop()
                continue
            node = one.producer()
            if node is None or one.is_initializer():
                self._seen[one] = self._given(one)
                continue
            needed = [given for given in node.inputs if given is not None]
            missing = [given for given in needed if given not in self._seen]
            if missing:
                waiting += missing
                continue
            inputs = [None if given is None else self._seen[given] for given in node.inputs]
            incomplete = any(self._seen[given] is None for given in needed)
            made = None if incomplete else apply(node, inputs)
            for output in node.outputs:
                first = output is node.outputs[0]
                self._seen[output] = (made if first else None) or self._stated(output)
        return self._seen[value]

    def number(self, value: ir.Value | None) -> float | None:
        """Return the one element of a value, if it has one that depends on no weight."""
        seen = self.value(value)
        if seen is None or not seen.known or seen.array.size != 1:
            return None
        return float(seen.array.reshape(-1)[0])

    def _given(self, value: ir.Value) -> Seen | None:
        constant = self._graph.constant(value)
        if constant is not None:
            return Seen(constant)
        role = self._roles.get(value)
        if role in ("input_ids", "position_ids", "attention_mask"):
            width = self.total if role == "attention_mask" else self.new
            return Seen(_opaque((self.batch, width), np.dtype(_kind(value))), known=False)
        return self._stated(value) or self._before(value)

    def _before(self, value: ir.Value) -> Seen | None:
        """Return the shape of a past that has a name for its channels, from what is appended."""
        if not value.is_graph_input() or "past" not in (value.name or ""):
            return None
        for node in (use.node for use in value.uses()):
            if node.op_type != "Concat" or node.domain or len(node.inputs) != 2:
                continue
            new = self.value(node.inputs[1]) if node.inputs[0] is value else None
            axis = node.attributes.get_int("axis", 0)
            if new is not None and -len(new.shape) <= axis < len(new.shape):
                shape = list(new.shape)
                shape[axis] = self.past
                return Seen(_opaque(tuple(shape), np.dtype(_kind(value))), known=False)
        return None

    def _stated(self, value: ir.Value) -> Seen | None:
        """Return the shape that the model states, if it is one of numbers and of a cache's axes."""
        if value.shape is None or value.dtype is None:
            return None
        sizes = []
        for size in value.shape:
            found = size if isinstance(size, int) else self._named(size.value)
            if found is None:
                return None
            sizes.append(found)
        return Seen(_opaque(tuple(sizes), np.dtype(_kind(value))), known=False)

    def _named(self, symbol: str | None) -> int | None:
        """Return the size that a name stands for, if an input of a known role has it."""
        if symbol is None:
            return None
        for one in self._graph.model.graph.inputs:
            role = self._roles.get(one)
            sizes: tuple[int, ...] = ()
            if role in ("input_ids", "position_ids"):
                sizes = (self.batch, self.new)
            elif role == "attention_mask":
                sizes = (self.batch, self.total)
            elif "past" in (one.name or "") and self._graph.rank(one) == 4:
                sizes = (self.batch, -1, self.past, -1)
            for axis, size in enumerate(sizes):
                if size >= 0 and self._graph.symbol(one, axis) == symbol:
                    return size
        return None


def probes(graph: Graph) -> tuple[Probe, ...]:
    """Return the probes of a graph; they remember what they have seen."""
    if graph.probes is None:
        graph.probes = tuple(Probe(graph, *sizes) for sizes in SIZES)
    found: tuple[Probe, ...] = graph.probes
    return found


def axes_of(graph: Graph, value: ir.Value | None) -> list[str | int] | None:
    """Return what the sizes of a value are: numbers, "batch", "past", "new" or "total"."""
    shapes = []
    for probe in probes(graph):
        seen = probe.value(value)
        if seen is None:
            return None
        shapes.append(seen.shape)
    if len({len(shape) for shape in shapes}) != 1:
        return None
    known = {
        tuple(getattr(probe, name) for probe in probes(graph)): name
        for name in ("batch", "past", "new", "total")
    }
    axes: list[str | int] = []
    for sizes in zip(*shapes, strict=True):
        if sizes in known:
            axes.append(known[sizes])
        elif len(set(sizes)) == 1:
            axes.append(sizes[0])
        else:
            return None
    return axes


def apply(node: ir.Node, inputs: list[Seen | None]) -> Seen | None:
    """Return the first output of a node, None where its operator is not known here."""
    if node.domain and node.domain != "com.microsoft":
        return None
    operator = OPERATORS.get(node.op_type)
    given = [None if one is None else one.array for one in inputs]
    known = all(one is None or one.known for one in inputs)
    attributes = node.attributes
    shaping = inputs[SHAPED.get(node.op_type, len(inputs)) :]
    if any(one is not None and not one.known for one in shaping):
        return None  # even the shape depends on content
    try:
        if node.op_type == "Shape" and given[0] is not None:
            start, end = attributes.get_int("start", 0), attributes.get_int("end", None)
            return Seen(np.array(given[0].shape, np.int64)[start:end])
        if node.op_type == "Size" and given[0] is not None:
            return Seen(np.array(given[0].size, np.int64))
        if node.op_type in SAME_SHAPE and given[0] is not None:
            return Seen(_opaque(given[0].shape, given[0].dtype), known=False)
        if node.op_type == "MatMul" and not (given[0] is None or given[1] is None):
            made = np.matmul(_zeros(given[0]), _zeros(given[1])) if _small(given) else None
            shape = _matmul_shape(given[0].shape, given[1].shape) if made is None else made.shape
            return Seen(_opaque(shape, given[0].dtype), known=False)
        if node.op_type == "Gather" and not known and given[0] is not None:
            return _gathered(given, attributes)
        if operator is None:
            return None
        result = np.asarray(operator(given, attributes))
    except (ValueError, IndexError, TypeError, AttributeError, OverflowError):
        return None
    if result.size > LARGEST or not known:
        return Seen(_opaque(result.shape, result.dtype), known=False)
    return Seen(result)


def _kind(value: ir.Value) -> Any:
    return np.float32 if value.dtype is None else value.dtype.numpy()


def _opaque(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Return an array of no content, whatever its size in no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def _zeros(array: Array) -> Array:
    return np.broadcast_to(np.zeros((), np.int8), array.shape)


def _small(arrays: list[Array | None]) -> bool:
    return all(one is None or one.size < 4096 for one in arrays)


def _matmul_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
        raise ValueError("not two matrices")
    return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1])


def _gathered(given: list[Array | None], attributes: Any) -> Seen | None:
    table, indices = given[:2]
    if table is None or indices is None:
        return None
    axis = attributes.get_int("axis", 0) % table.ndim
    shape = table.shape[:axis] + indices.shape + table.shape[axis + 1 :]
    return Seen(_opaque(shape, table.dtype), known=False)


def _axes(given: list[Array | None], attributes: Any) -> tuple[int, ...] | None:
    if len(given) > 1 and given[1] is not None:
        return tuple(int(one) for one in given[1].reshape(-1))
    axes = attributes.get_ints("axes", None)
    return None if axes is None else tuple(axes)


def _reshape(given: list[Any], attributes: Any) -> Array:
    x, sizes = given[0], [int(one) for one in given[1]]
    if not attributes.get_int("allowzero", 0):
        sizes = [x.shape[i] if one == 0 else one for i, one in enumerate(sizes)]
    return np.reshape(x, sizes)


def _flatten(given: list[Any], attributes: Any) -> Array:
    x, axis = given[0], attributes.get_int("axis", 1)
    return np.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


def _slice(given: list[Any], attributes: Any) -> Array:
    x, starts, ends = given[:3]
    axes = given[3] if len(given) > 3 and given[3] is not None else range(len(starts))
    steps = given[4] if len(given) > 4 and given[4] is not None else [1] * len(starts)
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            raise ValueError("steps backward are not followed")
        index[int(axis)] = slice(int(start), int(end), int(step))
    return np.asarray(x[tuple(index)])


def _unsqueeze(given: list[Any], attributes: Any) -> Array:
    axes = _axes(given, attributes)
    if axes is None:
        raise ValueError("no axes")
    return np.expand_dims(given[0], axes)


def _expand(given: list[Any], attributes: Any) -> Array:
    shape = np.broadcast_shapes(given[0].shape, tuple(int(one) for one in given[1]))
    return np.broadcast_to(given[0], shape)


def _constant_of_shape(given: list[Any], attributes: Any) -> Array:
    value = attributes.get_tensor("value", None)
    fill = np.zeros(1, np.float32) if value is None else value.numpy()
    return np.full(tuple(int(one) for one in given[0]), fill.reshape(-1)[0], fill.dtype)


def _divide(given: list[Any], attributes: Any) -> Array:
    a, b = given[:2]
    if a.dtype.kind in "iu":
        return np.asarray(a // np.where(b == 0, 1, b))
    with np.errstate(all="ignore"):
        return np.asarray(a / b)


def _trilu(given: list[Any], attributes: Any) -> Array:
    offset = int(given[1].reshape(-1)[0]) if len(given) > 1 and given[1] is not None else 0
    cut = np.triu if attributes.get_int("upper", 1) else np.tril
    return np.asarray(cut(given[0], offset))


def _constant(given: list[Any], attributes: Any) -> Array:
    for name in ("value_int", "value_ints"):
        if name in attributes:
            return np.array(attributes[name].value, np.int64)
    for name in ("value_float", "value_floats"):
        if name in attributes:
            return np.array(attributes[name].value, np.float32)
    return np.asarray(attributes.get_tensor("value").numpy())


def _gather_nd(given: list[Any], attributes: Any) -> Array:
    if attributes.get_int("batch_dims", 0):
        raise ValueError("batch_dims are not followed")
    return np.asarray(given[0][tuple(np.moveaxis(given[1], -1, 0))])


def _reduce(how: Callable[..., Any]) -> Callable[[list[Any], Any], Any]:
    def reduced(given: list[Any], attributes: Any) -> Any:
        axes = _axes(given, attributes)
        return how(given[0], axis=axes, keepdims=bool(attributes.get_int("keepdims", 1)))

    return reduced


def _by_element(how: Callable[..., Any]) -> Callable[[list[Any], Any], Any]:
    def made(given: list[Any], attributes: Any) -> Any:
        with np.errstate(all="ignore"):
            return how(*given)

    return made


def _cum_sum(given: list[Any], attributes: Any) -> Array:
    if attributes.get_int("exclusive", 0) or attributes.get_int("reverse", 0):
        raise ValueError("only plain sums are followed")
    x, axis = given[:2]
    return np.cumsum(x, axis=int(axis.reshape(-1)[0]), dtype=x.dtype)


SHAPED = {
    "ConstantOfShape": 0, "CumSum": 1, "Expand": 1, "Range": 0, "ReduceMax": 1, "ReduceMean": 1,
    "ReduceSum": 1, "Reshape": 1, "Slice": 1, "Squeeze": 1, "Tile": 1, "Trilu": 1, "Unsqueeze": 1,
}  # fmt: skip
"""From which input on content decides the shape of the result."""

SAME_SHAPE = frozenset(
    {
        "Softmax", "RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization",
        "RotaryEmbedding", "SkipSimplifiedLayerNormalization", "SkipLayerNormalization", "Gelu",
        "FastGelu", "QuickGelu", "Sigmoid", "Relu", "Erf", "Dropout",
    }
)  # fmt: skip
OPERATORS: Mapping[str, Callable[[list[Any], Any], Any]] = {
    "Abs": _by_element(np.abs),
    "Add": _by_element(np.add),
    "And": _by_element(np.logical_and),
    "Cast": lambda given, at: given[0].astype(ir.DataType(at.get_int("to")).numpy()),
    "Concat": lambda given, at: np.concatenate(given, axis=at.get_int("axis")),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Cos": _by_element(np.cos),
    "CumSum": _cum_sum,
    "Div": _divide,
    "Equal": _by_element(np.equal),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": lambda given, at: np.take(given[0], given[1], axis=at.get_int("axis", 0)),
    "GatherND": _gather_nd,
    "Greater": _by_element(np.greater),
    "GreaterOrEqual": _by_element(np.greater_equal),
    "Identity": lambda given, at: given[0],
    "IsNaN": _by_element(np.isnan),
    "Less": _by_element(np.less),
    "LessOrEqual": _by_element(np.less_equal),
    "Max": lambda given, at: np.maximum.reduce(np.broadcast_arrays(*given)),
    "Min": lambda given, at: np.minimum.reduce(np.broadcast_arrays(*given)),
    "Mul": _by_element(np.multiply),
    "Neg": _by_element(np.negative),
    "Not": _by_element(np.logical_not),
    "Or": _by_element(np.logical_or),
    "Pow": _by_element(np.power),
    "Range": lambda given, at: np.arange(*(one.reshape(-1)[0] for one in given)),
    "Reciprocal": _by_element(np.reciprocal),
    "ReduceMax": _reduce(np.max),
    "ReduceMean": _reduce(np.mean),
    "ReduceSum": _reduce(np.sum),
    "Reshape": _reshape,
    "Sin": _by_element(np.sin),
    "Slice": _slice,
    "Sqrt": _by_element(np.sqrt),
    "Squeeze": lambda given, at: np.squeeze(given[0], _axes(given, at)),
    "Sub": _by_element(np.subtract),
    "Tanh": _by_element(np.tanh),
    "Tile": lambda given, at: np.tile(given[0], given[1]),
    "Transpose": lambda given, at: np.transpose(given[0], at.get_ints("perm", None)),
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": _by_element(np.where),
}

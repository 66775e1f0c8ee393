"""What patterns ask of the values of a graph: constants, shapes, where a value comes from."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nsq_ref.extras import extra

with extra("rewrite", __name__):
    import onnx_ir as ir

__all__ = ["MODEL_DTYPES", "Graph"]

Array = npt.NDArray[Any]

MODEL_DTYPES: dict[str, Literal["float32", "float16"]] = {
    "float32": "float32",
    "float16": "float16",
}
"""What nsq.Attention can have, by the names in NumPy."""

PASSING = frozenset({"Identity"})
SAME_WIDTH = frozenset(
    {
        "Add", "Cast", "Identity", "LayerNormalization", "Mul", "RMSNormalization",
        "RotaryEmbedding", "SimplifiedLayerNormalization", "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization", "Sub",
    }
)  # fmt: skip
LARGEST_CONSTANT = 1 << 22  # bytes that are looked at: weights are not


class Graph:
    """The main graph of a model, for reading.

    Parameters
    ----------
    model : onnx_ir.Model

    Attributes
    ----------
    model : onnx_ir.Model
    opset : int
        Of the standard operators.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.opset = model.opset_imports.get("", 1)
        self.probes: Any = None  # of `onnx_export.rewrite.probe`

    def constant(self, value: ir.Value | None) -> Array | None:
        """Return what is known to be in a value before the model runs: initializers, Constants.

        Large ones are weights: None. An Identity or a Cast of a constant is one.
        """
        if value is None or value.is_graph_input():
            return None
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return tensor.numpy() if tensor.nbytes <= LARGEST_CONSTANT else None
        node = value.producer()
        if node is None or node.domain or node.op_type not in ("Identity", "Cast"):
            return None
        found = self.constant(node.inputs[0])
        if found is None or node.op_type == "Identity":
            return found
        return found.astype(ir.DataType(node.attributes.get_int("to", 1)).numpy())

    def number(self, value: ir.Value | None) -> int | float | None:
        """Return a constant of one element."""
        found = self.constant(value)
        if found is None or found.size != 1:
            return None
        number: int | float = found.reshape(())[()].item()
        return number

    def integers(self, value: ir.Value | None) -> list[int] | None:
        """Return a constant of one axis, or a scalar, as a list."""
        found = self.constant(value)
        if found is None or found.dtype.kind not in "iu" or found.ndim > 1:
            return None
        return [int(one) for one in found.reshape(-1)]

    def source(
        self, value: ir.Value | None, *, through: Container[str] = PASSING
    ) -> ir.Node | None:
        """Return the node that makes a value, looking through some operators with one input."""
        while value is not None and (node := value.producer()) is not None:
            if node.domain or node.op_type not in through:
                return node
            value = node.inputs[0]
        return None

    def origin(self, value: ir.Value, *, through: Container[str] = PASSING) -> ir.Value:
        """Return the value behind some operators with one input."""
        while (node := value.producer()) is not None and node.op_type in through:
            if node.domain or node.inputs[0] is None:
                break
            value = node.inputs[0]
        return value

    def users(self, value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
        """Return the nodes that read a value, those in subgraphs too, and as which input."""
        for use in value.uses():
            yield use.node, use.idx

    def rank(self, value: ir.Value) -> int | None:
        """Return the number of axes, where it is known."""
        if value.shape is not None:
            return value.shape.rank()
        seen = self.probes[0].value(value) if self.probes else None
        return None if seen is None else len(seen.shape)

    def size(self, value: ir.Value | None, axis: int) -> int | None:
        """Return the size of an axis, where the model states a number."""
        if (
            value is None
            or value.shape is None
            or not -value.shape.rank() <= axis < value.shape.rank()
        ):
            return None
        size = value.shape[axis]
        return size if isinstance(size, int) else None

    def symbol(self, value: ir.Value, axis: int) -> int | str | None:
        """Return the size of an axis, a number or the name that the model has for it."""
        if value.shape is None or not -value.shape.rank() <= axis < value.shape.rank():
            return None
        size = value.shape[axis]
        return size if isinstance(size, int) else size.value

    def width(self, value: ir.Value | None) -> int | None:
        """Return the size of the last axis, from shapes or from the weights before it."""
        for _ in range(64):
            if value is None:
                return None
            if (size := self.size(value, -1)) is not None:
                return size
            if (node := value.producer()) is None:
                return None
            if node.op_type in ("MatMul", "Gemm"):
                transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
                return self.size(node.inputs[1], 0 if transposed else -1)
            if node.op_type in ("MatMulNBits", "MatMulBnb4", "QMoE"):
                return node.attributes.get_int("N", 0) or None
            if node.op_type == "Reshape" and not node.domain:
                sizes = self.integers(node.inputs[1])
                if sizes and sizes[-1] > 0:
                    return sizes[-1]
                return self._merged(node.inputs[0], sizes)
            if node.op_type not in SAME_WIDTH:
                return None
            # Of two that are added, the other may be one row of constants.
            others = [one for one in node.inputs[1:2] if node.op_type in ("Add", "Mul", "Sub")]
            for other in others:
                if (size := self.size(other, -1)) is not None and size > 1:
                    return size
            value = node.inputs[0]
        return None

    def _merged(self, value: ir.Value | None, sizes: list[int] | None) -> int | None:
        """Return what [0, 0, -1] makes of the last two axes of four."""
        if value is None or sizes is None or sizes[:-1] != [0, 0]:
            return None
        node = value.producer()
        if node is None or node.op_type not in SAME_WIDTH | {"Reshape"}:
            return None
        before = self.source(value, through=SAME_WIDTH)
        if before is None or before.op_type != "Reshape":
            return None
        split = self.integers(before.inputs[1])
        if not split or len(split) != 4:
            return None
        if min(split[2:]) > 0:
            return math.prod(split[2:])
        return self.width(before.inputs[0]) if split[:2] == [0, 0] or -1 in split[2:] else None

    def dtype(self, value: ir.Value | None) -> str | None:
        """Return the dtype of a value by its name in NumPy, where the model states it."""
        if value is None or value.dtype is None:
            return None
        return str(np.dtype(value.dtype.numpy()))

    def model_dtype(self, value: ir.Value | None) -> Literal["float32", "float16"] | None:
        """Return the dtype of a value if nsq.Attention can have it."""
        return MODEL_DTYPES.get(self.dtype(value) or "")

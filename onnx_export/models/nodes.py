"""Nodes and weights of the ONNX graph of a model, added one by one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nsq_ref.extras import extra
from onnx_export.operators.nodes import Nodes, make_model
from onnx_export.operators.schema import OPSET

with extra("onnx", __name__):
    import onnx
    from onnx import TensorProto, numpy_helper

# External data must be aligned to pages to be mapped into memory.
_ALIGNMENT = 4096
# Bytes of a weight that are made contiguous at a time.
_PART = 1 << 24


class Graph(Nodes):
    """Named nodes and initializers; large tensors go straight into a file of external data."""

    def __init__(self, external: str) -> None:
        super().__init__()
        self.stream: IO[bytes]  # of the external data, while weights are added
        self._external = external
        self._hash = hashlib.sha256()
        self._inputs: dict[str, tuple[str, tuple[int | str, ...]]] = {}
        self._outputs: dict[str, tuple[str, tuple[int | str, ...]]] = {}
        self._initializers: dict[str, TensorProto] = {}

    @property
    def digest(self) -> str:
        """SHA-256 of the external data."""
        return self._hash.hexdigest()

    def input(self, name: str, *shape: int | str, dtype: str = "float32") -> None:
        """Add an input of the graph; strings name the axes that may have any length."""
        self._inputs[name] = dtype, shape

    def output(self, name: str, *shape: int | str, dtype: str = "float32") -> None:
        """Add an output of the graph."""
        self._outputs[name] = dtype, shape

    def add(self, operator: str, *inputs: str, name: str, **attributes: Any) -> str:
        """Append a node with one output of the node's name, and return the name."""
        self.several(operator, inputs, [name], name=name, **attributes)
        return name

    def initializer(self, name: str, values: NDArray[Any]) -> str:
        """Add a small initializer, once for every name."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(values, name)
        return name

    def tensor(self, tensor: TensorProto) -> str:
        """Add a small initializer that there is."""
        self._initializers[tensor.name] = tensor
        return str(tensor.name)

    def ints(self, *values: int) -> str:
        """Add a vector of int64, such as a shape."""
        name = "ints_" + "_".join(map(str, values))
        return self.initializer(name, np.array(values, dtype=np.int64))

    def has(self, name: str) -> bool:
        """Whether there is an initializer of that name."""
        return name in self._initializers

    def weight(self, name: str, values: NDArray[np.float32] | NDArray[np.uint8]) -> str:
        """Add an initializer whose elements lie in the external data file."""
        return self.weight_parts(name, values.shape, values.dtype, _parts(values))

    def weight_parts(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        parts: Iterable[NDArray[Any]],
    ) -> str:
        """Add such an initializer from parts along its first axis, of which each is let go."""
        self._write(bytes(-self.stream.tell() % _ALIGNMENT))
        start = self.stream.tell()
        for part in parts:
            data = np.ascontiguousarray(part, dtype=dtype.newbyteorder("<"))
            self._write(data.reshape(-1).data.cast("B"))
        length = self.stream.tell() - start
        if length != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"parts of {name!r} have {length} bytes together, not those of {shape}"
            )
        kind = TensorProto.UINT8 if dtype == np.uint8 else TensorProto.FLOAT
        tensor = TensorProto(name=name, data_type=kind, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        location = {"location": self._external, "offset": start, "length": length}
        for key, value in location.items():
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    def _write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self.stream.write(data)

    def model(
        self,
        name: str,
        metadata: Mapping[str, str],
        functions: Sequence[onnx.FunctionProto] = (),
        opset: int = OPSET,
    ) -> onnx.ModelProto:
        """Return the finished model."""
        return make_model(
            name, self.nodes, self._inputs, self._outputs,
            initializers=list(self._initializers.values()), metadata=metadata,
            functions=functions, opset=opset,
        )  # fmt: skip


def _parts(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield some rows at a time, as a transposed matrix is copied to be contiguous."""
    if not values.ndim:
        yield values
        return
    step = max(1, _PART * len(values) // max(1, values.nbytes))
    for start in range(0, len(values), step):
        yield values[start : start + step]

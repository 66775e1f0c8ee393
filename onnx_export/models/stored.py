"""Weights in the bits that a GGUF file stores them in, multiplied by ``com.microsoft.MatMulNBits``.

A matrix is kept where the operator has its values: blocks of 32 with one scale, in the types

=====  ==========================  ==============================================================
Q4_0   ``(code - 8) * scale``      the operator's own 4-bit form
Q8_0   ``code * scale``            codes plus 128 are the operator's own 8-bit form
Q4_1   ``code * scale + minimum``  the 4-bit form, and the sum of each block of the input times
                                   ``minimum + 8 * scale``, in a second product
=====  ==========================  ==============================================================

Scales and minimums are float16 in the file and float32 in the graph, which changes no value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsq_ref.extras import extra
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.nodes import Graph

with extra("onnx", __name__):
    from gguf import GGMLQuantizationType as GGMLType

BLOCK = 32
"""Weights of a scale, in all three types."""

_BITS = {GGMLType.Q4_0: 4, GGMLType.Q4_1: 4, GGMLType.Q8_0: 8}

# MatMulNBits may round its input to fewer bits; 1 asks for float32, 0 leaves it to the provider.
_FLOAT32_INPUT = 1


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix ``[out_features, in_features]`` in blocks of 32 along its rows.

    A weight is ``(code - 2 ** (bits - 1)) * scale + offset``.
    """

    bits: int  # 4 or 8
    codes: NDArray[np.uint8]  # [out_features, blocks, 32]
    scales: NDArray[np.float32]  # [out_features, blocks]
    offsets: NDArray[np.float32] | None  # [out_features, blocks]

    def reordered(self, order: Callable[[NDArray[Any]], NDArray[Any]]) -> StoredMatrix:
        """Return the matrix with its rows in the order that a function gives any array."""
        offsets = None if self.offsets is None else order(self.offsets)
        return StoredMatrix(self.bits, order(self.codes), order(self.scales), offsets)


def can_keep(file: GGUFFile, name: str) -> bool:
    """Whether a tensor of the file is a matrix that `read_stored` reads."""
    info = file.info(name)
    return info.tensor_type in _BITS and len(info.shape) == 2


def keeps_any(file: GGUFFile) -> bool:
    """Whether there is such a matrix besides the embedding, which is always float32."""
    return any(name != "token_embd.weight" and can_keep(file, name) for name in file.tensors)


def read_stored(file: GGUFFile, name: str) -> StoredMatrix:
    """Return a matrix that `can_keep` allows.

    Raises
    ------
    ValueError
        If a scale or a minimum is not finite.
    """
    info = file.info(name)
    kind = info.tensor_type
    rows = file.raw(name).reshape(info.shape[0], info.shape[1] // BLOCK, -1)
    floats = 2 if kind == GGMLType.Q4_1 else 1
    numbers = np.ascontiguousarray(rows[..., : 2 * floats]).view("<f2").astype(np.float32)
    if not np.isfinite(numbers).all():
        raise file.not_finite(name)
    stored = rows[..., 2 * floats :]
    if kind == GGMLType.Q8_0:
        codes = stored ^ np.uint8(128)  # int8 plus 128
    else:  # a byte has one code of the block's first half and one of its second
        codes = np.concatenate([stored & np.uint8(15), stored >> np.uint8(4)], axis=-1)
    scales = numbers[..., 0]
    offsets = numbers[..., 1] + 8 * scales if kind == GGMLType.Q4_1 else None
    return StoredMatrix(_BITS[kind], codes, scales, offsets)


def add_product(graph: Graph, x: str, matrix: StoredMatrix, weight: str, name: str) -> str:
    """Add ``x @ matrix.T`` for ``x`` of shape ``[..., in_features]``, its weights so called."""
    features, blocks = matrix.scales.shape
    codes = matrix.codes
    if matrix.bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)
    product = name if matrix.offsets is None else f"{name}.scaled"
    graph.add(
        "MatMulNBits", x, graph.weight(f"{weight}.codes", codes),
        graph.weight(f"{weight}.scales", matrix.scales), name=product, domain="com.microsoft",
        K=blocks * BLOCK, N=features, bits=matrix.bits, block_size=BLOCK,
        accuracy_level=_FLOAT32_INPUT,
    )  # fmt: skip
    if matrix.offsets is None:
        return product
    offsets = graph.weight(f"{weight}.offsets", matrix.offsets.T)
    shifted = graph.add("MatMul", _block_sums(graph, x, blocks), offsets, name=f"{name}.shifted")
    return graph.add("Add", product, shifted, name=name)


def _block_sums(graph: Graph, x: str, blocks: int) -> str:
    """Add the sum of every block of ``x``, once for all that multiply it."""
    sums = f"{x}.block_sums"
    if not any(sums in node.output for node in graph.nodes):
        leading = graph.add("Shape", x, end=-1, name=f"{x}.leading")
        own = graph.ints(blocks, BLOCK)
        shape = graph.add("Concat", leading, own, axis=0, name=f"{x}.blocks.shape")
        split = graph.add("Reshape", x, shape, allowzero=1, name=f"{x}.blocks")
        graph.add("ReduceSum", split, graph.ints(-1), keepdims=0, name=sums)
    return sums

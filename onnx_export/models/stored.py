"""Weights in the bits that a GGUF file stores them in, multiplied by ``com.microsoft.MatMulNBits``.

Every type here has the values ``(code - zero) * scale``, some plus an offset, in blocks that share
these: a matrix is kept where all of it can be said in codes of 4 or 8 bits and float32 numbers.

====================  ====  =====  ========================
Q4_0                  4     32     no offset
Q4_1, Q4_K            4     32     an offset a block
Q5_0, Q8_0            8     32     no offset
Q5_1, Q5_K            8     32     an offset a block
Q6_K                  8     16     no offset
====================  ====  =====  ========================

Without an offset the values are those of the file, bit for bit; with one they are rounded once
more, to float32. Offsets are multiplied by the sum of each block of the input, in a second product.

Codes of 8 bits are kept as two of 4, the upper and the lower halves, and multiplied one after the
other: ONNX Runtime multiplies codes of 8 bits by float32 many times slower, and not before 1.23.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsq_ref.extras import extra
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.nodes import Graph

with extra("onnx", __name__):
    from gguf import GGMLQuantizationType as GGMLType

__all__ = ["KEPT", "Stored", "StoredMatrix", "add_product", "add_rows", "can_keep"]

SUPER = 256  # weights of a block that has blocks in it
ROWS_BYTES = 1 << 24  # of codes that are in memory at a time

# MatMulNBits may round its input to fewer bits; 1 asks for float32, 0 leaves it to the provider.
_FLOAT32_INPUT = 1

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class StoredMatrix:
    """Rows of a matrix ``[out_features, in_features]``, in blocks along them.

    A weight is ``(code - 2 ** (bits - 1)) * scale + offset``.
    """

    bits: int  # 4 or 8
    codes: Bytes  # [out_features, blocks, block]
    scales: Floats  # [out_features, blocks]
    offsets: Floats | None  # [out_features, blocks]

    def reordered(self, order: Callable[[NDArray[Any]], NDArray[Any]]) -> StoredMatrix:
        """Return the matrix with its rows in the order that a function gives any array."""
        offsets = None if self.offsets is None else order(self.offsets)
        return StoredMatrix(self.bits, order(self.codes), order(self.scales), offsets)


class Stored:
    """A matrix of a file that `can_keep` allows, to be read a part at a time.

    Parameters
    ----------
    file : GGUFFile
    name : str
    order : callable, optional
        Gives the rows of any array their order.
    """

    def __init__(
        self,
        file: GGUFFile,
        name: str,
        order: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
    ) -> None:
        self._file, self._name, self._order = file, name, order
        info = file.info(name)
        self._decode, self.bits, self.block, self.has_offsets = _TYPES[info.tensor_type]
        self.features, self.width = info.shape

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return self.width // self.block

    def parts(self) -> Iterator[StoredMatrix]:
        """Yield all rows, some at a time.

        Raises
        ------
        ValueError
            If a scale or an offset is not finite.
        """
        rows = self.features if self._order else max(1, ROWS_BYTES // self.width)
        for start in range(0, self.features, rows):
            yield self._read(slice(start, start + rows))

    def _read(self, rows: slice) -> StoredMatrix:
        raw = self._file.raw(self._name)[rows]
        with np.errstate(all="ignore"):
            codes, scales, offsets = self._decode(raw)
        if not all(np.isfinite(one).all() for one in (scales, offsets) if one is not None):
            raise self._file.not_finite(self._name)
        lead = (len(raw), self.blocks)
        matrix = StoredMatrix(
            self.bits,
            codes.reshape(*lead, self.block),
            scales.reshape(lead),
            None if offsets is None else offsets.reshape(lead),
        )
        return matrix if self._order is None else matrix.reordered(self._order)


def can_keep(file: GGUFFile, name: str) -> bool:
    """Whether a tensor of the file is a matrix that `Stored` reads."""
    info = file.info(name)
    return info.tensor_type in _TYPES and len(info.shape) == 2


def keeps_any(file: GGUFFile) -> bool:
    """Whether there is such a matrix."""
    return any(can_keep(file, name) for name in file.tensors)


def add_product(graph: Graph, x: str, matrix: Stored, weight: str, name: str) -> str:
    """Add ``x @ matrix.T`` for ``x`` of shape ``[..., in_features]``, its weights so called."""
    _add_weights(graph, matrix, weight)
    plain = name if not matrix.has_offsets else f"{name}.scaled"

    def product(kind: str, made: str, *zeros: str) -> str:
        return graph.add(
            "MatMulNBits", x, f"{weight}.{kind}", f"{weight}.scales", *zeros, name=made,
            domain="com.microsoft", K=matrix.width, N=matrix.features, bits=4,
            block_size=matrix.block, accuracy_level=_FLOAT32_INPUT,
        )  # fmt: skip

    if matrix.bits == 4:
        product("codes", plain)
    else:
        upper = graph.add("Mul", product("upper", f"{name}.upper"), _sixteen(graph),
                          name=f"{name}.shifted_upper")  # fmt: skip
        lower = product("lower", f"{name}.lower", _zeros(graph, matrix))
        graph.add("Add", upper, lower, name=plain)
    if not matrix.has_offsets:
        return plain
    sums = _block_sums(graph, x, matrix)
    shifted = graph.add("MatMul", sums, f"{weight}.offsets", name=f"{name}.shifted")
    return graph.add("Add", plain, shifted, name=name)


def add_rows(graph: Graph, ids: str, matrix: Stored, weight: str, name: str) -> str:
    """Add the rows of a matrix that ``ids`` ``[batch, sequence]`` name: ``[..., in_features]``.

    Standard operators of any runtime. A product may use the same weights, which exist once.
    """
    _add_weights(graph, matrix, weight)

    def halves(kind: str) -> str:
        """Add codes of 4 bits, as float32."""
        packed = graph.add("Gather", f"{weight}.{kind}", ids, name=f"{name}.{kind}")
        four = graph.initializer("four_bits", np.array(4, np.uint8))
        mask = graph.initializer("low_bits", np.array(15, np.uint8))
        first = graph.add("BitwiseAnd", packed, mask, name=f"{name}.{kind}.even")
        second = graph.add("BitShift", packed, four, direction="RIGHT", name=f"{name}.{kind}.odd")
        pair = [
            graph.add("Unsqueeze", one, graph.ints(-1), name=f"{one}.apart")
            for one in (first, second)
        ]
        both = graph.add("Concat", *pair, axis=-1, name=f"{name}.{kind}.pairs")
        split = graph.ints(0, 0, matrix.blocks, matrix.block)
        codes = graph.add("Reshape", both, split, name=f"{name}.{kind}.blocks")
        return graph.add("Cast", codes, to=1, name=f"{name}.{kind}.float32")

    if matrix.bits == 4:
        codes, zero = halves("codes"), 8
    else:
        upper = graph.add("Mul", halves("upper"), _sixteen(graph), name=f"{name}.shifted_upper")
        codes, zero = graph.add("Add", upper, halves("lower"), name=f"{name}.joined"), 128
    middle = graph.initializer(f"middle_{zero}", np.array(zero, np.float32))
    centered = graph.add("Sub", codes, middle, name=f"{name}.centered")
    scales = graph.add("Gather", f"{weight}.scales", ids, name=f"{name}.scales")
    scales = graph.add("Unsqueeze", scales, graph.ints(-1), name=f"{name}.scale")
    values = graph.add("Mul", centered, scales, name=f"{name}.scaled")
    if matrix.has_offsets:
        offsets = graph.add("Gather", f"{weight}.offsets", ids, axis=1, name=f"{name}.offsets")
        offsets = graph.add("Transpose", offsets, perm=[1, 2, 0], name=f"{name}.offsets.last")
        offsets = graph.add("Unsqueeze", offsets, graph.ints(-1), name=f"{name}.offset")
        values = graph.add("Add", values, offsets, name=f"{name}.values")
    return graph.add("Reshape", values, graph.ints(0, 0, matrix.width), name=name)


def _add_weights(graph: Graph, matrix: Stored, weight: str) -> None:
    """Add codes, scales and offsets, unless they are there."""
    if graph.has(f"{weight}.scales"):
        return
    packed = (matrix.features, matrix.blocks, matrix.block // 2)
    scales, offsets = [], []  # kept on the way, as they are small

    def codes(kind: str) -> Iterator[Bytes]:
        for one in matrix.parts():
            if kind != "lower":
                scales.append(one.scales)
                offsets.append(one.offsets)
            yield _packed(one.codes, kind)

    for kind in ("codes",) if matrix.bits == 4 else ("upper", "lower"):
        graph.weight_parts(f"{weight}.{kind}", packed, np.dtype(np.uint8), codes(kind))
    graph.weight(f"{weight}.scales", np.concatenate(scales))
    if matrix.has_offsets:
        all_offsets = np.concatenate([one for one in offsets if one is not None])
        graph.weight(f"{weight}.offsets", all_offsets.T)


def _packed(codes: Bytes, kind: str) -> Bytes:
    """Return codes, or halves of them, two in a byte, the first in its lower bits."""
    if kind == "upper":
        codes = codes >> np.uint8(4)
    elif kind == "lower":
        codes = codes & np.uint8(15)
    packed: Bytes = codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)
    return packed


def _sixteen(graph: Graph) -> str:
    return graph.initializer("sixteen", np.array(16, np.float32))


def _zeros(graph: Graph, matrix: Stored) -> str:
    """Add zero points of 0, which matrices of one shape share."""
    shape = (matrix.features, (matrix.blocks + 1) // 2)
    name = f"zero_points_{shape[0]}_{shape[1]}"
    return name if graph.has(name) else graph.weight(name, np.zeros(shape, np.uint8))


def _block_sums(graph: Graph, x: str, matrix: Stored) -> str:
    """Add the sum of every block of ``x``, once for all that multiply it."""
    sums = f"{x}.block_sums_{matrix.block}"
    if not any(sums in node.output for node in graph.nodes):
        leading = graph.add("Shape", x, end=-1, name=f"{sums}.leading")
        own = graph.ints(matrix.blocks, matrix.block)
        shape = graph.add("Concat", leading, own, axis=0, name=f"{sums}.shape")
        split = graph.add("Reshape", x, shape, allowzero=1, name=f"{sums}.blocks")
        graph.add("ReduceSum", split, graph.ints(-1), keepdims=0, name=sums)
    return sums


# How the types lie in a file. Each takes rows of whole blocks, and returns codes, scales and
# offsets of all blocks, one after the other.

_Decoded = tuple[Bytes, Floats, Floats | None]


def _q4_0(raw: Bytes) -> _Decoded:
    scales, codes = _split(raw, 2, 16)
    return _halves(codes), _float16(scales), None


def _q4_1(raw: Bytes) -> _Decoded:
    scales, minimums, codes = _split(raw, 2, 2, 16)
    scale = _float16(scales)
    return _halves(codes), scale, _float16(minimums) + 8 * scale


def _q5_0(raw: Bytes) -> _Decoded:
    scales, high, low = _split(raw, 2, 4, 16)
    return _fifth_bit(low, high) + np.uint8(112), _float16(scales), None  # 16 below 128


def _q5_1(raw: Bytes) -> _Decoded:
    scales, minimums, high, low = _split(raw, 2, 2, 4, 16)
    return _fifth_bit(low, high) + np.uint8(128), _float16(scales), _float16(minimums)


def _q8_0(raw: Bytes) -> _Decoded:
    scales, codes = _split(raw, 2, 32)
    return codes ^ np.uint8(128), _float16(scales), None  # int8 plus 128


def _q4_k(raw: Bytes) -> _Decoded:
    scale, step, packed, low = _split(raw, 2, 2, 12, 128)
    scales, minimums = _six_bits(scale, step, packed)
    return _halves(low.reshape(-1, 4, 32)), scales, 8 * scales - minimums


def _q5_k(raw: Bytes) -> _Decoded:
    scale, step, packed, high, low = _split(raw, 2, 2, 12, 32, 128)
    scales, minimums = _six_bits(scale, step, packed)
    fifth = high[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    codes = _halves(low.reshape(-1, 4, 32)).reshape(-1, 8, 32) | fifth << np.uint8(4)
    return codes + np.uint8(128), scales, -minimums


def _q6_k(raw: Bytes) -> _Decoded:
    low, high, own, scale = _split(raw, 128, 64, 16, 2)
    lows = _halves(low.reshape(-1, 2, 64))
    highs = high.reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    codes = lows.reshape(-1, SUPER) | (highs & np.uint8(3)).reshape(-1, SUPER) << np.uint8(4)
    scales = own.view(np.int8).astype(np.float32) * _float16(scale)[:, None]
    return codes + np.uint8(96), scales, None  # 32 below 128


def _split(raw: Bytes, *widths: int) -> list[Bytes]:
    """Return fields of every block, ``[blocks, width]`` each."""
    blocks = raw.reshape(-1, sum(widths))
    return np.split(blocks, np.cumsum(widths)[:-1], axis=1)


def _float16(field: Bytes) -> Floats:
    return np.ascontiguousarray(field).view("<f2").astype(np.float32)[:, 0]


def _halves(codes: Bytes) -> Bytes:
    """Return the lower halves of some bytes, and then their upper ones."""
    return np.concatenate([codes & np.uint8(15), codes >> np.uint8(4)], axis=-1)


def _fifth_bit(low: Bytes, high: Bytes) -> Bytes:
    bits: Bytes = np.unpackbits(high, axis=1, bitorder="little")
    codes: Bytes = _halves(low) | bits << np.uint8(4)
    return codes


def _six_bits(scale: Bytes, step: Bytes, packed: Bytes) -> tuple[Floats, Floats]:
    """Return scales and minimums of the 8 blocks in a block, whose factors have 6 bits."""
    first, second, last = np.split(packed, 3, axis=1)
    low, top = np.uint8(63), np.uint8(6)
    factors = np.concatenate(
        [first & low, last & np.uint8(15) | (first >> top) << np.uint8(4)], axis=1
    )
    others = np.concatenate(
        [second & low, last >> np.uint8(4) | (second >> top) << np.uint8(4)], axis=1
    )
    return (
        _float16(scale)[:, None] * factors.astype(np.float32),
        _float16(step)[:, None] * others.astype(np.float32),
    )


# Bits of a code, weights of a block, and whether it has an offset.
_TYPES: dict[GGMLType, tuple[Callable[[Bytes], _Decoded], int, int, bool]] = {
    GGMLType.Q4_0: (_q4_0, 4, 32, False),
    GGMLType.Q4_1: (_q4_1, 4, 32, True),
    GGMLType.Q5_0: (_q5_0, 8, 32, False),
    GGMLType.Q5_1: (_q5_1, 8, 32, True),
    GGMLType.Q8_0: (_q8_0, 8, 32, False),
    GGMLType.Q4_K: (_q4_k, 4, 32, True),
    GGMLType.Q5_K: (_q5_k, 8, 32, True),
    GGMLType.Q6_K: (_q6_k, 8, 16, False),
}

KEPT = ", ".join(kind.name for kind in _TYPES)
"""Names of the types, for messages."""

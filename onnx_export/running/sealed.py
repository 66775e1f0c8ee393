"""Cropping a quantized cache: a block that is cut in two goes back to the tail, decoded (C1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from nsq_ref import rounding
from nsq_ref.codec import dequantize
from nsq_ref.quantized import Quantized
from nsq_ref.scheme import Scheme
from onnx_export.operators.cache_layout import CacheTensor
from onnx_export.running.buffers import Buffers, scheme_of

__all__ = ["cut_blocks"]

Array = NDArray[Any]


def cut_blocks(
    buffers: Buffers, before: Sequence[int], after: Sequence[int]
) -> list[tuple[Array, Array]]:
    """Return the tails that a crop makes anew, and what shall be in them."""
    changes = []
    for tensor in buffers.tensors:
        scheme = scheme_of(buffers.layout, tensor)
        if scheme is None or tensor.part is None or not tensor.part.endswith("_tail"):
            continue
        for row, (old, new) in enumerate(zip(before, after, strict=True)):
            _, sealed, rest = scheme.cut(new)
            if rest and scheme.cut(old).sealed != sealed:
                block = _decoded(buffers, tensor, scheme, row, sealed)[:, :rest]
                tail = buffers.arrays[tensor.past][row][:, :rest]
                changes.append((tail, rounding.saturate(block, tail.dtype)))
    return changes


def _decoded(buffers: Buffers, tail: CacheTensor, scheme: Scheme, row: int, first: int) -> Array:
    """Decode the block that begins with this one of the sealed tokens."""
    kv_heads, size, head_dim = buffers.arrays[tail.past][row].shape
    side = (tail.part or "").removesuffix("tail")
    known = scheme.parts(head_dim)
    rows = {"tokens": slice(first, first + size), "blocks": slice(first // size, first // size + 1)}
    parts: dict[str, Any] = {
        part: buffers.arrays[tensor.past][row][:, rows[known[part].rows]]
        for tensor in buffers.tensors
        if tensor.layer == tail.layer and tensor.part and tensor.part.startswith(side)
        if (part := tensor.part.removeprefix(side)) not in ("sinks", "tail")
    }
    dtype = buffers.arrays[tail.past].dtype
    sealed = replace(scheme, sink_tokens=0)
    return dequantize(Quantized(sealed, (kv_heads, size, head_dim), dtype, **parts))

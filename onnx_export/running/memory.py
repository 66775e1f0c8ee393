"""How many bytes a cache takes, by part, and what it would take in float16."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from nsq_ref.dtypes import DTYPES
from onnx_export.operators.cache_layout import CacheLayout, CacheTensor
from onnx_export.running.buffers import filled_rows, token_axis

__all__ = ["Memory", "memory_of"]


class Memory(NamedTuple):
    """Bytes of a cache.

    Nothing changes one, so that threads may share it.

    Attributes
    ----------
    parts : mapping of str to int
        Bytes of each part, with room for all of the capacity: ``packed``, ``scale``, ``norm``,
        ``zero``, ``sinks`` and ``tail`` of a quantized cache, ``buffer`` of one in buffers,
        ``plain`` of any other.
    used : int
        Bytes that hold something. The system gives memory as it is written to, so that this is what
        the cache takes of the machine, to a page a tensor.
    float16 : int
        Bytes of as many tokens in float16; not known of buffers.
    """

    parts: Mapping[str, int]
    used: int
    float16: int

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, with room for all of the capacity.

        Examples
        --------
        >>> Memory({"packed": 8, "scale": 2}, used=5, float16=20).nbytes
        10
        """
        return sum(self.parts.values())

    def __str__(self) -> str:
        share = f", {self.used / self.float16:.1%} of float16" if self.float16 else ""
        return f"{self.used / 1e6:.2f} MB{share}"


def memory_of(
    layout: CacheLayout,
    fixed: Mapping[str, tuple[int, ...]],
    grown: Iterable[tuple[int, ...]],
    lengths: Sequence[int],
) -> Memory:
    """Count bytes, given shapes of the tensors and the tokens that each row has in them."""
    parts: dict[str, int] = {}
    used = float16 = 0
    growing = iter(grown)
    for tensor in layout.tensors:
        width = DTYPES[tensor.dtype].itemsize
        shape = next(growing) if tensor.grows else fixed[tensor.past]
        nbytes = math.prod(shape) * width
        part = tensor.part.partition("_")[2] or "buffer" if tensor.part else "plain"
        parts[part] = parts.get(part, 0) + nbytes
        used += nbytes if tensor.grows else _filled_bytes(layout, tensor, shape, lengths)
        float16 += 2 * _elements(tensor) * sum(lengths)
    return Memory(parts, used, float16)


def _filled_bytes(
    layout: CacheLayout, tensor: CacheTensor, shape: tuple[int, ...], lengths: Sequence[int]
) -> int:
    row = math.prod(shape[1:]) * DTYPES[tensor.dtype].itemsize
    if (axis := token_axis(tensor)) is None:
        return len(lengths) * row
    rows = sum(filled_rows(layout, tensor, length) for length in lengths)
    return row // shape[axis] * rows if shape[axis] else 0


def _elements(tensor: CacheTensor) -> int:
    """Return the elements of a token that a tensor stands for: of a quantized side, its tail."""
    if tensor.part is not None:
        if not tensor.part.endswith("_tail"):
            return 0
        _, kv_heads, _, head_dim = tensor.shape
        return int(kv_heads) * int(head_dim)
    known = [size for size in tensor.shape if isinstance(size, int)]
    per_token = tensor.grows or "capacity" in tensor.shape
    return math.prod(known) if per_token and DTYPES[tensor.dtype].itemsize > 1 else 0

"""The memory of a cache: what of it tokens need, and how it is bound to a run.

Tensors of fixed size are bound as past and present at once, so that a step appends in place. Those
that grow come out of each step anew and go into the next; nothing ever changes one, so that forks
share them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsq_ref.dtypes import DTYPES
from nsq_ref.extras import extra
from nsq_ref.scheme import Scheme
from onnx_export.operators.cache_layout import CacheLayout, CacheTensor
from onnx_export.operators.schema import ELEMENTS
from onnx_export.running.model import Model

with extra("onnx", __name__):
    import onnxruntime

__all__ = ["Buffers", "Keep", "as_value", "filled_rows", "scheme_of", "token_axis", "zeros"]

Array = NDArray[Any]

ALIGNMENT = 64  # bytes: a line of the processor's cache


class Buffers:
    """The tensors of fixed size, zero at first, for the rows of a batch."""

    def __init__(self, model: Model, batch: int, capacity: int) -> None:
        self.layout, self._in_place = model.layout, model.in_place
        self.tensors = [tensor for tensor in model.layout.tensors if not tensor.grows]
        self.schemes = {one for pair in model.layout.schemes if pair is not None for one in pair}
        self.arrays = self._made(batch, capacity)
        self._values = {name: as_value(array) for name, array in self.arrays.items()}
        self._others = self._values
        if not self._in_place:
            self._other_arrays = self._made(batch, capacity)
            self._others = {name: as_value(a) for name, a in self._other_arrays.items()}

    def bind(self, binding: onnxruntime.IOBinding) -> None:
        """Bind every past and every present."""
        for tensor in self.tensors:
            binding.bind_ortvalue_input(tensor.past, self._values[tensor.past])
            binding.bind_ortvalue_output(tensor.present, self._others[tensor.past])

    def turn(self, binding: onnxruntime.IOBinding) -> None:
        """Make what was the present the past, where they are not the same."""
        if not self._in_place:
            self.arrays, self._other_arrays = self._other_arrays, self.arrays
            self._values, self._others = self._others, self._values
            self.bind(binding)

    def copy_rows(self, source: Buffers, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Take rows of another cache, as far as they are filled."""
        for tensor in self.tensors:
            for row, (other, length) in enumerate(zip(rows, lengths, strict=True)):
                part = filled(self.layout, tensor, length)
                self.arrays[tensor.past][row][part] = source.arrays[tensor.past][other][part]

    def _made(self, batch: int, capacity: int) -> dict[str, Array]:
        return {
            tensor.past: zeros(tensor.sizes(batch, capacity), DTYPES[tensor.dtype])
            for tensor in self.tensors
        }


class Keep(contextlib.AbstractContextManager["Keep"]):
    """Memory that is put back as it was if the ``with`` block is left by an exception.

    Examples
    --------
    >>> memory = np.zeros(3)
    >>> with contextlib.suppress(KeyError), Keep([memory[:2]]):
    ...     memory[:] = 1
    ...     {}["missing"]
    >>> memory
    array([0., 0., 1.])
    """

    def __init__(self, places: Sequence[Array]) -> None:
        self._kept = [(place, place.copy()) for place in places]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            for place, values in self._kept:
                place[...] = values


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return zeros whose memory the system gives when it is written to, aligned."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def as_value(array: Array) -> onnxruntime.OrtValue:
    """Return an array as ONNX Runtime takes it, in the same memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
        array, ELEMENTS[array.dtype.name]
    )


def scheme_of(layout: CacheLayout, tensor: CacheTensor) -> Scheme | None:
    """Return the scheme of which a tensor is a part."""
    if (
        tensor.layer is None
        or tensor.part is None
        or (pair := layout.schemes[tensor.layer]) is None
    ):
        return None
    return pair.key if tensor.part.startswith("key") else pair.value


def token_axis(tensor: CacheTensor) -> int | None:
    """Return the axis along which a tensor of fixed size has its tokens, if it has one."""
    if tensor.is_buffer:
        return None
    if tensor.part is not None:
        return 2
    axes = [axis for axis, size in enumerate(tensor.shape) if str(size).startswith("capacity")]
    return axes[0] if axes else None


def filled_rows(layout: CacheLayout, tensor: CacheTensor, length: int) -> int:
    """Return how much of that axis is filled when a row of the batch has so many tokens."""
    scheme = scheme_of(layout, tensor)
    coded = length
    if scheme is not None and tensor.part is not None:
        sinks, coded, tail = scheme.cut(length)
        own = {"sinks": sinks, "tail": tail}
        if (part := tensor.part.partition("_")[2]) in own:
            return own[part]
    axis = token_axis(tensor)
    size = "" if axis is None else str(tensor.shape[axis])
    return -(-coded // int(size.removeprefix("capacity/"))) if "/" in size else coded


def filled(layout: CacheLayout, tensor: CacheTensor, length: int) -> tuple[slice, ...]:
    """Return what is filled of one row of the batch, as an index."""
    axis = token_axis(tensor)
    if axis is None:
        return ()
    # Without the axis of the batch.
    return (*(slice(None),) * (axis - 1), slice(filled_rows(layout, tensor, length)))


def overwritten_tails(
    buffers: Buffers, before: Sequence[int], after: Sequence[int]
) -> Iterator[Array]:
    """Yield what a step overwrites of the past: tails that it seals, where new tokens take over."""
    overwritten: dict[Scheme, list[int]] = {}  # tokens of each row, by the scheme: layers share it
    for scheme in buffers.schemes:
        cuts = [(scheme.cut(old), scheme.cut(new)) for old, new in zip(before, after, strict=True)]
        overwritten[scheme] = [
            min(was.tail, now.tail) if was.sealed != now.sealed else 0 for was, now in cuts
        ]
    if not any(any(counts) for counts in overwritten.values()):
        return
    for tensor in buffers.tensors:
        own = scheme_of(buffers.layout, tensor)
        if own is not None and tensor.part is not None and tensor.part.endswith("_tail"):
            for row, count in enumerate(overwritten[own]):
                if count:
                    yield buffers.arrays[tensor.past][row][:, :count]

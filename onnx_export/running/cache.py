"""A cache and the runs that fill it: one state, which changes at once or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsq_ref.arrays import as_array
from nsq_ref.dtypes import DTYPES
from nsq_ref.extras import extra
from onnx_export.running import feeding, saved
from onnx_export.running.buffers import (
    Buffers,
    Keep,
    as_value,
    filled,
    overwritten_tails,
    token_axis,
)
from onnx_export.running.memory import Memory, memory_of
from onnx_export.running.model import FAULTS, Model, said
from onnx_export.running.sealed import cut_blocks

with extra("onnx", __name__):
    import onnxruntime

__all__ = ["Cache"]

PathLike = str | os.PathLike[str]
Array = NDArray[Any]
Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class State:
    """All that changes about a session but memory of fixed size, so that it changes at once."""

    lengths: tuple[int, ...]  # tokens of each row
    slots: int  # places of the longest row, padding included
    mask: NDArray[np.bool_] | None  # [batch, slots], where padding is on the left
    grown: tuple[onnxruntime.OrtValue, ...]

    @property
    def stored(self) -> tuple[int, ...]:
        """Places of each row in the cache."""
        return self.lengths if self.mask is None else (self.slots,) * len(self.lengths)


class Cache:
    """The cache of a model for the rows of a batch, and the runs that append to it."""

    def __init__(self, model: Model, batch: int, capacity: int) -> None:
        self.model, self.batch, self.capacity = model, batch, capacity
        self.limit = min(capacity, model.layout.context_length or capacity)
        self._buffers = Buffers(model, batch, capacity)
        self._binding = model.session.io_binding()
        self._buffers.bind(self._binding)
        self._grow = [tensor for tensor in model.layout.tensors if tensor.grows]
        # Outputs come back in the order in which they were bound first: those of fixed size, then
        # the logits, then those that grow.
        self._state = self._empty()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return self._state.lengths

    @property
    def context_limits(self) -> bool:
        """Whether it is the model that allows no more tokens, and not the capacity."""
        return self.limit == self.model.layout.context_length

    def has_room(self, row: int) -> bool:
        """Whether a row can read one token more."""
        return self._state.stored[row] < self.limit

    def read(self, rows: Sequence[Ids], num_logits: int | None) -> Array:
        """Run the model on new tokens of each row, and keep what it says of its cache."""
        self.require(rows)
        state, roles, binding = self._state, self.model.layout.roles, self._binding
        step = feeding.step(self.model, rows, state.lengths, state.mask, state.slots, num_logits)
        for name, array in step.feeds.items():
            binding.bind_ortvalue_input(name, as_value(array))
        for tensor, value in zip(self._grow, state.grown, strict=True):
            binding.bind_ortvalue_input(tensor.past, value)
        for name in (roles["logits"], *(tensor.present for tensor in self._grow)):
            binding.bind_output(name)
        stored = step.lengths if step.mask is None else (step.slots,) * self.batch
        with Keep(list(overwritten_tails(self._buffers, state.stored, stored))):
            try:
                self.model.session.run_with_iobinding(binding)
            except FAULTS as error:
                raise ValueError(f"the model refuses these tokens: {said(error)}") from error
            # Of hundreds of outputs these alone become objects of Python: that took milliseconds.
            made = binding.get_outputs_as_ortvaluevector()
            first = len(self._buffers.tensors)
            logits = step.selected(made[first].numpy())
            grown = tuple(onnxruntime.OrtValue(made[i]) for i in range(first + 1, len(made)))
            self._buffers.turn(binding)
            self._state = State(step.lengths, step.slots, step.mask, grown)
        return logits

    def require(self, rows: Sequence[Ids]) -> None:
        """Refuse rows of lengths that the model cannot take, and more tokens than there is room."""
        counts = [len(row) for row in rows]
        if len(set(counts)) > 1 and self.model.padding is None:
            raise ValueError(
                f"input_ids has rows of {counts} tokens, and this model takes rows of one length; "
                "it has no new_lengths and no mask of padding"
            )
        width = max(counts)
        counted = self.model.padding == "right" and not self.model.skips_rows
        for row, (stored, count) in enumerate(zip(self._state.stored, counts, strict=True)):
            if counted and stored and count < width:
                raise ValueError(
                    f"row {row} has {stored} tokens and reads {count}, others {width}; this model "
                    "counts a mask, by which only rows without tokens may read fewer"
                )
        for row, (stored, count) in enumerate(zip(self._state.stored, counts, strict=True)):
            total = stored + (count if self.model.padding == "right" else width)
            if total > self.limit:
                what = "the model's context" if self.context_limits else "the capacity"
                raise ValueError(
                    f"row {row} has {stored} tokens and input_ids {count} more, together {total}; "
                    f"{what} is {self.limit}. Crop, or give fewer"
                    + ("" if self.context_limits else " or a larger capacity")
                )

    def crop(self, kept: Sequence[int]) -> None:
        """Keep the first tokens of each row."""
        state = self._state
        for tensor in self._buffers.tensors:
            # The operator itself takes back what buffers have behind the past.
            if token_axis(tensor) is None and not tensor.is_buffer:
                raise ValueError(
                    f"{tensor.past} has no axis of tokens, so that nothing can be cropped"
                )
        mask, slots = feeding.cropped(self.model, state.lengths, state.mask, state.slots, kept)
        after = State(tuple(kept), slots, mask, self._sliced(slots))
        changes = cut_blocks(self._buffers, state.stored, after.stored)
        with Keep([place for place, _ in changes]):
            for place, values in changes:
                place[...] = values
            self._state = after

    def copied(self, rows: Sequence[int]) -> Cache:
        """Return a cache of one's own of some of the rows."""
        state, other = self._state, Cache(self.model, len(rows), self.capacity)
        other._buffers.copy_rows(self._buffers, rows, [state.stored[row] for row in rows])
        grown = state.grown
        if list(rows) != list(range(self.batch)):
            grown = tuple(
                as_value(np.take(value.numpy(), rows, tensor.shape.index("batch")))
                for tensor, value in zip(self._grow, grown, strict=True)
            )
        mask = None if state.mask is None else state.mask[list(rows)]
        other._state = State(tuple(state.lengths[row] for row in rows), state.slots, mask, grown)
        return other

    def save(self, path: PathLike) -> None:
        """Write what the cache holds to a safetensors file, whole or not at all."""
        state = self._state
        grown = {
            tensor.past: np.ascontiguousarray(value.numpy())
            for tensor, value in zip(self._grow, state.grown, strict=True)
        }
        content = saved.Saved(state.lengths, state.slots, state.mask, grown)
        saved.write(path, self.model, self._buffers, content, state.stored)

    def restore(self, path: PathLike) -> None:
        """Replace what the cache holds by what `save` wrote, of the same model and as many rows."""
        found = saved.read(path, self.model, self.batch, self.limit)
        grown = tuple(as_value(found.arrays[tensor.past]) for tensor in self._grow)
        after = State(found.lengths, found.slots, found.mask, grown)
        places = []
        for tensor in self._buffers.tensors:
            array, place = found.arrays[tensor.past], self._buffers.arrays[tensor.past]
            places.append((place[tuple(map(slice, array.shape))], array))
        with Keep([place for place, _ in places]):
            for place, array in places:
                place[...] = array
            self._state = after

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the tensors of the cache by the names of their inputs."""
        grown = zip(self._grow, self._state.grown, strict=True)
        return self._buffers.arrays | {tensor.past: value.numpy() for tensor, value in grown}

    def resume(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Go on from tensors that `tensors` returned, of a model whose cache only grows."""
        if self._buffers.tensors:
            raise ValueError("this model's cache does not only grow; take save and restore")
        if missing := [tensor.past for tensor in self._grow if tensor.past not in tensors]:
            raise ValueError(f"tensors has no {missing[0]!r}; give all of them")
        arrays = [as_array(tensor.past, tensors[tensor.past]) for tensor in self._grow]
        axis = self._grow[0].shape.index("past")
        slots = arrays[0].shape[axis] if arrays[0].ndim > axis else 0
        for tensor, array in zip(self._grow, arrays, strict=True):
            shape = list(tensor.sizes(self.batch, 0))
            shape[tensor.shape.index("past")] = slots
            if (array.dtype.name, list(array.shape)) != (tensor.dtype, shape):
                raise ValueError(
                    f"tensors[{tensor.past!r}] is {array.dtype} {list(array.shape)}; it must be "
                    f"{tensor.dtype} {shape}"
                )
        if slots > self.limit:
            raise ValueError(f"tensors have {slots} tokens, more than {self.limit}; crop them")
        mask = np.ones((self.batch, slots), bool) if self.model.padding == "left" else None
        grown = tuple(as_value(np.ascontiguousarray(array)) for array in arrays)
        self._state = State((slots,) * self.batch, slots, mask, grown)

    def pretend(self, tokens: int) -> None:
        """Hold ones in place of so many tokens of each row."""
        if self._grow:
            raise ValueError(f"{self._grow[0].past} grows; only a cache of fixed size can pretend")
        for tensor in self.model.layout.tensors:
            if tensor.is_buffer:
                raise ValueError(f"{tensor.past} is a buffer, whose bytes its operator alone knows")
        for tensor in self._buffers.tensors:
            for row in self._buffers.arrays[tensor.past]:
                row[filled(self.model.layout, tensor, tokens)] = 1
        mask = np.ones((self.batch, tokens), bool) if self.model.padding == "left" else None
        self._state = State((tokens,) * self.batch, tokens, mask, ())

    def memory(self) -> Memory:
        """Return how many bytes the cache takes."""
        fixed = {name: array.shape for name, array in self._buffers.arrays.items()}
        grown = [tuple(value.shape()) for value in self._state.grown]
        return memory_of(self.model.layout, fixed, grown, self._state.stored)

    def _empty(self) -> State:
        """Return the state of no tokens."""
        mask = np.ones((self.batch, 0), bool) if self.model.padding == "left" else None
        grown = tuple(
            as_value(np.zeros(tensor.sizes(self.batch, 0), DTYPES[tensor.dtype]))
            for tensor in self._grow
        )
        return State((0,) * self.batch, 0, mask, grown)

    def _sliced(self, slots: int) -> tuple[onnxruntime.OrtValue, ...]:
        """Return the first places of the tensors that grow."""
        sliced = []
        for tensor, value in zip(self._grow, self._state.grown, strict=True):
            axis = tensor.shape.index("past")
            index = (*(slice(None),) * axis, slice(slots))
            sliced.append(as_value(np.ascontiguousarray(value.numpy()[index])))
        return tuple(sliced)

"""The state of a session in a file: what its cache holds, and of which model."""

from __future__ import annotations

import os
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nsq_ref.arrays import as_integer, as_integers
from nsq_ref.dtypes import DTYPES
from nsq_ref.files import containers
from nsq_ref.files.errors import DAMAGED, StorageError
from onnx_export.operators.cache_layout import CacheLayout
from onnx_export.running.buffers import Buffers, filled, filled_rows, token_axis
from onnx_export.running.model import Model

__all__ = ["Saved", "read", "write"]

Array = NDArray[Any]
PathLike = str | os.PathLike[str]

FORMAT = "nsq-session-1"
MASK = "mask"
FEEDBACK = "key_feedback"  # a field of those alone whose keys are coded with some: the digests
BYTES = DTYPES["uint8"]


class Saved(NamedTuple):
    """What a file has: tokens of the rows, slots of the longest, and arrays by their names."""

    lengths: tuple[int, ...]
    slots: int
    mask: NDArray[np.bool_] | None
    arrays: dict[str, Array]


def write(
    path: PathLike,
    model: Model,
    buffers: Buffers,
    saved: Saved,
    stored: tuple[int, ...],
) -> None:
    """Write a state, whole or not at all: of tensors of fixed size what is filled, zeros beside."""
    arrays = dict(saved.arrays)
    for tensor in buffers.tensors:
        source = buffers.arrays[tensor.past]
        shape = list(source.shape)
        if (axis := token_axis(tensor)) is not None:
            shape[axis] = max(filled_rows(model.layout, tensor, length) for length in stored)
        arrays[tensor.past] = copied = np.zeros(shape, source.dtype)
        for row, length in enumerate(stored):
            part = filled(model.layout, tensor, length)
            copied[row][part] = source[row][part]
    # A container has no int8.
    arrays = {n: a.view(BYTES) if a.dtype == np.int8 else a for n, a in arrays.items()}
    if saved.mask is not None:
        arrays[MASK] = saved.mask.astype(np.uint8)
    content = {
        "model": model.fingerprint,
        "lengths": list(saved.lengths),
        "slots": saved.slots,
    }
    if model.layout.key_feedback:
        content[FEEDBACK] = list(model.layout.key_feedback)
    containers.write_container(path, FORMAT, content, arrays)


def read(path: PathLike, model: Model, batch: int, limit: int) -> Saved:
    """Read a state of this model, for so many rows and tokens.

    Raises
    ------
    StorageError
        If the file is damaged, of another model, or has other rows or more tokens.
    """
    layout = model.layout
    masked = model.padding == "left"

    def names(content: dict[str, Any]) -> set[str]:
        if content.get("model") != model.fingerprint:
            raise _OtherModelError(_other_feedback(content.get(FEEDBACK), layout.key_feedback))
        own = {"model", "lengths", "slots"} | ({FEEDBACK} if layout.key_feedback else set())
        if set(content) != own or content.get(FEEDBACK, []) != list(layout.key_feedback):
            raise ValueError(f"its metadata has {sorted(content)}")
        slots = as_integer("slots", content["slots"], least=0)
        as_integers("lengths", content["lengths"], least=0, most=slots)
        return {tensor.past for tensor in layout.tensors} | ({MASK} if masked else set())

    try:
        content, arrays = containers.read_container(path, FORMAT, names)
    except _OtherModelError as error:
        raise StorageError(
            f"{path} is a state of another model than {model.path}{error}; take the model that it "
            "was saved with, or read the text again"
        ) from None
    slots, lengths = content["slots"], content["lengths"]
    if len(lengths) != batch:
        raise StorageError(
            f"{path} has {len(lengths)} rows, and the session {batch}; make one with "
            f"batch={len(lengths)}"
        )
    if slots > limit:
        raise StorageError(
            f"{path} has {slots} tokens, and the session room for {limit}; give it a larger "
            "capacity"
        )
    mask = arrays.pop(MASK) if masked else None
    if mask is not None and (
        mask.shape != (batch, slots) or mask.astype(bool).sum(axis=1).tolist() != lengths
    ):
        raise StorageError(f"{path}: mask is not of the lengths of the rows; {DAMAGED}")
    stored = [slots] * batch if masked else lengths
    for tensor in layout.tensors:
        array, dtype = arrays[tensor.past], DTYPES[tensor.dtype]
        array = arrays[tensor.past] = array.view(dtype) if dtype == np.int8 else array
        shape = _shape(layout, tensor.past, batch, slots, stored)
        if (array.dtype, array.shape) != (dtype, shape):
            raise StorageError(
                f"{path}: {tensor.past} is {array.dtype} {list(array.shape)}, not {dtype} "
                f"{list(shape)}; {DAMAGED}"
            )
    return Saved(tuple(lengths), slots, None if mask is None else mask.astype(bool), arrays)


class _OtherModelError(Exception):
    pass


def _other_feedback(saved: Any, own: tuple[str | None, ...]) -> str:
    """Say of which layer the keys are coded with another feedback (F1); nothing where none is."""
    given = saved if isinstance(saved, list) else []
    for layer, (theirs, ours) in enumerate(zip_longest(given, own)):
        if theirs != ours:
            return (
                f": keys of layer {layer} are coded {_with(theirs)} in the file, and {_with(ours)} "
                "in the model"
            )
    return ""


def _with(digest: Any) -> str:
    return "without feedback" if digest is None else f"with feedback {digest!s:.12}..."


def _shape(
    layout: CacheLayout, name: str, batch: int, slots: int, stored: list[int]
) -> tuple[int, ...]:
    """Return the shape that `write` gives a tensor."""
    tensor = next(tensor for tensor in layout.tensors if tensor.past == name)
    shape = list(tensor.sizes(batch, layout.rounded(slots)))
    if tensor.grows:
        shape[tensor.shape.index("past")] = slots
    elif (axis := token_axis(tensor)) is not None:
        shape[axis] = max(filled_rows(layout, tensor, length) for length in stored)
    return tuple(shape)

"""What a step feeds to a model, and what rows have afterwards: by the roles of its inputs alone.

Rows that differ in length are padded on the right where the model takes ``new_lengths``, or counts
the ones of a mask: each row has its own places in the cache, without gaps. Where a mask is all that
it takes otherwise, they are padded on the left, and all rows have as many places; the mask hides
those without a token. Of other models all rows are equally long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nsq_ref.arrays import as_integer_array
from onnx_export.running.model import Model

__all__ = ["Step", "as_rows", "cropped", "step"]

Array = NDArray[Any]
Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


class Step(NamedTuple):
    """Inputs by name, what rows have afterwards, and which of the logits are wanted."""

    feeds: dict[str, Array]
    lengths: tuple[int, ...]
    slots: int
    mask: Mask | None
    selected: Callable[[Array], Array]


def as_rows(input_ids: Any, batch: int, vocab_size: int | None) -> list[Ids]:
    """Take new tokens of every row, at least one of each."""
    if _is_ragged(input_ids):
        rows = [as_integer_array(f"input_ids[{i}]", row) for i, row in enumerate(input_ids)]
    else:
        ids = as_integer_array("input_ids", input_ids)
        rows = list(ids[None] if ids.ndim == 1 and batch == 1 else ids) if ids.ndim else []
    if len(rows) != batch or any(row.ndim != 1 or not len(row) for row in rows):
        shape = "[sequence]" if batch == 1 else "[batch, sequence]"
        raise ValueError(
            f"input_ids must have shape {shape}, or be a list of rows, with {batch} rows of at "
            f"least one token; got {_shape(rows)}"
        )
    for index, row in enumerate(rows):
        _require_known(f"input_ids[{index}]", row, vocab_size)
    return [np.ascontiguousarray(row, np.int64) for row in rows]


def step(
    model: Model,
    rows: Sequence[Ids],
    lengths: Sequence[int],
    mask: Mask | None,
    slots: int,
    num_logits: int | None,
) -> Step:
    """Return what to feed for the new tokens of each row."""
    batch, padding, roles = len(rows), model.padding, model.layout.roles
    counts = np.array([len(row) for row in rows])
    width = int(counts.max())
    before = np.array(lengths)
    # [batch, width]: which of the new places have a token.
    places = np.arange(width)
    real = places >= width - counts[:, None] if padding == "left" else places < counts[:, None]
    ids = np.zeros((batch, width), np.int64)
    ids[real] = np.concatenate(rows)
    after = before + counts
    if padding == "left":
        old = np.ones((batch, slots), bool) if mask is None else mask
        visible = mask = np.concatenate([old, real], axis=1)
        slots += width
    else:
        visible = np.arange(int(before.max()) + width) < after[:, None]
        slots = int(after.max())
    offset = width - counts[:, None] if padding == "left" else 0
    wanted = _scored(counts, num_logits, padding == "left")
    values = {
        "input_ids": ids,
        "attention_mask": visible,
        "position_ids": np.maximum(before[:, None] + places - offset, 0),
        "past_lengths": before,
        "new_lengths": counts,
        "total_lengths": after,
        "num_logits": np.array(wanted),
    }
    feeds = {
        roles[role]: np.array(value, model.dtype(roles[role]), order="C")
        for role, value in values.items()
        if role in roles
    }

    def selected(logits: Array) -> Array:
        ends = np.zeros(batch, np.int64) if padding == "left" else width - counts
        least = width if num_logits is None else min(num_logits, width)
        if logits.shape[1] < least + int(ends[counts > 0].max()):
            raise ValueError(
                f"the model gives logits of {logits.shape[1]} positions, too few for num_logits="
                f"{num_logits} of rows of {counts.tolist()} tokens; read rows of one length, or "
                "fewer of their logits"
            )
        if least == 1 and ends.any():
            chosen: Array = logits[np.arange(batch), np.maximum(logits.shape[1] - 1 - ends, 0)]
            return chosen[:, None]
        return logits[:, logits.shape[1] - least :]

    return Step(feeds, tuple(after.tolist()), slots, mask, selected)


def cropped(
    model: Model, lengths: Sequence[int], mask: Mask | None, slots: int, kept: Sequence[int]
) -> tuple[Mask | None, int]:
    """Return mask and places of rows of which so many tokens are kept."""
    layout = model.layout
    if mask is not None:
        # Tokens of each row up to each place; what is hidden at the end of all rows goes.
        counted = mask.cumsum(axis=1)
        mask = mask & (counted <= np.array(kept)[:, None])
        slots = int(mask.any(axis=0).nonzero()[0].max(initial=-1)) + 1
        mask = mask[:, :slots]
        gaps = bool((~mask[:, -1:]).any()) if slots else False
        if gaps and "position_ids" not in layout.roles:
            raise ValueError(
                f"length={list(kept)} takes more from one row than from another, which this model "
                "cannot hide, as it counts positions itself; crop all rows by as many tokens"
            )
        return mask, slots
    grows = any(tensor.grows for tensor in layout.tensors)
    apart = ("past_lengths" in layout.roles or layout.right_padding) and not grows
    if not apart and len(set(kept)) > 1:
        raise ValueError(
            f"length={list(kept)}; rows of this model are equally long, give one length"
        )
    return None, max(kept)


def _scored(counts: NDArray[np.int64], num_logits: int | None, left: bool) -> int:
    """Return of how many last positions logits are needed: up to the last token of every row."""
    width = int(counts.max())
    if num_logits is None:
        return width
    behind = 0 if left else width - int(counts[counts > 0].min())
    return min(num_logits + behind, width) if num_logits else 0


def _is_ragged(input_ids: Any) -> bool:
    if not isinstance(input_ids, list | tuple) or not input_ids:
        return False
    if not all(np.ndim(row) == 1 for row in input_ids if not isinstance(row, list | tuple)):
        return False
    return all(hasattr(row, "__len__") for row in input_ids) and (
        len({len(row) for row in input_ids}) > 1
    )


def _require_known(name: str, ids: Array, vocab_size: int | None) -> None:
    outside = ids < 0 if vocab_size is None else (ids < 0) | (ids >= vocab_size)
    if outside.any():
        index = int(outside.argmax())
        known = "" if vocab_size is None else f" of {vocab_size} tokens"
        raise ValueError(
            f"{name}[{index}] is {ids[index]}, outside the vocabulary{known}; use this model's own "
            "tokenizer"
        )


def _shape(rows: Sequence[Array]) -> str:
    return f"rows of shape {sorted({row.shape for row in rows})}" if rows else "no rows"

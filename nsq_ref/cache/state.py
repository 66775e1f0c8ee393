"""All rows of a cache at one moment: what grows or crops them makes others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from nsq_ref.arrays import RangeError, as_integers
from nsq_ref.cache.pages import Change
from nsq_ref.cache.sequence import Sequence, Side, StoredTokens
from nsq_ref.dtypes import FLOAT_DTYPES, Array


class StoredRow(NamedTuple):
    """What is stored of one row of the batch: copies, which threads may share."""

    keys: StoredTokens
    values: StoredTokens


class Sides(NamedTuple):
    """What never changes about a cache."""

    keys: Side
    values: Side


class Row(NamedTuple):
    """Keys and values of one sequence."""

    keys: Sequence
    values: Sequence


@dataclass(frozen=True, eq=False)
class State:
    """All that changes about a cache, in one piece, so that it changes at once or not at all."""

    rows: tuple[Row, ...]
    dtype: np.dtype[Any] | None

    @classmethod
    def empty(cls, sides: Sides, batch: int, dtype: np.dtype[Any] | None) -> State:
        """Return rows without tokens, which are one: sequences never change."""
        return cls((Row(*map(Sequence.empty, sides)),) * batch, dtype)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [row.keys.length for row in self.rows]

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(side.nbytes for row in self.rows for side in row)

    @property
    def plain_dtype(self) -> np.dtype[Any]:
        """Dtype of sinks and tail, also before there are any."""
        return FLOAT_DTYPES["float32"] if self.dtype is None else self.dtype

    def grown(
        self, keys: Array, values: Array, counts: list[int], dtype: np.dtype[Any], change: Change
    ) -> State:
        """Return these rows and as many tokens more, which are there once ``change`` writes."""
        rows = tuple(
            Row(
                _grown("keys", index, row.keys, keys[index, :, :count], change),
                _grown("values", index, row.values, values[index, :, :count], change),
            )
            for index, (row, count) in enumerate(zip(self.rows, counts, strict=True))
        )
        return State(rows, dtype)

    def cropped(self, lengths: list[int]) -> State:
        """Return the first tokens of each row."""
        rows = zip(self.rows, lengths, strict=True)
        return replace(
            self, rows=tuple(Row(*(side.cropped(count) for side in row)) for row, count in rows)
        )

    def selected(self, rows: Any) -> State:
        """Return the given rows."""
        chosen = as_integers("rows", rows, least=0, most=len(self.rows) - 1)
        if not chosen:
            raise ValueError("rows is empty; give at least one row")
        return replace(self, rows=tuple(self.rows[row] for row in chosen))


def _grown(name: str, row: int, sequence: Sequence, x: Array, change: Change) -> Sequence:
    """Return a grown sequence, or say which token of it cannot be coded."""
    try:
        return sequence.grown(x, change)
    except RangeError as error:
        head, known = error.index[0], sequence.length
        what, first, last = sequence.place_of(error, x.shape[1])
        remedy = ""
        if last <= known:
            what += ", which an earlier append left to be coded"
            remedy = f"; crop to {first} goes on without it"
        elif last == first + 1:
            what += f", {name}[{row}, {head}, {first - known}]"
        else:
            what += f", up to {name}[{row}, {head}, {last - known - 1}]"
        raise RangeError(
            f"{name} of row {row}, head {head}: {what}, {error.fault}. Nothing was appended{remedy}"
        ) from None

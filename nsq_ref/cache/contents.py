"""What files and pickles hold of a cache: fields that describe it, and its arrays by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from nsq_ref.cache.arguments import as_dtype, as_sides
from nsq_ref.cache.sequence import Sequence, Side
from nsq_ref.cache.state import Row, Sides, State
from nsq_ref.dtypes import Array
from nsq_ref.quantized import Quantized
from nsq_ref.scheme import Scheme

FIELDS = {"kv_heads", "head_dim", "value_head_dim", "key", "value", "dtype", "lengths"}


def contents(sides: Sides, state: State) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return what describes a cache, ready for JSON, and its arrays."""
    fields = {
        "kv_heads": sides.keys.kv_heads,
        "head_dim": sides.keys.head_dim,
        "value_head_dim": sides.values.head_dim,
        "key": sides.keys.scheme.to_dict(),
        "value": sides.values.scheme.to_dict(),
        "dtype": None if state.dtype is None else state.dtype.name,
        "lengths": state.lengths,
    }
    arrays = {
        f"{side}.{index}.{name}": array
        for index, row in enumerate(state.rows)
        for side, sequence in row._asdict().items()
        if sequence.length
        for name, array in sequence.stored(state.plain_dtype).arrays.items()
    }
    return fields, arrays


class Described(NamedTuple):
    """A cache as its fields describe it, still without tokens."""

    sides: Sides
    dtype: np.dtype[Any] | None
    lengths: list[int]

    @classmethod
    def of(cls, fields: object) -> Described:
        """Read the fields of `contents`; TypeError or ValueError for what no cache can be."""
        if not isinstance(fields, dict) or set(fields) != FIELDS:
            raise ValueError("the description of the cache lacks or adds fields")
        lengths = fields["lengths"]
        if not isinstance(lengths, list) or not lengths:
            raise ValueError(f"lengths is {lengths!r:.80}, not a list of tokens of each row")
        if not all(type(length) is int and length >= 0 for length in lengths):
            raise ValueError(f"lengths is {lengths!r:.80}; give integers from 0")
        if fields["dtype"] is None and any(lengths):
            raise ValueError("dtype is missing")
        sides = as_sides(
            fields["kv_heads"], fields["head_dim"], fields["value_head_dim"],
            Scheme.from_dict(fields["key"]), Scheme.from_dict(fields["value"]),
        )  # fmt: skip
        return cls(sides, as_dtype(fields["dtype"]), lengths)

    @property
    def empty(self) -> State:
        """Rows without tokens, as many."""
        return State.empty(self.sides, len(self.lengths), self.dtype)

    def names(self) -> set[str]:
        """Return the names of the arrays that belong to it."""
        dtype = self.empty.plain_dtype
        found = set()
        for prefix, side in self.sides._asdict().items():
            fields = {length: [*side.fields(length, dtype)] for length in set(self.lengths)}
            for index, length in enumerate(self.lengths):
                found |= {f"{prefix}.{index}.{name}" for name in fields[length]}
        return found

    def filled(
        self, arrays: Mapping[str, Array], check: Callable[[Quantized], None] | None = None
    ) -> State:
        """Return the rows that these arrays hold.

        Raises ValueError for arrays that are not those of `names`, and what ``check`` raises.
        """
        empty = self.empty

        def restored(name: str, side: Side, index: int, length: int) -> Sequence:
            prefix = f"{name}.{index}."
            own = {part: arrays[prefix + part] for part in side.fields(length, empty.plain_dtype)}
            try:
                return Sequence.restored(side, length, empty.plain_dtype, own, check)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} of row {index}: {error}") from error

        def row(index: int, length: int) -> Row:
            sides = self.sides._asdict().items()
            return Row(*(restored(name, side, index, length) for name, side in sides))

        rows = (
            row(index, length) if length else empty.rows[index]
            for index, length in enumerate(self.lengths)
        )
        return replace(empty, rows=tuple(rows))

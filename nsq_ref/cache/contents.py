"""What files and pickles hold of a cache: fields that describe it, and its arrays by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from nsq_ref.cache.arguments import as_dtype, as_sides, with_feedback
from nsq_ref.cache.sequence import Sequence, Side
from nsq_ref.cache.state import Row, Sides, State
from nsq_ref.dtypes import Array
from nsq_ref.feedback import Feedback
from nsq_ref.quantized import Quantized
from nsq_ref.scheme import Scheme

FIELDS = {"kv_heads", "head_dim", "value_head_dim", "key", "value", "dtype", "lengths"}
DIGEST_LENGTH = 64
FEEDBACK = "key_feedback"  # a field of those alone whose keys are coded with it: its digest


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
    if sides.keys.coded_with is not None:
        fields[FEEDBACK] = sides.keys.coded_with
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
        if not isinstance(fields, dict) or set(fields) - {FEEDBACK} != FIELDS:
            raise ValueError("the description of the cache lacks or adds fields")
        digest = fields.get(FEEDBACK)
        if FEEDBACK in fields and not (isinstance(digest, str) and len(digest) == DIGEST_LENGTH):
            raise ValueError(f"{FEEDBACK} is {digest!r:.80}, not a digest")
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
        sides = sides._replace(keys=replace(sides.keys, coded_with=digest))
        return cls(sides, as_dtype(fields["dtype"]), lengths)

    def with_feedback(self, feedback: Any) -> Described:
        """Return the same with the feedback that its keys are coded with; ValueError for others."""
        keys = self.sides.keys
        if feedback is None:
            return self
        given = with_feedback(keys, feedback)
        if keys.coded_with is None:
            raise ValueError(
                "the keys of this cache are coded without feedback; leave key_feedback out"
            )
        if given.coded_with != keys.coded_with:
            raise ValueError(
                "the keys of this cache are coded with another feedback, whose digest begins with "
                f"{keys.coded_with[:12]}; that of key_feedback, with {feedback.digest[:12]}"
            )
        return self._replace(sides=self.sides._replace(keys=given))

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


def read(path: str | os.PathLike[str], feedback: Feedback | None) -> tuple[Sides, State]:
    """Read a file of `KVCache.save`, all of it checked."""
    from nsq_ref.files.containers import CACHE_FORMAT, read_container
    from nsq_ref.files.content import require_content
    from nsq_ref.files.errors import DAMAGED, StorageError

    found: list[Described] = []

    def names(content: dict[str, Any]) -> set[str]:
        found.append(Described.of(content.get("cache") if len(content) == 1 else None))
        return found[0].names()

    _, arrays = read_container(path, CACHE_FORMAT, names)
    described = found[0].with_feedback(feedback)
    try:
        state = described.filled(arrays, require_content)
    except (TypeError, ValueError) as error:
        raise StorageError(f"{path}: {error}; {DAMAGED}") from error
    return described.sides, state

"""Keys, or values, of one sequence that grows: sinks (K1), sealed blocks, and a tail (B1).

A sequence never changes: what grows or crops it returns another, which shares its memory (`pages`).
So whoever holds one may read it while others go on, and a growth that is refused leaves nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref import attention, rounding
from nsq_ref.arrays import RangeError
from nsq_ref.cache.pages import Change, Page, Plain
from nsq_ref.codec import Quantized, dequantize, quantize
from nsq_ref.dtypes import DTYPES, Array, Float32
from nsq_ref.feedback import Feedback
from nsq_ref.scheme import Field, Scheme


class StoredTokens(NamedTuple):
    """What is stored of the keys, or of the values, of one row of a cache.

    The scheme of ``sealed`` has no sinks, as they are stored beside it. Nothing of this library
    writes to one, so that threads may share it.
    """

    sinks: Array  # [kv_heads, sinks, D], in the input's dtype (K1)
    sealed: Quantized | None  # shape [kv_heads, sealed tokens, D]; None before the first full block
    tail: Array  # [kv_heads, tail tokens, D], in the input's dtype (B1)
    collapsed: Array  # [sealed blocks], the tokens of each that collapsed (D2), of all heads

    @property
    def arrays(self) -> dict[str, Array]:
        """Every array by name, those of ``sealed`` among them, but for empty ones.

        Examples
        --------
        >>> import numpy as np
        >>> from nsq_ref import KVCache
        >>> cache = KVCache(1, 1, 4, Scheme(block_size=2))
        >>> cache.append(*np.ones((2, 1, 1, 5, 4)))
        >>> list(cache.stored().keys.arrays)
        ['tail', 'packed', 'scale', 'norm', 'collapsed']
        """
        named = {"sinks": self.sinks, "tail": self.tail}
        if self.sealed is not None:
            named |= self.sealed.parts | {"collapsed": self.collapsed}
        return {name: array for name, array in named.items() if array.size}

    @property
    def nbytes(self) -> int:
        """Bytes of what a decoder needs: all but the count of collapsed tokens."""
        sealed = 0 if self.sealed is None else self.sealed.nbytes
        return self.sinks.nbytes + sealed + self.tail.nbytes


@dataclass(frozen=True)
class Side:
    """What all sequences of the keys, or of the values, of a cache have in common."""

    scheme: Scheme  # with a block size
    kv_heads: int
    head_dim: int
    feedback: Feedback | None = None
    coded_with: str | None = None  # digest of the feedback, which one that was loaded may lack

    @functools.cached_property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.scheme.block_size or 1

    @functools.cached_property
    def sealed_scheme(self) -> Scheme:
        """The scheme of the blocks, which lie behind the sinks."""
        return replace(self.scheme, sink_tokens=0)

    def fields(self, length: int, dtype: np.dtype[Any]) -> dict[str, Field]:
        """Return shape and dtype of `StoredTokens.arrays` of a sequence of this length."""
        sinks, sealed, tail = self.scheme.cut(length)
        plain = {"sinks": sinks, "tail": tail}
        fields = {name: Field((count, self.head_dim), dtype) for name, count in plain.items()}
        fields |= self.sealed_scheme.layout(sealed, self.head_dim)
        fields = {
            name: Field((self.kv_heads, *part.shape), part.dtype) for name, part in fields.items()
        }
        fields["collapsed"] = Field((sealed // self.block_size,), DTYPES["int32"])
        return {name: field for name, field in fields.items() if 0 not in field.shape}


class Sequence(NamedTuple):
    """What is stored of one sequence, ``x[kv_heads, T, D]``.

    Examples
    --------
    >>> import numpy as np
    >>> with Change() as change:
    ...     empty = Sequence.empty(Side(Scheme(block_size=2), kv_heads=1, head_dim=4))
    ...     sequence = empty.grown(np.ones((1, 5, 4), np.float32), change)
    ...     change.write()
    >>> empty.length, sequence.length, sequence.sealed, sequence.tail.length
    (0, 5, 4, 1)
    """

    side: Side
    sinks: Plain
    pages: tuple[Page, ...]  # all full with this sequence's tokens, but perhaps the last
    sealed: int  # tokens in them
    tail: Plain

    @classmethod
    def empty(cls, side: Side) -> Sequence:
        """Return the sequence of no tokens."""
        none = Plain.empty(side.kv_heads, side.head_dim)
        return cls(side, none, (), 0, none)

    @property
    def length(self) -> int:
        """Tokens."""
        return self.sinks.length + self.sealed + self.tail.length

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored, not of what is set aside for more."""
        layout = self.side.sealed_scheme.layout(self.sealed, self.side.head_dim).values()
        sealed = sum(int(np.prod(part.shape)) * part.dtype.itemsize for part in layout)
        return self.sinks.tokens.nbytes + self.side.kv_heads * sealed + self.tail.tokens.nbytes

    @property
    def collapsed(self) -> npt.NDArray[np.int32]:
        """Tokens of each sealed block, of all heads, that are not zero but decode to zero (D2)."""
        size = self.side.block_size
        counts = [page.collapsed[: count // size] for page, count in self.parts()]
        return np.concatenate([np.zeros(0, np.int32), *counts])

    # --- growing and shrinking ------------------------------------------------------------------

    def grown(self, x: Array, change: Change) -> Sequence:
        """Return this sequence and ``x[kv_heads, T, D]``, which are there once ``change`` writes.

        Raises RangeError where a block that is now full cannot be coded.
        """
        side, sinks, pages, sealed, tail = self
        size = side.block_size
        after = side.scheme.cut(self.length + x.shape[1])
        if to_sinks := after.sinks - sinks.length:
            sinks = sinks.grown(x[:, :to_sinks], side.scheme.sink_tokens, change)
            x = x[:, to_sinks:]
        if after.sealed == sealed:
            return Sequence(side, sinks, pages, sealed, tail.grown(x, size, change))
        taken = after.sealed - sealed - tail.length
        run = x[:, :taken]
        if tail.length:
            run = np.concatenate([tail.tokens, run], axis=1)
        quantized = quantize(run, side.sealed_scheme, feedback=side.feedback)
        pages = self.pages_with(quantized, self.collapsed_by_block(run, quantized), change)
        # An array of its own: the old one has room for a whole block, which would lie idle.
        tail = tail.first(0).grown(x[:, taken:], size, change)
        return Sequence(side, sinks, pages, after.sealed, tail)

    def place_of(self, error: RangeError, tokens: int) -> tuple[str, int, int]:
        """Return what of which tokens is refused when so many are appended, and their positions."""
        side, place = self.side, error.index[1:]
        sinks = side.scheme.cut(self.length + tokens).sinks
        first = sinks + self.sealed  # of what is to be sealed
        if error.part in ("scale", "zero") and side.scheme.axis == "channel":
            start = first + place[0] * side.block_size
            stop = start + side.block_size
            what = f"the {error.part} of channel {place[1]} of tokens {start} to {stop - 1}"
            return what, start, stop
        start = first + place[0]
        special = {"x": f"channel {place[-1]}", "outliers": "an outlier"}
        what = special.get(error.part, f"the {error.part}")
        return f"{what} of token {start}", start, start + 1

    def pages_with(self, run: Quantized, collapsed: Array, change: Change) -> tuple[Page, ...]:
        """Return the pages of this sequence with a run of sealed blocks behind them."""
        side = self.side
        pages = [page for page, _ in self.parts()]
        end = self.sealed - sum(page.capacity for page in pages[:-1])  # in the last page
        done, total = 0, run.shape[1]
        while done < total:
            own = not pages or end == pages[-1].capacity
            if own:
                pages.append(Page(side.sealed_scheme, side.kv_heads, side.head_dim, run.dtype))
                end = 0
            count = min(pages[-1].capacity - end, total - done)
            if not change.claim(pages[-1].used, end, end + count):
                own = True
                pages[-1] = pages[-1].copy(end)
                change.claim(pages[-1].used, end, end + count)
            blocks = slice(done // side.block_size, (done + count) // side.block_size)
            for place, values in pages[-1].places(end, run, done, collapsed[blocks]):
                if own:  # no one else has it: write at once, so that the run need not be kept
                    place[...] = values
                else:
                    change.put(place, values)
            end += count
            done += count
        return tuple(pages)

    def collapsed_by_block(self, run: Array, quantized: Quantized) -> Array:
        """Tokens of each block that collapsed (D2); hardly ever any, so counting may be slow."""
        side, size = self.side, self.side.block_size
        starts = range(0, run.shape[1], size)
        if not quantized.collapsed_tokens:
            return np.zeros(len(starts), np.int32)
        blocks = (run[:, start : start + size] for start in starts)
        counts = [
            quantize(block, side.sealed_scheme, feedback=side.feedback).collapsed_tokens
            for block in blocks
        ]
        return np.array(counts, np.int32)

    def cropped(self, length: int) -> Sequence:
        """Return the sequence of the first tokens; those of a block cut in two are decoded (C1)."""
        if length >= self.sinks.length + self.sealed:
            return self._replace(tail=self.tail.first(length - self.sinks.length - self.sealed))
        sinks, whole, rest = self.side.scheme.cut(length)
        tail, size = self.tail.first(0), self.side.block_size
        if rest:
            block = self.decoded(whole, whole + size)[:, :rest]
            with Change() as change:
                tail = tail.grown(rounding.saturate(block, self.pages[0].dtype), size, change)
                change.write()
        shorter = Sequence(self.side, self.sinks.first(sinks), self.pages, whole, tail)
        return shorter._replace(pages=tuple(page for page, _ in shorter.parts()))

    # --- reading --------------------------------------------------------------------------------

    def parts(self) -> Iterator[tuple[Page, int]]:
        """Pages, and how many tokens of each belong to this sequence."""
        left = self.sealed
        for page in self.pages:
            if not left:
                return
            count = min(left, page.capacity)
            yield page, count
            left -= count

    def decoded(self, first: int, last: int) -> Float32:
        """Decode sealed tokens, whole blocks."""
        pieces, start = [], 0
        for page, count in self.parts():
            begin, end = max(first - start, 0), min(last - start, count)
            if begin < end:
                pieces.append(dequantize(page.quantized(begin, end)))
            start += count
        return np.concatenate(pieces, axis=1)

    def dequantize(self, out: Float32) -> None:
        """Write all tokens to ``out[kv_heads, T or more, D]``."""
        at = self.sinks.length
        out[:, :at] = self.sinks.tokens
        for page, count in self.parts():
            out[:, at : at + count] = dequantize(page.quantized(0, count))
            at += count
        out[:, at : at + self.tail.length] = self.tail.tokens

    def pieces(self) -> list[attention.Piece]:
        """Return all tokens in order as `attention.attend_quantized` takes them."""
        pieces: list[attention.Piece] = [page.prepared(count) for page, count in self.parts()]
        if self.sinks.length:
            pieces.insert(0, self.sinks.tokens)
        if self.tail.length:
            pieces.append(self.tail.tokens)
        return pieces

    def stored(self, dtype: np.dtype[Any]) -> StoredTokens:
        """Return copies of what is stored, sinks and tail of the dtype that they have."""
        pieces = [page.quantized(0, count) for page, count in self.parts()]
        sealed = None
        if pieces:
            joined = {
                name: np.concatenate([piece.parts[name] for piece in pieces], axis=1)
                for name in pieces[0].parts
            }
            side = self.side
            sealed = Quantized(
                side.sealed_scheme, (side.kv_heads, self.sealed, side.head_dim), pieces[0].dtype,
                **joined, collapsed_tokens=int(self.collapsed.sum()),
            )  # fmt: skip
        sinks, tail = self.sinks.tokens.astype(dtype), self.tail.tokens.astype(dtype)
        return StoredTokens(sinks, sealed, tail, self.collapsed)

    @classmethod
    def restored(
        cls,
        side: Side,
        length: int,
        dtype: np.dtype[Any],
        arrays: Mapping[str, Array],
        check: Callable[[Quantized], None] | None = None,
    ) -> Sequence:
        """Return the sequence whose `StoredTokens.arrays` these are.

        Raises ValueError for arrays that are not those of `Side.fields`, for values that are not
        finite in sinks or tail, and what ``check`` raises for the sealed blocks.
        """
        expected = side.fields(length, dtype)
        for name, field in expected.items():
            array = arrays[name]
            if (array.shape, array.dtype) != tuple(field):
                raise ValueError(
                    f"{name} is {array.dtype} {list(array.shape)}; a sequence of {length} tokens "
                    f"stores {field.dtype} {list(field.shape)}"
                )
        for name in {"sinks", "tail"} & expected.keys():
            if not np.isfinite(arrays[name]).all():
                raise ValueError(f"{name} holds a value that is not finite")
        sequence = cls.empty(side)
        with Change() as change:
            if "packed" in expected:
                collapsed = arrays["collapsed"]
                if collapsed.min() < 0 or collapsed.max() > side.kv_heads * side.block_size:
                    raise ValueError("collapsed holds counts that no block can have")
                names = side.sealed_scheme.parts(side.head_dim)
                parts: dict[str, Any] = {name: arrays[name] for name in names}
                shape = (side.kv_heads, parts["packed"].shape[1], side.head_dim)
                total = int(collapsed.sum())
                run = Quantized(side.sealed_scheme, shape, dtype, **parts, collapsed_tokens=total)
                if check is not None:
                    check(run)
                pages = sequence.pages_with(run, collapsed, change)
                sequence = sequence._replace(pages=pages, sealed=shape[1])
            for name, most in (("sinks", side.scheme.sink_tokens), ("tail", side.block_size)):
                if name in expected:
                    plain = getattr(sequence, name).grown(arrays[name], most, change)
                    sequence = sequence._replace(**{name: plain})
            change.write()
        return sequence

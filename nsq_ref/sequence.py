"""Keys, or values, of one sequence that grows: sinks (K1), sealed blocks, and a tail (B1).

Sealed blocks lie in pages, which never move and never change, so that sequences share them. A page
counts the tokens that anyone has written to it: who wants to write elsewhere than behind them, as
another has gone on from the same place or a crop has gone back, continues in a page of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref import attention, rounding
from nsq_ref.codec import PARTS, Quantized, block_of, dequantize, quantize
from nsq_ref.scheme import Field, Scheme

__all__ = ["Sequence", "StoredTokens"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

PAGE_TOKENS = 512  # more where a block is longer


class StoredTokens(NamedTuple):
    """What is stored of the keys, or of the values, of one row of a cache.

    The scheme of ``sealed`` has no sinks, as they are stored beside it.
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
        >>> sequence = Sequence(Scheme(block_size=2), kv_heads=1, head_dim=4)
        >>> sequence.accept(sequence.growth(np.ones((1, 5, 4), np.float32)))
        >>> list(sequence.stored(np.dtype(np.float32)).arrays)
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


class Growth(NamedTuple):
    """What an append makes of a sequence: made before anything changes, since it may be refused."""

    sinks: Array  # what goes there
    waiting: Array  # what goes to the tail, if no block is sealed
    sealed: Sealed | None


class Sealed(NamedTuple):
    """Pages and tail after blocks were sealed."""

    pages: list[Page]
    tokens: int
    tail: TokenBuffer


class Sequence:
    """What is stored of one sequence, ``x[kv_heads, T, D]``.

    Parameters
    ----------
    scheme : Scheme
        With a block size.
    kv_heads, head_dim : int

    Examples
    --------
    >>> import numpy as np
    >>> sequence = Sequence(Scheme(block_size=2), kv_heads=1, head_dim=4)
    >>> sequence.accept(sequence.growth(np.ones((1, 5, 4), np.float32)))
    >>> sequence.length, sequence.sealed, sequence.tail.count
    (5, 4, 1)
    """

    def __init__(self, scheme: Scheme, kv_heads: int, head_dim: int) -> None:
        self.scheme = scheme
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.block_size = scheme.block_size or 1
        self.sealed_scheme = replace(scheme, sink_tokens=0)
        self.sinks = TokenBuffer(scheme.sink_tokens, kv_heads, head_dim)
        self.pages: list[Page] = []  # all full with this sequence's tokens, but perhaps the last
        self.sealed = 0  # tokens in them
        self.tail = TokenBuffer(self.block_size, kv_heads, head_dim)

    @property
    def length(self) -> int:
        """Tokens."""
        return self.sinks.count + self.sealed + self.tail.count

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored, not of what is set aside for more."""
        layout = self.sealed_scheme.layout(self.sealed, self.head_dim).values()
        sealed = sum(int(np.prod(part.shape)) * part.dtype.itemsize for part in layout)
        return self.sinks.tokens.nbytes + self.kv_heads * sealed + self.tail.tokens.nbytes

    @property
    def collapsed(self) -> npt.NDArray[np.int32]:
        """Tokens of each sealed block, of all heads, that are not zero but decode to zero (D2)."""
        counts = [page.collapsed[: count // self.block_size] for page, count in self.parts()]
        return np.concatenate([np.zeros(0, np.int32), *counts])

    def fork(self) -> Sequence:
        """Return a sequence that goes on from here on its own; sealed blocks are shared."""
        other = Sequence(self.scheme, self.kv_heads, self.head_dim)
        other.sinks, other.tail = self.sinks.copy(), self.tail.copy()
        other.pages, other.sealed = list(self.pages), self.sealed
        return other

    def growth(self, x: Array) -> Growth:
        """Return what appending ``x[kv_heads, T, D]`` comes to; `accept` lets it happen."""
        to_sinks = min(self.sinks.most - self.sinks.count, x.shape[1])
        waiting = self.tail.count + x.shape[1] - to_sinks
        if waiting < self.block_size:
            self.tail.reserve(waiting, x.dtype)
            return Growth(x[:, :to_sinks], x[:, to_sinks:], None)
        full = waiting // self.block_size * self.block_size
        taken = to_sinks + full - self.tail.count
        run = x[:, to_sinks:taken]
        if self.tail.count:
            run = np.concatenate([self.tail.tokens, run], axis=1)
        quantized = quantize(run, self.sealed_scheme)
        pages = self.pages_with(quantized, self.collapsed_by_block(run, quantized))
        # A buffer of its own: the old one has room for a whole block, which would lie idle.
        tail = TokenBuffer(self.block_size, self.kv_heads, self.head_dim)
        tail.extend(x[:, taken:])
        return Growth(x[:, :to_sinks], x[:, :0], Sealed(pages, self.sealed + full, tail))

    def accept(self, growth: Growth) -> None:
        """Append what `growth` was asked about."""
        if growth.sinks.shape[1]:
            self.sinks.extend(growth.sinks)
        if growth.sealed is not None:
            self.pages, self.sealed, self.tail = growth.sealed
        else:
            self.tail.extend(growth.waiting)

    def cropped(self, length: int) -> Sequence:
        """Return the sequence of the first tokens; those of a block cut in two are decoded (C1)."""
        other = self.fork()
        sinks = self.sinks.count
        if length >= sinks + self.sealed:
            other.tail.count = length - sinks - self.sealed
            return other
        other.sinks.count = min(length, sinks)
        coded = length - other.sinks.count
        other.sealed = coded // self.block_size * self.block_size
        other.pages = [page for page, _ in other.parts()]
        other.tail.count = 0
        if coded > other.sealed:
            block = self.decoded(other.sealed, other.sealed + self.block_size)
            other.tail.extend(
                rounding.saturate(block[:, : coded - other.sealed], self.pages[0].dtype)
            )
        return other

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
        at = self.sinks.count
        out[:, :at] = self.sinks.tokens
        for page, count in self.parts():
            out[:, at : at + count] = dequantize(page.quantized(0, count))
            at += count
        out[:, at : at + self.tail.count] = self.tail.tokens

    def pieces(self) -> list[attention.Piece]:
        """Return all tokens in order as `attention.attend_quantized` takes them."""
        pieces: list[attention.Piece] = [page.prepared(count) for page, count in self.parts()]
        if self.sinks.count:
            pieces.insert(0, self.sinks.tokens)
        if self.tail.count:
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
            sealed = Quantized(
                self.sealed_scheme, (self.kv_heads, self.sealed, self.head_dim), pieces[0].dtype,
                **joined, collapsed_tokens=int(self.collapsed.sum()),
            )  # fmt: skip
        sinks, tail = self.sinks.tokens.astype(dtype), self.tail.tokens.astype(dtype)
        return StoredTokens(sinks, sealed, tail, self.collapsed)

    def fields(self, length: int, dtype: np.dtype[Any]) -> dict[str, Field]:
        """Return shape and dtype of `StoredTokens.arrays` of a sequence of this length."""
        sinks = min(length, self.sinks.most)
        sealed = (length - sinks) // self.block_size * self.block_size
        plain = {"sinks": sinks, "tail": length - sinks - sealed}
        fields = {name: Field((count, self.head_dim), dtype) for name, count in plain.items()}
        fields |= self.sealed_scheme.layout(sealed, self.head_dim)
        fields = {
            name: Field((self.kv_heads, *part.shape), part.dtype) for name, part in fields.items()
        }
        fields["collapsed"] = Field((sealed // self.block_size,), np.dtype(np.int32))
        return {name: field for name, field in fields.items() if 0 not in field.shape}

    def restore(self, length: int, dtype: np.dtype[Any], arrays: Mapping[str, Array]) -> None:
        """Take over `StoredTokens.arrays` of another sequence; this one must be empty.

        Raises ValueError for arrays that are not those of `fields`, and for values that are not
        finite in sinks or tail.
        """
        expected = self.fields(length, dtype)
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
        if "packed" in expected:
            collapsed = arrays["collapsed"]
            if collapsed.min() < 0 or collapsed.max() > self.kv_heads * self.block_size:
                raise ValueError("collapsed holds counts that no block can have")
            parts: dict[str, Any] = {name: arrays[name] for name in PARTS if name in expected}
            parts.pop("sinks", None)
            shape = (self.kv_heads, parts["packed"].shape[1], self.head_dim)
            total = int(collapsed.sum())
            sealed = Quantized(self.sealed_scheme, shape, dtype, **parts, collapsed_tokens=total)
            self.pages = self.pages_with(sealed, collapsed)
            self.sealed = shape[1]
        for name, buffer in (("sinks", self.sinks), ("tail", self.tail)):
            if name in expected:
                buffer.extend(arrays[name])

    def pages_with(self, run: Quantized, collapsed: Array) -> list[Page]:
        """Return the pages of this sequence with a run of sealed blocks behind them."""
        pages = [page for page, _ in self.parts()]
        end = self.sealed - sum(page.capacity for page in pages[:-1])  # in the last page
        done, total = 0, run.shape[1]
        while done < total:
            if not pages or end == pages[-1].capacity:
                pages.append(Page(self.sealed_scheme, self.kv_heads, self.head_dim, run.dtype))
                end = 0
            elif end < pages[-1].used:
                pages[-1] = pages[-1].copy(end)
            count = min(pages[-1].capacity - end, total - done)
            blocks = slice(done // self.block_size, (done + count) // self.block_size)
            pages[-1].write(end, run, done, collapsed[blocks])
            end += count
            done += count
        return pages

    def collapsed_by_block(self, run: Array, quantized: Quantized) -> Array:
        """Tokens of each block that collapsed (D2); hardly ever any, so counting may be slow."""
        starts = range(0, run.shape[1], self.block_size)
        if not quantized.collapsed_tokens:
            return np.zeros(len(starts), np.int32)
        blocks = (run[:, start : start + self.block_size] for start in starts)
        counts = [quantize(block, self.sealed_scheme).collapsed_tokens for block in blocks]
        return np.array(counts, np.int32)


class Page:
    """Sealed blocks of one sequence, and of those that share them."""

    def __init__(self, scheme: Scheme, kv_heads: int, head_dim: int, dtype: np.dtype[Any]) -> None:
        block_size = scheme.block_size or 1
        self.scheme = scheme
        self.shape = (kv_heads, max(PAGE_TOKENS // block_size, 1) * block_size, head_dim)
        self.dtype = dtype
        self.arrays = {
            name: np.empty((kv_heads, *field.shape), field.dtype)
            for name, field in scheme.layout(*self.shape[1:]).items()
        }
        self.collapsed = np.zeros(self.capacity // block_size, np.int32)  # tokens of each block
        self.used = 0  # tokens, whoever wrote them
        self._prepared: attention.PreparedPiece | None = None

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.shape[1]

    def quantized(self, first: int, last: int) -> Quantized:
        """Tokens from ``first`` to ``last``, whole blocks, as views."""
        kv_heads, _, head_dim = self.shape
        spans = self.spans(first, last)
        parts: dict[str, Any] = {n: array[:, spans[n]] for n, array in self.arrays.items()}
        return Quantized(self.scheme, (kv_heads, last - first, head_dim), self.dtype, **parts)

    def prepared(self, count: int) -> attention.PreparedPiece:
        """Return the first ``count`` tokens for `attention`, and keep it: they no longer change."""
        piece = self._prepared
        if piece is None or piece.tokens != count:
            block = block_of(self.quantized(0, count))
            piece = self._prepared = attention.prepare(block, self.scheme, self.shape[2])
        return piece

    def spans(self, first: int, last: int) -> dict[str, slice]:
        """Rows of each array, one a token or one a block, for tokens from ``first`` to ``last``."""
        head_dim = self.shape[2]
        starts, stops = (self.scheme.layout(tokens, head_dim) for tokens in (first, last))
        return {name: slice(starts[name].shape[0], stops[name].shape[0]) for name in self.arrays}

    def write(self, at: int, source: Quantized, first: int, collapsed: Array) -> None:
        """Copy whole blocks of ``source``, from its token ``first`` on, behind what is used."""
        block_size = self.scheme.block_size or 1
        count = len(collapsed) * block_size
        ours, theirs = self.spans(at, at + count), self.spans(first, first + count)
        for name, array in self.arrays.items():
            array[:, ours[name]] = source.parts[name][:, theirs[name]]
        self.collapsed[at // block_size : (at + count) // block_size] = collapsed
        self.used = at + count

    def copy(self, count: int) -> Page:
        """Return a page of one's own with the first ``count`` tokens."""
        kv_heads, _, head_dim = self.shape
        other = Page(self.scheme, kv_heads, head_dim, self.dtype)
        if count:
            blocks = count // (self.scheme.block_size or 1)
            other.write(0, self.quantized(0, count), 0, self.collapsed[:blocks])
        return other


class TokenBuffer:
    """At most ``most`` unquantized tokens ``[kv_heads, count, D]``; its room doubles as they come.

    Examples
    --------
    >>> import numpy as np
    >>> buffer = TokenBuffer(most=8, kv_heads=2, head_dim=4)
    >>> buffer.extend(np.ones((2, 3, 4), np.float16))
    >>> buffer.tokens.shape
    (2, 3, 4)
    """

    def __init__(self, most: int, kv_heads: int, head_dim: int) -> None:
        self.most = most
        self.count = 0
        self.array: Array = np.empty((kv_heads, 0, head_dim), np.float32)

    @property
    def tokens(self) -> Array:
        """The tokens, as a view."""
        return self.array[:, : self.count]

    def reserve(self, count: int, dtype: np.dtype[Any]) -> None:
        """Make room for ``count`` tokens in all; they have one dtype."""
        kv_heads, room, head_dim = self.array.shape
        if count > room:
            more = min(max(count, 2 * room), self.most)
            larger = np.empty((kv_heads, more, head_dim), dtype)
            larger[:, : self.count] = self.tokens
            self.array = larger

    def extend(self, x: Array) -> None:
        """Append ``x[kv_heads, T, D]``."""
        count = self.count + x.shape[1]
        self.reserve(count, x.dtype)
        self.array[:, self.count : count] = x
        self.count = count

    def copy(self) -> TokenBuffer:
        """Return a buffer of one's own with the same tokens."""
        kv_heads, _, head_dim = self.array.shape
        other = TokenBuffer(self.most, kv_heads, head_dim)
        other.extend(self.tokens)
        return other

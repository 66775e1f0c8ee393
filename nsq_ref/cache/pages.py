"""Memory that sequences share: filled from the front, each place once, by whoever claimed it.

What has been written never changes, and no one reads beyond their own tokens. So sequences that
went the same way share what lies behind them, in any thread and without waiting; the first to go on
claims the room that follows, and every other one continues in a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from nsq_ref import attention
from nsq_ref.dtypes import Array
from nsq_ref.quantized import Quantized, block_of
from nsq_ref.scheme import Scheme

T = TypeVar("T")

PAGE_TOKENS = 512  # more where a block is longer


class Cell(Generic[T]):
    """A value that only changes from what its changer has seen: of two threads, one fails.

    Without a lock, which whoever is interrupted in it, or forked beside it, would never give back.

    Examples
    --------
    >>> used = Cell(4)
    >>> used.swap(4, 6), used.swap(4, 5), used.value
    (True, False, 6)
    """

    def __init__(self, value: T) -> None:
        self._link = _Link(value)

    @property
    def value(self) -> T:
        """What it is now."""
        return self._last().value

    def swap(self, seen: T, value: T) -> bool:
        """Set the value, if it still is what was seen; return whether it was."""
        last, new = self._last(), _Link(value)
        # Python does the one step that counts at once: of all who try it, the first succeeds.
        if last.value != seen or last.next.setdefault(0, new) is not new:
            return False
        self._link = new
        return True

    def _last(self) -> _Link[T]:
        link = self._link
        while link.next:
            link = link.next[0]
        return link


class _Link(Generic[T]):
    """A value, and what it became."""

    def __init__(self, value: T) -> None:
        self.value = value
        self.next: dict[int, _Link[T]] = {}


class Change:
    """Room that an append has claimed, and what will lie there once nothing is refused any more.

    Who leaves the ``with`` block by an exception before `write` gives all room back.

    Examples
    --------
    >>> import numpy as np
    >>> used, memory = Cell(2), np.zeros(4)
    >>> with Change() as change:
    ...     if change.claim(used, 2, 3):
    ...         change.put(memory[2:3], np.ones(1))
    ...     change.write()
    >>> used.value, memory
    (3, array([0., 0., 1., 0.]))
    """

    def __init__(self) -> None:
        self._claimed: list[tuple[Cell[int], int, int]] = []
        self._waiting: list[tuple[Array, Array]] = []

    def __enter__(self) -> Change:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            for used, start, end in reversed(self._claimed):
                used.swap(end, start)

    def claim(self, used: Cell[int], start: int, end: int) -> bool:
        """Claim tokens from ``start`` to ``end`` of memory of which so many are used."""
        claimed = used.swap(start, end)
        if claimed:
            self._claimed.append((used, start, end))
        return claimed

    def put(self, place: Array, values: Array) -> None:
        """Remember that this memory, which was claimed, is to hold these values."""
        self._waiting.append((place, values))

    def write(self) -> None:
        """Put everything where it belongs; from here on no room is given back."""
        for place, values in self._waiting:
            place[...] = values
        # Whoever is interrupted now cannot tell whether others see it already.
        self._claimed.clear()


class Page:
    """Sealed blocks of one sequence, and of those that share them."""

    def __init__(self, scheme: Scheme, kv_heads: int, head_dim: int, dtype: np.dtype[Any]) -> None:
        self.scheme, self.dtype = scheme, dtype
        self.block_size = scheme.block_size or 1
        blocks = max(PAGE_TOKENS // self.block_size, 1)
        self.shape = (kv_heads, blocks * self.block_size, head_dim)
        self.parts = scheme.parts(head_dim)
        self.arrays = {
            name: np.empty((kv_heads, *field.shape), field.dtype)
            for name, field in scheme.layout(*self.shape[1:]).items()
        }
        self.collapsed = np.zeros(blocks, np.int32)  # tokens of each block
        self.used = Cell(0)  # tokens, whoever wrote them
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
        size = self.block_size
        rows = {"tokens": slice(first, last), "blocks": slice(first // size, last // size)}
        return {name: rows[part.rows] for name, part in self.parts.items()}

    def places(
        self, at: int, source: Quantized, first: int, collapsed: Array
    ) -> Iterator[tuple[Array, Array]]:
        """Pair memory from token ``at`` on with the blocks of ``source`` from its ``first`` on."""
        count = len(collapsed) * self.block_size
        ours, theirs = self.spans(at, at + count), self.spans(first, first + count)
        for name, array in self.arrays.items():
            yield array[:, ours[name]], source.parts[name][:, theirs[name]]
        yield self.collapsed[at // self.block_size :][: len(collapsed)], collapsed

    def copy(self, count: int) -> Page:
        """Return a page of one's own with the first ``count`` tokens."""
        kv_heads, _, head_dim = self.shape
        other = Page(self.scheme, kv_heads, head_dim, self.dtype)
        if count:
            blocks = self.collapsed[: count // self.block_size]
            for place, values in other.places(0, self.quantized(0, count), 0, blocks):
                place[...] = values
            other.used = Cell(count)
        return other


class Plain(NamedTuple):
    """Unquantized tokens: the first ``length`` of an array ``[kv_heads, room, D]``.

    Examples
    --------
    >>> import numpy as np
    >>> with Change() as change:
    ...     tokens = Plain.empty(kv_heads=2, head_dim=4).grown(np.ones((2, 3, 4)), 8, change)
    ...     change.write()
    >>> tokens.tokens.shape
    (2, 3, 4)
    """

    array: Array
    used: Cell[int]  # tokens of the array, whoever wrote them
    length: int

    @classmethod
    def empty(cls, kv_heads: int, head_dim: int) -> Plain:
        """Return no tokens."""
        return cls(np.empty((kv_heads, 0, head_dim), np.float32), Cell(0), 0)

    @property
    def tokens(self) -> Array:
        """The tokens, as a view."""
        return self.array[:, : self.length]

    def first(self, length: int) -> Plain:
        """Return the first tokens."""
        kv_heads, _, head_dim = self.array.shape
        return self._replace(length=length) if length else Plain.empty(kv_heads, head_dim)

    def grown(self, x: Array, most: int, change: Change) -> Plain:
        """Return these tokens and ``x[kv_heads, T, D]``, at most ``most``; room doubles."""
        if not x.shape[1]:
            return self
        kv_heads, room, head_dim = self.array.shape
        length = self.length + x.shape[1]
        if length <= room and change.claim(self.used, self.length, length):
            change.put(self.array[:, self.length : length], x)
            return Plain(self.array, self.used, length)
        room = min(max(length, 2 * self.length), most)
        array = np.empty((kv_heads, room, head_dim), x.dtype)
        array[:, : self.length] = self.tokens
        array[:, self.length : length] = x
        return Plain(array, Cell(length), length)

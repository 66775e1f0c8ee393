"""`KVCache`: keys and values of a running model, quantized block by block as tokens arrive."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from nsq_ref import attention
from nsq_ref.arrays import RangeError, as_array, as_float_array, as_integer, as_integers, not_finite
from nsq_ref.codec import Quantized
from nsq_ref.environment import in_default_environment
from nsq_ref.pages import Cell, Change
from nsq_ref.scheme import (
    FLOAT_DTYPES,
    KeyValueSchemes,
    PairName,
    Scheme,
    SchemeName,
    as_scheme,
)
from nsq_ref.sequence import Sequence, Side, StoredTokens

__all__ = ["KVCache", "StoredRow"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
PathLike = str | os.PathLike[str]

FLOAT64 = np.dtype(np.float64)


class StoredRow(NamedTuple):
    """What is stored of one row of the batch: copies, which threads may share."""

    keys: StoredTokens
    values: StoredTokens


class _Row(NamedTuple):
    keys: Sequence
    values: Sequence


@dataclass(frozen=True, eq=False)
class _State:
    """All that changes about a cache, in one piece, so that it changes at once or not at all."""

    rows: tuple[_Row, ...]
    dtype: np.dtype[Any] | None

    @property
    def lengths(self) -> list[int]:
        return [row.keys.length for row in self.rows]

    @property
    def nbytes(self) -> int:
        return sum(side.nbytes for row in self.rows for side in row)

    @property
    def plain_dtype(self) -> np.dtype[Any]:
        return FLOAT_DTYPES["float32"] if self.dtype is None else self.dtype


class KVCache:
    """A quantized key/value cache that grows a token, a chunk or a whole prefill at a time.

    Full blocks are coded and never change (B1); sinks (K1) and the tokens of the last, unfinished
    block stay in the input's dtype. One append, many, or one a token give equal bytes. What is
    refused leaves no trace.

    Threads may read a cache while one of them changes it: each call sees it as it was at one
    moment. Of several that change one cache at the same time, all but one get a RuntimeError. Forks
    are caches of their own, each for its own thread. A copy (``copy``, ``deepcopy``) is a fork.

    Parameters
    ----------
    batch : int
        Rows, each a sequence with a length of its own (B2).
    kv_heads : int
        Key/value heads, which may each serve several query heads.
    head_dim : int
        Channels of a key, and of a value unless ``value_head_dim`` says otherwise.
    key, value : Scheme or str, optional
        Schemes of keys and of values, or their names; ``"streaming4"`` by default. As ``key`` alone
        a pair (`KeyValueSchemes`, or a name such as ``"nsep+KIVI"``) is for both.
    block_size : int, optional
        Of schemes that have none, which they need here: a block of the whole sequence would never
        be full. ``"streaming4"`` by default has it too.
    value_head_dim : int, optional
        Channels of a value.
    dtype : {"float32", "float16", "bfloat16"}, optional
        Dtype of what is appended, in which sinks and tail are kept; that of the first append by
        default, and float32 for float64.

    Raises
    ------
    TypeError, ValueError
        For sizes below 1, another dtype, what is no scheme, and schemes without a block size or
        with another one than ``block_size``.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> keys, values = rng.standard_normal((2, 1, 8, 1000, 64), dtype=np.float32)
    >>> cache = KVCache(batch=1, kv_heads=8, head_dim=64)
    >>> cache.append(keys, values)
    >>> cache.append(keys[:, :, :1], values[:, :, :1])
    >>> len(cache), cache.nbytes / (keys.nbytes + values.nbytes)
    (1001, 0.231)
    >>> query = rng.standard_normal((1, 32, 1, 64), dtype=np.float32)
    >>> cache.attend(query).shape
    (1, 32, 1, 64)

    The paper's own scheme, whose blocks have no size, for keys and values:

    >>> paper = KVCache(1, 8, 64, key="nsep+pchan4", value="nsep+pchan4", block_size=128)
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        key: Scheme | KeyValueSchemes | SchemeName | PairName | None = None,
        value: Scheme | SchemeName | None = None,
        *,
        block_size: int | None = None,
        value_head_dim: int | None = None,
        dtype: str | np.dtype[Any] | type | None = None,
    ) -> None:
        batch = as_integer("batch", batch, least=1)
        kv_heads = as_integer("kv_heads", kv_heads, least=1)
        head_dim = as_integer("head_dim", head_dim, least=1)
        value_head_dim = (
            head_dim
            if value_head_dim is None
            else as_integer("value_head_dim", value_head_dim, least=1)
        )
        schemes = _schemes(key, value, block_size)
        self._keys = Side(schemes.key, kv_heads, head_dim)
        self._values = Side(schemes.value, kv_heads, value_head_dim)
        # Rows without tokens are one: sequences never change.
        row = _Row(Sequence.empty(self._keys), Sequence.empty(self._values))
        known = None if dtype is None else _require_dtype(dtype)
        self._state = Cell(_State((row,) * batch, known))

    def __repr__(self) -> str:
        now = self._now
        return (
            f"KVCache(lengths={now.lengths}, kv_heads={self.kv_heads}, "
            f"head_dim={self.head_dim}, bits_per_element={self._bits_per_element(now):.3f}, "
            f"key={self.key}, value={self.value})"
        )

    def __len__(self) -> int:
        """Tokens of the longest row."""
        return max(self._now.lengths)

    def __copy__(self) -> KVCache:
        return self.fork()

    def __deepcopy__(self, memo: object) -> KVCache:
        return self.fork()  # nothing that it shares ever changes

    def __reduce__(self) -> tuple[Any, ...]:
        # As in a file: memory that is not used yet, locks and addresses stay here.
        return _unpickled, self._content(self._now)

    @property
    def _now(self) -> _State:
        """The cache at this moment; who reads twice may read two states."""
        return self._state.value

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self._now.rows)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self._keys.kv_heads

    @property
    def head_dim(self) -> int:
        """Channels of a key."""
        return self._keys.head_dim

    @property
    def value_head_dim(self) -> int:
        """Channels of a value."""
        return self._values.head_dim

    @property
    def key(self) -> Scheme:
        """The scheme of the keys."""
        return self._keys.scheme

    @property
    def value(self) -> Scheme:
        """The scheme of the values."""
        return self._values.scheme

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """Dtype of sinks and tail; None until the first append, unless it was given."""
        return self._now.dtype

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row.

        Examples
        --------
        >>> KVCache(batch=2, kv_heads=1, head_dim=4).lengths
        array([0, 0])
        """
        return np.array(self._now.lengths, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored, as if no row shared a page with another.

        Codes, scales, zeros, norms, outliers, sinks and tails. Pages may hold up to 511 tokens more
        than are stored, or a block if that is longer, and a tail the room for its whole block.

        Examples
        --------
        >>> KVCache(batch=2, kv_heads=1, head_dim=4).nbytes
        0
        """
        return self._now.nbytes

    @property
    def bits_per_element(self) -> float:
        """Bits stored over elements appended, sinks and tails included; 0 for an empty cache.

        Examples
        --------
        >>> import numpy as np
        >>> keys = np.ones((1, 1, 4096, 128), np.float32)
        >>> cache = KVCache(batch=1, kv_heads=1, head_dim=128)
        >>> cache.append(keys, keys)
        >>> cache.bits_per_element
        5.23828125
        """
        return self._bits_per_element(self._now)

    @property
    def collapsed_tokens(self) -> int:
        """Non-zero tokens of sealed blocks that decode to zero (D2), keys and values together.

        Examples
        --------
        >>> KVCache(batch=1, kv_heads=1, head_dim=4).collapsed_tokens
        0
        """
        return sum(int(side.collapsed.sum()) for row in self._now.rows for side in row)

    # --- growing and shrinking ------------------------------------------------------------------

    @in_default_environment
    def append(self, keys: Any, values: Any, lengths: Any = None) -> None:
        """Append tokens to the rows; all of them, or none if any is refused.

        Parameters
        ----------
        keys, values : array, shape [batch, kv_heads, T, D]
            As `quantize` takes them. T may be 0.
        lengths : int array, shape [batch], optional
            How many of the T tokens each row gets; what follows them is padding, and not looked
            at. All of them by default.

        Raises
        ------
        TypeError
            For another dtype than that of the cache.
        ValueError
            For other shapes, lengths outside 0 to T, and NaN or infinity (I2), by index.
        RangeError
            Where a block that is now full cannot be coded (N1, M4, S5, O1, D3), naming the token,
            which may be one of an earlier append: `crop` takes it out.
        RuntimeError
            Where another thread changed the cache meanwhile.

        Examples
        --------
        >>> import numpy as np
        >>> cache = KVCache(batch=2, kv_heads=1, head_dim=4)
        >>> cache.append(np.ones((2, 1, 3, 4)), np.ones((2, 1, 3, 4)), lengths=[3, 1])
        >>> cache.lengths
        array([3, 1])
        """
        before = self._now
        keys, values = as_float_array("keys", keys), as_float_array("values", values)
        batch, tokens = len(before.rows), self._require_tokens(keys, values, len(before.rows))
        counts = [tokens] * batch
        if lengths is not None:
            counts = as_integers("lengths", lengths, batch, least=0, most=tokens)
        dtype = _require_same_dtype(before.dtype, keys, values)
        keys, values = _finite("keys", keys, counts), _finite("values", values, counts)
        with Change() as change:
            rows = tuple(
                _Row(
                    _grown("keys", index, row.keys, keys[index, :, :count], change),
                    _grown("values", index, row.values, values[index, :, :count], change),
                )
                for index, (row, count) in enumerate(zip(before.rows, counts, strict=True))
            )
            change.write()
            self._change(before, _State(rows, dtype))

    @in_default_environment
    def crop(self, length: Any) -> None:
        """Keep only the first tokens of each row.

        A block that the end now lies in is unsealed: its tokens return to the tail as their
        decoded values, rounded to the tail's dtype, and are sealed again when it is full (C1).

        Parameters
        ----------
        length : int, or int array, shape [batch]
            Tokens to keep of every row (shorter rows stay as they are), or of each row.

        Raises
        ------
        TypeError, ValueError
            For what is no integer, is negative, or is beyond the length.

        Examples
        --------
        >>> import numpy as np
        >>> cache = KVCache(batch=1, kv_heads=1, head_dim=4)
        >>> cache.append(np.ones((1, 1, 300, 4)), np.ones((1, 1, 300, 4)))
        >>> cache.crop(200)
        >>> len(cache)
        200
        """
        before = self._now
        own = before.lengths
        if as_array("length", length).ndim == 0:
            most = as_integer("length", length, least=0, most=max(own))
            kept = [min(most, tokens) for tokens in own]
        else:
            kept = as_integers("length", length, len(own), least=0, most=own)
        rows = tuple(
            _Row(row.keys.cropped(count), row.values.cropped(count))
            for row, count in zip(before.rows, kept, strict=True)
        )
        self._change(before, replace(before, rows=rows))

    def reorder(self, rows: Any) -> None:
        """Replace the rows by the given ones, as beam search does; any may recur or be left out.

        Parameters
        ----------
        rows : int array, shape [new batch]
            Which row each new one continues. Their sealed blocks are shared, not copied.

        Raises
        ------
        TypeError, ValueError
            For what is no row.

        Examples
        --------
        >>> import numpy as np
        >>> cache = KVCache(batch=2, kv_heads=1, head_dim=4)
        >>> cache.append(np.ones((2, 1, 3, 4)), np.ones((2, 1, 3, 4)), lengths=[3, 1])
        >>> cache.reorder([1, 1, 0])
        >>> cache.lengths
        array([1, 1, 3])
        """
        before = self._now
        self._change(before, _selected(before, rows))

    def fork(self, rows: Any = None) -> KVCache:
        """Return a cache that continues from here on its own, sharing all sealed blocks.

        Parameters
        ----------
        rows : int array, shape [new batch], optional
            Which rows it has, as in `reorder`; all by default.

        Returns
        -------
        KVCache

        Raises
        ------
        TypeError, ValueError
            For what is no row.

        Examples
        --------
        >>> prompt = KVCache(batch=1, kv_heads=1, head_dim=4)
        >>> prompt.fork(rows=[0, 0, 0]).batch
        3
        """
        now = self._now
        forked = KVCache(
            1, self.kv_heads, self.head_dim, self.key, self.value,
            value_head_dim=self.value_head_dim,
        )  # fmt: skip
        forked._state = Cell(now if rows is None else _selected(now, rows))
        return forked

    # --- reading --------------------------------------------------------------------------------

    @overload
    def attend(
        self, query: Any, *, query_lengths: Any = ..., scale: float | None = ...,
        causal: bool = ..., softcap: float | None = ..., sliding_window: int | None = ...,
        return_weights: Literal[False] = ...,
    ) -> Float32: ...  # fmt: skip
    @overload
    def attend(
        self, query: Any, *, query_lengths: Any = ..., scale: float | None = ...,
        causal: bool = ..., softcap: float | None = ..., sliding_window: int | None = ...,
        return_weights: Literal[True],
    ) -> tuple[Float32, Float32]: ...  # fmt: skip
    @in_default_environment
    def attend(
        self,
        query: Any,
        *,
        query_lengths: Any = None,
        scale: float | None = None,
        causal: bool = True,
        softcap: float | None = None,
        sliding_window: int | None = None,
        return_weights: bool = False,
    ) -> Float32 | tuple[Float32, Float32]:
        """Attend to the cache as it is stored, without decoding it.

        Each row's queries are its last tokens, whose keys and values have been appended before. The
        result is that of `attention.attend` on the decoded arrays within rule A3's tolerance.

        Parameters
        ----------
        query : array, shape [batch, heads, query_tokens, head_dim]
            As `quantize` takes arrays. ``heads`` is a multiple of ``kv_heads``: as many query heads
            in turn share a key/value head.
        query_lengths : int array, shape [batch], optional
            How many of the query tokens each row has; what follows is padding, and not looked at.
            All of them by default.
        scale : float, optional
            Of the scores; ``1 / sqrt(head_dim)`` by default.
        causal : bool
            A query sees its own position and those before it; otherwise all of its row.
        softcap : float, optional
            Scores become ``softcap * tanh(score / softcap)``.
        sliding_window : int, optional
            A query sees this many positions at most, its own the last of them.
        return_weights : bool
            Return the attention weights too.

        Returns
        -------
        output : float32 array, shape [batch, heads, query_tokens, value_head_dim]
            Padding queries have 0.
        weights : float32 array, shape [batch, heads, query_tokens, len(cache)]
            Only if asked for; 0 where a query does not see a token.

        Raises
        ------
        TypeError, ValueError
            For other shapes, dtypes and options, more queries than tokens, and queries that are not
            finite.

        Examples
        --------
        >>> import numpy as np
        >>> cache = KVCache(batch=1, kv_heads=1, head_dim=2)
        >>> cache.append([[[[0, 1], [1.0, 0]]]], [[[[0, 1], [1.0, 0]]]])
        >>> output, weights = cache.attend([[[[0, 20.0]]]], return_weights=True)
        >>> weights.round(3)
        array([[[[1., 0.]]]], dtype=float32)
        """
        now = self._now
        batch, lengths = len(now.rows), now.lengths
        query = as_float_array("query", query)
        heads = query.shape[1] if query.ndim == 4 else 0
        if not heads or heads % self.kv_heads or query.shape[::3] != (batch, self.head_dim):
            expected = f"[{batch}, heads, query_tokens, {self.head_dim}]"
            raise ValueError(
                f"query has shape {list(query.shape)}; this cache takes {expected}, heads a "
                f"multiple of {self.kv_heads}"
            )
        counts = [query.shape[2]] * batch
        if query_lengths is not None:
            counts = as_integers(
                "query_lengths", query_lengths, batch, least=0, most=query.shape[2]
            )
        for index, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            if count > length:
                raise ValueError(
                    f"row {index} has {count} query tokens and {length} in the cache; append their "
                    "keys and values first, or give query_lengths"
                )
        query = np.asarray(_finite("query", query, counts), np.float32)
        output = np.zeros((*query.shape[:3], self.value_head_dim), np.float32)
        weights = None
        if return_weights:
            weights = np.zeros((*query.shape[:3], max(lengths)), np.float32)
        for index, (row, count) in enumerate(zip(now.rows, counts, strict=True)):
            if not count:
                continue
            attended, row_weights = attention.attend_quantized(
                query[index, :, :count], row.keys.pieces(), row.values.pieces(),
                self.key, self.value, value_head_dim=self.value_head_dim, scale=scale,
                causal=causal, softcap=softcap, sliding_window=sliding_window,
                weights=return_weights,
            )  # fmt: skip
            output[index, :, :count] = attended
            if weights is not None and row_weights is not None:
                weights[index, :, :count, : row_weights.shape[-1]] = row_weights
        return output if weights is None else (output, weights)

    def stored(self, row: int = 0) -> StoredRow:
        """Return what is stored of a row, for whoever checks a cache of their own against this one.

        Parameters
        ----------
        row : int

        Returns
        -------
        StoredRow
            Copies: sinks, sealed blocks and tail of keys and of values.

        Examples
        --------
        >>> import numpy as np
        >>> cache = KVCache(batch=1, kv_heads=1, head_dim=4)
        >>> cache.append(np.ones((1, 1, 300, 4)), np.ones((1, 1, 300, 4)))
        >>> keys = cache.stored(0).keys
        >>> keys.sinks.shape, keys.sealed.packed.shape, keys.tail.shape
        ((1, 1, 4), (1, 256, 2), (1, 43, 4))
        """
        now = self._now
        keys, values = now.rows[as_integer("row", row, least=0, most=len(now.rows) - 1)]
        return StoredRow(keys.stored(now.plain_dtype), values.stored(now.plain_dtype))

    @in_default_environment
    def dequantize(self) -> tuple[Float32, Float32]:
        """Return all keys and values, those of shorter rows padded with zeros on the right.

        Returns
        -------
        keys, values : float32 arrays, shape [batch, kv_heads, len(cache), D]
            Sinks and tails are as they were appended, sealed tokens decoded (D1).

        Examples
        --------
        >>> import numpy as np
        >>> cache = KVCache(batch=1, kv_heads=2, head_dim=4)
        >>> cache.append(np.ones((1, 2, 3, 4)), np.ones((1, 2, 3, 4)))
        >>> keys, values = cache.dequantize()
        >>> keys.shape
        (1, 2, 3, 4)
        """
        now = self._now
        shape = (len(now.rows), self.kv_heads, max(now.lengths))
        keys = np.zeros((*shape, self.head_dim), np.float32)
        values = np.zeros((*shape, self.value_head_dim), np.float32)
        for index, row in enumerate(now.rows):
            row.keys.dequantize(keys[index])
            row.values.dequantize(values[index])
        return keys, values

    # --- files ----------------------------------------------------------------------------------

    def save(self, path: PathLike) -> None:
        """Write the cache to a safetensors file, whole or not at all; equal caches, equal files.

        Parameters
        ----------
        path : str or path
            An existing file is replaced, and only once the new one is on disk.

        Raises
        ------
        OSError
            Where the file cannot be written; what was there before is untouched.

        Examples
        --------
        >>> import numpy as np, os, tempfile
        >>> cache = KVCache(batch=1, kv_heads=1, head_dim=4)
        >>> cache.append(np.ones((1, 1, 300, 4)), np.ones((1, 1, 300, 4)))
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = os.path.join(folder.name, "cache.safetensors")
        >>> cache.save(path)
        >>> len(KVCache.load(path))
        300
        >>> folder.cleanup()
        """
        content, arrays = self._content(self._now)
        from nsq_ref import storage  # here, as most who use a cache never save one

        storage.write_container(path, storage.CACHE_FORMAT, {"cache": content}, arrays)

    @classmethod
    def load(cls, path: PathLike) -> KVCache:
        """Read a file of `save`, checking all of it before anything is returned.

        Parameters
        ----------
        path : str or path

        Returns
        -------
        KVCache

        Raises
        ------
        StorageError
            For any other file: another format or version, damage anywhere, arrays that do not
            fit the schemes and lengths, or that no cache writes. It is a `ValueError`.
        OSError
            Where the file cannot be opened.

        Examples
        --------
        >>> KVCache.load("no such file")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'no such file'
        """
        from nsq_ref import storage

        empty: list[tuple[KVCache, list[int]]] = []

        def names(content: dict[str, Any]) -> set[str]:
            cache, lengths = _described(content)
            empty.append((cache, lengths))
            return set(cache._names(lengths))

        _, arrays = storage.read_container(path, storage.CACHE_FORMAT, names)
        ((cache, lengths),) = empty
        try:
            cache._fill(lengths, arrays, storage.require_content)
        except (TypeError, ValueError) as error:
            raise storage.StorageError(f"{path}: {error}; {storage.DAMAGED}") from None
        return cache

    # --- parts ----------------------------------------------------------------------------------

    def _change(self, before: _State, after: _State) -> None:
        if not self._state.swap(before, after):
            raise RuntimeError(
                "another thread changed this cache at the same time, and this call changed "
                "nothing; let one thread at a time change a cache, or give each its own with fork()"
            )

    def _bits_per_element(self, state: _State) -> float:
        elements = sum(state.lengths) * self.kv_heads * (self.head_dim + self.value_head_dim)
        return 8 * state.nbytes / elements if elements else 0.0

    def _content(self, state: _State) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return what describes a state, and its arrays by their names in a file."""
        content = {
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "value_head_dim": self.value_head_dim,
            "key": self.key.to_dict(),
            "value": self.value.to_dict(),
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
        return content, arrays

    def _names(self, lengths: list[int]) -> Iterator[str]:
        """Names of the arrays in a file of rows of these lengths."""
        for prefix, side in (("keys", self._keys), ("values", self._values)):
            fields = {
                length: list(side.fields(length, self._now.plain_dtype)) for length in set(lengths)
            }
            for index, length in enumerate(lengths):
                yield from (f"{prefix}.{index}.{name}" for name in fields[length])

    def _fill(
        self,
        lengths: list[int],
        arrays: Mapping[str, Array],
        check: Callable[[Quantized], None] | None = None,
    ) -> None:
        """Take over the arrays of `_content`; this cache must be empty.

        Raises ValueError for arrays that are not those of `_names`, and what ``check`` raises.
        """
        before = self._now
        dtype = before.plain_dtype

        def restored(name: str, side: Side, index: int, length: int) -> Sequence:
            prefix = f"{name}.{index}."
            own = {name: arrays[prefix + name] for name in side.fields(length, dtype)}
            try:
                return Sequence.restored(side, length, dtype, own, check)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} of row {index}: {error}") from None

        rows = tuple(
            _Row(
                restored("keys", self._keys, index, length),
                restored("values", self._values, index, length),
            )
            if length
            else before.rows[index]
            for index, length in enumerate(lengths)
        )
        self._change(before, replace(before, rows=rows))

    def _require_tokens(self, keys: Array, values: Array, batch: int) -> int:
        """Return T, if both arrays have the shape they must have."""
        tokens = keys.shape[2] if keys.ndim == 4 else -1
        for name, x, side in (("keys", keys, self._keys), ("values", values, self._values)):
            if x.shape != (batch, side.kv_heads, tokens, side.head_dim):
                expected = f"[{batch}, {side.kv_heads}, T, {side.head_dim}]"
                raise ValueError(
                    f"{name} has shape {list(x.shape)}; this cache takes {expected}, "
                    "the same T for keys and values"
                )
        return tokens


def _selected(state: _State, rows: Any) -> _State:
    """Return a state of the given rows."""
    chosen = as_integers("rows", rows, least=0, most=len(state.rows) - 1)
    if not chosen:
        raise ValueError("rows is empty; give at least one row")
    return replace(state, rows=tuple(state.rows[row] for row in chosen))


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


def _require_same_dtype(known: np.dtype[Any] | None, keys: Array, values: Array) -> np.dtype[Any]:
    """Return the dtype in which a cache that keeps the ``known`` one keeps keys and values."""
    kept = [FLOAT_DTYPES["float32"] if x.dtype == FLOAT64 else x.dtype for x in (keys, values)]
    dtype = kept[0] if known is None else known
    for name, own in zip(("keys", "values"), kept, strict=True):
        if own != dtype:
            raise TypeError(
                f"{name} has dtype {own} and this cache keeps {dtype}; pass "
                f"{name}.astype({dtype.name!r}), or give KVCache another dtype"
            )
    return dtype


def _schemes(key: Any, value: Any, block_size: Any) -> KeyValueSchemes:
    if block_size is not None:
        block_size = as_integer("block_size", block_size, least=1)
    pair = Scheme.named(key) if isinstance(key, str) else key
    if isinstance(pair, KeyValueSchemes):
        if value is not None:
            raise TypeError("key is a pair of schemes, for keys and values; leave value out")
        key, value = pair
    return KeyValueSchemes(
        _with_blocks("key", key, block_size), _with_blocks("value", value, block_size)
    )


def _with_blocks(name: str, given: Any, block_size: int | None) -> Scheme:
    """Return a scheme whose ``block_size`` is a number, this one if it is given."""
    if given is None:
        usual = Scheme.named("streaming4")
        return usual if block_size is None else replace(usual, block_size=block_size)
    scheme = as_scheme(name, given)
    if scheme.block_size is None:
        if block_size is None:
            raise ValueError(
                f"{name} has block_size=None, one block for a whole sequence, which in a cache is "
                "never full and so never quantized; give KVCache a block_size, such as 128"
            )
        return replace(scheme, block_size=block_size)
    if block_size not in (None, scheme.block_size):
        raise ValueError(
            f"block_size={block_size}, but {name} has {scheme.block_size}; leave block_size out, "
            f"or give a {name} of that size"
        )
    return scheme


def _require_dtype(dtype: Any) -> np.dtype[Any]:
    for name, known in FLOAT_DTYPES.items():
        if dtype is known.type or (isinstance(dtype, str | np.dtype) and dtype in (name, known)):
            return known
    raise TypeError(f"dtype={dtype!r:.80} is not one of {', '.join(FLOAT_DTYPES)}")


def _finite(name: str, x: Array, counts: list[int]) -> Array:
    """Return ``x`` as it is kept, if what is not padding is finite (I2)."""
    given = x
    if x.dtype == FLOAT64:
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
    if not np.isfinite(x).all():
        padding = np.arange(x.shape[2]) >= np.array(counts)[:, None, None, None]
        padding = np.moveaxis(padding, 3, 2)
        if not np.isfinite(np.where(padding, np.zeros((), x.dtype), x)).all():
            raise not_finite(name, np.where(padding, np.zeros((), given.dtype), given))
    return x


def _described(content: dict[str, Any]) -> tuple[KVCache, list[int]]:
    """Return the cache that a file describes, still without tokens, and the lengths of its rows."""
    fields = content.get("cache")
    names = {"kv_heads", "head_dim", "value_head_dim", "key", "value", "dtype", "lengths"}
    if set(content) != {"cache"} or not isinstance(fields, dict) or set(fields) != names:
        raise ValueError("the description of the cache lacks or adds fields")
    lengths = fields["lengths"]
    if not isinstance(lengths, list) or not lengths:
        raise ValueError(f"lengths is {lengths!r:.80}, not a list of tokens of each row")
    if not all(type(length) is int and length >= 0 for length in lengths):
        raise ValueError(f"lengths is {lengths!r:.80}; give integers from 0")
    if fields["dtype"] is None and any(lengths):
        raise ValueError("dtype is missing")
    cache = KVCache(
        len(lengths), fields["kv_heads"], fields["head_dim"],
        Scheme.from_dict(fields["key"]), Scheme.from_dict(fields["value"]),
        value_head_dim=fields["value_head_dim"], dtype=fields["dtype"],
    )  # fmt: skip
    return cache, lengths


def _unpickled(fields: dict[str, Any], arrays: dict[str, Array]) -> KVCache:
    cache, lengths = _described({"cache": fields})
    cache._fill(lengths, arrays)
    return cache

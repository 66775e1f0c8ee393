"""`KVCache`: keys and values of a running model, quantized block by block as tokens arrive."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from nsq_ref import attention
from nsq_ref.arrays import RangeError, as_float_array, not_finite
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import FLOAT_DTYPES, KeyValueSchemes, Scheme
from nsq_ref.sequence import Sequence, StoredTokens

__all__ = ["KVCache", "StoredRow"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
PathLike = str | os.PathLike[str]


class StoredRow(NamedTuple):
    """What is stored of one row of the batch."""

    keys: StoredTokens
    values: StoredTokens


class _Row(NamedTuple):
    keys: Sequence
    values: Sequence


class KVCache:
    """A quantized key/value cache that grows a token, a chunk or a whole prefill at a time.

    Full blocks are coded and never change (B1); sinks (K1) and the tokens of the last, unfinished
    block stay in the input's dtype. One append, many, or one a token give equal bytes.

    Parameters
    ----------
    batch : int
        Rows, each a sequence with a length of its own (B2).
    kv_heads : int
        Key/value heads, which may each serve several query heads.
    head_dim : int
        Channels of a key, and of a value unless ``value_head_dim`` says otherwise.
    key, value : Scheme, optional
        Schemes of keys and of values; ``Scheme.named("streaming4")`` by default. Their
        ``block_size`` must be a number: a block of the whole sequence would never be full.
    value_head_dim : int, optional
        Channels of a value.
    dtype : {"float32", "float16", "bfloat16"}, optional
        Dtype of what is appended, in which sinks and tail are kept; that of the first append by
        default, and float32 for float64.

    Raises
    ------
    TypeError, ValueError
        For sizes below 1, another dtype, and what is no scheme, or one without a block size.

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
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        key: Scheme | None = None,
        value: Scheme | None = None,
        *,
        value_head_dim: int | None = None,
        dtype: str | np.dtype[Any] | type | None = None,
    ) -> None:
        self._kv_heads = _positive("kv_heads", kv_heads)
        self._head_dim = _positive("head_dim", head_dim)
        self._value_head_dim = self._head_dim
        if value_head_dim is not None:
            self._value_head_dim = _positive("value_head_dim", value_head_dim)
        self._schemes = KeyValueSchemes(
            _require_blocks("key", key), _require_blocks("value", value)
        )
        self._dtype = None if dtype is None else _require_dtype(dtype)
        self._rows = [self._new_row() for _ in range(_positive("batch", batch))]

    def __repr__(self) -> str:
        return (
            f"KVCache(lengths={self.lengths.tolist()}, kv_heads={self.kv_heads}, "
            f"head_dim={self.head_dim}, bits_per_element={self.bits_per_element:.3f}, "
            f"key={self.key}, value={self.value})"
        )

    def __len__(self) -> int:
        """Tokens of the longest row."""
        return max(row.keys.length for row in self._rows)

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self._rows)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self._kv_heads

    @property
    def head_dim(self) -> int:
        """Channels of a key."""
        return self._head_dim

    @property
    def value_head_dim(self) -> int:
        """Channels of a value."""
        return self._value_head_dim

    @property
    def key(self) -> Scheme:
        """The scheme of the keys."""
        return self._schemes.key

    @property
    def value(self) -> Scheme:
        """The scheme of the values."""
        return self._schemes.value

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """Dtype of sinks and tail; None until the first append, unless it was given."""
        return self._dtype

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row.

        Examples
        --------
        >>> KVCache(batch=2, kv_heads=1, head_dim=4).lengths
        array([0, 0])
        """
        return np.array([row.keys.length for row in self._rows], np.int64)

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
        return sum(side.nbytes for row in self._rows for side in row)

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
        channels = self.kv_heads * (self.head_dim + self.value_head_dim)
        elements = int(self.lengths.sum()) * channels
        return 8 * self.nbytes / elements if elements else 0.0

    @property
    def collapsed_tokens(self) -> int:
        """Non-zero tokens of sealed blocks that decode to zero (D2), keys and values together.

        Examples
        --------
        >>> KVCache(batch=1, kv_heads=1, head_dim=4).collapsed_tokens
        0
        """
        return sum(int(side.collapsed.sum()) for row in self._rows for side in row)

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
            Where a block that is now full cannot be coded (N1, M4, S5, O1, D3).

        Examples
        --------
        >>> import numpy as np
        >>> cache = KVCache(batch=2, kv_heads=1, head_dim=4)
        >>> cache.append(np.ones((2, 1, 3, 4)), np.ones((2, 1, 3, 4)), lengths=[3, 1])
        >>> cache.lengths
        array([3, 1])
        """
        keys, values = as_float_array("keys", keys), as_float_array("values", values)
        tokens = self._require_tokens(keys, values)
        counts = [tokens] * self.batch
        if lengths is not None:
            counts = _integers("lengths", lengths, self.batch, counts)
        dtype = self._require_same_dtype(keys, values)
        keys, values = _finite("keys", keys, counts), _finite("values", values, counts)
        growths = []
        for side, index, sequence in self._sequences():
            x = keys if side == "keys" else values
            try:
                growths.append((sequence, sequence.growth(x[index, :, : counts[index]])))
            except RangeError as error:
                first = sequence.length - sequence.tail.count
                raise RangeError(
                    f"{side} of row {index}: {error}. Nothing was appended; x are the tokens "
                    f"from position {first} on, which are now to be sealed"
                ) from None
        self._dtype = dtype
        for sequence, growth in growths:
            sequence.accept(growth)

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
        own = self.lengths.tolist()
        if np.ndim(length) == 0:
            (most,) = _integers("length", [length], 1, [len(self)])
            kept = [min(most, tokens) for tokens in own]
        else:
            kept = _integers("length", length, self.batch, own)
        self._rows = [
            _Row(row.keys.cropped(count), row.values.cropped(count))
            for row, count in zip(self._rows, kept, strict=True)
        ]

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
        self._rows = self._selected(rows)

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
        forked = KVCache(
            1, self.kv_heads, self.head_dim, self.key, self.value,
            value_head_dim=self.value_head_dim, dtype=self.dtype,
        )  # fmt: skip
        forked._rows = self._selected(range(self.batch) if rows is None else rows)
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
        query = as_float_array("query", query)
        heads = query.shape[1] if query.ndim == 4 else 0
        if not heads or heads % self.kv_heads or query.shape[::3] != (self.batch, self.head_dim):
            expected = f"[{self.batch}, heads, query_tokens, {self.head_dim}]"
            raise ValueError(
                f"query has shape {list(query.shape)}; this cache takes {expected}, heads a "
                f"multiple of {self.kv_heads}"
            )
        counts = [query.shape[2]] * self.batch
        if query_lengths is not None:
            counts = _integers("query_lengths", query_lengths, self.batch, counts)
        for index, (count, length) in enumerate(zip(counts, self.lengths, strict=True)):
            if count > length:
                raise ValueError(
                    f"row {index} has {count} query tokens and {length} in the cache; append their "
                    "keys and values first, or give query_lengths"
                )
        query = np.asarray(_finite("query", query, counts), np.float32)
        output = np.zeros((*query.shape[:3], self.value_head_dim), np.float32)
        weights = None
        if return_weights:
            weights = np.zeros((*query.shape[:3], len(self)), np.float32)
        for index, (row, count) in enumerate(zip(self._rows, counts, strict=True)):
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
        (index,) = _integers("row", [row], 1, [self.batch - 1])
        keys, values = self._rows[index]
        return StoredRow(keys.stored(self._plain_dtype()), values.stored(self._plain_dtype()))

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
        shape = (self.batch, self.kv_heads, len(self))
        keys = np.zeros((*shape, self.head_dim), np.float32)
        values = np.zeros((*shape, self.value_head_dim), np.float32)
        for index, row in enumerate(self._rows):
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
        arrays = {
            f"{side}.{index}.{name}": array
            for index in range(self.batch)
            for side, stored in self.stored(index)._asdict().items()
            for name, array in stored.arrays.items()
        }
        content = {
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "value_head_dim": self.value_head_dim,
            "key": self.key.to_dict(),
            "value": self.value.to_dict(),
            "dtype": None if self.dtype is None else self.dtype.name,
            "lengths": self.lengths.tolist(),
        }
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

        caches: list[KVCache] = []
        lengths: list[int] = []

        def names(content: dict[str, Any]) -> set[str]:
            cache, rows = _empty_cache(content)
            caches.append(cache)
            lengths.extend(rows)
            return {
                f"{side}.{index}.{name}"
                for side, index, sequence in cache._sequences()
                for name in sequence.fields(rows[index], cache._plain_dtype())
            }

        _, arrays = storage.read_container(path, storage.CACHE_FORMAT, names)
        for side, index, sequence in caches[0]._sequences():
            prefix = f"{side}.{index}."
            own = {
                name.removeprefix(prefix): array
                for name, array in arrays.items()
                if name.startswith(prefix)
            }
            try:
                sequence.restore(lengths[index], caches[0]._plain_dtype(), own)
                if (sealed := sequence.stored(caches[0]._plain_dtype()).sealed) is not None:
                    storage.require_content(sealed)
            except (TypeError, ValueError) as error:
                where = f"{path}: {side} of row {index}"
                raise storage.StorageError(f"{where}: {error}; {storage.DAMAGED}") from None
        return caches[0]

    # --- parts ----------------------------------------------------------------------------------

    def _new_row(self) -> _Row:
        return _Row(
            Sequence(self.key, self.kv_heads, self.head_dim),
            Sequence(self.value, self.kv_heads, self.value_head_dim),
        )

    def _plain_dtype(self) -> np.dtype[Any]:
        return FLOAT_DTYPES["float32"] if self._dtype is None else self._dtype

    def _sequences(self) -> Iterator[tuple[str, int, Sequence]]:
        for index, row in enumerate(self._rows):
            yield "keys", index, row.keys
            yield "values", index, row.values

    def _selected(self, rows: Any) -> list[_Row]:
        count = np.size(rows)
        if not count:
            raise ValueError("rows is empty; give at least one row")
        chosen = [
            self._rows[row] for row in _integers("rows", rows, count, [self.batch - 1] * count)
        ]
        return [_Row(row.keys.fork(), row.values.fork()) for row in chosen]

    def _require_tokens(self, keys: Array, values: Array) -> int:
        """Return T, if both arrays have the shape they must have."""
        tokens = keys.shape[2] if keys.ndim == 4 else -1
        for name, x, channels in (
            ("keys", keys, self._head_dim),
            ("values", values, self._value_head_dim),
        ):
            if x.shape != (len(self._rows), self._kv_heads, tokens, channels):
                expected = f"[{self.batch}, {self.kv_heads}, T, {channels}]"
                raise ValueError(
                    f"{name} has shape {list(x.shape)}; this cache takes {expected}, "
                    "the same T for keys and values"
                )
        return tokens

    def _require_same_dtype(self, keys: Array, values: Array) -> np.dtype[Any]:
        kept, *others = (
            FLOAT_DTYPES["float32"] if x.dtype == np.float64 else x.dtype for x in (keys, values)
        )
        dtype = kept if self._dtype is None else self._dtype
        for name, own in (("keys", kept), ("values", *others)):
            if own != dtype:
                raise TypeError(
                    f"{name} has dtype {own} and this cache keeps {dtype}; pass "
                    f"{name}.astype({dtype.name!r}), or give KVCache another dtype"
                )
        return dtype


def _positive(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r:.80} must be an integer of at least 1")
    return value


def _require_blocks(name: str, scheme: Scheme | None) -> Scheme:
    if scheme is None:
        return Scheme.named("streaming4")
    if isinstance(scheme, KeyValueSchemes):
        raise TypeError(f"{name} is a pair of schemes; pass key=pair.key, value=pair.value")
    if not isinstance(scheme, Scheme):
        raise TypeError(f"{name} must be a Scheme, got {scheme!r:.80}; try Scheme.named(...)")
    if scheme.block_size is None:
        raise ValueError(
            f"{name} has block_size=None, one block for a whole sequence, which in a cache is "
            f"never full and so never quantized; use dataclasses.replace({name}, block_size=128)"
        )
    return scheme


def _require_dtype(dtype: Any) -> np.dtype[Any]:
    for name, known in FLOAT_DTYPES.items():
        if dtype is known.type or (isinstance(dtype, str | np.dtype) and dtype in (name, known)):
            return known
    raise TypeError(f"dtype={dtype!r:.80} is not one of {', '.join(FLOAT_DTYPES)}")


def _integers(name: str, values: Any, count: int, most: list[int]) -> list[int]:
    """Return ``count`` integers, the i-th from 0 to ``most[i]``."""
    given = np.asarray(values)
    if given.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {values!r:.80}")
    if given.shape != (count,):
        raise ValueError(f"{name} has shape {list(given.shape)}; give {count}, one a row")
    integers: list[int] = given.tolist()
    for index, (value, limit) in enumerate(zip(integers, most, strict=True)):
        if not 0 <= value <= limit:
            raise ValueError(f"{name}[{index}] is {value}; it must be from 0 to {limit}")
    return integers


def _finite(name: str, x: Array, counts: list[int]) -> Array:
    """Return ``x`` as it is kept, if what is not padding is finite (I2)."""
    given = x
    if x.dtype == np.float64:
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
    if not np.isfinite(x).all():
        padding = np.arange(x.shape[2]) >= np.array(counts)[:, None, None, None]
        padding = np.moveaxis(padding, 3, 2)
        if not np.isfinite(np.where(padding, np.zeros((), x.dtype), x)).all():
            raise not_finite(name, np.where(padding, np.zeros((), given.dtype), given))
    return x


def _empty_cache(content: dict[str, Any]) -> tuple[KVCache, list[int]]:
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

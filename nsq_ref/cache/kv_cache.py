"""The cache that users hold: what it takes and gives, and the one reference that changes."""

from __future__ import annotations

import os
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from nsq_ref.arrays import as_array, as_integer, as_integers
from nsq_ref.cache import attending
from nsq_ref.cache.arguments import as_dtype, as_sides, as_tokens, require_own_feedback
from nsq_ref.cache.contents import Described, contents, read
from nsq_ref.cache.pages import Cell, Change
from nsq_ref.cache.state import Sides, State, StoredRow
from nsq_ref.dtypes import Array, Float32
from nsq_ref.environment import in_default_environment
from nsq_ref.feedback import Feedback
from nsq_ref.profiles import require_feedback
from nsq_ref.scheme import KeyValueSchemes, PairName, Scheme, SchemeName

PathLike = str | os.PathLike[str]


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
        a pair (`KeyValueSchemes`, or a name such as ``"small-3"``) is for both. The profiles
        ``best-*`` are made for ``key_feedback``.
    block_size : int, optional
        Of schemes that have none, which they need here: a block of the whole sequence would never
        be full. ``"streaming4"`` by default has it too.
    value_head_dim : int, optional
        Channels of a value.
    dtype : {"float32", "float16", "bfloat16"}, optional
        Dtype of what is appended, in which sinks and tail are kept; that of the first append by
        default, and float32 for float64.
    key_feedback : Feedback, optional
        With which blocks of keys are coded (F1): of this layer, made from queries that are like
        those to come. Reading does not need it.

    Raises
    ------
    TypeError, ValueError
        For sizes below 1, another dtype, what is no scheme, schemes without a block size or with
        another one than ``block_size``, feedback of other heads or channels, and the name of a
        profile that is made for feedback where there is none.

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
        key_feedback: Feedback | None = None,
    ) -> None:
        batch = as_integer("batch", batch, least=1)
        require_feedback(key, key_feedback)
        self._sides = as_sides(
            kv_heads, head_dim, value_head_dim, key, value, block_size, key_feedback
        )
        self._state = Cell(State.empty(self._sides, batch, as_dtype(dtype)))

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
        return _unpickled, (*contents(self._sides, self._now), self.key_feedback)

    @property
    def _now(self) -> State:
        """The cache at this moment; who reads twice may read two states."""
        return self._state.value

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self._now.rows)

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        return self._sides.keys.kv_heads

    @property
    def head_dim(self) -> int:
        """Channels of a key."""
        return self._sides.keys.head_dim

    @property
    def value_head_dim(self) -> int:
        """Channels of a value."""
        return self._sides.values.head_dim

    @property
    def key(self) -> Scheme:
        """The scheme of the keys."""
        return self._sides.keys.scheme

    @property
    def value(self) -> Scheme:
        """The scheme of the values."""
        return self._sides.values.scheme

    @property
    def key_feedback(self) -> Feedback | None:
        """With which blocks of keys are coded (F1)."""
        return self._sides.keys.feedback

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
            For other shapes, lengths outside 0 to T, and NaN or infinity (I2), by index; in a cache
            that was loaded without the feedback of its keys.
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
        require_own_feedback(self._sides)
        before = self._now
        keys, values, counts = as_tokens(
            self._sides, len(before.rows), before.dtype, keys, values, lengths
        )
        with Change() as change:
            after = before.grown(keys, values, counts, keys.dtype, change)
            change.write()
            self._change(before, after)

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
        self._change(before, before.cropped(kept))

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
        self._change(before, before.selected(rows))

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
        return KVCache._of(self._sides, now if rows is None else now.selected(rows))

    # --- reading --------------------------------------------------------------------------------

    @overload
    def attend(
        self, query: Any, *, query_lengths: Any = ..., scale: float | None = ...,
        causal: bool = ..., softcap: float | None = ..., sliding_window: int | None = ...,
        ahead: tuple[Any, Any] | None = ..., return_weights: Literal[False] = ...,
    ) -> Float32: ...  # fmt: skip
    @overload
    def attend(
        self, query: Any, *, query_lengths: Any = ..., scale: float | None = ...,
        causal: bool = ..., softcap: float | None = ..., sliding_window: int | None = ...,
        ahead: tuple[Any, Any] | None = ..., return_weights: Literal[True],
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
        ahead: tuple[Any, Any] | None = None,
        return_weights: bool = False,
    ) -> Float32 | tuple[Float32, Float32]:
        """Attend to the cache as it is stored, without decoding it.

        Each row's queries are its last tokens, whose keys and values have been appended before, or
        are ``ahead``. The result is that of `attention.attend` on the decoded arrays within the
        tolerance of rule A3.

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
        ahead : pair of arrays, shapes [batch, kv_heads, T, D], optional
            Keys and values that follow those of the cache, and are not appended to it: as `append`
            takes them, attended to as they are.
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
        return attending.attend(
            self._sides, self._now, query, query_lengths, return_weights, ahead,
            scale=scale, causal=causal, softcap=softcap, sliding_window=sliding_window,
        )  # fmt: skip

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
        fields, arrays = contents(self._sides, self._now)
        from nsq_ref.files import containers  # here, as most who use a cache never save one

        containers.write_container(path, containers.CACHE_FORMAT, {"cache": fields}, arrays)

    @classmethod
    def load(cls, path: PathLike, *, key_feedback: Feedback | None = None) -> KVCache:
        """Read a file of `save`, checking all of it before anything is returned.

        Parameters
        ----------
        path : str or path
        key_feedback : Feedback, optional
            With which the blocks of keys are coded (F1), if they are: a file does not hold it.
            Without it the cache can be read, but not go on.

        Returns
        -------
        KVCache

        Raises
        ------
        StorageError
            For any other file: another format or version, damage anywhere, arrays that do not
            fit the schemes and lengths, or that no cache writes. It is a `ValueError`.
        TypeError, ValueError
            For a ``key_feedback`` that its keys are not coded with.
        OSError
            Where the file cannot be opened.

        Examples
        --------
        >>> KVCache.load("no such file")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'no such file'
        """
        return cls._of(*read(path, key_feedback))

    # --- parts ----------------------------------------------------------------------------------

    @staticmethod
    def _of(sides: Sides, state: State) -> KVCache:
        cache = KVCache.__new__(KVCache)
        cache._sides, cache._state = sides, Cell(state)
        return cache

    def _change(self, before: State, after: State) -> None:
        if not self._state.swap(before, after):
            raise RuntimeError(
                "another thread changed this cache at the same time, and this call changed "
                "nothing; let one thread at a time change a cache, or give each its own with fork()"
            )

    def _bits_per_element(self, state: State) -> float:
        elements = sum(state.lengths) * self.kv_heads * (self.head_dim + self.value_head_dim)
        return 8 * state.nbytes / elements if elements else 0.0


def _unpickled(
    fields: dict[str, Any], arrays: dict[str, Array], feedback: Feedback | None = None
) -> KVCache:
    described = Described.of(fields).with_feedback(feedback)
    return KVCache._of(described.sides, described.filled(arrays))

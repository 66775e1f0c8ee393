"""What a KVCache must store, as lists of tokens that are encoded anew; and all that it holds."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import numpy.typing as npt

from nsq_ref import Feedback, KVCache, Scheme, dequantize, quantize
from nsq_ref.strategies import schemes

Array = npt.NDArray[Any]
Stored = dict[str, tuple[Any, ...]]

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

cache_schemes = st.integers(1, 5).flatmap(lambda size: schemes(block_size=size))


def normals(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bits(cache: KVCache) -> list[Stored]:
    """Everything a cache stores, as comparable bytes."""
    return [
        {
            f"{side}.{name}": (array.dtype.name, array.shape, array.tobytes())
            for side, stored in cache.stored(row)._asdict().items()
            for name, array in stored.arrays.items()
        }
        for row in range(cache.batch)
    ]


def everything(thing: object, seen: dict[int, Any] | None = None) -> Any:
    """All that an object holds, byte by byte, unused memory and what is shared with what included.

    Two of these are equal if nothing happened in between that anyone could ever notice.
    """
    seen = {} if seen is None else seen
    if thing is None or isinstance(thing, str | int | float | np.dtype | Scheme | Feedback):
        return repr(thing)
    if id(thing) in seen:
        return f"as {[*seen].index(id(thing))}"
    seen[id(thing)] = thing  # which keeps its id its own
    if isinstance(thing, np.ndarray):
        return thing.dtype.name, thing.shape, thing.tobytes()
    if isinstance(thing, list | tuple):
        return [everything(value, seen) for value in thing]
    fields = thing if isinstance(thing, dict) else getattr(thing, "__dict__", {})
    # What is only kept to be quicker tells nothing new.
    quick = {"_prepared", "block_size", "sealed_scheme"}
    kept = ((name, value) for name, value in fields.items() if name not in quick)
    return type(thing).__name__, [(name, everything(value, seen)) for name, value in kept]


class TokenList(NamedTuple):
    """One side of one row: tokens ``[kv_heads, D]``, encoded anew."""

    scheme: Scheme
    tokens: tuple[Array, ...] = ()
    feedback: Feedback | None = None

    def grown(self, x: Array) -> TokenList:
        new = (x[:, t].copy() for t in range(x.shape[1]))
        return self._replace(tokens=(*self.tokens, *new))

    def split(self, length: int) -> tuple[int, int]:
        """Where sealed blocks begin and end, in a sequence of this length."""
        size = self.scheme.block_size
        assert size is not None
        start = min(self.scheme.sink_tokens, length)
        return start, start + (length - start) // size * size

    def cropped(self, length: int) -> TokenList:
        """C1, in the words of the rule."""
        _, sealed_before = self.split(len(self.tokens))
        _, sealed = self.split(length)
        kept = list(self.tokens[:length])
        size = self.scheme.block_size
        if sealed < length < sealed_before:
            block = np.stack(self.tokens[sealed : sealed + size], axis=1)
            scheme = dataclasses.replace(self.scheme, sink_tokens=0)
            coded = quantize(block, scheme, backend="numpy", feedback=self.feedback)
            decoded = dequantize(coded, backend="numpy")
            most = np.finfo(np.float16).max if block.dtype == np.float16 else np.inf
            kept[sealed:] = [
                np.clip(decoded[:, t], -most, most).astype(block.dtype)
                for t in range(length - sealed)
            ]
        return self._replace(tokens=tuple(kept))

    def stored(self) -> Stored:
        """What a cache stores of it; RangeError where it cannot."""
        return dict(_stored(self.scheme, self.feedback, *map(_Token, self.tokens)))


class _Token:
    """A token as the key of a memo: the model never writes to one."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.key = (array.dtype.name, array.shape, array.tobytes())

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Token) and self.key == other.key


@functools.lru_cache(maxsize=4096)
def _stored(scheme: Scheme, feedback: Feedback | None, *tokens: _Token) -> Stored:
    if not tokens:
        return {}
    x = np.stack([token.array for token in tokens], axis=1)
    start, stop = TokenList(scheme).split(x.shape[1])
    arrays = {"sinks": x[:, :start], "tail": x[:, stop:]}
    if start < stop:
        size = scheme.block_size
        assert size is not None
        sealed = dataclasses.replace(scheme, sink_tokens=0)
        arrays |= quantize(x[:, start:stop], sealed, backend="numpy", feedback=feedback).parts
        blocks = (x[:, t : t + size] for t in range(start, stop, size))
        collapsed = [
            quantize(block, sealed, backend="numpy", feedback=feedback).collapsed_tokens
            for block in blocks
        ]
        arrays["collapsed"] = np.array(collapsed, np.int32)
    return {
        name: (array.dtype.name, array.shape, array.tobytes())
        for name, array in arrays.items()
        if array.size
    }


class RowList(NamedTuple):
    """A row of the batch as two lists."""

    keys: TokenList
    values: TokenList

    @property
    def length(self) -> int:
        return len(self.keys.tokens)

    def grown(self, keys: Array, values: Array) -> RowList:
        return RowList(self.keys.grown(keys), self.values.grown(values))

    def cropped(self, length: int) -> RowList:
        return RowList(self.keys.cropped(length), self.values.cropped(length))

    def bits(self) -> Stored:
        sides = self._asdict()
        return {
            f"{side}.{n}": v for side, list_ in sides.items() for n, v in list_.stored().items()
        }


class CacheList(NamedTuple):
    """A cache as lists: what a `KVCache` beside it must equal after every step."""

    rows: tuple[RowList, ...]
    dtype: str | None = None  # that of the first append that was not refused

    def bits(self) -> list[Stored]:
        return [row.bits() for row in self.rows]

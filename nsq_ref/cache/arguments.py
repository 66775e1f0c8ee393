"""What a cache is made of and what is appended to it: taken, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nsq_ref.arrays import as_float_array, as_integer, as_integers, not_finite
from nsq_ref.cache.sequence import Side
from nsq_ref.cache.state import Sides
from nsq_ref.dtypes import FLOAT_DTYPES, Array, kept
from nsq_ref.feedback import Feedback
from nsq_ref.scheme import KeyValueSchemes, Scheme, as_scheme

# --- what a cache is made of --------------------------------------------------------------------


def as_sides(
    kv_heads: Any, head_dim: Any, value_head_dim: Any, key: Any, value: Any,
    block_size: Any = None, key_feedback: Any = None,
) -> Sides:  # fmt: skip
    """Take the arguments of `KVCache` that never change."""
    kv_heads = as_integer("kv_heads", kv_heads, least=1)
    head_dim = as_integer("head_dim", head_dim, least=1)
    if value_head_dim is None:
        value_head_dim = head_dim
    value_head_dim = as_integer("value_head_dim", value_head_dim, least=1)
    if block_size is not None:
        block_size = as_integer("block_size", block_size, least=1)
    pair = Scheme.named(key) if isinstance(key, str) else key
    if isinstance(pair, KeyValueSchemes):
        if value is not None:
            raise TypeError("key is a pair of schemes, for keys and values; leave value out")
        key, value = pair
    keys = Side(_with_blocks("key", key, block_size), kv_heads, head_dim)
    if key_feedback is not None:
        keys = with_feedback(keys, key_feedback)
    return Sides(keys, Side(_with_blocks("value", value, block_size), kv_heads, value_head_dim))


def with_feedback(keys: Side, feedback: Any) -> Side:
    """Return the side of keys that are coded with feedback (F1)."""
    if not isinstance(feedback, Feedback):
        raise TypeError(f"key_feedback must be a Feedback, got {type(feedback).__name__}")
    if feedback.head_dim != keys.head_dim or feedback.kv_heads not in (1, keys.kv_heads):
        raise ValueError(
            f"key_feedback is of {feedback.kv_heads} heads of {feedback.head_dim} channels, and "
            f"the cache has {keys.kv_heads} of {keys.head_dim}"
        )
    return replace(keys, feedback=feedback, coded_with=feedback.digest)


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


def as_dtype(dtype: Any) -> np.dtype[Any] | None:
    """Take the dtype of sinks and tail, None if the first append is to tell."""
    if dtype is None:
        return None
    for name, known in FLOAT_DTYPES.items():
        if dtype is known.type or (isinstance(dtype, str | np.dtype) and dtype in (name, known)):
            return known
    raise TypeError(f"dtype={dtype!r:.80} is not one of {', '.join(FLOAT_DTYPES)}")


# --- what is appended ---------------------------------------------------------------------------


def as_tokens(
    sides: Sides, batch: int, known: np.dtype[Any] | None, keys: Any, values: Any, lengths: Any
) -> tuple[Array, Array, list[int]]:
    """Take the arguments of `KVCache.append`: arrays as they are kept, and tokens of each row."""
    given = {"keys": as_float_array("keys", keys), "values": as_float_array("values", values)}
    tokens = given["keys"].shape[2] if given["keys"].ndim == 4 else -1
    for (name, x), side in zip(given.items(), sides, strict=True):
        if x.shape != (batch, side.kv_heads, tokens, side.head_dim):
            raise ValueError(
                f"{name} has shape {list(x.shape)}; this cache takes "
                f"[{batch}, {side.kv_heads}, T, {side.head_dim}], the same T for keys and values"
            )
    counts = [tokens] * batch
    if lengths is not None:
        counts = as_integers("lengths", lengths, batch, least=0, most=tokens)
    for name, x in given.items():
        own = kept(x.dtype)
        known = own if known is None else known
        if own != known:
            raise TypeError(
                f"{name} has dtype {own} and this cache keeps {known}; pass "
                f"{name}.astype({known.name!r}), or give KVCache another dtype"
            )
    held = [finite(name, x, counts) for name, x in given.items()]
    return held[0], held[1], counts


def require_own_feedback(sides: Sides) -> None:
    """Refuse to go on where keys are coded with feedback that is not here (F1)."""
    if sides.keys.coded_with is not None and sides.keys.feedback is None:
        raise ValueError(
            "the keys of this cache are coded with feedback, which its file does not hold, and "
            "without it the cache can be read but not go on; give KVCache.load the key_feedback "
            f"whose digest begins with {sides.keys.coded_with[:12]}"
        )


def finite(name: str, x: Array, counts: list[int]) -> Array:
    """Return ``x`` as it is kept, if what is not padding is finite (I2)."""
    held, dtype = x, kept(x.dtype)
    if dtype != x.dtype:
        with np.errstate(over="ignore"):
            held = x.astype(dtype)
    if not np.isfinite(held).all():
        padding = np.arange(x.shape[2]) >= np.array(counts)[:, None, None, None]
        padding = np.moveaxis(padding, 3, 2)
        if not np.isfinite(np.where(padding, np.zeros((), held.dtype), held)).all():
            raise not_finite(name, np.where(padding, np.zeros((), x.dtype), x))
    return held

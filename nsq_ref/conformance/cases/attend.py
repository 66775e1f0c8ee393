"""The queries, keys and values that ports are asked to attend to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Literal

import numpy as np

from nsq_ref.conformance import model
from nsq_ref.conformance.cases.pools import Draw
from nsq_ref.conformance.operations import Case, scheme_array
from nsq_ref.dtypes import Array, Float32
from nsq_ref.scheme import Scheme

LONG = 300  # tokens: more than two blocks of 128, and no whole number of tiles


def attend_cases(scheme: Scheme, seed: int) -> Iterator[Case]:
    """Yield the cases of the operation ``"attend"``."""
    numbers: dict[str, Iterator[int]] = defaultdict(count)
    for flag, query, keys, values, value_scheme, options in _attended(scheme, Draw(seed, "attend")):
        inputs: dict[str, Array] = {"query": query.astype(np.float32)}
        for side, x, own in (("keys", keys, scheme), ("values", values, value_scheme)):
            parts = model.encode(x.astype(np.float32), own)
            inputs |= {f"{side}.{name}": part for name, part in parts.items()}
            inputs[f"{side}.shape"] = np.array(x.shape, np.int32)
        default = np.float32(1) / np.sqrt(np.float32(query.shape[-1]))
        inputs |= {
            "value_scheme": scheme_array(value_scheme),
            "scale": np.array([options.get("scale", default)], np.float32),
            "causal": np.array([options.get("causal", 1)], np.int32),
            "softcap": np.array([options.get("softcap", 0)], np.float32),
            "sliding_window": np.array([options.get("sliding_window", 0)], np.int32),
        }
        yield Case(f"{flag}/{next(numbers[flag])}", "attend", scheme, (flag,), inputs)


_Attended = tuple[str, Float32, Float32, Float32, Scheme, dict[str, float]]


def _attended(scheme: Scheme, draw: Draw) -> Iterator[_Attended]:
    """Yield flag, query, keys, values, scheme of the values, and options."""
    sinks = scheme.sink_tokens

    def drawn(
        heads: int, queries: int, kv_heads: int, tokens: int, head_dim: int, value_dim: int
    ) -> tuple[Float32, Float32, Float32]:
        own = (kv_heads, sinks + tokens)
        query = draw.bell(heads, queries, head_dim)
        return query, draw.bell(*own, head_dim), draw.bell(*own, value_dim)

    for heads, queries, kv_heads, tokens, head_dim in (
        (2, 1, 2, 9, 8), (1, 1, 1, 1, 5), (2, 2, 1, 4, 16),
    ):  # fmt: skip
        yield "attention", *drawn(heads, queries, kv_heads, tokens, head_dim, head_dim), scheme, {}
    for heads, kv_heads in ((8, 2), (6, 3), (4, 1)):
        query, keys, values = drawn(heads, 1, kv_heads, 4, 4, 4)
        values += 4 * np.arange(kv_heads, dtype=np.float32)[:, None, None]
        yield "grouped-heads", query, keys, values, scheme, {}
    for queries, causal in ((3, 1), (3, 0), (6, 1)):
        query, keys, values = drawn(2, queries, 1, 6, 4, 4)
        values[:, -1] += 8  # what must not be seen weighs
        yield "causal-mask", query, keys, values, scheme, {"causal": causal}
    for window, queries, tokens in ((1, 2, 5), (3, 2, 9), (2, 4, 4), (100, 2, 5)):
        query, keys, values = drawn(2, queries, 1, tokens, 4, 4)
        values += 4 * np.arange(sinks + tokens, dtype=np.float32)[:, None]
        yield "sliding-window", query, keys, values, scheme, {"sliding_window": window}
    for softcap, factor in ((2.0, 4.0), (30.0, 20.0)):
        query, keys, values = drawn(2, 1, 1, 6, 8, 4)
        yield "softcap", query * np.float32(factor), keys, values, scheme, {"softcap": softcap}
    yield "attention-scale", *drawn(2, 1, 1, 6, 8, 8), scheme, {"scale": 1.25}
    for factor in (200.0, -200.0):  # exp overflows, or all of it underflows
        query, keys, values = drawn(2, 1, 1, 6, 4, 4)
        query, keys = np.abs(query) + np.float32(0.5), np.abs(keys) + np.float32(0.5)
        yield "large-scores", query * np.float32(factor), keys, values, scheme, {}
    query, keys, values = drawn(2, 1, 1, 6, 4, 4)
    keys[:] = keys[:, :1]
    yield "equal-scores", query, keys, values, scheme, {}
    yield "value-head-dim", *drawn(2, 1, 1, 5, 8, 3), scheme, {}
    other = Scheme(
        bits=8 if scheme.bits == 4 else 4, separate_norm=False, axis="token", sink_tokens=sinks,
        symmetric=not scheme.symmetric,
    )  # fmt: skip
    yield "value-scheme", *drawn(2, 1, 1, 5, 8, 8), other, {}
    query, keys, values = drawn(2, 1, 1, 4, 4, 4)
    keys[:, -2], values[:, -3] = 0, 0
    yield "zero-token", query, keys, values, scheme, {}
    if scheme.block_size is not None and scheme.block_size <= 16:
        tokens = 2 * scheme.block_size + 1
        query, keys, values = drawn(2, 1, 1, tokens, 4, 4)
        grown = np.ldexp(np.float32(1), np.arange(sinks + tokens) // scheme.block_size)[:, None]
        yield "block-boundary", query, keys, values * grown, scheme, {}
    query, keys, values = drawn(2, 3, 1, 6, 8, 4)  # a cap after the mask would let masked ones in
    yield "softcap", query * np.float32(4), keys, values, scheme, {"softcap": 2.0}
    for query, keys, values, options in _long(sinks, draw):
        yield "long-attention", query, keys, values, scheme, options
    yield "value-head-dim", *drawn(2, 1, 1, 5, 3, 8), scheme, {}
    yield "value-scheme", *drawn(2, 1, 1, 5, 8, 8), _of_like_parts(scheme), {}


def _of_like_parts(scheme: Scheme) -> Scheme:
    """Return a scheme whose parts a reader can take for those of the given one."""
    if scheme.separate_norm:
        magnitude: Literal["gain", "norm"] = "gain" if scheme.magnitude == "norm" else "norm"
        return replace(scheme, norm_rule="plain", magnitude=magnitude)
    return replace(scheme, symmetric=not scheme.symmetric)


def _long(sinks: int, draw: Draw) -> Iterator[tuple[Float32, Float32, Float32, dict[str, float]]]:
    """Yield queries that weigh tokens of all tiles and blocks, and what the weights are to miss."""
    tokens, head_dim, value_dim = sinks + LONG, 8, 4
    at = np.arange(tokens)
    value = draw.bell(2, tokens, value_dim) * np.ldexp(np.float32(1), at // 64)[:, None]
    one = np.zeros(head_dim, np.float32)
    one[0] = 4

    def along(weight: Float32, noise: float = 0.25) -> Float32:
        """Keys of which the first channel makes the scores, and the others hardly."""
        keys: Float32 = draw.bell(2, tokens, head_dim) * np.float32(noise)
        keys[..., 0] = weight
        return keys

    query = draw.bell(4, 3, head_dim) * np.float32(0.125) + one
    comb = along(np.where(at % 17 == 3, 4, -2).astype(np.float32))
    yield query, comb, value, {}
    yield query, along((at / 64).astype(np.float32)), value, {"softcap": 4.0}  # the maximum grows
    yield query, along((-at / 64).astype(np.float32)), value, {"causal": 0}
    tails = draw.bell(2, tokens, head_dim)
    yield query, tails * tails * tails, value, {"sliding_window": 200}
    yield query, draw.bell(2, tokens, head_dim) + 6, value + 100, {"scale": 0.0625}  # offsets
    for place in (15, 16, 63, 64, 127, 128, 255, 256, tokens - 2, tokens - 1):  # nearly one-hot
        keys = along(np.where(at == place, 12, -2).astype(np.float32))
        yield query[:2, :1], keys[:1], value[:1], {"causal": float(place % 2)}
    # A window whose first token is inside a tile, and as heavy as the others.
    level = draw.bell(2, tokens, head_dim) * np.float32(0.25)
    for window, queries in ((200, 3), (100, 1), (65, 2)):
        yield query[:, :queries], level, value + 8, {"sliding_window": window}

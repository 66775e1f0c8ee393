"""KVCache against a plain list of tokens that is encoded from scratch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nsq_ref import (
    KVCache,
    RangeError,
    Scheme,
    attention,
    dequantize,
    quantize,
    sequence,
    storage,
)
from nsq_ref.strategies import schemes

Array = npt.NDArray[Any]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def normals(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bits(cache: KVCache) -> list[dict[str, tuple[Any, ...]]]:
    """Everything a cache stores, as comparable bytes."""
    return [
        {
            f"{side}.{name}": (array.dtype.name, array.shape, array.tobytes())
            for side, stored in cache.stored(row)._asdict().items()
            for name, array in stored.arrays.items()
        }
        for row in range(cache.batch)
    ]


# --- the oracle: lists of tokens ----------------------------------------------------------------


class TokenList:
    """One side of one row: tokens ``[kv_heads, D]`` in a list, encoded anew at every question."""

    def __init__(self, scheme: Scheme, tokens: list[Array] | None = None) -> None:
        self.scheme = scheme
        self.tokens = list(tokens or [])

    def copy(self) -> TokenList:
        return TokenList(self.scheme, self.tokens)

    def split(self, length: int) -> tuple[int, int]:
        """Where sealed blocks begin and end, in a sequence of this length."""
        size = self.scheme.block_size
        assert size is not None
        start = min(self.scheme.sink_tokens, length)
        return start, start + (length - start) // size * size

    def crop(self, length: int) -> None:
        """C1, in the words of the rule."""
        _, sealed_before = self.split(len(self.tokens))
        _, sealed = self.split(length)
        kept = self.tokens[:length]
        size = self.scheme.block_size
        if sealed < length < sealed_before:
            block = np.stack(self.tokens[sealed : sealed + size], axis=1)
            scheme = dataclasses.replace(self.scheme, sink_tokens=0)
            decoded = dequantize(quantize(block, scheme, backend="numpy"), backend="numpy")
            most = np.finfo(np.float16).max if block.dtype == np.float16 else np.inf
            kept[sealed:] = [
                np.clip(decoded[:, t], -most, most).astype(block.dtype)
                for t in range(length - sealed)
            ]
        self.tokens = kept

    def bits(self) -> dict[str, tuple[Any, ...]]:
        if not self.tokens:
            return {}
        x = np.stack(self.tokens, axis=1)
        start, stop = self.split(x.shape[1])
        arrays = {"sinks": x[:, :start], "tail": x[:, stop:]}
        if start < stop:
            size = self.scheme.block_size
            assert size is not None
            scheme = dataclasses.replace(self.scheme, sink_tokens=0)
            arrays |= quantize(x[:, start:stop], scheme, backend="numpy").parts
            collapsed = [
                quantize(x[:, t : t + size], scheme, backend="numpy").collapsed_tokens
                for t in range(start, stop, size)
            ]
            arrays["collapsed"] = np.array(collapsed, np.int32)
        return {
            name: (array.dtype.name, array.shape, array.tobytes())
            for name, array in arrays.items()
            if array.size
        }


class RowList:
    """A row of the batch as two lists."""

    def __init__(self, keys: TokenList, values: TokenList) -> None:
        self.keys = keys
        self.values = values

    def copy(self) -> RowList:
        return RowList(self.keys.copy(), self.values.copy())

    def bits(self) -> dict[str, tuple[Any, ...]]:
        sides = {"keys": self.keys, "values": self.values}
        return {
            f"{side}.{n}": v for side, tokens in sides.items() for n, v in tokens.bits().items()
        }


cache_schemes = st.integers(1, 5).flatmap(lambda size: schemes(block_size=size))


class CacheMachine(RuleBasedStateMachine):
    """Caches, their forks among them, each beside its lists; any operation in any order."""

    @initialize(
        key=cache_schemes,
        value=cache_schemes,
        dtype=st.sampled_from(sorted(DTYPES)),
        batch=st.integers(1, 3),
        kv_heads=st.integers(1, 2),
        channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        page_tokens=st.sampled_from([1, 4, 512]),
        seed=st.integers(0, 2**32 - 1),
    )
    def start(
        self,
        key: Scheme,
        value: Scheme,
        dtype: str,
        batch: int,
        kv_heads: int,
        channels: tuple[int, int],
        page_tokens: int,
        seed: int,
    ) -> None:
        self.usual_page_tokens = sequence.PAGE_TOKENS
        sequence.PAGE_TOKENS = page_tokens
        self.rng = np.random.default_rng(seed)
        self.dtype = DTYPES[dtype]
        self.kv_heads, self.channels = kv_heads, channels
        cache = KVCache(batch, kv_heads, channels[0], key, value, value_head_dim=channels[1])
        rows = [RowList(TokenList(key), TokenList(value)) for _ in range(batch)]
        self.pairs = [(cache, rows)]
        self.touched = 0

    def teardown(self) -> None:
        if hasattr(self, "pairs"):
            sequence.PAGE_TOKENS = self.usual_page_tokens
            for cache, rows in self.pairs:
                assert bits(cache) == [row.bits() for row in rows]

    def vectors(self, batch: int, tokens: int, channels: int) -> Array:
        """Values of wild norms, with zeros, that every drawn scheme can hold."""
        shape = (batch, self.kv_heads, tokens, channels)
        x = self.rng.standard_normal(shape) * 10.0 ** self.rng.integers(-4, 3, (*shape[:3], 1))
        x[self.rng.random(shape) < 0.2] = 0
        x[self.rng.random(shape[:3]) < 0.1] = 0
        return x.astype(self.dtype)

    def pick(self, which: int) -> tuple[KVCache, list[RowList]]:
        self.touched = which % len(self.pairs)
        return self.pairs[self.touched]

    @rule(which=st.integers(0, 3), tokens=st.integers(0, 12), ragged=st.booleans())
    def append(self, which: int, tokens: int, ragged: bool) -> None:
        cache, rows = self.pick(which)
        keys, values = (self.vectors(len(rows), tokens, channels) for channels in self.channels)
        lengths = self.rng.integers(0, tokens + 1, len(rows)) if ragged else [tokens] * len(rows)
        for row, (tokens_list, length) in enumerate(zip(rows, lengths, strict=True)):
            tokens_list.keys.tokens += [keys[row, :, t].copy() for t in range(length)]
            tokens_list.values.tokens += [values[row, :, t].copy() for t in range(length)]
            keys[row, :, length:] = np.nan
            values[row, :, length:] = np.nan
        cache.append(keys, values, lengths if ragged else None)
        keys[...] = values[...] = -1  # the caller's memory is the caller's

    @rule(which=st.integers(0, 3), tokens=st.integers(1, 12), side=st.integers(0, 1))
    def append_what_is_refused(self, which: int, tokens: int, side: int) -> None:
        cache, rows = self.pick(which)
        arrays = [self.vectors(len(rows), tokens, channels) for channels in self.channels]
        arrays[side][-1, -1, -1, -1] = np.nan
        with pytest.raises(ValueError, match=r"^(keys|values)\[.*\] is nan; nothing"):
            cache.append(*arrays)

    @rule(which=st.integers(0, 3), fraction=st.floats(0, 1))
    def crop(self, which: int, fraction: float) -> None:
        cache, rows = self.pick(which)
        length = int(fraction * len(cache))
        cache.crop(length)
        for row in rows:
            row.keys.crop(min(length, len(row.keys.tokens)))
            row.values.crop(min(length, len(row.values.tokens)))

    @rule(which=st.integers(0, 3))
    def crop_each_row(self, which: int) -> None:
        cache, rows = self.pick(which)
        lengths = [int(self.rng.integers(0, len(row.keys.tokens) + 1)) for row in rows]
        cache.crop(lengths)
        for row, length in zip(rows, lengths, strict=True):
            row.keys.crop(length)
            row.values.crop(length)

    @rule(which=st.integers(0, 3), beams=st.integers(1, 3))
    def reorder(self, which: int, beams: int) -> None:
        cache, rows = self.pick(which)
        chosen = self.rng.integers(0, len(rows), beams)
        cache.reorder(chosen)
        self.pairs[self.touched] = (cache, [rows[row].copy() for row in chosen])

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(which=st.integers(0, 3), some=st.booleans())
    def fork(self, which: int, some: bool) -> None:
        cache, rows = self.pick(which)
        chosen = list(range(len(rows)))
        if some:
            chosen = self.rng.integers(0, len(rows), 2).tolist()
        forked = cache.fork(chosen) if some else cache.fork()
        self.pairs.append((forked, [rows[row].copy() for row in chosen]))

    @rule(which=st.integers(0, 3))
    def save_and_load(self, which: int) -> None:
        cache, rows = self.pick(which)
        with tempfile.TemporaryDirectory() as folder:
            first, second = Path(folder) / "first", Path(folder) / "second"
            cache.save(first)
            loaded = KVCache.load(first)
            loaded.save(second)
            assert first.read_bytes() == second.read_bytes()
        self.pairs[self.touched] = (loaded, rows)

    @invariant()
    def touched_stores_what_its_lists_say(self) -> None:
        if not hasattr(self, "pairs"):
            return
        cache, rows = self.pairs[self.touched]
        assert cache.lengths.tolist() == [len(row.keys.tokens) for row in rows]
        expected = [row.bits() for row in rows]
        assert bits(cache) == expected
        sizes = (v for row in expected for n, v in row.items() if not n.endswith("collapsed"))
        assert cache.nbytes == sum(len(array[2]) for array in sizes)

    @invariant()
    def touched_decodes_to_what_it_stores(self) -> None:
        if not hasattr(self, "pairs"):
            return
        cache, _ = self.pairs[self.touched]
        for side, decoded in zip(("keys", "values"), cache.dequantize(), strict=True):
            for row, length in enumerate(cache.lengths):
                sinks, sealed, tail, _ = getattr(cache.stored(row), side)
                middle = [] if sealed is None else [dequantize(sealed)]
                parts = [sinks, *middle, tail]
                whole = np.concatenate([part.astype(np.float32) for part in parts], axis=1)
                assert decoded[row, :, :length].tobytes() == whole.tobytes()
                assert not decoded[row, :, length:].any()


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


class TestAnyOrder(CacheMachine.TestCase):  # type: ignore[misc,name-defined]
    """Any operations in any order give the bytes of a fresh encoding."""


# --- the rules, one by one, at the sizes of use -------------------------------------------------


@pytest.mark.parametrize("name", ["streaming4", "streaming3", "naive4", "nsep+out4", "pchan2"])
def test_one_shot_is_streamed_is_chunked(name: str) -> None:
    """B1: equal bytes however the tokens arrive, and those of `quantize` for every full block."""
    scheme = dataclasses.replace(Scheme.named(name), block_size=64, sink_tokens=2)
    keys, values = normals(2, 1, 2, 1500, 24)
    whole, streamed, chunked = (KVCache(1, 2, 24, scheme, scheme) for _ in range(3))
    whole.append(keys, values)
    for t in range(1500):
        streamed.append(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    rng = np.random.default_rng(1)
    at = 0
    while at < 1500:
        end = at + int(rng.integers(1, 700))
        chunked.append(keys[:, :, at:end], values[:, :, at:end])
        at = end
    assert bits(whole) == bits(streamed) == bits(chunked)
    full = 2 + 1498 // 64 * 64
    expected = quantize(values[0, :, :full], scheme)
    stored = whole.stored().values
    assert stored.sealed is not None
    assert expected.sinks is not None
    assert stored.sinks.tobytes() == expected.sinks.tobytes() == values[0, :, :2].tobytes()
    for part, array in stored.sealed.parts.items():
        assert array.tobytes() == expected.parts[part].tobytes(), part
    assert stored.tail.tobytes() == values[0, :, full:].tobytes()


def test_rows_do_not_influence_each_other() -> None:
    """B2: one row of the batch changes, in values and in length, and no other row's bytes do."""
    scheme = Scheme(block_size=8)
    x = normals(2, 3, 2, 40, 6)
    first, second = (KVCache(3, 2, 6, scheme, scheme) for _ in range(2))
    first.append(*x, lengths=[40, 40, 17])
    x[:, 1] *= 1000
    second.append(*x, lengths=[40, 33, 17])
    one, two = bits(first), bits(second)
    assert one[0] == two[0]
    assert one[2] == two[2]
    assert one[1]["keys.norm"] != two[1]["keys.norm"]


def test_crop_returns_decoded_tokens_to_the_tail() -> None:
    """C1: only the block that is cut is unsealed, and sealing it again uses the decoded values."""
    scheme = Scheme(block_size=8)
    x = normals(1, 2, 24, 6)
    cache = KVCache(1, 2, 6, scheme, scheme)
    cache.append(x, x)
    before = cache.stored().keys
    decoded, _ = cache.dequantize()
    cache.crop(13)
    after = cache.stored().keys
    assert before.sealed is not None
    assert after.sealed is not None
    assert after.sealed.packed.tobytes() == before.sealed.packed[:, :8].tobytes()
    assert after.tail.tobytes() == decoded[0, :, 8:13].tobytes()
    assert after.tail.tobytes() != x[0, :, 8:13].tobytes()
    cache.append(x[:, :, 13:], x[:, :, 13:])
    again = cache.stored().keys.sealed
    assert again is not None
    mixed = np.concatenate([decoded[0, :, 8:13], x[0, :, 13:16]], axis=1)
    assert again.packed[:, 8:16].tobytes() == quantize(mixed, scheme).packed.tobytes()


def test_crop_of_a_decoded_value_beyond_float16() -> None:
    """C1: a decoded value that float16 cannot hold becomes its largest."""
    scheme = Scheme(block_size=2, magnitude="gain", norm_dtype="float32")
    x = np.full((1, 1, 2, 2), 65504, np.float16)
    x[0, 0, 1] = [65504, 60000]
    cache = KVCache(1, 1, 2, scheme, scheme)
    cache.append(x, x)
    assert cache.dequantize()[0].max() > 65520  # or this test tests nothing
    cache.crop(1)
    tail = cache.stored().keys.tail
    assert tail.dtype == np.float16
    assert np.isfinite(tail).all()
    assert tail.max() == 65504


def test_sinks_are_kept_as_they_are() -> None:
    """K1: the first tokens stay unquantized, and do again after a crop into them."""
    scheme = Scheme(block_size=4, sink_tokens=3)
    x = normals(1, 1, 20, 4).astype(ml_dtypes.bfloat16)
    cache = KVCache(1, 1, 4, scheme, scheme)
    cache.append(x, x)
    assert cache.stored().keys.sinks.tobytes() == x[0, :, :3].tobytes()
    cache.crop(1)
    cache.append(x[:, :, 7:], x[:, :, 7:])
    expected = np.concatenate([x[0, :, :1], x[0, :, 7:9]], axis=1)
    assert cache.stored().keys.sinks.tobytes() == expected.tobytes()


def test_forks_share_sealed_blocks() -> None:
    cache = KVCache(1, 2, 8, Scheme(block_size=16), Scheme(block_size=16))
    cache.append(*normals(2, 1, 2, 100, 8))
    forked = cache.fork([0, 0, 0])
    pages = cache._rows[0].keys.pages
    for row in forked._rows:
        assert [*map(id, row.keys.pages)] == [*map(id, pages)]
    one, two = normals(2, 3, 2, 100, 8, seed=1)
    forked.append(one, two)  # all three, and then the prompt, go on from the same place
    apart = KVCache(3, 2, 8, cache.key, cache.value)
    apart.append(*(np.repeat(x, 3, axis=0) for x in normals(2, 1, 2, 100, 8)))
    apart.append(one, two)
    assert bits(forked) == bits(apart)


def test_pages_never_move() -> None:
    """Appending writes behind what is there: what lies in a page is copied at no append."""
    cache = KVCache(1, 1, 8, Scheme(block_size=16), Scheme(block_size=16))
    seen: list[int] = []
    for _ in range(90):
        cache.append(*normals(2, 1, 1, 16, 8))
        pages = cache._rows[0].keys.pages
        addresses = [page.arrays["packed"].ctypes.data for page in pages]
        assert addresses[: len(seen)] == seen
        seen = addresses
    assert len(seen) == 3


def test_memory_is_that_of_the_formula() -> None:
    """What is allocated for 32768 tokens, appended in chunks, against `nbytes`."""
    keys, values = normals(2, 1, 8, 512, 128)
    KVCache(1, 8, 128).append(keys, values)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        cache = KVCache(1, 8, 128)
        for _ in range(64):
            cache.append(keys, values)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    sealed = (32768 - 1) // 128 * 128
    formula = cache.key.layout(1 + sealed, 128).values()
    size = 8 * sum(int(np.prod(part.shape)) * part.dtype.itemsize for part in formula)
    size += 8 * (32767 - sealed) * 128 * 4
    assert cache.nbytes == 2 * size
    assert cache.nbytes <= used <= 1.02 * cache.nbytes


def test_collapsed_tokens_are_counted_by_block() -> None:
    """D2: what a crop unseals no longer counts."""
    scheme = Scheme(block_size=4, separate_norm=False)
    x = np.ones((1, 1, 12, 2), np.float32)
    x[0, 0, [1, 5, 6, 11]] = 1e-3
    cache = KVCache(1, 1, 2, scheme, Scheme(block_size=4))
    cache.append(x, x)
    assert cache.collapsed_tokens == 4
    assert cache.stored().keys.collapsed.tolist() == [1, 2, 1]
    cache.crop(7)
    assert cache.collapsed_tokens == 1
    cache.append(x[:, :, 7:], x[:, :, 7:])
    assert cache.stored().keys.collapsed.tolist() == [1, 0, 1]  # as zeros, those two came back
    cache.crop(0)
    assert cache._rows[0].keys.pages == []


# --- attention ----------------------------------------------------------------------------------


def reach(cache: KVCache, side: str) -> npt.NDArray[np.float64]:
    """Rule A3's reach of all tokens, padded with NaN, which must not matter."""
    channels = cache.head_dim if side == "keys" else cache.value_head_dim
    whole = np.full((cache.batch, cache.kv_heads, len(cache), channels), np.nan)
    for row, length in enumerate(cache.lengths):
        sinks, sealed, tail, _ = getattr(cache.stored(row), side)
        middle = [] if sealed is None else [attention.reach(sealed)]
        plain = [np.abs(part.astype(np.float64)) for part in (sinks, tail)]
        whole[row, :, :length] = np.concatenate([plain[0], *middle, plain[1]], axis=1)
    return whole


@given(
    key=cache_schemes,
    value=cache_schemes,
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)),
    channels=st.tuples(st.integers(1, 70), st.integers(1, 9)),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(any),
    causal=st.booleans(),
    window=st.sampled_from([None, None, 1, 2, 7]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    scale=st.sampled_from([None, 0.0, -1.0, 2.0]),
    spread=st.sampled_from([0, 1, 4]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=150)
def test_attention_is_within_the_tolerance(
    key: Scheme,
    value: Scheme,
    dtype: str,
    shape: tuple[int, int, int],
    channels: tuple[int, int],
    lengths: list[int],
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float | None,
    spread: int,
    seed: int,
) -> None:
    """A1, A2, A3: any cache against float64 over what it decodes to."""
    rng = np.random.default_rng(seed)
    kv_heads, group, most_queries = shape
    batch, tokens = len(lengths), max(lengths)
    cache = KVCache(batch, kv_heads, channels[0], key, value, value_head_dim=channels[1])
    keys, values = (
        (
            rng.standard_normal((batch, kv_heads, tokens, count))
            * 10.0 ** rng.uniform(-spread, min(spread, 2), (batch, kv_heads, tokens, 1))
            * (rng.random((batch, kv_heads, tokens, 1)) > 0.1)
        ).astype(DTYPES[dtype])
        for count in channels
    )
    cache.append(keys, values, lengths)
    query = rng.standard_normal((batch, kv_heads * group, most_queries, channels[0]))
    counts = [min(int(rng.integers(0, most_queries + 1)), length) for length in lengths]
    options: Any = {
        "query_lengths": counts, "scale": scale, "causal": causal, "softcap": softcap,
        "sliding_window": window if causal else None,
    }  # fmt: skip
    query = query.astype(np.float32)
    output, weights = cache.attend(query, return_weights=True, **options)
    decoded = cache.dequantize()
    exact = attention.attend(query, *decoded, lengths=lengths, **options)
    bound = attention.tolerance(
        query, *decoded, reach(cache, "keys"), reach(cache, "values"), lengths=lengths, **options
    )
    assert (np.abs(weights - exact.weights) <= bound.weights).all()
    assert (np.abs(output - exact.output) <= bound.output).all()
    assert np.isfinite(output).all()


@pytest.mark.parametrize("window", [None, 5])
def test_attention_in_a_batch_is_that_of_each_row(window: int | None) -> None:
    """B2: rows of several lengths, padded queries, and a row that has none."""
    scheme = Scheme.named("streaming3")
    cache = KVCache(4, 2, 8, scheme, Scheme(block_size=16), value_head_dim=6)
    lengths, counts = [300, 7, 0, 131], [3, 1, 0, 2]
    keys, values = normals(4, 2, 300, 8), normals(4, 2, 300, 6, seed=1)
    cache.append(keys, values, lengths)
    query = normals(4, 4, 3, 8, seed=2)
    for row, count in enumerate(counts):
        query[row, :, count:] = np.nan
    options: Any = {"softcap": 3.0, "scale": 0.7, "sliding_window": window}
    output, weights = cache.attend(query, query_lengths=counts, return_weights=True, **options)
    assert output.shape == (4, 4, 3, 6)
    assert weights.shape == (4, 4, 3, 300)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        assert not output[row, :, count:].any()
        assert not weights[row, :, count:].any()
        assert not weights[row, :, :, length:].any()
        if count:
            alone = KVCache(1, 2, 8, cache.key, cache.value, value_head_dim=6)
            alone.append(keys[row : row + 1, :, :length], values[row : row + 1, :, :length])
            expected = alone.attend(query[row : row + 1, :, :count], **options)
            assert output[row : row + 1, :, :count].tobytes() == expected.tobytes()
            assert np.allclose(weights[row, :, :count].sum(axis=-1), 1, atol=1e-5)


def test_attention_does_not_depend_on_how_the_cache_came_about() -> None:
    """A fork and a crop between blocks change no bit of what attention gives."""
    cache = KVCache(1, 2, 8, Scheme(block_size=16), Scheme(block_size=16))
    cache.append(*normals(2, 1, 2, 96, 8))
    query = normals(1, 2, 1, 8, seed=3)
    expected = cache.attend(query).tobytes()
    cache.append(*normals(2, 1, 2, 4, 8, seed=4))
    other = cache.fork()
    cache.append(*normals(2, 1, 2, 30, 8, seed=5))
    for one in (cache, other):
        one.crop(96)  # whole blocks, so that nothing is decoded
        assert one.attend(query).tobytes() == expected


# --- refusals -----------------------------------------------------------------------------------


def test_range_errors_leave_everything_as_it_was() -> None:
    """M4: one row's values are refused when their block is full; no row has changed."""
    scheme = Scheme(block_size=4)
    cache = KVCache(2, 1, 4, scheme, scheme)
    keys, values = normals(2, 2, 1, 6, 4)
    values[1, 0, 5] = 1e6  # waits in the tail, as the second token of its block
    cache.append(keys, values)
    before = bits(cache)
    message = (
        r"^values of row 1: the norm of token x\[0, 1\] is beyond float16.* from position 4 on"
    )
    with pytest.raises(RangeError, match=message):
        cache.append(keys, values)
    assert bits(cache) == before
    cache.crop(5)
    cache.append(keys[:, :, :3], keys[:, :, :3])
    assert cache.lengths.tolist() == [8, 8]


def x(*shape: int, dtype: Any = np.float32) -> Array:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.append(x(2, 1, 4), x(2, 1, 4)), ValueError, r"keys has shape \[2, 1, 4\]; this cache takes \[2, 1, T, 4\]"),
        (lambda c: c.append(x(2, 1, 3, 4), x(2, 1, 2, 4)), ValueError, r"values has shape .* the same T"),
        (lambda c: c.append(x(1, 1, 3, 4), x(1, 1, 3, 4)), ValueError, "keys has shape"),
        (lambda c: c.append(x(2, 1, 3, 4), x(2, 1, 3, 5)), ValueError, "values has shape"),
        (lambda c: c.append(x(2, 1, 3, 4, dtype=int), x(2, 1, 3, 4)), TypeError, "keys has dtype int64"),
        (lambda c: c.append(x(2, 1, 3, 4, dtype=np.float16), x(2, 1, 3, 4)), TypeError, "keys has dtype float16 and this cache keeps float32"),
        (lambda c: c.append(x(2, 1, 3, 4), x(2, 1, 3, 4, dtype=np.float16)), TypeError, "values has dtype float16 and this cache keeps float32"),
        (lambda c: c.append(x(2, 1, 3, 4), x(2, 1, 3, 4), [3, 4]), ValueError, r"lengths\[1\] is 4; it must be from 0 to 3"),
        (lambda c: c.append(x(2, 1, 3, 4), x(2, 1, 3, 4), [3, -1]), ValueError, r"lengths\[1\] is -1"),
        (lambda c: c.append(x(2, 1, 3, 4), x(2, 1, 3, 4), [3]), ValueError, r"lengths has shape \[1\]; give 2"),
        (lambda c: c.append(x(2, 1, 3, 4), x(2, 1, 3, 4), [1.0, 2.0]), TypeError, "lengths must be integers"),
        (lambda c: c.append(np.full((2, 1, 3, 4), 1e39), x(2, 1, 3, 4)), ValueError, r"keys\[0, 0, 0, 0\] is 1e\+39, beyond float32"),
        (lambda c: c.crop(8), ValueError, r"length\[0\] is 8; it must be from 0 to 7"),
        (lambda c: c.crop(-1), ValueError, r"length\[0\] is -1"),
        (lambda c: c.crop(1.5), TypeError, "length must be integers"),
        (lambda c: c.crop([3, 8]), ValueError, r"length\[1\] is 8"),
        (lambda c: c.crop([3]), ValueError, r"length has shape \[1\]; give 2"),
        (lambda c: c.reorder([0, 2]), ValueError, r"rows\[1\] is 2; it must be from 0 to 1"),
        (lambda c: c.reorder([]), ValueError, "rows is empty"),
        (lambda c: c.reorder([[0, 1]]), ValueError, r"rows has shape"),
        (lambda c: c.fork([-1]), ValueError, r"rows\[0\] is -1"),
        (lambda c: c.fork([True]), TypeError, "rows must be integers"),
        (lambda c: c.stored(2), ValueError, r"row\[0\] is 2"),
        (lambda c: c.attend(x(2, 1, 8, 4)), ValueError, "row 0 has 8 query tokens and 7 in the cache"),
        (lambda c: c.attend(x(2, 1, 1, 5)), ValueError, r"query has shape .* takes \[2, heads, query_tokens, 4\]"),
        (lambda c: c.attend(x(2, 1, 1, 4), query_lengths=[2, 1]), ValueError, r"query_lengths\[0\] is 2"),
        (lambda c: c.attend(np.full((2, 1, 1, 4), np.inf)), ValueError, r"query\[0, 0, 0, 0\] is inf"),
    ],
)  # fmt: skip
def test_refusals(call: Any, error: type[Exception], message: str) -> None:
    """I2, and shapes, dtypes and integers: named, and nothing changes."""
    cache = KVCache(2, 1, 4, Scheme(block_size=4), Scheme(block_size=4))
    cache.append(*normals(2, 2, 1, 7, 4))
    before = bits(cache)
    with pytest.raises(error, match=message):
        call(cache)
    assert bits(cache) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch=0 must be an integer of at least 1"),
        ({"kv_heads": True}, ValueError, "kv_heads=True"),
        ({"head_dim": 4.0}, ValueError, "head_dim=4.0"),
        ({"value_head_dim": 0}, ValueError, "value_head_dim=0"),
        ({"dtype": "float64"}, TypeError, "dtype='float64' is not one of float16, bfloat16"),
        ({"key": Scheme()}, ValueError, "key has block_size=None.*block_size=128"),
        ({"value": "streaming4"}, TypeError, "value must be a Scheme"),
        ({"key": Scheme.named("KIVI-K2V4")}, TypeError, "key is a pair of schemes"),
    ],
)
def test_what_no_cache_can_be(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        KVCache(**{"batch": 1, "kv_heads": 1, "head_dim": 4, **arguments})


@pytest.mark.parametrize("dtype", ["bfloat16", np.dtype(ml_dtypes.bfloat16), ml_dtypes.bfloat16])
def test_dtype_by_any_name(dtype: Any) -> None:
    assert KVCache(1, 1, 4, dtype=dtype).dtype == ml_dtypes.bfloat16


# --- files --------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    cache = KVCache(2, 1, 4, Scheme(block_size=4), Scheme(block_size=8, sink_tokens=1))
    cache.append(*normals(2, 2, 1, 11, 4), lengths=[11, 2])
    cache.save(tmp_path / "cache.safetensors")
    return tmp_path / "cache.safetensors"


def rewritten(path: Path, change: Any) -> None:
    """Change a file and mend its checksum, as only a faulty or malicious writer would."""
    content, arrays = storage.read_container(
        path, storage.CACHE_FORMAT, lambda _: set(storage_names(path))
    )
    change(content["cache"], arrays)
    storage.write_container(path, storage.CACHE_FORMAT, content, arrays)


def storage_names(path: Path) -> list[str]:
    with storage.safe_open(path, framework="np") as file:
        return list(file.keys())


def test_a_file_is_as_documented(saved: Path) -> None:
    """docs/cache.md, with nothing of ours: header, JSON, tensors and checksum."""
    whole = saved.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + size])
    description = json.loads(header.pop("__metadata__")["nsq"])
    digest = description.pop("sha256")
    compact = {"sort_keys": True, "separators": (",", ":")}
    checksum = hashlib.sha256(json.dumps(description, **compact).encode())
    names = {"F32": "float32", "F16": "float16", "U8": "uint8", "I32": "int32"}
    for name, tensor in sorted(header.items()):
        entry = [name, names[tensor["dtype"]], tensor["shape"]]
        checksum.update(json.dumps(entry, **compact).encode())
        begin, end = tensor["data_offsets"]
        checksum.update(whole[8 + size + begin : 8 + size + end])
    assert checksum.hexdigest() == digest
    assert (description["format"], description["spec"]) == ("nsq-cache-1", "NSQ-1")
    assert description["cache"]["lengths"] == [11, 2]
    assert description["cache"]["key"] == Scheme(block_size=4).to_dict()
    assert header.keys() == {
        "keys.0.packed", "keys.0.norm", "keys.0.scale", "keys.0.collapsed", "keys.0.tail",
        "values.0.packed", "values.0.norm", "values.0.scale", "values.0.collapsed",
        "values.0.tail", "values.0.sinks", "keys.1.tail", "values.1.sinks", "values.1.tail",
    }  # fmt: skip


def test_empty_caches_are_saved(tmp_path: Path) -> None:
    KVCache(2, 3, 4, dtype="float16").save(tmp_path / "a")
    loaded = KVCache.load(tmp_path / "a")
    assert (loaded.batch, loaded.kv_heads, len(loaded), loaded.dtype) == (2, 3, 0, np.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, a: c.update(lengths=[11]), r"'keys.1.tail' does not belong there"),
        (lambda c, a: c.update(lengths=[12, 2]), r"keys of row 0: tail is float32 \[1, 3, 4\]|'keys.0.*"),
        (lambda c, a: c.update(lengths=[10, 2]), "row 0: tail is float32"),
        (lambda c, a: c.update(lengths=[11, -2]), "lengths"),
        (lambda c, a: c.update(lengths=[11, 2.0]), "lengths"),
        (lambda c, a: c.update(lengths=[]), "lengths"),
        (lambda c, a: c.update(lengths=[10**30, 2]), "row 0|tensor"),
        (lambda c, a: c.update(kv_heads=2), "keys of row 0: .* stores"),
        (lambda c, a: c.update(kv_heads="1"), "kv_heads='1'"),
        (lambda c, a: c.update(head_dim=5), "keys of row 0"),
        (lambda c, a: c.update(value_head_dim=0), "value_head_dim=0"),
        (lambda c, a: c.update(dtype="float16"), "row 0: tail is float32"),
        (lambda c, a: c.update(dtype=None), "dtype is missing"),
        (lambda c, a: c.update(dtype=["float32"]), "dtype"),
        (lambda c, a: c.update(key=None), "a scheme has the fields"),
        (lambda c, a: c["key"].update(block_size=None), "key has block_size=None"),
        (lambda c, a: c["key"].update(bits=5), "bits=5"),
        (lambda c, a: c.pop("dtype"), "lacks or adds fields"),
        (lambda c, a: c.update(more=1), "lacks or adds fields"),
        (lambda c, a: a["keys.0.tail"].__setitem__((0, 0, 0), np.nan), "tail holds a value that is not finite"),
        (lambda c, a: a["values.0.sinks"].__setitem__((0, 0, 0), np.inf), "sinks holds a value that is not finite"),
        (lambda c, a: a["keys.0.packed"].__setitem__((0, 0, 0), 0), r"keys of row 0: codes\[0, 0, 0\] = -8, which is reserved"),
        (lambda c, a: a["keys.0.scale"].__setitem__((0, 0, 0), np.nan), "scale.* is not finite"),
        (lambda c, a: a["keys.0.norm"].__setitem__((0, 0), -1), "norm.* is negative"),
        (lambda c, a: a["keys.0.collapsed"].__setitem__(0, -1), "collapsed holds counts"),
        (lambda c, a: a["keys.0.collapsed"].__setitem__(0, 5), "collapsed holds counts"),
        (lambda c, a: a.pop("keys.0.norm"), "'keys.0.norm' is missing"),
        (lambda c, a: a.update({"keys.2.tail": a["keys.0.tail"]}), "'keys.2.tail' does not belong there"),
    ],
)  # fmt: skip
def test_files_that_no_cache_writes(saved: Path, change: Any, message: str) -> None:
    rewritten(saved, change)
    with pytest.raises(storage.StorageError, match=message):
        KVCache.load(saved)


def test_damage_anywhere_is_found(saved: Path) -> None:
    whole = saved.read_bytes()
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        saved.write_bytes(damaged)
        with pytest.raises(storage.StorageError):
            KVCache.load(saved)
    saved.write_bytes(whole[:-1])
    with pytest.raises(storage.StorageError):
        KVCache.load(saved)


def test_the_two_kinds_of_file_know_each_other(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(storage.StorageError, match=r"'nsq-cache-1', which nsq_ref.KVCache.load"):
        storage.load(saved)
    storage.save(tmp_path / "q", {"keys": quantize(normals(2, 4))})
    with pytest.raises(storage.StorageError, match=r"which nsq_ref.storage.load reads"):
        KVCache.load(tmp_path / "q")


def test_a_failed_save_leaves_the_old_file(saved: Path) -> None:
    whole = saved.read_bytes()
    cache = KVCache.load(saved)
    with pytest.raises(OSError, match="below"):
        cache.save(saved / "below")
    assert saved.read_bytes() == whole
    assert [*saved.parent.iterdir()] == [saved]

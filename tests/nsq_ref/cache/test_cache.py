"""KVCache, rule by rule at the sizes of use: bytes, memory, attention, refusals."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from nsq_ref import KVCache, RangeError, Scheme, attention, quantize
from tests.support.cache_model import DTYPES, bits, cache_schemes, normals

Array = npt.NDArray[Any]


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
    pages = cache._now.rows[0].keys.pages
    for row in forked._now.rows:
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
        pages = cache._now.rows[0].keys.pages
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
    assert cache._now.rows[0].keys.pages == ()


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


def test_attention_to_what_is_ahead() -> None:
    """Keys and values that are not appended are seen as they are, also where they fill a block."""
    scheme = Scheme(block_size=16)
    cache, lengths, new = KVCache(2, 2, 8, scheme, scheme, value_head_dim=6), [40, 7], 12
    keys, values = normals(2, 2, 40, 8), normals(2, 2, 40, 6, seed=1)
    cache.append(keys, values, lengths)
    ahead = normals(2, 2, new, 8, seed=2), normals(2, 2, new, 6, seed=3)
    query, held = normals(2, 4, 3, 8, seed=4), cache.dequantize()
    output = cache.attend(query, ahead=ahead, softcap=3.0)
    for row, length in enumerate(lengths):
        seen = [
            np.concatenate([side[row : row + 1, :, :length], more[row : row + 1]], 2)
            for side, more in zip(held, ahead, strict=True)
        ]
        exact = attention.attend(query[row : row + 1], *seen, softcap=3.0).output
        assert np.allclose(output[row], exact[0], rtol=0, atol=1e-5)
    assert cache.lengths.tolist() == lengths
    with pytest.raises(ValueError, match=r"^values has shape \[2, 2, 11, 6\]; this cache takes"):
        cache.attend(query, ahead=(ahead[0], ahead[1][:, :, 1:]))


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
        r"^values of row 1, head 0: the norm of token 5, which an earlier append left to be coded, "
        r"is beyond float16.*; crop to 5 goes on without it"
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
        (lambda c: c.append(x(2, 1, 3, 4), x(2, 1, 3, 4), [3, 4]), ValueError, r"lengths\[1\]=4 must be an integer from 0 to 3"),
        (lambda c: c.append(x(2, 1, 3, 4), x(2, 1, 3, 4), [3, -1]), ValueError, r"lengths\[1\]=-1 must be"),
        (lambda c: c.append(x(2, 1, 3, 4), x(2, 1, 3, 4), [3]), ValueError, r"lengths has shape \[1\]; give 2"),
        (lambda c: c.append(x(2, 1, 3, 4), x(2, 1, 3, 4), [1.0, 2.0]), TypeError, r"lengths\[0\]=1.0 is not an integer"),
        (lambda c: c.append(np.full((2, 1, 3, 4), 1e39), x(2, 1, 3, 4)), ValueError, r"keys\[0, 0, 0, 0\] is 1e\+39, beyond float32"),
        (lambda c: c.crop(8), ValueError, r"length=8 must be an integer from 0 to 7"),
        (lambda c: c.crop(-1), ValueError, r"length=-1 must"),
        (lambda c: c.crop(1.5), TypeError, "length=1.5 is not an integer"),
        (lambda c: c.crop([3, 8]), ValueError, r"length\[1\]=8 must"),
        (lambda c: c.crop([3]), ValueError, r"length has shape \[1\]; give 2"),
        (lambda c: c.reorder([0, 2]), ValueError, r"rows\[1\]=2 must be an integer from 0 to 1"),
        (lambda c: c.reorder([]), ValueError, "rows is empty"),
        (lambda c: c.reorder([[0, 1]]), TypeError, r"rows\[0\]=\[0, 1\] is not an integer"),
        (lambda c: c.reorder(np.zeros((2, 2), int)), ValueError, r"rows has shape \[2, 2\]"),
        (lambda c: c.reorder(1), TypeError, r"rows=1 is one integer; give a list, such as \[1\]"),
        (lambda c: c.fork([-1]), ValueError, r"rows\[0\]=-1 must"),
        (lambda c: c.fork([True]), TypeError, r"rows\[0\]=True is not an integer"),
        (lambda c: c.stored(2), ValueError, r"row=2 must be an integer from 0 to 1"),
        (lambda c: c.stored([0]), TypeError, r"row=\[0\] is not an integer"),
        (lambda c: c.attend(x(2, 1, 8, 4)), ValueError, "row 0 has 8 query tokens and 7 in the cache"),
        (lambda c: c.attend(x(2, 1, 1, 5)), ValueError, r"query has shape .* takes \[2, heads, query_tokens, 4\]"),
        (lambda c: c.attend(x(2, 1, 1, 4), query_lengths=[2, 1]), ValueError, r"query_lengths\[0\]=2 must be an integer from 0 to 1"),
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
        ({"kv_heads": True}, TypeError, "kv_heads=True is not an integer"),
        ({"head_dim": 4.0}, TypeError, "head_dim=4.0 is not an integer"),
        ({"head_dim": np.array([4])}, TypeError, "head_dim=int64 .* give one of them"),
        ({"value_head_dim": 0}, ValueError, "value_head_dim=0"),
        ({"dtype": "float64"}, TypeError, "dtype='float64' is not one of float16, bfloat16"),
        (
            {"key": Scheme()},
            ValueError,
            "key has block_size=None.*give KVCache a block_size, such as 128",
        ),
        ({"key": "nsep+pchan4"}, ValueError, "key has block_size=None"),
        (
            {"key": "streaming4", "block_size": 64},
            ValueError,
            "block_size=64, but key has 128; leave block_size out",
        ),
        (
            {"key": "nsep+pchan4", "value": "streaming3", "block_size": 64},
            ValueError,
            "block_size=64, but value has 128",
        ),
        ({"key": "KIVI-K2V4"}, ValueError, "key has block_size=None"),
        (
            {"key": "KIVI-K2V4", "value": "streaming4", "block_size": 8},
            TypeError,
            "key is a pair of schemes, for keys and values; leave value out",
        ),
        ({"value": "KIVI-K2V4", "block_size": 8}, ValueError, "value='KIVI-K2V4' names a pair"),
        ({"value": Scheme.named("KIVI-K2V4"), "block_size": 8}, TypeError, "value is a pair"),
        ({"block_size": 0}, ValueError, "block_size=0 must be an integer of at least 1"),
        ({"block_size": 8.0}, TypeError, "block_size=8.0 is not an integer"),
        ({"key": "no such"}, ValueError, "unknown scheme name 'no such'"),
        ({"value": 4}, TypeError, "value must be a Scheme or a name"),
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

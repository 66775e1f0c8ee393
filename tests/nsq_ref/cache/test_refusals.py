"""What a KVCache refuses, by name and place, and what it takes in any form."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from nsq_ref import KVCache, RangeError, Scheme
from tests.support.cache_model import bits, everything, normals
from tests.support.tensors import Tensor

Array = npt.NDArray[Any]

# --- where it is --------------------------------------------------------------------------------

PLAIN = Scheme(separate_norm=False, block_size=4)
# What cannot be held, how large the value must be for it, and what the message calls it.
BEYOND = [
    (Scheme(block_size=4), 1e6, "the norm of token {token}"),
    (Scheme(block_size=4, magnitude="gain"), 1e6, "the gain of token {token}"),
    (PLAIN, 1e9, "the scale of channel {channel} of tokens {first} to {last}"),
    (replace(PLAIN, symmetric=False), 1e9, "the scale of channel {channel} of tokens {first} to {last}"),
    (replace(PLAIN, axis="token"), 1e9, "the scale of token {token}"),
    (replace(PLAIN, axis="token", outlier_channels=1), 1e6, "an outlier of token {token}"),
]  # fmt: skip


@given(
    beyond=st.sampled_from(BEYOND),
    sinks=st.integers(0, 3),
    side=st.sampled_from(["keys", "values"]),
    row=st.integers(0, 2),
    head=st.integers(0, 1),
    channel=st.integers(0, 4),
    lengths=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    data=st.data(),
)
@settings(deadline=None)
def test_the_token_that_cannot_be_coded_is_named(
    beyond: tuple[Scheme, float, str],
    sinks: int,
    side: str,
    row: int,
    head: int,
    channel: int,
    lengths: list[int],
    steps: list[int],
    data: st.DataObject,
) -> None:
    """M4 S5 O1. By its position in the sequence, and in the append if it came with this one."""
    scheme, value, expected = beyond
    cache = KVCache(
        3, 2, 5, replace(scheme, sink_tokens=sinks), value=replace(scheme, sink_tokens=sinks)
    )
    cache.append(*normals(2, 3, 2, 9, 5), lengths)
    tokens = sum(steps)
    x = normals(2, 3, 2, tokens, 5, seed=1)
    at = data.draw(st.integers(0, tokens - 1))
    x[int(side == "values"), row, head, at, channel] = value
    position = lengths[row] + at
    first = sinks + (position - sinks) // 4 * 4
    names = {"token": position, "channel": channel, "first": first, "last": first + 3}
    start = 0
    for step in steps:
        before, known = everything(cache), lengths[row] + start
        try:
            cache.append(*x[:, :, :, start : start + step])
        except RangeError as error:
            message = str(error)
        else:
            start += step
            continue
        assert everything(cache) == before
        assert message.startswith(f"{side} of row {row}, head {head}: {expected.format(**names)}, ")
        assert known + step >= first + 4, "its block is full now"
        assert position >= sinks, "sinks are never refused"
        last = position if "of tokens" not in expected else first + 3
        if last < known:
            assert "which an earlier append left to be coded, is beyond float16" in message
            assert message.endswith(f"; crop to {position} goes on without it")
            cache.crop([position if r == row else n for r, n in enumerate(cache.lengths)])
            cache.append(*normals(2, 3, 2, 9, 5, seed=2))
        else:
            named = re.search(rf"{side}\[{row}, {head}, (\d+)\], is beyond float16[;,] ", message)
            assert named is not None
            assert int(named[1]) == last - known
            assert message.endswith(". Nothing was appended")
        return
    assert position < sinks or lengths[row] + tokens < first + 4


def test_a_value_that_would_decode_to_infinity_is_named() -> None:
    """D3, behind sinks."""
    scheme = replace(PLAIN, bits=3, scale_dtype="bfloat16", sink_tokens=2)
    cache = KVCache(1, 1, 2, scheme, scheme)
    x = normals(1, 1, 8, 2)
    y = x.copy()
    y[0, 0, 5, 1] = 3.4e38
    message = (
        r"^values of row 0, head 0: channel 1 of token 5, values\[0, 0, 5\], would decode to a value "
        r"beyond float32; scale the input down. Nothing was appended$"
    )
    with pytest.raises(RangeError, match=message):
        cache.append(x, y)
    assert len(cache) == 0


# --- no trace -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [np.float16, ml_dtypes.bfloat16])
def test_a_refused_append_does_not_choose_the_dtype(first: Any) -> None:
    """Keys are taken, values refused, and what comes next in float32 is stored in float32."""
    cache = KVCache(1, 1, 2, Scheme(block_size=8), Scheme(block_size=1, magnitude="gain"))
    keys = np.ones((1, 1, 2, 2), first)
    values = np.full((1, 1, 2, 2), 65504, first)
    with pytest.raises(RangeError):
        cache.append(keys, values)
    assert cache.dtype is None
    keys = np.float32([[[[1e6, 1 + 2.0**-20], [1, 1]]]])
    cache.append(keys, np.ones((1, 1, 2, 2), np.float32))
    assert cache.stored().keys.tail.tobytes() == keys.tobytes()


def test_a_file_that_is_no_cache_of_use_takes_no_memory(tmp_path: Any) -> None:
    """Many rows without tokens, of heads that no memory holds: a short file, a small cache."""
    KVCache(5_000, 2**20, 2**20).save(tmp_path / "wide")
    loaded = KVCache.load(tmp_path / "wide")
    assert loaded.batch == 5_000
    assert len(loaded) == loaded.nbytes == 0
    assert loaded._now.rows[0] is loaded._now.rows[-1]


# --- in any form --------------------------------------------------------------------------------

INTEGERS = [
    int, np.int8, np.uint64, np.array, lambda n: Tensor(np.array(n, np.int32)),
]  # fmt: skip
LISTS = [
    list, tuple, np.array, lambda n: np.array(n, np.uint8), lambda n: Tensor(np.array(n)),
    lambda n: [np.int32(x) for x in n], lambda n: [Tensor(np.array(x)) for x in n],
]  # fmt: skip


@pytest.mark.parametrize("form", INTEGERS)
def test_one_integer_in_any_form(form: Any) -> None:
    """Sizes, a length and a row: Python's, NumPy's, 0-d arrays and tensors."""
    cache = KVCache(form(2), form(1), form(4), block_size=form(8), value_head_dim=form(3))
    assert (cache.batch, cache.kv_heads, cache.head_dim, cache.value_head_dim) == (2, 1, 4, 3)
    cache.append(normals(2, 1, 11, 4), normals(2, 1, 11, 3))
    cache.crop(form(9))
    assert cache.lengths.tolist() == [9, 9]
    assert cache.stored(form(1)).keys.tail.shape == (1, 0, 4)
    assert all(type(size) is int for size in (cache.batch, cache.kv_heads, cache.key.block_size))


@pytest.mark.parametrize("form", LISTS)
def test_several_integers_in_any_form(form: Any) -> None:
    cache = KVCache(2, 1, 4)
    x = normals(2, 1, 11, 4)
    cache.append(Tensor(x), x, lengths=form([11, 5]))
    assert cache.lengths.tolist() == [11, 5]
    cache.crop(form([10, 4]))
    assert cache.fork(form([1, 0, 1])).lengths.tolist() == [4, 10, 4]
    cache.reorder(form([1, 0]))
    assert cache.lengths.tolist() == [4, 10]
    query = normals(2, 1, 3, 4)
    one, two = (cache.attend(q, query_lengths=form([2, 3])) for q in (query, Tensor(query)))
    assert one.tobytes() == two.tobytes()


def test_schemes_by_name() -> None:
    """A name, a scheme, a pair or its name; `block_size` for those without, and for the default."""
    paper = KVCache(1, 1, 4, "nsep+pchan4", "nsep+pchan4", block_size=64)
    assert paper.key == paper.value == Scheme(block_size=64)
    assert KVCache(1, 1, 4, "streaming3", block_size=128).key == Scheme.named("streaming3")
    mixed = KVCache(1, 1, 4, "nsep+pchan4", block_size=32)
    assert mixed.value == replace(Scheme.named("streaming4"), block_size=32)
    for pair in ("nsep+KIVI", Scheme.named("nsep+KIVI")):
        cache = KVCache(1, 1, 4, pair, block_size=16)  # type: ignore[arg-type]
        assert (cache.key, cache.value) == (
            replace(Scheme.named("nsep+pchan2"), block_size=16),
            replace(Scheme.named("nsep+pchan4"), block_size=16),
        )
    x = normals(1, 1, 200, 4)
    paper.append(x, x)
    same = KVCache(1, 1, 4, Scheme(block_size=64), Scheme(block_size=64))
    same.append(x, x)
    assert bits(paper) == bits(same)

"""The rank-one form: within rule A3's tolerance of the reference, whoever does the work."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import hypothesis.strategies as st
import ml_dtypes
import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings

from nsq_ref import RangeError, Scheme, attention, dequantize, quantize
from nsq_ref.attention import stored
from nsq_ref.codec import block_of
from nsq_ref.strategies import schemes, tensors
from tests.nsq_ref.attention.options import masks, options, seeds

Array = npt.NDArray[Any]

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


class Tokens(NamedTuple):
    """Some tokens: as they are stored, as they decode, and how large their terms are (A3)."""

    source: Any
    decoded: Array
    reach: Array


def unquantized(x: Array, dtype: Any) -> Tokens:
    source = np.clip(x, -6e4, 6e4).astype(dtype) if dtype == np.float16 else x.astype(dtype)
    decoded = source.astype(np.float32)
    return Tokens(source, decoded, np.abs(decoded))


def coded(x: Array, scheme: Scheme) -> Tokens:
    quantized = quantize(x, scheme)
    decoded = dequantize(quantized)
    return Tokens(block_of(quantized), decoded, attention.reach(quantized))


def strided(array: Array) -> Array:
    """The same values in a larger array, so that heads do not follow each other."""
    larger = np.full((array.shape[0] + 1, array.shape[1] + 3, *array.shape[2:]), 1, array.dtype)
    larger[:-1, 2:-1] = array
    return larger[:-1, 2:-1]


def pieces_of(
    x: Array, scheme: Scheme, rng: np.random.Generator, dtype: Any, cut: int
) -> list[Tokens]:
    """Cut ``x[kv_heads, T, D]`` into pieces: up to ``cut`` blocks, or some unquantized tokens."""
    pieces, start, size = [], 0, scheme.block_size or 5
    while start < x.shape[1]:
        left = x.shape[1] - start
        if rng.random() < 0.3 or left < size:
            count = int(rng.integers(1, min(left, 4) + 1))
            pieces.append(unquantized(x[:, start : start + count], dtype))
        else:
            count = size * int(rng.integers(1, min(left // size, cut) + 1))
            try:
                pieces.append(coded(x[:, start : start + count], scheme))
            except RangeError:
                assume(False)
        start += count
    return pieces


def check(
    query: Array,
    keys: list[Tokens],
    values: list[Tokens],
    key_scheme: Scheme,
    value_scheme: Scheme,
    **given: Any,
) -> tuple[float, float]:
    """Hold the kernels to the tolerance; return how much of it output and weights use."""
    value_dim = values[0].decoded.shape[2]
    output, weights = attention.attend_quantized(
        query, [piece.source for piece in keys], [piece.source for piece in values], key_scheme,
        value_scheme, value_head_dim=value_dim, weights=True, **given,
    )  # fmt: skip
    assert weights is not None
    k, v, k_reach, v_reach = (
        np.concatenate([getattr(piece, name) for piece in side], axis=1)[None]
        for name in ("decoded", "reach")
        for side in (keys, values)
    )
    exact = attention.attend(query[None], k, v, **given)
    bound = attention.tolerance(query[None], k, v, k_reach, v_reach, **given)
    assert output.dtype == weights.dtype == np.float32
    assert output.shape == exact.output.shape[1:]
    assert weights.shape == exact.weights.shape[1:]
    assert np.isfinite(output).all()
    assert np.isfinite(weights).all()
    used = []
    for got, right, most in zip((output, weights), exact, bound, strict=True):
        error = np.abs(got - right[0])
        assert (error <= most[0]).all(), float(np.max(error - most[0]))
        some = most[0] > 0
        used.append(float(np.max(error[some] / most[0][some], initial=0)))
    return used[0], used[1]


blocks = st.sampled_from([None, 1, 2, 3, 5, 8, 16])
head_dims = st.one_of(
    st.sampled_from([1, 2, 3, 63, 64, 65, 127, 128, 129, 200, 256]), st.integers(1, 256)
)


@settings(max_examples=300)
@given(
    key_scheme=blocks.flatmap(lambda size: schemes(block_size=size, sink_tokens=0)),
    value_scheme=blocks.flatmap(lambda size: schemes(block_size=size, sink_tokens=0)),
    channels=st.tuples(head_dims, head_dims),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(5, 60)),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0, 0, 1, 3]),
    options=options,
    mask=masks,
    seed=seeds,
)
def test_rank_one_form(
    key_scheme: Scheme,
    value_scheme: Scheme,
    channels: tuple[int, int],
    shape: tuple[int, int, int, int],
    dtype: Any,
    spread: int,
    options: dict[str, Any],
    mask: dict[str, Any],
    seed: int,
) -> None:
    """A1, A2, A3: any schemes, keys and values cut differently, any number of query rows."""
    rng = np.random.default_rng(seed)
    kv_heads, group, query_tokens, tokens = shape
    query = rng.standard_normal((kv_heads * group, query_tokens, channels[0])).astype(np.float32)
    sides = []
    for scheme, head_dim in zip((key_scheme, value_scheme), channels, strict=True):
        x = rng.standard_normal((kv_heads, tokens, head_dim)) + rng.choice([0, 2])
        x *= 10.0 ** rng.uniform(-spread, min(spread, 1), (kv_heads, tokens, 1))
        x *= rng.random((kv_heads, tokens, 1)) > 0.05
        sides.append(pieces_of(x.astype(np.float32), scheme, rng, dtype, cut=4))
    check(query, *sides, key_scheme, value_scheme, **options, **mask)


@settings(max_examples=300)
@given(
    x=tensors(max_tokens=12, max_head_dim=20),
    scheme=blocks.flatmap(lambda size: schemes(block_size=size, sink_tokens=0)),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
    softcap=st.sampled_from([None, 5.0]),
    rows=st.integers(1, 5),
    seed=seeds,
)
def test_wild_magnitudes(
    x: Array, scheme: Scheme, magnitude: float, softcap: float | None, rows: int, seed: int
) -> None:
    """A3: norms from 1e-30 to 1e30, zero tokens, ties of scores: finite and within its bounds."""
    rng = np.random.default_rng(seed)
    query = (rng.standard_normal((x.shape[0] * rows, 1, x.shape[2])) * magnitude).astype(np.float32)
    sides = [pieces_of(x, scheme, rng, np.float32, cut=2) for _ in range(2)]
    scores = np.abs(query.astype(np.float64)).max() * np.abs(x.astype(np.float64)).sum(-1).max()
    # A3 holds for what float32 holds: for scores see the next test; sums of subnormals lose bits.
    largest = np.abs(x).max(axis=-2)
    assume(scores < 1e37 and ((largest == 0) | (largest > 2.0**-120)).all())
    check(query, *sides, scheme, scheme, softcap=softcap)


@pytest.mark.parametrize("plain", [False, True])
def test_scores_beyond_float32(plain: bool) -> None:
    """A1: where one token's score is far above the others, it takes all, beyond float32 as well."""
    x = np.ones((1, 4, 3), np.float32)
    x[0, 2] = 1e30
    x[0, 3] = -1e30
    scheme = Scheme(norm_dtype="float32", block_size=4)
    tokens = unquantized(x, np.float32) if plain else coded(x, scheme)
    query = np.full((1, 1, 3), 1e20, np.float32)
    output, weights = attention.attend_quantized(
        query, [tokens.source], [tokens.source], scheme, scheme, weights=True
    )
    assert weights is not None
    assert weights.ravel().tolist() == [0, 0, 1, 0]
    np.testing.assert_allclose(output[0, 0], tokens.decoded[0, 2], rtol=1e-6)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(separate_norm=False, scale_dtype="float32", symmetric=False, block_size=4),
        Scheme(magnitude="gain", norm_dtype="float32", symmetric=False, block_size=4),
        Scheme(axis="token", norm_dtype="float32", outlier_channels=1, block_size=4),
    ],
    ids=str,
)
def test_values_at_the_end_of_float32(scheme: Scheme) -> None:
    """A3: sums of codes that leave the range of float32 are formed again where they fit."""
    x = np.float32([[[1.6e38, -1.6e38], [1e38, -1.4e38], [1.8e38, -1e38], [-1.4e38, 1.5e38]]])
    for tokens in (coded(x, scheme), unquantized(x, np.float32)):
        output, _ = attention.attend_quantized(
            np.zeros((1, 1, 2), np.float32), [tokens.source], [tokens.source], scheme, scheme
        )
        right = tokens.decoded[0].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(output[0, 0], right, rtol=1e-5)


def test_directions_that_cancel() -> None:
    """D1, A3: rounded as D1 says, this direction is 0, and so is the token; fused, it is not."""
    scheme = Scheme(bits=2, symmetric=False, scale_dtype="float32", block_size=2)
    block = coded(np.float32([[[1, 1], [1, 2]]]), scheme).source
    scale = np.float32(1 / 3)
    parts = {
        "codes": np.full((1, 2, 1), 0b1111, np.uint8),  # 3 and 3
        "scale": np.full((1, 1, 2), scale),
        "zero": np.full((1, 1, 2), -(np.float32(3) * scale)),
    }
    block = block._replace(**parts)
    fused = 3 * float(scale) + float(parts["zero"][0, 0, 0])
    assert fused != 0
    tail = np.ones((1, 1, 2), np.float32)
    output, weights = attention.attend_quantized(
        np.full((1, 1, 2), 8, np.float32), [block, tail], [block, tail], scheme, scheme,
        weights=True,
    )  # fmt: skip
    exact = attention.attend(
        np.full((1, 1, 1, 2), 8.0), *[np.float64([[[[0, 0], [0, 0], [1, 1]]]])] * 2
    )
    assert weights is not None
    np.testing.assert_allclose(weights, exact.weights[0], rtol=1e-5)
    np.testing.assert_allclose(output, exact.output[0], rtol=1e-5)


def prefix(name: str, **more: Any) -> Scheme:
    return Scheme(**{**Scheme.named(name).to_dict(), "sink_tokens": 0, **more})


FAMILY = [
    prefix("nsep+pchan4", block_size=128),
    prefix("streaming4"),
    prefix("streaming3"),
    prefix("streaming2"),
    prefix("streaming8"),
    prefix("nsep4", block_size=64),
    prefix("nsep+out4", block_size=32),
    prefix("naive3", block_size=128),
]


@pytest.mark.parametrize("scheme", FAMILY, ids=str)
def test_long_sequences(scheme: Scheme) -> None:
    """A3: what a model has: much of the tolerance is left, but it is not a wide one."""
    rng = np.random.default_rng(0)
    sides = []
    for _ in range(2):
        x = rng.standard_normal((2, 1500, 128)).astype(np.float32)
        at = [0, 1, 513, 1409]
        cuts = [x[:, a:b] for a, b in pairwise([*at, 1500])]
        sides.append(
            [
                coded(cut, scheme) if i in (1, 2) else unquantized(cut, np.float16)
                for i, cut in enumerate(cuts)
            ]
        )
    query = rng.standard_normal((2, 1, 128)).astype(np.float32)
    used = check(query, *sides, scheme, scheme)
    assert max(used) < 0.1
    k, v, k_reach, v_reach = (
        np.concatenate([getattr(piece, name) for piece in side], axis=1)[None]
        for name in ("decoded", "reach")
        for side in sides
    )
    bound = attention.tolerance(query[None], k, v, k_reach, v_reach)
    exact = attention.attend(query[None], k, v)
    assert np.median(bound.weights / exact.weights) < 0.05
    assert np.median(bound.output) < 0.05 * np.median(np.abs(exact.output)) * math.sqrt(1500) / 2


@pytest.mark.parametrize("scheme", FAMILY[:2] + FAMILY[5:7], ids=str)
def test_threads_and_strides_do_not_matter(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits are equal, whoever does the work and however the arrays lie in memory."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, 9000, 64)).astype(np.float32)
    tails = x[:, :, -40:]
    cuts = [[0, 640, 1280, 4480, 8960], [0, 8960]]
    sides = [
        [coded(x[i][:, a:b], scheme).source for a, b in pairwise(at)] for i, at in enumerate(cuts)
    ]
    query = rng.standard_normal((6, 2, 64)).astype(np.float32)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", threads)
        for change in (lambda part: part, strided):
            pieces = [
                [
                    *(block._replace(**{n: change(p) for n, p in parts(block)}) for block in side),
                    change(tail),
                ]
                for side, tail in zip(sides, tails, strict=True)
            ]
            given = query if change is not strided else strided(query)
            results.append(attention.attend_quantized(given, *pieces, scheme, scheme, weights=True))
    for output, weights in results[1:]:
        assert output.tobytes() == results[0][0].tobytes()
        assert weights is not None
        assert results[0][1] is not None
        assert weights.tobytes() == results[0][1].tobytes()


def parts(block: Any) -> list[tuple[str, Array]]:
    return [(name, part) for name, part in block._asdict().items() if name != "collapsed"]


def test_chunks_of_queries_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A2: a long prefill is cut into chunks of queries, of which each sees what it must."""
    rng = np.random.default_rng(2)
    scheme = FAMILY[1]
    x = rng.standard_normal((2, 300, 16)).astype(np.float32)
    tokens = [coded(x[:, :256], scheme), unquantized(x[:, 256:], np.float32)]
    query = rng.standard_normal((4, 70, 16)).astype(np.float32)
    for mask in ({}, {"sliding_window": 9}, {"causal": False}):
        check(query, tokens, tokens, scheme, scheme, **mask)
        whole = attention.attend_quantized(
            query, *[[piece.source for piece in tokens]] * 2, scheme, scheme, weights=True, **mask
        )
        monkeypatch.setattr(stored, "SCORE_BYTES", 4 * 4 * 300 * 8)
        check(query, tokens, tokens, scheme, scheme, **mask)
        cut = attention.attend_quantized(
            query, *[[piece.source for piece in tokens]] * 2, scheme, scheme, weights=True, **mask
        )
        monkeypatch.undo()
        np.testing.assert_allclose(whole[0], cut[0], rtol=0, atol=1e-6)


def test_prepared_pieces_see_what_is_written_later() -> None:
    scheme = FAMILY[0]
    rng = np.random.default_rng(3)
    first, second = (coded(rng.standard_normal((1, 128, 8)), scheme).source for _ in range(2))
    query = np.ones((1, 1, 8), np.float32)
    prepared = attention.prepare(first, scheme, 8)
    assert attention.prepare(prepared, scheme, 8) is prepared
    for name, part in parts(second):
        if part.flags.writeable:  # not what the scheme implies
            getattr(first, name)[...] = part
    later, _ = attention.attend_quantized(query, [prepared], [prepared], scheme, scheme)
    right, _ = attention.attend_quantized(query, [second], [second], scheme, scheme)
    assert later.tobytes() == right.tobytes()


def mended(**change: Any) -> Callable[[Any], Any]:
    return lambda block: block._replace(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mended(codes=np.zeros((2, 16, 3), np.uint8)), "codes of a piece is uint8"),
        (mended(codes=np.zeros((2, 16, 4), np.int8)), "codes of a piece is int8"),
        (mended(norm=np.zeros((2, 15), np.float16)), "norm of a piece is float16"),
        (mended(norm=np.zeros((2, 16), np.float32)), "norm of a piece is float32"),
        (mended(scale=np.zeros((2, 2, 7), np.float16)), "scale of a piece is float16"),
        (mended(zero=np.zeros((2, 1, 8), np.float16)), "zero of a piece is float16"),
        (mended(outliers=np.zeros((2, 16, 2), np.float16)), "outliers of a piece is float16"),
        (mended(outlier_index=np.full((2, 2, 1), 8, np.int32)), "names a channel that is none"),
        (mended(outlier_index=np.full((2, 2, 1), -1, np.int32)), "names a channel that is none"),
    ],
)
def test_damaged_blocks_are_refused(change: Callable[[Any], Any], message: str) -> None:
    scheme = Scheme(block_size=8, symmetric=False, outlier_channels=1)
    block = coded(np.random.default_rng(0).standard_normal((2, 16, 8)), scheme).source
    assert attention.prepare(block, scheme, 8).tokens == 16
    with pytest.raises(ValueError, match=message):
        attention.prepare(change(block), scheme, 8)


TOKEN = np.ones((2, 3, 8), np.float32)
QUERY = np.ones((4, 2, 8), np.float32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"query": np.ones((3, 2, 8))}, "query has 3 heads, keys and values have 2"),
        ({"query": np.ones((4, 4, 8))}, "query has 4 tokens, but keys have 3"),
        ({"query": np.ones((2, 8))}, "query has 2 axes"),
        ({"query": np.full((4, 2, 8), np.nan)}, r"query\[0, 0, 0\] is not finite"),
        ({"query": np.full((4, 2, 8), 1e39)}, "in float32"),
        ({"query": np.full((4, 2, 8), 1e30), "scale": 1e30}, r"query \* scale"),
        ({"keys": []}, "keys have 0 tokens"),
        ({"keys": [TOKEN[:, :2]]}, "keys have 2 tokens and values 3"),
        ({"keys": [TOKEN[:1]]}, r"values\[0\] has 2 heads of 8 channels; 1 of 8"),
        ({"values": [TOKEN[..., :5]]}, r"\[kv_heads, n, 8\]"),
        ({"values": [TOKEN[..., :5]], "value_head_dim": 4}, r"\[kv_heads, n, 4\]"),
        ({"keys": [TOKEN.astype(float)]}, "a piece is float64"),
        ({"keys": [TOKEN[0]]}, "a piece has 2 axes"),
        ({"keys": ["x"]}, "a piece has dtype <U1"),
        ({"sliding_window": 2, "causal": False}, "use one of the two"),
        ({"softcap": 0}, "softcap=0"),
    ],
)
def test_rank_one_form_refuses(given: dict[str, Any], message: str) -> None:
    whole = {"query": QUERY, "keys": [TOKEN], "values": [TOKEN], **given}
    arrays = [whole.pop(name) for name in ("query", "keys", "values")]
    with pytest.raises((TypeError, ValueError), match=message):
        attention.attend_quantized(*arrays, Scheme(), Scheme(), **whole)

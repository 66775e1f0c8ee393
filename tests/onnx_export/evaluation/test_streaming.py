"""A cache that grows: against `KVCache` for our schemes, against their definition for others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nsq_ref as nsq
from nsq_ref.rivals import entry
from onnx_export.evaluation.methods import Method
from onnx_export.evaluation.streaming import StreamedCache

# Values of float16, so that a cache of that dtype holds the same.
X = np.random.default_rng(0).standard_normal((2, 1, 2, 400, 64)).astype(np.float16)
X32 = X.astype(np.float32)


def streamed(
    name: str, pieces: list[int], block: int = 128
) -> tuple[StreamedCache, np.ndarray, np.ndarray]:
    """Append pieces of X as keys, of -X as values; return what is read then."""
    cache = StreamedCache(Method.of(name).bound(2), (X.shape, X.shape), block)
    for piece in pieces:
        new = X32[..., cache.length : cache.length + piece, :]
        cache.append(new, -new)
    return cache, *cache.past


@given(
    st.sampled_from(["streaming4", "streaming3", "streaming2", "streaming4/streaming3"]),
    st.lists(st.integers(1, 130), min_size=1, max_size=6),
)
def test_it_is_the_cache_that_is_deployed(name: str, pieces: list[int]) -> None:
    pieces = pieces[: max(1, int(np.searchsorted(np.cumsum(pieces), 400)))]
    cache, keys, values = streamed(name, pieces)
    first, _, second = name.partition("/")
    for layer in range(2):
        deployed = nsq.KVCache(batch=1, kv_heads=2, head_dim=64, key=first, value=second or first)
        new = X[layer, :, :, : cache.length]
        deployed.append(new, -new)
        expected = deployed.dequantize()
        assert keys[layer].tobytes() == expected[0].tobytes()
        assert values[layer].tobytes() == expected[1].tobytes()
    assert cache.sizes().to_dict()["bits_per_element"] == deployed.bits_per_element


@pytest.mark.parametrize("name", ["streaming2", "nsep+pchan4"])
def test_keys_have_the_feedback_of_their_layer(name: str) -> None:
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((2, 2, 90, 64)) @ rng.standard_normal((64, 64))
    feedback = [nsq.Feedback.from_queries(one, kv_heads=2) for one in queries]
    method = Method.of(name).with_feedback({str(i): one for i, one in enumerate(feedback)})
    cache = StreamedCache(method.bound(2), (X.shape, X.shape), 128)
    for piece in (200, 1, 120):
        new = X32[..., cache.length : cache.length + piece, :]
        cache.append(new, -new)
    for layer, one in enumerate(feedback):
        deployed = nsq.KVCache(
            batch=1, kv_heads=2, head_dim=64, key=name, value=name, block_size=128, key_feedback=one
        )
        deployed.append(X32[layer, :, :, :321], -X32[layer, :, :, :321])
        for read, expected in zip(cache.past, deployed.dequantize(), strict=True):
            assert read[layer].tobytes() == expected.tobytes()


def test_schemes_without_blocks_get_blocks() -> None:
    _, keys, _ = streamed("nsep+pchan4", [100] * 4, block=150)
    scheme = nsq.Scheme()
    for start in (0, 150):
        block = nsq.dequantize(nsq.quantize(X32[..., start : start + 150, :], scheme))
        np.testing.assert_array_equal(keys[..., start : start + 150, :], block)
    np.testing.assert_array_equal(keys[..., 300:, :], X32[..., 300:, :])


def test_windows_of_others_are_their_own() -> None:
    """KIVI, token by token: keys by runs of 128, of values all but the last 128."""
    cache, keys, values = streamed("kivi2", [1] * 300)
    assert (keys[..., 256:, :] == X32[..., 256:300, :]).all()
    assert (values[..., 172:, :] == -X32[..., 172:300, :]).all()
    kivi = entry("kivi2")
    once = kivi.key(X32[..., :300, :])
    np.testing.assert_array_equal(keys[..., :256, :], once.x_hat[..., :256, :])
    np.testing.assert_array_equal(
        values[..., :172, :], kivi.value(-X32[..., :300, :]).x_hat[..., :172, :]
    )
    other = kivi.value(X32[..., :300, :])
    assert cache.sizes().sealed_bits == once.sealed_bits + other.sealed_bits
    assert cache.sizes().kept_elements == once.kept_elements + other.kept_elements


def test_static_scales_are_counted_once() -> None:
    method = Method.of("onnxruntime-int4").bound(2, (X32, X32))
    cache = StreamedCache(method, (X.shape, X.shape), 100)
    for _ in range(4):
        new = X32[..., cache.length : cache.length + 100, :]
        cache.append(new, new)
    keys = entry("onnxruntime-int4").calibrated(X32, X32).key(X32)
    np.testing.assert_array_equal(cache.past[0], keys.x_hat)
    assert cache.sizes().sealed_bits == 2 * keys.sealed_bits


@pytest.mark.parametrize(
    ("name", "block", "pieces"),
    [
        ("streaming4", 128, [129, 128, 128, 15]),
        ("naive4", 128, [128, 128, 128, 16]),
        ("naive4", 150, [150, 150, 100]),
        ("kivi4", 128, [128, 128, 128, 16]),
        ("kivi4", 100, [100, 28, 100, 28, 100, 28, 16]),
        ("kvarn-k4v4", 128, [256, 128, 16]),
        ("nsnquant2", 128, [64] * 6 + [16]),
        ("float16", 64, [64] * 6 + [16]),
        ("naive4", 1, [1] * 400),
    ],
)
def test_pieces_end_where_a_block_is_full(name: str, block: int, pieces: list[int]) -> None:
    cache = StreamedCache(Method.of(name).bound(2), (X.shape, X.shape), block)
    found = []
    while cache.length < 400:
        found.append(cache.piece(400 - cache.length))
        new = X32[..., cache.length : cache.length + found[-1], :]
        cache.append(new, new)
    assert found == pieces


def test_a_past_in_float16_is_rounded() -> None:
    cache = StreamedCache(Method.of("float16/float32").bound(2), (X.shape, X.shape), 128)
    new = X32[..., :9, :] + np.float32(1e-4)
    cache.append(new, new)
    np.testing.assert_array_equal(cache.past[0], new.astype(np.float16))
    np.testing.assert_array_equal(cache.past[1], new)

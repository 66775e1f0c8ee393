"""Balanced norms (N3): when they are chosen, and that everybody makes the same of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from nsq_ref import Feedback, KVCache, Quantized, Scheme, oracle, quantize, rounding, spec
from nsq_ref.strategies import schemes
from tests.nsq_ref.test_backends import BACKENDS, require_equal_bits
from tests.support.bounds_truth import quantized_or_none, uneven
from tests.support.cache_model import bits, normals

Float32 = npt.NDArray[np.float32]
BALANCED = Scheme(magnitude="gain", norm_rule="balanced")
FLOAT32 = replace(BALANCED, scale_dtype="float32", norm_dtype="float32")
WAYS: dict[str, Scheme] = {
    "gain": BALANCED,
    "lsq": replace(BALANCED, magnitude="lsq", bits=3, symmetric=False),
    "search": replace(FLOAT32, bits=2, scale_rule="search", symmetric=False),
    "outliers": replace(BALANCED, outlier_channels=2, norm_dtype="bfloat16"),
}


def outlier(*shape: int, seed: int = 0) -> Float32:
    """Keys with two channels of 30 times the others."""
    x = normals(*shape, seed=seed)
    x[..., [1, -2]] *= 30
    return x


def offset(*shape: int, seed: int = 0) -> Float32:
    """Keys whose channels of one size hardly move from where they are, but for one."""
    x = normals(*shape, seed=seed)
    x[..., 1:] = 30 + x[..., 1:] / 10
    return x


def huge() -> Float32:
    """Keys of which one token has all the largest elements, next to the end of float32."""
    x = normals(9, 6)
    x[0] = 4
    x[:, 1] *= 30
    return np.float32(1.3 * 2.0**120) * x


def is_balanced(x: Float32, scheme: Scheme) -> bool:
    """Whether N3 chose other norms than N1 of a block."""
    return bool((spec.norms_and_sizes(x, scheme)[0] != rounding.norm(x)).any())


@pytest.mark.parametrize("name", WAYS)
def test_outliers_are_balanced_and_offsets_are_not(name: str) -> None:
    """N3 N1 M2 M3: of one array with blocks of both, in every backend."""
    x = np.concatenate([outlier(12, 6), offset(12, 6), outlier(5, 6, seed=1)])
    x[3] = x[14] = 0
    scheme = replace(WAYS[name], block_size=12)
    chosen = [is_balanced(x[start : start + 12], scheme) for start in (0, 12, 24)]
    assert chosen == [True, False, True]
    require_equal_bits(x, scheme)
    plain = quantize(x, replace(scheme, norm_rule="plain"))
    balanced = quantize(x, scheme)
    assert plain.norm is not None
    assert balanced.norm is not None
    assert (plain.norm[12:24] == balanced.norm[12:24]).all()
    assert (plain.norm[:12] != balanced.norm[:12]).sum() > 9


@settings(max_examples=60)
@given(uneven(), schemes(norm_rule="balanced", axis="channel", separate_norm=True))
def test_kernels_and_specification_agree(x: Float32, scheme: Scheme) -> None:
    """N3 of channels of any sizes, heavy tails, zero tokens and channels, and both ends."""
    require_equal_bits(x, scheme, BACKENDS[:2])


@settings(max_examples=25)
@given(uneven())
def test_the_oracle_agrees_in_norms_and_sizes(x: Float32) -> None:
    """N3: sums of exact fractions are those of float64."""
    block = x[0, :9, :9]
    with np.errstate(all="ignore"):
        norm, size = spec.norms_and_sizes(block, BALANCED)
    norms, sizes = oracle.norms_and_sizes(block.tolist(), BALANCED)
    assert norm.tolist() == norms
    assert size[0].tolist() == sizes


def test_blocks_of_several_chunks() -> None:
    """N3: extremes of a channel, and what a block's spread is made of, lie in different tasks."""
    x = np.concatenate([outlier(2, 2600, 8), offset(2, 2600, 8), outlier(2, 1300, 8)], axis=1)
    x[:, 2599, 3] = 50  # the largest of its channel, in the last chunk of its block
    for name, way in WAYS.items():
        scheme = replace(way, block_size=2600)
        numba, numpy = (quantize(x, scheme, backend) for backend in BACKENDS[:2])
        for part, array in numpy.parts.items():
            assert numba.parts[part].tobytes() == array.tobytes(), (name, part)


def test_lengths_over_sizes_that_sums_do_not_decide() -> None:
    """N3 N1 M2: rows that the kernels come back to are those over the sizes."""
    size = np.float32([0.5, 1, 1, 1, *[2.0**-5] * 4])
    x = np.clip(normals(2, 2600, 8), -3.9, 3.9)
    x[:, 7] = 4
    x[:, [1500, 2590]] = [1, 2.0**-12, 2.0**-12, 2.0**-24, 0, 0, 0, 0]  # half way
    x *= size
    scheme = replace(BALANCED, outlier_channels=4, norm_dtype="float32")
    assert (spec.norms_and_sizes(x, scheme)[1] == size).all()
    numba, numpy = (quantize(x, scheme, backend) for backend in BACKENDS[:2])
    for part, array in numpy.parts.items():
        assert numba.parts[part].tobytes() == array.tobytes(), part
    assert numpy.norm is not None
    assert (numpy.norm[:, [1500, 2590]] == 1).all()


@pytest.mark.parametrize("with_feedback", [False, True])
@pytest.mark.parametrize("name", ["gain", "lsq", "search"])
def test_a_cache_has_equal_bytes_however_tokens_arrive(name: str, with_feedback: bool) -> None:
    """N3 B1 F1: norms need the other tokens of a block, and only full blocks are coded."""
    key = replace(WAYS[name], block_size=16, sink_tokens=1)
    keys = np.concatenate([outlier(1, 2, 60, 8), offset(1, 2, 40, 8)], axis=2)
    values = normals(1, 2, 100, 8, seed=1)
    queries = normals(4, 30, 8, seed=2) @ normals(8, 8, seed=3)
    feedback = Feedback.from_queries(queries, kv_heads=2) if with_feedback else None
    whole, streamed, chunked = (
        KVCache(1, 2, 8, key, replace(key, norm_rule="plain"), key_feedback=feedback)
        for _ in range(3)
    )
    whole.append(keys, values)
    for t in range(100):
        streamed.append(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    for start, stop in ((0, 3), (3, 50), (50, 51), (51, 100)):
        chunked.append(keys[:, :, start:stop], values[:, :, start:stop])
    assert bits(whole) == bits(streamed) == bits(chunked)
    sealed = whole.stored().keys.sealed
    expected = quantize(keys[0, :, :97], key, backend="numpy", feedback=feedback)
    assert sealed is not None
    for part, array in sealed.parts.items():
        assert array.tobytes() == expected.parts[part].tobytes(), part
    some = [is_balanced(keys[0, :, start : start + 16], key) for start in (1, 81)]
    assert some == [True, False]


@pytest.mark.parametrize("power", [-60, -1, 3, 60])
def test_a_power_of_two_changes_factors_only(power: int) -> None:
    """N3: exact scaling, with balanced norms and with plain ones."""
    for x in (outlier(20, 9), offset(20, 9)):
        for scheme in (FLOAT32, replace(FLOAT32, magnitude="lsq", symmetric=False)):
            one, other = quantize(x, scheme), quantize(np.ldexp(x, power), scheme)
            assert other.norm is not None
            for part, array in one.parts.items():
                expected = np.ldexp(array, power) if part == "norm" else array
                np.testing.assert_array_equal(other.parts[part], expected)


def test_balanced_norms_do_not_see_how_channels_are_scaled() -> None:
    """N3: within 2**12, and the largest channel staying it, codes and gains are the same."""
    x = outlier(40, 6)
    x[:, 1] *= 2  # the largest
    powers = np.array([0, 4, 1, 2, 3, 1])
    scaled = np.ldexp(x, powers).astype(np.float32)
    (norm, size), (norm_of_scaled, size_of_scaled) = (
        spec.norms_and_sizes(one, FLOAT32) for one in (x, scaled)
    )
    assert is_balanced(x, FLOAT32)
    np.testing.assert_array_equal(norm_of_scaled, np.ldexp(norm, 4))
    np.testing.assert_array_equal(size_of_scaled, np.ldexp(size, powers - 4))
    one, other = quantize(x, FLOAT32), quantize(scaled, FLOAT32)
    assert one.packed.tobytes() == other.packed.tobytes()
    assert one.norm is not None
    np.testing.assert_array_equal(other.norm, np.ldexp(one.norm, 4))
    np.testing.assert_array_equal(other.scale, np.ldexp(one.scale, powers - 4))


def test_a_channel_is_at_least_the_2_to_the_12th_part_of_the_largest() -> None:
    """N3: what is smaller counts by that, and so does a channel of zeros."""
    x = outlier(30, 5)
    x[:, 1] *= 2.0**10
    x[:, 2] = 0
    assert is_balanced(x, BALANCED)
    size = spec.norms_and_sizes(x, BALANCED)[1][0]
    assert size[[0, 2]].tolist() == [2.0**-12, 2.0**-12]
    assert size.max() == 1
    require_equal_bits(x, BALANCED, BACKENDS[:2])


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (outlier(1, 6), "one token spreads nothing"),
        (normals(9, 1), "one channel is the largest"),
        (np.zeros((4, 3), np.float32), "nothing is there"),
        (huge(), "a balanced norm is beyond float32"),
    ],
)
def test_where_norms_stay_plain(x: Any, why: str) -> None:
    """N3 N1: no gain, or no finite norms."""
    with np.errstate(all="ignore"):
        assert not is_balanced(x, FLOAT32), why
    require_equal_bits(x, FLOAT32)
    quantized = quantized_or_none(x, FLOAT32)
    assert isinstance(quantized, Quantized)
    plain = quantize(x, replace(FLOAT32, norm_rule="plain"))
    for part, array in plain.parts.items():
        assert quantized.parts[part].tobytes() == array.tobytes()

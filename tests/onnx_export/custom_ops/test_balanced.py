"""Balanced norms (N3) in the native library, on every instruction set, beside the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings

import nsq_ref as nsq
from nsq_ref import Feedback, Scheme, strategies
from onnx_export.custom_ops import library_path
from tests.onnx_export.custom_ops.test_codec_feedback import assert_agrees
from tests.support.onnx_attention import Config, Expected, Runner, check, make_inputs
from tests.support.processors import CPUS, sessions_on

Array = npt.NDArray[Any]
Magnitude = Literal["gain", "lsq"]
MAGNITUDES: tuple[Magnitude, ...] = ("gain", "lsq")

BALANCED = Scheme(
    bits=3, symmetric=False, magnitude="gain", norm_rule="balanced", norm_dtype="float32"
)


def gains(x: Array, scheme: Scheme, feedback: Feedback | None = None) -> bool:
    """Whether balanced norms are taken in some block."""
    found = [
        nsq.quantize(x, replace(scheme, norm_rule=rule), feedback=feedback).norm.tobytes()
        for rule in ("plain", "balanced")
    ]
    return found[0] != found[1]


def feedback_of(rng: np.random.Generator, kv_heads: int, head_dim: int) -> Feedback:
    mixed = rng.standard_normal((kv_heads, 50, head_dim))
    return Feedback.from_queries(mixed @ rng.standard_normal((head_dim, head_dim)), kv_heads)


# --- bytes --------------------------------------------------------------------------------------


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    strategies.tensors(max_tokens=40, max_head_dim=70, dtypes=("float32", "float16", "bfloat16")),
    strategies.schemes(
        norm_rule="balanced", separate_norm=True, axis="channel",
        magnitude=st.sampled_from(["gain", "lsq"]),
    ),
    st.data(),
)  # fmt: skip
def test_every_scheme(x: Array, scheme: Scheme, data: st.DataObject) -> None:
    """N3 M2 M3 and all rules around them: equal bytes or refused."""
    feedback = None
    if data.draw(st.booleans()):
        feedback = data.draw(strategies.feedbacks(x.shape[-3], x.shape[-1]))
    assert_agrees(scheme, x, feedback)


@pytest.mark.parametrize("fed", [False, True])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_each_choice(magnitude: Magnitude, fed: bool) -> None:
    """N3 O1: channels far above the others are outweighed; those that hardly change are kept."""
    rng = np.random.default_rng(0)
    for tokens, head_dim in ((128, 128), (67, 70)):
        x = rng.standard_normal((2, tokens, head_dim), dtype=np.float32)
        feedback = feedback_of(rng, 2, head_dim) if fed else None
        scheme = replace(BALANCED, magnitude=magnitude, block_size=tokens)
        outlying, steady = x.copy(), x.copy()
        outlying[..., 1:3] *= 40
        steady[..., 1:3] += 40
        outlying[1, tokens // 2] = 0
        assert gains(outlying, scheme, feedback)
        assert not gains(steady, scheme, feedback)
        both = np.concatenate([outlying, steady, outlying[:, :20]], axis=1)
        assert_agrees(scheme, both, feedback, threads=2)
        other = replace(scheme, outlier_channels=3, symmetric=True, scale_rule="search")
        assert_agrees(other, both, feedback)


def test_blocks_of_a_token() -> None:
    """N3: a channel of one token has no range, and no norm is closer than the other."""
    x = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    x[:, 7] *= 50
    scheme = replace(BALANCED, block_size=1)
    assert not gains(x, scheme)
    assert_agrees(scheme, x, None)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_channels_without_values_or_without_range(magnitude: Magnitude) -> None:
    """N3: the least size, ranges of 0, and blocks of zeros."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 33)).astype(np.float32)
    x[:, :4] *= np.float32([300, 0.03, 0, 1e-42])
    x[:10, 4] = 0.5  # has no range, but its directions have
    x[20:30] = 0
    scheme = replace(BALANCED, magnitude=magnitude, block_size=10, scale_dtype="float32")
    assert gains(x, scheme)
    assert_agrees(scheme, x, None)
    assert_agrees(scheme, x * np.float32(2.0**-140), None)


def norms_between_floats(ends: tuple[float, ...]) -> Array:
    """Return tokens whose elements over their sizes have a norm of 1 and half a unit, or near it.

    Those are powers of two, and the last channel's is far above the others.
    """
    rng = np.random.default_rng(0)
    sizes = np.ldexp(np.float32(1), [-6, -5, -7, -6, 0])
    x = np.stack([[1, 2.0**-12, 2.0**-12, 2.0**-24, end] for end in ends]).astype(np.float32)
    others = rng.choice(np.float32([-1, 1]), (60, 5)) * np.float32(1)
    others[:, 4] = rng.standard_normal(60)
    others[:5] = np.eye(5)
    return np.concatenate([x, np.clip(others, -1, 1)]) * sizes


def test_norms_that_float64_cannot_tell() -> None:
    """N3 N1: exact ties go to even, and what is just beside a tie does not."""
    x = norms_between_floats((0, 2.0**-30))
    scheme = replace(BALANCED, symmetric=True, bits=8, scale_dtype="float32")
    assert gains(x, scheme)
    assert_agrees(scheme, x, None)


@pytest.mark.parametrize(("factor", "finite"), [(3e37, True), (7.05e37, False), (1.2e38, False)])
def test_where_float32_ends(factor: float, finite: bool) -> None:
    """N3: where one balanced norm is infinite, all stay plain; where a plain one is, none helps."""
    rng = np.random.default_rng(0)
    x = np.clip(rng.standard_normal((40, 24)), -2.5, 2.5).astype(np.float32)
    x[:, 1:] /= 60
    x *= np.float32(factor)
    for magnitude in MAGNITUDES:
        scheme = replace(BALANCED, magnitude=magnitude)
        assert gains(x, scheme) == finite
        assert_agrees(scheme, x, None)
        assert_agrees(scheme, x, feedback_of(rng, 1, 24))
    x[7] = 1e38
    with pytest.raises(nsq.RangeError, match="is beyond float32"):
        nsq.quantize(x, BALANCED)
    assert_agrees(BALANCED, x, None)


# --- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cpu", CPUS)
def test_sealed_blocks(cpu: str) -> None:
    """N3 B1: a cache seals what `nsq.quantize` gives, however its tokens come."""
    rng = np.random.default_rng(0)
    key = Scheme(norm_rule="balanced", magnitude="gain", block_size=8, sink_tokens=2)
    value = replace(key, magnitude="lsq", symmetric=False)
    config = Config(
        heads=4, kv_heads=2, head_dim=20, key=key, value=value, capacity=96,
        feedback=feedback_of(rng, 2, 20),
    )  # fmt: skip
    with sessions_on(cpu):
        runner = Runner(config, 2, functions=[], library=library_path())
    expected = Expected(config, 2)
    for tokens in (30, 1, 9, 20):
        inputs = make_inputs(config, rng, runner.lengths, tokens)
        for name in ("key", "value"):
            inputs[name][..., 3::20] *= 30
        assert tokens < 20 or gains(inputs["key"][..., :20], key)
        check(runner, expected, inputs, slack=0.05)

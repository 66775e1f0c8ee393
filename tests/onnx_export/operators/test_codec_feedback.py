"""nsq.Quantize with feedback in standard operators: the reference's bytes, everywhere (F1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import assume, given, settings

import nsq_ref as nsq
from nsq_ref import Feedback, Scheme, strategies
from onnx_export.operators import quantize_model
from tests.support.balance import are_balanced, keys_of_two_kinds
from tests.support.onnx_runners import RUNNERS, Run

Array = npt.NDArray[Any]


@pytest.fixture(scope="module", params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> Callable[[onnx.ModelProto], Run]:
    return RUNNERS[request.param]


def assert_agrees(
    runner: Callable[[onnx.ModelProto], Run], x: Array, scheme: Scheme, feedback: Feedback
) -> None:
    expected = nsq.quantize(x, scheme, feedback=feedback).parts
    got = runner(quantize_model(scheme, x.dtype.name, feedback=feedback))({"x": x})
    assert got.keys() == expected.keys()
    for name, part in expected.items():
        assert (name, got[name].dtype, got[name].shape) == (name, part.dtype, part.shape)
        assert (name, got[name].tobytes()) == (name, part.tobytes())


@settings(max_examples=25)
@given(
    strategies.tensors(max_head_dim=24, dtypes=("float32", "float16", "bfloat16")),
    strategies.schemes(),
    st.data(),
)
def test_every_scheme(
    runner: Callable[[onnx.ModelProto], Run], x: Array, scheme: Scheme, data: st.DataObject
) -> None:
    """F1 and all rules around it. Whatever is not refused."""
    kv_heads = data.draw(st.sampled_from([1, x.shape[-3] if x.ndim > 2 else 1]))
    feedback = data.draw(strategies.feedbacks(kv_heads, x.shape[-1]))
    try:
        nsq.quantize(x, scheme, feedback=feedback)
    except nsq.RangeError:
        assume(False)
    assert_agrees(runner, x, scheme, feedback)


FORMS = {
    "search": Scheme(bits=2, scale_rule="search", block_size=8),
    "search, gain": Scheme(
        bits=2, scale_rule="search", symmetric=False, magnitude="gain", outlier_channels=2,
        block_size=8, norm_dtype="float32",
    ),
    "gain": Scheme(bits=3, magnitude="gain", norm_dtype="float32", sink_tokens=1, block_size=4),
    "token": Scheme(
        bits=2, scale_rule="search", axis="token", magnitude="gain", norm_dtype="float32",
        outlier_channels=1, block_size=8,
    ),
    "lsq": Scheme(bits=2, magnitude="lsq", symmetric=False, scale_dtype="bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_heads_and_short_blocks(runner: Callable[[onnx.ModelProto], Run], name: str) -> None:
    """F1 S4 M2. What fills up the last block is not counted, and zero tokens are."""
    rng = np.random.default_rng(2)
    heads, channels = 2, 24
    x = rng.standard_normal((2, heads, 13, channels)) * np.exp(rng.standard_normal(channels))
    x[..., 5, :] = x[1, 1, 12] = 0
    queries = rng.standard_normal((heads, 60, channels)) @ rng.standard_normal((channels, channels))
    feedback = Feedback.from_queries(queries, heads)
    assert (np.diagonal(feedback.factor, axis1=1, axis2=2) < 0.9).any()
    assert_agrees(runner, x.astype(np.float32), FORMS[name], feedback)


@pytest.mark.parametrize("magnitude", ["gain", "lsq"])
def test_balanced_norms(
    runner: Callable[[onnx.ModelProto], Run], magnitude: Literal["gain", "lsq"]
) -> None:
    """N3 F1 M2 M3. Errors that move are those of directions by the norms that are taken."""
    x = keys_of_two_kinds(tokens=14, channels=12)
    scheme = replace(
        FORMS["gain"], norm_rule="balanced", magnitude=magnitude, block_size=5, outlier_channels=1
    )
    assert set(are_balanced(x, scheme).ravel().tolist()) == {True, False}
    queries = np.random.default_rng(2).standard_normal((2, 40, 12))
    assert_agrees(runner, x, scheme, Feedback.from_queries(queries, kv_heads=2))


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (2, 1, 3, 2, 5), (3, 40)])
def test_ends_of_the_shapes(
    runner: Callable[[onnx.ModelProto], Run], shape: tuple[int, ...]
) -> None:
    """F1 K1 B1. No token after the sinks, one channel, a short block, several leading axes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    heads = shape[-3] if len(shape) > 2 else 1
    feedback = Feedback.from_queries(rng.standard_normal((heads, 9, shape[-1])), heads)
    for scheme in (
        Scheme(sink_tokens=2, block_size=2, magnitude="lsq", scale_rule="search"),
        Scheme(axis="token", symmetric=False, magnitude="gain", outlier_channels=4),
    ):
        assert_agrees(runner, x, scheme, feedback)


def test_where_float32_ends(runner: Callable[[onnx.ModelProto], Run]) -> None:
    """F1 M2: w, and what the weights see, is the direction again where it is infinite or NaN."""
    factor = np.float32(
        [[[1, -3e38, 3e38, 3e38], [0, 0.5, 1, 3e38], [0, 0, 1, 1], [0, 0, 0, 0.25]]]
    )
    feedback = Feedback([[0, 1, 2, 3]], factor)
    x = np.float32([[7e3, 3e4, 7e3, 1e2], [2.5e3, 3e4, 2e3, 1e3], [1.5, 3e4, 1e3, 5e2]])
    for symmetric in (False, True):
        scheme = Scheme(separate_norm=False, scale_dtype="float32", symmetric=symmetric)
        assert_agrees(runner, x, scheme, feedback)
        scheme = replace(scheme, separate_norm=True, norm_dtype="float32")
        assert_agrees(runner, x, scheme, feedback)
        assert_agrees(runner, x, replace(scheme, axis="token", magnitude="gain"), feedback)


def test_what_weights_do_not_see(runner: Callable[[onnx.ModelProto], Run]) -> None:
    """F1 M2: a length of 0 stores 0, and so does a zero token."""
    weights = np.full(6, 2.0**-149, np.float32)  # times less than a half: 0
    weights[0] = 1
    feedback = Feedback([range(6)], np.diag(weights)[None])
    x = np.float32([[1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    scheme = Scheme(magnitude="gain", scale_dtype="float32", norm_dtype="float32")
    assert_agrees(runner, x, scheme, feedback)
    norm = nsq.quantize(x, scheme, feedback=feedback).norm
    assert norm is not None
    assert norm.tolist() == [1, 0, 0]


def test_nothing_moves_in_a_zero_token(runner: Callable[[onnx.ModelProto], Run]) -> None:
    """F1 N2 O1: not even into an outlier channel, which would show it."""
    x = np.float32([[3, 4, 12], [0, 0, 0], [-3, 2, 1]])
    feedback = Feedback([[0, 1, 2]], np.triu(np.ones((1, 3, 3), np.float32)))
    assert_agrees(runner, x, Scheme(symmetric=False, outlier_channels=1), feedback)


def test_what_is_no_feedback() -> None:
    with pytest.raises(TypeError, match=r"^feedback must be a Feedback, got int"):
        quantize_model("nsep+pchan4", feedback=1)  # type: ignore[arg-type]

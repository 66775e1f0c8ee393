"""nsq.Quantize with feedback in standard operators: the reference's bytes, everywhere (F1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import assume, given, settings

import nsq_ref as nsq
from nsq_ref import Feedback, Scheme, strategies
from onnx_export.operators import quantize_model
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
    """F1: w is the direction again where it is infinite or NaN; with scale 0 its code is 0."""
    factor = np.triu(np.float32([[[1, -3e38, 3e38], [0, 1, 1], [0, 0, 1]]]))
    feedback = Feedback([[0, 1, 2]], factor)
    x = np.float32([[7e30, 3e38, 7e30], [2.5e30, 3e38, 2e30], [1.5, 3e38, 1e30]])
    for symmetric in (False, True):
        scheme = Scheme(separate_norm=False, scale_dtype="float32", symmetric=symmetric)
        assert_agrees(runner, x, scheme, feedback)
    # Two errors of 4 move 3e38 to -2.2e38, which is beyond float32 below the zero of 3e38.
    factor = np.eye(4, dtype=np.float32)[None]
    factor[0, :2, 2] = [0.8e38, 0.5e38]
    x = np.float32([[0, 0, 3e38, 9], [150, 150, 3e38, 1], [24, 24, 3e38, 5]])
    scheme = Scheme(separate_norm=False, scale_dtype="float32", symmetric=False)
    assert_agrees(runner, x, scheme, Feedback([[0, 1, 2, 3]], factor))


def test_nothing_moves_in_a_zero_token(runner: Callable[[onnx.ModelProto], Run]) -> None:
    """F1 N2 O1: not even into an outlier channel, which would show it."""
    x = np.float32([[3, 4, 12], [0, 0, 0], [-3, 2, 1]])
    feedback = Feedback([[0, 1, 2]], np.triu(np.ones((1, 3, 3), np.float32)))
    assert_agrees(runner, x, Scheme(symmetric=False, outlier_channels=1), feedback)


def test_what_is_no_feedback() -> None:
    with pytest.raises(TypeError, match=r"^feedback must be a Feedback, got int"):
        quantize_model("nsep+pchan4", feedback=1)  # type: ignore[arg-type]

"""The strategies draw what they promise, and all of it is drawn."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from numpy.typing import NDArray

from nsq_ref import Feedback, Scheme, quantize
from nsq_ref.scheme import FLOAT_DTYPES
from nsq_ref.strategies import AWKWARD, DTYPES, KINDS, feedbacks, inputs, schemes, tensors

QUICK = settings(  # the first that is found will do: nothing is made smaller
    database=None, derandomize=True, max_examples=2000, phases=[Phase.generate]
)


def found(strategy: st.SearchStrategy[Any], condition: Callable[[Any], bool]) -> Any:
    return find(strategy, condition, settings=QUICK)


@given(tensors(min_tokens=2, max_tokens=4, min_head_dim=3, max_head_dim=5, leading=(2, 1)))
def test_shapes_stay_within_their_bounds(x: NDArray[np.float32]) -> None:
    """I1. Float32 by default, finite, and of the shape that was asked for."""
    assert x.shape[:2] == (2, 1)
    assert 2 <= x.shape[2] <= 4
    assert 3 <= x.shape[3] <= 5
    assert x.dtype == np.float32
    assert np.isfinite(x).all()


@given(inputs(finite=False))
def test_arrays_that_are_not_finite_are_refused(x: NDArray[Any]) -> None:
    """I2. At least one element is NaN or infinite, in every dtype."""
    assert not np.isfinite(x.astype(np.float64)).all()
    with pytest.raises(ValueError, match=r"is (nan|-?inf); nothing was quantized"):
        quantize(x, backend="numpy")


@given(inputs())
def test_inputs_are_finite_in_their_dtype(x: NDArray[Any]) -> None:
    """I1 I2. What a narrow dtype does not hold is clipped, and float32 holds a float64."""
    assert np.isfinite(x.astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_dtype_is_drawn(dtype: type) -> None:
    """I1. All four that are taken."""
    assert found(inputs(), lambda x: x.dtype == dtype).dtype == dtype


def test_float64_is_more_than_float32() -> None:
    """I1. Rounding to float32 changes some of it."""
    assert found(tensors(dtypes=["float64"]), lambda x: (x.astype(np.float32) != x).any()).size


@pytest.mark.parametrize(
    "condition",
    [
        lambda x: x.shape[-2] == 1,
        lambda x: x.shape[-2] == 7,
        lambda x: x.shape[-1] == 9,
        lambda x: x.shape[0] == 2,
        lambda x: (x == 0).all(axis=-1).any() and x.any(),
        lambda x: (x == 0).all(axis=-2).any() and x.any(),
        lambda x: (np.signbit(x) & (x == 0)).any(),
        lambda x: (np.abs(x[x != 0]) < 2.0**-126).any(),
        lambda x: ((x.astype(np.float64) ** 2).sum(-1) > np.float64(3.41e38) ** 2).any(),
        lambda x: x.shape[-2] > 2 and x.min() > 0,
        lambda x: np.ptp(np.log2(np.abs(x).max(axis=-1) + 1e-38)) > 60,
    ],
    ids=[
        "one token",
        "most tokens",
        "most channels",
        "two heads",
        "zero token",
        "zero channel",
        "negative zero",
        "subnormal",
        "norm beyond float32",
        "one-sided",
        "spread",
    ],
)
def test_trouble_is_drawn(condition: Callable[[NDArray[np.float32]], bool]) -> None:
    """N1 N2 S2. The shapes and numbers at which implementations differ."""
    assert condition(found(tensors(), condition))


@pytest.mark.parametrize("head_dim", [64, 195, 196, 197, 256])
def test_telling_head_sizes_are_drawn(head_dim: int) -> None:
    """D2 P1. Bounds of proofs and sizes of models are not left to chance."""
    strategy = tensors(max_head_dim=300, max_tokens=2, leading=())
    assert found(strategy, lambda x: x.shape[-1] == head_dim).shape[-1] == head_dim


@given(tensors(kinds=["ties"], dtypes=DTYPES))
def test_ties_have_a_scale_of_one(x: NDArray[Any]) -> None:
    """Q1 S1. Every scale is exactly 1 where neither its channel nor the first token is zero."""
    scale = quantize(x, Scheme(separate_norm=False), backend="numpy").scale[..., 0, :]
    assert (scale[x[..., 0, :] != 0] == 1).all()
    assert (x.astype(np.float32) * 2 % 1 == 0).all()


def test_ties_are_drawn() -> None:
    """Q1. Many quotients lie half way between two integers, which those of random data never do."""
    x = found(tensors(kinds=["ties"]), lambda x: x[0, 0].all() and (np.abs(x) % 1 == 0.5).sum() > 9)
    assert set(quantize(x, Scheme(separate_norm=False)).codes[..., 0, :].ravel()) == {7}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_asked_for(kind: Any) -> None:
    """A kind on its own is drawn."""
    assert found(tensors(kinds=[kind]), lambda x: bool(x.any())).any()


def test_awkward_values_come_as_they_are() -> None:
    """Q1 S3. The list holds ties' neighbours and the edges of float16."""
    x = found(tensors(kinds=["awkward"]), lambda x: len(np.unique(x)) >= 3)
    assert np.isin(x, np.multiply.outer(np.float32(AWKWARD), [1, 10, 100, 1000])).any()
    assert {65504.0, 65520.0, 2.0**-24, 2.0**-149} <= set(AWKWARD)


@pytest.mark.parametrize(
    ("kind", "least"),
    [("heavy tails", 2.0**-3), ("ties", 2.0**-20), ("wild", 2.0**-130)],
)
def test_weights_of_feedback_are_drawn_small_and_large(kind: Any, least: float) -> None:
    """F1. As those of moments are, and beyond; the largest is 1."""
    weights = np.diagonal(found(feedbacks(1, 9, kinds=[kind]), spreads_to(least)).factor[0])
    assert weights.max() == 1


def spreads_to(least: float) -> Callable[[Feedback], bool]:
    return lambda feedback: float(np.diagonal(feedback.factor[0]).min()) <= least


@pytest.mark.parametrize("kind", ["ties", "wild"])
def test_weights_of_feedback_may_be_all_alike(kind: Any) -> None:
    """F1. The length that queries see is then the plain one."""
    ones = found(feedbacks(1, 9, kinds=[kind]), lambda one: one.factor[0].trace() == 9)
    assert (ones.factor[0] != np.eye(9)).any()


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "bits": (2, 3, 4, 8),
        "separate_norm": (True, False),
        "axis": ("channel", "token"),
        "symmetric": (True, False),
        "scale_rule": ("range", "search"),
        "norm_rule": ("plain", "balanced"),
        "magnitude": ("norm", "gain", "lsq"),
        "block_size": (None, 1, 5),
        "sink_tokens": (0, 1, 3),
        "outlier_channels": (0, 1, 4),
        "scale_dtype": tuple(FLOAT_DTYPES),
        "norm_dtype": tuple(FLOAT_DTYPES),
    }.items(),
)
def test_every_value_of_every_field_is_drawn(field: str, values: tuple[Any, ...]) -> None:
    """Q1 S1 M1 B1 K1 O1. No part of the family is left out, and any can be fixed."""
    for value in values:
        assert getattr(found(schemes(), lambda s, v=value: getattr(s, field) == v), field) == value
        effective = {"separate_norm": True, "axis": "channel", "magnitude": "gain", field: value}
        fixed = found(schemes(**effective), lambda s: True)
        assert getattr(fixed, field) == value


@given(schemes(magnitude="lsq", block_size=None, sink_tokens=0, bits=st.sampled_from([2, 8])))
def test_fixed_fields_stay(scheme: Scheme) -> None:
    """M3. Values that are false are fixed too; strategies are drawn from."""
    assert (scheme.block_size, scheme.sink_tokens) == (None, 0)
    assert scheme.bits in (2, 8)
    assert scheme.magnitude == ("lsq" if scheme.separate_norm else "norm")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schemes(bit=4), "a scheme has no bit; its fields are bits, "),
        (lambda: tensors(min_tokens=0), "min_tokens=0 and max_tokens=7 must be ordered"),
        (lambda: inputs(min_head_dim=10), "min_head_dim=10 and max_head_dim=9 must be ordered"),
        (lambda: tensors(dtypes=["int8"]), r"dtypes=\['int8'\] must be .* float32"),
        (lambda: tensors(dtypes="float32"), "dtypes='float32' must be a sequence"),
        (lambda: tensors(kinds=[]), r"kinds=\[\] must be a sequence of some of normal, "),
    ],
)
def test_wrong_calls_are_refused_at_once(call: Callable[[], object], message: str) -> None:
    """Errors come when the strategy is made and name what is wrong."""
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_without_hypothesis_the_import_names_the_remedy() -> None:
    """An interpreter that has no hypothesis is told what to install."""
    script = "import sys; sys.modules['hypothesis'] = None; import nsq_ref.strategies"
    run = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "pip install hypothesis" in run.stderr.splitlines()[-1]


def test_dtypes_are_those_of_rule_i1() -> None:
    """I1. Nothing is drawn that must be refused for its dtype."""
    assert sorted(DTYPES) == ["bfloat16", "float16", "float32", "float64"]

"""The measures, against their definitions in exact or plain arithmetic."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nsq_ref.metrics import cosine_similarity, outlier_ratio, relative_error

VALUES = st.floats(-1e3, 1e3, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3)
SHAPES = hnp.array_shapes(min_dims=2, max_dims=4, max_side=4)
ARRAYS = hnp.arrays(np.float32, SHAPES, elements=VALUES)
PAIRS = SHAPES.flatmap(
    lambda shape: st.tuples(*[hnp.arrays(np.float32, shape, elements=VALUES)] * 2)
)


@given(pair=PAIRS)
def test_relative_error_is_its_definition(pair):
    x, x_hat = (values.astype(np.float64) for values in pair)
    error = relative_error(*pair, axis=-1)
    assert error.shape == x.shape[:-1]
    for index in np.ndindex(error.shape):
        above, below = math.dist(x[index], x_hat[index]), math.hypot(*x[index])
        expected = above / below if below else (math.inf if above else 0)
        assert error[index] == pytest.approx(expected, rel=1e-12)
    whole = relative_error(*pair)
    assert type(whole) is float
    above, below = math.dist(x.ravel(), x_hat.ravel()), math.hypot(*x.ravel())
    assert whole == pytest.approx(above / below if below else (math.inf if above else 0))


@given(x=ARRAYS)
def test_nothing_lost_is_no_error(x):
    assert relative_error(x, x) == 0
    assert (relative_error(x, x, axis=(-2, -1)) == 0).all()
    np.testing.assert_allclose(cosine_similarity(x, x), 1)
    np.testing.assert_allclose(cosine_similarity(x, -x), np.where((x == 0).all(-1), 1, -1))


@given(pair=PAIRS)
def test_cosine_is_its_definition(pair):
    x, x_hat = (values.astype(np.float64) for values in pair)
    cosine = cosine_similarity(*pair)
    assert cosine.shape == x.shape[:-1]
    assert (np.abs(cosine) <= 1).all()
    for index in np.ndindex(cosine.shape):
        lengths = math.hypot(*x[index]), math.hypot(*x_hat[index])
        if all(lengths):
            expected = math.fsum(x[index] * x_hat[index]) / math.prod(lengths)
        else:
            expected = float(lengths == (0, 0))
        assert cosine[index] == pytest.approx(expected, abs=1e-12)


@given(x=ARRAYS)
def test_outlier_ratio_is_its_definition(x):
    ratio = outlier_ratio(x)
    assert ratio.shape == x.shape[:-2]
    for index in np.ndindex(ratio.shape):
        peaks = [max(abs(float(v)) for v in column) for column in x[index].T]
        mean = math.fsum(peaks) / len(peaks)
        assert ratio[index] == pytest.approx(max(peaks) / mean if mean else 1)


def test_sums_do_not_stay_in_the_dtype_of_the_input():
    """65536 ones: a sum in float16 or bfloat16 would overflow or stand still."""
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        ones = np.ones((1, 2**16), dtype)
        assert relative_error(ones, 0 * ones) == 1
        assert cosine_similarity(ones, ones).item() == pytest.approx(1, rel=1e-12)
        assert outlier_ratio(ones).item() == 1
    huge = np.full((2, 8), 3e38, np.float32)
    assert relative_error(huge, -huge) == 2
    assert cosine_similarity(huge, huge).tolist() == pytest.approx([1, 1])
    assert outlier_ratio(huge).item() == 1


def test_one_channel_alone_stands_out_by_the_number_of_channels():
    x = np.zeros((2, 3, 64), np.float32)
    x[0, 1, 7] = -5
    assert outlier_ratio(x).tolist() == [64, 1]


@pytest.mark.parametrize("measure", [relative_error, cosine_similarity])
def test_pairs_must_have_one_shape(measure):
    with pytest.raises(
        ValueError, match=r"x has shape \[2, 1\] and x_hat \[2\]; give arrays of eq"
    ):
        measure(np.ones((2, 1)), np.ones(2))
    with pytest.raises(ValueError, match=r"x has shape \[0\], which is empty"):
        measure(np.ones(0), np.ones(0))


@pytest.mark.parametrize("dtype", [np.complex64, object, "U3", "V2", "M8[s]", bool])
def test_only_real_numbers_are_measured(dtype):
    odd, real = np.empty((2, 2), dtype), np.ones((2, 2))
    with pytest.raises(TypeError, match=r"x has dtype .*; give real numbers"):
        relative_error(odd, real)
    with pytest.raises(TypeError, match=r"x_hat has dtype .*; give real numbers"):
        cosine_similarity(real, odd)
    with pytest.raises(TypeError, match=r"x has dtype .*; give real numbers"):
        outlier_ratio(odd)


def test_axes_that_are_missing_are_named():
    with pytest.raises(ValueError, match="axis 2 is out of bounds"):
        relative_error(np.ones((2, 2)), np.ones((2, 2)), axis=2)
    with pytest.raises(ValueError, match=r"at least \[head_dim\] is needed"):
        cosine_similarity(1.0, 1.0)
    with pytest.raises(ValueError, match=r"x has shape \[3\]; at least \[tokens, head_dim\]"):
        outlier_ratio(np.ones(3))

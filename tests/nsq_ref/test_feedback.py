"""Key feedback: what is made of queries, and what coding with it does."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings

from nsq_ref import (
    Feedback,
    Quantized,
    RangeError,
    Scheme,
    dequantize,
    files,
    oracle,
    quantize,
    spec,
)  # fmt: skip
from nsq_ref.codec import Backend
from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.feedback import Moments, second_moment
from nsq_ref.kernels.feedback import DROPPED, narrowed
from nsq_ref.strategies import feedbacks, inputs, schemes, tensors
from tests.nsq_ref.test_backends import SCHEMES

Array = npt.NDArray[Any]
BACKENDS = get_args(Backend)
PLAIN = Scheme(separate_norm=False)


def outcome(x: Array, scheme: Scheme, backend: Backend, feedback: Feedback) -> Quantized | str:
    try:
        return quantize(x, scheme, backend, feedback=feedback)
    except RangeError as error:
        return str(error)


def require_equal_bits(
    x: Array, scheme: Scheme, feedback: Feedback, backends: tuple[Backend, ...] = BACKENDS
) -> None:
    first, *others = (outcome(x, scheme, backend, feedback) for backend in backends)
    for other in others:
        if isinstance(first, str) or isinstance(other, str):
            assert other == first
            continue
        assert other.parts.keys() == first.parts.keys()
        for name, part in first.parts.items():
            assert other.parts[name].tobytes() == part.tobytes(), name
        assert other.collapsed_tokens == first.collapsed_tokens


def given_to(x: Array, data: st.DataObject, **options: Any) -> Feedback:
    return data.draw(feedbacks(data.draw(st.sampled_from([1, x.shape[0]])), x.shape[2], **options))


# --- coding -------------------------------------------------------------------------------------


@settings(max_examples=120)
@given(inputs(), schemes(), st.data())
def test_any_tensor_any_scheme_any_feedback(x: Array, scheme: Scheme, data: st.DataObject) -> None:
    """F1: specification, kernels and oracle agree in every bit."""
    require_equal_bits(x, scheme, given_to(x, data))


@settings(max_examples=60)
@given(
    tensors(kinds=["ties", "integers", "one-sided"]),
    schemes(separate_norm=False, scale_dtype="float32", outlier_channels=0),
    st.data(),
)
def test_ties_under_feedback(x: Array, scheme: Scheme, data: st.DataObject) -> None:
    """F1 Q1: what moves in multiples of a quarter leaves many quotients half way."""
    require_equal_bits(x, scheme, given_to(x, data, kinds=["ties"]))


WHOLE = {name: SCHEMES[name] for name in ("streaming4", "streaming2", "nsep4", "outlier4")} | {
    "asymmetric with outliers": Scheme(bits=3, symmetric=False, outlier_channels=3, block_size=50),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("tokens", [1, 16, 35, 200])
def test_whole_heads(name: str, tokens: int) -> None:
    """F1 B1 K1: kernels take blocks, short ones too, and slabs of many heads."""
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((2, 3, tokens, 64)) * np.exp(rng.standard_normal(64))
    x[0, 1, tokens // 2] = 0
    mixed = rng.standard_normal((6, 50, 64)) @ rng.standard_normal((64, 64))
    feedback = Feedback.from_queries(mixed, kv_heads=3)
    require_equal_bits(x, WHOLE[name], feedback, ("numpy", "numba"))


def test_a_token_by_hand() -> None:
    """F1: every step of one token, with ties, an outlier channel and a zero token."""
    factor = np.eye(4, dtype=np.float32)[None]
    factor[0, 0, 1:] = [-1.0, 0.5, 2.0]
    factor[0, 1, 2:] = [4.0, 0.25]
    factor[0, 2, 3] = 1.0
    feedback = Feedback([[1, 3, 0, 2]], factor)
    # Channel 2 is the outlier channel; 7 is the greatest code and the scale is 1.
    x = np.float32([[7, 7, 1000, 7], [1, 2.5, 3.25, 6], [0, 0, 0, 0]])
    scheme = Scheme(separate_norm=False, outlier_channels=1)
    # Channel 1: 2.5, a tie, gets 2; 0.5 goes on. Channel 3: 6 + 0.5, a tie, gets 6; 0.5 goes on.
    # Channel 0: 1 - 0.25 - 2 = -1.25 gets -1; -0.25 goes on. Channel 2: 3.25 - 1 - 0.125 + 0.25.
    for backend in BACKENDS:
        coded = quantize(x, scheme, backend, feedback=feedback)
        assert coded.codes.tolist() == [[7, 7, 0, 7], [-1, 2, 0, 6], [0, 0, 0, 0]]
        assert coded.outliers is not None
        assert coded.outliers.tolist() == [[1000], [2.375], [0]]


def test_nothing_moves_in_a_zero_token() -> None:
    """F1 N2 O1: not even in an outlier channel, which would show it."""
    x = np.float32([[3, 4, 12], [0, 0, 0], [-3, 2, 1]])
    scheme = Scheme(symmetric=False, outlier_channels=1)
    feedback = Feedback([[0, 1, 2]], np.triu(np.full((1, 3, 3), 1, np.float32)))
    for backend in BACKENDS:
        coded = quantize(x, scheme, backend, feedback=feedback)
        assert coded.zero is not None  # so that code 0 is an error of the direction 0
        assert coded.zero[0, 0] != 0
        assert coded.outliers is not None
        assert coded.outliers[1].tolist() == [0]
        assert not coded.codes[1].any()


@pytest.mark.parametrize("magnitude", ["norm", "gain", "lsq"])
def test_outliers_beyond_float16_are_refused(magnitude: Any) -> None:
    """F1 O1: moved there by feedback, whatever is stored for the norm."""
    x = np.float32([[3, 4, 12], [1, -2, 7]])
    feedback = Feedback([[0, 1, 2]], np.float32([[[1, 0, 2**40], [0, 1, 0], [0, 0, 1]]]))
    scheme = Scheme(magnitude=magnitude, outlier_channels=1)
    require_equal_bits(x, scheme, feedback)
    assert isinstance(outcome(x, scheme, "oracle", feedback), str)


def test_error_of_w_and_not_of_the_direction() -> None:
    """F1: a channel that was moved passes on what is left of it, not of where it was."""
    factor = np.eye(3, dtype=np.float32)[None]
    factor[0, 0, 1] = factor[0, 1, 2] = -1
    x = np.float32([[7, 7, 7], [0.25, 0.5, 0.875]])
    for backend in BACKENDS:
        coded = quantize(x, PLAIN, backend, feedback=Feedback([[0, 1, 2]], factor))
        # 0.25 gets 0. 0.5 + 0.25 gets 1, and -0.25 goes on, not -0.5. 0.875 - 0.25 gets 1.
        assert coded.codes[1].tolist() == [0, 1, 1]


def test_product_rounds_before_the_difference() -> None:
    """F1: a fused multiply-add keeps what the product rounds off, which here decides a tie."""
    numbers = "0x1.800a16p-2", "0x1.801e8ap+1", "-0x1.403cf0p-1"
    error, share, second = map(float.fromhex, numbers)
    product = float(np.float32(error * share))
    assert second + product == 0.5
    assert np.float32(second + error * share) == 0.5 + 2.0**-24
    factor = np.eye(2, dtype=np.float32)[None]
    factor[0, 0, 1] = -share
    x = np.float32([[7, 7], [error, second]])
    for backend in BACKENDS:
        coded = quantize(x, PLAIN, backend, feedback=Feedback([[0, 1]], factor))
        assert coded.codes[1].tolist() == [0, 0]


def test_what_leaves_float32_is_coded_plainly() -> None:
    """F1: w is the direction again where it is infinite or NaN."""
    factor = np.eye(3, dtype=np.float32)[None]
    factor[0, 0, 1:] = [-3e38, 0]
    x = np.float32([[7e30, 7e30, 7e30], [2.5e30, 1e30, 2e30]])
    for backend in BACKENDS:
        coded = quantize(x, Scheme(separate_norm=False, scale_dtype="float32"), backend,
                         feedback=Feedback([[0, 1, 2]], factor))  # fmt: skip
        assert coded.codes[1].tolist() == [2, 1, 2]


@settings(max_examples=100)
@given(inputs(), schemes(), st.data())
def test_identity_is_plain_rounding(x: Array, scheme: Scheme, data: st.DataObject) -> None:
    """F1: where no error moves, all bytes are those without feedback.

    But for fourth powers (S4), and a gain (M2) that is made of errors and not of what is left.
    """
    if scheme.axis == "channel":
        scheme = replace(scheme, scale_rule="range")
    if scheme.magnitude == "gain":
        scheme = replace(scheme, magnitude="norm")
    feedback = given_to(x, data, kinds=["identity"])
    try:
        plain = quantize(x, scheme)
    except RangeError:
        with pytest.raises(RangeError):
            quantize(x, scheme, feedback=feedback)
        return
    fed = quantize(x, scheme, feedback=feedback)
    for name, part in plain.parts.items():
        assert fed.parts[name].tobytes() == part.tobytes(), name


@pytest.mark.parametrize("size", [1e-200, 1, 3.7, 1e200])
def test_queries_without_a_preference_give_the_identity(size: float) -> None:
    """F1: a moment that is a multiple of the identity."""
    feedback = Feedback.from_moment(size * np.stack([np.eye(5)] * 2))
    assert feedback.order.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert feedback.factor.tobytes() == np.stack([np.eye(5, dtype=np.float32)] * 2).tobytes()


@settings(max_examples=60)
@given(inputs(), schemes(), st.data())
def test_what_is_made_of_plain_directions(x: Array, scheme: Scheme, data: st.DataObject) -> None:
    """F1 N1 O1 S1 S2: before any error moves, and with axis token scales too."""
    feedback = given_to(x, data)
    try:
        plain, fed = quantize(x, scheme), quantize(x, scheme, feedback=feedback)
    except RangeError:
        assume(False)
    names = {"outlier_index", "sinks"} | ({"norm"} if scheme.magnitude == "norm" else set())
    names |= {"scale", "zero"} if scheme.axis == "token" else set()
    for name in names & plain.parts.keys():
        assert fed.parts[name].tobytes() == plain.parts[name].tobytes(), name


@settings(max_examples=60)
@given(tensors(max_tokens=6, max_head_dim=6, leading=()), schemes(axis="channel"), st.data())
def test_scales_of_channels_are_made_of_what_is_coded(
    x: Array, scheme: Scheme, data: st.DataObject
) -> None:
    """F1 S1 S2: each block's extents of w, which no code of a range then leaves."""
    scheme = replace(
        scheme, scale_rule="range", scale_dtype="float32", block_size=2, sink_tokens=0,
        outlier_channels=0,
    )  # fmt: skip
    feedback = given_to(x[None], data)
    try:
        coded = quantize(x[None], scheme, feedback=feedback)
    except RangeError:
        assume(False)
    w = np.float32(oracle.encode(x, scheme, feedback.head(0))["coded"])
    assert coded.scale is not None
    for block, rows in enumerate(np.split(w, range(2, len(w), 2))):
        low, high = rows.min(axis=0), rows.max(axis=0)
        span = np.maximum(high, -low) if scheme.symmetric else high - low
        levels = np.float32(scheme.code_range[1])
        assert np.array_equal(coded.scale[0, block], span / levels)


def test_a_gain_keeps_the_length_that_queries_see() -> None:
    """F1 M2: of each key, in the metric of the moment and not in its own channels."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((32, 32)) * np.exp(rng.standard_normal(32))
    moment = second_moment(rng.standard_normal((1, 300, 32)) @ mixing, 1)
    feedback = Feedback.from_moment(moment, damping=0)
    keys = rng.standard_normal((1, 256, 32)).astype(np.float32)
    for symmetric in (True, False):
        scheme = Scheme(bits=3, symmetric=symmetric, magnitude="gain", norm_dtype="float32")
        found = dequantize(quantize(keys, scheme, feedback=feedback))
        seen, before = (
            np.sqrt(np.einsum("ti,ij,tj->t", x, moment[0], x))
            for x in (found[0].astype(float), keys[0].astype(float))
        )
        assert np.abs(seen / before - 1).max() < 2e-5
        plain = np.linalg.norm(found[0], axis=1) / np.linalg.norm(keys[0], axis=1)
        assert np.abs(plain - 1).max() > 0.05


def test_lengths_that_queries_do_not_see() -> None:
    """F1 M2 D2: a length of 0 stores 0, and one beyond float32 is refused."""
    scheme = Scheme(magnitude="gain", scale_dtype="float32", norm_dtype="float32")
    weights = np.full(6, 2.0**-149, np.float32)  # times less than a half: 0
    weights[0] = 1
    x = np.float32([[1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]])
    far = np.eye(6, dtype=np.float32)[None]
    far[0, 0, 1:] = -3e38
    for backend in BACKENDS:
        unseen = quantize(x, scheme, backend, feedback=Feedback([range(6)], np.diag(weights)[None]))
        assert unseen.norm is not None
        assert unseen.norm.tolist() == [1, 0]
        assert unseen.codes[1].any()
        assert unseen.collapsed_tokens == 1
        with pytest.raises(RangeError, match=r"the gain of token x\[0\] is beyond float32"):
            quantize(x[:1] + 1, scheme, backend, feedback=Feedback([range(6)], far))


def test_an_infinite_length_of_which_nothing_is_left() -> None:
    """F1 M2: refused like any other, and no quotient of infinity and 0."""
    scheme = Scheme(bits=2, magnitude="gain", scale_dtype="float32", norm_dtype="float32")
    factor = np.eye(32, dtype=np.float32)[None]
    factor[0, 0, 1:] = -3.4e38
    feedback = Feedback([range(32)], factor)
    x = np.zeros((3, 32), np.float32)
    x[:, 0] = [1, 0.49, 0.2]  # the second makes scales of which the third has less than a half
    x[1:, 1:] = np.sqrt((1 - np.square(x[1:, :1])) / 31)
    with np.errstate(all="ignore"):
        block = spec.encode(x, scheme, feedback.head(0))
    assert not block.codes[2].any()
    stored = oracle.encode(x, scheme, feedback.head(0))["norm"]
    assert block.norm.tolist() == stored == [math.inf, math.inf, math.inf]


def test_heads_have_their_own_and_batches_share_them() -> None:
    """F1: the axis before the tokens is that of the heads, in slabs of whatever size."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 4, 9, 8)).astype(np.float32)
    feedback = Feedback.from_queries(rng.standard_normal((4, 20, 8)) @ np.triu(np.ones((8, 8))), 4)
    for backend in BACKENDS[:2]:
        whole = quantize(x, Scheme(), backend, feedback=feedback)
        for place in np.ndindex(3, 2, 4):
            one = Feedback(*(part[None] for part in feedback.head(place[2])))
            alone = quantize(x[place], Scheme(), feedback=one)
            assert alone.packed.tobytes() == whole.packed[place].tobytes()
    with pytest.raises(ValueError, match=r"of 4 heads of 8 channels, and x has shape \[3, 9, 8\]"):
        quantize(x[0, 0, :3], feedback=feedback)
    with pytest.raises(ValueError, match="of 4 heads of 8 channels"):
        quantize(x[0, 0, 0], feedback=feedback)
    with pytest.raises(ValueError, match="of 4 heads of 8 channels"):
        quantize(x[..., :7], feedback=feedback)
    with pytest.raises(TypeError, match="feedback must be a Feedback, got HeadFeedback"):
        quantize(x, feedback=feedback.head(0))


@pytest.mark.parametrize("bits", [2, 4])
def test_queries_see_less_of_the_error(bits: int) -> None:
    """F1: what it is for. Products with the queries err less; the keys themselves more."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((32, 32)) * np.exp(rng.standard_normal(32))
    keys = rng.standard_normal((2, 256, 32)).astype(np.float32)
    queries = rng.standard_normal((6, 300, 32)) @ mixing
    feedback = Feedback.from_queries(queries, kv_heads=2)
    scheme = Scheme(bits=bits, symmetric=False, magnitude="gain", block_size=128)
    # Other queries of the same kind are what attention brings.
    others = rng.standard_normal((300, 32)) @ mixing
    seen, plain = (
        [np.mean(np.square((keys - dequantize(coded)) @ unit.T)) for unit in (others, np.eye(32))]
        for coded in (quantize(keys, scheme), quantize(keys, scheme, feedback=feedback))
    )
    assert plain[0] < 0.8 * seen[0]
    assert plain[1] > seen[1]


@pytest.mark.parametrize("dtype", DROPPED)
def test_every_float32_is_narrowed_as_numpy_has_it(dtype: str) -> None:
    """F1 O1 S3 Z1: the kernels' own rounding of scales and outlier channels."""
    narrow = np.arange(2**16, dtype=np.uint16)
    narrow = narrow.view(FLOAT_DTYPES[dtype if dtype != "float32" else "float16"])
    with np.errstate(invalid="ignore"):
        narrow = narrow[np.isfinite(narrow)].astype(np.float32)
    between = narrow[:-1] / 2 + narrow[1:] / 2  # ties
    near = [np.nextafter(between, np.float32(side)) for side in (-np.inf, np.inf)]
    last = np.float32([65519.99, 65520, 3.389e38, 3.396e38, 3.4e38, 1e-45, -0.0, np.inf])
    values = np.concatenate([narrow, between, *near, last, -last])
    with np.errstate(over="ignore"):
        expected = values.astype(FLOAT_DTYPES[dtype]).astype(np.float32) + np.float32(0)
    got = np.array([narrowed(value, DROPPED[dtype]) for value in values], np.float32)
    assert got.tobytes() == expected.tobytes()


# --- what is made of queries --------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.01, 0.5]))
def test_factor_makes_the_moment_diagonal(head_dim: int, seed: int, damping: float) -> None:
    """F1: with ones on the diagonal of F, F H F^T is diagonal, and the weights square to it."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.uniform(-2, 2, head_dim))
    queries = rng.standard_normal((1, 4 * head_dim, head_dim)) * spread
    moment = second_moment(queries, 1)
    feedback = Feedback.from_moment(moment, damping)
    order, factor = feedback.head(0)
    diagonal = np.diag(moment[0])
    assert order.tolist() == sorted(range(head_dim), key=lambda j: (-diagonal[j], j))
    damped = moment[0] + damping * diagonal.mean() * np.eye(head_dim)
    weights = np.diag(factor)
    unit = factor.astype(float)
    np.fill_diagonal(unit, 1)
    product = unit @ damped[np.ix_(order, order)] @ unit.T
    assert np.allclose(np.diag(product) / np.diag(product).max(), np.square(weights), rtol=1e-5)
    assert weights.max() == 1
    scale = np.sqrt(np.diag(product))
    off = product / scale / scale[:, None] - np.eye(head_dim)
    assert np.abs(off).max() < 1e-4
    again = Feedback.from_moment(moment * 2.0**-40, damping)
    assert again.digest == feedback.digest


def test_moments_of_texts_add_up() -> None:
    """F1: of parts of a text, of a batch, and of heads that share one."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((2, 6, 10, 4)).astype(np.float16)
    whole = second_moment(queries, 3)
    parts = [second_moment(queries[b, :, t : t + 5], 3) for b in (0, 1) for t in (0, 5)]
    assert np.allclose(sum(parts), whole, rtol=1e-12)
    exact = np.zeros((3, 4, 4))
    for b, h, t in np.ndindex(2, 6, 10):
        q = queries[b, h, t].astype(float)
        exact[h // 2] += np.outer(q, q)
    assert np.allclose(whole, exact, rtol=1e-12)
    assert Feedback.from_queries(queries, 3).digest == Feedback.from_moment(whole).digest


def test_equal_channels_are_coded_in_their_order() -> None:
    """F1: of equals the lower channel first."""
    moment = np.diag([1.0, 3, 2, 3, 2])[None]
    assert Feedback.from_moment(moment).order.tolist() == [[1, 3, 2, 4, 0]]


def test_a_feedback_belongs_to_nobody() -> None:
    factor = np.eye(2, dtype=np.float32)[None].copy()
    feedback = Feedback(np.array([[1, 0]]), factor)
    factor[0, 0, 1] = 5
    assert feedback.factor[0, 0, 1] == 0
    with pytest.raises(ValueError, match="read-only"):
        feedback.factor[0, 0, 1] = 5


EYE = np.eye(3, dtype=np.float32)[None]
MOMENT = np.eye(3)[None]


def changed(array: Array, place: tuple[int, ...], value: float) -> Array:
    other = array.copy()
    other[place] = value
    return other


@pytest.mark.parametrize(
    ("order", "factor", "kind", "message"),
    [
        ([[0, 1, 1]], EYE, ValueError, r"^order\[0\] is no permutation of the channels 0 to 2"),
        ([[0, 1, 3]], EYE, ValueError, r"^order\[0\] is no permutation"),
        ([0, 1, 2], EYE, ValueError, r"^order has shape \[3\]; give \[kv_heads, head_dim\]"),
        (np.zeros((0, 3), int), EYE, ValueError, r"^order has shape \[0, 3\]"),
        ([[0.0, 1, 2]], EYE, TypeError, r"^order has dtype float64; give integers"),
        ([[0, 1, 2]], EYE[0], ValueError, r"^factor has shape \[3, 3\]; with .* \[1, 3, 3\]"),
        ([[0, 1, 2]], EYE.astype(int), TypeError, r"^factor has dtype int"),
        (
            [[0, 1, 2]],
            changed(EYE.astype(float), (0, 0, 2), 1e39),
            ValueError,
            "] is inf; a factor",
        ),
        ([[0, 1, 2]], changed(EYE, (0, 1, 0), 1), ValueError, r"^factor\[0, 1, 0\] is 1.0; .* 0 b"),
        ([[0, 1, 2]], changed(EYE, (0, 1, 1), 2), ValueError, r"^factor\[0, 1, 1\] is 2.0; "),
        ([[0, 1, 2]], changed(EYE, (0, 1, 1), 0), ValueError, r"^factor\[0, 1, 1\] is 0.0; "),
        ([[0, 1, 2]], changed(EYE, (0, 1, 1), np.nan), ValueError, r"^factor\[0, 1, 1\] is nan"),
        ([[0, 1, 2]], changed(EYE, (0, 0, 2), np.nan), ValueError, r"^factor\[0, 0, 2\] is nan"),
        ([[0, 1, 2]], changed(EYE, (0, 0, 2), np.inf), ValueError, r"^factor\[0, 0, 2\] is inf"),
    ],
)
def test_what_is_no_feedback(order: Any, factor: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        Feedback(order, factor)


@pytest.mark.parametrize(
    ("moment", "damping", "kind", "message"),
    [
        (MOMENT[0], 0.01, ValueError, r"^moment has shape \[3, 3\]; give \[kv_heads, head_dim, h"),
        (MOMENT[:, :2], 0.01, ValueError, r"^moment has shape \[1, 2, 3\]"),
        (MOMENT.astype(int), 0.01, TypeError, r"^moment has dtype int"),
        (changed(MOMENT, (0, 2, 1), np.nan), 0.01, ValueError, r"^moment\[0, 2, 1\] is nan"),
        (changed(MOMENT, (0, 2, 1), 0.1), 0.01, ValueError, r"^moment\[0\] is not symmetric"),
        (0 * MOMENT, 0.01, ValueError, r"^the diagonal of moment\[0\] has the mean 0.0"),
        (1e308 * MOMENT, 0.01, ValueError, r"^the diagonal of moment\[0\] has the mean inf"),
        (np.ones((1, 3, 3)), 0, ValueError, r"^moment\[0\] with damping=0.0 is not positive def"),
        (-MOMENT, 0.01, ValueError, r"^the diagonal of moment\[0\] has the mean -1"),
        (MOMENT, -1, ValueError, r"^damping=-1.0 must be a finite number of at least 0"),
        (MOMENT, np.nan, ValueError, r"^damping=nan must be"),
        (MOMENT, "0.01", TypeError, r"^damping="),
    ],
)
def test_what_is_no_moment(moment: Any, damping: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        Feedback.from_moment(moment, damping)


@pytest.mark.parametrize(
    ("queries", "kv_heads", "kind", "message"),
    [
        (np.ones((4, 5)), 1, ValueError, r"^queries has shape \[4, 5\]; give \[..., heads, tok"),
        (np.ones((3, 4, 5)), 2, ValueError, r"^queries has 3 heads, which is no multiple of kv_h"),
        (np.ones((0, 4, 5)), 2, ValueError, r"^queries has 0 heads"),
        (np.ones((2, 4, 5), int), 2, TypeError, r"^queries has dtype int"),
        (
            changed(np.ones((2, 4, 5)), (1, 2, 3), np.nan),
            2,
            ValueError,
            r"^queries\[1, 2, 3\] is n",
        ),
        (np.ones((2, 4, 5)), 0, ValueError, r"^kv_heads=0 must be"),
        (np.ones((2, 0, 5)), 2, ValueError, r"^the diagonal of moment\[0\] has the mean 0.0"),
    ],
)
def test_what_are_no_queries(queries: Any, kv_heads: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        Feedback.from_queries(queries, kv_heads)


def test_few_queries_need_damping() -> None:
    """F1: one query alone, which is rank one."""
    feedback = Feedback.from_queries(np.ones((1, 1, 8)), kv_heads=1)
    assert np.isfinite(feedback.factor).all()
    with pytest.raises(ValueError, match="give more queries than channels, or damping"):
        Feedback.from_queries(np.ones((1, 1, 8)), kv_heads=1, damping=0)


# --- files --------------------------------------------------------------------------------------


def test_files_give_back_what_they_were_given(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = {
        str(layer): Feedback.from_queries(rng.standard_normal((4, 30, 6)), kv_heads=2)
        for layer in range(12)
    }
    path = tmp_path / "feedback.safetensors"
    files.save_feedback(path, layers)
    found = files.load_feedback(path)
    assert {name: one.digest for name, one in found.items()} == {
        name: one.digest for name, one in layers.items()
    }
    files.save_feedback(tmp_path / "again.safetensors", dict(reversed(found.items())))
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    with pytest.raises(files.StorageError, match=r"which nsq_ref.files.load_feedback reads"):
        files.load(path)
    with pytest.raises(files.StorageError, match=r"holds feedback for keys; .*load_feedback"):
        files.read_arrays(path)
    files.save(tmp_path / "keys.safetensors", {"keys": quantize(np.ones((4, 4), np.float32))})
    with pytest.raises(files.StorageError, match=r"which nsq_ref.files.load reads"):
        files.load_feedback(tmp_path / "keys.safetensors")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    from nsq_ref.files.containers import FEEDBACK_FORMAT, write_container

    feedback = Feedback.from_queries(np.eye(4)[None], kv_heads=1)
    path = tmp_path / "feedback.safetensors"
    files.save_feedback(path, {"0": feedback})
    whole = bytearray(path.read_bytes())
    for place in (20, len(whole) - 5):
        other = whole.copy()
        other[place] ^= 1
        path.write_bytes(bytes(other))
        with pytest.raises(files.StorageError):
            files.load_feedback(path)
    arrays = {"0.order": feedback.order, "0.factor": feedback.factor}
    wrong: list[tuple[Any, Any, str]] = [
        ({"layers": ["0"]}, {"0.order": feedback.order}, "0.factor' is missing"),
        ({"layers": ["0", "0"]}, arrays, "not a sorted list"),
        ({"layers": []}, {}, "not a sorted list"),
        ({"layers": "0"}, arrays, "lacks or adds fields"),
        ({"layers": ["0"], "more": 1}, arrays, "lacks or adds fields"),
        ({"layers": ["0"]}, arrays | {"0.order": feedback.order * 0}, "is no permutation"),
        ({"layers": ["0"]}, arrays | {"0.factor": 2 * feedback.factor}, "is 2.0; a factor"),
    ]
    for content, given_arrays, message in wrong:
        write_container(path, FEEDBACK_FORMAT, content, given_arrays)
        with pytest.raises(files.StorageError, match=message):
            files.load_feedback(path)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "feedback.safetensors"
    feedback = Feedback.from_queries(np.eye(4)[None], kv_heads=1)
    for layers, kind, message in (
        ([feedback], TypeError, "layers must map names to Feedback, got list"),
        ({}, ValueError, "layers is empty"),
        ({"0": 1}, TypeError, r"layers\['0'\] must be a Feedback, got int"),
        ({"": feedback}, ValueError, "must be printable text"),
    ):
        with pytest.raises(kind, match=message):
            files.save_feedback(path, layers)  # type: ignore[arg-type]
    assert not path.exists()


def test_oracle_takes_a_head_as_lists() -> None:
    """F1: what a port in another language would ask it."""
    feedback = Feedback.from_queries(np.float32([[[1, 2, 0], [0, 1, 3]]]), kv_heads=1)
    order, factor = feedback.head(0)
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    lists = oracle.encode(x.tolist(), replace(PLAIN, bits=2), (order.tolist(), factor.tolist()))
    arrays = oracle.encode(x, replace(PLAIN, bits=2), (order, factor))
    assert lists == arrays
    assert lists["coded"] != lists["direction"]


def test_moments_that_cannot_be_added_or_used() -> None:
    one = Moments({0: np.eye(4)[None]})
    other = Moments({1: np.eye(8)[None], 0: one.layers[0]})
    total = (one + other).layers
    assert (list(total), total[0][0, 0, 0], total[1][0, 0, 0]) == ([0, 1], 2, 1)
    with pytest.raises(ValueError, match=r"layer 0 has moments of shapes \[1, 4, 4\] and \[2, 4"):
        one + Moments({0: np.eye(4)[None].repeat(2, 0)})
    with pytest.raises(TypeError, match="unsupported operand"):
        one + {0: np.eye(4)[None]}  # type: ignore[operator]
    with pytest.raises(TypeError, match="layers must map numbers of layers to moments, got list"):
        Moments([np.eye(4)[None]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a layer of layers='0' is not an integer"):
        Moments({"0": np.eye(4)[None]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"^layers\[2\] has shape \[4, 4\]; give \[kv_heads"):
        Moments({2: np.eye(4)})
    with pytest.raises(ValueError, match=r"^layer 3: the diagonal of moment\[0\] has the mean 0"):
        Moments({3: np.zeros((1, 4, 4))}).feedback()

"""Key feedback: what is made of queries, and what coding with it does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings

from nsq_ref import Feedback, Quantized, RangeError, Scheme, dequantize, files, oracle, quantize
from nsq_ref.codec import Backend
from nsq_ref.feedback import Moments, second_moment
from nsq_ref.kernels.feedback import LANES, through_float16
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
@pytest.mark.parametrize("tokens", [1, LANES, 2 * LANES + 3, 200])
def test_whole_heads(name: str, tokens: int) -> None:
    """F1 B1 K1: kernels take tokens in groups, blocks and slabs of many heads."""
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((2, 3, tokens, 64)) * np.exp(rng.standard_normal(64))
    x[0, 1, tokens // 2] = 0
    mixed = rng.standard_normal((6, 50, 64)) @ rng.standard_normal((64, 64))
    feedback = Feedback.from_queries(mixed, kv_heads=3)
    require_equal_bits(x, WHOLE[name], feedback, ("numpy", "numba"))


def test_a_token_by_hand() -> None:
    """F1: every step of one token, with a tie, a clamp, an outlier channel and a zero token."""
    factor = np.eye(4, dtype=np.float32)[None]
    factor[0, 0, 1:] = [-1.0, 0.5, 2.0]
    factor[0, 1, 2:] = [4.0, 0.25]
    factor[0, 2, 3] = 1.0
    feedback = Feedback([[1, 3, 0, 2]], factor)
    # Channel 2 is the outlier channel; 7 is the greatest code and the scale is 1.
    x = np.float32([[7, 7, 1000, 7], [1, 2.5, 3.25, 7], [0, 0, 0, 0]])
    scheme = Scheme(separate_norm=False, outlier_channels=1)
    # Channel 1: 2.5, a tie, gets 2; 0.5 goes on. Channel 3: 7 + 0.5, clamped to 7; 0.5 goes on.
    # Channel 0: 1 - 0.25 - 2 = -1.25 gets -1; -0.25 goes on. Channel 2: 3.25 - 1 - 0.125 + 0.25.
    for backend in BACKENDS:
        coded = quantize(x, scheme, backend, feedback=feedback)
        assert coded.codes.tolist() == [[7, 7, 0, 7], [-1, 2, 0, 7], [0, 0, 0, 0]]
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
    """F1: where no error moves, all bytes are those without feedback."""
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
def test_scales_and_norms_are_those_of_plain_directions(
    x: Array, scheme: Scheme, data: st.DataObject
) -> None:
    """F1 N1 O1 S1 S2: chosen before any error moves."""
    feedback = given_to(x, data)
    try:
        plain, fed = quantize(x, scheme), quantize(x, scheme, feedback=feedback)
    except RangeError:
        assume(False)
    names = {"scale", "zero", "outlier_index", "sinks"}
    names |= {"norm"} if scheme.magnitude == "norm" else set()
    for name in names & plain.parts.keys():
        assert fed.parts[name].tobytes() == plain.parts[name].tobytes(), name


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


def test_every_float32_goes_through_float16_as_numpy_has_it() -> None:
    """F1 O1: the kernels' own rounding of outlier channels."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].astype(np.float32)
    between = (halves[:-1] + halves[1:]) / 2  # ties
    near = [np.nextafter(between, np.float32(side)) for side in (-np.inf, np.inf)]
    values = np.concatenate([halves, between, *near, np.float32([65519.99, 65520, 3e38, 1e-45])])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    got = np.array([through_float16(value) for value in values], np.float32)
    assert np.array_equal(got, expected)


# --- what is made of queries --------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.01, 0.5]))
def test_factor_makes_the_moment_diagonal(head_dim: int, seed: int, damping: float) -> None:
    """F1: F H F^T is diagonal, which with ones on F's own diagonal makes F the one of the rule."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.uniform(-2, 2, head_dim))
    queries = rng.standard_normal((1, 4 * head_dim, head_dim)) * spread
    moment = second_moment(queries, 1)
    feedback = Feedback.from_moment(moment, damping)
    order, factor = feedback.head(0)
    diagonal = np.diag(moment[0])
    assert order.tolist() == sorted(range(head_dim), key=lambda j: (-diagonal[j], j))
    damped = moment[0] + damping * diagonal.mean() * np.eye(head_dim)
    product = factor.astype(float) @ damped[np.ix_(order, order)] @ factor.astype(float).T
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

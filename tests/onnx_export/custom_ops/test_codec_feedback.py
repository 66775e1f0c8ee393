"""The native Quantize with feedback, on every instruction set, beside the reference (F1)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings

import nsq_ref as nsq
from nsq_ref import Feedback, Scheme, strategies
from nsq_ref.codec import PARTS
from onnx_export.operators import quantize_model, scheme_attributes
from onnx_export.operators.nodes import Nodes
from onnx_export.operators.schema import ELEMENTS, QUANTIZE
from tests.support.native_calls import PART_TYPES, Session
from tests.support.onnx_runners import model_of
from tests.support.processors import CPUS, sessions_on

Array = npt.NDArray[Any]


def sessions_of(
    scheme: Scheme, dtype: Any, feedback: Feedback | None, threads: int = 1
) -> Iterator[tuple[str, Session]]:
    """A session on each instruction set, with nothing but the library to answer."""
    model = quantize_model(scheme, dtype, feedback=feedback)
    del model.functions[:]
    for cpu in CPUS:
        with sessions_on(cpu):
            yield cpu, Session(model, threads)


def assert_agrees(scheme: Scheme, x: Array, feedback: Feedback | None, threads: int = 1) -> None:
    """Both quantize `x` to the same bytes on every instruction set, or both refuse it."""
    try:
        expected = nsq.quantize(x, scheme, feedback=feedback).parts
    except nsq.RangeError:
        for _, session in sessions_of(scheme, x.dtype.name, feedback, threads):
            with pytest.raises(RuntimeError, match=r"\(rule \w\d\)"):
                session.run({"x": x})
        return
    for cpu, session in sessions_of(scheme, x.dtype.name, feedback, threads):
        got = session.run({"x": x})
        assert got.keys() == expected.keys(), cpu
        for name, part in expected.items():
            assert (got[name].shape, got[name].dtype) == (part.shape, part.dtype), (name, cpu)
            assert got[name].tobytes() == part.tobytes(), (name, cpu)


# --- bytes --------------------------------------------------------------------------------------


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(
    strategies.tensors(max_tokens=40, max_head_dim=40, dtypes=("float32", "float16", "bfloat16")),
    strategies.schemes(),
    st.data(),
)
def test_every_scheme(x: Array, scheme: Scheme, data: st.DataObject) -> None:
    """F1 and all rules around it: equal bytes or refused."""
    kv_heads = data.draw(st.sampled_from([1, x.shape[-3] if x.ndim > 2 else 1]))
    assert_agrees(scheme, x, data.draw(strategies.feedbacks(kv_heads, x.shape[-1])))


SCHEMES = {
    "streaming4": Scheme.named("streaming4"),
    "2 bits, search": Scheme(bits=2, symmetric=False, scale_rule="search", magnitude="gain"),
    "token": Scheme(bits=3, axis="token", symmetric=False, magnitude="lsq", block_size=70),
    "3 bits, search": Scheme(bits=3, scale_rule="search", outlier_channels=2, block_size=70),
    "blocks of a token": Scheme(bits=3, symmetric=False, magnitude="gain", block_size=1),
    "outliers": Scheme(bits=3, outlier_channels=3, block_size=50, separate_norm=False),
    "token with outliers": Scheme(axis="token", outlier_channels=3, block_size=50, sink_tokens=2),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_whole_heads(name: str) -> None:
    """F1 B1 K1: work is cut into tasks and vectors of tokens, which do not show in the bytes."""
    rng = np.random.default_rng(0)
    for tokens, head_dim in ((1, 128), (67, 64), (300, 72), (130, 3), (9, 1)):
        x = rng.standard_normal((2, 3, tokens, head_dim), dtype=np.float32)
        x *= np.exp(rng.standard_normal(head_dim)).astype(np.float32)
        x[1, 2, tokens // 2] = 0
        mixed = rng.standard_normal((6, 50, head_dim)) @ rng.standard_normal((head_dim, head_dim))
        for kv_heads in (1, 3):
            feedback = Feedback.from_queries(mixed, kv_heads)
            assert_agrees(SCHEMES[name], x, feedback, threads=2)


def test_ties_and_what_a_fused_operation_would_change() -> None:
    """F1: the product rounds, then the difference; many of both decide a tie."""
    rng = np.random.default_rng(0)
    factor = np.triu(rng.standard_normal((1, 64, 64)), 1).astype(np.float32) + np.eye(
        64, dtype=np.float32
    )
    x = rng.integers(-14, 15, (200, 64)).astype(np.float32) / 2
    x[0] = 7
    for order in (np.arange(64), rng.permutation(64)):
        scheme = Scheme(separate_norm=False, scale_dtype="float32")
        assert_agrees(scheme, x, Feedback(order[None], factor))
        assert_agrees(scheme, x, Feedback(order[None], np.round(4 * factor) / 4))


def test_where_float32_ends() -> None:
    """F1: w is the direction again where it is infinite or NaN; with scale 0 its code is 0."""
    factor = np.triu(np.float32([[[1, -3e38, 3e38], [0, 1, 1], [0, 0, 1]]]))
    x = np.float32([[7e30, 3e38, 7e30], [2.5e30, 3e38, 2e30], [1.5, 3e38, 1e30]])
    for symmetric in (False, True):
        scheme = Scheme(separate_norm=False, scale_dtype="float32", symmetric=symmetric)
        assert_agrees(scheme, x, Feedback([[0, 1, 2]], factor))
    # An error of 30 moves 3e38 to 6e37 and one of -50 to 7e38, which is beyond float32.
    factor = np.eye(4, dtype=np.float32)[None]
    factor[0, :2, 2] = [8e36, 5e36]
    x = np.float32([[0, 0, 3e38, 9], [450, 450, 3e38, 1], [90, 180, 3e38, 5], [220, 20, 3e38, 2]])
    two_bits = Scheme(bits=2, separate_norm=False, scale_dtype="float32", symmetric=False)
    for scheme in (two_bits, replace(two_bits, scale_rule="search")):
        assert_agrees(scheme, x, Feedback([[0, 1, 2, 3]], factor))


@pytest.mark.parametrize(("weight", "refused"), [(1e-42, False), (1e-30, False), (1, True)])
def test_lengths_where_float32_ends(weight: float, refused: bool) -> None:
    """F1 M2: what queries see is the direction again where it is infinite or NaN.

    The first channels have no error, but what is seen of them leaves float32 in those behind. With
    a weight of 1 lengths do, too, and are refused.
    """
    rng = np.random.default_rng(0)
    factor = np.triu(rng.standard_normal((1, 7, 7)), 1).astype(np.float32)
    factor[0, :3, 3:] = rng.choice([-3e38, 3e38], (3, 4))
    factor[0, range(7), range(7)] = weight
    sizes = np.float32([[2, 2, 2, 2, 0, 0, 0], [2, 2, 2, 1, 1, 1, 1]]) / 4  # of norm 1
    x = np.tile(sizes, (20, 1)) * rng.choice([np.float32(-1), np.float32(1)], (40, 7))
    scheme = Scheme(bits=2, magnitude="gain", norm_dtype="float32")
    feedback = Feedback(np.arange(7)[None], factor)
    with pytest.raises(nsq.RangeError) if refused else contextlib.nullcontext():
        assert len(set(nsq.quantize(x, scheme, feedback=feedback).parts["norm"].tolist())) > 3
    assert_agrees(scheme, x, feedback)


def test_weights_of_all_sizes() -> None:
    """F1 M2: each channel's weight; subnormal ones, and products that vanish, too."""
    rng = np.random.default_rng(0)
    feedback = Feedback.from_queries(rng.standard_normal((2, 90, 24)), 2)
    factor = feedback.factor.copy()
    for low in (1, 9, 30, 44):
        weights = 10.0 ** -rng.uniform(0, low, (2, 24))
        factor[:, range(24), range(24)] = np.maximum(weights, 1e-45)
        for symmetric in (True, False):
            scheme = Scheme(
                magnitude="gain", symmetric=symmetric, block_size=32, norm_dtype="float32"
            )
            x = rng.standard_normal((2, 70, 24)).astype(np.float32)
            assert_agrees(scheme, x, Feedback(feedback.order, factor))


@pytest.mark.parametrize(("times", "m", "n"), [(1, 4096, 1), (3, 2000, 1265)])
def test_lengths_half_way_between_two_floats(times: int, m: int, n: int) -> None:
    """F1 N1: a length of 25 bits goes to the even neighbour, once down and once up."""
    a, b = (np.ldexp(np.float32(times * side), -25) for side in (m * m - n * n, 2 * m * n))
    assert times * (m * m + n * n) % 2 == 1
    x = np.float32([[1, 0], [0.6, 0.8], [0.6, -0.3]])  # the first is seen as (a, b)
    scheme = Scheme(
        bits=3, symmetric=False, magnitude="gain", scale_dtype="float32", norm_dtype="float32"
    )
    assert_agrees(scheme, x, Feedback([[0, 1]], np.float32([[[a, -b], [0, 1]]])))


@pytest.mark.parametrize("magnitude", ["norm", "gain", "lsq"])
def test_nothing_moves_in_a_zero_token(magnitude: Literal["norm", "gain", "lsq"]) -> None:
    """F1 N2 O1: not even into an outlier channel, which would show it."""
    x = np.float32([[3, 4, 12], [0, 0, 0], [-3, 2, 1]])
    feedback = Feedback([[0, 1, 2]], np.triu(np.ones((1, 3, 3), np.float32)))
    assert_agrees(Scheme(symmetric=False, outlier_channels=1, magnitude=magnitude), x, feedback)


# --- refusals -----------------------------------------------------------------------------------

GOOD = Feedback.from_queries(np.random.default_rng(0).standard_normal((3, 9, 4)), 3)


def changed(array: Array, at: tuple[int, ...], value: float) -> Array:
    copy = array.copy()
    copy[at] = value
    return copy


def run_given(x: Array, **given: Array) -> dict[str, Array]:
    """Run one node of Quantize with what is given of ``order`` and ``factor``."""
    feeds = {"x": x, **given}
    kinds = {name: ELEMENTS[array.dtype.name] for name, array in feeds.items()}
    made = {name: PART_TYPES[name] for name in PARTS[:3]}
    add = Nodes()
    names = {name: name for name in feeds}
    add.call(QUANTIZE, names, {name: name for name in made}, **scheme_attributes(Scheme()))
    return Session(model_of(add.nodes, kinds, made)).run(feeds)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"order": None}, "factor is given without order; give both, or neither"),
        ({"factor": None}, "order is given without factor; give both, or neither"),
        ({"order": GOOD.order[0]}, r"order has shape \[4\], expected 2 axes"),
        ({"order": GOOD.order[:2]}, r"order has shape \[2, 4\], expected \[3, 4\]"),
        ({"order": GOOD.order[:0]}, r"order has shape \[0, 4\], expected \[3, 4\]"),
        ({"order": GOOD.order[:1]}, r"factor has shape \[3, 4, 4\], expected \[1, 4, 4\]"),
        ({"order": GOOD.order[:, :3]}, r"order has shape \[3, 3\], expected \[3, 4\]"),
        ({"factor": GOOD.factor[..., :3]}, r"factor has shape \[3, 4, 3\], expected \[3, 4, 4\]"),
        ({"factor": GOOD.factor[0]}, r"factor has shape \[4, 4\], expected \[3, 4, 4\]"),
        ({"order": changed(GOOD.order, (2, 3), 4)}, r"order\[2, 3\] is channel 4, which is none"),
        ({"order": changed(GOOD.order, (1, 0), -1)}, r"order\[1, 0\] is channel -1, which is none"),
        ({"order": changed(GOOD.order, (2, 3), 2**31 - 1)}, r"order\[2, 3\] is channel 2147483647"),
        ({"order": changed(GOOD.order, (1, 3), GOOD.order[1, 0])}, r"order\[1, 3\] .* there twice"),
        ({"factor": changed(GOOD.factor, (2, 1, 3), np.nan)}, r"factor\[2, 1, 3\] is -?nan; a fac"),
        ({"factor": changed(GOOD.factor, (0, 0, 1), -np.inf)}, r"factor\[0, 0, 1\] is -inf"),
        ({"factor": changed(GOOD.factor, (1, 2, 2), 0)}, r"factor\[1, 2, 2\] is 0; .* above 0 and"),
        ({"factor": changed(GOOD.factor, (1, 2, 2), -0.5)}, r"factor\[1, 2, 2\] is -0.5"),
        ({"factor": changed(GOOD.factor, (1, 2, 2), 1 + 2**-23)}, r"2, 2\] is 1.00000012; a fac"),
        ({"factor": changed(GOOD.factor, (2, 3, 3), np.nan)}, r"factor\[2, 3, 3\] is -?nan"),
        ({"factor": changed(GOOD.factor, (0, 0, 0), np.inf)}, r"factor\[0, 0, 0\] is inf"),
        ({"factor": changed(GOOD.factor, (1, 3, 0), 0.5)}, r"factor\[1, 3, 0\] is 0.5"),
    ],
)  # fmt: skip
def test_malformed_feedback(given: dict[str, Array | None], says: str) -> None:
    """F1: nothing is read past a tensor; the error names the input and the place."""
    x = np.ones((2, 3, 5, 4), np.float32)
    feeds = {"order": GOOD.order, "factor": GOOD.factor, **given}
    present = {name: array for name, array in feeds.items() if array is not None}
    with pytest.raises(RuntimeError, match=says):
        run_given(x, **present)


def test_zeros_below_the_diagonal_have_either_sign() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
    negative = np.where(np.tri(4, k=-1, dtype=bool), np.float32(-0.0), GOOD.factor)
    got = run_given(x, order=GOOD.order, factor=negative)
    assert got["packed"].tobytes() == nsq.quantize(x, feedback=GOOD).packed.tobytes()

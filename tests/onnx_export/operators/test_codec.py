"""nsq.Quantize and nsq.Dequantize in standard operators: the reference's bytes, everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import assume, given, settings
from onnx import TensorProto, helper

import nsq_ref as nsq
from nsq_ref import Scheme, strategies
from nsq_ref.codec import PARTS
from onnx_export.operators import (
    DOMAIN,
    dequantize_model,
    functions,
    quantize_model,
    scheme_attributes,
)
from tests.support.balance import (
    are_balanced,
    keys_of_two_kinds,
    order_of_tokens,
    without_balance,
)
from tests.support.onnx_runners import RUNNERS, Run, model_of, without_optimization
from tests.support.rows import norm_order, norm_ties

Array = npt.NDArray[Any]
FLOAT = TensorProto.FLOAT


@pytest.fixture(scope="module", params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> Callable[[onnx.ModelProto], Run]:
    return RUNNERS[request.param]


def assert_same(got: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert got.keys() == expected.keys()
    for name, part in expected.items():
        assert (name, got[name].dtype, got[name].shape) == (name, part.dtype, part.shape)
        assert (name, got[name].tobytes()) == (name, part.tobytes())


def assert_agrees(runner: Callable[[onnx.ModelProto], Run], x: Array, scheme: Scheme) -> None:
    """Both directions give the bytes of the reference."""
    q = nsq.quantize(x, scheme)
    assert_same(runner(quantize_model(scheme, x.dtype.name))({"x": x}), q.parts)
    decode = runner(dequantize_model(scheme, x.dtype.name))
    x_hat = decode({**q.parts, "shape": np.array(x.shape, np.int32)})
    assert_same(x_hat, {"x_hat": nsq.dequantize(q)})


# --- every scheme -------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    strategies.tensors(max_head_dim=70, dtypes=("float32", "float16", "bfloat16")),
    strategies.schemes(),
)
def test_every_scheme(runner: Callable[[onnx.ModelProto], Run], x: Array, scheme: Scheme) -> None:
    """N1 N2 S1 S2 S3 S4 O1 Q1 Q2 P1 M1 M2 M3 D1 Z1 I1 K1 B1. Whatever is not refused."""
    try:
        nsq.quantize(x, scheme)
    except nsq.RangeError:
        assume(False)
    assert_agrees(runner, x, scheme)


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (1, 1, 2, 3, 5), (3, 130)])
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(sink_tokens=3, bits=3, magnitude="lsq", scale_rule="search"),
        Scheme(sink_tokens=1, axis="token", symmetric=False, magnitude="gain", outlier_channels=4),
        Scheme(sink_tokens=3, separate_norm=False, outlier_channels=200, block_size=2),
    ],
    ids=["lsq", "token", "outliers"],
)
def test_ends_of_the_shapes(
    runner: Callable[[onnx.ModelProto], Run], shape: tuple[int, ...], scheme: Scheme
) -> None:
    """K1 B1 P1 O1. No token after the sinks, one channel, and more outliers than channels."""
    x = np.random.default_rng(0).standard_normal(shape).astype(ml_dtypes.bfloat16)
    assert_agrees(runner, x, scheme)


def test_equal_outlier_channels(runner: Callable[[onnx.ModelProto], Run]) -> None:
    """O1. Of equals the lower index, and of a difference in the last bit the larger."""
    x = np.zeros((1, 6, 9), np.float32)
    x[0, :, 2:8] = 1
    x[0, 1, 7] = x[0, 4, 5] = np.nextafter(np.float32(1), np.float32(2))
    x[0, 3, :] = [2.0**-149, *[0.0] * 8]
    for bits in (2, 3, 4, 8):
        scheme = Scheme(bits=bits, separate_norm=False, outlier_channels=3, scale_dtype="float32")
        q = nsq.quantize(x, scheme)
        assert q.outlier_index is not None
        assert q.outlier_index.ravel().tolist() == [2, 5, 7]
        assert_agrees(runner, x, scheme)
        assert_agrees(runner, x[:, 3:4], scheme)


def test_search_sums_in_the_order_of_the_tokens(
    runner: Callable[[onnx.ModelProto], Run],
) -> None:
    """S4. Where the errors of two ranges are nearly equal, the order of the sum decides."""
    options = {"separate_norm": False, "scale_rule": "search", "scale_dtype": "float32"}
    scheme = Scheme(bits=2, **options)
    drawn = np.random.default_rng(0).integers(-9, 10, (24, 1 << 16)).astype(np.float32) / 3
    turned = nsq.quantize(drawn, scheme).scale != nsq.quantize(drawn[::-1], scheme).scale
    x = drawn[:, np.flatnonzero(turned)]
    assert x.shape[1] > 4
    for tokens in (x, x[::-1]):
        assert_agrees(runner, tokens, scheme)
        assert_agrees(runner, tokens.T, Scheme(bits=2, axis="token", **options))
    longer = drawn[:, :64]  # its last block is short
    assert_agrees(runner, longer, Scheme(scale_rule="search", block_size=16))


def test_stored_norms_at_ties(runner: Callable[[onnx.ModelProto], Run]) -> None:
    """N1. Of one token and of many, with the exact path taken by some of them."""
    assert_agrees(runner, norm_ties()[2:3], Scheme(norm_dtype="float32"))
    x = np.concatenate([norm_order()[:, :5], norm_ties()])
    for magnitude in ("norm", "gain", "lsq"):
        scheme = Scheme(norm_dtype="float32", scale_dtype="float32", magnitude=magnitude)
        assert_agrees(runner, x, scheme)


BALANCED = Scheme(
    norm_rule="balanced", magnitude="gain", scale_dtype="float32", norm_dtype="float32"
)


@pytest.mark.parametrize("magnitude", ["gain", "lsq"])
def test_balanced_norms(
    runner: Callable[[onnx.ModelProto], Run], magnitude: Literal["gain", "lsq"]
) -> None:
    """N3 M2 M3. Blocks with them and without, after sinks, and a short one that is filled up."""
    x = keys_of_two_kinds(tokens=14, channels=12)
    scheme = replace(BALANCED, magnitude=magnitude, block_size=5, sink_tokens=1)
    assert are_balanced(x, scheme).tolist() == [[True] * 3, [False] * 3]
    assert_agrees(runner, x, scheme)
    searched = replace(scheme, bits=2, symmetric=False, scale_rule="search", outlier_channels=1)
    assert_agrees(runner, x, searched)


def test_where_plain_norms_stay(runner: Callable[[onnx.ModelProto], Run]) -> None:
    """N3. No range that grows, and norms that are infinite, are no gain."""
    for x in without_balance().values():
        assert not are_balanced(x, BALANCED).any()
        assert_agrees(runner, x, BALANCED)


def test_spreads_are_summed_in_the_order_of_the_tokens(
    runner: Callable[[onnx.ModelProto], Run],
) -> None:
    """N3. Where both are nearly equal, the order of the sum decides, and what fills up a block."""
    x = order_of_tokens()
    for tokens, balanced in ((x, True), (x[:, ::-1], False)):
        assert are_balanced(tokens, BALANCED).item() == balanced
        assert_agrees(runner, tokens, BALANCED)
    longer = np.concatenate([x[:, :1], x, x], axis=1)  # its last block is short by one token
    scheme = replace(BALANCED, block_size=x.shape[1] + 1)
    assert are_balanced(longer, scheme).all()
    assert_agrees(runner, longer, scheme)


def test_attributes_default_to_the_default_scheme() -> None:
    """The attributes are those of `Scheme()` where a node has none."""
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    outputs = [name if name in ("packed", "scale", "norm") else "" for name in PARTS]
    node = helper.make_node("Quantize", ["x"], outputs, domain=DOMAIN)
    kinds = {"packed": TensorProto.UINT8, "scale": FLOAT, "norm": FLOAT}
    got = without_optimization(model_of([node], {"x": FLOAT}, kinds, functions()))({"x": x})
    q = nsq.quantize(x)
    assert q.norm is not None
    assert got["packed"].tobytes() == q.packed.tobytes()
    assert got["scale"].tobytes() == q.scale.astype(np.float32).tobytes()
    assert got["norm"].tobytes() == q.norm.astype(np.float32).tobytes()


def test_what_is_not_stored(runner: Callable[[onnx.ModelProto], Run]) -> None:
    """All outputs can be connected: those that a scheme does not store say nothing."""
    x = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    kinds = dict(zip(PARTS, (TensorProto.UINT8, FLOAT, FLOAT, FLOAT, 6, 10, FLOAT), strict=True))
    scheme = Scheme(separate_norm=False)
    node = helper.make_node(
        "Quantize", ["x", "", ""], list(PARTS), domain=DOMAIN, **scheme_attributes(scheme)
    )
    got = runner(model_of([node], {"x": FLOAT}, kinds, functions()))({"x": x})
    assert got["packed"].tobytes() == nsq.quantize(x, scheme).packed.tobytes()
    assert (got["norm"] == 1).all()
    assert (got["zero"] == 0).all()
    shapes = {name: got[name].shape for name in ("outlier_index", "outliers", "sinks")}
    assert shapes == {"outlier_index": (2, 1, 0), "outliers": (2, 5, 0), "sinks": (2, 0, 6)}

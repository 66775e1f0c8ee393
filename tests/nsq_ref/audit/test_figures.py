"""What is planted is found where it was planted, whatever the scale and the order of heads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsq_ref.audit import Audit, audit
from nsq_ref.audit.figures import SideFigures, side_figures
from nsq_ref.audit.findings import THRESHOLDS
from nsq_ref.audit.layers import Layer
from nsq_ref.audit.sinks import sinks_of
from nsq_ref.dtypes import Float32
from nsq_ref.metrics import outlier_ratio
from tests.support import audit_by_loops

LAYERS, HEADS, TOKENS, WIDTH = 3, 4, 48, 32
PLACES = st.tuples(
    st.integers(0, LAYERS - 1), st.integers(0, HEADS - 1), st.integers(0, WIDTH - 1),
    st.integers(0, 2**32 - 1),
)  # fmt: skip


def plain(seed: int) -> tuple[Float32, Float32]:
    """Keys and values of which nothing stands out."""
    random = np.random.default_rng(seed)
    shape = (LAYERS, 1, HEADS, TOKENS, WIDTH)
    return (
        random.standard_normal(shape, dtype=np.float32),
        random.standard_normal(shape, dtype=np.float32),
    )


def found(keys: Float32, values: Float32) -> Audit:
    return audit(keys, values, schemes=["naive4"])


@settings(max_examples=15)
@given(PLACES, st.sampled_from(["key", "value"]), st.floats(18, 1e4))
def test_an_outlier_channel(place: tuple[int, int, int, int], side: str, times: float) -> None:
    layer, head, channel, seed = place
    sides = dict(zip(("key", "value"), plain(seed), strict=True))
    head_of = sides[side][layer, 0, head]
    others = np.abs(np.delete(head_of, channel, axis=1)).max(axis=0)
    # A ratio that is known: the peak over the mean of all.
    head_of[:, channel] *= times * others.max() / np.abs(head_of[:, channel]).max()
    peak = times * others.max()
    ratio = peak / ((peak + others.sum()) / WIDTH)
    result = found(sides["key"], sides["value"])
    outliers = [one for one in result.findings if one.kind == "outlier channel"]
    assert [one[1:5] for one in outliers] == [(side, layer, head, channel)]
    assert outliers[0].figure == pytest.approx(ratio, rel=1e-5)
    assert result.modes[0].by_ratio == (side == "key" and layer == 0 and ratio >= 15)


@settings(max_examples=15)
@given(PLACES, st.sampled_from(["key", "value"]), st.floats(12, 1e3), st.sampled_from([-1, 1]))
def test_a_bias(place: tuple[int, int, int, int], side: str, deviations: float, sign: int) -> None:
    layer, head, channel, seed = place
    sides = dict(zip(("key", "value"), plain(seed), strict=True))
    one = sides[side][layer, 0, head, :, channel].astype(np.float64)
    one = (one - one.mean()) / one.std() + sign * deviations
    sides[side][layer, 0, head, :, channel] = one
    biases = [
        one
        for one in found(**{f"{k}s": v for k, v in sides.items()}).findings
        if one.kind == "bias"
    ]
    assert [one[1:5] for one in biases] == [(side, layer, head, channel)]
    assert biases[0].figure == pytest.approx(deviations, rel=1e-3)


@settings(max_examples=15)
@given(
    st.integers(0, LAYERS - 1), st.integers(0, TOKENS - 1), st.integers(0, 2**32 - 1),
    st.one_of(st.floats(1e-3, 0.2), st.floats(5, 1e3)), st.sampled_from(["key", "value"]),
)  # fmt: skip
def test_a_sink_by_its_norm(layer: int, token: int, seed: int, times: float, side: str) -> None:
    sides = dict(zip(("key", "value"), plain(seed), strict=True))
    sides[side][layer, :, :, token] *= times
    sinks = found(**{f"{k}s": v for k, v in sides.items()}).sinks
    assert [(sink.layer, sink.token, sink.by) for sink in sinks] == [(layer, token, f"{side} norm")]
    assert sinks[0].figure == pytest.approx(times, rel=0.5)


def test_a_token_that_stands_out_in_few_heads_is_no_sink() -> None:
    keys, values = plain(2)
    keys[1, :, :2, 7] *= 0.05  # of two heads of four
    assert found(keys, values).sinks == ()
    keys[1, :, 2, 7] *= 0.05
    assert [sink[:2] for sink in found(keys, values).sinks] == [(1, 7)]


def test_a_sink_by_its_attention() -> None:
    keys, values = plain(3)
    queries = np.repeat(keys[::-1], 2, axis=2)
    keys[1, :, :, 5] = 0.5 * np.sign(keys[1, :, :, 5])  # its norm is not what tells
    keys[1, :, :, 5, 0] = 6
    queries[1, ..., 0] = 9
    keys[1] *= np.linalg.norm(keys[1, :, :, :1], axis=-1, keepdims=True) / np.linalg.norm(
        keys[1], axis=-1, keepdims=True
    )
    result = audit(keys, values, queries, schemes=["naive4"])
    assert [(one.layer, one.token) for one in result.sinks if one.by == "attention"] == [(1, 5)]
    assert result.queries


def test_norms_that_vary_and_those_that_do_not() -> None:
    keys, values = plain(1)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    keys[2, 0, 3] *= np.where(np.arange(TOKENS) % 2, 1, 9)[:, None]
    found_in = [one for one in found(keys, values).findings if one.kind == "norm variation"]
    assert [one[1:5] for one in found_in] == [("key", 2, 3, None)]
    assert found_in[0].figure == pytest.approx(4 / 5, rel=1e-5)
    assert side_figures(keys[0]).norm_variation.max() < 1e-6


def test_where_nothing_stands_out_it_says_so() -> None:
    result = found(*plain(0))
    assert (result.findings, result.sinks) == ((), ())
    assert result.words() == ["nothing stands out"]
    assert result.policy.to_rewrite() == {"default": "streaming4", "layers": {}}
    assert "the default; all of it is within 25%" in result.advice()[0]


FIELDS = ("outlier_ratio", "bias", "norm_variation", "norm_least", "norm_greatest")


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(-40, 40), st.permutations(range(HEADS)))
def test_scale_and_the_order_of_heads_do_not_matter(
    seed: int, exponent: int, order: list[int]
) -> None:
    x = plain(seed)[0][0]
    x[:, 1, :, 3] *= 30
    x[:, 2, 0] *= 0.05
    figures, other = side_figures(x), side_figures(x[:, order] * np.float32(2.0**exponent))
    for name in (*FIELDS, "outlier_channel", "bias_channel"):
        np.testing.assert_allclose(
            getattr(other, name), getattr(figures, name)[order], rtol=1e-9, err_msg=name
        )
    moved = sinks_of(Layer(0, x[:, order] * np.float32(2.0**exponent), x[:, order]))
    assert [(one.token, one.by) for one in moved] == [
        (one.token, one.by) for one in sinks_of(Layer(0, x, x))
    ]


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2), st.integers(2, 7), st.integers(1, 5))
def test_figures_are_those_of_plain_loops(seed: int, batch: int, tokens: int, width: int) -> None:
    random = np.random.default_rng(seed)
    x = (random.standard_normal((batch, 2, tokens, width)) + random.integers(-3, 4)).astype(
        np.float32
    )
    figures = side_figures(x)
    for head, expected in enumerate(audit_by_loops.side(x.tolist())):
        of_head = {name: getattr(figures, name)[head] for name in FIELDS}
        of_head["bias"] = of_head["bias"].max()
        for name, value in of_head.items():
            assert value == pytest.approx(expected[name], rel=1e-6), name
        assert figures.outlier_channel[head] == expected["outlier_channel"]
        assert figures.bias_channel[head] == expected["bias_channel"]
    np.testing.assert_allclose(
        figures.outlier_ratio, outlier_ratio(x.swapaxes(0, 1).reshape(2, -1, width))
    )


ADVERSARIES = {
    "constant": np.full((1, 1, 9, 5), -3.0),
    "zeros": np.zeros((2, 3, 9, 4)),
    "zero tokens": np.repeat(np.arange(10.0) % 3, 7).reshape(1, 1, 10, 7),
    "one token": np.arange(1.0, 4).reshape(1, 1, 1, 3),
    "two tokens": np.arange(8.0).reshape(1, 2, 2, 2),
    "one channel": np.arange(-20.0, 20).reshape(1, 1, 40, 1),
    "heavy tails": np.random.default_rng(0).standard_cauchy((1, 2, 300, 7)),
    "huge": np.random.default_rng(1).standard_normal((1, 2, 140, 6)) * 1e37,
    "tiny": np.random.default_rng(1).standard_normal((1, 2, 140, 6)) * 1e-40,
    "odd": np.random.default_rng(2).standard_normal((3, 5, 131, 13)),
}


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("queries", [False, True])
def test_adversaries(name: str, queries: bool) -> None:
    """No figure of any array is not a number, and none is negative."""
    x = ADVERSARIES[name].astype(np.float32)[None]
    asked = np.repeat(x / max(np.abs(x).max(), 1e-30), 2, axis=2) if queries else None
    result = audit(x, x, asked, schemes=["naive4", "nsep+pchan4", "streaming2"])
    (layer,) = result.layers
    for figures in (layer.key, layer.value):
        for field in FIELDS:
            values = getattr(figures, field)
            assert np.isfinite(values).all(), field
            assert (values >= 0).all(), field
    losses = [*layer.key_losses.values(), *layer.value_losses.values()]
    for loss in losses:
        for number in (*loss.measured, *loss.predicted, *loss.relative, loss.judged):
            assert np.isfinite(number), loss
            assert number >= 0
    assert all(loss.output_error is not None for loss in losses) == queries
    if name in ("constant", "zeros", "one token"):
        assert result.policy.is_default


def test_a_constant_channel_has_the_largest_bias() -> None:
    x = np.random.default_rng(0).standard_normal((1, 1, 50, 4)).astype(np.float32)
    x[..., 2] = 5
    figures = side_figures(x)
    assert figures.bias[0, 2] == 1e6
    assert isinstance(figures, SideFigures)
    assert figures.to_dict()["bias_channel"] == [2]
    assert THRESHOLDS["bias"] < 1e6

"""What is predicted is what a round trip measures, and what it measures is what loops say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsq_ref import Scheme
from nsq_ref.audit import Layer, audit
from nsq_ref.audit.attention import SampledAttention
from nsq_ref.audit.losses import Losses, round_trip
from nsq_ref.audit.report import SCHEMES
from nsq_ref.dtypes import Float32
from tests.support import audit_by_loops


def normal(seed: int, *shape: int) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@settings(max_examples=8)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SCHEMES), st.booleans())
def test_measured_is_what_loops_say(seed: int, name: str, with_queries: bool) -> None:
    keys, values = normal(seed, 1, 2, 9, 5), normal(seed + 1, 1, 2, 9, 5)
    queries = normal(seed + 2, 1, 4, 9, 5) + 1 if with_queries else None
    layer = Layer(0, keys, values, queries, 0.3)
    attention = SampledAttention(layer) if with_queries else None
    keys_hat, _ = round_trip(keys, Scheme.named(name))
    loss = Losses(layer, "key", attention).of(Scheme.named(name))
    # Without queries: those of unit variance, as which the unit vectors do.
    asked = np.tile(np.sqrt(5) * np.eye(5), (1, 2, 1, 1)) if queries is None else queries
    expected = audit_by_loops.logit_error(keys, keys_hat, asked, 0.3)
    np.testing.assert_allclose(loss.measured, expected, rtol=1e-6)
    if queries is not None:
        lost = audit_by_loops.attention_output_error(
            queries[0], keys[0], values[0], keys_hat[0], 0.3, list(range(9))
        )
        assert loss.output_error == pytest.approx(lost, rel=1e-6)


@pytest.mark.parametrize("name", [*SCHEMES, "nsep4", "streaming8"])
@pytest.mark.parametrize("kind", ["normal", "outlier", "bias", "norms"])
def test_predicted_is_near_what_is_measured(name: str, kind: str) -> None:
    keys, queries = normal(1, 1, 2, 700, 32), normal(2, 1, 4, 700, 32)
    if kind == "outlier":
        keys[..., 3] *= 30
        queries[..., 3] /= 30
    elif kind == "bias":
        keys[..., 3:6] += 8
    elif kind == "norms":
        keys *= np.exp(normal(3, 1, 2, 700, 1))
    loss = Losses(Layer(0, keys, keys, queries), "key").of(Scheme.named(name))
    np.testing.assert_allclose(loss.predicted, loss.measured, rtol=0.15)
    value = Losses(Layer(0, keys, keys, queries), "value").of(Scheme.named(name))
    np.testing.assert_allclose(value.predicted, value.measured, rtol=0.15)


@pytest.mark.parametrize("magnitude", ["gain", "lsq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_predicted_is_near_what_is_measured_of_balanced_norms(
    magnitude: Any, symmetric: bool
) -> None:
    """N3: the norm is no length, and a gain mends what is along a token over its sizes (M2)."""
    keys, queries = normal(1, 1, 2, 700, 4), normal(2, 1, 4, 700, 4)
    keys[..., 1] *= 30
    queries[..., 1] /= 30
    scheme = Scheme(symmetric=symmetric, magnitude=magnitude, block_size=128, norm_rule="balanced")
    loss = Losses(Layer(0, keys, keys, queries), "key").of(scheme)
    plain = Losses(Layer(0, keys, keys, queries), "key").of(replace(scheme, norm_rule="plain"))
    assert (loss.measured != plain.measured).all()
    np.testing.assert_allclose(loss.predicted, loss.measured, rtol=0.06)


def test_queries_weigh_what_they_meet() -> None:
    """An error of channels that no query looks at is no error of a logit."""
    keys, queries = normal(1, 1, 1, 200, 16), normal(2, 1, 1, 200, 16)
    keys[..., 0] *= 50
    queries[..., 0] /= 50
    blind = queries.copy()
    blind[..., 1:] = 0
    schemes = Scheme.named("naive4")
    seen = Losses(Layer(0, keys, keys, queries), "key").of(schemes)
    unseen = Losses(Layer(0, keys, keys, blind), "key").of(schemes)
    assert unseen.relative[0] < 0.1
    assert seen.relative[0] > 0.8


def test_a_bias_that_a_softmax_does_not_see_tells_no_tokens_apart() -> None:
    keys = normal(4, 1, 1, 256, 16)
    moved = keys + 100 * np.eye(16, dtype=np.float32)[3]
    one, other = (
        Losses(Layer(0, x, x), "key").of(Scheme.named("naive4")).relative[0] for x in (keys, moved)
    )
    assert other > 5 * one  # the loss is larger, and what tells tokens apart is the same


def test_the_loss_of_a_layer_does_not_depend_on_its_scale() -> None:
    x = normal(5, 2, 1, 2, 150, 8)
    first = audit(x, x, schemes=SCHEMES)
    second = audit(x * 8, x * 8, schemes=SCHEMES)
    for name in SCHEMES:
        for side in ("key", "value"):
            np.testing.assert_allclose(
                first.judged(side, name), second.judged(side, name), rtol=0.02
            )


def test_what_is_exact_loses_nothing() -> None:
    layer = Layer(0, normal(1, 2, 2, 20, 4), normal(2, 2, 2, 20, 4), normal(3, 2, 6, 20, 4))
    attention = SampledAttention(layer)
    assert attention.loss(layer.keys, layer.values) == (0, 0)
    assert attention.weights.sum(axis=-1) == pytest.approx(np.ones((2, 2, 60)))
    share, fair = attention.received()
    assert share.shape == fair.shape == (20,)
    assert share[-1] == 0
    with pytest.raises(ValueError, match="layer 0 has no queries"):
        SampledAttention(layer._replace(queries=None))

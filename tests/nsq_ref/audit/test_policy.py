"""The policy follows its rules, its round trip is within the limit, and others can read it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nsq_ref import KeyValueSchemes, Scheme, dequantize, quantize
from nsq_ref.audit import Layer, audit
from nsq_ref.audit.losses import Losses
from nsq_ref.audit.modes import failure_modes
from nsq_ref.dtypes import Float32
from nsq_ref.policy import Policy

STREAMING4 = Scheme.named("streaming4")


def normal(seed: int, layers: int = 3) -> Float32:
    random = np.random.default_rng(seed)
    return random.standard_normal((layers, 1, 2, 300, 32), dtype=np.float32)


def bursts(x: Float32) -> Float32:
    """Once in a block each channel is all that there is of a token, to either side."""
    for start in (1, 129):
        for channel in range(32):
            x[..., start + 2 * channel, channel] = 60
            x[..., start + 2 * channel + 1, channel] = -60
    return x


@pytest.mark.parametrize("name", ["streaming4", "streaming3", "streaming2"])
def test_the_rules(name: str) -> None:
    keys, values = normal(0), normal(1)
    keys[1] = bursts(keys[1])
    limit = 0.15
    result = audit(keys, values, default=name, limit=limit, schemes=["naive4"])
    start = Scheme.named(name)  # type: ignore[call-overload]
    for layer, own in enumerate(keys):
        for side, x, index in (("key", own, 0), ("value", values[layer], 1)):
            schemes = result.policy.layers[layer]
            assert schemes is not None
            chosen, wider = schemes[index], [start]
            wider += [
                Scheme.named(f"streaming{bits}")  # type: ignore[call-overload]
                for bits in (2, 3, 4, 8)
                if bits > start.bits
            ]
            losses = Losses(Layer(layer, own, values[layer]), side)  # type: ignore[arg-type]
            within = [one for one in wider if losses.of(one).judged <= limit]
            assert chosen == within[0]
            x_hat = dequantize(quantize(x, chosen)).astype(np.float64)
            apart = x - x.mean(axis=2, keepdims=True)
            for head in range(2):
                lost = np.linalg.norm(x_hat[:, head] - x[:, head])
                assert lost <= 1.5 * limit * np.linalg.norm(apart[:, head])
    assert result.policy.layers[1] != result.policy.layers[0]
    assert result.policy.is_default == (not result.policy.reasons)


def test_a_layer_that_no_width_holds_stays_in_floating_point() -> None:
    keys, values = normal(0), normal(1)
    result = audit(keys, values, limit=0.001, schemes=["naive4"])
    assert set(result.policy.layers.values()) == {None}
    assert result.policy.bits_per_element == 16
    assert result.policy.to_rewrite()["layers"] == {"0": None, "1": None, "2": None}
    assert "floating point" in result.advice()[1]


def test_leading_sinks_are_kept_and_wide_norms_are_float32() -> None:
    keys, values = normal(0), normal(1)
    keys[2, ..., :3, :] *= 0.01
    keys[0] *= 1e5
    result = audit(keys, values, schemes=["naive4"])
    policy = result.policy
    three = replace(STREAMING4, sink_tokens=3)
    wide = replace(STREAMING4, norm_dtype="float32", scale_dtype="float32")
    assert policy.layers == {
        0: KeyValueSchemes(wide, STREAMING4),
        1: KeyValueSchemes(STREAMING4, STREAMING4),
        2: KeyValueSchemes(three, three),
    }
    assert policy.reasons[2][0] == "keys: the first 3 tokens stand out: 3 stay as they are"
    assert "float16 does not hold" in policy.reasons[0][0]
    read = Policy.of(policy.to_rewrite()).schemes([0, 1, 2])
    assert read == policy.layers
    assert policy.to_cache()[2] == (three, three)


def test_memory_is_that_of_the_schemes() -> None:
    x = normal(2)
    policy = audit(x, x, schemes=["naive4"]).policy
    quantized = quantize(x.astype(np.float16), STREAMING4)
    assert policy.cache_nbytes == 2 * quantized.nbytes
    assert policy.float16_nbytes == 2 * 2 * x.size
    assert policy.bits_per_element == pytest.approx(quantized.bits_per_element)
    assert policy.bits_at_4096 == STREAMING4.bits_per_element(4096, 32, np.float16)


@pytest.mark.parametrize(
    ("ratio", "losses", "expected"),
    [
        (17.2, [0.9, 0.1, 0.1], (True, True, False, False)),  # Qwen2-7B
        (17.2, [0.1, 0.1, 0.1], (True, False, False, False)),
        (3.0, [0.9, 0.1, 0.1], (False, True, True, False)),
        (3.0, [0.4, 0.4, 0.4], (False, False, True, True)),  # Pythia
        (3.0, [0.1, 0.1, 0.1], (False, False, True, False)),
        (12.0, [0.4, 0.4, 0.4], (False, False, False, True)),
        (15.0, [0.9], (True, True, False, True)),
        (10.0, [0.1], (False, False, False, False)),
    ],
)
def test_modes(ratio: float, losses: list[float], expected: tuple[bool, ...]) -> None:
    one, two = failure_modes(ratio, losses, 0.25)
    assert (one.by_ratio, one.by_loss, two.by_ratio, two.by_loss) == expected
    for mode in (one, two):
        assert mode.holds == mode.words.startswith("holds")


def test_an_outlier_of_the_first_layer_breaks_naive4_and_not_the_default() -> None:
    """As that of Qwen2-7B: a channel of the keys that is large and nearly the same everywhere."""
    keys, values, queries = normal(0), normal(1), normal(2) * 3
    keys[0, ..., 5] = 100 + keys[0, ..., 5]
    result = audit(keys, values, queries)
    assert result.modes[0].holds
    assert result.policy.is_default
    assert result.judged("key", "streaming4")[0] < 0.3 * result.judged("key", "naive4")[0]

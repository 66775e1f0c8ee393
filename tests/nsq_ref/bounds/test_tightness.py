"""How close errors come to their bounds: what a search finds, and inputs that attain them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nsq_ref import (
    Scheme,
    bounds,
    dequantize,
    quantize,
)
from tests.support.adversary import climb
from tests.support.bounds_truth import (
    Float32,
    check_a_priori,
    check_all,
    coded_tokens,
    dequantized,
)


def ratio(what: str, knowledge: str) -> Callable[[Float32, Scheme], float]:
    """Return what the search climbs: measured over bound, of the last token."""

    def objective(x: Float32, scheme: Scheme) -> float:
        quantized = quantize(x, scheme)
        known: Any
        if knowledge == "a priori":
            known = bounds.a_priori(scheme, x.shape[-1])
        elif knowledge == "encoder":
            known = bounds.encoder_bounds(x, quantized)
        else:
            known = bounds.certificate(quantized)
        x_hat, norm = dequantize(quantized)[-1].astype(np.float64), coded_tokens(x, quantized)[1]
        token, y = x[-1].astype(np.float64), dequantized(quantized)[0][-1]
        length, decoded = np.linalg.norm(token), np.linalg.norm(x_hat)
        if decoded == 0 or length < 1e-6:
            return -np.inf  # a token that is lost attains every bound
        measured = {
            "direction_element": np.abs(token / norm[-1] - y),
            "direction_error": np.linalg.norm(token / norm[-1] - y),
            "chord": np.linalg.norm(token / length - x_hat / decoded),
            "relative": np.linalg.norm(token - x_hat) / length,
            "element": np.abs(token - x_hat),
        }
        if what == "logit":
            query = np.sign(token - x_hat)[None]
            return float((query @ (token - x_hat))[0] / -known.logit_interval(query).low[0, -1])
        bound = getattr(known, what)
        limit = bound if knowledge == "a priori" else bound[-1]
        if knowledge == "a priori" and what == "direction_error" and not scheme.separate_norm:
            limit = limit * length
        return float(np.max(measured[what] / limit))

    return objective


FAMILY: dict[str, dict[str, Any]] = {
    "nsep+pchan4": {},
    "nsep4": {"axis": "token"},
    "asymmetric": {"symmetric": False},
    "asymmetric, a token": {"symmetric": False, "axis": "token"},
    "gain": {"magnitude": "gain"},
    "lsq": {"magnitude": "lsq", "symmetric": False},
    "2 bits": {"bits": 2},
    "8 bits": {"bits": 8, "scale_dtype": "bfloat16"},
    "float32": {"scale_dtype": "float32", "norm_dtype": "float32"},
    "pchan4": {"separate_norm": False},
    "naive4": {"separate_norm": False, "axis": "token"},
    "search": {"scale_rule": "search"},
    "outliers": {"outlier_channels": 1},
    "blocks of 2": {"block_size": 2},
}

HEAD_DIM, STEPS = 24, 300

# The last is the seed of a search of so few steps. docs/bounds.md has what longer ones reach.
REACHED = [
    ("certificate", "nsep+pchan4", "direction_element", 0),
    ("certificate", "nsep+pchan4", "direction_error", 0),
    ("certificate", "nsep+pchan4", "chord", 0),
    ("certificate", "nsep+pchan4", "relative", 0),
    ("certificate", "nsep+pchan4", "element", 0),
    ("certificate", "nsep+pchan4", "logit", 0),
    ("certificate", "nsep4", "relative", 0),
    ("certificate", "asymmetric", "direction_error", 0),
    ("certificate", "asymmetric, a token", "relative", 0),
    ("certificate", "gain", "relative", 0),
    ("certificate", "gain", "logit", 0),
    ("certificate", "lsq", "relative", 1),
    ("certificate", "lsq", "logit", 0),
    ("certificate", "2 bits", "relative", 0),
    ("certificate", "8 bits", "relative", 0),
    ("certificate", "float32", "relative", 0),
    ("certificate", "pchan4", "direction_error", 0),
    ("certificate", "naive4", "logit", 0),
    ("certificate", "naive4", "relative", 0),
    ("certificate", "search", "relative", 0),
    ("certificate", "outliers", "relative", 0),
    ("certificate", "blocks of 2", "relative", 0),
    ("encoder", "nsep+pchan4", "relative", 0),
    ("encoder", "asymmetric, a token", "relative", 0),
    ("encoder", "lsq", "logit", 0),
    ("encoder", "search", "relative", 0),
    ("a priori", "nsep+pchan4", "relative", 0),
    ("a priori", "8 bits", "relative", 0),
    ("a priori", "asymmetric", "direction_error", 0),
    ("a priori", "blocks of 2", "relative", 0),
]


@pytest.mark.parametrize(("knowledge", "name", "what", "seed"), REACHED)
def test_a_search_comes_close_to_the_bounds_and_never_beyond(
    knowledge: str, name: str, what: str, seed: int
) -> None:
    """E1 to E6 on what a search finds (Q1, S1 to S4, M1 to M3)."""
    scheme = Scheme(**FAMILY[name])
    tokens = scheme.block_size or 2 * HEAD_DIM + 1
    found = climb(ratio(what, knowledge), scheme, tokens, HEAD_DIM, seed=seed, steps=STEPS)
    assert found.ratio >= 0.95
    quantized = quantize(found.x, scheme)
    last = bounds.certificate(quantized), bounds.encoder_bounds(found.x, quantized)
    for known in last:
        check_all(found.x, quantized, known)
    check_a_priori(found.x, quantized)


def last_ratios(x: Float32, scheme: Scheme, knowledge: str) -> dict[str, float]:
    """Return how much of its bounds the last token attains, none of which it may exceed."""
    quantized = quantize(x, scheme)
    check_a_priori(x, quantized)
    check_all(x, quantized, bounds.certificate(quantized))
    names = ("direction_element", "direction_error", "chord", "relative")
    return {name: ratio(name, knowledge)(x, scheme) for name in names}


@pytest.mark.parametrize("head_dim", [2, 12, 196, 512])
def test_a_scale_a_token_attains_what_is_known_before_any_data(head_dim: int) -> None:
    """E2, E3, E4: one element that makes the scale, and all others half of it (S1, Q1)."""
    x = np.full((1, head_dim), 0.999, np.float32)
    x[0, 0] = 14
    reached = last_ratios(x, Scheme(axis="token", norm_dtype="float32"), "a priori")
    for name in ("direction_error", "chord", "relative"):
        assert reached[name] > 0.99, name
    x[0] = 0
    x[0, :2] = 1, -1
    scheme = Scheme(axis="token", symmetric=False, norm_dtype="float32")
    if head_dim > 2:
        assert last_ratios(x, scheme, "a priori")["direction_error"] > 0.99


def test_a_scale_a_channel_attains_what_is_known_before_any_data() -> None:
    """E1, E2 and E4: one-hot tokens, and one token whose elements are all half way (S1, S2)."""
    x = np.zeros((29, 28), np.float32)
    x[:28] = np.eye(28)
    x[28], x[28, 0] = 1, 13  # length 14: the directions are half and thirteen halves of 1/7
    scheme = Scheme(scale_dtype="float32", norm_dtype="float32")
    for knowledge in ("a priori", "certificate"):
        reached = last_ratios(x, scheme, knowledge)
        assert min(reached["direction_element"], reached["direction_error"]) > 0.9999
        assert min(reached["chord"], reached["relative"]) > 0.95
    x = np.concatenate([np.eye(64), -np.eye(64), np.eye(64)[:1]]).astype(np.float32)
    reached = last_ratios(x, Scheme(symmetric=False), "a priori")
    assert reached["direction_element"] > 0.99
    assert reached["direction_error"] > 0.98


def test_a_block_of_one_token_errs_by_its_narrowed_scales() -> None:
    """E2: the ends of a range err by what S3 narrowed, here half way between two float16."""
    x = np.full((1, 6), 7 * (1 + 2.0**-11), np.float32)
    x[0, 5] = np.sqrt(256 - np.sum(np.square(x[0, :5], dtype=np.float64)))
    assert last_ratios(x, Scheme(block_size=1), "a priori")["direction_error"] > 0.97


def test_a_search_cuts_as_much_as_is_known_before_any_data() -> None:
    """E1 with rule S4: many tokens on the grid of the shortest range, and one at the end."""
    grid = np.tile(np.arange(-6, 7) / 10, 60)
    x = np.stack([grid, np.sqrt(1 - grid**2)], -1).astype(np.float32)
    x = np.concatenate([x, np.float32([[1, 0]])])
    scheme = Scheme(scale_rule="search")
    assert last_ratios(x, scheme, "a priori")["direction_element"] > 0.99
    assert last_ratios(x, scheme, "certificate")["direction_element"] > 0.95
    # In a block of 170 tokens no search cuts off more than it saves on these: ties of the whole
    # range, and on the grid of the next shorter one.
    ties = np.resize([9.5, 28.5, 47.5, 66.5, 85.5, 104.5], 169) / 127
    x = np.stack([np.append(ties, 1), np.sqrt(1 - np.append(ties, 1) ** 2)], -1).astype(np.float32)
    scheme = Scheme(bits=8, scale_rule="search", block_size=170, scale_dtype="float32")
    assert last_ratios(x, scheme, "a priori")["direction_element"] > 0.95


def test_an_angle_may_be_right_where_nothing_is_known_before_any_data() -> None:
    """E3 and E4 beyond 4 qmax^2 channels: all elements but a small one are coded as 0 (Q1)."""
    x = np.zeros((6, 5), np.float32)
    x[0, :2] = 0.02, 1
    x[1:5, 1:] = np.eye(4)
    x[5] = 0.012, 0.4999, 0.4999, 0.4999, 0.4999
    reached = last_ratios(x, Scheme(bits=2, norm_dtype="float32"), "a priori")
    assert min(reached["chord"], reached["relative"]) > 0.98
    # Two elements that are coded as the smallest float32, whose norm then rounds to that too.
    x = np.concatenate([np.full((6, 1), 0, np.float32), x], axis=-1)
    x[0, :2], x[5, :2] = 2.0**-149, 2.0**-149
    scheme = Scheme(bits=2, scale_dtype="float32", norm_dtype="float32")
    quantized = quantize(x, scheme)
    missed = np.linalg.norm(x[5] - dequantize(quantized)[5]) / np.linalg.norm(x[5])
    assert missed > 1.7
    check_a_priori(x, quantized)
    check_all(x, quantized, bounds.certificate(quantized))

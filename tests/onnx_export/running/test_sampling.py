"""Sampling beside its definition, in exact order of Python's own sorting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_export.running import Sampling

# Few different numbers, so that many are equal, as they are at a cut.
LOGITS = st.lists(
    st.sampled_from([-math.inf, -2.0, 0.0, 0.5, 1.0, 1.25, 30.0]), min_size=1, max_size=12
).filter(lambda logits: max(logits) > -math.inf)


def expected(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> dict[int, float]:
    """The probability of each token, by the words of the documentation."""
    most = max(logits)
    weights = {t: math.exp((x - most) / temperature) for t, x in enumerate(logits)}
    order = sorted(weights, key=lambda token: -logits[token])  # stable: the first of equals first
    if top_k is not None and top_k < len(order):
        last = logits[order[top_k - 1]]
        order = [token for token in order if logits[token] >= last]
    total = sum(weights[token] for token in order)
    if top_p is not None:
        kept, share = [], 0.0
        for token in order:
            kept.append(token)
            share += weights[token] / total
            if share >= top_p - 1e-12:
                break
        order = kept
    total = sum(weights[token] for token in order)
    return {token: weights[token] / total for token in order}


# Not where a share is met but for rounding.
SHARES = st.sampled_from([0.013, 0.1234, 0.4567, 0.789, 0.98765, None])


@given(LOGITS, st.sampled_from([0.3, 1.0, 2.0]), st.none() | st.integers(1, 13), SHARES)
def test_probabilities(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    tokens, found = Sampling(temperature, top_k, top_p).probabilities(logits)
    wanted = expected(logits, temperature, top_k, top_p)
    assert sorted(tokens.tolist()) == sorted(wanted)
    for token, probability in zip(tokens.tolist(), found.tolist(), strict=True):
        assert probability == pytest.approx(wanted[token], abs=1e-14)


def test_top_p_looks_on_where_the_first_tokens_are_too_few() -> None:
    """Of a vocabulary like those of real models, flat and peaked."""
    rng = np.random.default_rng(0)
    for spread in (0.01, 1.0, 8.0):
        logits = (spread * rng.standard_normal(5000)).tolist()
        for top_p in (0.05, 0.5, 0.97):
            tokens, _ = Sampling(1.0, top_p=top_p).probabilities(logits)
            assert tokens.tolist() == list(expected(logits, 1.0, None, top_p))


def sorted_plainly(logits: Any, temperature: float, top_p: float) -> npt.NDArray[np.int64]:
    """Return the tokens of top-p in order, after all of them are sorted."""
    scores = np.asarray(logits, np.float64)
    weights = np.exp((scores - scores.max()) / temperature)
    order = np.argsort(-weights, kind="stable")
    return order[: int(np.searchsorted(np.cumsum(weights[order]), top_p * weights.sum())) + 1]


@given(
    st.integers(0, 2**32), st.sampled_from([0.0, 1e-9, 0.01, 1.0, 8.0, 300.0]),
    st.integers(1, 700), st.sampled_from([1e-3, 0.5, 0.9, 0.999, 1.0]), st.booleans(),
)  # fmt: skip
def test_top_p_is_that_of_sorting_everything(
    seed: int, spread: float, size: int, top_p: float, coarse: bool
) -> None:
    """Token by token, in the same order, and so with the same draw; many are equally likely."""
    logits = spread * np.random.default_rng(seed).standard_normal(size)
    if coarse:
        logits = np.round(logits, 1)
    wanted = sorted_plainly(logits, 0.7, top_p)
    sampling = Sampling(0.7, top_p=top_p, seed=seed)
    tokens, _ = sampling.probabilities(logits)
    assert tokens.tolist() == wanted.tolist()
    (generator,), (same,) = sampling.generators(1), sampling.generators(1)
    weights = np.exp((logits - logits.max()) / 0.7)[wanted]
    reached = np.cumsum(weights / weights.sum())
    place = np.searchsorted(reached, same.random() * reached[-1], side="right")
    assert sampling.choose(logits, generator) == wanted[min(int(place), len(wanted) - 1)]


@given(LOGITS, st.integers(0, 2**32))
def test_a_number_chooses_its_token(logits: list[float], seed: int) -> None:
    """The draw is at its place among the sums of the probabilities."""
    sampling = Sampling(0.7, top_p=0.789, seed=seed)
    (generator,), (same,) = sampling.generators(1), sampling.generators(1)
    tokens, probabilities = sampling.probabilities(logits)
    for _ in range(5):
        token, number, reached = sampling.choose(logits, generator), same.random(), 0.0
        place = tokens.tolist().index(token)
        reached = math.fsum(probabilities[:place])
        assert reached - 1e-12 <= number <= reached + probabilities[place] + 1e-12


def test_draws_have_the_distribution() -> None:
    """Five thousand draws: each share within five standard errors, nothing outside."""
    logits, count = [0.0, 2.0, -math.inf, 1.0, 0.5, -1.0], 100_000
    sampling = Sampling(0.8, top_k=4, seed=11)
    (generator,) = sampling.generators(1)
    drawn = np.bincount([sampling.choose(logits, generator) for _ in range(count)], minlength=6)
    wanted = expected(logits, 0.8, 4, None)
    for token in range(6):
        p = wanted.get(token, 0.0)
        assert abs(drawn[token] - count * p) <= 5 * math.sqrt(count * p * (1 - p))


def test_the_same_seed_gives_the_same() -> None:
    logits = np.linspace(0, 1, 50)
    draws = [
        [s.choose(logits, g) for _ in range(40)]
        for seed in (1, 1, 2, None, None)
        for s in [Sampling(1.0, seed=seed)]
        for g in s.generators(1)
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4
    rows = Sampling(1.0, seed=1).generators(3)
    assert len({tuple(g.random(4)) for g in rows}) == 3


def test_greedy_takes_the_first_of_the_most_likely() -> None:
    assert Sampling().choose(np.float16([1, 3, 3, 2]), np.random.default_rng()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, r"temperature=-1\.0 must be finite and at least 0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot' is not a number"),
        ({"temperature": 1, "top_k": 0}, "top_k=0"),
        ({"temperature": 1, "top_p": 0}, r"top_p=0\.0 must be above 0 and at most 1"),
        ({"temperature": 1, "top_p": 1.1}, r"top_p=1\.1"),
        ({"temperature": 1, "top_p": math.nan}, "top_p=nan"),
        ({"temperature": 1, "seed": -1}, "seed=-1"),
        ({"top_k": 5}, "top_k has no effect at temperature 0"),
        ({"top_p": 0.5}, "top_p has no effect at temperature 0"),
        ({"seed": 5}, "seed has no effect at temperature 0"),
    ],
)
def test_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Sampling(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [[0, math.nan], [math.inf, 0], [-math.inf, -math.inf]])
def test_logits_that_mean_nothing(temperature: float, logits: list[float]) -> None:
    with pytest.raises(ValueError, match="the model or its cache is damaged"):
        Sampling(temperature).choose(logits, np.random.default_rng())

"""E6, E7 and E8: logits, weights and outputs, decided in fifty digits."""

from __future__ import annotations

import decimal
from decimal import Decimal
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from nsq_ref import (
    Scheme,
    bounds,
    quantize,
)
from nsq_ref.bounds import Interval
from nsq_ref.strategies import inputs, schemes
from tests.support.bounds_truth import (
    Array,
    dot,
    fractions,
    quantized_or_none,
)


def weights(logits: list[Decimal]) -> list[Decimal]:
    """Softmax, to fifty digits."""
    largest = max(logits)
    shares = [(logit - largest).exp() for logit in logits]
    return [share / sum(shares) for share in shares]


def capped(logit: Decimal, softcap: float | None) -> Decimal:
    if softcap is None:
        return logit
    cap = Decimal(softcap)
    turn = (-2 * abs(logit) / cap).exp()
    return cap * ((1 - turn) / (1 + turn)).copy_sign(logit)


def varied(exact: list[Decimal], decoded: list[Decimal]) -> Decimal:
    before, after = weights(exact), weights(decoded)
    return sum((abs(a - b) for a, b in zip(before, after, strict=True)), Decimal()) / 2


def exactly(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


@st.composite
def logit_errors(draw: st.DrawFn) -> tuple[list[float], list[float], Interval, list[bool]]:
    """Logits, their errors, an interval around each error, and which tokens are seen."""
    count = draw(st.integers(1, 6))
    size = draw(st.sampled_from([0.01, 1.0, 20.0]))
    # Smaller ones would be lost in the digits that the oracle has.
    number = st.floats(-size, size).map(lambda value: value if abs(value) > 1e-20 else 0.0)
    wide_number = st.floats(-3 * size, 3 * size)
    logits = draw(st.lists(wide_number, min_size=count, max_size=count))
    errors = draw(st.lists(number, min_size=count, max_size=count))
    slack = draw(st.sampled_from([0.0, 0.1, 1.0]))
    low = np.array(errors) - slack * np.array(
        draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    )
    seen = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return logits, errors, Interval(low, np.array(errors) + slack), seen


@settings(max_examples=300)
@given(
    logit_errors(),
    st.sampled_from([1.0, 0.125, 3.0]),
    st.sampled_from([None, 0.5, 5.0, 50.0]),
)
def test_total_variation_holds(
    drawn: tuple[list[float], list[float], Interval, list[bool]],
    scale: float,
    softcap: float | None,
) -> None:
    """E7, with softmax scale, softcap and tokens that are not seen."""
    logits, errors, interval, seen = drawn
    bound = bounds.total_variation(
        interval, softmax_scale=scale, softcap=softcap, where=np.array(seen)
    )
    if not any(seen):
        assert bound == 0
        return
    with decimal.localcontext(prec=50):
        exact, decoded = (
            [
                capped(Decimal(scale) * value, softcap)
                for value, s in zip(both, seen, strict=True)
                if s
            ]
            for both in (
                [Decimal(logit) for logit in logits],
                [
                    Decimal(logit) + Decimal(error)
                    for logit, error in zip(logits, errors, strict=True)
                ],
            )
        )
        assert varied(exact, decoded) <= Decimal(float(bound))


@settings(max_examples=60)
@given(inputs(), schemes(), st.integers(0, 2**32 - 1))
def test_outputs_of_attention_hold(x: Array, scheme: Scheme, seed: int) -> None:
    """E6, E7 and E8 from stored keys and values to the output, causal and softcapped."""
    rng = np.random.default_rng(seed)
    keys = np.clip(x[0].astype(np.float64), -1e4, 1e4).astype(np.float32)
    values = rng.permutation(keys, axis=-1) * np.float32(rng.choice([1.0, -0.3]))
    tokens, head_dim = keys.shape
    stored = [quantized_or_none(part, scheme) for part in (keys, values)]
    if stored[0] is None or stored[1] is None:
        return
    of_keys, of_values = (bounds.certificate(part) for part in stored)
    size = max(float(np.abs(keys).max()), 1e-30)
    query = rng.standard_normal((tokens, head_dim)) / size * rng.choice([0.1, 1.0, 5.0])
    where = np.tri(tokens, dtype=bool)
    softcap = rng.choice([None, 2.0])
    limit = bounds.total_variation(
        of_keys.logit_interval(query), softmax_scale=0.5, softcap=softcap, where=where
    )
    apart = bounds.spread(of_values.x_hat, of_values.token, where)
    assert (apart <= bounds.spread(of_values.x_hat, of_values.token) * (1 + 1e-12)).all()
    with decimal.localcontext(prec=50):
        for q in range(tokens):
            shares = []
            for side in (keys, of_keys.x_hat):
                logits = [
                    capped(exactly(dot(fractions(query[q]), fractions(side[t]))) / 2, softcap)
                    for t in range(q + 1)
                ]
                shares.append(weights(logits))
            moved = sum(abs(a - b) for a, b in zip(*shares, strict=True)) / 2
            assert moved <= Decimal(float(limit[q]))
            square = Decimal()
            for j in range(head_dim):
                outputs = [
                    sum(share * Decimal(float(side[t, j])) for t, share in enumerate(by))
                    for by, side in zip(shares, (values, of_values.x_hat), strict=True)
                ]
                square += (outputs[0] - outputs[1]) ** 2
            decoded = np.array([[float(share) for share in shares[1]]])
            bound = bounds.output_error(
                decoded, of_values.token[: q + 1], limit[q : q + 1], apart[q : q + 1]
            )
            # The weights given are rounded, to 2**-53 of themselves.
            assert square.sqrt() <= Decimal(float(bound[0])) * (1 + Decimal(2) ** -50)


def test_an_attained_total_variation() -> None:
    """E7: weights that swap, and stored keys that make them swap (Q1 rounds each to its bound)."""
    for h in (0.01, 1.0, 6.0):
        interval = Interval(np.array([-h, -h]), np.array([h, h]))
        exact = 1 / (1 + np.exp(h))  # of the first token; afterwards it is the second's
        assert bounds.total_variation(interval) <= (1 - 2 * exact) * (1 + 1e-12)
    keys = np.float32([[7, 7], [0.5, 1.5], [1.5, 1.5]])
    keys[1, 0], keys[2] = np.nextafter(keys[1, 0], 1), np.nextafter(keys[2], 1)
    quantized = quantize(keys, Scheme(separate_norm=False))
    np.testing.assert_array_equal(quantized.codes[1:], [[1, 2], [1, 1]])
    known = bounds.certificate(quantized)
    seen = np.array([False, True, True])
    for size in (0.1, 1.0, 4.0):
        query = np.array([[size, size]])
        limit = bounds.total_variation(known.logit_interval(query), where=seen)
        with decimal.localcontext(prec=50):
            exact_, decoded = (
                [exactly(dot(fractions(query), fractions(side[t]))) for t in (1, 2)]
                for side in (keys, known.x_hat)
            )
            assert varied(exact_, decoded) >= Decimal(float(limit[0])) * Decimal("0.9999")


def test_a_softcap_shrinks_errors_but_lets_none_cancel() -> None:
    """E7: the two things a softcap does to errors, both attained."""
    error = Interval(np.array([40.0, -40.0]), np.array([40.0, -40.0]))  # logits -20 and 20
    swapped = bounds.total_variation(error, softcap=0.5)
    np.testing.assert_allclose(swapped, np.tanh(0.5), rtol=1e-12)  # from -cap to cap
    error = Interval(np.full(2, 3.0), np.full(2, 3.0))
    assert bounds.total_variation(error) < 1e-12
    with decimal.localcontext(prec=50):
        before, after = (
            [capped(Decimal(logit), 2.0) for logit in logits] for logits in ((0, 100), (3, 103))
        )
        limit = bounds.total_variation(error, softcap=2.0)
        assert Decimal("0.3") < varied(before, after) <= Decimal(float(limit))


def test_an_attained_output_error() -> None:
    """E8: two values as far apart as their codes allow, and weights that swap (Q1)."""
    values = np.float32([[127], [126.5], [-126.5]])
    known = bounds.certificate(quantize(values, Scheme(bits=8, separate_norm=False)))
    assert known.x_hat.ravel().tolist() == [127, 126, -126]
    seen = np.array([[False, True, True]])
    apart = bounds.spread(known.x_hat, known.token, seen)
    np.testing.assert_allclose(apart, [253], rtol=1e-12)
    moved = 0.4
    exact, decoded = np.array([0.3, 0.7]), np.array([0.7, 0.3])
    output = decoded @ known.x_hat[1:, 0] - exact @ values[1:, 0].astype(np.float64)
    limit = bounds.output_error([[0, *decoded]], known.token, [moved], apart)
    assert 0.99 * limit <= abs(output) <= limit


def test_spread_is_little_more_than_the_largest_distance() -> None:
    """E8: by Jung's theorem at most sqrt(2) of it for the best centre; 1 for two points."""
    rng = np.random.default_rng(0)
    for head_dim in (1, 2, 64):
        values = rng.standard_normal((5, 33, head_dim))
        gap = np.linalg.norm(values[:, :, None] - values[:, None], axis=-1).max(axis=(-1, -2))
        ratio = bounds.spread(values, np.zeros((5, 33)))[..., 0] / gap
        assert (ratio >= 1).all()
        assert (ratio <= 1.25).all()
    two = rng.standard_normal((2, 3))
    apart = bounds.spread(two, [0.25, 0.5])
    np.testing.assert_allclose(apart, np.linalg.norm(two[0] - two[1]) + 0.75, rtol=1e-12)
    assert bounds.spread(two[:1], [0.25]) == 0


def test_the_estimate_is_near_on_random_data_and_no_bound() -> None:
    """The RMS estimate of D1's errors, kept apart from the bounds by its name."""
    rng = np.random.default_rng(0)
    x, query = rng.standard_normal((2, 512, 64)).astype(np.float32)
    for scheme in (Scheme(), Scheme.named("streaming3"), Scheme.named("naive4")):
        known = bounds.certificate(quantize(x, scheme))
        error = np.abs(query @ (x - known.x_hat).T)[:, scheme.sink_tokens :]
        estimate = known.estimate_logit_rms(query)[:, scheme.sink_tokens :]
        assert 0.85 < np.sqrt(np.mean(estimate**2) / np.mean(error**2)) < 1.15
        assert (error > estimate).any()
    by_scale = bounds.estimate_logit_rms(query, np.full((3, 64), 0.1), np.ones(3))
    expected = np.linalg.norm(query, axis=-1) * 0.1 / 12**0.5
    np.testing.assert_allclose(by_scale[:, 0], expected, rtol=1e-6)

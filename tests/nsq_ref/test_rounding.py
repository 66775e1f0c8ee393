"""The roundings, against integers and fractions that share nothing with them."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from nsq_ref import oracle, rounding
from nsq_ref.strategies import AWKWARD
from tests.support.rows import norm_order, norm_ties

FORMATS = [(np.float16, "float16", 11, -24), (ml_dtypes.bfloat16, "bfloat16", 8, -133)]
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(("kind", "name", "digits", "least"), FORMATS)
def test_narrow_every_value_tie_and_neighbour(
    kind: Any, name: str, digits: int, least: int
) -> None:
    """S3 M4 Z1: every value of the narrow type, every midpoint, and what lies beside it."""
    dtype = np.dtype(kind)
    infinity = int(np.array(np.inf, dtype).view(np.uint16))
    values = np.arange(infinity, dtype=np.uint16).view(dtype).astype(np.float64)
    greatest = values[-1]
    beyond = np.append(values[1:], greatest + (greatest - values[-2]))
    ties = ((values + beyond) / 2).astype(np.float32)
    below, above = np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))
    even = np.arange(len(values)) % 2 == 0
    upper = np.append(values[1:], np.inf)
    for given_, expected in (
        (values.astype(np.float32), values),
        (below, values),
        (above, upper),
        (ties, np.where(even, values, upper)),
    ):
        narrowed = rounding.narrow(given_, dtype)
        assert narrowed.dtype == dtype
        assert np.array_equal(narrowed.astype(np.float64), expected)
        negative = rounding.narrow(-given_, dtype).astype(np.float64)
        assert np.array_equal(negative, -expected)
        assert not np.signbit(negative[expected == 0]).any()  # Z1
    sample = np.concatenate([below, ties, above])[:: 97 if digits == 11 else 41]
    kept = [oracle.narrow(float(value), name) for value in sample]
    assert np.array_equal(rounding.narrow(sample, dtype).astype(np.float64), kept)
    assert oracle.FORMATS[name][:2] == (digits, least)


def test_narrow_to_float32_keeps_all_but_negative_zero() -> None:
    """Z1."""
    value = np.float32(AWKWARD)
    narrowed = rounding.narrow(value, np.dtype(np.float32))
    assert np.array_equal(narrowed, value)
    assert not np.signbit(narrowed[value == 0]).any()
    assert np.signbit(value[1])  # what was given keeps its own


def nearest_root(total: Fraction) -> float:
    """The float32 nearest to a root, by asking on which side of each midpoint it lies."""
    guess = np.float32(math.sqrt(total))
    for candidate in (
        np.nextafter(guess, np.float32(0)),
        guess,
        np.nextafter(guess, np.float32(np.inf)),
    ):
        down = (
            Fraction(float(np.nextafter(candidate, np.float32(-1)))) + Fraction(float(candidate))
        ) / 2
        up = (
            Fraction(float(np.nextafter(candidate, np.float32(np.inf))))
            + Fraction(float(candidate))
        ) / 2
        even = int(candidate.view(np.uint32)) % 2 == 0
        inside = max(down, Fraction(0)) ** 2 < total < up**2
        if (
            inside
            or (even and total in (down**2, up**2))
            or total == Fraction(float(candidate)) ** 2
        ):
            return float(candidate)
    raise AssertionError("no candidate")


@settings(max_examples=400)
@given(st.lists(float32s.filter(lambda v: abs(v) < 1e18), min_size=1, max_size=6))
def test_norm_is_correctly_rounded(row: list[float]) -> None:
    """N1."""
    expected = nearest_root(sum((Fraction(value) ** 2 for value in row), Fraction(0)))
    assert float(rounding.norm(np.float32([row]))[0]) == expected
    assert oracle.exact_norm(row) == expected


def test_norm_at_ties() -> None:
    """N1: to even on the tie, up above it by less than float64 can hold, down below it."""
    expected = [1.0, 1 + 2.0**-23, 1.0]
    scaled = [value * 2.0**exponent for exponent in (0, -40, 40) for value in expected]
    assert rounding.norm(norm_ties()).tolist() == scaled
    assert [oracle.exact_norm(row.tolist()) for row in norm_ties()] == scaled
    float64 = np.sqrt(np.sum(norm_ties().astype(np.float64) ** 2, axis=-1)).astype(np.float32)
    assert float64.tolist() != scaled  # or the case proves nothing


def test_norm_is_not_that_of_float32_sums() -> None:
    """N1: the case that judges implementers does tell them apart."""
    x = norm_order()
    naive = np.sqrt(np.add.accumulate(x * x, axis=-1)[:, -1])
    assert np.count_nonzero(naive != rounding.norm(x)) > len(x) // 4


def test_norm_does_not_depend_on_order() -> None:
    """N1."""
    x = norm_order()
    for seed in range(5):
        shuffled = x[:, np.random.default_rng(seed).permutation(x.shape[1])]
        assert np.array_equal(rounding.norm(shuffled), rounding.norm(x))


@pytest.mark.parametrize("value", [np.float32(3.4028235e38), np.float32(2.0**-149)])
def test_norm_at_the_ends_of_float32(value: np.float32) -> None:
    """N1: one value alone is its own norm; two of the largest are beyond float32."""
    assert rounding.norm(np.float32([[value, 0]]))[0] == value
    pair = rounding.norm(np.float32([[value, value]]))[0]
    assert pair == (np.inf if value > 1 else np.float32(2.0**-149))


@settings(max_examples=400)
@given(st.data(), st.integers(1, 6))
def test_least_squares_gain_is_correctly_rounded(data: st.DataObject, size: int) -> None:
    """M3: also where the products cancel."""
    moderate = float32s.filter(lambda v: v == 0 or 1e-12 < abs(v) < 1e12)
    rows = st.lists(
        st.one_of(moderate, st.sampled_from([1.0, -1.0, 3.0])), min_size=size, max_size=size
    )
    x, y = data.draw(rows), data.draw(rows)
    below = sum(Fraction(v) ** 2 for v in y)
    above = sum(Fraction(u) * Fraction(v) for u, v in zip(x, y, strict=True))
    expected = np.float32(0) if not below else exact_float32(above / below)
    assert rounding.least_squares_gain(np.float32([x]), np.float32([y]))[0] == expected


def exact_float32(value: Fraction) -> np.float32:
    """The nearest float32: of three candidates, the one least far away, of equals the even."""
    with np.errstate(over="ignore"):
        guess = np.float32(float(value))
    candidates = [
        np.nextafter(guess, np.float32(-np.inf)),
        guess,
        np.nextafter(guess, np.float32(np.inf)),
    ]
    finite = [c for c in candidates if np.isfinite(c)]
    return min(finite, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.uint32)) % 2))


@pytest.mark.parametrize("sign", [1, -1])
def test_least_squares_gain_at_ties(sign: int) -> None:
    """M3: an exact midpoint goes to even, and cancellation does not hide it."""
    tie = 1 + 2.0**-24
    x = np.float32([[sign, sign * 2.0**-24 * 2, 2.0**60, -(2.0**60)]])
    y = np.float32([[1, 0.5, 0, 0]])
    assert float(Fraction(1) + Fraction(2.0**-24)) == tie
    expected = exact_float32(Fraction(sign) * (1 + Fraction(2) ** -24) / Fraction(5, 4))
    assert rounding.least_squares_gain(x, y)[0] == expected
    cancelling = np.float32([[2.0**60, -(2.0**60), sign, sign * 2.0**-24]])
    ones = np.ones((1, 4), np.float32)
    expected = exact_float32(Fraction(sign) * (1 + Fraction(2) ** -24) / 4)
    assert rounding.least_squares_gain(cancelling, ones)[0] == expected

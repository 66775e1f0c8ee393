"""The reference beside plain sums, a query at a time."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from nsq_ref import attention
from tests.nsq_ref.attention.options import masks, options, seeds


def plainly(
    query: list[float],
    keys: list[list[float]],
    values: list[list[float]],
    scale: float,
    softcap: float | None,
) -> tuple[list[float], list[float]]:
    """One query over the tokens it sees, and no others: output and weights."""
    scores = [scale * math.fsum(q * k for q, k in zip(query, key, strict=True)) for key in keys]
    if softcap is not None:
        scores = [softcap * math.tanh(score / softcap) for score in scores]
    raised = [math.exp(score - max(scores)) for score in scores]
    weights = [one / math.fsum(raised) for one in raised]
    output = [
        math.fsum(weight * value[j] for weight, value in zip(weights, values, strict=True))
        for j in range(len(values[0]))
    ]
    return output, weights


@settings(max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    options=options,
    mask=masks,
    seed=seeds,
)
def test_reference(
    shape: tuple[int, int, int, int],
    lengths: list[int],
    options: dict[str, Any],
    mask: dict[str, Any],
    seed: int,
) -> None:
    """A1, A2: each query by itself, over slices; NaN wherever there is padding."""
    rng = np.random.default_rng(seed)
    kv_heads, group, query_tokens, head_dim = shape
    batch, tokens = len(lengths), max(*lengths, 1)
    query = rng.standard_normal((batch, kv_heads * group, query_tokens, head_dim)) * 2
    keys = rng.standard_normal((batch, kv_heads, tokens, head_dim)) * 2
    values = rng.standard_normal((batch, kv_heads, tokens, 3))
    counts = [int(rng.integers(0, min(query_tokens, length) + 1)) for length in lengths]
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        query[row, :, count:] = keys[row, :, length:] = values[row, :, length:] = np.nan
    got = attention.attend(
        query, keys, values, lengths=lengths, query_lengths=counts, **options, **mask
    )
    output, weights = np.zeros_like(got.output), np.zeros_like(got.weights)
    assert output.shape == (*query.shape[:3], 3)
    assert weights.shape == (*query.shape[:3], tokens)
    scale = 1 / math.sqrt(head_dim) if options["scale"] is None else options["scale"]
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        for head in range(kv_heads * group):
            for i in range(count):
                position = length - count + i
                last = position + 1 if mask.get("causal", True) else length
                first = max(last - mask.get("sliding_window", last), 0)
                k, v = (x[row, head // group, first:last].tolist() for x in (keys, values))
                one = plainly(query[row, head, i].tolist(), k, v, scale, options["softcap"])
                output[row, head, i], weights[row, head, i, first:last] = one
    np.testing.assert_allclose(got.output, output, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(got.weights, weights, rtol=1e-11, atol=1e-300)


def test_reference_of_huge_scores() -> None:
    """A1: one token takes all of the weight, without a warning."""
    keys = np.float64([[[[1e200], [3e200], [-1e200]]]])
    got = attention.attend(np.float64([[[[1e100]]]]), keys, keys, causal=False)
    assert got.weights.ravel().tolist() == [0, 1, 0]
    assert got.output.item() == 3e200


GOOD = {
    "query": np.zeros((2, 4, 3, 8)),
    "keys": np.zeros((2, 2, 5, 8)),
    "values": np.zeros((2, 2, 5, 6)),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": np.zeros((2, 3, 3, 8))}, "query has 3 heads, keys and values have 2"),
        ({"query": np.zeros((2, 0, 3, 8))}, "query has 0 heads"),
        ({"query": np.zeros((2, 4, 3, 7))}, "do not fit"),
        ({"query": np.zeros((3, 4, 3, 8))}, "do not fit"),
        ({"values": np.zeros((2, 2, 4, 6))}, "do not fit"),
        ({"query": np.zeros((4, 3, 8))}, "query has 3 axes"),
        ({"keys": np.zeros((2, 2, 5, 8), int)}, "keys has dtype int64"),
        ({"keys": ["x"]}, "keys has dtype <U1"),
        ({"scale": "1"}, "scale='1' is not a number"),
        ({"softcap": True}, "softcap=True is not a number"),
        ({"query": np.zeros((2, 4, 3, 0)), "keys": np.zeros((2, 2, 5, 0))}, "D = 0"),
        ({"scale": math.inf}, "scale=inf"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"softcap": math.nan}, "softcap=nan"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"sliding_window": 2.0}, "sliding_window=2.0"),
        ({"sliding_window": 2, "causal": False}, "use one of the two"),
        ({"lengths": [5]}, r"lengths has shape \[1\]; give 2, one a row"),
        ({"lengths": [5.0, 5.0]}, r"lengths\[0\]=5.0 is not an integer"),
        ({"lengths": [5, 6]}, r"lengths\[1\]=6 must be an integer from 0 to 5"),
        ({"query_lengths": [-1, 3]}, r"query_lengths\[0\]=-1 must be"),
        ({"lengths": [5, 2]}, r"query_lengths\[1\] is 3, but lengths\[1\] is 2"),
        ({"query": np.full((2, 4, 3, 8), np.nan)}, r"query\[0, 0, 0, 0\] is not finite"),
        ({"values": np.full((2, 2, 5, 6), np.inf)}, r"values\[0, 0, 0, 0\] is not finite"),
        ({"query": np.full((2, 4, 3, 8), 1e200), "keys": np.full((2, 2, 5, 8), 1e200)}, "float64"),
    ],
)
def test_reference_refuses(change: dict[str, Any], message: str) -> None:
    given = {**GOOD, **change}
    arrays = [given.pop(name) for name in GOOD]
    with pytest.raises((TypeError, ValueError), match=message), np.errstate(over="ignore"):
        attention.attend(*arrays, **given)

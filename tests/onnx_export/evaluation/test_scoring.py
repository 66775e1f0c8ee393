"""Figures of tokens, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import special

from onnx_export.evaluation.scoring import Reference

# Of 32 tokens at a time, 35 are two times.
LOGITS = st.sampled_from([1, 2, 35]).flatmap(
    lambda tokens: st.integers(6, 12).flatmap(
        lambda words: arrays.arrays(
            np.float32, (2, tokens, words), elements=st.floats(-60, 60, width=32)
        )
    )
)


@given(LOGITS, st.integers(0, 5))
def test_figures_are_what_they_are_called(logits: np.ndarray, target: int) -> None:
    exact, other = logits
    targets = np.full(len(exact), target)
    scores = Reference(exact, targets).scores(other)
    p = special.log_softmax(exact.astype(np.float64), axis=1)
    q = special.log_softmax(other.astype(np.float64), axis=1)
    for token in range(len(exact)):
        kl = special.rel_entr(np.exp(p[token]), np.exp(q[token])).sum()
        assert scores.kl[token] == pytest.approx(kl, rel=1e-8, abs=1e-12)
        assert scores.nll[token] == pytest.approx(-q[token, target], rel=1e-12)
        first, second = (  # of equal ones the first
            sorted(range(len(row)), key=lambda word, row=row: (-row[word], word))[:5]
            for row in (exact[token].tolist(), other[token].tolist())
        )
        assert scores.top1[token] == (first[0] == second[0])
        assert scores.top5[token] == len(set(first) & set(second)) / 5
    assert (scores.kl >= 0).all()


@given(LOGITS, st.integers(0, 34))
def test_some_tokens_are_those_of_all(logits: np.ndarray, start: int) -> None:
    exact, other = logits
    reference = Reference(exact, np.arange(len(exact)) % 6)
    some = reference.scores(other[start:], start) if start < len(exact) else ()
    for figure, every in zip(some, reference.scores(other), strict=False):
        np.testing.assert_array_equal(figure, every[start:])


@given(LOGITS)
def test_nothing_changed_costs_nothing(logits: np.ndarray) -> None:
    reference = Reference(logits[0], np.zeros(logits.shape[1], np.int64))
    scores = reference.scores(logits[0].copy())
    assert not scores.kl.any()
    assert scores.top1.all()
    assert (scores.top5 == 1).all()
    assert (scores.nll == reference.nll).all()


def test_a_vocabulary_is_summed_in_float64() -> None:
    logits = np.zeros((1, 49152), np.float32)
    changed = logits + np.float32(1e-4) * (np.arange(49152) % 2)
    kl = Reference(logits, np.zeros(1, np.int64)).scores(changed.astype(np.float32)).kl[0]
    p, q = special.softmax(logits[0].astype(float)), special.softmax(changed[0].astype(float))
    assert kl == pytest.approx(special.rel_entr(p, q).sum(), rel=1e-5)
    assert 1e-9 < kl < 2e-9


def test_logits_that_are_not_finite_are_refused() -> None:
    logits = np.zeros((2, 9), np.float32)
    broken = logits.copy()
    broken[1, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        Reference(logits, np.zeros(2, np.int64)).scores(broken)
    with pytest.raises(ValueError, match=r"\(2, 9\), not \(1, 9\)"):
        Reference(logits, np.zeros(2, np.int64)).scores(logits, 1)

"""E10: what is certain of keys that were coded with feedback, and how nearly it is reached."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings

from nsq_ref import Feedback, RangeError, Scheme, bounds, quantize, rounding, spec
from nsq_ref.feedback import HeadFeedback, second_moment
from nsq_ref.strategies import feedbacks, schemes, tensors

Array = npt.NDArray[Any]
KINDS = ("queries", "few queries", "one-hot queries", "heavy tails", "ties", "identity")


class Coded:
    """One block of one head: real numbers as fractions, and the bounds of its steps."""

    def __init__(self, x: Array, scheme: Scheme, feedback: HeadFeedback) -> None:
        block = spec.encode(x, scheme, feedback)
        norm = rounding.norm(x) if scheme.separate_norm else np.ones(len(x), np.float32)
        direction = spec.direction_of(x, norm)
        coded = ~spec.mark(block.outlier_index, x.shape[1])
        w = spec.fed_back(direction, block.scale, block.zero, coded, norm, feedback, scheme)
        y = spec.dequantized_direction(
            block.codes, block.scale, block.zero, block.outlier_index, block.outliers
        )
        real = norm != 0  # of zero tokens E10 says as little as E1
        self.direction = x[real].astype(float) / norm[real].astype(float)[:, None]
        self.exact = [
            [Fraction(float(v)) / Fraction(float(n)) - Fraction(float(z))
             for v, z in zip(row, own, strict=True)]
            for row, n, own in zip(x[real], norm[real], y[real], strict=True)
        ]  # fmt: skip
        scales, zeros = (
            np.broadcast_to(part.astype(np.float32), x.shape)[real]
            for part in (block.scale, block.zero)
        )
        steps = bounds.element_error(
            scales, None if scheme.symmetric else zeros, scheme=scheme, direction=w[real]
        )
        kept = np.maximum(np.abs(w[real].astype(float)) * 2.0**-11, 2.0**-25)
        self.steps = np.where(np.broadcast_to(coded, x.shape)[real], steps, kept)
        self.finite = np.isfinite(w).all()


@settings(max_examples=80)
@given(
    tensors(
        max_tokens=4, max_head_dim=7, leading=(), kinds=["normal", "awkward", "ties", "integers"]
    ),
    schemes(scale_dtype="float32", block_size=None, sink_tokens=0),
    st.data(),
)
def test_elements_logits_and_the_metric(x: Array, scheme: Scheme, data: st.DataObject) -> None:
    """F1: every bound of E10 holds, whatever is clamped, for any query and any moment."""
    head_dim = x.shape[1]
    assume(np.abs(x).max() < 1e30)
    head = data.draw(feedbacks(1, head_dim, kinds=KINDS)).head(0)
    try:
        quantize(x, scheme, feedback=Feedback(head.order[None], head.factor[None]))
    except RangeError:
        assume(False)
    coded = Coded(x, scheme, head)
    assume(coded.finite and len(coded.direction))
    given_to = coded.direction, coded.steps, head
    element = bounds.feedback_element_error(*given_to)
    for own, known in zip(coded.exact, element, strict=True):
        for e, bound in zip(own, known, strict=True):
            assert abs(e) <= Fraction(float(bound))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    # Those that E10 is nearest for are columns of the inverse of F.
    inverse = np.empty((head_dim, head_dim))
    inverse[:, head.order] = np.linalg.inv(head.factor.astype(float)).T
    queries = np.concatenate([rng.standard_normal((2, head_dim)), inverse])
    logit = bounds.feedback_logit_error(queries, *given_to)
    for query, knowns in zip(queries, logit, strict=True):
        for own, bound in zip(coded.exact, knowns, strict=True):
            product = sum(Fraction(float(q)) * e for q, e in zip(query, own, strict=True))
            assert abs(product) <= Fraction(float(bound))
    vectors = np.round(8 * rng.standard_normal((head_dim, head_dim)))  # whose moment is exact
    metric = bounds.feedback_metric_error(vectors.T @ vectors, *given_to)
    for own, bound in zip(coded.exact, metric, strict=True):
        seen = [sum(int(v) * e for v, e in zip(row, own, strict=True)) for row in vectors]
        assert sum(v * v for v in seen) <= Fraction(float(bound))


def test_all_steps_half_way_reach_the_bounds() -> None:
    """F1: E10 is attained, by the query and by the moment that F is made of."""
    moment = np.float64([[[4, 4, 0], [4, 8, 2], [0, 2, 5]]])
    feedback = Feedback.from_moment(moment, damping=0)
    order, factor = feedback.head(0)
    x = np.full((2, 3), 7, np.float32)
    w = np.float32([0.5, 1.5, -2.5])  # ties: errors of 0.5, -0.5 and -0.5
    errors = np.float64([0.5, -0.5, -0.5])
    x[1, order] = w + factor.astype(float).T @ errors - errors
    scheme = Scheme(separate_norm=False, scale_dtype="float32")
    assert quantize(x, scheme, feedback=feedback).codes[1, order].tolist() == [0, 2, -2]
    e = np.zeros(3)
    e[order] = x[1, order] - np.float64([0, 2, -2])
    steps = bounds.element_error([[1.0]], scheme=scheme, direction=[w])
    query = np.zeros((1, 3))
    query[0, order] = np.linalg.solve(factor.astype(float), np.sign(errors))
    (known,) = bounds.feedback_logit_error(query, x[1:], steps, feedback.head(0)).ravel()
    assert 0.9999 * known < abs(query @ e)[0] <= known
    (known,) = bounds.feedback_metric_error(moment[0], x[1:], steps, feedback.head(0))
    assert 0.9999 * known < e @ moment[0] @ e <= known


def test_later_channels_leave_less_than_the_moment_has() -> None:
    """F1: the diagonal of F H F^T, which E10 has in place of H's own."""
    rng = np.random.default_rng(0)
    moment = second_moment(rng.standard_normal((1, 100, 16)) @ rng.standard_normal((16, 16)), 1)[0]
    order, factor = Feedback.from_moment(moment[None], damping=0).head(0)
    left = np.diag(factor @ moment[np.ix_(order, order)] @ factor.T)
    assert (left <= np.diag(moment)[order] * (1 + 1e-6)).all()
    assert left.sum() < 0.6 * np.trace(moment)


def test_plain_errors_may_grow_without_a_bound_of_half_a_scale() -> None:
    """F1: E1 does not hold, and E10 says by how much not."""
    factor = np.eye(8, dtype=np.float32)[None]
    factor[0, 0, 1:] = -20
    feedback = Feedback([range(8)], factor)
    x = np.full((2, 8), 7, np.float32)
    x[1] = 0.4
    scheme = Scheme(separate_norm=False)
    q = quantize(x, scheme, feedback=feedback)
    error = np.abs(x[1] - q.codes[1])
    assert error.max() > 6  # scales are 1, and w is beyond the range
    head = feedback.head(0)
    coded = Coded(x, scheme, head)
    assert (error <= bounds.feedback_element_error(coded.direction, coded.steps, head)[1]).all()
    assert (error > bounds.certificate(q).direction_element[1]).any()


HEAD = Feedback.from_queries(np.eye(3)[None], kv_heads=1).head(0)
ONES = np.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: bounds.feedback_element_error(ONES, ONES, (HEAD.order, HEAD.factor)), TypeError,
         "^feedback must be a HeadFeedback, of Feedback.head, got tuple"),
        (lambda: bounds.feedback_element_error(ONES[0], ONES, HEAD), ValueError,
         r"^direction has shape \[3\]; give \[..., tokens, 3\]"),
        (lambda: bounds.feedback_element_error(ONES, ONES[:, :2], HEAD), ValueError,
         r"^step_error has shape \[2, 2\]"),
        (lambda: bounds.feedback_element_error(ONES, -ONES, HEAD), ValueError, "is not a bound"),
        (lambda: bounds.feedback_element_error(np.nan * ONES, ONES, HEAD), ValueError,
         "is not finite"),
        (lambda: bounds.feedback_element_error(ONES, np.ones((4, 3)), HEAD), ValueError,
         "^shapes do not fit together"),
        (lambda: bounds.feedback_logit_error(ONES[:, :2], ONES, ONES, HEAD), ValueError,
         r"^query has shape \[2, 2\]; give \[..., queries, 3\]"),
        (lambda: bounds.feedback_metric_error(ONES, ONES, ONES, HEAD), ValueError,
         r"^moment has shape \[2, 3\]; give \[3, 3\]"),
    ],
)  # fmt: skip
def test_refusals(call: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        call()

"""E10: what is certain of keys that were coded with feedback, and how nearly it is reached."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, reject, settings

from nsq_ref import Feedback, Quantized, RangeError, Scheme, bounds, quantize, spec
from nsq_ref.feedback import HeadFeedback, second_moment
from nsq_ref.strategies import feedbacks, schemes, tensors
from tests.support.bounds_truth import dot, fractions

Array = npt.NDArray[Any]
KINDS = ("queries", "few queries", "one-hot queries", "heavy tails", "ties", "identity")


class Coded:
    """One block of one head: real numbers as fractions, and the bounds of its steps."""

    def __init__(self, x: Array, scheme: Scheme, feedback: HeadFeedback) -> None:
        block = spec.encode(x, scheme, feedback)
        norm = spec.norms_and_sizes(x, scheme)[0]
        direction = spec.direction_of(x, norm)
        coded = ~spec.mark(block.outlier_index, x.shape[1])
        self.fed = spec.fed_back(direction, coded, norm, feedback, scheme)
        y = spec.dequantized_direction(
            block.codes, block.scale, block.zero, block.outlier_index, block.outliers
        )
        self.real = real = norm != 0  # of zero tokens E10 says as little as E1
        self.direction = x[real].astype(float) / norm[real].astype(float)[:, None]
        self.y = [fractions(row) for row in y[real]]
        self.exact_direction = [
            [v / Fraction(float(n)) for v in fractions(row)]
            for row, n in zip(x[real], norm[real], strict=True)
        ]
        self.exact = [
            [v - z for v, z in zip(*rows, strict=True)]
            for rows in zip(self.exact_direction, self.y, strict=True)
        ]
        scales, zeros = (
            np.broadcast_to(part.astype(np.float32), x.shape)[real]
            for part in (block.scale, block.zero)
        )
        given_to = scales, None if scheme.symmetric else zeros
        coded, w = np.broadcast_to(coded, x.shape)[real], self.fed.w[real].astype(float)
        plain = replace(
            scheme,
            separate_norm=False,
            norm_rule="plain",
            magnitude="norm",
            norm_dtype="float16",
        )
        steps, stored = (
            bounds.element_error(*given_to, scheme=plain, direction=known) for known in (w, None)
        )
        kept = np.maximum(np.abs(w) * 2.0**-11, 2.0**-25)
        self.steps = np.where(coded, steps, kept)
        # What a decoder knows where every channel has a scale of its own, made of w.
        self.stored_steps = np.where(coded, stored, kept)
        self.finite = np.isfinite(self.fed.w).all() and np.isfinite(self.fed.seen).all()


def with_unit_diagonal(head: HeadFeedback) -> Array:
    return np.triu(head.factor.astype(float), 1) + np.eye(len(head.order))


def quantized_or_assume(x: Array, scheme: Scheme, head: HeadFeedback) -> Quantized:
    feedback = Feedback(head.order[None], head.factor[None])
    try:
        return quantize(x, scheme, feedback=feedback)
    except RangeError:
        reject()


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
    quantized_or_assume(x, scheme, head)
    coded = Coded(x, scheme, head)
    assume(coded.finite and len(coded.direction))
    given_to = coded.direction, coded.steps, head
    known = [given_to]
    if scheme.axis == "channel":
        known.append((np.maximum(np.abs(coded.direction), scheme.separate_norm),
                      coded.stored_steps, head))  # fmt: skip
    for knowledge in known:
        element = bounds.feedback_element_error(*knowledge)
        for own, limits in zip(coded.exact, element, strict=True):
            for e, limit in zip(own, limits, strict=True):
                assert abs(e) <= Fraction(float(limit))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    # Those that E10 is nearest for are columns of the inverse of F.
    inverse = np.empty((head_dim, head_dim))
    inverse[:, head.order] = np.linalg.inv(with_unit_diagonal(head)).T
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


def seen_square(vector: list[Fraction], head: HeadFeedback) -> Fraction:
    """Return the square of the exact length of a vector in the metric of the feedback (F1)."""
    left = [vector[j] for j in head.order]
    factor = head.factor.astype(float)
    for p, value in enumerate(left):
        for r in range(p + 1, len(left)):
            left[r] -= value * Fraction(factor[p, r])
    weighed = [g * value for g, value in zip(fractions(np.diagonal(factor)), left, strict=True)]
    return dot(weighed, weighed)


@pytest.mark.filterwarnings(r"ignore::RuntimeWarning:nsq_ref\.spec")
@settings(max_examples=150)
@given(
    tensors(
        max_tokens=4, max_head_dim=7, leading=(), kinds=["normal", "awkward", "ties", "one-sided"]
    ),
    schemes(
        separate_norm=True,
        magnitude="gain",
        block_size=None,
        sink_tokens=0,
        norm_dtype=st.sampled_from(["bfloat16", "float32"]),
    ),
    st.data(),
)
def test_the_gain_keeps_the_length_that_queries_see(
    x: Array, scheme: Scheme, data: st.DataObject
) -> None:
    """F1 M2 M4: of the direction and of what is decoded, up to roundings that E10 bounds."""
    head = data.draw(feedbacks(1, x.shape[1])).head(0)
    stored = quantized_or_assume(x, scheme, head).norm.astype(float)
    coded = Coded(x, scheme, head)
    assume(coded.finite and len(coded.direction))
    norm, stored = spec.norms_and_sizes(x, scheme)[0][coded.real], stored[coded.real]
    y = data.draw(st.sampled_from([None, np.array(coded.y, float)]))
    gain = bounds.feedback_gain_error(coded.direction, coded.steps, head, y)
    narrowed = bounds.factor_error(stored, scheme.norm_dtype)
    for t, (direction, y) in enumerate(zip(coded.exact_direction, coded.y, strict=True)):
        before = Fraction(float(norm[t])) ** 2 * seen_square(direction, head)
        after = Fraction(stored[t]) ** 2 * seen_square(y, head)
        least, most = (
            Fraction(1 + one[t]) * Fraction(1 + other[t]) if np.isfinite(one[t]) else None
            for one, other in zip(gain, narrowed, strict=True)
        )
        assert least**2 * before <= after
        assert most is None or after <= most**2 * before


def test_what_cancels_in_a_heavy_channel_costs_the_gain_as_much_as_is_known() -> None:
    """F1 M2: what queries see of a direction may be as small as what float32 rounds of it."""
    head = HeadFeedback(np.int32([0, 1]), np.float32([[2.0**-14, 1.3], [0, 1]]))
    first = np.random.default_rng(0).standard_normal((100, 1))
    x = (first * [1, float(head.factor[0, 1]) + 2.0**-12]).astype(np.float32)
    scheme = Scheme(magnitude="gain", norm_dtype="float32", scale_dtype="float32")
    coded = Coded(x, scheme, head)
    ratio = spec.length_kept(coded.fed, head).astype(float)
    y = np.array(coded.y, float)
    low, high = bounds.feedback_gain_error(coded.direction, coded.steps, head, y)
    errors = [
        r * np.sqrt(float(seen_square(own, head) / seen_square(before, head))) - 1
        for r, own, before in zip(ratio, coded.y, coded.exact_direction, strict=True)
    ]
    assert (low <= errors).all()
    assert (errors <= high).all()
    assert np.max(np.abs(errors) / high) > 0.05
    assert np.max(errors) > 1e-4


def test_all_steps_half_way_reach_the_bounds() -> None:
    """F1: E10 is attained, by the query and by the moment that F is made of."""
    moment = np.float64([[[4, 4, 0], [4, 8, 2], [0, 2, 5]]])
    feedback = Feedback.from_moment(moment, damping=0)
    head = feedback.head(0)
    order, factor = head.order, with_unit_diagonal(head)
    w = np.float32([[7, 7, 7], [0.5, 1.5, -2.5]])  # ties: errors of 0.5, -0.5 and -0.5
    errors = np.float64([[0, 0, 0], [0.5, -0.5, -0.5]])
    x = np.empty((2, 3), np.float32)
    x[:, order] = w + errors @ factor - errors
    scheme = Scheme(separate_norm=False, scale_dtype="float32")
    codes = spec.encode(x, scheme, head).codes
    assert codes[:, order].tolist() == [[7, 7, 7], [0, 2, -2]]
    e = x[1] - codes[1].astype(float)
    steps = bounds.element_error([[1.0]], scheme=scheme, direction=w[1:])
    query = np.zeros((1, 3))
    query[0, order] = np.linalg.solve(factor, np.sign(errors[1]))
    (known,) = bounds.feedback_logit_error(query, x[1:], steps, head).ravel()
    assert 0.9999 * known < abs(query @ e)[0] <= known
    (known,) = bounds.feedback_metric_error(moment[0], x[1:], steps, head)
    assert 0.9999 * known < e @ moment[0] @ e <= known


def test_later_channels_leave_less_than_the_moment_has() -> None:
    """F1: the diagonal of F H F^T, which E10 has in place of H's own."""
    rng = np.random.default_rng(0)
    moment = second_moment(rng.standard_normal((1, 100, 16)) @ rng.standard_normal((16, 16)), 1)[0]
    head = Feedback.from_moment(moment[None], damping=0).head(0)
    factor = with_unit_diagonal(head)
    metric = factor @ moment[np.ix_(head.order, head.order)] @ factor.T
    left = np.diag(metric)
    assert (left <= np.diag(moment)[head.order] * (1 + 1e-6)).all()
    assert left.sum() < 0.6 * np.trace(moment)
    # And nothing is left off the diagonal: the squares of the weights, times the largest.
    weights = np.diagonal(head.factor).astype(float)
    np.testing.assert_allclose(metric, left.max() * np.diag(weights**2), atol=1e-6 * left.max())


def test_plain_errors_may_grow_without_a_bound_of_half_a_scale() -> None:
    """F1: E1 does not hold, and E10 says by how much not."""
    factor = np.eye(8, dtype=np.float32)[None]
    factor[0, 0, 1:] = -20
    feedback = Feedback([range(8)], factor)
    x = np.full((2, 8), 7, np.float32)
    x[1] = 0.4
    scheme = Scheme(separate_norm=False)
    q = quantize(x, scheme, feedback=feedback)
    error = np.abs(x - bounds.certificate(q).x_hat)[1]
    assert error[1:].min() > 7  # the 0.4 that the first channel lost, 20 times
    head = feedback.head(0)
    coded = Coded(x, scheme, head)
    assert (error <= bounds.feedback_element_error(coded.direction, coded.steps, head)[1]).all()
    assert (error > bounds.certificate(q).direction_element[1]).any()


def test_fourth_powers_cut_no_more_than_their_root_of_the_tokens() -> None:
    """F1 S4: where squares take .3 of the range from one token, for those on a finer grid."""
    x = np.append(np.tile(np.arange(-6, 7) / 10, 10), 1).astype(np.float32)[:, None]
    scheme = Scheme(separate_norm=False, scale_rule="search", scale_dtype="float32")
    known = len(x) ** 0.25 * bounds.element_error(
        np.float32([[1 / 7]]), scheme=scheme, direction=[[1.0]]
    )
    for head, holds in ((Feedback([[0]], np.ones((1, 1, 1))).head(0), True), (None, False)):
        block = spec.encode(x, scheme, head)
        error = np.abs(x - spec.decode(block, scheme)).max()
        assert (error <= known) == holds


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
        (lambda: bounds.feedback_gain_error(ONES, ONES, HEAD, ONES[:, :2]), ValueError,
         r"^y has shape \[2, 2\]; give \[..., tokens, 3\]"),
        (lambda: bounds.feedback_logit_error(ONES[:, :2], ONES, ONES, HEAD), ValueError,
         r"^query has shape \[2, 2\]; give \[..., queries, 3\]"),
        (lambda: bounds.feedback_metric_error(ONES, ONES, ONES, HEAD), ValueError,
         r"^moment has shape \[2, 3\]; give \[3, 3\]"),
    ],
)  # fmt: skip
def test_refusals(call: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        call()

"""Wrong key feedback (rule F1), and what goes wrong with it in ranges and gains (S4, M2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from nsq_ref.conformance.mistakes.arithmetic import divisor, in_order
from nsq_ref.conformance.mistakes.changes import (
    F32,
    F64,
    Function,
    after,
    around,
    instead,
    knowing,
    knowing_both,
    place,
)
from nsq_ref.conformance.mistakes.reference import Change, Mistake, Reference
from nsq_ref.feedback import HeadFeedback
from nsq_ref.scheme import Scheme

FEEDBACK = ("feedback", "stream_feedback")
# The choice of scale is an encoder's own, but what a cache stores is not (S4).
SEARCHED = ("stream_feedback",)


class _Channel(NamedTuple):
    """What is known of a block when a channel is coded; the last axis has length 1."""

    w: Any
    direction: Any
    scale: Any
    zero: Any
    coded: Any
    norm: Any
    wide: tuple[Any, Any]  # scale and zero before they were narrowed
    given: tuple[Any, Any] | None  # codes that are stored, and y; none before they are made
    weight: Any
    scheme: Scheme

    def taken_from(self, value: Any) -> Any:
        """Return the error of a value in place of y."""
        return np.where(self.norm == 0, F32(0), self.w - value)


def _made(reference: Reference, channel: _Channel) -> Any:
    spec, pair = reference.spec, (channel.scale, channel.zero)
    y = spec.dequantize(spec.code(channel.w, *pair, channel.scheme), *pair)
    return np.where(channel.coded, y, _kept(reference, channel))


def _value(reference: Reference, channel: _Channel) -> Any:
    """The y of F1."""
    return _made(reference, channel) if channel.given is None else channel.given[1]


def _kept(reference: Reference, channel: _Channel) -> Any:
    return reference.rounding.narrow(channel.w, np.dtype(np.float16)).astype(F32)


def _error(reference: Reference, channel: _Channel) -> Any:
    return channel.taken_from(_value(reference, channel))


def _finite(w: Any, direction: Any) -> Any:
    return np.where(np.isfinite(w), w, direction)


def _taken(later: Any, error: Any, shares: Any, weight: Any) -> Any:
    return later - error * shares


def _seen(later: Any, seen: Any, error: Any, shares: Any) -> Any:
    return later - seen * shares


def _of_w(reference: Reference, w: Any, direction: Any, coded: Any, scheme: Scheme) -> Any:
    return reference.spec.scale_and_zero(w, coded, scheme, fourth_powers=True)


def _of_directions(reference: Reference, w: Any, direction: Any, coded: Any, scheme: Scheme) -> Any:
    return _of_w(reference, direction, direction, coded, scheme)


def _loop(
    *,
    error: Callable[[Reference, _Channel], Any] = _error,
    finite: Function = _finite,
    finite_seen: Function = _finite,
    taken: Function = _taken,
    seen_taken: Function = _seen,
    of_itself: Function = lambda value, lost, weight: value,
    scales: Function = _of_w,
    scales_of_tokens: Function = lambda reference, direction, coded, scheme, *_: (
        reference.spec.scale_and_zero(direction, coded, scheme)
    ),
) -> Change:
    """F1 with some of its decisions taken otherwise."""

    def change(original: Function, reference: Reference) -> Function:
        def fed_back(
            direction: Any, coded: Any, norm: Any, feedback: HeadFeedback, scheme: Scheme,
            stored: Any = None,
        ) -> Any:  # fmt: skip
            spec = reference.spec
            w, seen, lost = direction.copy(), direction.copy(), np.zeros_like(direction)
            if stored is None:
                known = direction, coded, scheme, norm, feedback
                scale, zero = scales_of_tokens(reference, *known)
            else:
                scale, zero, index = stored.scale, stored.zero, stored.outlier_index
                y = spec.dequantized_direction(stored.codes, scale, zero, index, stored.outliers)
            for p, j in enumerate(feedback.order.tolist()):
                one = (..., slice(j, j + 1))
                w[one] = finite(w[one], direction[one])
                seen[one] = finite_seen(seen[one], direction[one])
                if scheme.axis == "channel" and stored is None:
                    made = scales(reference, w[one], direction[one], coded[one], scheme)
                    scale[one], zero[one] = made
                by_channel = scheme.axis == "channel"
                measured = (w[one], coded[one]) if by_channel else (direction, coded)
                lost[one] = error(reference, _Channel(
                    w[one], direction[one], scale[one] if by_channel else scale,
                    zero[one] if by_channel else zero, coded[one], norm[..., None],
                    _wide(reference, *measured, scheme),
                    None if stored is None else (stored.codes[one], y[one]),
                    feedback.factor[p, p], scheme,
                ))  # fmt: skip
                later, shares = feedback.order[p + 1 :], feedback.factor[p, p + 1 :]
                weight = feedback.factor[p, p]
                w[..., later] = taken(w[..., later], lost[one], shares, weight)
                seen[..., later] = seen_taken(seen[..., later], seen[one], lost[one], shares)
                w[one] = of_itself(w[one], lost[one], weight)
                seen[one] = of_itself(seen[one], seen[one], weight)
            return spec.FedBack(w, lost, seen, scale, zero)

        return fed_back

    return change


def _wide(reference: Reference, values: Any, coded: Any, scheme: Scheme) -> tuple[Any, Any]:
    wide = replace(scheme, scale_dtype="float32")
    low, high = reference.spec.extent(values, coded, wide)
    scale, zero = reference.spec.range_scale(low, high, wide)
    return scale, zero


# --- what is read -------------------------------------------------------------------------------


def _read(function: Callable[[HeadFeedback], HeadFeedback]) -> Change:
    return after(lambda heads, *_: [function(one) for one in heads])


def _by_channel(feedback: HeadFeedback) -> HeadFeedback:
    order = feedback.order
    return HeadFeedback(order, feedback.factor[np.ix_(order, order)])


def _rows_by_channel(feedback: HeadFeedback) -> HeadFeedback:
    return HeadFeedback(feedback.order, feedback.factor[feedback.order])


def _columns_by_channel(feedback: HeadFeedback) -> HeadFeedback:
    return HeadFeedback(feedback.order, feedback.factor[:, feedback.order])


def _in_turn(feedback: HeadFeedback) -> HeadFeedback:
    return HeadFeedback(np.arange(len(feedback.order), dtype=np.int32), feedback.factor)


def _inverted(feedback: HeadFeedback) -> HeadFeedback:
    return HeadFeedback(np.argsort(feedback.order).astype(np.int32), feedback.factor)


# --- errors -------------------------------------------------------------------------------------


def _not_moved(
    reference: Reference, direction: Any, coded: Any, norm: Any, feedback: Any, scheme: Scheme,
    stored: Any = None,
) -> Any:  # fmt: skip
    """Code the directions, with their scales."""
    pair = reference.spec.scale_and_zero(direction, coded, scheme)
    return reference.spec.FedBack(direction, np.zeros_like(direction), direction, *pair)


def _plain_factor(
    original: Function, x: Any, y: Any, norm: Any, scheme: Scheme, length: Any = None,
    size: Any = 1,
) -> Any:  # fmt: skip
    return original(x, y, norm, scheme, None, size)


def _from_direction(reference: Reference, channel: _Channel) -> Any:
    error = channel.direction - _value(reference, channel)
    return np.where(channel.norm == 0, F32(0), error)


def _of_coded(reference: Reference, channel: _Channel) -> Any:
    return np.where(channel.coded, _error(reference, channel), F32(0))


def _with_wide_scale(reference: Reference, channel: _Channel) -> Any:
    spec = reference.spec
    if channel.given is None:
        codes = spec.code(channel.w, channel.scale, channel.zero, channel.scheme)
    else:
        codes = channel.given[0]
    y = spec.dequantize(codes, *channel.wide)
    return channel.taken_from(np.where(channel.coded, y, _kept(reference, channel)))


def _unclamped(reference: Reference, channel: _Channel) -> Any:
    scale, zero = channel.scale.astype(F32), channel.zero.astype(F32)
    codes = np.rint((channel.w - zero) / reference.spec.where_zero(scale, np.inf))
    y = reference.spec.dequantize(codes.astype(F32), scale, zero)
    return channel.taken_from(np.where(channel.coded, y, _kept(reference, channel)))


def _of_zero_tokens_too(reference: Reference, channel: _Channel) -> Any:
    error = channel.w - _made(reference, channel)  # no code of a zero token is stored
    return np.where(channel.norm == 0, error, _error(reference, channel))


def _fused(later: Any, error: Any, shares: Any, weight: Any) -> Any:
    return (later.astype(F64) - error.astype(F64) * shares).astype(F32)


def _by_its_own_share(value: Any, lost: Any, weight: Any) -> Any:
    return value - lost * weight


def _nan_only(w: Any, direction: Any) -> Any:
    return np.where(np.isnan(w), direction, w)


def _largest(w: Any, direction: Any) -> Any:
    most = np.finfo(F32).max
    return np.nan_to_num(w, nan=0.0, posinf=most, neginf=-most)


def _in_float64(original: Function, reference: Reference) -> Function:
    """Keep w in float64, and round it where it is coded."""

    def fed_back(direction: Any, coded: Any, norm: Any, feedback: HeadFeedback, *known: Any) -> Any:
        wide = direction.astype(F64)
        place = iter(feedback.order.tolist())

        def finite(w: Any, start: Any) -> Any:
            j = next(place)
            with np.errstate(over="ignore"):
                return _finite(wide[..., j : j + 1].astype(F32), start)

        def taken(later: Any, error: Any, shares: Any, weight: Any) -> Any:
            left = feedback.order[len(feedback.order) - len(shares) :]
            wide[..., left] -= error.astype(F64) * shares
            return later

        change = _loop(finite=finite, finite_seen=_finite, taken=taken)
        return change(original, reference)(direction, coded, norm, feedback, *known)

    return fed_back


def _without_outlier_channels(original: Function, reference: Reference) -> Function:
    """Leave outlier channels as they are, and let nothing of them go on."""

    def fed_back(direction: Any, coded: Any, *others: Any) -> Any:
        fed = _loop(error=_of_coded)(original, reference)(direction, coded, *others)
        return fed._replace(w=np.where(coded, fed.w, direction))

    return fed_back


# --- scales -------------------------------------------------------------------------------------


def _directions_measured(fed: Any, direction: Any, *known: Any) -> Any:
    return direction


def _first_w(reference: Reference, direction: Any, coded: Any, *known: Any) -> Any:
    """Return what F1 makes with the scales of the directions."""
    return _loop()(_not_moved, reference)(direction, coded, *known).w


def _scales_of_moved_tokens(
    reference: Reference, direction: Any, coded: Any, scheme: Scheme, norm: Any, feedback: Any
) -> Any:
    if scheme.axis == "token":
        direction = _first_w(reference, direction, coded, norm, feedback, scheme)
    return reference.spec.scale_and_zero(direction, coded, scheme)


def _moved_tokens_measured(
    reference: Reference, fed: Any, direction: Any, coded: Any, norm: Any, feedback: Any,
    scheme: Scheme,
) -> Any:  # fmt: skip
    if scheme.axis == "channel":
        return fed.w
    return _first_w(reference, direction, coded, norm, feedback, scheme)


def _as_one_block(
    original: Function, reference: Reference, x: Any, scheme: Scheme, feedback: Any = None
) -> Any:
    """Encode all tokens as one block, whose scales each block has."""
    count = len(reference.spec.block_slices(x.shape[-2], scheme))
    if feedback is None or scheme.axis == "token" or scheme.outlier_channels:
        return original(x, scheme, feedback)
    block = reference.spec.encode(x, replace(scheme, block_size=None), feedback)
    parts = {
        name: np.repeat(getattr(block, name), count, axis=-2)
        for name in ("scale", "zero", "outlier_index")
    }
    return block._replace(**parts)


def _extents_of_all(extents: Any, blocks: Any, coded: Any, scheme: Scheme) -> Any:
    if scheme.axis == "token" or scheme.outlier_channels:
        return extents
    low, high = zip(*extents, strict=True)
    return [(np.min(low, axis=0), np.max(high, axis=0))] * len(extents)


def _candidates(*factors: float) -> Change:
    """S4 with other factors."""

    def shrunken_scales(
        original: Function, reference: Reference, low: Any, high: Any, scheme: Scheme
    ) -> Any:
        right, reference.spec.SHRINK = reference.spec.SHRINK, np.array(factors, F32)
        made = original(low, high, scheme)
        reference.spec.SHRINK = right
        return made

    return knowing_both(shrunken_scales)


def _squares(error: Any, fourth_powers: bool) -> Any:
    return np.square(error, dtype=F64)


def _fourth_powers(error: Any, fourth_powers: bool) -> Any:
    return np.square(_squares(error, fourth_powers))


def _fourth_powers_in_float32(error: Any, fourth_powers: bool) -> Any:
    return np.square(np.square(error)).astype(F64) if fourth_powers else _squares(error, False)


# --- gains --------------------------------------------------------------------------------------


def _lengths(
    reference: Reference, fed: Any, feedback: HeadFeedback, length: Function | None = None
) -> tuple[Any, Any]:
    """The a and the b of M2."""
    weights = _weights(feedback)
    length = length or reference.spec.length_if_finite
    return length(weights * fed.seen), length(weights * (fed.seen - fed.error))


def _weights(feedback: HeadFeedback) -> Any:
    weights = np.empty(len(feedback.order), F32)
    weights[feedback.order] = np.diagonal(feedback.factor)
    return weights


def _kept_by(ratio: Function, length: Function | None = None) -> Change:
    """Give ``ratio(a, b)`` for the length that is kept, a and b by another length if given."""

    def length_kept(reference: Reference, fed: Any, feedback: HeadFeedback) -> Any:
        before, then = _lengths(reference, fed, feedback, length)
        beyond = np.isinf(before) | np.isinf(then)
        return np.where(beyond, F32(np.inf), ratio(before, divisor(then)))

    return knowing(length_kept)


def _kept_with(function: Callable[[HeadFeedback], HeadFeedback]) -> Change:
    return around(lambda original, fed, feedback: original(fed, function(feedback)))


def _even(feedback: HeadFeedback) -> HeadFeedback:
    return HeadFeedback(feedback.order, np.eye(len(feedback.order), dtype=F32))


def _weighed_apart(reference: Reference, fed: Any, feedback: HeadFeedback) -> Any:
    weights, length = _weights(feedback), reference.spec.length_if_finite
    before, then = weights * fed.seen, weights * fed.seen - weights * fed.error
    return length(before) / divisor(length(then))


def _both_lengths(reference: Reference, fed: Any, feedback: HeadFeedback) -> Any:
    """Return a and b at once, as real and imaginary part, for `_product_first`."""
    before, then = _lengths(reference, fed, feedback)
    return before.astype(F64) + 1j * then.astype(F64)


def _product_first(
    original: Function, x: Any, y: Any, norm: Any, scheme: Scheme, length: Any = None,
    size: Any = 1,
) -> Any:  # fmt: skip
    if length is None or not scheme.separate_norm or scheme.magnitude != "gain":
        return original(x, y, norm, scheme, None, size)
    before, then = length.real.astype(F32), length.imag.astype(F32)
    return np.where(np.isinf(norm), norm, norm * before / divisor(then))


_fed = place("spec.fed_back", "F1", FEEDBACK)
_heads = place("model.heads_of", "F1", FEEDBACK)
_kept_length = place("spec.length_kept", "M2", FEEDBACK)
_seen_values = place("spec.fed_back", "M2", FEEDBACK)

FED_BACK = [
    Mistake("no feedback", "F1", "nothing moves, as without feedback", FEEDBACK,
        {"spec.fed_back": knowing(_not_moved), "spec.factor": around(_plain_factor)}),
    _heads("order of coding left out", "channels are coded in turn, and not in the order given",
        _read(_in_turn)),
    _heads("order of coding inverted",
        "the order says at which place each channel is coded; it is to say which is coded next",
        _read(_inverted)),
    _heads("factor in the order of channels",
        "the factor is read by channel; its rows and columns are in the order of coding",
        _read(_by_channel)),
    _heads("rows of the factor in the order of channels",
        "rows of the factor are read by channel; they are in the order of coding, as columns are",
        _read(_rows_by_channel)),
    _heads("columns of the factor in the order of channels",
        "columns of the factor are read by channel; they are in the order of coding, as rows are",
        _read(_columns_by_channel)),
    _heads("factor of the first head for all",
        "all heads have the feedback of the first; each has its own",
        after(lambda heads, *_: [heads[0]] * len(heads))),
    _heads("factors of the heads turned round", "heads have the feedback of others, the last first",
        after(lambda heads, *_: heads[::-1])),
    _fed("errors added", "errors are added to the channels that follow; they are taken away",
        _loop(taken=lambda later, error, shares, weight: later + error * shares)),
    _fed("errors over their weight",
        "errors are divided by the diagonal of the factor before they move; it only weighs (M2)",
        _loop(taken=lambda later, error, shares, weight: later - error / weight * shares)),
    _fed("errors times their weight",
        "errors are multiplied by the diagonal of the factor before they move; it only weighs (M2)",
        _loop(taken=lambda later, error, shares, weight: later - error * weight * shares)),
    _fed("feedback fused",
        "error * factor is fused with the difference; the product is to round first",
        _loop(taken=_fused)),
    _fed("feedback in double precision", "w is kept in float64; each step rounds to float32",
        _in_float64),
    _fed("error of the direction",
        "errors are direction - y; they are w - y, what was moved before included",
        _loop(error=_from_direction)),
    _fed("error of the scale before narrowing",
        "y is made with scale and zero before they are narrowed; use what is stored",
        _loop(error=_with_wide_scale)),
    _fed("error of the code before the clamp",
        "errors are those of codes before the clamp, so that what is cut off does not move on",
        _loop(error=_unclamped)),
    _fed("outlier channels passed over",
        "outlier channels take no part: their w is to move, and their error to move on",
        _without_outlier_channels),
    _fed("errors of outlier channels left out",
        "errors of outlier channels do not move on; theirs are of float16",
        _loop(error=_of_coded)),
    _fed("feedback in zero tokens", "errors move in zero tokens; there nothing is to move",
        _loop(error=_of_zero_tokens_too)),
    _fed("only NaN falls back",
        "an infinite w is coded as it is; like NaN, it is to be the direction again",
        _loop(finite=_nan_only)),
    _fed("largest for what is not finite",
        "a w that is not finite becomes 0 or the largest number; it is to be the direction again",
        _loop(finite=_largest)),
    Mistake("scales of the directions", "F1",
        "scales are those of the plain directions; they are to be made of w, channel by channel",
        FEEDBACK, {"spec.fed_back": _loop(scales=_of_directions),
                   "model.measured": instead(_directions_measured)}),
    Mistake("scales of moved tokens", "F1",
        "the scale of a token is made of w; it is that of the plain direction",
        FEEDBACK, {"spec.fed_back": _loop(scales_of_tokens=_scales_of_moved_tokens),
                   "model.measured": knowing(_moved_tokens_measured)}),
    Mistake("scales of all blocks", "F1",
        "scales are made of w over all tokens; each block has its own",
        ("feedback",), {"spec.encode_blocks": knowing_both(_as_one_block),
                        "model.extents": after(_extents_of_all)}),
]  # fmt: skip

SEARCHING = [
    place("spec.shrunken_scales", "S4", ("stream", *SEARCHED))("ranges of other lengths",
        "ranges are shrunken by 0.9, 0.8, 0.7, 0.6 and 0.5; by 0.95, 0.9, 0.85, 0.8 and 0.7",
        _candidates(1, 0.9, 0.8, 0.7, 0.6, 0.5)),
    place("spec.losses", "S4", ("stream",))("fourth powers without feedback",
        "the range of the least sum of fourth powers is taken; without feedback squares decide",
        instead(_fourth_powers)),
    place("spec.losses", "F1", SEARCHED)("squares under feedback",
        "the range of the least sum of squares is taken; under feedback fourth powers decide",
        instead(_squares)),
    place("spec.losses", "F1", SEARCHED)("fourth powers in float32",
        "fourth powers are made in float32; they are made and added in float64",
        instead(_fourth_powers_in_float32)),
]  # fmt: skip

GAINS_SEEN = [
    place("spec.factor", "M2", FEEDBACK)("gain of the plain length",
        "gains are norm / ||y||, as without feedback; they are norm * (a / b)",
        around(_plain_factor)),
    _kept_length("weights left out of a gain",
        "lengths of a gain are not weighed by the diagonal of the factor", _kept_with(_even)),
    _kept_length("weights in the order of channels",
        "weights are read by channel; the diagonal of the factor is in the order of coding",
        _kept_with(_in_turn)),
    _kept_length("weights before the difference",
        "b is of g * seen - g * e; it is of g * (seen - e)", knowing(_weighed_apart)),
    _kept_length("reciprocal of the length that is kept",
        "gains are norm * (a * (1 / b)), which rounds twice",
        _kept_by(lambda before, then: before * (F32(1) / then))),
    _kept_length("lengths that are kept in float32",
        "gains agree with a and b from sequential float32 sums",
        _kept_by(lambda before, then: before / then,
                 lambda values: np.sqrt(in_order(values, values)))),
    Mistake("product before the quotient in a gain", "M2",
        "gains are (norm * a) / b; they are norm * (a / b)",
        FEEDBACK, {"spec.length_kept": knowing(_both_lengths),
                   "spec.factor": around(_product_first)}),
    _seen_values("what is seen moved by errors",
        "what is seen moves by errors, as w does; it moves by itself",
        _loop(seen_taken=lambda later, seen, error, shares: later - error * shares)),
    _seen_values("what is seen not moved",
        "the lengths of a gain are those of directions; these are to move as what is seen",
        _loop(seen_taken=lambda later, *_: later)),
    _seen_values("diagonal in the movement",
        "a channel is moved by its own error, too; rows of the factor move what follows only",
        _loop(of_itself=_by_its_own_share)),
    _seen_values("what is seen not finite",
        "what is seen stays infinite or NaN; it is to be the direction again",
        _loop(finite_seen=lambda seen, direction: seen)),
]  # fmt: skip

"""Wrong key feedback (rule F1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from nsq_ref.conformance.mistakes.changes import (
    F32,
    F64,
    Function,
    after,
    around,
    instead,
    knowing_both,
    place,
)
from nsq_ref.conformance.mistakes.reference import Change, Mistake, Reference
from nsq_ref.feedback import HeadFeedback
from nsq_ref.scheme import Scheme
from nsq_ref.spec import Block

FEEDBACK = ("feedback", "stream_feedback")
FED_STREAM = ("stream_feedback",)


class _Channel(NamedTuple):
    """What is known of a block when a channel is coded."""

    w: Any  # [..., T]
    direction: Any
    scale: Any
    zero: Any
    coded: Any
    norm: Any
    wide: tuple[Any, Any]  # scale and zero before they were narrowed
    scheme: Scheme


def _value(reference: Reference, channel: _Channel) -> Any:
    """The y of F1."""
    spec, pair = reference.spec, (channel.scale, channel.zero)
    y = spec.dequantize(spec.code(channel.w, *pair, channel.scheme), *pair)
    return np.where(channel.coded, y, _kept(reference, channel))


def _kept(reference: Reference, channel: _Channel) -> Any:
    return reference.rounding.narrow(channel.w, np.dtype(np.float16)).astype(F32)


def _error(reference: Reference, channel: _Channel) -> Any:
    return np.where(channel.norm == 0, F32(0), channel.w - _value(reference, channel))


def _finite(w: Any, direction: Any) -> Any:
    return np.where(np.isfinite(w), w, direction)


def _taken(later: Any, error: Any, shares: Any) -> Any:
    return later - error * shares


def _loop(
    *,
    error: Callable[[Reference, _Channel], Any] = _error,
    finite: Function = _finite,
    taken: Function = _taken,
    read: Callable[[HeadFeedback], HeadFeedback] = lambda feedback: feedback,
) -> Change:
    """F1 with some of its decisions taken otherwise."""

    def change(original: Function, reference: Reference) -> Function:
        def fed_back(
            direction: Any, scale: Any, zero: Any, coded: Any, norm: Any, feedback: HeadFeedback,
            scheme: Scheme,
        ) -> Any:  # fmt: skip
            feedback = read(feedback)
            wide = _wide(reference, direction, coded, scheme)
            scale, zero, coded = np.broadcast_arrays(scale, zero, coded, direction)[:3]
            wide_scale, wide_zero = np.broadcast_arrays(*wide, direction)[:2]
            w = direction.copy()
            for p, j in enumerate(feedback.order.tolist()):
                w[..., j] = finite(w[..., j], direction[..., j])
                channel = _Channel(
                    w[..., j], direction[..., j], scale[..., j], zero[..., j], coded[..., j], norm,
                    (wide_scale[..., j], wide_zero[..., j]), scheme,
                )  # fmt: skip
                later = feedback.order[p + 1 :]
                lost = error(reference, channel)[..., None]
                w[..., later] = taken(w[..., later], lost, feedback.factor[p, p + 1 :])
            return w

        return fed_back

    return change


def _wide(reference: Reference, direction: Any, coded: Any, scheme: Scheme) -> tuple[Any, Any]:
    wide = replace(scheme, scale_dtype="float32")
    low, high = reference.spec.extent(direction, coded, wide)
    scale, zero = reference.spec.range_scale(low, high, wide)
    return scale, zero


# --- what is read -------------------------------------------------------------------------------


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


def _from_direction(reference: Reference, channel: _Channel) -> Any:
    return np.where(channel.norm == 0, F32(0), channel.direction - _value(reference, channel))


def _of_coded(reference: Reference, channel: _Channel) -> Any:
    return np.where(channel.coded, _error(reference, channel), F32(0))


def _with_wide_scale(reference: Reference, channel: _Channel) -> Any:
    spec = reference.spec
    codes = spec.code(channel.w, channel.scale, channel.zero, channel.scheme)
    y = np.where(channel.coded, spec.dequantize(codes, *channel.wide), _kept(reference, channel))
    return np.where(channel.norm == 0, F32(0), channel.w - y)


def _unclamped(reference: Reference, channel: _Channel) -> Any:
    scale, zero = channel.scale.astype(F32), channel.zero.astype(F32)
    codes = np.rint((channel.w - zero) / reference.spec.where_zero(scale, np.inf))
    y = reference.spec.dequantize(codes.astype(F32), scale, zero)
    y = np.where(channel.coded, y, _kept(reference, channel))
    return np.where(channel.norm == 0, F32(0), channel.w - y)


def _of_zero_tokens_too(reference: Reference, channel: _Channel) -> Any:
    return np.asarray(channel.w - _value(reference, channel))


def _negated(error: Function) -> Function:
    return lambda reference, channel: -error(reference, channel)


def _fused(later: Any, error: Any, shares: Any) -> Any:
    return (later.astype(F64) - error.astype(F64) * shares).astype(F32)


def _nan_only(w: Any, direction: Any) -> Any:
    return np.where(np.isnan(w), direction, w)


def _largest(w: Any, direction: Any) -> Any:
    most = np.finfo(F32).max
    return np.nan_to_num(w, nan=0.0, posinf=most, neginf=-most)


# --- all channels of a token --------------------------------------------------------------------


def _in_float64(original: Function, reference: Reference) -> Function:
    """Keep w in float64, and round it where it is coded."""

    def fed_back(
        direction: Any, scale: Any, zero: Any, coded: Any, norm: Any, feedback: HeadFeedback,
        scheme: Scheme,
    ) -> Any:  # fmt: skip
        scale, zero, coded = np.broadcast_arrays(scale, zero, coded, direction)[:3]
        w, wide = direction.copy(), direction.astype(F64)
        for p, j in enumerate(feedback.order.tolist()):
            with np.errstate(over="ignore"):
                w[..., j] = _finite(wide[..., j].astype(F32), direction[..., j])
            channel = _Channel(
                w[..., j], direction[..., j], scale[..., j], zero[..., j], coded[..., j], norm,
                (None, None), scheme,
            )  # fmt: skip
            later = feedback.order[p + 1 :]
            error = _error(reference, channel).astype(F64)
            wide[..., later] -= error[..., None] * feedback.factor[p, p + 1 :]
        return w

    return fed_back


def _without_outlier_channels(original: Function, reference: Reference) -> Function:
    """Leave outlier channels as they are, and let nothing of them go on."""

    def fed_back(direction: Any, scale: Any, zero: Any, coded: Any, *others: Any) -> Any:
        w = _loop(error=_of_coded)(original, reference)(direction, scale, zero, coded, *others)
        return np.where(coded, w, direction)

    return fed_back


def _going_on(original: Function, reference: Reference) -> Function:
    """Begin a token with what the one before it left to be taken from each channel."""

    def fed_back(direction: Any, scale: Any, zero: Any, coded: Any, norm: Any, *others: Any) -> Any:
        scale, zero = np.broadcast_arrays(scale, zero, direction)[:2]
        w = direction.copy()
        for t in range(direction.shape[-2]):
            one = (..., slice(t, t + 1), slice(None))
            start = direction[one]
            if t:
                before = (..., slice(t - 1, t), slice(None))
                start = _finite(start + (w[before] - direction[before]), start)
            w[one] = original(start, scale[one], zero[one], coded, norm[..., t : t + 1], *others)
        return w

    return fed_back


# --- scales of what was moved -------------------------------------------------------------------


def _measured_when_coded(original: Function, reference: Reference) -> Function:
    """Make the scale of a channel when it is coded, of w."""

    def encode(x: Any, scheme: Scheme, feedback: HeadFeedback | None = None) -> Any:
        right: Block = original(x, scheme, feedback)
        if feedback is None or scheme.axis == "token" or scheme.scale_rule == "search":
            return right
        spec = reference.spec
        norm = reference.rounding.norm(x) if scheme.separate_norm else np.ones(x.shape[:-1], F32)
        direction = spec.direction_of(x, norm)
        index = spec.outlier_channels(direction, scheme)
        coded = ~spec.mark(index, x.shape[-1])
        scale, zero = right.scale.copy(), right.zero.copy()
        for j in feedback.order.tolist():
            w = spec.fed_back(direction, scale, zero, coded, norm, feedback, scheme)
            low, high = spec.extent(w, coded, scheme)
            made = spec.range_scale(low, high, scheme)
            scale[..., j], zero[..., j] = made[0][..., j], made[1][..., j]
        w = spec.fed_back(direction, scale, zero, coded, norm, feedback, scheme)
        codes = spec.without_codes(spec.code(w, scale, zero, scheme), coded, norm)
        outliers = spec.kept_outliers(w, index)
        y = spec.dequantized_direction(codes, scale, zero, index, outliers)
        stored = spec.stored_factor(x, y, norm, scheme)
        return right._replace(codes=codes, scale=scale, zero=zero, outliers=outliers, norm=stored)

    return encode


def _moved_directions(original: Function, reference: Reference) -> Function:
    def measured(direction: Any, *known: Any) -> Any:
        axis = known[-1].axis
        return direction if axis == "token" else reference.spec.fed_back(direction, *known)

    return measured


_fed = place("spec.fed_back", "F1", FEEDBACK)
_heads = place("model.heads_of", "F1", FEEDBACK)

FED_BACK = [
    _fed("no feedback",
        "nothing moves, as without feedback, or where the factor is read transposed",
        instead(lambda direction, *others: direction)),
    _fed("order of coding left out", "channels are coded in turn, and not in the order given",
        _loop(read=_in_turn)),
    _fed("order of coding inverted",
        "the order says at which place each channel is coded; it is to say which is coded next",
        _loop(read=_inverted)),
    _fed("factor in the order of channels",
        "the factor is read by channel; its rows and columns are in the order of coding",
        _loop(read=_by_channel)),
    _fed("rows of the factor in the order of channels",
        "rows of the factor are read by channel; they are in the order of coding, as columns are",
        _loop(read=_rows_by_channel)),
    _fed("columns of the factor in the order of channels",
        "columns of the factor are read by channel; they are in the order of coding, as rows are",
        _loop(read=_columns_by_channel)),
    _heads("factor of the first head for all",
        "all heads have the feedback of the first; each has its own",
        after(lambda heads, *_: [heads[0]] * len(heads))),
    _heads("factors of the heads turned round", "heads have the feedback of others, the last first",
        after(lambda heads, *_: heads[::-1])),
    _fed("errors added", "errors are added to the channels that follow; they are taken away",
        _loop(error=_negated(_error))),
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
    _fed("feedback from token to token",
        "a token begins with what was moved in the one before it; each begins with its direction",
        _going_on),
    _fed("only NaN falls back",
        "an infinite w is coded as it is; like NaN, it is to be the direction again",
        _loop(finite=_nan_only)),
    _fed("largest for what is not finite",
        "a w that is not finite becomes 0 or the largest number; it is to be the direction again",
        _loop(finite=_largest)),
    Mistake("scales of moved channels", "F1",
        "scales are made of w when a channel is coded; they are those of the plain directions",
        FEEDBACK, {"spec.encode": _measured_when_coded, "model.measured": _moved_directions}),
]  # fmt: skip

# --- caches -------------------------------------------------------------------------------------


def _seal_plainly(original: Function, sequence: Any) -> None:
    """Seal a block without feedback."""
    feedback, sequence.feedback = sequence.feedback, None
    original(sequence)
    sequence.feedback = feedback


def _remember_waiting(original: Function, sequence: Any, tokens: Any) -> None:
    """Keep whether there were tokens in the tail when others came."""
    sequence.waited = bool(sequence.tail)
    original(sequence, tokens)


def _seal_what_waited_plainly(original: Function, sequence: Any) -> None:
    waited = vars(sequence).pop("waited", False)
    (_seal_plainly if waited else _call)(original, sequence)


def _remember_cut(original: Function, sequence: Any, length: int) -> None:
    """Keep whether a crop leaves a part of a block."""
    blocks = len(sequence.blocks)
    original(sequence, length)
    sequence.cut = len(sequence.blocks) < blocks and bool(sequence.tail)


def _seal_what_was_cut_plainly(original: Function, sequence: Any) -> None:
    cut = vars(sequence).pop("cut", False)
    (_seal_plainly if cut else _call)(original, sequence)


def _call(original: Function, sequence: Any) -> None:
    original(sequence)


def _moved(reference: Reference, sequence: Any, tokens: Any) -> Any:
    """Return tokens as feedback moves them, with the scales of all of them."""
    spec, scheme = reference.spec, sequence.scheme
    x = np.stack(tokens).astype(F32)
    block = spec.encode(x, scheme)
    norm = reference.rounding.norm(x) if scheme.separate_norm else np.ones(x.shape[:-1], F32)
    coded = ~spec.mark(block.outlier_index, x.shape[-1])
    direction = spec.direction_of(x, norm)
    w = spec.fed_back(direction, block.scale, block.zero, coded, norm, sequence.feedback, scheme)
    return reference.rounding.saturate(w * norm[..., None], sequence.dtype)


def _with_moved_tail(original: Function, reference: Reference, sequence: Any) -> Any:
    parts = original(sequence)
    if sequence.feedback is None or not sequence.tail:
        return parts
    return {**parts, "tail": _moved(reference, sequence, sequence.tail)}


def _seal_moved(original: Function, reference: Reference, sequence: Any) -> None:
    if sequence.feedback is not None:
        sequence.tail[:] = _moved(reference, sequence, sequence.tail)
    original(sequence)


FED_CACHES = [
    Mistake("feedback only where one append fills a block", "F1",
        "a block whose first tokens waited in the tail is sealed without feedback, as by a step "
        "of decoding; all blocks are coded with it",
        FED_STREAM, {"model.append": around(_remember_waiting),
                     "model.seal": around(_seal_what_waited_plainly)}),
    Mistake("no feedback after a crop", "F1",
        "a block that was cropped is sealed again without feedback; all blocks are coded with it",
        FED_STREAM, {"model.crop": around(_remember_cut),
                     "model.seal": around(_seal_what_was_cut_plainly)}),
    Mistake("feedback in the tail", "F1",
        "tokens of the tail are moved by feedback; they are kept as they came until they are coded",
        FED_STREAM, {"model.stored": knowing_both(_with_moved_tail)}),
    Mistake("feedback applied twice", "F1",
        "tokens that feedback has moved are sealed with feedback; it is to be applied once",
        FED_STREAM, {"model.seal": knowing_both(_seal_moved)}),
]  # fmt: skip

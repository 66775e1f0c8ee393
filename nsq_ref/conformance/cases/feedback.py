"""The cases of the operation ``"feedback"``: what is encoded under rule F1.

Computed ones are of every shape and of what is special in a rule; for each known mistake one more
is looked for, on which it gives other bytes. Where random data does not show it, one factor is
tuned, so that the channel that is coded last lies on a tie, or next to it; or a weight, so that a
gain does.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref import rounding, spec
from nsq_ref.conformance import model
from nsq_ref.conformance.cases.balanced import computed
from nsq_ref.conformance.cases.encode import FIRST, refusal
from nsq_ref.conformance.cases.families import with_sinks
from nsq_ref.conformance.cases.pools import FORMATS, Draw
from nsq_ref.conformance.mistakes import MISTAKES, Reference
from nsq_ref.conformance.operations import Case, same_arrays
from nsq_ref.dtypes import FLOAT_DTYPES, Array, Float32
from nsq_ref.feedback import HeadFeedback
from nsq_ref.scheme import Scheme

ATTEMPTS = 12  # at a case that shows a mistake
SHARES = (0, 0.0625, 0.125, 0.25, 0.5, 1, 2, 4)  # of errors, between which ranges are searched
TUNED = 3  # tokens that are put on a tie in turn
STEPS = (0, 1, -1, 2, -2, 3, -3, 5, -5, 8, -8)  # from a tie, of the factor
MOST_BLOCK = 512  # tokens of a block that has cases of its own
# Shapes of tokens and channels, all but the widest in every dtype.
SHAPES = ((6, 8), (1, 8), (5, 1), (5, 2), (4, 3), (3, 7), (24, 4), (3, 33), (2, 130))
WIDE = 64


class Made(NamedTuple):
    """The inputs of a case."""

    x: Array
    order: npt.NDArray[np.int32]
    factor: Float32


class _Shown(NamedTuple):
    """A mistake that cases are to show, and where it can show."""

    flag: str
    mistake: str
    kind: str = "plain"  # of what is drawn
    can: Callable[[Scheme], bool] = lambda scheme: True
    tuned: str = "code"  # what is put on a tie where what is drawn does not show it


def _has_outliers(scheme: Scheme) -> bool:
    return scheme.outlier_channels > 0


def _is_given(scheme: Scheme) -> bool:
    """Whether scales are no choice: a search avoids ties, and what it chooses may be refused."""
    return scheme.axis == "token" or scheme.scale_rule == "range"


def _narrows(scheme: Scheme) -> bool:
    return scheme.scale_dtype != "float32" and scheme.scale_rule == "range"


def _ranges_by(axis: str) -> Callable[[Scheme], bool]:
    return lambda scheme: scheme.axis == axis and scheme.scale_rule == "range"


def _has_zero_errors(scheme: Scheme) -> bool:
    return scheme.separate_norm and not scheme.symmetric and _ranges_by("channel")(scheme)


def _has_gains(scheme: Scheme) -> bool:
    return scheme.separate_norm and scheme.magnitude == "gain"


def _gain(mistake: str, kind: str = "plain", can: Callable[[Scheme], bool] = _has_gains) -> _Shown:
    return _Shown("feedback-gain", mistake, kind, can, "gain")


SHOWN = (
    _Shown("moved-errors", "no feedback"),
    _Shown("moved-errors", "errors added"),
    _Shown("feedback-weights", "errors over their weight"),
    _Shown("feedback-weights", "errors times their weight"),
    _Shown("order-of-coding", "order of coding left out"),
    _Shown("order-of-coding", "order of coding inverted"),
    _Shown("order-of-coding", "factor in the order of channels"),
    _Shown("order-of-coding", "rows of the factor in the order of channels"),
    _Shown("order-of-coding", "columns of the factor in the order of channels"),
    _Shown("feedback-of-heads", "factor of the first head for all", "heads"),
    _Shown("feedback-of-heads", "factors of the heads turned round", "heads"),
    _Shown("fused-feedback", "feedback fused"),
    _Shown("fused-feedback", "feedback in double precision"),
    _Shown("feedback-tie", "half away from zero", can=_is_given),
    _Shown("feedback-tie", "half up", can=_is_given),
    _Shown("feedback-tie", "half down", can=_is_given),
    _Shown("error-of-w", "error of the direction"),
    _Shown("error-of-w", "error of the scale before narrowing", can=_narrows),
    _Shown("feedback-clamp", "error of the code before the clamp", "beyond codes"),
    _Shown("feedback-outliers", "outlier channels passed over", can=_has_outliers),
    _Shown("feedback-outliers", "errors of outlier channels left out", can=_has_outliers),
    _Shown("feedback-zero-token", "feedback in zero tokens", "zero", _has_zero_errors),
    _Shown("feedback-overflow", "only NaN falls back", "wild", _is_given),
    _Shown("feedback-overflow", "largest for what is not finite", "wild", _is_given),
    _Shown("scales-of-w", "scales of the directions", can=_ranges_by("channel")),
    _Shown("scales-of-w", "scales of moved tokens", can=_ranges_by("token")),
    _gain("gain of the plain length"),
    _gain("weights left out of a gain"),
    _gain("weights in the order of channels"),
    _gain("weights before the difference"),
    _gain("reciprocal of the length that is kept"),
    _gain("lengths that are kept in float32"),
    _gain("product before the quotient in a gain"),
    _gain("what is seen moved by errors"),
    _gain("what is seen not moved"),
    _gain("diagonal in the movement"),
    _gain("what is seen not finite", "wild",
          lambda scheme: _has_gains(scheme) and _is_given(scheme)),
)  # fmt: skip


def feedback_cases(scheme: Scheme, seed: int, quick: bool = False) -> Iterator[Case]:
    """Yield the cases of the operation ``"feedback"``; if `quick`, none that is looked for.

    Examples
    --------
    >>> next(feedback_cases(Scheme(), 0))
    Case(feedback moved-errors/0)
    """
    for dtype, first in FIRST.items():
        numbers: dict[str, Iterator[int]] = defaultdict(functools.partial(count, first))
        draw = Draw(seed, f"feedback in {dtype}")
        balanced = _balanced(scheme, Draw(seed, f"balanced norms under feedback in {dtype}"), dtype)
        for flag, made in itertools.chain(_made(scheme, draw, dtype, quick), balanced):
            given = made._replace(x=with_sinks(made.x, scheme))
            name, rule = f"{flag}/{next(numbers[flag])}", _refusal(given, scheme)
            yield Case(name, "feedback", scheme, (flag,), given._asdict(), rule)


def _refusal(made: Made, scheme: Scheme) -> str | None:
    return refusal(
        made.x, scheme, lambda x: model.blocks_with_feedback(x, scheme, made.order, made.factor)
    )


def _made(scheme: Scheme, draw: Draw, dtype: str, quick: bool) -> Iterator[tuple[str, Made]]:
    kind = FLOAT_DTYPES[dtype]
    for tokens, head_dim in SHAPES:
        if head_dim <= WIDE or dtype == "float32":
            yield "moved-errors", drawn(draw, scheme, (tokens, head_dim), dtype)
    if scheme.sink_tokens:
        made = drawn(draw, scheme, (1, 4), dtype)
        yield "moved-errors", made._replace(x=made.x[:0])
    for turned in (np.arange(7)[::-1], np.roll(np.arange(7), 3)):
        made = drawn(draw, scheme, (5, 7), dtype)
        yield "order-of-coding", made._replace(order=turned[None].astype(np.int32))
    for lead, kv_heads in (((2,), 2), ((2, 3), 3), ((3, 2), 1), ((3, 1), 1)):
        yield "feedback-of-heads", drawn(draw, scheme, (*lead, 4, 5), dtype, kv_heads)
    made = drawn(draw, scheme, (4, 6), dtype)
    yield "no-feedback", made._replace(factor=np.eye(6, dtype=np.float32)[None])
    size = scheme.block_size
    if size is not None and size <= MOST_BLOCK:
        yield "feedback-tokens", drawn(draw, scheme, (2 * size + 1, 5), dtype)
        yield "feedback-tokens", drawn(draw, scheme, (2, size + 1, 4), dtype, 2)
    for sign in (0, 1, -1):  # with a sign, the zero is an extreme of the channel
        made = drawn(draw, scheme, (4, 6), dtype)
        first = made.x[:, made.order[0, 0]]
        first[...] = np.copysign(first, kind.type(sign)) if sign else first
        made.x[[1] if sign else [0, 2]] = 0
        yield "feedback-zero-token", made
    made = drawn(draw, scheme, (3, 5), dtype)
    made.x[1, 2] = kind.type(np.nan)
    yield "not-finite", made
    made = drawn(draw, scheme, (6, 8), dtype)
    yield "feedback-clamp", _enlarged(made, 16)
    if _ranges_by("channel")(scheme):
        made = drawn(draw, scheme, (4, 6), dtype)
        yield "moved-scales", _enlarged(made, 2**22)
    if scheme.outlier_channels and _is_given(scheme):
        made = drawn(draw, scheme, (3, scheme.outlier_channels + 3), dtype)
        yield "feedback-overflow", _enlarged(made, 2**40)
    if not quick:
        yield from _looked_for(scheme, draw, dtype)


def _balanced(scheme: Scheme, draw: Draw, dtype: str) -> Iterator[tuple[str, Made]]:
    """Yield keys with balanced norms, with plain ones, and with both (N3)."""
    if scheme.norm_rule == "balanced":
        for flag, x in computed(scheme, draw, dtype):
            if flag in ("outlier-pair", "offset-channel", "balanced-choice", "balanced-zero"):
                yield "balanced-feedback", drawn(draw, scheme, x.shape, dtype)._replace(x=x)


def _looked_for(scheme: Scheme, draw: Draw, dtype: str) -> Iterator[tuple[str, Made]]:
    """Yield inputs on which known mistakes give other bytes."""
    scheme = replace(scheme, sink_tokens=0)  # sinks come in front of what is found
    for shown in SHOWN:
        if not shown.can(scheme):
            continue
        for _ in range(ATTEMPTS * (4 if shown.kind == "wild" else 1)):  # many are refused
            made = _of_kind(shown.kind, draw, scheme, dtype)
            if _refusal(made, scheme) is not None:
                continue
            tuned = _tuned_gains if shown.tuned == "gain" else _tuned
            variants = (one for part in ([made], tuned(made, scheme)) for one in part)
            found = next((one for one in variants if shows(one, scheme, shown.mistake)), None)
            if found is not None:
                yield shown.flag, found
                break


def shows(made: Made, scheme: Scheme, mistake: str) -> bool:
    """Whether a mistake gives other bytes."""
    try:
        right, wrong = (
            _reference(one).model.encode_with_feedback(made.x, scheme, made.order, made.factor)
            for one in ("", mistake)
        )
    except ValueError:  # a code beyond the range, which packing refuses
        return False
    return not same_arrays(right, wrong)


@functools.cache
def _reference(mistake: str) -> Reference:
    return Reference([MISTAKES[mistake]] if mistake else [])


class _Block(NamedTuple):
    """The first block of what is given, and what F1 makes of it."""

    direction: Float32
    coded: Array
    norm: Float32
    fed: spec.FedBack

    @classmethod
    def of(cls, made: Made, factor: Float32, scheme: Scheme) -> _Block:
        x = made.x[: scheme.tokens_per_block(len(made.x))].astype(np.float32)
        norm, _ = spec.norms_and_sizes(x, scheme)
        direction = spec.direction_of(x, norm)
        coded = ~spec.mark(spec.outlier_channels(direction, scheme), x.shape[-1])
        feedback = HeadFeedback(made.order[0], factor)
        fed = spec.fed_back(direction, coded, norm, feedback, scheme)
        return cls(direction, coded, norm, fed)


def _tuned(made: Made, scheme: Scheme) -> Iterator[Made]:
    """Yield other factors, by which the last channel of a token lies on a tie, or next to it."""
    if made.x.ndim > 2:
        return
    moved = _Last.of(made, scheme)
    size = np.abs(np.nan_to_num(moved.error[:, 0], posinf=0, neginf=0))
    for token in np.argsort(-size, kind="stable")[:TUNED].tolist():
        if not moved.coded.any() or size[token] == 0:
            return
        found = list(crossing(moved.codes, token, -4, 4))
        # Where it is the scale that changes, there is no tie.
        if found and len({moved.scales(share)[1].tobytes() for share in found}) == 1:
            yield from (_with_share(made, share) for share in found)


def searched_otherwise(made: Made, scheme: Scheme, mistake: str) -> Iterator[Made]:
    """Yield other factors, by which a mistake takes another range for the last channel (S4)."""
    right, wrong = _Last.of(made, scheme), _reference(mistake).spec

    def differs(share: np.float32) -> bool:
        w, scale, _ = right.scales(share)
        found = wrong.scale_and_zero(w, right.coded, scheme, fourth_powers=True)[0]
        return bool((found != scale).any())

    def chosen(share: np.float32) -> Any:
        w, scale, _ = right.scales(share)
        all_ranges = spec.shrunken_scales(*spec.extent(w, right.coded, scheme), scheme)[0]
        return np.asarray(np.argmax(all_ranges == scale, axis=0))[0]

    for low, high in itertools.pairwise(SHARES):
        if differs(np.float32(low)):
            yield _with_share(made, np.float32(low))
        for share in crossing(chosen, 0, low, high):
            if differs(share):  # about where two ranges are as good
                yield _with_share(made, share)


def _with_share(made: Made, share: np.float32) -> Made:
    factor = made.factor.copy()
    factor[0, -2, -1] = share
    return made._replace(factor=factor)


class _Last(NamedTuple):
    """The channel of the first block that is coded last, and what moves it at the end."""

    start: Float32
    error: Float32
    direction: Float32
    coded: Array
    of_tokens: tuple[Array, Array]
    scheme: Scheme

    @classmethod
    def of(cls, made: Made, scheme: Scheme) -> _Last:
        factor = made.factor[0].copy()
        factor[-2, -1] = 0
        direction, coded, _, fed = _Block.of(made, factor, scheme)
        before, last = (slice(j, j + 1) for j in made.order[0, -2:].tolist())
        return cls(
            fed.w[:, last], fed.error[:, before], direction[:, last], coded[:, last],
            (fed.scale, fed.zero), scheme,
        )  # fmt: skip

    def scales(self, share: np.float32) -> tuple[Float32, Array, Array]:
        moved = self.start - self.error * share
        w = np.where(np.isfinite(moved), moved, self.direction)
        if self.scheme.axis == "token":
            return w, *self.of_tokens
        return w, *spec.scale_and_zero(w, self.coded, self.scheme, fourth_powers=True)

    def codes(self, share: np.float32) -> Float32:
        return spec.code(*self.scales(share), self.scheme)


def _tuned_gains(made: Made, scheme: Scheme) -> Iterator[Made]:
    """Yield other weights, by which a token's gain lies on a tie of its dtype, or next to it."""
    if made.x.ndim > 2:
        return
    factor = made.factor[0].copy()
    block = _Block.of(made, factor, scheme)
    dtype = FLOAT_DTYPES[scheme.norm_dtype]

    def gains(weight: np.float32) -> Array:
        factor[-1, -1] = weight
        length = spec.length_kept(block.fed, HeadFeedback(made.order[0], factor))
        return rounding.narrow(block.norm * length, dtype)

    for token in range(len(block.norm)):
        ends = np.float32(2.0**-6), np.float32(1)
        for weight in crossing(gains, token, *ends):
            if 0 < weight <= 1:
                tuned = made.factor.copy()
                tuned[0, -1, -1] = weight
                yield made._replace(factor=tuned)


def crossing(
    function: Callable[[np.float32], Any], at: int, low: float, high: float
) -> Iterator[np.float32]:
    """Yield float32 about one where an element changes; none where both ends give the same.

    Examples
    --------
    >>> next(crossing(lambda value: np.array([value >= 0.75]), 0, 0, 1))
    np.float32(0.75)
    """
    below, above = np.float32(low), np.float32(high)
    first = function(below)[at]
    if first == function(above)[at]:
        return
    while (middle := (below + above) / np.float32(2)) not in (below, above):
        below, above = (middle, above) if function(middle)[at] == first else (below, middle)
    for step in STEPS:
        yield (above.view(np.int32) + np.int32(step)).view(np.float32)


# --- what is drawn ------------------------------------------------------------------------------


def drawn(
    draw: Draw, scheme: Scheme, shape: tuple[int, ...], dtype: str, kv_heads: int = 1
) -> Made:
    """Draw keys, of which the first channels are outliers, any order, factors and weights up to 1.

    Examples
    --------
    >>> made = drawn(Draw(0, "keys"), Scheme(), (2, 5, 3), "float16", kv_heads=2)
    >>> made.x.shape, made.order.shape, made.factor.shape
    ((2, 5, 3), (2, 3), (2, 3, 3))
    """
    head_dim = shape[-1]
    x = draw.bell(*shape)
    x[..., : scheme.outlier_channels] *= np.float32(8)
    order = np.argsort(draw.uniform(0, 1, kv_heads, head_dim), axis=-1, kind="stable")
    factor = draw.uniform(-1, 1, kv_heads, head_dim, head_dim)
    weights = np.ldexp(draw.uniform(0.5, 1, *order.shape), -draw.integers(0, 6, *order.shape))
    channels = np.arange(head_dim)
    factor[:, channels, channels] = weights
    return Made(
        x.astype(FLOAT_DTYPES[dtype]), order.astype(np.int32), np.triu(factor).astype(np.float32)
    )


def _enlarged(made: Made, by: float) -> Made:
    """Let errors move by so much more; weights stay."""
    scale = np.where(np.eye(made.factor.shape[-1], dtype=bool), 1, by).astype(np.float32)
    return made._replace(factor=made.factor * scale)


def _of_kind(kind: str, draw: Draw, scheme: Scheme, dtype: str) -> Made:
    """Draw what a mistake of a kind may show on; the last two channels are no outliers."""
    head_dim = min(scheme.outlier_channels, 32) + 6
    heads = 2 if kind == "heads" else 1
    tokens = min(5, scheme.block_size or 5) if kind == "wild" else 5
    if kind == "beyond codes" and scheme.scale_rule == "search":  # which cuts off few of many
        tokens = min(128, scheme.block_size or 128)
    made = drawn(draw, scheme, (*((2,) if heads == 2 else ()), tokens, head_dim), dtype, heads)
    order = made.order.copy()
    for one in order:  # what is tuned is coded last, and is no outlier
        last = one[one >= head_dim - 2]
        one[:] = [*one[one < head_dim - 2], *last]
    if kind == "beyond codes":
        by_range = _ranges_by("channel")(scheme)
        own = made._replace(order=order)
        return _subnormal(own, scheme) if by_range else _enlarged(own, 4)
    if kind == "zero":
        made.x[1] = 0
        return _enlarged(made._replace(order=order), 8)
    if kind == "wild":
        return _wild(made, draw, scheme)
    return made._replace(order=order)


def _subnormal(made: Made, scheme: Scheme) -> Made:
    """Give a channel a scale that is the least subnormal and too small by a third for it."""
    made.x[:, made.order[0, -2:]] = 0
    factor = made.factor.copy()
    factor[0, :-2, -2:] = 0
    error = _Block.of(made, factor[0], scheme).fed.error[:, made.order[0, -3]]
    span = np.max(np.abs(error)) if scheme.symmetric else np.ptp(error)
    least = FORMATS[scheme.scale_dtype].least
    wanted = np.ldexp(1.4 * scheme.code_range[1], least) / np.float64(span)
    factor[0, -3, -2] = wanted if np.isfinite(wanted) else 0
    factor[0, -2, -1] = np.ldexp(1, min(-least, 127))
    return made._replace(factor=factor)


def _wild(made: Made, draw: Draw, scheme: Scheme) -> Made:
    """Move channels beyond float32; outlier channels, which come first, float16 is to hold."""
    shape = made.factor.shape
    order = np.sort(made.order)
    if scheme.axis == "token":
        sizes = np.ldexp(draw.signs(*shape), 42 * draw.integers(-1, 4, *shape))
        sizes[..., : scheme.outlier_channels] = 0
        weights = made.factor * np.eye(shape[-1], dtype=np.float32)
        moving = np.triu(sizes, 1).astype(np.float32)
        return made._replace(order=order, factor=moving + weights)
    # A first channel makes others large, but for their scales' dtype, and these the last infinite.
    factor = made.factor.copy()
    factor[0, -5, -4:] = 0
    error = _Block.of(made._replace(order=order), factor[0], scheme).fed.error[:, order[0, -5]]
    largest = 2.0**14 * (scheme.code_range[1] if scheme.symmetric else 1)  # zeros are stored, too
    exponent = int(np.frexp(largest / max(float(np.max(np.abs(error))), 2.0**-60))[1])
    factor[0, -5, -4:-1] = np.ldexp(draw.signs(3), exponent)
    factor[0, -4:-1, :] *= np.eye(shape[-1], dtype=np.float32)[-4:-1]
    factor[0, -4:-1, -1] = np.ldexp(draw.signs(3), 127)
    return made._replace(order=order, factor=factor)

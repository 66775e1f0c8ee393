"""The cases of the operation ``"feedback"``: what is encoded under rule F1.

Computed ones are of every shape and of what is special in a rule; for each known mistake one more
is looked for, on which it gives other bytes. Where random data does not show it, one factor is
tuned, so that the channel that is coded last lies on a tie, or next to it.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref import rounding, spec
from nsq_ref.conformance import model
from nsq_ref.conformance.cases.encode import FIRST, refusal
from nsq_ref.conformance.cases.families import with_sinks
from nsq_ref.conformance.cases.pools import Draw
from nsq_ref.conformance.mistakes import MISTAKES, Reference
from nsq_ref.conformance.operations import Case, same_arrays
from nsq_ref.dtypes import FLOAT_DTYPES, Array, Float32
from nsq_ref.feedback import HeadFeedback
from nsq_ref.scheme import Scheme

ATTEMPTS = 12  # at a case that shows a mistake
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


def _has_outliers(scheme: Scheme) -> bool:
    return scheme.outlier_channels > 0


def _has_zero_errors(scheme: Scheme) -> bool:
    return scheme.separate_norm and not scheme.symmetric and scheme.outlier_channels > 0


def _narrows(scheme: Scheme) -> bool:
    return scheme.scale_dtype != "float32" and scheme.scale_rule == "range"


def _ranges_by_channel(scheme: Scheme) -> bool:
    return scheme.axis == "channel" and scheme.scale_rule == "range"


SHOWN = (
    _Shown("moved-errors", "no feedback"),
    _Shown("moved-errors", "errors added"),
    _Shown("order-of-coding", "order of coding left out"),
    _Shown("order-of-coding", "order of coding inverted"),
    _Shown("order-of-coding", "factor in the order of channels"),
    _Shown("order-of-coding", "rows of the factor in the order of channels"),
    _Shown("order-of-coding", "columns of the factor in the order of channels"),
    _Shown("feedback-of-heads", "factor of the first head for all", "heads"),
    _Shown("feedback-of-heads", "factors of the heads turned round", "heads"),
    _Shown("fused-feedback", "feedback fused"),
    _Shown("fused-feedback", "feedback in double precision"),
    _Shown("feedback-tie", "half away from zero"),
    _Shown("feedback-tie", "half up"),
    _Shown("feedback-tie", "half down"),
    _Shown("error-of-w", "error of the direction"),
    _Shown("error-of-w", "error of the scale before narrowing", "small", _narrows),
    _Shown("feedback-clamp", "error of the code before the clamp"),
    _Shown("feedback-outliers", "outlier channels passed over", can=_has_outliers),
    _Shown("feedback-outliers", "errors of outlier channels left out", can=_has_outliers),
    _Shown("feedback-zero-token", "feedback in zero tokens", "zero", _has_zero_errors),
    _Shown("feedback-tokens", "feedback from token to token",
           can=lambda scheme: scheme.block_size != 1),
    _Shown("feedback-overflow", "only NaN falls back", "wild"),
    _Shown("feedback-overflow", "largest for what is not finite", "wild"),
    _Shown("scales-of-directions", "scales of moved channels", can=_ranges_by_channel),
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
        for flag, made in _made(scheme, draw, dtype, quick):
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
    for zeros in ([1], [0, 2]):
        made = drawn(draw, scheme, (4, 6), dtype)
        made.x[zeros] = 0
        yield "feedback-zero-token", made
    made = drawn(draw, scheme, (3, 5), dtype)
    made.x[1, 2] = kind.type(np.nan)
    yield "not-finite", made
    made = drawn(draw, scheme, (6, 8), dtype)
    yield "feedback-clamp", made._replace(factor=_upper(made.factor * np.float32(16)))
    if scheme.outlier_channels:
        made = drawn(draw, scheme, (3, scheme.outlier_channels + 3), dtype)
        yield "feedback-overflow", made._replace(factor=_upper(made.factor * np.float32(2**40)))
    if not quick:
        yield from _looked_for(scheme, draw, dtype)


def _looked_for(scheme: Scheme, draw: Draw, dtype: str) -> Iterator[tuple[str, Made]]:
    """Yield inputs on which known mistakes give other bytes."""
    scheme = replace(scheme, sink_tokens=0)  # sinks come in front of what is found
    for shown in SHOWN:
        if not shown.can(scheme):
            continue
        for _ in range(ATTEMPTS):
            made = _of_kind(shown.kind, draw, scheme, dtype)
            if _refusal(made, scheme) is not None:
                continue
            variants = (one for part in ([made], _tuned(made, scheme)) for one in part)
            found = next((one for one in variants if _shows(one, scheme, shown.mistake)), None)
            if found is not None:
                yield shown.flag, found
                break


def _shows(made: Made, scheme: Scheme, mistake: str) -> bool:
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


def _tuned(made: Made, scheme: Scheme) -> Iterator[Made]:
    """Yield other factors, by which the last channel of a token lies on a tie, or next to it."""
    if made.x.ndim > 2:
        return
    x = made.x[: scheme.tokens_per_block(len(made.x))].astype(np.float32)
    norm = rounding.norm(x) if scheme.separate_norm else np.ones(len(x), np.float32)
    direction, block = spec.direction_of(x, norm), spec.encode(x, scheme)
    coded = ~spec.mark(block.outlier_index, x.shape[-1])
    factor = made.factor.copy()
    factor[0, -2, -1] = 0
    feedback = HeadFeedback(made.order[0], factor[0])
    w = spec.fed_back(direction, block.scale, block.zero, coded, norm, feedback, scheme)
    scale, zero, coded = np.broadcast_arrays(block.scale, block.zero, coded, w)[:3]
    before, last = made.order[0, -2:].tolist()
    y = spec.dequantize(spec.code(w, scale, zero, scheme), scale, zero)[:, before]
    kept = rounding.narrow(w[:, before], np.dtype(np.float16)).astype(np.float32)
    error = np.where(norm == 0, 0, w[:, before] - np.where(coded[:, before], y, kept))
    token = int(np.argmax(np.abs(np.nan_to_num(error, posinf=0, neginf=0))))
    wide, low = float(scale[token, last]), float(zero[token, last])
    if not coded[token, last] or wide == 0 or error[token] == 0:
        return
    least, most = scheme.code_range
    ties = np.arange(least, most) + 0.5
    targets = ties * wide + low
    now = float(w[token, last])
    # The tie next to it, and the one nearest to 0, where the product is as large as the channel.
    chosen = [targets[np.argmin(np.abs(targets - now))], targets[np.argmin(np.abs(targets))]]
    for step, target in itertools.product(STEPS, dict.fromkeys(chosen)):
        with np.errstate(over="ignore"):
            share = np.float32((now - target) / float(error[token]))
        if share == 0 or not np.isfinite(share):
            continue
        factor = made.factor.copy()
        factor[0, -2, -1] = (share.view(np.int32) + np.int32(step)).view(np.float32)
        if np.isfinite(factor).all():
            yield made._replace(factor=factor)


# --- what is drawn ------------------------------------------------------------------------------


def drawn(
    draw: Draw, scheme: Scheme, shape: tuple[int, ...], dtype: str, kv_heads: int = 1
) -> Made:
    """Draw keys, of which the first channels are outliers, any order, and factors up to 1.

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
    factor = draw.uniform(-1, 1, kv_heads, head_dim, head_dim).astype(np.float32)
    return Made(x.astype(FLOAT_DTYPES[dtype]), order.astype(np.int32), _upper(factor))


def _upper(factor: Float32) -> Float32:
    """Return factors with 1 on the diagonal and 0 below it."""
    return np.triu(factor, 1) + np.eye(factor.shape[-1], dtype=np.float32)


def _of_kind(kind: str, draw: Draw, scheme: Scheme, dtype: str) -> Made:
    """Draw what a mistake of a kind may show on; the last two channels are no outliers."""
    head_dim = min(scheme.outlier_channels, 32) + 6
    heads = 2 if kind == "heads" else 1
    made = drawn(draw, scheme, (*((2,) if heads == 2 else ()), 5, head_dim), dtype, heads)
    order = made.order.copy()
    for one in order:  # what is tuned is coded last, and is no outlier
        last = one[one >= head_dim - 2]
        one[:] = [*one[one < head_dim - 2], *last]
    if kind == "small" and draw.signs(1)[0] > 0:  # scales, if not of directions, are subnormal
        made.x[...] *= made.x.dtype.type(2.0**-19)
    if kind == "zero":
        made.x[1] = 0
    if kind == "wild":  # but for outlier channels, which come first: float16 is to hold them
        shape = (1, head_dim, head_dim)
        sizes = np.ldexp(draw.signs(*shape), 42 * draw.integers(-1, 4, *shape))
        sizes[..., : scheme.outlier_channels] = 0
        return made._replace(order=np.sort(order), factor=_upper(sizes.astype(np.float32)))
    return made._replace(order=order)

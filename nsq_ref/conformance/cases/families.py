"""Families of inputs to encode, in the order of their ids: a function each.

Computed ones lie on ties, next to ties, and at the ends of every range; picked ones are the blocks
of a pool of near-ties on which a wrong encoder gives other bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from nsq_ref.conformance.cases.encoders import WRONG_ENCODERS, wrong_encoders
from nsq_ref.conformance.cases.halves import tuned_ties
from nsq_ref.conformance.cases.pools import FORMATS, POOL, Draw, factor_ties, near_ties, telling
from nsq_ref.conformance.cases.ties import exact_ties, factor_midpoints, norm_midpoints
from nsq_ref.conformance.cases.tiles import sequences
from nsq_ref.conformance.mistakes.arithmetic import FLOAT32_SUMS, in_order
from nsq_ref.dtypes import FLOAT_DTYPES, Array
from nsq_ref.scheme import Scheme

FLOAT16, BFLOAT16 = FLOAT_DTYPES["float16"], FLOAT_DTYPES["bfloat16"]
MOST = FORMATS["float32"].end


class Also(NamedTuple):
    """An input that a further flag is about, too."""

    x: Array
    flag: str


# A family yields inputs; float64 ones are rounded to float32, and sinks are put in front.
Family = Callable[[Scheme, Draw], Iterator["Array | Also"]]
FAMILIES: dict[str, Family] = {}


def _family(flag: str) -> Callable[[Family], Family]:
    def register(function: Family) -> Family:
        FAMILIES[flag] = function
        return function

    return register


def with_sinks(x: Array, scheme: Scheme) -> Array:
    """Put as many sinks in front as the scheme takes, so large that they would change scales."""
    sinks = np.resize(np.array([96.0, -160.0, 0.375]), (scheme.sink_tokens, x.shape[-1]))
    sinks = np.broadcast_to(sinks, (*x.shape[:-2], *sinks.shape))
    return np.concatenate([sinks.astype(x.dtype), x], axis=-2)


# --- shapes, dtypes, zeros ----------------------------------------------------------------------


@_family("ordinary")
def _ordinary(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    for tokens, head_dim in (
        (6, 8), (1, 8), (5, 1), (5, 2), (4, 3), (4, 5), (3, 7), (3, 9), (3, 96), (2, 128), (2, 256),
        (24, 4),
    ):  # fmt: skip
        yield draw.bell(tokens, head_dim)


@_family("leading-axes")
def _leading_axes(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    for lead in ((2,), (2, 2), (3, 1)):
        magnitude = np.ldexp(1.0, draw.integers(-4, 5, *lead))[..., None, None]
        yield draw.bell(*lead, 3, 6) * magnitude


@_family("input-dtype")
def _input_dtypes(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    for dtype in (FLOAT16, BFLOAT16):
        for tokens, head_dim, scale in ((5, 6, 1.0), (3, 9, 200.0), (4, 5, 2.0**-20)):
            yield (draw.bell(tokens, head_dim) * np.float32(scale)).astype(dtype)


@_family("not-finite")
def _not_finite(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    float32 = np.dtype(np.float32)
    for value, dtype, index in (
        (np.nan, float32, (-2, 2)), (np.inf, float32, (-2, 2)), (-np.inf, float32, (-2, 2)),
        (np.nan, FLOAT16, (-2, 2)), (np.inf, FLOAT16, (-2, 2)), (np.nan, BFLOAT16, (-2, 2)),
        (-np.inf, BFLOAT16, (-2, 2)), (np.nan, float32, (-1, -1)), (np.nan, float32, (0, 0)),
    ):  # fmt: skip
        x = with_sinks(draw.bell(3, 5), scheme).astype(dtype)
        x[index] = value
        yield x


@_family("zero-token")
def _zero_tokens(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    for sign in (1, -1):  # one-sided: only the zero token makes the minimum, or maximum, 0
        x = (np.abs(draw.bell(4, 5)) + np.float32(0.5)) * np.float32(sign)
        x[1] = 0
        yield x
    x = draw.bell(4, 6)
    x[[0, 3]] = 0
    yield x
    yield np.zeros((3, 4))


@_family("zero-channel")
def _zero_channels(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    x = draw.bell(4, 6)
    x[:, [1, 4]] = 0
    yield x


@_family("negative-zero")
def _negative_zeros(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    yield np.array([[0, -0.0, 0, 2], [1, -0.0, -1, 3], [-2, 0, 2, -0.0]])
    yield np.full((2, 3), -0.0)
    yield np.array([[-0.0, 1, 2], [0.0, 2, 3]])


@_family("block-boundary")
def _block_boundaries(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    size = scheme.block_size
    if size is None:
        return
    for tokens in dict.fromkeys((size - 1, size, size + 1, 2 * size, 2 * size + 1)):
        if tokens:
            x = draw.bell(tokens, 3 if size > 16 else 6)
            yield x * np.ldexp(1.0, 3 * (np.arange(tokens) // size) - 3)[:, None]


@_family("sinks")
def _sinks(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    sinks = scheme.sink_tokens
    if sinks:
        for tokens in (max(sinks - 1, 1), sinks, sinks + 1):
            yield draw.bell(tokens, 5) * np.float32(3)


@_family("padding")
def _padding(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    for head_dim in (11, 13, 14, 15, 17):
        yield draw.bell(2, head_dim)


# --- picked from pools --------------------------------------------------------------------------


def _picked(
    scheme: Scheme, draw: Draw, flag: str, *, most: int = 2, **options: Any
) -> Iterator[Array]:
    """Yield near-ties that tell the wrong encoders of a flag; `options` are those of the pool."""
    encoders = wrong_encoders(flag, scheme)
    if encoders:
        yield from telling(near_ties(scheme, draw, **options), scheme, encoders, most)


def _family_of_near_ties(flag: str, **options: Any) -> None:
    FAMILIES[flag] = lambda scheme, draw: _picked(scheme, draw, flag, **options)


_family_of_near_ties("half-even")
_family_of_near_ties("reciprocal-of-scale")
_family_of_near_ties("merged-division")
_family_of_near_ties("double-precision-quotient")
_family_of_near_ties("unnarrowed-scale", most=1)


@_family("scale-epsilon")
def _scale_epsilons(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    for shrink in (0, 4, 10):
        yield from _picked(scheme, draw, "scale-epsilon", most=1, shrink=shrink)


_family_of_near_ties("scale-narrowing", scale_ties=True)


@_family("outlier-narrowing")
def _outlier_narrowings(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    if scheme.outlier_channels and scheme.separate_norm:
        yield from _picked(scheme, draw, "outlier-narrowing", scale_ties=True)


_family_of_near_ties("reciprocal-of-norm")
_family_of_near_ties("norm-epsilon", exponent=-19)
_family_of_near_ties("norm-before-narrowing", most=1)


@_family("norm-accumulation")
def _norm_accumulations(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    if scheme.separate_norm:
        yield from _picked(scheme, draw, "norm-accumulation", most=1)
        summed = WRONG_ENCODERS["norm-accumulation"][: len(FLOAT32_SUMS)]
        for head_dim in (8, 40):
            yield from telling(factor_ties(scheme, draw, head_dim), scheme, summed, most=1)


@_family("factor-narrowing")
def _factor_narrowings(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    if scheme.separate_norm:
        encoders = wrong_encoders("factor-narrowing", scheme)
        yield from telling(factor_ties(scheme, draw, 8), scheme, encoders, most=1)


FAMILIES["exact-tie"] = exact_ties
FAMILIES["norm-midpoint"] = norm_midpoints
FAMILIES["factor-midpoint"] = factor_midpoints


# --- ends of ranges -----------------------------------------------------------------------------


@_family("tiny-norm")
def _tiny_norms(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    """Norms whose squares leave float32, in tokens that are coded like any other."""
    for exponents in ((-40, -70, -100, 0), (-126, -130, -20, -148)):
        yield np.ldexp(draw.bell(4, 5).astype(np.float64), np.array(exponents)[:, None])
    if scheme.separate_norm and scheme.norm_dtype != "float16":
        yield np.ldexp(draw.bell(4, 5), np.array([70, 100, -60, 0])[:, None])
        yield np.array([[2.0e38, -2.0e38], [1, 2]])


@_family("norm-narrowing")
def _norm_narrowings(scheme: Scheme, draw: Draw) -> Iterator[Array | Also]:
    if not scheme.separate_norm:
        return
    precision, least, _ = FORMATS[scheme.norm_dtype]
    half = 2.0**-precision
    ties = np.array([1 + half, 1 + 3 * half, 1 + half], np.float32)
    near = [ties, np.nextafter(ties, np.float32(2)), np.nextafter(ties, np.float32(0))]
    x = np.zeros((9, 3))
    x[:, 0] = np.concatenate(near)
    x[2, 1] = 2.0**-15  # above the tie, but on it once the norm is float32
    yield x
    steps = np.array([1, 1.5, 2.5, 0.5, 0.75, 3, 1023.5])
    yield Also(np.outer(np.ldexp(steps, least), [0, -1]), "subnormal")


@_family("norm-overflow")
def _norm_overflows(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    if not scheme.separate_norm:
        return
    end = FORMATS[scheme.norm_dtype].end
    for value in (np.nextafter(np.float32(end), np.float32(0)), end):
        yield np.array([[1, 2], [value, 0]], np.float64)
    beyond = 1.02 * end / np.sqrt(2.0)
    yield np.array([[beyond, beyond], [2, 1]])
    yield np.array([[1, 2], [3e38, -3e38]])
    if scheme.magnitude != "norm" and scheme.norm_dtype == "float32" and scheme.axis == "channel":
        yield from _gains_beyond_norms(scheme)


def _gains_beyond_norms(scheme: Scheme) -> Iterator[Array]:
    """Yield a token of a norm that float32 holds, and of a gain that it does not."""
    levels = scheme.code_range[1]
    one = np.arange(1, 512) / 512
    wide = np.stack([one, np.sqrt(1 - one * one)], axis=-1)
    coded = np.rint(wide * levels) / levels  # the scale is 1 / levels
    ratio = in_order(wide, coded) / in_order(coded, coded)
    best = int(np.argmax(ratio))
    if ratio[best] > 1.002:
        yield np.vstack([np.eye(2), wide[best]]) * (2.0**129 / (1 + ratio[best]))


@_family("scale-range")
def _scale_ranges(scheme: Scheme, draw: Draw) -> Iterator[Also]:
    """Scales that are subnormal or flushed, and quotients beyond the codes."""
    if scheme.separate_norm and scheme.axis == "token" and not scheme.outlier_channels:
        return
    steps = np.array([0.5, 0.51, 0.75, 1, 1.25, 1.49, 1.5, 2.5, 10.5, 300])
    spans = np.ldexp(steps * scheme.code_range[1], FORMATS[scheme.scale_dtype].least)
    parts = np.array([1, -1, 0.5, 0.26, -0.77] if scheme.symmetric else [1, 0, 0.5, 0.26, 0.77])
    for shift in (0.0,) if scheme.symmetric else (0.0, -1.0):
        x = np.outer(parts + shift, spans)
        x = x if scheme.axis == "channel" else x.T
        if scheme.separate_norm or scheme.outlier_channels:
            x = _in_front(x, scheme)
        yield Also(x, "subnormal")


def _in_front(x: Array, scheme: Scheme) -> Array:
    """Put channels in front that hold the norm of each token, or are its outlier channels."""
    count = max(scheme.outlier_channels, int(scheme.separate_norm))
    wide = np.zeros((len(x) + 1, count + x.shape[1]))
    wide[0, :count] = 1  # makes them outlier channels
    wide[1:, 0] = 1  # a norm of 1: small values behind it are their own directions
    wide[1:, count:] = x
    return wide


@_family("scale-overflow")
def _scale_overflows(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    if scheme.separate_norm:
        return
    end = FORMATS[scheme.scale_dtype].end
    levels = scheme.code_range[1]
    below = float(np.nextafter(np.float32(end), np.float32(0)))
    outliers = np.full((3, scheme.outlier_channels), 6e4)
    for top, opposite in (  # beyond, or not, is the scale, the scale, the zero, the two together
        (end * levels, 0.0), (below * levels, 0.0), (-end, 0.0), (0.75 * end, -0.75 * end),
    ):  # fmt: skip
        rows = [[1.0, 2.0, 3.0], [0.0, opposite, 0.0], [0.5, top, 0.5]]
        # A value beyond float16 would be an outlier, and refused for that.
        if abs(top) <= (6e4 if scheme.outlier_channels else MOST):
            yield np.concatenate([outliers, rows], axis=1)


@_family("decoded-overflow")
def _decoded_overflows(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    wide = scheme.norm_dtype if scheme.separate_norm else scheme.scale_dtype
    if wide != "float16":
        for top in (MOST, 3.389e38, 3.3e38, 2.9e38):
            yield np.array([[1, 2, 3], [top, 0, 0], [0, 1, 0]])


@_family("narrow-range")
def _narrow_ranges(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    """Ranges so narrow that a narrowed zero lies outside, or far off: asymmetric schemes."""
    if scheme.symmetric:
        for sign in (1, -1):
            yield draw.uniform(3, 4, 4, 5) * sign
        return
    tokens, width = min(scheme.block_size or 4, 4), 5
    own = (1, width) if scheme.axis == "channel" else (tokens, 1)
    base = draw.uniform(0.3, 1, POOL // 2, *own) * draw.signs(POOL // 2, *own)
    spread = np.ldexp(1.0, draw.integers(-24, -3, POOL // 2, 1, 1))
    x = base + spread * draw.uniform(0, 1, POOL // 2, tokens, width)
    if scheme.outlier_channels:
        x = np.concatenate([np.full((*x.shape[:-1], scheme.outlier_channels), 3.0), x], axis=-1)
    if scheme.separate_norm:
        x = x / np.sqrt(in_order(x, x))[..., None]
        if scheme.axis == "channel":  # the directions of a channel are to be alike again
            x = x[:, :1] + spread * draw.uniform(0, 1, *x.shape)
        x = np.ldexp(x, draw.integers(-3, 4, POOL // 2, tokens, 1))
    yield from telling(x.astype(np.float32), scheme, wrong_encoders("narrow-range", scheme))


@_family("collapse")
def _collapses(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    """Tokens that are not zero but decode to zero."""
    if scheme.bits == 2 and scheme.axis == "channel" and scheme.separate_norm:
        yield np.vstack([np.eye(4), np.ones((1, 4))])
    x = draw.bell(3, 4)
    x[1] = np.ldexp(x[1], -140)
    yield x


# --- outlier channels, search -------------------------------------------------------------------


@_family("outlier-channels")
def _outliers(scheme: Scheme, draw: Draw) -> Iterator[Array | Also]:
    kept = scheme.outlier_channels
    for magnitude in (10.0, 1000.0):
        x = draw.bell(4, kept + 5)
        x[:, [1, 3]] *= np.float32(magnitude)
        yield x
    if not kept:
        return
    equal = draw.bell(4, kept + 4) * np.float32(0.25)
    equal[1], equal[2, ::2] = 2, -2  # equal peaks, of both signs
    yield equal
    # One spike against a larger mean: the peak decides.
    spiked = np.abs(draw.bell(5, kept + 4)) * np.float32(0.0625)
    spiked[:, : kept + 1] = 1
    spiked[3, -kept - 1 :] = -1.5 if kept == 1 else 1.5
    spiked[3, -1] = -1.75
    yield spiked
    ordered = draw.bell(3, kept + 3) * np.float32(0.125)
    ordered[1, ::-1] = 1 + np.arange(kept + 3) / 8
    yield ordered
    for head_dim in dict.fromkeys((max(kept - 1, 1), kept, kept + 1)):
        yield draw.bell(3, head_dim)
    # A value of another token's outlier channel that is narrowed to -0, and to a subnormal.
    tiny = draw.bell(3, kept + 3)
    tiny[:, :kept] = np.array([[-(2.0**-27)], [8], [-3 * 2.0**-26]])
    yield Also(tiny, "negative-zero")
    # Ties of float16, on both sides of the even one.
    half = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11, 1.5 + 2.0**-11 + 2.0**-23])
    yield np.concatenate([np.repeat(half[:, None], kept, axis=1), draw.bell(3, 3) / 16], axis=1)
    if not scheme.separate_norm:
        for value in (65519.0, 65520.0):
            over = draw.bell(3, kept + 3)
            over[:, :kept] = 300
            over[1, 0] = value
            yield over


@_family("search")
def _searches(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    if scheme.scale_rule == "search":
        for tokens, head_dim in ((24, 4), (9, 6), (3, 40), (2, 3)):
            x = draw.bell(tokens, head_dim)
            x[0] *= 2
            yield x
        x = draw.bell(12, 4)
        x[5] = 0
        yield x * np.float32(x > 0)


# --- added after the first release of vectors, at the end so that all ids stay ------------------

FAMILIES["sequences"] = sequences


@_family("range-precision")
def _range_precisions(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    yield from _picked(scheme, draw, "range-precision", most=1, scale_ties=True)
    if scheme.separate_norm and scheme.bits == 8:
        pool = tuned_ties(scheme, draw, "float32", scale_ties=True)
        yield from telling(pool, scheme, wrong_encoders("scale-narrowing", scheme)[:1], most=1)


@_family("subnormal-norm")
def _subnormal_norms(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    """Tokens whose norms, or elements, are subnormal in float32, float16 or bfloat16."""
    if scheme.separate_norm:
        for exponent, most in ((-149, 2**16), (-149, 40), (-133, 2**8), (-24, 2**10)):
            x = np.rint(draw.uniform(-most, most, 5, 6))
            x[2, 3:] = 0
            x[3, 1:] = most  # a token of another length, or the norms would not show
            yield np.ldexp(x, exponent)
    x = draw.bell(4, 6).astype(np.float64)
    x[1:, 1] = np.ldexp(np.array([3, -5, 7]), -24)  # subnormal elements among others
    x[1:, 4] = np.ldexp(np.array([-3, 5, 9]), -133)
    yield x
    x = draw.bell(4, 6).astype(np.float64)
    x[3] = [0, 0, 2.0**-24, 0, 0, 0]  # the least token of float16
    yield x


@_family("largest-half")
def _largest_halves(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    """The largest float16, its neighbours, and a norm or a scale that is just held."""
    below, beyond = 65472.0, 65519.0
    for value in (65504.0, below, beyond, 65280.0):
        x = np.zeros((5, 4 + scheme.outlier_channels))
        x[0, 0], x[1, 1], x[2, 2], x[3, -1] = value, -value, value, value
        x[4] = 1
        yield x
    yield np.full((3, 4 + scheme.outlier_channels), 65504.0)
    if scheme.separate_norm and scheme.norm_dtype == "bfloat16":  # between it and float32
        yield np.array([[1, 2], [2.0**128 - 2.0**120, 1.1875 * 2.0**124]])
    x = draw.bell(4, 5 + scheme.outlier_channels).astype(np.float64)
    yield np.float64(65504 / 4) * np.clip(x, -1, 1)


@_family("kept-as-it-came")
def _kept_as_they_came(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    """Sinks of values that float16 does not hold."""
    if scheme.sink_tokens:
        x = draw.bell(scheme.sink_tokens + 1, 5)
        x[:-1] *= np.ldexp(np.float32(1), np.array([40, -40, 20, -30, 0]))
        yield x

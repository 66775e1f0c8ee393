"""What is known before any data (E1 to E4): "Before any data" of docs/bounds.md has the proofs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nsq_ref import rounding
from nsq_ref.arrays import as_integer
from nsq_ref.bounds.direction import LEAST_SHRINK
from nsq_ref.bounds.intervals import NORMAL_LENGTH, PRECISIONS, UNIT, Interval
from nsq_ref.bounds.token import chord, relative_error
from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import Scheme, as_scheme

# Some sixty roundings of float32, by which the worst direction is moved outwards.
SECOND_ORDER = 1 + 2.0**-18


@dataclass(frozen=True)
class APriori:
    """What holds of every token before any data is seen; `a_priori` makes it.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    scale : float
        No scale is larger in absolute value; infinite without norm separation.
    direction_element : float
        Bound of ``abs(direction - y)`` (E1); infinite without norm separation.
    direction_error : float
        Bound of the Euclidean norm of ``direction - y`` (E2); over that of ``x`` without norm
        separation.
    chord : float
        Bound of ``norm(x / norm(x) - x_hat / norm(x_hat))`` (E3); 2 where none is known.
    relative : float
        Bound of ``norm(x - x_hat) / norm(x)`` (E4); infinite where none is known.

    Examples
    --------
    >>> a_priori(Scheme.named("nsep+pchan8"), head_dim=128).relative < 0.05
    True
    """

    scale: float
    direction_element: float
    direction_error: float
    chord: float
    relative: float


@in_default_environment
def a_priori(scheme: Scheme | str, head_dim: int) -> APriori:
    """Bound the error of any token before any data is seen (E1 to E4).

    Assumes a conforming encoder without feedback (F1), whose search, if any, is that of rule S4,
    and with norm separation that tokens are 0 or of a length of at least 2**-126: below, float32
    norms are too coarse for unit vectors. Of balanced norms (N3) E1 and E2 are as of plain ones, as
    their directions are not longer, but they may be shorter: the angle is known to be at most a
    right one if symmetric, and the relative error at most 1 with ``lsq``; with ``gain`` it is
    infinite. What is said of a whole token (`APriori.chord`, `APriori.relative`, and
    without norm separation `APriori.direction_error`) is of tokens that are not zero, and whose
    stored factor, or scale without norm separation, is at least the smallest normal number of its
    dtype; and, without norm separation, of blocks without a value beyond 2**126.

    Parameters
    ----------
    scheme : Scheme or str
    head_dim : int
        Channels D.

    Returns
    -------
    APriori

    Raises
    ------
    TypeError, ValueError
        For what is no scheme, nor the name of one, and for a `head_dim` below 1.

    Examples
    --------
    >>> known = a_priori(Scheme(), head_dim=64)
    >>> round(known.direction_error, 4), round(known.relative, 4)  # sqrt(64) / 14, and E4
    (0.5713, 0.5989)
    """
    scheme, head_dim = as_scheme("scheme", scheme), as_integer("head_dim", head_dim, least=1)
    coded = max(head_dim - scheme.outlier_channels, 0)
    if not scheme.separate_norm and scheme.axis == "channel":
        # A token beside larger ones is coded as 0 at best.
        error, chords = (1.0, math.sqrt(2)) if scheme.symmetric else (math.inf, 2.0)
        return APriori(math.inf, math.inf, error, chords, error)
    worst = _worst_scale(scheme, coded)
    of_direction = _worst_token if scheme.axis == "token" else _worst_of_block
    error = of_direction(scheme, coded, worst)
    if scheme.outlier_channels:
        error = math.hypot(error, _worst_outliers(scheme, head_dim - coded))
    error *= SECOND_ORDER
    if scheme.symmetric:  # no element is coded worse than by 0
        error = min(error, SECOND_ORDER)
    length = NORMAL_LENGTH if scheme.separate_norm else Interval(np.ones(()), np.ones(()))
    angle_limit = math.sqrt(2) if scheme.symmetric or scheme.magnitude == "lsq" else 2.0
    to_y = min(float(chord(error, length=length)), angle_limit)
    if not scheme.separate_norm:
        return APriori(math.inf, math.inf, error, to_y, error)
    element = max(worst.rounded, worst.clamped)
    if scheme.outlier_channels:
        element = max(element, PRECISIONS["float16"].unit)
    element = min(element, error)
    decoding = (4 + 2 * math.sqrt(head_dim)) * UNIT
    if scheme.norm_rule == "balanced":
        # A direction may be next to nothing beside what its scales make of it.
        chords = min(math.sqrt(2) + decoding, 2) if scheme.symmetric else 2.0
        least_squares = 1 + decoding if scheme.magnitude == "lsq" else math.inf
        return APriori(worst.scale, element, error, chords, least_squares)
    off = (0 if scheme.norm_dtype == "float32" else PRECISIONS[scheme.norm_dtype].unit) + decoding
    if error >= 1 and scheme.scale_dtype != "float16":
        off = 1.0 + decoding  # y may be so small that the rounding of its norm doubles it
    factor, to_x_hat = Interval(np.array(-min(off, 1)), np.array(off)), min(to_y + decoding, 2)
    if scheme.magnitude == "lsq":
        relative = relative_error(to_y, factor, magnitude="lsq") + decoding
    else:
        relative = relative_error(to_x_hat, factor)
    return APriori(worst.scale, element, error, to_x_hat, float(relative))


class _Terms(NamedTuple):
    """What of a scheme the worst cases are made of."""

    levels: int  # the greatest code
    unit: float  # largest relative error of narrowing a scale
    tiny: float  # largest error of narrowing a subnormal one
    half: float  # half a scale, as a share of the range that it divides
    block: float  # tokens that share a scale of a channel
    cut: float  # share of a range that the search of rule S4 may take away from one of its ends


def _terms(scheme: Scheme) -> _Terms:
    unit, tiny = 0.0, 0.0
    if scheme.scale_dtype != "float32":
        precision = PRECISIONS[scheme.scale_dtype]
        unit, tiny = precision.unit, precision.tiny if scheme.separate_norm else 0.0
    levels = scheme.code_range[1]
    half = (1 + unit) / (2 * levels) + 8 * UNIT
    block = math.inf if scheme.block_size is None else scheme.block_size
    searched = scheme.scale_rule == "search"
    cut = (1 - LEAST_SHRINK) / (1 if scheme.symmetric else 2) if searched else 0.0
    return _Terms(levels, unit, tiny, half, block, cut)


class _Worst(NamedTuple):
    """The largest scale of tokens of norm 1, and the largest errors of their elements."""

    scale: float
    rounded: float  # of an element whose code is not clamped
    end: float  # of an end of a range that no search cut
    clamped: float  # of one whose code is clamped


def _worst_scale(scheme: Scheme, coded: int) -> _Worst:
    """Bound scales and element errors of tokens of norm 1 with this many coded channels (E1)."""
    levels, unit, tiny, _, block, cut = _terms(scheme)
    if scheme.symmetric:
        span = 1.0 if coded else 0.0
    elif scheme.axis == "token":  # greatest less least of a vector of norm 1, and a narrowed zero
        span = (math.sqrt(2) if coded > 1 else 0.0) + unit
    else:
        span = 2.0
    scale = span / levels * (1 + 8 * UNIT)
    if scheme.separate_norm:
        scale = float(rounding.narrow(np.float32(scale), FLOAT_DTYPES[scheme.scale_dtype]))
    else:
        scale *= 1 + unit
    rounded = scale / 2 + UNIT * (3 * levels * scale + 2)
    end = levels * max(unit * scale, tiny) + 8 * UNIT
    if not scheme.symmetric:
        end = max(end, unit * (1 + scale) + tiny + 8 * UNIT)
    clamped = end
    if cut:
        # What a search cuts off is at most what it saves on the elements of the same scale.
        group = coded if scheme.axis == "token" else block
        clamped += min(cut * span, math.sqrt(group) * max(rounded, end)) + 8 * UNIT
    return _Worst(scale, rounded, end, clamped)


def _worst_token(scheme: Scheme, coded: int, worst: _Worst) -> float:
    """Bound the norm of the error of the coded channels of a token of norm 1, axis token (E2).

    S4 keeps the whole range unless a shorter one makes the sum of squares less.
    """
    if scheme.symmetric:
        terms = _terms(scheme)
        square = max(coded - 1, 0) * terms.half**2
        inner = math.sqrt(square / (1 + square))
        return math.hypot(inner, worst.end) + math.sqrt(coded) * terms.tiny + 4 * UNIT
    inner = math.sqrt(max(coded - 2, 0)) * max(worst.rounded, worst.end)
    return math.hypot(inner, math.sqrt(2) * worst.end) + 4 * UNIT


def _worst_of_block(scheme: Scheme, coded: int, worst: _Worst) -> float:
    """Bound the norm of the error of the coded channels of a token of norm 1, axis channel (E2)."""
    levels, unit, tiny, half, block, cut = _terms(scheme)
    root = math.sqrt(coded)
    # Roots of sums over the channels: of squared ranges of all tokens of the block and of all but
    # one, and of squared zeros. Tokens have norm 1. A channel whose range ends at the token in
    # question rounds nothing but that end.
    whole, some = math.sqrt(min(coded, block)), math.sqrt(min(coded, block - 1))
    if scheme.symmetric:
        every, others, zeros = whole, some, 0.0
    else:
        zeros = whole
        every, others = (
            min(2 * root, math.sqrt(2 * tokens) if tokens > 1 else 0.0) + unit * zeros
            for tokens in (block, block - 1)
        )
    slack = root * ((levels + 1) * tiny + 8 * UNIT)
    rounded, narrowed = min(root * worst.rounded, others * half), unit * (every + zeros)
    if scheme.symmetric:  # nothing is coded worse than by 0, and what is clamped better than that
        clamped = (unit + cut) * math.sqrt(max(1 - rounded**2, 0))
    else:
        clamped = narrowed + cut * (1 + some)
    if cut:
        saved = math.hypot(min(root * worst.rounded, every * half), narrowed)
        clamped = min(clamped, narrowed + math.sqrt(block) * (saved + slack))
    return min(math.hypot(rounded, clamped) + slack, root * max(worst.rounded, worst.clamped))


def _worst_outliers(scheme: Scheme, count: int) -> float:
    """Bound the norm of the error of the outlier channels of a token of norm 1 (O1)."""
    precision = PRECISIONS["float16"]
    if scheme.separate_norm:
        subnormal = precision.tiny
    elif scheme.scale_dtype == "float16":  # a range of at least normal scales needs a norm
        subnormal = 2 * precision.unit / scheme.code_range[1]
    else:
        return 1.0  # a token whose scale is normal may yet be flushed to 0
    return precision.unit + UNIT + math.sqrt(count) * subnormal

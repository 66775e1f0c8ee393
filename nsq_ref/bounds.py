"""Error bounds of NSQ-1, each a theorem of docs/bounds.md; E1 to E9 name them there and here.

Three ways in, by what is known. `a_priori` knows the scheme and the head size. `certificate` knows
what is stored, as a decoder does, and that a conforming encoder stored it. `encoder_bounds` knows
the vectors too, and holds whatever scales were used. They are built from the functions on plain
arrays below, which serve whoever quantizes elsewhere.

Everything is float64 and rounds outwards, and holds for the float32 arithmetic that NSQ-1
prescribes, not for real arithmetic only. What is named ``estimate`` is not a bound.

**direction** here is ``x / norm`` as a real number, where ``norm`` is the float32 of rule N1 (1
without norm separation), so that ``x = norm * direction`` holds exactly. ``y`` is the dequantized
direction and ``x_hat`` the decoded token, both of rule D1. ``x`` is what rule I1 makes of the
input. Of tokens that are zero, which norm separation decodes to zero, E1 to E4 say nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref import codec, packing, rounding, spec
from nsq_ref.arrays import (
    as_array,
    as_float,
    as_float_array,
    as_integer,
    as_integer_array,
    as_real_array,
    not_finite,
)
from nsq_ref.codec import Quantized
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import FLOAT_DTYPES, FloatName, Scheme, as_scheme

__all__ = [
    "APriori",
    "Bounds",
    "Interval",
    "a_priori",
    "certificate",
    "chord",
    "direction_error",
    "direction_interval",
    "element_error",
    "encoder_bounds",
    "estimate_logit_rms",
    "factor_error",
    "logit_error",
    "narrowing_interval",
    "norm_interval",
    "output_error",
    "reconstruction_error",
    "relative_error",
    "spread",
    "total_variation",
]

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Magnitude = Literal["norm", "gain", "lsq"]


class Precision(NamedTuple):
    """Significant bits of a format, and the exponent of its smallest normal number."""

    bits: int
    least_exponent: int

    @property
    def unit(self) -> float:
        """Largest relative error of rounding to a normal number."""
        return float(2.0**-self.bits)

    @property
    def tiny(self) -> float:
        """Largest error of rounding to a subnormal number: half the smallest one."""
        return float(2.0 ** (self.least_exponent - self.bits))


PRECISIONS = {
    "float16": Precision(11, -14),
    "bfloat16": Precision(8, -126),
    "float32": Precision(24, -126),
}
UNIT, TINY = PRECISIONS["float32"].unit, PRECISIONS["float32"].tiny
LEAST_SHRINK = float(spec.SHRINK[-1])

# The functions below round in float64 as well. A result is moved outwards by OUTWARD of the terms
# it is made of, which covers a hundred roundings, and by TERM more for each term of a sum.
OUTWARD = 2.0**-46
TERM = 2.0**-52

# What is known before any data is moved outwards further, by some sixty roundings of float32.
SECOND_ORDER = 1 + 2.0**-18


class Interval(NamedTuple):
    """Two float64 arrays that enclose real numbers, elementwise.

    Nothing changes one, so that threads may share it.

    Examples
    --------
    >>> interval = Interval(np.array([-0.5]), np.array([0.25]))
    >>> interval.high - interval.low
    array([0.75])
    """

    low: Float64
    high: Float64


NORMAL_LENGTH = Interval(np.array(1 - UNIT), np.array(1 + UNIT))


@dataclass(frozen=True, eq=False)
class Bounds:
    """Bounds of every token of one array; `certificate` and `encoder_bounds` make them.

    Nothing changes one, so that threads may share it.

    Sinks are tokens like the others, with no error. A bound that does not exist is infinite.

    Parameters
    ----------
    x_hat : float32 array, [..., T, D]
        The decoded tokens.
    direction : Interval of [..., T, D]
        Encloses ``x / norm`` (E1).
    norm : Interval of [..., T]
        Encloses the norm of rule N1 (E9); 1 without norm separation.
    direction_element : float64 array, [..., T, D]
        Bound of ``abs(direction - y)`` (E1).
    direction_error : float64 array, [..., T]
        Bound of the Euclidean norm of ``direction - y`` (E2).
    chord : float64 array, [..., T]
        Bound of ``norm(x / norm(x) - x_hat / norm(x_hat))``, from 0 to 2 (E3).
    relative : float64 array, [..., T]
        Bound of ``norm(x - x_hat) / norm(x)`` (E4, E9).
    token : float64 array, [..., T]
        Bound of ``norm(x - x_hat)`` (E4, E5).
    element : float64 array, [..., T, D]
        Bound of ``abs(x - x_hat)`` (E5).

    Examples
    --------
    >>> import numpy as np
    >>> import nsq_ref as nsq
    >>> x = np.random.default_rng(0).standard_normal((512, 64), dtype=np.float32)
    >>> bounds = certificate(nsq.quantize(x))
    >>> error = x - bounds.x_hat
    >>> bool((abs(error) <= bounds.element).all())
    True
    >>> bool((np.linalg.norm(error, axis=-1) <= bounds.token).all())
    True
    """

    x_hat: npt.NDArray[np.float32]
    direction: Interval
    norm: Interval
    direction_element: Float64
    direction_error: Float64
    chord: Float64
    relative: Float64
    token: Float64
    element: Float64

    @property
    @in_default_environment
    def cosine(self) -> Float64:
        """Lower bound of the cosine of the angle between ``x`` and ``x_hat``, [..., T] (E3).

        Examples
        --------
        >>> import nsq_ref as nsq
        >>> certificate(nsq.quantize(np.float32([[3, 4], [4, -3]]))).cosine.round(3)
        array([0.997, 0.997])
        """
        return np.maximum(1 - self.chord**2 * (0.5 + OUTWARD) - TERM, -1)

    @property
    @in_default_environment
    def angle(self) -> Float64:
        """Bound of the angle between ``x`` and ``x_hat``, [..., T], in radians (E3).

        Examples
        --------
        >>> import nsq_ref as nsq
        >>> certificate(nsq.quantize(np.float32([[3, 4], [4, -3]]))).angle.round(3)
        array([0.08, 0.08])
        """
        return np.minimum(2 * np.arcsin(self.chord / 2) * (1 + OUTWARD), np.pi)

    @in_default_environment
    def logit_interval(self, query: Any) -> Interval:
        """Enclose ``query . x_hat - query . x`` (E6).

        Parameters
        ----------
        query : array, [..., Q, D]
            Queries, whose leading axes broadcast with those of the tokens.

        Returns
        -------
        Interval of [..., Q, T]
            Before any softmax scale or softcap, which `total_variation` knows.

        Raises
        ------
        TypeError, ValueError
            As `logit_error`.

        Examples
        --------
        >>> import numpy as np
        >>> import nsq_ref as nsq
        >>> keys, query = np.random.default_rng(0).standard_normal((2, 512, 64), dtype=np.float32)
        >>> bounds = certificate(nsq.quantize(keys))
        >>> low, high = bounds.logit_interval(query)
        >>> error = query @ bounds.x_hat.T - query @ keys.T
        >>> bool((low <= error).all() and (error <= high).all())
        True
        """
        low, high = logit_error(query, self.direction, self.norm, self.x_hat)
        exact = self.token[..., None, :] == 0
        return Interval(np.where(exact, 0.0, low), np.where(exact, 0.0, high))

    @in_default_environment
    def logit(self, query: Any) -> Float64:
        """Bound of ``abs(query . (x - x_hat))``, [..., Q, T], for queries [..., Q, D] (E6).

        Examples
        --------
        >>> import nsq_ref as nsq
        >>> known = certificate(nsq.quantize(np.float32([[3, 4], [4, -3]])))
        >>> known.logit([[1.0, 0.0], [1.0, 1.0]]).round(2)
        array([[0.34, 0.36],
               [0.69, 0.59]])
        """
        low, high = self.logit_interval(query)
        return np.maximum(-low, high)

    @in_default_environment
    def estimate_logit_rms(self, query: Any) -> Float64:
        """Estimate, not bound, the size of ``query . (x - x_hat)``, [..., Q, T].

        As the function `estimate_logit_rms`, with the widths of `direction` in place of scales.

        Examples
        --------
        >>> import nsq_ref as nsq
        >>> known = certificate(nsq.quantize(np.float32([[3, 4], [4, -3]])))
        >>> known.estimate_logit_rms([[1.0, 0.0], [1.0, 1.0]]).round(2)
        array([[0.16, 0.08],
               [0.18, 0.18]])
        """
        return estimate_logit_rms(query, self.direction.high - self.direction.low, self.norm.high)


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
        Bound of ``norm(x - x_hat) / norm(x)`` (E4).

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


# --- whole arrays -------------------------------------------------------------------------------


@in_default_environment
def certificate(quantized: Quantized) -> Bounds:
    """Bound the error of every token from what is stored, as a decoder can (E1 to E6, E9).

    Assumes that a conforming encoder wrote it, whose search, if any, is that of rule S4, and
    nothing of the vectors that it was given.

    Parameters
    ----------
    quantized : Quantized

    Returns
    -------
    Bounds

    Raises
    ------
    TypeError
        For anything but a `Quantized`.

    Examples
    --------
    >>> import numpy as np
    >>> import nsq_ref as nsq
    >>> x = np.random.default_rng(0).standard_normal((512, 64), dtype=np.float32)
    >>> bounds = certificate(nsq.quantize(x))
    >>> round(float(bounds.relative.max()), 2)
    0.22
    """
    stored = _stored(quantized)
    scheme = quantized.scheme
    direction = direction_interval(stored.codes, stored.scale, stored.zero, scheme=scheme)
    direction = _with_outliers(direction, stored, scheme)
    norm = norm_interval(stored.factor, stored.y, direction, scheme=scheme)
    if scheme.separate_norm:
        length = _direction_length(norm.low)
    else:
        size, error = _length(stored.y), direction_error(_farthest(direction, stored.y))
        nearest = _length(np.maximum(0, np.maximum(direction.low, -direction.high)))
        length = Interval(
            np.maximum((size.low - error) * (1 - OUTWARD), nearest.low),
            (size.high + error) * (1 + OUTWARD),
        )
    # What is known before any data needs unit vectors, and the norm of a subnormal token is not 1.
    unit = (norm.low >= 2.0**-126) | (norm.high == 0)
    usable = unit.all(axis=-1, keepdims=True) & scheme.separate_norm
    limit = np.where(usable, a_priori(scheme, quantized.shape[-1]).direction_error, np.inf)
    return _bounds(quantized, stored, direction, norm, length, limit)


@in_default_environment
def encoder_bounds(x: Any, quantized: Quantized) -> Bounds:
    """Bound the error of every token from its norm and its clamped elements (E1 to E6, E9).

    Knows the norm of each token exactly, and of each element whose code lies at an end of the range
    how far beyond that end it was. So it holds for any scales whatever: frozen, calibrated or
    searched for. Of the other elements it knows no more than `certificate` does.

    Parameters
    ----------
    x : array, [..., T, D]
        What was quantized, in a dtype that `nsq_ref.quantize` takes.
    quantized : Quantized

    Returns
    -------
    Bounds

    Raises
    ------
    TypeError, ValueError
        For anything but a `Quantized`, and for an `x` of another shape, of a dtype that
        `nsq_ref.quantize` does not take, or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> import nsq_ref as nsq
    >>> x = np.random.default_rng(0).standard_normal((512, 64), dtype=np.float32)
    >>> bounds = encoder_bounds(x, nsq.quantize(x))
    >>> bool((abs(x - bounds.x_hat) <= bounds.element).all())
    True
    """
    stored = _stored(quantized)
    scheme = quantized.scheme
    given = as_float_array("x", x)
    if given.shape != quantized.shape:
        raise ValueError(
            f"x has shape {list(given.shape)}; what was quantized has {list(quantized.shape)}"
        )
    with np.errstate(over="ignore"):
        tokens = given.astype(np.float32)
    if not np.isfinite(tokens).all():
        raise not_finite("x", given)
    sinks = min(scheme.sink_tokens, given.shape[-2])
    tokens = tokens.reshape(-1, *given.shape[-2:])[:, sinks:]
    norm = np.ones(tokens.shape[:-1])
    if scheme.separate_norm:
        norm = rounding.norm(tokens).astype(np.float64)
    exact = tokens / np.where(norm == 0, np.inf, norm)[..., None]
    direction = direction_interval(
        stored.codes, stored.scale, stored.zero, scheme=scheme, direction=exact
    )
    direction = _with_outliers(direction, stored, scheme)
    limit = np.full(norm.shape, np.inf)
    return _bounds(quantized, stored, direction, Interval(norm, norm), _length(exact), limit)


@in_default_environment
def a_priori(scheme: Scheme | str, head_dim: int) -> APriori:
    """Bound the error of any token before any data is seen (E1 to E4).

    Assumes a conforming encoder, whose search, if any, is that of rule S4, and with norm separation
    that norms are 0 or at least 2**-126: below, float32 norms are too coarse for unit vectors. What
    is said of a whole token (`APriori.chord`, `APriori.relative`, and without norm separation
    `APriori.direction_error`) is of tokens that are not zero, and whose stored factor, or scale
    without norm separation, is at least the smallest normal number of its dtype; and, without norm
    separation, of blocks without a value beyond 2**126.

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
    error = _worst_direction_error(scheme, coded, worst)
    if scheme.outlier_channels:
        error = math.hypot(error, _worst_outliers(scheme, head_dim - coded))
    error *= SECOND_ORDER
    if scheme.symmetric:  # no element is coded worse than by 0
        error = min(error, SECOND_ORDER)
    length = NORMAL_LENGTH if scheme.separate_norm else Interval(np.ones(()), np.ones(()))
    to_y = float(chord(error, length=length))
    if scheme.symmetric or scheme.magnitude == "lsq":
        to_y = min(to_y, math.sqrt(2))
    if not scheme.separate_norm:
        return APriori(math.inf, math.inf, error, to_y, error)
    decoding = (4 + 2 * math.sqrt(head_dim)) * UNIT
    off = (0 if scheme.norm_dtype == "float32" else PRECISIONS[scheme.norm_dtype].unit) + decoding
    if error >= 1 and scheme.scale_dtype != "float16":
        off = 1.0 + decoding  # y may be so small that the rounding of its norm doubles it
    factor = Interval(np.array(-min(off, 1)), np.array(off))
    if scheme.magnitude == "lsq":
        relative = relative_error(to_y, factor, magnitude="lsq") + decoding
    else:
        relative = relative_error(min(to_y + decoding, 2), factor)
    element = max(worst.rounded, worst.clamped)
    if scheme.outlier_channels:
        element = max(element, PRECISIONS["float16"].unit)
    return APriori(
        worst.scale, min(element, error), error, min(to_y + decoding, 2), float(relative)
    )


# --- E1, E2: the direction ----------------------------------------------------------------------


@in_default_environment
def narrowing_interval(stored: Any, dtype: FloatName) -> Interval:
    """Enclose the float32 numbers that rules S3 and M4 narrow to these stored ones (E9).

    Parameters
    ----------
    stored : array
        Finite values of `dtype`.
    dtype : {"float16", "bfloat16", "float32"}

    Returns
    -------
    Interval
        From half way to the next lower stored value to half way to the next higher one, exactly;
        for float32 the value itself.

    Raises
    ------
    TypeError, ValueError
        For another dtype, and for values that it cannot hold.

    Examples
    --------
    >>> low, high = narrowing_interval([0.0, 1.0], "float16")
    >>> low.tolist() == [-(2.0**-25), 1 - 2.0**-12], high.tolist() == [2.0**-25, 1 + 2.0**-11]
    (True, True)
    """
    values = _finite("stored", stored)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(FLOAT_DTYPES)}")
    _require_held("stored", values, dtype)
    if dtype == "float32":
        return Interval(values, values)
    precision = PRECISIONS[dtype]
    significand, exponent = np.frexp(np.maximum(np.abs(values), 2.0**precision.least_exponent))
    half = np.ldexp(1.0, exponent - 1 - precision.bits)  # frexp's significand is in [0.5, 1)
    at_power = (significand == 0.5) & (exponent - 1 > precision.least_exponent)
    inner = np.where(at_power, half / 2, half)
    negative = values < 0
    return Interval(
        values - np.where(negative, half, inner), values + np.where(negative, inner, half)
    )


@in_default_environment
def direction_interval(
    codes: Any, scale: Any, zero: Any = None, *, scheme: Scheme | str, direction: Any = None
) -> Interval:
    """Enclose the directions that an encoder gives these codes (E1).

    Parameters
    ----------
    codes : integer array, [..., T, D]
    scale, zero : array
        Stored scales and zeros that broadcast with the codes: [..., 1, D] or [..., T, 1] for one
        block. No zero if symmetric.
    scheme : Scheme or str
    direction : array, [..., T, D], optional
        ``x / norm``, or ``x`` without norm separation, as an encoder knows it. Only elements
        whose code may have been clamped are looked at, and the scales may be any. Without it,
        they must be those of a conforming encoder.

    Returns
    -------
    Interval of [..., T, D]

    Raises
    ------
    TypeError, ValueError
        For codes outside the range, values that are not finite or not of the scheme's dtype,
        shapes that do not fit, and a zero that is missing or not wanted.

    Examples
    --------
    >>> low, high = direction_interval([[3, 7]], [[0.125, 0.125]], scheme=Scheme())
    >>> low.round(4).tolist(), high.round(4).tolist()
    ([[0.3125, 0.8125]], [[0.4375, 0.8754]])
    """
    scheme = as_scheme("scheme", scheme)
    numbers = _codes(codes, scheme)
    scales, zeros = _scale_and_zero(scale, zero, scheme)
    shape = _common_shape(codes=numbers, scale=scales, zero=zeros)
    # The subtraction of a zero rounds, and the division by a scale that was not narrowed.
    count = (not scheme.symmetric) + (scheme.scale_dtype == "float32")
    roundings = count * UNIT * (1 + 2 * UNIT)
    step, rising = np.abs(scales), np.where(scales < 0, -1.0, 1.0)
    steps = rising * numbers
    low, high = (
        _undivided(zeros, step * (steps + side / 2), side, roundings, scheme) for side in (-1, 1)
    )
    ends = [rising * end for end in scheme.code_range]
    open_below = (steps == np.minimum(*ends)) | (step == 0)
    open_above = (steps == np.maximum(*ends)) | (step == 0)
    if direction is None:
        reach = _reach(scales, zeros, scheme)
        low = np.where(open_below, reach.low, np.maximum(low, reach.low))
        high = np.where(open_above, reach.high, np.minimum(high, reach.high))
    else:
        known = _finite("direction", direction)
        _common_shape(codes=numbers, direction=known)
        margin = np.abs(known) * OUTWARD
        low = np.where(open_below, np.minimum(low, known - margin), low)
        high = np.where(open_above, np.maximum(high, known + margin), high)
    # The codes of a zero token say nothing of its direction, and the ends may have crossed.
    return Interval(
        np.broadcast_to(np.minimum(low, high), shape), np.broadcast_to(np.maximum(low, high), shape)
    )


@in_default_environment
def element_error(
    scale: Any, zero: Any = None, *, scheme: Scheme | str, direction: Any = None
) -> Float64:
    """Bound ``abs(direction - y)`` whatever the code turns out to be (E1).

    Half a scale and a slack for float32. Where a code may be clamped, how far the range ends
    short of the largest direction that this scale can come from, or of `direction` where given,
    which makes the bound hold for any scale, such as one frozen before the token was known.

    Parameters
    ----------
    scale, zero : array
        Stored scales and zeros. No zero if symmetric.
    scheme : Scheme or str
    direction : array, optional
        What broadcasts with `scale`: the directions ``x / norm`` that an encoder knows.

    Returns
    -------
    float64 array

    Raises
    ------
    TypeError, ValueError
        As `direction_interval`.

    Examples
    --------
    >>> element_error([0.125], scheme=Scheme()).round(4)
    array([0.0625])
    >>> element_error([0.125], scheme=Scheme(), direction=[1.0]).round(4)  # 1 - 7 * 0.125
    array([0.125])
    """
    scheme = as_scheme("scheme", scheme)
    scales, zeros = _scale_and_zero(scale, zero, scheme)
    greatest = scheme.code_range[1]
    step = np.abs(scales)
    ends = [_dequantized(code, scales, zeros) for code in scheme.code_range]
    far = np.maximum(np.abs(ends[0]), np.abs(ends[1]))
    # The operations of rules N2, Q1 and D1 that round: with a narrowed scale, neither the division
    # by it nor the product with a code does.
    slack = np.zeros(step.shape)
    if scheme.scale_dtype == "float32":
        slack = slack + (2 * greatest - 0.5) * step
    if not scheme.symmetric:
        slack = slack + (greatest - 0.5) * step + far
    if scheme.separate_norm:
        slack = slack + far
    rounded = step / 2 + slack * UNIT * (1 + 2.0**-20) + TINY * scheme.separate_norm
    if direction is None:
        reach = _reach(scales, zeros, scheme)
    else:
        known = _finite("direction", direction)
        _common_shape(scale=scales, direction=known)
        reach = Interval(known, known)
    least, most = np.minimum(*ends), np.maximum(*ends)
    margin = OUTWARD * (far + np.maximum(np.abs(reach.low), np.abs(reach.high)))
    beyond = np.maximum(least - reach.low, reach.high - most) + margin
    return np.asarray(np.maximum(rounded * (1 + OUTWARD), beyond))


@in_default_environment
def direction_error(element: Any) -> Float64:
    """Bound the Euclidean norm of ``direction - y`` over the last axis (E2).

    Parameters
    ----------
    element : array, [..., D]
        Bounds of its elements (E1).

    Returns
    -------
    float64 array, [...]

    Raises
    ------
    TypeError, ValueError
        For bounds that are not real numbers, negative or NaN.

    Examples
    --------
    >>> direction_error([[0.3, 0.4]]).round(4)
    array([0.5])
    """
    return _length(_bound("element", element)).high


# --- E3, E4, E9: the token ----------------------------------------------------------------------


@in_default_environment
def chord(error: Any, y: Any = None, *, length: Interval = NORMAL_LENGTH) -> Float64:
    """Bound ``norm(x / norm(x) - y / norm(y))``, which is ``2 * sin(angle / 2)`` (E3, E4).

    Parameters
    ----------
    error : array, [...]
        Bounds of the Euclidean norm of ``direction - y`` (E2).
    y : array, [..., D], optional
        The dequantized directions, which a decoder knows. Without them, the worst ones are taken.
    length : Interval of [...], optional
        Encloses the Euclidean norm of the direction; 1 up to one rounding of float32 by default,
        which holds with norm separation for norms of at least 2**-126.

    Returns
    -------
    float64 array, [...]
        From 0 to 2, which says nothing.

    Raises
    ------
    TypeError, ValueError
        For values that are not real numbers, or negative, and shapes that do not fit.

    Examples
    --------
    >>> chord([0.1, 0.6, 1.0]).round(4)
    array([0.1001, 0.6325, 2.    ])
    """
    errors = _bound("error", error)
    low, high = _interval("length", length)
    if y is None:
        return np.sqrt(np.minimum(_free_chord(errors, low), 4))
    size = _length(_finite("y", y))
    _common_shape(error=errors, **{"y without its last axis": size.low})
    # Of all lengths of the direction the farthest is sqrt(norm(y)^2 - error^2) or, where that
    # cannot be its length, the end next to it.
    short = np.square(size.high) * (1 + OUTWARD) - np.square(errors) * (1 - OUTWARD)
    long = np.square(size.low) * (1 - OUTWARD) - np.square(errors) * (1 + OUTWARD)
    square = np.where(
        np.square(low) > short,
        _chord_at(low, errors, size),
        np.where(
            np.square(high) < long, _chord_at(high, errors, size), _free_chord(errors, size.low)
        ),
    )
    return np.sqrt(np.minimum(square, 4))


@in_default_environment
def relative_error(
    chord: Any, factor_error: Interval | None = None, *, magnitude: Magnitude = "norm"
) -> Float64:
    """Bound ``norm(x - x_hat) / norm(x)`` from the angle (E4) and the stored factor (E9).

    Parameters
    ----------
    chord : array
        Bounds of the distance of the unit vectors, of `chord`.
    factor_error : Interval, optional
        Encloses the relative error of the factor, of `factor_error`; none by default.
    magnitude : {"norm", "gain", "lsq"}
        As in `Scheme`: ``norm`` and ``gain`` restore the norm of ``x``, up to `factor_error`;
        ``lsq`` makes the error least, up to `factor_error`.

    Returns
    -------
    float64 array
        For decoding in real arithmetic. `certificate` accounts for the float32 of rule D1 as well.

    Raises
    ------
    TypeError, ValueError
        For chords outside 0 to 2, errors below -1, and another magnitude.

    Examples
    --------
    >>> relative_error([0.2], magnitude="norm").round(4)
    array([0.2])
    >>> relative_error([0.2], magnitude="lsq").round(4)
    array([0.199])
    """
    chords = _bound("chord", chord)
    _require("chord", chords, chords <= 2, "is more than 2")
    if magnitude not in ("norm", "gain", "lsq"):
        raise ValueError(f"magnitude={magnitude!r} is not one of norm, gain, lsq")
    errors = _interval("factor_error", (0.0, 0.0) if factor_error is None else factor_error)
    _require("factor_error", errors.low, errors.low >= -1, "is below -1")
    square = np.square(chords)
    if magnitude == "lsq":
        # Past a right angle the least-squares factor is negative, and turns x_hat back.
        cosine = np.maximum(1 - square / 2, 0)
        sine_square = np.where(square < 2, square * (1 - square / 4), 1)
        squares = [np.maximum(sine_square + np.square(cosine * e), np.square(e)) for e in errors]
    else:
        squares = [np.square(e) + (1 + e) * square for e in errors]
    return np.asarray(np.sqrt(np.maximum(*squares)) * (1 + OUTWARD))


@in_default_environment
def factor_error(factor: Any, dtype: FloatName) -> Interval:
    """Enclose the relative error of a stored factor, ``stored / exact - 1`` (E9).

    Parameters
    ----------
    factor : array
        Stored norms, or least-squares factors.
    dtype : {"float16", "bfloat16", "float32"}

    Returns
    -------
    Interval
        Against the real number that was rounded to float32 and then narrowed: within
        2**-11 + 2**-23 for normal float16; -1 where 0 is stored.

    Raises
    ------
    TypeError, ValueError
        As `narrowing_interval`.

    Examples
    --------
    >>> low, high = factor_error([1.5, 0.0], "float16")
    >>> (low * 2**11).round(2).tolist(), (high * 2**11).round(2).tolist()
    ([-0.67, -2048.0], [0.67, -2048.0])
    """
    values = np.abs(_finite("factor", factor))
    exact = _before_rounding(narrowing_interval(values, dtype))
    some = values > 0  # and then the ends are positive too
    low, high = (values / np.where(some, end, 1) for end in (exact.high, exact.low))
    return Interval(
        np.where(some, np.maximum(low * (1 - OUTWARD) - 1, -1), -1),
        np.where(some, high * (1 + OUTWARD) - 1, -1),
    )


@in_default_environment
def norm_interval(factor: Any, y: Any, direction: Interval, *, scheme: Scheme | str) -> Interval:
    """Enclose the norm of rule N1, from the factor that is stored in its place (E9).

    Parameters
    ----------
    factor : array, [..., T], or None
        Stored norms (rule M1) or gains (M2, M3); None without norm separation.
    y : array, [..., T, D]
        Dequantized directions.
    direction : Interval of [..., T, D]
        Of `direction_interval`; only ``lsq`` looks at it.
    scheme : Scheme or str

    Returns
    -------
    Interval of [..., T]
        1 without norm separation. Unbounded where a gain is no evidence, as where ``y`` is zero.

    Raises
    ------
    TypeError, ValueError
        As `narrowing_interval`, and for shapes that do not fit.

    Examples
    --------
    >>> y = np.array([[0.6, 0.75]])
    >>> low, high = norm_interval([2.0], y, Interval(y, y), scheme=Scheme(magnitude="gain"))
    >>> low.round(3), high.round(3)  # twice the length of y
    (array([1.92]), array([1.922]))
    """
    dequantized, scheme = _finite("y", y), as_scheme("scheme", scheme)
    if not scheme.separate_norm:
        ones = np.ones(dequantized.shape[:-1])
        return Interval(ones, ones)
    values = _finite("factor", factor)
    _common_shape(factor=values, **{"y without its last axis": dequantized[..., 0]})
    narrowed = narrowing_interval(values, scheme.norm_dtype)
    if scheme.magnitude == "norm":
        return Interval(np.maximum(narrowed.low, 0), narrowed.high)
    ratio = _before_rounding(narrowed)
    if scheme.magnitude == "gain":
        # The divisor of rule M2 is itself a float32.
        divisor = rounding.norm(dequantized.astype(np.float32)).astype(np.float64)
        low = np.maximum(ratio.low, 0) * divisor * (1 - OUTWARD)
        high = ratio.high * divisor * (1 + OUTWARD)
        return Interval(low, np.where(divisor == 0, np.inf, high))
    direction = _interval("direction", direction)
    size, projection = _length(dequantized), _dot(direction, dequantized)
    error = direction_error(_farthest(direction, dequantized))
    low = np.zeros(values.shape)
    for _ in range(2):  # how long the direction may be depends on how small the norm may be
        length = _direction_length(low)
        most = np.minimum(projection.high, length.high * size.high * (1 + OUTWARD))
        low = _divide(np.maximum(ratio.low, 0) * np.square(size.low), most, 0) * (1 - OUTWARD)
    squares = np.square(length.low), np.square(size.low), np.square(error)
    least = (squares[0] + squares[1] - squares[2]) / 2 - OUTWARD * sum(squares)
    least = np.maximum(projection.low, least)
    known = (least > 0) & (ratio.high >= 0)
    high = np.maximum(ratio.high, 0) * np.square(size.high) * (1 + OUTWARD)
    return Interval(low, np.where(known, high / np.where(known, least, 1), np.inf))


# --- E5, E6: what is decoded --------------------------------------------------------------------


@in_default_environment
def reconstruction_error(direction: Interval, norm: Interval, x_hat: Any) -> Float64:
    """Bound ``abs(x - x_hat)`` elementwise (E5).

    Parameters
    ----------
    direction : Interval of [..., T, D]
        Encloses ``x / norm``, of `direction_interval`.
    norm : Interval of [..., T]
        Encloses the norm, of `norm_interval`.
    x_hat : array, [..., T, D]
        Decoded tokens.

    Returns
    -------
    float64 array, [..., T, D]

    Raises
    ------
    TypeError, ValueError
        For an `x_hat` that is not finite, and shapes that do not fit.

    Examples
    --------
    >>> direction = Interval(np.array([[0.5]]), np.array([[0.75]]))
    >>> norm = Interval(np.array([4.0]), np.array([4.0]))
    >>> reconstruction_error(direction, norm, [[2.5]]).round(6)
    array([[0.5]])
    """
    decoded = _finite("x_hat", x_hat)
    direction, norm = _interval("direction", direction), _interval("norm", norm)
    _common_shape(direction=direction.low, x_hat=decoded, norm=norm.low[..., None])
    short, long = norm.low[..., None], norm.high[..., None]
    low, high = direction
    # Of the two norms the one that leads further out; an infinite one never meets a zero.
    below = np.where(low < 0, np.where(low < 0, long, 1) * low, short * low)
    above = np.where(high > 0, np.where(high > 0, long, 1) * high, short * high)
    ends = (decoded - below + OUTWARD * np.abs(below), above - decoded + OUTWARD * np.abs(above))
    return np.maximum(np.maximum(*ends) * (1 + OUTWARD), 0)


@in_default_environment
def logit_error(query: Any, direction: Interval, norm: Interval, x_hat: Any) -> Interval:
    """Enclose ``query . x_hat - query . x`` (E6).

    Parameters
    ----------
    query : array, [..., Q, D]
        Queries, whose leading axes broadcast with those of the tokens.
    direction, norm, x_hat
        As in `reconstruction_error`.

    Returns
    -------
    Interval of [..., Q, T]

    Raises
    ------
    TypeError, ValueError
        As `reconstruction_error`.

    Examples
    --------
    >>> direction = Interval(np.array([[0.5, 0.5]]), np.array([[0.75, 0.75]]))
    >>> norm = Interval(np.array([4.0]), np.array([4.0]))
    >>> low, high = logit_error([[1.0, -1.0]], direction, norm, [[2.5, 2.5]])
    >>> low.round(6), high.round(6)
    (array([[-1.]]), array([[1.]]))
    """
    decoded = _finite("x_hat", x_hat)
    direction, norm = _interval("direction", direction), _interval("norm", norm)
    _common_shape(direction=direction.low, x_hat=decoded, norm=norm.low[..., None])
    queries = _queries(query, decoded.shape[-1])
    known = np.isfinite(norm.high)
    up, down = np.maximum(queries, 0), np.maximum(-queries, 0)
    terms = 2 * decoded.shape[-1]
    lows, highs = [], []
    for size in (norm.low, np.where(known, norm.high, norm.low)):
        ends = [size[..., None] * end for end in direction]
        margin = OUTWARD * (np.abs(decoded) + np.maximum(np.abs(ends[0]), np.abs(ends[1])))
        least, most = (
            np.swapaxes(part, -1, -2)
            for part in (decoded - ends[1] - margin, decoded - ends[0] + margin)
        )
        slack = (up + down) @ np.maximum(np.abs(least), np.abs(most)) * (terms * TERM + OUTWARD)
        lows.append(up @ least - down @ most - slack)
        highs.append(up @ most - down @ least + slack)
    unknown = ~known[..., None, :]
    return Interval(
        np.where(unknown, -np.inf, np.minimum(*lows)), np.where(unknown, np.inf, np.maximum(*highs))
    )


@in_default_environment
def estimate_logit_rms(query: Any, scale: Any, norm: Any) -> Float64:
    """Estimate, not bound, the root mean square of ``query . (x - x_hat)``.

    ``norm * ||query * scale|| / sqrt(12)``: as if rounding errors were uniform over a scale and
    independent.

    Parameters
    ----------
    query : array, [..., Q, D]
        Queries, whose leading axes broadcast with those of the tokens.
    scale : array, [..., T, D]
        The scale of each element.
    norm : array, [..., T]
        Stored norms; 1 without norm separation.

    Returns
    -------
    float64 array, [..., Q, T]

    Raises
    ------
    TypeError, ValueError
        For values that are not real numbers, and shapes that do not fit.

    Examples
    --------
    >>> estimate_logit_rms([[3.0, 4.0]], [[0.1, 0.1]], [12.0]).round(4)
    array([[1.7321]])
    """
    steps, norms = _finite("scale", scale), _bound("norm", norm)
    _common_shape(norm=norms, **{"scale without its last axis": steps[..., 0]})
    queries = _queries(query, steps.shape[-1])
    variance = np.square(queries) @ np.swapaxes(np.square(steps), -1, -2) / 12
    return np.sqrt(variance) * norms[..., None, :]


# --- E7, E8: attention --------------------------------------------------------------------------


@in_default_environment
def total_variation(
    error: Interval, *, softmax_scale: float = 1.0, softcap: float | None = None, where: Any = None
) -> Float64:
    """Bound the total variation between the exact attention weights and the decoded ones (E7).

    Parameters
    ----------
    error : Interval of [..., T]
        Encloses what is added to each exact logit, of `logit_error`.
    softmax_scale : float
        What logits are multiplied by before softmax.
    softcap : float, optional
        Scaled logits become ``softcap * tanh(logit / softcap)``.
    where : bool array, optional
        Tokens that are attended to, such as broadcasts to the shape of `error`; all by default.

    Returns
    -------
    float64 array, [...]
        Bounds of half the sum of ``abs(weight - exact weight)``, from 0 to 1.

    Raises
    ------
    TypeError, ValueError
        For a scale or softcap that is not positive and finite, and shapes that do not fit.

    Examples
    --------
    >>> error = Interval(np.array([-0.5, -0.5]), np.array([0.5, 0.5]))
    >>> total_variation(error).round(4), np.tanh(0.25).round(4)
    (np.float64(0.2449), np.float64(0.2449))
    """
    softmax_scale = _positive("softmax_scale", softmax_scale)
    softcap = None if softcap is None else _positive("softcap", softcap)
    low, high = (end * softmax_scale for end in _interval("error", error))
    low, high = low - OUTWARD * np.abs(low), high + OUTWARD * np.abs(high)
    if softcap is not None:
        low, high = np.clip(low, -2 * softcap, 0), np.clip(high, 0, 2 * softcap)
    if where is not None:
        attended = np.broadcast_to(_attended(where), low.shape)
        low, high = np.where(attended, low, np.inf), np.where(attended, high, -np.inf)
    # The two errors that lie furthest apart are those of two tokens.
    first = np.argmin(low, axis=-1)[..., None]
    alone = np.arange(low.shape[-1]) == first
    second = np.min(np.where(alone, np.inf, low), axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # an unbounded token alone: infinity - infinity
        apart = high - np.where(alone, second, np.take_along_axis(low, first, -1))
    widest = np.fmax.reduce(apart, axis=-1, initial=0)
    return np.asarray(np.minimum(np.tanh(widest * (1 + OUTWARD) / 4) * (1 + OUTWARD), 1))


@in_default_environment
def spread(values: Any, error: Any, where: Any = None) -> Float64:
    """Bound the distance between any two exact value vectors, from the decoded ones (E8).

    Parameters
    ----------
    values : array, [..., T, D]
        Decoded values.
    error : array, [..., T]
        Bounds of ``norm(values - exact values)``, such as `Bounds.token`.
    where : bool array, [..., Q, T], optional
        Tokens that each query attends to; all by default.

    Returns
    -------
    float64 array, [..., 1], or [..., Q] where `where` is given

    Raises
    ------
    TypeError, ValueError
        For values that are not finite, and shapes that do not fit.

    Examples
    --------
    >>> spread([[3.0, 4.0], [-3.0, -4.0], [0.0, 0.0]], [0.5, 0.5, 0.5]).round(6)
    array([11.])
    """
    vectors, errors = _finite("values", values), _bound("error", error)
    _common_shape(error=errors, **{"values without its last axis": vectors[..., 0]})
    radii = (_length(vectors - _centre(vectors)).high + errors)[..., None, :]
    if where is not None:
        radii = np.where(_attended(where), radii, -np.inf)
    if radii.shape[-1] == 1:
        return np.zeros(radii.shape[:-1])
    two = np.partition(radii, -2, axis=-1)[..., -2:]
    return np.maximum((two[..., 0] + two[..., 1]) * (1 + OUTWARD), 0)


@in_default_environment
def output_error(weights: Any, error: Any, total_variation: Any, spread: Any) -> Float64:
    """Bound ``norm(output - exact output)`` of attention (E8).

    Parameters
    ----------
    weights : array, [..., Q, T]
        Attention weights from decoded keys; each row sums to one.
    error : array, [..., T]
        Bounds of ``norm(values - exact values)``, such as `Bounds.token`.
    total_variation : array, [..., Q]
        Of E7.
    spread : array, [..., 1] or [..., Q]
        Bounds of the distance between two exact values, of `spread`.

    Returns
    -------
    float64 array, [..., Q]

    Raises
    ------
    TypeError, ValueError
        For weights that are negative, and shapes that do not fit.

    Examples
    --------
    >>> output_error([[0.25, 0.75]], [0.1, 0.2], [0.05], [3.0]).round(4)
    array([0.325])
    """
    shares, errors = _bound("weights", weights), _bound("error", error)
    varied, distance = _bound("total_variation", total_variation), _bound("spread", spread)
    if shares.ndim < 2 or errors.ndim < 1 or shares.shape[-1] != errors.shape[-1]:
        raise ValueError(
            f"weights has shape {list(shares.shape)} and error {list(errors.shape)}; give "
            "[..., queries, tokens] and [..., tokens]"
        )
    direct = (shares @ errors[..., None])[..., 0]
    _common_shape(weights=direct, total_variation=varied, spread=distance)
    moved = np.where(varied == 0, 0, varied * np.where(varied == 0, 0, distance))
    return np.asarray((direct + moved) * (1 + errors.shape[-1] * TERM + OUTWARD))


# --- parts of the above -------------------------------------------------------------------------


class _Stored(NamedTuple):
    """What is stored for the tokens after the sinks, [N, T', ...], a scale for each token."""

    codes: Array
    scale: Float64
    zero: Float64 | None
    factor: Float64 | None
    y: Float64
    outlier_index: npt.NDArray[np.int32]
    outliers: Float64


def _stored(quantized: Quantized) -> _Stored:
    if not isinstance(quantized, Quantized):
        raise TypeError(f"quantized must be what quantize returns, got {type(quantized).__name__}")
    scheme, head_dim = quantized.scheme, quantized.shape[-1]
    block = codec.block_of(quantized)
    codes = packing.unpack(block.codes, scheme, head_dim)
    tokens = codes.shape[1]

    def each(part: Array) -> Array:
        """Repeat what belongs to a block for each of its tokens."""
        return np.repeat(part, scheme.tokens_per_block(tokens), axis=1)[:, :tokens]

    per_block = scheme.axis == "channel"
    scale, zero = (each(part) if per_block else part for part in (block.scale, block.zero))
    index = each(block.outlier_index)
    y = spec.dequantized_direction(codes, scale, zero, index, block.outliers)
    return _Stored(
        codes,
        scale.astype(np.float64),
        None if scheme.symmetric else zero.astype(np.float64),
        block.norm.astype(np.float64) if scheme.separate_norm else None,
        y.astype(np.float64),
        index,
        block.outliers.astype(np.float64),
    )


def _with_outliers(direction: Interval, stored: _Stored, scheme: Scheme) -> Interval:
    """Put what rule O1 tells of outlier channels into the intervals that codes tell."""
    if not scheme.outlier_channels:
        return direction
    low, high = narrowing_interval(stored.outliers, "float16")
    ends = direction.low.copy(), direction.high.copy()
    for side, end, of_outliers in ((-1, ends[0], low), (1, ends[1], high)):
        told = _undivided(0.0, of_outliers, side, 0.0, scheme)
        np.put_along_axis(end, stored.outlier_index, told, -1)
    return Interval(*ends)


def _bounds(
    quantized: Quantized,
    stored: _Stored,
    direction: Interval,
    norm: Interval,
    length: Interval,
    limit: Float64,
) -> Bounds:
    """Put E1 to E6 together; `length` encloses the norm of the direction, `limit` bounds E2."""
    scheme, y = quantized.scheme, stored.y
    x_hat = codec.dequantize(quantized)
    sinks = min(scheme.sink_tokens, x_hat.shape[-2])
    flat = x_hat.reshape(-1, *x_hat.shape[-2:])
    decoded = flat[:, sinks:].astype(np.float64)
    element_of_direction = _farthest(direction, y)
    error = np.minimum(direction_error(element_of_direction), limit)
    to_y = np.minimum(chord(error, y, length=length), _chord_of_dot(direction, y, length))
    if scheme.magnitude == "lsq":  # the factor has the sign of <x, y>, so x_hat points along x
        to_y = np.minimum(to_y, np.sqrt(2))
    element = reconstruction_error(direction, norm, decoded)
    token = _length(element).high
    collapsed = ~decoded.any(axis=-1)
    least, most = norm.low * length.low * (1 - OUTWARD), norm.high * length.high * (1 + OUTWARD)
    to_x_hat = np.where(collapsed, 2, np.minimum(to_y + _bend(decoded, y, stored.factor), 2))
    if stored.factor is None:
        relative = np.minimum(_divide(error, least, np.inf), _worst_ratio(direction, y))
        relative = np.where(collapsed, 1, relative * (1 + OUTWARD))
    elif scheme.magnitude == "lsq":
        product = stored.factor[..., None] * y
        missed = _length(np.abs(product - decoded) + OUTWARD * np.abs(product)).high
        missed = np.where(stored.factor == 0, 0, _divide(missed, least, np.inf))
        factor = factor_error(stored.factor, scheme.norm_dtype)
        relative = relative_error(to_y, factor, magnitude="lsq") + missed * (1 + OUTWARD)
    else:
        size = _length(decoded)
        factor = Interval(
            _divide(size.low, most, np.inf) - 1, _divide(size.high, least, np.inf) - 1
        )
        relative = relative_error(to_x_hat, factor)
    relative = np.minimum(relative, _divide(token, least, np.inf) * (1 + OUTWARD))
    # Where the norm is known to be 0 all is exact. A zero token without one is coded like others.
    zero = norm.high == 0
    relative = np.where(zero, 0, relative)
    implied = np.where(most > 0, relative * np.where(most > 0, most, 1), np.where(zero, 0, np.inf))
    token = np.minimum(token, implied * (1 + OUTWARD))
    element = np.minimum(element, token[..., None])

    def whole(coded: Float64, sink: Any) -> Float64:
        """Put the sinks before the coded tokens, and the leading axes as they were."""
        everything = np.empty((len(flat), flat.shape[1], *coded.shape[2:]))
        everything[:, :sinks], everything[:, sinks:] = sink, coded
        return everything.reshape(*x_hat.shape[:-2], *everything.shape[1:])

    return Bounds(
        x_hat=x_hat,
        direction=Interval(*(whole(end, flat[:, :sinks]) for end in direction)),
        norm=Interval(*(whole(end, 1) for end in norm)),
        direction_element=whole(element_of_direction, 0),
        direction_error=whole(error, 0),
        chord=whole(to_x_hat, 0),
        relative=whole(relative, 0),
        token=whole(token, 0),
        element=whole(element, 0),
    )


class _Worst(NamedTuple):
    """The largest scale of tokens of norm 1, and the largest errors of their elements."""

    scale: float
    rounded: float  # of an element whose code is not clamped
    clamped: float  # of one whose code is


def _narrowing_errors(scheme: Scheme) -> tuple[float, float]:
    """Largest relative error of narrowing a scale, and largest error of a subnormal one."""
    if scheme.scale_dtype == "float32":
        return 0.0, 0.0
    precision = PRECISIONS[scheme.scale_dtype]
    return precision.unit, precision.tiny if scheme.separate_norm else 0.0


def _worst_scale(scheme: Scheme, coded: int) -> _Worst:
    """Bound scales and element errors of tokens of norm 1 with this many coded channels (E1)."""
    levels, (unit, tiny) = scheme.code_range[1], _narrowing_errors(scheme)
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
    clamped = levels * max(unit * scale, tiny) + 8 * UNIT
    if not scheme.symmetric:
        clamped = max(clamped, unit * (1 + scale) + tiny + 8 * UNIT)
    if scheme.scale_rule == "search":
        # What a search cuts off is at most what it saves on the elements of the same scale.
        group = coded if scheme.axis == "token" else _block(scheme)
        saved = math.sqrt(group) * max(rounded, clamped)
        clamped += min(_cut(scheme) * span, saved) + 8 * UNIT
    return _Worst(scale, rounded, clamped)


def _cut(scheme: Scheme) -> float:
    """Share of a range that the search of rule S4 may take away from one of its ends."""
    return (1 - LEAST_SHRINK) / (1 if scheme.symmetric else 2)


def _block(scheme: Scheme) -> float:
    """Tokens that share a scale of a channel."""
    return math.inf if scheme.block_size is None else scheme.block_size


def _worst_direction_error(scheme: Scheme, coded: int, worst: _Worst) -> float:
    """Bound the norm of the error of the coded channels of a token of norm 1 (E2)."""
    levels, (unit, tiny) = scheme.code_range[1], _narrowing_errors(scheme)
    root, block, searched = math.sqrt(coded), _block(scheme), scheme.scale_rule == "search"
    share = (1 + unit) / (2 * levels) + 8 * UNIT  # half a scale, of the range that it divides
    if scheme.axis == "token":
        # S4 keeps the whole range unless a shorter one makes the sum of squares less.
        ends = _worst_scale(replace(scheme, scale_rule="range"), coded).clamped
        if scheme.symmetric:
            square = max(coded - 1, 0) * share**2
            return math.hypot(math.sqrt(square / (1 + square)), ends) + root * tiny + 4 * UNIT
        inner = math.sqrt(max(coded - 2, 0)) * max(worst.rounded, ends)
        return math.hypot(inner, math.sqrt(2) * ends) + 4 * UNIT
    # Roots of sums over the channels: of squared ranges of all tokens of the block and of all but
    # one, and of squared zeros. Tokens have norm 1. A channel whose range ends at the token in
    # question rounds nothing but that end.
    some = math.sqrt(min(coded, block - 1))
    if scheme.symmetric:
        every, others, zeros = math.sqrt(min(coded, block)), some, 0.0
    else:
        zeros = math.sqrt(min(coded, block))
        every, others = (
            min(2 * root, math.sqrt(2 * tokens) if tokens > 1 else 0.0) + unit * zeros
            for tokens in (block, block - 1)
        )
    slack = root * ((levels + 1) * tiny + 8 * UNIT)
    rounded = min(root * worst.rounded, others * share)
    if scheme.symmetric:  # nothing is coded worse than by 0, and what is clamped better than that
        clamped = unit + (_cut(scheme) if searched else 0.0)
        clamped *= math.sqrt(max(1 - rounded**2, 0))
    else:
        clamped = unit * (every + zeros) + (_cut(scheme) * (1 + some) if searched else 0.0)
    if searched:
        saved = math.hypot(min(root * worst.rounded, every * share), unit * (every + zeros))
        clamped = min(clamped, unit * (every + zeros) + math.sqrt(block) * (saved + slack))
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


def _reach(scale: Float64, zero: Float64, scheme: Scheme) -> Interval:
    """Enclose all directions of the block or token that a conforming encoder scaled like this."""
    quotient = narrowing_interval(scale, scheme.scale_dtype).high
    searched = scheme.scale_rule == "search"
    # What was divided by the greatest code. The division rounds only to a float32 scale, or to a
    # subnormal; the subtraction before it rounds, and the product of a search.
    if scheme.scale_dtype == "float32":
        quotient = quotient + UNIT * np.abs(quotient)
    quotient = quotient + TINY * (np.abs(quotient) < 2.0**-126)
    span = scheme.code_range[1] * quotient
    if scheme.symmetric:
        high = span * (1 + UNIT) / LEAST_SHRINK if searched else span
        low = -high
    else:
        low = narrowing_interval(zero, scheme.scale_dtype).low
        high = zero + span + UNIT * np.abs(span)
        if searched:
            middle, radius = (low + high) / 2, (high - low) / (2 * LEAST_SHRINK)
            slack = 9 * UNIT * (np.abs(middle) + np.abs(radius)) + 2.0**-146
            low, high = middle - radius - slack, middle + radius + slack
    margin = OUTWARD * (np.abs(low) + np.abs(high) + np.abs(zero))
    low, high = (
        _undivided(end, 0.0, side, 0.0, scheme)
        for end, side in ((low - margin, -1), (high + margin, 1))
    )
    return (
        Interval(np.maximum(low, -1), np.minimum(high, 1))
        if scheme.separate_norm
        else Interval(low, high)
    )


def _undivided(start: Any, offset: Any, side: int, roundings: float, scheme: Scheme) -> Float64:
    """Move ``start + offset`` to that side by what the offset and the division of N2 rounded."""
    end = start + offset
    end = end + side * (np.abs(offset) * roundings + np.abs(end) * OUTWARD)
    if not scheme.separate_norm:
        return np.asarray(end)
    return np.asarray(end + side * np.maximum(UNIT * (1 + OUTWARD) * np.abs(end), TINY))


def _before_rounding(value: Interval) -> Interval:
    """Enclose the real numbers that round to float32 numbers between these."""
    slack = (np.maximum(UNIT * (1 + OUTWARD) * np.abs(end), TINY) for end in value)
    low, high = (end + side * by for end, side, by in zip(value, (-1, 1), slack, strict=True))
    return Interval(low, high)


def _dequantized(code: int, scale: Float64, zero: Float64) -> Float64:
    """Return ``y`` of one code, in the float32 of rule D1."""
    single = np.float32(scale), np.float32(zero)
    return spec.dequantize(np.full(scale.shape, code), *single).astype(np.float64)


def _farthest(direction: Interval, y: Float64) -> Float64:
    """Bound ``abs(direction - y)``."""
    margin = OUTWARD * np.maximum(np.abs(direction.low), np.abs(direction.high))
    return np.maximum(direction.high - y, y - direction.low) + margin


def _length(vectors: Float64) -> Interval:
    """Enclose Euclidean norms over the last axis."""
    root = np.sqrt(np.sum(np.square(vectors), axis=-1))
    relative = vectors.shape[-1] * TERM + OUTWARD
    return Interval(root * (1 - relative), root * (1 + relative))


def _dot(direction: Interval, y: Float64) -> Interval:
    """Enclose the inner product of the direction and ``y`` over the last axis."""
    ends = direction.low * y, direction.high * y
    size = np.maximum(np.abs(ends[0]), np.abs(ends[1]))
    slack = np.sum(size, axis=-1) * (y.shape[-1] * TERM + OUTWARD)
    return Interval(
        np.sum(np.minimum(*ends), axis=-1) - slack, np.sum(np.maximum(*ends), axis=-1) + slack
    )


def _direction_length(norm: Float64) -> Interval:
    """Enclose the Euclidean norm of ``x / norm``, from a lower bound of the norm of N1.

    Only the rounding of that norm keeps it from 1. No token but zero has a norm below 2**-149.
    """
    off = np.where(norm < 2.0**-126, TINY / np.maximum(norm, 2 * TINY), UNIT) + TERM
    return Interval(1 - off, 1 + off)


def _chord_of_dot(direction: Interval, y: Float64, length: Interval) -> Float64:
    """Bound the distance of the unit vectors by the least inner product of the interval."""
    size, least = _length(y), _dot(direction, y).low
    by = np.where(least > 0, length.high * size.high, length.low * size.low)
    cosine = np.maximum(_divide(least, by, -np.inf), -1) * 1.0
    return np.sqrt(np.maximum(2 - 2 * cosine, 0) + OUTWARD)


def _free_chord(error: Float64, length: Float64) -> Float64:
    """Bound the squared chord between any vector and one of this length, this far apart."""
    square = np.square(_divide(error, length, np.inf)) * (1 + OUTWARD)
    within = np.where(square < 1, square, 0)
    free = 2 * within / (1 + np.sqrt(1 - within)) * (1 + OUTWARD)
    return np.asarray(np.where(square < 1, free, np.inf))


def _chord_at(length: Float64, error: Float64, size: Interval) -> Float64:
    """Bound the squared chord between two vectors of these lengths, this far apart."""
    gap = np.maximum(np.maximum(length - size.high, size.low - length), 0) * (1 - OUTWARD)
    above = np.maximum(np.square(error) * (1 + OUTWARD) - np.square(gap), 0)
    return _divide(above * (1 + OUTWARD), length * size.low, np.inf)


def _bend(x_hat: Float64, y: Float64, factor: Float64 | None) -> Float64:
    """Bound how far the rounding of rule D1 turned the decoded unit vector from that of ``y``."""
    if factor is None:
        return np.zeros(y.shape[:-1])
    units = []
    for vectors in (x_hat, y):
        lengths = np.sqrt(np.sum(np.square(vectors), axis=-1, keepdims=True))
        units.append(_divide(vectors, lengths, 0))
    turned = units[0] - np.copysign(1, factor)[..., None] * units[1]
    return np.asarray(_length(turned).high + y.shape[-1] * TERM + OUTWARD)


def _worst_ratio(direction: Interval, y: Float64) -> Float64:
    """Bound ``norm(direction - y) / norm(direction)`` by the worst of its elements."""
    around = (direction.low <= 0) & (direction.high >= 0)
    ratios = [
        np.abs(end - y) / np.where(around, 1, np.abs(end)) * (1 + OUTWARD) + OUTWARD
        for end in direction
    ]
    worst = np.where(around, np.where(y == 0, 1, np.inf), np.maximum(*ratios))
    return np.asarray(np.max(worst, axis=-1))


def _divide(above: Any, below: Any, otherwise: float) -> Float64:
    """Return the quotient; where the divisor is 0, 0 if the dividend is too, else `otherwise`."""
    zero = below == 0
    quotient = above / np.where(zero, 1, below)
    return np.asarray(np.where(zero, np.where(above == 0, 0, otherwise), quotient))


def _centre(vectors: Float64) -> Float64:
    """Return a point whose largest distance to the vectors is small: any point will do."""
    ends = np.max(vectors, axis=-2, keepdims=True), np.min(vectors, axis=-2, keepdims=True)
    chosen = centre = np.asarray((ends[0] + ends[1]) / 2)
    best = np.full((*vectors.shape[:-2], 1, 1), np.inf)
    for step in range(2, 18):  # Badoiu and Clarkson: a shorter step each time to the farthest one
        distance = np.sum(np.square(vectors - centre), axis=-1)
        far = np.argmax(distance, axis=-1)[..., None, None]
        radius = np.take_along_axis(distance[..., None], far, -2)
        chosen, best = np.where(radius < best, centre, chosen), np.minimum(radius, best)
        centre = centre + (np.take_along_axis(vectors, far, -2) - centre) / step
    return np.asarray(chosen)


# --- refusals -----------------------------------------------------------------------------------


def _interval(name: str, interval: Any) -> Interval:
    """Take two arrays, of whatever kind."""
    if not isinstance(interval, tuple) or len(interval) != 2:
        raise TypeError(f"{name} must be an Interval, got {type(interval).__name__}")
    low, high = interval
    return Interval(as_real_array(f"{name}.low", low), as_real_array(f"{name}.high", high))


def _positive(name: str, value: Any) -> float:
    number = as_float(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}={number} is not a positive finite number")
    return number


def _require(name: str, values: Array, holds: Array, what: str) -> None:
    """Name the first value that is not as it must be."""
    if not holds.all():
        index = [int(i) for i in np.argwhere(~holds)[0]]
        where = f"{name}{index}" if index else name
        raise ValueError(f"{where} is {values[tuple(index)]}, which {what}")


def _require_held(name: str, values: Float64, dtype: FloatName) -> None:
    with np.errstate(over="ignore"):
        held = values.astype(FLOAT_DTYPES[dtype]) == values
    _require(name, values, held, f"is not a value of {dtype}")


def _finite(name: str, values: Any) -> Float64:
    numbers = as_real_array(name, values)
    _require(name, numbers, np.isfinite(numbers), "is not finite")
    return numbers


def _bound(name: str, values: Any) -> Float64:
    numbers = as_real_array(name, values)
    _require(name, numbers, numbers >= 0, "is not a bound: it must be 0 or more")
    return numbers


def _codes(codes: Any, scheme: Scheme) -> Float64:
    given = as_integer_array("codes", codes)
    least, greatest = scheme.code_range
    inside = (given >= least) & (given <= greatest)
    _require("codes", given, inside, f"is not within {least} to {greatest}")
    return given.astype(np.float64)


def _scale_and_zero(scale: Any, zero: Any, scheme: Scheme) -> tuple[Float64, Float64]:
    if (zero is None) != scheme.symmetric:
        wanted = "has no zero; leave it out" if scheme.symmetric else "needs a zero"
        raise ValueError(f"zero={zero!r:.40}, but {scheme} {wanted}")
    scales = _finite("scale", scale)
    zeros = np.zeros(()) if zero is None else _finite("zero", zero)
    for name, values in (("scale", scales), ("zero", zeros)):
        _require_held(name, values, scheme.scale_dtype)
    _common_shape(scale=scales, zero=zeros)
    return scales, zeros


def _common_shape(**arrays: Array) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*(array.shape for array in arrays.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise ValueError(f"shapes do not fit together: {shapes}") from None


def _queries(query: Any, head_dim: int) -> Float64:
    queries = _finite("query", query)
    if queries.ndim < 2 or queries.shape[-1] != head_dim:
        raise ValueError(f"query has shape {list(queries.shape)}; give [..., queries, {head_dim}]")
    return queries


def _attended(where: Any) -> npt.NDArray[np.bool_]:
    attended = as_array("where", where)
    if attended.dtype != np.bool_:
        raise TypeError(f"where has dtype {attended.dtype}; give True where a token is attended to")
    return attended

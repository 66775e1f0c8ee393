"""Bounds of every token of what is stored ("Who knows what" of docs/bounds.md): E1 to E6 and E9.

A decoder knows what is stored (`certificate`); an encoder has the vectors, too (`encoder_bounds`).
What both know is put together here from the functions on plain arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref import codec, packing, spec
from nsq_ref.arrays import as_float_array, not_finite
from nsq_ref.bounds.attention import estimate_logit_rms, logit_error
from nsq_ref.bounds.before_data import a_priori
from nsq_ref.bounds.direction import direction_error, direction_interval
from nsq_ref.bounds.intervals import (
    DOWN,
    OUTWARD,
    SMALLEST_NORMAL,
    TERM,
    UP,
    Interval,
    direction_length,
    divide,
    euclidean,
    farthest,
    undivided,
)
from nsq_ref.bounds.norm import factor_error, narrowing_interval, norm_interval
from nsq_ref.bounds.token import (
    chord,
    chord_of_product,
    reconstruction_error,
    relative_error,
    worst_ratio,
)
from nsq_ref.codec import Quantized
from nsq_ref.dtypes import Array, Float32, Float64
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import Scheme


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
        Encloses the norm of rule N1 or N3 (E9); 1 without norm separation.
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
    >>> import nsq_ref as nsq
    >>> x = np.random.default_rng(0).standard_normal((512, 64), dtype=np.float32)
    >>> bounds = certificate(nsq.quantize(x))
    >>> error = x - bounds.x_hat
    >>> bool((abs(error) <= bounds.element).all())
    True
    >>> bool((np.linalg.norm(error, axis=-1) <= bounds.token).all())
    True
    """

    x_hat: Float32
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
        return np.minimum(2 * np.arcsin(self.chord / 2) * UP, np.pi)

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

        As the function `estimate_logit_rms`, with the widths of `direction` in place of scales and
        the middle of what is known of each norm.

        Examples
        --------
        >>> import nsq_ref as nsq
        >>> known = certificate(nsq.quantize(np.float32([[3, 4], [4, -3]])))
        >>> known.estimate_logit_rms([[1.0, 0.0], [1.0, 1.0]]).round(2)
        array([[0.16, 0.08],
               [0.18, 0.18]])
        """
        norm = (self.norm.low + self.norm.high) / 2
        return estimate_logit_rms(query, self.direction.high - self.direction.low, norm)


@in_default_environment
def certificate(quantized: Quantized) -> Bounds:
    """Bound the error of every token from what is stored, as a decoder can (E1 to E6, E9).

    Assumes that a conforming encoder wrote it, whose search, if any, is that of rule S4, without
    feedback (F1), and nothing of the vectors that it was given.

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
    >>> import nsq_ref as nsq
    >>> x = np.random.default_rng(0).standard_normal((512, 64), dtype=np.float32)
    >>> bounds = certificate(nsq.quantize(x))
    >>> round(float(bounds.relative.max()), 2)
    0.22
    """
    stored = _stored(quantized)
    direction, limit = _direction(stored), np.array(np.inf)
    norm, near = _norm(stored, direction), _length_near(direction, stored.y)
    if stored.scheme.separate_norm:
        length = direction_length(norm.low, stored.scheme)
        if stored.scheme.norm_rule == "balanced":
            length = Interval(np.maximum(length.low, near.low), np.minimum(length.high, near.high))
        # What is known before any data needs unit vectors, and subnormal norms make none.
        unit = (norm.low >= SMALLEST_NORMAL) | (norm.high == 0)
        known = a_priori(stored.scheme, quantized.shape[-1]).direction_error
        limit = np.where(unit.all(axis=-1, keepdims=True), known, np.inf)
    else:
        length = near
    return _bounds(quantized, stored, direction, norm, length, limit)


@in_default_environment
def encoder_bounds(x: Any, quantized: Quantized) -> Bounds:
    """Bound the error of every token from its norm and its clamped elements (E1 to E6, E9).

    Knows the norm of each token exactly, and of each element whose code lies at an end of the range
    how far beyond that end it was. So it holds for any scales whatever: frozen, calibrated or
    searched for. Of the other elements it knows no more than `certificate` does, so that it, too,
    is of arrays that were coded without feedback (F1).

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
    >>> import nsq_ref as nsq
    >>> x = np.random.default_rng(0).standard_normal((512, 64), dtype=np.float32)
    >>> bounds = encoder_bounds(x, nsq.quantize(x))
    >>> bool((abs(x - bounds.x_hat) <= bounds.element).all())
    True
    """
    stored = _stored(quantized)
    given = as_float_array("x", x)
    if given.shape != quantized.shape:
        raise ValueError(
            f"x has shape {list(given.shape)}; what was quantized has {list(quantized.shape)}"
        )
    with np.errstate(over="ignore"):
        tokens = given.astype(np.float32)
    if not np.isfinite(tokens).all():
        raise not_finite("x", given)
    tokens = tokens.reshape(-1, *given.shape[-2:])[:, stored.scheme.sink_tokens :]
    norm = np.ones(tokens.shape[:-1])
    with np.errstate(all="ignore"):  # what overflows is not finite, and refused or not chosen
        for rows in _slices(stored.scheme, tokens.shape[-2]):
            norm[:, rows] = spec.norms_and_sizes(tokens[:, rows], stored.scheme)[0]
    exact = tokens / np.where(norm == 0, np.inf, norm)[..., None]
    direction, unlimited = _direction(stored, exact), np.array(np.inf)
    return _bounds(quantized, stored, direction, Interval(norm, norm), euclidean(exact), unlimited)


class _Stored(NamedTuple):
    """What is stored for the tokens after the sinks, [N, T', ...], a scale for each token."""

    scheme: Scheme
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
        scheme,
        codes,
        scale.astype(np.float64),
        None if scheme.symmetric else zero.astype(np.float64),
        block.norm.astype(np.float64) if scheme.separate_norm else None,
        y.astype(np.float64),
        index,
        block.outliers.astype(np.float64),
    )


def _slices(scheme: Scheme, tokens: int) -> list[slice]:
    """Cut the tokens into those whose norms depend on each other (N3)."""
    return spec.block_slices(tokens, scheme) if scheme.norm_rule == "balanced" else [slice(None)]


def _norm(stored: _Stored, direction: Interval) -> Interval:
    """Enclose the norms by the stored factors (E9)."""
    ends = np.ones((2, *stored.y.shape[:-1]))
    for rows in _slices(stored.scheme, stored.y.shape[-2]):
        factor = None if stored.factor is None else stored.factor[:, rows]
        part = Interval(direction.low[:, rows], direction.high[:, rows])
        ends[..., rows] = norm_interval(factor, stored.y[:, rows], part, scheme=stored.scheme)
    return Interval(*ends)


def _length_near(direction: Interval, y: Float64) -> Interval:
    """Enclose the Euclidean norm of the direction by where its elements are (E3)."""
    size, error = euclidean(y), direction_error(farthest(direction, y))
    nearest = euclidean(np.maximum(0, np.maximum(direction.low, -direction.high)))
    return Interval(np.maximum((size.low - error) * DOWN, nearest.low), (size.high + error) * UP)


def _direction(stored: _Stored, known: Float64 | None = None) -> Interval:
    """Enclose the direction by codes and, of outlier channels, by what rule O1 stores of it."""
    direction = direction_interval(
        stored.codes, stored.scale, stored.zero, scheme=stored.scheme, direction=known
    )
    if not stored.scheme.outlier_channels:
        return direction
    ends = direction.low.copy(), direction.high.copy()
    narrowed = narrowing_interval(stored.outliers, "float16")
    for side, end, of_outliers in zip((-1, 1), ends, narrowed, strict=True):
        told = undivided(0.0, of_outliers, side, 0.0, stored.scheme)
        np.put_along_axis(end, stored.outlier_index, told, -1)
    return Interval(*ends)


def _bounds(
    quantized: Quantized, stored: _Stored, direction: Interval, norm: Interval, length: Interval,
    limit: Float64,
) -> Bounds:  # fmt: skip
    """Put E1 to E6 together; `length` encloses the norm of the direction, `limit` bounds E2."""
    scheme, y, factor = stored.scheme, stored.y, stored.factor
    x_hat = codec.dequantize(quantized)
    flat = x_hat.reshape(-1, *x_hat.shape[-2:])
    decoded = flat[:, scheme.sink_tokens :].astype(np.float64)
    element_of_direction = farthest(direction, y)
    error = np.minimum(direction_error(element_of_direction), limit)
    to_y = np.minimum(chord(error, y, length=length), chord_of_product(direction, y, length))
    if scheme.magnitude == "lsq":  # the factor has the sign of <x, y>, so x_hat points along x
        to_y = np.minimum(to_y, np.sqrt(2))
    element = reconstruction_error(direction, norm, decoded)
    token = euclidean(element).high
    collapsed = ~decoded.any(axis=-1)
    least, most = norm.low * length.low * DOWN, norm.high * length.high * UP
    to_x_hat = to_y if factor is None else np.minimum(to_y + _bend(decoded, y, factor), 2)
    to_x_hat = np.where(collapsed, 2, to_x_hat)
    if factor is None:
        relative = np.minimum(divide(error, least, np.inf), worst_ratio(direction, y))
        relative = np.where(collapsed, 1, relative * UP)
    elif scheme.magnitude == "lsq":
        product = factor[..., None] * y
        missed = euclidean(np.abs(product - decoded) + OUTWARD * np.abs(product)).high
        missed = np.where(factor == 0, 0, divide(missed, least, np.inf))
        off = factor_error(factor, scheme.norm_dtype)
        relative = relative_error(to_y, off, magnitude="lsq") + missed * UP
    else:
        size = euclidean(decoded)
        off = Interval(divide(size.low, most, np.inf) - 1, divide(size.high, least, np.inf) - 1)
        relative = relative_error(to_x_hat, off)
    relative = np.minimum(relative, divide(token, least, np.inf) * UP)
    # Where the norm is known to be 0 all is exact. A zero token without one is coded like others.
    zero = norm.high == 0
    relative = np.where(zero, 0, relative)
    implied = np.where(most > 0, relative * np.where(most > 0, most, 1), np.where(zero, 0, np.inf))
    token = np.minimum(token, implied * UP)
    element = np.minimum(element, token[..., None])

    def whole(coded: Float64, sink: Any) -> Float64:
        """Put the sinks before the coded tokens, and the leading axes as they were."""
        everything = np.empty((*flat.shape[:2], *coded.shape[2:]))
        everything[:, : scheme.sink_tokens], everything[:, scheme.sink_tokens :] = sink, coded
        return everything.reshape(*x_hat.shape[:-2], *everything.shape[1:])

    return Bounds(
        x_hat=x_hat,
        direction=Interval(*(whole(end, flat[:, : scheme.sink_tokens]) for end in direction)),
        norm=Interval(*(whole(end, 1) for end in norm)),
        direction_element=whole(element_of_direction, 0),
        direction_error=whole(error, 0),
        chord=whole(to_x_hat, 0),
        relative=whole(relative, 0),
        token=whole(token, 0),
        element=whole(element, 0),
    )


def _bend(x_hat: Float64, y: Float64, factor: Float64) -> Float64:
    """Bound how far the rounding of rule D1 turned the decoded unit vector from that of ``y``."""
    decoded, exact = (
        divide(vectors, np.sqrt(np.sum(np.square(vectors), axis=-1, keepdims=True)), 0)
        for vectors in (x_hat, y)
    )
    turned = decoded - np.copysign(1, factor)[..., None] * exact
    return np.asarray(euclidean(turned).high + y.shape[-1] * TERM + OUTWARD)

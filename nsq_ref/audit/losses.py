"""What a scheme loses of keys or values of a layer: predicted before, and measured by round trip.

The figure is the root mean square of ``q . (x - x_hat)``, over all tokens and queries. Queries
come in through their second moment alone: the mean of ``(q . e)**2`` is ``e M e`` with ``M`` the
mean of ``q q^T``. Where there are none, and for values, ``M`` is that of queries of unit variance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from nsq_ref.arrays import RangeError
from nsq_ref.audit.attention import SampledAttention
from nsq_ref.audit.layers import Layer
from nsq_ref.codec import dequantize, quantize
from nsq_ref.dtypes import Float32, Float64
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import Scheme
from nsq_ref.spec import SHRINK, norms_and_sizes

__all__ = ["Losses", "SideLoss", "predicted_error", "round_trip", "second_moment"]

Side = Literal["key", "value"]
LEAST_SPREAD = 1e-3
"""Tokens that differ by less than this share of their size count as if they differed by it."""


@dataclass(frozen=True, eq=False)
class SideLoss:
    """What one scheme loses on one side of a layer; it never changes.

    Attributes
    ----------
    scheme : Scheme
        That was measured: with factors in float32 where float16 does not hold them.
    predicted, measured : float64 array, [kv_heads]
        Of keys the root mean square error of the logits, of values that of an element.
    relative : float64 array, [kv_heads]
        The error over what tells tokens apart, which is ``x`` less its mean over the tokens, as a
        softmax does not see that: both as queries see them. Without queries, and of values, every
        channel counts alike, in units of its own deviation.
    output_error : float or None
        Relative error of the attention's output for the sampled queries, the other side exact;
        None without queries.
    divergence : float or None
        Of the attention weights, in nats; None without queries, and 0 for values.
    """

    scheme: Scheme
    predicted: Float64
    measured: Float64
    relative: Float64
    output_error: float | None = None
    divergence: float | None = None

    @property
    def judged(self) -> float:
        """The figure that rules of a policy look at: of the output, or else the relative one."""
        return self.output_error if self.output_error is not None else _mean(self.relative)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values, those of the layer and of each head.

        Examples
        --------
        >>> import numpy as np
        >>> one = np.ones(2)
        >>> SideLoss(Scheme(), one, one, one / 2).to_dict()["judged"]
        0.5
        """
        return {
            "predicted": _mean(self.predicted),
            "measured": _mean(self.measured),
            "relative": _mean(self.relative),
            "output_error": self.output_error,
            "divergence": self.divergence,
            "judged": self.judged,
            "predicted_by_head": self.predicted.tolist(),
            "measured_by_head": self.measured.tolist(),
            "scales": self.scheme.scale_dtype,
        }


def second_moment(layer: Layer, side: Side) -> Float64:
    """Return ``M``, float64 ``[kv_heads, D, D]``, of what meets keys or values.

    Of keys it is in units of logits, those of unit-variance queries where there are no others; of
    values such that the figures are those of an element.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((1, 1, 5, 2), np.float32)
    >>> second_moment(Layer(0, x, x, x, softmax_scale=0.5), "key")
    array([[[0.25, 0.25],
            [0.25, 0.25]]])
    >>> second_moment(Layer(0, x, x), "value")
    array([[[0.5, 0. ],
            [0. , 0.5]]])
    """
    x = layer.keys if side == "key" else layer.values
    _, kv_heads, _, head_dim = x.shape
    if side == "value" or layer.queries is None:
        unit = layer.scale**2 if side == "key" else 1 / head_dim
        return np.tile(unit * np.eye(head_dim), (kv_heads, 1, 1))
    queries = layer.queries.astype(np.float64) * layer.scale
    grouped = queries.reshape(len(x), kv_heads, -1, head_dim).swapaxes(0, 1)
    rows = grouped.reshape(kv_heads, -1, head_dim)
    moment: Float64 = rows.swapaxes(1, 2) @ rows / rows.shape[1]
    return moment


def round_trip(x: Float32, scheme: Scheme) -> tuple[Float32, Scheme]:
    """Quantize and dequantize; return the scheme too, with float32 factors where float16 is short.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.full((1, 4, 2), 1e6, np.float32)
    >>> round_trip(x, Scheme.named("naive4"))[1].scale_dtype
    'float32'
    """
    try:
        return dequantize(quantize(x, scheme)), scheme
    except RangeError:
        wide = replace(scheme, scale_dtype="float32")
        if scheme.separate_norm:
            wide = replace(wide, norm_dtype="float32")
        return dequantize(quantize(x, wide)), wide


@in_default_environment
def predicted_error(x: Float32, scheme: Scheme, moment: Float64) -> Float64:
    """Predict the root mean square of ``q . (x - x_hat)`` from the scheme's steps, without coding.

    What is smaller than half a step rounds to zero, and is lost as it is; what a range that was
    searched for leaves out is clipped. All else errs as if uniformly over a step, and independently
    (E6 of the bounds). Of a token with a norm or a gain of its own, the error along it is mended:
    a gain of balanced norms (N3) mends it as the length over the channels' sizes sees it.

    Parameters
    ----------
    x : float32 array, [batch, heads, T, D]
    scheme : Scheme
        Without outlier channels.
    moment : float64 array, [heads, D, D]
        Of `second_moment`.

    Returns
    -------
    float64 array, [heads]

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((1, 1, 512, 8)).astype(np.float32)
    >>> moment = np.eye(8)[None] / 8
    >>> scheme = Scheme.named("naive4")
    >>> error = round_trip(x, scheme)[0] - x
    >>> predicted_error(x, scheme, moment).round(3), round(float(np.sqrt(np.mean(error**2))), 3)
    (array([0.076]), 0.072)
    """
    if scheme.outlier_channels:
        raise ValueError(f"{scheme} has outlier channels, of which nothing is predicted")
    tokens, total = x.shape[2], np.zeros(x.shape[1])
    for block in _blocks(x, scheme):
        with np.errstate(all="ignore"):  # what overflows is not chosen
            norm, size = norms_and_sizes(block, scheme)
        factor = norm[..., None].astype(np.float64)
        direction = block / np.where(factor == 0, 1, factor)
        known, variance = _expected(direction, scheme)
        weights = np.diagonal(moment, axis1=1, axis2=2)[:, None]
        if scheme.separate_norm:  # the token's factor mends what is along it
            seen_by = direction / np.square(size.astype(np.float64))
            if scheme.magnitude == "lsq":
                squares = np.square(direction).sum(axis=-1, keepdims=True)
                seen_by = direction / np.where(squares == 0, 1, squares)
            known = known - (known * seen_by).sum(axis=-1, keepdims=True) * direction
            seen = direction @ moment
            along = (seen * direction).sum(axis=-1, keepdims=True)
            weights = weights - 2 * seen_by * seen + np.square(seen_by) * along
        total += (variance * np.square(factor) * weights).sum(axis=(0, 2, 3))
        total += _sum_of_squares(known * factor, moment)
    error: Float64 = np.sqrt(np.maximum(total, 0) / (len(x) * tokens))
    return error


def _expected(direction: Float64, scheme: Scheme) -> tuple[Float64, Float64]:
    """Return the errors that are known before rounding, and the variance of the others."""
    axis = -1 if scheme.axis == "token" else -2
    low, high = (f(direction, axis=axis, keepdims=True) for f in (np.min, np.max))
    if scheme.symmetric:
        high = np.maximum(-low, high)
        low = -high
    middle, radius = (high + low) / 2, (high - low) / 2
    least, most = scheme.code_range
    best: tuple[Float64, Float64] | None = None
    smallest = np.full_like(middle, np.inf)
    for shrink in SHRINK if scheme.scale_rule == "search" else SHRINK[:1]:
        reach = radius * float(shrink)
        step = 2 * reach / (most - least)
        known = direction - np.clip(direction, middle - reach, middle + reach)
        if scheme.symmetric:
            known = np.where(np.abs(direction) < step / 2, direction, known)
        variance = np.where(known == 0, np.square(step) / 12, 0)
        squares = (np.square(known) + variance).sum(axis=axis, keepdims=True)
        better = squares < smallest
        if best is not None:
            known, variance = (
                np.where(better, *pair) for pair in zip((known, variance), best, strict=True)
            )
        best, smallest = (known, variance), np.minimum(smallest, squares)
    if best is None:
        raise RuntimeError("a scheme has no scale")
    return best


def _blocks(x: Float32, scheme: Scheme) -> Iterator[Float32]:
    """Yield the tokens that share scales, without the sinks (K1, B1)."""
    coded = x[:, :, min(scheme.sink_tokens, x.shape[2]) :]
    size = scheme.tokens_per_block(coded.shape[2])
    for start in range(0, coded.shape[2], size):
        yield coded[:, :, start : start + size]


class Losses:
    """What schemes lose of one side of a layer; each is measured once.

    Parameters
    ----------
    layer : Layer
    side : {"key", "value"}
    attention : SampledAttention, optional

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((1, 2, 300, 16)).astype(np.float32)
    >>> loss = Losses(Layer(0, x, x), "value").of(Scheme.named("streaming4"))
    >>> loss.measured.round(2), loss.predicted.round(2)
    (array([0.09, 0.09]), array([0.09, 0.09]))
    """

    def __init__(self, layer: Layer, side: Side, attention: SampledAttention | None = None) -> None:
        self._side, self._number, self._attention = side, layer.number, attention
        self._x = layer.keys if side == "key" else layer.values
        self._moment = second_moment(layer, side)
        self._by_channel = side == "value" or layer.queries is None
        self._spread = self._size_of(*_apart(self._x.astype(np.float64)))
        self._known: dict[Scheme, SideLoss] = {}

    def of(self, scheme: Scheme) -> SideLoss:
        """Return what a scheme loses, predicted and measured."""
        if scheme not in self._known:
            self._known[scheme] = self._measured(scheme)
        return self._known[scheme]

    @in_default_environment
    def _measured(self, scheme: Scheme) -> SideLoss:
        try:
            x_hat, used = round_trip(self._x, scheme)
        except RangeError as error:  # float32 does not hold it either
            raise RangeError(
                f"{self._side}s of layer {self._number}: {error}",
                error.part, error.index, error.fault,
            ) from None  # fmt: skip
        errors = x_hat.astype(np.float64) - self._x
        measured = _root_mean(errors, self._moment)
        relative = np.sqrt(np.mean(np.square(self._size_of(errors) / self._spread), axis=-1))
        predicted = predicted_error(self._x, scheme, self._moment)
        if self._attention is None:
            return SideLoss(used, predicted, measured, relative)
        lost = self._attention.loss(**{f"{self._side}s": x_hat})
        return SideLoss(used, predicted, measured, relative, *lost)

    @in_default_environment
    def _size_of(self, x: Float64, whole: Float64 | None = None) -> Float64:
        """Root mean square of ``x``, of each head or channel; at least a share of ``whole``."""

        def size(of: Float64) -> Float64:
            if self._by_channel:
                root: Float64 = np.sqrt(np.mean(np.square(of), axis=(0, 2)))
                return root
            return _root_mean(of, self._moment)[:, None]

        if whole is None:
            return size(x)
        least = np.maximum(size(x), LEAST_SPREAD * size(whole))
        return np.where(least == 0, 1.0, least)


def _apart(x: Float64) -> tuple[Float64, Float64]:
    """Return what tells tokens apart, and all of it."""
    return x - x.mean(axis=2, keepdims=True), x


def _root_mean(errors: Float64, moment: Float64) -> Float64:
    """Root of the mean of ``e M e`` over the tokens of each head."""
    mean = _sum_of_squares(errors, moment) / (errors.shape[0] * errors.shape[2])
    root: Float64 = np.sqrt(np.maximum(mean, 0))
    return root


def _sum_of_squares(errors: Float64, moment: Float64) -> Float64:
    """Sum of ``e M e`` over the tokens of each head: that of the product of M and ``E^T E``."""
    products = (errors.swapaxes(-1, -2) @ errors).sum(axis=0)
    total: Float64 = (products * moment).sum(axis=(1, 2))
    return total


def _mean(heads: Float64) -> float:
    """One figure of all heads: the root of the mean square."""
    return float(np.sqrt(np.mean(np.square(heads))))

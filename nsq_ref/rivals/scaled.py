"""Scales a channel that belong to a model: onnxruntime's static codes, SmoothQuant's smoothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from nsq_ref.arrays import as_float_array
from nsq_ref.dtypes import Array, Float32
from nsq_ref.rivals.codec import Codec, Part, Parts, Values, divided, half, whole

__all__ = ["Smoothed", "StaticChannels"]


@dataclass(frozen=True, eq=False)
class StaticChannels(Codec):
    """Symmetric codes with a float32 scale a channel that other keys and values have set.

    Parameters
    ----------
    side : {"key", "value"}
        For keys, both channels of a rotary pair count as large as the pair is long.
    bits : {4, 8}
    percentile : float
        Of the magnitudes, which becomes the largest code and a half more: the rest is clipped.
    scale : float32 array, shape [..., 1, D], optional
        What `calibrated` sets.

    Examples
    --------
    >>> x = np.float32([[1, -8], [0.5, 4]])
    >>> codec = StaticChannels("value", percentile=100).calibrated(x)
    >>> codec(2 * x).x_hat  # beyond what it knows
    array([[ 0.875, -8.   ],
           [ 0.875,  7.   ]], dtype=float32)
    """

    side: Literal["key", "value"]
    bits: int = 4
    percentile: float = 99.99
    scale: Array | None = None

    def calibrated(self, x: Any) -> StaticChannels:
        """Return the codec with scales from ``x[..., T, D]``.

        Its axes before the tokens, such as layers and heads, must be those of what is coded.
        """
        magnitude = np.abs(as_float_array("x", x).astype(np.float32))
        if self.side == "key":
            whole(magnitude.shape, -1, 2, "a rotary pair")
            first, second = np.split(magnitude, 2, axis=-1)
            pair = np.hypot(first, second)
            magnitude = np.concatenate([pair, pair], axis=-1)
        threshold = np.percentile(magnitude, self.percentile, axis=-2, keepdims=True)
        scale = np.maximum(threshold, 1e-6) / 2 ** (self.bits - 1)
        return replace(self, scale=scale.astype(np.float32))

    def encode(self, x: Float32) -> Parts:
        """Code with the scales there are."""
        scale = self.scale
        if scale is None:
            raise ValueError(
                "static scales are not calibrated; call calibrated(keys, values) of the entry, "
                "with keys and values of other text"
            )
        if (*scale.shape[:-2], scale.shape[-1]) != (*x.shape[:-2], x.shape[-1]):
            raise ValueError(
                f"x has shape {list(x.shape)}, its scales {list(scale.shape)}; calibrate with "
                "arrays of the same layers, heads and head_dim"
            )
        half_range = 2 ** (self.bits - 1)
        codes = np.clip(np.rint(x / scale), -half_range, half_range - 1).astype(np.int8)
        return {"codes": Part(codes, self.bits), "scale": Part(scale, 32)}

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Code times scale."""
        restored: Float32 = parts["codes"].astype(np.float32) * parts["scale"]
        return restored


@dataclass(frozen=True)
class Smoothed(Codec):
    """SmoothQuant as preprocessing: channels divided by a power of their largest magnitude.

    Queries would be multiplied by it. Both channels of a rotary pair get the larger factor, so that
    it may be put into the weights before the rotation.

    Examples
    --------
    >>> from nsq_ref import Scheme
    >>> from nsq_ref.rivals import SchemeCodec
    >>> x = np.float32([[100, 1, 1, 1], [100, -1, 1, -1]])
    >>> naive = SchemeCodec(Scheme.named("naive4"))
    >>> naive(x).x_hat[0].round()
    array([100.,   0.,   0.,   0.], dtype=float32)
    >>> Smoothed(naive)(x).x_hat[0].round(1)
    array([100. ,   1.4,   0. ,   1.4], dtype=float32)
    """

    inner: Codec
    alpha: float = 0.5

    def coded(self, tokens: int) -> tuple[int, int]:
        """Return what the other codec codes."""
        return self.inner.coded(tokens)

    def encode(self, x: Float32) -> Parts:
        """Divide channels, and encode."""
        whole(x.shape, -1, 2, "a rotary pair")
        largest = np.abs(x).max(axis=-2, keepdims=True)
        pairs = largest.reshape(*largest.shape[:-1], 2, -1).max(axis=-2)
        factor = half("a factor", pairs**self.alpha)
        return self.inner.encode(divided(x, _both(factor))) | {"factor": Part(factor, 16)}

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Decode, and multiply channels."""
        inner = {name: part for name, part in parts.items() if name != "factor"}
        return self.inner.decode(inner, shape) * _both(parts["factor"])


def _both(factor: Array) -> Float32:
    wide = factor.astype(np.float32)
    return np.concatenate([wide, wide], axis=-1)

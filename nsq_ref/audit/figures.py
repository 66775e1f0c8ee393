"""What keys or values of a layer look like: outlier channels, bias, norms of tokens.

None of the figures depends on the scale of what is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nsq_ref.dtypes import Array, Float32, Float64
from nsq_ref.environment import in_default_environment
from nsq_ref.metrics import outlier_ratio

__all__ = ["SideFigures", "side_figures", "token_norms"]

MOST_BIAS = 1e6
"""The bias of a channel that never changes."""


@dataclass(frozen=True, eq=False)
class SideFigures:
    """One side of a layer, head by head; it never changes, so that threads may share one.

    Attributes
    ----------
    peak : float64 array, [heads, D]
        The largest magnitude of each channel over all tokens.
    outlier_ratio : float64 array, [heads]
        The paper's: the greatest of these peaks over their *mean*, from 1 to D.
    outlier_channel : int array, [heads]
        The channel that has the greatest.
    ratio_to_median : float64 array, [heads]
        The greatest peak over the median of all, which many outliers move less; infinite where
        that is 0.
    bias : float64 array, [heads, D]
        The mean of each channel over its standard deviation, as a magnitude, at most 1e6.
    norm_variation : float64 array, [heads]
        Standard deviation of the tokens' norms over their mean.
    norm_least, norm_greatest : float64 array, [heads]
        The least and the greatest norm over the median of those that are not 0.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((1, 1, 6, 4), np.float32)
    >>> x[..., 2] = 21
    >>> figures = side_figures(x)
    >>> figures.outlier_ratio, figures.outlier_channel, figures.ratio_to_median
    (array([3.5]), array([2]), array([21.]))
    """

    peak: Float64
    outlier_ratio: Float64
    outlier_channel: Array
    ratio_to_median: Float64
    bias: Float64
    norm_variation: Float64
    norm_least: Float64
    norm_greatest: Float64

    @property
    def bias_channel(self) -> Array:
        """The channel of each head that has the largest bias."""
        channel: Array = np.argmax(self.bias, axis=-1)
        return channel

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values, ready for JSON; null is infinite.

        Examples
        --------
        >>> import numpy as np
        >>> side_figures(np.ones((1, 2, 3, 4), np.float32)).to_dict()["outlier_ratio"]
        [1.0, 1.0]
        """
        greatest = self.bias.max(axis=-1)
        return {
            "outlier_ratio": self.outlier_ratio.tolist(),
            "outlier_channel": self.outlier_channel.tolist(),
            "ratio_to_median": [x if np.isfinite(x) else None for x in self.ratio_to_median],
            "bias": greatest.tolist(),
            "bias_channel": self.bias_channel.tolist(),
            "norm_variation": self.norm_variation.tolist(),
            "norm_least": self.norm_least.tolist(),
            "norm_greatest": self.norm_greatest.tolist(),
            "channel_peak": self.peak.tolist(),
            "channel_bias": self.bias.tolist(),
        }


@in_default_environment
def side_figures(x: Float32) -> SideFigures:
    """Measure keys or values ``[batch, heads, T, D]`` of a layer, all rows of the batch together.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((1, 1, 500, 8)).astype(np.float32)
    >>> x[..., 3] += 7
    >>> figures = side_figures(x)
    >>> int(figures.bias_channel[0]), round(float(figures.bias[0, 3]))
    (3, 7)
    """
    _, heads, _, head_dim = x.shape
    rows = x.swapaxes(0, 1).reshape(heads, -1, head_dim).astype(np.float64)
    peak = np.abs(rows).max(axis=1)
    greatest, median = peak.max(axis=-1), np.median(peak, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        to_median = np.where(greatest == 0, 1.0, greatest / median)
    # Each channel in units of its own peak, so that nothing leaves float64.
    units = rows / np.where(peak == 0, 1, peak)[:, None]
    deviation = np.maximum(units.std(axis=1), 1 / MOST_BIAS)
    bias = np.minimum(np.abs(units.mean(axis=1)) / deviation, MOST_BIAS)
    norms = token_norms(x).swapaxes(0, 1).reshape(heads, -1)
    mean = norms.mean(axis=-1)
    middle = np.array([np.median(one[one > 0]) if one.any() else 1.0 for one in norms])
    return SideFigures(
        peak, outlier_ratio(rows), np.argmax(peak, axis=-1), to_median, bias,
        norms.std(axis=-1) / np.where(mean == 0, 1, mean),
        np.where(mean == 0, 1.0, norms.min(axis=-1) / middle),
        np.where(mean == 0, 1.0, norms.max(axis=-1) / middle),
    )  # fmt: skip


def token_norms(x: Array) -> Float64:
    """Return the norm of every token, float64, the last axis left out.

    Examples
    --------
    >>> import numpy as np
    >>> token_norms(np.float32([[3, 4], [0, 0]]))
    array([5., 0.])
    """
    norms: Float64 = np.linalg.norm(x.astype(np.float64), axis=-1)
    return norms

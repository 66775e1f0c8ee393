"""Directions, and what quantization makes of them; the figure of ``nsq demo``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nsq_ref.arrays import as_float_array, as_integer
from nsq_ref.codec import dequantize, quantize
from nsq_ref.dtypes import Array, Float64
from nsq_ref.plots.series import error_by_layer
from nsq_ref.plots.style import STYLES, styles
from nsq_ref.scheme import Scheme, as_scheme


def direction_histogram(axes: Axes, x: npt.ArrayLike, schemes: Sequence[str], title: str) -> None:
    """Draw how the elements of directions are distributed, before and after quantization.

    The legend tells how many elements a scheme turns into zero.

    Parameters
    ----------
    axes : matplotlib Axes
    x : float32 array, shape [..., T, D]
        Keys or values of one layer.
    schemes : sequence of str
        Names to quantize with.
    title : str

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    >>> direction_histogram(axes, x, ["nsep+pchan4"], "a layer")
    >>> axes.get_xlabel()
    'element of the direction, in standard deviations of its channel'
    """
    given = as_float_array("x", x)
    before = _directions(given)
    spread = before.std(axis=-2, keepdims=True)
    spread[spread == 0] = 1
    middle = before.mean(axis=-2, keepdims=True)
    edges = np.linspace(-4, 4, 161).tolist()

    def draw(elements: Float64, **style: Any) -> None:
        drawn = np.clip((elements - middle) / spread, -4, 4).ravel()
        axes.hist(drawn, edges, density=True, **style)

    draw(before, color="0.8", label="before")
    for name, (color, _) in zip(schemes, styles(1), strict=False):
        after = _directions(dequantize(quantize(given, as_scheme("schemes", name))))
        zeros = np.mean((after == 0) & (before != 0))
        draw(after, histtype="step", lw=1.3, color=color, label=f"{name}: {zeros:.0%} become 0")
    axes.set(title=title, ylabel="density")
    axes.set_xlabel("element of the direction, in standard deviations of its channel")
    axes.legend(loc="upper right", frameon=False)


def two_channels(axes: Axes, tokens: npt.ArrayLike, scheme: Scheme | str, chosen: int) -> None:
    """Draw directions of two channels on their circle, and the grid that they are decoded to.

    A box holds all that decodes as one chosen token does: half a scale in each channel.

    Parameters
    ----------
    axes : matplotlib Axes
    tokens : float32 array, shape [T, 2]
        Of positive elements.
    scheme : Scheme or str
        One scale a channel, symmetric, norms separated, one block.
    chosen : int
        The token whose box is drawn.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> two_channels(axes, np.float32([[3, 4], [4, 3]]), Scheme(bits=3), 0)
    >>> axes.patches[0].get_width().round(2)  # the scale of channel 0
    np.float64(0.27)
    """
    tokens, scheme = as_float_array("tokens", tokens), as_scheme("scheme", scheme)
    chosen = as_integer("chosen", chosen)
    quantized = quantize(tokens, scheme)
    directions, steps = _directions(tokens), quantized.scale[0].astype(np.float64)
    decoded = quantized.codes * steps
    arc = np.linspace(0, np.pi / 2, 100)
    axes.plot(np.cos(arc), np.sin(arc), color="0.6", lw=1)
    for start, end in zip(directions, decoded, strict=True):
        axes.plot(*zip(start, end, strict=True), color="0.7", lw=0.7)
    y, d = STYLES[1][0], STYLES[4][0]
    axes.plot(*decoded.T, "s", ms=9, color=y, label="decoded direction y")
    axes.plot(*directions.T, "o", ms=4, color=d, label="direction d, of length 1")
    corner, (width, height) = decoded[chosen] - steps / 2, steps
    axes.add_patch(Rectangle(corner, width, height, fc="none", ec=STYLES[5][0], lw=2))
    unit = decoded[chosen] / np.linalg.norm(decoded[chosen])
    for end, color in ((unit, y), (directions[chosen], d)):
        axes.plot([0, end[0]], [0, end[1]], color=color)
    for axis, step in ((axes.xaxis, steps[0]), (axes.yaxis, steps[1])):
        codes = range(scheme.code_range[1] + 1)
        axis.set_ticks(
            [code * step for code in codes], [f"{code} s" if code else "0" for code in codes]
        )
    axes.grid(color="0.85")
    axes.set(aspect="equal", xlim=(0, 1.35), ylim=(0, 1.25), xlabel="channel 0", ylabel="channel 1")
    axes.legend(loc="upper right")


def demo_figure(
    key_errors: Mapping[str, npt.ArrayLike],
    value_errors: Mapping[str, npt.ArrayLike],
    sample: npt.ArrayLike,
    sample_name: str,
    title: str,
) -> Figure:
    """Draw the figure of ``nsq demo``: errors by layer, and directions before and after.

    Parameters
    ----------
    key_errors, value_errors : mapping of str to array, shape [layers]
        Relative errors; ``value_errors`` may be empty.
    sample : float32 array, shape [..., T, D]
        Keys whose directions are shown.
    sample_name, title : str

    Returns
    -------
    matplotlib Figure
        To be saved with ``savefig``.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    >>> figure = demo_figure({"naive4": [0.1]}, {}, x, "keys of layer 0", "a model")
    >>> len(figure.axes)
    4
    """
    figure = Figure(figsize=(12, 8.2), layout="constrained")
    grid = figure.subplots(2, 2)
    error_by_layer(grid[0, 0], key_errors, "error of keys")
    error_by_layer(grid[0, 1], value_errors, "error of values")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    for axes, name in zip(grid[1], ("naive4", "nsep+pchan4"), strict=True):
        direction_histogram(axes, sample, [name], f"directions of {sample_name}: {name}")
    for axes in grid[1]:
        axes.set_ylim(0, 1.2)  # a spike at zero is beyond; the legend has its size
    figure.suptitle(title)
    return figure


def _directions(x: Array) -> Float64:
    wide = x.astype(np.float64)
    norm = np.linalg.norm(wide, axis=-1, keepdims=True)
    return wide / np.where(norm == 0, 1, norm)

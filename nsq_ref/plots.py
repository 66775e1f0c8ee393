"""Figures on arrays (extra ``plots``: matplotlib), in colours that the colour-blind can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from nsq_ref.codec import dequantize, quantize
from nsq_ref.scheme import Scheme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["demo_figure", "direction_histogram", "error_by_layer"]

# Okabe and Ito's palette, each colour with a marker of its own, so that no figure rests on colour.
STYLES = [
    ("#000000", "o"), ("#E69F00", "s"), ("#56B4E9", "^"), ("#009E73", "D"),
    ("#0072B2", "v"), ("#D55E00", "P"), ("#CC79A7", "X"),
]  # fmt: skip


def error_by_layer(axes: Axes, errors: Mapping[str, npt.ArrayLike], title: str) -> None:
    """Draw the relative error of each layer, a line a scheme, labelled at its end.

    Parameters
    ----------
    axes : matplotlib Axes
    errors : mapping of str to array, shape [layers]
        Relative errors, positive.
    title : str

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> error_by_layer(axes, {"nsep+pchan4": [0.1, 0.2]}, "keys")
    >>> axes.get_title()
    'keys'
    """
    for (name, error), (color, marker) in zip(errors.items(), _styles(len(errors)), strict=True):
        layers = np.arange(len(np.asarray(error)))
        axes.plot(
            layers, 100 * np.asarray(error), color=color, marker=marker, ms=4, lw=1.3, label=name
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel="layer", ylabel="relative error")
    axes.grid(alpha=0.25)


def direction_histogram(
    axes: Axes, x: npt.NDArray[np.float32], schemes: Sequence[str], title: str
) -> None:
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
    before = _directions(x)
    spread = before.std(axis=-2, keepdims=True)
    spread[spread == 0] = 1
    middle = before.mean(axis=-2, keepdims=True)
    edges = np.linspace(-4, 4, 161).tolist()
    axes.hist(
        np.clip((before - middle) / spread, -4, 4).ravel(),
        edges,
        density=True,
        color="0.8",
        label="before",
    )
    for name, (color, _) in zip(schemes, _styles(len(schemes) + 1)[1:], strict=True):
        scheme = Scheme.named(name)
        if not isinstance(scheme, Scheme):
            raise ValueError(f"{name!r} names two schemes; give the one of keys or of values")
        after = _directions(dequantize(quantize(x, scheme)))
        zeros = np.mean((after == 0) & (before != 0))
        scaled = np.clip((after - middle) / spread, -4, 4).ravel()
        axes.hist(
            scaled,
            edges,
            density=True,
            histtype="step",
            lw=1.3,
            color=color,
            label=f"{name}: {zeros:.0%} become 0",
        )
    axes.set(title=title, ylabel="density")
    axes.set_xlabel("element of the direction, in standard deviations of its channel")
    axes.legend(frameon=False)


def demo_figure(
    key_errors: Mapping[str, npt.ArrayLike],
    value_errors: Mapping[str, npt.ArrayLike],
    sample: npt.NDArray[np.float32],
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


def _directions(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = x.astype(np.float64)
    norm = np.linalg.norm(wide, axis=-1, keepdims=True)
    return wide / np.where(norm == 0, 1, norm)


def _styles(count: int) -> list[tuple[str, str]]:
    return [STYLES[i % len(STYLES)] for i in range(count)]

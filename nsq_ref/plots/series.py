"""Lines over what changes step by step, and rows and bars of a few numbers each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from nsq_ref.arrays import as_float, as_real_array
from nsq_ref.plots.style import STYLES, plain_ticks, styles, styles_of


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
    for (name, error), (color, marker) in zip(errors.items(), styles(), strict=False):
        drawn = as_real_array(f"errors[{name!r}]", error)
        layers = np.arange(len(drawn))
        axes.plot(layers, 100 * drawn, color=color, marker=marker, ms=4, lw=1.3, label=name)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis, " %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel="layer", ylabel="relative error")
    axes.grid(alpha=0.25)


def sweep(
    axes: Axes,
    settings: npt.ArrayLike,
    results: Mapping[str, npt.ArrayLike],
    title: str,
    standard_errors: Mapping[str, npt.ArrayLike] | None = None,
) -> None:
    """Draw what becomes of each scheme when one thing is changed step by step.

    Lines that run on top of each other stay apart: the first drawn is the widest.

    Parameters
    ----------
    axes : matplotlib Axes
    settings : array, shape [steps]
        The values of what is changed, such as a layer, a length or a strength.
    results : mapping of str to array, shape [steps]
        By scheme, or by any other name. A scheme has the same colour in every such figure.
    title : str
    standard_errors : mapping of str to array, shape [steps], optional
        Bars of one standard error in either direction.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> sweep(axes, [1, 2], {"naive4": [0.1, 0.9]}, "louder")
    >>> axes.lines[0].get_ydata()
    array([0.1, 0.9])
    """
    widths = np.linspace(3.0, 1.2, len(results)) if len(results) > 1 else [1.5]
    for (name, result), (color, marker), width in zip(
        results.items(), styles_of(list(results)), widths, strict=False
    ):
        axes.errorbar(
            as_real_array("settings", settings), as_real_array(f"results[{name!r}]", result),
            None if standard_errors is None
            else as_real_array(f"standard_errors[{name!r}]", standard_errors[name]),
            color=color, marker=marker, ms=2.5 + 1.5 * width, lw=width, capsize=2, elinewidth=1,
            label=name,
        )  # fmt: skip
    axes.set_title(title)
    axes.grid(alpha=0.25)


def quantile_rows(
    axes: Axes, samples: Mapping[str, npt.ArrayLike], title: str, xlabel: str
) -> None:
    """Draw the median of each sample, written out, and the range of its middle 90 percent.

    Parameters
    ----------
    axes : matplotlib Axes
    samples : mapping of str to array
        Positive; a row each, from the top.
    title, xlabel : str

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> quantile_rows(axes, {"measured": [0.1, 0.2, 0.4]}, "errors", "relative error")
    >>> axes.texts[0].get_text()
    '0.2'
    """
    for row, ((name, sample), (color, marker)) in enumerate(
        zip(samples.items(), styles(1), strict=False)
    ):
        drawn = as_real_array(f"samples[{name!r}]", sample)
        low, middle, high = np.quantile(drawn, (0.05, 0.5, 0.95))
        axes.plot([low, high], [row, row], color=color, lw=3)
        axes.plot(middle, row, marker, color=color, ms=11)
        axes.text(
            middle, row - 0.15, f"{middle:.2g}", ha="center", va="bottom",
            bbox={"fc": "white", "ec": "none", "pad": 1},
        )  # fmt: skip
    axes.set_yticks(range(len(samples)), list(samples))
    axes.set(xscale="log", title=title, xlabel=xlabel, ylim=(len(samples) - 0.5, -0.5))
    plain_ticks(axes.xaxis, at=(1, 3))
    axes.grid(alpha=0.25)


def bars(
    axes: Axes, labels: Sequence[object], heights: Mapping[str, npt.ArrayLike], title: str
) -> None:
    """Draw groups of bars side by side.

    Parameters
    ----------
    axes : matplotlib Axes
    labels : sequence
        Of the groups, from the left.
    heights : mapping of str to array, shape [groups]
        A bar in each group.
    title : str

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> bars(axes, [0, 5], {"keys": [1.0, 2.0], "values": [3.0, 4.0]}, "layers")
    >>> [float(bar.get_height()) for bar in axes.patches]
    [1.0, 2.0, 3.0, 4.0]
    """
    width = 0.9 / len(heights)
    colors = [STYLES[4][0], STYLES[1][0], "0.6", *(color for color, _ in STYLES)]
    for position, (name, height) in enumerate(heights.items()):
        at = np.arange(len(labels)) + (position - (len(heights) - 1) / 2) * width
        size = as_real_array(f"heights[{name!r}]", height)
        axes.bar(at, size, width, color=colors[position], label=name)
    axes.set_xticks(range(len(labels)), [str(label) for label in labels])
    axes.set_title(title)


def stacked_rows(
    axes: Axes, rows: Mapping[str, Mapping[str, float]], title: str, xlabel: str
) -> None:
    """Draw what each row is made of, part behind part.

    Parameters
    ----------
    axes : matplotlib Axes
    rows : mapping of str to mapping of str to float
        The size of each part of each row, from the top; a part that a row lacks may be left out.
    title, xlabel : str

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> stacked_rows(axes, {"a": {"codes": 4.0, "norms": 0.5}, "b": {"codes": 3.0}}, "", "bits")
    >>> [(float(bar.get_x()), float(bar.get_width())) for bar in axes.patches]
    [(0.0, 4.0), (0.0, 3.0), (4.0, 0.5), (3.0, 0.0)]
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    colors = [STYLES[index][0] for index in (4, 1, 5, 3, 6)] + ["0.75"]
    start = np.zeros(len(rows))
    for part, color in zip(parts, itertools.cycle(colors), strict=False):
        size = np.array(
            [as_float(f"rows[{name!r}][{part!r}]", row.get(part, 0)) for name, row in rows.items()]
        )
        axes.barh(list(rows), size, left=start, color=color, label=part)
        start += size
    axes.invert_yaxis()
    axes.set(title=title, xlabel=xlabel)

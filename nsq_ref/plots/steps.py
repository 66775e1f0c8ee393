"""Lines over layers, lengths or whatever else changes step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from matplotlib.ticker import MaxNLocator

from nsq_ref.arrays import as_real_array
from nsq_ref.plots.style import plain_ticks, styles, styles_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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

"""The figure of ``nsq demo``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy.typing as npt
from matplotlib.figure import Figure

from nsq_ref.plots.directions import direction_histogram
from nsq_ref.plots.steps import error_by_layer


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
    >>> import numpy as np
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

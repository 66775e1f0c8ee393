"""Schemes as points, each with its name beside it, and the front of those that none beats."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from nsq_ref.arrays import as_float, as_real_array
from nsq_ref.plots.style import STYLES, plain_ticks

# Where a name may stand about its point: offset in points, and how it is aligned to it.
Place: TypeAlias = tuple[
    tuple[float, float], Literal["left", "center", "right"], Literal["bottom", "center", "top"]
]
PLACES: list[Place] = [
    ((8, 5), "left", "bottom"), ((8, -5), "left", "top"), ((-8, 5), "right", "bottom"),
    ((-8, -5), "right", "top"), ((0, 9), "center", "bottom"), ((0, -9), "center", "top"),
    ((18, 20), "left", "bottom"), ((18, -20), "left", "top"),
    ((-18, 20), "right", "bottom"), ((-18, -20), "right", "top"),
    ((26, 36), "left", "bottom"), ((-26, -36), "right", "top"),
    ((26, -36), "left", "top"), ((-26, 36), "right", "bottom"),
]  # fmt: skip


def pareto_front(bits: npt.ArrayLike, error: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Tell which points no other point beats: none has fewer bits without more error.

    Parameters
    ----------
    bits, error : array, shape [points]
        Less is better in both.

    Returns
    -------
    bool array, shape [points]
        True on the front. Of equal points all are.

    Examples
    --------
    >>> pareto_front([4.0, 4.5, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4])
    array([ True, False,  True, False])
    """
    cost = np.stack([as_real_array("bits", bits), as_real_array("error", error)])
    no_worse = np.all(cost[:, :, None] <= cost[:, None, :], axis=0)
    better = np.any(cost[:, :, None] < cost[:, None, :], axis=0)
    beaten: npt.NDArray[np.bool_] = np.any(no_worse & better, axis=0)
    return ~beaten


def frontier(
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    title: str,
    ylabel: str,
    standard_errors: Mapping[str, float] | None = None,
) -> None:
    """Draw schemes by bits and error, each named, and the front of those that none beats.

    Parameters
    ----------
    axes : matplotlib Axes
        Set their scales first, such as ``axes.set_yscale("log")``, and draw into all other axes of
        the figure: its layout is settled here, so that names can be placed beside each other.
    points : mapping of str to (bits, error)
        Bits an element, everything stored counted, and an error, less being better.
    title, ylabel : str
    standard_errors : mapping of str to float, optional
        Bars of one standard error in either direction.

    Raises
    ------
    ValueError
        For no points, or an error that is not positive on a logarithmic axis.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> frontier(axes, {"a": (4.0, 0.1), "b": (4.5, 0.2), "c": (3.0, 0.3)}, "schemes", "error")
    >>> axes.lines[0].get_xdata().tolist()  # the front: b is beaten by a
    [3.0, 4.0]
    """
    if not points:
        raise ValueError("points is empty; give at least one scheme")
    points = _numbers(points)
    bits, error = np.array(list(points.values()), np.float64).T
    if axes.get_yscale() == "log" and (error <= 0).any():
        name = list(points)[int(np.argmax(error <= 0))]
        raise ValueError(f"the error of {name!r} is not positive; use axes.set_yscale('symlog')")
    front = pareto_front(bits, error)
    order = np.lexsort((error[front], bits[front]))
    front_color, other_color = STYLES[4][0], "0.55"
    axes.plot(bits[front][order], error[front][order], color=front_color, lw=1.5, zorder=1)
    for chosen, color, marker, label in (
        (front, front_color, "o", "on the front"), (~front, other_color, "s", "beaten"),
    ):  # fmt: skip
        axes.plot(bits[chosen], error[chosen], marker, color=color, ms=7, label=label, zorder=3)
    for name, deviation in (standard_errors or {}).items():
        x, y = points[name]
        size = as_float(f"standard_errors[{name!r}]", deviation)
        axes.errorbar(x, y, size, color="0.4", lw=1, capsize=2, zorder=2)
    axes.legend(loc="upper right")
    _finish_named(axes, title, "stored bits an element", ylabel)
    _name_points(axes, points, [front_color if on else "0.35" for on in front])


def named_points(
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    title: str,
    xlabel: str,
    ylabel: str,
    standard_errors: Mapping[str, float] | None = None,
) -> None:
    """Draw schemes by two measures of theirs, each named.

    Parameters
    ----------
    axes : matplotlib Axes
        As in `frontier`: set their scales first, and draw into all other axes of the figure.
    points : mapping of str to (x, y)
    title, xlabel, ylabel : str
    standard_errors : mapping of str to float, optional
        Bars of one standard error of y in either direction.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> named_points(axes, {"a": (1.0, 2.0), "b": (2.0, 1.0)}, "two measures", "one", "other")
    >>> [text.get_text() for text in axes.texts]
    ['a', 'b']
    """
    color, marker = STYLES[4][0], "o"
    points = _numbers(points)
    for name, (x, y) in points.items():
        deviation = None
        if standard_errors is not None:
            deviation = as_float(f"standard_errors[{name!r}]", standard_errors[name])
        axes.errorbar(x, y, deviation, fmt=marker, color=color, ms=7, elinewidth=1, capsize=2)
    _finish_named(axes, title, xlabel, ylabel)
    _name_points(axes, points, ["0.25"] * len(points))


def _numbers(points: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Return points whose coordinates are plain numbers."""
    return {
        name: (as_float(f"points[{name!r}][0]", x), as_float(f"points[{name!r}][1]", y))
        for name, (x, y) in points.items()
    }


def _finish_named(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
        if scale == "log":
            plain_ticks(axis)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.margins(x=0.12, y=0.12)
    axes.grid(alpha=0.25)


def _name_points(
    axes: Axes, points: Mapping[str, tuple[float, float]], colors: Sequence[str]
) -> None:
    """Write each name beside its point, where it covers no point and no name before it.

    Lines are avoided where that is possible: the first line of the axes, which is the front where
    there is one, and bars.
    """
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("axes belong to no figure, so that names have no size; add them to one")
    figure.draw_without_rendering()
    lines = [axes.lines[0].get_xydata()]
    for bars in axes.collections:
        if isinstance(bars, LineCollection):
            lines += bars.get_segments()
    crossed = [
        Bbox([at - 1, at + 1])
        for line in lines
        for start, end in itertools.pairwise(axes.transData.transform(line))
        for at in start + (end - start) * np.linspace(0, 1, 20)[:, None]
    ]
    taken = [Bbox([at - 5, at + 5]) for at in axes.transData.transform(list(points.values()))]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    for (name, point), color in zip(points.items(), colors, strict=True):
        text = axes.annotate(
            name, point, (0, 0), textcoords="offset points", color=color, fontsize="small",
            arrowprops={"arrowstyle": "-", "color": "0.7", "lw": 0.7, "shrinkB": 4},
        )  # fmt: skip
        crowding = []
        for place in PLACES:
            box = _put(text, place)
            hidden = float(sum(box.overlaps(other) for other in taken))
            hidden += 0.5 * any(box.overlaps(other) for other in crossed)
            outside = not (axes.bbox.contains(*box.p0) and axes.bbox.contains(*box.p1))
            crowding.append(hidden + 2 * outside)
            if not crowding[-1]:
                break
        taken.append(_put(text, PLACES[int(np.argmin(crowding))]))


def _put(text: Annotation, place: Place) -> Bbox:
    """Move a name to a place and return what it covers there, its line to the point left out."""
    offset, side, height = place
    text.xyann = offset
    text.set(ha=side, va=height)
    text.get_window_extent()  # which moves the text to its place
    return Text.get_window_extent(text)

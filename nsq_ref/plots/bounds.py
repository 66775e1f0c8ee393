"""What was measured, beside what was bounded or estimated."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from nsq_ref.arrays import as_real_array
from nsq_ref.dtypes import Float64
from nsq_ref.plots.style import STYLES, plain_ticks, styles


def bound_against_measured(
    axes: Axes, pairs: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]], title: str
) -> None:
    """Draw what was measured over what the bound allows, both logarithmic, below a diagonal.

    A point above the diagonal would refute the bound; that side is shaded, and has the largest
    share of its bound that each kind of data attains. The axes end at a hundredth of the least
    bound: what is further below it, or zero, is not in sight.

    Parameters
    ----------
    axes : matplotlib Axes
    pairs : mapping of str to (bound, measured)
        For each kind of data two arrays of one shape.
    title : str

    Raises
    ------
    ValueError
        Where the two arrays differ in shape, hold NaN, or a bound is 0 and the measured is not.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> bound_against_measured(axes, {"random": ([1.0, 2.0], [0.5, 1.8])}, "E2")
    >>> axes.get_legend().get_texts()[0].get_text()
    'random: 0.900'
    """
    least, most = np.inf, 0.0
    for (name, (bound, measured)), (color, marker) in zip(pairs.items(), styles(1), strict=False):
        allowed, found = _bound_and_measured(name, bound, measured)
        allowed, found = allowed[found > 0], found[found > 0]
        least, most = min(least, allowed.min(initial=np.inf)), max(most, allowed.max(initial=0.0))
        share = float(np.max(found / allowed, initial=0.0))
        axes.plot(
            allowed, found, marker, color=color, ms=4, alpha=0.5, mew=0, rasterized=True,
            label=f"{name}: {share:.3f}",
        )  # fmt: skip
    low, high = (least / 100, most * 1.5) if most else (0.1, 1.0)
    axes.fill_between([low, high], [low, high], high, color="0.9", lw=0)
    _diagonal(axes, np.array([low, high]), title, "bound")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=5))
        axis.set_minor_locator(NullLocator())
    axes.legend(loc="upper left", markerscale=1.5, title="largest share", alignment="left")


def share_of_bound(
    axes: Axes,
    pairs: Mapping[str, Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]],
    title: str,
) -> None:
    """Draw how much of its bound an error uses: a row a bound, from the median to the largest.

    Points where nothing was measured count as a share of 0 in the median.

    Parameters
    ----------
    axes : matplotlib Axes
    pairs : mapping of str to mapping of str to (bound, measured)
        For each kind of data, and each bound, two arrays of one shape. Kinds have the same bounds.
    title : str

    Raises
    ------
    ValueError
        As `bound_against_measured`.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> share_of_bound(axes, {"random": {"E1": ([1.0, 1.0, 1.0], [0.5, 0.4, 0.9])}}, "shares")
    >>> axes.lines[0].get_xdata().tolist()
    [0.5, 0.9]
    """
    rows = list(next(iter(pairs.values())))
    offsets = np.linspace(-0.22, 0.22, len(pairs)) if len(pairs) > 1 else [0.0]
    for (kind, found), offset, (color, marker) in zip(
        pairs.items(), offsets, styles(1), strict=False
    ):
        for row, name in enumerate(rows):
            bound, measured = _bound_and_measured(f"{kind}, {name}", *found[name])
            share = measured / np.where(measured > 0, bound, 1)
            middle, most = float(np.median(share)), float(np.max(share))
            axes.plot([middle, most], [row + offset] * 2, color=color, lw=1.5)
            label = kind if row == 0 else None
            axes.plot(most, row + offset, marker, color=color, label=label)
    axes.axvline(1, color="black", lw=1.2)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set(xscale="log", title=title, xlabel="share of the bound, %: median to largest")
    plain_ticks(axes.xaxis, at=(1, 3), times=100)
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left")


def estimate_against_measured(
    axes: Axes, estimate: npt.ArrayLike, measured: npt.ArrayLike, title: str, within: float = 0.25
) -> None:
    """Draw what was measured over what was estimated, both logarithmic, with a grey band.

    Parameters
    ----------
    axes : matplotlib Axes
    estimate, measured : array
        Of one shape, positive.
    title : str
    within : float
        Half the width of the band: a relative error of the estimate.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> axes = Figure().subplots()
    >>> estimate_against_measured(axes, [1.0, 2.0], [1.1, 1.9], "logits")
    >>> axes.lines[0].get_ydata()
    array([1.1, 1.9])
    """
    expected = as_real_array("estimate", estimate).ravel()
    found = as_real_array("measured", measured).ravel()
    axes.plot(expected, found, ".", ms=3, color=STYLES[4][0])
    both = np.concatenate([expected, found])
    ends = np.array([both.min() / 1.2, both.max() * 1.2])
    band = ends / (1 + within), ends * (1 + within)
    axes.fill_between(ends, *band, color="0.9", lw=0, label=f"within {within:.0%}")
    _diagonal(axes, ends, title, "estimate")
    for axis in (axes.xaxis, axes.yaxis):
        plain_ticks(axis)
    axes.legend(loc="upper left")


def _bound_and_measured(
    name: str, bound: npt.ArrayLike, measured: npt.ArrayLike
) -> tuple[Float64, Float64]:
    allowed = as_real_array(f"the bound of {name!r}", bound)
    found = as_real_array(f"the measured of {name!r}", measured)
    if allowed.shape != found.shape or np.isnan(allowed).any() or np.isnan(found).any():
        raise ValueError(
            f"{name!r}: bound {list(allowed.shape)} and measured {list(found.shape)} must be "
            "of one shape and without NaN"
        )
    if (allowed[found > 0] <= 0).any():
        raise ValueError(f"{name!r}: a bound is 0 where the measured is not; it does not hold")
    return allowed, found


def _diagonal(axes: Axes, ends: Float64, title: str, xlabel: str) -> None:
    """Make both axes logarithmic, between these ends, and draw where one is the other."""
    axes.plot(ends, ends, color="black", lw=1.2)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(title=title, xlabel=xlabel, ylabel="measured")

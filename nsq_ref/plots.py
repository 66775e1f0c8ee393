"""Figures on arrays (extra ``plots``: matplotlib), in colours that the colour-blind can tell."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from nsq_ref.arrays import as_float, as_float_array, as_integer, as_real_array
from nsq_ref.codec import dequantize, quantize
from nsq_ref.environment import extra
from nsq_ref.metrics import relative_error
from nsq_ref.scheme import Scheme, as_scheme

with extra("plots", __name__):
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.text import Annotation, Text
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
    from matplotlib.transforms import Bbox

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.image import AxesImage

__all__ = [
    "TALK_STYLE",
    "bars",
    "bound_against_measured",
    "demo_figure",
    "direction_histogram",
    "error_by_layer",
    "error_map",
    "estimate_against_measured",
    "frontier",
    "named_points",
    "outlier_ratio_map",
    "pareto_front",
    "quantile_rows",
    "share_of_bound",
    "stacked_rows",
    "sweep",
    "token_channel_map",
    "two_channels",
]

# Okabe and Ito's palette, each colour with a marker of its own, so that no figure rests on colour.
STYLES = [
    ("#000000", "o"), ("#E69F00", "s"), ("#56B4E9", "^"), ("#009E73", "D"),
    ("#0072B2", "v"), ("#D55E00", "P"), ("#CC79A7", "X"),
]  # fmt: skip

TALK_STYLE: dict[str, Any] = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 120,
    "figure.figsize": (9.0, 4.0),
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
"""Settings for ``matplotlib.rcParams.update``: figures that can be read from afar."""

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

FAMILIES = ("naive", "nsep", "pchan", "nsep+pchan", "streaming", "outlier", "nsep+out")

SEQUENTIAL, DIVERGING = "cividis", "PuOr"  # both can be told without red and green


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
        drawn = as_real_array(f"errors[{name!r}]", error)
        layers = np.arange(len(drawn))
        axes.plot(layers, 100 * drawn, color=color, marker=marker, ms=4, lw=1.3, label=name)
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis, " %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel="layer", ylabel="relative error")
    axes.grid(alpha=0.25)


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
    axes.hist(
        np.clip((before - middle) / spread, -4, 4).ravel(),
        edges,
        density=True,
        color="0.8",
        label="before",
    )
    for name, (color, _) in zip(schemes, _styles(len(schemes) + 1)[1:], strict=True):
        after = _directions(dequantize(quantize(given, as_scheme("schemes", name))))
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
    axes.legend(loc="upper right", frameon=False)


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
        results.items(), _styles_of(list(results)), widths, strict=True
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


def outlier_ratio_map(
    axes: Axes, ratios: npt.ArrayLike, title: str, greatest: float | None = None
) -> AxesImage:
    """Draw how far the largest channel of each head stands out, by layer and head.

    The largest ratio has a frame and its figure; the colours start at 1, all channels alike.

    Parameters
    ----------
    axes : matplotlib Axes
    ratios : array, shape [layers, heads]
        What `nsq_ref.metrics.outlier_ratio` returns for ``x[layers, heads, T, D]``.
    title : str
    greatest : float, optional
        Where the colours end, so that several maps can share them; the largest ratio by default.

    Returns
    -------
    matplotlib AxesImage
        To be given to ``figure.colorbar``.

    Raises
    ------
    ValueError
        For an array of other than two axes.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> image = outlier_ratio_map(Figure().subplots(), [[1.5, 3.0], [2.0, 9.0]], "keys")
    >>> image.get_clim()
    (1.0, 9.0)
    """
    drawn = _matrix("ratios", ratios, "layers, heads").T
    norm = Normalize(1.0, float(drawn.max()) if greatest is None else greatest)
    image = axes.imshow(drawn, aspect="auto", cmap=SEQUENTIAL, norm=norm, interpolation="nearest")
    head, layer = np.unravel_index(int(np.argmax(drawn)), drawn.shape)
    axes.plot(layer, head, marker="s", ms=12, mfc="none", mec="#D55E00", mew=2)
    largest = f"{drawn.max():.1f} in layer {layer}, head {head}"
    axes.set_title(f"{title}: at most {largest}", loc="left")
    axes.set(xlabel="layer", ylabel="head")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return image


def token_channel_map(
    axes: Axes,
    values: npt.ArrayLike,
    title: str,
    limits: tuple[float, float] | None = None,
) -> AxesImage:
    """Draw one head as a picture, its tokens from left to right, its channels upwards.

    Values of both signs get colours that part at zero.

    Parameters
    ----------
    axes : matplotlib Axes
    values : array, shape [T, D]
        Keys or values, directions, codes or errors of one head.
    title : str
    limits : tuple of float, optional
        Least and greatest value of the colours; those of the values by default.

    Returns
    -------
    matplotlib AxesImage
        To be given to ``figure.colorbar``.

    Raises
    ------
    ValueError
        For an array of other than two axes.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> image = token_channel_map(Figure().subplots(), [[-7, 2], [3, 0]], "codes")
    >>> image.get_clim()
    (-7.0, 7.0)
    """
    drawn = _matrix("values", values, "T, D").T
    if limits is None:
        low, high = float(drawn.min()), float(drawn.max())
        limits = (low, high) if low >= 0 else (-max(-low, high), max(-low, high))
    colors = DIVERGING if limits[0] < 0 else SEQUENTIAL
    return _token_channel_image(axes, drawn, title, Normalize(*limits), colors)


def error_map(
    axes: Axes,
    x: npt.ArrayLike,
    x_hat: npt.ArrayLike,
    title: str,
    limits: tuple[float, float] = (1.0, 100.0),
) -> AxesImage:
    """Draw the error of every element of one head, by token and channel.

    Errors are in percent of what an element of the token has on average, the root of the mean
    square: a token of any norm that loses all of itself is at about 100.

    Parameters
    ----------
    axes : matplotlib Axes
    x, x_hat : array, shape [T, D]
        One head before and after quantization.
    title : str
        The relative error of the tokens, the median of all, is added to it.
    limits : tuple of float
        Ends of the logarithmic colours, in percent; what is beyond has the colour of the end.

    Returns
    -------
    matplotlib AxesImage
        To be given to ``figure.colorbar``.

    Raises
    ------
    ValueError
        For arrays of other than two axes, or of different shapes.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> image = error_map(Figure().subplots(), [[3.0, 4.0]], [[3.0, 3.5]], "a token")
    >>> image.axes.get_title()
    'a token: error 10.0%'
    """
    original, restored = _matrix("x", x, "T, D"), _matrix("x_hat", x_hat, "T, D")
    if original.shape != restored.shape:
        shapes = f"{list(original.shape)} and x_hat {list(restored.shape)}"
        raise ValueError(f"x has shape {shapes}; give arrays of equal shape")
    size = np.sqrt(np.mean(np.square(original), axis=1, keepdims=True))
    error = 100 * np.abs(original - restored) / np.where(size == 0, 1, size)
    typical = np.median(relative_error(original, restored, axis=1))
    drawn = np.clip(error, *limits).T
    return _token_channel_image(
        axes, drawn, f"{title}: error {typical:.1%}", LogNorm(*limits), SEQUENTIAL
    )


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
    for (name, (bound, measured)), (color, marker) in zip(
        pairs.items(), _styles(len(pairs) + 1)[1:], strict=True
    ):
        allowed, found = _bound_and_measured(name, bound, measured)
        allowed, found = allowed[found > 0], found[found > 0]
        least, most = min(least, allowed.min(initial=np.inf)), max(most, allowed.max(initial=0.0))
        share = float(np.max(found / allowed, initial=0.0))
        axes.plot(
            allowed, found, marker, color=color, ms=4, alpha=0.5, mew=0, rasterized=True,
            label=f"{name}: {share:.3f}",
        )  # fmt: skip
    low, high = (least / 100, most * 1.5) if most else (0.1, 1.0)
    axes.plot([low, high], [low, high], color="black", lw=1.2)
    axes.fill_between([low, high], [low, high], high, color="0.9", lw=0)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=5))
        axis.set_minor_locator(NullLocator())
    axes.set(title=title, xlabel="bound", ylabel="measured")
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
        pairs.items(), offsets, _styles(len(pairs) + 1)[1:], strict=True
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
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left")


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
    ends = np.array(
        [min(expected.min(), found.min()) / 1.2, max(expected.max(), found.max()) * 1.2]
    )
    axes.plot(ends, ends, color="black", lw=1.2)
    axes.fill_between(
        ends,
        ends / (1 + within),
        ends * (1 + within),
        color="0.9",
        lw=0,
        label=f"within {within:.0%}",
    )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=title)
    axes.set(xlabel="estimate", ylabel="measured")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    axes.legend(loc="upper left")


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
        zip(samples.items(), _styles(len(samples) + 1)[1:], strict=True)
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
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
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


def _numbers(points: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Return points whose coordinates are plain numbers."""
    return {
        name: (as_float(f"points[{name!r}][0]", x), as_float(f"points[{name!r}][1]", y))
        for name, (x, y) in points.items()
    }


def _directions(x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    wide = x.astype(np.float64)
    norm = np.linalg.norm(wide, axis=-1, keepdims=True)
    return wide / np.where(norm == 0, 1, norm)


def _styles_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Styles by the families of schemes, so that figures agree, where they tell the names apart."""
    families = [name[:-1] for name in names]
    if len(set(families)) < len(names) or not set(families) <= set(FAMILIES):
        return _styles(len(names))
    return [STYLES[FAMILIES.index(family)] for family in families]


def _styles(count: int) -> list[tuple[str, str]]:
    return [STYLES[i % len(STYLES)] for i in range(count)]


def _bound_and_measured(
    name: str, bound: npt.ArrayLike, measured: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
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


def _matrix(name: str, values: npt.ArrayLike, axes_names: str) -> npt.NDArray[np.float64]:
    matrix = as_real_array(name, values)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{name} has shape {list(matrix.shape)}; give [{axes_names}]")
    return matrix


def _token_channel_image(
    axes: Axes, drawn: npt.NDArray[np.float64], title: str, norm: Normalize, colors: str
) -> AxesImage:
    image = axes.imshow(
        drawn, aspect="auto", origin="lower", cmap=colors, norm=norm, interpolation="nearest"
    )
    axes.set(title=title, xlabel="token", ylabel="channel")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    return image


def _finish_named(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
        if scale == "log":
            _plain_ticks(axis)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.margins(x=0.12, y=0.12)
    axes.grid(alpha=0.25)


def _plain_ticks(axis: Axis, unit: str = "") -> None:
    """Ticks of a logarithmic axis as people write numbers, at 1, 2, 3 and 5."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}{unit}")
    axis.set_minor_locator(NullLocator())


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

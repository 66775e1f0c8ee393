"""Heads as pictures: a colour for each layer and head, or for each token and channel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from nsq_ref.arrays import as_real_array
from nsq_ref.dtypes import Float64
from nsq_ref.metrics import relative_error
from nsq_ref.plots.style import DIVERGING, SEQUENTIAL


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
    typical = np.median(relative_error(original, restored, axis=1))
    size = np.sqrt(np.mean(np.square(original), axis=1, keepdims=True))
    error = 100 * np.abs(original - restored) / np.where(size == 0, 1, size)
    drawn = np.clip(error, *limits).T
    return _token_channel_image(
        axes, drawn, f"{title}: error {typical:.1%}", LogNorm(*limits), SEQUENTIAL
    )


def _matrix(name: str, values: npt.ArrayLike, axes_names: str) -> Float64:
    matrix = as_real_array(name, values)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{name} has shape {list(matrix.shape)}; give [{axes_names}]")
    return matrix


def _token_channel_image(
    axes: Axes, drawn: Float64, title: str, norm: Normalize, colors: str
) -> AxesImage:
    image = axes.imshow(
        drawn, aspect="auto", origin="lower", cmap=colors, norm=norm, interpolation="nearest"
    )
    axes.set(title=title, xlabel="token", ylabel="channel")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    return image

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from nsq_ref import plots


def test_outlier_ratios_lie_where_their_layer_and_head_are() -> None:
    axes = Figure().subplots()
    ratios = np.array([[1.5, 3.0], [2.0, 9.0], [1.0, 4.0]])
    image = plots.outlier_ratio_map(axes, ratios, "keys")
    drawn = image.get_array()
    assert drawn is not None
    np.testing.assert_array_equal(drawn, ratios.T)
    assert image.get_clim() == (1, 9)
    assert axes.get_title("left") == "keys: at most 9.0 in layer 1, head 1"
    (frame,) = axes.lines
    assert (frame.get_xdata(), frame.get_ydata()) == ([1], [1])
    assert plots.outlier_ratio_map(axes, ratios, "keys", greatest=17.2).get_clim() == (1, 17.2)
    with pytest.raises(ValueError, match=r"ratios has shape \[3\]; give \[layers, heads\]"):
        plots.outlier_ratio_map(axes, [1.0, 2.0, 3.0], "keys")


def test_a_map_of_both_signs_parts_its_colors_at_zero() -> None:
    axes = Figure().subplots()
    signed = plots.token_channel_map(axes, [[-2, 1, 0], [4, 0, 0]], "codes")
    assert signed.get_clim() == (-4, 4)
    assert signed.get_cmap().name == plots.DIVERGING
    positive = plots.token_channel_map(axes, [[2, 1, 0], [4, 0, 0]], "sizes")
    assert positive.get_clim() == (0, 4)
    assert positive.get_cmap().name == plots.SEQUENTIAL
    drawn = positive.get_array()
    assert drawn is not None
    np.testing.assert_array_equal(drawn, [[2, 4], [1, 0], [0, 0]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("token", "channel")
    assert axes.get_ylim()[0] < axes.get_ylim()[1]  # channel 0 is at the bottom
    limited = plots.token_channel_map(axes, [[2, 1]], "codes", limits=(-7, 7))
    assert limited.get_clim() == (-7, 7)


def test_an_error_map_is_relative_to_each_token() -> None:
    axes = Figure().subplots()
    x = np.array([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]])
    x_hat = np.array([[3.0, 3.5], [300.0, 350.0], [0.0, 0.0]])
    image = plots.error_map(axes, x, x_hat, "tokens")
    rms = 5 / np.sqrt(2)
    drawn = image.get_array()
    assert drawn is not None
    np.testing.assert_allclose(drawn, [[1, 1, 1], [50 / rms, 50 / rms, 1]])  # none: the least color
    assert image.get_clim() == (1, 100)
    assert axes.get_title() == "tokens: error 10.0%"
    with pytest.raises(ValueError, match=r"x has shape \[3, 2\] and x_hat \[2, 2\]"):
        plots.error_map(axes, x, x_hat[:2], "tokens")

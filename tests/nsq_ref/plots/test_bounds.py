from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from nsq_ref import plots


def test_a_bound_that_does_not_hold_shows() -> None:
    axes = Figure().subplots()
    pairs = {
        "held": (np.array([1.0, 4.0, 2.0]), np.array([0.5, 3.0, 0.0])),
        "broken": (np.array([1.0]), np.array([1.25])),
    }
    plots.bound_against_measured(axes, pairs, "E2")
    held, broken, diagonal = axes.lines
    np.testing.assert_array_equal(held.get_xdata(), [1, 4])  # nothing measured, nothing drawn
    np.testing.assert_array_equal(held.get_ydata(), [0.5, 3])
    assert np.asarray(broken.get_ydata()) > np.asarray(broken.get_xdata())
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert held.get_marker() != broken.get_marker()
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "held: 0.750",
        "broken: 1.250",
    ]
    low, high = axes.get_xlim()
    assert axes.get_ylim() == (low, high)
    assert low == 1 / 100
    assert high > 4


@pytest.mark.parametrize(
    ("bound", "measured", "message"),
    [
        ([0.0], [1e-30], "'x': a bound is 0 where the measured is not"),
        ([1.0, 1.0], [1.0], r"'x': bound \[2\] and measured \[1\] must be of one shape"),
        ([1.0], [np.nan], "without NaN"),
    ],
)
def test_what_cannot_be_drawn_is_not_left_out(
    bound: list[float], measured: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plots.bound_against_measured(Figure().subplots(), {"x": (bound, measured)}, "E2")


def test_a_share_of_a_bound_goes_from_the_median_to_the_largest() -> None:
    axes = Figure().subplots()
    pairs = {
        "random": {"E1": ([1.0, 1.0, 2.0], [0.0, 0.4, 1.8]), "E2": ([4.0], [1.0])},
        "real": {"E1": ([1.0], [0.2]), "E2": ([0.0, 1.0, 1.0], [0.0, 0.5, 0.6])},
    }
    plots.share_of_bound(axes, pairs, "shares")
    spans = [np.asarray(line.get_xdata()).tolist() for line in axes.lines[:-1:2]]
    assert spans == [[0.4, 0.9], [0.25, 0.25], [0.2, 0.2], [0.5, 0.6]]
    rows = [float(np.asarray(line.get_ydata())[0]) for line in axes.lines[:-1:2]]
    assert np.rint(rows).tolist() == [0, 1, 0, 1]
    assert len(set(rows)) == 4
    assert [label.get_text() for label in axes.get_yticklabels()] == ["E1", "E2"]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["random", "real"]
    with pytest.raises(ValueError, match=r"'real, E1': a bound is 0"):
        plots.share_of_bound(axes, {"real": {"E1": ([0.0], [0.1])}}, "shares")


def test_an_estimate_is_drawn_with_its_band() -> None:
    axes = Figure().subplots()
    plots.estimate_against_measured(axes, [[1.0, 2.0]], [[1.1, 1.9]], "logits", within=0.5)
    points, diagonal = axes.lines
    np.testing.assert_array_equal(points.get_xydata(), [[1.0, 1.1], [2.0, 1.9]])
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    corners = axes.collections[0].get_paths()[0].vertices
    for x, y in np.asarray(corners):
        assert np.isclose(y, 1.5 * x) or np.isclose(y, x / 1.5)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from nsq_ref import plots

SMALL = st.integers(0, 4).map(float)


@given(st.lists(st.tuples(SMALL, SMALL), min_size=1, max_size=12))
def test_a_point_is_on_the_front_unless_another_beats_it(points: list[tuple[float, float]]) -> None:
    bits, error = zip(*points, strict=True)
    expected = [
        not any(b <= bit and e <= err and (b, e) != (bit, err) for b, e in points)
        for bit, err in points
    ]
    assert plots.pareto_front(bits, error).tolist() == expected


def crowded_points() -> dict[str, tuple[float, float]]:
    random = np.random.default_rng(0)
    return {
        f"scheme{i}": (float(4 + random.normal(0, 0.5)), float(10 ** random.normal(-1, 0.3)))
        for i in range(14)
    }


def test_names_cover_neither_each_other_nor_points() -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    points = crowded_points()
    plots.frontier(axes, points, "schemes", "error")
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == list(points)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.contains(*at) for at in axes.transData.transform(list(points.values())))
        assert axes.bbox.contains(*box.p0)
        assert axes.bbox.contains(*box.p1)


def test_a_long_name_at_the_edge_stays_inside() -> None:
    axes = Figure(figsize=(5, 3), layout="constrained").subplots()
    points = {"left": (0.0, 0.0), "a scheme with a very long name": (1.0, 1.0)}
    plots.named_points(axes, points, "", "one", "other")
    for text in axes.texts:
        box = Text.get_window_extent(text)
        assert axes.bbox.contains(*box.p0)
        assert axes.bbox.contains(*box.p1)


def test_the_front_is_drawn_through_the_points_on_it() -> None:
    axes = Figure().subplots()
    points = {"b": (4.5, 0.2), "a": (4.0, 0.1), "d": (5.0, 0.05), "c": (3.0, 0.3)}
    plots.frontier(axes, points, "schemes", "error", {"a": 0.01})
    line, front, beaten = axes.lines[:3]
    np.testing.assert_array_equal(line.get_xydata(), [[3.0, 0.3], [4.0, 0.1], [5.0, 0.05]])
    assert sorted(np.asarray(front.get_xdata()).tolist()) == [3.0, 4.0, 5.0]
    np.testing.assert_array_equal(beaten.get_xydata(), [[4.5, 0.2]])
    assert front.get_marker() != beaten.get_marker()


def test_a_logarithm_of_no_error_is_refused() -> None:
    axes = Figure().subplots()
    axes.set_yscale("log")
    with pytest.raises(ValueError, match=r"the error of 'b' is not positive; .*symlog"):
        plots.frontier(axes, {"a": (4, 0.1), "b": (5, 0.0)}, "schemes", "error")
    axes.set_yscale("symlog", linthresh=0.01)
    plots.frontier(axes, {"a": (4, 0.1), "b": (5, -0.001)}, "schemes", "error")
    with pytest.raises(ValueError, match="points is empty"):
        plots.frontier(axes, {}, "schemes", "error")


def test_named_points_have_their_names_and_bars() -> None:
    axes = Figure().subplots()
    points = {"a": (1.0, 2.0), "b": (3.0, 4.0)}
    plots.named_points(axes, points, "title", "one", "other", {"a": 0.5, "b": 0.25})
    assert {text.get_text(): text.xy for text in axes.texts} == points  # type: ignore[attr-defined]
    drawn = [container.lines for container in axes.containers]  # type: ignore[attr-defined]
    assert [tuple(line.get_xydata()[0]) for line, _, _ in drawn] == list(points.values())
    heights = [np.ptp(bars.get_segments()[0][:, 1]) for _, _, (bars,) in drawn]
    assert heights == [1.0, 0.5]

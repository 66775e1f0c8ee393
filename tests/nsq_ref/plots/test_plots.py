from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from nsq_ref import plots
from nsq_ref.codec import quantize
from nsq_ref.scheme import Scheme


def test_error_by_layer_draws_what_it_is_given() -> None:
    axes = Figure().subplots()
    errors = {"naive4": [0.1, 0.25], "nsep+pchan4": np.array([0.05, 0.5])}
    plots.error_by_layer(axes, errors, "keys")
    drawn = {str(line.get_label()): line.get_ydata() for line in axes.lines}
    assert {name: np.asarray(y).tolist() for name, y in drawn.items()} == {
        "naive4": [10, 25],
        "nsep+pchan4": [5, 50],
    }
    assert len({line.get_color() for line in axes.lines}) == 2
    assert len({line.get_marker() for line in axes.lines}) == 2


def test_histogram_counts_what_becomes_zero() -> None:
    axes = Figure().subplots()
    x = np.float32([[7, 0.4, 3, 0], [7, 0.4, 3, 0]])
    plots.direction_histogram(axes, x, ["naive4"], "two tokens")
    legend = axes.get_legend()
    assert legend is not None
    # 0.4 is under half of 7/7, the true 0 does not count: one of four.
    assert [text.get_text() for text in legend.get_texts()] == ["before", "naive4: 25% become 0"]
    with pytest.raises(ValueError, match=r"schemes='KIVI-K2V4' names a pair"):
        plots.direction_histogram(axes, x, ["KIVI-K2V4"], "two tokens")


def test_demo_figure_is_saved(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    figure = plots.demo_figure({"naive4": [0.1, 0.2]}, {"naive4": [0.3, 0.4]}, x, "keys", "model")
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        path = tmp_path / f"figure.{suffix}"
        figure.savefig(path)
        assert path.read_bytes().startswith(start)


def test_a_sweep_draws_each_scheme_with_its_bars() -> None:
    axes = Figure().subplots()
    results = {"naive4": [0.1, 0.9], "pchan4": np.array([0.2, 0.3])}
    errors = {"naive4": [0.01, 0.02], "pchan4": [0.03, 0.04]}
    plots.sweep(axes, [1, 8], results, "louder", errors)
    for container, (name, result) in zip(axes.containers, results.items(), strict=True):
        line, _, (bars,) = container.lines  # type: ignore[attr-defined]
        assert container.get_label() == name
        np.testing.assert_array_equal(line.get_xdata(), [1, 8])
        np.testing.assert_array_equal(line.get_ydata(), result)
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose((ends[:, 1] - ends[:, 0]) / 2, errors[name])


def test_a_scheme_keeps_its_style_from_one_sweep_to_the_next() -> None:
    def styles(names: list[str]) -> dict[str, tuple[object, object]]:
        axes = Figure().subplots()
        plots.sweep(axes, [0], {name: [1] for name in names}, "")
        return {
            name: (line.get_color(), line.get_marker())
            for name, line in zip(names, axes.lines, strict=True)
        }

    alone, together = styles(["pchan4"]), styles(["naive4", "nsep+pchan3", "pchan4", "streaming2"])
    assert alone["pchan4"] == together["pchan4"]
    assert len(set(together.values())) == 4
    # Two widths of one family, and names that are no schemes, must be told apart all the same.
    assert len(set(styles(["naive4", "naive3"]).values())) == 2
    assert len(set(styles(["naive4", "keys", "values"]).values())) == 3


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


def test_the_box_of_a_token_holds_all_that_decodes_as_it_does() -> None:
    axes = Figure().subplots()
    angle = np.random.default_rng(0).uniform(0, np.pi / 2, 40)
    tokens = np.stack([3 * np.cos(angle), 3 * np.sin(angle)], axis=1).astype(np.float32)
    scheme = Scheme(bits=3)
    codes = quantize(tokens, scheme).codes
    chosen = int(np.flatnonzero(np.all(codes == 2, axis=1))[0])
    plots.two_channels(axes, tokens, scheme, chosen)
    (box,) = axes.patches
    inside = box.get_path().transformed(box.get_patch_transform()).contains_points(tokens / 3)
    np.testing.assert_array_equal(inside, np.all(codes == codes[chosen], axis=1))
    vertices = np.asarray(box.get_path().transformed(box.get_patch_transform()).vertices)
    scale = quantize(tokens, scheme).scale[0].astype(float)
    np.testing.assert_allclose(vertices.min(axis=0), 1.5 * scale)
    np.testing.assert_allclose(vertices.max(axis=0), 2.5 * scale)
    by_label = {str(line.get_label()): line for line in axes.lines}
    directions = by_label["direction d, of length 1"].get_xydata()
    np.testing.assert_allclose(directions, tokens / 3, rtol=1e-6)
    decoded = by_label["decoded direction y"].get_xydata()
    np.testing.assert_allclose(decoded, codes * scale)


def test_an_estimate_is_drawn_with_its_band() -> None:
    axes = Figure().subplots()
    plots.estimate_against_measured(axes, [[1.0, 2.0]], [[1.1, 1.9]], "logits", within=0.5)
    points, diagonal = axes.lines
    np.testing.assert_array_equal(points.get_xydata(), [[1.0, 1.1], [2.0, 1.9]])
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    corners = axes.collections[0].get_paths()[0].vertices
    for x, y in np.asarray(corners):
        assert np.isclose(y, 1.5 * x) or np.isclose(y, x / 1.5)


def test_quantile_rows_span_the_middle_nine_tenths() -> None:
    axes = Figure().subplots()
    samples = {"first": np.arange(1, 102), "second": [5.0]}
    plots.quantile_rows(axes, samples, "title", "x")
    spans = [np.asarray(line.get_xdata()).tolist() for line in axes.lines[::2]]
    assert spans == [[6, 96], [5, 5]]
    assert [np.asarray(line.get_xdata()).tolist() for line in axes.lines[1::2]] == [[51], [5]]
    assert [text.get_text() for text in axes.texts] == ["51", "5"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first is at the top


def test_bars_stand_side_by_side_on_their_label() -> None:
    axes = Figure().subplots()
    plots.bars(axes, [0, 5, 10], {"keys": [1, 2, 3], "values": [4, 5, 6]}, "layers")
    drawn = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches]
    assert [height for _, height in drawn] == [1, 2, 3, 4, 5, 6]
    keys, values = np.array([middle for middle, _ in drawn]).reshape(2, 3)
    np.testing.assert_allclose((keys + values) / 2, [0, 1, 2])
    assert (keys < values).all()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "5", "10"]
    assert len({bar.get_facecolor() for bar in axes.patches}) == 2


def test_stacked_parts_begin_where_the_last_ended() -> None:
    axes = Figure().subplots()
    rows = {"a": {"codes": 4.0, "norms": 0.5}, "b": {"codes": 3.0, "sinks": 1.0}}
    plots.stacked_rows(axes, rows, "title", "bits")
    drawn = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert drawn == [(0, 4), (0, 3), (4, 0.5), (3, 0), (4.5, 0), (3, 1)]
    labels = [container.get_label() for container in axes.containers]
    assert labels == ["codes", "norms", "sinks"]


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

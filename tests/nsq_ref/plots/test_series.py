from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from nsq_ref import plots


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

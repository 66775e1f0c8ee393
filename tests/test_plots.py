from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
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


def test_histogram_counts_what_becomes_zero() -> None:
    axes = Figure().subplots()
    x = np.float32([[7, 0.4, 3, 0], [7, 0.4, 3, 0]])
    plots.direction_histogram(axes, x, ["naive4"], "two tokens")
    legend = axes.get_legend()
    assert legend is not None
    # 0.4 is under half of 7/7, the true 0 does not count: one of four.
    assert [text.get_text() for text in legend.get_texts()] == ["before", "naive4: 25% become 0"]
    with pytest.raises(ValueError, match=r"'KIVI-K2V4' names two schemes"):
        plots.direction_histogram(axes, x, ["KIVI-K2V4"], "two tokens")


def test_demo_figure_is_saved(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    figure = plots.demo_figure({"naive4": [0.1, 0.2]}, {"naive4": [0.3, 0.4]}, x, "keys", "model")
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        path = tmp_path / f"figure.{suffix}"
        figure.savefig(path)
        assert path.read_bytes().startswith(start)

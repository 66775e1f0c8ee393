from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from nsq_ref import plots
from nsq_ref.codec import quantize
from nsq_ref.scheme import Scheme


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


def test_demo_figure_is_saved(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    figure = plots.demo_figure({"naive4": [0.1, 0.2]}, {"naive4": [0.3, 0.4]}, x, "keys", "model")
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        path = tmp_path / f"figure.{suffix}"
        figure.savefig(path)
        assert path.read_bytes().startswith(start)

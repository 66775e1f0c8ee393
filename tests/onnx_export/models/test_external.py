"""Weights beyond the size that a file of ONNX can have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from onnx_export.models.nodes import Graph

BEYOND = 5 << 30  # bytes: more than 32 bits count


def test_weights_may_lie_far_into_their_file(tmp_path: Path) -> None:
    """A sparse file, of which nobody reads what is not there."""
    graph = Graph("weights.bin")
    near, far = (
        np.random.default_rng(i).standard_normal((3, 4)).astype(np.float32) for i in (0, 1)
    )
    with (tmp_path / "weights.bin").open("wb") as graph.stream:
        graph.weight("near", near)
        graph.stream.seek(BEYOND)
        graph.weight_parts("far", far.shape, far.dtype, iter([far[:1], far[1:]]))
    graph.output("sum", 3, 4)
    graph.add("Add", "near", "far", name="sum")
    path = tmp_path / "model.onnx"
    path.write_bytes(graph.model("sum", {}).SerializeToString())
    assert (tmp_path / "weights.bin").stat().st_size == BEYOND + far.nbytes
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert (session.run(None, {})[0] == near + far).all()


def test_parts_that_are_not_all_are_refused(tmp_path: Path) -> None:
    graph = Graph("weights.bin")
    with (
        (tmp_path / "weights.bin").open("wb") as graph.stream,
        pytest.raises(ValueError, match="parts of 'w' have 8 bytes together"),
    ):
        graph.weight_parts("w", (3,), np.dtype(np.float32), iter([np.zeros(2)]))

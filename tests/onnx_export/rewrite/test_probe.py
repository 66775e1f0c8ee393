"""A probe says of every value what onnxruntime has in it, for inputs of the same sizes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from onnx_export.rewrite.graph import Graph
from onnx_export.rewrite.probe import axes_of, probes
from tests.support.exports import EXPORTS, Floats, Text

NAMES = ["dynamo-llama-18-sdpa", "mobius-gemma3-default", "optimum-gemma2-18", "optimum-gpt_oss-18"]


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_onnxruntime(name: str) -> None:
    path = EXPORTS / f"{name}.onnx"
    graph = Graph(ir.load(path))
    made = [one for node in graph.model.graph for one in node.outputs if one.name]
    model = onnx.load(path)
    present = {one.name for one in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=one.name) for one in made if one.name not in present
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    running = onnxruntime.InferenceSession(model.SerializeToString(), options)
    contents, untold = 0, set[str]()
    for probe in probes(graph):
        text = Text([0] * probe.batch)
        floats = Floats(path, probe.batch)
        if probe.past:
            floats.step(text.step(probe.past))
        feeds = {key: value for key, value in text.step(probe.new).items() if key in floats.given}
        names = [one.name or "" for one in made]
        truth = dict(zip(names, running.run(names, feeds | floats.cache), strict=True))
        for value in made:
            seen, want = probe.value(value), truth[value.name or ""]
            if seen is None:  # second outputs, with axes whose names are no input's
                untold.add(value.producer().op_type)  # type: ignore[union-attr]
                continue
            assert seen.shape == want.shape, value.name
            assert seen.array.dtype == want.dtype, value.name
            if seen.known:
                contents += 1
                np.testing.assert_allclose(seen.array, want, rtol=1e-6, err_msg=value.name or "")
    assert contents > 30
    assert untold <= {"Attention", "SkipSimplifiedLayerNormalization"}


def test_axes_have_names() -> None:
    graph = Graph(ir.load(EXPORTS / "dynamo-llama-18-eager.onnx"))
    (product, *_) = [
        node.inputs[0].producer().inputs[0]  # type: ignore[union-attr]
        for node in graph.model.graph
        if node.op_type == "Softmax" and node.inputs[0] is not None
    ]
    assert axes_of(graph, product) == ["batch", 4, "new", "total"]


def test_what_depends_on_content_is_not_told() -> None:
    """A shape of the numbers in a mask is none that a probe can know."""
    x = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("ReduceSum", ["attention_mask"], ["sum"], keepdims=0),
        onnx.helper.make_node("Range", ["zero", "sum", "one"], ["range"]),
        onnx.helper.make_node("Shape", ["attention_mask"], ["shape"]),
    ]
    kind = onnx.TensorProto.INT64
    numbers = [
        onnx.numpy_helper.from_array(np.int64(at), key) for key, at in (("zero", 0), ("one", 1))
    ]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "counts",
            [x("attention_mask", kind, ["batch", "total"])],
            [x("range", kind, None), x("shape", kind, [2])],
            numbers,
        )
    )
    graph = Graph(ir.from_proto(proto))
    counted, shape = graph.model.graph.outputs
    for probe in probes(graph):
        assert probe.value(counted) is None
        told = probe.value(shape)
        assert told is not None
        assert told.known
        assert told.array.tolist() == [probe.batch, probe.total]

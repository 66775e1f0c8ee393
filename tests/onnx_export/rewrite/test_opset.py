"""Opset 24, where asked for: the same model, its function of Attention another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import defs, helper

import nsq_ref as nsq
from onnx_export.operators.nodes import all_nodes
from onnx_export.rewrite import rewrite
from onnx_export.rewrite.opset import FURTHER_DTYPES, SAME_MEANING
from tests.support.exported import Decoder, Graph, gqa_model, save
from tests.support.exports import EXPORTS, STEPS, Quantized, Text

SEALING = replace(nsq.Scheme.named("streaming4"), block_size=4)
SAMPLE = ("dynamo-llama-18-sdpa", "genai-llama-cpu-int4", "dynamo-llama-23-sdpa")


@pytest.mark.parametrize("name", SAMPLE)
def test_all_bits_are_those_of_the_older_opset(name: str, tmp_path: Path) -> None:
    """In the library, logits and caches: the rest of the model means the same."""
    runs = []
    for number, opset in enumerate((None, 24)):
        path = tmp_path / f"{number}.onnx"
        report = rewrite(
            EXPORTS / f"{name}.onnx", path, key=SEALING, value="streaming3", opset=opset
        )
        assert report.complete
        runs.append(Quantized(path, 1, native=True))
    assert report.opset[1] == 24
    given = Text([0])
    for new in STEPS:
        feeds = given.step(new)
        older, newer = (one.step(feeds) for one in runs)
        assert older.tobytes() == newer.tobytes()
        for part, array in runs[0].cache.items():
            assert array.tobytes() == runs[1].cache[part].tobytes(), part


def test_the_function_scatters_without_the_library(tmp_path: Path) -> None:
    """The older one and the newer one are near each other, as the order of sums differs."""
    runs = []
    for number, opset in enumerate((21, 24)):
        path = tmp_path / f"{number}.onnx"
        rewrite(
            EXPORTS / "genai-llama-cpu-fp32.onnx", path, key=SEALING, value=SEALING, opset=opset
        )
        names = {node.op_type for one in onnx.load(path).functions for node in all_nodes(one.node)}
        assert ("TensorScatter" in names) == (opset == 24)
        runs.append(Quantized(path, 1, native=False))
    given = Text([0])
    for new in (6, 1):
        feeds = given.step(new)
        older, newer = (one.step(feeds) for one in runs)
        np.testing.assert_allclose(newer, older, rtol=0, atol=1e-2)


def pooled(graph: Graph) -> None:
    at = graph.weight("three.axes", 1, 1, 8)
    graph.node("MaxPool", [at], "pooled", kernel_shape=[2])


def test_what_may_mean_something_else_is_refused(tmp_path: Path) -> None:
    path, out = save(gqa_model(Decoder(), pooled), tmp_path / "model.onnx"), tmp_path / "out.onnx"
    with pytest.raises(ValueError, match=r"opset 21, in which MaxPool .* else than in 24; convert"):
        rewrite(path, out, opset=24)
    assert not out.exists()
    assert rewrite(path, out).complete


def test_attention_that_stays_is_refused(tmp_path: Path) -> None:
    """Versions 23 and 24 of ONNX's differ; of all that are replaced it does not matter."""
    path, out = EXPORTS / "dynamo-llama-23-sdpa.onnx", tmp_path / "out.onnx"
    with pytest.raises(ValueError, match=r"opset 23, in which Attention .* else than in 24"):
        rewrite(path, out, opset=24, policy={"layers": {"0": None}})
    assert not out.exists()


@pytest.mark.parametrize(
    ("opset", "error"), [(20, ValueError), (25, ValueError), (24.0, TypeError), (True, TypeError)]
)
def test_opsets_that_there_are_not(opset: Any, error: type[Exception], tmp_path: Path) -> None:
    path = save(gqa_model(Decoder()), tmp_path / "model.onnx")
    with pytest.raises(error, match="opset"):
        rewrite(path, tmp_path / "out.onnx", opset=opset)


def ends(schema: defs.OpSchema) -> list[tuple[str, str]]:
    return [(one.name, str(one.option)) for one in (*schema.inputs, *schema.outputs)]


@pytest.mark.parametrize("name", sorted(FURTHER_DTYPES | SAME_MEANING))
def test_newer_versions_say_the_same(name: str) -> None:
    """ONNX's own schemas: ends and attributes are alike; new attributes have defaults."""
    old, new = (defs.get_schema(name, max_inclusive_version=one, domain="") for one in (21, 24))
    assert ends(old) == ends(new)
    for attribute, described in old.attributes.items():
        assert new.attributes[attribute].type == described.type
        assert new.attributes[attribute].default_value == described.default_value
    for attribute in set(new.attributes) - set(old.attributes):
        assert not new.attributes[attribute].required
    if name in FURTHER_DTYPES:
        assert old.since_version < new.since_version
        assert set(new.attributes) == set(old.attributes)
        assert new.doc.split() == old.doc.split()


def test_a_function_of_the_model_is_raised_with_it(tmp_path: Path) -> None:
    def called(graph: Graph) -> None:
        body = helper.make_function(
            "local", "Double", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])],
            [helper.make_opsetid("", 21)],
        )  # fmt: skip
        graph.functions.append(body)

    path = save(gqa_model(Decoder(), called), tmp_path / "model.onnx")
    assert rewrite(path, tmp_path / "out.onnx", opset=24).opset == (21, 24)
    for function in onnx.load(tmp_path / "out.onnx").functions:
        assert [one.version for one in function.opset_import if one.domain == ""] == [24]

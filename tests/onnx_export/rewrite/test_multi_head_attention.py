"""MultiHeadAttention: the original in onnxruntime is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnx_export.rewrite import rewrite
from tests.support.exported import Decoder, Graph, Original, Rewritten, mha_model, save

CAUSAL = (("unidirectional", 1),)
PLAIN = Decoder(kv_heads=4, rotary=0, attributes=CAUSAL)
VARIANTS = {
    "causal": PLAIN,
    "not causal": Decoder(kv_heads=4, rotary=0),
    "bias": Decoder(kv_heads=4, rotary=0, bias=True),
    "bias, causal, scale": Decoder(
        kv_heads=4, rotary=0, bias=True, attributes=(*CAUSAL, ("scale", 0.3))
    ),
    "size of heads by weights": Decoder(
        kv_heads=4, rotary=0, symbolic=True, attributes=(*CAUSAL, ("mask_filter_value", -1e5))
    ),
    "half": Decoder(kv_heads=4, rotary=0, dtype="float16", bias=True, attributes=CAUSAL),
}


@pytest.mark.parametrize("counted", [True, False], ids=["mask", "past_lengths"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_the_original_ones(name: str, counted: bool, tmp_path: Path) -> None:
    config = VARIANTS[name]
    model = mha_model(config)
    if not counted:  # the mask, of whose length nobody says what it counts
        model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "n"
    path, out = save(model, tmp_path / "model.onnx"), tmp_path / "out.onnx"
    report = rewrite(path, out)
    assert report.complete
    assert report.inputs == (() if counted else ("past_lengths",))
    original, rewritten = Original(path, 2), Rewritten(out, 2, native=True)
    assert not rewritten.layout.right_padding
    rng, length = np.random.default_rng(6), 0
    for width in (6, 1, 4, 1):
        length += width
        feeds: dict[str, Any] = {
            "input_ids": rng.integers(0, 17, (2, width)),
            "attention_mask": np.ones((2, length), np.int64),
        }
        if config.bias:
            drawn = rng.standard_normal((2, 1, width, length))
            # -infinity hides a token; each query sees its own.
            hidden = (rng.random(drawn.shape) < 0.2) & (np.arange(length) < length - width)
            feeds["bias"] = np.where(hidden, -np.inf, drawn).astype(config.dtype)
        want, got = original.step(feeds), rewritten.step(feeds)
        atol = 1e-5 if config.dtype == "float32" else 4e-3
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("of_queries", [False, True], ids=["of rows", "of queries"])
def test_biases_of_projections_and_padding(of_queries: bool, tmp_path: Path) -> None:
    """As what is fused has them: added to queries, keys and values, and counted out of scores."""

    def change(graph: Graph) -> None:
        drawn = np.random.default_rng(7).standard_normal(3 * PLAIN.hidden)
        bias = graph.array("of.projections", drawn.astype(np.float32))
        padding = graph.node("Cast", ["attention_mask"], "padding", to=TensorProto.INT32)
        if of_queries:
            one = graph.array("first.axis", np.array([1], np.int64))
            shape = graph.node("Shape", ["input_ids"], "ids.shape", start=1, end=2)
            sizes = graph.node("Concat", [one, shape, one], "sizes", axis=0)
            padding = graph.node("Unsqueeze", [padding, one], "padding.row")
            padding = graph.node("Expand", [padding, sizes], "padding.rows")
        made = [one for one in graph.nodes if one.output[0].startswith(("padding", "ids", "sizes"))]
        graph.nodes[:] = made + [one for one in graph.nodes if one not in made]
        for node in graph.nodes:
            if node.op_type == "MultiHeadAttention":
                node.input[3:5] = [bias, padding]

    path, out = save(mha_model(PLAIN, change), tmp_path / "model.onnx"), tmp_path / "out.onnx"
    assert rewrite(path, out).complete
    original, rewritten = Original(path, 3), Rewritten(out, 3, native=True)
    rng, length, padding = np.random.default_rng(8), 0, np.array([0, 2, 5])
    for width in (6, 1, 1):
        length += width
        real = np.arange(length) >= padding[:, None]
        feeds = {
            "input_ids": rng.integers(0, 17, (3, width)), "attention_mask": real.astype(np.int64),
        }  # fmt: skip
        seen = real[:, length - width :]
        want, got = original.step(feeds)[seen], rewritten.step(feeds)[seen]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("place", "shape", "reason"),
    [
        (4, (2,), "key_padding_mask more is not one number for every token, past and new; export"),
        (8, (1,), "past_sequence_length is given; export the model with a cache that grows"),
        (9, (2, 1, 8), "cache_indirection is given; export"),
        (10, (1,), "it has 11 inputs; 10 are known"),
    ],
)
def test_inputs_without_a_place(
    place: int, shape: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    def change(graph: Graph) -> None:
        name = graph.array("more", np.ones(shape, np.int32))
        for node in graph.nodes:
            if node.op_type == "MultiHeadAttention":
                node.input.extend([""] * (place + 1 - len(node.input)))
                node.input[place] = name

    assert refused(change, tmp_path).startswith(reason)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"mask_filter_value": -5.0}, "mask_filter_value is so near to 0"),
        ({"of_tomorrow": 1}, "attribute of_tomorrow is unknown"),
    ],
)
def test_attributes_without_a_place(
    attributes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    def change(graph: Graph) -> None:
        for node in graph.nodes:
            if node.op_type == "MultiHeadAttention":
                node.attribute.extend(helper.make_attribute(*one) for one in attributes.items())

    assert refused(change, tmp_path).startswith(reason)


def test_packed_queries(tmp_path: Path) -> None:
    def change(graph: Graph) -> None:
        for node in graph.nodes:
            if node.op_type == "MultiHeadAttention":
                node.input[1] = node.input[2] = ""

    assert refused(change, tmp_path).startswith("queries, keys and values are packed in one")


def test_attention_without_a_cache_is_none(tmp_path: Path) -> None:
    """Of an encoder, say; the layer after it has a cache."""

    def change(graph: Graph) -> None:
        first = next(one for one in graph.nodes if one.op_type == "MultiHeadAttention")
        del first.input[6:]
        del first.output[1:]
        for field in (graph.inputs, graph.outputs):
            field[:] = [one for one in field if ".0." not in one.name]

    path = save(mha_model(PLAIN, change), tmp_path / "model.onnx")
    report = rewrite(path, tmp_path / "out.onnx")
    assert [one.layer for one in report.attentions] == [1]


def refused(change: Any, folder: Path) -> str:
    path = save(mha_model(PLAIN, change), folder / "model.onnx")
    report = rewrite(path, folder / "out.onnx")
    assert (report.rewritten, report.complete) == (0, False)
    assert not (folder / "out.onnx").exists()
    return report.attentions[0].reason or ""

"""Exports with one thing changed: rewritten and right, or refused by name. Never wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_export.rewrite import rewrite
from tests.support.exported import save
from tests.support.exports import EXPORTS, Floats, Quantized, Text

Change = Callable[["Layer"], None]
CLOSE = 1e-4


class Layer:
    """The nodes of the last layer's attention, to change."""

    def __init__(self, name: str) -> None:
        self.model = onnx.load(EXPORTS / f"{name}.onnx")
        self.graph = self.model.graph

    def last(self, operator: str) -> onnx.NodeProto:
        return [one for one in self.graph.node if one.op_type == operator][-1]

    def maker(self, name: str) -> onnx.NodeProto:
        return next(one for one in self.graph.node if name in one.output)

    def users(self, name: str) -> list[onnx.NodeProto]:
        return [one for one in self.graph.node if name in one.input]

    def array(self, name: str, value: Any) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def insert(
        self, before: onnx.NodeProto, index: int, operator: str, *others: str, first: bool = True,
        **attributes: Any,
    ) -> str:  # fmt: skip
        """Put a node between an input of another and what made it."""
        given = before.input[index]
        inputs = [given, *others] if first else [*others, given]
        made = f"inserted_{operator}_{len(self.graph.node)}"
        node = helper.make_node(operator, inputs, [made], name=made, **attributes)
        self.graph.node.insert(list(self.graph.node).index(before), node)
        before.input[index] = made
        return made

    def output(self, name: str, kind: int = TensorProto.FLOAT) -> None:
        self.graph.output.append(helper.make_tensor_value_info(name, kind, None))

    @property
    def softmax(self) -> onnx.NodeProto:
        return self.last("Softmax")

    @property
    def add(self) -> onnx.NodeProto:
        return self.maker(self.softmax.input[0])

    @property
    def values(self) -> onnx.NodeProto:
        return self.users(self.softmax.output[0])[-1]


# --- of MatMul, Softmax, MatMul ------------------------------------------------------------------


def scaled_once_more(layer: Layer) -> None:
    layer.insert(layer.add, 0, "Mul", layer.array("half", np.float32(0.5)))


def scaled_on_the_left(layer: Layer) -> None:
    layer.insert(layer.add, 0, "Mul", layer.array("half", np.float32([0.5])), first=False)


def divided(layer: Layer) -> None:
    layer.insert(layer.add, 0, "Div", layer.array("two", np.float32(2)))


def softcapped(layer: Layer) -> None:
    cap = layer.array("cap", np.float32(1.5))
    layer.insert(layer.add, 0, "Div", cap)
    layer.insert(layer.add, 0, "Tanh")
    layer.insert(layer.add, 0, "Mul", cap)


def fused(layer: Layer) -> None:
    """As onnxruntime's optimizers write it."""
    product = layer.maker(layer.maker(layer.add.input[0]).input[0])
    transpose = layer.maker(product.input[1])
    product.op_type, product.domain = "FusedMatMul", "com.microsoft"
    product.input[1] = transpose.input[0]
    given = {"transB": 1, "alpha": 0.5}
    product.attribute.extend(helper.make_attribute(*one) for one in given.items())
    layer.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def fused_with_turned_queries(layer: Layer) -> None:
    fused(layer)
    product = layer.last("FusedMatMul")
    product.attribute.append(helper.make_attribute("transA", 1))


def sliced_to_all(layer: Layer) -> None:
    bounds = [layer.array(name, np.array([at])) for name, at in (("a", 0), ("b", 1 << 62))]
    layer.insert(layer.values, 1, "Slice", *bounds, layer.array("axis", np.array([2])))


def masked_by_where(layer: Layer) -> None:
    add = layer.add
    mask = add.input[1]
    node = helper.make_node("Greater", [mask, layer.array("one", np.float32(-1))], ["is_seen"])
    layer.graph.node.insert(list(layer.graph.node).index(add), node)
    add.op_type = "Where"
    add.input[:] = ["is_seen", add.input[0], layer.array("low", np.float32(-1e9))]


def at_other_positions(layer: Layer) -> None:
    user = layer.users("position_ids")[0]
    layer.insert(user, list(user.input).index("position_ids"), "Add", layer.array("3", np.int64(3)))


def scaled_after_the_mask(layer: Layer) -> None:
    layer.insert(layer.softmax, 0, "Mul", layer.array("half", np.float32(0.5)))


def masked_twice(layer: Layer) -> None:
    layer.insert(layer.softmax, 0, "Add", layer.add.input[1])


def biased_before_the_scale(layer: Layer) -> None:
    """By the place of a token among those that are seen."""
    made = layer.insert(layer.softmax, 0, "Add", layer.add.input[1])
    node = layer.maker(made)
    layer.insert(node, 1, "Equal", layer.array("nothing", np.float32(0)))
    layer.insert(node, 1, "Cast", to=TensorProto.FLOAT)
    layer.insert(node, 1, "CumSum", layer.array("axis_of_tokens", np.array(3)))
    layer.insert(layer.softmax, 0, "Mul", layer.array("half", np.float32(0.5)))


def masked_by_a_column(layer: Layer) -> None:
    layer.insert(layer.softmax, 0, "Add", layer.array("more", np.float32([[0.5]])))


def masked_before_a_softcap(layer: Layer) -> None:
    cap = layer.array("cap", np.float32(1.5))
    layer.insert(layer.softmax, 0, "Div", cap)
    layer.insert(layer.softmax, 0, "Tanh")
    layer.insert(layer.softmax, 0, "Mul", cap)


def masked_by_where_of_the_hidden(layer: Layer) -> None:
    masked_by_where(layer)
    node = layer.add
    hidden = helper.make_node("Not", [node.input[0]], ["is_hidden"])
    layer.graph.node.insert(list(layer.graph.node).index(node), hidden)
    node.input[:] = ["is_hidden", node.input[2], node.input[1]]


def joined_by_sinks(layer: Layer) -> None:
    """As gpt-oss writes it."""
    softmax, values = layer.softmax, layer.values
    infos = layer.graph.value_info
    infos.remove(next(one for one in infos if one.name == softmax.output[0]))
    shape = layer.insert(softmax, 0, "Shape", start=0, end=3)
    scores = layer.maker(shape).input[0]
    one = layer.array("one_column", np.array([1]))
    sizes = layer.insert(softmax, 0, "Concat", one, axis=0)
    sinks = layer.array("sinks", np.float32([0.5, -1, 2, 0]).reshape(1, 4, 1, 1))
    softmax.input[0] = sinks
    layer.insert(softmax, 0, "Expand", sizes)
    layer.insert(softmax, 0, "Concat", scores, first=False, axis=-1)
    top = layer.insert(softmax, 0, "ReduceMax", layer.array("last", np.array([-1])), keepdims=1)
    softmax.input[0] = layer.maker(top).input[0]
    layer.insert(softmax, 0, "Sub", top)
    bounds = [layer.array(name, np.array([at])) for name, at in (("s", 0), ("e", -1), ("x", 3))]
    layer.insert(values, 0, "Slice", *bounds)


def joined_by_sinks_that_are_kept(layer: Layer) -> None:
    """The first column is dropped, which is a token."""
    joined_by_sinks(layer)
    for initializer, at in (("s", 1), ("e", 1 << 62)):
        one = next(one for one in layer.graph.initializer if one.name == initializer)
        one.CopyFrom(numpy_helper.from_array(np.array([at]), initializer))


def cast_before_the_present(layer: Layer) -> None:
    """To the dtype that it has."""
    concat = layer.maker("present.1.key")
    concat.output[0] = "all_keys"
    for node in layer.users("present.1.key"):
        node.input[:] = ["all_keys" if one == "present.1.key" else one for one in node.input]
    cast = helper.make_node("Cast", ["all_keys"], ["present.1.key"], to=TensorProto.FLOAT)
    layer.graph.node.insert(list(layer.graph.node).index(concat) + 1, cast)


def hidden_with_little(layer: Layer) -> None:
    masked_by_where(layer)
    low = next(one for one in layer.graph.initializer if one.name == "low")
    low.CopyFrom(numpy_helper.from_array(np.float32(-1), "low"))


def scores_squashed(layer: Layer) -> None:
    layer.insert(layer.add, 0, "Tanh")


def capped_otherwise(layer: Layer) -> None:
    layer.insert(layer.add, 0, "Div", layer.array("cap", np.float32(1.5)))
    layer.insert(layer.add, 0, "Tanh")
    layer.insert(layer.add, 0, "Mul", layer.array("other", np.float32(1.25)))


def values_scaled(layer: Layer) -> None:
    layer.insert(layer.values, 1, "Mul", layer.array("half", np.float32(0.5)))


def scaled_by_lengths(layer: Layer) -> None:
    """By 1 / tokens, which is no constant."""
    shape = layer.insert(layer.add, 0, "Shape", start=-1)
    scores = layer.maker(shape).input[0]
    layer.add.input[0] = scores
    layer.insert(layer.softmax, 0, "Identity")
    cast = helper.make_node("Cast", [shape], ["tokens"], to=TensorProto.FLOAT)
    layer.graph.node.insert(list(layer.graph.node).index(layer.maker(shape)) + 1, cast)
    add = next(one for one in layer.graph.node if one.op_type == "Add" and scores in one.input)
    layer.insert(add, 0, "Div", "tokens")


def softmax_over_queries(layer: Layer) -> None:
    next(one for one in layer.softmax.attribute if one.name == "axis").i = 2


def heads_in_another_order(layer: Layer) -> None:
    """Heads 0, 1, 0, 1 where they were 0, 0, 1, 1."""
    expand = layer.maker(layer.maker(layer.maker(layer.values.input[1]).input[0]).output[0])
    layer.maker(expand.input[0]).input[1] = layer.array("one", np.array([1]))


def past_behind_the_new(layer: Layer) -> None:
    concat = layer.maker("present.1.value")
    concat.input[:] = list(concat.input)[::-1]


def more_than_the_new(layer: Layer) -> None:
    """Each new key is in the cache twice."""
    concat = layer.maker("present.1.key")
    layer.insert(concat, 1, "Concat", concat.input[1], axis=2)


def weights_given_out(layer: Layer) -> None:
    layer.output(layer.softmax.output[0])


def present_summed(layer: Layer) -> None:
    layer.graph.node.append(
        helper.make_node("ReduceSum", ["present.1.key"], ["sum"], name="sums", keepdims=0)
    )
    layer.output("sum")


def values_of_the_other_layer(layer: Layer) -> None:
    unsqueeze = next(one for one in layer.users("present.1.value") if one.op_type == "Unsqueeze")
    unsqueeze.input[0] = "present.0.value"


def kept_with_a_long_window(layer: Layer) -> None:
    """Only the last 4096 keys are kept, which a short text does not show."""
    bounds = [layer.array(name, np.array([at])) for name, at in (("a", -4096), ("b", 1 << 62))]
    axis = layer.array("axis", np.array([2]))
    layer.insert(layer.users("present.1.key")[0], 0, "Slice", *bounds, axis)


def kept_with_a_window(layer: Layer) -> None:
    """Only the last 4 keys are kept, and the mask is cut to them."""
    bounds = [layer.array(name, np.array([at])) for name, at in (("a", -4), ("b", 1 << 62))]
    axis = layer.array("axis", np.array([2]))
    layer.insert(layer.users("present.1.key")[0], 0, "Slice", *bounds, axis)


SOFTMAX: list[tuple[Change, str | None]] = [
    (scaled_once_more, None),
    (scaled_on_the_left, None),
    (divided, None),
    (fused, None),
    (fused_with_turned_queries, "has transA"),
    (softcapped, None),
    (sliced_to_all, None),
    (masked_by_where, None),
    (at_other_positions, None),
    (scaled_after_the_mask, None),
    (masked_twice, None),
    (biased_before_the_scale, None),
    (masked_by_a_column, "its mask more has shape (1, 1)"),
    (masked_before_a_softcap, "masks scores before their softcap"),
    (masked_by_where_of_the_hidden, None),
    (joined_by_sinks, None),
    (joined_by_sinks_that_are_kept, "its weights are multiplied with no values"),
    (cast_before_the_present, None),
    (hidden_with_little, "in its scores is not understood"),
    (scores_squashed, "in its scores is not understood"),
    (capped_otherwise, "is no softcap"),
    (values_scaled, "its values are scaled by 0.5"),
    (scaled_by_lengths, "in its scores is not understood"),
    (softmax_over_queries, "its Softmax is not along the last axis"),
    (heads_in_another_order, "other elements, or others in another place"),
    (past_behind_the_new, "which is not understood"),
    (more_than_the_new, "tokens where 5 are new"),
    (weights_given_out, "of its cache is read by"),
    (present_summed, "of its cache is read by ReduceSum sums too"),
    (values_of_the_other_layer, "is the cache of"),
    (kept_with_a_window, "cannot be followed"),
    (kept_with_a_long_window, "keeps a window of its cache past_key_values.1.key"),
]


@pytest.mark.parametrize(
    ("change", "reason"), SOFTMAX, ids=lambda one: getattr(one, "__name__", "")
)
def test_softmax(change: Change, reason: str | None, tmp_path: Path) -> None:
    check("dynamo-llama-18-eager", change, reason, tmp_path)


def check(name: str, change: Change, reason: str | None, folder: Path) -> None:
    """The last layer is rewritten and right, or refused with a reason."""
    layer = Layer(name)
    change(layer)
    path = save(layer.model, folder / "model.onnx")
    report = rewrite(path, folder / "out.onnx")
    if reason is None:
        assert report.complete, [one.reason for one in report.attentions]
        same(path, folder / "out.onnx")
    else:
        refused = [one.reason for one in report.attentions if one.schemes is None]
        assert any(reason in (one or "") for one in refused), refused


def same(original: Path, out: Path) -> None:
    static = "write_indices" in {one.name for one in onnx.load(original).graph.input}
    text = Text([0, 0] if static else [0, 2])
    want_of, got_of = Floats(original, 2), Quantized(out, 2, native=True)
    for new in (5, 1, 2):
        feeds = text.step(new)
        seen = text.real(new)
        want, got = want_of.step(feeds)[seen], got_of.step(feeds)[seen]
        np.testing.assert_allclose(got, want, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("layout", ["BNDS", "BSND"])
def test_caches_of_other_layouts(layout: str, tmp_path: Path) -> None:
    """Keys that are kept transposed, or token by token: the logits of the model as it was."""
    name = "dynamo-llama-18-eager"
    layer = Layer(name)
    perm = {"BNDS": [0, 1, 3, 2], "BSND": [0, 2, 1, 3]}[layout]
    for side in ("key", "value"):
        concat = layer.maker(f"present.1.{side}")
        layer.insert(concat, 1, "Transpose", perm=perm)
        next(one for one in concat.attribute if one.name == "axis").i = layout.index("S")
        users = [one for one in layer.users(concat.output[0]) if one.op_type == "Unsqueeze"]
        assert len(users) == 1
        layer.insert(users[0], 0, "Transpose", perm=perm)
        for node in layer.users(f"past_key_values.1.{side}"):
            if node.op_type == "Shape":
                for one in node.attribute:
                    if one.i >= 2:  # the past is along another axis now
                        one.i += layout.index("S") - 2
        for infos in (layer.graph.input, layer.graph.output, layer.graph.value_info):
            for info in infos:
                if info.name.endswith(f".1.{side}") and len(info.type.tensor_type.shape.dim) == 4:
                    axes = info.type.tensor_type.shape.dim
                    turned = [type(axes[0]).FromString(axes[at].SerializeToString()) for at in perm]
                    del axes[:]
                    axes.extend(turned)
    path = save(layer.model, tmp_path / "model.onnx")
    report = rewrite(path, tmp_path / "out.onnx")
    assert report.complete, [one.reason for one in report.attentions]
    same(EXPORTS / f"{name}.onnx", tmp_path / "out.onnx")


# --- of Attention --------------------------------------------------------------------------------


def set_attribute(layer: Layer, name: str, value: Any) -> None:
    node = layer.last("Attention")
    kept = [one for one in node.attribute if one.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def with_a_softcap(layer: Layer) -> None:
    set_attribute(layer, "softcap", 1.5)


def with_a_scale(layer: Layer) -> None:
    set_attribute(layer, "scale", 0.1)


def without_causality(layer: Layer) -> None:
    set_attribute(layer, "is_causal", 0)


def with_a_float_mask(layer: Layer) -> None:
    node = layer.last("Attention")
    cast = layer.insert(node, 3, "Cast", to=TensorProto.FLOAT)
    node.input[3] = cast
    layer.insert(node, 3, "Mul", layer.array("many", np.float32(3)))


def without_a_scale(layer: Layer) -> None:
    node = layer.last("Attention")
    kept = [one for one in node.attribute if one.name != "scale"]
    del node.attribute[:]
    node.attribute.extend(kept)


def scores_given_out(layer: Layer) -> None:
    layer.last("Attention").output.append("scores")
    layer.output("scores")


def of_tomorrow(layer: Layer) -> None:
    set_attribute(layer, "of_tomorrow", 1)


def mask_of_one_token(layer: Layer) -> None:
    layer.last("Attention").input[3] = layer.array("all", np.ones((1, 1, 1, 1), np.bool_))


ATTENTION: list[tuple[Change, str | None]] = [
    (with_a_softcap, None),
    (with_a_scale, None),
    (without_causality, None),
    (with_a_float_mask, None),
    (without_a_scale, None),
    (scores_given_out, "it gives out its scores"),
    (of_tomorrow, "attribute of_tomorrow is unknown"),
    (mask_of_one_token, "its mask all has shape (1, 1, 1, 1)"),
]


@pytest.mark.parametrize(
    ("change", "reason"), ATTENTION, ids=lambda one: getattr(one, "__name__", "")
)
def test_attention(change: Change, reason: str | None, tmp_path: Path) -> None:
    check("mobius-llama-default", change, reason, tmp_path)


def causal_from_the_first_key(layer: Layer) -> None:
    set_attribute(layer, "is_causal", 1)


def test_attention_over_a_past_of_its_own(tmp_path: Path) -> None:
    """Queries of is_causal stand at the first keys where the operator knows of no past."""
    reason = "is_causal=1 without past_key"
    check("dynamo-llama-23-sdpa", causal_from_the_first_key, reason, tmp_path)


def written_in_a_circle(layer: Layer) -> None:
    node = layer.last("TensorScatter")
    node.attribute.append(helper.make_attribute("mode", "circular"))


def written_elsewhere(layer: Layer) -> None:
    layer.insert(layer.last("TensorScatter"), 2, "Identity")


def masked_as_well(layer: Layer) -> None:
    mask = layer.array("mask", np.ones((1, 96), np.bool_))
    layer.last("Attention").input[3] = mask


STATIC: list[tuple[Change, str | None]] = [
    (with_a_softcap, None),
    (without_causality, None),
    (written_in_a_circle, "has mode circular"),
    (written_elsewhere, "needs nonpad_kv_seqlen and one write_indices"),
    (masked_as_well, "it has a mask over a cache of fixed size"),
]


@pytest.mark.parametrize(("change", "reason"), STATIC, ids=lambda one: getattr(one, "__name__", ""))
def test_static_caches(change: Change, reason: str | None, tmp_path: Path) -> None:
    check("mobius-llama-static", change, reason, tmp_path)

"""The domain as a whole: its functions at every opset, and nodes that do not keep to it."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import onnx
import pytest
from onnx import TensorProto, helper

import nsq_ref as nsq
from nsq_ref import Scheme
from nsq_ref.codec import PARTS
from onnx_export.operators import (
    DOMAIN,
    VERSION,
    attention_model,
    attention_node,
    check_nodes,
    functions,
    quantize_model,
    scheme_attributes,
)
from onnx_export.operators.nodes import Nodes
from onnx_export.operators.schema import ATTENTION
from tests.support.balance import are_balanced, keys_of_two_kinds
from tests.support.onnx_runners import model_of, without_optimization

SCHEME = Scheme(block_size=4)
FLOAT = TensorProto.FLOAT


@pytest.mark.parametrize("opset", [21, 22, 24])
def test_later_opsets(opset: int) -> None:
    """The functions run in models of later opsets, whose own functions they then are."""
    x = keys_of_two_kinds(tokens=5, channels=6)
    scheme = Scheme(
        bits=3, scale_rule="search", norm_rule="balanced", outlier_channels=1, magnitude="lsq"
    )
    assert are_balanced(x, scheme).ravel().tolist() == [True, False]
    outputs = ["packed", *[""] * (len(PARTS) - 1)]
    attributes = scheme_attributes(scheme)
    node = helper.make_node("Quantize", ["x"], outputs, domain=DOMAIN, **attributes)
    made = functions(opset)
    assert {one.domain for one in made} == {DOMAIN}
    assert {one.opset_import[0].version for one in made} == {opset}
    model = model_of([node], {"x": FLOAT}, {"packed": TensorProto.UINT8}, made, opset)
    assert model.opset_import[1].version == VERSION
    got = without_optimization(model)({"x": x})
    assert got["packed"].tobytes() == nsq.quantize(x, scheme).packed.tobytes()


@pytest.mark.parametrize("function", functions(), ids=lambda function: str(function.name))
def test_functions_of_an_older_opset_are_refused(function: onnx.FunctionProto) -> None:
    """The bodies use what came with 21."""
    assert function.opset_import[0].version == 21
    with pytest.raises(ValueError, match="opset=20 is too old; the functions need at least 21"):
        functions(20)


# --- what nobody else checks ---------------------------------------------------------------------


def misspelt(one: onnx.NodeProto) -> None:
    one.attribute.append(helper.make_attribute("soft_cap", 3.0))


def of_another_type(one: onnx.NodeProto) -> None:
    next(each for each in one.attribute if each.name == "key_bits").CopyFrom(
        helper.make_attribute("key_bits", 4.0)
    )


def missing(one: onnx.NodeProto) -> None:
    kept = [each for each in one.attribute if each.name != "kv_heads"]
    del one.attribute[:]
    one.attribute.extend(kept)


def renamed(one: onnx.NodeProto) -> None:
    one.op_type = "Attend"


def longer(one: onnx.NodeProto) -> None:
    one.input.extend(["query"] * (len(ATTENTION.inputs) + 1 - len(one.input)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (misspelt, "attribute soft_cap is unknown; did you mean softcap"),
        (of_another_type, "attribute key_bits must be INT"),
        (missing, "attribute kv_heads is missing"),
        (
            renamed,
            "there is no such operator in nsq; choose one of Quantize, Dequantize, Attention",
        ),
        (longer, "it has 25 inputs, of at most 24"),
    ],
)
@pytest.mark.parametrize("depth", ["graph", "branch", "function"])
def test_check_nodes(depth: str, change: Callable[[onnx.NodeProto], None], message: str) -> None:
    """Wherever the node is."""
    made = attention_node(SCHEME, SCHEME, heads=4, kv_heads=2)
    check_nodes(around(made, depth))
    change(made)
    with pytest.raises(ValueError, match=rf"that makes output: {message}"):
        check_nodes(around(made, depth))


def around(made: onnx.NodeProto, depth: str) -> onnx.ModelProto:
    """Return a model that has the node in its graph, in a branch of it, or in a function."""
    add = Nodes()
    if depth == "branch":

        def branch(inner: Nodes) -> str:
            inner.nodes.append(made)
            return "output"

        add.choose("late", branch, lambda _: "query")
    elif depth == "graph":
        add.nodes.append(made)
    model = helper.make_model(helper.make_graph(add.nodes, "graph", [], []))
    if depth == "function":
        model.functions.append(helper.make_function("mine", "F", [], [], [made], []))
    return model


def test_check_nodes_takes_what_the_builders_make() -> None:
    """Attention calls Quantize and Dequantize, with attributes of its own."""
    check_nodes(quantize_model(Scheme()))
    check_nodes(attention_model(SCHEME, SCHEME, heads=4, kv_heads=2, head_dim=8))


# --- earlier names -------------------------------------------------------------------------------

EARLIER = {
    "attention": ["attention_model", "attention_node", "cache_fields"],
    "codec": ["dequantize_model", "quantize_model", "save_models"],
    "functions": ["DOMAIN", "VERSION", "check_nodes", "functions", "scheme_attributes"],
}


@pytest.mark.parametrize("module", EARLIER)
def test_earlier_modules_have_their_names(module: str) -> None:
    earlier = importlib.import_module(f"onnx_export.{module}")
    assert set(EARLIER[module]) <= set(earlier.__all__)

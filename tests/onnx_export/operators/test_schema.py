"""The schema of the domain, beside whatever else knows of it."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph

import nsq_ref as nsq
from nsq_ref import Scheme
from nsq_ref.attention import attend
from nsq_ref.codec import PARTS
from nsq_ref.scheme import FLOAT_DTYPES
from onnx_export.operators import functions, scheme_attributes
from onnx_export.operators.nodes import Nodes
from onnx_export.operators.schema import (
    ATTENTION,
    BUFFER_ATTENTION,
    DEQUANTIZE,
    DOMAIN,
    ELEMENTS,
    OPERATORS,
    QUANTIZE,
    Operator,
)
from tests.support.native_calls import PART_TYPES, Session
from tests.support.onnx_attention import Config, make_inputs, model
from tests.support.onnx_runners import model_of

ROOT = Path(__file__).parents[3]
FUNCTIONS = {function.name: function for function in functions()}


SIDES = ("key", "value")
SCHEME = Scheme(symmetric=False, block_size=4, sink_tokens=1)
CODED = replace(SCHEME, outlier_channels=2)
Call = tuple[dict[str, Any], dict[str, Any]]  # the attributes and the inputs of a node


def codec_call(operator: Operator) -> Call:
    """Return a call of Quantize or Dequantize with every input."""
    x = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32)
    parts = dict(nsq.quantize(x, CODED).parts)
    wide = {name: parts[name].astype(np.float32) for name in ("scale", "norm", "zero")}
    feedback = nsq.Feedback.from_queries(x, kv_heads=2)
    known = {"x": x, "head_dim": np.array(8), **parts, **wide}
    known |= {"order": feedback.order, "factor": feedback.factor}
    return scheme_attributes(CODED), {name: known[name] for name in operator.inputs}


def attention_call() -> Call:
    """Return a call of Attention with every input."""
    config = Config(
        key=SCHEME, value=SCHEME, rotary=4, position_ids=True, attention_bias=True, head_sink=True,
        feedback=nsq.Feedback.from_queries(np.eye(4)[None], kv_heads=1),
    )  # fmt: skip
    feeds = make_inputs(config, np.random.default_rng(0), np.zeros(2), 3, [3, 2])
    feeds |= {f"past_{name}": np.zeros(*field) for name, field in config.cache(2).items()}
    feeds["past_lengths"] = np.zeros(2, np.int64)
    (node,) = model(config, functions=[]).graph.node
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    return attributes, {name: feeds[name] for name in ATTENTION.inputs}


def buffer_attention_call() -> Call:
    """Return the same with the cache in buffers."""
    attributes, feeds = attention_call()
    feeds |= {f"past_{side}": np.zeros((2, 1, 1, 4096), np.uint8) for side in SIDES}
    return attributes, {name: feeds[name] for name in BUFFER_ATTENTION.inputs}


CALLS = {
    "Quantize": codec_call(QUANTIZE), "Dequantize": codec_call(DEQUANTIZE),
    "Attention": attention_call(), "BufferAttention": buffer_attention_call(),
}  # fmt: skip
WITH_BODY = [operator for operator in OPERATORS.values() if operator.has_body]


def run(operator: Operator, attributes: dict[str, Any], arrays: list[Any]) -> dict[str, Any]:
    """Run a node in the native library, whose tensors have no names but their places."""
    names = {name: f"at {i}" for i, name in enumerate(operator.inputs)}
    feeds = dict(zip(names.values(), arrays, strict=True))
    kinds = {name: ELEMENTS[array.dtype.name] for name, array in feeds.items()}
    made = {"x_hat": ELEMENTS["float32"], "output": ELEMENTS["float32"], **PART_TYPES}
    made |= {name.replace("past", "present"): kinds[place] for name, place in names.items()}
    made["more"] = ELEMENTS["float32"]
    made = {name: made[name] for name in operator.outputs}
    add = Nodes()
    add.call(operator, names, {name: name for name in made}, **attributes)
    return Session(model_of(add.nodes, kinds, made)).run(feeds)


@pytest.mark.parametrize(
    ("operator", "name"),
    [(operator, name) for operator in OPERATORS.values() for name in operator.inputs],
    ids=lambda one: one if isinstance(one, str) else one.name,
)
def test_the_kernel_has_the_inputs_at_the_same_places(operator: Operator, name: str) -> None:
    """By the name that it calls what has another number of axes."""
    attributes, feeds = CALLS[operator.name]
    array = feeds[name]
    wrong = array.ravel() if array.ndim > 1 else np.stack([array, array])
    with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
        run(operator, attributes, list((feeds | {name: wrong}).values()))


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))
def test_the_kernel_has_as_many_inputs_and_outputs(operator: Operator) -> None:
    """Of the dtypes that are named: the runtime refuses other ones."""
    attributes, feeds = CALLS[operator.name]
    assert tuple(run(operator, attributes, list(feeds.values()))) == operator.outputs
    for ends in ("inputs", "outputs"):
        longer = operator._replace(**{ends: (*getattr(operator, ends), "more")})
        with pytest.raises(InvalidGraph):
            run(longer, attributes, [*feeds.values(), *[np.zeros(1)] * (ends == "inputs")])


@pytest.mark.parametrize("operator", WITH_BODY, ids=lambda one: one.name)
def test_functions_have_the_tensors(operator: Operator) -> None:
    function = FUNCTIONS[operator.name]
    assert tuple(function.input) == operator.inputs
    assert tuple(function.output) == operator.outputs
    assert operator.optional < {*operator.inputs, *operator.outputs}


@pytest.mark.parametrize("opset", [21, 24])
@pytest.mark.parametrize("operator", WITH_BODY, ids=lambda one: one.name)
def test_bodies_use_every_input_and_attribute(operator: Operator, opset: int) -> None:
    """And nothing that the schema does not have."""
    (function,) = (one for one in functions(opset) if one.name == operator.name)
    used, made, referred = set(), set(), set()

    def look(nodes: list[onnx.NodeProto]) -> None:
        for node in nodes:
            used.update(node.input)
            made.update(node.output)
            for attribute in node.attribute:
                referred.add(attribute.ref_attr_name)
                look(list(attribute.g.node))

    look(list(function.node))
    assert set(operator.inputs) <= used
    assert set(operator.outputs) <= made
    assert referred - {""} <= set(operator.attributes)


def test_operators_with_a_body_have_a_function() -> None:
    assert set(FUNCTIONS) == {operator.name for operator in WITH_BODY}


def test_attributes_say_the_whole_scheme() -> None:
    """B1 O1. Attention takes any scheme twice, but for the outliers, which no cache has."""
    fields = set(Scheme().to_dict())
    assert set(QUANTIZE.attributes) == set(DEQUANTIZE.attributes) == fields
    for side in ("key_", "value_"):
        names = {name for name in ATTENTION.attributes if name.startswith(side)}
        assert names == {side + name for name in fields - {"outlier_channels"}}
    own = {"scale", "causal", "softcap", "sliding_window"}
    assert own <= set(ATTENTION.attributes) & set(inspect.signature(attend).parameters)


def test_parts_are_those_of_the_reference() -> None:
    """In one order, so that outputs of a session can be taken for parts."""
    assert QUANTIZE.outputs == DEQUANTIZE.inputs[:-1] == tuple(PARTS)


def test_element_types_are_those_of_onnx() -> None:
    dtypes = {name: np.dtype(name) for name in ELEMENTS if name != "bfloat16"}
    dtypes["bfloat16"] = FLOAT_DTYPES["bfloat16"]
    for name, dtype in dtypes.items():
        assert helper.np_dtype_to_tensor_dtype(dtype) == ELEMENTS[name] == ELEMENTS[dtype.name]


def test_the_manual_names_every_tensor_and_attribute() -> None:
    """In docs/onnx.md: what keys and values both have by the name behind the side."""
    manual = (ROOT / "docs/onnx.md").read_text(encoding="utf-8")
    for operator in OPERATORS.values():
        assert f"\n## {operator.name}\n" in manual
        for name in (*operator.inputs, *operator.outputs, *operator.attributes):
            known = re.sub("^(past_|present_)?(key|value)_", "", name)
            assert re.search(rf"`{known}[` ]", manual), name


def test_nobody_else_names_the_domain() -> None:
    """Nodes and models of it come from one builder."""
    named = re.compile(rf'(domain|opsetid|==)\W+"{DOMAIN}"')
    for folder in ("onnx_export", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not named.search(path.read_text(encoding="utf-8")), path

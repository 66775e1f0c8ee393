"""The schema of the domain, beside whatever else knows of it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from nsq_ref import Scheme
from nsq_ref.attention import attend
from nsq_ref.codec import PARTS
from nsq_ref.scheme import FLOAT_DTYPES
from onnx_export import custom_ops
from onnx_export.operators import functions
from onnx_export.operators.schema import (
    ATTENTION,
    DEQUANTIZE,
    DOMAIN,
    ELEMENTS,
    OPERATORS,
    QUANTIZE,
    Operator,
)

ROOT = Path(__file__).parents[3]
FUNCTIONS = {function.name: function for function in functions()}


def native_tensors(operator: str, ends: str) -> list[tuple[str, bool]]:
    """Return the names that the native library declares, and which of them may be left out."""
    declared = re.compile(
        rf'const char\* name = "{operator}";.*?Parameter {ends}\[\] = {{(.*?)}};', re.DOTALL
    )
    sources = [path for folder in custom_ops.__path__ for path in Path(folder).rglob("*.cpp")]
    found = [one for path in sources for one in declared.findall(path.read_text(encoding="utf-8"))]
    assert len(found) == 1
    return [
        (name, bool(optional))
        for name, optional in re.findall(r'{"(\w+)",[^{}]*?(kOptional)?}', found[0])
    ]


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))
def test_function_and_kernel_have_the_same_tensors(operator: Operator) -> None:
    """A node is one of both: what its places mean must not depend on who runs it."""
    function = FUNCTIONS[operator.name]
    for ends in ("inputs", "outputs"):
        names = getattr(operator, ends)
        declared = [(name, name in operator.optional) for name in names]
        assert native_tensors(operator.name, ends) == declared
        assert tuple(getattr(function, ends[:-1])) == names
    assert operator.optional <= {*operator.inputs, *operator.outputs}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))
def test_bodies_use_every_input_and_attribute(operator: Operator) -> None:
    """And nothing that the schema does not have."""
    function = FUNCTIONS[operator.name]
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

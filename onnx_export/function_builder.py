"""Nodes of a graph or of a function body, added one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["Nodes"]

_ATTRIBUTE = {
    "int": ("value_int", onnx.AttributeProto.INT),
    "float": ("value_float", onnx.AttributeProto.FLOAT),
    "string": ("value_string", onnx.AttributeProto.STRING),
}


class Nodes:
    """Nodes in the order in which they are added; constants are nodes too.

    A function body has no initializers, and neither have the subgraphs here, so that both are
    built alike. A subgraph sees the outputs of the graph around it; ``prefix`` keeps its own names
    apart from those.

    Examples
    --------
    >>> add = Nodes()
    >>> doubled = add("Mul", "x", np.float32(2), name="y")
    >>> [node.op_type for node in add.nodes], doubled
    (['Constant', 'Mul'], 'y')
    """

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._prefix = prefix

    def __call__(self, operator: str, *inputs: Any, name: str = "", **attributes: Any) -> str:
        """Add a node with one output, and return its name.

        Parameters
        ----------
        operator : str
            Of the standard domain, unless ``domain`` is among the attributes.
        *inputs : str, number, list of int or array
            Names of tensors ("" for one left out); anything else becomes a constant.
        name : str, optional
            Of the output; a new one by default.
        **attributes
            Of the node.

        Returns
        -------
        str
            The name of the output.

        Examples
        --------
        >>> Nodes()("Neg", "x", name="y")
        'y'
        """
        output = name or self._new(operator)
        self.several(operator, inputs, [output], **attributes)
        return output

    def several(
        self, operator: str, inputs: Sequence[Any], outputs: Sequence[str], **attributes: Any
    ) -> None:
        """Add a node with several outputs, whose names are given.

        Examples
        --------
        >>> add = Nodes()
        >>> add.several("TopK", ["x", [4]], ["largest", "index"])
        >>> add.nodes[-1].output[1]
        'index'
        """
        names = [one if isinstance(one, str) else self.constant(one) for one in inputs]
        self.nodes.append(helper.make_node(operator, names, list(outputs), **attributes))

    def constant(self, value: Any) -> str:
        """Add a constant; Python integers and lists of them are int64.

        Examples
        --------
        >>> Nodes().constant([0, 1]).startswith("constant")
        True
        """
        array = np.asarray(value, np.int64) if isinstance(value, (int, list)) else np.asarray(value)
        output = self._new("constant")
        tensor = numpy_helper.from_array(array, output)
        self.nodes.append(helper.make_node("Constant", [], [output], value=tensor))
        return output

    def attribute(self, name: str, kind: str) -> str:
        """Add the value of an attribute of the function: a scalar "int", "float" or "string".

        Examples
        --------
        >>> add = Nodes()
        >>> bits = add.attribute("bits", "int")
        >>> add.nodes[-1].attribute[0].ref_attr_name
        'bits'
        """
        field, attribute_type = _ATTRIBUTE[kind]
        node = helper.make_node("Constant", [], [self._new(name)])
        node.attribute.add(name=field, type=attribute_type, ref_attr_name=name)
        self.nodes.append(node)
        return str(node.output[0])

    def _new(self, kind: str) -> str:
        return f"{self._prefix}{kind}_{len(self.nodes)}"

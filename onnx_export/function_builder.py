"""Nodes of a graph or of a function body, added one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nsq_ref.environment import extra

with extra("onnx", __name__):
    import onnx
    from onnx import helper, numpy_helper

__all__ = ["LEAST_OPSET", "Nodes", "require_opset"]

LEAST_OPSET = 21

_ATTRIBUTE = {
    "int": ("value_int", onnx.AttributeProto.INT),
    "float": ("value_float", onnx.AttributeProto.FLOAT),
    "string": ("value_string", onnx.AttributeProto.STRING),
}


def require_opset(opset: int) -> None:
    """Refuse a version of the standard operators that the functions cannot be written in.

    Raises
    ------
    ValueError
        Below 21.

    Examples
    --------
    >>> require_opset(21)
    """
    if opset < LEAST_OPSET:
        raise ValueError(f"opset={opset} is too old; the functions need at least {LEAST_OPSET}")


class Nodes:
    """Nodes in the order in which they are added; constants are nodes too. For one thread.

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

    def is_one_of(self, name: str, values: Sequence[str]) -> list[str]:
        """Tell for each of some strings whether an attribute of the function is it.

        Examples
        --------
        >>> add = Nodes()
        >>> channel, token = add.is_one_of("axis", ["channel", "token"])
        >>> add.nodes[-1].op_type
        'Gather'
        """
        # Sliced from one tensor, as onnx.reference compares only strings of one length.
        known = self._new("strings")
        self.nodes.append(helper.make_node("Constant", [], [known], value_strings=list(values)))
        value = self("Unsqueeze", self.attribute(name, "string"), [0])
        both = self("Concat", value, known, axis=0)
        same = self("Equal", self("Slice", both, [0], [1]), both)
        return [self("Gather", same, 1 + i) for i in range(len(values))]

    def choose(
        self,
        condition: str,
        then: Callable[[Nodes], Sequence[str]],
        otherwise: Callable[[Nodes], Sequence[str]],
        dtypes: Sequence[int],
    ) -> list[str]:
        """Add an If: only the branch that is chosen is computed.

        Parameters
        ----------
        condition : str
            A boolean scalar.
        then, otherwise : callable
            Add the nodes of a branch to the builder that they are given, and return the names of
            its results, which may be tensors of the graph around it.
        dtypes : sequence of int
            Of the results.

        Returns
        -------
        list of str
            The names of the results.

        Examples
        --------
        >>> add = Nodes()
        >>> add.choose("late", lambda add: [add("Neg", "x")], lambda add: ["x"], [1])
        ['chosen_0_0']
        """
        kind = self._new("chosen")
        branches = {}
        for name, fill in (("then_branch", then), ("else_branch", otherwise)):
            branch = Nodes(f"{kind}_{name[:4]}_")
            # A result of a branch must be made in it.
            results = [branch("Identity", one) for one in fill(branch)]
            made = [
                helper.make_tensor_value_info(*r, None) for r in zip(results, dtypes, strict=True)
            ]
            branches[name] = helper.make_graph(branch.nodes, name, [], made)
        outputs = [f"{kind}_{i}" for i in range(len(dtypes))]
        self.several("If", [condition], outputs, **branches)
        return outputs

    def repeat(
        self,
        times: Any,
        step: Callable[[Nodes, str, Sequence[str]], Sequence[str]],
        state: Sequence[str],
        dtypes: Sequence[int],
    ) -> list[str]:
        """Add a Loop that changes some tensors again and again.

        Parameters
        ----------
        times : int or str
        step : callable
            Given a builder, the name of the number of the step, an int64 scalar, and those of the
            state, it adds the nodes of one step, and returns the names of the new state.
        state : sequence of str
            The state at first.
        dtypes : sequence of int
            Of the state.

        Returns
        -------
        list of str
            The names of the last state.

        Examples
        --------
        >>> add = Nodes()
        >>> add.repeat(3, lambda add, index, state: [add("Add", *state, *state)], ["x"], [1])
        ['repeated_0_0']
        """
        kind = self._new("repeated")
        body = Nodes(f"{kind}_")
        index, more = f"{kind}_index", f"{kind}_more"
        before = [f"{kind}_before_{i}" for i in range(len(state))]
        info = helper.make_tensor_value_info
        # ONNX Runtime wants to know that these are scalars.
        given = [info(index, onnx.TensorProto.INT64, []), info(more, onnx.TensorProto.BOOL, [])]
        given += [info(name, dtype, None) for name, dtype in zip(before, dtypes, strict=True)]
        after = [body("Identity", one) for one in step(body, index, before)]
        made = [info(body("Identity", more), onnx.TensorProto.BOOL, [])]
        made += [info(name, dtype, None) for name, dtype in zip(after, dtypes, strict=True)]
        outputs = [f"{kind}_{i}" for i in range(len(state))]
        self.several(
            "Loop", [times, np.bool_(True), *state], outputs,
            body=helper.make_graph(body.nodes, "body", given, made),
        )  # fmt: skip
        return outputs

    def _new(self, kind: str) -> str:
        return f"{self._prefix}{kind}_{len(self.nodes)}"

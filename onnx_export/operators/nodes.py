"""The one builder of nodes, functions and models; nodes are added one by one.

It makes the messages of ONNX themselves, not the objects of onnx_ir, which would be one more
dependency, with sympy behind it. A node here is a line that names what it takes: inputs that may be
absent, attributes of the function and tensors around a branch are such names, where onnx_ir wants
an object for each. Who changes a graph reads what is built in one call, ``onnx_ir.from_proto``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nsq_ref.extras import extra
from onnx_export.operators.schema import DOMAIN, ELEMENTS, IR_VERSION, OPSET, VERSION, Operator

with extra("onnx", __name__):
    import onnx
    from onnx import helper, numpy_helper

__all__ = [
    "Nodes", "Reference", "Tensors", "all_nodes", "built_once", "make_function", "make_model",
]  # fmt: skip

Tensors = Mapping[str, tuple[str, Sequence[str | int] | None]]
"""Inputs or outputs of a model: the dtype of each, by its name in NumPy, and its axes, if known."""


class Reference(NamedTuple):
    """Stands for the value of an attribute of the function: "int", "float" or "string"."""

    attribute: str
    kind: str


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
        """Add a node with one output, and return its name: ``name``, or a new one.

        Inputs are names of tensors, "" for one that is left out; anything else becomes a constant.
        The operator is a standard one, unless ``domain`` is among the attributes. An attribute may
        be a `Reference` to one of the function.

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
        of_function = {k: v for k, v in attributes.items() if isinstance(v, Reference)}
        own = {k: v for k, v in attributes.items() if k not in of_function}
        node = helper.make_node(operator, names, list(outputs), **own)
        for name, (attribute, kind) in of_function.items():
            kind_type = onnx.AttributeProto.AttributeType.Value(kind.upper())
            node.attribute.add(name=name, type=kind_type, ref_attr_name=attribute)
        self.nodes.append(node)

    def call(
        self,
        operator: Operator,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        **attributes: Any,
    ) -> None:
        """Add a node of the domain, given tensors by the operator's names; others are left out.

        Examples
        --------
        >>> from onnx_export.operators.schema import DEQUANTIZE
        >>> add = Nodes()
        >>> add.call(DEQUANTIZE, {"packed": "p", "scale": "s", "zero": "z"}, {"x_hat": "y"})
        >>> add.nodes[-1].input[:4]
        ['p', 's', '', 'z']
        """
        # Also those at the end that are left out, as the checker and onnx.reference count them.
        given = [inputs.get(name, "") for name in operator.inputs]
        made = [outputs.get(name, "") for name in operator.outputs]
        self.several(operator.name, given, made, domain=DOMAIN, **attributes)

    def constant(self, value: Any) -> str:
        """Add a constant; Python integers and lists of them are int64.

        Examples
        --------
        >>> Nodes().constant([0, 1]).startswith("constant")
        True
        """
        array = np.asarray(value, np.int64) if isinstance(value, (int, list)) else np.asarray(value)
        output = self._new("constant")
        self.several("Constant", [], [output], value=numpy_helper.from_array(array, output))
        return output

    def cast(self, value: str, dtype: str | Reference, name: str = "") -> str:
        """Add a Cast; dtypes have their names in NumPy, here and below.

        Examples
        --------
        >>> Nodes().cast("x", "bfloat16", name="y")
        'y'
        """
        to = ELEMENTS[dtype] if isinstance(dtype, str) else dtype
        return self("Cast", value, name=name, to=to)

    def attribute(self, name: str, kind: str) -> str:
        """Add the value of an attribute of the function: a scalar "int", "float" or "string".

        Examples
        --------
        >>> add = Nodes()
        >>> bits = add.attribute("bits", "int")
        >>> add.nodes[-1].attribute[0].ref_attr_name
        'bits'
        """
        output = self._new(name)
        self.several("Constant", [], [output], **{f"value_{kind}": Reference(name, kind)})
        return output

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
        self.several("Constant", [], [known], value_strings=list(values))
        value = self("Unsqueeze", self.attribute(name, "string"), [0])
        both = self("Concat", value, known, axis=0)
        same = self("Equal", self("Slice", both, [0], [1]), both)
        return [self("Gather", same, 1 + i) for i in range(len(values))]

    def choose(
        self,
        condition: str,
        then: Callable[[Nodes], str],
        otherwise: Callable[[Nodes], str],
        dtype: str | None = "float32",
    ) -> str:
        """Add an If, by a boolean scalar: only the branch that is chosen is computed.

        Each branch adds its nodes to the builder that it is given, and returns the name of its
        result, which may be a tensor of the graph around it. Returns the name of what was chosen.
        A dtype of None is whatever the runtime finds it to be.

        Examples
        --------
        >>> Nodes().choose("late", lambda add: add("Neg", "x"), lambda _: "x")
        'chosen_0_0'
        """
        branches = (lambda add: [then(add)]), (lambda add: [otherwise(add)])
        return self.choose_several(condition, *branches, [dtype])[0]

    def choose_several(
        self,
        condition: str,
        then: Callable[[Nodes], Sequence[str]],
        otherwise: Callable[[Nodes], Sequence[str]],
        dtypes: Sequence[str | None],
    ) -> list[str]:
        """Add an If, as `choose`, with several results.

        Examples
        --------
        >>> Nodes().choose_several("late", lambda _: ["x"], lambda _: ["y"], ["float32"])
        ['chosen_0_0']
        """
        kind = self._new("chosen")
        branches = {}
        for name, fill in (("then_branch", then), ("else_branch", otherwise)):
            branch = Nodes(f"{kind}_{name[:4]}_")
            # A result of a branch must be made in it.
            results = [branch("Identity", one) for one in fill(branch)]
            made = [
                onnx.ValueInfoProto(name=result) if dtype is None else _info(result, dtype, None)
                for result, dtype in zip(results, dtypes, strict=True)
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
        dtypes: Sequence[str],
        stacked: Sequence[str] = (),
    ) -> list[str]:
        """Add a Loop that changes some tensors, the state, again and again.

        ``step`` is given a builder, the name of the number of the step, an int64 scalar, and those
        of the state; it adds the nodes of one step, and returns the names of the new state. Returns
        the names of the last one.

        With dtypes ``stacked``, a step returns as many tensors more, and what is returned are also
        those of all steps, on a new first axis; onnx.reference joins them on the first that they
        have: Reshape makes both the same.

        Examples
        --------
        >>> add = Nodes()
        >>> add.repeat(3, lambda add, index, state: [add("Neg", *state)], ["x"], ["float32"])
        ['repeated_0_0']
        """
        kind = self._new("repeated")
        body = Nodes(f"{kind}_")
        index, more = f"{kind}_index", f"{kind}_more"
        before = [f"{kind}_before_{i}" for i in range(len(state))]
        # ONNX Runtime wants to know that these are scalars.
        given: Tensors = {
            index: ("int64", []),
            more: ("bool", []),
            **{name: (dtype, None) for name, dtype in zip(before, dtypes, strict=True)},
        }
        after = [body("Identity", one) for one in step(body, index, before)]
        kinds = [*dtypes, *stacked]
        made: Tensors = {
            body("Identity", more): ("bool", []),
            **{name: (dtype, None) for name, dtype in zip(after, kinds, strict=True)},
        }
        outputs = [f"{kind}_{i}" for i in range(len(kinds))]
        self.several(
            "Loop", [times, np.bool_(True), *state], outputs,
            body=helper.make_graph(body.nodes, "body", _infos(given), _infos(made)),
        )  # fmt: skip
        return outputs

    def _new(self, kind: str) -> str:
        return f"{self._prefix}{kind}_{len(self.nodes)}"


def make_function(operator: Operator, add: Nodes, opset: int) -> onnx.FunctionProto:
    """Return the function of an operator, whose body is the nodes that were added.

    Raises
    ------
    ValueError
        For an older opset than 21.

    Examples
    --------
    >>> from onnx_export.operators.schema import QUANTIZE
    >>> make_function(QUANTIZE, Nodes(), 21).name
    'Quantize'
    """
    if opset < OPSET:
        raise ValueError(f"opset={opset} is too old; the functions need at least {OPSET}")
    required = [name for name, default in operator.attributes.items() if default is None]
    defaults = [
        helper.make_attribute(name, default)
        for name, default in operator.attributes.items()
        if default is not None
    ]
    return helper.make_function(
        DOMAIN, operator.name, operator.inputs, operator.outputs, add.nodes,
        _opsets(add.nodes, opset), required, defaults,
    )  # fmt: skip


def built_once(build: Callable[..., onnx.FunctionProto]) -> Callable[..., onnx.FunctionProto]:
    """Build a function once for each opset, as there are hundreds of nodes; return a copy of it.

    Whatever else it is built for must be hashable.

    Examples
    --------
    >>> @built_once
    ... def nothing(opset: int = OPSET) -> onnx.FunctionProto:
    ...     print("built")
    ...     return onnx.FunctionProto(name="Nothing")
    >>> first, second = nothing(), nothing()
    built
    >>> first == second, first is second
    (True, False)
    """

    @functools.cache
    def built(opset: int, *others: Hashable) -> bytes:
        serialized: bytes = build(opset, *others).SerializeToString()
        return serialized

    @functools.wraps(build)
    def copied(opset: int = OPSET, *others: Hashable) -> onnx.FunctionProto:
        copy: onnx.FunctionProto = onnx.FunctionProto.FromString(built(opset, *others))
        return copy

    return copied


def make_model(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: Tensors,
    outputs: Tensors,
    *,
    functions: Sequence[onnx.FunctionProto] = (),
    initializers: Sequence[onnx.TensorProto] = (),
    metadata: Mapping[str, str] | None = None,
    opset: int = OPSET,
) -> onnx.ModelProto:
    """Return a model of one graph.

    Examples
    --------
    >>> add = Nodes()
    >>> doubled = add("Mul", "x", np.float32(2), name="y")
    >>> vector = "float32", ["n"]
    >>> model = make_model("double", add.nodes, {"x": vector}, {"y": vector})
    >>> [one.name for one in model.graph.output]
    ['y']
    """
    model = helper.make_model(
        helper.make_graph(nodes, name, _infos(inputs), _infos(outputs), initializers),
        opset_imports=_opsets(nodes, opset),
        functions=functions,
        ir_version=IR_VERSION,
        producer_name="onnx_export",
    )
    helper.set_model_props(model, dict(metadata or {}))
    return model


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Return nodes and all that are in their subgraphs.

    Examples
    --------
    >>> add = Nodes()
    >>> chosen = add.choose("late", lambda add: add("Neg", "x"), lambda _: "x")
    >>> [node.op_type for node in all_nodes(add.nodes)]
    ['If', 'Identity', 'Neg', 'Identity']
    """
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from all_nodes(graph.node)


def _infos(tensors: Tensors) -> list[onnx.ValueInfoProto]:
    return [_info(name, dtype, axes) for name, (dtype, axes) in tensors.items()]


def _info(name: str, dtype: str, axes: Sequence[str | int] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ELEMENTS[dtype], axes)


def _opsets(nodes: Sequence[onnx.NodeProto], opset: int) -> list[onnx.OperatorSetIdProto]:
    """Return the versions of the standard operators, and of the other domains that nodes are of."""
    versions = {"": opset}
    for node in all_nodes(nodes):
        versions.setdefault(node.domain, VERSION if node.domain == DOMAIN else 1)
    return [helper.make_opsetid(domain, version) for domain, version in versions.items()]

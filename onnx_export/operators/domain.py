"""The domain ``nsq`` as a whole: all its functions, and whether the nodes of a model keep to it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from nsq_ref.extras import extra
from onnx_export.operators.attention import attention
from onnx_export.operators.codec import dequantize, quantize
from onnx_export.operators.nodes import all_nodes
from onnx_export.operators.schema import ATTENTION, CACHE_PARTS, DOMAIN, OPERATORS, OPSET

with extra("onnx", __name__):
    import onnx
    from onnx import helper

__all__ = ["check_nodes", "functions"]


def functions(opset: int = OPSET, nodes: Iterable[onnx.NodeProto] = ()) -> list[onnx.FunctionProto]:
    """Return every function of the domain.

    A model that carries them runs wherever standard operators run; where a library has kernels of
    the same names, these run instead.

    Parameters
    ----------
    opset : int
        Of the standard operators, at least 21, as in the model. From 24 on Attention appends in
        place and is much faster, in ONNX Runtime 1.26 and later.
    nodes : iterable of onnx.NodeProto
        Of the model, all of them. Parts of a cache that each of its Attentions has are appended to
        in place, too; for no other Attention these functions are right.

    Returns
    -------
    list of onnx.FunctionProto

    Raises
    ------
    ValueError
        For an older opset.

    Examples
    --------
    >>> [function.name for function in functions()]
    ['Quantize', 'Dequantize', 'Attention']
    """
    inputs = [
        {name for name, given in zip(ATTENTION.inputs, node.input, strict=False) if given}
        for node in all_nodes(nodes)
        if (node.domain, node.op_type) == (DOMAIN, ATTENTION.name)
    ]
    parts = {f"past_{side}_{part}" for side in ("key", "value") for part in CACHE_PARTS}
    always = frozenset(parts & ATTENTION.optional).intersection(*inputs) if inputs else frozenset()
    return [quantize(opset), dequantize(opset), attention(opset, always)]


def check_nodes(model: onnx.ModelProto) -> None:
    """Refuse a model with a node of the domain that would not do what it says.

    Neither ONNX's checker nor ONNX Runtime knows the attributes of functions and of custom
    operators: a misspelt one is ignored, and its default holds. Call this once a graph is built.

    Parameters
    ----------
    model : onnx.ModelProto
        Its subgraphs and functions are looked through, too.

    Raises
    ------
    ValueError
        For another operator of the domain, an attribute that is unknown or of another type, one
        that is missing, and more inputs or outputs than there are.

    Examples
    --------
    >>> from nsq_ref import Scheme
    >>> from onnx_export.operators import quantize_model
    >>> model = quantize_model(Scheme())
    >>> check_nodes(model)
    >>> model.graph.node[0].attribute[0].name = "bitz"
    >>> check_nodes(model)
    Traceback (most recent call last):
      ...
    ValueError: Quantize that makes packed: attribute bitz is unknown; did you mean bits?
    """
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in all_nodes(nodes):
            if node.domain == DOMAIN and (problem := _problem(node)):
                made = next(filter(None, node.output), "nothing")
                raise ValueError(f"{node.op_type} that makes {made}: {problem}")


def _problem(node: onnx.NodeProto) -> str | None:
    """Return what is wrong with a node of the domain."""
    operator = OPERATORS.get(node.op_type)
    if operator is None:
        return f"there is no such operator in {DOMAIN}; choose one of {', '.join(OPERATORS)}"
    for attribute in node.attribute:
        name = attribute.name
        if name not in operator.attributes:
            close = difflib.get_close_matches(name, operator.attributes, n=1)
            known = ", ".join(operator.attributes)
            hint = f"did you mean {close[0]}?" if close else f"there are {known}"
            return f"attribute {name} is unknown; {hint}"
        default = operator.attributes[name]
        kind = helper.make_attribute(name, 0 if default is None else default).type
        if attribute.type != kind:
            return f"attribute {name} must be {onnx.AttributeProto.AttributeType.Name(kind)}"
    required = {name for name, default in operator.attributes.items() if default is None}
    if missing := required - {attribute.name for attribute in node.attribute}:
        return f"attribute {min(missing)} is missing"
    for ends, given, all_of in (
        ("inputs", node.input, operator.inputs),
        ("outputs", node.output, operator.outputs),
    ):
        if len(given) > len(all_of):
            return f"it has {len(given)} {ends}, of at most {len(all_of)}"
    return None

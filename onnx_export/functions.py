"""The operators of the domain ``nsq`` as functions of standard ONNX operators."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from nsq_ref.environment import extra
from onnx_export.attention_function import attention
from onnx_export.codec_functions import DOMAIN, VERSION, dequantize, quantize, scheme_attributes

with extra("onnx", __name__):
    import onnx

__all__ = ["DOMAIN", "VERSION", "check_nodes", "functions", "scheme_attributes"]


def functions(opset: int = 21) -> list[onnx.FunctionProto]:
    """Return every function of the domain.

    A model that carries them runs wherever standard operators run; where a library has kernels of
    the same names, these run instead.

    Parameters
    ----------
    opset : int
        Of the standard operators, at least 21, as in the model.

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
    return [quantize(opset), dequantize(opset), attention(opset)]


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
    >>> from onnx_export.codec import quantize_model
    >>> model = quantize_model(Scheme())
    >>> check_nodes(model)
    >>> model.graph.node[0].attribute[0].name = "bitz"
    >>> check_nodes(model)
    Traceback (most recent call last):
      ...
    ValueError: Quantize that makes packed: attribute bitz is unknown; did you mean bits?
    """
    known = {function.name: function for function in functions()}
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in _all_nodes(nodes):
            if node.domain == DOMAIN and (problem := _problem(node, known)):
                made = next(filter(None, node.output), "nothing")
                raise ValueError(f"{node.op_type} that makes {made}: {problem}")


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _all_nodes(graph.node)


def _problem(node: onnx.NodeProto, known: dict[str, onnx.FunctionProto]) -> str | None:
    """Return what is wrong with a node of the domain."""
    function = known.get(node.op_type)
    if function is None:
        return f"there is no such operator in {DOMAIN}; choose one of {', '.join(known)}"
    # Those without a default are integers.
    kinds = dict.fromkeys(function.attribute, onnx.AttributeProto.INT)
    kinds |= {default.name: default.type for default in function.attribute_proto}
    for attribute in node.attribute:
        name = attribute.name
        if name not in kinds:
            close = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(kinds)}"
            return f"attribute {name} is unknown; {hint}"
        if attribute.type != kinds[name]:
            kind = onnx.AttributeProto.AttributeType.Name(kinds[name])
            return f"attribute {name} must be {kind}"
    if missing := set(function.attribute) - {attribute.name for attribute in node.attribute}:
        return f"attribute {min(missing)} is missing"
    for kind, given, all_of in (
        ("inputs", node.input, function.input),
        ("outputs", node.output, function.output),
    ):
        if len(given) > len(all_of):
            return f"it has {len(given)} {kind}, of at most {len(all_of)}"
    return None

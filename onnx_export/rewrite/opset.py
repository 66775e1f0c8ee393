"""Raising the opset of a model to that of the functions of ``nsq``.

A function is inlined into the graph, and ONNX Runtime reads its nodes by the opset of the model,
whatever the function imports. So the model's own nodes must mean the same in both opsets. Between
13 and 24 most operators only learnt further dtypes; of the others, reductions are brought into
their new form, where axes are an input, and what else there is, is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, MutableSequence

from nsq_ref.extras import extra
from onnx_export.operators.attention import SCATTER_OPSET
from onnx_export.operators.nodes import all_nodes
from onnx_export.operators.schema import IR_VERSION, OPSET

with extra("rewrite", __name__):
    import onnx
    from onnx import defs, helper

__all__ = ["NEWEST", "raise_opset", "require_raisable"]

OLDEST = 13
NEWEST = SCATTER_OPSET
STANDARD = ("", "ai.onnx")

SAME_MEANING = frozenset(
    {
        "Add", "BatchNormalization", "Cast", "CastLike", "Constant", "ConstantOfShape", "CumSum",
        "DequantizeLinear", "Div", "Equal", "Flatten", "GreaterOrEqual", "HardSwish", "Identity",
        "If", "IsInf", "IsNaN", "LeakyRelu", "LessOrEqual", "Loop", "Mul", "Pad", "Pow",
        "QuantizeLinear", "Relu", "Reshape", "Scan", "ScatterElements", "ScatterND", "Shape",
        "Size", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
    }
)  # fmt: skip
"""Operators whose later versions add dtypes, or attributes whose defaults are the old meaning."""

FURTHER_DTYPES = frozenset(
    {
        "Conv", "ConvTranspose", "Cos", "Dropout", "Elu", "EyeLike", "GRU", "GlobalAveragePool",
        "GlobalMaxPool", "HardSigmoid", "InstanceNormalization", "LSTM", "LpNormalization", "Mish",
        "Round", "Selu", "Sin", "Softplus", "Softsign", "SplitToSequence", "Tan", "TopK",
    }
)  # fmt: skip
"""Operators of which versions 22 to 24 say the same of more dtypes; older versions may not."""

REDUCTIONS = frozenset(
    {
        "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
        "ReduceMin", "ReduceProd", "ReduceSumSquare",
    }
)  # fmt: skip
AXES_ARE_AN_INPUT = 18


def require_raisable(
    model: onnx.ModelProto, opset: int = OPSET, *, without: Collection[str] = ()
) -> None:
    """Refuse a model whose opset cannot be raised without changing what it means.

    Parameters
    ----------
    model : onnx.ModelProto
    opset : int
        To which it is to be raised, if it is older.
    without : collection of str
        First outputs of nodes that are going to be replaced.

    Raises
    ------
    ValueError
        That names the operator.
    """
    has = _standard(model).version
    if has >= opset:
        return
    remedy = f"convert it to opset {opset} first, with onnx.version_converter or by a new export"
    if has < OLDEST:
        raise ValueError(f"the model has opset {has}; {remedy}")
    for node in _all(model):
        if node.domain not in STANDARD or (node.output and node.output[0] in without):
            continue
        known = SAME_MEANING | REDUCTIONS | ({"Split"} if len(node.input) == 2 else set())
        steps = ((has, OPSET, known), (max(has, OPSET), opset, SAME_MEANING | FURTHER_DTYPES))
        for old, new, same in steps:
            if node.op_type not in same and _changed(node.op_type, old, new):
                raise ValueError(
                    f"the model has opset {has}, in which {node.op_type} ({node.name}) may mean "
                    f"something else than in {opset}; {remedy}"
                )


def raise_opset(model: onnx.ModelProto, opset: int = OPSET) -> int:
    """Raise the opset of a model that `require_raisable` lets pass, in place, and return it.

    Nodes change only where axes of a reduction become an input.
    """
    standard = _standard(model)
    before, opset = standard.version, max(standard.version, opset)
    if before < AXES_ARE_AN_INPUT:
        _with_axes_as_inputs(model.graph.node, "nsq_axes")
        for number, function in enumerate(model.functions):
            _with_axes_as_inputs(function.node, f"nsq_axes_{number}")
    standard.version = opset
    for function in model.functions:
        for one in function.opset_import:
            if one.domain in STANDARD:
                one.version = opset
    model.ir_version = max(model.ir_version, IR_VERSION)
    return opset


def _standard(model: onnx.ModelProto) -> onnx.OperatorSetIdProto:
    standard: list[onnx.OperatorSetIdProto] = [
        one for one in model.opset_import if one.domain in STANDARD
    ]
    if not standard:
        raise ValueError("the model states no opset of the standard operators")
    return standard[0]


def _changed(operator: str, before: int, after: int) -> bool:
    """Whether an operator has another version in the newer of two opsets."""
    if after <= before:
        return False
    try:
        old, new = (
            defs.get_schema(operator, max_inclusive_version=version, domain="").since_version
            for version in (before, after)
        )
    except defs.SchemaError:
        return False  # in no opset: of onnxruntime, as SimplifiedLayerNormalization
    return bool(old != new)


def _all(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from all_nodes(model.graph.node)
    for function in model.functions:
        yield from all_nodes(function.node)


def _with_axes_as_inputs(nodes: MutableSequence[onnx.NodeProto], prefix: str) -> None:
    """Give reductions their axes as constants, each made before its node."""
    made = []
    for number, node in enumerate(nodes):
        name = f"{prefix}_{number}"
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                _with_axes_as_inputs(graph.node, f"{name}_{attribute.name}")
        if node.op_type not in REDUCTIONS or node.domain not in STANDARD:
            continue
        for attribute in [one for one in node.attribute if one.name == "axes"]:
            made.append((number, name, list(attribute.ints)))
            node.input.append(name)
            node.attribute.remove(attribute)
    for number, name, values in reversed(made):
        nodes.insert(number, helper.make_node("Constant", [], [name], value_ints=values))

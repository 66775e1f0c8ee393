"""Attention written as MatMul, Softmax, MatMul over a past that new tokens are concatenated to."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nsq_ref.extras import extra
from onnx_export.rewrite.evaluate import Seen, evaluate
from onnx_export.rewrite.found import Bias, Found, Refused, Tokens
from onnx_export.rewrite.graph import Graph
from onnx_export.rewrite.patterns.traced import (
    NotUnderstoodError,
    by_tokens,
    cache_dtype,
    cached,
    constant_factor,
    mask_shape,
    query_shape,
    refused,
    require_dtypes,
    require_unscaled,
    same_number,
    scaled,
    trace,
)
from onnx_export.rewrite.probe import MOVING, probes

with extra("rewrite", __name__):
    import onnx_ir as ir

__all__ = ["ANCHORS", "match"]

NAME = "MatMul-Softmax-MatMul"
ANCHORS = frozenset({("", "Softmax")})
OLDEST = 13  # opset: Softmax along one axis
PLAIN = frozenset({"Cast", "Identity"})
FUSED = ("com.microsoft", "FusedMatMul")  # of onnxruntime's optimizers
HIDDEN = -1e4  # scores that are set to less have no weight


class Scores(NamedTuple):
    """What stands between the product of queries and keys and the softmax."""

    product: ir.Node
    factor: float = 1.0
    softcap: float | None = None
    added: tuple[Bias, ...] = ()
    mask: ir.Value | None = None
    mask_hides: bool = False
    sinks: ir.Value | None = None


class Fused(NamedTuple):
    """What a product does besides: take keys as they are in the cache, and scale."""

    transposed: bool = False
    factor: float = 1.0


def match(node: ir.Node, graph: Graph) -> Found | Refused | None:
    """Read the nodes around a Softmax."""
    try:
        return _match(node, graph)
    except NotUnderstoodError as error:
        product = _product(graph, node.inputs[0])
        try:
            last = _values_product(graph, node)
        except NotUnderstoodError:
            last = None
        operands = [None if one is None else one.inputs[1] for one in (product, last)]
        return refused(graph, node, str(error), *operands)


def _match(node: ir.Node, graph: Graph) -> Found | None:
    given = node.inputs[0]
    if given is None or (product := _product(graph, given)) is None:
        return None
    behind_keys = trace(graph, product.inputs[1])
    if behind_keys is None or behind_keys.node.op_type != "Concat":
        return None
    if graph.opset < OLDEST:
        raise NotUnderstoodError(f"Softmax of opset {graph.opset}; convert the model to {OLDEST}")
    axis, rank = node.attributes.get_int("axis", -1), graph.rank(given)
    if axis != -1 and (rank is None or axis != rank - 1):
        raise NotUnderstoodError("its Softmax is not along the last axis")
    scores = _scores(graph, given)
    last = _values_product(graph, node, sinks=scores.sinks is not None)
    behind_values = trace(graph, last.inputs[1])
    if behind_values is None:
        raise NotUnderstoodError("its values are in no cache")
    queries = scores.product.inputs[0]
    if queries is None:
        raise NotUnderstoodError("it has no queries")
    queries, first_factor = _by_head(graph, queries)
    query, query_factor = scaled(graph, queries)
    heads, head_dim = query_shape(graph, queries)
    if query_shape(graph, query) != (heads, head_dim):
        query, query_factor = queries, 1.0
    query_factor *= first_factor
    fused = _fused(scores.product)
    keys = cached(graph, behind_keys, "BNSD" if fused.transposed else "BNDS")
    values = cached(graph, behind_values, "BNSD")
    kv_heads = keys.heads
    if keys.channels != head_dim:
        raise NotUnderstoodError(f"queries have {head_dim} channels, keys {keys.channels}")
    for side, given_by in (("keys", keys), ("values", values)):
        made = given_by.heads * given_by.repeats
        if given_by.heads != kv_heads or made not in (heads, 1):  # one serves all queries
            raise NotUnderstoodError(
                f"{heads} heads of queries meet {made} of {side}, from {given_by.heads} in their "
                "cache"
            )
    require_unscaled(values)
    dtype = cache_dtype(graph, keys.cache)
    for one in scores.added:
        mask_shape(graph, one.value, heads, flat=one.flat)
        require_dtypes(graph, dtype, mask=one.value)
    if scores.mask is not None:
        mask_shape(graph, scores.mask, heads)
    sink = None if scores.sinks is None else _sink(graph, scores.sinks, heads)
    nodes = [*behind_keys.nodes, *behind_values.nodes, last]
    if len(_seen_shape(graph, last.outputs[0])) == 3:
        nodes.append(_unmerged(graph, last.outputs[0]))
    output = Tokens(nodes[-1].outputs[0], "BNSD")
    require_dtypes(
        graph, dtype, queries=query, keys=keys.new.value, values=values.new.value, sinks=sink,
        output=output.value,
    )  # fmt: skip
    if (after := _by_token(graph, output.value)) is not None:
        output = Tokens(after.outputs[0], "BSND")
        nodes.append(after)
    return Found(
        pattern=NAME,
        node=nodes[-1],
        nodes=tuple(nodes),
        query=by_tokens(graph, query, "BNSD"),
        key=keys.new,
        value=values.new,
        output=output,
        key_cache=keys.cache,
        value_cache=values.cache,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=values.channels,
        dtype=dtype,
        scale=scores.factor * fused.factor * query_factor * keys.factor,
        causal=False,  # the mask says what is seen, or nothing does
        softcap=scores.softcap,
        added=scores.added,
        mask=scores.mask,
        mask_hides=scores.mask_hides,
        head_sink=sink,
    )


def _fused(product: ir.Node) -> Fused:
    if (product.domain, product.op_type) != FUSED:
        return Fused()
    attributes = product.attributes
    for name in ("transA", "transBatchA", "transBatchB"):
        if attributes.get_int(name, 0):
            raise NotUnderstoodError(f"FusedMatMul {product.name} has {name}")
    return Fused(attributes.get_int("transB", 0) == 1, attributes.get_float("alpha", 1.0))


def _by_token(graph: Graph, value: ir.Value) -> ir.Node | None:
    """Return the Transpose that brings heads behind tokens, if nothing else reads the value."""
    users = [user for user, _ in graph.users(value)]
    if len(users) != 1 or value.is_graph_output() or users[0].op_type != "Transpose":
        return None
    perm = users[0].attributes.get_ints("perm", None)
    return users[0] if not users[0].domain and perm == (0, 2, 1, 3) else None


def _product(graph: Graph, value: ir.Value | None, depth: int = 12) -> ir.Node | None:
    """Return the MatMul that scores come from, whatever is done to them."""
    if value is None:
        return None
    for _ in range(depth):
        node = value.producer()
        if node is not None and (node.domain, node.op_type) == FUSED:
            return node
        if node is None or node.domain:
            return None
        if node.op_type == "MatMul":
            weights = any(graph.constant(one) is not None or _is_weight(one) for one in node.inputs)
            return None if weights else node
        if node.op_type in PLAIN | {
            "Tanh",
            "Mul",
            "Div",
            "Add",
            "Where",
            "Reshape",
            "Sub",
            "Concat",
        }:
            first = 1 if node.op_type == "Where" else 0
            most = 1 if node.op_type in ("Reshape", "Sub", "Concat") else None
            for one in node.inputs[first:most]:
                if one is not None and (found := _product(graph, one, depth - 1)) is not None:
                    return found
        return None
    return None


def _is_weight(value: ir.Value | None) -> bool:
    return value is None or value.is_initializer()


def _scores(graph: Graph, value: ir.Value) -> Scores:
    """Read from the softmax back to the product of queries and keys."""
    factor, softcap = 1.0, None
    added: list[Bias] = []
    mask: ir.Value | None = None
    mask_hides = False
    value, sinks = _with_sinks(graph, value)
    while True:
        node = value.producer()
        if node is None:
            raise NotUnderstoodError("its scores come from nowhere")
        if node.op_type == "MatMul" or (node.domain, node.op_type) == FUSED:
            return Scores(node, factor, softcap, tuple(added), mask, mask_hides, sinks)
        if node.op_type == "Reshape" and _merges(graph, node):
            value = _first(node)
            continue
        if node.op_type in PLAIN:
            value = _first(node)
            continue
        if node.op_type in ("Add", "Where"):
            if softcap is not None:
                raise NotUnderstoodError(
                    f"{node.op_type} {node.name} masks scores before their softcap"
                )
            if node.op_type == "Add":
                value, bias = _biased(graph, node)
                flat = len(_seen_shape(graph, node.outputs[0])) == 3
                shape = _seen_shape(graph, bias)
                added.append(Bias(bias, factor, flat and len(shape) == 3 and shape[0] != 1))
                continue
            if mask is not None:
                raise NotUnderstoodError(f"Where {node.name} is a second mask")
            value, mask, mask_hides = _masked(graph, node, factor)
            continue
        touched = softcap is not None or factor != 1.0
        number, index = constant_factor(graph, node)
        if number is None or node.inputs[index] is None:
            raise NotUnderstoodError(f"{node.op_type} {node.name} in its scores is not understood")
        source = graph.source(node.inputs[index], through=PLAIN)
        if source is not None and source.op_type == "Tanh" and not source.domain:
            if touched:
                raise NotUnderstoodError(
                    f"{node.op_type} {node.name} scales scores after their softcap"
                )
            inner = source.inputs[0]
            before = None if inner is None else graph.source(inner, through=PLAIN)
            small, at = (None, 0) if before is None else constant_factor(graph, before)
            if before is None or small is None or not math.isclose(small * number, 1, rel_tol=1e-5):
                raise NotUnderstoodError(f"Tanh {source.name} in its scores is no softcap")
            softcap, value = number, before.inputs[at]  # type: ignore[assignment]
            continue
        factor *= number
        value = node.inputs[index]  # type: ignore[assignment]


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    if value is None:
        raise NotUnderstoodError(f"{node.op_type} {node.name} has no input")
    return value


def _biased(graph: Graph, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Return the scores and what is added to them."""
    inputs = [one for one in node.inputs if one is not None]
    scores = [one for one in inputs if _product(graph, one) is not None]
    others = [one for one in inputs if one not in scores]
    if len(scores) != 1 or len(others) != 1:
        raise NotUnderstoodError(f"Add {node.name} adds up scores")
    return scores[0], others[0]


def _masked(graph: Graph, node: ir.Node, factor: float) -> tuple[ir.Value, ir.Value, bool]:
    """Return the scores, the mask, and whether it says what is hidden instead of what is seen."""
    condition, *both = node.inputs
    for scores, low, hides in ((both[0], both[1], False), (both[1], both[0], True)):
        number = same_number(graph, low)
        if number is None or number * factor > HIDDEN or _product(graph, scores) is None:
            continue
        if scores is not None and condition is not None:
            return scores, condition, hides
    raise NotUnderstoodError(f"Where {node.name} in its scores is not understood")


def _values_product(graph: Graph, node: ir.Node, *, sinks: bool = False) -> ir.Node:
    """Return the MatMul of weights and values, behind Casts, Where(IsNaN), and without sinks."""
    value, cut = node.outputs[0], not sinks
    for _ in range(8):
        users = [user for user, _ in graph.users(value)]
        for user, index in graph.users(value):
            if user.op_type == "MatMul" and index == 0 and not user.domain and cut:
                return user
        guards = [one for one in users if one.op_type == "Where" and _guards(graph, one, value)]
        plain = [one for one in users if one.op_type in PLAIN and not one.domain]
        plain += [one for one in users if one.op_type == "Reshape" and _merges(graph, one)]
        slices = [one for one in users if not cut and _cuts_last(graph, one)]
        following = guards or slices or plain
        if len(following) != 1:
            break
        cut = cut or bool(slices)
        value = following[0].outputs[0]
    raise NotUnderstoodError("its weights are multiplied with no values")


# --- sinks ---------------------------------------------------------------------------------------


def _with_sinks(graph: Graph, value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Return scores, and the column behind them that takes weight and gives no value."""
    node = graph.source(value, through=PLAIN)
    if node is not None and node.op_type == "Sub" and not node.domain:
        top = graph.source(node.inputs[1], through=PLAIN)
        if top is not None and top.op_type == "ReduceMax" and top.inputs[0] is node.inputs[0]:
            value = _first(node)  # a softmax stays the same without what it subtracts from a row
            node = graph.source(value, through=PLAIN)
            axis = graph.integers(top.inputs[1]) if len(top.inputs) > 1 else None
            if (axis or list(top.attributes.get_ints("axes", ()))) not in ([-1], [3]):
                raise NotUnderstoodError(f"ReduceMax {top.name} is not along the last axis")
    if node is None or node.op_type != "Concat" or node.domain or len(node.inputs) != 2:
        return value, None
    if node.attributes.get_int("axis", 0) not in (-1, 3):
        raise NotUnderstoodError(f"Concat {node.name} in its scores is not understood")
    return _first(node), node.inputs[1]


def _sink(graph: Graph, sinks: ir.Value, heads: int) -> ir.Value:
    """Return one number a head, of which a column of scores is made."""
    for probe in probes(graph):
        seen = probe.value(sinks)
        if seen is None or seen.shape != (probe.batch, heads, probe.new, 1) or not seen.known:
            raise NotUnderstoodError(f"what joins its scores, {sinks.name}, is no number a head")
        if not np.array_equal(seen.array, np.broadcast_to(seen.array[:1, :, :1], seen.shape)):
            raise NotUnderstoodError(f"what joins its scores, {sinks.name}, is no number a head")
    value = graph.origin(sinks, through=MOVING)
    if math.prod(_seen_shape(graph, value)) != heads:
        raise NotUnderstoodError(f"what joins its scores, {value.name}, is no number a head")
    return value


def _cuts_last(graph: Graph, node: ir.Node) -> bool:
    """Whether Slice drops the last column, and nothing else."""
    if node.op_type != "Slice" or node.domain:
        return False
    for probe in probes(graph):
        seen = [None if one is None else probe.value(one) for one in node.inputs]
        if seen[0] is None:
            return False
        numbers = np.arange(seen[0].array.size).reshape(seen[0].shape)
        made = next(iter(evaluate(node, [Seen(numbers), *seen[1:]])), None)
        if made is None or not made.known or not np.array_equal(made.array, numbers[..., :-1]):
            return False
    return True


# --- batch and heads as one axis -----------------------------------------------------------------


def _seen_shape(graph: Graph, value: ir.Value) -> tuple[int, ...]:
    seen = probes(graph)[0].value(value)
    return () if seen is None else seen.shape


def _merges(graph: Graph, node: ir.Node) -> bool:
    """Whether Reshape makes one axis of batch and heads, two again, or leaves all as it is."""
    if node.domain or node.inputs[0] is None:
        return False
    for probe in probes(graph):
        both = probe.value(node.inputs[0]), probe.value(node.outputs[0])
        if both[0] is None or both[1] is None:
            return False
        flat, whole = sorted((one.shape for one in both if one is not None), key=len)
        if flat == whole:
            continue
        if (len(flat), len(whole)) != (3, 4) or flat[1:] != whole[2:]:
            return False
        if whole[0] != probe.batch or flat[0] != whole[0] * whole[1]:
            return False
    return True


def _by_head(graph: Graph, value: ir.Value) -> tuple[ir.Value, float]:
    """Return queries of four axes and what they were scaled with afterwards."""
    if len(_seen_shape(graph, value)) != 3:
        return value, 1.0
    before, factor = scaled(graph, value)
    node = graph.source(before, through=PLAIN)
    if node is None or node.op_type != "Reshape" or not _merges(graph, node):
        raise NotUnderstoodError(f"its queries {value.name} have batch and heads on one axis")
    return _first(node), factor


def _unmerged(graph: Graph, value: ir.Value) -> ir.Node:
    """Return the one node that gives an output its heads back."""
    users = [user for user, _ in graph.users(value) if user.op_type != "Shape"]
    if len(users) != 1 or users[0].op_type != "Reshape" or not _merges(graph, users[0]):
        raise NotUnderstoodError(f"its output {value.name} keeps batch and heads on one axis")
    return users[0]


def _guards(graph: Graph, node: ir.Node, value: ir.Value) -> bool:
    """Whether Where puts 0 for NaN of a value."""
    condition, zero, same = node.inputs
    test = graph.source(condition)
    return (
        same is value
        and test is not None
        and test.op_type == "IsNaN"
        and test.inputs[0] is value
        and same_number(graph, zero) == 0
    )

"""com.microsoft MultiHeadAttention: what the optimizer fuses, and builders fall back on.

The cache grows inside of the node, or before it by Concat; then heads may be repeated on the way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from onnx_export.rewrite.found import Cache, Found, Refused, Tokens
from onnx_export.rewrite.graph import Graph
from onnx_export.rewrite.patterns.traced import (
    Cached,
    NotUnderstoodError,
    Order,
    cached,
    refused,
    require_dtypes,
    require_unscaled,
    trace,
)
from onnx_export.rewrite.probe import axes_of, probes

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ANCHORS", "match"]

NAME = "MultiHeadAttention"
ANCHORS = frozenset({("com.microsoft", NAME)})

INPUTS = (
    "query", "key", "value", "bias", "key_padding_mask", "attention_bias", "past_key",
    "past_value", "past_sequence_length", "cache_indirection",
)  # fmt: skip
ATTRIBUTES = frozenset({"num_heads", "scale", "unidirectional", "mask_filter_value"})
NO_PLACE = {
    "past_sequence_length": "export the model with a cache that grows",
    "cache_indirection": "export the model without beams in its cache",
}
PADDING = (["batch", "total"], ["batch", "new", "total"])


def match(node: ir.Node, graph: Graph) -> Found | Refused | None:
    """Read one node; the length of the past is the extent of its tensor."""
    given = dict(zip(INPUTS, node.inputs, strict=False))
    past_key, past_value = given.get("past_key"), given.get("past_value")
    outside = past_key is None and past_value is None
    try:
        return _outside(node, graph, given) if outside else _inside(node, graph, given)
    except NotUnderstoodError as error:
        if outside:
            return refused(graph, node, str(error), given.get("key"), given.get("value"))
        caches = [
            Cache(past, present)
            for past, present in zip((past_key, past_value), node.outputs[1:3], strict=False)
            if past is not None and present.name
        ]
        return Refused(node, str(error), tuple(caches))


def _outside(node: ir.Node, graph: Graph, given: dict[str, ir.Value | None]) -> Found | None:
    """Read a cache that new tokens are concatenated to before the node."""
    behind = [trace(graph, given.get(name)) for name in ("key", "value")]
    keys, values = behind
    if keys is None or values is None:
        if keys is values:
            return None
        raise NotUnderstoodError("one of its keys and values is in no cache")
    query, heads = _known(node, graph, given)
    if {one.node.op_type for one in (keys, values)} != {"Concat"}:
        raise NotUnderstoodError("its cache has a fixed size; export the model with one that grows")
    if given.get("bias") is not None:
        raise NotUnderstoodError(
            "bias is given, and added to keys that are in the cache already; export the model with "
            "the biases of its projections as nodes of their own"
        )
    if node.attributes.get_int("unidirectional", 0):
        raise NotUnderstoodError(
            "unidirectional=1 without past_key: queries are counted from the first key on, which "
            "with a past is wrong; use attention_bias"
        )
    order: Order = "BNSD" if _rank(graph, given["key"]) == 4 else "BSH"
    sides = [cached(graph, one, order, heads=heads) for one in (keys, values)]
    for one in sides:
        if one.heads != sides[0].heads or one.heads * one.repeats != heads:
            raise NotUnderstoodError(f"{heads} heads of queries meet {one.heads} in its cache")
    require_unscaled(sides[1])
    return _found(node, graph, given, (query, heads), sides, (keys.node, values.node, node))


def _inside(node: ir.Node, graph: Graph, given: dict[str, ir.Value | None]) -> Found:
    """Read a past that the node itself appends to."""
    query, heads = _known(node, graph, given)
    sides = []
    for number, name in enumerate(("key", "value"), start=1):
        new, past = given.get(name), given.get(f"past_{name}")
        present = node.outputs[number] if len(node.outputs) > number else None
        if past is None or present is None or not present.name:
            raise NotUnderstoodError("it lacks a past, a present or its output")
        if new is None:
            raise NotUnderstoodError(
                "queries, keys and values are packed in one; export them apart"
            )
        cache = Cache(past, present)
        channels = _head_dim(graph, cache, new, heads)
        sides.append(Cached(cache, Tokens(new, "BSH"), heads, channels, 1, 1.0))
    if any(_rank(graph, one) not in (None, 3) for one in (given["key"], given["value"])):
        raise NotUnderstoodError("queries, keys or values have other than three axes")
    return _found(node, graph, given, (query, heads), sides, (node,))


def _known(node: ir.Node, graph: Graph, given: dict[str, ir.Value | None]) -> tuple[ir.Value, int]:
    """Return queries and their heads; refuse a node of which something has no place."""
    if unknown := sorted(set(node.attributes) - ATTRIBUTES):
        raise NotUnderstoodError(f"attribute {unknown[0]} is unknown")
    if any(one is not None for one in node.inputs[len(INPUTS) :]):
        raise NotUnderstoodError(f"it has {len(node.inputs)} inputs; {len(INPUTS)} are known")
    for name, remedy in NO_PLACE.items():
        if given.get(name) is not None:
            raise NotUnderstoodError(f"{name} is given; {remedy}")
    query, heads = given.get("query"), node.attributes.get_int("num_heads", 0)
    if query is None or not node.outputs[0].name:
        raise NotUnderstoodError("it lacks a past, a present or its output")
    if len(node.outputs) > 3 and node.outputs[3].name:
        raise NotUnderstoodError("it gives out its scores, which nsq.Attention does not")
    if _rank(graph, query) not in (None, 3):
        raise NotUnderstoodError("queries, keys or values have other than three axes")
    # A weight of exp(-1000) is 0 beside any other.
    if node.attributes.get_float("mask_filter_value", -10000.0) > -1000:
        raise NotUnderstoodError("mask_filter_value is so near to 0 that what it hides has weight")
    if heads < 1:
        raise NotUnderstoodError("num_heads is missing")
    padding = given.get("key_padding_mask")
    if padding is not None and axes_of(graph, padding) not in PADDING:
        raise NotUnderstoodError(
            f"key_padding_mask {padding.name} is not one number for every token, past and new; "
            "export the model with a mask that is added, attention_bias"
        )
    return query, heads


def _found(
    node: ir.Node,
    graph: Graph,
    given: dict[str, ir.Value | None],
    known: tuple[ir.Value, int],
    sides: list[Cached],
    nodes: tuple[ir.Node, ...],
) -> Found:
    (query, heads), (keys, values) = known, sides
    dtype = graph.model_dtype(keys.cache.past) or graph.model_dtype(keys.cache.present)
    if dtype is None:
        stated = graph.dtype(keys.cache.past) or "of a dtype that nobody states"
        raise NotUnderstoodError(f"its cache is {stated}; nsq.Attention has float32 and float16")
    bias = given.get("attention_bias")
    if len(nodes) > 1:
        require_dtypes(graph, dtype, keys=keys.new.value, values=values.new.value)
    scale = node.attributes.get_float("scale", 0.0) or None
    if not math.isclose(keys.factor, 1.0, rel_tol=1e-6):
        scale = (scale or 1 / math.sqrt(keys.channels)) * keys.factor
    return Found(
        pattern=NAME,
        node=node,
        nodes=nodes,
        query=Tokens(query, "BSH"),
        key=keys.new,
        value=values.new,
        output=Tokens(node.outputs[0], "BSH"),
        key_cache=keys.cache,
        value_cache=values.cache,
        heads=heads,
        kv_heads=keys.heads,
        head_dim=keys.channels,
        value_head_dim=values.channels,
        dtype=dtype,
        scale=scale,
        causal=node.attributes.get_int("unidirectional", 0) == 1,
        bias=bias,
        projection_bias=given.get("bias"),
        padding=given.get("key_padding_mask"),
    )


def _rank(graph: Graph, value: ir.Value | None) -> int | None:
    if value is None:
        return None
    if (rank := graph.rank(value)) is not None:
        return rank
    seen = probes(graph)[0].value(value)
    return None if seen is None else len(seen.shape)


def _head_dim(graph: Graph, cache: Cache, tokens: ir.Value, heads: int) -> int:
    """Return the size of the heads of keys or values, from the cache or from the weights."""
    for value in cache[:2]:
        if size := graph.size(value, 3):
            return size
    width = graph.width(tokens)
    if not width or width % heads:
        raise NotUnderstoodError(
            "the size of its heads is stated nowhere; give past_key a shape with a number last"
        )
    return width // heads

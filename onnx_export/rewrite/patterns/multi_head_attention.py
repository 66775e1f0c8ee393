"""com.microsoft MultiHeadAttention over a cache that grows: what the optimizer fuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_export.rewrite.found import Cache, Found, Refused, Tokens
from onnx_export.rewrite.graph import MODEL_DTYPES, Graph

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
    "bias": "export the model with the biases of its projections as nodes of their own",
    "key_padding_mask": "export the model with a mask that is added, attention_bias",
    "past_sequence_length": "export the model with a cache that grows",
    "cache_indirection": "export the model without beams in its cache",
}


def match(node: ir.Node, graph: Graph) -> Found | Refused | None:
    """Read one node; the length of the past is the extent of its tensor."""
    given = dict(zip(INPUTS, node.inputs, strict=False))
    past_key, past_value = given.get("past_key"), given.get("past_value")
    if past_key is None and past_value is None:
        return None
    outputs = [one if one.name else None for one in node.outputs]
    outputs += [None] * (4 - len(outputs))
    caches = [
        Cache(past, present)
        for past, present in zip((past_key, past_value), outputs[1:3], strict=True)
        if past is not None and present is not None
    ]

    def refused(reason: str) -> Refused:
        return Refused(node, reason, tuple(caches))

    if unknown := sorted(set(node.attributes) - ATTRIBUTES):
        return refused(f"attribute {unknown[0]} is unknown")
    if any(one is not None for one in node.inputs[len(INPUTS) :]):
        return refused(f"it has {len(node.inputs)} inputs; {len(INPUTS)} are known")
    for name, remedy in NO_PLACE.items():
        if given.get(name) is not None:
            return refused(f"{name} is given; {remedy}")
    query, key, value, output = (*(given.get(name) for name in INPUTS[:3]), outputs[0])
    if query is None or key is None or value is None:
        return refused("queries, keys and values are packed in one; export them apart")
    if len(caches) != 2 or output is None:
        return refused("it lacks a past, a present or its output")
    if outputs[3] is not None:
        return refused("it gives out its scores, which nsq.Attention does not")
    if any(graph.rank(one) not in (None, 3) for one in (query, key, value)):
        return refused("queries, keys or values have other than three axes")
    # A weight of exp(-1000) is 0 beside any other.
    if node.attributes.get_float("mask_filter_value", -10000.0) > -1000:
        return refused("mask_filter_value is so near to 0 that what it hides has weight")
    heads = node.attributes.get_int("num_heads", 0)
    if heads < 1:
        return refused("num_heads is missing")
    sizes = [
        _head_dim(graph, cache, part, heads)
        for cache, part in zip(caches, (key, value), strict=True)
    ]
    head_dim, value_head_dim = sizes
    if head_dim is None or value_head_dim is None:
        return refused(
            "the size of its heads is stated nowhere; give past_key a shape with a number last"
        )
    stated = next(filter(None, map(graph.dtype, caches[0][:2])), "of a dtype that nobody states")
    dtype = MODEL_DTYPES.get(stated)
    if dtype is None:
        return refused(f"its cache is {stated}; nsq.Attention has float32 and float16")
    return Found(
        pattern=NAME,
        node=node,
        nodes=(node,),
        query=Tokens(query, "BSH"),
        key=Tokens(key, "BSH"),
        value=Tokens(value, "BSH"),
        output=Tokens(output, "BSH"),
        key_cache=caches[0],
        value_cache=caches[1],
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        dtype=dtype,
        scale=node.attributes.get_float("scale", 0.0) or None,
        causal=node.attributes.get_int("unidirectional", 0) == 1,
        bias=given.get("attention_bias"),
    )


def _head_dim(graph: Graph, cache: Cache, tokens: ir.Value, heads: int) -> int | None:
    """Return the size of the heads of keys or values, from the cache or from the weights."""
    for value in cache[:2]:
        if size := graph.size(value, 3):
            return size
    width = graph.width(tokens)
    return width // heads if width and not width % heads else None

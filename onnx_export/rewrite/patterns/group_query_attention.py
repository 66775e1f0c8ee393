"""com.microsoft GroupQueryAttention, as onnxruntime-genai's builder and the optimizer emit it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_export.rewrite.found import Cache, Found, Lengths, Norm, Refused, Rotary, Tokens
from onnx_export.rewrite.graph import MODEL_DTYPES, Graph

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ANCHORS", "match"]

NAME = "GroupQueryAttention"
ANCHORS = frozenset({("com.microsoft", NAME)})

INPUTS = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length",
    "cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale",
    "q_norm_weight", "k_norm_weight", "query_seqlens",
)  # fmt: skip
ATTRIBUTES = frozenset(
    {
        "num_heads", "kv_num_heads", "scale", "softcap", "do_rotary", "rotary_interleaved",
        "local_window_size", "smooth_softmax", "causal", "sliding_window_cache", "qk_output",
        "k_quant_type", "v_quant_type", "kv_cache_bit_width", "qk_norm_epsilon", "q_norm_epsilon",
        "k_norm_epsilon",
    }
)  # fmt: skip
NO_PLACE = {
    "k_scale": "its cache is quantized already; export the model with a cache of floats",
    "v_scale": "its cache is quantized already; export the model with a cache of floats",
}


def match(node: ir.Node, graph: Graph) -> Found | Refused | None:
    """Read one node; the number of real tokens is that of ``seqlens_k``, row by row."""
    given = dict(zip(INPUTS, node.inputs, strict=False))
    if given.get("past_key") is None and given.get("past_value") is None:
        return None
    outputs = [one if one.name else None for one in node.outputs]
    outputs += [None] * (3 - len(outputs))
    window = node.attributes.get_int("local_window_size", -1)
    evicts = node.attributes.get_int("sliding_window_cache", 0) == 1
    caches = [
        Cache(past, present, capacity=window if evicts else None)
        for past, present in zip(
            (given.get("past_key"), given.get("past_value")), outputs[1:3], strict=True
        )
        if past is not None and present is not None
    ]
    if reason := _reason(node, given):
        return Refused(node, reason, tuple(caches))
    query, key, value = given["query"], given["key"], given["value"]
    if len(caches) != 2 or query is None or outputs[0] is None or given.get("seqlens_k") is None:
        return Refused(node, "it lacks a past, a present, the query or seqlens_k", tuple(caches))

    attributes = node.attributes
    heads, kv_heads = (attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        reason = f"num_heads={heads} is not a multiple of kv_num_heads={kv_heads}"
        return Refused(node, reason, tuple(caches))
    packed = key is None
    if packed != (value is None):
        return Refused(
            node, "it has one of key and value; it needs both, or neither", tuple(caches)
        )
    head_dim = _head_dim(graph, given, caches, heads, kv_heads)
    if head_dim is None:
        return Refused(
            node,
            "the size of its heads is stated nowhere; give past_key a shape with a number last",
            tuple(caches),
        )
    stated = next(filter(None, map(graph.dtype, caches[0][:2])), "of a dtype that nobody states")
    dtype = MODEL_DTYPES.get(stated)
    if dtype is None:
        reason = f"its cache is {stated}; nsq.Attention has float32 and float16"
        return Refused(node, reason, tuple(caches))

    rotary = None
    if attributes.get_int("do_rotary", 0):
        cos, sin = given.get("cos_cache"), given.get("sin_cache")
        if cos is None or sin is None:
            return Refused(node, "do_rotary=1 without cos_cache and sin_cache", tuple(caches))
        position_ids = given.get("position_ids")
        interleaved = attributes.get_int("rotary_interleaved", 0) == 1
        first = given.get("total_sequence_length") if position_ids is not None else None
        rotary = Rotary(cos, sin, interleaved, position_ids, first)
    sink = given.get("head_sink")
    return Found(
        pattern=NAME,
        node=node,
        nodes=(node,),
        query=Tokens(query, "BSH"),
        key=None if key is None else Tokens(key, "BSH"),
        value=None if value is None else Tokens(value, "BSH"),
        output=Tokens(outputs[0], "BSH"),
        key_cache=caches[0],
        value_cache=caches[1],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=head_dim,
        dtype=dtype,
        lengths=Lengths(total=given["seqlens_k"], total_offset=1, new=given.get("query_seqlens")),
        scale=attributes.get_float("scale", 0.0) or None,
        causal=attributes.get_int("causal", 1) == 1,
        softcap=attributes.get_float("softcap", 0.0) or None,
        sliding_window=window if window > 0 else None,
        rotary=rotary,
        bias=given.get("attention_bias"),
        head_sink=sink,
        # A sink of each head stands for the one of all.
        smooth_softmax=sink is None and attributes.get_int("smooth_softmax", 0) == 1,
        query_norm=_norm(node, given, "q"),
        key_norm=_norm(node, given, "k"),
    )


def _norm(node: ir.Node, given: dict[str, ir.Value | None], side: str) -> Norm | None:
    weight = given.get(f"{side}_norm_weight")
    if weight is None:
        return None
    both = node.attributes.get_float("qk_norm_epsilon", 1e-6)
    return Norm(weight, node.attributes.get_float(f"{side}_norm_epsilon", both))


def _reason(node: ir.Node, given: dict[str, ir.Value | None]) -> str | None:
    """Return what of the node has no place in nsq.Attention."""
    if unknown := sorted(set(node.attributes) - ATTRIBUTES):
        return f"attribute {unknown[0]} is unknown"
    if len(node.inputs) > len(INPUTS) and any(node.inputs[len(INPUTS) :]):
        return f"it has {len(node.inputs)} inputs; {len(INPUTS)} are known"
    for name in ("k_quant_type", "v_quant_type"):
        kind = node.attributes.get_string(name, "NONE")
        if kind not in ("", "NONE"):
            return f"{name} is {kind}; export the model with a cache of floats"
    if node.attributes.get_int("kv_cache_bit_width", 0):
        return "kv_cache_bit_width is set; export the model with a cache of floats"
    for name, reason in NO_PLACE.items():
        if given.get(name) is not None:
            return f"{name} is given: {reason}"
    if (given.get("q_norm_weight") is None) != (given.get("k_norm_weight") is None):
        return "it has one of q_norm_weight and k_norm_weight; it needs both, or neither"
    has_scores = len(node.outputs) > 3 and bool(node.outputs[3].name)
    if node.attributes.get_int("qk_output", 0) or has_scores:
        return "it gives out its scores (qk_output), which nsq.Attention does not"
    return None


def _head_dim(
    graph: Graph, given: dict[str, ir.Value | None], caches: list[Cache], heads: int, kv_heads: int
) -> int | None:
    """Return the size of the heads, from the caches or from the weights before the node."""
    for cache in caches:
        for value in cache[:2]:
            if size := graph.size(value, 3):
                return size
    for name, parts in (("value", kv_heads), ("key", kv_heads)):
        if (width := graph.width(given[name])) and not width % parts:
            return width // parts
    parts = heads + 2 * kv_heads if given["key"] is None else heads
    width = graph.width(given["query"])
    return width // parts if width and not width % parts else None

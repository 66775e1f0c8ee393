"""Attention of ONNX itself, opset 23 and 24: its past an input, concatenated, or scattered into."""

from __future__ import annotations

import math

from nsq_ref.extras import extra
from onnx_export.rewrite.found import Cache, Found, Lengths, Refused, Tokens
from onnx_export.rewrite.graph import Graph
from onnx_export.rewrite.patterns.traced import (
    Behind,
    Cached,
    NotUnderstoodError,
    by_tokens,
    cache_dtype,
    cached,
    mask_shape,
    query_shape,
    refused,
    require_dtypes,
    require_unscaled,
    trace,
)
from onnx_export.rewrite.probe import probes

with extra("rewrite", __name__):
    import onnx_ir as ir

__all__ = ["ANCHORS", "match"]

NAME = "Attention"
ANCHORS = frozenset({("", "Attention")})
INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
ATTRIBUTES = frozenset(
    {
        "is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap",
        "softmax_precision",
    }
)  # fmt: skip


def match(node: ir.Node, graph: Graph) -> Found | Refused | None:
    """Read one node.

    With ``nonpad_kv_seqlen``, new tokens of a row are what it counts beyond ``write_indices``, and
    a query sees the tokens up to its own. The operator puts the last of all queries at the last
    token that counts, so that rows that are padded on the right differ: there it is the original
    that looks at the wrong tokens.
    """
    try:
        return _match(node, graph)
    except NotUnderstoodError as error:
        given = dict(zip(INPUTS, node.inputs, strict=False))
        if (past := given.get("past_key")) is None:
            return refused(graph, node, str(error), given.get("K"), given.get("V"))
        values, made = given.get("past_value"), [one for one in node.outputs[1:3] if one.name]
        if values is None or len(made) != 2:
            return Refused(node, str(error))
        return Refused(node, str(error), (Cache(past, made[0]), Cache(values, made[1])))


def _match(node: ir.Node, graph: Graph) -> Found | None:
    given = dict(zip(INPUTS, node.inputs, strict=False))
    query, key, value = (given.get(name) for name in INPUTS[:3])
    if query is None or key is None or value is None:
        return None
    inside = given.get("past_key") is not None
    behind = None if inside else (trace(graph, key), trace(graph, value))
    if not inside and (behind is None or behind[0] is None):
        return None
    _require_known(node)
    rank = graph.rank(query) or _seen_rank(graph, query)
    if rank not in (3, 4):
        raise NotUnderstoodError(f"the rank of its queries {query.name} is not known")
    heads, head_dim = _query(graph, node, query, rank)
    causal = node.attributes.get_int("is_causal", 0) == 1
    lengths = Lengths()
    if inside:
        keys, values = _inside(graph, node, given, rank)
        nodes: tuple[ir.Node, ...] = (node,)
    else:
        key_behind, value_behind = behind or (None, None)
        if key_behind is None or value_behind is None:
            raise NotUnderstoodError("one of its keys and values is in no cache")
        keys, values = (_outside(graph, node, one, rank) for one in (key_behind, value_behind))
        nodes = (*key_behind.nodes, *value_behind.nodes, node)
        static = [one.node.op_type == "TensorScatter" for one in (key_behind, value_behind)]
        if any(static):
            lengths = _static(given, key_behind, value_behind)
        elif causal:
            raise NotUnderstoodError(
                "is_causal=1 without past_key: queries are counted from the first key on, which "
                "with a past is wrong; use an explicit mask"
            )
    for side, one in (("keys", keys), ("values", values)):
        if one.heads != keys.heads or heads % (one.heads * one.repeats) or heads % one.heads:
            raise NotUnderstoodError(f"{heads} heads of queries meet {one.heads} of {side}")
    if keys.channels != head_dim:
        raise NotUnderstoodError(f"queries have {head_dim} channels, keys {keys.channels}")
    require_unscaled(values)
    dtype = cache_dtype(graph, keys.cache)
    bias, mask = _mask(graph, given.get("attn_mask"), heads, static=lengths.past is not None)
    require_dtypes(
        graph, dtype, queries=query, keys=keys.new.value, values=values.new.value, mask=bias
    )
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(head_dim)
    return Found(
        pattern=NAME,
        node=node,
        nodes=nodes,
        query=Tokens(query, "BSH") if rank == 3 else by_tokens(graph, query, "BNSD"),
        key=keys.new,
        value=values.new,
        output=Tokens(node.outputs[0], "BSH" if rank == 3 else "BNSD"),
        key_cache=keys.cache,
        value_cache=values.cache,
        heads=heads,
        kv_heads=keys.heads,
        head_dim=head_dim,
        value_head_dim=values.channels,
        dtype=dtype,
        lengths=lengths,
        scale=scale * keys.factor,
        causal=causal,
        softcap=node.attributes.get_float("softcap", 0.0) or None,
        bias=bias,
        mask=mask,
    )


def _require_known(node: ir.Node) -> None:
    if unknown := sorted(set(node.attributes) - ATTRIBUTES):
        raise NotUnderstoodError(f"attribute {unknown[0]} is unknown")
    if any(node.inputs[len(INPUTS) :]):
        raise NotUnderstoodError(f"it has {len(node.inputs)} inputs; {len(INPUTS)} are known")
    if len(node.outputs) > 3 and node.outputs[3].name:
        raise NotUnderstoodError("it gives out its scores, which nsq.Attention does not")


def _seen_rank(graph: Graph, value: ir.Value) -> int | None:
    seen = probes(graph)[0].value(value)
    return None if seen is None else len(seen.shape)


def _query(graph: Graph, node: ir.Node, query: ir.Value, rank: int) -> tuple[int, int]:
    if rank == 4:
        return query_shape(graph, query)
    heads = node.attributes.get_int("q_num_heads", 0)
    seen = probes(graph)[0].value(query)
    width = graph.width(query) or (0 if seen is None else seen.shape[-1])
    if heads < 1 or not width or width % heads:
        raise NotUnderstoodError(f"the size of its heads is stated nowhere ({query.name})")
    return heads, width // heads


def _inside(
    graph: Graph, node: ir.Node, given: dict[str, ir.Value | None], rank: int
) -> tuple[Cached, Cached]:
    """Read a past that the node itself appends to."""
    if given.get("nonpad_kv_seqlen") is not None:
        raise NotUnderstoodError("it has a past and nonpad_kv_seqlen")
    outputs = [one if one.name else None for one in node.outputs]
    outputs += [None] * (3 - len(outputs))
    found = []
    for new, past, present in zip(
        (given["K"], given["V"]), (given["past_key"], given.get("past_value")), outputs[1:3],
        strict=True,
    ):  # fmt: skip
        if new is None or past is None or present is None:
            raise NotUnderstoodError("it lacks a past or a present")
        heads = _stated(graph, past, present, 1) or node.attributes.get_int("kv_num_heads", 0)
        channels = _stated(graph, past, present, 3)
        if not channels and rank == 3 and heads and (width := graph.width(new)):
            channels = width // heads
        if not heads or not channels:
            raise NotUnderstoodError(
                f"heads and channels of its cache {past.name} are stated nowhere"
            )
        tokens = Tokens(new, "BSH") if rank == 3 else by_tokens(graph, new, "BNSD")
        found.append(Cached(Cache(past, present), tokens, heads, channels, 1, 1.0))
    return found[0], found[1]


def _stated(graph: Graph, past: ir.Value, present: ir.Value, axis: int) -> int | None:
    return graph.size(past, axis) or graph.size(present, axis)


def _outside(graph: Graph, node: ir.Node, behind: Behind, rank: int) -> Cached:
    """Read a cache that keys or values are taken from."""
    heads = node.attributes.get_int("kv_num_heads", 0) or None
    return cached(graph, behind, "BSH" if rank == 3 else "BNSD", heads=heads)


def _static(given: dict[str, ir.Value | None], key: Behind, value: Behind) -> Lengths:
    """Read a cache of fixed size, into which new tokens are scattered."""
    total = given.get("nonpad_kv_seqlen")
    places = []
    for one in (key, value):
        if one.node.op_type != "TensorScatter":
            raise NotUnderstoodError("one of its caches grows, the other does not")
        mode = one.node.attributes.get_string("mode", "linear")
        if mode != "linear":
            raise NotUnderstoodError(f"TensorScatter {one.node.name} has mode {mode}")
        places.append(one.node.inputs[2] if len(one.node.inputs) > 2 else None)
    if total is None or places[0] is None or places[0] is not places[1]:
        raise NotUnderstoodError(
            "a cache of fixed size needs nonpad_kv_seqlen and one write_indices for keys and values"
        )
    return Lengths(past=places[0], total=total)


def _mask(
    graph: Graph, value: ir.Value | None, heads: int, *, static: bool
) -> tuple[ir.Value | None, ir.Value | None]:
    """Return what is added to the scores, or says what is seen."""
    if value is None:
        return None, None
    if static:
        raise NotUnderstoodError(
            "it has a mask over a cache of fixed size; use is_causal=1 without"
        )
    mask_shape(graph, value, heads)
    return (None, value) if graph.dtype(value) == "bool" else (value, None)

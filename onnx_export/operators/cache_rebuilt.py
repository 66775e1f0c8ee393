"""A cache that is made anew at every step, in operators of opset 21: right everywhere, and slow."""

from __future__ import annotations

import numpy as np

from onnx_export.operators.cache_body import (
    PARTS,
    Layout,
    Lengths,
    Span,
    coded_blocks,
    count,
    decoded_blocks,
    joined,
    layout_of,
    take,
    take_valid,
    unsealed,
    unsealed_tokens,
)
from onnx_export.operators.nodes import Nodes, Reference

__all__ = ["Rebuilt"]


class Rebuilt:
    """Keys or values, decoded: a `onnx_export.operators.cache_body.Cache`.

    Parameters
    ----------
    add : Nodes
    side : {"key", "value"}
    new : str
        Tensor [B, kv_heads, S, D], float32.
    lengths : Lengths
    span : Span

    Examples
    --------
    >>> add = Nodes()
    >>> lengths = Lengths("past", "new", "present")
    >>> keys = Rebuilt(add, "key", "new", lengths, Span("first", "end"))
    >>> keys.products(add, "query").startswith("MatMul")
    True
    """

    def __init__(self, add: Nodes, side: str, new: str, lengths: Lengths, span: Span) -> None:
        layout = layout_of(add, side, lengths)
        plain = unsealed(add, layout, new)
        past_tail = layout.past("tail")
        # Not 0 + these: onnxruntime 1.22 drops the addition of a constant without elements.
        first = add("Expand", count(add, layout.sinks), add("Shape", layout.before))
        sinks = unsealed_tokens(add, layout, plain, first)
        add("CastLike", sinks, past_tail, name=layout.present("sinks"))
        at_tail = add("Add", layout.first_tail, count(add, layout.block))
        tail = unsealed_tokens(add, layout, plain, at_tail)
        add("CastLike", tail, past_tail, name=layout.present("tail"))
        coded, _ = coded_blocks(add, layout, plain, new)
        parts = _stored(add, layout, coded)
        head_dim = add("Squeeze", add("Shape", new, start=3))
        decoded = decoded_blocks(add, layout, parts, head_dim, f"decoded_{side}")
        tokens = add("Concat", sinks, decoded, tail, axis=2)
        self._by_position = _by_position(add, layout, tokens, span)

    def products(self, add: Nodes, query: str) -> str:
        """Multiply query[B, kv_heads, rows, D] with every key: [B, kv_heads, rows, positions]."""
        return add("MatMul", query, add("Transpose", self._by_position, perm=[0, 1, 3, 2]))

    def mixed(self, add: Nodes, weights: str) -> str:
        """Add values up by weights[B, kv_heads, rows, positions]: [B, kv_heads, rows, D]."""
        return add("MatMul", weights, self._by_position)


def _stored(add: Nodes, layout: Layout, coded: dict[str, str]) -> dict[str, str]:
    """Store the blocks that are full, and return all parts, [B, kv_heads, capacity, of a block].

    What is behind the sealed blocks is 0, and so is what the scheme does not store.
    """
    side, capacity = layout.side, layout.capacity
    past = {part: layout.past(part) for part in PARTS}
    # Which blocks of each row are new, and where among the coded ones they are: [B, capacity].
    index = count(add, capacity)
    is_new = add(
        "And", add("Less", index, layout.sealed), add("GreaterOrEqual", index, layout.sealed_before)
    )
    source = add("Where", is_new, add("Sub", index, layout.sealed_before), 0)
    changed = add("Unsqueeze", is_new, [1, 3])
    kept = add("Unsqueeze", add("Less", index, layout.sealed_before), [1, 3])
    norm_dtype = Reference(f"{side}_norm_dtype", "int")

    def stored(add: Nodes, part: str, old: str, nothing: object) -> str:
        by_block = add("Concat", [0, 0], capacity, [-1], axis=0)
        cleared = add("Where", kept, add("Reshape", old, by_block), nothing)
        return add("Where", changed, take(add, coded[part], source), cleared)

    def norms(add: Nodes) -> str:
        first = add("Squeeze", add("Slice", past["packed"], [0], [1], [3]), [3])
        typed = add.cast(first, norm_dtype)
        old = add.cast(joined(add, past["norm"], typed, 2), "float32")
        return stored(add, "norm", old, np.float32(0))

    def zeros(add: Nodes) -> str:
        old = add.cast(joined(add, past["zero"], past["scale"], 2), "float32")
        return stored(add, "zero", old, np.float32(0))

    packed = stored(add, "packed", past["packed"], np.uint8(0))
    scale = stored(add, "scale", add.cast(past["scale"], "float32"), np.float32(0))
    tokens = add("Concat", add("Shape", packed, end=3), layout.block, axis=0)
    # By attributes: OptionalHasElement does not take bfloat16.
    has_norm = add("Equal", add.attribute(f"{side}_separate_norm", "int"), 1)
    has_zero = add("Equal", add.attribute(f"{side}_symmetric", "int"), 0)
    norm = add.choose(has_norm, norms, lambda add: add("Expand", np.float32(0), tokens))
    zero = add.choose(has_zero, zeros, lambda add: add("Mul", scale, np.float32(0)))
    for part, value, like in (
        ("packed", packed, "packed"),
        ("scale", scale, "scale"),
        ("zero", zero, "scale"),
    ):
        flat = add("Reshape", value, add("Shape", past[like]))
        add("CastLike", flat, past[like], name=layout.present(part))
    flat = add("Reshape", norm, add("Shape", past["packed"], end=3))
    add.cast(flat, norm_dtype, name=layout.present("norm"))
    return {"packed": packed, "scale": scale, "norm": norm, "zero": zero}


def _by_position(add: Nodes, layout: Layout, tokens: str, span: Span) -> str:
    """Bring sinks, all sealed tokens that there is room for, and the tail in order; 0 behind."""
    token = span.positions(add)
    first_free = add("Add", layout.sinks, add("Mul", layout.capacity, layout.block))
    from_tail = add("Add", first_free, add("Sub", token, layout.first_tail))
    index = add("Where", add("Less", token, layout.first_tail), token, from_tail)
    return take_valid(add, tokens, index, token, layout.after)

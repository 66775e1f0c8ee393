"""A cache that is appended to by TensorScatter, of opset 24, and attended to as it is stored.

Bind a present tensor to the memory of its past, and only what is new is written. Whoever reads the
past reads it before: what is scattered, or where, is made from that, and all else reads what is
present.
"""

from __future__ import annotations

import numpy as np

from onnx_export.operators import packed_products
from onnx_export.operators.cache_body import (
    LARGEST_INDEX,
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
    unsealed,
)
from onnx_export.operators.nodes import Nodes, Reference

__all__ = ["Scattered", "within_capacity"]

FEW_ROWS = 32  # of a query: for more, it is less to decode keys and values


def within_capacity(add: Nodes, lengths: Lengths) -> Lengths:
    """Return the lengths, so that an error ends a call before anything is written.

    Examples
    --------
    >>> within_capacity(Nodes(), Lengths("past", "new", "present")).past
    'past'
    """
    most = []
    for side in ("key", "value"):
        block, sinks = (
            add.attribute(f"{side}_{name}", "int") for name in ("block_size", "sink_tokens")
        )
        sealed = add("Squeeze", add("Shape", f"past_{side}_packed", start=2, end=3))
        most.append(add("Add", sealed, add("Add", block, sinks)))
    places = add("Range", 0, add("Min", *most), 1)
    return lengths._replace(present=add("Gather", places, lengths.present))


class Scattered:
    """Keys or values as they are stored: a `onnx_export.operators.cache_body.Cache`.

    Parameters
    ----------
    add : Nodes
    side : {"key", "value"}
    new : str
        Tensor [B, kv_heads, S, D], float32.
    lengths : Lengths
        As `within_capacity` returns them.
    span : Span
    always : frozenset of str
        Inputs of the function that every node has, though it might leave them out.

    Examples
    --------
    >>> add = Nodes()
    >>> lengths = within_capacity(add, Lengths("past", "new", "present"))
    >>> Scattered(add, "key", "new", lengths, Span("first", "end")).products(add, "query")[:6]
    'chosen'
    """

    def __init__(
        self,
        add: Nodes,
        side: str,
        new: str,
        lengths: Lengths,
        span: Span,
        always: frozenset[str] = frozenset(),
    ) -> None:
        self._layout = layout = layout_of(add, side, lengths)
        self._span = span
        self._head_dim = add("Squeeze", add("Shape", new, start=3))
        self._most_sealed = add("ReduceMax", layout.sealed, keepdims=0)
        before = add("Max", add("Sub", add("Unsqueeze", span.first, [0]), layout.sinks), 0)
        self._first_block = add("Div", before, layout.block)  # that any query sees, [1]
        self._skipped = add("Mul", self._first_block, layout.block)  # tokens
        self._blocks = add("Sub", self._most_sealed, add("Squeeze", self._first_block))
        least_sealed = add("ReduceMin", layout.sealed, keepdims=0)
        self._aligned = add("Equal", self._most_sealed, least_sealed)
        self._has_norm = add.attribute(f"{side}_separate_norm", "int")
        self._has_zero = add("Sub", 1, add.attribute(f"{side}_symmetric", "int"))
        _append(add, layout, new, self._has_norm, self._has_zero, always)
        self._direct = self._as_coded(add)

    def products(self, add: Nodes, query: str) -> str:
        """Multiply query[B, kv_heads, rows, D] with every key: [B, kv_heads, rows, positions]."""
        return add.choose(
            self._stays_coded(add, query),
            lambda add: self._coded_products(add, query),
            lambda add: _against(add, query, self._plain(add)),
        )

    def mixed(self, add: Nodes, weights: str) -> str:
        """Add values up by weights[B, kv_heads, rows, positions]: [B, kv_heads, rows, D]."""

        def plain(add: Nodes) -> str:
            is_real = add("Less", self._span.positions(add), self._layout.after)
            return add("MatMul", weights, _only(add, self._plain(add), is_real))

        stays_coded = self._stays_coded(add, weights)
        return add.choose(stays_coded, lambda add: self._coded_mixed(add, weights), plain)

    def _stays_coded(self, add: Nodes, rows: str) -> str:
        """Tell whether there are few rows, and blocks that need not be decoded for them."""
        number = add("Squeeze", add("Shape", rows, start=2, end=3))
        few = add("And", self._direct, add("LessOrEqual", number, FEW_ROWS))
        return add("And", few, add("Greater", self._blocks, 0))

    def _plain(self, add: Nodes) -> str:
        """Decode all positions, [B, kv_heads, positions, D]; anything where a row has none."""
        layout = self._layout
        sinks, tail = (add.cast(layout.present(part), "float32") for part in ("sinks", "tail"))
        sealed = add.choose(
            add("Greater", self._blocks, 0),
            self._decoded,
            lambda add: add("Slice", tail, [0], [0], [2]),
        )
        tokens = add("Concat", sinks, sealed, tail, axis=2)
        first, end = (add("Sub", one, self._skipped) for one in self._span)
        return add.choose(
            self._aligned,
            lambda add: add("Slice", tokens, first, end, [2]),
            lambda add: take(add, tokens, self._index(add)),
        )

    def _index(self, add: Nodes) -> str:
        """Return where positions are behind sinks, sealed tokens and tail, [B, positions]."""
        layout = self._layout
        token = self._span.positions(add)
        size = add("Add", layout.sinks, add("Mul", self._blocks, layout.block))
        from_tail = add("Add", size, add("Sub", token, layout.first_tail))
        sealed = add("Sub", token, self._skipped)
        index = add("Where", add("Less", token, layout.first_tail), sealed, from_tail)
        last = add("Sub", add("Add", size, layout.block), 1)  # of positions that a row lacks
        return add("Min", index, last)

    def _coded_products(self, add: Nodes, query: str) -> str:
        layout = self._layout
        packed, scale, zero, norm = self._sealed(add, "packed", "scale", "zero", "norm")
        zero = self._shift(add, scale, zero)
        found = packed_products.scores(add, layout.side, packed, scale, zero, query)
        sealed = self._with_norm(add, found, norm)
        sinks, tail = (
            _against(add, query, add.cast(layout.present(part), "float32"))
            for part in ("sinks", "tail")
        )
        products = add("Concat", sinks, sealed, tail, axis=3)
        first, end = (add("Sub", one, self._skipped) for one in self._span)
        return add.choose(
            self._aligned,
            lambda add: add("Slice", products, first, end, [3]),
            lambda add: _take_last(add, products, self._index(add)),
        )

    def _coded_mixed(self, add: Nodes, weights: str) -> str:
        layout = self._layout
        packed, scale, zero, norm = self._sealed(add, "packed", "scale", "zero", "norm")
        zero = self._shift(add, scale, zero)
        factors = self._with_norm(add, self._of_sealed(add, weights), norm)
        sealed = packed_products.outputs(add, layout.side, packed, scale, zero, factors)
        first = add("Unsqueeze", self._span.first, [0])
        end_sealed = add("Add", layout.sinks, add("Mul", self._most_sealed, layout.block))

        # Of the tail as much as any row has.
        tail = add("ReduceMax", add("Sub", layout.after, layout.first_tail), keepdims=0)
        at_tail = count(add, add("Max", tail, 0))
        from_first = add("Sub", add("Add", layout.first_tail, at_tail), first)

        def by_position(add: Nodes) -> str:
            last = add("Sub", add("Shape", weights, start=3), 1)
            return _take_last(add, weights, add("Max", add("Min", from_first, last), 0))

        is_whole = add("LessOrEqual", add("Squeeze", first), add("Squeeze", end_sealed))
        from_tail = add.choose(
            add("And", self._aligned, is_whole),
            lambda add: add("Slice", weights, add("Sub", end_sealed, first), [LARGEST_INDEX], [3]),
            by_position,
        )
        of_tail = add("Slice", layout.present("tail"), [0], add("Shape", at_tail, start=1), [2])
        start_sinks = add("Min", first, layout.sinks)
        sinks = add("Sub", layout.sinks, start_sinks)
        of_sinks = add("Slice", layout.present("sinks"), start_sinks, layout.sinks, [2])
        values = add.cast(add("Concat", of_sinks, of_tail, axis=2), "float32")
        at_sinks = add("Expand", count(add, sinks), add("Shape", layout.after))
        places = add("Concat", at_sinks, from_first, axis=1)
        is_real = add("Less", places, add("Sub", layout.after, first))
        is_real = add("And", is_real, add("GreaterOrEqual", places, 0))
        from_sinks = add("Slice", weights, [0], sinks, [3])
        of_plain = add("Concat", from_sinks, from_tail, axis=3)
        return add("Add", sealed, add("MatMul", of_plain, _only(add, values, is_real)))

    def _of_sealed(self, add: Nodes, weights: str) -> str:
        """Take the weights of sealed tokens, 0 where a row has none there."""
        layout = self._layout
        first = add("Unsqueeze", self._span.first, [0])
        begin = add("Add", layout.sinks, self._skipped)
        end = add("Add", layout.sinks, add("Mul", self._most_sealed, layout.block))
        start = add("Max", add("Sub", begin, first), 0)
        some = add("Slice", weights, start, add("Sub", end, first), [3])

        def whole(add: Nodes) -> str:
            """Add those of the first block that lie before all windows."""
            unseen = add("Max", add("Sub", first, begin), 0)
            return add("Pad", some, add("Concat", unseen, [0], axis=0), np.float32(0), [3])

        limited = add("Greater", add.attribute("sliding_window", "int"), 0)
        of_blocks = add.choose(limited, whole, lambda _: some)

        def only(add: Nodes) -> str:
            token = add("Add", count(add, add("Sub", end, begin)), begin)
            is_sealed = add("Unsqueeze", add("Less", token, layout.first_tail), [1, 2])
            return add("Where", is_sealed, of_blocks, np.float32(0))

        return add.choose(self._aligned, lambda _: of_blocks, only)

    def _as_coded(self, add: Nodes) -> str:
        """Tell whether directions are their codes times scales: then nothing need be decoded."""
        side = self._layout.side
        channel, *_ = add.is_one_of(f"{side}_axis", ["channel", "token"])
        is_norm, *_ = add.is_one_of(f"{side}_magnitude", ["norm", "gain", "lsq"])
        direct = add("Or", add("Equal", self._has_norm, 0), add("Not", is_norm))
        fits = add("LessOrEqual", self._layout.block, packed_products.LARGEST_BLOCK)
        return add("And", add("And", channel, direct), add("Squeeze", fits))

    def _shift(self, add: Nodes, scale: str, zero: str) -> str:
        """Return the zero, which a symmetric scheme has in the middle of its codes."""
        half = packed_products.half_of_codes(add, self._layout.side)
        return add.choose(
            add("Equal", self._has_zero, 1),
            lambda _: zero,
            lambda add: add("Mul", scale, add("Neg", half)),
        )

    def _with_norm(self, add: Nodes, numbers: str, norm: str) -> str:
        """Multiply [B, kv_heads, rows, tokens] with the factors of tokens, if there are such."""
        return add("Mul", numbers, add("Reshape", norm, [0, 0, 1, -1]))

    def _sealed(self, add: Nodes, *parts: str) -> list[str]:
        """Return parts of all blocks that may be seen, [B, kv_heads, n, block_size or 1, ...].

        Numbers are float32, and 0 where a row has no block; a norm is 1 where none is stored.
        """
        layout = self._layout
        end = add("Unsqueeze", self._most_sealed, [0])
        blocks = add("Unsqueeze", self._blocks, [0])
        index = add("Add", self._first_block, count(add, self._blocks))
        is_sealed = add("Unsqueeze", add("Less", index, layout.sealed), [1, 3])

        def own_blocks(add: Nodes, part: str) -> str:
            name, rows = layout.present(part), _rows(add, layout, part)
            ends = (add("Mul", one, rows) for one in (self._first_block, end))
            some = add("Slice", name, *ends, [2])
            shape = add("Concat", [0, 0], blocks, [-1], axis=0)
            return add("Reshape", some, shape)

        def numbers(add: Nodes, part: str) -> str:
            wide = add.cast(own_blocks(add, part), "float32")
            return add.choose(
                self._aligned,
                lambda _: wide,
                lambda add: add("Where", is_sealed, wide, np.float32(0)),
            )

        def ones(add: Nodes) -> str:
            tokens = add(
                "Concat", add("Shape", name_of("packed"), end=2), blocks, layout.block, axis=0
            )
            return add("Expand", np.float32(1), tokens)

        def name_of(part: str) -> str:
            return layout.present(part)

        found = []
        for part in parts:
            if part == "packed":
                shape = add("Concat", [0, 0], blocks, layout.block, [-1], axis=0)
                found.append(add("Reshape", own_blocks(add, part), shape))
            elif part == "norm":
                has = add("Equal", self._has_norm, 1)
                found.append(add.choose(has, lambda add: numbers(add, "norm"), ones))
            elif part == "zero":
                has = add("Equal", self._has_zero, 1)
                found.append(add.choose(has, lambda add: numbers(add, "zero"), lambda _: found[-1]))
            else:
                found.append(numbers(add, part))
        return found

    def _decoded(self, add: Nodes) -> str:
        """Decode all blocks that may be seen, [B, kv_heads, tokens, D]."""
        parts = ("packed", "norm", "scale", "zero")
        found = dict(zip(parts, self._sealed(add, *parts), strict=True))
        name = f"{self._head_dim}_decoded"
        return decoded_blocks(add, self._layout, found, self._head_dim, name)


def _only(add: Nodes, values: str, is_real: str) -> str:
    """Replace tokens of values by 0: behind the length anything may be, and 0 times that."""
    return add("Where", add("Unsqueeze", is_real, [1, 3]), values, np.float32(0))


def _against(add: Nodes, query: str, keys: str) -> str:
    return add("MatMul", query, add("Transpose", keys, perm=[0, 1, 3, 2]))


def _take_last(add: Nodes, x: str, index: str) -> str:
    """Pick ``index[B, m]`` of the last axis of ``x[B, kv_heads, rows, n]``."""
    by_token = add("Transpose", x, perm=[0, 1, 3, 2])
    return add("Transpose", take(add, by_token, index), perm=[0, 1, 3, 2])


def _rows(add: Nodes, layout: Layout, part: str) -> str:
    """Return how long the axis of tokens is in the stored part of a block, [1]."""
    if part in ("packed", "norm"):
        return layout.block
    by_token = add.is_one_of(f"{layout.side}_axis", ["token"])[0]
    return add("Where", by_token, layout.block, [1])


# --- the append ----------------------------------------------------------------------------------


def _append(
    add: Nodes, layout: Layout, new: str, has_norm: str, has_zero: str, always: frozenset[str]
) -> None:
    """Write what is new into the cache: sinks, blocks that became full, the tail."""
    side = layout.side
    tail, packed, scale = (layout.past(part) for part in ("tail", "packed", "scale"))
    norm_dtype = Reference(f"{side}_norm_dtype", "int")
    first = add("Squeeze", add("Slice", add("Slice", packed, [0], [0], [2]), [0], [1], [3]), [3])

    def known(part: str, like: str, has: str) -> str:
        """Return an input that may be absent: a tensor without tokens then."""
        if layout.past(part) in always:
            return layout.past(part)
        return add.choose(
            add("Greater", has, 0),
            lambda add: joined(add, layout.past(part), like, 2),
            lambda add: add("Slice", like, [0], [0], [2]),
            None,
        )

    typed = add.cast(first, norm_dtype)
    past = {
        "packed": packed,
        "scale": scale,
        "norm": known("norm", typed, has_norm),
        "zero": known("zero", scale, has_zero),
        "sinks": known("sinks", tail, add("Squeeze", layout.sinks)),
        "tail": tail,
    }

    # Tokens of the tail are new ones: those after it was sealed, or all of them.
    tokens = add("Shape", new, start=2, end=3)
    room = add("Min", tokens, layout.block)
    begin = add("Sub", add("Max", layout.before, layout.first_tail), layout.first_tail)
    at_tail = add("Min", begin, add("Sub", layout.block, room))
    tail_update = _plain_update(add, layout, new, tail, layout.first_tail, at_tail, room)
    sinks_room = add("Min", tokens, layout.sinks)
    at_sinks = add("Min", layout.before, add("Sub", layout.sinks, sinks_room))
    nowhere = add("Sub", layout.before, layout.before)
    sinks_update = _plain_update(add, layout, new, past["sinks"], nowhere, at_sinks, sinks_room)

    is_new = add("Sub", layout.sealed, layout.sealed_before)
    any_new = add("Greater", add("ReduceMax", is_new, keepdims=0), 0)

    def seal(add: Nodes) -> list[str]:
        coded, most = coded_blocks(add, layout, unsealed(add, layout, new), new)
        return [*coded.values(), add("Min", most, layout.capacity), at_tail, at_sinks]

    def keep(add: Nodes) -> list[str]:
        shape = add("Concat", add("Shape", new, end=2), [0], axis=0)
        nothing = []
        for part in PARTS:
            width = add("Mul", _rows(add, layout, part), _channels(add, past[part], part))
            empty = add("Expand", np.float32(0), add("Concat", shape, width, axis=0))
            nothing.append(add.cast(empty, "uint8") if part == "packed" else empty)
        return [*nothing, add("Sub", tokens, tokens), at_tail, at_sinks]

    # The tail is overwritten only after what it has was coded: so the place comes from there, too.
    kinds = ["uint8", "float32", "float32", "float32", "int64", "int64", "int64"]
    *coded, width, at_tail, at_sinks = add.choose_several(any_new, seal, keep, kinds)
    for part, fresh in zip(PARTS, coded, strict=True):
        has = {"norm": has_norm, "zero": has_zero}.get(part)
        _store(add, layout, part, past[part], fresh, width, has)
    for part, update, start in (("tail", tail_update, at_tail), ("sinks", sinks_update, at_sinks)):
        _scatter(add, layout, part, past[part], update, start)


def _plain_update(
    add: Nodes, layout: Layout, new: str, past: str, first: str, start: str, width: str
) -> str:
    """Return a window of the tail or the sinks, from slot ``start[B, 1]`` on, after the append.

    What is not new there stays as it is. ``first[B, 1]`` is the position of slot 0.
    """
    slot = add("Add", start, count(add, width))
    position = add("Add", first, slot)
    from_new = add("Sub", position, layout.before)
    is_new = add("And", add("GreaterOrEqual", from_new, 0), add("Less", position, layout.after))
    index = add("Where", is_new, add("Add", width, from_new), add("Sub", slot, start))
    both = add("Concat", take(add, past, slot), add("CastLike", new, past), axis=2)
    return take(add, both, index)


def _channels(add: Nodes, past: str, part: str) -> str:
    """Return what is behind the axis of tokens of a stored part, [1]."""
    return add.constant([1]) if part == "norm" else add("Shape", past, start=3)


def _store(
    add: Nodes,
    layout: Layout,
    part: str,
    past: str,
    coded: str,
    width: str,
    has: str | None,
) -> None:
    """Write a part of the blocks that became full, into a window of so many blocks.

    What is not new there stays as it is, to the last bit.
    """
    capacity, start = (
        layout.capacity,
        add("Min", layout.sealed_before, add("Sub", layout.capacity, width)),
    )
    if has is not None:  # else the past has no length
        capacity, width, start = (add("Mul", one, has) for one in (capacity, width, start))
    rows = _rows(add, layout, part)
    lead = add("Shape", past, end=2)
    of_a_block = add("Mul", rows, _channels(add, past, part))
    by_block = add("Concat", lead, capacity, of_a_block, axis=0)
    slot = add("Add", start, count(add, width))
    from_new = add("Sub", slot, layout.sealed_before)
    is_new = add("And", add("GreaterOrEqual", from_new, 0), add("Less", slot, layout.sealed))
    index = add("Where", is_new, add("Add", width, from_new), add("Sub", slot, start))
    kept = take(add, add("Reshape", past, by_block, allowzero=1), slot)
    both = add("Concat", kept, add("CastLike", coded, past), axis=2)
    flat = add("Concat", lead, add("Mul", width, rows), add("Shape", past, start=3), axis=0)
    update = add("Reshape", take(add, both, index), flat, allowzero=1)
    _scatter(add, layout, part, past, update, add("Mul", start, rows))


def _scatter(add: Nodes, layout: Layout, part: str, past: str, update: str, start: str) -> None:
    at = add("Squeeze", start, [1])
    add("TensorScatter", past, update, at, name=layout.present(part), axis=2)

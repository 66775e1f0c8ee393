"""What the bodies of nsq.Attention share: inputs that may be absent, lengths, blocks to seal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from onnx_export.operators.nodes import Nodes, Reference
from onnx_export.operators.schema import DEQUANTIZE, QUANTIZE

__all__ = [
    "LARGEST_INDEX", "NOTHING", "PARTS", "Cache", "Layout", "Lengths", "Span", "coded_blocks",
    "count", "decoded_blocks", "joined", "layout_of", "optional", "take", "take_valid", "unsealed",
    "unsealed_tokens", "widened",
]  # fmt: skip

LARGEST_INDEX = np.iinfo(np.int64).max
NOTHING = np.float32(-np.inf)  # the logarithm of a weight of 0
PARTS = ("packed", "scale", "norm", "zero")  # of a sealed block


class Lengths(NamedTuple):
    """Tokens of each row, int64 [B]: before the append, of the append, and after it."""

    past: str
    new: str
    present: str


class Span(NamedTuple):
    """Positions that some query may see, as int64 scalars: ``first`` is below ``end``."""

    first: str
    end: str

    def positions(self, add: Nodes) -> str:
        """Return them, [1, positions]."""
        return add("Unsqueeze", add("Range", self.first, self.end, 1), [0])


class Cache(Protocol):
    """Keys or values after the append, which the function's outputs have.

    Positions are those of a span, which ends with the longest row's last one. Where a row has none,
    a product says nothing, but what is mixed is 0 times the weight.
    """

    def __init__(self, add: Nodes, side: str, new: str, lengths: Lengths, span: Span) -> None:
        """Append float32 ``new[B, kv_heads, S, D]``, of which some is padding."""

    def products(self, add: Nodes, query: str) -> str:
        """Multiply query[B, kv_heads, rows, D] with every key: [B, kv_heads, rows, positions]."""

    def mixed(self, add: Nodes, weights: str) -> str:
        """Add values up by weights[B, kv_heads, rows, positions]: [B, kv_heads, rows, D]."""


class Layout(NamedTuple):
    """Where the tokens of keys or values are: sizes are int64 [1], those of rows [B, 1]."""

    side: str
    lengths: Lengths
    block: str  # tokens
    sinks: str  # tokens
    capacity: str  # blocks
    before: str  # tokens
    after: str
    sealed_before: str  # blocks
    sealed: str
    first_tail_before: str  # position
    first_tail: str

    def past(self, part: str) -> str:
        """Return the name of an input."""
        return f"past_{self.side}_{part}"

    def present(self, part: str) -> str:
        """Return the name of an output."""
        return f"present_{self.side}_{part}"


def layout_of(add: Nodes, side: str, lengths: Lengths) -> Layout:
    """Return the layout of keys or values; beyond the capacity an index is, and the runtime tells.

    Examples
    --------
    >>> layout_of(Nodes(), "key", Lengths("past", "new", "present")).past("packed")
    'past_key_packed'
    """
    block = add("Unsqueeze", add.attribute(f"{side}_block_size", "int"), [0])
    sinks = add("Unsqueeze", add.attribute(f"{side}_sink_tokens", "int"), [0])
    capacity = add("Div", add("Shape", f"past_{side}_packed", start=2, end=3), block)
    places = add("Range", 0, add("Squeeze", add("Add", capacity, 1)), 1)
    before, after = (add("Unsqueeze", one, [1]) for one in (lengths.past, lengths.present))
    sealed_before, sealed = (
        add("Gather", places, add("Div", add("Max", add("Sub", length, sinks), 0), block))
        for length in (before, after)
    )
    first_tail_before, first_tail = (
        add("Add", add("Mul", blocks, block), sinks) for blocks in (sealed_before, sealed)
    )
    return Layout(
        side, lengths, block, sinks, capacity, before, after, sealed_before, sealed,
        first_tail_before, first_tail,
    )  # fmt: skip


# --- what may be absent --------------------------------------------------------------------------


def optional(
    add: Nodes,
    name: str,
    then: Callable[[Nodes], str],
    otherwise: Callable[[Nodes], str],
    dtype: str = "float32",
) -> str:
    """Choose by whether the function has an input.

    Where it has not, ``then`` is not computed, but must pass the checks of ONNX, which take the
    name of an absent tensor only as an input of an operator with any number of inputs, and not as
    the first: begin with `joined` or `widened`. Its other inputs must be no constants, or the
    runtime computes it beforehand. The same holds where attributes say that there is an input.

    Examples
    --------
    >>> optional(Nodes(), "x", lambda add: joined(add, "x", "y", 0), lambda _: "y")
    'chosen_1_0'
    """
    return add.choose(add("OptionalHasElement", name), then, otherwise, dtype)


def joined(add: Nodes, name: str, like: str, axis: int) -> str:
    """Return an input of the function that may be absent; ``like`` has its dtype and other axes.

    Examples
    --------
    >>> joined(Nodes(), "head_sink", "query", 0).startswith("Concat")
    True
    """
    return add("Concat", add("Slice", like, [0], [0], [axis]), name, axis=axis)


def widened(add: Nodes, name: str) -> str:
    """Return an input of the model's dtype as float32, for `optional`.

    Examples
    --------
    >>> widened(Nodes(), "head_sink").startswith("Cast")
    True
    """
    data = add.cast(add("ReduceMax", "past_lengths", keepdims=0), "float32")
    least = add("Sub", NOTHING, add("Mul", data, np.float32(0)))
    return add.cast(add("Max", add("CastLike", least, "query"), name), "float32")


# --- tokens by their places ----------------------------------------------------------------------


def count(add: Nodes, number: str) -> str:
    """Return [1, number]: 0, 1, 2 and so on.

    Examples
    --------
    >>> count(Nodes(), "number").startswith("Unsqueeze")
    True
    """
    return add("Unsqueeze", add("Range", 0, add("Squeeze", number), 1), [0])


def take(add: Nodes, x: str, index: str) -> str:
    """Pick tokens ``index[B, m]`` of each row of ``x[B, kv_heads, n, ...]``.

    Examples
    --------
    >>> take(Nodes(), "x", "index").startswith("GatherND")
    True
    """
    by_head = add("Concat", add("Shape", x, end=2), add("Shape", index, start=1), axis=0)
    each = add("Expand", add("Unsqueeze", index, [1]), by_head)
    return add("GatherND", x, add("Unsqueeze", each, [3]), batch_dims=2)


def take_valid(add: Nodes, x: str, index: str, position: str, length: str) -> str:
    """Pick tokens of each row, as `take`; 0 for positions [B, m] from ``length[B, 1]`` on.

    Examples
    --------
    >>> take_valid(Nodes(), "x", "index", "position", "length").startswith("Where")
    True
    """
    valid = add("Less", position, length)
    taken = take(add, x, add("Where", valid, index, 0))
    return add("Where", add("Unsqueeze", valid, [1, 3]), taken, np.float32(0))


def unsealed(add: Nodes, layout: Layout, new: str) -> str:
    """Return all tokens that were not sealed: room for sinks, the tail, the new ones, float32.

    Examples
    --------
    >>> layout = layout_of(Nodes(), "key", Lengths("past", "new", "present"))
    >>> unsealed(Nodes(), layout, "new").startswith("Concat")
    True
    """
    sinks, tail = layout.past("sinks"), layout.past("tail")
    old_sinks = add.choose(
        add("Greater", add("Squeeze", layout.sinks), 0),
        lambda add: add.cast(joined(add, sinks, tail, 2), "float32"),
        lambda add: add("Slice", new, [0], [0], [2]),
    )
    return add("Concat", old_sinks, add.cast(tail, "float32"), new, axis=2)


def unsealed_tokens(add: Nodes, layout: Layout, plain: str, position: str) -> str:
    """Take what `unsealed` has by position[B, n]: [B, kv_heads, n, D]; 0 behind the last.

    Examples
    --------
    >>> layout = layout_of(Nodes(), "key", Lengths("past", "new", "present"))
    >>> unsealed_tokens(Nodes(), layout, "plain", "position").startswith("Where")
    True
    """
    is_new = add("GreaterOrEqual", position, layout.before)
    room = add("Add", layout.sinks, layout.block)
    from_new = add("Add", room, add("Sub", position, layout.before))
    from_tail = add("Add", layout.sinks, add("Sub", position, layout.first_tail_before))
    old = add("Where", add("Less", position, layout.sinks), position, from_tail)
    index = add("Where", is_new, from_new, old)
    return take_valid(add, plain, index, position, layout.after)


# --- blocks --------------------------------------------------------------------------------------


def coded_blocks(add: Nodes, layout: Layout, plain: str, new: str) -> tuple[dict[str, str], str]:
    """Code the blocks that may be full now, from the one that the tail was.

    Returns packed, scale, norm and zero as [B, kv_heads, n, all of a block], float32 but for the
    first, where what the scheme does not store says nothing; and n, which is [1].

    Examples
    --------
    >>> add = Nodes()
    >>> layout = layout_of(add, "key", Lengths("past", "new", "present"))
    >>> list(coded_blocks(add, layout, "plain", "new")[0])
    ['packed', 'scale', 'norm', 'zero']
    """
    block = layout.block
    tokens = add("Shape", new, start=2, end=3)
    most = add("Div", add("Sub", add("Add", tokens, block), 1), block)
    from_tail = count(add, add("Mul", most, block))
    position = add("Add", layout.first_tail_before, from_tail)
    candidates = unsealed_tokens(add, layout, plain, position)
    inputs = {"x": candidates}
    if layout.side == "key":
        inputs |= {"order": "key_order", "factor": "key_factor"}  # F1
    # All outputs of the function have names: the runtime wants them, and onnx.reference takes one
    # that has none for an input that is left out.
    coded = {part: f"new_{layout.side}_{part}" for part in QUANTIZE.outputs}
    block_size = Reference(f"{layout.side}_block_size", "int")
    scheme = _of_a_block(layout.side) | {"block_size": block_size}
    add.call(QUANTIZE, inputs, coded, **scheme)
    by_block = add("Concat", [0, 0], most, [-1], axis=0)
    return {part: add("Reshape", coded[part], by_block) for part in PARTS}, most


def decoded_blocks(
    add: Nodes, layout: Layout, parts: dict[str, str], head_dim: str, name: str
) -> str:
    """Decode ``[B, kv_heads, n, all of a block]`` of each part: [B, kv_heads, n * block_size, D].

    ``head_dim`` is a scalar; ``name`` is that of the tensor before it has this shape.

    Examples
    --------
    >>> add = Nodes()
    >>> layout = layout_of(add, "key", Lengths("past", "new", "present"))
    >>> parts = {part: part for part in PARTS}
    >>> decoded_blocks(add, layout, parts, "head_dim", "decoded").startswith("Reshape")
    True
    """
    side = layout.side
    rows = add("Concat", [0, 0, 0], layout.block, [-1], axis=0)
    by_token = add.is_one_of(f"{side}_axis", ["token"])[0]
    # A scale has one row a block, or one number a token.
    scales = add("Where", by_token, rows, [0, 0, 0, 1, -1])
    inputs = {
        "packed": add("Reshape", parts["packed"], rows),
        "scale": add("Reshape", parts["scale"], scales),
        "norm": parts["norm"],
        "zero": add("Reshape", parts["zero"], scales),
        "head_dim": head_dim,
    }
    add.call(DEQUANTIZE, inputs, {"x_hat": name}, **_of_a_block(side))
    flat = add("Concat", [0, 0, -1], add("Unsqueeze", head_dim, [0]), axis=0)
    return add("Reshape", name, flat)


def _of_a_block(side: str) -> dict[str, Any]:
    """Return the scheme of keys or values: for the tokens of one block, without sinks."""
    of_side = {
        name: Reference(f"{side}_{name}", "string" if isinstance(default, str) else "int")
        for name, default in QUANTIZE.attributes.items()
    }
    return of_side | {"block_size": 0, "sink_tokens": 0, "outlier_channels": 0}

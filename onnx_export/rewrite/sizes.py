"""Where the batch, the new tokens and the length of the past come from, if not from a cache."""

from __future__ import annotations

from typing import Any

from nsq_ref.extras import extra
from onnx_export.operators.cache_layout import NAMED_RANKS
from onnx_export.operators.nodes import Nodes
from onnx_export.rewrite.found import Cache, Found
from onnx_export.rewrite.graph import Graph

with extra("rewrite", __name__):
    import onnx_ir as ir

__all__ = ["NEW_LENGTHS", "PAST_LENGTHS", "Sizes", "input_roles"]

PAST_LENGTHS = "past_lengths"
NEW_LENGTHS = "new_lengths"
INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)
EMBEDDINGS = "inputs_embeds"
COUNTED = ("total", "past", "+")  # in what exporters call the axis of a mask of all tokens


def input_roles(graph: Graph) -> dict[str, ir.Value]:
    """Return the inputs that have roles in a decode loop, by the names that all exporters use."""
    return {
        one.name: one
        for one in graph.model.graph.inputs
        if one.name in NAMED_RANKS
        and graph.rank(one) == NAMED_RANKS[one.name]
        and one.dtype in INTEGERS
    }


class Sizes:
    """Numbers as values of int64, each made once, by nodes at the top of the graph.

    They come of inputs of the model. ``attention_mask`` tells the length of the past where the
    model says of its second axis that it counts all tokens; otherwise the model gets an input
    ``past_lengths``.
    """

    def __init__(self, graph: Graph, prefix: str) -> None:
        self.add = Nodes(prefix)
        self.needed: set[str] = set()  # inputs that the model must get
        self._graph = graph
        self._made: dict[str, str] = {}
        roles = input_roles(graph)
        self._tokens = roles.get("input_ids")
        for one in graph.model.graph.inputs:
            if self._tokens is None and one.name == EMBEDDINGS and graph.rank(one) == 3:
                self._tokens = one
        mask = roles.get("attention_mask")
        counts = mask is not None and self._tokens is not None and self._counts(mask)
        self._mask = mask if counts else None

    def _counts(self, mask: ir.Value) -> bool:
        symbol = self._graph.symbol(mask, 1)
        return isinstance(symbol, str) and any(word in symbol for word in COUNTED)

    def _once(self, name: str, operator: str, *inputs: object, **attributes: Any) -> str:
        if name not in self._made:
            self._made[name] = self.add(operator, *inputs, **attributes)
        return self._made[name]

    def batch(self) -> str:
        """Return the rows, ``[1]``."""
        if self._tokens is None:
            self.needed.add(PAST_LENGTHS)
            return self._once("batch", "Shape", PAST_LENGTHS)
        return self._once("batch", "Shape", self._tokens.name, start=0, end=1)

    def are_tokens(self, value: ir.Value, axis: int) -> bool:
        """Whether the model says that an axis is that of the new tokens."""
        if self._tokens is None or axis < 0:
            return False
        symbol = self._graph.symbol(value, axis)
        return symbol is not None and symbol == self._graph.symbol(self._tokens, 1)

    def tokens(self, value: ir.Value, layout: str, add: Nodes) -> str:
        """Return how many tokens a value has, ``[1]``; by nodes of ``add`` if it may be its own."""
        axis = layout.index("S")
        if self.are_tokens(value, axis):
            return self._new_tokens()
        return add("Shape", value.name, start=axis, end=axis + 1)

    def _new_tokens(self) -> str:
        name = "" if self._tokens is None else self._tokens.name
        return self._once("new", "Shape", name, start=1, end=2)

    def past(self) -> str:
        """Return the tokens of the longest row before this call, ``[1]``."""
        if self._mask is None:
            self.needed.add(PAST_LENGTHS)
            return self._once("past", "ReduceMax", PAST_LENGTHS, keepdims=1)
        total = self._once("total", "Shape", self._mask.name, start=1, end=2)
        return self._once("past", "Sub", total, self._new_tokens())

    def past_lengths(self) -> str:
        """Return the tokens of each row before this call, ``[batch]``."""
        if self._mask is None:
            self.needed.add(PAST_LENGTHS)
            return PAST_LENGTHS
        return self._once("past_lengths", "Expand", self.past(), self.batch())

    def shape_of(
        self, found: Found, cache: Cache, value: ir.Value, axes: str, add: Nodes
    ) -> list[str]:
        """Return some sizes of a past or a present as it was, each ``[1]``, by letters of axes."""
        is_key = cache is found.key_cache
        channels = found.head_dim if is_key else found.value_head_dim
        numbers = {"N": found.kv_heads, "D": channels, "H": found.kv_heads * channels}
        sizes = []
        for axis in axes:
            if axis == "B":
                sizes.append(self.batch())
            elif axis in numbers:
                sizes.append(add.constant([numbers[axis]]))
            elif value is cache.past:
                sizes.append(self.past())
            else:
                new = (found.key if is_key else found.value) or found.query
                sizes.append(add("Add", self.past(), self.tokens(new.value, new.layout, add)))
        return sizes

    def shape_of_moved(
        self, found: Found, cache: Cache, axes: list[str | int], add: Nodes
    ) -> list[str]:
        """Return sizes that `onnx_export.rewrite.probe.axes_of` names, each ``[1]``."""
        tokens = (found.key if cache is found.key_cache else found.value) or found.query
        sizes = []
        for axis in axes:
            if isinstance(axis, int):
                sizes.append(add.constant([axis]))
            elif axis == "batch":
                sizes.append(self.batch())
            elif axis.endswith(" batch"):
                sizes.append(add("Mul", self.batch(), [int(axis.split()[0])]))
            elif axis == "past":
                sizes.append(self.past())
            else:
                given = tokens.value, tokens.layout
                new = self.tokens(*given, add) if self._tokens is None else self._new_tokens()
                sizes.append(new if axis == "new" else add("Add", self.past(), new))
        return sizes

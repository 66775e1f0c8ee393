"""What nodes make of small inputs of known sizes, in NumPy.

Exporters compute the shapes of keys in many ways: by Concat, by ConstantOfShape, Mul, Equal and
Where, by Shape of this or that. What comes of it is the same for all: a probe looks at what comes
of it. Whatever depends on weights has a shape and no content.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.extras import extra
from onnx_export.rewrite.evaluate import NEEDED, Seen, chosen, evaluate, opaque
from onnx_export.rewrite.graph import Graph
from onnx_export.rewrite.sizes import input_roles

with extra("rewrite", __name__):
    import onnx_ir as ir

__all__ = ["MOVING", "Probe", "axes_of", "long_probe", "probes"]

SIZES = ((2, 3, 5), (1, 7, 1), (3, 0, 4))  # batch, past, new: of a step, a chunk, a prompt
LONG = (1, 1 << 20, 2)  # longer than any window


MOVING = frozenset(
    {"Cast", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
"""Operators that move elements, by shapes alone."""


class Probe:
    """The values of a graph at one batch size, length of the past and number of new tokens.

    Parameters
    ----------
    graph : Graph
    batch, past, new : int
    """

    def __init__(self, graph: Graph, batch: int, past: int, new: int) -> None:
        self.batch, self.past, self.new = batch, past, new
        self._graph = graph
        self._seen: dict[ir.Value, Seen | None] = {}
        self._roles = {value: name for name, value in input_roles(graph).items()}

    @property
    def total(self) -> int:
        """Past and new tokens."""
        return self.past + self.new

    def value(self, value: ir.Value | None) -> Seen | None:
        """Return what a value has in it, None where that cannot be told."""
        if value is None:
            return None
        waiting = [value]
        while waiting:
            one = waiting[-1]
            if one in self._seen:
                waiting.pop()
                continue
            node = one.producer()
            if node is None or one.is_initializer():
                self._seen[one] = self._given(one)
                continue
            branches = [graph.outputs for graph in branches_of(node)]
            needed = [given for given in node.inputs if given is not None]
            needed += [given for outputs in branches for given in outputs]
            missing = [given for given in needed if given not in self._seen]
            if missing:
                waiting += missing
                continue
            made: list[Seen | None] = []
            if branches:
                several = [[self._seen[given] for given in outputs] for outputs in branches]
                made = chosen(self._condition(node), several)
            elif all(self._seen[given] is not None for given in needed[: NEEDED.get(node.op_type)]):
                inputs = [None if given is None else self._seen[given] for given in node.inputs]
                made = evaluate(node, inputs)
            made += [None] * (len(node.outputs) - len(made))
            for output, seen in zip(node.outputs, made, strict=False):
                self._seen[output] = seen or self._stated(output)
        return self._seen[value]

    def _condition(self, node: ir.Node) -> bool | None:
        condition = node.inputs[0]
        number = None if condition is None else self.number(condition)
        return None if number is None else bool(number)

    def number(self, value: ir.Value | None) -> float | None:
        """Return the one element of a value, if it has one that depends on no weight."""
        seen = self.value(value)
        if seen is None or not seen.known or seen.array.size != 1:
            return None
        return float(seen.array.reshape(-1)[0])

    def _given(self, value: ir.Value) -> Seen | None:
        constant = self._graph.constant(value)
        if constant is not None:
            return Seen(constant)
        role = self._roles.get(value)
        if role in ("input_ids", "position_ids", "attention_mask"):
            width = self.total if role == "attention_mask" else self.new
            return Seen(opaque((self.batch, width), np.dtype(_kind(value))), known=False)
        return self._stated(value) or self._before(value)

    def _before(self, value: ir.Value) -> Seen | None:
        """Return the shape of a past that has a name for its channels, from what is appended."""
        if not value.is_graph_input() or "past" not in (value.name or ""):
            return None
        for node in (use.node for use in value.uses()):
            if node.op_type != "Concat" or node.domain or len(node.inputs) != 2:
                continue
            new = self.value(node.inputs[1]) if node.inputs[0] is value else None
            axis = node.attributes.get_int("axis", 0)
            if new is not None and -len(new.shape) <= axis < len(new.shape):
                shape = list(new.shape)
                shape[axis] = self.past
                return Seen(opaque(tuple(shape), np.dtype(_kind(value))), known=False)
        return None

    def _stated(self, value: ir.Value) -> Seen | None:
        """Return the shape that the model states, if it is one of numbers and of a cache's axes."""
        if value.shape is None or value.dtype is None:
            return None
        sizes = []
        for size in value.shape:
            found = size if isinstance(size, int) else self._named(size.value)
            if found is None:
                return None
            sizes.append(found)
        return Seen(opaque(tuple(sizes), np.dtype(_kind(value))), known=False)

    def _named(self, symbol: str | None) -> int | None:
        """Return the size that a name stands for, if an input of a known role has it."""
        if symbol is None:
            return None
        for one in self._graph.model.graph.inputs:
            role = self._roles.get(one)
            sizes: tuple[int, ...] = ()
            if role in ("input_ids", "position_ids"):
                sizes = (self.batch, self.new)
            elif role == "attention_mask":
                sizes = (self.batch, self.total)
            elif "past" in (one.name or "") and self._graph.rank(one) == 4:
                sizes = (self.batch, -1, self.past, -1)
            for axis, size in enumerate(sizes):
                if size >= 0 and self._graph.symbol(one, axis) == symbol:
                    return size
        return None


def branches_of(node: ir.Node) -> list[ir.Graph]:
    """Return the two branches of If, that of true first."""
    if node.domain or node.op_type != "If":
        return []
    return [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]


def probes(graph: Graph) -> tuple[Probe, ...]:
    """Return the probes of a graph; they remember what they have seen."""
    if graph.probes is None:
        graph.probes = tuple(Probe(graph, *sizes) for sizes in (*SIZES, LONG))
    found: tuple[Probe, ...] = graph.probes[:-1]
    return found


def long_probe(graph: Graph) -> Probe:
    """Return a probe of so long a past that what is cut to a window shows; it tells shapes."""
    probes(graph)
    found: Probe = graph.probes[-1]
    return found


def axes_of(graph: Graph, value: ir.Value | None) -> list[str | int] | None:
    """Return what the sizes of a value are: numbers, "batch", "past", "new", "total", "4 batch"."""
    shapes = []
    several = (*probes(graph), long_probe(graph))
    for probe in several:
        seen = probe.value(value)
        if seen is None:
            return None
        shapes.append(seen.shape)
    if len({len(shape) for shape in shapes}) != 1:
        return None
    known = {
        tuple(getattr(probe, name) for probe in several): name
        for name in ("batch", "past", "new", "total")
    }
    axes: list[str | int] = []
    for sizes in zip(*shapes, strict=True):
        if sizes in known:
            axes.append(known[sizes])
        elif len(set(sizes)) == 1:
            axes.append(sizes[0])
        elif (heads := sizes[1]) and sizes == tuple(heads * probe.batch for probe in several):
            axes.append(f"{heads} batch")
        else:
            return None
    return axes


def _kind(value: ir.Value) -> Any:
    return np.float32 if value.dtype is None else value.dtype.numpy()

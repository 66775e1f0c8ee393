"""Which attentions a model has, and which of them can be replaced without breaking the rest.

What a replaced attention made besides its output and its presents is gone, and its caches are other
tensors. So of all nodes that the rewritten model still needs, none may read these, but for the
shape of a cache, which other inputs tell as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nsq_ref.extras import extra
from onnx_export.operators.cache_layout import layer_in_name
from onnx_export.rewrite.found import Cache, Found, Refused
from onnx_export.rewrite.graph import Graph
from onnx_export.rewrite.patterns import PATTERNS
from onnx_export.rewrite.patterns.traced import never_grows
from onnx_export.rewrite.probe import axes_of

with extra("rewrite", __name__):
    import onnx_ir as ir

__all__ = [
    "Plan",
    "axes_read",
    "caches_of",
    "inputs_of",
    "layer_numbers",
    "name_of",
    "plan",
    "survey",
]


CACHE_BRANCH = "use_cache_branch"  # of optimum's merged decoders


@dataclass(eq=False)
class Plan:
    """What is replaced, and what that means for other nodes.

    Attributes
    ----------
    found : list of Found
        That are replaced, in the order of the graph.
    refused : list of Refused
        Why others that were to be replaced are not.
    shapes : dict of onnx_ir.Node to (Found, Cache)
        Nodes that read the shape of a cache that is replaced, or of what is moved out of it: the
        keys once more for each head of the queries, say.
    removed : set of onnx_ir.Node
        Replaced, or read by nobody any longer.
    """

    found: list[Found]
    refused: list[Refused]
    shapes: dict[ir.Node, tuple[Found, Cache]] = field(default_factory=dict)
    removed: set[ir.Node] = field(default_factory=set)


def survey(graph: Graph) -> list[Found | Refused]:
    """Return every attention with a cache, in the order of the graph."""
    results: list[Found | Refused] = []
    for node, place in _all(graph.model):
        for pattern in PATTERNS:
            if (node.domain, node.op_type) in pattern.ANCHORS:
                result = pattern.match(node, graph)
                if result is not None and place:
                    caches = caches_of(result) if isinstance(result, Found) else result.caches
                    result = Refused(node, f"it is in {place}", caches)
                if result is not None:
                    results.append(result)
    return _unshared(results)


def unclaimed(graph: Graph, results: Iterable[Found | Refused]) -> list[str]:
    """Return inputs that look like caches and belong to no attention that was found."""
    claimed: set[ir.Value | None] = {
        cache.past
        for one in results
        for cache in (caches_of(one) if isinstance(one, Found) else one.caches)
    }
    claimed |= {given for one in results if isinstance(one, Refused) for given in one.node.inputs}
    return [
        one.name or ""
        for one in graph.model.graph.inputs
        if one not in claimed
        and re.search("past|cache", one.name or "")
        and (graph.rank(one) or 0) >= 3
        and not never_grows(graph, one)
        and graph.dtype(one) in ("float32", "float16", "bfloat16")
    ]


def layer_numbers(found: Iterable[Found]) -> dict[Found, int]:
    """Number the layers: as the names of their caches do, or else in their order."""
    given = list(found)
    named = {}
    for one in given:
        numbers = {layer_in_name(cache.past.name or "") for cache in caches_of(one)}
        if len(numbers) == 1 and (number := numbers.pop()) is not None:
            named[one] = number
    if len(set(named.values())) == len(given):
        return named
    return {one: number for number, one in enumerate(given)}


def caches_of(found: Found) -> tuple[Cache, Cache]:
    """Return the caches of keys and of values."""
    return found.key_cache, found.value_cache


def inputs_of(found: Found) -> list[ir.Value]:
    """Return what the new node is computed from, the cache left out."""
    given: list[ir.Value | None] = [found.query.value, found.bias, found.mask, found.head_sink]
    given += [one.value for one in (found.key, found.value) if one is not None]
    given += [one.value for one in found.added]
    given += [found.lengths.past, found.lengths.total, found.lengths.new]
    given += [one.weight for one in (found.query_norm, found.key_norm) if one is not None]
    given += [found.projection_bias, found.padding]
    if found.rotary is not None:
        rotary = found.rotary
        given += [rotary.cos, rotary.sin, rotary.position_ids, rotary.first_prompt]
    return [one for one in given if one is not None]


def plan(graph: Graph, wanted: Iterable[Found]) -> Plan:
    """Find what can be replaced of what is wanted, and what follows from it."""
    result = Plan(list(wanted), [])
    for one in list(result.found):
        if reason := _misplaced(graph, one):
            result.found.remove(one)
            result.refused.append(Refused(one.node, reason, caches_of(one)))
    # Whatever is refused is read by more nodes again.
    while True:
        walk = _Walk(graph, result.found)
        if not walk.faults:
            break
        for one, reason in walk.faults.items():
            result.found.remove(one)
            result.refused.append(Refused(one.node, reason, caches_of(one)))
    result.shapes = walk.shapes
    result.removed = walk.removed()
    return result


def name_of(node: ir.Node) -> str:
    """Return what a user finds a node by."""
    return node.name or f"the {node.op_type} that makes {node.outputs[0].name}"


def axes_read(shape: ir.Node, cache: Cache) -> str:
    """Return the axes of a cache that a node of Shape gives, by their letters."""
    start, end = (shape.attributes.get_int(name, None) for name in ("start", "end"))
    return str(cache.layout[start:end])


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """Return what a node reads, what its subgraphs read of the graph around it included."""
    yield from (one for one in node.inputs if one is not None)
    for graph in _subgraphs(node):
        own = {value for inner in graph for value in inner.outputs} | set(graph.inputs)
        for inner in graph:
            yield from (value for value in reads(inner) if value not in own)
        yield from (value for value in graph.outputs if value not in own)


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _all(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Return all nodes, and what they are in if that is not the main graph."""
    yield from _with_inner(model.graph, "")
    for function in model.functions.values():
        place = f"the function {function.domain}::{function.name}; inline that first"
        yield from _with_inner(function, place)


def _with_inner(nodes: Iterable[ir.Node], place: str) -> Iterator[tuple[ir.Node, str]]:
    for node in nodes:
        yield node, place
        for graph in _subgraphs(node):
            yield from _with_inner(graph, place or _branch(node))


def _branch(node: ir.Node) -> str:
    condition = node.inputs[0]
    merged = node.op_type == "If" and condition is not None and condition.name == CACHE_BRANCH
    remedy = (
        "take the decoder that was exported with a past, before it was merged with the other, or "
        "export one graph for both"
        if merged
        else "inline that first"
    )
    return f"a branch of {node.op_type} {name_of(node)}; {remedy}"


def _unshared(results: list[Found | Refused]) -> list[Found | Refused]:
    """Refuse attentions that share a cache."""
    owners: dict[ir.Value, list[Found]] = {}
    for one in results:
        if isinstance(one, Found):
            for cache in caches_of(one):
                owners.setdefault(cache.past, []).append(one)
    shared: dict[Found, str] = {}
    for value, several in owners.items():
        for one in several if len(several) > 1 else ():
            others = [name_of(two.node) for two in several if two is not one]
            reason = f"{value.name} is the cache of {others[0]} too" if others else None
            shared.setdefault(one, reason or "its keys and its values are one cache")
    return [
        Refused(one.node, shared[one], caches_of(one))
        if isinstance(one, Found) and one in shared
        else one
        for one in results
    ]


def _misplaced(graph: Graph, found: Found) -> str | None:
    """Return why the caches are none of the model's own, or of other sizes than the node's."""
    main = graph.model.graph
    for cache in caches_of(found):
        past, present = cache.past, cache.present
        if not past.is_graph_input() or past.graph is not main or past.is_initializer():
            return f"its past {past.name} is not an input of the model"
        times = sum(one is present for one in main.outputs)
        if times != 1:
            return f"its present {present.name} is {times} of the model's outputs, not one"
        if any(one is past for one in main.outputs):
            return f"its past {past.name} is an output of the model too"
    for value, layout, sizes in _stated(found):
        for axis, letter in enumerate(layout):
            size = graph.size(value, axis)
            if size is not None and size != sizes.get(letter, size):
                return (
                    f"{value.name} has {size} places on axis {axis}, where the node has "
                    f"{sizes[letter]}"
                )
    return None


def _stated(found: Found) -> Iterator[tuple[ir.Value, str, dict[str, int]]]:
    """Return tensors of an attention, their axes, and the sizes that they must have."""
    heads, kv_heads, size = found.heads, found.kv_heads, found.head_dim
    value_size = found.value_head_dim
    tokens = [
        (found.query, heads, size, 0 if found.key is not None else 2 * kv_heads * size),
        (found.key, kv_heads, size, 0),
        (found.value, kv_heads, value_size, 0),
        (found.output, heads, value_size, 0),
    ]
    for one, count, channels, more in tokens:
        if one is not None:
            sizes = {"N": count, "D": channels, "H": count * channels + more}
            yield one.value, one.layout, sizes
    for cache, channels in zip(caches_of(found), (size, value_size), strict=True):
        sizes = {"N": kv_heads, "D": channels, "H": kv_heads * channels}
        for value in cache[:2]:
            yield value, cache.layout, sizes


class _Walk:
    """The nodes that a model needs once some attentions are replaced, from its outputs back."""

    def __init__(self, graph: Graph, found: Iterable[Found]) -> None:
        self.graph = graph
        self.found = list(found)
        self.faults: dict[Found, str] = {}
        self.shapes: dict[ir.Node, tuple[Found, Cache]] = {}
        self._within: dict[ir.Value, tuple[Found, Cache] | None] = {}
        self._replaced = {node: one for one in self.found for node in one.nodes}
        self._caches = {
            value: (one, cache)
            for one in self.found
            for cache in caches_of(one)
            for value in cache[:2]
        }
        self.live = self._live()

    def removed(self) -> set[ir.Node]:
        """Return the nodes that are replaced, not needed any longer, or without what they read."""
        before = _Walk(self.graph, ()).live if self.found else self.live
        removed = {node for node in before if node not in self.live} | set(self._replaced)
        gone = {value for value, (_, cache) in self._caches.items() if value is cache.past}
        made = {one.output.value for one in self.found}
        for node in self.graph.model.graph:
            if node not in self.live and any(one in gone for one in reads(node)):
                removed.add(node)
            if node in removed:
                gone.update(one for one in node.outputs if one not in made)
        return removed

    def _live(self) -> set[ir.Node]:
        presents = {cache.present for _, cache in self._caches.values()}
        outputs = [one for one in self.graph.model.graph.outputs if one not in presents]
        waiting = [(one, "the model's outputs") for one in outputs]
        for one in self.found:
            waiting += [(value, f"what replaces {name_of(one.node)}") for value in inputs_of(one)]
        live: set[ir.Node] = set()
        while waiting:
            value, reader = waiting.pop()
            node = value.producer()
            owner = self._replaced.get(node) if node is not None else None
            if value in self._caches:
                cached, _ = self._caches[value]
                self.faults.setdefault(cached, f"{value.name} of its cache is read by {reader} too")
            elif owner is not None and value is not owner.output.value:
                self.faults.setdefault(owner, f"{value.name} within it is read by {reader} too")
            elif node is not None and owner is None and node not in live:
                live.add(node)
                waiting += self._read_by(node)
        return live

    def _read_by(self, node: ir.Node) -> Iterator[tuple[ir.Value, str]]:
        if node.op_type == "Shape" and not node.domain and (axes := self._known(node)) is not None:
            one, _ = self.shapes[node]
            if {"past", "total"} & set(axes) and one.lengths.past is not None:
                reason = f"{name_of(node)} reads the capacity of its cache"
                self.faults.setdefault(one, reason)
            return
        if node.op_type == "Shape" and not node.domain and node.inputs[0] in self._caches:
            one, cache = self.shapes[node] = self._caches[node.inputs[0]]
            fixed = one.lengths.past is not None or cache.capacity is not None
            if "S" in axes_read(node, cache) and fixed:
                reason = f"{name_of(node)} reads the capacity of its cache {node.inputs[0].name}"
                self.faults.setdefault(one, reason)
            return
        for value in reads(node):
            yield value, f"{node.op_type} {name_of(node)}"

    def _known(self, node: ir.Node) -> list[str | int] | None:
        """Return the axes of what is made of a cache within an attention, if this is its Shape."""
        value = node.inputs[0]
        if value is None or value in self._caches or (source := self._inside(value)) is None:
            return None
        axes = axes_of(self.graph, value)
        if axes is not None:
            self.shapes[node] = source
        return axes

    def _inside(self, value: ir.Value) -> tuple[Found, Cache] | None:
        """Return the attention whose cache, or another part within it, a value is made of."""
        waiting = [value]
        while waiting:
            one = waiting[-1]
            node = one.producer()
            if one in self._within:
                waiting.pop()
            elif one in self._caches:
                self._within[one] = self._caches[one]
            elif node is None or (node.op_type == "Shape" and not node.domain):
                self._within[one] = None
            elif (owner := self._replaced.get(node)) is not None:
                is_output = one is owner.output.value
                self._within[one] = None if is_output else (owner, owner.key_cache)
            else:
                given = list(reads(node))
                if missing := [before for before in given if before not in self._within]:
                    waiting += missing
                else:
                    sources = (self._within[before] for before in given)
                    self._within[one] = next((at for at in sources if at is not None), None)
        return self._within[value]

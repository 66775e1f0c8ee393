"""From the keys or values that an attention takes back to the cache that they are in.

Between the two may be anything that moves or scales: repeated heads, a Transpose, a root of the
scale. What it does is not read off the operators but seen on probes.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref.extras import extra
from onnx_export.rewrite.evaluate import Seen, evaluate, opaque
from onnx_export.rewrite.found import Cache, Layout, Refused, Tokens
from onnx_export.rewrite.graph import Graph
from onnx_export.rewrite.probe import MOVING, Probe, long_probe, probes

with extra("rewrite", __name__):
    import onnx_ir as ir

__all__ = [
    "Behind", "NotUnderstoodError", "by_tokens", "cache_dtype", "cached", "mask_shape",
    "never_grows", "query_shape", "refused", "require_dtypes", "require_unscaled", "scaled",
    "trace",
]  # fmt: skip

Array = npt.NDArray[Any]
Order = Literal["BNDS", "BNSD", "BSH"]

LAYOUTS: dict[tuple[int, int], Layout] = {
    (4, 2): "BNSD", (4, 1): "BSND", (4, 3): "BNDS", (3, 1): "BSH",
}  # fmt: skip
READING = frozenset({"MatMul", "FusedMatMul", "Attention"})
CLOSE = 1e-5  # of factors: a float32 constant once squared


class NotUnderstoodError(ValueError):
    """Why an attention is refused."""


class Behind(NamedTuple):
    """The node that appends to a cache, and the way from there to an operand.

    Attributes
    ----------
    node : onnx_ir.Node
        Concat of the past and the new tokens, or TensorScatter.
    past, new : onnx_ir.Value
    steps : tuple of (onnx_ir.Node, int)
        What moves and scales, from the cache on, and which input comes from the cache.
    last : onnx_ir.Node
        That makes the present: ``node``, or a Cast behind it that changes nothing.
    """

    node: ir.Node
    past: ir.Value
    new: ir.Value
    steps: tuple[tuple[ir.Node, int], ...]
    last: ir.Node

    @property
    def present(self) -> ir.Value:
        """What comes of the append."""
        return self.last.outputs[0]

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """What is replaced with the attention."""
        return (self.node,) if self.last is self.node else (self.node, self.last)


class Cached(NamedTuple):
    """Keys or values as an attention has them in a cache.

    Attributes
    ----------
    cache : Cache
    new : Tokens
    heads, channels : int
        Of the cache.
    repeats : int
        How often each head stands behind the other in the operand.
    factor : float
        By which the operand is the cache's.
    """

    cache: Cache
    new: Tokens
    heads: int
    channels: int
    repeats: int
    factor: float


def trace(graph: Graph, operand: ir.Value | None) -> Behind | None:
    """Return where an operand is appended to a cache, None where it is not.

    Raises
    ------
    NotUnderstoodError
        For one that comes from a cache in another way.
    """
    steps: list[tuple[ir.Node, int]] = []
    value = operand
    while value is not None and (node := value.producer()) is not None and not node.domain:
        two = node.op_type == "Concat" and len(node.inputs) == 2
        if two or node.op_type == "TensorScatter":
            past, new = node.inputs[:2]
            if past is not None and new is not None and (source := _input_behind(graph, past)):
                way = tuple(reversed(steps))
                return Behind(node, source, new, way, _last(graph, node, source))
        index = _moved_input(graph, node)
        if index is None:
            break
        steps.append((node, index))
        value = node.inputs[index]
    if value is not None and never_grows(graph, value):
        return None
    if operand is not None and value is not None and (name := _reaches_cache(graph, value)):
        last = value.producer()
        raise NotUnderstoodError(
            f"between its cache {name} and its scores is "
            f"{last.op_type if last else 'nothing'} {(last.name if last else '') or ''}".rstrip()
            + ", which is not understood"
        )
    return None


def never_grows(graph: Graph, value: ir.Value) -> bool:
    """Whether a value is an input that attention reads and nothing appends to: of an encoder."""
    if not value.is_graph_input() or value.is_initializer():
        return False
    waiting, read = [value], False
    while waiting:
        for user, _ in graph.users(waiting.pop()):
            if user.op_type in MOVING or constant_factor(graph, user)[0] is not None:
                waiting += user.outputs
            elif user.op_type in READING:
                read = True
            elif user.op_type != "Shape":
                return False
    return read


def cached(graph: Graph, behind: Behind, order: Order, *, heads: int | None = None) -> Cached:
    """Say how an operand of an axis order is made of its cache, as it is for every probe.

    Parameters
    ----------
    graph : Graph
    behind : Behind
    order : {"BNDS", "BNSD", "BSH"}
        Of the operand.
    heads : int, optional
        Of an operand with heads and channels on one axis.

    Raises
    ------
    NotUnderstoodError
        Where it is made in another way.
    """
    present = behind.present
    shape = _shape(graph, behind)
    rank = len(shape)
    axis = behind.node.attributes.get_int("axis", -2)
    if behind.node.op_type == "Concat" and "axis" not in behind.node.attributes:
        raise NotUnderstoodError(f"Concat {behind.node.name} has no axis")
    layout = LAYOUTS.get((rank, axis % rank))
    if layout is None:
        raise NotUnderstoodError(f"its cache {behind.past.name} grows along axis {axis} of {rank}")
    if layout == "BSH":
        width = shape[2]
        if order != "BSH" or heads is None or width % heads:
            raise NotUnderstoodError(f"the heads of its cache {behind.past.name} are not stated")
        count, channels = heads, width // heads
    else:
        count, channels = shape[layout.index("N")], shape[layout.index("D")]
    if order == "BSH" and heads is None:
        raise NotUnderstoodError("the number of its heads is not stated")
    repeats, factor = 0, 0.0
    for probe in probes(graph):
        added = probe.value(behind.new)
        if added is not None and added.shape[layout.index("S")] != probe.new:
            raise NotUnderstoodError(
                f"{behind.new.name}, which its cache {behind.past.name} gets, has "
                f"{added.shape[layout.index('S')]} tokens where {probe.new} are new"
            )
        seed = _seed(probe, layout, count, channels)
        made = _moved(probe, behind, seed)
        if made.ndim == 3 and order != "BSH" and made.shape[0] % probe.batch == 0:
            made = made.reshape(probe.batch, -1, *made.shape[1:])  # batch and heads were one axis
        by_head = _by_head(seed, layout, count)
        several = _repeats(made, order, count, heads)
        want = np.repeat(by_head, several, axis=1)
        want = {
            "BNSD": lambda x: x,
            "BNDS": lambda x: x.swapaxes(2, 3),
            "BSH": lambda x: x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1),
        }[order](want)
        if made.shape != want.shape:
            raise NotUnderstoodError(_unlike(behind, f"of shape {made.shape}, not {want.shape}"))
        ratio = float(made.reshape(-1)[0] / want.reshape(-1)[0])
        if not np.allclose(made, want * ratio, rtol=CLOSE, atol=0):
            raise NotUnderstoodError(_unlike(behind, "other elements, or others in another place"))
        if repeats and (several != repeats or not np.isclose(ratio, factor, rtol=CLOSE)):
            raise NotUnderstoodError(_unlike(behind, "scaled by what is no constant"))
        repeats, factor = several, ratio
    _require_whole(graph, behind, layout, count, channels)
    return Cached(
        Cache(behind.past, present, layout),
        by_tokens(graph, behind.new, layout),
        count, channels, repeats, factor,
    )  # fmt: skip


def _require_whole(graph: Graph, behind: Behind, layout: Layout, heads: int, channels: int) -> None:
    """Refuse an operand that is cut to a window, which the small probes do not fill."""
    probe = long_probe(graph)
    shape = _seed_shape(probe, layout, heads, channels)
    seen: Seen | None = Seen(opaque(shape, np.float32), known=False)
    for node, index in behind.steps:
        inputs = [
            seen if at == index else probe.value(given) for at, given in enumerate(node.inputs)
        ]
        seen = next(iter(evaluate(node, inputs)), None)
        if seen is None or probe.total not in seen.shape:
            raise NotUnderstoodError(
                f"{node.op_type} {node.name} keeps a window of its cache {behind.past.name}; "
                "export the model without a cache of its own for windows"
            )


def refused(graph: Graph, node: ir.Node, reason: str, *operands: ir.Value | None) -> Refused:
    """Return a refusal that names the caches of operands, where all grow in the usual layout."""
    caches = []
    for operand in operands:
        try:
            behind = trace(graph, operand)
        except NotUnderstoodError:
            behind = None
        if behind is not None and behind.node.op_type == "Concat":
            axis = behind.node.attributes.get_int("axis", 0)
            if LAYOUTS.get((4, axis % 4)) == "BNSD" and graph.rank(behind.past) == 4:
                caches.append(Cache(behind.past, behind.present))
    return Refused(node, reason, tuple(caches) if len(caches) == len(operands) else ())


def by_tokens(graph: Graph, value: ir.Value, layout: Layout) -> Tokens:
    """Return tokens as they were before a Transpose brought heads to the front."""
    node = value.producer()
    if layout == "BNSD" and node is not None and node.op_type == "Transpose" and not node.domain:
        source = node.inputs[0]
        if source is not None and node.attributes.get_ints("perm", None) == (0, 2, 1, 3):
            return Tokens(source, "BSND")
    return Tokens(value, layout)


def scaled(graph: Graph, value: ir.Value) -> tuple[ir.Value, float]:
    """Return what a value is without the constant factors that it has, and their product."""
    factor = 1.0
    while (node := value.producer()) is not None and not node.domain:
        number, index = constant_factor(graph, node)
        if number is None or node.inputs[index] is None:
            break
        factor *= number
        value = node.inputs[index]  # type: ignore[assignment]
    return value, factor


def constant_factor(graph: Graph, node: ir.Node) -> tuple[float | None, int]:
    """Return the number that Mul or Div multiplies with, and the input that is multiplied."""
    if node.domain or node.op_type not in ("Mul", "Div"):
        return None, 0
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        other = node.inputs[1 - index]
        number = same_number(graph, other)
        if number is not None and np.isfinite(number) and number != 0:
            return (number if node.op_type == "Mul" else 1 / number), index
    return None, 0


def same_number(graph: Graph, value: ir.Value | None) -> float | None:
    """Return the one number of a value, if it is a constant or the same for every probe."""
    constant = graph.number(value)
    if constant is not None:
        return float(constant)
    if value is None or ((shape := value.shape) is not None and shape.rank() > 1):
        return None
    numbers = [probe.number(value) for probe in (*probes(graph), long_probe(graph))]
    if any(one is None or one != numbers[0] for one in numbers):
        return None
    return numbers[0]


def query_shape(graph: Graph, value: ir.Value) -> tuple[int, int]:
    """Return heads and channels of queries ``[batch, heads, sequence, channels]``."""
    found: set[tuple[int, int]] = set()
    for probe in probes(graph):
        seen = probe.value(value)
        if seen is None:
            raise NotUnderstoodError(f"the shape of its queries {value.name} cannot be told")
        if len(seen.shape) != 4 or seen.shape[::2] != (probe.batch, probe.new):
            raise NotUnderstoodError(
                f"its queries {value.name} have shape {seen.shape} where the batch is "
                f"{probe.batch} and the new tokens are {probe.new}"
            )
        found.add((seen.shape[1], seen.shape[3]))
    if len(found) != 1:
        raise NotUnderstoodError(f"heads and channels of its queries {value.name} are not constant")
    return found.pop()


def require_unscaled(values: Cached) -> None:
    """Refuse values that are multiplied on their way, for which nsq.Attention has no place."""
    if not math.isclose(values.factor, 1.0, rel_tol=1e-6):
        raise NotUnderstoodError(f"its values are scaled by {values.factor}")


def cache_dtype(graph: Graph, cache: Cache) -> Literal["float32", "float16"]:
    """Return the dtype of a cache, which nsq.Attention must have."""
    dtype = graph.model_dtype(cache.past)
    if dtype is None:
        raise NotUnderstoodError(
            f"its cache is {graph.dtype(cache.past)}; nsq.Attention has float32 and float16; "
            "convert the model"
        )
    return dtype


def require_dtypes(graph: Graph, dtype: str, **values: ir.Value | None) -> None:
    """Refuse tensors of another dtype than the cache's; what they are is named by the keyword."""
    for name, value in values.items():
        found = graph.dtype(value)
        if found is None and value is not None and (seen := probes(graph)[0].value(value)):
            found = str(seen.array.dtype)
        if value is not None and found != dtype:
            raise NotUnderstoodError(f"its {name} {value.name} is {found}, its cache {dtype}")


def mask_shape(graph: Graph, value: ir.Value, heads: int, *, flat: bool = False) -> None:
    """Refuse a mask that does not say for each query or for all which tokens are seen.

    Where it is flat, batch and heads are the first of three axes.
    """
    for probe in probes(graph):
        seen = probe.value(value)
        if seen is None:
            raise NotUnderstoodError(f"the shape of its mask {value.name} cannot be told")
        sizes = (1,) * (4 - len(seen.shape)) + seen.shape
        if flat:
            whole = len(seen.shape) == 3 and seen.shape[0] == probe.batch * heads
            sizes = (probe.batch, heads, *seen.shape[1:]) if whole else ()
        fits = ({1, probe.batch}, {1, heads}, {1, probe.new}, {probe.total})
        if len(sizes) != 4 or any(size not in fit for size, fit in zip(sizes, fits, strict=True)):
            raise NotUnderstoodError(
                f"its mask {value.name} has shape {seen.shape} for {probe.batch} rows, "
                f"{probe.new} new tokens and {probe.total} in all"
            )


def _last(graph: Graph, node: ir.Node, past: ir.Value) -> ir.Node:
    """Return the node of an append, or a Cast that changes nothing behind it, that is an output."""
    made = node.outputs[0]
    if made.is_graph_output():
        return node
    for user, _ in graph.users(made):
        same = user.op_type == "Identity" or (
            user.op_type == "Cast" and user.attributes.get_int("to", 0) == past.dtype
        )
        if same and not user.domain and user.outputs[0].is_graph_output():
            return user
    return node


def _input_behind(graph: Graph, value: ir.Value) -> ir.Value | None:
    """Return the input of the model that a value is, through Identity and Concat of one."""
    while (node := value.producer()) is not None:
        single = node.op_type == "Identity" or (node.op_type == "Concat" and len(node.inputs) == 1)
        if node.domain or not single or node.inputs[0] is None:
            return None
        value = node.inputs[0]
    return value if value.is_graph_input() and not value.is_initializer() else None


def _moved_input(graph: Graph, node: ir.Node) -> int | None:
    if node.op_type in MOVING:
        return 0
    number, index = constant_factor(graph, node)
    return None if number is None else index


def _reaches_cache(graph: Graph, value: ir.Value, most: int = 40) -> str | None:
    """Return the name of a cache that is near behind a value."""
    waiting, seen = [value], set[ir.Value]()
    while waiting and len(seen) < most:
        one = waiting.pop(0)
        if one in seen:
            continue
        seen.add(one)
        if one.is_graph_input() and not one.is_initializer():
            name = one.name or ""
            if ("past" in name or "cache" in name) and (graph.rank(one) or 0) >= 3:
                return name
        node = one.producer()
        if node is not None and node.op_type != "Shape":
            waiting += [given for given in node.inputs if given is not None]
    return None


def _shape(graph: Graph, behind: Behind) -> tuple[int, ...]:
    """Return the shape of a cache for the first probe, its constants right and the rest any."""
    probe = probes(graph)[0]
    for value in (behind.past, behind.present):
        if value.shape is not None:
            sizes = [one if isinstance(one, int) else -1 for one in value.shape]
            if len(sizes) == 4 and sum(one < 0 for one in sizes) <= 2:
                return tuple(sizes)
            if len(sizes) == 3 and sizes[2] > 0:
                return tuple(sizes)
    seen = probe.value(behind.new)
    if seen is None:
        raise NotUnderstoodError(
            f"heads and channels of its cache {behind.past.name} are stated nowhere; give it a "
            "shape of numbers"
        )
    return seen.shape


def _seed(probe: Probe, layout: Layout, heads: int, channels: int) -> Array:
    if min(heads, channels) < 1:
        raise NotUnderstoodError("heads and channels of its cache are stated nowhere")
    shape = _seed_shape(probe, layout, heads, channels)
    return np.arange(1.0, 1 + np.prod(shape)).reshape(shape)


def _seed_shape(probe: Probe, layout: Layout, heads: int, channels: int) -> tuple[int, ...]:
    sizes = {"B": probe.batch, "S": probe.total, "N": heads, "D": channels, "H": heads * channels}
    return tuple(sizes[axis] for axis in layout)


def _by_head(seed: Array, layout: Layout, heads: int) -> Array:
    if layout == "BSH":
        seed, layout = seed.reshape(*seed.shape[:2], heads, -1), "BSND"
    return np.transpose(seed, [layout.index(axis) for axis in "BNSD"])


def _repeats(made: Array, order: Order, count: int, heads: int | None) -> int:
    total = (heads or 0) if order == "BSH" else made.shape[1] if made.ndim == 4 else 0
    if total < count or total % count:
        raise NotUnderstoodError(f"of {count} heads of its cache {total} are made")
    return total // count


def _moved(probe: Probe, behind: Behind, seed: Array) -> Array:
    """Return the operand that comes of a seed in the cache."""
    array = seed
    for node, index in behind.steps:
        if node.op_type == "Cast":
            if ir.DataType(node.attributes.get_int("to", 1)).is_floating_point():
                continue
            raise NotUnderstoodError(f"its cache is cast to integers by {node.name}")
        inputs: list[Seen | None] = []
        for at, given in enumerate(node.inputs):
            seen = Seen(array) if at == index else probe.value(given)
            if given is not None and (seen is None or not seen.known):
                raise NotUnderstoodError(
                    f"what {node.op_type} {node.name} does with its cache cannot be told"
                )
            inputs.append(seen)
        made = next(iter(evaluate(node, inputs)), None)
        if made is None or not made.known:
            raise NotUnderstoodError(f"{node.op_type} {node.name} cannot be followed")
        array = made.array
    return array


def _unlike(behind: Behind, how: str) -> str:
    return f"what it takes of its cache {behind.past.name} is {how}"

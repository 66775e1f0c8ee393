"""Changes of a message that copy nothing of what stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nsq_ref.extras import extra
from onnx_export.operators.cache_layout import CacheTensor
from onnx_export.operators.nodes import all_nodes
from onnx_export.operators.schema import ELEMENTS

with extra("onnx", __name__):
    import onnx
    from onnx import helper

__all__ = ["remove", "replace", "unsound", "unused_prefix", "value_info"]


def remove(field: Any, which: Callable[[Any], bool]) -> None:
    """Remove messages from a repeated field; the others are not copied."""
    for index in reversed([index for index, one in enumerate(field) if which(one)]):
        del field[index]


def replace(field: Any, content: list[Any]) -> None:
    """Set a repeated field to some of its own messages and others."""
    copies = list(content)
    del field[:]
    field.extend(copies)


def unused_prefix(graph: onnx.GraphProto) -> str:
    """Return what no name in the graph begins with.

    Examples
    --------
    >>> unused_prefix(onnx.GraphProto(node=[helper.make_node("Neg", ["x"], ["nsq_y"])]))
    'nsq__'
    """
    names = [one.name for one in (*graph.input, *graph.initializer)]
    for node in all_nodes(graph.node):
        names += [node.name, *node.output]
    prefix = "nsq_"
    while any(name.startswith(prefix) for name in names):
        prefix += "_"
    return prefix


def value_info(name: str, tensor: CacheTensor) -> onnx.ValueInfoProto:
    """Return an input or output; past and present have one capacity, each tensor its own name."""
    axes: list[int | str] = []
    for size in tensor.shape:
        own = isinstance(size, str) and size.startswith("capacity")
        axes.append(f"{tensor.past}.{size}" if own else "batch_size" if size == "batch" else size)
    return helper.make_tensor_value_info(name, ELEMENTS[tensor.dtype], axes)


def unsound(model: onnx.ModelProto) -> str | None:
    """Return what the graph has of values that nobody made before, or that two make."""
    graph = model.graph
    made = {one.name for one in (*graph.input, *graph.initializer)} | {""}
    made |= {one.values.name for one in graph.sparse_initializer}
    for node in graph.node:
        if missing := [name for name in node.input if name not in made]:
            return f"{node.op_type} {node.name} reads {missing[0]}, which nothing made"
        if twice := [name for name in node.output if name and name in made]:
            return f"{node.op_type} {node.name} makes {twice[0]} a second time"
        made.update(node.output)
    if missing := [one.name for one in graph.output if one.name not in made]:
        return f"nothing makes the output {missing[0]}"
    return None

"""Attentions of onnxruntime whose caches are of another kind: refused, each with the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_export.rewrite.found import Refused

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnx_export.rewrite.graph import Graph

__all__ = ["ANCHORS", "match"]

ONE_TENSOR = (
    "keys and values are one tensor of five axes; export the model with GroupQueryAttention or "
    "MultiHeadAttention, or without fusing attention"
)
BEAMS = (
    "its cache is a buffer for beams, its keys in an order of their own; export the model with "
    "GroupQueryAttention or MultiHeadAttention"
)
REASONS = {
    "Attention": (4, ONE_TENSOR),
    "QAttention": (8, ONE_TENSOR),
    "DecoderMaskedSelfAttention": (4, ONE_TENSOR),
    "DecoderMaskedMultiHeadAttention": (5, BEAMS),
    "PagedAttention": (3, "its cache is in pages; export the model without paged attention"),
    "SparseAttention": (
        3, "it sees blocks of its cache, which nsq.Attention does not; export dense attention",
    ),
}  # fmt: skip
"""By operator, which input is the past, and why it stays."""
ANCHORS = frozenset(("com.microsoft", name) for name in REASONS)


def match(node: ir.Node, graph: Graph) -> Refused | None:
    """Refuse a node that has a past."""
    place, reason = REASONS[node.op_type]
    has_past = len(node.inputs) > place and node.inputs[place] is not None
    return Refused(node, reason) if has_past else None

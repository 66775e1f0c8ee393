"""One module a pattern, as `onnx_export.rewrite.found.Pattern` says."""

from onnx_export.rewrite.found import Pattern
from onnx_export.rewrite.patterns import (
    group_query_attention,
    multi_head_attention,
    onnx_attention,
    others,
    softmax,
)

__all__ = ["PATTERNS"]

PATTERNS: tuple[Pattern, ...] = (
    group_query_attention,
    multi_head_attention,
    onnx_attention,
    softmax,
    others,
)

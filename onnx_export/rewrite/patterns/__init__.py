"""One module a pattern, as `onnx_export.rewrite.found.Pattern` says."""

from onnx_export.rewrite.found import Pattern

__all__ = ["PATTERNS"]

PATTERNS: tuple[Pattern, ...] = ()

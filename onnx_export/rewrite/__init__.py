"""Put nsq.Attention into a decoder that somebody else exported."""

from onnx_export.rewrite.core import rewrite
from onnx_export.rewrite.report import Attention, Change, RewriteReport

__all__ = ["Attention", "Change", "RewriteReport", "rewrite"]

"""The operators of the domain ``nsq``: functions of standard ONNX operators, nodes and models."""

from onnx_export.operators.attention_models import attention_model, attention_node, cache_fields
from onnx_export.operators.codec_models import dequantize_model, quantize_model, save_models
from onnx_export.operators.domain import check_nodes, functions
from onnx_export.operators.schema import DOMAIN, VERSION, scheme_attributes

__all__ = [
    "DOMAIN", "VERSION", "attention_model", "attention_node", "cache_fields", "check_nodes",
    "dequantize_model", "functions", "quantize_model", "save_models", "scheme_attributes",
]  # fmt: skip

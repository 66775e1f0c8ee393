"""A decode loop for any model whose metadata describes its cache (`operators.cache_layout`)."""

from onnx_export.running.generate import Generated
from onnx_export.running.memory import Memory
from onnx_export.running.model import Model
from onnx_export.running.sampling import Sampling
from onnx_export.running.session import Session

__all__ = ["Generated", "Memory", "Model", "Sampling", "Session"]

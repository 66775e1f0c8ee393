"""ONNX decoders, tokenizers and fidelity measurements for real language models."""

import sys

from nsq_ref.renamed import Renamed

RENAMED: dict[str, str] = {
    "onnx_export.attention": "onnx_export.operators",
    "onnx_export.codec": "onnx_export.operators",
    "onnx_export.functions": "onnx_export.operators",
}
sys.meta_path.append(Renamed(RENAMED))

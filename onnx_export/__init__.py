"""ONNX decoders, tokenizers and fidelity measurements for real language models."""

import sys

from nsq_ref.renamed import Renamed

RENAMED = {
    "onnx_export.attention": "onnx_export.operators",
    "onnx_export.codec": "onnx_export.operators",
    "onnx_export.decoder": "onnx_export.models.decoder",
    "onnx_export.demo": "onnx_export.evaluation.demo",
    "onnx_export.fidelity": "onnx_export.evaluation.fidelity",
    "onnx_export.functions": "onnx_export.operators",
    "onnx_export.gguf_file": "onnx_export.models.gguf",
    "onnx_export.graph": "onnx_export.models.built",
    "onnx_export.smollm2": "onnx_export.models.sources",
    "onnx_export.testing": "onnx_export.models.tiny",
    "onnx_export.texts": "onnx_export.models.texts",
    "onnx_export.tokenizer": "onnx_export.models.tokenizer",
}
sys.meta_path.append(Renamed(RENAMED))

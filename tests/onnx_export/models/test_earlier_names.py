"""What was public in modules under their earlier names is there still."""

from __future__ import annotations

import importlib

import pytest

NAMES = {
    "decoder": "Decoder Generated KeyValueCache cached_onnx default_cache_dir file_sha256",
    "demo": "PAPER DemoResult run_demo",
    "fidelity": "Comparison Transform TransformFidelity compare measure_fidelity require_lengths",
    "gguf_file": "GGUFFile TensorInfo",
    "graph": "GRAPH_VERSION WEIGHTS DecoderConfig Progress build_onnx read_config",
    "smollm2": "smollm2_gguf",
    "texts": "ADDRESSES REPORTING_START passages read_address",
    "tokenizer": "Tokenizer byte_symbols",
}


@pytest.mark.parametrize("module", NAMES)
def test_earlier_modules_have_their_names(module: str) -> None:
    found = vars(importlib.import_module(f"onnx_export.{module}"))
    assert set(NAMES[module].split()) <= found.keys()

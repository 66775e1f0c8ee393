"""ONNX decoders, tokenizers and fidelity measurements for real language models."""

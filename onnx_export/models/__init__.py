"""Language models: from GGUF files to ONNX decoders that run, with their tokenizers and texts."""

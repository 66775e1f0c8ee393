"""What a quantized key-value cache costs a language model."""

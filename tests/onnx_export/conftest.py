"""Fixtures of the real model, fetched and built once in the user's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnx_export.models.decoder import Decoder
from onnx_export.models.sources import smollm2_gguf
from onnx_export.models.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """GGUF file of SmolLM2-135M-Instruct."""
    return smollm2_gguf()


@pytest.fixture(scope="session")
def smollm2_decoder(smollm2: Path) -> Decoder:
    """Decoder of SmolLM2-135M-Instruct."""
    return Decoder.from_gguf(smollm2)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> Tokenizer:
    """Tokenizer of SmolLM2-135M-Instruct."""
    return Tokenizer(smollm2)

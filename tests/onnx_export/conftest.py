"""Fixtures of the real model, fetched and built once in the user's cache."""

from __future__ import annotations

import os
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
    """Decoder of SmolLM2-135M-Instruct, with this worker's share of the cores.

    Threads of onnxruntime spin while they wait, and take from the other workers what they need.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return Decoder.from_gguf(smollm2, threads=max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> Tokenizer:
    """Tokenizer of SmolLM2-135M-Instruct."""
    return Tokenizer(smollm2)

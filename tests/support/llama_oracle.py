"""Tiny models: weights in the Hugging Face layout, a GGUF writer and a forward pass in float64.

Written from the definition of the architecture; it shares no code with `onnx_export`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9, 7]  # tokens of a text that every tiny model knows


@dataclass
class TinyModel:
    """A random model; `weights` are in the layout of Hugging Face."""

    architecture: str = "llama"
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    embedding: int = 32
    feed_forward: int = 48
    vocab: int = 40
    tied: bool = True
    biases: tuple[str, ...] = ()
    rope_factors: tuple[float, ...] = ()
    tensor_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
    eps: float = 1e-5
    theta: float = 1000.0
    context: int = 64
    explicit_head_dim: bool = False
    window: int = 5  # of Gemma 3, in all but every sixth layer, whose rotation has another base
    local_theta: float = 10000.0
    global_factor: float = 1.0  # by which rotations of the others are slower
    weights: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.heads * 100 + self.embedding)
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab, self.embedding),
            "output_norm.weight": (self.embedding,),
        }
        if not self.tied:
            shapes["output.weight"] = (self.vocab, self.embedding)
        for layer in range(self.layers):
            matrices = {
                "attn_q": (query, self.embedding),
                "attn_k": (key, self.embedding),
                "attn_v": (key, self.embedding),
                "attn_output": (self.embedding, query),
                "ffn_gate": (self.feed_forward, self.embedding),
                "ffn_up": (self.feed_forward, self.embedding),
                "ffn_down": (self.embedding, self.feed_forward),
            }
            for name, shape in matrices.items():
                shapes[f"blk.{layer}.{name}.weight"] = shape
                if name in self.biases:
                    shapes[f"blk.{layer}.{name}.bias"] = shape[:1]
            if self.architecture == "gemma3":
                shapes[f"blk.{layer}.post_attention_norm.weight"] = (self.embedding,)
                shapes[f"blk.{layer}.post_ffw_norm.weight"] = (self.embedding,)
            if self.architecture in ("qwen3", "gemma3"):
                shapes[f"blk.{layer}.attn_q_norm.weight"] = (self.head_dim,)
                shapes[f"blk.{layer}.attn_k_norm.weight"] = (self.head_dim,)
            shapes[f"blk.{layer}.attn_norm.weight"] = (self.embedding,)
            shapes[f"blk.{layer}.ffn_norm.weight"] = (self.embedding,)
        for name, shape in shapes.items():
            scale = 2 * shape[-1] ** -0.5 if len(shape) == 2 else 1.0
            values = (scale * random.standard_normal(shape)).astype(np.float32)
            if len(shape) == 2:  # the model is what the file stores, so quantize before use
                stored = gguf.quantize(values, self.tensor_type)
                values = gguf.dequantize(stored, self.tensor_type)
            self.weights[name] = values.astype(np.float64)

    def keys(self) -> dict[str, object]:
        """Metadata of the GGUF file."""
        keys: dict[str, object] = {
            "block_count": self.layers,
            "context_length": self.context,
            "embedding_length": self.embedding,
            "feed_forward_length": self.feed_forward,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.layer_norm_rms_epsilon": self.eps,
            "rope.freq_base": self.theta,
        }
        if self.explicit_head_dim:
            keys |= {
                "attention.key_length": self.head_dim,
                "attention.value_length": self.head_dim,
            }
        if self.architecture == "gemma3":
            keys["attention.sliding_window"] = self.window
        return {f"{self.architecture}.{key}": value for key, value in keys.items()}

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """Tensors of the GGUF file: llama queries and keys are interleaved, as llama.cpp does."""
        tensors = {}
        for name, weight in self.weights.items():
            values = weight.astype(np.float32)
            heads = {"attn_q": self.heads, "attn_k": self.kv_heads}.get(name.split(".")[-2])
            if heads and self.architecture == "llama":
                pairs = values.reshape(heads, 2, self.head_dim // 2, *values.shape[1:])
                values = pairs.swapaxes(1, 2).reshape(values.shape)
            tensors[name] = values
        if self.rope_factors:
            tensors["rope_freqs.weight"] = np.array(self.rope_factors, np.float32)
        return tensors

    def write(self, path: Path) -> Path:
        """Write the GGUF file."""
        return write_gguf(
            path, self.architecture, self.keys(), self.tensors(), tensor_type=self.tensor_type
        )

    def forward(self, ids: list[int]) -> tuple[Array, Array, Array]:
        """Return logits [tokens, vocab] and keys, values [layers, kv_heads, tokens, head_dim]."""
        w, half = self.weights, self.head_dim // 2
        factors = np.array(self.rope_factors or [1.0] * half)
        gemma = self.architecture == "gemma3"
        x = w["token_embd.weight"][ids] * (np.sqrt(self.embedding) if gemma else 1)
        all_keys, all_values = [], []

        def linear(name: str, inputs: Array) -> Array:
            return inputs @ w[f"{name}.weight"].T + w.get(f"{name}.bias", np.float64(0))

        def norm(name: str, inputs: Array) -> Array:
            mean_square = (inputs**2).mean(axis=1, keepdims=True)
            return inputs / np.sqrt(mean_square + self.eps) * w[f"{name}.weight"]

        def rotated(vector: Array, position: float, theta: float) -> Array:
            result = vector.copy()
            for i in range(half):
                angle = position / (theta ** (2 * i / self.head_dim) * factors[i])
                a, b = vector[i], vector[i + half]
                result[i] = a * np.cos(angle) - b * np.sin(angle)
                result[i + half] = b * np.cos(angle) + a * np.sin(angle)
            return result

        for layer in range(self.layers):
            block = f"blk.{layer}."
            local = gemma and layer % 6 != 5
            theta = self.local_theta if local else self.theta
            factor = self.global_factor if not local else 1.0
            h = norm(f"{block}attn_norm", x)
            q = linear(f"{block}attn_q", h).reshape(len(ids), self.heads, self.head_dim)
            k = linear(f"{block}attn_k", h).reshape(len(ids), self.kv_heads, self.head_dim)
            v = linear(f"{block}attn_v", h).reshape(len(ids), self.kv_heads, self.head_dim)
            for t in range(len(ids)):
                if self.architecture in ("qwen3", "gemma3"):
                    q[t], k[t] = (
                        norm(f"{block}attn_q_norm", q[t]),
                        norm(f"{block}attn_k_norm", k[t]),
                    )
                q[t] = [rotated(head, t / factor, theta) for head in q[t]]
                k[t] = [rotated(head, t / factor, theta) for head in k[t]]
            mixed = np.zeros_like(q)
            for t in range(len(ids)):
                for head in range(self.heads):
                    kv = head * self.kv_heads // self.heads
                    seen = slice(max(0, t + 1 - self.window) if local else 0, t + 1)
                    scores = k[seen, kv] @ q[t, head] / np.sqrt(self.head_dim)
                    weights = np.exp(scores - scores.max())
                    mixed[t, head] = weights / weights.sum() @ v[seen, kv]
            added = linear(f"{block}attn_output", mixed.reshape(len(ids), -1))
            x = x + (norm(f"{block}post_attention_norm", added) if gemma else added)
            h = norm(f"{block}ffn_norm", x)
            gate = linear(f"{block}ffn_gate", h)
            if gemma:  # GELU by its approximation with tanh
                active = gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2
            else:
                active = gate / (1 + np.exp(-gate))
            added = linear(f"{block}ffn_down", active * linear(f"{block}ffn_up", h))
            x = x + (norm(f"{block}post_ffw_norm", added) if gemma else added)
            all_keys.append(k.transpose(1, 0, 2))
            all_values.append(v.transpose(1, 0, 2))
        embedding = w["token_embd.weight" if self.tied else "output.weight"]
        return norm("output_norm", x) @ embedding.T, np.array(all_keys), np.array(all_values)


def write_gguf(
    path: Path,
    architecture: str,
    keys: dict[str, object],
    tensors: dict[str, NDArray[np.float32]],
    tensor_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Write a GGUF file with these metadata keys and tensors; matrices in `tensor_type`."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            raise TypeError(f"{key}: {value!r}")
    for name, values in tensors.items():
        kind = tensor_type if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

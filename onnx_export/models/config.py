"""What a decoder is, of the Llama family or Gemma 3, by its GGUF file: shape, constants, tensors.

Whatever the graph would not compute is refused here, before anything is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_export.models.gguf import GGUFFile

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")

LOCAL = "local_"
"""What begins the names of the mask and the rotation of layers that see a window."""

# What the graph computes; any other setting of the architecture would be ignored silently.
_KNOWN_KEYS = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "use_parallel_residual",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout",
    "attention.sliding_window",
})  # fmt: skip


# Of Gemma 3 every so many-th layer sees all; those between see a window, and rotate faster.
_PERIOD = 6
_LOCAL_THETA = 10000.0
_OTHER_SCALE = 62  # layers of the one size whose scores have another scale

_GREATEST = 2.0**127  # well within float32, in which constants are stored

# What a key says that changes nothing; of all others that is 0.
_USUAL = {"attention.causal": True, "rope.scaling.attn_factor": 1.0}


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of a decoder; it never changes, so that threads may share one.

    Attributes
    ----------
    architecture : str
        One of `ARCHITECTURES`.
    layers, heads, kv_heads, head_dim : int
        Layers, query heads, key-value heads and channels of one head.
    embedding_length, feed_forward_length : int
        Width of the residual stream and of the gated layer.
    vocab_size, context_length : int
        Number of tokens in the vocabulary; longest sequence the model was trained for.
    rms_norm_epsilon, rope_theta : float
        Constants of the RMSNorm and of the rotary embedding.
    sliding_window : int
        Positions that a query of a local layer sees, its own the last of them; 0 of models without.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    embedding_length: int
    feed_forward_length: int
    vocab_size: int
    context_length: int
    rms_norm_epsilon: float
    rope_theta: float
    sliding_window: int = 0

    def to_metadata(self) -> dict[str, str]:
        """Return the attributes as strings, for the metadata of an ONNX model."""
        # What is 0 says nothing, and earlier models do not have it.
        return {name: str(value) for name, value in asdict(self).items() if value}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> DecoderConfig:
        """Rebuild a configuration from what `to_metadata` returned."""
        types = {"str": str, "int": int, "float": float}
        stated = [f for f in fields(cls) if f.name in metadata or f.name != "sliding_window"]
        return cls(**{f.name: types[str(f.type)](metadata[f.name]) for f in stated})

    @property
    def norms_heads(self) -> bool:
        """Whether queries and keys pass through an RMSNorm of their own, head by head."""
        return self.architecture in ("qwen3", "gemma3")

    @property
    def is_gemma(self) -> bool:
        """Whether embeddings are scaled, what a layer adds is normalized, and gates are GELU."""
        return self.architecture == "gemma3"

    def window(self, layer: int) -> int | None:
        """Return how many positions a query of a layer sees at most; None where it sees all."""
        return self.sliding_window if self.sliding_window and (layer + 1) % _PERIOD else None

    def require_ids(self, ids: NDArray[np.integer[Any]], name: str) -> None:
        """Refuse token ids that the model does not know, naming the first of an array so called."""
        outside = (ids < 0) | (ids >= self.vocab_size)
        if outside.any():
            index = [int(i) for i in np.argwhere(outside)[0]]
            raise ValueError(
                f"{name}{index} is {ids[tuple(index)]}, outside the vocabulary of "
                f"{self.vocab_size} tokens; use this model's own tokenizer"
            )

    def require_context(self, tokens: int, what: str) -> None:
        """Refuse more tokens than the model's context holds."""
        if tokens > self.context_length:
            raise ValueError(
                f"{what} have {tokens} tokens together, more than the model's context of "
                f"{self.context_length}; use fewer"
            )


def read_config(file: GGUFFile) -> DecoderConfig:
    """Read the decoder's configuration and check that the graph computes all that it asks for.

    This takes no longer than reading the header: what it refuses is refused before anything is
    built.

    Parameters
    ----------
    file : GGUFFile
        An open GGUF file.

    Returns
    -------
    DecoderConfig
        The configuration.

    Raises
    ------
    ValueError
        If a key is missing, of the wrong type, inconsistent, or asks for something unsupported; if
        a tensor is missing, superfluous, of the wrong shape or of a type that cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import gguf
    >>> path = Path(tempfile.mkdtemp()) / "falcon.gguf"
    >>> writer = gguf.GGUFWriter(path, "falcon")
    >>> writer.write_header_to_file()
    >>> writer.write_kv_data_to_file()
    >>> writer.close()
    >>> read_config(GGUFFile(path))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: .../falcon.gguf: architecture 'falcon' is not supported; use llama, qwen2, qwen3 ...
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: architecture {architecture!r} is not supported; "
            f"use {', '.join(ARCHITECTURES[:-1])} or {ARCHITECTURES[-1]}"
        )
    prefix = f"{architecture}."

    def integer(key: str, default: int | None = None) -> int:
        value = file.value(prefix + key, default)
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{file.path}: key {prefix + key!r} must be one positive integer, got {value!r}"
            )
        return value

    def number(key: str, default: float | None = None) -> float:
        value = file.value(prefix + key, default)
        if type(value) not in (int, float) or not (0 < value < _GREATEST):
            raise ValueError(
                f"{file.path}: key {prefix + key!r} must be a positive number, got {value!r}"
            )
        return float(value)

    for key, value in file.metadata.items():
        harmless = isinstance(value, (int, float)) and value == _USUAL.get(key[len(prefix) :], 0)
        known = _KNOWN_KEYS | ({"rope.freq_base_swa"} if architecture == "gemma3" else set())
        if key.startswith(prefix) and key[len(prefix) :] not in known and not harmless:
            raise ValueError(
                f"{file.path}: key {key!r} asks for something that this graph does not compute; "
                f"use a plain {architecture} model"
            )
    embedding = file.info("token_embd.weight")
    heads = integer("attention.head_count")
    embedding_length = integer("embedding_length")
    if f"{prefix}attention.key_length" not in file.metadata and embedding_length % heads:
        raise ValueError(
            f"{file.path}: key '{prefix}attention.key_length' is missing and '{prefix}"
            f"embedding_length' ({embedding_length}) is not a multiple of the {heads} heads"
        )
    head_dim = integer("attention.key_length", embedding_length // heads)
    windowed = architecture == "gemma3"
    config = DecoderConfig(
        architecture=architecture,
        layers=integer("block_count"),
        heads=heads,
        kv_heads=integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        embedding_length=embedding_length,
        feed_forward_length=integer("feed_forward_length"),
        vocab_size=integer("vocab_size", embedding.shape[0]),
        context_length=integer("context_length"),
        rms_norm_epsilon=number("attention.layer_norm_rms_epsilon"),
        rope_theta=number("rope.freq_base", 10000.0),
        sliding_window=integer("attention.sliding_window") if windowed else 0,
    )
    if windowed and config.layers == _OTHER_SCALE:
        raise ValueError(
            f"{file.path}: Gemma 3 of {config.layers} layers scales its scores in another way, "
            "which this graph does not compute; use a smaller one"
        )
    if heads % config.kv_heads:
        raise ValueError(
            f"{file.path}: key '{prefix}attention.head_count' ({heads}) must be a multiple of "
            f"'{prefix}attention.head_count_kv' ({config.kv_heads})"
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        if integer(key, head_dim) != head_dim:
            raise ValueError(
                f"{file.path}: key {prefix + key!r} ({integer(key)}) must equal the head "
                f"dimension ({head_dim}); other models are not supported"
            )
    if head_dim % 2:
        raise ValueError(f"{file.path}: the head dimension must be even, got {head_dim}")
    # As in llama.cpp, a factor without a type means linear scaling.
    default = "linear" if f"{prefix}rope.scaling.factor" in file.metadata else "none"
    scaling = file.metadata.get(f"{prefix}rope.scaling.type", default)
    if not isinstance(scaling, str) or scaling not in ("none", "linear"):
        raise ValueError(
            f"{file.path}: key '{prefix}rope.scaling.type' is {scaling!r}, which is not supported; "
            "use a model with linear rope scaling, without any, or with its factors in a tensor "
            "'rope_freqs.weight'"
        )
    if scaling == "linear":
        number("rope.scaling.factor", 1.0)
    window = integer("attention.sliding_window", config.context_length)
    if window < config.context_length and not windowed:
        raise ValueError(
            f"{file.path}: key '{prefix}attention.sliding_window' is {window}, shorter than the "
            f"context of {config.context_length}, which this graph does not compute; use a model "
            "that attends to all"
        )
    if windowed:
        number("rope.freq_base_swa", _LOCAL_THETA)
    _check_tensors(file, config)
    rotary_frequencies(file, config)  # which may be none
    return config


def rotary_frequencies(file: GGUFFile, config: DecoderConfig) -> dict[str, NDArray[np.float64]]:
    """Return by which angle a position turns each pair of channels, float64 ``[head_dim / 2]``.

    Of layers that see all under ``""``, of those that see a window under `LOCAL`.

    Raises
    ------
    ValueError
        If one is no number.
    """
    half = config.head_dim // 2
    found = {}
    with np.errstate(all="ignore"):
        frequencies = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
        if "rope_freqs.weight" in file.tensors:
            frequencies = frequencies / file.tensor("rope_freqs.weight")
        prefix = f"{config.architecture}.rope.scaling"
        # As in llama.cpp, a factor without a type means linear scaling.
        if file.metadata.get(f"{prefix}.type", "linear") == "linear":
            frequencies = frequencies / file.metadata.get(f"{prefix}.factor", 1.0)
        found[""] = frequencies
        if config.sliding_window:  # never scaled: a window is as long as in training
            theta = file.metadata.get(f"{config.architecture}.rope.freq_base_swa", _LOCAL_THETA)
            found[LOCAL] = theta ** (-np.arange(half, dtype=np.float64) / half)
    if not all(np.isfinite(one).all() for one in found.values()):
        raise ValueError(
            f"{file.path}: rotary frequencies are not finite, with '{config.architecture}."
            f"rope.freq_base' {config.rope_theta}; convert the model again"
        )
    return found


def layer_shapes(
    embedding: int,
    feed_forward: int,
    query: int,
    key: int,
    head_norm: int | None = None,
    *,
    norms_added: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of a layer, by its name in a GGUF file.

    ``head_norm`` is the width of the norm of queries and keys, where they have one; where
    ``norms_added``, there are norms of what attention and the gated layer add.
    """
    norms = {} if head_norm is None else dict.fromkeys(("attn_q_norm", "attn_k_norm"), (head_norm,))
    if norms_added:
        norms |= dict.fromkeys(("post_attention_norm", "post_ffw_norm"), (embedding,))
    return {
        **norms,
        "attn_norm": (embedding,),
        "attn_q": (query, embedding),
        "attn_k": (key, embedding),
        "attn_v": (key, embedding),
        "attn_output": (embedding, query),
        "ffn_norm": (embedding,),
        "ffn_gate": (feed_forward, embedding),
        "ffn_up": (feed_forward, embedding),
        "ffn_down": (embedding, feed_forward),
    }


def _check_tensors(file: GGUFFile, config: DecoderConfig) -> None:
    """Raise `ValueError` unless the file holds exactly the tensors that the graph uses."""
    embedding, feed_forward = config.embedding_length, config.feed_forward_length
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    required: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, embedding),
        "output_norm.weight": (embedding,),
    }
    optional: dict[str, tuple[int, ...]] = {
        "output.weight": (config.vocab_size, embedding),
    }
    if not config.sliding_window:
        optional["rope_freqs.weight"] = (config.head_dim // 2,)
    head_norm = config.head_dim if config.norms_heads else None
    per_layer = layer_shapes(
        embedding, feed_forward, query, key, head_norm, norms_added=config.is_gemma
    )
    # A damaged layer count must end in an error, not in a list of a billion names.
    for layer in range(min(config.layers, len(file.tensors))):
        for name, shape in per_layer.items():
            required[f"blk.{layer}.{name}.weight"] = shape
            if len(shape) == 2:
                optional[f"blk.{layer}.{name}.bias"] = shape[:1]
    for name, shape in (required | optional).items():
        if name in optional and name not in file.tensors:
            continue
        if (found := file.info(name).shape) != shape:
            raise ValueError(
                f"{file.path}: tensor {name!r} must have shape {shape}, got {found}; "
                "the metadata and the tensors disagree"
            )
    for name in file.tensors:
        if name not in required and name not in optional:
            raise ValueError(
                f"{file.path}: tensor {name!r} is not part of the {config.architecture} graph; "
                f"use a plain {config.architecture} model"
            )
    file.require_types()
    if "rope_freqs.weight" in file.tensors and (file.tensor("rope_freqs.weight") <= 0).any():
        raise ValueError(
            f"{file.path}: tensor 'rope_freqs.weight' must be positive; convert the model again"
        )

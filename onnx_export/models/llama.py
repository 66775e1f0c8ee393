"""The ONNX graph of a Llama-family decoder, built from a GGUF file.

The graph uses standard operators of opset 21 only, so every ONNX runtime executes it, and keeps the
key-value cache outside as plain float32 tensors:

=============================  ========================================================
``input_ids``                  int64 ``[batch, sequence]``
``num_logits``                 int64 scalar, optional; logits of the last positions only
``past_key_values.{i}.key``    float32 ``[batch, kv_heads, past, head_dim]``, also ``value``
``logits``                     float32 ``[batch, min(sequence, num_logits), vocab_size]``
``present.{i}.key``            float32 ``[batch, kv_heads, past + sequence, head_dim]``
=============================  ========================================================

Token ``t`` of the sequence has position ``past + t``; rows of a batch are equally long. Keys are
cached after the rotary embedding, with their channels in the order of the Hugging Face models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nsq_ref.extras import extra
from onnx_export.models.config import DecoderConfig
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.nodes import Graph

with extra("onnx", __name__):
    import onnx
    from onnx import TensorProto

GRAPH_VERSION = 1
"""Raised whenever the graph changes, so that models built before are not used any more."""

WEIGHTS = "weights.bin"

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` during long work."""


class DecoderGraph(Graph):
    """The graph of a decoder; a node whose name is that of a tensor applies this tensor."""

    def __init__(self, file: GGUFFile, config: DecoderConfig, progress: Progress | None) -> None:
        super().__init__(WEIGHTS)
        self._file = file
        self._config = config
        self._progress = progress
        self._read_tensors = 0

    def fill(self, path: Path) -> None:
        """Add everything from token ids to logits, and write the weights to a file."""
        with path.open("wb") as self.stream:
            self._add_decoder()

    def decoder_model(self) -> onnx.ModelProto:
        """Return the finished model, with its configuration as metadata."""
        version = {"graph_version": str(GRAPH_VERSION)}
        return self.model("decoder", self._config.to_metadata() | version)

    def _add_decoder(self) -> None:
        config = self._config
        self.input("input_ids", "batch", "sequence", dtype="int64")
        # An input with an initializer of the same name is optional; the initializer is its default.
        self.initializer("num_logits", np.array(np.iinfo(np.int64).max, np.int64))
        self.input("num_logits", dtype="int64")
        self.output("logits", "batch", "scored", config.vocab_size)

        embedding = self._weight("token_embd.weight")
        x = self.add("Gather", embedding, "input_ids", name="token_embd")
        self._add_positions()
        for layer in range(config.layers):
            norm = self._rms_norm(x, f"blk.{layer}.attn_norm")
            attention = self._attention(layer, norm)
            x = self.add("Add", x, attention, name=f"blk.{layer}.attn_residual")
            norm = self._rms_norm(x, f"blk.{layer}.ffn_norm")
            x = self.add(
                "Add", x, self._feed_forward(layer, norm), name=f"blk.{layer}.ffn_residual"
            )

        # Only the last `num_logits` positions meet the vocabulary, the widest matrix by far.
        unscored = self.add("Sub", "sequence", "num_logits", name="unscored.signed")
        unscored = self.add("Max", unscored, "zero", name="unscored")
        unscored = self.add("Unsqueeze", unscored, self.ints(0), name="scored.start")
        end = self.add("Unsqueeze", "sequence", self.ints(0), name="scored.end")
        x = self.add("Slice", x, unscored, end, self.ints(1), name="scored")
        x = self._rms_norm(x, "output_norm")
        if "output.weight" in self._file.tensors:
            embedding = self._weight("output.weight")
        # Gemm takes the embedding as it is stored, so that tied weights exist once.
        rows = self.add("Reshape", x, self.ints(-1, config.embedding_length), name="logits.input")
        flat = self.add("Gemm", rows, embedding, transB=1, name="logits.rows")
        leading = self.add("Shape", x, start=0, end=2, name="logits.leading")
        shape = self.add(
            "Concat", leading, self.ints(config.vocab_size), axis=0, name="logits.shape"
        )
        self.add("Reshape", flat, shape, allowzero=1, name="logits")

    def _add_positions(self) -> None:
        """Add what depends on the positions of the new tokens, the same for all layers.

        That is ``cosine`` and ``sine`` of the rotary angles, ``[sequence, head_dim]``, and the
        causal ``mask``. Angles are computed in float64: in float32 the angle of a late position has
        lost digits.
        """
        half = self._config.head_dim // 2
        frequencies = self._config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
        if "rope_freqs.weight" in self._file.tensors:
            frequencies = frequencies / self._read("rope_freqs.weight")
        zero = self.initializer("zero", np.array(0, np.int64))
        one = self.initializer("one", np.array(1, np.int64))
        sequence = self.add("Shape", "input_ids", start=1, end=2, name="sequence.shape")
        sequence = self.add("Squeeze", sequence, name="sequence")
        past = self.add("Shape", "past_key_values.0.key", start=2, end=3, name="past.shape")
        past = self.add("Squeeze", past, name="past")
        total = self.add("Add", past, sequence, name="total")
        queries = self.add("Range", past, total, one, name="queries")
        queries = self.add("Unsqueeze", queries, self.ints(1), name="query_positions")
        keys = self.add("Range", zero, total, one, name="key_positions")

        future = self.add("Greater", keys, queries, name="future")
        masked = self.initializer("masked", np.array(-np.inf, np.float32))
        visible = self.initializer("visible", np.array(0, np.float32))
        self.add("Where", future, masked, visible, name="mask")

        positions = self.add("Cast", queries, to=TensorProto.DOUBLE, name="positions")
        both_halves = self.initializer("rotary_frequencies", np.tile(frequencies, 2))
        angles = self.add("Mul", positions, both_halves, name="angles")

        def add_sine(name: str, angle: str) -> None:
            exact = self.add("Sin", angle, name=f"{name}.float64")
            self.add("Cast", exact, to=TensorProto.FLOAT, name=name)

        # Sine only: older runtimes have no cosine in float64.
        quarter_turn = self.initializer("quarter_turn", np.array(math.pi / 2))
        shifted = self.add("Add", angles, quarter_turn, name="angles.shifted")
        add_sine("cosine", shifted)
        add_sine("sine", angles)

    def _attention(self, layer: int, x: str) -> str:
        """Grouped-query attention of one layer, with its past and present cache."""
        block, config = f"blk.{layer}.", self._config
        heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim

        def split_heads(name: str, count: int, *, rotary: bool) -> str:
            interleaved = rotary and config.architecture == "llama"
            flat = self._linear(x, block + name, count if interleaved else None)
            split = self.add(
                "Reshape", flat, self.ints(0, 0, count, head_dim), name=f"{flat}.split"
            )
            split = self.add("Transpose", split, perm=[0, 2, 1, 3], name=f"{flat}.heads")
            return self._rotary(split) if rotary else split

        def cache(kind: str, new: str) -> str:
            past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
            self.input(past, "batch", kv_heads, "past", head_dim)
            self.output(present, "batch", kv_heads, "past + sequence", head_dim)
            self.add("Concat", past, new, axis=2, name=present)
            # [batch, kv_heads, 1, tokens, head_dim]: one cache row serves its group of query heads.
            return self.add("Unsqueeze", present, self.ints(2), name=f"{block}{kind}")

        query = split_heads("attn_q", heads, rotary=True)
        key = cache("key", split_heads("attn_k", kv_heads, rotary=True))
        value = cache("value", split_heads("attn_v", kv_heads, rotary=False))

        scale = self.initializer("attention_scale", np.array(head_dim**-0.5, np.float32))
        query = self.add("Mul", query, scale, name=f"{block}query.scaled")
        groups = self.ints(0, kv_heads, heads // kv_heads, -1, head_dim)
        query = self.add("Reshape", query, groups, name=f"{block}query")
        key = self.add("Transpose", key, perm=[0, 1, 2, 4, 3], name=f"{block}key.transposed")
        scores = self.add("MatMul", query, key, name=f"{block}scores")
        scores = self.add("Add", scores, "mask", name=f"{block}scores.masked")
        weights = self.add("Softmax", scores, axis=-1, name=f"{block}attention_weights")
        mixed = self.add("MatMul", weights, value, name=f"{block}attention")
        by_head = self.ints(0, heads, -1, head_dim)
        mixed = self.add("Reshape", mixed, by_head, name=f"{block}attention.heads")
        mixed = self.add("Transpose", mixed, perm=[0, 2, 1, 3], name=f"{block}attention.tokens")
        merged = self.ints(0, 0, heads * head_dim)
        mixed = self.add("Reshape", mixed, merged, name=f"{block}attention.merged")
        return self._linear(mixed, f"{block}attn_output")

    def _rotary(self, x: str) -> str:
        """Rotate ``x`` of shape ``[batch, heads, sequence, head_dim]``."""
        middle, end = self.ints(self._config.head_dim // 2), self.ints(self._config.head_dim)
        first = self.add("Slice", x, self.ints(0), middle, self.ints(3), name=f"{x}.first")
        second = self.add("Slice", x, middle, end, self.ints(3), name=f"{x}.second")
        negative = self.add("Neg", second, name=f"{x}.negative")
        turned = self.add("Concat", negative, first, axis=3, name=f"{x}.turned")
        straight = self.add("Mul", x, "cosine", name=f"{x}.cosine")
        across = self.add("Mul", turned, "sine", name=f"{x}.sine")
        return self.add("Add", straight, across, name=f"{x}.rotary")

    def _feed_forward(self, layer: int, x: str) -> str:
        """SwiGLU layer: ``down(silu(gate(x)) * up(x))``."""
        block = f"blk.{layer}."
        gate = self._linear(x, f"{block}ffn_gate")
        sigmoid = self.add("Sigmoid", gate, name=f"{block}ffn_gate.sigmoid")
        silu = self.add("Mul", gate, sigmoid, name=f"{block}ffn_gate.silu")
        up = self._linear(x, f"{block}ffn_up")
        product = self.add("Mul", silu, up, name=f"{block}ffn_product")
        return self._linear(product, f"{block}ffn_down")

    def _rms_norm(self, x: str, name: str) -> str:
        # This chain of nodes is the one that runtimes fuse into a single kernel.
        constant = np.array(self._config.rms_norm_epsilon, np.float32)
        epsilon = self.initializer("rms_norm_epsilon", constant)
        two = self.initializer("two", np.array(2, np.float32))
        square = self.add("Pow", x, two, name=f"{name}.square")
        mean = self.add("ReduceMean", square, self.ints(-1), name=f"{name}.mean")
        shifted = self.add("Add", mean, epsilon, name=f"{name}.shifted")
        rms = self.add("Sqrt", shifted, name=f"{name}.rms")
        normalized = self.add("Div", x, rms, name=f"{name}.normalized")
        return self.add("Mul", normalized, self._weight(f"{name}.weight"), name=name)

    def _linear(self, x: str, name: str, rotary_heads: int | None = None) -> str:
        """``x @ weight.T + bias``, for weights stored as ``(out_features, in_features)``."""

        def read(full_name: str) -> NDArray[np.float32]:
            values = self._read(full_name)
            return values if rotary_heads is None else _half_rotation(values, rotary_heads)

        weight = self.weight(f"{name}.weight", read(f"{name}.weight").T)
        if f"{name}.bias" not in self._file.tensors:
            return self.add("MatMul", x, weight, name=name)
        product = self.add("MatMul", x, weight, name=f"{name}.product")
        return self.add(
            "Add", product, self.weight(f"{name}.bias", read(f"{name}.bias")), name=name
        )

    def _weight(self, name: str) -> str:
        """Add a tensor of the GGUF file as it is."""
        return self.weight(name, self._read(name))

    def _read(self, name: str) -> NDArray[np.float32]:
        values = self._file.tensor(name)
        self._read_tensors += 1
        if self._progress is not None:
            self._progress("building the ONNX decoder", self._read_tensors, len(self._file.tensors))
        return values


def _half_rotation(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder rows from the interleaved rotary layout to the half-rotation layout.

    GGUF stores the channels of a llama head as 0, D/2, 1, D/2 + 1, ... so that rotated pairs are
    neighbours; Hugging Face models rotate channel i with channel i + D/2.
    """
    pairs = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
    return np.reshape(pairs, values.shape)

"""The ONNX graph of a Llama-family decoder, built from a GGUF file.

How attention is written down, and so what the cache is, `attention_forms` decides. The plain form
uses standard operators of opset 21 only, so that every ONNX runtime executes it, and keeps the
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

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nsq_ref.extras import extra
from onnx_export.models.attention_forms import AttentionForm, PlainAttention, add_inputs
from onnx_export.models.config import DecoderConfig, rotary_frequencies
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.nodes import Graph
from onnx_export.models.stored import Stored, add_product, add_rows, can_keep

with extra("onnx", __name__):
    import onnx

GRAPH_VERSION = 2
"""Raised whenever the graph changes, so that models built before are not used any more."""

WEIGHTS = "weights.bin"

Weights = Literal["float32", "stored"]
"""What matrices are in the graph: float32, or in the bits of the file where `stored` has them."""

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` during long work."""


PLAIN = PlainAttention()

EMBEDDING = "token_embd.weight"
ROWS = 1 << 22  # elements of the embedding that are in memory at a time


class DecoderGraph(Graph):
    """The graph of a decoder; a node whose name is that of a tensor applies this tensor."""

    def __init__(
        self,
        file: GGUFFile,
        config: DecoderConfig,
        progress: Progress | None,
        form: AttentionForm = PLAIN,
        weights: Weights = "float32",
    ) -> None:
        super().__init__(WEIGHTS)
        self._form = form
        self._file = file
        self._config = config
        self._progress = progress
        self._weights = weights
        self._read_tensors = 0

    def fill(self, path: Path) -> None:
        """Add everything from token ids to logits, and write the weights to a file."""
        with path.open("wb") as self.stream:
            self._add_decoder()

    def decoder_model(self) -> onnx.ModelProto:
        """Return the finished model, with its configuration and its cache as metadata."""
        metadata = self._config.to_metadata() | {"graph_version": str(GRAPH_VERSION)}
        metadata |= self._form.layout(self._config).to_metadata()
        form = self._form
        return self.model("decoder", metadata, form.functions(self.nodes), form.opset)

    def _add_decoder(self) -> None:
        config = self._config
        self.input("input_ids", "batch", "sequence", dtype="int64")
        # An input with an initializer of the same name is optional; the initializer is its default.
        self.initializer("num_logits", np.array(np.iinfo(np.int64).max, np.int64))
        self.input("num_logits", dtype="int64")
        self.output("logits", "batch", "scored", config.vocab_size)

        if self._keeps(EMBEDDING):
            stored = Stored(self._file, EMBEDDING)
            x = add_rows(self, "input_ids", stored, EMBEDDING, "token_embd")
            self._count()
        else:
            x = self.add("Gather", self._rows(EMBEDDING), "input_ids", name="token_embd")
        if config.is_gemma:
            root = np.array(config.embedding_length**0.5, np.float32)
            factor = self.initializer("embedding_scale", root)
            x = self.add("Mul", x, factor, name="embedding")
        self._add_positions()
        for layer in range(config.layers):
            norm = self._rms_norm(x, f"blk.{layer}.attn_norm")
            attention = self._attention(layer, norm)
            if config.is_gemma:
                attention = self._rms_norm(attention, f"blk.{layer}.post_attention_norm")
            x = self.add("Add", x, attention, name=f"blk.{layer}.attn_residual")
            norm = self._rms_norm(x, f"blk.{layer}.ffn_norm")
            gated = self._feed_forward(layer, norm)
            if config.is_gemma:
                gated = self._rms_norm(gated, f"blk.{layer}.post_ffw_norm")
            x = self.add("Add", x, gated, name=f"blk.{layer}.ffn_residual")

        # Only the last `num_logits` positions meet the vocabulary, the widest matrix by far.
        unscored = self.add("Sub", "sequence", "num_logits", name="unscored.signed")
        unscored = self.add("Max", unscored, "zero", name="unscored")
        unscored = self.add("Unsqueeze", unscored, self.ints(0), name="scored.start")
        end = self.add("Unsqueeze", "sequence", self.ints(0), name="scored.end")
        x = self.add("Slice", x, unscored, end, self.ints(1), name="scored")
        x = self._rms_norm(x, "output_norm")
        rows = self.add("Reshape", x, self.ints(-1, config.embedding_length), name="logits.input")
        flat = self._vocabulary(rows)
        leading = self.add("Shape", x, start=0, end=2, name="logits.leading")
        shape = self.add(
            "Concat", leading, self.ints(config.vocab_size), axis=0, name="logits.shape"
        )
        self.add("Reshape", flat, shape, allowzero=1, name="logits")

    def _vocabulary(self, rows: str) -> str:
        """Product with the output matrix, or with the embedding where the weights are tied."""
        name = "output.weight"
        tied = name not in self._file.tensors
        if tied:
            name = EMBEDDING
        if not self._keeps(name):
            # Gemm takes the embedding as it is stored, so that tied weights exist once.
            weight = name if tied else self._rows(name)
            return self.add("Gemm", rows, weight, transB=1, name="logits.rows")
        product = add_product(self, rows, Stored(self._file, name), name, "logits.rows")
        if not tied:
            self._count()
        return product

    def _add_positions(self) -> None:
        """Add the number of new tokens, the cache, and what attention needs of positions."""
        frequencies = rotary_frequencies(self._file, self._config)
        if "rope_freqs.weight" in self._file.tensors:
            self._count()
        self.initializer("zero", np.array(0, np.int64))
        sequence = self.add("Shape", "input_ids", start=1, end=2, name="sequence.shape")
        self.add("Squeeze", sequence, name="sequence")
        add_inputs(self, self._form.tensors(self._config))
        self._form.prepare(self, self._config, frequencies)

    def _attention(self, layer: int, x: str) -> str:
        """Attention of one layer, from its input to its output projection."""
        block, config = f"blk.{layer}.", self._config
        # Of queries and keys GGUF files of Llama have the channels in another order.
        interleaved = config.architecture == "llama"
        query = self._linear(x, f"{block}attn_q", config.heads if interleaved else None)
        key = self._linear(x, f"{block}attn_k", config.kv_heads if interleaved else None)
        if config.norms_heads:
            query = self._head_norm(query, f"{block}attn_q_norm", config.heads)
            key = self._head_norm(key, f"{block}attn_k_norm", config.kv_heads)
        new = (query, key, self._linear(x, f"{block}attn_v"))
        return self._linear(self._form.attend(self, config, layer, new), f"{block}attn_output")

    def _head_norm(self, flat: str, name: str, heads: int) -> str:
        """RMSNorm of every head of ``[batch, sequence, heads * head_dim]``, before it rotates."""
        head_dim = self._config.head_dim
        split = self.ints(0, 0, heads, head_dim)
        x = self.add("Reshape", flat, split, name=f"{name}.split")
        merged = self.ints(0, 0, heads * head_dim)
        return self.add("Reshape", self._rms_norm(x, name), merged, name=f"{name}.merged")

    def _feed_forward(self, layer: int, x: str) -> str:
        """Gated layer: ``down(silu(gate(x)) * up(x))``, or GELU in place of SiLU."""
        block = f"blk.{layer}."
        gate = self._linear(x, f"{block}ffn_gate")
        if self._config.is_gemma:
            active = self.add("Gelu", gate, approximate="tanh", name=f"{block}ffn_gate.gelu")
        else:
            sigmoid = self.add("Sigmoid", gate, name=f"{block}ffn_gate.sigmoid")
            active = self.add("Mul", gate, sigmoid, name=f"{block}ffn_gate.silu")
        up = self._linear(x, f"{block}ffn_up")
        product = self.add("Mul", active, up, name=f"{block}ffn_product")
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

        def order(values: NDArray[Any]) -> NDArray[Any]:
            return values if rotary_heads is None else _half_rotation(values, rotary_heads)

        full_name, biased = f"{name}.weight", f"{name}.bias" in self._file.tensors
        product = f"{name}.product" if biased else name
        if self._keeps(full_name):
            matrix = Stored(self._file, full_name, None if rotary_heads is None else order)
            add_product(self, x, matrix, full_name, product)
            self._count()
        else:
            weight = self.weight(full_name, order(self._read(full_name)).T)
            self.add("MatMul", x, weight, name=product)
        if not biased:
            return product
        bias = self.weight(f"{name}.bias", order(self._read(f"{name}.bias")))
        return self.add("Add", product, bias, name=name)

    def _keeps(self, name: str) -> bool:
        return self._weights == "stored" and can_keep(self._file, name)

    def _rows(self, name: str) -> str:
        """Add a matrix of the GGUF file as it is, some rows at a time."""
        features, width = self._file.info(name).shape
        step = max(1, ROWS // width)

        def parts() -> Iterator[NDArray[np.float32]]:
            for start in range(0, features, step):
                yield self._file.tensor(name, slice(start, start + step))

        self.weight_parts(name, (features, width), np.dtype(np.float32), parts())
        self._count()
        return name

    def _weight(self, name: str) -> str:
        """Add a tensor of the GGUF file as it is."""
        return self.weight(name, self._read(name))

    def _read(self, name: str) -> NDArray[np.float32]:
        values = self._file.tensor(name)
        self._count()
        return values

    def _count(self) -> None:
        """Tell that one more tensor has been read."""
        self._read_tensors += 1
        if self._progress is not None:
            self._progress("building the ONNX decoder", self._read_tensors, len(self._file.tensors))


def _half_rotation(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder rows from the interleaved rotary layout to the half-rotation layout.

    GGUF stores the channels of a llama head as 0, D/2, 1, D/2 + 1, ... so that rotated pairs are
    neighbours; Hugging Face models rotate channel i with channel i + D/2.
    """
    pairs = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
    return np.reshape(pairs, values.shape)

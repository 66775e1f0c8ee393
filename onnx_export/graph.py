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

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nsq_ref.environment import extra
from nsq_ref.files import atomic
from onnx_export.gguf_file import GGUFFile

with extra("onnx", __name__):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

GRAPH_VERSION = 1
"""Raised whenever the graph changes, so that models built before are not used any more."""

Progress = Callable[[str, int, int], None]
"""Called as ``progress(what, done, total)`` during long work."""

_OPSET = 21
# The first IR version that belongs to opset 21.
_IR_VERSION = 10
WEIGHTS = "weights.bin"
# External data must be aligned to pages to be mapped into memory.
_ALIGNMENT = 4096

# What the graph computes; any other setting of the architecture would be ignored silently.
_KNOWN_KEYS = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "tensor_data_layout",
    }
)


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and constants of a decoder; it never changes, so that threads may share one.

    Attributes
    ----------
    architecture : str
        ``"llama"`` or ``"qwen2"``.
    layers, heads, kv_heads, head_dim : int
        Layers, query heads, key-value heads and channels of one head.
    embedding_length, feed_forward_length : int
        Width of the residual stream and of the SwiGLU layer.
    vocab_size, context_length : int
        Number of tokens in the vocabulary; longest sequence the model was trained for.
    rms_norm_epsilon, rope_theta : float
        Constants of the RMSNorm and of the rotary embedding.
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
    """Read the decoder's configuration and check that `build_onnx` computes all that it asks for.

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
    ValueError: .../falcon.gguf: architecture 'falcon' is not supported; use llama or qwen2
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ("llama", "qwen2"):
        raise ValueError(
            f"{file.path}: architecture {architecture!r} is not supported; use llama or qwen2"
        )
    prefix = f"{architecture}."

    def integer(key: str, default: int | None = None) -> int:
        value = file.metadata.get(prefix + key, default)
        if value is None:
            raise ValueError(
                f"{file.path}: key {prefix + key!r} is missing; convert the model again"
            )
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{file.path}: key {prefix + key!r} must be one positive integer, got {value!r}"
            )
        return value

    def number(key: str, default: float | None = None) -> float:
        value = file.metadata.get(prefix + key, default)
        if value is None:
            raise ValueError(
                f"{file.path}: key {prefix + key!r} is missing; convert the model again"
            )
        if type(value) not in (int, float) or not (0 < value < math.inf):
            raise ValueError(
                f"{file.path}: key {prefix + key!r} must be a positive number, got {value!r}"
            )
        return float(value)

    for key, value in file.metadata.items():
        harmless = isinstance(value, (int, float)) and value == 0
        if key.startswith(prefix) and key[len(prefix) :] not in _KNOWN_KEYS and not harmless:
            raise ValueError(
                f"{file.path}: key {key!r} asks for something that this graph does not compute; "
                f"use a plain {architecture} model"
            )
    if "token_embd.weight" not in file.tensors:
        raise ValueError(
            f"{file.path}: tensor 'token_embd.weight' is missing; convert the model again"
        )
    heads = integer("attention.head_count")
    embedding_length = integer("embedding_length")
    if f"{prefix}attention.key_length" not in file.metadata and embedding_length % heads:
        raise ValueError(
            f"{file.path}: key '{prefix}attention.key_length' is missing and '{prefix}"
            f"embedding_length' ({embedding_length}) is not a multiple of the {heads} heads"
        )
    head_dim = integer("attention.key_length", embedding_length // heads)
    config = DecoderConfig(
        architecture=architecture,
        layers=integer("block_count"),
        heads=heads,
        kv_heads=integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        embedding_length=embedding_length,
        feed_forward_length=integer("feed_forward_length"),
        vocab_size=integer("vocab_size", file.tensors["token_embd.weight"].shape[0]),
        context_length=integer("context_length"),
        rms_norm_epsilon=number("attention.layer_norm_rms_epsilon"),
        rope_theta=number("rope.freq_base", 10000.0),
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
    if not isinstance(scaling, str) or scaling != "none":
        raise ValueError(
            f"{file.path}: key '{prefix}rope.scaling.type' is {scaling!r}, which is not supported; "
            "use a model without rope scaling, or with its factors in a tensor 'rope_freqs.weight'"
        )
    _check_tensors(file, config)
    return config


def build_onnx(
    file: GGUFFile, directory: str | os.PathLike[str], progress: Progress | None = None
) -> DecoderConfig:
    """Write ``model.onnx``, its external data ``weights.bin`` and ``SHA256SUMS``: all or none.

    Parameters
    ----------
    file : GGUFFile
        A model of the llama or qwen2 architecture.
    directory : str or os.PathLike
        Created where it does not exist; existing files are replaced.
    progress : callable, optional
        Called as ``progress(what, done, total)`` after every tensor.

    Returns
    -------
    DecoderConfig
        The decoder's configuration.

    Raises
    ------
    ValueError
        If the model is unsupported, or a tensor is missing, superfluous or of the wrong shape.
    OSError
        If a file cannot be written; what was there before is untouched.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import gguf
    >>> path = Path(tempfile.mkdtemp()) / "empty.gguf"
    >>> writer = gguf.GGUFWriter(path, "llama")
    >>> writer.write_header_to_file()
    >>> writer.write_kv_data_to_file()
    >>> writer.close()
    >>> build_onnx(GGUFFile(path), path.parent)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: .../empty.gguf: tensor 'token_embd.weight' is missing; convert the model again
    """
    config = read_config(file)
    directory = Path(directory)

    def files() -> Iterator[tuple[Path, atomic.Content]]:
        graph = _GraphBuilder(file, WEIGHTS, progress)

        def weights(path: Path) -> None:
            with path.open("wb") as graph.stream:
                _decoder(graph, config)

        yield directory / WEIGHTS, weights
        metadata = {name: str(value) for name, value in asdict(config).items()}
        model = graph.model(metadata | {"graph_version": str(GRAPH_VERSION)}).SerializeToString()
        yield directory / "model.onnx", model
        sums = f"{hashlib.sha256(model).hexdigest()}  model.onnx\n{graph.digest}  {WEIGHTS}\n"
        yield directory / "SHA256SUMS", sums.encode("ascii")

    atomic.write(files(), make_folders=True)
    return config


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
        "rope_freqs.weight": (config.head_dim // 2,),
    }
    per_layer = {
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
    # A damaged layer count must end in an error, not in a list of a billion names.
    for layer in range(min(config.layers, len(file.tensors))):
        for name, shape in per_layer.items():
            required[f"blk.{layer}.{name}.weight"] = shape
            if len(shape) == 2:
                optional[f"blk.{layer}.{name}.bias"] = shape[:1]
    for name, shape in (required | optional).items():
        if name not in file.tensors:
            if name in required:
                raise ValueError(
                    f"{file.path}: tensor {name!r} is missing; convert the model again"
                )
        elif file.tensors[name].shape != shape:
            raise ValueError(
                f"{file.path}: tensor {name!r} must have shape {shape}, "
                f"got {file.tensors[name].shape}; the metadata and the tensors disagree"
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


class _GraphBuilder:
    """Collects nodes and initializers; large tensors go straight into the external data file."""

    def __init__(self, file: GGUFFile, weights: str, progress: Progress | None) -> None:
        self.file = file
        self.stream: IO[bytes]  # of the external data, while it is written
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._weights = weights
        self._progress = progress
        self._hash = hashlib.sha256()
        self._read = 0

    @property
    def digest(self) -> str:
        """SHA-256 of the external data."""
        return self._hash.hexdigest()

    def read(self, name: str) -> NDArray[np.float32]:
        """Return a tensor of the GGUF file."""
        values = self.file.tensor(name)
        self._read += 1
        if self._progress is not None:
            self._progress("building the ONNX decoder", self._read, len(self.file.tensors))
        return values

    def add(self, operator: str, *inputs: str, name: str, **attributes: Any) -> str:
        """Append a node with one output of the node's name, and return the name."""
        self._nodes.append(
            helper.make_node(operator, list(inputs), [name], name=name, **attributes)
        )
        return name

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Add a small initializer, once for every name."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(values, name)
        return name

    def ints(self, *values: int) -> str:
        """Add a vector of int64, such as a shape."""
        name = "ints_" + "_".join(map(str, values))
        return self.constant(name, np.array(values, dtype=np.int64))

    def weight(self, name: str, values: NDArray[np.float32]) -> str:
        """Add an initializer whose elements lie in the external data file."""
        data = np.ascontiguousarray(values, dtype="<f4")
        padding = bytes(-self.stream.tell() % _ALIGNMENT)
        for part in (padding, data.data.cast("B")):
            self._hash.update(part)
            self.stream.write(part)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=data.shape)
        tensor.data_location = TensorProto.EXTERNAL
        location = {
            "location": self._weights,
            "offset": self.stream.tell() - data.nbytes,
            "length": data.nbytes,
        }
        for key, value in location.items():
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    def model(self, metadata: dict[str, str]) -> onnx.ModelProto:
        """Return the finished model."""
        graph = helper.make_graph(
            self._nodes, "decoder", self.inputs, self.outputs, list(self._initializers.values())
        )
        model = helper.make_model(
            graph,
            producer_name="onnx_export",
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
        )
        helper.set_model_props(model, metadata)
        return model


def _rms_norm(graph: _GraphBuilder, config: DecoderConfig, x: str, name: str) -> str:
    # This chain of nodes is the one that runtimes fuse into a single kernel.
    epsilon = graph.constant("rms_norm_epsilon", np.array(config.rms_norm_epsilon, np.float32))
    two = graph.constant("two", np.array(2, np.float32))
    square = graph.add("Pow", x, two, name=f"{name}.square")
    mean = graph.add("ReduceMean", square, graph.ints(-1), name=f"{name}.mean")
    shifted = graph.add("Add", mean, epsilon, name=f"{name}.shifted")
    rms = graph.add("Sqrt", shifted, name=f"{name}.rms")
    normalized = graph.add("Div", x, rms, name=f"{name}.normalized")
    weight = graph.weight(f"{name}.weight", graph.read(f"{name}.weight"))
    return graph.add("Mul", normalized, weight, name=name)


def _half_rotation(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Reorder rows from the interleaved rotary layout to the half-rotation layout.

    GGUF stores the channels of a llama head as 0, D/2, 1, D/2 + 1, ... so that rotated pairs are
    neighbours; Hugging Face models rotate channel i with channel i + D/2.
    """
    pairs = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
    return np.reshape(pairs, values.shape)


def _linear(graph: _GraphBuilder, x: str, name: str, rotary_heads: int | None = None) -> str:
    """``x @ weight.T + bias``, for weights stored as ``(out_features, in_features)``."""

    def read(full_name: str) -> NDArray[np.float32]:
        values = graph.read(full_name)
        return values if rotary_heads is None else _half_rotation(values, rotary_heads)

    weight = graph.weight(f"{name}.weight", read(f"{name}.weight").T)
    if f"{name}.bias" not in graph.file.tensors:
        return graph.add("MatMul", x, weight, name=name)
    product = graph.add("MatMul", x, weight, name=f"{name}.product")
    return graph.add("Add", product, graph.weight(f"{name}.bias", read(f"{name}.bias")), name=name)


class _Positions(NamedTuple):
    """Cosine and sine of the rotary angles ``[sequence, head_dim]``, and the causal mask."""

    cosine: str
    sine: str
    mask: str


def _positions(graph: _GraphBuilder, config: DecoderConfig) -> _Positions:
    """Add what depends on the positions of the new tokens, the same for all layers.

    Angles are computed in float64: in float32 the angle of a late position has lost digits.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    if "rope_freqs.weight" in graph.file.tensors:
        frequencies = frequencies / graph.read("rope_freqs.weight")
    zero = graph.constant("zero", np.array(0, np.int64))
    one = graph.constant("one", np.array(1, np.int64))
    sequence = graph.add("Shape", "input_ids", start=1, end=2, name="sequence.shape")
    sequence = graph.add("Squeeze", sequence, name="sequence")
    past = graph.add("Shape", "past_key_values.0.key", start=2, end=3, name="past.shape")
    past = graph.add("Squeeze", past, name="past")
    total = graph.add("Add", past, sequence, name="total")
    queries = graph.add("Range", past, total, one, name="queries")
    queries = graph.add("Unsqueeze", queries, graph.ints(1), name="query_positions")
    keys = graph.add("Range", zero, total, one, name="key_positions")

    future = graph.add("Greater", keys, queries, name="future")
    masked = graph.constant("masked", np.array(-np.inf, np.float32))
    visible = graph.constant("visible", np.array(0, np.float32))
    mask = graph.add("Where", future, masked, visible, name="mask")

    positions = graph.add("Cast", queries, to=TensorProto.DOUBLE, name="positions")
    both_halves = graph.constant("rotary_frequencies", np.tile(frequencies, 2))
    angles = graph.add("Mul", positions, both_halves, name="angles")

    def sine(name: str, angle: str) -> str:
        exact = graph.add("Sin", angle, name=f"{name}.float64")
        return graph.add("Cast", exact, to=TensorProto.FLOAT, name=name)

    # Sine only: older runtimes have no cosine in float64.
    quarter_turn = graph.constant("quarter_turn", np.array(math.pi / 2))
    shifted = graph.add("Add", angles, quarter_turn, name="angles.shifted")
    return _Positions(cosine=sine("cosine", shifted), sine=sine("sine", angles), mask=mask)


def _rotary(graph: _GraphBuilder, config: DecoderConfig, x: str, positions: _Positions) -> str:
    """Rotate ``x`` of shape ``[batch, heads, sequence, head_dim]``."""
    middle, end = graph.ints(config.head_dim // 2), graph.ints(config.head_dim)
    first = graph.add("Slice", x, graph.ints(0), middle, graph.ints(3), name=f"{x}.first")
    second = graph.add("Slice", x, middle, end, graph.ints(3), name=f"{x}.second")
    negative = graph.add("Neg", second, name=f"{x}.negative")
    turned = graph.add("Concat", negative, first, axis=3, name=f"{x}.turned")
    straight = graph.add("Mul", x, positions.cosine, name=f"{x}.cosine")
    across = graph.add("Mul", turned, positions.sine, name=f"{x}.sine")
    return graph.add("Add", straight, across, name=f"{x}.rotary")


def _attention(
    graph: _GraphBuilder, config: DecoderConfig, layer: int, x: str, positions: _Positions
) -> str:
    """Grouped-query attention of one layer, with its past and present cache."""
    block = f"blk.{layer}."
    heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim

    def split_heads(name: str, count: int, *, rotary: bool) -> str:
        interleaved = rotary and config.architecture == "llama"
        x_linear = _linear(graph, x, block + name, count if interleaved else None)
        shape = graph.ints(0, 0, count, head_dim)
        split = graph.add("Reshape", x_linear, shape, name=f"{x_linear}.split")
        split = graph.add("Transpose", split, perm=[0, 2, 1, 3], name=f"{x_linear}.heads")
        return _rotary(graph, config, split, positions) if rotary else split

    def cache(kind: str, new: str) -> str:
        past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
        graph.inputs.append(_float32(past, "batch", kv_heads, "past", head_dim))
        graph.outputs.append(_float32(present, "batch", kv_heads, "past + sequence", head_dim))
        graph.add("Concat", past, new, axis=2, name=present)
        # [batch, kv_heads, 1, tokens, head_dim]: one cache row serves its group of query heads.
        return graph.add("Unsqueeze", present, graph.ints(2), name=f"{block}{kind}")

    query = split_heads("attn_q", heads, rotary=True)
    key = cache("key", split_heads("attn_k", kv_heads, rotary=True))
    value = cache("value", split_heads("attn_v", kv_heads, rotary=False))

    scale = graph.constant("attention_scale", np.array(head_dim**-0.5, np.float32))
    query = graph.add("Mul", query, scale, name=f"{block}query.scaled")
    groups = graph.ints(0, kv_heads, heads // kv_heads, -1, head_dim)
    query = graph.add("Reshape", query, groups, name=f"{block}query")
    key = graph.add("Transpose", key, perm=[0, 1, 2, 4, 3], name=f"{block}key.transposed")
    scores = graph.add("MatMul", query, key, name=f"{block}scores")
    scores = graph.add("Add", scores, positions.mask, name=f"{block}scores.masked")
    weights = graph.add("Softmax", scores, axis=-1, name=f"{block}attention_weights")
    mixed = graph.add("MatMul", weights, value, name=f"{block}attention")
    mixed = graph.add(
        "Reshape", mixed, graph.ints(0, heads, -1, head_dim), name=f"{block}attention.heads"
    )
    mixed = graph.add("Transpose", mixed, perm=[0, 2, 1, 3], name=f"{block}attention.tokens")
    merged = graph.ints(0, 0, heads * head_dim)
    mixed = graph.add("Reshape", mixed, merged, name=f"{block}attention.merged")
    return _linear(graph, mixed, f"{block}attn_output")


def _feed_forward(graph: _GraphBuilder, layer: int, x: str) -> str:
    """SwiGLU layer: ``down(silu(gate(x)) * up(x))``."""
    block = f"blk.{layer}."
    gate = _linear(graph, x, f"{block}ffn_gate")
    sigmoid = graph.add("Sigmoid", gate, name=f"{block}ffn_gate.sigmoid")
    silu = graph.add("Mul", gate, sigmoid, name=f"{block}ffn_gate.silu")
    up = _linear(graph, x, f"{block}ffn_up")
    product = graph.add("Mul", silu, up, name=f"{block}ffn_product")
    return _linear(graph, product, f"{block}ffn_down")


def _decoder(graph: _GraphBuilder, config: DecoderConfig) -> None:
    """Add the whole graph, from token ids to logits."""
    every = np.array(np.iinfo(np.int64).max, np.int64)
    graph.inputs.append(
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    )
    # An input with an initializer of the same name is optional; the initializer is its default.
    graph.constant("num_logits", every)
    graph.inputs.append(helper.make_tensor_value_info("num_logits", TensorProto.INT64, []))
    graph.outputs.append(_float32("logits", "batch", "scored", config.vocab_size))

    embedding = graph.weight("token_embd.weight", graph.read("token_embd.weight"))
    x = graph.add("Gather", embedding, "input_ids", name="token_embd")
    positions = _positions(graph, config)
    for layer in range(config.layers):
        norm = _rms_norm(graph, config, x, f"blk.{layer}.attn_norm")
        attention = _attention(graph, config, layer, norm, positions)
        x = graph.add("Add", x, attention, name=f"blk.{layer}.attn_residual")
        norm = _rms_norm(graph, config, x, f"blk.{layer}.ffn_norm")
        x = graph.add("Add", x, _feed_forward(graph, layer, norm), name=f"blk.{layer}.ffn_residual")

    # Only the last `num_logits` positions meet the vocabulary, the widest matrix by far.
    unscored = graph.add("Sub", "sequence", "num_logits", name="unscored.signed")
    unscored = graph.add("Max", unscored, "zero", name="unscored")
    unscored = graph.add("Unsqueeze", unscored, graph.ints(0), name="scored.start")
    end = graph.add("Unsqueeze", "sequence", graph.ints(0), name="scored.end")
    x = graph.add("Slice", x, unscored, end, graph.ints(1), name="scored")
    x = _rms_norm(graph, config, x, "output_norm")
    if "output.weight" in graph.file.tensors:
        embedding = graph.weight("output.weight", graph.read("output.weight"))
    # Gemm takes the embedding as it is stored, so that tied weights exist once.
    rows = graph.add("Reshape", x, graph.ints(-1, config.embedding_length), name="logits.input")
    flat = graph.add("Gemm", rows, embedding, transB=1, name="logits.rows")
    x_shape = graph.add("Shape", x, start=0, end=2, name="logits.leading")
    shape = graph.add("Concat", x_shape, graph.ints(config.vocab_size), axis=0, name="logits.shape")
    graph.add("Reshape", flat, shape, allowzero=1, name="logits")


def _float32(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

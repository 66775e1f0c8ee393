"""Keys, values and queries of a decoder that reads a text once, as `nsq_ref.audit` takes them.

Queries are an intermediate result of the graph. They are had by making them outputs of a copy in
memory; the file, and its weights, stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsq_ref.arrays import as_integer
from nsq_ref.audit import Layer
from nsq_ref.extras import extra
from nsq_ref.files import kinds
from onnx_export.models.built import Progress, cached_onnx
from onnx_export.models.config import read_config
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.json_tokenizer import TOKENIZER, read_tokenizer
from onnx_export.models.tokenizer import Tokenizer
from onnx_export.rewrite import files
from onnx_export.rewrite.found import Found
from onnx_export.rewrite.graph import Graph
from onnx_export.rewrite.patterns import PATTERNS
from onnx_export.rewrite.survey import layer_numbers, survey
from onnx_export.running.model import FAULTS, said

with extra("onnx", __name__):
    import onnx
    import onnxruntime

__all__ = ["LEAST_TOKENS", "Captured", "captured"]

Array = NDArray[Any]

LEAST_TOKENS = 16
"""Fewer tell nothing of a model."""

EXTERNAL = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True, eq=False)
class Captured:
    """What one text left in a decoder; it never changes.

    Attributes
    ----------
    layers : tuple of Layer
        With queries where they could be had.
    tokens, text_tokens : int
        That were read, and that the text has.
    without_queries : str
        Why layers have no queries; empty where they have.

    Examples
    --------
    See `captured`.
    """

    layers: tuple[Layer, ...]
    tokens: int
    text_tokens: int
    without_queries: str = ""


def captured(
    model: str | os.PathLike[str],
    text: str,
    *,
    tokens: int = 1024,
    progress: Progress | None = None,
) -> Captured:
    """Read a text once and return what the caches of all layers then hold.

    Parameters
    ----------
    model : str or os.PathLike
        A GGUF file of the Llama family, or an exported ONNX decoder with a ``tokenizer.json``
        beside it, whose caches are float32 or float16 and grow.
    text : str
    tokens : int
        So many of its first tokens are read, if it has them.
    progress : callable, optional
        Called as ``progress(what, done, total)``.

    Returns
    -------
    Captured

    Raises
    ------
    TypeError, ValueError
        For a text that is too short, and a model that is not understood, with what is in the way.
    OSError
        Where a file cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> found = captured(tiny_gguf(tempfile.mkdtemp()), "A text of some tokens, which are bytes.")
    >>> found.tokens, found.layers[1].keys.shape, found.layers[1].queries.shape
    (39, (1, 2, 39, 8), (1, 4, 39, 8))
    """
    tokens = as_integer("tokens", tokens, least=LEAST_TOKENS)
    path = Path(model)
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return _of_gguf(path, text, tokens, progress)
    if found := kinds.mistaken(path, "an ONNX model"):
        raise ValueError(found)
    return _of_onnx(path, text, tokens)


def _of_gguf(path: Path, text: str, tokens: int, progress: Progress | None) -> Captured:
    config = read_config(GGUFFile(path))
    ids, length = _ids(Tokenizer(path), text, min(tokens, config.context_length))
    config.require_ids(ids, "text")
    built = cached_onnx(path, progress=progress)
    proto = onnx.load(str(built), load_external_data=False)
    numbers = range(config.layers)
    caches = [f"present.{i}.{side}" for i in numbers for side in ("key", "value")]
    queries = [f"blk.{i}.query" for i in numbers]
    empty = np.zeros((1, config.kv_heads, 0, config.head_dim), np.float32)
    feeds: dict[str, Array] = {name.replace("present", "past_key_values"): empty for name in caches}
    feeds |= {"input_ids": ids[None], "num_logits": np.array(0, np.int64)}
    found = _run(proto, built, feeds, caches, queries)
    shape = 1, config.heads, len(ids), config.head_dim
    unscaled = np.float32(config.head_dim**0.5)  # the graph scales queries before it names them
    layers = [
        Layer(i, found[f"present.{i}.key"], found[f"present.{i}.value"],
              found[f"blk.{i}.query"].reshape(shape) * unscaled)
        for i in numbers
    ]  # fmt: skip
    return Captured(tuple(layers), len(ids), length)


def _of_onnx(path: Path, text: str, tokens: int) -> Captured:
    tokenizer = path.parent / TOKENIZER
    if not tokenizer.is_file():
        raise ValueError(f"{path} has no {TOKENIZER} beside it; put that of its model there")
    ids, length = _ids(read_tokenizer(tokenizer), text, tokens)
    proto = files.read(path)
    proto = files.inlined(proto, {one for pattern in PATTERNS for one in pattern.ANCHORS})
    found = []
    for one in survey(Graph(files.as_ir(proto, path.parent))):
        if not isinstance(one, Found):
            raise ValueError(f"{path}: attention {one.node.name!r}: {one.reason}")
        found.append(one)
    if not found:
        raise ValueError(f"{path} has no attention with a cache; export the decoder with its past")
    numbers = layer_numbers(found)
    feeds = _feeds(path, proto, ids)
    for one in found:
        for cache, width in ((one.key_cache, one.head_dim), (one.value_cache, one.value_head_dim)):
            name = str(cache.past.name)
            if cache.capacity is not None or _fixed(proto, name, cache.layout):
                raise ValueError(
                    f"{path}: cache {name!r} has a fixed size; export it with one that grows, or "
                    "audit arrays"
                )
            sizes = {"B": 1, "N": one.kv_heads, "S": 0, "D": width, "H": one.kv_heads * width}
            shape = [sizes[axis] for axis in cache.layout]
            feeds[name] = np.zeros(shape, one.dtype)
    _require_known(path, proto, feeds)
    presents = [str(c.present.name) for one in found for c in (one.key_cache, one.value_cache)]
    tables = {one.name: one for one in proto.graph.initializer}
    why = next((fault for one in found if (fault := _no_queries(one, tables))), "")
    asked = [] if why else [str(one.query.value.name) for one in found]
    values = _run(proto, path, feeds, presents, asked)
    layers = []
    for one in sorted(found, key=lambda one: numbers[one]):
        keys, cached = (
            _heads(values[str(cache.present.name)], cache.layout, one.kv_heads)
            for cache in (one.key_cache, one.value_cache)
        )
        queries = None if why else _queries(one, values, tables, path.parent)
        layers.append(Layer(numbers[one], keys, cached, queries, one.scale))
    return Captured(tuple(layers), len(ids), length, why)


def _no_queries(found: Found, tables: Mapping[str, onnx.TensorProto]) -> str:
    """Return why queries as they meet the keys are not had; empty where they are."""
    if found.query_norm is not None or found.projection_bias is not None:
        return "queries are normalized, or get a bias, within the attention"
    rotary = found.rotary
    if rotary is not None and not {rotary.cos.name, rotary.sin.name} <= set(tables):
        return "angles of queries are computed within the model"
    return ""


def _queries(
    found: Found, values: Mapping[str, Array], tables: Mapping[str, onnx.TensorProto], folder: Path
) -> NDArray[np.float32]:
    """Return queries as they meet the keys, rotated if the attention does it."""
    given, width = values[str(found.query.value.name)], found.heads * found.head_dim
    if found.key is None:  # packed, the queries first
        given = given[..., :width]
    queries = _heads(given, found.query.layout, found.heads)
    if found.rotary is None:
        return queries
    cosine, sine = (
        onnx.numpy_helper.to_array(tables[str(one.name)], str(folder))[: queries.shape[2]]
        for one in (found.rotary.cos, found.rotary.sin)
    )
    return _rotated(queries, cosine, sine, found.rotary.interleaved)


def _rotated(
    x: NDArray[np.float32], cosine: Array, sine: Array, interleaved: bool
) -> NDArray[np.float32]:
    """Turn the first channels by the angles of positions that count from 0."""
    half = cosine.shape[1]
    parts = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    if not interleaved:
        parts = (slice(0, half), slice(half, 2 * half))
    first, second = (x[..., part] for part in parts)
    turned: NDArray[np.float32] = x.copy()
    turned[..., parts[0]] = first * cosine - second * sine
    turned[..., parts[1]] = second * cosine + first * sine
    return turned


def _heads(array: Array, layout: str, heads: int) -> NDArray[np.float32]:
    """Bring a tensor of any layout into float32 ``[batch, heads, tokens, head_dim]``."""
    if layout == "BSH":
        array, layout = array.reshape(*array.shape[:2], heads, -1), "BSND"
    order = [layout.index(axis) for axis in "BNSD"]
    moved: NDArray[np.float32] = np.ascontiguousarray(array.transpose(order), np.float32)
    return moved


def _feeds(path: Path, proto: onnx.ModelProto, ids: NDArray[np.int64]) -> dict[str, Array]:
    """Return the inputs that say what is read, by the names that all exporters use."""
    places = np.arange(len(ids))
    known = {
        "input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": places,
    }  # fmt: skip
    feeds = {}
    for one in proto.graph.input:
        if one.name in known:
            kind = onnx.helper.tensor_dtype_to_np_dtype(one.type.tensor_type.elem_type)
            feeds[one.name] = known[one.name][None].astype(kind)
    if "input_ids" not in feeds:
        raise ValueError(f"{path} has no input 'input_ids'; audit arrays of it")
    return feeds


def _require_known(path: Path, proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> None:
    optional = {one.name for one in proto.graph.initializer}
    for one in proto.graph.input:
        if one.name not in feeds and one.name not in optional:
            raise ValueError(f"{path}: it is not known what input {one.name!r} is; audit arrays")


def _fixed(proto: onnx.ModelProto, name: str, layout: str) -> bool:
    """Whether the axis of tokens of an input is a number for good."""
    (given,) = [one for one in proto.graph.input if one.name == name]
    axes = given.type.tensor_type.shape.dim
    return len(axes) == len(layout) and axes[layout.index("S")].dim_value > 0


def _ids(tokenizer: Any, text: str, most: int) -> tuple[NDArray[np.int64], int]:
    ids = tokenizer.encode(text)
    if len(ids) < LEAST_TOKENS:
        raise ValueError(
            f"the text has {len(ids)} tokens; give one of at least {LEAST_TOKENS}, better {1024}"
        )
    return ids[:most], len(ids)


def _run(
    proto: onnx.ModelProto,
    path: Path,
    feeds: Mapping[str, Array],
    outputs: list[str],
    hidden: list[str],
) -> dict[str, Array]:
    """Run a model once; ``hidden`` are values within it, which become outputs."""
    known = {one.name for one in proto.graph.output}
    for name in dict.fromkeys(hidden):
        if name not in known:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    options.add_session_config_entry(EXTERNAL, str(path.parent.absolute()))
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        wanted = [*outputs, *hidden]
        return dict(zip(wanted, session.run(wanted, dict(feeds)), strict=True))
    except FAULTS as error:
        raise ValueError(f"{path}: ONNX Runtime does not run it: {said(error)}") from error

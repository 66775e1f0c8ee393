"""Keys, values and queries of a decoder that reads a text once, as `nsq_ref.audit` takes them.

Keys and values are what its cache then holds. Queries are an intermediate result of the graph: they
are had by making them outputs of a copy in memory; the file, and its weights, stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nsq_ref.arrays import as_integer
from nsq_ref.audit import Layer
from nsq_ref.extras import extra
from onnx_export.evaluation.exported import cache_layers, exported_layout, heads_first
from onnx_export.evaluation.models import model_file, open_model, require_vocabulary
from onnx_export.evaluation.protocols import prefilled
from onnx_export.evaluation.surveyed import attentions
from onnx_export.models.built import Progress, cached_onnx
from onnx_export.models.config import read_config
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.json_tokenizer import GGUF, context_length, tokenizer_of
from onnx_export.models.texts import require_tokens
from onnx_export.operators.cache_layout import CacheLayout
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
    tokenizer: str | os.PathLike[str] | None = None,
    require_queries: bool = False,
    progress: Progress | None = None,
) -> Captured:
    """Read a text once and return what the caches of all layers then hold.

    Parameters
    ----------
    model : str or os.PathLike
        What `onnx_export.evaluation.open_model` takes: a GGUF file of the Llama family, an exported
        ONNX decoder, or the folder of one or of a model of transformers.
    text : str
    tokens : int
        So many of its first tokens are read, if it has them and the model's context does.
    tokenizer : str or os.PathLike, optional
        Another one than that in the file, or beside it.
    require_queries : bool
        Refuse a model of which queries are not had, before it reads.
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
    path = model_file(model)
    every = tokenizer_of(path, tokenizer).encode(text)
    require_tokens(every, LEAST_TOKENS)
    if path.is_dir():
        why = "a model of transformers gives no queries out"
        if require_queries:
            raise ValueError(
                f"{path}: {why}; export it to ONNX, or take nsq_ref.transformers.query_moments"
            )
        opened = open_model(path)
        ids = every[: min(tokens, opened.context_length or tokens)]
        require_vocabulary("text", ids, opened.vocab_size, opened.name)
        cache = zip(*prefilled(opened, ids), strict=True)
        layers = [Layer(number, *sides) for number, sides in enumerate(cache)]
        return Captured(tuple(layers), len(ids), len(every), why)
    with path.open("rb") as file:
        gguf = file.read(len(GGUF)) == GGUF
    source = _of_gguf(path, progress) if gguf else _of_onnx(path)
    if require_queries and source.without_queries:
        raise ValueError(f"{path}: {source.without_queries}; queries are not had")
    ids = every[: min(tokens, source.context_length or tokens)]
    require_vocabulary("text", ids, _vocab_size(source), path.name)
    return Captured(tuple(_read(source, ids)), len(ids), len(every), source.without_queries)


class _Query(NamedTuple):
    """Where the queries of a layer are, and what makes them ``[1, heads, tokens, head_dim]``.

    That is given them, and all values within the model that were asked for: ``tables`` too.
    """

    name: str
    softmax_scale: float | None
    in_heads: Callable[[Array, Mapping[str, Array]], NDArray[np.float32]]
    tables: tuple[str, ...] = ()


class _Source(NamedTuple):
    """A graph, the names of its cache, and the queries of its layers by their numbers."""

    path: Path
    proto: onnx.ModelProto
    layout: CacheLayout
    context_length: int | None
    queries: Mapping[int, _Query]
    without_queries: str


def _of_gguf(path: Path, progress: Progress | None) -> _Source:
    config = read_config(GGUFFile(path))
    built = cached_onnx(path, progress=progress)
    proto = onnx.load(str(built), load_external_data=False)
    unscaled = np.float32(config.head_dim**0.5)  # the graph scales queries before it names them

    def in_heads(given: Array, _: Mapping[str, Array]) -> NDArray[np.float32]:
        heads: NDArray[np.float32] = given.reshape(1, config.heads, -1, config.head_dim) * unscaled
        return heads

    queries = {i: _Query(f"blk.{i}.query", None, in_heads) for i in range(config.layers)}
    return _Source(built, proto, _layout(built, proto), config.context_length, queries, "")


def _of_onnx(path: Path) -> _Source:
    surveyed = attentions(path)
    layout = _layout(path, surveyed.proto)
    numbers = {one.key.past: one.number for one in cache_layers(layout, path)}
    queries = {
        numbers[str(one.key_cache.past.name)]: _Query(
            str(one.query.value.name),
            one.scale,
            lambda given, all_of, one=one: surveyed.queries(one, given, path.parent, all_of),  # type: ignore[misc]
            surveyed.computed_tables(one),
        )
        for one in surveyed.found
        if one.key_cache.past.name in numbers
    }
    why = surveyed.without_queries()
    if not why and (missing := sorted(set(numbers.values()) - set(queries))):
        why = f"layer {missing[0]}: no attention that is known reads its cache"
    context = layout.context_length or context_length(path.parent)
    return _Source(path, surveyed.proto, layout, context, queries, why)


def _layout(path: Path, proto: onnx.ModelProto) -> CacheLayout:
    told = {one.key: one.value for one in proto.metadata_props}
    return exported_layout(path) or CacheLayout.from_metadata(told)


def _read(source: _Source, ids: NDArray[np.int64]) -> list[Layer]:
    """Run the model on tokens, from an empty cache."""
    layers = cache_layers(source.layout, source.path)
    values = {
        "input_ids": ids[None], "attention_mask": np.ones((1, len(ids))),
        "position_ids": np.arange(len(ids))[None], "past_lengths": np.zeros(1),
        "new_lengths": np.array([len(ids)]), "total_lengths": np.array([len(ids)]),
        "num_logits": np.array(0),
    }  # fmt: skip
    dtypes = {
        one.name: onnx.helper.tensor_dtype_to_np_dtype(one.type.tensor_type.elem_type)
        for one in source.proto.graph.input
    }
    roles = source.layout.roles
    feeds: dict[str, Array] = {
        roles[role]: value.astype(dtypes[roles[role]])
        for role, value in values.items()
        if role in roles
    }
    tensors = [tensor for one in layers for tensor in (one.key, one.value)]
    feeds |= {one.past: np.zeros(one.sizes(1, 0), dtypes[one.past]) for one in tensors}
    asked = {} if source.without_queries else source.queries
    found = _run(
        source.proto, source.path, feeds,
        [one.present for one in tensors],
        [name for one in asked.values() for name in (one.name, *one.tables)],
    )  # fmt: skip
    read = []
    for one in layers:
        keys, cached = (
            np.ascontiguousarray(found[side.present].transpose(heads_first(side, source.path)))
            for side in (one.key, one.value)
        )
        if keys.shape[2] != len(ids):
            raise ValueError(
                f"{source.path} keeps {keys.shape[2]} of {len(ids)} tokens; only caches that keep "
                "all are understood"
            )
        query = source.queries.get(one.number)
        queries = query.in_heads(found[query.name], found) if query and asked else None
        scale = query.softmax_scale if query else None
        read.append(
            Layer(one.number, keys.astype(np.float32), cached.astype(np.float32), queries, scale)
        )
    return read


def _vocab_size(source: _Source) -> int | None:
    for one in source.proto.graph.output:
        if one.name == source.layout.roles["logits"] and one.type.tensor_type.shape.dim:
            return one.type.tensor_type.shape.dim[-1].dim_value or None
    return None


def _run(
    proto: onnx.ModelProto,
    path: Path,
    feeds: Mapping[str, Array],
    outputs: list[str],
    hidden: list[str],
) -> dict[str, Array]:
    """Run a model once; ``hidden`` are values within it, which become outputs."""
    known = {one.name for one in proto.graph.output}
    hidden = list(dict.fromkeys(hidden))
    for name in hidden:
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

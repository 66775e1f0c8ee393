"""The cache of a float decoder as exporters write it, read from names and shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nsq_ref.audit.layers import side_in_name
from nsq_ref.extras import extra
from onnx_export.operators.cache_layout import (
    KEY,
    NAMED_RANKS,
    CacheLayout,
    CacheTensor,
    layer_in_name,
)

with extra("onnx", __name__):
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import helper

__all__ = ["NamedLayer", "cache_layers", "exported_layout", "heads_first", "side_of"]

SIDES = ("key", "value")
FLOATS = ("float32", "float16")
CONFIGS = ("genai_config.json", "config.json")


def exported_layout(path: Path) -> CacheLayout | None:
    """Return the layout of an exported decoder; None of a model whose metadata says it.

    Parameters
    ----------
    path : pathlib.Path

    Raises
    ------
    ValueError
        If it is no decoder whose cache are inputs and outputs that grow.

    Examples
    --------
    >>> from onnx_export.models.tiny import tiny_onnx
    >>> exported_layout(tiny_onnx()) is None
    True
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        return None  # ONNX Runtime says better what it is
    if any(entry.key == KEY for entry in model.metadata_props):
        return None
    weights = {one.name for one in model.graph.initializer}
    inputs = {one.name: one for one in model.graph.input if one.name not in weights}
    outputs = {one.name: one for one in model.graph.output}
    roles = {name: name for name, rank in NAMED_RANKS.items() if _rank(inputs.get(name)) == rank}
    if "input_ids" not in roles or "logits" not in outputs:
        raise ValueError(f"{path} has no input_ids, or no logits; give a decoder of tokens")
    roles["logits"] = "logits"
    tensors = []
    for name, value in inputs.items():
        if side_of(name) is None or _dtype(value) not in FLOATS:
            continue
        present = [one for one in _presents(name) if one in outputs]
        if not present:
            raise ValueError(f"{path}: no output is what {name!r} has grown to")
        shape = _shape(path, name, _sizes(value), _sizes(outputs[present[0]]))
        tensors.append(CacheTensor(name, present[0], _dtype(value), shape))
    if not tensors:
        raise ValueError(
            f"{path} has no cache; export it with past keys and values as inputs (in optimum, "
            "text-generation-with-past)"
        )
    known = {*roles.values(), *(one.past for one in tensors)}
    if unknown := [name for name in inputs if name not in known]:
        raise ValueError(f"{path}: it is not known what input {unknown[0]!r} is; export without it")
    return CacheLayout(roles, tuple(sorted(tensors, key=_order)), (None,))


def side_of(name: str) -> int | None:
    """Return 0 for the name of keys, 1 of values, None of anything else.

    Examples
    --------
    >>> [side_of(n) for n in ("past_key_values.3.value", "past_key_values.3.key", "key_0", "mask")]
    [1, 0, 0, None]
    """
    side = side_in_name(name.lower().replace("past_key_value", "past"))
    return SIDES.index(side) if side in SIDES else None


class NamedLayer(NamedTuple):
    """The cache of a layer: its number, and the tensors of keys and values.

    Nothing changes one, so that threads may share it.
    """

    number: int
    key: CacheTensor
    value: CacheTensor


def cache_layers(layout: CacheLayout, path: Path) -> list[NamedLayer]:
    """Return the caches of float keys and values that grow, numbered as their names are.

    Where names have no numbers they are counted.

    Parameters
    ----------
    layout : CacheLayout
    path : pathlib.Path
        Of the model, for what is said of it.

    Raises
    ------
    ValueError
        If the cache is another one.

    Examples
    --------
    >>> from onnx_export.models.tiny import tiny_onnx
    >>> from onnx_export.running import Model
    >>> path = tiny_onnx()
    >>> [(one.number, one.value.past) for one in cache_layers(Model(path).layout, path)]
    [(0, 'past_key_values.0.value'), (1, 'past_key_values.1.value')]
    """
    if any(pair is not None for pair in layout.schemes):
        raise ValueError(f"{path} has a quantized cache; give the model that it was rewritten from")
    if not layout.tensors or not all(one.grows for one in layout.tensors):
        raise ValueError(f"{path} has no cache of float keys and values that grows")
    keys, values = ([one for one in layout.tensors if side_of(one.past) == side] for side in (0, 1))
    if not keys or len(keys) != len(values) or len(keys) + len(values) != len(layout.tensors):
        raise ValueError(
            f"{path}: of its cache {len(keys)} tensors are keys and {len(values)} values by their "
            "names; name them as exporters do, past_key_values.0.key"
        )
    numbers = [layer_in_name(one.past) for one in keys]
    if numbers != [layer_in_name(one.past) for one in values]:
        numbers = []
    named = [number for number in numbers if number is not None]
    if len(set(named)) != len(keys):
        named = list(range(len(keys)))
    return [NamedLayer(*one) for one in zip(named, keys, values, strict=True)]


def heads_first(tensor: CacheTensor, path: Path) -> tuple[int, ...]:
    """Return the axes of a cache in the order batch, heads, tokens, channels.

    Examples
    --------
    >>> heads_first(CacheTensor("a", "b", "float32", ("batch", "past", 2, 8)), Path("a.onnx"))
    (0, 2, 1, 3)
    """
    shape = tensor.shape
    if len(shape) != 4 or shape[0] != "batch" or shape.index("past") not in (1, 2):
        raise ValueError(f"{path}: a cache of shape {shape} is not known; export another form")
    return (0, 1, 2, 3) if shape[2] == "past" else (0, 2, 1, 3)


def _presents(name: str) -> Iterator[str]:
    """Yield what exporters call the output of a past."""
    yield name.replace("past_key_values", "present")
    yield name.replace("past_key_values", "present_key_values")
    yield name.replace("past", "present")
    yield f"updated_{name}"


def _order(tensor: CacheTensor) -> list[int]:
    """Return the numbers in a name: the tenth layer comes after the second."""
    digits = "".join(c if c.isdigit() else " " for c in tensor.past)
    return [int(number) for number in digits.split()]


def _shape(
    path: Path, name: str, past: list[int | str], present: list[int | str]
) -> tuple[int | str, ...]:
    """Return the shape as a layout has it, its heads and channels as numbers."""
    if len(past) != 4:
        raise ValueError(f"{path}: {name!r} has {len(past)} axes; known are caches of four")
    known = [at for at in (1, 2, 3) if isinstance(past[at], int)]
    if len(known) == 3:
        raise ValueError(f"{path}: {name!r} is of a fixed size, and does not grow")
    if known in ([1, 3], [2, 3]):
        past[0], past[3 - known[0]] = "batch", "past"
        return tuple(past)
    heads, channels = _configured(path.parent) or _surveyed(path, name) or (None, None)
    if known in ([1], [3], []) and heads and channels:
        sizes = {1: past[1] if 1 in known else heads, 3: past[3] if 3 in known else channels}
        return ("batch", sizes[1], "past", sizes[3])
    raise ValueError(
        f"{path}: {name!r} has shape {past}, and neither it nor a config beside it says how many "
        "heads and channels there are"
    )


def _configured(folder: Path) -> tuple[int, int] | None:
    """Return heads and channels of keys as a config beside the model has them."""
    for file in CONFIGS:
        try:
            config: Any = json.loads((folder / file).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(config, dict):
            config = config.get("model", {}).get("decoder") or config
            heads, channels = config.get("num_key_value_heads"), config.get("head_dim")
            channels = config.get("head_size", channels)
            if type(heads) is int and type(channels) is int:
                return heads, channels
    return None


def _surveyed(path: Path, name: str) -> tuple[int, int] | None:
    """Return heads and channels of a cache as the attention that reads it has them."""
    from onnx_export.evaluation.surveyed import attentions  # noqa: PLC0415  its extra is rewrite

    for one in attentions(path).found:
        for cache, channels in (
            (one.key_cache, one.head_dim),
            (one.value_cache, one.value_head_dim),
        ):
            if cache.past.name == name:
                return one.kv_heads, channels
    return None


def _rank(value: onnx.ValueInfoProto | None) -> int | None:
    return None if value is None else len(value.type.tensor_type.shape.dim)


def _dtype(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type.elem_type
    return str(helper.tensor_dtype_to_np_dtype(kind)) if kind else ""


def _sizes(value: onnx.ValueInfoProto) -> list[int | str]:
    dims = value.type.tensor_type.shape.dim
    return [one.dim_value if one.HasField("dim_value") else one.dim_param for one in dims]

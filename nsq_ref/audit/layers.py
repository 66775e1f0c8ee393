"""Keys, values and queries of a model, layer by layer: taken as users have them, or refused.

Names that files use are read here too: which side an array is, and of which layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from nsq_ref.arrays import as_float_array
from nsq_ref.dtypes import Array, Float32

__all__ = ["Layer", "as_layers", "layers_of_arrays", "side_in_name"]

SIDES = {
    "key": ("k", "key", "keys"),
    "value": ("v", "value", "values"),
    "query": ("q", "query", "queries"),
}
PLURAL = {"key": "keys", "value": "values", "query": "queries"}
SIDE_OF_WORD = {word: side for side, words in SIDES.items() for word in words}
FLOAT16_MOST = 65504


class Layer(NamedTuple):
    """What one layer's cache would hold, and who asks it.

    Attributes
    ----------
    number : int
    keys : float32 array, [batch, kv_heads, T, D]
    values : float32 array, [batch, kv_heads, T, value_head_dim]
    queries : float32 array, [batch, heads, T, D], or None
        As they meet the keys: after the rotary embedding, before the scores are scaled.
    softmax_scale : float, optional
        By which the scores are multiplied; ``1 / sqrt(D)`` when not given.
    """

    number: int
    keys: Float32
    values: Float32
    queries: Float32 | None = None
    softmax_scale: float | None = None

    @property
    def scale(self) -> float:
        """By which scores are multiplied."""
        given = self.softmax_scale
        return float(self.keys.shape[-1] ** -0.5) if given is None else given

    @property
    def group(self) -> int:
        """Heads of queries that share a head of keys."""
        return 1 if self.queries is None else self.queries.shape[1] // self.keys.shape[1]


class _Given(NamedTuple):
    """An array of one layer, and how its user knows it."""

    name: str
    array: Array
    at: tuple[int, ...] = ()  # where the layer is in an array of all layers


def as_layers(keys: Any, values: Any, queries: Any = None) -> list[Layer]:
    """Take keys and values of all layers.

    Parameters
    ----------
    keys, values : array or sequence of array
        ``[layers, batch, kv_heads, T, D]``, or without the axis of the batch; or an array
        ``[batch, kv_heads, T, D]`` for each layer, which may differ in shape.
    queries : array or sequence of array, optional
        The same with the heads of the queries, a multiple of those of the keys.

    Returns
    -------
    list of Layer

    Raises
    ------
    TypeError
        For what is no array of a float dtype.
    ValueError
        For shapes that do not fit, empty arrays, and what is not finite, by its index.

    Examples
    --------
    >>> import numpy as np
    >>> keys = np.ones((2, 1, 3, 10, 4), np.float32)
    >>> [layer.number for layer in as_layers(keys, keys)]
    [0, 1]
    >>> as_layers(keys, keys[:1])
    Traceback (most recent call last):
      ...
    ValueError: there are keys of layer 1, but no values; give both of every layer
    """
    given = {"key": _by_layer("keys", keys), "value": _by_layer("values", values)}
    if queries is not None:
        given["query"] = _by_layer("queries", queries)
    return _layers(given)


def layers_of_arrays(arrays: Mapping[str, Array]) -> list[Layer]:
    """Take the arrays of a file: one for all layers of a side, or one for each layer.

    Parameters
    ----------
    arrays : mapping of str to array
        Names say the side (k, key or keys; v, value or values; q, query or queries) and, where
        there is one for each layer, its number: ``layers.3.keys``.

    Returns
    -------
    list of Layer
        By their numbers, of which some may be missing: layers of another kind, say.

    Raises
    ------
    TypeError, ValueError
        As `as_layers`, and for names that do not say what the array is.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((1, 2, 10, 4), np.float32)
    >>> names = [f"layers.{layer}.{side}" for layer in (2, 10) for side in ("keys", "values")]
    >>> [layer.number for layer in layers_of_arrays(dict.fromkeys(names, x))]
    [2, 10]
    """
    sides: dict[str, dict[int | None, _Given]] = {}
    for name, array in arrays.items():
        side, number = _side_of(name), _number_of(name)
        known = sides.setdefault(side, {})
        if number in known:
            what = "all layers" if number is None else f"layer {number}"
            raise ValueError(
                f"arrays {known[number].name!r} and {name!r} are both {PLURAL[side]} of {what}; "
                "leave one out"
            )
        known[number] = _Given(f"array {name!r}", array)
    given = {}
    for side, known in sides.items():
        if None in known and len(known) > 1:
            other = next(one.name for number, one in known.items() if number is not None)
            raise ValueError(
                f"{known[None].name} has no number of a layer and {other} has; number all or none"
            )
        if None in known:
            given[side] = _by_layer(*known[None][:2])
        else:
            given[side] = {number: one for number, one in known.items() if number is not None}
    for side in ("key", "value"):
        if side not in given:
            other = "value" if side == "key" else "key"
            names = ", ".join(repr(name) for name in list(arrays)[:4])
            raise ValueError(
                f"there are no {PLURAL[side]} among {names}; add an array named {PLURAL[side]}, "
                f"as there is one of {PLURAL[other]}"
            )
    return _layers(given)


def side_in_name(name: str) -> str | None:
    """Return what an array is by its name: ``"key"``, ``"value"`` or ``"query"``, or None.

    The last part that says anything decides: ``past_key_values.0.key`` is a key.

    Examples
    --------
    >>> [side_in_name(one) for one in ("past_key_values.0.key", "layers.1.v", "mask", "key_value")]
    ['key', 'value', None, None]
    """
    for component in reversed(re.split("[./]", name.lower())):
        words = re.findall("[a-z]+", component)
        found = {SIDE_OF_WORD[word] for word in words if word in SIDE_OF_WORD}
        if len(found) == 1:
            return found.pop()
        if found:
            break
    return None


def _side_of(name: str) -> str:
    if side := side_in_name(name):
        return side
    raise ValueError(
        f"array {name!r} is not named as keys, values or queries; rename it, such as "
        "layers.0.keys, or leave it out"
    )


def _number_of(name: str) -> int | None:
    found = re.findall("[0-9]{1,9}", name)
    return int(found[-1]) if found else None


def _by_layer(name: str, given: Any) -> dict[int, _Given]:
    """Cut an array of all layers, or take a sequence of one for each."""
    if isinstance(given, list | tuple):
        return {i: _Given(f"{name}[{i}]", one) for i, one in enumerate(given)}
    array = as_float_array(name, given)
    if array.ndim not in (4, 5):
        raise ValueError(
            f"{name} has shape {list(array.shape)}; give [layers, batch, kv_heads, tokens, "
            "head_dim], or one array for each layer"
        )
    return {i: _Given(name, one, (i,)) for i, one in enumerate(array)}


def _layers(given: Mapping[str, Mapping[int, _Given]]) -> list[Layer]:
    if not given["key"] and not given["value"]:
        raise ValueError("keys and values have no layers; give at least one")
    numbers = sorted({*given["key"], *given["value"], *given.get("query", {})})
    layers = []
    for number in numbers:
        found = {side: one[number] for side, one in given.items() if number in one}
        for side in given:
            if side not in found:
                has = PLURAL[next(iter(found))]
                raise ValueError(
                    f"there are {has} of layer {number}, but no {PLURAL[side]}; give both of every "
                    "layer"
                )
        layers.append(_layer(number, found))
    return layers


def _layer(number: int, found: Mapping[str, _Given]) -> Layer:
    arrays = {side: _taken(number, one) for side, one in found.items()}
    keys, values, queries = arrays["key"], arrays["value"], arrays.get("query")
    if keys.shape[:3] != values.shape[:3]:
        raise ValueError(
            f"layer {number}: {found['key'].name} is {_axes(keys)} and {found['value'].name} "
            f"{_axes(values)}; keys and values must be of the same batch, heads and tokens"
        )
    if queries is not None:
        own, wanted = queries.shape, (keys.shape[0], *keys.shape[2:])
        if (own[0], *own[2:]) != wanted or own[1] % keys.shape[1]:
            raise ValueError(
                f"layer {number}: {found['query'].name} is {_axes(queries)} and "
                f"{found['key'].name} {_axes(keys)}; queries must be of the same batch, tokens "
                "and head_dim, and their heads a multiple of the keys'"
            )
    return Layer(number, keys, values, queries)


def _axes(array: Array) -> str:
    return f"[batch, heads, tokens, head_dim] = {list(array.shape)}"


def _taken(number: int, given: _Given) -> Float32:
    """Return the float32 ``[batch, heads, T, D]`` of an array, all of it finite."""
    array = as_float_array(given.name, given.array)
    if array.ndim not in (3, 4):
        raise ValueError(
            f"{given.name} has shape {list(array.shape)}; a layer is [batch, kv_heads, tokens, "
            "head_dim]"
        )
    if not array.size:
        raise ValueError(
            f"{given.name} has shape {list(array.shape)} and holds "
            f"nothing of layer {number}; give at least one token of one head"
        )
    with np.errstate(over="ignore"):
        wide = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(wide).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(wide))[0])
        raise ValueError(
            f"{given.name}{[*given.at, *index]} is {array[index]} (layer {number}); "
            + _remedy(array, index)
        )
    return wide[None] if wide.ndim == 3 else wide


def _remedy(array: Array, index: tuple[int, ...]) -> str:
    value = array[index]
    if np.isfinite(value):
        return "that is beyond float32, scale it down"
    if np.isinf(value) and array.dtype == np.float16:
        return (
            f"float16 holds at most {FLOAT16_MOST}, and this was more: write it as float32 or "
            "bfloat16"
        )
    return "leave padding out and mend the values first, as one of them spoils every figure"

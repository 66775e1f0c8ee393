"""Which layers get which schemes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nsq_ref.scheme import KeyValueSchemes, Scheme, as_scheme

__all__ = ["schemes_by_layer"]

SIDES = ("key", "value")


def schemes_by_layer(
    layers: Sequence[int],
    key: Scheme | str,
    value: Scheme | str | None = None,
    policy: Mapping[str, Any] | None = None,
) -> dict[int, KeyValueSchemes | None]:
    """Return the schemes of every layer; None for one that stays as it is.

    Parameters
    ----------
    layers : sequence of int
        That the model has.
    key, value : Scheme or str
        Of all layers that the policy does not name; ``value`` is ``key`` by default.
    policy : mapping, optional
        ``{"default": ..., "layers": {"0": ..., "7": ...}}``, both optional. Each is None, the name
        of a scheme or of a pair, or ``{"key": ..., "value": ...}`` with names or all fields of
        a scheme.

    Returns
    -------
    dict

    Raises
    ------
    TypeError
        For what is no scheme, by argument or layer.
    ValueError
        For unknown names, layers and entries.

    Examples
    --------
    >>> chosen = schemes_by_layer([0, 1], "streaming4", policy={"layers": {"0": None}})
    >>> chosen[0], chosen[1].value.bits
    (None, 4)
    >>> schemes_by_layer([0, 1], "streaming4", policy={"layers": {"2": None}})
    Traceback (most recent call last):
      ...
    ValueError: policy: there is no layer 2; the model has layers 0 to 1
    """
    key = as_scheme("key", key)
    usual = KeyValueSchemes(key, key if value is None else as_scheme("value", value))
    chosen: dict[int, KeyValueSchemes | None] = dict.fromkeys(layers, usual)
    if policy is None:
        return chosen
    if not isinstance(policy, Mapping):
        raise TypeError(f"policy must be a mapping with default and layers, got {policy!r:.80}")
    if unknown := sorted(map(str, set(policy) - {"default", "layers"})):
        raise ValueError(f"policy: {unknown[0]!r} is unknown; there are default and layers")
    if "default" in policy:
        chosen = dict.fromkeys(layers, _pair("policy: default", policy["default"]))
    named = policy.get("layers", {})
    if not isinstance(named, Mapping):
        raise TypeError(f"policy: layers must be a mapping from layer to scheme, got {named!r:.80}")
    seen: set[int] = set()
    for text, entry in named.items():
        layer = _layer(text)
        if layer not in chosen:
            extent = f"layers {min(layers)} to {max(layers)}" if layers else "no layers"
            raise ValueError(f"policy: there is no layer {text}; the model has {extent}")
        if layer in seen:
            raise ValueError(f"policy: layer {layer} is named twice; name it once")
        seen.add(layer)
        chosen[layer] = _pair(f"policy: layer {layer}", entry)
    return chosen


def _layer(text: Any) -> int:
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    if isinstance(text, str) and text.isascii() and text.isdecimal():
        return int(text)
    raise ValueError(f"policy: {text!r} is no number of a layer")


def _pair(where: str, entry: Any) -> KeyValueSchemes | None:
    """Read an entry of the policy; errors begin with ``where``."""
    if entry is None or isinstance(entry, KeyValueSchemes):
        return entry
    if isinstance(entry, Scheme):
        return KeyValueSchemes(entry, entry)
    try:
        if isinstance(entry, str):
            named = Scheme.named(entry)
            return KeyValueSchemes(named, named) if isinstance(named, Scheme) else named
        if not isinstance(entry, Mapping):
            raise TypeError(f"must be null, a name, or key and value, got {entry!r:.80}")
        if set(entry) != set(SIDES):
            raise ValueError(
                f"has {', '.join(map(str, entry)) or 'nothing'}; give key and value, or null to "
                "leave both as they are"
            )
        return KeyValueSchemes(*(_scheme(side, entry[side]) for side in SIDES))
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _scheme(side: str, given: Any) -> Scheme:
    if given is None:
        raise ValueError(
            f"{side} is null: keys and values of a layer are quantized together; make it null, or "
            "give both a scheme"
        )
    return Scheme.from_dict(dict(given)) if isinstance(given, Mapping) else as_scheme(side, given)

"""Which layer is stored by what: the one form of a policy, which every verb reads.

A policy is ``{"default": ENTRY, "layers": {"0": ENTRY, "7": ENTRY}}``, both optional. Layers that
are not named have the default; where none is given it is `DEFAULT`, or what a verb's ``--scheme``
says. An entry is

- null: the layer stays as it is;
- a name of `nsq_ref.Scheme.named` or of `nsq_ref.rivals.entry`; ``float32``, which is null, or
  ``float16``, which rounds; two of them as ``KEY/VALUE``. A profile that is made for feedback of
  the keys, such as ``best-3``, is refused for a layer that has none;
- ``{"key": SIDE, "value": SIDE}``, each null, a name, or all fields of a scheme.

Who stores caches refuses what it cannot store; all else is read alike. ``nsq audit`` writes such a
file, ``nsq eval`` and ``nsq onnx rewrite`` read it.

The feedback of keys (F1) is by layer, too: `feedback_of_layers` gives it to the layers of a model.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nsq_ref.feedback import Feedback
from nsq_ref.rivals import Codec, Entry, SchemeCodec, Unquantized, entry_of
from nsq_ref.scheme import KeyValueSchemes, Scheme, as_scheme, scheme_names

__all__ = [
    "DEFAULT", "Policy", "Sides", "changed_fields", "feedback_of_layers", "policy_json",
    "scheme_text", "sides_of",
]  # fmt: skip

DEFAULT = "streaming4"
"""Of layers that nothing is said of."""

UNQUANTIZED = {"float32": Unquantized(), "float16": Unquantized(rounds=True)}
FIELDS, SIDES = ("default", "layers"), ("key", "value")


class Sides(NamedTuple):
    """What keys and values of a layer are stored by.

    Nothing changes one, so that threads may share it.
    """

    key: Codec
    value: Codec

    @property
    def schemes(self) -> KeyValueSchemes | None:
        """The schemes of both sides; None of a layer that stays as it is.

        Raises
        ------
        ValueError
            If a side has none, as other methods' have.

        Examples
        --------
        >>> sides_of(None).schemes is None, sides_of("streaming4/streaming3").schemes.value.bits
        (True, 3)
        """
        if self == sides_of(None):
            return None
        found = []
        for side, codec in zip(SIDES, self, strict=True):
            if codec == UNQUANTIZED["float32"]:
                raise ValueError(
                    f"{side} is null: keys and values of a layer are quantized together; make it "
                    "null, or give both a scheme"
                )
            if not isinstance(codec, SchemeCodec):
                what = "float16" if isinstance(codec, Unquantized) else "a method of others"
                raise ValueError(
                    f"{side} is {what}, which no quantized cache has; give a scheme of NSQ-1"
                )
            found.append(codec.scheme)
        return KeyValueSchemes(*found)


def sides_of(entry: Any) -> Sides:
    """Return what an entry of a policy stands for.

    Parameters
    ----------
    entry : None, str, Scheme, KeyValueSchemes, nsq_ref.rivals.Entry, Sides or mapping
        As this module says.

    Raises
    ------
    TypeError, ValueError
        For what is none.

    Examples
    --------
    >>> sides_of("streaming4/q8_0").value
    GgmlBlocks(kind='q8_0')
    >>> sides_of({"key": "streaming4"})
    Traceback (most recent call last):
    ValueError: has key; give key and value, or null to leave both as they are
    """
    if isinstance(entry, Sides):
        return entry
    if isinstance(entry, str) and entry.count("/") == 1:
        entry = dict(zip(SIDES, entry.split("/"), strict=True))
    if isinstance(entry, Mapping):
        if set(entry) != set(SIDES):
            raise ValueError(
                f"has {', '.join(map(str, entry)) or 'nothing'}; give key and value, or null to "
                "leave both as they are"
            )
        return Sides(_both(entry["key"]).key, _both(entry["value"]).value)
    return _both(entry)


def _both(given: Any) -> Sides:
    """Return what a name, a scheme or its fields mean for both sides."""
    if given is None or (isinstance(given, str) and given in UNQUANTIZED):
        codec = UNQUANTIZED[given or "float32"]
        return Sides(codec, codec)
    if isinstance(given, Mapping):
        given = Scheme.from_dict(dict(given))
    if not isinstance(given, str | Scheme | KeyValueSchemes | Entry):
        raise TypeError(f"must be null, a name, or key and value, got {given!r:.80}")
    found = entry_of(given)
    return Sides(found.key, found.value)


@dataclass(frozen=True)
class Policy:
    """What every layer is stored by.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    default : Sides
        Of layers that are not named.
    layers : mapping of int to Sides

    Examples
    --------
    >>> policy = Policy.of({"default": "naive4", "layers": {"0": None}})
    >>> policy.schemes([0, 1])[1].key.axis
    'token'
    >>> policy.schemes([1])
    Traceback (most recent call last):
    ValueError: policy: there is no layer 0; the model has layers 1 to 1
    """

    default: Sides
    layers: Mapping[int, Sides]

    @classmethod
    def of(cls, policy: Policy | Mapping[str, Any], default: Any = DEFAULT) -> Policy:
        """Return what a mapping means.

        Parameters
        ----------
        policy : Policy or mapping
            As this module says.
        default : optional
            An entry for layers that the policy says nothing of.

        Raises
        ------
        TypeError, ValueError
            For what is none, with the layer.
        """
        if isinstance(policy, Policy):
            return policy
        if not isinstance(policy, Mapping):
            raise TypeError(f"policy must be a mapping with default and layers, got {policy!r:.80}")
        if unknown := sorted({str(one) for one in policy} - set(FIELDS)):
            raise ValueError(f"policy: {unknown[0]!r} is unknown; there are default and layers")
        named = policy.get("layers", {})
        if not isinstance(named, Mapping):
            raise TypeError(
                f"policy: layers must be a mapping from layer to scheme, got {named!r:.80}"
            )
        layers: dict[int, Sides] = {}
        for text, entry in named.items():
            layer = _layer(text, "policy")
            if layer in layers:
                raise ValueError(f"policy: layer {layer} is named twice; name it once")
            with _about(f"policy: layer {layer}"):
                layers[layer] = sides_of(entry)
        with _about("policy: default"):
            return cls(sides_of(policy.get("default", default)), layers)

    @classmethod
    def read(cls, path: str | os.PathLike[str], default: Any = DEFAULT) -> Policy:
        """Return the policy of a JSON file.

        Raises
        ------
        TypeError, ValueError
            As `of`, and for what is no JSON.
        OSError
            If it cannot be read.

        Examples
        --------
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "policy.json")
        >>> _ = path.write_text('{"layers": {"3": "streaming8"}}')
        >>> Policy.read(path).layers[3].schemes.key.bits
        8
        """
        try:
            content = json.loads(Path(path).read_bytes(), object_pairs_hook=_once)
        except RecursionError as error:
            raise ValueError("a policy is no JSON of so many levels") from error
        if not isinstance(content, dict):
            raise ValueError("a policy is an object with default and layers")
        return cls.of(content, default)

    def of_layers(self, numbers: Sequence[int]) -> dict[int, Sides]:
        """Return what each layer of a model has.

        Parameters
        ----------
        numbers : sequence of int
            Of all its layers that have a cache.

        Raises
        ------
        ValueError
            If the policy names one that the model does not have.
        """
        for layer in self.layers:
            _require_layer("policy", layer, numbers)
        return {number: self.layers.get(number, self.default) for number in numbers}

    def schemes(
        self, numbers: Sequence[int], feedback: Collection[int] = ()
    ) -> dict[int, KeyValueSchemes | None]:
        """Return the schemes of each layer of a model; None of one that stays as it is.

        Parameters
        ----------
        numbers : sequence of int
            Of all its layers that have a cache.
        feedback : collection of int
            Those whose keys are coded with feedback (F1).

        Raises
        ------
        ValueError
            As `of_layers`, and, with the layer, for what is no scheme and for a profile that wants
            feedback where there is none.
        """
        found: dict[int, KeyValueSchemes | None] = {}
        for number, sides in self.of_layers(numbers).items():
            with _about(f"policy: layer {number}" if number in self.layers else "policy: default"):
                found[number] = sides.schemes
            if isinstance(sides.key, SchemeCodec) and number not in feedback:
                with _about(f"layer {number}"):
                    sides.key.require_feedback()
        return found


def feedback_of_layers(
    feedback: Mapping[Any, Feedback],
    heads: Mapping[int, tuple[int, int] | None],
    *,
    has_others: bool = False,
    name: str = "feedback",
) -> dict[int, Feedback]:
    """Return the feedback of keys of those layers of a model that have some.

    Parameters
    ----------
    feedback : mapping of str or int to Feedback
        By the number of the layer, as `nsq_ref.files.load_feedback` returns it. Layers that are not
        named have none.
    heads : mapping of int to (int, int) or None
        Key/value heads and channels of each, for every layer of the model; None where nobody knows
        them yet.
    has_others : bool
        The model has other layers, too, of which nothing is known: theirs is passed over.
    name : str
        Of the argument, for errors.

    Raises
    ------
    TypeError, ValueError
        For what is none, a layer that the model does not have, and one of other heads.

    Examples
    --------
    >>> import numpy as np
    >>> feedback = Feedback.from_queries(np.eye(4)[None], kv_heads=1)
    >>> feedback_of_layers({"1": feedback}, {0: (2, 4), 1: (1, 4)})
    {1: Feedback(kv_heads=1, head_dim=4)}
    >>> feedback_of_layers({"0": feedback}, {0: (2, 8)})
    Traceback (most recent call last):
    ValueError: feedback: layer 0 is of 1 key/value heads of 4 channels, and the model's of 2 of 8...
    """  # noqa: E501
    if not isinstance(feedback, Mapping):
        got = type(feedback).__name__
        raise TypeError(f"{name} must be a mapping from layer to Feedback, got {got}")
    if not feedback:
        raise ValueError(f"{name} is empty; give that of at least one layer, or leave it out")
    found: dict[int, Feedback] = {}
    for text, one in feedback.items():
        layer = _layer(text, name)
        if layer in found:
            raise ValueError(f"{name}: layer {layer} is named twice; name it once")
        if not isinstance(one, Feedback):
            got = type(one).__name__
            raise TypeError(f"{name}: layer {layer} must be a Feedback, got {got}")
        if has_others and layer not in heads:
            continue
        _require_layer(name, layer, heads)
        kv_heads, head_dim = heads[layer] or (one.kv_heads, one.head_dim)
        if one.head_dim != head_dim or one.kv_heads not in (1, kv_heads):
            raise ValueError(
                f"{name}: layer {layer} is of {one.kv_heads} key/value heads of {one.head_dim} "
                f"channels, and the model's of {kv_heads} of {head_dim}; calibrate this model"
            )
        found[layer] = one
    return found


def policy_json(
    default: KeyValueSchemes, layers: Mapping[int, KeyValueSchemes | None]
) -> dict[str, Any]:
    """Return a policy of schemes as files have it.

    Examples
    --------
    >>> four, eight = (Scheme.named(f"streaming{bits}") for bits in (4, 8))
    >>> policy_json(KeyValueSchemes(four, four), {0: KeyValueSchemes(eight, four), 2: None})
    {'default': 'streaming4', 'layers': {'0': {'key': 'streaming8', 'value': 'streaming4'}, '2': None}}
    """  # noqa: E501
    named = {str(layer): None if one is None else _pair(one) for layer, one in layers.items()}
    return {"default": _pair(default), "layers": named}


def scheme_text(scheme: Scheme) -> str:
    """Return the nearest name of a scheme, and the fields in which it differs from that.

    Examples
    --------
    >>> from dataclasses import replace
    >>> scheme_text(replace(Scheme.named("streaming4"), sink_tokens=2))
    'streaming4 sink_tokens=2'
    """
    fields = as_scheme("scheme", scheme).to_dict()
    differences = {}
    for name in scheme_names():
        values = Scheme.named(name).to_dict()
        differences[name] = {k: v for k, v in fields.items() if v != values[k]}
    # Of names as near as each other, one of the same width.
    nearest = min(
        differences, key=lambda name: (len(differences[name]), "bits" in differences[name])
    )
    return " ".join([nearest, *(f"{k}={v}" for k, v in differences[nearest].items())])


def changed_fields(changes: Iterable[str]) -> dict[str, Any]:
    """Read ``field=value`` of a scheme; a value is what JSON or Python calls it, else a string.

    Raises
    ------
    ValueError
        For what has no value, a field that schemes do not have, or one that comes twice.

    Examples
    --------
    >>> changed_fields(["bits=3", "block_size=none", "magnitude=gain"])
    {'bits': 3, 'block_size': None, 'magnitude': 'gain'}
    """
    known = list(Scheme().to_dict())
    words = {"none": None, "null": None, "true": True, "false": False}
    fields: dict[str, Any] = {}
    for text in changes:
        field, equals, value = text.partition("=")
        if not equals or field not in known:
            raise ValueError(
                f"--set {text!r} is not FIELD=VALUE with a field of {', '.join(known)}"
            )
        if field in fields:
            raise ValueError(f"--set {field} is given twice; give it once")
        if value.lower() in words:
            fields[field] = words[value.lower()]
        else:
            fields[field] = int(value) if re.fullmatch("-?[0-9]{1,18}", value) else value
    return fields


def _pair(schemes: KeyValueSchemes) -> Any:
    key, value = (_named(scheme) for scheme in schemes)
    return key if key == value and isinstance(key, str) else {"key": key, "value": value}


def _named(scheme: Scheme) -> str | dict[str, Any]:
    name = scheme_text(scheme)
    return scheme.to_dict() if " " in name else name


def _layer(text: Any, where: str) -> int:
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    if isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 10:
        return int(text)
    raise ValueError(f"{where}: {text!r:.80} is no number of a layer")


def _require_layer(where: str, layer: int, numbers: Collection[int]) -> None:
    if layer not in numbers:
        has = f"layers {min(numbers)} to {max(numbers)}" if numbers else "no layers"
        raise ValueError(f"{where}: there is no layer {layer}; the model has {has}")


@contextlib.contextmanager
def _about(where: str) -> Iterator[None]:
    """Say where in the policy an error is."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON whose names are each there once."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"policy: {name!r} is named twice; name it once")
        found[name] = value
    return found

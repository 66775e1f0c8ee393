"""What a cache is replaced by: codecs of keys and values, which may differ from layer to layer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nsq_ref.arrays import as_float_array
from nsq_ref.dtypes import Float32
from nsq_ref.rivals import Codec, Entry, SchemeCodec, Stored, entry_of
from nsq_ref.rivals.codec import Parts, Values
from nsq_ref.rivals.scaled import StaticChannels
from nsq_ref.scheme import KeyValueSchemes, Scheme

__all__ = ["Bound", "Method", "Size", "methods_of"]

KeyValueCache = tuple[NDArray[np.float32], NDArray[np.float32]]
Sides = tuple[Codec, Codec]  # of keys and of values

KEPT_BITS = 16  # of an element that is kept unquantized, whatever the method


@dataclass(frozen=True)
class Unquantized(Codec):
    """Nothing is coded: all elements are as they are, or rounded to float16."""

    rounds: bool = False

    def coded(self, tokens: int) -> tuple[int, int]:
        """Return that no token is."""
        return 0, 0

    def encode(self, x: Float32) -> Parts:
        """Refuse, as nothing is to be coded."""
        raise NotImplementedError(f"no token of {x.shape} is to be coded")

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Refuse, as nothing is coded."""
        raise NotImplementedError(f"no token of {shape} is coded")

    def __call__(self, x: Any) -> Stored:
        """Return all as it is, or rounded."""
        if self.rounds:
            return super().__call__(x)
        given = as_float_array("x", x).astype(np.float32)
        return Stored(given, 0, KEPT_BITS * given.size, 0, given.size)


UNQUANTIZED = {"float32": Unquantized(), "float16": Unquantized(rounds=True)}

Spec: TypeAlias = "str | Scheme | KeyValueSchemes | Entry | Method | Mapping[str, Any] | None"
"""What stands for a method: a name of `nsq_ref.rivals.entry`, ``"float16"`` or ``"float32"``; two
of them as ``"KEY/VALUE"``; what `entry_of` takes; or a policy, as `Method.of` says."""


class Size(NamedTuple):
    """What a cache takes: bits of all that is coded, and how many elements are not.

    Examples
    --------
    >>> Size(sealed_bits=400, sealed_elements=100, kept_elements=100).to_dict()
    {'bits_per_element': 10.0, 'sealed_bits_per_element': 4.0}
    """

    sealed_bits: int
    sealed_elements: int
    kept_elements: int

    def plus(self, other: Size) -> Size:
        """Add up."""
        return Size(*(a + b for a, b in zip(self, other, strict=True)))

    def to_dict(self) -> dict[str, float]:
        """Return bits an element with and without what is kept, which counts as float16."""
        elements = self.sealed_elements + self.kept_elements
        bits = self.sealed_bits + KEPT_BITS * self.kept_elements
        return {
            "bits_per_element": bits / elements if elements else 0.0,
            "sealed_bits_per_element": (
                self.sealed_bits / self.sealed_elements if self.sealed_elements else 0.0
            ),
        }


@dataclass(frozen=True)
class Method:
    """How keys and values of every layer are stored.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    name : str
    default : tuple of Codec
        Of keys and of values, in all layers that are not named.
    layers : mapping of int to tuple of Codec
        Layers that differ.

    Examples
    --------
    >>> method = Method.of({"default": "naive4", "layers": {"0": None}}, "all but the first")
    >>> method.layers[0][0]
    Unquantized(rounds=False)
    >>> Method.of("streaming4/q8_0").default[1]
    GgmlBlocks(kind='q8_0')
    >>> Method.of("streeming4")
    Traceback (most recent call last):
    ValueError: unknown scheme name 'streeming4'; known are the names of Scheme.named, ...
    """

    name: str
    default: Sides
    layers: Mapping[int, Sides]

    @classmethod
    def of(cls, spec: Spec, name: str | None = None) -> Method:
        """Return the method that something stands for.

        Parameters
        ----------
        spec : str, Scheme, KeyValueSchemes, Entry, Method or mapping
            A mapping is a policy: ``{"default": ..., "layers": {"0": ..., "7": ...}}``, both
            optional, without ``"default"`` all other layers are left alone. Each is None, which
            leaves a layer as it is, a name, or ``{"key": ..., "value": ...}`` with names, None, or
            all fields of a scheme.
        name : str, optional
            What it is called.

        Raises
        ------
        TypeError, ValueError
            For what is none, with the layer.
        """
        if isinstance(spec, Method):
            return replace(spec, name=name or spec.name)
        if not isinstance(spec, Mapping) or not set(spec) <= {"default", "layers"}:
            return cls(name or _called(spec), _sides(spec), {})
        named = spec.get("layers") or {}
        if not isinstance(named, Mapping):
            raise TypeError(f"policy: layers must be a mapping from layer to scheme, got {named!r}")
        layers: dict[int, Sides] = {}
        for text, one in named.items():
            if not str(text).isdecimal():
                raise ValueError(f"policy: {text!r} is no number of a layer")
            if int(text) in layers:
                raise ValueError(f"policy: layer {int(text)} is named twice; name it once")
            layers[int(text)] = _sides(one, f"policy: layer {int(text)}: ")
        default = _sides(spec.get("default"), "policy: default: ")
        return cls(name or "policy", default, layers)

    @property
    def needs_calibration(self) -> bool:
        """Whether it has scales that other text must set."""
        every = (self.default, *self.layers.values())
        return any(
            isinstance(codec, StaticChannels) and codec.scale is None
            for sides in every
            for codec in sides
        )

    def bound(self, layers: int, calibration: KeyValueCache | None = None) -> Bound:
        """Return it for a model of so many layers, its static scales set.

        Parameters
        ----------
        layers : int
        calibration : tuple of numpy.ndarray, optional
            Keys and values of other text, ``[layers, ..., tokens, head_dim]``.

        Raises
        ------
        ValueError
            If a layer is named that there is not, or static scales have no text.
        """
        if beyond := [layer for layer in self.layers if layer >= layers]:
            raise ValueError(
                f"{self.name}: there is no layer {beyond[0]}; the model has 0 to {layers - 1}"
            )
        if self.needs_calibration and calibration is None:
            raise ValueError(
                f"{self.name} has static scales; give calibration, tokens of other text"
            )
        runs: list[Run] = []
        for side in (0, 1):
            places: list[tuple[Codec, list[int]]] = []
            for layer in range(layers):
                codec = self.layers.get(layer, self.default)[side]
                same = [where for known, where in places if known is codec or known == codec]
                if same:
                    same[0].append(layer)
                else:
                    places.append((codec, [layer]))
            for codec, where in places:
                if isinstance(codec, StaticChannels) and calibration is not None:
                    codec = codec.calibrated(calibration[side][where])  # noqa: PLW2901
                runs.append(Run(side, codec, where))
        return Bound(self, tuple(runs))

    def to_dict(self) -> dict[str, Any]:
        """Return what it is, without its name, as plain values, ready for JSON.

        Examples
        --------
        >>> Method.of("q4_0").to_dict()["key"]
        {'codec': 'GgmlBlocks', 'kind': 'q4_0'}
        """
        shown: dict[str, Any] = _shown(self.default)
        if self.layers:
            shown["layers"] = {str(n): _shown(self.layers[n]) for n in sorted(self.layers)}
        return shown


class Run(NamedTuple):
    """Layers of a side that a codec takes together."""

    side: int
    codec: Codec
    layers: list[int]


class Bound(NamedTuple):
    """A method for the layers of a model.

    Examples
    --------
    >>> keys = np.random.default_rng(0).standard_normal((3, 1, 2, 40, 8), dtype=np.float32)
    >>> (keys_hat, _), size = Method.of("naive4/float32").bound(3).replaced(keys, keys)
    >>> keys_hat.shape, size.to_dict()["sealed_bits_per_element"]
    ((3, 1, 2, 40, 8), 6.0)
    """

    method: Method
    runs: tuple[Run, ...]

    def replaced(
        self, keys: NDArray[np.float32], values: NDArray[np.float32]
    ) -> tuple[KeyValueCache, Size]:
        """Store a whole cache at once and read it back: ``[layers, ..., tokens, head_dim]``."""
        given, read = (keys, values), (np.empty_like(keys), np.empty_like(values))
        size = Size(0, 0, 0)
        for side, codec, layers in self.runs:
            stored = codec(given[side][layers])
            read[side][layers] = stored.x_hat
            size = size.plus(Size(stored.sealed_bits, stored.sealed_elements, stored.kept_elements))
        return read, size


def methods_of(entries: Mapping[str, Spec] | Iterable[Spec]) -> tuple[Method, ...]:
    """Return methods by the names that a mapping gives them, or by their own.

    Raises
    ------
    TypeError, ValueError
        As `Method.of`; if there is none, or two have one name.

    Examples
    --------
    >>> [one.name for one in methods_of(["naive4", "nsep+pchan4"])]
    ['naive4', 'nsep+pchan4']
    """
    if isinstance(entries, str | Scheme | Entry | Method | KeyValueSchemes):
        entries = [entries]
    if isinstance(entries, Mapping):
        methods = tuple(Method.of(spec, name) for name, spec in entries.items())
    else:
        methods = tuple(Method.of(spec) for spec in entries)
    if not methods:
        raise ValueError("entries must name at least one scheme")
    names = [one.name for one in methods]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is named twice; name it once, or give another name")
    return methods


def _called(spec: Any) -> str:
    if isinstance(spec, str):
        return spec
    if isinstance(spec, Mapping):
        return "/".join(
            one if isinstance(one, str) else "float32" if one is None else "scheme"
            for one in (spec.get("key"), spec.get("value"))
        )
    return "float32" if spec is None else entry_of(spec).name


def _sides(spec: Any, where: str = "") -> Sides:
    """Return the codecs of keys and values; errors begin with ``where``."""
    try:
        if isinstance(spec, str) and spec.count("/") == 1:
            key, value = spec.split("/")
            return _pair(key)[0], _pair(value)[1]
        if isinstance(spec, Mapping):
            if set(spec) != {"key", "value"}:
                raise ValueError(
                    f"has {', '.join(map(str, spec)) or 'nothing'}; give key and value, or null to "
                    "leave both as they are"
                )
            return _pair(spec["key"])[0], _pair(spec["value"])[1]
        return _pair(spec)
    except TypeError as error:
        raise TypeError(f"{where}{error}") from error
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _pair(spec: Any) -> Sides:
    if spec is None:
        spec = "float32"
    if isinstance(spec, str) and spec in UNQUANTIZED:
        return UNQUANTIZED[spec], UNQUANTIZED[spec]
    if isinstance(spec, Mapping):
        spec = Scheme.from_dict(dict(spec))
    entry = entry_of(spec)
    return entry.key, entry.value


def _shown(sides: Sequence[Codec]) -> dict[str, Any]:
    key, value = (
        {"codec": "Scheme", **codec.to_dict()} if isinstance(codec, SchemeCodec) else
        codec.to_dict() | _digests(codec)
        for codec in sides
    )  # fmt: skip
    return {"key": key, "value": value}


def _digests(codec: Codec) -> dict[str, str]:
    """Return checksums of the arrays of a codec, of which `Codec.to_dict` tells the shape."""
    found: dict[str, str] = {}
    for name, value in vars(codec).items():
        if isinstance(value, np.ndarray):
            found[f"{name}_sha256"] = hashlib.sha256(value.tobytes()).hexdigest()
        elif isinstance(value, Codec):
            found |= {f"{name}.{inner}": digest for inner, digest in _digests(value).items()}
    return found

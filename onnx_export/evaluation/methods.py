"""What a cache is replaced by: codecs of keys and values, which may differ from layer to layer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nsq_ref.feedback import Feedback
from nsq_ref.policy import Policy, Sides, sides_of
from nsq_ref.rivals import Codec, Entry, SchemeCodec, entry_of
from nsq_ref.rivals.scaled import StaticChannels
from nsq_ref.scheme import KeyValueSchemes, Scheme

__all__ = ["Bound", "Method", "Size", "methods_of"]

KeyValueCache = tuple[NDArray[np.float32], NDArray[np.float32]]

KEPT_BITS = 16  # of an element that is kept unquantized, whatever the method

Spec: TypeAlias = (
    "str | Scheme | KeyValueSchemes | Entry | Policy | Method | Mapping[str, Any] | None"
)
"""What stands for a method: an entry of a policy, or a policy, as `nsq_ref.policy` has them."""


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
    """How keys and values of every layer are stored, by a name.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    name : str
    policy : Policy

    Examples
    --------
    >>> method = Method.of({"default": "naive4", "layers": {"0": None}}, "all but the first")
    >>> method.policy.layers[0].key
    Unquantized(rounds=False)
    >>> Method.of("streaming4/q8_0").policy.default.value
    GgmlBlocks(kind='q8_0')
    >>> Method.of("streeming4")
    Traceback (most recent call last):
    ValueError: unknown scheme name 'streeming4'; known are the names of Scheme.named, ...
    """

    name: str
    policy: Policy

    @classmethod
    def of(cls, spec: Spec, name: str | None = None) -> Method:
        """Return the method that something stands for.

        Parameters
        ----------
        spec : str, Scheme, KeyValueSchemes, Entry, Policy, Method or mapping
            An entry of a policy, which then is that of all layers, or a policy: a mapping with
            ``"default"`` and ``"layers"``, both optional.
        name : str, optional
            What it is called.

        Raises
        ------
        TypeError, ValueError
            For what is none, with the layer.
        """
        if isinstance(spec, Method):
            return replace(spec, name=name or spec.name)
        if isinstance(spec, Policy) or (
            isinstance(spec, Mapping) and set(spec) <= {"default", "layers"}
        ):
            return cls(name or "policy", Policy.of(spec))
        return cls(name or _called(spec), Policy(sides_of(spec), {}))

    @property
    def needs_calibration(self) -> bool:
        """Whether it has scales that other text must set."""
        every = (self.policy.default, *self.policy.layers.values())
        return any(
            isinstance(codec, StaticChannels) and codec.scale is None
            for sides in every
            for codec in sides
        )

    @property
    def takes_feedback(self) -> bool:
        """Whether keys of a layer are coded by a scheme of NSQ-1."""
        return bool(self._key_codecs())

    @property
    def wants_feedback(self) -> bool:
        """Whether it has a profile that is made for feedback of the keys, and none yet.

        Examples
        --------
        >>> Method.of("best-3").wants_feedback, Method.of("small-3").wants_feedback
        (True, False)
        """
        own = self._key_codecs()
        return not any(one.feedback for one in own) and any(one.wants_feedback for one in own)

    def require_feedback(self) -> None:
        """Refuse to go on if it `wants_feedback`.

        Raises
        ------
        ValueError
            With what to do.
        """
        if self.wants_feedback:
            for one in self._key_codecs():
                one.require_feedback()

    def _key_codecs(self) -> list[SchemeCodec]:
        """Return what codes keys by a scheme of NSQ-1."""
        every = (self.policy.default, *self.policy.layers.values())
        return [sides.key for sides in every if isinstance(sides.key, SchemeCodec)]

    def with_feedback(self, feedback: Mapping[str, Feedback]) -> Method:
        """Return it with feedback of the keys (F1), where a scheme of NSQ-1 codes them.

        What `wants_feedback` keeps its name, as nothing else has it.

        Parameters
        ----------
        feedback : mapping of str to Feedback
            By the number of the layer, of every layer of the model, as
            `onnx_export.evaluation.moments` makes it.

        Raises
        ------
        ValueError
            If there is no such scheme, or a name is no number.

        Examples
        --------
        >>> feedback = Feedback.from_queries(np.eye(4)[None], kv_heads=1)
        >>> method = Method.of("streaming2/q4_0").with_feedback({"0": feedback})
        >>> method.name, method.policy.layers[0].key.feedback
        ('streaming2/q4_0+feedback', Feedback(kv_heads=1, head_dim=4))
        >>> Method.of("best-3").with_feedback({"0": feedback}).name
        'best-3'
        """
        if not self.takes_feedback:
            raise ValueError(f"{self.name} codes keys by no scheme of NSQ-1, which feedback is for")
        layers = dict(self.policy.layers)
        for text, one in feedback.items():
            if not text.isdecimal():
                raise ValueError(f"feedback: {text!r} is no number of a layer")
            sides = layers.get(int(text), self.policy.default)
            if isinstance(sides.key, SchemeCodec):
                layers[int(text)] = sides._replace(key=replace(sides.key, feedback=one))
        name = self.name if self.wants_feedback else f"{self.name}+feedback"
        return Method(name, Policy(self.policy.default, layers))

    def bound(self, layers: int | Sequence[int], calibration: KeyValueCache | None = None) -> Bound:
        """Return it for the layers of a model, its static scales set.

        Parameters
        ----------
        layers : int or sequence of int
            How many there are, or their numbers where some have no cache.
        calibration : tuple of numpy.ndarray, optional
            Keys and values of other text, ``[layers, ..., tokens, head_dim]``.

        Raises
        ------
        ValueError
            If a layer is named that there is not, static scales have no text, or a layer has no
            feedback that its profile is made for.
        """
        numbers = range(layers) if isinstance(layers, int) else layers
        every = self.policy.of_layers(numbers)
        for number, sides in every.items():
            if isinstance(sides.key, SchemeCodec) and sides.key.wants_feedback:
                try:
                    sides.key.require_feedback()
                except ValueError as error:
                    raise ValueError(f"layer {number}: {error}") from None
        if self.needs_calibration and calibration is None:
            raise ValueError(
                f"{self.name} has static scales; give calibration, tokens of other text"
            )
        runs: list[Run] = []
        for side in (0, 1):
            places: list[tuple[Codec, list[int]]] = []
            for layer, number in enumerate(numbers):
                codec = every[number][side]
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
        shown: dict[str, Any] = _shown(self.policy.default)
        if layers := self.policy.layers:
            shown["layers"] = {str(number): _shown(layers[number]) for number in sorted(layers)}
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
    if isinstance(entries, str | Scheme | Entry | Policy | Method | KeyValueSchemes):
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


def _shown(sides: Sides) -> dict[str, Any]:
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

"""What a decode loop must know of a model with a cache, as the model itself states it.

The metadata `KEY` of a model holds JSON, so that a loop in any language can read it: which inputs
and outputs have which role, and of every tensor of the cache its names, dtype and shape. All
tensors begin as zeros. An axis of a shape is a number, or

``"batch"``
    the rows of the batch,
``"capacity"``, ``"capacity/32"``
    the tokens that there is room for, rounded up to a multiple of ``capacity_multiple``, and a
    32nd of it,
``"past"``
    the tokens so far: 0 at first, and the present tensor is longer than the past by the new ones.

Past and present of a tensor without ``"past"`` have one shape: bind them to the same memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nsq_ref.arrays import as_integer
from nsq_ref.dtypes import DTYPES, FloatName
from nsq_ref.scheme import KeyValueSchemes, Scheme, as_scheme
from onnx_export.operators.attention_models import cache_fields
from onnx_export.operators.schema import CACHE_PARTS

__all__ = [
    "KEY", "NAMED_RANKS", "ROLES", "CacheLayout", "CacheTensor", "layer_in_name",
    "quantized_tensors",
]  # fmt: skip

KEY = "nsq.cache"
VERSION = 1

BUFFERS = ("key", "value")
PARTS = (*(f"{side}_{part}" for side in ("key", "value") for part in CACHE_PARTS), *BUFFERS)

ROLES = (
    "input_ids", "attention_mask", "position_ids", "past_lengths", "new_lengths", "total_lengths",
    "num_logits", "logits", "present_lengths",
)  # fmt: skip
"""What inputs and outputs are for: int64 ``[batch, sequence]``, ``[batch, past + sequence]``,
``[batch, sequence]``, three times ``[batch]``, a scalar; float ``[batch, scored, vocab_size]``,
int64 ``[batch]``. A model need not have all.

``new_lengths`` says how many of the sequence each row has, from 0 on, and ``total_lengths`` how
many there are with those of ``past_lengths``; the rest is padding on the right, of which the cache
keeps nothing. Without one of the two, and without ``past_lengths``, a row is padded on the left,
where ``attention_mask`` is 0, or on the right if the layout says so."""


NAMED_RANKS = {"input_ids": 2, "attention_mask": 2, "position_ids": 2, "past_lengths": 1}
"""Inputs that all who write models call by their roles, and how many axes they then have."""


def layer_in_name(name: str) -> int | None:
    """Return the last number in the name of a cache, if it can be one of a layer.

    Examples
    --------
    >>> layer_in_name("past_key_values.11.key"), layer_in_name("past"), layer_in_name("x123456")
    (11, None, None)
    """
    numbers = re.findall("[0-9]+", name)
    return int(numbers[-1]) if numbers and len(numbers[-1]) < 5 else None


class CacheTensor(NamedTuple):
    """A tensor of a cache: an input, an output, and what both are.

    Nothing changes one, so that threads may share it.

    Attributes
    ----------
    past, present : str
        Names of the input and of the output.
    dtype : str
    shape : tuple of int or str
        As the module says.
    layer : int, optional
        Whose cache it is of, counted as `CacheLayout.schemes` are; only of a quantized one.
    part : str, optional
        What of it, as nsq.Attention calls it: ``key_packed`` and so on; ``key`` or ``value`` of a
        cache of one tensor a side, which only the native library runs.

    Examples
    --------
    >>> shape = ("batch", 8, "capacity/128", 64)
    >>> tensor = CacheTensor("past_scale", "present_scale", "float16", shape)
    >>> tensor.sizes(batch=2, capacity=1024)
    (2, 8, 8, 64)
    """

    past: str
    present: str
    dtype: str
    shape: tuple[int | str, ...]
    layer: int | None = None
    part: str | None = None

    @property
    def is_buffer(self) -> bool:
        """Whether it is all that is stored of keys, or of values."""
        return self.part in BUFFERS

    @property
    def grows(self) -> bool:
        """Whether the present tensor is longer than the past."""
        return "past" in self.shape

    def sizes(self, batch: int, capacity: int) -> tuple[int, ...]:
        """Return the shape at the start, for a capacity that has been rounded up."""
        known = {"batch": batch, "past": 0, "capacity": capacity}
        return tuple(
            size
            if isinstance(size, int)
            else known[size]
            if size in known
            else capacity // int(size.removeprefix("capacity/"))
            for size in self.shape
        )


@dataclass(frozen=True)
class CacheLayout:
    """The inputs, outputs and cache of a decoder.

    Nothing changes one, so that threads may share it.

    Attributes
    ----------
    roles : mapping of str to str
        From roles of `ROLES` to names of the model's inputs and outputs.
    tensors : tuple of CacheTensor
    schemes : tuple of KeyValueSchemes or None
        Of every layer; None where its cache is not quantized.
    capacity_multiple : int
        What a capacity is rounded up to.
    context_length : int, optional
        Tokens that the model was made for, where it says so.
    right_padding : bool
        The model counts the ones of ``attention_mask``: a row has as many tokens with the new ones,
        of which the first ``min(sequence, ones)`` are new, the rest being padding.
    key_feedback : tuple of str or None
        Of every layer the digest of the feedback with which its keys are coded
        (`nsq_ref.Feedback.digest`), None of one without; empty where no layer has any.

    Raises
    ------
    ValueError
        For an unknown role, a name that is used twice, shapes and dtypes that the module does not
        name, parts of a cache that is not quantized, and feedback of one.

    Examples
    --------
    >>> scheme = Scheme.named("streaming4")
    >>> tensors = quantized_tensors(0, scheme, scheme, kv_heads=2, head_dim=16)
    >>> roles = {"input_ids": "input_ids", "logits": "logits"}
    >>> layout = CacheLayout(roles, tensors, (KeyValueSchemes(scheme, scheme),), 128)
    >>> CacheLayout.from_metadata(layout.to_metadata()) == layout
    True
    >>> layout.rounded(1000), tensors[0].past, tensors[0].shape
    (1024, 'past_key_values.0.key.packed', ('batch', 2, 'capacity', 8))
    """

    roles: Mapping[str, str]
    tensors: tuple[CacheTensor, ...]
    schemes: tuple[KeyValueSchemes | None, ...]
    capacity_multiple: int = 1
    context_length: int | None = None
    right_padding: bool = False
    key_feedback: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        if unknown := set(self.roles) - set(ROLES):
            raise ValueError(f"roles has {sorted(unknown)}; there are {', '.join(ROLES)}")
        names = [*self.roles.values(), *(name for tensor in self.tensors for name in tensor[:2])]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]!r} is named twice; each input and output has one role")
        for tensor in self.tensors:
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{tensor.past}: dtype {tensor.dtype!r} is not one of a cache")
            for size in tensor.shape:
                _require_size(tensor.past, size, self.capacity_multiple)
            _require_part(tensor, self.schemes)
        for layer, digest in enumerate(self.key_feedback):
            if digest is not None and self.schemes[layer : layer + 1] in ((), (None,)):
                raise ValueError(f"key_feedback: layer {layer} has no schemes, and no feedback")

    def rounded(self, capacity: int) -> int:
        """Return the least capacity of whole blocks that has room for so many tokens."""
        return -(-capacity // self.capacity_multiple) * self.capacity_multiple

    def nbytes(self, batch: int, capacity: int) -> int:
        """Return the bytes of all tensors of fixed size."""
        capacity = self.rounded(capacity)
        return sum(
            math.prod(tensor.sizes(batch, capacity)) * DTYPES[tensor.dtype].itemsize
            for tensor in self.tensors
        )

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata of a model that says all this."""
        value: dict[str, Any] = {
            "version": VERSION,
            "roles": dict(self.roles),
            "capacity_multiple": self.capacity_multiple,
            "context_length": self.context_length,
            "right_padding": self.right_padding,
            "tensors": [tensor._asdict() for tensor in self.tensors],
            "schemes": [
                pair and {side: scheme.to_dict() for side, scheme in pair._asdict().items()}
                for pair in self.schemes
            ],
        }
        if self.key_feedback:
            value["key_feedback"] = list(self.key_feedback)
        return {KEY: json.dumps(value)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> CacheLayout:
        """Read the metadata of a model.

        Parameters
        ----------
        metadata : mapping of str to str
            As `onnxruntime.InferenceSession.get_modelmeta` has it in ``custom_metadata_map``.

        Returns
        -------
        CacheLayout

        Raises
        ------
        ValueError
            If there is none, it is of a later version, or it is malformed.

        Examples
        --------
        >>> CacheLayout.from_metadata({})
        Traceback (most recent call last):
        ValueError: the model has no metadata 'nsq.cache'; rewrite it with `nsq onnx rewrite`...
        """
        if KEY not in metadata:
            raise ValueError(
                f"the model has no metadata {KEY!r}; rewrite it with `nsq onnx rewrite`, or build "
                "it anew"
            )
        try:
            value = json.loads(metadata[KEY])
            if (version := value["version"]) != VERSION:
                raise ValueError(f"version {version} is not {VERSION}; update nsq")
            return cls(
                roles={str(role): str(name) for role, name in value["roles"].items()},
                tensors=tuple(_tensor(**tensor) for tensor in value["tensors"]),
                schemes=tuple(_pair(pair) for pair in value["schemes"]),
                capacity_multiple=as_integer(
                    "capacity_multiple", value["capacity_multiple"], least=1
                ),
                context_length=value["context_length"]
                and as_integer("context_length", value["context_length"], least=1),
                right_padding=value.get("right_padding", False) is True,
                key_feedback=tuple(_digest(one) for one in value.get("key_feedback", ())),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            fault = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"the model's metadata {KEY!r}: {fault}") from error


def quantized_tensors(
    layer: int,
    key: Scheme | str,
    value: Scheme | str,
    *,
    kv_heads: int,
    head_dim: int,
    value_head_dim: int | None = None,
    dtype: FloatName = "float32",
) -> tuple[CacheTensor, ...]:
    """Return the tensors of one layer's quantized cache, in the order of nsq.Attention's inputs.

    Parameters
    ----------
    layer : int
        In the names, ``past_key_values.{layer}.key.packed`` and ``present.{layer}.key.packed``.
    key, value, kv_heads, head_dim, value_head_dim, dtype
        As `cache_fields` takes them.

    Returns
    -------
    tuple of CacheTensor

    Raises
    ------
    TypeError, ValueError
        As `cache_fields`.

    Examples
    --------
    >>> scheme = Scheme.named("streaming4")
    >>> for tensor in quantized_tensors(0, scheme, scheme, kv_heads=2, head_dim=16)[:3]:
    ...     print(tensor.present, *tensor.shape)
    present.0.key.packed batch 2 capacity 8
    present.0.key.scale batch 2 capacity/128 16
    present.0.key.norm batch 2 capacity
    """
    schemes = as_scheme("key", key), as_scheme("value", value)
    block = math.lcm(*(scheme.block_size or 0 for scheme in schemes))
    empty, full = (
        cache_fields(
            key, value, kv_heads=kv_heads, head_dim=head_dim, value_head_dim=value_head_dim,
            capacity=capacity, dtype=dtype,
        )
        for capacity in (0, block)
    )  # fmt: skip
    tensors = []
    for name, field in full.items():
        shape: list[int | str] = ["batch"]
        for size, least in zip(field.shape, empty[name].shape, strict=True):
            rows = block // size if size != least else 0
            shape.append(size if not rows else "capacity" if rows == 1 else f"capacity/{rows}")
        part = ".".join(name.split("_", 1))
        tensors.append(
            CacheTensor(
                f"past_key_values.{layer}.{part}", f"present.{layer}.{part}",
                field.dtype.name, tuple(shape), layer, name,
            )
        )  # fmt: skip
    return tuple(tensors)


def _require_size(name: str, size: Any, multiple: int) -> None:
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return
    if isinstance(size, str):
        divisor = size.removeprefix("capacity/")
        if size in ("batch", "past", "capacity"):
            return
        if divisor != size and divisor.isdecimal() and int(divisor) and not multiple % int(divisor):
            return
    raise ValueError(
        f"{name}: {size!r} is no axis; there are numbers, 'batch', 'past', 'capacity' and "
        f"'capacity/n' with n a divisor of {multiple}"
    )


def _require_part(tensor: CacheTensor, schemes: Sequence[KeyValueSchemes | None]) -> None:
    """Refuse a part of a quantized cache that is none, or whose layer has no schemes."""
    layer, part = tensor.layer, tensor.part
    if layer is None and part is None:
        return
    if part not in PARTS:
        raise ValueError(f"{tensor.past}: part {part!r} is not one of a cache: {', '.join(PARTS)}")
    layer = as_integer(f"{tensor.past}: layer", layer, least=0, most=len(schemes) - 1)
    if schemes[layer] is None:
        raise ValueError(f"{tensor.past}: layer {layer} has no schemes, so that it has no parts")


def _tensor(
    past: str,
    present: str,
    dtype: str,
    shape: Iterable[int | str],
    layer: int | None = None,
    part: str | None = None,
) -> CacheTensor:
    return CacheTensor(str(past), str(present), str(dtype), tuple(shape), layer, part)


def _digest(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"key_feedback has {value!r:.80}; there are digests, and null")
    return value


def _pair(value: Mapping[str, dict[str, Any]] | None) -> KeyValueSchemes | None:
    if value is None:
        return None
    return KeyValueSchemes(**{side: Scheme.from_dict(one) for side, one in value.items()})

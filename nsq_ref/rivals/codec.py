"""What every entry of the registry is made of: a codec for a side, whose count cannot lie.

A codec turns keys or values into named parts and reads them back from those parts alone. What is
counted are the parts themselves, so that nothing which reading needs is left out of the count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from nsq_ref.arrays import RangeError, as_float_array, not_finite
from nsq_ref.codec import dequantize, quantize
from nsq_ref.dtypes import Array, Float32
from nsq_ref.environment import in_default_environment
from nsq_ref.feedback import Feedback
from nsq_ref.profiles import feedback_is_missing
from nsq_ref.quantized import Quantized, require_shape
from nsq_ref.scheme import Scheme

__all__ = ["Codec", "NormFirst", "Part", "SchemeCodec", "Stored", "Unquantized"]


class Part(NamedTuple):
    """An array that is stored, and the bits that each of its values takes.

    Nothing changes one, so that threads may share it.

    Examples
    --------
    >>> Part(np.zeros((4, 64), np.uint8), bits=4).size_in_bits
    1024
    """

    values: Array
    bits: int

    @property
    def size_in_bits(self) -> int:
        """Bits of all values."""
        return self.values.size * self.bits


Parts = dict[str, Part]
Values = Mapping[str, Array]


class Stored(NamedTuple):
    """One side as it would be read back, and what was stored for it.

    Nothing changes one, so that threads may share it.

    What is ``kept`` are the tokens that a codec leaves unquantized: the first ones (sinks) and the
    last ones (tail, residual window). All the rest is ``sealed``.

    Examples
    --------
    >>> Stored(np.zeros(40, np.float32), 96, 128, 32, 8).bits_per_element
    5.6
    """

    x_hat: Float32
    sealed_bits: int
    kept_bits: int
    sealed_elements: int
    kept_elements: int
    collapsed_tokens: int = 0

    @property
    def bits_per_element(self) -> float:
        """Stored bits over elements, those of sinks and tail counted."""
        return (self.sealed_bits + self.kept_bits) / (self.sealed_elements + self.kept_elements)


class Codec(ABC):
    """How one side is stored: `encode`, `decode`, and which tokens are `coded` at all.

    Codecs are frozen dataclasses, so that threads may share them. Axes before tokens and channels
    are independent, but that some share numbers between the heads of axis -3.
    """

    @abstractmethod
    def encode(self, x: Float32) -> Parts:
        """Return what is stored of the coded tokens ``x[..., T, D]``."""

    @abstractmethod
    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Read the coded tokens back, of the shape given, from the values of the parts."""

    def coded(self, tokens: int) -> tuple[int, int]:
        """Return the first coded token and the one behind the last; all are, by default."""
        return 0, tokens

    @in_default_environment
    def __call__(self, x: Any) -> Stored:
        """Store ``x[..., T, D]`` and read it back.

        Parameters
        ----------
        x : float array, shape [..., T, D]

        Returns
        -------
        Stored

        Raises
        ------
        TypeError, ValueError
            For what `nsq_ref.quantize` refuses, and for shapes that the codec cannot take.
        RangeError
            Where a part, or a token that is kept, is beyond float16, or the result beyond float32.
        """
        given = as_float_array("x", x)
        require_shape("x", given.shape)
        with np.errstate(all="ignore"):  # what overflows is refused by name
            x32 = given.astype(np.float32)
            if not np.isfinite(x32).all():
                raise not_finite("x", given)
            first, last = self.coded(given.shape[-2])
            return self._stored(x32, first, last)

    def _stored(self, x: Float32, first: int, last: int) -> Stored:
        x_hat = np.empty_like(x)
        for kept in (np.s_[..., :first, :], np.s_[..., last:, :]):
            x_hat[kept] = half("a token kept unquantized", x[kept])
        middle = x[..., first:last, :]
        bits = 0
        if middle.size:
            parts = self.encode(middle)
            bits = sum(part.size_in_bits for part in parts.values())
            values = {name: part.values for name, part in parts.items()}
            x_hat[..., first:last, :] = self.decode(values, middle.shape)
            if not np.isfinite(x_hat).all():
                raise RangeError("x would decode to a value beyond float32; scale x down", "x")
        kept_elements = x.size - middle.size
        collapsed = ~x_hat.any(axis=-1) & x.any(axis=-1)
        return Stored(
            x_hat, bits, 16 * kept_elements, middle.size, kept_elements, int(collapsed.sum())
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the kind of codec and its parameters as plain values, ready for JSON.

        Examples
        --------
        >>> SchemeCodec(Scheme(bits=3)).to_dict()["bits"]
        3
        """
        shown: dict[str, Any] = {"codec": type(self).__name__}
        for name in vars(self):
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                value = list(value.shape)
            shown[name] = value.to_dict() if isinstance(value, Codec) else value
        return shown


@dataclass(frozen=True)
class SchemeCodec(Codec):
    """A `Scheme` of NSQ-1, its bytes and its result exactly those of `nsq_ref.quantize`.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    scheme : Scheme
    feedback : Feedback, optional
        With which it codes (F1); the heads are axis -3.
    made_for_feedback : str, optional
        The name of a profile that wants it: nothing is stored without.

    Examples
    --------
    >>> stored = SchemeCodec(Scheme.named("streaming4"))(np.ones((200, 64), np.float32))
    >>> stored.kept_bits, stored.kept_elements  # the sink, in the dtype of x
    (2048, 64)
    """

    scheme: Scheme
    feedback: Feedback | None = None
    made_for_feedback: str | None = None

    @property
    def wants_feedback(self) -> bool:
        """Whether it must have feedback before anything is stored, and has none.

        Examples
        --------
        >>> SchemeCodec(Scheme(), made_for_feedback="best-3").wants_feedback
        True
        """
        return self.made_for_feedback is not None and self.feedback is None

    def require_feedback(self) -> None:
        """Refuse to go on if it `wants_feedback`.

        Raises
        ------
        ValueError
            With what to do.
        """
        if self.made_for_feedback is not None and self.feedback is None:
            raise feedback_is_missing(self.made_for_feedback)

    def coded(self, tokens: int) -> tuple[int, int]:
        """Return all tokens but the sinks."""
        return min(self.scheme.sink_tokens, tokens), tokens

    def encode(self, x: Float32) -> Parts:
        """Return the parts of `Quantized`."""
        self.require_feedback()
        scheme = replace(self.scheme, sink_tokens=0)
        parts = quantize(x, scheme, feedback=self.feedback).parts
        return {name: Part(part, 8 * part.itemsize) for name, part in parts.items()}

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Dequantize."""
        scheme = replace(self.scheme, sink_tokens=0)
        stored: dict[str, Any] = dict(parts)
        return dequantize(Quantized(scheme, shape, np.dtype(np.float32), **stored))

    def __call__(self, x: Any) -> Stored:
        """Quantize and dequantize; sinks are kept in the dtype of ``x``."""
        self.require_feedback()
        quantized = quantize(x, self.scheme, feedback=self.feedback)
        kept = 0 if quantized.sinks is None else quantized.sinks.size
        kept_bits = 0 if quantized.sinks is None else 8 * quantized.sinks.nbytes
        size = int(np.prod(quantized.shape))
        return Stored(
            dequantize(quantized), 8 * quantized.nbytes - kept_bits, kept_bits, size - kept, kept,
            quantized.collapsed_tokens,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the scheme, and the digest of the feedback if there is one."""
        fields = self.scheme.to_dict()
        return fields if self.feedback is None else {**fields, "feedback": self.feedback.digest}


@dataclass(frozen=True)
class Unquantized(Codec):
    """Nothing is coded: all elements are as they are, or rounded to float16.

    Nothing changes one, so that threads may share it.

    Examples
    --------
    >>> stored = Unquantized(rounds=True)(np.float32([[0.1]]))
    >>> float(stored.x_hat[0, 0]), stored.bits_per_element
    (0.0999755859375, 16.0)
    """

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
        return Stored(given, 0, 16 * given.size, 0, given.size)


@dataclass(frozen=True)
class NormFirst(Codec):
    """Norm separation as preprocessing: a norm in float16 a token, the direction by another codec.

    Nothing changes one, so that threads may share it.

    As the paper does it, the direction that is read back is given length 1 again.

    Examples
    --------
    >>> x = np.float32([[3, 4], [30, 40]])
    >>> NormFirst(SchemeCodec(Scheme.named("naive4")))(x).x_hat.round(1)
    array([[ 2.9,  4.1],
           [29.1, 40.7]], dtype=float32)
    """

    inner: Codec

    def coded(self, tokens: int) -> tuple[int, int]:
        """Return what the other codec codes."""
        return self.inner.coded(tokens)

    def encode(self, x: Float32) -> Parts:
        """Return the parts of the directions, and the norms."""
        norm = length(x)
        direction = divided(x, norm)
        return self.inner.encode(direction) | {"token_norm": Part(half("a norm", norm), 16)}

    def decode(self, parts: Values, shape: tuple[int, ...]) -> Float32:
        """Read directions back, and give them their length."""
        inner = {name: part for name, part in parts.items() if name != "token_norm"}
        direction = self.inner.decode(inner, shape)
        return divided(direction, length(direction)) * parts["token_norm"].astype(np.float32)


def half(what: str, values: Array) -> Array:
    """Round to float16, refusing what is beyond it.

    Examples
    --------
    >>> half("a scale", np.float32([0.1]))
    array([0.1], dtype=float16)
    """
    rounded = values.astype(np.float16)
    if not np.isfinite(rounded).all():
        beyond = float(values[~np.isfinite(rounded)][0])
        raise RangeError(f"{what} is {beyond:g}, beyond float16; scale x down", what)
    return rounded


def length(x: Float32, axis: int | tuple[int, ...] = -1) -> Float32:
    """Return Euclidean norms, the axes kept; summed in float64, so that no square overflows.

    Examples
    --------
    >>> length(np.float32([[3, 4]]))
    array([[5.]], dtype=float32)
    """
    squares = np.square(x.astype(np.float64))
    norm: Float32 = np.sqrt(squares.sum(axis=axis, keepdims=True)).astype(np.float32)
    return norm


def divided(x: Array, by: Array) -> Float32:
    """Divide in float32; 0 where the divisor is 0.

    Examples
    --------
    >>> divided(np.float32([1, 2]), np.float32([2, 0]))
    array([0.5, 0. ], dtype=float32)
    """
    safe = np.where(by == 0, 1, by).astype(np.float32)
    quotient: Float32 = np.where(by == 0, np.float32(0), x.astype(np.float32) / safe)
    return quotient


def whole(shape: tuple[int, ...], axis: int, size: int, method: str) -> None:
    """Refuse an axis (-1 channels, -2 tokens) that is no multiple of a group's size.

    Examples
    --------
    >>> whole((10, 64), -1, 32, "q4_0")
    """
    if shape[axis] % size:
        name = "head_dim" if axis == -1 else "tokens"
        raise ValueError(
            f"x has {name} {shape[axis]}; {method} needs a multiple of {size}, as published"
        )

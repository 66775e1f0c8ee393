"""What a scheme saves and what it costs, on the keys and values of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nsq_ref.arrays import as_float_array
from nsq_ref.dtypes import Array, Float32, Float64
from nsq_ref.environment import in_default_environment
from nsq_ref.rivals import Codec, Entry, SchemeCodec, entry_of
from nsq_ref.scheme import KeyValueSchemes, Scheme

__all__ = ["DEMO_SCHEMES", "CacheRoundTrip", "layered", "round_trips"]


DEMO_SCHEMES = (
    "naive4", "nsep4", "pchan4", "nsep+pchan4", "streaming4", "streaming3", "streaming2",
)  # fmt: skip


class CacheRoundTrip:
    """Quantize and dequantize caches, keeping count of bytes and errors.

    One object is for one thread: it counts without a lock.

    Calling it returns what a decoder would read from the quantized cache. Counts add up over calls,
    so that one object follows a scheme through several passages.

    Parameters
    ----------
    schemes : Scheme, KeyValueSchemes, Entry or str
        One scheme for both sides, or one each; an entry of `nsq_ref.rivals`; or the name of any.

    Examples
    --------
    >>> import numpy as np
    >>> keys = np.random.default_rng(0).standard_normal((2, 4, 256, 64), dtype=np.float32)
    >>> trip = CacheRoundTrip(Scheme.named("nsep+pchan4"))
    >>> keys_hat, values_hat = trip(keys, keys)
    >>> trip.bits_per_element
    4.3125
    >>> trip.key_error.shape
    (2,)

    Of what keeps its last tokens unquantized, the bits are told with and without them:

    >>> trip = CacheRoundTrip("kivi2")
    >>> _ = trip(keys, keys)
    >>> trip.bits_per_element, trip.sealed_bits_per_element
    (6.25, 3.0)
    """

    def __init__(self, schemes: Scheme | KeyValueSchemes | Entry | str) -> None:
        self.entry = entry_of(schemes)
        self.sealed_bits = 0
        self.kept_bits = 0
        self.elements = 0
        self.kept_elements = 0
        self.collapsed_tokens = 0
        self._squares: dict[str, Float64] = {}

    @in_default_environment
    def __call__(self, keys: Any, values: Any = None) -> tuple[Float32, Float32]:
        """Round-trip keys and values.

        Parameters
        ----------
        keys, values : float arrays, shape [layers, ..., tokens, head_dim]
            As `quantize` takes them. Without values, only keys are counted, and returned twice.

        Returns
        -------
        keys_hat, values_hat : float32 arrays of the same shapes
        """
        given = as_float_array("keys", keys)
        beside = None if values is None else as_float_array("values", values)
        keys_hat = self._one_side("key", given, self.entry.key)
        if beside is None:
            return keys_hat, keys_hat
        return keys_hat, self._one_side("value", beside, self.entry.value)

    def _one_side(self, side: str, x: Array, codec: Codec) -> Float32:
        stored = codec(x)
        self.sealed_bits += stored.sealed_bits
        self.kept_bits += stored.kept_bits
        self.elements += x.size
        self.kept_elements += stored.kept_elements
        self.collapsed_tokens += stored.collapsed_tokens
        wide = x.astype(np.float32)
        squares = np.array([_squares(wide - stored.x_hat), _squares(wide)])
        self._squares[side] = squares + self._squares.get(side, 0.0)
        return stored.x_hat

    @property
    def schemes(self) -> KeyValueSchemes:
        """The schemes of both sides, where they are ours.

        Raises
        ------
        AttributeError
            For a method of others, which has none; `entry` says all of it.
        """
        key, value = self.entry.key, self.entry.value
        if not (isinstance(key, SchemeCodec) and isinstance(value, SchemeCodec)):
            raise AttributeError(f"{self.entry.name} is no scheme of NSQ-1; see .entry")
        return KeyValueSchemes(key.scheme, value.scheme)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return -(-(self.sealed_bits + self.kept_bits) // 8)

    @property
    def bits_per_element(self) -> float:
        """Stored bits over elements, keys and values together, all side information counted."""
        return (self.sealed_bits + self.kept_bits) / self.elements

    @property
    def sealed_bits_per_element(self) -> float:
        """The same without the sinks and the tail that are kept unquantized; 0 if that is all."""
        sealed = self.elements - self.kept_elements
        return self.sealed_bits / sealed if sealed else 0.0

    @property
    def float16_nbytes(self) -> int:
        """Bytes of the same elements in float16."""
        return 2 * self.elements

    @property
    def key_error(self) -> Float64:
        """Relative error of the keys of each layer: norm of the error over norm of the keys."""
        return self._error("key")

    @property
    def value_error(self) -> Float64:
        """Relative error of the values of each layer; empty if no values were given."""
        return self._error("value")

    @in_default_environment
    def _error(self, side: str) -> Float64:
        error, size = self._squares.get(side, np.zeros((2, 0)))
        ratio: Float64 = np.sqrt(error / np.where(size == 0, 1, size))
        return ratio

    def total_error(self, side: str) -> float | None:
        """Return the relative error over all layers, of ``"key"`` or ``"value"``, if there are any.

        Examples
        --------
        >>> import numpy as np
        >>> trip = CacheRoundTrip(Scheme(bits=8))
        >>> _ = trip(np.eye(4, dtype=np.float32)[None])
        >>> trip.total_error("key") < 0.01, trip.total_error("value")
        (True, None)
        """
        if side not in self._squares:
            return None
        error, size = self._squares[side].sum(axis=1)
        return float(np.sqrt(error / size)) if size else 0.0

    def worst_layer(self) -> tuple[str, int, float]:
        """Return side, layer and relative error where that error is largest.

        Examples
        --------
        >>> import numpy as np
        >>> trip = CacheRoundTrip(Scheme.named("naive4"))
        >>> values = np.random.default_rng(0).standard_normal((3, 64, 8)).astype(np.float32)
        >>> keys = values.copy()
        >>> keys[1, :, 0] += 5
        >>> _ = trip(keys, values)
        >>> trip.worst_layer()[:2]
        ('key', 1)
        """
        sides = {side: self._error(side) for side in self._squares}
        side = max(sides, key=lambda name: float(sides[name].max()))
        layer = int(sides[side].argmax())
        return side, layer, float(sides[side][layer])

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain Python values, ready for JSON.

        Examples
        --------
        >>> import numpy as np
        >>> trip = CacheRoundTrip(Scheme())
        >>> _ = trip(np.ones((1, 2, 4), np.float32))
        >>> sorted(trip.to_dict())[:3]
        ['bits_per_element', 'bytes', 'collapsed_tokens']
        """
        side, layer, error = self.worst_layer()
        return {
            "key_scheme": self.entry.key.to_dict(),
            "value_scheme": self.entry.value.to_dict(),
            "bits_per_element": self.bits_per_element,
            "sealed_bits_per_element": self.sealed_bits_per_element,
            "bytes": self.nbytes,
            "float16_bytes": self.float16_nbytes,
            "collapsed_tokens": self.collapsed_tokens,
            "key_error": self.total_error("key"),
            "value_error": self.total_error("value"),
            "key_error_by_layer": self.key_error.tolist(),
            "value_error_by_layer": self.value_error.tolist(),
            "worst_layer": {"side": side, "layer": layer, "error": error},
        }


def layered(arrays: Sequence[Any], side: str) -> Array:
    """Stack the arrays of a file into ``[layers, ..., tokens, head_dim]``.

    Parameters
    ----------
    arrays : sequence of array
        Of four axes or more, the first being layers; or each of them a layer.
    side : str
        What to call them in errors.

    Returns
    -------
    array

    Raises
    ------
    TypeError, ValueError
        Where there is none, or their shapes differ, and for what is no array.

    Examples
    --------
    >>> import numpy as np
    >>> layered([np.zeros((2, 10, 4)), np.zeros((2, 10, 4))], "keys").shape
    (2, 2, 10, 4)
    """
    if not len(arrays):
        raise ValueError(f"there is no array of {side}; name one {side}")
    given = [as_float_array(f"{side}[{i}]", array) for i, array in enumerate(arrays)]
    if len(given) == 1 and given[0].ndim > 3:
        return given[0]
    shapes = {array.shape for array in given}
    if len(shapes) > 1:
        raise ValueError(
            f"the arrays of {side} have shapes {sorted(shapes)}; give layers of one shape"
        )
    return np.stack(given)


def _squares(x: Float32) -> list[float]:
    """Sum of squares of each layer, added in float64."""
    # Not np.dot, whose threads wait for each other longer than they add.
    return [float(np.square(layer, dtype=np.float64).sum()) for layer in x]


def round_trips(
    names: Mapping[str, Scheme | KeyValueSchemes | Entry | str] | None = None,
) -> dict[str, CacheRoundTrip]:
    """Return a `CacheRoundTrip` for each scheme, those of the demo by default.

    Examples
    --------
    >>> list(round_trips())[:2]
    ['naive4', 'nsep4']
    """
    chosen = {name: name for name in DEMO_SCHEMES} if names is None else names
    return {name: CacheRoundTrip(schemes) for name, schemes in chosen.items()}

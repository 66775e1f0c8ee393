"""`Quantized`: what is stored of an array, and the scheme that explains it."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nsq_ref import packing, spec
from nsq_ref.arrays import as_array, as_integer, as_integers
from nsq_ref.dtypes import FLOAT_DTYPES, Array
from nsq_ref.scheme import PARTS, Scheme, as_scheme

__all__ = ["PARTS", "Quantized", "block_of"]


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized array: every stored part, and the scheme that explains them.

    No function of this library writes to one, so that threads may share it.

    Parameters
    ----------
    scheme : Scheme
    shape : tuple of int
        Shape ``[..., T, D]`` of the array that was quantized.
    dtype : numpy dtype
        Its dtype (float32 where it was float64).
    packed : uint8 array, [..., T', row_bytes]
        Codes of the T' tokens after the sinks (P1).
    scale : array of ``scheme.scale_dtype``, [..., blocks, D] or [..., T', 1]
        One scale a channel of each block, or one a token (S1 to S4).
    norm : array of ``scheme.norm_dtype``, [..., T'], or None
        The stored factor of each token: norm (M1) or gain (M2, M3).
    zero : array like ``scale``, or None
        The value of code 0 of asymmetric schemes (S2).
    outlier_index : int32 array, [..., blocks, k], or None
        Channels kept in float16, ascending (O1).
    outliers : float16 array, [..., T', k], or None
        Directions of those channels.
    sinks : array of ``dtype``, [..., sinks, D], or None
        First tokens, unquantized (K1).
    collapsed_tokens : int
        Non-zero tokens that decode to zero (D2); 0 in all but degenerate input.

    Parts may be whatever speaks DLPack, and the scheme a name; they are kept as NumPy arrays, which
    share the memory that was given, and as a `Scheme`.

    Raises
    ------
    ValueError, TypeError
        Where a part is missing, is not of the scheme, or has another shape or dtype.

    Examples
    --------
    >>> import numpy as np
    >>> from nsq_ref import quantize
    >>> q = quantize(np.float32([[3, 4], [-1.5, 2]]))
    >>> q.codes
    array([[ 7,  7],
           [-7,  7]], dtype=int8)
    >>> q.norm
    array([5. , 2.5], dtype=float16)
    """

    scheme: Scheme
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    packed: npt.NDArray[np.uint8]
    scale: Array
    norm: Array | None = None
    zero: Array | None = None
    outlier_index: npt.NDArray[np.int32] | None = None
    outliers: npt.NDArray[np.float16] | None = None
    sinks: Array | None = None
    collapsed_tokens: int = 0

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {
            "scheme": as_scheme("scheme", self.scheme),
            "shape": tuple(as_integers("shape", self.shape, least=0)),
            "collapsed_tokens": as_integer("collapsed_tokens", self.collapsed_tokens, least=0),
        }
        with contextlib.suppress(TypeError):  # of what is no dtype, more is said below
            plain["dtype"] = np.dtype(self.dtype)
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        require_shape("shape", self.shape)
        if self.dtype not in FLOAT_DTYPES.values():
            raise TypeError(f"dtype={self.dtype} is not float32, float16 or bfloat16")
        *leading, tokens, head_dim = self.shape
        layout = self.scheme.layout(tokens, head_dim, self.dtype)
        for name in PARTS:
            part = getattr(self, name)
            if name not in layout:
                if part is not None:
                    raise ValueError(f"{name} is not stored by {self.scheme}; leave it out")
                continue
            shape, dtype = (*leading, *layout[name].shape), layout[name].dtype
            if part is None or isinstance(part, list | tuple):
                raise TypeError(f"{name} must be an array of {dtype}, got {part!r:.80}")
            part = as_array(name, part)
            object.__setattr__(self, name, part)
            if (part.shape, part.dtype) != (shape, dtype):
                raise ValueError(
                    f"{name} is {part.dtype} {list(part.shape)}; the scheme stores "
                    f"{dtype} {list(shape)}"
                )

    def __repr__(self) -> str:
        return (
            f"Quantized(shape={list(self.shape)}, bits_per_element={self.bits_per_element:.3f}, "
            f"{self.scheme})"
        )

    @property
    def parts(self) -> dict[str, Array]:
        """The stored arrays by name, those that the scheme has.

        Examples
        --------
        >>> import numpy as np
        >>> from nsq_ref import quantize
        >>> list(quantize(np.ones((2, 4), np.float32)).parts)
        ['packed', 'scale', 'norm']
        """
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    @property
    def codes(self) -> npt.NDArray[np.int8] | npt.NDArray[np.uint8]:
        """The codes ``[..., T', D]``, unpacked: int8 if symmetric, else uint8.

        Examples
        --------
        >>> import numpy as np
        >>> from nsq_ref import quantize
        >>> quantize(np.float32([[3, 4], [4, -3]]), Scheme(symmetric=False)).codes
        array([[ 0, 15],
               [15,  0]], dtype=uint8)
        """
        codes = packing.unpack(self.packed, self.scheme, self.shape[-1])
        return codes.astype(np.int8) if self.scheme.symmetric else codes.astype(np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays.

        Examples
        --------
        >>> import numpy as np
        >>> from nsq_ref import quantize
        >>> quantize(np.ones((16, 64), np.float32)).nbytes
        672
        """
        return sum(part.nbytes for part in self.parts.values())

    @property
    def bits_per_element(self) -> float:
        """Stored bits over the elements of the input, 0 if it has none.

        Codes, scales, zeros, norms and sinks, all of it.

        Examples
        --------
        >>> import numpy as np
        >>> from nsq_ref import quantize
        >>> quantize(np.ones((16, 64), np.float32)).bits_per_element
        5.25
        """
        elements = math.prod(self.shape)
        return 8 * self.nbytes / elements if elements else 0.0


def block_of(quantized: Quantized) -> spec.Block:
    """Return all blocks as kernels take them: leading axes merged, what is implied filled in.

    Examples
    --------
    >>> import numpy as np
    >>> from nsq_ref import quantize
    >>> block_of(quantize(np.ones((2, 3, 4), np.float32))).zero.shape
    (2, 1, 4)
    """
    scheme, (tokens, _) = quantized.scheme, quantized.packed.shape[-2:]
    axes = len(quantized.shape) - 2
    count = math.prod(quantized.shape[:axes])
    blocks = -(-tokens // scheme.tokens_per_block(tokens))

    def whole(part: Array | None, implied: Any, *shape: int) -> Array:
        if part is None:
            return np.broadcast_to(implied, (count, *shape))
        return part.reshape(count, *part.shape[axes:])

    scale = whole(quantized.scale, None)
    return spec.Block(
        codes=whole(quantized.packed, None),
        norm=whole(quantized.norm, np.float32(1), tokens),
        scale=scale,
        zero=whole(quantized.zero, np.float32(-0.0), *scale.shape[1:]),
        outlier_index=whole(quantized.outlier_index, np.int32(0), blocks, 0),
        outliers=whole(quantized.outliers, np.float16(0), tokens, 0),
        collapsed=np.broadcast_to(np.False_, (count, tokens)),
    )


def require_shape(name: str, shape: tuple[int, ...]) -> None:
    """Refuse what is not ``[..., T, D]`` with at least one token and one channel."""
    if len(shape) < 2:
        raise ValueError(f"{name} has shape {list(shape)}; at least [tokens, head_dim] is needed")
    if 0 in shape[-2:]:
        axis = len(shape) - 2 + shape[-2:].index(0)
        raise ValueError(
            f"{name} has shape {list(shape)}: axis {axis} is empty; leave such arrays out"
        )

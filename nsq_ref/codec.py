"""Arrays in, arrays out: validation, sinks, blocks and leading axes around the three backends."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt

from nsq_ref import oracle, packing, rounding, spec
from nsq_ref.arrays import (
    INPUT_DTYPES,
    RangeError,
    as_array,
    as_float_array,
    as_integer,
    as_integers,
    as_output,
    not_finite,
    slabs,
)
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import FLOAT_DTYPES, Field, Scheme, as_scheme

__all__ = ["Quantized", "RangeError", "dequantize", "quantize"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
_Out = TypeVar("_Out")
Backend = Literal["numba", "numpy", "oracle"]
BACKENDS = ("numba", "numpy", "oracle")
NEAR_OVERFLOW = 2.0**120  # below it no product with a code or a direction can leave float32


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
        _require_shape("shape", self.shape)
        if self.dtype not in INPUT_DTYPES[:3]:
            raise TypeError(f"dtype={self.dtype} is not float32, float16 or bfloat16")
        layout = _layout(self.scheme, self.shape, self.dtype)
        for name in PARTS:
            part = getattr(self, name)
            if name not in layout:
                if part is not None:
                    raise ValueError(f"{name} is not stored by {self.scheme}; leave it out")
                continue
            if part is None or isinstance(part, list | tuple):
                raise TypeError(
                    f"{name} must be an array of {layout[name].dtype}, got {part!r:.80}"
                )
            part = as_array(name, part)
            object.__setattr__(self, name, part)
            if (part.shape, part.dtype) != tuple(layout[name]):
                raise ValueError(
                    f"{name} is {part.dtype} {list(part.shape)}; the scheme stores "
                    f"{layout[name].dtype} {list(layout[name].shape)}"
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
        >>> quantize(np.ones((16, 64), np.float32)).bits_per_element
        5.25
        """
        elements = math.prod(self.shape)
        return 8 * self.nbytes / elements if elements else 0.0


PARTS = ("packed", "scale", "norm", "zero", "outlier_index", "outliers", "sinks")


@in_default_environment
def quantize(x: Any, scheme: Scheme | str | None = None, backend: Backend = "numba") -> Quantized:
    """Quantize key or value vectors (spec NSQ-1).

    Parameters
    ----------
    x : array, shape [..., T, D]
        Tokens by channels; leading axes (batch, head) are independent. float32, float16,
        bfloat16, or float64, which is first rounded to float32. NumPy, or whatever speaks DLPack
        on the CPU, which is not copied.
    scheme : Scheme or str, optional
        A scheme or its name; the paper's ``nsep+pchan4`` by default.
    backend : {"numba", "numpy", "oracle"}
        Compiled kernels, the specification in NumPy, or exact arithmetic in Python integers
        (slow). All give the same bytes.

    Returns
    -------
    Quantized

    Raises
    ------
    TypeError
        For integers, complex, strings, objects, and a `scheme` that is none.
    ValueError
        For NaN or infinity (I2), naming the first index; for less than two axes or an empty one.
    RangeError
        Where a norm, scale or outlier is beyond its dtype, naming where and what would hold it.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((8, 512, 64), dtype=np.float32)
    >>> q = quantize(x, "nsep+pchan4")
    >>> q.bits_per_element
    4.28125
    >>> error = np.linalg.norm(x - dequantize(q)) / np.linalg.norm(x)
    >>> bool(error < 0.15)
    True
    """
    scheme = Scheme() if scheme is None else as_scheme("scheme", scheme)
    _require_backend(backend)
    given = as_float_array("x", x)
    _require_shape("x", given.shape)
    shape, kind = given.shape, given.dtype
    if kind == np.float64:
        kind = np.dtype(np.float32)
    count, tokens, head_dim = _flat(shape)
    layout = scheme.layout(tokens, head_dim, kind)
    flat = {name: np.empty((count, *part.shape), part.dtype) for name, part in layout.items()}
    sinks = min(scheme.sink_tokens, tokens)
    collapsed = 0
    try:
        for leads, slab in slabs(given):
            if sinks:
                if not np.isfinite(slab[:, :sinks]).all():
                    raise FloatingPointError
                flat["sinks"][leads] = slab[:, :sinks]
            if sinks == tokens:
                continue
            with np.errstate(all="ignore"):  # what overflows is refused below, by name
                block = _encode(slab, sinks, scheme, backend, flat["packed"][leads])
            for name in flat.keys() - {"packed", "sinks"}:
                flat[name][leads] = getattr(block, name)
            collapsed += int(block.collapsed.sum())
    except FloatingPointError:
        raise not_finite("x", given) from None
    parts = {name: part.reshape(shape[:-2] + part.shape[1:]) for name, part in flat.items()}
    quantized = Quantized(scheme, shape, kind, **parts, collapsed_tokens=collapsed)
    _require_range(quantized, given)
    return quantized


@overload
def dequantize(quantized: Quantized, out: None = None, backend: Backend = "numba") -> Float32: ...
@overload
def dequantize(quantized: Quantized, out: _Out, backend: Backend = "numba") -> _Out: ...
@in_default_environment
def dequantize(quantized: Quantized, out: Any = None, backend: Backend = "numba") -> Any:
    """Reconstruct the vectors (rule D1).

    Parameters
    ----------
    quantized : Quantized
    out : float32 array, C-contiguous, of ``quantized.shape``, optional
        Written and returned, so that memory can be used again. NumPy's, or a tensor that speaks
        DLPack on the CPU, which is not copied.
    backend : {"numba", "numpy", "oracle"}
        As in `quantize`; all give the same bytes.

    Returns
    -------
    float32 array, shape [..., T, D]
        ``out`` itself, if it was given.

    Raises
    ------
    TypeError, ValueError
        For anything but a `Quantized`, and for an `out` of another shape, dtype or layout.

    Examples
    --------
    >>> import numpy as np
    >>> dequantize(quantize(np.float32([[3, 4], [-1.5, 2]])))
    array([[ 3. ,  4. ],
           [-1.5,  2. ]], dtype=float32)
    """
    if not isinstance(quantized, Quantized):
        raise TypeError(f"quantized must be what quantize returns, got {type(quantized).__name__}")
    _require_backend(backend)
    shape, scheme = quantized.shape, quantized.scheme
    if out is None:
        out = np.empty(shape, np.float32)
    flat_out = as_output("out", out, shape, np.float32).reshape(_flat(shape))
    sinks = min(scheme.sink_tokens, shape[-2])
    if quantized.sinks is not None:
        flat_out[:, :sinks] = quantized.sinks.reshape(-1, sinks, shape[-1])
    if sinks < shape[-2]:
        with np.errstate(all="ignore"):
            block = spec.Block(*map(np.ascontiguousarray, block_of(quantized)))
            _decode(block, sinks, scheme, backend, flat_out)
    return out


# --- backends: [N, sinks + T, D] at a time ------------------------------------------------------


def _encode(
    slab: Float32, sinks: int, scheme: Scheme, backend: Backend, packed: Array
) -> spec.Block:
    """Encode all but the sinks; codes go to ``packed``, the rest into the block returned."""
    if backend == "numba":
        from nsq_ref import kernels  # here, because importing Numba takes a while

        return kernels.encode(slab, sinks, scheme, packed)
    if not np.isfinite(slab).all():
        raise FloatingPointError
    if backend == "oracle":
        encoded = [oracle.encode(rows[sinks:].tolist(), scheme) for rows in slab]
        return _from_lists(encoded, scheme, packed)
    joined = spec.encode_blocks(slab[:, sinks:], scheme)
    packed[...] = packing.pack(joined.codes, scheme)
    return joined


def _decode(block: spec.Block, sinks: int, scheme: Scheme, backend: Backend, out: Float32) -> None:
    """Decode a block whose codes are packed into ``out`` behind its sinks."""
    if backend == "numba":
        from nsq_ref import kernels

        kernels.decode(block, sinks, scheme, out)
        return
    if backend == "oracle":
        for n in range(len(out)):
            parts = {name: part[n].tolist() for name, part in block._asdict().items()}
            parts["packed"] = parts.pop("codes")
            out[n, sinks:] = oracle.decode(parts, out.shape[2], scheme)
        return
    codes = packing.unpack(block.codes, scheme, out.shape[2])
    out[:, sinks:] = spec.decode_blocks(block._replace(codes=codes), scheme)


def _from_lists(encoded: list[dict[str, Any]], scheme: Scheme, packed: Array) -> spec.Block:
    """Turn the oracle's lists into arrays; every value fits its dtype exactly."""
    scale, norm = FLOAT_DTYPES[scheme.scale_dtype], FLOAT_DTYPES[scheme.norm_dtype]

    def stacked(name: str, dtype: np.dtype[Any]) -> Array:
        return np.array([parts[name] for parts in encoded], np.float64).astype(dtype)

    packed[...] = stacked("packed", packed.dtype)
    return spec.Block(
        packed, stacked("norm", norm), stacked("scale", scale), stacked("zero", scale),
        stacked("outlier_index", np.dtype(np.int32)), stacked("outliers", np.dtype(np.float16)),
        stacked("collapsed", np.dtype(np.bool_)),
    )  # fmt: skip


def block_of(quantized: Quantized) -> spec.Block:
    """Return all blocks as kernels take them: leading axes merged, what is implied filled in.

    Examples
    --------
    >>> import numpy as np
    >>> block_of(quantize(np.ones((2, 3, 4), np.float32))).zero.shape
    (2, 1, 4)
    """
    scheme, (tokens, _) = quantized.scheme, quantized.packed.shape[-2:]
    count = _flat(quantized.shape)[0]
    blocks = -(-tokens // scheme.tokens_per_block(tokens))

    def flat(part: Array, axes: int = 2) -> Array:
        return part.reshape(count, *part.shape[-axes:])

    def implied(value: Any, part: Array | None, *shape: int) -> Array:
        return np.broadcast_to(value, (count, *shape)) if part is None else flat(part)

    scale, norm = flat(quantized.scale), quantized.norm
    return spec.Block(
        codes=flat(quantized.packed),
        norm=np.broadcast_to(np.float32(1), (count, tokens))
        if norm is None
        else flat(norm, axes=1),
        scale=scale,
        zero=implied(np.float32(-0.0), quantized.zero, *scale.shape[1:]),
        outlier_index=implied(np.int32(0), quantized.outlier_index, blocks, 0),
        outliers=implied(np.float16(0), quantized.outliers, tokens, 0),
        collapsed=np.broadcast_to(np.False_, (count, tokens)),
    )


# --- arrays -------------------------------------------------------------------------------------


def _flat(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Merge the leading axes of ``[..., T, D]`` into one."""
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _layout(scheme: Scheme, shape: tuple[int, ...], dtype: np.dtype[Any]) -> dict[str, Field]:
    """`Scheme.layout` with the leading axes of the input."""
    layout = scheme.layout(shape[-2], shape[-1], dtype)
    return {name: Field(shape[:-2] + part.shape, part.dtype) for name, part in layout.items()}


# --- refusals -----------------------------------------------------------------------------------


def _require_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")


def _require_shape(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) < 2:
        raise ValueError(f"{name} has shape {list(shape)}; at least [tokens, head_dim] is needed")
    if 0 in shape[-2:]:
        axis = len(shape) - 2 + shape[-2:].index(0)
        raise ValueError(
            f"{name} has shape {list(shape)}: axis {axis} is empty; leave such arrays out"
        )


def _require_range(quantized: Quantized, x: Array) -> None:
    """N1, M4, S5, O1, D3: refuse what the dtypes cannot hold, naming the first place."""
    scheme = quantized.scheme
    largest = {
        name: _largest(getattr(quantized, name)) for name in ("norm", "scale", "zero", "outliers")
    }
    for name, size in largest.items():
        if np.isfinite(size):
            continue
        part = getattr(quantized, name)
        index = [int(i) for i in np.argwhere(~np.isfinite(part))[0]]
        if name == "outliers":
            fault = (
                "is beyond float16, in which outlier channels are kept; set separate_norm=True, "
                "which stores directions, or outlier_channels=0"
            )
            raise RangeError(f"outliers{index} {fault}", name, index, fault)
        option = "norm_dtype" if name == "norm" else "scale_dtype"
        dtype: str = getattr(scheme, option)
        subject, magnitude = f"{name}{index}", scheme.magnitude
        if name == "norm":
            index[-1] += scheme.sink_tokens
            if np.isinf(rounding.norm(_float32(x[tuple(index)])[None])[0]):
                dtype, magnitude = "float32", "norm"
            subject = f"the {magnitude} of token x{index}"
        remedy = {
            "float16": f"{option}='float32' holds it, 'bfloat16' too below 3.39e38",
            "bfloat16": f"{option}='float32' holds more",
            "float32": "scale the input down",
        }[dtype]
        fault = f"is beyond {dtype}; {remedy}"
        raise RangeError(f"{subject} {fault}", magnitude if name == "norm" else name, index, fault)
    if (beyond := undecodable(quantized)) is not None:
        fault = "would decode to a value beyond float32; scale the input down"
        raise RangeError(f"x{beyond[0]} {fault}", "x", beyond[0], fault)


@in_default_environment
def undecodable(quantized: Quantized) -> tuple[list[int], float] | None:
    """Return the first index that decodes beyond float32, and to what, if there is one (rule D3).

    Examples
    --------
    >>> import numpy as np
    >>> undecodable(quantize(np.ones((2, 4), np.float32))) is None
    True
    """
    norm, scale, zero, outliers = (
        _largest(getattr(quantized, name)) for name in ("norm", "scale", "zero", "outliers")
    )
    reach = max(scale * 2**quantized.scheme.bits + zero, outliers, 1.0) * max(norm, 1.0)
    if reach <= NEAR_OVERFLOW:
        return None
    decoded = dequantize(quantized)
    if np.isfinite(decoded).all():
        return None
    index = [int(i) for i in np.argwhere(~np.isfinite(decoded))[0]]
    return index, float(decoded[tuple(index)])


def _largest(part: Array | None) -> float:
    """The largest magnitude of a part: without its sign a float orders as its bits do."""
    if part is None or not part.size:
        return 0.0
    bits = np.ascontiguousarray(part).view(f"u{part.itemsize}")
    largest = np.max(bits & bits.dtype.type(2 ** (8 * part.itemsize - 1) - 1))
    return float(largest.view(part.dtype))


def _float32(values: Array) -> Float32:
    with np.errstate(over="ignore"):
        return values.astype(np.float32)

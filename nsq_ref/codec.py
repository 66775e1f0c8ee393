"""Arrays in, arrays out: validation, sinks, blocks and leading axes around the three backends."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar, overload

import numpy as np

from nsq_ref import oracle, packing, rounding, spec
from nsq_ref.arrays import RangeError, as_float_array, as_output, not_finite, slabs
from nsq_ref.dtypes import Array, Float32, kept
from nsq_ref.environment import in_default_environment
from nsq_ref.feedback import Feedback
from nsq_ref.quantized import PARTS, Quantized, block_of, require_shape
from nsq_ref.scheme import Scheme, as_scheme

__all__ = ["PARTS", "Quantized", "RangeError", "block_of", "dequantize", "quantize"]

_Out = TypeVar("_Out")
Backend = Literal["numba", "numpy", "oracle"]
BACKENDS = ("numba", "numpy", "oracle")
NEAR_OVERFLOW = 2.0**120  # below it no product with a code or a direction can leave float32


@in_default_environment
def quantize(
    x: Any,
    scheme: Scheme | str | None = None,
    backend: Backend = "numba",
    *,
    feedback: Feedback | None = None,
) -> Quantized:
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
    feedback : Feedback, optional
        Keys only: move the error of each channel into the next ones, so that products with queries
        err less (F1). The axis before the tokens is that of the key/value heads; feedback of one
        head is for all sequences. It changes what is coded, and nothing about how it is stored or
        decoded.

    Returns
    -------
    Quantized

    Raises
    ------
    TypeError
        For integers, complex, strings, objects, a `scheme` that is none, and a `feedback` that is
        none.
    ValueError
        For NaN or infinity (I2), naming the first index; for less than two axes or an empty one;
        for feedback of other heads or channels.
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
    require_shape("x", given.shape)
    if feedback is not None:
        _require_feedback(feedback, given.shape)
    shape, kind = given.shape, kept(given.dtype)
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
                packed = flat["packed"][leads]
                if feedback is None:
                    block = _encode(slab, sinks, scheme, backend, packed)
                else:
                    heads = np.arange(leads.start, leads.stop) % feedback.kv_heads
                    block = _fed_back(slab, sinks, scheme, backend, packed, feedback, heads)
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


def _fed_back(
    slab: Float32, sinks: int, scheme: Scheme, backend: Backend, packed: Array, feedback: Feedback,
    heads: Array,
) -> spec.Block:  # fmt: skip
    """Encode as `_encode` does, by F1; ``heads`` are the key/value heads of the sequences."""
    if backend == "numba":
        from nsq_ref import kernels

        return kernels.encode(slab, sinks, scheme, packed, feedback, heads)
    if not np.isfinite(slab).all():
        raise FloatingPointError
    if backend == "oracle":
        encoded = [
            oracle.encode(rows[sinks:].tolist(), scheme, feedback.head(head))
            for rows, head in zip(slab, heads, strict=True)
        ]
        return _from_lists(encoded, scheme, packed)
    blocks = [
        spec.encode_blocks(rows[sinks:], scheme, feedback.head(head))
        for rows, head in zip(slab, heads, strict=True)
    ]
    joined = spec.Block(*map(np.stack, zip(*blocks, strict=True)))
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
    parts = scheme.parts(1)

    def stacked(name: str) -> Array:
        values = np.array([one[name] for one in encoded], np.float64)
        return values.astype(parts[name].dtype) if name in parts else values

    packed[...] = stacked("packed")
    return spec.Block(packed, *map(stacked, spec.Block._fields[1:]))


def _flat(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Merge the leading axes of ``[..., T, D]`` into one."""
    return math.prod(shape[:-2]), shape[-2], shape[-1]


# --- refusals -----------------------------------------------------------------------------------


def _require_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")


def _require_feedback(feedback: Feedback, shape: tuple[int, ...]) -> None:
    if not isinstance(feedback, Feedback):
        raise TypeError(f"feedback must be a Feedback, got {type(feedback).__name__}")
    heads = shape[-3] if len(shape) > 2 else 1
    if feedback.head_dim != shape[-1] or feedback.kv_heads not in (1, heads):
        raise ValueError(
            f"feedback is of {feedback.kv_heads} heads of {feedback.head_dim} channels, and x has "
            f"shape {list(shape)}; give [..., {feedback.kv_heads}, tokens, {feedback.head_dim}]"
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

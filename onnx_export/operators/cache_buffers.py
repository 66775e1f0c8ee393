"""A cache of one tensor a side: uint8 ``[batch, kv_heads, 1, bytes]``, a buffer a head.

A runtime that knows of a cache only that it has keys and values, as onnxruntime-genai does, can
keep this one, share its memory between past and present, and give it zeros at the start. In a
buffer the parts of a head follow each other, each at the next multiple of `ALIGNMENT` bytes:
a header, sinks, tail, packed, scale, zero, norm. The header is two int64, zero at first: a mark,
and how many tokens there are. So the operator knows when a loop goes back to fewer of them, and
decodes a block that is cut in two into the tail (rule C1).

Standard operators cannot take bytes for floats before opset 26: only the native library runs such a
cache.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nsq_ref.arrays import as_integer
from nsq_ref.dtypes import FloatName
from nsq_ref.scheme import Field, Scheme
from onnx_export.operators.attention_models import cache_fields
from onnx_export.operators.cache_layout import BUFFERS, CacheTensor

__all__ = ["ALIGNMENT", "BufferPart", "buffer_layout", "buffer_tensors", "read_buffers"]

ALIGNMENT = 64
ORDER = ("sinks", "tail", "packed", "scale", "zero", "norm")


class BufferPart(NamedTuple):
    """Where a part is in a buffer, and what it is.

    Attributes
    ----------
    offset : int
        Bytes.
    field : Field
        Of one head.
    """

    offset: int
    field: Field


def buffer_layout(
    scheme: Scheme, *, head_dim: int, capacity: int, dtype: FloatName = "float32"
) -> tuple[dict[str, BufferPart], int]:
    """Return the parts of a buffer, and its bytes.

    Parameters
    ----------
    scheme : Scheme
        With a block size and without outlier channels.
    head_dim : int
    capacity : int
        Sealed tokens that there is room for, rounded up to whole blocks.
    dtype : {"float32", "float16"}
        Of sinks and tail.

    Returns
    -------
    dict of str to BufferPart, int

    Raises
    ------
    TypeError, ValueError
        As `cache_fields`.

    Examples
    --------
    >>> parts, nbytes = buffer_layout(Scheme.named("streaming4"), head_dim=64, capacity=8064)
    >>> {name: part.offset for name, part in parts.items()}
    {'sinks': 64, 'tail': 320, 'packed': 33088, 'scale': 291136, 'zero': 299200, 'norm': 307264}
    >>> nbytes / 8192  # bytes a token, tail included
    39.4765625
    """
    fields = cache_fields(
        scheme, scheme, kv_heads=1, head_dim=head_dim, capacity=capacity, dtype=dtype
    )
    parts, end = {}, ALIGNMENT
    for name in ORDER:
        if (field := fields.get(f"key_{name}")) is not None:
            parts[name] = BufferPart(end, Field(field.shape[1:], field.dtype))
            end += _rounded(math.prod(field.shape) * field.dtype.itemsize)
    return parts, end


def buffer_tensors(
    layer: int,
    key: Scheme,
    value: Scheme,
    *,
    kv_heads: int,
    head_dim: int,
    value_head_dim: int | None = None,
    context_length: int,
    dtype: FloatName = "float32",
    names: Sequence[tuple[str, str]] | None = None,
) -> tuple[CacheTensor, CacheTensor]:
    """Return the two tensors of a layer's cache, both of the size of the larger.

    Parameters
    ----------
    layer, key, value, kv_heads, head_dim, value_head_dim, dtype
        As `quantized_tensors` takes them.
    context_length : int
        Tokens that a row has room for.
    names : sequence of two pairs of str, optional
        Past and present of keys, and of values; ``past_key_values.{layer}.key`` and
        ``present.{layer}.key`` by default.

    Returns
    -------
    pair of CacheTensor

    Raises
    ------
    TypeError, ValueError
        As `cache_fields`, and for a context_length below 1.

    Examples
    --------
    >>> scheme = Scheme.named("streaming4")
    >>> key, value = buffer_tensors(
    ...     0, scheme, scheme, kv_heads=3, head_dim=64, context_length=8192
    ... )
    >>> key.past, key.dtype, key.shape
    ('past_key_values.0.key', 'uint8', ('batch', 3, 1, 323392))
    """
    context_length = as_integer("context_length", context_length, least=1)
    cache_fields(
        key, value, kv_heads=kv_heads, head_dim=head_dim, value_head_dim=value_head_dim,
        capacity=0, dtype=dtype,
    )  # fmt: skip
    nbytes = max(
        buffer_layout(
            scheme, head_dim=channels, capacity=scheme.cut(context_length).sealed, dtype=dtype
        )[1]
        for scheme, channels in ((key, head_dim), (value, value_head_dim or head_dim))
    )
    if names is None:
        names = [(f"past_key_values.{layer}.{side}", f"present.{layer}.{side}") for side in BUFFERS]
    shape = ("batch", kv_heads, 1, nbytes)
    key_tensor, value_tensor = (
        CacheTensor(past, present, "uint8", shape, layer, side)
        for (past, present), side in zip(names, BUFFERS, strict=True)
    )
    return key_tensor, value_tensor


def read_buffers(
    buffers: NDArray[np.uint8], scheme: Scheme, *, head_dim: int, dtype: FloatName = "float32"
) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
    """Return what is in the buffers of a side: the tokens of each row, and views of the parts.

    Parameters
    ----------
    buffers : ndarray, uint8 [batch, kv_heads, 1, bytes]
    scheme, head_dim, dtype
        As `buffer_layout` takes them.

    Returns
    -------
    ndarray of int64 [batch], dict of str to ndarray
        The parts as nsq.Attention has them, ``[batch, kv_heads, ...]``.

    Raises
    ------
    ValueError
        For an array of another form, or too small for a cache.

    Examples
    --------
    >>> scheme = Scheme.named("streaming4")
    >>> _, nbytes = buffer_layout(scheme, head_dim=16, capacity=256)
    >>> lengths, parts = read_buffers(
    ...     np.zeros((2, 1, 1, nbytes), np.uint8), scheme, head_dim=16
    ... )
    >>> lengths.tolist(), parts["packed"].shape, parts["tail"].shape
    ([0, 0], (2, 1, 256, 8), (2, 1, 128, 16))
    """
    if buffers.dtype != np.uint8 or buffers.ndim != 4 or buffers.shape[2] != 1:
        raise ValueError(
            f"buffers is {buffers.dtype} {list(buffers.shape)}; it must be uint8 [batch, kv_heads, "
            "1, bytes]"
        )
    nbytes = buffers.shape[-1]

    def layout(blocks: int) -> tuple[dict[str, BufferPart], int]:
        capacity = blocks * (scheme.block_size or 1)
        return buffer_layout(scheme, head_dim=head_dim, capacity=capacity, dtype=dtype)

    # A block has a byte at least.
    fits = bisect_right(range(nbytes + 1), nbytes, key=lambda blocks: layout(blocks)[1]) - 1
    if fits < 0:
        raise ValueError(f"buffers has {nbytes} bytes a head, too few for sinks and tail")
    parts, _ = layout(fits)
    rows = buffers[:, :, 0]
    views = {
        name: rows[..., offset : offset + math.prod(field.shape) * field.dtype.itemsize]
        .view(field.dtype)
        .reshape(*rows.shape[:2], *field.shape)
        for name, (offset, field) in parts.items()
    }
    return rows[:, 0, :16].view(np.int64)[:, 1], views


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT

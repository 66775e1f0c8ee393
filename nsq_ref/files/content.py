"""Values that follow from no input, which readers of files refuse."""

from __future__ import annotations

import math

import numpy as np

from nsq_ref import packing
from nsq_ref.codec import undecodable
from nsq_ref.dtypes import INPUT_DTYPES, Array
from nsq_ref.quantized import Quantized

SLAB_CODES = 1 << 22


def require_content(quantized: Quantized) -> None:
    """Refuse values that follow from no input: each decodes to something, but to no one's data.

    Examples
    --------
    >>> import numpy as np
    >>> from nsq_ref import quantize
    >>> q = quantize(np.ones((2, 4), np.float32))
    >>> q.packed[1, 0] = 0
    >>> require_content(q)
    Traceback (most recent call last):
    ValueError: codes[1, 0] = -8, which is reserved
    """
    scheme, head_dim = quantized.scheme, quantized.shape[-1]
    positive = {"scale"} if scheme.symmetric else set()
    positive |= {"norm"} if scheme.magnitude != "lsq" else set()
    for part, array in quantized.parts.items():
        if array.dtype not in INPUT_DTYPES:
            continue
        _require_all(part, array, np.isfinite(array), "is not finite")
        if part in positive:
            _require_all(part, array, array >= 0, "is negative")
    index = quantized.outlier_index
    if index is not None:
        within = (index >= 0) & (index < head_dim)
        _require_all("outlier_index", index, within, f"is no channel of {head_dim}")
        ascending = np.diff(index, axis=-1, prepend=np.int32(-1)) > 0
        _require_all("outlier_index", index, ascending, "does not ascend")
    _require_codes(quantized)
    count, most = quantized.collapsed_tokens, math.prod(quantized.packed.shape[:-1])
    if count > most:
        raise ValueError(f"collapsed_tokens is {count}; {most} tokens are coded")
    if (beyond := undecodable(quantized)) is not None:
        raise ValueError(f"decoded x{beyond[0]} = {beyond[1]} is beyond float32")


def _require_all(part: str, array: Array, holds: Array, fault: str) -> None:
    if not holds.all():
        index = [int(i) for i in np.argwhere(~holds)[0]]
        raise ValueError(f"{part}{index} = {array[tuple(index)]} {fault}")


def _require_codes(quantized: Quantized) -> None:
    """Refuse the reserved code (Q2) and padding other than code 0 (P1)."""
    scheme, head_dim = quantized.scheme, quantized.shape[-1]
    rows = quantized.packed.reshape(-1, quantized.packed.shape[-1])
    least = scheme.code_range[0]
    padded = head_dim % 8 != 0
    # Unpacking takes ten times as long as asking a table, which a split width (3) rules out.
    table: Array | None = None
    if scheme.bits != 3 and not padded:
        every_byte = np.arange(256, dtype=np.uint8)[:, None]
        table = np.all(packing.unpack(every_byte, scheme, 8 // scheme.bits) >= least, axis=-1)
    step = max(1, SLAB_CODES // head_dim)
    for start in range(0, len(rows), step):
        slab = rows[start : start + step]
        if table is not None and table[slab].all():
            continue
        codes = packing.unpack(slab, scheme, head_dim)
        reserved = np.less(codes, least)
        if reserved.any():
            row, channel = (int(i) for i in np.argwhere(reserved)[0])
            index = [*_unravel(quantized, start + row), channel]
            raise ValueError(f"codes{index} = {least - 1}, which is reserved")
        if padded and not np.array_equal(repacked := packing.pack(codes, scheme), slab):
            row = int(np.argwhere(repacked != slab)[0][0])
            index = _unravel(quantized, start + row)
            raise ValueError(f"packed{index} is not padded with code 0")


def _unravel(quantized: Quantized, row: int) -> list[int]:
    return [int(i) for i in np.unravel_index(row, quantized.packed.shape[:-1])]

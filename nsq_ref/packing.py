"""Codes to bytes and back (rule P1), in plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nsq_ref.arrays import as_array, as_integer, as_integer_array
from nsq_ref.scheme import Scheme, as_scheme, row_bytes

__all__ = ["pack", "unpack"]

Bytes = npt.NDArray[np.uint8]


def pack(codes: Any, scheme: Scheme | str) -> Bytes:
    """Pack codes along the last axis, first channel lowest (rule P1).

    Parameters
    ----------
    codes : integer array, shape [..., D]
        Codes within ``scheme.code_range``.
    scheme : Scheme or str
        Gives the width and the offset.

    Returns
    -------
    uint8 array, shape [..., row_bytes]
        Each row padded to whole bytes with code 0.

    Raises
    ------
    TypeError, ValueError
        For what is no integer, and a code outside the range, naming its index.

    Examples
    --------
    >>> import numpy as np
    >>> pack(np.array([[-7, 7, 1]]), Scheme(bits=4))
    array([[241, 137]], dtype=uint8)
    """
    codes, scheme = as_integer_array("codes", codes), as_scheme("scheme", scheme)
    if not codes.ndim:
        raise ValueError(f"codes={codes} is a single code; give [..., head_dim]")
    low, high = scheme.code_range
    outside = (codes < low) | (codes > high)
    if outside.any():
        index = tuple(int(i) for i in np.argwhere(outside)[0])
        raise ValueError(f"codes{list(index)} is {codes[index]}; codes lie in {low} to {high}")
    stored = (codes.astype(np.int16) + scheme.code_offset).astype(np.uint8)
    if scheme.bits == 3:
        low_bits = _pack_row(stored & np.uint8(3), 2, scheme.code_offset & 3)
        high_bits = _pack_row(stored >> np.uint8(2), 1, scheme.code_offset >> 2)
        return np.concatenate([low_bits, high_bits], axis=-1)
    return _pack_row(stored, scheme.bits, scheme.code_offset)


def unpack(packed: Any, scheme: Scheme | str, head_dim: int) -> npt.NDArray[np.int16]:
    """Return the codes of packed rows; the inverse of `pack`.

    Parameters
    ----------
    packed : uint8 array, shape [..., row_bytes]
    scheme : Scheme or str
        Gives the width and the offset.
    head_dim : int
        Number of channels; what lies beyond in the last byte is padding.

    Returns
    -------
    int16 array, shape [..., D]

    Raises
    ------
    TypeError, ValueError
        For another dtype than uint8, and for rows of another length than the scheme's.

    Examples
    --------
    >>> import numpy as np
    >>> unpack(np.array([[241, 137]], np.uint8), Scheme(bits=4), head_dim=3)
    array([[-7,  7,  1]], dtype=int16)
    """
    packed, scheme = as_array("packed", packed), as_scheme("scheme", scheme)
    head_dim = as_integer("head_dim", head_dim, least=1)
    expected = row_bytes(head_dim, scheme.bits)
    if packed.dtype != np.uint8:
        raise TypeError(f"packed has dtype {packed.dtype}; packed codes are uint8")
    if packed.shape[-1:] != (expected,):
        raise ValueError(
            f"packed has shape {list(packed.shape)}; rows of {head_dim} channels have {expected} "
            "bytes"
        )
    if scheme.bits == 3:
        split = row_bytes(head_dim, 2)
        stored = _unpack_row(packed[..., :split], 2, head_dim)
        stored |= _unpack_row(packed[..., split:], 1, head_dim) << np.uint8(2)
    else:
        stored = _unpack_row(packed, scheme.bits, head_dim)
    return np.subtract(stored, scheme.code_offset, dtype=np.int16)


def _pack_row(fields: Bytes, bits: int, padding: int) -> Bytes:
    per_byte = 8 // bits
    missing = -fields.shape[-1] % per_byte
    behind = np.full((*fields.shape[:-1], missing), padding, np.uint8)
    padded = np.concatenate([fields, behind], axis=-1)
    groups = padded.reshape(*fields.shape[:-1], padded.shape[-1] // per_byte, per_byte)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed: Bytes = np.bitwise_or.reduce(groups << shifts, axis=-1)
    return packed


def _unpack_row(packed: Bytes, bits: int, head_dim: int) -> Bytes:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields: Bytes = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return fields.reshape(*packed.shape[:-1], packed.shape[-1] * (8 // bits))[..., :head_dim]

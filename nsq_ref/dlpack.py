"""Tensors of others where NumPy's own DLPack stops: bfloat16, and memory to write to."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from nsq_ref.dtypes import DTYPES, Array

UNSIGNED, BFLOAT = 1, 4  # codes of DLDataType


def writeable(tensor: Any, view: Array) -> Array:
    """Return a view that can be written to, if the tensor allows; NumPy's own of it cannot.

    NumPy cannot tell whether an older DLPack may be written to, and is careful.
    """
    try:
        older = np.from_dlpack(_Older(tensor))
    except (BufferError, RuntimeError, TypeError, ValueError):
        return view
    return np.asarray(_Memory(older))


def bfloat16(tensor: Any) -> Array:
    """Return a view of a bfloat16 tensor; TypeError for any other."""
    return np.from_dlpack(_BFloat16AsUnsigned(tensor)).view(DTYPES["bfloat16"])


class _Older:
    """Ask for DLPack's first form, which says nothing of writing: what is read-only refuses it."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **_: Any) -> Any:
        return self.tensor.__dlpack__()


class _Memory:
    """Memory to write to, and what keeps it."""

    def __init__(self, view: Array) -> None:
        self.view = view
        address, _ = view.__array_interface__["data"]
        self.__array_interface__ = view.__array_interface__ | {"data": (address, False)}


_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _BFloat16AsUnsigned(_Older):
    """Hand a bfloat16 tensor to NumPy, whose DLPack knows no bfloat16, as 16-bit integers."""

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self.tensor.__dlpack__()
        # DLTensor: data (8 bytes), device (8), ndim (4), then the type's code and bits.
        kind = (ctypes.c_uint8 * 2).from_address(_capsule_pointer(capsule, b"dltensor") + 20)
        if tuple(kind) != (BFLOAT, 16):
            raise TypeError("the tensor is not bfloat16")
        kind[0] = UNSIGNED
        return capsule

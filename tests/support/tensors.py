"""Arrays as other frameworks hand them over."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class Tensor:
    """Speaks DLPack and nothing else, as a tensor of another framework does."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class OlderTensor(Tensor):
    """Knows only DLPack's first form, which does not say what may be written to."""

    def __dlpack__(self) -> Any:  # type: ignore[override]
        return self.array.__dlpack__()


class DeviceTensor(Tensor):
    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("the tensor lives on a GPU")


class BFloat16Tensor(Tensor):
    """Exports bfloat16, which NumPy cannot: as the integers it is, with the type's code changed."""

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self.array.view(np.uint16).__dlpack__()
        kind = (ctypes.c_uint8 * 4).from_address(_capsule_pointer(capsule, b"dltensor") + 20)
        assert list(kind) == [1, 16, 1, 0]  # unsigned, 16 bits, one lane
        kind[0] = 4  # kDLBfloat
        return capsule

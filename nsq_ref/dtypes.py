"""The dtypes of everything that is stored or taken, by name, and the arrays of annotations."""

from __future__ import annotations

from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

FloatName = Literal["float16", "bfloat16", "float32"]

DTYPES: dict[str, np.dtype[Any]] = {
    dtype.name: dtype
    for dtype in map(
        np.dtype,
        (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.int8, np.uint8),
    )
}
"""Every dtype by its name; that of bfloat16 comes from ml_dtypes."""

FLOAT_DTYPES = {name: DTYPES[name] for name in get_args(FloatName)}
"""Those of scales, of norms, and of what is kept as it came."""

INPUT_DTYPES = tuple(DTYPES[name] for name in ("float32", "float16", "bfloat16", "float64"))
"""Those of arrays that are taken (I1)."""


def kept(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which what is taken is kept: float32 for float64 (I1)."""
    return DTYPES["float32"] if dtype == DTYPES["float64"] else dtype

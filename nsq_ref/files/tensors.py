"""Safetensors files, written whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from nsq_ref.files import atomic

__all__ = ["write"]

PathLike = str | os.PathLike[str]


def write(
    path: PathLike, arrays: Mapping[str, npt.NDArray[Any]], metadata: dict[str, str] | None
) -> None:
    """Write arrays, contiguous ones, and metadata.

    Raises
    ------
    OSError
        Where the file cannot be written; what was there before is untouched.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> write(Path(folder.name, "one.safetensors"), {"x": np.ones(2)}, None)
    >>> os.listdir(folder.name)
    ['one.safetensors']
    >>> folder.cleanup()
    """

    def content(temporary: Path) -> None:
        try:
            save_file(dict(arrays), temporary, metadata)
        except SafetensorError as error:
            # The library has the system's error in words only.
            if number := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(
                    int(number[1]), os.strerror(int(number[1])), os.fspath(path)
                ) from None
            raise OSError(f"{path} was not written: {error}") from None

    atomic.write([(path, content)])

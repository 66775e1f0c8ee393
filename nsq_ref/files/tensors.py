"""Safetensors files: written whole or not at all, opened only if their header holds."""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from nsq_ref.dtypes import Array
from nsq_ref.files import atomic, kinds
from nsq_ref.files.atomic import PathLike
from nsq_ref.files.errors import DAMAGED, StorageError

FLOATS = ("F16", "BF16", "F32", "F64")  # dtypes of arrays that are taken, in the library's words


def write(path: PathLike, arrays: Mapping[str, Array], metadata: dict[str, str] | None) -> None:
    """Write arrays, contiguous ones, and metadata: whole or not at all.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> write(Path(folder.name, "one.safetensors"), {"x": np.ones(2)}, None)
    >>> os.listdir(folder.name)
    ['one.safetensors']
    >>> folder.cleanup()
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

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


@contextlib.contextmanager
def opened(path: PathLike) -> Iterator[Any]:
    """Open a file whose header holds, turning the library's errors into ours."""
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:  # for its OSError: the library has few of its own
        try:
            with safe_open(path, framework="np") as handle:
                _require_unique(path, file)
                yield handle
        except SafetensorError as error:
            raise StorageError(
                kinds.mistaken(path, kinds.SAFETENSORS)
                or f"{path} is no safetensors file ({error}); {DAMAGED}"
            ) from None


def _require_unique(path: PathLike, file: IO[bytes]) -> None:
    """Refuse equal names, of which the library lets the last win; its checks came before."""

    def forget(pairs: list[tuple[str, Any]]) -> None:
        without_duplicates(pairs)

    (size,) = struct.unpack("<Q", file.read(8))
    try:
        json.loads(file.read(size), object_pairs_hook=forget)
    except ValueError as error:
        raise StorageError(f"{path}: header: {error}; {DAMAGED}") from None


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs, refusing equal keys: for ``object_pairs_hook``."""
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key stands twice in one JSON object")
    return unique

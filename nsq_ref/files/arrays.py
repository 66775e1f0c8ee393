"""Plain arrays, as users bring them: ``.npz``, ``.npy`` and safetensors files, never a pickle."""

from __future__ import annotations

import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from nsq_ref.arrays import as_float_array
from nsq_ref.dtypes import INPUT_DTYPES, Array
from nsq_ref.files import kinds, tensors
from nsq_ref.files.atomic import PathLike
from nsq_ref.files.containers import (
    CACHE_FORMAT,
    CACHE_MARK,
    FEEDBACK_FORMAT,
    FEEDBACK_MARK,
    METADATA_KEY,
    READERS,
)
from nsq_ref.files.errors import DAMAGED, StorageError, require_name

MOST_DEFLATE_RATIO = 1032  # what DEFLATE can reach; beyond it a zip lies about a member's size


def write_arrays(path: PathLike, arrays: Mapping[str, Array]) -> None:
    """Write plain arrays to a safetensors file, whole or not at all.

    Parameters
    ----------
    path : str or path
        An existing file is replaced, and only once the new one is on disk.
    arrays : mapping of str to array
        float16, bfloat16, float32 or float64.

    Raises
    ------
    TypeError, ValueError
        For other dtypes, and for names that are empty or not printable.
    OSError
        Where the file cannot be written; what was there before is untouched.

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = os.path.join(folder.name, "plain.safetensors")
    >>> write_arrays(path, {"keys": np.ones((1, 3), np.float32)})
    >>> read_arrays(path)
    {'keys': array([[1., 1., 1.]], dtype=float32)}
    >>> folder.cleanup()
    """
    given = {}
    for name, array in arrays.items():
        require_name(name)
        given[name] = np.ascontiguousarray(as_float_array(f"arrays[{name!r}]", array))
    tensors.write(path, given, None)


def read_arrays(path: PathLike) -> dict[str, Array]:
    """Read every array of a ``.npz``, ``.npy`` or ``.safetensors`` file; never a pickle.

    Parameters
    ----------
    path : str or path
        The ending tells the format. A ``.npy`` file holds one array, named after the file.

    Returns
    -------
    dict of str to array
        float16, bfloat16 (safetensors only), float32 or float64.

    Raises
    ------
    StorageError
        For other endings, other dtypes, and files that are damaged, hold no arrays, or hold a
        name twice. It is a `ValueError`.
    OSError
        Where the file cannot be opened.

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = os.path.join(folder.name, "cache.npz")
    >>> np.savez(path, keys=np.ones((1, 3), np.float16))
    >>> read_arrays(path)
    {'keys': array([[1., 1., 1.]], dtype=float16)}
    >>> folder.cleanup()
    """
    ending = Path(path).suffix.lower()
    if ending == ".npz":
        arrays = _read_npz(path)
    elif ending == ".npy":
        with open(path, "rb") as file:
            if found := kinds.mistaken(path, kinds.NPY):
                raise StorageError(found)
            size = os.fstat(file.fileno()).st_size
            arrays = {Path(path).stem: _read_npy(str(path), file, size)}
    elif ending == ".safetensors":
        arrays = _read_safetensors(path)
    else:
        if os.path.isdir(path):
            raise StorageError(f"{path} is a folder; name a file in it")
        endings = ".npz, .npy or .safetensors"
        raise StorageError(
            (os.path.isfile(path) and kinds.mistaken(path, f"a file of arrays, {endings}"))
            or f"{path} must end in {endings}, which are read"
        )
    if not arrays:
        raise StorageError(f"{path} holds no arrays")
    try:
        for name in arrays:
            require_name(name)
    except ValueError as error:
        raise StorageError(f"{path}: {error}; rename it") from None
    return arrays


def _read_safetensors(path: PathLike) -> dict[str, Array]:
    with tensors.opened(path) as file:
        if (text := (file.metadata() or {}).get(METADATA_KEY)) is not None:
            if CACHE_MARK in text:
                raise StorageError(
                    f"{path} holds a saved cache, which is quantized; {READERS[CACHE_FORMAT]} "
                    "reads it, `nsq info` shows it"
                )
            if FEEDBACK_MARK in text:
                raise StorageError(
                    f"{path} holds feedback for keys; {READERS[FEEDBACK_FORMAT]} reads it"
                )
            raise StorageError(
                f"{path} holds quantized arrays; `nsq dequantize` or load reads them"
            )
        arrays = {}
        for name in sorted(file.keys()):
            kind = file.get_slice(name).get_dtype()
            if kind not in tensors.FLOATS:
                raise StorageError(
                    f"{path}: array {name!r} is {kind}, not one of {', '.join(tensors.FLOATS)}; "
                    "leave it out or convert it"
                )
            arrays[name] = file.get_tensor(name)
        return arrays


def _read_npz(path: PathLike) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    with open(path, "rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        try:
            with zipfile.ZipFile(raw) as archive:
                members = archive.infolist()
                _require_plausible(path, members, size)
                for member in members:
                    name = member.filename.removesuffix(".npy")
                    if name in arrays:
                        raise StorageError(f"{path}: array {name!r} stands twice; rename one")
                    with archive.open(member) as file:
                        arrays[name] = _read_npy(f"{path}: array {name!r}", file, member.file_size)
        except StorageError:
            raise
        except ZIP_ERRORS as error:
            raise StorageError(
                kinds.mistaken(path, kinds.NPZ) or f"{path} is no .npz file ({error}); {DAMAGED}"
            ) from None
    return arrays


# What zipfile raises for damaged files; its OSError is a seek to where the file has nothing.
ZIP_ERRORS = (
    EOFError, NotImplementedError, OSError, ValueError, struct.error, zipfile.BadZipFile, zlib.error
)  # fmt: skip


def _require_plausible(path: PathLike, members: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse members that say they are larger than their compressed bytes can be."""
    if sum(member.compress_size for member in members) > size:
        raise StorageError(f"{path}: members overlap or end beyond the file; {DAMAGED}")
    for member in members:
        where = f"{path}: member {member.filename!r}"
        if not member.filename.endswith(".npy"):
            raise StorageError(f"{where} is no .npy file; leave it out")
        if member.flag_bits & 1:
            raise StorageError(f"{where} is encrypted; write it with np.savez")
        ratios = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: MOST_DEFLATE_RATIO}
        if member.compress_type not in ratios:
            raise StorageError(f"{where} is neither stored nor deflated; write it with np.savez")
        if member.file_size > ratios[member.compress_type] * member.compress_size:
            raise StorageError(f"{where} says it is larger than it can be; {DAMAGED}")


def _read_npy(where: str, file: IO[bytes], size: int) -> Array:
    """Read one array, after its header agrees with the ``size`` of all of it."""
    try:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise StorageError(f"{where} has .npy version {version}, which no float array needs")
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read_header(file)
    except StorageError:
        raise
    except (ValueError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise StorageError(f"{where} is no .npy array ({error}); {DAMAGED}") from None
    if dtype.hasobject:
        raise StorageError(
            f"{where} holds Python objects, and pickles are not read; save a numeric array"
        )
    if dtype.newbyteorder("=") not in INPUT_DTYPES:
        raise StorageError(
            f"{where} is {dtype.name}, not float16, float32 or float64; convert it, and save "
            "bfloat16, which .npy cannot name, as safetensors"
        )
    expected = file.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or expected != size:
        raise StorageError(
            f"{where} has {size} bytes, which is not what its shape {shape} takes; {DAMAGED}"
        )
    file.seek(0)
    try:
        array: Array = npy.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise StorageError(f"{where} is no .npy array ({error}); {DAMAGED}") from None
    return array

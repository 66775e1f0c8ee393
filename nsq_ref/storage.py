"""Files: quantized arrays in a checked safetensors container, and the arrays that users bring.

A container holds arrays and one metadata entry, ``nsq``, that explains them and has their checksum.
It is one entry because safetensors writes several in no fixed order, and equal arrays shall give
equal files. Files of `save` hold the parts of each `Quantized` as ``<name>.<part>``; those of
`KVCache.save` are containers too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy
from safetensors import SafetensorError, safe_open

from nsq_ref import packing
from nsq_ref.arrays import INPUT_DTYPES, as_float_array
from nsq_ref.codec import Quantized, undecodable
from nsq_ref.files import kinds
from nsq_ref.files import tensors as tensors_file
from nsq_ref.scheme import FLOAT_DTYPES, SPEC_VERSION, Scheme

__all__ = [
    "StorageError",
    "holds_cache",
    "is_quantized",
    "load",
    "read_arrays",
    "save",
    "write_arrays",
]

Array = npt.NDArray[Any]
PathLike = str | os.PathLike[str]

FORMAT = "nsq-safetensors-1"
CACHE_FORMAT = "nsq-cache-1"
READERS = {FORMAT: "nsq_ref.storage.load", CACHE_FORMAT: "nsq_ref.KVCache.load"}
METADATA_KEY = "nsq"
CACHE_MARK = '"format":"nsq-cache-'  # of any version
DAMAGED = "the file was cut short or damaged, or is something else; copy it again or make it anew"
TENSOR_DTYPES = ("F16", "BF16", "F32", "F64")
MOST_DEFLATE_RATIO = 1032  # what DEFLATE can reach; beyond it a zip lies about a member's size
SLAB_CODES = 1 << 22


class StorageError(ValueError):
    """A file that is damaged, of another format or version, or holds what no encoder writes."""


# --- quantized arrays ---------------------------------------------------------------------------


def save(path: PathLike, tensors: Mapping[str, Quantized]) -> None:
    """Write quantized arrays to a safetensors file, whole or not at all.

    Parameters
    ----------
    path : str or path
        An existing file is replaced, and only once the new one is on disk.
    tensors : mapping of str to Quantized
        For example ``{"keys": ..., "values": ...}``.

    Raises
    ------
    TypeError, ValueError
        For what is not a `Quantized`, for no arrays at all, for names that are empty or not
        printable, and for parts that no encoder writes.
    OSError
        Where the file cannot be written; what was there before is untouched.

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> from nsq_ref import quantize
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = os.path.join(folder.name, "cache.safetensors")
    >>> save(path, {"keys": quantize(np.ones((2, 16, 8), np.float32))})
    >>> load(path)["keys"].shape
    (2, 16, 8)
    >>> folder.cleanup()
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors must map names to Quantized, got {type(tensors).__name__}")
    if not tensors:
        raise ValueError("tensors is empty; give at least one Quantized")
    for name, quantized in tensors.items():
        _require_name(name)
        if not isinstance(quantized, Quantized):
            got = type(quantized).__name__
            raise TypeError(f"tensors[{name!r}] must be what quantize returns, got {got}")
        try:
            require_content(quantized)
        except ValueError as error:
            raise ValueError(f"tensors[{name!r}]: {error}") from None
    parts = {
        f"{name}.{part}": array
        for name, quantized in tensors.items()
        for part, array in quantized.parts.items()
    }
    entries = {
        name: {
            "scheme": quantized.scheme.to_dict(),
            "shape": list(map(int, quantized.shape)),
            "dtype": quantized.dtype.name,
            "collapsed_tokens": quantized.collapsed_tokens,
        }
        for name, quantized in tensors.items()
    }
    write_container(path, FORMAT, {"tensors": entries}, parts)


def load(path: PathLike) -> dict[str, Quantized]:
    """Read a file of `save`, checking all of it before anything is returned.

    Parameters
    ----------
    path : str or path

    Returns
    -------
    dict of str to Quantized

    Raises
    ------
    StorageError
        For any other file: another format or version, damage anywhere, parts that do not fit
        the scheme, or that no encoder writes. It is a `ValueError`.
    OSError
        Where the file cannot be opened.

    Examples
    --------
    >>> load("no such file")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'no such file'
    """
    entries: dict[str, tuple[Scheme, tuple[int, ...], np.dtype[Any]]] = {}

    def names(content: dict[str, Any]) -> set[str]:
        if set(content) != {"tensors"} or not isinstance(content["tensors"], dict):
            raise ValueError(f"metadata {METADATA_KEY!r} lacks or adds fields")
        for name, entry in content["tensors"].items():
            entries[name] = _entry(name, entry)
        return {
            f"{name}.{part}"
            for name, (scheme, shape, _) in entries.items()
            for part in scheme.layout(shape[-2], shape[-1])
        }

    content, parts = read_container(path, FORMAT, names)
    loaded = {}
    for name, (scheme, shape, dtype) in entries.items():
        own = {part: parts[f"{name}.{part}"] for part in scheme.layout(shape[-2], shape[-1])}
        collapsed = content["tensors"][name]["collapsed_tokens"]
        try:
            quantized = Quantized(scheme, shape, dtype, **own, collapsed_tokens=collapsed)
            require_content(quantized)
        except (TypeError, ValueError) as error:
            raise StorageError(f"{path}: {name!r}: {error}; {DAMAGED}") from None
        loaded[name] = quantized
    return loaded


def is_quantized(path: PathLike) -> bool:
    """Tell whether a safetensors file says that it holds quantized arrays (of any version).

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = os.path.join(folder.name, "plain.safetensors")
    >>> write_arrays(path, {"keys": np.ones((16, 8), np.float32)})
    >>> is_quantized(path)
    False
    >>> folder.cleanup()
    """
    with _open_safetensors(path) as file:
        return METADATA_KEY in (file.metadata() or {})


def holds_cache(path: PathLike) -> bool:
    """Tell whether a safetensors file says that it is one of `KVCache.save` (of any version).

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> from nsq_ref import quantize
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = os.path.join(folder.name, "keys.safetensors")
    >>> save(path, {"keys": quantize(np.ones((16, 8), np.float32))})
    >>> holds_cache(path)
    False
    >>> folder.cleanup()
    """
    with _open_safetensors(path) as file:
        return CACHE_MARK in (file.metadata() or {}).get(METADATA_KEY, "")


# --- containers ---------------------------------------------------------------------------------


def write_container(
    path: PathLike, kind: str, content: dict[str, Any], arrays: Mapping[str, Array]
) -> None:
    """Write arrays and the JSON that explains them, with a checksum, whole or not at all.

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = os.path.join(folder.name, "ones.safetensors")
    >>> write_container(path, "nsq-example-1", {"names": ["a"]}, {"a": np.ones(2, np.uint8)})
    >>> read_container(path, "nsq-example-1", lambda content: set(content["names"]))
    ({'names': ['a']}, {'a': array([1, 1], dtype=uint8)})
    >>> folder.cleanup()
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    description = {"format": kind, "spec": SPEC_VERSION, **content}
    text = _canonical({**description, "sha256": _digest(description, arrays)})
    tensors_file.write(path, arrays, {METADATA_KEY: text})


def read_container(
    path: PathLike, kind: str, names: Callable[[dict[str, Any]], set[str]]
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read what `write_container` wrote, which ``names`` explains.

    ``names`` checks the content and returns the names of its arrays, before any of them is read;
    its ValueError says what is wrong. Shapes and dtypes are for the caller to check.
    """
    with _open_safetensors(path) as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
        description, stored_digest = _description(path, text, kind)
        content = {k: v for k, v in description.items() if k not in ("format", "spec")}
        try:
            expected = names(content)
        except (TypeError, ValueError) as error:
            raise StorageError(f"{path}: {error}; {DAMAGED}") from None
        if different := sorted(expected ^ set(file.keys())):
            state = "is missing" if different[0] in expected else "does not belong there"
            raise StorageError(f"{path}: tensor {different[0]!r} {state}; {DAMAGED}")
        arrays = {}
        for name in sorted(expected):
            dtype = file.get_slice(name).get_dtype()
            if dtype not in (*TENSOR_DTYPES, "U8", "I32"):
                raise StorageError(f"{path}: tensor {name!r} is {dtype}; {DAMAGED}")
            arrays[name] = file.get_tensor(name)
    if _digest(description, arrays) != stored_digest:
        raise StorageError(f"{path} does not match its checksum; {DAMAGED}")
    return content, arrays


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(description: object, parts: Mapping[str, Array]) -> str:
    """SHA-256 of the description and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(_canonical(description).encode())
    for name, array in sorted(parts.items()):
        # JSON ends where it ends, so that nothing can move from one field to the next.
        digest.update(_canonical([name, array.dtype.name, array.shape]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _description(path: PathLike, text: str | None, kind: str) -> tuple[dict[str, Any], object]:
    """Return the metadata without its checksum, and the checksum."""
    if text is None:
        raise StorageError(
            f"{path} is not a file of quantized arrays: its metadata has no {METADATA_KEY!r}; "
            "`nsq quantize` makes such files, read_arrays reads plain ones"
        )
    try:
        description = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: metadata {METADATA_KEY!r}: {error}; {DAMAGED}") from None
    if not isinstance(description, dict):
        raise StorageError(f"{path}: metadata {METADATA_KEY!r} is no JSON object; {DAMAGED}")
    if (other := description.get("format")) != kind and other in READERS:
        raise StorageError(f"{path}: format is {other!r}, which {READERS[other]} reads")
    for key, known in (("format", kind), ("spec", SPEC_VERSION)):
        if (found := description.get(key)) != known:
            raise StorageError(
                f"{path}: {key} is {found!r:.80} and this library reads {known!r}; use the version "
                "of nsq that wrote the file, or quantize again"
            )
    digest = description.pop("sha256", None)
    if text != _canonical({**description, "sha256": digest}):
        raise StorageError(f"{path}: metadata {METADATA_KEY!r} is not as written; {DAMAGED}")
    return description, digest


def _entry(name: str, entry: object) -> tuple[Scheme, tuple[int, ...], np.dtype[Any]]:
    """Return scheme, shape and dtype of one array; nothing is allocated for them."""
    try:
        _require_name(name)
        fields = ["collapsed_tokens", "dtype", "scheme", "shape"]
        if not isinstance(entry, dict) or sorted(entry) != fields:
            raise ValueError(f"the metadata must have the fields {', '.join(fields)}")
        scheme = Scheme.from_dict(entry["scheme"])
        shape, dtype = entry["shape"], entry["dtype"]
        if not isinstance(shape, list) or len(shape) < 2:
            raise ValueError(f"shape is {shape!r:.80}, not a list of at least two sizes")
        if not all(type(size) is int and size >= 0 for size in shape) or 0 in shape[-2:]:
            raise ValueError(
                f"shape is {shape!r:.80}; tokens and channels are positive integers, other sizes "
                "may be 0"
            )
        if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype is {dtype!r:.80}, not one of {', '.join(FLOAT_DTYPES)}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name!r}: {error}") from None
    return scheme, tuple(shape), FLOAT_DTYPES[dtype]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key stands twice in one JSON object")
    return unique


# --- what no encoder writes ---------------------------------------------------------------------


def _require_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"array names are strings, got {name!r}")
    if not name or not name.isprintable() or name == "__metadata__":
        raise ValueError(f"array name {name!r} must be printable text, not '__metadata__'")


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


# --- safetensors --------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_safetensors(path: PathLike) -> Iterator[Any]:
    """Open a file whose header holds, turning the library's errors into ours."""
    with open(path, "rb") as file:  # for its OSError: the library has few of its own
        try:
            with safe_open(path, framework="np") as opened:
                _require_unique(path, file)
                yield opened
        except SafetensorError as error:
            raise StorageError(
                kinds.mistaken(path, kinds.SAFETENSORS)
                or f"{path} is no safetensors file ({error}); {DAMAGED}"
            ) from None


def _require_unique(path: PathLike, file: IO[bytes]) -> None:
    """Refuse equal names, of which the library lets the last win; its checks came before."""

    def forget(pairs: list[tuple[str, Any]]) -> None:
        _without_duplicates(pairs)

    (size,) = struct.unpack("<Q", file.read(8))
    try:
        json.loads(file.read(size), object_pairs_hook=forget)
    except ValueError as error:
        raise StorageError(f"{path}: header: {error}; {DAMAGED}") from None


# --- plain arrays -------------------------------------------------------------------------------


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
        _require_name(name)
        given[name] = np.ascontiguousarray(as_float_array(f"arrays[{name!r}]", array))
    tensors_file.write(path, given, None)


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
            _require_name(name)
    except ValueError as error:
        raise StorageError(f"{path}: {error}; rename it") from None
    return arrays


def _read_safetensors(path: PathLike) -> dict[str, Array]:
    with _open_safetensors(path) as file:
        if (text := (file.metadata() or {}).get(METADATA_KEY)) is not None:
            if CACHE_MARK in text:
                raise StorageError(
                    f"{path} holds a saved cache, which is quantized; {READERS[CACHE_FORMAT]} "
                    "reads it, `nsq info` shows it"
                )
            raise StorageError(
                f"{path} holds quantized arrays; `nsq dequantize` or load reads them"
            )
        arrays = {}
        for name in sorted(file.keys()):
            kind = file.get_slice(name).get_dtype()
            if kind not in TENSOR_DTYPES:
                raise StorageError(
                    f"{path}: array {name!r} is {kind}, not one of {', '.join(TENSOR_DTYPES)}; "
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

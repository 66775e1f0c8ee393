"""Files of quantized arrays: the parts of each `Quantized`, as ``<name>.<part>`` in a container."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.files.atomic import PathLike
from nsq_ref.files.containers import FORMAT, METADATA_KEY, read_container, write_container
from nsq_ref.files.content import require_content
from nsq_ref.files.errors import DAMAGED, StorageError, require_name
from nsq_ref.quantized import Quantized
from nsq_ref.scheme import Scheme


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
        require_name(name)
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
            raise StorageError(f"{path}: {name!r}: {error}; {DAMAGED}") from error
        loaded[name] = quantized
    return loaded


def _entry(name: str, entry: object) -> tuple[Scheme, tuple[int, ...], np.dtype[Any]]:
    """Return scheme, shape and dtype of one array; nothing is allocated for them."""
    try:
        require_name(name)
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

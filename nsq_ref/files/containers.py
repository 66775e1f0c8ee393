"""Containers: safetensors files of quantized arrays or caches, with a version and a checksum.

A container holds arrays and one metadata entry, ``nsq``, that explains them and has their checksum.
It is one entry because safetensors writes several in no fixed order, and equal arrays shall give
equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nsq_ref.dtypes import Array
from nsq_ref.files import tensors
from nsq_ref.files.atomic import PathLike
from nsq_ref.files.errors import DAMAGED, StorageError
from nsq_ref.scheme import SPEC_VERSION

FORMAT = "nsq-safetensors-1"
CACHE_FORMAT = "nsq-cache-1"
FEEDBACK_FORMAT = "nsq-feedback-1"
READERS = {
    FORMAT: "nsq_ref.files.load",
    CACHE_FORMAT: "nsq_ref.KVCache.load",
    FEEDBACK_FORMAT: "nsq_ref.files.load_feedback",
}
METADATA_KEY = "nsq"
CACHE_MARK = '"format":"nsq-cache-'  # of any version
FEEDBACK_MARK = '"format":"nsq-feedback-'


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
    tensors.write(path, arrays, {METADATA_KEY: text})


def read_container(
    path: PathLike, kind: str, names: Callable[[dict[str, Any]], set[str]]
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read what `write_container` wrote, which ``names`` explains.

    ``names`` checks the content and returns the names of its arrays, before any of them is read;
    its ValueError says what is wrong. Shapes and dtypes are for the caller to check.
    """
    with tensors.opened(path) as file:
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
            if dtype not in (*tensors.FLOATS, "U8", "I32"):
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
        description = json.loads(text, object_pairs_hook=tensors.without_duplicates)
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


def is_quantized(path: PathLike) -> bool:
    """Tell whether a safetensors file says that it holds quantized arrays (of any version).

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> from nsq_ref.files import write_arrays
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = os.path.join(folder.name, "plain.safetensors")
    >>> write_arrays(path, {"keys": np.ones((16, 8), np.float32)})
    >>> is_quantized(path)
    False
    >>> folder.cleanup()
    """
    with tensors.opened(path) as file:
        return METADATA_KEY in (file.metadata() or {})


def holds_cache(path: PathLike) -> bool:
    """Tell whether a safetensors file says that it is one of `KVCache.save` (of any version).

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> from nsq_ref import quantize
    >>> from nsq_ref.files import save
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = os.path.join(folder.name, "keys.safetensors")
    >>> save(path, {"keys": quantize(np.ones((16, 8), np.float32))})
    >>> holds_cache(path)
    False
    >>> folder.cleanup()
    """
    with tensors.opened(path) as file:
        return CACHE_MARK in (file.metadata() or {}).get(METADATA_KEY, "")

"""Files of feedback for keys (F1): order and factor of each layer, in a container."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsq_ref.feedback import Feedback
from nsq_ref.files.atomic import PathLike
from nsq_ref.files.containers import (
    FEEDBACK_FORMAT,
    METADATA_KEY,
    read_container,
    write_container,
)
from nsq_ref.files.errors import DAMAGED, StorageError, require_name

ARRAYS = ("order", "factor")


def save_feedback(path: PathLike, layers: Mapping[str, Feedback]) -> None:
    """Write feedback to a safetensors file, whole or not at all.

    Parameters
    ----------
    path : str or path
        An existing file is replaced, and only once the new one is on disk.
    layers : mapping of str to Feedback
        Of each layer, by a name such as its number. Arrays are ``<name>.order``, int32
        ``[kv_heads, D]``, and ``<name>.factor``, float32 ``[kv_heads, D, D]``.

    Raises
    ------
    TypeError, ValueError
        For what is no Feedback, for none at all, and for names that are empty or not printable.
    OSError
        Where the file cannot be written; what was there before is untouched.

    Examples
    --------
    >>> import numpy as np, os, tempfile
    >>> feedback = Feedback.from_queries(np.eye(4)[None], kv_heads=1)
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = os.path.join(folder.name, "feedback.safetensors")
    >>> save_feedback(path, {"0": feedback})
    >>> load_feedback(path)
    {'0': Feedback(kv_heads=1, head_dim=4)}
    >>> folder.cleanup()
    """
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers must map names to Feedback, got {type(layers).__name__}")
    if not layers:
        raise ValueError("layers is empty; give at least one Feedback")
    for name, feedback in layers.items():
        require_name(name)
        if not isinstance(feedback, Feedback):
            got = type(feedback).__name__
            raise TypeError(f"layers[{name!r}] must be a Feedback, got {got}")
    arrays = {
        f"{name}.{part}": getattr(feedback, part)
        for name, feedback in layers.items()
        for part in ARRAYS
    }
    write_container(path, FEEDBACK_FORMAT, {"layers": sorted(layers)}, arrays)


def load_feedback(path: PathLike) -> dict[str, Feedback]:
    """Read a file of `save_feedback`, checking all of it before anything is returned.

    Parameters
    ----------
    path : str or path

    Returns
    -------
    dict of str to Feedback

    Raises
    ------
    StorageError
        For any other file: another format or version, damage anywhere, and arrays that are no
        feedback. It is a `ValueError`.
    OSError
        Where the file cannot be opened.

    Examples
    --------
    >>> load_feedback("no such file")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'no such file'
    """

    def names(content: dict[str, Any]) -> set[str]:
        layers = content.get("layers")
        if set(content) != {"layers"} or not isinstance(layers, list):
            raise ValueError(f"metadata {METADATA_KEY!r} lacks or adds fields")
        for name in layers:
            require_name(name)
        if not layers or layers != sorted(set(layers)):
            raise ValueError(f"layers is {layers!r:.80}, not a sorted list of names")
        return {f"{name}.{part}" for name in layers for part in ARRAYS}

    content, arrays = read_container(path, FEEDBACK_FORMAT, names)
    loaded = {}
    for name in content["layers"]:
        try:
            loaded[name] = Feedback(*(arrays[f"{name}.{part}"] for part in ARRAYS))
        except (TypeError, ValueError) as error:
            raise StorageError(f"{path}: {name!r}: {error}; {DAMAGED}") from error
    return loaded

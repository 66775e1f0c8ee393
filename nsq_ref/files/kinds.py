"""What a file is, told by its first bytes: for errors about a file of another kind."""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path

from nsq_ref.files.atomic import PathLike

NPZ = "a NumPy .npz file of plain arrays"
NPY = "a NumPy .npy file"
GGUF = "a GGUF model"
SAFETENSORS = "a safetensors file"
LFS = "a pointer of Git LFS"
# What to do with each, and the ending that its name must have for that.
REMEDIES = {
    "empty": ("copy it again or make it anew", ""),
    NPZ: ("`nsq quantize` takes it", ".npz"),
    NPY: ("`nsq quantize` takes it", ".npy"),
    GGUF: ("`nsq demo --gguf` takes it", ""),
    SAFETENSORS: ("`nsq info` tells what it holds", ".safetensors"),
    LFS: ("fetch the file itself, as with `git lfs pull`", ""),
}
BEGINNINGS = {
    b"GGUF": GGUF,
    b"\x93NUMPY": NPY,
    b"\x80\x02": "a pickle, perhaps an old PyTorch file",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": LFS,
    b"<!DOCTYPE html": "a web page",
    b"<html": "a web page",
}
OTHERWISE = ("choose another file, or convert it", "")


def mistaken(path: PathLike, expected: str) -> str | None:
    """Say what a file is if it is whole but of another kind than expected, and what takes it.

    None where its first bytes do not tell, or tell that it is of that kind.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = os.path.join(folder.name, "kv.npy")
    >>> np.save(path, np.ones(3))
    >>> mistaken(path, "a GGUF model")
    '...kv.npy is a NumPy .npy file, not a GGUF model; `nsq quantize` takes it'
    >>> mistaken(path, NPY)
    >>> folder.cleanup()
    """
    found = _kind(path)
    if found is None or found == expected:
        return None
    remedy, ending = REMEDIES.get(found, OTHERWISE)
    if not os.fspath(path).lower().endswith(ending):
        remedy += f", once its name ends in {ending}"
    return f"{path} is {found}, not {expected}; {remedy}"


def _kind(path: PathLike) -> str | None:
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "empty"
    for beginning, kind in BEGINNINGS.items():
        if start.startswith(beginning):
            return kind
    if start.startswith(b"PK"):
        return _kind_of_zip(path)
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 27:
        return SAFETENSORS
    return "an ONNX model" if Path(path).suffix.lower() == ".onnx" else None


def _kind_of_zip(path: PathLike) -> str | None:
    with contextlib.suppress(zipfile.BadZipFile, NotImplementedError, ValueError):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("data.pkl") for name in names):
            return "a PyTorch file"
        return NPZ if names and all(name.endswith(".npy") for name in names) else "a zip archive"
    return None

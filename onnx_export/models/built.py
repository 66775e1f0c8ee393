"""The ONNX files of a GGUF file: written whole or not at all, and kept in the user's folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from nsq_ref.files import atomic
from onnx_export.models.attention_forms import AttentionForm
from onnx_export.models.config import DecoderConfig, read_config
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.llama import (
    GRAPH_VERSION,
    PLAIN,
    WEIGHTS,
    DecoderGraph,
    Progress,
    Weights,
)
from onnx_export.models.sources import (
    can_write,
    default_cache_dir,
    file_sha256,
    temporary_cache_dir,
)
from onnx_export.models.stored import KEPT, keeps_any

__all__ = [
    "GRAPH_VERSION", "WEIGHTS", "DecoderConfig", "Progress", "build_onnx", "cached_onnx",
    "read_config",
]  # fmt: skip

_MODEL = "model.onnx"
_SUMS = "SHA256SUMS"

_READ: dict[tuple[int, ...], str] = {}  # checksums of shared weights, by file, size and time


def build_onnx(
    file: GGUFFile,
    directory: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    attention: AttentionForm = PLAIN,
    weights: Weights = "float32",
    beside: Mapping[str, bytes] | None = None,
) -> DecoderConfig:
    """Write ``model.onnx``, its external data ``weights.bin`` and ``SHA256SUMS``: all or none.

    Parameters
    ----------
    file : GGUFFile
        A model of the llama, qwen2, qwen3 or gemma3 architecture.
    directory : str or os.PathLike
        Created where it does not exist; existing files are replaced.
    progress : callable, optional
        Called as ``progress(what, done, total)`` after every tensor.
    attention : AttentionForm
        How attention is written down, and so what the cache is; plain float32 by default.
    weights : str
        ``"float32"``, or ``"stored"``: matrices of the types that `stored` knows, from Q4_0 to
        Q8_0 and Q4_K to Q6_K, stay in 4 and 8 bits, for ONNX Runtime's MatMulNBits, the embedding
        too; all else is float32.
    beside : mapping of str to bytes, optional
        Other files of the folder, such as the tokenizer's.

    Returns
    -------
    DecoderConfig
        The decoder's configuration.

    Raises
    ------
    ValueError
        If the model is unsupported, or a tensor is missing, superfluous or of the wrong shape; if
        `weights` is neither, or no matrix can be kept as it is stored.
    OSError
        If a file cannot be written; what was there before is untouched.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import gguf
    >>> path = Path(tempfile.mkdtemp()) / "empty.gguf"
    >>> writer = gguf.GGUFWriter(path, "llama")
    >>> writer.write_header_to_file()
    >>> writer.write_kv_data_to_file()
    >>> writer.close()
    >>> build_onnx(GGUFFile(path), path.parent)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: .../empty.gguf: tensor 'token_embd.weight' is missing; convert the model again
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights={weights!r} is unknown; use one of {list(get_args(Weights))}")
    return _build(file, Path(directory), progress, attention, weights, beside or {})


def _build(
    file: GGUFFile,
    directory: Path,
    progress: Progress | None,
    attention: AttentionForm,
    weights: Weights,
    beside: Mapping[str, bytes],
    others: Iterable[Path] = (),
) -> DecoderConfig:
    """Write the files as `build_onnx` says; weights that one of ``others`` holds are linked."""
    config = read_config(file)
    if weights == "stored":
        _require_stored(file)
    attention.layout(config)  # which may refuse the model

    def files() -> Iterator[tuple[Path, atomic.Content]]:
        graph = DecoderGraph(file, config, progress, attention, weights)

        def fill(path: Path) -> None:
            graph.fill(path)
            _share(path, graph.digest, others)

        yield directory / WEIGHTS, fill
        model = graph.decoder_model().SerializeToString()
        yield directory / _MODEL, model
        for name, content in beside.items():
            yield directory / name, content
        yield directory / _SUMS, _sums(hashlib.sha256(model).hexdigest(), graph.digest)

    atomic.write(files(), make_folders=True)
    return config


def cached_onnx(
    gguf_path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    attention: AttentionForm = PLAIN,
    weights: Weights = "float32",
) -> Path:
    """Return the ONNX decoder of a GGUF file, building it unless an intact one is in the cache.

    The folder's name holds the SHA-256 of the GGUF file, the version of the graph, and a checksum
    of the form: its cache, its functions and how weights are kept. So another model or a newer
    graph is never confused with it. It appears under that name only when complete, and its
    checksums are verified at every call. Forms whose weights are the same share them on disk, as
    hard links, where the file system has those. Where the user's folder cannot be written to, what
    is not there is built in a temporary folder, which is removed when the process ends.

    Parameters
    ----------
    gguf_path : str or os.PathLike
        A model of the llama, qwen2, qwen3 or gemma3 architecture.
    cache_dir : str or os.PathLike, optional
        Where to keep it; `default_cache_dir` when not given.
    progress : callable, optional
        Called as ``progress(what, done, total)`` while building.
    attention : AttentionForm
    weights : str
        As `build_onnx` takes them.

    Returns
    -------
    pathlib.Path
        ``model.onnx``, with its external data beside it.

    Raises
    ------
    ValueError
        If the GGUF file is damaged or its model is not supported.
    OSError
        If the GGUF file cannot be read or ``cache_dir`` cannot be written to.

    Examples
    --------
    >>> cached_onnx("missing.gguf")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'missing.gguf'
    """
    file = GGUFFile(gguf_path)
    config = read_config(file)  # refuses what cannot be built, before its checksum is taken
    name = f"{file_sha256(gguf_path)}-{GRAPH_VERSION}"
    own = name
    if (attention, weights) != (PLAIN, "float32"):
        own += f"-{_checksum(attention, config, weights)}"
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    folder = root / "onnx" / own
    if _is_intact(folder):
        return folder / _MODEL
    if cache_dir is None and not can_write(root):
        folder = temporary_cache_dir() / "onnx" / own
    if not _is_intact(folder):
        others = [one for one in sorted(folder.parent.glob(f"{name}*")) if one != folder]
        _build(file, folder, progress, attention, weights, {}, others)
    return folder / _MODEL


def _checksum(form: AttentionForm, config: DecoderConfig, weights: Weights) -> str:
    """Return what changes with anything of a form that `GRAPH_VERSION` does not tell."""
    said: list[Any] = [form.label(), sorted(form.layout(config).to_metadata().items()), weights]
    said += [one.SerializeToString(deterministic=True) for one in form.functions()]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def _share(path: Path, digest: str, others: Iterable[Path]) -> None:
    """Replace a file of weights by a link to the same bytes in another folder, if one has them."""
    link = path.with_name(f"{path.name}.link")
    for folder in others:
        with contextlib.suppress(OSError):  # not every file system has links
            if _weights_sha256(folder / WEIGHTS) == digest:
                try:
                    os.link(folder / WEIGHTS, link)
                    os.replace(link, path)
                finally:
                    link.unlink(missing_ok=True)
                return


def _weights_sha256(path: Path) -> str:
    """Return the checksum of weights; those that folders share are read once, until they change."""
    found = path.stat()
    if found.st_nlink == 1:
        return file_sha256(path)
    state = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    if state not in _READ:
        _READ[state] = file_sha256(path)
    return _READ[state]


def _require_stored(file: GGUFFile) -> None:
    """Refuse a file of which nothing would stay as it is stored."""
    if not keeps_any(file):
        raise ValueError(
            f"{file.path}: no matrix is stored as one of {KEPT}; build it with float32 weights"
        )


def _is_intact(folder: Path) -> bool:
    """Whether the files of the folder have the checksums that ``SHA256SUMS`` states."""
    try:
        return (folder / _SUMS).read_bytes() == _sums(
            file_sha256(folder / _MODEL), _weights_sha256(folder / WEIGHTS)
        )
    except OSError:
        return False


def _sums(model: str, weights: str) -> bytes:
    """Return the checksums in the format of ``sha256sum``."""
    return f"{model}  {_MODEL}\n{weights}  {WEIGHTS}\n".encode("ascii")

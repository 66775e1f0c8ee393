"""The one interface of a model that protocols know, and what gives it to the models that run here.

A model reads tokens after a cache of float32 keys and values that it is given, and returns the
cache of all: what was changed in between is what it reads.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nsq_ref.dtypes import DTYPES
from nsq_ref.extras import extra
from onnx_export.evaluation.exported import exported_layout, side_of
from onnx_export.evaluation.methods import KeyValueCache
from onnx_export.models.built import Progress
from onnx_export.models.decoder import Decoder
from onnx_export.models.json_tokenizer import context_length
from onnx_export.models.sources import file_sha256
from onnx_export.running import Model, Session

with extra("onnx", __name__):
    import onnx

__all__ = ["CausalModel", "DecoderModel", "OnnxModel", "Opened", "Reader", "as_model", "open_model"]

PathLike = str | os.PathLike[str]
Logits = NDArray[np.float32]
SUMS = "SHA256SUMS"


class Reader(Protocol):
    """What reads tokens, its cache in the hands of whoever calls it."""

    def forward(
        self,
        input_ids: NDArray[np.int64],
        past: KeyValueCache | None = None,
        *,
        num_logits: int | None = None,
    ) -> tuple[Logits, NDArray[np.float32], NDArray[np.float32]]:
        """Read new tokens ``[1, sequence]`` after those whose keys and values are in ``past``.

        Returns logits float32 ``[1, sequence, vocab_size]``, or of the last ``num_logits`` tokens
        (which may be none), and keys and values of all tokens, each float32
        ``[layers, 1, kv_heads, past + sequence, head_dim]``.
        """


class CausalModel(Reader, Protocol):
    """A decoder for one sequence, whose results can be kept.

    One thread at a time uses one.

    Attributes
    ----------
    name : str
    fingerprint : str
        What changes with any weight: results are kept by it.
    vocab_size, context_length : int or None
        Where they are known.
    """

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def fingerprint(self) -> str:
        """What changes with any weight."""

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the vocabulary."""

    @property
    def context_length(self) -> int | None:
        """Tokens that it was made for."""


class Opened(NamedTuple):
    """How a model is opened again, in another process.

    Nothing changes one, so that threads may share it.
    """

    path: str
    threads: int | None = None
    cache_dir: str | None = None

    def open(self, progress: Progress | None = None) -> CausalModel:
        """Open it."""
        return open_model(
            self.path, threads=self.threads, cache_dir=self.cache_dir, progress=progress
        )


class DecoderModel:
    """A `Decoder`.

    Parameters
    ----------
    decoder : Decoder
    name : str, optional
        What it is called; the name of its folder by default.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> folder = tempfile.mkdtemp()
    >>> model = open_model(tiny_gguf(folder), cache_dir=folder)
    >>> model.name, model.vocab_size, model.context_length
    ('tiny.gguf', 260, 512)
    """

    def __init__(self, decoder: Decoder, name: str | None = None) -> None:
        self.decoder = decoder
        self.name = name or decoder.model.path.parent.name
        self.vocab_size: int | None = decoder.config.vocab_size
        self.context_length: int | None = decoder.config.context_length
        self.fingerprint = _fingerprint(decoder.model.path)

    def forward(
        self,
        input_ids: NDArray[np.int64],
        past: KeyValueCache | None = None,
        *,
        num_logits: int | None = None,
    ) -> tuple[Logits, NDArray[np.float32], NDArray[np.float32]]:
        """Read tokens, as `CausalModel` says."""
        return self.decoder.forward(input_ids, past, num_logits=num_logits)


class OnnxModel:
    """An exported decoder whose cache are tensors that grow, in float32 or float16.

    A float16 cache is given out as float32, and what is given back is rounded to float16.

    Parameters
    ----------
    model : Model
    name : str, optional

    Raises
    ------
    ValueError
        If its cache is quantized already, has no axis of tokens, or differs from layer to layer.

    Examples
    --------
    >>> from onnx_export.models.tiny import tiny_onnx
    >>> model = OnnxModel(Model(tiny_onnx()))
    >>> logits, keys, values = model.forward(np.array([[3, 1, 4]]))
    >>> logits.shape, keys.shape
    ((1, 3, 260), (2, 1, 2, 3, 8))
    >>> again, _, _ = model.forward(np.array([[1, 5]]), (keys, values))
    >>> again.shape
    (1, 2, 260)
    """

    def __init__(self, model: Model, name: str | None = None) -> None:
        layout, self.model = model.layout, model
        self.name = name or model.path.name
        path = model.path
        if any(pair is not None for pair in layout.schemes):
            raise ValueError(
                f"{path} has a quantized cache; give the model that it was rewritten from"
            )
        if not layout.tensors or not all(one.grows for one in layout.tensors):
            raise ValueError(f"{path} has no cache of float keys and values that grows")
        sides = [[one for one in layout.tensors if side_of(one.past) == side] for side in (0, 1)]
        if not sides[0] or len(sides[0]) != len(sides[1]):
            raise ValueError(
                f"{path}: of its cache {len(sides[0])} tensors are keys and {len(sides[1])} values "
                "by their names; name them as exporters do, past_key_values.0.key"
            )
        for side in sides:
            if kinds := {(one.shape, one.dtype) for one in side if one[2:4] != side[0][2:4]}:
                raise ValueError(
                    f"{path}: layers of its cache differ, {side[0].shape} and {kinds.pop()[0]}; "
                    "only layers that are alike are evaluated"
                )
        self._sides = tuple(tuple(one.past for one in side) for side in sides)
        self._dtypes = tuple(DTYPES[side[0].dtype] for side in sides)
        # [batch, heads, tokens, channels], whatever the order of its axes is.
        self._axes = tuple(_axes(side[0].shape, path) for side in sides)
        self.vocab_size = model.vocab_size
        self.context_length = layout.context_length or context_length(path.parent)
        self.fingerprint = _fingerprint(path)

    def forward(
        self,
        input_ids: NDArray[np.int64],
        past: KeyValueCache | None = None,
        *,
        num_logits: int | None = None,
    ) -> tuple[Logits, NDArray[np.float32], NDArray[np.float32]]:
        """Read tokens, as `CausalModel` says."""
        tokens = input_ids.shape[1] + (0 if past is None else past[0].shape[3])
        session = Session(self.model, capacity=self.context_length or tokens)
        if past is not None and past[0].shape[3]:
            tensors: dict[str, NDArray[Any]] = {}
            for names, dtype, axes, array in zip(
                self._sides, self._dtypes, self._axes, past, strict=True
            ):
                for name, layer in zip(names, array, strict=True):
                    tensors[name] = layer.transpose(np.argsort(axes)).astype(dtype, copy=False)
            session.resume(tensors)
        logits = session.forward(input_ids, num_logits=num_logits)
        cached = session.tensors()
        keys, values = (
            np.stack([cached[name].transpose(axes) for name in names]).astype(np.float32)
            for names, axes in zip(self._sides, self._axes, strict=True)
        )
        if keys.shape[3] != tokens:
            raise ValueError(
                f"{self.name} keeps {keys.shape[3]} of {tokens} tokens; only caches that keep all "
                "are evaluated"
            )
        return logits.astype(np.float32, copy=False), keys, values


def open_model(
    path: PathLike,
    *,
    threads: int | None = None,
    cache_dir: PathLike | None = None,
    progress: Progress | None = None,
) -> CausalModel:
    """Open a model by its file: GGUF, ONNX, or the folder of one, or of a model of transformers.

    Parameters
    ----------
    path : str or os.PathLike
    threads : int, optional
        All cores when not given.
    cache_dir : str or os.PathLike, optional
        Where what is built of a GGUF file is kept.
    progress : callable, optional
        Called as ``progress(what, done, total)`` while that is built.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If it is no decoder that runs here with a cache of float keys and values.

    Examples
    --------
    >>> open_model("missing.gguf")
    Traceback (most recent call last):
    FileNotFoundError: there is no model 'missing.gguf'
    """
    found = Path(path)
    if not found.exists():
        raise FileNotFoundError(f"there is no model {str(path)!r}")
    if found.is_dir():
        if (found / "model.onnx").is_file():
            found = found / "model.onnx"
        elif (found / "config.json").is_file():
            from onnx_export.evaluation.transformers_models import TransformersModel  # noqa: PLC0415

            return TransformersModel(found, threads=threads)
        else:
            raise ValueError(f"{found} holds neither model.onnx nor config.json")
    with found.open("rb") as file:
        if file.read(4) == b"GGUF":
            decoder = Decoder.from_gguf(
                found, cache_dir=cache_dir, threads=threads, progress=progress
            )
            return DecoderModel(decoder, found.name)
    name = found.parent.name if found.name == "model.onnx" else found.name
    return OnnxModel(Model(found, threads=threads, layout=exported_layout(found)), name)


def as_model(model: CausalModel | Decoder | Opened | PathLike) -> CausalModel:
    """Return a model, whatever stands for one.

    Examples
    --------
    >>> from onnx_export.models.tiny import tiny_onnx
    >>> as_model(Decoder(tiny_onnx())).vocab_size
    260
    """
    if isinstance(model, Decoder):
        return DecoderModel(model)
    if isinstance(model, Opened):
        return model.open()
    if isinstance(model, str | os.PathLike):
        return open_model(model)
    return model


def _axes(shape: tuple[int | str, ...], path: Path) -> tuple[int, ...]:
    """Return the axes of a tensor in the order batch, heads, tokens, channels."""
    if len(shape) != 4 or shape[0] != "batch" or shape.index("past") not in (1, 2):
        raise ValueError(f"{path}: a cache of shape {shape} is not known; export another form")
    return (0, 1, 2, 3) if shape[2] == "past" else (0, 2, 1, 3)


def _fingerprint(path: Path) -> str:
    """Return the SHA-256 of a model and all its weights."""
    if (sums := path.with_name(SUMS)).is_file():  # which whoever built it has verified
        return hashlib.sha256(sums.read_bytes()).hexdigest()
    digest = hashlib.sha256(file_sha256(path).encode())
    graph = onnx.load(str(path), load_external_data=False).graph
    names = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for name in sorted(names):
        digest.update(f"{name} {file_sha256(path.parent / name)}".encode())
    return digest.hexdigest()

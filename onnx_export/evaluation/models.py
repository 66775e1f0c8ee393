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
from nsq_ref.files import kinds
from onnx_export.evaluation.exported import cache_layers, exported_layout, heads_first
from onnx_export.evaluation.methods import KeyValueCache
from onnx_export.models.built import Progress
from onnx_export.models.decoder import Decoder
from onnx_export.models.json_tokenizer import GGUF, context_length
from onnx_export.models.sources import file_sha256
from onnx_export.running import Model, Session

with extra("onnx", __name__):
    import onnx

__all__ = [
    "CausalModel", "DecoderModel", "OnnxModel", "Opened", "Reader", "as_model", "model_file",
    "open_model", "require_vocabulary",
]  # fmt: skip

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
    layer_numbers : sequence of int, optional
        By which a policy names the layers; counted from 0 where a model does not have it.
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
        layers = cache_layers(layout, path)
        self.layer_numbers = tuple(one.number for one in layers)
        sides = [[one.key for one in layers], [one.value for one in layers]]
        for side in sides:
            if kinds := {(one.shape, one.dtype) for one in side if one[2:4] != side[0][2:4]}:
                raise ValueError(
                    f"{path}: layers of its cache differ, {side[0].shape} and {kinds.pop()[0]}; "
                    "only layers that are alike are evaluated"
                )
        self._sides = tuple(tuple(one.past for one in side) for side in sides)
        self._dtypes = tuple(DTYPES[side[0].dtype] for side in sides)
        # [batch, heads, tokens, channels], whatever the order of its axes is.
        self._axes = tuple(heads_first(side[0], path) for side in sides)
        self._one_by_one = False
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
        """Read tokens, as `CausalModel` says; one by one where several after a past are refused."""
        if past is None or not past[0].shape[3] or input_ids.shape[1] == 1:
            return self._read(input_ids, past, num_logits)
        if not self._one_by_one:
            try:
                return self._read(input_ids, past, num_logits)
            except ValueError:  # as models refuse whose masks are of a prompt or of one token
                self._one_by_one = True
        logits = []
        for token in range(input_ids.shape[1]):
            one, *rest = self._read(input_ids[:, token : token + 1], past, 1)
            past = rest[0], rest[1]
            logits.append(one)
        wanted = len(logits) if num_logits is None else num_logits
        return np.concatenate(logits, axis=1)[:, len(logits) - wanted :], *past

    def _read(
        self, input_ids: NDArray[np.int64], past: KeyValueCache | None, num_logits: int | None
    ) -> tuple[Logits, NDArray[np.float32], NDArray[np.float32]]:
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
    found = model_file(path)
    if found.is_dir():
        from onnx_export.evaluation.transformers_models import TransformersModel  # noqa: PLC0415

        return TransformersModel(found, threads=threads)
    with found.open("rb") as file:
        if file.read(len(GGUF)) == GGUF:
            decoder = Decoder.from_gguf(
                found, cache_dir=cache_dir, threads=threads, progress=progress
            )
            return DecoderModel(decoder, found.name)
    name = found.parent.name if found.name == "model.onnx" else found.name
    return OnnxModel(Model(found, threads=threads, layout=exported_layout(found)), name)


def model_file(path: PathLike) -> Path:
    """Return the file of a model, or the folder of one of transformers.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If it is the folder of no model.

    Examples
    --------
    >>> model_file(".")
    Traceback (most recent call last):
    ValueError: . holds neither model.onnx nor config.json
    """
    found = Path(path)
    if not found.exists():
        raise FileNotFoundError(f"there is no model {str(path)!r}")
    if not found.is_dir():
        with found.open("rb") as file:
            gguf = file.read(len(GGUF)) == GGUF
        if not gguf and (mistaken := kinds.mistaken(found, "an ONNX model")):
            raise ValueError(mistaken)
        return found
    if (found / "model.onnx").is_file():
        return found / "model.onnx"
    if not (found / "config.json").is_file():
        raise ValueError(f"{found} holds neither model.onnx nor config.json")
    return found


def require_vocabulary(
    name: str, row: NDArray[np.int64], vocab_size: int | None, model: str
) -> None:
    """Refuse tokens that a model does not know, naming the first of an array so called.

    Examples
    --------
    >>> require_vocabulary("text", np.array([1, 5]), 4, "tiny")
    Traceback (most recent call last):
    ValueError: text[1] is 5, outside the vocabulary of 4 tokens of tiny; use this model's own ...
    """
    outside = (row < 0) | (row >= vocab_size) if vocab_size is not None else row < 0
    if outside.any():
        place = int(outside.argmax())
        raise ValueError(
            f"{name}[{place}] is {row[place]}, outside the vocabulary of {vocab_size} tokens of "
            f"{model}; use this model's own tokenizer"
        )


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

"""A model in ONNX Runtime, and what its metadata says of its inputs, outputs and cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nsq_ref.arrays import as_integer
from nsq_ref.dtypes import DTYPES
from nsq_ref.extras import extra
from nsq_ref.files import kinds
from onnx_export import custom_ops
from onnx_export.operators.cache_layout import CacheLayout
from onnx_export.operators.schema import BUFFER_ATTENTION

with extra("onnx", __name__):
    import onnx
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

__all__ = ["FAULTS", "Model", "said"]

FAULTS: tuple[type[Exception], ...] = (
    runtime.EPFail, runtime.Fail, runtime.InvalidArgument, runtime.InvalidGraph,
    runtime.InvalidProtobuf, runtime.NoModel, runtime.NoSuchFile, runtime.NotImplemented,
    runtime.RuntimeException, RuntimeError,  # the last from a run of what is bound
)  # fmt: skip
"""What ONNX Runtime raises; they have no class of their own in common."""

# A finger print reads so much of every so many bytes of weights: other weights differ all over.
SAMPLE, STEP = 1 << 12, 1 << 20


class Model:
    """A model in ONNX Runtime; it keeps nothing of a run, so that threads and sessions share one.

    Parameters
    ----------
    path : str or os.PathLike
        An ONNX model with the metadata ``nsq.cache``.
    threads : int, optional
        All cores when not given.
    library : bool
        Run nodes of ``nsq`` in the native library; False takes the functions in the model, which
        are slow. Models without such nodes need none.
    layout : CacheLayout, optional
        What the metadata would say, of a model without.

    Attributes
    ----------
    path : pathlib.Path
    layout : CacheLayout

    Raises
    ------
    FileNotFoundError
        If there is no such file, or no native library.
    ValueError
        If the file is no model, has no such metadata, or is not as that says.

    Examples
    --------
    >>> Model("missing.onnx")
    Traceback (most recent call last):
    FileNotFoundError: there is no ONNX model 'missing.onnx'
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        library: bool = True,
        layout: CacheLayout | None = None,
    ) -> None:
        threads = 0 if threads is None else as_integer("threads", threads, least=1)
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no ONNX model {str(path)!r}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0 lets the runtime use every core
        # Errors are raised, and the runtime warns of every optional input.
        options.log_severity_level = 4
        missing = None
        if library:
            try:
                custom_ops.register(options)
            except FileNotFoundError as error:  # which is no fault where nothing needs it
                missing = error
        try:
            self.session = onnxruntime.InferenceSession(
                self.path, options, providers=["CPUExecutionProvider"]
            )
        except FAULTS as error:
            if not library and BUFFER_ATTENTION.name in str(error):
                raise ValueError(
                    f"{self.path} has its cache in buffers, which only the native library runs; "
                    "take it, or rewrite the original with cache='tensors'"
                ) from error
            fault = kinds.mistaken(self.path, "an ONNX model") or f"{self.path}: {said(error)}"
            raise ValueError(fault) from error
        try:
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.layout = layout or CacheLayout.from_metadata(metadata)
            self._require_layout()
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        quantized = any(pair is not None for pair in self.layout.schemes)
        if quantized and missing is not None:
            raise missing
        # Function bodies may read a past after they wrote its present.
        self.in_place = library or not quantized

    @cached_property
    def padding(self) -> Literal["left", "right"] | None:
        """Where rows that are shorter than others have padding; None if they cannot be shorter."""
        roles = self.layout.roles
        grows = any(tensor.grows for tensor in self.layout.tensors)
        counted = self._counts_rows or self.layout.right_padding
        if counted and not grows:
            return "right"
        if "attention_mask" in roles and "past_lengths" not in roles:
            return "left"
        return None

    @property
    def skips_rows(self) -> bool:
        """Whether a row may take part in a step without a token of its own."""
        if self.padding == "right":
            return self._counts_rows
        return self.padding == "left" and "position_ids" in self.layout.roles

    @property
    def _counts_rows(self) -> bool:
        """Whether the model is told how many of the new tokens each row has."""
        roles = self.layout.roles
        return "new_lengths" in roles or {"past_lengths", "total_lengths"} <= set(roles)

    @cached_property
    def vocab_size(self) -> int | None:
        """Number of tokens, where the shape of the logits says so."""
        shape = self._outputs()[self.layout.roles["logits"]].shape
        return shape[-1] if isinstance(shape[-1], int) else None

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the dtype of an input."""
        return self._dtypes[name]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model's file, and of 4 KiB of every MiB of its external weights."""
        digest = hashlib.sha256(self.path.read_bytes())
        for name in sorted(set(self._external_files())):
            with (self.path.parent / name).open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                digest.update(f"{name} {size}".encode())
                for start in range(0, size, STEP):
                    stream.seek(start)
                    digest.update(stream.read(SAMPLE))
        return digest.hexdigest()

    def _external_files(self) -> Iterator[str]:
        model = onnx.load(str(self.path), load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    yield entry.value

    @cached_property
    def _dtypes(self) -> dict[str, np.dtype[Any]]:
        return {node.name: _dtype(node.type) for node in self._inputs()}

    def _inputs(self) -> list[Any]:
        return [*self.session.get_inputs(), *self.session.get_overridable_initializers()]

    def _outputs(self) -> dict[str, Any]:
        return {node.name: node for node in self.session.get_outputs()}

    def _require_layout(self) -> None:
        """Refuse a model that is not as its metadata says, or of which that does not say enough."""
        layout, inputs = self.layout, {node.name: node for node in self._inputs()}
        outputs = self._outputs()
        given = {role: name for role, name in layout.roles.items() if role not in OUTPUT_ROLES}
        for role in ("input_ids", "logits"):
            if role not in layout.roles:
                raise ValueError(f"the metadata names no {role}; write the model again")
        for role, name in layout.roles.items():
            if name not in (inputs if role in given else outputs):
                raise ValueError(f"there is no {name!r}, which the metadata has as {role}")
            if role in given and _dtype(inputs[name].type).kind != "i":
                raise ValueError(f"input {name!r} is {inputs[name].type}; {role} are integers")
        for tensor in layout.tensors:
            for name, nodes in ((tensor.past, inputs), (tensor.present, outputs)):
                if name not in nodes:
                    raise ValueError(f"there is no {name!r}, which the metadata has in the cache")
                if (found := _dtype(nodes[name].type)) != DTYPES[tensor.dtype]:
                    raise ValueError(f"{name!r} is {found}; the metadata has {tensor.dtype}")
        known = {*given.values(), *(tensor.past for tensor in layout.tensors)}
        for node in self.session.get_inputs():
            if node.name not in known:
                raise ValueError(f"the metadata does not say what input {node.name!r} is for")


OUTPUT_ROLES = ("logits", "present_lengths")

_NAMES = {"float": "float32", "double": "float64"}


def _dtype(kind: str) -> np.dtype[Any]:
    """Return the dtype of what ONNX Runtime calls ``tensor(float)``."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    name = _NAMES.get(name, name)
    return DTYPES[name] if name in DTYPES else np.dtype(name)


def said(error: Exception) -> str:
    """Return what ONNX Runtime says, in one line."""
    return " ".join(str(error).split())

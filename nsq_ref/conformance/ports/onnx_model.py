"""ONNX models, run by ONNX Runtime."""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nsq_ref.codec import PARTS
from nsq_ref.conformance.operations import (
    DONE,
    DTYPES,
    NOT_IMPLEMENTED,
    REFUSED,
    Answer,
    Case,
    Failure,
    Operation,
    Port,
    TargetError,
)
from nsq_ref.conformance.ports.frames import MOST_AXES
from nsq_ref.dtypes import Array

_ONNX_DTYPES = {
    "tensor(float)": DTYPES[0],
    "tensor(float16)": DTYPES[1],
    "tensor(bfloat16)": DTYPES[2],
    "tensor(uint8)": DTYPES[3],
    "tensor(int32)": DTYPES[4],
}
_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16
# What the inputs and the outputs of a model can be, as `operations.Case` has them.
_ONNX_NAMES: dict[Operation, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "encode": (("x",), PARTS),
    "decode": ((*PARTS, "shape"), ("x_hat",)),
    "attend": (
        (
            "query", *(f"{side}.{name}" for side in ("keys", "values") for name in PARTS),
            "keys.shape", "values.shape", "value_scheme", "scale", "causal", "softcap",
            "sliding_window",
        ),
        ("output",),
    ),
    "stream": (("x", "steps", "row"), (*PARTS, "tail")),
    "feedback": (("x", "order", "factor"), PARTS),
    "stream_feedback": (("x", "steps", "row", "order", "factor"), (*PARTS, "tail")),
}  # fmt: skip


class Model(Port):
    """An ONNX model whose inputs and outputs have the names of a case's arrays.

    A model is made for one scheme and, mostly, one dtype: cases of others it does not implement.
    TargetError where it cannot be loaded, even with the operators of the library ``custom_ops``, or
    an input or output has a name that no array of a case has.

    Examples
    --------
    >>> Model("none.onnx", "encode", None)
    Traceback (most recent call last):
    nsq_ref.conformance.operations.TargetError: ...
    """

    def __init__(self, path: str, operation: Operation, custom_ops: str | None) -> None:
        self.name = path
        try:
            ort = importlib.import_module("onnxruntime")
            state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
        except ImportError as error:
            raise TargetError(
                f"{path} needs onnxruntime; run pip install 'nsq-ref[onnx]'"
            ) from error
        self._ort = ort
        self._refusals = state.InvalidArgument, state.Fail
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        try:
            if custom_ops is not None:
                options.register_custom_ops_library(str(Path(custom_ops).resolve()))
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except (
            *self._refusals, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile,
            state.NotImplemented, state.RuntimeException,
        ) as error:  # fmt: skip
            raise TargetError(f"{path} cannot be loaded: {error}") from error
        inputs, outputs = _ONNX_NAMES[operation]
        for kind, declared, known in (
            ("input", self._session.get_inputs(), inputs),
            ("output", self._session.get_outputs(), outputs),
        ):
            if unknown := [one.name for one in declared if one.name not in known]:
                raise TargetError(
                    f"{path} has the {kind} {unknown[0]!r}; rename or remove it, as the {kind}s of "
                    f"{operation} are {', '.join(known)}"
                )

    def ask(self, number: int, case: Case) -> Answer | Failure:
        """Run the model on the arrays of the case."""
        feeds = {}
        for declared in self._session.get_inputs():
            array = case.inputs.get(declared.name)
            reason = _unfit(declared, array)
            if reason or array is None:
                return Answer(NOT_IMPLEMENTED, {}, reason)
            feeds[declared.name] = self._value(array)
        stored = case.inputs.keys() & {*PARTS, "order", "factor"}
        if absent := sorted(stored - feeds.keys()):
            return Answer(NOT_IMPLEMENTED, {}, f"the model has no input {', '.join(absent)}")
        names = [declared.name for declared in self._session.get_outputs()]
        try:
            values = self._session.run_with_ort_values(names, feeds)
        except self._refusals as error:
            return Answer(REFUSED, {}, str(error))
        arrays = {}
        for name, value in zip(names, values, strict=True):
            dtype = _ONNX_DTYPES.get(value.data_type())
            if dtype is None:
                return Failure("garbage", f"{name} is {value.data_type()}, which no part is")
            shape = value.shape()
            if len(shape) > MOST_AXES:
                return Failure("garbage", f"{name} is {dtype} {shape}; no part has so many axes")
            memory = ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize)
            arrays[name] = np.frombuffer(memory, dtype).reshape(shape)
        return Answer(DONE, arrays)

    def _value(self, array: Array) -> Any:
        # NumPy knows no bfloat16: ONNX Runtime is told.
        if array.dtype == DTYPES[2]:
            bits = np.ascontiguousarray(array).view(np.uint16)
            return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_BFLOAT16)
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _unfit(declared: Any, array: Array | None) -> str:
    """Say why a case is not for the model, as one of its inputs shows."""
    if array is None:
        return f"the model takes {declared.name}, which the case does not have"
    dtype = _ONNX_DTYPES.get(declared.type)
    if dtype != array.dtype:
        return f"the model takes {declared.name} as {dtype or declared.type}"
    shape: Iterable[Any] = declared.shape
    sizes = list(shape)
    # Of a tensor of any rank ONNX Runtime tells no axes; none of ours is a scalar.
    if sizes and (
        len(sizes) != array.ndim
        or any(
            isinstance(size, int) and size != given
            for size, given in zip(sizes, array.shape, strict=True)
        )
    ):
        return f"the model takes {declared.name} of shape {sizes}"
    return ""

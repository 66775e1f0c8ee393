"""What runs an ONNX model: the runtimes that must all give the same bytes."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

__all__ = ["RUNNERS", "Run", "model_of", "without_optimization"]

Array = npt.NDArray[Any]
Run = Callable[[Mapping[str, Array]], dict[str, Array]]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": BFLOAT16,
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
}


def as_optimized(model: onnx.ModelProto) -> Run:
    return session(model, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)


def without_optimization(model: onnx.ModelProto) -> Run:
    return session(model, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)


def evaluator(model: onnx.ModelProto) -> Run:
    evaluated = ReferenceEvaluator(model)

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with np.errstate(all="ignore"):
            results = evaluated.run(None, dict(feeds))
        return dict(zip(evaluated.output_names, results, strict=True))

    return run


RUNNERS: dict[str, Callable[[onnx.ModelProto], Run]] = {
    "onnxruntime": as_optimized,
    "onnxruntime without optimization": without_optimization,
    "onnx.reference": evaluator,
}


def session(model: onnx.ModelProto, level: onnxruntime.GraphOptimizationLevel) -> Run:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    loaded = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [one.name for one in loaded.get_outputs()]

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        values = {name: value_of(array) for name, array in feeds.items()}
        results = loaded.run_with_ort_values(names, values)
        return {name: array_of(value) for name, value in zip(names, results, strict=True)}

    return run


def value_of(array: Array) -> onnxruntime.OrtValue:
    # NumPy knows no bfloat16: ONNX Runtime is told.
    whole = np.ascontiguousarray(array)
    if whole.dtype == BFLOAT16:
        bits = whole.view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(whole)


def array_of(value: onnxruntime.OrtValue) -> Array:
    dtype, shape = DTYPES[value.data_type()], value.shape()
    memory = ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize)
    return np.frombuffer(memory, dtype).reshape(shape)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, int],
    outputs: Mapping[str, int],
    functions: list[onnx.FunctionProto] | None = None,
    opset: int = 21,
) -> onnx.ModelProto:
    """Return a model whose inputs and outputs have these dtypes, and any rank."""
    given, made = (
        [helper.make_tensor_value_info(name, dtype, None) for name, dtype in ends.items()]
        for ends in (inputs, outputs)
    )
    return helper.make_model(
        helper.make_graph(nodes, "graph", given, made),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("nsq", 1)],
        functions=functions or [],
        ir_version=10,
    )

"""The process in which code under test runs: ``python -m nsq_ref.conformance.worker SPEC``.

SPEC is a JSON object that names what does each operation, as `ports.open_port` takes it. Whatever
goes wrong here, the process at the other end of the pipes, `ports.Process`, lives on.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nsq_ref.codec import PARTS
from nsq_ref.conformance.frames import (
    DTYPES,
    MOST_AXES,
    Frame,
    read_frame,
    scheme_array,
    scheme_of,
    write_frame,
)
from nsq_ref.conformance.operations import (
    DONE,
    FAILED,
    NOT_IMPLEMENTED,
    OPERATIONS,
    REFUSED,
    Answer,
    Case,
    Failure,
    Operation,
    Port,
)
from nsq_ref.conformance.ports import Callables, reply_of, target_kind
from nsq_ref.scheme import Field, Scheme

__all__ = ["Library", "Model", "TargetError", "case_of", "main", "serve", "stream_layout"]

Array = npt.NDArray[Any]

ALIGNMENT = 64
GUARD_BYTES = 256  # on each side of a buffer
GUARD = 0xFF  # floats of it are NaN, so that reading beyond a buffer shows in what is computed
UNWRITTEN = 0xA5

_HOW = np.dtype([
    *((name, np.int64) for name in (
        "heads", "query_tokens", "kv_heads", "tokens", "head_dim", "value_head_dim",
    )),
    ("scale", np.float32), ("causal", np.int32),
    ("softcap", np.float32), ("sliding_window", np.int32),
])  # fmt: skip


class TargetError(ValueError):
    """What is to be checked cannot be loaded."""


def main(arguments: list[str] | None = None) -> int:
    """Answer the requests on standard input until it ends; return the exit code."""
    (text,) = sys.argv[1:] if arguments is None else arguments
    # What the code under test prints, or reads, must not get among the frames.
    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(1), "wb") as answers:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(2, 1)
        try:
            ports = _load(json.loads(text))
        except TargetError as error:
            read_frame(requests)
            status = np.array([FAILED], np.int32)
            message = np.frombuffer(str(error).encode("utf-8", "backslashreplace"), np.uint8)
            write_frame(answers, {"status": status, "message": message})
            return 1
        serve(ports, requests, answers)
    return 0


def serve(ports: Mapping[str, Port], requests: BinaryIO, answers: BinaryIO) -> None:
    """Copy the first frame, then answer every request by the port of its operation.

    Examples
    --------
    >>> import io
    >>> from nsq_ref.conformance import ports
    >>> requests, answers = io.BytesIO(), io.BytesIO()
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> ports.write_requests(requests, ports.hello_frame(), [case])
    >>> _ = requests.seek(0)
    >>> serve({}, requests, answers)
    >>> _ = answers.seek(0)
    >>> [list(read_frame(answers)) for _ in range(2)]
    [['hello'], ['case', 'status', 'message']]
    """
    header = read_frame(requests)
    if header is None:
        return
    write_frame(answers, header)
    while (frame := read_frame(requests)) is not None:
        number, case = case_of(frame)
        port = ports.get(case.operation)
        if port is None:
            absent = f"nothing was given for {case.operation}"
            result: Answer | Failure = Answer(NOT_IMPLEMENTED, {}, absent)
        else:
            result = port.ask(number, case)
        write_frame(answers, reply_of(number, result))


def case_of(frame: Frame) -> tuple[int, Case]:
    """Return the number and the case that a request asks; the inverse of `request_of`.

    Examples
    --------
    >>> from nsq_ref.conformance.operations import request_of
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> case_of(request_of(7, case))
    (7, Case(encode 7))
    """
    inputs = dict(frame)
    number = int(inputs.pop("case")[0])
    operation = OPERATIONS[int(inputs.pop("operation")[0])]
    return number, Case(str(number), operation, scheme_of(inputs.pop("scheme")), (), inputs)


def stream_layout(
    scheme: Scheme, steps: Array, row: int, head_dim: int, dtype: np.dtype[Any]
) -> dict[str, Field]:
    """Return what is stored for a row at the end of a stream (rules K1, B1, C1).

    Parameters
    ----------
    scheme : Scheme
        With a block size.
    steps : int array, shape [steps, 1 + rows]
        0 for append or 1 for crop, and a number for each row.
    row : int
    head_dim : int
    dtype : numpy dtype
        Of the input.

    Returns
    -------
    dict of str to Field
        The parts of the sealed blocks, the sinks where the scheme has them, and the tail.

    Examples
    --------
    >>> layout = stream_layout(
    ...     Scheme(block_size=4, sink_tokens=1), np.int32([[0, 8], [1, 7], [0, 3]]), 0, 64,
    ...     np.dtype(np.float16),
    ... )
    >>> [(name, layout[name].shape) for name in ("packed", "sinks", "tail")]
    [('packed', (8, 32)), ('sinks', (1, 64)), ('tail', (1, 64))]
    """
    length = 0
    for kind, *numbers in steps.tolist():
        length = min(length, numbers[row]) if kind else length + numbers[row]
    sinks = min(length, scheme.sink_tokens)
    size = scheme.block_size or 1
    sealed = (length - sinks) // size * size
    layout = replace(scheme, sink_tokens=0).layout(sealed, head_dim)
    if scheme.sink_tokens:
        layout["sinks"] = Field((sinks, head_dim), dtype)
    return {**layout, "tail": Field((length - sinks - sealed, head_dim), dtype)}


# --- targets ------------------------------------------------------------------------------------


def _load(spec: Mapping[str, str | None]) -> dict[str, Port]:
    """Return the port of each operation."""
    custom_ops = spec.get("custom_ops")
    ports: dict[str, Port] = {}
    for operation in OPERATIONS:
        target = spec.get(operation)
        if target is None:
            continue
        kind = target_kind(target)
        if kind == "library":
            ports[operation] = Library(target)
        elif kind == "model":
            ports[operation] = Model(target, operation, custom_ops)
        else:
            ports[operation] = Callables(target, **{operation: _function(target)})
    if isinstance(library := ports.get("encode"), Library):
        ports = dict.fromkeys(OPERATIONS, library) | ports
    return ports


def _function(target: str) -> Callable[..., Any]:
    """Return the function that ``package.module:function`` or ``file.py:function`` names."""
    origin, _, name = target.rpartition(":")
    try:
        if origin.endswith(".py"):
            found: Any = _module(Path(origin).resolve())
        else:
            sys.path.insert(0, os.getcwd())
            found = importlib.import_module(origin)
    except (ImportError, SyntaxError) as error:
        raise TargetError(
            f"{origin} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise TargetError(f"{origin} has no {name}; {target} should name a function in it")
        found = getattr(found, part)
    if not callable(found):
        raise TargetError(f"{target} is {type(found).__name__}, which cannot be called")
    function: Callable[..., Any] = found
    return function


def _module(path: Path) -> Any:
    """Import a file as a script's neighbours are imported: its directory comes first."""
    sys.path.insert(0, str(path.parent))
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) != str(path):
        name = f"{name} of the port"  # a file may be named as what others import
        known = sys.modules.get(name)
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# --- libraries ----------------------------------------------------------------------------------


class Library:
    """A shared library that implements ``nsq.h``.

    Every buffer that it gets lies between guards, so that writing beyond it is noticed.

    Parameters
    ----------
    path : str

    Raises
    ------
    TargetError
        Where it cannot be loaded, or has none of the functions.

    Examples
    --------
    >>> Library("libnone.so")
    Traceback (most recent call last):
    nsq_ref.conformance.worker.TargetError: ...
    """

    def __init__(self, path: str) -> None:
        self.name = path
        try:
            self._library = ctypes.CDLL(str(Path(path).resolve()))
        except OSError as error:
            raise TargetError(f"{path} cannot be loaded: {error}") from error
        names = [f"nsq_{operation}" for operation in OPERATIONS]
        if not any(hasattr(self._library, name) for name in names):
            raise TargetError(f"{path} has none of the functions of nsq.h: {', '.join(names)}")

    def ask(self, number: int, case: Case) -> Answer | Failure:
        """Call the function of the case's operation."""
        name = f"nsq_{case.operation}"
        function = getattr(self._library, name, None)
        if function is None:
            return Answer(NOT_IMPLEMENTED, {}, f"the library has no {name}")
        x = case.inputs.get("x", case.inputs.get("sinks"))
        if x is not None and x.dtype not in DTYPES[:3]:
            return Answer(NOT_IMPLEMENTED, {}, f"nsq.h has no {x.dtype} input")
        call = _Call(function)
        ask = {"encode": _encode, "decode": _decode, "attend": _attend, "stream": _stream}
        status, arrays = ask[case.operation](call, case)
        if written := call.written():
            return Failure("out of bounds", f"{name} {'; '.join(written)}")
        if status not in (DONE, REFUSED, NOT_IMPLEMENTED):
            return Failure("garbage", f"{name} returned {status}; an nsq_status is 0, 1 or 2")
        return Answer(status, arrays if status == DONE else {})

    def close(self) -> None:
        """Do nothing: a library is unloaded when the process ends."""


class _Buffer:
    """Memory at a multiple of 64 bytes, between guards."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        size = math.prod(shape) * dtype.itemsize
        memory = np.full(size + 2 * GUARD_BYTES + ALIGNMENT, GUARD, np.uint8)
        start = GUARD_BYTES + -(memory.ctypes.data + GUARD_BYTES) % ALIGNMENT
        self.name = name
        self.address = memory.ctypes.data + start
        self._bytes = memory[start : start + size]
        self._before, self._behind = memory[:start], memory[start + size :]
        self._bytes[:] = UNWRITTEN
        self.array: Array = self._bytes.view(dtype).reshape(shape)
        self._given: bytes | None = None

    @classmethod
    def holding(cls, name: str, array: Array) -> _Buffer:
        """Return a buffer that is only to be read."""
        buffer = cls(name, array.shape, array.dtype)
        buffer.array[...] = array
        buffer._given = buffer._bytes.tobytes()
        return buffer

    def written(self) -> str:
        """Say what was written that should not be."""
        if len(places := np.flatnonzero(self._behind != GUARD)):
            return f"wrote behind {self.name} (first at byte {places[0]} past its end)"
        if len(places := np.flatnonzero(self._before[::-1] != GUARD)):
            return f"wrote before {self.name} (first at byte {places[0] + 1} ahead of its start)"
        if self._given is not None and self._bytes.tobytes() != self._given:
            return f"wrote to {self.name}, which is only to be read"
        return ""


class _Call:
    """One call: the buffers that it is given."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._buffers: list[_Buffer] = []

    def __call__(self, *arguments: _Buffer | ctypes.c_int32 | ctypes.c_int64) -> int:
        self._function.restype = ctypes.c_int
        return int(
            self._function(*(
                ctypes.c_void_p(one.address) if isinstance(one, _Buffer) else one
                for one in arguments
            ))
        )  # fmt: skip

    def given(self, name: str, array: Array) -> _Buffer:
        """Return a buffer with an input."""
        self._buffers.append(_Buffer.holding(name, array))
        return self._buffers[-1]

    def wanted(self, name: str, field: Field) -> _Buffer:
        """Return a buffer for an output."""
        self._buffers.append(_Buffer(name, *field))
        return self._buffers[-1]

    def parts(self, name: str, parts: Mapping[str, _Buffer]) -> _Buffer:
        """Return an ``nsq_parts``."""
        addresses = [parts[part].address if part in parts else 0 for part in PARTS]
        return self.given(name, np.array(addresses, np.uintp))

    def scheme(self, name: str, scheme: Scheme) -> _Buffer:
        """Return an ``nsq_scheme``."""
        return self.given(name, scheme_array(scheme))

    def written(self) -> list[str]:
        """Say what was written that should not be."""
        return [text for buffer in self._buffers if (text := buffer.written())]


def _encode(call: _Call, case: Case) -> tuple[int, Frame]:
    x = case.inputs["x"]
    *leads, tokens, head_dim = x.shape
    layout = case.scheme.layout(tokens, head_dim, x.dtype)
    outputs = {
        name: call.wanted(name, Field((*leads, *field.shape), field.dtype))
        for name, field in layout.items()
    }
    status = call(
        call.scheme("scheme", case.scheme), call.given("x", x), ctypes.c_int32(_dtype(x)),
        *map(ctypes.c_int64, (math.prod(leads), tokens, head_dim)), call.parts("out", outputs),
    )  # fmt: skip
    return status, {name: buffer.array for name, buffer in outputs.items()}


def _decode(call: _Call, case: Case) -> tuple[int, Frame]:
    parts = {name: call.given(name, case.inputs[name]) for name in PARTS if name in case.inputs}
    shape = tuple(case.inputs["shape"].tolist())
    x_hat = call.wanted("x_hat", Field(shape, np.dtype(np.float32)))
    dtype = _dtype(case.inputs["sinks"]) if "sinks" in parts else 0
    status = call(
        call.scheme("scheme", case.scheme), call.parts("parts", parts), ctypes.c_int32(dtype),
        *map(ctypes.c_int64, (math.prod(shape[:-2]), *shape[-2:])), x_hat,
    )  # fmt: skip
    return status, {"x_hat": x_hat.array}


def _attend(call: _Call, case: Case) -> tuple[int, Frame]:
    inputs = case.inputs
    query = inputs["query"]
    kv_heads, tokens, head_dim = inputs["keys.shape"].tolist()
    value_head_dim = int(inputs["values.shape"][2])
    how = np.zeros(1, _HOW)
    options = [inputs[name].item() for name in ("scale", "causal", "softcap", "sliding_window")]
    how[0] = (*query.shape[:2], kv_heads, tokens, head_dim, value_head_dim, *options)
    arguments = [call.given("how", how), call.given("query", query)]
    for side, scheme in (("key", case.scheme), ("value", scheme_of(inputs["value_scheme"]))):
        parts = {
            name: call.given(f"{side}s.{name}", inputs[f"{side}s.{name}"])
            for name in PARTS
            if f"{side}s.{name}" in inputs
        }
        arguments += [call.scheme(f"{side}_scheme", scheme), call.parts(f"{side}s", parts)]
    shape = (*query.shape[:2], value_head_dim)
    output = call.wanted("output", Field(shape, np.dtype(np.float32)))
    return call(*arguments, output), {"output": output.array}


def _stream(call: _Call, case: Case) -> tuple[int, Frame]:
    x, steps, row = case.inputs["x"], case.inputs["steps"], case.inputs["row"].item()
    layout = stream_layout(case.scheme, steps, row, x.shape[-1], x.dtype)
    outputs = {name: call.wanted(name, field) for name, field in layout.items()}
    status = call(
        call.scheme("scheme", case.scheme), call.given("x", x), ctypes.c_int32(_dtype(x)),
        *map(ctypes.c_int64, x.shape), call.given("steps_of", steps),
        ctypes.c_int64(len(steps)), ctypes.c_int64(row), call.parts("out", outputs),
        outputs["tail"],
    )  # fmt: skip
    return status, {name: buffer.array for name, buffer in outputs.items()}


def _dtype(array: Array) -> int:
    return DTYPES.index(array.dtype)


# --- ONNX models --------------------------------------------------------------------------------

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
}  # fmt: skip


class Model:
    """An ONNX model whose inputs and outputs have the names of a case's arrays.

    A model is made for one scheme and, mostly, one dtype: cases of others it does not implement.

    Parameters
    ----------
    path : str
    operation : str
    custom_ops : str or None
        A library of operators.

    Raises
    ------
    TargetError
        Where it cannot be loaded, or an input or output has a name that no array of a case has.

    Examples
    --------
    >>> Model("none.onnx", "encode", None)
    Traceback (most recent call last):
    nsq_ref.conformance.worker.TargetError: ...
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
        stored = case.inputs.keys() & set(PARTS)
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

    def close(self) -> None:
        """Do nothing: a session is freed when the process ends."""

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


if __name__ == "__main__":
    sys.exit(main())

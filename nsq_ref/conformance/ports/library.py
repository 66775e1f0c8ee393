"""Shared libraries that implement ``nsq.h``, called between guards."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nsq_ref.codec import PARTS
from nsq_ref.conformance.operations import (
    DONE,
    DTYPES,
    NOT_IMPLEMENTED,
    OPERATIONS,
    REFUSED,
    Answer,
    Case,
    Failure,
    Port,
    TargetError,
    scheme_array,
    stored_side,
)
from nsq_ref.conformance.ports.frames import Frame
from nsq_ref.dtypes import Array
from nsq_ref.scheme import Field, Scheme

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


class Library(Port):
    """A shared library that implements ``nsq.h``.

    Every buffer that it gets lies between guards, so that writing beyond it is noticed. TargetError
    where it cannot be loaded, or has none of the functions.

    Examples
    --------
    >>> Library("libnone.so")
    Traceback (most recent call last):
    nsq_ref.conformance.operations.TargetError: ...
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
        ask = {
            "encode": _encode, "decode": _decode, "attend": _attend, "stream": _stream,
            "feedback": _encode, "stream_feedback": _stream,
        }  # fmt: skip
        status, arrays = ask[case.operation](call, case)
        if written := call.written():
            return Failure("out of bounds", f"{name} {'; '.join(written)}")
        if status not in (DONE, REFUSED, NOT_IMPLEMENTED):
            return Failure("garbage", f"{name} returned {status}; an nsq_status is 0, 1 or 2")
        return Answer(status, arrays if status == DONE else {})


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
        *map(ctypes.c_int64, (math.prod(leads), tokens, head_dim)), *_feedback(call, case),
        call.parts("out", outputs),
    )  # fmt: skip
    return status, {name: buffer.array for name, buffer in outputs.items()}


def _feedback(call: _Call, case: Case) -> list[_Buffer | ctypes.c_int64]:
    """Return order, factor and heads where the case has some."""
    if "order" not in case.inputs:
        return []
    order, factor = case.inputs["order"], case.inputs["factor"]
    heads = ctypes.c_int64(len(order))
    return [call.given("order", order), call.given("factor", factor), heads]


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
    for side in ("key", "value"):
        stored, _, scheme = stored_side(case, f"{side}s")
        parts = {n: call.given(f"{side}s.{n}", stored[n]) for n in PARTS if n in stored}
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
        ctypes.c_int64(len(steps)), ctypes.c_int64(row), *_feedback(call, case),
        call.parts("out", outputs), outputs["tail"],
    )  # fmt: skip
    return status, {name: buffer.array for name, buffer in outputs.items()}


def _dtype(array: Array) -> int:
    return DTYPES.index(array.dtype)


def stream_layout(
    scheme: Scheme, steps: Array, row: int, head_dim: int, dtype: np.dtype[Any]
) -> dict[str, Field]:
    """Return what is stored for a row at the end of a stream (rules K1, B1, C1).

    That is the parts of the sealed blocks, the sinks where the scheme has them, and the tail; the
    steps are those of `model.stream`, the dtype that of the input.

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
    sinks, sealed, tail = scheme.cut(length)
    layout = replace(scheme, sink_tokens=0).layout(sealed, head_dim)
    if scheme.sink_tokens:
        layout["sinks"] = Field((sinks, head_dim), dtype)
    return {**layout, "tail": Field((tail, head_dim), dtype)}

"""ONNX models that encode and decode NSQ-1, nsep+pchan4: standard operators, any rank, every bit.

Each also comes with one mistake in it, which the conformance kit must find.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["Mistake", "Nodes", "norm_of", "save", "save_decode", "save_encode"]

Mistake = Literal[
    "nibbles swapped", "reciprocal of the scale", "norm in float32", "not renormalised"
]

OPSET, IR_VERSION = 18, 8
FLOAT, FLOAT16, DOUBLE, UINT8, BOOL = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8, TensorProto.BOOL,
)  # fmt: skip

DIGIT_BITS = 32
# Squares of float32 are below 2^256, and those of midpoints multiples of 2^-300.
UNITS = np.ldexp(1.0, np.arange(256 - DIGIT_BITS, -304 - DIGIT_BITS, -DIGIT_BITS))


class Nodes:
    """Nodes in the order in which they are added, and the constants that they use."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._prefix = prefix

    def __call__(self, operator: str, *inputs: Any, name: str = "", **attributes: Any) -> str:
        """Add a node, return its output; what is not the name of a tensor becomes a constant."""
        names = [one if isinstance(one, str) else self._constant(one) for one in inputs]
        output = name or f"{self._prefix}{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, names, [output], **attributes))
        return output

    def graph(self, name: str, inputs: list[Any], outputs: list[Any]) -> onnx.GraphProto:
        return helper.make_graph(self.nodes, name, inputs, outputs, self.constants)

    def _constant(self, value: Any) -> str:
        name = f"{self._prefix}constant_{len(self.constants)}"
        array = np.array(value, np.int64) if isinstance(value, list) else np.asarray(value)
        self.constants.append(numpy_helper.from_array(array, name))
        return name


def save_encode(path: Path, mistake: Mistake | None = None) -> str:
    """Write a model with input ``x [..., T, D]`` and outputs ``packed``, ``scale``, ``norm``."""
    add = Nodes()
    norm = norm_of(add, "x", mistake)  # N1
    direction = add("Div", "x", _per_token(add, _infinite_where_zero(add, norm)))  # N2
    most = add("ReduceMax", add("Abs", direction), [-2], keepdims=1)
    scale = add("Cast", add("Div", most, np.float32(7)), name="scale", to=FLOAT16)  # S1
    divisor = _infinite_where_zero(add, add("Cast", scale, to=FLOAT))  # S3
    if mistake == "reciprocal of the scale":
        quotient = add("Mul", direction, add("Reciprocal", divisor))
    else:
        quotient = add("Div", direction, divisor)  # Q1
    codes = add("Clip", add("Round", quotient), np.float32(-7), np.float32(7))  # Q2
    _pack(add, add("Cast", add("Add", codes, np.float32(8)), to=UINT8), mistake)  # P1
    add("Cast", norm, name="norm", to=FLOAT16)  # M1
    return save(path, add, {"x": FLOAT}, {"packed": UINT8, "scale": FLOAT16, "norm": FLOAT16})


def save_decode(path: Path, mistake: Mistake | None = None) -> str:
    """Write a model with inputs ``packed``, ``scale``, ``norm`` and output ``x_hat``."""
    add = Nodes()
    biased = add("Cast", _unpack(add, "packed", mistake), to=FLOAT)
    codes = add("Sub", biased, np.float32(8))
    y = add("Mul", codes, add("Cast", "scale", to=FLOAT))  # D1
    if mistake != "not renormalised":
        y = add("Div", y, _per_token(add, _infinite_where_zero(add, norm_of(add, y, mistake))))
    add("Mul", _per_token(add, add("Cast", "norm", to=FLOAT)), y, name="x_hat")
    inputs = {"packed": UINT8, "scale": FLOAT16, "norm": FLOAT16}
    return save(path, add, inputs, {"x_hat": FLOAT})


def norm_of(add: Nodes, x: str, mistake: Mistake | None = None) -> str:
    """N1: of the two float32 around the root, the one on whose side of the middle the sum lies."""
    if mistake == "norm in float32":
        return add("ReduceL2", x, [-1], keepdims=0)
    wide = add("Cast", x, to=DOUBLE)
    squares = add("Mul", wide, wide)
    root = add("Sqrt", add("ReduceSum", squares, [-1], keepdims=0))
    step = _float32_step(add, root)
    below = add("Floor", add("Div", root, step))  # in steps
    middle = add("Mul", add("Add", below, np.float64(0.5)), step)
    sign = _sign_of_difference(add, squares, add("Mul", middle, middle))
    odd = add("Cast", add("Mod", below, np.float64(2), fmod=1), to=BOOL)
    tie_to_above = add("And", add("Equal", sign, np.float64(0)), odd)
    to_above = add("Or", add("Greater", sign, np.float64(0)), tie_to_above)
    rounded = add("Add", below, add("Cast", to_above, to=DOUBLE))
    return add("Cast", add("Mul", rounded, step), to=FLOAT)


def _float32_step(add: Nodes, value: str) -> str:
    """Return the distance of the two float32 around a float64."""
    # The greatest power of two up to a float64, by Rump, Ogita and Oishi (2008), algorithm 3.6.
    q = add("Mul", value, np.float64(2.0**52 + 1))
    power = add("Sub", q, add("Mul", q, np.float64(1 - 2.0**-53)))
    return add("Max", add("Mul", power, np.float64(2.0**-23)), np.float64(2.0**-149))


def _sign_of_difference(add: Nodes, terms: str, other: str) -> str:
    """Return a number of the sign of the exact ``sum(terms) - other``.

    Both are written in digits of 32 bits, whose sums are exact for up to 2^20 terms. The difference
    is followed from the first digit to the last: it is exact, until it is beyond what later digits
    can take back.
    """
    body = Nodes("digit_")
    unit = body("Gather", UNITS, "index")

    def digit(numbers: str) -> str:
        rest = body("Mod", numbers, body("Mul", unit, np.float64(2.0**DIGIT_BITS)), fmod=1)
        return body("Floor", body("Div", rest, unit))

    here = body("Sub", body("ReduceSum", digit(terms), [-1], keepdims=0), digit(other))
    body("Add", body("Mul", "before", np.float64(2.0**DIGIT_BITS)), here, name="after")
    body("Identity", "more", name="and_more")
    # A Loop and not a Scan, which wants to know the rank.
    info = helper.make_tensor_value_info
    state = [info("before", DOUBLE, None)]
    graph = body.graph(
        "digit",
        [info("index", TensorProto.INT64, []), info("more", BOOL, []), *state],
        [info("and_more", BOOL, []), info("after", DOUBLE, None)],
    )
    return add("Loop", np.int64(len(UNITS)), "", add("Sub", other, other), body=graph)


def _infinite_where_zero(add: Nodes, divisor: str) -> str:
    """Make what is divided by 0 zero."""
    return add("Where", add("Equal", divisor, np.float32(0)), np.float32(np.inf), divisor)


def _per_token(add: Nodes, values: str) -> str:
    return add("Unsqueeze", values, [-1])


def _pack(add: Nodes, numbers: str, mistake: Mistake | None) -> None:
    # One number more than there are: an odd channel for the last even one, if it has none.
    padded = add("Pad", numbers, [0, 1], np.uint8(8), [-1])
    even = add("Slice", numbers, [0], [_END], [-1], [2])
    odd = add("Slice", padded, [1], [_END], [-1], [2])
    low, high = (odd, even) if mistake == "nibbles swapped" else (even, odd)
    add("BitwiseOr", low, add("BitShift", high, np.uint8(4), direction="LEFT"), name="packed")


def _unpack(add: Nodes, packed: str, mistake: Mistake | None) -> str:
    low = add("BitwiseAnd", packed, np.uint8(15))
    high = add("BitShift", packed, np.uint8(4), direction="RIGHT")
    even, odd = (high, low) if mistake == "nibbles swapped" else (low, high)
    pairs = add("Concat", _per_token(add, even), _per_token(add, odd), axis=-1)
    # Not -1, which has no meaning where there are no sequences.
    both = add("Mul", add("Shape", packed, start=-1), [2])
    rows = add("Concat", add("Shape", packed, end=-1), both, axis=0)
    channels = add("Shape", "scale", start=-1)
    return add("Slice", add("Reshape", pairs, rows), [0], channels, [-1])


_END = np.iinfo(np.int64).max


def save(path: Path, add: Nodes, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> str:
    """Write a model whose inputs and outputs have these dtypes, and any rank."""
    info = helper.make_tensor_value_info
    graph = add.graph(
        path.stem,
        [info(name, kind, None) for name, kind in inputs.items()],
        [info(name, kind, None) for name, kind in outputs.items()],
    )
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    onnx.save(model, path)
    return str(path)

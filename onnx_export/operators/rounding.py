"""The roundings of `nsq_ref.rounding` in standard operators, exact in every bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nsq_ref.extras import extra
from onnx_export.operators.nodes import Nodes
from onnx_export.operators.schema import ELEMENTS

with extra("onnx", __name__):
    from onnx import numpy_helper

__all__ = ["least_squares_gain", "narrow", "norm", "where_zero"]

DIGIT_BITS = 32
# Squares of float32 are below 2^256. Midpoints are multiples of 2^-150, and times the square of the
# least float32 that makes 2^-448.
UNITS = np.ldexp(1.0, np.arange(256 - DIGIT_BITS, -448 - DIGIT_BITS, -DIGIT_BITS))
BEYOND_FLOAT32 = np.float64(2.0**128)  # the value after the largest float32, were there one more


def narrow(add: Nodes, value: str, dtype: str) -> str:
    """Round float32 once to the dtype that an int64 scalar names, and widen it (S3, M4, Z1).

    Examples
    --------
    >>> add = Nodes()
    >>> narrow(add, "scale", "dtype").startswith("Where")
    True
    """
    narrowed = value
    for kind in ("float16", "bfloat16"):
        there_and_back = add.cast(add.cast(value, kind), "float32")
        narrowed = add("Where", add("Equal", dtype, ELEMENTS[kind]), there_and_back, narrowed)
    return where_zero(add, narrowed, np.float32(0))


def where_zero(add: Nodes, value: str, otherwise: Any) -> str:
    """Replace zeros of either sign; what is divided by infinity becomes zero.

    Examples
    --------
    >>> import numpy as np
    >>> where_zero(Nodes(), "norm", np.float32(np.inf)).startswith("Where")
    True
    """
    zero = np.zeros_like(otherwise)
    return add("Where", add("Equal", value, zero), otherwise, value)


def norm(add: Nodes, x: str) -> str:
    """Return the correctly rounded Euclidean norm over the last axis of float32 (N1).

    Examples
    --------
    >>> add = Nodes()
    >>> norm(add, "x").startswith("chosen")
    True
    """
    wide = add.cast(x, "float64")
    squares = add("Mul", wide, wide)
    root = add("Sqrt", _sum(add, squares))
    slack = add("Mul", root, _relative_error(add, x))

    def exact(add: Nodes, lower: str, upper: str, rows: Sequence[str]) -> str:
        middle = _middle(add, lower, upper)
        square = add("Neg", add("Mul", middle, middle))  # 25 bits, squared: exact
        return _nearer(add, lower, middle, upper, [*rows, square])

    return _rounded(add, root, slack, exact, [squares])


def least_squares_gain(add: Nodes, x: str, y: str) -> str:
    """Return the correctly rounded quotient <x, y> / <y, y> over the last axis; 0 for y = 0 (M3).

    Examples
    --------
    >>> add = Nodes()
    >>> least_squares_gain(add, "x", "y").startswith("chosen")
    True
    """
    wide = add.cast(y, "float64")
    products = add("Mul", add.cast(x, "float64"), wide)
    squares = add("Mul", wide, wide)
    divisor = where_zero(add, _sum(add, squares), np.float64(np.inf))
    quotient = add("Div", _sum(add, products), divisor)
    size = add("Div", _sum(add, add("Abs", products)), divisor)
    slack = add("Mul", add("Add", size, add("Abs", quotient)), _relative_error(add, x))

    def exact(add: Nodes, lower: str, upper: str, rows: Sequence[str]) -> str:
        wide, products, squares = rows
        # Cancellation may leave a wide interval: a quotient of exact sums narrows it.
        quotient = add("Div", _exact_sum(add, [products]), _exact_sum(add, [squares]))
        ends = [
            add.cast(add("Mul", quotient, np.float64(1 + error)), "float32")
            for error in (-(2.0**-40), 2.0**-40)
        ]
        lower, upper = add("Min", *ends), add("Max", *ends)
        middle = _middle(add, lower, upper)
        # Its product with a square has up to 73 bits: y is split in two of 12 bits (Veltkamp).
        spread = add("Mul", wide, np.float64(2.0**41 + 1))
        high = add("Sub", spread, add("Sub", spread, wide))
        low = add("Sub", wide, high)
        minus_high = add("Mul", add("Neg", middle), high)
        minus_low = add("Mul", add("Neg", middle), low)
        terms = [
            products,
            add("Mul", minus_high, high),
            add("Mul", add("Mul", minus_high, np.float64(2)), low),
            add("Mul", minus_low, low),
        ]
        return _nearer(add, lower, middle, upper, terms)

    return _rounded(add, quotient, slack, exact, [wide, products, squares])


def _sum(add: Nodes, terms: str) -> str:
    return add("ReduceSum", terms, [-1], keepdims=0)


def _relative_error(add: Nodes, x: str) -> str:
    """Return a bound of the relative error of a float64 sum over the last axis, and of its root."""
    terms = add("Squeeze", add("Shape", x, start=-1))
    return add("Mul", add.cast(add("Add", terms, 8), "float64"), np.float64(2.0**-53))


def _rounded(
    add: Nodes,
    value: str,
    slack: str,
    exact: Callable[[Nodes, str, str, Sequence[str]], str],
    vectors: Sequence[str],
) -> str:
    """Round float64 to float32; where its error leaves two of them, by exact sums over vectors.

    ``exact`` is given both ends as [rows, 1] and the rows of the vectors that are not decided.
    """
    lower = add.cast(add("Sub", value, slack), "float32")
    upper = add.cast(add("Add", value, slack), "float32")
    undecided = add("Less", lower, upper)
    count = add("ReduceSum", add.cast(undecided, "int64"), keepdims=0)

    def decide(add: Nodes) -> str:
        index = add("Squeeze", add("NonZero", add("Reshape", undecided, [-1])), [0])
        ends = [add("Gather", add("Reshape", end, [-1, 1]), index) for end in (lower, upper)]
        rows = []
        for vector in vectors:
            flat = add("Concat", [-1], add("Shape", vector, start=-1), axis=0)
            rows.append(add("Gather", add("Reshape", vector, flat), index))
        decided = add("Squeeze", exact(add, ends[0], ends[1], rows), [1])
        flat = add("ScatterElements", add("Reshape", lower, [-1]), index, decided)
        return add("Reshape", flat, add("Shape", lower))

    return add.choose(add("Greater", count, 0), decide, lambda _: lower)


def _middle(add: Nodes, lower: str, upper: str) -> str:
    """Return the middle of two neighbours, whose 25 bits float64 holds."""
    ends = [
        add("Clip", add.cast(end, "float64"), -BEYOND_FLOAT32, BEYOND_FLOAT32)
        for end in (lower, upper)
    ]
    return add("Mul", add("Add", *ends), np.float64(0.5))


def _nearer(add: Nodes, lower: str, middle: str, upper: str, terms: Sequence[str]) -> str:
    """Choose, of two neighbours, by the sign of an exact sum: below, at or above the middle."""
    beyond = _exact_sum(add, terms)
    half_even = add.cast(middle, "float32")
    not_below = add("Where", add("Greater", beyond, np.float64(0)), upper, half_even)
    return add("Where", add("Less", beyond, np.float64(0)), lower, not_below)


def _exact_sum(add: Nodes, terms: Sequence[str]) -> str:
    """Return [rows, 1] of the sign of the exact sum of [rows, n], and near it, in units of 2^-448.

    The terms are written in digits of 32 bits, whose sums are exact for up to 2^20 terms. The sum
    is followed from the first digit to the last: it is exact, until it is beyond what later digits
    can take back. So its sign is right, and its relative error below 2^-45.
    """
    joined = add("Concat", *terms, axis=-1)
    size, sign = add("Abs", joined), add("Sign", joined)

    def add_digit(add: Nodes, index: str, state: Sequence[str]) -> list[str]:
        unit = add("Gather", UNITS, index)
        rest = add("Mod", size, add("Mul", unit, np.float64(2.0**DIGIT_BITS)), fmod=1)
        digit = add("Mul", add("Floor", add("Div", rest, unit)), sign)
        here = add("ReduceSum", digit, [-1], keepdims=1)
        return [add("Add", add("Mul", state[0], np.float64(2.0**DIGIT_BITS)), here)]

    # A Loop and not a Scan, which wants to know the rank.
    rows = add("Concat", add("Shape", joined, end=-1), [1], axis=0)
    zero = add("ConstantOfShape", rows, value=numpy_helper.from_array(np.zeros(1)))
    return add.repeat(len(UNITS), add_digit, [zero], ["float64"])[0]

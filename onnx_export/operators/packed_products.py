"""Products with stored codes, as integers: nothing but bytes is ever made of them.

A score is ``sum_j f_j c_j`` with ``f_j = scale_j q_j``, and an output ``sum_t w_t c_t`` times a
scale, over the codes c of one block around the middle of their range. So f and w are written as
three digits of one byte, to 23 bits of the largest of them, and MatMulInteger multiplies these with
the fields of the packed bytes, which are masked and never shifted. All of that is exact but for the
rounding of f and w, which moves a sum of n terms by at most ``1.03 n 2^-24 max|f| max|c|``; rule A3
allows ``(n + 16) 2^-24 sum |f_j| (|c_j| + 2^(bits - 1))``, which is more for up to 512 terms.
Digits have an offset of 128 and no sign: bytes times signed bytes saturate on older processors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from onnx_export.operators.cache_layout import LARGEST_INDEX
from onnx_export.operators.nodes import Nodes
from onnx_export.operators.rounding import where_zero

__all__ = ["MOST_TERMS", "outputs", "scores"]

MOST_TERMS = 512  # that rule A3 allows for
BASE = 254.0  # of digits from -127 to 127, with a sign for each
LARGEST = 127 * BASE**2 + 127 * BASE + 127
PLACES = np.float32([BASE**2, BASE, 1])
VALUES = (PLACES / np.float32(LARGEST)).astype(np.float32)  # of a digit, beside the largest number
MIDDLE = np.uint8(128)


class _Section(NamedTuple):
    """A stretch of a packed row (P1), whose bytes have fields of so many bits."""

    width: int
    weight: int  # of the fields in a code
    middle: int  # of the fields

    @property
    def fields(self) -> int:
        return 8 // self.width

    def mask(self, field: int) -> np.uint8:
        return np.uint8((2**self.width - 1) << self.width * field)

    def offset(self, *fields: int) -> np.uint8:
        """Return what a byte has in the middle of the range, of these fields alone."""
        return np.uint8(sum(self.middle << self.width * field for field in fields))

    def value(self, field: int) -> np.float32:
        """Return what one unit of a byte is worth in a code, taken as a part of this field."""
        return np.float32(self.weight / 2 ** (self.width * field))


SECTIONS = {
    2: [_Section(2, 1, 2)],
    3: [_Section(2, 1, 0), _Section(1, 4, 1)],
    4: [_Section(4, 1, 8)],
    8: [_Section(8, 1, 128)],
}


def scores(add: Nodes, side: str, packed: str, scale: str, query: str) -> str:
    """Multiply queries with coded keys of a symmetric scheme, but for their factors.

    Parameters
    ----------
    add : Nodes
    side : {"key", "value"}
    packed, scale : str
        Tensors uint8 [B, kv_heads, n, block_size, row_bytes] and float32 [B, kv_heads, n, D].
    query : str
        Tensor float32 [B, kv_heads, rows, D].

    Returns
    -------
    str
        Tensor float32 [B, kv_heads, rows, n * block_size].

    Examples
    --------
    >>> scores(Nodes(), "key", "packed", "scale", "query").startswith("Reshape")
    True
    """
    folded = add("Mul", add("Unsqueeze", scale, [3]), add("Unsqueeze", query, [2]))
    by_channel = add("Transpose", folded, perm=[0, 1, 2, 4, 3])
    digits, largest = _digits(add, by_channel, over=3, along=4)
    channels = add("Shape", scale, start=3)
    # Adds up the digits of a row.
    row = add("Range", 0, add("Squeeze", add("Shape", query, start=2, end=3)), 1)
    one = add.cast(add("Equal", add("Unsqueeze", row, [1]), row), "float32")
    together = add("Mul", one, VALUES[:, None, None])
    together = add("Reshape", together, add("Concat", [-1], add("Shape", one, end=1), axis=0))

    def of_section(add: Nodes, section: _Section, part: str, row_bytes: str) -> str:
        fields, last = section.fields, section.fields - 1
        missing = add("Sub", add("Mul", row_bytes, fields), channels)
        pads = add("Concat", [0], missing, axis=0)
        whole = add("Pad", digits, pads, MIDDLE, [3])
        of_field = [add("Slice", whole, [i], [LARGEST_INDEX], [3], [fields]) for i in range(fields)]
        products = add.cast(
            add("MatMulInteger", part, of_field[last], section.offset(*range(fields)), MIDDLE),
            "float32",
        )
        sums = [add("MatMul", products, add("Mul", together, section.value(last)))]
        # The last field is what the others leave of a byte: no mask for it.
        for i in range(last):
            field = add("BitwiseAnd", part, section.mask(i))
            both = add("Concat", of_field[i], of_field[last], axis=4)
            products = add("MatMulInteger", field, both, section.offset(i), MIDDLE)
            ends = [
                add("Mul", together, section.value(i)),
                add("Mul", together, -section.value(last)),
            ]
            sums.append(add("MatMul", add.cast(products, "float32"), add("Concat", *ends, axis=0)))
        return _total(add, sums)

    total = _by_bits(add, side, packed, channels, of_section)
    by_row = add("Transpose", total, perm=[0, 1, 4, 2, 3])
    scaled = add("Mul", by_row, add("Transpose", largest, perm=[0, 1, 4, 2, 3]))
    return add("Reshape", scaled, [0, 0, 0, -1])


def outputs(add: Nodes, side: str, packed: str, scale: str, weights: str) -> str:
    """Add coded values of a symmetric scheme up, by weights that have their factors.

    Parameters
    ----------
    add : Nodes
    side : {"key", "value"}
    packed, scale : str
        Tensors uint8 [B, kv_heads, n, block_size, row_bytes] and float32 [B, kv_heads, n, D].
    weights : str
        Tensor float32 [B, kv_heads, rows, n * block_size].

    Returns
    -------
    str
        Tensor float32 [B, kv_heads, rows, D].

    Examples
    --------
    >>> outputs(Nodes(), "value", "packed", "scale", "weights").startswith("ReduceSum")
    True
    """
    shape = add("Concat", [0, 0, 0], add("Shape", packed, start=2, end=4), axis=0)
    by_block = add("Transpose", add("Reshape", weights, shape), perm=[0, 1, 3, 2, 4])
    digits, largest = _digits(add, by_block, over=4, along=3)
    channels = add("Shape", scale, start=3)
    rows = add("Shape", weights, start=2, end=3)

    def of_section(add: Nodes, section: _Section, part: str, row_bytes: str) -> str:
        fields, last = section.fields, section.fields - 1
        left = add("MatMulInteger", digits, part, MIDDLE, section.offset(*range(fields)))
        found = []
        for i in range(last):
            field = add("BitwiseAnd", part, section.mask(i))
            found.append(add("MatMulInteger", digits, field, MIDDLE, section.offset(i)))
            left = add("Sub", left, found[i])
        sums = []
        for i, one in enumerate([*found, left]):
            by_digit = add("Reshape", add.cast(one, "float32"), [0, 0, 0, len(PLACES), -1])
            added = add("MatMul", (VALUES * section.value(i))[None], by_digit)
            shape = add("Concat", [0, 0, 0], rows, row_bytes, [1], axis=0)
            sums.append(add("Reshape", added, shape))
        every = add("Reshape", add("Concat", *sums, axis=5), [0, 0, 0, 0, -1])
        return add("Slice", every, [0], channels, [4])

    total = _by_bits(add, side, packed, channels, of_section)
    scaled = add("Mul", add("Mul", total, largest), add("Unsqueeze", scale, [3]))
    return add("ReduceSum", scaled, [2], keepdims=0)


def _by_bits(
    add: Nodes,
    side: str,
    packed: str,
    channels: str,
    of_section: Callable[[Nodes, _Section, str, str], str],
) -> str:
    """Sum over the sections of a row, whichever they are: of a part of all bytes, so many a row."""

    def sections(add: Nodes, bits: int) -> str:
        sums, start = [], add.constant([0])
        for section in SECTIONS[bits]:
            fields = section.fields
            row_bytes = add("Div", add("Add", channels, fields - 1), fields)
            end = add("Add", start, row_bytes)
            one = len(SECTIONS[bits]) == 1
            part = packed if one else add("Slice", packed, start, end, [4])
            sums.append(of_section(add, section, part, row_bytes))
            start = end
        return _total(add, sums)

    known = add.attribute(f"{side}_bits", "int")

    def from_there(add: Nodes, kinds: list[int]) -> str:
        first, *others = kinds
        if not others:
            return sections(add, first)
        return add.choose(
            add("Equal", known, first),
            lambda add: sections(add, first),
            lambda add: from_there(add, others),
        )

    return from_there(add, [4, 3, 2, 8])


def _digits(add: Nodes, x: str, over: int, along: int) -> tuple[str, str]:
    """Write numbers in digits of a byte, those of one place behind those of another.

    Returns the digits, and the largest size over an axis, which a digit's value is relative to.
    """
    # Where a number is not finite, neither is the largest one.
    known = add("Mul", add("ReduceSum", x, [over]), np.float32(0))
    largest = add("Add", add("ReduceMax", add("Abs", x), [over]), known)
    relative = add("Div", x, where_zero(add, largest, np.float32(1)))
    rest = add("Round", add("Mul", relative, np.float32(LARGEST)))
    digits = []
    for place in PLACES[:-1]:
        digits.append(add("QuantizeLinear", rest, place, MIDDLE))
        rest = add("Sub", rest, add("DequantizeLinear", digits[-1], place, MIDDLE))
    digits.append(add("QuantizeLinear", rest, PLACES[-1], MIDDLE))
    return add("Concat", *digits, axis=along), largest


def _total(add: Nodes, terms: list[str]) -> str:
    total, *others = terms
    for one in others:
        total = add("Add", total, one)
    return total

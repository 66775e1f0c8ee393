"""Products with stored codes, field by field of their bytes: no key or value is decoded.

With ``y = code * scale + zero``, a score is ``factor_t (sum_j f_j code_tj + sum_j q_j zero_j)``,
where ``f_j = q_j scale_j``, and an output ``sum_t w_t code_tj`` times a scale, and zeros. So
scales, zeros and factors are multiplied with queries, weights and sums, of which there are few.
Fields are masked and never shifted: what their place is worth is in what they are multiplied with.

Where rule A3 allows it, the products are those of integers. f and w are written in four digits of
one byte, to 28 bits of the largest of them, and multiplied with bytes in MatMulInteger: exact, but
for that rounding, which moves a sum of n terms by at most ``1.01 n 2^-29 max|f| max(code)``. A3
allows ``(n + 16) 2^-24`` times the sum of ``|f_j| code_j + |q_j zero_j|``, and the second half of
it is known without a look at the tokens: an eighth of it must do. Digits have an offset and no
sign, as products of bytes with signed ones saturate on older processors. Otherwise, which takes
zeros near 0 where it matters, fields become float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from onnx_export.operators.cache_body import LARGEST_INDEX
from onnx_export.operators.nodes import Nodes
from onnx_export.operators.rounding import where_zero

__all__ = ["LARGEST_BLOCK", "half_of_codes", "outputs", "scores"]

LARGEST_BLOCK = 4096  # tokens: A3 knows 512 terms of a sum at most, and an eighth of that must do
PLACES = np.array([128**3, 128**2, 128, 1], np.float32)
LARGEST = np.float32(127 * 128**3)
VALUES = PLACES / LARGEST  # of digits, beside the largest number
MIDDLE = np.uint8(128)  # stands for a digit of 0
ALLOWED = np.float32(4)
POWERS = 2.0 ** np.arange(8, dtype=np.float32)


class _Section(NamedTuple):
    """A stretch of a packed row (P1), whose bytes have fields of so many bits."""

    width: int
    weight: int  # of the fields in a code

    @property
    def fields(self) -> int:
        return 8 // self.width

    def mask(self, field: int) -> np.uint8:
        mask: np.uint8 = np.uint8(((1 << self.width) - 1) << self.width * field)
        return mask

    def value(self, field: int) -> np.float32:
        """Return what one unit of a byte is worth in a code, taken as a part of this field."""
        value: np.float32 = np.float32(self.weight / (1 << self.width * field))
        return value


SECTIONS = {
    2: [_Section(2, 1)],
    3: [_Section(2, 1), _Section(1, 4)],
    4: [_Section(4, 1)],
    8: [_Section(8, 1)],
}


def scores(add: Nodes, side: str, packed: str, scale: str, zero: str, query: str) -> str:
    """Multiply queries with coded keys, but for their factors.

    Parameters
    ----------
    add : Nodes
    side : {"key", "value"}
    packed, scale, zero : str
        Tensors uint8 [B, kv_heads, n, block_size, row_bytes] and float32 [B, kv_heads, n, D].
    query : str
        Tensor float32 [B, kv_heads, rows, D].

    Returns
    -------
    str
        Tensor float32 [B, kv_heads, rows, n * block_size].

    Examples
    --------
    >>> scores(Nodes(), "key", "packed", "scale", "zero", "query").startswith("Reshape")
    True
    """
    channels = add("Shape", scale, start=3)
    folded = add("Mul", add("Unsqueeze", scale, [3]), add("Unsqueeze", query, [2]))
    largest = _largest(add, folded, 4)  # [B, kv_heads, n, rows, 1]

    def of_fields(
        add: Nodes, section: _Section, x: str, axis: int, row_bytes: str, nothing: object
    ) -> list[str]:
        """Return what belongs to each field: channels are an axis of x."""
        missing = add("Sub", add("Mul", row_bytes, section.fields), channels)
        whole = add("Pad", x, add("Concat", [0], missing, axis=0), nothing, [axis])
        return [
            add("Slice", whole, [i], [LARGEST_INDEX], [axis], [section.fields])
            for i in range(section.fields)
        ]

    def floats(add: Nodes) -> str:
        def of_section(add: Nodes, section: _Section, part: str, row_bytes: str) -> str:
            own = of_fields(add, section, folded, 4, row_bytes, np.float32(0))
            sums = []
            for i, field in enumerate(_fields(add, section, part)):
                numbers = add("Transpose", add.cast(field, "float32"), perm=[0, 1, 2, 4, 3])
                sums.append(add("MatMul", add("Mul", own[i], section.value(i)), numbers))
            return _total(add, sums)

        total = _by_bits(add, side, packed, channels, of_section)
        return add("Transpose", total, perm=[0, 1, 3, 2, 4])

    def integers(add: Nodes) -> str:
        relative = add("Transpose", _relative(add, folded, largest), perm=[0, 1, 2, 4, 3])
        digits = _digits(add, relative, along=4)
        # Adds up the digits of a row of the query.
        row = add("Range", 0, add("Squeeze", add("Shape", query, start=2, end=3)), 1)
        same = add.cast(add("Equal", add("Unsqueeze", row, [1]), row), "float32")
        one = add("Mul", same, VALUES[:, None, None])
        one = add("Reshape", one, add("Concat", [-1], add("Shape", same, end=1), axis=0))

        def of_section(add: Nodes, section: _Section, part: str, row_bytes: str) -> str:
            own = of_fields(add, section, digits, 3, row_bytes, MIDDLE)
            values = [add("Mul", one, section.value(i)) for i in range(section.fields)]
            fields = _fields(add, section, part, whole=True)
            if section.fields == 2:
                own[0] = add("Concat", *own, axis=4)
                values[0] = add("Concat", values[0], add("Neg", values[1]), axis=0)
            sums = []
            for field, of_field, value in zip(fields, own, values, strict=True):
                products = add("MatMulInteger", field, of_field, "", MIDDLE)
                sums.append(add("MatMul", add.cast(products, "float32"), value))
            return _total(add, sums)

        total = _by_bits(add, side, packed, channels, of_section)
        by_row = add("Transpose", total, perm=[0, 1, 4, 2, 3])
        return add("Mul", by_row, add("Transpose", largest, perm=[0, 1, 3, 2, 4]))

    sizes = add("MatMul", add("Abs", query), add("Transpose", add("Abs", zero), perm=[0, 1, 3, 2]))
    swing = add("Squeeze", add("Transpose", largest, perm=[0, 1, 3, 2, 4]), [4])
    found = add.choose(_allowed(add, side, sizes, swing), integers, floats)
    shift = add("MatMul", query, add("Transpose", zero, perm=[0, 1, 3, 2]))
    return add("Reshape", add("Add", found, add("Unsqueeze", shift, [4])), [0, 0, 0, -1])


def outputs(add: Nodes, side: str, packed: str, scale: str, zero: str, weights: str) -> str:
    """Add coded values up, by weights that have their factors.

    Parameters
    ----------
    add : Nodes
    side : {"key", "value"}
    packed, scale, zero : str
        Tensors uint8 [B, kv_heads, n, block_size, row_bytes] and float32 [B, kv_heads, n, D].
    weights : str
        Tensor float32 [B, kv_heads, rows, n * block_size].

    Returns
    -------
    str
        Tensor float32 [B, kv_heads, rows, D].

    Examples
    --------
    >>> outputs(Nodes(), "value", "packed", "scale", "zero", "weights").startswith("Add")
    True
    """
    channels = add("Shape", scale, start=3)
    rows = add("Shape", weights, start=2, end=3)
    shape = add("Concat", [0, 0, 0], add("Shape", packed, start=2, end=4), axis=0)
    by_row = add("Reshape", weights, shape)
    by_block = add("Transpose", by_row, perm=[0, 1, 3, 2, 4])
    largest = _largest(add, by_block, 4)  # [B, kv_heads, n, rows, 1]

    def joined(add: Nodes, found: Sequence[str]) -> str:
        """Bring the sums of each field in the order of channels."""
        each = [add("Unsqueeze", one, [5]) for one in found]
        every = add("Reshape", add("Concat", *each, axis=5), [0, 0, 0, 0, -1])
        return add("Slice", every, [0], channels, [4])

    def floats(add: Nodes) -> str:
        def of_section(add: Nodes, section: _Section, part: str, row_bytes: str) -> str:
            sums = []
            for i, field in enumerate(_fields(add, section, part)):
                found = add("MatMul", by_block, add.cast(field, "float32"))
                sums.append(add("Mul", found, section.value(i)))
            return joined(add, sums)

        return _by_bits(add, side, packed, channels, of_section)

    def integers(add: Nodes) -> str:
        digits = _digits(add, _relative(add, by_block, largest), along=3)

        def of_section(add: Nodes, section: _Section, part: str, row_bytes: str) -> str:
            fields = _fields(add, section, part, whole=True)
            products = [add("MatMulInteger", digits, field, MIDDLE) for field in fields]
            if section.fields == 2:
                products[1] = add("Sub", products[1], products[0])
            sums = []
            for i, one in enumerate(products):
                by_digit = add("Reshape", add.cast(one, "float32"), [0, 0, 0, len(PLACES), -1])
                added = add("MatMul", (VALUES * section.value(i))[None], by_digit)
                shape = add("Concat", [0, 0, 0], rows, row_bytes, axis=0)
                sums.append(add("Reshape", added, shape))
            return joined(add, sums)

        return add("Mul", _by_bits(add, side, packed, channels, of_section), largest)

    # What is allowed of a sum over blocks, and what they need, [B, kv_heads, rows, D].
    sizes = add("MatMul", add("ReduceSum", add("Abs", by_row), [4], keepdims=0), add("Abs", zero))
    most = add("Squeeze", add("Transpose", largest, perm=[0, 1, 3, 2, 4]), [4])
    swing = add("MatMul", most, add("Abs", scale))
    found = add.choose(_allowed(add, side, sizes, swing), integers, floats)
    total = add("ReduceSum", add("Mul", found, add("Unsqueeze", scale, [3])), [2], keepdims=0)
    return add("Add", total, add("MatMul", add("ReduceSum", by_row, [4], keepdims=0), zero))


def half_of_codes(add: Nodes, side: str) -> str:
    """Return half the number of codes of a scheme, a float32 scalar.

    Examples
    --------
    >>> half_of_codes(Nodes(), "key").startswith("Gather")
    True
    """
    return add("Gather", POWERS, add("Sub", add.attribute(f"{side}_bits", "int"), 1))


def _allowed(add: Nodes, side: str, sizes: str, swing: str) -> str:
    """Tell whether integers are exact enough everywhere."""
    half = half_of_codes(add, side)
    largest_code = add("Sub", add("Add", half, half), np.float32(1))
    spare = add("Sub", add("Mul", sizes, ALLOWED), add("Mul", swing, largest_code))
    return add("GreaterOrEqual", add("ReduceMin", spare, keepdims=0), np.float32(0))


def _largest(add: Nodes, x: str, axis: int) -> str:
    """Return the largest size along an axis; not a finite one where some number is not."""
    known = add("Mul", add("ReduceSum", x, [axis]), np.float32(0))
    return add("Add", add("ReduceMax", add("Abs", x), [axis]), known)


def _relative(add: Nodes, x: str, largest: str) -> str:
    return add("Div", x, where_zero(add, largest, np.float32(1)))


def _digits(add: Nodes, relative: str, along: int) -> str:
    """Write numbers of -1 to 1 in digits of a byte, those of one place behind those of another."""
    rest = add("Round", add("Mul", relative, LARGEST))
    digits = []
    for place in PLACES[:-1]:
        digits.append(add("QuantizeLinear", rest, place, MIDDLE))
        rest = add("Sub", rest, add("DequantizeLinear", digits[-1], place, MIDDLE))
    digits.append(add("QuantizeLinear", rest, PLACES[-1], MIDDLE))
    return add("Concat", *digits, axis=along)


def _fields(add: Nodes, section: _Section, part: str, whole: bool = False) -> list[str]:
    """Return fields, in their places; of two the second is the ``whole`` byte, if so wanted."""
    if section.fields == 1:
        return [part]
    masked = section.fields - (whole and section.fields == 2)
    fields = [add("BitwiseAnd", part, section.mask(i)) for i in range(masked)]
    return [*fields, part][: section.fields]


def _by_bits(
    add: Nodes,
    side: str,
    packed: str,
    channels: str,
    of_section: Callable[[Nodes, _Section, str, str], str],
) -> str:
    """Sum over the sections of a row: each is given its bytes, and how many a row has."""

    def sections(add: Nodes, bits: int) -> str:
        sums, start = [], add.constant([0])
        for section in SECTIONS[bits]:
            fields = section.fields
            row_bytes = add("Div", add("Add", channels, fields - 1), fields)
            end = add("Add", start, row_bytes)
            alone = len(SECTIONS[bits]) == 1
            part = packed if alone else add("Slice", packed, start, end, [4])
            sums.append(of_section(add, section, part, row_bytes))
            start = end
        return _total(add, sums)

    known = add.attribute(f"{side}_bits", "int")

    def one_of(add: Nodes, kinds: Sequence[int]) -> str:
        first, *others = kinds
        if not others:
            return sections(add, first)
        is_first = add("Equal", known, first)
        return add.choose(
            is_first, lambda add: sections(add, first), lambda add: one_of(add, others)
        )

    return one_of(add, [4, 3, 2, 8])


def _total(add: Nodes, terms: Sequence[str]) -> str:
    total, *others = terms
    for one in others:
        total = add("Add", total, one)
    return total

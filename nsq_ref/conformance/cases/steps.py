"""Narrow inputs that are looked for: tiny tokens next to ties, gains next to midpoints."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from nsq_ref import rounding, spec
from nsq_ref.conformance.cases.halves import NORM, filled, rounded
from nsq_ref.conformance.cases.pools import Draw
from nsq_ref.conformance.cases.ties import four_squares, makes_plain_gains
from nsq_ref.conformance.mistakes.arithmetic import in_order
from nsq_ref.dtypes import FLOAT_DTYPES, Array, Float64
from nsq_ref.scheme import Scheme

EPSILON = np.float32(1e-12)  # the least that is known to be added to norms
LARGEST, SQUARES = 24, 1024  # of an element in steps, and of a norm squared


def tiny_ties(scheme: Scheme) -> Iterator[Array]:
    """Yield a float16 block with a quotient next to a tie that the least epsilon moves.

    A token of few of the smallest steps has directions that are quotients of an integer and the
    root of one, so many that one of them is next to a tie of some scale: all are looked through.

    Examples
    --------
    >>> [x.shape for x in tiny_ties(Scheme())]
    [(2, 5)]
    """
    # Where the range is searched, many tokens make the whole range the best.
    copies = 24 if scheme.scale_rule == "search" else 1
    tokens = copies + 1 + (not scheme.symmetric)
    if (
        not scheme.separate_norm
        or scheme.axis == "token"
        or scheme.outlier_channels
        or (scheme.block_size or tokens) < tokens
    ):
        return
    stored, (_, levels) = FLOAT_DTYPES[scheme.scale_dtype], scheme.code_range
    element, square = np.mgrid[1 : LARGEST + 1, 2 : SQUARES + 1].astype(np.float32)
    norm = np.ldexp(np.sqrt(square), -24)
    value = np.ldexp(element, -24)
    right = (value / norm)[..., None]
    tie = np.arange(levels, dtype=np.float32) + np.float32(0.5)
    scale = rounding.narrow(right / tie, stored).astype(np.float32)
    inside = (element * element < square)[..., None] & (levels * scale < 0.8)
    wrong = (value / (norm + EPSILON))[..., None]
    tells = np.argwhere(inside & (np.rint(right / scale) != np.rint(wrong / scale)))
    if not len(tells):
        return
    at = tuple(tells[len(tells) // 2].tolist())
    few, number = at[0] + 1, at[1] + 2
    x = np.zeros((tokens, 5))
    x[0] = np.ldexp(np.array([few, *four_squares(number - few * few)], np.float64), -24)
    most = levels * float(scale[at])
    row = rounded(np.array([[NORM * most]]), "float16")
    x[1 : copies + 1, 1:] = filled(row, row[:, 0] / most, 1, "float16")
    x[1 : copies + 1, :1] = row
    yield x.astype(np.float16)


STAGES = (11, 14, 17, 20, 23, 26)  # channels of a gain, two to the power of minus these


def gain_midpoints(scheme: Scheme, draw: Draw, dtype: str) -> Iterator[Array]:
    """Yield tokens whose least-squares gain is nearer to a midpoint than float64 can tell.

    Four channels make a gain, and six small ones, each of what the one before leaves, move it to
    the midpoint of two float32.
    """
    tokens = 6
    if (
        not makes_plain_gains(scheme, tokens)
        or {scheme.scale_dtype, scheme.norm_dtype} != {"float32"}
        or scheme.bits == 2
    ):
        return
    kind, levels = FLOAT_DTYPES[dtype], scheme.code_range[1]
    fine = np.ldexp(1.0, [-stage for stage in STAGES])
    block = np.zeros((tokens, 14))  # four channels, the fine ones, and four that make norms
    block[:4, :4], block[:4, 10:] = levels * np.eye(4), four_squares(2 * levels + 1)
    block[4, 4:10], block[4, 10] = levels * fine, 1
    block[:5] = np.ldexp(block[:5], 8)
    for _ in range(32):
        block[5, :4] = np.ldexp(draw.integers(2**7, 2**7 + 2**4, 4).astype(np.float64), 5)
        block[5, 4:10] = np.ldexp(fine, 13)
        block = block.astype(kind).astype(np.float64)
        for stage in range(4, 11):
            y = _dequantized(block, scheme)[5]
            wide, coded = (list(map(Fraction, row.tolist())) for row in (block[5], y))
            squares = sum(v * v for v in coded)
            product = sum(a * b for a, b in zip(wide, coded, strict=True))
            if stage == 4:
                step = Fraction(2) ** (int(np.frexp(float(product / squares))[1]) - 24)
                middle = (product / squares // step + Fraction(1, 2)) * step
            elif stage == 10:
                break
            left = middle * squares - product
            block[5, stage] += float(left / coded[stage]) if coded[stage] else 0.0
            block = block.astype(kind).astype(np.float64)
        x = block.astype(np.float32)
        y = _dequantized(block, scheme)[5]
        gain = np.float32(in_order(block[5], y) / in_order(y, y))
        if gain != spec.encode(x, scheme).norm[5]:
            yield x.astype(kind)
            return


def _dequantized(x: Float64, scheme: Scheme) -> Float64:
    block = spec.encode(x.astype(np.float32), scheme)
    y = spec.dequantized_direction(
        block.codes, block.scale, block.zero, block.outlier_index, block.outliers
    )
    return np.asarray(y.astype(np.float64))

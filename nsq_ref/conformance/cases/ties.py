"""Inputs on ties exactly: quotients, norms and gains half way between two numbers.

They are computed, not drawn: sums of integer squares make a norm what it is to be.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any

import numpy as np

from nsq_ref import rounding, spec
from nsq_ref.conformance.cases.encoders import wrong_encoders
from nsq_ref.conformance.cases.pools import FORMATS, Draw, telling
from nsq_ref.conformance.mistakes.arithmetic import in_order
from nsq_ref.dtypes import FLOAT_DTYPES, Array, Float32
from nsq_ref.scheme import Scheme

# --- quotients ----------------------------------------------------------------------------------


def exact_ties(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    """Yield quotients of exactly k + 1/2, and their neighbours one ulp off."""
    extremes, ties = _integer_ties(scheme)
    by_channel = scheme.axis == "channel"
    tokens = scheme.block_size or 64
    if scheme.scale_rule == "search" or (by_channel and tokens <= len(extremes)):
        return
    rows = [ties[i : i + 4] for i in range(0, len(ties), 4)]
    rows = [row + ties[: 4 - len(row)] for row in rows]
    if by_channel:
        step = tokens - len(extremes)
        chunks = [rows[i : i + step] for i in range(0, len(rows), step)]
        integers = [row for chunk in chunks for row in [[end] * 4 for end in extremes] + chunk]
    else:
        integers = [extremes + row for row in rows]
    # A tie is odd, an extreme is even: four channels, or all behind the extremes, may be moved.
    largest = max(sum(value * value for value in row) for row in integers) if by_channel else 0
    whole = [_completed(row, scheme, largest) for row in integers]
    x = _padded(whole, max(map(len, whole))).astype(np.float32)
    first = scheme.outlier_channels
    moved = np.zeros(x.shape, bool)
    moved[:, first : first + len(integers[0])] = np.array(integers) % 2 != 0
    for near in (x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, -np.float32(np.inf))):
        yield np.ldexp(np.where(moved, near, x), -6)


def _padded(rows: list[Any], width: int) -> Array:
    return np.array([[*row, *[0] * (width - len(row))] for row in rows], np.float64)


def _integer_ties(scheme: Scheme) -> tuple[list[int], list[int]]:
    """Return extremes and ties of a range whose scale is 2, and whose zero is a power of two."""
    least, most = scheme.code_range
    zero = 0 if scheme.symmetric else -(2**scheme.bits)
    ends = [zero + 2 * most] if scheme.symmetric else [zero + 2 * most, zero]
    ties = [zero + 2 * code + 1 for code in range(least, most)]
    if len(ties) > 16:
        ties = ties[:4] + ties[5 :: len(ties) // 8][:8] + ties[-4:]
    return ends, ties


def _completed(row: list[int], scheme: Scheme, largest: int) -> list[int]:
    """Return outlier channels, the row, and channels that make its norm a power of two.

    The same one for all rows, as rows that share scales need, if `largest` is their greatest sum of
    squares.
    """
    most = 2**scheme.bits
    kept = scheme.outlier_channels
    if not scheme.separate_norm:
        return [4 * most] * kept + row
    outliers = [4 * most] * max(kept - 1, 0)
    total, held = (sum(value * value for value in values) for values in (row, outliers))
    least = 16 * most * most if kept else 0
    power = 1
    while power - max(total, largest) - held < least:
        power *= 4
    rest = power - total - held
    if kept:
        outliers.append(isqrt(rest))
        rest -= outliers[-1] ** 2
    # With one scale a token, no other channel may be beyond its extremes.
    most = max(row)
    copies = 0 if scheme.axis == "channel" else rest // (most * most)
    return [*outliers, *row, *[most] * copies, *four_squares(rest - copies * most * most)]


def four_squares(number: int) -> list[int]:
    """Return four integers whose squares add up to a number, the largest first."""
    for a in range(isqrt(number), -1, -1):
        for b in range(min(a, isqrt(number - a * a)), -1, -1):
            left = number - a * a - b * b
            for c in range(min(b, isqrt(left)), -1, -1):
                d = isqrt(left - c * c)
                if d > c:
                    break
                if d * d == left - c * c:
                    return [a, b, c, d]
    raise ArithmeticError(f"{number} is no sum of four squares, as every integer is")


# --- norms --------------------------------------------------------------------------------------


def norm_midpoints(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    """Yield norms half way between two float32, and off it by less than float64 can see."""
    if not scheme.separate_norm:
        return
    # Midpoints of float32 beside a tie of norm_dtype: on their two sides, another norm is stored.
    step = 2 ** (24 - FORMATS[scheme.norm_dtype].precision)
    for root in (2**24 + step + 1, 2**24 + 3 * step - 1) if step > 1 else (2**24 + 1, 2**24 + 3):
        yield _around_midpoint(root, 0)
    if scheme.norm_dtype != "float16":
        yield _around_midpoint(2**24 + 1, -64)
        yield _around_midpoint(2**24 + 1, 60)
    pool = _coded_midpoints(scheme, draw)
    if pool is not None:
        yield from telling(pool, scheme, wrong_encoders("norm-midpoint", scheme))


def _around_midpoint(root: int, exponent: int) -> Array:
    """Return tokens of norm ``root * 2^-24``, and of so little more and less that float64 is blind.

    ``root`` is odd and has 25 bits, so that it is half way between two float32.
    """
    exact = [float(value) for value in squares_of(root * root, 2**24)]
    less = [*exact[:-1], 1 - 2.0**-24]
    rows = np.array([[*exact, 0.0], [*exact, 2.0**-6], [*less, 0.0]])
    return np.asarray(np.ldexp(rows, exponent - 24))


def squares_of(number: int, most: int) -> list[int]:
    """Return powers of two, `most` at most, whose squares add up to a number, descending."""
    roots: list[int] = []
    for bit in range(number.bit_length() - 1, -1, -1):
        if number >> bit & 1:
            root, count = 2 ** (bit // 2), 1 + bit % 2
            while root > most:
                root, count = root // 2, 4 * count
            roots += [root] * count
    return roots


def _coded_midpoints(scheme: Scheme, draw: Draw) -> Float32 | None:
    """Return blocks whose norms float64 gets wrong, and with them quotients next to ties."""
    by_channel = scheme.axis == "channel"
    if scheme.outlier_channels or (by_channel and (scheme.block_size or 4) < 4):
        return None
    low, high = np.array([[0.0 if scheme.symmetric else -0.375], [0.5]], np.float32)
    scale, zero = (float(part[0]) for part in spec.range_scale(low, high, scheme))
    width = 72
    blocks = []
    for _ in range(96):
        rows: list[list[float]] = []
        for sign in (1, -1):
            root = int(draw.integers(2**22, 2**23)) * 4 + 2 - sign
            ends = [root // 2] if scheme.symmetric else [root // 2, -(root * 3 // 8)]
            ties = draw.integers(*scheme.code_range, 2) + 0.5
            row = [] if by_channel else ends
            row += [int(root * (zero + tie * scale)) for tie in ties.tolist()]
            rest = root * root - sum(value * value for value in row)
            squares = [float(value) for value in squares_of(rest, root // 4)]
            if sign > 0:
                squares.append(2.0**-6)
            elif rest % 2:
                squares[-1] = 1 - 2.0**-24
            else:
                squares.append(0.0)
            rows.append([*map(float, row), *squares])
        if max(map(len, rows)) > width:
            continue
        if by_channel:
            rows.insert(0, [0.5] * 4)
            if not scheme.symmetric:
                rows.insert(0, [-0.375, -0.375, 0.75, 0.375, 0.125])  # of length 1
        blocks.append(_padded(rows, width))
    x = np.array(blocks)
    x[:, -2:] = np.ldexp(x[:, -2:], -24)
    return x.astype(np.float32)


# --- gains --------------------------------------------------------------------------------------


def makes_plain_gains(scheme: Scheme, tokens: int) -> bool:
    """Whether gains of least squares are stored of blocks of so many tokens, scaled by channel."""
    return (
        scheme.separate_norm
        and scheme.magnitude == "lsq"
        and scheme.axis == "channel"
        and scheme.symmetric
        and scheme.scale_rule == "range"
        and not scheme.outlier_channels
        and (scheme.block_size or tokens) >= tokens
    )


def factor_midpoints(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    """Yield tokens (m, m, m + u, m + u, m t), u a step of m, of which four channels decode to 1/2.

    Their exact gain is 2 m + u, half way, but for about the rounding of t / 2 times t.
    """
    if not makes_plain_gains(scheme, 5) or scheme.scale_dtype == "float16":
        return  # float16 would flush the scale of t
    # Each of four tokens makes the scale of its channel 1 / (qmax + 1): its norm is qmax + 1.
    most = scheme.code_range[1]
    block = np.zeros((5, 9))
    block[:4, :4], block[:4, 5:] = most * np.eye(4), four_squares(2 * most + 1)
    tie = 1 + 2.0 ** -FORMATS[scheme.norm_dtype].precision
    exponents = range(14, 23) if scheme.scale_dtype == "float32" else range(24, 30)
    found = 0
    for t in np.ldexp(1.0, [-exponent for exponent in exponents]):
        for steps in draw.integers(0, 2**12, 64):
            # Of float32, any m; of the others one that makes 2 m a tie of norm_dtype.
            m = tie if scheme.norm_dtype != "float32" else 1 + steps * 2.0**-23
            odd = 1 + draw.integers(0, 2**10, 1)[0] * 2.0**-12
            block[4, :5] = m, m, m + 2.0**-23, m + 2.0**-23, m * t * odd
            x = block.astype(np.float32)
            encoded = spec.encode(x, scheme)
            y = spec.dequantized_direction(
                encoded.codes, encoded.scale, encoded.zero, encoded.outlier_index, encoded.outliers
            )[4].astype(np.float64)
            gain = float(in_order(x[4].astype(np.float64), y) / in_order(y, y))
            dtype = FLOAT_DTYPES[scheme.norm_dtype]
            if rounding.narrow(np.float32(gain), dtype) != encoded.norm[4]:
                yield x
                found += 1
                break
        if found == 3:
            return

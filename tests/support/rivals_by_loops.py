"""Formulas of published codecs, an element at a time, in Python floats; no code of nsq_ref."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
from numpy.typing import NDArray

Row = list[float]
Caches = NDArray[np.float32]


@st.composite
def caches(
    draw: st.DrawFn, tokens: Sequence[int], head_dims: Sequence[int], heads: int = 2
) -> Caches:
    """Keys or values with heavy tails, offsets, lone outliers, sinks, zero and equal tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (heads, draw(st.sampled_from(list(tokens))), draw(st.sampled_from(list(head_dims))))
    x = rng.standard_t(draw(st.sampled_from([2, 4, 50])), shape)
    if draw(st.booleans()):  # biased keys
        x += 20 * rng.standard_normal((heads, 1, shape[-1]))
    if draw(st.booleans()):
        x[..., rng.integers(shape[-1])] *= 50
    if draw(st.booleans()):
        x[:, rng.integers(shape[-2]), rng.integers(shape[-1])] = 300
    if draw(st.booleans()):
        x[:, 0] *= 0.01
    if draw(st.booleans()):
        x[:, rng.integers(shape[-2])] = 0
    if draw(st.booleans()):
        x[0] = x[0, :1]  # a head whose tokens are all alike
    x *= draw(st.sampled_from([1, 1, 1e-3, 30]))
    return np.clip(x, -6e4, 6e4).astype(np.float32)


def half(x: float) -> float:
    """To float16 and back, by the struct module."""
    value: float = struct.unpack("<e", struct.pack("<e", x))[0]
    return value


def near(x: float, y: float, relative: float = 2e-3, absolute: float = 1e-6) -> bool:
    return math.isclose(x, y, rel_tol=relative, abs_tol=absolute)


def same_codes(codes: NDArray[np.generic], exact: NDArray[np.float64], slack: float = 2e-3) -> None:
    """Codes are the nearest integers; where two are as near, no arithmetic can say which."""
    exact, codes = np.asarray(exact), codes.astype(np.float64)
    assert codes.shape == exact.shape
    tie = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < slack
    assert (codes[~tie] == np.rint(exact[~tie])).all()
    assert (np.abs(codes - exact)[tie] <= 0.5 + slack).all()


def hadamard(size: int) -> NDArray[np.float64]:
    """Sylvester's matrix: the sign is the parity of the bits that row and column share."""
    rows = [
        [(-1.0) ** bin(i & j).count("1") / math.sqrt(size) for j in range(size)]
        for i in range(size)
    ]
    return np.array(rows)


def from_minimum(group: Sequence[np.float32], bits: int) -> list[np.float32]:
    """KIVI's group, there and back, with scalars of float32."""
    low, high = min(group), max(group)
    minimum = np.float32(half(float(low)))
    scale = np.float32(half(float((high - low) / np.float32(2**bits - 1))))
    back = []
    for x in group:
        code = np.float32(0)
        if scale > 0:
            clipped = min(max((x - minimum) / scale, np.float32(0)), np.float32(2**bits - 1))
            code = np.float32(round(float(clipped)))
        back.append(code * scale + minimum)
    return back


def deviation(row: Sequence[float]) -> float:
    mean = math.fsum(row) / len(row)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in row) / (len(row) - 1))


def balanced(tile: list[Row], iterations: int) -> list[tuple[Row, Row]]:
    """KVarN's scales of columns and rows, a step of the published loop at a time.

    All that are as even as the evenest but for last bits, which alone would choose.
    """
    height, width = len(tile), len(tile[0])
    columns, rows = [0.0] * width, [0.0] * height

    def current() -> list[Row]:
        return [
            [tile[i][j] / math.exp(columns[j]) / math.exp(rows[i]) for j in range(width)]
            for i in range(height)
        ]

    def imbalance(now: list[Row]) -> float:
        total = 0.0
        for lines in (now, list(zip(*now, strict=True))):
            spreads = [deviation(line) for line in lines]
            total += max(spreads) / max(min(spreads), 1e-8)
        return total

    def logarithm(line: Sequence[float]) -> float:
        return math.log(min(max(deviation(line), 1e-3), 1e3))

    def scales() -> tuple[float, tuple[Row, Row]]:
        exponents = ([math.exp(c) for c in columns], [math.exp(r) for r in rows])
        return imbalance(current()), exponents

    tried = [scales()]
    for _ in range(iterations):
        for j, line in enumerate(zip(*current(), strict=True)):
            columns[j] = min(max(columns[j] + logarithm(line), -0.3), 10)
        for i, line in enumerate(current()):
            rows[i] = min(max(rows[i] + logarithm(line), -0.3), 10)
        tried.append(scales())
    least = min(reached for reached, _ in tried)
    return [best for reached, best in tried if reached <= least * (1 + 1e-4)]

"""Engineered cases: where a wrong decision shows. Random data proves nothing here.

Each case is an input and a scheme. `test_backends` runs all backends on them, and `test_mutants`
shows that each mistake it knows changes at least one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from nsq_ref import Scheme, rounding

Float32 = npt.NDArray[np.float32]
Case = tuple[str, Float32, Scheme]


def neighbours(values: Float32) -> Float32:
    """Each value with its two float32 neighbours."""
    down = np.nextafter(values, np.float32(-np.inf))
    up = np.nextafter(values, np.float32(np.inf))
    return np.concatenate([down, values, up]).astype(np.float32)


def code_ties(scheme: Scheme, scale: float) -> Float32:
    """One channel whose scale is known, every tie of its codes and the ties' neighbours (Q1)."""
    low, high = scheme.code_range
    ends = np.float32([low * scale, high * scale])
    ties = (np.arange(low, high, dtype=np.float32) + np.float32(0.5)) * np.float32(scale)
    return np.concatenate([ends, neighbours(ties)])[:, None]


def integer_rows() -> Float32:
    """Rows of norm 64 whose directions over a scale of 1/16 are exact ties, end to end (Q1)."""
    ties = [2, 6, 10, 14, 18, 22, 26]
    rows = []
    for shift, sign in itertools.product(range(7), (1, -1)):
        head = [28, *np.roll(ties, shift)]
        rest = 4096 - sum(v * v for v in head)
        padding = next(
            four
            for four in itertools.product(range(29), repeat=4)
            if sum(v * v for v in four) == rest
        )
        rows.append([sign * v for v in (*head, *padding)])
    return np.float32(rows)


def division_near_ties(count: int = 24) -> Float32:
    """Directions that a division makes an exact tie and a reciprocal does not (N2).

    Channel 0 has scale 1/8, from the first token, whose norm is 8.
    """
    rows = [[7.0, 3.0, 2.0, 1.0, 1.0]]
    rng = np.random.default_rng(0)
    while len(rows) <= count:
        tie = np.float32((rng.integers(0, 6) + 0.5) / 8)
        filler = np.float32(rng.uniform(0.5, 4))
        first = np.float32(filler * tie / np.sqrt(1 - np.float64(tie) ** 2))
        row = np.float32([[first, filler, 0, 0, 0]])
        norm = rounding.norm(row)[0]
        reciprocal = first * (np.float32(1) / norm)
        if first / norm == tie and reciprocal != tie:
            rows.append(row[0].tolist())
    return np.float32(rows)


def scale_near_ties(count: int = 24) -> Float32:
    """A channel of scale s where ``d * (1 / s)`` is a tie and ``d / s`` is not, or the reverse."""
    rng = np.random.default_rng(1)
    columns = []
    while len(columns) < count:
        scale = np.float32(np.float16(rng.uniform(0.01, 0.2)))
        target = np.float32((rng.integers(0, 6) + 0.5) * scale)
        for value in neighbours(np.float32([target])):
            divided = np.rint(value / scale)
            multiplied = np.rint(value * (np.float32(1) / scale))
            if divided != multiplied:
                columns.append([scale * 7, value])
    return np.float32(columns[:count]).T


def narrowing_ties(levels: int) -> Float32:
    """Channels from 0 to a maximum whose quotient by ``levels`` is half way of two float16."""
    halves = np.arange(2049, 2049 + 2 * 40, 2, dtype=np.float32) / np.float32(4096)
    return np.stack([np.zeros(len(halves), np.float32), halves * np.float32(levels)])


def float32_scale_ties(count: int = 24) -> Float32:
    """A float32 scale and values whose quotient is a tie only once it is rounded (Q1)."""
    rng = np.random.default_rng(5)
    columns = []
    while len(columns) < count:
        top = np.float32(rng.uniform(0.1, 1))
        scale = top / np.float32(7)
        code = np.float32(2 * rng.integers(0, 3) + 0.5)
        value = np.nextafter(code * scale, np.float32(1))
        exact = np.float64(value) / np.float64(scale)
        if value / scale == code and exact > code:
            columns.append([top, value])
    return np.float32(columns).T


def norm_ties() -> Float32:
    """Norms on a float32 midpoint, and off it by less than float64 can see (N1)."""
    rows = []
    for exponent, last in itertools.product((0, -40, 40), (0, 1, -1)):
        unit = 2.0**exponent
        tie = [unit, unit * 2.0**-12, unit * 2.0**-12, unit * 2.0**-24]
        rows.append([*tie, unit * 2.0**-30 if last == 1 else 0.0])
        if last == -1:  # a little below the tie: the last square is what would complete it
            rows[-1][3] = float(np.nextafter(np.float32(rows[-1][3]), np.float32(0)))
    return np.float32(rows)


def norm_order(count: int = 64) -> Float32:
    """Norms that float32 accumulation gets wrong."""
    return np.random.default_rng(2).standard_normal((count, 96)).astype(np.float32)


def one_hot(head_dim: int) -> Float32:
    """One-hot tokens, and one of equal channels: the collapse of D2 from D = 4 qmax^2 on."""
    return np.concatenate([np.eye(head_dim), np.ones((1, head_dim))]).astype(np.float32)


def spread(shape: tuple[int, int]) -> Float32:
    """Norms from 1e-30 to 1e30, an outlier channel of 1000 times, a zero token and channel."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal(shape) * 10.0 ** np.linspace(-30, 30, shape[0])[:, None]
    x[:, 0] *= 1000
    x[shape[0] // 2] = 0
    x[:, -1] = -0.0
    return x.astype(np.float32)


def cases() -> Iterator[Case]:
    """All engineered cases, each once."""
    plain: dict[str, Any] = {"separate_norm": False}
    for bits, symmetric in itertools.product((2, 3, 4, 8), (True, False)):
        scheme = Scheme(bits=bits, symmetric=symmetric, **plain)
        for scale in (0.125, 3 * 2.0**-20):  # a normal and a subnormal float16
            yield f"code ties {bits} {symmetric} {scale}", code_ties(scheme, scale), scheme
    for magnitude in ("norm", "gain", "lsq"):
        wide = Scheme(magnitude=magnitude, norm_dtype="float32")  # type: ignore[arg-type]
        yield f"integer rows {magnitude}", integer_rows(), wide
        yield f"norm ties {magnitude}", norm_ties(), wide
        yield f"norm order {magnitude}", norm_order(), wide
        yield f"spread {magnitude}", spread((12, 7)), wide
    yield "division near-ties", division_near_ties(), Scheme()
    yield "scale near-ties", scale_near_ties(), Scheme(**plain)
    yield "scale near-ties asymmetric", scale_near_ties(), Scheme(symmetric=False, **plain)
    for bits, symmetric in itertools.product((3, 4, 8), (True, False)):
        scheme = Scheme(bits=bits, symmetric=symmetric, **plain)
        yield f"scales half way {bits} {symmetric}", narrowing_ties(scheme.code_range[1]), scheme
    exact = Scheme(scale_dtype="float32", **plain)
    yield "float32 scale ties", float32_scale_ties(), exact
    wide_asymmetric = Scheme(bits=8, symmetric=False, scale_dtype="float32", norm_dtype="float32")
    yield "float32 scale and zero", norm_order(16), wide_asymmetric
    for bits, head_dim in ((2, 4), (3, 36), (4, 196), (4, 195)):
        yield f"one-hot {head_dim}", one_hot(head_dim), Scheme(bits=bits, scale_dtype="float32")
    rng = np.random.default_rng(4)
    for head_dim in (1, 3, 96, 128, 256):
        x = rng.standard_normal((9, head_dim)).astype(np.float32)
        for name in ("nsep+pchan4", "nsep+pchan3", "naive2", "nsep+out4", "streaming3"):
            yield f"shape {name} {head_dim}", x, Scheme.named(name)
        yield f"single token {head_dim}", x[:1], Scheme(symmetric=False)
    # float16 scales: subnormal, on the tie that flushes to zero, and above it (S3).
    tiny = np.float32([[7 * 2.0**-25, 7 * 1.5 * 2.0**-25, 7 * 2.0**-24, 7 * 2.5 * 2.0**-24]])
    yield "subnormal scales", np.concatenate([tiny, tiny / 2, -tiny]), Scheme(**plain)
    # float16 norms: half way between two, so that float32 first and float16 second matters (M1).
    # The last: exactly above half way, but half way once it is float32.
    ties = [1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-23, 1 + 3 * 2.0**-11, 1 + 2.0**-11]
    half = np.stack([np.float32(ties), np.float32([0, 0, 0, 2.0**-15])], axis=-1)
    yield "float16 norm ties", half, Scheme()
    constant = np.float32(rng.standard_normal((1, 16)) * 3) * np.ones((4, 1), np.float32)
    yield "constant channels", constant, Scheme(symmetric=False, **plain)
    yield (
        "one-sided",
        np.abs(rng.standard_normal((9, 16))).astype(np.float32),
        Scheme(symmetric=False),
    )
    for symmetric in (True, False):
        for axis in ("channel", "token"):
            scheme = Scheme(bits=2, symmetric=symmetric, axis=axis, scale_rule="search")  # type: ignore[arg-type]
            yield (
                f"search {symmetric} {axis}",
                rng.standard_normal((40, 8)).astype(np.float32),
                scheme,
            )
    blocks = rng.standard_normal((11, 6)).astype(np.float32)
    for size, sinks in itertools.product((1, 4, 11, 12), (0, 1, 11, 12)):
        yield f"blocks {size} {sinks}", blocks, Scheme(block_size=size, sink_tokens=sinks)
    outliers = rng.standard_normal((8, 8)).astype(np.float32)
    outliers[:, [2, 5]] = outliers[:, [5, 5]] * 100  # equal peaks: the lower index wins (O1)
    for count in (1, 2, 4, 9):
        for axis in ("channel", "token"):
            yield f"outliers {count} {axis}", outliers, Scheme(axis=axis, outlier_channels=count)  # type: ignore[arg-type]
    zeros = np.float32([[0, -0.0, 0], [1, -0.0, -1], [-2, 0, 2]])
    for name in ("nsep+pchan4", "naive4", "streaming4"):
        yield f"zeros {name}", zeros, Scheme.named(name)
    yield "all zero", np.zeros((3, 4), np.float32), Scheme(symmetric=False)

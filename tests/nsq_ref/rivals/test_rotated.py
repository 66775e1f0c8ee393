"""OScaR, KVarN, NSNQuant, TurboQuant: what is stored, by plain loops in Python floats.

Sums differ in their last bits, so a code is judged by the number that was rounded (`same_codes`).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from nsq_ref.rivals.codebooks import NsnQuant, TurboQuant, directions, sphere_codebook
from nsq_ref.rivals.codec import Codec, Part
from nsq_ref.rivals.kvarn import Kvarn
from nsq_ref.rivals.oscar import Oscar
from nsq_ref.rivals.rotation import haar
from tests.support import rivals_by_loops as loops
from tests.support.rivals_by_loops import Caches, caches

FEW = settings(max_examples=8, deadline=None)


def turned(x: Caches) -> NDArray[np.float64]:
    return x.astype(np.float64) @ loops.hadamard(x.shape[-1])


def read(codec: Codec, x: Caches) -> tuple[dict[str, Part], NDArray[np.float64]]:
    """The parts, and what they decode to, rotated again."""
    parts = codec.encode(x)
    values = {name: part.values for name, part in parts.items()}
    return parts, turned(codec.decode(values, x.shape))


def close(x: NDArray[np.float64], y: NDArray[np.float64]) -> bool:
    return bool(np.abs(x - y).max() <= 2e-5 * np.abs(y).max() + 1e-12)


@pytest.mark.parametrize("side", ["key", "value"])
@given(x=caches(tokens=[128], head_dims=[32]))
@FEW
def test_oscar(side: str, x: Caches) -> None:
    codec = Oscar(side, bits=2)  # type: ignore[arg-type]
    parts, restored = read(codec, x)
    work, norms = turned(x), np.ones(128)
    if side == "key":  # one norm a token, of all heads together
        for token in range(128):
            norms[token] = math.sqrt(max(math.fsum((x[:, token].astype(float) ** 2).flat), 1e-8))
        assert np.allclose(parts["norm"].values.ravel(), norms, rtol=1e-3)
        work = work / norms[:, None]
    stored_norm = parts["norm"].values.astype(float).ravel() if side == "key" else norms
    codes = parts["codes"].values
    for head in range(2):
        for place, group in groups(work[head], side):
            low, high = min(group), max(group)
            if high - low < 1e-5 * max(abs(low), abs(high), 1e-12):
                continue  # all alike but for the last bits: any zero point will do
            index = (head, *place)
            scale = (high - low) / 3
            zero = -low / scale
            if abs(abs(zero - math.floor(zero)) - 0.5) < 2e-3:
                continue
            assert loops.near(float(parts["scale"].values[index].item()), scale)
            expected = -round(zero) * scale
            minimum = float(parts["minimum"].values[index].item())
            assert loops.near(minimum, expected, absolute=2e-3 * scale)
            exact = np.clip(np.array(group) / scale + round(zero), 0, 3)
            loops.same_codes(codes[index].ravel(), exact, slack=5e-3)
    scale, minimum = (parts[name].values.astype(np.float64) for name in ("scale", "minimum"))
    decoded = (codes * scale + minimum).reshape(x.shape) * stored_norm[:, None]
    assert close(restored, decoded)


def groups(
    work: NDArray[np.float64], side: str
) -> list[tuple[tuple[int | slice, ...], list[float]]]:
    if side == "key":
        return [
            ((first // 32, slice(None), channel), work[first : first + 32, channel].tolist())
            for first in range(0, len(work), 32)
            for channel in range(work.shape[1])
        ]
    return [
        ((token, first // 32), work[token, first : first + 32].tolist())
        for token in range(len(work))
        for first in range(0, work.shape[1], 32)
    ]


@pytest.mark.parametrize("side", ["key", "value"])
@given(x=caches(tokens=[16], head_dims=[8]))
@FEW
def test_kvarn(side: str, x: Caches) -> None:
    codec = Kvarn(side, bits=4, tile=16, sinks=0)  # type: ignore[arg-type]
    parts, restored = read(codec, x)
    column = parts["other_scale"].values.astype(np.float64)
    scale, minimum = (parts[name].values.astype(np.float64) for name in ("scale", "minimum"))
    decoded = (parts["codes"].values * scale + minimum) * column
    decoded = np.swapaxes(decoded, -1, -2) if side == "key" else decoded
    assert close(restored, decoded.reshape(x.shape))
    for head in range(2):
        tile = turned(x)[head]
        tile = tile.T if side == "key" else tile
        if min(map(loops.deviation, [*tile, *tile.T])) < 1e-3 * np.abs(tile).max():
            continue  # a line all alike: its scale is that of the last bits
        chosen = [
            (columns, rows)
            for columns, rows in loops.balanced(tile.tolist(), 16)
            if np.allclose(column[head].ravel(), columns, rtol=2e-3)
            and np.allclose(scale[head].ravel(), np.ptp(tile / columns, axis=1) / 15, rtol=4e-3)
        ]
        assert chosen
        columns, rows = chosen[-1]
        even = tile / np.array(columns) / np.array(rows)[:, None]
        lows, steps = even.min(axis=1), np.ptp(even, axis=1) / 15
        assert np.allclose(minimum[head].ravel(), rows * lows, rtol=4e-3, atol=1e-6)
        exact = (even - lows[:, None]) / steps[:, None]
        loops.same_codes(parts["codes"].values[head, 0], exact, slack=0.02)


@pytest.mark.parametrize("bits", [1, 2])
@given(x=caches(tokens=[64], head_dims=[16]))
@FEW
def test_nsnquant(bits: int, x: Caches) -> None:
    parts, restored = read(NsnQuant(bits), x)
    book = directions(bits == 2).astype(np.float64)
    for head in range(2):
        rows = x[head].astype(np.float64)
        first = np.array([loops.half(math.sqrt(math.fsum(row**2) / 16)) for row in rows])
        assert np.allclose(parts["first"].values[head].ravel(), first, rtol=2e-3)
        first = parts["first"].values[head, 0].astype(float)
        unit = np.divide(rows, first, out=np.zeros_like(rows), where=first > 0)
        shift = np.array([math.fsum(channel) / 64 for channel in unit.T])
        assert np.allclose(parts["shift"].values[head].ravel(), shift, rtol=2e-3, atol=1e-4)
        shift = parts["shift"].values[head, 0].astype(float)
        centred = unit - shift
        second = np.array([math.sqrt(math.fsum(row**2) / 16) for row in centred])
        assert np.allclose(parts["second"].values[head].ravel(), second, rtol=2e-3, atol=1e-6)
        second = parts["second"].values[head, 0].astype(float)
        rotated = centred @ loops.hadamard(16)
        out = np.zeros_like(rows)
        for token in range(64):
            for eight in range(2):
                wanted = rotated[token, 8 * eight : 8 * eight + 8]
                size = np.linalg.norm(wanted)
                aligned = book @ (np.abs(wanted) if bits == 2 else wanted)
                index = int(parts["index"].values[head, 0, token, eight])
                assert aligned[index] >= aligned.max() - 1e-5 * size
                code = book[index]
                if bits == 2:
                    negative = parts["signs"].values[head, 0, token, eight]
                    clear = np.abs(wanted) > 1e-5 * size
                    assert (negative == (wanted < 0))[clear].all()
                    code = np.where(negative, -code, code)
                out[token, 8 * eight : 8 * eight + 8] = code
            length = math.sqrt(math.fsum(out[token] ** 2))
            out[token] *= 4 / length * second[token]
        expected = (out @ loops.hadamard(16) + shift) * first
        assert close(restored[head], expected @ loops.hadamard(16))


@given(x=caches(tokens=[1, 9], head_dims=[3, 20, 64]))
@FEW
def test_turboquant(x: Caches) -> None:
    head_dim = x.shape[-1]
    rotation, book = haar(head_dim), sphere_codebook(head_dim, 3)
    parts = TurboQuant(bits=3).encode(x)
    restored = TurboQuant(bits=3)(x).x_hat.astype(np.float64)
    for index in np.ndindex(x.shape[:-1]):
        token = x[index].astype(np.float64)
        norm = math.sqrt(math.fsum(token**2))
        if norm == 0:
            assert not restored[index].any()
            continue
        rotated = rotation @ (token / norm)
        chosen = book[parts["codes"].values[index]]
        best = np.abs(rotated[:, None] - book).min(axis=1)
        assert (np.abs(rotated - chosen) <= best + 1e-6).all()
        expected = rotation.T @ chosen
        expected *= norm / math.sqrt(math.fsum(chosen**2))
        assert np.allclose(restored[index], expected, rtol=2e-3, atol=1e-3 * norm)
        # The norm is corrected: what is read has that of the token, but for float16.
        assert loops.near(float(np.linalg.norm(restored[index])), norm)


@pytest.mark.parametrize("head_dim", [5, 64])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_turboquant_codebook(bits: int, head_dim: int) -> None:
    """Lloyd's condition: each code is the mean of its cell, by sums over a grid."""
    book = sphere_codebook(head_dim, bits).tolist()
    edges = [-1.0, *((a + b) / 2 for a, b in itertools.pairwise(book)), 1.0]
    for code, low, high in zip(book, edges, edges[1:], strict=False):
        steps = 4000
        xs = [low + (i + 0.5) * (high - low) / steps for i in range(steps)]
        weights = [(1 - x * x) ** ((head_dim - 3) / 2) for x in xs]
        mean = math.fsum(x * w for x, w in zip(xs, weights, strict=True)) / math.fsum(weights)
        assert math.isclose(code, mean, rel_tol=1e-4)


def test_turboquant_codebook_of_many_channels_is_that_of_a_normal_distribution() -> None:
    """Max 1960, table I, at 4 and 8 levels."""
    for bits, table in ((2, [0.4528, 1.510]), (3, [0.2451, 0.7560, 1.344, 2.152])):
        book = sphere_codebook(4096, bits) * 64
        assert np.allclose(book, [*(-x for x in reversed(table)), *table], rtol=2e-3)


def test_rotations_are_rotations() -> None:
    for size in (3, 20, 64):
        assert np.allclose(haar(size).T @ haar(size), np.eye(size))
    for size in (8, 32):
        assert np.allclose(loops.hadamard(size) @ loops.hadamard(size), np.eye(size))

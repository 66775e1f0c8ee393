"""The appends and crops that ports are asked to store a row after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from nsq_ref import spec
from nsq_ref.conformance import model
from nsq_ref.conformance.cases.balanced import held_plain
from nsq_ref.conformance.cases.encode import refusal
from nsq_ref.conformance.cases.pools import Draw
from nsq_ref.conformance.operations import Case
from nsq_ref.dtypes import FLOAT_DTYPES, Array
from nsq_ref.scheme import Scheme

FLOAT16, BFLOAT16, FLOAT32 = (FLOAT_DTYPES[name] for name in ("float16", "bfloat16", "float32"))

# Families whose blocks a cache seals, too.
_STREAMED = (
    "half-even", "reciprocal-of-scale", "merged-division", "reciprocal-of-norm", "tiny-norm",
    "norm-accumulation", "norm-narrowing", "factor-narrowing", "scale-narrowing", "scale-range",
    "negative-zero", "outlier-channels",
)  # fmt: skip


def stream_cases(encoded: Iterable[Case], scheme: Scheme, seed: int) -> Iterator[Case]:
    """Yield the cases of the operation ``"stream"``; some are blocks of cases of encode."""
    if scheme.block_size is None:
        return
    tokens = scheme.sink_tokens + scheme.block_size
    for source in encoded:
        x = source.inputs["x"]
        streamed = source.flags[0] in _STREAMED and source.refused_by is None
        if tokens > 64:  # one of each will do
            streamed &= source.id.split("/")[1] in ("0", "100", "200")
        if streamed and len(x) <= tokens and tokens * x.shape[-1] <= 1300:
            padded = np.zeros((1, tokens, x.shape[-1]), x.dtype)  # zero tokens fill the block
            padded[0, : len(x)] = x
            if refusal(padded[0], scheme) is None:
                inputs = _stream_inputs(padded, [(0, tokens)], 0)
                yield replace(source, operation="stream", inputs=inputs)
    draw = Draw(seed, "stream")
    size, sinks = scheme.block_size, scheme.sink_tokens
    head_dim = 2 if size > 16 else 4
    numbers: dict[str, Iterator[int]] = defaultdict(count)
    histories = [(one, head_dim) for one in _histories(sinks, size)]
    histories += [(one, 4) for one in _later_histories(sinks, size)]
    for (flag, dtype, row, steps), head_dim in histories:
        x = _rows(draw, steps, row, size, head_dim).astype(dtype)
        if flag == "crop-saturation":
            block = _decoded_beyond_float16(scheme, draw, size, head_dim)
            if block is None and not scheme.symmetric:
                block = _looked_for_beyond_float16(scheme, size)
            if block is None:  # the scheme decodes to nothing so large
                continue
            x = np.concatenate([np.ones((sinks, block.shape[-1]), FLOAT16), block])[None]
        inputs = _stream_inputs(x, steps, row)
        yield Case(f"{flag}/{next(numbers[flag])}", "stream", scheme, (flag,), inputs)
    if size > 1:  # sinks and a tail of which float16 holds no value as it came
        x = draw.bell(1, sinks + size - 1, 4).astype(np.float64)
        x *= np.ldexp(1.0, np.array([40, -40, 20, -30]))
        inputs = _stream_inputs(x.astype(BFLOAT16), [(0, x.shape[1])], 0)
        yield Case("kept-as-it-came/0", "stream", scheme, ("kept-as-it-came",), inputs)
    for number, (x, rule) in enumerate(_refused(scheme, draw, size, head_dim)):
        inputs = _stream_inputs(x, [(0, sinks), (0, x.shape[1] - sinks)], 0)
        yield Case(f"refused-step/{number}", "stream", scheme, ("refused-step",), inputs, rule)


def _refused(scheme: Scheme, draw: Draw, size: int, head_dim: int) -> Iterator[tuple[Array, str]]:
    """Yield rows of one sequence with what must be refused, and the rule that says so."""
    sinks = scheme.sink_tokens
    tokens = sinks + size + (size + 1) // 2
    for value, place, dtype in (
        (np.nan, 0, FLOAT32), (np.inf, sinks + size // 2, FLOAT16), (np.nan, tokens - 1, BFLOAT16),
        (-np.inf, tokens - 1, FLOAT32),
    ):  # fmt: skip
        x = draw.bell(1, tokens, head_dim).astype(dtype)
        x[0, place, -1] = value
        yield x, "I2"
    x = draw.bell(1, tokens, head_dim)
    x[0, sinks + size // 2] = 3e38
    rule = refusal(x[0, sinks : sinks + size], replace(scheme, sink_tokens=0))
    if rule is not None:
        yield x, rule


_Steps = Sequence[tuple[int, ...]]  # ``(kind, number of row 0, number of row 1, ...)``


def _stream_inputs(x: Array, steps: _Steps, row: int) -> dict[str, Array]:
    return {"x": x, "steps": np.array(steps, np.int32), "row": np.array([row], np.int32)}


def _rows(draw: Draw, steps: _Steps, row: int, size: int, head_dim: int) -> Array:
    """Draw rows, each block of another magnitude, and other rows a thousand times as large."""
    appended = np.array([numbers for kind, *numbers in steps if kind == model.APPEND])
    tokens = int(appended.sum(axis=0).max())
    x = draw.bell(appended.shape[1], tokens, head_dim).astype(np.float64)
    x *= np.ldexp(1.0, (np.arange(tokens) * 2 // size) % 5)[:, None]
    x[np.arange(len(x)) != row] *= 1000
    return x


def _histories(sinks: int, size: int) -> Iterator[tuple[str, np.dtype[Any], int, _Steps]]:
    """Yield flag, dtype, the row that is asked about, and appends (0) and crops (1)."""
    inside = sinks + size + (size + 1) // 2  # in the second block
    whole = sinks + 2 * size + 1

    def one(flag: str, *steps: tuple[int, int]) -> tuple[str, np.dtype[Any], int, _Steps]:
        return flag, FLOAT32, 0, steps

    yield one("stream-append", (0, whole))
    yield one("stream-append", *[(0, 1)] * (sinks + size + 1))
    yield one("stream-append", (0, sinks + size - 1), (0, 2), (0, size), (0, 0))
    yield one("stream-append", (0, sinks), (0, size), (0, size))
    yield one("stream-append", (0, sinks + max(size - 1, 1)))
    if sinks:
        yield one("stream-append", (0, sinks - 1), (0, size))
        yield one("stream-append", (0, sinks))
    for dtype in (FLOAT32, FLOAT16, BFLOAT16):
        if size > 1:
            yield "crop-block", dtype, 0, [(0, whole), (1, inside)]
            yield "crop-block", dtype, 0, [(0, whole), (1, inside), (0, 2 * size)]
        yield "crop-edge", dtype, 0, [(0, whole), (1, sinks + size), (0, size + 1)]
    if size > 1:
        yield one("crop-block", (0, whole), (1, sinks + 1), (0, 1), (0, size))
        yield one("crop-block", (0, whole), (1, inside), (1, inside - 1), (0, size))
        yield one("crop-tail", (0, sinks + 2 * size - 1), (1, inside), (0, size))
        yield "crop-tail", FLOAT16, 0, [(0, sinks + size - 1), (1, sinks + 1), (0, size)]
    yield one("crop-start", (0, sinks + size), (1, 0), (0, sinks + size))
    yield one("crop-start", (0, sinks + size), (1, sinks), (0, size))
    for length in range(1, sinks):
        yield one("crop-start", (0, sinks + size), (1, length), (0, sinks + size))
    yield one("crop-edge", (0, whole), (1, whole), (0, 1))
    ragged = [(0, size, sinks + size + 1, 1), (0, size, 0, 2), (0, 0, size, size)]
    for row in range(3):
        yield "ragged-batch", FLOAT32, row, ragged
    cropped = [(1, sinks + 1, sinks + size + size // 2, 0), (0, size, size, size)]
    yield "ragged-batch", FLOAT32, 1, ragged + cropped
    if size > 1:
        yield "crop-saturation", FLOAT16, 0, [(0, sinks + size), (1, sinks + size - 1)]


def _later_histories(sinks: int, size: int) -> Iterator[tuple[str, np.dtype[Any], int, _Steps]]:
    """Yield what was added after the first release of vectors."""
    inside = sinks + size + (size + 1) // 2
    whole = sinks + 2 * size + 1
    for dtype in (FLOAT32, FLOAT16, BFLOAT16):
        yield "sinks-in-pieces", dtype, 0, [(0, 0), *[(0, 1)] * (sinks + 1), (0, 0), (0, size)]
        yield "sinks-in-pieces", dtype, 0, [(0, 1), (0, sinks + size), (1, 0), (0, 1), (0, whole)]
        if size > 2:
            last = sinks + 2 * size + 1  # the second token of the third block
            steps = [(0, sinks + 3 * size), (1, last), (0, 1), (1, last - 1), (0, 2 * size)]
            yield "crop-block", dtype, 0, steps
            steps = [(0, whole), (1, sinks + size - 1), (1, sinks + 2), (0, size)]
            yield "crop-block", dtype, 0, steps
            steps = [(0, sinks + 2 * size - 1), (1, sinks + size + 1), (0, size)]
            yield "crop-tail", dtype, 0, steps
    for dtype in (FLOAT16, BFLOAT16):
        yield "stream-append", dtype, 0, [(0, sinks + size - 1), (0, 2), (0, size)]
        yield "crop-start", dtype, 0, [(0, sinks + size), (1, 0), (0, sinks + size)]
        yield "crop-edge", dtype, 0, [(0, whole), (1, sinks + size), (0, size)]
        if size > 1:
            steps = [(0, whole), (1, sinks + size), (0, size - 1), (1, inside - 1), (0, size)]
            yield "crop-edge", dtype, 0, steps


def _decoded_beyond_float16(scheme: Scheme, draw: Draw, size: int, head_dim: int) -> Array | None:
    """Return a block of float16 that is accepted, and decodes to values beyond float16."""
    for number in range(8):
        x = 500 * draw.bell(1024, size, head_dim).astype(np.float64)
        x[:, 0] = 65504 * draw.uniform(-0.02, 0.02, 1024, head_dim)
        x[:, 0, 0] = 65504
        x[:, 0, 1] = 65504 * draw.uniform(-0.12, 0.12, 1024)
        if number:  # the least direction, and so the rounding of the scale, is another each time
            x[:, 1:, 0] *= draw.uniform(0.2, 1, 1024, 1)
        pool = x.astype(FLOAT16)
        decoded = spec.decode(spec.encode(pool.astype(np.float32), scheme), scheme)
        beyond = np.isfinite(decoded).all(axis=(1, 2))
        beyond &= np.any(np.abs(decoded[:, :-1]) >= 65520, axis=(1, 2))
        for block in pool[beyond][:8]:
            if refusal(block, replace(scheme, sink_tokens=0)) is None:
                return np.asarray(block)
    return None


def _looked_for_beyond_float16(scheme: Scheme, size: int) -> Array | None:
    """Return such a block of an asymmetric scheme with a gain, where chance finds none.

    The first channel's scale is rounded up, so that its largest code is more than 1, and what a
    second channel is larger than its code raises the gain of the first token.
    """
    least = np.arange(128, 1000) / 1024
    x = np.zeros((len(least), min(size, 25), 3))
    x[:, 0, 0], x[:, 1::3, 0], x[:, 3::3, 1] = 65504, 512, 512
    x[:, 2::3, 0], x[:, 2::3, 2] = -512 * least[:, None], 512 * np.sqrt(1 - least**2)[:, None]
    pool = held_plain(x.astype(FLOAT16), replace(scheme, sink_tokens=0))
    block = spec.encode(pool.astype(np.float32), scheme)
    largest = block.scale * np.float32(scheme.code_range[1]) + block.zero
    second = np.arange(6000, 30000, 16)
    pool = np.repeat(pool[[np.argmax(largest[:, 0, 0])]], len(second), axis=0)
    pool[:, 0, 1] = second
    decoded = spec.decode(spec.encode(pool.astype(np.float32), scheme), scheme)
    for few in pool[decoded[:, 0, 0] >= 65520]:
        whole = np.concatenate([few[:1], np.resize(few[1:], (size - 1, few.shape[-1]))])
        if refusal(whole, replace(scheme, sink_tokens=0)) is None:
            return np.asarray(whole)
    return None

"""Bytes (rule P1)."""

from __future__ import annotations

import numpy as np

from nsq_ref import Scheme
from tests.support.wrong_ports.exact import Array
from tests.support.wrong_ports.knobs import Knobs


def bit_rows(numbers: Array, width: int, filler: int) -> Array:
    """Return rows of numbers of `width` bits, the first in the lowest bits, filled to bytes."""
    per_byte = 8 // width
    missing = -numbers.shape[1] % per_byte
    filled = np.concatenate([numbers, np.full((len(numbers), missing), filler)], axis=1)
    shifts = width * np.arange(per_byte)
    grouped = filled.reshape(len(numbers), -1, per_byte) << shifts
    return grouped.sum(axis=2).astype(np.uint8)


def offset_numbers(codes: Array, scheme: Scheme, knobs: Knobs) -> Array:
    if not scheme.symmetric:
        return codes
    middle = 2 ** (scheme.bits - 1)
    return {
        "right": lambda: codes + middle,
        "one less": lambda: (codes + middle - 1) % (2 * middle),
        "two's complement": lambda: codes % (2 * middle),
        "sign": lambda: np.abs(codes) + middle * (codes < 0),
        "negated": lambda: -codes + middle,
    }[knobs.offset]()


def packed_rows(codes: Array, scheme: Scheme, knobs: Knobs) -> Array:
    bits, head_dim = scheme.bits, codes.shape[1]
    numbers = offset_numbers(codes, scheme, knobs)
    zero = int(offset_numbers(np.zeros((1, 1), int), scheme, knobs)[0, 0])
    if knobs.padding == "zero bits":
        zero = 0
    elif knobs.padding == "last code":
        zero = int(numbers[-1, -1])
    if bits == 3 and knobs.planes == "contiguous":
        run = (numbers[..., None] >> np.arange(3) & 1).reshape(len(codes), -1)
        size = -(-head_dim // 4) + -(-head_dim // 8)
        run = np.concatenate([run, np.zeros((len(run), 8 * size - run.shape[1]), int)], axis=1)
        return bit_rows(run, 1, 0)
    if bits == 3:
        low = bit_rows(numbers & 3, 2, zero & 3)
        high = bit_rows(numbers >> 2, 1, zero >> 2)
        if knobs.planes == "high bits of a byte first":
            low = bit_rows(numbers >> 1, 2, zero >> 1)
            high = bit_rows(numbers & 1, 1, zero & 1)
        both = [high, low] if knobs.planes == "high, low" else [low, high]
        return np.concatenate(both, axis=1)
    per_byte = 8 // bits
    if knobs.rows == "shared" and head_dim % per_byte:
        size = -(-head_dim // per_byte)
        flat = bit_rows(numbers.reshape(1, -1), bits, zero).ravel()
        filler = np.zeros(len(codes) * size - len(flat), np.uint8)
        return np.concatenate([flat, filler]).reshape(len(codes), size)
    if knobs.nibbles == "halves" and bits == 4 and head_dim % 2 == 0:
        numbers = numbers.reshape(len(codes), 2, -1).swapaxes(1, 2).reshape(len(codes), -1)
    if knobs.nibbles == "high-first":
        missing = -head_dim % per_byte
        filled = np.concatenate([numbers, np.full((len(codes), missing), zero)], axis=1)
        numbers = filled.reshape(len(codes), -1, per_byte)[..., ::-1].reshape(len(codes), -1)
    rows = bit_rows(numbers, bits, zero)
    if knobs.last_byte == "dropped" and head_dim % per_byte:
        rows = rows[:, :-1]
    return rows


def unpacked_rows(packed: Array, scheme: Scheme, head_dim: int, knobs: Knobs) -> Array:
    bits = scheme.bits
    rows = packed.astype(int)

    def numbers(part: Array, width: int) -> Array:
        shifts = width * np.arange(8 // width)
        if knobs.nibbles == "high-first" and width > 1:
            shifts = shifts[::-1]
        return (part[..., None] >> shifts & (2**width - 1)).reshape(len(part), -1)[:, :head_dim]

    if bits == 3:
        split = -(-head_dim // 4)
        low, high = rows[:, :split], rows[:, split:]
        if knobs.planes == "high, low":
            split = -(-head_dim // 8)
            high, low = rows[:, :split], rows[:, split:]
        if knobs.planes == "contiguous":
            run = (rows[..., None] >> np.arange(8) & 1).reshape(len(rows), -1)[:, : 3 * head_dim]
            found = (run.reshape(len(rows), head_dim, 3) << np.arange(3)).sum(axis=2)
        else:
            found = numbers(low, 2) + 4 * numbers(high, 1)
    else:
        found = numbers(rows, bits)
    if not scheme.symmetric:
        return found
    middle = 2 ** (bits - 1)
    if knobs.offset == "two's complement":
        return (found + middle) % (2 * middle) - middle
    return found - middle + (knobs.offset == "one less")

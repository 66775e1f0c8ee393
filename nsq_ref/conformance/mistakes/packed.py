"""Codes stored in other bytes (rule P1): each packs so and reads so again."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from nsq_ref.conformance.mistakes.changes import CODED, ENCODE, READ, Function, after, around
from nsq_ref.conformance.mistakes.reference import Change, Mistake
from nsq_ref.scheme import Scheme, row_bytes


def _changes(pack: Function, unpack: Function) -> dict[str, Change]:
    return {"packing.pack": around(pack), "packing.unpack": around(unpack)}


def _bytes_with(there: Function, back: Function) -> dict[str, Change]:
    """P1 with its bytes changed: ``there(packed, scheme, head_dim)``, and ``back`` again."""
    return {
        "packing.pack": after(lambda packed, codes, scheme: there(packed, scheme, codes.shape[-1])),
        "packing.unpack": around(
            lambda original, packed, scheme, head_dim: original(
                back(packed, scheme, head_dim), scheme, head_dim
            )
        ),
    }


def _highest_first(packed: Any, scheme: Scheme, head_dim: int) -> Any:
    if scheme.bits == 4:
        return packed << 4 | packed >> 4
    if scheme.bits == 2:
        return (packed & 3) << 6 | (packed & 12) << 2 | packed >> 2 & 12 | packed >> 6
    return packed


def _high_row_moved(way: int, packed: Any, scheme: Scheme, head_dim: int) -> Any:
    return np.roll(packed, way * row_bytes(head_dim, 1), -1) if scheme.bits == 3 else packed


def _channels_in(order: Function) -> dict[str, Change]:
    def pack(original: Function, codes: Any, scheme: Scheme) -> Any:
        return original(codes[..., order(scheme, codes.shape[-1])], scheme)

    def unpack(original: Function, packed: Any, scheme: Scheme, head_dim: int) -> Any:
        codes = original(packed, scheme, head_dim)
        right = np.empty_like(codes)
        right[..., order(scheme, head_dim)] = codes
        return right

    return _changes(pack, unpack)


def _halves_apart(scheme: Scheme, head_dim: int) -> Any:
    channel = np.arange(head_dim)
    if scheme.bits != 4 or head_dim % 2:
        return channel
    return channel.reshape(2, -1).T.reshape(-1)


def stored_as(there: Function, back: Function) -> dict[str, Change]:
    """P1 with another number for a symmetric code: ``there(codes, scheme)``, and ``back``."""

    def pack(original: Function, codes: Any, scheme: Scheme) -> Any:
        if not scheme.symmetric:
            return original(codes, scheme)
        numbers = there(codes.astype(np.int16), scheme)
        # The padding is code 0 too, whatever stands for it.
        head_dim = codes.shape[-1]
        zero = there(np.zeros((*codes.shape[:-1], -head_dim % 8), np.int16), scheme)
        numbers = np.concatenate([numbers, zero], axis=-1)
        packed = original(numbers, replace(scheme, symmetric=False))
        if scheme.bits != 3:
            return packed[..., : row_bytes(head_dim, scheme.bits)]
        high = packed[..., row_bytes(numbers.shape[-1], 2) :]
        return np.concatenate(
            [packed[..., : row_bytes(head_dim, 2)], high[..., : row_bytes(head_dim, 1)]], axis=-1
        )

    def unpack(original: Function, packed: Any, scheme: Scheme, head_dim: int) -> Any:
        if not scheme.symmetric:
            return original(packed, scheme, head_dim)
        return back(original(packed, replace(scheme, symmetric=False), head_dim), scheme)

    return _changes(pack, unpack)


def _run_of_three() -> dict[str, Change]:
    def pack(original: Function, codes: Any, scheme: Scheme) -> Any:
        right = original(codes, scheme)
        if scheme.bits != 3:
            return right
        stored = codes.astype(np.int16) + scheme.code_offset
        bits = (stored[..., None] >> np.arange(3) & 1).astype(np.uint8)
        row = np.zeros((*right.shape[:-1], 8 * right.shape[-1]), np.uint8)
        row[..., : 3 * codes.shape[-1]] = bits.reshape(*codes.shape[:-1], 3 * codes.shape[-1])
        return np.packbits(row, axis=-1, bitorder="little")

    def unpack(original: Function, packed: Any, scheme: Scheme, head_dim: int) -> Any:
        if scheme.bits != 3:
            return original(packed, scheme, head_dim)
        row = np.unpackbits(packed, axis=-1, bitorder="little")[..., : 3 * head_dim]
        bits = row.reshape(*packed.shape[:-1], head_dim, 3).astype(np.int16)
        return (bits << np.arange(3, dtype=np.int16)).sum(-1, dtype=np.int16) - np.int16(
            scheme.code_offset
        )

    return _changes(pack, unpack)


def _rows_that_share_bytes() -> dict[str, Change]:
    def pack(original: Function, codes: Any, scheme: Scheme) -> Any:
        if not codes.size:
            return original(codes, scheme)
        right = original(codes, scheme)
        run = original(codes.reshape(*codes.shape[:-2], -1), scheme)
        packed = np.zeros((*codes.shape[:-2], right.shape[-2] * right.shape[-1]), np.uint8)
        packed[..., : run.shape[-1]] = run
        return packed.reshape(right.shape)

    def unpack(original: Function, packed: Any, scheme: Scheme, head_dim: int) -> Any:
        if not packed.size:
            return original(packed, scheme, head_dim)
        tokens = packed.shape[-2]
        run = packed.reshape(*packed.shape[:-2], -1)[
            ..., : row_bytes(tokens * head_dim, scheme.bits)
        ]
        codes = original(run, scheme, tokens * head_dim)
        return codes.reshape(*packed.shape[:-1], head_dim)

    return _changes(pack, unpack)


def _zero_padding(packed: Any, codes: Any, scheme: Scheme) -> Any:
    head_dim = codes.shape[-1]
    kept = np.zeros(packed.shape[-1] * 8, np.uint8)
    if scheme.bits == 3:
        split = -(-head_dim // 4) * 8
        kept[: 2 * head_dim] = 1
        kept[split : split + head_dim] = 1
    else:
        kept[: scheme.bits * head_dim] = 1
    return packed & np.packbits(kept, bitorder="little")


def _masked(original: Function, packed: Any, scheme: Scheme, head_dim: int) -> Any:
    codes, offset = original(packed, scheme, head_dim), np.int16(scheme.code_offset)
    return (codes + offset & 3) - offset if scheme.bits == 4 else codes


PACKED = [
    Mistake("highest bits first", "P1",
        "the order of the channels in each byte is turned round (nibbles swapped)",
        CODED, _bytes_with(_highest_first, _highest_first)),
    Mistake("two's complement", "P1", "codes are stored in two's complement, not with an offset",
        CODED, stored_as(
            lambda codes, scheme: codes & (2**scheme.bits - 1),
            lambda numbers, scheme: (numbers ^ scheme.code_offset) - np.int16(scheme.code_offset))),
    Mistake("offset one too small", "P1", "the offset of the codes is qmax, not 2^(bits-1)",
        CODED, stored_as(
            lambda codes, scheme: codes + np.int16(scheme.code_offset - 1),
            lambda numbers, scheme: numbers - np.int16(scheme.code_offset - 1))),
    Mistake("sign and magnitude", "P1",
        "codes are stored as sign and magnitude, not with an offset",
        CODED, stored_as(
            lambda codes, scheme: np.abs(codes) + np.int16(scheme.code_offset) * (codes < 0),
            lambda numbers, scheme: np.where(
                numbers >= scheme.code_offset, scheme.code_offset - numbers, numbers
            ).astype(np.int16))),
    Mistake("rows that share bytes", "P1", "a row starts in the byte where the one before ends",
        CODED, _rows_that_share_bytes()),
    Mistake("halves of the row in one byte", "P1", "a byte holds a channel of each half of the row",
        CODED, _channels_in(_halves_apart)),
    Mistake("3-bit codes one behind the other", "P1",
        "3-bit codes are one run of bits; they are a row of 2 bits and a row of 1",
        CODED, _run_of_three()),
    Mistake("high bits before low bits", "P1",
        "the row of high bits comes before the row of low bits",
        CODED, _bytes_with(partial(_high_row_moved, 1), partial(_high_row_moved, -1))),
    Mistake("mask of two bits", "P1", "4-bit codes are masked by 3, as if they had 2 bits",
        READ, {"packing.unpack": around(_masked)}),
    Mistake("padding with zero bits", "P1",
        "the padding of the last byte is zero bits; it is code 0, whose bits are not zero",
        ENCODE, {"packing.pack": after(_zero_padding)}),
]  # fmt: skip

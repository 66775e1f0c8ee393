"""Mistakes that implementers are known to make, each one decision away from the specification.

`diagnose` puts them into the reference until it gives what a port gave, and the tests of the kit
make ports of them. A mistake that its table entry cannot express is a missing function of `spec`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from nsq_ref.conformance.reference import Change, Mistake, Reference
from nsq_ref.scheme import FLOAT_DTYPES, Scheme, row_bytes

__all__ = ["MISTAKES"]

ENCODE = ("encode", "stream")
DECODE = ("decode", "stream")
STREAM = ("stream",)
ATTEND = ("attend",)
Function = Callable[..., Any]
F32, F64 = np.float32, np.float64


# --- what the entries are made of ---------------------------------------------------------------


def instead(function: Function) -> Change:
    """Put a function in place of the right one."""
    return lambda original, reference: function


def after(function: Function) -> Change:
    """Change what the right function returns: ``function(result, *arguments)``."""

    def change(original: Function, reference: Reference) -> Function:
        return lambda *arguments: function(original(*arguments), *arguments)

    return change


def around(function: Function) -> Change:
    """Call ``function(original, *arguments)``."""

    def change(original: Function, reference: Reference) -> Function:
        return lambda *arguments, **options: function(original, *arguments, **options)

    return change


def knowing(function: Function) -> Change:
    """Call ``function(reference, *arguments)``, for changes that need the other rules."""

    def change(original: Function, reference: Reference) -> Function:
        return lambda *arguments: function(reference, *arguments)

    return change


def divisor(value: Any) -> Any:
    """Return what is divided by so that a division by zero gives zero."""
    return np.where(value == 0, value.dtype.type(np.inf), value)


def clamped(values: Any, scheme: Scheme) -> Any:
    return np.clip(values, *map(F32, scheme.code_range))


def quotient(direction: Any, scale: Any, zero: Any) -> Any:
    return (direction - zero.astype(F32)) / divisor(scale.astype(F32))


def rounding_with(function: Function) -> Change:
    """Q1 with another rounding of the quotient."""
    return instead(
        lambda direction, scale, zero, scheme: clamped(
            function(quotient(direction, scale, zero)), scheme
        ).astype(F32)
    )


def dividing_with(function: Function) -> Change:
    """Q1 with another quotient of ``direction``, float32 ``scale`` and ``zero``."""
    return instead(
        lambda direction, scale, zero, scheme: clamped(
            np.rint(function(direction, scale.astype(F32), zero.astype(F32))), scheme
        ).astype(F32)
    )


def half_away(value: Any) -> Any:
    return np.copysign(np.floor(np.abs(value).astype(F64) + 0.5), value)


def half_toward_zero(value: Any) -> Any:
    return np.copysign(np.ceil(np.abs(value).astype(F64) - 0.5), value)


def half_up(value: Any) -> Any:
    return np.floor(value.astype(F64) + 0.5)


def half_down(value: Any) -> Any:
    return np.ceil(value.astype(F64) - 0.5)


def plus_half_in_float32(value: Any) -> Any:
    return np.copysign(np.floor(np.abs(value) + F32(0.5)), value)


def half_odd(value: Any) -> Any:
    rounded = np.rint(value)
    return np.where(np.abs(value - np.trunc(value)) == 0.5, 2 * value - rounded, rounded)


def wrapped_to_int8(value: Any) -> Any:
    """Cast to int8 before the clamp, as C does where it does not trap: the low byte."""
    whole = np.clip(np.nan_to_num(np.rint(value.astype(F64))), -(2.0**62), 2.0**62)
    return whole.astype(np.int64).astype(np.int8).astype(F32)


# Sums of squares ---------------------------------------------------------------------------------


def norm_from(square_sum: Function) -> Change:
    return instead(lambda x: np.sqrt(square_sum(x)).astype(F32))


def sequential(x: Any) -> Any:
    return np.add.accumulate(x * x, axis=-1)[..., -1]


def sequential_fused(x: Any) -> Any:
    total = np.zeros(x.shape[:-1], F32)
    for j in range(x.shape[-1]):
        total = (total.astype(F64) + np.square(x[..., j], dtype=F64)).astype(F32)
    return total


def added_by_halves(terms: Any) -> Any:
    """Add a power of two of terms as a tree."""
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def pairwise(x: Any) -> Any:
    """A tree over the next power of two."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    padded = np.concatenate([x, np.zeros((*x.shape[:-1], size - x.shape[-1]), F32)], axis=-1)
    return added_by_halves(padded * padded)


def neighbours_first(x: Any) -> Any:
    squares = x * x
    while squares.shape[-1] > 1:
        if squares.shape[-1] % 2:
            squares = np.concatenate([squares, np.zeros((*squares.shape[:-1], 1), F32)], axis=-1)
        squares = squares[..., ::2] + squares[..., 1::2]
    return squares[..., 0]


def in_lanes(lanes: int) -> Function:
    """Sequential sums in so many lanes, which are then added as a tree."""

    def total(x: Any) -> Any:
        missing = -x.shape[-1] % lanes
        padded = np.concatenate([x, np.zeros((*x.shape[:-1], missing), F32)], axis=-1)
        rows = padded.reshape(*x.shape[:-1], -1, lanes)
        return added_by_halves(np.add.accumulate(rows * rows, axis=-2)[..., -1, :])

    return total


def in_float64(x: Any) -> Any:
    return np.add.accumulate(np.square(x, dtype=F64), axis=-1)[..., -1]


def in_float16(x: Any) -> Any:
    half = x.astype(np.float16)
    return np.add.accumulate(half * half, axis=-1)[..., -1].astype(F32)


def order_minus_one(x: Any) -> Any:
    total = np.sum(1 / np.abs(x.astype(F64)), axis=-1)
    return (1 / total).astype(F32)


# Directions --------------------------------------------------------------------------------------


def with_epsilon(epsilon: float) -> Change:
    return instead(lambda x, norm: x / (norm + F32(epsilon))[..., None])


def with_least(epsilon: float) -> Change:
    return instead(lambda x, norm: x / np.maximum(norm, F32(epsilon))[..., None])


def direction_from_narrowed(dtype: str) -> Change:
    return knowing(
        lambda reference, x, norm: (
            x / divisor(reference.rounding.narrow(norm, FLOAT_DTYPES[dtype]).astype(F32))[..., None]
        )
    )


def narrowed_direction(dtype: str) -> Change:
    def change(original: Function, reference: Reference) -> Function:
        def direction_of(x: Any, norm: Any) -> Any:
            narrow = reference.rounding.narrow
            return narrow(original(x, norm), FLOAT_DTYPES[dtype]).astype(F32)

        return direction_of

    return change


def direction_in_float64(x: Any, norm: Any) -> Any:
    """Divide by the norm that float64 gives, rounding once."""
    if np.all(norm == 1):  # without norm separation
        return x
    length = np.sqrt(np.sum(np.square(x, dtype=F64), axis=-1))
    return (x / divisor(length)[..., None]).astype(F32)


def square_with_epsilon(epsilon: float) -> Function:
    def direction(x: Any, norm: Any) -> Any:
        total = np.sum(np.square(x, dtype=F64), axis=-1) + epsilon
        return x / np.sqrt(total).astype(F32)[..., None]

    return direction


# Ranges and scales -------------------------------------------------------------------------------


def levels_of(count: Callable[[Scheme], float]) -> Change:
    """S1, S2 with another number of levels."""
    return knowing(
        lambda reference, span, scheme: reference.rounding.narrow(
            span / F32(count(scheme)), FLOAT_DTYPES[scheme.scale_dtype]
        )
    )


def scale_from(wide_scale: Function) -> Change:
    """S1 to S3 with another quotient of ``span`` and the number of levels."""
    return knowing(
        lambda reference, span, scheme: reference.rounding.narrow(
            wide_scale(span, F32(scheme.code_range[1])), FLOAT_DTYPES[scheme.scale_dtype]
        )
    )


def only_if(symmetric: bool, function: Function) -> Change:
    """Call ``function(result, *arguments, scheme)`` for schemes of this symmetry."""
    return after(
        lambda result, *arguments: (
            function(result, *arguments) if arguments[-1].symmetric == symmetric else result
        )
    )


def over_everything(reference: Reference, direction: Any, coded: Any, scheme: Scheme) -> Any:
    """One range for all channels of the block, or all tokens."""
    values = np.where(coded, direction, 0)
    axes = (-2, -1)
    low, high = values.min(axis=axes, keepdims=True), values.max(axis=axes, keepdims=True)
    shape = list(direction.shape)
    shape[-2 if scheme.axis == "channel" else -1] = 1
    return np.broadcast_to(low, shape), np.broadcast_to(high, shape)


def shared_by_heads(result: Any, direction: Any, coded: Any, scheme: Scheme) -> Any:
    """One range for all leading axes."""
    low, high = result
    lead = tuple(range(direction.ndim - 2))
    return (
        np.broadcast_to(low.min(axis=lead, keepdims=True), low.shape),
        np.broadcast_to(high.max(axis=lead, keepdims=True), high.shape),
    )


def remember_sinks(original: Function, reference: Reference) -> Function:
    def split_sinks(x: Any, scheme: Scheme) -> Any:
        sinks, coded = original(x, scheme)
        reference.sinks = sinks
        return sinks, coded

    return split_sinks


def remember_sinks_of_a_sequence(original: Function, reference: Reference) -> Function:
    def seal(sequence: Any) -> None:
        reference.sinks = np.array(sequence.sinks).reshape(-1, sequence.head_dim)
        original(sequence)

    return seal


def range_with_sinks(original: Function, reference: Reference) -> Function:
    def extent(direction: Any, coded: Any, scheme: Scheme) -> Any:
        if scheme.axis == "token" or not scheme.sink_tokens or not reference.sinks.size:
            return original(direction, coded, scheme)
        sinks = reference.sinks.astype(F32)
        if scheme.separate_norm:
            sinks = reference.spec.direction_of(sinks, reference.rounding.norm(sinks))
        return original(np.concatenate([sinks, direction], axis=-2), coded, scheme)

    return extent


def without_zero_tokens(original: Function, direction: Any, coded: Any, scheme: Scheme) -> Any:
    zero = ~np.any(direction != 0, axis=-1, keepdims=True)
    return original(direction, coded & ~zero, scheme)


def wide_scale(reference: Reference, direction: Any, scheme: Scheme) -> tuple[Any, Any]:
    """Scale and zero of a block in float32, before they are narrowed."""
    wide = replace(scheme, scale_dtype="float32", scale_rule="range")
    coded = reference.coded.get(direction.tobytes(), np.ones(direction.shape, bool))
    low, high = reference.spec.extent(direction, coded, wide)
    scale, zero = reference.spec.range_scale(low, high, wide)
    return scale, zero


def remember_coded(original: Function, reference: Reference) -> Function:
    """Keep which channels of which directions are coded: the others enter no scale."""
    reference.coded = {}

    def extent(direction: Any, coded: Any, scheme: Scheme) -> Any:
        reference.coded = {direction.tobytes(): coded, **dict([*reference.coded.items()][:64])}
        return original(direction, coded, scheme)

    return extent


def code_before_narrowing(original: Function, reference: Reference) -> Function:
    def code(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
        wide, wide_zero = wide_scale(reference, direction, scheme)
        return original(direction, wide, wide_zero, scheme)

    return code


def zero_before_narrowing(original: Function, reference: Reference) -> Function:
    def code(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
        return original(direction, scale, wide_scale(reference, direction, scheme)[1], scheme)

    return code


def scale_narrowed(function: Function) -> Change:
    """S3 with another narrowing, of scales only."""

    def scale_of(reference: Reference, span: Any, scheme: Scheme) -> Any:
        wide, dtype = span / F32(scheme.code_range[1]), FLOAT_DTYPES[scheme.scale_dtype]
        return function(reference.rounding.narrow(wide, dtype), wide, dtype)

    return knowing(scale_of)


def toward_zero(narrowed: Any, value: Any, dtype: Any) -> Any:
    wide = narrowed.astype(F64)
    with np.errstate(invalid="ignore"):
        beyond = np.abs(wide) > np.abs(np.asarray(value, F64))
    return np.where(beyond, np.nextafter(narrowed, dtype.type(0)), narrowed).astype(dtype)


def half_away_narrowed(narrowed: Any, value: Any, dtype: Any) -> Any:
    """Narrow with ties away from zero."""
    wide = narrowed.astype(F64)
    value = np.asarray(value, F64)
    outward = np.nextafter(narrowed, np.copysign(dtype.type(np.inf), narrowed)).astype(F64)
    tie = (np.abs(value) > np.abs(wide)) & (value - wide == outward - value)
    return np.where(tie, outward, wide).astype(dtype)


def flushed(narrowed: Any, value: Any, dtype: Any) -> Any:
    tiny = 2.0**-14 if dtype == np.float16 else 2.0**-126
    return np.where(np.abs(narrowed.astype(F64)) < tiny, dtype.type(0), narrowed)


def signed_zero(narrowed: Any, value: Any, dtype: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.where(narrowed == 0, np.asarray(value).astype(dtype), narrowed)


# Bytes -------------------------------------------------------------------------------------------


def bytes_with(there: Function, back: Function) -> dict[str, Change]:
    """P1 with its bytes changed: ``there(packed, scheme, head_dim)``, and ``back`` again."""
    return {
        "packing.pack": after(lambda packed, codes, scheme: there(packed, scheme, codes.shape[-1])),
        "packing.unpack": around(
            lambda original, packed, scheme, head_dim: original(
                back(packed, scheme, head_dim), scheme, head_dim
            )
        ),
    }


def highest_first(packed: Any, scheme: Scheme, head_dim: int) -> Any:
    """Turn the order of the channels in each byte round."""
    if scheme.bits == 4:
        return packed << 4 | packed >> 4
    if scheme.bits == 2:
        return (packed & 3) << 6 | (packed & 12) << 2 | packed >> 2 & 12 | packed >> 6
    return packed


def high_row_first(packed: Any, scheme: Scheme, head_dim: int) -> Any:
    return np.roll(packed, row_bytes(head_dim, 1), axis=-1) if scheme.bits == 3 else packed


def low_row_first(packed: Any, scheme: Scheme, head_dim: int) -> Any:
    return np.roll(packed, -row_bytes(head_dim, 1), axis=-1) if scheme.bits == 3 else packed


def channels_in(order: Callable[[Scheme, int], Any]) -> dict[str, Change]:
    """P1 of channels in another order."""

    def pack(original: Function, codes: Any, scheme: Scheme) -> Any:
        return original(codes[..., order(scheme, codes.shape[-1])], scheme)

    def unpack(original: Function, packed: Any, scheme: Scheme, head_dim: int) -> Any:
        codes = original(packed, scheme, head_dim)
        right = np.empty_like(codes)
        right[..., order(scheme, head_dim)] = codes
        return right

    return {"packing.pack": around(pack), "packing.unpack": around(unpack)}


def halves_apart(scheme: Scheme, head_dim: int) -> Any:
    """The order where a byte holds a channel of each half of the row."""
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

    return {"packing.pack": around(pack), "packing.unpack": around(unpack)}


def run_of_three() -> dict[str, Change]:
    """P1 with 3-bit codes one behind the other."""

    def pack(original: Function, codes: Any, scheme: Scheme) -> Any:
        right = original(codes, scheme)
        if scheme.bits != 3:
            return right
        stored = codes.astype(np.int16) + scheme.code_offset
        bits = (stored[..., None] >> np.arange(3) & 1).astype(np.uint8)
        row = np.zeros((*right.shape[:-1], 8 * right.shape[-1]), np.uint8)
        row[..., : 3 * codes.shape[-1]] = bits.reshape(*codes.shape[:-1], -1)
        return np.packbits(row, axis=-1, bitorder="little")

    def unpack(original: Function, packed: Any, scheme: Scheme, head_dim: int) -> Any:
        if scheme.bits != 3:
            return original(packed, scheme, head_dim)
        row = np.unpackbits(packed, axis=-1, bitorder="little")[..., : 3 * head_dim]
        bits = row.reshape(*packed.shape[:-1], head_dim, 3).astype(np.int16)
        return (bits << np.arange(3, dtype=np.int16)).sum(-1, dtype=np.int16) - np.int16(
            scheme.code_offset
        )

    return {"packing.pack": around(pack), "packing.unpack": around(unpack)}


def rows_that_share_bytes() -> dict[str, Change]:
    """P1 of all tokens as one row; what is left over is zero bytes."""

    def pack(original: Function, codes: Any, scheme: Scheme) -> Any:
        right = original(codes, scheme)
        run = original(codes.reshape(*codes.shape[:-2], -1), scheme)
        packed = np.zeros((*codes.shape[:-2], right.shape[-2] * right.shape[-1]), np.uint8)
        packed[..., : run.shape[-1]] = run
        return packed.reshape(right.shape)

    def unpack(original: Function, packed: Any, scheme: Scheme, head_dim: int) -> Any:
        tokens = packed.shape[-2]
        run = packed.reshape(*packed.shape[:-2], -1)[
            ..., : row_bytes(tokens * head_dim, scheme.bits)
        ]
        codes = original(run, scheme, tokens * head_dim)
        return codes.reshape(*packed.shape[:-1], head_dim)

    return {"packing.pack": around(pack), "packing.unpack": around(unpack)}


def zero_padding(packed: Any, codes: Any, scheme: Scheme) -> Any:
    """Leave the bits behind the last channel 0, where code 0 is another pattern."""
    head_dim = codes.shape[-1]
    kept = np.zeros(packed.shape[-1] * 8, np.uint8)
    if scheme.bits == 3:
        split = -(-head_dim // 4) * 8
        kept[: 2 * head_dim] = 1
        kept[split : split + head_dim] = 1
    else:
        kept[: scheme.bits * head_dim] = 1
    return packed & np.packbits(kept, bitorder="little")


# Factors -----------------------------------------------------------------------------------------


def factor_for(magnitude: str, function: Function) -> Change:
    """Another factor ``function(reference, x, y, norm)`` where the scheme has this magnitude."""

    def change(original: Function, reference: Reference) -> Function:
        def factor(x: Any, y: Any, norm: Any, scheme: Scheme) -> Any:
            if not scheme.separate_norm or scheme.magnitude != magnitude:
                return original(x, y, norm, scheme)
            return np.where(np.isinf(norm), norm, function(reference, x, y, norm))

        return factor

    return change


def dot(x: Any, y: Any) -> Any:
    return np.add.accumulate(x * y, axis=-1)[..., -1]


def factor_narrowed(function: Function) -> Change:
    """M1 to M3 with another narrowing, of factors only."""

    def stored_factor(reference: Reference, x: Any, y: Any, norm: Any, scheme: Scheme) -> Any:
        wide, dtype = reference.spec.factor(x, y, norm, scheme), FLOAT_DTYPES[scheme.norm_dtype]
        return function(reference.rounding.narrow(wide, dtype), wide, dtype)

    return knowing(stored_factor)


def norm_in_float64(reference: Reference, x: Any, y: Any, norm: Any) -> Any:
    return np.sqrt(np.sum(np.square(x, dtype=F64), axis=-1))


# Decoding ----------------------------------------------------------------------------------------


def reconstruct_with(function: Function) -> Change:
    """Another ``function(reference, y, norm)`` where the reader renormalises."""

    def change(original: Function, reference: Reference) -> Function:
        def reconstruct(y: Any, norm: Any, scheme: Scheme) -> Any:
            if not scheme.separate_norm or scheme.magnitude != "norm":
                return original(y, norm, scheme)
            return np.asarray(function(reference, y, norm.astype(F32)), F32)

        return reconstruct

    return change


def merged(reference: Reference, y: Any, norm: Any) -> Any:
    return (norm / divisor(reference.rounding.norm(y)))[..., None] * y


def by_reciprocal(reference: Reference, y: Any, norm: Any) -> Any:
    reciprocal = F32(1) / divisor(reference.rounding.norm(y))
    return norm[..., None] * (y * reciprocal[..., None])


def product_first(reference: Reference, y: Any, norm: Any) -> Any:
    return (norm[..., None] * y) / divisor(reference.rounding.norm(y))[..., None]


def length_from(square_sum: Function) -> Change:
    return reconstruct_with(
        lambda reference, y, norm: (
            norm[..., None] * (y / divisor(np.sqrt(square_sum(y)).astype(F32))[..., None])
        )
    )


def length_with_epsilon(epsilon: float) -> Change:
    return reconstruct_with(
        lambda reference, y, norm: (
            norm[..., None] * (y / (reference.rounding.norm(y) + F32(epsilon))[..., None])
        )
    )


def all_in_float64(reference: Reference, y: Any, norm: Any) -> Any:
    length = np.sqrt(np.sum(np.square(y, dtype=F64), axis=-1))
    return norm[..., None].astype(F64) * (y / divisor(length)[..., None])


def fused(codes: Any, scale: Any, zero: Any) -> Any:
    return (codes.astype(F64) * scale.astype(F64) + zero.astype(F64)).astype(F32)


def flushed_float32(result: Any, *_: Any) -> Any:
    return np.where(np.abs(result) < 2.0**-126, F32(0), result)


# Outliers ----------------------------------------------------------------------------------------


def outliers_by(rank: Function) -> Change:
    def index(direction: Any, scheme: Scheme) -> Any:
        largest = np.argsort(-rank(direction), axis=-1, kind="stable")
        return np.sort(largest[..., : scheme.outlier_channels], axis=-1).astype(np.int32)

    return instead(index)


def later_of_equals(direction: Any, scheme: Scheme) -> Any:
    peak = np.max(np.abs(direction), axis=-2, keepdims=True)
    order = np.argsort(peak, axis=-1, kind="stable")[..., ::-1]
    return np.sort(order[..., : scheme.outlier_channels], axis=-1).astype(np.int32)


def by_magnitude(direction: Any, scheme: Scheme) -> Any:
    peak = np.max(np.abs(direction), axis=-2, keepdims=True)
    return np.argsort(-peak, axis=-1, kind="stable")[..., : scheme.outlier_channels].astype(
        np.int32
    )


def range_with_outliers(original: Function, direction: Any, coded: Any, scheme: Scheme) -> Any:
    if scheme.axis == "channel":
        return original(direction, coded, scheme)
    return original(direction, np.ones_like(coded), scheme)


# Caches ------------------------------------------------------------------------------------------


def recoded(reference: Reference, x: Any, scale: Any, zero: Any, block: Any, scheme: Scheme) -> Any:
    """Return the block of ``x`` with other scales."""
    spec = reference.spec
    norm = reference.rounding.norm(x) if scheme.separate_norm else np.ones(x.shape[:-1], F32)
    codes = spec.code(spec.direction_of(x, norm), scale, zero, scheme)
    codes = spec.without_codes(codes, ~spec.mark(block.outlier_index, x.shape[-1]), norm)
    y = spec.dequantized_direction(codes, scale, zero, block.outlier_index, block.outliers)
    factor = spec.factor(x, y, norm, scheme)
    narrowed = reference.rounding.narrow(factor, FLOAT_DTYPES[scheme.norm_dtype])
    return block._replace(codes=codes, scale=scale, zero=zero, norm=narrowed)


def remember_cropped(original: Function, sequence: Any, length: int) -> None:
    whole, rest = divmod(max(length - len(sequence.sinks), 0), sequence.block_size)
    if whole < len(sequence.blocks):
        sequence.cropped = sequence.blocks[whole] if rest else None
    original(sequence, length)


def seal_with_old_scales(original: Function, reference: Reference) -> Function:
    def seal(sequence: Any) -> None:
        x = np.stack(sequence.tail).astype(F32)
        original(sequence)
        old = vars(sequence).pop("cropped", None)
        if old is not None and sequence.scheme.axis == "channel":
            sequence.blocks[-1] = recoded(
                reference, x, old.scale, old.zero, sequence.blocks[-1], sequence.scheme
            )

    return seal


def seal_with_greatest_scale(original: Function, reference: Reference) -> Function:
    def seal(sequence: Any) -> None:
        x = np.stack(sequence.tail).astype(F32)
        original(sequence)
        scheme, blocks = sequence.scheme, sequence.blocks
        if len(blocks) > 1 and scheme.axis == "channel" and scheme.symmetric:
            greatest = np.maximum(blocks[-2].scale, blocks[-1].scale)
            blocks[-1] = recoded(reference, x, greatest, blocks[-1].zero, blocks[-1], scheme)

    return seal


def append_and_keep(original: Function, sequence: Any, tokens: Any) -> None:
    vars(sequence).setdefault("raw", []).extend(tokens)
    original(sequence, tokens)


def crop_what_is_kept(original: Function, sequence: Any, length: int) -> None:
    original(sequence, length)
    del vars(sequence).setdefault("raw", [])[length:]


def kept_survivors(original: Function, sequence: Any, block: Any, count: int) -> Any:
    at = next(i for i, one in enumerate(sequence.blocks) if one is block)
    first = len(sequence.sinks) + at * sequence.block_size
    return sequence.raw[first : first + count]


def truncated_survivors(original: Function, reference: Reference) -> Function:
    def survivors(sequence: Any, block: Any, count: int) -> Any:
        decoded = reference.spec.decode(block, sequence.scheme)[:count]
        narrowed = reference.rounding.saturate(decoded, sequence.dtype)
        return list(toward_zero(narrowed, decoded, sequence.dtype))

    return survivors


def with_coded_tail(reference: Reference) -> Function:
    def coded(parts: Any, sequence: Any) -> Any:
        if not len(parts["tail"]):
            return parts
        spec, scheme = reference.spec, sequence.scheme
        block = spec.encode(parts["tail"].astype(F32), scheme)
        tail = reference.rounding.saturate(spec.decode(block, scheme), sequence.dtype)
        return {**parts, "tail": tail}

    return coded


def knowing_after(make: Callable[[Reference], Function]) -> Change:
    """Change the result by what is made for the reference."""
    return lambda original, reference: after(make(reference))(original, reference)


# Attention ---------------------------------------------------------------------------------------


def attend_with(function: Function) -> dict[str, Change]:
    """Change the arguments: ``function(query, keys, values, options)`` returns the new ones."""

    def attend(original: Function, query: Any, keys: Any, values: Any, options: Any) -> Any:
        return original(*function(query, keys, values, dict(options)))

    return {"model.attend": around(attend)}


def option(**changes: Any) -> dict[str, Change]:
    """Attend with other options; a callable is given the old value, the query and the keys."""

    def changed(query: Any, keys: Any, values: Any, options: Any) -> Any:
        for name, change in changes.items():
            options[name] = change(options[name], query, keys)
        return query, keys, values, options

    return attend_with(changed)


def heads_in_turn(original: Function, query: Any, keys: Any, values: Any, options: Any) -> Any:
    """Deal query heads out to key/value heads one after the other."""
    heads, kv_heads = len(query), len(keys)
    order = np.arange(heads).reshape(-1, kv_heads).T.reshape(-1)
    output = np.empty((*query.shape[:2], values.shape[-1]))
    output[order] = original(query[order], keys, values, options)
    return output


def without_window(value: Any, query: Any, keys: Any) -> Any:
    return None


def one_more(value: Any, query: Any, keys: Any) -> Any:
    return None if value is None else value + 1


def one_less(value: Any, query: Any, keys: Any) -> Any:
    return None if value is None else max(value - 1, 1)


def seeing(span: Function) -> dict[str, Change]:
    """Let a query at ``position`` see the positions of ``span(position, window, tokens)``."""

    def attend(original: Function, query: Any, keys: Any, values: Any, options: Any) -> Any:
        if not options["causal"]:
            return original(query, keys, values, options)
        tokens, queries = keys.shape[1], query.shape[1]
        plain = {**options, "causal": False, "sliding_window": None}
        output = np.zeros((*query.shape[:2], values.shape[-1]))
        for i in range(queries):
            first, stop = span(tokens - queries + i, options["sliding_window"] or tokens, tokens)
            rows = slice(max(first, 0), stop)
            if rows.start < stop:
                one = query[:, i : i + 1]
                output[:, i : i + 1] = original(one, keys[:, rows], values[:, rows], plain)
        return output

    return {"model.attend": around(attend)}


def positions_from_zero(
    original: Function, query: Any, keys: Any, values: Any, options: Any
) -> Any:
    """Let query i stand at position i, not among the last."""
    if not options["causal"]:
        return original(query, keys, values, options)
    queries = query.shape[1]
    outputs = []
    for i in range(queries):
        rows = slice(0, i + 1)
        outputs.append(original(query[:, i : i + 1], keys[:, rows], values[:, rows], options))
    return np.concatenate(outputs, axis=1)


def renormalized_gain(original: Function, reference: Reference) -> Function:
    def reconstruct(y: Any, norm: Any, scheme: Scheme) -> Any:
        if not scheme.separate_norm or scheme.magnitude == "norm":
            return original(y, norm, scheme)
        length = divisor(reference.rounding.norm(y))
        return norm.astype(F32)[..., None] * (y / length[..., None])

    return reconstruct


# The table ---------------------------------------------------------------------------------------


def _mistakes() -> list[Mistake]:
    table: list[tuple[str, str, str, tuple[str, ...], dict[str, Change]]] = [
        # N1
        ("norm summed in float32", "N1", "norms agree with a sequential float32 sum of squares",
         ENCODE, {"rounding.norm": norm_from(sequential)}),
        ("norm summed in float32, fused", "N1",
         "norms agree with a sequential float32 sum of squares by fused multiply-adds",
         ENCODE, {"rounding.norm": norm_from(sequential_fused)}),
        ("norm summed pairwise in float32", "N1", "norms agree with a float32 tree of sums by halves",
         ENCODE, {"rounding.norm": norm_from(pairwise)}),
        ("norm summed by neighbours in float32", "N1",
         "norms agree with a float32 tree of sums by neighbours",
         ENCODE, {"rounding.norm": norm_from(neighbours_first)}),
        *((f"norm summed in {lanes} float32 lanes", "N1",
           f"norms agree with float32 sums in {lanes} lanes, added as a tree",
           ENCODE, {"rounding.norm": norm_from(in_lanes(lanes))}) for lanes in (4, 8, 16, 32)),
        ("norm summed in float64 alone", "N1",
         "norms agree with a float64 sum that is rounded without a look at the rare ties",
         ENCODE, {"rounding.norm": norm_from(in_float64)}),
        ("norm summed in float16", "N1", "norms agree with a float16 sum of squares",
         ENCODE, {"rounding.norm": norm_from(in_float16)}),
        ("norm of order 1", "N1", "norms are sums of magnitudes (order 1), not Euclidean",
         ENCODE, {"rounding.norm": instead(lambda x: np.sum(np.abs(x, dtype=F64), axis=-1).astype(F32))}),
        ("norm of order -1", "N1",
         "norms are of order -1: the -1 meant as the axis was taken for the order",
         ENCODE, {"rounding.norm": instead(order_minus_one)}),
        ("norm of order infinity", "N1", "norms are the largest magnitude, not Euclidean",
         ENCODE, {"rounding.norm": instead(lambda x: np.max(np.abs(x), axis=-1))}),
        ("norm without its root", "N1", "norms are sums of squares without the root",
         ENCODE, {"rounding.norm": instead(lambda x: in_float64(x).astype(F32))}),
        ("root of the mean square", "N1", "norms are roots of the mean square, not of the sum",
         ENCODE, {"rounding.norm": instead(
             lambda x: np.sqrt(np.mean(np.square(x, dtype=F64), axis=-1)).astype(F32))}),
        # N2
        ("reciprocal of the norm", "N2", "directions are x * (1 / norm), which rounds twice",
         ENCODE, {"spec.direction_of": instead(
             lambda x, norm: x * (F32(1) / divisor(norm))[..., None])}),
        ("direction from the float64 norm", "N2",
         "directions are x over a float64 norm; it is to be rounded to float32 first",
         ENCODE, {"spec.direction_of": instead(direction_in_float64)}),
        *((f"norm narrowed to {dtype} before the division", "N2",
           f"directions are x over the norm as stored in {dtype}; divide by the float32 norm",
           ENCODE, {"spec.direction_of": direction_from_narrowed(dtype)})
          for dtype in ("float16", "bfloat16")),
        *((f"directions in {dtype}", "N2", f"directions are narrowed to {dtype}; they are float32",
           ENCODE, {"spec.direction_of": narrowed_direction(dtype)})
          for dtype in ("float16", "bfloat16")),
        *((f"epsilon {epsilon:g} added to the norm", "N2",
           f"directions are x / (norm + {epsilon:g}); there is no epsilon",
           ENCODE, {"spec.direction_of": with_epsilon(epsilon)})
          for epsilon in (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)),
        *((f"norm at least {epsilon:g}", "N2",
           f"directions are x / max(norm, {epsilon:g}); there is no epsilon",
           ENCODE, {"spec.direction_of": with_least(epsilon)})
          for epsilon in (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)),
        *((f"epsilon {epsilon:g} added to the sum of squares", "N2",
           f"directions are x / sqrt(sum of squares + {epsilon:g}); there is no epsilon",
           ENCODE, {"spec.direction_of": instead(square_with_epsilon(epsilon))})
          for epsilon in (1e-12, 1e-10, 1e-8, 1e-6, 1e-5)),
        ("codes of a zero token", "N2",
         "zero tokens are coded like others; all their codes are to be 0",
         ENCODE, {"spec.without_codes": instead(
             lambda codes, coded, norm: np.where(coded, codes, 0).astype(np.int16))}),
        ("zero tokens outside the range", "N2",
         "zero tokens do not count in minimum and maximum; their direction 0 does",
         ENCODE, {"spec.extent": around(without_zero_tokens)}),
        # S1 S2
        ("qmax one too large", "S1", "scales are the maximum over 2^(bits-1), not over qmax",
         ENCODE, {"spec.scale_of": levels_of(lambda scheme: scheme.code_range[1] + scheme.symmetric)}),
        ("qmax a half too large", "S1", "scales are the maximum over 2^(bits-1) - 1/2, not over qmax",
         ENCODE, {"spec.scale_of": levels_of(
             lambda scheme: scheme.code_range[1] + 0.5 * scheme.symmetric)}),
        ("maximum without sign", "S1", "scales are from the largest value, not the largest magnitude",
         ENCODE, {"spec.range_span": only_if(True, lambda span, low, high, *_: np.abs(high))}),
        ("range from minimum to maximum", "S1",
         "scales are from half of maximum minus minimum, not from the largest magnitude",
         ENCODE, {"spec.range_span": only_if(
             True, lambda span, low, high, *_: F32(0.5) * (high - low))}),
        ("one range for all", "S1",
         "all scales of a block come from one maximum: each channel (or token) has its own",
         ENCODE, {"spec.extent": knowing(over_everything)}),
        ("reciprocal of the number of levels", "S1",
         "scales are maximum * (1 / qmax), which rounds twice",
         ENCODE, {"spec.scale_of": scale_from(lambda span, levels: span * (F32(1) / levels))}),
        ("asymmetric levels one too many", "S2", "scales are the range over 2^bits, not 2^bits - 1",
         ENCODE, {"spec.scale_of": levels_of(
             lambda scheme: scheme.code_range[1] + (not scheme.symmetric))}),
        ("range from the unrounded minimum", "S2",
         "scales are (max - min) over the levels; subtract the narrowed zero",
         ENCODE, {"spec.range_span": only_if(False, lambda span, low, high, *_: high - low)}),
        ("range in double precision", "S2",
         "scales are from a float64 difference; it is to be rounded to float32 before it is divided",
         ENCODE, {"spec.range_span": only_if(
             False, lambda span, low, high, zero, scheme: high.astype(F64) - zero.astype(F64)),
                  "spec.scale_of": scale_from(lambda span, levels: (span / levels).astype(F32))}),
        ("negative scale forced to zero", "S2",
         "negative scales, where narrowing lifts zero above the maximum, are set to 0",
         ENCODE, {"spec.scale_of": after(lambda scale, *_: np.maximum(scale, scale.dtype.type(0)))}),
        ("magnitude of a negative scale", "S2",
         "negative scales, where narrowing lifts zero above the maximum, lost their sign",
         ENCODE, {"spec.scale_of": after(lambda scale, *_: np.abs(scale))}),
        *((f"scale at least {least:g}", "S1", f"scales are at least {least:g}; a scale may be 0",
           ENCODE, {"spec.scale_of": after(
               lambda scale, *_, least=least: np.maximum(scale, scale.dtype.type(least)))})
          for least in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)),
        ("scale of an empty channel is 1", "S1", "scales of zero channels are 1; they are to be 0",
         ENCODE, {"spec.scale_of": after(
             lambda scale, *_: np.where(scale == 0, scale.dtype.type(1), scale))}),
        # S3
        ("codes from the scale before narrowing", "S3",
         "codes were made with the scale before it was narrowed",
         ENCODE, {"spec.extent": remember_coded, "spec.code": code_before_narrowing}),
        ("codes from the zero before narrowing", "S3",
         "codes were made with the zero before it was narrowed",
         ENCODE, {"spec.extent": remember_coded, "spec.code": zero_before_narrowing}),
        ("maximum narrowed before the division", "S3",
         "the maximum was narrowed before it was divided; narrow the quotient",
         ENCODE, {"spec.scale_of": knowing(lambda reference, span, scheme: reference.rounding.narrow(
             reference.rounding.narrow(span, FLOAT_DTYPES[scheme.scale_dtype]).astype(F32)
             / F32(scheme.code_range[1]), FLOAT_DTYPES[scheme.scale_dtype]))}),
        ("scales narrowed toward zero", "S3", "scales are narrowed by truncation",
         ENCODE, {"spec.scale_of": scale_narrowed(toward_zero)}),
        ("scales narrowed with ties away from zero", "S3", "scales on a tie are narrowed away from zero",
         ENCODE, {"spec.scale_of": scale_narrowed(half_away_narrowed)}),
        ("subnormal scales flushed", "S3", "subnormal scales are flushed to 0",
         ENCODE, {"spec.scale_of": scale_narrowed(flushed)}),
        ("narrowing toward zero", "S3", "scales and factors are narrowed by truncation",
         ENCODE, {"rounding.narrow": after(toward_zero)}),
        ("narrowing with ties away from zero", "S3",
         "scales and factors on a tie are narrowed away from zero",
         ENCODE, {"rounding.narrow": after(half_away_narrowed)}),
        ("subnormals flushed", "S3", "subnormal scales and factors are flushed to 0",
         ENCODE, {"rounding.narrow": after(flushed)}),
        ("negative zero stored", "Z1", "a stored value is -0; it is to be +0",
         ENCODE, {"rounding.narrow": after(signed_zero)}),
        # Q1 Q2
        ("half away from zero", "Q1", "exact ties are rounded away from zero",
         ENCODE, {"spec.code": rounding_with(half_away)}),
        ("half toward zero", "Q1", "exact ties are rounded toward zero",
         ENCODE, {"spec.code": rounding_with(half_toward_zero)}),
        ("half up", "Q1", "exact ties are rounded up",
         ENCODE, {"spec.code": rounding_with(half_up)}),
        ("half down", "Q1", "exact ties are rounded down",
         ENCODE, {"spec.code": rounding_with(half_down)}),
        ("half to odd", "Q1", "exact ties are rounded to odd",
         ENCODE, {"spec.code": rounding_with(half_odd)}),
        ("one half added in float32", "Q1",
         "a half is added in float32 and the sum cut off, which also lifts what lies below the tie",
         ENCODE, {"spec.code": rounding_with(plus_half_in_float32)}),
        ("truncation", "Q1", "quotients are cut off toward zero",
         ENCODE, {"spec.code": rounding_with(np.trunc)}),
        ("floor", "Q1", "quotients are rounded down",
         ENCODE, {"spec.code": rounding_with(np.floor)}),
        ("reciprocal of the scale", "Q1", "quotients are direction * (1 / scale), which rounds twice",
         ENCODE, {"spec.code": dividing_with(
             lambda d, scale, zero: (d - zero) * (F32(1) / divisor(scale)))}),
        ("quotient in double precision", "Q1",
         "quotients are in float64; a float32 quotient may round to a tie",
         ENCODE, {"spec.code": dividing_with(
             lambda d, scale, zero: (d - zero).astype(F64) / divisor(scale.astype(F64)))}),
        ("difference and quotient in double precision", "Q1",
         "differences and quotients are in float64; each rounds to float32",
         ENCODE, {"spec.code": dividing_with(
             lambda d, scale, zero: (d.astype(F64) - zero) / divisor(scale.astype(F64)))}),
        ("zero divided apart", "Q1",
         "quotients are direction / scale - zero / scale; subtract first",
         ENCODE, {"spec.code": dividing_with(
             lambda d, scale, zero: d / divisor(scale) - zero / divisor(scale))}),
        *((f"epsilon {epsilon:g} added to the scale", "Q1",
           f"quotients are direction / (scale + {epsilon:g}); there is no epsilon",
           ENCODE, {"spec.code": dividing_with(
               lambda d, scale, zero, epsilon=epsilon: (d - zero) / (scale + F32(epsilon)))})
          for epsilon in (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)),
        ("cast before the clamp", "Q1", "quotients are cast to int8 before the clamp, and wrap",
         ENCODE, {"spec.code": rounding_with(wrapped_to_int8)}),
        ("most negative code allowed", "Q2",
         "the most negative code is written; symmetric codes end at -qmax",
         ENCODE, {"spec.code": instead(lambda d, scale, zero, scheme: np.clip(
             np.rint(quotient(d, scale, zero)),
             scheme.code_range[0] - scheme.symmetric, scheme.code_range[1]).astype(F32)),
                  **stored_as(lambda codes, scheme: codes + np.int16(scheme.code_offset),
                              lambda numbers, scheme: numbers - np.int16(scheme.code_offset))}),
        # P1
        ("highest bits first", "P1",
         "the order of the channels in each byte is turned round (nibbles swapped)",
         (*ENCODE, "decode"), bytes_with(highest_first, highest_first)),
        ("two's complement", "P1", "codes are stored in two's complement, not with an offset",
         (*ENCODE, "decode"), stored_as(
             lambda codes, scheme: codes & (2**scheme.bits - 1),
             lambda numbers, scheme: (numbers ^ scheme.code_offset) - np.int16(scheme.code_offset))),
        ("offset one too small", "P1", "the offset of the codes is qmax, not 2^(bits-1)",
         (*ENCODE, "decode"), stored_as(
             lambda codes, scheme: codes + np.int16(scheme.code_offset - 1),
             lambda numbers, scheme: numbers - np.int16(scheme.code_offset - 1))),
        ("sign and magnitude", "P1", "codes are stored as sign and magnitude, not with an offset",
         (*ENCODE, "decode"), stored_as(
             lambda codes, scheme: np.abs(codes) + np.int16(scheme.code_offset) * (codes < 0),
             lambda numbers, scheme: np.where(
                 numbers >= scheme.code_offset, scheme.code_offset - numbers, numbers).astype(np.int16))),
        ("rows that share bytes", "P1", "a row starts in the byte where the one before ends",
         (*ENCODE, "decode"), rows_that_share_bytes()),
        ("halves of the row in one byte", "P1", "a byte holds a channel of each half of the row",
         (*ENCODE, "decode"), channels_in(halves_apart)),
        ("3-bit codes one behind the other", "P1",
         "3-bit codes are one run of bits; they are a row of 2 bits and a row of 1",
         (*ENCODE, "decode"), run_of_three()),
        ("high bits before low bits", "P1", "the row of high bits comes before the row of low bits",
         (*ENCODE, "decode"), bytes_with(high_row_first, low_row_first)),
        ("padding with zero bits", "P1",
         "the padding of the last byte is zero bits; it is code 0, whose bits are not zero",
         ENCODE, {"packing.pack": after(zero_padding)}),
        # M1 M2 M3
        ("norm narrowed at once from float64", "M1",
         "stored norms are narrowed from float64; round to float32 first",
         ENCODE, {"spec.factor": factor_for("norm", norm_in_float64)}),
        ("factors narrowed toward zero", "M1", "stored factors are narrowed by truncation",
         ENCODE, {"spec.stored_factor": factor_narrowed(toward_zero)}),
        ("factors narrowed with ties away from zero", "M1",
         "stored factors on a tie are narrowed away from zero",
         ENCODE, {"spec.stored_factor": factor_narrowed(half_away_narrowed)}),
        ("subnormal factors flushed", "M1", "subnormal stored factors are flushed to 0",
         ENCODE, {"spec.stored_factor": factor_narrowed(flushed)}),
        ("gain without the length", "M2", "the stored gain is the norm itself; divide by ||y||",
         ENCODE, {"spec.factor": factor_for("gain", lambda ref, x, y, norm: norm)}),
        ("reciprocal of the length in a gain", "M2", "gains are norm * (1 / ||y||), which rounds twice",
         ENCODE, {"spec.factor": factor_for("gain", lambda ref, x, y, norm: norm * (
             F32(1) / divisor(ref.rounding.norm(y))))}),
        ("gain from a float32 length", "M2", "gains agree with ||y|| from a sequential float32 sum",
         ENCODE, {"spec.factor": factor_for("gain", lambda ref, x, y, norm: norm / divisor(
             np.sqrt(sequential(y))))}),
        ("gain in double precision", "M2",
         "gains are narrowed from a float64 quotient; norm, ||y|| and quotient each round to float32",
         ENCODE, {"spec.factor": factor_for("gain", lambda ref, x, y, norm: np.sqrt(
             in_float64(x)) / divisor(np.sqrt(in_float64(y))))}),
        ("least squares for a gain", "M2", "stored gains are those of least squares (M3)",
         ENCODE, {"spec.factor": factor_for(
             "gain", lambda ref, x, y, norm: ref.rounding.least_squares_gain(x, y))}),
        ("least squares in float32", "M3", "gains agree with sequential float32 dot products",
         ENCODE, {"spec.factor": factor_for(
             "lsq", lambda ref, x, y, norm: dot(x, y) / divisor(dot(y, y)))}),
        ("least squares in float64 alone", "M3",
         "gains are narrowed from a float64 quotient; round to float32 first",
         ENCODE, {"spec.factor": factor_for("lsq", lambda ref, x, y, norm: np.sum(
             np.multiply(x, y, dtype=F64), -1) / divisor(in_float64(y)))}),
        ("least squares over x", "M3", "gains are <x, y> / <x, x>; divide by <y, y>",
         ENCODE, {"spec.factor": factor_for("lsq", lambda ref, x, y, norm: (np.sum(
             np.multiply(x, y, dtype=F64), -1) / divisor(in_float64(x))).astype(F32))}),
        ("norm over length for least squares", "M3", "stored gains are norm / ||y|| (M2)",
         ENCODE, {"spec.factor": factor_for(
             "lsq", lambda ref, x, y, norm: norm / divisor(ref.rounding.norm(y)))}),
        ("norm for least squares", "M3", "the stored gain is the norm (M1)",
         ENCODE, {"spec.factor": factor_for("lsq", lambda ref, x, y, norm: norm)}),
        ("least squares of the direction", "M3",
         "gains are those of the direction; multiply by the norm",
         ENCODE, {"spec.factor": factor_for("lsq", lambda ref, x, y, norm: (
             ref.rounding.least_squares_gain(ref.spec.direction_of(x, norm), y)))}),
        # O1
        ("outliers by their mean", "O1", "outlier channels are those of the largest mean magnitude",
         ENCODE, {"spec.outlier_channels": outliers_by(
             lambda d: np.mean(np.abs(d), axis=-2, keepdims=True, dtype=F64))}),
        ("outliers by their length", "O1", "outlier channels are those of the largest sum of squares",
         ENCODE, {"spec.outlier_channels": outliers_by(
             lambda d: np.sum(np.square(d, dtype=F64), axis=-2, keepdims=True))}),
        ("outliers by their value", "O1", "outlier channels are those of the largest value, sign and all",
         ENCODE, {"spec.outlier_channels": outliers_by(lambda d: np.max(d, axis=-2, keepdims=True))}),
        ("later of equal outlier channels", "O1", "of equal channels the one of the higher index is kept",
         ENCODE, {"spec.outlier_channels": instead(later_of_equals)}),
        ("outlier channels by size", "O1", "outlier channels are in order of size; they are ascending",
         ENCODE, {"spec.outlier_channels": instead(by_magnitude)}),
        ("outliers in the range", "O1", "outlier channels enter the scale of their token",
         ENCODE, {"spec.extent": around(range_with_outliers)}),
        ("scales of outlier channels", "O1",
         "outlier channels have scales; with axis channel these are to be 0",
         ENCODE, {"spec.extent": around(
             lambda original, direction, coded, scheme: original(
                 direction, np.ones_like(coded) if scheme.axis == "channel" else coded, scheme))}),
        ("codes of outlier channels", "O1", "outlier channels have codes; these are to be 0",
         ENCODE, {"spec.without_codes": instead(
             lambda codes, coded, norm: np.where(norm[..., None] != 0, codes, 0).astype(np.int16))}),
        # B1 B2 K1
        ("sinks in the range", "K1", "sinks enter the scales of the tokens behind them",
         ENCODE, {"model.split_sinks": remember_sinks, "model.seal": remember_sinks_of_a_sequence,
                  "spec.extent": range_with_sinks}),
        ("range shared by heads", "B2", "scales are shared by sequences (heads, rows of a batch)",
         ENCODE, {"spec.extent": after(shared_by_heads)}),
        ("tail quantized early", "B1", "the tail went through the quantizer; it is kept as it came",
         STREAM, {"model.stored": knowing_after(with_coded_tail)}),
        ("scales that grow", "B1", "a block's scales are at least those of the block before",
         STREAM, {"model.seal": seal_with_greatest_scale}),
        ("old scales after a crop", "C1", "a block that was cropped is sealed again with its old scales",
         STREAM, {"model.crop": around(remember_cropped), "model.seal": seal_with_old_scales}),
        ("raw tokens after a crop", "C1",
         "a crop restored the tokens as they came; what attention saw are the decoded ones",
         STREAM, {"model.append": around(append_and_keep), "model.crop": around(crop_what_is_kept),
                  "model.survivors": around(kept_survivors)}),
        ("tokens of a crop cut off", "C1", "decoded tokens of a crop are narrowed by truncation",
         STREAM, {"model.survivors": truncated_survivors}),
        ("tokens of a crop overflow", "C1",
         "decoded tokens of a crop beyond the dtype are infinite; they become its largest value",
         STREAM, {"rounding.saturate": instead(lambda value, dtype: value.astype(dtype))}),
        # D1
        ("norm over length merged", "D1", "decoded values are (norm / ||y||) * y",
         DECODE, {"spec.reconstruct": reconstruct_with(merged)}),
        ("reciprocal of the length", "D1", "decoded values are norm * (y * (1 / ||y||))",
         DECODE, {"spec.reconstruct": reconstruct_with(by_reciprocal)}),
        ("product before the quotient", "D1", "decoded values are (norm * y) / ||y||",
         DECODE, {"spec.reconstruct": reconstruct_with(product_first)}),
        ("decoded in double precision", "D1", "decoded values are rounded once, from float64",
         DECODE, {"spec.reconstruct": reconstruct_with(all_in_float64)}),
        ("no renormalisation", "D1", "decoded values are norm * y without renormalisation",
         DECODE, {"spec.reconstruct": reconstruct_with(lambda ref, y, norm: norm[..., None] * y)}),
        ("renormalised by the stored norm", "D1",
         "directions are divided by the stored norm; divide by ||y||",
         DECODE, {"spec.reconstruct": reconstruct_with(
             lambda ref, y, norm: norm[..., None] * (y / divisor(norm)[..., None]))}),
        ("unit directions", "D1", "decoded values are y / ||y|| without the norm",
         DECODE, {"spec.reconstruct": reconstruct_with(
             lambda ref, y, norm: (norm != 0)[..., None] * (y / divisor(ref.rounding.norm(y))[..., None]))}),
        ("gain renormalised", "D1", "tokens with a gain are renormalised; a gain is only multiplied",
         DECODE, {"spec.reconstruct": renormalized_gain}),
        *((f"length summed {how}", "D1", f"||y|| agrees with a float32 sum of squares, {how}",
           DECODE, {"spec.reconstruct": length_from(total)}) for how, total in (
              ("one by one", sequential), ("fused", sequential_fused), ("by halves", pairwise),
              ("by neighbours", neighbours_first), ("in 4 lanes", in_lanes(4)),
              ("in 8 lanes", in_lanes(8)), ("in 16 lanes", in_lanes(16)))),
        ("length in float64 alone", "D1",
         "||y|| agrees with a float64 sum that is rounded without a look at the rare ties",
         DECODE, {"spec.reconstruct": length_from(in_float64)}),
        *((f"epsilon {epsilon:g} added to the length", "D1",
           f"directions are y / (||y|| + {epsilon:g}); there is no epsilon",
           DECODE, {"spec.reconstruct": length_with_epsilon(epsilon)})
          for epsilon in (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)),
        ("fused multiply-add", "D1", "code * scale + zero is fused; each operation rounds",
         DECODE, {"spec.dequantize": instead(fused)}),
        ("zero left out", "D1", "y is code * scale without zero",
         DECODE, {"spec.dequantize": instead(
             lambda codes, scale, zero: codes.astype(F32) * scale.astype(F32))}),
        ("subnormals flushed in decode", "D1", "subnormal products are flushed to 0",
         DECODE, {"spec.dequantize": after(flushed_float32),
                  "spec.reconstruct": after(flushed_float32)}),
        ("decoded values flushed", "D1", "subnormal decoded values are flushed to 0",
         DECODE, {"spec.reconstruct": after(flushed_float32)}),
        ("outliers left out", "D1", "outlier channels decode from their codes, not as stored",
         DECODE, {"spec.dequantized_direction": instead(
             lambda codes, scale, zero, index, outliers: (
                 codes.astype(F32) * scale.astype(F32) + zero.astype(F32)))}),
        # A1 A2
        ("scale left out", "A1", "products are not scaled",
         ATTEND, option(scale=lambda scale, query, keys: 1.0)),
        ("scale without its root", "A1", "products are scaled by 1 / D, not by 1 / sqrt(D)",
         ATTEND, option(scale=lambda scale, query, keys: 1 / query.shape[-1])),
        ("scale always 1 / sqrt(D)", "A1", "the given scale is ignored",
         ATTEND, option(scale=lambda scale, query, keys: query.shape[-1] ** -0.5)),
        ("softcap left out", "A1", "scores are not capped",
         ATTEND, option(softcap=lambda cap, query, keys: None)),
        ("query heads in turn", "A1", "query heads are dealt out to key/value heads in turn",
         ATTEND, {"model.attend": around(heads_in_turn)}),
        ("own position left out", "A2", "queries do not see their own position",
         ATTEND, seeing(lambda position, window, tokens: (position - window + 1, position))),
        ("one position too many", "A2", "queries see the position behind their own",
         ATTEND, seeing(lambda position, window, tokens: (
             position - window + 1, min(position + 2, tokens)))),
        ("window without the mask", "A2", "queries see what comes after them, past a window too",
         ATTEND, seeing(lambda position, window, tokens: (position - window + 1, tokens))),
        ("mask left out", "A2", "queries see what comes after them",
         ATTEND, option(causal=lambda causal, query, keys: False,
                        sliding_window=without_window)),
        ("always causal", "A2", "queries do not see what comes after them, though not causal",
         ATTEND, option(causal=lambda causal, query, keys: True)),
        ("queries counted from the start", "A2", "query i stands at position i, not among the last",
         ATTEND, {"model.attend": around(positions_from_zero)}),
        ("window one too long", "A2", "the window counts positions besides the query's own",
         ATTEND, option(sliding_window=one_more)),
        ("window one too short", "A2", "the window is one position too short",
         ATTEND, option(sliding_window=one_less)),
        ("window left out", "A2", "the sliding window is ignored",
         ATTEND, option(sliding_window=without_window)),
    ]  # fmt: skip
    return [Mistake(*entry) for entry in table]


MISTAKES = {mistake.name: mistake for mistake in _mistakes()}

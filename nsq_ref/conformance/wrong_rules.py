"""What wrong functions of the specification are made of, rule by rule.

`mistakes` puts them in place of the right ones, each a `Change`: what makes the wrong function from
the right one and the reference that it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from nsq_ref.conformance.reference import Change, Reference
from nsq_ref.conformance.wrong_arithmetic import divisor, in_order, narrowed_at_once
from nsq_ref.scheme import FLOAT_DTYPES, Scheme, row_bytes

Function = Callable[..., Any]
F32, F64 = np.float32, np.float64


# --- changes --------------------------------------------------------------------------------------


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


# --- N1: norms ------------------------------------------------------------------------------------


def norm_from(total: Function) -> Change:
    """N1 from another sum of products ``total(x, x)``."""
    return instead(lambda x: np.sqrt(total(x, x)).astype(F32))


def in_float64(left: Any, right: Any) -> Any:
    """Add the products in float64, one after the other."""
    return in_order(left.astype(F64), right.astype(F64))


def length_in_float64(x: Any) -> Any:
    """Return the Euclidean norm, not rounded to float32."""
    return np.sqrt(in_float64(x, x))


def in_float16(left: Any, right: Any) -> Any:
    """Add the products in float16, one after the other."""
    return in_order(left.astype(np.float16), right.astype(np.float16)).astype(F32)


def padded_with_zeros(terms: Any, count: int) -> Any:
    """Add so many zeros behind the last axis."""
    return np.concatenate([terms, np.zeros((*terms.shape[:-1], count), F32)], axis=-1)


def added_by_halves(terms: Any) -> Any:
    """Add a power of two of terms as a tree."""
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def pairwise(left: Any, right: Any) -> Any:
    """Add the products as a tree over the next power of two, by halves."""
    terms = left * right
    size = 1 << (terms.shape[-1] - 1).bit_length()
    return added_by_halves(padded_with_zeros(terms, size - terms.shape[-1]))


def neighbours_first(left: Any, right: Any) -> Any:
    """Add the products as a tree, by neighbours."""
    terms = left * right
    while terms.shape[-1] > 1:
        terms = padded_with_zeros(terms, terms.shape[-1] % 2)
        terms = terms[..., ::2] + terms[..., 1::2]
    return terms[..., 0]


def in_lanes(lanes: int) -> Function:
    """Keep so many running sums, which are then added as a tree."""

    def total(left: Any, right: Any) -> Any:
        terms = padded_with_zeros(left * right, -left.shape[-1] % lanes)
        rows = terms.reshape(*terms.shape[:-1], -1, lanes)
        return added_by_halves(np.add.accumulate(rows, axis=-2)[..., -1, :])

    return total


def order_minus_one(x: Any) -> Any:
    """Return the norm of order -1."""
    return (1 / np.sum(1 / np.abs(x.astype(F64)), axis=-1)).astype(F32)


# --- N2: directions -------------------------------------------------------------------------------


def with_epsilon(epsilon: float) -> Change:
    """Add an epsilon to the norm."""
    return instead(lambda x, norm: x / (norm + F32(epsilon))[..., None])


def with_least_norm(epsilon: float) -> Change:
    """Divide by an epsilon at least."""
    return instead(lambda x, norm: x / np.maximum(norm, F32(epsilon))[..., None])


def with_epsilon_in_square(epsilon: float) -> Change:
    """Add an epsilon to the sum of squares."""
    return instead(lambda x, norm: x / np.sqrt(in_float64(x, x) + epsilon).astype(F32)[..., None])


def with_narrowed_norm(dtype: str) -> Change:
    """Divide by the norm as it is stored."""

    def change(original: Function, reference: Reference) -> Function:
        narrow = reference.rounding.narrow
        return lambda x, norm: original(x, narrow(norm, FLOAT_DTYPES[dtype]).astype(F32))

    return change


def narrowed_direction(dtype: str) -> Change:
    """Narrow the direction."""

    def change(original: Function, reference: Reference) -> Function:
        narrow = reference.rounding.narrow
        return lambda x, norm: narrow(original(x, norm), FLOAT_DTYPES[dtype]).astype(F32)

    return change


def direction_in_float64(x: Any, norm: Any) -> Any:
    """Divide by the norm that float64 gives, rounding once."""
    if np.all(norm == 1):  # without norm separation
        return x
    return (x / divisor(length_in_float64(x))[..., None]).astype(F32)


def without_zero_tokens(original: Function, direction: Any, coded: Any, scheme: Scheme) -> Any:
    """Leave zero tokens out of the extents."""
    zero = ~np.any(direction != 0, axis=-1, keepdims=True)
    return original(direction, coded & ~zero, scheme)


# --- O1: outlier channels -------------------------------------------------------------------------


def outliers_by(rank: Function) -> Change:
    """Take the channels that are the first by another ``rank(direction)``."""

    def index(direction: Any, scheme: Scheme) -> Any:
        largest = np.argsort(-rank(direction), axis=-1, kind="stable")
        return np.sort(largest[..., : scheme.outlier_channels], axis=-1).astype(np.int32)

    return instead(index)


def later_of_equals(direction: Any, scheme: Scheme) -> Any:
    """Of channels of equal magnitude, take the one of the higher index."""
    peak = np.max(np.abs(direction), axis=-2, keepdims=True)
    order = np.argsort(peak, axis=-1, kind="stable")[..., ::-1]
    return np.sort(order[..., : scheme.outlier_channels], axis=-1).astype(np.int32)


def by_magnitude(direction: Any, scheme: Scheme) -> Any:
    """Store the channels by descending magnitude."""
    peak = np.max(np.abs(direction), axis=-2, keepdims=True)
    largest = np.argsort(-peak, axis=-1, kind="stable")
    return largest[..., : scheme.outlier_channels].astype(np.int32)


def outliers_in_extent(axis: str) -> Change:
    """Let outlier channels have part in the extents of schemes of this axis."""

    def extent(original: Function, direction: Any, coded: Any, scheme: Scheme) -> Any:
        return original(direction, coded | (scheme.axis == axis), scheme)

    return around(extent)


# --- S1 S2: ranges and scales ---------------------------------------------------------------------


def levels(scheme: Scheme) -> np.float32:
    """Return the number of levels that the range is divided by."""
    count: np.float32 = F32(scheme.code_range[1])
    return count


def scale_from(divided: Function) -> Change:
    """S1 to S3 from another quotient ``divided(span, scheme)`` of span and number of levels."""
    return knowing(
        lambda reference, span, scheme: reference.rounding.narrow(
            divided(span, scheme), FLOAT_DTYPES[scheme.scale_dtype]
        )
    )


def only_if(symmetric: bool, function: Function) -> Change:
    """Call ``function(result, *arguments, scheme)`` for schemes of this symmetry."""
    return after(
        lambda result, *arguments: (
            function(result, *arguments) if arguments[-1].symmetric == symmetric else result
        )
    )


def over_everything(direction: Any, coded: Any, scheme: Scheme) -> Any:
    """Take one range for all channels of the block, or all tokens."""
    values = np.where(coded, direction, 0)
    axes = (-2, -1)
    low, high = values.min(axis=axes, keepdims=True), values.max(axis=axes, keepdims=True)
    shape = list(direction.shape)
    shape[-2 if scheme.axis == "channel" else -1] = 1
    return np.broadcast_to(low, shape), np.broadcast_to(high, shape)


# --- S3 M1 M2 M3: narrowing -----------------------------------------------------------------------


def scale_narrowed(function: Function) -> Change:
    """S3 with another narrowing, of scales only."""

    def scale_of(reference: Reference, span: Any, scheme: Scheme) -> Any:
        wide, dtype = span / levels(scheme), FLOAT_DTYPES[scheme.scale_dtype]
        return function(reference.rounding.narrow(wide, dtype), wide, dtype)

    return knowing(scale_of)


def factor_narrowed(function: Function) -> Change:
    """M1 to M3 with another narrowing, of factors only."""

    def stored_factor(reference: Reference, x: Any, y: Any, norm: Any, scheme: Scheme) -> Any:
        wide, dtype = reference.spec.factor(x, y, norm, scheme), FLOAT_DTYPES[scheme.norm_dtype]
        return function(reference.rounding.narrow(wide, dtype), wide, dtype)

    return knowing(stored_factor)


def toward_zero(narrowed: Any, value: Any, dtype: Any) -> Any:
    """Narrow by truncation."""
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


def flushed(values: Any, *_: Any) -> Any:
    """Set subnormal numbers to 0."""
    least = 2.0**-14 if values.dtype == np.float16 else 2.0**-126
    return np.where(np.abs(values.astype(F64)) < least, values.dtype.type(0), values)


def signed_zero(narrowed: Any, value: Any, dtype: Any) -> Any:
    """Keep the sign of a zero."""
    with np.errstate(over="ignore"):
        return np.where(narrowed == 0, np.asarray(value).astype(dtype), narrowed)


def maximum_narrowed_first(reference: Reference, span: Any, scheme: Scheme) -> Any:
    """Narrow the span before it is divided, and the quotient again."""
    narrow, dtype = reference.rounding.narrow, FLOAT_DTYPES[scheme.scale_dtype]
    return narrow(narrow(span, dtype).astype(F32) / levels(scheme), dtype)


def remember_coded(original: Function, reference: Reference) -> Function:
    """Keep which channels of which directions are coded: the others enter no scale."""
    reference.coded = {}

    def extent(direction: Any, coded: Any, scheme: Scheme) -> Any:
        reference.coded = {direction.tobytes(): coded, **dict([*reference.coded.items()][:64])}
        return original(direction, coded, scheme)

    return extent


def wide_scale(reference: Reference, direction: Any, scheme: Scheme) -> tuple[Any, Any]:
    """Return scale and zero of a block in float32, before they are narrowed."""
    wide = replace(scheme, scale_dtype="float32", scale_rule="range")
    coded = reference.coded.get(direction.tobytes(), np.ones(direction.shape, bool))
    low, high = reference.spec.extent(direction, coded, wide)
    scale, zero = reference.spec.range_scale(low, high, wide)
    return scale, zero


def code_before_narrowing(original: Function, reference: Reference) -> Function:
    """Divide by the scale before it is narrowed."""

    def code(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
        wide, wide_zero = wide_scale(reference, direction, scheme)
        return original(direction, wide, wide_zero, scheme)

    return code


def zero_before_narrowing(original: Function, reference: Reference) -> Function:
    """Subtract the zero before it is narrowed."""

    def code(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
        return original(direction, scale, wide_scale(reference, direction, scheme)[1], scheme)

    return code


# --- Q1 Q2: codes ---------------------------------------------------------------------------------


def quotient(direction: Any, scale: Any, zero: Any) -> Any:
    """Divide as Q1 says."""
    return (direction - zero) / divisor(scale)


def dividing_with(divided: Function, rounded: Function = np.rint) -> Change:
    """Q1 with another quotient of ``direction``, float32 ``scale`` and ``zero``."""

    def code(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
        codes = rounded(divided(direction, scale.astype(F32), zero.astype(F32)))
        return np.clip(codes, *map(F32, scheme.code_range)).astype(F32)

    return instead(code)


def rounding_with(rounded: Function) -> Change:
    """Q1 with another rounding of the quotient."""
    return dividing_with(quotient, rounded)


def half_down(value: Any) -> Any:
    """Round ties down."""
    return np.ceil(value.astype(F64) - 0.5)


def half_odd(value: Any) -> Any:
    """Round ties to odd."""
    rounded = np.rint(value)
    tie = np.abs(value - np.trunc(value)) == 0.5
    return np.where(tie, 2 * value - rounded, rounded)


def plus_half_in_float32(value: Any) -> Any:
    """Add 1/2 to the magnitude by a sum that rounds itself, and cut off."""
    return np.copysign(np.floor(np.abs(value) + F32(0.5)), value)


def with_most_negative(direction: Any, scale: Any, zero: Any, scheme: Scheme) -> Any:
    """Clamp symmetric codes one lower, at the most negative pattern."""
    codes = np.rint(quotient(direction, scale.astype(F32), zero.astype(F32)))
    low, high = scheme.code_range
    return np.clip(codes, low - scheme.symmetric, high)


# --- P1: bytes ------------------------------------------------------------------------------------


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
    """Put the row of high bits before the row of low bits."""
    return np.roll(packed, row_bytes(head_dim, 1), axis=-1) if scheme.bits == 3 else packed


def low_row_first(packed: Any, scheme: Scheme, head_dim: int) -> Any:
    """Undo `high_row_first`."""
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


# --- M1 M2 M3: stored factors ---------------------------------------------------------------------


def where_stored(magnitude: str, function: Function) -> Change:
    """Call ``function(reference, x, y, norm, scheme)`` where the scheme has this magnitude."""

    def change(original: Function, reference: Reference) -> Function:
        def factor(x: Any, y: Any, norm: Any, scheme: Scheme) -> Any:
            if not scheme.separate_norm or scheme.magnitude != magnitude:
                return original(x, y, norm, scheme)
            return function(reference, x, y, norm, scheme)

        return factor

    return change


def factor_for(magnitude: str, function: Function) -> Change:
    """Give another float32 factor ``function(reference, x, y, norm)`` for this magnitude."""
    return where_stored(
        magnitude,
        lambda reference, x, y, norm, scheme: np.where(
            np.isinf(norm), norm, function(reference, x, y, norm)
        ),
    )


def factor_narrowed_at_once(magnitude: str, function: Function) -> Change:
    """Store what ``function(x, y)`` gives in float64 for this magnitude, rounded once."""

    def stored(reference: Reference, x: Any, y: Any, norm: Any, scheme: Scheme) -> Any:
        wide = np.where(np.isinf(norm), norm, function(x, y))
        narrowed = narrowed_at_once(wide, scheme.norm_dtype)
        # Nothing is left to round, but -0 is still stored as +0.
        return reference.rounding.narrow(narrowed, FLOAT_DTYPES[scheme.norm_dtype])

    return where_stored(magnitude, stored)


# --- B1 B2 K1 C1: blocks, sinks, caches -----------------------------------------------------------


def shared_by_heads(result: Any, direction: Any, coded: Any, scheme: Scheme) -> Any:
    """Take one range for all leading axes."""
    low, high = result
    lead = tuple(range(direction.ndim - 2))
    return (
        np.broadcast_to(low.min(axis=lead, keepdims=True), low.shape),
        np.broadcast_to(high.max(axis=lead, keepdims=True), high.shape),
    )


def remember_sinks(original: Function, reference: Reference) -> Function:
    """Keep the sinks that are split off."""

    def split_sinks(x: Any, scheme: Scheme) -> Any:
        sinks, coded = original(x, scheme)
        reference.sinks = sinks
        return sinks, coded

    return split_sinks


def remember_sinks_of_a_sequence(original: Function, reference: Reference) -> Function:
    """Keep the sinks of the sequence that is sealed."""

    def seal(sequence: Any) -> None:
        reference.sinks = np.array(sequence.sinks).reshape(-1, sequence.head_dim)
        original(sequence)

    return seal


def range_with_sinks(original: Function, reference: Reference) -> Function:
    """Let the sinks that are kept have part in the extents of channels."""

    def extent(direction: Any, coded: Any, scheme: Scheme) -> Any:
        if scheme.axis == "token" or not scheme.sink_tokens or not reference.sinks.size:
            return original(direction, coded, scheme)
        sinks = reference.sinks.astype(F32)
        if scheme.separate_norm:
            sinks = reference.spec.direction_of(sinks, reference.rounding.norm(sinks))
        # Another mistake may have told the tokens apart; sinks are like any of them.
        of_tokens = np.broadcast_to(coded, direction.shape)
        of_sinks = np.broadcast_to(coded.any(axis=-2, keepdims=True), sinks.shape)
        coded = np.concatenate([of_sinks, of_tokens], axis=-2)
        return original(np.concatenate([sinks, direction], axis=-2), coded, scheme)

    return extent


def with_coded_tail(original: Function, reference: Reference) -> Function:
    """Quantize the tail too."""

    def stored(sequence: Any) -> Any:
        parts = original(sequence)
        if not len(parts["tail"]):
            return parts
        spec, scheme = reference.spec, sequence.scheme
        decoded = spec.decode(spec.encode(parts["tail"].astype(F32), scheme), scheme)
        return {**parts, "tail": reference.rounding.saturate(decoded, sequence.dtype)}

    return stored


def recoded(reference: Reference, x: Any, scale: Any, zero: Any, block: Any, scheme: Scheme) -> Any:
    """Return the block of ``x`` with other scales."""
    spec = reference.spec
    norm = reference.rounding.norm(x) if scheme.separate_norm else np.ones(x.shape[:-1], F32)
    codes = spec.code(spec.direction_of(x, norm), scale, zero, scheme)
    codes = spec.without_codes(codes, ~spec.mark(block.outlier_index, x.shape[-1]), norm)
    y = spec.dequantized_direction(codes, scale, zero, block.outlier_index, block.outliers)
    factor = spec.stored_factor(x, y, norm, scheme)
    return block._replace(codes=codes, scale=scale, zero=zero, norm=factor)


def seal_with_greatest_scale(original: Function, reference: Reference) -> Function:
    """Seal a block with scales that are at least those before it."""

    def seal(sequence: Any) -> None:
        x = np.stack(sequence.tail).astype(F32)
        original(sequence)
        scheme, blocks = sequence.scheme, sequence.blocks
        if len(blocks) > 1 and scheme.axis == "channel" and scheme.symmetric:
            greatest = np.maximum(blocks[-2].scale, blocks[-1].scale)
            blocks[-1] = recoded(reference, x, greatest, blocks[-1].zero, blocks[-1], scheme)

    return seal


def remember_cropped(original: Function, sequence: Any, length: int) -> None:
    """Keep the block that a crop cuts."""
    whole, rest = divmod(max(length - len(sequence.sinks), 0), sequence.block_size)
    if whole < len(sequence.blocks):
        sequence.cropped = sequence.blocks[whole] if rest else None
    original(sequence, length)


def seal_with_old_scales(original: Function, reference: Reference) -> Function:
    """Seal a block that was cut with the scales it had before."""

    def seal(sequence: Any) -> None:
        x = np.stack(sequence.tail).astype(F32)
        original(sequence)
        old = vars(sequence).pop("cropped", None)
        if old is not None and sequence.scheme.axis == "channel":
            sequence.blocks[-1] = recoded(
                reference, x, old.scale, old.zero, sequence.blocks[-1], sequence.scheme
            )

    return seal


def append_and_keep(original: Function, sequence: Any, tokens: Any) -> None:
    """Keep all tokens as they come."""
    vars(sequence).setdefault("raw", []).extend(tokens)
    original(sequence, tokens)


def crop_what_is_kept(original: Function, sequence: Any, length: int) -> None:
    """Crop what `append_and_keep` keeps."""
    original(sequence, length)
    del vars(sequence).setdefault("raw", [])[length:]


def kept_survivors(original: Function, sequence: Any, block: Any, count: int) -> Any:
    """Return to the tail what `append_and_keep` kept."""
    at = next(i for i, one in enumerate(sequence.blocks) if one is block)
    first = len(sequence.sinks) + at * sequence.block_size
    return sequence.raw[first : first + count]


def truncated_survivors(original: Function, reference: Reference) -> Function:
    """Narrow decoded tokens by truncation."""

    def survivors(sequence: Any, block: Any, count: int) -> Any:
        decoded = reference.spec.decode(block, sequence.scheme)[:count]
        narrowed = reference.rounding.saturate(decoded, sequence.dtype)
        return list(toward_zero(narrowed, decoded, sequence.dtype))

    return survivors


# --- D1: decoding ---------------------------------------------------------------------------------


def reconstruct_with(function: Function) -> Change:
    """Call ``function(reference, y, norm)`` where the reader renormalises."""

    def change(original: Function, reference: Reference) -> Function:
        def reconstruct(y: Any, norm: Any, scheme: Scheme) -> Any:
            if not scheme.separate_norm or scheme.magnitude != "norm":
                return original(y, norm, scheme)
            return np.asarray(function(reference, y, norm.astype(F32)), F32)

        return reconstruct

    return change


def divided_by(length: Function) -> Change:
    """Renormalise by another ``length(reference, y, norm)``."""
    return reconstruct_with(
        lambda reference, y, norm: (
            norm[..., None] * (y / divisor(length(reference, y, norm))[..., None])
        )
    )


def length_from(total: Function) -> Change:
    """Renormalise by the root of another sum of products ``total(y, y)``."""
    return divided_by(lambda reference, y, norm: np.sqrt(total(y, y)).astype(F32))


def length_with_epsilon(epsilon: float) -> Change:
    """Add an epsilon to the length."""
    return divided_by(lambda reference, y, norm: reference.rounding.norm(y) + F32(epsilon))


def merged(reference: Reference, y: Any, norm: Any) -> Any:
    """Divide the norm by the length first."""
    return (norm / divisor(reference.rounding.norm(y)))[..., None] * y


def by_reciprocal(reference: Reference, y: Any, norm: Any) -> Any:
    """Multiply by ``1 / length``."""
    reciprocal = F32(1) / divisor(reference.rounding.norm(y))
    return norm[..., None] * (y * reciprocal[..., None])


def product_first(reference: Reference, y: Any, norm: Any) -> Any:
    """Multiply by the norm before the division."""
    return (norm[..., None] * y) / divisor(reference.rounding.norm(y))[..., None]


def unit(reference: Reference, y: Any, norm: Any) -> Any:
    """Leave the norm out."""
    return (norm != 0)[..., None] * (y / divisor(reference.rounding.norm(y))[..., None])


def all_in_float64(reference: Reference, y: Any, norm: Any) -> Any:
    """Round once, at the end."""
    return norm[..., None].astype(F64) * (y / divisor(length_in_float64(y))[..., None])


def renormalized_gain(original: Function, reference: Reference) -> Function:
    """Renormalise where a gain is stored."""

    def reconstruct(y: Any, norm: Any, scheme: Scheme) -> Any:
        if not scheme.separate_norm or scheme.magnitude == "norm":
            return original(y, norm, scheme)
        length = divisor(reference.rounding.norm(y))
        return norm.astype(F32)[..., None] * (y / length[..., None])

    return reconstruct


# --- A1 A2: attention -----------------------------------------------------------------------------


def option(**changes: Function) -> dict[str, Change]:
    """Attend with other options, each made from the old value, the query and the keys."""

    def attend(original: Function, query: Any, keys: Any, values: Any, options: Any) -> Any:
        changed = {name: change(options[name], query, keys) for name, change in changes.items()}
        return original(query, keys, values, {**options, **changed})

    return {"model.attend": around(attend)}


def heads_in_turn(original: Function, query: Any, keys: Any, values: Any, options: Any) -> Any:
    """Deal query heads out to key/value heads one after the other."""
    heads, kv_heads = len(query), len(keys)
    order = np.arange(heads).reshape(-1, kv_heads).T.reshape(-1)
    output = np.empty((*query.shape[:2], values.shape[-1]))
    output[order] = original(query[order], keys, values, options)
    return output


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

"""Sinks and blocks mixed up, and what caches do wrong (rules K1, B1, B2, C1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from nsq_ref.conformance.mistakes.arithmetic import toward_zero
from nsq_ref.conformance.mistakes.changes import (
    F32,
    PLAIN,
    STREAM,
    Function,
    after,
    around,
    instead,
    knowing_both,
    place,
)
from nsq_ref.conformance.mistakes.reference import Change, Mistake, Reference
from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.scheme import Scheme


def _remember_sinks(original: Function, reference: Reference, x: Any, scheme: Scheme) -> Any:
    sinks, coded = original(x, scheme)
    reference.sinks = sinks
    return sinks, coded


def _remember_sinks_of(original: Function, reference: Reference, sequence: Any) -> None:
    reference.sinks = np.array(sequence.sinks).reshape(-1, sequence.head_dim)
    original(sequence)


def _range_with_sinks(
    original: Function, reference: Reference, direction: Any, coded: Any, scheme: Scheme
) -> Any:
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


def _shared_by_heads(result: Any, direction: Any, coded: Any, scheme: Scheme) -> Any:
    low, high = result
    if not direction.size:  # no sequences
        return result
    lead = tuple(range(direction.ndim - 2))
    return (
        np.broadcast_to(low.min(axis=lead, keepdims=True), low.shape),
        np.broadcast_to(high.max(axis=lead, keepdims=True), high.shape),
    )


def _narrow(dtype: str) -> Function:
    """Return what rounds to a dtype, and back to the one that it was."""
    return lambda values: values.astype(F32).astype(FLOAT_DTYPES[dtype]).astype(values.dtype)


def _sinks_in(dtype: str) -> Change:
    return around(
        lambda original, x, scheme: (
            _narrow(dtype)(original(x, scheme)[0]), original(x, scheme)[1],
        )
    )  # fmt: skip


def _tail_in(dtype: str) -> Change:
    return after(lambda parts, *_: {**parts, "tail": _narrow(dtype)(parts["tail"])})


BLOCKS = [
    *(Mistake(f"sinks in {dtype}", "K1", f"sinks went through {dtype}; they are kept as they came",
          ("encode",), {"model.split_sinks": _sinks_in(dtype)})
      for dtype in ("float16", "bfloat16")),
    Mistake("sinks in the range", "K1", "sinks enter the scales of the tokens behind them",
        PLAIN, {"model.split_sinks": knowing_both(_remember_sinks),
                 "model.seal": knowing_both(_remember_sinks_of),
                 "spec.extent": knowing_both(_range_with_sinks)}),
    place("spec.extent", "B2", PLAIN)("range shared by heads",
        "scales are shared by sequences (heads, rows of a batch)", after(_shared_by_heads)),
]  # fmt: skip

# --- caches -------------------------------------------------------------------------------------


def _with_coded_tail(original: Function, reference: Reference, sequence: Any) -> Any:
    parts = original(sequence)
    if not len(parts["tail"]):
        return parts
    spec, scheme = reference.spec, sequence.scheme
    decoded = spec.decode(spec.encode(parts["tail"].astype(F32), scheme), scheme)
    return {**parts, "tail": reference.rounding.saturate(decoded, sequence.dtype)}


def _recoded(
    reference: Reference, x: Any, scale: Any, zero: Any, block: Any, scheme: Scheme
) -> Any:
    """Return the block of ``x`` with other scales."""
    spec = reference.spec
    norm, size = spec.norms_and_sizes(x, scheme)
    codes = spec.code(spec.direction_of(x, norm), scale, zero, scheme)
    codes = spec.without_codes(codes, ~spec.mark(block.outlier_index, x.shape[-1]), norm)
    y = spec.dequantized_direction(codes, scale, zero, block.outlier_index, block.outliers)
    factor = spec.stored_factor(x, y, norm, scheme, None, size)
    return block._replace(codes=codes, scale=scale, zero=zero, norm=factor)


def _seal_with_greatest_scale(original: Function, reference: Reference, sequence: Any) -> None:
    x = np.stack(sequence.tail).astype(F32)
    original(sequence)
    scheme, blocks = sequence.scheme, sequence.blocks
    if len(blocks) > 1 and scheme.axis == "channel" and scheme.symmetric:
        greatest = np.maximum(blocks[-2].scale, blocks[-1].scale)
        blocks[-1] = _recoded(reference, x, greatest, blocks[-1].zero, blocks[-1], scheme)


def _remember_cropped(original: Function, sequence: Any, length: int) -> None:
    """Keep the block that a crop cuts."""
    whole, rest = divmod(max(length - len(sequence.sinks), 0), sequence.block_size)
    if whole < len(sequence.blocks):
        sequence.cropped = sequence.blocks[whole] if rest else None
    original(sequence, length)


def _seal_with_old_scales(original: Function, reference: Reference, sequence: Any) -> None:
    x = np.stack(sequence.tail).astype(F32)
    original(sequence)
    old = vars(sequence).pop("cropped", None)
    if old is not None and sequence.scheme.axis == "channel":
        sequence.blocks[-1] = _recoded(
            reference, x, old.scale, old.zero, sequence.blocks[-1], sequence.scheme
        )


def _append_and_keep(original: Function, sequence: Any, tokens: Any) -> None:
    vars(sequence).setdefault("raw", []).extend(tokens)
    original(sequence, tokens)


def _crop_what_is_kept(original: Function, sequence: Any, length: int) -> None:
    original(sequence, length)
    del vars(sequence).setdefault("raw", [])[length:]


def _kept_survivors(original: Function, sequence: Any, block: Any, count: int) -> Any:
    at = next(i for i, one in enumerate(sequence.blocks) if one is block)
    first = len(sequence.sinks) + at * sequence.block_size
    return sequence.raw[first : first + count]


def _truncated_survivors(
    original: Function, reference: Reference, sequence: Any, block: Any, count: int
) -> Any:
    decoded = reference.spec.decode(block, sequence.scheme)[:count]
    narrowed = reference.rounding.saturate(decoded, sequence.dtype)
    return list(toward_zero(narrowed, decoded, sequence.dtype))


def _remember_dropped(original: Function, sequence: Any, length: int) -> None:
    """Keep the tokens that a crop drops from the tail."""
    before = list(sequence.tail)
    blocks = len(sequence.blocks)
    original(sequence, length)
    if len(sequence.blocks) == blocks:
        sequence.dropped = before[len(sequence.tail) :]


def _seal_with_dropped(original: Function, reference: Reference, sequence: Any) -> None:
    x = np.stack(sequence.tail).astype(F32)
    original(sequence)
    dropped = vars(sequence).pop("dropped", None)
    scheme = sequence.scheme
    if dropped and scheme.axis == "channel" and not scheme.outlier_channels:
        whole = np.concatenate([x, np.stack(dropped).astype(F32)])
        wide = reference.spec.encode(whole, scheme)
        sequence.blocks[-1] = _recoded(
            reference, x, wide.scale, wide.zero, sequence.blocks[-1], scheme
        )


def _crop_twice(original: Function, sequence: Any, length: int) -> None:
    held = len(sequence.sinks) + len(sequence.blocks) * sequence.block_size + len(sequence.tail)
    original(sequence, max(2 * length - held, 0))


def _crop_beside_the_tail(original: Function, sequence: Any, length: int) -> None:
    after_sinks = max(length - len(sequence.sinks), 0)
    tail = list(sequence.tail)
    whole, rest = divmod(after_sinks, sequence.block_size)
    edge = rest == 0 and 0 < whole < len(sequence.blocks)
    original(sequence, length)
    if edge:
        sequence.tail = tail


def _append_with_sinks_of_the_first(original: Function, sequence: Any, tokens: Any) -> None:
    """Fill the sinks from the first tokens that come, and from no others."""
    scheme = sequence.scheme
    if len(tokens) and 0 < len(sequence.sinks) < scheme.sink_tokens:
        sequence.scheme = replace(scheme, sink_tokens=len(sequence.sinks))
        original(sequence, tokens)
        sequence.scheme = scheme
    else:
        original(sequence, tokens)


def _append_without_sinks_again(original: Function, sequence: Any, tokens: Any) -> None:
    """Once there were sinks, take no more."""
    scheme = sequence.scheme
    if vars(sequence).get("filled"):
        sequence.scheme = replace(scheme, sink_tokens=len(sequence.sinks))
    original(sequence, tokens)
    sequence.scheme = scheme
    sequence.filled = len(sequence.sinks) == scheme.sink_tokens or vars(sequence).get("filled")


CACHES = [
    Mistake("dropped tokens in the range", "C1",
        "tokens that a crop dropped still enter the scales of the block that is sealed next",
        STREAM, {"model.crop": around(_remember_dropped),
                 "model.seal": knowing_both(_seal_with_dropped)}),
    Mistake("crop by twice the tokens", "C1",
        "a crop drops twice the tokens, as if it counted unpacked bytes",
        STREAM, {"model.crop": around(_crop_twice)}),
    Mistake("tail kept by a crop to a block's end", "C1",
        "a crop to the end of a block keeps the tail behind the blocks that it drops",
        STREAM, {"model.crop": around(_crop_beside_the_tail)}),
    Mistake("sinks from one append", "K1",
        "sinks that come in several appends are not put together",
        STREAM, {"model.append": around(_append_with_sinks_of_the_first)}),
    Mistake("no sinks after a crop", "K1",
        "a cache cropped to fewer tokens than sinks does not fill its sinks again",
        STREAM, {"model.append": around(_append_without_sinks_again)}),
    *(Mistake(f"tail in {dtype}", "B1", f"the tail went through {dtype}; it is kept as it came",
          STREAM, {"model.stored": _tail_in(dtype)}) for dtype in ("float16", "bfloat16")),
    Mistake("tail quantized early", "B1",
        "the tail went through the quantizer; it is kept as it came",
        STREAM, {"model.stored": knowing_both(_with_coded_tail)}),
    Mistake("scales that grow", "B1", "a block's scales are at least those of the block before",
        STREAM, {"model.seal": knowing_both(_seal_with_greatest_scale)}),
    Mistake("old scales after a crop", "C1",
        "a block that was cropped is sealed again with its old scales",
        STREAM, {"model.crop": around(_remember_cropped),
                 "model.seal": knowing_both(_seal_with_old_scales)}),
    Mistake("raw tokens after a crop", "C1",
        "a crop restored the tokens as they came; what attention saw are the decoded ones",
        STREAM, {"model.append": around(_append_and_keep),
                 "model.crop": around(_crop_what_is_kept),
                 "model.survivors": around(_kept_survivors)}),
    Mistake("tokens of a crop cut off", "C1", "decoded tokens of a crop are narrowed by truncation",
        STREAM, {"model.survivors": knowing_both(_truncated_survivors)}),
    Mistake("tokens of a crop overflow", "C1",
        "decoded tokens of a crop beyond the dtype are infinite; they become its largest value",
        STREAM, {"rounding.saturate": instead(lambda value, dtype: value.astype(dtype))}),
]  # fmt: skip

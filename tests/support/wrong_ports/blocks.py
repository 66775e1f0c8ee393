"""Blocks, and the sequences that are cut into them (rules I2, K1, B1, B2)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nsq_ref import Scheme
from nsq_ref.dtypes import FLOAT_DTYPES
from tests.support.wrong_ports.balanced import sizes_of
from tests.support.wrong_ports.codes import codes_of
from tests.support.wrong_ports.decoding import decode_block, dequantized, rebuilt
from tests.support.wrong_ports.exact import F16, F32, Array, Parts, nothing
from tests.support.wrong_ports.factors import factors
from tests.support.wrong_ports.knobs import RIGHT, Knobs
from tests.support.wrong_ports.narrowing import narrowed, overflowing, positive_zero
from tests.support.wrong_ports.norms import normed
from tests.support.wrong_ports.outliers import outlier_channels
from tests.support.wrong_ports.packed import packed_rows
from tests.support.wrong_ports.scales import extents, scale_and_zero


def encode_block(
    x: Array, scheme: Scheme, knobs: Knobs, other: Array | None = None, old: Any = None,
    whole: Array | None = None,
) -> Parts:  # fmt: skip
    """Return the parts of one block ``x[T, D]``.

    `other` is what wrongly enters its scales too, and `whole` the sequence that it is of.
    """
    size = sizes_of(x, scheme, knobs, whole)
    norm, direction = normed(x, scheme, knobs, size)
    x = x.astype(F32)
    head_dim = x.shape[1]
    kept = min(scheme.outlier_channels, head_dim)
    index = outlier_channels(direction, kept, knobs)
    coded = np.ones(head_dim, bool)
    coded[index] = False
    if knobs.outlier_norm == "coded" and kept and scheme.separate_norm:
        norm, direction = normed(np.where(coded, x, 0), scheme, knobs)
        direction = x / nothing(norm)[:, None]
    values = x if knobs.outlier_values == "x" else direction
    outliers = positive_zero(narrowed(values[:, index], np.dtype(F16)), knobs)
    if not np.isfinite(outliers).all():
        raise OverflowError("an outlier is beyond float16")

    ranged = direction
    if knobs.zero_token_skipped:
        ranged = direction[np.any(direction != 0, axis=1)]
    if knobs.extent == "last token out" and len(ranged) > 1:
        ranged = ranged[:-1]
    if other is not None:
        ranged = np.concatenate([ranged, normed(other, scheme, knobs)[1]])
    by_channel = scheme.axis == "channel"
    enters = coded if not (knobs.outliers_in_scale and not by_channel) else np.ones(head_dim, bool)
    if by_channel and knobs.outlier_scales:
        enters = np.ones(head_dim, bool)
    low, high = extents(ranged, enters, scheme, knobs)
    if not by_channel:
        low, high = low[: len(x)], high[: len(x)]
        if knobs.zero_token_skipped and len(low) < len(x):
            whole = np.zeros((2, len(x), 1), F32)
            whole[:, np.any(direction != 0, axis=1)] = low, high
            low, high = whole
    scale, zero, wide = scale_and_zero(low, high, direction, enters, scheme, knobs)
    if old is not None and by_channel:
        scale, zero = old["scale"], old.get("zero", np.zeros_like(old["scale"]))
        wide = scale.astype(F32), zero.astype(F32)
    overflowing(scale, knobs.scale_overflow, "a scale")
    overflowing(zero, knobs.scale_overflow, "a zero")

    used = (wide[0] if knobs.narrow_after_codes else scale).astype(F32)
    used_zero = (wide[1] if knobs.zero_after_codes else zero).astype(F32)
    codes = codes_of(x, norm, direction, used, used_zero, scheme, knobs)
    if not knobs.outlier_codes:
        codes[:, ~coded] = 0
    if scheme.separate_norm and not knobs.zero_token_coded:
        codes[norm == 0] = 0

    y = dequantized(codes, scale, zero, knobs)
    y[:, index] = outliers
    parts: Parts = {"packed": packed_rows(codes, scheme, knobs)}
    if scheme.separate_norm:
        parts["norm"] = factors(x, y, norm, scheme, knobs, size)
    parts["scale"] = scale
    if not scheme.symmetric:
        parts["zero"] = zero
    if scheme.outlier_channels:
        order = index
        if knobs.outlier_order == "size":
            order = index[np.argsort(-np.max(np.abs(direction[:, index]), axis=0), kind="stable")]
        parts["outlier_index"] = order[None].astype(np.int32)
        parts["outliers"] = outliers[:, np.searchsorted(index, order)]
    if knobs.decode_check:
        x_hat = rebuilt(y, parts.get("norm"), scheme, RIGHT)
        if not np.isfinite(x_hat).all():
            raise OverflowError("a decoded value is beyond float32")
        if knobs.collapsed == "refused" and (x.any(axis=1) & ~x_hat.any(axis=1)).any():
            raise ValueError("a token decodes to zero")
    return parts


def block_starts(tokens: int, scheme: Scheme, knobs: Knobs) -> list[tuple[int, int]]:
    if not tokens:
        return []
    size = max((scheme.block_size or tokens) + (knobs.block if scheme.block_size else 0), 1)
    shift = 0
    if knobs.blocks_from == "first token" and scheme.block_size:
        shift = scheme.sink_tokens
    edges = [0, *(e for e in range(size - shift, tokens, size) if e > 0), tokens]
    return list(itertools.pairwise(edges))


def joined(blocks: Sequence[Parts]) -> Parts:
    return {name: np.concatenate([one[name] for one in blocks]) for name in blocks[0]}


def no_tokens(scheme: Scheme, head_dim: int) -> Parts:
    scales = FLOAT_DTYPES[scheme.scale_dtype]
    per_byte = {8: 1, 4: 2, 2: 4}
    row = (
        -(-head_dim // 4) + -(-head_dim // 8)
        if scheme.bits == 3
        else -(-head_dim // per_byte[scheme.bits])
    )
    parts: Parts = {"packed": np.zeros((0, row), np.uint8)}
    if scheme.separate_norm:
        parts["norm"] = np.zeros(0, FLOAT_DTYPES[scheme.norm_dtype])
    shape = (0, head_dim if scheme.axis == "channel" else 1)
    parts["scale"] = np.zeros(shape, scales)
    if not scheme.symmetric:
        parts["zero"] = np.zeros(shape, scales)
    if scheme.outlier_channels:
        kept = min(scheme.outlier_channels, head_dim)
        parts["outlier_index"] = np.zeros((0, kept), np.int32)
        parts["outliers"] = np.zeros((0, kept), F16)
    return parts


def encode_sequence(x: Array, scheme: Scheme, knobs: Knobs, shared: Array | None = None) -> Parts:
    sinks, rest = x[: scheme.sink_tokens], x[scheme.sink_tokens :]
    spans = block_starts(len(rest), scheme, knobs)
    other = shared
    if knobs.sinks_in_scale and len(sinks):
        other = sinks
    if knobs.blocks == "one" and len(spans) > 1:
        other = rest
    blocks = [encode_block(rest[a:b], scheme, knobs, other, whole=rest) for a, b in spans]
    parts = joined(blocks) if blocks else no_tokens(scheme, x.shape[1])
    if knobs.scale_shape == "per token" and scheme.axis == "channel":
        parts["scale"] = np.resize(parts["scale"], (len(rest), 1))
    elif knobs.scale_shape == "one":
        parts["scale"] = parts["scale"].max().reshape(1, 1)
    if scheme.sink_tokens:
        kept = sinks.astype(F32) if knobs.sinks_float32 else sinks
        if knobs.sinks_coded and len(sinks):
            coded = encode_block(sinks, scheme, RIGHT)
            kept = decode_block(coded, scheme, x.shape[1], RIGHT).astype(x.dtype)
        parts["sinks"] = kept
    return parts


def sequences(x: Array) -> Iterator[Array]:
    yield from x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def refuse(x: Array, knobs: Knobs) -> None:
    wide = x.astype(F32)
    if np.isnan(wide).any() and not knobs.nan:
        raise ValueError("x has NaN")
    if np.isinf(wide).any() and not knobs.infinity:
        raise ValueError("x has infinity")

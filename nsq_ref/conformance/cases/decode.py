"""The stored parts that ports are asked to decode: encoded ones, and such as show an arithmetic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count

import numpy as np

from nsq_ref import rounding, spec
from nsq_ref.conformance import model
from nsq_ref.conformance.cases.pools import POOL, Draw, differences, stored_blocks
from nsq_ref.conformance.mistakes import arithmetic as wrong
from nsq_ref.conformance.operations import Case
from nsq_ref.dtypes import FLOAT_DTYPES, Array
from nsq_ref.scheme import Scheme

# Families whose encoded cases are decoded, too.
_DECODED = (
    "ordinary", "leading-axes", "zero-token", "zero-channel", "negative-zero", "block-boundary",
    "sinks", "padding", "tiny-norm", "norm-narrowing", "scale-range", "collapse",
    "outlier-channels", "sequences", "channel-tile", "long-sequence",
)  # fmt: skip
_WIDEST = 512  # of a decoded case's channels


def decode_cases(
    encoded: Iterable[Case], scheme: Scheme, seed: int, quick: bool = False
) -> Iterator[Case]:
    """Yield the cases of the operation ``"decode"``; some are cases of encode that are decoded."""
    for case in encoded:
        x = case.inputs["x"]
        if x.dtype != np.float32 and not scheme.sink_tokens and case.flags[0] != "input-dtype":
            continue  # what is stored has no trace of the input's dtype
        wide = x.shape[-1] > _WIDEST and case.flags[0] == "channel-tile"
        if case.refused_by is None and case.flags[0] in _DECODED and not wide:
            inputs = {**model.encode(x, scheme), "shape": np.array(x.shape, np.int32)}
            made = replace(case, operation="decode", inputs=inputs, recipe=None)
            if scheme.sink_tokens and x.dtype != np.float32 and case.flags[0] != "input-dtype":
                further = 900 if x.dtype == FLOAT_DTYPES["float16"] else 1800
                flag, _, place = case.id.partition("/")
                made = replace(made, id=f"{flag}/{int(place) + further}")
            yield made
    numbers: dict[str, Iterator[int]] = defaultdict(lambda: count(100))  # behind encoded cases
    for flag, block in _synthetic(scheme, seed, quick):
        head_dim = block.codes.shape[-1]
        sinks = np.resize(np.array([[0.5, -3, 7]], np.float32), (scheme.sink_tokens, head_dim))
        inputs = model.parts_of(sinks, block, scheme)
        inputs["shape"] = np.array([len(sinks) + len(block.codes), head_dim], np.int32)
        number = next(numbers[flag])
        yield Case(f"{flag}/{number}", "decode", scheme, (flag,), inputs)
        for further, dtype in ((1000, "float16"), (2000, "bfloat16")) if len(sinks) else ():
            other = {**inputs, "sinks": sinks.astype(FLOAT_DTYPES[dtype])}
            yield Case(f"{flag}/{number + further}", "decode", scheme, (flag,), other)


Dequantize = Callable[[Array, Array, Array], Array]
Renormalise = Callable[[Array, Array], Array]


def _wide_dequantize(codes: Array, scale: Array, zero: Array) -> Array:
    return codes.astype(np.float64) * scale.astype(np.float64) + zero.astype(np.float64)


def _centred(codes: Array, scale: Array, zero: Array) -> Array:
    """Codes from the middle of their range: another product, and another sum."""
    middle = np.float32(codes.max() // 2 + 1)
    scale, zero = scale.astype(np.float32), zero.astype(np.float32)
    return np.asarray((codes.astype(np.float32) - middle) * scale + (zero + middle * scale))


def _length(y: Array) -> Array:
    length = np.sqrt(wrong.in_order(y, y)) if y.dtype == np.float64 else rounding.norm(y)
    return wrong.divisor(length)[..., None]


def _right(y: Array, norm: Array) -> Array:
    return norm * (y / _length(y))


def _length_summed(total: wrong.Sum) -> Renormalise:
    return lambda y, norm: norm * (y / wrong.divisor(np.sqrt(total(y, y)))[..., None])


def _length_moved(toward: float) -> Renormalise:
    return lambda y, norm: norm * (y / np.nextafter(_length(y), np.float32(toward)))


# The flag, and how y and x_hat are made of what is stored where one of them is wrong.
_WRONG_DECODERS: tuple[tuple[str, Dequantize, Renormalise], ...] = (
    ("merged-decode", spec.dequantize, lambda y, norm: (norm / _length(y)) * y),
    ("merged-decode", spec.dequantize, lambda y, norm: (norm * y) / _length(y)),
    ("reciprocal-of-length", spec.dequantize,
     lambda y, norm: norm * (y * (np.float32(1) / _length(y)))),
    *(("length-accumulation", spec.dequantize, _length_summed(total))
      for total in wrong.FLOAT32_SUMS),
    *(("length-accumulation", spec.dequantize, _length_moved(toward)) for toward in (np.inf, 0)),
    ("fused-decode", wrong.fused_dequantize, _right),
    ("fused-decode", _centred, _right),
    ("double-precision-decode", _wide_dequantize, _right),
    ("double-precision-decode", spec.dequantize,
     lambda y, norm: norm * (y.astype(np.float64) / _length(y))),
)  # fmt: skip


def _decoded(
    block: spec.Block, scheme: Scheme, dequantize: Dequantize, renormalise: Renormalise
) -> Array:
    """Decode as `spec.decode` does, but for two functions."""
    y = dequantize(block.codes, block.scale, block.zero)
    at = np.broadcast_to(block.outlier_index, block.outliers.shape)
    np.put_along_axis(y, at, block.outliers.astype(y.dtype), -1)
    norm = block.norm.astype(np.float32)[..., None]
    renormalised = scheme.separate_norm and scheme.magnitude == "norm"
    return np.asarray(renormalise(y, norm) if renormalised else norm * y).astype(np.float32)


def _one(block: spec.Block, index: int = 0) -> spec.Block:
    return spec.Block(*(part[index] for part in block))


def _synthetic(scheme: Scheme, seed: int, quick: bool) -> Iterator[tuple[str, spec.Block]]:
    """Yield blocks that no known input was encoded to, each with the flag it is about."""
    draw = Draw(seed, "decode")
    for tokens, head_dim in () if quick else ((4, 6), (3, 25)):
        pool = stored_blocks(scheme, draw, POOL // 2, tokens, head_dim)
        right = spec.decode(pool, scheme).view(np.uint32)
        for flag, dequantize, renormalise in _WRONG_DECODERS:
            decoded = _decoded(pool, scheme, dequantize, renormalise).view(np.uint32)
            counts = differences([right], [decoded])
            best = int(np.argmax(counts))
            if counts[best] and (head_dim == 6 or flag == "length-accumulation"):
                yield flag, _one(pool, best)
    yield from _special_blocks(scheme, draw)


def _special_blocks(scheme: Scheme, draw: Draw) -> Iterator[tuple[str, spec.Block]]:
    least, most = scheme.code_range
    # As many tokens as a block has: codes of each kind at each place of a byte.
    block = _one(stored_blocks(scheme, draw, 1, 8, 17 if scheme.bits < 8 else 65))
    codes = np.resize(np.arange(least, most + 1, dtype=np.int16), block.codes.shape)
    coded = ~spec.mark(block.outlier_index, codes.shape[-1])
    yield "every-code", block._replace(codes=np.where(coded, codes, np.int16(0)))
    block = _one(stored_blocks(scheme, draw, 1, 3, 5))
    norm, codes = block.norm.copy(), block.codes.copy()
    codes[-1] = 0
    if scheme.separate_norm:
        norm[-1] = 0
    yield "zero-token", block._replace(codes=codes, norm=norm)
    if scheme.symmetric:  # y is 0, and its norm is not
        outliers = np.zeros_like(block.outliers)
        yield "collapse", block._replace(codes=np.zeros_like(codes), outliers=outliers)
    if scheme.scale_dtype != "float16" and scheme.axis == "channel" and not scheme.outlier_channels:
        # ||y|| half way between two float32, and above by less than float64 can see.
        block = _one(stored_blocks(scheme, draw, 1, 3, 5))
        codes = np.ones_like(block.codes)
        codes[1:, 4] = 0
        scale = np.ldexp(1.0, np.array([[0, -12, -12, -24, -30]])).astype(block.scale.dtype)
        zero = np.zeros_like(scale)
        yield "length-accumulation", block._replace(codes=codes, scale=scale, zero=zero)
    for exponent in (-20, -130, -16):
        block = _one(stored_blocks(scheme, draw, 1, 3, 5, exponent))
        block = block._replace(codes=np.where(block.scale == 0, 0, block.codes))  # as in Q1
        small = np.ldexp(draw.uniform(1, 4, *block.norm.shape), exponent).astype(np.float32)
        narrowed = rounding.narrow(small, block.norm.dtype)
        yield "subnormal", block._replace(norm=narrowed) if scheme.separate_norm else block
        yield "subnormal", block

"""Engineered cases for any scheme: data on which each decision of the specification shows.

Random data certifies nothing here: a wrong rounding agrees with the right one nearly everywhere.
So cases lie on ties, next to ties, and at the ends of every range, and where that cannot be
computed, they are picked from a pool: those on which a known wrong arithmetic gives other bytes.

All draws come from `pools.Draw` and from operations that every platform rounds alike, so that each
version of NumPy makes the same cases, byte for byte.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from nsq_ref import rounding, spec
from nsq_ref.conformance import model
from nsq_ref.conformance import wrong_arithmetic as wrong
from nsq_ref.conformance.encode_cases import encode_cases, refusal
from nsq_ref.conformance.family import family_scheme
from nsq_ref.conformance.frames import scheme_array
from nsq_ref.conformance.operations import OPERATIONS, Case
from nsq_ref.conformance.pools import POOL, Draw, differences, stored_blocks
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import FLOAT_DTYPES, Scheme

__all__ = ["cases", "require_size"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

# Cases are as long as blocks and sinks and as wide as outliers, and are made in pools of hundreds.
MOST = {"block_size": 4096, "sink_tokens": 256, "outlier_channels": 256}
FLOAT16, BFLOAT16, FLOAT32 = (FLOAT_DTYPES[name] for name in ("float16", "bfloat16", "float32"))


@in_default_environment
def cases(
    scheme: Scheme | str,
    operations: Sequence[str] = OPERATIONS,
    seed: int = 0,
    dtypes: Sequence[str] = ("float32", "float16", "bfloat16"),
) -> list[Case]:
    """Return the cases of one scheme.

    Parameters
    ----------
    scheme : Scheme or str
        A name is one of `family.FAMILY`.
    operations : sequence of {"encode", "decode", "attend", "stream"}
    seed : int
        Of what is drawn; what is computed is the same for all.
    dtypes : sequence of {"float32", "float16", "bfloat16"}
        Of the inputs. Cases of other dtypes are left out, and the others keep their ids.

    Returns
    -------
    list of Case

    Raises
    ------
    ValueError
        For a scheme with more sinks, outliers or tokens in a block than cases are made for.

    Examples
    --------
    >>> cases("nsep+pchan4", ["encode"])[0]
    Case(encode ordinary/0)
    """
    scheme = family_scheme("scheme", scheme)
    require_size(scheme)
    made: list[Case] = []
    with np.errstate(all="ignore"):  # what overflows is refused, or is to be
        encoded = list(encode_cases(scheme, seed))
        if "encode" in operations:
            made += encoded
        if "decode" in operations:
            made += _decode_cases(encoded, scheme, seed)
        if "attend" in operations:
            made += _attend_cases(scheme, seed)
        if "stream" in operations:
            made += _stream_cases(encoded, scheme, seed)
    return [case for case in made if _input_dtype(case) in dtypes]


def require_size(scheme: Scheme) -> None:
    """Raise for a scheme that no cases are made for.

    Raises
    ------
    ValueError
        Where it has more sinks, outliers or tokens in a block.

    Examples
    --------
    >>> require_size(Scheme(block_size=2**40))
    Traceback (most recent call last):
    ValueError: block_size=1099511627776 is more than cases are made for; check with at most 4096
    """
    for name, most in MOST.items():
        if (number := getattr(scheme, name) or 0) > most:
            raise ValueError(
                f"{name}={number} is more than cases are made for; check with at most {most}"
            )


def _input_dtype(case: Case) -> str:
    for name in ("x", "sinks"):
        if name in case.inputs:
            return str(case.inputs[name].dtype.name)
    return "float32"


# --- decode -------------------------------------------------------------------------------------

# Families whose encoded cases are decoded, too.
_DECODED = (
    "ordinary", "leading-axes", "zero-token", "zero-channel", "negative-zero", "block-boundary",
    "sinks", "padding", "tiny-norm", "norm-narrowing", "scale-range", "collapse",
    "outlier-channels",
)  # fmt: skip


def _decode_cases(encoded: Iterable[Case], scheme: Scheme, seed: int) -> Iterator[Case]:
    for case in encoded:
        if case.refused_by is None and case.flags[0] in _DECODED:
            x = case.inputs["x"]
            inputs = {**model.encode(x, scheme), "shape": np.array(x.shape, np.int32)}
            yield replace(case, operation="decode", inputs=inputs)
    numbers: dict[str, Iterator[int]] = defaultdict(lambda: count(100))  # behind encoded cases
    for flag, block in _synthetic(scheme, seed):
        head_dim = block.codes.shape[-1]
        sinks = np.resize(np.array([[0.5, -3, 7]], np.float32), (scheme.sink_tokens, head_dim))
        inputs = model.parts_of(sinks, block, scheme)
        inputs["shape"] = np.array([len(sinks) + len(block.codes), head_dim], np.int32)
        yield Case(f"{flag}/{next(numbers[flag])}", "decode", scheme, (flag,), inputs)


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


def _synthetic(scheme: Scheme, seed: int) -> Iterator[tuple[str, spec.Block]]:
    """Yield blocks that no known input was encoded to, each with the flag it is about."""
    draw = Draw(seed, "decode")
    for tokens, head_dim in ((4, 6), (3, 25)):
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


# --- attend -------------------------------------------------------------------------------------


def _attend_cases(scheme: Scheme, seed: int) -> Iterator[Case]:
    numbers: dict[str, Iterator[int]] = defaultdict(count)
    for flag, query, keys, values, value_scheme, options in _attended(scheme, Draw(seed, "attend")):
        inputs: dict[str, Array] = {"query": query.astype(np.float32)}
        for side, x, own in (("keys", keys, scheme), ("values", values, value_scheme)):
            parts = model.encode(x.astype(np.float32), own)
            inputs |= {f"{side}.{name}": part for name, part in parts.items()}
            inputs[f"{side}.shape"] = np.array(x.shape, np.int32)
        default = np.float32(1) / np.sqrt(np.float32(query.shape[-1]))
        inputs |= {
            "value_scheme": scheme_array(value_scheme),
            "scale": np.array([options.get("scale", default)], np.float32),
            "causal": np.array([options.get("causal", 1)], np.int32),
            "softcap": np.array([options.get("softcap", 0)], np.float32),
            "sliding_window": np.array([options.get("sliding_window", 0)], np.int32),
        }
        yield Case(f"{flag}/{next(numbers[flag])}", "attend", scheme, (flag,), inputs)


_Attended = tuple[str, Float32, Float32, Float32, Scheme, dict[str, float]]


def _attended(scheme: Scheme, draw: Draw) -> Iterator[_Attended]:
    """Yield flag, query, keys, values, scheme of the values, and options."""
    sinks = scheme.sink_tokens

    def drawn(
        heads: int, queries: int, kv_heads: int, tokens: int, head_dim: int, value_dim: int
    ) -> tuple[Float32, Float32, Float32]:
        own = (kv_heads, sinks + tokens)
        query = draw.bell(heads, queries, head_dim)
        return query, draw.bell(*own, head_dim), draw.bell(*own, value_dim)

    for heads, queries, kv_heads, tokens, head_dim in (
        (2, 1, 2, 9, 8), (1, 1, 1, 1, 5), (2, 2, 1, 4, 16),
    ):  # fmt: skip
        yield "attention", *drawn(heads, queries, kv_heads, tokens, head_dim, head_dim), scheme, {}
    for heads, kv_heads in ((8, 2), (6, 3), (4, 1)):
        query, keys, values = drawn(heads, 1, kv_heads, 4, 4, 4)
        values += 4 * np.arange(kv_heads, dtype=np.float32)[:, None, None]
        yield "grouped-heads", query, keys, values, scheme, {}
    for queries, causal in ((3, 1), (3, 0), (6, 1)):
        query, keys, values = drawn(2, queries, 1, 6, 4, 4)
        values[:, -1] += 8  # what must not be seen weighs
        yield "causal-mask", query, keys, values, scheme, {"causal": causal}
    for window, queries, tokens in ((1, 2, 5), (3, 2, 9), (2, 4, 4), (100, 2, 5)):
        query, keys, values = drawn(2, queries, 1, tokens, 4, 4)
        values += 4 * np.arange(sinks + tokens, dtype=np.float32)[:, None]
        yield "sliding-window", query, keys, values, scheme, {"sliding_window": window}
    for softcap, factor in ((2.0, 4.0), (30.0, 20.0)):
        query, keys, values = drawn(2, 1, 1, 6, 8, 4)
        yield "softcap", query * np.float32(factor), keys, values, scheme, {"softcap": softcap}
    yield "attention-scale", *drawn(2, 1, 1, 6, 8, 8), scheme, {"scale": 1.25}
    for factor in (200.0, -200.0):  # exp overflows, or all of it underflows
        query, keys, values = drawn(2, 1, 1, 6, 4, 4)
        query, keys = np.abs(query) + np.float32(0.5), np.abs(keys) + np.float32(0.5)
        yield "large-scores", query * np.float32(factor), keys, values, scheme, {}
    query, keys, values = drawn(2, 1, 1, 6, 4, 4)
    keys[:] = keys[:, :1]
    yield "equal-scores", query, keys, values, scheme, {}
    yield "value-head-dim", *drawn(2, 1, 1, 5, 8, 3), scheme, {}
    other = Scheme(
        bits=8 if scheme.bits == 4 else 4, separate_norm=False, axis="token", sink_tokens=sinks,
        symmetric=not scheme.symmetric,
    )  # fmt: skip
    yield "value-scheme", *drawn(2, 1, 1, 5, 8, 8), other, {}
    query, keys, values = drawn(2, 1, 1, 4, 4, 4)
    keys[:, -2], values[:, -3] = 0, 0
    yield "zero-token", query, keys, values, scheme, {}
    if scheme.block_size is not None and scheme.block_size <= 16:
        tokens = 2 * scheme.block_size + 1
        query, keys, values = drawn(2, 1, 1, tokens, 4, 4)
        grown = np.ldexp(np.float32(1), np.arange(sinks + tokens) // scheme.block_size)[:, None]
        yield "block-boundary", query, keys, values * grown, scheme, {}
    query, keys, values = drawn(2, 3, 1, 6, 8, 4)  # a cap after the mask would let masked ones in
    yield "softcap", query * np.float32(4), keys, values, scheme, {"softcap": 2.0}


# --- stream -------------------------------------------------------------------------------------

# Families whose blocks a cache seals, too.
_STREAMED = (
    "half-even", "reciprocal-of-scale", "merged-division", "reciprocal-of-norm", "tiny-norm",
    "norm-accumulation", "norm-narrowing", "factor-narrowing", "scale-narrowing", "scale-range",
    "negative-zero", "outlier-channels",
)  # fmt: skip


def _stream_cases(encoded: Iterable[Case], scheme: Scheme, seed: int) -> Iterator[Case]:
    if scheme.block_size is None:
        return
    tokens = scheme.sink_tokens + scheme.block_size
    for source in encoded:
        x = source.inputs["x"]
        streamed = source.flags[0] in _STREAMED and source.refused_by is None
        if tokens > 64:  # one of each will do
            streamed &= source.id.endswith("/0")
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
    for flag, dtype, row, steps in _histories(sinks, size):
        x = _rows(draw, steps, row, size, head_dim).astype(dtype)
        if flag == "crop-saturation":
            block = _decoded_beyond_float16(scheme, draw, size, head_dim)
            if block is None:  # the scheme decodes to nothing so large
                continue
            x = np.concatenate([np.ones((sinks, head_dim), FLOAT16), block])[None]
        inputs = _stream_inputs(x, steps, row)
        yield Case(f"{flag}/{next(numbers[flag])}", "stream", scheme, (flag,), inputs)


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


def _decoded_beyond_float16(scheme: Scheme, draw: Draw, size: int, head_dim: int) -> Array | None:
    """Return a block of float16 that is accepted, and decodes to values beyond float16."""
    x = 500 * draw.bell(1024, size, head_dim).astype(np.float64)
    x[:, 0] = 65504 * draw.uniform(-0.02, 0.02, 1024, head_dim)
    x[:, 0, 0] = 65504
    x[:, 0, 1] = 65504 * draw.uniform(-0.12, 0.12, 1024)
    pool = x.astype(FLOAT16)
    decoded = spec.decode(spec.encode(pool.astype(np.float32), scheme), scheme)
    beyond = np.isfinite(decoded).all(axis=(1, 2))
    beyond &= np.any(np.abs(decoded[:, :-1]) >= 65520, axis=(1, 2))
    for block in pool[beyond][:8]:
        if refusal(block, replace(scheme, sink_tokens=0)) is None:
            return np.asarray(block)
    return None

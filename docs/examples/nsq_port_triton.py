"""The paper's scheme nsep+pchan4 in Triton, with blocks and with the gain of rule M2.

nsq check nsq_port_triton.py:encode --decode nsq_port_triton.py:decode

With --attend nsq_port_triton.py:attend, attention too. On a machine without a GPU set
TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from nsq_ref import Scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 64 if DEVICE == "cuda" else 512  # of a tile; programs begin slowly in the interpreter
KEYS = 64  # of a tile of attention
# Products and sums are not contracted: every rule names its roundings.
OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def digit(value, place, limb):
    """Return 32 bits of ``value * 2^place``, where value has 50 bits at most."""
    shift = place - 32 * limb
    left = value << tl.minimum(tl.maximum(shift, 0), 31).to(tl.int64)
    right = value >> tl.minimum(tl.maximum(-shift, 0), 63).to(tl.int64)
    return tl.where(shift >= 32, 0, tl.where(shift >= 0, left, right) & 0xFFFFFFFF)


@triton.jit
def exponent_of(bits):
    """Return the place of the last bit of float32, above 2^-149."""
    return tl.maximum((bits >> 23) & 255, 1) - 1


@triton.jit
def mantissa_of(bits):
    """Return the 24 bits of float32, or fewer where it is subnormal."""
    return (bits & 0x7FFFFF) | tl.where(((bits >> 23) & 255) > 0, 0x800000, 0)


@triton.jit
def next_if_more(x, lower):
    """Return lower, or the float32 above it if the exact norm is nearer to that (N1).

    Sums of integers have no order: each of 18 limbs of 32 bits is summed over the row, and what
    they come to, less the square of the middle of the two, is followed from the lowest limb up.
    """
    bits, low = x.to(tl.int32, bitcast=True), lower.to(tl.int32, bitcast=True)
    mantissa, middle = mantissa_of(bits).to(tl.int64), 2 * mantissa_of(low).to(tl.int64) + 1
    square, square_place = mantissa * mantissa, 2 * exponent_of(bits) + 2  # units of 2^-300
    limit, limit_place = middle * middle, 2 * exponent_of(low)
    carry = tl.zeros_like(limit)
    rest = tl.zeros_like(limit)
    for limb in tl.static_range(18):
        here = tl.sum(digit(square, square_place, limb), axis=1)
        here += carry - digit(limit, limit_place, limb)
        rest |= here & 0xFFFFFFFF
        carry = here >> 32
    is_more = (carry >= 0) & ((rest != 0) | ((low & 1) == 1))  # a tie goes to the even one
    return (low + is_more.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def norm_of(x):
    """Return the correctly rounded norms of the rows of a tile [T, D] of float32 (N1)."""
    wide = x.to(tl.float64)
    root = tl.sqrt(tl.sum(wide * wide, axis=1))  # squares are exact, their sum is not, in any order
    slack: tl.constexpr = (x.shape[1] + 8) * 2.0**-53
    lower, upper = (root * (1 - slack)).to(tl.float32), (root * (1 + slack)).to(tl.float32)
    if tl.max((lower < upper).to(tl.int32), axis=0) > 0:  # rare: the exact sum decides
        lower = tl.where(lower < upper, next_if_more(x, lower), lower)
    return lower


@triton.jit
def divided(x, divisor):
    """Return x / divisor, rounded once, and 0 where the divisor is 0 (N2 Q1 M2 D1)."""
    return tl.div_rn(x, tl.where(divisor == 0, float("inf"), divisor))


@triton.jit
def code_of(direction, scale):
    """Return codes as float32 (S3 Q1 Q2); as the bounds are whole, the clamp may come first."""
    quotient = tl.minimum(tl.maximum(divided(direction, scale.to(tl.float32)), -7.0), 7.0)
    return (quotient + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds half to even


@triton.jit
def norm_kernel(x, norms, rows, D: tl.constexpr, T: tl.constexpr, P: tl.constexpr):
    """Norms of a tile of tokens."""
    row, channel = tl.program_id(0) * T + tl.arange(0, T), tl.arange(0, P)
    mask = (row < rows)[:, None] & (channel < D)[None, :]
    tile = tl.load(x + row[:, None] * D + channel[None, :], mask=mask, other=0.0)
    tl.store(norms + row, norm_of(tile), mask=row < rows)


@triton.jit
def scale_kernel(x, norms, scale, tokens, block, D: tl.constexpr, T: tl.constexpr, P: tl.constexpr):
    """One program a block (B1): a maximum over tiles, the last of which need not be full (S1)."""
    blocks = tl.cdiv(tokens, block)
    sequence, number = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    end = tl.minimum((number + 1) * block, tokens)
    channel, peak = tl.arange(0, P), tl.zeros([P], tl.float32)
    for first in range(number * block, end, T):
        token = first + tl.arange(0, T)
        row, mask = sequence.to(tl.int64) * tokens + token, token < end
        both = mask[:, None] & (channel < D)[None, :]
        tile = tl.load(x + row[:, None] * D + channel[None, :], mask=both, other=0.0)
        direction = divided(tile, tl.load(norms + row, mask=mask, other=1.0)[:, None])  # N2
        peak = tl.maximum(peak, tl.max(tl.abs(direction), axis=0))
    stored = tl.div_rn(peak, tl.full([P], 7.0, tl.float32)).to(tl.float16)
    tl.store(scale + tl.program_id(0) * D + channel, stored, mask=channel < D)


@triton.jit
def code_kernel(
    x, norms, scale, packed, factor, rows, tokens, block,
    GAIN: tl.constexpr, D: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Codes, bytes (P1) and factors (M1 M2) of a tile of tokens, whatever blocks they are of."""
    row = tl.program_id(0) * T + tl.arange(0, T)
    mask = row < rows
    group = row // tokens * tl.cdiv(tokens, block) + row % tokens // block
    length = tl.load(norms + row, mask=mask, other=1.0)
    byte = tl.arange(0, P // 2)
    ROW: tl.constexpr = (D + 1) // 2
    value = tl.zeros([T, P // 2], tl.int32)
    for half in tl.static_range(2):  # the even channel in the low nibble, padding is code 0
        channel = 2 * byte + half
        both = mask[:, None] & (channel < D)[None, :]
        tile = tl.load(x + row[:, None] * D + channel[None, :], mask=both, other=0.0)
        scales = tl.load(scale + group[:, None] * D + channel[None, :], mask=both, other=0.0)
        code = code_of(divided(tile, length[:, None]), scales)
        value |= (code + 8.0).to(tl.int32) << (4 * half)
    tl.store(
        packed + row[:, None] * ROW + byte[None, :], value.to(tl.uint8),
        mask=mask[:, None] & (byte < ROW)[None, :],
    )  # fmt: skip
    if GAIN:
        channel = tl.arange(0, P)
        both = mask[:, None] & (channel < D)[None, :]
        tile = tl.load(x + row[:, None] * D + channel[None, :], mask=both, other=0.0)
        scales = tl.load(scale + group[:, None] * D + channel[None, :], mask=both, other=0.0)
        y = code_of(divided(tile, length[:, None]), scales) * scales.to(tl.float32)
        length = divided(length, norm_of(y))
    tl.store(factor + row, length.to(tl.float16), mask=mask)


@triton.jit
def decode_kernel(
    packed, scale, factor, x_hat, rows, tokens, block,
    GAIN: tl.constexpr, D: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Decoded values of a tile of tokens (D1)."""
    row, channel = tl.program_id(0) * T + tl.arange(0, T), tl.arange(0, P)
    group = row // tokens * tl.cdiv(tokens, block) + row % tokens // block
    mask, both = row < rows, (row < rows)[:, None] & (channel < D)[None, :]
    ROW: tl.constexpr = (D + 1) // 2
    byte = tl.load(packed + row[:, None] * ROW + channel[None, :] // 2, mask=both, other=0x88)
    code = (byte.to(tl.int32) >> (4 * (channel % 2))[None, :] & 15) - 8
    scales = tl.load(scale + group[:, None] * D + channel[None, :], mask=both, other=0.0)
    y = code.to(tl.float32) * scales.to(tl.float32)  # D1
    if not GAIN:
        y = divided(y, norm_of(y)[:, None])
    stored = tl.load(factor + row, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_hat + row[:, None] * D + channel[None, :], stored[:, None] * y, mask=both)


@triton.jit
def attend_kernel(
    query, keys, values, output, queries, tokens, group, scale, softcap, window,
    CAUSAL: tl.constexpr, D: tl.constexpr, V: tl.constexpr, T: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """One program a query: A3 wants sums in tiles, and a running maximum keeps the range."""
    head, position = tl.program_id(0) // queries, tokens - queries + tl.program_id(0) % queries
    channel, column = tl.arange(0, P), tl.arange(0, Q)
    q = tl.load(query + tl.program_id(0) * D + channel, mask=channel < D, other=0.0)
    first = head // group * tokens  # A1
    highest, total = float("-inf"), 0.0
    row = tl.zeros([Q], tl.float32)
    for start in range(0, tokens, T):
        token = start + tl.arange(0, T)
        seen = token < tokens  # A2
        if CAUSAL:
            seen &= (token <= position) & (token > position - window)
        at = (first + token)[:, None]
        k = tl.load(
            keys + at * D + channel[None, :], mask=seen[:, None] & (channel < D)[None, :], other=0.0
        )
        score = scale * tl.sum(k * q[None, :], axis=1)
        if softcap > 0:  # in float64: a tanh by exponentials loses small scores in float32
            power = tl.exp(2 * tl.minimum(tl.maximum(score.to(tl.float64) / softcap, -20), 20))
            score = (softcap * ((power - 1) / (power + 1))).to(tl.float32)
        score = tl.where(seen, score, float("-inf"))
        peak = tl.maximum(highest, tl.max(score, axis=0))
        safe = tl.where(peak == float("-inf"), 0.0, peak)  # nothing was seen yet
        weight, kept = tl.exp(score - safe), tl.exp(highest - safe)
        v = tl.load(
            values + at * V + column[None, :], mask=seen[:, None] & (column < V)[None, :], other=0.0
        )
        row = row * kept + tl.sum(weight[:, None] * v, axis=0)
        total = total * kept + tl.sum(weight, axis=0)
        highest = peak
    row = divided(row, total)
    tl.store(output + tl.program_id(0) * V + column, row, mask=column < V)


def encode(x: Any, scheme: Scheme) -> dict[str, Tensor]:
    """Return the stored parts of a NumPy array ``x[..., T, D]``."""
    require_supported(scheme)
    values = torch.from_numpy(np.array(x, np.float32)).to(DEVICE)  # I1; exact
    *lead, tokens, head_dim = values.shape
    if 0 in (tokens, head_dim) or not values.isfinite().all():
        raise ValueError("x is not finite, or has no tokens or no channels")  # I2
    block, rows = min(scheme.block_size or tokens, tokens), values.numel() // head_dim
    blocks = -(-tokens // block)
    norms = torch.empty((*lead, tokens), device=DEVICE)
    factor = norms.half()
    packed = torch.empty((*norms.shape, (head_dim + 1) // 2), dtype=torch.uint8, device=DEVICE)
    scale = torch.empty((*lead, blocks, head_dim), dtype=torch.float16, device=DEVICE)
    tile, sizes = (triton.cdiv(rows, TOKENS),), tile_sizes(head_dim)
    if rows:
        norm_kernel[tile](values, norms, rows, **sizes, **OPTIONS)
        scale_kernel[(rows // tokens * blocks,)](
            values, norms, scale, tokens, block, **sizes, **OPTIONS
        )
        code_kernel[tile](
            values, norms, scale, packed, factor, rows, tokens, block,
            GAIN=scheme.magnitude == "gain", **sizes, **OPTIONS,
        )  # fmt: skip
    if norms.isinf().any() or factor.isinf().any():
        raise ValueError("a norm or gain is beyond its dtype")  # N1 M4
    return {"packed": packed.cpu(), "scale": scale.cpu(), "norm": factor.cpu()}


def decode(parts: Mapping[str, Any], scheme: Scheme, shape: tuple[int, ...]) -> Tensor:
    """Return ``x_hat[..., T, D]`` of NumPy arrays (rule D1)."""
    return decoded(parts, scheme, shape).cpu()


def decoded(parts: Mapping[str, Any], scheme: Scheme, shape: tuple[int, ...]) -> Tensor:
    """Return what was decoded where it is."""
    require_supported(scheme)
    packed, scale, factor = (
        torch.from_numpy(np.array(parts[name])).to(DEVICE) for name in ("packed", "scale", "norm")
    )
    x_hat = torch.empty(tuple(shape), device=DEVICE)
    tokens, head_dim = x_hat.shape[-2:]
    rows = x_hat.numel() // head_dim
    if rows:
        decode_kernel[(triton.cdiv(rows, TOKENS),)](
            packed, scale, factor, x_hat, rows, tokens, min(scheme.block_size or tokens, tokens),
            GAIN=scheme.magnitude == "gain", **tile_sizes(head_dim), **OPTIONS,
        )  # fmt: skip
    return x_hat


def attend(
    query: Any, keys: Mapping[str, Any], values: Mapping[str, Any], key_scheme: Scheme,
    value_scheme: Scheme, *, scale: float, causal: bool, softcap: float | None,
    sliding_window: int | None,
) -> Tensor:  # fmt: skip
    """Return the output ``[heads, queries, D_v]`` (rules A1 to A3)."""
    k, v = decoded(keys, key_scheme, keys["shape"]), decoded(values, value_scheme, values["shape"])
    q = torch.from_numpy(np.array(query)).to(DEVICE)
    heads, queries, head_dim = q.shape
    kv_heads, tokens, width = v.shape
    output = torch.empty((heads, queries, width), device=DEVICE)
    attend_kernel[(heads * queries,)](
        q, k, v, output, queries, tokens, heads // kv_heads, float(scale), float(softcap or 0),
        sliding_window or tokens, CAUSAL=bool(causal), V=width, Q=tile_sizes(width)["P"],
        **tile_sizes(head_dim, KEYS), **OPTIONS,
    )  # fmt: skip
    return output.cpu()


def tile_sizes(head_dim: int, tokens: int = TOKENS) -> dict[str, int]:
    """Return the sizes of a tile: tokens, channels, and the power of two that these lie in."""
    return {"D": head_dim, "T": tokens, "P": max(triton.next_power_of_2(head_dim), 2)}


def require_supported(scheme: Scheme) -> None:
    """Raise for schemes that this example leaves out."""
    known = replace(Scheme(), block_size=scheme.block_size, magnitude=scheme.magnitude)
    if scheme.magnitude == "lsq" or scheme != known:
        raise NotImplementedError(f"{scheme} is not in this example")

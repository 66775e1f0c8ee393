"""The paper's scheme nsep+pchan4 in PyTorch, with blocks, the gain of rule M2, and key feedback.

nsq check nsq_port_torch:encode --decode nsq_port_torch:decode --feedback nsq_port_torch:encode
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsq_ref import Feedback, Scheme


def encode(x: Any, scheme: Scheme, *, feedback: Feedback | None = None) -> dict[str, Tensor]:
    """Return the stored parts of a NumPy array ``x[..., T, D]``, with feedback, if given."""
    require_supported(scheme)
    values = torch.from_numpy(np.array(x, np.float32))  # I1; exact for float16 and bfloat16
    if 0 in values.shape[-2:] or not values.isfinite().all():
        raise ValueError("x is not finite, or has no tokens or no channels")  # I2
    size = scheme.block_size or values.shape[-2]
    blocks = [encode_block(block, scheme, feedback) for block in values.split(size, dim=-2)]  # B1
    packed, scale, factor = zip(*blocks, strict=True)
    return {
        "packed": torch.cat(packed, dim=-2),
        "scale": torch.cat(scale, dim=-2),
        "norm": torch.cat(factor, dim=-1),
    }


def encode_block(
    x: Tensor, scheme: Scheme, feedback: Feedback | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed codes, scales and factors of one block of tokens, float32."""
    length = norm(x)
    direction = x / or_infinity(length)[..., None]  # N2
    peak = direction.abs().amax(dim=-2, keepdim=True)
    scale = (peak / torch.full_like(peak, 7)).half()  # S1: on CUDA, `peak / 7` is not a division
    wide = scale.float()  # S3
    codes = code(direction if feedback is None else fed_back(direction, wide, feedback), wide)
    factor = length  # M1
    if scheme.magnitude == "gain":
        factor = length / or_infinity(norm(codes * wide))  # M2
    stored = factor.half()
    if length.isinf().any() or stored.isinf().any():
        raise ValueError("a norm or gain is beyond its dtype")  # N1 M4
    padding = x.shape[-1] % 2
    nibbles = torch.nn.functional.pad(codes + 8, (0, padding), value=8).byte()  # P1
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4, scale, stored


def code(direction: Tensor, scale: Tensor) -> Tensor:
    """Return the codes of directions (Q1, Q2)."""
    return (direction / or_infinity(scale)).round().clamp(-7, 7)


def fed_back(direction: Tensor, scale: Tensor, feedback: Feedback) -> Tensor:
    """Return what is coded in place of directions ``[..., kv_heads, T, D]`` (rule F1)."""
    order, factor = (torch.from_numpy(np.array(a)) for a in (feedback.order, feedback.factor))
    order, factor = order.long().to(scale.device), factor.to(scale.device)
    order = order[:, None] if len(order) > 1 else order  # one head is for all
    factor = factor if len(factor) > 1 else factor[0]
    places = order.expand_as(direction)
    plain, scale = direction.gather(-1, places), scale.expand_as(direction).gather(-1, places)
    w = plain.clone()  # channels in the order of coding
    for p in range(w.shape[-1]):
        now = torch.where(w[..., p].isfinite(), w[..., p], plain[..., p])
        w[..., p] = now
        error = now - code(now, scale[..., p]) * scale[..., p]  # 0 in zero tokens
        moved = error[..., None] * factor[..., p, None, p + 1 :]  # a tensor: it is not fused
        w[..., p + 1 :] -= moved
    return torch.empty_like(w).scatter(-1, places, w)


def decode(parts: Mapping[str, Any], scheme: Scheme, shape: tuple[int, ...]) -> Tensor:
    """Return ``x_hat[..., T, D]`` of NumPy arrays (rule D1)."""
    require_supported(scheme)
    packed, scale, factor = (
        torch.from_numpy(np.array(parts[name])) for name in ("packed", "scale", "norm")
    )
    tokens, head_dim = shape[-2:]
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    size = min(scheme.block_size or tokens, tokens)
    scales = scale.float().repeat_interleave(size, dim=-2)[..., :tokens, :]
    y = (nibbles[..., :head_dim].float() - 8) * scales
    if scheme.magnitude == "norm":
        y = y / or_infinity(norm(y))[..., None]
    return factor.float()[..., None] * y


def norm(x: Tensor) -> Tensor:
    """Return the correctly rounded norm over the last axis (rule N1)."""
    wide = x.double()
    root = (wide * wide).sum(dim=-1).sqrt()  # squares are exact, their sum is not
    slack = (x.shape[-1] + 8) * 2.0**-53
    lower, upper = (root * (1 - slack)).float(), (root * (1 + slack)).float()
    for index in map(tuple, (lower < upper).nonzero().tolist()):  # rare: the exact sum decides
        middle = (lower[index].item() + min(upper[index].item(), 2.0**128)) / 2
        squares = [value * value for value in wide[index].tolist()]
        excess = math.fsum([*squares, -middle * middle])
        half_even = torch.tensor(middle, dtype=torch.float64).float()
        lower[index] = half_even if excess == 0 else upper[index] if excess > 0 else lower[index]
    return lower


def or_infinity(divisor: Tensor) -> Tensor:
    """Return the divisor with 0 replaced: what is divided by a norm or scale of 0 becomes 0."""
    return divisor.masked_fill(divisor == 0, math.inf)


def require_supported(scheme: Scheme) -> None:
    """Raise for schemes that this example leaves out."""
    paper = Scheme()
    if scheme.magnitude == "lsq" or paper != replace(scheme, block_size=None, magnitude="norm"):
        raise NotImplementedError(f"{scheme} is not in this example")

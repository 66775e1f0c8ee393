"""The paper's nsep+pchan4 in PyTorch, with blocks, gains (M2), balanced norms, and key feedback.

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
    length, size = norms_and_sizes(x, scheme)
    direction = x / or_infinity(length)[..., None]  # N2
    if feedback is None:
        scale = scale_of(direction)
        codes = code(direction, scale)
        gain = length / or_infinity(norm(codes * scale.float() / size))  # M2
    else:
        w, scale, kept = fed_back(direction, feedback)
        codes, gain = code(w, scale), length * kept  # M2
    stored = (length if scheme.magnitude == "norm" else gain).half()  # M1
    if not (scale.isfinite().all() and stored.isfinite().all()):
        raise ValueError("a scale, a norm or a gain is beyond its dtype")  # N1 S5 M4
    padding = x.shape[-1] % 2
    nibbles = torch.nn.functional.pad(codes + 8, (0, padding), value=8).byte()  # P1
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4, scale, stored


def norms_and_sizes(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return the norm of each token (N1), and the size by which each channel counts (N3)."""
    plain, ones = norm(x), torch.ones_like(x[..., :1, :])
    if scheme.norm_rule == "plain":
        return plain, ones
    peak = x.abs().amax(dim=-2, keepdim=True)
    size = (peak / or_infinity(peak.amax(dim=-1, keepdim=True))).clamp(min=2.0**-12)
    balanced = norm(x / size)
    gains = spread(x, balanced) < spread(x, plain)  # never so where a balanced norm is infinite
    balanced = torch.where(gains[..., None], balanced, plain)
    return balanced, torch.where(gains[..., None, None], size, ones)


def spread(x: Tensor, length: Tensor) -> Tensor:
    """Return by how much these norms spread the directions of a block (N3)."""
    direction = x / or_infinity(length)[..., None]
    after, before = (v.amax(dim=-2) - v.amin(dim=-2) for v in (direction, x))
    growth = (after / before).masked_fill(after == 0, 0)
    # Not torch.sum: N3 names the order.
    sums = [sum(v.double().square().unbind(dim=-1)) for v in (length, growth)]
    return sums[0] * sums[1]


def scale_of(direction: Tensor) -> Tensor:
    """Return the scale of each channel, ``[..., 1, D]``, float16 (S1)."""
    peak = direction.abs().amax(dim=-2, keepdim=True)
    return (peak / torch.full_like(peak, 7)).half()  # on CUDA, `peak / 7` is not a division


def code(direction: Tensor, scale: Tensor) -> Tensor:
    """Return the codes of directions (S3, Q1, Q2)."""
    return (direction / or_infinity(scale.float())).round().clamp(-7, 7)


def fed_back(direction: Tensor, feedback: Feedback) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is coded in place of directions ``[..., kv_heads, T, D]``, and its scales (F1).

    And how much longer the directions are than what is left of them, as the weights see both (M2).
    """
    order, factor = (torch.from_numpy(np.array(a)) for a in (feedback.order, feedback.factor))
    order, factor = order.long().to(direction.device), factor.to(direction.device)
    order = order[:, None] if len(order) > 1 else order  # one head is for all
    factor = factor if len(factor) > 1 else factor[0]
    plain = direction.gather(-1, order.expand_as(direction))  # channels in the order of coding
    w, seen, error, scales = plain.clone(), plain.clone(), torch.empty_like(plain), []
    for p in range(plain.shape[-1]):
        now = slice(p, p + 1)
        for moved in (w, seen):
            moved[..., p] = torch.where(moved[..., p].isfinite(), moved[..., p], plain[..., p])
        scale = scale_of(w[..., now])
        error[..., now] = w[..., now] - code(w[..., now], scale) * scale.float()  # 0 in zero tokens
        scales.append(scale)
        for moved, source in ((w, error), (seen, seen)):
            taken = source[..., now] * factor[..., now, p + 1 :]  # a tensor: it is not fused
            moved[..., p + 1 :] -= taken
    weight = factor.diagonal(dim1=-2, dim2=-1)[..., None, :]
    before, after = norm(weight * seen), norm(weight * (seen - error))
    kept = torch.where(after.isinf(), after, before / or_infinity(after))
    scale, back = torch.cat(scales, dim=-1), order.argsort(dim=-1)
    return w.gather(-1, back.expand_as(w)), scale.gather(-1, back.expand_as(scale)), kept


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
    changed = replace(scheme, block_size=None, norm_rule="plain", magnitude="norm")
    if scheme.magnitude == "lsq" or paper != changed:
        raise NotImplementedError(f"{scheme} is not in this example")

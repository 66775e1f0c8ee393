"""The paper's listing in PyTorch, as literally as its formulas, to compare speeds with."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize ``x[H, T, D]``, D even: packed codes [H, T, D / 2], norms and scales in float32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    direction = x / norm
    scale = direction.abs().amax(dim=-2, keepdim=True) / 7
    codes = torch.clamp(torch.round(direction / scale), -7, 7).to(torch.int8)
    stored = (codes + 8).to(torch.uint8)
    return stored[..., 0::2] | stored[..., 1::2] << 4, norm, scale


def dequantize(packed: Tensor, norm: Tensor, scale: Tensor) -> Tensor:
    """Reconstruct what `quantize` coded, directions renormalised to unit length."""
    direction: Tensor = codes(packed) * scale
    direction = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    return norm * direction


def codes(packed: Tensor) -> Tensor:
    """Unpack codes, -7 to 7, as int8."""
    stored: Tensor = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    unpacked: Tensor = stored.to(torch.int8) - 8
    return unpacked

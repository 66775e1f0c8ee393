"""A forward pass of one layer: what was stored before it, what it brings, and what it is shown."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from nsq_ref.cache import KVCache

__all__: list[str] = []  # the package keeps them for itself

Tensor = Any  # torch.Tensor, where torch is installed


class Pass(NamedTuple):
    """Tokens at positions from ``start``, padding included; nothing changes one."""

    before: KVCache
    start: int
    keys: Tensor
    values: Tensor

    @property
    def tokens(self) -> int:
        """How many it brings."""
        return int(self.keys.shape[2])

    def first(self, count: int) -> Pass:
        """Return the pass of its first tokens."""
        return self._replace(keys=self.keys[:, :, :count], values=self.values[:, :, :count])

    def after(self, leads: Sequence[int]) -> KVCache:
        """Return a cache with all tokens but those of the first positions of each row."""
        skips = [min(max(lead - self.start, 0), self.tokens) for lead in leads]
        keys, values = (_left_aligned(x, skips) for x in (self.keys, self.values))
        cache = self.before.fork()
        cache.append(keys, values, [self.tokens - skip for skip in skips])
        return cache

    def split(self, leads: Sequence[int], most: int) -> Pass:
        """Return the pass of its last tokens, so many at most, the others stored before it."""
        older = self.tokens - most
        if older <= 0:
            return self
        keys, values = (x[:, :, older:].clone() for x in (self.keys, self.values))
        return Pass(self.first(older).after(leads), self.start + older, keys, values)

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values, padding that is not stored as zeros."""
        keys, values = self.before.dequantize()
        return self._joined(keys, self.keys), self._joined(values, self.values)

    def _joined(self, stored: Any, new: Tensor) -> Tensor:
        """Put what is stored, each row up to ``start``, before what is new."""
        most = torch.finfo(new.dtype).max
        batch, kv_heads, tokens, head_dim = new.shape
        joined = new.new_empty(batch, kv_heads, self.start + tokens, head_dim)
        for row, length in enumerate(self.before.lengths.tolist()):
            past = torch.from_numpy(stored[row, :, :length])
            if new.dtype != torch.float32:  # which has no number so large as some of float32
                past.clamp_(-most, most)
            joined[row, :, : self.start - length] = 0
            joined[row, :, self.start - length : self.start] = past
        joined[:, :, self.start :] = new
        return joined


class Stored(torch.Tensor):  # type: ignore[misc, unused-ignore]
    """Keys, or values, of a pass: decoded when something computes with them, and not before."""

    @staticmethod
    def __new__(cls, source: Pass, side: int, _: Any) -> Any:
        new = (source.keys, source.values)[side]
        shape = list(new.shape)
        shape[2] += source.start
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)

    def __init__(
        self, source: Pass, side: int, decode: Callable[[], tuple[Tensor, Tensor]]
    ) -> None:
        self.source, self._side, self._decode = source, side, decode

    @classmethod
    def both(cls, source: Pass) -> tuple[Tensor, Tensor]:
        """Return keys and values, which are decoded together."""
        decode = functools.cache(source.decoded)
        return cls(source, 0, decode), cls(source, 1, decode)

    @torch.compiler.disable
    def plain(self) -> Tensor:
        """Return the decoded tensor."""
        return self._decode()[self._side]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Stored, Stored.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def _left_aligned(x: Tensor, skips: list[int]) -> Tensor:
    """Return rows without their first tokens, so many of each; what follows them is anything."""
    if not any(skips):
        return x
    return torch.stack([row.roll(-skip, dims=1) for row, skip in zip(x, skips, strict=True)])

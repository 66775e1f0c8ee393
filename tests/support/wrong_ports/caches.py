"""A row of a cache that grows and is cropped (rules B1, C1, K1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref import Scheme
from tests.support.wrong_ports.blocks import encode_block, joined, no_tokens
from tests.support.wrong_ports.decoding import decode_block
from tests.support.wrong_ports.exact import F16, F32, Array, Parts
from tests.support.wrong_ports.knobs import RIGHT, Knobs
from tests.support.wrong_ports.narrowing import cut_off, narrowed


class Cache:
    """One row of a cache that grows and is cropped."""

    def __init__(self, scheme: Scheme, knobs: Knobs, dtype: Any, head_dim: int) -> None:
        self.scheme, self.knobs, self.dtype, self.head_dim = scheme, knobs, dtype, head_dim
        self.size = int(scheme.block_size or 1) + knobs.block
        self.sinks: list[Array] = []
        self.blocks: list[Parts] = []
        self.tail: list[Array] = []
        self.raw: list[Array] = []  # all that came, for the mistake of keeping it
        self.old: Any = None
        self.others: Any = None
        self.was_full = False

    def append(self, tokens: Array) -> None:
        for token in tokens:
            self.raw.append(token)
            refilled = self.knobs.sinks_refilled or not self.was_full
            if len(self.sinks) < self.scheme.sink_tokens and refilled:
                self.sinks.append(token)
                continue
            self.was_full = True
            if self.knobs.seal_late and len(self.tail) == self.size:
                self.seal()
            self.tail.append(token)
            if len(self.tail) == self.size and not self.knobs.seal_late:
                self.seal()

    def seal(self) -> None:
        x = np.array(self.tail, self.dtype)
        other = self.others
        if self.knobs.sinks_in_scale and self.sinks:
            other = np.array(self.sinks, self.dtype)
        if self.knobs.growing and self.blocks:
            count = len(self.raw)
            other = np.array(self.raw[len(self.sinks) : count], self.dtype)
        old = self.old if self.knobs.old_scales else None
        self.blocks.append(encode_block(x, self.scheme, self.knobs, other, old))
        self.tail, self.old = [], None

    def crop(self, length: int) -> None:
        sinks = len(self.sinks)
        count = max(length - sinks, 0)
        if not self.knobs.sinks_kept:
            self.sinks = self.sinks[:length]
        whole = min(count // self.size, len(self.blocks))
        rest = count - whole * self.size
        if whole < len(self.blocks):
            block = self.blocks[whole]
            self.old = block if rest else None
            self.tail = self.survivors(block, rest, sinks + whole * self.size)
        else:
            self.tail = self.tail[:rest]
        self.blocks = self.blocks[:whole]
        self.raw = self.raw[:length]

    def survivors(self, block: Parts, count: int, first: int) -> list[Array]:
        if self.knobs.cropped == "raw":
            return self.raw[first : first + count]
        decoded = decode_block(block, self.scheme, self.head_dim, RIGHT)[:count]
        if self.knobs.cropped == "overflow":
            return list(decoded.astype(self.dtype))
        if self.knobs.cropped == "truncated":
            return list(narrowed(narrowed(decoded, self.dtype, "saturate"), self.dtype)
                        if self.dtype == F32 else cut_off(decoded, self.dtype))  # fmt: skip
        if self.knobs.cropped == "dropped":
            return []
        return list(narrowed(decoded, self.dtype, "saturate"))

    def stored(self) -> Parts:
        parts = joined(self.blocks) if self.blocks else no_tokens(self.scheme, self.head_dim)
        if self.scheme.sink_tokens:
            sinks = np.array(self.sinks, self.dtype).reshape(-1, self.head_dim)
            parts["sinks"] = sinks.astype(F32) if self.knobs.sinks_float32 else sinks
        tail = np.array(self.tail, self.dtype).reshape(-1, self.head_dim)
        if self.knobs.tail == "quantized" and len(tail):
            coded = encode_block(tail, self.scheme, RIGHT)
            tail = decode_block(coded, self.scheme, self.head_dim, RIGHT).astype(self.dtype)
        elif self.knobs.tail == "float32":
            tail = tail.astype(F32)
        elif self.knobs.tail == "float16":
            tail = tail.astype(F16).astype(self.dtype)
        parts["tail"] = tail
        return parts

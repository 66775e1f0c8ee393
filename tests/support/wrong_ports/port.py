"""The port: what the kit asks, answered with all knobs (rules B2, D1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nsq_ref import Scheme
from tests.support.wrong_ports.attending import attended
from tests.support.wrong_ports.blocks import block_starts, encode_sequence, refuse, sequences
from tests.support.wrong_ports.caches import Cache
from tests.support.wrong_ports.decoding import decode_block
from tests.support.wrong_ports.exact import F32, Array, Parts
from tests.support.wrong_ports.knobs import RIGHT, Knobs


class Port:
    """An implementation with knobs; it may keep something between calls.

    Parameters
    ----------
    knobs : Knobs
        The mistakes that it makes; none by default.
    """

    def __init__(self, knobs: Knobs = RIGHT) -> None:
        self.knobs = knobs
        self._largest: dict[Any, Any] = {}

    # --- encode

    def encode(self, x: Array, scheme: Scheme) -> Parts:
        knobs = self.knobs
        with np.errstate(all="ignore"):
            refuse(x, knobs)
            if knobs.nan:
                x = np.where(np.isnan(x.astype(F32)), x.dtype.type(0), x)
            if knobs.infinity:
                x = np.where(np.isinf(x.astype(F32)), x.dtype.type(1), x)
            shared = x.reshape(-1, x.shape[-1]) if knobs.heads == "shared" and x.ndim > 2 else None
            lead = x.shape[:-2]
            some = x if x.size else np.ones((1, *x.shape[-2:]), x.dtype)  # for the shapes
            found = [encode_sequence(one, scheme, knobs, shared) for one in sequences(some)]
            parts = {
                name: np.stack([one[name] for one in found]).reshape(*lead, *found[0][name].shape)
                if x.size
                else np.zeros((*lead, *found[0][name].shape), found[0][name].dtype)
                for name in found[0]
            }
        self._keep(parts)
        if knobs.dtype_of:
            part = parts[knobs.dtype_of]
            other = {"u": np.int32, "i": np.uint8}.get(part.dtype.kind, F32)
            parts[knobs.dtype_of] = part.astype(other)
        if knobs.missing:
            del parts[knobs.missing]
        if knobs.extra:
            parts[knobs.extra] = np.zeros_like(parts["scale"])
        if knobs.writes:
            x *= 0
        return parts

    def _keep(self, parts: Parts) -> None:
        """Let earlier calls show in a result."""
        key = parts["scale"].shape
        if self.knobs.state == "scales by shape":
            parts["scale"] = self._largest.setdefault(key, parts["scale"])
        elif self.knobs.state == "largest scale":
            before = self._largest.get(key, parts["scale"])
            parts["scale"] = self._largest[key] = np.maximum(before, parts["scale"])
        elif self.knobs.state == "bytes not cleared":
            memory = self._largest.setdefault("bytes", np.zeros(1 << 16, np.uint8))
            packed = memory[: parts["packed"].size].reshape(parts["packed"].shape)
            packed |= parts["packed"]
            parts["packed"] = packed

    # --- decode

    def decode(self, parts: Mapping[str, Array], scheme: Scheme, shape: tuple[int, ...]) -> Array:
        lead = shape[:-2]
        count = math.prod(lead)
        flat = {name: part.reshape(count, *part.shape[len(lead) :]) for name, part in parts.items()}
        with np.errstate(all="ignore"):
            found = [
                self._decode_one({n: p[i] for n, p in flat.items()}, scheme, shape[-1])
                for i in range(count)
            ]
        x_hat = np.stack(found).reshape(shape) if found else np.zeros(shape, F32)
        if self.knobs.state == "buffer":
            buffer = self._largest.setdefault(shape, np.empty(shape, F32))
            buffer[...] = x_hat
            return buffer
        return x_hat

    def _decode_one(self, parts: Parts, scheme: Scheme, head_dim: int) -> Array:
        knobs = self.knobs
        decoded = [
            decode_block(one, scheme, head_dim, knobs) for one in self._blocks(parts, scheme)
        ]
        if scheme.sink_tokens:
            sinks = parts["sinks"].astype(F32)
            if knobs.sinks_forgotten:
                sinks = np.zeros_like(sinks)
            decoded.insert(0, sinks)
        return np.concatenate(decoded) if decoded else np.zeros((0, head_dim), F32)

    def _blocks(self, parts: Parts, scheme: Scheme) -> Iterator[Parts]:
        tokens = len(parts["packed"])
        for b, (start, stop) in enumerate(block_starts(tokens, scheme, self.knobs)):
            block = {}
            for name, part in parts.items():
                by_block = name == "outlier_index" or (
                    name in ("scale", "zero") and scheme.axis == "channel"
                )
                if name == "sinks":
                    continue
                if by_block:
                    which = min(b, len(part) - 1)
                    if name != "outlier_index":
                        which = max(which - self.knobs.decode_block, 0)
                    block[name] = part[which : which + 1]
                else:
                    block[name] = part[start:stop]
            yield block

    # --- caches

    def stream(self, x: Array, scheme: Scheme, steps: Array, row: int) -> Parts:
        refuse(x, self.knobs)
        with np.errstate(all="ignore"):
            cache = Cache(scheme, self.knobs, x.dtype, x.shape[-1])
            if self.knobs.stream_rows == "shared":
                others = np.delete(x, row, axis=0)
                cache.others = others.reshape(-1, x.shape[-1]) if len(others) else None
            at = 0
            for step in steps.tolist():
                if step[0] == 0:
                    cache.append(x[row, at : at + step[1 + row]])
                    at += step[1 + row]
                else:
                    cache.crop(step[1 + row])
            return cache.stored()

    # --- attention

    def attend(
        self, query: Array, keys: Mapping[str, Any], values: Mapping[str, Any], key_scheme: Scheme,
        value_scheme: Scheme, *, scale: float, causal: bool, softcap: float | None,
        sliding_window: int | None,
    ) -> Array:  # fmt: skip
        knobs = self.knobs
        if knobs.value_scheme == "of the keys":
            values = {**values, "scale": np.resize(keys["scale"], values["scale"].shape)}
        k, v = (
            self.decode({n: p for n, p in side.items() if n != "shape"}, s, tuple(side["shape"]))
            for side, s in ((keys, key_scheme), (values, value_scheme))
        )
        return attended(
            query, k, v, knobs, scale=scale, causal=causal, softcap=softcap,
            sliding_window=sliding_window,
        )  # fmt: skip

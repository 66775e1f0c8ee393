"""Tiles of tokens, channels and sequences that are lost, wrapped or shifted (rules S1, N1, B1, B2).

Kernels cut arrays into tiles. These mistakes are right for arrays that are whole numbers of tiles,
or a single one, and wrong where something large lies in what is lost.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.conformance.mistakes.changes import ENCODE, READ, Function, around, place
from nsq_ref.conformance.mistakes.reference import Change
from nsq_ref.scheme import Scheme

_extent = place("spec.extent", "S1", ENCODE)
_sequences = place("spec.extent", "B2", ENCODE)
_norm = place("rounding.norm", "N1", ENCODE)
_ranked = place("spec.outlier_channels", "O1", ENCODE)
_read = place("spec.decode_blocks", "B1", READ)

TOKENS = (16, 32, 64, 128, 256, 512, 1024)
MANY = (4096, 65535, 65536)  # which indices of 16 bits, and grids of GPUs, count
CHANNELS = (32, 64, 128, 256, 512)
Count = Function  # of what is kept of so many tokens or channels


def whole_tiles(tile: int) -> Count:
    """Keep whole tiles, but all of what is less than one.

    Examples
    --------
    >>> [whole_tiles(16)(count) for count in (5, 16, 40)]
    [5, 16, 32]
    """
    return lambda count: count // tile * tile if count > tile else count


def first_ones(most: int) -> Count:
    """Keep the first ones."""
    return lambda count: min(count, most)


def power_of_two(count: int) -> int:
    """Keep as many as the largest power of two."""
    return 1 << count.bit_length() - 1


def _range_over(axis: str, kept: Count) -> Change:
    """Take minimum and maximum of schemes of this axis over the first tokens, or channels."""

    def extent(original: Function, direction: Any, coded: Any, scheme: Scheme) -> Any:
        if scheme.axis != axis:
            return original(direction, coded, scheme)
        tokens, channels = direction.shape[-2:]
        inside = np.ones((tokens, channels), bool)
        if axis == "channel":
            inside[kept(tokens) :] = False
        else:
            inside[:, kept(channels) :] = False
        return original(direction, coded & inside, scheme)

    return around(extent)


def _range_without(token: int | slice) -> Change:
    def extent(original: Function, direction: Any, coded: Any, scheme: Scheme) -> Any:
        if scheme.axis != "channel" or direction.shape[-2] == 1:
            return original(direction, coded, scheme)
        inside = np.ones((direction.shape[-2], 1), bool)
        inside[token] = False
        return original(direction, coded & inside, scheme)

    return around(extent)


def _norm_over(kept: Count) -> Change:
    return around(lambda original, x: original(x[..., : kept(x.shape[-1])]))


def _ranked_over(kept: Count) -> Change:
    return around(
        lambda original, direction, scheme: original(
            direction[..., : kept(direction.shape[-2]), :], scheme
        )
    )


def _by_sequence(chosen: Function) -> Change:
    """Give each sequence the range of another: ``chosen(its number, leading axes)``."""

    def extent(original: Function, direction: Any, coded: Any, scheme: Scheme) -> Any:
        lead = direction.shape[:-2]
        order = np.array([chosen(n, lead) for n in range(int(np.prod(lead, dtype=int)))], int)
        return tuple(
            side.reshape(-1, *side.shape[-2:])[order].reshape(side.shape)
            for side in original(direction, coded, scheme)
        )

    return around(extent)


def _reading(chosen: Function) -> Change:
    """Decode with the scales of another block: ``chosen(sequence, block, sequences, blocks)``."""

    def decode_blocks(original: Function, block: Any, scheme: Scheme) -> Any:
        lead = block.scale.shape[:-2]
        count, blocks = int(np.prod(lead, dtype=int)), block.scale.shape[-2]
        if scheme.axis != "channel" or not count:
            return original(block, scheme)
        order = np.array(
            [[chosen(n, b, count, blocks) for b in range(blocks)] for n in range(count)]
        )

        def other(part: Any) -> Any:
            flat = part.reshape(-1, part.shape[-1])
            return flat[np.clip(order, 0, len(flat) - 1).reshape(-1)].reshape(part.shape)

        changed = block._replace(scale=other(block.scale), zero=other(block.zero))
        return original(changed, scheme)

    return around(decode_blocks)


def _rows_read(chosen: Count) -> Change:
    """Read the codes of other tokens: ``chosen(their numbers)``."""

    def block_of(original: Function, parts: Any, scheme: Scheme, head_dim: int) -> Any:
        block = original(parts, scheme, head_dim)
        rows = chosen(np.arange(block.codes.shape[-2]))
        return block._replace(codes=block.codes[..., rows, :])

    return around(block_of)


def _factors_read(chosen: Count) -> Change:
    """Decode with the stored factors of other tokens."""

    def decode_blocks(original: Function, block: Any, scheme: Scheme) -> Any:
        norm = block.norm[..., chosen(np.arange(block.norm.shape[-1]))]
        return original(block._replace(norm=norm), scheme)

    return around(decode_blocks)


TILES = [
    *(_extent(f"last partial tile of {n} tokens out of the range",
          f"the tokens behind whole tiles of {n} have no part in minimum and maximum",
          _range_over("channel", whole_tiles(n))) for n in TOKENS),
    *(_extent(f"tokens past {n} out of the range",
          f"tokens past the first {n} have no part in minimum and maximum",
          _range_over("channel", first_ones(n))) for n in (*TOKENS, 2048, *MANY)),
    _extent("first token out of the range", "the first token has no part in minimum and maximum",
        _range_without(0)),
    _extent("last token out of the range", "the last token has no part in minimum and maximum",
        _range_without(-1)),
    *(_extent(f"first token of further tiles of {n} out of the range",
          f"tokens {n}, {2 * n} and so on have no part in minimum and maximum",
          _range_without(slice(n, None, n))) for n in (16, 32, 64, 128)),
    *(_extent(f"last token of tiles of {n} out of the range",
          f"tokens {n - 1}, {2 * n - 1} and so on have no part in minimum and maximum",
          _range_without(slice(n - 1, None, n))) for n in (16, 32, 64, 128)),
    *(_extent(f"last partial tile of {n} channels out of the range",
          f"the channels behind whole tiles of {n} have no part in minimum and maximum",
          _range_over("token", whole_tiles(n))) for n in CHANNELS),
    *(_extent(f"channels past {n} out of the range",
          f"channels past the first {n} have no part in minimum and maximum",
          _range_over("token", first_ones(n))) for n in CHANNELS),
    _extent("channels past a power of two out of the range",
        "channels past the largest power of two have no part in minimum and maximum",
        _range_over("token", power_of_two)),
    *(_norm(f"last partial tile of {n} channels out of the norm",
          f"the channels behind whole tiles of {n} have no part in norms",
          _norm_over(whole_tiles(n))) for n in CHANNELS),
    *(_norm(f"channels past {n} out of the norm",
          f"channels past the first {n} have no part in norms",
          _norm_over(first_ones(n))) for n in CHANNELS),
    _norm("channels past a power of two out of the norm",
        "channels past the largest power of two have no part in norms", _norm_over(power_of_two)),
    *(_ranked(f"last partial tile of {n} tokens out of the ranking",
          f"the tokens behind whole tiles of {n} have no part in the choice of outlier channels",
          _ranked_over(whole_tiles(n))) for n in (16, 128, 1024)),
    *(_ranked(f"tokens past {n} out of the ranking",
          f"tokens past the first {n} have no part in the choice of outlier channels",
          _ranked_over(first_ones(n))) for n in (16, 128, 1024)),
    *(_sequences(f"sequences counted modulo {n}",
          f"sequences {n} and up have the scales of those {n} before",
          _by_sequence(lambda number, lead, n=n: number % n)) for n in (4, 8)),
    _sequences("sequences counted by the last axis",
        "the first of two leading axes is lost: all of it has the scales of its first entry",
        _by_sequence(lambda number, lead: number % lead[-1] if len(lead) > 1 else number)),
    _read("scales of the first block", "all blocks are decoded with the scales of the first",
        _reading(lambda n, b, count, blocks: n * blocks)),
    _read("scales of the block before", "blocks are decoded with the scales of the one before",
        _reading(lambda n, b, count, blocks: n * blocks + max(b - 1, 0))),
    _read("scales shifted for later sequences",
        "from the second sequence on, blocks are decoded with the scales of the next",
        _reading(lambda n, b, count, blocks: n * blocks + b + (n > 0)), "B2"),
    _read("blocks counted without the last, short one",
        "sequences are decoded as if each had only its whole blocks' scales before it",
        _reading(lambda n, b, count, blocks: n * max(blocks - 1, 1) + b), "B2"),
    *(_read(f"blocks counted modulo {n}",
          f"blocks {n} and up are decoded with the scales of those {n} before",
          _reading(lambda s, b, count, blocks, n=n: s * blocks + b % n)) for n in (2, 4, 256)),
    *(place("model.block_of", "P1", READ)(f"tokens counted modulo {n}",
          f"tokens {n} and up are read where those {n} before are",
          _rows_read(lambda token, n=n: token % n)) for n in (64, 128, 1024)),
    *(_read(f"factors counted modulo {n}",
          f"tokens {n} and up are decoded with the norms of those {n} before",
          _factors_read(lambda token, n=n: token % n)) for n in (128, 1024)),
    *(_read(f"scales counted modulo {n}",
          f"sequences {n} and up are decoded with the scales of those {n} before",
          _reading(lambda s, b, count, blocks, n=n: s % n * blocks + b), "B2") for n in (4, 8)),
]  # fmt: skip

"""Lone extremes at every edge of a tile: kernels cut tokens, channels and sequences into tiles.

A maximum that loses a tile, or part of one, is right wherever something else is as large. So each
extreme stands alone in its channel (or token), at the edges of tiles of 16 to 2048 tokens and of
32 to 512 channels. These inputs are large, and made by a `Recipe`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nsq_ref.conformance.cases.pools import Draw
from nsq_ref.conformance.recipes import Recipe
from nsq_ref.dtypes import Array
from nsq_ref.scheme import Scheme

TOKENS = 2047  # the last partial tile of every size but 2048 is one token short of whole
TOKEN_TILES = (16, 32, 64, 128, 256, 512, 1024, 2048)
CHANNEL_TILES = (32, 64, 128, 256, 512)
LONG = 66_000  # tokens: more than 16 bits count
HEAD_DIMS = (80, 96, 192, 320, 512, 33, 129, 257)
LONE, OUTLIER = 4096, 32768  # beside which 63 is nothing; exact in float16


def tile_edges(scheme: Scheme, draw: Draw) -> Iterator[Recipe]:
    """Yield tokens with lone extremes at the edges of tiles of tokens."""
    size, sinks = scheme.block_size, scheme.sink_tokens
    if size is None:
        lengths = [(TOKENS, TOKENS), (2049, 2049), (17, 17), (33, 33), (65, 65), (129, 129)]
    else:  # a whole block, another, and one that is cut off inside a tile
        lengths = [(2 * size + (size + 1) // 2 + 1, size)]
        lengths += [(size + 1, size)] if size > 1 else []
    for length, block in lengths:
        places = edges(block, TOKEN_TILES)
        if length > TOKENS or (block == length and length < TOKENS):
            places = [0, length - 2, length - 1]
        if scheme.outlier_channels:
            yield from _lone_outliers(scheme, draw, length, block, places)
            if scheme.axis == "token":
                continue
        width = max(len(places) + 1, 12 if scheme.symmetric else 24)
        lone: list[tuple[int, ...]] = []
        for start in range(0, length, block):
            lone += _lone(start, [p for p in places if start + p < length], scheme)
        shifted = tuple((token + sinks, *rest) for token, *rest in lone)
        for i in range(scheme.outlier_channels):  # channels of their own, or the others would be
            shifted += ((sinks + (2 + i) % length, width, OUTLIER),)
            width += 1
        yield Recipe((sinks + length, width), _seed(draw), _sinks(scheme, width) + shifted)


def edges(length: int, tiles: tuple[int, ...]) -> list[int]:
    """Return first and last places of tiles, from the front, and the last whole tiles' ends.

    Examples
    --------
    >>> edges(47, (16, 32))
    [0, 15, 16, 31, 32, 45, 46]
    """
    found = {0, length - 2, length - 1}
    for tile in tiles:
        found |= {tile - 1, tile}
        whole = length // tile * tile
        found |= {whole - 1, whole}
    return sorted(place for place in found if 0 <= place < length)


def _lone(start: int, places: list[int], scheme: Scheme) -> list[tuple[int, ...]]:
    """Return a channel for each place with its greatest value, of either sign, or one of both."""
    lone: list[tuple[int, ...]] = []
    for channel, place in enumerate(places):
        sign = -1 if channel % 2 and scheme.symmetric else 1
        lone.append((start + place, channel, sign * LONE))
        if not scheme.symmetric:
            opposite = places[(channel + 1) % len(places)]
            if opposite != place:
                lone.append((start + opposite, channel, -LONE))
    return lone


def _sinks(scheme: Scheme, width: int) -> tuple[tuple[int, ...], ...]:
    """Sinks that would change scales."""
    return tuple((t, c, 8192) for t in range(scheme.sink_tokens) for c in range(0, width, 2))


def _lone_outliers(
    scheme: Scheme, draw: Draw, length: int, block: int, places: list[int]
) -> Iterator[Recipe]:
    """Yield sequences whose outlier channels are each known by one token."""
    kept, sinks = scheme.outlier_channels, scheme.sink_tokens
    ends = {0, length - 1, *TOKEN_TILES, *(length // tile * tile for tile in TOKEN_TILES)}
    places = [place for place in places if place in ends]
    groups = [places[i : i + kept] for i in range(0, len(places), kept)]
    width = 2 * kept + 1
    lone: list[tuple[int, ...]] = []
    for n, group in enumerate(groups):
        for start in range(0, length, block):
            inside = [p for p in group if start + p < length]
            lone += [(n, sinks + start + p, 2 * i, LONE) for i, p in enumerate(inside)]
    front = tuple((n, *one) for n in range(len(groups)) for one in _sinks(scheme, width))
    yield Recipe((len(groups), sinks + length, width), _seed(draw), front + tuple(lone))


def channel_tiles(scheme: Scheme, draw: Draw) -> Iterator[Recipe]:
    """Yield tokens each of which has one large channel, at the edges of tiles of channels."""
    kept, sinks = scheme.outlier_channels, scheme.sink_tokens
    for head_dim in (513, *HEAD_DIMS):
        places = edges(head_dim, CHANNEL_TILES)
        if head_dim != 513:
            power = 1 << (head_dim - 1).bit_length() - 1
            places = sorted({0, power - 1, power, head_dim - 1})
        lone = [(sinks + t, *one) for t in range(kept) for one in [(2 + t, OUTLIER)]]
        for i, place in enumerate(places):
            token = sinks + kept + i
            lone.append((token, place, LONE))
            if not scheme.symmetric:
                lone.append((token, places[(i + 1) % len(places)], -LONE))
        tokens = sinks + kept + len(places)
        yield Recipe((tokens, head_dim), _seed(draw), _sinks(scheme, head_dim) + tuple(lone))


def long_sequences(scheme: Scheme, draw: Draw) -> Iterator[Recipe]:
    """Yield so many tokens that an index of 16 bits wraps, or so many blocks that one of 8 does."""
    size, sinks, kept = scheme.block_size, scheme.sink_tokens, scheme.outlier_channels
    length = min(max(257 * size + 1, 2049), LONG) if size else LONG
    places = [0, 4096, 2**16 - 1, 2**16, LONG - 1] if not size else []
    lone = [(sinks + place, channel, LONE) for channel, place in enumerate(places)]
    lone += [(sinks + 2 + i, 6 + i, OUTLIER) for i in range(kept) if 2 + i < length]
    yield Recipe((sinks + length, 6 + kept), _seed(draw), _sinks(scheme, 6 + kept) + tuple(lone))


def sequences(scheme: Scheme, draw: Draw) -> Iterator[Array]:
    """Yield several sequences of several blocks, the last a short one, and no sequence at all."""
    size = scheme.block_size or 3
    tokens = 2 * size + (size + 1) // 2 if scheme.block_size else 3
    width = 4 + scheme.outlier_channels
    for lead in ((3, 5), (9,), (2, 17)):
        blocks = -(-tokens // size)
        spread = draw.uniform(0.125, 1, *lead, blocks, width)
        spread[..., : width - 3] = 2  # so that the others' share of the norm is their own
        yield draw.bell(*lead, tokens, width) * np.repeat(spread, size, axis=-2)[..., :tokens, :]
    yield np.zeros((0, tokens, width))
    yield np.zeros((2, 0, 3, 5), np.float16)


def _seed(draw: Draw) -> int:
    return int(draw.integers(0, 2**31, 1)[0])

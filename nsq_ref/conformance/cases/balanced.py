"""Inputs of schemes with balanced norms (rule N3), in every dtype.

Blocks whose choice is known, blocks whose two spreads are nearly equal, and for each known mistake
one that is looked for. All near-ties of other families are held plain: beside a tiny channel that
is constant, whose growth is infinite with any norms, no spread is smaller, and norms are as they
would be without N3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from nsq_ref import spec
from nsq_ref.conformance.cases.pools import FORMATS, Draw, differences
from nsq_ref.conformance.mistakes import MISTAKES, Reference
from nsq_ref.conformance.mistakes.balanced import BALANCED
from nsq_ref.dtypes import FLOAT_DTYPES, Array, Float64
from nsq_ref.scheme import Scheme

CHANNELS, TOKENS = 8, 6
POOLS = (48, 2048, 4096, 8192, 8192)  # blocks that are looked through for a mistake
ATTEMPTS = 60  # at a block whose choice is as wanted
REFINED = 7  # elements by which spreads are brought together
HELD = {"float32": 2.0**-100, "bfloat16": 2.0**-100, "float16": 2.0**-24}  # of a constant channel

Made = tuple[str, Array]  # flag and x, without sinks


def held_plain(x: Array, scheme: Scheme) -> Array:
    """Let no block have balanced norms: add a tiny channel of which growth is infinite.

    Examples
    --------
    >>> scheme = Scheme(norm_rule="balanced", magnitude="gain")
    >>> x = np.float32([[3, 64], [-4, 32], [2, -64]])
    >>> takes_balanced(x, scheme), takes_balanced(held_plain(x, scheme), scheme)
    (True, False)
    """
    if not takes_balanced(x[..., scheme.sink_tokens :, :], scheme):
        return x
    value = np.asarray(HELD[x.dtype.name], x.dtype)
    return np.concatenate([x, np.broadcast_to(value, (*x.shape[:-1], 1))], axis=-1)


def takes_balanced(x: Array, scheme: Scheme) -> bool:
    """Return whether any block of these tokens, without sinks, has balanced norms."""
    return scheme.norm_rule == "balanced" and True in _choices(x, scheme)


def _choices(x: Array, scheme: Scheme) -> set[bool]:
    """Return whether blocks have balanced norms: none, all, or some."""
    wide, found = x.astype(np.float32), set()
    for rows in spec.block_slices(x.shape[-2], scheme):
        _, size = spec.norms_and_sizes(wide[..., rows, :], scheme)
        found.update(np.any(size != 1, axis=(-2, -1)).ravel().tolist())
    return found


def balanced(scheme: Scheme, draw: Draw, dtype: str, quick: bool = False) -> Iterator[Made]:
    """Yield flags and inputs of a scheme with balanced norms; if `quick`, none looked for."""
    if scheme.norm_rule == "plain":
        return
    for flag, x in computed(scheme, draw, dtype):
        yield flag, x
    if not quick:
        for x in _near_choices(scheme, draw, dtype):
            yield "near-choice", x
        for x in _looked_for(scheme, draw, dtype):
            yield "balanced-sizes", x


def computed(scheme: Scheme, draw: Draw, dtype: str) -> Iterator[Made]:
    """Yield what need not be looked for long."""
    kind, tokens = FLOAT_DTYPES[dtype], min(scheme.block_size or TOKENS, TOKENS)
    width = CHANNELS + scheme.outlier_channels

    def chosen(make: Callable[..., Array], *given: Any, wanted: bool = True) -> Iterator[Array]:
        """Yield the first of some whose norms are as wanted; none may be."""
        for _ in range(ATTEMPTS):
            x = make(draw, tokens, width, *given).astype(kind)
            if np.isfinite(x).all() and takes_balanced(x, scheme) == wanted:
                yield x
                return

    for size in (12.0, 40.0, 900.0):
        for x in chosen(_outlier_pair, size):
            yield "outlier-pair", x
    for offset in (6.0, 100.0):
        for x in chosen(_offsets, offset, wanted=False):
            yield "offset-channel", x
    for make in _mixed(scheme, draw, width):
        several = (make().astype(kind) for _ in range(ATTEMPTS))
        found = next((x for x in several if len(_choices(x, scheme)) == 2), None)
        if found is not None:
            yield "balanced-choice", found
    for exponent in (-11, -12, -13, -16, -30):
        for x in chosen(_small_channel, exponent):
            yield "size-bound", x
    for zeros in ("channel", "token", "both"):
        for x in chosen(_with_zeros, zeros):
            yield "balanced-zero", x
    yield "balanced-zero", np.zeros((tokens, width), kind)
    x = _outlier_pair(draw, tokens, width, 30.0)
    x[:, 2] = 3
    yield "constant-channel", x.astype(kind)
    if tokens > 1:
        yield "constant-channel", _constant_direction(draw, tokens, width).astype(kind)
    yield "near-choice", _outlier_pair(draw, 1, width, 30.0).astype(kind)  # of one token, both 0
    if dtype != "float16":
        yield from (("balanced-range", x.astype(kind)) for x in _beyond_float32(tokens, width))
    end = FORMATS[scheme.norm_dtype].end
    if scheme.norm_dtype == "float16" and tokens > 1:
        for scale in (0.45, 0.9):
            for x in chosen(_beyond_norms, scale * end):
                yield "balanced-range", x


def _outlier_pair(draw: Draw, tokens: int, width: int, size: float) -> Float64:
    """Draw two channels that are larger by so much, and turn as a rotary pair does."""
    x = draw.bell(tokens, width).astype(np.float64)
    turn = draw.uniform(0, 1, tokens)
    x[:, 1] = size * draw.signs(tokens) * turn
    x[:, 5] = size * draw.signs(tokens) * (1 - turn)
    return x


def _offsets(draw: Draw, tokens: int, width: int, offset: float) -> Float64:
    x = draw.bell(tokens, width).astype(np.float64)
    signs = draw.signs(3)
    x[:, [0, 3, 4]] = offset * signs * (1 + 0.0625 * x[:, [0, 3, 4]])
    return x


def _mixed(scheme: Scheme, draw: Draw, width: int) -> Iterator[Callable[[], Float64]]:
    """Yield what makes heads, and blocks of a sequence, that choose differently."""
    size = scheme.block_size or TOKENS
    tokens = min(size, TOKENS)

    def paired(count: int) -> Float64:
        return _outlier_pair(draw, count, width, 40.0)

    def offset(count: int) -> Float64:
        return _offsets(draw, count, width, 100.0)

    yield lambda: np.stack([paired(tokens), offset(tokens), paired(tokens), offset(tokens)])
    yield lambda: np.stack([8 * offset(tokens), paired(tokens) / 8])[:, None]
    if scheme.block_size is not None:
        short = (size + 1) // 2
        yield lambda: np.concatenate([paired(size), 4 * offset(size), 64 * paired(short)])
        yield lambda: np.concatenate([offset(size), paired(size)])


def _small_channel(draw: Draw, tokens: int, width: int, exponent: int) -> Float64:
    """Draw a channel whose peak is so small beside the largest, and one next to it."""
    x = _outlier_pair(draw, tokens, width, 64.0)
    for j, share in ((2, 1.0), (3, 0.75)):
        x[:, j] *= np.ldexp(64.0 * share, exponent) / np.max(np.abs(x[:, j]))
    return x


def _with_zeros(draw: Draw, tokens: int, width: int, zeros: str) -> Float64:
    x = _outlier_pair(draw, tokens, width, 30.0)
    if zeros != "token":
        x[:, [0, 3]] = 0, -0.0
    if zeros != "channel":
        x[tokens // 2] = 0
        x[:, 1:3] = np.abs(x[:, 1:3])  # the zero token makes their minimum
    return x


def _constant_direction(draw: Draw, tokens: int, width: int) -> Float64:
    """Return tokens of one balanced norm: the direction of a constant channel is constant, too.

    Each has one channel at a half of its size, all sizes being powers of two.
    """
    sizes = np.ldexp(1.0, -draw.integers(0, 8, width))
    x = sizes * draw.signs(tokens, width)
    x[:, width - 1] = sizes[width - 1]
    x[np.arange(tokens), np.arange(tokens) % (width - 1)] /= 2
    return x


def _beyond_float32(tokens: int, width: int) -> Iterator[Float64]:
    """Yield plain norms that float32 holds and balanced ones that it does not."""
    for top in (1.5e38, 2.0**-12 * 3.3e38):
        x = np.ones((tokens, width))
        x[:, 0] = top * np.linspace(-0.5, 1, tokens)
        x[-1, 1:] = [top * 2.0**-9 * (j % 2 or -1) for j in range(1, width)]
        yield x


def _beyond_norms(draw: Draw, tokens: int, width: int, scale: float) -> Float64:
    """Draw a block of which one token has the peaks of two channels, one of them so large."""
    x = _outlier_pair(draw, tokens, width, 1.0) * 0.0625
    x[:, [1, 5]] *= scale
    x[0, 1], x[0, 2] = scale, 3
    x[1:, 2] = 2 * draw.bell(tokens - 1)
    return x


# --- spreads that are nearly equal --------------------------------------------------------------


def _near_choices(scheme: Scheme, draw: Draw, dtype: str) -> Iterator[Array]:
    """Yield pairs of blocks next to each other, of which one has balanced norms."""
    found = 0
    for _ in range(ATTEMPTS):
        pair = _brought_together(scheme, draw, dtype)
        if pair is not None:
            yield from pair
            found += 1
        if found == 2:
            return


def _brought_together(scheme: Scheme, draw: Draw, dtype: str) -> tuple[Array, Array] | None:
    """Return two blocks that differ by a step of one element, and choose differently."""
    kind, width = FLOAT_DTYPES[dtype], CHANNELS + scheme.outlier_channels
    tokens = min(scheme.block_size or TOKENS, TOKENS)
    base = draw.bell(tokens, width).astype(np.float64)
    base[:, 4] += 2

    def larger(factor: float) -> Array:
        x = base.copy()
        x[:, [1, 4]] *= factor
        return np.asarray(x, kind)

    x = _bisected(larger, 0.125, 64.0, scheme)
    if x is None:
        return None
    pair = None
    places = draw.integers(0, tokens, REFINED)
    for number, token in enumerate(places.tolist()):
        j = (2, 3, 6, 7, 0)[number % 5]
        start = x[0]

        def moved(value: float, start: Array = start, at: tuple[int, int] = (token, j)) -> Array:
            y = start.copy()
            y[at] = value
            return np.asarray(y)

        value = float(start[token, j]) or 1.0
        refined = _bisected(moved, 0.5 * value, 2 * value, scheme)
        if refined is not None:
            x = pair = refined
    return pair


def _bisected(
    make: Callable[[float], Array], low: float, high: float, scheme: Scheme
) -> tuple[Array, Array] | None:
    """Return two blocks, nearly or quite next to each other, between which the choice changes."""
    below, above = make(low), make(high)
    first = takes_balanced(below, scheme)
    if takes_balanced(above, scheme) == first:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        x = make(middle)
        if x.tobytes() in (below.tobytes(), above.tobytes()):
            break
        if takes_balanced(x, scheme) == first:
            low, below = middle, x
        else:
            high, above = middle, x
    return below, above


# --- what mistakes show on ----------------------------------------------------------------------


class _Shown(NamedTuple):
    """What a mistake may show on, if not on any block."""

    kind: str
    can: Callable[[Scheme], bool] = lambda scheme: True


_SHOWN = {
    "sizes of the whole sequence": _Shown("blocks", lambda scheme: scheme.block_size is not None),
    "sizes shared by heads": _Shown("heads"),
    "one choice for all heads": _Shown("heads"),
    "sizes without outlier channels": _Shown("any", lambda scheme: scheme.outlier_channels > 0),
    "outlier channels without growth": _Shown("any", lambda scheme: scheme.outlier_channels > 0),
    "gain without sizes": _Shown("any", lambda scheme: scheme.magnitude == "gain"),
    "gain of y times sizes": _Shown("any", lambda scheme: scheme.magnitude == "gain"),
    "spread in float32": _Shown("near"),
    "epsilon 1e-12 added to the norm": _Shown("tiny"),  # near-ties are too large for it
}


def _looked_for(scheme: Scheme, draw: Draw, dtype: str) -> Iterator[Array]:
    """Yield inputs on which known mistakes give other bytes."""
    alone = replace(scheme, sink_tokens=0)  # sinks come in front of what is found
    shown = {one.name: _Shown("any") for one in BALANCED} | _SHOWN
    left = [name for name, one in shown.items() if one.can(scheme)]
    for count in POOLS:
        for kind in ("any", "tiny", "heads", "blocks", "near"):
            names = [name for name in left if shown[name].kind == kind]
            if not names or (kind not in ("any", "tiny") and count > 2048):
                continue
            for name, x in _among(_pool(kind, alone, draw, dtype, count), names, alone):
                left.remove(name)
                if x is not None:
                    yield x


def _pool(kind: str, scheme: Scheme, draw: Draw, dtype: str, count: int) -> Array | list[Array]:
    """Return blocks, or sequences of heads or blocks, each of which is an input."""
    size, width = scheme.block_size or TOKENS, CHANNELS + scheme.outlier_channels
    shape: tuple[int, ...] = min(size, TOKENS), width
    if kind == "near":
        pairs = (_brought_together(scheme, draw, dtype) for _ in range(min(count, 100)))
        return [x for pair in pairs if pair is not None for x in pair]
    if kind == "blocks":
        shape = 2 * size + 1, width
    if kind not in ("any", "tiny"):
        count = min(count, 64)
    if kind == "heads":
        shape = (2, *shape)
    x = draw.bell(count, *shape).astype(np.float64)
    blocks = -(-shape[-2] // size)
    sizes = np.ldexp(1.0, draw.integers(-3, 7, count, *shape[:-2], blocks, width))
    sizes *= np.array([0, 2.0**-13, 1, 1, 1, 1, 1, 1])[draw.integers(0, 8, *sizes.shape)]
    x *= np.repeat(sizes, size, axis=-2)[..., : shape[-2], :]
    x += 0.5 * sizes.max() ** 0.5 * (draw.integers(0, 6, *x.shape[:-2], 1, width) == 0)
    x[::4, ..., min(1, shape[-2] - 1), :] = 0
    x *= 2.0**-20 if kind == "tiny" else 1
    pool = x.astype(FLOAT_DTYPES[dtype])
    return pool if kind in ("any", "tiny") else list(pool)


def _among(
    pool: Array | list[Array], names: Sequence[str], scheme: Scheme
) -> Iterator[tuple[str, Array | None]]:
    """Yield the mistakes that show in a pool, with the first input that shows each.

    None stands for one that was yielded before.
    """
    if not len(pool):
        return
    right = _answers(pool, "", scheme)
    usable = np.all([np.isfinite(one.reshape(len(pool), -1)).all(axis=1) for one in right], axis=0)
    yielded: set[int] = set()
    for name in names:
        wrong = _answers(pool, name, scheme)
        found = np.flatnonzero(usable & (differences(right, wrong) > 0))
        if len(found):
            again = [index for index in found.tolist() if index in yielded]
            index = again[0] if again else int(found[0])
            yield name, None if again else np.asarray(pool[index])
            yielded.add(index)


def _answers(pool: Array | list[Array], mistake: str, scheme: Scheme) -> list[Array]:
    """Encode a pool: an array at once, a list one input after the other."""
    model = _reference(mistake).model
    if isinstance(pool, np.ndarray):
        parts = model.encode(pool, scheme)
    else:
        given = [model.encode(x, scheme) for x in pool]
        parts = {name: np.stack([one[name] for one in given]) for name in given[0]}
    return [part.astype(np.float32) for part in parts.values()]


@functools.cache
def _reference(mistake: str) -> Reference:
    return Reference([MISTAKES[mistake]] if mistake else [])

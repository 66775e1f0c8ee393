"""Streaming into a `KVCache` a token at a time, beside one append of everything; and its memory.

Run as ``python -m benchmarks.cache [--json FILE]``. Both are timed in the same rounds.
"""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from functools import partial

import numpy as np

import nsq_ref as nsq
from benchmarks.timing import (
    Case,
    Row,
    Target,
    as_text,
    interleaved,
    machine,
    parser,
    publish,
    spread,
    use_threads,
)
from nsq_ref.cache.pages import PAGE_TOKENS
from nsq_ref.dtypes import Float32
from nsq_ref.scheme import SchemeName

SCHEMES: tuple[SchemeName, ...] = ("streaming4", "nsep+pchan4", "streaming2", "naive4")
BLOCK_SIZE = 128
TOKEN_SECONDS = 2e-6  # what a token of a head may cost beyond encoding it
ONE_SHOTS = 3  # as often as one shot may encoding in steps of a token take
MEMORY = Target(1.02, at_most=True)


def main() -> None:
    defaults = {"threads": 2, "rounds": 5, "tokens": 32768, "heads": 8, "head_dim": 128}
    options = parser("cache", __doc__, **defaults).parse_args()
    use_threads(options.threads)
    shape = (1, options.heads, options.tokens, options.head_dim)
    keys, values = np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32)
    rows = [row for name in SCHEMES for row in speeds(name, keys, values, options.rounds)]
    rows += [row for name in SCHEMES for row in memory(name, keys, values)]
    notes = [
        f"{options.tokens} tokens, {options.heads} heads, head_dim {options.head_dim}, float32, "
        f"blocks of {BLOCK_SIZE}, {options.threads} threads, {options.rounds} rounds",
        as_text(machine()),
        f"'us a token a head' is what streaming takes beyond {ONE_SHOTS} times one shot; keys and "
        "values together count as one head",
        "memory is what Python and NumPy allocated (tracemalloc), in chunks, over the bytes of the "
        "formula; pages of sealed blocks and tails have room for more",
    ]
    publish(options, "KVCache", rows, notes, threads=options.threads, shape=list(shape))


def filled(name: SchemeName, keys: Float32, values: Float32, step: int) -> nsq.KVCache:
    """Append everything in steps."""
    scheme = replace(nsq.Scheme.named(name), block_size=BLOCK_SIZE)
    cache = nsq.KVCache(1, keys.shape[1], keys.shape[3], scheme, scheme)
    for start in range(0, keys.shape[2], step):
        span = slice(start, start + step)
        cache.append(keys[:, :, span], values[:, :, span])
    return cache


def speeds(name: SchemeName, keys: Float32, values: Float32, rounds: int) -> list[Row]:
    heads, tokens = keys.shape[1:3]
    steps = {"one shot": tokens, "chunks of 100": 100, "token by token": 1}
    timed = interleaved(
        [Case(what, partial(filled, name, keys, values, step)) for what, step in steps.items()],
        rounds,
    )
    whole, chunks, single = (timed[what] for what in steps)
    beyond = (single.seconds - ONE_SHOTS * whole.seconds) / (tokens * heads)
    return [
        Row(f"{name}: one shot", spread(whole.seconds / whole.seconds), "of one shot",
            spread(whole.seconds), cores=whole.cores),
        Row(f"{name}: chunks of 100", spread(chunks.seconds / whole.seconds), "of one shot",
            spread(chunks.seconds), cores=chunks.cores),
        Row(f"{name}: token by token", spread(1e6 * beyond), "us a token a head",
            spread(single.seconds), Target(1e6 * TOKEN_SECONDS, at_most=True), single.cores),
    ]  # fmt: skip


def memory(name: SchemeName, keys: Float32, values: Float32) -> list[Row]:
    tokens = keys.shape[2]
    shorter = [tokens - PAGE_TOKENS + step for step in range(0, PAGE_TOKENS, 33)]
    ratios = []
    for count in (tokens, *shorter):
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        cache = filled(name, keys[:, :, :count], values[:, :, :count], BLOCK_SIZE // 2 + 1)
        used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        ratios.append(used / cache.nbytes)
    return [
        Row(f"{name}: memory", spread(ratios[:1]), "of the formula", target=MEMORY),
        Row(f"{name}: memory, up to {PAGE_TOKENS} tokens fewer", spread(ratios[1:]),
            "of the formula"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()

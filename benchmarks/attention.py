"""One decode step of attention over a quantized cache, beside NumPy over the float32 cache.

Run as ``python -m benchmarks.attention [--json FILE]``. All are timed in the same rounds; ratios
are taken round by round.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np

import nsq_ref as nsq
from benchmarks.timing import (
    RATIOS,
    Case,
    Row,
    Target,
    Timed,
    as_text,
    beside,
    floor,
    interleaved,
    machine,
    parser,
    publish,
    reading,
    spread,
    use_threads,
)
from nsq_ref import attention
from nsq_ref.dtypes import Float32
from nsq_ref.scheme import SchemeName

HELD: tuple[SchemeName, ...] = ("nsep+pchan4", "streaming4")
OTHERS: tuple[SchemeName, ...] = (
    "streaming2", "streaming3", "streaming8", "nsep+pchan2", "nsep4", "nsep+out4",
)  # fmt: skip
BLOCK_SIZE = 128
TARGET = Target(1.5)
CHECKED_TOKENS = 2048  # float64 takes long


def main() -> None:
    defaults = {"threads": 2, "rounds": 15, "tokens": 32768, "kv_heads": 8, "head_dim": 128}
    options = parser("attention", __doc__, **defaults).parse_args()
    use_threads(options.threads)
    shape = (1, options.kv_heads, options.tokens, options.head_dim)
    rng = np.random.default_rng(0)
    keys, values = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    queries = {
        heads: rng.standard_normal((1, heads, 1, options.head_dim), dtype=np.float32)
        for heads in (options.kv_heads, 4 * options.kv_heads)
    }
    caches = {name: filled(name, keys, values) for name in (*HELD, *OTHERS)}
    largest = max(cache.nbytes for cache in caches.values())
    read = keys.reshape(-1)[: largest // 4]
    with ThreadPoolExecutor(options.threads) as pool:
        cases = [reading(read, options.threads, pool)]
        for heads, query in queries.items():
            cases.append(Case(f"numpy {heads}", partial(by_numpy, query, keys, values)))
            cases += [
                Case(f"{name} {heads}", partial(cache.attend, query))
                for name, cache in caches.items()
            ]
        timed = interleaved(cases, options.rounds)
    rate = read.nbytes / timed["read"].seconds
    rows = [
        Row("read, all threads", spread(rate / 1e9), "GB/s", spread(timed["read"].seconds)),
        *speeds(queries, timed),
        *(
            floor(f" of {name}", cache.nbytes / rate, timed[f"{name} {min(queries)}"])
            for name, cache in caches.items()
        ),
    ]
    notes = [
        f"{options.tokens} tokens, {options.kv_heads} key/value heads, head_dim "
        f"{options.head_dim}, one query token, blocks of {BLOCK_SIZE}, {options.threads} threads, "
        f"{options.rounds} rounds interleaved",
        as_text(machine()),
        *(check(name, keys, values, queries) for name in HELD),
        "numpy: np.matmul and a float32 softmax over float32 keys and values, OpenBLAS with as "
        "many threads; memory floor: the bytes of the quantized cache at the speed of 'read' "
        "(np.max in as many threads, over as many bytes)",
        RATIOS,
    ]
    title = f"nsq {nsq.__version__}, attention"
    publish(options, title, rows, notes, timed, threads=options.threads, shape=list(shape))


def filled(name: SchemeName, keys: Float32, values: Float32) -> nsq.KVCache:
    scheme = replace(nsq.Scheme.named(name), block_size=BLOCK_SIZE)
    cache = nsq.KVCache(1, keys.shape[1], keys.shape[3], scheme, scheme)
    cache.append(keys, values)
    return cache


def by_numpy(query: Float32, keys: Float32, values: Float32) -> Float32:
    """Attend as one would in NumPy: heads that share keys and values are rows of one matrix."""
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    rows = query.reshape(kv_heads, -1, head_dim) * np.float32(head_dim**-0.5)
    scores = rows @ keys[0].swapaxes(1, 2)
    scores -= scores.max(axis=2, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=2, keepdims=True)
    output: Float32 = (scores @ values[0]).reshape(query.shape)
    return output


def speeds(queries: dict[int, Float32], timed: dict[str, Timed]) -> list[Row]:
    rows = []
    for heads in queries:
        base = timed[f"numpy {heads}"]
        rows.append(beside(f"numpy, {heads} query heads", base, base, ""))
        for name in (*HELD, *OTHERS):
            what, target = f"{name}, {heads} query heads", TARGET if name in HELD else None
            case = timed[f"{name} {heads}"]
            rows.append(beside(what, base, case, "times as fast as numpy", target))
    return rows


def check(name: SchemeName, keys: Float32, values: Float32, queries: dict[int, Float32]) -> str:
    """Compare a shorter cache with float64."""
    cache = filled(name, keys[:, :, :CHECKED_TOKENS], values[:, :, :CHECKED_TOKENS])
    decoded = cache.dequantize()
    errors = [
        np.abs(cache.attend(query) - attention.attend(query, *decoded).output).max()
        for query in queries.values()
    ]
    return (
        f"{name}: largest difference from float64 over the decoded cache, {CHECKED_TOKENS} tokens: "
        f"{max(errors):.1e}"
    )


if __name__ == "__main__":
    main()

"""One decode step of attention over a quantized cache, beside NumPy over the float32 cache.

Run as ``python -m benchmarks.attention [--json FILE]``. All are timed in the same rounds; ratios
are taken round by round.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

import nsq_ref as nsq
from benchmarks.timing import (
    Case,
    Row,
    Target,
    Timed,
    as_text,
    interleaved,
    machine,
    report,
    spread,
    use_threads,
    write_json,
)
from nsq_ref import attention
from nsq_ref.scheme import SchemeName

Float32 = npt.NDArray[np.float32]

HELD: tuple[SchemeName, ...] = ("nsep+pchan4", "streaming4")
OTHERS: tuple[SchemeName, ...] = (
    "streaming2", "streaming3", "streaming8", "nsep+pchan2", "nsep4", "nsep+out4",
)  # fmt: skip
BLOCK_SIZE = 128
TARGET = Target(1.5)
CHECKED_TOKENS = 2048  # float64 takes long


def main() -> None:
    options = parsed()
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
    read = np.array_split(keys.reshape(-1)[: largest // 4], options.threads)
    with ThreadPoolExecutor(options.threads) as pool:
        cases = [Case("read", lambda: list(pool.map(np.max, read)))]
        for heads, query in queries.items():
            cases.append(Case(f"numpy {heads}", partial(by_numpy, query, keys, values)))
            cases += [
                Case(f"{name} {heads}", partial(cache.attend, query))
                for name, cache in caches.items()
            ]
        timed = interleaved(cases, options.rounds)
    rate = sum(part.nbytes for part in read) / timed["read"].seconds
    rows = [
        Row("read, all threads", spread(rate / 1e9), "GB/s", spread(timed["read"].seconds)),
        *speeds(queries, timed),
        *floors(caches, queries, timed, rate),
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
        "ratios are taken round by round: their median, min and max; 'cores' is processor time "
        "over wall time: much below the threads, other work held the machine",
    ]
    report(f"nsq {nsq.__version__}, attention", rows, notes)
    if options.json is not None:
        write_json(
            options.json, rows, notes, threads=options.threads, shape=list(shape),
            seconds={name: case.seconds[case.took_part].tolist() for name, case in timed.items()},
        )  # fmt: skip


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    return parser.parse_args()


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
        what = f"numpy, {heads} query heads"
        one = spread(base.seconds / base.seconds)
        rows.append(Row(what, one, "", spread(base.seconds), cores=base.cores))
        for name in (*HELD, *OTHERS):
            case = timed[f"{name} {heads}"]
            rows.append(
                Row(
                    f"{name}, {heads} query heads",
                    spread(base.seconds / case.seconds),
                    "times as fast as numpy",
                    spread(case.seconds),
                    TARGET if name in HELD else None,
                    case.cores,
                )
            )
    return rows


def floors(
    caches: dict[SchemeName, nsq.KVCache],
    queries: dict[int, Float32],
    timed: dict[str, Timed],
    rate: npt.NDArray[np.float64],
) -> list[Row]:
    rows = []
    for name, cache in caches.items():
        floor = cache.nbytes / rate
        ratio = spread(timed[f"{name} {min(queries)}"].seconds / floor)
        rows.append(Row(f"memory floor of {name}", ratio, "times that takes nsq", spread(floor)))
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

"""Quantize and dequantize beside copying, the paper's listing in PyTorch, gguf and plain NumPy.

Run as ``python -m benchmarks.codec [--json FILE]``. All are timed in the same rounds; ratios are
taken round by round.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

import nsq_ref as nsq
from benchmarks import listing
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
from nsq_ref.dtypes import Float32
from nsq_ref.scheme import SchemeName

Listed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

MAIN: SchemeName = "nsep+pchan4"
OTHERS: tuple[SchemeName, ...] = (
    "naive4", "pchan4", "nsep+pchan3", "nsep+pchan2", "streaming4", "streaming3", "streaming2",
    "nsep+out4",
)  # fmt: skip
Q4_0 = GGMLQuantizationType.Q4_0
COPY_TARGETS = {"quantize": Target(0.5), "dequantize": Target(0.8)}
LISTING_TARGET = Target(5)
GGUF_TARGET = Target(20)
SELDOM = 3  # of so many rounds, slow cases take part in one
COMPILED = "torch.compile"


def main() -> None:
    arguments = parser("codec", __doc__, threads=2, rounds=15)
    arguments.add_argument("--shape", type=int, nargs=3, default=[32, 4096, 128], metavar="N")
    options = arguments.parse_args()
    use_threads(options.threads)
    torch.set_num_threads(options.threads)
    x = np.random.default_rng(0).standard_normal(tuple(options.shape), dtype=np.float32)
    out = np.zeros_like(x)
    with torch.inference_mode(), ThreadPoolExecutor(options.threads) as pool:
        x_torch = torch.from_numpy(x)
        listed = listing.quantize(x_torch)
        notes = [
            f"shape {list(x.shape)} float32, {options.threads} threads, {options.rounds} rounds "
            "interleaved; np.copyto and gguf have one thread, as NumPy has",
            as_text(machine()),
            *checks(x, listed),
        ]
        compiled, reason = compiled_cases(x_torch, listed)
        notes += reason
        cases = [
            *memory_cases(x, out, pool, options.threads),
            *nsq_cases(x, out),
            Case("quantize torch", partial(listing.quantize, x_torch)),
            Case("dequantize torch", partial(listing.dequantize, *listed)),
            *compiled,
            *gguf_cases(x),
        ]
        timed = interleaved(cases, options.rounds)
    rows = [*memory_rows(x, timed), *nsq_rows(timed), *other_rows(timed)]
    notes += [
        "memory floor: input and output, each byte moved once, at the speeds of 'read' (np.max in "
        "as many threads) and 'write' (fill in as many threads)",
        RATIOS,
    ]
    title = f"nsq {nsq.__version__}, codec"
    publish(options, title, rows, notes, timed, threads=options.threads, shape=list(x.shape))


# --- what is timed ------------------------------------------------------------------------------


def memory_cases(x: Float32, out: Float32, pool: ThreadPoolExecutor, threads: int) -> list[Case]:
    outputs = np.array_split(out.reshape(-1), threads)
    return [
        reading(x.reshape(-1), threads, pool),
        Case("write", lambda: list(pool.map(lambda part: part.fill(1), outputs))),
        Case("np.copyto", lambda: np.copyto(out, x)),
    ]


def nsq_cases(x: Float32, out: Float32) -> list[Case]:
    cases = []
    for name in (MAIN, *OTHERS):
        scheme = nsq.Scheme.named(name)
        q = nsq.quantize(x, scheme)
        cases += [
            Case(f"quantize {name}", partial(nsq.quantize, x, scheme)),
            Case(f"dequantize {name}", partial(nsq.dequantize, q, out)),
        ]
    q = nsq.quantize(x)
    return [
        *cases,
        Case("quantize numpy", partial(nsq.quantize, x, backend="numpy"), SELDOM),
        Case("dequantize numpy", partial(nsq.dequantize, q, out, backend="numpy"), SELDOM),
    ]


def compiled_cases(x: torch.Tensor, listed: Listed) -> tuple[list[Case], list[str]]:
    """Compile the listing, or note why that is not possible."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")):
        return [], [f"{COMPILED}: left out, there is no C++ compiler"]
    quantize: Callable[..., object] = torch.compile(listing.quantize)
    dequantize: Callable[..., object] = torch.compile(listing.dequantize)
    start = time.perf_counter()
    try:
        quantize(x)
        dequantize(*listed)
    except (RuntimeError, OSError) as error:  # no headers, no linker, a Python not supported
        return [], [f"{COMPILED}: left out, {type(error).__name__}: {str(error).splitlines()[0]}"]
    took = time.perf_counter() - start
    cases = [
        Case(f"quantize {COMPILED}", lambda: quantize(x)),
        Case(f"dequantize {COMPILED}", lambda: dequantize(*listed)),
    ]
    return cases, [f"{COMPILED}: compiling took {took:.0f} s, not counted"]


def gguf_cases(x: Float32) -> list[Case]:
    packed = quants.quantize(x, Q4_0)
    return [
        Case("quantize gguf Q4_0", lambda: quants.quantize(x, Q4_0)),
        Case("dequantize gguf Q4_0", lambda: quants.dequantize(packed, Q4_0)),
    ]


# --- what is reported ---------------------------------------------------------------------------


def memory_rows(x: Float32, timed: dict[str, Timed]) -> list[Row]:
    rows = []
    for name in ("read", "write", "np.copyto"):
        moved = x.nbytes * (2 if name == "np.copyto" else 1) / 1e9
        times = timed[name].seconds
        what = f"{name}, one thread" if name == "np.copyto" else f"{name}, all threads"
        rate = spread(moved / times)
        rows.append(Row(what, rate, "GB/s", spread(times), cores=timed[name].cores))
    stored = nsq.quantize(x).nbytes / x.nbytes
    read, write = timed["read"].seconds, timed["write"].seconds
    floors = {"quantize": read + stored * write, "dequantize": stored * read + write}
    for verb, seconds in floors.items():
        rows.append(floor(f" of {verb}", seconds, timed[f"{verb} {MAIN}"]))
    return rows


def nsq_rows(timed: dict[str, Timed]) -> list[Row]:
    return [
        beside(
            f"nsq.{verb} {name}", timed["np.copyto"], timed[f"{verb} {name}"],
            "of np.copyto's speed", target if name == MAIN else None,
        )
        for name in (MAIN, *OTHERS)
        for verb, target in COPY_TARGETS.items()
    ]  # fmt: skip


def other_rows(timed: dict[str, Timed]) -> list[Row]:
    """Relate what others take to what nsep+pchan4 takes."""
    labels = {
        "torch": "listing, torch",
        COMPILED: f"listing, {COMPILED}",
        "gguf Q4_0": "gguf Q4_0",
        "numpy": "backend='numpy'",
    }
    rows = []
    for name, label in labels.items():
        for verb in COPY_TARGETS:
            case = timed.get(f"{verb} {name}")
            if case is None:
                continue
            target = LISTING_TARGET if name == "torch" else None
            if name == "gguf Q4_0" and verb == "quantize":
                target = GGUF_TARGET
            figure = spread(case.seconds / timed[f"{verb} {MAIN}"].seconds)
            what, seconds = f"{verb}, {label}", spread(case.seconds)
            rows.append(Row(what, figure, "times what nsq takes", seconds, target, case.cores))
    return rows


# --- are the same things timed? -----------------------------------------------------------------


def checks(x: Float32, listed: Listed) -> list[str]:
    """Compare bytes with the NumPy backend, and codes with the listing's.

    The listing keeps its scales in float32, NSQ-1 in float16, which moves a quotient by at most
    2**-11 of itself; a few float32 operations add less than 2**-21. Codes may differ just where
    half an integer lies that near to the quotient.
    """
    q, same = nsq.quantize(x), nsq.quantize(x, backend="numpy")
    equal = all(np.array_equal(part, same.parts[name]) for name, part in q.parts.items())
    equal &= np.array_equal(nsq.dequantize(q), nsq.dequantize(q, backend="numpy"))
    packed, norm, scale = (part.numpy() for part in listed)
    theirs = listing.codes(torch.from_numpy(packed)).numpy()
    quotient = np.abs(x / norm / scale)
    to_half = np.abs(quotient - np.floor(quotient) - np.float32(0.5))
    near = to_half <= quotient * np.float32(2.0**-11 + 2.0**-21)
    differ = q.codes != theirs
    unexplained = int(np.sum(differ & ~near))
    return [
        f"bytes of the numba and the numpy backend: {'equal' if equal else 'DIFFERENT'}",
        f"codes unlike the listing's: {int(differ.sum())} of {differ.size}, "
        + (f"{unexplained} of them UNEXPLAINED" if unexplained else "all where the rounding of")
        + ("" if unexplained else " scales to float16 decides the rounding of the code"),
    ]


if __name__ == "__main__":
    main()

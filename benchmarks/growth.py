"""Time an element and memory beyond input and output, from 1e5 to 1e9 elements.

Run as ``python -m benchmarks.growth [--json FILE]``: nsep+pchan4, float32, heads and head size
fixed, tokens growing. Sizes that do not fit in memory are left out, and named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np

import nsq_ref as nsq
from benchmarks.timing import (
    Case,
    Row,
    Spread,
    Target,
    as_text,
    interleaved,
    machine,
    parser,
    publish,
    spread,
    use_threads,
)

HEADS, HEAD_DIM = 32, 128
SIZES = (10**5, 10**6, 10**7, 10**8, 10**9)
BYTES_PER_ELEMENT = 4 + 4 + 0.6  # input, output, what is stored of all sizes together
SPARE = 1.15  # of these bytes, for all else
RESIDENT_FROM = 10**8  # below it, pages and thread stacks are most of the figure
EXTRA_TARGET = Target(5, at_most=True)


def main() -> None:
    arguments = parser("growth", __doc__, threads=2, rounds=5)
    arguments.add_argument(
        "--memory", type=float, help="GB to stay within; what is available if left out"
    )
    arguments.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    use_threads(options.threads)
    if options.measure:
        print(json.dumps(extra_memory(options.measure)))
        return
    room = options.memory * 1e9 if options.memory else available_memory()
    sizes = [size for size in SIZES if size * BYTES_PER_ELEMENT * SPARE <= room]
    left_out = [f"{size:.0e}" for size in SIZES if size not in sizes]
    memory = {size: measured_apart(size, options.threads) for size in sizes}

    shapes = {size: (HEADS, tokens_of(size), HEAD_DIM) for size in sizes}
    x = np.empty(elements(sizes[-1]), np.float32)
    np.random.default_rng(0).standard_normal(out=x, dtype=np.float32)
    out = np.zeros_like(x)
    cases = []
    for size, shape in shapes.items():
        given, restored = (buffer[: elements(size)].reshape(shape) for buffer in (x, out))
        q = nsq.quantize(given)
        cases += [
            Case(f"quantize {size}", partial(nsq.quantize, given)),
            Case(f"dequantize {size}", partial(nsq.dequantize, q, restored)),
        ]
    timed = interleaved(cases, options.rounds)

    rows = []
    for verb in ("quantize", "dequantize"):
        for size in sizes:
            case = timed[f"{verb} {size}"]
            per_element = spread(1e9 * case.seconds / elements(size))
            what, seconds = f"{verb}, {size:.0e}", spread(case.seconds)
            rows.append(Row(what, per_element, "ns an element", seconds, cores=case.cores))
    for verb in ("quantize", "dequantize"):
        for size in sizes:
            for way in ("traced", "resident"):
                if way == "resident" and size < RESIDENT_FROM:
                    continue
                share = 100 * memory[size][f"{verb} {way}"] / (4 * elements(size))
                what = f"{verb}, {size:.0e}, memory {way}"
                figure = Spread(share, share, share)
                rows.append(Row(what, figure, "% of the input", target=EXTRA_TARGET))
    notes = [
        f"{HEADS} heads, head size {HEAD_DIM}, float32, {options.threads} threads, "
        f"{options.rounds} rounds interleaved",
        as_text(machine()),
        "% of the input: peak of memory beyond input and output, a fresh process for each size; "
        "'traced' is what tracemalloc saw, in which all of NumPy's arrays are, 'resident' the "
        "growth of ru_maxrss, of large sizes only, since it counts whole pages and thread stacks",
        f"left out for want of memory: {', '.join(left_out) or 'none'}",
    ]
    title = f"nsq {nsq.__version__}, growth of nsep+pchan4"
    publish(options, title, rows, notes, threads=options.threads)


def tokens_of(size: int) -> int:
    """Return the tokens a head that come nearest to ``size`` elements."""
    return max(1, round(size / (HEADS * HEAD_DIM)))


def elements(size: int) -> int:
    """Return the elements that are really used for ``size``."""
    return HEADS * tokens_of(size) * HEAD_DIM


def available_memory() -> float:
    """Return the bytes that are free for a program, as Linux estimates them, else half of all."""
    listing = Path("/proc/meminfo")
    if listing.exists():
        lines = dict(line.split(":", 1) for line in listing.read_text().splitlines())
        return 1024 * float(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2


# --- memory: one process a size, since the peak of a process never falls -------------------------


def measured_apart(size: int, threads: int) -> dict[str, int]:
    """Run `extra_memory` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.growth"]
    command += ["--measure", str(size), "--threads", str(threads)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, int] = json.loads(finished.stdout)
    return measured


def extra_memory(size: int) -> dict[str, int]:
    """Return the bytes needed beyond input and output, traced and resident, by operation."""
    shape = (HEADS, tokens_of(size), HEAD_DIM)
    warm = np.ones((HEADS, 64, HEAD_DIM), np.float32)  # compiles, and starts the threads
    nsq.dequantize(nsq.quantize(warm))
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    extra = {}
    tracemalloc.start()

    before, resident = _marks()
    q = nsq.quantize(x)
    extra["quantize traced"] = tracemalloc.get_traced_memory()[1] - before - q.nbytes
    extra["quantize resident"] = _peak_resident() - resident - q.nbytes

    out = np.zeros_like(x)
    out.fill(1)  # so that its pages are there, and counted before
    before, resident = _marks()
    nsq.dequantize(q, out)
    extra["dequantize traced"] = tracemalloc.get_traced_memory()[1] - before
    extra["dequantize resident"] = _peak_resident() - resident
    return extra


def _marks() -> tuple[int, int]:
    tracemalloc.reset_peak()
    return tracemalloc.get_traced_memory()[0], _peak_resident()


def _peak_resident() -> int:
    import resource  # not on Windows

    # In kB, but in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()

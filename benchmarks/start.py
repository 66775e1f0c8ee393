"""Time until the first use, in fresh processes: import, and the first call of each kind.

Run as ``python -m benchmarks.start [--json FILE]``. Kernels are compiled on first use and kept in
a folder; here that is a temporary one, empty (cold) or filled by the process before (warm).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

import nsq_ref as nsq
from benchmarks.timing import Row, Target, as_text, machine, parser, publish, spread

IMPORT_TARGET = Target(0.6, at_most=True)
FIRST_CALLS = """
import json, time
import numpy as np
import nsq_ref as nsq
x = np.random.default_rng(0).standard_normal((8, 512, 128), dtype=np.float32)
marks = [time.perf_counter()]
q = nsq.quantize(x)
marks.append(time.perf_counter())
nsq.dequantize(q)
marks.append(time.perf_counter())
print(json.dumps(np.diff(marks).tolist()))
"""


def main() -> None:
    arguments = parser("start", __doc__)
    arguments.add_argument("--rounds", type=int, default=10, help="processes for each import")
    arguments.add_argument("--cold", type=int, default=3, help="times to start with a cold cache")
    options = arguments.parse_args()
    bare, imported = [], []
    run("import nsq_ref")  # writes the bytecode
    for _ in range(options.rounds):
        bare.append(wall_time("pass"))
        imported.append(wall_time("import nsq_ref"))
    first: dict[str, list[list[float]]] = {"cold": [], "warm": []}
    for _ in range(options.cold):
        with tempfile.TemporaryDirectory(prefix="nsq-start-") as folder:
            for calls in first.values():
                calls.append(json.loads(run(FIRST_CALLS, NUMBA_CACHE_DIR=folder)))
    rows = [
        Row("python -c 'import nsq_ref'", spread(imported), "s", target=IMPORT_TARGET),
        Row("python -c 'pass', for comparison", spread(bare), "s"),
    ]
    for state, calls in first.items():
        for verb, times in zip(("quantize", "dequantize"), zip(*calls, strict=True), strict=True):
            rows.append(Row(f"first nsq.{verb}, {state} cache", spread(times), "s"))
    notes = [
        f"fresh processes, alternating: {options.rounds} of each import, {options.cold} of each "
        "first call on [8, 512, 128]; the first quantize includes importing Numba",
        as_text(machine()),
    ]
    publish(options, f"nsq {nsq.__version__}, start", rows, notes)


def wall_time(code: str) -> float:
    """Return the seconds a fresh process takes from start to end."""
    start = time.perf_counter()
    run(code)
    return time.perf_counter() - start


def run(code: str, **environment: str) -> str:
    """Run code in a fresh process and return what it prints."""
    command = [sys.executable, "-c", code]
    finished = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    return finished.stdout


if __name__ == "__main__":
    main()

"""How long ``nsq check`` takes: right ports in Python and in C, and a wrong one to be diagnosed.

Run as ``python -m benchmarks.conformance [--json FILE] [--rounds N]``. Whole processes, from the
start of the command to its end; the C example is compiled before, by the compiler of the tests.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nsq_ref as nsq
from benchmarks.timing import Row, Target, as_text, machine, parser, publish, spread

ROOT = Path(__file__).parents[1]
FUNCTIONS = f"{ROOT / 'tests' / 'ports' / 'functions.py'}"
C_EXAMPLE = ROOT / "docs" / "examples" / "nsq_port.c"
COMPILER = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", "-O2", "-ffp-contract=off"]


def main() -> None:
    arguments = parser("conformance", __doc__)
    arguments.add_argument("--rounds", type=int, default=3, help="times to run each")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="nsq-conformance-") as folder:
        right, wrong = Path(folder) / "right.so", Path(folder) / "wrong.so"
        compiled(C_EXAMPLE.read_text(encoding="utf-8"), right)
        compiled(C_EXAMPLE.read_text(encoding="utf-8").replace("rintf(", "roundf("), wrong)
        python = [f"{FUNCTIONS}:encode", "--decode", f"{FUNCTIONS}:decode"]
        runs = {
            "encode and decode in NumPy, one scheme": (python, 0, Target(30, at_most=True)),
            "the same, all schemes": ([*python, "--all"], 0, None),
            "the C example": ([str(right)], 0, Target(10, at_most=True)),
            "the C example with one mistake": ([str(wrong)], 1, None),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, (given, code, _target) in runs.items():
                times[name].append(wall_time(given, code))
    rows = [
        Row(f"nsq check: {name}", spread(times[name]), "s", target=runs[name][2]) for name in runs
    ]
    notes = [f"fresh processes, alternating: {options.rounds} of each", as_text(machine())]
    publish(options, f"nsq {nsq.__version__}, conformance", rows, notes)


def compiled(source: str, library: Path) -> None:
    """Compile the example to a shared library."""
    file = library.with_suffix(".c")
    file.write_text(source, encoding="utf-8")
    include = f"-I{ROOT / 'nsq_ref' / 'conformance'}"
    subprocess.run([*COMPILER, include, str(file), "-o", str(library)], check=True)


def wall_time(arguments: list[str], code: int) -> float:
    """Return the seconds that a check takes, which must end with an exit code."""
    command = [str(Path(sys.executable).with_name("nsq")), "check", *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode != code:
        raise RuntimeError(f"{command} ended with {done.returncode}, not {code}:\n{done.stdout}")
    return seconds


if __name__ == "__main__":
    main()

"""What the benchmarks share: threads, interleaved rounds, figures beside targets, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from nsq_ref.dtypes import Array, Float64
from nsq_ref.files import atomic

# Seconds; by then threads have spread over the cores, and those of other cases no longer spin.
SETTLE = 0.02
RATIOS = (
    "ratios are taken round by round: their median, min and max; 'cores' is processor time over "
    "wall time: much below the threads, other work held the machine"
)


def parser(name: str, about: str | None, **defaults: int) -> argparse.ArgumentParser:
    """Return what reads ``--json`` and, such as ``--rounds``, integers that have defaults."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    made.add_argument("--json", type=Path, help="write all figures to this file")
    for option, default in defaults.items():
        made.add_argument(f"--{option.replace('_', '-')}", type=int, default=default)
    return made


class Spread(NamedTuple):
    """A figure over all rounds: its median, and how far the rounds lie apart."""

    median: float
    least: float
    greatest: float


class Target(NamedTuple):
    """What a figure shall reach: at least ``bound``, or at most."""

    bound: float
    at_most: bool = False


class Case(NamedTuple):
    """What is timed; of every so many rounds it takes part in one."""

    name: str
    call: Callable[[], object]
    every: int = 1


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    what: str  # what was measured
    figure: Spread  # that a target is for
    unit: str  # of the figure, or what it is relative to
    seconds: Spread | None = None  # where the figure is a ratio, the time behind it
    target: Target | None = None  # None for what is only information
    cores: float | None = None  # how many worked at once

    @property
    def verdict(self) -> str:
        """``reached``, ``MISSED``, or nothing where there is no target."""
        if self.target is None:
            return ""
        bound, at_most = self.target
        reached = self.figure.median <= bound if at_most else self.figure.median >= bound
        return "reached" if reached else "MISSED"


def use_threads(count: int) -> None:
    """Set the threads of Numba and OpenMP; Numba reads this once, when it is imported."""
    if "numba" in sys.modules:
        raise RuntimeError("Numba is imported already; call use_threads before it is")
    os.environ["NUMBA_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(count)


class Timed(NamedTuple):
    """What the rounds of a case took, NaN in those in which it took no part."""

    seconds: Float64
    processor_seconds: Float64

    @property
    def took_part(self) -> npt.NDArray[np.bool_]:
        """The rounds in which the case took part."""
        return ~np.isnan(self.seconds)

    @property
    def cores(self) -> float:
        """How many cores worked at once; fewer than threads means that others held them."""
        return float(np.nanmedian(self.processor_seconds / self.seconds))


def interleaved(cases: Sequence[Case], rounds: int, settle: float = SETTLE) -> dict[str, Timed]:
    """Time all cases round by round, so that drift of the machine hits all alike.

    Each timed call follows untimed ones of the same case, for `settle`: what is measured is steady
    use, not how quickly the system wakes a second core after whatever came before. The order is
    shuffled each round, always in the same way, so that no case always finds the cache as the same
    other one left it. Returns what was timed by the names of the cases.
    """
    timed = {case.name: Timed(*np.full((2, rounds), np.nan)) for case in cases}
    for number in range(rounds):
        for case in random.Random(number).sample(cases, len(cases)):
            if number % case.every == 0:
                _settle(case, settle)
                start, processor_start = time.perf_counter(), time.process_time()
                result = case.call()
                timed[case.name].seconds[number] = time.perf_counter() - start
                timed[case.name].processor_seconds[number] = time.process_time() - processor_start
                del result
    return timed


def _settle(case: Case, seconds: float) -> None:
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        result = case.call()
        del result


def reading(much: Array, threads: int, pool: ThreadPoolExecutor) -> Case:
    """Return the case ``read``: the speed of memory, by `np.max` in so many threads."""
    parts = np.array_split(much, threads)
    return Case("read", lambda: list(pool.map(np.max, parts)))


def beside(what: str, base: Timed, case: Timed, unit: str, target: Target | None = None) -> Row:
    """Say how many times as fast as ``base`` a case is."""
    figure, seconds = spread(base.seconds / case.seconds), spread(case.seconds)
    return Row(what, figure, unit, seconds, target, case.cores)


def floor(what: str, seconds: Float64, case: Timed, unit: str = "times that takes nsq") -> Row:
    """Say how many times as long as reading and writing its bytes a case takes."""
    return Row(f"memory floor{what}", spread(case.seconds / seconds), unit, spread(seconds))


def spread(values: Float64 | Sequence[float]) -> Spread:
    """Return median, least and greatest, NaN left out.

    Examples
    --------
    >>> spread([3.0, 1.0, 2.0])
    Spread(median=2.0, least=1.0, greatest=3.0)
    """
    some = np.asarray(values, np.float64)
    some = some[~np.isnan(some)]
    return Spread(float(np.median(some)), float(some.min()), float(some.max()))


def publish(
    options: argparse.Namespace, title: str, rows: Sequence[Row], notes: Sequence[str],
    timed: Mapping[str, Timed] | None = None, **more: Any,
) -> None:  # fmt: skip
    """Print the rows, and write them, ``more`` and each round's seconds where ``--json`` says."""
    report(title, rows, notes)
    if timed is not None:
        rounds = {name: case.seconds[case.took_part].tolist() for name, case in timed.items()}
        more["seconds"] = rounds
    if options.json is not None:
        write_json(options.json, rows, notes, **more)


def report(title: str, rows: Sequence[Row], notes: Sequence[str]) -> None:
    """Print the rows as one table, and below it what a reader must know to judge them."""
    table = Table(title=title, title_justify="left")
    table.add_column("measured")
    for heading in ("ms", "cores", "figure", "min", "max"):
        table.add_column(heading, justify="right")
    table.add_column("unit of the figure")
    table.add_column("target", justify="right")
    table.add_column("")
    for row in rows:
        milliseconds = "" if row.seconds is None else f"{1e3 * row.seconds.median:.2f}"
        target = ""
        if row.target is not None:
            target = f"{'at most' if row.target.at_most else 'at least'} {row.target.bound:g}"
        style = {"MISSED": "bold red", "reached": "green", "": ""}[row.verdict]
        figures = [f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}" for value in row.figure]
        cores = "" if row.cores is None else f"{row.cores:.1f}"
        table.add_row(
            row.what, milliseconds, cores, *figures, row.unit, target, row.verdict, style=style
        )
    # A table cut to the width of a narrow terminal, or of a log, would lose figures.
    console = Console(highlight=False, width=max(132, Console().width))
    console.print(table)
    for note in notes:
        console.print(note, soft_wrap=True)


def machine() -> dict[str, str | int]:
    """Return what the figures depend on: processor, system, versions."""
    model = platform.processor()
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        named = [line for line in listing.read_text().splitlines() if line.startswith("model name")]
        model = named[0].partition(":")[2].strip() if named else model
    packages = ("numpy", "numba", "llvmlite", "torch", "gguf")
    installed = {name: _version(name) for name in packages}
    return {
        "processor": model,
        "processors": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **installed,
    }


def as_text(facts: dict[str, str | int]) -> str:
    """Join what `machine` returns into one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def write_json(file: Path, rows: Sequence[Row], notes: Sequence[str], **more: Any) -> None:
    """Write everything measured: the rows with verdicts, the notes, the machine, and ``more``."""
    listed = [
        {
            "what": row.what,
            "figure": row.figure._asdict(),
            "unit": row.unit,
            "seconds": None if row.seconds is None else row.seconds._asdict(),
            "cores": row.cores,
            "target": None if row.target is None else row.target._asdict(),
            "verdict": row.verdict,
        }
        for row in rows
    ]
    content = {"machine": machine(), **more, "rows": listed, "notes": list(notes)}
    atomic.write([(file, (json.dumps(content, indent=1) + "\n").encode())])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"

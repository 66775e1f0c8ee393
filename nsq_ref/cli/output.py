"""What a verb prints: tables for people, JSON for programs, and a bar while it works."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer


def on_terminal() -> bool:
    """Whether somebody looks at what is printed; there is no output where a shell closed it."""
    return sys.stdout is not None and sys.stdout.isatty()


def print_json(result: dict[str, Any]) -> None:
    """Print a result for programs."""
    typer.echo(json.dumps(result, indent=2))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a result for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text, as names may look like markup
    # Into a pipe a row stays a line.
    Console(width=None if on_terminal() else 10_000).print(table)


@contextlib.contextmanager
def progress(what: str, steps: int) -> Iterator[Callable[[], None]]:
    """Show a bar of so many steps, where somebody looks."""
    with stages() as show:
        done = itertools.count(1)
        yield lambda: show(what, next(done), steps) if show else None


@contextlib.contextmanager
def stages() -> Iterator[Callable[[str, int, int], None] | None]:
    """Show a bar whose label and length are told with every step; None where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )

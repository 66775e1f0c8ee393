"""What the cases show, as rows of a table and as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nsq_ref.conformance.coverage import Cell

HEADS = ("rule", "mistake", "shown by")


def coverage_rows(cells: Sequence[Cell]) -> Iterator[tuple[str, str, str]]:
    """Yield rule, mistake, and what shows it, or why nothing can; a row for each mistake.

    Examples
    --------
    >>> list(coverage_rows([Cell("half up", "Q1", d, f"encode/exact-tie/{n}")
    ...                     for d, n in (("float32", 0), ("float16", 100))]))
    [('Q1', 'half up', 'encode/exact-tie/0, 100')]
    """
    for _, group in itertools.groupby(cells, lambda cell: cell.mistake):
        of_it = list(group)
        shown = list(dict.fromkeys(cell.shown_by for cell in of_it if cell.shown_by))
        parts = [
            ", ".join([names[0], *(name.rpartition("/")[2] for name in names[1:])])
            for _, same in itertools.groupby(shown, lambda name: name.rpartition("/")[0])
            if (names := list(same))
        ]
        missing = [cell for cell in of_it if not cell.shown_by]
        for why in dict.fromkeys(cell.reason.name if cell.reason else "" for cell in missing):
            kinds = [c.dtype for c in missing if (c.reason.name if c.reason else "") == why]
            said = why or "A HOLE: no case shows it"
            where = "" if len(kinds) == len(of_it) else f"{' and '.join(kinds)}: "
            parts.append(f"{where}{said}")
        yield of_it[0].rule, of_it[0].mistake, "; ".join(parts)


def coverage_reasons(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Return name and words of each reason that is given, once.

    Examples
    --------
    >>> coverage_reasons([Cell("half up", "Q1", "float32", "encode/exact-tie/0")])
    []
    """
    reasons = dict.fromkeys((one.reason.name, one.reason.says) for one in cells if one.reason)
    return sorted(reasons)


def coverage_summary(name: str, cells: Sequence[Cell]) -> str:
    """Return one sentence.

    Examples
    --------
    >>> coverage_summary("naive4", [Cell("half up", "Q1", "float32", "encode/exact-tie/0")])
    'naive4: 1 mistake in 1 dtype, 1 cell shown, 0 that nothing can show, 0 holes.'
    """

    def count(number: int, what: str) -> str:
        return f"{number} {what}" + ("" if number == 1 else "s")

    shown = sum(bool(cell.shown_by) for cell in cells)
    holes = sum(cell.is_hole for cell in cells)
    mistakes, dtypes = ({getattr(cell, of) for cell in cells} for of in ("mistake", "dtype"))
    return (
        f"{name}: {count(len(mistakes), 'mistake')} in {count(len(dtypes), 'dtype')}, "
        f"{count(shown, 'cell')} shown, {len(cells) - shown - holes} that nothing can show, "
        f"{count(holes, 'hole')}."
    )


def coverage_as_json(schemes: Mapping[str, Sequence[Cell]]) -> dict[str, Any]:
    """Return what `nsq check --coverage --json` prints.

    Examples
    --------
    >>> cells = [Cell("half up", "Q1", "float32", "encode/exact-tie/0")]
    >>> coverage_as_json({"naive4": cells})["schemes"][0]["cells"][0]["shownBy"]
    'encode/exact-tie/0'
    """
    return {
        "schemes": [
            {
                "name": name,
                "holes": sum(cell.is_hole for cell in cells),
                "cells": [
                    {
                        "mistake": cell.mistake,
                        "rule": cell.rule,
                        "dtype": cell.dtype,
                        "shownBy": cell.shown_by or None,
                        "reason": cell.reason.says if cell.reason else None,
                    }
                    for cell in cells
                ],
            }
            for name, cells in schemes.items()
        ]
    }

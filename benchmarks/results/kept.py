"""What was measured, read back: means with standard errors, and what may be said of two of them."""

from __future__ import annotations

import json
import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results.measure import DATA


@dataclass(frozen=True)
class Mean:
    """A mean over passages and its standard error, which takes passages as independent."""

    value: float
    error: float
    count: int

    @classmethod
    def of(cls, samples: list[float]) -> Mean:
        """Average; a single passage has no error."""
        error = np.std(samples, ddof=1) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
        return cls(float(np.mean(samples)), float(error), len(samples))

    @property
    def told(self) -> bool:
        """Whether it is more than two standard errors from 0."""
        return abs(self.value) > 2 * self.error

    def __str__(self) -> str:
        if math.isnan(self.error):
            return f"{number(self.value)} (one passage)"
        digits = max(_digits(self.value), 0 if self.error == 0 else _digits(self.error) - 2)
        return f"{number(self.value, digits)} ± {number(self.error, digits)}"


class Kept:
    """The rows of one plan, over the passages that all of them have."""

    def __init__(self, name: str, folder: Path = DATA) -> None:
        self.name = name
        read = load(name, folder)
        self.plan: dict[str, Any] = read["plan"]
        self.rows: dict[str, list[dict[str, float]]] = read["rows"]
        self.baseline: list[dict[str, float]] = read["baseline"]

    @property
    def passages(self) -> int:
        """How many passages there are."""
        return len(self.baseline)

    def samples(self, condition: str, figure: str = "kl") -> list[float]:
        """Return a figure of each passage; of ``nll`` the change."""
        own = [row[figure] for row in self.rows[condition]]
        if figure != "nll":
            return own
        return [a - b["nll"] for a, b in zip(own, self.baseline, strict=True)]

    def mean(self, condition: str, figure: str = "kl") -> Mean:
        """Average over passages."""
        return Mean.of(self.samples(condition, figure))

    def perplexity_change(self, condition: str) -> float:
        """Return the change of the exponential of the mean NLL."""
        own = np.mean([row["nll"] for row in self.rows[condition]])
        return float(np.exp(own) - np.exp(np.mean([one["nll"] for one in self.baseline])))

    def difference(self, first: str, second: str, figure: str = "kl") -> Mean:
        """Return the mean of the first less the second, paired by passage."""
        pairs = zip(self.samples(first, figure), self.samples(second, figure), strict=True)
        return Mean.of([a - b for a, b in pairs])

    def verdict(self, more: str, less: str) -> str:
        """Say whether the first costs more, by the rule of docs/fidelity.md."""
        found = self.difference(more, less)
        if found.count < 2:
            return "one passage only"
        if not found.told:
            return "not told apart"
        return "holds" if found.value > 0 else "contradicted"


def load(name: str, folder: Path = DATA) -> dict[str, Any]:
    """Return what a file of data holds."""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def has(*names: str, folder: Path = DATA) -> bool:
    """Whether all of these were measured, one passage of each at least."""
    return all(
        (folder / f"{name}.json").exists() and load(name, folder).get("baseline", [0])
        for name in names
    )


def number(value: float, digits: int | None = None) -> str:
    """Write a number with three digits that count, or so many behind the point.

    Examples
    --------
    >>> number(0.012345), number(1382.07), number(0.0), number(-0.5), number(0.01, 2)
    ('.0123', '1382', '0', '-.500', '.01')
    """
    if value == 0:
        return "0"
    text = f"{value:.{_digits(value) if digits is None else digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _digits(value: float) -> int:
    return 3 if value == 0 else min(7, max(0, 2 - math.floor(math.log10(abs(value)))))


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, numbers to the right.

    Examples
    --------
    >>> print(table(["a", "b"], [["x", "1"]]))
    | a | b |
    |---|--:|
    | x | 1 |
    """
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    made = [f"| {' | '.join(line)} |" for line in lines]
    made[1] = made[1].replace(" ", "")
    return "\n".join(made)


WIDTH = 100
VERBATIM = ("```", "$$")  # what is between two of one stays as it is
ITEM = re.compile(r"(?:[-*+>#]|[0-9]+[.)]) ")  # what begins something else where a line begins


def filled(page: str) -> str:
    r"""Wrap the prose of a page of Markdown to lines of one width; all else stays as it is.

    Numbers that are put into a text make its lines longer and shorter than they were written.

    Examples
    --------
    >>> print(filled("# A title\n\nSome\nwords.\n\n- An\nitem.\n\n| a |\n|---|"))
    # A title
    <BLANKLINE>
    Some words.
    <BLANKLINE>
    - An item.
    <BLANKLINE>
    | a |
    |---|
    """
    made: list[str] = []
    paragraph: list[str] = []
    within = ""  # a block of code or a formula

    def end() -> None:
        if paragraph:
            made.extend(_wrapped(" ".join(one.strip() for one in paragraph)))
            paragraph.clear()

    for line in page.splitlines():
        mark = next((one for one in VERBATIM if line.startswith(one)), "")
        if within or mark:
            end()
            made.append(line)
            closes = within in line if within else mark in line[len(mark) :]
            within = "" if closes else within or mark
        elif not line.strip() or line.startswith(("|", "#", "![")):
            end()
            made.append(line)
        else:
            if line.startswith("- "):
                end()
            paragraph.append(line)
    end()
    return "\n".join(made)


def _wrapped(text: str) -> list[str]:
    whole = re.sub("`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)  # not to be broken
    lines = textwrap.wrap(
        whole, WIDTH, break_long_words=False, break_on_hyphens=False,
        subsequent_indent="  " if text.startswith("- ") else "",
    )  # fmt: skip
    kept = lines[:1]
    for line in lines[1:]:  # what would begin a list stays on the line before
        while ITEM.match(line.lstrip()):
            first, _, line = line.lstrip().partition(" ")  # noqa: PLW2901
            kept[-1] += f" {first}"
        kept.append(line)
    return [line.replace("\0", " ") for line in kept]

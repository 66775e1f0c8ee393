"""What figures look alike by: colours, markers, axes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullLocator

# Okabe and Ito's palette, each colour with a marker of its own, so that no figure rests on colour.
STYLES = [
    ("#000000", "o"), ("#E69F00", "s"), ("#56B4E9", "^"), ("#009E73", "D"),
    ("#0072B2", "v"), ("#D55E00", "P"), ("#CC79A7", "X"),
]  # fmt: skip

FAMILIES = ("naive", "nsep", "pchan", "nsep+pchan", "streaming", "outlier", "nsep+out")

SEQUENTIAL, DIVERGING = "cividis", "PuOr"  # both can be told without red and green


def styles(first: int = 0) -> Iterator[tuple[str, str]]:
    """Yield colours and markers, over and over, from this one on; the first is black."""
    return itertools.islice(itertools.cycle(STYLES), first, None)


def styles_of(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Styles by the families of schemes, so that figures agree, where they tell the names apart."""
    families = [name[:-1] for name in names]
    if len(set(families)) < len(names) or not set(families) <= set(FAMILIES):
        return styles()
    return (STYLES[FAMILIES.index(family)] for family in families)


def plain_ticks(
    axis: Axis, unit: str = "", at: Sequence[int] = (1, 2, 3, 5), times: float = 1
) -> None:
    """Write the ticks of a logarithmic axis as people write numbers, at these of each decade."""
    axis.set_major_locator(LogLocator(subs=at))
    axis.set_major_formatter(lambda value, _: f"{times * value:g}{unit}")
    axis.set_minor_locator(NullLocator())

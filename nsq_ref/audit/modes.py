"""The paper's two failure modes: by its ratio, and by what a round trip says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["LAYER_0_RATIO", "SAFE_RATIO", "Mode", "failure_modes"]

LAYER_0_RATIO = 15.0
"""Mode 1: keys of the first layer have an outlier ratio of at least this."""

SAFE_RATIO = 10.0
"""Mode 2: they have less than this, and naive4 degrades all the same."""

STANDS_OUT = 2.0  # times the median of the other layers

CAVEATS = {
    1: (
        "The ratio of 15 rests on one model, Qwen2-7B at 17.2. GPT-J has 18.2 in layer 1 and loses "
        "next to nothing; values had 39.6 (Gemma 4 31B) without harm. What counts is the loss, not "
        "the ratio. Schemes with one scale a channel do not have this failure."
    ),
    2: (
        "The paper explains it by norms that fit poorly into scales of a token. That is no "
        "mechanism: a scale of a token follows every norm, and the codes of nsep4 are those of "
        "naive4. What is told here is the symptom alone."
    ),
}


class Mode(NamedTuple):
    """A failure mode of naive4, and whether these keys have it.

    Attributes
    ----------
    number : {1, 2}
    by_ratio : bool
        Whether the paper's ratio says so.
    by_loss : bool
        Whether the round trip says so.
    words : str
        The verdict, with its figures.
    caveat : str
        Where the mode does not hold in general.
    """

    number: int
    by_ratio: bool
    by_loss: bool
    words: str
    caveat: str

    @property
    def holds(self) -> bool:
        """Whether both say so."""
        return self.by_ratio and self.by_loss

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {**self._asdict(), "holds": self.holds}


def failure_modes(ratio: float, losses: Sequence[float], limit: float) -> list[Mode]:
    """Tell which failure modes these keys have.

    Parameters
    ----------
    ratio : float
        Outlier ratio of the keys of the first layer, of its worst head.
    losses : sequence of float
        What naive4 loses of the keys of each layer, as a policy judges it.
    limit : float
        Beyond it a layer is lost.

    Examples
    --------
    >>> for mode in failure_modes(17.2, [0.9, 0.1, 0.1], 0.25):
    ...     print(mode.number, mode.holds, mode.words)
    1 True holds: the ratio is 17.2, and naive4 loses 90% of this layer, 10% of a usual one
    2 False does not hold: it is for ratios below 10
    >>> failure_modes(18.0, [0.1], 0.25)[0].words
    'the ratio of 18.0 says so, the loss does not: naive4 loses 10% of this layer'
    """
    first, others = losses[0], losses[1:]
    usual = float(np.median(others)) if len(others) else 0.0
    high = ratio >= LAYER_0_RATIO
    broken = first > limit and first >= STANDS_OUT * usual
    said = f"naive4 loses {first:.0%} of this layer"
    if len(others):
        said += f", {usual:.0%} of a usual one"
    if high:
        words = (
            f"holds: the ratio is {ratio:.1f}, and {said}"
            if broken
            else f"the ratio of {ratio:.1f} says so, the loss does not: {said}"
        )
    elif broken:
        words = f"the ratio of {ratio:.1f} does not say so, the loss does: {said}"
    else:
        words = f"does not hold: the ratio is {ratio:.1f}, below {LAYER_0_RATIO:g}, and {said}"
    one = Mode(1, high, broken, words, CAVEATS[1])
    beyond = int(np.sum(np.asarray(losses) > limit))
    many = 2 * beyond >= len(losses)
    lost = f"naive4 loses more than {limit:.0%} in {beyond} of {len(losses)} layers"
    low = ratio < SAFE_RATIO
    if not low:
        words = f"does not hold: it is for ratios below {SAFE_RATIO:g}"
        if many:
            words += f"; {lost} all the same"
    else:
        words = f"{'holds' if many else 'does not hold'}: {lost}, the ratio is {ratio:.1f}"
    return [one, Mode(2, low, many, words, CAVEATS[2])]

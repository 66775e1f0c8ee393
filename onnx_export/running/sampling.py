"""Choosing the next token from the logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nsq_ref.arrays import as_float, as_integer, as_real_array

__all__ = ["Sampling"]

Float64 = NDArray[np.float64]

# Top-p sorts tokens that are so much as likely as the first, then less likely ones, at last all.
FIRST_LOOK, LAST_LOOK = 2.0**-6, 2.0**-60


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; it never changes, so that threads may share one.

    Parameters
    ----------
    temperature : float
        What logits are divided by; 0 takes the most likely token, the first of several.
    top_k : int, optional
        Only from the so many most likely tokens, and those that are as likely as the last of them.
    top_p : float, optional
        Only from the fewest tokens, the most likely first, whose probabilities, after `temperature`
        and `top_k`, add up to so much. Of tokens that are as likely, the first.
    seed : int, optional
        The same seed gives the same tokens; another one every time by default. Each row of a batch
        draws from a stream of its own, which depends on its place alone.

    Raises
    ------
    TypeError, ValueError
        For numbers out of range, and for those that have no effect at temperature 0.

    Examples
    --------
    >>> sampling = Sampling(temperature=0.5, top_p=0.9, seed=3)
    >>> sampling.choose([0.0, 5.0, 4.9], sampling.generators(1)[0]) in (1, 2)
    True
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        temperature = as_float("temperature", self.temperature)
        if not 0 <= temperature < np.inf:
            raise ValueError(f"temperature={temperature} must be finite and at least 0")
        plain: dict[str, object] = {"temperature": temperature}
        for name, least in (("top_k", 1), ("seed", 0)):
            if (value := getattr(self, name)) is not None:
                plain[name] = as_integer(name, value, least=least)
        if self.top_p is not None:
            plain["top_p"] = top_p = as_float("top_p", self.top_p)
            if not 0 < top_p <= 1:
                raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
        for name in ("top_k", "top_p", "seed"):
            if not temperature and name in plain:
                raise ValueError(
                    f"{name} has no effect at temperature 0, which takes the most likely token; "
                    "give a temperature, such as 0.8"
                )
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def generators(self, rows: int) -> list[np.random.Generator]:
        """Return the streams of random numbers of so many rows.

        Examples
        --------
        >>> one, both = Sampling(1.0, seed=5).generators(1), Sampling(1.0, seed=5).generators(2)
        >>> one[0].random() == both[0].random() != both[1].random()
        True
        """
        seeds = np.random.SeedSequence(self.seed).spawn(rows)
        return [np.random.default_rng(seed) for seed in seeds]

    def choose(self, logits: ArrayLike, generator: np.random.Generator) -> int:
        """Return a token, for which one random number is drawn unless the temperature is 0.

        Parameters
        ----------
        logits : array_like of float
            ``[vocab_size]``.
            -infinity for tokens that must not come.
        generator : numpy.random.Generator

        Raises
        ------
        ValueError
            For logits of which none is finite, or one NaN or +infinity.

        Examples
        --------
        >>> Sampling().choose([0.1, 0.7, 0.7], np.random.default_rng())
        1
        """
        if not self.temperature:
            values = np.asarray(logits)
            best = int(values.argmax())  # of NaN, if there is one
            _require_finite(float(values[best]))
            return best
        tokens, probabilities = self.probabilities(logits)
        reached = np.cumsum(probabilities)
        # The largest sum is what the number is scaled by: rounding leaves no token out.
        place = np.searchsorted(reached, generator.random() * reached[-1], side="right")
        return int(tokens[min(int(place), len(tokens) - 1)])

    def probabilities(self, logits: ArrayLike) -> tuple[NDArray[np.int64], Float64]:
        """Return the tokens to choose from, and the probability of each.

        Parameters
        ----------
        logits : array_like of float
            ``[vocab_size]``.

        Returns
        -------
        tokens : numpy.ndarray
            int64 ``[count]``.
        probabilities : numpy.ndarray
            float64 ``[count]``, which add up to 1.

        Raises
        ------
        ValueError
            As `choose`, and at temperature 0, which has none.

        Examples
        --------
        >>> Sampling(1.0, top_k=2).probabilities([0.0, -1.0, 0.0])
        (array([0, 2]), array([0.5, 0.5]))
        """
        if not self.temperature:
            raise ValueError("at temperature 0 there is no chance; give a temperature")
        scores = as_real_array("logits", logits)
        greatest = float(scores.max())
        _require_finite(greatest)
        tokens = None
        if self.top_k is not None and self.top_k < len(scores):
            tokens = np.flatnonzero(scores >= np.partition(scores, -self.top_k)[-self.top_k])
            scores = scores[tokens]
        weights = np.exp((scores - greatest) / self.temperature)
        if self.top_p is not None:
            kept = _nucleus(weights, self.top_p)
            tokens, weights = kept if tokens is None else tokens[kept], weights[kept]
        if tokens is None:
            tokens = np.arange(len(scores))
        return tokens, weights / weights.sum()


def _nucleus(weights: Float64, top_p: float) -> NDArray[np.int64]:
    """Return the fewest weights, the largest first, that have this share of the sum.

    The largest weight is 1. Few are sorted: those above a bound, lowered until they are enough.
    """
    wanted, least = top_p * weights.sum(), FIRST_LOOK
    while True:
        candidates = np.flatnonzero(weights >= least)
        every = len(candidates) == len(weights)
        own = weights[candidates]
        if every or own.sum() >= wanted:
            places = _descending(own)
            reached = np.cumsum(own[places])
            if every or reached[-1] >= wanted:
                return candidates[places[: int(np.searchsorted(reached, wanted)) + 1]]
        least = least / 8 if least > LAST_LOOK else 0.0


def _descending(weights: Float64) -> NDArray[np.int64]:
    """Return the order of weights, the largest first, and of equal ones the first.

    What ``argsort(-weights, kind="stable")`` returns: NumPy's other sort is many times faster, and
    only equal weights are sorted again.
    """
    order = np.argsort(-weights)
    ordered = weights[order]
    same = ordered[1:] == ordered[:-1]
    if same.any():
        tied = np.zeros(len(order), bool)
        tied[1:] = same
        tied[:-1] |= same
        run = np.cumsum(np.concatenate([[False], ~same]))
        places = np.flatnonzero(tied)
        order[places] = order[places][np.lexsort((order[places], run[places]))]
    return order


def _require_finite(greatest: float) -> None:
    if not np.isfinite(greatest):
        raise ValueError(
            f"the greatest of the logits is {greatest}; the model or its cache is damaged"
        )

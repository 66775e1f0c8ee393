"""What is said of logits beside those of the float32 cache, token by token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nsq_ref.dtypes import Float64

__all__ = ["Reference", "Scores"]

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]

ROWS = 32  # that are float64 at a time: a vocabulary may be large
TOP = 5


class Scores(NamedTuple):
    """Figures of each scored token, ``[tokens]``.

    Attributes
    ----------
    kl : numpy.ndarray
        Divergence of the softmax from that of the float32 cache, in nats: the sum over the
        vocabulary of ``p * (log p - log q)``, ``p`` being float32's.
    nll : numpy.ndarray
        ``-log q`` of the token that follows, in nats.
    top1 : numpy.ndarray
        1 where the most likely token is float32's, else 0.
    top5 : numpy.ndarray
        Share of float32's five most likely tokens that are among the five most likely.
    """

    kl: Float64
    nll: Float64
    top1: Float64
    top5: Float64


class Reference:
    """The float32 logits of a passage, computed once for all that is compared with them.

    Parameters
    ----------
    logits : numpy.ndarray
        float32 ``[tokens, vocab_size]``.
    targets : numpy.ndarray
        int64 ``[tokens]``, the token that follows each.

    Examples
    --------
    >>> logits = np.float32([[0, 1, 2, 3, 4, 5]])
    >>> reference = Reference(logits, np.array([5]))
    >>> reference.scores(logits).kl
    array([0.])
    >>> changed = reference.scores(logits[:, ::-1])
    >>> changed.kl.round(4), changed.top1, changed.top5, (changed.nll - reference.nll).round(4)
    (array([3.8659]), array([0.]), array([0.8]), array([5.]))
    """

    def __init__(self, logits: Logits, targets: Ids) -> None:
        self.logits, self.targets = logits, targets
        self._top = _top(logits)
        self.nll = np.concatenate(
            [
                -_log_softmax(logits[rows])[np.arange(len(logits[rows])), targets[rows]]
                for rows in _slices(len(logits))
            ]
        )

    def scores(self, logits: Logits, start: int = 0) -> Scores:
        """Compare logits of the same tokens, or of some from one on.

        Raises
        ------
        ValueError
            Where they are not finite.
        """
        some = slice(start, start + len(logits))
        own, targets = self.logits[some], self.targets[some]
        if logits.shape != own.shape:
            raise ValueError(f"logits have shape {logits.shape}, not {own.shape}")
        kl, nll = np.empty((2, len(logits)))
        for rows in _slices(len(logits)):
            if not np.isfinite(logits[rows]).all():
                raise ValueError("the model's logits are not finite with this cache")
            p, q = _log_softmax(own[rows]), _log_softmax(logits[rows])
            # It is never below 0 but by rounding.
            kl[rows] = np.maximum(np.einsum("tv,tv->t", np.exp(p), p - q), 0)
            nll[rows] = -q[np.arange(len(q)), targets[rows]]
        top, exact = _top(logits), self._top[some]
        shared = (top[:, :, None] == exact[:, None, :]).any(axis=1).mean(axis=1)
        return Scores(kl, nll, (top[:, 0] == exact[:, 0]).astype(np.float64), shared)


def _slices(tokens: int) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, tokens, ROWS)]


def _log_softmax(logits: Logits) -> Float64:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def _top(logits: Logits) -> Ids:
    """Return the most likely tokens, the most likely first; of equal ones, the first of all."""
    count = min(TOP, logits.shape[1])
    found = np.empty((len(logits), count), np.int64)
    for rows in _slices(len(logits)):
        some = logits[rows]
        best = np.sort(np.argpartition(some, -count, axis=1)[:, -count:], axis=1)
        least = np.take_along_axis(some, best, 1).min(axis=1, keepdims=True)
        for row in np.nonzero((some >= least).sum(axis=1) > count)[0]:  # equal ones are left out
            best[row] = np.sort(np.argsort(-some[row], kind="stable")[:count])
        order = np.argsort(-np.take_along_axis(some, best, 1), axis=1, kind="stable")
        found[rows] = np.take_along_axis(best, order, 1)
    return found

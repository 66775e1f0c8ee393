"""The loop: a token is chosen, given out, and read, until something ends the text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nsq_ref.arrays import as_integer, as_integers
from onnx_export.running.sampling import Sampling

__all__ = ["Generated", "as_limits", "collected", "steps"]

Ids = NDArray[np.int64]
Ending = Literal["stop_token", "max_new_tokens", "context_length", "capacity"]

ENDED = -1  # stands for the token of a row that has ended


class Generated(NamedTuple):
    """The text of one row, for any thread.

    ``tokens`` are the new ones only, int64 ``[new_tokens]``, at least one, a stop token included.
    ``ended_by`` says why there are no more: a ``stop_token`` was generated, there are
    ``max_new_tokens``, the model's context is full (``context_length``), or the cache is
    (``capacity``).
    """

    tokens: Ids
    ended_by: Ending


def as_limits(max_new_tokens: Any, stop_tokens: Any) -> tuple[int, frozenset[int]]:
    """Return where a text ends, as Python integers; stop tokens are one, several or None."""
    most = as_integer("max_new_tokens", max_new_tokens, least=1)
    if stop_tokens is None:
        return most, frozenset()
    if not isinstance(stop_tokens, Collection) or np.ndim(stop_tokens) == 0:  # type: ignore[arg-type]
        return most, frozenset([as_integer("stop_tokens", stop_tokens)])
    return most, frozenset(as_integers("stop_tokens", list(stop_tokens)))


def steps(
    read: Callable[[Sequence[Ids]], NDArray[Any]],
    has_room: Callable[[int], bool],
    prompts: Sequence[Ids],
    *,
    skips_rows: bool,
    max_new_tokens: int,
    stop_tokens: frozenset[int],
    sampling: Sampling,
) -> Generator[Ids, None, None]:
    """Yield the next token of every row, -1 for one that has ended, until all have.

    ``read`` gives tokens to the model and returns the logits of the last one of every row,
    ``has_room`` tells whether a row can read one more. The last token of a row is not read.
    """
    generators = sampling.generators(len(prompts))
    active = list(range(len(prompts)))
    last = np.zeros(len(prompts), np.int64)
    logits = read(prompts)
    for count in range(1, max_new_tokens + 1):
        tokens = np.full(len(prompts), ENDED, np.int64)
        for row in active:
            last[row] = tokens[row] = sampling.choose(logits[row, -1], generators[row])
        active = [row for row in active if last[row] not in stop_tokens and has_room(row)]
        if not skips_rows and not all(map(has_room, range(len(prompts)))):
            active = []  # as those that have ended read on with the others
        yield tokens
        if not active or count == max_new_tokens:
            return
        # A model that cannot leave a row out reads its last token again, which nobody looks at.
        logits = read(
            [last[row : row + 1] if row in active or not skips_rows else last[:0]
             for row in range(len(prompts))]
        )  # fmt: skip


def collected(
    tokens: Iterable[Ids], max_new_tokens: int, stop_tokens: frozenset[int], full: Ending
) -> list[Generated]:
    """Return the text of every row; ``full`` is what else may have ended one."""
    texts = np.stack(list(tokens), axis=1)
    results = []
    for row in texts:
        text = row[row != ENDED]
        if int(text[-1]) in stop_tokens:
            results.append(Generated(text, "stop_token"))
        else:
            enough = len(text) == max_new_tokens
            results.append(Generated(text, "max_new_tokens" if enough else full))
    return results

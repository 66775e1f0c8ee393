"""The cases of the operation ``"stream_feedback"``: caches of keys that are sealed under rule F1.

All are drawn: factors are so large that a block that is coded without them, or with those of
another head, has other bytes. Where the range is searched, one factor is tuned, so that sums of
powers of errors are nearly equal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np

from nsq_ref.conformance.cases.encode import FIRST
from nsq_ref.conformance.cases.families import with_sinks
from nsq_ref.conformance.cases.feedback import Made, drawn, searched_otherwise
from nsq_ref.conformance.cases.pools import Draw
from nsq_ref.conformance.mistakes.feedback import SEARCHING
from nsq_ref.conformance.model import APPEND
from nsq_ref.conformance.operations import Case
from nsq_ref.scheme import Scheme

MOST_OUTLIERS = 32  # of a case: more channels make it no better
CODED_CHANNELS = 5
ATTEMPTS = 40  # at a case that shows a mistake

_Steps = Sequence[tuple[int, ...]]  # ``(kind, number of row 0, number of row 1, ...)``


def stream_feedback_cases(scheme: Scheme, seed: int) -> Iterator[Case]:
    """Yield the cases of the operation ``"stream_feedback"``; none without a block size.

    Examples
    --------
    >>> next(stream_feedback_cases(Scheme(block_size=4), 0))
    Case(stream_feedback sealed-feedback/0)
    """
    if scheme.block_size is None:
        return
    head_dim = min(scheme.outlier_channels, MOST_OUTLIERS) + CODED_CHANNELS
    for dtype, first in FIRST.items():
        numbers: dict[str, Iterator[int]] = defaultdict(partial(count, first))
        draw = Draw(seed, f"stream_feedback in {dtype}")
        for flag, row, kv_heads, steps in _histories(scheme.sink_tokens, scheme.block_size):
            appended = np.array([some for kind, *some in steps if kind == APPEND])
            shape = appended.shape[1], int(appended.sum(axis=0).max()), head_dim
            made = drawn(draw, scheme, shape, dtype, kv_heads)
            inputs = {
                "x": made.x,
                "steps": np.array(steps, np.int32),
                "row": np.array([row], np.int32),
                "order": made.order,
                "factor": made.factor,
            }
            name = f"{flag}/{next(numbers[flag])}"
            yield Case(name, "stream_feedback", scheme, (flag,), inputs)
        for made in _searched(scheme, draw, dtype):
            inputs = {
                "x": with_sinks(made.x, scheme)[None],
                "steps": np.array([[APPEND, scheme.sink_tokens + scheme.block_size]], np.int32),
                "row": np.array([0], np.int32),
                "order": made.order,
                "factor": made.factor,
            }
            name = f"feedback-search/{next(numbers['feedback-search'])}"
            yield Case(name, "stream_feedback", scheme, ("feedback-search",), inputs)


def _searched(scheme: Scheme, draw: Draw, dtype: str) -> Iterator[Made]:
    """Yield a block each on which another sum of errors, or other ranges, give other bytes."""
    if scheme.scale_rule == "range" or scheme.axis == "token" or scheme.block_size is None:
        return
    alone = replace(scheme, sink_tokens=0)
    head_dim = min(scheme.outlier_channels, MOST_OUTLIERS) + CODED_CHANNELS
    for mistake in SEARCHING:
        for attempt in range(ATTEMPTS if "stream_feedback" in mistake.operations else 0):
            made = drawn(draw, scheme, (scheme.block_size, head_dim), dtype)
            made.factor[0, :-2, -1] = 0  # errors of others hide tails, which squares cut off
            if attempt % 2:
                last = made.x[:, made.order[0, -1]]
                last[...] = last * last * last
            found = next(searched_otherwise(made, alone, mistake.name), None)
            if found is not None:
                yield found
                break


def _histories(sinks: int, size: int) -> Iterator[tuple[str, int, int, _Steps]]:
    """Yield flag, the row that is asked about, heads of the feedback, and appends and crops."""
    inside = sinks + size + (size + 1) // 2  # in the second block
    whole = sinks + 2 * size
    yield "sealed-feedback", 0, 1, [(0, whole)]
    yield "sealed-feedback", 0, 1, [(0, 1)] * (sinks + size)
    if size > 1:
        yield "sealed-feedback", 0, 1, [(0, sinks + size - 1), (0, 1), (0, 1), (0, size - 1)]
        yield "tail-feedback", 0, 1, [(0, sinks + size - 1)]
        yield "tail-feedback", 0, 1, [(0, inside)]
        yield "cropped-feedback", 0, 1, [(0, whole), (1, inside), (0, size)]
        yield "cropped-feedback", 0, 1, [(0, whole), (1, sinks + 1), (0, size - 1)]
    yield "cropped-feedback", 0, 1, [(0, whole), (1, sinks + size), (0, size)]
    ragged = [(0, size, sinks + size, 1), (0, sinks + size, size, sinks + size)]
    for row in range(3):
        yield "feedback-of-rows", row, 3, ragged
    yield "feedback-of-rows", 2, 1, ragged

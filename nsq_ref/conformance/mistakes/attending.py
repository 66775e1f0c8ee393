"""Wrong attention (rules A1, A2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.conformance.mistakes.changes import ATTEND, Function, around, place
from nsq_ref.conformance.mistakes.reference import Change

_formula = place("model.attend", "A1", ATTEND)
_mask = place("model.attend", "A2", ATTEND)


def _option(**changes: Function) -> Change:
    """Attend with other options, each made from the old value, the query and the keys."""

    def attend(original: Function, query: Any, keys: Any, values: Any, options: Any) -> Any:
        changed = {name: change(options[name], query, keys) for name, change in changes.items()}
        return original(query, keys, values, {**options, **changed})

    return around(attend)


def _heads_in_turn(original: Function, query: Any, keys: Any, values: Any, options: Any) -> Any:
    heads, kv_heads = len(query), len(keys)
    order = np.arange(heads).reshape(-1, kv_heads).T.reshape(-1)
    output = np.empty((*query.shape[:2], values.shape[-1]))
    output[order] = original(query[order], keys, values, options)
    return output


def _seeing(span: Function) -> Change:
    """Let a query at ``position`` see the positions of ``span(position, window, tokens)``."""

    def attend(original: Function, query: Any, keys: Any, values: Any, options: Any) -> Any:
        if not options["causal"]:
            return original(query, keys, values, options)
        tokens, queries = keys.shape[1], query.shape[1]
        plain = {**options, "causal": False, "sliding_window": None}
        output = np.zeros((*query.shape[:2], values.shape[-1]))
        for i in range(queries):
            first, stop = span(tokens - queries + i, options["sliding_window"] or tokens, tokens)
            rows = slice(max(first, 0), stop)
            if rows.start < stop:
                one = query[:, i : i + 1]
                output[:, i : i + 1] = original(one, keys[:, rows], values[:, rows], plain)
        return output

    return around(attend)


def _positions_from_zero(
    original: Function, query: Any, keys: Any, values: Any, options: Any
) -> Any:
    if not options["causal"]:
        return original(query, keys, values, options)
    queries = query.shape[1]
    outputs = []
    for i in range(queries):
        rows = slice(0, i + 1)
        outputs.append(original(query[:, i : i + 1], keys[:, rows], values[:, rows], options))
    return np.concatenate(outputs, axis=1)


ATTENTION = [
    _formula("scale left out", "products are not scaled",
        _option(scale=lambda scale, query, keys: 1.0)),
    _formula("scale without its root", "products are scaled by 1 / D, not by 1 / sqrt(D)",
        _option(scale=lambda scale, query, keys: 1 / query.shape[-1])),
    _formula("scale always 1 / sqrt(D)", "the given scale is ignored",
        _option(scale=lambda scale, query, keys: query.shape[-1] ** -0.5)),
    _formula("softcap left out", "scores are not capped",
        _option(softcap=lambda cap, query, keys: None)),
    _formula("query heads in turn", "query heads are dealt out to key/value heads in turn",
        around(_heads_in_turn)),
    _mask("own position left out", "queries do not see their own position",
        _seeing(lambda position, window, tokens: (position - window + 1, position))),
    _mask("one position too many", "queries see the position behind their own",
        _seeing(lambda position, window, tokens: (
            position - window + 1, min(position + 2, tokens)))),
    _mask("window without the mask", "queries see what comes after them, past a window too",
        _seeing(lambda position, window, tokens: (position - window + 1, tokens))),
    _mask("mask left out", "queries see what comes after them",
        _option(causal=lambda causal, query, keys: False,
                sliding_window=lambda window, query, keys: None)),
    _mask("always causal", "queries do not see what comes after them, though not causal",
        _option(causal=lambda causal, query, keys: True)),
    _mask("queries counted from the start", "query i stands at position i, not among the last",
        around(_positions_from_zero)),
    _mask("window one too long", "the window counts positions besides the query's own",
        _option(sliding_window=lambda window, query, keys: window and window + 1)),
    _mask("window one too short", "the window is one position too short",
        _option(sliding_window=lambda window, query, keys: window and max(window - 1, 1))),
    _mask("window left out", "the sliding window is ignored",
        _option(sliding_window=lambda window, query, keys: None)),
]  # fmt: skip

"""Wrong attention (rules A1, A2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.conformance.mistakes.changes import ATTEND, Function, around, place
from nsq_ref.conformance.mistakes.reference import Change
from nsq_ref.conformance.mistakes.tiles import first_ones, whole_tiles

_formula = place("model.attend", "A1", ATTEND)
_mask = place("model.attend", "A2", ATTEND)
_sides = place("model.decode_sides", "A1", ATTEND)


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


def scores(query: Any, keys: Any, options: Any) -> Any:
    """Return the scores of all queries and keys, minus infinity where a key is not seen."""
    heads, queries = query.shape[:2]
    tokens = keys.shape[1]
    spread = np.repeat(keys, heads // len(keys), axis=0).astype(np.float64)
    found = options["scale"] * (query @ spread.swapaxes(-1, -2))
    if cap := options["softcap"]:
        found = cap * np.tanh(found / cap)
    if options["causal"]:
        behind = tokens - queries + np.arange(queries)[:, None] - np.arange(tokens)
        window = options["sliding_window"] or tokens
        found = np.where((behind >= 0) & (behind < window), found, -np.inf)
    return found


def _weighted(weights: Function) -> Change:
    """Sum values by other weights ``weights(scores)``."""

    def attend(original: Function, query: Any, keys: Any, values: Any, options: Any) -> Any:
        with np.errstate(all="ignore"):
            p = weights(scores(query, keys, options))
            spread = np.repeat(values, len(query) // len(values), axis=0).astype(np.float64)
            return p @ spread

    return around(attend)


def _powers(s: Any) -> Any:
    return np.exp(s - np.max(s, axis=-1, keepdims=True))


def _kept(kept: Function) -> Change:
    """Let later keys have no weight."""

    def weights(s: Any) -> Any:
        p = _powers(np.where(np.arange(s.shape[-1]) < kept(s.shape[-1]), s, -np.inf))
        return np.nan_to_num(p / p.sum(axis=-1, keepdims=True))

    return _weighted(weights)


def _summed_over(most: int) -> Change:
    """Divide by the sum over the first keys."""

    def weights(s: Any) -> Any:
        p = _powers(s)
        total = p[..., :most].sum(axis=-1, keepdims=True)
        return p / np.where(total == 0, np.inf, total)

    return _weighted(weights)


def _tiles_of(tile: int) -> Change:
    """Take each tile's exponentials from the maximum so far, and leave earlier ones as they are."""

    def weights(s: Any) -> Any:
        tokens = s.shape[-1]
        running = np.maximum.accumulate(s, axis=-1)
        ends = np.minimum((np.arange(tokens) // tile + 1) * tile, tokens) - 1
        p = np.where(s == -np.inf, 0, np.exp(s - running[..., ends]))
        return p / p.sum(axis=-1, keepdims=True)

    return _weighted(weights)


def _window_from_tiles_of(tile: int) -> Change:
    """Start a window at the first whole tile that is seen, for all queries."""

    def attend(original: Function, query: Any, keys: Any, values: Any, options: Any) -> Any:
        tokens, queries = keys.shape[1], query.shape[1]
        first = max(tokens - queries + 1 - (options["sliding_window"] or tokens), 0)
        start = -(-first // tile) * tile
        if not options["causal"] or start > tokens - queries:
            return original(query, keys, values, options)
        return original(query, keys[:, start:], values[:, start:], options)

    return around(attend)


def _values_as_wide_as_keys(
    original: Function, query: Any, keys: Any, values: Any, options: Any
) -> Any:
    seen = np.arange(values.shape[-1]) < keys.shape[-1]
    return original(query, keys, np.where(seen, values, 0), options)


def _without_maximum(s: Any) -> Any:
    p = np.exp(s.astype(np.float32))
    return np.nan_to_num((p / p.sum(axis=-1, keepdims=True)).astype(np.float64))


def _in_half(s: Any) -> Any:
    p = _powers(s).astype(np.float16).astype(np.float64)
    return p / p.sum(axis=-1, keepdims=True)


def _with_part_of_keys(name: str) -> Change:
    def decode_sides(original: Function, keys: Any, values: Any) -> Any:
        parts, *rest = values
        if name not in keys[0] or name not in parts:
            return original(keys, values)
        return original(keys, ({**parts, name: np.resize(keys[0][name], parts[name].shape)}, *rest))

    return around(decode_sides)


def _by_the_scheme_of_keys(original: Function, keys: Any, values: Any) -> Any:
    scheme = keys[2]
    parts, shape, own = values
    if (own.bits, own.axis, own.block_size) != (scheme.bits, scheme.axis, scheme.block_size):
        return original(keys, values)  # what is read then is nothing that can be computed
    read = {name: part for name, part in parts.items() if name != "zero" or not scheme.symmetric}
    return original(keys, (read, shape, scheme))


ATTENTION = [
    *(_formula(f"keys past {n} ignored", f"keys past the first {n} have no weight",
          _kept(first_ones(n))) for n in (16, 32, 64, 128, 256)),
    *(_formula(f"last partial tile of {n} keys ignored",
          f"keys behind whole tiles of {n} have no weight",
          _kept(whole_tiles(n))) for n in (16, 32, 64, 128)),
    *(_formula(f"softmax summed over {n} keys",
          f"weights are divided by the sum over the first {n}",
          _summed_over(n)) for n in (16, 32, 64, 128, 256)),
    *(_formula(f"tiles of {n} keys not rescaled",
          f"sums over tiles of {n} keys are not rescaled when the maximum grows",
          _tiles_of(n)) for n in (16, 32, 64, 128)),
    _formula("maximum not subtracted", "exponentials overflow: subtract the maximum first",
        _weighted(_without_maximum)),
    _formula("weights in float16", "exponentials are float16; they are to be float32",
        _weighted(_in_half)),
    _formula("scale left out", "products are not scaled",
        _option(scale=lambda scale, query, keys: 1.0)),
    _formula("scale without its root", "products are scaled by 1 / D, not by 1 / sqrt(D)",
        _option(scale=lambda scale, query, keys: 1 / query.shape[-1])),
    _formula("scale always 1 / sqrt(D)", "the given scale is ignored",
        _option(scale=lambda scale, query, keys: query.shape[-1] ** -0.5)),
    _formula("softcap left out", "scores are not capped",
        _option(softcap=lambda cap, query, keys: None)),
    _formula("values no wider than keys",
        "channels of values past those of keys are 0",
        around(_values_as_wide_as_keys)),
    _sides("values read with the keys' scheme",
        "values are decoded by the scheme of keys; they have their own",
        around(_by_the_scheme_of_keys)),
    _sides("values read with the keys' scales", "values are decoded with the scales of keys",
        _with_part_of_keys("scale")),
    _sides("values read with the keys' norms", "values are decoded with the norms of keys",
        _with_part_of_keys("norm")),
    *(_mask(f"window from whole tiles of {n}",
          f"what a window sees before a whole tile of {n} keys is left out",
          _window_from_tiles_of(n)) for n in (16, 32, 64)),
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

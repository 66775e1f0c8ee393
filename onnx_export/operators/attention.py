"""nsq.Attention in standard operators: append to a quantized cache, seal full blocks, attend.

Tokens are counted from the first of their sequence, sinks among them: position 0. All arithmetic is
float32, whatever the model's dtype is; tensors of that dtype are widened, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from nsq_ref.extras import extra
from onnx_export.operators.cache_body import (
    LARGEST_INDEX,
    NOTHING,
    Cache,
    Lengths,
    Span,
    count,
    joined,
    optional,
    widened,
)
from onnx_export.operators.cache_rebuilt import Rebuilt
from onnx_export.operators.cache_scattered import Scattered, within_capacity
from onnx_export.operators.nodes import Nodes, built_once, make_function
from onnx_export.operators.schema import ATTENTION, OPSET

with extra("onnx", __name__):
    import onnx

__all__ = ["attention"]

SCATTER_OPSET = 24  # the first with TensorScatter


@built_once
def attention(opset: int = OPSET, always: frozenset[str] = frozenset()) -> onnx.FunctionProto:
    """Return ``nsq.Attention``, in standard operators of an opset that is at least 21.

    From opset 24 on the cache is appended to in place where its memory is bound so, and attended to
    as it is stored; before, it is made anew and decoded at every step. Both store the same.
    Parts of the cache that a node may leave out are copied all the same, as a body cannot hand
    what may be absent to TensorScatter; those of the names ``always`` are not, and may not be.

    It calls nsq.Quantize and nsq.Dequantize. An input that does not fit ends in an error of some
    operator, as does a length beyond the capacity; keys, values and blocks that rules I2, N1, M4,
    S5 and D3 refuse are not told.

    Examples
    --------
    >>> body = attention()
    >>> body.name, body.input[:3], len(body.output)
    ('Attention', ['query', 'key', 'value'], 14)
    """
    add = Nodes()
    heads, kv_heads = (
        add("Unsqueeze", add.attribute(name, "int"), [0]) for name in ("heads", "kv_heads")
    )
    query, key, value = _heads(add, heads, kv_heads)
    tokens = add("Shape", query, start=2, end=3)
    lengths, real, positions = _lengths(add, tokens)
    query, key = _rotary(add, query, key, real, positions)
    scatters = opset >= SCATTER_OPSET
    if scatters:
        lengths = within_capacity(add, lengths)
    span = _span(add, lengths)
    cache: Callable[..., Cache] = partial(Scattered, always=always) if scatters else Rebuilt
    keys, values = (
        cache(add, side, new, lengths, span) for side, new in (("key", key), ("value", value))
    )
    seen = _seen(add, span.positions(add), lengths, real, positions)
    scores = _scores(add, query, keys, kv_heads, span)
    weights = _weights(add, scores, seen, heads)
    _output(add, weights, values, kv_heads)
    add("Identity", lengths.present, name="present_lengths")
    return make_function(ATTENTION, add, opset)


# --- the new tokens ------------------------------------------------------------------------------


def _heads(add: Nodes, heads: str, kv_heads: str) -> list[str]:
    """Return query, key and value as float32 [B, heads, S, D], also where they come in one."""
    width = add("Shape", "query", start=2)
    pairs = add("Mul", kv_heads, 2)
    own = add("Div", add("Mul", width, heads), add("Add", heads, pairs))
    end = optional(add, "key", lambda _: width, lambda _: own, "int64")
    middle = add("Div", add("Add", end, width), 2)
    parts = [add("Slice", "query", [0], end, [2])]
    for name, start, stop in (("key", end, middle), ("value", middle, width)):

        def separate(add: Nodes, name: str = name) -> str:
            return add.cast(joined(add, name, "query", 2), "float32")

        def together(add: Nodes, start: str = start, stop: str = stop) -> str:
            return add.cast(add("Slice", "query", start, stop, [2]), "float32")

        parts.append(optional(add, name, separate, together))
    split = []
    for part, number in zip(parts, (heads, kv_heads, kv_heads), strict=True):
        shape = add("Concat", [0, 0], number, [-1], axis=0)
        by_head = add("Reshape", add.cast(part, "float32"), shape)
        split.append(add("Transpose", by_head, perm=[0, 2, 1, 3]))
    return split


def _lengths(add: Nodes, tokens: str) -> tuple[Lengths, str, str]:
    """Return the lengths, which new tokens are no padding, and their positions, [B, S] both."""
    new = optional(
        add,
        "new_lengths",
        lambda add: joined(add, "new_lengths", "past_lengths", 0),
        lambda add: add("Expand", tokens, add("Shape", "past_lengths")),
        "int64",
    )
    lengths = Lengths("past_lengths", new, add("Add", "past_lengths", new))
    index = count(add, tokens)
    real = add("Less", index, add("Unsqueeze", new, [1]))
    return lengths, real, add("Add", add("Unsqueeze", "past_lengths", [1]), index)


def _span(add: Nodes, lengths: Lengths) -> Span:
    """Return the positions that the new queries may see: with a window not those before all."""
    # At least one token, so that no axis is empty: it is masked.
    end = add("Max", add("ReduceMax", lengths.present, keepdims=0), 1)
    window = add.attribute("sliding_window", "int")

    def first_in_window(add: Nodes) -> str:
        last = add("Sub", end, 1)
        has_queries = add("Greater", lengths.new, 0)
        first_query = add("ReduceMin", add("Where", has_queries, lengths.past, last), keepdims=0)
        return add("Max", add("Add", add("Sub", first_query, window), 1), 0)

    unlimited = add("Equal", window, 0)
    first = add.choose(unlimited, lambda add: add.constant(0), first_in_window, "int64")
    return Span(first, end)


def _rotary(add: Nodes, query: str, key: str, real: str, positions: str) -> list[str]:
    """Rotate query and key where the function has cos and sin."""
    ids = optional(
        add,
        "position_ids",
        lambda add: joined(add, "position_ids", positions, 1),
        lambda _: positions,
        "int64",
    )
    known = add("Where", real, ids, 0)
    interleaved = add.cast(add.attribute("rotary_interleaved", "int"), "bool")

    def rotated(add: Nodes) -> list[str]:
        cos, sin = (
            add("Unsqueeze", add("Gather", widened(add, name), known), [1])
            for name in ("cos", "sin")
        )
        half = add("Squeeze", add("Shape", cos, start=3))
        count = add("Add", half, half)
        pair = add("Range", 0, half, 1)
        channel = add("Range", 0, count, 1)
        even = add("Mul", pair, 2)
        first = add("Where", interleaved, even, pair)
        second = add("Where", interleaved, add("Add", even, 1), add("Add", pair, half))
        # Where each channel is, once first and second ones are apart.
        found = add("Add", add("Mul", add("Mod", channel, 2), half), add("Div", channel, 2))
        found = add("Where", interleaved, found, channel)
        results = []
        for x in (query, key):
            a, b = (add("Gather", x, index, axis=3) for index in (first, second))
            turned = add(
                "Concat",
                add("Sub", add("Mul", a, cos), add("Mul", b, sin)),
                add("Add", add("Mul", b, cos), add("Mul", a, sin)),
                axis=3,
            )
            narrowed = add.cast(add("CastLike", turned, "query"), "float32")
            rest = add("Slice", x, add("Unsqueeze", count, [0]), [LARGEST_INDEX], [3])
            results.append(add("Concat", add("Gather", narrowed, found, axis=3), rest, axis=3))
        return results

    present = add("OptionalHasElement", "cos")
    return add.choose_several(present, rotated, lambda _: [query, key], ["float32", "float32"])


# --- attention -----------------------------------------------------------------------------------


def _seen(add: Nodes, token: str, lengths: Lengths, real: str, positions: str) -> str:
    """Return which tokens a query sees, [B, 1, S, tokens] (A2); padding sees nothing."""
    token = add("Unsqueeze", token, [1])
    at = add("Unsqueeze", positions, [2])
    inside = add("Less", token, add("Unsqueeze", lengths.present, [1, 2]))
    inside = add("And", inside, add("Unsqueeze", real, [2]))
    anything = add("Equal", add.attribute("causal", "int"), 0)
    not_later = add("Or", anything, add("LessOrEqual", token, at))
    window = add.attribute("sliding_window", "int")
    not_earlier = add("Or", add("Equal", window, 0), add("Less", add("Sub", at, token), window))
    return add("Unsqueeze", add("And", inside, add("And", not_later, not_earlier)), [1])


def _scores(add: Nodes, query: str, keys: Cache, kv_heads: str, span: Span) -> str:
    """Return the scores before the mask, [B, heads, S, tokens] (A1)."""
    shape = add("Shape", query)
    given = add.attribute("scale", "float")
    channels = add.cast(add("Squeeze", add("Shape", query, start=3)), "float32")
    usual = add("Div", np.float32(1), add("Sqrt", channels))
    scaled = add("Mul", query, add("Where", add("Equal", given, np.float32(0)), usual, given))
    # The query heads of one key/value head are as many more queries.
    grouped = add("Concat", [0], kv_heads, [-1], add("Shape", query, start=3), axis=0)
    products = keys.products(add, add("Reshape", scaled, grouped))
    count = add("Unsqueeze", add("Sub", span.end, span.first), [0])
    scores = add("Reshape", products, add("Concat", add("Slice", shape, [0], [3]), count, axis=0))
    softcap = add.attribute("softcap", "float")

    def capped(add: Nodes) -> str:
        return add("Mul", add("Tanh", add("Div", scores, softcap)), softcap)

    scores = add.choose(add("Equal", softcap, np.float32(0)), lambda _: scores, capped)

    def biased(add: Nodes) -> str:
        bias = widened(add, "attention_bias")
        first, end = (add("Unsqueeze", one, [0]) for one in span)
        own = add("Slice", bias, first, end, [3])
        return add("Add", scores, own)

    return optional(add, "attention_bias", biased, lambda _: scores)


def _weights(add: Nodes, scores: str, seen: str, heads: str) -> str:
    """Return the softmax over what is seen, a sink of each head in its denominator."""
    # A decode step of rows of one length, without a window, sees everything.
    everything = add("ReduceMin", add.cast(seen, "int32"), keepdims=0)
    scores = add.choose(
        add.cast(everything, "bool"),
        lambda _: scores,
        lambda add: add("Where", seen, scores, NOTHING),
    )
    most = add("ReduceMax", scores, [3])
    weights = add("Softmax", scores)

    def beside(add: Nodes, sink: str) -> str:
        # The largest weight is 1 over the sum of exponentials without the sink.
        distance = add("Sub", add("Unsqueeze", sink, [0, 2, 3]), most)
        own = add("Mul", add("Exp", distance), add("ReduceMax", weights, [3]))
        return add("Div", weights, add("Add", own, np.float32(1)))

    def beside_nothing(add: Nodes) -> str:
        smooth = add.cast(add.attribute("smooth_softmax", "int"), "bool")
        zero = add("Expand", np.float32(0), heads)
        return add.choose(smooth, lambda add: beside(add, zero), lambda _: weights)

    weights = optional(
        add, "head_sink", lambda add: beside(add, widened(add, "head_sink")), beside_nothing
    )
    # A query that sees nothing has no weights.
    blind = add("Equal", most, NOTHING)
    any_blind = add("ReduceMax", add.cast(blind, "int32"), keepdims=0)
    return add.choose(
        add.cast(any_blind, "bool"),
        lambda add: add("Where", blind, np.float32(0), weights),
        lambda _: weights,
    )


def _output(add: Nodes, weights: str, values: Cache, kv_heads: str) -> None:
    """Add the values up, [B, S, heads * D_v]."""
    tokens = add("Shape", weights, start=3)
    grouped = add("Reshape", weights, add("Concat", [0], kv_heads, [-1], tokens, axis=0))
    mixed = values.mixed(add, grouped)
    shape = add("Concat", add("Shape", weights, end=3), [-1], axis=0)
    by_token = add("Transpose", add("Reshape", mixed, shape), perm=[0, 2, 1, 3])
    add("CastLike", add("Reshape", by_token, [0, 0, -1]), "query", name="output")

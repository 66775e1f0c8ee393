"""nsq.Attention in standard operators: append to a quantized cache, seal full blocks, attend.

Tokens are counted from the first of their sequence, sinks among them: position 0. All arithmetic is
float32, whatever the model's dtype is; tensors of that dtype are widened, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nsq_ref.extras import extra
from onnx_export.operators.nodes import Nodes, Reference, built_once, make_function
from onnx_export.operators.schema import ATTENTION, DEQUANTIZE, OPSET, QUANTIZE

with extra("onnx", __name__):
    import onnx

__all__ = ["attention"]

LARGEST_INDEX = np.iinfo(np.int64).max
NOTHING = np.float32(-np.inf)  # the logarithm of a weight of 0


class Lengths(NamedTuple):
    """Tokens of each row, int64 [B]: before the append, of the append, and after it."""

    past: str
    new: str
    present: str


class Side(NamedTuple):
    """Keys or values after the append, decoded: float32 [B, kv_heads, n, D].

    Their tokens are all sinks, all sealed ones that there is room for, and a tail.
    """

    tokens: str
    first_free: str  # [B, 1]: where sealed tokens end
    first_tail: str  # where the tail begins


@built_once
def attention(opset: int = OPSET) -> onnx.FunctionProto:
    """Return ``nsq.Attention``, in standard operators of an opset that is at least 21.

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
    keys = _append(add, "key", key, lengths)
    values = _append(add, "value", value, lengths)
    # At least one token, so that no axis is empty: it is masked.
    longest = add("Max", add("ReduceMax", lengths.present, keepdims=0), 1)
    token = _count(add, longest)
    seen = _seen(add, token, lengths, real, positions)
    keys_by_position, values_by_position = (
        _by_position(add, side, token, lengths) for side in (keys, values)
    )
    scores = _scores(add, query, keys_by_position, kv_heads, longest)
    weights = _weights(add, scores, seen, heads)
    _output(add, weights, values_by_position, kv_heads)
    add("Identity", lengths.present, name="present_lengths")
    return make_function(ATTENTION, add, opset)


# --- what may be absent --------------------------------------------------------------------------


def _optional(
    add: Nodes,
    name: str,
    then: Callable[[Nodes], str],
    otherwise: Callable[[Nodes], str],
    dtype: str = "float32",
) -> str:
    """Choose by whether the function has an input.

    Where it has not, ``then`` is not computed, but must pass the checks of ONNX, which take the
    name of an absent tensor only as an input of an operator with any number of inputs, and not as
    the first: begin with `_joined` or `_widened`. Its other inputs must be no constants, or the
    runtime computes it beforehand. The same holds where attributes say that there is an input.
    """
    return add.choose(add("OptionalHasElement", name), then, otherwise, dtype)


def _joined(add: Nodes, name: str, like: str, axis: int) -> str:
    """Return an input of the function, for `_optional`; ``like`` has its dtype and other axes."""
    return add("Concat", add("Slice", like, [0], [0], [axis]), name, axis=axis)


def _widened(add: Nodes, name: str) -> str:
    """Return an input of the model's dtype as float32, for `_optional`."""
    data = add.cast(add("ReduceMax", "past_lengths", keepdims=0), "float32")
    least = add("Sub", NOTHING, add("Mul", data, np.float32(0)))
    return add.cast(add("Max", add("CastLike", least, "query"), name), "float32")


# --- the new tokens ------------------------------------------------------------------------------


def _heads(add: Nodes, heads: str, kv_heads: str) -> list[str]:
    """Return query, key and value as float32 [B, heads, S, D], also where they come in one."""
    width = add("Shape", "query", start=2)
    pairs = add("Mul", kv_heads, 2)
    own = add("Div", add("Mul", width, heads), add("Add", heads, pairs))
    end = _optional(add, "key", lambda _: width, lambda _: own, "int64")
    middle = add("Div", add("Add", end, width), 2)
    parts = [add("Slice", "query", [0], end, [2])]
    for name, start, stop in (("key", end, middle), ("value", middle, width)):

        def separate(add: Nodes, name: str = name) -> str:
            return add.cast(_joined(add, name, "query", 2), "float32")

        def together(add: Nodes, start: str = start, stop: str = stop) -> str:
            return add.cast(add("Slice", "query", start, stop, [2]), "float32")

        parts.append(_optional(add, name, separate, together))
    split = []
    for part, count in zip(parts, (heads, kv_heads, kv_heads), strict=True):
        shape = add("Concat", [0, 0], count, [-1], axis=0)
        by_head = add("Reshape", add.cast(part, "float32"), shape)
        split.append(add("Transpose", by_head, perm=[0, 2, 1, 3]))
    return split


def _lengths(add: Nodes, tokens: str) -> tuple[Lengths, str, str]:
    """Return the lengths, which new tokens are no padding, and their positions, [B, S] both."""
    new = _optional(
        add,
        "new_lengths",
        lambda add: _joined(add, "new_lengths", "past_lengths", 0),
        lambda add: add("Expand", tokens, add("Shape", "past_lengths")),
        "int64",
    )
    lengths = Lengths("past_lengths", new, add("Add", "past_lengths", new))
    index = _count(add, tokens)
    real = add("Less", index, add("Unsqueeze", new, [1]))
    return lengths, real, add("Add", add("Unsqueeze", "past_lengths", [1]), index)


def _rotary(add: Nodes, query: str, key: str, real: str, positions: str) -> list[str]:
    """Rotate query and key where the function has cos and sin."""
    ids = _optional(
        add,
        "position_ids",
        lambda add: _joined(add, "position_ids", positions, 1),
        lambda _: positions,
        "int64",
    )
    known = add("Where", real, ids, 0)
    interleaved = add.cast(add.attribute("rotary_interleaved", "int"), "bool")

    def rotated(add: Nodes) -> list[str]:
        cos, sin = (
            add("Unsqueeze", add("Gather", _widened(add, name), known), [1])
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


# --- the cache -----------------------------------------------------------------------------------


def _append(add: Nodes, side: str, new: str, lengths: Lengths) -> Side:
    """Append float32 ``new[B, kv_heads, S, D]``, of which some is padding, to keys or values."""
    packed, past_sinks, past_tail = (f"past_{side}_{part}" for part in ("packed", "sinks", "tail"))
    block = add("Unsqueeze", add.attribute(f"{side}_block_size", "int"), [0])
    sinks = add("Unsqueeze", add.attribute(f"{side}_sink_tokens", "int"), [0])
    capacity = add("Div", add("Shape", packed, start=2, end=3), block)

    # Sealed blocks of each row, [B, 1]; beyond the capacity the index is, and the runtime tells.
    places = add("Range", 0, add("Squeeze", add("Add", capacity, 1)), 1)
    before, after = (add("Unsqueeze", one, [1]) for one in (lengths.past, lengths.present))
    sealed_before, sealed = (
        add("Gather", places, add("Div", add("Max", add("Sub", length, sinks), 0), block))
        for length in (before, after)
    )
    first_tail_before, first_tail = (
        add("Add", add("Mul", count, block), sinks) for count in (sealed_before, sealed)
    )

    # All tokens that are not sealed yet: the sinks, the tail, the new ones.
    old_sinks = add.choose(
        add("Greater", add("Squeeze", sinks), 0),
        lambda add: add.cast(_joined(add, past_sinks, past_tail, 2), "float32"),
        lambda add: add("Slice", new, [0], [0], [2]),
    )
    plain = add("Concat", old_sinks, add.cast(past_tail, "float32"), new, axis=2)

    def plain_tokens(position: str) -> str:
        """Take tokens by position[B, n]: [B, kv_heads, n, D]; 0 behind the last."""
        is_new = add("GreaterOrEqual", position, before)
        from_new = add("Add", add("Add", sinks, block), add("Sub", position, before))
        from_tail = add("Add", sinks, add("Sub", position, first_tail_before))
        old = add("Where", add("Less", position, sinks), position, from_tail)
        return _take_valid(add, plain, add("Where", is_new, from_new, old), position, after)

    # Not 0 + these: onnxruntime 1.22 drops the addition of a constant without elements.
    first = add("Expand", _count(add, sinks), add("Shape", before))
    present_sinks = plain_tokens(first)
    add("CastLike", present_sinks, past_tail, name=f"present_{side}_sinks")
    tail = plain_tokens(add("Add", first_tail, _count(add, block)))
    add("CastLike", tail, past_tail, name=f"present_{side}_tail")

    # The blocks that may be full now, from the one that the tail was.
    most = add("Div", add("Sub", add("Add", add("Shape", new, start=2, end=3), block), 1), block)
    from_tail = _count(add, add("Mul", most, block))
    candidates = plain_tokens(add("Add", first_tail_before, from_tail))
    shape = add("Concat", [0, 0], most, block, add("Shape", new, start=3), axis=0)
    blocks = add("Reshape", candidates, shape)
    parts = _seal(add, side, blocks, capacity, sealed_before, sealed)
    decoded = _decode(add, side, parts, block, add("Squeeze", add("Shape", new, start=3)))
    tokens = add("Concat", present_sinks, decoded, tail, axis=2)
    return Side(tokens, first_tail, add("Add", sinks, add("Mul", capacity, block)))


def _seal(
    add: Nodes, side: str, blocks: str, capacity: str, sealed_before: str, sealed: str
) -> dict[str, str]:
    """Code ``blocks[B, kv_heads, n, block_size, D]``, and store those that are full.

    Returns packed, scale, norm and zero as [B, kv_heads, capacity, all of a block]; what is behind
    the sealed blocks is 0, and so is what the scheme does not store.
    """
    past = {part: f"past_{side}_{part}" for part in ("packed", "scale", "norm", "zero")}
    # The runtime wants all outputs of a function; nothing else is stored of blocks without sinks.
    coded = {part: f"new_{side}_{part}" for part in past}
    add.call(QUANTIZE, {"x": blocks}, coded, **_of_a_block(side))

    # Which blocks of each row are new, and where among the candidates they are: [B, capacity].
    index = _count(add, capacity)
    is_new = add("And", add("Less", index, sealed), add("GreaterOrEqual", index, sealed_before))
    source = add("Where", is_new, add("Sub", index, sealed_before), 0)
    changed = add("Unsqueeze", is_new, [1, 3])
    kept = add("Unsqueeze", add("Less", index, sealed_before), [1, 3])

    norm_dtype = Reference(f"{side}_norm_dtype", "int")

    def stored(add: Nodes, part: str, old: str, nothing: object) -> str:
        by_block = add("Concat", [0, 0], capacity, [-1], axis=0)
        fresh = add(
            "Reshape", coded[part], add("Concat", add("Shape", blocks, end=3), [-1], axis=0)
        )
        cleared = add("Where", kept, add("Reshape", old, by_block), nothing)
        return add("Where", changed, _take(add, fresh, source), cleared)

    def norms(add: Nodes) -> str:
        first = add("Squeeze", add("Slice", past["packed"], [0], [1], [3]), [3])
        typed = add.cast(first, norm_dtype)
        old = add.cast(_joined(add, past["norm"], typed, 2), "float32")
        return stored(add, "norm", old, np.float32(0))

    def zeros(add: Nodes) -> str:
        old = add.cast(_joined(add, past["zero"], past["scale"], 2), "float32")
        return stored(add, "zero", old, np.float32(0))

    packed = stored(add, "packed", past["packed"], np.uint8(0))
    scale = stored(add, "scale", add.cast(past["scale"], "float32"), np.float32(0))
    tokens = add(
        "Concat", add("Shape", packed, end=3), add("Shape", blocks, start=3, end=4), axis=0
    )
    # By attributes: OptionalHasElement does not take bfloat16.
    has_norm = add("Equal", add.attribute(f"{side}_separate_norm", "int"), 1)
    has_zero = add("Equal", add.attribute(f"{side}_symmetric", "int"), 0)
    norm = add.choose(has_norm, norms, lambda add: add("Expand", np.float32(0), tokens))
    zero = add.choose(has_zero, zeros, lambda add: add("Mul", scale, np.float32(0)))
    for part, value, like in (
        ("packed", packed, "packed"),
        ("scale", scale, "scale"),
        ("zero", zero, "scale"),
    ):
        flat = add("Reshape", value, add("Shape", past[like]))
        add("CastLike", flat, past[like], name=f"present_{side}_{part}")
    flat = add("Reshape", norm, add("Shape", past["packed"], end=3))
    add.cast(flat, norm_dtype, name=f"present_{side}_norm")
    return {"packed": packed, "scale": scale, "norm": norm, "zero": zero}


def _decode(add: Nodes, side: str, parts: dict[str, str], block: str, head_dim: str) -> str:
    """Decode what `_seal` returned, [B, kv_heads, capacity * block_size, D]."""
    rows = add("Concat", [0, 0, 0], block, [-1], axis=0)
    by_token = add.is_one_of(f"{side}_axis", ["token"])[0]
    # A scale has one row a block, or one number a token.
    scales = add("Where", by_token, rows, [0, 0, 0, 1, -1])
    inputs = {
        "packed": add("Reshape", parts["packed"], rows),
        "scale": add("Reshape", parts["scale"], scales),
        "norm": parts["norm"],
        "zero": add("Reshape", parts["zero"], scales),
        "head_dim": head_dim,
    }
    decoded = f"decoded_{side}"
    add.call(DEQUANTIZE, inputs, {"x_hat": decoded}, **_of_a_block(side))
    flat = add("Concat", [0, 0, -1], add("Unsqueeze", head_dim, [0]), axis=0)
    return add("Reshape", decoded, flat)


def _count(add: Nodes, number: str) -> str:
    """Return [1, number]: 0, 1, 2 and so on."""
    return add("Unsqueeze", add("Range", 0, add("Squeeze", number), 1), [0])


def _take_valid(add: Nodes, x: str, index: str, position: str, length: str) -> str:
    """Pick tokens of each row, as `_take`; 0 for positions [B, m] from ``length[B, 1]`` on."""
    valid = add("Less", position, length)
    taken = _take(add, x, add("Where", valid, index, 0))
    return add("Where", add("Unsqueeze", valid, [1, 3]), taken, np.float32(0))


def _take(add: Nodes, x: str, index: str) -> str:
    """Pick tokens ``index[B, m]`` of each row of ``x[B, kv_heads, n, D]``."""
    by_token = add("Transpose", x, perm=[0, 2, 1, 3])
    taken = add("GatherND", by_token, add("Unsqueeze", index, [2]), batch_dims=1)
    return add("Transpose", taken, perm=[0, 2, 1, 3])


def _of_a_block(side: str) -> dict[str, Any]:
    """Return the scheme of keys or values: for the tokens of one block, without sinks."""
    of_side = {
        name: Reference(f"{side}_{name}", "string" if isinstance(default, str) else "int")
        for name, default in QUANTIZE.attributes.items()
    }
    return of_side | {"block_size": 0, "sink_tokens": 0, "outlier_channels": 0}


# --- attention -----------------------------------------------------------------------------------


def _by_position(add: Nodes, side: Side, token: str, lengths: Lengths) -> str:
    """Bring the tokens in the order of the sequence; 0 behind the last."""
    from_tail = add("Add", side.first_tail, add("Sub", token, side.first_free))
    index = add("Where", add("Less", token, side.first_free), token, from_tail)
    return _take_valid(add, side.tokens, index, token, add("Unsqueeze", lengths.present, [1]))


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


def _scores(add: Nodes, query: str, keys: str, kv_heads: str, longest: str) -> str:
    """Return the scores before the mask, [B, heads, S, tokens] (A1)."""
    shape = add("Shape", query)
    given = add.attribute("scale", "float")
    channels = add.cast(add("Squeeze", add("Shape", query, start=3)), "float32")
    usual = add("Div", np.float32(1), add("Sqrt", channels))
    scale = add("Where", add("Equal", given, np.float32(0)), usual, given)
    # The query heads of one key/value head are as many more queries.
    grouped = add("Concat", [0], kv_heads, [-1], add("Shape", query, start=3), axis=0)
    products = add(
        "MatMul", add("Reshape", query, grouped), add("Transpose", keys, perm=[0, 1, 3, 2])
    )
    rows = add("Concat", add("Slice", shape, [0], [3]), add("Unsqueeze", longest, [0]), axis=0)
    scores = add("Mul", add("Reshape", products, rows), scale)
    softcap = add.attribute("softcap", "float")
    without = add("Equal", softcap, np.float32(0))
    divisor = add("Where", without, np.float32(1), softcap)
    capped = add("Mul", add("Tanh", add("Div", scores, divisor)), softcap)
    scores = add("Where", without, scores, capped)

    def biased(add: Nodes) -> str:
        bias = _widened(add, "attention_bias")
        own = add("Slice", bias, [0], add("Unsqueeze", longest, [0]), [3])
        return add("Add", scores, own)

    return _optional(add, "attention_bias", biased, lambda _: scores)


def _weights(add: Nodes, scores: str, seen: str, heads: str) -> str:
    """Return the softmax over what is seen, a sink of each head in its denominator."""
    smooth = add.cast(add.attribute("smooth_softmax", "int"), "bool")
    usual = add("Expand", add("Where", smooth, np.float32(0), NOTHING), heads)
    sink = _optional(add, "head_sink", lambda add: _widened(add, "head_sink"), lambda _: usual)
    sink = add("Unsqueeze", sink, [0, 2, 3])
    scores = add("Where", seen, scores, NOTHING)
    most = add("Max", add("ReduceMax", scores, [3]), sink)
    most = add("Where", add("Equal", most, NOTHING), np.float32(0), most)
    raised = add("Exp", add("Sub", scores, most))
    total = add("Add", add("ReduceSum", raised, [3]), add("Exp", add("Sub", sink, most)))
    # A query that sees nothing has no weights.
    total = add("Where", add("Equal", total, np.float32(0)), np.float32(1), total)
    return add("Div", raised, total)


def _output(add: Nodes, weights: str, values: str, kv_heads: str) -> None:
    """Add the values up, [B, S, heads * D_v]."""
    tokens = add("Shape", weights, start=3)
    grouped = add("Reshape", weights, add("Concat", [0], kv_heads, [-1], tokens, axis=0))
    mixed = add("MatMul", grouped, values)
    shape = add("Concat", add("Shape", weights, end=3), [-1], axis=0)
    by_token = add("Transpose", add("Reshape", mixed, shape), perm=[0, 2, 1, 3])
    add("CastLike", add("Reshape", by_token, [0, 0, -1]), "query", name="output")

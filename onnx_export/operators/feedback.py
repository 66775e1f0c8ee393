"""Feedback (F1) in standard operators: what is coded in place of directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnx_export.operators.cache_body import optional
from onnx_export.operators.nodes import Nodes
from onnx_export.operators.rounding import narrow
from onnx_export.operators.schema import ELEMENTS

__all__ = ["fed_back"]

INFINITY = np.float32(np.inf)
LAST = np.iinfo(np.int64).max


def fed_back(
    add: Nodes,
    direction: str,
    norm: str,
    scale: str,
    zero: str,
    coded: str,
    stored: Callable[[Nodes, str, str, str], str],
) -> str:
    """Return what is coded in place of ``direction[..., blocks, n, D]``, of that shape.

    That is itself where the function has no inputs ``order`` and ``factor``. ``scale``, ``zero``
    and ``coded`` broadcast to it; ``norm`` is [..., blocks, n]. Of a builder, values, scales and
    zeros ``stored`` makes what they decode to (Q1, Q2, D1).

    Examples
    --------
    >>> fed_back(Nodes(), "x", "norm", "scale", "zero", "coded", lambda add, w, *_: w)
    'chosen_1_0'
    """

    def moved(add: Nodes) -> str:
        channels = add("Shape", direction, start=-1)
        nothing = add("Slice", direction, [0], [0], [-2])

        def given(name: str, dtype: str, axes: Sequence[str]) -> str:
            shape = add("Concat", [0], *axes, axis=0)
            empty = add("Reshape", nothing, shape, allowzero=1)
            return add("Concat", add.cast(empty, dtype), name, axis=0)

        order = add.cast(given("order", "int32", [channels]), "int64")
        factor = given("factor", "float32", [channels, channels])

        # [outer, heads, rows, D], and from there channels first, each head in its own order:
        # [heads, D, outer * rows].
        shape = add("Shape", direction)
        heads = add("Shape", order, start=0, end=1)
        rows = add("Mul", *(add("Shape", direction, start=i, end=i + 1) for i in (-3, -2)))
        a_head = add("Mul", rows, channels)
        outer = add("Div", add("Unsqueeze", add("Size", direction), [0]), add("Mul", heads, a_head))
        by_head = add("Concat", outer, heads, rows, channels, axis=0)
        by_channel = add("Concat", heads, channels, add("Mul", outer, rows), axis=0)

        def in_order(values: str) -> str:
            whole = add("Reshape", add("Expand", values, shape), by_head, allowzero=1)
            turned = add("Transpose", whole, perm=[1, 3, 0, 2])
            flat = add("Reshape", turned, by_channel, allowzero=1)
            return add("GatherND", flat, add("Unsqueeze", order, [-1]), batch_dims=1)

        w, scales, zeros = in_order(direction), in_order(scale), in_order(zero)
        is_coded = add.cast(in_order(add.cast(coded, "float32")), "bool")
        moves = add.cast(in_order(add("Unsqueeze", norm, [-1])), "bool")  # no zero token

        def step(add: Nodes, p: str, state: Sequence[str]) -> list[str]:
            done, rest, plain = state[0], state[1], add("Gather", w, p, axis=1)
            value = add("Gather", rest, 0, axis=1)
            value = add("Where", add("Less", add("Abs", value), INFINITY), value, plain)
            pair = [add("Gather", one, p, axis=1) for one in (scales, zeros)]
            has_code = add("Gather", is_coded, p, axis=1)
            half = narrow(add, value, add.constant(ELEMENTS["float16"]))
            y = add("Where", has_code, stored(add, value, *pair), half)
            error = add(
                "Where", add("Gather", moves, p, axis=1), add("Sub", value, y), np.float32(0)
            )
            following = add("Unsqueeze", add("Add", p, 1), [0])
            shares = add("Slice", add("Gather", factor, p, axis=1), following, [LAST], [1])
            product = add("Mul", add("Unsqueeze", shares, [2]), add("Unsqueeze", error, [1]))
            rest = add("Sub", add("Slice", rest, [1], [LAST], [1]), product)
            # With scale 0 the code is 0 whatever is coded, even where a difference overflows.
            flat = add("And", has_code, add("Equal", pair[0], np.float32(0)))
            value = add("Where", flat, plain, value)
            return [add("Concat", done, add("Unsqueeze", value, [1]), axis=1), rest]

        none = add("Slice", w, [0], [0], [1])
        times = add("Squeeze", channels)
        made = add.repeat(times, step, [none, w], ["float32", "float32"])[0]

        # Back again: where a channel is in the order.
        places = add("Expand", add("Range", 0, times, 1), add("Shape", order))
        inverse = add("ScatterElements", order, order, places, axis=1)
        natural = add("GatherND", made, add("Unsqueeze", inverse, [-1]), batch_dims=1)
        split = add("Concat", heads, channels, outer, rows, axis=0)
        turned = add("Transpose", add("Reshape", natural, split, allowzero=1), perm=[2, 0, 3, 1])
        return add("Reshape", turned, shape, allowzero=1)

    return optional(add, "order", moved, lambda _: direction)

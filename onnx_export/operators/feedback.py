"""Feedback (F1) in standard operators: what is coded in place of directions, with which scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnx_export.operators import rounding
from onnx_export.operators.nodes import Nodes
from onnx_export.operators.rounding import where_zero

__all__ = ["fed_back"]

INFINITY = np.float32(np.inf)
LAST = np.iinfo(np.int64).max


def fed_back(
    add: Nodes,
    direction: str,
    norm: str,
    pair: Sequence[str],
    coded: str,
    *,
    channel: str,
    gain: str,
    pair_of: Callable[[Nodes, str], list[str]],
    decoded: Callable[[Nodes, str, str, str], str],
) -> list[str]:
    """Return what is coded in place of ``direction[..., blocks, n, D]``, its pair and its length.

    Where the function has no inputs ``order`` and ``factor`` that is the direction, with the pair
    that is given: scale and zero, [..., blocks, 1, D] if the scalar ``channel`` is true, and else
    [..., blocks, n, 1]. ``coded`` broadcasts to the direction; ``norm`` is [..., blocks, n].

    Of a builder and columns [heads, outer, blocks, n, 1] ``pair_of`` makes scale and zero, as if
    they were coded; of both ``decoded`` makes what codes decode to (Q1, Q2, D1).

    The length, [..., blocks, n], says how much longer directions are than what is coded, as the
    weights see both (M2); and nothing without feedback, or if the scalar ``gain`` is false.

    Examples
    --------
    >>> fed_back(
    ...     Nodes(), "x", "norm", ("scale", "zero"), "coded", channel="channel", gain="gain",
    ...     pair_of=lambda *_: ["scale", "zero"], decoded=lambda add, w, *_: w,
    ... )
    ['chosen_1_0', 'chosen_1_1', 'chosen_1_2', 'chosen_1_3']
    """

    def moved(add: Nodes) -> list[str]:
        channels = add("Shape", direction, start=-1)
        nothing = add("Slice", direction, [0], [0], [-2])

        def given(name: str, dtype: str, axes: Sequence[str]) -> str:
            shape = add("Concat", [0], *axes, axis=0)
            empty = add("Reshape", nothing, shape, allowzero=1)
            return add("Concat", add.cast(empty, dtype), name, axis=0)

        order = add.cast(given("order", "int32", [channels]), "int64")
        factor = given("factor", "float32", [channels, channels])

        # [outer, heads, blocks, n, D] becomes columns, each head in its own order:
        # [heads, D, outer, blocks, n, 1].
        shape = add("Shape", direction)
        heads = add("Shape", order, start=0, end=1)
        blocks, tokens = (add("Shape", direction, start=i, end=i + 1) for i in (-3, -2))
        a_head = add("Mul", add("Mul", blocks, tokens), channels)
        outer = add("Div", add("Unsqueeze", add("Size", direction), [0]), add("Mul", heads, a_head))
        lead = add("Concat", outer, heads, blocks, axis=0)

        def split(values: str, *ends: str) -> str:
            return add("Reshape", values, add("Concat", lead, *ends, axis=0), allowzero=1)

        def in_order(values: str) -> str:
            whole = split(add("Expand", values, shape), tokens, channels)
            whole = add("Transpose", whole, perm=[1, 4, 0, 2, 3])
            ordered = add("GatherND", whole, add("Unsqueeze", order, [-1]), batch_dims=1)
            return add("Unsqueeze", ordered, [-1])

        def by_head(values: str) -> str:
            whole = split(values, add("Shape", values, start=-2))
            return add("Transpose", whole, perm=[1, 0, 2, 3, 4])

        plain = in_order(direction)
        # Of a block all tokens of a channel are coded, or none: [heads, D, outer, blocks, 1, 1].
        is_coded = add("Slice", in_order(add.cast(coded, "float32")), [0], [1], [-2])
        is_coded = add.cast(is_coded, "bool")
        moves = add.cast(by_head(add("Unsqueeze", norm, [-1])), "bool")  # no zero token
        nothing_moves = add("Expand", np.float32(0), add("Shape", moves))  # Where is slow of one 0
        of_direction = [by_head(one) for one in pair]

        def step(add: Nodes, p: str, state: Sequence[str]) -> list[str]:
            here, has_code = (add("Gather", one, p, axis=1) for one in (plain, is_coded))
            row = add("Gather", factor, p, axis=1)
            both = add("Gather", state[0], 0, axis=2)
            both = add("Where", add("Less", add("Abs", both), INFINITY), both, here)
            w, seen = add("Gather", both, 0, axis=0), add("Slice", both, [1], [LAST], [0])

            def of_column(add: Nodes) -> list[str]:
                return [add("Where", has_code, one, np.float32(0)) for one in pair_of(add, w)]

            scale, zero = add.choose_several(
                channel, of_column, lambda _: of_direction, ["float32", "float32"]
            )
            half = add.cast(add.cast(w, "float16"), "float32")
            y = add("Where", has_code, decoded(add, w, scale, zero), half)
            error = add("Where", moves, add("Sub", w, y), nothing_moves)

            following = add("Unsqueeze", add("Add", p, 1), [0])
            shares = add("Unsqueeze", add("Slice", row, following, [LAST], [1]), [2, 3, 4, 5])
            taken = add("Concat", add("Unsqueeze", error, [0]), seen, axis=0)
            product = add("Mul", add("Unsqueeze", taken, [2]), shares)
            rest = add("Sub", add("Slice", state[0], [1], [LAST], [2]), product)

            weight = add("Unsqueeze", add("Gather", row, p, axis=1), [1, 2, 3, 4])
            ends = add("Concat", seen, add("Sub", seen, error), axis=0)
            return [rest, w, scale, zero, add("Mul", ends, weight)]

        # Beside w, where a gain is asked for, what the weights see of the directions.
        sides = add("Unsqueeze", add("Add", add.cast(gain, "int64"), 1), [0])
        both = add("Expand", plain, add("Concat", sides, add("Shape", plain), axis=0))
        times, dtypes = add("Squeeze", channels), ["float32"] * 4
        _, *made, weighed = add.repeat(times, step, [both], ["float32"], dtypes)

        # Back again: where a channel is in the order.
        places = add("Expand", add("Range", 0, times, 1), add("Shape", order))
        inverse = add("ScatterElements", order, order, places, axis=1)

        def natural(add: Nodes, values: str, like: str) -> str:
            """Return what has a value for each step in the shape of ``like``."""
            rows = add("Shape", like, start=-2, end=-1)
            split = add("Concat", channels, heads, outer, blocks, rows, axis=0)
            by_step = add("Reshape", values, split, allowzero=1)
            by_head = add("Transpose", by_step, perm=[1, 0, 2, 3, 4])
            ordered = add("GatherND", by_head, add("Unsqueeze", inverse, [-1]), batch_dims=1)
            turned = add("Transpose", ordered, perm=[2, 0, 3, 4, 1])
            return add("Reshape", turned, add("Shape", like), allowzero=1)

        def length(add: Nodes) -> str:
            ends = add("Concat", channels, [2], heads, outer, blocks, tokens, axis=0)
            by_step = add("Reshape", weighed, ends, allowzero=1)
            rows = add("Transpose", by_step, perm=[1, 3, 2, 4, 5, 0])
            lengths = rounding.norm(add, rows)
            before, after = (add("Gather", lengths, i, axis=0) for i in (0, 1))
            ratio = add("Div", before, where_zero(add, after, INFINITY))
            return add("Reshape", ratio, add("Shape", norm), allowzero=1)

        def of_columns(add: Nodes) -> list[str]:
            return [natural(add, new, old) for new, old in zip(made[1:], pair, strict=True)]

        return [
            natural(add, made[0], direction),
            *add.choose_several(channel, of_columns, lambda _: pair, ["float32", "float32"]),
            add.choose(gain, length, lambda _: norm),
        ]

    def unmoved(_: Nodes) -> list[str]:
        return [direction, *pair, norm]

    has_feedback = add("OptionalHasElement", "order")
    return add.choose_several(has_feedback, moved, unmoved, ["float32"] * 4)

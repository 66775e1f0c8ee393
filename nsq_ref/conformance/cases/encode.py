"""The cases of the operation ``"encode"``: families in every dtype of input, and what is large."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np

from nsq_ref import rounding, spec
from nsq_ref.conformance.cases.balanced import balanced, held_plain
from nsq_ref.conformance.cases.families import FAMILIES, Also, with_sinks
from nsq_ref.conformance.cases.halves import narrow_ties
from nsq_ref.conformance.cases.pools import Draw
from nsq_ref.conformance.cases.steps import gain_midpoints, tiny_ties
from nsq_ref.conformance.cases.tiles import channel_tiles, long_sequences, tile_edges
from nsq_ref.conformance.operations import CASE_DTYPES, Case
from nsq_ref.dtypes import FLOAT_DTYPES, Array, Float32
from nsq_ref.scheme import Scheme

_WITH_OWN_SINKS = ("not-finite", "sinks", "kept-as-it-came")

# Cases of narrow inputs are numbered from here; those of float32 input go before them.
FIRST = {"float32": 0, "float16": 100, "bfloat16": 200}
NARROW = ("float16", "bfloat16")
# Families that take long to make, as their cases are picked from many.
_LOOKED_FOR = (
    "half-even", "reciprocal-of-scale", "merged-division", "double-precision-quotient",
    "unnarrowed-scale", "scale-epsilon", "scale-narrowing", "outlier-narrowing",
    "reciprocal-of-norm", "norm-epsilon", "norm-before-narrowing", "norm-accumulation",
    "factor-narrowing", "norm-midpoint", "factor-midpoint", "narrow-range", "range-precision",
)  # fmt: skip
# What lies on ties, or next to them, with plain norms.
_HELD = (*_LOOKED_FOR, "exact-tie", "scale-range", "search")
# Families whose inputs are asked in narrow dtypes too.
_TWINS = (
    "zero-token", "zero-channel", "negative-zero", "block-boundary", "sinks", "padding",
    "exact-tie", "tiny-norm", "subnormal-norm", "norm-narrowing", "norm-overflow", "scale-range",
    "scale-overflow", "decoded-overflow", "narrow-range", "collapse", "outlier-channels", "search",
    "norm-epsilon", "scale-epsilon", "largest-half", "sequences",
    "kept-as-it-came",
)  # fmt: skip


def encode_cases(scheme: Scheme, seed: int, quick: bool = False) -> Iterator[Case]:
    """Yield the cases of the operation ``"encode"``; if `quick`, none that must be looked for.

    Examples
    --------
    >>> next(encode_cases(Scheme(), 0))
    Case(encode ordinary/0)
    """
    twins: list[Case] = []
    plain = replace(scheme, norm_rule="plain")

    def case_of(name: str, flags: tuple[str, ...], x: Array) -> Case:
        if flags[0] in _HELD:
            x = held_plain(x, scheme)
        return Case(name, "encode", scheme, flags, {"x": x}, refusal(x, scheme))

    for flag, family in FAMILIES.items():
        if quick and flag in _LOOKED_FOR:
            continue
        for number, made in enumerate(family(plain, Draw(seed, flag))):
            x, flags = (made.x, (flag, made.flag)) if isinstance(made, Also) else (made, (flag,))
            x = x.astype(np.float32) if x.dtype == np.float64 else x
            x = x if flag in _WITH_OWN_SINKS else with_sinks(x, scheme)
            case = case_of(f"{flag}/{number}", flags, x)
            if flag in _TWINS and x.dtype == np.float32:
                twins.append(replace(case, inputs={"x": x}))
            yield case
    for flag, recipes in (("tile-edge", tile_edges), ("channel-tile", channel_tiles)):
        for number, recipe in enumerate(recipes(scheme, Draw(seed, flag))):
            for first, dtype in zip(FIRST.values(), CASE_DTYPES, strict=True):
                if number not in (4, 5) or dtype == "float32":
                    inputs, name = {"x": recipe.make(dtype)}, f"{flag}/{first + number}"
                    yield Case(name, "encode", scheme, (flag,), inputs, None, recipe)
    for recipe in () if quick else long_sequences(scheme, Draw(seed, "long-sequence")):
        for first, dtype in zip(FIRST.values(), CASE_DTYPES, strict=True):
            inputs, name = {"x": recipe.make(dtype)}, f"long-sequence/{first}"
            yield Case(name, "encode", scheme, ("long-sequence",), inputs, None, recipe)
    for dtype, first in FIRST.items():
        numbers: dict[str, Iterator[int]] = defaultdict(partial(count, first))
        draw = Draw(seed, f"balanced norms in {dtype}")
        for flag, coded in balanced(scheme, draw, dtype, quick):
            yield case_of(f"{flag}/{next(numbers[flag])}", (flag,), with_sinks(coded, scheme))
    for dtype in () if quick else NARROW:
        numbers = defaultdict(partial(count, FIRST[dtype]))
        for flag, coded in narrow_ties(plain, seed, dtype):
            yield case_of(f"{flag}/{next(numbers[flag])}", (flag,), with_sinks(coded, scheme))
        for case in twins:
            for x in _narrowed(case, dtype):
                yield case_of(f"{case.flags[0]}/{next(numbers[case.flags[0]])}", case.flags, x)
        draw = Draw(seed, f"gain midpoints in {dtype}")
        looked_for = [("factor-midpoint", x) for x in gain_midpoints(plain, draw, dtype)]
        if dtype == "float16":
            looked_for += [("norm-epsilon", x) for x in tiny_ties(plain)]
        for flag, coded in looked_for:
            yield case_of(f"{flag}/{next(numbers[flag])}", (flag,), with_sinks(coded, scheme))


def _narrowed(case: Case, dtype: str) -> Iterator[Array]:
    """Yield the input of a case in a narrow dtype, where that holds it and it is no other then."""
    kind = FLOAT_DTYPES[dtype]
    x = case.inputs["x"]
    narrow = x.astype(kind)
    if case.refused_by != "I2" and not np.isfinite(narrow).all():
        return
    if case.flags[0] != "exact-tie":
        yield narrow
    elif case.id == "exact-tie/0" and (narrow.astype(np.float32) == x).all():
        yield narrow
        for end in (np.inf, -np.inf):
            yield np.where(narrow == 0, narrow, np.nextafter(narrow, kind.type(end)))


def refusal(
    x: Array, scheme: Scheme, encode: Callable[[Float32], spec.Block] | None = None
) -> str | None:
    """Return the rule that refuses an input, the first in the order of computation.

    ``encode`` makes the blocks of what is not a sink, if not `spec.encode_blocks`.

    Examples
    --------
    >>> refusal(np.float32([[65520, 0]]), Scheme())
    'M4'
    """
    if not np.isfinite(x).all():
        return "I2"
    coded = x[..., scheme.sink_tokens :, :].astype(np.float32)
    if not coded.size:
        return None
    with np.errstate(all="ignore"):
        if scheme.separate_norm and np.isinf(rounding.norm(coded)).any():
            return "N1"
        block = encode(coded) if encode else spec.encode_blocks(coded, scheme)
        for rule, *parts in (
            ("O1", block.outliers),
            ("S5", block.scale, block.zero),
            ("M4", block.norm),
            ("D3", spec.decode_blocks(block, scheme)),
        ):
            if not all(np.isfinite(part).all() for part in parts):
                return rule
    return None

"""What a port must answer to a case, by the oracle: exact fractions, and no code of the codec."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from nsq_ref import attention, oracle
from nsq_ref.codec import Quantized
from nsq_ref.conformance.operations import Case, attention_options, stored_side
from nsq_ref.dtypes import Array
from nsq_ref.scheme import Scheme

Arrays = dict[str, Array]

SINGLE = np.dtype(np.float32)
DIGITS = Context(prec=60)  # of attention, which is rounded to float64 at the end
CROP = 1  # the kind of a step


class Exact(NamedTuple):
    """The exact answer to a case."""

    refused_by: tuple[str, ...]  # rules, any of which may be reported; then there are no arrays
    expected: Arrays  # what a port returns
    intermediates: Arrays  # what leads there, stage by stage; `docs/vectors.md` lists them


def answer(case: Case) -> Exact:
    """Return the exact answer to a case; ValueError where it is wrong about its refusal.

    Examples
    --------
    >>> x = np.float32([[3, 4], [-1.5, 2]])
    >>> case = Case("small/0", "encode", Scheme(), ("ordinary",), {"x": x})
    >>> exact = answer(case)
    >>> exact.expected["packed"].tolist(), exact.intermediates["norm"].tolist()
    ([[255], [241]], [5.0, 2.5])
    """
    operations = {
        "encode": encoded, "decode": decoded, "attend": attended, "stream": streamed,
        "feedback": encoded, "stream_feedback": streamed,
    }  # fmt: skip
    exact = operations[case.operation](case)
    if case.refused_by is None:
        agrees = not exact.refused_by
    else:
        agrees = case.refused_by in exact.refused_by
    if not agrees:
        raise ValueError(
            f"{case} has refused_by={case.refused_by}, but the oracle refuses it by "
            f"{' '.join(exact.refused_by) or 'no rule'}; mend the case"
        )
    return exact


# --- encode -------------------------------------------------------------------------------------


def encoded(case: Case) -> Exact:
    """Return the stored parts of ``x[..., T, D]``, with feedback where the case has some (F1)."""
    x, scheme = case.inputs["x"], case.scheme
    if not np.isfinite(x.astype(np.float32)).all():
        return Exact(("I2",), {}, {})
    tokens, head_dim = x.shape[-2:]
    sinks = min(scheme.sink_tokens, tokens)
    stages = []
    if sinks < tokens:
        rows = x.astype(np.float32).reshape(-1, tokens, head_dim)[:, sinks:]
        stages = [
            oracle.encode(row.tolist(), scheme, feedback)
            for row, feedback in zip(rows, feedback_of(case, len(rows)), strict=True)
        ]
    if refused_by := refusals(stages):
        return Exact(refused_by, {}, {})
    lead, coded = x.shape[:-2], tokens - sinks
    expected = {
        name: gathered(stages, name, (*lead, *field.shape), field.dtype)
        for name, field in scheme.layout(tokens, head_dim, x.dtype).items()
        if name != "sinks"
    }
    if scheme.sink_tokens:
        expected["sinks"] = x[..., :sinks, :]
    each, token = (*lead, coded, head_dim), (*lead, coded)
    intermediates = {"codes": gathered(stages, "codes", each, code_dtype(scheme))}
    if "order" in case.inputs:
        intermediates = {"w": gathered(stages, "coded", each, SINGLE), **intermediates}
    if scheme.separate_norm:
        intermediates = {
            "norm": gathered(stages, "x_norm", token, SINGLE),
            "direction": gathered(stages, "direction", each, SINGLE),
            **intermediates,
            "y": gathered(stages, "y", each, SINGLE),
        }
        y = intermediates["y"]
        if scheme.norm_rule == "balanced" and coded:
            size = sizes(rows, scheme, lead)
            intermediates = {"size": size, **intermediates}
            y = y / np.repeat(size, scheme.tokens_per_block(coded), axis=-2)[..., :coded, :]
        if scheme.magnitude != "lsq":
            intermediates["length"] = lengths(y)
        if scheme.magnitude != "norm":
            intermediates["factor"] = gathered(stages, "factor", token, SINGLE)
    x_hat = gathered(stages, "x_hat", each, SINGLE)
    intermediates["x_hat"] = np.concatenate([x[..., :sinks, :].astype(SINGLE), x_hat], axis=-2)
    return Exact((), expected, intermediates)


def sizes(rows: Array, scheme: Scheme, lead: tuple[int, ...]) -> Array:
    """Return by what channels count in each block of each sequence (N3), ``[..., blocks, D]``."""
    _, tokens, head_dim = rows.shape
    starts = range(0, tokens, scheme.tokens_per_block(tokens))
    found = [
        oracle.norms_and_sizes(row[at : at + starts.step].tolist(), scheme)[1]
        for row in rows
        for at in starts
    ]
    return np.array(found, SINGLE).reshape(*lead, len(starts), head_dim)


def feedback_of(case: Case, sequences: int) -> list[tuple[Array, Array] | None]:
    """Return order and factor of each sequence: of its head, or of the one that all share (F1)."""
    if "order" not in case.inputs:
        return [None] * sequences
    heads = list(zip(case.inputs["order"], case.inputs["factor"], strict=True))
    return [heads[n % len(heads)] for n in range(sequences)]


def refusals(stages: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the rules by which the oracle's encoded sequences are refused."""

    def infinite(name: str) -> bool:
        return any(not np.isfinite(np.array(one[name], np.float64)).all() for one in stages)

    found = {
        "N1": infinite("x_norm"),
        "M4": infinite("norm") and not infinite("x_norm"),
        "S5": infinite("scale") or infinite("zero"),
        "O1": infinite("outliers"),
    }
    found["D3"] = not any(found.values()) and infinite("x_hat")
    return tuple(rule for rule, is_so in found.items() if is_so)


# --- decode -------------------------------------------------------------------------------------


def decoded(case: Case) -> Exact:
    """Return ``x_hat`` of stored parts."""
    scheme = case.scheme
    shape = tuple(case.inputs["shape"].tolist())
    x_hat, intermediates = reconstructed(case.inputs, shape, scheme)
    return Exact((), {"x_hat": x_hat}, intermediates)


def reconstructed(
    parts: Mapping[str, Array], shape: tuple[int, ...], scheme: Scheme
) -> tuple[Array, Arrays]:
    """Return ``x_hat`` of that shape and what leads to it."""
    (*lead, tokens, head_dim) = shape
    sinks = min(scheme.sink_tokens, tokens)
    coded = tokens - sinks
    stages = []
    if coded:
        flat = {
            name: part.reshape(-1, *part.shape[len(lead) :])
            for name, part in parts.items()
            if name not in ("shape", "sinks")
        }
        flat.setdefault("norm", np.ones((len(flat["packed"]), coded), np.float32))
        for n in range(len(flat["packed"])):
            one = {name: part[n].tolist() for name, part in flat.items()}
            stages.append(oracle.decode_stages(one, head_dim, scheme))
    each = (*lead, coded, head_dim)
    intermediates = {"codes": gathered(stages, "codes", each, code_dtype(scheme))}
    if scheme.separate_norm:
        intermediates["y"] = gathered(stages, "y", each, SINGLE)
        if scheme.magnitude == "norm":
            intermediates["length"] = lengths(intermediates["y"])
    x_hat = gathered(stages, "x_hat", each, SINGLE)
    if sinks:
        x_hat = np.concatenate([parts["sinks"].astype(SINGLE), x_hat], axis=-2)
    return x_hat, intermediates


# --- attend -------------------------------------------------------------------------------------


def attended(case: Case) -> Exact:
    """Return the output of attention and how far a port may be from it (rules A1, A2, A3)."""
    x_hat, reach = {}, {}
    for side in ("keys", "values"):
        parts, shape, scheme = stored_side(case, side)
        x_hat[side] = reconstructed(parts, shape, scheme)[0]
        kind = parts["sinks"].dtype if "sinks" in parts else SINGLE
        reach[side] = attention.reach(Quantized(scheme, shape, kind, **parts))
    query = case.inputs["query"]
    options = attention_options(case.inputs)
    output, weights = exact_attention(query, x_hat["keys"], x_hat["values"], **options)
    bound = attention.tolerance(
        *(array[None] for array in (query, x_hat["keys"], x_hat["values"])),
        *(reach[side][None] for side in reach),
        **options,
    ).output[0]
    expected = {"output": output, "tolerance": rounded_up(bound)}
    return Exact(
        (), expected, {f"{side}.x_hat": x_hat[side] for side in x_hat} | {"weights": weights}
    )


def exact_attention(
    query: Array, keys: Array, values: Array, *, scale: float, causal: bool, softcap: float | None,
    sliding_window: int | None,
) -> tuple[Array, Array]:  # fmt: skip
    """Return output and weights in 60 digits, rounded to float64: the same on every machine."""
    group = len(query) // len(keys)
    queries, tokens = query.shape[1], keys.shape[1]
    output = np.zeros((*query.shape[:2], values.shape[2]))
    weights = np.zeros((*query.shape[:2], tokens))
    k, v = (
        [[[Decimal(value) for value in row] for row in head] for head in array.tolist()]
        for array in (keys, values)
    )
    for h, i in np.ndindex(query.shape[:2]):
        position = tokens - queries + i
        stop = position + 1 if causal else tokens
        seen = range(max(stop - sliding_window, 0) if sliding_window else 0, stop)
        q = [Decimal(value) for value in query[h, i].tolist()]
        scores = [
            softcapped(DIGITS.multiply(Decimal(scale), dot(q, k[h // group][t])), softcap)
            for t in seen
        ]
        powers = [DIGITS.exp(DIGITS.subtract(score, max(scores))) for score in scores]
        total = dot(powers, [Decimal(1)] * len(powers))
        p = [DIGITS.divide(power, total) for power in powers]
        weights[h, i, seen.start : seen.stop] = [float(one) for one in p]
        for j in range(values.shape[2]):
            output[h, i, j] = float(dot(p, [v[h // group][t][j] for t in seen]))
    return output, weights


def dot(a: list[Decimal], b: list[Decimal]) -> Decimal:
    """Return the sum of products."""
    total = Decimal(0)
    for one, other in zip(a, b, strict=True):
        total = DIGITS.fma(one, other, total)
    return total


def softcapped(score: Decimal, softcap: float | None) -> Decimal:
    """Return ``softcap * tanh(score / softcap)``."""
    if softcap is None:
        return score
    cap = Decimal(softcap)
    power = DIGITS.exp(DIGITS.divide(DIGITS.multiply(Decimal(-2), abs(score)), cap))
    ratio = DIGITS.divide(DIGITS.subtract(Decimal(1), power), DIGITS.add(Decimal(1), power))
    return DIGITS.multiply(cap, ratio.copy_sign(score))


def rounded_up(bound: Array) -> Array:
    """Return bounds, which float64 computed, rounded up to 13 bits: the same on every machine."""
    bits = bound.view(np.uint64) & ~np.uint64(2**40 - 1)
    up = (bits + np.uint64(2**40)).view(np.float64)
    return np.where((bound == 0) | np.isinf(bound), bound, up)


# --- stream -------------------------------------------------------------------------------------


def streamed(case: Case) -> Exact:
    """Return what a cache holds after its steps: a list of tokens, encoded at the end.

    A sealed block keeps its bytes, so that it does not matter when it was encoded (B1, F1).
    """
    x, scheme, row = case.inputs["x"], case.scheme, int(case.inputs["row"].item())
    if scheme.block_size is None:
        raise ValueError(f"{case} has no block_size, which a cache needs")
    alone = replace(scheme, sink_tokens=0)
    tokens: list[Array] = []
    taken = 0
    for kind, number in case.inputs["steps"][:, [0, 1 + row]].tolist():
        if kind != CROP:
            if not np.isfinite(x[row, taken : taken + number].astype(SINGLE)).all():
                return Exact(("I2",), {}, {})
            tokens += list(x[row, taken : taken + number])
            taken += number
            continue
        start, stop = sealed_tokens(number, scheme)
        survivors = tokens[stop:number]
        if survivors and sealed_tokens(len(tokens), scheme)[1] > stop:
            block = np.stack(tokens[stop : stop + scheme.block_size])
            x_hat = encoded(replace_input(case, block, alone)).intermediates["x_hat"]
            survivors = list(saturated(x_hat[: number - stop], x.dtype))
        tokens = tokens[:stop] + survivors
    start, stop = sealed_tokens(len(tokens), scheme)
    held = np.array(tokens, x.dtype).reshape(len(tokens), x.shape[-1])
    sealed = encoded(replace_input(case, held[start:stop], alone))
    if sealed.refused_by:
        return sealed
    expected = {**sealed.expected, "tail": held[stop:]}
    if scheme.sink_tokens:
        expected["sinks"] = held[:start]
    return Exact((), expected, {"codes": sealed.intermediates["codes"]})


def sealed_tokens(length: int, scheme: Scheme) -> tuple[int, int]:
    """Return where the sealed blocks of a sequence of this length begin and end (B1, K1)."""
    start = min(scheme.sink_tokens, length)
    size = scheme.block_size or 1
    return start, start + (length - start) // size * size


def replace_input(case: Case, x: Array, scheme: Scheme) -> Case:
    """Return the case that asks to encode ``x``, with the feedback of the row, if there is one."""
    inputs = {"x": x}
    if "order" in case.inputs:
        head = int(case.inputs["row"].item()) % len(case.inputs["order"])
        own = slice(head, head + 1)
        inputs |= {name: case.inputs[name][own] for name in ("order", "factor")}
    return replace(case, operation="encode", scheme=scheme, inputs=inputs)


def saturated(x_hat: Array, dtype: np.dtype[Any]) -> Array:
    """Return decoded values as the tail keeps them (rule C1)."""
    kind = oracle.FORMATS[dtype.name]
    most = float(kind.greatest)
    values = [
        min(max(oracle.rounded(Fraction(value), kind, math.copysign(1, value)), -most), most)
        for value in x_hat.ravel().tolist()
    ]
    return np.array(values).astype(dtype).reshape(x_hat.shape)


# --- arrays -------------------------------------------------------------------------------------


def gathered(
    stages: list[dict[str, Any]], name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Array:
    """Return one name of all sequences as an array; every value fits its dtype exactly."""
    values = np.array([one[name] for one in stages], np.float64)
    return np.asarray(values.astype(dtype)).reshape(shape)


def lengths(y: Array) -> Array:
    """Return the norms of dequantized directions (rule N1)."""
    norms = [oracle.exact_norm(row) for row in y.reshape(-1, y.shape[-1]).tolist()]
    return np.array(norms, np.float32).reshape(y.shape[:-1])


def code_dtype(scheme: Scheme) -> np.dtype[Any]:
    """Return int8 for symmetric codes, which have a sign, and uint8 for others."""
    return np.dtype(np.int8 if scheme.symmetric else np.uint8)

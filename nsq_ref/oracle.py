"""NSQ-1 once more, in Python integers and fractions: slow, and obviously right.

It shares no code with `spec`, `rounding`, `packing` and `kernels`, which it judges. A float is
carried as a Python float, in which every float32, float16 and bfloat16 fits; every operation is
done exactly on `Fraction` and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from nsq_ref.arrays import as_float_array, as_integer, as_integer_array, as_real_array
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import Scheme, as_scheme

__all__ = ["decode", "encode"]


class Format(NamedTuple):
    """Significant bits, exponent of the smallest step, and the greatest finite value."""

    digits: int
    least_exponent: int
    greatest: Fraction


FORMATS = {
    "float16": Format(11, -24, Fraction(65504)),
    "bfloat16": Format(8, -133, (2 - Fraction(1, 2**7)) * Fraction(2) ** 127),
    "float32": Format(24, -149, (2 - Fraction(1, 2**23)) * Fraction(2) ** 127),
}
SINGLE = FORMATS["float32"]
STORED = {"packed", "norm", "scale", "zero", "outlier_index", "outliers"}
SHRINK = [Fraction(percent, 100) for percent in (100, 95, 90, 85, 80, 70)]


# --- arithmetic ---------------------------------------------------------------------------------


def half_even(value: Fraction) -> int:
    """Round to the nearest integer, ties to even."""
    below = value.numerator // value.denominator
    rest = value - below
    return below + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2 == 1))


def exponent(value: Fraction) -> int:
    """The integer e with ``2**e <= value < 2**(e + 1)``, for a positive value."""
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if value >= Fraction(2) ** guess else guess - 1


def rounded(value: Fraction, kind: Format, sign: float = 1.0) -> float:
    """Round an exact value to a format, half to even; ``sign`` is that of a zero result."""
    if value == 0:
        return math.copysign(0.0, sign)
    step = Fraction(2) ** max(exponent(abs(value)) - kind.digits + 1, kind.least_exponent)
    result = half_even(abs(value) / step) * step
    size = math.inf if result > kind.greatest else float(result)
    return math.copysign(size, value)


def multiply(a: float, b: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b
    return rounded(Fraction(a) * Fraction(b), SINGLE, math.copysign(1, a) * math.copysign(1, b))


def divide(a: float, b: float) -> float:
    """``a / b``; 0 where b is 0, as the rules have it for zero norms and scales."""
    if b == 0 or not (math.isfinite(a) and math.isfinite(b)):
        return a / b if b else 0.0
    return rounded(Fraction(a) / Fraction(b), SINGLE, math.copysign(1, a) * math.copysign(1, b))


def add(a: float, b: float) -> float:
    if a == b == 0 or not (math.isfinite(a) and math.isfinite(b)):
        return a + b
    return rounded(Fraction(a) + Fraction(b), SINGLE)


def narrow(value: float, dtype: str) -> float:
    """S3, M4, Z1: one rounding, and no negative zero."""
    result = rounded(Fraction(value), FORMATS[dtype]) if math.isfinite(value) else value
    return 0.0 if result == 0 else result


@in_default_environment
def exact_norm(row: Sequence[float]) -> float:
    """N1: the float32 nearest to the root of the exact sum of squares."""
    total = sum((Fraction(value) ** 2 for value in row), Fraction(0))
    if total == 0:
        return 0.0
    # The root to 32 bits more than float32 has; its remainder tells on which side of a tie.
    scale = Fraction(2) ** (56 - exponent(total) // 2)
    square = total * scale**2
    root = math.isqrt(square.numerator // square.denominator)
    beyond = Fraction(root) ** 2 != square
    return rounded((2 * root + beyond) / (2 * scale), SINGLE)


# --- encode -------------------------------------------------------------------------------------


@in_default_environment
def encode(x: Any, scheme: Scheme | str, feedback: tuple[Any, Any] | None = None) -> dict[str, Any]:
    """Quantize one sequence of one head, ``x[T][D]`` of finite float32 without its sinks.

    It may be nested lists, or an array that `nsq_ref.quantize` takes; ``feedback`` is the head's
    order ``[D]`` and factor ``[D][D]`` (F1), which are not looked at closely.

    Returns
    -------
    dict
        Names of `Scheme.layout` to nested lists; and for each token ``x_norm`` (N1),
        ``direction``, what is ``coded`` in its place (F1), ``codes``, dequantized direction ``y``,
        the ``factor`` that narrowing makes ``norm``, ``x_hat``, and whether it ``collapsed``.

    Examples
    --------
    >>> encode([[3.0, 4.0], [-1.5, 2.0]], Scheme())["norm"]
    [5.0, 2.5]
    """
    x = as_float_array("x", x).astype("float32").tolist()
    scheme = as_scheme("scheme", scheme)
    moved = None
    if feedback is not None:
        order = as_integer_array("feedback[0]", feedback[0]).tolist()
        moved = order, as_real_array("feedback[1]", feedback[1]).tolist()
    size = scheme.block_size or len(x)
    whole: dict[str, Any] = {}
    for start in range(0, len(x), size):  # B1
        for name, rows in encode_block(x[start : start + size], scheme, moved).items():
            whole.setdefault(name, []).extend(rows)
    return whole


def encode_block(
    x: list[list[float]],
    scheme: Scheme,
    feedback: tuple[list[int], list[list[float]]] | None = None,
) -> dict[str, Any]:
    tokens, channels = range(len(x)), range(len(x[0]))
    norms, sizes = norms_and_sizes(x, scheme)
    direction = directions(x, norms)
    peak = [max(abs(direction[t][j]) for t in tokens) for j in channels]
    kept = sorted(sorted(channels, key=lambda j: (-peak[j], j))[: scheme.outlier_channels])  # O1
    coded = [j for j in channels if j not in kept]

    if scheme.axis == "channel":
        groups = [[(t, j) for t in tokens] if j in coded else [] for j in channels]
    else:
        groups = [[(t, j) for j in coded] for t in tokens]
    pairs = [scale_and_zero([direction[t][j] for t, j in group], scheme) for group in groups]

    def pair(t: int, j: int) -> tuple[float, float]:
        return pairs[j if scheme.axis == "channel" else t]

    w = direction
    if feedback is not None:
        w, lengths = fed_back(direction, norms, kept, pairs, feedback, scheme)
    codes = [
        [
            code(w[t][j], *pair(t, j), scheme) if j in coded and norms[t] != 0 else 0
            for j in channels
        ]
        for t in tokens
    ]
    outliers = [[narrow(w[t][j], "float16") for j in kept] for t in tokens]
    y = [[dequantized(codes[t][j], *pair(t, j), scheme) for j in channels] for t in tokens]
    for t in tokens:
        for j, value in zip(kept, outliers[t], strict=True):
            y[t][j] = value
    factors = [factor(x[t], y[t], norms[t], sizes, scheme) for t in tokens]
    if feedback is not None and scheme.separate_norm and scheme.magnitude == "gain":  # M2
        known = map(math.isfinite, norms)  # others are refused (N1)
        factors = [multiply(norms[t], lengths[t]) if k else norms[t] for t, k in enumerate(known)]
    stored = [narrow(value, scheme.norm_dtype) for value in factors]
    finite = [all(map(math.isfinite, row)) for row in y]  # others are refused (O1)
    x_hat = [reconstructed(y[t], stored[t], scheme) if finite[t] else y[t] for t in tokens]
    collapsed = [not any(x_hat[t]) and any(x[t]) for t in tokens]

    rows = [list(column) for column in zip(*pairs, strict=True)]
    shape: Callable[[list[float]], Any] = (
        (lambda row: [row]) if scheme.axis == "channel" else (lambda row: [[v] for v in row])
    )
    return {
        "packed": [packed(row, scheme) for row in codes],
        "norm": stored,
        "scale": shape(rows[0]),
        "zero": shape(rows[1]),
        "outlier_index": [kept],
        "outliers": outliers,
        "collapsed": collapsed,
        "x_norm": norms,
        "direction": direction,
        "coded": w,
        "codes": codes,
        "y": y,
        "factor": factors,
        "x_hat": x_hat,
    }


def norms_and_sizes(x: list[list[float]], scheme: Scheme) -> tuple[list[float], list[float]]:
    """N1, N3: the norm of each token, and the size by which each channel counts."""
    ones = [1.0] * len(x[0])
    if not scheme.separate_norm:
        return [1.0] * len(x), ones
    plain = [exact_norm(row) for row in x]
    if scheme.norm_rule == "plain":
        return plain, ones
    peaks = [max(map(abs, channel)) for channel in zip(*x, strict=True)]
    sizes = [max(divide(peak, max(peaks)), 2.0**-12) for peak in peaks]
    whole = [[divide(value, size) for value, size in zip(row, sizes, strict=True)] for row in x]
    if not all(math.isfinite(value) for row in whole for value in row):
        return plain, ones
    balanced = [exact_norm(row) for row in whole]
    if math.inf in balanced or not spread(x, balanced) < spread(x, plain):
        return plain, ones
    return balanced, sizes


def spread(x: list[list[float]], norms: list[float]) -> float:
    """N3: float64, one token, and one channel, after the other; squares are exact in it."""
    ranges = [
        [add(max(channel), -min(channel)) for channel in zip(*rows, strict=True)]
        for rows in (directions(x, norms), x)
    ]
    growth = []
    for after, before in zip(*ranges, strict=True):
        growth.append(divide(after, before) if before else math.inf if after else 0.0)
    sums = []
    for values in norms, growth:
        total = 0.0
        for value in values:
            if not math.isfinite(value):
                total = math.inf
            elif total < math.inf:
                total = float(Fraction(total) + Fraction(value) ** 2)
        sums.append(total)
    if math.inf in sums:
        return math.inf
    return float(Fraction(sums[0]) * Fraction(sums[1]))


def directions(x: list[list[float]], norms: list[float]) -> list[list[float]]:
    """N2."""
    return [[divide(value, norm) for value in row] for row, norm in zip(x, norms, strict=True)]


def scale_and_zero(values: list[float], scheme: Scheme, power: int = 2) -> tuple[float, float]:
    """S1 to S5 for the direction's values that share a scale."""
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    full = range_scale(low, high, scheme)
    if scheme.scale_rule == "range" or not all(map(math.isfinite, full)):
        return full
    middle = add(multiply(0.5, high), multiply(0.5, low))
    radius = add(multiply(0.5, high), -multiply(0.5, low))
    best, least = full, lost(values, full, power, scheme)
    for ratio in SHRINK[1:]:
        shrink = rounded(ratio, SINGLE)
        if scheme.symmetric:
            pair = range_scale(multiply(shrink, low), multiply(shrink, high), scheme)
        else:
            shorter = multiply(shrink, radius)
            pair = range_scale(add(middle, -shorter), add(middle, shorter), scheme)
        if not all(map(math.isfinite, pair)):
            continue
        error = lost(values, pair, power, scheme)
        if error < least:
            best, least = pair, error
    return best


def range_scale(low: float, high: float, scheme: Scheme) -> tuple[float, float]:
    if scheme.symmetric:
        levels, zero, span = 2 ** (scheme.bits - 1) - 1, 0.0, max(abs(low), abs(high))
    else:
        zero = narrow(low, scheme.scale_dtype)
        levels, span = 2**scheme.bits - 1, add(high, -zero)
    return narrow(divide(span, float(levels)), scheme.scale_dtype), zero


def lost(values: list[float], pair: tuple[float, float], power: int, scheme: Scheme) -> float:
    """S4: float64, one value after the other; squares are exact in it, fourth powers round (F1)."""
    total = 0.0
    for value in values:
        error = add(value, -dequantized(code(value, *pair, scheme), *pair, scheme))
        if not math.isfinite(error):
            return math.inf
        total = float(Fraction(total) + Fraction(float(Fraction(error) ** power)))
    return total


def code(value: float, scale: float, zero: float, scheme: Scheme) -> int:
    """Q1, Q2: one subtraction, one division, half to even, and only then the clamp."""
    if scheme.symmetric:
        high = (1 << (scheme.bits - 1)) - 1
        low = -high
    else:
        low, high = 0, (1 << scheme.bits) - 1
    if math.isinf(scale) or math.isinf(zero):
        return 0  # refused later (S5)
    quotient = divide(add(value, -zero), scale)
    if math.isinf(quotient):
        return high if quotient > 0 else low
    return min(max(half_even(Fraction(quotient)), low), high)


def fed_back(
    direction: list[list[float]],
    norms: list[float],
    kept: list[int],
    pairs: list[tuple[float, float]],
    feedback: tuple[list[int], list[list[float]]],
    scheme: Scheme,
) -> tuple[list[list[float]], list[float]]:
    """F1: what is coded, channel by channel, and the lengths of M2.

    With axis channel ``pairs`` are made anew.
    """
    order, factor = feedback
    tokens = range(len(direction))
    w = [list(row) for row in direction]
    errors: list[list[float]] = [[] for _ in tokens]  # in the order of coding, as what is seen is
    seen: list[list[float]] = [[] for _ in tokens]
    for r, j in enumerate(order):
        for t in tokens:
            start = direction[t][j]
            w[t][j] = moved(start, errors[t], [factor[p][r] for p in range(r)])
            seen[t].append(moved(start, seen[t], [factor[p][r] for p in range(r)]))
        if scheme.axis == "channel" and j not in kept:
            pairs[j] = scale_and_zero([w[t][j] for t in tokens], scheme, power=4)
        for t in tokens:
            if j in kept:
                y = narrow(w[t][j], "float16")
            else:
                pair = pairs[j if scheme.axis == "channel" else t]
                y = dequantized(code(w[t][j], *pair, scheme), *pair, scheme)
            errors[t].append(add(w[t][j], -y) if norms[t] != 0 else 0.0)
    weights = [factor[p][p] for p in range(len(order))]
    return w, [length_kept(seen[t], errors[t], weights) for t in tokens]


def moved(start: float, errors: list[float], shares: list[float]) -> float:
    """F1: what is left of a value as the errors before it are taken from it."""
    value = start
    for error, share in zip(errors, shares, strict=True):
        value = add(value, -multiply(error, share))
    return value if math.isfinite(value) else start


def length_kept(seen: list[float], errors: list[float], weights: list[float]) -> float:
    """M2 under feedback: the length before by the length after, as the weights see both."""
    after = [add(value, -error) for value, error in zip(seen, errors, strict=True)]
    lengths = []
    for values in seen, after:
        weighted = [multiply(weight, value) for weight, value in zip(weights, values, strict=True)]
        lengths.append(exact_norm(weighted) if all(map(math.isfinite, weighted)) else math.inf)
    return math.inf if math.inf in lengths else divide(*lengths)


def dequantized(code: int, scale: float, zero: float, scheme: Scheme) -> float:
    """D1: two roundings; one if symmetric, as nothing is added."""
    product = multiply(float(code), scale)
    return product if scheme.symmetric else add(product, zero)


def factor(
    x: list[float], y: list[float], norm: float, sizes: list[float], scheme: Scheme
) -> float:
    """M1, M2, M3, before the factor is narrowed."""
    if not scheme.separate_norm or scheme.magnitude == "norm" or math.isinf(norm):
        return norm  # infinite norms are refused, whatever is stored in their place (N1)
    if not all(map(math.isfinite, y)):  # and so are outliers that feedback moved so far (F1 O1)
        return math.inf if scheme.magnitude == "lsq" else 0.0
    if scheme.magnitude == "gain":
        sized = [divide(value, size) for value, size in zip(y, sizes, strict=True)]
        return divide(norm, exact_norm(sized)) if all(map(math.isfinite, sized)) else 0.0
    below = sum((Fraction(v) ** 2 for v in y), Fraction(0))
    above = sum((Fraction(u) * Fraction(v) for u, v in zip(x, y, strict=True)), Fraction(0))
    return rounded(above / below, SINGLE) if below else 0.0


def packed(codes: list[int], scheme: Scheme) -> list[int]:
    """P1, as bits in a row of integers."""
    offset = 2 ** (scheme.bits - 1) if scheme.symmetric else 0
    stored = [value + offset for value in codes]
    padded = stored + [offset] * 7  # enough for any byte to be filled

    def row(low: int, bits: int) -> list[int]:
        count = -(-len(stored) * bits // 8)
        per_byte = 8 // bits
        fields = [value >> low & (2**bits - 1) for value in padded]
        return [
            sum(fields[per_byte * i + k] << (bits * k) for k in range(per_byte))
            for i in range(count)
        ]

    return row(0, 2) + row(2, 1) if scheme.bits == 3 else row(0, scheme.bits)


# --- decode -------------------------------------------------------------------------------------


@in_default_environment
def decode(parts: dict[str, Any], head_dim: int, scheme: Scheme | str) -> list[list[float]]:
    """Reconstruct what `encode` returned, as ``[T][D]`` (rule D1).

    The parts may be nested lists or arrays.

    Examples
    --------
    >>> scheme = Scheme()
    >>> decode(encode([[3.0, 4.0]], scheme), 2, scheme)
    [[3.0, 4.0]]
    """
    lists = {}
    for name in STORED & parts.keys():
        take = as_integer_array if name in ("packed", "outlier_index") else as_real_array
        lists[name] = take(f"parts[{name!r}]", parts[name]).tolist()
    head_dim, scheme = as_integer("head_dim", head_dim, least=1), as_scheme("scheme", scheme)
    x_hat: list[list[float]] = decode_stages(lists, head_dim, scheme)["x_hat"]
    return x_hat


@in_default_environment
def decode_stages(parts: dict[str, Any], head_dim: int, scheme: Scheme) -> dict[str, Any]:
    """Return ``x_hat`` of `decode`, and the ``codes`` and ``y`` that lead to it, token by token."""
    tokens = len(parts["packed"])
    size = scheme.block_size or tokens
    stages: dict[str, Any] = {"codes": [], "y": [], "x_hat": []}
    for t in range(tokens):
        at = t // size if scheme.axis == "channel" else t
        codes = unpacked(parts["packed"][t], head_dim, scheme)
        y = []
        for j in range(head_dim):
            k = j if scheme.axis == "channel" else 0
            zero = 0.0 if scheme.symmetric else parts["zero"][at][k]
            y.append(dequantized(codes[j], parts["scale"][at][k], zero, scheme))
        if scheme.outlier_channels:
            for j, value in zip(
                parts["outlier_index"][t // size], parts["outliers"][t], strict=True
            ):
                y[j] = value
        stages["codes"].append(codes)
        stages["y"].append(y)
        stages["x_hat"].append(reconstructed(y, parts["norm"][t], scheme))
    return stages


def reconstructed(y: list[float], norm: float, scheme: Scheme) -> list[float]:
    """D1 from the dequantized direction on."""
    if not scheme.separate_norm:
        return y
    if scheme.magnitude == "norm":
        length = exact_norm(y)
        y = [divide(value, length) for value in y] if length else y
    return [multiply(norm, value) for value in y]


def unpacked(row: Sequence[int], head_dim: int, scheme: Scheme) -> list[int]:
    def field(first_byte: int, bits: int, j: int) -> int:
        return row[first_byte + j * bits // 8] >> (j * bits % 8) & ((1 << bits) - 1)

    offset = 2 ** (scheme.bits - 1) if scheme.symmetric else 0
    if scheme.bits != 3:
        return [field(0, scheme.bits, j) - offset for j in range(head_dim)]
    split = (2 * head_dim + 7) // 8
    return [field(0, 2, j) + 4 * field(split, 1, j) - offset for j in range(head_dim)]

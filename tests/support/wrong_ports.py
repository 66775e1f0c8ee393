"""A port of its own, written from the specification's text alone, with a knob for each decision.

It shares no code with `nsq_ref` but the scheme, works on one sequence at a time, and takes other
ways to the exact results: integers and fractions. With default knobs it conforms; each knob that is
set makes one mistake. The kit's own table of mistakes is not used: strangers judge the kit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from nsq_ref import Scheme
from nsq_ref.scheme import FLOAT_DTYPES

F16, F32, F64 = np.float16, np.float32, np.float64
BFLOAT16 = FLOAT_DTYPES["bfloat16"]
MOST = float(np.finfo(F32).max)
Array = Any
Parts = dict[str, Any]


@dataclass(frozen=True)
class Knobs:
    """The decisions of the specification; the defaults are right.

    A text names the way that is taken, a number is what is added, a flag is a mistake made or not.
    """

    # I1 I2 K1
    compute: str = "float32"  # or "input": float16 input is computed in float16
    nan: bool = False  # taken as 0, as by a maximum that skips it
    infinity: bool = False  # taken as the largest number
    sinks_float32: bool = False
    sinks_in_scale: bool = False
    sinks_coded: bool = False  # stored as sinks, but quantized and decoded first
    # N1 N2
    norm: str = "exact"
    direction: str = "divide"
    epsilon: float = 0.0  # added to the norm
    least_norm: float = 0.0
    square_epsilon: float = 0.0  # added to the sum of squares of the direction
    zero_token_coded: bool = False
    zero_token_skipped: bool = False
    least_valid_norm: float = 0.0  # tokens of smaller norm are coded as zero tokens
    # O1
    rank: str = "peak"
    equals: str = "lower"
    outlier_order: str = "ascending"
    outliers_in_scale: bool = False
    outlier_codes: bool = False
    outlier_norm: str = "all"  # or "coded": without the outlier channels
    outlier_values: str = "direction"  # or "x"
    outlier_scales: bool = False  # scales of outlier channels are stored
    # S1 to S5, Z1
    levels: float = 0.0  # more than there are
    extent: str = "own"
    scale: str = "divide"
    scale_factor: float = 1.0
    scale_shape: str = "right"
    scale_narrowing: str = "even"
    scale_overflow: str = "refuse"
    narrow_after_codes: bool = False
    zero_after_codes: bool = False
    range_from: str = "zero"  # or "minimum", unrounded
    negative_scale: str = "kept"
    least_scale: float = 0.0
    empty_scale: float = 0.0
    negative_zero: bool = False
    search: str = "right"
    # Q1 Q2
    rounding: str = "half-even"
    quotient: str = "divide"
    cast_first: bool = False
    most_negative: bool = False
    scale_epsilon: float = 0.0
    code_noise: bool = False  # one channel is one code too high
    # P1
    nibbles: str = "low-first"
    offset: str = "right"
    padding: str = "code 0"
    planes: str = "low, high"
    rows: str = "own"
    last_byte: str = "kept"
    # M1 to M4
    stored_norm: str = "narrowed"
    gain: str = "right"
    lsq: str = "right"
    factor_narrowing: str = "even"
    factor_overflow: str = "refuse"
    most_norm: float = math.inf  # larger ones are refused
    collapsed: str = "taken"  # or "refused"
    # D1 D3
    length: str = "exact"
    decode: str = "right"
    length_epsilon: float = 0.0
    product: str = "two roundings"
    zero_left_out: bool = False
    sinks_forgotten: bool = False
    outliers_late: bool = False
    outliers_forgotten: bool = False
    decode_block: int = 0  # the scale of so many blocks before
    decode_flush: bool = False
    renormalize_gain: bool = False
    decode_check: bool = True
    # structure
    dtype_of: str = ""  # a part that is stored as float32, or as other integers
    missing: str = ""
    extra: str = ""
    # B1 B2
    block: int = 0  # tokens more in a block
    blocks_from: str = "after sinks"
    blocks: str = "own"  # or "one": the scales of the whole sequence
    heads: str = "own"  # or "shared": a maximum over all sequences
    # caches
    tail: str = "raw"
    cropped: str = "decoded"
    old_scales: bool = False
    sinks_refilled: bool = True
    growing: bool = False
    stream_rows: str = "own"
    seal_late: bool = False
    sinks_kept: bool = False  # a crop to fewer tokens keeps all sinks
    # attention
    score_scale: str = "given"
    causal: str = "right"
    position: str = "last"
    window: int = 0
    window_left_out: bool = False
    softcap: str = "right"
    head_order: str = "groups"
    subtract: bool = True
    value_scheme: str = "own"
    # between calls
    state: str = "none"
    writes: bool = False

    def but(self, **changes: Any) -> Knobs:
        """Return the same knobs with some set otherwise."""
        return replace(self, **changes)


RIGHT = Knobs()


# --- exact numbers ------------------------------------------------------------------------------


def nearest(value: Fraction) -> np.float32:
    """Return the float32 nearest to a number, of two equally near the even one."""
    wide = float(value)
    if Fraction(wide) != value:  # to odd, so that the second rounding is right
        other = math.nextafter(wide, math.inf if Fraction(wide) < value else -math.inf)
        if np.float64(wide).view(np.int64) % 2 == 0:
            wide = other
    return F32(wide)


def integers(row: Array) -> list[int]:
    """Return the elements as multiples of 2^-149."""
    return [int(math.ldexp(v, 149)) for v in row.tolist()]


def exact_length(row: Array) -> np.float32:
    total = sum(v * v for v in integers(row)) << 128
    root = math.isqrt(total)
    return nearest(Fraction(2 * root + (root * root != total), 1 << (1 + 64 + 149)))


def nothing(divisor: Array) -> Array:
    """What divides by zero gives zero."""
    divisor = np.asarray(divisor)
    return np.where(divisor == 0, np.asarray(np.inf, divisor.dtype), divisor)


# --- norms --------------------------------------------------------------------------------------


def one_by_one(row: Array) -> Any:
    total = row.dtype.type(0)
    for v in row:
        total = total + v * v
    return total


def fused(row: Array) -> np.float32:
    total = F32(0)
    for v in row:
        total = F32(F64(v) * F64(v) + F64(total))
    return total


def tree(row: Array) -> np.float32:
    terms = list(row * row)
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(terms) - len(terms) % 2 :]
    return F32(terms[0])


def lanes(row: Array, count: int) -> np.float32:
    sums = [F32(0)] * count
    for j, v in enumerate(row):
        sums[j % count] = sums[j % count] + v * v
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
    return sums[0]


def rounded_down(row: Array) -> np.float32:
    right = exact_length(row)
    exact = sum(v * v for v in integers(row))
    inside = Fraction(float(right)) ** 2 * 2**298 <= exact
    return right if inside else np.nextafter(right, F32(0))


def by_logarithm(row: Array) -> np.float32:
    largest = np.max(np.abs(row))
    if largest == 0:
        return F32(0)
    total = math.fsum((v / float(largest)) ** 2 for v in row.tolist())
    return F32(np.exp(F32(0.5) * np.log(F32(total))) * largest)


NORMS: dict[str, Callable[[Array], Any]] = {
    "exact": exact_length,
    "one by one": lambda row: np.sqrt(one_by_one(row)),
    "last to first": lambda row: np.sqrt(one_by_one(row[::-1])),
    "fused": lambda row: np.sqrt(fused(row)),
    "tree": lambda row: np.sqrt(tree(row)),
    "np.sum": lambda row: np.sqrt(np.sum(row * row)),
    "np.linalg": lambda row: F32(np.linalg.norm(row)),
    "4 lanes": lambda row: np.sqrt(lanes(row, 4)),
    "32 lanes": lambda row: np.sqrt(lanes(row, 32)),
    "float16": lambda row: F32(np.sqrt(one_by_one(row.astype(F16)))),
    "float64": lambda row: F32(np.sqrt(np.sum(row.astype(F64) ** 2))),
    "order 1": lambda row: F32(np.sum(np.abs(row.astype(F64)))),
    "order -1": lambda row: F32(np.linalg.norm(row.astype(F64), -1)),
    "order inf": lambda row: np.max(np.abs(row)),
    "square": lambda row: F32(np.sum(row.astype(F64) ** 2)),
    "mean": lambda row: F32(np.sqrt(np.mean(row.astype(F64) ** 2))),
    "rounded down": rounded_down,
    "logarithm": by_logarithm,
    "even channels": lambda row: exact_length(row[::2]),
    "first 64": lambda row: exact_length(row[:64]),
    "last one out": lambda row: exact_length(row[:-1]),
    "hypot": lambda row: F32(np.hypot.reduce(row)),
}


def norms_of(x: Array, knobs: Knobs, how: str = "") -> Array:
    function = NORMS[how or knobs.norm]
    return np.array([function(row) for row in x], F32).reshape(len(x))


# --- narrowing ----------------------------------------------------------------------------------


def narrowed(value: Array, dtype: Any, how: str = "even") -> Array:
    value = np.asarray(value)
    if how == "float64":  # one rounding of what is wider
        return value.astype(dtype)
    value = value.astype(F32)
    result = value.astype(dtype)
    if how in ("truncate", "away"):
        wide = result.astype(F64)
        if how == "truncate":
            beyond = np.abs(wide) > np.abs(value)
            return np.where(beyond, np.nextafter(result, dtype.type(0)), result).astype(dtype)
        outward = np.nextafter(result, np.copysign(dtype.type(np.inf), result))
        tie = (np.abs(value) > np.abs(wide)) & (value - wide == outward.astype(F64) - value)
        return np.where(tie, outward, result).astype(dtype)
    if how == "saturate":
        top = {"float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120, "float32": MOST}[dtype.name]
        return np.clip(value, -top, top).astype(dtype)
    if how == "flush":
        least = 2.0**-14 if dtype == F16 else 2.0**-126
        return np.where(np.abs(result.astype(F64)) < least, dtype.type(0), result)
    return result


def positive_zero(value: Array, knobs: Knobs) -> Array:
    return value if knobs.negative_zero else np.where(value == 0, value.dtype.type(0), value)


def overflowing(value: Array, how: str, what: str) -> Array:
    """Refuse infinity, or store it, or the largest number in its place."""
    if how == "refuse" and not np.isfinite(value.astype(F64)).all():
        raise OverflowError(f"{what} is beyond {value.dtype}")
    return value


# --- one block ----------------------------------------------------------------------------------


def encode_block(
    x: Array, scheme: Scheme, knobs: Knobs, other: Array | None = None, old: Any = None
) -> Parts:
    """Return the parts of one block ``x[T, D]``; `other` is what wrongly enters its scales too."""
    norm, direction = normed(x, scheme, knobs)
    x = x.astype(F32)
    head_dim = x.shape[1]
    kept = min(scheme.outlier_channels, head_dim)
    index = outlier_channels(direction, kept, knobs)
    coded = np.ones(head_dim, bool)
    coded[index] = False
    if knobs.outlier_norm == "coded" and kept and scheme.separate_norm:
        norm, direction = normed(np.where(coded, x, 0), scheme, knobs)
        direction = x / nothing(norm)[:, None]
    values = x if knobs.outlier_values == "x" else direction
    outliers = positive_zero(narrowed(values[:, index], np.dtype(F16)), knobs)
    if not np.isfinite(outliers).all():
        raise OverflowError("an outlier is beyond float16")

    ranged = direction
    if knobs.zero_token_skipped:
        ranged = direction[np.any(direction != 0, axis=1)]
    if knobs.extent == "last token out" and len(ranged) > 1:
        ranged = ranged[:-1]
    if other is not None:
        ranged = np.concatenate([ranged, normed(other, scheme, knobs)[1]])
    by_channel = scheme.axis == "channel"
    enters = coded if not (knobs.outliers_in_scale and not by_channel) else np.ones(head_dim, bool)
    if by_channel and knobs.outlier_scales:
        enters = np.ones(head_dim, bool)
    low, high = extents(ranged, enters, scheme, knobs)
    if not by_channel:
        low, high = low[: len(x)], high[: len(x)]
        if knobs.zero_token_skipped and len(low) < len(x):
            whole = np.zeros((2, len(x), 1), F32)
            whole[:, np.any(direction != 0, axis=1)] = low, high
            low, high = whole
    scale, zero, wide = scale_and_zero(low, high, direction, enters, scheme, knobs)
    if old is not None and by_channel:
        scale, zero = old["scale"], old.get("zero", np.zeros_like(old["scale"]))
        wide = scale.astype(F32), zero.astype(F32)
    overflowing(scale, knobs.scale_overflow, "a scale")
    overflowing(zero, knobs.scale_overflow, "a zero")

    used = (wide[0] if knobs.narrow_after_codes else scale).astype(F32)
    used_zero = (wide[1] if knobs.zero_after_codes else zero).astype(F32)
    codes = codes_of(x, norm, direction, used, used_zero, scheme, knobs)
    if not knobs.outlier_codes:
        codes[:, ~coded] = 0
    if scheme.separate_norm and not knobs.zero_token_coded:
        codes[norm == 0] = 0

    y = dequantized(codes, scale, zero, knobs)
    y[:, index] = outliers
    parts: Parts = {"packed": packed_rows(codes, scheme, knobs)}
    if scheme.separate_norm:
        parts["norm"] = factors(x, y, norm, scheme, knobs)
    parts["scale"] = scale
    if not scheme.symmetric:
        parts["zero"] = zero
    if scheme.outlier_channels:
        order = index
        if knobs.outlier_order == "size":
            order = index[np.argsort(-np.max(np.abs(direction[:, index]), axis=0), kind="stable")]
        parts["outlier_index"] = order[None].astype(np.int32)
        parts["outliers"] = outliers[:, np.searchsorted(index, order)]
    if knobs.decode_check:
        x_hat = rebuilt(y, parts.get("norm"), scheme, RIGHT)
        if not np.isfinite(x_hat).all():
            raise OverflowError("a decoded value is beyond float32")
        if knobs.collapsed == "refused" and (x.any(axis=1) & ~x_hat.any(axis=1)).any():
            raise ValueError("a token decodes to zero")
    return parts


def normed(x: Array, scheme: Scheme, knobs: Knobs) -> tuple[Array, Array]:
    """Return norms and directions."""
    if not scheme.separate_norm:
        return np.ones(len(x), F32), x.astype(F32)
    if knobs.compute == "input" and x.dtype != F32:
        norm = np.array([np.sqrt(one_by_one(row)) for row in x], x.dtype)
        return norm.astype(F32), (x / nothing(norm)[:, None]).astype(F32)
    wide = x.astype(F32)
    norm = norms_of(wide, knobs)
    if np.isinf(norm).any() and knobs.factor_overflow == "refuse":
        raise OverflowError("a norm is beyond float32")
    if (norm > F32(knobs.most_norm)).any():
        raise OverflowError("a norm is too large")
    if knobs.least_valid_norm:
        norm = np.where(norm < F32(knobs.least_valid_norm), F32(0), norm)
    by = norm
    if knobs.direction == "narrowed":
        by = narrowed(norm, FLOAT_DTYPES[scheme.norm_dtype]).astype(F32)
    if knobs.epsilon:
        by = by + F32(knobs.epsilon)
    if knobs.least_norm:
        by = np.maximum(by, F32(knobs.least_norm))
    if knobs.square_epsilon:
        total = np.sum(wide.astype(F64) ** 2, axis=1) + knobs.square_epsilon
        by = np.sqrt(total).astype(F32)
    by = nothing(by)[:, None]
    if knobs.direction == "reciprocal":
        return norm, wide * (F32(1) / by)
    if knobs.direction == "float64":
        length = nothing(np.sqrt(np.sum(wide.astype(F64) ** 2, axis=1)))
        return norm, (wide / length[:, None]).astype(F32)
    if knobs.direction == "float16":
        return norm, (wide / by).astype(F16).astype(F32)
    return norm, wide / by


def outlier_channels(direction: Array, kept: int, knobs: Knobs) -> Array:
    """Return the ascending indices of the channels that are kept."""
    size = np.abs(direction.astype(F64))
    ranks = {
        "peak": lambda: size.max(axis=0),
        "mean": lambda: size.mean(axis=0),
        "square": lambda: (size**2).sum(axis=0),
        "value": lambda: direction.max(axis=0),
        "median": lambda: np.median(size, axis=0),
    }
    rank = ranks[knobs.rank]()
    sign = -1 if knobs.equals == "higher" else 1
    order = sorted(range(len(rank)), key=lambda j: (-rank[j], sign * j))
    return np.array(sorted(order[:kept]), int)


def extents(direction: Array, enters: Array, scheme: Scheme, knobs: Knobs) -> tuple[Array, Array]:
    """Return minimum and maximum of each scale's elements."""
    axis = 0 if scheme.axis == "channel" else 1
    if knobs.extent == "wrong axis":
        axis = 1 - axis
    chosen = np.where(enters, direction, F32(0)) if axis == 0 else direction[:, enters]
    if not chosen.shape[axis]:
        empty = np.zeros((1, chosen.shape[1]) if axis == 0 else (len(chosen), 1), F32)
        return empty, empty
    low, high = chosen.min(axis, keepdims=True), chosen.max(axis, keepdims=True)
    if knobs.extent == "quantile":
        low = np.quantile(chosen, 0.02, axis, keepdims=True).astype(F32)
        high = np.quantile(chosen, 0.98, axis, keepdims=True).astype(F32)
    elif knobs.extent == "all":
        low, high = np.broadcast_to(low.min(), low.shape), np.broadcast_to(high.max(), high.shape)
    elif knobs.extent == "signed":
        low = np.zeros_like(low)
    elif knobs.extent == "pairs" and axis == 0:  # channels 2j and 2j + 1 share a range
        for j in range(0, low.shape[1] - 1, 2):
            low[:, j : j + 2], high[:, j : j + 2] = (
                low[:, j : j + 2].min(),
                high[:, j : j + 2].max(),
            )
    elif knobs.extent == "with zero":  # a range always reaches to 0
        low, high = np.minimum(low, F32(0)), np.maximum(high, F32(0))
    elif knobs.extent == "wrong axis":
        width = direction.shape[1] if scheme.axis == "channel" else len(direction)
        low = np.resize(low.ravel(), width)
        high = np.resize(high.ravel(), width)
        shape = (1, width) if scheme.axis == "channel" else (width, 1)
        return low.reshape(shape), high.reshape(shape)
    return low, high


SHRUNKEN = (1, 0.95, 0.9, 0.85, 0.8, 0.7)


def scale_and_zero(
    low: Array, high: Array, direction: Array, enters: Array, scheme: Scheme, knobs: Knobs
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Return scale, zero and both before they were narrowed."""
    if scheme.scale_rule == "range":
        return range_scale(low, high, scheme, knobs)
    tried = []
    half = F32(0.5)
    for f in map(F32, SHRUNKEN):
        ends = low, high
        if f != 1 and scheme.symmetric:
            ends = f * low, f * high
        elif f != 1:
            middle, radius = half * high + half * low, half * high - half * low
            ends = middle - f * radius, middle + f * radius
        scale, zero, wide = range_scale(*ends, scheme, knobs)
        wide_scale, wide_zero = scale.astype(F32), zero.astype(F32)
        codes = codes_of(direction, None, direction, wide_scale, wide_zero, scheme, knobs)
        y = dequantized(codes, scale, zero, knobs)
        error = np.where(enters, direction - y, F32(0)).astype(F64) ** 2
        axis = 0 if scheme.axis == "channel" else 1
        total = np.zeros(error.shape[1 - axis])
        for i in range(error.shape[axis]):
            total = total + np.take(error, i, axis)
        tried.append((scale, zero, wide, total.reshape(scale.shape)))
    scale, zero, wide, least = tried[0]
    fits = np.isfinite(scale) & np.isfinite(zero)
    if knobs.search == "one for all":
        sums = [np.where(fits, one[3], 0).sum() for one in tried]
        return tried[int(np.argmin(sums))][:3]
    for other, other_zero, _, error in tried[1:]:
        better = (error <= least) if knobs.search == "later of equals" else (error < least)
        better &= fits
        scale, zero = np.where(better, other, scale), np.where(better, other_zero, zero)
        least = np.where(better, error, least)
    return scale, zero, (scale, zero)


def range_scale(
    low: Array, high: Array, scheme: Scheme, knobs: Knobs
) -> tuple[Array, Array, tuple[Array, Array]]:
    dtype = FLOAT_DTYPES[scheme.scale_dtype]
    how = "saturate" if knobs.scale_overflow == "saturate" else knobs.scale_narrowing
    levels = F32(
        (2 ** (scheme.bits - 1) - 1 if scheme.symmetric else 2**scheme.bits - 1) + knobs.levels
    )
    wide_zero = np.zeros_like(low)
    if scheme.symmetric:
        zero = np.zeros(low.shape, dtype)
        span = np.maximum(np.abs(low), np.abs(high))
        if knobs.range_from == "half range":
            span = F32(0.5) * (high - low)
    else:
        wide_zero = low
        zero = positive_zero(narrowed(low, dtype, how), knobs)
        span = high - (low if knobs.range_from == "minimum" else zero.astype(F32))
    if knobs.scale == "reciprocal":
        wide = span * (F32(1) / levels)
    elif knobs.scale == "narrowed maximum":
        wide = narrowed(span, dtype).astype(F32) / levels
    elif knobs.scale == "float64":  # the quotient alone would be rounded alike
        wide = (high.astype(F64) - zero.astype(F64)) / F64(levels)
        how = "float64"
    else:
        wide = span / levels
    if knobs.scale_factor != 1:
        wide = wide * F32(knobs.scale_factor)
    scale = positive_zero(narrowed(wide, dtype, how), knobs)
    if knobs.negative_scale == "zero":
        scale = np.maximum(scale, dtype.type(0))
    elif knobs.negative_scale == "magnitude":
        scale = np.abs(scale)
    if knobs.least_scale:
        scale = np.maximum(scale, dtype.type(knobs.least_scale))
    if knobs.empty_scale:
        scale = np.where(scale == 0, dtype.type(knobs.empty_scale), scale)
    return scale, zero, (wide.astype(F32), wide_zero)


# --- codes and bytes ----------------------------------------------------------------------------


def half_away(value: Array) -> Array:
    return np.copysign(np.floor(np.abs(value).astype(F64) + 0.5), value)


def half_odd(value: Array) -> Array:
    even = np.rint(value)
    return np.where(np.abs(value - np.trunc(value)) == 0.5, 2 * value.astype(F64) - even, even)


ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "half-even": np.rint,
    "half away": half_away,
    "half up": lambda v: np.floor(v.astype(F64) + 0.5),
    "half down": lambda v: np.ceil(v.astype(F64) - 0.5),
    "half to zero": lambda v: np.copysign(np.ceil(np.abs(v).astype(F64) - 0.5), v),
    "half odd": half_odd,
    "truncate": np.trunc,
    "floor": np.floor,
    "ceil": np.ceil,
    "plus half": lambda v: np.copysign(np.floor(np.abs(v) + F32(0.5)), v),
    "plus half, floor": lambda v: np.floor(v + F32(0.5)),
    "almost half": lambda v: np.trunc(v + np.copysign(F32(0.49999), v)),
    "tenths first": lambda v: np.rint(np.round(v, 1)),
}


def codes_of(
    x: Array, norm: Any, direction: Array, scale: Array, zero: Array, scheme: Scheme, knobs: Knobs
) -> Array:
    shifted = direction - zero
    by = nothing(scale + F32(knobs.scale_epsilon))
    ways: dict[str, Callable[[], Array]] = {
        "divide": lambda: shifted / by,
        "reciprocal": lambda: shifted * (F32(1) / by),
        "float64": lambda: shifted.astype(F64) / by,
        "float64 throughout": lambda: (direction.astype(F64) - zero) / by,
        "merged": lambda: x / nothing(nothing(norm)[:, None] * by) - zero / by,
        "apart": lambda: direction / by - zero / by,
        "float16": lambda: (shifted / by).astype(F16).astype(F32),
    }
    way = "divide" if norm is None and knobs.quotient == "merged" else knobs.quotient
    quotient = ways[way]()
    whole = ROUNDINGS[knobs.rounding](np.asarray(quotient))
    if knobs.code_noise:
        whole = whole + (np.arange(whole.shape[1]) == 1)
    least, most = 0, 2**scheme.bits - 1
    if scheme.symmetric:
        most = 2 ** (scheme.bits - 1) - 1
        least = -most
    if knobs.cast_first:
        whole = np.clip(np.nan_to_num(whole.astype(F64)), -(2.0**62), 2.0**62)
        whole = whole.astype(np.int64).astype(np.int8)
    whole = np.clip(whole, least - (knobs.most_negative and scheme.symmetric), most)
    return np.nan_to_num(whole).astype(np.int64)


def bit_rows(numbers: Array, width: int, filler: int) -> Array:
    """Return rows of numbers of `width` bits, the first in the lowest bits, filled to bytes."""
    per_byte = 8 // width
    missing = -numbers.shape[1] % per_byte
    filled = np.concatenate([numbers, np.full((len(numbers), missing), filler)], axis=1)
    shifts = width * np.arange(per_byte)
    grouped = filled.reshape(len(numbers), -1, per_byte) << shifts
    return grouped.sum(axis=2).astype(np.uint8)


def offset_numbers(codes: Array, scheme: Scheme, knobs: Knobs) -> Array:
    if not scheme.symmetric:
        return codes
    middle = 2 ** (scheme.bits - 1)
    return {
        "right": lambda: codes + middle,
        "one less": lambda: (codes + middle - 1) % (2 * middle),
        "two's complement": lambda: codes % (2 * middle),
        "sign": lambda: np.abs(codes) + middle * (codes < 0),
        "negated": lambda: -codes + middle,
    }[knobs.offset]()


def packed_rows(codes: Array, scheme: Scheme, knobs: Knobs) -> Array:
    bits, head_dim = scheme.bits, codes.shape[1]
    numbers = offset_numbers(codes, scheme, knobs)
    zero = int(offset_numbers(np.zeros((1, 1), int), scheme, knobs)[0, 0])
    if knobs.padding == "zero bits":
        zero = 0
    elif knobs.padding == "last code":
        zero = int(numbers[-1, -1])
    if bits == 3 and knobs.planes == "contiguous":
        run = (numbers[..., None] >> np.arange(3) & 1).reshape(len(codes), -1)
        size = -(-head_dim // 4) + -(-head_dim // 8)
        run = np.concatenate([run, np.zeros((len(run), 8 * size - run.shape[1]), int)], axis=1)
        return bit_rows(run, 1, 0)
    if bits == 3:
        low = bit_rows(numbers & 3, 2, zero & 3)
        high = bit_rows(numbers >> 2, 1, zero >> 2)
        if knobs.planes == "high bits of a byte first":
            low = bit_rows(numbers >> 1, 2, zero >> 1)
            high = bit_rows(numbers & 1, 1, zero & 1)
        both = [high, low] if knobs.planes == "high, low" else [low, high]
        return np.concatenate(both, axis=1)
    per_byte = 8 // bits
    if knobs.rows == "shared" and head_dim % per_byte:
        size = -(-head_dim // per_byte)
        flat = bit_rows(numbers.reshape(1, -1), bits, zero).ravel()
        filler = np.zeros(len(codes) * size - len(flat), np.uint8)
        return np.concatenate([flat, filler]).reshape(len(codes), size)
    if knobs.nibbles == "halves" and bits == 4 and head_dim % 2 == 0:
        numbers = numbers.reshape(len(codes), 2, -1).swapaxes(1, 2).reshape(len(codes), -1)
    if knobs.nibbles == "high-first":
        missing = -head_dim % per_byte
        filled = np.concatenate([numbers, np.full((len(codes), missing), zero)], axis=1)
        numbers = filled.reshape(len(codes), -1, per_byte)[..., ::-1].reshape(len(codes), -1)
    rows = bit_rows(numbers, bits, zero)
    if knobs.last_byte == "dropped" and head_dim % per_byte:
        rows = rows[:, :-1]
    return rows


def unpacked_rows(packed: Array, scheme: Scheme, head_dim: int, knobs: Knobs) -> Array:
    bits = scheme.bits
    rows = packed.astype(int)

    def numbers(part: Array, width: int) -> Array:
        shifts = width * np.arange(8 // width)
        if knobs.nibbles == "high-first" and width > 1:
            shifts = shifts[::-1]
        return (part[..., None] >> shifts & (2**width - 1)).reshape(len(part), -1)[:, :head_dim]

    if bits == 3:
        split = -(-head_dim // 4)
        low, high = rows[:, :split], rows[:, split:]
        if knobs.planes == "high, low":
            split = -(-head_dim // 8)
            high, low = rows[:, :split], rows[:, split:]
        if knobs.planes == "contiguous":
            run = (rows[..., None] >> np.arange(8) & 1).reshape(len(rows), -1)[:, : 3 * head_dim]
            found = (run.reshape(len(rows), head_dim, 3) << np.arange(3)).sum(axis=2)
        else:
            found = numbers(low, 2) + 4 * numbers(high, 1)
    else:
        found = numbers(rows, bits)
    if not scheme.symmetric:
        return found
    middle = 2 ** (bits - 1)
    if knobs.offset == "two's complement":
        return (found + middle) % (2 * middle) - middle
    return found - middle + (knobs.offset == "one less")


# --- the stored factor --------------------------------------------------------------------------


def ratio(x: Array, y: Array) -> np.float32:
    """Return ``<x, y> / <y, y>``, correctly rounded."""
    a, b = integers(x), integers(y)
    below = sum(v * v for v in b)
    return (
        nearest(Fraction(sum(v * w for v, w in zip(a, b, strict=True)), below)) if below else F32(0)
    )


def factors(x: Array, y: Array, norm: Array, scheme: Scheme, knobs: Knobs) -> Array:
    dtype = FLOAT_DTYPES[scheme.norm_dtype]
    how = "saturate" if knobs.factor_overflow == "saturate" else knobs.factor_narrowing
    x64, y64 = x.astype(F64), y.astype(F64)
    wide: Array = norm
    if scheme.magnitude == "norm":
        if knobs.stored_norm == "float64":
            wide, how = np.sqrt((x64**2).sum(axis=1)), "float64"
        elif knobs.stored_norm == "gain":
            wide = norm / nothing(norms_of(y, RIGHT))
        elif knobs.stored_norm == "float16 first":
            wide = norm.astype(F16).astype(F32)
    elif scheme.magnitude == "gain":
        length = nothing(norms_of(y, RIGHT))
        ways: dict[str, Callable[[], Array]] = {
            "right": lambda: norm / length,
            "norm": lambda: norm,
            "reciprocal": lambda: norm * (F32(1) / length),
            "float32 length": lambda: norm / nothing(norms_of(y, RIGHT, "one by one")),
            "inverse": lambda: length / nothing(norm),
            "float64": lambda: np.sqrt((x64**2).sum(1)) / nothing(np.sqrt((y64**2).sum(1))),
            "mean ratio": lambda: np.sum(np.abs(x64), 1) / nothing(np.sum(np.abs(y64), 1)),
        }
        wide = ways[knobs.gain]()
        how = "float64" if knobs.gain == "float64" else how
        wide = np.where(np.any(y != 0, axis=1) | (knobs.gain == "norm"), wide, 0)
    else:
        squares = nothing(np.array([one_by_one(row) for row in y], F32))
        products = np.array([np.add.accumulate(a * b)[-1] for a, b in zip(x, y, strict=True)], F32)
        ways = {
            "right": lambda: np.array([ratio(a, b) for a, b in zip(x, y, strict=True)], F32),
            "float32": lambda: products / squares,
            "float64": lambda: (x64 * y64).sum(1) / nothing((y64**2).sum(1)),
            "float64 rounded": lambda: (
                (x64 * y64).sum(1) / nothing((y64**2).sum(1))).astype(F32),
            "over x": lambda: ((x64 * y64).sum(1) / nothing((x64**2).sum(1))).astype(F32),
            "gain": lambda: norm / nothing(norms_of(y, RIGHT)),
            "norm": lambda: norm,
            "direction": lambda: np.array(
                [ratio(a / nothing(n), b) for a, b, n in zip(x, y, norm, strict=True)], F32),
            "norm times direction": lambda: norm * np.array(
                [ratio(a / nothing(n), b) for a, b, n in zip(x, y, norm, strict=True)], F32),
        }  # fmt: skip
        wide = ways[knobs.lsq]()
        how = "float64" if knobs.lsq == "float64" else how
    stored = positive_zero(narrowed(wide, dtype, how), knobs)
    return overflowing(stored, knobs.factor_overflow, "a factor")


# --- decode -------------------------------------------------------------------------------------


def dequantized(codes: Array, scale: Array, zero: Array, knobs: Knobs = RIGHT) -> Array:
    scale, zero = scale.astype(F32), zero.astype(F32)
    if knobs.product == "fused":
        return (codes.astype(F64) * scale + zero).astype(F32)
    if knobs.product == "middle":  # (u - 8) * scale + (zero + 8 * scale)
        half = F32(codes.max() // 2 + 1)
        return (codes.astype(F32) - half) * scale + (zero + half * scale)
    if knobs.zero_left_out:
        return codes.astype(F32) * scale
    return codes.astype(F32) * scale + zero


def rebuilt(y: Array, factor: Any, scheme: Scheme, knobs: Knobs) -> Array:
    if factor is None:
        return y
    factor = factor.astype(F32)[:, None]
    if scheme.magnitude != "norm" and not knobs.renormalize_gain:
        return factor * y
    length = norms_of(y, RIGHT, knobs.length)[:, None] + F32(knobs.length_epsilon)
    by = nothing(length)
    ways: dict[str, Callable[[], Array]] = {
        "right": lambda: factor * (y / by),
        "merged": lambda: (factor / by) * y,
        "product first": lambda: (factor * y) / by,
        "reciprocal": lambda: factor * (y * (F32(1) / by)),
        "float64": lambda: factor.astype(F64) * (
            y.astype(F64) / nothing(np.sqrt((y.astype(F64) ** 2).sum(1, keepdims=True)))),
        "not renormalised": lambda: factor * y,
        "by the stored norm": lambda: factor * (y / nothing(factor)),
        "unit": lambda: np.where(factor != 0, y / by, 0),
        "float16": lambda: (factor * (y / by)).astype(F16),
        "renormalised twice": lambda: factor * (
            (y / by) / nothing(norms_of(y / by, RIGHT))[:, None]),
    }  # fmt: skip
    return ways[knobs.decode]().astype(F32)


def decode_block(parts: Parts, scheme: Scheme, head_dim: int, knobs: Knobs) -> Array:
    codes = unpacked_rows(parts["packed"], scheme, head_dim, knobs)
    scale = parts["scale"]
    y = dequantized(codes, scale, parts.get("zero", np.zeros_like(scale)), knobs)
    late = scheme.outlier_channels and knobs.outliers_late
    if scheme.outlier_channels and not knobs.outliers_late and not knobs.outliers_forgotten:
        y[:, parts["outlier_index"][0]] = parts["outliers"].astype(F32)
    if knobs.decode_flush:
        y = np.where(np.abs(y) < 2.0**-126, F32(0), y)
    x_hat = rebuilt(y, parts.get("norm"), scheme, knobs)
    if late:
        kept = parts["outliers"].astype(F32)
        x_hat[:, parts["outlier_index"][0]] = (
            kept if "norm" not in parts else parts["norm"].astype(F32)[:, None] * kept
        )
    return np.where(np.abs(x_hat) < 2.0**-126, F32(0), x_hat) if knobs.decode_flush else x_hat


# --- sequences ----------------------------------------------------------------------------------


def block_starts(tokens: int, scheme: Scheme, knobs: Knobs) -> list[tuple[int, int]]:
    if not tokens:
        return []
    size = max((scheme.block_size or tokens) + (knobs.block if scheme.block_size else 0), 1)
    shift = 0
    if knobs.blocks_from == "first token" and scheme.block_size:
        shift = scheme.sink_tokens
    edges = [0, *(e for e in range(size - shift, tokens, size) if e > 0), tokens]
    return list(itertools.pairwise(edges))


def joined(blocks: Sequence[Parts]) -> Parts:
    return {name: np.concatenate([one[name] for one in blocks]) for name in blocks[0]}


def no_tokens(scheme: Scheme, head_dim: int) -> Parts:
    scales = FLOAT_DTYPES[scheme.scale_dtype]
    per_byte = {8: 1, 4: 2, 2: 4}
    row = (
        -(-head_dim // 4) + -(-head_dim // 8)
        if scheme.bits == 3
        else -(-head_dim // per_byte[scheme.bits])
    )
    parts: Parts = {"packed": np.zeros((0, row), np.uint8)}
    if scheme.separate_norm:
        parts["norm"] = np.zeros(0, FLOAT_DTYPES[scheme.norm_dtype])
    shape = (0, head_dim if scheme.axis == "channel" else 1)
    parts["scale"] = np.zeros(shape, scales)
    if not scheme.symmetric:
        parts["zero"] = np.zeros(shape, scales)
    if scheme.outlier_channels:
        kept = min(scheme.outlier_channels, head_dim)
        parts["outlier_index"] = np.zeros((0, kept), np.int32)
        parts["outliers"] = np.zeros((0, kept), F16)
    return parts


def encode_sequence(x: Array, scheme: Scheme, knobs: Knobs, shared: Array | None = None) -> Parts:
    sinks, rest = x[: scheme.sink_tokens], x[scheme.sink_tokens :]
    spans = block_starts(len(rest), scheme, knobs)
    other = shared
    if knobs.sinks_in_scale and len(sinks):
        other = sinks
    if knobs.blocks == "one" and len(spans) > 1:
        other = rest
    blocks = [encode_block(rest[a:b], scheme, knobs, other) for a, b in spans]
    parts = joined(blocks) if blocks else no_tokens(scheme, x.shape[1])
    if knobs.scale_shape == "per token" and scheme.axis == "channel":
        parts["scale"] = np.resize(parts["scale"], (len(rest), 1))
    elif knobs.scale_shape == "one":
        parts["scale"] = parts["scale"].max().reshape(1, 1)
    if scheme.sink_tokens:
        kept = sinks.astype(F32) if knobs.sinks_float32 else sinks
        if knobs.sinks_coded and len(sinks):
            coded = encode_block(sinks, scheme, RIGHT)
            kept = decode_block(coded, scheme, x.shape[1], RIGHT).astype(x.dtype)
        parts["sinks"] = kept
    return parts


def sequences(x: Array) -> Iterator[Array]:
    yield from x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def refuse(x: Array, knobs: Knobs) -> None:
    wide = x.astype(F32)
    if np.isnan(wide).any() and not knobs.nan:
        raise ValueError("x has NaN")
    if np.isinf(wide).any() and not knobs.infinity:
        raise ValueError("x has infinity")


class Port:
    """An implementation with knobs; it may keep something between calls.

    Parameters
    ----------
    knobs : Knobs
        The mistakes that it makes; none by default.
    """

    def __init__(self, knobs: Knobs = RIGHT) -> None:
        self.knobs = knobs
        self._largest: dict[Any, Any] = {}

    # --- encode

    def encode(self, x: Array, scheme: Scheme) -> Parts:
        knobs = self.knobs
        with np.errstate(all="ignore"):
            refuse(x, knobs)
            if knobs.nan:
                x = np.where(np.isnan(x.astype(F32)), x.dtype.type(0), x)
            if knobs.infinity:
                x = np.where(np.isinf(x.astype(F32)), x.dtype.type(1), x)
            shared = x.reshape(-1, x.shape[-1]) if knobs.heads == "shared" and x.ndim > 2 else None
            found = [encode_sequence(one, scheme, knobs, shared) for one in sequences(x)]
            lead = x.shape[:-2]
            parts = {
                name: np.stack([one[name] for one in found]).reshape(*lead, *found[0][name].shape)
                for name in found[0]
            }
        self._keep(parts)
        if knobs.dtype_of:
            part = parts[knobs.dtype_of]
            other = {"u": np.int32, "i": np.uint8}.get(part.dtype.kind, F32)
            parts[knobs.dtype_of] = part.astype(other)
        if knobs.missing:
            del parts[knobs.missing]
        if knobs.extra:
            parts[knobs.extra] = np.zeros_like(parts["scale"])
        if knobs.writes:
            x *= 0
        return parts

    def _keep(self, parts: Parts) -> None:
        """Let earlier calls show in a result."""
        key = parts["scale"].shape
        if self.knobs.state == "scales by shape":
            parts["scale"] = self._largest.setdefault(key, parts["scale"])
        elif self.knobs.state == "largest scale":
            before = self._largest.get(key, parts["scale"])
            parts["scale"] = self._largest[key] = np.maximum(before, parts["scale"])
        elif self.knobs.state == "bytes not cleared":
            memory = self._largest.setdefault("bytes", np.zeros(1 << 16, np.uint8))
            packed = memory[: parts["packed"].size].reshape(parts["packed"].shape)
            packed |= parts["packed"]
            parts["packed"] = packed

    # --- decode

    def decode(self, parts: Mapping[str, Array], scheme: Scheme, shape: tuple[int, ...]) -> Array:
        lead = shape[:-2]
        count = math.prod(lead)
        flat = {name: part.reshape(count, *part.shape[len(lead) :]) for name, part in parts.items()}
        with np.errstate(all="ignore"):
            found = [
                self._decode_one({n: p[i] for n, p in flat.items()}, scheme, shape[-1])
                for i in range(count)
            ]
        x_hat = np.stack(found).reshape(shape)
        if self.knobs.state == "buffer":
            buffer = self._largest.setdefault(shape, np.empty(shape, F32))
            buffer[...] = x_hat
            return buffer
        return x_hat

    def _decode_one(self, parts: Parts, scheme: Scheme, head_dim: int) -> Array:
        knobs = self.knobs
        decoded = [
            decode_block(one, scheme, head_dim, knobs) for one in self._blocks(parts, scheme)
        ]
        if scheme.sink_tokens:
            sinks = parts["sinks"].astype(F32)
            if knobs.sinks_forgotten:
                sinks = np.zeros_like(sinks)
            decoded.insert(0, sinks)
        return np.concatenate(decoded) if decoded else np.zeros((0, head_dim), F32)

    def _blocks(self, parts: Parts, scheme: Scheme) -> Iterator[Parts]:
        tokens = len(parts["packed"])
        for b, (start, stop) in enumerate(block_starts(tokens, scheme, self.knobs)):
            block = {}
            for name, part in parts.items():
                by_block = name == "outlier_index" or (
                    name in ("scale", "zero") and scheme.axis == "channel"
                )
                if name == "sinks":
                    continue
                if by_block:
                    which = min(b, len(part) - 1)
                    if name != "outlier_index":
                        which = max(which - self.knobs.decode_block, 0)
                    block[name] = part[which : which + 1]
                else:
                    block[name] = part[start:stop]
            yield block

    # --- caches

    def stream(self, x: Array, scheme: Scheme, steps: Array, row: int) -> Parts:
        refuse(x, self.knobs)
        with np.errstate(all="ignore"):
            cache = Cache(scheme, self.knobs, x.dtype, x.shape[-1])
            if self.knobs.stream_rows == "shared":
                others = np.delete(x, row, axis=0)
                cache.others = others.reshape(-1, x.shape[-1]) if len(others) else None
            at = 0
            for step in steps.tolist():
                if step[0] == 0:
                    cache.append(x[row, at : at + step[1 + row]])
                    at += step[1 + row]
                else:
                    cache.crop(step[1 + row])
            return cache.stored()

    # --- attention

    def attend(
        self, query: Array, keys: Mapping[str, Any], values: Mapping[str, Any], key_scheme: Scheme,
        value_scheme: Scheme, *, scale: float, causal: bool, softcap: float | None,
        sliding_window: int | None,
    ) -> Array:  # fmt: skip
        knobs = self.knobs
        if knobs.value_scheme == "of the keys":
            values = {**values, "scale": np.resize(keys["scale"], values["scale"].shape)}
        k, v = (
            self.decode({n: p for n, p in side.items() if n != "shape"}, s, tuple(side["shape"]))
            for side, s in ((keys, key_scheme), (values, value_scheme))
        )
        heads, queries, head_dim = query.shape
        groups, tokens = len(k), k.shape[1]
        factor = F32({
            "given": scale, "none": 1.0, "1 / D": 1 / head_dim, "1 / sqrt(D)": head_dim**-0.5,
        }[knobs.score_scale])  # fmt: skip
        cap = None if knobs.softcap == "none" else softcap
        window = None if knobs.window_left_out else sliding_window
        output = np.zeros((heads, queries, v.shape[-1]), F32)
        with np.errstate(all="ignore"):
            for h in range(heads):
                group = h // (heads // groups)
                if knobs.head_order == "in turn":
                    group = h % groups
                for i in range(queries):
                    position = tokens - queries + i if knobs.position == "last" else i
                    seen = np.ones(tokens, bool)
                    if causal and knobs.causal != "ignored":
                        shift = {"right": 0, "one more": 1, "one less": -1}[knobs.causal]
                        seen &= np.arange(tokens) <= position + shift
                    if window is not None:
                        seen &= np.arange(tokens) > position - window - knobs.window
                    s = (k[group] @ query[h, i]) * factor
                    if knobs.softcap == "after the mask" and cap is not None:
                        s = np.where(seen, s, F32(-1e30))
                        s = F32(cap) * np.tanh(s / F32(cap))
                        seen[:] = True
                    elif cap is not None:
                        s = F32(cap) * np.tanh(s / F32(cap))
                    if not seen.any():
                        continue
                    if knobs.subtract:
                        s = s - s[seen].max()
                    p = np.where(seen, np.exp(s), F32(0))
                    output[h, i] = (p / p.sum()) @ v[group]
        return output


class Cache:
    """One row of a cache that grows and is cropped."""

    def __init__(self, scheme: Scheme, knobs: Knobs, dtype: Any, head_dim: int) -> None:
        self.scheme, self.knobs, self.dtype, self.head_dim = scheme, knobs, dtype, head_dim
        self.size = int(scheme.block_size or 1) + knobs.block
        self.sinks: list[Array] = []
        self.blocks: list[Parts] = []
        self.tail: list[Array] = []
        self.raw: list[Array] = []  # all that came, for the mistake of keeping it
        self.old: Any = None
        self.others: Any = None
        self.was_full = False

    def append(self, tokens: Array) -> None:
        for token in tokens:
            self.raw.append(token)
            refilled = self.knobs.sinks_refilled or not self.was_full
            if len(self.sinks) < self.scheme.sink_tokens and refilled:
                self.sinks.append(token)
                continue
            self.was_full = True
            if self.knobs.seal_late and len(self.tail) == self.size:
                self.seal()
            self.tail.append(token)
            if len(self.tail) == self.size and not self.knobs.seal_late:
                self.seal()

    def seal(self) -> None:
        x = np.array(self.tail, self.dtype)
        other = self.others
        if self.knobs.sinks_in_scale and self.sinks:
            other = np.array(self.sinks, self.dtype)
        if self.knobs.growing and self.blocks:
            count = len(self.raw)
            other = np.array(self.raw[len(self.sinks) : count], self.dtype)
        old = self.old if self.knobs.old_scales else None
        self.blocks.append(encode_block(x, self.scheme, self.knobs, other, old))
        self.tail, self.old = [], None

    def crop(self, length: int) -> None:
        sinks = len(self.sinks)
        count = max(length - sinks, 0)
        if not self.knobs.sinks_kept:
            self.sinks = self.sinks[:length]
        whole = min(count // self.size, len(self.blocks))
        rest = count - whole * self.size
        if whole < len(self.blocks):
            block = self.blocks[whole]
            self.old = block if rest else None
            self.tail = self.survivors(block, rest, sinks + whole * self.size)
        else:
            self.tail = self.tail[:rest]
        self.blocks = self.blocks[:whole]
        self.raw = self.raw[:length]

    def survivors(self, block: Parts, count: int, first: int) -> list[Array]:
        if self.knobs.cropped == "raw":
            return self.raw[first : first + count]
        decoded = decode_block(block, self.scheme, self.head_dim, RIGHT)[:count]
        if self.knobs.cropped == "overflow":
            return list(decoded.astype(self.dtype))
        if self.knobs.cropped == "truncated":
            return list(narrowed(narrowed(decoded, self.dtype, "saturate"), self.dtype)
                        if self.dtype == F32 else cut_off(decoded, self.dtype))  # fmt: skip
        if self.knobs.cropped == "dropped":
            return []
        return list(narrowed(decoded, self.dtype, "saturate"))

    def stored(self) -> Parts:
        parts = joined(self.blocks) if self.blocks else no_tokens(self.scheme, self.head_dim)
        if self.scheme.sink_tokens:
            sinks = np.array(self.sinks, self.dtype).reshape(-1, self.head_dim)
            parts["sinks"] = sinks.astype(F32) if self.knobs.sinks_float32 else sinks
        tail = np.array(self.tail, self.dtype).reshape(-1, self.head_dim)
        if self.knobs.tail == "quantized" and len(tail):
            coded = encode_block(tail, self.scheme, RIGHT)
            tail = decode_block(coded, self.scheme, self.head_dim, RIGHT).astype(self.dtype)
        elif self.knobs.tail == "float32":
            tail = tail.astype(F32)
        elif self.knobs.tail == "float16":
            tail = tail.astype(F16).astype(self.dtype)
        parts["tail"] = tail
        return parts


def cut_off(value: Array, dtype: Any) -> Array:
    return narrowed(narrowed(value, dtype, "truncate"), dtype, "saturate")

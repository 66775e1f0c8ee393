"""Wrong balanced norms (rule N3), and gains that know nothing of them (M2)."""

from __future__ import annotations

from typing import Any

import numpy as np

from nsq_ref.conformance.mistakes.arithmetic import divisor, length_in_float64
from nsq_ref.conformance.mistakes.changes import (
    ENCODE,
    F32,
    F64,
    Function,
    after,
    around,
    instead,
    knowing_both,
    place,
)
from nsq_ref.conformance.mistakes.reference import Change, Mistake, Reference
from nsq_ref.scheme import Scheme

ONE_CALL = ("encode",)  # where all of a sequence is known
BLOCKS_OF_SEARCH = 64  # whose sizes are remembered

_sizes = place("spec.channel_sizes", "N3", ENCODE)
_norms = place("spec.norms_and_sizes", "N3", ENCODE)
_spread = place("spec.spread", "N3", ENCODE)
_spread_of = place("spec.spread_of", "N3", ENCODE)


def _largest(reference: Reference, x: Any, scheme: Scheme) -> Any:
    return np.max(np.abs(x), axis=-2, keepdims=True)


def _over_sizes(reference: Reference, x: Any, size: Any) -> Any:
    return reference.spec.length_if_finite(x / size)


def _smaller(reference: Reference, x: Any, balanced: Any, plain: Any, scheme: Scheme) -> Any:
    spread = reference.spec.spread
    return spread(x, balanced) < spread(x, plain)


def _otherwise(
    *, peaks: Function = _largest, norms: Function = _over_sizes, smaller: Function = _smaller
) -> Change:
    """N3 with some of its decisions taken otherwise."""

    def norms_and_sizes(original: Function, reference: Reference, x: Any, scheme: Scheme) -> Any:
        if scheme.norm_rule == "plain":
            return original(x, scheme)
        plain = reference.rounding.norm(x)
        size = reference.spec.channel_sizes(peaks(reference, x, scheme))
        balanced = norms(reference, x, size)
        taken = np.isfinite(balanced).all(axis=-1)
        taken &= smaller(reference, x, balanced, plain, scheme)
        return (
            np.where(taken[..., None], balanced, plain),
            np.where(taken[..., None, None], size, F32(1)),
        )

    return knowing_both(norms_and_sizes)


# --- sizes --------------------------------------------------------------------------------------


def _at_least(least: float) -> Change:
    """Bound sizes otherwise; what is 0 all the same divides nothing."""

    def sizes(peak: Any) -> Any:
        share = np.maximum(peak / divisor(np.max(peak, axis=-1, keepdims=True)), F32(least))
        return np.where(share == 0, F32(1), share)

    return instead(sizes)


def _root_of_mean_square(reference: Reference, x: Any, scheme: Scheme) -> Any:
    return np.sqrt(np.mean(np.square(x, dtype=F64), axis=-2, keepdims=True)).astype(F32)


def _without_outlier_channels(reference: Reference, x: Any, scheme: Scheme) -> Any:
    """Give outlier channels the size of the largest other one."""
    spec, peak = reference.spec, _largest(reference, x, scheme)
    direction = spec.direction_of(x, reference.rounding.norm(x))
    kept = spec.mark(spec.outlier_channels(direction, scheme), x.shape[-1])
    return np.where(kept, np.max(np.where(kept, F32(0), peak), axis=-1, keepdims=True), peak)


def _of_all_heads(original: Function, peak: Any) -> Any:
    if peak.ndim < 3 or not peak.size:
        return original(peak)
    most = np.max(peak, axis=tuple(range(peak.ndim - 2)), keepdims=True)
    return np.broadcast_to(original(most), peak.shape)


def _power_of_two(size: Any, *_: Any) -> Any:
    return np.ldexp(F32(1), np.frexp(size)[1] - 1)


def _remember_whole(original: Function, reference: Reference, x: Any, scheme: Scheme) -> Any:
    reference.whole = np.max(np.abs(x), axis=-2, keepdims=True)
    return original(x, scheme)


def _of_whole(original: Function, reference: Reference, peak: Any) -> Any:
    return original(np.broadcast_to(reference.whole, peak.shape))


# --- norms and directions -----------------------------------------------------------------------


def _by_reciprocals(reference: Reference, x: Any, size: Any) -> Any:
    return reference.spec.length_if_finite(x * (F32(1) / size))


def _in_float64(reference: Reference, x: Any, size: Any) -> Any:
    with np.errstate(over="ignore"):
        return length_in_float64(x.astype(F64) / size).astype(F32)


def _remember_sizes(original: Function, reference: Reference, x: Any, scheme: Scheme) -> Any:
    known, reference.sizes = getattr(reference, "sizes", {}), {}  # spreads are to be right
    norm, size = original(x, scheme)
    key = norm.shape, norm.tobytes()
    reference.sizes = {**dict([*known.items()][-BLOCKS_OF_SEARCH:]), key: size}
    return norm, size


def _direction_over_sizes(original: Function, reference: Reference, x: Any, norm: Any) -> Any:
    size = getattr(reference, "sizes", {}).get((norm.shape, norm.tobytes()), F32(1))
    return original(x / size, norm)


# --- the choice ---------------------------------------------------------------------------------


def _choice(function: Function) -> Change:
    """Take balanced norms where ``function(spread of these, spread of plain ones)``."""

    def smaller(reference: Reference, x: Any, balanced: Any, plain: Any, scheme: Scheme) -> Any:
        return function(reference.spec.spread(x, balanced), reference.spec.spread(x, plain))

    return _otherwise(smaller=smaller)


def _alike(reference: Reference, x: Any, balanced: Any, plain: Any, scheme: Scheme) -> Any:
    """Choose for all sequences of a call at once."""
    if not x.size:
        return np.zeros(x.shape[:-2], bool)
    spread = reference.spec.spread
    fewer = np.sum(spread(x, balanced)) < np.sum(spread(x, plain))
    return np.broadcast_to(fewer, x.shape[:-2])


def _outliers_left_out(
    reference: Reference, x: Any, balanced: Any, plain: Any, scheme: Scheme
) -> Any:
    """Let outlier channels have no growth."""
    spec, spreads = reference.spec, []
    for norm in (balanced, plain):
        direction = spec.direction_of(x, norm)
        kept = spec.mark(spec.outlier_channels(direction, scheme), x.shape[-1])[..., 0, :]
        ranges = np.where(kept, F32(0), np.ptp(direction, axis=-2))
        spreads.append(spec.spread_of(ranges, np.ptp(x, axis=-2), norm))
    return spreads[0] < spreads[1]


def _without_zero_tokens(reference: Reference, x: Any, norm: Any) -> Any:
    kept = (norm != 0)[..., None]

    def ranges(values: Any) -> Any:
        high = np.max(values, axis=-2, where=kept, initial=-np.inf)
        low = np.min(values, axis=-2, where=kept, initial=np.inf)
        return np.where(high < low, F32(0), high - low)

    spec = reference.spec
    return spec.spread_of(ranges(spec.direction_of(x, norm)), ranges(x), norm)


def _growth(after_norms: Any, before: Any) -> Any:
    return np.where(after_norms == 0, F32(0), after_norms / before)


def _product(norms: Function, growths: Function, dtype: Any = F64, *, growth: Any = _growth) -> Any:
    """Return N3's spread with other summands, or of another dtype."""

    def spread_of(after_norms: Any, before: Any, norm: Any) -> Any:
        parts = norms(norm.astype(dtype)), growths(growth(after_norms, before).astype(dtype))
        sums = [np.add.accumulate(part, axis=-1)[..., -1] for part in parts]
        return np.asarray(sums[0] * sums[1])

    return instead(spread_of)


def _zero_range_as_it_is(after_norms: Any, before: Any) -> Any:
    return after_norms / before


def _constant_channels_left_out(after_norms: Any, before: Any) -> Any:
    return np.where(before == 0, F32(0), _growth(after_norms, before))


def _ones(values: Any) -> Any:
    return np.ones_like(values[..., :1])


def _plain_gain(
    original: Function, x: Any, y: Any, norm: Any, scheme: Scheme, length: Any = None,
    size: Any = 1,
) -> Any:  # fmt: skip
    return original(x, y, norm, scheme, length)


def _gain_of_product(
    original: Function, x: Any, y: Any, norm: Any, scheme: Scheme, length: Any = None,
    size: Any = 1,
) -> Any:  # fmt: skip
    return original(x, y, norm, scheme, length, F32(1) / size)


BALANCED = [
    _norms("never balanced", "norms are plain in blocks that are to have balanced ones",
        _choice(lambda balanced, plain: np.zeros_like(plain, bool))),
    _norms("always balanced",
        "norms are balanced in blocks whose plain ones have no larger spread",
        _choice(lambda balanced, plain: np.ones_like(plain, bool))),
    _norms("balanced at equal spreads",
        "norms are balanced where both spreads are equal; only a smaller one is to do that",
        _choice(lambda balanced, plain: balanced <= plain)),
    _norms("balanced where that spreads more",
        "norms are balanced where the spread is larger by it; it is to be smaller",
        _choice(lambda balanced, plain: balanced > plain)),
    _norms("sizes by the root of the mean square",
        "sizes of channels are of the root of the mean square, not of the largest magnitude",
        _otherwise(peaks=_root_of_mean_square)),
    _norms("sizes by the mean", "sizes of channels are of the mean, not of the largest magnitude",
        _otherwise(peaks=lambda reference, x, scheme: np.mean(
            np.abs(x, dtype=F64), axis=-2, keepdims=True).astype(F32))),
    _norms("sizes without signs",
        "sizes of channels are of the largest value, not of the largest magnitude",
        _otherwise(peaks=lambda reference, x, scheme: np.abs(
            np.max(x, axis=-2, keepdims=True)))),
    _sizes("sizes not over the largest",
        "sizes are the largest magnitudes themselves, not over that of the block",
        instead(lambda peak: np.maximum(peak, F32(2.0**-12)))),
    _sizes("sizes over the mean",
        "sizes are over the mean of all channels, not over the largest",
        instead(lambda peak: np.maximum(
            peak / divisor(np.mean(peak, axis=-1, keepdims=True)), F32(2.0**-12)))),
    _sizes("sizes without a bound", "sizes may be less than 2^-12, which is to bound them",
        _at_least(0)),
    *(_sizes(f"sizes of at least {least:g}",
          f"sizes are bounded below by {least:g}, not by 2^-12", _at_least(least))
      for least in (1e-12, 1e-6, 1e-3)),
    _sizes("sizes of powers of two", "sizes are rounded down to powers of two; take quotients",
        after(_power_of_two)),
    _sizes("sizes in float16", "sizes are narrowed to float16; they are float32",
        after(lambda size, *_: size.astype(np.float16).astype(F32))),
    Mistake("sizes of the whole sequence", "N3",
        "sizes of channels are of the whole sequence; each block has its own", ONE_CALL,
        {"spec.encode_blocks": knowing_both(_remember_whole),
         "model.norms_and_sizes": knowing_both(_remember_whole),
         "spec.channel_sizes": knowing_both(_of_whole)}),
    _sizes("sizes shared by heads", "sizes of channels are shared by sequences (heads, rows)",
        around(_of_all_heads)),
    _norms("sizes without outlier channels",
        "outlier channels have no part in sizes; sizes are of all channels",
        _otherwise(peaks=_without_outlier_channels)),
    _norms("reciprocals of sizes", "norms are of x * (1 / size), which rounds twice",
        _otherwise(norms=_by_reciprocals)),
    _norms("balanced norms in double precision",
        "norms are of float64 quotients by sizes; each is to be rounded to float32",
        _otherwise(norms=_in_float64)),
    _norms("one choice for all heads",
        "one spread of all sequences (heads, rows) decides; each block has its own",
        _otherwise(smaller=_alike)),
    _norms("outlier channels without growth",
        "outlier channels have no part in the spread; it is of all channels",
        _otherwise(smaller=_outliers_left_out)),
    _spread("ranges without zero tokens",
        "zero tokens have no part in the ranges of the spread; their direction 0 does",
        knowing_both(lambda original, *known: _without_zero_tokens(*known))),
    _spread_of("growth without squares", "the spread is of sums of growth, not of its squares",
        _product(np.square, lambda growth: growth)),
    _spread_of("norms without squares", "the spread is of sums of norms, not of their squares",
        _product(lambda norm: norm, np.square)),
    _spread_of("spread without norms", "the spread is the sum of growth alone, without the norms'",
        _product(_ones, np.square)),
    _spread_of("spread without growth", "the spread is the sum of norms alone, without growth",
        _product(np.square, _ones)),
    _spread_of("ranges in place of growth",
        "the spread is of the directions' ranges, not of these over the ranges of x",
        _product(np.square, np.square, growth=lambda after_norms, before: after_norms)),
    _spread_of("growth of zero channels",
        "0 / 0 is the growth of a zero channel, so that no spread is smaller; it is to be 0",
        _product(np.square, np.square, growth=_zero_range_as_it_is)),
    _spread_of("constant channels without growth",
        "channels that are constant have no growth; it is to be infinite",
        _product(np.square, np.square, growth=_constant_channels_left_out)),
    _spread_of("spread in float32", "spreads are made in float32; their sums are of float64",
        _product(np.square, np.square, F32)),
    Mistake("direction over sizes", "N3",
        "directions are x / size / norm; sizes are in the norm only", ENCODE,
        {"spec.norms_and_sizes": knowing_both(_remember_sizes),
         "spec.direction_of": knowing_both(_direction_over_sizes)}),
    place("spec.factor", "M2", ENCODE)("gain without sizes",
        "gains are norm / ||y||; where norms are balanced they are norm / ||y / size||",
        around(_plain_gain)),
    place("spec.factor", "M2", ENCODE)("gain of y times sizes",
        "gains are norm / ||y * size||; y is to be divided by sizes as x is",
        around(_gain_of_product)),
]  # fmt: skip

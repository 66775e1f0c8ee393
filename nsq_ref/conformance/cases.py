"""Engineered cases for any scheme: data on which each decision of the specification shows.

Random data certifies nothing here: a wrong rounding agrees with the right one nearly everywhere.
So cases lie on ties, next to ties, and at the ends of every range, and where that cannot be
computed, they are picked from a pool: those on which a known wrong arithmetic gives other bytes.

All draws come from the raw words of `numpy.random.PCG64` and from operations that every platform
rounds alike, so that each version of NumPy makes the same cases, byte for byte.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nsq_ref import rounding, spec
from nsq_ref.conformance import model
from nsq_ref.conformance.frames import scheme_array
from nsq_ref.conformance.operations import OPERATIONS, Case
from nsq_ref.scheme import FLOAT_DTYPES, Scheme

__all__ = ["FLAGS", "Flag", "cases"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
FLOAT16: np.dtype[Any] = np.dtype(np.float16)
MOST = float(np.finfo(np.float32).max)
POOL = 1024  # blocks from which those are picked that tell wrong arithmetic from right


@dataclass(frozen=True)
class Flag:
    """Why cases exist.

    Parameters
    ----------
    rule : str
        The id of the rule that they are about.
    bug_type : str
        The kind of mistake that they find, for programs that group results.
    description : str
        One or two sentences for the implementer.
    """

    rule: str
    bug_type: str
    description: str


FLAGS: dict[str, Flag] = {
    "ordinary": Flag(
        "S1", "Basic", "Bell-shaped random data of many shapes: whether it works at all."
    ),
    "leading-axes": Flag(
        "B2",
        "Shape",
        "Heads of very different magnitude: no scale may be shared between sequences.",
    ),
    "exact-tie": Flag(
        "Q1",
        "RoundingMode",
        "Quotients of exactly k + 1/2 in real numbers, and their neighbours one ulp off. "
        "They round to the even code.",
    ),
    "half-even": Flag(
        "Q1",
        "RoundingMode",
        "Quotients that are k + 1/2 once they are float32. Rounding half away from zero, or "
        "floor(q + 0.5), gives another code.",
    ),
    "input-dtype": Flag(
        "I1",
        "InputDtype",
        "float16 and bfloat16 input is widened to float32 before anything is computed.",
    ),
    "not-finite": Flag(
        "I2",
        "Validation",
        "NaN or infinity anywhere refuses the array; a maximum that skips NaN would let it pass.",
    ),
    "zero-token": Flag(
        "N2",
        "SpecialValue",
        "A zero token among others: its norm is 0, its direction 0, and it counts in "
        "minimum and maximum.",
    ),
    "zero-channel": Flag(
        "S3", "SpecialValue", "A channel of zeros: its scale is 0, its codes are 0."
    ),
    "negative-zero": Flag(
        "Z1",
        "SpecialValue",
        "Zeros of both signs: no stored scale, zero or outlier is negative zero.",
    ),
    "block-boundary": Flag(
        "B1",
        "Blocks",
        "Lengths around multiples of the block size, blocks of very different scale.",
    ),
    "sinks": Flag("K1", "Sinks", "Fewer tokens than sinks, as many, and one more."),
    "reciprocal-of-scale": Flag(
        "Q1",
        "Arithmetic",
        "Near-ties where multiplying by 1 / scale gives another code than dividing by the scale.",
    ),
    "merged-division": Flag(
        "Q1",
        "Arithmetic",
        "Near-ties where x / (norm * scale), or (direction - zero) / scale in any other "
        "order of operations, gives another code.",
    ),
    "double-precision-quotient": Flag(
        "Q1", "Precision", "Near-ties that float32 rounds onto the tie and float64 does not."
    ),
    "unnarrowed-scale": Flag(
        "S3",
        "Precision",
        "Near-ties where the scale or zero before narrowing gives another code than the "
        "stored one.",
    ),
    "scale-epsilon": Flag(
        "S3", "Epsilon", "Near-ties and small scales, on which an epsilon added to the scale shows."
    ),
    "scale-narrowing": Flag(
        "S3",
        "Precision",
        "Scales and zeros next to ties of their dtype: a multiplication by 1 / levels, the "
        "unrounded minimum, or ties away from zero give another one.",
    ),
    "outlier-narrowing": Flag(
        "O1",
        "Precision",
        "Outlier directions next to ties of float16: they are rounded to float32 first.",
    ),
    "reciprocal-of-norm": Flag(
        "N2",
        "Arithmetic",
        "Near-ties where multiplying by 1 / norm gives another direction, and so another code.",
    ),
    "norm-epsilon": Flag(
        "N2",
        "Epsilon",
        "Near-ties of tokens of small norm, on which an epsilon added to the norm shows.",
    ),
    "norm-before-narrowing": Flag(
        "N2",
        "Precision",
        "Near-ties where the narrowed norm gives another code than the float32 norm.",
    ),
    "norm-accumulation": Flag(
        "N1",
        "Precision",
        "Tokens whose norm, summed in float32 in any order, changes a code or the stored norm.",
    ),
    "factor-narrowing": Flag(
        "M1",
        "Precision",
        "Norms or gains next to ties of their dtype: float32 sums, a reciprocal, or float64 "
        "narrowed at once give another one.",
    ),
    "norm-midpoint": Flag(
        "N1",
        "Precision",
        "Norms half way between two float32, and off it by less than float64 can see. The "
        "exact sum of squares decides.",
    ),
    "tiny-norm": Flag(
        "N1",
        "Range",
        "Tokens whose squares underflow or overflow float32; they are coded like any other.",
    ),
    "norm-narrowing": Flag(
        "M1",
        "Precision",
        "Norms on ties of norm_dtype, subnormal ones, and ones that become 0. They are "
        "rounded to float32 first.",
    ),
    "norm-overflow": Flag(
        "M4",
        "Range",
        "Norms at the end of norm_dtype, and of float32: the last that is accepted, the "
        "first that is refused.",
    ),
    "subnormal": Flag("S3", "Range", "Subnormal scales, zeros and factors, which are not flushed."),
    "scale-range": Flag(
        "S3",
        "Range",
        "Scales that are subnormal or narrow to 0, and the clamp of quotients that a "
        "rounded scale puts beyond the codes.",
    ),
    "scale-overflow": Flag(
        "S5", "Range", "Scales and zeros at the end of scale_dtype: those beyond it are refused."
    ),
    "decoded-overflow": Flag(
        "D3", "Range", "Values near the largest float32, some of which would decode to infinity."
    ),
    "narrow-range": Flag(
        "S2",
        "Range",
        "Ranges narrow beside their values: a narrowed zero may lie above the maximum, the "
        "scale may be negative, quotients far beyond the codes.",
    ),
    "collapse": Flag("D2", "SpecialValue", "Tokens that are not zero but decode to zero."),
    "outlier-channels": Flag(
        "O1",
        "Outliers",
        "Outlier channels: equal peaks, peaks against means, more of them than channels, "
        "values beyond float16.",
    ),
    "search": Flag("S4", "Search", "Blocks on which a shrunken range is the best."),
    "merged-decode": Flag(
        "D1",
        "Arithmetic",
        "Stored parts on which (norm / ||y||) * y, or (norm * y) / ||y||, gives another value.",
    ),
    "reciprocal-of-length": Flag(
        "D1", "Arithmetic", "Stored parts on which y * (1 / ||y||) gives another value."
    ),
    "length-accumulation": Flag(
        "D1",
        "Precision",
        "Stored parts on which ||y||, summed in float32 in any order, gives another value.",
    ),
    "fused-decode": Flag(
        "D1",
        "Arithmetic",
        "Stored parts on which a fused multiply-add, or a zero point in the middle of the "
        "codes, gives another value.",
    ),
    "double-precision-decode": Flag(
        "D1", "Precision", "Stored parts that decode to another value in float64."
    ),
    "every-code": Flag(
        "P1", "Packing", "Every code at several places of its byte, and a partial last byte."
    ),
    "attention": Flag("A1", "Basic", "Attention on ordinary data: whether it works at all."),
    "grouped-heads": Flag(
        "A1",
        "Shape",
        "Several query heads share a key/value head: neighbours do, they are not dealt out "
        "in turn.",
    ),
    "causal-mask": Flag(
        "A2", "Mask", "Queries are the last tokens; causal ones see no later token, others see all."
    ),
    "sliding-window": Flag(
        "A2",
        "Mask",
        "Sliding windows of one token, of a few, and longer than the sequence; a window "
        "counts the query's own position.",
    ),
    "softcap": Flag("A1", "Formula", "The softcap comes after the scale and before the softmax."),
    "attention-scale": Flag("A1", "Formula", "A scale that is not 1 / sqrt(D)."),
    "large-scores": Flag(
        "A1",
        "Range",
        "Scores whose exponentials leave float32 unless their maximum is subtracted first.",
    ),
    "equal-scores": Flag("A1", "SpecialValue", "Equal keys have equal weights."),
    "value-head-dim": Flag("A1", "Shape", "Values of fewer channels than keys."),
    "value-scheme": Flag("A1", "Shape", "Values of another scheme than keys."),
    "stream-append": Flag(
        "B1", "Blocks", "One append, many, or a token at a time: the same bytes."
    ),
    "crop-block": Flag(
        "C1",
        "Crop",
        "A crop into a sealed block: its tokens return to the tail as decoded, and are "
        "sealed with new scales.",
    ),
    "crop-edge": Flag(
        "C1", "Crop", "A crop to the end of a block, or of the sequence, keeps all bytes before it."
    ),
    "crop-tail": Flag("C1", "Crop", "A crop into the tail drops raw tokens."),
    "crop-start": Flag(
        "K1", "Crop", "A crop into the sinks, or to nothing: the next tokens become sinks again."
    ),
    "crop-saturation": Flag(
        "C1", "Crop", "Decoded values beyond the dtype of the tail become its largest."
    ),
    "ragged-batch": Flag(
        "B2",
        "Blocks",
        "Rows of different lengths, some a thousand times as large: no row changes another.",
    ),
    "padding": Flag(
        "P1",
        "Packing",
        "Rows whose last byte is partial: it is padded with code 0, and rows share no byte.",
    ),
}


class _Draw:
    """Random numbers that do not depend on NumPy's distributions."""

    def __init__(self, seed: int, name: str) -> None:
        self._words = np.random.PCG64([seed, zlib.crc32(name.encode())])

    def _raw(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint64]:
        return np.asarray(self._words.random_raw(int(np.prod(shape, dtype=int)))).reshape(shape)

    def uniform(self, low: float, high: float, *shape: int) -> Float64:
        fraction = (self._raw(shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.asarray(low + (high - low) * fraction)

    def integers(self, low: int, high: int, *shape: int) -> npt.NDArray[np.int64]:
        """Integers of [low, high)."""
        return np.asarray(low + (self._raw(shape) % np.uint64(high - low)).astype(np.int64))

    def signs(self, *shape: int) -> Float64:
        return self.integers(0, 2, *shape).astype(np.float64) * -2.0 + 1.0

    def bell(self, *shape: int) -> Float32:
        """Nearly normal numbers: sums of twelve uniform ones of 16 bits."""
        words = self._raw((3, *shape))
        parts = [(words >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4)]
        total = np.sum(parts, axis=(0, 1), dtype=np.int64)
        return ((total - 6 * 0xFFFF) * 2.0**-16).astype(np.float32)


class _Made(NamedTuple):
    """What a family yields: an input, and further flags."""

    x: Array
    flags: tuple[str, ...] = ()


Family = Callable[[Scheme, _Draw], Iterator[_Made]]
_ENCODE: dict[str, Family] = {}


def _family(flag: str) -> Callable[[Family], Family]:
    def register(function: Family) -> Family:
        _ENCODE[flag] = function
        return function

    return register


def cases(
    scheme: Scheme,
    operations: Sequence[str] = OPERATIONS,
    seed: int = 0,
    dtypes: Sequence[str] = ("float32", "float16", "bfloat16"),
) -> list[Case]:
    """Return the cases of one scheme.

    Parameters
    ----------
    scheme : Scheme
    operations : sequence of {"encode", "decode", "attend", "stream"}
    seed : int
        Of what is drawn; what is computed is the same for all.
    dtypes : sequence of {"float32", "float16", "bfloat16"}
        Of the inputs. Cases of other dtypes are left out, and the others keep their ids.

    Returns
    -------
    list of Case

    Examples
    --------
    >>> from nsq_ref import Scheme
    >>> cases(Scheme(), ["encode"])[0]
    Case(encode ordinary/0)
    """
    made: list[Case] = []
    with np.errstate(all="ignore"):  # what overflows is refused, or is to be
        encoded = list(_encode_cases(scheme, seed))
        if "encode" in operations:
            made += encoded
        if "decode" in operations:
            made += _decode_cases(encoded, scheme, seed)
        if "attend" in operations:
            made += _attend_cases(scheme, seed)
        if "stream" in operations:
            made += _stream_cases(encoded, scheme, seed)
    return [case for case in made if _input_dtype(case) in dtypes]


def _input_dtype(case: Case) -> str:
    for name in ("x", "sinks"):
        if name in case.inputs:
            return str(case.inputs[name].dtype.name)
    return "float32"


def _encode_cases(scheme: Scheme, seed: int) -> Iterator[Case]:
    for flag, family in _ENCODE.items():
        for number, made in enumerate(family(scheme, _Draw(seed, flag))):
            refused_by = _refusal(made.x, scheme)
            flags = (flag, *made.flags)
            yield Case(f"{flag}/{number}", "encode", scheme, flags, {"x": made.x}, refused_by)


def _total(terms: Float64) -> Float64:
    """Add along the last axis, in order: the order of `numpy.sum` is that of its version."""
    return np.asarray(np.add.accumulate(terms, axis=-1)[..., -1])


def _float32(values: Any) -> Float32:
    return np.array(values, np.float32)


def _refusal(x: Array, scheme: Scheme) -> str | None:
    """Return the rule that refuses an input, the first in the order of computation."""
    if not np.isfinite(x).all():
        return "I2"
    coded = x[..., scheme.sink_tokens :, :].astype(np.float32)
    if not coded.size:
        return None
    with np.errstate(all="ignore"):
        if scheme.separate_norm and np.isinf(rounding.norm(coded)).any():
            return "N1"
        block = spec.encode_blocks(coded, scheme)
        for rule, *parts in (
            ("O1", block.outliers),
            ("S5", block.scale, block.zero),
            ("M4", block.norm),
            ("D3", spec.decode_blocks(block, scheme)),
        ):
            if not all(np.isfinite(part).all() for part in parts):
                return rule
    return None


def _with_sinks(x: Array, scheme: Scheme) -> Array:
    """Put as many sinks in front as the scheme takes, so large that they would change scales."""
    sinks = np.resize(_float32([96.0, -160.0, 0.375]), (scheme.sink_tokens, x.shape[-1]))
    sinks = np.broadcast_to(sinks, (*x.shape[:-2], *sinks.shape))
    return np.concatenate([sinks.astype(x.dtype), x], axis=-2)


# --- encode -------------------------------------------------------------------------------------


@_family("ordinary")
def _ordinary(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    for tokens, head_dim in (
        (6, 8), (1, 8), (5, 1), (5, 2), (4, 3), (4, 5), (3, 7), (3, 9), (3, 96), (2, 128), (2, 256),
        (24, 4),
    ):  # fmt: skip
        yield _Made(_with_sinks(draw.bell(tokens, head_dim), scheme))


@_family("leading-axes")
def _leading_axes(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    for lead in ((2,), (2, 2), (3, 1)):
        magnitude = np.ldexp(1.0, draw.integers(-4, 5, *lead))[..., None, None]
        yield _Made(_with_sinks((draw.bell(*lead, 3, 6) * magnitude).astype(np.float32), scheme))


@_family("input-dtype")
def _input_dtypes(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    for dtype in (FLOAT16, BFLOAT16):
        for tokens, head_dim, scale in ((5, 6, 1.0), (3, 9, 200.0), (4, 5, 2.0**-20)):
            drawn = _with_sinks(draw.bell(tokens, head_dim) * np.float32(scale), scheme)
            yield _Made(drawn.astype(dtype))


@_family("not-finite")
def _not_finite(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    for value, dtype in (
        (np.nan, np.float32), (np.inf, np.float32), (-np.inf, np.float32), (np.nan, FLOAT16),
        (np.inf, FLOAT16), (np.nan, BFLOAT16), (-np.inf, BFLOAT16),
    ):  # fmt: skip
        x = _with_sinks(draw.bell(3, 5), scheme).astype(dtype)
        x[-2, 2] = value
        yield _Made(x)
    for index in ((-1, -1), (0, 0)):
        x = _with_sinks(draw.bell(3, 5), scheme)
        x[index] = np.nan
        yield _Made(x)


@_family("zero-token")
def _zero_tokens(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    for sign in (1, -1):  # one-sided: only the zero token makes the minimum, or maximum, 0
        x = (np.abs(draw.bell(4, 5)) + np.float32(0.5)) * np.float32(sign)
        x[1] = 0
        yield _Made(_with_sinks(x, scheme))
    x = draw.bell(4, 6)
    x[[0, 3]] = 0
    yield _Made(_with_sinks(x, scheme))
    yield _Made(_with_sinks(np.zeros((3, 4), np.float32), scheme))


@_family("zero-channel")
def _zero_channels(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    x = draw.bell(4, 6)
    x[:, [1, 4]] = 0
    yield _Made(_with_sinks(x, scheme))


@_family("negative-zero")
def _negative_zeros(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    x = _float32([[0, -0.0, 0, 2], [1, -0.0, -1, 3], [-2, 0, 2, -0.0]])
    yield _Made(_with_sinks(x, scheme))
    yield _Made(_with_sinks(np.full((2, 3), -0.0, np.float32), scheme))
    yield _Made(_with_sinks(_float32([[-0.0, 1, 2], [0.0, 2, 3]]), scheme))


@_family("block-boundary")
def _block_boundaries(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    size = scheme.block_size
    if size is None:
        return
    for tokens in dict.fromkeys((size - 1, size, size + 1, 2 * size, 2 * size + 1)):
        if tokens:
            x = draw.bell(tokens, 3 if size > 16 else 6)
            x = x * np.ldexp(np.float32(1), 3 * (np.arange(tokens) // size) - 3)[:, None]
            yield _Made(_with_sinks(x.astype(np.float32), scheme))


@_family("sinks")
def _sinks(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    sinks = scheme.sink_tokens
    if sinks:
        for tokens in (max(sinks - 1, 1), sinks, sinks + 1):
            yield _Made(draw.bell(tokens, 5) * np.float32(3))


@_family("padding")
def _padding(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    for head_dim in (11, 13, 14, 15, 17):
        yield _Made(_with_sinks(draw.bell(2, head_dim), scheme))


# --- pools: blocks whose quotients lie next to ties --------------------------------------------


class _Step(NamedTuple):
    """What is known of a block when its codes are made."""

    x: Float32
    norm: Float32
    direction: Float32
    scale: Array
    zero: Array
    low: Float32
    high: Float32
    scheme: Scheme


def _right_scale(step: _Step, coded: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    return spec.scale_and_zero(step.low, step.high, step.direction, coded, step.scheme)


def _right_code(step: _Step) -> Float32:
    return spec.code(step.direction, step.scale, step.zero, step.scheme)


def _right_outliers(step: _Step, index: npt.NDArray[np.int32]) -> Array:
    return spec.kept_outliers(step.direction, index)


def _right_stored(x: Float32, y: Float32, norm: Float32, scheme: Scheme) -> Array:
    return rounding.narrow(spec.factor(x, y, norm, scheme), FLOAT_DTYPES[scheme.norm_dtype])


class _Encoder(NamedTuple):
    """The decisions of `spec.encode`, any of which may be replaced by a wrong one."""

    norm: Callable[[Float32], Float32] = rounding.norm
    direction: Callable[[Float32, Float32], Float32] = spec.direction_of
    scale: Callable[[_Step, npt.NDArray[np.bool_]], tuple[Array, Array]] = _right_scale
    code: Callable[[_Step], Float32] = _right_code
    outliers: Callable[[_Step, npt.NDArray[np.int32]], Array] = _right_outliers
    stored: Callable[[Float32, Float32, Float32, Scheme], Array] = _right_stored

    def __call__(self, x: Float32, scheme: Scheme) -> list[Array]:
        """Encode blocks ``[N, T, D]``: codes, stored factors, scales, zeros, outliers."""
        norm = self.norm(x) if scheme.separate_norm else np.ones(x.shape[:-1], np.float32)
        direction = self.direction(x, norm) if scheme.separate_norm else x
        index = spec.outlier_channels(direction, scheme)
        coded = ~spec.mark(index, x.shape[-1])
        low, high = spec.extent(direction, coded, scheme)
        step = _Step(x, norm, direction, low, low, low, high, scheme)
        scale, zero = self.scale(step, coded)
        step = step._replace(scale=scale, zero=zero)
        codes = spec.without_codes(self.code(step), coded, norm)
        outliers = self.outliers(step, index)
        y = spec.dequantized_direction(codes, scale, zero, index, outliers)
        return [codes, self.stored(x, y, norm, scheme), scale, zero, outliers]


def _differences(some: list[Array], others: list[Array]) -> npt.NDArray[np.int64]:
    """Count, for each block of a pool, the elements that differ."""
    return sum(
        (np.sum((a != b).reshape(len(a), -1), axis=-1) for a, b in zip(some, others, strict=True)),
        np.zeros(len(some[0]), np.int64),
    )


def _telling(
    pool: Float32, scheme: Scheme, wrong: Iterable[_Encoder], most: int = 2
) -> Iterator[Float32]:
    """Yield the blocks of a pool on which wrong encoders differ most, at most some of each.

    One block is enough where four elements differ.
    """
    yielded: set[int] = set()
    with np.errstate(all="ignore"):
        right = _Encoder()(pool, scheme)
        for encoder in wrong:
            counts = _differences(right, encoder(pool, scheme))
            order = np.argsort(-counts, kind="stable")[:most]
            found = 0
            for index in order[counts[order] > 0].tolist():
                if index not in yielded:
                    yield pool[index]
                yielded.add(index)
                found += int(counts[index])
                if found >= 4:
                    break


def _midpoint(value: Float64, dtype: np.dtype[Any]) -> Float64:
    """Return the tie of `dtype` that follows each positive value once it is narrowed."""
    narrowed = rounding.narrow(value.astype(np.float32), dtype)
    bits = narrowed.view(f"u{dtype.itemsize}")
    above = (bits + bits.dtype.type(1)).view(dtype)
    middle: Float64 = (narrowed.astype(np.float64) + above.astype(np.float64)) / 2
    return middle


def _near_ties(
    scheme: Scheme,
    draw: _Draw,
    *,
    count: int = POOL,
    scale_ties: bool = False,
    exponent: int = 0,
    shrink: int = 0,
) -> Float32:
    """Return blocks ``[count, T, D]`` whose quotients lie within an ulp or two of ties.

    The extremes of each scale are drawn, so that scales and ties follow; what a direction needs to
    have length 1 goes into channels of its own, which are the outlier channels where there are any.

    With `scale_ties`, scales, zeros and outliers lie next to ties of their dtypes as well. `shrink`
    makes scales smaller by that power of two; where channels share a scale, it adds channels.
    """
    by_channel = scheme.axis == "channel"
    extremes = 1 if scheme.symmetric else 2
    kept = scheme.outlier_channels
    tokens = min(scheme.block_size or 6, 6)
    if by_channel and tokens <= extremes and not scale_ties:
        return _subnormal_ties(scheme, draw, count, tokens)
    coded = 4 if by_channel else 5
    fillers = kept + 1 if kept else 0
    if scheme.separate_norm and not kept:
        fillers = 1 if by_channel else coded + 2 + 6 * shrink
    own = (1, coded) if by_channel else (tokens, 1)  # one scale a channel, or one a token
    widest = 0.94 / np.sqrt(coded + fillers)
    if not by_channel and not kept and scheme.separate_norm:
        least = 1.03 / np.sqrt(fillers + 1)
        widest = min(1.3 * least, 0.99 / np.sqrt(coded))
    else:
        widest = float(np.ldexp(widest, -shrink))
        least = 0.6 * widest
    high = draw.uniform(least, widest, count, *own)
    low = -draw.uniform(0.3 * least, widest, count, *own)
    low = np.where(draw.integers(0, 4, count, *own) == 0, -0.4 * low, low)  # one-sided
    if not by_channel:
        low = np.clip(low, -high, None)
    dtype = FLOAT_DTYPES[scheme.scale_dtype]
    levels = scheme.code_range[1]
    if scale_ties:
        if not scheme.symmetric:
            low = np.copysign(_midpoint(np.abs(low) * 0.98, dtype), low)
        zero = 0.0 if scheme.symmetric else rounding.narrow(low.astype(np.float32), dtype)
        step = (high * 0.98 - zero) / levels
        # Just above a power of two, the product with a reciprocal is nearest to another float32.
        power = np.ldexp(draw.uniform(0.5, 0.503, *step.shape), np.frexp(step)[1])
        step = np.where(draw.integers(0, 3, *step.shape) == 0, power, step)
        high = zero + levels * _midpoint(step, dtype)
    low32, high32 = low.astype(np.float32), high.astype(np.float32)
    if scheme.symmetric:
        low32 = -high32
    if scheme.scale_rule == "search":
        scales, zeros = spec.shrunken_scales(low32, high32, scheme)
        chosen = draw.integers(0, len(scales), 1, *high.shape)
        scale, zero = (np.take_along_axis(part, chosen, 0)[0] for part in (scales, zeros))
    else:
        scale, zero = spec.range_scale(low32, high32, scheme)
    ties = draw.integers(*scheme.code_range, count, tokens, coded) + 0.5
    if scheme.scale_rule == "search":  # among ties alone, another scale would have less error
        ties += 0.5 * (draw.integers(0, 3, *ties.shape) > 0)
    signs = draw.signs(count, *own) if scheme.symmetric else np.ones((count, *own))
    steps = draw.integers(-1, 2, count, tokens, coded + fillers).astype(np.int32)
    length = np.ldexp(
        draw.uniform(1, 2, count, tokens, 1), exponent + draw.integers(-2, 3, count, tokens, 1)
    )
    outlier_signs = draw.signs(1, 1, kept)
    x = np.empty(0, np.float32)
    for _ in range(3 if scheme.scale_rule == "search" else 1):
        target = zero.astype(np.float64) + ties * scale.astype(np.float64)
        target = np.clip(target, low if not scheme.symmetric else -high, high)
        if by_channel:
            target[:, 0] = (high * signs)[:, 0]
            if not scheme.symmetric and tokens > 1:
                target[:, 1] = low[:, 0]
        else:
            target[..., 0] = (high * signs)[..., 0]
            if not scheme.symmetric:
                target[..., 1] = low[..., 0]
        if fillers:
            target = np.concatenate([_fill(target, fillers, outlier_signs), target], axis=-1)
        if scheme.separate_norm:
            x = (target * length).astype(np.float32)
        else:
            x = np.ldexp(target, exponent).astype(np.float32)
            x = np.where(x == 0, x, (x.view(np.int32) + steps).view(np.float32))
        if scheme.scale_rule == "search":  # which scale is chosen depends on the block
            with np.errstate(all="ignore"):
                scale, zero = (part[..., -coded:] for part in _Encoder()(x, scheme)[2:4])
            if not scheme.separate_norm:
                scale, zero = (
                    np.ldexp(part.astype(np.float64), -exponent) for part in (scale, zero)
                )
    return x


def _subnormal_ties(scheme: Scheme, draw: _Draw, count: int, tokens: int) -> Float32:
    """Return near-ties of blocks that hold the extremes alone.

    Then a quotient is far from the greatest code only where the scale is subnormal.
    """
    least = {"float16": -24, "bfloat16": -133, "float32": -149}[scheme.scale_dtype]
    levels = scheme.code_range[1]
    steps = draw.integers(1, min(levels, 40) + 1, count, 1, 8)
    ties = np.rint(draw.uniform(0.6, 1.2, *steps.shape) * levels) - 0.5
    target = np.zeros((count, tokens, 8))
    if not scheme.symmetric and tokens == 1:  # minimum and maximum, but for the narrowing of zero
        zero = np.ldexp(draw.uniform(0.5, 1, count, 1, 8), least + 21).astype(np.float32)
        target += rounding.narrow(zero, FLOAT_DTYPES[scheme.scale_dtype]).astype(np.float64)
    target[:, -1:] += np.ldexp(steps * ties, least)
    front = max(scheme.outlier_channels, int(scheme.separate_norm))
    if front:
        rest = 1 - _total(target * target)[..., None]
        target = np.concatenate([np.repeat(np.sqrt(rest / front), front, axis=-1), target], axis=-1)
    if scheme.separate_norm:
        target *= draw.uniform(1, 16, count, tokens, 1)
    return target.astype(np.float32)


def _fill(target: Float64, fillers: int, outlier_signs: Float64) -> Float64:
    """Return channels that make each row of length 1; outlier channels on ties of float16."""
    rest = np.maximum(1 - _total(target * target)[..., None], 0)
    kept = outlier_signs.shape[-1]
    if not kept:
        return np.repeat(np.sqrt(rest / fillers), fillers, axis=-1)
    outliers = _midpoint(0.98 * np.sqrt(rest / kept), FLOAT16)
    absorbed = np.sqrt(np.maximum(rest - kept * outliers * outliers, 0))
    outliers = np.repeat(outliers, kept, axis=-1) * outlier_signs
    return np.concatenate([absorbed, outliers], axis=-1)


# --- wrong arithmetic ---------------------------------------------------------------------------


def _clamped(quotient: Array, scheme: Scheme) -> Float32:
    return np.clip(quotient, *scheme.code_range).astype(np.float32)


def _wide(step: _Step) -> tuple[Float32, Float32]:
    """Scale and zero as float32, scales that are 0 as infinity."""
    return spec.where_zero(step.scale.astype(np.float32), np.inf), step.zero.astype(np.float32)


def _quotient(step: _Step) -> Float32:
    scale, zero = _wide(step)
    return np.asarray((step.direction - zero) / scale)


def _half_away(step: _Step) -> Float32:
    quotient = _quotient(step).astype(np.float64)
    return _clamped(np.copysign(np.floor(np.abs(quotient) + 0.5), quotient), step.scheme)


def _half_up(step: _Step) -> Float32:
    return _clamped(np.floor(_quotient(step).astype(np.float64) + 0.5), step.scheme)


def _half_toward_zero(step: _Step) -> Float32:
    quotient = _quotient(step).astype(np.float64)
    return _clamped(np.copysign(np.ceil(np.abs(quotient) - 0.5), quotient), step.scheme)


def _half_up_float32(step: _Step) -> Float32:
    return _clamped(np.floor(_quotient(step) + np.float32(0.5)), step.scheme)


def _reciprocal_of_scale(step: _Step) -> Float32:
    scale, zero = _wide(step)
    return _clamped(np.rint((step.direction - zero) * (np.float32(1) / scale)), step.scheme)


def _merged_division(step: _Step) -> Float32:
    scale, zero = _wide(step)
    norm = step.norm[..., None]
    above = step.x - norm * zero if not step.scheme.symmetric else step.x
    return _clamped(np.rint(above / spec.where_zero(norm * scale, np.inf)), step.scheme)


def _merged_reciprocals(step: _Step) -> Float32:
    scale, zero = _wide(step)
    norm = spec.where_zero(step.norm[..., None], np.inf)
    if step.scheme.symmetric:
        return _clamped(np.rint(step.x * (np.float32(1) / (norm * scale))), step.scheme)
    return _clamped(np.rint((step.x / norm) / scale - zero / scale), step.scheme)


def _double_quotient(step: _Step) -> Float32:
    scale, zero = _wide(step)
    return _clamped(np.rint((step.direction - zero).astype(np.float64) / scale), step.scheme)


def _double_throughout(step: _Step) -> Float32:
    scale, zero = (part.astype(np.float64) for part in _wide(step))
    norm = spec.where_zero(step.norm, np.inf)[..., None].astype(np.float64)
    return _clamped(np.rint((step.x.astype(np.float64) / norm - zero) / scale), step.scheme)


def _fused_subtraction(step: _Step) -> Float32:
    scale, zero = (part.astype(np.float64) for part in _wide(step))
    quotient = ((step.direction.astype(np.float64) - zero) / scale).astype(np.float32)
    return _clamped(np.rint(quotient), step.scheme)


def _distributed_quotient(step: _Step) -> Float32:
    scale, zero = _wide(step)
    return _clamped(np.rint(step.direction / scale - zero / scale), step.scheme)


def _scale_epsilon(step: _Step) -> Float32:
    scale, zero = _wide(step)
    return _clamped(np.rint((step.direction - zero) / (scale + np.float32(1e-8))), step.scheme)


def _unnarrowed_scale(step: _Step) -> Float32:
    zero = np.zeros_like(step.low) if step.scheme.symmetric else step.low
    span = np.maximum(step.high, -step.low) if step.scheme.symmetric else step.high - zero
    scale = spec.where_zero(span / np.float32(step.scheme.code_range[1]), np.inf)
    return _clamped(np.rint((step.direction - zero) / scale), step.scheme)


def _unnarrowed_zero(step: _Step) -> Float32:
    scale, _ = _wide(step)
    return _clamped(np.rint((step.direction - step.low) / scale), step.scheme)


def _scale_with(divide: Callable[[Float32, Scheme], Array]) -> _Encoder:
    def scale(step: _Step, coded: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
        zero = spec.range_zero(step.low, step.scheme)
        span = spec.range_span(step.low, step.high, zero, step.scheme)
        dtype = FLOAT_DTYPES[step.scheme.scale_dtype]
        return divide(span, step.scheme).astype(dtype), zero

    return _Encoder(scale=scale)


def _levels_reciprocal(span: Float32, scheme: Scheme) -> Array:
    return np.asarray(span * (np.float32(1) / np.float32(scheme.code_range[1])))


def _half_away_narrowed(span: Float32, scheme: Scheme) -> Array:
    """Narrow ties away from zero: the next float32 is no tie."""
    wide = span / np.float32(scheme.code_range[1])
    if scheme.scale_dtype == "float32":
        return np.asarray(wide)
    return np.asarray(np.nextafter(wide, np.copysign(np.float32(np.inf), wide)))


def _unrounded_minimum(step: _Step, coded: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    zero = spec.range_zero(step.low, step.scheme)
    span = (step.high - step.low) / np.float32(step.scheme.code_range[1])
    return rounding.narrow(span, FLOAT_DTYPES[step.scheme.scale_dtype]), zero


def _once(value: Float64, dtype: str) -> Array:
    """Round float64 to `dtype` at once, where NSQ-1 rounds to float32 first."""
    if dtype != "bfloat16":
        return value.astype(FLOAT_DTYPES[dtype])
    # To odd at 24 bits first: then the second rounding is that of the exact value.
    near = value.astype(np.float32)
    toward = np.where(np.abs(near) > np.abs(value), np.nextafter(near, np.float32(0)), near)
    sticky = toward.view(np.uint32) | (toward != value)
    return np.asarray(sticky.astype(np.uint32).view(np.float32).astype(BFLOAT16))


def _direct_outliers(step: _Step, index: npt.NDArray[np.int32]) -> Array:
    norm = spec.where_zero(step.norm, np.inf)[..., None].astype(np.float64)
    return np.take_along_axis(step.x / norm, index, -1).astype(np.float16)


def _sum_in_order(terms: Float32) -> Float32:
    total: Float32 = np.add.accumulate(terms, axis=-1, dtype=np.float32)[..., -1]
    return total


def _sum_in_pairs(terms: Float32) -> Float32:
    while terms.shape[-1] > 1:
        if terms.shape[-1] % 2:
            terms = np.concatenate([terms, np.zeros_like(terms[..., :1])], axis=-1)
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def _sum_in_lanes(terms: Float32) -> Float32:
    """Eight running sums, as vector instructions keep them."""
    lanes = [_sum_in_order(terms[..., i::8]) for i in range(min(8, terms.shape[-1]))]
    return _sum_in_order(np.stack(lanes, axis=-1))


def _sum_fused(left: Float32, right: Float32) -> Float32:
    total = np.zeros(left.shape[:-1], np.float32)
    for j in range(left.shape[-1]):
        total = (left[..., j].astype(np.float64) * right[..., j] + total).astype(np.float32)
    return total


_SUMS: dict[str, Callable[[Float32, Float32], Float32]] = {
    "in order": lambda a, b: _sum_in_order(a * b),
    "in pairs": lambda a, b: _sum_in_pairs(a * b),
    "in lanes": lambda a, b: _sum_in_lanes(a * b),
    "fused": _sum_fused,
}


def _norm_with(total: Callable[[Float32, Float32], Float32]) -> Callable[[Float32], Float32]:
    return lambda x: np.sqrt(total(x, x))


def _norm_moved(toward: float) -> Callable[[Float32], Float32]:
    return lambda x: np.nextafter(rounding.norm(x), np.float32(toward))


_NORMS: tuple[Callable[[Float32], Float32], ...] = (
    *(_norm_with(total) for total in _SUMS.values()),
    _norm_moved(np.inf),
    _norm_moved(0),
)


def _reciprocal_of_norm(x: Float32, norm: Float32) -> Float32:
    return np.asarray(x * (np.float32(1) / spec.where_zero(norm, np.inf))[..., None])


def _root_of_reciprocal(x: Float32, norm: Float32) -> Float32:
    square = norm.astype(np.float64) ** 2
    return x * (1 / np.sqrt(np.where(square == 0, np.inf, square))).astype(np.float32)[..., None]


def _norm_epsilon(x: Float32, norm: Float32) -> Float32:
    return np.asarray(x / (norm + np.float32(1e-12))[..., None])


def _norm_narrowed(dtype: str) -> Callable[[Float32, Float32], Float32]:
    def direction(x: Float32, norm: Float32) -> Float32:
        stored = rounding.narrow(norm, FLOAT_DTYPES[dtype]).astype(np.float32)
        return x / spec.where_zero(stored, np.inf)[..., None]

    return direction


# --- encode, picked from pools ------------------------------------------------------------------


def _picked(
    scheme: Scheme, pool: Float32, wrong: Iterable[_Encoder], most: int = 2
) -> Iterator[_Made]:
    for x in _telling(pool, scheme, wrong, most):
        yield _Made(_with_sinks(x, scheme))


@_family("half-even")
def _half_even(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    wrong = (_half_away, _half_up, _half_toward_zero, _half_up_float32)
    yield from _picked(scheme, _near_ties(scheme, draw), [_Encoder(code=code) for code in wrong])


@_family("reciprocal-of-scale")
def _reciprocals_of_scale(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    wrong = [_Encoder(code=_reciprocal_of_scale)]
    yield from _picked(scheme, _near_ties(scheme, draw), wrong)


@_family("merged-division")
def _merged_divisions(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    wrong = [_merged_division, _merged_reciprocals] if scheme.separate_norm else []
    if not scheme.symmetric:
        wrong += [_distributed_quotient, _fused_subtraction]
    yield from _picked(scheme, _near_ties(scheme, draw), [_Encoder(code=code) for code in wrong])


@_family("double-precision-quotient")
def _double_quotients(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    wrong = [_Encoder(code=code) for code in (_double_quotient, _double_throughout)]
    yield from _picked(scheme, _near_ties(scheme, draw), wrong)


@_family("unnarrowed-scale")
def _unnarrowed_scales(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    wrong = [_Encoder(code=_unnarrowed_scale), _Encoder(code=_unnarrowed_zero)]
    yield from _picked(scheme, _near_ties(scheme, draw), wrong, most=1)


@_family("scale-epsilon")
def _scale_epsilons(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    for shrink in (0, 4, 10):
        pool = _near_ties(scheme, draw, shrink=shrink)
        yield from _picked(scheme, pool, [_Encoder(code=_scale_epsilon)], most=1)


@_family("scale-narrowing")
def _scale_narrowings(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    wrong = [_scale_with(_levels_reciprocal), _scale_with(_half_away_narrowed)]
    if not scheme.symmetric:
        wrong.append(_Encoder(scale=_unrounded_minimum))
    yield from _picked(scheme, _near_ties(scheme, draw, scale_ties=True), wrong)


@_family("outlier-narrowing")
def _outlier_narrowings(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    if scheme.outlier_channels and scheme.separate_norm:
        wrong = [
            _Encoder(outliers=_direct_outliers),
            _Encoder(direction=_reciprocal_of_norm),
        ]
        yield from _picked(scheme, _near_ties(scheme, draw, scale_ties=True), wrong)


@_family("reciprocal-of-norm")
def _reciprocals_of_norm(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    if scheme.separate_norm:
        wrong = [_Encoder(direction=_reciprocal_of_norm), _Encoder(direction=_root_of_reciprocal)]
        yield from _picked(scheme, _near_ties(scheme, draw), wrong)


@_family("norm-epsilon")
def _norm_epsilons(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    if scheme.separate_norm:
        pool = _near_ties(scheme, draw, exponent=-19)
        yield from _picked(scheme, pool, [_Encoder(direction=_norm_epsilon)])


@_family("norm-before-narrowing")
def _norms_before_narrowing(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    if scheme.separate_norm:
        dtypes = {"float16", "bfloat16", scheme.norm_dtype} - {"float32"}
        wrong = [_Encoder(direction=_norm_narrowed(dtype)) for dtype in sorted(dtypes)]
        yield from _picked(scheme, _near_ties(scheme, draw), wrong, most=1)


@_family("norm-accumulation")
def _norm_accumulations(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    if scheme.separate_norm:
        wrong = [_Encoder(norm=norm) for norm in _NORMS]
        yield from _picked(scheme, _near_ties(scheme, draw), wrong, most=1)
        for head_dim in (8, 40):
            pool = _factor_ties(scheme, draw, head_dim)
            yield from _picked(scheme, pool, wrong[:4], most=1)


@_family("factor-narrowing")
def _factor_narrowings(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    if scheme.separate_norm:
        pool = _factor_ties(scheme, draw, 8)
        wrong = [_Encoder(stored=stored) for stored in _WRONG_FACTORS]
        yield from _picked(scheme, pool, wrong, most=1)


def _factor_ties(scheme: Scheme, draw: _Draw, head_dim: int) -> Float32:
    """Return blocks whose stored factors lie within an ulp or two of ties of their dtype."""
    tokens = min(scheme.block_size or 5, 5)
    x = draw.bell(POOL // 2, tokens, head_dim) * np.float32(2)
    if scheme.norm_dtype == "float32":
        return np.asarray(x)
    for _ in range(2):  # the second time undoes what the first one's roundings moved
        factor = np.abs(_factors(x, scheme).astype(np.float64))
        factor = np.where(factor == 0, 1, factor)
        tie = _midpoint(factor, FLOAT_DTYPES[scheme.norm_dtype])
        x = (x * (tie / factor)[..., None]).astype(np.float32)
    return np.asarray(x)


def _factors(x: Float32, scheme: Scheme) -> Float32:
    """Return what blocks store for their tokens before it is narrowed."""
    found: list[Float32] = []

    def stored(x: Float32, y: Float32, norm: Float32, scheme: Scheme) -> Array:
        found.append(spec.factor(x, y, norm, scheme))
        return found[0]

    _Encoder(stored=stored)(x, scheme)
    return found[0]


Factor = Callable[[Float32, Float32, Float32, Scheme], Array]


def _factor_with(divide: Callable[[Float32, Float32, Float32, Scheme], Array]) -> Factor:
    def stored(x: Float32, y: Float32, norm: Float32, scheme: Scheme) -> Array:
        value = divide(x, y, norm, scheme)
        dtype = FLOAT_DTYPES[scheme.norm_dtype]
        if value.dtype == np.float64:
            return _once(value, scheme.norm_dtype)
        return rounding.narrow(value, dtype)

    return stored


def _double_factor(x: Float32, y: Float32, norm: Float32, scheme: Scheme) -> Array:
    """The factor in float64, narrowed once."""
    wide, y_wide = x.astype(np.float64), y.astype(np.float64)
    length = np.sqrt(_total(wide * wide))
    below = _total(y_wide * y_wide)
    below = np.where(below == 0, np.inf, below)
    if scheme.magnitude == "gain":
        return np.asarray(length / np.sqrt(below))
    if scheme.magnitude == "lsq":
        return np.asarray(_total(wide * y_wide) / below)
    return np.asarray(length)


def _factor_summed(total: Callable[[Float32, Float32], Float32]) -> Factor:
    def divide(x: Float32, y: Float32, norm: Float32, scheme: Scheme) -> Array:
        below = spec.where_zero(total(y, y), np.inf)
        if scheme.magnitude == "gain":
            return norm / np.sqrt(below)
        if scheme.magnitude == "lsq":
            return total(x, y) / below
        return norm

    return _factor_with(divide)


def _factor_by_reciprocal(x: Float32, y: Float32, norm: Float32, scheme: Scheme) -> Array:
    if scheme.magnitude != "gain":
        return spec.factor(x, y, norm, scheme)
    return np.asarray(norm * (np.float32(1) / spec.where_zero(rounding.norm(y), np.inf)))


def _factor_of_directions(x: Float32, y: Float32, norm: Float32, scheme: Scheme) -> Array:
    """Least squares on the direction, times the norm: a rounding more."""
    if scheme.magnitude != "lsq":
        return spec.factor(x, y, norm, scheme)
    return norm * rounding.least_squares_gain(spec.direction_of(x, norm), y)


_WRONG_FACTORS: tuple[Factor, ...] = (
    _factor_with(_double_factor),
    *(_factor_summed(total) for total in _SUMS.values()),
    _factor_with(_factor_by_reciprocal),
    _factor_with(_factor_of_directions),
)


# --- encode, computed ---------------------------------------------------------------------------


def _in_front(x: Array, scheme: Scheme) -> Array:
    """Put channels in front that hold the norm of each token, or are its outlier channels.

    The first token makes them outlier channels. In the others the first holds a norm of 1, so that
    small values behind them are their own directions.
    """
    count = max(scheme.outlier_channels, int(scheme.separate_norm))
    wide = np.zeros((len(x) + 1, count + x.shape[1]), np.float32)
    wide[0, :count] = 1
    wide[1:, 0] = 1
    wide[1:, count:] = x
    return wide


@_family("exact-tie")
def _exact_ties(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    extremes, ties = _integer_ties(scheme)
    by_channel = scheme.axis == "channel"
    tokens = scheme.block_size or 64
    if scheme.scale_rule == "search" or (by_channel and tokens <= len(extremes)):
        return
    rows = [ties[i : i + 4] for i in range(0, len(ties), 4)]
    rows = [row + ties[: 4 - len(row)] for row in rows]
    if by_channel:
        step = tokens - len(extremes)
        chunks = [rows[i : i + step] for i in range(0, len(rows), step)]
        integers = [row for chunk in chunks for row in [[end] * 4 for end in extremes] + chunk]
    else:
        integers = [extremes + row for row in rows]
    # A tie is odd, an extreme is even: four channels, or all behind the extremes, may be moved.
    largest = max(sum(value * value for value in row) for row in integers) if by_channel else 0
    whole = [_completed(row, scheme, largest) for row in integers]
    width = max(map(len, whole))
    x = np.array([row + [0] * (width - len(row)) for row in whole], np.float32)
    first = scheme.outlier_channels
    moved = np.zeros(x.shape, bool)
    moved[:, first : first + len(integers[0])] = np.array(integers) % 2 != 0
    for toward in (None, np.inf, -np.inf):
        near = x.copy()
        if toward is not None:
            near[moved] = np.nextafter(x[moved], np.float32(toward))
        yield _Made(_with_sinks(np.ldexp(near, -6), scheme))


def _integer_ties(scheme: Scheme) -> tuple[list[int], list[int]]:
    """Return extremes and ties of a range whose scale is 2, and whose zero is a power of two."""
    least, most = scheme.code_range
    zero = 0 if scheme.symmetric else -(2**scheme.bits)
    ends = [zero + 2 * most] if scheme.symmetric else [zero + 2 * most, zero]
    ties = [zero + 2 * code + 1 for code in range(least, most)]
    if len(ties) > 16:
        ties = ties[:4] + ties[5 :: len(ties) // 8][:8] + ties[-4:]
    return ends, ties


def _completed(row: list[int], scheme: Scheme, largest: int) -> list[int]:
    """Return outlier channels, the row, and channels that make its norm a power of two.

    The same one for all rows, as rows that share scales need, if `largest` is their greatest sum of
    squares.
    """
    most = 2**scheme.bits
    kept = scheme.outlier_channels
    if not scheme.separate_norm:
        return [4 * most] * kept + row
    outliers = [4 * most] * max(kept - 1, 0)
    total, held = (sum(value * value for value in values) for values in (row, outliers))
    least = 16 * most * most if kept else 0
    power = 1
    while power - max(total, largest) - held < least:
        power *= 4
    most = max(row)
    total += held
    rest = power - total
    if kept:
        outliers.append(isqrt(rest))
        rest -= outliers[-1] ** 2
    # With one scale a token, no other channel may be beyond its extremes.
    copies = 0 if scheme.axis == "channel" else rest // (most * most)
    return [*outliers, *row, *[most] * copies, *_four_squares(rest - copies * most * most)]


def _four_squares(number: int) -> list[int]:
    """Return four integers whose squares add up to a number, the largest first."""
    for a in range(isqrt(number), -1, -1):
        for b in range(min(a, isqrt(number - a * a)), -1, -1):
            left = number - a * a - b * b
            for c in range(min(b, isqrt(left)), -1, -1):
                d = isqrt(left - c * c)
                if d > c:
                    break
                if d * d == left - c * c:
                    return [a, b, c, d]
    raise ArithmeticError(f"{number} is no sum of four squares, as every integer is")


@_family("norm-midpoint")
def _norm_midpoints(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    if not scheme.separate_norm:
        return
    # Midpoints of float32 beside a tie of norm_dtype: on their two sides, another norm is stored.
    precision = {"float16": 11, "bfloat16": 8, "float32": 24}[scheme.norm_dtype]
    step = 2 ** (24 - precision)
    stored = (2**24 + step + 1, 2**24 + 3 * step - 1) if step > 1 else (2**24 + 1, 2**24 + 3)
    for root in stored:
        yield _Made(_with_sinks(_around_midpoint(root, 0), scheme))
    if scheme.norm_dtype != "float16":
        yield _Made(_with_sinks(_around_midpoint(2**24 + 1, -64), scheme))
        yield _Made(_with_sinks(_around_midpoint(2**24 + 1, 60), scheme))
    pool = _coded_midpoints(scheme, draw)
    if pool is not None:
        yield from _picked(scheme, pool, [_Encoder(norm=_double_norm)])


def _double_norm(x: Float32) -> Float32:
    return np.sqrt(_total(np.square(x, dtype=np.float64))).astype(np.float32)


def _around_midpoint(root: int, exponent: int) -> Float32:
    """Return tokens of norm ``root * 2^-24``, and of so little more and less that float64 is blind.

    ``root`` is odd and has 25 bits, so that it is half way between two float32.
    """
    exact = [float(value) for value in _squares_of(root * root, 2**24)]
    less = [*exact[:-1], 1 - 2.0**-24]
    rows = np.array([[*exact, 0.0], [*exact, 2.0**-6], [*less, 0.0]])
    return np.asarray(np.ldexp(rows, exponent - 24).astype(np.float32))


def _squares_of(number: int, most: int) -> list[int]:
    """Return powers of two, `most` at most, whose squares add up to a number, descending."""
    roots: list[int] = []
    for bit in range(number.bit_length() - 1, -1, -1):
        if number >> bit & 1:
            root, count = 2 ** (bit // 2), 1 + bit % 2
            while root > most:
                root, count = root // 2, 4 * count
            roots += [root] * count
    return roots


def _coded_midpoints(scheme: Scheme, draw: _Draw) -> Float32 | None:
    """Return blocks whose norms float64 gets wrong, and with them quotients next to ties."""
    by_channel = scheme.axis == "channel"
    if scheme.outlier_channels or (by_channel and (scheme.block_size or 4) < 4):
        return None
    low, high = _float32([0.0 if scheme.symmetric else -0.375]), _float32([0.5])
    scale, zero = (float(part[0]) for part in spec.range_scale(low, high, scheme))
    blocks = []
    for _ in range(96):
        rows = []
        for sign in (1, -1):
            root = int(draw.integers(2**22, 2**23)) * 4 + 2 - sign
            ends = [root // 2] if scheme.symmetric else [root // 2, -(root * 3 // 8)]
            ties = draw.integers(*scheme.code_range, 2) + 0.5
            row = [] if by_channel else ends
            row += [int(root * (zero + tie * scale)) for tie in ties.tolist()]
            rest = root * root - sum(value * value for value in row)
            squares = [float(value) for value in _squares_of(rest, root // 4)]
            if not rest % 2:
                squares += [2.0**-6 if sign > 0 else 0.0]
            elif sign > 0:
                squares += [2.0**-6]
            else:
                squares[-1] = 1 - 2.0**-24
            rows.append([*map(float, row), *squares])
        width = 72
        if max(map(len, rows)) > width:
            continue
        made = [row + [0.0] * (width - len(row)) for row in rows]
        if by_channel:
            made.insert(0, [0.5] * 4 + [0.0] * (width - 4))
            if not scheme.symmetric:
                low_ends = [-0.375, -0.375, 0.75, 0.375, 0.125]  # of length 1
                made.insert(0, low_ends + [0.0] * (width - 5))
        blocks.append(made)
    x = np.array(blocks)
    x[:, -2:] = np.ldexp(x[:, -2:], -24)
    return x.astype(np.float32)


@_family("tiny-norm")
def _tiny_norms(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    """Norms whose squares leave float32, in tokens that are coded like any other."""
    for exponents in ((-40, -70, -100, 0), (-126, -130, -20, -148)):
        x = draw.bell(4, 5).astype(np.float64)
        yield _Made(
            _with_sinks(np.ldexp(x, np.array(exponents)[:, None]).astype(np.float32), scheme)
        )
    if scheme.separate_norm and scheme.norm_dtype != "float16":
        x = np.ldexp(draw.bell(4, 5), np.array([70, 100, -60, 0])[:, None])
        yield _Made(_with_sinks(x.astype(np.float32), scheme))
        yield _Made(_with_sinks(_float32([[2.0e38, -2.0e38], [1, 2]]), scheme))


@_family("norm-narrowing")
def _norm_narrowings(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    if not scheme.separate_norm:
        return
    precision, least = {"float16": (10, -24), "bfloat16": (7, -133), "float32": (23, -149)}[
        scheme.norm_dtype
    ]
    half = 2.0 ** -(precision + 1)
    ties = _float32([1 + half, 1 + 3 * half, 1 + half])
    near = np.concatenate(
        [ties, np.nextafter(ties, np.float32(2)), np.nextafter(ties, np.float32(0))]
    )
    x = np.stack([near, np.zeros_like(near), np.zeros_like(near)], axis=-1)
    x[2, 1] = 2.0**-15  # above the tie, but on it once the norm is float32
    yield _Made(_with_sinks(x, scheme))
    steps = _float32([1, 1.5, 2.5, 0.5, 0.75, 3, 1023.5]) * 2
    tiny = np.ldexp(steps.astype(np.float64), least - 1).astype(np.float32)
    x = np.stack([np.zeros_like(tiny), -tiny], axis=-1)
    yield _Made(_with_sinks(x, scheme), ("subnormal",))


@_family("norm-overflow")
def _norm_overflows(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    if not scheme.separate_norm:
        return
    end = {"float16": 65520.0, "bfloat16": 2.0**128 - 2.0**119, "float32": MOST}[scheme.norm_dtype]
    for value in (np.nextafter(np.float32(end), np.float32(0)), np.float32(end)):
        yield _Made(_with_sinks(_float32([[1, 2], [value, 0]]), scheme))
    beyond = 1.02 * end / np.sqrt(2.0)
    yield _Made(_with_sinks(_float32([[beyond, beyond], [2, 1]]), scheme))
    yield _Made(_with_sinks(_float32([[1, 2], [3e38, -3e38]]), scheme))


@_family("scale-range")
def _scale_ranges(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    """Scales that are subnormal or flushed, and quotients beyond the codes."""
    if scheme.separate_norm and scheme.axis == "token" and not scheme.outlier_channels:
        return
    least = {"float16": -24, "bfloat16": -133, "float32": -149}[scheme.scale_dtype]
    steps = np.array([0.5, 0.51, 0.75, 1, 1.25, 1.49, 1.5, 2.5, 10.5, 300])
    spans = np.ldexp(steps * scheme.code_range[1], least)
    parts = np.array([1, -1, 0.5, 0.26, -0.77] if scheme.symmetric else [1, 0, 0.5, 0.26, 0.77])
    for shift in (0.0, -1.0):
        if shift and scheme.symmetric:
            continue
        x = (parts + shift)[:, None] * spans
        x = x if scheme.axis == "channel" else x.T
        x = x.astype(np.float32)
        if scheme.separate_norm or scheme.outlier_channels:
            x = _in_front(x, scheme)
        yield _Made(_with_sinks(x, scheme), ("subnormal",))


@_family("scale-overflow")
def _scale_overflows(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    if scheme.separate_norm:
        return
    end = {"float16": 65520.0, "bfloat16": 2.0**128 - 2.0**119, "float32": MOST}[scheme.scale_dtype]
    levels = scheme.code_range[1]
    below = float(np.nextafter(np.float32(end), np.float32(0)))
    tops = (end * levels, below * levels, -end, 0.75 * end)  # of scale, of scale, of zero, of both
    outliers = np.full((3, scheme.outlier_channels), 6e4)
    for top in tops:
        opposite = -top if top == tops[-1] else 0.0
        rows = [[1.0, 2.0, 3.0], [0.0, opposite, 0.0], [0.5, top, 0.5]]
        # A value beyond float16 would be an outlier, and refused for that.
        if abs(top) <= (6e4 if scheme.outlier_channels else MOST):
            x = np.concatenate([outliers, rows], axis=1)
            yield _Made(_with_sinks(x.astype(np.float32), scheme))


@_family("decoded-overflow")
def _decoded_overflows(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    wide = scheme.norm_dtype if scheme.separate_norm else scheme.scale_dtype
    if wide == "float16":
        return
    for top in (MOST, 3.389e38, 3.3e38, 2.9e38):
        yield _Made(_with_sinks(_float32([[1, 2, 3], [top, 0, 0], [0, 1, 0]]), scheme))


@_family("narrow-range")
def _narrow_ranges(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    """Ranges so narrow that a narrowed zero lies outside, or far off: asymmetric schemes."""
    if scheme.symmetric:
        for sign in (1, -1):
            one_sided = (draw.uniform(3, 4, 4, 5) * sign).astype(np.float32)
            yield _Made(_with_sinks(one_sided, scheme))
        return
    tokens, width = min(scheme.block_size or 4, 4), 5
    own = (1, width) if scheme.axis == "channel" else (tokens, 1)
    base = draw.uniform(0.3, 1, POOL // 2, *own) * draw.signs(POOL // 2, *own)
    spread = np.ldexp(1.0, draw.integers(-24, -3, POOL // 2, 1, 1))
    x = base + spread * draw.uniform(0, 1, POOL // 2, tokens, width)
    if scheme.outlier_channels:
        x = np.concatenate([np.full((*x.shape[:-1], scheme.outlier_channels), 3.0), x], axis=-1)
    if scheme.separate_norm:
        x = x / np.sqrt(_total(x * x))[..., None]
        if scheme.axis == "channel":  # the directions of a channel are to be alike again
            x = x[:, :1] + spread * draw.uniform(0, 1, *x.shape)
        x = np.ldexp(x, draw.integers(-3, 4, POOL // 2, tokens, 1))
    wrong = [
        _Encoder(scale=_positive_scale),
        _Encoder(scale=_scale_without_sign),
        _Encoder(scale=_unrounded_minimum),
        _Encoder(code=_wrapped),
        _Encoder(code=_wrapped_wide),
        _Encoder(code=_unclamped_sign),
    ]
    yield from _picked(scheme, x.astype(np.float32), wrong)


def _positive_scale(step: _Step, coded: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    scale, zero = _right_scale(step, coded)
    return np.maximum(scale, scale.dtype.type(0)), zero


def _scale_without_sign(step: _Step, coded: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    scale, zero = _right_scale(step, coded)
    return np.abs(scale), zero


def _wrapped(step: _Step) -> Float32:
    whole = np.clip(np.rint(_quotient(step).astype(np.float64)), -(2.0**62), 2.0**62)
    return _clamped(whole.astype(np.int64).astype(np.int8), step.scheme)


def _wrapped_wide(step: _Step) -> Float32:
    whole = np.clip(np.rint(_quotient(step).astype(np.float64)), -(2.0**62), 2.0**62)
    return _clamped(whole.astype(np.int64).astype(np.int16), step.scheme)


def _unclamped_sign(step: _Step) -> Float32:
    """Clamp only above, and let unsigned bytes wrap below."""
    whole = np.clip(np.rint(_quotient(step).astype(np.float64)), -(2.0**62), 2.0**62)
    return _clamped(whole.astype(np.int64).astype(np.uint8), step.scheme)


@_family("collapse")
def _collapses(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    """Tokens that are not zero but decode to zero."""
    if scheme.bits == 2 and scheme.axis == "channel" and scheme.separate_norm:
        yield _Made(_with_sinks(np.vstack([np.eye(4), np.ones((1, 4))]).astype(np.float32), scheme))
    x = draw.bell(3, 4)
    x[1] = np.ldexp(x[1], -140)
    yield _Made(_with_sinks(x, scheme))


@_family("outlier-channels")
def _outliers(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    kept = scheme.outlier_channels
    for magnitude in (10.0, 1000.0):
        x = draw.bell(4, kept + 5)
        x[:, [1, 3]] *= np.float32(magnitude)
        yield _Made(_with_sinks(x, scheme))
    if not kept:
        return
    equal = draw.bell(4, kept + 4) * np.float32(0.25)
    equal[1], equal[2, ::2] = 2, -2  # equal peaks, of both signs
    yield _Made(_with_sinks(equal, scheme))
    # One spike against a larger mean: the peak decides.
    spiked = np.abs(draw.bell(5, kept + 4)) * np.float32(0.0625)
    spiked[:, : kept + 1] = 1
    spiked[3, -kept - 1 :] = -1.5 if kept == 1 else 1.5
    spiked[3, -1] = -1.75
    yield _Made(_with_sinks(spiked, scheme))
    ordered = draw.bell(3, kept + 3) * np.float32(0.125)
    ordered[1, ::-1] = 1 + np.arange(kept + 3) / 8
    yield _Made(_with_sinks(ordered, scheme))
    for head_dim in dict.fromkeys((max(kept - 1, 1), kept, kept + 1)):
        yield _Made(_with_sinks(draw.bell(3, head_dim), scheme))
    # A value of another token's outlier channel that is narrowed to -0, and to a subnormal.
    tiny = draw.bell(3, kept + 3)
    tiny[0, :kept] = -(2.0**-27)
    tiny[1, :kept] = 8
    tiny[2, :kept] = -3 * 2.0**-26
    yield _Made(_with_sinks(tiny, scheme), ("negative-zero",))
    # Ties of float16, on both sides of the even one.
    half = _float32([1 + 2.0**-11, 1 + 3 * 2.0**-11, 1.5 + 2.0**-11 + 2.0**-23])
    ties = np.concatenate([np.repeat(half[:, None], kept, axis=1), draw.bell(3, 3) / 16], axis=1)
    yield _Made(_with_sinks(ties.astype(np.float32), scheme))
    if not scheme.separate_norm:
        for value in (65519.0, 65520.0):
            over = draw.bell(3, kept + 3)
            over[:, :kept] = 300
            over[1, 0] = value
            yield _Made(_with_sinks(over, scheme))


@_family("search")
def _searches(scheme: Scheme, draw: _Draw) -> Iterator[_Made]:
    if scheme.scale_rule == "search":
        for tokens, head_dim in ((24, 4), (9, 6), (3, 40), (2, 3)):
            x = draw.bell(tokens, head_dim)
            x[0] *= 2
            yield _Made(_with_sinks(x, scheme))
        x = draw.bell(12, 4)
        x[5] = 0
        yield _Made(_with_sinks(x * np.float32(x > 0), scheme))


# --- decode -------------------------------------------------------------------------------------

# Families whose encoded cases are decoded, too.
_DECODED = (
    "ordinary", "leading-axes", "zero-token", "zero-channel", "negative-zero", "block-boundary",
    "sinks", "padding", "tiny-norm", "norm-narrowing", "scale-range", "collapse",
    "outlier-channels",
)  # fmt: skip


class _Decoder(NamedTuple):
    """The decisions of `spec.decode`, any of which may be replaced by a wrong one."""

    dequantize: Callable[[Array, Array, Array], Array] = spec.dequantize
    reconstruct: Callable[[Array, Array, Scheme], Array] = spec.reconstruct

    def __call__(self, block: spec.Block, scheme: Scheme) -> Array:
        y = self.dequantize(block.codes, block.scale, block.zero)
        at = np.broadcast_to(block.outlier_index, block.outliers.shape)
        np.put_along_axis(y, at, block.outliers.astype(y.dtype), -1)
        return np.asarray(self.reconstruct(y, block.norm, scheme)).astype(np.float32)


def _fused(codes: Array, scale: Array, zero: Array) -> Array:
    wide = codes.astype(np.float64) * scale.astype(np.float64) + zero.astype(np.float64)
    return wide.astype(np.float32)


def _wide_dequantize(codes: Array, scale: Array, zero: Array) -> Array:
    return codes.astype(np.float64) * scale.astype(np.float64) + zero.astype(np.float64)


def _centred(codes: Array, scale: Array, zero: Array) -> Array:
    """Codes from the middle of their range: another product, and another sum."""
    middle = np.float32(codes.max() // 2 + 1)
    scale, zero = scale.astype(np.float32), zero.astype(np.float32)
    return np.asarray((codes.astype(np.float32) - middle) * scale + (zero + middle * scale))


def _renormalising(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    def reconstruct(y: Array, norm: Array, scheme: Scheme) -> Array:
        if not scheme.separate_norm or scheme.magnitude != "norm":
            return np.asarray(norm.astype(y.dtype)[..., None] * y)
        return function(y, norm.astype(np.float32)[..., None])

    return reconstruct


def _length(y: Array) -> Array:
    if y.dtype == np.float64:
        length = np.sqrt(_total(y * y))
        return np.where(length == 0, np.inf, length)[..., None]
    return spec.where_zero(rounding.norm(y), np.inf)[..., None]


def _length_summed(total: Callable[[Float32, Float32], Float32]) -> Callable[..., Array]:
    return _renormalising(
        lambda y, norm: norm * (y / spec.where_zero(np.sqrt(total(y, y)), np.inf)[..., None])
    )


def _length_moved(toward: float) -> Callable[..., Array]:
    return _renormalising(lambda y, norm: norm * (y / np.nextafter(_length(y), np.float32(toward))))


_WRONG_DECODERS: tuple[tuple[str, _Decoder], ...] = (
    (
        "merged-decode",
        _Decoder(reconstruct=_renormalising(lambda y, norm: (norm / _length(y)) * y)),
    ),
    (
        "merged-decode",
        _Decoder(reconstruct=_renormalising(lambda y, norm: (norm * y) / _length(y))),
    ),
    (
        "reciprocal-of-length",
        _Decoder(
            reconstruct=_renormalising(lambda y, norm: norm * (y * (np.float32(1) / _length(y))))
        ),
    ),
    *(
        ("length-accumulation", _Decoder(reconstruct=_length_summed(total)))
        for total in _SUMS.values()
    ),
    ("length-accumulation", _Decoder(reconstruct=_length_moved(np.inf))),
    ("length-accumulation", _Decoder(reconstruct=_length_moved(0))),
    ("fused-decode", _Decoder(dequantize=_fused)),
    ("fused-decode", _Decoder(dequantize=_centred)),
    (
        "double-precision-decode",
        _Decoder(_wide_dequantize, _renormalising(lambda y, norm: norm * (y / _length(y)))),
    ),
    (
        "double-precision-decode",
        _Decoder(
            reconstruct=_renormalising(lambda y, norm: norm * (y.astype(np.float64) / _length(y)))
        ),
    ),
)


def _drawn_blocks(
    scheme: Scheme, draw: _Draw, count: int, tokens: int, head_dim: int, exponent: int = 0
) -> spec.Block:
    """Return blocks ``[count, tokens, head_dim]`` as an encoder might have stored them."""
    tokens = min(tokens, scheme.block_size or tokens)
    kept = min(scheme.outlier_channels, head_dim)
    own = (1, head_dim) if scheme.axis == "channel" else (tokens, 1)
    dtype = FLOAT_DTYPES[scheme.scale_dtype]

    def stored(low: float, high: float, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        values = np.ldexp(draw.uniform(low, high, count, *shape), exponent)
        return rounding.narrow(values.astype(np.float32), dtype)

    codes = draw.integers(scheme.code_range[0], scheme.code_range[1] + 1, count, tokens, head_dim)
    levels = scheme.code_range[1]
    scale = stored(0.3 / levels, 1 / levels, own, dtype)
    zero = np.zeros_like(scale)
    if not scheme.symmetric:
        zero = stored(-0.7, 0.1, own, dtype)
    norm = np.ones((count, tokens), np.float32)
    if scheme.separate_norm:
        values = draw.uniform(1, 64, count, tokens).astype(np.float32)
        norm = rounding.narrow(values, FLOAT_DTYPES[scheme.norm_dtype])
    order = np.argsort(draw.uniform(0, 1, count, 1, head_dim), axis=-1, kind="stable")
    index = np.sort(order[..., :kept], axis=-1).astype(np.int32)
    outliers = stored(-1, 1, (tokens, kept), FLOAT16)
    if kept:
        marked = spec.mark(index, head_dim)
        codes[np.broadcast_to(marked, codes.shape)] = 0
        if scheme.axis == "channel":
            scale[marked], zero[marked] = 0, 0
    return spec.Block(
        codes.astype(np.int16), norm, scale, zero, index, outliers,
        np.zeros((count, tokens), bool),
    )  # fmt: skip


def _one(block: spec.Block, index: int) -> spec.Block:
    return spec.Block(*(part[index] for part in block))


def _synthetic(scheme: Scheme, seed: int) -> Iterator[tuple[str, spec.Block]]:
    """Blocks that no known input was encoded to, each with the flag it is about."""
    draw = _Draw(seed, "decode")
    with np.errstate(all="ignore"):
        for tokens, head_dim in ((4, 6), (3, 25)):
            pool = _drawn_blocks(scheme, draw, POOL // 2, tokens, head_dim)
            right = _Decoder()(pool, scheme)
            for flag, wrong in _WRONG_DECODERS:
                counts = _differences(
                    [right.view(np.uint32)], [wrong(pool, scheme).view(np.uint32)]
                )
                best = int(np.argmax(counts))
                if counts[best] and (head_dim == 6 or flag == "length-accumulation"):
                    yield flag, _one(pool, best)
    for flag, block in _drawn(scheme, draw):
        yield flag, block


def _drawn(scheme: Scheme, draw: _Draw) -> Iterator[tuple[str, spec.Block]]:
    least, most = scheme.code_range
    every = np.arange(least, most + 1)
    # As many tokens as a block has: codes of each kind at each place of a byte.
    width = 16 if scheme.bits < 8 else 64
    block = _one(_drawn_blocks(scheme, draw, 1, 8, width + 1), 0)
    tokens, head_dim = block.codes.shape
    codes = np.resize(every, (tokens, head_dim))
    coded = ~spec.mark(block.outlier_index, head_dim)
    yield "every-code", block._replace(codes=np.where(coded, codes, 0).astype(np.int16))
    zeros = _one(_drawn_blocks(scheme, draw, 1, 3, 5), 0)
    norm = zeros.norm.copy()
    codes = zeros.codes.copy()
    if scheme.separate_norm:
        norm[-1] = 0
    codes[-1] = 0
    yield "zero-token", zeros._replace(codes=codes, norm=norm)
    if scheme.symmetric:  # y is 0, and its norm is not
        yield (
            "collapse",
            zeros._replace(codes=np.zeros_like(codes), outliers=np.zeros_like(zeros.outliers)),
        )
    if scheme.scale_dtype != "float16" and scheme.axis == "channel" and not scheme.outlier_channels:
        # ||y|| half way between two float32, and above by less than float64 can see.
        block = _one(_drawn_blocks(scheme, draw, 1, 3, 5), 0)
        roots = np.ldexp(1.0, np.array([0, -12, -12, -24, -30]))
        codes = np.ones_like(block.codes)
        codes[1:, 4] = 0
        yield (
            "length-accumulation",
            block._replace(
                codes=codes,
                scale=roots[None].astype(block.scale.dtype),
                zero=np.zeros_like(block.zero),
            ),
        )
    for exponent in (-20, -130, -16):
        tiny = _one(_drawn_blocks(scheme, draw, 1, 3, 5, exponent), 0)
        tiny = tiny._replace(codes=np.where(tiny.scale == 0, 0, tiny.codes))  # as Q1 writes them
        small = rounding.narrow(
            np.ldexp(draw.uniform(1, 4, *tiny.norm.shape), exponent).astype(np.float32),
            tiny.norm.dtype,
        )
        yield "subnormal", tiny._replace(norm=small) if scheme.separate_norm else tiny
        yield "subnormal", tiny


def _decode_cases(encoded: Iterable[Case], scheme: Scheme, seed: int) -> Iterator[Case]:
    for case in encoded:
        if case.refused_by is None and case.flags[0] in _DECODED:
            x = case.inputs["x"]
            parts = model.encode(x, scheme)
            yield _decode_case(case.id, case.flags, parts, x.shape, scheme)
    numbers: dict[str, int] = {}
    for flag, block in _synthetic(scheme, seed):
        number = numbers[flag] = numbers.get(flag, 99) + 1  # behind those of encoded cases
        sinks = _float32([[0.5, -3, 7]])
        sinks = np.resize(sinks, (scheme.sink_tokens, block.codes.shape[-1]))
        parts = model.parts_of(sinks, block, scheme)
        shape = (len(sinks) + len(block.codes), block.codes.shape[-1])
        yield _decode_case(f"{flag}/{number}", (flag,), parts, shape, scheme)


def _decode_case(
    name: str,
    flags: tuple[str, ...],
    parts: dict[str, Array],
    shape: tuple[int, ...],
    scheme: Scheme,
) -> Case:
    inputs = {**parts, "shape": np.array(shape, np.int32)}
    return Case(name, "decode", scheme, flags, inputs)


# --- attend -------------------------------------------------------------------------------------


def _attend_cases(scheme: Scheme, seed: int) -> Iterator[Case]:
    draw = _Draw(seed, "attend")
    numbers: dict[str, int] = {}
    for flag, query, keys, values, value_scheme, options in _attended(scheme, draw):
        number = numbers[flag] = numbers.get(flag, -1) + 1
        inputs: dict[str, Array] = {"query": query.astype(np.float32)}
        for side, x, own in (("keys", keys, scheme), ("values", values, value_scheme)):
            parts = model.encode(x.astype(np.float32), own)
            inputs |= {f"{side}.{name}": part for name, part in parts.items()}
            inputs[f"{side}.shape"] = np.array(x.shape, np.int32)
        default = np.float32(1) / np.sqrt(np.float32(query.shape[-1]))
        inputs |= {
            "value_scheme": scheme_array(value_scheme),
            "scale": np.array([options.get("scale", default)], np.float32),
            "causal": np.array([options.get("causal", 1)], np.int32),
            "softcap": np.array([options.get("softcap", 0)], np.float32),
            "sliding_window": np.array([options.get("sliding_window", 0)], np.int32),
        }
        yield Case(f"{flag}/{number}", "attend", scheme, (flag,), inputs)


_Attended = tuple[str, Float32, Float32, Float32, Scheme, dict[str, float]]


def _attended(scheme: Scheme, draw: _Draw) -> Iterator[_Attended]:
    """Yield flag, query, keys, values, scheme of the values, and options."""
    sinks = scheme.sink_tokens

    def drawn(
        heads: int, queries: int, kv_heads: int, tokens: int, head_dim: int, value_dim: int
    ) -> tuple[Float32, Float32, Float32]:
        own = (kv_heads, sinks + tokens)
        return (
            draw.bell(heads, queries, head_dim), draw.bell(*own, head_dim),
            draw.bell(*own, value_dim),
        )  # fmt: skip

    for heads, queries, kv_heads, tokens, head_dim in (
        (2, 1, 2, 9, 8), (1, 1, 1, 1, 5), (2, 2, 1, 4, 16),
    ):  # fmt: skip
        yield "attention", *drawn(heads, queries, kv_heads, tokens, head_dim, head_dim), scheme, {}
    for heads, kv_heads in ((8, 2), (6, 3), (4, 1)):
        query, keys, values = drawn(heads, 1, kv_heads, 4, 4, 4)
        values += 4 * np.arange(kv_heads, dtype=np.float32)[:, None, None]
        yield "grouped-heads", query, keys, values, scheme, {}
    for queries, causal in ((3, 1), (3, 0), (6, 1)):
        query, keys, values = drawn(2, queries, 1, 6, 4, 4)
        values[:, -1] += 8  # what must not be seen weighs
        yield "causal-mask", query, keys, values, scheme, {"causal": causal}
    for window, queries, tokens in ((1, 2, 5), (3, 2, 9), (2, 4, 4), (100, 2, 5)):
        query, keys, values = drawn(2, queries, 1, tokens, 4, 4)
        values += 4 * np.arange(sinks + tokens, dtype=np.float32)[:, None]
        yield "sliding-window", query, keys, values, scheme, {"sliding_window": window}
    for softcap, factor in ((2.0, 4.0), (30.0, 20.0)):
        query, keys, values = drawn(2, 1, 1, 6, 8, 4)
        yield "softcap", query * np.float32(factor), keys, values, scheme, {"softcap": softcap}
    yield "attention-scale", *drawn(2, 1, 1, 6, 8, 8), scheme, {"scale": 1.25}
    for factor in (200.0, -200.0):  # exp overflows, or all of it underflows
        query, keys, values = drawn(2, 1, 1, 6, 4, 4)
        query, keys = np.abs(query) + np.float32(0.5), np.abs(keys) + np.float32(0.5)
        yield "large-scores", query * np.float32(factor), keys, values, scheme, {}
    query, keys, values = drawn(2, 1, 1, 6, 4, 4)
    keys[:] = keys[:, :1]
    yield "equal-scores", query, keys, values, scheme, {}
    yield "value-head-dim", *drawn(2, 1, 1, 5, 8, 3), scheme, {}
    other = Scheme(
        bits=8 if scheme.bits == 4 else 4, separate_norm=False, axis="token", sink_tokens=sinks,
        symmetric=not scheme.symmetric,
    )  # fmt: skip
    yield "value-scheme", *drawn(2, 1, 1, 5, 8, 8), other, {}
    query, keys, values = drawn(2, 1, 1, 4, 4, 4)
    keys[:, -2], values[:, -3] = 0, 0
    yield "zero-token", query, keys, values, scheme, {}
    if scheme.block_size is not None and scheme.block_size <= 16:
        tokens = 2 * scheme.block_size + 1
        query, keys, values = drawn(2, 1, 1, tokens, 4, 4)
        grown = np.ldexp(np.float32(1), np.arange(sinks + tokens) // scheme.block_size)[:, None]
        yield "block-boundary", query, keys, values * grown, scheme, {}


# --- stream -------------------------------------------------------------------------------------
# Families whose blocks a cache seals, too.
_STREAMED = (
    "half-even", "reciprocal-of-scale", "merged-division", "reciprocal-of-norm", "tiny-norm",
    "norm-accumulation", "norm-narrowing", "factor-narrowing", "scale-narrowing", "scale-range",
    "negative-zero", "outlier-channels",
)  # fmt: skip


def _stream_cases(encoded: Iterable[Case], scheme: Scheme, seed: int) -> Iterator[Case]:
    if scheme.block_size is None:
        return
    for source in encoded:
        x = source.inputs["x"]
        tokens = scheme.sink_tokens + scheme.block_size
        streamed = source.flags[0] in _STREAMED and source.refused_by is None
        if tokens > 64:  # one of each will do
            streamed &= source.id.endswith("/0")
        if streamed and len(x) <= tokens and tokens * x.shape[-1] <= 1300:
            padded = np.zeros((1, tokens, x.shape[-1]), x.dtype)  # zero tokens fill the block
            padded[0, : len(x)] = x
            inputs = {"x": padded, "steps": np.array([[0, tokens]], np.int32)}
            inputs["row"] = np.zeros(1, np.int32)
            if _refusal(padded[0], scheme) is None:
                yield replace(source, operation="stream", inputs=inputs)
    draw = _Draw(seed, "stream")
    size, sinks = scheme.block_size, scheme.sink_tokens
    head_dim = 2 if size > 16 else 4
    numbers: dict[str, int] = {}

    def case(flag: str, dtype: np.dtype[Any], *steps: tuple[int, ...], row: int = 0) -> Case:
        """Make a case of steps ``(kind, number of row 0, number of row 1, ...)``."""
        rows = len(steps[0]) - 1
        counts = np.array(steps, np.int32)
        tokens = int(np.sum(counts[counts[:, 0] == 0, 1:], axis=0).max())
        x = draw.bell(rows, tokens, head_dim).astype(np.float64)
        # Each block of another magnitude, and other rows a thousand times as large.
        x *= np.ldexp(1.0, (np.arange(tokens) * 2 // size) % 5)[:, None]
        x[np.arange(rows) != row] *= 1000
        number = numbers[flag] = numbers.get(flag, -1) + 1
        inputs: dict[str, Array] = {
            "x": x.astype(dtype), "steps": counts, "row": np.array([row], np.int32),
        }  # fmt: skip
        return Case(f"{flag}/{number}", "stream", scheme, (flag,), inputs)

    float32 = np.dtype(np.float32)
    yield case("stream-append", float32, (0, sinks + 2 * size + 1))
    yield case("stream-append", float32, *[(0, 1)] * (sinks + size + 1))
    yield case("stream-append", float32, (0, sinks + size - 1), (0, 2), (0, size), (0, 0))
    yield case("stream-append", float32, (0, sinks), (0, size), (0, size))
    yield (
        case("stream-append", float32, (0, sinks + size - 1))
        if size > 1
        else case("stream-append", float32, (0, sinks + 1))
    )
    if sinks:
        yield case("stream-append", float32, (0, sinks - 1), (0, size))
        yield case("stream-append", float32, (0, sinks))
    inside = sinks + size + (size + 1) // 2  # in the second block
    whole = sinks + 2 * size + 1
    for dtype in (float32, FLOAT16, BFLOAT16):
        if size > 1:
            yield case("crop-block", dtype, (0, whole), (1, inside))
            yield case("crop-block", dtype, (0, whole), (1, inside), (0, 2 * size))
        yield case("crop-edge", dtype, (0, whole), (1, sinks + size), (0, size + 1))
    if size > 1:
        yield case("crop-block", float32, (0, whole), (1, sinks + 1), (0, 1), (0, size))
        yield case("crop-block", float32, (0, whole), (1, inside), (1, inside - 1), (0, size))
        yield case("crop-tail", float32, (0, sinks + 2 * size - 1), (1, inside), (0, size))
        yield case("crop-tail", FLOAT16, (0, sinks + size - 1), (1, sinks + 1), (0, size))
    yield case("crop-start", float32, (0, sinks + size), (1, 0), (0, sinks + size))
    yield case("crop-start", float32, (0, sinks + size), (1, sinks), (0, size))
    for length in range(1, sinks):
        yield case("crop-start", float32, (0, sinks + size), (1, length), (0, sinks + size))
    yield case("crop-edge", float32, (0, whole), (1, whole), (0, 1))
    ragged = ((0, size, sinks + size + 1, 1), (0, size, 0, 2), (0, 0, size, size))
    for row in range(3):
        yield case("ragged-batch", float32, *ragged, row=row)
    cropped = (1, sinks + 1, sinks + size + size // 2, 0)
    yield case("ragged-batch", float32, *ragged, cropped, (0, size, size, size), row=1)
    if size > 1:
        saturated = case("crop-saturation", FLOAT16, (0, sinks + size), (1, sinks + size - 1))
        block = _decoded_beyond_float16(scheme, draw, size, head_dim)
        if block is not None:
            x = np.concatenate([np.ones((sinks, head_dim), FLOAT16), block])[None]
            yield replace(saturated, inputs={**saturated.inputs, "x": x})


def _decoded_beyond_float16(scheme: Scheme, draw: _Draw, size: int, head_dim: int) -> Array | None:
    """Return a block of float16 that is accepted, and decodes to values beyond float16."""
    x = 500 * draw.bell(1024, size, head_dim).astype(np.float64)
    x[:, 0] = 65504 * draw.uniform(-0.02, 0.02, 1024, head_dim)
    x[:, 0, 0] = 65504
    x[:, 0, 1] = 65504 * draw.uniform(-0.12, 0.12, 1024)
    pool = x.astype(FLOAT16)
    with np.errstate(all="ignore"):
        decoded = spec.decode(spec.encode(pool.astype(np.float32), scheme), scheme)
        beyond = np.isfinite(decoded).all(axis=(1, 2)) & np.any(
            np.abs(decoded[:, :-1]) >= 65520, axis=(1, 2)
        )
    for block in pool[beyond][:8]:
        if _refusal(block, replace(scheme, sink_tokens=0)) is None:
            return np.asarray(block)
    return None

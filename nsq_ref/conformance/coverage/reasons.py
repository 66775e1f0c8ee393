"""Why no case can show a mistake in a scheme and a dtype of input: the proofs.

A reason says for which mistakes and where it holds. Tests look for a counterexample to each of
them: a case, or a drawn input, that shows the mistake all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from nsq_ref import rounding
from nsq_ref.conformance.mistakes import MISTAKES
from nsq_ref.conformance.mistakes.balanced import BALANCED
from nsq_ref.conformance.mistakes.caches import CACHES
from nsq_ref.conformance.mistakes.factors import FACTORS
from nsq_ref.conformance.mistakes.feedback import GAINS_SEEN, SEARCHING
from nsq_ref.conformance.mistakes.feedback_caches import FED_CACHES
from nsq_ref.conformance.mistakes.norms import NORMS
from nsq_ref.conformance.mistakes.outliers import OUTLIERS
from nsq_ref.conformance.mistakes.reference import Mistake
from nsq_ref.conformance.mistakes.tiles import TILES
from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.scheme import Scheme


class Reason(NamedTuple):
    """Why nothing can show some mistakes."""

    name: str
    says: str
    holds: Callable[[Scheme, str], bool]
    mistakes: frozenset[str]


def _changing(*functions: str) -> list[str]:
    """The mistakes that are made in one of these functions, and in no other."""
    return [name for name, one in MISTAKES.items() if set(one.changes) <= set(functions)]


def _names(of: Iterable[Mistake]) -> list[str]:
    return [one.name for one in of]


def _starting(*starts: str, ending: str = "") -> list[str]:
    return [name for name in MISTAKES if name.startswith(starts) and name.endswith(ending)]


def _reason(
    name: str, says: str, holds: Callable[[Scheme, str], bool], mistakes: Iterable[str]
) -> Reason:
    return Reason(name, says, holds, frozenset(mistakes))


_OF_NORMS = _starting("norm at least", "norm narrowed to", "reciprocal of the norm", "epsilon")
_OF_LENGTHS = [
    name for name in _changing("spec.reconstruct")
    if not name.startswith(("decoded values", "second half", "last partial", "channels past"))
    and name != "gain renormalised"
]  # fmt: skip
_TILES = _names(TILES)
_SIZED_GAINS = [one.name for one in BALANCED if one.rule == "M2"]


def _factor(magnitude: str) -> list[str]:
    rule = {"gain": "M2", "lsq": "M3"}[magnitude]
    return [one.name for one in FACTORS if one.rule == rule]


def _narrow(scheme: Scheme) -> bool:
    return scheme.scale_dtype != "float32"


def _at_most_one(scheme: Scheme) -> bool:
    """Whether the largest code times the scale of a direction of 1 is no more than 1."""
    levels = np.float32(scheme.code_range[1])
    scale = rounding.narrow(np.ones(1, np.float32) / levels, FLOAT_DTYPES[scheme.scale_dtype])
    return bool(scale.astype(np.float32) * levels <= 1)


def _tile_of(name: str) -> int:
    """The number in the name of a mistake."""
    return next(int(word) for word in name.split() if word.isdigit())


# Input that must be refused: the rules that say so.
REFUSALS = ("I2", "N1", "M4", "O1", "S5", "D3")


def _takes(*rules: str) -> list[str]:
    return [f"takes what {rule} refuses" for rule in rules]


def _within_blocks_of(most: int) -> Callable[[Scheme, str], bool]:
    return lambda scheme, dtype: (scheme.block_size or most + 1) <= most


def _input_of(narrow: str) -> Callable[[Scheme, str], bool]:
    return lambda scheme, dtype: dtype == narrow


def _plain_input_of(narrow: str) -> Callable[[Scheme, str], bool]:
    return lambda scheme, dtype: not scheme.separate_norm and dtype == narrow


REASONS: tuple[Reason, ...] = (
    _reason("no norm", "No norm is separated: it is 1, and 1 is stored nowhere (N1).",
        lambda scheme, dtype: not scheme.separate_norm,
        [*_names(NORMS), *_names(FACTORS), *_OF_LENGTHS, "reciprocal of the norm",
         *_starting("norm narrowed to", "norm at least", "factors counted"),
         "codes of a zero token", "values read with the keys' norms",
         "direction from the float64 norm", "reciprocal root", "zero test on the norm in float16",
         *(name for name in _TILES if name.endswith("out of the norm")), "gain renormalised",
         "epsilon 1e-12 added to the norm", "epsilon 1e-10 added to the norm",
         "epsilon 1e-08 added to the norm"]),
    _reason("plain norms", "Norms are plain: rule N3 is not asked for.",
        lambda scheme, dtype: scheme.norm_rule == "plain", _names(BALANCED)),
    _reason("magnitude", "Another factor is stored than the one that is wrong (M1, M2, M3).",
        lambda scheme, dtype: scheme.magnitude != "gain", _SIZED_GAINS),
    _reason("no outliers", "There are no outlier channels (O1).",
        lambda scheme, dtype: scheme.outlier_channels == 0,
        ["sizes without outlier channels", "outlier channels without growth"]),
    _reason("one block", "A sequence is one block (B1).",
        lambda scheme, dtype: scheme.block_size is None, ["sizes of the whole sequence"]),
    _reason("one token",
        "Of one token all ranges are 0, and both spreads: the norm is plain (N3).",
        lambda scheme, dtype: scheme.block_size == 1,
        [one.name for one in BALANCED
         if one.name not in ("always balanced", "balanced at equal spreads")]),
    _reason("symmetric", "A symmetric scheme has no zero, and 0 in a range changes no maximum.",
        lambda scheme, dtype: scheme.symmetric,
        [name for name, one in MISTAKES.items() if one.rule == "S2"] + [
            "codes of a zero token", "zero tokens outside the range", "integer zero point",
            "zero left out", "fused multiply-add", "zero divided apart",
            "codes from the zero before narrowing"]),
    _reason("asymmetric", "An asymmetric scheme takes both ends, and its codes have no sign.",
        lambda scheme, dtype: not scheme.symmetric,
        ["qmax one too large", "qmax a half too large", "maximum without sign",
         "range from minimum to maximum", "most negative code allowed", "two's complement",
         "offset one too small", "sign and magnitude", "padding with zero bits",
         "scales that grow"]),
    _reason("magnitude", "Another factor is stored than the one that is wrong (M1, M2, M3).",
        lambda scheme, dtype: scheme.magnitude != "gain", _factor("gain")),
    _reason("magnitude", "Another factor is stored than the one that is wrong (M1, M2, M3).",
        lambda scheme, dtype: scheme.magnitude != "lsq", _factor("lsq")),
    _reason("magnitude", "Another factor is stored than the one that is wrong (M1, M2, M3).",
        lambda scheme, dtype: scheme.magnitude != "norm",
        ["norm narrowed at once from float64", *_OF_LENGTHS]),
    _reason("magnitude", "Another factor is stored than the one that is wrong (M1, M2, M3).",
        lambda scheme, dtype: scheme.magnitude == "norm", ["gain renormalised"]),
    _reason("no outliers", "There are no outlier channels (O1).",
        lambda scheme, dtype: scheme.outlier_channels == 0,
        [*_names(OUTLIERS), "outliers left out",
         *(name for name in _TILES if name.endswith("out of the ranking"))]),
    _reason("no cache", "Without a number of tokens a block there is no cache (B1).",
        lambda scheme, dtype: scheme.block_size is None, _names([*CACHES, *FED_CACHES])),
    _reason("no tail", "A block of one token has no tail, and a crop leaves none of it (B1).",
        lambda scheme, dtype: scheme.block_size == 1,
        ["feedback only where one append fills a block", "no feedback after a crop",
         "feedback in the tail"]),
    _reason("one block", "A sequence is one block (B1).",
        lambda scheme, dtype: scheme.block_size is None,
        ["scales of the first block", "scales of the block before",
         *_starting("blocks counted modulo"),
         "blocks counted without the last, short one"]),
    _reason("no sinks", "There are no sinks (K1).",
        lambda scheme, dtype: scheme.sink_tokens == 0, _starting("sinks in ")),
    _reason("one sink", "One sink comes in one piece (K1).",
        lambda scheme, dtype: scheme.sink_tokens < 2, ["sinks from one append"]),
    _reason("axis", "No minimum or maximum is over tokens.",
        lambda scheme, dtype: scheme.axis == "token",
        [name for name in _TILES
         if "token" in name and name.endswith("out of the range")]
        + ["scales of outlier channels", "scales shifted for later sequences",
           *_starting("blocks counted modulo"),
           "zero tokens outside the range",
           *_starting("scales counted modulo", "sinks in the range")]),
    _reason("axis", "No minimum or maximum is over channels.",
        lambda scheme, dtype: scheme.axis == "channel",
        [name for name in _TILES
         if "channel" in name and name.endswith("out of the range")] + ["outliers in the range"]),
    *(_reason("small blocks", "A block has no more tokens than are counted.",
          _within_blocks_of(_tile_of(name) - name.startswith("last token")), [name])
      for name in _TILES if "token" in name and name.endswith(("the range", "the ranking"))
      and any(word.isdigit() for word in name.split())),
    _reason("bits", "Codes have another width (P1).",
        lambda scheme, dtype: scheme.bits != 3,
        ["3-bit codes one behind the other", "high bits before low bits"]),
    _reason("bits", "Codes have another width (P1).",
        lambda scheme, dtype: scheme.bits != 4, ["mask of two bits",
                                                 "halves of the row in one byte"]),
    _reason("bits", "Codes have another width (P1).",
        lambda scheme, dtype: scheme.bits not in (2, 4), ["highest bits first"]),
    _reason("whole bytes", "A code fills its byte, so that there is no padding (P1).",
        lambda scheme, dtype: scheme.bits == 8,
        ["padding with zero bits", "rows that share bytes"]),
    _reason("float16 norms", "Norms of float16 input that are not 0 are 2^-24 or more.",
        lambda scheme, dtype: dtype == "float16",
        ["subnormal norms flushed", "zero test on the norm in float16", "norm at least 1e-12",
         "norm at least 1e-10", "norm at least 1e-08", "subnormal inputs flushed",
         *(f"norms below {least} taken for 0" for least in ("1e-12", "1e-10", "1e-08"))]),
    _reason("another input", "Only float16 input has such elements.",
        lambda scheme, dtype: dtype != "float16", ["subnormal float16 inputs flushed"]),
    _reason("scales too coarse",
        "What is flushed is less than half the least scale: its codes are 0 all the same.",
        lambda scheme, dtype: not scheme.separate_norm and scheme.scale_dtype == "float16",
        ["subnormal inputs flushed"]),
    _reason("least scale", "1e-8 is 0 in float16, the dtype of scales.",
        lambda scheme, dtype: scheme.scale_dtype == "float16" and scheme.symmetric,
        ["scale at least 1e-08"]),
    _reason("short scales",
        "A direction and (k + 1/2) times a scale of 11 bits are both float32: unless they are "
        "equal, their quotient is no tie in float32 either (Q1).",
        lambda scheme, dtype: _narrow(scheme), ["quotient in double precision"]),
    _reason("short scales",
        "A direction and (k + 1/2) times a scale of 11 bits are both float32: unless they are "
        "equal, their quotient is no tie in float32 either (Q1).",
        lambda scheme, dtype: _narrow(scheme) and scheme.symmetric,
        ["difference and quotient in double precision"]),
    _reason("short products", "The product of a code and a scale of 11 bits is exact (D1).",
        lambda scheme, dtype: _narrow(scheme), ["fused multiply-add"]),
    _reason("short products",
        "y is a whole multiple of 2^-24 of 15 bits: float64 sums its squares well enough (D1).",
        lambda scheme, dtype: scheme.scale_dtype == "float16", ["length in float64 alone"]),
    _reason("quotients are small",
        "A scale is at least two thirds of the quotient that it was narrowed from, or 0, so that "
        "quotients stay below 1.5 qmax (S3).",
        lambda scheme, dtype: scheme.symmetric and scheme.bits < 8, ["cast before the clamp"]),
    _reason("nothing to narrow", "The tail has the dtype of decoded values (C1).",
        lambda scheme, dtype: dtype == "float32",
        ["tokens of a crop cut off", "tokens of a crop overflow"]),
    _reason("nothing to narrow", "Decoded values are far below the largest bfloat16 (C1).",
        lambda scheme, dtype: dtype == "bfloat16" and scheme.norm_dtype == "float16",
        ["tokens of a crop overflow"]),
    *(_reason("narrow already", "Directions are the input, which has that dtype.",
          _plain_input_of(narrow), [f"directions in {narrow}"])
      for narrow in ("float16", "bfloat16")),
    *(_reason("narrow already", "What is kept as it came has that dtype (K1, B1).",
          _input_of(narrow),
          [f"sinks in {narrow}", f"tail in {narrow}"])
      for narrow in ("float16", "bfloat16")),
    _reason("narrow already", "A maximum of the input has the dtype of scales.",
        lambda scheme, dtype: not scheme.separate_norm and dtype == scheme.scale_dtype
        and scheme.symmetric,
        ["maximum narrowed before the division"]),
    _reason("no tie",
        "qmax times a tie of float16 has more bits than float16 input (S3).",
        lambda scheme, dtype: not scheme.separate_norm and scheme.scale_dtype == "float16"
        and dtype == "float16",
        ["scales narrowed with ties away from zero", "narrowing with ties away from zero"]),
    _reason("no norm", "No norm is separated: it is 1, and 1 is stored nowhere (N1).",
        lambda scheme, dtype: not scheme.separate_norm, _takes("N1", "M4")),
    _reason("within range", "A norm of float16 input is far below the largest float32.",
        lambda scheme, dtype: dtype == "float16", _takes("N1")),
    _reason("within range", "A norm that is a float32 is one in this norm_dtype (M4).",
        lambda scheme, dtype: scheme.norm_dtype == "float32" and scheme.magnitude == "norm",
        _takes("M4")),
    _reason("within range", "Norms and gains of float16 input are far below the largest (M4).",
        lambda scheme, dtype: scheme.norm_dtype != "float16" and dtype == "float16",
        _takes("M4")),
    _reason("within range", "Directions lie in [-1, 1] (S5).",
        lambda scheme, dtype: scheme.separate_norm, _takes("S5", "O1")),
    _reason("within range", "float16 holds a quotient, a minimum or an outlier of float16 input.",
        lambda scheme, dtype: dtype == "float16", _takes("S5", "O1")),
    _reason("no outliers", "There are no outlier channels (O1).",
        lambda scheme, dtype: scheme.outlier_channels == 0, _takes("O1")),
    _reason("within range", "A decoded value is no larger than the stored norm (D3).",
        lambda scheme, dtype: scheme.separate_norm and scheme.magnitude == "norm", _takes("D3")),
    _reason("within range",
        "qmax times 1 / qmax is 1 or less in float32, and so is every |y|: a decoded value is no "
        "larger than the gain, which is finite (D3).",
        lambda scheme, dtype: scheme.separate_norm and scheme.symmetric and _at_most_one(scheme),
        _takes("D3")),
    _reason("within range",
        "qmax times 1 / qmax is 1 or less, and so is every |y|: a decoded value is no larger than "
        "the gain, which has the dtype of the tail (C1).",
        lambda scheme, dtype: scheme.separate_norm and scheme.symmetric and _at_most_one(scheme)
        and scheme.norm_dtype == dtype,
        ["tokens of a crop overflow"]),
    _reason("within range", "Products of a float16 and a float16 are far below the largest "
        "float32 (D3).",
        lambda scheme, dtype: scheme.norm_dtype == "float16" if scheme.separate_norm
        else scheme.scale_dtype == "float16", _takes("D3")),
    _reason("within range", "float16 input is far below the largest float32 (D3).",
        lambda scheme, dtype: dtype == "float16", _takes("D3")),
    _reason("one level", "At 2 bits qmax is 1, and dividing by 1 changes nothing (S1).",
        lambda scheme, dtype: scheme.bits == 2 and scheme.symmetric,
        ["reciprocal of the number of levels", "maximum narrowed before the division"]),
    _reason("one tie", "At 2 bits the ties are -1/2 and 1/2, and even is toward zero (Q1).",
        lambda scheme, dtype: scheme.bits == 2 and scheme.symmetric, ["half toward zero"]),
    _reason("quotients are small",
        "A scale is at least two thirds of the quotient that it was narrowed from, or 0: "
        "quotients stay below 1.5 qmax, which at 2 bits is 1 when it is rounded (S3).",
        lambda scheme, dtype: scheme.bits == 2 and scheme.symmetric,
        ["most negative code allowed"]),
    _reason("scales are normal",
        "A token's largest direction is 1 / sqrt(D) or more: up to 4096 channels its scale is a "
        "normal float16, off by 2^-11 at most, and no sum with so small an epsilon differs.",
        lambda scheme, dtype: scheme.separate_norm and scheme.axis == "token"
        and scheme.outlier_channels == 0 and scheme.symmetric and scheme.scale_dtype == "float16",
        ["subnormal scales flushed", "epsilon 1e-12 added to the scale", "cast before the clamp",
         "most negative code allowed"]),
    _reason("scales are normal",
        "A token's largest direction is 1 / sqrt(D) or more: up to 4096 channels its scale is a "
        "normal float16, off by 2^-11 at most, and no sum with so small an epsilon differs.",
        lambda scheme, dtype: scheme.separate_norm and scheme.axis == "token" and scheme.bits < 8
        and scheme.outlier_channels == 0 and scheme.symmetric and scheme.scale_dtype == "float16",
        ["epsilon 1e-10 added to the scale"]),
    _reason("two values",
        "The scale is the maximum itself. A value is half of it, which is a tie however it is "
        "divided, or off that by 2^-25 and by 2^-11 of it, more than the mistake moves.",
        lambda scheme, dtype: scheme.bits == 2 and scheme.symmetric and not scheme.separate_norm
        and scheme.scale_dtype == "float16" and dtype == "float16",
        [*(f"epsilon {e} added to the norm" for e in ("1e-07", "1e-06", "1e-05")),
         *(f"epsilon {e} added to the scale" for e in ("1e-12", "1e-10", "1e-08")),
         "codes from the scale before narrowing", "scales narrowed toward zero",
         "scales narrowed up", "narrowing toward zero"]),
    _reason("two values",
        "The scale is the maximum itself. A value is half of it, which is a tie however it is "
        "divided, or off that by 2^-25 and by 2^-11 of it, more than the mistake moves.",
        lambda scheme, dtype: scheme.bits == 2 and scheme.symmetric and not scheme.separate_norm
        and scheme.scale_dtype == "float16" and dtype in ("float16", "bfloat16"),
        ["reciprocal of the scale"]),
    _reason("looked through",
        "Measured: max / qmax and max * (1 / qmax) give one float16 for every float16, and at 3 "
        "and 8 bits for every bfloat16.",
        lambda scheme, dtype: scheme.symmetric and not scheme.separate_norm
        and scheme.scale_dtype == "float16"
        and (dtype == "float16" or (dtype == "bfloat16" and scheme.bits in (3, 8))),
        ["reciprocal of the number of levels"]),
    _reason("refused before", "What is so large makes an outlier beyond float16 first (O1).",
        lambda scheme, dtype: scheme.outlier_channels > 0, _takes("S5")),
    _reason("not narrowed", "float32 is stored as it is.",
        lambda scheme, dtype: scheme.scale_dtype == "float32",
        ["maximum narrowed before the division", *_starting("scales narrowed"),
         "codes from the scale before narrowing", "codes from the zero before narrowing",
         "range from the unrounded minimum",
         "negative scale forced to zero", "magnitude of a negative scale"]),
    _reason("quotients are small",
        "Zero is the minimum, and a scale at least two thirds of its quotient, or 0 (S3).",
        lambda scheme, dtype: not scheme.symmetric and scheme.bits < 8
        and scheme.scale_dtype == "float32", ["cast before the clamp"]),
    _reason("encoder's choice",
        "With the scale rule search a port is judged on its own scales (S4).",
        lambda scheme, dtype: scheme.scale_rule == "search" and scheme.block_size is None,
        [name for name in _changing("spec.extent", "spec.scale_of", "spec.range_span")
         if name not in ("negative scale forced to zero", "magnitude of a negative scale")]),
    _reason("encoder's choice",
        "With the scale rule search a port is judged on its own scales (S4).",
        lambda scheme, dtype: scheme.scale_rule == "search",
        ["reciprocal of the number of levels", "range in double precision",
         "range that includes zero", "maximum of at least zero", "minimum of at most zero",
         "negative scale forced to zero",
         "magnitude of a negative scale", "scale at least 1e-08", "range shared by heads",
         "scales narrowed with ties away from zero", "cast before the clamp",
         *(f"last partial tile of {n} tokens out of the range" for n in (16, 32, 64)),
         *_starting("sequences counted")]),
    _reason("scale of 0", "The scale of an outlier channel is 0, and so are its codes (O1, Q1).",
        lambda scheme, dtype: scheme.axis == "channel", ["codes of outlier channels"]),
    _reason("nothing to narrow", "A decoded value is no larger than a norm, which float16 holds.",
        lambda scheme, dtype: scheme.magnitude == "norm" and scheme.norm_dtype == "float16",
        ["tokens of a crop overflow"]),
    _reason("nothing so small", "Of tokens beside float16 sinks, no decoded value is subnormal.",
        lambda scheme, dtype: dtype == "float16" and scheme.sink_tokens > 0
        and scheme.symmetric and scheme.norm_dtype == "float16",
        ["subnormals flushed in decode", "decoded values flushed"]),
    _reason("not narrowed", "float32 is stored as it is.",
        lambda scheme, dtype: scheme.scale_dtype == scheme.norm_dtype == "float32",
        ["narrowing toward zero", "narrowing with ties away from zero"]),
    _reason("not narrowed", "float32 is stored as it is.",
        lambda scheme, dtype: scheme.norm_dtype == "float32" and scheme.separate_norm,
        [*_starting("factors narrowed")]),
    _reason("nothing so small",
        "Norms of float16 input are 2^-24 or more, directions 2^-49 or more: with the exponents "
        "of float32, no scale and no factor is subnormal.",
        lambda scheme, dtype: dtype == "float16" and scheme.separate_norm
        and scheme.scale_dtype != "float16" and scheme.norm_dtype != "float16",
        ["subnormal scales flushed", "subnormals flushed", "most negative code allowed"]),
    _reason("nothing so small",
        "Norms of float16 input are 2^-24 or more, directions 2^-49 or more: with the exponents "
        "of float32, no scale and no factor is subnormal.",
        lambda scheme, dtype: dtype == "float16" and scheme.separate_norm
        and scheme.norm_dtype != "float16", ["subnormal factors flushed"]),
    _reason("no outliers", "There are no outlier channels (O1).",
        lambda scheme, dtype: scheme.outlier_channels == 0,
        ["outlier channels passed over", "errors of outlier channels left out"]),
    _reason("no error in a zero token",
        "Without norm separation no token has norm 0; symmetric, code 0 is 0, and the scale of a "
        "zero token is 0: no error. (N2, F1).",
        lambda scheme, dtype: not scheme.separate_norm or scheme.symmetric
        or scheme.axis == "token", ["feedback in zero tokens"]),
    _reason("encoder's choice",
        "Codes and factor of a zero token are 0 all the same; and with the scale rule search a "
        "port is judged on its own scales (S4).",
        lambda scheme, dtype: scheme.scale_rule == "search" and scheme.outlier_channels == 0,
        ["feedback in zero tokens"]),
    _reason("encoder's choice",
        "With the scale rule search how far channels move, and what is refused for it, follows "
        "from a port's own scales (S4).",
        lambda scheme, dtype: scheme.scale_rule == "search" and scheme.axis == "channel",
        ["only NaN falls back", "largest for what is not finite", "what is seen not finite"]),
    _reason("quotients are small",
        "The scale is made of what is coded, and at least two thirds of it, or 0 (S3): no quotient "
        "is beyond 3/2.",
        lambda scheme, dtype: scheme.bits == 2 and scheme.symmetric and scheme.axis == "channel"
        and scheme.scale_rule == "range", ["error of the code before the clamp"]),
    _reason("not searched", "There is one range (S4).",
        lambda scheme, dtype: scheme.scale_rule == "range", _names(SEARCHING)),
    _reason("encoder's choice",
        "With the scale rule search a port is judged on its own scales (S4).",
        lambda scheme, dtype: scheme.block_size is None, _names(SEARCHING)),
    _reason("one value", "Of one error the square and the fourth power are least at once.",
        lambda scheme, dtype: scheme.block_size == 1 and scheme.axis == "channel",
        ["squares under feedback", "fourth powers in float32", "fourth powers without feedback"]),
    _reason("axis", "Scales of tokens are made with squares (F1).",
        lambda scheme, dtype: scheme.axis == "token",
        ["squares under feedback", "fourth powers in float32"]),
    _reason("axis", "Scales are of channels, or of tokens (F1).",
        lambda scheme, dtype: scheme.axis == "token",
        ["scales of the directions", "scales of all blocks"]),
    _reason("axis", "Scales are of channels, or of tokens (F1).",
        lambda scheme, dtype: scheme.axis == "channel", ["scales of moved tokens"]),
    _reason("one block", "A sequence is one block (B1).",
        lambda scheme, dtype: scheme.block_size is None, ["scales of all blocks"]),
    _reason("outlier channels", "The mistake is made without outlier channels only.",
        lambda scheme, dtype: scheme.outlier_channels > 0, ["scales of all blocks"]),
    _reason("magnitude", "Another factor is stored than a gain (M1, M3).",
        lambda scheme, dtype: not scheme.separate_norm or scheme.magnitude != "gain",
        _names(GAINS_SEEN)),
    _reason("not narrowed", "float32 is stored as it is.",
        lambda scheme, dtype: scheme.scale_dtype == "float32" and scheme.scale_rule == "range",
        ["error of the scale before narrowing"]),
    _reason("narrow already", "At 2 bits the scale is a maximum of the input, which has its dtype.",
        lambda scheme, dtype: scheme.bits == 2 and scheme.symmetric and not scheme.separate_norm
        and dtype == scheme.scale_dtype, ["error of the scale before narrowing"]),
    _reason("encoder's choice",
        "With the scale rule search a port is judged on its own scales (S4).",
        lambda scheme, dtype: scheme.scale_rule == "search" and scheme.block_size is None,
        ["scales of the directions", "scales of moved tokens"]),
    _reason("encoder's choice",
        "With the scale rule search a port is judged on its own scales (S4).",
        lambda scheme, dtype: scheme.scale_rule == "search", ["scales of all blocks"]),
    _reason("large products",
        "Products of codes and float16 scales are 0, or at least 2^-24 (D1).",
        lambda scheme, dtype: not scheme.separate_norm and scheme.scale_dtype == "float16",
        ["subnormals flushed in decode", "decoded values flushed"]),
)  # fmt: skip


def reason(mistake: Mistake | str, scheme: Scheme, dtype: str) -> Reason | None:
    """Return why no input of a dtype can show a mistake in a scheme; None where one can.

    Examples
    --------
    >>> reason("outliers by their mean", Scheme(), "float32").says
    'There are no outlier channels (O1).'
    >>> reason("half away from zero", Scheme(), "float32")
    """
    name = mistake if isinstance(mistake, str) else mistake.name
    return next((one for one in REASONS if name in one.mistakes and one.holds(scheme, dtype)), None)

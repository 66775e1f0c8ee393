"""Mistakes that implementers are known to make, each one decision away from the specification.

`diagnose` puts them into the reference until it gives what a port gave, and the tests of the kit
make ports of them. A mistake that its table entry cannot express is a missing function of `spec`.
"""

from __future__ import annotations

import numpy as np

from nsq_ref.conformance import wrong_arithmetic as arithmetic
from nsq_ref.conformance import wrong_rules as wrong
from nsq_ref.conformance.reference import Mistake
from nsq_ref.conformance.wrong_arithmetic import divisor
from nsq_ref.conformance.wrong_rules import after, around, instead, knowing

__all__ = ["MISTAKES"]

ENCODE = ("encode", "stream")
DECODE = ("decode", "stream")
CODED = (*ENCODE, "decode")
STREAM = ("stream",)
ATTEND = ("attend",)
FACTOR_RULES = {"norm": "M1", "gain": "M2", "lsq": "M3"}
F32, F64 = np.float32, np.float64

_TABLE = [
    # N1
    Mistake("norm summed in float32", "N1", "norms agree with a sequential float32 sum of squares",
        ENCODE, {"rounding.norm": wrong.norm_from(arithmetic.in_order)}),
    Mistake("norm summed in float32, fused", "N1",
        "norms agree with a sequential float32 sum of squares by fused multiply-adds",
        ENCODE, {"rounding.norm": wrong.norm_from(arithmetic.fused)}),
    Mistake("norm summed pairwise in float32", "N1",
        "norms agree with a float32 tree of sums by halves",
        ENCODE, {"rounding.norm": wrong.norm_from(wrong.pairwise)}),
    Mistake("norm summed by neighbours in float32", "N1",
        "norms agree with a float32 tree of sums by neighbours",
        ENCODE, {"rounding.norm": wrong.norm_from(wrong.neighbours_first)}),
    *(Mistake(f"norm summed in {lanes} float32 lanes", "N1",
          f"norms agree with float32 sums in {lanes} lanes, added as a tree",
          ENCODE, {"rounding.norm": wrong.norm_from(wrong.in_lanes(lanes))})
      for lanes in (4, 8, 16, 32)),
    Mistake("norm summed in float64 alone", "N1",
        "norms agree with a float64 sum that is rounded without a look at the rare ties",
        ENCODE, {"rounding.norm": wrong.norm_from(wrong.in_float64)}),
    Mistake("norm summed in float16", "N1", "norms agree with a float16 sum of squares",
        ENCODE, {"rounding.norm": wrong.norm_from(wrong.in_float16)}),
    Mistake("norm of order 1", "N1", "norms are sums of magnitudes (order 1), not Euclidean",
        ENCODE, {"rounding.norm": instead(
            lambda x: np.sum(np.abs(x, dtype=F64), axis=-1).astype(F32))}),
    Mistake("norm of order -1", "N1",
        "norms are of order -1: the -1 meant as the axis was taken for the order",
        ENCODE, {"rounding.norm": instead(wrong.order_minus_one)}),
    Mistake("norm of order infinity", "N1", "norms are the largest magnitude, not Euclidean",
        ENCODE, {"rounding.norm": instead(lambda x: np.max(np.abs(x), axis=-1))}),
    Mistake("norm without its root", "N1", "norms are sums of squares without the root",
        ENCODE, {"rounding.norm": instead(lambda x: wrong.in_float64(x, x).astype(F32))}),
    Mistake("root of the mean square", "N1", "norms are roots of the mean square, not of the sum",
        ENCODE, {"rounding.norm": instead(
            lambda x: np.sqrt(wrong.in_float64(x, x) / x.shape[-1]).astype(F32))}),
    # N2
    Mistake("reciprocal of the norm", "N2", "directions are x * (1 / norm), which rounds twice",
        ENCODE, {"spec.direction_of": instead(arithmetic.direction_by_reciprocal)}),
    Mistake("direction from the float64 norm", "N2",
        "directions are x over a float64 norm; it is to be rounded to float32 first",
        ENCODE, {"spec.direction_of": instead(wrong.direction_in_float64)}),
    *(Mistake(f"norm narrowed to {dtype} before the division", "N2",
          f"directions are x over the norm as stored in {dtype}; divide by the float32 norm",
          ENCODE, {"spec.direction_of": wrong.with_narrowed_norm(dtype)})
      for dtype in ("float16", "bfloat16")),
    *(Mistake(f"directions in {dtype}", "N2",
          f"directions are narrowed to {dtype}; they are float32",
          ENCODE, {"spec.direction_of": wrong.narrowed_direction(dtype)})
      for dtype in ("float16", "bfloat16")),
    *(Mistake(f"epsilon {epsilon:g} added to the norm", "N2",
          f"directions are x / (norm + {epsilon:g}); there is no epsilon",
          ENCODE, {"spec.direction_of": wrong.with_epsilon(epsilon)})
      for epsilon in (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)),
    *(Mistake(f"norm at least {epsilon:g}", "N2",
          f"directions are x / max(norm, {epsilon:g}); there is no epsilon",
          ENCODE, {"spec.direction_of": wrong.with_least_norm(epsilon)})
      for epsilon in (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)),
    *(Mistake(f"epsilon {epsilon:g} added to the sum of squares", "N2",
          f"directions are x / sqrt(sum of squares + {epsilon:g}); there is no epsilon",
          ENCODE, {"spec.direction_of": wrong.with_epsilon_in_square(epsilon)})
      for epsilon in (1e-12, 1e-10, 1e-8, 1e-6, 1e-5)),
    Mistake("codes of a zero token", "N2",
        "zero tokens are coded like others; all their codes are to be 0",
        ENCODE, {"spec.without_codes": instead(
            lambda codes, coded, norm: np.where(coded, codes, 0).astype(np.int16))}),
    Mistake("zero tokens outside the range", "N2",
        "zero tokens do not count in minimum and maximum; their direction 0 does",
        ENCODE, {"spec.extent": around(wrong.without_zero_tokens)}),
    # S1 S2
    Mistake("qmax one too large", "S1", "scales are the maximum over 2^(bits-1), not over qmax",
        ENCODE, {"spec.scale_of": wrong.scale_from(
            lambda span, scheme: span / (wrong.levels(scheme) + scheme.symmetric))}),
    Mistake("qmax a half too large", "S1",
        "scales are the maximum over 2^(bits-1) - 1/2, not over qmax",
        ENCODE, {"spec.scale_of": wrong.scale_from(
            lambda span, scheme: span / (wrong.levels(scheme) + F32(0.5) * scheme.symmetric))}),
    Mistake("maximum without sign", "S1",
        "scales are from the largest value, not the largest magnitude",
        ENCODE, {"spec.range_span": wrong.only_if(True, lambda span, low, high, *_: np.abs(high))}),
    Mistake("range from minimum to maximum", "S1",
        "scales are from half of maximum minus minimum, not from the largest magnitude",
        ENCODE, {"spec.range_span": wrong.only_if(
            True, lambda span, low, high, *_: F32(0.5) * (high - low))}),
    Mistake("one range for all", "S1",
        "all scales of a block come from one maximum: each channel (or token) has its own",
        ENCODE, {"spec.extent": instead(wrong.over_everything)}),
    Mistake("reciprocal of the number of levels", "S1",
        "scales are maximum * (1 / qmax), which rounds twice",
        ENCODE, {"spec.scale_of": wrong.scale_from(
            lambda span, scheme: span * (F32(1) / wrong.levels(scheme)))}),
    Mistake("asymmetric levels one too many", "S2",
        "scales are the range over 2^bits, not 2^bits - 1",
        ENCODE, {"spec.scale_of": wrong.scale_from(
            lambda span, scheme: span / (wrong.levels(scheme) + (not scheme.symmetric)))}),
    Mistake("range from the unrounded minimum", "S2",
        "scales are (max - min) over the levels; subtract the narrowed zero",
        ENCODE, {"spec.range_span": wrong.only_if(False, lambda span, low, high, *_: high - low)}),
    Mistake("range in double precision", "S2",
        "scales are from a float64 difference; it is to be rounded to float32 before it is divided",
        ENCODE, {"spec.range_span": wrong.only_if(
            False, lambda span, low, high, zero, scheme: high.astype(F64) - zero.astype(F64)),
                 "spec.scale_of": wrong.scale_from(
                     lambda span, scheme: (span / wrong.levels(scheme)).astype(F32))}),
    Mistake("negative scale forced to zero", "S2",
        "negative scales, where narrowing lifts zero above the maximum, are set to 0",
        ENCODE, {"spec.scale_of": after(lambda scale, *_: np.maximum(scale, scale.dtype.type(0)))}),
    Mistake("magnitude of a negative scale", "S2",
        "negative scales, where narrowing lifts zero above the maximum, lost their sign",
        ENCODE, {"spec.scale_of": after(lambda scale, *_: np.abs(scale))}),
    *(Mistake(f"scale at least {least:g}", "S1", f"scales are at least {least:g}; a scale may be 0",
          ENCODE, {"spec.scale_of": after(
              lambda scale, *_, least=least: np.maximum(scale, scale.dtype.type(least)))})
      for least in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)),
    Mistake("scale of an empty channel is 1", "S1",
        "scales of zero channels are 1; they are to be 0",
        ENCODE, {"spec.scale_of": after(
            lambda scale, *_: np.where(scale == 0, scale.dtype.type(1), scale))}),
    # S3
    Mistake("codes from the scale before narrowing", "S3",
        "codes were made with the scale before it was narrowed",
        ENCODE, {"spec.extent": wrong.remember_coded, "spec.code": wrong.code_before_narrowing}),
    Mistake("codes from the zero before narrowing", "S3",
        "codes were made with the zero before it was narrowed",
        ENCODE, {"spec.extent": wrong.remember_coded, "spec.code": wrong.zero_before_narrowing}),
    Mistake("maximum narrowed before the division", "S3",
        "the maximum was narrowed before it was divided; narrow the quotient",
        ENCODE, {"spec.scale_of": knowing(wrong.maximum_narrowed_first)}),
    Mistake("scales narrowed toward zero", "S3", "scales are narrowed by truncation",
        ENCODE, {"spec.scale_of": wrong.scale_narrowed(wrong.toward_zero)}),
    Mistake("scales narrowed with ties away from zero", "S3",
        "scales on a tie are narrowed away from zero",
        ENCODE, {"spec.scale_of": wrong.scale_narrowed(wrong.half_away_narrowed)}),
    Mistake("subnormal scales flushed", "S3", "subnormal scales are flushed to 0",
        ENCODE, {"spec.scale_of": wrong.scale_narrowed(wrong.flushed)}),
    Mistake("narrowing toward zero", "S3", "scales and factors are narrowed by truncation",
        ENCODE, {"rounding.narrow": after(wrong.toward_zero)},
        factor_rules=FACTOR_RULES),
    Mistake("narrowing with ties away from zero", "S3",
        "scales and factors on a tie are narrowed away from zero",
        ENCODE, {"rounding.narrow": after(wrong.half_away_narrowed)},
        factor_rules=FACTOR_RULES),
    Mistake("subnormals flushed", "S3", "subnormal scales and factors are flushed to 0",
        ENCODE, {"rounding.narrow": after(wrong.flushed)},
        factor_rules=FACTOR_RULES),
    Mistake("negative zero stored", "Z1", "a stored value is -0; it is to be +0",
        ENCODE, {"rounding.narrow": after(wrong.signed_zero)}),
    # Q1 Q2
    Mistake("half away from zero", "Q1", "exact ties are rounded away from zero",
        ENCODE, {"spec.code": wrong.rounding_with(arithmetic.half_away)}),
    Mistake("half toward zero", "Q1", "exact ties are rounded toward zero",
        ENCODE, {"spec.code": wrong.rounding_with(arithmetic.half_toward_zero)}),
    Mistake("half up", "Q1", "exact ties are rounded up",
        ENCODE, {"spec.code": wrong.rounding_with(arithmetic.half_up)}),
    Mistake("half down", "Q1", "exact ties are rounded down",
        ENCODE, {"spec.code": wrong.rounding_with(wrong.half_down)}),
    Mistake("half to odd", "Q1", "exact ties are rounded to odd",
        ENCODE, {"spec.code": wrong.rounding_with(wrong.half_odd)}),
    Mistake("one half added in float32", "Q1",
        "a half is added in float32 and the sum cut off, which also lifts what lies below the tie",
        ENCODE, {"spec.code": wrong.rounding_with(wrong.plus_half_in_float32)}),
    Mistake("truncation", "Q1", "quotients are cut off toward zero",
        ENCODE, {"spec.code": wrong.rounding_with(np.trunc)}),
    Mistake("floor", "Q1", "quotients are rounded down",
        ENCODE, {"spec.code": wrong.rounding_with(np.floor)}),
    Mistake("reciprocal of the scale", "Q1",
        "quotients are direction * (1 / scale), which rounds twice",
        ENCODE, {"spec.code": wrong.dividing_with(arithmetic.quotient_by_reciprocal)}),
    Mistake("quotient in double precision", "Q1",
        "quotients are in float64; a float32 quotient may round to a tie",
        ENCODE, {"spec.code": wrong.dividing_with(arithmetic.double_quotient)}),
    Mistake("difference and quotient in double precision", "Q1",
        "differences and quotients are in float64; each rounds to float32",
        ENCODE, {"spec.code": wrong.dividing_with(
            lambda d, scale, zero: (d.astype(F64) - zero) / divisor(scale))}),
    Mistake("zero divided apart", "Q1",
        "quotients are direction / scale - zero / scale; subtract first",
        ENCODE, {"spec.code": wrong.dividing_with(arithmetic.divided_apart)}),
    *(Mistake(f"epsilon {epsilon:g} added to the scale", "Q1",
          f"quotients are direction / (scale + {epsilon:g}); there is no epsilon",
          ENCODE, {"spec.code": wrong.dividing_with(
              lambda d, scale, zero, epsilon=epsilon: (d - zero) / (scale + F32(epsilon)))})
      for epsilon in (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)),
    Mistake("cast before the clamp", "Q1", "quotients are cast to int8 before the clamp, and wrap",
        ENCODE, {"spec.code": wrong.rounding_with(
            lambda quotient: arithmetic.wrapped(quotient, np.int8).astype(F32))}),
    Mistake("most negative code allowed", "Q2",
        "the most negative code is written; symmetric codes end at -qmax",
        ENCODE, {"spec.code": instead(wrong.with_most_negative),
                 **wrong.stored_as(
                     lambda codes, scheme: codes + np.int16(scheme.code_offset),
                     lambda numbers, scheme: numbers - np.int16(scheme.code_offset))}),
    # P1
    Mistake("highest bits first", "P1",
        "the order of the channels in each byte is turned round (nibbles swapped)",
        CODED, wrong.bytes_with(wrong.highest_first, wrong.highest_first)),
    Mistake("two's complement", "P1", "codes are stored in two's complement, not with an offset",
        CODED, wrong.stored_as(
            lambda codes, scheme: codes & (2**scheme.bits - 1),
            lambda numbers, scheme: (numbers ^ scheme.code_offset) - np.int16(scheme.code_offset))),
    Mistake("offset one too small", "P1", "the offset of the codes is qmax, not 2^(bits-1)",
        CODED, wrong.stored_as(
            lambda codes, scheme: codes + np.int16(scheme.code_offset - 1),
            lambda numbers, scheme: numbers - np.int16(scheme.code_offset - 1))),
    Mistake("sign and magnitude", "P1",
        "codes are stored as sign and magnitude, not with an offset",
        CODED, wrong.stored_as(
            lambda codes, scheme: np.abs(codes) + np.int16(scheme.code_offset) * (codes < 0),
            lambda numbers, scheme: np.where(
                numbers >= scheme.code_offset, scheme.code_offset - numbers, numbers
            ).astype(np.int16))),
    Mistake("rows that share bytes", "P1", "a row starts in the byte where the one before ends",
        CODED, wrong.rows_that_share_bytes()),
    Mistake("halves of the row in one byte", "P1", "a byte holds a channel of each half of the row",
        CODED, wrong.channels_in(wrong.halves_apart)),
    Mistake("3-bit codes one behind the other", "P1",
        "3-bit codes are one run of bits; they are a row of 2 bits and a row of 1",
        CODED, wrong.run_of_three()),
    Mistake("high bits before low bits", "P1",
        "the row of high bits comes before the row of low bits",
        CODED, wrong.bytes_with(wrong.high_row_first, wrong.low_row_first)),
    Mistake("padding with zero bits", "P1",
        "the padding of the last byte is zero bits; it is code 0, whose bits are not zero",
        ENCODE, {"packing.pack": after(wrong.zero_padding)}),
    # M1 M2 M3
    Mistake("norm narrowed at once from float64", "M1",
        "stored norms are narrowed from float64; round to float32 first",
        ENCODE, {"spec.stored_factor": wrong.factor_narrowed_at_once(
            "norm", lambda x, y: wrong.length_in_float64(x))}),
    Mistake("factors narrowed toward zero", "M1", "stored factors are narrowed by truncation",
        ENCODE, {"spec.stored_factor": wrong.factor_narrowed(wrong.toward_zero)},
        factor_rules=FACTOR_RULES),
    Mistake("factors narrowed with ties away from zero", "M1",
        "stored factors on a tie are narrowed away from zero",
        ENCODE, {"spec.stored_factor": wrong.factor_narrowed(wrong.half_away_narrowed)},
        factor_rules=FACTOR_RULES),
    Mistake("subnormal factors flushed", "M1", "subnormal stored factors are flushed to 0",
        ENCODE, {"spec.stored_factor": wrong.factor_narrowed(wrong.flushed)},
        factor_rules=FACTOR_RULES),
    Mistake("gain without the length", "M2", "the stored gain is the norm itself; divide by ||y||",
        ENCODE, {"spec.factor": wrong.factor_for("gain", lambda ref, x, y, norm: norm)}),
    Mistake("reciprocal of the length in a gain", "M2",
        "gains are norm * (1 / ||y||), which rounds twice",
        ENCODE, {"spec.factor": wrong.factor_for("gain", lambda ref, x, y, norm: norm * (
            F32(1) / divisor(ref.rounding.norm(y))))}),
    Mistake("gain from a float32 length", "M2",
        "gains agree with ||y|| from a sequential float32 sum",
        ENCODE, {"spec.factor": wrong.factor_for("gain", lambda ref, x, y, norm: norm / divisor(
            np.sqrt(arithmetic.in_order(y, y))))}),
    Mistake("gain in double precision", "M2",
        "gains are narrowed from a float64 quotient; "
        "norm, ||y|| and quotient each round to float32",
        ENCODE, {"spec.stored_factor": wrong.factor_narrowed_at_once("gain", lambda x, y: (
            wrong.length_in_float64(x) / divisor(wrong.length_in_float64(y))))}),
    Mistake("least squares for a gain", "M2", "stored gains are those of least squares (M3)",
        ENCODE, {"spec.factor": wrong.factor_for(
            "gain", lambda ref, x, y, norm: ref.rounding.least_squares_gain(x, y))}),
    Mistake("least squares in float32", "M3", "gains agree with sequential float32 dot products",
        ENCODE, {"spec.factor": wrong.factor_for(
            "lsq", lambda ref, x, y, norm: arithmetic.in_order(x, y) / divisor(
                arithmetic.in_order(y, y)))}),
    Mistake("least squares in float64 alone", "M3",
        "gains are narrowed from a float64 quotient; round to float32 first",
        ENCODE, {"spec.stored_factor": wrong.factor_narrowed_at_once("lsq", lambda x, y: (
            wrong.in_float64(x, y) / divisor(wrong.in_float64(y, y))))}),
    Mistake("least squares over x", "M3", "gains are <x, y> / <x, x>; divide by <y, y>",
        ENCODE, {"spec.factor": wrong.factor_for("lsq", lambda ref, x, y, norm: (
            wrong.in_float64(x, y) / divisor(wrong.in_float64(x, x))).astype(F32))}),
    Mistake("norm over length for least squares", "M3", "stored gains are norm / ||y|| (M2)",
        ENCODE, {"spec.factor": wrong.factor_for(
            "lsq", lambda ref, x, y, norm: norm / divisor(ref.rounding.norm(y)))}),
    Mistake("norm for least squares", "M3", "the stored gain is the norm (M1)",
        ENCODE, {"spec.factor": wrong.factor_for("lsq", lambda ref, x, y, norm: norm)}),
    Mistake("least squares of the direction", "M3",
        "gains are those of the direction; multiply by the norm",
        ENCODE, {"spec.factor": wrong.factor_for("lsq", lambda ref, x, y, norm: (
            ref.rounding.least_squares_gain(ref.spec.direction_of(x, norm), y)))}),
    # O1
    Mistake("outliers by their mean", "O1",
        "outlier channels are those of the largest mean magnitude",
        ENCODE, {"spec.outlier_channels": wrong.outliers_by(
            lambda d: np.mean(np.abs(d), axis=-2, keepdims=True, dtype=F64))}),
    Mistake("outliers by their length", "O1",
        "outlier channels are those of the largest sum of squares",
        ENCODE, {"spec.outlier_channels": wrong.outliers_by(
            lambda d: np.sum(np.square(d, dtype=F64), axis=-2, keepdims=True))}),
    Mistake("outliers by their value", "O1",
        "outlier channels are those of the largest value, sign and all",
        ENCODE, {"spec.outlier_channels": wrong.outliers_by(
            lambda d: np.max(d, axis=-2, keepdims=True))}),
    Mistake("later of equal outlier channels", "O1",
        "of equal channels the one of the higher index is kept",
        ENCODE, {"spec.outlier_channels": instead(wrong.later_of_equals)}),
    Mistake("outlier channels by size", "O1",
        "outlier channels are in order of size; they are ascending",
        ENCODE, {"spec.outlier_channels": instead(wrong.by_magnitude)}),
    Mistake("outliers in the range", "O1", "outlier channels enter the scale of their token",
        ENCODE, {"spec.extent": wrong.outliers_in_extent("token")}),
    Mistake("scales of outlier channels", "O1",
        "outlier channels have scales; with axis channel these are to be 0",
        ENCODE, {"spec.extent": wrong.outliers_in_extent("channel")}),
    Mistake("codes of outlier channels", "O1", "outlier channels have codes; these are to be 0",
        ENCODE, {"spec.without_codes": instead(
            lambda codes, coded, norm: np.where(norm[..., None] != 0, codes, 0).astype(np.int16))}),
    # B1 B2 K1
    Mistake("sinks in the range", "K1", "sinks enter the scales of the tokens behind them",
        ENCODE, {"model.split_sinks": wrong.remember_sinks,
                 "model.seal": wrong.remember_sinks_of_a_sequence,
                 "spec.extent": wrong.range_with_sinks}),
    Mistake("range shared by heads", "B2",
        "scales are shared by sequences (heads, rows of a batch)",
        ENCODE, {"spec.extent": after(wrong.shared_by_heads)}),
    Mistake("tail quantized early", "B1",
        "the tail went through the quantizer; it is kept as it came",
        STREAM, {"model.stored": wrong.with_coded_tail}),
    Mistake("scales that grow", "B1", "a block's scales are at least those of the block before",
        STREAM, {"model.seal": wrong.seal_with_greatest_scale}),
    Mistake("old scales after a crop", "C1",
        "a block that was cropped is sealed again with its old scales",
        STREAM, {"model.crop": around(wrong.remember_cropped),
                 "model.seal": wrong.seal_with_old_scales}),
    Mistake("raw tokens after a crop", "C1",
        "a crop restored the tokens as they came; what attention saw are the decoded ones",
        STREAM, {"model.append": around(wrong.append_and_keep),
                 "model.crop": around(wrong.crop_what_is_kept),
                 "model.survivors": around(wrong.kept_survivors)}),
    Mistake("tokens of a crop cut off", "C1", "decoded tokens of a crop are narrowed by truncation",
        STREAM, {"model.survivors": wrong.truncated_survivors}),
    Mistake("tokens of a crop overflow", "C1",
        "decoded tokens of a crop beyond the dtype are infinite; they become its largest value",
        STREAM, {"rounding.saturate": instead(lambda value, dtype: value.astype(dtype))}),
    # D1
    Mistake("norm over length merged", "D1", "decoded values are (norm / ||y||) * y",
        DECODE, {"spec.reconstruct": wrong.reconstruct_with(wrong.merged)}),
    Mistake("reciprocal of the length", "D1", "decoded values are norm * (y * (1 / ||y||))",
        DECODE, {"spec.reconstruct": wrong.reconstruct_with(wrong.by_reciprocal)}),
    Mistake("product before the quotient", "D1", "decoded values are (norm * y) / ||y||",
        DECODE, {"spec.reconstruct": wrong.reconstruct_with(wrong.product_first)}),
    Mistake("decoded in double precision", "D1", "decoded values are rounded once, from float64",
        DECODE, {"spec.reconstruct": wrong.reconstruct_with(wrong.all_in_float64)}),
    Mistake("no renormalisation", "D1", "decoded values are norm * y without renormalisation",
        DECODE, {"spec.reconstruct": wrong.reconstruct_with(
            lambda ref, y, norm: norm[..., None] * y)}),
    Mistake("renormalised by the stored norm", "D1",
        "directions are divided by the stored norm; divide by ||y||",
        DECODE, {"spec.reconstruct": wrong.divided_by(lambda ref, y, norm: norm)}),
    Mistake("unit directions", "D1", "decoded values are y / ||y|| without the norm",
        DECODE, {"spec.reconstruct": wrong.reconstruct_with(wrong.unit)}),
    Mistake("gain renormalised", "D1",
        "tokens with a gain are renormalised; a gain is only multiplied",
        DECODE, {"spec.reconstruct": wrong.renormalized_gain}),
    *(Mistake(f"length summed {how}", "D1", f"||y|| agrees with a float32 sum of squares, {how}",
          DECODE, {"spec.reconstruct": wrong.length_from(total)})
      for how, total in (
          ("one by one", arithmetic.in_order), ("fused", arithmetic.fused),
          ("by halves", wrong.pairwise), ("by neighbours", wrong.neighbours_first),
          ("in 4 lanes", wrong.in_lanes(4)), ("in 8 lanes", wrong.in_lanes(8)),
          ("in 16 lanes", wrong.in_lanes(16)))),
    Mistake("length in float64 alone", "D1",
        "||y|| agrees with a float64 sum that is rounded without a look at the rare ties",
        DECODE, {"spec.reconstruct": wrong.length_from(wrong.in_float64)}),
    *(Mistake(f"epsilon {epsilon:g} added to the length", "D1",
          f"directions are y / (||y|| + {epsilon:g}); there is no epsilon",
          DECODE, {"spec.reconstruct": wrong.length_with_epsilon(epsilon)})
      for epsilon in (1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5)),
    Mistake("fused multiply-add", "D1", "code * scale + zero is fused; each operation rounds",
        DECODE, {"spec.dequantize": instead(arithmetic.fused_dequantize)}),
    Mistake("zero left out", "D1", "y is code * scale without zero",
        DECODE, {"spec.dequantize": instead(
            lambda codes, scale, zero: codes.astype(F32) * scale.astype(F32))}),
    Mistake("subnormals flushed in decode", "D1", "subnormal products are flushed to 0",
        DECODE, {"spec.dequantize": after(wrong.flushed),
                 "spec.reconstruct": after(wrong.flushed)}),
    Mistake("decoded values flushed", "D1", "subnormal decoded values are flushed to 0",
        DECODE, {"spec.reconstruct": after(wrong.flushed)}),
    Mistake("outliers left out", "D1", "outlier channels decode from their codes, not as stored",
        DECODE, {"spec.dequantized_direction": instead(
            lambda codes, scale, zero, index, outliers: (
                codes.astype(F32) * scale.astype(F32) + zero.astype(F32)))}),
    # A1 A2
    Mistake("scale left out", "A1", "products are not scaled",
        ATTEND, wrong.option(scale=lambda scale, query, keys: 1.0)),
    Mistake("scale without its root", "A1", "products are scaled by 1 / D, not by 1 / sqrt(D)",
        ATTEND, wrong.option(scale=lambda scale, query, keys: 1 / query.shape[-1])),
    Mistake("scale always 1 / sqrt(D)", "A1", "the given scale is ignored",
        ATTEND, wrong.option(scale=lambda scale, query, keys: query.shape[-1] ** -0.5)),
    Mistake("softcap left out", "A1", "scores are not capped",
        ATTEND, wrong.option(softcap=lambda cap, query, keys: None)),
    Mistake("query heads in turn", "A1", "query heads are dealt out to key/value heads in turn",
        ATTEND, {"model.attend": around(wrong.heads_in_turn)}),
    Mistake("own position left out", "A2", "queries do not see their own position",
        ATTEND, wrong.seeing(lambda position, window, tokens: (position - window + 1, position))),
    Mistake("one position too many", "A2", "queries see the position behind their own",
        ATTEND, wrong.seeing(lambda position, window, tokens: (
            position - window + 1, min(position + 2, tokens)))),
    Mistake("window without the mask", "A2", "queries see what comes after them, past a window too",
        ATTEND, wrong.seeing(lambda position, window, tokens: (position - window + 1, tokens))),
    Mistake("mask left out", "A2", "queries see what comes after them",
        ATTEND, wrong.option(causal=lambda causal, query, keys: False,
                             sliding_window=lambda window, query, keys: None)),
    Mistake("always causal", "A2", "queries do not see what comes after them, though not causal",
        ATTEND, wrong.option(causal=lambda causal, query, keys: True)),
    Mistake("queries counted from the start", "A2",
        "query i stands at position i, not among the last",
        ATTEND, {"model.attend": around(wrong.positions_from_zero)}),
    Mistake("window one too long", "A2", "the window counts positions besides the query's own",
        ATTEND, wrong.option(sliding_window=lambda window, query, keys: window and window + 1)),
    Mistake("window one too short", "A2", "the window is one position too short",
        ATTEND, wrong.option(
            sliding_window=lambda window, query, keys: window and max(window - 1, 1))),
    Mistake("window left out", "A2", "the sliding window is ignored",
        ATTEND, wrong.option(sliding_window=lambda window, query, keys: None)),
]  # fmt: skip

MISTAKES = {mistake.name: mistake for mistake in _TABLE}

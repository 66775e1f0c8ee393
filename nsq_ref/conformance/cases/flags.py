"""Why the cases of the kit exist: the first part of a case's id, explained."""

from __future__ import annotations

from typing import NamedTuple


class Flag(NamedTuple):
    """Why cases exist.

    Examples
    --------
    >>> FLAGS["zero-token"].rule
    'N2'
    """

    rule: str  # the id of the rule that they are about
    bug_type: str  # the kind of mistake that they find, for programs that group results
    description: str  # one or two sentences for the implementer


FLAGS: dict[str, Flag] = {
    "ordinary": Flag("S1", "Basic",
        "Bell-shaped random data of many shapes: whether it works at all."),
    "leading-axes": Flag("B2", "Shape",
        "Heads of very different magnitude: no scale may be shared between sequences."),
    "exact-tie": Flag("Q1", "RoundingMode",
        "Quotients of exactly k + 1/2 in real numbers, and their neighbours one ulp off. They "
        "round to the even code."),
    "half-even": Flag("Q1", "RoundingMode",
        "Quotients that are k + 1/2 once they are float32. Rounding half away from zero, or "
        "floor(q + 0.5), gives another code."),
    "input-dtype": Flag("I1", "InputDtype",
        "float16 and bfloat16 input is widened to float32 before anything is computed."),
    "not-finite": Flag("I2", "Validation",
        "NaN or infinity anywhere refuses the array; a maximum that skips NaN would let it pass."),
    "zero-token": Flag("N2", "SpecialValue",
        "A zero token among others: its norm is 0, its direction 0, and it counts in minimum and "
        "maximum."),
    "zero-channel": Flag("S3", "SpecialValue",
        "A channel of zeros: its scale is 0, its codes are 0."),
    "negative-zero": Flag("Z1", "SpecialValue",
        "Zeros of both signs: no stored scale, zero or outlier is negative zero."),
    "block-boundary": Flag("B1", "Blocks",
        "Lengths around multiples of the block size, blocks of very different scale."),
    "sinks": Flag("K1", "Sinks", "Fewer tokens than sinks, as many, and one more."),
    "reciprocal-of-scale": Flag("Q1", "Arithmetic",
        "Near-ties where multiplying by 1 / scale gives another code than dividing by the scale."),
    "merged-division": Flag("Q1", "Arithmetic",
        "Near-ties where x / (norm * scale), or (direction - zero) / scale in any other order of "
        "operations, gives another code."),
    "double-precision-quotient": Flag("Q1", "Precision",
        "Near-ties that float32 rounds onto the tie and float64 does not."),
    "unnarrowed-scale": Flag("S3", "Precision",
        "Near-ties where the scale or zero before narrowing gives another code than the stored "
        "one."),
    "scale-epsilon": Flag("S3", "Epsilon",
        "Near-ties and small scales, on which an epsilon added to the scale shows."),
    "scale-narrowing": Flag("S3", "Precision",
        "Scales and zeros next to ties of their dtype: a multiplication by 1 / levels, the "
        "unrounded minimum, or ties away from zero give another one."),
    "outlier-narrowing": Flag("O1", "Precision",
        "Outlier directions next to ties of float16: they are rounded to float32 first."),
    "reciprocal-of-norm": Flag("N2", "Arithmetic",
        "Near-ties where multiplying by 1 / norm gives another direction, and so another code."),
    "norm-epsilon": Flag("N2", "Epsilon",
        "Near-ties of tokens of small norm, on which an epsilon added to the norm shows."),
    "norm-before-narrowing": Flag("N2", "Precision",
        "Near-ties where the narrowed norm gives another code than the float32 norm."),
    "norm-accumulation": Flag("N1", "Precision",
        "Tokens whose norm, summed in float32 in any order, changes a code or the stored norm."),
    "factor-narrowing": Flag("M1", "Precision",
        "Norms or gains next to ties of their dtype: float32 sums, a reciprocal, or float64 "
        "narrowed at once give another one."),
    "factor-midpoint": Flag("M3", "Precision",
        "Exact gains next to the middle of two float32, nearer than a float64 quotient can tell."),
    "norm-midpoint": Flag("N1", "Precision",
        "Norms half way between two float32, and off it by less than float64 can see. The exact "
        "sum of squares decides."),
    "tiny-norm": Flag("N1", "Range",
        "Tokens whose squares underflow or overflow float32; they are coded like any other."),
    "norm-narrowing": Flag("M1", "Precision",
        "Norms on ties of norm_dtype, subnormal ones, and ones that become 0. They are rounded to "
        "float32 first."),
    "norm-overflow": Flag("M4", "Range",
        "Norms at the end of norm_dtype, and of float32: the last that is accepted, the first "
        "that is refused."),
    "subnormal": Flag("S3", "Range", "Subnormal scales, zeros and factors, which are not flushed."),
    "scale-range": Flag("S3", "Range",
        "Scales that are subnormal or narrow to 0, and the clamp of quotients that a rounded "
        "scale puts beyond the codes."),
    "scale-overflow": Flag("S5", "Range",
        "Scales and zeros at the end of scale_dtype: those beyond it are refused."),
    "decoded-overflow": Flag("D3", "Range",
        "Values near the largest float32, some of which would decode to infinity."),
    "narrow-range": Flag("S2", "Range",
        "Ranges narrow beside their values: a narrowed zero may lie above the maximum, the scale "
        "may be negative, quotients far beyond the codes."),
    "collapse": Flag("D2", "SpecialValue", "Tokens that are not zero but decode to zero."),
    "outlier-channels": Flag("O1", "Outliers",
        "Outlier channels: equal peaks, peaks against means, more of them than channels, values "
        "beyond float16."),
    "search": Flag("S4", "Search", "Blocks on which a shrunken range is the best."),
    "merged-decode": Flag("D1", "Arithmetic",
        "Stored parts on which (norm / ||y||) * y, or (norm * y) / ||y||, gives another value."),
    "reciprocal-of-length": Flag("D1", "Arithmetic",
        "Stored parts on which y * (1 / ||y||) gives another value."),
    "length-accumulation": Flag("D1", "Precision",
        "Stored parts on which ||y||, summed in float32 in any order, gives another value."),
    "fused-decode": Flag("D1", "Arithmetic",
        "Stored parts on which a fused multiply-add, or a zero point in the middle of the codes, "
        "gives another value."),
    "double-precision-decode": Flag("D1", "Precision",
        "Stored parts that decode to another value in float64."),
    "every-code": Flag("P1", "Packing",
        "Every code at several places of its byte, and a partial last byte."),
    "attention": Flag("A1", "Basic", "Attention on ordinary data: whether it works at all."),
    "grouped-heads": Flag("A1", "Shape",
        "Several query heads share a key/value head: neighbours do, they are not dealt out in "
        "turn."),
    "causal-mask": Flag("A2", "Mask",
        "Queries are the last tokens; causal ones see no later token, others see all."),
    "sliding-window": Flag("A2", "Mask",
        "Sliding windows of one token, of a few, and longer than the sequence; a window counts "
        "the query's own position."),
    "softcap": Flag("A1", "Formula", "The softcap comes after the scale and before the softmax."),
    "attention-scale": Flag("A1", "Formula", "A scale that is not 1 / sqrt(D)."),
    "large-scores": Flag("A1", "Range",
        "Scores whose exponentials leave float32 unless their maximum is subtracted first."),
    "equal-scores": Flag("A1", "SpecialValue", "Equal keys have equal weights."),
    "value-head-dim": Flag("A1", "Shape", "Values of fewer channels than keys."),
    "value-scheme": Flag("A1", "Shape", "Values of another scheme than keys."),
    "stream-append": Flag("B1", "Blocks",
        "One append, many, or a token at a time: the same bytes."),
    "crop-block": Flag("C1", "Crop",
        "A crop into a sealed block: its tokens return to the tail as decoded, and are sealed "
        "with new scales."),
    "crop-edge": Flag("C1", "Crop",
        "A crop to the end of a block, or of the sequence, keeps all bytes before it."),
    "crop-tail": Flag("C1", "Crop", "A crop into the tail drops raw tokens."),
    "crop-start": Flag("K1", "Crop",
        "A crop into the sinks, or to nothing: the next tokens become sinks again."),
    "crop-saturation": Flag("C1", "Crop",
        "Decoded values beyond the dtype of the tail become its largest."),
    "ragged-batch": Flag("B2", "Blocks",
        "Rows of different lengths, some a thousand times as large: no row changes another."),
    "padding": Flag("P1", "Packing",
        "Rows whose last byte is partial: it is padded with code 0, and rows share no byte."),
    "tile-edge": Flag("S1", "Tiles",
        "Each channel has a lone extreme, first, last, or at the edge of a tile of 16 to 2048 "
        "tokens: a maximum that loses a tile, or part of one, shows."),
    "channel-tile": Flag("N1", "Tiles",
        "Each token has a lone large channel, first, last, or at the edge of a tile of 32 to 512 "
        "channels, and a head size that is no power of two."),
    "sequences": Flag("B2", "Shape",
        "Many sequences of several blocks, the last a short one, and none at all: each block of "
        "each sequence has its own scales."),
    "subnormal-norm": Flag("N1", "Range",
        "Tokens whose norms or elements are subnormal; they are coded like any other."),
    "range-precision": Flag("S2", "Precision",
        "Scales next to ties of their dtype, where max - zero in float64 gives another one."),
    "long-attention": Flag("A1", "Tiles",
        "About 300 tokens over the borders of tiles and blocks: weights like a comb, growing and "
        "falling scores, heavy tails, constant offsets, and nearly all weight on one token."),
    "long-sequence": Flag("B1", "Tiles",
        "66,000 tokens, or 258 blocks: an index of 16 bits, or one of 8 for blocks, wraps."),
    "sinks-in-pieces": Flag("K1", "Sinks", "Sinks that come in several appends, empty ones too."),
    "kept-as-it-came": Flag("K1", "Range",
        "Sinks and a tail of values that float16 does not hold: neither goes through it."),
    "refused-step": Flag("I2", "Validation",
        "An append that must be refused: NaN or infinity in a sink, a block or the tail, or a norm "
        "beyond its dtype in a block that is sealed."),
    "moved-errors": Flag("F1", "Basic",
        "Keys of many shapes under feedback: whether errors move at all."),
    "no-feedback": Flag("F1", "SpecialValue",
        "The identity as the factor: the bytes are those without feedback."),
    "order-of-coding": Flag("F1", "Feedback",
        "Orders that are not ascending: rows and columns of the factor are in the order given."),
    "feedback-of-heads": Flag("F1", "Shape",
        "Each key/value head has its own order and factor; one of one head is for all."),
    "fused-feedback": Flag("F1", "Arithmetic",
        "Near-ties where a fused multiply-add, or w in float64, gives another code."),
    "feedback-tie": Flag("F1", "RoundingMode",
        "Quotients that errors have moved onto ties, which round to the even code."),
    "error-of-w": Flag("F1", "Formula",
        "The error of a channel that was moved is w - y, y being made with what is stored."),
    "feedback-clamp": Flag("F1", "Range",
        "Channels that are moved beyond the codes: what the clamp cuts off moves on."),
    "feedback-outliers": Flag("F1", "Outliers",
        "Outlier channels are moved, and the errors of their float16 move on."),
    "feedback-zero-token": Flag("F1", "SpecialValue",
        "Nothing moves in a token of norm 0; without norm separation it is like any other."),
    "feedback-tokens": Flag("F1", "Blocks",
        "Scales are made of the tokens of their own block; nothing moves from block to block."),
    "feedback-overflow": Flag("F1", "Range",
        "A channel that is moved beyond float32 is coded as its direction."),
    "sealed-feedback": Flag("F1", "Blocks",
        "Blocks that are sealed by one append, by several, and token by token: always with "
        "feedback."),
    "tail-feedback": Flag("F1", "Blocks",
        "Sinks and tail are kept as they came: feedback moves nothing in what is not coded."),
    "cropped-feedback": Flag("F1", "Crop",
        "A block that was cropped is coded with feedback when it is sealed again."),
    "feedback-of-rows": Flag("F1", "Shape",
        "Each row has order and factor of its own, or all have those of one head."),
    "scales-of-w": Flag("F1", "Formula",
        "Scales and zeros of channels are made of what was moved, those of tokens of directions."),
    "moved-scales": Flag("F1", "Range",
        "Channels that are moved so far that their scales, which those of the directions would "
        "not, may leave their dtype: they are refused then (S5)."),
    "feedback-weights": Flag("F1", "Formula",
        "Weights of many magnitudes on the diagonal of the factor: they move nothing."),
    "feedback-gain": Flag("M2", "Feedback",
        "Gains under feedback: lengths of what is seen, weighed, on ties of their dtype."),
    "feedback-search": Flag("F1", "Search",
        "Blocks of which fourth powers of errors, in float64, choose another range than squares."),
    "outlier-pair": Flag("N3", "Norm",
        "A pair of channels far larger than the others, on whose noise plain norms depend: "
        "balanced norms spread directions less, and are taken."),
    "offset-channel": Flag("N3", "Norm",
        "Channels of large offsets and small ranges, which plain norms keep together: balanced "
        "ones spread directions more, and are not taken."),
    "balanced-choice": Flag("N3", "Norm",
        "Heads, and blocks of one sequence, of which some have balanced norms and some plain."),
    "near-choice": Flag("N3", "Precision",
        "Blocks whose two spreads are nearly equal, on either side, and quite equal."),
    "size-bound": Flag("N3", "Range",
        "Channels smaller than 2^-12 of the largest, by a little and by far: their size is 2^-12."),
    "balanced-zero": Flag("N3", "SpecialValue",
        "Zero channels and zero tokens, of which ranges and sizes are 0."),
    "constant-channel": Flag("N3", "SpecialValue",
        "Channels that are constant in x: their growth is infinite, or 0 where their direction is "
        "constant too."),
    "balanced-range": Flag("N3", "Range",
        "Balanced norms beyond float32, where plain ones are taken, and beyond norm_dtype."),
    "balanced-sizes": Flag("N3", "Arithmetic",
        "Blocks on which another size of channels, another spread, an epsilon or another order "
        "of operations gives other bytes."),
    "balanced-feedback": Flag("N3", "Feedback",
        "Keys with balanced norms under feedback: w, scales and gains are of these."),
    "largest-half": Flag("M4", "Range",
        "The largest float16 and its neighbours, in tokens whose norm or scale is just held."),
}  # fmt: skip

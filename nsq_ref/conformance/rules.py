"""What each rule of the specification says, in its own words, for reports."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """A rule of ``docs/spec.md``: its title, the section that holds it, and its chief words."""

    title: str
    section: str
    words: str


RULES: dict[str, Rule] = {
    "I1": Rule("Dtypes", "input",
        "Input is float32, float16 or bfloat16, the latter two widened to float32, which is "
        "exact."),
    "I2": Rule("Finite only", "input",
        "NaN or infinity anywhere, sinks included, refuses the whole array, and nothing is "
        "stored."),
    "K1": Rule("Sinks", "input",
        "The first min(sink_tokens, T) tokens of a sequence are stored unquantized"),
    "B1": Rule("Blocks", "input",
        "cut into blocks of B from the first token after the sinks"),
    "B2": Rule("Blocks belong to one sequence", "input",
        "Padding and other rows of a batch enter no scale."),
    "C1": Rule("Crop", "input",
        "Cropping a cache to a length inside a sealed block returns the surviving tokens of that "
        "block to the tail, as their decoded values, rounded once to the tail's dtype, half to "
        "even; one beyond that dtype becomes its largest value of that sign."),
    "N1": Rule("Norm", "norm-and-direction",
        "norm_t is the square root of the exact sum of the squares of x_t, correctly rounded to "
        "float32."),
    "N2": Rule("Direction", "norm-and-direction",
        "direction_tj = x_tj / norm_t, one float32 division."),
    "N3": Rule("Balanced norm", "norm-and-direction",
        "the norms of a block are made with the sizes of its channels, where that keeps directions "
        "closer together."),
    "O1": Rule("Outlier channels", "norm-and-direction",
        "the min(k, D) channels with the largest max_t |direction_tj| over the block, of equals "
        "the lower index, are kept"),
    "S1": Rule("Symmetric", "scale-and-zero",
        "scale = narrow(max|direction| / qmax, scale_dtype)"),
    "S2": Rule("Asymmetric", "scale-and-zero",
        "zero = narrow(min, scale_dtype), then scale = narrow((max - zero) / (2^bits - 1), "
        "scale_dtype)"),
    "S3": Rule("The narrowed scale makes the codes", "scale-and-zero",
        "Encoder and decoder use the same, stored scale and zero."),
    "S4": Rule("Scale rule", "scale-and-zero",
        "search tries, for each scale on its own, the range and five shrunken ones, and keeps the "
        "one with the least sum of squared direction errors"),
    "S5": Rule("Range", "scale-and-zero",
        "A scale or zero that narrows to infinity is refused"),
    "Z1": Rule("No negative zero is stored", "scale-and-zero",
        "A scale, zero, norm, gain or outlier that narrows to -0 is stored as +0."),
    "Q1": Rule("Round, then clamp", "codes",
        "code = round_half_even((direction - zero) / scale)"),
    "Q2": Rule("Range of codes", "codes",
        "Symmetric codes lie in [-qmax, qmax]: the most negative pattern is never written. "
        "Asymmetric codes u lie in [0, 2^bits - 1]."),
    "F1": Rule("Key feedback", "codes",
        "It then codes w in place of the direction."),
    "P1": Rule("Bytes", "codes",
        "Each token is a row of its own, its channels in ascending order, first channel in the "
        "lowest bits"),
    "M1": Rule("norm", "the-stored-factor",
        "narrow(norm). The reader renormalises."),
    "M2": Rule("gain", "the-stored-factor",
        "narrow(norm / ||y||): ||y|| correctly rounded as in N1, one float32 division, one "
        "narrowing."),
    "M3": Rule("lsq", "the-stored-factor",
        "narrow(g), where g is the exact <x, y> / <y, y> correctly rounded to float32"),
    "M4": Rule("Range", "the-stored-factor",
        "A factor that narrows to infinity is refused"),
    "D1": Rule("Decode", "decode",
        "All in float32, one rounding an operation, no fused multiply-add"),
    "D2": Rule("Collapse", "decode",
        "A coded token that is not zero but decodes to zero in every channel is legal"),
    "D3": Rule("Finite", "decode",
        "An encoder refuses input whose decoded values would not all be finite"),
    "A1": Rule("The function", "attention",
        "p_t = exp(s_t) / sum_i exp(s_i) over the tokens that are seen (A2); 0 for others"),
    "A2": Rule("What is seen", "attention",
        "The queries of a row are its last tokens"),
    "A3": Rule("Tolerance", "attention",
        "a kernel conforms if its weights are within W_t of p_t, and its output within O_j"),
}  # fmt: skip

"""The decisions of the specification, and what may be wrong about each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any


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
    # N3
    choice: str = "less"
    peak: str = "largest"
    peak_share: str = "of the largest"
    least_size: float = 2.0**-12
    size_of: str = "block"  # or "sequence"
    over_size: str = "divide"
    growth: str = "squares"
    spread: str = "product"
    zero_tokens_out: bool = False
    sized_direction: bool = False
    sized_gain: bool = True
    balanced_overflow: str = "plain"  # or "refuse"
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

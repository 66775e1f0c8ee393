"""What is known before any data holds."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from nsq_ref import (
    Scheme,
    quantize,
)
from nsq_ref.strategies import inputs, schemes
from tests.support.bounds_truth import (
    Array,
    check_a_priori,
    quantized_or_none,
    wide,
)


@settings(max_examples=500)
@given(st.one_of(inputs(), wide()), schemes())
def test_what_is_known_before_any_data_holds(x: Array, scheme: Scheme) -> None:
    """E1 to E4 from the scheme and the head size alone (S1, S2, S4, O1)."""
    quantized = quantized_or_none(x, scheme)
    if quantized is not None:
        check_a_priori(x, quantized)


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_known_of_short_blocks_holds(symmetric: bool, scale_dtype: Any) -> None:
    """E1 to E4 where the ends of ranges are most of the error (B1, S3)."""
    rng = np.random.default_rng(0)
    for bits in (2, 4, 8):
        for block_size in (1, 2, 3):
            for scale_rule in ("range", "search"):
                scheme = Scheme(
                    bits=bits,
                    symmetric=symmetric,
                    block_size=block_size,
                    scale_rule=scale_rule,  # type: ignore[arg-type]
                    scale_dtype=scale_dtype,
                )
                x = rng.standard_normal((40, block_size, 5)).astype(np.float32)
                check_a_priori(x, quantize(x, scheme))

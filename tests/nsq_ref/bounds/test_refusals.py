"""Bad input gets one clear error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nsq_ref import (
    Scheme,
    bounds,
    quantize,
)
from nsq_ref.bounds import Interval

ONE = np.ones((1, 2))

UNIT_INTERVAL = Interval(ONE, ONE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds.certificate(ONE), "quantized must be what quantize returns, got ndarray"),
        (lambda: bounds.encoder_bounds(ONE, 3), "quantized must be what quantize returns, got int"),
        (
            lambda: bounds.encoder_bounds(np.ones((3, 2)), quantize(ONE)),
            r"x has shape \[3, 2\]; what was quantized has \[1, 2\]",
        ),
        (lambda: bounds.encoder_bounds([[1, np.nan]], quantize(ONE)), r"x\[0, 1\] is nan"),
        (lambda: bounds.a_priori(4, 64), "scheme must be a Scheme or a name .*, got 4"),
        (lambda: bounds.a_priori(Scheme(), 0), "head_dim=0 must be an integer of at least 1"),
        (
            lambda: bounds.narrowing_interval([0.1], "float16"),
            r"stored\[0\] is 0.1, which is not a",
        ),
        (lambda: bounds.narrowing_interval([1.0], "float8"), "dtype='float8' is not one of"),
        (lambda: bounds.narrowing_interval(["1"], "float16"), "stored has dtype <U1"),
        (
            lambda: bounds.direction_interval([[8]], [[1.0]], scheme=Scheme()),
            r"codes\[0, 0\] is 8, which is not within -7 to 7",
        ),
        (
            lambda: bounds.direction_interval([[1.0]], [[1.0]], scheme=Scheme()),
            "codes has dtype float64; give integers",
        ),
        (
            lambda: bounds.direction_interval([[1]], [[1.0]], [[0.0]], scheme=Scheme()),
            "has no zero; leave it out",
        ),
        (
            lambda: bounds.element_error([[1.0]], scheme=Scheme(symmetric=False)),
            "needs a zero",
        ),
        (
            lambda: bounds.direction_interval(
                np.ones((2, 3), int), np.ones((2, 2)), scheme=Scheme()
            ),
            r"shapes do not fit together: codes \[2, 3\], scale \[2, 2\]",
        ),
        (
            lambda: bounds.element_error([np.inf], scheme=Scheme()),
            r"scale\[0\] is inf, which is not",
        ),
        (
            lambda: bounds.direction_error([[-1.0]]),
            r"element\[0, 0\] is -1.0, which is not a bound",
        ),
        (lambda: bounds.chord([np.nan]), r"error\[0\] is nan, which is not a bound"),
        (lambda: bounds.chord([1.0, 1.0], np.ones((3, 2))), "shapes do not fit together: error"),
        (lambda: bounds.relative_error([2.5]), r"chord\[0\] is 2.5, which is more than 2"),
        (lambda: bounds.relative_error([1.0], magnitude="rms"), "magnitude='rms' is not one of"),
        (
            lambda: bounds.relative_error([1.0], Interval(np.array(-2.0), np.array(0.0))),
            r"factor_error is -2.0, which is below -1",
        ),
        (
            lambda: bounds.norm_interval(
                [1.0, 2.0], np.ones((3, 2)), UNIT_INTERVAL, scheme=Scheme()
            ),
            "shapes do not fit together: factor",
        ),
        (
            lambda: bounds.norm_interval(
                1.0, ONE[0], UNIT_INTERVAL, scheme=Scheme(magnitude="gain", norm_rule="balanced")
            ),
            r"y has shape \[2\]; give \[..., tokens, D\] of one block",
        ),
        (
            lambda: bounds.logit_error(
                np.ones(2), UNIT_INTERVAL, Interval(ONE[:, 0], ONE[:, 0]), ONE
            ),
            r"query has shape \[2\]; give \[..., queries, 2\]",
        ),
        (
            lambda: bounds.total_variation(UNIT_INTERVAL, softcap=0.0),
            "softcap=0.0 is not a positive finite number",
        ),
        (
            lambda: bounds.total_variation(UNIT_INTERVAL, where=[1, 0]),
            "where has dtype int64; give True",
        ),
        (lambda: bounds.spread(np.ones((3, 2)), [1.0, 2.0]), "shapes do not fit together: error"),
        (
            lambda: bounds.output_error([[-1.0]], [1.0], [0.0], [1.0]),
            r"weights\[0, 0\] is -1.0, which is not a bound",
        ),
        (
            lambda: bounds.output_error([[1.0, 0.0]], [1.0], [0.0], [1.0]),
            r"weights has shape \[1, 2\] and error \[1\]",
        ),
    ],
)
def test_bad_input_gets_one_clear_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()

"""`Quantized`: what is stored, counted and checked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from nsq_ref import RangeError, Scheme, quantize
from nsq_ref.strategies import schemes, tensors

Float32 = npt.NDArray[np.float32]


@settings(max_examples=100)
@given(tensors(), schemes(scale_dtype="float32", norm_dtype="float32", outlier_channels=0))
def test_bits_per_element_is_what_is_stored(x: Float32, scheme: Scheme) -> None:
    try:
        quantized = quantize(x, scheme)
    except RangeError:
        return
    stored = sum(part.nbytes for part in quantized.parts.values())
    assert quantized.nbytes == stored
    assert quantized.bits_per_element == 8 * stored / x.size
    assert scheme.bits_per_element(*x.shape[-2:], x.dtype) == quantized.bits_per_element


def test_bits_per_element_by_hand() -> None:
    """4 bits, a float16 norm in 128 channels, a float16 scale and zero in 128 tokens, a sink."""
    assert Scheme().bits_per_element(4096, 128) == 4 + 16 / 128 + 16 / 4096
    streaming = Scheme.named("streaming4")
    expected = (4 + 16 / 128) * 4096 / 4097 + 32 * 32 / 4097 + 32 / 4097
    assert streaming.bits_per_element(4097, 128) == pytest.approx(expected, abs=1e-12)
    assert Scheme.named("naive4").bits_per_element(10, 64) == 4.25


def test_parts_that_do_not_fit_the_scheme() -> None:
    """A `Quantized` built by hand is checked as one that was loaded."""
    good = quantize(np.ones((2, 6, 4), np.float32))
    for change, error, message in (
        ({"norm": None}, TypeError, r"norm must be an array of float16, got None"),
        ({"zero": good.scale}, ValueError, r"zero is not stored by Scheme"),
        (
            {"packed": good.packed[:, :3]},
            ValueError,
            r"packed is uint8 \[2, 3, 2\]; .* uint8 \[2, 6, 2\]",
        ),
        ({"scale": good.scale.astype(np.float32)}, ValueError, r"scale is float32 .* float16"),
        (
            {"shape": (2, 6, 5)},
            ValueError,
            r"packed is uint8 \[2, 6, 2\]; the scheme stores uint8 \[2, 6, 3\]",
        ),
        ({"shape": (6,)}, ValueError, r"shape has shape \[6\]; at least"),
        (
            {"dtype": np.dtype(np.float64)},
            TypeError,
            r"dtype=float64 is not float32, float16 or bfloat16",
        ),
    ):
        with pytest.raises(error, match=message):
            replace(good, **change)

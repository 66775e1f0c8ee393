"""Single rules, each by numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nsq_ref import Scheme, quantize, spec


def test_best_scale_of_equals_is_the_wider() -> None:
    """S4."""
    scales = np.float16([[[1, 1]], [[2, 2]], [[3, 3]]])
    zeros = np.zeros_like(scales)
    errors = np.array([[[5.0, 4.0]], [[4.0, 4.0]], [[4.0, 9.0]]])
    scale, _ = spec.best_scale(scales, zeros, errors)
    assert scale.tolist() == [[2, 1]]


def test_full_range_that_overflows_is_kept_to_be_refused() -> None:
    """S4 S5."""
    scales = np.float16([[[np.inf]], [[1]]])
    scale, _ = spec.best_scale(scales, np.zeros_like(scales), np.array([[[np.nan]], [[0.0]]]))
    assert np.isinf(scale).all()


def test_shrunken_range_that_overflows_is_passed_over() -> None:
    """S4 S5: the range fits float16; shrunken to 0.7 its minimum is 70,700."""
    x = np.float32([[471_300], [-170]])
    plain = Scheme(separate_norm=False, symmetric=False)
    for backend in ("numpy", "numba", "oracle"):
        quantized = quantize(x, replace(plain, scale_rule="search"), backend)  # type: ignore[arg-type]
        assert quantized.scale.tobytes() == quantize(x, plain).scale.tobytes()


def test_search_order_of_addition() -> None:
    """S4: one square after the other in float64; another order gives another winner's sum."""
    direction = np.float32(np.random.default_rng(0).standard_normal((500, 1)))
    low, high = direction.min(axis=0), direction.max(axis=0)
    scheme = Scheme(bits=2, scale_rule="search")
    found = []
    for shrink in spec.SHRINK:
        scale = np.float32(
            np.float16(np.float32(max(shrink * high[0], -shrink * low[0])) / np.float32(1))
        )
        y = np.clip(np.rint(direction / scale), -1, 1) * scale
        total = 0.0
        for error in (direction - y)[:, 0].tolist():
            total += error * error
        found.append((total, -shrink, scale))
    scale, _ = spec.scale_and_zero(direction, np.ones((1, 1), bool), scheme)
    assert scale[0, 0] == min(found)[2]


def test_search_is_never_worse_than_range() -> None:
    """S4."""
    x = np.random.default_rng(1).standard_normal((200, 16)).astype(np.float32)
    for symmetric in (True, False):
        errors = []
        for rule in ("range", "search"):
            scheme = Scheme(bits=2, separate_norm=False, symmetric=symmetric, scale_rule=rule)  # type: ignore[arg-type]
            block = spec.encode(x, scheme)
            errors.append(np.square(x - spec.decode(block, scheme), dtype=np.float64).sum(axis=0))
        assert (errors[1] <= errors[0]).all()
        assert (errors[1] < errors[0]).any()


def test_asymmetric_by_hand() -> None:
    """S2 D1: zero is the minimum, the last code the maximum."""
    x = np.float32([[1], [2], [4], [2.5]])
    scheme = Scheme(bits=2, separate_norm=False, symmetric=False)
    quantized = quantize(x, scheme)
    assert quantized.zero is not None
    assert (quantized.scale.item(), quantized.zero.item()) == (1.0, 1.0)
    assert quantized.codes.ravel().tolist() == [0, 1, 3, 2]  # 1.5 ties to 2


def test_negative_scale_by_hand() -> None:
    """S2: narrowing lifts zero above the only value; the formula stands."""
    value = np.float32(2049.5)  # float16 has 2050, then 2052
    quantized = quantize(
        np.float32([[value]]), Scheme(bits=4, separate_norm=False, symmetric=False)
    )
    assert quantized.zero is not None
    assert quantized.zero.item() == 2050
    assert quantized.scale.item() == np.float16(np.float32(-0.5) / np.float32(15))
    assert quantized.codes.item() == 15


def test_zero_token_of_an_asymmetric_scheme() -> None:
    """N2: its codes are 0, not the code of value 0; as direction 0 it counts in the range."""
    x = np.float32([[3, 4], [0, 0], [4, 3]])
    quantized = quantize(x, Scheme(symmetric=False))
    assert quantized.zero is not None
    assert quantized.codes[1].tolist() == [0, 0]
    assert quantized.zero.tolist() == [[0, 0]]
    without = quantize(x[[0, 2]], Scheme(symmetric=False))
    assert without.zero is not None
    assert (without.zero > 0.5).all()


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_outlier_channels_by_hand(axis: str) -> None:
    """O1: kept as float16, code 0, outside the scales; with per-channel scales, scale 0."""
    x = np.float32([[1, 100, -2, 50], [2, -90, 4, 60]])
    scheme = Scheme(separate_norm=False, axis=axis, outlier_channels=2)  # type: ignore[arg-type]
    quantized = quantize(x, scheme)
    assert quantized.outlier_index is not None
    assert quantized.outliers is not None
    assert quantized.outlier_index.tolist() == [[1, 3]]
    assert quantized.outliers.tolist() == [[100, 50], [-90, 60]]
    assert (quantized.codes[:, [1, 3]] == 0).all()
    if axis == "channel":
        assert (quantized.scale[0, [1, 3]] == 0).all()
        assert np.array_equal(
            quantized.scale[0, [0, 2]], np.float16(np.float32([2, 4]) / np.float32(7))
        )
    else:
        assert np.array_equal(quantized.scale[:, 0], np.float16(np.float32([2, 4]) / np.float32(7)))

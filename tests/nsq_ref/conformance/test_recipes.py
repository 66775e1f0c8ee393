"""The recipes of docs/spec.md for what is correctly rounded, followed word by word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings
from numpy.typing import NDArray

from nsq_ref import Quantized, Scheme, dequantize, files, oracle, quantize, rounding
from nsq_ref.codec import Backend
from nsq_ref.scheme import as_scheme
from nsq_ref.strategies import AWKWARD
from onnx_export.operators import dequantize_model, quantize_model
from tests.nsq_ref.test_foreign_parts import native
from tests.support.onnx_runners import RUNNERS
from tests.support.rows import norm_ties

Float32 = NDArray[np.float32]
BACKENDS: tuple[Backend, ...] = ("numba", "numpy", "oracle")
FLOAT32 = {"norm_dtype": "float32", "scale_dtype": "float32"}
ONE = 2**149  # units of 2**-149

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
subnormal = st.integers(-(2**25), 2**25).map(lambda m: m * 2.0**-149)
rows = st.lists(
    st.one_of(float32s, subnormal, st.sampled_from([*AWKWARD, 2.0**-75, 2.0**-74, 3 * 2.0**-76])),
    min_size=1,
    max_size=6,
).map(lambda row: np.float32(row).tolist())


def scaled(row: Sequence[float]) -> list[int]:
    """Whole multiples of 2**-149, as every float32 is one."""
    integers = [Fraction(float(value)) * ONE for value in row]
    assert all(value.denominator == 1 for value in integers)
    return [int(value) for value in integers]


def norm_of_the_page(row: Sequence[float]) -> float:
    """N1."""
    n = sum(X**2 for X in scaled(row))
    r = math.isqrt(n)
    k = max(r.bit_length() - 24, 0)
    q = r >> k
    half = ((2 * q + 1) << k) ** 2
    q += 4 * n > half or (q % 2 == 1 and 4 * n == half)
    value = Fraction(q << k, ONE)
    return math.inf if value >= 2**128 else float(value)


def gain_of_the_page(x: Sequence[float], y: Sequence[float]) -> float:
    """M3."""
    a = sum(X * Y for X, Y in zip(scaled(x), scaled(y), strict=True))
    b = sum(Y**2 for Y in scaled(y))
    if not a or not b:
        return 0.0
    e = -149
    while Fraction(abs(a), b) / Fraction(2) ** e >= 2**24:
        e += 1
    dividend, divisor = abs(a) << max(-e, 0), b << max(e, 0)
    quotient, remainder = divmod(dividend, divisor)
    quotient += 2 * remainder > divisor or (quotient % 2 == 1 and 2 * remainder == divisor)
    value = quotient * Fraction(2) ** e
    return math.copysign(math.inf if value >= 2**128 else float(value), a)


def same_bits(found: Any, expected: float) -> bool:
    return bool(np.float32(found).tobytes() == np.float32(expected).tobytes())


# --- N1 -----------------------------------------------------------------------------------------


@settings(max_examples=500)
@given(rows)
def test_the_recipe_of_the_norm(row: list[float]) -> None:
    """N1: subnormal norms and those at the end of the range too."""
    expected = norm_of_the_page(row)
    assert same_bits(rounding.norm(np.float32([row]))[0], expected)
    assert same_bits(oracle.exact_norm(row), expected)


def test_the_recipe_of_the_norm_at_ties() -> None:
    """N1."""
    assert [norm_of_the_page(row) for row in norm_ties()] == rounding.norm(norm_ties()).tolist()


def test_norms_at_the_ends() -> None:
    """N1: three halves of the smallest subnormal; half way from the largest float32 to 2**128."""
    tiny, most = 2.0**-149, float(np.finfo(np.float32).max)
    below = float(np.nextafter(np.float32(2.0**116), np.float32(0)))
    for row, expected in (
        ([tiny, tiny], tiny),  # 1.41
        ([tiny] * 3, 2 * tiny),  # 1.73
        ([tiny] * 6, 2 * tiny),  # 2.45
        ([most, 0.0], most),
        ([most, below], most),
        ([most, 2.0**116], math.inf),
    ):
        assert norm_of_the_page(row) == expected
        assert rounding.norm(np.float32([row]))[0] == expected


@given(st.lists(float32s, min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_float64_sums_are_as_near_as_the_page_says(row: list[float], random: Any) -> None:
    """N1 M3: exact squares and products, and a sum of D of them in any order."""
    other = random.sample(row, len(row))
    for x, y in ((row, row), (row, other)):
        products = [u * v for u, v in zip(x, y, strict=True)]
        exact = [Fraction(u) * Fraction(v) for u, v in zip(x, y, strict=True)]
        assert [Fraction(value) for value in products] == exact
        random.shuffle(products)
        total = 0.0
        for value in products:
            total += value
        allowed = (len(row) - 1) * Fraction(2) ** -53 * sum(map(abs, exact))
        assert abs(Fraction(total) - sum(exact)) <= allowed


def test_squares_of_subnormals_are_normal_in_float64() -> None:
    """N1."""
    assert np.finfo(np.float64).tiny <= (2.0**-149) ** 2


# --- M3 -----------------------------------------------------------------------------------------


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    """Vectors, and directions as decoders form them, whose products may cancel or be tiny."""
    x = draw(rows)
    size = len(x)
    y = draw(st.lists(st.integers(-15, 15), min_size=size, max_size=size))
    scale = draw(st.sampled_from([1.0, 2.0**-24, 1 / 7, 0.1, 2.0**-126, 2.0**60]))
    product = (np.float32(y) * np.float32(scale)).tolist()
    return x, product


@settings(max_examples=500)
@given(pairs())
@example(([2.0**-149, 2.0**-149], [1.0, -1.0]))
def test_the_recipe_of_the_gain(pair: tuple[list[float], list[float]]) -> None:
    """M3. A quotient of 0 may have either sign: it is narrowed to 0 (Z1)."""
    x, y = pair
    expected = gain_of_the_page(x, y)
    found = rounding.least_squares_gain(np.float32([x]), np.float32([y]))[0]
    assert same_bits(found + np.float32(0), expected + 0.0)
    scheme = Scheme(magnitude="lsq", norm_dtype="float32")
    assert same_bits(
        oracle.factor(x, y, oracle.exact_norm(x), [1.0] * len(x), scheme), expected
    ) or math.isinf(oracle.exact_norm(x))


@pytest.mark.parametrize("sign", [1, -1])
def test_gains_at_the_ends(sign: int) -> None:
    """M3: subnormal quotients, ties among them, are rounded once; the largest are not held."""
    tiny = 2.0**-149
    double = tiny * (2**23 + 1)  # times 3 / 2: just above a tie that float64 would keep apart
    for x, y, expected in (
        ([tiny], [2.0], 0.0),  # half a unit, to even
        ([3 * tiny], [2.0], 2 * tiny),  # one and a half, to even
        ([tiny * 5], [2.0], 2 * tiny),
        ([double], [2.0], tiny * (2**22)),  # 2^22 + 1/2, to even
        ([2.0**-100], [2.0**-100], 1.0),
        ([3e38], [2.0**-24], math.inf),
        ([1.0, -1.0], [1.0, 1.0], 0.0),
        ([3e38, -3e38, tiny], [1.0, 1.0, 1.0], 0.0),
        ([3e38, -3e38, 3 * tiny, 0.0], [1.0, 1.0, 1.0, 0.0], tiny),
    ):
        given_x = np.float32([sign * value for value in x])
        assert abs(gain_of_the_page(given_x.tolist(), y)) == expected
        assert abs(rounding.least_squares_gain(given_x[None], np.float32([y]))[0]) == expected


# --- in every implementation --------------------------------------------------------------------


def directions(quantized: Quantized) -> Float32:
    """The y of D1, for one block."""
    y = quantized.codes.astype(np.float32) * quantized.scale.astype(np.float32)
    return y if quantized.zero is None else y + quantized.zero.astype(np.float32)


def expected_factors(x: Float32, quantized: Quantized) -> list[float]:
    if quantized.scheme.magnitude == "norm":
        return [norm_of_the_page(row) for row in x]
    return [gain_of_the_page(u, v) for u, v in zip(x, directions(quantized), strict=True)]


@st.composite
def small_tokens(draw: st.DrawFn) -> Float32:
    """Tokens of small whole multiples of a power of two near the end of float32's range."""
    tokens, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    unit = draw(st.sampled_from([2.0**-149, 2.0**-148, 2.0**-140, 2.0**-127, 2.0**-126]))
    size = draw(st.sampled_from([2, 5, 2**12, 2**22]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return (rng.integers(-size, size + 1, (tokens, head_dim)) * unit).astype(np.float32)


@settings(max_examples=300)
@given(small_tokens(), st.sampled_from(["norm", "lsq"]), st.booleans())
def test_small_factors_in_every_backend(x: Float32, magnitude: Any, symmetric: bool) -> None:
    """N1 M3: near subnormals."""
    scheme = Scheme(magnitude=magnitude, symmetric=symmetric, **FLOAT32)  # type: ignore[arg-type]
    for backend in BACKENDS:
        quantized = quantize(x, scheme, backend)
        assert quantized.norm is not None
        assert quantized.norm.tolist() == expected_factors(x, quantized)


@pytest.mark.parametrize("magnitude", ["norm", "lsq"])
@pytest.mark.parametrize("runner", [*RUNNERS, "native"])
def test_small_factors_in_every_operator(runner: str, magnitude: Any) -> None:
    """N1 M3: near subnormals."""
    scheme = Scheme(magnitude=magnitude, symmetric=False, **FLOAT32)  # type: ignore[arg-type]
    run = (RUNNERS | {"native": native})[runner](quantize_model(scheme))

    @settings(max_examples=15)
    @given(small_tokens())
    def agrees(x: Float32) -> None:
        expected = quantize(x, scheme)
        found = run({"x": x})
        for name, part in expected.parts.items():
            assert found[name].tobytes() == part.tobytes(), name

    agrees()


# --- leading axes of length 0 -------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=3).filter(lambda lead: 0 in lead),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(["nsep+pchan4", "streaming4", "nsep+out4", "naive3"]),
    st.sampled_from(BACKENDS),
)
def test_no_sequences(
    lead: list[int], tokens: int, head_dim: int, name: str, backend: Backend
) -> None:
    """Parts: an array without sequences is quantized to parts without any."""
    for dtype in (np.float32, np.float16, np.float64):
        x = np.zeros((*lead, tokens, head_dim), dtype)
        for given_x in (x, np.moveaxis(x, 0, -3) if len(lead) > 1 else x[::-1]):
            quantized = quantize(given_x, name, backend)
            layout = quantized.scheme.layout(tokens, head_dim, quantized.dtype)
            assert {n: (p.shape, p.dtype) for n, p in quantized.parts.items()} == {
                n: ((*given_x.shape[:-2], *f.shape), f.dtype) for n, f in layout.items()
            }
            assert (quantized.nbytes, quantized.bits_per_element) == (0, 0.0)
            decoded = dequantize(quantized, backend=backend)
            assert (decoded.shape, decoded.dtype) == (given_x.shape, np.float32)


@pytest.mark.parametrize("name", ["nsep+pchan4", "streaming4", "nsep+out4", "naive3"])
@pytest.mark.parametrize("runner", ["onnxruntime", "onnxruntime without optimization", "native"])
def test_no_sequences_in_operators(runner: str, name: str) -> None:
    """Parts."""
    scheme = as_scheme("scheme", name)
    load = (RUNNERS | {"native": native})[runner]
    encode, decode = load(quantize_model(scheme)), load(dequantize_model(scheme))
    for shape in ((0, 3, 4), (2, 0, 3, 4), (0, 1, 1)):
        expected = quantize(np.zeros(shape, np.float32), scheme)
        found = encode({"x": np.zeros(shape, np.float32)})
        for part, array in expected.parts.items():
            assert (found[part].shape, found[part].dtype) == (array.shape, array.dtype)
        decoded = decode({**expected.parts, "shape": np.int32(shape)})["x_hat"]
        assert (decoded.shape, decoded.dtype) == (shape, np.float32)


def test_no_sequences_in_a_file(tmp_path: Path) -> None:
    """Parts."""
    quantized = quantize(np.zeros((2, 0, 3, 4), np.float32), "streaming4")
    files.save(tmp_path / "none.safetensors", {"keys": quantized})
    loaded = files.load(tmp_path / "none.safetensors")["keys"]
    assert (loaded.shape, loaded.scheme) == (quantized.shape, quantized.scheme)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (2, 0, 4), (0, 0, 4), (0, 4, 0)])
def test_no_tokens_or_no_channels(shape: tuple[int, ...]) -> None:
    """Parts: these are refused, with or without sequences."""
    axis = len(shape) - 2 + (shape[-2] != 0)
    with pytest.raises(ValueError, match=rf"axis {axis} is empty; leave such arrays out"):
        quantize(np.zeros(shape, np.float32))

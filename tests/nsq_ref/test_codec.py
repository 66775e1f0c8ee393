"""What surrounds the rules: layouts, leading axes, threads, blocks, and refusals."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from nsq_ref import (
    Quantized,
    RangeError,
    Scheme,
    arrays,
    dequantize,
    kernels,
    quantize,
    scheme_names,
)
from nsq_ref.codec import Backend
from nsq_ref.strategies import schemes, tensors
from tests.support.tensors import BFloat16Tensor, DeviceTensor, OlderTensor, Tensor

Float32 = npt.NDArray[np.float32]
BACKENDS: tuple[Backend, ...] = ("numba", "numpy", "oracle")


def bits(quantized: Quantized) -> dict[str, bytes]:
    return {name: part.tobytes() for name, part in quantized.parts.items()}


def normals(*shape: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- layout -------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(tensors(), schemes(norm_dtype="float32", scale_dtype="float32", outlier_channels=0))
def test_layout_of_memory_does_not_matter(x: Float32, scheme: Scheme) -> None:
    try:
        expected = quantize(x, scheme)
    except RangeError:
        return
    stepped = np.zeros((x.shape[0], 2 * x.shape[1], 3 * x.shape[2]), np.float32)
    stepped[:, ::2, ::3] = x
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    read_only = x.copy()
    read_only.flags.writeable = False
    layouts = {
        "Fortran": np.asfortranarray(x),
        "stepped": stepped[:, ::2, ::3],
        "reversed": x[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
        "unaligned": unaligned,
        "read-only": read_only,
        "big-endian": x.astype(">f4"),
        "float64": x.astype(np.float64),
    }
    for name, other in layouts.items():
        assert bits(quantize(other, scheme)) == bits(expected), name


@pytest.mark.parametrize("name", ["nsep+pchan4", "naive3", "streaming2", "nsep+out8"])
def test_leading_axes_are_independent(name: str) -> None:
    """B2: split, merged, moved or alone, a sequence has the same bytes."""
    scheme = Scheme.named(name)
    assert isinstance(scheme, Scheme)
    x = normals(2, 3, 150, 6)
    whole = quantize(x, scheme)
    merged = quantize(x.reshape(6, 150, 6), scheme)
    assert {k: v.tobytes() for k, v in merged.parts.items()} == bits(whole)
    swapped = quantize(x.swapaxes(0, 1), scheme)
    for b, h in np.ndindex(2, 3):
        alone = quantize(x[b, h], scheme)
        for part_name, part in alone.parts.items():
            assert part.tobytes() == whole.parts[part_name][b, h].tobytes()
            assert part.tobytes() == swapped.parts[part_name][h, b].tobytes()
    assert dequantize(whole).tobytes() == dequantize(merged).tobytes()


def test_one_row_of_a_batch_does_not_touch_the_others() -> None:
    """B2: padding or another user's tokens enter no scale."""
    x = normals(4, 64, 8)
    before = quantize(x)
    x[2] *= 1000
    after = quantize(x)
    for row in (0, 1, 3):
        for name in before.parts:
            assert before.parts[name][row].tobytes() == after.parts[name][row].tobytes()
    assert before.norm is not None
    assert before.norm[2].tobytes() != after.parts["norm"][2].tobytes()


@pytest.mark.parametrize("name", ["nsep+pchan4", "pchan2", "streaming3", "nsep+out4", "naive8"])
@pytest.mark.parametrize("shape", [(3, 2500, 16), (1, 5000, 9), (700, 33, 7), (1, 131_000, 1)])
def test_threads_and_slabs_do_not_matter(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """N1: exact sums make the order of work invisible."""
    scheme = Scheme.named(name)
    assert isinstance(scheme, Scheme)
    x = normals(*shape)
    monkeypatch.setattr(kernels.codec, "SERIAL_ELEMENTS", 0)
    expected, decoded = None, None
    for threads, slab in ((1, 1 << 25), (2, 1 << 25), (5, 1 << 14), (3, 1)):
        monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", threads)
        monkeypatch.setattr(arrays, "SLAB_BYTES", slab)
        quantized = quantize(x, scheme)
        expected = expected or bits(quantized)
        decoded = decoded or dequantize(quantized).tobytes()
        assert bits(quantized) == expected
        assert dequantize(quantized).tobytes() == decoded


def test_threads_of_the_caller() -> None:
    """Several Python threads quantize at once, and a forked child after that."""
    x = normals(8, 2048, 32)
    expected = bits(quantize(x))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(bits(q) == expected for q in pool.map(lambda _: quantize(x), range(8)))
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        assert bits(workers.apply(quantize, (x,))) == expected


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.data())
def test_full_blocks_do_not_change_when_tokens_follow(
    tokens: int, size: int, sinks: int, data: st.DataObject
) -> None:
    """B1 K1: what a cache would have sealed is what one shot gives."""
    axis = data.draw(st.sampled_from(["channel", "token"]))
    scheme = Scheme(block_size=size, sink_tokens=sinks, axis=axis, outlier_channels=1)
    x = normals(tokens, 5, seed=tokens)
    shorter = data.draw(st.integers(1, tokens))
    whole, prefix = quantize(x, scheme), quantize(x[:shorter], scheme)
    sealed = max(shorter - sinks, 0) // size
    for name in ("packed", "norm", "outliers"):
        equal = whole.parts[name][: sealed * size] == prefix.parts[name][: sealed * size]
        assert equal.all(), name
    rows = sealed if axis == "channel" else sealed * size
    assert np.array_equal(whole.scale[:rows], prefix.scale[:rows])
    for block in range(sealed):  # a block depends on its own tokens alone
        own = slice(sinks + block * size, sinks + (block + 1) * size)
        alone = quantize(x[own], replace(scheme, sink_tokens=0))
        coded = slice(block * size, (block + 1) * size)
        assert alone.packed.tobytes() == whole.packed[coded].tobytes()


def test_crop_inside_a_block() -> None:
    """C1: survivors return as decoded values; the block is sealed anew, earlier ones stay."""
    scheme = Scheme(block_size=8)
    x, new = normals(20, 6), normals(9, 6, seed=1)
    first = quantize(x[:16], scheme)
    survivors = dequantize(first)[8:11]  # crop to 11, inside the second block
    again = quantize(np.concatenate([x[:8], survivors, new[:5]]), scheme)
    assert again.packed[:8].tobytes() == first.packed[:8].tobytes()
    assert again.scale[0].tobytes() == first.scale[0].tobytes()
    alone = quantize(np.concatenate([survivors, new[:5]]), scheme)
    assert again.packed[8:].tobytes() == alone.packed.tobytes()
    assert again.scale[1].tobytes() != first.scale[1].tobytes()  # not the scales it had before


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_sinks_are_kept_as_they_came(dtype: Any) -> None:
    """K1: in the input's dtype, signed zeros included, and outside every scale."""
    x = normals(2, 9, 4).astype(dtype)
    x[:, 0, 0] = -0.0
    x[:, 1] *= 100
    for sinks in (2, 9, 30):
        quantized = quantize(x, Scheme(sink_tokens=sinks))
        kept = x[:, :sinks].astype(np.float32 if dtype == np.float64 else dtype)
        assert quantized.sinks is not None
        assert quantized.sinks.dtype == kept.dtype
        assert quantized.sinks.tobytes() == kept.tobytes()
        decoded = dequantize(quantized)
        assert decoded[:, :sinks].tobytes() == kept.astype(np.float32).tobytes()
        assert quantized.codes.shape == (2, max(9 - sinks, 0), 4)
    rest = quantize(x[:, 2:], Scheme())
    assert quantize(x, Scheme(sink_tokens=2)).scale.tobytes() == rest.scale.tobytes()


# --- arrays of others ---------------------------------------------------------------------------


def test_bfloat16_through_dlpack() -> None:
    """I1: what a torch.bfloat16 tensor hands over."""
    x = normals(4, 6, 8).astype(ml_dtypes.bfloat16)
    for array in (x, x[:, ::2], x.transpose(1, 0, 2)):
        tensor = BFloat16Tensor(array)
        taken = arrays.as_float_array("x", tensor)
        assert taken.dtype == ml_dtypes.bfloat16
        assert np.shares_memory(taken, x)
        assert bits(quantize(tensor)) == bits(quantize(array))


def test_dlpack_is_read_without_a_copy() -> None:
    x = normals(4, 8)
    assert bits(quantize(Tensor(x))) == bits(quantize(x))
    taken = arrays.as_float_array("x", Tensor(x))
    assert np.shares_memory(taken, x)


def test_dlpack_that_cannot_be_read() -> None:
    with pytest.raises(TypeError, match=r"x cannot be read as an array .*; pass a NumPy array, or"):
        arrays.as_float_array("x", [[1.0, 2.0], [3.0]])
    with pytest.raises(
        TypeError, match=r"x cannot be read as an array \(the tensor lives on a GPU\)"
    ):
        quantize(DeviceTensor(normals(2, 2)))


def test_lists_and_bfloat16() -> None:
    """I1."""
    assert quantize([[1.0, -2.0], [0.5, 4.0]]).shape == (2, 2)
    x = normals(5, 8).astype(ml_dtypes.bfloat16)
    assert bits(quantize(x)) == bits(quantize(x.astype(np.float32)))
    assert quantize(x).dtype == ml_dtypes.bfloat16


def test_float64_is_rounded_once_to_float32() -> None:
    """I1: half to even."""
    x = np.array([[1 + 2.0**-24, 1 + 3 * 2.0**-24, -1.0]])
    scheme = Scheme(separate_norm=False, sink_tokens=1)
    sinks = quantize(x, scheme).sinks
    assert sinks is not None
    assert sinks.tolist() == [[1.0, 1 + 2.0**-22, -1.0]]


@pytest.mark.parametrize("wrap", [np.asarray, Tensor, OlderTensor])
def test_out_is_written_and_returned(wrap: Any) -> None:
    quantized = quantize(normals(2, 8, 4), Scheme(sink_tokens=1))
    memory = np.full((2, 8, 4), np.nan, np.float32)
    out = wrap(memory)
    assert dequantize(quantized, out) is out
    assert memory.tobytes() == dequantize(quantized).tobytes()


def test_a_scheme_by_its_name() -> None:
    x = normals(2, 8, 4)
    for name in scheme_names():
        assert bits(quantize(x, name)) == bits(quantize(x, Scheme.named(name)))


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("name", ["nsep+pchan4", "naive4", "streaming4"])
def test_not_finite_is_refused(backend: Backend, value: float, dtype: Any, name: str) -> None:
    """I2: the first index is named, wherever it lies, sinks included."""
    scheme = Scheme.named(name)
    assert isinstance(scheme, Scheme)
    for index in ((0, 0, 0), (1, 4, 2), (1, 0, 1)):
        x = normals(2, 5, 3).astype(dtype)
        x[-1, -1, -1] = np.nan
        x[index] = value
        place = ", ".join(map(str, index))
        with pytest.raises(ValueError, match=rf"^x\[{place}\] is {value}; nothing was quantized"):
            quantize(x, scheme, backend)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            np.ones((2, 3), np.int64),
            TypeError,
            r"x has dtype int64; pass float32, float16, bfloat16",
        ),
        (np.ones((2, 3), bool), TypeError, r"x has dtype bool; pass"),
        (np.ones((2, 3), np.complex64), TypeError, r"x has dtype complex64; pass"),
        (np.ones((2, 3), object), TypeError, r"x has dtype object; pass"),
        (np.array([["a"]]), TypeError, r"x has dtype <U1; pass"),
        (None, TypeError, r"x has dtype object; pass"),
        (np.ma.masked_array(np.ones((2, 2))), TypeError, r"x is a masked array .* x\.filled\(0\)"),
        (np.float32(1), ValueError, r"x has shape \[\]; at least \[tokens, head_dim\]"),
        (np.ones(3, np.float32), ValueError, r"x has shape \[3\]; at least \[tokens, head_dim\]"),
        (np.ones((2, 3, 0), np.float32), ValueError, r"x has shape \[2, 3, 0\]: axis 2 is empty"),
        (np.ones((2, 0, 3), np.float32), ValueError, r"x has shape \[2, 0, 3\]: axis 1 is empty"),
    ],
)
def test_wrong_arrays(x: Any, error: type[Exception], message: str) -> None:
    """I1."""
    with pytest.raises(error, match=message) as caught:
        quantize(x)
    assert type(caught.value) is error


@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_a_dtype(backend: Backend) -> None:
    """N1 M4 S5 O1 D3: what cannot be held is refused, with the place and the remedy."""
    plain = Scheme.named("pchan4")
    x = np.ones((2, 3, 4), np.float32)
    high = x.copy()
    high[1, 2] = 40000
    float16 = replace(Scheme(), norm_dtype="float16")
    for value, scheme, message in (
        (
            high,
            float16,
            r"^the norm of token x\[1, 2\] is beyond float16; norm_dtype='float32' holds",
        ),
        (high, replace(float16, sink_tokens=1), r"^the norm of token x\[1, 2\] is beyond float16"),
        (high, replace(float16, magnitude="lsq"), r"^the lsq of token x\[1, 2\] is beyond float16"),
        (
            x * 3e38,
            replace(Scheme(), norm_dtype="float32"),
            r"token x\[0, 0\] is beyond float32; scale the input",
        ),
        *(
            (
                np.float32([[1, 2], [3e38, 3e38]]),
                replace(Scheme(), norm_dtype="float32", magnitude=magnitude),
                r"^the norm of token x\[1\] is beyond float32; scale the input down",
            )
            for magnitude in ("norm", "gain", "lsq")
        ),
        (
            np.float32([[3e38, 3e38], [-3e38, 3e38]]),
            replace(plain, symmetric=False, scale_dtype="float32"),
            r"^scale\[0, 0\] is beyond float32; scale the input down",
        ),
        (x * 1e6, plain, r"^scale\[0, 0, 0\] is beyond float16; scale_dtype='float32' holds"),
        (
            x * 1e6,
            replace(plain, symmetric=False),
            r"^scale\[0, 0, 0\] is beyond float16; scale_dtype=",
        ),
        (x * 1e6, replace(plain, scale_rule="search"), r"^scale\[0, 0, 0\] is beyond float16"),
        (
            x * 1e9,
            Scheme.named("outlier2"),
            r"^outliers\[0, 0, 0\] is beyond float16, .* separate_norm=True",
        ),
        (
            x * 3.4e38,
            replace(plain, bits=3, scale_dtype="bfloat16"),
            r"^x\[0, 0, 0\] would decode to a value beyond",
        ),
        (
            x.astype(np.float64) * 1e39,
            plain,
            r"^x\[0, 0, 0\] is 1e\+39, beyond float32; scale x down",
        ),
    ):
        with pytest.raises(RangeError, match=message):
            quantize(value, scheme, backend)
    assert quantize(high, replace(float16, norm_dtype="float32"), backend).norm is not None


def test_wrong_options() -> None:
    x = normals(2, 2)
    with pytest.raises(TypeError, match=r"scheme is a pair .*; pass its \.key or its \.value"):
        quantize(x, Scheme.named("KIVI-K2V4"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"backend='cuda' is not one of numba, numpy, oracle"):
        quantize(x, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"quantized must be what quantize returns, got ndarray"):
        dequantize(x)  # type: ignore[arg-type]
    quantized = quantize(x)
    for out in (np.empty((2, 2)), np.empty((2, 3), np.float32)):
        with pytest.raises(ValueError, match=r"out must be a float32 array of shape \[2, 2\], got"):
            dequantize(quantized, out)
    with pytest.raises(TypeError, match=r"out must be an array, got list; pass np.empty"):
        dequantize(quantized, [1.0])
    with pytest.raises(ValueError, match=r"out must be C-contiguous and writeable"):
        dequantize(quantized, np.empty((2, 2), np.float32).T)


# --- what the rules imply -----------------------------------------------------------------------


@settings(max_examples=100)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4, 8]), st.sampled_from(["channel", "token"])
)
def test_idempotence(seed: int, width: int, axis: Any) -> None:
    """S1 Q1 D1: decoding and coding again changes nothing, where the spec says so."""
    x = normals(9, 7, seed=seed)
    for dtype in ("float16", "bfloat16"):
        scheme = Scheme(bits=width, separate_norm=False, axis=axis, scale_dtype=dtype)  # type: ignore[arg-type]
        once = quantize(x, scheme)
        assert bits(quantize(dequantize(once), scheme)) == bits(once)


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(-60, 60), st.sampled_from([2, 3, 4, 8]))
def test_exact_scaling(seed: int, exponent: int, width: int) -> None:
    """N1 N2: a power of two goes into the norms alone."""
    x = normals(9, 7, seed=seed)
    scheme = Scheme(bits=width, norm_dtype="float32", symmetric=False)
    once, scaled = quantize(x, scheme), quantize(x * np.float32(2.0**exponent), scheme)
    assert once.norm is not None
    assert scaled.norm is not None
    assert once.packed.tobytes() == scaled.packed.tobytes()
    assert once.scale.tobytes() == scaled.scale.tobytes()
    assert np.array_equal(scaled.norm, once.norm * np.float32(2.0**exponent))


@settings(max_examples=200)
@given(tensors(), schemes(separate_norm=True, symmetric=True, magnitude="norm", scale_rule="range",
                          outlier_channels=0, norm_dtype="float32"))  # fmt: skip
def test_reconstruction_error(x: Float32, scheme: Scheme) -> None:
    """S1 Q1 D1: the direction is off by half a scale a channel at most, and norms are kept."""
    try:
        quantized = quantize(x, scheme)
    except RangeError:
        return
    coded = x[:, scheme.sink_tokens :].astype(np.float64)
    if not coded.size:
        return
    norm = np.linalg.norm(coded, axis=-1, keepdims=True)
    direction = coded / np.where(norm == 0, 1, norm)
    scale = quantized.scale.astype(np.float64)
    if scheme.axis == "channel":
        size = scheme.block_size or coded.shape[1]
        scale = np.repeat(scale, size, axis=1)[:, : coded.shape[1]]
    y = quantized.codes * scale
    # Half a scale; where narrowing lowered the scale the clamp takes part of the top (S3); and
    # float32 arithmetic, 7 * 2**-24 of a direction.
    top = np.abs(direction) - quantized.scheme.code_range[1] * scale
    bound = np.maximum(scale / 2, top) + 7 * 2.0**-24
    assert (np.abs(direction - y) <= bound).all()
    decoded = dequantize(quantized)[:, scheme.sink_tokens :].astype(np.float64)
    alive = (np.abs(y) > 0).any(axis=-1) & (norm[..., 0] > 1e-30)
    length = np.linalg.norm(decoded, axis=-1)[alive]
    assert np.allclose(length, norm[..., 0][alive], rtol=1e-6, atol=0)


def test_every_collapse_is_counted() -> None:
    """D2: by zero codes, by a norm that its dtype flushes to zero, by underflow."""
    x = np.concatenate([np.eye(196), np.ones((3, 196)), np.zeros((2, 196))]).astype(np.float32)
    for backend in BACKENDS[:2]:
        assert quantize(x, Scheme(scale_dtype="float32"), backend).collapsed_tokens == 3
        gained = quantize(x, Scheme(scale_dtype="float32", magnitude="gain"), backend)
        assert gained.norm is not None
        assert not gained.norm[196:].any()
        assert not dequantize(gained)[196:].any()
    for tiny, collapsed in ((2.0**-25, 1), (1.5 * 2.0**-25, 0)):
        flushed = quantize(np.float32([[tiny, 0], [1, 0]]))
        assert flushed.collapsed_tokens == collapsed
    assert quantize(np.float32([[0.1], [7]]), Scheme.named("pchan4")).collapsed_tokens == 1
    # A stored factor of 2**-149 and a direction of a half or less: every product is zero.
    x = np.zeros((9, 8), np.float32)
    x[0, :4] = 2.0**-149
    for j in range(4):
        x[1 + 2 * j, 4 + j], x[2 + 2 * j, 4 + j] = 1, -1
    scheme = Scheme(
        bits=2, symmetric=False, magnitude="lsq", norm_dtype="float32", scale_dtype="float32"
    )
    for backend in BACKENDS:
        underflowing = quantize(x, scheme, backend)
        assert underflowing.norm is not None
        assert underflowing.norm[0] == np.float32(2.0**-149)
        assert not dequantize(underflowing)[0].any()
        assert underflowing.collapsed_tokens == 1


@settings(max_examples=60)
@given(st.integers(1, 195), st.integers(0, 2**32 - 1))
def test_no_collapse_below_the_bound(head_dim: int, seed: int) -> None:
    """D2: at 4 bits no token of fewer than 196 channels collapses, however it is built."""
    rng = np.random.default_rng(seed)
    tokens = [
        np.eye(head_dim),
        np.ones((1, head_dim)),
        np.abs(rng.standard_normal((4, head_dim))) + 3,
    ]
    x = np.concatenate(tokens).astype(np.float32)
    for dtype in ("float16", "bfloat16", "float32"):
        scheme = Scheme(scale_dtype=dtype)  # type: ignore[arg-type]
        assert quantize(x, scheme).collapsed_tokens == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_may_be_longer_than_any_sequence(backend: Backend) -> None:
    """B1: no work and no memory for tokens that are not there."""
    x = normals(2, 9, 4)
    for axis in ("channel", "token"):
        scheme = Scheme(axis=axis, outlier_channels=1, scale_rule="search")  # type: ignore[arg-type]
        long = quantize(x, replace(scheme, block_size=2**60), backend)
        assert bits(long) == bits(quantize(x, scheme, backend))
        assert dequantize(long, backend=backend).tobytes() == dequantize(long).tobytes()

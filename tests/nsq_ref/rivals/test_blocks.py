"""Codecs whose arithmetic is exact: equal to the published library, or to scalars, bit for bit."""

from __future__ import annotations

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import quants
from hypothesis import given, settings

from nsq_ref.rivals import entry
from nsq_ref.rivals.ggml import GgmlBlocks
from nsq_ref.rivals.grouped import KiviKeys, KiviValues
from nsq_ref.rivals.nvfp4 import Nvfp4, e2m1, e4m3
from nsq_ref.rivals.rotation import Rotated, hadamard
from tests.support import rivals_by_loops as loops
from tests.support.rivals_by_loops import Caches, caches

FEW = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("kind", ["q4_0", "q5_0", "q8_0"])
@given(x=caches(tokens=[1, 7], head_dims=[32, 96]))
@FEW
def test_ggml_has_the_bytes_of_gguf(kind: str, x: Caches) -> None:
    theirs = quants.quantize(x, gguf.GGMLQuantizationType[kind.upper()])
    codec = GgmlBlocks(kind)  # type: ignore[arg-type]
    parts = codec.encode(x)
    codes, scale = (parts[name].values for name in ("codes", "scale"))
    rows = [scale.view(np.uint8)]
    if kind == "q8_0":
        rows.append(codes.view(np.uint8))
    else:
        low, high = codes[..., :16] & 15, codes[..., 16:] & 15
        if kind == "q5_0":
            rows.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        rows.append(low | high << 4)
    assert np.concatenate(rows, axis=-1).reshape(theirs.shape).tobytes() == theirs.tobytes()
    stored = codec(x)
    restored = quants.dequantize(theirs, gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(stored.x_hat, restored)  # -0 is 0
    assert stored.sealed_bits == 8 * theirs.nbytes
    assert stored.kept_bits == 0


@pytest.mark.parametrize("bits", [2, 4])
@given(x=caches(tokens=[5, 128, 129, 300], head_dims=[32, 64]))
@settings(max_examples=8, deadline=None)
def test_kivi_by_scalars(bits: int, x: Caches) -> None:
    tokens, head_dim = x.shape[-2:]
    as_keys, as_values = KiviKeys(bits)(x), KiviValues(bits)(x)
    full, old = tokens // 128 * 128, max(tokens - 128, 0)
    rounded = np.array([loops.half(float(one)) for one in x.ravel()], np.float32).reshape(x.shape)
    keys, values = rounded.copy(), rounded
    for head in range(len(x)):
        for first in range(0, full, 32):
            for channel in range(head_dim):
                group = list(x[head, first : first + 32, channel])
                keys[head, first : first + 32, channel] = loops.from_minimum(group, bits)
        for token in range(old):
            for first in range(0, head_dim, 32):
                group = list(x[head, token, first : first + 32])
                values[head, token, first : first + 32] = loops.from_minimum(group, bits)
    assert np.array_equal(as_keys.x_hat, keys)
    assert np.array_equal(as_values.x_hat, values)
    for stored, sealed in ((as_keys, full), (as_values, old)):
        assert stored.sealed_elements == 2 * sealed * head_dim
        assert stored.sealed_bits == 2 * sealed * head_dim * (bits + 1)
        assert stored.kept_bits == 16 * 2 * (tokens - sealed) * head_dim


@given(x=caches(tokens=[1, 5], head_dims=[16, 80], heads=3))
@FEW
def test_nvfp4_by_ml_dtypes(x: Caches) -> None:
    tensor = np.abs(x).max() / np.float32(6 * 448)
    expected = np.zeros_like(x)
    for index in np.ndindex(3, x.shape[1], x.shape[2] // 16):
        head, token, block = index
        place = np.s_[head, token, 16 * block : 16 * block + 16]
        if tensor == 0:
            continue
        ratio = np.abs(x[place]).max() / np.float32(6) / tensor
        scale = np.minimum(ratio, np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
        both = scale.astype(np.float32) * tensor
        if both:
            codes = np.clip(x[place] / both, -6, 6).astype(ml_dtypes.float4_e2m1fn)
            expected[place] = codes.astype(np.float32) * both
    stored = Nvfp4()(x)
    assert np.array_equal(stored.x_hat, expected)
    assert stored.sealed_bits == x.size * 4 + x.size // 16 * 8 + 32


def test_small_floats_by_ml_dtypes() -> None:
    """Every number, the middle between two, and their neighbours."""
    for dtype, ours, largest in (
        (ml_dtypes.float8_e4m3fn, e4m3, 448), (ml_dtypes.float4_e2m1fn, e2m1, 6),
    ):  # fmt: skip
        numbers = np.arange(128 if largest == 448 else 8, dtype=np.uint8).view(dtype)
        known = numbers.astype(np.float32)
        known = known[np.isfinite(known)]
        ties = (known[1:] + known[:-1]) / 2
        x = np.concatenate([known, ties, np.nextafter(ties, 0), np.nextafter(ties, 1000)])
        assert np.array_equal(ours(x), x.astype(dtype).astype(np.float32))
        assert ours(np.float32([1e6])) == largest


@pytest.mark.parametrize(("head_dim", "for_keys"), [(64, 64), (128, 128), (192, 64), (256, 256)])
def test_llama_cpp_rotates_block_by_block(head_dim: int, for_keys: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, head_dim)).astype(np.float32)
    both = entry("hadamard+q8_0")
    for codec, size in ((both.key, for_keys), (both.value, 64)):
        assert isinstance(codec, Rotated)
        blocks = x.reshape(3, -1, size).astype(np.float64) @ loops.hadamard(size)
        turned = blocks.reshape(3, head_dim)
        assert np.allclose(hadamard(x, size), turned, atol=1e-5)
        inner = GgmlBlocks("q8_0")(hadamard(x, size)).x_hat.astype(np.float64)
        expected = (inner.reshape(3, -1, size) @ loops.hadamard(size)).reshape(3, head_dim)
        assert np.allclose(codec(x).x_hat, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "head_dim", "said"),
    [
        ("q4_0", 48, "q4_0 needs a multiple of 32"),
        ("hadamard+q4_0", 96, "the rotation needs a multiple of 64"),
        ("oscar2", 96, "OScaR rotates a power of two"),
        ("kvarn-k4v2", 80, "KVarN rotates a power of two"),
        ("nsnquant2", 24, "NSNQuant rotates a power of two"),
        ("nsnquant2", 4, "NSNQuant needs a multiple of 8"),
        ("nvfp4", 24, "NVFP4 needs a multiple of 16"),
        ("turboquant4", 2, "needs at least 3"),
        ("smoothquant4", 5, "a rotary pair needs a multiple of 2"),
    ],
)
def test_other_head_dims_are_refused(name: str, head_dim: int, said: str) -> None:
    with pytest.raises(ValueError, match=f"^x has head_dim {head_dim}; .*{said}"):
        entry(name).key(np.ones((1, 300, head_dim), np.float32))
    if name == "q4_0":
        with pytest.raises(ValueError, match="KIVI needs a multiple of 32"):
            entry("kivi2").value(np.ones((1, 300, head_dim), np.float32))


def test_ggml_rounds_halves_as_gguf_does() -> None:
    """Halves of a scale of 1, of both signs: away from zero at 8 bits, upwards below."""
    for kind, largest in (("q4_0", -8), ("q5_0", -16), ("q8_0", 127)):
        halves = np.arange(-15, 16) / 2
        x = np.concatenate([[largest], halves])[None].astype(np.float32)
        theirs = quants.quantize(x, gguf.GGMLQuantizationType[kind.upper()])
        restored = quants.dequantize(theirs, gguf.GGMLQuantizationType[kind.upper()])
        assert np.array_equal(GgmlBlocks(kind)(x).x_hat, restored)  # type: ignore[arg-type]

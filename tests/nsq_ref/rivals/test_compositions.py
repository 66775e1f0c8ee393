"""Low rank, GEAR, static scales, smoothing and norms in front: by loops and by NumPy's SVD."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from nsq_ref import RangeError, Scheme
from nsq_ref.rivals import NormFirst, SchemeCodec, entry
from nsq_ref.rivals.lowrank import Gear, LowRank
from nsq_ref.rivals.scaled import Smoothed, StaticChannels
from tests.support import rivals_by_loops as loops
from tests.support.rivals_by_loops import Caches, caches

FEW = settings(max_examples=10, deadline=None)


def truncated(head: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    """The paper's pca_truncate."""
    mean = head.mean(axis=0, keepdims=True)
    u, s, vt = np.linalg.svd(head - mean, full_matrices=False)
    return np.asarray(u[:, :rank] * s[:rank] @ vt[:rank] + mean)


@given(x=caches(tokens=[3, 40], head_dims=[5, 16]))
@FEW
def test_pca(x: Caches) -> None:
    """As near as the best of that rank, but for float16."""
    restored = LowRank(4)(x).x_hat
    for head, ours in zip(x.astype(np.float64), restored, strict=True):
        best = np.linalg.norm(truncated(head, 4) - head)
        assert np.linalg.norm(ours - head) <= best * 1.01 + 4e-3 * np.linalg.norm(head)
    rank = min(4, *x.shape[1:])
    bits = 16 * 2 * (x.shape[2] + rank * (x.shape[1] + x.shape[2]))
    assert LowRank(4)(x).sealed_bits == bits


def test_pca_of_data_of_that_rank_and_of_more() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((50, 2)) @ rng.standard_normal((2, 12)) + 3).astype(np.float32)
    errors = [np.linalg.norm(LowRank(rank)(x).x_hat - x) / np.linalg.norm(x) for rank in (1, 2)]
    assert errors[1] < 2e-3
    assert errors[0] > 0.1


@given(x=caches(tokens=[40], head_dims=[16]))
@FEW
def test_norm_and_pca_as_the_paper_does_it(x: Caches) -> None:
    restored = NormFirst(LowRank(12))(x).x_hat.astype(np.float64)
    for head, ours in zip(x.astype(np.float64), restored, strict=True):
        norms = np.maximum(np.linalg.norm(head, axis=-1, keepdims=True), 1e-12)
        spectrum = np.linalg.svd(head / norms - (head / norms).mean(0), compute_uv=False)
        if spectrum[11] < 1.1 * spectrum[12]:
            continue  # two components as good
        theirs = truncated(head / norms, 12)
        size = np.linalg.norm(theirs, axis=-1, keepdims=True)
        theirs = norms * theirs / np.maximum(size, 1e-12)
        clear = (size > 0.1)[:, 0] & (norms > 1e-6)[:, 0]
        assert np.abs(ours - theirs)[clear].max(initial=0) <= 0.05 * norms.max()
        assert np.allclose(np.linalg.norm(ours, axis=-1)[clear], norms[clear, 0], rtol=2e-3)


@pytest.mark.parametrize("name", ["nsep+kivi2", "nsep+gear4", "nsep+smoothquant4"])
@given(x=caches(tokens=[200], head_dims=[64]))
@settings(max_examples=4, deadline=None)
def test_norms_in_front(name: str, x: Caches) -> None:
    """Each is the other codec on directions, made long again; the norm costs 16 bits a token."""
    inner, composed = entry(name.removeprefix("nsep+")).key, entry(name).key
    first, last = inner.coded(200)
    coded = x[:, first:last]
    norms = np.array([[math.sqrt(math.fsum(t.astype(float) ** 2)) for t in h] for h in coded])
    safe = np.maximum(norms, 1e-30)[..., None]
    directions = inner((coded / safe).astype(np.float32)).x_hat.astype(np.float64)
    lengths = np.linalg.norm(directions, axis=-1, keepdims=True)
    stored = composed(x)
    ours = stored.x_hat[:, first:last].astype(np.float64)
    theirs = directions / np.maximum(lengths, 1e-30)
    theirs *= np.vectorize(loops.half)(norms)[..., None]
    # A direction may be off in its last bit, and a code with it.
    wrong = np.abs(ours - theirs).max(-1) > 4e-3 * norms + 1e-6
    assert wrong.mean() < 0.02
    without = inner(x)
    assert stored.sealed_bits == without.sealed_bits + 16 * norms.size
    assert stored.kept_bits == without.kept_bits
    assert np.array_equal(stored.x_hat[:, last:], without.x_hat[:, last:])


@pytest.mark.parametrize("side", ["key", "value"])
@given(x=caches(tokens=[256], head_dims=[32]))
@settings(max_examples=5, deadline=None)
def test_gear(side: str, x: Caches) -> None:
    codec = Gear(side, bits=2, group=64, sparsity=0.1)  # type: ignore[arg-type]
    parts = codec.encode(x)
    values = {name: part.values for name, part in parts.items()}
    coarse = np.empty_like(x)
    vectors = (
        [(np.s_[h, :, c], 64) for h in range(2) for c in range(32)]
        if side == "key"
        else [(np.s_[:, t], 64) for t in range(256)]
    )
    for place, group in vectors:
        vector = x[place].ravel()
        count = int(len(vector) * 0.1 / 2)
        order = sorted(range(len(vector)), key=lambda i: vector[i])
        outliers = order[:count] + order[len(order) - count :]
        filled = vector.copy()
        filled[outliers] = vector.mean()
        back = [
            one
            for first in range(0, len(filled), group)
            for one in loops.from_minimum(list(filled[first : first + group]), 2)
        ]
        out = np.array(back, np.float32)
        out[outliers] = [loops.half(float(one)) for one in vector[outliers]]
        coarse[place] = out.reshape(x[place].shape)
    left, right = (values[name].astype(np.float64) for name in ("left", "right"))
    mended = codec.decode(values, x.shape) - left @ np.swapaxes(right, -1, -2)
    assert np.abs(mended - coarse).max() <= 1e-4 * np.abs(x).max()
    # The factors: columns of length 1 at right angles, and most of the best there is.
    for error, one, other in zip((x - coarse).astype(np.float64), left, right, strict=True):
        spectrum = np.linalg.svd(error, compute_uv=False)
        if spectrum[3] < 1e-2 * np.abs(x).max():
            continue
        assert np.allclose(one.T @ one, np.eye(4), atol=5e-3)
        assert np.allclose(other, error.T @ one, atol=5e-3 * np.linalg.norm(error))
        kept = np.linalg.norm(other) ** 2
        assert kept >= 0.7 * float((spectrum[:4] ** 2).sum())
    sizes = {name: part.values.size for name, part in parts.items()}
    assert {name: parts[name].bits for name in ("codes", "scale", "outliers", "index")} == {
        "codes": 2, "scale": 16, "outliers": 16, "index": 16,
    }  # fmt: skip
    assert sizes["codes"] == x.size
    assert sizes["outliers"] == sizes["index"] == len(vectors) * 2 * count


@given(x=caches(tokens=[7], head_dims=[8]), other=caches(tokens=[30], head_dims=[8]))
@FEW
def test_static_scales(x: Caches, other: Caches) -> None:
    made = entry("onnxruntime-int4").calibrated(other, other)
    for codec, side in ((made.key, "key"), (made.value, "value")):
        restored = codec(x).x_hat
        for head, channel in np.ndindex(2, 8):
            column = np.abs(other[head, :, channel])
            if side == "key":
                column = np.hypot(column, other[head, :, (channel + 4) % 8])
            place = 0.9999 * (len(column) - 1)  # between the two largest
            low, high = sorted(column.tolist())[-2:]
            threshold = low + (high - low) * (place - math.floor(place))
            scale = max(threshold, 1e-6) / 8
            for token in range(7):
                ratio = float(x[head, token, channel]) / scale
                if abs(abs(ratio - math.floor(ratio)) - 0.5) > 1e-3 * max(1, abs(ratio)):
                    expected = min(max(round(ratio), -8), 7) * scale
                    assert loops.near(float(restored[head, token, channel]), expected, 1e-4)
        assert codec(x).sealed_bits == x.size * 4 + 2 * 8 * 32


def test_static_scales_must_be_calibrated_with_the_same_heads() -> None:
    x = np.ones((2, 3, 4), np.float32)
    fresh = entry("onnxruntime-int4")
    with pytest.raises(ValueError, match=r"call calibrated\(keys, values\)"):
        fresh.store(x, x)
    with pytest.raises(ValueError, match=r"scales \[2, 1, 4\]; calibrate with arrays of the same"):
        fresh.calibrated(x, x).key(x[:1])
    assert fresh.needs_calibration
    assert not fresh.calibrated(x, x).needs_calibration
    assert entry("q4_0").calibrated(x, x) == entry("q4_0")
    rotary = StaticChannels("key", percentile=100).calibrated(np.float32([[3, 4]]))
    assert rotary.scale is not None
    assert rotary.scale.tolist() == [[0.625, 0.625]]


@given(x=caches(tokens=[6], head_dims=[8]))
@FEW
def test_smoothing(x: Caches) -> None:
    codec = Smoothed(SchemeCodec(Scheme.named("naive4")))
    values = {name: part.values for name, part in codec.encode(x).items()}
    for head, channel in np.ndindex(2, 4):
        largest = max(abs(float(one)) for c in (channel, channel + 4) for one in x[head, :, c])
        factor = float(values["factor"][head, 0, channel])
        assert loops.near(factor, math.sqrt(largest), 1e-3)
    factors = np.concatenate([values["factor"]] * 2, axis=-1).astype(np.float32)
    smooth = np.divide(x, factors, out=np.zeros_like(x), where=factors > 0)
    inner = SchemeCodec(Scheme.named("naive4"))(smooth).x_hat
    assert np.array_equal(codec(x).x_hat, inner * factors)


def test_what_float16_cannot_hold_is_refused_by_name() -> None:
    x = np.full((1, 130, 64), 1e6, np.float32)
    for name, said in (
        ("kivi2", "a token kept unquantized is 1e.06, beyond float16"),
        ("pca16", "a mean is 1e.06, beyond float16"),
        ("turboquant4", "a norm is 8.*e.06, beyond float16"),
    ):
        with pytest.raises(RangeError, match=said):
            entry(name).value(x)

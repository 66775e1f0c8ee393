"""Injected outliers and biases: invisible in float32, and in the cache what they are said to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nsq_ref import Scheme
from nsq_ref.feedback import Moments, second_moment
from nsq_ref.metrics import outlier_ratio
from onnx_export.evaluation.injected import (
    Change,
    KeyBias,
    KeyOutlier,
    as_if_injected,
    bias_for_ratio,
    changed_keys,
    changed_moments,
    factor_for_ratio,
    injected_onnx,
    restored_keys,
)
from onnx_export.models.attention_forms import QuantizedAttention
from onnx_export.models.decoder import Decoder, KeyValueCache, cached_onnx
from onnx_export.models.tiny import tiny_onnx
from tests.support.llama_oracle import IDS, TinyModel

Float = NDArray[np.float32]
Float64 = NDArray[np.float64]
LLAMA = TinyModel(biases=("attn_q", "attn_k"))
QWEN3 = replace(LLAMA, architecture="qwen3", biases=(), weights={})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return cached_onnx(LLAMA.write(folder / "tiny.gguf"), cache_dir=folder)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    return cached_onnx(QWEN3.write(folder / "tiny.gguf"), cache_dir=folder)


def some_changes(kv_heads: st.SearchStrategy[int | None]) -> st.SearchStrategy[list[Change]]:
    layers, sizes = st.integers(0, 1), st.floats(0.1, 20)
    outliers = st.builds(KeyOutlier, layers, st.integers(0, 3), sizes, kv_heads)
    biases = st.builds(KeyBias, layers, st.integers(0, 7), st.floats(-20, 20), kv_heads)
    return st.lists(outliers | biases, min_size=1, max_size=3)


@settings(max_examples=25)
@given(st.booleans(), st.data())
def test_no_logit_shows_what_is_injected_and_the_keys_are_as_told(
    llama: Path, qwen3: Path, tmp_path_factory: pytest.TempPathFactory, norms: bool,
    data: st.DataObject,
) -> None:  # fmt: skip
    of_heads = st.none() if norms else st.none() | st.integers(0, 1)
    changes = data.draw(some_changes(of_heads))
    path, model = (qwen3, QWEN3) if norms else (llama, LLAMA)
    changed = Decoder(injected_onnx(path, tmp_path_factory.mktemp("changed"), changes))

    first, keys, values = changed.forward([IDS[:8]])
    second, keys, values = changed.forward([IDS[8:]], (keys, values))
    logits, true_keys, true_values = model.forward(IDS)

    np.testing.assert_allclose(
        np.concatenate([first[0], second[0]], 0), logits, rtol=2e-3, atol=2e-3
    )
    np.testing.assert_allclose(values[:, 0], true_values, rtol=1e-3, atol=1e-4)
    told = changed_keys(true_keys[:, None].astype(np.float32), changes)
    np.testing.assert_allclose(keys, told, rtol=1e-3, atol=2e-3)


@settings(max_examples=5)
@given(st.data())
def test_moments_are_those_of_the_changed_model_s_queries(
    llama: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changes = data.draw(some_changes(st.none() | st.integers(0, 1)))
    changed = injected_onnx(llama, tmp_path_factory.mktemp("changed"), changes)
    before, found = (Moments(queries_of(path)) for path in (llama, changed))
    told = changed_moments(before, changes)
    for layer, moment in found.layers.items():
        unit = np.sqrt(np.diagonal(moment, axis1=-2, axis2=-1))
        error = (told.layers[layer] - moment) / (unit[:, :, None] * unit[:, None])
        assert np.abs(error).max() < 1e-3


def queries_of(path: Path) -> dict[int, Float64]:
    """Return the moments of a graph's queries, which it has by key/value head."""
    model = onnx.load(path, load_external_data=False)
    for layer in range(2):
        model.graph.output.append(onnx.ValueInfoProto(name=f"blk.{layer}.query"))
    onnx.save(model, path.with_name("queries.onnx"))
    session = onnxruntime.InferenceSession(path.with_name("queries.onnx"))
    past = (one.name for one in session.get_inputs() if one.name.startswith("past"))
    feeds = {name: np.zeros((1, 2, 0, 8), np.float32) for name in past}
    feeds |= {"input_ids": np.array([IDS]), "num_logits": np.array(0)}
    found = session.run([f"blk.{layer}.query" for layer in range(2)], feeds)
    return {
        layer: second_moment(queries.reshape(1, -1, *queries.shape[-2:]), kv_heads=2)
        for layer, queries in enumerate(found)
    }


def test_a_power_of_two_changes_no_bit_of_any_logit(llama: Path, tmp_path: Path) -> None:
    changed = injected_onnx(llama, tmp_path, [KeyOutlier(0, 3, 64.0), KeyOutlier(1, 0, 0.5, 1)])
    logits = [Decoder(path, threads=1).forward([IDS])[0] for path in (llama, changed)]
    np.testing.assert_array_equal(*logits)


def test_outliers_are_done_before_biases_in_whatever_order_they_come(
    llama: Path, tmp_path: Path
) -> None:
    changes: list[Change] = [KeyBias(0, 3, 16.0), KeyOutlier(0, 3, 8.0)]
    _, keys, _ = Decoder(injected_onnx(llama, tmp_path, changes)).forward([IDS])
    _, original, _ = Decoder(llama).forward([IDS])
    np.testing.assert_allclose(keys, changed_keys(original, changes), rtol=1e-4, atol=1e-3)


@given(st.data())
def test_changes_are_undone_in_their_order(data: st.DataObject) -> None:
    changes = data.draw(some_changes(st.none() | st.integers(0, 1)))
    keys = np.random.default_rng(0).standard_normal((2, 1, 2, 5, 8), dtype=np.float32)
    kept = keys.copy()
    restored = restored_keys(changed_keys(keys, changes), changes)
    np.testing.assert_allclose(restored, keys, atol=0.05)
    np.testing.assert_array_equal(keys, kept)


def test_a_transform_in_the_changed_model_is_the_same_as_if_injected(
    llama: Path, tmp_path: Path
) -> None:
    changes: list[Change] = [KeyOutlier(0, 2, 16.0, 1), KeyBias(1, 7, 24.0)]

    def coarse(keys: Float, values: Float) -> KeyValueCache:
        return np.round(keys / 4) * 4, values

    def after(path: Path, changed: list[Change]) -> Float:
        decoder = Decoder(path)
        _, keys, values = decoder.forward([IDS])
        cache = as_if_injected(coarse, changed)(keys, values)
        return decoder.forward([[5, 6]], cache)[0]

    original, exact = after(llama, changes), Decoder(llama).forward([[*IDS, 5, 6]])[0][:, -2:]
    injected = after(injected_onnx(llama, tmp_path, changes), [])
    np.testing.assert_allclose(injected, original, atol=1e-3)
    assert np.abs(injected - exact).max() > 0.05, "the transform must be felt"


@given(st.integers(0, 2**32 - 1), st.integers(0, 31), st.floats(6, 20))
def test_factors_and_constants_give_the_ratio(seed: int, pair: int, ratio: float) -> None:
    x = np.random.default_rng(seed).standard_normal((60, 64), dtype=np.float32)
    largest = [max(abs(float(value)) for value in channel) for channel in x.T]
    assert float(outlier_ratio(x)) == pytest.approx(max(largest) / (sum(largest) / 64))

    scaled, shifted = x.copy(), x.copy()
    scaled[:, [pair, pair + 32]] *= factor_for_ratio(x, pair, ratio)
    shifted[:, pair] += bias_for_ratio(x, pair, ratio)
    for changed in (scaled, shifted):
        assert float(outlier_ratio(changed)) == pytest.approx(ratio, rel=1e-4)


def test_what_cannot_be_reached_or_is_not_there_is_refused(llama: Path, tmp_path: Path) -> None:
    x = np.ones((4, 8), np.float32)
    with pytest.raises(ValueError, match=r"ratio=5 is more than the 4\.0 that pair 1 can reach"):
        factor_for_ratio(x, 1, 5)
    with pytest.raises(ValueError, match="less than head_dim, which is 8"):
        bias_for_ratio(x, 1, 8)
    with pytest.raises(ValueError, match="not more than what the head has"):
        bias_for_ratio(x, 1, 0.5)
    for change, wrong in (
        (KeyOutlier(2, 0, 2.0), r"changes\[0\].layer=2 must be below 2"),
        (KeyOutlier(0, 4, 2.0), r"changes\[0\].pair=4 must be below 4"),
        (KeyBias(0, 8, 2.0), r"changes\[0\].channel=8 must be below 8"),
        (KeyBias(0, 1, 2.0, 2), r"changes\[0\].kv_head=2 must be below 2"),
    ):
        with pytest.raises(ValueError, match=wrong):
            injected_onnx(llama, tmp_path, [change])
    assert not list(tmp_path.iterdir())
    for value in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="factor must be positive"):
            KeyOutlier(0, 0, value)
    with pytest.raises(ValueError, match="value must be finite"):
        KeyBias(0, 0, np.inf)
    with pytest.raises(ValueError, match="that of the model itself"):
        injected_onnx(llama, llama.parent, [])


def test_models_of_other_kinds_are_refused(llama: Path, qwen3: Path, tmp_path: Path) -> None:
    scheme = Scheme.named("streaming4")
    quantized = tiny_onnx(QuantizedAttention(scheme, scheme))
    with pytest.raises(ValueError, match="not from plain attention"):
        injected_onnx(quantized, tmp_path, [KeyBias(0, 0, 1.0)])
    with pytest.raises(ValueError, match="one norm for the keys of all heads; leave kv_head out"):
        injected_onnx(qwen3, tmp_path, [KeyOutlier(0, 0, 2.0, kv_head=1)])
    with pytest.raises(FileNotFoundError, match="build it with cached_onnx"):
        injected_onnx(tmp_path / "none.onnx", tmp_path, [])
    before = [(path.name, path.stat().st_size) for path in sorted(llama.parent.iterdir())]
    injected_onnx(llama, tmp_path / "new", [KeyOutlier(0, 1, 3.0)])
    assert before == [(path.name, path.stat().st_size) for path in sorted(llama.parent.iterdir())]

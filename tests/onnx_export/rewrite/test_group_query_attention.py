"""GroupQueryAttention: the original in onnxruntime is the oracle, whatever was meant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import nsq_ref as nsq
from onnx_export.rewrite import rewrite
from tests.support.exported import Decoder, Graph, Original, Rewritten, gqa_model, save

WINDOW = (("local_window_size", 4),)
SOFTCAP = (("softcap", 2.0),)
SMOOTH = (("smooth_softmax", 1),)
VARIANTS = {
    "packed": Decoder(),
    "separate": Decoder(packed=False),
    "no rotary": Decoder(rotary=0),
    "interleaved": Decoder(interleaved=True),
    "half rotated": Decoder(head_dim=32),
    "half rotated, interleaved": Decoder(head_dim=32, interleaved=True),
    "position_ids": Decoder(position_ids=True),
    "bias": Decoder(bias=True),
    "softcap, bias": Decoder(bias=True, attributes=SOFTCAP),
    "window": Decoder(attributes=WINDOW),
    "window, bias": Decoder(bias=True, attributes=WINDOW),
    "sink": Decoder(sink=True),
    "sink, window, softcap": Decoder(sink=True, attributes=WINDOW + SOFTCAP),
    "smooth": Decoder(attributes=SMOOTH),
    "sink, smooth": Decoder(sink=True, attributes=SMOOTH),
    "scale": Decoder(attributes=(("scale", 0.3),)),
    "no causality": Decoder(attributes=(("causal", 0),)),
    "norms": Decoder(packed=False, qk_norm=True, symbolic=True),
    "size of heads by weights": Decoder(symbolic=True),
    "as many key heads": Decoder(kv_heads=4),
    "half": Decoder(dtype="float16", bias=True, sink=True),
}
FEW = np.array([7, 3, 1])


def tolerance(config: Decoder) -> float:
    return 1e-5 if config.dtype == "float32" else 4e-3


def feeds(
    config: Decoder, rng: np.random.Generator, past: np.ndarray, real: np.ndarray, width: int
) -> dict[str, Any]:
    """Tokens of a step in which rows have ``real`` of ``width`` new tokens, padded on the right."""
    total = past + real
    mask = np.arange(total.max()) < total[:, None]
    given: dict[str, Any] = {
        "input_ids": rng.integers(0, 17, (len(past), width)),
        "attention_mask": mask.astype(np.int64),
    }
    if config.position_ids:  # unlike the places, and unlike from row to row
        offsets = 3 + np.arange(len(past))[:, None]
        given["position_ids"] = past[:, None] + 2 * np.arange(width) + offsets
    if config.bias:
        shape = (len(past), 1, width, mask.shape[1])
        given["bias"] = rng.standard_normal(shape).astype(config.dtype)
    return given


def compare(original: Original, rewritten: Rewritten, config: Decoder, rows: np.ndarray) -> None:
    """A prompt of so many tokens a row, then single ones, and several where it is one row."""
    rng = np.random.default_rng(1)
    past = np.zeros_like(rows)
    steps = [(rows, int(rows.max())), *[(np.ones_like(rows), 1)] * 2]
    if len(rows) == 1:
        steps.append((np.array([5]), 5))
    for real, width in steps:
        given = feeds(config, rng, past, real, width)
        want, got = original.step(given), rewritten.step(given)
        seen = np.arange(width) < real[:, None]
        np.testing.assert_allclose(got[seen], want[seen], rtol=0, atol=tolerance(config))
        past = past + real


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_the_original_ones_while_nothing_is_sealed(name: str, tmp_path: Path) -> None:
    config = VARIANTS[name]
    path = save(gqa_model(config), tmp_path / "model.onnx")
    report = rewrite(path, tmp_path / "out.onnx")
    assert (report.rewritten, report.complete) == (2, True)
    for rows in (np.array([7]), FEW):
        original = Original(path, len(rows), head_dim=config.head_dim)
        rewritten = Rewritten(tmp_path / "out.onnx", len(rows), native=True)
        compare(original, rewritten, config, rows)


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_norms_within_the_node(packed: bool, tmp_path: Path) -> None:
    """Which onnxruntime has on GPUs only: the oracle has them as nodes of their own."""
    config = Decoder(packed=False, qk_norm=True, rotary=16)

    def apart(graph: Graph) -> None:
        for node in graph.nodes:
            epsilon = {"q_out": 0.5, "k_out": 0.25}.get(node.output[0].split(".")[0])
            if epsilon and node.op_type == "SimplifiedLayerNormalization":
                next(one for one in node.attribute if one.name == "epsilon").f = epsilon

    def within(graph: Graph) -> None:
        for index, node in reversed(list(enumerate(graph.nodes))):
            if node.op_type == "GroupQueryAttention":
                given = [one.removesuffix(".merged") for one in node.input[:3]]
                node.input[:3] = given
                node.input.extend(
                    [""] * (14 - len(node.input)) + [f"{one}.gains" for one in given[:2]]
                )
                epsilons = {"q_norm_epsilon": 0.5, "qk_norm_epsilon": 0.25}
                node.attribute.extend(helper.make_attribute(*one) for one in epsilons.items())
                if packed:
                    all_of = f"{given[0]}.packed"
                    graph.nodes.insert(index, helper.make_node("Concat", given, [all_of], axis=-1))
                    node.input[:3] = [all_of, "", ""]

    oracle = Original(save(gqa_model(config, apart), tmp_path / "apart.onnx"))
    path = save(gqa_model(config, within), tmp_path / "within.onnx")
    assert rewrite(path, tmp_path / "out.onnx").complete
    compare(oracle, Rewritten(tmp_path / "out.onnx", native=True), config, np.array([7]))


@st.composite
def configs(draw: st.DrawFn) -> Decoder:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    attributes: dict[str, Any] = {}
    if draw(st.booleans()):
        attributes["softcap"] = draw(st.sampled_from([0.0, 0.5, 30.0]))
    if draw(st.booleans()):
        attributes["scale"] = draw(st.sampled_from([0.0, 0.1, 0.7]))
    if draw(st.booleans()):
        attributes["local_window_size"] = draw(st.sampled_from([-1, 1, 3, 50]))
    if draw(st.booleans()):
        attributes["smooth_softmax"] = draw(st.sampled_from([0, 1]))
    return Decoder(
        layers=draw(st.sampled_from([1, 2])),
        heads=kv_heads * draw(st.sampled_from([1, 2, 4])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 32])),
        packed=draw(st.booleans()),
        rotary=draw(st.sampled_from([0, 16])),
        interleaved=draw(st.booleans()),
        position_ids=draw(st.booleans()),
        bias=draw(st.booleans()),
        sink=draw(st.booleans()),
        attributes=tuple(attributes.items()),
    )


@settings(max_examples=8)
@given(configs(), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_any_options_together(
    tmp_path_factory: pytest.TempPathFactory, config: Decoder, rows: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    path = save(gqa_model(config), folder / "model.onnx")
    rewrite(path, folder / "out.onnx")
    original = Original(path, len(rows), head_dim=config.head_dim)
    compare(
        original, Rewritten(folder / "out.onnx", len(rows), native=True), config, np.array(rows)
    )


def test_without_the_library(tmp_path: Path) -> None:
    config = Decoder(layers=1, position_ids=True, sink=True, attributes=WINDOW + SOFTCAP)
    path = save(gqa_model(config), tmp_path / "model.onnx")
    rewrite(path, tmp_path / "out.onnx")
    compare(Original(path, 3), Rewritten(tmp_path / "out.onnx", 3, native=False), config, FEW)


@pytest.mark.parametrize(
    "config",
    [Decoder(rotary=0), Decoder(rotary=0, sink=True, attributes=(*SOFTCAP, ("scale", 0.2)))],
    ids=["plain", "sink, softcap, scale"],
)
def test_sealed_tokens_are_the_reference_reconstructions(
    config: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original, fed with what `KVCache` makes of its keys and values, token by token."""
    monkeypatch.setenv("NSQ_EXACT", "1")
    config = replace(config, layers=1)
    key = replace(nsq.Scheme.named("streaming4"), block_size=16)
    value = replace(nsq.Scheme.named("streaming3"), block_size=8, sink_tokens=2)
    path = save(gqa_model(config), tmp_path / "model.onnx")
    rewrite(path, tmp_path / "out.onnx", key=key, value=value)
    plain, original = Original(path), Original(path)
    rewritten = Rewritten(tmp_path / "out.onnx", native=True)
    shape = {"batch": 1, "kv_heads": config.kv_heads, "head_dim": config.head_dim}
    reference = nsq.KVCache(**shape, key=key, value=value)
    rng, lossy = np.random.default_rng(2), 0.0
    for token in range(70):
        given = feeds(config, rng, np.array([token]), np.array([1]), 1)
        want, got, exact = original.step(given), rewritten.step(given), plain.step(given)
        names = [f"past_key_values.0.{side}" for side in ("key", "value")]
        reference.append(*(original.cache[name][:, :, -1:] for name in names))
        original.cache = dict(zip(names, reference.dequantize(), strict=True))
        # The original attends to the new token before its block is coded, nsq.Attention after.
        seals = (token + 1 - 1) % 16 == 0 or (token + 1 - 2) % 8 == 0
        if not seals:
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
            lossy = max(lossy, float(abs(exact - want).max()))
    assert lossy > 1e-2  # or the reconstructions had no part in it


def test_rows_that_grow_apart_have_their_lengths_as_inputs(tmp_path: Path) -> None:
    """Each row alone in the original, and all together with lengths of their own."""
    config = Decoder()
    path = save(gqa_model(config), tmp_path / "model.onnx")
    report = rewrite(path, tmp_path / "out.onnx", row_lengths=True)
    assert report.inputs == ("past_lengths", "new_lengths")
    rewritten = Rewritten(tmp_path / "out.onnx", 3, native=True)
    assert not rewritten.layout.right_padding
    rows = [Original(path) for _ in FEW]
    rng, past = np.random.default_rng(3), np.zeros(3, np.int64)
    for counts in ([7, 3, 1], [2, 4, 1], [1, 1, 3]):
        real = np.array(counts)
        given = feeds(config, rng, past, real, int(real.max()))
        given |= {"past_lengths": past, "new_lengths": real}
        rewritten.lengths = past
        got = rewritten.step(given)
        for row, (original, count) in enumerate(zip(rows, counts, strict=True)):
            ids = given["input_ids"][row : row + 1, :count]
            ones = np.ones((1, past[row] + count), np.int64)
            want = original.step({"input_ids": ids, "attention_mask": ones})
            np.testing.assert_allclose(got[row, :count], want[0], rtol=0, atol=1e-5)
        past = past + real


def test_a_window_that_evicts_becomes_one_that_hides(tmp_path: Path) -> None:
    config = Decoder(attributes=(*WINDOW, ("sliding_window_cache", 1)))
    path = save(gqa_model(config), tmp_path / "model.onnx")
    rewrite(path, tmp_path / "out.onnx")
    rewritten = Rewritten(tmp_path / "out.onnx", native=True)
    compare(Original(path, past=6), rewritten, config, np.array([9]))


def test_metadata_says_where_rows_are_padded(tmp_path: Path) -> None:
    path = save(gqa_model(Decoder()), tmp_path / "model.onnx")
    rewrite(path, tmp_path / "out.onnx")
    layout = Rewritten(tmp_path / "out.onnx", native=True).layout
    assert layout.right_padding
    assert layout.context_length == Decoder().positions
    assert set(layout.roles) == {"input_ids", "attention_mask", "logits"}

"""Feedback of keys in a rewritten model: its cache is that of `nsq_ref.KVCache`, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

import nsq_ref as nsq
from nsq_ref.files import save_feedback
from onnx_export.operators.cache_buffers import read_buffers
from onnx_export.operators.cache_layout import CacheLayout
from onnx_export.operators.schema import ATTENTION
from onnx_export.rewrite import rewrite
from onnx_export.running import Session
from tests.support.command import refused, said
from tests.support.exported import Decoder, gqa_model, save
from tests.support.exports import EXPORTS, Quantized, Text

KEY = replace(nsq.Scheme.named("streaming3"), block_size=8)
VALUE = replace(nsq.Scheme.named("streaming4"), block_size=4)
STEPS = (13, 1, 1, 6, 1)
TOKENS = sum(STEPS)


def feedback_of(kv_heads: int, head_dim: int, seed: int) -> nsq.Feedback:
    """Return what some random queries give whose channels have much in common."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((kv_heads, head_dim, head_dim))
    queries = rng.standard_normal((kv_heads, 9, head_dim)) @ mixing
    return nsq.Feedback.from_queries(queries, kv_heads)


def given_to(path: Path, name: str) -> list[str]:
    """Return what the attentions of a model read as an input."""
    nodes = [one for one in onnx.load(path).graph.node if one.op_type == "Attention"]
    return [one.input[ATTENTION.inputs.index(name)] for one in nodes]


def with_outputs(path: Path, names: list[str]) -> Path:
    """Make values within a model outputs."""
    model = onnx.load(path)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    onnx.save(model, path)
    return path


def heads_of(given: npt.NDArray[Any], kv_heads: int) -> npt.NDArray[Any]:
    batch, tokens, _ = given.shape
    return given.reshape(batch, tokens, kv_heads, -1).swapaxes(1, 2)


def require_stored(ours: Quantized, layer: int, row: int, reference: nsq.KVCache) -> None:
    """Hold every byte of a layer that is sealed against the reference."""
    stored = reference.stored(row)
    for side in ("keys", "values"):
        arrays = getattr(stored, side).arrays
        assert arrays["packed"].shape[1] >= 16
        for one in ours.layout.tensors:
            part = (one.part or "").removeprefix(f"{side[:-1]}_")
            if one.layer == layer and part in arrays:
                made = ours.cache[one.past][row][:, : arrays[part].shape[1]]
                assert made.tobytes() == arrays[part].tobytes(), (one.past, part)


@pytest.mark.parametrize(
    ("name", "opset", "native"),
    [
        ("dynamo-llama-23-sdpa", None, True),
        ("dynamo-llama-23-sdpa", None, False),
        ("optimum-qwen3-18", None, True),
        ("optimum-qwen3-18", 24, False),  # the other body
    ],
)
def test_the_cache_is_that_of_the_reference(
    name: str, opset: int | None, native: bool, tmp_path: Path
) -> None:
    """Of every layer, whose keys are rotated before they come to the attention."""
    out = tmp_path / "out.onnx"
    sizes = [
        (one.shape[1], one.shape[3])
        for one in Quantized(_plain(name, tmp_path), 1, native=True).layout.tensors
        if one.part == "key_tail"
    ]
    feedback = {str(i): feedback_of(*one, i) for i, one in enumerate(sizes)}  # type: ignore[arg-type]
    source = EXPORTS / f"{name}.onnx"
    report = rewrite(source, out, key=KEY, value=VALUE, feedback=feedback, opset=opset)
    digests = [one.digest for one in feedback.values()]
    assert [one.key_feedback for one in report.attentions] == digests
    inputs = [name for side in ("key", "value") for name in given_to(out, side)]
    ours = Quantized(with_outputs(out, inputs), 2, native=native)
    assert list(ours.layout.key_feedback) == digests

    references = [
        nsq.KVCache(
            batch=2, kv_heads=kv_heads, head_dim=head_dim, key=KEY, value=VALUE,
            key_feedback=feedback[str(layer)],
        )
        for layer, (kv_heads, head_dim) in enumerate(sizes)
    ]  # fmt: skip
    text = Text([0, 0])
    presents = {one.past: one.present for one in ours.layout.tensors}
    for new in STEPS:
        feeds = text.step(new)
        feeds = {name: feeds[name] for name in ours.given if name in feeds} | ours.cache
        found = ours.session.run([*presents.values(), *inputs], feeds)
        ours.cache = dict(zip(presents, found, strict=False))
        made = dict(zip(inputs, found[len(presents) :], strict=True))
        for layer, cache in enumerate(references):
            sides = (made[inputs[layer + side * len(references)]] for side in (0, 1))
            cache.append(*(heads_of(one, cache.kv_heads) for one in sides))
    for layer, cache in enumerate(references):
        for row in (0, 1):
            require_stored(ours, layer, row, cache)


def _plain(name: str, folder: Path) -> Path:
    rewrite(EXPORTS / f"{name}.onnx", folder / "plain.onnx", key=KEY, value=VALUE)
    return folder / "plain.onnx"


def test_a_session_runs_it_unchanged(tmp_path: Path) -> None:
    """GroupQueryAttention, which rotates keys by itself; those of the first layer are in a tail."""
    path = save(gqa_model(Decoder()), tmp_path / "model.onnx")
    feedback = {0: feedback_of(2, 16, 0), 1: feedback_of(1, 16, 1)}
    rewrite(path, tmp_path / "out.onnx", key=KEY, value=VALUE, feedback=feedback)
    rewrite(path, tmp_path / "plain.onnx", key=KEY, value=VALUE)
    rewrite(path, tmp_path / "tail.onnx", key="streaming4", value="streaming4")
    rewrite(
        path, tmp_path / "buffers.onnx", key=KEY, value=VALUE, feedback=feedback, cache="buffers",
        context_length=64,
    )  # fmt: skip
    sessions = {
        name: Session(tmp_path / f"{name}.onnx", capacity=64, threads=1)
        for name in ("out", "plain", "tail", "buffers")
    }
    ids = np.random.default_rng(3).integers(0, 17, TOKENS)
    for one in sessions.values():
        one.forward(ids[:13])
        one.forward(ids[13:])
    tail = sessions["tail"].tensors()
    sinks = nsq.Scheme.named("streaming4").sink_tokens
    keys, values = (
        np.concatenate(
            [
                tail[f"past_key_values.0.{side}.{part}"][:, :, :length]
                for part, length in (("sinks", sinks), ("tail", TOKENS - sinks))
            ],
            axis=2,
        )
        for side in ("key", "value")
    )
    reference = nsq.KVCache(
        batch=1, kv_heads=2, head_dim=16, key=KEY, value=VALUE, key_feedback=feedback[0]
    )
    reference.append(keys, values)
    stored = reference.stored(0).keys.arrays["packed"]
    made, plain = (
        sessions[name].tensors()["past_key_values.0.key.packed"][0, :, : stored.shape[1]]
        for name in ("out", "plain")
    )
    assert made.tobytes() == stored.tobytes()
    assert (made != plain).any()
    buffer = sessions["buffers"].tensors()["past_key_values.0.key"]
    parts = read_buffers(buffer, KEY, head_dim=16)[1]
    assert parts["packed"][0, :, : stored.shape[1]].tobytes() == stored.tobytes()
    session = sessions["out"]
    session.crop(20)
    assert session.generate([3], 5)[0].tokens.shape == (5,)
    session.save(tmp_path / "state")
    sessions["plain"].crop(0)
    with pytest.raises(ValueError, match="is a state of another model"):
        sessions["plain"].restore(tmp_path / "state")


def test_what_it_writes(tmp_path: Path) -> None:
    """Initializers of the layers that have some, and their digests; a policy goes before."""
    path, out = save(gqa_model(Decoder(layers=4)), tmp_path / "model.onnx"), tmp_path / "out.onnx"
    feedback = {str(i): feedback_of(2, 16, i) for i in (0, 1, 3)}
    policy = {"layers": {"0": None}}
    report = rewrite(path, out, policy=policy, feedback=feedback)
    digests = [None, feedback["1"].digest, None, feedback["3"].digest]
    assert [one.key_feedback for one in report.attentions] == digests
    assert [one["key_feedback"] for one in report.to_dict()["attentions"]] == digests
    model = onnx.load(out)
    told = {one.key: one.value for one in model.metadata_props}
    layout = CacheLayout.from_metadata(told)
    assert list(layout.key_feedback) == digests
    assert CacheLayout.from_metadata(layout.to_metadata()) == layout
    written = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    for part in ("order", "factor"):
        names = given_to(out, f"key_{part}")
        assert [bool(name) for name in names] == [True, False, True]
        for layer, name in (("1", names[0]), ("3", names[2])):
            expected = getattr(feedback[layer], part)
            assert written[name].dtype == expected.dtype
            np.testing.assert_array_equal(written[name], expected)
    rewrite(path, tmp_path / "without.onnx", policy=policy)
    metadata = onnx.load(tmp_path / "without.onnx").metadata_props
    assert not any("key_feedback" in one.value for one in metadata)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"2": (2, 16)}, "feedback: there is no layer 2; the model has layers 0 to 1"),
        ({"0": (2, 16), "1": (4, 16)}, "feedback: layer 1 is of 4 key/value heads of 16 channels"),
        ({"1": (2, 8)}, "and the model's of 2 of 16; calibrate this model"),
        ({"last": (2, 16)}, "feedback: 'last' is no number of a layer"),
        ({"1": (2, 16), "01": (2, 16)}, "feedback: layer 1 is named twice"),
    ],
)
def test_what_does_not_fit(
    layers: dict[str, tuple[int, int]], message: str, tmp_path: Path
) -> None:
    save(gqa_model(Decoder()), tmp_path / "model.onnx")
    feedback = {name: feedback_of(*size, 0) for name, size in layers.items()}
    with pytest.raises(ValueError, match="feedback") as raised:
        rewrite(tmp_path / "model.onnx", tmp_path / "out.onnx", feedback=feedback)
    assert message in str(raised.value)
    assert not (tmp_path / "out.onnx").exists()


def test_layers_that_are_refused_are_told_all_the_same(tmp_path: Path) -> None:
    """Feedback names them, and nobody knows their numbers."""
    model = gqa_model(Decoder())
    nodes = [one for one in model.graph.node if one.op_type == "GroupQueryAttention"]
    feedback = {str(i): feedback_of(2, 16, i) for i in (0, 1)}
    for refused_nodes, rewritten in ((nodes[1:], 1), (nodes[:1], 0)):
        refused_nodes[0].attribute.append(onnx.helper.make_attribute("new_to_us", 1))
        path = save(model, tmp_path / "model.onnx")
        report = rewrite(path, tmp_path / "out.onnx", feedback=feedback, dry_run=True)
        assert (report.rewritten, report.complete) == (rewritten, False)
        assert report.attentions[1].reason == "attribute new_to_us is unknown"


def test_a_profile_that_is_made_for_feedback(tmp_path: Path) -> None:
    """Refused without, of every layer that has its name; with it as the schemes themselves."""
    path, out = save(gqa_model(Decoder()), tmp_path / "model.onnx"), tmp_path / "out.onnx"
    feedback = {str(i): feedback_of(2, 16, i) for i in (0, 1)}
    some = {"1": feedback["1"]}
    for policy, given in (
        ({"default": "best-3"}, None),
        ({"default": "best-3"}, some),
        ({"layers": {"0": "best-3"}}, some),
        ({"layers": {"0": "best-3/streaming4"}}, None),
    ):
        with pytest.raises(ValueError, match=r"^layer 0: best-3 is made for feedback of the keys"):
            rewrite(path, out, policy=policy, feedback=given)
    assert not out.exists()
    report = rewrite(path, out, policy={"default": "best-3"}, feedback=feedback)
    assert {one.schemes for one in report.attentions} == {nsq.Scheme.named("best-3")}
    report = rewrite(path, out, policy={"default": "best-3", "layers": {"0": None}}, feedback=some)
    assert [one.schemes is None for one in report.attentions] == [True, False]
    for policy in ({"default": "small-3"}, {"layers": {"0": "streaming4/best-3"}}):
        assert rewrite(path, out, policy=policy).rewritten == 2


def test_other_types(tmp_path: Path) -> None:
    path = save(gqa_model(Decoder()), tmp_path / "model.onnx")
    for feedback, error, message in (
        ({}, ValueError, "feedback is empty"),
        ({"0": 3}, TypeError, "feedback: layer 0 must be a Feedback, got int"),
        (feedback_of(2, 16, 0), TypeError, "feedback must be a mapping from layer to Feedback"),
    ):
        with pytest.raises(error, match=message):
            rewrite(path, tmp_path / "out.onnx", feedback=feedback)  # type: ignore[arg-type]


def test_the_command(tmp_path: Path) -> None:
    save(gqa_model(Decoder()), tmp_path / "model.onnx")
    save_feedback(tmp_path / "some.safetensors", {"1": feedback_of(2, 16, 1)})
    save_feedback(tmp_path / "other.safetensors", {"7": feedback_of(2, 16, 1)})
    command = ("onnx", "rewrite", "model.onnx", "out.onnx", "--feedback")
    text = said(*command, "some.safetensors", cwd=tmp_path)
    assert [line.endswith("keys with feedback") for line in text.splitlines()[1:3]] == [False, True]
    assert (tmp_path / "out.onnx").exists()
    best = ("onnx", "rewrite", "model.onnx", "best.onnx", "--scheme", "best-3")
    line = refused(*best, cwd=tmp_path)
    assert "layer 0: best-3 is made for feedback" in line
    assert "nsq onnx calibrate MODEL --text TEXT -o FILE" in line
    assert "take small-3" in line
    assert "layer 0: best-3 is made" in refused(
        *best, "--feedback", "some.safetensors", cwd=tmp_path
    )
    save_feedback(tmp_path / "all.safetensors", {str(i): feedback_of(2, 16, i) for i in (0, 1)})
    assert "rewritten: 2 of 2" in said(*best, "--feedback", "all.safetensors", cwd=tmp_path)
    said(*best, "--force", "--key", "streaming3", cwd=tmp_path)  # values alone by it
    for name, message in (
        ("other.safetensors", "feedback: there is no layer 7"),
        ("none.safetensors", "none.safetensors: No such file"),
        ("model.onnx", "model.onnx"),
    ):
        line = refused(*command, name, "--force", cwd=tmp_path)
        assert message in line

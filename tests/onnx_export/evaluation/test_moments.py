"""Moments of queries: loops over what a model attends with say so, and a command writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest

import nsq_ref as nsq
from nsq_ref.audit import Layer
from nsq_ref.files import load_feedback
from onnx_export.evaluation.captured import captured
from onnx_export.evaluation.moments import DEFAULT_TEXTS, TOKENS, ReadText, query_moments
from onnx_export.models.decoder import Decoder
from onnx_export.models.texts import REPORTING_START, read_address
from onnx_export.models.tiny import tiny_gguf
from onnx_export.models.tokenizer import Tokenizer
from onnx_export.rewrite import rewrite
from onnx_export.running import Session
from tests.onnx_export.evaluation.test_captured import TEXT, export
from tests.support.command import refused, said
from tests.support.exported import Decoder as Exported
from tests.support.exported import gqa_model

OTHER = "NOT ALL THAT IS COUNTED COUNTS"


def by_loops(one: Layer) -> npt.NDArray[np.float64]:
    """Sum q q^T, query after query."""
    assert one.queries is not None
    kv_heads, head_dim = one.keys.shape[1], one.keys.shape[3]
    group = one.queries.shape[1] // kv_heads
    moment = np.zeros((kv_heads, head_dim, head_dim))
    for head, queries in enumerate(one.queries[0].astype(np.float64)):
        for q in queries:
            moment[head // group] += np.outer(q, q)
    return moment


@pytest.mark.parametrize(
    "name", ["dynamo-qwen3-23-sdpa", "genai-llama-cpu-fp32", "optimum-gemma2-18", None]
)
def test_texts_add_up(name: str | None, tmp_path: Path) -> None:
    """And layers have the numbers that a rewrite gives them; None is a GGUF file."""
    path = tiny_gguf(tmp_path) if name is None else export(name, tmp_path)
    found = query_moments(path, [TEXT, OTHER], tokens=32)
    parts = [captured(path, text, tokens=32).layers for text in (TEXT, OTHER)]
    assert found.texts == (ReadText(32, len(TEXT)), ReadText(len(OTHER), len(OTHER)))
    for one, other in zip(*parts, strict=True):
        moment = found.layers[one.number]
        np.testing.assert_allclose(moment, by_loops(one) + by_loops(other), rtol=1e-9, atol=1e-9)
    made = found.feedback(0.5)
    for number, moment in found.layers.items():
        assert made[str(number)].digest == nsq.Feedback.from_moment(moment, 0.5).digest
    assert found.feedback()["0"].digest == nsq.Feedback.from_moment(found.layers[0]).digest
    if name is not None:
        report = rewrite(path, tmp_path / "out.onnx", feedback=made, dry_run=True)
        assert [one.key_feedback for one in report.attentions] == [x.digest for x in made.values()]


def test_by_default_what_is_never_reported_of_is_read(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path)
    assert TOKENS <= REPORTING_START
    found = query_moments(path, tokens=40)
    encode = Tokenizer(path).encode
    assert found.texts == tuple(
        ReadText(40, len(encode(read_address(name)))) for name in DEFAULT_TEXTS
    )


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match="layer") as raised:
        query_moments(path, [TEXT])
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_layer_that_is_not_understood_is_named(tmp_path: Path) -> None:
    message = refusal(export("genai-qwen3-webgpu-int4", tmp_path))
    assert "model.onnx: layer 0, attention '" in message
    assert "': queries are normalized, or get a bias, within the attention" in message

    path = export("mobius-llama-cpu", tmp_path)
    model = onnx.load(path)
    last = [one for one in model.graph.node if one.op_type == "GroupQueryAttention"][-1]
    last.attribute.append(onnx.helper.make_attribute("new_to_us", 1))
    onnx.save(model, path)
    message = refusal(path)
    assert f"layer 1, attention {last.name!r} is not understood: " in message


def test_what_has_no_queries(tmp_path: Path) -> None:
    onnx.save(gqa_model(Exported()), tmp_path / "float.onnx")
    rewrite(tmp_path / "float.onnx", tmp_path / "model.onnx")
    words = tiny_gguf(tmp_path)
    with pytest.raises(ValueError, match="give the model that it was rewritten from"):
        query_moments(tmp_path / "model.onnx", [TEXT], tokenizer=words)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text("{}")
    with pytest.raises(ValueError, match="a model of transformers gives no queries out; export it"):
        query_moments(tmp_path / "folder", [TEXT], tokenizer=words)
    for texts, error, message in (
        (TEXT, TypeError, r"give \[text\]"),
        ([], ValueError, "texts is empty"),
        (["short"], ValueError, "has 5 tokens; give one of at least 16"),
    ):
        with pytest.raises(error, match=message):
            query_moments(words, texts)


def test_from_a_text_to_a_cache(tmp_path: Path) -> None:
    """Calibrate, build and run, by commands; then the first layer's bytes beside the reference."""
    gguf = tiny_gguf(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(OTHER)
    command = ("onnx", "calibrate", gguf, "--text", "a.txt", "--text", "b.txt", "-o")
    told = said(*command, "some.safetensors", cwd=tmp_path)
    assert told.splitlines() == [
        f"2 layers, from the queries of {len(TEXT + OTHER)} tokens", "some.safetensors",
    ]  # fmt: skip
    feedback = load_feedback(tmp_path / "some.safetensors")
    expected = query_moments(gguf, [TEXT, OTHER]).feedback()
    assert {n: x.digest for n, x in feedback.items()} == {n: x.digest for n, x in expected.items()}
    options = ("--damping", 1, "--tokens", 20, "--json")
    other = json.loads(said(*command, "other.safetensors", *options, cwd=tmp_path))
    assert [one["tokens"] for one in other["texts"]] == [20, 20]
    assert other["layers"]["0"]["digest"] != feedback["0"].digest

    build = ("onnx", "build", gguf, "model", "--set", "block_size=16")
    said(*build, "--feedback", "some.safetensors", cwd=tmp_path)
    session = Session(tmp_path / "model/model.onnx", threads=1)
    assert session.model.layout.key_feedback == tuple(x.digest for x in feedback.values())
    ids = np.random.default_rng(0).integers(0, 256, 100)
    session.forward(ids)
    scheme = session.model.layout.schemes[0]
    assert scheme is not None
    reference = nsq.KVCache(
        batch=1, kv_heads=2, head_dim=8, key=scheme.key, value=scheme.value,
        key_feedback=feedback["0"],
    )  # fmt: skip
    said("onnx", "build", gguf, "plain", cwd=tmp_path)  # of one block, all in the tail
    plain = Session(tmp_path / "plain/model.onnx", threads=1)
    plain.forward(ids)
    tensors = plain.tensors()
    sides = [
        np.concatenate(
            [tensors[f"past_key_values.0.{side}.{part}"] for part in ("sinks", "tail")], axis=2
        )[:, :, :100]
        for side in ("key", "value")
    ]
    assert sides[0].any(axis=(1, 3)).all()
    reference.append(*sides)
    for side, stored in zip(("key", "value"), reference.stored(0), strict=False):
        packed = stored.arrays["packed"]
        made = session.tensors()[f"past_key_values.0.{side}.packed"][0, :, : packed.shape[1]]
        assert packed.shape[1] == 96
        assert made.tobytes() == packed.tobytes()


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    gguf = tiny_gguf(tmp_path)
    (tmp_path / "there.safetensors").write_text("")
    (tmp_path / "empty.txt").write_text("\n")
    for arguments, message in (
        (("-o", "there.safetensors"), "there.safetensors exists; choose another name"),
        (("-o", "new", "--text", "empty.txt"), "empty.txt is empty"),
        (("-o", "new", "--text", "none.txt"), "none.txt: No such file"),
        (("-o", "-"), "- is no file name"),
    ):
        assert message in refused("onnx", "calibrate", gguf, *arguments, cwd=tmp_path)
    assert not (tmp_path / "new").exists()
    command = ("onnx", "build", gguf, "folder", "--attention", "plain", "--feedback", "none")
    assert "--feedback is of --attention nsq" in refused(*command, cwd=tmp_path)


def test_feedback_of_another_model_is_not_built_in(tmp_path: Path) -> None:
    gguf = tiny_gguf(tmp_path)
    wrong = nsq.Feedback.from_queries(np.eye(16)[None], kv_heads=1)
    nsq.files.save_feedback(tmp_path / "wrong.safetensors", {"1": wrong})
    command = ("onnx", "build", gguf, "folder", "--feedback", "wrong.safetensors")
    line = refused(*command, cwd=tmp_path)
    assert "layer 1 is of 1 key/value heads of 16 channels, and the model's of 2 of 8" in line
    assert not (tmp_path / "folder/model.onnx").exists()
    some = nsq.Feedback.from_queries(np.eye(8)[None], kv_heads=1)
    nsq.files.save_feedback(tmp_path / "some.safetensors", {"1": some})
    best = ("onnx", "build", gguf, "folder", "--scheme", "best-3")
    assert "best-3 is made for feedback of the keys" in refused(*best, cwd=tmp_path)
    line = refused(*best, "--feedback", "some.safetensors", cwd=tmp_path)
    assert "layer 0: best-3 is made for feedback of the keys" in line
    nsq.files.save_feedback(tmp_path / "all.safetensors", {"0": some, "1": some})
    said(*best, "--feedback", "all.safetensors", cwd=tmp_path)
    assert Decoder.from_gguf(gguf).config.head_dim == 8

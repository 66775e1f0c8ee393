"""``nsq onnx build`` and ``nsq onnx run``: what they print, and what they refuse in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnx_export.models.json_tokenizer import JsonTokenizer, read_tokenizer
from onnx_export.models.tiny import tiny_gguf
from onnx_export.models.tokenizer import Tokenizer
from onnx_export.running import Sampling, Session
from onnx_export.running.text import pieces
from tests.support.command import nsq, refused, said


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def model(gguf: Path) -> Path:
    folder = gguf.with_name("quantized")
    return Path(said("onnx", "build", gguf, folder, "--value-scheme", "streaming3").strip())


def test_a_model_is_built_as_asked(gguf: Path, model: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in model.parent.iterdir()) == [
        "SHA256SUMS", "generation_config.json", "model.onnx", "tokenizer.json", "weights.bin",
    ]  # fmt: skip
    pair = Session(model).model.layout.schemes[0]
    assert pair is not None
    assert (pair.key.bits, pair.value.bits, pair.key.block_size) == (4, 3, 128)
    said("onnx", "build", gguf, tmp_path, "--attention", "plain")
    assert Session(tmp_path / "model.onnx").model.layout.schemes == (None, None)
    assert "exists; choose another folder" in refused("onnx", "build", gguf, tmp_path, cwd=tmp_path)
    said("onnx", "build", gguf, tmp_path, "--set", "block_size=32", "--force")
    assert Session(tmp_path / "model.onnx").model.layout.capacity_multiple == 32


def test_text_and_figures(gguf: Path, model: Path) -> None:
    """The text is that of a session, the figures are beside it."""
    done = nsq("onnx", "run", model, "on the", "--tokens", 9)
    tokenizer = read_tokenizer(gguf)
    ids = tokenizer.encode("on the")
    (text,) = Session(model).generate(ids, 9, stop_tokens=tokenizer.stop_tokens)
    assert done.stdout == tokenizer.decode([*ids, *text.tokens]) + "\n"
    assert done.stderr.startswith(f"{len(ids)} tokens read in ")
    assert " tokens a second; cache " in done.stderr
    assert done.stderr.endswith("% of float16\n")


def test_options_are_those_of_sampling(gguf: Path, model: Path) -> None:
    options = ("--temperature", 1.3, "--top-k", 30, "--top-p", 0.9, "--seed", 5)
    done = nsq(
        "onnx", "run", model, "on the", "--tokens", 20, *options, "--capacity", 9,
        "--threads", 1, "--tokenizer", gguf, "--no-library",
    )  # fmt: skip
    tokenizer = read_tokenizer(gguf)
    ids = tokenizer.encode("on the")
    session = Session(model, threads=1)
    sampling = Sampling(1.3, 30, 0.9, 5)
    (text,) = session.generate(ids, 20, stop_tokens=tokenizer.stop_tokens, sampling=sampling)
    assert done.stdout == tokenizer.decode([*ids, *text.tokens]) + "\n"


def test_bad_use_is_one_line(gguf: Path, model: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        return refused("onnx", "run", *arguments, cwd=tmp_path)

    def build(*arguments: object) -> str:
        return refused("onnx", "build", *arguments, cwd=tmp_path)

    lone = tmp_path / "model.onnx"
    lone.write_bytes(b"nothing")
    assert "there is no ONNX model" in run(tmp_path / "missing.onnx", "on")
    assert "give one with --tokenizer" in run(lone, "on")
    assert "INVALID_PROTOBUF" in run(lone, "on", "--tokenizer", gguf)
    assert "is no tokenizer.json" in run(model, "on", "--tokenizer", lone)
    assert "the prompt is empty" in run(model, "")
    assert "top_p has no effect at temperature 0" in run(model, "on", "--top-p", 0.5)
    assert "temperature=-1.0" in run(model, "on", "--temperature", -1)
    assert "the model's context is 512" in run(model, "on " * 600)
    assert "is of --attention nsq; leave it out" in build(
        gguf, tmp_path / "out", "--attention", "plain", "--scheme", "streaming4"
    )
    assert "a cache needs blocks" in build(gguf, tmp_path / "out", "--scheme", "pchan4")
    assert "not a multiple of 16" in build(gguf, tmp_path / "out", "--attention", "gqa")
    assert "unknown scheme name" in build(gguf, tmp_path / "out", "--scheme", "fine")
    assert not (tmp_path / "out").exists()


def test_both_tokenizers_are_one(gguf: Path, model: Path) -> None:
    one, other = Tokenizer(gguf), JsonTokenizer(model.with_name("tokenizer.json"))
    for text in ("on the 4th", "<|endoftext|> the", "é\n\n  x", ""):
        assert (one.encode(text) == other.encode(text)).all()
    assert other.stop_tokens == read_tokenizer(gguf).stop_tokens == (0,)
    assert other.decode([259, 0]) == read_tokenizer(gguf).decode([259, 0]) == " the"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", {"eos_token_id": [5, 7]}, (5, 7)),
        ("genai_config.json", {"model": {"eos_token_id": 3}}, (3,)),
        ("genai_config.json", {"search": {}}, ()),
        ("config.json", {"eos_token_id": None}, ()),
        ("generation_config.json", [], ()),
    ],
)
def test_stop_tokens_are_where_exporters_put_them(
    model: Path, tmp_path: Path, name: str, content: object, expected: tuple[int, ...]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(model.with_name("tokenizer.json").read_bytes())
    (tmp_path / name).write_text(json.dumps(content))
    assert JsonTokenizer(tmp_path / "tokenizer.json").stop_tokens == expected
    (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name} is no JSON"):
        JsonTokenizer(tmp_path / "tokenizer.json")


def test_characters_of_several_tokens() -> None:
    """Joined, pieces are the text; none has half a character."""

    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    for text in ("né à côté", "日本語", "", "🙂🙂"):
        found = list(pieces(text.encode(), decode))
        assert "".join(found) == text
        assert not any("\ufffd" in piece for piece in found)
    cut = "ab🙂".encode()[:-1]
    assert "".join(pieces(cut, decode)) == cut.decode(errors="replace")

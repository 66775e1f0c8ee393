"""``nsq onnx build`` and ``nsq onnx run``: what they print, and what they refuse in one line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_export.models.attention_forms import GroupedAttention
from onnx_export.models.built import build_onnx
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.json_tokenizer import JsonTokenizer, read_tokenizer
from onnx_export.models.tiny import tiny_gguf
from onnx_export.models.tokenizer import Tokenizer
from onnx_export.running import Sampling, Session
from onnx_export.running.text import pieces
from tests.support.chat import chat_gguf
from tests.support.command import NSQ, nsq, refused, said


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


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    said("onnx", "build", chat_gguf(folder), folder, "--attention", "gqa", "--weights", "float32")
    return folder


SAMPLED = ("--temperature", 1.5, "--seed", 3)


def answer(folder: Path, tokens: int, *messages: tuple[str, str]) -> str:
    words = read_tokenizer(folder / "tokenizer.json")
    ids = words.encode_chat([{"role": role, "content": text} for role, text in messages])
    session = Session(folder / "model.onnx")
    sampling = Sampling(1.5, seed=3)
    made = session.stream(ids, tokens, stop_tokens=words.stop_tokens, sampling=sampling)
    return words.decode(list(made))


def test_a_chat_model_answers(chatting: Path) -> None:
    """As its template says, unless a text is to be continued; a folder is enough."""
    done = nsq("onnx", "run", chatting, "on", "--tokens", 9, *SAMPLED)
    assert done.stdout == answer(chatting, 9, ("user", "on")) + "\n"
    done = nsq("onnx", "run", chatting, "-", "--tokens", 9, *SAMPLED, "--system", "be",
               stdin=b"on\n")  # fmt: skip
    assert done.stdout == answer(chatting, 9, ("system", "be"), ("user", "on")) + "\n"
    plain = nsq("onnx", "run", chatting, "on", "--no-chat", "--tokens", 5)
    words = read_tokenizer(chatting / "tokenizer.json")
    ids = words.encode("on")
    (text,) = Session(chatting / "model.onnx").generate(ids, 5, stop_tokens=words.stop_tokens)
    assert plain.stdout == words.decode([*ids, *text.tokens]) + "\n"


def test_a_conversation(chatting: Path) -> None:
    done = nsq("onnx", "chat", chatting, "--tokens", 6, *SAMPLED, stdin=b"on\n\nthe\n")
    first = answer(chatting, 6, ("user", "on"))
    second = answer(chatting, 6, ("user", "on"), ("assistant", first), ("user", "the"))
    assert done.stdout == f"{first}\n{second}\n"
    assert done.stderr.count(" tokens read in ") == 2


def test_the_end_of_the_room_keeps_the_text(chatting: Path) -> None:
    options = ("--tokens", 100, "--capacity", 50, "--temperature", 9, "--seed", 7)
    done = nsq("onnx", "run", chatting, "on", *options)
    assert "; ended, as there is room for 50 tokens and no more; cache" in done.stderr
    assert len(done.stdout) > 5
    done = nsq("onnx", "chat", chatting, *options, stdin=b"on\nthe\n")
    assert "; ended, as there is room for 50 tokens and no more; cache" in done.stderr
    assert done.stderr.count("cache") == 1


def test_an_interruption_keeps_the_text(chatting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Session.stream

    def interrupted(*arguments: Any, **options: Any) -> Iterator[int]:
        for count, token in enumerate(stream(*arguments, **options)):
            if count == 3:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(Session, "stream", interrupted)
    done = nsq("onnx", "run", chatting, "on", "--tokens", 9, *SAMPLED, code=130)
    monkeypatch.undo()
    wanted = answer(chatting, 3, ("user", "on")).rstrip("\ufffd")  # half a character is held back
    assert done.stdout == wanted + "\n"
    assert done.stderr.count("\n") == 1
    assert " tokens a second; cache " in done.stderr


def test_who_reads_may_leave(chatting: Path) -> None:
    """A closed pipe and a closed stdout end the command without a traceback."""
    command = [str(NSQ), "onnx", "run", str(chatting), "on", "--tokens", "200", *map(str, SAMPLED)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""
        assert running.wait() == 1
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, text=True, check=False
    )
    assert (closed.returncode, closed.stderr.count("\n")) == (0, 1), closed.stderr


def test_int4_with_static_scales(tmp_path: Path) -> None:
    path, text = chat_gguf(tmp_path), tmp_path / "text"
    text.write_text("the other side of the moon is on the other side. " * 3)
    build = ("onnx", "build", path)
    said(*build, tmp_path / "own", "--attention", "gqa-int4", "--calibrate", text)
    said(*build, tmp_path / "usual", "--attention", "gqa-int4")
    graphs = [onnx.load(str(tmp_path / one / "model.onnx"), load_external_data=False).graph
              for one in ("own", "usual")]  # fmt: skip
    scales = [
        {one.name: numpy_helper.to_array(one) for one in graph.initializer
         if one.name.endswith((".key.scale", ".value.scale"))}
        for graph in graphs
    ]  # fmt: skip
    assert len(scales[0]) == 4
    session = Session(_built(path, tmp_path / "float"))
    session.forward(Tokenizer(path).encode(text.read_text()))
    for name, found in scales[0].items():
        cached = session.tensors()[f"past_key_values.{name.removesuffix('.scale')}"]
        wanted = np.abs(cached[0]).max(axis=1) / np.float32(7)
        assert np.abs(found[:, 0] - wanted).max() <= 1e-5 * wanted.max()
    assert any((scales[0][name] != scales[1][name]).any() for name in scales[0])
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "chat.gguf", "float", "own", "text", "usual",
    ]  # fmt: skip

    def refuse(*arguments: object) -> str:
        return refused(*build, tmp_path / "out", *arguments, cwd=tmp_path)

    text.write_text("short")
    own = ("--attention", "gqa-int4", "--calibrate")
    assert "has 5 tokens; give one of at least 64" in refuse(*own, text)
    assert "No such file" in refuse(*own, tmp_path / "missing")
    text.write_bytes(b"\xff")
    assert "is no text in UTF-8" in refuse(*own, text)
    assert "--calibrate is of --attention gqa-int4; leave it out with nsq" in refuse(*own[2:], text)
    assert "--scheme is of --attention nsq; leave it out with gqa-int4" in refuse(
        *own[:2], "--scheme", "streaming4"
    )


def _built(path: Path, folder: Path) -> Path:
    build_onnx(GGUFFile(path), folder, attention=GroupedAttention())
    return folder / "model.onnx"


def test_more_misuse_is_one_line(chatting: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        return refused("onnx", "run", *arguments, cwd=tmp_path)

    assert "--system is of a chat" in run(chatting, "on", "--no-chat", "--system", "be")
    assert "there is no ONNX model" in run(tmp_path, "on")
    assert "the prompt is empty" in run(chatting, "-")
    plain = tmp_path / "plain"
    said("onnx", "build", tiny_gguf(tmp_path), plain, "--attention", "plain")
    assert "the model has no chat template" in run(plain, "on", "--chat")
    assert "the model has no chat template" in run(plain, "on", "--system", "be")
    assert "the model has no chat template" in refused("onnx", "chat", plain, cwd=tmp_path)
    path = plain / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    assert "has no metadata 'nsq.cache'; rewrite it with" in run(plain, "on")
    wide = chat_gguf(tmp_path, changes={})
    content = wide.read_bytes().replace(b"token_embd.weight", b"token_embd.weighs")
    wide.write_bytes(content)
    assert "'token_embd.weight' is missing" in refused(
        "onnx", "build", wide, tmp_path / "out", cwd=tmp_path
    )

"""``nsq audit``: text, JSON, page and policy, of arrays and of models; bad input in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsq_ref.audit import audit
from nsq_ref.files import write_arrays
from nsq_ref.policy import Policy
from onnx_export.models.tiny import tiny_gguf
from tests.support.command import nsq, refused
from tests.support.exports import EXPORTS

TEXT = "The state of the union, in so many words. " * 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    keys, values = random.standard_normal((2, 3, 1, 2, 160, 16)).astype(np.float32)
    keys[0, 0, 1, :, 5] += 1000
    queries = np.repeat(keys, 2, axis=2)
    np.savez(tmp_path / "kv.npz", keys=keys, values=values)
    np.savez(tmp_path / "kvq.npz", keys=keys, values=values, queries=queries)
    layers = {
        f"layers.{i}.{side}s": x[i]
        for i in range(3)
        for side, x in (("key", keys), ("value", values))
    }
    write_arrays(tmp_path / "layers.safetensors", layers)
    keys[2, 0, 1, 7, 3] = np.nan
    np.savez(tmp_path / "nan.npz", keys=keys, values=values)
    np.savez(tmp_path / "alone.npz", keys=keys)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9" * 40)
    return tmp_path


def test_text(folder: Path) -> None:
    text = nsq("audit", "kv.npz", cwd=folder).stdout
    assert text.startswith(
        "kv.npz: 3 layers of 2 heads, 160 tokens of 16 channels; without queries"
    )
    assert re.search(r"\n0 +15\.\d +1, 5 ", text)
    assert "outlier channel of keys: 1 head, at most 15." in text
    assert "mode 1 holds: the ratio is 15." in text
    assert "Recommended:\n  every layer: keys streaming4" in text
    assert "bits an element" in text


def test_json_page_and_policy_say_the_same(folder: Path) -> None:
    arguments = (
        "audit",
        "kvq.npz",
        "--scheme",
        "streaming2",
        "--html",
        "a.html",
        "--policy",
        "p.json",
    )
    told = json.loads(nsq(*arguments, "--json", cwd=folder).stdout)
    with np.load(folder / "kvq.npz") as given:
        expected = audit(given["keys"], given["values"], given["queries"], default="streaming2")
    assert told == {"source": "kvq.npz", **json.loads(json.dumps(expected.to_dict()))}
    policy = json.loads((folder / "p.json").read_text())
    assert policy == told["recommendation"]["policy"]
    assert Policy.of(policy).schemes([0, 1, 2]) == expected.policy.layers
    page = (folder / "a.html").read_text()
    assert "kvq.npz" in page
    assert expected.advice()[0] in page


def test_one_array_for_each_layer_is_the_same(folder: Path) -> None:
    one = json.loads(nsq("audit", "kv.npz", "--json", cwd=folder).stdout)
    other = json.loads(nsq("audit", "layers.safetensors", "--json", cwd=folder).stdout)
    assert one.pop("source") != other.pop("source")
    assert one == other


def test_a_model_and_a_text(folder: Path) -> None:
    model = tiny_gguf(folder)
    done = nsq("audit", model, "--text", "text.txt", "--tokens", 40, cwd=folder)
    assert "tiny.gguf: 2 layers of 2 heads, 40 tokens of 8 channels; errors weighted" in done.stdout
    assert re.search(r"40 of the \d+ tokens of text.txt were read\n", done.stdout)


def test_the_folder_of_an_exported_model_with_another_tokenizer(folder: Path) -> None:
    shutil.copy(EXPORTS / "optimum-llama-18.onnx", folder / "model.onnx")
    arguments = ("audit", ".", "--text", "letters.txt", "--policy", "p.json")
    (folder / "letters.txt").write_text("\n!" * 40)
    assert "there is no tokenizer 'tokenizer.json'" in refused(*arguments, cwd=folder)
    gguf = tiny_gguf(folder)
    text = nsq(*arguments, "--tokenizer", gguf, cwd=folder).stdout
    assert text.startswith(f"{folder.name}: 2 layers of 2 heads, 80 tokens of 8 channels; errors")
    assert len(Policy.read(folder / "p.json").schemes([0, 1])) == 2
    line = refused(*arguments[:3], "text.txt", "--tokenizer", gguf, cwd=folder)
    assert "outside the vocabulary of 96 tokens of model.onnx" in line


BAD: list[tuple[tuple[Any, ...], str]] = [
    (("nan.npz",), "nan.npz: array 'keys'[2, 0, 1, 7, 3] is nan (layer 2); leave padding out"),
    (("alone.npz",), "alone.npz: there are no values among 'keys'; add an array named values"),
    (("kv.npz", "--text", "text.txt"), "--text is of a model; leave it out with a file of arrays"),
    (("kv.npz", "--tokens", 99), "--tokens is of a model"),
    (("kv.npz", "--tokenizer", "text.txt"), "--tokenizer is of a model"),
    ((".", "--text", "text.txt"), ". holds neither model.onnx nor config.json"),
    (("kv.npz", "--limit", 3), "limit=3.0 must be between 0 and 1, such as 0.25"),
    (("kv.npz", "--scheme", "naive4"), "default of keys has no block size"),
    (("kv.npz", "--scheme", "streaming5"), "streaming5"),
    (("kv.npz", "--scheme", "best-3"), "best-3 is made for feedback of the keys"),
    (("kv.npz", "--softmax-scale", -1), "softmax_scale=-1.0 must be more than 0"),
    (("kv.npz", "--html", "no/a.html"), "there is no folder no; make it first"),
    (("missing.npz",), "missing.npz: No such file or directory"),
    (("missing.gguf", "--text", "text.txt"), "missing.gguf"),
    (("text.txt",), "text.txt is not a file of arrays (.npz, .safetensors) or a model"),
    (("tiny.gguf",), "tiny.gguf is a model, which reads a text; give --text FILE"),
    (("tiny.gguf", "--text", "short.txt"), "the text has 10 tokens; give one of at least 16"),
    (("tiny.gguf", "--text", "empty.txt"), "empty.txt is empty; give a text"),
    (("tiny.gguf", "--text", "latin.txt"), "latin.txt is no text in UTF-8"),
    (("tiny.gguf", "--text", "missing.txt"), "missing.txt: No such file"),
    (("kv.npz.gguf", "--text", "text.txt"), "is a NumPy .npz file"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[text[:30] for _, text in BAD])
def test_bad_input_is_one_line(folder: Path, arguments: tuple[Any, ...], message: str) -> None:
    tiny_gguf(folder)
    (folder / "kv.npz.gguf").write_bytes((folder / "kv.npz").read_bytes())
    assert message in refused("audit", *arguments, cwd=folder)

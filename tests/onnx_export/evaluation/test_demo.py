"""The main job on the real model, through the command and through its parts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsq_ref import Scheme
from nsq_ref.comparison import DEMO_SCHEMES, round_trips
from onnx_export.evaluation.fidelity import measure_fidelity
from onnx_export.models.decoder import Decoder
from onnx_export.models.texts import REPORTING_START, passages
from onnx_export.models.tiny import tiny_gguf
from onnx_export.models.tokenizer import Tokenizer
from tests.support.command import ROOT, Done, nsq, process


def run(*arguments: object, code: int = 0) -> Done:
    return nsq("demo", *arguments, code=code)


def test_the_likelihoods_that_are_published_are_those_of_the_code(
    smollm2_decoder: Decoder, smollm2_tokenizer: Tokenizer
) -> None:
    """The first two passages of docs/demo.json, with some of its schemes."""
    published = json.loads((ROOT / "docs" / "demo.json").read_text(encoding="utf-8"))
    chosen = {name: Scheme.named(name) for name in ("naive4", "nsep+pchan4", "streaming2")}
    tokens = passages(smollm2_tokenizer, 512 + 128 + 1, 2, start=REPORTING_START)
    results = measure_fidelity(smollm2_decoder, tokens, round_trips(chosen))
    for name, found in results.items():
        nll = published["schemes"][name]["nll"][:2]
        assert found.nll == pytest.approx(nll, abs=0.002), name
        assert found.baseline_nll == pytest.approx(published["baseline"]["nll"][:2], abs=0.002)


def test_command_on_the_real_model(smollm2: Path, tmp_path: Path) -> None:
    """The table, the JSON and the figure tell the same, and count every stored byte."""
    arguments = ("--output", tmp_path, "--passages", 2, "--prefill", 48, "--continuation", 8)
    arguments += ("--no-native",)
    printed = json.loads(process("demo", *arguments, "--json", "--gguf", smollm2).stdout)
    assert json.loads((tmp_path / "demo.json").read_text(encoding="utf-8")) == printed
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "demo.svg").read_text(encoding="utf-8")
    assert list(printed["schemes"]) == list(DEMO_SCHEMES)
    layers, kv_heads, head_dim = 30, 3, 64
    elements = 2 * 2 * layers * kv_heads * 48 * head_dim
    for name, one in printed["schemes"].items():
        scheme = Scheme.named(name)
        assert isinstance(scheme, Scheme)
        assert one["bits_per_element"] == pytest.approx(scheme.bits_per_element(48, head_dim))
        assert one["bytes"] * 8 == one["bits_per_element"] * elements
        assert one["float16_bytes"] == 2 * elements
        assert len(one["key_error_by_layer"]) == len(one["value_error_by_layer"]) == layers
        changes = np.subtract(one["nll"], printed["baseline"]["nll"])
        assert one["nll_change"] == pytest.approx(changes.mean())
        assert one["nll_change_error"] == pytest.approx(changes.std(ddof=1) / math.sqrt(2))
        assert one["key_error"] > 0
    table = run(*arguments, "--gguf", smollm2).stdout
    for name, one in printed["schemes"].items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"{name}  ")]
        assert f"{one['bits_per_element']:.3f}" in line
        assert f"{one['nll_change']:+.4f} ± {one['nll_change_error']:.4f}" in line
    paired = printed["paired_with_nsep+pchan4"]
    assert [*paired] == [name for name in DEMO_SCHEMES if name != "nsep+pchan4"]
    assert all(one["in_words"] in table.splitlines() for one in paired.values())


def test_command_on_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf = tiny_gguf(tmp_path)
    out = tmp_path / "out"
    done = run("--gguf", gguf, "-o", out, "--passages", 2, "--prefill", 20, "--continuation", 4)
    assert done.stdout.startswith(f"{Path(gguf).name}: 2 passages of real prose, 20 tokens")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Decoding in ONNX")]
    assert line.startswith("Decoding in ONNX Runtime was left out: head_dim=8 is not a multiple of")
    Path(gguf).write_bytes(Path(gguf).read_bytes()[:1000])
    message = run("--gguf", gguf, "-o", out, code=2).stderr
    assert message.startswith("nsq: ")
    assert "Traceback" not in message


@pytest.mark.parametrize("shape", [(40, 16), (2, 40, 16), (3, 2, 40, 16), (3, 1, 2, 40, 16)])
def test_own_keys_and_values(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A user's own arrays, any leading axes; of four axes or more the first is layers."""
    rng = np.random.default_rng(0)
    keys: np.ndarray[Any, Any] = rng.standard_normal(shape).astype(np.float16)
    np.savez(tmp_path / "kv.npz", keys=keys, values=keys[..., ::-1])
    out = tmp_path / "out"
    printed = json.loads(run("--keys", tmp_path / "kv.npz", "-o", out, "--json").stdout)
    layers = shape[0] if len(shape) > 3 else 1
    for name, one in printed["schemes"].items():
        scheme = Scheme.named(name)
        assert isinstance(scheme, Scheme)
        expected = scheme.bits_per_element(40, 16, np.dtype(np.float16))
        assert one["bits_per_element"] == pytest.approx(expected)
        assert len(one["key_error_by_layer"]) == layers
        assert "nll" not in one
    assert (out / "demo.png").is_file()


def test_keys_alone_and_layers_by_name(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((2, 30, 8)).astype(np.float32)
    np.save(tmp_path / "anything.npy", x)
    assert "V error" in run("--keys", tmp_path / "anything.npy", "-o", tmp_path).stdout
    np.savez(tmp_path / "layers.npz", **{f"layers.{i}.keys": x for i in range(3)})
    printed = json.loads(run("--keys", tmp_path / "layers.npz", "-o", tmp_path, "--json").stdout)
    assert len(printed["schemes"]["naive4"]["key_error_by_layer"]) == 3
    assert printed["schemes"]["naive4"]["value_error"] is None


def test_refusals(tmp_path: Path) -> None:
    x = np.ones((4, 8), np.float32)
    np.savez(tmp_path / "unnamed.npz", a=x, b=x)
    np.savez(tmp_path / "shapes.npz", **{"0.keys": x, "1.keys": x[:2]})
    np.savez(tmp_path / "values.npz", v=x, values=x)
    np.savez(tmp_path / "nan.npz", keys=x * np.nan, values=x)
    for name, message in (
        ("missing.npz", "No such file"),
        ("unnamed.npz", "array 'a' is not named as keys or values"),
        ("shapes.npz", "the arrays of keys have shapes [(2, 8), (4, 8)]; give layers of one shape"),
        ("values.npz", "there is no array of keys; name one keys"),
        ("nan.npz", "x[0, 0, 0] is nan; nothing was quantized"),
    ):
        stderr = run("--keys", tmp_path / name, "-o", tmp_path / "out", code=2).stderr
        assert stderr.startswith("nsq: ")
        assert message in stderr
        assert stderr.count("\n") == 1
    assert run("--passages", 1, code=2).stderr

"""``nsq eval``: what it prints and writes, and how it fails."""

from __future__ import annotations

import json
import re
import resource
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from nsq_ref import Scheme
from nsq_ref.cli import evaluating
from nsq_ref.files import load_feedback
from onnx_export.models.attention_forms import QuantizedAttention
from onnx_export.models.built import build_onnx
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.json_tokenizer import tokenizer_files
from onnx_export.models.texts import REPORTING_START, passages
from onnx_export.models.tiny import tiny_gguf
from onnx_export.models.tokenizer import Tokenizer
from tests.project.test_tutorials import commands
from tests.support.command import NSQ, nsq, refused, said
from tests.support.exports import EXPORTS

SCHEME = Scheme.named("streaming4")
QUICK = ("--prefill", 40, "--continuation", 16, "--passages", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and what is built of it."""
    folder = tmp_path_factory.mktemp("eval")
    tiny_gguf(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return folder / "cache" / "nsq"


def evaluated(folder: Path, *arguments: object, code: int = 0) -> Any:
    return json.loads(said("eval", *arguments, "--json", cwd=folder, code=code))["evaluations"]


def test_a_table_and_files(folder: Path, tmp_path: Path) -> None:
    policy = tmp_path / "first left alone.json"
    policy.write_text('{"default": "naive4", "layers": {"0": null}}')
    done = nsq(
        *("eval", "tiny.gguf", *QUICK, "--scheme", "naive4", "--scheme", "streaming4/kivi4"),
        *("--key", "naive2", "--value", "float32", "--policy", policy),
        *("-o", tmp_path / "new" / "out.json", "--markdown", tmp_path / "out.md"),
        cwd=folder,
    )
    result = json.loads((tmp_path / "new" / "out.json").read_bytes())
    (one,) = result["evaluations"]
    names = ["naive4", "streaming4/kivi4", "naive2/float32", "first left alone"]
    (table,) = one["tables"]
    assert list(table["schemes"]) == list(one["schemes"]) == names
    assert one["schemes"]["first left alone"]["layers"]["0"]["key"]["codec"] == "Unquantized"
    schemes = table["schemes"]
    assert schemes["first left alone"]["bits_per_element"] == (6 + 16) / 2
    assert schemes["first left alone"]["kl"]["mean"] < schemes["naive4"]["kl"]["mean"]
    for name in names:
        assert f"\n{name} " in done.stdout
        assert f"| {name} |" in (tmp_path / "out.md").read_text()
    assert "KL of naive2/float32 is" in done.stdout
    assert done.stderr == ""


def test_feedback_of_keys(folder: Path, tmp_path: Path) -> None:
    """By itself, or of a file: the same figures, beside those without."""
    schemes = ("--scheme", "streaming2", "--scheme", "float32/naive4")
    (one,) = evaluated(folder, "tiny.gguf", *QUICK, *schemes, "--calibrate")
    (table,) = one["tables"]
    names = ["streaming2", "streaming2+feedback", "float32/naive4"]
    assert list(table["schemes"]) == names
    plain, fed_back, _ = (table["schemes"][name] for name in names)
    assert fed_back["bits_per_element"] == plain["bits_per_element"]
    assert fed_back["kl"]["mean"] != plain["kl"]["mean"]
    feedback = tmp_path / "feedback.safetensors"
    said("onnx", "calibrate", "tiny.gguf", "-o", feedback, cwd=folder)
    (same,) = evaluated(folder, "tiny.gguf", *QUICK, *schemes, "--feedback", feedback)
    assert same == one
    digests = [load_feedback(feedback)[layer].digest for layer in ("0", "1")]
    layers = one["schemes"]["streaming2+feedback"]["layers"]
    assert [layers[layer]["key"]["feedback"] for layer in ("0", "1")] == digests
    for arguments, message in (
        (("--scheme", "q8_0", "--calibrate"), "feedback is of schemes of NSQ-1"),
        (("--calibrate", "--feedback", feedback), "give one of them"),
        (("--feedback", tmp_path / "none"), "none: No such file"),
    ):
        assert message in refused("eval", "tiny.gguf", *QUICK, *arguments, cwd=folder)


def test_a_profile_that_is_made_for_feedback_is_calibrated(folder: Path, tmp_path: Path) -> None:
    """By itself, and it alone; or it takes the feedback of a file."""
    schemes = ("--scheme", "best-2.5", "--scheme", "small-2.5", "--json")
    done = nsq("eval", "tiny.gguf", *QUICK, *schemes, cwd=folder)
    assert done.stderr == "best-2.5 is made for feedback of the keys: calibrating tiny.gguf\n"
    (one,) = json.loads(done.stdout)["evaluations"]
    (table,) = one["tables"]
    assert list(table["schemes"]) == ["best-2.5", "small-2.5"]
    feedback = tmp_path / "feedback.safetensors"
    said("onnx", "calibrate", "tiny.gguf", "-o", feedback, cwd=folder)
    digests = [load_feedback(feedback)[layer].digest for layer in ("0", "1")]
    layers = one["schemes"]["best-2.5"]["layers"]
    assert [layers[layer]["key"]["feedback"] for layer in ("0", "1")] == digests
    assert table["schemes"]["best-2.5"]["kl"]["mean"] != table["schemes"]["small-2.5"]["kl"]["mean"]
    done = nsq("eval", "tiny.gguf", *QUICK, *schemes, "--feedback", feedback, cwd=folder)
    assert done.stderr == ""
    (same,) = json.loads(done.stdout)["evaluations"]
    assert list(same["schemes"]) == ["best-2.5", "small-2.5", "small-2.5+feedback"]
    assert same["schemes"]["best-2.5"] == one["schemes"]["best-2.5"]
    from onnx_export.evaluation import Prefill, evaluate

    tokens = passages(Tokenizer(folder / "tiny.gguf"), 57, 1)
    with pytest.raises(ValueError, match=r"^best-2\.5 is made for feedback"):
        evaluate(folder / "tiny.gguf", tokens, ["best-2.5"], protocol=Prefill(40, 16))


def test_passages_are_those_that_report(folder: Path) -> None:
    (one,) = evaluated(folder, "tiny.gguf", *QUICK, "--scheme", "naive4")
    tokens = passages(Tokenizer(folder / "tiny.gguf"), 57, 3, start=REPORTING_START)
    from onnx_export.evaluation import Prefill, evaluate, open_model

    model = open_model(folder / "tiny.gguf")
    expected = evaluate(model, tokens, ["naive4"], protocol=Prefill(40, 16)).to_dict()
    assert one == expected


@pytest.mark.parametrize(
    ("options", "protocol"),
    [
        (("--protocol", "windows", "--context", 60, "--stride", 20), {"context": 60, "stride": 20}),
        (
            ("--protocol", "lengths", "--lengths", "16,32", "--continuation", 8),
            {"lengths": [16, 32], "continuation_length": 8},
        ),
        (
            ("--protocol", "decode", "--prefill", 0, "--continuation", 40, "--block", 16),
            {"prefill_length": 0, "continuation_length": 40, "block": 16},
        ),
        (
            ("--protocol", "free", "--prefill", 30, "--new-tokens", 5),
            {"prefill_length": 30, "new_tokens": 5, "block": 128},
        ),
    ],
)
def test_every_protocol(folder: Path, options: tuple[object, ...], protocol: Any) -> None:
    (one,) = evaluated(folder, "tiny.gguf", *options, "--passages", 2, "--scheme", "naive2")
    assert one["protocol"] == {"name": options[1], **protocol}
    assert len(one["tables"]) == len(protocol.get("lengths", [0]))
    if options[1] == "windows":
        assert one["text"]["passages"] == 2
        assert one["tables"][0]["scored_tokens"] == 2 * 19


def test_a_run_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    options = (*QUICK, "--store", tmp_path, "--scheme", "naive4")
    first = evaluated(folder, "tiny.gguf", *options)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) == 3 * 2
    assert evaluated(folder, "tiny.gguf", *options) == first
    evaluated(folder, "tiny.gguf", *options, "--scheme", "naive8")
    tasks = [json.loads(path.read_bytes())["task"]["method"] for path in tmp_path.iterdir()]
    assert len(tasks) == 3 * 3
    unchanged = [path for path, time in kept.items() if path.stat().st_mtime_ns == time]
    assert len(unchanged) >= 3  # only the float32 cache was measured again


def test_models_by_pattern_and_one_that_fails(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "tiny.gguf", tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF, or so it says")
    shutil.copy(folder / "tiny.gguf", tmp_path / "c.gguf")
    done = nsq(
        *("eval", "*.gguf", *QUICK, "--scheme", "naive4", "-o", "out.json"), cwd=tmp_path, code=2
    )
    assert done.stderr.startswith("nsq: 1 of 3 models failed. b.gguf: ")
    assert done.stderr.count("\n") == 1
    found = json.loads((tmp_path / "out.json").read_bytes())["evaluations"]
    assert [one["model"]["name"] for one in found] == ["a.gguf", "c.gguf"]
    assert "a.gguf, prefill" in done.stdout


def test_schemes_that_this_model_cannot_have(folder: Path) -> None:
    done = nsq(
        *("eval", "tiny.gguf", *QUICK, "--scheme", "q4_0", "--scheme", "naive4"),
        *("--scheme", "onnxruntime-int4"),
        cwd=folder,
        code=1,
    )
    assert "q4_0 was refused: x has head_dim 8; q4_0 needs a multiple of 32" in done.stdout
    assert "\nonnxruntime-int4" in done.stdout


def test_an_exported_model_with_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    shutil.copy(EXPORTS / "optimum-llama-18.onnx", tmp_path / "model.onnx")
    arguments = ("eval", ".", "--scheme", "naive4", *QUICK)
    assert "there is no tokenizer" in refused(*arguments, cwd=tmp_path)
    other = folder / "tiny.gguf"
    # Its vocabulary is another one.
    line = refused(*arguments, "--tokenizer", other, cwd=tmp_path)
    assert "outside the vocabulary of 96 tokens" in line
    assert "use this model's own tokenizer" in line
    (tmp_path / "text").write_text("\n!" * 300)
    known = evaluated(tmp_path, *arguments[1:], "--tokenizer", other, "--text", "text")
    assert known[0]["tables"][0]["scored_tokens"] == 48
    assert known[0]["model"]["name"] == tmp_path.name


WRONG = {
    "unknown scheme": (("--scheme", "naive5"), "unknown scheme name 'naive5'"),
    "only keys": (("--key", "naive4"), "--key and --value belong together"),
    "another protocol's option": (("--stride", 5), "--stride is of windows, not of prefill"),
    "no prefill": (("--prefill", 0), "--prefill 0 is of decode"),
    "lengths": (("--protocol", "lengths", "--lengths", "a"), "'a' is no list of numbers"),
    "short text": (("--text", "short"), "the text holds 0 passages of 641 tokens, fewer than 10"),
    "no text": (("--text", "none"), "none: No such file"),
    "binary": (("--text", "binary"), "binary is no text in UTF-8"),
    "a long context": (("--prefill", 2000), "prefill needs a context of 2128 tokens, more than"),
    "policy": (("--policy", "short"), "short: Expecting value"),
    "two kinds of workers": (("--workers", 2, "--scheduler", "x"), "leave it out with --sched"),
    "no folder": (("-o", "short/out.json"), "short/out.json: Not a directory"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_use_is_a_line(folder: Path, tmp_path: Path, name: str) -> None:
    options, message = WRONG[name]
    (tmp_path / "short").write_text("the end")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    line = refused("eval", folder / "tiny.gguf", *options, cwd=tmp_path)
    assert message in line


def test_models_that_are_none(folder: Path, tmp_path: Path) -> None:
    assert "there is no model 'missing.gguf'" in refused("eval", "missing.gguf", cwd=tmp_path)
    gguf = folder / "tiny.gguf"
    build_onnx(
        GGUFFile(gguf),
        tmp_path,
        attention=QuantizedAttention(SCHEME, SCHEME),
        beside=tokenizer_files(Tokenizer(gguf)),
    )
    assert "has a quantized cache; give the model that" in refused("eval", ".", cwd=tmp_path)
    whisper = EXPORTS / "decoder-whisper-18.onnx"
    line = refused("eval", whisper, "--tokenizer", gguf, cwd=tmp_path)
    assert "no output is what 'past_key_values.0.encoder.key' has grown to" in line


def test_the_page_runs(folder: Path, tmp_path: Path) -> None:
    """docs/evaluation.md, its commands and its policy."""
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (tmp_path / "models").mkdir()
    for name in ("model.gguf", "models/one.gguf"):
        shutil.copy(folder / "tiny.gguf", tmp_path / name)
    (policy,) = re.findall("```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "policy.json").write_text(policy)
    told = [shlex.split(command) for command, _ in commands(page)]
    assert len(told) == 3
    for command in told:
        assert command.pop(0) == "nsq"
        few = () if "--passages" in command else ("--passages", 2)
        nsq(*command, *few, cwd=tmp_path)
    assert (tmp_path / "decode.md").read_text().startswith("# one.gguf")
    for kind in ("prefill", "windows", "lengths", "decode", "free"):
        assert f"| `{kind}` |" in page


def test_an_interruption_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, evaluating._goes_on():
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_full_disk_is_a_line_and_loses_nothing(folder: Path, tmp_path: Path) -> None:
    options = [str(one) for one in (*QUICK, "--scheme", "naive4", "--scheme", "naive8")]
    command = [str(NSQ), "eval", "tiny.gguf", *options, "--store", str(tmp_path)]

    def nearly_full() -> None:  # files of so many bytes at most: those of the float32 cache fit
        resource.setrlimit(resource.RLIMIT_FSIZE, (1100, 1100))

    evaluated(folder, "tiny.gguf", *QUICK, "--scheme", "naive4")  # builds the model
    done = subprocess.run(
        command,
        cwd=folder,
        preexec_fn=nearly_full,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].endswith("File too large")
    kept = list(tmp_path.glob("*.json"))
    assert kept
    assert all(json.loads(path.read_bytes())["figures"] for path in kept)
    assert len(evaluated(folder, "tiny.gguf", *options, "--store", tmp_path)) == 1

"""What is refused before the work: before 2 GB are built, before an hour is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from onnx_export.evaluation.demo import run_demo
from onnx_export.evaluation.fidelity import measure_fidelity
from onnx_export.models.built import cached_onnx
from onnx_export.models.decoder import Decoder
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.tiny import tiny_gguf
from onnx_export.models.tokenizer import Tokenizer
from tests.support.command import refused
from tests.support.llama_oracle import TinyModel, write_gguf

NSQ = Path(sys.executable).with_name("nsq")


def write(path: Path, tensors: dict[str, np.ndarray], **metadata: object) -> None:
    """Write a GGUF file of tensors as they are, whatever their dtype."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def split(folder: Path, parts: int, first: str = "model-00001-of-{:05d}.gguf") -> list[Path]:
    """Write a model as llama-gguf-split does: most metadata in the first part only."""
    model = TinyModel()
    tensors = model.tensors()
    paths = []
    for number in range(parts):
        paths.append(folder / first.format(parts).replace("-00001-", f"-{number + 1:05d}-"))
        keys = {"split.no": number, "split.count": parts, "split.tensors.count": len(tensors)}
        own = dict(list(tensors.items())[number::parts])
        write(paths[-1], own, **keys, **(model.keys() if number == 0 else {}))
    return paths


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_a_part_of_a_split_model_says_how_to_merge(parts: int, tmp_path: Path) -> None:
    """Whichever part, whoever reads it."""
    paths = split(tmp_path, parts)
    for number, path in enumerate(paths):
        for read in (GGUFFile, Tokenizer, cached_onnx, Decoder.from_gguf):
            with pytest.raises(ValueError, match="llama-gguf-split --merge") as error:
                read(path)
            assert str(error.value) == (
                f"{path}: part {number + 1} of {parts} of a split model; merge them first: "
                f"llama-gguf-split --merge {paths[0]} {tmp_path / 'model.gguf'}"
            )
    (only,) = split(tmp_path, 1, "whole-00001-of-{:05d}.gguf")
    assert len(GGUFFile(only).tensors) == len(TinyModel().tensors())


def test_a_part_under_another_name_names_no_files(tmp_path: Path) -> None:
    path = split(tmp_path, 2)[1].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ValueError, match=r"part 2 of 2 .*llama-gguf-split --merge FIRST-PART OUT"):
        GGUFFile(path)


def test_the_command_says_it_too(tmp_path: Path) -> None:
    path = split(tmp_path, 2)[0]
    command = [NSQ, "demo", "--gguf", path, "-o", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "part 1 of 2 of a split model" in done.stderr
    assert not (tmp_path / "out").exists()


def tiny_with(folder: Path, **changes: object) -> Path:
    """Write the tiny model of `onnx_export.models.tiny` with other metadata of its tokenizer."""
    reader = GGUFFile(tiny_gguf(folder))
    keys = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in reader.metadata.items()}
    keys |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    tensors = {name: reader.tensor(name) for name in reader.tensors}
    return write_gguf(
        folder / "changed.gguf",
        "llama",
        {k: v for k, v in keys.items() if v is not None and not k.startswith("general.")},
        tensors,
    )


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model": "bert"}, {}, "only BPE, byte-level"),
        ({"pre": "deepseek-llm"}, {}, "'tokenizer.ggml.pre' is 'deepseek-llm'"),
        ({"tokens": None}, {}, "'tokenizer.ggml.tokens' is missing"),
        ({}, {"passages": 100_000}, "the text holds"),
        ({}, {"prefill_length": 500, "continuation_length": 13}, "513 tokens together, more than"),
        ({}, {"prefill_length": 0}, "prefill_length=0 must be an integer of at least 1"),
        ({}, {"continuation_length": 0}, "continuation_length=0 must be an integer of at least 1"),
        ({}, {"passages": 1}, "passages must be at least 2"),
        ({}, {"threads": 0}, "threads=0 must be an integer of at least 1"),
    ],
)  # fmt: skip
def test_the_demo_builds_nothing_that_it_cannot_use(
    changes: dict[str, object], options: dict[str, int], message: str, tmp_path: Path
) -> None:
    path = tiny_with(tmp_path, **changes)
    chosen = {"passages": 2, "prefill_length": 20, "continuation_length": 4} | options
    with pytest.raises(ValueError, match=message):
        run_demo(gguf_path=path, cache_dir=tmp_path / "cache", **chosen)
    assert not (tmp_path / "cache").exists()


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    reader = GGUFFile(tiny_gguf(tmp_path))
    tokens = [*reader.metadata["tokenizer.ggml.tokens"], "Ġof", "of"]
    types = [3] + [1] * (len(tokens) - 1)
    merges = [*reader.metadata["tokenizer.ggml.merges"], "o f", "Ġ of"]
    path = tiny_with(tmp_path, tokens=tokens, token_type=types, merges=merges)
    with pytest.raises(ValueError, match="outside the vocabulary of 260 tokens"):
        run_demo(
            gguf_path=path, passages=2, prefill_length=90, continuation_length=9,
            cache_dir=tmp_path / "cache",
        )  # fmt: skip
    assert not (tmp_path / "cache").exists()


def test_a_tensor_that_cannot_be_read_is_named_before_any_is_built(tmp_path: Path) -> None:
    """Its type, though the tensor is the last to be built, and factors of 0."""
    model = TinyModel(tied=False)
    steps: list[str] = []
    for changed, message in (
        ({"output.weight": np.ones((40, 32), np.int32)}, "'output.weight' is stored as I32"),
        ({"rope_freqs.weight": np.zeros(4, np.float32)}, "'rope_freqs.weight' must be positive"),
    ):
        path = tmp_path / "m.gguf"
        write(path, model.tensors() | changed, **model.keys())
        with pytest.raises(ValueError, match=message):
            cached_onnx(
                path, cache_dir=tmp_path / "c", progress=lambda *call: steps.append(call[0])
            )
        assert steps == []
        assert not (tmp_path / "c").exists()


def test_fidelity_reads_all_passages_before_it_measures_one(tmp_path: Path) -> None:
    """A wrong token in the last passage, or too long a text, costs no forward pass."""
    decoder = Decoder.from_gguf(TinyModel().write(tmp_path / "t.gguf"), cache_dir=tmp_path)
    passages = np.zeros((4, 100), np.int64)
    passages[3, 15], passages[2, 16] = 40, -1  # those behind what is scored are not used
    calls: list[str] = []

    def transform(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        calls.append("called")
        return keys, values

    for lengths, message in (
        ((10, 5), r"passages\[3, 15\] is 40, outside the vocabulary of 40 tokens"),
        ((10, 6), r"passages\[2, 16\] is -1, outside"),
        ((60, 5), "65 tokens together, more than the model's context of 64"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_fidelity(
                decoder, passages, {"t": transform},
                prefill_length=lengths[0], continuation_length=lengths[1],
                progress=lambda *call: calls.append(str(call)),
            )  # fmt: skip
    assert calls == []
    result = measure_fidelity(
        decoder, passages, {"t": transform}, prefill_length=10, continuation_length=4
    )
    assert len(result["t"].nll) == 4


# --- the command's folder and options -----------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--keys", "nofile"),
        ("--keys", "nofile.npz"),
        ("--keys", "model.gguf"),
        ("--gguf", "nofile"),
        ("--gguf", "kv.npz"),
        ("--gguf", "model.gguf", "--prefill", 100_000),
        ("--keys", "kv.npz", "--passages", 3),
        ("--keys", "kv.npz", "--prefill", 3),
        ("--keys", "kv.npz", "--continuation", 3),
        ("--keys", "kv.npz", "--gguf", "model.gguf"),
    ],
)
def test_a_demo_that_is_refused_leaves_no_folder(
    options: tuple[object, ...], tmp_path: Path
) -> None:
    keys = np.random.default_rng(0).standard_normal((2, 20, 8)).astype(np.float32)
    np.savez(tmp_path / "kv.npz", keys=keys)
    tiny_gguf(tmp_path).rename(tmp_path / "model.gguf")
    before = sorted(tmp_path.rglob("*"))
    line = refused("demo", *options, "-o", "out/of/demo", cwd=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    if options[0] == "--keys" and len(options) > 2:
        assert f"leave {options[2]} out" in line


def test_what_was_measured_is_shown_even_if_it_cannot_be_written(tmp_path: Path) -> None:
    """The disk fills up: the figures were worth the time."""
    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500));"
        "from nsq_ref.cli import main; main()"
    )
    keys = np.random.default_rng(0).standard_normal((2, 20, 8)).astype(np.float32)
    np.savez(tmp_path / "kv.npz", keys=keys)
    command = [sys.executable, "-c", limited, "demo", "--keys", "kv.npz", "-o", "out", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "nsq: out/demo.png: File too large"
    assert json.loads(done.stdout)["source"] == "kv.npz"
    assert not (tmp_path / "out").exists()

"""Files of the wrong kind: every verb says what the file is, and which one takes it."""

from __future__ import annotations

import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from nsq_ref import KVCache, Scheme, cli, files, quantize
from nsq_ref.files import kinds
from onnx_export.models.tiny import tiny_gguf
from onnx_export.operators import quantize_model, save_models

KEYS = np.random.default_rng(0).standard_normal((2, 20, 8), dtype=np.float32)
VERBS = {
    "info": ("info", "FILE"),
    "quantize": ("quantize", "FILE", "-o", "out.safetensors"),
    "dequantize": ("dequantize", "FILE", "-o", "out.safetensors"),
    "--keys": ("demo", "--keys", "FILE", "-o", "demo"),
    "--gguf": ("demo", "--gguf", "FILE", "-o", "demo"),
}
TAKES = "`nsq quantize` takes it"
SAYS = {
    "kv.npz": ("is a NumPy .npz file of plain arrays, not ", TAKES),
    "k.npy": ("is a NumPy .npy file, not ", TAKES),
    "npz.safetensors": ("is a NumPy .npz file of plain arrays, not ", f"{TAKES}, once its name"),
    "npz.npy": ("is a NumPy .npz file of plain arrays, not ", "once its name ends in .npz"),
    "codes.npz": ("is a safetensors file, not ", "`nsq info` tells what it holds, once its name"),
    "tiny.gguf": ("is a GGUF model, not ", "`nsq demo --gguf` takes it"),
    "gguf.safetensors": ("is a GGUF model, not ", "`nsq demo --gguf` takes it"),
    "encode.onnx": ("is an ONNX model, not ", "choose another file"),
    "old.npz": ("is a pickle, not ", "choose another file"),
    "model.pt": ("is a PyTorch file, not ", "choose another file"),
    "lfs.safetensors": ("is a pointer of Git LFS, not ", "git lfs pull"),
    "page.safetensors": ("is a web page, not ", "choose another file"),
    "empty.npz": ("empty|0 bytes is too short", "copy it again|too short"),
    "empty.npy": ("empty|0 bytes is too short", "copy it again|too short"),
    "empty.safetensors": ("empty|0 bytes is too short", "copy it again|too short"),
    "folder": ("is a folder; name a file in it|Is a directory", ""),
    "folder.npz": ("Is a directory", ""),
    "folder.safetensors": ("Is a directory", ""),
}
TAKEN = {("info", "kv.npz"), ("quantize", "kv.npz"), ("--keys", "kv.npz")}
TAKEN |= {("info", "k.npy"), ("quantize", "k.npy"), ("--keys", "k.npy"), ("--gguf", "tiny.gguf")}
TAKEN |= {("--gguf", "gguf.safetensors"), ("dequantize", "codes.npz")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    np.savez(folder / "kv.npz", keys=KEYS, values=KEYS)
    np.save(folder / "k.npy", KEYS)
    for name in ("npz.safetensors", "npz.npy"):
        (folder / name).write_bytes((folder / "kv.npz").read_bytes())
    files.save(folder / "codes.npz", {"keys": quantize(KEYS, backend="numpy")})
    tiny_gguf(folder)
    (folder / "gguf.safetensors").write_bytes((folder / "tiny.gguf").read_bytes())
    save_models({folder / "encode.onnx": quantize_model(Scheme())})
    (folder / "old.npz").write_bytes(pickle.dumps({"k": 1}))
    with zipfile.ZipFile(folder / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    (folder / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "page.safetensors").write_text("<!DOCTYPE html><title>Sign in</title>")
    for ending in ("npz", "npy", "safetensors"):
        (folder / f"empty.{ending}").touch()
    for name in ("folder", "folder.npz", "folder.safetensors"):
        (folder / name).mkdir()
    return folder


def refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> str:
    """Run a command that must fail with one line and leave nothing."""
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(sys, "argv", ["nsq", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr()
    assert (end.value.code, shown.out) == (2, "")
    assert shown.err.startswith("nsq: ")
    assert shown.err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return shown.err


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", SAYS)
def test_a_file_of_another_kind_is_named(
    verb: str,
    name: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if (verb, name) in TAKEN:
        return
    monkeypatch.chdir(folder)
    said = refused(capsys, monkeypatch, *(name if a == "FILE" else a for a in VERBS[verb]))
    assert name in said
    for part in SAYS[name]:
        assert any(one in said for one in part.split("|")), said


def test_what_is_quantized_already_says_what_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files.save("codes.safetensors", {"keys": quantize(KEYS, backend="numpy")})
    cache = KVCache(1, 1, 8)
    cache.append(KEYS[None, :1], KEYS[None, :1])
    cache.save("cache.safetensors")
    files.write_arrays("plain.safetensors", {"keys": KEYS})
    for verb in (VERBS["quantize"], VERBS["--keys"]):
        for name, says in (
            ("codes.safetensors", "holds quantized arrays; `nsq dequantize` or load reads them"),
            ("cache.safetensors", "holds a saved cache, which is quantized; nsq_ref.KVCache.load"),
        ):
            said = refused(capsys, monkeypatch, *(name if a == "FILE" else a for a in verb))
            assert f"{name} {says}" in said
    for name, says in (
        ("plain.safetensors", "`nsq quantize` makes such files"),
        ("cache.safetensors", "nsq_ref.KVCache.load reads"),
    ):
        said = refused(capsys, monkeypatch, "dequantize", name, "-o", "out.safetensors")
        assert says in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "kv.npz", "-o", "-"),
        ("dequantize", "kv.npz", "-o", "-"),
        ("demo", "--keys", "kv.npz", "-o", "-"),
        ("vectors", "-o", "-"),
        ("gen", "--dir", "-"),
        ("onnx", "codec", "-o", "-"),
        ("check", "mine:encode", "--junit", "-"),
    ],
)
def test_the_sign_for_a_pipe_is_refused(
    arguments: tuple[str, ...],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No file of that name is made."""
    monkeypatch.chdir(folder)
    assert "- is no file name" in refused(capsys, monkeypatch, *arguments)


@pytest.mark.parametrize("name", ["v.tgz", "v.tar", "v.tar.bz2", "v.tar.xz", "v.7z"])
def test_archives_of_other_kinds_are_no_folders(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, monkeypatch, "vectors", "-o", name)
    assert f"{name} is no name for a folder; archives end in .tar.gz or .zip" in said


def test_what_is_of_the_kind_or_damaged_is_not_mistaken(folder: Path) -> None:
    assert kinds.mistaken(folder / "kv.npz", kinds.NPZ) is None
    assert kinds.mistaken(folder / "codes.npz", kinds.SAFETENSORS) is None
    (folder / "noise").write_bytes(bytes(range(1, 200)))
    assert kinds.mistaken(folder / "noise", kinds.NPZ) is None
    (folder / "noise").write_bytes(b"PK" + bytes(100))
    assert kinds.mistaken(folder / "noise", kinds.GGUF) is None
    (folder / "noise").unlink()

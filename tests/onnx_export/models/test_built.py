"""Built models in the cache: whole, used again, and built again where they are damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onnx_export.models.built import GRAPH_VERSION
from onnx_export.models.decoder import Decoder, cached_onnx, file_sha256
from tests.support.llama_oracle import TinyModel


def test_progress_counts_every_tensor(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    path = TinyModel().write(tmp_path / "tiny.gguf")
    cached_onnx(path, cache_dir=tmp_path, progress=lambda *call: calls.append(call))
    assert [done for _, done, _ in calls] == list(range(1, 21))
    assert {total for _, _, total in calls} == {20}
    cached_onnx(path, cache_dir=tmp_path, progress=lambda *call: calls.append(call))
    assert len(calls) == 20


def test_the_name_in_the_cache_depends_on_the_content(tmp_path: Path) -> None:
    first = cached_onnx(TinyModel().write(tmp_path / "tiny.gguf"), cache_dir=tmp_path)
    second = cached_onnx(TinyModel(eps=0.1).write(tmp_path / "tiny.gguf"), cache_dir=tmp_path)
    assert first != second
    assert second.parent.name == f"{file_sha256(tmp_path / 'tiny.gguf')}-{GRAPH_VERSION}"
    assert Decoder(second).config.rms_norm_epsilon == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove", "extend"])
def test_a_damaged_model_in_the_cache_is_rebuilt(name: str, damage: str, tmp_path: Path) -> None:
    gguf_path = TinyModel().write(tmp_path / "tiny.gguf")
    folder = cached_onnx(gguf_path, cache_dir=tmp_path).parent
    intact = {path.name: path.read_bytes() for path in folder.iterdir()}
    content = intact[name]
    damaged = {
        "flip": content[:50] + bytes([content[50] ^ 1]) + content[51:],
        "truncate": content[:-1],
        "empty": b"",
        "extend": content + b"\0",
    }
    if damage == "remove":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(damaged[damage])
    cached_onnx(gguf_path, cache_dir=tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == intact


def test_an_intact_model_in_the_cache_is_used_again(tmp_path: Path) -> None:
    gguf_path = TinyModel().write(tmp_path / "tiny.gguf")
    path = cached_onnx(gguf_path, cache_dir=tmp_path)
    os.utime(path, (1, 1))
    assert cached_onnx(gguf_path, cache_dir=tmp_path) == path
    assert path.stat().st_mtime == 1


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path) -> None:
    gguf_path = TinyModel().write(tmp_path / "tiny.gguf")

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_onnx(gguf_path, cache_dir=tmp_path, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
    assert Decoder.from_gguf(gguf_path, cache_dir=tmp_path).config.layers == 2

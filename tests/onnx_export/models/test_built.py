"""Built models in the cache: whole, used again, and built again where they are damaged."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import onnx
import pytest
from onnx import helper, numpy_helper

from nsq_ref import Scheme
from onnx_export.models.attention_forms import GroupedAttention, QuantizedAttention
from onnx_export.models.built import GRAPH_VERSION, build_onnx, cached_onnx
from onnx_export.models.decoder import Decoder
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.sources import file_sha256
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


def test_another_graph_has_another_version(tmp_path: Path) -> None:
    """The cache would give the graph of before: raise GRAPH_VERSION, then renew the digest."""
    path = cached_onnx(TinyModel().write(tmp_path / "tiny.gguf"), cache_dir=tmp_path)
    graph = onnx.load(str(path), load_external_data=False).graph
    said: list[object] = []
    for node in graph.node:
        said.append((node.op_type, *node.input, *node.output))
        said += [(one.name, helper.get_attribute_value(one)) for one in node.attribute]
    for one in graph.initializer:
        said.append((one.name, *one.dims, *[place.value for place in one.external_data]))
        if not one.external_data:
            values = numpy_helper.to_array(one).ravel()
            said.append([f"{value:.9g}" for value in values])  # powers differ by the machine
    digest = hashlib.sha256(repr(said).encode()).hexdigest()
    assert (GRAPH_VERSION, digest[:16]) == (2, "3fe20891b6041158")


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


def test_forms_share_their_weights(tmp_path: Path) -> None:
    """One file under many names; one that is damaged is replaced, and the others stay whole."""
    gguf_path = TinyModel(head_dim=16, explicit_head_dim=True).write(tmp_path / "tiny.gguf")
    streaming = Scheme.named("streaming4")
    forms = (GroupedAttention(), QuantizedAttention(streaming, streaming))

    def weights() -> list[Path]:
        paths = [cached_onnx(gguf_path, cache_dir=tmp_path, attention=form) for form in forms]
        return [path.with_name("weights.bin") for path in paths]

    first, second = weights()
    assert first.samefile(second)
    alone = tmp_path / "alone"
    build_onnx(GGUFFile(gguf_path), alone, attention=forms[1])
    intact = {path.name: path.read_bytes() for path in alone.iterdir()}
    assert {path.name: path.read_bytes() for path in second.parent.iterdir()} == intact

    second.unlink()
    second.write_bytes(first.read_bytes()[:-1] + b"!")
    assert weights()[0].samefile(second)
    first.write_bytes(first.read_bytes()[:-1] + b"!")  # of both
    weights()
    assert first.read_bytes() == second.read_bytes() == intact["weights.bin"]


def test_where_the_users_folder_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built in a temporary folder, once a process; what the user's folder has is used."""
    gguf_path = TinyModel().write(tmp_path / "tiny.gguf")
    blocked = tmp_path / "blocked"
    blocked.write_bytes(b"not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    first = cached_onnx(gguf_path)
    assert tmp_path not in first.parents
    os.utime(first, (1, 1))
    assert cached_onnx(gguf_path) == first
    assert first.stat().st_mtime == 1
    with pytest.raises(OSError, match="blocked"):
        cached_onnx(gguf_path, cache_dir=blocked)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert tmp_path in cached_onnx(gguf_path).parents

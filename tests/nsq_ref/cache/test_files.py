"""Files of KVCache: as documented, whole or not at all, and nothing else is read."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from nsq_ref import KVCache, Scheme, files, quantize
from nsq_ref.files.containers import CACHE_FORMAT, read_container, write_container
from tests.support.cache_model import normals


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    cache = KVCache(2, 1, 4, Scheme(block_size=4), Scheme(block_size=8, sink_tokens=1))
    cache.append(*normals(2, 2, 1, 11, 4), lengths=[11, 2])
    cache.save(tmp_path / "cache.safetensors")
    return tmp_path / "cache.safetensors"


def rewritten(path: Path, change: Any) -> None:
    """Change a file and mend its checksum, as only a faulty or malicious writer would."""
    content, arrays = read_container(path, CACHE_FORMAT, lambda _: set(names_in(path)))
    change(content["cache"], arrays)
    write_container(path, CACHE_FORMAT, content, arrays)


def names_in(path: Path) -> list[str]:
    with safe_open(path, framework="np") as file:
        return list(file.keys())


def test_a_file_is_as_documented(saved: Path) -> None:
    """docs/cache.md, with nothing of ours: header, JSON, tensors and checksum."""
    whole = saved.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + size])
    description = json.loads(header.pop("__metadata__")["nsq"])
    digest = description.pop("sha256")
    compact = {"sort_keys": True, "separators": (",", ":")}
    checksum = hashlib.sha256(json.dumps(description, **compact).encode())
    names = {"F32": "float32", "F16": "float16", "U8": "uint8", "I32": "int32"}
    for name, tensor in sorted(header.items()):
        entry = [name, names[tensor["dtype"]], tensor["shape"]]
        checksum.update(json.dumps(entry, **compact).encode())
        begin, end = tensor["data_offsets"]
        checksum.update(whole[8 + size + begin : 8 + size + end])
    assert checksum.hexdigest() == digest
    assert (description["format"], description["spec"]) == ("nsq-cache-1", "NSQ-1")
    assert description["cache"]["lengths"] == [11, 2]
    assert description["cache"]["key"] == Scheme(block_size=4).to_dict()
    assert header.keys() == {
        "keys.0.packed", "keys.0.norm", "keys.0.scale", "keys.0.collapsed", "keys.0.tail",
        "values.0.packed", "values.0.norm", "values.0.scale", "values.0.collapsed",
        "values.0.tail", "values.0.sinks", "keys.1.tail", "values.1.sinks", "values.1.tail",
    }  # fmt: skip


def test_empty_caches_are_saved(tmp_path: Path) -> None:
    KVCache(2, 3, 4, dtype="float16").save(tmp_path / "a")
    loaded = KVCache.load(tmp_path / "a")
    assert (loaded.batch, loaded.kv_heads, len(loaded), loaded.dtype) == (2, 3, 0, np.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, a: c.update(lengths=[11]), r"'keys.1.tail' does not belong there"),
        (lambda c, a: c.update(lengths=[12, 2]), r"keys of row 0: tail is float32 \[1, 3, 4\]|'keys.0.*"),
        (lambda c, a: c.update(lengths=[10, 2]), "row 0: tail is float32"),
        (lambda c, a: c.update(lengths=[11, -2]), "lengths"),
        (lambda c, a: c.update(lengths=[11, 2.0]), "lengths"),
        (lambda c, a: c.update(lengths=[]), "lengths"),
        (lambda c, a: c.update(lengths=[10**30, 2]), "row 0|tensor"),
        (lambda c, a: c.update(kv_heads=2), "keys of row 0: .* stores"),
        (lambda c, a: c.update(kv_heads="1"), "kv_heads='1'"),
        (lambda c, a: c.update(head_dim=5), "keys of row 0"),
        (lambda c, a: c.update(value_head_dim=0), "value_head_dim=0"),
        (lambda c, a: c.update(dtype="float16"), "row 0: tail is float32"),
        (lambda c, a: c.update(dtype=None), "dtype is missing"),
        (lambda c, a: c.update(dtype=["float32"]), "dtype"),
        (lambda c, a: c.update(key=None), "a scheme has the fields"),
        (lambda c, a: c["key"].update(block_size=None), "key has block_size=None"),
        (lambda c, a: c["key"].update(bits=5), "bits=5"),
        (lambda c, a: c.pop("dtype"), "lacks or adds fields"),
        (lambda c, a: c.update(more=1), "lacks or adds fields"),
        (lambda c, a: a["keys.0.tail"].__setitem__((0, 0, 0), np.nan), "tail holds a value that is not finite"),
        (lambda c, a: a["values.0.sinks"].__setitem__((0, 0, 0), np.inf), "sinks holds a value that is not finite"),
        (lambda c, a: a["keys.0.packed"].__setitem__((0, 0, 0), 0), r"keys of row 0: codes\[0, 0, 0\] = -8, which is reserved"),
        (lambda c, a: a["keys.0.scale"].__setitem__((0, 0, 0), np.nan), "scale.* is not finite"),
        (lambda c, a: a["keys.0.norm"].__setitem__((0, 0), -1), "norm.* is negative"),
        (lambda c, a: a["keys.0.collapsed"].__setitem__(0, -1), "collapsed holds counts"),
        (lambda c, a: a["keys.0.collapsed"].__setitem__(0, 5), "collapsed holds counts"),
        (lambda c, a: a.pop("keys.0.norm"), "'keys.0.norm' is missing"),
        (lambda c, a: a.update({"keys.2.tail": a["keys.0.tail"]}), "'keys.2.tail' does not belong there"),
    ],
)  # fmt: skip
def test_files_that_no_cache_writes(saved: Path, change: Any, message: str) -> None:
    rewritten(saved, change)
    with pytest.raises(files.StorageError, match=message):
        KVCache.load(saved)


def test_damage_anywhere_is_found(saved: Path) -> None:
    whole = saved.read_bytes()
    for at in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        saved.write_bytes(damaged)
        with pytest.raises(files.StorageError):
            KVCache.load(saved)
    saved.write_bytes(whole[:-1])
    with pytest.raises(files.StorageError):
        KVCache.load(saved)


def test_the_two_kinds_of_file_know_each_other(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(files.StorageError, match=r"'nsq-cache-1', which nsq_ref.KVCache.load"):
        files.load(saved)
    files.save(tmp_path / "q", {"keys": quantize(normals(2, 4))})
    with pytest.raises(files.StorageError, match=r"which nsq_ref.files.load reads"):
        KVCache.load(tmp_path / "q")


def test_a_failed_save_leaves_the_old_file(saved: Path) -> None:
    whole = saved.read_bytes()
    cache = KVCache.load(saved)
    with pytest.raises(OSError, match="below"):
        cache.save(saved / "below")
    assert saved.read_bytes() == whole
    assert [*saved.parent.iterdir()] == [saved]

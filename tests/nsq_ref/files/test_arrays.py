"""Arrays that users bring: nothing damaged, hostile or odd gets in."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from nsq_ref import files
from nsq_ref.files import StorageError

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
    lambda name: name.isprintable() and name != "__metadata__"
)


@pytest.mark.parametrize("array", [np.ones(3, np.int8), np.ones(3, "V2"), ["x"], None])
def test_write_arrays_takes_float_arrays_only(array, tmp_path):
    with pytest.raises(TypeError, match=r"arrays\['k'\] has dtype .*; pass float32, float16"):
        files.write_arrays(tmp_path / "x", {"k": array})
    assert list(tmp_path.iterdir()) == []


# --- arrays that users bring --------------------------------------------------------------------

X = np.random.default_rng(1).standard_normal((3, 5), dtype=np.float32)


@given(
    names=st.lists(
        NAMES.map(lambda name: name.replace("/", "_")), min_size=1, max_size=3, unique=True
    ),
    dtype=st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32, np.float64]),
)
@settings(max_examples=50, deadline=None)
def test_written_arrays_come_back(names, dtype, tmp_path_factory):
    path = tmp_path_factory.mktemp("arrays") / "x.safetensors"
    arrays = {name: (X + i).astype(dtype) for i, name in enumerate(names)}
    files.write_arrays(path, arrays)
    read = files.read_arrays(path)
    assert sorted(read) == sorted(names)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", ">f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_files_come_back(dtype, order, tmp_path):
    x = np.asarray(X.astype(dtype), order=order)
    np.savez(tmp_path / "a.npz", **{"layers/0.k": x, "v": x[:0], "s": x[0, 0]})
    np.savez_compressed(tmp_path / "b.NPZ", k=x)
    (tmp_path / "b.NPZ.npz").rename(tmp_path / "b.NPZ")
    np.save(tmp_path / "keys.npy", x)
    read = files.read_arrays(tmp_path / "a.npz")
    assert list(read) == ["layers/0.k", "v", "s"]
    assert (read["v"].shape, read["s"].shape) == ((0, 5), ())
    for array in (
        read["layers/0.k"],
        files.read_arrays(tmp_path / "b.NPZ")["k"],
        files.read_arrays(tmp_path / "keys.npy")["keys"],
    ):
        assert array.dtype == x.dtype
        np.testing.assert_array_equal(array, x)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
def test_a_damaged_npz_is_refused_or_reads_the_same(save, tmp_path):
    path = tmp_path / "x.npz"
    save(path, k=X)
    whole = path.read_bytes()
    refused = 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read = files.read_arrays(path)
        except StorageError:
            refused += 1
        else:  # a date, an attribute: what zip stores and no one reads
            assert list(read) == ["k"]
            assert read["k"].tobytes() == X.tobytes()
    assert refused > 4 * len(whole)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(StorageError):
            files.read_arrays(path)


def test_a_npy_cut_anywhere_or_continued_is_refused(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, X)
    whole = path.read_bytes()
    for damaged in [whole[:size] for size in range(len(whole))] + [whole + b"\0"]:
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match=r"x\.npy"):
            files.read_arrays(path)


def npy(descr: str = "<f4", shape: object = (2, 2), data: bytes = b"", header: str = "") -> bytes:
    text = header or str({"descr": descr, "fortran_order": False, "shape": shape})
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + data


NPY = {
    "pickle": (pickle.dumps([1.0]), "(no .npy array|is a pickle)"),
    "more than there is": (npy(shape=(2**40, 2**10)), "copy it again"),
    "overflow": (npy(shape=(2**62, 2**62)), "copy it again"),
    "negative": (npy(shape=(-1, -1)), "copy it again"),
    "negative, and the size fits": (npy(shape=(-2, -2), data=b"\0" * 16), "not what its"),
    "integers": (npy("<i4", data=b"\0" * 16), "is int32, not float16"),
    "complex": (npy("<c8", data=b"\0" * 32), "is complex64, not float16"),
    "bfloat16": (npy("<V2", data=b"\0" * 8), "save bfloat16, which .npy cannot name"),
    "long double": (npy("<f16", data=b"\0" * 64), "not float16"),
    "fields": (npy([("a", "<f4")], data=b"\0" * 16), "not float16"),
    "objects": (npy("|O", data=pickle.dumps([1.0] * 4)), "holds Python objects"),
    "deep": (npy(header="[" * 5000), "no .npy array"),
    "long": (npy(header="1" * 20000), "no .npy array"),
    "unary": (npy(header="-" * 9000 + "1"), "no .npy array"),
    "code": (npy(header="__import__('os').abort()"), "no .npy array"),
    "version 3": (npy().replace(b"\1\0", b"\3\0", 1), "version"),
    "version 9": (npy().replace(b"\1\0", b"\t\0", 1), "version"),
}


@pytest.mark.parametrize(("content", "message"), NPY.values(), ids=NPY.keys())
def test_hostile_npy_is_refused_alone_and_in_a_zip(content, message, tmp_path):
    (tmp_path / "x.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("k.npy", content)
    with pytest.raises(StorageError, match=rf"x\.npy.*{message}"):
        files.read_arrays(tmp_path / "x.npy")
    with pytest.raises(StorageError, match=rf"x\.npz: array 'k'.*{message}"):
        files.read_arrays(tmp_path / "x.npz")


class Explosive:
    def __reduce__(self):
        return (os.mkdir, ("pickle-was-run",))


def test_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects = np.array([Explosive()], dtype=object)
    np.save("x.npy", objects)
    np.savez("x.npz", k=objects)
    Path("y.npy").write_bytes(pickle.dumps(Explosive()))
    Path("y.npz").write_bytes(pickle.dumps(Explosive()))
    for name in ("x.npy", "x.npz", "y.npy", "y.npz"):
        with pytest.raises(StorageError, match=name):
            files.read_arrays(name)
    assert not Path("pickle-was-run").exists()


def as_npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def zip_with(
    path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED
) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore")  # of duplicate names
        for name, content in members:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("members", "method", "message"),
    [
        ([], zipfile.ZIP_STORED, "holds no arrays"),
        ([("k.npy", as_npy(X))] * 2, zipfile.ZIP_STORED, "array 'k' stands twice"),
        ([("readme.txt", b"hello")], zipfile.ZIP_STORED, "'readme.txt' is no .npy file"),
        ([("\x1b[2J.npy", as_npy(X))], zipfile.ZIP_STORED, "must be printable"),
        ([(".npy", as_npy(X))], zipfile.ZIP_STORED, "must be printable"),
        ([("k.npy", as_npy(X))], zipfile.ZIP_BZIP2, "neither stored nor deflated"),
        ([("k.npy", as_npy(X))], zipfile.ZIP_LZMA, "neither stored nor deflated"),
    ],
)
def test_odd_zip_files_are_refused(members, method, message, tmp_path):
    path = zip_with(tmp_path / "x.npz", members, method)
    with pytest.raises(StorageError, match=rf"x\.npz.*{message}"):
        files.read_arrays(path)


def patch_central(path: Path, offset: int, value: bytes) -> None:
    """Overwrite a field of the first entry of the central directory."""
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\1\2") + offset
    data[start : start + len(value)] = value
    path.write_bytes(data)


BOMB = """
import resource, sys
import numpy as np
from nsq_ref import files
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    files.read_arrays(sys.argv[1])
except files.StorageError as error:
    sys.exit(f"StorageError: {error}")
"""


@pytest.mark.parametrize("directory_agrees", [False, True])
def test_a_zip_bomb_is_refused_before_memory_is_taken(directory_agrees, tmp_path):
    """16 MiB of zeros under a header of 4 GiB; then a zip that says the same as the header."""
    path = tmp_path / "x.npz"
    header = npy(shape=(2**30 - 33, 1))
    content = header + bytes(2**24)
    zip_with(path, [("k.npy", content)], zipfile.ZIP_DEFLATED)
    if directory_agrees:
        patch_central(path, 24, struct.pack("<I", len(header) + 4 * (2**30 - 33)))
    command = [sys.executable, "-c", BOMB, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    expected = "larger than it can be" if directory_agrees else "not what its shape"
    assert done.stderr.startswith("StorageError")
    assert expected in done.stderr


def test_members_that_overlap_are_refused(tmp_path):
    path = zip_with(tmp_path / "x.npz", [("k.npy", as_npy(X))])
    patch_central(path, 20, struct.pack("<II", 10**6, 10**6))
    with pytest.raises(StorageError, match="overlap or end beyond"):
        files.read_arrays(path)


def test_an_encrypted_member_is_refused(tmp_path):
    path = zip_with(tmp_path / "x.npz", [("k.npy", as_npy(X))])
    patch_central(path, 8, b"\1")
    with pytest.raises(StorageError, match="is encrypted; write it with"):
        files.read_arrays(path)


@pytest.mark.parametrize("name", ["x.txt", "x", "x.npy.gz", ".npz"])
def test_other_endings_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"no arrays")
    with pytest.raises(StorageError, match=r"must end in \.npz, \.npy or \.safetensors"):
        files.read_arrays(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.bool_])
def test_safetensors_of_other_dtypes_are_refused(dtype, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"k": np.ones((2, 2), dtype)}, path)
    with pytest.raises(StorageError, match=r"array 'k' is .*, not one of F16, BF16, F32, F64"):
        files.read_arrays(path)
    save_file({}, path)
    with pytest.raises(StorageError, match="holds no arrays"):
        files.read_arrays(path)

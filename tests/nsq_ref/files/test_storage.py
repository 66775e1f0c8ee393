"""The container, and the reading of what users bring: nothing damaged, hostile or odd gets in."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nsq_ref.storage import StorageError
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nsq_ref import SPEC_VERSION, Quantized, Scheme, dequantize, packing, quantize, storage

FLOATS = ("float16", "bfloat16", "float32")
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
    lambda name: name.isprintable() and name != "__metadata__"
)


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    separate_norm = draw(st.booleans())
    return Scheme(
        bits=draw(st.sampled_from([2, 3, 4, 8])),
        separate_norm=separate_norm,
        axis=draw(st.sampled_from(["channel", "token"])),
        symmetric=draw(st.booleans()),
        scale_rule=draw(st.sampled_from(["range", "search"])),
        magnitude=draw(st.sampled_from(["norm", "gain", "lsq"])) if separate_norm else "norm",
        block_size=draw(st.sampled_from([None, 1, 3])),
        sink_tokens=draw(st.sampled_from([0, 1, 9])),
        outlier_channels=draw(st.sampled_from([0, 1, 9])),
        scale_dtype=draw(st.sampled_from(FLOATS)),
        norm_dtype=draw(st.sampled_from(FLOATS)) if separate_norm else "float16",
    )


@st.composite
def quantized_arrays(draw: st.DrawFn) -> Quantized:
    lead = draw(st.sampled_from([(), (2,), (1, 2)]))
    shape = (*lead, draw(st.integers(1, 5)), draw(st.integers(1, 9)))
    x = np.random.default_rng(draw(st.integers(0, 99))).standard_normal(shape, dtype=np.float32)
    x[..., 0, :] *= draw(st.sampled_from([0, 1]))
    dtype = DTYPES[draw(st.sampled_from(FLOATS))]
    return quantize(x.astype(dtype), draw(schemes()), backend="numpy")


def assert_same(loaded: Quantized, saved: Quantized) -> None:
    for field in ("scheme", "shape", "dtype", "collapsed_tokens"):
        assert getattr(loaded, field) == getattr(saved, field)
    assert list(loaded.parts) == list(saved.parts)
    for name, part in saved.parts.items():
        assert loaded.parts[name].dtype == part.dtype
        assert loaded.parts[name].shape == part.shape
        assert loaded.parts[name].tobytes() == part.tobytes()


def example(scheme: Scheme | None = None, shape: tuple[int, ...] = (5, 8)) -> Quantized:
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return quantize(x, scheme or Scheme(), backend="numpy")


def write_raw(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


# --- round trips --------------------------------------------------------------------------------


@given(arrays=st.dictionaries(NAMES, quantized_arrays(), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_every_scheme_comes_back(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("trip") / "cache.safetensors"
    storage.save(path, arrays)
    loaded = storage.load(path)
    assert loaded.keys() == arrays.keys()
    for name, quantized in arrays.items():
        assert_same(loaded[name], quantized)
        expected = dequantize(quantized, backend="numpy")
        np.testing.assert_array_equal(dequantize(loaded[name], backend="numpy"), expected)


def test_parts_without_elements_come_back(tmp_path):
    scheme = Scheme(sink_tokens=9, outlier_channels=2, symmetric=False)
    saved = example(scheme, (2, 4, 5))
    assert saved.packed.size == 0
    storage.save(tmp_path / "a", {"keys": saved})
    assert_same(storage.load(tmp_path / "a")["keys"], saved)


def test_a_file_is_plain_safetensors_with_the_documented_names(tmp_path):
    path = tmp_path / "cache.safetensors"
    storage.save(path, {"keys": example(), "values": example(Scheme(scale_dtype="bfloat16"))})
    tensors = load_file(path)
    assert sorted(tensors) == [
        f"{n}.{p}" for n in ("keys", "values") for p in ("norm", "packed", "scale")
    ]
    assert tensors["values.scale"].dtype == ml_dtypes.bfloat16
    with safe_open(path, framework="np") as file:
        metadata = json.loads(file.metadata()["nsq"])
    assert metadata["spec"] == SPEC_VERSION
    assert metadata["format"] == "nsq-safetensors-1"
    assert metadata["tensors"]["keys"]["shape"] == [5, 8]
    assert Scheme.from_dict(metadata["tensors"]["keys"]["scheme"]) == Scheme()


def test_equal_arrays_give_equal_files(tmp_path):
    arrays = {"keys": example(), "values": example()}
    storage.save(tmp_path / "a", arrays)
    storage.save(tmp_path / "b", dict(reversed(arrays.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_parts_of_any_memory_order_are_saved_as_what_they_are(tmp_path):
    saved = example(shape=(3, 5, 8))
    reordered = {name: np.asfortranarray(part) for name, part in saved.parts.items()}
    storage.save(tmp_path / "a", {"keys": replace(saved, **reordered)})
    assert_same(storage.load(tmp_path / "a")["keys"], saved)


def test_the_checksum_covers_name_dtype_shape_and_bytes():
    part = np.arange(4, dtype=np.float16).reshape(2, 2)
    variants = [
        ({"v": 1}, {"a": part}),
        ({"v": 2}, {"a": part}),
        ({"v": 1}, {"b": part}),
        ({"v": 1}, {"a": part.view(np.int16)}),
        ({"v": 1}, {"a": part.reshape(4, 1)}),
        ({"v": 1}, {"a": -part}),
        ({"v": 1}, {"a": part, "b": part[:0]}),
    ]
    assert len({storage._digest(*variant) for variant in variants}) == len(variants)


# --- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "a"
    scheme = Scheme(bits=3, sink_tokens=1, outlier_channels=1, scale_dtype="bfloat16")
    storage.save(path, {"k": example(scheme, (3, 5))})
    return path.read_bytes()


def test_every_single_bit_flip_is_refused(small, tmp_path):
    path = tmp_path / "damaged"
    accepted = []
    for bit in range(8 * len(small)):
        damaged = bytearray(small)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            storage.load(path)
        except StorageError:
            continue
        accepted.append(bit)
    assert accepted == []


def test_a_file_cut_anywhere_or_continued_is_refused(small, tmp_path):
    path = tmp_path / "damaged"
    for damaged in [small[:size] for size in range(len(small))] + [small + b"\0"]:
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match="copy it again"):
            storage.load(path)


@given(data=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_garbage_is_refused(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("garbage") / "x.safetensors"
    path.write_bytes(data)
    for read in (storage.load, storage.read_arrays):
        with pytest.raises(StorageError):
            read(path)


ENTRY = b'"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
HOSTILE_HEADERS = {
    "huge shape": b'{"a":{"dtype":"F32","shape":[4294967295,4294967295],"data_offsets":[0,4]}}',
    "overflowing shape": b'{"a":{"dtype":"U8","shape":[%d,16],"data_offsets":[0,0]}}' % 2**60,
    "negative shape": b'{"a":{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}}',
    "overlapping": b"{%s,%s}" % (ENTRY, ENTRY.replace(b'"a"', b'"b"')),
    "hole": b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
    "backwards": b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}',
    "beyond": b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}',
    "unknown dtype": ENTRY.replace(b"U8", b"U9").join([b"{", b"}"]),
    "twice the same": b"{%s,%s}" % (ENTRY, ENTRY),
    "twice metadata": b'{"__metadata__":{"nsq":"1"},"__metadata__":{"nsq":"2"},%s}' % ENTRY,
    "twice in metadata": b'{"__metadata__":{"nsq":"1","nsq":"2"},%s}' % ENTRY,
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "not an object": b"[]",
    "metadata not text": b'{"__metadata__":{"nsq":{}},%s}' % ENTRY,
    "not UTF-8": b'{"\xff":{}}',
}


@pytest.mark.parametrize("header", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS.keys())
def test_hostile_headers_are_refused(header, tmp_path):
    path = write_raw(tmp_path / "x.safetensors", header, b"\1\2\3\4")
    for read in (storage.load, storage.read_arrays, storage.is_quantized):
        with pytest.raises(StorageError, match=r"x\.safetensors.*copy it again"):
            read(path)


def test_a_huge_header_length_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(StorageError, match="no safetensors file"):
        storage.load(path)


# --- files that are whole, but that no encoder writes -------------------------------------------


def forge(path: Path, saved: Quantized, change=None, **parts: np.ndarray) -> Path:
    """Write a file with other parts or metadata, and with a checksum that holds."""
    arrays = {f"keys.{n}": np.ascontiguousarray(p) for n, p in {**saved.parts, **parts}.items()}
    storage.save(path, {"keys": saved})
    with safe_open(path, framework="np") as file:
        description = json.loads(file.metadata()["nsq"])
    del description["sha256"]
    if change:
        change(description, arrays)
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    digest = storage._digest(description, arrays)
    text = json.dumps({**description, "sha256": digest}, sort_keys=True, separators=(",", ":"))
    save_file(arrays, path, {"nsq": text})
    return path


def test_forging_nothing_gives_a_good_file(tmp_path):
    saved = example()
    assert_same(storage.load(forge(tmp_path / "a", saved))["keys"], saved)


def set_path(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(description, _):
        for key in keys:
            description = description[key]
        description[last] = value

    return change


def drop_norm(_, arrays):
    del arrays["keys.norm"]


def add_tensor(_, arrays):
    arrays["values.norm"] = arrays["keys.norm"]


def deep(description, _):
    nested: list = []
    for _depth in range(500):
        nested = [nested]
    description["tensors"]["keys"]["shape"] = nested


METADATA = {
    "format": (set_path("format", "other-2"), r"format is 'other-2' .* reads 'nsq-safetensors-1'"),
    "spec": (set_path("spec", "NSQ-2"), r"spec is 'NSQ-2' and this library reads 'NSQ-1'"),
    "no tensors": (set_path("tensors", []), "lacks or adds fields"),
    "extra field": (set_path("more", 1), "lacks or adds fields"),
    "entry": (set_path("tensors", "keys", 7), "must have the fields collapsed_tokens, dtype"),
    "name": (set_path("tensors", "\x1b[31m", {}), "must be printable"),
    "missing tensor": (drop_norm, r"'keys\.norm' is missing"),
    "extra tensor": (add_tensor, r"'values\.norm' does not belong"),
    "another shape": (set_path("tensors", "keys", "shape", [4, 8]), r"packed is uint8 \[5, 4\]"),
    "huge shape": (set_path("tensors", "keys", "shape", [10**30, 8]), r"packed is uint8 \[5, 4\]"),
    "empty shape": (set_path("tensors", "keys", "shape", [0, 8]), "positive integers"),
    "float shape": (set_path("tensors", "keys", "shape", [5.0, 8]), "positive integers"),
    "bool shape": (set_path("tensors", "keys", "shape", [True, 8]), "positive integers"),
    "one axis": (set_path("tensors", "keys", "shape", [8]), "at least two"),
    "text shape": (set_path("tensors", "keys", "shape", "58"), "at least two"),
    "deep shape": (deep, "at least two"),
    "dtype": (set_path("tensors", "keys", "dtype", "float64"), "not one of float16"),
    "list dtype": (set_path("tensors", "keys", "dtype", ["float32"]), "not one of float16"),
    "bits": (set_path("tensors", "keys", "scheme", "bits", 5), "bits=5 is not supported"),
    "scheme": (set_path("tensors", "keys", "scheme", {}), "a scheme has the fields"),
    "text scheme": (set_path("tensors", "keys", "scheme", "nsep4"), "a scheme has the fields"),
    "collapsed": (set_path("tensors", "keys", "collapsed_tokens", 6), "collapsed_tokens is 6"),
    "negative": (set_path("tensors", "keys", "collapsed_tokens", -1), "collapsed_tokens=-1"),
    "bool count": (set_path("tensors", "keys", "collapsed_tokens", True), "collapsed_tokens=True"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), METADATA.values(), ids=METADATA.keys())
def test_metadata_that_does_not_fit_is_refused(change, message, tmp_path):
    path = forge(tmp_path / "x.safetensors", example(), change)
    with pytest.raises(StorageError, match=rf"x\.safetensors.*{message}"):
        storage.load(path)


@pytest.mark.parametrize(
    "text", ["", "{", "7", "[" * 100_000, '{"format":1,"format":2}', "NaN", "9" * 5000]
)
def test_metadata_that_is_no_description_is_refused(text, tmp_path):
    save_file({"a": np.zeros(1)}, tmp_path / "x", {"nsq": text})
    with pytest.raises(StorageError, match="metadata 'nsq'"):
        storage.load(tmp_path / "x")


def test_metadata_in_another_spelling_is_refused(tmp_path):
    storage.save(tmp_path / "x", {"keys": example()})
    tensors = load_file(tmp_path / "x")
    with safe_open(tmp_path / "x", framework="np") as file:
        text = file.metadata()["nsq"]
    save_file(tensors, tmp_path / "x", {"nsq": text + " "})
    with pytest.raises(StorageError, match="not as written"):
        storage.load(tmp_path / "x")


def test_plain_safetensors_are_told_apart(tmp_path):
    path = tmp_path / "plain.safetensors"
    storage.write_arrays(path, {"keys": np.ones((2, 2), np.float32)})
    assert not storage.is_quantized(path)
    with pytest.raises(StorageError, match="nsq quantize"):
        storage.load(path)
    storage.save(path, {"keys": example()})
    assert storage.is_quantized(path)
    with pytest.raises(StorageError, match="nsq dequantize"):
        storage.read_arrays(path)


def put(part: np.ndarray, index, value) -> np.ndarray:
    changed = part.copy()
    changed[index] = value
    return changed


def contents():
    """Name, scheme, D, part, index, value and message of each impossible value."""
    asymmetric = Scheme(symmetric=False)
    outliers = Scheme(outlier_channels=2)
    float32 = Scheme(scale_dtype="float32", norm_dtype="float32", magnitude="gain")
    for value in (np.nan, np.inf, -np.inf):
        yield "norm", Scheme(), 8, "norm", (2,), value, r"norm\[2\] = -?\w+ is not finite"
        yield "scale", Scheme(), 8, "scale", (0, 3), value, r"scale\[0, 3\] = -?\w+ is not finite"
        yield "zero", asymmetric, 8, "zero", (0, 1), value, r"zero\[0, 1\] = -?\w+ is not"
        yield "outliers", outliers, 8, "outliers", (4, 1), value, r"outliers\[4, 1\] = "
        yield "sinks", Scheme(sink_tokens=2), 8, "sinks", (1, 7), value, r"sinks\[1, 7\] = "
        bfloat16 = Scheme(scale_dtype="bfloat16")
        yield "bfloat16", bfloat16, 8, "scale", (0, 3), value, r"scale\[0, 3\] = -?\w+ is not"
    yield "negative norm", Scheme(), 8, "norm", (1,), -1, r"norm\[1\] = -1.0 is negative"
    gain = Scheme(magnitude="gain")
    yield "negative gain", gain, 8, "norm", (1,), -1, r"norm\[1\] = -1.0 is negative"
    yield "negative scale", Scheme(), 8, "scale", (0, 1), -1, r"scale\[0, 1\] = -1.0 is negative"
    yield "index", outliers, 8, "outlier_index", (0, 1), 8, r"outlier_index\[0, 1\] = 8 is no"
    yield "below 0", outliers, 8, "outlier_index", (0, 0), -1, r"outlier_index\[0, 0\] = -1 is no"
    yield "order", outliers, 8, "outlier_index", (0, 0), 7, r"outlier_index\[0, 1\] = \d does not"
    yield "overflow", float32, 8, "scale", (0, 1), 3e38, r"decoded x\[\d, 1\] = -?inf is beyond"
    for bits, head_dim, byte in ((2, 8, 0b10101100), (4, 8, 0x08), (8, 8, 0), (2, 5, 0b10101100)):
        codes = r"codes\[3, \d\] = -\d+, which is reserved"
        yield f"reserved{bits}", Scheme(bits=bits), head_dim, "packed", (3, 1), byte, codes
    yield "reserved3", Scheme(bits=3), 8, "packed", (3,), 0, r"codes\[3, 0\] = -4, which is"
    for scheme in (Scheme(bits=4), asymmetric):
        yield "padding", scheme, 5, "packed", (3, 2), 0xF9, r"packed\[3\] is not padded with code 0"
    yield "padding2", Scheme(bits=2), 5, "packed", (3, 1), 0xF6, r"packed\[3\] is not padded"
    # One row of two bits and one row of one bit, each with its own padding (P1).
    yield "padding3 low", Scheme(bits=3), 5, "packed", (3, 1), 0xF5, r"packed\[3\] is not padded"
    yield "padding3 high", Scheme(bits=3), 5, "packed", (3, 2), 0x1F, r"packed\[3\] is not padded"


CONTENTS = list(contents())


@pytest.mark.parametrize("case", CONTENTS, ids=[case[0] for case in CONTENTS])
def test_values_that_no_encoder_writes_are_refused(case, tmp_path):
    _, scheme, head_dim, part, index, value, message = case
    saved = example(scheme, (5, head_dim))
    changed = put(saved.parts[part], index, value)
    path = forge(tmp_path / "x.safetensors", saved, **{part: changed})
    with pytest.raises(StorageError, match=rf"x\.safetensors: 'keys': {message}"):
        storage.load(path)
    with pytest.raises(ValueError, match=rf"tensors\['keys'\]: {message}"):
        storage.save(tmp_path / "y", {"keys": replace(saved, **{part: changed})})
    assert not (tmp_path / "y").exists()


def test_what_only_some_schemes_may_store_is_accepted(tmp_path):
    lsq = example(Scheme(magnitude="lsq"))
    asymmetric = example(Scheme(symmetric=False))
    saved = {
        "lsq": replace(lsq, norm=-lsq.norm),
        "asymmetric": replace(asymmetric, scale=-asymmetric.scale),
    }
    storage.save(tmp_path / "a", saved)
    for name, loaded in storage.load(tmp_path / "a").items():
        assert_same(loaded, saved[name])


@pytest.mark.parametrize(
    ("bits", "head_dim", "byte", "fault"),
    [(bits, 64, 0, r", 0\] = .* reserved") for bits in (2, 3, 4, 8)]
    + [(4, 63, 0x18, r"\] is not padded")],
)
def test_a_fault_beyond_the_first_slab_is_found_where_it_is(bits, head_dim, byte, fault, tmp_path):
    scheme = Scheme(bits=bits, separate_norm=False)
    shape = (2, storage.SLAB_CODES // head_dim, head_dim)
    packed = packing.pack(np.zeros(shape, np.int8), scheme)
    packed[1, -5, -1 if byte else slice(None)] = byte
    scale = np.ones((2, 1, head_dim), np.float16)
    saved = Quantized(scheme, shape, np.dtype(np.float32), packed, scale)
    with pytest.raises(ValueError, match=rf"\[1, {shape[1] - 5}{fault}"):
        storage.save(tmp_path / "x", {"keys": saved})


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({}, ValueError, "tensors is empty"),
        ([1], TypeError, "must map names to Quantized, got list"),
        ({"keys": np.ones(3)}, TypeError, r"tensors\['keys'\] must be what quantize returns"),
        ({7: None}, TypeError, "array names are strings, got 7"),
        ({"": None}, ValueError, "must be printable"),
        ({"\ud800": None}, ValueError, "must be printable"),
        ({"__metadata__": None}, ValueError, "not '__metadata__'"),
    ],
)
def test_save_names_what_is_wrong(tensors, error, message, tmp_path):
    with pytest.raises(error, match=message):
        storage.save(tmp_path / "x", tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("array", [np.ones(3, np.int8), np.ones(3, "V2"), ["x"], None])
def test_write_arrays_takes_float_arrays_only(array, tmp_path):
    with pytest.raises(TypeError, match=r"arrays\['k'\] has dtype .*; pass float32, float16"):
        storage.write_arrays(tmp_path / "x", {"k": array})
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
import numpy as np
from nsq_ref import Scheme, quantize, storage
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
x = np.ones((64, 64), np.float32)
try:
    if sys.argv[2] == "save":
        storage.save(sys.argv[1], {"k": quantize(x, backend="numpy")})
    else:
        storage.write_arrays(sys.argv[1], {"k": x})
except OSError as error:
    sys.exit(f"OSError: {error}")
"""


@pytest.mark.parametrize("function", ["save", "write_arrays"])
@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_write_that_fails_changes_nothing(function, before, tmp_path):
    path = tmp_path / "cache.safetensors"
    if before is not None:
        path.write_bytes(before)
    command = [sys.executable, "-c", LIMITED, str(path), function]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "OSError" in done.stderr
    assert str(path) in done.stderr
    assert "File too large" in done.stderr
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_errors_of_the_file_system_stay_what_they_are(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    arrays = {"k": np.ones((2, 2), np.float32)}
    for path, error in (
        (tmp_path / "none" / "x.safetensors", FileNotFoundError),
        (tmp_path / "file" / "x.safetensors", NotADirectoryError),
    ):
        with pytest.raises(error) as caught:
            storage.write_arrays(path, arrays)
        assert caught.value.filename == str(path)
        for read in (storage.load, storage.read_arrays):
            with pytest.raises(error):
                read(path)
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(FileExistsError, match="not a regular file"):
        storage.write_arrays(folder, arrays)
    with pytest.raises(IsADirectoryError):
        storage.load(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.safetensors"]


def test_a_link_keeps_pointing_and_a_file_is_replaced(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"old")
    os.symlink("a.safetensors", tmp_path / "b.safetensors")
    storage.write_arrays(tmp_path / "b.safetensors", {"k": np.ones((2, 2), np.float32)})
    assert (tmp_path / "b.safetensors").is_symlink()
    assert list(storage.read_arrays(tmp_path / "a.safetensors")) == ["k"]


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
    storage.write_arrays(path, arrays)
    read = storage.read_arrays(path)
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
    read = storage.read_arrays(tmp_path / "a.npz")
    assert list(read) == ["layers/0.k", "v", "s"]
    assert (read["v"].shape, read["s"].shape) == ((0, 5), ())
    for array in (
        read["layers/0.k"],
        storage.read_arrays(tmp_path / "b.NPZ")["k"],
        storage.read_arrays(tmp_path / "keys.npy")["keys"],
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
            read = storage.read_arrays(path)
        except StorageError:
            refused += 1
        else:  # a date, an attribute: what zip stores and no one reads
            assert list(read) == ["k"]
            assert read["k"].tobytes() == X.tobytes()
    assert refused > 4 * len(whole)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(StorageError):
            storage.read_arrays(path)


def test_a_npy_cut_anywhere_or_continued_is_refused(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, X)
    whole = path.read_bytes()
    for damaged in [whole[:size] for size in range(len(whole))] + [whole + b"\0"]:
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match=r"x\.npy"):
            storage.read_arrays(path)


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
        storage.read_arrays(tmp_path / "x.npy")
    with pytest.raises(StorageError, match=rf"x\.npz: array 'k'.*{message}"):
        storage.read_arrays(tmp_path / "x.npz")


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
            storage.read_arrays(name)
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
        storage.read_arrays(path)


def patch_central(path: Path, offset: int, value: bytes) -> None:
    """Overwrite a field of the first entry of the central directory."""
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\1\2") + offset
    data[start : start + len(value)] = value
    path.write_bytes(data)


BOMB = """
import resource, sys
import numpy as np
from nsq_ref import storage
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    storage.read_arrays(sys.argv[1])
except storage.StorageError as error:
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
        storage.read_arrays(path)


def test_an_encrypted_member_is_refused(tmp_path):
    path = zip_with(tmp_path / "x.npz", [("k.npy", as_npy(X))])
    patch_central(path, 8, b"\1")
    with pytest.raises(StorageError, match="is encrypted; write it with"):
        storage.read_arrays(path)


@pytest.mark.parametrize("name", ["x.txt", "x", "x.npy.gz", ".npz"])
def test_other_endings_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"no arrays")
    with pytest.raises(StorageError, match=r"must end in \.npz, \.npy or \.safetensors"):
        storage.read_arrays(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.bool_])
def test_safetensors_of_other_dtypes_are_refused(dtype, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"k": np.ones((2, 2), dtype)}, path)
    with pytest.raises(StorageError, match=r"array 'k' is .*, not one of F16, BF16, F32, F64"):
        storage.read_arrays(path)
    save_file({}, path)
    with pytest.raises(StorageError, match="holds no arrays"):
        storage.read_arrays(path)

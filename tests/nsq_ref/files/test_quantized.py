"""Files of quantized arrays: nothing damaged, hostile or odd gets in."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nsq_ref import SPEC_VERSION, Scheme, dequantize, files
from nsq_ref.files import StorageError, containers
from tests.support.containers import assert_same, example, forge, quantized_arrays

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
    lambda name: name.isprintable() and name != "__metadata__"
)


def write_raw(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


# --- round trips --------------------------------------------------------------------------------


@given(arrays=st.dictionaries(NAMES, quantized_arrays(), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_every_scheme_comes_back(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("trip") / "cache.safetensors"
    files.save(path, arrays)
    loaded = files.load(path)
    assert loaded.keys() == arrays.keys()
    for name, quantized in arrays.items():
        assert_same(loaded[name], quantized)
        expected = dequantize(quantized, backend="numpy")
        np.testing.assert_array_equal(dequantize(loaded[name], backend="numpy"), expected)


def test_parts_without_elements_come_back(tmp_path):
    scheme = Scheme(sink_tokens=9, outlier_channels=2, symmetric=False)
    saved = example(scheme, (2, 4, 5))
    assert saved.packed.size == 0
    files.save(tmp_path / "a", {"keys": saved})
    assert_same(files.load(tmp_path / "a")["keys"], saved)


def test_a_file_is_plain_safetensors_with_the_documented_names(tmp_path):
    path = tmp_path / "cache.safetensors"
    files.save(path, {"keys": example(), "values": example(Scheme(scale_dtype="bfloat16"))})
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
    files.save(tmp_path / "a", arrays)
    files.save(tmp_path / "b", dict(reversed(arrays.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_parts_of_any_memory_order_are_saved_as_what_they_are(tmp_path):
    saved = example(shape=(3, 5, 8))
    reordered = {name: np.asfortranarray(part) for name, part in saved.parts.items()}
    files.save(tmp_path / "a", {"keys": replace(saved, **reordered)})
    assert_same(files.load(tmp_path / "a")["keys"], saved)


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
    assert len({containers._digest(*variant) for variant in variants}) == len(variants)


# --- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "a"
    scheme = Scheme(bits=3, sink_tokens=1, outlier_channels=1, scale_dtype="bfloat16")
    files.save(path, {"k": example(scheme, (3, 5))})
    return path.read_bytes()


def test_every_single_bit_flip_is_refused(small, tmp_path):
    path = tmp_path / "damaged"
    accepted = []
    for bit in range(8 * len(small)):
        damaged = bytearray(small)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            files.load(path)
        except StorageError:
            continue
        accepted.append(bit)
    assert accepted == []


def test_a_file_cut_anywhere_or_continued_is_refused(small, tmp_path):
    path = tmp_path / "damaged"
    for damaged in [small[:size] for size in range(len(small))] + [small + b"\0"]:
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match="copy it again"):
            files.load(path)


@given(data=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_garbage_is_refused(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("garbage") / "x.safetensors"
    path.write_bytes(data)
    for read in (files.load, files.read_arrays):
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
    for read in (files.load, files.read_arrays, files.is_quantized):
        with pytest.raises(StorageError, match=r"x\.safetensors.*copy it again"):
            read(path)


def test_a_huge_header_length_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(StorageError, match="no safetensors file"):
        files.load(path)


# --- files that are whole, but that no encoder writes -------------------------------------------


def test_forging_nothing_gives_a_good_file(tmp_path):
    saved = example()
    assert_same(files.load(forge(tmp_path / "a", saved))["keys"], saved)


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
        files.load(path)


@pytest.mark.parametrize(
    "text", ["", "{", "7", "[" * 100_000, '{"format":1,"format":2}', "NaN", "9" * 5000]
)
def test_metadata_that_is_no_description_is_refused(text, tmp_path):
    save_file({"a": np.zeros(1)}, tmp_path / "x", {"nsq": text})
    with pytest.raises(StorageError, match="metadata 'nsq'"):
        files.load(tmp_path / "x")


def test_metadata_in_another_spelling_is_refused(tmp_path):
    files.save(tmp_path / "x", {"keys": example()})
    tensors = load_file(tmp_path / "x")
    with safe_open(tmp_path / "x", framework="np") as file:
        text = file.metadata()["nsq"]
    save_file(tensors, tmp_path / "x", {"nsq": text + " "})
    with pytest.raises(StorageError, match="not as written"):
        files.load(tmp_path / "x")


def test_plain_safetensors_are_told_apart(tmp_path):
    path = tmp_path / "plain.safetensors"
    files.write_arrays(path, {"keys": np.ones((2, 2), np.float32)})
    assert not files.is_quantized(path)
    with pytest.raises(StorageError, match="nsq quantize"):
        files.load(path)
    files.save(path, {"keys": example()})
    assert files.is_quantized(path)
    with pytest.raises(StorageError, match="nsq dequantize"):
        files.read_arrays(path)


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
        files.save(tmp_path / "x", tensors)
    assert list(tmp_path.iterdir()) == []

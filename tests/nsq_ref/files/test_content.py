"""Files that are whole, but hold values that no encoder writes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nsq_ref import Quantized, Scheme, files, packing
from nsq_ref.files import StorageError, content
from tests.support.containers import assert_same, example, forge


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
        files.load(path)
    with pytest.raises(ValueError, match=rf"tensors\['keys'\]: {message}"):
        files.save(tmp_path / "y", {"keys": replace(saved, **{part: changed})})
    assert not (tmp_path / "y").exists()


def test_what_only_some_schemes_may_store_is_accepted(tmp_path):
    lsq = example(Scheme(magnitude="lsq"))
    asymmetric = example(Scheme(symmetric=False))
    saved = {
        "lsq": replace(lsq, norm=-lsq.norm),
        "asymmetric": replace(asymmetric, scale=-asymmetric.scale),
    }
    files.save(tmp_path / "a", saved)
    for name, loaded in files.load(tmp_path / "a").items():
        assert_same(loaded, saved[name])


@pytest.mark.parametrize(
    ("bits", "head_dim", "byte", "fault"),
    [(bits, 64, 0, r", 0\] = .* reserved") for bits in (2, 3, 4, 8)]
    + [(4, 63, 0x18, r"\] is not padded")],
)
def test_a_fault_beyond_the_first_slab_is_found_where_it_is(bits, head_dim, byte, fault, tmp_path):
    scheme = Scheme(bits=bits, separate_norm=False)
    shape = (2, content.SLAB_CODES // head_dim, head_dim)
    packed = packing.pack(np.zeros(shape, np.int8), scheme)
    packed[1, -5, -1 if byte else slice(None)] = byte
    scale = np.ones((2, 1, head_dim), np.float16)
    saved = Quantized(scheme, shape, np.dtype(np.float32), packed, scale)
    with pytest.raises(ValueError, match=rf"\[1, {shape[1] - 5}{fault}"):
        files.save(tmp_path / "x", {"keys": saved})

"""Quantized arrays for files, and files that only a faulty or malicious writer would make."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from nsq_ref import Quantized, Scheme, files, quantize
from nsq_ref.files import containers

FLOATS = ("float16", "bfloat16", "float32")
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    separate_norm = draw(st.booleans())
    axis = draw(st.sampled_from(["channel", "token"]))
    magnitude = draw(st.sampled_from(["norm", "gain", "lsq"])) if separate_norm else "norm"
    may_balance = separate_norm and axis == "channel" and magnitude != "norm"
    return Scheme(
        bits=draw(st.sampled_from([2, 3, 4, 8])),
        separate_norm=separate_norm,
        axis=axis,
        symmetric=draw(st.booleans()),
        scale_rule=draw(st.sampled_from(["range", "search"])),
        norm_rule=draw(st.sampled_from(["plain", "balanced"])) if may_balance else "plain",
        magnitude=magnitude,
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


def forge(path: Path, saved: Quantized, change=None, **parts: np.ndarray) -> Path:
    """Write a file with other parts or metadata, and with a checksum that holds."""
    arrays = {f"keys.{n}": np.ascontiguousarray(p) for n, p in {**saved.parts, **parts}.items()}
    files.save(path, {"keys": saved})
    with safe_open(path, framework="np") as file:
        description = json.loads(file.metadata()["nsq"])
    del description["sha256"]
    if change:
        change(description, arrays)
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    digest = containers._digest(description, arrays)
    text = json.dumps({**description, "sha256": digest}, sort_keys=True, separators=(",", ":"))
    save_file(arrays, path, {"nsq": text})
    return path

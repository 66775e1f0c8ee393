"""The native library in onnxruntime: registration, the choice of a processor, bad models."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from nsq_ref import Scheme
from onnx_export import custom_ops
from onnx_export.operators import quantize_model
from tests.support.onnx_runners import model_of

X = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
OUTPUTS = {"packed": TensorProto.UINT8, "scale": TensorProto.FLOAT, "norm": TensorProto.FLOAT}
PARTS = {"packed": TensorProto.UINT8, "scale": TensorProto.FLOAT, "norm": TensorProto.FLOAT}


def session(model: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    custom_ops.register(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def node(
    operator: str, inputs: Mapping[str, int], outputs: Mapping[str, int], **attributes: Any
) -> onnxruntime.InferenceSession:
    made = helper.make_node(operator, list(inputs), list(outputs), domain="nsq", **attributes)
    return session(model_of([made], {k: v for k, v in inputs.items() if k}, outputs))


def quantize(dtype: int = TensorProto.FLOAT, **attributes: Any) -> onnxruntime.InferenceSession:
    return node("Quantize", {"x": dtype}, OUTPUTS, **attributes)


def dequantize(**attributes: Any) -> onnxruntime.InferenceSession:
    return node("Dequantize", PARTS, {"x_hat": TensorProto.FLOAT}, **attributes)


def attention(**attributes: Any) -> onnxruntime.InferenceSession:
    floats = ("past_key_scale", "past_key_norm", "past_value_scale", "past_value_norm")
    inputs = {"query": TensorProto.FLOAT, "past_lengths": TensorProto.INT64}
    inputs |= {f"past_{side}_packed": TensorProto.UINT8 for side in ("key", "value")}
    inputs |= dict.fromkeys(floats, TensorProto.FLOAT16)
    inputs |= {f"past_{side}_tail": TensorProto.FLOAT for side in ("key", "value")}
    order = ["query", "", "", "past_lengths", *[""] * 6]
    for side in ("key", "value"):
        order += [f"past_{side}_{part}" for part in ("packed", "scale", "norm")]
        order += ["", "", f"past_{side}_tail"]
    outputs = {"output": TensorProto.FLOAT, "present_lengths": TensorProto.INT64}
    present = {name.replace("past", "present"): name for name in order[10:] if name}
    outputs |= {name: inputs[past] for name, past in present.items()}
    names = [name.replace("past", "present") for name in order[10:]]
    made = helper.make_node(
        "Attention", order, ["output", "present_lengths", *names], domain="nsq", **attributes
    )
    return session(model_of([made], inputs, outputs))


def test_a_library_that_is_named_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.so"
    other.touch()
    monkeypatch.setenv("NSQ_CUSTOM_OPS", str(other))
    assert custom_ops.library_path() == other


def test_a_library_that_is_named_but_missing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSQ_CUSTOM_OPS", str(tmp_path / "none.so"))
    with pytest.raises(FileNotFoundError, match=r"NSQ_CUSTOM_OPS.*none\.so"):
        custom_ops.library_path()


def test_a_package_without_its_library_says_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NSQ_CUSTOM_OPS", raising=False)
    monkeypatch.setattr(custom_ops, "__path__", [str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="NSQ_CUSTOM_OPS"):
        custom_ops.library_path()


def test_options_may_register_often_and_sessions_outlive_them() -> None:
    sessions = [quantize() for _ in range(3)]
    results = [one.run(["packed"], {"x": X})[0] for one in sessions]
    del sessions[0]
    assert all(np.array_equal(results[0], one) for one in results)
    assert np.array_equal(sessions[0].run(["packed"], {"x": X})[0], results[0])


def test_options_may_be_registered_twice(tmp_path: Path) -> None:
    """By whatever way; another copy of the library is refused, and the remedy said."""
    options = onnxruntime.SessionOptions()
    custom_ops.register(options)
    options.register_custom_ops_library(str(custom_ops.library_path()))
    custom_ops.register(options)
    loaded = onnxruntime.InferenceSession(quantize_model(Scheme()).SerializeToString(), options)
    assert loaded.run(["packed"], {"x": X})[0].shape == (6, 4)
    copy = shutil.copy(custom_ops.library_path(), tmp_path)
    with pytest.raises(Exception, match=r"another copy of the library; register one copy only"):
        options.register_custom_ops_library(copy)
    other = onnxruntime.SessionOptions()
    other.register_custom_ops_library(copy)
    onnxruntime.InferenceSession(quantize_model(Scheme()).SerializeToString(), other)


@pytest.mark.parametrize("name", ["sse2", "AVX2", "avx512 ", "best"])
def test_an_unknown_processor_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSQ_CPU", name)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException) as error:
        quantize()
    assert "NSQ_CPU" in str(error.value)
    assert "portable, avx2, avx512" in str(error.value)


@pytest.mark.parametrize("name", ["portable", ""])
def test_a_processor_that_any_machine_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q1 P1. The same bytes as the best processor's."""
    best = quantize().run(None, {"x": X})
    monkeypatch.setenv("NSQ_CPU", name)
    for got, want in zip(quantize().run(None, {"x": X}), best, strict=True):
        assert got.tobytes() == want.tobytes()


BAD_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "bits": {"bits": 5},
    "bits must be an int": {"bits": 4.0},
    "attribute bits must be": {"bits": [4, 4]},
    "axis='diagonal'": {"axis": "diagonal"},
    "axis must be a string": {"axis": 1},
    "axis='a longer text'": {"axis": "channel" * 50},
    "axis='channel'": {"axis": "channel\0token"},
    "separate_norm=2": {"separate_norm": 2},
    "symmetric=-1": {"symmetric": -1},
    "scale_rule='best'": {"scale_rule": "best"},
    "norm_rule='balance'": {"norm_rule": "balance", "magnitude": "gain"},
    "norm_rule must be a string": {"norm_rule": 1},
    "magnitude='length'": {"magnitude": "length"},
    "norm_rule has no effect": {
        "separate_norm": 0, "norm_rule": "balanced", "magnitude": "gain", "axis": "token",
    },
    "norm_rule='balanced' is of channels": {
        "norm_rule": "balanced", "axis": "token", "magnitude": "gain",
    },
    "norm_rule='balanced' makes norms that are no lengths": {"norm_rule": "balanced"},
    "magnitude has no effect": {"separate_norm": 0, "magnitude": "gain"},
    "norm_dtype has no effect": {"separate_norm": 0, "norm_dtype": 16},
    "block_size=-1": {"block_size": -1},
    "sink_tokens=-9223372036854775808": {"sink_tokens": -(2**63)},
    "outlier_channels=-4": {"outlier_channels": -4},
    "scale_dtype=11": {"scale_dtype": 11},
    "norm_dtype=0": {"norm_dtype": 0},
}  # fmt: skip


@pytest.mark.parametrize("make", [quantize, dequantize])
@pytest.mark.parametrize("message", BAD_ATTRIBUTES)
def test_bad_attributes_are_named(make: Any, message: str) -> None:
    with pytest.raises(Exception, match="nsq") as error:
        make(**BAD_ATTRIBUTES[message])
    assert message in str(error.value)


@pytest.mark.parametrize("prefix", ["key_", "value_"])
@pytest.mark.parametrize("message", BAD_ATTRIBUTES)
def test_bad_attributes_of_a_cache_are_named(prefix: str, message: str) -> None:
    given = {prefix + name: value for name, value in BAD_ATTRIBUTES[message].items()}
    sizes = {"key_block_size": 4, "value_block_size": 4, "heads": 2, "kv_heads": 1}
    with pytest.raises(Exception, match=r"nsq\.Attention") as error:
        attention(**(sizes | given))
    assert prefix + message.removeprefix("attribute ") in str(error.value)


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("heads", {"kv_heads": 1}),
        ("kv_heads", {"heads": 2}),
        ("heads", {"heads": 3, "kv_heads": 2}),
        ("heads", {"heads": -2, "kv_heads": 1}),
        ("key_block_size", {"heads": 2, "kv_heads": 1, "key_block_size": 0}),
        ("softcap", {"heads": 2, "kv_heads": 1, "softcap": -1.0}),
        ("sliding_window", {"heads": 2, "kv_heads": 1, "sliding_window": -1}),
    ],
)
def test_bad_options_of_attention_are_named(name: str, attributes: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=name):
        attention(**({"key_block_size": 4, "value_block_size": 4} | attributes))


@pytest.mark.parametrize("dtype", [TensorProto.DOUBLE, TensorProto.INT8, TensorProto.UINT8])
def test_another_dtype_is_an_error(dtype: int) -> None:
    with pytest.raises(Exception, match=r"Quantize"):
        quantize(dtype)


def test_a_missing_or_superfluous_input_is_an_error() -> None:
    with pytest.raises(Exception, match="Dequantize"):
        node("Dequantize", {"packed": TensorProto.UINT8}, {"x_hat": TensorProto.FLOAT})
    with pytest.raises(Exception, match="Quantize"):
        node("Quantize", {"x": TensorProto.FLOAT, "y": TensorProto.FLOAT}, OUTPUTS)


@pytest.mark.parametrize("shape", [(), (3,), (0, 8), (6, 0)])
def test_shapes_that_cannot_be_quantized_are_refused_or_give_nothing(
    shape: tuple[int, ...],
) -> None:
    """I1. No shape is read beyond its end: an error that names x, or the parts of no tokens."""
    x = np.zeros(shape, np.float32)
    with pytest.raises(Exception, match=r"nsq\.Quantize: .*x"):
        quantize().run(None, {"x": x})


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("packed", (5, 4)), ("packed", (6, 3)), ("packed", (6,)), ("packed", (1, 6, 4)),
        ("scale", (1, 9)), ("scale", (2, 8)), ("scale", (8,)), ("scale", (0, 0)),
        ("norm", (5,)), ("norm", (6, 1)), ("norm", ()),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_errors(name: str, shape: tuple[int, ...]) -> None:
    """P1 D1. What a model lies about its parts is never read past."""
    parts = {
        "packed": np.zeros((6, 4), np.uint8),
        "scale": np.ones((1, 8), np.float32),
        "norm": np.ones(6, np.float32),
    }
    assert dequantize().run(None, parts)[0].shape == (6, 8)
    parts[name] = np.zeros(shape, parts[name].dtype)
    with pytest.raises(Exception, match=r"nsq\.Dequantize: .*(packed|scale|norm)"):
        dequantize().run(None, parts)


def test_the_kernel_wins_over_the_function() -> None:
    """I2. Only the library refuses: that it does shows that it ran."""
    loaded = session(quantize_model(Scheme()))
    with pytest.raises(Exception, match=r"nsq\.Quantize: .*I2"):
        loaded.run(None, {"x": np.full((4, 8), np.nan, np.float32)})


def test_wrong_models_and_tensors_end_in_a_result_or_an_error() -> None:
    """In a process of its own, which would not outlive a crash."""
    command = [sys.executable, "-m", "tests.support.native_fuzz", "1", "150"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results, errors = map(int, done.stdout.split())
    assert min(results, errors) > 20

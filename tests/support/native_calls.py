"""Calls of every native operator, over schemes, sizes, sets of kernels, threads and modes.

``python -m tests.support.native_calls`` prints a digest of all output bytes, a line for each call:
nothing but the inputs may decide them. It runs in a process of its own, as the first session of a
process decides some things for all others.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from nsq_ref import Scheme
from nsq_ref.codec import PARTS
from onnx_export.custom_ops import register
from onnx_export.operators import DOMAIN, scheme_attributes
from onnx_export.operators.schema import ELEMENTS
from tests.support.onnx_attention import Config, make_inputs, model
from tests.support.onnx_runners import array_of, model_of
from tests.support.processors import CPUS

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

SCHEMES = {
    "norm": Scheme(),
    "3 bits, balanced": Scheme(bits=3, norm_rule="balanced", magnitude="gain", outlier_channels=2),
    "2 bits, search": Scheme(bits=2, scale_rule="search", separate_norm=False),
    "8 bits": Scheme(bits=8, norm_dtype="bfloat16", scale_dtype="float32"),
    "token": Scheme(axis="token", symmetric=False, norm_dtype="float32", outlier_channels=1),
    "streaming": Scheme(symmetric=False, magnitude="lsq", block_size=5, sink_tokens=3),
}
SHAPES = ((1, 1), (1, 2, 1, 3), (2, 3, 7), (2, 13, 9), (40, 33), (300, 128))
# Of two rows: how many new tokens each step has, and how many of them each row has.
STEPS = ((1, [0, 1]), (7, [7, 3]), (9, [9, 0]), (1, [1, 1]), (30, [11, 30]), (2, [2, 1]))
PART_TYPES = {
    "packed": TensorProto.UINT8, "scale": TensorProto.FLOAT, "norm": TensorProto.FLOAT,
    "zero": TensorProto.FLOAT, "outlier_index": TensorProto.INT32,
    "outliers": TensorProto.FLOAT16, "sinks": TensorProto.FLOAT, "head_dim": TensorProto.INT64,
}  # fmt: skip


class Session:
    """A model that has nothing but the library to run in, and the memory of its tensors."""

    def __init__(
        self, built: onnx.ModelProto, threads: int = 1, config: Mapping[str, str] | None = None
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = False  # so that outputs come from malloc
        for name, value in (config or {}).items():
            options.add_session_config_entry(f"session.{name}", value)
        register(options)
        self.session = onnxruntime.InferenceSession(built.SerializeToString(), options)

    def run(self, feeds: Arrays, results: Arrays | None = None) -> dict[str, Array]:
        """Run it, with outputs in these arrays; by default, in memory of the runtime's own."""
        binding = self.session.io_binding()
        kept = []
        for one in self.session.get_inputs():
            kept.append(np.ascontiguousarray(feeds[one.name]))
            bind(binding.bind_input, one.name, kept[-1])
        names = [one.name for one in self.session.get_outputs()]
        for name in names:
            if results is None:
                binding.bind_output(name)
            else:
                bind(binding.bind_output, name, results[name])
        self.session.run_with_iobinding(binding)
        if results is None:
            results = dict(zip(names, map(array_of, binding.get_outputs()), strict=True))
        return dict(results)


def bind(how: Callable[..., None], name: str, array: Array) -> None:
    # An array without elements has no memory to bind; any address will do.
    address = (array if array.size else np.zeros(1)).ctypes.data
    how(name, "cpu", 0, ELEMENTS[array.dtype.name], array.shape, address)


Run = Callable[[Session, Arrays], dict[str, Array]]
Calls = Iterator[tuple[str, dict[str, Array]]]  # what is called, and its outputs


# --- the calls -----------------------------------------------------------------------------------


def values(rng: np.random.Generator, shape: Sequence[int], dtype: Any, tiny: bool) -> Array:
    """Return normal data; if ``tiny``, about half of it is subnormal.

    Then made of bits, as this thread may flush what it computes.
    """
    if not tiny:
        return rng.standard_normal(shape).astype(dtype)
    mantissa = np.finfo(dtype).nmant
    exponents = rng.integers(0, 2, (*shape[:-1], 1)) * rng.integers(0, 12, (*shape[:-1], 1))
    bits = rng.integers(0, 1 << mantissa, shape) | exponents << mantissa
    bits |= rng.integers(0, 2, shape) << (8 * np.dtype(dtype).itemsize - 1)
    return bits.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)


def codec_model(operator: str, scheme: Scheme) -> onnx.ModelProto:
    """Return one node of Quantize or Dequantize, in the dtypes of the operators."""
    stored = scheme.layout(9, 9)
    kinds = {name: PART_TYPES[name] for name in PARTS if name in stored}
    parts = [name if name in stored else "" for name in PARTS]
    ends: tuple[Any, ...] = (["x"], {"x": TensorProto.FLOAT}, parts, kinds)
    if operator == "Dequantize":
        kinds["head_dim"] = TensorProto.INT64
        ends = ([*parts, "head_dim"], kinds, ["x_hat"], {"x_hat": TensorProto.FLOAT})
    given, given_kinds, made, made_kinds = ends
    attributes = scheme_attributes(scheme)
    node = helper.make_node(operator, given, made, domain=DOMAIN, **attributes)
    return model_of([node], given_kinds, made_kinds)


def codec_calls(run: Run, tiny: bool, **options: Any) -> Calls:
    """Quantize, and dequantize what came out."""
    rng = np.random.default_rng(0)
    for name, scheme in SCHEMES.items():
        sessions = {
            operator: Session(codec_model(operator, scheme), **options)
            for operator in ("Quantize", "Dequantize")
        }
        for shape in SHAPES:
            known = {"x": values(rng, shape, np.float32, tiny), "head_dim": np.array(shape[-1])}
            for operator, session in sessions.items():
                results = run(session, known)
                known |= results
                yield f"{operator}, {name}, {shape}", results


def attention_configs() -> Iterator[tuple[str, Config]]:
    for name, one in SCHEMES.items():
        key = replace(one, block_size=one.block_size or 4, outlier_channels=0)
        value = replace(key, block_size=8, sink_tokens=1)
        for dtype in ("float32", "float16"):
            config = Config(
                heads=4, kv_heads=2, head_dim=9, value_head_dim=33, key=key, value=value,
                dtype=dtype, capacity=64, rotary=4, attention_bias=True, head_sink=True,
            )  # fmt: skip
            yield f"{name}, {dtype}", config


def attention_calls(run: Run, tiny: bool, **options: Any) -> Calls:
    """Append and attend step by step, to new memory each time."""
    for name, config in attention_configs():
        session = Session(model(config, functions=[]), **options)
        rng = np.random.default_rng(1)
        fields = config.cache(2)
        known = {f"past_{one}": np.zeros(shape, dtype) for one, (shape, dtype) in fields.items()}
        known["past_lengths"] = np.zeros(2, np.int64)
        for number, (tokens, counts) in enumerate(STEPS):
            inputs = make_inputs(config, rng, known["past_lengths"], tokens, counts)
            if tiny:
                for one in ("query", "key", "value"):
                    inputs[one] = values(rng, inputs[one].shape, inputs[one].dtype, tiny)
            results = run(session, inputs | known)
            yield f"Attention, {name}, step {number}", results
            known = {k.replace("present", "past"): x for k, x in results.items() if k != "output"}


def calls(run: Run, tiny: bool = False, **options: Any) -> Calls:
    """Make all calls, on every set of kernels that this machine can run."""
    for cpu in CPUS:
        for exact in ("0", "1"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("NSQ_CPU", cpu)
                patch.setenv("NSQ_EXACT", exact)
                for operators in (codec_calls, attention_calls):
                    for name, results in operators(run, tiny, **options):
                        yield f"{cpu}, NSQ_EXACT={exact}: {name}", results


# --- in a process of its own ---------------------------------------------------------------------


def digests(environment: Mapping[str, str] | None = None, **options: Any) -> list[str]:
    """Return what this module prints."""
    command = [sys.executable, "-m", "tests.support.native_calls", json.dumps(options)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env={**os.environ, **(environment or {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def main(**options: Any) -> None:
    for name, results in calls(Session.run, **options):
        found = {k: hashlib.sha256(x.tobytes()).hexdigest()[:16] for k, x in results.items()}
        print(name, json.dumps(found))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

"""Models of one nsq.BufferAttention, and its steps beside those of nsq.Attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime

import nsq_ref as nsq
from nsq_ref import Quantized, Scheme, rounding
from nsq_ref.dtypes import FLOAT_DTYPES
from onnx_export.custom_ops import library_path, register
from onnx_export.operators.cache_buffers import buffer_tensors, read_buffers
from onnx_export.operators.nodes import Nodes
from onnx_export.operators.schema import BUFFER_ATTENTION, ELEMENTS
from tests.support.onnx_attention import Array, Config, Inputs, Runner, model
from tests.support.onnx_runners import model_of

SIDES = ("key", "value")


def buffer_model(config: Config) -> onnx.ModelProto:
    """Return the model of a config, its cache in buffers; shapes are left to the operator."""
    (node,) = model(config, functions=[]).graph.node
    given = [name for name in node.input if name and (name in config.inputs)]
    given += ["past_key", "past_value"]
    kinds = dict.fromkeys(given, ELEMENTS[config.dtype])
    for name in ("past_lengths", "new_lengths", "position_ids"):
        kinds |= {name: ELEMENTS["int64"]} if name in kinds else {}
    feedback = {"key_order": ELEMENTS["int32"], "key_factor": ELEMENTS["float32"]}
    kinds |= {name: kind for name, kind in feedback.items() if name in kinds}
    made = {"output": ELEMENTS[config.dtype], "present_lengths": ELEMENTS["int64"]}
    for side in SIDES:
        kinds[f"past_{side}"] = made[f"present_{side}"] = ELEMENTS["uint8"]
    add = Nodes()
    attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    add.call(BUFFER_ATTENTION, {n: n for n in given}, {n: n for n in made}, **attributes)
    return model_of(add.nodes, kinds, made)


def buffer_session(config: Config, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    register(options)
    return onnxruntime.InferenceSession(buffer_model(config).SerializeToString(), options)


def empty(config: Config, batch: int) -> dict[str, Array]:
    """Return buffers for as many tokens as the tensors of a config hold."""
    tensors = buffer_tensors(
        0, config.key, config.value, kv_heads=config.kv_heads, head_dim=config.head_dim,
        value_head_dim=config.value_dim, context_length=limit(config), dtype=config.dtype,
    )  # fmt: skip
    return {
        side: np.zeros(tensor.sizes(batch, 0), np.uint8)
        for side, tensor in zip(SIDES, tensors, strict=True)
    }


def limit(config: Config) -> int:
    """Return the tokens that both sides' tensors hold."""
    fields = config.cache(1)
    return min(
        scheme.sink_tokens + fields[f"{side}_packed"].shape[2] + (scheme.block_size or 0) - 1
        for side, scheme in zip(SIDES, (config.key, config.value), strict=True)
    )


class BufferRunner:
    """Steps of one model; what is present after one is past in the next."""

    def __init__(self, config: Config, batch: int, in_place: bool, threads: int = 1) -> None:
        self.config, self.in_place = config, in_place
        self.session = buffer_session(config, threads)
        self.lengths = np.zeros(batch, np.int64)
        self.cache = empty(config, batch)

    def step(self, inputs: Inputs) -> Array:
        """Append and attend."""
        batch, tokens = inputs["query"].shape[:2]
        feeds = {k: np.ascontiguousarray(v) for k, v in inputs.items()}
        feeds["past_lengths"] = self.lengths
        feeds |= {f"past_{side}": array for side, array in self.cache.items()}
        # What nobody has written to is anything.
        cache = self.cache
        if not self.in_place:
            cache = {side: np.full_like(array, 0xAB) for side, array in self.cache.items()}
        channels = self.config.heads * self.config.value_dim
        results = {
            "output": np.empty((batch, tokens, channels), FLOAT_DTYPES[self.config.dtype]),
            "present_lengths": np.empty(batch, np.int64),
            **{f"present_{side}": array for side, array in cache.items()},
        }
        binding = self.session.io_binding()
        for bind, arrays in ((binding.bind_input, feeds), (binding.bind_output, results)):
            for name, array in arrays.items():
                if name not in {one.name for one in self.session.get_inputs()} | set(results):
                    continue
                bind(name, "cpu", 0, ELEMENTS[array.dtype.name], array.shape, array.ctypes.data)
        self.session.run_with_iobinding(binding)
        self.lengths, self.cache = results["present_lengths"], cache
        return results["output"]

    def stored(self) -> dict[str, Array]:
        """Return the parts as nsq.Attention names them."""
        parts = {}
        for side, scheme, channels in sides(self.config):
            lengths, found = read_buffers(
                self.cache[side], scheme, head_dim=channels, dtype=self.config.dtype
            )
            assert lengths.tolist() == self.lengths.tolist()
            parts |= {f"{side}_{name}": array for name, array in found.items()}
        return parts


def sides(config: Config) -> list[tuple[str, Scheme, int]]:
    return [
        ("key", config.key, config.head_dim),
        ("value", config.value, config.value_dim),
    ]


def filled(config: Config, cache: dict[str, Array], lengths: Sequence[int]) -> dict[str, list[Any]]:
    """Return the bytes of each row that tokens are in."""
    parts: dict[str, list[Any]] = {}
    for side, scheme, _ in sides(config):
        for name in [one for one in cache if one.startswith(f"{side}_")]:
            for row, length in enumerate(lengths):
                sinks, sealed, tail = scheme.cut(int(length))
                part = name.removeprefix(f"{side}_")
                rows = {"sinks": sinks, "tail": tail}.get(part, sealed)
                if part in ("scale", "zero") and scheme.axis == "channel":
                    rows = sealed // (scheme.block_size or 1)
                parts.setdefault(name, []).append(cache[name][row][:, :rows].tobytes())
    return parts


def crop(runner: Runner, lengths: Sequence[int]) -> None:
    """Take tokens back in a cache of several tensors: blocks cut in two are decoded (C1)."""
    for side, scheme, channels in sides(runner.config):
        block = scheme.block_size or 1
        tail = runner.cache[f"{side}_tail"]
        for row, length in enumerate(lengths):
            _, sealed, rest = scheme.cut(int(length))
            if not rest or sealed == scheme.cut(int(runner.lengths[row])).sealed:
                continue
            parts = {}
            for name in ("packed", "scale", "zero", "norm"):
                array = runner.cache.get(f"{side}_{name}")
                if array is None:
                    continue
                first, count = sealed, block
                if name in ("scale", "zero") and scheme.axis == "channel":
                    first, count = sealed // block, 1
                parts[name] = array[row][:, first : first + count]
            shape = (runner.config.kv_heads, block, channels)
            one = Quantized(replace(scheme, sink_tokens=0), shape, tail.dtype, **parts)
            tail[row][:, :rest] = rounding.saturate(nsq.dequantize(one), tail.dtype)[:, :rest]
    runner.lengths = np.array(lengths, np.int64)


def tensors_runner(config: Config, batch: int) -> Runner:
    return Runner(config, batch, functions=[], library=library_path(), in_place=True)

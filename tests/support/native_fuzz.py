"""Models and tensors that somebody else made, and made wrong: each ends in a result or an error.

``python -m tests.support.native_fuzz SEED COUNT`` runs that many calls of the native operators, in
each of which one to three things are changed, and prints how many gave a result and how many an
error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    RuntimeException,
)

from nsq_ref import Scheme
from tests.support.native_calls import SCHEMES, Session, codec_model
from tests.support.onnx_attention import Config, make_inputs, model

Array = npt.NDArray[Any]
Rng = np.random.Generator
INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 5, 8, 16, 2**31, 2**62, 2**63 - 1)
NUMBERS = (0.0, -1.0, 1e-45, 3e38, np.nan, np.inf, -np.inf)
TEXTS = ("", "token", "channel", "range", "search", "norm", "gain", "lsq", "x" * 300, "gain\0")
# More would only be slow.
MOST_BYTES = 1 << 20


def valid(rng: Rng) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Return a model of one node, and tensors that it takes."""
    scheme = Scheme.from_dict({
        **list(SCHEMES.values())[rng.integers(len(SCHEMES))].to_dict(),
        "block_size": 4, "sink_tokens": int(rng.integers(0, 3)),
    })  # fmt: skip
    x = rng.standard_normal((2, 9, 8)).astype(np.float32)
    kind = rng.integers(4)
    if kind == 0:
        return codec_model("Quantize", scheme), {"x": x}
    if kind == 1:
        parts = Session(codec_model("Quantize", scheme)).run({"x": x})
        return codec_model("Dequantize", scheme), parts | {"head_dim": np.array(8)}
    scheme = Scheme.from_dict({**scheme.to_dict(), "outlier_channels": 0})
    sink = bool(rng.integers(2))
    config = Config(
        heads=4, kv_heads=2, head_dim=8, key=scheme, value=scheme, capacity=16, rotary=4,
        position_ids=True, attention_bias=bool(rng.integers(2)), head_sink=sink,
        packed=bool(rng.integers(2)), dtype="float16" if rng.integers(2) else "float32",
    )  # fmt: skip
    past = rng.integers(0, 12, 2)
    feeds = make_inputs(config, rng, past, 3, [3, int(rng.integers(0, 4))])
    for name, (shape, dtype) in config.cache(2).items():
        feeds[f"past_{name}"] = rng.integers(0, 60, shape).astype(dtype)
    return model(config, functions=[]), feeds | {"past_lengths": past}


def change_attribute(rng: Rng, built: onnx.ModelProto, feeds: dict[str, Array]) -> None:
    (node,) = built.graph.node
    one = node.attribute[rng.integers(len(node.attribute))]
    pools: tuple[tuple[Any, ...], ...] = (INTEGERS, INTEGERS, NUMBERS, TEXTS, ([1, 2], [0.5]))
    pool = pools[rng.integers(len(pools))]
    one.CopyFrom(helper.make_attribute(one.name, pool[rng.integers(len(pool))]))


def drop_attribute(rng: Rng, built: onnx.ModelProto, feeds: dict[str, Array]) -> None:
    (node,) = built.graph.node
    del node.attribute[rng.integers(len(node.attribute))]


def drop_end(rng: Rng, built: onnx.ModelProto, feeds: dict[str, Array]) -> None:
    (node,) = built.graph.node
    ends = (node.input, node.output)[rng.integers(2)]
    if len(ends) < 2:
        return
    place = int(rng.integers(len(ends)))
    for one in [one for one in built.graph.output if one.name == ends[place]]:
        if ends is node.output:
            built.graph.output.remove(one)
    if rng.integers(2):
        ends[place] = ""
    else:
        del ends[place:]
        made = {*node.output}
        for one in [one for one in built.graph.output if one.name not in made]:
            built.graph.output.remove(one)


def change_shape(rng: Rng, built: onnx.ModelProto, feeds: dict[str, Array]) -> None:
    name = sorted(feeds)[rng.integers(len(feeds))]
    shape = list(feeds[name].shape)
    for _ in range(rng.integers(1, 3)):
        axis = int(rng.integers(-1, len(shape)))
        if axis < 0:
            shape = [1] * int(rng.choice([1, 2, 14])) + shape if rng.integers(2) else shape[1:]
            continue
        shape[axis] = max(0, int(rng.choice([0, 1, shape[axis] - 1, shape[axis] + 1, 64, 5000])))
    if np.prod(shape, dtype=float) * feeds[name].itemsize <= MOST_BYTES:
        feeds[name] = (
            np.resize(feeds[name], shape)
            if feeds[name].size
            else np.zeros(shape, feeds[name].dtype)
        )


def change_values(rng: Rng, built: onnx.ModelProto, feeds: dict[str, Array]) -> None:
    name = sorted(feeds)[rng.integers(len(feeds))]
    x = feeds[name] = feeds[name].copy()
    if x.dtype.kind in "iu" and x.dtype.itemsize == 8 and x.size:
        x.reshape(-1)[rng.integers(x.size)] = rng.choice(INTEGERS)
    else:
        raw = x.reshape(-1).view(np.uint8)
        raw[rng.random(raw.size) < rng.choice([0.02, 1.0])] = rng.choice([0, 0x7F, 0x80, 0xFF])


CHANGES: tuple[Callable[[Rng, onnx.ModelProto, dict[str, Array]], None], ...] = (
    change_attribute, drop_attribute, drop_end, change_shape, change_values,
)  # fmt: skip


def main(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    results = errors = 0
    for _ in range(count):
        built, feeds = valid(rng)
        for one in (*built.graph.input, *built.graph.output):
            one.type.tensor_type.ClearField("shape")
        with np.errstate(all="ignore"):
            for _ in range(rng.integers(1, 4)):
                if built.graph.node[0].attribute:
                    CHANGES[rng.integers(len(CHANGES))](rng, built, feeds)
        try:
            Session(built).run(feeds)
            results += 1
        except (RuntimeError, Fail, InvalidArgument, InvalidGraph, RuntimeException):
            errors += 1
    print(results, errors)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""A decode step copies nothing of the cache: neither its bytes, nor memory of its size."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from nsq_ref import Scheme
from onnx_export.custom_ops import register
from onnx_export.operators.cache_buffers import read_buffers
from tests.support.buffer_attention import buffer_model, empty, filled, sides
from tests.support.onnx_attention import Config, Inputs, make_inputs, model

# Of keys alone 20 MB, of which tokens fill next to nothing: what is copied is 100 times as much as
# what a step writes.
CONFIG = Config(
    heads=2, kv_heads=2, head_dim=256, key=Scheme.named("streaming4"), capacity=128 * 600,
    value=Scheme.named("streaming3"), new_lengths=False,
)  # fmt: skip
TOKENS = 300
LEAST = 1 << 20  # bytes: less than any of the large tensors has, and more than a step needs


def grown(call: Callable[[], object]) -> int:
    """Return by how many bytes this process was larger at most, in memory, than before the call."""
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be taken, and not seen
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets what it was at most
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    assert found is not None
    return 1024 * int(found[1])


class Step:
    """A decode step on a cache that nobody else holds; outputs may have memory of their own."""

    def __init__(self, built: onnx.ModelProto, cache: Inputs, shared: bool) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 2
        register(options)
        self.session = onnxruntime.InferenceSession(built.SerializeToString(), options)
        self.cache, self.shared = cache, shared

    def __call__(self, inputs: Inputs, past: int) -> dict[str, Any]:
        """Append and attend; return the outputs as ONNX Runtime has them."""
        binding = self.session.io_binding()
        for name, array in (inputs | {"past_lengths": np.array([past])}).items():
            binding.bind_cpu_input(name, array)
        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(a) for name, a in self.cache.items()
        }
        for name, value in values.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
        names = [one.name for one in self.session.get_outputs()]
        for name in names:
            cached = values.get(name.removeprefix("present_"))
            if cached is not None and self.shared:
                binding.bind_ortvalue_output(name, cached)
            else:
                binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))


def stored(cache: Inputs) -> dict[str, list[Any]]:
    """Return the bytes that the prompt's tokens are in, by part."""
    if "key" in cache:
        cache = {
            f"{side}_{name}": part
            for side, scheme, channels in sides(CONFIG)
            for name, part in read_buffers(cache[side], scheme, head_dim=channels)[1].items()
        }
    return filled(CONFIG, cache, [TOKENS])


def tensors(shared: bool) -> Step:
    """Return the step of nsq.Attention."""
    cache = {name: np.zeros(*field) for name, field in CONFIG.cache(1).items()}
    return Step(model(CONFIG, functions=[]), cache, shared)


def buffers(shared: bool) -> Step:
    """Return the step of nsq.BufferAttention."""
    return Step(buffer_model(CONFIG), empty(CONFIG, 1), shared)


@pytest.mark.parametrize("make", [tensors, buffers])
def test_a_step_copies_nothing_of_the_cache(make: Callable[[bool], Step]) -> None:
    """B1. Past and present are one memory, no other of its size is taken, old bytes are as before.

    And where present has memory of its own, all that is seen.
    """
    rng = np.random.default_rng(0)
    prompt = make_inputs(CONFIG, rng, np.array([0]), TOKENS)
    token = make_inputs(CONFIG, rng, np.array([TOKENS]), 1)
    step = make(True)
    step(prompt, 0)
    before = stored(step.cache)
    found: dict[str, Any] = {}
    assert grown(lambda: found.update(step(token, TOKENS))) < LEAST
    for name, array in step.cache.items():
        assert found[f"present_{name}"].data_ptr() == array.ctypes.data
    assert stored(step.cache) == before
    assert int(found["present_lengths"].numpy()[0]) == TOKENS + 1

    apart = make(False)
    for name, array in step.cache.items():
        apart.cache[name][...] = array
    copied: dict[str, Any] = {}
    size = sum(array.nbytes for array in apart.cache.values())
    assert grown(lambda: copied.update(apart(token, TOKENS))) > size / 2 > LEAST
    for name, array in apart.cache.items():
        assert copied[f"present_{name}"].data_ptr() != array.ctypes.data
    assert copied["output"].numpy().tobytes() == found["output"].numpy().tobytes()

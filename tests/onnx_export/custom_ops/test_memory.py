"""No output byte of a native operator is what memory held before: another request's, perhaps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings

from nsq_ref import Scheme
from tests.onnx_export.operators.test_attention import Run, native, runs
from tests.support.native_calls import Array, Arrays, Session, calls, codec_model, digests
from tests.support.onnx_attention import Config, Inputs, Runner, make_inputs

__all__ = ["native"]  # the fixture

POISONS = (0xA5, 0x5A)


def as_bytes(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)


def poisoned(shape: tuple[int, ...], dtype: Any, poison: int) -> Array:
    array = np.empty(shape, dtype)
    as_bytes(array)[...] = poison
    return array


def run_poisoned(session: Session, feeds: Arrays) -> dict[str, Array]:
    """Run it over two poisons, which must not be seen."""
    fields = {name: (x.shape, x.dtype) for name, x in session.run(feeds).items()}
    found = []
    for poison in POISONS:
        results = {name: poisoned(*field, poison) for name, field in fields.items()}
        found.append(session.run(feeds, results))
    for name, one in found[0].items():
        apart = np.flatnonzero(as_bytes(one) != as_bytes(found[1][name]))
        assert not apart.size, f"{name}: {apart.size} of {one.nbytes} bytes were not written"
    return found[0]


def test_all_bytes_of_outputs_are_written() -> None:
    """B1 P1 K1. Sealed tokens, the tail, rows of scales, and what is behind the length of each."""
    assert sum(1 for _ in calls(run_poisoned)) > 100


def test_bytes_do_not_depend_on_what_malloc_hands_out() -> None:
    """B1 P1 K1. Nor may scratch be read before it is written; glibc fills it, others do not."""
    tunables = "glibc.malloc.tcache_count=0"  # it is not filled
    found = [
        digests({"MALLOC_PERTURB_": str(poison), "GLIBC_TUNABLES": tunables}) for poison in POISONS
    ]
    assert len(found[0]) > 100
    assert found[0] == found[1]


class Poisoned(Runner):
    """Each step is run over two poisons, which must not be seen."""

    def _run(self, feeds: Inputs, results: Inputs) -> None:
        shared = {id(feeds[name]) for name in feeds}
        before = {name: x.copy() for name, x in results.items() if id(x) in shared}
        found = []
        for poison in POISONS:
            for name, x in results.items():
                as_bytes(x)[...] = as_bytes(before[name]) if name in before else poison
            super()._run(feeds, results)
            found.append({name: x.tobytes() for name, x in results.items()})
        for name, one in found[0].items():
            assert one == found[1][name], name


def behind(config: Config, lengths: Array, cache: Inputs) -> dict[str, Array]:
    """Return what is behind the length of each row, flat."""
    found = {}
    for name, array in cache.items():
        side, part = name.split("_")
        scheme = getattr(config, side)
        for row, length in enumerate(lengths.tolist()):
            sinks = min(length, scheme.sink_tokens)
            sealed = (length - sinks) // scheme.block_size * scheme.block_size
            by_block = part in ("scale", "zero") and scheme.axis == "channel"
            used = {"sinks": sinks, "tail": length - sinks - sealed}.get(part, sealed)
            used = sealed // scheme.block_size if by_block else used
            found[f"{name} of row {row}"] = as_bytes(np.ascontiguousarray(array[row, :, used:]))
    return found


def step(runner: Runner, inputs: Inputs) -> None:
    """Run one step, unless a rule refuses what was drawn."""
    try:
        runner.step(inputs)
    except RuntimeError as error:
        assume("(rule " not in str(error))
        raise


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
@given(run=runs())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_behind_the_length(native: dict[str, Any], in_place: bool, run: Run) -> None:
    """B1 K1. Zeros in new memory, whatever the past holds there; in place, what the caller has."""
    config, batch, steps, spread = run
    rng = np.random.default_rng(config.head_dim + 100 * batch)
    runner = Poisoned(config, batch, in_place=in_place, **native)
    for tokens, counts in steps:
        inputs = make_inputs(config, rng, runner.lengths, tokens, counts, spread)
        want = behind(config, runner.lengths + counts, runner.cache)
        step(runner, inputs)
        for name, rest in behind(config, runner.lengths, runner.cache).items():
            assert np.array_equal(rest, want[name] if in_place else np.zeros_like(rest)), name


@given(run=runs())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_new_memory_is_that_of_the_function(native: dict[str, Any], run: Run) -> None:
    """B1 K1. Every byte of the cache, valid or not, though the two began with different bytes."""
    config, batch, steps, spread = run
    rng = np.random.default_rng(config.head_dim + 100 * batch)
    function, kernel = Runner(config, batch, optimised=False), Runner(config, batch, **native)
    kernel.cache = {name: poisoned(x.shape, x.dtype, 0xFF) for name, x in kernel.cache.items()}
    for tokens, counts in steps:
        inputs = make_inputs(config, rng, kernel.lengths, tokens, counts, spread)
        step(kernel, inputs)
        function.step(inputs)
        for name, array in kernel.cache.items():
            assert array.tobytes() == function.cache[name].tobytes(), name


# --- tensors that share memory -------------------------------------------------------------------


def test_outputs_that_overlap_are_named() -> None:
    """I2. Not the values, which were another's by then, nor bytes of no meaning."""
    scheme = Scheme(symmetric=False, sink_tokens=1, outlier_channels=1)
    quantize, dequantize = (Session(codec_model(one, scheme)) for one in ("Quantize", "Dequantize"))
    memory = np.zeros(10_000, np.uint8)

    def within(like: Array, start: int) -> Array:
        there = memory[start : start + like.nbytes].view(like.dtype).reshape(like.shape)
        there[...] = like
        return there

    x = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32)
    parts = quantize.run({"x": x})
    for name, part in parts.items():
        with pytest.raises(RuntimeError, match=f"Quantize: {name} overlaps x in memory; bind"):
            quantize.run({"x": within(x, 0)}, parts | {name: within(part, x.nbytes - 4)})
    with pytest.raises(RuntimeError, match="Quantize: norm overlaps scale in memory; bind"):
        quantize.run(
            {"x": x}, parts | {"scale": within(parts["scale"], 0), "norm": within(parts["norm"], 4)}
        )
    feeds = parts | {"head_dim": np.array(8)}
    x_hat = within(x, 8)
    for name, part in feeds.items():
        with pytest.raises(RuntimeError, match=f"Dequantize: x_hat overlaps {name} in memory"):
            dequantize.run(feeds | {name: within(part, 8)}, {"x_hat": x_hat})
    assert np.isfinite(dequantize.run(feeds, {"x_hat": within(x, 0)})["x_hat"]).all()

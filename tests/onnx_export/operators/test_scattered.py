"""nsq.Attention at opset 24: a cache that is appended to in place, and attended to as stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from nsq_ref import Scheme
from onnx_export.operators import attention_model, cache_fields, functions
from onnx_export.operators.nodes import all_nodes
from tests.onnx_export.operators.test_attention import follow, runs
from tests.onnx_export.operators.test_attention_feedback import KEYS, STEPS, config_of
from tests.support.balance import check_keys_of_two_kinds
from tests.support.onnx_attention import Config, Expected, Runner, check, check_output, make_inputs

IN_PLACE: dict[str, Any] = {"opset": 24, "in_place": True}
HOW: dict[str, dict[str, Any]] = {
    "copied": {"opset": 24},
    "in place, as it is": {**IN_PLACE, "optimised": False},
}
CODED = Scheme(block_size=4, magnitude="gain", symmetric=False, sink_tokens=1)


@pytest.mark.parametrize("how", HOW)
@given(data=st.data())
@settings(max_examples=6)
def test_any_run(how: str, data: st.DataObject) -> None:
    """A1 A2 A3 B1 B2 K1: whatever there is of schemes, options and lengths."""
    follow(data.draw(runs()), **HOW[how])


@pytest.mark.parametrize("name", KEYS)
def test_keys_with_feedback(name: str) -> None:
    """F1. As in the body of opset 21."""
    config = config_of(name)
    runner, expected = Runner(config, 2, **IN_PLACE), Expected(config, 2)
    rng = np.random.default_rng(1)
    for tokens, counts in STEPS:
        check(runner, expected, make_inputs(config, rng, runner.lengths, tokens, counts))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("fed", [False, True], ids=["plain", "with feedback"])
def test_keys_with_balanced_norms(how: str, fed: bool) -> None:
    """N3."""
    config = config_of("gain")
    check_keys_of_two_kinds(config if fed else replace(config, feedback=None), **HOW[how])


def behind(runner: Runner) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Return the bytes of the cache that no row's length reaches."""
    config = runner.config
    for name, array in runner.cache.items():
        scheme = config.key if name.startswith("key") else config.value
        for row, length in enumerate(runner.lengths.tolist()):
            coded = max(length - scheme.sink_tokens, 0)
            tail = coded % (scheme.block_size or 1)
            sealed = coded - tail
            ends = {"sinks": min(length, scheme.sink_tokens), "tail": tail}
            first = ends.get(name.split("_")[1], sealed)
            if name.endswith(("scale", "zero")) and scheme.axis == "channel":
                first = sealed // (scheme.block_size or 1)
            yield f"{name} of row {row}", array[row, :, first:].copy()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_behind_the_length_stays_the_callers(dtype: Any) -> None:
    """B2. In place: to the last bit, whatever rows become full beside."""
    config = Config(
        heads=4, kv_heads=2, head_dim=6, key=CODED, value=replace(CODED, bits=3, block_size=3),
        capacity=24, dtype=dtype,
    )  # fmt: skip
    runner, expected = Runner(config, 3, **IN_PLACE), Expected(config, 3)
    rng = np.random.default_rng(0)
    before = {name: array.copy() for name, array in runner.cache.items()}
    for tokens, counts in ((3, [3, 0, 2]), (1, [1, 1, 0]), (7, [7, 2, 3]), (1, [0, 1, 1])):
        inputs = make_inputs(config, rng, expected.cache.lengths, tokens, counts)
        check(runner, expected, inputs)
        for name, array in behind(runner):
            part, row = name.split(" of row ")
            start = runner.cache[part].shape[2] - array.shape[1]
            old = before[part][int(row), :, start:]
            if not part.endswith("tail"):  # where tokens were that are sealed now
                assert array.tobytes() == old.tobytes(), name


def test_an_error_leaves_the_past_as_it_was() -> None:
    """B1. Nothing is written in place before lengths are known to fit: here keys have more room."""
    config = Config(key=replace(CODED, block_size=8), value=CODED, capacity=8)
    runner, expected = Runner(config, 2, **IN_PLACE), Expected(config, 2)
    rng = np.random.default_rng(0)
    check(runner, expected, make_inputs(config, rng, expected.cache.lengths, 12, [12, 1]))
    before = {name: array.tobytes() for name, array in runner.cache.items()}
    with pytest.raises((Fail, RuntimeError)):
        runner.step(make_inputs(config, rng, expected.cache.lengths, 3, [1, 3]))
    assert {name: array.tobytes() for name, array in runner.cache.items()} == before


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_as_good_as_floats(bits: int, symmetric: bool) -> None:
    """A3. Of heads wide enough that integers are taken, and with channels beyond whole bytes."""
    scheme = Scheme(bits=bits, symmetric=symmetric, magnitude="lsq", block_size=32)
    config = Config(
        heads=8, kv_heads=2, head_dim=69, value_head_dim=66, key=scheme, value=scheme,
        capacity=160, new_lengths=False,
    )  # fmt: skip
    runner, expected = Runner(config, 1, **IN_PLACE), Expected(config, 1)
    rng = np.random.default_rng(bits)
    for tokens in (130, 1, 7):  # 28 rows of queries, which are few
        check(runner, expected, make_inputs(config, rng, expected.cache.lengths, tokens))


@pytest.mark.parametrize("side", ["key", "value"])
def test_floats_are_taken_where_integers_are_too_coarse(side: str) -> None:
    """A3. A channel that is 0 in all that counts, beside numbers of 10^9 times its size."""
    scheme = Scheme(symmetric=False, separate_norm=False, block_size=8, scale_dtype="float32")
    config = Config(head_dim=8, key=scheme, value=scheme, capacity=16, new_lengths=False)
    runner, expected = Runner(config, 1, **IN_PLACE), Expected(config, 1)
    rng = np.random.default_rng(0)
    inputs = make_inputs(config, rng, expected.cache.lengths, 8)
    x = np.abs(rng.standard_normal((8, 8))).astype(np.float32)
    x[0] = 0  # so that zeros are, and codes of this token
    if side == "key":
        x[1:7, 0], x[7, 0] = 0, 1e10  # f of this channel is the largest by far
    else:
        # The token whose values are 0 has nearly all the weight.
        inputs["key"][:] = 0
        inputs["key"][0, 0] = 8
    inputs[side] = x[None]
    check(runner, expected, inputs)
    step = make_inputs(config, rng, expected.cache.lengths, 1)
    step["query"] = np.full_like(step["query"], 1.1)
    if side == "key":
        step["query"][..., ::8] = -1  # it has no weight, and the others' scores are not 10^10
    step["key"][:] = 0 if side == "key" else -9
    check(runner, expected, step)


def test_only_the_body_of_opset_24_scatters() -> None:
    """The other one stays for runtimes that have no TensorScatter."""
    for opset, scatters in ((21, False), (23, False), (24, True), (25, True)):
        body: onnx.FunctionProto = functions(opset)[-1]
        assert ("TensorScatter" in {node.op_type for node in all_nodes(body.node)}) == scatters


@pytest.mark.parametrize("opset", [21, 24])
def test_a_step_in_which_no_row_has_a_token(opset: int) -> None:
    """A2 B1. Neither before, with nothing to attend to, nor behind some."""
    config = Config(key=replace(CODED, sink_tokens=0), value=CODED)
    runner, expected = Runner(config, 2, opset=opset), Expected(config, 2)
    rng = np.random.default_rng(0)
    for tokens, counts in ((1, [0, 0]), (7, [1, 6]), (2, [0, 0])):
        check(runner, expected, make_inputs(config, rng, expected.cache.lengths, tokens, counts))


@pytest.mark.parametrize("value_block", [4, 6])
def test_blocks_before_the_window_are_not_read(value_block: int) -> None:
    """A2. Of rows that differ in length: what no query sees is NaN there, and changes nothing."""
    value = replace(CODED, block_size=value_block)
    config = Config(
        head_dim=8, key=CODED, value=value, capacity=48, sliding_window=9, new_lengths=True
    )  # fmt: skip
    runner, expected = Runner(config, 2, **IN_PLACE), Expected(config, 2)
    rng = np.random.default_rng(0)
    for tokens, counts in ((40, [40, 37]), (3, [3, 1]), (1, [1, 1]), (40, [0, 1])):
        if tokens == 3:  # the first query of all is token 37, which sees 29 and later ones
            for side, scheme in (("key", config.key), ("value", config.value)):
                unseen = (29 - scheme.sink_tokens) // (scheme.block_size or 1)
                for part in ("scale", "zero"):
                    runner.cache[f"{side}_{part}"][:, :, :unseen] = np.nan
        inputs = make_inputs(config, rng, expected.cache.lengths, tokens, counts)
        result, output = expected.step(inputs), runner.step(inputs)
        check_output(output, result)


def test_no_part_of_the_cache_is_copied(tmp_path: Path) -> None:
    """In place: of each part comes out of a step what TensorScatter was given, and no other copy.

    A scheme has norms, zeros and sinks, or not; ONNX Runtime's profile says what each node made.
    """
    wide = {"heads": 1, "kv_heads": 1, "head_dim": 24, "opset": 24}
    plain = Scheme(block_size=32, separate_norm=False)
    for key, value in ((replace(CODED, block_size=32), plain), (plain, plain)):
        model = attention_model(key, value, **wide)
        fields = cache_fields(key, value, kv_heads=1, head_dim=24, capacity=32000)
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.log_severity_level = 3
        options.profile_file_prefix = str(tmp_path / "profile")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        binding = session.io_binding()
        for name, field in fields.items():
            array = np.zeros((1, *field.shape), field.dtype)
            one = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(f"past_{name}", one)
            binding.bind_ortvalue_output(f"present_{name}", one)
        for name in ("query", "key", "value"):
            binding.bind_cpu_input(name, np.ones((1, 1, 24), np.float32))
        binding.bind_cpu_input("past_lengths", np.array([70]))
        binding.bind_output("output")
        binding.bind_output("present_lengths")
        session.run_with_iobinding(binding)
        events = json.loads(Path(session.end_profiling()).read_text())
        made = [
            (event["args"]["op_name"], int(event["args"]["output_size"]))
            for event in events
            if event["name"].endswith("_kernel_time")
        ]
        # Reshape says another shape of the same memory, and Range is of all places.
        large = {name for name, size in made if size >= 32000}
        assert large - {"Reshape", "Range"} == {"TensorScatter"}

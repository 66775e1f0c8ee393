"""The native nsq.Attention: what it refuses, threads, memory that past and present share, sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from nsq_ref import Scheme
from onnx_export.custom_ops import library_path, register
from onnx_export.operators.schema import ELEMENTS
from tests.support.onnx_attention import (
    CACHE,
    INPUTS,
    Array,
    Config,
    Expected,
    Inputs,
    Runner,
    check,
    check_cache,
    make_inputs,
    model,
)

# Every input is there, and every part is stored.
KEY = Scheme(block_size=4, sink_tokens=2, symmetric=False, magnitude="gain")
VALUE = Scheme(block_size=8, sink_tokens=1, symmetric=False, axis="token", norm_dtype="float32")
FULL = Config(
    heads=4, kv_heads=2, head_dim=8, value_head_dim=6, key=KEY, value=VALUE, capacity=32, rotary=4,
    position_ids=True, attention_bias=True, head_sink=True,
)  # fmt: skip
SMALL = Config(heads=2, kv_heads=2, head_dim=8, key=Scheme(block_size=4), capacity=32)


def open_session(
    config: Config, threads: int = 1, without: str = "", **changed: Any
) -> onnxruntime.InferenceSession:
    """Open a model that leaves all shapes to the operator.

    One input or output is left out, and some attributes are changed.
    """
    built = model(config, functions=[])
    for names in (built.graph.node[0].input, built.graph.node[0].output):
        names[:] = ["" if name == without else name for name in names]
    for one in [one for one in built.graph.output if one.name == without]:
        built.graph.output.remove(one)
    for one in (*built.graph.input, *built.graph.output):
        one.type.tensor_type.ClearField("shape")
    node = built.graph.node[0]
    for name, value in changed.items():
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if value is not None:
            node.attribute.append(helper.make_attribute(name, value))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    register(options)
    return onnxruntime.InferenceSession(
        built.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def open_runner(config: Config, batch: int, in_place: bool = False, threads: int = 1) -> Runner:
    runner = Runner(config, batch, functions=[], library=library_path(), in_place=in_place)
    if threads > 1:
        runner.session = open_session(config, threads)
    return runner


class Call:
    """Tensors of one call after a few steps: all may be changed before it runs."""

    def __init__(self, config: Config, tokens: int = 6, batch: int = 2, **changed: Any) -> None:
        rng = np.random.default_rng(1)
        runner = open_runner(config, batch)
        runner.step(make_inputs(config, rng, runner.lengths, 9, [9, 3]))
        self.session = open_session(config, **changed)
        self.feeds = make_inputs(config, rng, runner.lengths, tokens, [tokens, tokens - 1])
        if config.attention_bias:
            bias = self.feeds["attention_bias"][..., : 9 + tokens]
            self.feeds["attention_bias"] = np.ascontiguousarray(bias)
        self.feeds["past_lengths"] = runner.lengths
        self.feeds |= {f"past_{name}": array for name, array in runner.cache.items()}
        self.results = {f"present_{name}": array.copy() for name, array in runner.cache.items()}
        self.results["present_lengths"] = np.empty(batch, np.int64)
        channels = config.heads * config.value_dim
        self.results["output"] = np.empty((batch, tokens, channels), config.dtype)

    def run(self) -> Inputs:
        binding = self.session.io_binding()
        spare = np.zeros(1)  # an array without elements has no memory
        for bind, arrays in ((binding.bind_input, self.feeds), (binding.bind_output, self.results)):
            for name, array in arrays.items():
                assert array.flags.c_contiguous
                address = (array if array.size else spare).ctypes.data
                bind(name, "cpu", 0, ELEMENTS[array.dtype.name], array.shape, address)
        self.session.run_with_iobinding(binding)
        return self.results

    def refused(self, message: str) -> None:
        with pytest.raises(RuntimeError, match=rf"(?s)nsq\.Attention: .*{message}"):
            self.run()


ALL_INPUTS = (*INPUTS, *(f"past_{name}" for name in CACHE))


def test_call_is_accepted_unless_changed() -> None:
    """B1. All tests of refusals begin with this."""
    output = Call(FULL).run()["output"]
    assert np.isfinite(output).all()
    assert output[0].all()


# --- refusals: shapes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_INPUTS)
def test_refuses_wrong_rank(name: str) -> None:
    """A1. Each input in turn has an axis more, or one less."""
    for change in (lambda x: x[None], lambda x: np.ascontiguousarray(x[..., 0])):
        call = Call(FULL)
        call.feeds[name] = change(call.feeds[name])
        call.refused(name)


def longer(array: Array, axis: int) -> Array:
    return np.concatenate([array, array.take([0], axis)], axis)


def shorter(array: Array, axis: int) -> Array:
    return np.ascontiguousarray(array.take(range(array.shape[axis] - 1), axis))


# Where two tensors do not fit together, the later one is named.
NAMED = {
    "query": "(query|key)",
    "cos": "(cos|sin)",
    "past_key_packed": "past_key_(packed|scale)",
    "past_value_packed": "past_value_(packed|scale)",
}


# A bias may be for more tokens than there are, and one row of it for both.
FITTING = {("attention_bias", 3, longer), ("attention_bias", 0, shorter)}


@pytest.mark.parametrize("change", [longer, shorter])
@pytest.mark.parametrize("name", ALL_INPUTS)
def test_refuses_wrong_size(name: str, change: Callable[[Array, int], Array]) -> None:
    """A1. Each axis of each input in turn is longer, or shorter, by one."""
    for axis in range(Call(FULL).feeds[name].ndim):
        call = Call(FULL)
        call.feeds[name] = change(call.feeds[name], axis)
        if (name, axis, change) in FITTING:
            call.run()
            continue
        call.refused(NAMED.get(name, name))


@pytest.mark.parametrize("name", ALL_INPUTS)
def test_refuses_tensors_without_elements(name: str) -> None:
    """A1. Nor does it read where nothing is."""
    for axis in range(Call(FULL).feeds[name].ndim):
        call = Call(FULL)
        x = call.feeds[name]
        call.feeds[name] = np.ascontiguousarray(x.take([], axis))
        call.refused(NAMED.get(name, name))


def test_refuses_an_empty_batch_and_no_tokens() -> None:
    """A1. All inputs agree on it."""
    for axis in (0, 1):
        call = Call(SMALL)
        for name in ("query", "key", "value"):
            call.feeds[name] = np.ascontiguousarray(call.feeds[name].take([], axis))
        if axis == 0:
            rest = [name for name in call.feeds if name not in ("query", "key", "value")]
            call.feeds |= {name: call.feeds[name][:0] for name in rest}
            call.results = {name: array[:0] for name, array in call.results.items()}
        call.refused("query has shape")


def test_refuses_packed_queries_of_another_size() -> None:
    """A1. Query, key and value in one tensor."""
    call = Call(replace(SMALL, packed=True))
    call.run()
    call.feeds["query"] = shorter(call.feeds["query"], 2)
    call.refused("query has shape")


# --- refusals: attributes and dtypes -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("heads", None, "heads"),
        ("kv_heads", None, "kv_heads"),
        ("heads", 3, "heads=3 .*kv_heads=2"),
        ("heads", 2**62, "heads"),
        ("kv_heads", -2, "kv_heads=-2"),
        ("scale", float("nan"), "scale"),
        ("softcap", -1.0, "softcap=-1"),
        ("softcap", float("inf"), "softcap"),
        ("sliding_window", -1, "sliding_window=-1"),
        ("causal", 2, "causal=2"),
        ("key_block_size", 0, "key_block_size"),
        ("value_block_size", -4, "value_block_size=-4"),
        ("value_bits", 5, "value_bits=5"),
        ("key_outlier_channels", 1, "key_outlier_channels"),
        ("key_axis", "row", "key_axis='row'"),
        ("value_magnitude", 1, "value_magnitude"),
    ],
)
def test_refuses_attributes(name: str, value: Any, message: str) -> None:
    """A1. When the session is opened."""
    with pytest.raises(RuntimeException, match=message):
        open_session(SMALL, **{name: value})


def test_refuses_a_window_that_is_not_causal() -> None:
    """A2. As `KVCache.attend` does."""
    with pytest.raises(RuntimeException, match="sliding_window=3"):
        open_session(SMALL, causal=0, sliding_window=3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("key_scale_dtype", 1, "past_key_scale has elements of float16, expected float32"),
        ("value_norm_dtype", 16, "past_value_norm has elements of float32, expected bfloat16"),
        ("key_separate_norm", 0, "past_key_norm is not stored by the scheme"),
        ("value_symmetric", 1, "past_value_zero is not stored by the scheme"),
        ("key_sink_tokens", 0, "past_key_sinks is not stored by the scheme"),
        ("value_sink_tokens", 2**62, "past_value_sinks has shape"),
        ("key_block_size", 2**62, "past_key_"),
        ("key_block_size", 5, "past_key_packed has room for 32 tokens"),
        ("value_bits", 8, "past_value_packed"),
        ("kv_heads", 1, "key has shape"),
        ("heads", 8, "key has shape"),
    ],
)
def test_refuses_tensors_of_another_scheme(name: str, value: Any, message: str) -> None:
    """S3 M4. The cache must be that of the attributes."""
    call = Call(FULL)
    extra: dict[str, Any] = {"key_magnitude": "norm"} if name == "key_separate_norm" else {}
    call.session = open_session(FULL, **{name: value}, **extra)
    call.refused(message)


# --- refusals: values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("past_lengths", 0, -1, r"past_lengths\[0\] is -1"),
        ("past_lengths", 1, 39, r"past_lengths\[1\] is 39.*past_key_packed"),
        ("past_lengths", 1, 2**62, r"past_lengths\[1\]"),
        ("past_lengths", 1, -(2**63), r"past_lengths\[1\]"),
        ("past_lengths", 0, 35, r"past_lengths\[0\] is 35, and 6 tokens more.*capacity"),
        ("new_lengths", 1, -1, r"new_lengths\[1\] is -1"),
        ("new_lengths", 0, 7, r"new_lengths\[0\] is 7"),
        ("new_lengths", 0, 2**63 - 1, r"new_lengths\[0\]"),
        ("position_ids", (0, 5), -1, r"position_ids\[0, 5\] is -1"),
        ("position_ids", (1, 0), 2**62, r"position_ids\[1, 0\]"),
        ("query", (0, 5, 31), np.nan, "query .*row 0, token 5, head 3, channel 7"),
        ("key", (1, 4, 9), np.inf, "key .*row 1, token 4, head 1, channel 1"),
        ("value", (1, 0, 5), -np.inf, "value .*row 1, token 0, head 0, channel 5"),
        ("past_key_tail", (0, 1, 0, 2), np.nan, "key cannot be sealed at row 0, head 1"),
    ],
)
def test_refuses_values(name: str, index: Any, value: float, message: str) -> None:
    """I2 B2. Lengths and positions beyond what is there, and what is not finite."""
    call = Call(FULL)
    call.feeds[name] = call.feeds[name].copy()
    call.feeds[name][index] = value
    call.refused(message)


def test_refuses_lengths_without_positions_or_bias() -> None:
    """A2. cos and attention_bias end before the tokens do."""
    call = Call(replace(FULL, position_ids=False))
    call.feeds |= {name: np.ascontiguousarray(call.feeds[name][:14]) for name in ("cos", "sin")}
    call.refused("cos has 14 positions, but row 0 needs position 14")
    call = Call(FULL)
    bias = call.feeds["attention_bias"]
    call.feeds["attention_bias"] = np.ascontiguousarray(bias[..., :14])
    call.refused("attention_bias is for 14 tokens, but row 0 has 15")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("key", "key is needed"),
        ("value", "value is needed"),
        ("cos", "cos is needed"),
        ("sin", "sin is needed"),
        ("past_key_norm", "past_key_norm is left out, but the scheme"),
        ("past_value_zero", "past_value_zero is left out, but the scheme"),
        ("past_key_sinks", "past_key_sinks is left out, but the scheme"),
        ("present_key_zero", "present_key_zero is not connected"),
        ("present_value_sinks", "present_value_sinks is not connected"),
    ],
)
def test_refuses_models_without_some_tensor(name: str, message: str) -> None:
    """B1. A part that the scheme stores, or one of two that belong together."""
    call = Call(FULL)
    call.session = open_session(FULL, without=name)
    call.results.pop(name, None)
    call.refused(message)


# --- memory --------------------------------------------------------------------------------------


def test_refuses_present_that_is_another_past() -> None:
    """B1. Past and present may be the same memory, but only of the same tensor, and all of it."""
    call = Call(SMALL)
    call.results["present_key_packed"] = call.feeds["past_value_packed"]
    call.refused("present_key_packed overlaps past_value_packed")
    call = Call(SMALL)
    call.results["output"] = call.feeds["query"]
    call.refused("output overlaps query")
    call = Call(SMALL)
    call.results["present_lengths"] = call.feeds["new_lengths"]
    call.refused("present_lengths overlaps new_lengths")


def test_refuses_present_that_overlaps_its_past() -> None:
    """B1. By a few bytes."""
    for step in (1, 64):
        call = Call(SMALL)
        past = call.feeds["past_key_packed"]
        memory = np.concatenate([past.ravel(), np.zeros(step, np.uint8)])
        call.feeds["past_key_packed"] = memory[:-step].reshape(past.shape)
        call.results["present_key_packed"] = memory[step:].reshape(past.shape)
        call.refused("present_key_packed overlaps past_key_packed")


def test_refuses_two_outputs_in_one_place() -> None:
    """B1. Though no past is there."""
    call = Call(SMALL)
    call.results["present_value_tail"] = call.results["present_key_tail"]
    call.refused("present_value_tail overlaps present_key_tail")


def test_lengths_may_be_in_place() -> None:
    """B1. As the cache may."""
    apart = Call(SMALL).run()
    call = Call(SMALL)
    call.results["present_lengths"] = call.feeds["past_lengths"]
    together = call.run()
    assert all(apart[name].tobytes() == together[name].tobytes() for name in apart)


def steps(
    config: Config, in_place: bool, threads: int, sizes: list[int]
) -> tuple[list[Array], Runner]:
    """Return the outputs of some steps of two rows, the second of which gets a token less."""
    rng = np.random.default_rng(3)
    runner = open_runner(config, 2, in_place, threads)
    outputs = []
    for tokens in sizes:
        counts = [tokens, tokens - 1]
        outputs.append(runner.step(make_inputs(config, rng, runner.lengths, tokens, counts)))
    return outputs, runner


def valid_bytes(runner: Runner) -> dict[str, bytes]:
    """What the lengths make valid of each tensor."""
    found = {}
    for name, array in runner.cache.items():
        side, part = name.split("_")
        scheme = getattr(runner.config, side)
        for row, length in enumerate(runner.lengths.tolist()):
            sinks = min(length, scheme.sink_tokens)
            sealed = (length - sinks) // scheme.block_size * scheme.block_size
            channelwise = part in ("scale", "zero") and scheme.axis == "channel"
            count = {"sinks": sinks, "tail": length - sinks - sealed}.get(part, sealed)
            count = sealed // scheme.block_size if channelwise else count
            found[f"{name} {row}"] = array[row, :, :count].tobytes()
    return found


BIG = Config(
    heads=6, kv_heads=2, head_dim=16, key=Scheme.named("streaming4"),
    value=Scheme(block_size=48, bits=3), capacity=4600, softcap=5.0,
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_threads_do_not_change_a_bit(dtype: str) -> None:
    """B1. Nor does it matter whether the cache is copied or appended to in place."""
    config = replace(BIG, dtype=dtype)
    sizes = [700, 3700, 3, 1]
    outputs, runner = steps(config, in_place=False, threads=1, sizes=sizes)
    for threads, in_place in ((1, True), (2, False), (4, True)):
        others, other = steps(config, in_place, threads, sizes)
        assert [x.tobytes() for x in outputs] == [x.tobytes() for x in others]
        assert valid_bytes(runner) == valid_bytes(other)


@pytest.mark.parametrize("in_place", [False, True])
def test_chunks_give_equal_bytes(in_place: bool) -> None:
    """B1 K1. One shot, one by one, and anything between."""
    rng = np.random.default_rng(5)
    config = replace(FULL, attention_bias=False, new_lengths=False, dtype="float16")
    whole = make_inputs(config, rng, np.zeros(2, np.int64), 30)
    found = []
    for chunk in (30, 1, 2, 7, 13):
        runner = open_runner(config, 2, in_place)
        for start in range(0, 30, chunk):
            some = {
                name: array[:, start : start + chunk] if array.shape[:2] == (2, 30) else array
                for name, array in whole.items()
            }
            runner.step(some)
        found.append(valid_bytes(runner))
    assert all(one == found[0] for one in found[1:])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("key", np.nan, r"key .*row 1, token 8.*I2"),
        ("value", 1e6, r"value cannot be sealed at row 1, head 1, position 10: .*M4"),
        ("key", 1e30, r"key cannot be sealed at row 1, head 1, position 10: .*(N1|M4)"),
    ],
)
def test_refused_append_leaves_the_past(
    in_place: bool, name: str, value: float, message: str
) -> None:
    """I2 N1 M4 B1. The first row could have been appended, and so could most of the other."""
    scheme = Scheme(block_size=4, sink_tokens=1)
    config = Config(
        heads=2, kv_heads=2, head_dim=8, key=scheme, value=scheme, capacity=32, new_lengths=True
    )
    rng = np.random.default_rng(7)
    runner = open_runner(config, 2, in_place)
    expected = Expected(config, 2)
    check(runner, expected, make_inputs(config, rng, runner.lengths, 7, [7, 2]), slack=0.05)
    bad = make_inputs(config, rng, runner.lengths, 12)
    bad[name][1, 8, 13] = value
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            runner.step(bad)
        check_cache(runner, expected)
    for tokens in (1, 9, 12):
        inputs = make_inputs(config, rng, runner.lengths, tokens)
        check(runner, expected, inputs, slack=0.05)


# --- sizes ---------------------------------------------------------------------------------------

LONG = Scheme(block_size=1024, sink_tokens=2, symmetric=False, magnitude="lsq")
SHORT = Scheme(block_size=48, bits=8, sink_tokens=5, axis="token", scale_dtype="float32")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 700},
        {"causal": False, "smooth_softmax": True},
        {"attention_bias": True, "head_sink": True, "dtype": "float16"},
        {"heads": 140, "kv_heads": 1, "sliding_window": 2},
    ],
)
def test_tiles_and_segments(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """A1 A2 A3. Long blocks, more tokens than a sum may have, many queries at a time."""
    monkeypatch.setenv("NSQ_EXACT", "1")
    config = Config(
        **{"heads": 4, "kv_heads": 2, "head_dim": 8, "value_head_dim": 5, "capacity": 4096}
        | options,
        key=LONG,
        value=SHORT,
    )
    fewer = 1 if config.heads == 4 else 30
    rng = np.random.default_rng(11)
    runner = open_runner(config, 1, in_place=True, threads=2)
    expected = Expected(config, 1)
    for tokens in (900 // fewer, 1500 // fewer, 2, 1):
        inputs = make_inputs(config, rng, runner.lengths, tokens)
        check(runner, expected, inputs)


def test_codes_and_floats_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A1. What is read as codes is what they decode to."""
    sizes = [3000, 40, 2, 1]
    found = []
    for exact in ("0", "1"):
        monkeypatch.setenv("NSQ_EXACT", exact)
        found.append(steps(BIG, in_place=True, threads=1, sizes=sizes)[0])
    for codes, floats in zip(*found, strict=True):
        assert np.abs(codes - floats).max() <= 0.02 * np.abs(floats).max()

"""Options of nsq.Attention: the builders refuse what `attend` refuses, and nothing is ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from nsq_ref import Scheme, attention
from onnx_export.custom_ops import library_path
from onnx_export.operators import (
    attention_model,
    attention_node,
    cache_fields,
    check_nodes,
    functions,
    quantize_model,
)
from onnx_export.operators.nodes import Nodes
from onnx_export.operators.schema import ATTENTION
from tests.support.native_calls import Session
from tests.support.onnx_attention import Config, Runner, make_inputs, model

SCHEME = Scheme(block_size=4)
NUMBERS = (None, -1.0, -0.0, 0.0, 1e-50, 1e-40, 0.5, 30.0, 1e39, np.nan, np.inf, -np.inf)


def node(**options: Any) -> onnx.NodeProto:
    return attention_node(SCHEME, SCHEME, **{"heads": 4, "kv_heads": 2} | options)


def attributes(made: onnx.NodeProto) -> dict[str, Any]:
    return {one.name: helper.get_attribute_value(one) for one in made.attribute}


# --- the builders --------------------------------------------------------------------------------


def attends(**options: Any) -> bool:
    """Whether the reference takes these options."""
    one = np.ones((1, 1, 1, 1), np.float32)
    try:
        attention.attend(one, one, one, **options)
    except ValueError:
        return False
    return True


@given(
    scale=st.sampled_from(NUMBERS),
    softcap=st.sampled_from(NUMBERS),
    sliding_window=st.sampled_from([None, -(2**40), -1, 0, 1, 7]),
    causal=st.booleans(),
)
def test_options_are_refused_as_the_reference_refuses_them(**options: Any) -> None:
    """A1 A2. And what float32 cannot tell from a default, which is 0 in the operator."""
    lost = False
    for name in ("scale", "softcap"):
        with np.errstate(over="ignore"):
            narrowed = np.float32(options[name] or 0)
        lost |= options[name] is not None and (narrowed == 0 or not np.isfinite(narrowed))
    if lost or not attends(**options):
        with pytest.raises(ValueError, match=r"(scale|softcap|sliding_window)="):
            node(**options)
        return
    found = attributes(node(**options))
    for name, value in options.items():
        assert found[name] == np.float32(value or 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": ["key", "value", "head_sink"], "smooth_softmax": True}, "smooth_softmax is a"),
        ({"inputs": ["key", "value", "position_ids"]}, "position_ids has no effect without"),
        ({"rotary_interleaved": True}, "rotary_interleaved has no effect without"),
        ({"inputs": ["key"]}, "one of key and value"),
        ({"inputs": ["key", "value", "sin"]}, "one of cos and sin"),
        ({"inputs": ["key", "value", "bias"]}, "bias"),
        ({"heads": 0}, "heads=0 must be an integer of at least 1"),
        ({"kv_heads": -2}, "kv_heads=-2 must be"),
        ({"heads": 3}, "heads=3 is not a multiple of kv_heads=2"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    """A1 A2. By name, when the node is made."""
    with pytest.raises(ValueError, match=message):
        node(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head_dim": 0}, ValueError, "head_dim=0 must be"),
        ({"head_dim": 8.0}, TypeError, "head_dim=8.0 is not an integer"),
        ({"value_head_dim": 0}, ValueError, "value_head_dim=0 must be"),
        ({"heads": 4.0}, TypeError, "heads=4.0 is not an integer"),
        ({"dtype": "bfloat16"}, ValueError, "dtype='bfloat16' is not one of float32, float16"),
        ({"opset": 20}, ValueError, "opset=20 is too old"),
        ({"inputs": [], "value_head_dim": 5}, ValueError, "value_head_dim=5 is not head_dim=8"),
        ({"soft_cap": 3.0}, TypeError, "soft_cap"),
    ],
)
def test_models_that_cannot_be_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A1 S3. Sizes, dtypes and names, before onnx sees them."""
    with pytest.raises(error, match=message):
        attention_model(SCHEME, SCHEME, **{"heads": 4, "kv_heads": 2, "head_dim": 8} | options)


def test_a_cache_that_cannot_be_is_refused() -> None:
    """B1. Its sizes are named."""
    good: dict[str, Any] = {"kv_heads": 2, "head_dim": 8, "capacity": 0}
    assert cache_fields(SCHEME, SCHEME, **good)["key_packed"].shape == (2, 0, 4)
    for name, value in (("kv_heads", 0), ("head_dim", -8), ("capacity", -1), ("dtype", "float64")):
        with pytest.raises(ValueError, match=f"{name}="):
            cache_fields(SCHEME, SCHEME, **good | {name: value})


@pytest.mark.parametrize("function", functions(), ids=lambda function: str(function.name))
def test_functions_of_an_older_opset_are_refused(function: onnx.FunctionProto) -> None:
    """The bodies use what came with 21."""
    assert function.opset_import[0].version == 21
    with pytest.raises(ValueError, match="opset=20 is too old; the functions need at least 21"):
        functions(20)


# --- what nobody else checks ---------------------------------------------------------------------


def misspelt(one: onnx.NodeProto) -> None:
    one.attribute.append(helper.make_attribute("soft_cap", 3.0))


def of_another_type(one: onnx.NodeProto) -> None:
    next(each for each in one.attribute if each.name == "key_bits").CopyFrom(
        helper.make_attribute("key_bits", 4.0)
    )


def missing(one: onnx.NodeProto) -> None:
    kept = [each for each in one.attribute if each.name != "kv_heads"]
    del one.attribute[:]
    one.attribute.extend(kept)


def renamed(one: onnx.NodeProto) -> None:
    one.op_type = "Attend"


def longer(one: onnx.NodeProto) -> None:
    one.input.extend(["query"] * (len(ATTENTION.inputs) + 1 - len(one.input)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (misspelt, "attribute soft_cap is unknown; did you mean softcap"),
        (of_another_type, "attribute key_bits must be INT"),
        (missing, "attribute kv_heads is missing"),
        (
            renamed,
            "there is no such operator in nsq; choose one of Quantize, Dequantize, Attention",
        ),
        (longer, "it has 23 inputs, of at most 22"),
    ],
)
@pytest.mark.parametrize("depth", ["graph", "branch", "function"])
def test_check_nodes(depth: str, change: Callable[[onnx.NodeProto], None], message: str) -> None:
    """Wherever the node is."""
    made = node()
    check_nodes(around(made, depth))
    change(made)
    with pytest.raises(ValueError, match=rf"that makes output: {message}"):
        check_nodes(around(made, depth))


def around(made: onnx.NodeProto, depth: str) -> onnx.ModelProto:
    """Return a model that has the node in its graph, in a branch of it, or in a function."""
    add = Nodes()
    if depth == "branch":

        def branch(inner: Nodes) -> list[str]:
            inner.nodes.append(made)
            return ["output"]

        add.choose("late", branch, lambda _: ["query"], [TensorProto.FLOAT])
    elif depth == "graph":
        add.nodes.append(made)
    model = helper.make_model(helper.make_graph(add.nodes, "graph", [], []))
    if depth == "function":
        model.functions.append(helper.make_function("mine", "F", [], [], [made], []))
    return model


def test_check_nodes_takes_what_the_builders_make() -> None:
    """Attention calls Quantize and Dequantize, with attributes of its own."""
    check_nodes(quantize_model(Scheme()))
    check_nodes(attention_model(SCHEME, SCHEME, heads=4, kv_heads=2, head_dim=8))


# --- biases and sinks ----------------------------------------------------------------------------

CONFIG = Config(heads=4, kv_heads=2, head_dim=8, capacity=16, attention_bias=True)


def steps(config: Config, **how: Any) -> tuple[Runner, dict[str, Any]]:
    rng = np.random.default_rng(0)
    runner = Runner(config, 2, **how)
    runner.step(make_inputs(config, rng, runner.lengths, 5, [5, 3]))
    inputs = make_inputs(config, rng, runner.lengths, 4, [4, 2])
    if config.attention_bias:
        inputs["attention_bias"] = np.zeros((2, 4, 4, 9), config.dtype)
    return runner, inputs


NATIVE = {"functions": (), "library": library_path()}
HOW: dict[str, dict[str, Any]] = {"function": {}, "native": NATIVE}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("sink", [{}, {"head_sink": True}, {"smooth_softmax": True}])
def test_a_query_that_the_bias_hides_everything_from(
    how: str, dtype: Any, sink: dict[str, Any]
) -> None:
    """A2. Its output is 0, with a sink and without, and no other query's changes."""
    runner, inputs = steps(replace(CONFIG, dtype=dtype, **sink), **HOW[how])
    other, same = steps(replace(CONFIG, dtype=dtype, **sink), **HOW[how])
    inputs["attention_bias"][1, 2, 1] = -np.inf
    output, plain = runner.step(inputs), other.step(same)
    hidden = np.zeros_like(output, bool)
    hidden[1, 1, 16:24] = True
    assert not output[hidden].any()
    assert plain[0].all()
    assert (output[~hidden] == plain[~hidden]).all()


@pytest.mark.parametrize("past", [[5, 3], [3000, 2500]], ids=["whole", "in segments"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_kernel_refuses_a_bias_that_is_no_number(
    value: float, dtype: Any, past: list[int]
) -> None:
    """A1. Its place is named, of several the first; the cache stays as it was."""
    config = replace(CONFIG, dtype=dtype, capacity=4000)
    runner = Runner(config, 2, in_place=True, **NATIVE)
    runner.cache = {name: np.zeros_like(x) for name, x in runner.cache.items()}
    runner.lengths = np.array(past)
    inputs = make_inputs(config, np.random.default_rng(0), runner.lengths, 4, [4, 2])
    good = np.zeros((2, 4, 4, past[0] + 4), dtype)
    # What is not seen is not looked at: later positions, and padding.
    good[0, :, 0, past[0] + 1] = np.nan
    good[1, :, 2:, :] = np.nan
    bad = inputs["attention_bias"] = good.copy()
    bad[1, 0, 0, past[1]] = bad[1, 3, 0, 1] = bad[1, 2, 1, 0] = value
    with pytest.raises(RuntimeError, match=rf"attention_bias\[1, 0, 0, {past[1]}\] is {value}"):
        runner.step(inputs)
    assert runner.lengths.tolist() == past
    assert not runner.cache["key_tail"].any()
    assert not runner.cache["value_tail"].any()
    inputs["attention_bias"] = good
    assert np.isfinite(runner.step(inputs)).all()


def test_one_bias_for_all_is_refused_where_any_row_sees_it() -> None:
    """A1. A query that is padding in one row is none in the other."""
    runner, inputs = steps(CONFIG, **NATIVE)
    bias = inputs["attention_bias"] = np.zeros((1, 1, 4, 9), np.float32)
    bias[0, 0, 3, 8] = np.nan
    with pytest.raises(RuntimeError, match=r"attention_bias\[0, 0, 3, 8\] is -?nan; a bias is"):
        runner.step(inputs)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_kernel_refuses_a_sink_that_is_no_number(value: float) -> None:
    """A1. -infinity is none."""
    runner, inputs = steps(replace(CONFIG, head_sink=True), **NATIVE)
    inputs["head_sink"][:] = -np.inf
    inputs["head_sink"][2] = value
    with pytest.raises(RuntimeError, match=rf"head_sink\[2\] is {value}; a sink is finite, or"):
        runner.step(inputs)
    inputs["head_sink"][2] = -np.inf
    output = runner.step(inputs)
    del inputs["head_sink"]
    assert output.tobytes() == steps(CONFIG, **NATIVE)[0].step(inputs).tobytes()


@pytest.mark.parametrize(
    ("without", "changed", "message"),
    [
        (["cos", "sin"], {}, "position_ids has no effect without cos"),
        (
            ["cos", "sin", "position_ids"],
            {},
            "rotary_interleaved=1 has no effect without cos",
        ),
        ([], {"smooth_softmax": 1}, "head_sink is given with attribute smooth_softmax=1"),
    ],
)
def test_the_kernel_refuses_options_that_mean_nothing(
    without: list[str], changed: dict[str, int], message: str
) -> None:
    """A1 A2. Of a node that another builder made."""
    config = replace(CONFIG, rotary=4, rotary_interleaved=True, position_ids=True, head_sink=True)
    feeds = make_inputs(config, np.random.default_rng(0), np.zeros(2), 4)
    feeds |= {f"past_{name}": np.zeros(*field) for name, field in config.cache(2).items()}
    feeds["past_lengths"] = np.zeros(2, np.int64)
    built = model(config, functions=[])
    assert np.isfinite(Session(built).run(feeds)["output"]).all()
    (made,) = built.graph.node
    made.input[:] = ["" if name in without else name for name in made.input]
    for one in made.attribute:
        if one.name in changed:
            one.i = changed[one.name]
    with pytest.raises(RuntimeError, match=message):
        Session(built).run(feeds)

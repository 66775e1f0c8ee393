"""Options of nsq.Attention as it runs: biases, sinks, and what means nothing together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from onnx_export.custom_ops import library_path
from tests.support.native_calls import Session
from tests.support.onnx_attention import Config, Runner, make_inputs, model

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

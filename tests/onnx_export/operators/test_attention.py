"""nsq.Attention as a function of standard operators and as a native kernel, beside `KVCache`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, assume, given, settings
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument

from nsq_ref import RangeError, Scheme, attention
from nsq_ref.strategies import schemes
from onnx_export.custom_ops import library_path
from onnx_export.operators import functions
from tests.support.onnx_attention import (
    Config,
    Expected,
    Runner,
    Tokens,
    attend,
    check,
    check_cache,
    make_inputs,
    model,
)
from tests.support.processors import CPUS

FUNCTION: dict[str, dict[str, Any]] = {
    "optimised": {},
    "as it is": {"optimised": False},
    "onnx.reference": {"reference": True},
}


def cache_schemes(**fixed: Any) -> st.SearchStrategy[Scheme]:
    return schemes(block_size=st.sampled_from([1, 2, 3, 5, 8]), outlier_channels=0, **fixed)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any model, small but for some head sizes."""
    head_dims = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 128, 256])
    kv_heads, group, head_dim = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(head_dims),
    )
    packed, causal, head_sink = (draw(st.booleans()) for _ in range(3))
    rotary = 2 * draw(st.integers(0, min(head_dim // 2, 5)))
    return Config(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=None if packed else draw(st.none() | head_dims),
        key=draw(cache_schemes()),
        value=draw(cache_schemes()),
        dtype=draw(st.sampled_from(["float32", "float16"])),
        capacity=28,  # four steps of 7 tokens
        scale=draw(st.sampled_from([None, -0.5, 1.0])),
        causal=causal,
        softcap=draw(st.sampled_from([None, None, 0.5, 30.0])),
        sliding_window=draw(st.sampled_from([None, 1, 2, 7, 1000])) if causal else None,
        smooth_softmax=not head_sink and draw(st.booleans()),
        rotary=rotary,
        rotary_interleaved=rotary > 0 and draw(st.booleans()),
        packed=packed,
        new_lengths=draw(st.booleans()),
        position_ids=rotary > 0 and draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        head_sink=head_sink,
    )


Run = tuple[Config, int, list[tuple[int, list[int]]], float]


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """A model, its batch, the new tokens of each step and row, and how norms spread."""
    config, batch = draw(configs()), draw(st.integers(1, 3))
    steps = []
    for tokens in draw(st.lists(st.sampled_from([1, 1, 2, 3, 7]), min_size=1, max_size=4)):
        counts = [tokens] * batch
        if config.new_lengths:
            counts = [draw(st.integers(0, tokens)) for _ in range(batch)]
        steps.append((tokens, counts))
    return config, batch, steps, draw(st.sampled_from([0.0, 0.0, 1.0, 3.0]))


def follow(run: Run, integers: bool = False, **how: Any) -> None:
    """Run the steps, and judge each."""
    config, batch, steps, spread = run
    rng = np.random.default_rng(config.head_dim + 100 * batch)
    runner, expected = Runner(config, batch, **how), Expected(config, batch, integers)
    for tokens, counts in steps:
        inputs = make_inputs(config, rng, expected.cache.lengths, tokens, counts, spread)
        try:
            check(runner, expected, inputs)
        except RangeError:
            assume(False)


# --- the harness ---------------------------------------------------------------------------------


@given(config=configs(), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_formula(config: Config, seed: int) -> None:
    """A1 A2 A3: without a bias and a sink, the formula here is that of nsq_ref.attention."""
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((2, config.heads, 3, config.head_dim))
    shape = (2, config.kv_heads, 6)
    keys, values = (
        rng.standard_normal((*shape, channels)) for channels in (config.head_dim, config.value_dim)
    )
    reaches = 2 * np.abs(keys), 3 * np.abs(values)
    key, value = (
        Tokens(x, reach, np.zeros_like(x), *np.zeros((2, *shape)))
        for x, reach in zip((keys, values), reaches, strict=True)
    )
    lengths, counts = np.array([6, 4]), np.array([2, 3])
    plain = Config(**vars(config) | {"smooth_softmax": False})
    got = attend(plain, query, key, value, lengths, counts, None, None)
    options: dict[str, Any] = {
        "lengths": lengths,
        "query_lengths": counts,
        "scale": float(np.float32(config.scale or 1 / np.sqrt(config.head_dim))),
        "causal": config.causal,
        "softcap": config.softcap,
        "sliding_window": config.sliding_window,
    }
    want = attention.attend(query, keys, values, **options).output
    np.testing.assert_allclose(got.output, want, rtol=1e-12, atol=1e-14)
    bound = attention.tolerance(query, keys, values, *reaches, **options).output
    np.testing.assert_allclose(got.bound, bound, rtol=1e-9)


# --- the function --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", FUNCTION)
@given(data=st.data())
@settings(max_examples=20)
def test_function(how: str, data: st.DataObject) -> None:
    """A1 A2 A3 B1 B2 K1: standard operators, in onnxruntime and in onnx.reference."""
    follow(data.draw(runs()), **FUNCTION[how])


def test_function_is_valid() -> None:
    """onnx.checker has nothing to say, at the oldest and at a later opset."""
    for opset in (21, 23, 24):
        onnx.checker.check_model(model(Config(), functions(opset), opset), full_check=True)


def test_defaults() -> None:
    """A node without its optional attributes has those of the default scheme."""
    config = Config(key=Scheme(block_size=2), value=Scheme(block_size=3))
    required = {"heads", "kv_heads", "key_block_size", "value_block_size"}
    built = model(config)
    (node,) = built.graph.node
    kept = [attribute for attribute in node.attribute if attribute.name in required]
    del node.attribute[:]
    node.attribute.extend(kept)
    runner, expected = Runner(config, 1), Expected(config, 1)
    runner.session = onnxruntime.InferenceSession(built.SerializeToString())
    rng = np.random.default_rng(0)
    for tokens in (5, 1):
        check(runner, expected, make_inputs(config, rng, expected.cache.lengths, tokens))


@pytest.mark.parametrize("how", FUNCTION)
def test_beyond_the_capacity(how: str) -> None:
    """What there is no room for is an error, not lost; the cache goes on as before."""
    config = Config(key=Scheme(block_size=4, sink_tokens=1), value=Scheme(block_size=8), capacity=8)
    runner, expected = Runner(config, 2, **FUNCTION[how]), Expected(config, 2)
    rng = np.random.default_rng(0)
    check(runner, expected, make_inputs(config, rng, expected.cache.lengths, 12, [12, 1]))
    too_many = make_inputs(config, rng, expected.cache.lengths, 2, [1, 2])
    with pytest.raises((IndexError, Fail, RuntimeError)):
        runner.step(too_many)
    check(runner, expected, make_inputs(config, rng, expected.cache.lengths, 2, [0, 2]))


# --- the native kernel ---------------------------------------------------------------------------


@pytest.fixture(params=CPUS)
def native(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Options of a runner that has nothing but the library, on one instruction set."""
    options: dict[str, Any] = {"functions": (), "library": library_path()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSQ_CPU", request.param)
        try:
            Runner(Config(), 1, **options)
        except InvalidArgument as error:
            if "this machine cannot run" not in str(error):
                raise
            patch.delenv("NSQ_CPU")  # then the best that the machine has
        yield options


@pytest.mark.parametrize("in_place", [False, True], ids=["copied", "in place"])
@pytest.mark.parametrize("exact", [True, False], ids=["float32", "integers"])
@given(run=runs())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kernel(native: dict[str, Any], exact: bool, in_place: bool, run: Run) -> None:
    """A1 A2 A3 B1 B2 K1: the library, whatever it runs on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSQ_EXACT", str(int(exact)))
        follow(run, not exact, in_place=in_place, **native)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(block_size=150, sink_tokens=1),
        Scheme(block_size=150, magnitude="lsq", symmetric=False),
        Scheme(block_size=150, bits=3, separate_norm=False, axis="token", symmetric=False),
        Scheme(block_size=150, bits=2, magnitude="gain", scale_rule="search"),
    ],
    ids=["norm", "lsq", "3 bits", "2 bits"],
)
def test_integers_are_fine_enough(native: dict[str, Any], scheme: Scheme) -> None:
    """Rounding queries and weights costs less than a tenth of what the codes cost (normal data)."""
    config = Config(
        heads=8, kv_heads=2, head_dim=128, value_head_dim=80, key=scheme, value=scheme,
        capacity=600, new_lengths=False,
    )  # fmt: skip
    runner, expected = Runner(config, 1, **native), Expected(config, 1)
    rng = np.random.default_rng(0)
    given = [make_inputs(config, rng, np.zeros(1), tokens) for tokens in (400, 1, 5)]
    for inputs in given:  # 5 queries of 4 heads: more rows than are prepared at a time
        result, output = expected.step(inputs), runner.step(inputs)
        check_cache(runner, expected)
    plain = []
    for name, channels in (("key", config.head_dim), ("value", config.value_dim)):
        x = np.concatenate([inputs[name] for inputs in given], axis=1)
        plain.append(x.reshape(1, -1, config.kv_heads, channels).swapaxes(1, 2))
    query = given[-1]["query"].reshape(1, 5, config.heads, -1).swapaxes(1, 2)
    true = attention.attend(query, *plain).output.swapaxes(1, 2).reshape(output.shape)
    cost_of_codes = np.linalg.norm(result.output - true)
    assert np.linalg.norm(output - result.output) < 0.1 * cost_of_codes

"""nsq.Attention with key feedback: its cache is that of KVCache(key_feedback=...), byte for byte.

In the function body and in the native library, on every instruction set; `test_scattered` has the
body of opset 24.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nsq_ref import Feedback, Scheme
from onnx_export.custom_ops import library_path
from tests.support.balance import check_keys_of_two_kinds
from tests.support.buffer_attention import BufferRunner, filled
from tests.support.onnx_attention import Config, Expected, Runner, check, check_cache, make_inputs
from tests.support.processors import CPUS

FORMS = {
    "opset 21": {"opset": 21},
    "onnx.reference": {"reference": True},
    **{cpu: {"functions": [], "library": library_path(), "in_place": True} for cpu in CPUS},
}
KEYS = {
    "gain": Scheme(bits=2, block_size=4, sink_tokens=2, symmetric=False, magnitude="gain"),
    "token": Scheme(bits=3, block_size=8, axis="token", magnitude="lsq", norm_dtype="float32"),
    "search": Scheme(block_size=4, separate_norm=False, scale_rule="search"),
}
# Of two rows: how many new tokens each step has, and how many of them each row has.
STEPS = ((1, [0, 1]), (7, [7, 3]), (9, [9, 0]), (1, [1, 1]), (12, [3, 12]), (2, [2, 1]))


def config_of(name: str, kv_heads: int = 2, **fields: Any) -> Config:
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((2, 50, 16)) @ rng.standard_normal((16, 16))
    return Config(
        heads=4, kv_heads=2, head_dim=16, value_head_dim=6, key=KEYS[name],
        value=Scheme(block_size=8, symmetric=False), capacity=32,
        feedback=Feedback.from_queries(queries, kv_heads), **fields,
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KEYS)
def test_cache_and_output(form: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """F1 B2 K1: rows that grow apart, blocks sealed of the tail and of the step, in any order."""
    if form in CPUS:
        monkeypatch.setenv("NSQ_CPU", form)
        monkeypatch.setenv("NSQ_EXACT", "1")
    options: dict[str, Any] = FORMS[form]
    config = config_of(name, kv_heads=1 + (name == "gain"), rotary=4)
    runner, expected = Runner(config, 2, **options), Expected(config, 2)
    rng = np.random.default_rng(1)
    for tokens, counts in STEPS:
        check(runner, expected, make_inputs(config, rng, runner.lengths, tokens, counts))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fed", [False, True], ids=["plain", "with feedback"])
def test_keys_with_balanced_norms(form: str, fed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """N3: blocks that have them and blocks that have not, sealed in whatever steps."""
    if form in CPUS:
        monkeypatch.setenv("NSQ_CPU", form)
        monkeypatch.setenv("NSQ_EXACT", "1")
    config = config_of("gain")
    check_keys_of_two_kinds(config if fed else replace(config, feedback=None), **FORMS[form])


def test_buffers_have_the_same_bytes() -> None:
    """F1: nsq.BufferAttention."""
    config = config_of("gain")
    runner, buffers = Runner(config, 2, **FORMS[CPUS[0]]), BufferRunner(config, 2, in_place=True)
    expected = Expected(config, 2)
    rng = np.random.default_rng(1)
    for tokens, counts in STEPS:
        inputs = make_inputs(config, rng, runner.lengths, tokens, counts)
        expected.step(inputs)
        assert (runner.step(inputs) == buffers.step(inputs))[:, : min(counts)].all()
        check_cache(runner, expected)
        lengths = runner.lengths.tolist()
        stored = filled(config, buffers.stored(), lengths)
        assert stored == filled(config, runner.cache, lengths)


@pytest.mark.parametrize("form", ["opset 21", CPUS[0]])
def test_feedback_shows_in_keys_alone(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """F1: beside a cache without, other keys are stored, and the same values."""
    monkeypatch.setenv("NSQ_CPU", CPUS[0])
    options: dict[str, Any] = FORMS[form]
    config = config_of("gain")
    plain = replace(config, feedback=None)
    inputs = make_inputs(config, np.random.default_rng(0), np.zeros(1, np.int64), 20)
    fed, other = Runner(config, 1, **options), Runner(plain, 1, **options)
    fed.step(inputs)
    other.step({name: x for name, x in inputs.items() if not name.startswith("key_")})
    check_cache(other, fed_by(plain, inputs))
    assert (
        fed.cache["key_packed"][:, :, :16].tobytes()
        != other.cache["key_packed"][:, :, :16].tobytes()
    )
    assert (fed.cache["value_packed"][:, :, :16] == other.cache["value_packed"][:, :, :16]).all()


def fed_by(config: Config, inputs: dict[str, Any]) -> Expected:
    expected = Expected(config, 1)
    expected.step(inputs)
    return expected


@pytest.mark.parametrize("part", ["key_order", "key_factor"])
def test_malformed_feedback_changes_nothing(part: str) -> None:
    """F1: it is refused when keys are to be sealed, before anything is written."""
    config = config_of("gain")
    runner = Runner(config, 1, **FORMS[CPUS[0]])
    expected = Expected(config, 1)
    rng = np.random.default_rng(0)
    for tokens in (3, 2):  # none is sealed yet
        check(runner, expected, make_inputs(config, rng, runner.lengths, tokens), slack=0.1)
    before = {name: array.tobytes() for name, array in runner.cache.items()}
    inputs = make_inputs(config, rng, runner.lengths, 5)
    wrong = inputs[part].copy()
    wrong[1, -1, ...] = 99
    says = "is channel 99, which is none" if part == "key_order" else "is 99; a factor is finite"
    with pytest.raises(RuntimeError, match=rf"{part}\[1, .*{says}"):
        runner.step(inputs | {part: wrong})
    with pytest.raises(RuntimeError, match=r"key_factor has shape \[(1|2), 16, 16\], expected"):
        runner.step(inputs | {part: inputs[part][:1]})
    assert {name: array.tobytes() for name, array in runner.cache.items()} == before
    check(runner, expected, inputs, slack=0.1)

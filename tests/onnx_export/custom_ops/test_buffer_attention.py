"""nsq.BufferAttention: nsq.Attention on one tensor a side, bit for bit, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument

from nsq_ref import Scheme
from onnx_export.operators.cache_buffers import buffer_layout
from tests.support.buffer_attention import (
    BufferRunner,
    buffer_session,
    crop,
    empty,
    filled,
    limit,
    tensors_runner,
)
from tests.support.onnx_attention import Config, make_inputs

REFUSED = (RuntimeError, InvalidArgument, Fail)
KEY = Scheme(block_size=4, sink_tokens=2, symmetric=False, magnitude="gain")
VALUE = Scheme(block_size=8, sink_tokens=1, symmetric=False, axis="token", norm_dtype="float32")
CONFIGS = {
    "all parts": Config(
        heads=4, kv_heads=2, head_dim=8, value_head_dim=6, key=KEY, value=VALUE, capacity=32,
        rotary=4, position_ids=True, attention_bias=True, head_sink=True,
    ),
    "float16, 3 bits": Config(
        heads=2, kv_heads=2, head_dim=16, key=Scheme(bits=3, block_size=4, separate_norm=False),
        value=Scheme(bits=3, block_size=4), capacity=24, dtype="float16",
    ),
    "integers": Config(
        heads=6, kv_heads=2, head_dim=64, key=Scheme(symmetric=False, block_size=32, sink_tokens=4),
        value=Scheme(symmetric=False, block_size=32, sink_tokens=4), capacity=96,
    ),
    "packed query": Config(heads=2, kv_heads=1, head_dim=8, capacity=16, packed=True),
}  # fmt: skip
SMALL = Config(heads=2, kv_heads=2, head_dim=8, key=Scheme(block_size=4), capacity=16)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "apart"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@given(data=st.data())
@settings(max_examples=12)
def test_is_attention_with_its_parts_elsewhere(
    config: Config, in_place: bool, data: st.DataObject
) -> None:
    """B1 C1. Output and every stored byte, while rows grow apart and tokens are taken back."""
    batch = data.draw(st.integers(1, 2))
    ours, theirs = BufferRunner(config, batch, in_place), tensors_runner(config, batch)
    most = limit(config)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            kept = [data.draw(st.integers(0, int(n))) for n in theirs.lengths]
            crop(theirs, kept)
            ours.lengths = np.array(kept, np.int64)
        room = most - int(theirs.lengths.max())
        if room == 0:
            break
        tokens = data.draw(st.integers(1, min(room, 40)))
        counts = [data.draw(st.integers(0, tokens)) for _ in range(batch)]
        inputs = make_inputs(config, rng, theirs.lengths, tokens, counts)
        output = ours.step(inputs)
        assert output.tobytes() == theirs.step(inputs).tobytes()
        assert ours.lengths.tolist() == theirs.lengths.tolist()
        assert filled(config, ours.stored(), ours.lengths) == filled(
            config, theirs.cache, theirs.lengths
        )


def grown(config: Config, tokens: int) -> BufferRunner:
    runner = BufferRunner(config, 1, in_place=True)
    runner.step(make_inputs(config, np.random.default_rng(0), runner.lengths, tokens, [tokens]))
    return runner


def test_holds_what_it_was_made_for_and_no_more() -> None:
    """The native layout has as much room as the one of Python says."""
    most = limit(SMALL)
    runner = grown(SMALL, most)
    inputs = make_inputs(SMALL, np.random.default_rng(0), runner.lengths, 1, [1])
    with pytest.raises(REFUSED, match=f"the {most} that past_key holds; give the cache a larger"):
        runner.step(inputs)
    assert runner.lengths.tolist() == [most]


def test_error_leaves_a_cache_of_the_tokens_that_were_kept() -> None:
    """What was taken back is gone; all before it can be gone on from."""
    runner, other = grown(SMALL, 11), grown(SMALL, 11)
    for one in (runner, other):
        one.lengths = np.array([6])
    bad = make_inputs(SMALL, np.random.default_rng(1), runner.lengths, 9, [9])
    bad["key"][0, 8, 0] = np.nan
    with pytest.raises(REFUSED, match="key is not finite"):
        runner.step(bad)
    good = make_inputs(SMALL, np.random.default_rng(2), runner.lengths, 9, [9])
    assert runner.step(good).tobytes() == other.step(good).tobytes()
    assert runner.cache["key"].tobytes() == other.cache["key"].tobytes()


def test_refusal_after_tokens_were_taken_back_says_how_many_are_left() -> None:
    """M4. A block that cannot be sealed, over blocks that were there."""
    huge = Config(
        heads=1, kv_heads=1, head_dim=8, capacity=16,
        key=Scheme(block_size=4, magnitude="gain"), value=Scheme(block_size=4),
    )  # fmt: skip
    runner = grown(huge, 15)
    runner.lengths = np.array([5])
    bad = make_inputs(huge, np.random.default_rng(1), runner.lengths, 9, [9])
    bad["key"][...] = 3e38
    with pytest.raises(REFUSED, match="cannot be sealed"):
        runner.step(bad)
    runner.lengths = np.array([6])
    with pytest.raises(REFUSED, match=r"past_lengths\[0\] is 6; past_key and past_value have 5"):
        runner.step(bad)


def call(config: Config, runner: BufferRunner, **changed: Any) -> None:
    """Run one step with some tensors changed."""
    feeds = make_inputs(config, np.random.default_rng(0), runner.lengths, 1, [1])
    feeds |= {"past_lengths": runner.lengths}
    feeds |= {f"past_{side}": array for side, array in runner.cache.items()} | changed
    session = runner.session
    names = {one.name for one in session.get_inputs()}
    session.run(None, {name: array for name, array in feeds.items() if name in names})


def test_call_is_accepted_unless_changed() -> None:
    call(SMALL, grown(SMALL, 7))


def header(runner: BufferRunner, head: int, mark: int | None, length: int) -> dict[str, Any]:
    past = runner.cache["key"].copy()
    words = past[0, head, 0, :16].view(np.int64)
    words[:] = [words[0] if mark is None else mark, length]
    return {"past_key": past}


@pytest.mark.parametrize(
    ("mark", "length", "message"),
    [
        (1, 7, "past_key is no cache of this node at row 0, head 1; begin with zeros"),
        (0, 7, "no cache of this node"),
        (None, -1, "no cache of this node"),
        (None, 2**62, "no cache of this node"),
        (None, 20, "no cache of this node"),
        (None, 6, "past_key has 6 tokens at row 0, head 1, and the head before it 7"),
    ],
)
def test_header_that_is_none_is_refused(mark: int | None, length: int, message: str) -> None:
    runner = grown(SMALL, 7)
    with pytest.raises(REFUSED, match=message):
        call(SMALL, runner, **header(runner, 1, mark, length))


def test_past_that_was_never_stored_is_refused() -> None:
    runner = grown(SMALL, 7)
    runner.lengths = np.array([8])
    with pytest.raises(REFUSED, match=r"past_lengths\[0\] is 8; past_key and past_value have 7"):
        call(SMALL, runner)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 1), "past_key has shape"),
        ((1, 2, 1, 1, 640), "past_key has shape"),
        ((2, 2, 1, 640), "past_key has shape"),
        ((1, 1, 1, 640), "past_key has shape"),
        ((1, 0, 1, 640), "past_key has shape"),
        ((1, 2, 1, 0), "has 0 bytes a head, too few"),
        ((1, 2, 0, 640), "has 0 bytes a head, too few"),
        ((1, 2, 1, 128), "has 128 bytes a head, too few"),
        ((1, 2, 1, 641), "expected a multiple of 64"),
    ],
)
def test_shape_that_is_none_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(REFUSED, match=message):
        call(SMALL, BufferRunner(SMALL, 1, in_place=True), past_key=np.zeros(shape, np.uint8))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(REFUSED, match="Unexpected input data type"):
        call(
            SMALL,
            BufferRunner(SMALL, 1, in_place=True),
            past_key=np.zeros((1, 2, 1, 160), np.float32),
        )


def test_memory_at_an_odd_address_is_refused() -> None:
    runner = BufferRunner(SMALL, 1, in_place=True)
    cache = empty(SMALL, 1)["key"]
    memory = np.zeros(cache.nbytes + 1 + 64, np.uint8)
    start = -memory.ctypes.data % 64 + 1
    runner.cache["key"] = memory[start : start + cache.nbytes].reshape(cache.shape)
    with pytest.raises(REFUSED, match="begins at an odd address"):
        runner.step(make_inputs(SMALL, np.random.default_rng(0), runner.lengths, 1, [1]))


def test_sides_that_share_memory_are_refused() -> None:
    runner = BufferRunner(SMALL, 1, in_place=True)
    runner.cache["value"] = runner.cache["key"]
    with pytest.raises(REFUSED, match="overlaps"):
        runner.step(make_inputs(SMALL, np.random.default_rng(0), runner.lengths, 1, [1]))


# Some are of a cache of the node; of any, only those that are small in memory.
SHAPES = st.one_of(
    st.tuples(st.just(1), st.just(2), st.sampled_from([1, 2, 3]), st.sampled_from([64, 640])),
    st.lists(st.sampled_from([0, 1, 2, 3, 64, 640]), max_size=5).filter(
        lambda shape: math.prod(shape) < 1 << 18
    ),
)


@given(
    shape=SHAPES,
    head_dim=st.sampled_from([1, 2, 8, 64]),
    block=st.sampled_from([1, 4, 128, 2**31, 2**62]),
    sinks=st.sampled_from([0, 3, 2**40, 2**62]),
    past=st.sampled_from([-1, 0, 1, 2**62]),
    content=st.sampled_from([0, 1, 255]),
)
@settings(max_examples=60)
def test_whatever_it_is_given_it_refuses_or_runs(
    shape: Sequence[int], head_dim: int, block: int, sinks: int, past: int, content: int
) -> None:
    """Sizes whose product is beyond 64 bits, axes that are missing, bytes of anything."""
    scheme = Scheme(block_size=block, sink_tokens=sinks)
    config = Config(heads=2, kv_heads=2, head_dim=head_dim, key=scheme, value=SMALL.value)
    session = buffer_session(config)
    _, nbytes = buffer_layout(SMALL.value, head_dim=head_dim, capacity=8)
    feeds = make_inputs(config, np.random.default_rng(0), np.zeros(1), 1, [1])
    names = {one.name for one in session.get_inputs()}
    feeds = {name: array for name, array in feeds.items() if name in names} | {
        "past_lengths": np.array([past]),
        "past_key": np.full(shape, content, np.uint8),
        "past_value": np.zeros((1, 2, 1, nbytes), np.uint8),
    }
    try:
        output = session.run(["output"], feeds)[0]
    except REFUSED:
        return
    assert np.isfinite(output).all()

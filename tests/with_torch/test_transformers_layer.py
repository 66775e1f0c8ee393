"""`NsqLayer` and the arguments of `NsqCache`: what is stored, after any operations; and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import nsq_ref as nsq
from nsq_ref.strategies import feedbacks
from nsq_ref.transformers import NsqCache, NsqLayer
from nsq_ref.transformers.passes import Stored
from tests.with_torch.tiny_decoders import CACHE, config_of, decoder, prompt

KEY = replace(nsq.Scheme.named("streaming4"), block_size=8)  # one sink
VALUE = replace(nsq.Scheme.named("nsep+pchan3"), block_size=6)


FEEDBACK = nsq.Feedback.from_queries(np.random.default_rng(0).standard_normal((2, 5, 4)), 2)


def tokens(count: int, rows: int = 1, seed: int = 0, dtype: Any = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, 2, count, 4, generator=generator).to(dtype)


def held(layer: NsqLayer) -> list[dict[str, bytes]]:
    """Every byte that is stored, row by row."""
    cache = layer.kv_cache
    assert cache is not None
    return [
        {name: array.tobytes() for name, array in side.arrays.items()}
        for row in range(cache.batch)
        for side in cache.stored(row)
    ]


def fresh(
    rows: list[Any], leads: list[int] | None = None, feedback: nsq.Feedback | None = None
) -> list[dict[str, bytes]]:
    """What a `KVCache` has of dense rows ``[2, kv_heads, T, D]``, each appended alone and at once."""
    found = []
    for index, row in enumerate(rows):
        cache = nsq.KVCache(1, 2, 4, KEY, VALUE, key_feedback=feedback)
        lead = leads[index] if leads else 0
        cache.append(*row[:, None, :, lead:])
        found += [
            {name: array.tobytes() for name, array in side.arrays.items()}
            for side in cache.stored()
        ]
    return found


operations = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 21)),
        st.tuples(st.just("take back"), st.integers(0, 8)),
        st.tuples(st.just("keep all but"), st.integers(1, 8)),
        st.tuples(st.just("reorder"), st.permutations([0, 1, 1])),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("select"), st.just([0])),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=6,
)


@settings(max_examples=40)
@given(
    operations,
    st.sampled_from([None, [0, 0], [5, 0], [3, 12]]),
    st.none() | feedbacks(2, 4, kinds=("queries", "ties")),
)
def test_any_operations(
    steps: list[tuple[str, Any]], leads: list[int] | None, feedback: nsq.Feedback | None
) -> None:
    """B1 B2 K1 F1: the bytes of all that is left, appended at once, whatever was done before."""
    layer = NsqLayer((KEY, VALUE), leads, feedback)
    x = tokens(400, rows=2)
    rows, own, at, last = [x[:, i, :, :0] for i in range(2)], list(leads or [0, 0]), 0, 0
    for step, value in [("update", 23), *steps, ("update", 13)]:
        if step == "update":
            if not at:
                rows, own = [x[:, i, :, :0] for i in range(2)], list(leads or [0, 0])
            new = torch.stack([x[:, i % 2, :, at : at + value] for i in range(len(rows))], 1)
            layer.update(*new)
            rows = [torch.cat([row, new[:, i]], 2) for i, row in enumerate(rows)]
            at, last = at + value, value
        elif step in ("take back", "keep all but"):
            count = min(value, last)
            if count < at:
                layer.crop(-count if step == "take back" else at - count)
                rows = [row[:, :, : at - count] for row in rows]
                at, last = at - count, 0
        elif step == "reset":
            layer.reset()
            at = last = 0
        elif at:
            order = {
                "reorder": [i % len(rows) for i in value] if step == "reorder" else [],
                "repeat": [i for i in range(len(rows)) for _ in range(2)],
                "select": [0],
            }[step]
            if len(order) > 6:
                continue
            if step == "reorder":
                layer.reorder_cache(torch.tensor(order))
            elif step == "repeat":
                layer.batch_repeat_interleave(value)
            else:
                layer.batch_select_indices(torch.tensor(order))
            rows, own, last = [rows[i] for i in order], [own[i] for i in order], 0
    assert layer.get_seq_length() == at
    assert layer.get_mask_sizes(5) == (at + 5, 0)
    assert held(layer) == fresh(rows, own, feedback)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feedback", [None, FEEDBACK])
def test_a_prompt_in_chunks_or_one_by_one(dtype: Any, feedback: nsq.Feedback | None) -> None:
    x = tokens(70, rows=2, dtype=dtype)
    found = [fresh([x[:, 0], x[:, 1]], feedback=feedback)]
    for size in (70, 1, 9, 33):
        layer = NsqLayer((KEY, VALUE), None, feedback)
        for start in range(0, 70, size):
            layer.update(*x[:, :, :, start : start + size])
        found.append(held(layer))
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_pass_sees(dtype: Any) -> None:
    """New tokens as they are, sinks and tail too; those between as they decode."""
    x = tokens(40, rows=2, dtype=dtype)
    layer = NsqLayer((KEY, VALUE))
    first = layer.update(*x[:, :, :, :30])
    assert all(torch.equal(*pair) for pair in zip(first, x[:, :, :, :30], strict=True))
    assert layer.kv_cache is not None
    decoded = layer.kv_cache.dequantize()
    shown = layer.update(*x[:, :, :, 30:])
    layer.crop(-10)  # later changes do not show
    layer.update(*x[:, :, :, :10])
    for side, (sinks, sealed) in enumerate([(1, 24), (0, 30)]):
        assert isinstance(shown[side], Stored)
        assert (shown[side].shape, shown[side].dtype) == ((2, 2, 40, 4), dtype)
        tensor = shown[side] + 0
        assert torch.equal(tensor[:, :, :sinks], x[side, :, :, :sinks])
        assert torch.equal(tensor[:, :, sinks + sealed :], x[side, :, :, sinks + sealed :])
        between = slice(sinks, sinks + sealed)
        expected = torch.from_numpy(decoded[side][:, :, between]).to(dtype)
        assert torch.equal(tensor[:, :, between], expected)
        assert not torch.equal(tensor[:, :, between], x[side, :, :, between])


def test_a_crop_into_what_was_sealed_before_the_last_pass() -> None:
    """C1: the tokens of a block that is cut return as their decoded values."""
    x = tokens(60, rows=2)
    layer, cache = NsqLayer((KEY, VALUE)), nsq.KVCache(2, 2, 4, KEY, VALUE)
    for start in range(0, 60, 20):
        layer.update(*x[:, :, :, start : start + 20])
        cache.append(*x[:, :, :, start : start + 20])
    layer.crop(-33)
    cache.crop(27)
    assert held(layer) == [
        {name: array.tobytes() for name, array in side.arrays.items()}
        for row in range(2)
        for side in cache.stored(row)
    ]
    assert held(layer) != fresh([x[:, 0, :, :27], x[:, 1, :, :27]])
    layer.crop(-100)
    assert layer.get_seq_length() == 0


def test_padding_may_be_anything() -> None:
    x = tokens(20, rows=2)
    x[:, 0, :, :9] = torch.nan
    layer = NsqLayer((KEY, VALUE), [9, 0])
    layer.update(*x[:, :, :, :4])
    layer.update(*x[:, :, :, 4:])
    assert held(layer) == fresh([x[:, 0], x[:, 1]], [9, 0])


# --- arguments ----------------------------------------------------------------------------------


def test_kinds_of_layers() -> None:
    """Layers with a sliding window are transformers' own."""
    for family in ("gemma2", "gemma3"):
        names = [type(layer).__name__ for layer in NsqCache(config_of(family)).layers]
        assert names == ["DynamicSlidingWindowLayer", "NsqLayer"]


def schemes_of(cache: NsqCache) -> list[Any]:
    return [getattr(layer, "schemes", None) for layer in cache.layers]


def test_rows_of_states_go_with_those_of_attention() -> None:
    layer = NsqCache(config_of("zamba2")).layers[1]
    layer.update_recurrent_state(torch.arange(6.0).view(2, 3))
    layer.update(*tokens(30, rows=2))
    before = held(layer)
    layer.batch_select_indices(torch.tensor([1, 1]))
    assert held(layer) == before[len(before) // 2 :] * 2
    assert layer.recurrent_states[0].tolist() == [[3, 4, 5]] * 2
    assert not layer.is_croppable
    layer.reset()
    assert (layer.kv_cache, layer.keys, layer.recurrent_states[0].abs().max()) == (None, None, 0)


def test_what_a_layer_holds() -> None:
    """Models that read it find padding as zeros, and what is stored decoded."""
    x, layer = tokens(30, rows=2, dtype=torch.bfloat16), NsqLayer((KEY, VALUE), [4, 0])
    assert layer.keys is None
    layer.update(*x)
    assert layer.kv_cache is not None
    stored = [torch.from_numpy(side).to(torch.bfloat16) for side in layer.kv_cache.dequantize()]
    for shown, side in zip((layer.keys, layer.values), stored, strict=True):
        assert (shown.shape, shown.dtype) == (x.shape[1:], torch.bfloat16)
        assert torch.equal(shown[0], torch.cat([torch.zeros(2, 4, 4), side[0, :, :26]], 1))
        assert torch.equal(shown[1], side[1])


def test_policies() -> None:
    config, usual = config_of("llama"), nsq.Scheme.named("streaming4")
    sized = nsq.Scheme.named("nsep+pchan4")
    kivi = tuple(replace(x, block_size=32) for x in nsq.Scheme.named("nsep+KIVI"))
    both = (KEY, VALUE)
    both_json = {"key": KEY.to_dict(), "value": VALUE.to_dict()}
    cases: list[tuple[dict[str, Any], list[Any]]] = [
        ({}, [(usual, usual)] * 2),
        ({"policy": {}}, [(usual, usual)] * 2),
        ({"policy": {1: both}}, [(usual, usual), both]),
        ({"policy": {0: None}, "key": KEY, "value": VALUE}, [None, both]),
        ({"policy": [both, None]}, [both, None]),
        ({"policy": (None, ["streaming4", KEY])}, [None, (usual, KEY)]),
        ({"policy": {"layers": {"0": None}}, "key": KEY, "value": VALUE}, [None, both]),
        ({"policy": {"default": "streaming4", "layers": {"1": both_json}}}, [(usual, usual), both]),
        ({"policy": {0: "nsep+KIVI"}, "key": "nsep+KIVI", "block_size": 32}, [kivi, kivi]),
        (
            {"key": sized, "value": sized, "block_size": 32},
            [(replace(sized, block_size=32),) * 2] * 2,
        ),
    ]
    for arguments, expected in cases:
        assert schemes_of(NsqCache(config, **arguments)) == expected
    assert schemes_of(NsqCache(config_of("gemma2"), policy=[None, both])) == [None, both]
    file = {"default": both_json, "layers": {"0": None}}
    assert schemes_of(NsqCache(config_of("gemma2"), policy=file)) == [None, both]
    assert schemes_of(NsqCache(config_of("gemma2"), policy={"default": both_json})) == [None, both]


T5 = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("llama", {"key": "nsep+pchan4"}, ValueError, r"^key has block_size=None.*a block_size, such as"),
    ("llama", {"value": 4}, TypeError, r"^value"),
    ("llama", {"key": "nsep+pchan5"}, ValueError, r"nsep\+pchan5"),
    ("llama", {"policy": [None]}, ValueError, r"^policy has 1 entries; the model has 2 layers$"),
    ("llama", {"policy": {2: None}}, ValueError, r"^a layer of policy=2 must be .* 0 to 1$"),
    ("llama", {"policy": {"0": None}}, TypeError, r"^a layer of policy='0' is not an integer"),
    ("llama", {"policy": {"layers": {"2": None}}}, ValueError, r"^policy: there is no layer 2"),
    ("llama", {"policy": "streaming4"}, TypeError, r"^policy='streaming4' is no mapping"),
    ("llama", {"policy": {1: "streaming4"}}, TypeError, r"^policy\[1\]: .* is no pair of schemes"),
    ("llama", {"policy": {1: (KEY, None)}}, TypeError, r"^policy\[1\]: .* is no pair of schemes"),
    ("llama", {"policy": {1: (KEY, "naive4")}}, ValueError, r"^policy\[1\]: value has block_size=None"),
    ("gemma2", {"policy": {0: (KEY, VALUE)}}, ValueError, r"^policy\[0\] .*DynamicSlidingWindowLayer"),
    ("llama", {"attention_mask": [1, 1]}, ValueError, r"^attention_mask has shape \[2\]"),
    ("llama", {"attention_mask": [[1], [0]]}, ValueError, r"^attention_mask\[1\] is not zeros, then"),
    ("llama", {"attention_mask": [[0, 1, 0]]}, ValueError, r"^attention_mask\[0\] is not zeros, then"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "arguments", "kind", "message"), REFUSED)
def test_refused_arguments(
    family: str, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        NsqCache(config_of(family), **arguments)


def test_refused_models() -> None:
    with pytest.raises(ValueError, match="config is of an encoder with a decoder"):
        NsqCache(T5)
    sliding = config_of("gemma2", layer_types=["sliding_attention"] * 2)
    with pytest.raises(ValueError, match="config has no layer of full attention"):
        NsqCache(sliding)


def test_refused_passes() -> None:
    """All that is refused leaves the cache as it was."""
    model, ids = decoder("llama"), prompt()
    cache = NsqCache(model.config, KEY, VALUE)
    with pytest.raises(TypeError, match=r"^key_states needs a gradient.*torch.no_grad\(\)"):
        model(ids, **{CACHE: cache})
    assert (cache.get_seq_length(), cache.layers[0].kv_cache) == (0, None)
    layer, x = NsqLayer((KEY, VALUE)), tokens(30)
    layer.update(*x)
    before = held(layer)
    wrong = tokens(30)
    wrong[1, 0, 1, 3, 2] = torch.inf
    for tensors, kind, message in [
        (x.to("meta"), ValueError, "^key_states is on meta; NsqCache runs on the CPU"),
        (
            tokens(3, rows=2),
            ValueError,
            r"^NsqCache holds 1 rows and the model runs 2; reset\(\) it",
        ),
        (
            x.double(),
            TypeError,
            r"^key_states is torch\.float64; NsqCache keeps .*model\.float\(\)",
        ),
        (x.to(torch.bfloat16), TypeError, "^keys has dtype bfloat16 and this cache keeps float32"),
        (wrong, ValueError, r"^values\[0, 1, 3, 2\] is inf"),
    ]:
        with pytest.raises(kind, match=message):
            layer.update(*tensors)
        assert (layer.get_seq_length(), held(layer)) == (30, before)
    with pytest.raises(
        ValueError, match="attention_mask of NsqCache has 2 rows and the model runs 3"
    ):
        NsqLayer((KEY, VALUE), [0, 1]).update(*tokens(3, rows=3))


def test_refused_operations() -> None:
    layer = NsqLayer((KEY, VALUE))
    layer.update(*tokens(30))
    for call in (layer.offload, layer.prefetch):
        with pytest.raises(NotImplementedError, match="cannot be offloaded"):
            call()
    for rows in (torch.tensor([1]), torch.tensor([True])):
        with pytest.raises((TypeError, ValueError), match="rows"):
            layer.batch_select_indices(rows)
    with pytest.raises(TypeError, match=r"tokens_to_remove=-1\.5 is not an integer"):
        layer.crop(-1.5)  # type: ignore[arg-type]
    assert layer.get_max_length() == -1

"""`model.generate` with an `NsqCache`: tokens and logits, family by family."""

from __future__ import annotations

import copy
import doctest
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import nsq_ref as nsq
import nsq_ref.transformers.cache
from nsq_ref.transformers import NsqCache, NsqLayer, attention
from nsq_ref.transformers.passes import Stored
from tests.with_torch.reference_cache import reference_cache
from tests.with_torch.tiny_decoders import CACHE, FAMILIES, OTHERS, decoder, prompt

KEY = replace(nsq.Scheme.named("streaming4"), block_size=8)  # one sink
VALUE = replace(nsq.Scheme.named("nsep+pchan3"), block_size=6)
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 4},
}
LEADS = [0, 11, 3]
MIXED = [9, 1, 17, 4, 1, 1, 17]  # tokens a pass
attentions = pytest.mark.parametrize("attention", ["sdpa", "nsq"])
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Models so small gain nothing from more, and lose where others work too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generated(model: Any, ids: Any, cache: Any, new: int = 20, **options: Any) -> Any:
    """Tokens and logits of ``generate``, whatever mode, always of the same seed."""
    torch.manual_seed(5)
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    made = model.generate(
        ids, max_new_tokens=new, pad_token_id=0, eos_token_id=-1,
        return_dict_in_generate=True, output_logits=True, **{CACHE: cache}, **options,
    )  # fmt: skip
    return made.sequences, torch.stack(made.logits)


def padded(rows: int = 3) -> tuple[Any, Any]:
    ids = prompt(rows)
    mask = torch.ones_like(ids)
    for row, lead in enumerate(LEADS):
        mask[row, :lead] = 0
    return ids * mask, mask


def stepwise(model: Any, cache: Any, ids: Any, steps: list[int], mask: Any = None) -> Any:
    """Logits of the tokens in passes of so many."""
    logits, at = [], 0
    with torch.no_grad():
        for step in steps:
            seen = None if mask is None else mask[:, : at + step]
            chunk = ids[:, at : at + step]
            logits.append(model(chunk, **{CACHE: cache}, attention_mask=seen).logits)
            at += step
    return torch.cat(logits, 1)


# --- nothing is sealed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "attention", "mode"),
    [(family, "nsq", mode) for family in FAMILIES for mode in ("greedy", "beams")]
    + [(family, "sdpa", mode) for family in ("qwen3", "gemma2") for mode in MODES]
    + [("llama", "nsq", "sampling"), ("llama", "nsq", "lookup")],
)
def test_a_dynamic_cache_while_nothing_is_sealed(family: str, attention: str, mode: str) -> None:
    """K1 B1: every bit of the logits, so all tokens."""
    model, ids = decoder(family, attention), prompt(1 if mode == "lookup" else 2)
    expected = generated(model, ids, DynamicCache(config=model.config), **MODES[mode])
    cache = NsqCache(model.config)
    found = generated(model, ids, cache, **MODES[mode])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert cache.get_seq_length() == 30 + 19


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_half_precision_while_nothing_is_sealed(family: str, dtype: Any) -> None:
    model, ids = decoder(family, "nsq", dtype), prompt(2)
    expected = generated(model, ids, DynamicCache(config=model.config))
    cache = NsqCache(model.config)
    assert torch.equal(generated(model, ids, cache)[0], expected[0])
    kept = cache.layers[1].kv_cache
    assert kept.dtype.name == str(dtype).removeprefix("torch.")


@attentions
@pytest.mark.parametrize("told", [False, True])
def test_padding_while_nothing_is_sealed(attention: str, told: bool) -> None:
    model, (ids, mask) = decoder("qwen3", attention), padded()
    expected = generated(model, ids, DynamicCache(config=model.config), attention_mask=mask)
    cache = NsqCache(model.config, attention_mask=mask if told else None)
    found = generated(model, ids, cache, attention_mask=mask)
    assert torch.equal(found[0], expected[0])
    lengths = [49 - lead for lead in LEADS] if told else [49] * 3
    assert cache.layers[0].kv_cache.lengths.tolist() == lengths


# --- sealed: the codec's own reconstruction -----------------------------------------------------


@families
@pytest.mark.parametrize("mode", ["sampling", "beams", "lookup"])
def test_generate_is_that_of_the_reconstruction(family: str, mode: str) -> None:
    """Decoded keys and values are those of `quantize` on the same blocks, bit for bit: so is all
    that follows, with beams that fork and with drafts that are rejected."""
    model, ids = decoder(family), prompt(1 if mode == "lookup" else 2)
    ids[:, 15:] = ids[:, :15]  # something to look up
    expected = generated(model, ids, reference_cache(model.config, KEY, VALUE), **MODES[mode])
    found = generated(model, ids, NsqCache(model.config, KEY, VALUE), **MODES[mode])
    dense = generated(model, ids, DynamicCache(config=model.config), **MODES[mode])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[1].shape != dense[1].shape or not torch.equal(found[1], dense[1])


@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family: str) -> None:
    """K1 B1 A3, with one row that is padded."""
    ids, mask = (x[:2] for x in padded())
    model = decoder(family)
    config = model.config

    def found(model: Any, cache: Any) -> Any:
        return generated(model, ids, cache, attention_mask=mask)

    dense = found(model, DynamicCache(config=config))
    assert torch.equal(found(model, NsqCache(config))[1], dense[1])
    expected = found(model, reference_cache(config, KEY, VALUE))
    decoded = found(model, NsqCache(config, KEY, VALUE))
    assert torch.equal(decoded[1], expected[1])
    assert not torch.equal(decoded[1], dense[1])
    reading = decoder(family, "nsq")
    if family == "bloom":
        with pytest.raises(ValueError, match=r"not for BloomForCausalLM.*use 'eager'"):
            found(reading, NsqCache(config, KEY, VALUE))
        return
    read = found(reading, NsqCache(config, KEY, VALUE, attention_mask=mask))
    expected = found(model, reference_cache(config, KEY, VALUE, LEADS[:2]))
    assert torch.equal(read[0], expected[0])
    assert (read[1] - expected[1]).abs().max() <= 5e-4 * expected[1].abs().max()


@attentions
def test_an_image(attention: str) -> None:
    """Keys of an image come once; later passes find them in their layer."""
    shape = {
        "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97,
        "max_position_embeddings": 512, "cross_attention_layers": [1],
    }  # fmt: skip
    sight = {
        "hidden_size": 32, "attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_global_layers": 1, "image_size": 28, "patch_size": 14, "vision_output_dim": 64,
        "intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    config = transformers.MllamaConfig(
        vision_config=sight,
        text_config={**shape, "eos_token_id": 95, "bos_token_id": 94, "pad_token_id": 0},
    )
    model = transformers.MllamaForConditionalGeneration._from_config(
        config, attn_implementation={"text_config": attention, "vision_config": "sdpa"}
    ).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "gate" in name else weight.normal_(0, 0.25)

    def found(cache: Any, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        seen = {
            "pixel_values": torch.randn(2, 1, 1, 3, 28, 28, generator=generator),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
            "cross_attention_mask": torch.ones(2, 30, 1, 1, dtype=torch.long),
        }
        return generated(model, prompt(2) % 94, cache, num_beams=2, **seen)[1]

    expected = found(DynamicCache(config=config))
    assert torch.equal(found(NsqCache(config)), expected)
    assert not torch.equal(found(NsqCache(config), seed=1), expected)


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 7}, {"assistant_early_exit": 1}])
@attentions
def test_other_ways_to_generate(attention: str, options: dict[str, int]) -> None:
    """A prompt in chunks; a model that drafts for itself."""
    model, ids = decoder("llama", attention), prompt()
    expected = generated(model, ids, reference_cache(model.config, KEY, VALUE), **options)
    found = generated(model, ids, NsqCache(model.config, KEY, VALUE), **options)
    assert torch.equal(found[0], expected[0])
    dense = generated(model, ids, DynamicCache(config=model.config), **options)
    assert torch.equal(generated(model, ids, NsqCache(model.config), **options)[1], dense[1])


def test_attention_with_a_static_cache() -> None:
    """It attends as PyTorch's function does, whatever the cache."""
    logits = []
    for function in ("sdpa", "nsq"):
        model, ids = decoder("qwen3", function), prompt(2)
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        logits.append(generated(model, ids, cache)[1])
    assert torch.equal(*logits)


@attentions
def test_autocast(attention: str) -> None:
    """Keys are float32 there, rotated, and values bfloat16."""
    model, ids = decoder("llama", attention), prompt(1, 40)
    logits = []
    with torch.autocast("cpu", torch.bfloat16):
        for cache in (NsqCache(model.config), DynamicCache(config=model.config)):
            logits.append(stepwise(model, cache, ids, [30, 1, 4, 5]))
        sealed = stepwise(model, NsqCache(model.config, KEY, VALUE), ids, [30, 1, 4, 5])
    assert torch.equal(*logits)
    assert not torch.equal(sealed, logits[0])


def test_caches_stay_outside_of_compiled_graphs() -> None:
    """A compiled model takes 20 seconds to find out that its logits are the same."""
    for function in (NsqLayer.update, Stored.plain, attention):
        assert function._torchdynamo_disable


@attentions
def test_threads_with_caches_of_their_own(attention: str) -> None:
    model, ids = decoder("llama", attention), prompt(2, 50)

    def run(_: int) -> Any:
        return stepwise(model, NsqCache(model.config, KEY, VALUE), ids, MIXED)

    expected = run(0)
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(run, range(4)))


def test_two_turns() -> None:
    """A cache goes on with a longer conversation; what is said meanwhile comes in one pass."""
    model, ids = decoder("qwen2"), prompt()
    both = []
    for cache in (NsqCache(model.config, KEY, VALUE), reference_cache(model.config, KEY, VALUE)):
        said = generated(model, ids, cache)[0]
        both.append(generated(model, torch.cat([said, prompt(1, 21, seed=2)], 1), cache)[1])
    assert torch.equal(*both)


@attentions
def test_an_assistant_is_that_of_the_reconstruction(attention: str) -> None:
    """The assistant's own cache is transformers', the model's is ours; many drafts are rejected."""
    model, assistant = decoder("llama", attention), decoder("llama", "sdpa", seed=0)
    with torch.no_grad():
        assistant.lm_head.weight += 0.03 * torch.randn_like(assistant.lm_head.weight)
    ids = prompt()
    expected = generated(
        model, ids, reference_cache(model.config, KEY, VALUE), assistant_model=assistant, new=40
    )
    cache = NsqCache(model.config, KEY, VALUE)
    found = generated(model, ids, cache, assistant_model=assistant, new=40)
    assert torch.equal(found[0], expected[0])
    if attention == "sdpa":
        assert torch.equal(found[1], expected[1])
    assert cache.layers[0].kv_cache.lengths.tolist() == [found[0].shape[1] - 1]


@attentions
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_padding_is_that_of_the_reconstruction(attention: str, told: bool, mode: str) -> None:
    model, (ids, mask) = decoder("qwen2", attention), padded()
    reference = reference_cache(model.config, KEY, VALUE, LEADS if told else None)
    expected = generated(model, ids, reference, attention_mask=mask, **MODES[mode])
    cache = NsqCache(model.config, KEY, VALUE, attention_mask=mask if told else None)
    found = generated(model, ids, cache, attention_mask=mask, **MODES[mode])
    assert torch.equal(found[0], expected[0])
    assert (found[1] - expected[1]).abs().max() <= 2e-4 * expected[1].abs().max()


@pytest.mark.parametrize(
    ("family", "dtype", "steps"),
    [(family, torch.float32, MIXED) for family in FAMILIES]
    + [(family, torch.bfloat16, MIXED) for family in ("qwen3", "gemma2")]
    + [("llama", torch.bfloat16, [30, *[1] * 20]), ("gemma3", torch.float32, [1] * 50)],
)
def test_attention_to_what_is_stored(family: str, dtype: Any, steps: list[int]) -> None:
    """A3: logits of both attentions, in single tokens, chunks that are read and chunks decoded."""
    ids = prompt(2, 50)
    model = decoder(family, "sdpa", dtype)
    expected = stepwise(model, reference_cache(model.config, KEY, VALUE), ids, steps)
    decoded = stepwise(model, NsqCache(model.config, KEY, VALUE), ids, steps)
    dense = stepwise(model, DynamicCache(config=model.config), ids, steps)
    assert torch.equal(decoded, expected)
    stored = stepwise(decoder(family, "nsq", dtype), NsqCache(model.config, KEY, VALUE), ids, steps)
    off, effect = (stored - expected).abs().float(), (dense - expected).abs().float()
    if dtype == torch.float32:
        assert off.max() <= 1e-4 * expected.abs().max()
        assert effect.max() > 1e-2 * expected.abs().max()  # so it can tell
    else:  # every layer rounds, and codes differ where keys do
        assert off.mean() <= 0.1 * effect.mean()


def test_few_queries_decode_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = decoder("gemma2", "nsq"), padded()
    cache = NsqCache(model.config, KEY, VALUE, attention_mask=mask)
    stepwise(model, cache, ids, [30], mask)
    monkeypatch.delattr(nsq.KVCache, "dequantize")
    more = torch.cat([mask, torch.ones(3, 40, dtype=mask.dtype)], 1)
    with torch.no_grad():
        model(prompt(3, 5), **{CACHE: cache}, attention_mask=more[:, :35])
        model(prompt(3, 1), **{CACHE: cache}, attention_mask=more[:, :36])
        with pytest.raises(AttributeError, match="dequantize"):
            model(prompt(3, 17), **{CACHE: cache}, attention_mask=more[:, :53])


def test_another_mask_is_obeyed() -> None:
    """What a stored cache cannot show, some tokens hidden, goes the other way."""
    ids = prompt(1, 40)
    mask = torch.ones(1, 1, 1, 41, dtype=torch.bool)
    mask[..., 20:25] = False
    logits = []
    for function in ("sdpa", "nsq"):
        model = decoder("llama", function)
        cache = NsqCache(model.config, KEY, VALUE)
        stepwise(model, cache, ids, [40])
        with torch.no_grad():
            logits.append(model(ids[:, :1], **{CACHE: cache}, attention_mask=mask).logits)
    assert torch.equal(*logits)


def test_a_bias_is_obeyed() -> None:
    """What no stored cache is attended to with goes the other way as well."""
    layer = NsqLayer((KEY, VALUE))
    x = torch.randn(2, 1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    layer.update(*x[:, :, :, :39])
    keys, values = layer.update(*x[:, :, :, 39:])
    query = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-3, 3, 40).expand(1, 2, 1, 40)
    module = torch.nn.Module().eval()
    found, _ = attention(module, query, keys, values, None, position_bias=bias, scaling=0.25)
    scores = 0.25 * query @ (keys + 0).mT + bias
    torch.testing.assert_close(found[:, 0], (scores.softmax(-1) @ (values + 0))[:, :, 0])
    unbiased, _ = attention(module, query, keys, values, None, scaling=0.25)
    assert (found - unbiased).abs().max() > 0.1


def test_sinks_and_caps_need_a_function() -> None:
    module, x = torch.nn.Linear(2, 2), torch.ones(1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"learned sinks \(s_aux\) for Linear.*use 'eager'"):
        attention(module, x, x, x, None, s_aux=torch.zeros(1))


@pytest.mark.parametrize("leads", [LEADS, [0] * 3])
def test_capped_scores_are_those_of_transformers(leads: list[int]) -> None:
    ids, mask = padded()
    if not any(leads):  # there is no mask then
        mask = torch.ones_like(mask)
    both = []
    for function in ("eager", "nsq"):
        model = decoder("gemma2", function)
        both.append(stepwise(model, DynamicCache(config=model.config), ids, [30], mask))
    for row, lead in enumerate(leads):
        torch.testing.assert_close(*(x[row, lead:] for x in both), atol=1e-4, rtol=1e-4)


# --- prompts that are used again ----------------------------------------------------------------


def test_a_prefix_is_used_again() -> None:
    model, ids = decoder("llama"), prompt(1, 40)
    prefix = NsqCache(model.config, KEY, VALUE)
    stepwise(model, prefix, ids, [32])
    bytes_before = prefix.layers[1].kv_cache.stored().keys.arrays["packed"].tobytes()
    several = [generated(model, ids, copy.deepcopy(prefix)) for _ in range(2)]
    fresh = NsqCache(model.config, KEY, VALUE)
    stepwise(model, fresh, ids, [32])
    assert torch.equal(several[0][1], generated(model, ids, fresh)[1])
    assert torch.equal(several[0][1], several[1][1])
    assert prefix.layers[1].kv_cache.stored().keys.arrays["packed"].tobytes() == bytes_before


def test_reset() -> None:
    model, (ids, mask) = decoder("gemma3"), padded()
    cache = NsqCache(model.config, KEY, VALUE, attention_mask=mask)
    first = generated(model, ids, cache, attention_mask=mask, num_beams=2)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, cache.is_initialized) == (0, 0, False)
    second = generated(model, ids, cache, attention_mask=mask, num_beams=2)
    assert torch.equal(first[1], second[1])


def test_layers_by_policy() -> None:
    model, ids = decoder("llama"), prompt(2)
    cache = NsqCache(model.config, KEY, VALUE, policy={0: None})
    found = generated(model, ids, cache)
    assert [isinstance(layer, NsqLayer) for layer in cache.layers] == [False, True]
    assert cache.layers[1].schemes == (KEY, VALUE)
    reference = reference_cache(model.config, KEY, VALUE)
    reference.layers[0] = DynamicCache(config=model.config).layers[0]
    assert torch.equal(found[1], generated(model, ids, reference)[1])
    dense = cache.layers[0].keys.nbytes + cache.layers[0].values.nbytes
    token = dense // 49  # the last pass, which is kept as it came
    assert cache.nbytes == dense + cache.layers[1].kv_cache.nbytes + token < 2 * dense


# --- examples that are run ----------------------------------------------------------------------


def test_examples_of_the_module() -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(nsq_ref.transformers.cache, optionflags=flags)
    assert result.attempted > 5
    assert not result.failed


def test_the_tutorial() -> None:
    page = Path(__file__).parents[2] / "docs" / "tutorials" / "transformers.md"
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testfile(str(page), module_relative=False, optionflags=flags)
    assert result.attempted > 10
    assert not result.failed

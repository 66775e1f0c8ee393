"""Key feedback (F1) in models of transformers: from the queries of a text to what is generated."""

from __future__ import annotations

import copy
import doctest
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode

import nsq_ref as nsq
import nsq_ref.transformers.attending
import nsq_ref.transformers.moments
from nsq_ref.files import save_feedback
from nsq_ref.transformers import NsqCache, NsqLayer, query_moments
from tests.with_torch.reference_cache import reference_cache
from tests.with_torch.test_transformers import KEY, VALUE, generated, stepwise
from tests.with_torch.tiny_decoders import FAMILIES, OTHERS, config_of, decoder, prompt

Float64 = npt.NDArray[np.float64]
KEY2 = replace(KEY, bits=2, magnitude="gain")


def random_feedback(kv_heads: int, head_dim: int, seed: int = 0) -> nsq.Feedback:
    """Return that of some queries whose channels have much in common."""
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((kv_heads, 9, head_dim))
    return nsq.Feedback.from_queries(
        queries @ rng.standard_normal((kv_heads, head_dim, head_dim)), kv_heads
    )


# --- moments of queries -------------------------------------------------------------------------


def moment_of(queries: Float64, kv_heads: int) -> Float64:
    """Sum q q^T of ``[batch, heads, T, D]`` over what shares a key head."""
    batch, heads, tokens, head_dim = queries.shape
    shared = queries.reshape(batch, kv_heads, heads // kv_heads, tokens, head_dim)
    moment: Float64 = np.einsum("bkgti,bkgtj->kij", shared, shared)
    return moment


def rotated(queries: Float64, theta: float) -> Float64:
    """Turn channel i and the one half of them later by the position over theta^(2i/D)."""
    *_, tokens, head_dim = queries.shape
    half = head_dim // 2
    angles = np.arange(tokens)[:, None] / theta ** (np.arange(half) / half)
    first, second = queries[..., :half], queries[..., half:]
    turned = [
        first * np.cos(angles) - second * np.sin(angles),
        second * np.cos(angles) + first * np.sin(angles),
    ]
    return np.concatenate(turned, axis=-1)


def theta_of(config: Any, layer: int) -> float:
    told = config.rope_parameters
    if "rope_theta" not in told:  # by the type of the layer
        told = told[config.layer_types[layer]]
    return float(told["rope_theta"])


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_projected_and_rotated_queries(family: str) -> None:
    """With four query heads for two of keys, and layers with a sliding window."""
    model, ids = decoder(family), prompt(2, 40)
    projected: list[Float64] = []
    hooks = []
    for one in model.model.layers:
        last = getattr(one.self_attn, "q_norm", one.self_attn.q_proj)
        hooks.append(
            last.register_forward_hook(lambda *args: projected.append(args[2].double().numpy()))
        )
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    found = query_moments(model, ids)
    assert list(found.layers) == [0, 1]
    for layer, queries in enumerate(projected):
        by_head = queries.reshape(2, -1, 4, 16) if queries.ndim == 3 else queries
        if by_head.shape[1] != 4:
            by_head = by_head.swapaxes(1, 2)
        assert by_head.shape == (2, 4, 40, 16)
        expected = moment_of(rotated(by_head, theta_of(model.config, layer)), 2)
        np.testing.assert_allclose(found.layers[layer], expected, rtol=1e-4, atol=1e-2)
        assert np.abs(moment_of(by_head, 2) - expected).max() > 1  # so it can tell


class Calls(TorchFunctionMode):
    """Takes the queries that attentions of PyTorch's, or products with turned keys, are given."""

    def __init__(self, tokens: int, *, eager: bool) -> None:
        super().__init__()
        self.queries: list[Float64] = []
        self.tokens, self.eager = tokens, eager

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.eager:
            taken = func is torch.matmul and args[1].shape[-1] == self.tokens
        else:
            taken = func is torch.nn.functional.scaled_dot_product_attention
        if taken:
            self.queries.append(args[0].detach().double().numpy())
        return func(*args, **(kwargs or {}))


# Of the attentions of a model, in their order, which layer of the cache has the keys.
LAYERS = {"gemma3n": [0, 1, 0, 1], "qwen3 next": [1], "zamba2": [1]}
REFUSED_FAMILIES = {
    "bloom": "BloomForCausalLM computes its attention itself",
    "deepseek v3": "layer 0: no query of DeepseekV3ForCausalLM is seen to meet the keys",
}


@pytest.mark.parametrize("family", [one for one in OTHERS if one not in REFUSED_FAMILIES])
def test_moments_of_other_families(family: str) -> None:
    """Those of layers that share keys are one; layers without a cache of keys have none."""
    model, ids = decoder(family), prompt(1, 35)
    with torch.no_grad(), Calls(35, eager=family == "gpt oss") as calls:
        model(ids, use_cache=False)
    found = query_moments(model, ids)
    order = LAYERS.get(family, [0, 1])
    assert len(order) == len(calls.queries)
    assert set(found.layers) == set(order)
    heads = {
        layer: shape[1]
        for layer, shape in enumerate(key_shapes(model, ids))
        if shape is not None
    }  # fmt: skip
    for layer, moment in found.layers.items():
        met = [one for at, one in zip(order, calls.queries, strict=True) if at == layer]
        expected = sum(moment_of(one, heads[layer]) for one in met)
        np.testing.assert_allclose(moment, expected, rtol=1e-4, atol=1e-3 * np.abs(moment).max())


def key_shapes(model: Any, ids: Any) -> list[Any]:
    cache = transformers.DynamicCache(config=model.config)
    stepwise(model, cache, ids, [ids.shape[1]])
    return [
        one.keys.shape if isinstance(getattr(one, "keys", None), torch.Tensor) else None
        for one in cache.layers
    ]


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_queries_that_are_not_seen(family: str) -> None:
    model = decoder(family)
    with pytest.raises(ValueError, match=REFUSED_FAMILIES[family]):
        query_moments(model, prompt())
    assert model.config._attn_implementation != "nsq_moments"


def test_texts_add_up_and_padding_is_not_read() -> None:
    """On either side, bit for bit; and the model is as it was."""
    model, ids = decoder("qwen3", "nsq"), prompt(3, 30)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    mask[2, 20:] = 0
    together = query_moments(model, ids, mask)
    alone = [query_moments(model, ids[row : row + 1, mask[row] == 1]) for row in range(3)]
    total = alone[0] + alone[1] + alone[2]
    for layer in (0, 1):
        assert together.layers[layer].tobytes() == total.layers[layer].tobytes()
        assert (together.layers[layer] != query_moments(model, ids).layers[layer]).any()
    assert model.config._attn_implementation == "nsq"
    assert not model.training
    made = total.feedback(0.5)
    assert list(made) == ["0", "1"]
    for layer, moment in total.layers.items():
        assert made[str(layer)].digest == nsq.Feedback.from_moment(moment, 0.5).digest


def test_refused_texts_and_models() -> None:
    model, ids = decoder("llama"), prompt()
    for arguments, error, message in (
        ((ids[0],), ValueError, r"input_ids has shape \[30\]; give \[batch, T\]"),
        ((ids.float(),), TypeError, "input_ids"),
        ((ids + 90,), ValueError, r"input_ids\[0, \d+\] is \d+; the model has tokens 0 to 96"),
        ((-ids,), ValueError, r"input_ids\[0, 0\] is -\d+; the model has"),
        ((ids, ids[:, :3]), ValueError, r"attention_mask has shape \[1, 3\], and input_ids"),
        ((ids, 0 * ids), ValueError, "input_ids has no tokens"),
    ):
        with pytest.raises(error, match=message):
            query_moments(model, *arguments)
    with pytest.raises(TypeError, match="model must be a PreTrainedModel, got str"):
        query_moments("llama", ids)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is in training mode; call model\.eval"):
        query_moments(decoder("llama").train(), ids)
    broken = decoder("llama")
    with torch.no_grad():
        broken.model.layers[1].self_attn.q_proj.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"^layer 1: queries\[0, 0, 0, 3\] is nan"):
        query_moments(broken, ids)
    assert broken.config._attn_implementation == "sdpa"
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape)).eval()
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder with a decoder"):
        query_moments(t5, ids)
    mamba = transformers.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(ValueError, match="MambaForCausalLM has no layer with a cache of keys"):
        query_moments(transformers.MambaForCausalLM(mamba).eval(), ids)


# --- caches with feedback -----------------------------------------------------------------------


def random_feedbacks() -> dict[int, nsq.Feedback]:
    """Return feedback of the two layers of most families."""
    return {layer: random_feedback(2, 16, layer) for layer in range(2)}


@pytest.mark.parametrize(
    ("family", "attention", "options"),
    [
        ("gemma2", "sdpa", {"num_beams": 3}),
        ("llama", "sdpa", {"prompt_lookup_num_tokens": 4}),
        ("qwen3", "nsq", {}),
    ],
)
def test_generate_is_that_of_the_reconstruction(
    family: str, attention: str, options: dict[str, Any]
) -> None:
    """F1: of `quantize` with the same feedback, through forks and drafts that are rejected."""
    model, ids, feedback = decoder(family, attention), prompt(), random_feedbacks()
    ids[:, 15:] = ids[:, :15]  # something to look up
    reference = reference_cache(model.config, KEY2, VALUE, key_feedback=feedback)
    expected = generated(decoder(family), ids, reference, **options)
    found = generated(
        model, ids, NsqCache(model.config, KEY2, VALUE, key_feedback=feedback), **options
    )
    plain = generated(model, ids, NsqCache(model.config, KEY2, VALUE), **options)
    if attention == "sdpa":
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    elif found[1].shape == expected[1].shape:
        assert torch.equal(found[0], expected[0])
        assert (found[1] - expected[1]).abs().max() <= 2e-4 * expected[1].abs().max()
    assert found[1].shape != plain[1].shape or not torch.equal(found[1], plain[1])


@pytest.mark.parametrize("named", [int, str, Path])
def test_a_layer_is_the_cache_of_its_feedback(named: type, tmp_path: Path) -> None:
    """By number, by name, or from a file; it can be saved, and goes on."""
    model, ids = decoder("llama"), prompt(1, 60)
    by_name = {str(layer): one for layer, one in random_feedbacks().items()}
    path = tmp_path / "feedback.safetensors"
    save_feedback(path, by_name)
    feedback: Any = {int: random_feedbacks(), str: by_name, Path: path}[named]
    cache = NsqCache(model.config, KEY, VALUE, key_feedback=feedback)
    taken: list[list[Any]] = [[], []]
    for layer, kept in zip(cache.layers, taken, strict=True):
        own = layer.update

        def update(keys: Any, values: Any, own: Any = own, kept: Any = kept, **_: Any) -> Any:
            kept.append((keys, values))
            return own(keys, values)

        layer.update = update
    stepwise(model, cache, ids, [40, 1, 19])
    for number, (layer, kept) in enumerate(zip(cache.layers, taken, strict=True)):
        one = random_feedbacks()[number]
        expected = nsq.KVCache(1, 2, 16, KEY, VALUE, key_feedback=one)
        for keys, values in kept:
            expected.append(keys, values)
        assert layer.kv_cache.key_feedback.digest == one.digest
        layer.kv_cache.save(tmp_path / "ours")
        expected.save(tmp_path / "theirs")
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        loaded = nsq.KVCache.load(tmp_path / "ours", key_feedback=one)
        loaded.append(*kept[0])
        with pytest.raises(ValueError, match="are coded with another feedback"):
            nsq.KVCache.load(tmp_path / "ours", key_feedback=random_feedback(2, 16, 7))


def test_copies_and_a_reset_keep_it() -> None:
    model, ids = decoder("gemma3"), prompt(2, 40)
    cache = NsqCache(model.config, KEY2, VALUE, key_feedback=random_feedbacks())
    first = stepwise(model, cache, ids, [30, 10])
    other = copy.deepcopy(cache)
    assert other.layers[1].key_feedback is cache.layers[1].key_feedback
    more = [stepwise(model, one, prompt(2, 15, seed=3), [1, 14]) for one in (cache, other)]
    assert torch.equal(*more)
    cache.reset()
    assert torch.equal(stepwise(model, cache, ids, [30, 10]), first)
    loaded = pickle.loads(pickle.dumps(cache.layers[1].kv_cache))
    assert loaded.key_feedback.digest == random_feedbacks()[1].digest


def test_layers_that_stay_in_floating_point_have_none() -> None:
    """Whether a policy says so or the model, whose window is transformers' own."""
    feedback = random_feedbacks()
    cache = NsqCache(config_of("gemma2"), key_feedback=feedback)
    assert not isinstance(cache.layers[0], NsqLayer)
    assert cache.layers[1].key_feedback is feedback[1]
    some = NsqCache(config_of("llama"), key_feedback={1: feedback[1]}, policy={1: None})
    assert some.layers[0].key_feedback is None
    hybrid = random_feedback(4, 24)
    cache = NsqCache(config_of("zamba2"), KEY2, VALUE, key_feedback={1: hybrid})
    assert cache.layers[1].key_feedback is hybrid
    model, ids = decoder("zamba2"), prompt(1, 60)
    logits = [
        stepwise(model, one, ids, [50, 10])
        for one in (cache, NsqCache(model.config, KEY2, VALUE))
    ]  # fmt: skip
    assert not torch.equal(*logits)


def test_refused_feedback(tmp_path: Path) -> None:
    config, one = config_of("llama"), random_feedback(2, 16)
    (tmp_path / "other").write_bytes(b"not of ours")
    wrong: list[tuple[Any, type[Exception], str]] = [
        ({2: one}, ValueError, "^key_feedback: there is no layer 2; the model has layers 0 to 1"),
        ({"x": one}, ValueError, "^key_feedback: 'x' is no number of a layer"),
        ({1: one, "1": one}, ValueError, "^key_feedback: layer 1 is named twice"),
        ({0: one.factor}, TypeError, "^key_feedback: layer 0 must be a Feedback, got ndarray"),
        ({}, ValueError, "^key_feedback is empty"),
        (one, TypeError, "^key_feedback must be a mapping from layer to Feedback, got Feedback"),
        (tmp_path / "none", FileNotFoundError, "none"),
        (str(tmp_path / "other"), ValueError, "other"),
    ]
    for feedback, error, message in wrong:
        with pytest.raises(error, match=message):
            NsqCache(config, key_feedback=feedback)
    model = decoder("llama")
    for kv_heads, head_dim in ((4, 16), (2, 8)):
        other = random_feedback(kv_heads, head_dim)
        cache = NsqCache(config, key_feedback={1: other})
        message = (
            rf"^key_feedback: layer 1 is of {kv_heads} key/value heads of {head_dim} channels, and "
            "the model's of 2 of 16; calibrate this model"
        )
        with pytest.raises(ValueError, match=message):
            stepwise(model, cache, prompt(), [30])
        assert (cache.layers[1].kv_cache, cache.layers[1].get_seq_length()) == (None, 0)
    for_all = NsqCache(config, KEY, key_feedback={1: random_feedback(1, 16)})
    stepwise(model, for_all, prompt(), [30])  # one head may be for all


def test_a_profile_that_is_made_for_feedback() -> None:
    """Every layer that has its name must have some; transformers' own layers need none."""
    best, one = nsq.Scheme.named("best-3"), random_feedback(2, 16)
    for policy in (None, {0: None}, {"layers": {"0": None}}, {"default": "best-3"}):
        key = None if policy == {"default": "best-3"} else "best-3"
        given: list[Any] = [None] if policy is None else [None, {0: one}]
        for feedback in given:
            with pytest.raises(ValueError, match=r"layer [01]: best-3 is made for feedback"):
                NsqCache(config_of("llama"), key, policy=policy, key_feedback=feedback)
        cache = NsqCache(config_of("llama"), key, policy=policy, key_feedback={0: one, 1: one})
        assert (cache.layers[1].schemes, cache.layers[1].key_feedback) == (best, one)
    for entry in ({0: "best-3"}, ["best-3", "small-3"], {"layers": {"0": "best-3"}}):
        with pytest.raises(ValueError, match=r"(policy\[0\]|layer 0): best-3 is made for feedback"):
            NsqCache(config_of("llama"), policy=entry, key_feedback={1: one})
        cache = NsqCache(config_of("llama"), policy=entry, key_feedback={0: one})
        assert cache.layers[0].schemes == best
    for policy in (None, {"default": "best-3"}):
        feedback = {1: random_feedbacks()[1]}
        NsqCache(config_of("gemma2"), "best-3", policy=policy, key_feedback=feedback)


# --- from a text to a cache ---------------------------------------------------------------------


def biased(seed: int = 0) -> Any:
    """A model whose queries have much in common, as those of trained ones have."""
    model = decoder("qwen2", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.self_attn.q_proj.bias
            bias.copy_(6 * torch.randn(bias.shape, generator=generator))
    return model


def test_queries_see_less_of_the_errors_of_keys() -> None:
    """On another text than that of calibration."""
    model = biased()
    feedback = query_moments(model, prompt(4, 100, seed=5)).feedback()
    ids = prompt(1, 140, seed=6)
    moments = query_moments(model, ids).layers
    seen = []
    for given in (None, feedback):
        cache = NsqCache(model.config, KEY2, VALUE, key_feedback=given)
        dense = transformers.DynamicCache(config=model.config)
        for one in (cache, dense):
            stepwise(model, one, ids, [140])
        errors = [
            (ours.keys + 0).double().numpy() - theirs.keys.double().numpy()
            for ours, theirs in zip(cache.layers, dense.layers, strict=True)
        ]
        seen.append(
            sum(np.einsum("bhti,hij,bhtj->", e, moments[i], e) for i, e in enumerate(errors))
        )
    assert seen[1] < 0.8 * seen[0]


@pytest.mark.parametrize("name", ["attending", "moments"])
def test_examples_of_the_modules(name: str) -> None:
    module = getattr(nsq_ref.transformers, name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(module, optionflags=flags)
    assert result.attempted > 1
    assert not result.failed

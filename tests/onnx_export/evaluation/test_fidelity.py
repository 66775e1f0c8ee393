"""The prefill-and-continuation protocol, against likelihoods computed without it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nsq_ref import Scheme
from nsq_ref.comparison import round_trips
from onnx_export.evaluation.fidelity import (
    Comparison,
    Transform,
    TransformFidelity,
    compare,
    measure_fidelity,
)
from onnx_export.models.decoder import Decoder, KeyValueCache
from onnx_export.models.texts import passages
from onnx_export.models.tokenizer import Tokenizer
from tests.support.llama_oracle import TinyModel

Float = NDArray[np.float32]
MODEL = TinyModel()
PASSAGES = np.random.default_rng(0).integers(0, 40, (3, 31))
P, C = 20, 8


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("fidelity")
    return Decoder.from_gguf(MODEL.write(folder / "tiny.gguf"), cache_dir=folder)


def identity(keys: Float, values: Float) -> KeyValueCache:
    return keys, values


def rounded(keys: Float, values: Float) -> KeyValueCache:
    return np.round(keys), np.round(values)


def test_an_exact_transform_costs_exactly_nothing(decoder: Decoder) -> None:
    result = measure_fidelity(
        decoder, PASSAGES, {"exact": identity}, prefill_length=P, continuation_length=C
    )["exact"]
    assert result.nll == result.baseline_nll
    assert (result.nll_change, result.nll_change_error) == (0, 0)
    assert (result.perplexity_change, result.perplexity_change_error) == (0, 0)


def test_the_baseline_is_the_likelihood_of_the_tokens_after_the_first(decoder: Decoder) -> None:
    result = measure_fidelity(
        decoder, PASSAGES, {"exact": identity}, prefill_length=P, continuation_length=C
    )["exact"]
    for row, nll in zip(PASSAGES, result.baseline_nll, strict=True):
        logits, _, _ = MODEL.forward(row.tolist())
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        scored = [-math.log(probabilities[t, row[t + 1]]) for t in range(P, P + C)]
        assert nll == pytest.approx(np.mean(scored), abs=1e-5)


def test_a_transform_replaces_the_prefilled_cache_only(decoder: Decoder) -> None:
    """Against the same thing done token by token."""
    result = measure_fidelity(
        decoder,
        PASSAGES,
        {"exact": identity, "rounded": rounded},
        prefill_length=P,
        continuation_length=C,
    )["rounded"]
    for row, nll in zip(PASSAGES, result.nll, strict=True):
        _, keys, values = decoder.forward(row[None, :P])
        past = rounded(keys, values)
        scored = []
        for t in range(P, P + C):
            logits, keys, values = decoder.forward(row[None, t : t + 1], past)
            past = keys, values
            last = logits[0, 0].astype(np.float64)
            scored.append(np.log(np.exp(last).sum()) - last[row[t + 1]])
        assert nll == pytest.approx(np.mean(scored), abs=1e-5)
    assert abs(result.nll_change) > 1e-3


def test_entries_of_the_registry_are_transforms(decoder: Decoder) -> None:
    trips = round_trips({"fine": "pca48", "turboquant2": "turboquant2", "naive8": "naive8"})
    results = measure_fidelity(decoder, PASSAGES, trips, prefill_length=P, continuation_length=C)
    changes = {name: abs(result.nll_change) for name, result in results.items()}
    assert 0 < changes["fine"] < 1e-3 < changes["turboquant2"]
    assert trips["turboquant2"].bits_per_element == 2 + 16 / 8
    assert trips["turboquant2"].elements == 2 * 2 * 2 * 8 * P * len(PASSAGES)


def test_transforms_see_the_whole_cache_read_only_and_in_order(decoder: Decoder) -> None:
    seen: list[str] = []
    progress: list[tuple[int, int]] = []

    def watch(name: str) -> Transform:
        def transform(keys: Float, values: Float) -> KeyValueCache:
            seen.append(name)
            assert keys.shape == values.shape == (2, 1, 2, P, 8)
            with pytest.raises(ValueError, match="read-only"):
                keys[0] = 0
            with pytest.raises(ValueError, match="read-only"):
                values[0] = 0
            return keys, values

        return transform

    results = measure_fidelity(
        decoder,
        PASSAGES,
        {"b": watch("b"), "a": watch("a")},
        prefill_length=P,
        continuation_length=C,
        progress=lambda what, done, total: progress.append((done, total)),
    )
    assert list(results) == ["b", "a"]
    assert seen == ["b", "a"] * 3
    assert progress == [(done, 12) for done in range(1, 13)]


def test_standard_errors() -> None:
    """The paired error by hand, that of perplexity against the jackknife."""
    random = np.random.default_rng(0)
    base = random.normal(3, 0.3, 200)
    changed = base + random.normal(0.05, 0.02, 200)
    result = TransformFidelity(tuple(changed), tuple(base))
    difference = changed - base
    assert result.nll_change == pytest.approx(difference.mean())
    variance = ((difference - difference.mean()) ** 2).sum() / 199
    assert result.nll_change_error == pytest.approx(math.sqrt(variance / 200))
    assert result.baseline_perplexity == pytest.approx(math.exp(base.mean()))
    assert result.perplexity_change == pytest.approx(
        math.exp(changed.mean()) - math.exp(base.mean())
    )
    without = [
        math.exp(np.delete(changed, i).mean()) - math.exp(np.delete(base, i).mean())
        for i in range(200)
    ]
    jackknife = math.sqrt(199 * np.var(without))
    assert result.perplexity_change_error == pytest.approx(jackknife, rel=0.01)


def test_a_destroyed_model_has_infinite_perplexity() -> None:
    result = TransformFidelity((800.0, 900.0), (3.0, 3.0))
    assert result.perplexity == math.inf
    assert result.perplexity_change == math.inf
    assert result.perplexity_change_error == math.inf
    assert result.nll_change == 847.0


BAD_TRANSFORMS = {
    "shape": (
        lambda keys, values: (keys, values[..., :-1, :]),
        ValueError,
        "must return values as float32",
    ),
    "dtype": (
        lambda keys, values: (keys.astype(np.float64), values),
        TypeError,
        "got float64 of shape",
    ),
    "not a number": (
        lambda keys, values: (keys * np.nan, values),
        ValueError,
        "returned keys that are not fin",
    ),
    "nothing": (lambda keys, values: None, TypeError, r"must return a tuple \(keys, values\)"),
    "only keys": (lambda keys, values: (keys,), TypeError, r"must return a tuple \(keys, values\)"),
    "lists": (
        lambda keys, values: (keys.tolist(), values),
        TypeError,
        "must return keys as float32",
    ),
}


@pytest.mark.parametrize("name", BAD_TRANSFORMS)
def test_a_wrong_transform_is_named(decoder: Decoder, name: str) -> None:
    transform, kind, message = BAD_TRANSFORMS[name]
    with pytest.raises(kind, match=message) as error:
        measure_fidelity(
            decoder, PASSAGES, {"bad": transform}, prefill_length=P, continuation_length=C
        )
    assert "transform 'bad'" in str(error.value)


BAD_CALLS = {
    "no transforms": ({"transforms": {}}, "transforms must name at least one"),
    "no prefill": ({"prefill_length": 0}, "prefill_length=0 must be an integer of at least 1"),
    "nothing scored": (
        {"continuation_length": 0},
        "continuation_length=0 must be an integer of at least 1",
    ),
    "one passage": ({"passages": PASSAGES[:1]}, "a standard error needs at least 2 passages"),
    "short passages": ({"passages": PASSAGES[:, :28]}, "is 29 tokens"),
    "floats": ({"passages": PASSAGES * 1.0}, "passages has dtype float64; give integers"),
    "one row": ({"passages": PASSAGES[0]}, r"\[passages, tokens\], got \(31,\)"),
    "unknown token": ({"passages": PASSAGES + 40}, "outside the vocabulary of 40"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_wrong_arguments_are_refused(decoder: Decoder, name: str) -> None:
    changes, message = BAD_CALLS[name]
    arguments = {
        "passages": PASSAGES,
        "transforms": {"exact": identity},
        "prefill_length": P,
        "continuation_length": C,
    } | changes
    with pytest.raises((TypeError, ValueError), match=message):
        measure_fidelity(decoder, **arguments)


def test_smollm2_loses_by_four_bits_and_hardly_by_eight(
    smollm2_decoder: Decoder, smollm2_tokenizer: Tokenizer
) -> None:
    def per_token(levels: int) -> Transform:
        def quantize(array: Float) -> Float:
            scale = np.abs(array).max(axis=-1, keepdims=True) / levels
            return np.asarray(np.round(array / scale) * scale, np.float32)

        return lambda keys, values: (quantize(keys), quantize(values))

    results = measure_fidelity(
        smollm2_decoder,
        passages(smollm2_tokenizer, 641, 4),
        {"8 bits": per_token(127), "4 bits": per_token(7), "3 bits": per_token(3)},
    )
    assert 5 < results["8 bits"].baseline_perplexity < 60
    changes = [result.nll_change for result in results.values()]
    assert abs(changes[0]) < 0.002
    assert 0.003 < changes[1] < 0.2
    assert changes[1] < changes[2]


# --- what may be said ---------------------------------------------------------------------------

LIKELIHOODS = st.lists(
    st.tuples(*[st.floats(0, 10, allow_subnormal=False)] * 3), min_size=2, max_size=20
)


@given(LIKELIHOODS)
def test_a_difference_is_stated_beyond_two_standard_errors_only(
    rows: list[tuple[float, float, float]],
) -> None:
    """docs/fidelity.md, and whichever of the two is named first."""
    first, second, exact = zip(*rows, strict=True)
    results = {
        "first": TransformFidelity(first, exact),
        "second": TransformFidelity(second, exact),
    }
    differences = np.subtract(first, second)
    mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(len(rows))
    for names, change in ((("first", "second"), mean), (("second", "first"), -mean)):
        compared = compare(results, *names)
        assert compared.nll_change == pytest.approx(change, abs=1e-12)
        assert compared.nll_change_error == pytest.approx(error, abs=1e-12)
        said = str(compared)
        assert compared.told_apart == ("costs" in said) == ("are not told apart" not in said)
        if abs(abs(mean) - 2 * error) > 1e-9:
            assert compared.told_apart == (abs(mean) > 2 * error)
        if compared.told_apart:
            more, less = ("first", "second") if mean > 0 else ("second", "first")
            assert said.startswith(f"{more} costs {abs(compared.nll_change):.4f} ±")
            assert said.endswith(f"more than {less}.")
    untouched = compare(results, "first")
    assert untouched.nll_change == results["first"].nll_change
    assert untouched.nll_change_error == results["first"].nll_change_error


@pytest.mark.parametrize(("change", "error"), [(0.0, 0.0), (0.5, 0.25), (-0.5, 0.25)])
def test_at_two_standard_errors_nothing_is_stated(change: float, error: float) -> None:
    assert not Comparison("a", "b", change, error).told_apart


def test_at_two_bits_searched_scales_cost_less_than_the_range(
    smollm2_decoder: Decoder, smollm2_tokenizer: Tokenizer
) -> None:
    """S4, and why streaming2 has it: the first passages of the development set, paired."""
    searched = Scheme.named("streaming2")
    assert searched.scale_rule == "search"
    results = measure_fidelity(
        smollm2_decoder,
        passages(smollm2_tokenizer, 641, 4),
        round_trips({"range": replace(searched, scale_rule="range"), "search": searched}),
    )
    compared = compare(results, "range", "search")
    assert compared.told_apart
    assert compared.nll_change > 0

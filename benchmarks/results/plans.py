"""The plans: what is asked, of which caches, on how many passages. Nothing here is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from benchmarks.results.measure import EXACT, GEMMA3, HALF, LOST, NEAREST, Condition, Plan
from nsq_ref import profile_names
from onnx_export.evaluation.injected import (
    Change,
    KeyBias,
    KeyOutlier,
    bias_for_ratio,
    factor_for_ratio,
)

RATIO = 17.23  # of the keys of layer 0 of Qwen2-7B, as the paper measures it
OURS, NAIVE = "nsep+pchan4", "naive4"

# The rows of the paper's ablation, and the two that its data has and its table leaves out.
ABLATION = ("naive4", "nsep4", "outlier4", "nsep+out4", "pchan4", "nsep+pchan4")
LEFT_OUT = ("outlier4-8ch", "nsep+out4-8ch")

BITS = (2, 3, 4, 8)
RATIOS = (8.0, RATIO, 24.0)
TIMES = (0.5, 1.0, 4.0, 8.0)

# Chosen on two development passages, as what plain INT4 suffers from in a layer: constants of
# several sizes, of which only the largest is at the end of a row's range.
SHARES, STRONG = (1.0, 0.6, 0.45, 0.35), 4.0

RIVALS = (
    "q8_0", "q5_0", "q4_0", "hadamard+q8_0", "hadamard+q5_0", "hadamard+q4_0",
    "naive4", "nsep4", "pchan4", "nsep+pchan4", "outlier4", "outlier4-8ch", "nsep+out4",
    "nsep+out4-8ch", "streaming4", "streaming3", "streaming2", "kivi4", "kivi3", "kivi2",
    "KIVI-K2V4", "oscar4", "oscar2", "kvarn-k4v4", "kvarn-k2v2", "turboquant4", "turboquant3",
    "turboquant2", "nsnquant2", "nvfp4", "onnxruntime-int4", "gear4", "gear2", "smoothquant4",
    "nsep+kivi2", "nsep+gear2", "nsep+smoothquant4",
)  # fmt: skip

# By the budget of the profiles beside which each stands.
BUDGETS: Mapping[str, tuple[str, ...]] = {
    "4.5": (
        "kivi4", "oscar4", "kvarn-k4v4", "turboquant4", "q4_0", "hadamard+q4_0", "naive4",
        "nsep+pchan4", "streaming4",
    ),
    "3.5": ("kivi3", "kvarn-k3v3", "kvarn-k4v2", "turboquant3", "streaming3"),
    "3": ("kivi2", "oscar2"),
    "2.5": ("kvarn-k2v2", "turboquant2", "streaming2"),
}  # fmt: skip

BIASED = (
    "streaming4", "nsep+pchan4", "kivi4", "naive4", "q4_0", "hadamard+q4_0", "q8_0",
    "hadamard+q8_0", "oscar4", "turboquant4", "kvarn-k4v4", "pchan4", "nsep+pchan3", "streaming3",
)  # fmt: skip

Keys = NDArray[np.float32]


def outliers(keys: Keys, layers: tuple[int, ...], ratio: float = RATIO) -> tuple[Change, ...]:
    """Return what gives every head of these layers the ratio, in the pair that rotates slowest.

    There lie the outliers of Qwen2-7B. ``keys`` are of a development passage,
    ``[layers, 1, kv_heads, tokens, head_dim]``.
    """
    pair = keys.shape[-1] // 2 - 1
    return tuple(
        KeyOutlier(layer, pair, round(factor_for_ratio(head, pair, ratio), 3), number)
        for layer in layers
        for number, head in enumerate(keys[layer, 0])
    )


def biases(keys: Keys, layers: tuple[int, ...], ratio: float = RATIO) -> tuple[Change, ...]:
    """Return constants of the last channel that give every head of these layers the ratio."""
    channel = keys.shape[-1] - 1
    return tuple(
        KeyBias(layer, channel, round(bias_for_ratio(head, channel, ratio), 3), number)
        for layer in layers
        for number, head in enumerate(keys[layer, 0])
    )


def several(keys: Keys, layers: tuple[int, ...], times: float = STRONG) -> tuple[Change, ...]:
    """Return constants of several sizes in the two pairs that rotate slowest.

    At ``times`` 1 every head has the ratio; more of it is nearly the same ratio, which counts the
    outliers themselves.
    """
    half = keys.shape[-1] // 2
    channels = (2 * half - 1, 2 * half - 2, half - 1, half - 2)
    made: list[Change] = []
    for layer in layers:
        for number, head in enumerate(keys[layer, 0]):
            largest = np.abs(head).max(axis=0).astype(np.float64)
            others = largest.sum() - largest[list(channels)].sum()
            unit = times * RATIO * others / (2 * half - RATIO * sum(SHARES))
            made += [
                KeyBias(layer, channel, round(float(unit * share), 3), number)
                for channel, share in zip(channels, SHARES, strict=True)
            ]
    return tuple(made)


def intervention(layer: int) -> dict[str, Condition]:
    """Return the five rows of the paper's causal experiment, and one more, for a layer."""
    return {
        "all naive4": Condition(NAIVE),
        "all nsep+pchan4": Condition(OURS),
        f"layer {layer} nsep+pchan4, rest naive4": Condition(NAIVE, {layer: OURS}),
        f"layer {layer} naive4, rest nsep+pchan4": Condition(OURS, {layer: NAIVE}),
        f"layer {layer} float16, rest naive4": Condition(NAIVE, {layer: HALF}),
        f"layer {layer} naive4, rest float16": Condition(HALF, {layer: NAIVE}),
        f"layer {layer} nsep+pchan4, rest float16": Condition(HALF, {layer: OURS}),
    }


def ablation() -> dict[str, Condition]:
    """Return the rows of the ablation that `intervention` does not have, and other bits."""
    names = [name for name in (*ABLATION, *LEFT_OUT) if name not in (NAIVE, OURS)]
    return {name: Condition(name) for name in (*names, "naive3", "naive8", "streaming4")}


def _causal(keys: Keys) -> Iterator[Plan]:
    asked = "Does one layer's outlier break plain INT4, and does mending that layer mend the model?"
    both = intervention(0) | ablation()
    for name, changes in _injected(keys, 0):
        yield Plan(f"causal-{name}", asked, both, 10, 512, 64, changes)


def _second(keys: Keys) -> Iterator[Plan]:
    asked = "The same in layer 1: is layer 0 special?"
    for name, changes in _injected(keys, 1)[:2]:
        yield Plan(f"causal-{name}", asked, intervention(1), 4, 512, 64, changes)


def _injected(keys: Keys, layer: int) -> list[tuple[str, tuple[Change, ...]]]:
    return [
        (f"outlier-{layer}", outliers(keys, (layer,))),
        (f"several-{layer}", several(keys, (layer,))),
        ("none", ()),
    ]


def _layers(keys: Keys) -> Iterator[Plan]:
    conditions = {}
    for layer in range(len(keys)):
        alone = {layer: NAIVE}
        conditions[f"{layer} none"] = Condition(EXACT, alone)
        conditions[f"{layer} outlier"] = Condition(EXACT, alone, outliers(keys, (layer,)))
        conditions[f"{layer} keys lost"] = Condition(EXACT, {layer: f"{LOST}|{EXACT}"})
    asked = "Which layers does plain INT4 hurt, each alone, and what if all its keys are lost?"
    yield Plan("layers", asked, conditions, 3, 256, 64)


def _dose(keys: Keys) -> Iterator[Plan]:
    models: dict[str, tuple[Change, ...]] = {"none": ()}
    models |= {f"outlier {ratio:g}": outliers(keys, (0,), ratio) for ratio in RATIOS}
    models |= {f"several {times:g}": several(keys, (0,), times) for times in TIMES}
    conditions = {
        f"{model}, {scheme}": Condition(EXACT, {0: scheme}, changes)
        for model, changes in models.items()
        for scheme in (*(f"naive{bits}" for bits in BITS), OURS)
    }
    asked = "How much does layer 0 alone cost, by the size of its outliers and the bits?"
    yield Plan("dose", asked, conditions, 4, 256, 64)


def _bias(keys: Keys) -> Iterator[Plan]:
    asked = "Which methods survive keys that have a constant, or an outlier, in a channel?"
    methods = {name: Condition(name) for name in BIASED}
    every = tuple(range(len(keys)))
    yield Plan("bias-all-layers", asked, methods, 10, 512, 64, biases(keys, every))
    yield Plan("outlier-all-layers", asked, methods, 10, 512, 64, outliers(keys, every))


def _rivals(keys: Keys) -> Iterator[Plan]:
    asked = "What does each method cost, by its bits?"
    yield Plan("rivals", asked, {name: Condition(name) for name in RIVALS})


def profile_conditions() -> dict[str, Condition]:
    """Return the profiles, those made for feedback once more without, and methods of their bits."""
    names = []
    for budget, others in BUDGETS.items():
        own = [name for name in profile_names() if name.partition("-")[2] == budget]
        names += [*own, f"{NEAREST}best-{budget}", *others]
    return {name: Condition(name) for name in names}


def _profiles(keys: Keys) -> Iterator[Plan]:
    asked = "What does each profile cost beside what is published of its bits?"
    every, methods = tuple(range(len(keys))), profile_conditions()
    yield Plan("profiles", asked, methods)
    yield Plan("profiles-decode", asked, methods, protocol="decode")
    yield Plan("profiles-outlier", asked, methods, changes=outliers(keys, every))
    yield Plan("profiles-bias", asked, methods, changes=biases(keys, every))
    yield Plan("profiles-gemma", asked, methods, model=GEMMA3)


def _sides(keys: Keys) -> Iterator[Plan]:
    pairs = [(4, 8), (3, 8), (2, 8), (8, 4), (4, 4), (3, 4), (2, 4), (8, 3), (8, 2)]
    conditions = {
        f"{family} K{key}V{value}": Condition(f"{family}{key}|{family}{value}")
        for family in ("naive", "nsep+pchan")
        for key, value in pairs
    }
    for rank in (16, 32, 48):
        for name in (f"pca{rank}", f"nsep+pca{rank}"):
            conditions[f"{name} of keys"] = Condition(f"{name}|{EXACT}")
    asked = (
        "Where are bits worth more, in keys or in values; and what do principal components keep?"
    )
    yield Plan("sides", asked, conditions, 4, 512, 64)


GROUPS: dict[str, Callable[[Keys], Iterator[Plan]]] = {
    "causal": _causal, "second": _second, "bias": _bias, "dose": _dose, "layers": _layers,
    "rivals": _rivals, "profiles": _profiles, "sides": _sides,
}  # fmt: skip

"""The figures of docs/results: the paper's five from our data beside its numbers, and two more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results.kept import Kept, has, load
from benchmarks.results.plans import ABLATION, LEFT_OUT, NAIVE, OURS, RATIO
from nsq_ref.plots import STYLES, TALK_STYLE
from nsq_ref.plots.style import plain_ticks
from nsq_ref.rivals import entry

matplotlib.use("Agg")

PAPER, HERE = STYLES[4][0], STYLES[1][0]


def distributions() -> Figure:
    """Keys of a head of layer 0, with what was injected, and their directions."""
    facts = load("facts")["layer_0_head_0"]
    published = load("paper")["distribution"]
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4))
    for axis, what in zip(axes, ("keys", "directions"), strict=False):
        for (color, _), name in zip(STYLES, ("none", "outlier-0", "several-0"), strict=False):
            one = facts[name][what]
            edges = np.linspace(one["first"], one["last"], len(one["counts"]) + 1)
            axis.stairs(one["counts"], edges, color=color, label=name, lw=1.4)
        axis.set(yscale="log", xlabel=f"elements of {what}", ylabel="count")
    axes[0].set_title("layer 0, head 0, SmolLM2")
    axes[1].set_title("divided by the token's norm")
    axes[0].legend(fontsize=8)
    rows = [
        ("paper, keys", published["layer0_raw_std"], published["layer0_raw_range"]),
        ("paper, directions", published["layer0_normsep_std"], published["layer0_normsep_range"]),
    ]
    for name in ("none", "outlier-0", "several-0"):
        for what in ("keys", "directions"):
            one = facts[name][what]
            rows.append((f"{name}, {what}", one["deviation"], [one["first"], one["last"]]))
    peak = [max(abs(end) for end in ends) / deviation for _, deviation, ends in rows]
    colors = [PAPER if name.startswith("paper") else HERE for name, _, _ in rows]
    axes[2].barh([name for name, _, _ in rows], peak, color=colors)
    axes[2].invert_yaxis()
    axes[2].tick_params(axis="y", labelsize=8)
    axes[2].set(title="peak over deviation", xlabel="over all tokens")
    return figure


def wikitext() -> Figure:
    """The paper's changes in perplexity on WikiText-2, and ours."""
    models = load("paper")["wikitext2"]["models"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(2, 1))
    _pairs(left, {name: (one[NAIVE], one[OURS]) for name, one in models.items()})
    left.set(title="paper, WikiText-2", ylabel="change in perplexity")
    ours = {}
    for name in ("none", "outlier-0", "several-0"):
        if has(f"causal-{name}"):
            kept = Kept(f"causal-{name}")
            changes = (kept.perplexity_change(f"all {one}") for one in (NAIVE, OURS))
            ours[f"{name} (n {kept.passages})"] = tuple(changes)
    _pairs(right, ours)
    right.set_title("here, SmolLM2-135M")
    left.legend(fontsize=8)
    return figure


def _pairs(axes: Axes, values: Mapping[str, tuple[float, ...]]) -> None:
    place = np.arange(len(values))
    for shift, label, color in ((-0.2, NAIVE, STYLES[0][0]), (0.2, OURS, STYLES[3][0])):
        own = [pair[0 if label == NAIVE else 1] for pair in values.values()]
        axes.bar(place + shift, own, 0.4, label=label, color=color)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xticks(place, list(values), rotation=35, ha="right", fontsize=8)
    axes.axhline(0, color="black", lw=0.6)


def ablation() -> Figure:
    """The ablation: the paper's, and ours on each model."""
    methods = (*ABLATION, *LEFT_OUT)
    paper = load("paper")["ablation"]["Qwen2-7B"]["change"]
    names = [name for name in ("none", "outlier-0", "several-0") if has(f"causal-{name}")]
    figure, axes = plt.subplots(1, 1 + len(names), figsize=(11, 3.6), sharey=True)
    colors = [STYLES[5][0] if method in LEFT_OUT else PAPER for method in methods]
    axes[0].barh(methods, [paper[one] for one in methods], color=colors)
    axes[0].set(xscale="log", title="paper, Qwen2-7B", xlabel="change in perplexity")
    for axis, name in zip(axes[1:], names, strict=True):
        kept = Kept(f"causal-{name}")
        rows = [f"all {one}" if one in (NAIVE, OURS) else one for one in methods]
        means = [kept.mean(row) for row in rows]
        axis.barh(methods, [one.value for one in means], xerr=[one.error for one in means],
                  color=[STYLES[5][0] if m in LEFT_OUT else HERE for m in methods])  # fmt: skip
        axis.set(xscale="log", title=f"here, {name} (n {kept.passages})", xlabel="KL")
    axes[0].invert_yaxis()
    for axis in axes:
        plain_ticks(axis.xaxis, at=(1,))
        axis.set_xlim(left=0.5 * min(bar.get_width() for bar in axis.patches))
    return figure


def outliers() -> Figure:
    """What plain INT4 costs by the outlier ratio: the paper's models, and one model changed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for name, one in load("paper")["sweep"]["models"].items():
        if one["outlier_ratio"] is not None:
            left.plot(one["outlier_ratio"], max(one[NAIVE], 0.01), "o", color=STYLES[0][0])
            left.plot(one["outlier_ratio"], max(one[OURS], 0.01), "D", color=STYLES[3][0])
            left.annotate(name, (one["outlier_ratio"], max(one[NAIVE], 0.01)), fontsize=7)
    left.set(yscale="log", xlabel="outlier ratio, all heads flattened",
             ylabel="change in perplexity (at least .01)", title="paper's models")  # fmt: skip
    kept, facts = Kept("dose"), load("facts")["outlier_ratio"]["none"][0]
    ratios = {"none": max(facts)}
    for name in kept.rows:
        model = name.split(", ")[0]
        if model.startswith("outlier"):
            ratios[model] = float(model.split()[1])
    for (color, marker), scheme in zip(
        (STYLES[0], STYLES[5], STYLES[3]), (NAIVE, "naive3", OURS), strict=True
    ):
        means = [kept.mean(f"{model}, {scheme}") for model in ratios]
        values, errors = [one.value for one in means], [one.error for one in means]
        right.errorbar(
            list(ratios.values()), values, errors, color=color, marker=marker, label=scheme
        )
    right.set(yscale="log", xlabel="outlier ratio of layer 0", ylabel="KL, layer 0 alone",
              title=f"here, one model changed (n {kept.passages})")  # fmt: skip
    right.axvline(RATIO, color="grey", lw=0.8, ls=":")
    right.legend(fontsize=8)
    return figure


def anomaly() -> Figure:
    """What bits cost in layer 0."""
    paper = load("paper")["anomaly"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for (color, marker), name in zip(STYLES, ("Pythia-6.9B", "Qwen2-7B all layers"), strict=False):
        bits = sorted(int(key[5:]) for key in paper[name])
        left.plot(bits, [paper[name][f"naive{bit}"] for bit in bits], color=color, marker=marker,
                  label=name)  # fmt: skip
    left.set(yscale="log", xlabel="bits", ylabel="change in perplexity", title="paper")
    left.legend(fontsize=8)
    kept = Kept("dose")
    models = list(dict.fromkeys(name.split(", ")[0] for name in kept.rows))
    bits = sorted(int(key.split("naive")[1]) for key in kept.rows if "naive" in key)
    bits = sorted(set(bits))
    for (color, marker), model in zip(_more_styles(), models, strict=False):
        means = [kept.mean(f"{model}, naive{bit}") for bit in bits]
        right.errorbar(bits, [one.value for one in means], [one.error for one in means],
                       color=color, marker=marker, label=model, lw=1.2, ms=4)  # fmt: skip
    right.set(yscale="log", xlabel="bits", ylabel="KL, layer 0 alone",
              title=f"here (n {kept.passages})")  # fmt: skip
    right.legend(fontsize=7, ncols=2)
    return figure


def _more_styles() -> list[tuple[str, str]]:
    return [*STYLES, ("#666666", "*")]


def layers() -> Figure:
    """What each layer alone costs."""
    kept = Kept("layers")
    count = len(kept.rows) // 3
    figure, axes = plt.subplots(figsize=(9, 3.6))
    labels = {"none": "naive4", "outlier": f"naive4, outlier of {RATIO}", "keys lost": "keys lost"}
    for (color, marker), (kind, label) in zip(STYLES, labels.items(), strict=False):
        means = [kept.mean(f"{layer} {kind}").value for layer in range(count)]
        axes.plot(range(count), means, color=color, marker=marker, ms=4, lw=1.3, label=label)
    axes.set(yscale="log", xlabel="layer that is stored so, alone", ylabel="KL",
             title=f"SmolLM2-135M (n {kept.passages})")  # fmt: skip
    axes.legend(fontsize=8)
    return figure


def rivals() -> Figure:
    """Bits against KL, with what is kept unquantized and without."""
    kept = Kept("rivals")
    figure, axes = plt.subplots(figsize=(10, 5.2))
    for name in kept.rows:
        one = entry(name)
        every, sealed = one.bits_per_element(512, 64, heads=3)
        color = STYLES[3][0] if one.ours else STYLES[0][0]
        kl = kept.mean(name).value
        axes.plot([sealed, every], [kl, kl], color=color, lw=0.6, alpha=0.5)
        axes.plot(sealed, kl, "o", color=color, ms=4)
        place, side = ((-4, -3), "right") if one.ours else ((4, -3), "left")
        axes.annotate(
            name, (sealed, kl), fontsize=6.5, xytext=place, textcoords="offset points", ha=side
        )
    axes.set(yscale="log", xlabel="bits an element, sealed (dot) and with tail and sinks (line)",
             ylabel="KL", title=f"SmolLM2-135M, prefill 512 (n {kept.passages})")  # fmt: skip
    return figure


NEEDS: Mapping[str, tuple[Callable[[], Figure], tuple[str, ...]]] = {
    "distributions": (distributions, ("facts",)),
    "wikitext": (wikitext, ("causal-none",)),
    "ablation": (ablation, ("causal-outlier-0",)),
    "outliers": (outliers, ("dose", "facts")),
    "anomaly": (anomaly, ("dose",)),
    "layers": (layers, ("layers",)),
    "rivals": (rivals, ("rivals",)),
}


def draw(folder: Path) -> None:
    """Write every figure of which there are data."""
    style: Any = TALK_STYLE  # whose keys mypy wants to know
    with plt.rc_context(style):
        for name, (make, needed) in NEEDS.items():
            if has(*needed):
                figure = make()
                # No version and no date, so that equal data make equal files.
                figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
                plt.close(figure)

"""The pages of docs/results, written from data, which their verdicts follow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import causal_page, coverage_page, errata_page, figures, profiles_page
from benchmarks.results.kept import Kept, Mean, filled, has, load, number, table
from benchmarks.results.plans import NAIVE, OURS
from nsq_ref.files import atomic
from nsq_ref.rivals import entry

FOLDER = Path(__file__).parents[2] / "docs" / "results"


def rivals() -> str:
    """Return the table of all methods."""
    kept = Kept("rivals")
    plan = kept.plan
    rows = []
    for name in sorted(kept.rows, key=lambda one: kept.mean(one).value):
        every, sealed = entry(name).bits_per_element(512, 64, heads=3)
        title = f"**{name}**" if entry(name).ours else name
        rows.append(
            [title, f"{sealed:.2f}", f"{every:.2f}", str(kept.mean(name)),
             number(kept.mean(name, "kl_99").value), number(max(kept.samples(name, "kl_max"))),
             f"{100 * kept.mean(name, 'same_top').value:.1f}", str(kept.mean(name, "nll"))]
        )  # fmt: skip
    head = ["method", "bits, sealed", "with tail and sinks", "KL", "99% of tokens", "worst token",
            "same top 1, %", "change in NLL"]  # fmt: skip
    return f"""# What each bit buys: every method on the same passages

SmolLM2-135M-Instruct, prefill {plan["prefill"]}, {plan["continuation"]} tokens scored,
{kept.passages} reporting passages, each with every method. KL is the divergence from the logits of
the float32 cache in nats a token, ± one standard error over passages. *Sealed* bits are
those of what is coded; methods that keep the last tokens or the first ones unquantized take what
stands beside it for 512 tokens of 64 channels. At
equal sealed bits a comparison flatters a method with a tail, at equal total bits it damns it: a
longer context lies between. Bold is what NSQ-1 can express: its own profiles (`streaming4` and so
on), the paper's method and its ablation, plain INT4, and the paper's own form of KIVI
(`KIVI-K2V4`). [Rivals](../rivals.md) says what each method is, and how it differs from what was
published.

{table(head, rows)}

![Bits against KL](rivals.png)

## What may be said

{_targets(kept)}

{_orders(kept)}
"""


def _targets(kept: Kept) -> str:
    lines = []
    for other in (NAIVE, "pchan4", "nsep4", "outlier4"):
        ratio = kept.mean(OURS).value / kept.mean(other).value
        found = kept.difference(other, OURS)
        lines.append(
            f"- *{other} costs more than {OURS}*: **{kept.verdict(other, OURS)}** (difference "
            f"{found}); {OURS} costs {ratio:.2f} times as much. By NLL: "
            f"{_told(kept.difference(other, OURS, 'nll'))}."
        )
    return "\n".join(lines)


def _told(found: Mean) -> str:
    return f"{found}, {'told apart' if found.told else 'not told apart'}"


def _orders(kept: Kept) -> str:
    text = "Neighbours in KL at about the same sealed bits, whose means differ by 20% or more:\n"
    groups = {"4 to 5 bits": (4.0, 5.01), "3 to 4 bits": (3.01, 4.0), "2 to 3 bits": (2.0, 3.01)}
    for label, (low, high) in groups.items():
        names = [
            name for name in kept.rows
            if low <= entry(name).bits_per_element(512, 64, heads=3)[1] < high
        ]  # fmt: skip
        names.sort(key=lambda one: kept.mean(one).value)
        pairs = [
            (a, b)
            for a, b in itertools.pairwise(names)
            if kept.mean(b).value >= 1.2 * kept.mean(a).value
        ]
        told = [pair for pair in pairs if kept.difference(pair[1], pair[0]).told]
        text += f"\n- {label}: {len(told)} of {len(pairs)} pairs are told apart. Order: "
        text += ", ".join(names) + "."
    return text


def needles() -> str:
    """Return the page of needles."""
    read = load("needles")
    plan, stacks = read["plan"], read["haystacks"]
    methods = list(stacks[0]["answers"])
    rows = []
    for method in methods:
        row = [method]
        for kind in ("single", "several"):
            own = [one["answers"][method] for one in stacks if one["kind"] == kind]
            asked = [answer for answers in own for answer in answers]
            row.append(f"{sum(a[0] for a in asked)} of {len(asked)}" if asked else "")
        every = [a for one in stacks for a in one["answers"][method]]
        row.append(number(sum(a[1] for a in every) / len(every)))
        rows.append(row)
    published = load("paper")["needles"]
    theirs = [
        [name, *(published[f"{kind}, Qwen2-7B"][name] for kind in ("single", "several"))]
        for name in ("float16", NAIVE, OURS)
    ]
    lengths = sorted({one["length"] for one in stacks})
    by_length = [
        [method, *(_found_at(stacks, method, length) for length in lengths)] for method in methods
    ]
    return f"""# Needles in haystacks

A number is told somewhere in real text and asked for after it: `{plan["needle"].strip()}`, asked
as
`{plan["asked"].strip().splitlines()[0]}`. It is found if every token of the number is the most
likely one
(`onnx_export.evaluation.needle`). The form was chosen on development texts: the float32 model
answers it there 16 times of 18. Reporting
texts, {len(stacks)} haystacks of {lengths[0]} to {lengths[-1]} tokens; *several* has five needles
in each. *Outliers*: as if the model had
the outlier of [the causal experiments](causes.md) in every layer, which changes no float32 answer.

{table(["cache", "single", "several", "mean NLL of answers"], rows)}

By length, single and several together:

{table(["cache", *(f"{length} tokens" for length in lengths)], by_length)}

The paper, Qwen2-7B (poc_needle_in_haystack, poc_multi_needle):

{table(["cache", "single", "several"], theirs)}

{_needle_claims(stacks)}
"""


def _found_at(stacks: list[dict[str, Any]], method: str, length: int) -> str:
    every = [a[0] for one in stacks if one["length"] == length for a in one["answers"][method]]
    return f"{sum(every)} of {len(every)}"


def _needle_claims(stacks: list[dict[str, Any]]) -> str:
    """Compare by McNemar's exact test: of the answers that two caches differ in, which has more."""

    def found(method: str) -> list[int]:
        return [a[0] for one in stacks for a in one["answers"][method]]

    lines = []
    for more, less in (
        (OURS, NAIVE), (f"{OURS}, outliers", f"{NAIVE}, outliers"), ("float32", OURS),
        ("float32", f"{OURS}, outliers"), ("float32", "streaming4, outliers"),
    ):  # fmt: skip
        pairs = list(zip(found(more), found(less), strict=True))
        gains, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        chance = _sign_test(gains, losses)
        verdict = "holds" if chance < 0.05 and gains > losses else "not told apart"
        verdict = "contradicted" if chance < 0.05 and gains < losses else verdict
        lines.append(
            f"- *{more} finds more than {less}*: **{verdict}** ({gains} found by the first alone, "
            f"{losses} by the second alone; exact sign test, p = {chance:.2g})."
        )
    return "\n".join(lines)


def _sign_test(gains: int, losses: int) -> float:
    """Return the probability of a split as uneven by chance.

    Examples
    --------
    >>> _sign_test(5, 0), _sign_test(0, 0)
    (0.0625, 1.0)
    """
    count, least = gains + losses, min(gains, losses)
    tail: int = sum(math.comb(count, k) for k in range(least + 1))
    return float(min(1.0, 2 * tail / 2**count))


def structure() -> str:
    """Return the page of norms and components, with keys against values."""
    read = load("structure")
    found, outputs = read["structure"], read["outputs"]
    rows = []
    for model in ("encoder", "decoder"):
        for side in ("keys", "values", "states"):
            own = [one for name, one in found.items() if name.startswith(f"{model} {side} ")]
            if own:
                figures_of = ("pc1", "pc1_of_directions", "pc1_norm", "norm_variation", "ratio")
                means = [sum(one[f] for one in own) / len(own) for f in figures_of]
                rows.append([f"{model}, {side}", *(number(mean) for mean in means)])
    head = ["", "PC1 share", "of directions", "PC1 and norm, r", "norm, sd over mean",
            "outlier ratio"]  # fmt: skip
    codes = [
        [name, *(str(Mean.of([one[what] for one in own])) for what in ("embedding", "states"))]
        for name, own in outputs.items()
    ]
    paper = load("paper")["post_ln"]
    theirs = [
        [name, *(number(paper["distribution"][key][figure]) for figure in
                 ("pc1_variance", "pc1_norm_corr", "norm_std"))]
        for name, key in (("GPT-2", "pre_ln"), ("GPT-2, cache standardised", "post_ln_simulated"))
    ]  # fmt: skip
    changes = ", ".join(f"{name} {value:+.4g}" for name, value in paper["change"].items())
    text = f"""# Post-LN, and keys against values

## A real post-LN encoder

The paper has no post-LN model: it standardises GPT-2's cache instead. all-MiniLM-L6-v2 is one
(BERT's layers normalise after they
add; 6 layers, 12 heads of 32 channels), run in NumPy; its similarities of the three sentences of
its documentation are
{", ".join(f"{one:.4f}" for one in read["similarities"]["measured"])}, published
{", ".join(f"{one:.4f}" for one in read["similarities"]["published"])}. Means over layers, heads
and {read["passages"]["encoder"]} reporting passages of
256 tokens; the decoder is SmolLM2-135M (pre-LN), {read["passages"]["decoder"]} passages of 512.
PC1 is the first principal component of a head's tokens:
its share of the variance, that of directions (each token over its norm), and how it goes with the
norm.

{table(head, rows)}

The paper (phase8_postln_control):

{table(["", "PC1 share", "PC1 and norm, r", "sd of norms"], theirs)}

## What norm separation is worth there

Keys and values of all layers by each method; 1 less the cosine of the text's embedding to the
float32 one, and the relative error of
the last hidden states.

{table(["method", "embedding", "hidden states"], codes)}

{_structure_claims(outputs)}

The paper's file says of its simulated control, and the paper does not: {changes}.
"""
    if has("sides"):
        text += "\n" + _sides()
    return text


def _structure_claims(outputs: Mapping[str, list[dict[str, float]]]) -> str:
    lines = []
    pairs = (("pchan4", OURS), (NAIVE, OURS), (NAIVE, "nsep4"), ("pchan3", "nsep+pchan3"),
             ("pchan2", "nsep+pchan2"))  # fmt: skip
    for more, less in pairs:
        found = Mean.of(
            [a["states"] - b["states"] for a, b in zip(outputs[more], outputs[less], strict=True)]
        )
        verdict = "not told apart" if not found.told else "holds"
        verdict = "contradicted" if found.told and found.value < 0 else verdict
        ratio = Mean.of([one["states"] for one in outputs[less]]).value
        ratio /= Mean.of([one["states"] for one in outputs[more]]).value
        lines.append(
            f"- *{more} costs more than {less}*: **{verdict}** ({found} of the hidden states; "
            f"{less} has {ratio:.2f} times the error)."
        )
    return "\n".join(lines)


def _sides() -> str:
    kept = Kept("sides")
    families = ("naive", "nsep+pchan")
    pairs = list(dict.fromkeys(n.split()[1] for n in kept.rows if n.split()[0] in families))
    rows = [[pair, *(str(kept.mean(f"{family} {pair}")) for family in families)] for pair in pairs]
    asymmetric = load("paper")["asymmetric"]["change"]
    for row in rows:
        value = asymmetric.get(f"{row[0]} norm_quant")
        row.append("" if value is None else f"{value:+g}")
    components = [[n, str(kept.mean(n))] for n in kept.rows if n.endswith("of keys")]
    text = f"""## Bits of keys against bits of values

SmolLM2-135M, prefill 512, 64 tokens scored, n {kept.passages}; KL. The paper's column is GPT-2
with norms, change in perplexity.

{table(["bits", "naive", "nsep+pchan", "paper"], rows)}

"""
    for family in families:
        for keys, values in (("K3V8", "K8V3"), ("K2V8", "K8V2"), ("K4V8", "K8V4")):
            pair = (f"{family} {keys}", f"{family} {values}")
            text += f"- {family}, *coarse keys cost more than coarse values, {keys} and {values}*: "
            text += f"**{kept.verdict(*pair)}** ({kept.difference(*pair)}).\n"
    text += "\n## Principal components of keys\n\nValues in float32, all components in float16.\n\n"
    text += table(["keys by", "KL"], components) + "\n\n"
    for rank in (16, 32, 48):
        more, less = f"pca{rank} of keys", f"nsep+pca{rank} of keys"
        text += f"- *{more[:-8]} costs more than with norms apart*: **{kept.verdict(more, less)}** "
        text += f"({kept.difference(more, less)}).\n"
    return text


def index() -> str:
    """Return the first page."""
    known = [name for name, (_, needed) in PAGES.items() if has(*needed)]
    titles = {
        "causes": "[Causes](causes.md): an outlier put into a model that has none; layer 0, "
        "INT3 against INT4, the ablation, biases",
        "methods": "[Methods](methods.md): what each bit buys, ours and those of others",
        "profiles": "[Profiles](profiles.md): one name for keys and values, at a budget of bits",
        "needles": "[Needles](needles.md): what a model still finds",
        "structure": "[Structure](structure.md): a post-LN encoder; keys against values",
        "errata": "[Errata](errata.md): what in the paper does not hold, each with the proof or "
        "the measurement",
        "coverage": "[Coverage](coverage.md): each of the paper's experiments, and what stands for "
        "it here",
    }
    listed = "\n".join(f"- {titles[name]}." for name in known)
    toctree = "\n".join(known)
    plans = [
        [f"`{path.stem}`", str(Kept(path.stem).passages), load(path.stem)["plan"]["question"]]
        for path in sorted((FOLDER / "data").glob("*.json"))
        if "rows" in load(path.stem)
    ]
    return f"""# Results

The experiments of the paper (Sato 2026, DOI 10.5281/zenodo.19602981) on a model that can be had
here, each beside what the paper states.

{listed}

These pages are written by `make results` from the JSON files in `docs/results/data`: whatever is
stated of reporting texts comes from there, and so does every verdict. Each file has its plan:
conditions, lengths and what was changed in the model. `python -m benchmarks.results measure` runs
what is missing of the plans in `benchmarks/results/plans.py`, passage by passage, and goes on
where
it was stopped. Passages are those of [Fidelity](../fidelity.md): what was chosen (the factors of
the outliers, the form of the needles) was chosen on the development set, and everything reported
is
of the reporting set, its first passages. How many were measured stands in the second column; where
it is less than four, the errors are themselves rough, and a verdict is preliminary.

{table(["file", "passages", "question"], plans)}

`paper.json` has the paper's figures that we compare with, by the names of its own files.

## The paper's figures, redrawn

{_drawn()}

```{{toctree}}
:hidden:

{toctree}
```
"""


def _drawn() -> str:
    titles = {
        "distributions": "Figure 1: keys of layer 0 before and after their norms are taken out. "
        "A direction's deviation is that of its length, 1; what a scale has to span is the peak "
        "over the deviation, which of a row by itself no norm changes.",
        "wikitext": "Figure 2: plain INT4 against norms with per-channel scales. In perplexity, "
        "few passages do not tell small costs from none; all else here is KL.",
        "ablation": "Figure 3: the ablation, with the two rows that were left out.",
        "outliers": "Figure 4: outlier ratio against failure.",
        "anomaly": "Figure 5: INT3 against INT4.",
    }
    return "\n\n".join(
        f"{title}\n\n![{name}]({name}.png)"
        for name, title in titles.items()
        if has(*figures.NEEDS[name][1])
    )


PAGES: Mapping[str, tuple[Callable[[], str], tuple[str, ...]]] = {
    "causes": (causal_page.page, ("facts", "paper")),
    "methods": (rivals, ("rivals",)),
    "profiles": (profiles_page.page, ("profiles",)),
    "needles": (needles, ("needles", "paper")),
    "structure": (structure, ("structure", "paper")),
    "errata": (errata_page.page, ("facts", "paper")),
    "coverage": (coverage_page.page, ()),
}


def page(name: str) -> str:
    """Return a page, or the first one, ``"index"``, as it is written."""
    return f"{filled(index() if name == 'index' else PAGES[name][0]()).rstrip()}\n"


def write_pages(folder: Path = FOLDER) -> list[str]:
    """Write every page of which there are data, and all figures."""
    names = [*(name for name, (_, needed) in PAGES.items() if has(*needed)), "index"]
    atomic.write(
        [(folder / f"{name}.md", page(name).encode()) for name in names], make_folders=True
    )
    figures.draw(folder)
    return names

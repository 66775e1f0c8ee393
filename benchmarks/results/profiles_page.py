"""The page of the profiles: what each costs beside others of its bits, and what was to be reached.

Every row follows from data; a model that was not measured is not on the page.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.results.kept import Kept, Mean, has, number, table
from benchmarks.results.measure import NEAREST, method_entry
from benchmarks.results.plans import BUDGETS
from nsq_ref import Feedback


class Told(NamedTuple):
    """A plan as the page has it."""

    title: str
    heads: int
    head_dim: int


PLANS = {
    "profiles": Told("SmolLM2-135M-Instruct", 3, 64),
    "profiles-decode": Told("SmolLM2-135M-Instruct, decoding", 3, 64),
    "profiles-outlier": Told("SmolLM2 with an outlier in every layer", 3, 64),
    "profiles-bias": Told("SmolLM2 with biased keys in every layer", 3, 64),
    "profiles-gemma": Told("Gemma 3 270M", 1, 256),
}

# What was to be reached, fixed before anything was measured: KL at most, of SmolLM2 by prefill; a
# share of what the same schemes cost without feedback; and less than KIVI of so many bits or more.
LARGEST = {"4.5": 0.0007, "3.5": 0.0035, "3": 0.007, "2.5": 0.018}
ROOM = 0.05  # bits beyond the budget, for what stays unquantized
SHARE = 0.9
KIVI = {"4.5": "kivi4", "3.5": "kivi3", "3": "kivi2", "2.5": "kivi2"}


def bits(method: str, heads: int, head_dim: int, tokens: int = 512) -> tuple[float, float]:
    """Return bits an element: of what is sealed, and of all, what is unquantized in float16.

    Examples
    --------
    >>> bits("best-3", heads=3, head_dim=64)
    (3.0, 3.025390625)
    """
    one = method_entry(method)
    if one.wants_feedback:  # which changes no size
        one = one.with_feedback(Feedback.from_moment(np.eye(head_dim)[None]))
    nothing = np.zeros((heads, tokens, head_dim), np.float16)
    stored = one.store(nothing, nothing)
    sealed, elements = (
        sum(getattr(side, name) for side in stored) for name in ("sealed_bits", "sealed_elements")
    )
    every = sealed + sum(16 * side.kept_elements for side in stored)
    return sealed / elements if elements else 0.0, every / (2 * nothing.size)


def page() -> str:
    """Return the page."""
    first = Kept("profiles")
    parts = [_part(name, told) for name, told in PLANS.items() if has(name)]
    reached = "\n".join(f"- {line}" for name in PLANS if has(name) for line in _reached(name))
    prefill, continuation = first.plan["prefill"], first.plan["continuation"]
    return f"""# Profiles: keys and values at a budget of bits

A profile is one name for keys and values: `fast` is sealed soonest, `small` errs least of what
needs no calibration, `best` is made for feedback of the keys (F1), which is made of the beginnings
of other texts, on the model that is measured. The number is bits an element with 64 channels.
`{NEAREST}best-3` are the same schemes without feedback.

Prefill {prefill}, {continuation} tokens scored, reporting passages, each with every method;
*decoding* makes every key and value of them under the quantized cache. KL is the divergence from
the logits of the float32 cache in nats a token, ± one standard error over passages. *To best* is
the mean of a method less the `best` profile of its group, paired by passage, bold where it is more
than two standard errors from 0. Bits are those of what is sealed, and, for {prefill} tokens, with
all that stays unquantized in float16.

{chr(10).join(parts)}
## What was to be reached

Of every model: at most {SHARE:g} of the KL of the same schemes without feedback, and less than KIVI
(of 5, 4 and 3 bits sealed). Of SmolLM2 by prefill: at most
{", ".join(number(one) for one in LARGEST.values())} at {", ".join(LARGEST)} bits and {ROOM:g} for
what stays unquantized. *Not told apart*: within two standard errors, paired by passage.

{reached}
"""


def _part(name: str, told: Told) -> str:
    kept = Kept(name)
    rows = []
    for budget in BUDGETS:
        best = f"best-{budget}"
        group = [one for one in _group(kept, budget) if one in kept.rows]
        for method in sorted(group, key=lambda one: kept.mean(one).value):
            sealed, every = bits(method, told.heads, told.head_dim)
            title = f"**{method}**" if method.endswith(f"-{budget}") else method
            rows.append(
                [budget, title, f"{sealed:.2f}", f"{every:.2f}", str(kept.mean(method)),
                 number(kept.mean(method, "kl_99").value),
                 f"{100 * kept.mean(method, 'same_top').value:.1f}",
                 "" if method == best else _told(kept.difference(method, best))]
            )  # fmt: skip
    head = ["group", "method", "bits, sealed", "with all", "KL", "99% of tokens", "same top 1, %",
            "to best"]  # fmt: skip
    count = "1 passage" if kept.passages == 1 else f"{kept.passages} passages"
    return f"## {told.title}\n\n{count}.\n\n{table(head, rows)}\n"


def _group(kept: Kept, budget: str) -> Iterator[str]:
    """Yield the conditions that stand beside the profiles of a budget."""
    for name in kept.plan["conditions"]:
        if name.endswith(f"-{budget}") or name in BUDGETS[budget]:
            yield name


def _told(found: Mean) -> str:
    return f"**{found}**" if found.told else str(found)


def _reached(name: str) -> Iterator[str]:
    """Yield what was to be reached on a model, and whether it was."""
    kept, told = Kept(name), PLANS[name]
    for budget, other in KIVI.items():
        best, nearest = f"best-{budget}", f"{NEAREST}best-{budget}"
        mean = kept.mean(best)
        if name == "profiles":
            most = LARGEST[budget]
            every = bits(best, told.heads, told.head_dim)[1]
            within = every <= float(budget) + ROOM and mean.value <= most
            beyond = Mean(mean.value - most, mean.error, mean.count)
            yield _line(
                f"{told.title}, {best}: KL at most {number(most)} at {float(budget) + ROOM:g} bits",
                f"{mean} at {every:.3f}", within, beyond,
            )  # fmt: skip
        share = mean.value / kept.mean(nearest).value
        pairs = zip(kept.samples(best), kept.samples(nearest), strict=True)
        yield _line(
            f"{told.title}, {best}: at most {SHARE:g} of {nearest}", f"{share:.2f}",
            share <= SHARE, Mean.of([a - SHARE * b for a, b in pairs]),
        )  # fmt: skip
        less = kept.difference(best, other)
        yield _line(f"{told.title}, {best}: below {other}", str(less), less.value < 0, less)


def _line(wanted: str, found: Any, reached: bool, beyond: Mean) -> str:
    verdict = "reached" if reached else "missed"
    doubt = "" if beyond.told else ", not told apart"
    return f"*{wanted}*: **{verdict}**{doubt} ({found})."

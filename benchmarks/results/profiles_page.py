"""The page of the profiles: what each costs beside others of its bits, and what was to be reached.

Every row follows from data; a model that was not measured is not on the page.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.results.kept import Kept, Mean, has, number, table
from benchmarks.results.measure import DATA, NEAREST, method_entry
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
    (3.0004892367906066, 3.02587890625)
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


def page(folder: Path = DATA) -> str:
    """Return the page."""
    measured = [Kept(name, folder) for name in PLANS if has(name, folder=folder)]
    parts = [_part(kept) for kept in measured]
    reached = [row for kept in measured for row in _reached(kept)]
    first = measured[0]
    prefill, continuation = first.plan["prefill"], first.plan["continuation"]
    return f"""# Profiles: keys and values at a budget of bits

A profile is one name for keys and values: `fast` is sealed soonest, `small` needs no
calibration, either, `best` is made for feedback of the keys (F1), which is made of the beginnings
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

{table(["model", "profile", "wanted", "measured", ""], reached)}
"""


def _part(kept: Kept) -> str:
    told, rows = PLANS[kept.name], []
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
    head = ["group", "method", "bits, sealed", "with tail and sinks", "KL", "99% of tokens",
            "same top 1, %", "to best"]  # fmt: skip
    count = "1 passage" if kept.passages == 1 else f"{kept.passages} passages"
    return f"## {told.title}\n\n{count}.\n\n{table(head, rows)}\n"


def _group(kept: Kept, budget: str) -> Iterator[str]:
    """Yield the conditions that stand beside the profiles of a budget."""
    for name in kept.plan["conditions"]:
        if name.endswith(f"-{budget}") or name in BUDGETS[budget]:
            yield name


def _told(found: Mean) -> str:
    return f"**{found}**" if found.told else str(found)


def _reached(kept: Kept) -> Iterator[list[str]]:
    """Yield what was to be reached on a model, what was measured, and whether that is it."""
    told = PLANS[kept.name]
    for budget, other in KIVI.items():
        best, nearest = f"best-{budget}", f"{NEAREST}best-{budget}"
        mean = kept.mean(best)
        if kept.name == "profiles":
            most, room = LARGEST[budget], float(budget) + ROOM
            every = bits(best, told.heads, told.head_dim)[1]
            beyond = Mean(mean.value - most, mean.error, mean.count)
            reached = _verdict(beyond.value <= 0 and every <= room, beyond)
            wanted = f"KL at most {number(most)} at {room:g} bits"
            yield [told.title, best, wanted, f"{mean} at {every:.2f}", reached]
        share = mean.value / kept.mean(nearest).value
        pairs = zip(kept.samples(best), kept.samples(nearest), strict=True)
        beyond = Mean.of([a - SHARE * b for a, b in pairs])
        wanted, reached = f"at most {SHARE:g} of {nearest}", _verdict(beyond.value <= 0, beyond)
        yield [told.title, best, wanted, f"{share:.3f}", reached]
        less = kept.difference(best, other)
        yield [told.title, best, f"below {other}", str(less), _verdict(less.value < 0, less)]


def _verdict(reached: bool, beyond: Mean) -> str:
    verdict = "reached" if reached else "**missed**"
    return verdict if beyond.told else f"{verdict}, not told apart"

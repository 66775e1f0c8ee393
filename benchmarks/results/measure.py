"""Prefill and continuation under many caches, passage by passage, kept as it goes.

A condition says which method stores which layer. Of each passage a layer goes through a method
once, whatever number of conditions it takes part in. After each passage the file is written again,
so that a run which is stopped goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nsq_ref import Feedback, Scheme
from nsq_ref.files import atomic
from nsq_ref.policy import Policy, Sides, sides_of
from nsq_ref.profiles import wants_feedback
from nsq_ref.rivals import Entry, entry, entry_of
from onnx_export.evaluation import Decode, Method
from onnx_export.evaluation.injected import Change, KeyOutlier, changed_keys, restored_keys
from onnx_export.evaluation.models import as_model
from onnx_export.evaluation.moments import DEFAULT_TEXTS, TOKENS
from onnx_export.evaluation.scoring import Reference, Scores
from onnx_export.models.decoder import Decoder, KeyValueCache

DATA = Path(__file__).parents[2] / "docs" / "results" / "data"
EXACT, HALF, LOST = "float32", "float16", "zeros"
NEAREST = "nearest:"  # before a profile that is made for feedback: its schemes without
SMOLLM2, GEMMA3 = "SmolLM2-135M-Instruct", "Gemma 3 270M"
SIDES = ("key", "value")

Float32 = NDArray[np.float32]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Condition:
    """What is stored how: a method for all layers, and for some layers another one.

    A method is a name of `nsq_ref.rivals`, one with ``nearest:`` before it, ``float16``,
    ``float32`` or ``zeros``; ``a|b`` stands for keys by the one and values by the other.
    ``changes`` are done as if the model had them.
    """

    rest: str
    at: Mapping[int, str] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()

    def method(self, layer: int, side: str) -> str:
        """Return what stores one side of a layer."""
        named = self.at.get(layer, self.rest).split("|")
        return named[-1 if side == "value" else 0]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        at = {str(layer): name for layer, name in self.at.items()}
        made: dict[str, Any] = {"rest": self.rest}
        if at:
            made["at"] = at
        if self.changes:
            made["changes"] = [change_dict(change) for change in self.changes]
        return made


@dataclass(frozen=True)
class Plan:
    """One experiment on one model, fixed before the reporting passages are read."""

    name: str
    question: str
    conditions: Mapping[str, Condition]
    passages: int = 10
    prefill: int = 512
    continuation: int = 128
    changes: tuple[Change, ...] = ()
    model: str = SMOLLM2
    protocol: Literal["prefill", "decode"] = "prefill"

    @property
    def wants_feedback(self) -> bool:
        """Whether a condition is made for feedback of the keys."""
        return any(wants_feedback(one.rest) for one in self.conditions.values())

    def to_dict(self) -> dict[str, Any]:
        """Return all but the number of passages, to which more may be added."""
        made = {
            "name": self.name, "question": self.question, "texts": "reporting",
            "prefill": self.prefill, "continuation": self.continuation,
            "changes": [change_dict(change) for change in self.changes],
            "conditions": {name: one.to_dict() for name, one in self.conditions.items()},
        }  # fmt: skip
        if self.model != SMOLLM2:
            made["model"] = self.model
        if self.protocol != "prefill":
            made["protocol"] = self.protocol
        if self.wants_feedback:
            made["feedback"] = {"beginnings of": list(DEFAULT_TEXTS), "tokens": TOKENS}
        return made


def change_dict(change: Change) -> dict[str, Any]:
    """Return a change as plain values."""
    kind = "outlier" if isinstance(change, KeyOutlier) else "bias"
    return {"kind": kind} | {k: v for k, v in asdict(change).items() if v is not None}


def run(
    plan: Plan,
    decoder: Decoder,
    tokens: NDArray[np.int64],
    say: Say,
    *,
    calibration: Mapping[str, Entry] | None = None,
    folder: Path = DATA,
) -> dict[str, Any]:
    """Measure the passages that the plan's file does not have yet; return what it then holds."""
    path = folder / f"{plan.name}.json"
    kept = read(path, plan)
    stored = _Methods(calibration or {})
    stop = plan.prefill + plan.continuation
    for number in range(len(kept["baseline"]), min(plan.passages, len(tokens))):
        row, start = tokens[number, : stop + 1], time.perf_counter()
        how = _decoded if plan.protocol == "decode" else _prefilled
        scored = how(plan, decoder, row, stored)
        baseline, rows = next(scored)[1]["nll"], {}
        for done, (name, found) in enumerate(scored):
            rows[name] = found
            say(f"{plan.name}: passage {number + 1}/{plan.passages}, {done + 1}/"
                f"{len(plan.conditions)} {name}: KL {rows[name]['kl']:.4f}")  # fmt: skip
        stored.forget()
        for name, one in rows.items():
            kept["rows"].setdefault(name, []).append(one)
        kept["baseline"].append({"nll": baseline})
        kept["seconds"].append(round(time.perf_counter() - start, 1))
        write(path, kept)
    kept["passages"] = len(kept["baseline"])
    return kept


Scored = Iterator[tuple[str, dict[str, float]]]


def _prefilled(plan: Plan, decoder: Decoder, row: NDArray[np.int64], stored: _Methods) -> Scored:
    """Yield figures of the float32 cache, then of each condition, all read from one prefill."""
    _, keys, values = decoder.forward(row[None, : plan.prefill], num_logits=0)

    def logits(cache: KeyValueCache) -> Float32:
        of_batch, _, _ = decoder.forward(row[None, plan.prefill : -1], cache)
        return np.asarray(of_batch[0])

    exact = Reference(logits((keys, values)), row[plan.prefill + 1 :])
    yield EXACT, {"nll": rounded(exact.nll.mean())}
    for name, condition in plan.conditions.items():
        cache = stored.cache(condition, keys, values)
        yield name, figures(exact.scores(logits(cache)))


def _decoded(plan: Plan, decoder: Decoder, row: NDArray[np.int64], stored: _Methods) -> Scored:
    """Yield the same where every key and value is made under the quantized cache."""
    model, protocol = as_model(decoder), Decode(plan.prefill, plan.continuation)
    (unit,) = protocol.units(0, row, None)
    (shapes, exact), _ = reference = protocol.reference(model, unit)
    yield EXACT, {"nll": rounded(exact.nll.mean())}
    for name, condition in plan.conditions.items():
        bound = Method(name, stored.policy(condition, shapes[0][0])).bound(shapes[0][0])
        found = protocol.measured(model, unit, reference[0], bound)
        yield name, figures(Scores(*(np.array(found[figure]) for figure in Scores._fields)))


def read(path: Path, plan: Plan) -> dict[str, Any]:
    """Return what a file has, if it is of this plan, or what a new one has."""
    if not path.exists():
        return {"plan": plan.to_dict(), "baseline": [], "rows": {}, "seconds": []}
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if kept["plan"] != json.loads(json.dumps(plan.to_dict())):
        raise ValueError(f"{path} is of another plan; remove it to measure anew")
    return kept


def write(path: Path, kept: Mapping[str, Any]) -> None:
    """Write a file of data whole or not at all, a row a line."""
    text = json.dumps(kept, indent=1)
    atomic.write([(path, f"{text}\n".encode())], make_folders=True)


class _Methods:
    """What layers become, each computed once for a passage."""

    def __init__(self, calibration: Mapping[str, Entry]) -> None:
        self._calibration = calibration
        self._made: dict[tuple[Any, ...], Float32] = {}

    def forget(self) -> None:
        self._made.clear()

    def cache(self, condition: Condition, keys: Float32, values: Float32) -> KeyValueCache:
        changed = changed_keys(keys, condition.changes) if condition.changes else keys
        new_keys = self._side("key", condition, changed)
        if condition.changes:
            touched = {change.layer for change in condition.changes}
            restored = restored_keys(new_keys, condition.changes)
            for layer in range(len(keys)):
                exact = condition.method(layer, "key") == EXACT
                if exact:  # changing there and back would round
                    new_keys[layer] = keys[layer]
                elif layer in touched:
                    new_keys[layer] = restored[layer]
        return new_keys, self._side("value", condition, values)

    def _side(self, side: str, condition: Condition, x: Float32) -> Float32:
        result = np.empty_like(x)
        for layer, own in enumerate(x):
            method = condition.method(layer, side)
            touched = [one for one in condition.changes if one.layer == layer and side == "key"]
            place = (method, side, layer, *touched)
            if place not in self._made:
                self._made[place] = self._stored(method, side, layer, own)
            result[layer] = self._made[place]
        return result

    def _stored(self, method: str, side: str, layer: int, x: Float32) -> Float32:
        if method == EXACT:
            return x
        if method == HALF:
            return x.astype(np.float16).astype(np.float32)
        if method == LOST:
            return np.zeros_like(x)
        one = self._entry(method, layer)
        return (one.key if side == "key" else one.value)(x).x_hat

    def _entry(self, method: str, layer: int) -> Entry:
        return self._calibration.get(f"{method}.{layer}") or method_entry(method)

    def policy(self, condition: Condition, layers: int) -> Policy:
        """Return what a condition is to `onnx_export.evaluation`."""
        if condition.changes:
            raise ValueError("changes as if the model had them are of prefill alone")

        def of(layer: int, side: str) -> Entry | Sides:
            method = condition.method(layer, side)
            return sides_of(method) if method in (EXACT, HALF) else self._entry(method, layer)

        numbers = range(layers)
        sides = {one: Sides(of(one, "key").key, of(one, "value").value) for one in numbers}
        return Policy(sides[0], sides)


def method_entry(method: str) -> Entry:
    """Return the entry of a method that stores.

    Examples
    --------
    >>> method_entry("best-3").wants_feedback, method_entry("nearest:best-3").wants_feedback
    (True, False)
    """
    if method.startswith(NEAREST):
        return entry_of(Scheme.named(method.removeprefix(NEAREST)))
    return entry(method)


def calibrated(methods: Sequence[str], keys: Float32, values: Float32) -> dict[str, Entry]:
    """Return the entries that need calibration, layer by layer, from the cache of another text."""
    return {
        f"{name}.{layer}": entry(name).calibrated(*pair)
        for name in methods
        if entry(name).needs_calibration
        for layer, pair in enumerate(zip(keys, values, strict=True))
    }


def fed_back(plan: Plan, feedback: Mapping[str, Feedback]) -> dict[str, Entry]:
    """Return the entries of a plan that are made for feedback, layer by layer, with it."""
    wanting = {one.rest for one in plan.conditions.values() if wants_feedback(one.rest)}
    return {
        f"{name}.{layer}": entry(name).with_feedback(one)
        for name in wanting
        for layer, one in feedback.items()
    }


def figures(scores: Scores) -> dict[str, float]:
    """Return what a cache costs: the Kullback-Leibler divergence from the float32 one, and NLL."""
    kl = scores.kl
    return {
        "kl": rounded(kl.mean()), "kl_median": rounded(np.median(kl)),
        "kl_99": rounded(np.quantile(kl, 0.99)), "kl_max": rounded(kl.max()),
        "nll": rounded(scores.nll.mean()), "same_top": rounded(scores.top1.mean()),
    }  # fmt: skip


def rounded(value: Any) -> float:
    """Return six digits, which is what a figure is worth."""
    return float(f"{float(value):.6g}")

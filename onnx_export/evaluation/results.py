"""What an evaluation found: figures of every method, and what may be said of two of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from nsq_ref.dtypes import Float64
from nsq_ref.extras import extra
from onnx_export.evaluation.fidelity import perplexity, standard_error
from onnx_export.evaluation.methods import Size

__all__ = ["Difference", "Evaluation", "Figures"]

Figure = Literal["kl", "nll", "top1", "top5", "agreement", "diversity", "first_divergence"]
Record = dict[str, Any]

SCORED: tuple[Figure, ...] = ("kl", "top1", "top5", "nll")
WRITTEN: tuple[Figure, ...] = ("first_divergence", "agreement", "diversity")
QUANTILES = {"median": 0.5, "p99": 0.99, "p999": 0.999, "max": 1.0}
RESAMPLES = 9999


@dataclass(frozen=True)
class Difference:
    """A figure of two methods on the same passages.

    Nothing changes one, so that threads may share it.

    Attributes
    ----------
    first, second : str
        Names; ``"float32"`` is the untouched cache.
    figure : str
    mean, error : float
        Mean over passages of the first less the second, and its standard error, paired by passage.
    p_value : float
        Of a paired permutation test, two-sided: `scipy.stats.permutation_test`, signs of the
        differences, all of them or 9999 drawn with seed 0.
    interval : tuple of float
        95% bootstrap interval of the mean, passages drawn anew: `scipy.stats.bootstrap`,
        percentiles of 9999 draws, seed 0.

    Examples
    --------
    >>> Difference.of("a", "b", "kl", [0.2, 0.3, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1]).told_apart
    True
    """

    first: str
    second: str
    figure: str
    mean: float
    error: float
    p_value: float
    interval: tuple[float, float]

    @classmethod
    def of(
        cls, first: str, second: str, figure: str, ours: ArrayLike, others: ArrayLike
    ) -> Difference:
        """Compare figures of passages, at least two of them."""
        differences = np.subtract(ours, others)
        mean, error = float(np.mean(differences)), standard_error(differences)
        if not np.any(differences):
            return cls(first, second, figure, 0.0, 0.0, 1.0, (0.0, 0.0))
        stats = _stats()
        test = stats.permutation_test(
            (differences,), _mean, permutation_type="samples", n_resamples=RESAMPLES,
            vectorized=True, rng=np.random.default_rng(0),
        )  # fmt: skip
        drawn = stats.bootstrap(
            (differences,), np.mean, method="percentile", n_resamples=RESAMPLES,
            rng=np.random.default_rng(0),
        )  # fmt: skip
        low, high = (float(end) for end in drawn.confidence_interval)
        return cls(first, second, figure, mean, error, float(test.pvalue), (low, high))

    @property
    def told_apart(self) -> bool:
        """Whether the difference is more than two standard errors (docs/fidelity.md)."""
        return abs(self.mean) > 2 * self.error

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, ready for JSON."""
        return {
            "first": self.first, "second": self.second, "figure": self.figure, "mean": self.mean,
            "error": self.error, "p_value": self.p_value, "interval": list(self.interval),
            "told_apart": self.told_apart,
        }  # fmt: skip


def _stats() -> Any:
    with extra("eval", __name__):  # whoever compares nothing needs none of it
        from scipy import stats  # noqa: PLC0415
    return stats


def _mean(samples: Float64, axis: int = -1) -> Float64:
    mean: Float64 = np.mean(samples, axis=axis)
    return mean


@dataclass(frozen=True)
class Figures:
    """Figures of one method over passages.

    Nothing changes one, so that threads may share it.

    Attributes
    ----------
    records : tuple of dict
        Of each passage, as the protocol measured it.
    baseline : tuple of dict
        The same with the float32 cache.
    """

    records: tuple[Record, ...]
    baseline: tuple[Record, ...]

    def tokens(self, figure: Figure) -> Float64:
        """Return a figure of all scored tokens of all passages."""
        return np.concatenate([np.atleast_1d(one[figure]) for one in self.records]).astype(float)

    def passages(self, figure: Figure) -> Float64:
        """Return the mean of a figure in each passage."""
        return np.array([float(np.mean(one[figure])) for one in self.records])

    def baseline_passages(self, figure: Figure) -> Float64:
        """Return the same with the float32 cache."""
        exact = {"kl": 0.0, "top1": 1.0, "top5": 1.0, "agreement": 1.0}
        if figure in exact:
            return np.full(len(self.baseline), exact[figure])
        if figure == "first_divergence":
            return np.array([float(len(one["tokens"])) for one in self.baseline])
        return np.array([float(np.mean(one[figure])) for one in self.baseline])

    @property
    def size(self) -> Size:
        """What the caches of all passages take."""
        total = Size(0, 0, 0)
        for one in self.records:
            total = total.plus(Size(*one["size"]))
        return total

    def mean(self, figure: Figure) -> tuple[float, float | None]:
        """Return the mean over passages and its standard error; None of a single passage."""
        values = self.passages(figure)
        return float(values.mean()), _error(values)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values, ready for JSON."""
        shown: dict[str, Any] = self.size.to_dict()
        scored = "kl" in self.records[0]
        for figure in SCORED if scored else WRITTEN:
            values = self.passages(figure)
            one: dict[str, Any] = {"mean": float(values.mean()), "error": _error(values)}
            if figure == "kl":
                tokens = self.tokens(figure)
                one |= {name: float(np.quantile(tokens, q)) for name, q in QUANTILES.items()}
            if figure in ("nll", "diversity"):
                change = values - self.baseline_passages(figure)
                one |= {"change": float(change.mean()), "change_error": _error(change)}
                if figure == "nll" and len(change) > 1:
                    paired = Difference.of("", "", "nll", change, np.zeros_like(change))
                    one |= {"p_value": paired.p_value, "interval": list(paired.interval)}
            shown[figure] = one | {"passages": values.tolist()}
        if scored:
            shown["perplexity"] = perplexity(tuple(self.passages("nll")))
        return {name: _finite(one) for name, one in shown.items()}


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Nothing changes one, so that threads may share it.

    Attributes
    ----------
    model, protocol, text : dict
        What was measured, on what.
    methods : dict of str to dict
        What each method is, by its name.
    baseline : dict of str to tuple of dict
        Figures of the float32 cache of each passage, by label: ``""``, or a context length.
    records : dict of str to dict
        The same of each method, by its name and then by label.
    refused : dict of str to str
        Methods that cannot store the keys and values of this model, and why.
    """

    model: dict[str, Any]
    protocol: dict[str, Any]
    text: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    baseline: dict[str, tuple[Record, ...]]
    records: dict[str, dict[str, tuple[Record, ...]]]
    refused: dict[str, str]

    @property
    def labels(self) -> tuple[str, ...]:
        """``("",)``, or the context lengths of `Lengths`."""
        return tuple(self.baseline)

    def figures(self, method: str, label: str | None = None) -> Figures:
        """Return the figures of a method.

        Raises
        ------
        ValueError
            For a name or label that there is not, and a method that was refused.
        """
        label = self.labels[-1] if label is None else label
        if method not in self.records or label not in self.baseline:
            known = ", ".join(self.records)
            why = self.refused.get(method, f"there are {known}, at {', '.join(self.labels)!r}")
            raise ValueError(f"there are no figures of {method!r} at {label!r}: {why}")
        return Figures(self.records[method][label], self.baseline[label])

    def compare(
        self,
        first: str,
        second: str | None = None,
        figure: Figure = "kl",
        label: str | None = None,
    ) -> Difference:
        """Compare two methods passage by passage, or one with the float32 cache."""
        ours = self.figures(first, label)
        if len(ours.records) < 2:
            raise ValueError("two methods are compared over passages, at least two; there is one")
        if second is None:
            return Difference.of(
                first, "float32", figure, ours.passages(figure), ours.baseline_passages(figure)
            )
        others = self.figures(second, label).passages(figure)
        return Difference.of(first, second, figure, ours.passages(figure), others)

    def ordered(self, label: str) -> list[str]:
        """Return methods from the least to the largest damage."""
        if "kl" not in next(iter(self.baseline.values()))[0] and self.protocol["name"] == "free":
            return sorted(
                self.records, key=lambda one: -self.figures(one, label).mean("first_divergence")[0]
            )
        return sorted(self.records, key=lambda one: self.figures(one, label).mean("kl")[0])

    def differences(self, label: str) -> list[Difference]:
        """Return what is between the first method and each other, and between neighbours."""
        if not self.records or len(self.baseline[label]) < 2:
            return []
        figure: Figure = "first_divergence" if self.protocol["name"] == "free" else "kl"
        order, first = self.ordered(label), next(iter(self.records))
        pairs = [(one, first) for one in self.records if one != first]
        pairs += [
            (worse, better)
            for better, worse in itertools.pairwise(order)
            if (worse, better) not in pairs and (better, worse) not in pairs
        ]
        return [self.compare(one, other, figure, label) for one, other in pairs]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values, ready for JSON."""
        tables = []
        for label in self.labels:
            base = self.baseline[label]
            table: dict[str, Any] = {"label": label, "passages": len(base)}
            if "nll" in base[0]:
                nll = [float(np.mean(one["nll"])) for one in base]
                tokens = sum(len(one["nll"]) for one in base)
                table |= {
                    "scored_tokens": tokens,
                    "baseline": {"nll": nll, "perplexity": perplexity(tuple(nll))},
                }
            else:
                table["baseline"] = {"diversity": [one["diversity"] for one in base]}
            table["schemes"] = {name: self.figures(name, label).to_dict() for name in self.records}
            table["paired"] = [one.to_dict() for one in self.differences(label)]
            tables.append(table)
        return {
            "model": self.model, "protocol": self.protocol, "text": self.text,
            "schemes": self.methods, "refused": self.refused, "tables": _finite(tables),
        }  # fmt: skip

    def to_markdown(self) -> str:
        """Return tables for people."""
        from onnx_export.evaluation.markdown import page  # noqa: PLC0415

        return page(self)


def _error(values: Float64) -> float | None:
    return standard_error(values) if len(values) > 1 else None


def _finite(value: Any) -> Any:
    """Return what JSON can hold: None for what is infinite or no number."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def collected(units: Sequence[Any], records: Sequence[Record]) -> dict[str, tuple[Record, ...]]:
    """Return records by the label of their unit.

    Examples
    --------
    >>> from types import SimpleNamespace as Unit
    >>> collected([Unit(label="256"), Unit(label="512"), Unit(label="256")], [{"a": 1}, {}, {}])
    {'256': ({'a': 1}, {}), '512': ({},)}
    """
    found: dict[str, tuple[Record, ...]] = {}
    for unit, record in zip(units, records, strict=True):
        found[unit.label] = (*found.get(unit.label, ()), record)
    return found

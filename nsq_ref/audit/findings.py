"""What stands out, by thresholds that are written down here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nsq_ref.audit.figures import SideFigures
from nsq_ref.audit.sinks import Sink

__all__ = ["THRESHOLDS", "Finding", "in_words", "of_side"]

THRESHOLDS = {"outlier channel": 10.0, "bias": 10.0, "norm variation": 0.5}
"""An outlier ratio from 10 on, below which the paper calls keys safe; a channel whose mean is 10 of
its deviations; norms whose deviation is half their mean."""

MEANINGS = {
    "outlier channel": "one scale a token would waste its codes on it; one a channel does not",
    "bias": "a rotation before quantization would spread it over all channels; scales of a channel "
    "follow it",
    "norm variation": "scales of a channel alone would be set by the largest tokens; norms apart "
    "take this away",
    "key norm": "kept as they are, or with norms apart, they cost other tokens nothing",
    "value norm": "kept as they are, or with norms apart, they cost other tokens nothing",
    "attention": "their errors count most: keep them as they are",
}


class Finding(NamedTuple):
    """A figure beyond its threshold, and where.

    Attributes
    ----------
    kind : {"outlier channel", "bias", "norm variation"}
    side : {"key", "value"}
    layer, head : int
    channel : int or None
    figure : float
    """

    kind: str
    side: str
    layer: int
    head: int
    channel: int | None
    figure: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return self._asdict()


def of_side(layer: int, side: str, figures: SideFigures) -> Iterator[Finding]:
    """Yield what stands out in one side of a layer, head by head.

    Examples
    --------
    >>> import numpy as np
    >>> from nsq_ref.audit.figures import side_figures
    >>> x = np.random.default_rng(0).standard_normal((1, 1, 64, 32)).astype(np.float32)
    >>> x[..., 5] *= 50
    >>> [(one.kind, one.channel) for one in of_side(0, "key", side_figures(x))]
    [('outlier channel', 5), ('norm variation', None)]
    """
    for head in range(len(figures.outlier_ratio)):
        bias_channel = int(figures.bias_channel[head])
        for kind, channel, figure in (
            ("outlier channel", int(figures.outlier_channel[head]), figures.outlier_ratio[head]),
            ("bias", bias_channel, figures.bias[head, bias_channel]),
            ("norm variation", None, figures.norm_variation[head]),
        ):
            if figure >= THRESHOLDS[kind]:
                yield Finding(kind, side, layer, head, channel, float(figure))


def in_words(findings: Sequence[Finding], sinks: Sequence[Sink]) -> list[str]:
    """Return a sentence for each kind and side that there is, the strongest place named.

    Examples
    --------
    >>> in_words([Finding("bias", "key", 3, 0, 7, 12.0)], [])[0][:57]
    'bias of keys: 1 head, at most 12.0 (layer 3, head 0, chan'
    >>> in_words([], [Sink(0, 0, "attention", 0.5), Sink(1, 0, "attention", 0.3)])[0][:60]
    'sinks by attention: token 0 (2 layers, at most 0.50 of the a'
    """
    sentences = []
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.kind, finding.side), []).append(finding)
    for (kind, side), group in groups.items():
        most = max(group, key=lambda one: one.figure)
        heads = f"{len(group)} head{'s' * (len(group) > 1)}"
        where = f"layer {most.layer}, head {most.head}"
        if most.channel is not None:
            where += f", channel {most.channel}"
        figure = (
            "no variation"
            if most.figure >= 1e6
            else f"{most.figure:.{2 if most.figure < 1 else 1}f}"
        )
        sentences.append(
            f"{kind} of {side}s: {heads}, at most {figure} ({where}); {MEANINGS[kind]}"
        )
    sentences += [_sinks_in_words(by, sinks) for by in dict.fromkeys(sink.by for sink in sinks)]
    return sentences


def _sinks_in_words(by: str, sinks: Sequence[Sink]) -> str:
    tokens: dict[int, list[float]] = {}
    for sink in sinks:
        if sink.by == by:
            tokens.setdefault(sink.token, []).append(sink.figure)
    shown = []
    for token, figures in sorted(tokens.items(), key=lambda item: -len(item[1]))[:4]:
        layers = f"{len(figures)} layer{'s' * (len(figures) > 1)}"
        shown.append(f"token {token} ({layers}, {_extreme(by, figures)})")
    more = len(tokens) - len(shown)
    if more:
        shown.append(f"{more} more")
    return f"sinks by {by}: {', '.join(shown)}; {MEANINGS[by]}"


def _extreme(by: str, figures: Sequence[float]) -> str:
    if by == "attention":
        return f"at most {max(figures):.2f} of the attention"
    furthest = max(figures, key=lambda one: max(one, 1 / max(one, 1e-9)))
    return f"at the extreme {furthest:.2f} times the median norm"

"""The audit: all figures of all layers, what stands out, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsq_ref.arrays import as_float
from nsq_ref.audit.attention import SampledAttention
from nsq_ref.audit.figures import SideFigures, side_figures
from nsq_ref.audit.findings import THRESHOLDS, Finding, in_words, of_side
from nsq_ref.audit.layers import Layer, as_layers
from nsq_ref.audit.losses import Losses, Side, SideLoss
from nsq_ref.audit.modes import Mode, failure_modes
from nsq_ref.audit.policy import CONTEXT, FLOAT_BITS, LIMIT, Choice, Recommendation, choose
from nsq_ref.audit.sinks import Sink, leading_sinks, sinks_of
from nsq_ref.policy import scheme_text
from nsq_ref.profiles import require_feedback
from nsq_ref.scheme import KeyValueSchemes, Scheme, as_scheme

__all__ = ["DEFINITIONS", "SCHEMES", "Audit", "LayerAudit", "audit", "audit_layers", "summary"]

SCHEMES = ("naive4", "pchan4", "nsep+pchan4", "streaming4", "streaming3", "streaming2")
"""What is predicted and measured; the first is that of the paper's failure modes."""

DEFINITIONS = {
    "outlier_ratio": "the largest magnitude of each channel over all tokens of a head; of these, "
    "the greatest over the mean (the paper's; at most head_dim)",
    "bias": "the magnitude of a channel's mean over its standard deviation, at most 1e6",
    "norm_variation": "standard deviation of the tokens' norms over their mean",
    "sinks": "tokens whose norm is twice or half the median's and 5 robust deviations away, in "
    "most heads; or that get a tenth of the attention of later queries, and 8 times a fair share",
    "logit_error": "root mean square of softmax_scale * q . (k - k_hat) over all tokens and "
    "queries; queries of unit variance where none are given",
    "predicted": "the same from the steps of the scheme, without coding",
    "output_error": "relative error of the attention's output for up to 64 queries, this side "
    "quantized, the other exact",
    "relative": "the error over what tells tokens apart, x less its mean: as queries see both, or, "
    "without queries and of values, each channel in units of its own deviation",
    "judged": "output_error with queries, otherwise relative",
}

SIDES: tuple[Side, Side] = ("key", "value")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class LayerAudit:
    """Everything that is known of one layer; it never changes.

    Attributes
    ----------
    number : int
    shape : tuple of int
        batch, kv_heads, tokens, head_dim, value_head_dim
    key, value : SideFigures
    sinks : tuple of Sink
    key_losses, value_losses : dict of str to SideLoss
        By the names of the schemes.
    key_choice, value_choice : Choice
        Of the policy, with the loss of its round trip.
    """

    number: int
    shape: tuple[int, int, int, int, int]
    key: SideFigures
    value: SideFigures
    sinks: tuple[Sink, ...]
    key_losses: dict[str, SideLoss]
    value_losses: dict[str, SideLoss]
    key_choice: Choice
    value_choice: Choice

    @property
    def schemes(self) -> KeyValueSchemes | None:
        """What the policy gives the layer: both sides, or nothing."""
        key, value = self.key_choice.scheme, self.value_choice.scheme
        return None if key is None or value is None else KeyValueSchemes(key, value)

    def reasons(self) -> tuple[str, ...]:
        """Return why the layer does not have the default, side by side."""
        key, value = self.key_choice.reasons, self.value_choice.reasons
        return (*(f"keys: {one}" for one in key), *(f"values: {one}" for one in value))

    def bits(self, tokens: int) -> tuple[float, int]:
        """Return the bits that a row of so many tokens takes in the layer, and its elements."""
        _, heads, _, *widths = self.shape
        schemes = self.schemes or (None, None)
        bits = 0.0
        for scheme, width in zip(schemes, widths, strict=True):
            each: float = FLOAT_BITS
            if scheme is not None:
                each = scheme.bits_per_element(tokens, width, np.float16)
            bits += each * heads * tokens * width
        return bits, heads * tokens * sum(widths)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values, ready for JSON."""
        sides = {
            "keys": (self.key, self.key_losses, self.key_choice),
            "values": (self.value, self.value_losses, self.value_choice),
        }
        names = ("batch", "kv_heads", "tokens", "head_dim", "value_head_dim")
        return {
            "layer": self.number,
            **dict(zip(names, self.shape, strict=True)),
            **{
                side: {
                    **figures.to_dict(),
                    "losses": {name: loss.to_dict() for name, loss in losses.items()},
                    "policy_loss": None if choice.loss is None else choice.loss.to_dict(),
                }
                for side, (figures, losses, choice) in sides.items()
            },
            "sinks": [sink.to_dict() for sink in self.sinks],
        }


@dataclass(frozen=True, eq=False)
class Audit:
    """What an audit found; it never changes, so that threads may share one.

    Attributes
    ----------
    layers : tuple of LayerAudit
    queries : bool
        Whether there were queries.
    limit : float
    modes : tuple of Mode
        The paper's two failure modes.
    findings : tuple of Finding
        What is beyond its threshold.
    policy : Recommendation

    Examples
    --------
    See `audit`.
    """

    layers: tuple[LayerAudit, ...]
    queries: bool
    limit: float
    modes: tuple[Mode, ...]
    findings: tuple[Finding, ...]
    policy: Recommendation

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """Sinks of all layers."""
        return tuple(sink for layer in self.layers for sink in layer.sinks)

    @property
    def layer_0_ratio(self) -> float:
        """Outlier ratio of the keys of the first layer, of its worst head."""
        return float(self.layers[0].key.outlier_ratio.max())

    def words(self) -> list[str]:
        """Return what stands out, a sentence each; one that says so where nothing does."""
        return in_words(self.findings, self.sinks) or ["nothing stands out"]

    def advice(self) -> list[str]:
        """Return the recommended policy and its reasons in sentences.

        Examples
        --------
        >>> import numpy as np
        >>> x = np.random.default_rng(0).standard_normal((1, 1, 2, 300, 16)).astype(np.float32)
        >>> audit(x, x, schemes=["naive4"]).advice()[0][:54]
        'every layer: keys streaming4, values streaming4, the d'
        """
        policy = self.policy
        key, value = (scheme_text(one) for one in policy.default)
        default = f"keys {key}, values {value}"
        within = f"within {self.limit:.0%} by a round trip"
        if policy.is_default:
            return [f"every layer: {default}, the default; all of it is {within}"]
        same = sum(one == policy.default for one in policy.layers.values())
        sentences = [f"{same} of {len(self.layers)} layers: {default}, the default; {within}"]
        groups: dict[KeyValueSchemes | None, list[int]] = {}
        for number in policy.reasons:
            groups.setdefault(policy.layers[number], []).append(number)
        for schemes, numbers in groups.items():
            chosen = "floating point"
            if schemes is not None:
                chosen = f"keys {scheme_text(schemes.key)}, values {scheme_text(schemes.value)}"
            plural = "s" * (len(numbers) > 1)
            why = "; ".join(policy.reasons[numbers[0]])
            such = f"layer {numbers[0]}: " * (len(numbers) > 1)
            sentences.append(f"layer{plural} {_runs(numbers)}: {chosen}; {such}{why}")
        return sentences

    def judged(self, side: str, name: str) -> list[float]:
        """Return what a scheme loses of a side of each layer, as the policy judges it.

        Examples
        --------
        >>> import numpy as np
        >>> x = np.random.default_rng(0).standard_normal((2, 1, 2, 300, 16)).astype(np.float32)
        >>> [round(loss, 1) for loss in audit(x, x, schemes=["naive4"]).judged("key", "naive4")]
        [0.1, 0.1]
        """
        return [
            (one.key_losses if side == "key" else one.value_losses)[name].judged
            for one in self.layers
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, ready for JSON."""
        return {
            "definitions": DEFINITIONS,
            "thresholds": {**THRESHOLDS, "limit": self.limit},
            "queries": self.queries,
            "layer_0_key_outlier_ratio": self.layer_0_ratio,
            "modes": [mode.to_dict() for mode in self.modes],
            "findings": [finding.to_dict() for finding in self.findings],
            "in_words": self.words(),
            "recommendation": {**self.policy.to_dict(), "in_words": self.advice()},
            "layers": [layer.to_dict() for layer in self.layers],
        }


def audit(
    keys: Any,
    values: Any,
    queries: Any = None,
    *,
    schemes: Sequence[str] = SCHEMES,
    default: Scheme | KeyValueSchemes | str = "streaming4",
    limit: float = LIMIT,
    softmax_scale: float | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Audit keys and values of a model: what would break, and what to store them by.

    Parameters
    ----------
    keys, values : array, or sequence of array
        ``[layers, batch, kv_heads, T, D]``, or ``[batch, kv_heads, T, D]`` for each layer.
    queries : array, or sequence of array, optional
        The same with the heads of the queries, as they meet the keys. With them errors are weighted
        as the model weighs them.
    schemes : sequence of str
        To predict and to measure, besides what the policy tries; naive4 is always among them.
    default : Scheme, KeyValueSchemes or str
        Where the policy begins: a scheme, or a pair, with a block size and no outlier channels.
    limit : float
        What a layer may lose, from 0 to 1; see `nsq_ref.audit.policy`.
    softmax_scale : float, optional
        ``1 / sqrt(D)`` when not given.
    progress : callable, optional
        Called as ``progress(what, done, total)``.

    Returns
    -------
    Audit

    Raises
    ------
    TypeError
        For what is no array of a float dtype, and no scheme.
    ValueError
        For shapes that do not fit, empty arrays, what is not finite, unknown schemes, and schemes
        that no streaming cache has.

    Examples
    --------
    >>> import numpy as np
    >>> random = np.random.default_rng(0)
    >>> keys = random.standard_normal((2, 1, 2, 300, 32)).astype(np.float32)
    >>> values = random.standard_normal((2, 1, 2, 300, 32)).astype(np.float32)
    >>> keys[0, :, 1, :, 7] += 200
    >>> found = audit(keys, values)
    >>> [(one.kind, one.layer, one.head, one.channel) for one in found.findings][0]
    ('outlier channel', 0, 1, 7)
    >>> found.modes[0].words
    'holds: the ratio is 21.8, and naive4 loses 70% of this layer, 10% of a usual one'
    >>> found.policy.to_rewrite()
    {'default': 'streaming4', 'layers': {}}
    """
    return audit_layers(
        as_layers(keys, values, queries), schemes=schemes, default=default, limit=limit,
        softmax_scale=softmax_scale, progress=progress,
    )  # fmt: skip


def audit_layers(
    layers: Sequence[Layer],
    *,
    schemes: Sequence[str] = SCHEMES,
    default: Scheme | KeyValueSchemes | str = "streaming4",
    limit: float = LIMIT,
    softmax_scale: float | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Audit what `as_layers` or `layers_of_arrays` took, as `audit` does.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((1, 1, 9, 4), np.float32)
    >>> audit_layers([Layer(5, x, x)], schemes=["naive4"]).policy.to_rewrite()
    {'default': 'streaming4', 'layers': {}}
    """
    start = _default(default)
    limit = as_float("limit", limit)
    if not 0 < limit < 1:
        raise ValueError(f"limit={limit} must be between 0 and 1, such as {LIMIT}")
    if softmax_scale is not None:
        softmax_scale = as_float("softmax_scale", softmax_scale)
        if not 0 < softmax_scale < np.inf:
            raise ValueError(f"softmax_scale={softmax_scale} must be more than 0 and finite")
        layers = [layer._replace(softmax_scale=softmax_scale) for layer in layers]
    named = {name: _scheme(name) for name in dict.fromkeys((SCHEMES[0], *schemes))}
    audited = []
    for done, layer in enumerate(layers, start=1):
        audited.append(_audited(layer, named, start, limit))
        if progress is not None:
            progress(f"layer {layer.number}", done, len(layers))
    ratio = float(audited[0].key.outlier_ratio.max())
    naive = [layer.key_losses[SCHEMES[0]].judged for layer in audited]
    findings = [
        finding
        for layer in audited
        for side, figures in (("key", layer.key), ("value", layer.value))
        for finding in of_side(layer.number, side, figures)
    ]
    return Audit(
        tuple(audited),
        all(layer.queries is not None for layer in layers),
        limit,
        tuple(failure_modes(ratio, naive, limit)),
        tuple(findings),
        _policy(audited, start),
    )


def summary(found: Audit) -> str:
    """Return one line that says what was audited.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((2, 1, 3, 9, 4), np.float32)
    >>> summary(audit(x, x, schemes=["naive4"]))
    '2 layers of 3 heads, 9 tokens of 4 channels; without queries'
    """
    shapes = {layer.shape[1:4] for layer in found.layers}
    count = len(found.layers)
    layers = f"{count} layer{'s' * (count > 1)}"
    if len(shapes) == 1:
        heads, tokens, channels = shapes.pop()
        layers += f" of {heads} head{'s' * (heads > 1)}, {tokens} tokens of {channels} channels"
    else:
        layers += f" of {len(shapes)} shapes"
    weighed = "errors weighted by the model's own queries" if found.queries else "without queries"
    return f"{layers}; {weighed}"


def _audited(
    layer: Layer, schemes: dict[str, Scheme], default: KeyValueSchemes, limit: float
) -> LayerAudit:
    attention = None if layer.queries is None else SampledAttention(layer)
    sinks = sinks_of(layer, attention)
    leading = leading_sinks(sinks)
    sides = [Losses(layer, side, attention) for side in SIDES]
    key, value = ({name: one.of(scheme) for name, scheme in schemes.items()} for one in sides)
    choices = [
        choose(scheme, leading, limit, one.of) for scheme, one in zip(default, sides, strict=True)
    ]
    return LayerAudit(
        layer.number, (*layer.keys.shape, layer.values.shape[-1]),
        side_figures(layer.keys), side_figures(layer.values), tuple(sinks),
        key, value, *choices,
    )  # fmt: skip


def _runs(numbers: Sequence[int]) -> str:
    """Write ascending numbers, neighbours as a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in runs)


def _policy(layers: Sequence[LayerAudit], default: KeyValueSchemes) -> Recommendation:
    chosen = {layer.number: layer.schemes for layer in layers}
    reasons = {layer.number: layer.reasons() for layer in layers if layer.schemes != default}
    bits = elements = later = later_elements = 0.0
    for layer in layers:
        batch, _, tokens, *_ = layer.shape
        own, count = layer.bits(tokens)
        bits, elements = bits + batch * own, elements + batch * count
        own, count = layer.bits(CONTEXT)
        later, later_elements = later + own, later_elements + count
    return Recommendation(
        default, chosen, reasons, int(-(-bits // 8)), int(2 * elements), bits / elements,
        later / later_elements,
    )  # fmt: skip


def _default(given: Scheme | KeyValueSchemes | str) -> KeyValueSchemes:
    named = Scheme.named(given) if isinstance(given, str) else given
    require_feedback(given, None)
    key, value = named if isinstance(named, tuple) else (named, named)
    pair = KeyValueSchemes(as_scheme("default", key), as_scheme("default", value))
    for side, scheme in zip(("keys", "values"), pair, strict=True):
        if scheme.block_size is None:
            raise ValueError(
                f"default of {side} has no block size, so that no cache grows by it; take "
                "streaming4, or give it one"
            )
        if scheme.outlier_channels:
            raise ValueError(f"default of {side} has outlier channels, which no cache has")
    return pair


def _scheme(name: str) -> Scheme:
    scheme = as_scheme("schemes", name)
    if scheme.outlier_channels:
        raise ValueError(f"schemes: {name} has outlier channels, of which nothing is predicted")
    return scheme

"""One page of HTML that holds all of an audit: no network, no library, light and dark."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from importlib import resources
from string import Template

import numpy as np

from nsq_ref.audit.figures import SideFigures
from nsq_ref.audit.findings import THRESHOLDS
from nsq_ref.audit.pictures import HeatMap, Lines, heat_map, line_chart
from nsq_ref.audit.report import DEFINITIONS, Audit, LayerAudit, summary
from nsq_ref.dtypes import Float64

__all__ = ["html_page"]

MOST_CELLS = 1 << 17  # of a map of channels; beyond it neighbours are put together


def html_page(found: Audit, title: str = "keys and values") -> str:
    """Return a page that shows all of an audit, in a file of its own.

    Parameters
    ----------
    found : Audit
    title : str
        What was audited.

    Returns
    -------
    str

    Examples
    --------
    >>> import numpy as np
    >>> from nsq_ref.audit import audit
    >>> x = np.random.default_rng(0).standard_normal((2, 1, 3, 40, 8)).astype(np.float32)
    >>> page = html_page(audit(x, x, schemes=["naive4"]), "random")
    >>> page.count("<figure"), "http" in page
    (10, False)
    """
    layers = [layer.number for layer in found.layers]
    parts = {
        "title": html.escape(title),
        "summary": html.escape(summary(found)),
        "advice": _advice(found),
        "figures": _figures(found),
        "main": _main(found, layers),
        "channels": _channels(found, layers),
        "findings": _items(found.words()),
        "judged": _judged(found),
        "limit": f"{found.limit:.0%}",
        "losses": _losses(found),
        "modes": _modes(found),
        "policy": html.escape(json.dumps(found.policy.to_rewrite(), indent=2)),
        "norms": _norms(found, layers),
        "definitions": "".join(
            f"<dt>{html.escape(name.replace('_', ' '))}</dt><dd>{html.escape(words)}</dd>"
            for name, words in DEFINITIONS.items()
        ),
    }
    template = resources.files("nsq_ref.audit").joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(parts)


def _advice(found: Audit) -> str:
    first, *others = found.advice()
    warn = "" if found.policy.is_default else " warn"
    more = f"<ul>{_items(others)}</ul>" if others else ""
    return (
        f'<div class="card{warn}" id="advice"><p class="soft">Recommended</p>'
        f"<strong>{html.escape(first)}</strong>{more}</div>"
    )


def _figures(found: Audit) -> str:
    policy = found.policy
    greatest = max(one.key.outlier_ratio.max() for one in found.layers)
    shown = {
        "bits an element": f"{policy.bits_per_element:.2f}",
        "of float16": f"{policy.cache_nbytes / policy.float16_nbytes:.1%}",
        "K outlier ratio, first layer": f"{found.layer_0_ratio:.1f}",
        "K outlier ratio, greatest": f"{greatest:.1f}",
        "naive4 loses of keys, median layer": f"{np.median(found.judged('key', 'naive4')):.1%}",
        "as recommended": _worst(found),
    }
    return "".join(
        f'<div><span class="soft">{html.escape(name)}</span><b>{value}</b></div>'
        for name, value in shown.items()
    )


def _worst(found: Audit) -> str:
    losses = [one.key_choice.loss for one in found.layers]
    known = [loss.judged for loss in losses if loss is not None]
    return f"{np.median(known):.1%}" if known else "-"


def _main(found: Audit, layers: Sequence[int]) -> str:
    def ratio(side: SideFigures) -> Float64:
        return side.outlier_ratio

    figures = [
        _of_heads(found, layers, side, "outlier ratio", ratio, 1.0, THRESHOLDS["outlier channel"])
        for side in ("key", "value")
    ]
    names = list(found.layers[0].key_losses)
    errors: Lines = {
        name: (_errors(found, name, "measured"), _errors(found, name, "predicted"))
        for name in names
    }
    title = "error of the logits: lines measured, circles predicted"
    figures.append(line_chart("logits", title, layers, errors))
    losses: Lines = {name: (found.judged("key", name), []) for name in names}
    title = "what each layer loses of its keys; across, the limit"
    figures.append(line_chart("judged", title, layers, losses, found.limit))
    return "".join(figures)


def _errors(found: Audit, name: str, figure: str) -> list[float]:
    return [float(layer.key_losses[name].to_dict()[figure]) for layer in found.layers]


def _channels(found: Audit, layers: Sequence[int]) -> str:
    figures = []
    for side in ("key", "value"):
        for what, of, least in (
            ("peak over the mean peak", _peaks, 0.1),
            ("bias", _biases, 0.1),
        ):
            each = [of(_side(layer, side)) for layer in found.layers]
            values, group = _joined(each)
            most = max(10.0, float(np.nanmax(values)))
            figures.append(
                heat_map(
                    f"{side}-{what.split()[0]}",
                    HeatMap(f"{side}s: {what}", "head", layers, values, least, min(most, 1e3), True,
                            group),
                )
            )  # fmt: skip
    return "".join(figures)


def _peaks(side: SideFigures) -> Float64:
    mean = side.peak.mean(axis=-1, keepdims=True)
    return side.peak / np.where(mean == 0, 1, mean)


def _biases(side: SideFigures) -> Float64:
    return side.bias


def _joined(each: Sequence[Float64]) -> tuple[Float64, int]:
    """Return ``[layers, heads * channels]`` and the channels of a head; greatest of neighbours."""
    heads, channels = (max(one.shape[axis] for one in each) for axis in (0, 1))
    joint = 1
    while len(each) * heads * channels // joint > MOST_CELLS and joint < channels:
        joint *= 2
    width = -(-channels // joint)
    values = np.full((len(each), heads, width * joint), np.nan)
    for row, one in zip(values, each, strict=True):
        row[: one.shape[0], : one.shape[1]] = one
    groups = values.reshape(len(each), heads, width, joint)
    filled = np.where(np.isnan(groups), -np.inf, groups).max(axis=-1)
    return np.where(np.isinf(filled), np.nan, filled).reshape(len(each), -1), width


def _norms(found: Audit, layers: Sequence[int]) -> str:
    def variation(side: SideFigures) -> Float64:
        return side.norm_variation

    return "".join(
        _of_heads(
            found, layers, side, "deviation of norms over their mean", variation, 0.0,
            THRESHOLDS["norm variation"],
        )
        for side in ("key", "value")
    )  # fmt: skip


def _of_heads(
    found: Audit,
    layers: Sequence[int],
    side: str,
    what: str,
    of: Callable[[SideFigures], Float64],
    least: float,
    threshold: float,
) -> str:
    each = [of(_side(layer, side)) for layer in found.layers]
    values = np.full((len(each), max(map(len, each))), np.nan)
    for row, one in zip(values, each, strict=True):
        row[: len(one)] = one
    # Colours reach the threshold at least, so that a calm model looks calm.
    greatest = max(threshold, float(np.nanmax(values)))
    name = f"{side}-{what.replace(' ', '-')}"
    return heat_map(name, HeatMap(f"{side}s: {what}", "head", layers, values, least, greatest))


def _side(layer: LayerAudit, side: str) -> SideFigures:
    return layer.key if side == "key" else layer.value


def _judged(found: Audit) -> str:
    if found.queries:
        return "Of the attention's output, for real queries; the other side exact."
    return "Of what tells tokens apart, as there are no queries."


def _losses(found: Audit) -> str:
    return "".join(_table(found, side) for side in ("key", "value"))


def _table(found: Audit, side: str) -> str:
    names = list(found.layers[0].key_losses)
    columns = [found.judged(side, name) for name in names]
    rows = "".join(
        f"<tr><td>{layer.number}</td>{''.join(_cell(loss, found.limit) for loss in losses)}</tr>"
        for layer, losses in zip(found.layers, zip(*columns, strict=True), strict=True)
    )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in [f"{side}s", *names])
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "</div>"
    )


def _cell(loss: float, limit: float) -> str:
    over = ' class="over"' if loss > limit else ""
    return f"<td{over}>{loss:.1%}</td>"


def _modes(found: Audit) -> str:
    return "".join(
        f'<div class="card{" warn" if mode.holds else ""}"><p><b>Mode {mode.number}</b> '
        f'{html.escape(mode.words)}.</p><p class="soft">{html.escape(mode.caveat)}</p></div>'
        for mode in found.modes
    )


def _items(sentences: Sequence[str]) -> str:
    return "".join(f"<li>{html.escape(one)}</li>" for one in sentences)

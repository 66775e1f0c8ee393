"""An evaluation as tables of Markdown."""

from __future__ import annotations

from typing import Any

from onnx_export.evaluation.results import Evaluation

__all__ = ["page", "rows"]

SCORED_HEADS = (
    "scheme", "bits", "without tail", "KL", "median", "99%", "99.9%", "max", "same top 1",
    "same top 5", "NLL", "perplexity",
)  # fmt: skip
WRITTEN_HEADS = ("scheme", "bits", "without tail", "first divergence", "agreement", "diversity")


def page(evaluation: Evaluation) -> str:
    """Return a page: what was measured, a table of each context length, what is told apart.

    Examples
    --------
    >>> from onnx_export.evaluation import Prefill, evaluate
    >>> from onnx_export.models.decoder import Decoder
    >>> from onnx_export.models.tiny import tiny_onnx
    >>> found = evaluate(Decoder(tiny_onnx()), [[3] * 20] * 2, ["naive4"], protocol=Prefill(10, 5))
    >>> page(found).splitlines()[4]
    '2 passages, 10 tokens scored. Perplexity with the float32 cache: ...'
    """
    protocol = {key: value for key, value in evaluation.protocol.items() if key != "name"}
    said = ", ".join(f"{key} {value}" for key, value in protocol.items())
    lines = [
        f"# {evaluation.model['name']}",
        "",
        f"Protocol {evaluation.protocol['name']}: {said}.",
    ]
    for table in evaluation.to_dict()["tables"]:
        heads, body, summary = rows(table)
        lines += ["", *([f"## After {table['label']} tokens", ""] if table["label"] else [])]
        lines += [summary, "", _line(heads), _line(["---"] * len(heads)), *map(_line, body)]
        lines += ["", *(f"- {sentence(one)}" for one in table["paired"])]
    lines += [f"- {name} was refused: {why}" for name, why in evaluation.refused.items()]
    return "\n".join(lines).rstrip() + "\n"


def rows(table: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]], str]:
    """Return heads, rows and a line above them, of a table of `Evaluation.to_dict`."""
    schemes = table["schemes"]
    if "nll" not in table["baseline"]:
        body = [
            [name, *_bits(one), *(_mean(one[figure], 3) for figure in
             ("first_divergence", "agreement", "diversity"))]
            for name, one in schemes.items()
        ]  # fmt: skip
        diversity = table["baseline"]["diversity"]
        summary = (
            f"{table['passages']} passages. Diversity with the float32 cache: "
            f"{sum(diversity) / len(diversity):.3f}"
        )
        return WRITTEN_HEADS, body, summary
    body = [
        [
            name, *_bits(one), _mean(one["kl"], 5),
            *(_number(one["kl"][quantile], 5) for quantile in ("median", "p99", "p999", "max")),
            _mean(one["top1"], 4), _mean(one["top5"], 4), _change(one["nll"]),
            _number(one["perplexity"], 3),
        ]
        for name, one in schemes.items()
    ]  # fmt: skip
    summary = (
        f"{table['passages']} passages, {table['scored_tokens']} tokens scored. Perplexity with "
        f"the float32 cache: {_number(table['baseline']['perplexity'], 3)}"
    )
    return SCORED_HEADS, body, summary


def sentence(difference: dict[str, Any]) -> str:
    """Return what may be said of a difference, of `Difference.to_dict`.

    Examples
    --------
    >>> from onnx_export.evaluation import Difference
    >>> sentence(Difference("a", "b", "kl", 0.25, 0.1, 0.02, (0.1, 0.4)).to_dict())
    'KL of a is 0.25000 ± 0.10000 above that of b (p = 0.02).'
    """
    figure = {"kl": "KL", "first_divergence": "first divergence"}[difference["figure"]]
    first, second, mean = difference["first"], difference["second"], difference["mean"]
    error, p = _number(difference["error"], 5), difference["p_value"]
    if not difference["told_apart"]:
        return f"{figure} of {first} and {second} is not told apart: {mean:+.5f} ± {error}."
    where = "above" if mean > 0 else "below"
    return (
        f"{figure} of {first} is {abs(mean):.5f} ± {error} {where} that of {second} (p = {p:.2g})."
    )


def _bits(one: dict[str, Any]) -> list[str]:
    return [f"{one[name]:.2f}" for name in ("bits_per_element", "sealed_bits_per_element")]


def _mean(one: dict[str, Any], digits: int) -> str:
    mean = _number(one["mean"], digits)
    return mean if one["error"] is None else f"{mean} ± {one['error']:.{digits}f}"


def _change(one: dict[str, Any]) -> str:
    if one["change"] is None:
        return "not finite"
    error = one["change_error"]
    return f"{one['change']:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _number(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

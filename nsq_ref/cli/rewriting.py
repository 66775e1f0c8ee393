"""``nsq onnx rewrite``: quantized caches for a decoder that somebody exported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nsq_ref.cli.errors import about, extra
from nsq_ref.cli.options import FeedbackOption, JsonOption, file_name
from nsq_ref.cli.output import print_json, print_table

if TYPE_CHECKING:
    from nsq_ref.policy import Policy, Sides
    from onnx_export.rewrite import RewriteReport

SHOWN = 5  # nodes that are gone


def rewrite(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A decoder, its external data beside it.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", callback=file_name, help="The file to write.")
    ],
    *,
    scheme: Annotated[
        str, typer.Option(help="Of all caches: a name with a block size, such as streaming3.")
    ] = "streaming4",
    key: Annotated[str | None, typer.Option(help="The scheme of keys, if another.")] = None,
    value: Annotated[str | None, typer.Option(help="The scheme of values, if another.")] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON, layer by layer: {"layers": {"0": null, "5": "streaming8"}}; null: as is.',
        ),
    ] = None,
    feedback: FeedbackOption = None,
    row_lengths: Annotated[
        bool,
        typer.Option(
            "--row-lengths",
            help="Take the lengths of rows as inputs, where the model counts its mask.",
        ),
    ] = False,
    opset: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="At least; 24 is fast without the library (ONNX Runtime 1.26).",
        ),
    ] = None,
    library: Annotated[
        bool, typer.Option("--library", help="Put the native library beside OUT.")
    ] = False,
    cache: Annotated[
        Literal["tensors", "buffers"],
        typer.Option(
            help="Buffers: one tensor a side and layer, as onnxruntime-genai keeps it, its "
            "genai_config.json written beside OUT; only the native library runs them."
        ),
    ] = "tensors",
    context: Annotated[
        int | None,
        typer.Option(help="Tokens that buffers have room for; the model's own context by default."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Give a decoder that somebody exported quantized caches.

    Weights are neither read nor copied. What is not understood stays as it is, and is named with
    the reason: exit code 1. Nothing is written where nothing is rewritten.
    """
    from nsq_ref.files import load_feedback

    with extra("rewrite", "nsq onnx rewrite"):
        from onnx_export.rewrite import rewrite as rewrite_model

    if out.exists() and not (force or dry_run):
        raise ValueError(f"{out} exists; choose another name, or replace it with --force")
    from nsq_ref.policy import Policy

    usual = _sides(scheme, key, value)
    report = rewrite_model(
        model,
        out,
        policy=Policy(usual, {}) if policy is None else _read_policy(policy, usual),
        feedback=None if feedback is None else load_feedback(feedback),
        row_lengths=row_lengths,
        opset=opset,
        library=library,
        cache=cache,
        context_length=context,
        dry_run=dry_run,
    )
    if as_json:
        print_json(report.to_dict())
    else:
        _show(report, dry_run)
    if not report.complete:
        raise typer.Exit(1)


def _sides(name: str, key: str | None, value: str | None) -> Sides:
    """Return what the options say of keys and values: names of schemes."""
    from nsq_ref import Scheme
    from nsq_ref.policy import Sides, sides_of
    from nsq_ref.scheme import as_scheme

    Scheme.named(name)  # which knows no methods of others
    pair = sides_of(name)
    return Sides(
        pair.key if key is None else sides_of(as_scheme("key", key)).key,
        pair.value if value is None else sides_of(as_scheme("value", value)).value,
    )


def _read_policy(path: Path, default: Sides) -> Policy:
    from nsq_ref.policy import Policy

    with about(str(path)):
        return Policy.read(path, default)


def _show(report: RewriteReport, dry_run: bool) -> None:
    from nsq_ref.policy import scheme_text

    rows = []
    for one in report.attentions:
        key, value = (scheme_text(scheme) for scheme in one.schemes) if one.schemes else ("", "")
        note = f"refused: {one.reason}" if one.reason else "" if one.schemes else "stays as it is"
        note = "keys with feedback" if one.key_feedback else note
        layer = "" if one.layer is None else one.layer
        rows.append((layer, one.node, one.pattern, key, value, note))
    print_table(("layer", "attention", "found as", "keys", "values", ""), rows)
    for change in report.changes:
        typer.echo(f"{change.node}: {change.what}")
    if report.removed:
        some = ", ".join(report.removed[:SHOWN])
        more = ", ... (--json has all)" if len(report.removed) > SHOWN else ""
        count = len(report.removed)
        typer.echo(f"nodes that are gone, as nobody reads them ({count}): {some}{more}")
    if report.inputs:
        typer.echo(f"new inputs: {', '.join(report.inputs)}")
    before, after = report.opset
    if before != after:
        typer.echo(f"opset {before} is now {after}")
    done = "to rewrite" if dry_run else "rewritten"
    typer.echo(f"{done}: {report.rewritten} of {len(report.attentions)} attentions")
    for path in report.files:
        typer.echo(path)

"""``nsq audit``: what quantization would do to a model, and what to store its cache by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsq_ref.cli.errors import about, extra
from nsq_ref.cli.options import JsonOption, file_name, given
from nsq_ref.cli.output import print_json, print_table, stages

if TYPE_CHECKING:
    from nsq_ref.audit import Audit, Layer, LayerAudit

ARRAYS = (".npz", ".npy", ".safetensors")
OF_MODELS = ("text", "tokens", "tokenizer")


def audit(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            help="Keys and values by layer, and queries if there are: .npz or .safetensors; or a "
            "model, a GGUF file, an exported ONNX decoder, or the folder of one or of transformers."
        ),
    ],
    *,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What a model reads: plain text in UTF-8.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=16, help="Tokens of the text that a model reads at most.")
    ] = 1024,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json or a GGUF file; by default what is beside the model."),
    ] = None,
    scheme: Annotated[
        str, typer.Option(help="Where the policy begins: a name with a block size, or a pair.")
    ] = "streaming4",
    limit: Annotated[
        float, typer.Option(help="What a layer may lose, from 0 to 1; beyond it gets more bits.")
    ] = 0.25,
    softmax_scale: Annotated[
        float | None, typer.Option(help="Of the scores, if not one over the root of head_dim.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=file_name, help="Write a page with heat maps."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=file_name,
            help="Write the policy, as `nsq eval` and `nsq onnx rewrite` take it.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell which layers, heads, channels and tokens stand out, what schemes would lose, what to do.

    Arrays are [layers, batch, kv_heads, T, D], named keys, values and queries, or one for each
    layer, as layers.0.keys.
    """
    options = {name for name in given(context) if name in OF_MODELS}
    of_arrays = source.suffix.lower() in ARRAYS
    if of_arrays and options:
        raise ValueError(f"--{min(options)} is of a model; leave it out with a file of arrays")
    if not of_arrays and source.is_file() and text is None:
        _require_model(source)
        raise ValueError(f"{source} is a model, which reads a text; give --text FILE")
    from nsq_ref.audit import audit_layers, html_page
    from nsq_ref.files import atomic

    written = [path for path in (html, policy) if path is not None]
    atomic.require_writable(*written)
    with stages() as told:
        if of_arrays or not source.exists():
            layers, note = _arrays(source), ""
        else:
            layers, note = _of_model(source, text, tokens, tokenizer, told)
        found = audit_layers(
            layers, default=scheme, limit=limit, softmax_scale=softmax_scale, progress=told
        )
    files: list[tuple[Path, bytes]] = []
    if html is not None:
        files.append((html, html_page(found, source.name).encode()))
    if policy is not None:
        files.append((policy, (json.dumps(found.policy.to_rewrite(), indent=2) + "\n").encode()))
    atomic.write(files)
    if as_json:
        print_json({"source": str(source), **found.to_dict()})
    else:
        _show(source.name, found, note)
        for path in written:
            typer.echo(path)


def _require_model(source: Path) -> None:
    from nsq_ref.files import kinds

    with source.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF" and source.suffix.lower() != ".onnx":
        what = "a file of arrays (.npz, .safetensors) or a model (GGUF, ONNX)"
        raise ValueError(kinds.mistaken(source, what) or f"{source} is not {what}")


def _arrays(source: Path) -> Sequence[Layer]:
    from nsq_ref.audit import layers_of_arrays
    from nsq_ref.files import read_arrays

    arrays = read_arrays(source)
    with about(str(source)):
        return layers_of_arrays(arrays)


def _of_model(
    source: Path, text: Path | None, tokens: int, tokenizer: Path | None, told: Any
) -> tuple[Sequence[Layer], str]:
    with extra("rewrite", "nsq audit of a model"):
        from onnx_export.evaluation.captured import captured
        from onnx_export.models.texts import read_text

    if text is None:
        raise ValueError(f"{source} is a model, which reads a text; give --text FILE")
    content = read_text(text)
    with extra("transformers", f"{source}, a model of transformers,"):
        found = captured(source, content, tokens=tokens, tokenizer=tokenizer, progress=told)
    note = f"{found.tokens} of the {found.text_tokens} tokens of {text.name} were read"
    if found.without_queries:
        note += f"; {found.without_queries}, so that none are here"
    return found.layers, note


def _show(name: str, found: Audit, note: str) -> None:
    from nsq_ref.audit.report import summary

    typer.echo(f"{name}: {summary(found)}")
    if note:
        typer.echo(note)
    typer.echo("\nBy layer, of the worst head:")
    print_table(
        (
            "layer", "K ratio", "head, channel", "V ratio", "K bias", "V bias", "K norms",
            "V norms", "sinks",
        ),
        [_structure(layer) for layer in found.layers],
    )  # fmt: skip
    schemes = list(found.layers[0].key_losses)
    typer.echo(
        "\nRoot mean square error of the logits, measured (predicted); what a layer loses as "
        "recommended:"
    )
    print_table(
        ("layer", *schemes, "keys lose", "values lose"),
        [_losses(layer, schemes) for layer in found.layers],
    )
    typer.echo("\nThe paper's failure modes of naive4:")
    for mode in found.modes:
        typer.echo(f"  mode {mode.number} {mode.words}. {mode.caveat}")
    typer.echo("\nWhat stands out:")
    for words in found.words():
        typer.echo(f"  {words}")
    typer.echo("\nRecommended:")
    for words in found.advice():
        typer.echo(f"  {words}")
    policy = found.policy
    share = policy.cache_nbytes / policy.float16_nbytes
    typer.echo(
        f"  {policy.cache_nbytes:,} bytes, {share:.1%} of float16; "
        f"{policy.bits_per_element:.2f} bits an element here, "
        f"{policy.bits_at_4096:.2f} at 4096 tokens"
    )


def _structure(layer: LayerAudit) -> tuple[Any, ...]:
    head = int(layer.key.outlier_ratio.argmax())
    tokens = sorted({sink.token for sink in layer.sinks})
    shown = ", ".join(map(str, tokens[:4])) + (", ..." if len(tokens) > 4 else "")
    return (
        layer.number,
        f"{layer.key.outlier_ratio[head]:.1f}",
        f"{head}, {layer.key.outlier_channel[head]}",
        f"{layer.value.outlier_ratio.max():.1f}",
        _short(layer.key.bias.max()),
        _short(layer.value.bias.max()),
        f"{layer.key.norm_variation.max():.2f}",
        f"{layer.value.norm_variation.max():.2f}",
        shown or "-",
    )


def _losses(layer: LayerAudit, schemes: list[str]) -> tuple[Any, ...]:
    cells = []
    for name in schemes:
        one = layer.key_losses[name].to_dict()
        cells.append(f"{one['measured']:.3f} ({one['predicted']:.3f})")
    losses = [choice.loss for choice in (layer.key_choice, layer.value_choice)]
    return (
        layer.number, *cells, *("-" if loss is None else f"{loss.judged:.1%}" for loss in losses)
    )  # fmt: skip


def _short(bias: float) -> str:
    return "constant" if bias >= 1e6 else f"{bias:.3g}"

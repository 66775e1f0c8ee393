"""``nsq onnx calibrate``: feedback for the keys of a decoder, from the queries of some text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nsq_ref.cli.errors import extra
from nsq_ref.cli.options import JsonOption, file_name
from nsq_ref.cli.output import print_json, stages

if TYPE_CHECKING:
    from nsq_ref import Feedback


def calibrate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF file, or a decoder with a float cache that somebody exported to ONNX.",
        ),
    ],
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", callback=file_name, help="A .safetensors file."
        ),
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Plain text in UTF-8 that is like what the model will read; again for more, which "
            "adds up. English prose by default.",
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            min=16,
            help="Tokens of each text that are read at most. Feedback serves positions like these: "
            "give more, and texts as long, for caches of many more.",
        ),
    ] = 1024,
    damping: Annotated[
        float, typer.Option(min=0, help="The more, the less it is made for these texts alone.")
    ] = 0.03,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json or a GGUF file; by default what is beside the model."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write feedback for the keys of a decoder: coded with it, errors fall where no query looks.

    The model reads some text once, in float32. `nsq onnx rewrite --feedback` and `nsq onnx build
    --feedback` put it into a model, whose cache has the same size and is read as fast.
    """
    if output.exists() and not force:
        raise ValueError(f"{output} exists; choose another name, or replace it with --force")
    from nsq_ref.files import atomic, save_feedback

    with extra("rewrite", "nsq onnx calibrate"):
        from onnx_export.evaluation.moments import query_moments
        from onnx_export.models.texts import read_text
    atomic.require_writable(output)
    texts = [read_text(path) for path in text] if text else None
    with stages() as told:
        found = query_moments(model, texts, tokens=tokens, tokenizer=tokenizer, progress=told)
    feedback = found.feedback(damping)
    save_feedback(output, feedback)
    read = sum(one.tokens for one in found.texts)
    if as_json:
        print_json(
            {
                "model": str(model),
                "texts": [one._asdict() for one in found.texts],
                "damping": damping,
                "layers": {name: _told(one) for name, one in feedback.items()},
                "file": str(output),
            }
        )
    else:
        typer.echo(f"{len(feedback)} layers, from the queries of {read} tokens")
        typer.echo(output)


def _told(feedback: Feedback) -> dict[str, str | int]:
    return {
        "kv_heads": feedback.kv_heads,
        "head_dim": feedback.head_dim,
        "digest": feedback.digest,
    }

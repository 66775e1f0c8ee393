"""``nsq onnx``: schemes as ONNX models, and decoders with a cache of one, built and run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from nsq_ref.cli import calibrating, decoding, rewriting
from nsq_ref.cli.errors import extra
from nsq_ref.cli.options import InputDtype, JsonOption, SetOption, file_name
from nsq_ref.cli.output import print_json

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
def codec(
    scheme: Annotated[
        str, typer.Argument(help="A name of `nsq info`, or a variant such as nsep+pchan4-gain.")
    ] = "nsep+pchan4",
    *,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", callback=file_name, help="A folder."),
    ],
    changes: SetOption = None,
    dtype: Annotated[InputDtype, typer.Option(help="Of the array.")] = "float32",
    rank: Annotated[
        int | None, typer.Option(help="Axes of the array; any number by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace models that are there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write encode.onnx and decode.onnx: a scheme in standard operators, bit for bit.

    Inputs and outputs are the arrays that NSQ-1 stores, by their names, as `nsq check` takes them.
    A graph cannot refuse: what `nsq quantize` refuses gives numbers of no meaning.
    """
    if "KIVI" in scheme:
        raise ValueError(
            f"{scheme} is a pair for keys and values; name one of its schemes, such as pchan2"
        )
    from nsq_ref.conformance.family import scheme_named
    from nsq_ref.files import atomic
    from nsq_ref.policy import changed_fields

    chosen = replace(scheme_named(scheme), **changed_fields(changes or ()))
    with extra("onnx", "nsq onnx"):
        from onnx_export.operators import dequantize_model, quantize_model, save_models
    encode, decode = output / "encode.onnx", output / "decode.onnx"
    for path in (encode, decode):
        if path.exists() and not force:
            raise ValueError(f"{path} exists; choose another folder, or replace it with --force")
    atomic.require_writable(encode, decode, make_folders=True)
    save_models(
        {
            encode: quantize_model(chosen, dtype, rank),
            decode: dequantize_model(chosen, dtype, rank),
        }
    )
    if as_json:
        print_json(
            {
                "scheme": chosen.to_dict(),
                "dtype": dtype,
                "encode": str(encode),
                "decode": str(decode),
            }
        )
    else:
        typer.echo(f"{encode}\n{decode}")


VERBS: tuple[Callable[..., None], ...] = (
    decoding.build, decoding.run, decoding.chat, rewriting.rewrite, calibrating.calibrate,
)  # fmt: skip
for verb in VERBS:
    app.command()(verb)

"""``nsq onnx``: schemes as ONNX models, and decoders with a cache of one, built and run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from nsq_ref.cli import rewriting
from nsq_ref.cli.errors import extra
from nsq_ref.cli.options import (
    InputDtype,
    JsonOption,
    SetOption,
    changed_fields,
    file_name,
    given,
    key_value_schemes,
)
from nsq_ref.cli.output import print_json, stages

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

    chosen = replace(scheme_named(scheme), **changed_fields(changes))
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


@app.command()
def build(
    context: typer.Context,
    gguf: Annotated[Path, typer.Argument(help="A model of the Llama, Qwen2 or Qwen3 family.")],
    output: Annotated[Path, typer.Argument(metavar="DIR", callback=file_name, help="A folder.")],
    *,
    attention: Annotated[
        Literal["plain", "gqa", "nsq"],
        typer.Option(help="Standard operators, GroupQueryAttention, or a quantized cache."),
    ] = "nsq",
    scheme: Annotated[
        str, typer.Option(help="Of the cache: a name of `nsq info` with a block size, or a pair.")
    ] = "streaming4",
    value_scheme: Annotated[
        str | None, typer.Option(help="Of the values, if another than of the keys.")
    ] = None,
    changes: SetOption = None,
    weights: Annotated[
        Literal["float32", "stored"],
        typer.Option(help="All float32, or Q4_0, Q4_1 and Q8_0 matrices in their own bits."),
    ] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is there.")] = False,
) -> None:
    """Write the ONNX decoder of a GGUF file, with its tokenizer, as `nsq onnx run` takes it."""
    schemes = key_value_schemes(scheme, value_scheme, changes or [])
    if attention != "nsq":
        for name, option in given(context).items():
            if name in ("scheme", "value_scheme", "changes"):
                raise ValueError(f"{option} is of --attention nsq; leave it out with {attention}")
    from nsq_ref.files import atomic

    with extra("onnx", "nsq onnx"):
        from onnx_export.models import attention_forms as forms
        from onnx_export.models.built import build_onnx
        from onnx_export.models.gguf import GGUFFile
        from onnx_export.models.json_tokenizer import tokenizer_files
        from onnx_export.models.tokenizer import Tokenizer
    model = output / "model.onnx"
    if model.exists() and not force:
        raise ValueError(f"{model} exists; choose another folder, or replace it with --force")
    atomic.require_writable(model, make_folders=True)
    form: forms.AttentionForm = forms.PlainAttention()
    if attention == "gqa":
        form = forms.GroupedAttention()
    elif attention == "nsq":
        form = forms.QuantizedAttention(*schemes)
    # First, as it is read in a moment, and weights are not.
    files = tokenizer_files(Tokenizer(gguf))
    with stages() as told:
        build_onnx(
            GGUFFile(gguf),
            output,
            told,
            attention=form,
            weights=weights,
            beside=files,
        )
    typer.echo(model)


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="A decoder that says what its cache is.")],
    prompt: Annotated[str, typer.Argument(help="Read as it is, control tokens included.")],
    *,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="From so many tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="From tokens of this share.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same gives the same text.")] = None,
    threads: Annotated[int | None, typer.Option(help="All cores by default.")] = None,
    capacity: Annotated[
        int | None, typer.Option(help="Tokens of the cache; the model's context by default.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json or a GGUF file; by default what is beside the model."),
    ] = None,
    library: Annotated[
        bool, typer.Option(help="Take the native library, not the functions in the model.")
    ] = True,
) -> None:
    """Continue a text, and say how fast that was and how large the cache became.

    The text goes to stdout as it comes, the figures to stderr.
    """
    with extra("onnx", "nsq onnx"):
        from onnx_export.models.json_tokenizer import TOKENIZER, read_tokenizer
        from onnx_export.running import Sampling, Session
        from onnx_export.running.text import pieces
    sampling = Sampling(temperature, top_k, top_p, seed)
    path = model.with_name(TOKENIZER) if tokenizer is None else tokenizer
    if not model.is_file():
        raise FileNotFoundError(f"there is no ONNX model {str(model)!r}")
    if not path.is_file():
        raise ValueError(f"there is no tokenizer {str(path)!r}; give one with --tokenizer")
    words = read_tokenizer(path)
    ids = words.encode(prompt)
    if not len(ids):
        raise ValueError("the prompt is empty; give some text to continue")
    session = Session(model, capacity=capacity, threads=threads, library=library)
    moments = [time.perf_counter()]
    made = session.stream(ids, tokens, stop_tokens=words.stop_tokens, sampling=sampling)
    typer.echo(words.decode(ids.tolist()), nl=False)

    def timed() -> Iterator[int]:
        for token in made:
            moments.append(time.perf_counter())
            yield token

    for piece in pieces(timed(), words.decode):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()
    first, rest = moments[1] - moments[0], moments[-1] - moments[1]
    said = f"{len(ids)} tokens read in {first:.2f} s"
    if len(moments) > 2:
        said += f", {(len(moments) - 2) / rest:.1f} tokens a second"
    typer.echo(f"{said}; cache {session.memory()}", err=True)


app.command()(rewriting.rewrite)

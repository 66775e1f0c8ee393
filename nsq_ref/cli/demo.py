"""``nsq demo``: what every scheme saves and costs, on a real model or on arrays that are given."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsq_ref.cli.errors import about, extra
from nsq_ref.cli.options import JsonOption, file_name, given, side_of
from nsq_ref.cli.output import print_table, progress, stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nsq_ref.comparison import CacheRoundTrip
    from nsq_ref.dtypes import Array


QUICK_PASSAGES = 2  # that are read in ONNX Runtime with each cache, without --long


def demo(
    context: typer.Context,
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", callback=file_name, help="Folder for demo.png, demo.svg, demo.json."
        ),
    ] = Path("nsq-demo"),
    keys: Annotated[
        Path | None,
        typer.Option(help="Only code your own keys and values: .npz, .npy or .safetensors."),
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="Another model of the Llama family, as a GGUF file.")
    ] = None,
    passages: Annotated[int, typer.Option(min=2, help="Passages of real prose.")] = 16,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens whose cache is quantized.")] = 512,
    continuation: Annotated[int, typer.Option(min=1, help="Tokens that are scored.")] = 128,
    native: Annotated[
        bool, typer.Option(help="Also decode in ONNX Runtime, with each kind of cache.")
    ] = True,
    long: Annotated[
        bool,
        typer.Option("--long", help="There with all passages: some minutes."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show on a real model what every scheme saves and what it costs.

    Real prose is prefilled, the cache of every layer quantized and dequantized, and the tokens that
    follow are scored with it. Then the model decodes in ONNX Runtime with a float32 cache, with
    ONNX Runtime's own int4 cache and with ours. The first run fetches SmolLM2-135M-Instruct, 93 MB.
    """
    if keys is not None:
        for name in given(context):
            if name in ("gguf", "passages", "prefill", "continuation", "native", "long"):
                raise ValueError(f"--keys are coded without a model; leave --{name} out")
    if long and not native:
        raise ValueError("--long is of the native path; leave --no-native out")
    from nsq_ref.files import atomic

    image, drawing, figures = (output / f"demo.{ending}" for ending in ("png", "svg", "json"))
    atomic.require_writable(image, drawing, figures, make_folders=True)
    with extra("demo", "nsq demo"):
        from nsq_ref import plots

        if keys is None:
            from onnx_export.evaluation.demo import run_demo
            from onnx_export.evaluation.native import run_native, why_not
    result: dict[str, Any]
    if keys is None:
        reason = why_not(gguf) if native else None
        with stages() as told:
            measured = run_demo(
                gguf_path=gguf,
                passages=passages,
                prefill_length=prefill,
                continuation_length=continuation,
                progress=told,
            )
            if native and reason is None:
                decoded = run_native(
                    gguf_path=gguf,
                    passages=passages if long else QUICK_PASSAGES,
                    prefill_length=prefill,
                    continuation_length=continuation,
                    progress=told,
                )
        trips, sample, source = measured.trips, measured.keys, measured.model
        result = {**measured.to_dict(), "passages": passages, "prefill": prefill}
        result["continuation"] = continuation
        if native:
            result["native"] = decoded.to_dict() if reason is None else {"skipped": reason}
    else:
        (trips, sample), source = _coded(keys), keys.name
        result = {"source": source, "schemes": {n: trip.to_dict() for n, trip in trips.items()}}
    layer = int(trips["naive4"].key_error.argmax())
    figure = plots.demo_figure(
        {name: trip.key_error for name, trip in trips.items()},
        {name: trip.value_error for name, trip in trips.items() if trip.value_error.size},
        sample[layer],
        f"keys of layer {layer}",
        source,
    )
    text = json.dumps(result, indent=2)
    # First, as they may have taken an hour: a disk that is full takes only the files.
    if as_json:
        typer.echo(text)
    else:
        show(result)
    files = {path: _drawn(figure, path.suffix[1:]) for path in (image, drawing)}
    files[figures] = (text + "\n").encode()
    atomic.write(files.items(), make_folders=True)
    if not as_json:
        typer.echo(f"\n{image}, demo.svg and demo.json hold the figure and all of it.")


def _coded(file: Path) -> tuple[dict[str, CacheRoundTrip], Array]:
    """Code the arrays of a file by every scheme; return what that cost, and the keys by layer."""
    from nsq_ref.comparison import layered, round_trips
    from nsq_ref.files import read_arrays

    arrays = read_arrays(file)
    with about(str(file)):
        alone = len(arrays) == 1  # and then called whatever it is
        sides = {name: "key" if alone else side_of(name) for name in arrays}
        keys = layered([a for name, a in arrays.items() if sides[name] == "key"], "keys")
        others = [a for name, a in arrays.items() if sides[name] == "value"]
        values = layered(others, "values") if others else None
        trips = round_trips()
        with progress(f"coding {file.name}", len(trips)) as advance:
            for trip in trips.values():
                trip(keys, values)
                advance()
    return trips, keys


def _drawn(figure: Figure, kind: str) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=130)
    return drawn.getvalue()


def show(result: dict[str, Any]) -> None:
    """Print the table of ``nsq demo``; likelihoods only where a model was run."""
    baseline, caches = result.get("baseline"), result.get("passages", 1)
    heads = ["scheme", "bits", "cache MB", "vs fp16", "K error", "V error", "worst layer"]
    rows: list[tuple[Any, ...]] = []
    if baseline:
        heads += ["NLL", "perplexity"]
        typer.echo(
            f"{result['model']}: {result['passages']} passages of real prose, {result['prefill']} "
            f"tokens prefilled and quantized,\nthe next {result['continuation']} scored. "
            f"Perplexity with the float32 cache: {baseline['perplexity']:.2f}\n"
        )
        float16 = next(iter(result["schemes"].values()))["float16_bytes"] / caches
        rows.append(
            ("float32", "32.000", f"{2 * float16 / 1e6:.2f}", "200.0%", "0", "0", "-", "0", "0")
        )
    for name, one in result["schemes"].items():
        worst = one["worst_layer"]
        value_error = one["value_error"]
        row = [
            name,
            f"{one['bits_per_element']:.3f}",
            f"{one['bytes'] / caches / 1e6:.2f}",
            f"{one['bytes'] / one['float16_bytes']:.1%}",
            f"{one['key_error']:.1%}",
            "-" if value_error is None else f"{value_error:.1%}",
            f"{worst['side'][0].upper()} {worst['layer']}: {worst['error']:.1%}",
        ]
        if baseline:
            row += [
                f"{one['nll_change']:+.4f} ± {one['nll_change_error']:.4f}",
                f"{one['perplexity_change']:+.2f} ± {one['perplexity_change_error']:.2f}",
            ]
        rows.append(tuple(row))
    print_table(tuple(heads), rows)
    if not baseline:
        return
    typer.echo(
        "\nNLL and perplexity: their change against the float32 cache, NLL in nats a token;\n"
        "± is its standard error over passages. K and V error: relative, over all layers."
    )
    for paired in result["paired_with_nsep+pchan4"].values():
        typer.echo(paired["in_words"])
    typer.echo("Paired by passage; told apart is what differs by more than two standard errors.")
    if "native" in result:
        _show_native(result["native"])


def _show_native(native: dict[str, Any]) -> None:
    if "skipped" in native:
        typer.echo(f"\nDecoding in ONNX Runtime was left out: {native['skipped']}")
        return
    first = next(iter(native["caches"].values()))
    few, most = first["bytes"]
    contexts = list(first["tokens_per_second"])
    speeds = [f"tokens/s at {at}" for at in contexts]
    heads = ["cache", f"MB at {few}", f"MB at {most}", *speeds, "NLL"]
    rows = []
    for name, one in native["caches"].items():
        taken = {**one["bytes"], **one["resident_bytes"]}
        sizes = [
            f"{taken[tokens] / 1e6:.1f} ({taken[tokens] / float16:.1%})"
            for tokens, float16 in one["float16_bytes"].items()
        ]
        change = f"{one['nll_change']:+.4f} ± {one['nll_change_error']:.4f}"
        rows.append(
            (name, *sizes, *(f"{speed:.1f}" for speed in one["tokens_per_second"].values()),
             "0" if one is first else change)
        )  # fmt: skip
    typer.echo("\nDecoding in ONNX Runtime, with each kind of cache:\n")
    print_table(tuple(heads), rows)
    for name, reason in native["left_out"].items():
        typer.echo(f"{name} was left out: {reason}")
    measured = "what of one is in memory, by the system"
    typer.echo(
        f"\nMB, and of float16. At {few} tokens by arithmetic; at {most} "
        f"{measured if first['resident_bytes'] else 'too'}.\n"
        "Up to a block of 128 tokens of ours is float32, which weighs in a short text.\n"
        f"Speeds: median of steps in turn; at {contexts[-1]} the cache holds ones, not a text.\n"
        f"NLL: the first {native['passages']} of these passages with the cache streamed, what is "
        "scored is in it too.\n"
        + ("Two are few for claims: --long reads all. " if native["passages"] == 2 else "")
        + "GQA int4 has its static scales from these passages.\n"
        f"\nTexts after {native['prompt']!r}:"
    )
    for name, one in native["caches"].items():
        typer.echo(f"{name}: {one['text']!r}")

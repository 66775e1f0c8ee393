"""The command ``nsq``: one thin function a verb."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nsq_ref import KeyValueSchemes, Quantized, Scheme
    from nsq_ref.conformance.findings import Report
    from nsq_ref.conformance.operations import Operation, Port
    from nsq_ref.conformance.ports import Hello
    from nsq_ref.scheme import FloatName, SchemeName

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SIDES = {"k": "key", "key": "key", "keys": "key", "v": "value", "value": "value", "values": "value"}


class Backend(str, Enum):
    """Who computes; all give the same bytes."""

    numba = "numba"
    numpy = "numpy"
    oracle = "oracle"


OPERATIONS_OF_PORTS: tuple[Operation, ...] = ("encode", "decode", "attend", "stream")
OperationName = Enum("OperationName", {name: name for name in OPERATIONS_OF_PORTS}, type=str)  # type: ignore[misc]


class InputDtype(str, Enum):
    """Dtypes that quantizers take."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def _file_name(path: Path | None) -> Path | None:
    """Refuse the sign for a pipe, of which a file of that name would be made."""
    if path == Path("-"):
        raise ValueError("- is no file name; what is written whole or not at all goes to no pipe")
    return path


BackendOption = Annotated[Backend, typer.Option(help="All give the same bytes; oracle is slow.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OutputOption = Annotated[
    Path,
    typer.Option(
        "--output", "-o", callback=_file_name, help="A .safetensors file; replaced if it exists."
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from nsq_ref import __version__

        typer.echo(f"nsq {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Norm-separated quantization of LLM key/value caches (spec NSQ-1)."""


# --- verbs --------------------------------------------------------------------------------------


@app.command()
def info(
    file: Annotated[
        Path | None, typer.Argument(help="Quantized or plain arrays; checked in full.")
    ] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Show what a file holds; without a file, versions and schemes."""
    if file is None:
        _show_library(as_json)
        return
    from nsq_ref import files

    rows: list[dict[str, Any]]
    with _progress(f"reading {file.name}", 1) as advance:
        if file.suffix.lower() == ".safetensors" and files.holds_cache(file):
            rows = _describe_cache(file)
        elif file.suffix.lower() == ".safetensors" and files.is_quantized(file):
            rows = _describe(files.load(file))
        else:
            rows = [
                {
                    "name": name,
                    "shape": list(array.shape),
                    "dtype": array.dtype.name,
                    "scheme": None,
                    "scheme_name": None,
                    "bits_per_element": 8.0 * array.itemsize,
                    "bytes": array.nbytes,
                    "float16_bytes": 2 * array.size,
                    "collapsed_tokens": None,
                }
                for name, array in files.read_arrays(file).items()
            ]
        advance()
    _show_arrays(file, rows, as_json)


@app.command()
def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="A .npz, .npy or .safetensors of [..., T, D].")
    ],
    *,
    output: OutputOption,
    scheme: Annotated[
        str, typer.Option(help="A name of `nsq info`, or a pair such as KIVI-K2V4.")
    ] = "nsep+pchan4",
    value_scheme: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another scheme for the values.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Change a field, as in --set block_size=128."
        ),
    ] = None,
    backend: BackendOption = Backend.numba,
    as_json: JsonOption = False,
) -> None:
    """Quantize every array of a file.

    Where keys and values have different schemes, arrays are told apart by name: k, key or keys,
    and v, value or values, as in layers.0.keys.
    """
    schemes = _schemes(scheme, value_scheme, changes or [])
    _require_output(source, output)
    from nsq_ref import codec, files

    arrays = files.read_arrays(source)
    chosen = {}
    for name in arrays:
        with _named(str(source)):
            chosen[name] = _scheme_of(name, schemes)
    quantized: dict[str, Quantized] = {}
    with _progress(f"quantizing {source.name}", len(arrays)) as advance:
        for name, array in arrays.items():
            with _named(f"{source}: array {name!r}"):
                quantized[name] = codec.quantize(array, chosen[name], backend=backend.value)
            advance()
        files.save(output, quantized)
    _show_arrays(output, _describe(quantized), as_json)


@app.command()
def dequantize(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", help="A file that `nsq quantize` wrote.")
    ],
    *,
    output: OutputOption,
    backend: BackendOption = Backend.numba,
    as_json: JsonOption = False,
) -> None:
    """Reconstruct every array of a file as float32."""
    _require_output(source, output)
    from nsq_ref import codec, files

    quantized = files.load(source)
    restored = {}
    with _progress(f"dequantizing {source.name}", len(quantized)) as advance:
        for name, one in quantized.items():
            restored[name] = codec.dequantize(one, backend=backend.value)
            advance()
        files.write_arrays(output, restored)
    rows = [
        {"name": name, "shape": list(array.shape), "dtype": array.dtype.name}
        for name, array in restored.items()
    ]
    if as_json:
        _print_json({"file": str(output), "arrays": rows})
    else:
        _print_table(
            ("array", "shape", "dtype"), [(r["name"], r["shape"], r["dtype"]) for r in rows]
        )


@app.command()
def demo(
    context: typer.Context,
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", callback=_file_name, help="Folder for demo.png, demo.svg, demo.json."
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
    as_json: JsonOption = False,
) -> None:
    """Show on a real model what every scheme saves and what it costs.

    Real prose is prefilled, the cache of every layer quantized and dequantized, and the tokens that
    follow are scored with it. The first run fetches SmolLM2-135M-Instruct, 93 MB.
    """
    if keys is not None:
        for name in ("gguf", "passages", "prefill", "continuation"):
            given = context.get_parameter_source(name)
            if given is not None and given.name == "COMMANDLINE":
                raise ValueError(f"--keys are coded without a model; leave --{name} out")
    from nsq_ref.files import atomic, read_arrays

    image, drawing, figures = (output / f"demo.{ending}" for ending in ("png", "svg", "json"))
    atomic.require_writable(image, drawing, figures, make_folders=True)
    try:
        from nsq_ref import plots
        from nsq_ref.comparison import layered, round_trips

        if keys is None:
            from onnx_export.evaluation.demo import run_demo
    except ModuleNotFoundError as error:
        raise ValueError(
            f"nsq demo needs {error.name}; pip install 'nsq-ref[demo]' brings all it uses"
        ) from error
    result: dict[str, Any]
    if keys is None:
        with _stages() as progress:
            measured = run_demo(
                gguf_path=gguf,
                passages=passages,
                prefill_length=prefill,
                continuation_length=continuation,
                progress=progress,
            )
        trips, sample, source = measured.trips, measured.keys, measured.model
        result = {**measured.to_dict(), "passages": passages, "prefill": prefill}
        result["continuation"] = continuation
    else:
        arrays = read_arrays(keys)
        with _named(str(keys)):
            alone = len(arrays) == 1  # and then called whatever it is
            sides = {name: "key" if alone else _side_of(name) for name in arrays}
            sample = layered([a for name, a in arrays.items() if sides[name] == "key"], "keys")
            others = [a for name, a in arrays.items() if sides[name] == "value"]
            values = layered(others, "values") if others else None
            trips = round_trips()
            with _progress(f"coding {keys.name}", len(trips)) as advance:
                for trip in trips.values():
                    trip(sample, values)
                    advance()
        source = keys.name
        result = {"source": source, "schemes": {n: trip.to_dict() for n, trip in trips.items()}}
    errors = trips["naive4"].key_error
    layer = int(errors.argmax())
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
        _show_demo(result)
    files = {path: _drawn(figure, path.suffix[1:]) for path in (image, drawing)}
    files[figures] = (text + "\n").encode()
    atomic.write(files.items(), make_folders=True)
    if not as_json:
        typer.echo(f"\n{image}, demo.svg and demo.json hold the figure and all of it.")


def _drawn(figure: Figure, kind: str) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=130)
    return drawn.getvalue()


# --- conformance --------------------------------------------------------------------------------

TARGETS = "package.module:function, file.py:function, a shared library (nsq.h), an ONNX model"
DEFAULT_SCHEME = "nsep+pchan4"
SchemesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--scheme",
        metavar="NAME",
        show_default=DEFAULT_SCHEME,
        help="A name of `nsq info`, or a variant such as nsep+pchan4-gain; may be repeated.",
    ),
]
ChosenOption = Annotated[
    list[str] | None,
    typer.Option(
        "--scheme", metavar="NAME", help="Only these of the schemes; all of them by default."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the scheme."),
]
AllOption = Annotated[
    bool, typer.Option("--all", help="All schemes that have a name, variants too.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the drawn cases.")]
CaseOption = Annotated[
    str | None, typer.Option("--case", metavar="ID", help="One case only, as encode/exact-tie/3.")
]
AllowOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow",
        metavar="LATITUDE",
        help="norm-ulp=N, tie-ulp=N, gain-folding=N or flush-subnormals; none by default.",
    ),
]
DtypeOption = Annotated[
    list[InputDtype] | None, typer.Option("--dtype", help="Dtypes of the input; all by default.")
]
OperationOption = Annotated[
    list[OperationName] | None, typer.Option("--operation", help="All that there are by default.")
]
PartialOption = Annotated[
    bool, typer.Option("--partial", help="Let pass what the port says it does not implement.")
]
JunitOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", callback=_file_name, help="Write JUnit XML, too."),
]


@app.command()
def check(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(help=f"What encodes: {TARGETS}; or a program, which does all operations."),
    ] = None,
    *,
    decode: Annotated[str | None, typer.Option(metavar="TARGET", help="What decodes.")] = None,
    attend: Annotated[str | None, typer.Option(metavar="TARGET", help="What attends.")] = None,
    stream: Annotated[
        str | None, typer.Option(metavar="TARGET", help="What appends and crops.")
    ] = None,
    custom_ops: Annotated[
        str | None, typer.Option(metavar="FILE", help="Operators that the ONNX models need.")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Judge answers in files, to the questions of `nsq gen --dir`."),
    ] = None,
    schemes: SchemesOption = None,
    changes: SetOption = None,
    every: AllOption = False,
    only: CaseOption = None,
    operations: OperationOption = None,
    allow: AllowOption = None,
    seed: SeedOption = 0,
    dtypes: DtypeOption = None,
    partial: PartialOption = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one answer.")] = 30.0,
    as_json: JsonOption = False,
    junit: JunitOption = None,
) -> None:
    """Check an implementation: which rule is broken, where, and why.

    Exits 0 if it conforms, 1 if not, 2 for bad use.
    """
    from nsq_ref.conformance import ports
    from nsq_ref.conformance.check import run

    _require_report(junit)
    targets = {"decode": decode, "attend": attend, "stream": stream}
    given = [name for name, value in targets.items() if value is not None]
    if directory is not None:
        _require_only(
            context,
            ("directory", "schemes", "only", "allow", "partial", "as_json", "junit"),
            "has no effect with --dir, where questions and answers are there already; leave it out",
        )
        _check_answers(
            lambda: _folder(directory), f"nsq check --dir {shlex.quote(str(directory))}",
            schemes, only, allow, partial, as_json, junit,
        )  # fmt: skip
        return
    if target is None and not given:
        raise ValueError(f"nothing to check was given; name what encodes: {TARGETS}, or a program")
    kind = "" if target is None else ports.target_kind(target)
    asked: list[Operation]
    if kind in ("program", "library"):
        asked = list(OPERATIONS_OF_PORTS)
    else:
        asked = [name for name in OPERATIONS_OF_PORTS if name == "encode" and target]
        asked += [name for name in OPERATIONS_OF_PORTS if name in given]
    required = [name for name in asked if kind not in ("program", "library") or name in given]
    if operations:
        absent = [one.value for one in operations if one.value not in asked]
        if absent:
            raise ValueError(f"--operation {absent[0]}: nothing was given that does it")
        asked = required = [one for one in asked if one in {two.value for two in operations}]
    command = ["nsq", "check", *([target] if target else [])]
    for name, value in (*targets.items(), ("custom-ops", custom_ops)):
        command += [f"--{name}", value] if value else []
    command += _repeated(changes, allow, seed, dtypes, partial)
    asked_schemes = _checked_schemes(schemes, every, changes)
    port = ports.open_port(target, decode, attend, stream, custom_ops, timeout)
    try:
        with _stages() as progress:
            report = run(
                port, asked_schemes, asked, required=required,
                seed=seed, latitudes=allow or (), dtypes=_dtypes(dtypes), partial=partial,
                refusals=kind != "model", only=only, command=shlex.join(command),
                progress=progress,
            )  # fmt: skip
    finally:
        port.close()
    _show_report(report, as_json, junit)


@app.command()
def gen(
    *,
    schemes: SchemesOption = None,
    changes: SetOption = None,
    every: AllOption = False,
    operations: OperationOption = None,
    seed: SeedOption = 0,
    dtypes: DtypeOption = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir", callback=_file_name, help="Write a file for each case, not to the pipe."
        ),
    ] = None,
) -> None:
    """Write the questions that a program answers: nsq gen | ./mine | nsq verify."""
    from nsq_ref.conformance import ports
    from nsq_ref.conformance.cases import cases, require_size

    asked_schemes = _checked_schemes(schemes, every, changes)
    for _, one in asked_schemes:  # before anything is written
        require_size(one)
    asked = [one.value for one in operations] if operations else list(OPERATIONS_OF_PORTS)
    kinds = _dtypes(dtypes)
    header = ports.hello_frame(seed, asked_schemes, asked, kinds)
    questions = (case for _, one in asked_schemes for case in cases(one, asked, seed, kinds))
    if directory is not None:
        ports.write_files(directory, header, questions)
    elif sys.stdout is None or sys.stdout.isatty():  # None where a shell closed it
        raise ValueError("the questions are binary; pipe them into a program, or give --dir")
    else:
        try:
            ports.write_requests(sys.stdout.buffer, header, questions)
        except BrokenPipeError:  # `nsq verify` says what became of the program
            _forget_output()


@app.command()
def verify(
    *,
    schemes: ChosenOption = None,
    only: CaseOption = None,
    allow: AllowOption = None,
    partial: PartialOption = False,
    as_json: JsonOption = False,
    junit: JunitOption = None,
) -> None:
    """Judge the answers to `nsq gen` that a program writes into the pipe."""
    if sys.stdin is None or sys.stdin.isatty():  # None where a shell closed it
        raise ValueError("the answers come through a pipe: nsq gen | ./mine | nsq verify")

    def answers() -> tuple[Hello, Port]:
        from nsq_ref.conformance import ports

        hello = ports.read_hello(sys.stdin.buffer)
        return hello, ports.Stream("the pipe", sys.stdin.buffer)

    _check_answers(answers, "", schemes, only, allow, partial, as_json, junit)


@app.command()
def vectors(
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", callback=_file_name, help="A folder, or a .tar.gz or .zip file."
        ),
    ],
) -> None:
    """Write the test vectors, for those who check without Python."""
    from nsq_ref.conformance.vectors import export

    export(output)
    typer.echo(f"{output}: README.md says how to read them")


def _folder(directory: Path) -> tuple[Hello, Port]:
    from nsq_ref.conformance import ports

    if not directory.is_dir():
        raise ValueError(f"--dir {directory}: there is no such folder")
    header = directory / ports.HEADER_FILE
    if not header.is_file():
        raise ValueError(
            f"--dir {directory}: there is no {header.name}; copy the one that `nsq gen --dir` wrote"
        )
    with header.open("rb") as file:
        hello = ports.read_hello(file)
    return hello, ports.Folder(str(directory), directory)


def _check_answers(
    source: Callable[[], tuple[Hello, Port]],
    command: str,
    schemes: list[str] | None,
    only: str | None,
    allow: list[str] | None,
    partial: bool,
    as_json: bool,
    junit: Path | None,
) -> None:
    """Judge answers that were given already."""
    from nsq_ref.conformance.check import run

    _require_report(junit)
    hello, port = source()
    for name in schemes or ():
        if name not in (known := [one for one, _ in hello.schemes]):
            raise ValueError(f"--scheme {name}: the questions are about {', '.join(known)}")
    if not command:
        command = shlex.join(["nsq", "gen", *_questions(hello)]) + " | YOUR PROGRAM | nsq verify"
    command = " ".join([command, *map(shlex.quote, _repeated(None, allow, 0, None, partial))])
    with _stages() as progress:
        report = run(
            port, hello.schemes, hello.operations, required=(), seed=hello.seed,
            latitudes=allow or (), dtypes=hello.dtypes, partial=partial, chosen=schemes, only=only,
            command=command, progress=progress,
        )  # fmt: skip
    _show_report(report, as_json, junit)


def _require_only(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Refuse options that were given and are not among these, by name."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in names and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"{parameter.opts[0]} {why}")


def _questions(hello: Hello) -> list[str]:
    """Return the options of `nsq gen` that ask the same again."""
    from nsq_ref.conformance.check import DTYPES
    from nsq_ref.conformance.family import FAMILY

    options = ["--seed", str(hello.seed)] if hello.seed else []
    if [name for name, _ in hello.schemes] == list(FAMILY):
        options.append("--all")
    else:
        for name, scheme in hello.schemes:
            usual = FAMILY[name].to_dict() if name in FAMILY else {}
            options += ["--scheme", name]
            for field, value in scheme.to_dict().items():
                options += ["--set", f"{field}={value}"] if usual.get(field) != value else []
    if tuple(hello.operations) != OPERATIONS_OF_PORTS:
        options += [text for one in hello.operations for text in ("--operation", one)]
    if tuple(hello.dtypes) != DTYPES:
        options += [text for one in hello.dtypes for text in ("--dtype", one)]
    return options


def _repeated(
    changes: list[str] | None,
    allow: list[str] | None,
    seed: int,
    dtypes: list[InputDtype] | None,
    partial: bool,
) -> list[str]:
    """Return the options that make another run ask the same."""
    options = [text for change in changes or () for text in ("--set", change)]
    options += [text for name in allow or () for text in ("--allow", name)]
    options += [text for one in dtypes or () for text in ("--dtype", one.value)]
    options += ["--seed", str(seed)] if seed else []
    return [*options, *(["--partial"] if partial else [])]


def _checked_schemes(
    names: list[str] | None, every: bool, changes: list[str] | None
) -> list[tuple[str, Scheme]]:
    from dataclasses import replace

    from nsq_ref.conformance.family import FAMILY, scheme_named

    if every:
        if names:
            raise ValueError("--all takes every named scheme; leave --scheme out")
        if changes:
            raise ValueError("--all checks the named schemes as they are; leave --set out")
        return list(FAMILY.items())
    fields = _changed(changes or [])
    chosen = dict.fromkeys(names or [DEFAULT_SCHEME])
    return [(name, replace(scheme_named(name), **fields)) for name in chosen]


def _dtypes(chosen: list[InputDtype] | None) -> list[FloatName]:
    return [one.value for one in chosen or InputDtype]


def _require_report(junit: Path | None) -> None:
    """Refuse a name that cannot be written, before the questions are asked."""
    if junit is not None:
        from nsq_ref.files import atomic

        atomic.require_writable(junit)


def _show_report(report: Report, as_json: bool, junit: Path | None) -> None:
    from nsq_ref.conformance.report import as_json as to_json
    from nsq_ref.conformance.report import as_junit, as_text, exit_code

    if as_json:
        _print_json(to_json(report))
    else:
        typer.echo(as_text(report, color=_on_terminal()), nl=False)
    if junit is not None:
        from nsq_ref.files import atomic

        atomic.write([(junit, as_junit(report).encode())])
    raise typer.Exit(exit_code(report))


# --- ONNX ---------------------------------------------------------------------------------------

onnx_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(onnx_app, name="onnx", help="Write ONNX models.")


@onnx_app.command()
def codec(
    scheme: Annotated[
        str, typer.Argument(help="A name of `nsq info`, or a variant such as nsep+pchan4-gain.")
    ] = "nsep+pchan4",
    *,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", callback=_file_name, help="A folder."),
    ],
    changes: SetOption = None,
    dtype: Annotated[InputDtype, typer.Option(help="Of the array.")] = InputDtype.float32,
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
    ((_, chosen),) = _checked_schemes([scheme], False, changes)
    try:
        from onnx_export.operators import dequantize_model, quantize_model, save_models
    except ModuleNotFoundError as error:
        raise ValueError(
            f"nsq onnx needs {error.name}; pip install 'nsq-ref[onnx]' brings all it uses"
        ) from error
    from nsq_ref.files import atomic

    encode, decode = output / "encode.onnx", output / "decode.onnx"
    for path in (encode, decode):
        if path.exists() and not force:
            raise ValueError(f"{path} exists; choose another folder, or replace it with --force")
    atomic.require_writable(encode, decode, make_folders=True)
    models = {
        encode: quantize_model(chosen, dtype.value, rank),
        decode: dequantize_model(chosen, dtype.value, rank),
    }
    save_models(models)
    if as_json:
        _print_json(
            {
                "scheme": chosen.to_dict(),
                "dtype": dtype.value,
                "encode": str(encode),
                "decode": str(decode),
            }
        )
    else:
        for path in models:
            typer.echo(path)


# --- schemes ------------------------------------------------------------------------------------


def _schemes(name: str, value_name: str | None, changes: list[str]) -> KeyValueSchemes:
    """Return the schemes of keys and values that the options mean."""
    from dataclasses import replace

    from nsq_ref import KeyValueSchemes, Scheme

    named = Scheme.named(name)
    key, value = (named, named) if isinstance(named, Scheme) else named
    if value_name is not None:
        only = Scheme.named(value_name)
        if not isinstance(only, Scheme):
            raise ValueError(f"--value-scheme {value_name} is a pair; give it to --scheme")
        value = only
    fields = _changed(changes)
    return KeyValueSchemes(replace(key, **fields), replace(value, **fields))


def _changed(changes: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for field, value in map(_change, changes):
        if field in fields:
            raise ValueError(f"--set {field} is given twice; give it once")
        fields[field] = value
    return fields


def _change(text: str) -> tuple[str, Any]:
    """Read ``field=value``; a value is what JSON or Python calls it, else a string."""
    from nsq_ref import Scheme

    field, equals, value = text.partition("=")
    known = list(Scheme().to_dict())
    if not equals or field not in known:
        raise ValueError(f"--set {text!r} is not FIELD=VALUE with a field of {', '.join(known)}")
    words = {"none": None, "null": None, "true": True, "false": False}
    if value.lower() in words:
        return field, words[value.lower()]
    return field, int(value) if re.fullmatch("-?[0-9]{1,18}", value) else value


def _scheme_of(name: str, schemes: KeyValueSchemes) -> Scheme:
    """Return the scheme of an array, by its name where keys and values differ."""
    if schemes.key == schemes.value:
        return schemes.key
    return schemes.key if _side_of(name) == "key" else schemes.value


def _side_of(name: str) -> str:
    """Tell whether an array is named as keys or as values."""
    # The last component that says anything decides: past_key_values.0.key is a key.
    for component in reversed(re.split("[./]", name.lower())):
        sides = {SIDES[word] for word in re.findall("[a-z]+", component) if word in SIDES}
        if len(sides) == 1:
            return sides.pop()
        if sides:
            break
    raise ValueError(
        f"array {name!r} is not named as keys or values, which are treated differently; "
        "rename it to k, key or keys, or v, value or values, or choose one scheme for both"
    )


def _label(scheme: Scheme) -> str:
    """Return the nearest name, and the fields in which the scheme differs from it."""
    from nsq_ref import Scheme, scheme_names

    def changes(name: SchemeName) -> dict[str, Any]:
        values = Scheme.named(name).to_dict()
        return {field: value for field, value in fields.items() if value != values[field]}

    fields = scheme.to_dict()
    # Of names as near as each other, one of the same width.
    nearest = min(scheme_names(), key=lambda name: (len(changes(name)), "bits" in changes(name)))
    return " ".join([nearest, *(f"{field}={value}" for field, value in changes(nearest).items())])


# --- files --------------------------------------------------------------------------------------


def _require_output(source: Path, output: Path) -> None:
    if output.suffix.lower() != ".safetensors":
        raise ValueError(f"--output {output} must end in .safetensors, the format that is written")
    from nsq_ref.files import atomic

    atomic.require_writable(output)
    if source.exists() and output.exists() and os.path.samefile(source, output):
        raise ValueError(f"--output {output} is the input; choose another name, to keep both")


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Say which file and array an error is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


# --- output -------------------------------------------------------------------------------------


def _describe(arrays: Mapping[str, Quantized]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "shape": list(quantized.shape),
            "dtype": quantized.dtype.name,
            "scheme": quantized.scheme.to_dict(),
            "scheme_name": _label(quantized.scheme),
            "bits_per_element": quantized.bits_per_element,
            "bytes": quantized.nbytes,
            "float16_bytes": 2 * math.prod(quantized.shape),
            "collapsed_tokens": quantized.collapsed_tokens,
        }
        for name, quantized in arrays.items()
    ]


def _describe_cache(file: Path) -> list[dict[str, Any]]:
    """Keys and values of a saved `KVCache`; what pads shorter rows is not stored nor counted."""
    from nsq_ref.cache import KVCache

    cache = KVCache.load(file)
    stored = [cache.stored(row) for row in range(cache.batch)]
    rows = []
    for side, scheme, channels in (
        ("keys", cache.key, cache.head_dim),
        ("values", cache.value, cache.value_head_dim),
    ):
        sides = [getattr(row, side) for row in stored]
        size = sum(one.nbytes for one in sides)
        elements = int(cache.lengths.sum()) * cache.kv_heads * channels
        rows.append(
            {
                "name": side,
                "shape": [cache.batch, cache.kv_heads, len(cache), channels],
                "dtype": "-" if cache.dtype is None else cache.dtype.name,
                "scheme": scheme.to_dict(),
                "scheme_name": _label(scheme),
                "bits_per_element": 8 * size / elements if elements else 0.0,
                "bytes": size,
                "float16_bytes": 2 * elements,
                "collapsed_tokens": sum(int(one.collapsed.sum()) for one in sides),
                "lengths": cache.lengths.tolist(),
            }
        )
    return rows


def _show_library(as_json: bool) -> None:
    from nsq_ref import SPEC_VERSION, Scheme, __version__, scheme_names

    tokens, head_dim = 4096, 128
    schemes = [
        (name, Scheme.named(name).bits_per_element(tokens, head_dim)) for name in scheme_names()
    ]
    if as_json:
        _print_json(
            {
                "version": __version__,
                "spec": SPEC_VERSION,
                "tokens": tokens,
                "head_dim": head_dim,
                "schemes": [{"name": n, "bits_per_element": bits} for n, bits in schemes],
            }
        )
        return
    typer.echo(f"nsq {__version__}, specification {SPEC_VERSION}")
    typer.echo(f"bits per element at {tokens} tokens of {head_dim} channels:")
    _print_table(("scheme", "bits"), [(name, f"{bits:.3f}") for name, bits in schemes])
    typer.echo("Pairs for keys and values: KIVI-K2V4 and nsep+KIVI-K2V4, with any two widths.")


def _show_arrays(file: Path, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        _print_json({"file": str(file), "arrays": rows})
        return
    _print_table(
        ("array", "shape", "dtype", "scheme", "bits", "bytes", "of float16", "collapsed tokens"),
        [
            (
                row["name"],
                row["shape"],
                row["dtype"],
                row["scheme_name"] or "-",
                f"{row['bits_per_element']:.3f}",
                f"{row['bytes']:,}",
                f"{row['bytes'] / row['float16_bytes']:.1%}" if row["float16_bytes"] else "-",
                "-" if row["collapsed_tokens"] is None else row["collapsed_tokens"],
            )
            for row in rows
        ],
    )


def _show_demo(result: dict[str, Any]) -> None:
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
    _print_table(tuple(heads), rows)
    if not baseline:
        return
    typer.echo(
        "\nNLL and perplexity: their change against the float32 cache, NLL in nats a token;\n"
        "± is its standard error over passages. K and V error: relative, over all layers."
    )
    for paired in result["paired_with_nsep+pchan4"].values():
        typer.echo(paired["in_words"])
    typer.echo("Paired by passage; told apart is what differs by more than two standard errors.")


def _print_json(result: dict[str, Any]) -> None:
    typer.echo(json.dumps(result, indent=2))


def _print_table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text, as names may look like markup
    # Into a pipe a row stays a line.
    Console(width=None if _on_terminal() else 10_000).print(table)


@contextlib.contextmanager
def _progress(what: str, steps: int) -> Iterator[Callable[[], None]]:
    """Show a bar of so many steps, where somebody looks."""
    with _stages() as show:
        done = itertools.count(1)
        yield lambda: show(what, next(done), steps) if show else None


@contextlib.contextmanager
def _stages() -> Iterator[Callable[[str, int, int], None] | None]:
    """Show a bar whose label and length are told with every step; None where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda what, done, total: progress.update(
            task, description=what, completed=done, total=total
        )


def main() -> None:
    """Run ``nsq``: exit code 0, 1 where what was checked does not hold, 2 for bad use or input.

    Examples
    --------
    >>> import subprocess, sys
    >>> nsq = [sys.executable, "-c", "from nsq_ref.cli import main; main()"]
    >>> subprocess.run([*nsq, "info", "no such file.npz"], capture_output=True).returncode
    2
    """
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:  # which a shell can close
                sys.stdout.flush()  # while an error can still be told
    except BrokenPipeError:  # nobody reads on
        _forget_output()
        sys.exit(1)
    except OSError as error:
        _forget_output()
        name = f"{error.filename}: " if error.filename else ""
        _fail(f"{name}{error.strerror or error}")
    except (MemoryError, TypeError, ValueError) as error:
        _fail(str(error) or type(error).__name__)


def _on_terminal() -> bool:
    """Whether somebody looks at what is printed; there is no output where a shell closed it."""
    return sys.stdout is not None and sys.stdout.isatty()


def _forget_output() -> None:
    """Drop what could not be printed: Python would try it again at its end, and exit with 120."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stdout.flush()
        return
    with contextlib.suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> None:
    from nsq_ref.conformance.report import printable  # what a file says may be anything

    print(f"nsq: {printable(' '.join(message.splitlines()))}", file=sys.stderr)
    raise SystemExit(2)

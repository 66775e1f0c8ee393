"""``nsq check``, ``gen``, ``verify`` and ``vectors``: the conformance kit."""

from __future__ import annotations

import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn, get_args

import typer

from nsq_ref.cli.errors import extra, forget_output
from nsq_ref.cli.options import (
    InputDtype,
    JsonOption,
    SetOption,
    file_name,
    given,
)
from nsq_ref.cli.output import on_terminal, print_json, print_table, stages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nsq_ref import Scheme
    from nsq_ref.conformance.findings import Report
    from nsq_ref.conformance.known import KnownLine
    from nsq_ref.conformance.operations import Port
    from nsq_ref.conformance.ports import Hello

Operation = Literal["encode", "decode", "attend", "stream", "feedback", "stream_feedback"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
USUAL, OPTIONAL = OPERATIONS[:4], OPERATIONS[4:]
DTYPES: tuple[InputDtype, ...] = get_args(InputDtype)
# A list of literals is nothing that Typer knows.
OperationName = Enum("OperationName", {name: name for name in OPERATIONS}, type=str)  # type: ignore[misc]
DtypeName = Enum("DtypeName", {name: name for name in DTYPES}, type=str)  # type: ignore[misc]
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
    list[DtypeName] | None, typer.Option("--dtype", help="Dtypes of the input; all by default.")
]
OperationOption = Annotated[
    list[OperationName] | None,
    typer.Option("--operation", help="All without key feedback by default."),
]
PartialOption = Annotated[
    bool, typer.Option("--partial", help="Let pass what the port says it does not implement.")
]


RequireOption = Annotated[
    str | None,
    typer.Option(
        "--require",
        metavar="LIST",
        help="Exit 1 unless these were asked: operations and dtypes, as encode,decode,float16.",
    ),
]
KnownOption = Annotated[
    Path | None,
    typer.Option("--known", metavar="FILE", help="Cases that fail, and why; each must still fail."),
]


def _report_file(path: Path | None) -> Path | None:
    """Refuse a name that cannot be written, before the questions are asked."""
    if (path := file_name(path)) is not None:
        from nsq_ref.files import atomic

        atomic.require_writable(path)
    return path


JunitOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", callback=_report_file, help="Write JUnit XML, too."),
]


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
    feedback: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET", help="What encodes with key feedback (F1); it may be what encodes."
        ),
    ] = None,
    stream_feedback: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET", help="What appends and crops so; it may be what appends and crops."
        ),
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
    quick: Annotated[
        bool, typer.Option("--quick", help="One case of a kind, for while you write.")
    ] = False,
    coverage: Annotated[
        bool,
        typer.Option("--coverage", help="Print which case shows which mistake; check nothing."),
    ] = False,
    require: RequireOption = None,
    known: KnownOption = None,
    as_json: JsonOption = False,
    junit: JunitOption = None,
) -> None:
    """Check an implementation: which rule is broken, where, and why.

    Exits 0 if all that was asked conforms, 1 if not or if something required was not asked, 2 for
    bad use.
    """
    from nsq_ref.conformance import ports
    from nsq_ref.conformance.check import run

    if coverage:
        about_coverage = ("coverage", "schemes", "changes", "every", "seed", "dtypes", "as_json")
        for name, option in given(context).items():
            if name not in about_coverage:
                raise ValueError(f"{option} has no effect with --coverage; leave it out")
        _show_coverage(_checked_schemes(schemes, every, changes), _dtypes(dtypes), seed, as_json)
    if directory is not None:
        about_answers = (
            "directory", "schemes", "only", "allow", "partial", "require", "known", "as_json",
            "junit",
        )  # fmt: skip
        for name, option in given(context).items():
            if name not in about_answers:
                raise ValueError(
                    f"{option} has no effect with --dir, where questions and answers are there "
                    "already; leave it out"
                )
        command = ["nsq", "check", "--dir", str(directory)]
        answers = _folder(directory)
        _judge(
            *answers, shlex.join(command), schemes, only, allow, partial, require, known, as_json,
            junit,
        )  # fmt: skip
    targets = {
        "decode": decode, "attend": attend, "stream": stream, "feedback": feedback,
        "stream_feedback": stream_feedback,
    }  # fmt: skip
    named = [name for name, value in targets.items() if value is not None]
    if target is None and not named:
        raise ValueError(f"nothing to check was given; name what encodes: {TARGETS}, or a program")
    kind = "" if target is None else ports.target_kind(target)
    does_all = kind in ("program", "library")
    encoders = [one for one in (target, feedback, stream_feedback) if one is not None]
    graphs = custom_ops is None and "model" in map(ports.target_kind, encoders)
    functions = ["encode", *named] if target else named
    asked = [name for name in OPERATIONS if name in functions or (does_all and name in USUAL)]
    required = [name for name in asked if not does_all or name in named]
    if operations:
        chosen = [one.value for one in operations]
        absent = [name for name in chosen if name not in asked]
        if absent:
            raise ValueError(f"--operation {absent[0]}: nothing was given that does it")
        asked = required = [name for name in asked if name in chosen]
    command = ["nsq", "check", *([target] if target else [])]
    for name, value in (*targets.items(), ("custom-ops", custom_ops)):
        command += [f"--{name.replace('_', '-')}", value] if value else []
    command += [*_repeated(changes, allow, seed, dtypes, partial), *(["--quick"] * quick)]
    command += [] if known is None else ["--known", str(known)]
    deviations = _known(known)
    asked_schemes = _checked_schemes(schemes, every, changes)
    port = ports.open_port(
        target, decode, attend, stream, custom_ops, timeout, feedback=feedback,
        stream_feedback=stream_feedback,
    )  # fmt: skip
    try:
        with stages() as told:
            report = run(
                port, asked_schemes, asked, required=required,
                seed=seed, latitudes=allow or (), dtypes=_dtypes(dtypes), partial=partial,
                refusals=not graphs, only=only,
                command=shlex.join(command), progress=told, quick=quick,
                require=_required(require), known=deviations,
            )  # fmt: skip
    finally:
        port.close()
    _show_report(report, as_json, junit)


def gen(
    *,
    schemes: SchemesOption = None,
    changes: SetOption = None,
    every: AllOption = False,
    operations: OperationOption = None,
    feedback: Annotated[
        bool, typer.Option("--feedback", help="Ask for key feedback (F1), too.")
    ] = False,
    stream_feedback: Annotated[
        bool, typer.Option("--stream-feedback", help="Ask for caches of such keys, too.")
    ] = False,
    seed: SeedOption = 0,
    dtypes: DtypeOption = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir", callback=file_name, help="Write a file for each case, not to the pipe."
        ),
    ] = None,
) -> None:
    """Write the questions that a program answers: nsq gen | ./mine | nsq verify."""
    from nsq_ref.conformance import ports
    from nsq_ref.conformance.cases import cases, require_size

    asked_schemes = _checked_schemes(schemes, every, changes)
    for _, one in asked_schemes:  # before anything is written
        require_size(one)
    asked = [one.value for one in operations] if operations else list(USUAL)
    wanted = zip(OPTIONAL, (feedback, stream_feedback), strict=True)
    asked += [name for name, is_wanted in wanted if is_wanted and name not in asked]
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
            forget_output()


def verify(
    *,
    schemes: ChosenOption = None,
    only: CaseOption = None,
    allow: AllowOption = None,
    partial: PartialOption = False,
    require: RequireOption = None,
    known: KnownOption = None,
    as_json: JsonOption = False,
    junit: JunitOption = None,
) -> None:
    """Judge the answers to `nsq gen` that a program writes into the pipe."""
    if sys.stdin is None or sys.stdin.isatty():  # None where a shell closed it
        raise ValueError("the answers come through a pipe: nsq gen | ./mine | nsq verify")
    from nsq_ref.conformance import ports

    hello = ports.read_hello(sys.stdin.buffer)
    command = shlex.join(["nsq", "gen", *_questions(hello)]) + " | YOUR PROGRAM | nsq verify"
    answers = ports.Stream("the pipe", sys.stdin.buffer)
    _judge(
        hello, answers, command, schemes, only, allow, partial, require, known, as_json, junit
    )  # fmt: skip


def vectors(
    *,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", callback=file_name, help="A folder, or a .tar.gz or .zip file."
        ),
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", callback=file_name, help="A new folder of ONNX backend tests."
        ),
    ] = None,
) -> None:
    """Write the test vectors, for those who check without Python.

    With --onnx those of encode and decode become tests of ONNX backends: models, inputs, outputs.
    """
    if output is None and onnx is None:
        raise ValueError("nothing to write was named; give --output, --onnx, or both")
    if onnx is not None:
        with extra("onnx", "nsq vectors --onnx"):
            from onnx_export.operators.backend_tests import save_backend_tests

        number = save_backend_tests(onnx)
        typer.echo(f"{onnx}: {number} data sets; README.md says how to run them")
    if output is not None:
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


def _judge(
    hello: Hello, answers: Port, command: str, schemes: list[str] | None, only: str | None,
    allow: list[str] | None, partial: bool, require: str | None, known: Path | None,
    as_json: bool, junit: Path | None,
) -> NoReturn:  # fmt: skip
    """Judge answers that were given already."""
    from nsq_ref.conformance.check import run

    for name in schemes or ():
        if name not in (about := [one for one, _ in hello.schemes]):
            raise ValueError(f"--scheme {name}: the questions are about {', '.join(about)}")
    options = _repeated(allow=allow, partial=partial)
    options += [] if known is None else ["--known", str(known)]
    with stages() as told:
        report = run(
            answers, hello.schemes, hello.operations, required=(), seed=hello.seed,
            latitudes=allow or (), dtypes=hello.dtypes, partial=partial, chosen=schemes, only=only,
            command=" ".join([command, *map(shlex.quote, options)]), progress=told,
            require=_required(require), known=_known(known),
        )  # fmt: skip
    _show_report(report, as_json, junit)


def _questions(hello: Hello) -> list[str]:
    """Return the options of `nsq gen` that ask the same again."""
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
    first, others = tuple(hello.operations[: len(USUAL)]), hello.operations[len(USUAL) :]
    if first == USUAL:
        options += [f"--{one.replace('_', '-')}" for one in others]
    else:
        options += [text for one in hello.operations for text in ("--operation", one)]
    if tuple(hello.dtypes) != DTYPES:
        options += [text for one in hello.dtypes for text in ("--dtype", one)]
    return options


def _repeated(
    changes: list[str] | None = None,
    allow: list[str] | None = None,
    seed: int = 0,
    dtypes: list[DtypeName] | None = None,
    partial: bool = False,
) -> list[str]:
    """Return the options that make another run ask the same."""
    options = [text for change in changes or () for text in ("--set", change)]
    options += [text for name in allow or () for text in ("--allow", name)]
    options += [text for one in dtypes or () for text in ("--dtype", one.value)]
    options += ["--seed", str(seed)] if seed else []
    return [*options, *(["--partial"] if partial else [])]


def _required(text: str | None) -> list[str]:
    """Read a list of operations and dtypes."""
    return [] if text is None else [name.strip() for name in text.split(",")]


def _known(path: Path | None) -> Sequence[KnownLine]:
    from nsq_ref.conformance.known import read_known

    return () if path is None else read_known(path)


def _checked_schemes(
    names: list[str] | None, every: bool, changes: list[str] | None
) -> list[tuple[str, Scheme]]:
    from dataclasses import replace

    from nsq_ref.conformance.family import FAMILY, scheme_named
    from nsq_ref.policy import changed_fields

    if every:
        if names:
            raise ValueError("--all takes every named scheme; leave --scheme out")
        if changes:
            raise ValueError("--all checks the named schemes as they are; leave --set out")
        return list(FAMILY.items())
    fields = changed_fields(changes or ())
    chosen = dict.fromkeys(names or [DEFAULT_SCHEME])
    return [(name, replace(scheme_named(name), **fields)) for name in chosen]


def _dtypes(chosen: list[DtypeName] | None) -> list[InputDtype]:
    return [one.value for one in chosen or DtypeName]


def _show_coverage(
    schemes: list[tuple[str, Scheme]], dtypes: list[InputDtype], seed: int, as_json: bool
) -> NoReturn:
    """Print which case shows which mistake, and why none can where none does."""
    from nsq_ref.conformance.coverage import coverage
    from nsq_ref.conformance.report import coverage as shown

    with stages() as told:
        found = {name: coverage(one, dtypes, told, seed=seed) for name, one in schemes}
    if as_json:
        print_json(shown.coverage_as_json(found))
    for name, cells in () if as_json else found.items():
        print_table(shown.HEADS, list(shown.coverage_rows(cells)))
        typer.echo("\nWhy nothing can show a mistake:")
        print_table(("", ""), shown.coverage_reasons(cells))
        typer.echo(f"\n{shown.coverage_summary(name, cells)}")
    holes = sum(cell.is_hole for cells in found.values() for cell in cells)
    raise typer.Exit(int(holes > 0))


def _show_report(report: Report, as_json: bool, junit: Path | None) -> NoReturn:
    """Print the report, write it, and exit as it says."""
    from nsq_ref.conformance.report import as_json as to_json
    from nsq_ref.conformance.report import as_junit, as_text

    if as_json:
        print_json(to_json(report))
    else:
        typer.echo(as_text(report, color=on_terminal()), nl=False)
    if junit is not None:
        from nsq_ref.files import atomic

        atomic.write([(junit, as_junit(report).encode())])
    raise typer.Exit(int(not report.conforms))

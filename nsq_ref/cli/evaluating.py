"""``nsq eval``: what every scheme costs a model, by a protocol."""

from __future__ import annotations

import contextlib
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nsq_ref.cli.decoding import INTERRUPTED
from nsq_ref.cli.errors import about, extra
from nsq_ref.cli.options import JsonOption, file_name, given
from nsq_ref.cli.output import print_json, print_table, stages

if TYPE_CHECKING:
    from nsq_ref import Feedback
    from onnx_export.evaluation import Evaluation, Method, Protocol
    from onnx_export.models.built import Progress

# Options of some protocols alone, by their parameters.
OWN_OPTIONS = {
    "prefill": ("prefill", "decode", "free"),
    "continuation": ("prefill", "lengths", "decode"),
    "context": ("windows",),
    "stride": ("windows",),
    "lengths": ("lengths",),
    "new_tokens": ("free",),
    "block": ("decode", "free"),
}
ALL = "all"


def evaluate(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="GGUF or ONNX files, or folders of models; patterns such as 'models/*.gguf' too.",
        ),
    ],
    *,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            help="A name of docs/rivals.md or of a scheme, KEY/VALUE for two, or all; again for "
            "more. Those of the demo by default."
        ),
    ] = None,
    key: Annotated[str | None, typer.Option(help="One more: keys by this, ...")] = None,
    value: Annotated[str | None, typer.Option(help="... and values by this.")] = None,
    policy: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help='One more: JSON, layer by layer: {"default": "naive4", "layers": {"0": null}}.',
        ),
    ] = None,
    feedback: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Each scheme of NSQ-1 once more, its keys coded with what `nsq onnx calibrate` "
            "wrote of this model; best-3 and its like have no other form.",
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="The same, with feedback from text that is kept apart from what is reported of; "
            "best-3 and its like are calibrated so by themselves.",
        ),
    ] = False,
    protocol: Annotated[
        Literal["prefill", "windows", "lengths", "decode", "free"],
        typer.Option(help="What is read, and what is scored of it: docs/evaluation.md."),
    ] = "prefill",
    prefill: Annotated[int, typer.Option(min=0, help="Tokens before what is scored.")] = 512,
    continuation: Annotated[int, typer.Option(min=1, help="Tokens that are scored.")] = 128,
    window: Annotated[int, typer.Option("--context", min=2, help="Tokens of a window.")] = 1024,
    stride: Annotated[int, typer.Option(min=2, help="By how many a window moves on.")] = 512,
    lengths: Annotated[
        str | None, typer.Option(help="Of contexts: 256,1024; up to the model's by default.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="That the model writes.")] = 128,
    block: Annotated[
        int, typer.Option(min=1, help="Tokens of a block, for schemes without; read at once.")
    ] = 128,
    passages: Annotated[int, typer.Option(min=1, help="Passages, or windows.")] = 10,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text to read; what is kept for reports by default."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="tokenizer.json or a GGUF file; by default what is beside the model."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where figures are kept as they are finished; the user's cache folder by default.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", callback=file_name, help="JSON to write."),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=file_name, help="Markdown to write."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Of dask, instead of processes here.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of each process; its share of the cores by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what schemes cost a model: KL to its float32 logits, likelihood, same tokens.

    Figures are kept as they are finished: a run that was ended goes on where it was. Exit code 1
    where a scheme cannot store this model's keys and values.
    """
    for name, option in given(context).items():
        name = {"window": "context"}.get(name, name)  # noqa: PLW2901
        if name in OWN_OPTIONS and protocol not in OWN_OPTIONS[name]:
            raise ValueError(f"{option} is of {', '.join(OWN_OPTIONS[name])}, not of {protocol}")
    if prefill == 0 and protocol != "decode":
        raise ValueError("--prefill 0 is of decode; give at least 1")
    if scheduler is not None and "workers" in given(context):
        raise ValueError("--workers are processes of this machine; leave it out with --scheduler")
    if feedback is not None and calibrate:
        raise ValueError("--feedback has what --calibrate makes; give one of them")
    with extra("eval", "nsq eval"):
        import scipy.stats  # noqa: F401 - before the work, not behind it

        from onnx_export.evaluation import protocols
        from onnx_export.models.sources import default_cache_dir
    if scheduler is not None:
        with extra("scheduler", "--scheduler"):
            import distributed  # noqa: F401
    from nsq_ref.files import atomic, load_feedback

    files = {path for path in (output, markdown) if path is not None}
    atomic.require_writable(*files, make_folders=True)
    own = {name: value for name, value in given(context).items() if name in OWN_OPTIONS}
    prefill = prefill if protocol != "free" or "prefill" in own else 128
    known: dict[str, Protocol] = {
        "prefill": protocols.Prefill(prefill or 1, continuation),
        "lengths": protocols.Lengths(_numbers(lengths), continuation),
        "decode": protocols.Decode(prefill, continuation, block),
        "free": protocols.Free(prefill or 1, new_tokens, block),
    }
    chosen = known[protocol] if protocol in known else protocols.Windows(window, stride)
    methods = _methods(scheme or [], key, value, policy or [])
    if (feedback is not None or calibrate) and not any(one.takes_feedback for one in methods):
        raise ValueError("feedback is of schemes of NSQ-1; name one, such as --scheme streaming3")
    given_feedback = None if feedback is None else load_feedback(feedback)
    found: list[Evaluation] = []
    failed: list[str] = []
    paths = _found(models)
    with _goes_on(), stages() as told:
        for path in paths:
            try:
                found.append(
                    _evaluated(
                        path,
                        chosen,
                        methods,
                        passages=passages,
                        feedback=given_feedback,
                        calibrate=calibrate,
                        text=text or [],
                        tokenizer=tokenizer,
                        threads=threads,
                        store=store or default_cache_dir() / "evaluations",
                        workers=workers,
                        scheduler=scheduler,
                        progress=told,
                    )
                )
            except (TypeError, ValueError) as error:  # which is of this model alone
                if len(paths) == 1:
                    raise
                failed.append(f"{path}: {error}")
    result = {"evaluations": [one.to_dict() for one in found]}
    # First, as a disk that is full takes only the files.
    if as_json:
        print_json(result)
    else:
        _show(found)
    content: dict[Path, bytes] = {}
    if output is not None:
        content[output] = (json.dumps(result, indent=2) + "\n").encode()
    if markdown is not None:
        content[markdown] = "\n".join(one.to_markdown() for one in found).encode()
    atomic.write(content.items(), make_folders=True)
    if failed:
        raise ValueError(f"{len(failed)} of {len(paths)} models failed. {'. '.join(failed)}")
    if any(one.refused for one in found):
        raise typer.Exit(1)


@contextlib.contextmanager
def _goes_on() -> Iterator[None]:
    """Say what becomes of a run that is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("nsq: interrupted; the same command goes on with what is finished", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _methods(
    names: list[str], key: str | None, value: str | None, policies: list[Path]
) -> tuple[Method, ...]:
    """Return what is measured, and refuse what is not known before any work."""
    from nsq_ref.comparison import DEMO_SCHEMES
    from nsq_ref.policy import Policy
    from nsq_ref.rivals import entries
    from onnx_export.evaluation import Method
    from onnx_export.evaluation.methods import methods_of

    if (key is None) != (value is None):
        raise ValueError("--key and --value belong together; float32 leaves a side as it is")
    if not names and key is None and not policies:
        names = list(DEMO_SCHEMES)
    names = [one for name in names for one in (entries() if name == ALL else [name])]
    methods = [Method.of(name) for name in names]
    if key is not None and value is not None:
        methods.append(Method.of({"key": key, "value": value}))
    for path in policies:
        with about(str(path)):
            methods.append(Method.of(Policy.read(path), path.stem))
    return methods_of(methods)


def _evaluated(
    path: Path,
    protocol: Protocol,
    methods: tuple[Method, ...],
    *,
    passages: int,
    feedback: dict[str, Feedback] | None,
    calibrate: bool,
    text: list[Path],
    tokenizer: Path | None,
    threads: int | None,
    **options: Any,
) -> Evaluation:
    from onnx_export.evaluation import Opened, Windows, evaluate, open_model
    from onnx_export.evaluation.models import model_file
    from onnx_export.evaluation.passages import choosing, reporting
    from onnx_export.models.json_tokenizer import tokenizer_of

    words = tokenizer_of(model_file(path), tokenizer)
    wanting = [one.name for one in methods if one.wants_feedback]
    if calibrate or (wanting and feedback is None):
        for name in wanting:
            typer.echo(f"{name} is made for feedback of the keys: calibrating {path}", err=True)
        made = _calibrated(path, tokenizer, options["progress"])
        methods = _also_with(methods, made, all_of_them=calibrate)
    elif feedback is not None:
        methods = _also_with(methods, feedback)
    with extra("transformers", f"{path}, a model of transformers,"):
        model = open_model(path, threads=threads, progress=options["progress"])
    length = protocol.tokens_needed(model.context_length)
    stride = protocol.stride if isinstance(protocol, Windows) else None
    tokens = reporting(words, length, passages, stride=stride, files=text)
    apart = options["workers"] > 1 or options["scheduler"] is not None
    calibrates = any(one.needs_calibration for one in methods)
    source = Opened(str(path.absolute()), threads) if apart else model
    del model  # of which each process opens its own
    return evaluate(
        source,
        tokens,
        methods,
        protocol=protocol,
        calibration=choosing(words) if calibrates else None,
        **options,
    )


def _calibrated(path: Path, tokenizer: Path | None, told: Progress | None) -> dict[str, Feedback]:
    with extra("rewrite", "nsq eval with calibration"):
        from onnx_export.evaluation.moments import query_moments

    return query_moments(path, tokenizer=tokenizer, progress=told).feedback()


def _also_with(
    methods: tuple[Method, ...], feedback: dict[str, Feedback], *, all_of_them: bool = True
) -> tuple[Method, ...]:
    """Return methods: what is made for feedback with it, and all others that take it both ways."""
    from onnx_export.evaluation.methods import methods_of

    found = []
    for one in methods:
        if not one.wants_feedback:
            found.append(one)
        if one.wants_feedback or (all_of_them and one.takes_feedback):
            found.append(one.with_feedback(feedback))
    return methods_of(found)


def _found(patterns: list[str]) -> list[Path]:
    """Return the models that patterns name, each once."""
    paths: list[Path] = []
    for pattern in patterns:
        here = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not here:
            raise FileNotFoundError(f"there is no model {pattern!r}")
        paths += [Path(one) for one in here if Path(one) not in paths]
    return paths


def _numbers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"--lengths {text!r} is no list of numbers such as 256,1024") from None


def _show(found: list[Evaluation]) -> None:
    from onnx_export.evaluation.markdown import rows, sentence

    for one in found:
        for table in one.to_dict()["tables"]:
            heads, body, summary = rows(table)
            after = f" after {table['label']} tokens" if table["label"] else ""
            typer.echo(f"{one.model['name']}, {one.protocol['name']}{after}: {summary}\n")
            print_table(heads, body)
            typer.echo("")
            for paired in table["paired"]:
                typer.echo(sentence(paired))
        for name, why in one.refused.items():
            typer.echo(f"{name} was refused: {why}")
    typer.echo(
        "KL: of the softmax to that of the float32 cache, nats a token; quantiles are of tokens.\n"
        "NLL: its change. ±: standard error over passages. Bits: with all that is stored, what is\n"
        "kept unquantized in float16; without tail: of what is quantized alone."
    )

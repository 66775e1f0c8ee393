"""The command ``nsq``: its verbs, and how it ends.

A verb reads its options, calls the library and shows the result. Each imports what it needs when it
is called, so that ``nsq --help`` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from nsq_ref.cli import arrays, audit, conformance, demo, evaluating, onnx
from nsq_ref.cli.errors import exit_codes

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
VERBS: tuple[Callable[..., None], ...] = (
    *(arrays.info, arrays.quantize, arrays.dequantize),
    audit.audit,
    demo.demo,
    *(conformance.check, conformance.gen, conformance.verify, conformance.vectors),
)
for verb in VERBS:
    app.command()(verb)
app.command("eval")(evaluating.evaluate)
app.add_typer(onnx.app, name="onnx", help="Write ONNX models.")


def _show_version(wanted: bool) -> None:
    if wanted:
        from nsq_ref import __version__

        typer.echo(f"nsq {__version__}")
        raise typer.Exit


@app.callback()
def version_option(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Norm-separated quantization of LLM key/value caches (spec NSQ-1)."""


def main() -> None:
    """Run ``nsq``: exit code 0, 1 where what was checked does not hold, 2 for bad use or input.

    Examples
    --------
    >>> import subprocess, sys
    >>> nsq = [sys.executable, "-c", "from nsq_ref.cli import main; main()"]
    >>> subprocess.run([*nsq, "info", "no such file.npz"], capture_output=True).returncode
    2
    """
    with exit_codes():
        try:
            app()
        finally:
            if sys.stdout is not None:  # which a shell can close
                sys.stdout.flush()  # while an error can still be told

"""Options that several verbs have, and what `--scheme` and `--set` mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from nsq_ref import KeyValueSchemes, Scheme

InputDtype = Literal["float32", "float16", "bfloat16"]


def file_name(path: Path | None) -> Path | None:
    """Refuse the sign for a pipe, of which a file of that name would be made."""
    if path == Path("-"):
        raise ValueError("- is no file name; what is written whole or not at all goes to no pipe")
    return path


JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the scheme."),
]
FeedbackOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Code keys with what `nsq onnx calibrate` wrote of this model: fewer errors where "
        "queries look, for the same bytes.",
    ),
]


def given(context: typer.Context) -> dict[str, str]:
    """Return the options that were given, and not left out: what users call them, by name."""
    return {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if parameter.name is not None
        and (source := context.get_parameter_source(parameter.name)) is not None
        and source.name == "COMMANDLINE"
    }


def key_value_schemes(
    name: str, value_name: str | None, changes: list[str], feedback: Path | None = None
) -> KeyValueSchemes:
    """Return the schemes of keys and values that the options mean."""
    from dataclasses import replace

    from nsq_ref import KeyValueSchemes, Scheme
    from nsq_ref.policy import changed_fields
    from nsq_ref.profiles import require_feedback

    named = Scheme.named(name)
    require_feedback(name, feedback)
    key, value = (named, named) if isinstance(named, Scheme) else named
    if value_name is not None:
        only = Scheme.named(value_name)
        if not isinstance(only, Scheme):
            raise ValueError(f"--value-scheme {value_name} is a pair; give it to --scheme")
        value = only
    fields = changed_fields(changes or ())
    return KeyValueSchemes(replace(key, **fields), replace(value, **fields))


def scheme_of(name: str, schemes: KeyValueSchemes) -> Scheme:
    """Return the scheme of an array, by its name where keys and values differ."""
    if schemes.key == schemes.value:
        return schemes.key
    return schemes.key if side_of(name) == "key" else schemes.value


def side_of(name: str) -> str:
    """Tell whether an array is named as keys or as values."""
    from nsq_ref.audit.layers import side_in_name

    side = side_in_name(name)
    if side in ("key", "value"):
        return str(side)
    raise ValueError(
        f"array {name!r} is not named as keys or values, which are treated differently; "
        "rename it to k, key or keys, or v, value or values, or choose one scheme for both"
    )

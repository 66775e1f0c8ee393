"""Chat templates: how a model wants a conversation written down, in Jinja.

A template comes with a model, from anybody: it runs in Jinja's sandbox, as in Hugging Face
transformers, with the same functions and filters, and can change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from nsq_ref.extras import extra

with extra("onnx", __name__):
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["CONFIG", "ChatTemplate", "read_chat_template"]

CONFIG = "tokenizer_config.json"
OWN_FILE = "chat_template.jinja"
# What a template that is not made for its arguments, or not for any, may raise besides.
FAULTS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip


class ChatTemplate:
    """A chat template; it keeps nothing of a call, so that threads may share one.

    Parameters
    ----------
    source : str
        The template.
    tokens : mapping of str to str
        What it has by name, such as ``bos_token`` and ``eos_token``.
    origin : str
        Where it is from, for errors.

    Raises
    ------
    ValueError
        If it is no template.

    Examples
    --------
    >>> template = ChatTemplate(
    ...     "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    ...     "{% if add_generation_prompt %}<assistant>{% endif %}", {"eos_token": "<end>"})
    >>> template.render([{"role": "user", "content": "Hello"}])
    '<user>Hello<end><assistant>'
    """

    def __init__(
        self, source: str, tokens: Mapping[str, str], origin: str = "the chat template"
    ) -> None:
        self._tokens, self._origin = dict(tokens), origin
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except FAULTS as error:
            raise self._fault(error) from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the text of a conversation, up to where the model's answer begins.

        Parameters
        ----------
        messages : sequence of mapping
            Each with ``role``, which is ``system``, ``user`` or ``assistant``, and ``content``.

        Raises
        ------
        ValueError
            If the template refuses these messages, or fails.

        Examples
        --------
        >>> ChatTemplate("{{ raise_exception('no system, please') }}", {}).render([])
        Traceback (most recent call last):
        ValueError: the chat template refuses: no system, please
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages], tools=None, documents=None,
                add_generation_prompt=True, **self._tokens,
            )  # fmt: skip
        except FAULTS as error:
            raise self._fault(error) from error

    def _fault(self, error: BaseException) -> ValueError:
        said = " ".join(str(error).split()) or type(error).__name__
        does = "refuses" if isinstance(error, _RefusedError) else "fails"
        return ValueError(f"{self._origin} {does}: {said}")


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the template of a folder of Hugging Face's or genai's files, or None if it has none.

    Raises
    ------
    ValueError
        If the files are not what they should be.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> read_chat_template(folder) is None
    True
    >>> _ = (folder / CONFIG).write_text('{"chat_template": "{{ bos_token }}", "bos_token": ">"}')
    >>> read_chat_template(folder).render([])
    '>'
    """
    path = folder / CONFIG
    config: Any = {}
    if path.is_file():
        try:
            config = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no JSON object")
    source = config.get("chat_template")
    if (own := folder / OWN_FILE).is_file():
        path, source = own, own.read_bytes().decode(errors="replace")
    if isinstance(source, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
    if not isinstance(source, str) or not source:
        return None
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return ChatTemplate(source, tokens, f"the chat template of {path}")


class _RefusedError(jinja2.TemplateError):
    """What a template says that takes no such conversation."""


def _refuse(message: object) -> NoReturn:
    raise _RefusedError(str(message))


def _now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers writes it: Jinja's own escapes what HTML would take."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Generation(Extension):
    """``{% generation %}``, which marks what a model said and changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

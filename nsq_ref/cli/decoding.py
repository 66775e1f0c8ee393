"""``nsq onnx build``, ``run`` and ``chat``: decoders of GGUF files, and any that says its cache."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nsq_ref.cli.errors import about, extra
from nsq_ref.cli.options import FeedbackOption, SetOption, file_name, given, key_value_schemes
from nsq_ref.cli.output import stages

if TYPE_CHECKING:
    from nsq_ref import Feedback, KeyValueSchemes
    from onnx_export.models.attention_forms import AttentionForm
    from onnx_export.models.gguf import GGUFFile
    from onnx_export.models.json_tokenizer import JsonTokenizer
    from onnx_export.models.llama import Progress, Weights
    from onnx_export.models.tokenizer import Tokenizer
    from onnx_export.running import Memory, Session

INTERRUPTED = 130  # what shells say of a process that ended so

# Options of one form of attention alone, by their parameters.
OWN_OPTIONS = {
    "scheme": "nsq", "value_scheme": "nsq", "changes": "nsq", "opset": "nsq",
    "feedback": "nsq", "calibrate": "gqa-int4",
}  # fmt: skip


def build(
    context: typer.Context,
    gguf: Annotated[
        Path, typer.Argument(help="A model of the Llama, Qwen2, Qwen3 or Gemma 3 family.")
    ],
    output: Annotated[Path, typer.Argument(metavar="DIR", callback=file_name, help="A folder.")],
    *,
    attention: Annotated[
        Literal["plain", "gqa", "gqa-int4", "nsq"],
        typer.Option(
            help="Standard operators, GroupQueryAttention, that with its own int4 cache of static "
            "scales, or a quantized cache."
        ),
    ] = "nsq",
    scheme: Annotated[
        str, typer.Option(help="Of the cache: a name of `nsq info` with a block size, or a pair.")
    ] = "streaming4",
    value_scheme: Annotated[
        str | None, typer.Option(help="Of the values, if another than of the keys.")
    ] = None,
    changes: SetOption = None,
    feedback: FeedbackOption = None,
    opset: Annotated[
        int,
        typer.Option(metavar="N", help="24 is fast without the library, too (ONNX Runtime 1.26)."),
    ] = 21,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text that the scales of gqa-int4 are taken from; English prose by default.",
        ),
    ] = None,
    weights: Annotated[
        Literal["float32", "stored"],
        typer.Option(help="All float32, or quantized matrices in 4 and 8 bits."),
    ] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is there.")] = False,
) -> None:
    """Write the ONNX decoder of a GGUF file, with its tokenizer, as `nsq onnx run` takes it."""
    schemes = key_value_schemes(scheme, value_scheme, changes or [], feedback)
    for name, option in given(context).items():
        if (own := OWN_OPTIONS.get(name, attention)) != attention:
            raise ValueError(f"{option} is of --attention {own}; leave it out with {attention}")
    from nsq_ref.files import atomic, load_feedback
    from nsq_ref.profiles import require_feedback

    with extra("onnx", "nsq onnx"):
        from onnx_export.models.built import build_onnx
        from onnx_export.models.config import read_config
        from onnx_export.models.gguf import GGUFFile
        from onnx_export.models.json_tokenizer import tokenizer_files
        from onnx_export.models.tokenizer import Tokenizer
    model = output / "model.onnx"
    if model.exists() and not force:
        raise ValueError(f"{model} exists; choose another folder, or replace it with --force")
    atomic.require_writable(model, make_folders=True)
    fed_back = {} if feedback is None else load_feedback(feedback)
    file = GGUFFile(gguf)
    config = read_config(file)
    # First, as it is read in a moment, and weights are not.
    tokenizer = Tokenizer(gguf)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{gguf}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{config.vocab_size}; convert the model again"
        )
    files = tokenizer_files(tokenizer)
    for layer in range(config.layers):
        with about(f"layer {layer}"):
            require_feedback(scheme, fed_back.get(str(layer)))
    with stages() as told:
        if attention == "gqa-int4":
            form = _calibrated(file, tokenizer, calibrate, output, weights, told)
        else:
            form = _form(attention, schemes, opset, fed_back)
        build_onnx(file, output, told, attention=form, weights=weights, beside=files)
    typer.echo(model)


def _form(
    attention: str, schemes: KeyValueSchemes, opset: int, feedback: dict[str, Feedback]
) -> AttentionForm:
    from onnx_export.models import attention_forms as forms

    if attention == "nsq":
        return forms.QuantizedAttention(*schemes, opset, feedback)
    return forms.GroupedAttention() if attention == "gqa" else forms.PlainAttention()


def _calibrated(
    file: GGUFFile,
    tokenizer: Tokenizer,
    text: Path | None,
    output: Path,
    weights: Weights,
    told: Progress | None,
) -> AttentionForm:
    """Return the form with static scales, the model built for them beside where it will be."""
    from onnx_export.models.calibration import calibrated
    from onnx_export.models.texts import ADDRESSES, read_address, read_text

    folder = output.absolute()
    while not folder.is_dir():
        folder = folder.parent
    if text is None:
        ids = tokenizer.encode(read_address(ADDRESSES[0]))
        return calibrated(file, ids, folder, weights=weights, progress=told)
    ids = tokenizer.encode(read_text(text))
    with about(str(text)):
        return calibrated(file, ids, folder, weights=weights, progress=told)


ModelArgument = Annotated[
    Path, typer.Argument(help="A decoder that says what its cache is, or the folder of model.onnx.")
]
TokensOption = Annotated[int, typer.Option(min=1, help="New tokens, at most.")]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopKOption = Annotated[int | None, typer.Option(help="From so many tokens.")]
TopPOption = Annotated[float | None, typer.Option(help="From tokens of this share.")]
SeedOption = Annotated[int | None, typer.Option(help="The same gives the same text.")]
ThreadsOption = Annotated[int | None, typer.Option(help="All cores by default.")]
CapacityOption = Annotated[
    int | None, typer.Option(help="Tokens of the cache; the model's context by default.")
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(help="tokenizer.json or a GGUF file; by default what is beside the model."),
]
LibraryOption = Annotated[
    bool, typer.Option(help="Take the native library, not the functions in the model.")
]
SystemOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What a chat model is told before all else.")
]


def run(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="What to say or to continue; - reads it on stdin.")],
    *,
    tokens: TokensOption = 128,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Answer a message, or continue a text, control tokens included; by default "
            "what the model is made for: it has a chat template or none.",
        ),
    ] = None,
    system: SystemOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    threads: ThreadsOption = None,
    capacity: CapacityOption = None,
    tokenizer: TokenizerOption = None,
    library: LibraryOption = True,
) -> None:
    """Answer a message or continue a text, and say how fast that was and how large the cache is.

    The text goes to stdout as it comes, the figures to stderr.
    """
    with extra("onnx", "nsq onnx"):
        from onnx_export.running import Sampling
    sampling = Sampling(temperature, top_k, top_p, seed)
    model, words = _found(model, tokenizer)
    if prompt == "-":
        prompt = _all_of_stdin()
    if chat is None:
        chat = system is not None or words.chat_template is not None
    if system is not None and not chat:
        raise ValueError("--system is of a chat; leave it out with --no-chat")
    if not prompt:
        raise ValueError("the prompt is empty; give some text")
    if chat:
        before = [] if system is None else [{"role": "system", "content": system}]
        ids = words.encode_chat([*before, {"role": "user", "content": prompt}])
    else:
        ids = words.encode(prompt)
    if not len(ids):
        raise ValueError("the prompt has no tokens; give some text")
    session = _opened(model, capacity, threads, library)
    meter = _Meter(session, len(ids), tokens, words.stop_tokens)
    made = session.stream(ids, tokens, stop_tokens=words.stop_tokens, sampling=sampling)
    if not chat:
        _say(words.decode(ids.tolist()))
    finished = _show(meter.timed(made), words.decode)
    typer.echo(meter.figures(session.memory()), err=True)
    if not finished:
        raise typer.Exit(INTERRUPTED)


def chat(
    model: ModelArgument,
    *,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 512,
    system: SystemOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    threads: ThreadsOption = None,
    capacity: CapacityOption = None,
    tokenizer: TokenizerOption = None,
    library: LibraryOption = True,
) -> None:
    """Talk with a chat model: a line on stdin is a message, and its end ends the conversation.

    Of each turn only what is new is read. Answers go to stdout, the rest to stderr.
    """
    with extra("onnx", "nsq onnx"):
        from onnx_export.running import Sampling
        from onnx_export.running.conversation import Conversation
    sampling = Sampling(temperature, top_k, top_p, seed)
    model, words = _found(model, tokenizer)
    session = _opened(model, capacity, threads, library)
    talk = Conversation(session, words.encode_chat, words.decode, system)
    if words.chat_template is None:
        words.encode_chat([])  # which says where it would be
    for message in _messages():
        before = talk.read
        made = talk.answer(message, tokens, stop_tokens=words.stop_tokens, sampling=sampling)
        meter = _Meter(talk.session, 0, tokens, words.stop_tokens)
        _show(meter.timed(made), words.decode)
        made.close()  # so that the conversation knows what was said
        meter.read = max(0, talk.read - before - max(0, meter.made - 1))
        typer.echo(meter.figures(talk.session.memory()), err=True)
        if meter.full:
            break


class _Meter:
    """When tokens came, and why no more did."""

    def __init__(self, session: Session, read: int, most: int, stops: tuple[int, ...]) -> None:
        self.session, self.read, self.most, self.stops = session, read, most, stops
        self.moments = [time.perf_counter()]
        self.last: int | None = None

    @property
    def made(self) -> int:
        return len(self.moments) - 1

    @property
    def full(self) -> bool:
        """Whether the text ended as there is no room for more."""
        return self.session.lengths[0] >= self.session.limit

    def timed(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self.moments.append(time.perf_counter())
            self.last = token
            yield token

    def figures(self, memory: Memory) -> str:
        parts = []
        if self.made:
            parts.append(f"{self.read} tokens read in {self.moments[1] - self.moments[0]:.2f} s")
        if self.made > 1:
            speed = (self.made - 1) / (self.moments[-1] - self.moments[1])
            parts.append(f"{speed:.1f} tokens a second")
        said = ", ".join(parts) or "nothing read"
        if self.full and self.last not in self.stops and self.made < self.most:
            said += f"; ended, as there is room for {self.session.limit} tokens and no more"
        return f"{said}; cache {memory}"


def _found(model: Path, tokenizer: Path | None) -> tuple[Path, JsonTokenizer]:
    """Return a model's file, and its tokenizer."""
    from onnx_export.models.json_tokenizer import tokenizer_of

    if model.is_dir():
        model = model / "model.onnx"
    if not model.is_file():
        raise FileNotFoundError(f"there is no ONNX model {str(model)!r}")
    return model, tokenizer_of(model, tokenizer)


def _opened(model: Path, capacity: int | None, threads: int | None, library: bool) -> Session:
    """Return a session with room for a context, which the model or a file beside it tells."""
    from onnx_export.models.json_tokenizer import context_length
    from onnx_export.running import Model, Session

    loaded = Model(model, threads=threads, library=library)
    if capacity is None and loaded.layout.context_length is None:
        capacity = context_length(model.parent)
        if capacity is None:
            raise ValueError(
                f"neither {model} nor a config.json beside it says how long its context is; give "
                "--capacity"
            )
    return Session(loaded, capacity=capacity)


def _show(tokens: Iterator[int], decode: Callable[[list[int]], str]) -> bool:
    """Print a text as it comes, and end its line; say whether nobody interrupted it."""
    from onnx_export.running.text import pieces

    finished = True
    try:
        for piece in pieces(tokens, decode):
            _say(piece)
    except KeyboardInterrupt:
        finished = False
    _say("\n")
    return finished


def _say(text: str) -> None:
    """Print some text at once."""
    typer.echo(text, nl=False)
    if sys.stdout is not None:  # which a shell can close
        sys.stdout.flush()


def _all_of_stdin() -> str:
    with about("stdin"):
        if sys.stdin is None:
            raise ValueError("it is closed; give the prompt as an argument")
        return sys.stdin.buffer.read().decode().removesuffix("\n")


def _messages() -> Iterator[str]:
    """Yield lines of stdin that are not empty, until its end or an interruption."""
    while sys.stdin is not None:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False, err=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin: {error}") from error
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")

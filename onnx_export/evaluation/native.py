"""Decoding on a real model: what each cache in ONNX Runtime holds, costs and takes.

The same decoder, once for each kind of cache, reads the same passages. Of every passage it reads
the prefill, then the continuation in pieces of `PIECE` tokens, and is scored as
`onnx_export.evaluation.fidelity` says, but that the cache is streamed: whatever is read, the
continuation too, is stored as the cache stores it. Of the last passage it then goes on from the
first tokens with the most likely ones, a step of each cache in turn, which are timed. So are steps
at the end of the longest context, whose tokens are not read but pretended: speed and memory do not
depend on what they are.

Matrices stay in the bits of the GGUF file where ONNX Runtime can multiply with them, so that four
decoders are built and loaded in the time that one takes with float32 weights: values are the same.

The static scales of GroupQueryAttention's int4 cache come from the prefills of these very passages:
the largest value of a channel is 7 steps.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsq_ref import Scheme
from nsq_ref.extras import extra
from nsq_ref.scheme import SchemeName
from onnx_export import custom_ops
from onnx_export.evaluation.fidelity import TransformFidelity, mean_nll, require_lengths
from onnx_export.evaluation.resident import resident_cache
from onnx_export.models.attention_forms import AttentionForm, GroupedAttention, QuantizedAttention
from onnx_export.models.built import Progress, cached_onnx, read_config
from onnx_export.models.calibration import largest_by_channel, scales_of
from onnx_export.models.gguf import GGUFFile
from onnx_export.models.llama import Weights
from onnx_export.models.sources import smollm2_gguf
from onnx_export.models.stored import keeps_any
from onnx_export.models.texts import REPORTING_START
from onnx_export.models.texts import passages as text_passages
from onnx_export.models.tokenizer import Tokenizer
from onnx_export.running import Memory, Model, Session
from onnx_export.running.memory import memory_of

with extra("onnx", __name__):
    import onnxruntime

__all__ = ["NativeCache", "NativeResult", "run_native", "why_not"]

FLOAT, INT4 = "GQA float32", "GQA int4"
SCHEMES: tuple[SchemeName, ...] = ("streaming4", "streaming3")
CONTEXT = 256  # tokens after which text is generated
LONG = 8192
PIECE = 32  # tokens of a continuation that are read at once
INT4_SINCE = (1, 27)  # the first ONNX Runtime whose operator has an int4 cache

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class NativeCache:
    """What was measured of one cache; it never changes, so that threads may share one.

    Attributes
    ----------
    fidelity : TransformFidelity
        Likelihoods with it, and with the float32 cache.
    used_bytes, float16_bytes : mapping of int to int
        What it takes by arithmetic, and what float16 takes, by the tokens in it: those of the
        prefill, and as many as the model can read, to 8192.
    resident_bytes : mapping of int to int
        What it takes of the machine, measured, for the most of these tokens; empty where the system
        does not tell. `onnx_export.evaluation.resident` says how.
    text : str
        What the model goes on with.
    tokens_per_second : mapping of int to float
        Median over the steps, by the tokens that were in the cache.
    """

    fidelity: TransformFidelity
    used_bytes: Mapping[int, int]
    float16_bytes: Mapping[int, int]
    resident_bytes: Mapping[int, int]
    text: str
    tokens_per_second: Mapping[int, float]

    def to_dict(self) -> dict[str, Any]:
        """Return all as plain Python values, ready for JSON."""
        return {
            "bytes": _by_name(self.used_bytes),
            "float16_bytes": _by_name(self.float16_bytes),
            "resident_bytes": _by_name(self.resident_bytes),
            "tokens_per_second": _by_name(self.tokens_per_second),
            "nll": list(self.fidelity.nll),
            "nll_change": self.fidelity.nll_change,
            "nll_change_error": self.fidelity.nll_change_error,
            "text": self.text,
        }


@dataclass(frozen=True)
class NativeResult:
    """What `run_native` measured; it never changes, so that threads may share one.

    Attributes
    ----------
    caches : dict of str to NativeCache
        By name, the float32 cache first.
    left_out : dict of str to str
        Caches that this machine's ONNX Runtime does not have, and why.
    passages, prefill_length, continuation_length : int
    prompt : str
        The end of what the texts go on from.
    """

    caches: dict[str, NativeCache]
    left_out: dict[str, str]
    passages: int
    prefill_length: int
    continuation_length: int
    prompt: str

    def to_dict(self) -> dict[str, Any]:
        """Return all as plain Python values, ready for JSON."""
        return {
            "passages": self.passages,
            "prefill": self.prefill_length,
            "continuation": self.continuation_length,
            "prompt": self.prompt,
            "caches": {name: cache.to_dict() for name, cache in self.caches.items()},
            "left_out": self.left_out,
        }


def why_not(gguf_path: str | os.PathLike[str] | None = None) -> str | None:
    """Return why `run_native` cannot measure a model here, in one line; None where it can.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> why_not(tiny_gguf(tempfile.mkdtemp()))  # doctest: +ELLIPSIS
    'head_dim=8 is not a multiple of 16, ...'
    """
    if gguf_path is not None:
        config = read_config(GGUFFile(gguf_path))
        try:
            GroupedAttention().layout(config)
        except ValueError as error:
            return str(error)
    try:
        custom_ops.library_path()
    except FileNotFoundError as error:
        return str(error)
    return None


def run_native(
    *,
    gguf_path: str | os.PathLike[str] | None = None,
    passages: int = 2,
    prefill_length: int = 512,
    continuation_length: int = 128,
    new_tokens: int = 24,
    threads: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> NativeResult:
    """Decode with every kind of cache in ONNX Runtime, side by side.

    The module's documentation says what is measured. All models are loaded at the same time.

    Parameters
    ----------
    gguf_path : str or os.PathLike, optional
        A model of the Llama family whose ``head_dim`` is a multiple of 16; SmolLM2-135M-Instruct,
        fetched at the first call, when not given.
    passages : int
        Passages that are scored, at least 2.
    prefill_length, continuation_length : int
        Tokens of each that are read first, and that are scored.
    new_tokens : int
        Tokens of the text, at least 2.
    threads : int, optional
        All cores when not given.
    cache_dir : str or os.PathLike, optional
        Where models are kept; the user's folder when not given.
    progress : callable, optional
        Called as ``progress(what, done, total)``.

    Returns
    -------
    NativeResult

    Raises
    ------
    ValueError
        If an argument is out of range, or the model is not supported.
    FileNotFoundError
        If there is no native library.

    Examples
    --------
    >>> run_native(passages=1)
    Traceback (most recent call last):
    ValueError: passages must be at least 2, for a standard error, got 1
    """
    require_lengths(prefill_length, continuation_length)
    for name, value in (("passages", passages), ("new_tokens", new_tokens)):
        if value < 2:
            why = "for a standard error" if name == "passages" else "as steps are timed"
            raise ValueError(f"{name} must be at least 2, {why}, got {value}")
    custom_ops.library_path()  # before anything is read, fetched or built
    if gguf_path is None:
        gguf_path = smollm2_gguf(cache_dir)
    file = GGUFFile(gguf_path)
    config = read_config(file)
    context = min(CONTEXT, prefill_length)
    stop = prefill_length + continuation_length
    config.require_context(max(stop, context + 1 + new_tokens), "what is read")
    most = min(config.context_length, LONG)
    capacity = max(stop, context + 1 + new_tokens)
    tokenizer = Tokenizer(gguf_path)
    tokens = text_passages(tokenizer, stop + 1, passages, start=REPORTING_START)
    config.require_ids(tokens, "passages")

    weights: Weights = "stored" if keeps_any(file) else "float32"
    count = 2 + len(SCHEMES)
    sessions: dict[str, Session] = {}
    nll: dict[str, tuple[float, ...]] = {}
    largest: list[NDArray[np.float32]] = []  # of each prefill

    def measure(name: str, form: AttentionForm) -> None:
        path = cached_onnx(
            gguf_path, cache_dir=cache_dir, attention=form, weights=weights, progress=progress
        )
        session = Session(Model(path, threads=threads), capacity=capacity)
        scored = []
        for number, row in enumerate(tokens):
            if progress is not None:
                done = len(sessions) * passages + number
                progress(f"{name}, passage {number + 1} of {passages}", done, count * passages)
            session.crop(0)
            session.forward(row[:prefill_length], num_logits=0)
            if name == FLOAT:
                largest.append(largest_by_channel(session))
            scored.append(_continuation_nll(session, row[prefill_length:]))
        sessions[name], nll[name] = session, tuple(scored)

    left_out = {}
    measure(FLOAT, GroupedAttention())
    if _version() >= INT4_SINCE:
        measure(INT4, GroupedAttention(scales_of(np.max(largest, axis=0))))
    else:
        left_out[INT4] = (
            f"needs ONNX Runtime {INT4_SINCE[0]}.{INT4_SINCE[1]}, this is {onnxruntime.__version__}"
        )
    for scheme_name in SCHEMES:
        scheme = Scheme.named(scheme_name)
        measure(f"nsq {scheme_name}", QuantizedAttention(scheme, scheme))

    for session in sessions.values():
        session.crop(context)
    texts, speeds = _side_by_side(sessions, int(tokens[-1, context]), new_tokens, progress)
    filled = {name: Session(one.model, capacity=most) for name, one in sessions.items()}
    for session in filled.values():
        session.pretend(most - new_tokens)
    at_most = _side_by_side(filled, int(tokens[-1, context]), new_tokens, progress)[1]
    counts = (prefill_length, most)
    # Its layout tells how many elements a token has; packed, two are a byte.
    float16 = {tokens: _memory(sessions[FLOAT], tokens).float16 for tokens in counts}
    resident = {name: resident_cache(session) for name, session in filled.items()}
    caches = {
        name: NativeCache(
            TransformFidelity(nll[name], nll[FLOAT]),
            {tokens: _memory(session, tokens).used for tokens in counts},
            float16,
            {} if (grown := resident[name]) is None else {most: grown},
            _decoded(tokenizer, texts[name]),
            {context: speeds[name], most: at_most[name]},
        )
        for name, session in sessions.items()
    }
    prompt = tokenizer.decode(tokens[-1, max(0, context - PIECE) : context + 1])
    return NativeResult(caches, left_out, passages, prefill_length, continuation_length, prompt)


def _by_name(values: Mapping[int, float]) -> dict[str, float]:
    return {str(tokens): value for tokens, value in values.items()}


def _memory(session: Session, tokens: int) -> Memory:
    """Return what the cache of a session takes with so many tokens in it."""
    shapes = {name: tensor.shape for name, tensor in session.tensors().items()}
    return memory_of(session.model.layout, shapes, (), [tokens])


def _continuation_nll(session: Session, row: Ids) -> float:
    """Read all of a row but its last token, in pieces, and score what follows each."""
    logits = [
        session.forward(row[start : min(start + PIECE, len(row) - 1)], num_logits=None)[0]
        for start in range(0, len(row) - 1, PIECE)
    ]
    return mean_nll(np.concatenate(logits), row[1:])


def _side_by_side(
    sessions: Mapping[str, Session], first: int, new_tokens: int, progress: Progress | None
) -> tuple[dict[str, list[int]], dict[str, float]]:
    """Let each session go on from a token, a step in turn; return tokens, and tokens a second."""
    streams = {name: session.stream([first], new_tokens) for name, session in sessions.items()}
    texts: dict[str, list[int]] = {name: [] for name in sessions}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for step in range(new_tokens):
        if progress is not None:
            progress("decoding, a step in turn", step, new_tokens)
        for name, stream in streams.items():
            start = time.perf_counter()
            texts[name].append(next(stream))
            seconds[name].append(time.perf_counter() - start)
    # The first step is slower: buffers of one token are new.
    return texts, {name: float(1 / np.median(taken[1:])) for name, taken in seconds.items()}


def _decoded(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Return the text up to the token that ends it."""
    end = tokenizer.eos_token_id
    return tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens)


def _version() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", onnxruntime.__version__)[:2])

"""Needle in a haystack: whether a model still finds what it read, when its cache is lossy.

A haystack is real text with needles in it: sentences that give names a number each. The model reads
it once, which fills the cache; a transform replaces all of it. Then each needle is asked for, from
that cache and on its own, by the beginning of its answer. It is *found* if every token of the
number is the most likely one. One pass tells, as it is then what greedy decoding writes.

Which form of asking a model can answer at all, tells its float32 cache: choose the form by that, on
texts that nothing is reported of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nsq_ref.arrays import as_integer
from onnx_export.evaluation.fidelity import Transform, mean_nll
from onnx_export.models.built import Progress
from onnx_export.models.decoder import Decoder, KeyValueCache

__all__ = [
    "FORMS",
    "NAMES",
    "Answer",
    "Form",
    "Haystack",
    "Question",
    "haystack",
    "measure_needles",
]

Ids = NDArray[np.int64]

NAMES = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Cairo", "Tokyo", "Delhi", "Moscow",
    "Athens", "Dublin", "Oslo", "Lima", "Havana", "Boston",
)  # fmt: skip


class Form(NamedTuple):
    """How a needle is written, and how it is asked for; both name ``{name}``, one ``{number}``.

    Nothing changes one, so that threads may share it.
    """

    needle: str
    question: str


FORMS: Mapping[str, Form] = {
    "again": Form(" The magic number of {name} is {number}.", " The magic number of {name} is"),
    "question": Form(
        " The magic number of {name} is {number}.",
        "\n\nQuestion: What is the magic number of {name}?\nAnswer: The magic number of {name} is",
    ),
    "chat": Form(
        " The magic number of {name} is {number}.",
        "<|im_end|>\n<|im_start|>user\nWhat is the magic number of {name}?<|im_end|>\n"
        "<|im_start|>assistant\nThe magic number of {name} is",
    ),
}
"""Ways to ask. ``again`` repeats the words of the needle, which a head that copies can go on."""


class Question(NamedTuple):
    """What is asked after a haystack, and what should follow; threads may share one to read it.

    Attributes
    ----------
    tokens, answer : numpy.ndarray
        int64 ``[tokens]``.
    depth : float
        Where the needle is: 0 is the beginning of the haystack, 1 its end.
    """

    tokens: Ids
    answer: Ids
    depth: float


@dataclass(frozen=True)
class Haystack:
    """A text with needles, and the questions; it never changes, so that threads may share one."""

    tokens: Ids
    questions: tuple[Question, ...]


class Answer(NamedTuple):
    """What became of a question; nothing changes it, so that threads may share it.

    Attributes
    ----------
    found : bool
        Every token of the answer is the most likely one after those before it.
    nll : float
        Mean negative log-likelihood of the answer's tokens, in nats.
    """

    found: bool
    nll: float


def haystack(
    encode: Callable[[str], Ids],
    text: str,
    length: int,
    depths: Sequence[float],
    *,
    form: Form = FORMS["again"],
    seed: int = 0,
) -> Haystack:
    """Put needles between the sentences of a text.

    Parameters
    ----------
    encode : callable
        ``encode(text)`` returns token ids.
    text : str
        At least as long as needed.
    length : int
        Tokens of the haystack with its needles; its last sentence is cut.
    depths : sequence of float
        A needle for each, from 0 to 1, in ascending order.
    form : Form
    seed : int
        Of names and numbers; the same seed puts the same needles into any text.

    Returns
    -------
    Haystack

    Raises
    ------
    ValueError
        If the text is too short, or depths are none, too many, not from 0 to 1 or in another order.

    Examples
    --------
    >>> def encode(text):
    ...     return np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    >>> made = haystack(encode, "One. Two. Three. Four. " * 9, 90, [0.5])
    >>> bytes(made.tokens.tolist()).decode()
    'One. Two. Three. Four. One. The magic number of Berlin is 5988. Two. Three. Four. One. Two'
    >>> bytes(made.questions[0].tokens.tolist()).decode()
    ' The magic number of Berlin is'
    """
    length = as_integer("length", length, least=1)
    if not 1 <= len(depths) <= len(NAMES):
        raise ValueError(f"depths must be 1 to {len(NAMES)} numbers, got {len(depths)}")
    if sorted(depths) != list(depths) or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must ascend from 0 to 1, got {list(depths)}")
    rng = np.random.default_rng(seed)
    names = rng.permutation(len(NAMES))[: len(depths)]
    numbers = rng.integers(1000, 10000, len(depths))
    needles, questions = [], []
    for name, number, depth in zip(names, numbers, depths, strict=True):
        words = {"name": NAMES[name], "number": number}
        needles.append(encode(form.needle.format(**words)))
        asked = form.question.format(**words)
        answer = encode(f"{asked} {number}")[len(encode(asked)) :]
        questions.append(Question(encode(asked), answer, float(depth)))

    # Each goes before the first sentence that begins at its depth or after it.
    hay = length - sum(len(needle) for needle in needles)
    pieces: list[Ids] = []
    count, waiting = 0, list(zip(depths, needles, strict=True))
    for sentence in re.split(r"(?<=[.!?]) ", text):
        while waiting and count >= waiting[0][0] * hay:
            pieces.append(waiting.pop(0)[1])
        if count >= hay:
            break
        tokens = encode(sentence if count == 0 else f" {sentence}")[: hay - count]
        count += len(tokens)
        pieces.append(tokens)
    pieces += [needle for _, needle in waiting if count >= hay]
    if count < hay or hay <= 0:
        raise ValueError(
            f"text has {count} tokens, and length={length} with {len(needles)} needles needs "
            f"{hay}; give a longer text or another length"
        )
    return Haystack(np.concatenate(pieces), tuple(questions))


def measure_needles(
    decoder: Decoder,
    haystacks: Sequence[Haystack],
    transforms: Mapping[str, Transform],
    *,
    progress: Progress | None = None,
) -> dict[str, list[list[Answer]]]:
    """Ask for every needle of every haystack, with each transform of the cache.

    Parameters
    ----------
    decoder : Decoder
    haystacks : sequence of Haystack
    transforms : mapping of str to callable
        By name, ``transform(keys, values)`` as of `onnx_export.evaluation.fidelity`.
    progress : callable, optional
        Called as ``progress(what, done, total)`` after every transform.

    Returns
    -------
    dict of str to list of list of Answer
        By ``"float32"``, the untouched cache, and each transform: of each haystack its questions'.

    Raises
    ------
    ValueError
        If a haystack is longer than the model's context.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> from onnx_export.models.tokenizer import Tokenizer
    >>> folder = tempfile.mkdtemp()
    >>> gguf = tiny_gguf(folder)
    >>> made = haystack(Tokenizer(gguf).encode, "One. Two. Three. " * 9, 99, [0.0, 0.5])
    >>> answers = measure_needles(Decoder.from_gguf(gguf, cache_dir=folder), [made], {})
    >>> [answer.found for answer in answers["float32"][0]]  # random weights find nothing
    [False, False]
    """
    for number, one in enumerate(haystacks):
        longest = max(len(asked.tokens) + len(asked.answer) for asked in one.questions)
        decoder.config.require_context(len(one.tokens) + longest, f"haystack {number}")
    every: dict[str, Transform] = {"float32": lambda keys, values: (keys, values), **transforms}
    answers: dict[str, list[list[Answer]]] = {name: [] for name in every}
    done, total = 0, len(haystacks) * len(every)
    for number, one in enumerate(haystacks):
        _, keys, values = decoder.forward(one.tokens[None], num_logits=0)
        keys.flags.writeable = values.flags.writeable = False
        for name, transform in every.items():
            cache = transform(keys, values)
            answers[name].append([_asked(decoder, cache, asked) for asked in one.questions])
            done += 1
            if progress is not None:
                progress(f"haystack {number + 1} of {len(haystacks)}, {name}", done, total)
    return answers


def _asked(decoder: Decoder, cache: KeyValueCache, asked: Question) -> Answer:
    read: ArrayLike = np.concatenate([asked.tokens, asked.answer[:-1]])[None]
    logits, _, _ = decoder.forward(read, cache, num_logits=len(asked.answer))
    best = logits[0].argmax(axis=-1)
    return Answer(bool((best == asked.answer).all()), mean_nll(logits[0], asked.answer))

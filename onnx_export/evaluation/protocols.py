"""Protocols: what a model reads with the float32 cache and with another one, and what is scored.

`Prefill` quantizes a cache that was filled in float32, all of it at once, and scores what follows.
`Windows` and `Lengths` are the same over windows of a long text, and with contexts of several
lengths before the same tokens. In `Decode` there is no float32 in the past: every key and value is
made under the quantized cache, sealed block by block. `Free` lets the model write on by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nsq_ref.arrays import as_integer
from onnx_export.evaluation.methods import Bound, KeyValueCache, Size
from onnx_export.evaluation.models import CausalModel, Reader
from onnx_export.evaluation.scoring import Reference, Scores
from onnx_export.evaluation.streaming import StreamedCache

__all__ = [
    "PROTOCOLS", "Decode", "Free", "Lengths", "Prefill", "Protocol", "Unit", "Windows",
    "continued", "prefilled", "protocol_named",
]  # fmt: skip

Ids = NDArray[np.int64]
Record = dict[str, Any]

PIECE = 1024  # tokens that are read at once in float32: attention takes memory by their square
NEW_TOKENS = 128


class Unit(NamedTuple):
    """A piece of text that is measured by itself: the tokens that are read, and what is scored.

    ``tokens`` are those of the context, the scored ones, and one more that is only predicted.
    """

    passage: int
    label: str
    tokens: Ids
    context: int


@dataclass(frozen=True)
class Protocol(ABC):
    """What is read, and what is scored of it.

    Nothing changes one, so that threads may share it.
    """

    name: ClassVar[str]

    @abstractmethod
    def tokens_needed(self, context_length: int | None) -> int:
        """Return how many tokens a passage must have at least."""

    @abstractmethod
    def units(self, passage: int, tokens: Ids, context_length: int | None) -> list[Unit]:
        """Return what of a passage is measured."""

    @abstractmethod
    def reference(self, model: CausalModel, unit: Unit) -> tuple[Any, Record]:
        """Run the model with the float32 cache: what the rest needs of it, and figures."""

    @abstractmethod
    def measured(self, model: CausalModel, unit: Unit, reference: Any, method: Bound) -> Record:
        """Run the model with the cache of a method: figures."""

    def to_dict(self) -> dict[str, Any]:
        """Return name and parameters, ready for JSON.

        Examples
        --------
        >>> Prefill().to_dict()
        {'name': 'prefill', 'prefill_length': 512, 'continuation_length': 128}
        """
        return {"name": self.name, **asdict(self)}

    def checked(self, passages: Sequence[Ids], context_length: int | None) -> list[Unit]:
        """Return what of all passages is measured.

        Raises
        ------
        ValueError
            If a passage is too short, or the model's context.
        """
        needed = self.tokens_needed(context_length)
        if context_length is not None and needed - 1 > context_length:
            raise ValueError(
                f"{self.name} needs a context of {needed - 1} tokens, more than the model's "
                f"{context_length}; use shorter lengths"
            )
        for number, tokens in enumerate(passages):
            if len(tokens) < needed:
                raise ValueError(
                    f"passage {number} has {len(tokens)} tokens, and {self.name} needs {needed}; "
                    "give longer texts, or use shorter lengths"
                )
        every = [self.units(n, tokens, context_length) for n, tokens in enumerate(passages)]
        return [unit for units in every for unit in units]


class _Continuation(Protocol):
    """A float32 cache is replaced at once, and the tokens after it are scored."""

    def reference(self, model: CausalModel, unit: Unit) -> tuple[Any, Record]:
        """Read the context in float32, and score what follows."""
        cache = prefilled(model, unit.tokens[: unit.context])
        new = unit.tokens[unit.context : -1]
        reference = Reference(continued(model, new, cache), unit.tokens[unit.context + 1 :])
        return (cache, reference), {"nll": _numbers(reference.nll)}

    def measured(self, model: CausalModel, unit: Unit, reference: Any, method: Bound) -> Record:
        """Replace the cache, and score what follows."""
        cache, logits = reference
        replaced, size = method.replaced(*cache)
        new = unit.tokens[unit.context : -1]
        return _scored(logits, continued(model, new, replaced)) | {"size": list(size)}


@dataclass(frozen=True)
class Prefill(_Continuation):
    """A prefilled cache is quantized at once; the tokens after it are scored: the paper's protocol.

    Nothing changes one, so that threads may share it.

    `onnx_export.evaluation.fidelity` says exactly what is scored.

    Parameters
    ----------
    prefill_length, continuation_length : int
        Tokens whose cache is quantized, and tokens that are scored.
    """

    name: ClassVar[str] = "prefill"
    prefill_length: int = 512
    continuation_length: int = 128

    def __post_init__(self) -> None:
        _require_lengths(self, "prefill_length", "continuation_length")

    def tokens_needed(self, context_length: int | None) -> int:
        """Return the tokens of both, and one more."""
        return self.prefill_length + self.continuation_length + 1

    def units(self, passage: int, tokens: Ids, context_length: int | None) -> list[Unit]:
        """Return the first tokens of the passage."""
        used = tokens[: self.tokens_needed(context_length)]
        return [Unit(passage, "", used, self.prefill_length)]


@dataclass(frozen=True)
class Windows(_Continuation):
    """Windows that slide over a long text; of each the last ``stride`` tokens are scored.

    Nothing changes one, so that threads may share it.

    What is before them in the window is prefilled and quantized. The first token behind it is
    predicted from float32 alone, and left out: ``stride - 1`` tokens are scored.

    Parameters
    ----------
    context, stride : int
        Tokens of a window, and by how many it moves on.
    """

    name: ClassVar[str] = "windows"
    context: int = 1024
    stride: int = 512

    def __post_init__(self) -> None:
        _require_lengths(self, "context", "stride", least=2)
        if self.stride >= self.context:
            raise ValueError(f"stride={self.stride} must be less than context={self.context}")

    def tokens_needed(self, context_length: int | None) -> int:
        """Return the tokens of a window."""
        return self.context

    def units(self, passage: int, tokens: Ids, context_length: int | None) -> list[Unit]:
        """Return all windows of the passage."""
        starts = range(0, len(tokens) - self.context + 1, self.stride)
        before = self.context - self.stride
        return [Unit(passage, "", tokens[at : at + self.context], before) for at in starts]


@dataclass(frozen=True)
class Lengths(_Continuation):
    """The same tokens are scored after contexts of several lengths, all prefilled and quantized.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    lengths : tuple of int, optional
        By default from 256 on, each twice the one before, up to what the model's context leaves.
    continuation_length : int
    """

    name: ClassVar[str] = "lengths"
    lengths: tuple[int, ...] = ()
    continuation_length: int = 128

    def __post_init__(self) -> None:
        _require_lengths(self, "continuation_length")
        object.__setattr__(
            self, "lengths", tuple(as_integer("lengths", one, least=1) for one in self.lengths)
        )

    def chosen(self, context_length: int | None) -> tuple[int, ...]:
        """Return the lengths of contexts.

        Examples
        --------
        >>> Lengths().chosen(2048)
        (256, 512, 1024, 1920)
        """
        if self.lengths:
            return self.lengths
        if context_length is None:
            raise ValueError("the model does not say how long its context is; give lengths")
        most = context_length - self.continuation_length
        doubled = [256 << n for n in range(most.bit_length()) if 256 << n < most]
        return (*doubled, most) if most >= 1 else (1,)

    def tokens_needed(self, context_length: int | None) -> int:
        """Return the tokens of the longest context, the scored ones, and one more."""
        return max(self.chosen(context_length)) + self.continuation_length + 1

    def units(self, passage: int, tokens: Ids, context_length: int | None) -> list[Unit]:
        """Return contexts that end at the same token."""
        lengths = self.chosen(context_length)
        stop = self.tokens_needed(context_length)
        return [
            Unit(passage, str(length), tokens[max(lengths) - length : stop], length)
            for length in lengths
        ]


@dataclass(frozen=True)
class Decode(Protocol):
    """Teacher-forced from an empty cache: every key and value is made under the quantized cache.

    Nothing changes one, so that threads may share it.

    Tokens are read in pieces that end where a block is full, which is sealed then: a query reads
    blocks before its own from their codes, and its own block, the tail, unquantized. Token by token
    that is the same, but for the last token of a block, which `nsq_ref.KVCache` seals before it is
    attended to. Bits an element are the mean over the scored tokens: a tail grows and goes.

    Parameters
    ----------
    prefill_length, continuation_length : int
        The last ``continuation_length`` tokens are scored; with ``prefill_length=0`` all are.
    block : int
        Tokens of a block for methods that have none, and the most that are read at once.
    """

    name: ClassVar[str] = "decode"
    prefill_length: int = 512
    continuation_length: int = 128
    block: int = 128

    def __post_init__(self) -> None:
        _require_lengths(self, "prefill_length", least=0)
        _require_lengths(self, "continuation_length", "block")

    def tokens_needed(self, context_length: int | None) -> int:
        """Return all tokens, and one more."""
        return self.prefill_length + self.continuation_length + 1

    def units(self, passage: int, tokens: Ids, context_length: int | None) -> list[Unit]:
        """Return the first tokens of the passage."""
        used = tokens[: self.tokens_needed(context_length)]
        return [Unit(passage, "", used, self.prefill_length)]

    def reference(self, model: CausalModel, unit: Unit) -> tuple[Any, Record]:
        """Read all in float32."""
        cache: KeyValueCache | None = None
        if unit.context:
            cache = prefilled(model, unit.tokens[: unit.context])
        logits = np.empty((0, 0), np.float32)
        for start in range(unit.context, len(unit.tokens) - 1, PIECE):
            new = unit.tokens[start : min(start + PIECE, len(unit.tokens) - 1)]
            one, *rest = model.forward(new[None], cache)
            cache = rest[0], rest[1]
            if not logits.size:  # once, as a long text has gigabytes of them
                rows = len(unit.tokens) - 1 - unit.context
                logits = np.empty((rows, one.shape[2]), np.float32)
            logits[start - unit.context :][: len(new)] = one[0]
        shapes = tuple(array.shape for array in cache) if cache else ()
        reference = Reference(logits, unit.tokens[unit.context + 1 :])
        return (shapes, reference), {"nll": _numbers(reference.nll)}

    def measured(self, model: CausalModel, unit: Unit, reference: Any, method: Bound) -> Record:
        """Read all under the quantized cache, and score the last tokens."""
        shapes, scored = reference
        cache = StreamedCache(method, shapes, self.block)
        parts: list[Scores] = []
        sizes, start = Size(0, 0, 0), 0
        for logits, size in _read(model, cache, unit.tokens[:-1], len(scored.logits)):
            parts.append(scored.scores(logits, start))
            sizes, start = sizes.plus(size), start + len(logits)
        figures = {
            name: _numbers(np.concatenate([getattr(one, name) for one in parts]))
            for name in Scores._fields
        }
        return figures | {"size": list(sizes)}


@dataclass(frozen=True)
class Free(Protocol):
    """The model writes on by itself, greedily, beside the text that it writes in float32.

    Nothing changes one, so that threads may share it.

    The prompt is read as `Decode` reads, and each new token after it, one by one.

    Parameters
    ----------
    prefill_length, new_tokens : int
        Tokens of the prompt, and of what is written.
    block : int
        As in `Decode`.
    """

    name: ClassVar[str] = "free"
    prefill_length: int = 128
    new_tokens: int = NEW_TOKENS
    block: int = 128

    def __post_init__(self) -> None:
        _require_lengths(self, "prefill_length", "new_tokens", "block")

    def tokens_needed(self, context_length: int | None) -> int:
        """Return the tokens of the prompt, if the context has room for the rest."""
        room = self.prefill_length + self.new_tokens
        if context_length is not None and room > context_length:
            raise ValueError(
                f"a prompt of {self.prefill_length} tokens and {self.new_tokens} new ones are more "
                f"than the model's context of {context_length}; use fewer"
            )
        return self.prefill_length

    def units(self, passage: int, tokens: Ids, context_length: int | None) -> list[Unit]:
        """Return the prompt."""
        return [Unit(passage, "", tokens[: self.prefill_length], self.prefill_length)]

    def reference(self, model: CausalModel, unit: Unit) -> tuple[Any, Record]:
        """Write in float32."""
        logits, keys, values = model.forward(unit.tokens[None], num_logits=1)
        shapes = tuple(
            (*array.shape[:3], len(unit.tokens) + self.new_tokens, array.shape[4])
            for array in (keys, values)
        )
        written = [int(logits[0, -1].argmax())]
        while len(written) < self.new_tokens:
            logits, keys, values = model.forward(
                np.array([written[-1:]]), (keys, values), num_logits=1
            )
            written.append(int(logits[0, -1].argmax()))
        return (shapes, written), {"tokens": written, "diversity": _diversity(written)}

    def measured(self, model: CausalModel, unit: Unit, reference: Any, method: Bound) -> Record:
        """Write under the quantized cache."""
        shapes, other = reference
        cache = StreamedCache(method, shapes, self.block)
        new = unit.tokens
        written: list[int] = []
        sizes = Size(0, 0, 0)
        while len(written) < self.new_tokens:
            ((logits, size),) = _read(model, cache, new, 1)
            written.append(int(logits[-1].argmax()))
            new, sizes = np.array(written[-1:]), sizes.plus(size)
        same = np.equal(written, other)
        return {
            "tokens": written,
            "first_divergence": len(same) if same.all() else int(np.argmin(same)),
            "agreement": float(same.mean()),
            "diversity": _diversity(written),
            "size": list(sizes),
        }


PROTOCOLS: dict[str, type[Protocol]] = {
    one.name: one for one in (Prefill, Windows, Lengths, Decode, Free)
}


def protocol_named(protocol: Protocol | str) -> Protocol:
    """Return a protocol, by its name with its usual parameters.

    Raises
    ------
    ValueError
        For an unknown name.

    Examples
    --------
    >>> protocol_named("windows")
    Windows(context=1024, stride=512)
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]()


def prefilled(model: Reader, tokens: Ids) -> KeyValueCache:
    """Return keys and values of tokens, in float32; long texts are read in pieces."""
    cache: KeyValueCache | None = None
    for start in range(0, len(tokens), PIECE):
        _, keys, values = model.forward(tokens[None, start : start + PIECE], cache, num_logits=0)
        cache = keys, values
    if cache is None:
        raise ValueError("there are no tokens to prefill")
    for array in cache:
        array.flags.writeable = False
    return cache


def continued(model: Reader, tokens: Ids, cache: KeyValueCache) -> NDArray[np.float32]:
    """Return the logits ``[tokens, vocab_size]`` of tokens, read in one pass after a cache."""
    logits: NDArray[np.float32] = model.forward(tokens[None], cache)[0][0]
    return logits


def _read(
    model: CausalModel, cache: StreamedCache, tokens: Ids, wanted: int
) -> Iterator[tuple[NDArray[np.float32], Size]]:
    """Read tokens under a growing cache.

    Yields the logits of the last ones as they come, and what the cache took, summed over their
    steps.
    """
    start = 0
    while start < len(tokens):
        piece = tokens[start : start + cache.piece(len(tokens) - start)]
        behind = len(tokens) - start - len(piece)
        scored = max(0, min(len(piece), wanted - behind))
        logits, keys, values = model.forward(piece[None], cache.past, num_logits=scored)
        if scored:
            yield logits[0], cache.sizes(range(len(piece) - scored, len(piece)))
        new = np.s_[..., -len(piece) :, :]
        cache.append(keys[new], values[new])
        start += len(piece)


def _scored(reference: Reference, logits: NDArray[np.float32]) -> Record:
    if len(logits) != len(reference.logits):
        raise ValueError(
            f"the model gives logits of {len(logits)} tokens, not of {len(reference.logits)}"
        )
    scores = reference.scores(logits)
    return {name: _numbers(array) for name, array in scores._asdict().items()}


def _numbers(array: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.9g}") for value in array]


def _diversity(tokens: Sequence[int]) -> float:
    """Return the share of runs of three tokens that are not there before; 1 of fewer than three."""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


def _require_lengths(protocol: Protocol, *names: str, least: int = 1) -> None:
    for name in names:
        object.__setattr__(protocol, name, as_integer(name, getattr(protocol, name), least=least))

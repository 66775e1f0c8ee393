"""A conversation with a chat model, of which each turn reads only what is new."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_export.running.sampling import Sampling
from onnx_export.running.session import GREEDY, Session

__all__ = ["Conversation"]

Messages = Sequence[Mapping[str, str]]


class Conversation:
    """A session, and what has been said; for one thread at a time.

    Whatever of the conversation's tokens the cache has, from the first on, is not read again.

    Parameters
    ----------
    session : Session
        Of one row, which is this conversation's from now on.
    encode : callable
        Returns the tokens of messages, up to where an answer begins.
    decode : callable
        Returns the text of tokens, without those that only control.
    system : str, optional
        What the model is told before anything else.

    Attributes
    ----------
    messages : list of dict
        ``role`` and ``content`` of what has been said.

    Raises
    ------
    ValueError
        If the session has more than one row.

    Examples
    --------
    >>> from onnx_export.models.tiny import tiny_onnx
    >>> talk = Conversation(
    ...     Session(tiny_onnx()), lambda messages: [ord(c) for m in messages for c in m["content"]],
    ...     lambda tokens: "".join(map(chr, tokens)))
    >>> tokens = list(talk.answer("Hello", 3))
    >>> [message["role"] for message in talk.messages]
    ['user', 'assistant']
    >>> talk.read  # the last of the answer was not
    7
    """

    def __init__(
        self,
        session: Session,
        encode: Callable[[Messages], Sequence[int] | NDArray[np.int64]],
        decode: Callable[[list[int]], str],
        system: str | None = None,
    ) -> None:
        if session.batch != 1:
            raise ValueError(f"the session has batch={session.batch}; a conversation is one row")
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._session, self._encode, self._decode = session, encode, decode
        self._tokens: list[int] = []  # those in the cache

    @property
    def session(self) -> Session:
        """The session, which is a new one where a cache could not go back."""
        return self._session

    @property
    def read(self) -> int:
        """Tokens in the cache."""
        return len(self._tokens)

    def answer(
        self,
        text: str,
        max_new_tokens: int,
        *,
        stop_tokens: Sequence[int] = (),
        sampling: Sampling = GREEDY,
    ) -> Generator[int, None, None]:
        """Yield the tokens of an answer as they come; it is part of the conversation, even if cut.

        Raises
        ------
        TypeError, ValueError
            At once, if the template refuses the messages or there is no room for them; the
            conversation is as it was then.
        """
        said = [*self.messages, {"role": "user", "content": text}]
        ids = [int(token) for token in self._encode(said)]
        if not ids:
            raise ValueError("the conversation has no tokens; say something")
        same = _common(self._tokens, ids[:-1])  # one at least is read, for its logits
        if len(ids) > self._session.limit:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, more than there is room for "
                f"({self._session.limit}); begin another"
            )
        same = self._went_back(same)
        tokens = self._session.stream(
            ids[same:], max_new_tokens, stop_tokens=stop_tokens or None, sampling=sampling
        )
        return self._followed(tokens, said, ids, frozenset(stop_tokens))

    def _followed(
        self,
        tokens: Generator[int, None, None],
        said: list[dict[str, str]],
        ids: list[int],
        stops: frozenset[int],
    ) -> Generator[int, None, None]:
        answer: list[int] = []
        try:
            for token in tokens:
                answer.append(token)
                yield token
        finally:
            self._tokens = [*ids, *answer][: self._session.lengths[0]]
            if answer:
                text = self._decode([token for token in answer if token not in stops])
                self.messages = [*said, {"role": "assistant", "content": text}]

    def _went_back(self, length: int) -> int:
        """Keep the first tokens, or none where a cache cannot go back; return how many."""
        if length == len(self._tokens):
            return length
        try:
            self._session.crop(length)
        except ValueError:
            old = self._session
            self._session, length = Session(old.model, capacity=old.capacity), 0
        self._tokens = self._tokens[:length]
        return length


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many of the first items are the same."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))

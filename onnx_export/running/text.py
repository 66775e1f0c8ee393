"""Text of tokens that come one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

__all__ = ["pieces"]

INCOMPLETE = "\ufffd"


def pieces(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Yield the text that each token adds, held back while a character is incomplete.

    Parameters
    ----------
    tokens : iterable of int
    decode : callable
        Returns the text of some tokens, with U+FFFD for bytes that are not UTF-8.

    Yields
    ------
    str
        Joined they are the text of all tokens.

    Examples
    --------
    >>> def decode(tokens):
    ...     return bytes(tokens).decode(errors="replace")
    >>> list(pieces("né".encode(), decode))
    ['n', '', 'é']
    """
    # Tokens are decoded with those before them, on which spaces depend, but not with all of them.
    known: list[int] = []
    shown = 0
    for token in tokens:
        known.append(token)
        text = decode(known)
        if text.endswith(INCOMPLETE):
            yield ""
            continue
        yield text[len(decode(known[:shown])) :]
        known, shown = known[shown:], len(known) - shown
    if shown < len(known):
        yield decode(known)[len(decode(known[:shown])) :]

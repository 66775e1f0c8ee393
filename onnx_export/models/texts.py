"""Real English text for measurements: nine State of the Union addresses, 1791 to 2002.

The addresses are in the public domain; ``data/SOURCE.md`` says where they come from.
"""

from __future__ import annotations

from importlib import resources

import numpy as np
from numpy.typing import NDArray

from nsq_ref.arrays import as_integer
from onnx_export.models.tokenizer import Tokenizer

ADDRESSES = (
    "1801-jefferson", "1863-lincoln", "1941-roosevelt", "2002-bush", "1791-washington",
    "1913-wilson", "1985-reagan", "1793-washington", "1964-johnson",
)  # fmt: skip
"""Names of the addresses; neighbours are far apart in time, so that any few of them differ."""

REPORTING_START = 2 * 641
"""Token of each address from which on it is for reporting (docs/fidelity.md). Schemes were chosen
by looking at what comes before: two passages of 512 tokens, 128 scored ones and one more."""


def read_address(name: str) -> str:
    """Return the text of one address, its paragraphs separated by empty lines.

    Parameters
    ----------
    name : str
        One of `ADDRESSES`.

    Returns
    -------
    str
        The text.

    Raises
    ------
    ValueError
        If there is no such address.

    Examples
    --------
    >>> read_address("1913-wilson").splitlines()[0]
    'Gentlemen of the Congress:'
    """
    if name not in ADDRESSES:
        raise ValueError(f"there is no address {name!r}; choose one of {', '.join(ADDRESSES)}")
    path = resources.files("onnx_export") / "data" / f"{name}.txt"
    return path.read_text(encoding="utf-8")


def passages(tokenizer: Tokenizer, length: int, count: int, *, start: int = 0) -> NDArray[np.int64]:
    """Cut passages out of the addresses that do not overlap.

    The first passage of every address comes before the second of any, in the order of `ADDRESSES`.
    A smaller count gives the first of a larger one.

    Parameters
    ----------
    tokenizer : Tokenizer
        The tokenizer of the model that shall read them.
    length : int
        Tokens in a passage.
    count : int
        Number of passages.
    start : int
        First token of each address that is used: 0, or `REPORTING_START`.

    Returns
    -------
    numpy.ndarray
        int64 ``[count, length]``.

    Raises
    ------
    ValueError
        If the addresses do not hold so many passages of that length.

    Examples
    --------
    >>> import tempfile
    >>> from onnx_export.models.tiny import tiny_gguf
    >>> tokenizer = Tokenizer(tiny_gguf(tempfile.mkdtemp()))
    >>> tokenizer.decode(passages(tokenizer, 24, 2)[1])
    'Fellow-Citizens of the Sena'
    """
    length, count = as_integer("length", length, least=1), as_integer("count", count, least=1)
    start = as_integer("start", start, least=0)
    addresses = [tokenizer.encode(read_address(name))[start:] for name in ADDRESSES]
    rounds = max(len(tokens) for tokens in addresses) // length
    found = [
        tokens[begin : begin + length]
        for begin in range(0, rounds * length, length)
        for tokens in addresses
        if begin + length <= len(tokens)
    ]
    if len(found) < count:
        raise ValueError(
            f"the addresses hold {len(found)} passages of {length} tokens from token {start} on, "
            f"fewer than count = {count}; ask for fewer or shorter ones"
        )
    return np.stack(found[:count])

"""Byte-pair encoding of characters whose merges are told by scores, as SentencePiece has it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nsq_ref.extras import extra
from onnx_export.models.gguf import GGUFFile

with extra("onnx", __name__):
    import gguf
    import tokenizers
    from tokenizers import decoders, models, normalizers

__all__ = ["merges_by_score", "scored_bpe"]

SPACE = "▁"  # how a space is written in a token


def merges_by_score(
    vocabulary: dict[str, int], scores: NDArray[np.float32]
) -> list[tuple[str, str]]:
    """Return all pairs of tokens that make a token, that of the highest score first.

    Parameters
    ----------
    vocabulary : dict of str to int
        The tokens that are merged, and what they are merged from.
    scores : numpy.ndarray
        float32, one a token.

    Examples
    --------
    >>> merges_by_score({"a": 0, "b": 1, "ab": 2, "aab": 3}, np.array([0, 0, -2, -1]))
    [('a', 'ab'), ('a', 'b')]
    """
    found = []
    for token, index in vocabulary.items():
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [one for one in pairs if one[0] in vocabulary and one[1] in vocabulary]
        found += [(-scores[index], *pair) for pair in known]
    # Two ways to one token differ in nothing that a text shows; they are in order of their cut.
    found.sort(key=lambda one: one[0])
    return [(left, right) for _, left, right in found]


def scored_bpe(
    file: GGUFFile, tokens: list[str], types: NDArray[np.int32], scores: NDArray[np.float32]
) -> tokenizers.Tokenizer:
    """Return the tokenizer of a vocabulary with scores; what it lacks is spelled in bytes.

    Raises
    ------
    ValueError
        If a byte has no token, or the file puts a space before every text.
    """
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        raise ValueError(
            f"{file.path}: key 'tokenizer.ggml.add_space_prefix' is not false; tokenizers that put "
            "a space before every text are not supported"
        )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for byte in range(256):
        index = vocabulary.get(f"<0x{byte:02X}>", -1)
        if index < 0 or types[index] != gguf.TokenType.BYTE:
            raise ValueError(
                f"{file.path}: the byte {byte:#04x} has no token; convert the model again"
            )
    merged = {token: i for token, i in vocabulary.items() if types[i] == gguf.TokenType.NORMAL}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges_by_score(merged, scores),
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer

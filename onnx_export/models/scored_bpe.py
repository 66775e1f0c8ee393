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


def merges_by_score(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that make a token, those of the highest score first.

    Parameters
    ----------
    scores : dict of str to float
        Of each token, in the order of their ids.

    Examples
    --------
    >>> merges_by_score({"a": 0.0, "b": 0.0, "ab": -2.0, "aab": -1.0})
    [('a', 'ab'), ('a', 'b')]
    """
    ids = {token: index for index, token in enumerate(scores)}
    found = []
    for token in sorted(scores, key=scores.__getitem__, reverse=True):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        # Ways to one token are in the order of ids, as in the files of Hugging Face.
        found += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return found


def scored_bpe(
    file: GGUFFile, vocabulary: dict[str, int], types: list[int], scores: NDArray[np.float32]
) -> tokenizers.Tokenizer:
    """Return the tokenizer of a vocabulary with scores; what it lacks is spelled in bytes.

    Raises
    ------
    ValueError
        If a byte has no token, or the file puts a space before every text.
    """
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True) is not False:
        raise ValueError(
            f"{file.path}: key 'tokenizer.ggml.add_space_prefix' is not false; tokenizers that put "
            "a space before every text are not supported"
        )
    for byte in range(256):
        index = vocabulary.get(f"<0x{byte:02X}>")
        if index is None or types[index] != gguf.TokenType.BYTE:
            raise ValueError(
                f"{file.path}: the byte {byte:#04x} has no token of its own; convert the model "
                "again"
            )
    normal, values = int(gguf.TokenType.NORMAL), scores.tolist()
    merged = {token: values[i] for token, i in vocabulary.items() if types[i] == normal}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges_by_score(merged), byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer

"""Attention over keys and values as they are stored, without decoding them (A3)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref import spec
from nsq_ref.arrays import as_array, as_integer
from nsq_ref.attention.options import finite, floats, group_of, require_options
from nsq_ref.attention.reference import visible_tokens
from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import Scheme, as_scheme

__all__ = ["Piece", "PreparedPiece", "attend_quantized", "prepare"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

FLOATS = tuple(FLOAT_DTYPES[name] for name in ("float32", "float16", "bfloat16"))  # for kernels
NO_SUMS = np.empty((0, 0, 0))
SCORE_BYTES = 1 << 26  # queries are taken in chunks whose scores need no more
MOST = float(np.finfo(np.float32).max)


class Form(NamedTuple):
    """What kernels need to know of a scheme, in their order."""

    block_size: int
    bits: int
    offset: np.float32
    per_channel: bool
    renormalize: bool


@dataclass(frozen=True, eq=False)
class PreparedPiece:
    """Tokens of one sequence, checked for `attend_quantized`; `prepare` makes them.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    kv_heads, tokens, head_dim : int
    source : float array or spec.Block
        What was given.
    arrays : tuple of arrays
        Those of it that are read.
    form : Form or None
        How blocks are coded; None for unquantized tokens.
    """

    kv_heads: int
    tokens: int
    head_dim: int
    source: Array | spec.Block
    arrays: tuple[Array, ...]
    form: Form | None

    @functools.cached_property
    def arguments(self) -> tuple[Any, ...] | None:
        """All blocks as kernels take them, if they can be taken where they are."""
        if self.form is None or not all(part.flags.c_contiguous for part in self.arrays):
            return None
        return _arguments(self.arrays, self.form)


Piece = Array | spec.Block | PreparedPiece


def prepare(source: Piece, scheme: Scheme | str, head_dim: int) -> PreparedPiece:
    """Check some tokens of a sequence for `attend_quantized`.

    It does so by itself; but a cache prepares what no longer changes once.

    Parameters
    ----------
    source : float array or spec.Block
        Unquantized tokens ``[kv_heads, n, head_dim]`` of float32, float16 or bfloat16; or blocks,
        as `kernels.encode` returns them: packed codes [kv_heads, n, row_bytes], norm [kv_heads, n],
        scale and zero [kv_heads, blocks, head_dim] or [kv_heads, n, 1], outlier_index
        [kv_heads, blocks, k], outliers [kv_heads, n, k]. What the scheme does not store is not
        read, nor is ``collapsed``. What is prepared already is returned.
    scheme : Scheme or str
        Of the blocks, or its name; without a ``block_size``, the piece is one block.
    head_dim : int
        D.

    Returns
    -------
    PreparedPiece
        It refers to the arrays, and sees what is written to them later.

    Raises
    ------
    TypeError, ValueError
        Where a shape or a dtype is not the scheme's.

    Examples
    --------
    >>> import numpy as np
    >>> prepare(np.ones((2, 5, 8), np.float16), Scheme(), head_dim=8).tokens
    5
    """
    if isinstance(source, PreparedPiece):
        return source
    scheme, head_dim = as_scheme("scheme", scheme), as_integer("head_dim", head_dim, least=1)
    if not isinstance(source, spec.Block):
        (plain,) = floats(3, **{"a piece": source})
        if plain.dtype not in FLOAT_DTYPES.values() or plain.shape[2] != head_dim:
            raise ValueError(
                f"a piece is {plain.dtype} {list(plain.shape)}; unquantized tokens are float32, "
                f"float16 or bfloat16 [kv_heads, n, {head_dim}]"
            )
        return PreparedPiece(plain.shape[0], plain.shape[1], head_dim, source, (plain,), None)
    parts = {name: as_array(f"{name} of a piece", part) for name, part in source._asdict().items()}
    block = spec.Block(**parts)
    kv_heads, tokens = _require_block(block, scheme, head_dim)
    form = Form(
        scheme.tokens_per_block(tokens),
        scheme.bits,
        np.float32(scheme.code_offset),
        scheme.axis == "channel",
        scheme.separate_norm and scheme.magnitude == "norm",
    )
    # What the scheme does not store may be anything.
    factor = block.norm if scheme.separate_norm else np.ones((kv_heads, tokens), np.float32)
    none = np.zeros((kv_heads, tokens, 0), np.float32)
    arrays = (
        block.codes,
        factor[..., None],
        block.scale,
        block.scale[:, :, :0] if scheme.symmetric else block.zero,
        block.outlier_index if scheme.outlier_channels else none.astype(np.int32),
        block.outliers if scheme.outlier_channels else none,
    )
    return PreparedPiece(kv_heads, tokens, head_dim, source, arrays, form)


@in_default_environment
def attend_quantized(
    query: Array,
    keys: Sequence[Piece],
    values: Sequence[Piece],
    key_scheme: Scheme | str,
    value_scheme: Scheme | str,
    *,
    value_head_dim: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sliding_window: int | None = None,
    weights: bool = False,
) -> tuple[Float32, Float32 | None]:
    """Attend over one sequence as it is stored, without decoding it (rule A3).

    Scales and zeros of channels join the query and the output, gains the scores and the weights; in
    between there are sums of codes. Results do not depend on the number of threads, nor on how the
    arrays lie in memory.

    Parameters
    ----------
    query : float array, shape [heads, query_tokens, D]
        The last tokens of the sequence; heads are a multiple of kv_heads, as `attend` says. Rounded
        to float32.
    keys, values : sequence of pieces, in the order of the tokens
        What `prepare` takes or returns. Keys and values hold as many tokens, but may be cut
        differently.
    key_scheme, value_scheme : Scheme or str
        Of the blocks among the pieces, or their names.
    value_head_dim : int, optional
        D_v; D by default.
    scale, causal, softcap, sliding_window
        As `attend` takes them.
    weights : bool
        Return the weights, too.

    Returns
    -------
    output : float32 array, shape [heads, query_tokens, D_v]
        What float32 cannot hold becomes the largest that it can, in scores too.
    weights : float32 array, shape [heads, query_tokens, T], or None

    Raises
    ------
    TypeError, ValueError
        Where shapes do not fit, options make no sense, or the query is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from nsq_ref import kernels
    >>> scheme = Scheme(block_size=4)
    >>> x = np.random.default_rng(0).standard_normal((2, 8, 16), dtype=np.float32)
    >>> packed = np.empty((2, 8, 8), np.uint8)
    >>> block = kernels.encode(x, 0, scheme, packed)
    >>> tail = x[:, :3]
    >>> query = np.ones((4, 1, 16), np.float32)
    >>> output, _ = attend_quantized(query, [block, tail], [block, tail], scheme, scheme)
    >>> output.shape
    (4, 1, 16)
    """
    # Here, because importing Numba takes a while.
    from nsq_ref.kernels import attention as kernels

    (query,) = floats(3, query=query)
    heads, query_tokens, head_dim = query.shape
    value_dim = head_dim
    if value_head_dim is not None:
        value_dim = as_integer("value_head_dim", value_head_dim, least=1)
    key_scheme = as_scheme("key_scheme", key_scheme)
    value_scheme = as_scheme("value_scheme", value_scheme)
    key_pieces = [prepare(source, key_scheme, head_dim) for source in keys]
    value_pieces = [prepare(source, value_scheme, value_dim) for source in values]
    kv_heads, tokens = _require_pieces(key_pieces, value_pieces, head_dim, value_dim)
    group = group_of(heads, kv_heads)
    scale, softcap, window = require_options(head_dim, scale, causal, softcap, sliding_window)
    if query_tokens > tokens:
        raise ValueError(
            f"query has {query_tokens} tokens, but keys have {tokens}: queries are the last tokens "
            "of their sequence, whose keys must be there"
        )
    finite("query", query)
    with np.errstate(over="ignore"):
        scaled = (query.astype(np.float32) * np.float64(scale)).astype(np.float32)
    finite("query * scale, in float32,", scaled)
    # Queries that share keys are rows of one matrix, in the order of their tokens.
    rows = scaled.reshape(kv_heads, group, query_tokens, head_dim).swapaxes(1, 2)
    output = np.empty((kv_heads, query_tokens, group, value_dim), np.float32)
    shown = np.zeros((kv_heads, query_tokens, group, tokens), np.float32) if weights else None
    chunk = max(1, SCORE_BYTES // (4 * heads * tokens))
    for start in range(0, query_tokens, chunk):
        stop = min(start + chunk, query_tokens)
        first, last = tokens - query_tokens + start, tokens - query_tokens + stop  # positions
        low = 0 if window is None else max(0, first + 1 - window)
        high = last if causal else tokens
        some = np.ascontiguousarray(rows[:, start:stop]).reshape(kv_heads, -1, head_dim)
        count = some.shape[1]
        # Rows are written side by side: their length must not be a multiple of a cache's period.
        scores = np.empty((kv_heads, count, (high - low) // 32 * 32 + 48), np.float32)
        seen = scores[:, :, : high - low]
        products = count * kv_heads * (high - low)
        spans = _spans(key_pieces, low, high)
        tasks = len(spans) * kv_heads
        kernels.run(_work, tasks, products * head_dim, kernels.visit, spans, some, scores, None)
        mask = None
        if stop - start > 1:
            visible = visible_tokens(tokens, query_tokens, causal, window, start, stop, low, high)
            mask = None if visible.all() else visible
        kernels.run(_softmax, kv_heads, products * head_dim, seen, group, softcap, mask)
        if shown is not None:
            shown[:, start:stop, :, low:high] = seen.reshape(kv_heads, -1, group, high - low)
        spans = _spans(value_pieces, low, high)
        parts, tasks = np.zeros((len(spans), kv_heads, count, value_dim)), len(spans) * kv_heads
        kernels.run(_work, tasks, products * value_dim, kernels.visit, spans, some, scores, parts)
        total = parts.sum(axis=0).reshape(kv_heads, stop - start, group, value_dim)
        output[:, start:stop] = np.clip(total, -MOST, MOST)
    return (
        output.swapaxes(1, 2).reshape(heads, query_tokens, value_dim),
        None if shown is None else shown.swapaxes(1, 2).reshape(heads, query_tokens, tokens),
    )


# --- shares of the work: some heads of some pieces -----------------------------------------------


class _Span(NamedTuple):
    """Tokens [first, last) of a piece, and which of those attended to the first of them is."""

    piece: PreparedPiece
    first: int
    last: int
    column: int

    def read(self, heads: slice) -> tuple[Any, ...]:
        """Return what kernels take between queries, or weights, and what they write."""
        piece, first, last, column = self
        if piece.form is None:  # unquantized: outliers in all channels
            tokens = piece.arrays[0][heads, first:last]
            count, size, head_dim = tokens.shape
            ones = np.ones((count, size + head_dim), np.float32)
            index = np.tile(np.arange(head_dim, dtype=np.int32), (count, 1, 1))
            form = Form(size, 8, np.float32(0), True, False)
            parts = (
                np.empty((count, size, 0), np.uint8), ones[:, :size, None], ones[:, None, size:],
                ones[:, None, :0], index, tokens,
            )  # fmt: skip
            return *_arguments(parts, form), 0, column
        whole = (heads.stop - heads.start, first, last) == (piece.kv_heads, 0, piece.tokens)
        if whole and piece.arguments is not None:
            return *piece.arguments, 0, column
        codes, factor, scale, zero, index, outliers = piece.arrays
        size = piece.form.block_size
        blocks = slice(first // size, -(-last // size))
        some = slice(blocks.start * size, last)
        scales = blocks if piece.form.per_channel else some
        parts = (
            codes[heads, some], factor[heads, some], scale[heads, scales], zero[heads, scales],
            index[heads, blocks], outliers[heads, some],
        )  # fmt: skip
        return *_arguments(parts, piece.form), first - some.start, column


def _arguments(parts: tuple[Array, ...], form: Form) -> tuple[Any, ...]:
    """Return arrays as kernels take them: Numba compiles once.

    Heads lie one behind the other, all is contiguous and read-only, and floats are given as bits.
    """
    codes, factor, scale, zero, index, outliers = parts
    floats = (factor, scale, zero, outliers)
    kinds = tuple(FLOATS.index(part.dtype) for part in (factor, scale, outliers))
    factor, scale, zero, outliers = (_joined(part).view(np.uint16) for part in floats)
    factor = factor.reshape(1, -1)
    return _joined(codes), factor, scale, zero, _joined(index), outliers, kinds, *form


def _joined(part: Array) -> Array:
    """Join the first two axes."""
    heads, rows, columns = part.shape
    joined = np.ascontiguousarray(part).reshape(heads * rows, columns)
    joined.flags.writeable = False
    return joined


def _spans(pieces: Sequence[PreparedPiece], low: int, high: int) -> list[_Span]:
    """Cut tokens [low, high) where pieces end."""
    spans, at = [], 0
    for piece in pieces:
        first, last = max(low - at, 0), min(high - at, piece.tokens)
        if first < last:
            spans.append(_Span(piece, first, last, at + first - low))
        at += piece.tokens
    return spans


def _work(
    first: int,
    last: int,
    kernel: Callable[..., None],
    spans: Sequence[_Span],
    query: Float32,
    scores: Float32,
    parts: Array | None,
) -> None:
    """Let a kernel do tasks [first, last), each a head of a span, whose sums are one of ``parts``.

    Without ``parts`` scores are written.
    """
    kv_heads = len(query)
    for i in range(first // kv_heads, -(-last // kv_heads)):
        start = i * kv_heads
        heads = slice(max(first - start, 0), min(last - start, kv_heads))
        out = NO_SUMS if parts is None else parts[i, heads]
        kernel(query[heads], scores[heads], out, *spans[i].read(heads))


def _softmax(
    first: int,
    last: int,
    scores: Float32,
    group: int,
    softcap: float | None,
    visible: npt.NDArray[np.bool_] | None,
) -> None:
    """Turn scores into weights, key/value heads [first, last), in place."""
    some = scores[first:last]
    with np.errstate(all="ignore"):
        if softcap is not None:
            some /= np.float32(softcap)
            np.tanh(some, out=some)
            some *= np.float32(softcap)
        if visible is not None:
            for head in some:
                by_token = head.reshape(-1, group, head.shape[1])
                np.copyto(by_token, -np.inf, where=~visible[:, None])
        some -= some.max(axis=2, keepdims=True)
        np.exp(some, out=some)
        some /= some.sum(axis=2, keepdims=True)


# --- refusals ------------------------------------------------------------------------------------


def _require_block(block: spec.Block, scheme: Scheme, head_dim: int) -> tuple[int, int]:
    """Return kv_heads and tokens, after every part has the shape and dtype of the scheme's."""
    if block.codes.ndim != 3:
        raise ValueError(f"codes of a piece have {block.codes.ndim} axes; 3 are needed")
    kv_heads, tokens = block.codes.shape[:2]
    expected = replace(scheme, sink_tokens=0).layout(tokens, head_dim)
    expected["codes"] = expected.pop("packed")
    for name, (shape, dtype) in expected.items():
        part = getattr(block, name)
        if part.shape != (kv_heads, *shape) or part.dtype != dtype:
            raise ValueError(
                f"{name} of a piece is {part.dtype} {list(part.shape)}; for {tokens} tokens of "
                f"{head_dim} channels, {scheme} stores {dtype} {[kv_heads, *shape]}"
            )
    index = block.outlier_index
    if scheme.outlier_channels and not ((index >= 0) & (index < head_dim)).all():
        raise ValueError(f"outlier_index of a piece names a channel that is none of {head_dim}")
    return kv_heads, tokens


def _require_pieces(
    keys: Sequence[PreparedPiece], values: Sequence[PreparedPiece], head_dim: int, value_dim: int
) -> tuple[int, int]:
    """Return kv_heads and tokens, after all pieces agree on them."""
    counts = [sum(piece.tokens for piece in pieces) for pieces in (keys, values)]
    if counts[0] != counts[1] or not counts[0]:
        raise ValueError(
            f"keys have {counts[0]} tokens and values {counts[1]}; both need the same number, at "
            "least one"
        )
    kv_heads = keys[0].kv_heads
    for name, pieces, channels in (("keys", keys, head_dim), ("values", values, value_dim)):
        for i, piece in enumerate(pieces):
            if (piece.kv_heads, piece.head_dim) != (kv_heads, channels):
                raise ValueError(
                    f"{name}[{i}] has {piece.kv_heads} heads of {piece.head_dim} channels; "
                    f"{kv_heads} of {channels} are expected"
                )
    return kv_heads, counts[0]

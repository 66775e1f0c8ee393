"""Attention over decoded keys and values in float64, and over stored ones without decoding them.

`attend` is the reference (rules A1, A2): plain NumPy that reads like the formula.
`attend_quantized` takes keys and values as they are stored, and `tolerance` says how far it, or any
other kernel in float32, may be from the reference (rule A3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref import packing, spec
from nsq_ref.arrays import (
    as_array,
    as_float,
    as_float_array,
    as_integer,
    as_integers,
    as_real_array,
)
from nsq_ref.codec import Quantized, block_of
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import FLOAT_DTYPES, Scheme, as_scheme, row_bytes

__all__ = [
    "Attention",
    "Piece",
    "PreparedPiece",
    "attend",
    "attend_quantized",
    "prepare",
    "reach",
    "tolerance",
]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

SCORE_BYTES = 1 << 26  # queries are taken in chunks whose scores need no more
SEGMENT_TOKENS = 4096  # of so many tokens, or few more, the sums are taken apart, and by any thread
MOST = float(np.finfo(np.float32).max)

UNIT = 2.0**-24  # the relative error of one float32 operation
TOKEN_ROUNDINGS = 512  # that a term may pass in a sum over tokens: a kernel adds in tiles
LEAST_LENGTH = 2.0**-60  # of a direction whose length float32 squares can tell
LEAST_WEIGHT = 2.0**-125  # before normalization, smaller ones may be flushed


class Attention(NamedTuple):
    """What attention gives: the output, and the weights that made it.

    Nothing changes one, so that threads may share it.
    """

    output: Float64  # [batch, heads, query_tokens, D_v]
    weights: Float64  # [batch, heads, query_tokens, T]


@dataclass(frozen=True, eq=False)
class PreparedPiece:
    """Tokens of one sequence, checked and laid out for `attend_quantized`; `prepare` makes them.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    kv_heads, tokens, head_dim : int
    source : float array or spec.Block
        What was given.
    arrays : tuple of arrays
        What the kernels read: the source's own memory, where its strides allow.
    record : int64 array
        What they find it by; see `attention_kernels`.
    """

    kv_heads: int
    tokens: int
    head_dim: int
    source: Array | spec.Block
    arrays: tuple[Array, ...]
    record: npt.NDArray[np.int64]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Find the arrays of a copy, or of a pickle, where they are now."""
        self.__dict__.update(state)
        _locate(self.record, self.arrays)


Piece = Array | spec.Block | PreparedPiece


@in_default_environment
def attend(
    query: Array,
    keys: Array,
    values: Array,
    *,
    lengths: Array | Sequence[int] | None = None,
    query_lengths: Array | Sequence[int] | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> Attention:
    """Attend in float64 over keys and values as a decoder sees them (rules A1, A2).

    Parameters
    ----------
    query : float array, shape [batch, heads, query_tokens, D]
        The last tokens of each sequence. Heads are a multiple of kv_heads: query head h uses key
        and value head ``h // (heads // kv_heads)``.
    keys : float array, shape [batch, kv_heads, T, D]
    values : float array, shape [batch, kv_heads, T, D_v]
    lengths : int array, shape [batch], optional
        Valid tokens of each row, padding behind them; T by default. What padding holds, NaN
        included, does not matter.
    query_lengths : int array, shape [batch], optional
        Valid query tokens of each row, padding behind them; all by default. Query i of row r stands
        at position ``lengths[r] - query_lengths[r] + i``.
    scale : float, optional
        Factor of the products; 1 / sqrt(D) by default.
    causal : bool
        A query sees no later position than its own.
    softcap : float, optional
        Scores s become ``softcap * tanh(s / softcap)``, after the scale and before the mask.
    sliding_window : int, optional
        A query sees only so many latest positions, its own among them. Causal attention only.

    Returns
    -------
    Attention
        float64; output and weights of padding queries, and weights of what is not seen, are 0.

    Raises
    ------
    TypeError, ValueError
        Where shapes do not fit, options make no sense, or valid input is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> query = np.zeros((1, 2, 1, 4))  # sees all keys alike
    >>> keys, values = np.ones((1, 1, 3, 4)), np.arange(6).reshape(1, 1, 3, 2) * 1.0
    >>> attend(query, keys, values).output[0, :, 0]
    array([[2., 3.],
           [2., 3.]])
    >>> attend(query, keys, values, sliding_window=1).weights[0, 0]
    array([[0., 0., 1.]])
    """
    query, keys, values = _floats(4, query=query, keys=keys, values=values)
    batch, heads, query_tokens, head_dim = query.shape
    kv_heads, tokens = keys.shape[1:3]
    if values.shape[:3] != keys.shape[:3] or keys.shape[0] != batch or keys.shape[3] != head_dim:
        raise ValueError(
            f"query {list(query.shape)}, keys {list(keys.shape)} and values {list(values.shape)} "
            "do not fit; they are [batch, heads, query_tokens, D], [batch, kv_heads, T, D] and "
            "[batch, kv_heads, T, D_v]"
        )
    group = _group(heads, kv_heads)
    scale, softcap, window = require_options(head_dim, scale, causal, softcap, sliding_window)
    valid = _require_lengths("lengths", lengths, batch, tokens)
    valid_queries = _require_lengths("query_lengths", query_lengths, batch, query_tokens)
    output = np.zeros((batch, heads, query_tokens, values.shape[3]))
    weights = np.zeros((batch, heads, query_tokens, tokens))
    for row, (n, m) in enumerate(zip(valid, valid_queries, strict=True)):
        if m > n:
            raise ValueError(
                f"query_lengths[{row}] is {m}, but lengths[{row}] is {n}: queries are the last "
                "tokens of their sequence, whose keys must be there"
            )
        q, k, v = (
            _finite(name, array[row, :, :count].astype(np.float64), row)
            for name, array, count in (
                ("query", query, m),
                ("keys", keys, n),
                ("values", values, n),
            )
        )
        q = q.reshape(kv_heads, group, m, head_dim)
        s = scale * (q @ k[:, None].swapaxes(-1, -2))
        if not np.isfinite(s).all():
            raise ValueError(f"scores of row {row} are beyond float64; scale the query down")
        if softcap is not None:
            s = softcap * np.tanh(s / softcap)
        s = np.where(_visible(n, m, causal, window), s, -np.inf)
        e = np.exp(s - s.max(axis=-1, keepdims=True, initial=-np.inf))
        w = e / e.sum(axis=-1, keepdims=True)
        output[row, :, :m] = (w @ v[:, None]).reshape(heads, m, values.shape[3])
        weights[row, :, :m, :n] = w.reshape(heads, m, n)
    return Attention(output, weights)


# --- how far a kernel may be from it -------------------------------------------------------------


@in_default_environment
def reach(quantized: Quantized) -> Float64:
    """Return how large the terms are that decoding adds up, for `tolerance` (rule A3).

    Parameters
    ----------
    quantized : Quantized

    Returns
    -------
    float64 array, shape ``quantized.shape``
        Of sinks, which are stored as they are, their absolute values.

    Raises
    ------
    TypeError
        For anything but a `Quantized`.

    Examples
    --------
    >>> import numpy as np
    >>> from nsq_ref import quantize
    >>> reach(quantize(np.float32([[7.0, 14.0]]), Scheme(separate_norm=False)))  # 7 + 8 scales
    array([[15., 30.]])
    """
    if not isinstance(quantized, Quantized):
        got = type(quantized).__name__
        raise TypeError(f"quantized must be what quantize returns, got {got}; see reach's examples")
    scheme, shape = quantized.scheme, quantized.shape
    block = block_of(quantized)
    tokens = block.norm.shape[1]
    each_block = np.arange(tokens) // scheme.tokens_per_block(tokens)
    index = block.outlier_index[:, each_block]
    if scheme.axis == "channel":
        block = block._replace(scale=block.scale[:, each_block], zero=block.zero[:, each_block])
    codes = packing.unpack(block.codes, scheme, shape[-1])
    scale, zero, outliers = (
        np.abs(part.astype(np.float64)) for part in (block.scale, block.zero, block.outliers)
    )
    signed = np.abs(codes) * scale + zero
    terms = signed + scheme.code_offset * scale
    for part in (signed, terms):
        np.put_along_axis(part, index, outliers, -1)
    factor = np.abs(block.norm.astype(np.float64))
    if scheme.separate_norm and scheme.magnitude == "norm":
        y = spec.dequantized_direction(codes, block.scale, block.zero, index, block.outliers)
        length = np.linalg.norm(y.astype(np.float64), axis=-1)
        known = length >= LEAST_LENGTH
        divisor = np.where(known, length, 1)
        # Products of float32 scales and codes round, those of shorter ones do not.
        parts = terms if scheme.scale_dtype == "float32" else signed
        amplified = 1 + np.linalg.norm(parts, axis=-1) / (2 * divisor)
        unknown = np.where((length == 0) | (factor == 0), 0.0, np.inf)
        factor = np.where(known, factor / divisor * amplified, unknown)
    sinks = np.zeros((len(terms), 0, shape[-1]))
    if quantized.sinks is not None:
        sinks = np.abs(quantized.sinks.astype(np.float64)).reshape(len(terms), -1, shape[-1])
    # Infinite times 0 is a channel that contributes nothing.
    coded = np.where(terms == 0, 0.0, np.where(terms == 0, 1.0, terms) * factor[..., None])
    return np.concatenate([sinks, coded], axis=1).reshape(shape)


@in_default_environment
def tolerance(
    query: Array,
    keys: Array,
    values: Array,
    key_reach: Array | None = None,
    value_reach: Array | None = None,
    *,
    lengths: Array | Sequence[int] | None = None,
    query_lengths: Array | Sequence[int] | None = None,
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> Attention:
    """Bound how far attention in float32 may be from `attend` (rule A3).

    Parameters
    ----------
    query, keys, values
        As `attend` takes them; keys and values decoded.
    key_reach, value_reach : float arrays, shaped as keys and values, optional
        What `reach` returns of the quantized ones. Without them kernels that read decoded arrays
        are meant.
    lengths, query_lengths, scale, causal, softcap, sliding_window
        As `attend` takes them.

    Returns
    -------
    Attention
        Bounds of absolute errors, elementwise, in place of output and weights.

    Raises
    ------
    TypeError, ValueError
        As `attend`.

    Examples
    --------
    >>> import numpy as np
    >>> query, keys = np.random.default_rng(0).standard_normal((2, 1, 1, 50, 64))
    >>> bound = tolerance(query, keys, keys)
    >>> bool(bound.output.max() < 1e-3)
    True
    """
    query, keys, values = _floats(4, query=query, keys=keys, values=values)
    exact = attend(
        query, keys, values, lengths=lengths, query_lengths=query_lengths, scale=scale,
        causal=causal, softcap=softcap, sliding_window=sliding_window,
    )  # fmt: skip
    terms = [
        np.abs(x).astype(np.float64) if given is None else as_real_array(name, given)
        for name, x, given in (
            ("key_reach", keys, key_reach),
            ("value_reach", values, value_reach),
        )
    ]
    for name, x, term in (("key", keys, terms[0]), ("value", values, terms[1])):
        if term.shape != x.shape:
            raise ValueError(
                f"{name}_reach has shape {list(term.shape)}; {name}s have {list(x.shape)}"
            )
    batch, heads, query_tokens, head_dim = query.shape
    kv_heads = keys.shape[1]
    factor, softcap, window = require_options(head_dim, scale, causal, softcap, sliding_window)
    output, weights = np.zeros_like(exact.output), np.zeros_like(exact.weights)
    valid = _require_lengths("lengths", lengths, batch, keys.shape[2])
    valid_queries = _require_lengths("query_lengths", query_lengths, batch, query_tokens)
    for row, (n, m) in enumerate(zip(valid, valid_queries, strict=True)):
        grouped = (kv_heads, heads // kv_heads, m)
        q = query[row, :, :m].astype(np.float64).reshape(*grouped, head_dim)
        k, v = (x[row, :, None, :n].astype(np.float64) for x in (keys, values))
        k_reach, v_reach = (term[row, :, None, :n] for term in terms)
        s = factor * (q @ k.swapaxes(-1, -2))
        off = _gamma(head_dim + 16) * abs(factor) * (np.abs(q) @ k_reach.swapaxes(-1, -2))
        if softcap is not None:
            s = softcap * np.tanh(s / softcap)
            off = off + 10 * UNIT * np.abs(s)
        p = exact.weights[row, :, :m, :n].reshape(*grouped, n)
        visible = _visible(n, m, causal, window)
        with np.errstate(over="ignore", invalid="ignore"):
            # Logarithms, as a weight that is 0 in float64 need not be far from another one.
            s = np.where(visible, s, -np.inf)
            below = s - s.max(axis=-1, keepdims=True, initial=-np.inf)
            log_p = below - np.log(np.exp(below).sum(axis=-1, keepdims=True))
            off = off + 2 * UNIT * np.abs(below) + 8 * UNIT
            common = np.logaddexp.reduce(
                log_p + off, axis=-1, keepdims=True, where=visible, initial=-np.inf
            )
            off = off + common + _gamma(min(n, TOKEN_ROUNDINGS) + 8)
            moved = np.where(off < 1, p * np.expm1(off), np.exp(np.minimum(log_p + off, 0)))
            moved = np.where(visible, np.minimum(moved + LEAST_WEIGHT, 1), 0)
            moved = np.nan_to_num(moved, nan=1.0)
            changed = _gamma(min(n, TOKEN_ROUNDINGS) + v.shape[-1] + 16)
            result = moved @ np.abs(v) + changed * ((p + moved) @ v_reach)
            result = np.nan_to_num(result, nan=np.inf, posinf=np.inf)
        output[row, :, :m] = result.reshape(heads, m, values.shape[3])
        weights[row, :, :m, :n] = moved.reshape(heads, m, n)
    return Attention(output, weights)


def _gamma(roundings: int) -> float:
    """Bound of what so many float32 roundings in a row make of a product, relatively."""
    return roundings * UNIT / (1 - roundings * UNIT)


# --- what is stored, piece by piece --------------------------------------------------------------


def prepare(source: Piece, scheme: Scheme | str, head_dim: int) -> PreparedPiece:
    """Check some tokens of a sequence and lay them out for `attend_quantized`.

    It does so by itself; but preparing takes as long as attending to some hundred tokens, so that a
    cache prepares what no longer changes once.

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
        It refers to the arrays, and sees what is written to them later; only heads that are not
        contiguous are copied.

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
    kernels = _kernels()
    record = np.zeros(kernels.PIECE_FIELDS, np.int64)
    record[kernels.HEAD_DIM] = head_dim
    if not isinstance(source, spec.Block):
        (plain,) = _floats(3, **{"a piece": source})
        if plain.dtype not in _KINDS or plain.shape[2] != head_dim:
            raise ValueError(
                f"a piece is {plain.dtype} {list(plain.shape)}; unquantized tokens are float32, "
                f"float16 or bfloat16 [kv_heads, n, {head_dim}]"
            )
        kv_heads, tokens = plain.shape[:2]
        record[[kernels.BITS, kernels.NORM_KIND]] = kernels.UNQUANTIZED, _KINDS[plain.dtype]
        arrays: tuple[Array, ...] = (plain,)
    else:
        parts = {
            name: as_array(f"{name} of a piece", part) for name, part in source._asdict().items()
        }
        block = spec.Block(**parts)
        kv_heads, tokens = _require_block(block, scheme, head_dim)
        kept = min(scheme.outlier_channels, head_dim)
        norm = block.norm if scheme.separate_norm else np.ones((kv_heads, tokens), np.float32)
        none = np.zeros((kv_heads, 0), np.int32)
        arrays = (
            block.codes,
            norm,
            block.scale,
            none if scheme.symmetric else block.zero,
            block.outlier_index if kept else none,
            block.outliers if kept else none,
        )
        record[kernels.BITS] = scheme.bits
        record[kernels.OFFSET] = scheme.code_offset
        record[kernels.BLOCK_SIZE] = scheme.tokens_per_block(tokens)
        record[kernels.KEPT] = kept
        record[kernels.PER_CHANNEL] = scheme.axis == "channel"
        record[kernels.SYMMETRIC] = scheme.symmetric
        record[kernels.RENORMALIZE] = scheme.separate_norm and scheme.magnitude == "norm"
        record[kernels.SCALE_KIND] = _KINDS[block.scale.dtype]
        record[kernels.NORM_KIND] = _KINDS[norm.dtype]
    record[kernels.TOKENS] = tokens
    arrays = tuple(map(_contiguous_heads, arrays))
    _locate(record, arrays)
    return PreparedPiece(kv_heads, tokens, head_dim, source, arrays, record)


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

    Scales and zeros join the query and the output, gains the scores and the weights; in between
    there are sums of integer codes. Results do not depend on the number of threads, nor on how the
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
    kernels = _kernels()
    (query,) = _floats(3, query=query)
    heads, query_tokens, head_dim = query.shape
    value_dim = head_dim
    if value_head_dim is not None:
        value_dim = as_integer("value_head_dim", value_head_dim, least=1)
    key_scheme = as_scheme("key_scheme", key_scheme)
    value_scheme = as_scheme("value_scheme", value_scheme)
    key_pieces = [prepare(source, key_scheme, head_dim) for source in keys]
    value_pieces = [prepare(source, value_scheme, value_dim) for source in values]
    kv_heads, tokens = _require_pieces(key_pieces, value_pieces, head_dim, value_dim)
    group = _group(heads, kv_heads)
    scale, softcap, window = require_options(head_dim, scale, causal, softcap, sliding_window)
    if query_tokens > tokens:
        raise ValueError(
            f"query has {query_tokens} tokens, but keys have {tokens}: queries are the last tokens "
            "of their sequence, whose keys must be there"
        )
    _finite("query", query)
    with np.errstate(over="ignore"):
        scaled = (query.astype(np.float32) * np.float64(scale)).astype(np.float32)
    _finite("query * scale, in float32,", scaled)
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
        count, products = some.shape[1], some.shape[1] * kv_heads * (high - low)
        # Rows are written side by side: their length must not be a multiple of a cache's period.
        scores = np.empty((kv_heads, count, (high - low) // 32 * 32 + 48), np.float32)
        table, edges = _segments(key_pieces, low, high)
        tasks = kv_heads * (len(edges) - 1)
        kernels.run(kernels.score_pieces, tasks, products * head_dim, table, edges, some, scores)
        seen = scores[:, :, : high - low]
        mask = None
        if stop - start > 1:
            visible = _visible(tokens, query_tokens, causal, window, start, stop, low, high)
            mask = None if visible.all() else visible
        kernels.run(_softmax, kv_heads, products * head_dim, seen, group, softcap, mask)
        if shown is not None:
            shown[:, start:stop, :, low:high] = seen.reshape(kv_heads, -1, group, high - low)
        table, edges = _segments(value_pieces, low, high)
        tasks = kv_heads * (len(edges) - 1)
        parts = np.zeros((tasks, count, value_dim))
        kernels.run(kernels.add_pieces, tasks, products * value_dim, table, edges, scores, parts)
        total = parts.reshape(kv_heads, -1, stop - start, group, value_dim).sum(axis=1)
        output[:, start:stop] = np.clip(total, -MOST, MOST)
    return (
        output.swapaxes(1, 2).reshape(heads, query_tokens, value_dim),
        None if shown is None else shown.swapaxes(1, 2).reshape(heads, query_tokens, tokens),
    )


def _locate(record: npt.NDArray[np.int64], arrays: tuple[Array, ...]) -> None:
    """Write where the arrays lie, which kernels do not ask Python for."""
    for i, array in enumerate(arrays):
        record[i] = array.ctypes.data
        record[_kernels().STRIDES + i] = array.strides[0]


def _kernels() -> Any:
    """Numba takes long to import, and the reference does without."""
    from nsq_ref import attention_kernels  # noqa: PLC0415

    return attention_kernels


# How the kernels name the dtypes: FLOAT16, BFLOAT16, FLOAT32.
_KINDS = {dtype: kind for kind, dtype in enumerate(FLOAT_DTYPES.values())}


def _contiguous_heads(array: Array) -> Array:
    """Return an array each of whose heads is contiguous, the same one if possible."""
    expected = array.itemsize
    for axis in range(array.ndim - 1, 0, -1):
        if array.shape[axis] > 1 and array.strides[axis] != expected:
            return np.ascontiguousarray(array)
        expected *= array.shape[axis]
    return array


def _segments(
    pieces: Sequence[PreparedPiece], low: int, high: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the records of the pieces that hold tokens [low, high), and where segments end.

    Where they end depends on the pieces alone, so that who does the work cannot change a sum.
    """
    kernels = _kernels()
    records, spans, edges, size, at = [], [], [0], 0, 0
    for piece in pieces:
        first, last = max(low - at, 0), min(high - at, piece.tokens)
        if first < last:
            records.append(piece.record)
            spans.append((first, last, at + first - low))
            size += last - first
            if size >= SEGMENT_TOKENS:
                edges.append(len(records))
                size = 0
        at += piece.tokens
    if edges[-1] < len(records):
        edges.append(len(records))
    table = np.array(records)
    table[:, [kernels.FIRST, kernels.LAST, kernels.COLUMN]] = spans
    return table, np.array(edges)


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


def _visible(
    tokens: int,
    query_tokens: int,
    causal: bool,
    sliding_window: int | None,
    start: int = 0,
    stop: int | None = None,
    low: int = 0,
    high: int | None = None,
) -> npt.NDArray[np.bool_]:
    """Whether query i of [start, stop) sees position t of [low, high): [queries, tokens] (A2)."""
    position = np.arange(start, query_tokens if stop is None else stop)[:, None]
    position = position + tokens - query_tokens
    token = np.arange(low, tokens if high is None else high)
    visible = np.ones((len(position), len(token)), bool)
    if causal:
        visible &= token <= position
    if sliding_window is not None:
        visible &= token > position - sliding_window
    return visible


# --- refusals ------------------------------------------------------------------------------------


def _floats(axes: int, **given: Any) -> list[Array]:
    """Return arrays by their names, if all have that many axes."""
    taken = []
    for name, x in given.items():
        array = as_float_array(name, x)
        if array.ndim != axes:
            raise ValueError(
                f"{name} has {array.ndim} axes, {list(array.shape)}; {axes} are needed"
            )
        taken.append(array)
    return taken


def _finite(name: str, array: Array, *row: int) -> Array:
    """Return the array, unless something in it is not finite; `row` is where it comes from."""
    if np.isfinite(array).all():
        return array
    index = [*row, *(int(i) for i in np.argwhere(~np.isfinite(array))[0])]
    raise ValueError(
        f"{name}{index} is not finite; mend it, or leave it out with lengths or query_lengths"
    )


def _group(heads: int, kv_heads: int) -> int:
    """Return how many query heads share keys and values."""
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"query has {heads} heads, keys and values have {kv_heads}; query heads are a positive "
            "multiple of them"
        )
    return heads // kv_heads


class _Options(NamedTuple):
    scale: float
    softcap: float | None
    sliding_window: int | None


def require_options(
    head_dim: int,
    scale: float | None,
    causal: bool,
    softcap: float | None,
    sliding_window: int | None,
) -> _Options:
    """Return the options as plain numbers, after all make sense."""
    if not head_dim:
        raise ValueError("query has D = 0; leave such heads out")
    factor = 1 / math.sqrt(head_dim) if scale is None else as_float("scale", scale)
    if not math.isfinite(factor):
        raise ValueError(f"scale={factor} is not finite; leave it out for 1 / sqrt(D)")
    cap = None if softcap is None else as_float("softcap", softcap)
    if cap is not None and not (math.isfinite(cap) and cap > 0):
        raise ValueError(f"softcap={cap} is not a positive number; leave it out for none")
    if sliding_window is None:
        return _Options(factor, cap, None)
    window = as_integer("sliding_window", sliding_window)
    if window < 1:
        raise ValueError(
            f"sliding_window={window} is not a positive integer; leave it out for none"
        )
    if not causal:
        raise ValueError(
            f"sliding_window={window} counts positions back from the query's own, which "
            "causal=False does not; use one of the two"
        )
    return _Options(factor, cap, window)


def _require_lengths(
    name: str, lengths: Array | Sequence[int] | None, batch: int, most: int
) -> list[int]:
    return [most] * batch if lengths is None else as_integers(name, lengths, batch, 0, most)


def _require_block(block: spec.Block, scheme: Scheme, head_dim: int) -> tuple[int, int]:
    """Return kv_heads and tokens, after every part has the shape and dtype of the scheme's."""
    if block.codes.ndim != 3:
        raise ValueError(f"codes of a piece have {block.codes.ndim} axes; 3 are needed")
    kv_heads, tokens = block.codes.shape[:2]
    blocks = -(-tokens // (scheme.block_size or max(tokens, 1)))
    kept = min(scheme.outlier_channels, head_dim)
    scale = (
        (blocks, head_dim) if scheme.axis == "channel" else (tokens, 1),
        FLOAT_DTYPES[scheme.scale_dtype],
    )
    expected: dict[str, tuple[tuple[int, ...], Any]] = {
        "codes": ((tokens, row_bytes(head_dim, scheme.bits)), np.dtype(np.uint8)),
        "scale": scale,
    }
    if scheme.separate_norm:
        expected["norm"] = ((tokens,), FLOAT_DTYPES[scheme.norm_dtype])
    if not scheme.symmetric:
        expected["zero"] = scale
    if kept:
        expected["outlier_index"] = ((blocks, kept), np.dtype(np.int32))
        expected["outliers"] = ((tokens, kept), np.dtype(np.float16))
    for name, (shape, dtype) in expected.items():
        part = getattr(block, name)
        if part.shape != (kv_heads, *shape) or part.dtype != dtype:
            raise ValueError(
                f"{name} of a piece is {part.dtype} {list(part.shape)}; for {tokens} tokens of "
                f"{head_dim} channels, {scheme} stores {dtype} {[kv_heads, *shape]}"
            )
    index = block.outlier_index
    if kept and not ((index >= 0) & (index < head_dim)).all():
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

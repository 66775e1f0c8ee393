"""How far a kernel in float32 may be from the reference (A3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nsq_ref import packing, spec
from nsq_ref.arrays import as_real_array
from nsq_ref.attention.options import floats, require_lengths, require_options
from nsq_ref.attention.reference import Attention, attend, visible_tokens
from nsq_ref.codec import Quantized, block_of
from nsq_ref.dtypes import Array, Float64
from nsq_ref.environment import in_default_environment

__all__ = ["reach", "tolerance"]


UNIT = 2.0**-24  # the relative error of one float32 operation
TOKEN_ROUNDINGS = 512  # that a term may pass in a sum over tokens: a kernel adds in tiles
LEAST_LENGTH = 2.0**-60  # of a direction whose length float32 squares can tell
LEAST_WEIGHT = 2.0**-125  # before normalization, smaller ones may be flushed


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
    >>> from nsq_ref import Scheme, quantize
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
    query, keys, values = floats(4, query=query, keys=keys, values=values)
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
    valid = require_lengths("lengths", lengths, batch, keys.shape[2])
    valid_queries = require_lengths("query_lengths", query_lengths, batch, query_tokens)
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
        visible = visible_tokens(n, m, causal, window)
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

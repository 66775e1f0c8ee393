"""What a port must answer: the specification on arrays with sinks, growing sequences, attention.

Plain NumPy on top of `spec`, for reading and for being changed: `reference` loads this module and
those it uses once more for every known mistake, and puts the mistake in place of a function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nsq_ref import attention, packing, rounding, spec
from nsq_ref.dtypes import Array, Float32, Float64
from nsq_ref.feedback import HeadFeedback
from nsq_ref.scheme import Scheme

Parts = dict[str, Array]
BLOCK_PARTS = ("norm", "scale", "zero", "outlier_index", "outliers")
APPEND, CROP = range(2)  # kinds of steps
HEAD_AXES = (-3, -2, -3, -3, -3, -3, -2)  # of the heads in each part of `spec.Block`


# --- whole arrays -------------------------------------------------------------------------------


def split_sinks(x: Array, scheme: Scheme) -> tuple[Array, Float32]:
    """Return the sinks as they are and the other tokens widened (rules K1, I1)."""
    sinks = min(scheme.sink_tokens, x.shape[-2])
    return x[..., :sinks, :], x[..., sinks:, :].astype(np.float32)


def encode(x: Array, scheme: Scheme) -> Parts:
    """Quantize ``x[..., T, D]`` to the parts that the specification's table lists.

    Examples
    --------
    >>> parts = encode(np.float32([[3, 4], [-1.5, 2]]), Scheme())
    >>> list(parts), parts["norm"]
    (['packed', 'norm', 'scale'], array([5. , 2.5], dtype=float16))
    """
    sinks, coded = split_sinks(x, scheme)
    if not coded.shape[-2]:
        return {**empty_parts(x, scheme), **({"sinks": sinks} if scheme.sink_tokens else {})}
    return parts_of(sinks, spec.encode_blocks(coded, scheme), scheme)


def encode_with_feedback(x: Array, scheme: Scheme, order: Array, factor: Array) -> Parts:
    """Quantize ``x[..., T, D]`` with the feedback of each key/value head (rule F1).

    Examples
    --------
    >>> order, factor = np.int32([[1, 0]]), np.float32([[[1, -1], [0, 1]]])
    >>> x = np.float32([[7, 7], [0.25, 0.5]])
    >>> parts = encode_with_feedback(x, Scheme(separate_norm=False), order, factor)
    >>> packing.unpack(parts["packed"], Scheme(), 2)[1]
    array([1, 0], dtype=int16)
    """
    sinks, coded = split_sinks(x, scheme)
    if not coded.size:
        return encode(x, scheme)
    return parts_of(sinks, blocks_with_feedback(coded, scheme, order, factor), scheme)


def blocks_with_feedback(x: Float32, scheme: Scheme, order: Array, factor: Array) -> spec.Block:
    """Quantize the tokens after the sinks, head by head (rule F1)."""
    heads = heads_of(order, factor)
    blocks = [
        spec.encode_blocks(of_head(x, head, len(heads)), scheme, feedback)
        for head, feedback in enumerate(heads)
    ]
    parts = zip(HEAD_AXES, zip(*blocks, strict=True), strict=True)
    return spec.Block(*(with_heads(arrays, axis) for axis, arrays in parts))


def norms_and_sizes(x: Float32, scheme: Scheme) -> tuple[Float32, Float32]:
    """Return what `spec.norms_and_sizes` does of each block (rule B1), sizes as ``[..., T, D]``.

    Examples
    --------
    >>> x = np.float32([[3, 64], [-4, 32], [2, -64]])
    >>> scheme = Scheme(norm_rule="balanced", magnitude="gain", block_size=3)
    >>> both = np.concatenate([x, x + np.float32([0, 1024])])
    >>> norms_and_sizes(both, scheme)[1][:, 0].tolist()
    [0.0625, 0.0625, 0.0625, 1.0, 1.0, 1.0]
    """
    found = [
        spec.norms_and_sizes(x[..., rows, :], scheme)
        for rows in spec.block_slices(x.shape[-2], scheme)
    ]
    none = x[..., :0, :]  # of no tokens there are no blocks
    sizes = [np.repeat(size, norm.shape[-1], axis=-2) for norm, size in found]
    return (
        np.concatenate([none[..., 0], *(norm for norm, _ in found)], axis=-1),
        np.concatenate([none, *sizes], axis=-2),
    )


def heads_of(order: Array, factor: Array) -> list[HeadFeedback]:
    """Return the feedback of each key/value head (rule F1)."""
    return [HeadFeedback(*one) for one in zip(order, factor, strict=True)]


def of_head(array: Array, head: int, kv_heads: int) -> Array:
    """Return a head of ``[..., kv_heads, T, D]``; all of them where they share their feedback."""
    return array if kv_heads == 1 else array[..., head, :, :]


def with_heads(arrays: tuple[Array, ...], axis: int) -> Array:
    """Put heads together again, on this axis; the inverse of `of_head`."""
    return arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=axis)


def measured(
    fed: spec.FedBack,
    direction: Float32,
    coded: Array,
    norm: Float32,
    feedback: HeadFeedback,
    scheme: Scheme,
) -> Float32:
    """Return what scales are made of: w, but those of tokens of the plain directions (rule F1)."""
    return direction if scheme.axis == "token" else fed.w


def extents(blocks: list[Float32], coded: list[Array], scheme: Scheme) -> list[Any]:
    """Return minima and maxima of what the scales of each block are made of (rules B1, F1)."""
    return [extent_of_channels(*one, scheme) for one in zip(blocks, coded, strict=True)]


def extent_of_channels(values: Float32, coded: Array, scheme: Scheme) -> tuple[Array, Array]:
    """Return `spec.extent`; with axis channel one after the other, as F1 makes their scales."""
    if scheme.axis == "token":
        low, high = spec.extent(values, coded, scheme)
        return low, high
    ends = [
        spec.extent(values[..., j : j + 1], coded[..., j : j + 1], scheme)
        for j in range(values.shape[-1])
    ]
    low, high = (np.concatenate(side, axis=-1) for side in zip(*ends, strict=True))
    return low, high


def decode(parts: Mapping[str, Array], scheme: Scheme, shape: tuple[int, ...]) -> Array:
    """Reconstruct ``x_hat[..., T, D]`` from the parts (rule D1).

    Examples
    --------
    >>> x = np.float32([[3, 4], [-1.5, 2]])
    >>> decode(encode(x, Scheme()), Scheme(), x.shape)
    array([[ 3. ,  4. ],
           [-1.5,  2. ]], dtype=float32)
    """
    decoded = []
    if scheme.sink_tokens:
        decoded.append(parts["sinks"].astype(np.float32))
    if parts["packed"].shape[-2]:
        decoded.append(spec.decode_blocks(block_of(parts, scheme, shape[-1]), scheme))
    return np.concatenate(decoded, axis=-2)


def decode_sides(*sides: tuple[Mapping[str, Array], tuple[int, ...], Scheme]) -> list[Array]:
    """Reconstruct the keys and the values of attention, each by its own scheme."""
    return [decode(parts, scheme, shape) for parts, shape, scheme in sides]


def parts_of(sinks: Array, block: spec.Block, scheme: Scheme) -> Parts:
    """Return a block as the parts that the scheme stores."""
    parts = {"packed": packing.pack(block.codes, scheme)}
    stored = scheme.layout(scheme.sink_tokens + 1, 1)
    parts.update({name: getattr(block, name) for name in BLOCK_PARTS if name in stored})
    if scheme.sink_tokens:
        parts["sinks"] = sinks
    return parts


def block_of(parts: Mapping[str, Array], scheme: Scheme, head_dim: int) -> spec.Block:
    """Return the parts as the specification takes them: what the scheme implies filled in."""
    packed, scale = parts["packed"], parts["scale"]
    tokens = packed.shape[:-1]
    blocks = (*tokens[:-1], len(spec.block_slices(tokens[-1], scheme)))
    return spec.Block(
        codes=packing.unpack(packed, scheme, head_dim),
        norm=parts.get("norm", np.ones(tokens, np.float32)),
        scale=scale,
        zero=parts.get("zero", np.full_like(scale, -0.0)),
        outlier_index=parts.get("outlier_index", np.zeros((*blocks, 0), np.int32)),
        outliers=parts.get("outliers", np.zeros((*tokens, 0), np.float16)),
        collapsed=np.zeros(tokens, bool),
    )


def empty_parts(x: Array, scheme: Scheme) -> Parts:
    """Return the parts of a sequence none of whose tokens is coded."""
    layout = scheme.layout(min(scheme.sink_tokens, x.shape[-2]), x.shape[-1], x.dtype)
    lead = x.shape[:-2]
    return {
        name: np.zeros((*lead, *part.shape), part.dtype)
        for name, part in layout.items()
        if name != "sinks"
    }


# --- sequences that grow and shrink -------------------------------------------------------------


@dataclass
class Sequence:
    """One row of a cache: its sinks, the blocks that are sealed, and the tail."""

    scheme: Scheme
    dtype: np.dtype[Any]
    head_dim: int
    sinks: list[Array] = field(default_factory=list)
    blocks: list[spec.Block] = field(default_factory=list)
    tail: list[Array] = field(default_factory=list)
    feedback: HeadFeedback | None = None

    @property
    def block_size(self) -> int:
        """Tokens of a block; a cache needs a number (rule B1)."""
        if self.scheme.block_size is None:
            raise ValueError("a cache needs a block_size: one block of all tokens is never full")
        return self.scheme.block_size


def stream(x: Array, scheme: Scheme, steps: Array, row: int) -> Parts:
    """Return what a cache stores for a row after some appends and crops (rules B1, B2, C1, K1).

    Parameters
    ----------
    x : array, shape [rows, T, D]
        Each row's tokens, appended in order.
    scheme : Scheme
        With a block size.
    steps : int array, shape [steps, 1 + rows]
        The kind, 0 for append and 1 for crop, and for each row how many tokens are appended, or
        to what length it is cropped.
    row : int

    Returns
    -------
    dict of str to array
        The parts of all sealed blocks, the sinks, and ``tail``.

    Examples
    --------
    >>> x = np.ones((1, 5, 2), np.float32)
    >>> stored = stream(x, Scheme(block_size=2), np.int32([[0, 5], [1, 3]]), row=0)
    >>> stored["packed"].shape, stored["tail"].shape
    ((2, 1), (1, 2))
    """
    return lived(Sequence(scheme, x.dtype, x.shape[-1]), x[row], steps[:, [0, 1 + row]])


def stream_with_feedback(
    x: Array, scheme: Scheme, steps: Array, row: int, order: Array, factor: Array
) -> Parts:
    """Return what `stream` does, of keys: each row is of a head, or all are of one (rule F1).

    Examples
    --------
    >>> x = np.float32([[[7, 7], [0.25, 0.5]]])
    >>> order, factor = np.int32([[1, 0]]), np.float32([[[1, -1], [0, 1]]])
    >>> scheme = Scheme(separate_norm=False, block_size=2)
    >>> parts = stream_with_feedback(x, scheme, np.int32([[0, 1], [0, 1]]), 0, order, factor)
    >>> packing.unpack(parts["packed"], scheme, 2)[1]
    array([1, 0], dtype=int16)
    """
    heads = heads_of(order, factor)
    feedback = heads[row if len(heads) > 1 else 0]
    sequence = Sequence(scheme, x.dtype, x.shape[-1], feedback=feedback)
    return lived(sequence, x[row], steps[:, [0, 1 + row]])


def lived(sequence: Sequence, x: Array, steps: Array) -> Parts:
    """Return what a sequence stores after its own steps."""
    at = 0
    for kind, count in steps.tolist():
        if kind == APPEND:
            append(sequence, x[at : at + count])
            at += count
        else:
            crop(sequence, count)
    return stored(sequence)


def append(sequence: Sequence, tokens: Array) -> None:
    """Add tokens: to the sinks first, then to the tail, which is sealed when it is full."""
    for token in tokens:
        if len(sequence.sinks) < sequence.scheme.sink_tokens:
            sequence.sinks.append(token)
            continue
        sequence.tail.append(token)
        if is_full(sequence):
            seal(sequence)


def is_full(sequence: Sequence) -> bool:
    """Whether the tail is a whole block (rule B1)."""
    return len(sequence.tail) == sequence.block_size


def seal(sequence: Sequence) -> None:
    """Code the tail as a block whose scales never change after that (rules B1, F1)."""
    tokens = np.stack(sequence.tail).astype(np.float32)
    sequence.blocks.append(spec.encode(tokens, sequence.scheme, sequence.feedback))
    sequence.tail.clear()


def crop(sequence: Sequence, length: int) -> None:
    """Keep the first ``length`` tokens (rules C1, K1)."""
    after_sinks = max(length - len(sequence.sinks), 0)
    del sequence.sinks[length:]
    whole, rest = divmod(after_sinks, sequence.block_size)
    if whole < len(sequence.blocks):
        sequence.tail = survivors(sequence, sequence.blocks[whole], rest)
    else:
        del sequence.tail[rest:]
    del sequence.blocks[whole:]


def survivors(sequence: Sequence, block: spec.Block, count: int) -> list[Array]:
    """Return the first tokens of a sealed block as the tail keeps them (rule C1)."""
    decoded = spec.decode(block, sequence.scheme)[:count]
    return list(rounding.saturate(decoded, sequence.dtype))


def stored(sequence: Sequence) -> Parts:
    """Return what the sequence stores, as arrays."""
    shape = (len(sequence.sinks), sequence.head_dim)
    sinks = np.array(sequence.sinks, sequence.dtype).reshape(shape)
    if sequence.blocks:
        joined = spec.Block(*map(np.concatenate, zip(*sequence.blocks, strict=True)))
        parts = parts_of(sinks, joined, sequence.scheme)
    else:
        parts = empty_parts(sinks, sequence.scheme)
        if sequence.scheme.sink_tokens:
            parts["sinks"] = sinks
    shape = (len(sequence.tail), sequence.head_dim)
    parts["tail"] = np.array(sequence.tail, sequence.dtype).reshape(shape)
    return parts


# --- attention ----------------------------------------------------------------------------------


def attend(query: Array, keys: Array, values: Array, options: Mapping[str, Any]) -> Float64:
    """Attend in float64 over decoded keys and values (rules A1, A2); one row, no batch axis."""
    attended = attention.attend(query[None], keys[None], values[None], **options)
    return np.asarray(attended.output[0], np.float64)

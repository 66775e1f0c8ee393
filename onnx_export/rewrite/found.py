"""What a pattern says of an attention with a cache, and of one that it refuses.

Patterns read; they change nothing. `onnx_export.rewrite.core` makes an ``nsq.Attention`` of every
`Found`, brings its tensors into the layouts of that operator, and sees to what else reads a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import onnx_ir as ir

    from onnx_export.rewrite.graph import Graph

__all__ = [
    "Bias", "Cache", "Found", "Layout", "Lengths", "Norm", "Pattern", "Refused", "Rotary", "Tokens",
]  # fmt: skip

Layout: TypeAlias = Literal["BSH", "BSND", "BNSD", "BNDS"]
"""The axes of a tensor: batch, tokens (S), heads (N), channels of a head (D), of all heads (H)."""


class Tokens(NamedTuple):
    """Queries, keys, values or outputs of the new tokens.

    Attributes
    ----------
    value : onnx_ir.Value
    layout : {"BSH", "BSND", "BNSD", "BNDS"}
    """

    value: ir.Value
    layout: Layout


class Cache(NamedTuple):
    """The past and the present of keys or of values.

    Attributes
    ----------
    past, present : onnx_ir.Value
        What the attention takes and what comes of it: an input and an output of the model, or the
        core refuses. Before `repeat_kv`: with ``kv_heads`` heads.
    layout : {"BSH", "BSND", "BNSD", "BNDS"}
        S is the length of the past tensor, or its capacity.
    capacity : int, optional
        S, where it is one number for good: of a window of tokens that evicts the oldest.
    """

    past: ir.Value
    present: ir.Value
    layout: Layout = "BNSD"
    capacity: int | None = None


class Lengths(NamedTuple):
    """Where the numbers of tokens of each row come from; int32 or int64 ``[batch]`` each.

    With neither, the past tensor's own extent is the length of every row, and all new tokens are
    appended to it: what Concat does. With ``total`` alone, ``min(sequence, total)`` of the new
    tokens are real, as for GroupQueryAttention. With ``past`` alone all are. Two of the three are
    enough.

    Attributes
    ----------
    past : onnx_ir.Value, optional
        Tokens in the cache before this call, such as ``write_indices``.
    total : onnx_ir.Value, optional
        With the new ones, such as ``nonpad_kv_seqlen``.
    total_offset : int
        Added to ``total``: 1 for ``seqlens_k``.
    new : onnx_ir.Value, optional
        New tokens of each row that are no padding, such as ``query_seqlens``.
    """

    past: ir.Value | None = None
    total: ir.Value | None = None
    total_offset: int = 0
    new: ir.Value | None = None

    @property
    def of_extent(self) -> bool:
        """Whether the extent of the past tensor is the length of every row."""
        return self.past is None and self.total is None


class Rotary(NamedTuple):
    """Rotation of queries and keys inside of the attention, before the cache.

    Attributes
    ----------
    cos, sin : onnx_ir.Value
        ``[positions, R / 2]``, in the dtype of the model.
    interleaved : bool
    position_ids : onnx_ir.Value, optional
        int64 ``[batch, sequence]``; the place in the sequence by default.
    first_prompt : onnx_ir.Value, optional
        A scalar, int32 or int64. Where it is the number of new tokens, positions are counted up
        from the very first of ``position_ids``: what GroupQueryAttention does on a CPU.
    """

    cos: ir.Value
    sin: ir.Value
    interleaved: bool = False
    position_ids: ir.Value | None = None
    first_prompt: ir.Value | None = None


class Bias(NamedTuple):
    """What is added to scores.

    Attributes
    ----------
    value : onnx_ir.Value
        Float, in the dtype of the model.
    factor : float
        By which it is multiplied: where scores are scaled after it is added.
    flat : bool
        Batch and heads are one axis, the first of three.
    """

    value: ir.Value
    factor: float = 1.0
    flat: bool = False


class Norm(NamedTuple):
    """The root mean square of each head brought to 1, and channels weighted, before the rotation.

    Attributes
    ----------
    weight : onnx_ir.Value
        ``[head_dim]``, in the dtype of the model.
    epsilon : float
        Added to the mean of the squares.
    """

    weight: ir.Value
    epsilon: float


@dataclass(frozen=True, eq=False)
class Found:
    """One attention with a cache, of whatever nodes it is made.

    Attributes
    ----------
    pattern : str
        What users call it, such as "GroupQueryAttention".
    node : onnx_ir.Node
        That it is named by in reports; the new node stands in its place, so all inputs below must
        be computed before it.
    nodes : tuple of onnx_ir.Node
        All that are replaced, ``node`` among them. The core refuses where something else reads what
        they make, besides ``output`` and the two presents. Nodes that nobody reads any longer are
        removed without being listed: what expands keys, say, or makes a mask.
    query : Tokens
        Or query, key and value packed behind each other, ``"BSH"``, with ``key`` and ``value``
        None.
    key, value : Tokens or None
        As they are appended to the cache, before `repeat_kv`.
    output : Tokens
        Of the attention, before the projection.
    key_cache, value_cache : Cache
    heads, kv_heads, head_dim, value_head_dim : int
    dtype : {"float32", "float16"}
        Of all tensors here.
    lengths : Lengths
    scale : float or None
        Of the scores, all factors of queries and keys after the cache included; None for
        ``1 / sqrt(head_dim)``.
    causal : bool
        A query sees the past and the new tokens up to its own.
    softcap : float or None
    sliding_window : int or None
        Positions that a query sees, its own among them.
    rotary : Rotary or None
        What rotates outside is no part of this.
    bias : onnx_ir.Value or None
        Float, in the dtype of the model, added to the scores after the softcap: of any shape that
        broadcasts to ``[batch, heads, sequence, past + sequence]``, but for its last axis, which is
        as long as the tokens of the longest row or longer. Its rank must be known.
    added : tuple of Bias
        More that is added, each of a shape as ``bias``.
    mask : onnx_ir.Value or None
        bool, True where a query sees a token; shaped as ``bias``. Both may be there.
    mask_hides : bool
        The mask is True where a query does not see a token.
    head_sink : onnx_ir.Value or None
        ``[heads]``, or of more axes of size 1.
    smooth_softmax : bool
        A logit of 0 joins every softmax.
    query_norm, key_norm : Norm or None
        What normalizes outside is no part of this.
    projection_bias : onnx_ir.Value or None
        ``[heads * head_dim + kv_heads * (head_dim + value_head_dim)]``, added to queries, keys and
        values before all else.
    padding : onnx_ir.Value or None
        Integers, ``[batch, past + sequence]`` or with the new tokens between: 0 where no query, or
        not this one, sees a token.
    """

    pattern: str
    node: ir.Node
    nodes: tuple[ir.Node, ...]
    query: Tokens
    key: Tokens | None
    value: Tokens | None
    output: Tokens
    key_cache: Cache
    value_cache: Cache
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: Literal["float32", "float16"]
    lengths: Lengths = field(default_factory=Lengths)
    scale: float | None = None
    causal: bool = True
    softcap: float | None = None
    sliding_window: int | None = None
    rotary: Rotary | None = None
    bias: ir.Value | None = None
    added: tuple[Bias, ...] = ()
    mask: ir.Value | None = None
    mask_hides: bool = False
    head_sink: ir.Value | None = None
    smooth_softmax: bool = False
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    projection_bias: ir.Value | None = None
    padding: ir.Value | None = None


class Refused(NamedTuple):
    """An attention that stays as it is.

    Attributes
    ----------
    node : onnx_ir.Node
    reason : str
        What is in the way, and the remedy if there is one: "k_quant_type is PER_TENSOR; ...".
    caches : tuple of Cache
        That stay with it, as far as they are known: the metadata of the model names them.
    """

    node: ir.Node
    reason: str
    caches: tuple[Cache, ...] = ()


class Pattern(Protocol):
    """A module of `onnx_export.rewrite.patterns`: one way in which exporters write attention."""

    ANCHORS: frozenset[tuple[str, str]]
    """Domain and operator of the nodes to try: each attention has one, found by no other pattern.
    Standard operators have domain ""."""

    def match(self, node: ir.Node, graph: Graph) -> Found | Refused | None:
        """Say what attention a node belongs to.

        Parameters
        ----------
        node : onnx_ir.Node
            One of `ANCHORS`, in the main graph of the model.
        graph : Graph
            What is known of the values around it.

        Returns
        -------
        Found, Refused or None
            None where the node is part of no attention, or of one without a cache.
        """
        ...

"""Models and buffers of nsq.Attention: attention over a quantized cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from nsq_ref.arrays import as_integer
from nsq_ref.attention import require_options
from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.extras import extra
from nsq_ref.feedback import Feedback
from nsq_ref.scheme import Field, FloatName, Scheme, as_scheme
from onnx_export.operators.domain import functions
from onnx_export.operators.nodes import Nodes, make_model
from onnx_export.operators.schema import (
    ATTENTION,
    BUFFER_ATTENTION,
    CACHE_PARTS,
    OPSET,
    scheme_attributes,
)

with extra("onnx", __name__):
    import onnx
    from onnx import numpy_helper

__all__ = ["attention_model", "attention_node", "cache_fields", "feedback_tensors"]

# Those of the cache follow from the schemes.
OPTIONAL = [name for name in ATTENTION.inputs if name in ATTENTION.optional and name[:5] != "past_"]


def cache_fields(
    key: Scheme | str,
    value: Scheme | str,
    *,
    kv_heads: int,
    head_dim: int,
    value_head_dim: int | None = None,
    capacity: int,
    dtype: FloatName = "float32",
) -> dict[str, Field]:
    """Return shape and dtype of every tensor of a cache, the batch axis left out.

    Parameters
    ----------
    key, value : Scheme or str
        Schemes or their names, with a block size and without outlier channels.
    kv_heads, head_dim : int
    value_head_dim : int, optional
        ``head_dim`` by default.
    capacity : int
        Sealed tokens that there is room for, rounded up to whole blocks.
    dtype : {"float32", "float16"}
        Of the model, in which sinks and tail are kept.

    Returns
    -------
    dict of str to Field
        ``key_packed``, ``key_scale`` and so on, in the order of the operator's inputs.

    Raises
    ------
    TypeError
        For sizes that are no integers.
    ValueError
        For a scheme that a cache cannot have, sizes below 1, a capacity below 0, another dtype.

    Examples
    --------
    >>> scheme = Scheme.named("streaming4")
    >>> fields = cache_fields(scheme, scheme, kv_heads=8, head_dim=128, capacity=1000)
    >>> fields["key_packed"].shape, fields["value_tail"].shape
    ((8, 1024, 64), (8, 128, 128))
    """
    ATTENTION.require_dtype(dtype)
    plain = FLOAT_DTYPES[dtype]
    kv_heads = as_integer("kv_heads", kv_heads, least=1)
    capacity = as_integer("capacity", capacity, least=0)
    key_dim, value_dim = _head_dims(head_dim, value_head_dim)
    fields = {}
    for side, given, channels in (("key", key, key_dim), ("value", value, value_dim)):
        scheme, block = _scheme(side, given)
        sinks = scheme.sink_tokens
        stored = scheme.layout(sinks + -(-capacity // block) * block, channels, plain)
        stored["tail"] = Field((block, channels), plain)
        for part in CACHE_PARTS:
            if part in stored:
                shape, kind = stored[part]
                fields[f"{side}_{part}"] = Field((kv_heads, *shape), kind)
    return fields


def attention_node(
    key: Scheme | str,
    value: Scheme | str,
    *,
    heads: int,
    kv_heads: int,
    inputs: Collection[str] = ("key", "value"),
    scale: float | None = None,
    causal: bool = True,
    softcap: float | None = None,
    sliding_window: int | None = None,
    rotary_interleaved: bool = False,
    smooth_softmax: bool = False,
    buffers: bool = False,
) -> onnx.NodeProto:
    """Return a node of nsq.Attention, whose tensors have the names of the operator's.

    Parameters
    ----------
    key, value : Scheme or str
        Schemes or their names, with a block size and without outlier channels.
    heads, kv_heads : int
        Query heads, a multiple of the key/value heads.
    inputs : collection of str
        Which of the optional inputs it has: ``key`` and ``value``, unless the query has both packed
        behind it, ``new_lengths``, ``cos`` and ``sin``, ``position_ids``, ``attention_bias``,
        ``head_sink``, and ``key_order`` and ``key_factor``, with which keys are sealed (F1).
    scale : float, optional
        Of the scores; ``1 / sqrt(head_dim)`` by default. Not 0, which an operator takes for that.
    causal : bool
        A query sees its own position and those before it.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``.
    sliding_window : int, optional
        A query sees this many positions at most, its own the last of them.
    rotary_interleaved : bool
        Rotate channels 2i and 2i + 1 together, not i and i + R / 2.
    smooth_softmax : bool
        Add 1 to the sum of exponentials.
    buffers : bool
        nsq.BufferAttention instead, whose cache is one tensor a side
        (`onnx_export.operators.cache_buffers`).

    Returns
    -------
    onnx.NodeProto

    Raises
    ------
    TypeError
        For heads that are no integers.
    ValueError
        For a scheme that a cache cannot have, heads that do not fit, other inputs, options that
        `nsq_ref.attention.attend` refuses or that are 0 or infinite as float32, and what has no
        effect: ``position_ids`` and ``rotary_interleaved`` without ``cos`` and ``sin``,
        ``smooth_softmax`` with ``head_sink``.

    Examples
    --------
    >>> scheme = Scheme.named("streaming4")
    >>> node = attention_node(scheme, scheme, heads=32, kv_heads=8)
    >>> node.op_type, node.input[:4], node.output[:2]
    ('Attention', ['query', 'key', 'value', 'past_lengths'], ['output', 'present_lengths'])
    """
    schemes = {side: _scheme(side, given)[0] for side, given in (("key", key), ("value", value))}
    heads, kv_heads = as_integer("heads", heads, least=1), as_integer("kv_heads", kv_heads, least=1)
    if heads % kv_heads:
        raise ValueError(f"heads={heads} is not a multiple of kv_heads={kv_heads}")
    _require_inputs(set(inputs), rotary_interleaved, smooth_softmax)
    factor, cap, window = require_options(1, scale, causal, softcap, sliding_window)
    attributes: dict[str, Any] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "scale": _attribute("scale", None if scale is None else factor),
        "causal": int(bool(causal)),
        "softcap": _attribute("softcap", cap),
        "sliding_window": window or 0,
        "rotary_interleaved": int(bool(rotary_interleaved)),
        "smooth_softmax": int(bool(smooth_softmax)),
    }
    cache = set()
    for side, scheme in schemes.items():
        attributes |= scheme_attributes(scheme, f"{side}_")
        del attributes[f"{side}_outlier_channels"]
        parts = (f"_{part}" for part in (*scheme.layout(0, 1), "tail"))
        cache |= {side} if buffers else {f"{side}{part}" for part in parts}
    given = {"query", "past_lengths", *inputs, *(f"past_{name}" for name in cache)}
    made = {"output", "present_lengths", *(f"present_{name}" for name in cache)}
    add = Nodes()
    operator = BUFFER_ATTENTION if buffers else ATTENTION
    add.call(operator, {name: name for name in given}, {name: name for name in made}, **attributes)
    return add.nodes[0]


def feedback_tensors(feedback: Feedback, prefix: str = "") -> dict[str, onnx.TensorProto]:
    """Return feedback of keys (F1) as initializers for nsq.Attention.

    Parameters
    ----------
    feedback : Feedback
        Of the layer.
    prefix : str
        Of the names.

    Returns
    -------
    dict of str to onnx.TensorProto
        By the names of the operator's inputs.

    Examples
    --------
    >>> feedback = Feedback.from_queries(np.eye(4)[None], kv_heads=1)
    >>> [(name, one.name) for name, one in feedback_tensors(feedback, "blk.0.").items()]
    [('key_order', 'blk.0.key_order'), ('key_factor', 'blk.0.key_factor')]
    """
    arrays = {"key_order": feedback.order, "key_factor": feedback.factor}
    return {name: numpy_helper.from_array(x, f"{prefix}{name}") for name, x in arrays.items()}


def attention_model(
    key: Scheme | str,
    value: Scheme | str,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_head_dim: int | None = None,
    dtype: FloatName = "float32",
    opset: int = OPSET,
    **options: Any,
) -> onnx.ModelProto:
    """Return a model of one nsq.Attention, which any ONNX runtime can run.

    Parameters
    ----------
    key, value : Scheme or str
        Schemes or their names, with a block size and without outlier channels.
    heads, kv_heads, head_dim : int
    value_head_dim : int, optional
        ``head_dim`` by default.
    dtype : {"float32", "float16"}
        Of query, keys, values and output.
    opset : int
        Of the standard operators in the function bodies, at least 21. From 24 on they append in
        place and are much faster, in ONNX Runtime 1.26 and later.
    **options
        ``inputs``, ``scale``, ``causal``, ``softcap``, ``sliding_window``, ``rotary_interleaved``
        and ``smooth_softmax``, as `attention_node` takes them.

    Returns
    -------
    onnx.ModelProto
        Its inputs and outputs are those of the node, by the operator's names; batch, tokens and
        capacity are free.

    Raises
    ------
    TypeError
        As `attention_node`, and for other options.
    ValueError
        As `attention_node` and `cache_fields`, for an older opset, and for a value_head_dim of its
        own where the query has keys and values packed behind it.

    Examples
    --------
    One token, with a cache of its own:

    >>> import numpy as np, onnxruntime
    >>> scheme = Scheme.named("streaming4")
    >>> shape = {"kv_heads": 2, "head_dim": 16}
    >>> model = attention_model(scheme, scheme, heads=4, **shape)
    >>> cache = {
    ...     f"past_{name}": np.zeros((1, *field.shape), field.dtype)
    ...     for name, field in cache_fields(scheme, scheme, capacity=128, **shape).items()
    ... }
    >>> x = np.random.default_rng(0).standard_normal((1, 1, 64)).astype(np.float32)
    >>> feeds = {"query": x, "key": x[..., :32], "value": x[..., :32]}
    >>> feeds["past_lengths"] = np.array([0])
    >>> session = onnxruntime.InferenceSession(model.SerializeToString())
    >>> output, lengths = session.run(["output", "present_lengths"], feeds | cache)
    >>> bool((output[..., :16] == x[..., :16]).all()), int(lengths[0])  # attends to itself
    (True, 1)
    """
    heads, kv_heads = as_integer("heads", heads, least=1), as_integer("kv_heads", kv_heads, least=1)
    node = attention_node(key, value, heads=heads, kv_heads=kv_heads, **options)
    head_dim, value_dim = _head_dims(head_dim, value_head_dim)
    ATTENTION.require_dtype(dtype)
    packed = "key" not in node.input
    if packed and value_dim != head_dim:
        raise ValueError(
            f"value_head_dim={value_dim} is not head_dim={head_dim}, which all heads of a packed "
            "query have; give the inputs key and value"
        )
    shapes: dict[str, tuple[str, Sequence[str | int]]] = {
        "query": (dtype, ("B", "S", (heads + 2 * kv_heads * packed) * head_dim)),
        "key": (dtype, ("B", "S", kv_heads * head_dim)),
        "value": (dtype, ("B", "S", kv_heads * value_dim)),
        "past_lengths": ("int64", ("B",)),
        "new_lengths": ("int64", ("B",)),
        "cos": (dtype, ("rotary_positions", "rotary_half")),
        "sin": (dtype, ("rotary_positions", "rotary_half")),
        "position_ids": ("int64", ("B", "S")),
        "attention_bias": (dtype, ("bias_batch", "bias_heads", "S", "bias_tokens")),
        "head_sink": (dtype, (heads,)),
        "key_order": ("int32", ("feedback_heads", head_dim)),
        "key_factor": ("float32", ("feedback_heads", head_dim, head_dim)),
        "output": (dtype, ("B", "S", heads * value_dim)),
        "present_lengths": ("int64", ("B",)),
    }
    fields = cache_fields(
        key, value, kv_heads=kv_heads, head_dim=head_dim, value_head_dim=value_dim, capacity=0,
        dtype=dtype,
    )  # fmt: skip
    for name, field in fields.items():
        # 0 stands where the capacity does.
        axes = ("B", *(size or f"{name}_capacity" for size in field.shape))
        for time in ("past", "present"):
            shapes[f"{time}_{name}"] = field.dtype.name, axes
    given, made = (
        {name: shapes[name] for name in names if name} for names in (node.input, node.output)
    )
    return make_model(
        "attention", [node], given, made, functions=functions(opset, [node]), opset=opset
    )


def _head_dims(head_dim: int, value_head_dim: int | None) -> tuple[int, int]:
    """Return the channels of keys and of values."""
    key_dim = as_integer("head_dim", head_dim, least=1)
    if value_head_dim is None:
        return key_dim, key_dim
    return key_dim, as_integer("value_head_dim", value_head_dim, least=1)


def _require_inputs(inputs: set[str], rotary_interleaved: bool, smooth_softmax: bool) -> None:
    if unknown := inputs - set(OPTIONAL):
        raise ValueError(f"inputs has {sorted(unknown)}; optional are {', '.join(OPTIONAL)}")
    for pair in (("key", "value"), ("cos", "sin"), ("key_order", "key_factor")):
        if len(set(pair) & inputs) == 1:
            raise ValueError(f"inputs has one of {' and '.join(pair)}; give both, or neither")
    if "cos" not in inputs:
        for name, given in (
            ("position_ids", "position_ids" in inputs),
            ("rotary_interleaved", rotary_interleaved),
        ):
            if given:
                raise ValueError(f"{name} has no effect without the inputs cos and sin; add them")
    if smooth_softmax and "head_sink" in inputs:
        raise ValueError(
            "smooth_softmax is a sink of 0 for all heads, which the input head_sink replaces; use "
            "one of the two"
        )


def _attribute(name: str, value: float | None) -> float:
    """Return an option as the node has it: float32, and 0 for the default."""
    if value is None:
        return 0.0
    with np.errstate(over="ignore", under="ignore"):
        narrowed = np.float32(value)
    if narrowed == 0 or not np.isfinite(narrowed):
        raise ValueError(
            f"{name}={value} is {narrowed} as float32, in which the operator has it, and 0 stands "
            "for the default; leave it out for that"
        )
    return float(narrowed)


def _scheme(side: str, given: Scheme | str) -> tuple[Scheme, int]:
    """Return the scheme and its block size, if a cache can have it."""
    scheme = as_scheme(side, given)
    if scheme.block_size is None:
        raise ValueError(f"{side}.block_size is None; a cache needs blocks that become full")
    if scheme.outlier_channels:
        raise ValueError(
            f"{side}.outlier_channels={scheme.outlier_channels}; nsq.Attention has no place for "
            "outliers, use a scheme without"
        )
    return scheme, scheme.block_size

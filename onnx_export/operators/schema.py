"""The domain ``nsq``, version 1: what its operators are called, take, give and are told.

This is the only place that says so in Python. Function bodies, models, nodes and their check are
made from it, and tests hold the native library to it. A change of an operator's inputs, outputs or
attributes is a new `VERSION`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.extras import extra
from nsq_ref.scheme import Scheme

with extra("onnx", __name__):
    from onnx import TensorProto

__all__ = [
    "ATTENTION", "BUFFER_ATTENTION", "CACHE_PARTS", "DEQUANTIZE", "DOMAIN", "ELEMENTS",
    "IR_VERSION", "OPERATORS", "OPSET", "QUANTIZE", "VERSION", "Operator", "scheme_attributes",
]  # fmt: skip

DOMAIN = "nsq"
VERSION = 1
OPSET = 21  # of the standard operators: the least that function bodies can be written in
IR_VERSION = 10  # the first that belongs to this opset

ELEMENTS: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float64": TensorProto.DOUBLE,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}
"""ONNX's element types by the names of NumPy's dtypes."""


class Operator(NamedTuple):
    """What the nodes of an operator have.

    Attributes
    ----------
    name : str
    inputs, outputs : tuple of str
        In the order of the operator.
    optional : frozenset of str
        The inputs and outputs that a node may leave out.
    dtypes : tuple of str
        That its data may have: the array that is quantized, what comes from a model.
    attributes : mapping
        From each name to its default; None is one that every node must have, an integer.
    has_body : bool
        There is a function of standard operators; otherwise only the native library runs it.

    Examples
    --------
    >>> QUANTIZE.inputs, QUANTIZE.outputs[:3], QUANTIZE.attributes["bits"]
    (('x', 'order', 'factor'), ('packed', 'scale', 'norm'), 4)
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    optional: frozenset[str]
    dtypes: tuple[str, ...]
    attributes: Mapping[str, int | float | str | None]
    has_body: bool = True

    def require_dtype(self, dtype: str) -> None:
        """Refuse a dtype that data of the operator cannot have.

        Examples
        --------
        >>> ATTENTION.require_dtype("bfloat16")
        Traceback (most recent call last):
          ...
        ValueError: dtype='bfloat16' is not one of float32, float16
        """
        if dtype not in self.dtypes:
            raise ValueError(f"dtype={dtype!r} is not one of {', '.join(self.dtypes)}")


def scheme_attributes(scheme: Scheme, prefix: str = "") -> dict[str, Any]:
    """Return a scheme as attributes of a node.

    Parameters
    ----------
    scheme : Scheme
    prefix : str
        Of the names, as ``key_``.

    Returns
    -------
    dict
        0 is ``block_size=None``, and dtypes are those of `onnx.TensorProto`.

    Examples
    --------
    >>> attributes = scheme_attributes(Scheme(bits=2), "key_")
    >>> attributes["key_bits"], attributes["key_block_size"], attributes["key_scale_dtype"]
    (2, 0, 10)
    """
    values = scheme.to_dict()
    for name in ("separate_norm", "symmetric"):
        values[name] = int(values[name])
    for name in ("scale_dtype", "norm_dtype"):
        values[name] = ELEMENTS[values[name]]
    values["block_size"] = values["block_size"] or 0
    return {prefix + name: value for name, value in values.items()}


_PARTS = ("packed", "scale", "norm", "zero", "outlier_index", "outliers", "sinks")
_OPTIONAL = frozenset(_PARTS[2:])

QUANTIZE = Operator(
    "Quantize",
    inputs=("x", "order", "factor"),
    outputs=_PARTS,
    optional=_OPTIONAL | {"order", "factor"},
    dtypes=tuple(FLOAT_DTYPES),
    attributes=scheme_attributes(Scheme()),
)
DEQUANTIZE = Operator(
    "Dequantize",
    inputs=(*_PARTS, "head_dim"),
    outputs=("x_hat",),
    optional=_OPTIONAL | {"head_dim"},
    dtypes=("float32",),
    attributes=scheme_attributes(Scheme()),
)

_SIDES = ("key", "value")
CACHE_PARTS = ("packed", "scale", "norm", "zero", "sinks", "tail")
_CACHE = [f"{side}_{part}" for side in _SIDES for part in CACHE_PARTS]
_FEEDBACK = ("key_order", "key_factor")  # the last inputs
_REQUIRED = ("heads", "kv_heads", "key_block_size", "value_block_size")

ATTENTION = Operator(
    "Attention",
    inputs=(
        "query", "key", "value", "past_lengths", "new_lengths", "cos", "sin", "position_ids",
        "attention_bias", "head_sink", *(f"past_{name}" for name in _CACHE), *_FEEDBACK,
    ),
    outputs=("output", "present_lengths", *(f"present_{name}" for name in _CACHE)),
    optional=frozenset(
        (
            "key", "value", "new_lengths", "cos", "sin", "position_ids", "attention_bias",
            "head_sink", *_FEEDBACK,
        )
    ) | {
        f"{time}_{name}"
        for time in ("past", "present")
        for name in _CACHE
        if name.endswith(("norm", "zero", "sinks"))
    },
    dtypes=("float32", "float16"),
    attributes={
        **dict.fromkeys(_REQUIRED),
        "scale": 0.0,
        "causal": 1,
        "softcap": 0.0,
        "sliding_window": 0,
        "rotary_interleaved": 0,
        "smooth_softmax": 0,
        **{
            name: default
            for side in _SIDES
            for name, default in scheme_attributes(Scheme(), f"{side}_").items()
            if name not in _REQUIRED and not name.endswith("outlier_channels")
        },
    },
)  # fmt: skip

_NEW = ATTENTION.inputs[: ATTENTION.inputs.index("past_key_packed")]

BUFFER_ATTENTION = ATTENTION._replace(
    name="BufferAttention",
    inputs=(*_NEW, *(f"past_{side}" for side in _SIDES), *_FEEDBACK),
    outputs=("output", "present_lengths", *(f"present_{side}" for side in _SIDES)),
    optional=ATTENTION.optional & {*_NEW, *_FEEDBACK},
    has_body=False,  # bytes become floats by BitCast only, which opset 26 brings
)
"""Attention on a cache of one tensor a side (`onnx_export.operators.cache_buffers`)."""

OPERATORS = {
    operator.name: operator for operator in (QUANTIZE, DEQUANTIZE, ATTENTION, BUFFER_ATTENTION)
}

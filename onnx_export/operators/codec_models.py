"""Models that quantize or dequantize one array, as a scheme of NSQ-1 says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from nsq_ref import __version__
from nsq_ref.arrays import as_integer
from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.extras import extra
from nsq_ref.feedback import Feedback
from nsq_ref.files import atomic
from nsq_ref.scheme import SPEC_VERSION, FloatName, Scheme, as_scheme
from onnx_export.operators.codec import dequantize, quantize
from onnx_export.operators.nodes import Nodes, make_model
from onnx_export.operators.schema import DEQUANTIZE, QUANTIZE, scheme_attributes

with extra("onnx", __name__):
    import onnx
    from onnx import numpy_helper

__all__ = ["dequantize_model", "quantize_model", "save_models"]

LEAST_AXES = 2
# The operators have them as float32 that holds values of the stored dtypes.
WIDENED = ("scale", "norm", "zero")


def quantize_model(
    scheme: Scheme | str,
    dtype: FloatName = "float32",
    rank: int | None = None,
    feedback: Feedback | None = None,
) -> onnx.ModelProto:
    """Return a model that quantizes an array.

    Parameters
    ----------
    scheme : Scheme or str
        A scheme or its name.
    dtype : {"float32", "float16", "bfloat16"}
        Of the input.
    rank : int, optional
        Number of axes of the input. By default any number is taken, which ONNX Runtime
        allows, though `onnx.checker` asks that the number be known.
    feedback : Feedback, optional
        Of keys (F1), as `nsq_ref.quantize` takes it. The model holds it.

    Returns
    -------
    onnx.ModelProto
        Input ``x [..., T, D]``; outputs are the parts that the scheme stores, by the names
        of `Scheme.layout` and in its dtypes. A graph cannot refuse: what `nsq_ref.quantize` refuses
        gives numbers of no meaning, unless a library of kernels runs in place of the function.

    Raises
    ------
    TypeError, ValueError
        For what is no scheme, another dtype, a rank that is no integer or below 2, and what is no
        feedback.

    Examples
    --------
    >>> model = quantize_model(Scheme())
    >>> [one.name for one in model.graph.output], model.graph.node[0].op_type
    (['packed', 'scale', 'norm'], 'Quantize')
    >>> import numpy as np, onnxruntime, nsq_ref
    >>> session = onnxruntime.InferenceSession(model.SerializeToString())
    >>> x = np.random.default_rng(0).standard_normal((2, 8, 16)).astype(np.float32)
    >>> bool((session.run(["packed"], {"x": x})[0] == nsq_ref.quantize(x).packed).all())
    True
    """
    scheme, rank = as_scheme("scheme", scheme), _rank(rank)
    stored = _stored(scheme, dtype)
    add = Nodes()
    made = {name: f"wide_{name}" if name in WIDENED else name for name in stored}
    given, initializers = {"x": "x"}, []
    if feedback is not None:
        if not isinstance(feedback, Feedback):
            raise TypeError(f"feedback must be a Feedback, got {type(feedback).__name__}")
        given |= {"order": "order", "factor": "factor"}
        initializers = [
            numpy_helper.from_array(array, name)
            for name, array in (("order", feedback.order), ("factor", feedback.factor))
        ]
    add.call(QUANTIZE, given, made, **scheme_attributes(scheme))
    for name in stored:
        if name in WIDENED:
            add.cast(made[name], stored[name], name=name)
    return _model(quantize(), add, {"x": dtype}, stored, scheme, rank, initializers)


def dequantize_model(
    scheme: Scheme | str, dtype: FloatName = "float32", rank: int | None = None
) -> onnx.ModelProto:
    """Return a model that reconstructs an array.

    Parameters
    ----------
    scheme : Scheme or str
        A scheme or its name.
    dtype : {"float32", "float16", "bfloat16"}
        Of the array that was quantized, which is that of its sinks.
    rank : int, optional
        Number of its axes, as for `quantize_model`.

    Returns
    -------
    onnx.ModelProto
        Inputs are the outputs of `quantize_model`, and ``shape``, that of ``x``, as int32. Output
        ``x_hat [..., T, D]``, float32.

    Raises
    ------
    TypeError, ValueError
        For what is no scheme, another dtype, and a rank that is no integer or below 2.

    Examples
    --------
    >>> model = dequantize_model(Scheme())
    >>> [one.name for one in model.graph.input]
    ['packed', 'scale', 'norm', 'shape']
    >>> import numpy as np, onnxruntime, nsq_ref
    >>> session = onnxruntime.InferenceSession(model.SerializeToString())
    >>> q = nsq_ref.quantize(np.random.default_rng(0).standard_normal((2, 8, 16)))
    >>> (x_hat,) = session.run(None, {**q.parts, "shape": np.int32(q.shape)})
    >>> bool((x_hat == nsq_ref.dequantize(q)).all())
    True
    """
    scheme, rank = as_scheme("scheme", scheme), _rank(rank)
    stored = _stored(scheme, dtype)
    add = Nodes()
    given = {
        name: add.cast(name, "float32") if name in (*WIDENED, "sinks") else name for name in stored
    }
    given["head_dim"] = add.cast(add("Gather", "shape", -1), "int64")
    add.call(DEQUANTIZE, given, {"x_hat": "x_hat"}, **scheme_attributes(scheme))
    taken = {**stored, "shape": "int32"}
    return _model(dequantize(), add, taken, {"x_hat": "float32"}, scheme, rank)


def save_models(models: Mapping[Path, onnx.ModelProto]) -> None:
    """Write models to files, all of them or none.

    Parameters
    ----------
    models : mapping of path to onnx.ModelProto
        Existing files are replaced, and only once all new ones are on disk. Folders that are
        missing are made.

    Raises
    ------
    OSError
        Where a file cannot be written; what was there before is untouched.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name, "encode.onnx")
    >>> save_models({path: quantize_model(Scheme())})
    >>> onnx.load(path).graph.name
    'Quantize'
    >>> folder.cleanup()
    """
    files = ((path, model.SerializeToString()) for path, model in models.items())
    atomic.write(files, make_folders=True)


def _rank(rank: int | None) -> int | None:
    if rank is None:
        return None
    rank = as_integer("rank", rank)
    if rank < LEAST_AXES:
        raise ValueError(f"rank={rank} is too small; arrays are [..., T, D], of at least two axes")
    return rank


def _stored(scheme: Scheme, dtype: str) -> dict[str, str]:
    """Return the parts that are stored, in the order of the operators, with their dtypes."""
    QUANTIZE.require_dtype(dtype)
    layout = scheme.layout(1, 1, FLOAT_DTYPES[dtype])
    return {name: layout[name].dtype.name for name in QUANTIZE.outputs if name in layout}


def _model(
    function: onnx.FunctionProto,
    add: Nodes,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    scheme: Scheme,
    rank: int | None,
    initializers: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    """Return a model of the nodes, with the dtypes of its inputs and outputs."""
    given, made = (
        {name: (dtype, _axes(name, scheme, rank)) for name, dtype in ends.items()}
        for ends in (inputs, outputs)
    )
    metadata = {"nsq.spec": SPEC_VERSION, "nsq.scheme": json.dumps(scheme.to_dict())}
    model = make_model(
        function.name, add.nodes, given, made, functions=[function], initializers=initializers,
        metadata=metadata,
    )  # fmt: skip
    # Written to files, so that they say which release made them.
    model.producer_name, model.producer_version = "nsq-ref", __version__
    return model


def _axes(name: str, scheme: Scheme, rank: int | None) -> list[str | int] | None:
    """Return the names of the axes of an input or output."""
    if name == "shape":
        return ["rank" if rank is None else rank]
    if rank is None:
        return None
    scales: list[str | int]
    scales = ["blocks", "head_dim"] if scheme.axis == "channel" else ["coded_tokens", 1]
    own: dict[str, list[str | int]] = {
        "x": ["tokens", "head_dim"],
        "x_hat": ["tokens", "head_dim"],
        "packed": ["coded_tokens", "row_bytes"],
        "norm": ["coded_tokens"],
        "scale": scales,
        "zero": scales,
        "outlier_index": ["blocks", "kept_channels"],
        "outliers": ["coded_tokens", "kept_channels"],
        "sinks": ["sinks", "head_dim"],
    }
    return [f"axis_{i}" for i in range(rank - 2)] + own[name]

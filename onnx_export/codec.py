"""Models that quantize or dequantize one array, as a scheme of NSQ-1 says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from nsq_ref import __version__
from nsq_ref.arrays import as_integer
from nsq_ref.codec import PARTS
from nsq_ref.environment import extra
from nsq_ref.files import atomic
from nsq_ref.scheme import FLOAT_DTYPES, SPEC_VERSION, FloatName, Scheme, as_scheme
from onnx_export.codec_functions import DOMAIN, VERSION, dequantize, quantize, scheme_attributes
from onnx_export.function_builder import Nodes

with extra("onnx", __name__):
    import onnx
    from onnx import TensorProto, helper

__all__ = ["dequantize_model", "quantize_model", "save_models"]

OPSET, IR_VERSION = 21, 10
DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
}
LEAST_AXES = 2


def quantize_model(
    scheme: Scheme | str, dtype: FloatName = "float32", rank: int | None = None
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

    Returns
    -------
    onnx.ModelProto
        Input ``x [..., T, D]``; outputs are the parts that the scheme stores, by the names
        of `Scheme.layout` and in its dtypes. A graph cannot refuse: what `nsq_ref.quantize` refuses
        gives numbers of no meaning, unless a library of kernels runs in place of the function.

    Raises
    ------
    TypeError, ValueError
        For what is no scheme, another dtype, and a rank that is no integer or below 2.

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
    kinds = _dtypes(scheme, dtype)
    add = Nodes()
    made = {name: f"wide_{name}" if _is_widened(name) else name for name in kinds}
    # Also those at the end that are left out, as the checker and onnx.reference count them.
    outputs = [made.get(name, "") for name in PARTS]
    add.several("Quantize", ["x"], outputs, domain=DOMAIN, **scheme_attributes(scheme))
    for name in filter(_is_widened, kinds):
        add("Cast", made[name], name=name, to=kinds[name])
    return _model(quantize(OPSET), add, {"x": DTYPES[dtype]}, kinds, scheme, rank)


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
    kinds = _dtypes(scheme, dtype)
    add = Nodes()
    given = {
        name: add("Cast", name, to=TensorProto.FLOAT)
        if _is_widened(name) or name == "sinks"
        else name
        for name in kinds
    }
    head_dim = add("Cast", add("Gather", "shape", -1), to=TensorProto.INT64)
    inputs = [*(given.get(name, "") for name in PARTS), head_dim]
    add.several("Dequantize", inputs, ["x_hat"], domain=DOMAIN, **scheme_attributes(scheme))
    taken = {**kinds, "shape": TensorProto.INT32}
    made = {"x_hat": TensorProto.FLOAT}
    return _model(dequantize(OPSET), add, taken, made, scheme, rank)


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


def _is_widened(name: str) -> bool:
    return name in ("scale", "norm", "zero")


def _rank(rank: int | None) -> int | None:
    if rank is None:
        return None
    rank = as_integer("rank", rank)
    if rank < LEAST_AXES:
        raise ValueError(f"rank={rank} is too small; arrays are [..., T, D], of at least two axes")
    return rank


def _dtypes(scheme: Scheme, dtype: str) -> dict[str, int]:
    """Return the parts that are stored, in the order of the operators, with their dtypes."""
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(FLOAT_DTYPES)}")
    layout = scheme.layout(1, 1, FLOAT_DTYPES[dtype])
    return {name: DTYPES[layout[name].dtype.name] for name in PARTS if name in layout}


def _model(
    function: onnx.FunctionProto,
    add: Nodes,
    inputs: Mapping[str, int],
    outputs: Mapping[str, int],
    scheme: Scheme,
    rank: int | None,
) -> onnx.ModelProto:
    given, made = (
        [helper.make_tensor_value_info(one, kind, _axes(one, scheme, rank)) for one, kind in end]
        for end in (inputs.items(), outputs.items())
    )
    model = helper.make_model(
        helper.make_graph(add.nodes, function.name, given, made),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        functions=[function],
        ir_version=IR_VERSION,
        producer_name="nsq-ref",
        producer_version=__version__,
    )
    properties = {"nsq.spec": SPEC_VERSION, "nsq.scheme": json.dumps(scheme.to_dict())}
    helper.set_model_props(model, properties)
    return model


def _axes(name: str, scheme: Scheme, rank: int | None) -> Sequence[str | int] | None:
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

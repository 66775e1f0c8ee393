"""What one node makes of values in NumPy, or at least of what shape that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nsq_ref.extras import extra

with extra("rewrite", __name__):
    import onnx_ir as ir

__all__ = ["NEEDED", "Seen", "chosen", "evaluate", "opaque"]

Array = npt.NDArray[Any]
Given = list[Any]
LARGEST = 1 << 20  # elements that are computed; more have a shape only


class Seen(NamedTuple):
    """What a value has in it; content of weights and of what comes of them is not known."""

    array: Array
    known: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.array.shape


def opaque(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Return an array of no content, whatever its size in no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def chosen(condition: bool | None, branches: list[list[Seen | None]]) -> list[Seen | None]:
    """Return what If makes of its two branches; where both may be taken, what they agree on."""
    if condition is not None:
        return list(branches[0 if condition else 1])
    made: list[Seen | None] = []
    for one, other in zip(*branches, strict=True):
        alike = one is not None and other is not None and one.shape == other.shape
        if one is None or other is None or not alike or one.array.dtype != other.array.dtype:
            made.append(None)
        elif one.known and other.known and np.array_equal(one.array, other.array):
            made.append(one)
        else:
            made.append(Seen(opaque(one.shape, one.array.dtype), known=False))
    return made


def evaluate(node: ir.Node, inputs: list[Seen | None]) -> list[Seen | None]:
    """Return the outputs of a node; none where its operator is not known here."""
    if node.domain not in ("", "com.microsoft"):
        return []
    operator, attributes = node.op_type, node.attributes
    given = [None if one is None else one.array for one in inputs]
    known = all(one is None or one.known for one in inputs)
    if any(
        one is not None and not one.known for one in inputs[SHAPED.get(operator, len(inputs)) :]
    ):
        return []  # even the shape depends on content
    try:
        if operator in OF_SHAPES:
            return [Seen(one) for one in OF_SHAPES[operator](given, attributes)]
        if operator in SHAPES:
            made = SHAPES[operator](given, attributes)
            return [Seen(opaque(shape, dtype), known=False) for shape, dtype in made]
        if operator in SEVERAL:
            return [_seen(one, known) for one in SEVERAL[operator](given, attributes, node)]
        if not known and operator in BY_ELEMENT:
            return [_broadcast(BY_ELEMENT[operator], given, attributes)]
        if not known and operator in CONTENT:
            shape, dtype = CONTENT[operator](given, attributes)
            return [Seen(opaque(shape, dtype), known=False)]
        if (how := BY_ELEMENT.get(operator) or OPERATORS.get(operator)) is None:
            return []
        return [_seen(np.asarray(how(given, attributes)), known)]
    except (ValueError, IndexError, TypeError, AttributeError, OverflowError, KeyError):
        return []


def _seen(made: Array, known: bool) -> Seen:
    if made.size > LARGEST or not known:
        return Seen(opaque(made.shape, made.dtype), known=False)
    return Seen(made)


# --- shapes --------------------------------------------------------------------------------------

Shapes = list[tuple[tuple[int, ...], Any]]


def _broadcast(how: Callable[..., Any], given: Given, attributes: Any) -> Seen:
    """Return the shape and dtype of what goes element by element."""
    ones = [None if one is None else np.ones((), one.dtype) for one in given]
    shape = np.broadcast_shapes(*(one.shape for one in given if one is not None))
    return Seen(opaque(shape, np.asarray(how(ones, attributes)).dtype), known=False)


def _same(given: Given, attributes: Any) -> Shapes:
    return [(given[0].shape, given[0].dtype)]


def _skipped(given: Given, attributes: Any) -> Shapes:
    """Return normed sums, mean and variance by row, and the sums."""
    row = (*given[0].shape[:-1], 1)
    same = (given[0].shape, given[0].dtype)
    return [same, (row, np.float32), (row, np.float32), same]


def _product(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    rows, columns = a[-2:-1] if len(a) > 1 else (), b[-1:] if len(b) > 1 else ()
    if a[-1] != b[-2 if len(b) > 1 else -1]:
        raise ValueError("not two matrices")
    return (*np.broadcast_shapes(a[:-2], b[:-2]), *rows, *columns)


def _matmul(given: Given, attributes: Any) -> Shapes:
    return [(_product(given[0].shape, given[1].shape), given[0].dtype)]


def _fused_matmul(given: Given, attributes: Any) -> Shapes:
    shapes = []
    for one, side in zip(given, "AB", strict=True):
        if attributes.get_int(f"transBatch{side}", 0):
            raise ValueError("turned batches are not followed")
        turned = attributes.get_int(f"trans{side}", 0)
        shapes.append((*one.shape[:-2], *one.shape[:-3:-1]) if turned else one.shape)
    return [(_product(*shapes), given[0].dtype)]


def _matmul_integer(given: Given, attributes: Any) -> Shapes:
    return [(_product(given[0].shape, given[1].shape), np.int32)]


def _gemm(given: Given, attributes: Any) -> Shapes:
    a, b = (
        one.shape[::-1] if attributes.get_int(name, 0) else one.shape
        for one, name in zip(given, ("transA", "transB"), strict=False)
    )
    return [(_product(a, b), given[0].dtype)]


def _matmul_of_blocks(given: Given, attributes: Any) -> Shapes:
    return [((*given[0].shape[:-1], attributes.get_int("N")), given[0].dtype)]


def _gathered(given: Given, attributes: Any) -> tuple[tuple[int, ...], Any]:
    table, indices = given[:2]
    axis = attributes.get_int("axis", 0) % table.ndim
    return table.shape[:axis] + indices.shape + table.shape[axis + 1 :], table.dtype


def _einsum(given: Given, attributes: Any) -> Shapes:
    terms, _, result = attributes.get_string("equation").replace(" ", "").partition("->")
    if "." in terms or not result:
        raise ValueError("only equations that name all axes are followed")
    sizes: dict[str, int] = {}
    for term, one in zip(terms.split(","), given, strict=True):
        sizes |= dict(zip(term, one.shape, strict=True))
    return [(tuple(sizes[letter] for letter in result), given[0].dtype)]


def _top_k(given: Given, attributes: Any) -> Shapes:
    x, count = given[0], int(given[1].reshape(-1)[0])
    shape = list(x.shape)
    shape[attributes.get_int("axis", -1)] = count
    return [(tuple(shape), x.dtype), (tuple(shape), np.int64)]


def _quantized(given: Given, attributes: Any) -> Shapes:
    return [(given[0].shape, np.uint8), ((), np.float32), ((), np.uint8)]


def _dequantized(given: Given, attributes: Any) -> Shapes:
    return [(given[0].shape, given[1].dtype)]


def _attention(given: Given, attributes: Any) -> Shapes:
    """Return the output of ONNX's own Attention."""
    q, value = given[0], given[2]
    if q.ndim == 4:
        return [((*q.shape[:3], value.shape[3]), q.dtype)]
    heads = attributes.get_int("q_num_heads"), attributes.get_int("kv_num_heads")
    return [((*q.shape[:2], value.shape[2] // heads[1] * heads[0]), q.dtype)]


# --- content -------------------------------------------------------------------------------------


def _shape(given: Given, attributes: Any) -> list[Array]:
    start, end = attributes.get_int("start", 0), attributes.get_int("end", None)
    return [np.array(given[0].shape, np.int64)[start:end]]


def _split(given: Given, attributes: Any, node: ir.Node) -> list[Array]:
    x, axis = given[0], attributes.get_int("axis", 0)
    sizes = given[1] if len(given) > 1 and given[1] is not None else None
    if sizes is None:
        sizes = attributes.get_ints("split", None)
    if sizes is None:  # the last may be smaller
        size = -(-x.shape[axis] // len(node.outputs))
        sizes = [size] * (len(node.outputs) - 1)
    else:
        sizes = list(sizes)[:-1]
    return np.split(x, np.cumsum([int(one) for one in sizes], dtype=np.int64), axis=axis)


def _axes(given: Given, attributes: Any) -> tuple[int, ...] | None:
    if len(given) > 1 and given[1] is not None:
        return tuple(int(one) for one in given[1].reshape(-1))
    axes = attributes.get_ints("axes", None)
    return None if axes is None else tuple(axes)


def _reshape(given: Given, attributes: Any) -> Array:
    x, sizes = given[0], [int(one) for one in given[1]]
    if not attributes.get_int("allowzero", 0):
        sizes = [x.shape[i] if one == 0 else one for i, one in enumerate(sizes)]
    return np.reshape(x, sizes)


def _flatten(given: Given, attributes: Any) -> Array:
    x, axis = given[0], attributes.get_int("axis", 1)
    return np.reshape(x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


def _slice(given: Given, attributes: Any) -> Array:
    x, starts, ends = given[:3]
    axes = given[3] if len(given) > 3 and given[3] is not None else range(len(starts))
    steps = given[4] if len(given) > 4 and given[4] is not None else [1] * len(starts)
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            raise ValueError("steps backward are not followed")
        index[int(axis)] = slice(int(start), int(end), int(step))
    return np.asarray(x[tuple(index)])


def _pad(given: Given, attributes: Any) -> Array:
    x, pads = given[0], [int(one) for one in given[1]]
    mode = attributes.get_string("mode", "constant")
    axes = given[3] if len(given) > 3 and given[3] is not None else range(x.ndim)
    if mode != "constant":
        raise ValueError(f"padding by {mode} is not followed")
    widths, cut = [(0, 0)] * x.ndim, [slice(None)] * x.ndim
    for at, axis in enumerate(axes):
        before, after = pads[at], pads[at + len(pads) // 2]
        widths[int(axis)] = max(before, 0), max(after, 0)
        cut[int(axis)] = slice(max(-before, 0), x.shape[int(axis)] + min(after, 0))
    fill = given[2] if len(given) > 2 and given[2] is not None else np.zeros(1, x.dtype)
    return np.pad(x[tuple(cut)], widths, constant_values=fill.reshape(-1)[0])


def _unsqueeze(given: Given, attributes: Any) -> Array:
    axes = _axes(given, attributes)
    if axes is None:
        raise ValueError("no axes")
    return np.expand_dims(given[0], axes)


def _expand(given: Given, attributes: Any) -> Array:
    shape = np.broadcast_shapes(given[0].shape, tuple(int(one) for one in given[1]))
    return np.broadcast_to(given[0], shape)


def _constant_of_shape(given: Given, attributes: Any) -> Array:
    value = attributes.get_tensor("value", None)
    fill = np.zeros(1, np.float32) if value is None else value.numpy()
    return np.full(tuple(int(one) for one in given[0]), fill.reshape(-1)[0], fill.dtype)


def _divide(given: Given, attributes: Any) -> Array:
    a, b = given[:2]
    if a.dtype.kind in "iu":
        return np.asarray(a // np.where(b == 0, 1, b))
    with np.errstate(all="ignore"):
        return np.asarray(a / b)


def _mod(given: Given, attributes: Any) -> Array:
    how = np.fmod if attributes.get_int("fmod", 0) else np.mod
    with np.errstate(all="ignore"):
        return np.asarray(how(*given))


def _clip(given: Given, attributes: Any) -> Array:
    low, high = (*given[1:], None, None)[:2]
    if low is None and high is None:
        return np.asarray(given[0])
    return np.asarray(np.clip(given[0], low, high))


def _trilu(given: Given, attributes: Any) -> Array:
    offset = int(given[1].reshape(-1)[0]) if len(given) > 1 and given[1] is not None else 0
    cut = np.triu if attributes.get_int("upper", 1) else np.tril
    return np.asarray(cut(given[0], offset))


def _constant(given: Given, attributes: Any) -> Array:
    for name in ("value_int", "value_ints"):
        if name in attributes:
            return np.array(attributes[name].value, np.int64)
    for name in ("value_float", "value_floats"):
        if name in attributes:
            return np.array(attributes[name].value, np.float32)
    return np.asarray(attributes.get_tensor("value").numpy())


def _cast(given: Given, attributes: Any) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(given[0].astype(ir.DataType(attributes.get_int("to")).numpy()))


def _gather_nd(given: Given, attributes: Any) -> Array:
    if attributes.get_int("batch_dims", 0):
        raise ValueError("batch_dims are not followed")
    return np.asarray(given[0][tuple(np.moveaxis(given[1], -1, 0))])


def _gather_elements(given: Given, attributes: Any) -> Array:
    return np.take_along_axis(given[0], given[1], attributes.get_int("axis", 0))


def _scatter_nd(given: Given, attributes: Any) -> Array:
    if attributes.get_string("reduction", "none") != "none":
        raise ValueError("reductions are not followed")
    made = np.array(given[0])
    made[tuple(np.moveaxis(given[1], -1, 0))] = given[2]
    return made


def _one_hot(given: Given, attributes: Any) -> Array:
    indices, depth, (off, on) = given[0], int(given[1].reshape(-1)[0]), given[2]
    axis = attributes.get_int("axis", -1)
    places = np.arange(depth) == np.mod(indices, depth)[..., None]
    return np.moveaxis(np.where(places, on, off), -1, axis)


def _reduce(how: Callable[..., Any]) -> Callable[[Given, Any], Any]:
    def reduced(given: Given, attributes: Any) -> Any:
        axes = _axes(given, attributes)
        if axes is None and attributes.get_int("noop_with_empty_axes", 0):
            return given[0]
        made = how(given[0], axis=axes, keepdims=bool(attributes.get_int("keepdims", 1)))
        return np.asarray(made, given[0].dtype)

    return reduced


def _by_element(how: Callable[..., Any]) -> Callable[[Given, Any], Any]:
    def made(given: Given, attributes: Any) -> Any:
        with np.errstate(all="ignore"):
            return how(*given)

    return made


def _cum_sum(given: Given, attributes: Any) -> Array:
    if attributes.get_int("exclusive", 0) or attributes.get_int("reverse", 0):
        raise ValueError("only plain sums are followed")
    x, axis = given[:2]
    return np.cumsum(x, axis=int(axis.reshape(-1)[0]), dtype=x.dtype)


NEEDED = {"ScatterElements": 1, "ScatterND": 1}
"""How many inputs tell the shape, where that is not all."""

SHAPED = {
    "ConstantOfShape": 0, "CumSum": 1, "Expand": 1, "NonZero": 0, "OneHot": 1, "Pad": 1,
    "Range": 0, "ReduceL2": 1, "ReduceMax": 1, "ReduceMean": 1, "ReduceMin": 1, "ReduceProd": 1,
    "ReduceSum": 1, "ReduceSumSquare": 1, "Reshape": 1, "Slice": 1, "Split": 1, "Squeeze": 1,
    "Tile": 1, "TopK": 1, "Trilu": 1, "Unsqueeze": 1,
}  # fmt: skip
"""From which input on content decides the shape of the result."""

OF_SHAPES: Mapping[str, Callable[[Given, Any], list[Array]]] = {
    "Shape": _shape,
    "Size": lambda given, at: [np.array(given[0].size, np.int64)],
}
"""Their content is known even where that of what they read is not."""

SEVERAL: Mapping[str, Callable[[Given, Any, ir.Node], list[Array]]] = {"Split": _split}
"""With as many outputs as a node has."""

CONTENT: Mapping[str, Callable[[Given, Any], tuple[tuple[int, ...], Any]]] = {
    "Gather": _gathered,
    "GatherElements": lambda given, at: (given[1].shape, given[0].dtype),
    "ScatterND": lambda given, at: (given[0].shape, given[0].dtype),
}
"""The shape of what cannot be computed of contents that are not known."""

SHAPES: Mapping[str, Callable[[Given, Any], Shapes]] = {
    **dict.fromkeys(
        (
            "BiasGelu", "BitwiseNot", "Dropout", "Elu", "FastGelu",
            "Gelu", "HardSigmoid", "HardSwish", "InstanceNormalization", "LayerNormalization",
            "LeakyRelu", "LogSoftmax", "LpNormalization", "Mish", "QuickGelu", "RMSNormalization",
            "Relu", "RotaryEmbedding", "ScatterElements", "Selu", "SimplifiedLayerNormalization",
            "Softmax", "Softplus", "Softsign", "Swish",
        ),
        _same,
    ),
    "Attention": _attention,
    "DequantizeLinear": _dequantized,
    "DynamicQuantizeLinear": _quantized,
    "Einsum": _einsum,
    "FusedMatMul": _fused_matmul,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulBnb4": _matmul_of_blocks,
    "MatMulInteger": _matmul_integer,
    "MatMulNBits": _matmul_of_blocks,
    "SkipLayerNormalization": _skipped,
    "SkipSimplifiedLayerNormalization": _skipped,
    "TopK": _top_k,
}  # fmt: skip
"""Of which only shapes are told."""

BY_ELEMENT: Mapping[str, Callable[[Given, Any], Any]] = {
    "Abs": _by_element(np.abs),
    "Add": _by_element(np.add),
    "And": _by_element(np.logical_and),
    "BitwiseAnd": _by_element(np.bitwise_and),
    "BitwiseOr": _by_element(np.bitwise_or),
    "Cast": _cast,
    "CastLike": lambda given, at: given[0].astype(given[1].dtype),
    "Ceil": _by_element(np.ceil),
    "Clip": _clip,
    "Cos": _by_element(np.cos),
    "Div": _divide,
    "Equal": _by_element(np.equal),
    "Erf": _by_element(np.vectorize(math.erf, otypes=[np.float32])),
    "Exp": _by_element(np.exp),
    "Floor": _by_element(np.floor),
    "Greater": _by_element(np.greater),
    "GreaterOrEqual": _by_element(np.greater_equal),
    "Identity": lambda given, at: given[0],
    "IsInf": _by_element(np.isinf),
    "IsNaN": _by_element(np.isnan),
    "Less": _by_element(np.less),
    "LessOrEqual": _by_element(np.less_equal),
    "Log": _by_element(np.log),
    "Max": lambda given, at: np.maximum.reduce(np.broadcast_arrays(*given)),
    "Min": lambda given, at: np.minimum.reduce(np.broadcast_arrays(*given)),
    "Mod": _mod,
    "Mul": _by_element(np.multiply),
    "Neg": _by_element(np.negative),
    "Not": _by_element(np.logical_not),
    "Or": _by_element(np.logical_or),
    "Pow": lambda given, at: np.power(*given).astype(given[0].dtype),
    "Reciprocal": _by_element(np.reciprocal),
    "Round": _by_element(np.round),
    "Sigmoid": lambda given, at: (1 / (1 + np.exp(-given[0]))).astype(given[0].dtype),
    "Sign": _by_element(np.sign),
    "Sin": _by_element(np.sin),
    "Sqrt": _by_element(np.sqrt),
    "Sub": _by_element(np.subtract),
    "Tanh": _by_element(np.tanh),
    "Where": _by_element(np.where),
    "Xor": _by_element(np.logical_xor),
}
OPERATORS: Mapping[str, Callable[[Given, Any], Any]] = {
    "Concat": lambda given, at: np.concatenate(given, axis=at.get_int("axis")),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cum_sum,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": lambda given, at: np.take(given[0], given[1], axis=at.get_int("axis", 0)),
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": lambda given, at: np.array(np.nonzero(given[0]), np.int64),
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": lambda given, at: np.arange(*(one.reshape(-1)[0] for one in given)),
    "ReduceL2": _reduce(lambda x, **how: np.sqrt(np.sum(np.square(x), **how))),
    "ReduceMax": _reduce(np.max),
    "ReduceMean": _reduce(np.mean),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceSumSquare": _reduce(lambda x, **how: np.sum(np.square(x), **how)),
    "Reshape": _reshape,
    "ScatterND": _scatter_nd,
    "Slice": _slice,
    "Squeeze": lambda given, at: np.squeeze(given[0], _axes(given, at)),
    "Tile": lambda given, at: np.tile(given[0], given[1]),
    "Transpose": lambda given, at: np.transpose(given[0], at.get_ints("perm", None)),
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}

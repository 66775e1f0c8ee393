"""Quantize and Dequantize as ONNX functions: NSQ-1 in standard operators, for every scheme.

One body serves all schemes: what depends on the scheme follows from attributes. Leading axes may be
any. A graph cannot refuse: what rules I2, N1, M4, S5, O1 and D3 refuse gives numbers of no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from nsq_ref.extras import extra
from nsq_ref.spec import LEAST_SIZE, SHRINK
from onnx_export.operators import rounding
from onnx_export.operators.feedback import fed_back
from onnx_export.operators.nodes import Nodes, built_once, make_function
from onnx_export.operators.rounding import narrow, where_zero
from onnx_export.operators.schema import DEQUANTIZE, ELEMENTS, OPSET, QUANTIZE

with extra("onnx", __name__):
    import onnx
    from onnx import numpy_helper

__all__ = ["dequantize", "quantize"]

INFINITY = np.float32(np.inf)
POWERS = 2.0 ** np.arange(8, dtype=np.float32)


@built_once
def quantize(opset: int = OPSET) -> onnx.FunctionProto:
    """Return ``nsq.Quantize``, in standard operators of an opset that is at least 21.

    Of the outputs, ``scale``, ``norm`` and ``zero`` are float32 that holds values of the stored
    dtypes, and ``sinks`` has the dtype of ``x``. What a scheme does not store says nothing. With
    ``order`` and ``factor``, those of `nsq_ref.Feedback`, errors are fed back (F1).

    Examples
    --------
    >>> quantize().output[:3]
    ['packed', 'scale', 'norm']
    """
    add = Nodes()
    fields = _fields(add)
    x = add.cast("x", "float32")  # I1
    lead = add("Shape", x, end=-2)
    channels = add("Shape", x, start=-1)
    all_tokens = add("Shape", x, start=-2, end=-1)
    sinks = add("Min", all_tokens, fields.sink_tokens)
    tokens = add("Sub", all_tokens, sinks)
    of_block = _tokens_per_block(add, tokens, fields)
    blocks = add("Div", add("Sub", add("Add", tokens, of_block), 1), of_block)
    stored_blocks = blocks
    # Where all tokens are sinks one is coded in vain, as runtimes differ in reducing nothing.
    blocks = add("Max", blocks, 1)

    # A last block that is short is filled with its last token, which changes no extent.
    places = _range(add, add("Mul", blocks, of_block))
    source = add("Min", add("Add", places, sinks), add("Sub", all_tokens, 1))
    cut = add("Concat", lead, blocks, of_block, channels, axis=0)
    x_blocks = _reshape(add, add("Gather", x, source, axis=-2), cut)
    present = add("Less", places, tokens)
    present = _reshape(add, present, add("Concat", blocks, of_block, [1], axis=0))

    plain = add.choose(
        fields.separate_norm,
        lambda add: rounding.norm(add, x_blocks),  # N1
        lambda add: add("Expand", np.float32(1), add("Shape", x_blocks, end=-1)),
    )
    norm, size = add.choose_several(
        fields.balanced,
        lambda add: _balanced(add, x_blocks, plain, present),  # N3
        lambda add: [plain, add.constant(np.float32(1))],
        ["float32", "float32"],
    )
    direction = _direction(add, x_blocks, norm)  # N2
    index, coded = _outlier_channels(add, direction, fields)  # O1
    scale, zero = _scale_and_zero(add, direction, coded, present, fields)  # S1 S2 S3 S4

    w, scale, zero, length = fed_back(  # F1
        add, direction, norm, (scale, zero), coded, channel=fields.channel, gain=fields.gain,
        pair_of=lambda add, column: _scale_and_zero_of_column(add, column, present, fields),
        decoded=lambda add, w, scale, zero: _decoded(add, w, scale, zero, fields),
    )  # fmt: skip
    outliers = _kept_outliers(add, w, index, fields)  # O1
    codes = _code(add, w, scale, zero, fields)  # Q1 Q2
    has_code = add("And", coded, _a_token(add, add.cast(norm, "bool")))
    codes = add("Where", has_code, codes, np.float32(0))  # N2 O1
    stored = codes, scale, zero, index, outliers
    factor = _factor(add, x_blocks, norm, size, length, stored, fields)

    def joined(array: str, end: str, **name: str) -> str:
        """Join ``[..., blocks, n, m]`` to ``[..., blocks * n, m]``, without what was filled in."""
        rows = add("Mul", blocks, add("Shape", array, start=-2, end=-1))
        shape = add("Concat", lead, rows, add("Shape", array, start=-1), axis=0)
        return add("Slice", _reshape(add, array, shape), [0], end, [-2], **name)

    scales = add("Where", fields.channel, stored_blocks, tokens)
    joined(_pack(add, codes, fields), tokens, name="packed")
    joined(scale, scales, name="scale")
    add("Squeeze", joined(_a_token(add, factor), tokens), [-1], name="norm")
    joined(zero, scales, name="zero")
    add.cast(joined(index, stored_blocks), "int32", name="outlier_index")
    add.cast(joined(outliers, tokens), "float16", name="outliers")
    add("CastLike", add("Slice", x, [0], sinks, [-2]), "x", name="sinks")  # K1
    return make_function(QUANTIZE, add, opset)


@built_once
def dequantize(opset: int = OPSET) -> onnx.FunctionProto:
    """Return ``nsq.Dequantize``, in standard operators of an opset that is at least 21.

    Inputs are the outputs of ``nsq.Quantize``, sinks as float32, and ``head_dim``, an int64 scalar
    that is only needed for axis token; what a scheme does not store is left out.

    Examples
    --------
    >>> dequantize().input[-1], dequantize().output[0]
    ('head_dim', 'x_hat')
    """
    add = Nodes()
    fields = _fields(add)
    lead = add("Shape", "packed", end=-2)
    tokens = add("Shape", "packed", start=-2, end=-1)

    # An input that is left out may only be among several, and not the first of these: else a model
    # is refused, even where the branch is not taken.
    channels = add.choose(
        fields.channel,
        lambda add: add("Shape", "scale", start=-1),
        lambda add: add("Max", [1], "head_dim"),
        "int64",
    )

    def given(add: Nodes, name: str, kind: Any, *shape: Any) -> str:
        """Return an optional input of a dtype, whose axis of length 0 here may have any length."""
        sizes = add("Concat", lead, *shape, axis=0)
        empty = add("ConstantOfShape", sizes, value=numpy_helper.from_array(np.zeros(1, kind)))
        return add("Concat", empty, name, axis=-len(shape))

    count = _range(add, tokens)
    block = add("Div", count, _tokens_per_block(add, tokens, fields))
    of_token = add("Where", fields.channel, block, count)
    scale = add("Gather", "scale", of_token, axis=-2)

    def stored_zero(add: Nodes) -> str:
        zero = given(add, "zero", np.float32, [0], add("Shape", "scale", start=-1))
        return add("Gather", zero, of_token, axis=-2)

    # -0 adds nothing to any product.
    zero = add.choose(fields.symmetric, lambda add: add.constant(np.float32(-0.0)), stored_zero)
    y = _dequantized(add, _unpack(add, channels, fields), scale, zero)

    def with_outliers(add: Nodes) -> str:
        kept = add("Min", fields.outlier_channels, channels)
        index = add("Gather", given(add, "outlier_index", np.int32, [0], kept), block, axis=-2)
        outliers = add.cast(given(add, "outliers", np.float16, [0], kept), "float32")
        return add("ScatterElements", y, add.cast(index, "int64"), outliers, axis=-1)

    y = add.choose(fields.has_outliers, with_outliers, lambda _: y)

    def with_norm(add: Nodes) -> str:
        norm = _a_token(add, given(add, "norm", np.float32, [0]))

        def renormalized(add: Nodes) -> str:
            length = where_zero(add, rounding.norm(add, y), INFINITY)
            return add("Div", y, _a_token(add, length))

        # Not without tokens, as runtimes differ in reducing nothing.
        some = add("And", fields.stores_norm, add("Squeeze", add("Greater", tokens, 0)))
        unit = add.choose(some, renormalized, lambda _: y)
        return add("Mul", norm, unit)

    x_hat = add.choose(fields.separate_norm, with_norm, lambda _: y)  # D1

    def with_sinks(add: Nodes) -> str:
        return add("Concat", given(add, "sinks", np.float32, [0], channels), x_hat, axis=-2)

    has_sinks = add("Greater", fields.sink_tokens, 0)
    whole = add.choose(has_sinks, with_sinks, lambda _: x_hat)
    add("Identity", whole, name="x_hat")
    return make_function(DEQUANTIZE, add, opset)


class _Fields(NamedTuple):
    """Names of scalars: the fields of the scheme, and what follows from them."""

    bits: str
    block_size: str
    sink_tokens: str
    outlier_channels: str
    scale_dtype: str
    norm_dtype: str
    separate_norm: str
    symmetric: str
    channel: str  # one scale a channel of a block, not a token
    search: str
    balanced: str  # norms, where that gains
    stores_norm: str  # with norm separation: not a gain
    gain: str
    least_squares: str
    has_outliers: str
    least: str  # code
    greatest: str
    offset: str


def _fields(add: Nodes) -> _Fields:
    numbers = {
        name: add.attribute(name, "int")
        for name in (
            "bits", "block_size", "sink_tokens", "outlier_channels", "scale_dtype", "norm_dtype",
        )
    }  # fmt: skip
    separate_norm, symmetric = (
        add.cast(add.attribute(name, "int"), "bool") for name in ("separate_norm", "symmetric")
    )
    channel, _ = add.is_one_of("axis", ["channel", "token"])
    _, search = add.is_one_of("scale_rule", ["range", "search"])
    _, balanced = add.is_one_of("norm_rule", ["plain", "balanced"])
    stores_norm, gain, least_squares = add.is_one_of("magnitude", ["norm", "gain", "lsq"])
    half = add("Gather", POWERS, add("Sub", numbers["bits"], 1))
    full = add("Add", half, half)
    above = add("Where", symmetric, half, full)
    return _Fields(
        **numbers, separate_norm=separate_norm, symmetric=symmetric, channel=channel,
        search=search, balanced=balanced, stores_norm=stores_norm, gain=gain,
        least_squares=least_squares,
        has_outliers=add("Greater", numbers["outlier_channels"], 0),
        least=add("Where", symmetric, add("Sub", np.float32(1), half), np.float32(0)),
        greatest=add("Sub", above, np.float32(1)),
        offset=add("Where", symmetric, half, np.float32(0)),
    )  # fmt: skip


def _tokens_per_block(add: Nodes, tokens: str, fields: _Fields) -> str:
    """B1: the size of a block, at most all tokens and at least 1."""
    whole = add("Equal", fields.block_size, 0)
    size = add("Where", whole, tokens, add("Min", fields.block_size, tokens))
    return add("Max", size, 1)


def _range(add: Nodes, count: str) -> str:
    return add("Range", 0, add("Squeeze", count), 1)


def _reshape(add: Nodes, array: str, shape: str) -> str:
    return add("Reshape", array, shape, allowzero=1)


def _a_token(add: Nodes, values: str) -> str:
    return add("Unsqueeze", values, [-1])


# --- encode -------------------------------------------------------------------------------------


def _direction(add: Nodes, x: str, norm: str) -> str:
    """N2."""
    return add("Div", x, _a_token(add, where_zero(add, norm, INFINITY)))


def _balanced(add: Nodes, x: str, plain: str, present: str) -> list[str]:
    """N3: norms [..., blocks, n] and sizes of channels [..., blocks, 1, D], of plain norms."""
    low, high = _ends(add, x)
    extent = add("Sub", high, low)
    peak = add("Max", high, add("Neg", low))
    largest = add("ReduceMax", peak, [-1], keepdims=1)
    share = add("Div", peak, where_zero(add, largest, INFINITY))
    size = add("Max", share, LEAST_SIZE)
    # Infinite or NaN where an element or the norm is infinite: then so is the spread, which is not
    # less than another.
    balanced = rounding.norm(add, add("Div", x, add("Unsqueeze", size, [-2])))
    counted = add("Squeeze", present, [-1])

    def spread(norm: str) -> str:
        low, high = _ends(add, _direction(add, x, norm))
        range_of_direction = add("Sub", high, low)
        growth = add("Div", range_of_direction, extent)
        growth = add("Where", add.cast(range_of_direction, "bool"), growth, np.float32(0))
        growth, wide = add.cast(growth, "float64"), add.cast(norm, "float64")
        squares = add("Where", counted, add("Mul", wide, wide), np.float64(0))
        sums = (_last_sum(add, terms, -1) for terms in (squares, add("Mul", growth, growth)))
        return add("Mul", *sums)

    gains = add("Less", spread(balanced), spread(plain))
    size = add("Where", gains, size, np.float32(1))
    return [add("Where", gains, balanced, plain), add("Unsqueeze", size, [-2])]


def _ends(add: Nodes, values: str) -> tuple[str, str]:
    """Return the least and the greatest of each channel of a block."""
    low, high = (add(kind, values, [-2], keepdims=0) for kind in ("ReduceMin", "ReduceMax"))
    return low, high


def _outlier_channels(add: Nodes, direction: str, fields: _Fields) -> list[str]:
    """Return the index of outlier channels, and which channels are coded (O1)."""

    def chosen(add: Nodes) -> list[str]:
        peak = add("ReduceMax", add("Abs", direction), [-2], keepdims=1)
        channels = add("Shape", direction, start=-1)
        count = add("Min", fields.outlier_channels, channels)
        largest, index = f"{peak}_largest", f"{peak}_index"
        # Of equals TopK takes the lower index.
        add.several("TopK", [peak, count], [f"{largest}_value", largest])
        add.several("TopK", [largest, count], [index, f"{index}_order"], largest=0)
        every = add.cast(add("Expand", np.float32(1), add("Shape", peak)), "bool")
        none = add.cast(add("Expand", np.float32(0), add("Shape", index)), "bool")
        return [index, add("ScatterElements", every, index, none, axis=-1)]

    def none(add: Nodes) -> list[str]:
        blocks = add("Shape", direction, end=-2)
        no_index = add("Expand", 0, add("Concat", blocks, [1, 0], axis=0))
        return [no_index, add.constant(np.ones((1, 1), bool))]

    return add.choose_several(fields.has_outliers, chosen, none, ["int64", "bool"])


def _kept_outliers(add: Nodes, direction: str, index: str, fields: _Fields) -> str:
    """Return what is coded of outlier channels, narrowed (O1)."""

    def kept(add: Nodes) -> str:
        channels, count = (add("Shape", one, start=-1) for one in (direction, index))
        shape = add("Concat", add("Shape", direction, end=-1), count, axis=0)
        # Not GatherElements, which onnx.reference has only for up to 64 channels.
        flat = add("Concat", [-1], count, [1], axis=0)
        places = add("Reshape", add("Expand", index, shape), flat)
        rows = add("Reshape", direction, add("Concat", [-1], channels, axis=0))
        values = _reshape(add, add("GatherND", rows, places, batch_dims=1), shape)
        return narrow(add, values, add.constant(ELEMENTS["float16"]))

    def none(add: Nodes) -> str:
        rows = add("Shape", direction, end=-1)
        return add("Expand", np.float32(0), add("Concat", rows, [0], axis=0))

    return add.choose(fields.has_outliers, kept, none)


def _scale_and_zero(
    add: Nodes, direction: str, coded: str, present: str, fields: _Fields
) -> list[str]:
    """S1 S2 S3 S4: scale and zero of directions [..., n, D]."""
    axis = add("Where", fields.channel, -2, -1)
    axes = add("Unsqueeze", axis, [0])
    low = add("ReduceMin", add("Where", coded, direction, INFINITY), axes, keepdims=1)
    high = add("ReduceMax", add("Where", coded, direction, -INFINITY), axes, keepdims=1)
    nothing = add("Greater", low, high)
    low, high = (add("Where", nothing, np.float32(0), end) for end in (low, high))
    widest = _range_scale(add, low, high, fields)
    counted = add("And", coded, present)

    def error(add: Nodes, scale: str, zero: str, refused: Any) -> str:
        """Return the sum of squared errors, in the order of S4, or what is told if not finite."""
        off = _off(add, direction, scale, zero, fields)
        off = add("Where", counted, off, np.float32(0))
        wide = add.cast(off, "float64")
        total = _last_sum(add, add("Mul", wide, wide), axis)
        return add("Where", _fits(add, scale, zero), total, refused)

    def search(add: Nodes) -> list[str]:
        shrunken = _shrunken(add, low, high, fields)

        def shrink(add: Nodes, step: str, state: Sequence[str]) -> list[str]:
            lower, upper = shrunken(add, add("Gather", SHRINK[1:], step))
            scale, zero = _range_scale(add, lower, upper, fields)
            new = [scale, zero, error(add, scale, zero, np.float64(np.inf))]
            better = add("Less", new[2], state[2])
            return [add("Where", better, one, old) for one, old in zip(new, state, strict=True)]

        # Nothing is less than -infinity: a full range that does not fit is kept.
        first = [*widest, error(add, widest[0], widest[1], np.float64(-np.inf))]
        return add.repeat(len(SHRINK) - 1, shrink, first, ["float32", "float32", "float64"])[:2]

    return add.choose_several(fields.search, search, lambda _: widest, ["float32", "float32"])


def _scale_and_zero_of_column(add: Nodes, column: str, present: str, fields: _Fields) -> list[str]:
    """F1 S1 S2 S3 S4: scale and zero of one channel, [heads, outer, blocks, n, 1]."""
    low, high = (add(kind, column, [-2], keepdims=1) for kind in ("ReduceMin", "ReduceMax"))

    def search(add: Nodes) -> list[str]:
        # All candidates at once, on a new first axis: there are many columns, and little in each.
        ranges = SHRINK.reshape(-1, 1, 1, 1, 1, 1)
        lower, upper = (
            add("Concat", add("Unsqueeze", widest, [0]), shorter, axis=0)
            for widest, shorter in zip(
                (low, high), _shrunken(add, low, high, fields)(add, ranges[1:]), strict=True
            )
        )
        scale, zero = _range_scale(add, lower, upper, fields)
        wide = add.cast(_off(add, column, scale, zero, fields), "float64")
        square = add("Mul", wide, wide)
        # Quicker than Where, and 0 for what was filled in, even where that is infinite.
        most = add("Where", present, np.float64(np.inf), np.float64(0))
        total = _last_sum(add, add("Min", add("Mul", square, square), most), -2)
        errors = add("Where", _fits(add, scale, zero), total, np.float64(np.inf))
        best = add("ArgMin", errors, axis=0, keepdims=1)
        return [
            add("Squeeze", add("GatherElements", one, best, axis=0), [0]) for one in (scale, zero)
        ]

    return add.choose_several(
        fields.search, search, lambda add: _range_scale(add, low, high, fields),
        ["float32", "float32"],
    )  # fmt: skip


def _shrunken(
    add: Nodes, low: str, high: str, fields: _Fields
) -> Callable[[Nodes, Any], tuple[str, str]]:
    """S4: return what makes both ends of shorter ranges, of a builder and factors."""
    half = np.float32(0.5)
    half_high, half_low = add("Mul", high, half), add("Mul", low, half)
    middle, radius = add("Add", half_high, half_low), add("Sub", half_high, half_low)

    def shrunken(add: Nodes, factor: Any) -> tuple[str, str]:
        shorter = add("Mul", factor, radius)
        lower, upper = add("Sub", middle, shorter), add("Add", middle, shorter)
        return (
            add("Where", fields.symmetric, add("Mul", factor, low), lower),
            add("Where", fields.symmetric, add("Mul", factor, high), upper),
        )

    return shrunken


def _off(add: Nodes, direction: str, scale: str, zero: str, fields: _Fields) -> str:
    """Return by how much directions are off once they are coded."""
    return add("Sub", direction, _decoded(add, direction, scale, zero, fields))


def _last_sum(add: Nodes, terms: str, axis: Any) -> str:
    """Return the sum over an axis, term by term (S4)."""
    sums = add("CumSum", terms, axis)
    axes = add("Unsqueeze", axis, [0])
    return add("Slice", sums, [-1], [np.iinfo(np.int64).max], axes)


def _fits(add: Nodes, scale: str, zero: str) -> str:
    return add("And", *(add("Less", add("Abs", one), INFINITY) for one in (scale, zero)))


def _range_scale(add: Nodes, low: str, high: str, fields: _Fields) -> list[str]:
    """S1 S2 S3: scale and zero that make the range that of the codes."""
    least = add("Where", fields.symmetric, np.float32(0), low)
    zero = narrow(add, least, fields.scale_dtype)
    both = add("Max", high, add("Neg", low))
    span = add("Where", fields.symmetric, both, add("Sub", high, zero))
    return [narrow(add, add("Div", span, fields.greatest), fields.scale_dtype), zero]


def _code(add: Nodes, direction: str, scale: str, zero: str, fields: _Fields) -> str:
    """Q1 Q2: codes as float32."""
    shifted = add("Sub", direction, zero)
    quotient = add("Div", shifted, where_zero(add, scale, INFINITY))
    return add("Clip", add("Round", quotient), fields.least, fields.greatest)


def _decoded(add: Nodes, direction: str, scale: str, zero: str, fields: _Fields) -> str:
    """Q1 Q2 D1: what directions become."""
    return _dequantized(add, _code(add, direction, scale, zero, fields), scale, zero)


def _dequantized(add: Nodes, codes: str, scale: str, zero: str) -> str:
    return add("Add", add("Mul", codes, scale), zero)


def _factor(
    add: Nodes, x: str, norm: str, size: str, length: str, coded: Sequence[str], fields: _Fields
) -> str:
    """M1 M2 M3: the narrowed factor of each token; ``length`` is said by `fed_back`."""

    def of_decoded(add: Nodes) -> str:
        codes, scale, zero, index, outliers = coded
        y = _dequantized(add, codes, scale, zero)

        def with_outliers(add: Nodes) -> str:
            of_token = add("Expand", index, add("Shape", outliers))
            return add("ScatterElements", y, of_token, outliers, axis=-1)

        y = add.choose(fields.has_outliers, with_outliers, lambda _: y)
        # Not in the branch of gains: ONNX Runtime does not inline one that is so deep.
        counts = add("And", fields.balanced, fields.gain)
        sized = add.choose(counts, lambda add: add("Div", y, size), lambda _: y)
        return add.choose(
            fields.least_squares,
            lambda add: rounding.least_squares_gain(add, x, y),
            lambda add: add("Div", norm, where_zero(add, rounding.norm(add, sized), INFINITY)),
        )

    def of_gain(add: Nodes) -> str:
        from_seen = add("And", fields.gain, add("OptionalHasElement", "order"))
        return add.choose(from_seen, lambda add: add("Mul", norm, length), of_decoded)

    factor = add.choose(fields.stores_norm, lambda _: norm, of_gain)
    return narrow(add, factor, fields.norm_dtype)  # M4


# --- bytes --------------------------------------------------------------------------------------


def _pack(add: Nodes, codes: str, fields: _Fields) -> str:
    """P1: return rows of bytes."""
    channels = add("Shape", codes, start=-1)
    missing = add("Mod", add("Neg", channels), 8)
    pads = add("Concat", [0], missing, axis=0)
    padded = add("Pad", add("Add", codes, fields.offset), pads, fields.offset, [-1])

    def row(add: Nodes, numbers: str, bits: Any) -> str:
        """Pack numbers of so many bits."""
        shifts = add("Range", 0, 8, bits)
        size = add("Div", add("Add", add("Mul", channels, bits), 7), 8)
        filled = add("Div", add("Mul", add("Shape", numbers, start=-1), bits), 8)
        lead = add("Shape", numbers, end=-1)
        shape = add("Concat", lead, filled, add("Shape", shifts), axis=0)
        groups = add("Mul", _reshape(add, numbers, shape), add("Gather", POWERS, shifts))
        row_bytes = add.cast(add("ReduceSum", groups, [-1], keepdims=0), "uint8")
        return add("Slice", row_bytes, [0], size, [-1])

    def two_rows(add: Nodes) -> str:
        high = add("Floor", add("Mul", padded, np.float32(0.25)))
        low = add("Sub", padded, add("Mul", high, np.float32(4)))
        return add("Concat", row(add, low, 2), row(add, high, 1), axis=-1)

    three = add("Equal", fields.bits, 3)
    return add.choose(three, two_rows, lambda add: row(add, padded, fields.bits), "uint8")


def _unpack(add: Nodes, channels: str, fields: _Fields) -> str:
    """P1: return codes [..., T', D] as float32."""

    def row(add: Nodes, row_bytes: str, bits: Any) -> str:
        """Return the numbers of so many bits that were packed."""
        shifts = add("Range", 0, 8, bits)
        mask = add("Sub", add("Gather", [2, 4, 8, 16, 32, 64, 128, 256], add("Sub", bits, 1)), 1)
        groups = add(
            "BitShift", _a_token(add, row_bytes), add.cast(shifts, "uint8"), direction="RIGHT"
        )
        numbers = add("BitwiseAnd", groups, add.cast(mask, "uint8"))
        size = add("Mul", add("Shape", row_bytes, start=-1), add("Shape", shifts))
        shape = add("Concat", add("Shape", row_bytes, end=-1), size, axis=0)
        flat = add.cast(_reshape(add, numbers, shape), "float32")
        return add("Slice", flat, [0], channels, [-1])

    def two_rows(add: Nodes) -> str:
        split = add("Div", add("Add", channels, 3), 4)
        low = add("Slice", "packed", [0], split, [-1])
        high = add("Slice", "packed", split, [np.iinfo(np.int64).max], [-1])
        return add("Add", row(add, low, 2), add("Mul", row(add, high, 1), np.float32(4)))

    three = add("Equal", fields.bits, 3)
    numbers = add.choose(three, two_rows, lambda add: row(add, "packed", fields.bits))
    return add("Sub", numbers, fields.offset)

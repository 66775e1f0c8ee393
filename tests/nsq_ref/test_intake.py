"""Every public function takes NumPy, DLPack and plain Python alike, or refuses by name.

The functions are found, not listed: one that is missing in the table below fails. What a torch
tensor does that the stand-in here does not is in tests/with_torch.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import find, settings
from matplotlib.figure import Figure
from numpy.typing import NDArray

import nsq_ref as nsq
from nsq_ref import (
    attention,
    audit,
    bounds,
    comparison,
    feedback,
    files,
    metrics,
    oracle,
    packing,
    plots,
    rivals,
    rounding,
    spec,
    strategies,
)
from nsq_ref.bounds import Interval
from tests.support.tensors import DeviceTensor, Tensor


@dataclass
class Of:
    """An argument of a kind, as it is given plainly."""

    value: Any


class Numbers(Of):
    """An array, or many in a list, a mapping or a named tuple."""


class Integer(Of): ...


class Integers(Of): ...


class Number(Of): ...


class Named(Of):
    """A scheme, by its name."""


class OneOrTwo(Named):
    """Or the name of a pair."""


class Call(NamedTuple):
    function: Callable[..., Any]
    arguments: dict[str, Any]


def call(function: Callable[..., Any], **arguments: Any) -> Call:
    return Call(function, arguments)


RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 12, 8)).astype(np.float32)
STREAM = nsq.Scheme(symmetric=False, magnitude="lsq", block_size=4, sink_tokens=1)
Q = nsq.quantize(X, "nsep+out4")
PLAIN = nsq.quantize(X)
KNOWN = bounds.certificate(Q)
QUERY, KEYS, VALUES = RNG.standard_normal((3, 1, 2, 12, 8)).astype(np.float32)
ENDS = Interval(np.array([[0.25, 0.5]]), np.array([[0.5, 0.75]]))
ONE = Interval(np.array([1.0]), np.array([1.5]))
Y = np.array([[0.5, 0.75]])
OPTIONS = {
    "lengths": Integers([11]), "query_lengths": Integers([3]), "scale": Number(0.25),
    "softcap": Number(4.0), "sliding_window": Integer(5),
}  # fmt: skip
FEEDBACK = nsq.Feedback.from_queries(X, 2)
BLOCK = spec.encode(X, nsq.Scheme(outlier_channels=1))
PACKED_BLOCK = BLOCK._replace(codes=packing.pack(BLOCK.codes, nsq.Scheme()))


def drawn(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function of `plots` on axes of its own, and return what the lines show."""

    def draw(**arguments: Any) -> Any:
        axes = Figure().subplots()
        function(axes, **arguments)
        return [line.get_xydata() for line in axes.lines]

    return draw


def saved(**arrays: Any) -> Any:
    with TemporaryDirectory() as folder:
        files.write_arrays(Path(folder) / "x.safetensors", **arrays)
        return files.read_arrays(Path(folder) / "x.safetensors")


def round_trip(schemes: Any, keys: Any, values: Any) -> Any:
    return comparison.CacheRoundTrip(schemes)(keys, values)


def of_rival(schemes: Any) -> Any:
    return rivals.entry_of(schemes).store(X, X)


def calibrated_rival(keys: Any, values: Any) -> Any:
    return rivals.entry("onnxruntime-int4").calibrated(keys, values).store(X, X)


def one_drawn(**fixed: Any) -> Any:
    return find(strategies.schemes(**fixed), lambda _: True, settings=settings(database=None))


def repr_of(function: Callable[..., Any]) -> Callable[..., str]:
    return lambda **arguments: repr(function(**arguments))


def feedback_parts(function: Callable[..., nsq.Feedback]) -> Callable[..., Any]:
    def parts(**arguments: Any) -> Any:
        made = function(**arguments)
        return made.order, made.factor

    return parts


def moments(layers: Any) -> feedback.Moments:
    return feedback.Moments({3: layers})


def prepared(**arguments: Any) -> Any:
    piece = attention.prepare(**arguments)
    return piece.kv_heads, piece.tokens, piece.head_dim, piece.arrays


def audited(**arguments: Any) -> Any:
    return repr(audit.audit(schemes=["naive4"], **arguments).to_dict())


def as_layers(**arguments: Any) -> Any:
    return [list(layer[1:4]) for layer in audit.as_layers(**arguments)]


CALLS: dict[str, Call] = {
    "audit.audit": call(
        audited, keys=Numbers(np.stack([KEYS, VALUES])), values=Numbers(np.stack([VALUES, KEYS])),
        queries=Numbers(np.stack([QUERY, KEYS])), default=OneOrTwo("streaming4"),
        limit=Number(0.25), softmax_scale=Number(0.25),
    ),
    "audit.as_layers": call(
        as_layers, keys=Numbers([KEYS, VALUES]), values=Numbers([VALUES, KEYS]),
        queries=Numbers([QUERY, KEYS]),
    ),
    "quantize": call(nsq.quantize, x=Numbers(X), scheme=Named("streaming4")),
    "dequantize": call(nsq.dequantize, quantized=Q),  # `out` has a test of its own
    "Scheme": call(
        nsq.Scheme, bits=Integer(3), block_size=Integer(64), sink_tokens=Integer(2),
        outlier_channels=Integer(1),
    ),
    "Scheme.cut": call(nsq.Scheme(block_size=4).cut, length=Integer(10)),
    "Scheme.layout": call(nsq.Scheme().layout, tokens=Integer(10), head_dim=Integer(8)),
    "Scheme.parts": call(nsq.Scheme().parts, head_dim=Integer(8)),
    "Scheme.tokens_per_block": call(nsq.Scheme(block_size=4).tokens_per_block, coded=Integer(9)),
    "Scheme.bits_per_element": call(
        STREAM.bits_per_element, tokens=Integer(9), head_dim=Integer(8)
    ),
    "Quantized": call(
        nsq.Quantized, scheme=Named("nsep+out4"), shape=Integers(list(X.shape)), dtype="float32",
        **{name: Numbers(part) for name, part in Q.parts.items()}, collapsed_tokens=Integer(0),
    ),
    "Feedback": call(
        feedback_parts(nsq.Feedback), order=Numbers(FEEDBACK.order), factor=Numbers(FEEDBACK.factor)
    ),
    "Feedback.from_moment": call(
        feedback_parts(nsq.Feedback.from_moment), damping=Number(0.25),
        moment=Numbers(X[:, :8].swapaxes(1, 2) @ X[:, :8]),
    ),
    "Feedback.from_queries": call(
        feedback_parts(nsq.Feedback.from_queries), queries=Numbers(X), kv_heads=Integer(2),
        damping=Number(0.25),
    ),
    "Feedback.head": call(FEEDBACK.head, index=Integer(1)),
    "feedback.second_moment": call(
        feedback.second_moment, queries=Numbers(X), kv_heads=Integer(2)
    ),
    "feedback.Moments": call(
        lambda layers: (moments(layers) + moments(layers)).layers[3],
        layers=Numbers(X[:, :8].swapaxes(1, 2) @ X[:, :8]),
    ),
    "feedback.Moments.feedback": call(
        feedback_parts(lambda damping: moments(np.eye(4)[None]).feedback(damping)["3"]),
        damping=Number(0.25),
    ),
    "attention.attend": call(
        attention.attend, query=Numbers(QUERY[:, :, :3]), keys=Numbers(KEYS),
        values=Numbers(VALUES), **OPTIONS,
    ),
    "attention.tolerance": call(
        attention.tolerance, query=Numbers(QUERY[:, :, :3]), keys=Numbers(KEYS),
        values=Numbers(VALUES),
        key_reach=Numbers(abs(KEYS)), value_reach=Numbers(abs(VALUES)), **OPTIONS,
    ),
    "attention.reach": call(attention.reach, quantized=Q),
    "attention.prepare": call(
        prepared, source=Numbers(PACKED_BLOCK), scheme=Named("nsep+pchan4"), head_dim=Integer(8)
    ),
    "attention.attend_quantized": call(
        attention.attend_quantized, query=Numbers(QUERY[0, :, :3]), keys=Numbers([KEYS[0]]),
        values=Numbers([VALUES[0]]), key_scheme=Named("streaming4"), value_scheme=Named("naive4"),
        value_head_dim=Integer(8), scale=Number(0.25), softcap=Number(4.0),
        sliding_window=Integer(5),
    ),
    "bounds.certificate": call(bounds.certificate, quantized=Q),
    "bounds.encoder_bounds": call(bounds.encoder_bounds, x=Numbers(X), quantized=Q),
    "bounds.a_priori": call(bounds.a_priori, scheme=Named("nsep4"), head_dim=Integer(64)),
    "bounds.Bounds.logit_interval": call(KNOWN.logit_interval, query=Numbers(X[:, :2])),
    "bounds.Bounds.logit": call(KNOWN.logit, query=Numbers(X[:, :2])),
    "bounds.Bounds.estimate_logit_rms": call(KNOWN.estimate_logit_rms, query=Numbers(X[:, :2])),
    "bounds.narrowing_interval": call(
        bounds.narrowing_interval, stored=Numbers(np.array([0.5, 1.0])), dtype="float16"
    ),
    "bounds.direction_interval": call(
        bounds.direction_interval, codes=Numbers(np.array([[3, 15]])),
        scale=Numbers(np.array([[0.125, 0.25]])), zero=Numbers(np.array([[0.5, -0.5]])),
        scheme=Named("streaming4"), direction=Numbers(np.array([[0.75, 0.875]])),
    ),
    "bounds.element_error": call(
        bounds.element_error, scale=Numbers(np.array([0.125])), zero=Numbers(np.array([0.5])),
        scheme=Named("streaming4"), direction=Numbers(np.array([0.875])),
    ),
    "bounds.direction_error": call(bounds.direction_error, element=Numbers(Y)),
    "bounds.chord": call(
        bounds.chord, error=Numbers(np.array([0.25])), y=Numbers(Y), length=Numbers(ONE)
    ),
    "bounds.relative_error": call(
        bounds.relative_error, chord=Numbers(np.array([0.25])), factor_error=Numbers(ONE)
    ),
    "bounds.factor_error": call(
        bounds.factor_error, factor=Numbers(np.array([1.5, 0.0])), dtype="float16"
    ),
    "bounds.norm_interval": call(
        bounds.norm_interval, factor=Numbers(np.array([2.0])), y=Numbers(Y),
        direction=Numbers(ENDS), scheme=Named("streaming4"),
    ),
    "bounds.reconstruction_error": call(
        bounds.reconstruction_error, direction=Numbers(ENDS), norm=Numbers(ONE), x_hat=Numbers(Y)
    ),
    "bounds.feedback_element_error": call(
        bounds.feedback_element_error, direction=Numbers(X[0]), step_error=Numbers(abs(X[0])),
        feedback=FEEDBACK.head(0),
    ),
    "bounds.feedback_gain_error": call(
        bounds.feedback_gain_error, direction=Numbers(X[0]), step_error=Numbers(abs(X[0])),
        feedback=FEEDBACK.head(0), y=Numbers(X[0] / 2),
    ),
    "bounds.feedback_logit_error": call(
        bounds.feedback_logit_error, query=Numbers(X[0, :3]), direction=Numbers(X[0]),
        step_error=Numbers(abs(X[0])), feedback=FEEDBACK.head(0),
    ),
    "bounds.feedback_metric_error": call(
        bounds.feedback_metric_error, moment=Numbers(X[0].T @ X[0]), direction=Numbers(X[0]),
        step_error=Numbers(abs(X[0])), feedback=FEEDBACK.head(0),
    ),
    "bounds.logit_error": call(
        bounds.logit_error, query=Numbers(Y), direction=Numbers(ENDS), norm=Numbers(ONE),
        x_hat=Numbers(Y),
    ),
    "bounds.estimate_logit_rms": call(
        bounds.estimate_logit_rms, query=Numbers(Y), scale=Numbers(Y), norm=Numbers(np.array([2.0]))
    ),
    "bounds.total_variation": call(
        bounds.total_variation, error=Numbers(ENDS), softmax_scale=Number(0.5),
        softcap=Number(8.0), where=Numbers(np.array([True, True])),
    ),
    "bounds.spread": call(
        bounds.spread, values=Numbers(VALUES[0, 0]), error=Numbers(abs(VALUES[0, 0, :, 0])),
        where=Numbers(np.eye(12, dtype=bool)),
    ),
    "bounds.output_error": call(
        bounds.output_error, weights=Numbers(Y), error=Numbers(np.array([0.1, 0.2])),
        total_variation=Numbers(np.array([0.25])), spread=Numbers(np.array([3.0])),
    ),
    "comparison.CacheRoundTrip": call(
        round_trip, schemes=OneOrTwo("nsep4"), keys=Numbers(X), values=Numbers(X)
    ),
    "comparison.layered": call(comparison.layered, arrays=Numbers([X, X]), side="arrays"),
    "rivals.Entry.store": call(
        rivals.entry("turboquant4").store, keys=Numbers(X), values=Numbers(X)
    ),
    "rivals.Entry.calibrated": call(
        calibrated_rival, keys=Numbers(X), values=Numbers(X)
    ),
    "rivals.Entry.bits_per_element": call(
        rivals.entry("pca16").bits_per_element, tokens=Integer(5), head_dim=Integer(4),
        heads=Integer(2),
    ),
    "rivals.entry_of": call(of_rival, schemes=OneOrTwo("nsep4")),
    "metrics.relative_error": call(
        metrics.relative_error, x=Numbers(X), x_hat=Numbers(X + 1), axis=Integer(-1)
    ),
    "metrics.cosine_similarity": call(
        metrics.cosine_similarity, x=Numbers(X), x_hat=Numbers(X + 1)
    ),
    "metrics.outlier_ratio": call(metrics.outlier_ratio, x=Numbers(X)),
    "oracle.encode": call(oracle.encode, x=Numbers(X[0, :3]), scheme=Named("nsep+pchan4")),
    "oracle.decode": call(
        oracle.decode, parts=Numbers({name: part[0] for name, part in PLAIN.parts.items()}),
        head_dim=Integer(8), scheme=Named("nsep+pchan4"),
    ),
    "packing.pack": call(
        packing.pack, codes=Numbers(np.array([[3, -7]])), scheme=Named("nsep+pchan4")
    ),
    "packing.unpack": call(
        packing.unpack, packed=Numbers(np.uint8([[0x8F]])), scheme=Named("nsep+pchan4"),
        head_dim=Integer(2),
    ),
    "rounding.narrow": call(rounding.narrow, value=Numbers(X), dtype="float16"),
    "rounding.saturate": call(rounding.saturate, value=Numbers(X), dtype="float16"),
    "rounding.norm": call(rounding.norm, x=Numbers(X)),
    "rounding.least_squares_gain": call(
        rounding.least_squares_gain, x=Numbers(X), y=Numbers(X + 1)
    ),
    "files.write_arrays": call(saved, arrays=Numbers({"k": X})),
    "strategies.feedbacks": call(
        repr_of(strategies.feedbacks), kv_heads=Integer(2), head_dim=Integer(4)
    ),
    "strategies.schemes": call(one_drawn, bits=Integer(3)),
    **{
        f"strategies.{function.__name__}": call(
            repr_of(function), min_tokens=Integer(1), max_tokens=Integer(3),
            min_head_dim=Integer(1), max_head_dim=Integer(4), leading=Integers([2, 1]),
        )
        for function in (strategies.tensors, strategies.inputs)
    },
    "plots.error_by_layer": call(
        drawn(plots.error_by_layer), errors=Numbers({"a": np.array([0.1, 0.2])}), title=""
    ),
    "plots.direction_histogram": call(
        drawn(plots.direction_histogram), x=Numbers(X), schemes=["nsep4"], title=""
    ),
    "plots.sweep": call(
        drawn(plots.sweep), settings=Numbers(np.array([1, 2])),
        results=Numbers({"a": np.array([0.1, 0.2])}), title="",
        standard_errors=Numbers({"a": np.array([0.1, 0.2])}),
    ),
    "plots.outlier_ratio_map": call(
        drawn(plots.outlier_ratio_map), ratios=Numbers(np.array([[1.0, 2.0]])), title=""
    ),
    "plots.token_channel_map": call(
        drawn(plots.token_channel_map), values=Numbers(X[0]), title=""
    ),
    "plots.error_map": call(
        drawn(plots.error_map), x=Numbers(X[0]), x_hat=Numbers(X[0] + 1), title=""
    ),
    "plots.bound_against_measured": call(
        drawn(plots.bound_against_measured), pairs={"a": (Y, Y)}, title=""
    ),
    "plots.share_of_bound": call(
        drawn(plots.share_of_bound), pairs={"a": {"b": (Y, Y)}}, title=""
    ),
    "plots.two_channels": call(
        drawn(plots.two_channels), tokens=Numbers(np.float32([[3, 4], [4, 3]])),
        scheme=Named("nsep+pchan3"), chosen=Integer(1),
    ),
    "plots.estimate_against_measured": call(
        drawn(plots.estimate_against_measured), estimate=Numbers(Y), measured=Numbers(Y), title=""
    ),
    "plots.quantile_rows": call(
        drawn(plots.quantile_rows), samples=Numbers({"a": Y}), title="", xlabel=""
    ),
    "plots.bars": call(
        drawn(plots.bars), labels=["a", "b"], heights=Numbers({"a": np.array([1.0, 2.0])}),
        title="",
    ),
    "plots.stacked_rows": call(
        drawn(plots.stacked_rows), rows={"a": {"codes": np.float32(4.0)}}, title="", xlabel=""
    ),
    "plots.pareto_front": call(
        plots.pareto_front, bits=Numbers(np.array([4.0, 3.0])), error=Numbers(np.array([1.0, 2.0]))
    ),
    "plots.frontier": call(
        drawn(plots.frontier), points={"a": (np.float32(4), np.array(0.25))}, title="", ylabel=""
    ),
    "plots.named_points": call(
        drawn(plots.named_points), points={"a": (np.float32(4), np.array(0.25))}, title="",
        xlabel="", ylabel="",
    ),
}  # fmt: skip

# What takes no array, integer or scheme of a caller, or is what a function returns.
TAKE_NONE = {
    "audit.Audit", "audit.Audit.judged", "audit.Layer", "audit.LayerAudit",
    "audit.LayerAudit.bits", "audit.Recommendation", "audit.audit_layers", "audit.html_page",
    "audit.layers_of_arrays",
    "CompilationWarning", "RangeError", "KeyValueSchemes", "Scheme.named", "Scheme.from_dict",
    "Scheme.to_dict",
    "profile_names", "scheme_names", "attention.Attention", "attention.PreparedPiece",
    "bounds.APriori",
    "bounds.Bounds", "bounds.Interval", "cache.StoredRow", "comparison.round_trips",
    "comparison.CacheRoundTrip.total_error", "comparison.CacheRoundTrip.worst_layer",
    "comparison.CacheRoundTrip.to_dict", "plots.demo_figure", "scheme.Cut", "scheme.Field",
    "scheme.Part", "cli.main", "rivals.entry", "rivals.entries", "rivals.Entry",
    "rivals.Entry.with_feedback", "rivals.Codec",
    "rivals.Codec.encode", "rivals.Codec.decode", "rivals.Codec.coded", "rivals.NormFirst",
    "rivals.NormFirst.encode", "rivals.NormFirst.decode", "rivals.NormFirst.coded", "rivals.Part",
    "rivals.SchemeCodec", "rivals.SchemeCodec.encode", "rivals.SchemeCodec.decode",
    "rivals.SchemeCodec.coded", "rivals.Stored", "codec.block_of", "rivals.Unquantized",
    "rivals.Unquantized.encode", "rivals.Unquantized.decode", "rivals.Unquantized.coded",
    "files.StorageError", "files.holds_cache",
    "files.is_quantized", "files.load", "files.load_feedback", "files.read_arrays", "files.save",
    "files.save_feedback", "feedback.HeadFeedback",
}  # fmt: skip
# Modules with such a test of their own, and those that the package keeps for itself.
ELSEWHERE = {
    f"nsq_ref.{name}"
    for name in (
        "arrays", "cache", "conformance", "dlpack", "dtypes", "environment", "extras", "kernels",
        "policy", "profiles", "quantized", "transformers",
    )
}  # fmt: skip


# --- every public function is in the table --------------------------------------------------------


def public(module: Any, prefix: str) -> Iterator[str]:
    for name in module.__all__:
        thing = getattr(module, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)):
            continue
        yield prefix + name
        if inspect.isclass(thing):
            for method, function in vars(thing).items():
                plain = getattr(function, "__func__", function)
                if inspect.isfunction(plain) and not method.startswith("_"):
                    parameters = list(inspect.signature(plain).parameters)[1:]
                    if parameters or isinstance(function, staticmethod):
                        yield f"{prefix}{name}.{method}"


def every_public_name() -> set[str]:
    found = set(public(nsq, ""))
    for info in pkgutil.iter_modules(nsq.__path__, "nsq_ref."):
        if info.name in ELSEWHERE or info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        if hasattr(module, "__all__"):
            short = info.name.removeprefix("nsq_ref.") + "."
            found |= {
                name
                for name in public(module, short)
                if name.removeprefix(short).split(".")[0] not in nsq.__all__
            }
    return {name for name in found if name.split(".")[0] != "KVCache"}


def test_every_public_function_is_here() -> None:
    missing = every_public_name() - CALLS.keys() - TAKE_NONE
    assert not missing, f"add to CALLS, or to TAKE_NONE: {sorted(missing)}"
    gone = CALLS.keys() - every_public_name()
    assert not gone, f"no longer public: {sorted(gone)}"


def test_every_argument_is_of_a_kind() -> None:
    """A plain array or integer in the table would not be tried in other forms."""
    for name, (_, arguments) in CALLS.items():
        assert not [k for k, v in arguments.items() if isinstance(v, int | np.ndarray)], name


# --- in every form ------------------------------------------------------------------------------


def mapped(value: Any, change: Callable[[NDArray[Any]], Any]) -> Any:
    """Change the arrays of a list, a mapping, or a named tuple."""
    if isinstance(value, np.ndarray):
        return change(value)
    if isinstance(value, Mapping):
        return {name: mapped(one, change) for name, one in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(*(mapped(one, change) for one in value))
    return [mapped(one, change) for one in value]


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def strided(array: NDArray[Any]) -> NDArray[Any]:
    """The same numbers, with steps of -2 along each axis."""
    wide = np.zeros([2 * size for size in array.shape], array.dtype)
    view = wide[tuple(slice(None, None, -2) for _ in array.shape)]
    view[...] = array
    return view


def swapped(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind not in "fiu" or array.dtype.itemsize == 1:
        return array
    return array.astype(array.dtype.newbyteorder())


ARRAY_FORMS: dict[str, Callable[[NDArray[Any]], Any]] = {
    "DLPack": Tensor,
    "DLPack, strided": lambda array: Tensor(strided(array)),
    "read-only": read_only,
    "strided": strided,
    "matrix": lambda array: array.view(np.matrix) if array.ndim == 2 else array,
}
INTEGER_FORMS: dict[str, Callable[[int], Any]] = {
    "int64": np.int64,
    "int8": np.int8,
    "0-d": np.array,
    "DLPack": lambda value: Tensor(np.array(value, np.int32)),
}
INTEGERS_FORMS: dict[str, Callable[[list[int]], Any]] = {
    "tuple": tuple,
    "int64": np.array,
    "int32, strided": lambda values: strided(np.array(values, np.int32)),
    "DLPack": lambda values: Tensor(np.array(values)),
    "scalars": lambda values: [np.int16(value) for value in values],
    "0-d": lambda values: [np.array(value) for value in values],
}
NUMBER_FORMS: dict[str, Callable[[float], Any]] = {
    "float32": np.float32,
    "0-d": np.array,
    "DLPack": lambda value: Tensor(np.array(value)),
}


def forms(argument: Of) -> Iterator[tuple[str, Any]]:
    value = argument.value
    if isinstance(argument, Numbers):
        for name, change in ARRAY_FORMS.items():
            yield name, mapped(value, change)
    elif isinstance(argument, Integer):
        for name, form in INTEGER_FORMS.items():
            yield name, form(value)
    elif isinstance(argument, Integers):
        for name, many in INTEGERS_FORMS.items():
            yield name, many(value)
    elif isinstance(argument, Number):
        for name, number in NUMBER_FORMS.items():
            yield name, number(value)
    else:
        yield "Scheme", nsq.Scheme.named(value)


WRONG: dict[type[Of], list[Any]] = {
    Integer: [True, 2.0, np.float64(2), "2", [2], np.array([2]), np.True_],
    Integers: [True, 2.0, "2", np.array(2), {2}, [True], np.array([[2]]), [2.0]],
    Number: [True, "2", [2.0], np.array([2.0]), 2j],
    OneOrTwo: [4, "nsep5"],
    Named: [4, nsq.Scheme.named("nsep+KIVI"), "nsep+KIVI", "nsep5"],
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        kinds = (one.dtype, one.shape) == (other.dtype, other.shape)
        return kinds and one.tobytes() == other.tobytes()
    if is_dataclass(one) and not isinstance(one, type | nsq.Scheme):
        pairs = ((getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
        return type(one) is type(other) and all(same(*pair) for pair in pairs)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) and type(one) is type(other)


def plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: one.value if isinstance(one, Of) else one for key, one in arguments.items()}


@pytest.mark.parametrize("name", CALLS)
def test_every_form_is_taken(name: str) -> None:
    function, arguments = CALLS[name]
    expected = function(**plain(arguments))
    for key, argument in arguments.items():
        if isinstance(argument, Of):
            for form, value in forms(argument):
                found = function(**plain(arguments) | {key: value})
                assert same(found, expected), f"{key} as {form}"


@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_taken_is_refused_by_name(name: str) -> None:
    function, arguments = CALLS[name]
    for key, argument in arguments.items():
        if not isinstance(argument, Of):
            continue
        wrong = WRONG.get(type(argument), [])
        if isinstance(argument, Numbers):
            wrong = [
                mapped(argument.value, change)
                for change in (DeviceTensor, np.ma.masked_array, lambda array: array.astype("U"))
            ]
        for value in wrong:
            with pytest.raises((TypeError, ValueError)) as caught:
                function(**plain(arguments) | {key: value})
            said = str(caught.value)
            ours = {"source": "a piece", "keys": "a piece", "values": "a piece"}
            assert key in said or ours.get(key, key) in said or "unknown scheme name" in said, said


def test_other_byte_orders() -> None:
    """NumPy's alone: DLPack knows none."""
    for name in ("quantize", "attention.attend", "bounds.encoder_bounds", "metrics.outlier_ratio"):
        function, arguments = CALLS[name]
        expected = function(**plain(arguments))
        for key, argument in arguments.items():
            if isinstance(argument, Numbers):
                value = mapped(argument.value, swapped)
                assert same(function(**plain(arguments) | {key: value}), expected)


def test_schemes_are_equal_whatever_their_integers_were() -> None:
    ours = nsq.Scheme(bits=3, block_size=64, sink_tokens=1, outlier_channels=2)
    for form in INTEGER_FORMS.values():
        theirs = nsq.Scheme(
            bits=form(3), block_size=form(64), sink_tokens=form(1), outlier_channels=form(2)
        )
        assert (theirs, hash(theirs), repr(theirs)) == (ours, hash(ours), repr(ours))
        assert {type(value) for value in theirs.to_dict().values()} == {int, bool, str}


def test_sizes_beyond_any_sequence() -> None:
    """B1 K1 O1: as large as one likes."""
    for size in (2**31, 2**40, 2**63, 2**70):
        whole = nsq.Scheme(outlier_channels=8)
        scheme = nsq.Scheme(outlier_channels=size, block_size=size)
        assert same(nsq.quantize(X, scheme).parts, nsq.quantize(X, whole).parts)
        kept = nsq.quantize(X, nsq.Scheme(sink_tokens=size))
        assert kept.packed.shape == (2, 0, 4)
        assert same(nsq.dequantize(kept), X)
        piece = partial(attention.prepare, PACKED_BLOCK, head_dim=8)
        longer = piece(nsq.Scheme(block_size=size))
        assert same(longer.arrays, piece(nsq.Scheme()).arrays)
        assert bounds.a_priori(scheme, 64).relative > 0

"""Judge of nsq.Attention: one node, run step by step, beside `KVCache` and a float64 formula.

A `Config` is what a model fixes; `model` builds it around a single node, `Runner` feeds the cache
of one step to the next, and `Expected` says what must come out of each. `check` compares.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator

from nsq_ref import Feedback, KVCache, Quantized, Scheme, attention
from nsq_ref.dtypes import FLOAT_DTYPES
from nsq_ref.scheme import Field, FloatName
from onnx_export.operators import attention_model, cache_fields
from onnx_export.operators.schema import ELEMENTS

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Inputs = dict[str, Array]

PARTS = ("packed", "scale", "norm", "zero", "sinks", "tail")
CACHE = tuple(f"{side}_{part}" for side in ("key", "value") for part in PARTS)
INPUTS = (
    "query", "key", "value", "past_lengths", "new_lengths", "cos", "sin", "position_ids",
    "attention_bias", "head_sink",
)  # fmt: skip
UNIT = 2.0**-24
# By how much of the largest a rounded query, a rounded query of few channels, and a rounded weight
# may move: 7/4 of a unit with one byte, 1/2 with two, 1 with the sum of roundings spread.
QUERY, FEW, WEIGHT = 1.75 / 126, 0.5 / (127 * 256 + 127), 1 / 126
BLOCKS_OF_4 = Scheme(block_size=4)


@dataclass(frozen=True)
class Config:
    """What a model with one nsq.Attention fixes."""

    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 4
    value_head_dim: int | None = None
    key: Scheme = BLOCKS_OF_4
    value: Scheme = BLOCKS_OF_4
    dtype: FloatName = "float32"
    capacity: int = 16  # tokens; each side has room for as many whole blocks as hold them
    scale: float | None = None
    causal: bool = True
    softcap: float | None = None
    sliding_window: int | None = None
    smooth_softmax: bool = False
    rotary: int = 0  # channels; cos and sin are inputs unless it is 0
    rotary_interleaved: bool = False
    # Whether the node has these inputs.
    packed: bool = False
    new_lengths: bool = True
    position_ids: bool = False
    attention_bias: bool = False
    head_sink: bool = False
    feedback: Feedback | None = None  # key_order and key_factor are inputs unless it is None

    @property
    def value_dim(self) -> int:
        return self.value_head_dim or self.head_dim

    @property
    def inputs(self) -> set[str]:
        """Names of the inputs that the node has, those of the cache aside."""
        names = {"query", "past_lengths"}
        names |= set() if self.packed else {"key", "value"}
        names |= {"cos", "sin"} if self.rotary else set()
        names |= {"key_order", "key_factor"} if self.feedback is not None else set()
        optional = ("new_lengths", "position_ids", "attention_bias", "head_sink")
        return names | {name for name in optional if getattr(self, name)}

    def cache(self, batch: int) -> dict[str, Field]:
        """Shape and dtype of every tensor of the cache, by the name behind past_ or present_."""
        fields = cache_fields(
            self.key, self.value, kv_heads=self.kv_heads, head_dim=self.head_dim,
            value_head_dim=self.value_dim, capacity=self.capacity, dtype=self.dtype,
        )  # fmt: skip
        return {name: Field((batch, *field.shape), field.dtype) for name, field in fields.items()}


def model(
    config: Config,
    functions: Sequence[onnx.FunctionProto] | None = None,
    opset: int = 21,
) -> onnx.ModelProto:
    """Return a model of one nsq.Attention; ``functions`` are those of the project by default."""
    built = attention_model(
        config.key, config.value, heads=config.heads, kv_heads=config.kv_heads,
        head_dim=config.head_dim, value_head_dim=config.value_dim, dtype=config.dtype, opset=opset,
        inputs=config.inputs - {"query", "past_lengths"}, scale=config.scale,
        causal=config.causal, softcap=config.softcap, sliding_window=config.sliding_window,
        rotary_interleaved=config.rotary_interleaved, smooth_softmax=config.smooth_softmax,
    )  # fmt: skip
    if functions is not None:
        del built.functions[:]
        built.functions.extend(functions)
    return built


class Runner:
    """Steps of one model; what is present after one is past in the next.

    The cache begins as random bytes, which nobody may look at. With ``in_place`` past and present
    are the same memory, which only a native kernel bears.
    """

    def __init__(
        self,
        config: Config,
        batch: int,
        *,
        functions: Sequence[onnx.FunctionProto] | None = None,
        library: str | os.PathLike[str] | None = None,
        in_place: bool = False,
        optimised: bool = True,
        reference: bool = False,
        opset: int = 21,
    ) -> None:
        self.config, self.in_place = config, in_place
        self.garbage = np.random.default_rng(batch)
        built = model(config, functions, opset)
        self.reference = ReferenceEvaluator(built) if reference else None
        if not reference:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            options.intra_op_num_threads = 1
            if not optimised:
                options.graph_optimization_level = (
                    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
                )
            if library is not None:
                options.register_custom_ops_library(os.fspath(library))
            self.session = onnxruntime.InferenceSession(
                built.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        self.lengths = np.zeros(batch, np.int64)
        self.cache = self._new_cache()

    def _new_cache(self) -> dict[str, Array]:
        return {
            name: np.frombuffer(
                self.garbage.bytes(int(np.prod(shape)) * dtype.itemsize), dtype
            ).reshape(shape).copy()
            for name, (shape, dtype) in self.config.cache(len(self.lengths)).items()
        }  # fmt: skip

    def step(self, inputs: Inputs) -> Array:
        """Append and attend; return the output. After an error the cache is what it was."""
        past = {f"past_{name}": array for name, array in self.cache.items()}
        feeds = {**inputs, "past_lengths": self.lengths, **past}
        batch, tokens = inputs["query"].shape[:2]
        channels = self.config.heads * self.config.value_dim
        cache = self.cache if self.in_place else self._new_cache()
        results = {
            "output": np.empty((batch, tokens, channels), FLOAT_DTYPES[self.config.dtype]),
            "present_lengths": np.empty(batch, np.int64),
            **{f"present_{name}": array for name, array in cache.items()},
        }
        if self.reference is not None:
            names = self.reference.output_names
            with np.errstate(all="ignore"):  # of padding
                found = self.reference.run(None, feeds)
            for name, got in zip(names, found, strict=True):
                assert (got.dtype, got.shape) == (results[name].dtype, results[name].shape), name
                results[name][...] = got
        else:
            self._run(feeds, results)
        self.lengths, self.cache = results["present_lengths"], cache
        return results["output"]

    def _run(self, feeds: Inputs, results: Inputs) -> None:
        """Run onnxruntime on the memory of these arrays: it knows no bfloat16 of NumPy."""
        binding = self.session.io_binding()
        feeds = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        # An array without elements has no memory to bind; any address will do.
        spare = np.zeros(1)
        for bind, arrays in ((binding.bind_input, feeds), (binding.bind_output, results)):
            for name, array in arrays.items():
                address = (array if array.size else spare).ctypes.data
                bind(name, "cpu", 0, ELEMENTS[array.dtype.name], array.shape, address)
        self.session.run_with_iobinding(binding)


# --- what must come out --------------------------------------------------------------------------


class Result(NamedTuple):
    """What attention gives in exact arithmetic, and how far float32 may be from it (rule A3)."""

    output: Float64  # [B, S, heads * D_v]
    bound: Float64


class Tokens(NamedTuple):
    """Keys or values as a decoder sees them, [B, kv_heads, T, D], and what bounds errors.

    The last three are for integer arithmetic, and 0 for tokens that are not coded: a direction is
    less than ``swing`` beside a level of its channel, ``gain`` is its factor, and ``length`` the
    relative error that this factor has where it is computed in integers (M1).
    """

    decoded: Array
    reach: Float64
    swing: Float64
    gain: Float64  # [B, kv_heads, T]
    length: Float64  # [B, kv_heads, T]


class Expected:
    """`KVCache` and the formula: what the operator must give, step by step.

    With ``integers`` the bound is that of a kernel that rounds queries and weights to 8 or 16 bits.
    """

    def __init__(self, config: Config, batch: int, integers: bool = False) -> None:
        self.config, self.integers = config, integers
        self.cache = KVCache(
            batch, config.kv_heads, config.head_dim, config.key, config.value,
            value_head_dim=config.value_dim, dtype=config.dtype, key_feedback=config.feedback,
        )  # fmt: skip

    def step(self, inputs: Inputs) -> Result:
        """Append and attend; `RangeError` where a block cannot be coded."""
        config, past = self.config, self.cache.lengths
        batch, tokens = inputs["query"].shape[:2]
        parts = [inputs["query"]]
        if config.packed:
            ends = config.head_dim * np.cumsum([config.heads, config.kv_heads])
            parts = np.split(inputs["query"], ends, axis=-1)
        else:
            parts += [inputs["key"], inputs["value"]]
        query, key, value = (
            part.reshape(batch, tokens, heads, -1).swapaxes(1, 2)
            for part, heads in zip(
                parts, (config.heads, config.kv_heads, config.kv_heads), strict=True
            )
        )
        counts = inputs.get("new_lengths", np.full(batch, tokens))
        if config.rotary:
            positions = inputs.get("position_ids", past[:, None] + np.arange(tokens))
            # Padding may have any position.
            positions = np.where(np.arange(tokens) < counts[:, None], positions, 0)
            cos, sin = (inputs[name][positions][:, None] for name in ("cos", "sin"))
            query, key = (rotated(x, cos, sin, config.rotary_interleaved) for x in (query, key))
        self.cache.append(key, value, counts)
        result = attend(
            config, query, *self.tokens(), self.cache.lengths, counts,
            inputs.get("attention_bias"), inputs.get("head_sink"), self.integers,
        )  # fmt: skip
        output, bound = (
            x.swapaxes(1, 2).reshape(batch, tokens, config.heads * config.value_dim) for x in result
        )
        return Result(output, bound)

    def tokens(self) -> tuple[Tokens, Tokens]:
        """Return keys and values."""
        sides = []
        for side, decoded in enumerate(self.cache.dequantize()):
            tokens = Tokens(
                decoded, *np.zeros((2, *decoded.shape)), *np.zeros((2, *decoded.shape[:3]))
            )
            for row, length in enumerate(self.cache.lengths):
                stored = self.cache.stored(row)[side]
                tokens.reach[row, :, :length] = np.abs(decoded[row, :, :length])
                if stored.sealed is not None:
                    first = stored.sinks.shape[1]
                    sealed = np.s_[row, :, first : first + stored.sealed.shape[1]]
                    tokens.reach[sealed] = attention.reach(stored.sealed)
                    for name, found in rounding(stored.sealed).items():
                        getattr(tokens, name)[sealed] = found
            sides.append(tokens)
        return sides[0], sides[1]


def rounding(sealed: Quantized) -> dict[str, Float64]:
    """Return the fields of `Tokens` that are for integer arithmetic."""
    scheme, tokens = sealed.scheme, sealed.shape[1]
    parts = {name: part.astype(np.float64) for name, part in sealed.parts.items()}
    each = np.arange(tokens) // (scheme.block_size or 1) if scheme.axis == "channel" else np.s_[:]
    scale = parts["scale"][:, each]
    zero = parts["zero"][:, each] if "zero" in parts else np.zeros_like(scale)
    swing = np.broadcast_to(2.0 ** (scheme.bits - 1) * np.abs(scale), sealed.shape)
    gain, length = np.ones(sealed.shape[:2]), np.zeros(sealed.shape[:2])
    if scheme.separate_norm:
        gain = parts["norm"]
    if scheme.separate_norm and scheme.magnitude == "norm":
        # The square of a length is summed as (scale e / 2)^2 + scale e level + level^2, e an
        # integer below 2^bits; what e^2 and e are multiplied with is rounded as queries are.
        y = sealed.codes * scale + zero
        square = np.square(y).sum(axis=-1)
        square = np.where(square == 0, np.inf, square)
        level = np.abs(zero + (2.0 ** (scheme.bits - 1) - 0.5) * scale) * (not scheme.symmetric)
        largest = np.square(swing).max(axis=-1) + 2 * (swing * level).max(axis=-1)
        terms = np.square(swing + level).sum(axis=-1)
        moved = largest * (FEW if y.shape[-1] < 16 else QUERY)
        off = (y.shape[-1] * moved + 32 * UNIT * terms) / square
        gain, length = gain / np.sqrt(square), np.where(off < 0.5, off, np.inf)
    return {"swing": swing, "gain": gain, "length": length}


def rotated(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Rotate the first channels of x[..., D] by cos and sin[..., R / 2]: float32, one rounding."""
    half = cos.shape[-1]
    turned = x[..., : 2 * half].astype(np.float32)
    c, s = cos.astype(np.float32), sin.astype(np.float32)
    first = np.s_[..., 0::2] if interleaved else np.s_[..., :half]
    second = np.s_[..., 1::2] if interleaved else np.s_[..., half:]
    a, b = turned[first], turned[second]
    with np.errstate(invalid="ignore"):  # in padding
        sum_first, sum_second = a * c - b * s, b * c + a * s
    turned[first], turned[second] = sum_first, sum_second
    return np.concatenate([turned.astype(x.dtype), x[..., 2 * half :]], axis=-1)


def gamma(roundings: int) -> float:
    return roundings * UNIT / (1 - roundings * UNIT)


def attend(
    config: Config,
    query: Array,
    keys: Tokens,
    values: Tokens,
    lengths: Array,
    counts: Array,
    bias: Array | None,
    head_sink: Array | None,
    integers: bool = False,
) -> Result:
    """Rules A1 to A3, with a bias of the scores and a sink in the softmax: [B, heads, S, D_v].

    The bias is added to the capped score: one rounding more, of a relative u. The sink is one more
    token whose score is exact and whose value is 0; a kernel may take the maximum without it.
    A bias of -infinity hides a token, and a query that sees nothing gives 0.

    In integers, a query times scales, or weights times gains, are rounded to one byte, or to two,
    always for fewer than 16 channels (docs/onnx.md). What is rounded is multiplied with
    e / 2^(bits - 1), a number of -1 to 1.
    """
    batch, heads, tokens, head_dim = query.shape
    kv_heads, value_dim = values.decoded.shape[1::2]
    scale = float(np.float32(config.scale or 1 / math.sqrt(head_dim)))
    output, bound = np.zeros((2, batch, heads, tokens, value_dim))
    sink = np.full(heads, 0.0 if config.smooth_softmax else -np.inf)
    if head_sink is not None:
        sink = head_sink.astype(np.float64)
    for row, (n, m) in enumerate(zip(lengths.tolist(), np.asarray(counts).tolist(), strict=True)):
        group = (kv_heads, heads // kv_heads, m)
        q = query[row, :, :m].astype(np.float64).reshape(*group, head_dim)
        k, v = (
            Tokens(*(x[row, :, None, :n].astype(np.float64) for x in side))
            for side in (keys, values)
        )
        s = scale * (q @ k.decoded.swapaxes(-1, -2))
        reached = np.abs(q) @ k.reach.swapaxes(-1, -2)
        off = gamma(head_dim + 16) * abs(scale) * reached
        if integers:
            peak = (np.abs(q)[..., None, :] * k.swing[:, :, None]).max(axis=-1, initial=0)
            each = peak * k.gain[:, :, None] * (FEW if head_dim < 16 else QUERY)
            with np.errstate(invalid="ignore"):
                moved = head_dim * each + k.length[:, :, None] * reached
            off = off + 1.1 * abs(scale) * np.nan_to_num(moved, nan=0.0, posinf=np.inf)
        if config.softcap:
            s = config.softcap * np.tanh(s / config.softcap)
            off = off + 10 * UNIT * np.abs(s)
        at = n - m + np.arange(m)[:, None]
        token = np.arange(n)
        seen = token <= at if config.causal else np.full((m, n), True)
        if config.sliding_window:
            seen &= token > at - config.sliding_window
        seen = np.broadcast_to(seen, s.shape)
        if bias is not None:
            own = bias[row % len(bias), :, :m, :n].astype(np.float64)
            own = np.broadcast_to(own, (heads, m, n)).reshape(*group, n)
            seen = seen & (own != -np.inf)
            s = s + np.where(seen, own, 0)
            off = off + 2 * UNIT * np.abs(s)
        s = np.where(seen, s, -np.inf)
        sinks = np.broadcast_to(sink.reshape(kv_heads, -1, 1, 1), (*group, 1))
        most_seen = s.max(axis=-1, keepdims=True, initial=-np.inf)
        top = np.maximum(most_seen, sinks)
        top, most_seen = (np.where(np.isfinite(x), x, 0) for x in (top, most_seen))
        known = np.isfinite(sinks)
        s = np.concatenate([s, sinks], axis=-1)
        seen = np.concatenate([seen, known], axis=-1)
        below = s - top
        off = np.concatenate([off, np.zeros((*group, 1))], axis=-1)
        distance = np.abs(below)
        distance[..., -1:] = np.maximum(distance[..., -1:], np.abs(sinks - most_seen))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            off = np.where(seen, off + 2 * UNIT * distance + 8 * UNIT, 0)
            total = np.exp(below).sum(axis=-1, keepdims=True)
            log_p = np.where(seen, below - np.log(total), -np.inf)
            common = np.logaddexp.reduce(log_p + off, axis=-1, keepdims=True)
            off = off + np.where(total > 0, common, 0) + gamma(min(n + bool(known.any()), 512) + 8)
            p = np.exp(log_p)
            moved = np.where(off < 1, p * np.expm1(off), np.exp(np.minimum(log_p + off, 0)))
            moved = np.where(seen, np.minimum(moved + 2.0**-125, 1), 0)[..., :-1]
            moved, p = np.nan_to_num(moved, nan=1.0), p[..., :-1]
            changed = gamma(min(n, 512) + value_dim + 16)
            most = p + moved
            error = moved @ np.abs(v.decoded) + changed * (most @ v.reach)
            if integers:
                peak = (most * v.gain[:, :, None]).max(axis=-1, keepdims=True, initial=0)
                swing = v.swing.max(axis=2, keepdims=True, initial=0)
                error += 1.1 * (n * peak * swing * WEIGHT + (most * v.length[:, :, None]) @ v.reach)
            error = np.nan_to_num(error, nan=np.inf, posinf=np.inf)
        output[row, :, :m] = (p @ v.decoded).reshape(heads, m, value_dim)
        bound[row, :, :m] = error.reshape(heads, m, value_dim)
    return Result(output, bound)


# --- comparing -----------------------------------------------------------------------------------


def check_cache(runner: Runner, expected: Expected) -> None:
    """Every byte that the lengths make valid is that of `KVCache` (rules B1, B2, K1)."""
    assert runner.lengths.tolist() == expected.cache.lengths.tolist()
    for row in range(expected.cache.batch):
        for side, stored in zip(("key", "value"), expected.cache.stored(row), strict=True):
            for part, want in stored.arrays.items():
                if part == "collapsed":
                    continue
                got = runner.cache[f"{side}_{part}"][row, :, : want.shape[1]]
                where = f"row {row}: {side}_{part}"
                assert (got.dtype, got.shape) == (want.dtype, want.shape), where
                same = got.tobytes() == want.tobytes()
                assert same, f"{where}\n{got}\nis not\n{want}\n{_places(got, want)}"


def _places(got: Array, want: Array) -> str:
    kind = f"u{got.dtype.itemsize}"
    apart = np.argwhere(np.ascontiguousarray(got).view(kind) != want.view(kind))
    return f"at {apart[:5].tolist()}, {len(apart)} of {want.size}"


def check_output(got: Array, result: Result, slack: float = 0.0) -> None:
    """The output is within rule A3's tolerance.

    float16 adds its own rounding. ``slack`` times the largest output of the step is allowed on top,
    for integer arithmetic.
    """
    want, bound = result
    bound = bound + slack * np.abs(want).max(initial=0)
    if got.dtype == np.float16:
        bound = bound + 2.0**-11 * (np.abs(want) + bound) + 2.0**-25
        bound = np.where(np.abs(want) + bound < 65504, bound, np.inf)
    judged = np.isfinite(bound)
    with np.errstate(invalid="ignore"):
        error = np.abs(got.astype(np.float64) - want)
    bad = judged & ~(error <= bound)
    if bad.any():
        place = tuple(np.argwhere(bad)[0].tolist())
        raise AssertionError(
            f"output{list(place)} is {got[place]}, not {want[place]} within {bound[place]}; "
            f"{int(bad.sum())} of {bad.size} are off"
        )


def check(runner: Runner, expected: Expected, inputs: Inputs, slack: float = 0.0) -> None:
    """One step of both."""
    result = expected.step(inputs)
    output = runner.step(inputs)
    check_cache(runner, expected)
    check_output(output, result, slack)


# --- inputs --------------------------------------------------------------------------------------


def make_inputs(
    config: Config,
    rng: np.random.Generator,
    lengths: Array,
    tokens: int,
    counts: Sequence[int] | None = None,
    spread: float = 0.0,
) -> Inputs:
    """Return random inputs of one step; NaN or nonsense wherever padding is.

    ``lengths`` are those before the step; norms of tokens vary by ``10 ** spread``.
    """
    batch = len(lengths)
    counts = [tokens] * batch if counts is None else counts
    plain = FLOAT_DTYPES[config.dtype]
    real = np.arange(tokens) < np.array(counts)[:, None]
    after = np.asarray(lengths) + counts

    def floats(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(plain)

    def rows(channels: int) -> Array:
        x = rng.standard_normal((batch, tokens, channels))
        x *= 10 ** rng.uniform(-spread, spread, (batch, tokens, 1))
        x[~real] = rng.choice([np.nan, np.inf, 1e4])
        return x.astype(plain)

    query, key = (rows(heads * config.head_dim) for heads in (config.heads, config.kv_heads))
    value = rows(config.kv_heads * config.value_dim)
    inputs = {"query": query, "key": key, "value": value}
    if config.packed:
        inputs = {"query": np.concatenate([query, key, value], axis=-1)}
    if config.new_lengths:
        inputs["new_lengths"] = np.array(counts, np.int64)
    positions = np.asarray(lengths)[:, None] + np.arange(tokens)
    if config.position_ids:
        positions = rng.integers(0, 40, (batch, tokens))
        inputs["position_ids"] = np.where(real, positions, -(10**9))
    if config.rotary:
        most = int(np.where(real, positions, 0).max())
        angle = rng.uniform(-4, 4, (most + 1, config.rotary // 2))
        inputs |= {"cos": np.cos(angle).astype(plain), "sin": np.sin(angle).astype(plain)}
    if config.attention_bias:
        shape = (int(rng.choice([1, batch])), int(rng.choice([1, config.heads])))
        bias = floats(*shape, tokens, max(int(after.max()), 1) + int(rng.integers(0, 3)))
        bias[rng.random(bias.shape) < 0.1] = -np.inf
        bias[..., int(after.max()) :] = np.nan
        if shape[0] > 1:
            for row in range(batch):
                bias[row, :, counts[row] :] = np.nan
                bias[row, :, :, after[row] :] = np.nan
        inputs["attention_bias"] = bias
    if config.feedback is not None:
        inputs |= {"key_order": config.feedback.order, "key_factor": config.feedback.factor}
    if config.head_sink:
        inputs["head_sink"] = floats(config.heads)
    return inputs

"""The native operators beside ONNX Runtime's GroupQueryAttention and the Numba kernels.

Run as ``python -m benchmarks.onnx [--json FILE]``. What stands in one group of rows is timed in the
same rounds; ratios are taken round by round. Packed caches of GroupQueryAttention need ONNX Runtime
1.27.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException
from rich.console import Console
from rich.progress import track

import nsq_ref as nsq
from benchmarks.timing import (
    Case,
    Row,
    Target,
    Timed,
    as_text,
    beside,
    floor,
    interleaved,
    machine,
    parser,
    reading,
    report,
    spread,
    use_threads,
    write_json,
)
from nsq_ref.dtypes import Array, Float32, Float64
from nsq_ref.scheme import SchemeName
from onnx_export.custom_ops import register
from onnx_export.operators import attention_node, dequantize_model, quantize_model
from onnx_export.operators.nodes import make_model
from onnx_export.operators.schema import ELEMENTS

Arrays = dict[str, Array]

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
MAIN: SchemeName = "streaming4"
FEWER_BITS: tuple[SchemeName, ...] = ("streaming3", "streaming2")
CODECS: tuple[SchemeName, ...] = ("streaming4", "nsep+pchan4")
CODEC_SHAPE = (8, 4096, 128)
FED: tuple[SchemeName, ...] = ("streaming3", "streaming2")  # the full range, and a search
SEALED = 16  # blocks
BLOCK_SIZE = 128
IN_TAIL = BLOCK_SIZE // 2  # tokens beyond whole blocks, sinks included: half a block
INSTRUCTION_SETS = ("avx512", "avx2")
INT4_STEP = 0.5  # of GroupQueryAttention's static scales: standard normal data reach 7 of them
PEER, PEER_FLOAT = "GQA int4", "GQA float32"
READ_BYTES = 1 << 28  # more than caches of the processor hold
MAGNITUDES: tuple[Literal["lsq", "gain"], ...] = ("lsq", "gain")
MORE = Target(1, at_most=True)  # microseconds a token that feedback may take beyond 1.5 times
SETTLE = 0.1  # seconds: threads of the sessions before spin for up to half of it


class Native(NamedTuple):
    """How the native library runs: what NSQ_CPU and NSQ_EXACT say."""

    cpu: str
    exact: bool

    @property
    def name(self) -> str:
        """What the report calls it."""
        return f"nsq {self.cpu}{', exact' if self.exact else ''}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that the library reads."""
        return {"NSQ_CPU": self.cpu, "NSQ_EXACT": str(int(self.exact))}


class Group(NamedTuple):
    """Rows that are measured together, and the sentences that go with them."""

    name: str
    measure: Callable[[], tuple[list[Row], list[str]]]


def main() -> None:
    options = parsed()
    use_threads(options.threads)
    natives = [Native(cpu, exact) for cpu in available() for exact in (False, True)]
    longest = max(options.tokens)
    groups = [
        Group(
            f"decode, batch {batch}, {tokens} tokens, {options.threads} threads",
            partial(decode, natives, batch, tokens, options.threads, options.rounds),
        )
        for batch in options.batch
        for tokens in options.tokens
    ]
    if options.threads > 1:
        name = f"decode, batch 1, {longest} tokens, 1 thread"
        groups.append(Group(name, partial(decode, natives, 1, longest, 1, options.rounds)))
    groups += [
        Group(
            f"decode, batch 1, {longest} tokens, fewer bits",
            partial(fewer_bits, natives, longest, options.threads, options.rounds),
        ),
        Group(f"prefill of {options.prefill} tokens", partial(prefill, natives, options)),
        Group("Quantize and Dequantize", partial(codec, natives, options)),
        Group("keys with feedback, 1 thread", partial(sealing, options.rounds)),
    ]
    rows, notes = [], general_notes(options.rounds)
    found = [
        (group.name, *group.measure())
        for group in track(groups, "Measuring", console=Console(stderr=True))
    ]
    for name, measured, remarks in found:
        report(f"nsq {nsq.__version__}, {name}", measured, remarks)
        rows += [replace(row, what=f"{name}: {row.what}") for row in measured]
        notes += [f"{name}: {remark}" for remark in remarks]
    for note in general_notes(options.rounds):
        print(note)
    if options.json is not None:
        write_json(options.json, rows, notes, threads=options.threads)


def general_notes(rounds: int) -> list[str]:
    return [
        f"onnxruntime {onnxruntime.__version__}; {HEADS} query heads over {KV_HEADS} key/value "
        f"heads, head_dim {HEAD_DIM}, float32 queries; {rounds} rounds interleaved",
        as_text(machine()),
        "GQA: com.microsoft GroupQueryAttention at the best that the processor has; int4 is its "
        "packed cache with one static scale a channel",
        "exact: NSQ_EXACT=1, codes are decoded and all arithmetic is float32",
        f"decode: one new token a row is appended and attends; T tokens are in sealed blocks of "
        f"{BLOCK_SIZE}, {IN_TAIL} more in tail and sinks; caches are bound in place",
        "memory floor: the bytes of the quantized cache at the speed of 'read' (np.max in as many "
        f"threads, over {READ_BYTES >> 20} MiB); small caches stay in those of the processor and "
        "may be read faster",
        "ratios are taken round by round: their median, min and max; 'cores' is processor time "
        "over wall time, spinning included: much below the threads, other work held the machine; "
        "the system may count other threads late, so that it says little below 10 ms",
    ]


def parsed() -> argparse.Namespace:
    arguments = parser("onnx", __doc__, threads=2, rounds=15)
    arguments.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    arguments.add_argument("--prefill", type=int, default=2048, help="tokens of the prefill")
    options = arguments.parse_args()
    if any(tokens < BLOCK_SIZE or tokens % BLOCK_SIZE for tokens in options.tokens):
        arguments.error(f"--tokens must be multiples of the block size, {BLOCK_SIZE}")
    return options


def available() -> list[str]:
    """Return the instruction sets that this machine can run; the portable one if no other."""
    found = []
    for cpu in INSTRUCTION_SETS:
        try:
            open_session(quantize_model(nsq.Scheme()), 1, Native(cpu, False))
        except RuntimeException as error:
            if "this machine cannot run" not in str(error):
                raise
        else:
            found.append(cpu)
    return found or ["portable"]


# --- decode --------------------------------------------------------------------------------------


def decode(
    natives: Sequence[Native], batch: int, tokens: int, threads: int, rounds: int
) -> tuple[list[Row], list[str]]:
    """Time one step over caches of ``tokens`` tokens, and compare what comes out."""
    keys, values = drawn(batch, tokens + BLOCK_SIZE)
    new = new_tokens(batch, 1)
    past = tokens + IN_TAIL - 1
    steps = {
        PEER: peer_step(new, as_int4(keys), as_int4(values), past, threads),
        PEER_FLOAT: peer_step(new, keys, values, past, threads),
    }
    cache, size = native_cache(MAIN, keys, values, tokens)
    # Each appends the same token at the same place, so all may share one cache.
    steps |= {
        native.name: native_step(native, MAIN, new, cache, past, threads) for native in natives
    }
    timed, rate = timed_beside_reading(steps, threads, rounds)
    rows = [
        *speeds(timed, PEER, [PEER, PEER_FLOAT, *(native.name for native in natives)]),
        *floor_rows(timed, rate, {native.name: size for native in natives if not native.exact}),
    ]
    exact = steps[PEER_FLOAT].results["output"]
    found = {
        name: difference(step.results["output"], exact)
        for name, step in steps.items()
        if name != PEER_FLOAT
    }
    listed = ", ".join(f"{name} {value:.2%}" for name, value in found.items())
    return rows, [f"difference from {PEER_FLOAT}, relative RMS: {listed}"]


def fewer_bits(
    natives: Sequence[Native], tokens: int, threads: int, rounds: int
) -> tuple[list[Row], list[str]]:
    """Time steps over caches of 4, 3 and 2 bits."""
    keys, values = drawn(1, tokens + BLOCK_SIZE)
    new, past, native = new_tokens(1, 1), tokens + IN_TAIL - 1, natives[0]
    steps: dict[str, Step] = {}
    sizes: dict[str, int] = {}
    for scheme in (MAIN, *FEWER_BITS):
        cache, sizes[scheme] = native_cache(scheme, keys, values, tokens)
        steps[str(scheme)] = native_step(native, scheme, new, cache, past, threads)
    timed, rate = timed_beside_reading(steps, threads, rounds)
    rows = [*speeds(timed, MAIN, list(steps)), *floor_rows(timed, rate, sizes)]
    return rows, [f"{native.name}, {threads} threads"]


def prefill(natives: Sequence[Native], options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Time attention of a whole prompt, which fills the cache."""
    tokens, threads = options.prefill, options.threads
    capacity = -(-tokens // BLOCK_SIZE) * BLOCK_SIZE
    new = new_tokens(1, tokens)
    empty = np.zeros((1, KV_HEADS, capacity, HEAD_DIM), np.float32)
    cache, _ = native_cache(MAIN, empty, empty, capacity - BLOCK_SIZE)
    steps = {PEER_FLOAT: peer_step(new, empty, empty.copy(), 0, threads)}
    steps |= {native.name: native_step(native, MAIN, new, cache, 0, threads) for native in natives}
    timed = interleaved([Case(*item) for item in steps.items()], options.rounds, SETTLE)
    exact = steps[PEER_FLOAT].results["output"]
    found = [
        f"{native.name} {difference(steps[native.name].results['output'], exact):.2%}"
        for native in natives
    ]
    return speeds(timed, PEER_FLOAT, list(steps)), [
        f"batch 1, {threads} threads, into an empty cache",
        f"difference from {PEER_FLOAT}, relative RMS: {', '.join(found)}",
    ]


def speeds(timed: dict[str, Timed], base: str, names: Sequence[str]) -> list[Row]:
    return [beside(name, timed[base], timed[name], f"times as fast as {base}") for name in names]


def floor_rows(timed: dict[str, Timed], rate: Float64, sizes: dict[str, int]) -> list[Row]:
    rows = [Row("read", spread(rate / 1e9), "GB/s", spread(timed["read"].seconds))]
    for name, size in sizes.items():
        what, unit = f", {size / 1e6:.1f} MB", f"times that takes {name}"
        rows.append(floor(what, size / rate, timed[name], unit))
    return rows


def timed_beside_reading(
    steps: dict[str, Step], threads: int, rounds: int
) -> tuple[dict[str, Timed], Float64]:
    """Time all steps, and reading memory; return also its bytes a second, round by round."""
    with ThreadPoolExecutor(threads) as pool:
        cases = [reading(np.ones(READ_BYTES // 4, np.float32), threads, pool)]
        timed = interleaved([*cases, *(Case(*item) for item in steps.items())], rounds, SETTLE)
    return timed, READ_BYTES / timed["read"].seconds


def difference(output: Array, exact: Array) -> float:
    """Return the relative RMS difference."""
    apart = np.linalg.norm((output - exact).astype(np.float64))
    return float(apart / np.linalg.norm(exact.astype(np.float64)))


# --- quantize and dequantize ---------------------------------------------------------------------


def codec(natives: Sequence[Native], options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Time the operators Quantize and Dequantize beside the Numba kernels."""
    x = np.random.default_rng(0).standard_normal(CODEC_SHAPE, dtype=np.float32)
    rows = []
    for threads in sorted({1, options.threads}):
        for scheme_name in CODECS:
            scheme = nsq.Scheme.named(scheme_name)
            quantized = nsq.quantize(x, scheme)
            parts = {name: np.empty_like(part) for name, part in quantized.parts.items()}
            stored = {**quantized.parts, "shape": np.array(x.shape, np.int32)}
            decoded = np.empty_like(x)
            calls = {
                "quantize": ({"x": x}, parts, quantize_model(scheme)),
                "dequantize": (stored, {"x_hat": decoded}, dequantize_model(scheme)),
            }
            numba_calls: dict[str, Callable[[], object]] = {
                "quantize": partial(nsq.quantize, x, scheme),
                "dequantize": partial(nsq.dequantize, quantized, np.empty_like(x)),
            }
            for verb, (feeds, results, model) in calls.items():
                cases = [Case("Numba", partial(in_threads, threads, numba_calls[verb]))]
                for native in natives:
                    if not native.exact:
                        step = Step(model, threads, native, feeds, results)
                        cases.append(Case(native.name, step))
                timed = interleaved(cases, options.rounds, SETTLE)
                title = f"{verb}, {scheme_name}, {threads} thread{'s' if threads > 1 else ''}"
                rows += [
                    replace(row, what=f"{title}: {row.what}")
                    for row in speeds(timed, "Numba", list(timed))
                ]
            same = all((parts[name] == part).all() for name, part in quantized.parts.items())
            if not (same and (decoded == nsq.dequantize(quantized)).all()):
                raise RuntimeError(f"{scheme_name}: the native operators give other bytes")
    return rows, [f"shape {list(x.shape)} float32; operators write to bound outputs"]


def sealing(rounds: int) -> tuple[list[Row], list[str]]:
    """Time Quantize with feedback (F1) beside itself without, on each instruction set."""
    rng = np.random.default_rng(0)
    feedback = nsq.Feedback.from_queries(
        rng.standard_normal((HEADS, 64, HEAD_DIM)) @ rng.standard_normal((HEAD_DIM, HEAD_DIM)),
        KV_HEADS,
    )
    rows = []
    for name in FED:
        for magnitude in MAGNITUDES:
            scheme = replace(nsq.Scheme.named(name), magnitude=magnitude)
            tokens = SEALED * BLOCK_SIZE + scheme.sink_tokens
            x = rng.standard_normal((KV_HEADS, tokens, HEAD_DIM), dtype=np.float32)
            cases = []
            for cpu in dict.fromkeys([*available(), "portable"]):
                for title, own in (("without", None), ("with", feedback)):
                    results = dict(nsq.quantize(x, scheme, feedback=own).parts)
                    model = quantize_model(scheme, feedback=own)
                    step = Step(model, 1, Native(cpu, False), {"x": x}, results)
                    cases.append(Case(f"{cpu}, {title}", step))
            timed = interleaved(cases, rounds, SETTLE)
            for cpu in dict.fromkeys(case.name.partition(",")[0] for case in cases):
                without, fed = timed[f"{cpu}, without"].seconds, timed[f"{cpu}, with"].seconds
                what = f"{name}, {magnitude}, {cpu}"
                more = 1e6 * (fed - 1.5 * without) / (KV_HEADS * SEALED * BLOCK_SIZE)
                rows += [
                    Row(what, spread(fed / without), "times that without takes", spread(fed)),
                    Row(f"{what}, beyond 1.5 times", spread(more), "us a token", target=MORE),
                ]
    return rows, [f"{SEALED} blocks of {BLOCK_SIZE} tokens of {KV_HEADS} heads"]


def in_threads(count: int, call: Callable[[], object]) -> object:
    """Call with so many threads of nsq_ref's own."""
    import numba

    config: Any = numba.config
    before, config.NUMBA_NUM_THREADS = config.NUMBA_NUM_THREADS, count
    try:
        return call()
    finally:
        config.NUMBA_NUM_THREADS = before


# --- models, and what they are fed ---------------------------------------------------------------


class Step:
    """A model with memory bound to its inputs and outputs; call it to run."""

    def __init__(
        self, model: onnx.ModelProto, threads: int, native: Native | None, feeds: Arrays,
        results: Arrays,
    ) -> None:  # fmt: skip
        self.feeds, self.results = feeds, results  # which own the memory
        self.session = open_session(model, threads, native)
        self.binding = self.session.io_binding()
        for bind, arrays in (
            (self.binding.bind_input, feeds),
            (self.binding.bind_output, results),
        ):
            for name, array in arrays.items():
                element = ELEMENTS[array.dtype.name]
                bind(name, "cpu", 0, element, array.shape, array.ctypes.data)

    def __call__(self) -> None:
        """Run."""
        self.session.run_with_iobinding(self.binding)


def open_session(
    model: onnx.ModelProto, threads: int, native: Native | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, too
    options.intra_op_num_threads = threads
    if native is not None:
        del model.functions[:]  # so that nothing but the library can answer
        register(options)
        os.environ.update(native.environment)  # which is read when the session is made
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def drawn(batch: int, tokens: int) -> Float32:
    """Return keys and values."""
    shape = (2, batch, KV_HEADS, tokens, HEAD_DIM)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def new_tokens(batch: int, tokens: int) -> Arrays:
    """Return the query, key and value of new tokens."""
    rng = np.random.default_rng(1)
    return {
        name: rng.standard_normal((batch, tokens, heads * HEAD_DIM), dtype=np.float32)
        for name, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS))
    }


def native_cache(
    scheme_name: SchemeName, keys: Float32, values: Float32, tokens: int
) -> tuple[Arrays, int]:
    """Return the cache of the first tokens, whose blocks are sealed, and the bytes that it needs.

    There is room for one block more.
    """
    scheme = replace(nsq.Scheme.named(scheme_name), block_size=BLOCK_SIZE)
    cache, size = {}, 0
    for side, x in (("key", keys), ("value", values)):
        sealed = tokens + scheme.sink_tokens
        quantized = nsq.quantize(x[:, :, :sealed], scheme)
        tail = np.zeros((*x.shape[:2], BLOCK_SIZE, HEAD_DIM), np.float32)
        in_tail = x[:, :, sealed : tokens + IN_TAIL]
        tail[:, :, : in_tail.shape[2]] = in_tail
        size += quantized.nbytes + in_tail.nbytes
        room = scheme.layout(sealed + BLOCK_SIZE, HEAD_DIM)
        for name, part in quantized.parts.items():
            whole = np.zeros((*x.shape[:2], *room[name].shape), part.dtype)
            whole[:, :, : part.shape[2]] = part
            cache[f"{side}_{name}"] = whole
        cache[f"{side}_tail"] = tail
    return cache, size


def native_step(
    native: Native, scheme_name: SchemeName, new: Arrays, cache: Arrays, past: int, threads: int
) -> Step:
    """Bind nsq.Attention to new tokens and to a cache, which it changes in place."""
    batch = len(new["query"])
    feeds = {**new, "past_lengths": np.full(batch, past, np.int64)}
    results = {"output": np.zeros_like(new["query"]), "present_lengths": np.zeros(batch, np.int64)}
    feeds |= {f"past_{name}": array for name, array in cache.items()}
    results |= {f"present_{name}": array for name, array in cache.items()}
    scheme = replace(nsq.Scheme.named(scheme_name), block_size=BLOCK_SIZE)
    node = attention_node(scheme, scheme, heads=HEADS, kv_heads=KV_HEADS)
    model = one_node(node, feeds, results)
    return Step(model, threads, native, feeds, results)


def peer_step(new: Arrays, keys: Array, values: Array, past: int, threads: int) -> Step:
    """Bind GroupQueryAttention to new tokens and to a cache, float32 or packed int4, in place."""
    batch, tokens = new["query"].shape[:2]
    total = past + tokens
    feeds = {
        **new,
        "past_key": keys,
        "past_value": values,
        "last_positions": np.full(batch, total - 1, np.int32),
        "total": np.array(total, np.int32),
    }
    results = {
        "output": np.zeros_like(new["query"]), "present_key": keys, "present_value": values
    }  # fmt: skip
    inputs, initializers = list(feeds), []
    attributes: dict[str, Any] = {}
    if keys.dtype == np.uint8:
        step = np.full((KV_HEADS, 1, HEAD_DIM), INT4_STEP, np.float32)
        initializers = [onnx.numpy_helper.from_array(step, "scale")]
        inputs += [*[""] * 5, "scale", "scale"]
        attributes = {
            "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 4
        }  # fmt: skip
    node = helper.make_node(
        "GroupQueryAttention", inputs, list(results), domain="com.microsoft", num_heads=HEADS,
        kv_num_heads=KV_HEADS, **attributes,
    )  # fmt: skip
    model = one_node(node, feeds, results, initializers)
    return Step(model, threads, None, feeds, results)


def one_node(
    node: onnx.NodeProto,
    feeds: Arrays,
    results: Arrays,
    initializers: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    given, made = (
        {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
        for arrays in (feeds, results)
    )
    return make_model("one node", [node], given, made, initializers=initializers)


def as_int4(x: Float32) -> npt.NDArray[np.uint8]:
    """Return int4 codes with static scales, offset by 8, two a byte."""
    codes = (np.clip(np.rint(x / np.float32(INT4_STEP)), -8, 7) + 8).astype(np.uint8)
    packed: npt.NDArray[np.uint8] = codes[..., ::2] | codes[..., 1::2] << 4
    return packed


if __name__ == "__main__":
    main()

"""The function body of nsq.Attention, which needs no library, beside GroupQueryAttention float32.

Run as ``python -m benchmarks.bodies [--json FILE]``. A decode step appends a token and attends, a
prefill fills an empty cache; ratios are taken round by round. The body of opset 24 needs ONNX
Runtime 1.26.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime

import nsq_ref as nsq
from benchmarks.onnx import (
    BLOCK_SIZE,
    HEAD_DIM,
    HEADS,
    IN_TAIL,
    KV_HEADS,
    PEER_FLOAT,
    SETTLE,
    Arrays,
    Step,
    difference,
    drawn,
    native_cache,
    new_tokens,
    peer_step,
)
from benchmarks.timing import (
    Case,
    Row,
    Target,
    as_text,
    interleaved,
    machine,
    report,
    spread,
    use_threads,
    write_json,
)
from nsq_ref.scheme import SchemeName
from onnx_export.operators import attention_model

AIM = Target(4, at_most=True)
AIMED_TOKENS, AIMED_OPSET = 8192, 24
SCHEMES: tuple[SchemeName, ...] = ("streaming4", "streaming3", "streaming2")


def main() -> None:
    options = parsed()
    use_threads(max(options.threads))
    rows, notes = [], [
        f"onnxruntime {onnxruntime.__version__}; {HEADS} query heads over {KV_HEADS} key/value "
        f"heads, head_dim {HEAD_DIM}, float32; {options.scheme}; {options.rounds} rounds "
        "interleaved; the cache of opset 24 is bound in place, that of GQA too",
        as_text(machine()),
    ]  # fmt: skip
    for threads in options.threads:
        on_threads = f"{threads} thread{'s' if threads > 1 else ''}"
        for tokens in options.tokens:
            name = f"{tokens} tokens, {on_threads}"
            measured, remark = decode(options, tokens, threads)
            report(f"nsq {nsq.__version__}, {name}", measured, [remark])
            rows += [replace(row, what=f"{name}: {row.what}") for row in measured]
            notes.append(f"{name}: {remark}")
        if options.prefill:
            name = f"prefill of {options.prefill} tokens, {on_threads}"
            measured, remark = prefill(options, threads)
            report(f"nsq {nsq.__version__}, {name}", measured, [remark])
            rows += [replace(row, what=f"{name}: {row.what}") for row in measured]
            notes.append(f"{name}: {remark}")
    for note in notes[:2]:
        print(note)
    if options.json is not None:
        write_json(options.json, rows, notes)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bodies", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--prefill", type=int, default=2048, help="tokens; 0 for none")
    parser.add_argument("--opsets", type=int, nargs="+", default=[21, 24])
    parser.add_argument("--scheme", choices=SCHEMES, default=SCHEMES[0])
    options = parser.parse_args()
    if any(tokens < BLOCK_SIZE or tokens % BLOCK_SIZE for tokens in options.tokens):
        parser.error(f"--tokens must be multiples of the block size, {BLOCK_SIZE}")
    return options


def decode(options: argparse.Namespace, tokens: int, threads: int) -> tuple[list[Row], str]:
    """Time a step over caches of so many tokens, and compare what comes out."""
    keys, values = drawn(1, tokens + BLOCK_SIZE)
    new, past = new_tokens(1, 1), tokens + IN_TAIL - 1
    steps = {PEER_FLOAT: peer_step(new, keys, values, past, threads)}
    cache, _ = native_cache(options.scheme, keys, values, tokens)
    for opset in options.opsets:
        steps[f"opset {opset}"] = body_step(options.scheme, new, cache, past, threads, opset)
    return compared(options, steps, tokens == AIMED_TOKENS)


def prefill(options: argparse.Namespace, threads: int) -> tuple[list[Row], str]:
    """Time attention of a whole prompt, which fills the cache, and compare what comes out."""
    tokens = options.prefill
    capacity = -(-tokens // BLOCK_SIZE) * BLOCK_SIZE
    new = new_tokens(1, tokens)
    empty = np.zeros((1, KV_HEADS, capacity, HEAD_DIM), np.float32)
    steps = {PEER_FLOAT: peer_step(new, empty, empty.copy(), 0, threads)}
    for opset in options.opsets:
        cache, _ = native_cache(options.scheme, empty, empty, capacity - BLOCK_SIZE)
        steps[f"opset {opset}"] = body_step(options.scheme, new, cache, 0, threads, opset)
    return compared(options, steps, aimed=False)


def compared(
    options: argparse.Namespace, steps: dict[str, Step], aimed: bool
) -> tuple[list[Row], str]:
    """Time steps in turn, beside the first of them."""
    timed = interleaved([Case(*item) for item in steps.items()], options.rounds, SETTLE)
    rows = []
    for name, times in timed.items():
        target = AIM if aimed and name == f"opset {AIMED_OPSET}" else None
        ratio = spread(times.seconds / timed[PEER_FLOAT].seconds)
        row = Row(name, ratio, f"times the time of {PEER_FLOAT}", spread(times.seconds))
        rows.append(replace(row, target=target, cores=times.cores))
    outputs = [step.results["output"] for step in steps.values()]
    found = ", ".join(f"{difference(one, outputs[0]):.2%}" for one in outputs[1:])
    return rows, f"difference from {PEER_FLOAT}, relative RMS: {found}"


def body_step(
    scheme_name: SchemeName, new: Arrays, cache: Arrays, past: int, threads: int, opset: int
) -> Step:
    """Bind a model that carries its functions; the cache in place, if they can do that."""
    scheme = replace(nsq.Scheme.named(scheme_name), block_size=BLOCK_SIZE)
    model = attention_model(
        scheme, scheme, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, opset=opset
    )
    feeds = {**new, "past_lengths": np.full(1, past, np.int64)}
    results = {"output": np.zeros_like(new["query"]), "present_lengths": np.zeros(1, np.int64)}
    for name, array in cache.items():
        feeds[f"past_{name}"] = array
        results[f"present_{name}"] = array if opset >= AIMED_OPSET else array.copy()
    return Step(model, threads, None, feeds, results)


if __name__ == "__main__":
    main()

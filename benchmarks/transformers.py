"""SmolLM2-135M in transformers with an `NsqCache`, beside the caches that transformers has.

Run as ``python -m benchmarks.transformers [--json FILE]``, on Linux. The model reads a prompt once,
in one pass, and all caches take its keys and values. Then they decode the text that follows in
turns, a token a pass, so many that each of them quantizes a block at least once; and read more of
it, a few tokens a pass, so that more tokens tell how likely the text is. What is resident is the
growth of a process of its own, in which another cache of the same kind was filled before; keys and
values are random there, as bytes do not depend on them. Backends of ``QuantizedCache`` that are not
installed are said to be missing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import inspect
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.timing import Row, as_text, machine, parser, publish, spread, use_threads

FLOAT = "DynamicCache"
PASS = 8  # tokens of a turn, and of a pass of several


def main() -> None:
    options = parsed()
    use_threads(options.threads)
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    model, ids = model_of(options), text_of(options)
    names, missing = listed(model.config)
    prompt = transformers.DynamicCache(config=model.config)
    forward(model, "sdpa", ids[:, : options.tokens], prompt)
    runs = {name: Run(model, name, prompt, ids) for name in names}
    for size, count in ((1, options.steps), (PASS, options.scored)):
        for _ in range(0, count, PASS):
            for run in runs.values():
                for _ in range(0, PASS, size):
                    run.step(size)
    rows = speeds(runs) + likelihoods(runs) + memory(names, model.config, options)
    notes = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, one row, "
        f"SmolLM2-135M-Instruct with {options.dtype} weights, {options.threads} threads",
        f"{options.tokens} tokens of prompt; {options.steps} more in turns of {PASS}, a token a "
        f"pass, whose mean is a token's time; {options.scored} more, {PASS} a pass",
        as_text(machine()),
        "'(nsq)' attends to what is stored, '(sdpa)' to decoded keys and values",
        *(f"not measured, as it is not installed: {name}" for name in missing),
        f"load average of the machine after: {os.getloadavg()[0]:.1f}",
    ]
    publish(options, "transformers", rows, notes, threads=options.threads, tokens=options.tokens)


def parsed() -> argparse.Namespace:
    made = parser("transformers", __doc__, threads=2, tokens=4096, steps=128, scored=384)
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return made.parse_args()


# --- model, text and caches ---------------------------------------------------------------------


def model_of(options: argparse.Namespace) -> Any:
    import torch
    import transformers

    from onnx_export.models.sources import smollm2_gguf

    gguf, dtype = smollm2_gguf(), getattr(torch, options.dtype)
    return transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=dtype
    ).eval()


def text_of(options: argparse.Namespace) -> Any:
    """Return tokens of prose, enough for all, in one row."""
    import torch

    from benchmarks.decoding import text_of

    return torch.from_numpy(text_of(options.tokens + options.steps + options.scored))[None]


def forward(model: Any, attention: str, tokens: Any, cache: Any) -> Any:
    """Return the logits of a pass of few tokens, the last of one of many."""
    import torch

    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        return model(tokens, logits_to_keep=PASS, **{name: cache}).logits


class Candidate(NamedTuple):
    """A cache, and the attention that goes with it."""

    attention: str
    make: Callable[[], Any]


def candidates(config: Any) -> dict[str, Candidate]:
    from transformers import DynamicCache, QuantizedCache

    from nsq_ref.transformers import NsqCache

    def quantized(backend: str, **given: Any) -> Candidate:
        return Candidate("sdpa", lambda: QuantizedCache(backend, config, **given))

    return {
        FLOAT: Candidate("sdpa", lambda: DynamicCache(config=config)),
        "NsqCache 4 bits (nsq)": Candidate("nsq", lambda: NsqCache(config)),
        "NsqCache 4 bits (sdpa)": Candidate("sdpa", lambda: NsqCache(config)),
        "NsqCache 3 bits (nsq)": Candidate(
            "nsq", lambda: NsqCache(config, "streaming3", "streaming3")
        ),
        "QuantizedCache quanto, 4 bits": quantized("quanto", nbits=4),
        "QuantizedCache hqq, 4 bits": quantized("hqq", nbits=4, axis_key=1, axis_value=1),
        "QuantizedCache fp8": quantized("fp8"),
    }


def listed(config: Any) -> tuple[list[str], list[str]]:
    """Return the names of the caches that can be made here, and of the others."""
    names, missing = [], []
    for name, candidate in candidates(config).items():
        try:
            candidate.make()
        except (ImportError, ValueError):
            missing.append(name)
        else:
            names.append(name)
    return names, missing


class Run:
    """One cache with the prompt in it: how long tokens took, and how likely they were."""

    def __init__(self, model: Any, name: str, prompt: Any, ids: Any) -> None:
        self.model, self.ids = model, ids
        self.attention, make = candidates(model.config)[name]
        for layers in (prompt.layers[:1], prompt.layers):  # what is compiled once is not timed
            self.cache, begin = make(), time.perf_counter()
            for index, layer in enumerate(layers):
                self.cache.update(layer.keys, layer.values, index)
            self.filled = time.perf_counter() - begin
        self.at = self.start = int(prompt.get_seq_length())
        self.seconds: list[float] = []  # of passes of one token
        self.losses: list[float] = []

    def step(self, size: int) -> None:
        """Read so many tokens of the text."""
        from torch.nn.functional import cross_entropy

        begin, tokens = time.perf_counter(), self.ids[:, self.at : self.at + size]
        logits = forward(self.model, self.attention, tokens, self.cache)
        taken = time.perf_counter() - begin
        if size == 1 and self.at != self.start:  # the first pass warms up
            self.seconds.append(taken)
        self.at += size
        target = self.ids[0, self.at - size + 1 : self.at + 1]
        self.losses += cross_entropy(logits[0].float(), target, reduction="none").tolist()


# --- what is measured ---------------------------------------------------------------------------


def speeds(runs: dict[str, Run]) -> list[Row]:
    """Return what a token took, and taking in the prompt, and the bytes by arithmetic."""
    rows, first = [], runs[FLOAT]
    usual = np.mean(first.seconds)
    for name, run in runs.items():
        ratio, seconds = float(np.mean(run.seconds) / usual), float(np.mean(run.seconds))
        unit = f"of {FLOAT}'s time"
        rows.append(Row(f"{name}: a token", spread([ratio]), unit, spread([seconds])))
    for name, run in runs.items():
        figure = spread([run.filled / len(first.cache.layers)])
        rows.append(Row(f"{name}: taking in a layer's prompt", figure, "seconds"))
    for name, run in runs.items():
        figure = spread([nbytes_of(run.cache) / nbytes_of(first.cache)])
        rows.append(Row(f"{name}: bytes by arithmetic", figure, f"of {FLOAT}'s"))
    return rows


def nbytes_of(cache: Any) -> int:
    own = getattr(cache, "nbytes", None)
    return own if own is not None else sum(map(nbytes_of_layer, cache.layers))


def nbytes_of_layer(layer: Any) -> int:
    """Return the bytes of all tensors of a layer of transformers."""
    found, waiting, seen = 0, [vars(layer)], set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif hasattr(one, "__tensor_flatten__"):  # a tensor of others
            waiting += [getattr(one, name) for name in one.__tensor_flatten__()[0]]
        elif hasattr(one, "untyped_storage") and one.data_ptr() not in seen:
            seen.add(one.data_ptr())
            found += one.nbytes
    return found


def likelihoods(runs: dict[str, Run]) -> list[Row]:
    """Return how much less likely the same tokens are, and the standard error of that."""
    rows = []
    for name, run in runs.items():
        more = np.array(run.losses) - np.array(runs[FLOAT].losses)
        error = float(more.std(ddof=1) / len(more) ** 0.5)
        figure = spread([float(more.mean() + k * error) for k in (-1, 0, 1)])
        what = f"{name}: NLL {np.mean(run.losses):.4f} a token"
        rows.append(Row(what, figure, "nats more; a standard error each way"))
    return rows


def memory(names: list[str], config: Any, options: argparse.Namespace) -> list[Row]:
    """Return by how much a process grows with a cache."""
    grown = {}
    for name in names:
        # Not forked: a child that shares pages with this process would not count them.
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            grown[name] = alone.apply(grown_by, (name, config, options))
    return [
        Row(f"{name}: resident, {count / 1e6:.1f} MB", spread([count / grown[FLOAT]]),
            f"of {FLOAT}'s")
        for name, count in grown.items()
    ]  # fmt: skip


def grown_by(name: str, config: Any, options: argparse.Namespace) -> int:
    """Return the bytes by which this process grows with a second cache, filled and held."""
    use_threads(options.threads)
    import torch

    from onnx_export.evaluation.resident import resident_bytes

    shape = 1, config.num_key_value_heads, options.tokens, config.head_dim

    def filled() -> Any:
        cache = candidates(config)[name].make()
        for layer in range(config.num_hidden_layers):
            for tokens in (options.tokens, 1):  # by the second no cache keeps the prompt as it came
                one = torch.randn(2, *shape, dtype=getattr(torch, options.dtype))
                cache.update(*one[:, :, :, :tokens].clone(), layer)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what is free is no cache's
        return cache, resident_bytes()

    first, before = filled()
    second, after = filled()
    if before is None or after is None:
        raise SystemExit("this system does not tell what of a process is resident; run it on Linux")
    del first, second  # held until here
    return int(after - before)


if __name__ == "__main__":
    main()

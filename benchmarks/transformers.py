"""SmolLM2-135M in transformers with an `NsqCache`, beside the caches that transformers has.

Run as ``python -m benchmarks.transformers [--json FILE]``; memory is measured on Linux only. All
caches read the same text. Each reads the prompt in one pass, as ``generate`` does, and then decodes
tokens in turns with the others, so many that each of them quantizes a block at least once.
Likelihood is that of tokens that follow a prompt, a few a pass. What is resident is the growth of a
process of its own, in which another cache of the same kind was filled before; keys and values are
random there, as bytes do not depend on them. Backends of ``QuantizedCache`` that are not installed
are said to be missing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import inspect
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.timing import Row, as_text, machine, parser, publish, spread, use_threads

FLOAT = "DynamicCache"
WEIGHTS = "model.pt"
PASS = 8  # tokens of a pass, where likelihood is measured


def main() -> None:
    options = parsed()
    use_threads(options.threads)
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        model, ids = model_in(folder, options), text_of(options)
        names, missing = listed(model.config)
        runs = {name: Run(model, name, ids[:, : options.tokens]) for name in names}
        following = ids[0, options.tokens :].tolist()
        for start in range(0, options.steps, PASS):
            for run in runs.values():
                for token in following[start : start + PASS]:
                    run.step(token)
        rows = speeds(runs)
        del runs
        rows += likelihoods(model, names, ids, options)
        rows += memory(names, model.config, options)
    notes = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, one row, "
        f"SmolLM2-135M-Instruct with {options.dtype} weights, {options.threads} threads",
        f"{options.tokens} tokens of prompt; {options.steps} more in turns of {PASS}, of which a "
        f"token's time is the mean; likelihood of {options.scored} after {options.prompt}",
        as_text(machine()),
        "'(nsq)' attends to what is stored, '(sdpa)' to decoded keys and values",
        *(f"not measured, as it is not installed: {name}" for name in missing),
        f"load average of the machine after: {os.getloadavg()[0]:.1f}",
    ]
    publish(options, "transformers", rows, notes, threads=options.threads, tokens=options.tokens)


def parsed() -> argparse.Namespace:
    made = parser(
        "transformers", __doc__, threads=2, tokens=4096, steps=128, prompt=1024, scored=512
    )
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return made.parse_args()


# --- model, text and caches ---------------------------------------------------------------------


def save_model(folder: str) -> None:
    """Write the model as torch does; from the GGUF file transformers reads it in a minute."""
    import torch
    import transformers

    from onnx_export.models.sources import smollm2_gguf

    gguf = smollm2_gguf()
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    fields = model.config.to_dict()
    del fields["quantization_config"]  # of the file, whose weights are decoded now
    torch.save((fields, model.state_dict()), Path(folder) / WEIGHTS)


def model_in(folder: str, options: argparse.Namespace) -> Any:
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    fields, weights = torch.load(Path(folder) / WEIGHTS)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.load_state_dict(weights)
    return model.to(getattr(torch, options.dtype)).eval()


def text_of(options: argparse.Namespace) -> Any:
    """Return tokens of prose, enough for all, in one row."""
    import torch

    from benchmarks.decoding import text_of

    longest = max(options.tokens + options.steps, options.prompt + options.scored)
    return torch.from_numpy(text_of(longest))[None]


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
    """One cache, its prompt in it, and how long tokens took."""

    def __init__(self, model: Any, name: str, prompt: Any) -> None:
        self.model = model
        self.attention, make = candidates(model.config)[name]
        self.cache = make()
        takes = inspect.signature(model.forward).parameters
        self._name = "cache" if "cache" in takes else "past_key_values"
        warm = copy.deepcopy(self.cache)  # what is compiled once is no part of the prefill
        self.forward(prompt[:, :300], warm)
        self.forward(prompt[:, :1], warm)
        begin = time.perf_counter()
        self.forward(prompt, self.cache)
        self.prefill = time.perf_counter() - begin
        self.seconds: list[float] = []

    def forward(self, tokens: Any, cache: Any, kept: int = 1) -> Any:
        """Return the last logits."""
        import torch

        if self.model.config._attn_implementation != self.attention:
            self.model.set_attn_implementation(self.attention)
        with torch.no_grad():
            return self.model(tokens, logits_to_keep=kept, **{self._name: cache}).logits

    def step(self, token: int) -> None:
        """Decode one token."""
        import torch

        begin = time.perf_counter()
        self.forward(torch.tensor([[token]]), self.cache)
        self.seconds.append(time.perf_counter() - begin)


# --- what is measured ---------------------------------------------------------------------------


def speeds(runs: dict[str, Run]) -> list[Row]:
    """Return what a token and the prompt took, and the bytes of all tensors by arithmetic."""
    rows, first = [], runs[FLOAT]
    for name, run in runs.items():
        ratio = np.mean(run.seconds) / np.mean(first.seconds)
        rows.append(
            Row(f"{name}: a token", spread([float(ratio)]), f"of {FLOAT}'s time",
                spread([float(np.mean(run.seconds))]))
        )  # fmt: skip
    for name, run in runs.items():
        figure = spread([run.prefill / first.prefill])
        rows.append(Row(f"{name}: prompt", figure, f"of {FLOAT}'s time", spread([run.prefill])))
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


def likelihoods(model: Any, names: list[str], ids: Any, options: argparse.Namespace) -> list[Row]:
    """Return how much less likely the same tokens are, and the standard error of that."""
    from torch.nn.functional import cross_entropy

    stop = options.prompt + options.scored
    losses = {}
    for name in names:
        run, found = Run(model, name, ids[:, : options.prompt]), []
        for start in range(options.prompt, stop, PASS):
            logits = run.forward(ids[:, start : start + PASS], run.cache, PASS)
            target = ids[0, start + 1 : start + PASS + 1]
            found.append(cross_entropy(logits[0].float(), target, reduction="none").numpy())
        losses[name] = np.concatenate(found)
    rows = []
    for name, loss in losses.items():
        more = loss - losses[FLOAT]
        error = float(more.std(ddof=1) / len(more) ** 0.5)
        figure = spread([float(more.mean() + k * error) for k in (-1, 0, 1)])
        what = f"{name}: NLL {loss.mean():.3f} a token"
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

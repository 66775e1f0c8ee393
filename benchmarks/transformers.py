"""``generate`` of transformers with an `NsqCache`, beside the caches that transformers has.

Run as ``python -m benchmarks.transformers [--json FILE]``. The model is a Llama of random weights;
its caches decode the same tokens in turns. Each prefills once, and is timed a chunk of tokens at a
time. Backends of ``QuantizedCache`` that are not installed are said to be missing.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.timing import Row, as_text, machine, report, spread, use_threads, write_json

Model = Any


def main() -> None:
    options = parsed()
    use_threads(options.threads)
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, num_hidden_layers=options.layers,
        max_position_embeddings=2 * options.tokens, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().to(getattr(torch, options.dtype))
    prompt = torch.randint(1, 1024, (1, options.tokens))
    caches, missing = candidates(config)
    runs = {
        name: Run(model, attention, make(), prompt) for name, (attention, make) in caches.items()
    }
    for _ in range(options.rounds):
        for run in runs.values():
            run.decode(options.steps)
    first = runs["DynamicCache"]
    rows = [
        Row(f"{name}: a token", spread([run.typical / first.typical]), "of DynamicCache's time",
            spread(run.seconds))
        for name, run in runs.items()
    ] + [
        Row(f"{name}: prefill", spread([run.prefill / first.prefill]), "of DynamicCache's time",
            spread([run.prefill]))
        for name, run in runs.items()
    ] + [
        Row(f"{name}: bytes", spread([run.nbytes / first.nbytes]), "of DynamicCache's")
        for name, run in runs.items()
    ]  # fmt: skip
    notes = [
        f"Llama of random weights, {options.layers} layers, 9 heads over 3 of 64, {options.dtype}, "
        f"{options.tokens} tokens of prompt, {options.rounds} rounds of {options.steps} tokens, "
        f"{options.threads} threads, transformers {transformers.__version__}, "
        f"torch {torch.__version__}",
        as_text(machine()),
        "'(nsq)' attends to what is stored, '(sdpa)' to decoded keys and values",
        *(f"not measured, as it is not installed: {name}" for name in missing),
    ]
    report("transformers", rows, notes)
    if options.json is not None:
        write_json(options.json, rows, notes, threads=options.threads, tokens=options.tokens)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformers", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser.parse_args()


def candidates(config: Any) -> tuple[dict[str, tuple[str, Callable[[], Any]]], list[str]]:
    """Return attention and cache by name, and the backends that are not installed."""
    from transformers import DynamicCache, QuantizedCache

    from nsq_ref.transformers import NsqCache

    caches: dict[str, tuple[str, Callable[[], Any]]] = {
        "DynamicCache": ("sdpa", lambda: DynamicCache(config=config)),
        "NsqCache 4 bits (nsq)": ("nsq", lambda: NsqCache(config)),
        "NsqCache 4 bits (sdpa)": ("sdpa", lambda: NsqCache(config)),
        "NsqCache 3 bits (nsq)": ("nsq", lambda: NsqCache(config, "streaming3", "streaming3")),
    }
    missing = []
    for backend, package in {"quanto": "optimum.quanto", "hqq": "hqq"}.items():
        root = package.partition(".")[0]
        if importlib.util.find_spec(root) and importlib.util.find_spec(package):
            axis = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}

            def quantized(backend: str = backend, axis: dict[str, int] = axis) -> Any:
                return QuantizedCache(backend, config, nbits=4, **axis)

            caches[f"QuantizedCache {backend}, 4 bits"] = ("sdpa", quantized)
        else:
            missing.append(f"QuantizedCache {backend} ({package})")
    return caches, missing


class Run:
    """One cache, its prompt in it, and how long tokens took."""

    def __init__(self, model: Model, attention: str, cache: Any, prompt: Any) -> None:
        self.model, self.attention, self.cache, self.prompt = model, attention, cache, prompt
        self.seconds: list[float] = []
        takes = inspect.signature(model.forward).parameters
        self._name = "cache" if "cache" in takes else "past_key_values"
        warm = copy.deepcopy(cache)  # what is compiled and set up once is no part of the prefill
        self._forward(prompt[:, :300], warm)
        self._forward(prompt[:, :1], warm)
        begin = time.perf_counter()
        self._forward(prompt, cache)
        self.prefill = time.perf_counter() - begin

    def _forward(self, tokens: Any, cache: Any) -> Any:
        import torch

        self.model.set_attn_implementation(self.attention)
        with torch.no_grad():
            logits = self.model(tokens, logits_to_keep=1, **{self._name: cache}).logits
        return logits[:, -1:].argmax(-1)

    def decode(self, steps: int) -> None:
        """Decode some tokens, greedily."""
        token = self.prompt[:, -1:]
        for _ in range(steps):
            begin = time.perf_counter()
            token = self._forward(token, self.cache)
            self.seconds.append(time.perf_counter() - begin)

    @property
    def typical(self) -> float:
        """Seconds of a token, the median."""
        return spread(self.seconds).median

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored, whoever stores it."""
        own = getattr(self.cache, "nbytes", None)
        return own if own is not None else sum(map(bytes_of, self.cache.layers))


def bytes_of(layer: Any) -> int:
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


if __name__ == "__main__":
    main()

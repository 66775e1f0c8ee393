"""What key feedback (F1) saves a model: divergence from the float32 cache, with it and without.

Run as ``python -m benchmarks.feedback [--passages N] [--texts reporting]``. Keys and values go
through ``streaming4``, ``streaming3`` and ``streaming2``; with feedback the keys alone. It is made
of the queries of one other text, the first 512 tokens of an address, by each of ``--damping``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from nsq_ref import Feedback, Scheme, dequantize, quantize
from nsq_ref.dtypes import Float32
from nsq_ref.feedback import DAMPING
from nsq_ref.scheme import as_scheme
from onnx_export.evaluation.captured import captured
from onnx_export.evaluation.scoring import Reference
from onnx_export.models.decoder import Decoder, cached_onnx
from onnx_export.models.sources import smollm2_gguf
from onnx_export.models.texts import ADDRESSES, REPORTING_START, passages, read_address
from onnx_export.models.tokenizer import Tokenizer

PREFILL, CONTINUATION = 512, 128
CALIBRATION = ADDRESSES[-1]  # whose first tokens no passage has, as there are fewer passages
MAGNITUDES: tuple[Literal["lsq", "gain"], ...] = ("lsq", "gain")


def schemes() -> Iterator[Scheme]:
    """The schemes, from more bits to fewer."""
    for name in ("streaming4", "streaming3", "streaming2"):
        yield as_scheme("name", name)


def stored(x: Float32, scheme: Scheme, layers: Sequence[Feedback] = ()) -> Float32:
    """What a cache ``[layers, 1, kv_heads, T, D]`` becomes."""
    return np.stack(
        [
            dequantize(quantize(own, scheme, feedback=layers[layer] if layers else None))
            for layer, own in enumerate(x)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feedback", description=__doc__)
    parser.add_argument("--passages", type=int, default=3, help="at most 8 of each address's first")
    parser.add_argument("--texts", choices=["development", "reporting"], default="development")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--damping", type=float, nargs="+", default=[DAMPING])
    parser.add_argument("--tokens", type=int, default=PREFILL, help="of the other text")
    options = parser.parse_args()
    gguf = smollm2_gguf()
    decoder, tokenizer = Decoder(cached_onnx(gguf), threads=options.threads), Tokenizer(gguf)
    kv_heads = decoder.config.kv_heads
    layers = captured(gguf, read_address(CALIBRATION), tokens=options.tokens).layers
    feedback = {
        damping: [Feedback.from_queries(one.queries, kv_heads, damping) for one in layers]
        for damping in options.damping
    }
    start = REPORTING_START if options.texts == "reporting" else 0
    length = PREFILL + CONTINUATION + 1
    found: dict[tuple[str, str], list[float]] = {}
    for number, row in enumerate(passages(tokenizer, length, options.passages, start=start)):
        _, keys, values = decoder.forward(row[None, :PREFILL], num_logits=0)
        ids, targets = row[None, PREFILL:-1], row[PREFILL + 1 :]
        exact = Reference(decoder.forward(ids, (keys, values))[0][0], targets)
        for scheme in schemes():
            new_values = stored(values, scheme)
            ways = {"to nearest": stored(keys, scheme)}
            for damping, own in feedback.items():
                for magnitude in MAGNITUDES:
                    name = f"feedback, {magnitude}, damping {damping}"
                    ways[name] = stored(keys, replace(scheme, magnitude=magnitude), own)
            size = f"{scheme.bits_per_element(PREFILL, decoder.config.head_dim):.2f}"
            for name, new_keys in ways.items():
                logits, _, _ = decoder.forward(ids, (new_keys, new_values))
                found.setdefault((size, name), []).append(exact.scores(logits[0]).kl.mean())
        print(f"\n{number + 1} passages of {options.texts}, mean KL in nats a token", flush=True)
        for (size, name), losses in found.items():
            nearest = found[size, "to nearest"]
            better = sum(a < b for a, b in zip(losses, nearest, strict=True))
            ratio = np.mean(losses) / np.mean(nearest)
            print(f"{size}  {name:28}  {np.mean(losses):.5f}  {ratio:.2f}  {better}", flush=True)


if __name__ == "__main__":
    main()

"""What integer attention adds to the error of the codes where every so many tokens are strong.

Such weights look like a comb: a few strong tokens in every block over a flat background, all of
which may be rounded the same way. `draw` makes them, `added` measures.
"""

from __future__ import annotations

import argparse
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from rich.console import Console
from rich.progress import track
from rich.table import Table

import nsq_ref as nsq
from nsq_ref.dtypes import Float32, Float64
from onnx_export.custom_ops import register
from onnx_export.operators import attention_model

KINDS = ("normal", "student-t", "Cauchy", "lognormal", "one-sided", "offset", "channels", "drift")
REAL_TOKENS = 2048
DRIFT = 0.98  # of a token that the next one keeps
CLIPPED = 50.0  # Cauchy, in units of its quartile
NATS = 5.5  # that strong tokens are above the others
JITTER = 0.3  # of theirs, standard deviation
IN_TAIL = 64  # tokens behind the sealed blocks


PAIRS = [
    *(("normal", kind) for kind in (*KINDS, "real")),
    *((kind, "lognormal") for kind in KINDS if kind != "normal"),
    ("drift", "drift"),
    ("real", "real"),
]
DRAWS = {512: 16, 2048: 8, 8192: 4, 32768: 4}  # of 32 heads each, by tokens
PERIODS = (16, 32)
SPREADS = (1.0, 0.3)  # of the scores besides, nats


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.combs", description=__doc__)
    parser.add_argument("--scheme", default="streaming4")
    parser.add_argument("--seed", type=int, default=1000)
    asked = parser.parse_args()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    register(options)
    scheme = nsq.Scheme.named(asked.scheme)
    table = Table("keys", "values", "heads", "median", "99%", "worst", "worst of each length")
    for keys, values in track(PAIRS, "Measuring", console=Console(stderr=True)):
        found = {}
        for tokens, count in DRAWS.items():
            draws = (
                draw(
                    np.random.default_rng([asked.seed, tokens, number]), keys, values, tokens,
                    period=PERIODS[number % 2], spread=SPREADS[number // 2 % 2],
                )
                for number in range(count)
            )  # fmt: skip
            found[tokens] = np.concatenate([added(one, scheme, options) for one in draws])
        each = np.concatenate(list(found.values()))
        figures = (np.median(each), np.quantile(each, 0.99), each.max())
        table.add_row(
            keys, values, str(each.size), *(f"{figure:.3f}" for figure in figures),
            " ".join(f"{own.max():.3f}" for own in found.values()),
        )  # fmt: skip
    Console(width=100).print(table)
    print(f"{asked.scheme}, seed {asked.seed}: error added by integers, of the codes' own")


class Draw(NamedTuple):
    """One attention of one new token, the last one."""

    query: Float32  # [heads, head_dim]
    keys: Float32  # [kv_heads, tokens, head_dim]
    values: Float32
    bias: Float32  # [tokens]


def draw(
    rng: np.random.Generator, keys: str, values: str, tokens: int, *, heads: int = 32,
    kv_heads: int = 8, head_dim: int = 128, period: int = 16, spread: float = 1.0,
) -> Draw:  # fmt: skip
    """Return ``tokens`` to be sealed after one sink, and those of a tail.

    Every ``period``-th token is `NATS` above the others, whose scores have the standard deviation
    ``spread``. Kinds of keys and values are those of `KINDS`, or ``real``.
    """
    count = 1 + tokens + IN_TAIL
    if "real" in (keys, values):
        head_dim = real_tokens().shape[-1]
    shape = (kv_heads, count, head_dim)
    key, value = (_tokens(rng, kind, side, shape) for side, kind in enumerate((keys, values)))
    query = rng.standard_normal((kv_heads, heads // kv_heads, head_dim)).astype(np.float32)
    scores = query @ key[:, :: max(1, count // 512)].swapaxes(1, 2) / np.sqrt(head_dim)
    query *= spread / scores.std(axis=-1, keepdims=True)
    bias = np.zeros(count, np.float32)
    strong = bias[rng.integers(period) :: period]
    strong += NATS + JITTER * rng.standard_normal(strong.size)
    return Draw(query.reshape(heads, head_dim).astype(np.float32), key, value, bias)


def _tokens(rng: np.random.Generator, kind: str, side: int, shape: tuple[int, int, int]) -> Float32:
    if kind == "real":
        return _real_heads(rng, side, shape)
    x: Any = rng.standard_normal(shape)
    if kind == "student-t":
        x = rng.standard_t(3, shape)
    elif kind == "Cauchy":
        x = np.clip(rng.standard_cauchy(shape), -CLIPPED, CLIPPED)
    elif kind == "lognormal":
        x = np.exp(x)
    elif kind == "one-sided":
        x = np.abs(x)
    elif kind == "offset":
        x += 3
    elif kind == "drift":
        x *= np.sqrt(1 - DRIFT**2)
        for before in range(shape[1] - 1):
            x[:, before + 1] += DRIFT * x[:, before]
    elif kind == "channels":  # an offset of each channel's own
        x += 3 * rng.standard_normal((shape[0], 1, shape[2]))
    return x.astype(np.float32)  # type: ignore[no-any-return]


def _real_heads(rng: np.random.Generator, side: int, shape: tuple[int, int, int]) -> Float32:
    """Heads of a model that has read four texts; more tokens are those of other texts."""
    heads = real_tokens()[side]
    found = []
    for _ in range(shape[0]):
        texts = heads[rng.permutation(len(heads)), rng.integers(heads.shape[1])]
        joined = texts.reshape(-1, shape[2])
        found.append(np.tile(joined, (-(-shape[1] // len(joined)), 1))[: shape[1]])
    return np.stack(found)


@cache
def real_tokens() -> Float32:
    """Return keys and values of SmolLM2, ``[2, texts, layers * kv_heads, tokens, head_dim]``."""
    from onnx_export.models.decoder import Decoder
    from onnx_export.models.sources import smollm2_gguf
    from onnx_export.models.texts import passages
    from onnx_export.models.tokenizer import Tokenizer

    path = smollm2_gguf()
    decoder = Decoder.from_gguf(path)
    found = []
    for text in passages(Tokenizer(path), REAL_TOKENS, 4):
        _, keys, values = decoder.forward(text[None], num_logits=0)
        found.append([x[:, 0].reshape(-1, *x.shape[3:]) for x in (keys, values)])
    return np.swapaxes(np.array(found), 0, 1)


def added(one: Draw, scheme: nsq.Scheme, options: onnxruntime.SessionOptions) -> Float64:
    """Return, for every query head, what integers add over the error of the codes themselves.

    With A the attention over the decoded cache and U that over the keys and values as they were,
    both in float64, that is ``|native - A| / |U - A|``, with lengths over the channels.
    ``options`` have the library registered.
    """
    decoded, output = attended(one, scheme, options)
    exact = attend(one, *decoded)
    own = np.linalg.norm(attend(one, one.keys, one.values) - exact, axis=-1)
    return np.linalg.norm(output - exact, axis=-1) / own  # type: ignore[no-any-return]


def attended(
    one: Draw, scheme: nsq.Scheme, options: onnxruntime.SessionOptions
) -> tuple[tuple[Float32, Float32], Float32]:
    """Return keys and values as the cache has them, and the output of the native library."""
    feeds: dict[str, Any] = {}
    decoded = []
    for side, x in (("key", one.keys), ("value", one.values)):
        size = scheme.block_size or 1
        sealed = scheme.sink_tokens + (x.shape[1] - 1 - scheme.sink_tokens) // size * size
        quantized = nsq.quantize(x[:, :sealed], scheme)
        decoded.append(np.concatenate([nsq.dequantize(quantized), x[:, sealed:]], axis=1))
        tail = np.zeros((1, x.shape[0], size, x.shape[2]), np.float32)
        tail[0, :, : x.shape[1] - 1 - sealed] = x[:, sealed:-1]
        parts = {**quantized.parts, "tail": tail[0]}
        feeds |= {f"past_{side}_{name}": part[None] for name, part in parts.items()}
        feeds[side] = x[:, -1].reshape(1, 1, -1)
    feeds["query"] = one.query.reshape(1, 1, -1)
    feeds["past_lengths"] = np.array([one.keys.shape[1] - 1])
    feeds["attention_bias"] = one.bias.reshape(1, 1, 1, -1)
    model = attention_model(
        scheme, scheme, heads=len(one.query), kv_heads=len(one.keys), head_dim=one.query.shape[1],
        inputs={"key", "value", "attention_bias"},
    )  # fmt: skip
    del model.functions[:]  # so that nothing but the library can answer
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (output,) = session.run(["output"], feeds)
    return (decoded[0], decoded[1]), output.reshape(len(one.query), -1)


def attend(one: Draw, keys: Float32, values: Float32) -> Float64:
    """Return attention in float64, ``[heads, head_dim]``."""
    query = one.query.astype(np.float64).reshape(len(keys), -1, one.query.shape[1])
    scores = query @ keys.astype(np.float64).swapaxes(1, 2) / np.sqrt(query.shape[-1]) + one.bias
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    output: Float64 = (weights @ values.astype(np.float64)).reshape(len(one.query), -1)
    return output


if __name__ == "__main__":
    main()

"""Keys that balanced norms are for, keys that they are not for, and which of the two were found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nsq_ref import Scheme, spec
from tests.support.onnx_attention import Config, Expected, Runner, check, make_inputs

__all__ = [
    "are_balanced", "check_keys_of_two_kinds", "keys_of_two_kinds", "order_of_tokens",
    "without_balance",
]  # fmt: skip

Float32 = npt.NDArray[np.float32]


def keys_of_two_kinds(tokens: int, channels: int) -> Float32:
    """Two heads, of outlier channels and of a channel far from 0, with zero tokens and channels.

    Norms of tokens spread over some powers of ten.
    """
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, tokens, channels)) * np.exp(rng.standard_normal((2, tokens, 1)))
    x[0, :, [1, channels // 2]] *= 40
    x[1, :, 2] = 50 + 0.1 * x[1, :, 2]
    x[:, :, -1] = x[:, tokens // 2] = 0
    return x.astype(np.float32)


def are_balanced(x: Float32, scheme: Scheme) -> npt.NDArray[np.bool_]:
    """Tell of each block of keys ``[heads, T, D]`` whether it has balanced norms: [heads, blocks].

    One whose sizes are all 1 counts as if it had not.
    """
    coded = x[:, scheme.sink_tokens :]
    size = scheme.tokens_per_block(coded.shape[1])
    blocks = [coded[:, first : first + size] for first in range(0, coded.shape[1], size)]
    with np.errstate(all="ignore"):
        sizes = [spec.norms_and_sizes(block, scheme)[1] for block in blocks]
    return np.stack([(one != 1).any(axis=(-2, -1)) for one in sizes], axis=1)


def check_keys_of_two_kinds(config: Config, **options: Any) -> None:
    """Append keys of which one head has balanced norms, in some steps, and compare the caches."""
    scheme = replace(config.key, norm_rule="balanced")
    config = replace(config, key=scheme)
    keys = keys_of_two_kinds(tokens=22, channels=config.head_dim)
    assert are_balanced(keys, scheme).any(axis=1).tolist() == [True, False]
    runner, expected = Runner(config, 1, **options), Expected(config, 1)
    rng = np.random.default_rng(1)
    for new in np.split(keys, [1, 8, 19], axis=1):
        inputs = make_inputs(config, rng, runner.lengths, new.shape[1])
        inputs["key"] = new.swapaxes(0, 1).reshape(inputs["key"].shape)
        check(runner, expected, inputs)


def without_balance() -> dict[str, Float32]:
    """Blocks whose plain norms are kept though sizes differ (N3), each [1, T, D]."""
    one_token = np.float32([[[1, 8, 0, -3]]])
    infinite_norm = np.float32([[[3e38, 1e37, -1e37, 1e37], [1e36, 0, 1e37, 2e37], [0, 0, 3, 1]]])
    return {
        "one token": one_token,
        "all tokens alike": np.repeat(one_token, 5, axis=1),
        "zero tokens": np.zeros((1, 3, 4), np.float32),
        "infinite norm": infinite_norm,
    }


def order_of_tokens() -> Float32:
    """A block whose spreads differ by tokens that a float64 sum loses behind larger ones (N3).

    Each token has one channel. A whole one of the first, and four halves of the second, make both
    spreads equal; each little one of the first is then for balanced norms.
    """
    large = np.float32([[1, 0], *[[0, 0.5]] * 4])
    little = np.float32([[2.0**-27, 0]] * 64)
    return np.concatenate([little, large])[None]

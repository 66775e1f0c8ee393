"""Hypothesis strategies for schemes and for tensors that look for trouble."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import numpy.typing as npt

from nsq_ref import Scheme

DTYPES = ("float16", "bfloat16", "float32")

# Neighbours of a tie, subnormals of float16 and float32, the ends of both ranges, signed zeros.
AWKWARD = [
    0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, 3.5, -0.5, -2.5, 7.0, -7.0, 8.0, 15.0,
    float(np.nextafter(np.float32(0.5), np.float32(1))),
    float(np.nextafter(np.float32(2.5), np.float32(0))),
    2.0**-24, 2.0**-25, 3 * 2.0**-25, 2.0**-126, 2.0**-149, 1e-30, 1e30, 65504.0, 65520.0,
    2e38, 3e38,
]  # fmt: skip


@st.composite
def schemes(draw: st.DrawFn, **fixed: Any) -> Scheme:
    """Any scheme; `fixed` are fields that are not drawn."""
    fields: dict[str, Any] = {
        "bits": st.sampled_from([4, 2, 3, 8]),
        "separate_norm": st.booleans(),
        "axis": st.sampled_from(["channel", "token"]),
        "symmetric": st.booleans(),
        "scale_rule": st.sampled_from(["range", "search"]),
        "magnitude": st.sampled_from(["norm", "gain", "lsq"]),
        "block_size": st.sampled_from([None, 1, 2, 3, 5]),
        "sink_tokens": st.sampled_from([0, 1, 3]),
        "outlier_channels": st.sampled_from([0, 1, 4]),
        "scale_dtype": st.sampled_from(DTYPES),
        "norm_dtype": st.sampled_from(DTYPES),
    }
    chosen = {name: fixed.get(name) or draw(fields[name]) for name in fields}
    chosen.update(fixed)
    if not chosen["separate_norm"]:
        chosen.update(magnitude="norm", norm_dtype="float16")
    return Scheme(**chosen)


@st.composite
def tensors(
    draw: st.DrawFn, most_tokens: int = 7, most_channels: int = 9
) -> npt.NDArray[np.float32]:
    """Keys or values ``[heads, T, D]`` with outlier channels, zeros, ties and wild norms."""
    heads = draw(st.integers(1, 2))
    tokens = draw(st.integers(1, most_tokens))
    head_dim = draw(st.one_of(st.sampled_from([1, 2, 3]), st.integers(1, most_channels)))
    shape = (heads, tokens, head_dim)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "awkward", "integers", "one-sided", "constant", "huge"]))
    if kind == "normal":
        x = rng.standard_normal(shape)
    elif kind == "awkward":
        x = np.array(draw(st.lists(st.sampled_from(AWKWARD), min_size=1, max_size=12)))
        x = np.resize(x, shape)
    elif kind == "integers":
        x = rng.integers(-15, 16, shape) / 2
    elif kind == "one-sided":
        x = rng.random(shape) + draw(st.sampled_from([0.0, 3.0, -4.0]))
    elif kind == "huge":  # one such token has a norm, or its scales a range, beyond float32
        x = rng.choice([1.0, -1e30, 1.5e38, -2e38, 3.4e38], shape)
    else:
        x = np.broadcast_to(rng.standard_normal((heads, 1, head_dim)), shape).copy()
    if draw(st.booleans()):  # outlier channels of 10 to 1000 times
        x[..., rng.integers(head_dim)] *= 10.0 ** draw(st.integers(1, 3))
    spread = draw(st.sampled_from([0, 1, 4, 30]))
    if spread and kind != "awkward":  # norms from 1e-30 to 1e30
        x = x * 10.0 ** rng.uniform(-spread, spread, (heads, tokens, 1))
    if draw(st.booleans()):
        x[:, rng.integers(tokens)] = draw(st.sampled_from([0.0, -0.0]))
    if draw(st.booleans()):
        x[..., rng.integers(head_dim)] = 0.0
    return np.clip(x, -3.4e38, 3.4e38).astype(np.float32)


@st.composite
def inputs(draw: st.DrawFn) -> npt.NDArray[Any]:
    """The tensors in every dtype that is taken, within what that dtype holds."""
    x = draw(tensors())
    dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.float64]))
    most = {np.float16: 65504.0, ml_dtypes.bfloat16: 3.38e38}.get(dtype, 3.4e38)
    return np.clip(x, -most, most).astype(dtype)

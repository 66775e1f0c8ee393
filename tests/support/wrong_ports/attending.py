"""Attention (rules A1, A2)."""

from __future__ import annotations

import numpy as np

from tests.support.wrong_ports.exact import F32, Array
from tests.support.wrong_ports.knobs import Knobs


def attended(
    query: Array, k: Array, v: Array, knobs: Knobs, *, scale: float, causal: bool,
    softcap: float | None, sliding_window: int | None,
) -> Array:  # fmt: skip
    """Return the output of each query head over decoded keys and values."""
    heads, queries, head_dim = query.shape
    groups, tokens = len(k), k.shape[1]
    factor = F32({
        "given": scale, "none": 1.0, "1 / D": 1 / head_dim, "1 / sqrt(D)": head_dim**-0.5,
    }[knobs.score_scale])  # fmt: skip
    cap = None if knobs.softcap == "none" else softcap
    window = None if knobs.window_left_out else sliding_window
    output = np.zeros((heads, queries, v.shape[-1]), F32)
    with np.errstate(all="ignore"):
        for h in range(heads):
            group = h // (heads // groups)
            if knobs.head_order == "in turn":
                group = h % groups
            for i in range(queries):
                position = tokens - queries + i if knobs.position == "last" else i
                seen = np.ones(tokens, bool)
                if causal and knobs.causal != "ignored":
                    shift = {"right": 0, "one more": 1, "one less": -1}[knobs.causal]
                    seen &= np.arange(tokens) <= position + shift
                if window is not None:
                    seen &= np.arange(tokens) > position - window - knobs.window
                s = (k[group] @ query[h, i]) * factor
                if knobs.softcap == "after the mask" and cap is not None:
                    s = np.where(seen, s, F32(-1e30))
                    s = F32(cap) * np.tanh(s / F32(cap))
                    seen[:] = True
                elif cap is not None:
                    s = F32(cap) * np.tanh(s / F32(cap))
                if not seen.any():
                    continue
                if knobs.subtract:
                    s = s - s[seen].max()
                p = np.where(seen, np.exp(s), F32(0))
                output[h, i] = (p / p.sum()) @ v[group]
    return output

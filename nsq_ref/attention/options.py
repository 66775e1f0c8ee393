"""What attention is asked to do, as plain numbers and arrays, after all of it makes sense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nsq_ref.arrays import as_float, as_float_array, as_integer, as_integers
from nsq_ref.dtypes import Array

__all__: list[str] = []  # the package keeps them for itself


class Options(NamedTuple):
    scale: float
    softcap: float | None
    sliding_window: int | None


def require_options(
    head_dim: int,
    scale: float | None,
    causal: bool,
    softcap: float | None,
    sliding_window: int | None,
) -> Options:
    """Return the options as plain numbers, after all make sense."""
    if not head_dim:
        raise ValueError("query has D = 0; leave such heads out")
    factor = 1 / math.sqrt(head_dim) if scale is None else as_float("scale", scale)
    if not math.isfinite(factor):
        raise ValueError(f"scale={factor} is not finite; leave it out for 1 / sqrt(D)")
    cap = None if softcap is None else as_float("softcap", softcap)
    if cap is not None and not (math.isfinite(cap) and cap > 0):
        raise ValueError(f"softcap={cap} is not a positive number; leave it out for none")
    if sliding_window is None:
        return Options(factor, cap, None)
    window = as_integer("sliding_window", sliding_window)
    if window < 1:
        raise ValueError(
            f"sliding_window={window} is not a positive integer; leave it out for none"
        )
    if not causal:
        raise ValueError(
            f"sliding_window={window} counts positions back from the query's own, which "
            "causal=False does not; use one of the two"
        )
    return Options(factor, cap, window)


def floats(axes: int, **given: Any) -> list[Array]:
    """Return arrays by their names, if all have that many axes."""
    taken = []
    for name, x in given.items():
        array = as_float_array(name, x)
        if array.ndim != axes:
            raise ValueError(
                f"{name} has {array.ndim} axes, {list(array.shape)}; {axes} are needed"
            )
        taken.append(array)
    return taken


def finite(name: str, array: Array, *row: int) -> Array:
    """Return the array, unless something in it is not finite; `row` is where it comes from."""
    if np.isfinite(array).all():
        return array
    index = [*row, *(int(i) for i in np.argwhere(~np.isfinite(array))[0])]
    raise ValueError(
        f"{name}{index} is not finite; mend it, or leave it out with lengths or query_lengths"
    )


def group_of(heads: int, kv_heads: int) -> int:
    """Return how many query heads share keys and values."""
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"query has {heads} heads, keys and values have {kv_heads}; query heads are a positive "
            "multiple of them"
        )
    return heads // kv_heads


def require_lengths(
    name: str, lengths: Array | Sequence[int] | None, batch: int, most: int
) -> list[int]:
    return [most] * batch if lengths is None else as_integers(name, lengths, batch, 0, most)

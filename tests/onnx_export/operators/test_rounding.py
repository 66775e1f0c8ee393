"""Roundings in standard operators: the reference's bytes, where float64 cannot decide too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto

from nsq_ref import rounding
from onnx_export.operators import rounding as exported
from onnx_export.operators.nodes import Nodes
from tests.support.onnx_runners import RUNNERS, Run, model_of
from tests.support.rows import norm_order, norm_ties, spread

Array = npt.NDArray[Any]
FLOAT = TensorProto.FLOAT


@pytest.fixture(scope="module", params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> Callable[[onnx.ModelProto], Run]:
    return RUNNERS[request.param]


def test_narrowing(runner: Callable[[onnx.ModelProto], Run]) -> None:
    """S3 M4 Z1. Values and ties of float16 and bfloat16, subnormal ones too, and what lies by."""
    for dtype, digits in ((TensorProto.FLOAT16, 11), (TensorProto.BFLOAT16, 8)):
        exponents = np.arange(-160, 129)[:, None]
        ties = np.ldexp(1 + np.arange(0, 64) * 2.0 ** -(digits + 1), exponents)
        with np.errstate(over="ignore"):
            values = ties.astype(np.float32).ravel()
        values = values[np.isfinite(values)]
        x = np.concatenate([values, np.nextafter(values, np.float32(0)), -values])
        add = Nodes()
        narrowed = exported.narrow(add, "x", add.constant(dtype))
        got = runner(model_of(add.nodes, {"x": FLOAT}, {narrowed: FLOAT}))({"x": x})[narrowed]
        kind = np.float16 if dtype == TensorProto.FLOAT16 else ml_dtypes.bfloat16
        assert got.tobytes() == rounding.narrow(x, np.dtype(kind)).astype(np.float32).tobytes()


# --- roundings that float64 cannot decide -------------------------------------------------------


def exact(
    runner: Callable[[onnx.ModelProto], Run],
    build: Callable[..., str],
    **vectors: Array,
) -> Array:
    add = Nodes()
    result = build(add, *vectors)
    model = model_of(add.nodes, dict.fromkeys(vectors, FLOAT), {result: FLOAT})
    return runner(model)(vectors)[result]


def test_norms_next_to_midpoints(runner: Callable[[onnx.ModelProto], Run]) -> None:
    """N1. On ties, beside them by less than float64 sees, subnormal, and beyond float32."""
    rng = np.random.default_rng(0)
    odd = [1, 2.0**-11, 2.0**-12, 2.0**-12, 3 * 2.0**-24, 0]  # its root is 1 + 3 * 2^-24
    rows = [[*odd[:5], least] for least in (0, 2.0**-30, 2.0**-60, 2.0**-149)]
    rows += [[odd[i] * (1 - 2.0**-23 if i == 4 else 1) for i in range(6)]]
    rows += list(np.ldexp(rng.integers(-3, 4, (64, 6)).astype(np.float64), -149))
    rows += list(np.ldexp(rng.integers(-(2**23), 2**23, (64, 6)).astype(np.float64), -149))
    rows += list(np.ldexp(rng.standard_normal((64, 6)), rng.integers(-140, 126, (64, 6))))
    largest = float(np.finfo(np.float32).max)
    rows += [[largest, other, 0, 0, 0, 0] for other in (1e30, 1.4e34, 1.4e35, largest)]
    for x in (np.array(rows, np.float32), norm_ties(), norm_order(), spread((20, 12))):
        assert exact(runner, exported.norm, x=x).tobytes() == rounding.norm(x).tobytes()


def test_gains_next_to_midpoints(runner: Callable[[onnx.ModelProto], Run]) -> None:
    """M3. Quotients on ties, beside them, and where the products cancel."""
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(240):
        middle = (2 * int(rng.integers(2**23, 2**24)) + 1) * 2.0**-24
        y = np.zeros(6)
        y[:2] = 2.0**-10
        x = np.zeros(6)
        x[0] = np.float32(middle * 2.0**-9)
        x[1] = middle * 2.0**-9 - x[0]  # the quotient is a tie
        if i % 3:
            x[2], y[2] = (1, -1)[i % 2] * 1e-3, (1e-30, 2.0**-140)[i // 6 % 2]  # and beside it
        pairs.append((x * 2.0 ** int(rng.integers(-90, 90)) * (1, -1)[i // 12 % 2], y))
    for i in range(120):
        x, y = rng.standard_normal((2, 6)).astype(np.float32).astype(np.float64)
        x[0] = np.float32(-(x[1:] @ y[1:]) / y[0])
        if i % 3 == 0:
            x[:3], x[3:], y[:3] = (1, -1, 0), 0, (0.5, 0.5, 2.0**-149 * (i % 7))
        pairs.append((x * 10.0 ** int(rng.integers(-30, 30)), y))
    pairs.append((np.ones(6), np.zeros(6)))
    x, y = (np.array(side, np.float32) for side in zip(*pairs, strict=True))
    got = exact(runner, exported.least_squares_gain, x=x, y=y)
    assert got.tobytes() == rounding.least_squares_gain(x, y).tobytes()
    with np.errstate(all="ignore"):  # or the cases prove nothing
        wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
        plain = np.sum(wide_x * wide_y, -1) / np.sum(wide_y * wide_y, -1)
    assert np.count_nonzero(plain.astype(np.float32) != got) > 50

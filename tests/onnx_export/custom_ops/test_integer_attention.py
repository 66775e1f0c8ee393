"""Integer attention: what rounding queries and weights adds to the error of the codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from benchmarks import combs
from nsq_ref import Scheme
from onnx_export.custom_ops import library_path, register
from tests.support.onnx_attention import Array, Config, Runner, make_inputs
from tests.support.processors import CPUS

Float64 = npt.NDArray[np.float64]
STREAMING = Scheme.named("streaming4")


@pytest.fixture(params=[cpu for cpu in CPUS if cpu != "portable"] or CPUS)
def options(request: pytest.FixtureRequest) -> Iterator[onnxruntime.SessionOptions]:
    """Of sessions with the library, on each instruction set that has integers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSQ_CPU", request.param)
        patch.setenv("NSQ_EXACT", "0")
        found = onnxruntime.SessionOptions()
        found.log_severity_level = 4
        found.intra_op_num_threads = 1
        register(found)
        yield found


def held(added: Float64, median: float = 0.15, most: float = 0.3) -> None:
    assert np.median(added) <= median
    assert added.max() <= most


@pytest.mark.parametrize("period", [16, 32])
@pytest.mark.parametrize(
    ("keys", "values"),
    [
        *(("normal", kind) for kind in combs.KINDS),
        *((kind, "lognormal") for kind in combs.KINDS if kind != "normal"),
    ],
)
def test_combs(options: onnxruntime.SessionOptions, keys: str, values: str, period: int) -> None:
    """Strong tokens over a flat background: the roundings of a row must not add up."""
    rng = np.random.default_rng(combs.KINDS.index(keys) * 10 + combs.KINDS.index(values))
    one = combs.draw(rng, keys, values, 512, period=period, spread=0.3)
    held(combs.added(one, STREAMING, options))


@pytest.mark.parametrize(
    "scheme",
    [
        replace(STREAMING, bits=3),
        replace(STREAMING, bits=2),
        replace(STREAMING, symmetric=True, magnitude="norm"),
        replace(STREAMING, magnitude="gain", block_size=100),
        replace(STREAMING, separate_norm=False, magnitude="norm"),
        replace(STREAMING, axis="token"),
    ],
    ids=["3 bits", "2 bits", "norm", "gain", "plain", "token"],
)
def test_schemes(options: onnxruntime.SessionOptions, scheme: Scheme) -> None:
    """The same with other codes, and with groups of another size."""
    rng = np.random.default_rng(3)
    one = combs.draw(
        rng, "one-sided", "lognormal", 800, heads=18, kv_heads=2, head_dim=80, spread=0.3
    )
    held(combs.added(one, scheme, options))


def test_drift(options: onnxruntime.SessionOptions) -> None:
    """Scores drift as values do: so must not the roundings of flat weights."""
    one = combs.draw(np.random.default_rng(4), "drift", "drift", 2048, period=32, spread=0.3)
    held(combs.added(one, STREAMING, options), median=0.08, most=0.15)


def test_weights_take_two_bytes(options: onnxruntime.SessionOptions) -> None:
    """One strong token a block: the others need more than a byte beside it."""
    one = combs.draw(np.random.default_rng(5), "normal", "normal", 1024, period=128, spread=0.1)
    held(combs.added(one, STREAMING, options), median=0.09)


@pytest.mark.parametrize("sharp", [False, True], ids=["outlier", "sharp"])
def test_queries_take_two_bytes(options: onnxruntime.SessionOptions, sharp: bool) -> None:
    """One channel far above the others, and scores so far apart that little errors matter."""
    rng = np.random.default_rng(6)
    one = combs.draw(rng, "normal", "normal", 1024, spread=6.0 if sharp else 1.0)
    if not sharp:
        query = one.query.copy()
        query[:, 7] *= 10
        one = one._replace(query=query)
    one = one._replace(bias=0 * one.bias)
    held(combs.added(one, STREAMING, options), median=0.02 if sharp else 0.06, most=0.15)


def outputs(scheme: Scheme, part: str, value: float, exact: bool) -> Array:
    """Three queries after 40 tokens, with one stored number of the second head changed."""
    config = Config(
        heads=4, kv_heads=2, head_dim=32, key=scheme, value=scheme, capacity=64, new_lengths=False
    )  # fmt: skip
    rng = np.random.default_rng(7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSQ_EXACT", str(int(exact)))
        runner = Runner(config, 1, functions=(), library=library_path())
    runner.step(make_inputs(config, rng, runner.lengths, 40))
    runner.cache[part][0, 1].reshape(-1)[5] = value
    return runner.step(make_inputs(config, rng, runner.lengths, 3)).reshape(3, 2, -1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("magnitude", ["norm", "gain"])
def test_not_finite_in_the_cache(
    options: onnxruntime.SessionOptions, magnitude: Any, axis: Any, value: float
) -> None:
    """What was stored is not finite: integers give NaN wherever floats do, and no number more."""
    del options  # which chose the instruction set
    scheme = Scheme(block_size=8, symmetric=False, magnitude=magnitude, axis=axis)
    for side in ("key", "value"):
        for part in ("norm", "scale", "zero"):
            exact, codes = (
                outputs(scheme, f"{side}_{part}", value, exact) for exact in (True, False)
            )
            assert np.isfinite(codes[:, 0]).all()
            assert not np.isfinite(codes[:, 1]).all()
            assert np.isnan(codes[np.isnan(exact)]).all()
            assert not np.isfinite(codes[~np.isfinite(exact)]).any()

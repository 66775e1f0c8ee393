"""Exact answers: the oracle, attention in decimals, a cache as a list."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nsq_ref import Scheme, attention, dequantize, quantize
from nsq_ref.conformance import model, vectors
from nsq_ref.conformance.operations import Case, scheme_array
from nsq_ref.conformance.vectors import exact
from tests.nsq_ref.conformance.vectors.test_backends import same_bytes, stored_side


def document(file: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((vectors.FOLDER / file).read_bytes())
    return parsed


def test_a_case_that_says_another_refusal_is_refused() -> None:
    """I2 M4 N1: what the oracle refuses, by which rule, is what the case must say."""
    x = {
        "I2": np.float32([[np.nan, 1]]),
        "M4": np.float32([[1e6, 1]]),
        "N1": np.float32([[3e38, 3e38]]),
    }
    for rule, array in x.items():
        assert exact.answer(Case("a/0", "encode", Scheme(), (), {"x": array}, rule)).expected == {}
        for other in {None, "S5", *x} - {rule}:
            with pytest.raises(ValueError, match=f"refuses it by {rule}"):
                exact.answer(Case("a/0", "encode", Scheme(), (), {"x": array}, other))
    with pytest.raises(ValueError, match="refuses it by no rule"):
        exact.answer(Case("a/0", "encode", Scheme(), (), {"x": np.ones((1, 2), np.float32)}, "I2"))


def test_the_oracle_decodes_what_it_encodes() -> None:
    """D1: two ways to x_hat."""
    for vector in vectors.load("encode-streaming4"):
        if vector.case.refused_by is not None:
            continue
        shape = vector.case.inputs["x"].shape
        parts = {**vector.expected, "shape": np.array(shape, np.int32)}
        case = Case(vector.case.id, "decode", vector.case.scheme, (), parts)
        assert same_bytes(exact.answer(case).expected["x_hat"], vector.intermediates["x_hat"])


def attend_case(options: dict[str, Any]) -> Case:
    rng = np.random.default_rng(0)
    schemes = {"keys": Scheme.named("nsep+out4"), "values": Scheme.named("streaming3")}
    inputs: dict[str, Any] = {"query": rng.standard_normal((4, 3, 6)).astype(np.float32)}
    for (side, scheme), channels in zip(schemes.items(), (6, 5), strict=True):
        x = rng.standard_normal((2, 9, channels)).astype(np.float32)
        parts = {**quantize(x, scheme).parts, "shape": np.array(x.shape, np.int32)}
        inputs |= {f"{side}.{name}": part for name, part in parts.items()}
    inputs["value_scheme"] = scheme_array(schemes["values"])
    for name, kind in (
        ("scale", np.float32),
        ("causal", np.int32),
        ("softcap", np.float32),
        ("sliding_window", np.int32),
    ):
        inputs[name] = np.array([options[name]], kind)
    return Case("a/0", "attend", schemes["keys"], (), inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("softcap", "window"), [(0, 0), (0.75, 0), (0, 4), (20, 1)])
def test_exact_attention_is_that_of_float64(causal: bool, softcap: float, window: int) -> None:
    """A1 A2 A3."""
    if window and not causal:
        window = 0
    options = {"scale": 0.375, "causal": causal, "softcap": softcap, "sliding_window": window}
    case = attend_case(options)
    answer = exact.answer(case)
    x_hat = [answer.intermediates[f"{side}.x_hat"] for side in ("keys", "values")]
    stored = [
        stored_side(case, "keys", case.scheme),
        stored_side(case, "values", Scheme.named("streaming3")),
    ]
    for decoded, q in zip(x_hat, stored, strict=True):
        assert same_bytes(decoded, dequantize(q))
    given = {**options, "softcap": softcap or None, "sliding_window": window or None}
    arrays = [array[None] for array in (case.inputs["query"], *x_hat)]
    wanted = attention.attend(*arrays, **given)  # type: ignore[arg-type]
    assert np.abs(answer.expected["output"] - wanted.output[0]).max() < 1e-14
    assert np.abs(answer.intermediates["weights"] - wanted.weights[0]).max() < 1e-14
    assert ((answer.intermediates["weights"] == 0) == (wanted.weights[0] == 0)).all()
    reach = [attention.reach(q)[None] for q in stored]
    bound = attention.tolerance(*arrays, *reach, **given).output[0]  # type: ignore[arg-type]
    ratio = answer.expected["tolerance"] / bound
    assert ratio.min() > 1
    assert ratio.max() < 1 + 2.0**-11


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("name", ["nsep+pchan4", "streaming3", "outlier4"])
def test_exact_stream_is_that_of_the_model(name: str, sinks: int, dtype: Any) -> None:
    """B1 B2 C1 K1."""
    scheme = replace(Scheme.named(name), block_size=3, sink_tokens=sinks)
    rng = np.random.default_rng(0)
    tailed = 0
    for _ in range(20):
        steps: list[list[int]] = []
        lengths, taken = [0, 0], [0, 0]
        for _ in range(rng.integers(0, 6)):
            kind = int(rng.integers(2))
            numbers = [int(rng.integers(0, 9 if kind == 0 else n + 1)) for n in lengths]
            lengths = [n + m if kind == 0 else m for n, m in zip(lengths, numbers, strict=True)]
            taken = [n + m if kind == 0 else n for n, m in zip(taken, numbers, strict=True)]
            steps.append([kind, *numbers])
        x = rng.standard_normal((2, max(*taken, 1), 5)) * 10.0 ** rng.integers(-3, 5)
        x[0, -1] = 0
        inputs = {
            "x": np.clip(x, -60000, 60000).astype(dtype),
            "steps": np.array(steps, np.int32).reshape(-1, 3),
            "row": np.array([1], np.int32),
        }
        got = exact.answer(Case("a/0", "stream", scheme, (), inputs)).expected
        wanted = model.stream(inputs["x"], scheme, inputs["steps"], 1)
        assert got.keys() == wanted.keys()
        for part, array in wanted.items():
            assert same_bytes(got[part], array), part
        tailed += len(got["tail"])
    assert tailed

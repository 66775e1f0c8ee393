"""The PyTorch example of docs/porting.md agrees with the reference, bit by bit."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from nsq_ref import Feedback, Scheme, dequantize, quantize, rounding
from nsq_ref.conformance.cases import cases
from nsq_ref.strategies import inputs
from tests.project.test_examples import norm_at
from tests.support import rows as hard_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
example = importlib.import_module("nsq_port_torch")
torch = importlib.import_module("torch")

SCHEMES = [
    Scheme(block_size=size, norm_rule=rule, magnitude=magnitude)  # type: ignore[arg-type]
    for size in (None, 1, 3, 1000)
    for rule, magnitude in (("plain", "norm"), ("plain", "gain"), ("balanced", "gain"))
]


def agrees(x: npt.NDArray[Any], scheme: Scheme, feedback: Feedback | None = None) -> bool:
    """Whether the example refuses what the reference refuses; what it stores must be equal."""
    try:
        expected = quantize(x, scheme, feedback=feedback)
    except ValueError:
        with pytest.raises(ValueError, match=r"not finite|beyond its dtype"):
            example.encode(x, scheme, feedback=feedback)
        return True
    made = example.encode(x, scheme, feedback=feedback)
    parts = {name: np.from_dlpack(part) for name, part in made.items()}
    assert parts.keys() == expected.parts.keys()
    for name, part in expected.parts.items():
        assert (parts[name].shape, parts[name].dtype) == (part.shape, part.dtype)
        assert parts[name].tobytes() == part.tobytes(), name
    decoded = np.from_dlpack(example.decode(expected.parts, scheme, x.shape))
    return decoded.tobytes() == dequantize(expected).tobytes()


def test_norms_are_correctly_rounded() -> None:
    """N1: on the middle of two float32 and beside it, up to the end of float32."""
    rows = np.concatenate([norm_at(middle) for middle in (2**24 + 3, 30_000_001, 2**25 - 1)])
    scaled = np.concatenate([np.ldexp(rows, exponent) for exponent in (-150, -100, 0, 102)])
    for x in (scaled, np.ldexp(rows[-3:], 103), hard_rows.norm_ties(), hard_rows.spread((60, 7))):
        norm = example.norm(torch.from_numpy(x)).numpy()
        assert norm.tobytes() == rounding.norm(x).tobytes()


@settings(max_examples=150)
@given(inputs())
def test_the_example_agrees_on_drawn_input(x: npt.NDArray[Any]) -> None:
    """I1 I2 N2 N3 S1 Q1 P1 M1 M2 M4 D1: in every dtype, with and without blocks."""
    for scheme in SCHEMES:
        assert agrees(x, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_example_agrees_on_engineered_input(scheme: Scheme) -> None:
    """N1 N2 N3 S1 Q1 P1: near-ties, one-hot tokens, norms about ties of float32 and of float16."""
    ties = np.ldexp(np.concatenate([norm_at(2049 * 2**13 + side) for side in (-1, 1)]), -24)
    kit = (case.inputs["x"] for case in cases(scheme, ["encode"]))
    for x in (ties, *kit):
        assert agrees(x, scheme)


@pytest.mark.parametrize("scheme", [SCHEMES[number] for number in (1, 6, 8)], ids=str)
def test_the_example_feeds_back(scheme: Scheme) -> None:
    """F1: near-ties, any order, heads, factors that overflow, zero tokens."""
    for case in cases(scheme, ["feedback"]):
        feedback = Feedback(case.inputs["order"], case.inputs["factor"])
        assert agrees(case.inputs["x"], scheme, feedback), case


def test_the_example_refuses() -> None:
    """I2: NaN in the last place of the last sequence."""
    x = np.ones((2, 5, 3), np.float32)
    x[1, 4, 2] = np.nan
    assert agrees(x, Scheme())


def test_the_example_says_what_it_leaves_out() -> None:
    for scheme in (Scheme(bits=3), Scheme(magnitude="lsq"), Scheme(sink_tokens=1)):
        with pytest.raises(NotImplementedError):
            example.encode(np.ones((2, 3), np.float32), scheme)

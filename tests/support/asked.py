"""Cases that ports are asked, and what is to be made of their answers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

import nsq_ref as nsq
from nsq_ref import Scheme
from nsq_ref.conformance.operations import (
    DONE,
    Answer,
    Case,
    Failure,
    Operation,
    scheme_array,
)
from nsq_ref.conformance.ports.frames import Frame, write_frame

PORTS = Path(__file__).parents[1] / "ports"
FUNCTIONS = str(PORTS / "functions.py")
PCHAN = Scheme(separate_norm=False)
ALL_PARTS = Scheme(symmetric=False, block_size=2, sink_tokens=1, outlier_channels=1)

rng = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return rng.standard_normal(shape, np.float32)


def case(operation: Operation = "encode", scheme: Scheme | None = None, **inputs: Any) -> Case:
    inputs = inputs or {"x": normal(3, 4)}
    return Case("case/0", operation, Scheme() if scheme is None else scheme, (), inputs)


def decode_case(x: Any, scheme: Scheme) -> Case:
    parts = nsq.quantize(x, scheme).parts
    return case("decode", scheme, **parts, shape=np.int32(x.shape))


def attend_case(**options: float) -> Case:
    key_scheme, value_scheme = Scheme(bits=8), Scheme(symmetric=False, magnitude="gain")
    keys, values = (
        nsq.quantize(normal(1, 5, 4), key_scheme),
        nsq.quantize(normal(1, 5, 6), value_scheme),
    )
    given = {"scale": 0.5, "causal": 1, "softcap": 0, "sliding_window": 0} | options
    return case(
        "attend",
        key_scheme,
        query=normal(2, 3, 4),
        **{f"keys.{name}": part for name, part in keys.parts.items()},
        **{"keys.shape": np.int32([1, 5, 4])},
        **{f"values.{name}": part for name, part in values.parts.items()},
        **{"values.shape": np.int32([1, 5, 6])},
        value_scheme=scheme_array(value_scheme),
        scale=np.float32([given["scale"]]),
        causal=np.int32([given["causal"]]),
        softcap=np.float32([given["softcap"]]),
        sliding_window=np.int32([given["sliding_window"]]),
    )


def stream_case(scheme: Scheme, steps: Any, x: Any = None, row: int = 0) -> Case:
    x = normal(2, 40, 4) if x is None else x
    return case("stream", scheme, x=x, steps=np.int32(steps), row=np.int32([row]))


def answered(answer: Answer | Failure) -> Answer:
    assert isinstance(answer, Answer), answer
    return answer


def arrays_of(answer: Answer | Failure) -> dict[str, Any]:
    assert answered(answer).status == DONE, answer
    return dict(answered(answer).arrays)


def failed(answer: Answer | Failure) -> Failure:
    assert isinstance(answer, Failure), answer
    return answer


def equal(got: Any, expected: Any) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert (got[name].dtype, got[name].shape) == (expected[name].dtype, expected[name].shape)
        assert got[name].tobytes() == expected[name].tobytes(), name


def stream_of(*frames: Frame, behind: bytes = b"") -> io.BytesIO:
    stream = io.BytesIO()
    for frame in frames:
        write_frame(stream, frame)
    stream.write(behind)
    stream.seek(0)
    return stream

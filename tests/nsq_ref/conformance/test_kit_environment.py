"""The kit judges as always in a thread whose float modes somebody else has changed."""

from __future__ import annotations

from typing import Any

import numpy as np

import nsq_ref as nsq
from nsq_ref import Scheme
from nsq_ref.conformance import check
from nsq_ref.conformance.cases import cases
from nsq_ref.conformance.operations import Case
from nsq_ref.environment import is_default_environment
from tests.nsq_ref.test_environment import flush, in_thread

NAME = "nsep+pchan4-float32"


def flushing(work: Any) -> Any:
    """Do it in a thread that flushes small floats to zero, as others leave it behind."""

    def flushed() -> Any:
        flush()
        assert not is_default_environment()
        return work()

    return in_thread(flushed)


def bits(some: list[Case]) -> list[tuple[str, str, bytes]]:
    return [
        (f"{case.operation}/{case.id}", name, array.tobytes())
        for case in some
        for name, array in case.inputs.items()
    ]


def flushes(x: Any, scheme: Scheme) -> dict[str, Any]:
    """A port that stores 0 in place of subnormal scales and norms."""
    parts = dict(nsq.quantize(x, scheme).parts)
    for name in ("scale", "norm"):
        small = parts[name].view(np.uint32) & 0x7FFFFFFF < 0x00800000
        parts[name] = np.where(small, np.float32(0), parts[name])
    return parts


def test_cases_are_the_same() -> None:
    """S3 M1: subnormal numbers are among them."""
    assert bits(flushing(lambda: cases(NAME))) == bits(cases(NAME))


def test_the_judge_does_not_flush_along_with_a_port() -> None:
    """S3: one that flushes does not conform, and one that does not conforms."""
    for port, conforms in ((flushes, False), (nsq.quantize, True)):
        for where in (lambda work: work(), flushing):
            report = where(lambda port=port: check(port, scheme=NAME, dtypes=["float32"]))
            assert report.conforms == conforms

"""Judge one answer: stage by stage, each on what the port itself stored at the stage before.

So one wrong norm does not make every code wrong. All stages come from the functions of a
`Reference`, which may have a mistake in it: that is how `diagnose` finds out what a port does.
"""

from __future__ import annotations

import functools

import numpy as np

from nsq_ref.conformance.judge.attend import JudgingAttend
from nsq_ref.conformance.judge.decode import JudgingDecode
from nsq_ref.conformance.judge.encode import JudgingEncode
from nsq_ref.conformance.judge.feedback import JudgingFeedback
from nsq_ref.conformance.judge.latitudes import LATITUDES, Latitudes
from nsq_ref.conformance.judge.stages import STAGES, Judging, Verdict, default_rule
from nsq_ref.conformance.judge.stream import JudgingStream
from nsq_ref.conformance.mistakes.reference import Reference
from nsq_ref.conformance.operations import Answer, Case, Operation
from nsq_ref.environment import in_default_environment

__all__ = ["LATITUDES", "STAGES", "Latitudes", "Verdict", "default_rule", "judge"]

_JUDGING: dict[Operation, type[Judging]] = {
    "encode": JudgingEncode,
    "decode": JudgingDecode,
    "attend": JudgingAttend,
    "stream": JudgingStream,
    "feedback": JudgingFeedback,
    "stream_feedback": JudgingStream,
}


@in_default_environment
def judge(
    case: Case,
    answer: Answer,
    latitudes: Latitudes | None = None,
    reference: Reference | None = None,
    only: str = "",
) -> Verdict:
    """Judge what a port returned for a case.

    The answer is done or refused: what a port does not implement is nothing to judge. By default no
    latitude is allowed, and the reference is the specification. Of the stages of `STAGES` that
    follow the structure, ``only`` may name one: of the others nothing need be found then.

    Examples
    --------
    >>> from nsq_ref.conformance import model
    >>> from nsq_ref.conformance.cases import cases
    >>> case = cases("nsep+pchan4", ["encode"])[0]
    >>> answer = Answer(0, model.encode(case.inputs["x"], case.scheme))
    >>> judge(case, answer).findings
    []
    """
    judging = _JUDGING[case.operation](
        case, answer, latitudes or Latitudes(), reference or _the_specification(), only
    )
    with np.errstate(all="ignore"):
        judging.run()
    return judging.verdict


@functools.cache
def _the_specification() -> Reference:
    return Reference()

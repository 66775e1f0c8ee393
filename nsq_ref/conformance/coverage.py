"""Which case shows which mistake: each mistake put into the reference, and asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nsq_ref.conformance.judge import judge
from nsq_ref.conformance.judge.diagnose import reference_with
from nsq_ref.conformance.mistakes.reference import Mistake, Reference
from nsq_ref.conformance.operations import DONE, Answer, Case, attention_options, stored_side
from nsq_ref.environment import in_default_environment


@in_default_environment
def answered(reference: Reference, case: Case) -> Answer | None:
    """Return what a port that is this reference answers; None where it breaks off."""
    given: dict[str, Any] = dict(case.inputs)
    model, scheme = reference.model, case.scheme
    try:
        with np.errstate(all="ignore"):
            if case.operation == "encode":
                return Answer(DONE, model.encode(given["x"], scheme))
            if case.operation == "decode":
                shape = tuple(given.pop("shape").tolist())
                return Answer(DONE, {"x_hat": model.decode(given, scheme, shape)})
            if case.operation == "stream":
                row = int(given["row"].item())
                return Answer(DONE, model.stream(given["x"], scheme, given["steps"], row))
            decoded = []
            for side in ("keys", "values"):
                parts, shape, own = stored_side(case, side)
                decoded.append(model.decode(parts, own, shape))
            wide = given["query"].astype(np.float64)
            output = model.attend(wide, *decoded, attention_options(given))
            return Answer(DONE, {"output": output.astype(np.float32)})
    except ValueError:  # a code beyond the range, which packing refuses
        return None


def shows(case: Case, right: Answer, mistake: Mistake) -> bool:
    """Whether a port with the mistake is found wrong in a case that is answered."""
    given = answered(reference_with(mistake.name), case)
    if given is None:
        return True
    same = all(
        np.asarray(part).tobytes() == np.asarray(given.arrays.get(name)).tobytes()
        for name, part in right.arrays.items()
    )
    return not same and bool(judge(case, given).findings)

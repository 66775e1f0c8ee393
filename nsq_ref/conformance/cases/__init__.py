"""Engineered cases for any scheme: data on which each decision of the specification shows.

Random data certifies nothing here: a wrong rounding agrees with the right one nearly everywhere.
So cases lie on ties, next to ties, and at the ends of every range, and where that cannot be
computed, they are picked from a pool: those on which a known wrong arithmetic gives other bytes.

All draws come from `pools.Draw` and from operations that every platform rounds alike, so that each
version of NumPy makes the same cases, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nsq_ref.conformance.cases.attend import attend_cases
from nsq_ref.conformance.cases.decode import decode_cases
from nsq_ref.conformance.cases.encode import encode_cases
from nsq_ref.conformance.cases.feedback import feedback_cases
from nsq_ref.conformance.cases.stream import stream_cases
from nsq_ref.conformance.cases.stream_feedback import stream_feedback_cases
from nsq_ref.conformance.family import family_scheme
from nsq_ref.conformance.operations import CASE_DTYPES, USUAL, Case
from nsq_ref.environment import in_default_environment
from nsq_ref.scheme import Scheme

__all__ = ["cases", "require_size"]

# Cases are as long as blocks and sinks and as wide as outliers, and are made in pools of hundreds.
MOST = {"block_size": 4096, "sink_tokens": 256, "outlier_channels": 256}


@in_default_environment
def cases(
    scheme: Scheme | str,
    operations: Sequence[str] = USUAL,
    seed: int = 0,
    dtypes: Sequence[str] = CASE_DTYPES,
    *,
    quick: bool = False,
) -> list[Case]:
    """Return the cases of one scheme.

    Parameters
    ----------
    scheme : Scheme or str
        A name is one of `family.FAMILY`.
    operations : sequence of str
        Of `operations.OPERATIONS`; by default those without key feedback, which not all ports have.
    seed : int
        Of what is drawn; what is computed is the same for all.
    dtypes : sequence of {"float32", "float16", "bfloat16"}
        Of the inputs. Cases of other dtypes are left out, and the others keep their ids.
    quick : bool
        Only the first case of a kind, and none that must be looked for.

    Returns
    -------
    list of Case

    Raises
    ------
    ValueError
        For a scheme with more sinks, outliers or tokens in a block than cases are made for.

    Examples
    --------
    >>> cases("nsep+pchan4", ["encode"])[0]
    Case(encode ordinary/0)
    """
    scheme = family_scheme("scheme", scheme)
    require_size(scheme)
    made: list[Case] = []
    with np.errstate(all="ignore"):  # what overflows is refused, or is to be
        from_encoded = set(operations) & set(USUAL) - {"attend"}
        encoded = list(encode_cases(scheme, seed, quick)) if from_encoded else []
        if "encode" in operations:
            made += encoded
        if "decode" in operations:
            made += decode_cases(encoded, scheme, seed, quick)
        if "attend" in operations:
            made += attend_cases(scheme, seed)
        if "stream" in operations:
            made += stream_cases(encoded, scheme, seed)
        if "feedback" in operations:
            made += feedback_cases(scheme, seed, quick)
        if "stream_feedback" in operations:
            made += stream_feedback_cases(scheme, seed)
    if quick:
        kinds = {(case.operation, case.flags[0], input_dtype(case)): case for case in made[::-1]}
        made = list(kinds.values())[::-1]
    return [case for case in made if input_dtype(case) in (None, *dtypes)]


def require_size(scheme: Scheme) -> None:
    """Refuse a scheme with more sinks, outliers or tokens in a block than cases are made for.

    Examples
    --------
    >>> require_size(Scheme(block_size=2**40))
    Traceback (most recent call last):
    ValueError: block_size=1099511627776 is more than cases are made for; check with at most 4096
    """
    for name, most in MOST.items():
        if (number := getattr(scheme, name) or 0) > most:
            raise ValueError(
                f"{name}={number} is more than cases are made for; check with at most {most}"
            )


def input_dtype(case: Case) -> str | None:
    """Return the dtype of what is coded or kept as it came; None where nothing tells of it.

    Examples
    --------
    >>> made = cases("naive4", ["encode", "decode"])
    >>> [input_dtype(made[i]) for i in (0, -1)]
    ['float32', None]
    """
    for name in ("x", "sinks"):
        if name in case.inputs:
            return str(case.inputs[name].dtype.name)
    return None

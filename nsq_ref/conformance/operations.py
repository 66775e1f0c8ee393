"""What a port is asked and what it answers, whichever way it is reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from nsq_ref.conformance.frames import Frame, scheme_array
from nsq_ref.scheme import Scheme

__all__ = ["OPERATIONS", "Answer", "Case", "Failure", "Port", "attention_options", "request_of"]

Array = npt.NDArray[Any]
Operation = Literal["encode", "decode", "attend", "stream"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
DONE, REFUSED, NOT_IMPLEMENTED, FAILED = range(4)  # the status of an answer


@dataclass(frozen=True, eq=False)
class Case:
    """One question to a port, and why it is asked.

    Parameters
    ----------
    id : str
        Such as ``exact-tie/3``; unique for one scheme and operation.
    operation : {"encode", "decode", "attend", "stream"}
    scheme : Scheme
        For ``attend``, that of the keys.
    flags : tuple of str
        Names in `cases.FLAGS`: why the case exists, the chief reason first.
    inputs : mapping of str to array
        What the port receives besides the scheme. ``encode``: ``x [..., T, D]``. ``decode``: the
        stored parts and ``shape``, that of ``x``. ``attend``: ``query [heads, queries, D]``, the
        parts as ``keys.packed`` and so on with their ``keys.shape [kv_heads, T, D]``, the same of
        ``values``, ``value_scheme``, ``scale``, ``causal``, ``softcap`` and ``sliding_window`` (0
        for none). ``stream``: ``x [rows, T, D]``, ``steps [steps, 1 + rows]``, ``row``.
    refused_by : str or None
        The rule by which the port must refuse it.
    """

    id: str
    operation: Operation
    scheme: Scheme
    flags: tuple[str, ...]
    inputs: Mapping[str, Array]
    refused_by: str | None = None

    def __repr__(self) -> str:
        return f"Case({self.operation} {self.id})"


@dataclass(frozen=True, eq=False)
class Answer:
    """The arrays that a port returned, or that it refused or does not implement the question."""

    status: int
    arrays: Mapping[str, Array]
    message: str = ""


@dataclass(frozen=True)
class Failure:
    """A port that gave no answer.

    Parameters
    ----------
    kind : str
        ``"hang"``, ``"crash"``, ``"garbage"``, ``"out of bounds"`` or ``"missing"``.
    message : str
        What was seen, for the reader of the report.
    """

    kind: Literal["hang", "crash", "garbage", "out of bounds", "missing"]
    message: str


class Port(Protocol):
    """An implementation under test."""

    name: str

    def ask(self, number: int, case: Case) -> Answer | Failure:
        """Return what the implementation makes of a case; ``number`` counts the cases of a run."""
        ...  # pragma: no cover

    def close(self) -> None:
        """Let go of processes and files."""
        ...  # pragma: no cover


def request_of(number: int, case: Case) -> Frame:
    """Return the frame that asks a case.

    Examples
    --------
    >>> import numpy as np
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> list(request_of(0, case))
    ['case', 'operation', 'scheme', 'x']
    """
    return {
        "case": np.array([number], np.int32),
        "operation": np.array([OPERATIONS.index(case.operation)], np.int32),
        "scheme": scheme_array(case.scheme),
        **case.inputs,
    }


def attention_options(inputs: Mapping[str, Array]) -> dict[str, Any]:
    """Return the inputs of an ``attend`` case as the options of `attention.attend`.

    Examples
    --------
    >>> import numpy as np
    >>> names = ("scale", "causal", "softcap", "sliding_window")
    >>> attention_options(dict(zip(names, np.float32([[0.5], [1], [0], [0]]))))
    {'scale': 0.5, 'causal': True, 'softcap': None, 'sliding_window': None}
    """
    return {
        "scale": float(inputs["scale"].item()),
        "causal": bool(inputs["causal"].item()),
        "softcap": float(inputs["softcap"].item()) or None,
        "sliding_window": int(inputs["sliding_window"].item()) or None,
    }

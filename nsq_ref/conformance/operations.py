"""What a port is asked and what it answers, whichever way it is reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from nsq_ref.conformance.recipes import Recipe
from nsq_ref.dtypes import FLOAT_DTYPES, Array
from nsq_ref.scheme import Scheme

Operation = Literal["encode", "decode", "attend", "stream", "feedback", "stream_feedback"]
FailureKind = Literal["hang", "crash", "garbage", "out of bounds", "missing", "not asked"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
# Asked of those who say that they have it.
OPTIONAL: tuple[Operation, ...] = ("feedback", "stream_feedback")
USUAL = tuple(name for name in OPERATIONS if name not in OPTIONAL)
CASE_DTYPES = ("float32", "float16", "bfloat16")  # of x in a case
DONE, REFUSED, NOT_IMPLEMENTED, FAILED = range(4)  # the status of an answer


@dataclass(frozen=True, eq=False)
class Case:
    """One question to a port, and why it is asked.

    Parameters
    ----------
    id : str
        Such as ``exact-tie/3``; unique for one scheme and operation.
    operation : {"encode", "decode", "attend", "stream", "feedback", "stream_feedback"}
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
        ``feedback`` is ``encode`` under rule F1: ``x [..., T, D]``, ``order [kv_heads, D]``,
        ``factor [kv_heads, D, D]``; kv_heads is 1, or the axis of x before the tokens.
        ``stream_feedback`` is ``stream`` with the same, each row being a head, or all of one.
    refused_by : str or None
        The rule by which the port must refuse it.
    recipe : Recipe or None
        How ``x`` was made, where it is large: files hold the recipe in its place.
    """

    id: str
    operation: Operation
    scheme: Scheme
    flags: tuple[str, ...]
    inputs: Mapping[str, Array]
    refused_by: str | None = None
    recipe: Recipe | None = None

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
    """A port that gave no answer."""

    kind: FailureKind
    message: str  # what was seen, for the reader of the report


class TargetError(ValueError):
    """What is to be checked cannot be loaded."""


class Port(Protocol):
    """An implementation under test."""

    name: str

    def ask(self, number: int, case: Case) -> Answer | Failure:
        """Return what the implementation makes of a case; ``number`` counts the cases of a run."""
        ...  # pragma: no cover

    def close(self) -> None:
        """Let go of processes and files; most ports hold none."""
        return None


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


def same_arrays(some: Mapping[str, Array], others: Mapping[str, Array]) -> bool:
    """Return whether names, dtypes, shapes and bytes are the same.

    Examples
    --------
    >>> import numpy as np
    >>> same_arrays({"x": np.float32([0.0])}, {"x": np.float32([-0.0])})
    False
    """
    return list(some) == list(others) and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in zip(some.values(), others.values(), strict=True)
    )


def stored_side(case: Case, side: str) -> tuple[dict[str, Any], tuple[int, ...], Scheme]:
    """Return the parts, the shape and the scheme of the ``keys`` or the ``values`` of a case.

    Examples
    --------
    >>> import numpy as np
    >>> inputs = {"keys.packed": np.zeros((1, 2, 3), np.uint8), "keys.shape": np.int32([1, 2, 6])}
    >>> parts, shape, scheme = stored_side(Case("", "attend", Scheme(), (), inputs), "keys")
    >>> list(parts), shape, scheme == Scheme()
    (['packed'], (1, 2, 6), True)
    """
    parts = {
        name.removeprefix(f"{side}."): array
        for name, array in case.inputs.items()
        if name.startswith(f"{side}.")
    }
    shape = tuple(parts.pop("shape").tolist())
    return parts, shape, case.scheme if side == "keys" else scheme_of(case.inputs["value_scheme"])


# --- numbers ------------------------------------------------------------------------------------

MOST_NUMBER = 2**31 - 1  # of a scheme

# The number of a dtype, in frames, in schemes and in nsq.h.
DTYPES: tuple[np.dtype[Any], ...] = (
    *(FLOAT_DTYPES[name] for name in CASE_DTYPES), np.dtype(np.uint8), np.dtype(np.int32),
)  # fmt: skip

# The order of a scheme's numbers, and of the words that some of them stand for.
_WORDS: dict[str, tuple[Any, ...]] = {
    "bits": (),
    "separate_norm": (False, True),
    "axis": ("channel", "token"),
    "symmetric": (False, True),
    "scale_rule": ("range", "search"),
    "norm_rule": ("plain", "balanced"),
    "magnitude": ("norm", "gain", "lsq"),
    "block_size": (),
    "sink_tokens": (),
    "outlier_channels": (),
    "scale_dtype": CASE_DTYPES,
    "norm_dtype": CASE_DTYPES,
}


def scheme_array(scheme: Scheme) -> npt.NDArray[np.int32]:
    """Return a scheme as the twelve numbers that frames and ``nsq.h`` carry, which are int32.

    Examples
    --------
    >>> scheme_array(Scheme(bits=3, magnitude="lsq", block_size=128)).tolist()
    [3, 1, 0, 1, 0, 0, 2, 128, 0, 0, 1, 1]
    """
    numbers = []
    for name, value in scheme.to_dict().items():
        words = _WORDS[name]
        number = words.index(value) if words else value or 0
        if number > MOST_NUMBER:
            raise ValueError(
                f"{name}={number} does not fit the int32 in which frames and nsq.h hold it; give "
                f"at most {MOST_NUMBER}"
            )
        numbers.append(number)
    return np.array(numbers, np.int32)


def scheme_of(numbers: Array) -> Scheme:
    """Return the scheme of twelve numbers; the inverse of `scheme_array`.

    Examples
    --------
    >>> scheme_of(scheme_array(Scheme(bits=3))) == Scheme(bits=3)
    True
    """
    if numbers.shape != (len(_WORDS),) or numbers.dtype != np.int32:
        raise ValueError(
            f"a scheme is int32 [{len(_WORDS)}], got {numbers.dtype} {list(numbers.shape)}"
        )
    fields: dict[str, Any] = {}
    for (name, words), number in zip(_WORDS.items(), numbers.tolist(), strict=True):
        if words and not 0 <= number < len(words):
            raise ValueError(f"{name} is {number} in the scheme; it is 0 to {len(words) - 1}")
        fields[name] = words[number] if words else number
    fields["block_size"] = fields["block_size"] or None
    return Scheme(**fields)

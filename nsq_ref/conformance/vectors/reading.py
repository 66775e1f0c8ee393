"""The shipped vectors, and how their arrays are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nsq_ref.conformance.operations import Case
from nsq_ref.dtypes import DTYPES, Array
from nsq_ref.scheme import Scheme

FORMAT_VERSION = 1
FOLDER = Path(__file__).parent / f"v{FORMAT_VERSION}"


@dataclass(frozen=True, eq=False)
class Vector:
    """A case and the exact answer to it.

    Nothing changes one, so that threads may share it.

    Parameters
    ----------
    case : Case
    expected : mapping of str to array
        What a port must return; empty where it must refuse.
    intermediates : mapping of str to array
        What leads there, stage by stage.
    """

    case: Case
    expected: Mapping[str, Array]
    intermediates: Mapping[str, Array]


def names() -> list[str]:
    """Return the names of the JSON files that are shipped, without their ending.

    Examples
    --------
    >>> "encode-nsep+pchan4" in names()
    True
    """
    return sorted(path.stem for path in FOLDER.glob("*-*.json"))


def load(name: str) -> list[Vector]:
    """Read the vectors of one scheme and operation.

    Parameters
    ----------
    name : str
        One of `names`.

    Returns
    -------
    list of Vector

    Raises
    ------
    ValueError
        For another name.

    Examples
    --------
    >>> vector = load("encode-nsep+pchan4")[0]
    >>> vector.case.operation, vector.expected["packed"].dtype
    ('encode', dtype('uint8'))
    """
    if name not in names():
        raise ValueError(f"name={name!r} is not one of {', '.join(names())}")
    file = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    scheme = Scheme.from_dict({k: v for k, v in file["scheme"].items() if k != "name"})
    vectors = []
    for one in file["cases"]:
        flags, inputs = tuple(one["flags"]), _arrays(one["inputs"])
        case = Case(one["id"], file["operation"], scheme, flags, inputs, one["refusedBy"])
        vectors.append(Vector(case, _arrays(one["expected"]), _arrays(one["intermediates"])))
    return vectors


def _arrays(objects: Mapping[str, Any]) -> dict[str, Array]:
    return {name: _array(one) for name, one in objects.items()}


def _array(one: Mapping[str, Any]) -> Array:
    dtype = DTYPES[one["dtype"]]
    bits = np.frombuffer(bytes.fromhex(one["data"]), f"<u{dtype.itemsize}")
    array: Array = bits.astype(f"=u{dtype.itemsize}").view(dtype).reshape(one["shape"])
    return array

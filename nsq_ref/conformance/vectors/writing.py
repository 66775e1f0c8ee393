"""How the vectors are written anew: chosen cases, and the exact answers to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from nsq_ref.conformance.cases import cases
from nsq_ref.conformance.cases.flags import FLAGS
from nsq_ref.conformance.family import FAMILY
from nsq_ref.conformance.operations import Case, Operation
from nsq_ref.conformance.vectors.exact import answer
from nsq_ref.conformance.vectors.reading import FOLDER, FORMAT_VERSION
from nsq_ref.dtypes import Array
from nsq_ref.files import atomic
from nsq_ref.scheme import SPEC_VERSION, Scheme

MANIFEST = "manifest.json"
STATIC = ("README.md", "schema.json")  # written by hand
MOST_ELEMENTS = 2048  # of an input; larger ones would be most of the files
MOST_ELEMENTS_ELSEWHERE = 128  # in schemes that are not in LARGE

SCHEMES: dict[str, Scheme] = {
    name: FAMILY[name]
    for name in (
        "nsep+pchan4", "nsep+pchan3", "nsep+pchan2", "nsep+pchan8", "naive4", "nsep4", "pchan4",
        "outlier4", "nsep+out4", "streaming4", "streaming3", "streaming2", "nsep+pchan4-gain",
        "nsep+pchan4-lsq", "nsep+pchan4-bfloat16", "nsep+pchan4-float32", "nsep+pchan4-asymmetric",
        "nsep+pchan4-search", "nsep+pchan4-balanced",
    )
}  # fmt: skip
# A decoder that is right on these is right on the others, which take no other way through it.
DECODED = (
    "nsep+pchan4", "nsep+pchan3", "nsep+pchan2", "nsep+pchan8", "naive4", "nsep+out4", "streaming4",
    "nsep+pchan4-gain", "nsep+pchan4-bfloat16", "nsep+pchan4-float32", "nsep+pchan4-asymmetric",
)  # fmt: skip
CHOSEN: dict[Operation, tuple[str, ...]] = {
    "encode": tuple(SCHEMES),
    "decode": DECODED,
    "attend": ("nsep+pchan4", "nsep+out4", "streaming4"),
    "stream": ("streaming4",),
    "feedback": ("nsep+pchan4", "nsep+out4", "streaming4", "nsep+pchan4-balanced"),
}
# Kinds that came later, and of which small cases are written only.
ADDED = (
    "tile-edge", "channel-tile", "sequences", "subnormal-norm", "largest-half", "range-precision",
    "sinks-in-pieces", "refused-step",
)  # fmt: skip
LEFT_OUT = ("long-attention", "kept-as-it-came")  # kinds of which none is written
LARGE = ("nsep+pchan4", "streaming4")
FULLEST = "nsep+pchan4"  # the one that is written in every dtype
LARGE_SHAPE = (2, 384, 64)


def content(file: str) -> bytes:
    """Return what a file of vectors holds, by the oracle.

    Parameters
    ----------
    file : str
        Such as ``encode-nsep+pchan4.json`` or ``large-streaming4.safetensors``.

    Raises
    ------
    ValueError
        For a name that is not of this kind.

    Examples
    --------
    >>> json.loads(content("encode-pchan4.json"))["specVersion"]
    'NSQ-1'
    """
    stem, _, ending = file.rpartition(".")
    kind, _, name = stem.partition("-")
    if name in LARGE and (kind, ending) == ("large", "safetensors"):
        return _large(name)
    if name in SCHEMES and kind in CHOSEN and ending == "json":
        return _json(kind, name)
    raise ValueError(f"file={file!r} is not a file of vectors; see the manifest for those")


def files() -> list[str]:
    """Return the names of all files of vectors, whether written or not.

    Examples
    --------
    >>> files()[-1]
    'large-streaming4.safetensors'
    """
    found = [
        f"{operation}-{name}.json"
        for operation in CHOSEN
        for name in SCHEMES
        if _cases(operation, name)
    ]
    return found + [f"large-{name}.safetensors" for name in LARGE]


def write(directory: str | Path, progress: Callable[[str], None] | None = None) -> None:
    """Write all vectors anew; ids are only ever added.

    Parameters
    ----------
    directory : str or path
        Created where it does not exist.
    progress : callable, optional
        Told the name of each file before it is computed.

    Raises
    ------
    ValueError
        Where the directory holds a case that would be dropped or changed. Nothing is written then.
    """
    target = Path(directory)
    contents = {}
    for file in files():
        if progress is not None:
            progress(file)
        contents[file] = content(file)
    _require_only_additions(target, contents)
    whole = {
        **contents,
        **{name: (FOLDER / name).read_bytes() for name in STATIC},
        MANIFEST: manifest(contents),
    }
    atomic.write(((target / file, data) for file, data in whole.items()), make_folders=True)


def manifest(contents: Mapping[str, bytes]) -> bytes:
    """Return the manifest of files of vectors.

    Parameters
    ----------
    contents : mapping of str to bytes

    Examples
    --------
    >>> sorted(json.loads(manifest({})))
    ['files', 'formatVersion', 'specVersion']
    """
    entries = [
        json.dumps(file)
        + ": "
        + json.dumps(
            {
                "sha256": hashlib.sha256(data).hexdigest(),
                "size": len(data),
                "numberOfCases": len(ids := list(_by_id(file, data))),
                "ids": ids,
            }
        )
        for file, data in contents.items()
    ]
    return _document({}, "files", entries, "{}")


def _json(operation: Operation, name: str) -> bytes:
    flags: dict[str, None] = {}
    lines = []
    for case in _cases(operation, name):
        exact = answer(case)
        flags.update(dict.fromkeys(case.flags))
        one = {
            "id": case.id,
            "flags": case.flags,
            "result": "refused" if exact.refused_by else "done",
            "refusedBy": case.refused_by,
            "inputs": _objects(case.inputs),
            "expected": _objects(exact.expected),
            "intermediates": _objects(exact.intermediates),
        }
        lines.append(json.dumps(one, separators=(",", ":")))
    notes = {
        flag: {
            "bugType": FLAGS[flag].bug_type,
            "rule": FLAGS[flag].rule,
            "description": FLAGS[flag].description,
        }
        for flag in sorted(flags)
    }
    head = {
        "operation": operation,
        "scheme": {"name": name, **SCHEMES[name].to_dict()},
        "numberOfCases": len(lines),
        "notes": notes,
    }
    return _document(head, "cases", lines, "[]")


def _document(head: Mapping[str, Any], last: str, lines: Iterable[str], brackets: str) -> bytes:
    """Return a JSON object of few lines; the last property has a line for each of its items."""
    versions = {"specVersion": SPEC_VERSION, "formatVersion": FORMAT_VERSION}
    first = [f"{json.dumps(k)}: {json.dumps(v)},\n" for k, v in {**versions, **head}.items()]
    text = ",\n".join(lines)
    return (
        "{\n" + "".join(first) + f'"{last}": {brackets[0]}\n{text}\n{brackets[1]}' + "\n}\n"
    ).encode()


def _objects(arrays: Mapping[str, Array]) -> dict[str, Any]:
    return {name: _object(array) for name, array in arrays.items()}


def _object(array: Array) -> dict[str, Any]:
    bits = np.ascontiguousarray(array).view(f"u{array.itemsize}")
    data = bits.astype(f"<u{array.itemsize}").tobytes().hex()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}


@cache
def _all_cases(name: str) -> list[Case]:
    return cases(SCHEMES[name], [one for one, names in CHOSEN.items() if name in names])


def _cases(operation: Operation, name: str) -> list[Case]:
    if name not in CHOSEN[operation]:
        return []
    return [
        case
        for case in _all_cases(name)
        if case.operation == operation
        and all(array.size <= _most(case, name) for array in case.inputs.values())
    ]


def _most(case: Case, name: str) -> int:
    """How many elements an input may have, for files to stay small."""
    number = int(case.id.rpartition("/")[2])
    in_other_dtypes = number >= (1000 if case.operation == "decode" else 100)
    small = name not in LARGE or case.operation == "feedback" or case.flags[0] in ADDED
    fullest = name == FULLEST and case.operation != "feedback"  # which widens them as encode does
    if case.flags[0] in LEFT_OUT or (in_other_dtypes and not fullest):
        return 0
    if in_other_dtypes:
        return MOST_ELEMENTS_ELSEWHERE // 2
    if small:
        return MOST_ELEMENTS_ELSEWHERE
    return MOST_ELEMENTS


def _large(name: str) -> bytes:
    """A case too large for JSON: normal values, norms of a wide range, an outlier channel."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(LARGE_SHAPE) * 10.0 ** rng.uniform(-2, 2, (*LARGE_SHAPE[:2], 1))
    x[..., 3] *= 30
    case = Case("large/0", "encode", SCHEMES[name], (), {"x": x.astype(np.float16)})
    exact = answer(case)
    arrays = {**case.inputs, **exact.expected, "x_hat": exact.intermediates["x_hat"]}
    description = {
        "specVersion": SPEC_VERSION,
        "formatVersion": FORMAT_VERSION,
        "id": case.id,
        "scheme": {"name": name, **case.scheme.to_dict()},
    }
    # `save` takes memory as it lies, and writes several entries of metadata in any order.
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return bytes(save(arrays, {"nsq_vector": json.dumps(description)}))


def _by_id(file: str, data: bytes) -> dict[str, Any]:
    """Return what a file says of each id, and of which scheme."""
    if file.endswith(".json"):
        parsed = json.loads(data)
        return {case["id"]: (parsed["scheme"], case) for case in parsed["cases"]}
    size = int.from_bytes(data[:8], "little")
    description = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["nsq_vector"])
    return {description["id"]: data}


def _require_only_additions(target: Path, contents: Mapping[str, bytes]) -> None:
    if not (target / MANIFEST).exists():
        return
    lost = []
    for file in json.loads((target / MANIFEST).read_bytes())["files"]:
        before = _by_id(file, (target / file).read_bytes())
        now = _by_id(file, contents[file]) if file in contents else {}
        lost += [f"{file}: {one}" for one, case in before.items() if now.get(one) != case]
    if lost:
        raise ValueError(
            f"{len(lost)} cases in {target} would be dropped or changed, the first is {lost[0]}; "
            "ids are only ever added: give a changed case a new id, or empty the folder if its "
            "vectors were never released"
        )

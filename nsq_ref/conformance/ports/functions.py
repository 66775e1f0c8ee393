"""Python functions, called in this process."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nsq_ref.arrays import as_array
from nsq_ref.codec import PARTS
from nsq_ref.conformance.operations import (
    DONE,
    DTYPES,
    NOT_IMPLEMENTED,
    REFUSED,
    Answer,
    Case,
    Failure,
    Port,
    TargetError,
    attention_options,
    stored_side,
)
from nsq_ref.conformance.ports.frames import MOST_AXES, MOST_BYTES
from nsq_ref.dtypes import Array
from nsq_ref.feedback import Feedback

_RESULTS = {"decode": "x_hat", "attend": "output"}  # operations that return one array


class Callables(Port):
    """Python functions in this process.

    Threads may share one if they may share the functions.

    Parameters
    ----------
    name : str
    encode : callable, optional
        ``encode(x, scheme)`` returns the parts: a mapping of names to arrays, a `Quantized`, or any
        object with attributes of these names.
    decode : callable, optional
        ``decode(parts, scheme, shape)`` returns ``x_hat``.
    attend : callable, optional
        ``attend(query, keys, values, key_scheme, value_scheme, *, scale, causal, softcap,
        sliding_window)`` returns the output; keys and values are mappings of the parts and
        ``"shape"``.
    feedback : callable, optional
        ``feedback(x, scheme, *, feedback)`` returns the parts of keys encoded with a `Feedback`.
    stream : callable, optional
        ``stream(x, scheme, steps, row)`` returns, as ``encode`` does, the parts of the sealed
        blocks, the sinks and the ``tail`` of one row.
    stream_feedback : callable, optional
        ``stream_feedback(x, scheme, steps, row, *, feedback)`` returns the same of keys that are
        sealed with a `Feedback`.

    Notes
    -----
    Arrays may be NumPy's or whatever speaks DLPack. ValueError and OverflowError refuse a case,
    NotImplementedError leaves it out; other exceptions are not caught.

    Examples
    --------
    >>> import numpy as np
    >>> from nsq_ref import Scheme, quantize
    >>> case = Case("ones/0", "encode", Scheme(), ("ordinary",), {"x": np.ones((2, 3), np.float32)})
    >>> answer = Callables("nsq", encode=quantize).ask(0, case)
    >>> answer.status == DONE, list(answer.arrays)
    (True, ['packed', 'scale', 'norm'])
    """

    def __init__(
        self,
        name: str,
        encode: Callable[..., Any] | None = None,
        decode: Callable[..., Any] | None = None,
        attend: Callable[..., Any] | None = None,
        stream: Callable[..., Any] | None = None,
        feedback: Callable[..., Any] | None = None,
        stream_feedback: Callable[..., Any] | None = None,
    ) -> None:
        self.name = name
        self._functions = {
            "encode": encode, "decode": decode, "attend": attend, "stream": stream,
            "feedback": feedback, "stream_feedback": stream_feedback,
        }  # fmt: skip

    def ask(self, number: int, case: Case) -> Answer | Failure:
        """Call the function of the case's operation."""
        function = self._functions[case.operation]
        if function is None:
            return Answer(NOT_IMPLEMENTED, {}, f"no function for {case.operation} was given")
        given = {name: np.array(array) for name, array in case.inputs.items()}
        positional, named = _arguments(case, given)
        try:
            result = function(*positional, **named)
        except (ValueError, OverflowError) as error:
            return Answer(REFUSED, {}, f"{error} ({_origin(error)})")
        except NotImplementedError as error:
            return Answer(NOT_IMPLEMENTED, {}, str(error))
        for name, array in given.items():
            if array.tobytes() != case.inputs[name].tobytes():
                return Failure("out of bounds", f"{name} was written to; it is the caller's")
        return _answer(result, case)


def _origin(error: Exception) -> str:
    """Say where an error was raised: one that nobody meant reads as a refusal, too."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{type(error).__name__}, {Path(frame.f_code.co_filename).name} line {line}"


def _arguments(case: Case, given: Mapping[str, Array]) -> tuple[list[Any], dict[str, Any]]:
    """Return the positional and the named arguments of a function of the case's operation."""
    if case.operation == "encode":
        return [given["x"], case.scheme], {}
    named: dict[str, Any] = {}
    if "order" in given:
        named["feedback"] = Feedback(given["order"], given["factor"])
    if case.operation == "feedback":
        return [given["x"], case.scheme], named
    if case.operation == "decode":
        stored = dict(given)
        shape = tuple(stored.pop("shape").tolist())
        return [stored, case.scheme, shape], {}
    if case.operation in ("stream", "stream_feedback"):
        return [given["x"], case.scheme, given["steps"], given["row"].item()], named
    copied = replace(case, inputs=given)
    sides, schemes = [], []
    for side in ("keys", "values"):
        parts, shape, scheme = stored_side(copied, side)
        sides.append({**parts, "shape": shape})
        schemes.append(scheme)
    return [given["query"], *sides, *schemes], attention_options(given)


def _answer(result: Any, case: Case) -> Answer | Failure:
    """Turn what a function returned into an answer."""
    operation = case.operation
    names: tuple[str, ...] = (*PARTS, "tail") if operation.startswith("stream") else PARTS
    if operation in _RESULTS:
        names = (_RESULTS[operation],)
        result = {_RESULTS[operation]: result}
    elif not isinstance(result, Mapping):
        named = {name: getattr(result, name) for name in names if hasattr(result, name)}
        result = named or result
    said = f"{operation} returned"
    if not isinstance(result, Mapping) or not result:
        kind = type(result).__name__
        return Failure(
            "garbage", f"{said} {kind}; return a mapping of the names of parts to arrays"
        )
    arrays = {}
    for name, value in result.items():
        if name not in names:
            parts = ", ".join(names)
            return Failure("garbage", f"{said} a part {name!r:.40}; the parts are {parts}")
        if value is None and operation not in _RESULTS:
            continue
        try:
            array = as_array(name, value)
        except TypeError as error:
            return Failure("garbage", str(error))
        got = f"{name} is {array.dtype} {list(array.shape)}"
        if array.dtype not in DTYPES or array.ndim > MOST_AXES:
            return Failure("garbage", f"{got}; {_expected(name, case)}")
        if array.nbytes > MOST_BYTES:
            return Failure("garbage", f"{got}, more than the {MOST_BYTES} bytes of any answer")
        arrays[name] = np.array(array)
    return Answer(DONE, arrays)


def _expected(name: str, case: Case) -> str:
    """Say of what dtype a returned array should be."""
    if name in _RESULTS.values():
        return "it should be float32"
    x = case.inputs["x"]
    layout = case.scheme.layout(x.shape[-2], x.shape[-1], x.dtype)
    if name == "tail":
        return f"it should be {x.dtype}, as x is"
    return f"the scheme stores {layout[name].dtype if name in layout else 'no such part'}"


# --- signatures ---------------------------------------------------------------------------------

_CALLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "encode": (("x", "scheme"), ()),
    "decode": (("parts", "scheme", "shape"), ()),
    "attend": (
        ("query", "keys", "values", "key_scheme", "value_scheme"),
        ("scale", "causal", "softcap", "sliding_window"),
    ),
    "stream": (("x", "scheme", "steps", "row"), ()),
    "feedback": (("x", "scheme"), ("feedback",)),
    "stream_feedback": (("x", "scheme", "steps", "row"), ("feedback",)),
}


def require_signature(operation: str, function: Callable[..., Any], name: str) -> None:
    """Refuse a function that cannot be called as its operation is; TypeError says how it is.

    Examples
    --------
    >>> require_signature("encode", lambda x: x, "mine:encode")
    Traceback (most recent call last):
    TypeError: mine:encode takes (x); it is called as encode(x, scheme): too many ...
    """
    positional, named = _CALLS[operation]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of what is built in nothing is known
        return
    try:
        signature.bind(*positional, **dict.fromkeys(named))
    except TypeError as error:
        how = ", ".join([*positional, *(["*", *named] if named else [])])
        raise TypeError(
            f"{name} takes {signature}; it is called as {operation}({how}): {error}"
        ) from None


# --- by name ------------------------------------------------------------------------------------


def function_named(target: str) -> Callable[..., Any]:
    """Import the function that ``package.module:function`` or ``file.py:function`` names."""
    origin, _, name = target.rpartition(":")
    try:
        if origin.endswith(".py"):
            found: Any = _module(Path(origin).resolve())
        else:
            sys.path.insert(0, os.getcwd())
            found = importlib.import_module(origin)
    except (ImportError, SyntaxError) as error:
        raise TargetError(
            f"{origin} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise TargetError(f"{origin} has no {name}; {target} should name a function in it")
        found = getattr(found, part)
    if not callable(found):
        raise TargetError(f"{target} is {type(found).__name__}, which cannot be called")
    function: Callable[..., Any] = found
    return function


def _module(path: Path) -> Any:
    """Import a file as a script's neighbours are imported: its directory comes first."""
    sys.path.insert(0, str(path.parent))
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) != str(path):
        name = f"{name} of the port"  # a file may be named as what others import
        known = sys.modules.get(name)
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

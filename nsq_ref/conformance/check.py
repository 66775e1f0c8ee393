"""Ask a port all cases, judge the answers, and say what is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nsq_ref.arrays import as_integer
from nsq_ref.conformance.cases import cases
from nsq_ref.conformance.family import family_scheme
from nsq_ref.conformance.findings import Report
from nsq_ref.conformance.judge import Latitudes
from nsq_ref.conformance.known import KnownLine, read_known, reasons_of
from nsq_ref.conformance.operations import CASE_DTYPES, OPERATIONS, USUAL, Case, Operation, Port
from nsq_ref.conformance.ports import Callables, Folder, Stream
from nsq_ref.conformance.ports.functions import require_signature
from nsq_ref.conformance.session import Progress, Session
from nsq_ref.scheme import Scheme

REQUIRABLE = (*OPERATIONS, *CASE_DTYPES)


def check(
    encode: Callable[..., Any] | None = None,
    decode: Callable[..., Any] | None = None,
    attend: Callable[..., Any] | None = None,
    stream: Callable[..., Any] | None = None,
    feedback: Callable[..., Any] | None = None,
    stream_feedback: Callable[..., Any] | None = None,
    *,
    scheme: Scheme | str = "nsep+pchan4",
    seed: int = 0,
    latitudes: Sequence[str] = (),
    dtypes: Sequence[str] = CASE_DTYPES,
    partial: bool = False,
    quick: bool = False,
    require: Sequence[str] = (),
    known: str | Path | None = None,
) -> Report:
    """Check Python callables in this process, as ``nsq check`` does in one of their own.

    Parameters
    ----------
    encode : callable, optional
        ``encode(x, scheme)`` returns a mapping of part name to array, or a `Quantized`.
    decode : callable, optional
        ``decode(parts, scheme, shape)`` returns ``x_hat``.
    attend : callable, optional
        ``attend(query, keys, values, key_scheme, value_scheme, *, scale, causal, softcap,
        sliding_window)`` returns the output.
    stream : callable, optional
        ``stream(x, scheme, steps, row)`` returns what a cache stores.
    feedback : callable, optional
        ``feedback(x, scheme, *, feedback)`` returns, as ``encode`` does, keys encoded with a
        `Feedback`, which has ``order`` and ``factor`` (F1). It may be the function that encodes.
    stream_feedback : callable, optional
        ``stream_feedback(x, scheme, steps, row, *, feedback)`` returns what a cache of such keys
        stores. It may be the function that streams.
    scheme : Scheme or str
        A name is one of the paper's, or that of a variant such as ``nsep+pchan4-gain``.
    seed : int
        Of the drawn cases; 0 are those of the shipped vectors.
    latitudes : sequence of str
        Such as ``"norm-ulp=1"``; none by default.
    dtypes : sequence of str
        Dtypes of the input.
    partial : bool
        Let pass what the port says it does not implement.
    quick : bool
        Ask one case of a kind, and none that must be looked for.
    require : sequence of str
        Operations and dtypes of input without which nothing conforms.
    known : path, optional
        A file of known deviations, as `nsq_ref.conformance.known` describes it.

    Returns
    -------
    Report
        ``report.conforms``; `nsq_ref.conformance.as_text` shows it.

    Raises
    ------
    OSError
        For a file of deviations that cannot be read.
    TypeError
        For a scheme, a seed, latitudes or dtypes of another kind, and for a function that cannot be
        called as its operation is.
    ValueError
        For an unknown scheme, latitude or dtype, for a deviation that names no case, and where
        there is nothing to check.

    Examples
    --------
    >>> import nsq_ref as nsq
    >>> check(nsq.quantize, feedback=nsq.quantize, scheme="naive4").conforms
    True
    >>> report = check(lambda x, scheme: nsq.quantize(abs(x), scheme), scheme="nsep4", quick=True)
    >>> report.conforms
    False
    """
    given: dict[Operation, Callable[..., Any] | None] = {
        "encode": encode, "decode": decode, "attend": attend, "stream": stream,
        "feedback": feedback, "stream_feedback": stream_feedback,
    }  # fmt: skip
    operations = [name for name, function in given.items() if function is not None]
    if not operations:
        raise ValueError(f"there is nothing to check; pass one or more of {', '.join(given)}")
    chosen = family_scheme("scheme", scheme)
    for operation, function in given.items():
        if function is not None:
            require_signature(operation, function, operation)
    port = Callables("callables", **given)
    name = scheme if isinstance(scheme, str) else "scheme"
    return run(
        port, [(name, chosen)], operations, seed=seed, latitudes=latitudes, dtypes=dtypes,
        partial=partial, quick=quick, require=require,
        known=() if known is None else read_known(known),
    )  # fmt: skip


def run(
    port: Port,
    schemes: Sequence[tuple[str, Scheme]],
    operations: Sequence[Operation] = USUAL,
    *,
    required: Sequence[Operation] | None = None,
    seed: int = 0,
    latitudes: Sequence[str] = (),
    dtypes: Sequence[str] = CASE_DTYPES,
    partial: bool = False,
    refusals: bool = True,
    chosen: Sequence[str] | None = None,
    only: str | None = None,
    command: str = "",
    progress: Progress | None = None,
    quick: bool = False,
    require: Sequence[str] = (),
    known: Sequence[KnownLine] = (),
) -> Report:
    """Ask a port all cases of some schemes, and judge it.

    Parameters
    ----------
    port : Port
        Not closed.
    schemes : sequence of (str, Scheme)
        With the names that the report is to use.
    operations : sequence of str
    required : sequence of str, optional
        Operations that the port must implement; all by default. Another one that it implements
        in no case is noted, not failed.
    seed, latitudes, dtypes, partial, quick, require
        As `check` takes them.
    known : sequence of KnownLine
        Cases that fail, and why.
    refusals : bool
        Ask what must be refused, too; an ONNX graph cannot refuse.
    chosen : sequence of str, optional
        Names of the schemes that are asked, all by default. The cases of the others count all the
        same: answers that were given already are to numbers that stay.
    only : str, optional
        One case, as ``encode/exact-tie/3``.
    command : str
        What repeats the run, for the report.
    progress : callable, optional
        Told what is done, how many steps are done and how many there are.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        For an unknown latitude, dtype, scheme or case, and for a deviation that names no case.

    Examples
    --------
    >>> from nsq_ref.conformance import model
    >>> port = Callables("model", encode=model.encode, decode=model.decode)
    >>> report = run(port, [("naive2", Scheme.named("naive2"))], ["decode"])
    >>> report.conforms
    True
    """
    seed = as_integer("seed", seed, least=0)
    latitudes, dtypes = _names("latitudes", latitudes), _names("dtypes", dtypes)
    require = _names("require", require)
    allowed = Latitudes.parse(latitudes)
    unknown = [dtype for dtype in dtypes if dtype not in CASE_DTYPES]
    if unknown or not dtypes:
        raise ValueError(f"dtypes={list(dtypes)} are not some of {', '.join(CASE_DTYPES)}")
    for name in require:
        if name not in REQUIRABLE:
            raise ValueError(f"require={name!r} is not one of {', '.join(REQUIRABLE)}")
    asked_of = [name for name, _ in schemes if chosen is None or name in chosen]
    absent = set(chosen or ()) - set(asked_of)
    if absent:
        about = ", ".join(name for name, _ in schemes)
        raise ValueError(f"there are no questions about {', '.join(absent)}, but about {about}")
    questions: list[tuple[str, Scheme, list[tuple[int, Case]]]] = []
    notes, number = [], 0
    for name, scheme in schemes:
        if len(questions) == len(asked_of):
            break
        made = cases(scheme, operations, seed, dtypes, **({"quick": True} if quick else {}))
        numbered = list(enumerate(made, number))
        number += len(numbered)
        if name not in asked_of:
            continue
        selected = [
            (at, case)
            for at, case in numbered
            if only in (None, f"{case.operation}/{case.id}")
            and (refusals or case.refused_by is None)
        ]
        if only is not None and not selected:
            raise ValueError(_why_not(only, name, cases(scheme, OPERATIONS, seed)))
        questions.append((name, scheme, selected))
    else:
        if isinstance(port, Stream):
            port.cases = number
        if isinstance(port, Folder) and (others := port.beyond(number)):
            notes.append(f"not judged: {others[0]}, which answers no case; there are {len(others)}")
    absent_dtypes = [dtype for dtype in CASE_DTYPES if dtype not in dtypes]
    left_out = [f"{' and '.join(absent_dtypes)} input"] if absent_dtypes else []
    left_out += [] if refusals else ["input that must be refused, as a graph cannot refuse"]
    left_out += ["all but a case of a kind, as this was a quick run"] if quick else []
    left_out += [] if only is None else [f"all cases but {only}"]
    whole = not left_out and set(operations) >= set(USUAL)
    asked_about = [(name, [case for _, case in some]) for name, _, some in questions]
    notes += _unused(known, asked_about, operations if whole else ())
    must = tuple(operations if required is None else required)
    must = tuple(name for name in OPERATIONS if name in (*must, *require))
    total, done = sum(len(selected) for *_, selected in questions), itertools.count()
    reports = []
    for name, scheme, selected in questions:
        session = Session(
            name, scheme, allowed, must, reasons_of(known, name, (case for _, case in selected)),
            repeats=not isinstance(port, Stream),
        )  # fmt: skip

        def told(operation: Operation, name: str = name) -> None:
            if progress:
                progress(f"{name}: {operation}", next(done), total)

        session.ask(port, selected, told)
        reports.append(session.report(progress))
    return Report(
        port.name, seed, latitudes, reports, partial, command, notes, left_out, require
    )  # fmt: skip


def _unused(
    known: Sequence[KnownLine],
    asked: Sequence[tuple[str, Sequence[Case]]],
    whole: Sequence[Operation],
) -> Iterator[str]:
    """Refuse lines about no case of the operations asked as a `whole`; count other unused ones."""
    unused = [
        line for line in known
        if not any(line.names(name, case) for name, of_it in asked for case in of_it)
    ]  # fmt: skip
    mistaken = [line for line in unused if line.family.partition("/")[0] in whole]
    if mistaken:
        about = ", ".join(name for name, _ in asked)
        raise ValueError(f"{mistaken[0].where} names no case of {about}")
    if unused:
        yield f"not judged: {len(unused)} of {len(known)} known deviations, as they were not asked"


def _names(name: str, given: Sequence[str]) -> tuple[str, ...]:
    """Take a sequence of names: of a single string, the letters would be taken."""
    if isinstance(given, str | bytes) or not all(isinstance(one, str) for one in given):
        raise TypeError(f"{name} must be a sequence of names, got {given!r:.80}")
    return tuple(given)


def _why_not(only: str, name: str, everything: Sequence[Case]) -> str:
    """Say why a case is not asked."""
    if only in (f"{case.operation}/{case.id}" for case in everything):
        return (
            f"case {only} of {name} is not among what is asked: it is about another operation or "
            "dtype, or must be refused, which a graph cannot"
        )
    return f"there is no case {only!r} of {name}; cases are named like encode/exact-tie/0"

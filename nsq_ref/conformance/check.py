"""Ask a port all cases, judge the answers, and say what is wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from nsq_ref.arrays import as_integer
from nsq_ref.conformance.cases import cases
from nsq_ref.conformance.family import family_scheme
from nsq_ref.conformance.findings import Explained, Finding, Report, SchemeReport
from nsq_ref.conformance.judge import Latitudes, judge
from nsq_ref.conformance.judge.diagnose import Judged, diagnose
from nsq_ref.conformance.operations import (
    CASE_DTYPES,
    NOT_IMPLEMENTED,
    OPERATIONS,
    Answer,
    Case,
    Failure,
    Operation,
    Port,
    same_arrays,
)
from nsq_ref.conformance.ports import Callables, Folder, Stream
from nsq_ref.scheme import Scheme

ASKED_AGAIN = 3  # cases of each operation
Progress = Callable[[str, int, int], None]


def check(
    encode: Callable[..., Any] | None = None,
    decode: Callable[..., Any] | None = None,
    attend: Callable[..., Any] | None = None,
    stream: Callable[..., Any] | None = None,
    *,
    scheme: Scheme | str = "nsep+pchan4",
    seed: int = 0,
    latitudes: Sequence[str] = (),
    dtypes: Sequence[str] = CASE_DTYPES,
    partial: bool = False,
    quick: bool = False,
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

    Returns
    -------
    Report
        ``report.conforms``; `nsq_ref.conformance.as_text` shows it.

    Raises
    ------
    TypeError
        For a scheme, a seed, latitudes or dtypes of another kind.
    ValueError
        For an unknown scheme, latitude or dtype, and where there is nothing to check.

    Examples
    --------
    >>> import nsq_ref as nsq
    >>> check(nsq.quantize, scheme="naive4").conforms
    True
    >>> report = check(lambda x, scheme: nsq.quantize(abs(x), scheme), scheme="nsep4", quick=True)
    >>> report.conforms
    False
    """
    given: dict[Operation, Callable[..., Any] | None] = {
        "encode": encode, "decode": decode, "attend": attend, "stream": stream,
    }  # fmt: skip
    operations = [name for name, function in given.items() if function is not None]
    if not operations:
        raise ValueError("there is nothing to check; pass encode, decode, attend or stream")
    chosen = family_scheme("scheme", scheme)
    port = Callables("callables", **given)
    name = scheme if isinstance(scheme, str) else "scheme"
    return run(
        port, [(name, chosen)], operations, seed=seed, latitudes=latitudes, dtypes=dtypes,
        partial=partial, quick=quick,
    )  # fmt: skip


def run(
    port: Port,
    schemes: Sequence[tuple[str, Scheme]],
    operations: Sequence[Operation] = OPERATIONS,
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
    seed, latitudes, dtypes, partial, quick
        As `check` takes them.
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
        For an unknown latitude, dtype, scheme or case.

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
    allowed = Latitudes.parse(latitudes)
    unknown = [dtype for dtype in dtypes if dtype not in CASE_DTYPES]
    if unknown or not dtypes:
        raise ValueError(f"dtypes={list(dtypes)} are not some of {', '.join(CASE_DTYPES)}")
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
    total = sum(len(selected) for *_, selected in questions)
    must = tuple(operations if required is None else required)
    reports, done = [], 0
    unclaimed: dict[Operation, list[str]] = defaultdict(list)
    if not refusals:
        notes.append("not asked: input that must be refused, as a graph cannot refuse")
    if left_out := [dtype for dtype in CASE_DTYPES if dtype not in dtypes]:
        notes.append(f"not asked: {' and '.join(left_out)} input")
    if quick:
        notes.append("not asked: all but a case of a kind, as this was a quick run")
    if only is not None:
        notes.append(f"not asked: all cases but {only}")
    for name, scheme, selected in questions:
        asked = []
        for at, case in selected:
            if progress:
                progress(f"{name}: {case.operation}", done, total)
            asked.append((case, port.ask(at, case)))
            done += 1
        again = [] if isinstance(port, Stream) else _asked_again(port, selected, asked)
        one, of_scheme = _scheme_report(name, scheme, asked, again, allowed, must, progress)
        reports.append(one)
        for operation in of_scheme:
            unclaimed[operation].append(name)
    for operation, names in unclaimed.items():
        where = "" if len(names) == len(questions) else f" for {', '.join(names)}"
        notes.append(f"{operation} is not implemented{where}")
    return Report(port.name, seed, latitudes, reports, partial, command, notes)


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


def _asked_again(
    port: Port,
    numbered: Sequence[tuple[int, Case]],
    asked: Sequence[tuple[Case, Answer | Failure]],
) -> list[Finding]:
    """Ask some cases once more: what a port keeps between calls must not show."""
    seen: Counter[str] = Counter()
    findings = []
    for (number, case), (_, answer) in zip(numbered, asked, strict=True):
        if not isinstance(answer, Answer) or answer.status == NOT_IMPLEMENTED:
            continue
        seen[case.operation] += 1
        if seen[case.operation] > ASKED_AGAIN:
            continue
        second = port.ask(number, case)
        if isinstance(second, Failure) and second.kind == "missing":
            continue  # a port that failed too often is not asked any more, which is told as that
        if (
            isinstance(second, Failure)
            or second.status != answer.status
            or not same_arrays(answer.arrays, second.arrays)
        ):
            what = "the same question got another answer later: something is kept between calls"
            findings.append(Finding(case, "again", "B2", what))
    return findings


def _scheme_report(
    name: str, scheme: Scheme, asked: Sequence[tuple[Case, Answer | Failure]],
    again: Sequence[Finding], latitudes: Latitudes, required: Sequence[Operation],
    progress: Progress | None,
) -> tuple[SchemeReport, list[Operation]]:  # fmt: skip
    judged: list[Judged] = []
    failures: list[tuple[Case, Failure]] = []
    missing: list[Case] = []
    reasons: dict[str, None] = {}
    explained: list[Explained] = []
    counts: Counter[str] = Counter()
    stages: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    repeated = {id(f.case): f for f in again}
    for case, answer in asked:
        if isinstance(answer, Failure):
            failures.append((case, answer))
        elif answer.status == NOT_IMPLEMENTED:
            missing.append(case)
            if answer.message:
                reasons[answer.message] = None
        else:
            verdict = judge(case, answer, latitudes)
            findings = verdict.findings
            if id(case) in repeated:
                findings = [repeated[id(case)], *findings]
                verdict.stages.insert(0, "again")
            judged.append(Judged(case, answer, findings))
            explained += verdict.explained
            counts[case.operation] += 1
            wrong = {f.stage for f in findings}
            for stage in verdict.stages:
                tally = stages[case.operation, stage]
                tally[0] += 1
                tally[1] += stage in wrong
    unclaimed: list[Operation] = []
    for operation in OPERATIONS:
        of_it = [case for case, _ in asked if case.operation == operation]
        refused = [case for case in missing if case.operation == operation]
        if of_it and len(of_it) == len(refused) and operation not in required:
            unclaimed.append(operation)
            missing = [case for case in missing if case.operation != operation]
    report = SchemeReport(
        name=name,
        scheme=scheme,
        judged=dict(counts),
        stages={key: (done, wrong) for key, (done, wrong) in stages.items()},
        diagnoses=diagnose(judged, latitudes, progress),
        explained=explained,
        failures=failures,
        not_implemented=missing,
        reasons=list(reasons) if missing else [],
        cases=[case for case, _ in asked],
    )
    return report, unclaimed

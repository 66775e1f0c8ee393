"""Reports for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nsq_ref.conformance.cases.flags import FLAGS
from nsq_ref.conformance.findings import Diagnosis, Explained, Finding, Report, SchemeReport
from nsq_ref.conformance.operations import OPERATIONS, Case
from nsq_ref.conformance.report.words import (
    axes_of,
    case_name,
    command_for,
    findings_of,
    printable,
)
from nsq_ref.conformance.rules import RULES
from nsq_ref.dtypes import Array
from nsq_ref.scheme import SPEC_VERSION

STYLES = {"bad": "1;31", "good": "1;32", "head": "1"}  # numbers of ANSI escapes
MOST_FAMILIES = 8  # of cases that one list names
MOST_ELEMENTS = 256  # of an input that is shown
ONCE = ("again", "refusal")  # stages of which one example tells enough
MOST_CHARACTERS = 500  # of one line of a port's message


class Line(NamedTuple):
    """A line before it is wrapped; a `whole` one is not wrapped, so that it can be copied."""

    text: str = ""
    indent: int = 0
    style: str = ""
    whole: bool = False


def as_text(report: Report, width: int = 100, color: bool = False) -> str:
    """Return a report for people.

    A report on a single case shows all that is known of it, its input included. Others show the
    clearest finding of each diagnosis and count the rest.

    Parameters
    ----------
    report : Report
    width : int
        At which lines are wrapped. Commands are not: they are there to be copied.
    color : bool
        Mark verdicts and headings with ANSI escapes.

    Returns
    -------
    str
        Of several lines, the last one ended.

    Examples
    --------
    >>> from nsq_ref import Scheme
    >>> one = SchemeReport("pchan4", Scheme.named("pchan4"), {"encode": 83}, {})
    >>> report = Report("./libmine.so", 0, (), [one], command="nsq check ./libmine.so")
    >>> print(as_text(report), end="")
    nsq check ./libmine.so
    NSQ-1, seed 0, latitudes: none
    <BLANKLINE>
    CONFORMS SO FAR to pchan4: encode 83 cases.
    Not asked: decode, attend, feedback.
    """
    return _render(_report_lines(report), width, color) + "\n"


def finding_text(finding: Finding, command: str = "") -> str:
    """Return one finding for people: rule, stage, index, what led to it, got and expected.

    ``command``, if it is given, shows just this case.

    Examples
    --------
    >>> import numpy as np
    >>> from nsq_ref import Scheme
    >>> case = Case("ties/3", "encode", Scheme(), ("tie",), {"x": np.ones((3, 6), np.float32)})
    >>> found = Finding(case, "codes", "Q1", "A code is wrong.", (2, 5), "3", "2", wrong=1, of=18)
    >>> print(finding_text(found))
    Q1  Round, then clamp  (docs/spec.md#codes)
        code = round_half_even((direction - zero) / scale)
    encode/ties/3, stage codes, at [token 2, channel 5]; 1 of 18 elements is wrong
      A code is wrong.
      got       3
      expected  2
    """
    lines = [*_rule_lines(finding.rule), *_finding_lines(finding)]
    if command:
        lines.append(Line(command, 2, whole=True))
    return _render(lines)


def _render(lines: Iterable[Line], width: int = 100, color: bool = False) -> str:
    rendered: list[str] = []
    for line in lines:
        text = printable(line.text).replace("\n", " ")
        room = max(width - line.indent, 40)
        pieces = [text] if line.whole else textwrap.wrap(text, room, break_on_hyphens=False)
        start, end = (
            (f"\x1b[{STYLES[line.style]}m", "\x1b[0m") if color and line.style else ("", "")
        )
        rendered += [f"{' ' * line.indent}{start}{piece}{end}" for piece in pieces or [""]]
    return "\n".join(rendered)


def _report_lines(report: Report) -> Iterator[Line]:
    alone = _only_case(report)
    yield Line(report.command or f"nsq check {report.port}", style="head", whole=True)
    latitudes = ", ".join(report.latitudes) or "none"
    yield Line(f"{SPEC_VERSION}, seed {report.seed}, latitudes: {latitudes}")
    yield Line()
    yield from _verdict_lines(report)
    if len(report.schemes) > 1:
        yield Line()
        yield from _table_lines(report)
    yield from _failure_lines(report, alone)
    for number, group in enumerate(_groups(report)):
        if number == 1:
            yield Line()
            yield Line("Also wrong, as a consequence or on its own:", style="head")
        yield Line()
        yield from _diagnosis_lines(report, group, alone)
    yield from _deviation_lines(report)
    yield from _not_implemented_lines(report)
    yield from _explained_lines(report, alone)
    if not all(map(report.conforms_to, report.schemes)):
        yield from _stage_lines(report)
    if alone:
        yield from _input_lines(alone)
    if report.notes:
        yield Line()
        yield from (Line(f"Note: {note}") for note in report.notes)


def _only_case(report: Report) -> Case | None:
    cases = [case for one in report.schemes for case in one.cases]
    return cases[0] if len(cases) == 1 else None


def _verdict_lines(report: Report) -> Iterator[Line]:
    answered = [one for one in report.schemes if sum(one.judged.values())]
    checked = sum(one.checked(operation) for one in report.schemes for operation in OPERATIONS)
    if not checked:
        yield Line("NOTHING WAS CHECKED: no case was asked.", style="bad")
        return
    asked = {case_name(case) for one in report.schemes for case in one.cases}
    if len(asked) == 1:
        said, style = ("RIGHT", "good") if report.conforms else ("WRONG", "bad")
        told = [one for one in report.schemes if report.conforms_to(one) == report.conforms]
        which = " and ".join(one.title for one in told) if len(told) < 4 else f"{len(told)} schemes"
        yield Line(f"{said} in this one case: {which}, {asked.pop()}.", style=style)
        return
    judged = [(op, sum(one.judged.get(op, 0) for one in report.schemes)) for op in OPERATIONS]
    known = sum(len(one.known) for one in report.schemes)
    if answered and all(map(report.conforms_to, report.schemes)):
        which = f"all {len(answered)} schemes"
        if len(answered) < 4:
            which = " and ".join(one.title for one in answered)
        far = " SO FAR" * (not report.is_whole)
        deviations = f", but for {_count(known, 'known deviation')}" if known else ""
        style = "bad" if report.unmet else "good"
        yield Line(f"CONFORMS{far} to {which}{deviations}: {_counted(judged)}.", style=style)
    else:
        bad = [one for one in report.schemes if not report.conforms_to(one)]
        which = bad[0].title if len(bad) == 1 else f"{len(bad)} of {len(report.schemes)} schemes"
        yield Line(f"DOES NOT CONFORM to {which}", style="bad")
        kinds = [failure.kind == "not asked" for one in bad for _, failure in one.failures]
        counts = {
            "wrong": sum(len({case_name(f.case) for f in findings_of(one)}) for one in bad),
            "without an answer": kinds.count(False),
            "not asked any more": kinds.count(True),
            "not implemented": sum(len(one.not_implemented) for one in report.schemes),
            "known to fail": known,
            "known to fail, and right": sum(len(one.mended) for one in bad),
        }
        parts = [f"{count} {what}" for what, count in counts.items() if count]
        yield Line(f"Of {_count(checked, 'case')}: {', '.join(parts) or 'none answered'}.")
        yield Line(f"Answered: {_counted(judged)}.")
    yield from _scope_lines(report)


def _scope_lines(report: Report) -> Iterator[Line]:
    """What the verdict does not cover: not asked is not the same as not implemented."""
    if report.unmet:
        yield Line(
            f"Required, but not asked or not implemented: {_listed(report.unmet)}.", 0, "bad"
        )
    if report.not_asked:
        yield Line(f"Not asked: {_listed(report.not_asked)}.")
    if lacking := [*report.unclaimed, *_not_implemented(report)]:
        yield Line(f"Not implemented: {_listed(lacking)}.")


def _listed(words: Sequence[str]) -> str:
    return "; ".join(words) if any("," in word for word in words) else ", ".join(words)


def _not_implemented(report: Report) -> list[str]:
    """What all the cases that are not implemented have in common: an operation, dtype or width."""
    missing = {id(case) for one in report.schemes for case in one.not_implemented}
    groups: dict[str, list[bool]] = {}
    for one in report.schemes:
        for case in dict.fromkeys([*one.cases, *one.not_implemented]):
            x = case.inputs.get("x")
            names = [case.operation, f"{case.scheme.bits} bits"]
            names += [] if x is None else [f"{x.dtype.name} input"]
            for name in names:
                groups.setdefault(name, []).append(id(case) in missing)
    unclaimed = {name.split()[0] for name in report.unclaimed}
    return [name for name, lacks in groups.items() if all(lacks) and name not in unclaimed]


def _counted(judged: Sequence[tuple[str, int]]) -> str:
    counted = [(operation, count) for operation, count in judged if count]
    if not counted:
        return "no case"
    (first, count), *rest = counted
    return ", ".join(
        [f"{first} {_count(count, 'case')}", *(f"{operation} {count}" for operation, count in rest)]
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _table_lines(report: Report) -> Iterator[Line]:
    wide = max(len(one.name) for one in report.schemes)
    for one in report.schemes:
        good = report.conforms_to(one)
        verdict = "conforms" if good else "does not conform"
        if good and not sum(one.judged.values()):
            verdict = "not implemented"
        remarks = [" ".join(dict.fromkeys(d.rule for d in one.diagnoses))]
        unasked = sum(failure.kind == "not asked" for _, failure in one.failures)
        without = len(one.failures) - unasked
        remarks.append(f"{without} without an answer" if without else "")
        remarks.append(f"{unasked} not asked any more" if unasked else "")
        remarks.append(f"{len(one.mended)} no longer wrong" if one.mended else "")
        missing = len(one.not_implemented)
        remarks.append(f"{missing} not implemented" if missing else "")
        remarks.append("nothing answered" if not sum(one.judged.values()) else "")
        remark = ", ".join(filter(None, remarks))
        text = f"{one.name:<{wide}}  {verdict:<16}  {sum(one.judged.values()):>5} cases  {remark}"
        yield Line(text.rstrip(), 2, "" if good else "bad", whole=True)


def _failure_lines(report: Report, alone: Case | None) -> Iterator[Line]:
    """Cases without an answer, alike ones together; nothing else counts before they are mended."""
    kinds: dict[tuple[str, str], list[tuple[SchemeReport, Case, str]]] = {}
    for one in report.schemes:
        for case, failure in one.failures:
            kinds.setdefault((failure.kind, case.operation), []).append(
                (one, case, failure.message)
            )
    if not kinds:
        return
    yield Line()
    yield Line("No answer. Mend this first: what follows may be its consequence.", style="bad")
    for (kind, _), failed in kinds.items():
        one, case, message = failed[0]
        schemes = list(dict.fromkeys(of.name for of, _, _ in failed))
        where = f" with {', '.join(schemes)}" if len(report.schemes) > 1 else ""
        yield Line(f"{kind}{where}: {_abbreviated([case for _, case, _ in failed])}", 2)
        yield from _message_lines(message, 6, in_full=alone is not None)
        if not alone and kind != "not asked":
            yield from _command_lines(report, one.name, case, 6)


def _message_lines(message: str, indent: int, in_full: bool) -> Iterator[Line]:
    lines = [line for line in printable(message).split("\n") if line.strip()]
    left_out = len(lines) - 12
    for number, line in enumerate(lines):
        # The start says what happened, the end of a traceback why.
        if in_full or left_out <= 0 or number < 4 or number >= 4 + left_out:
            shown = line if in_full else line[:MOST_CHARACTERS]
            yield Line(shown + ("..." if shown != line else ""), indent, whole=True)
        elif number == 4:
            yield Line(f"... {left_out} lines left out ...", indent)


def _groups(report: Report) -> list[list[tuple[SchemeReport, Diagnosis]]]:
    """One diagnosis in many schemes is one group: the first of it tells all."""
    groups: dict[tuple[Any, ...], list[tuple[SchemeReport, Diagnosis]]] = {}
    for one in report.schemes:
        for diagnosis in one.diagnoses:
            fits = (diagnosis.mistake,) if diagnosis.mistake else diagnosis.stages
            fits = (*fits, str(diagnosis.steps))
            groups.setdefault((diagnosis.rule, fits), []).append((one, diagnosis))
    return list(groups.values())


def _diagnosis_lines(
    report: Report, group: Sequence[tuple[SchemeReport, Diagnosis]], alone: Case | None
) -> Iterator[Line]:
    one, diagnosis = group[0]
    yield from _rule_lines(diagnosis.rule)
    yield Line()
    where = f"{one.name}: " if len(report.schemes) > 1 else ""
    yield Line(f"{where}{diagnosis.says}", 4)
    others = list(dict.fromkeys(other.name for other, _ in group[1:]))
    if others:
        yield Line(f"The same with {', '.join(others)}.", 4)
    if diagnosis.alike:
        alike = ", ".join(diagnosis.alike)
        yield Line(f"These cases cannot tell it from: {alike}.", 4)
    detailed = diagnosis.findings if alone else _telling(diagnosis)
    for finding in detailed:
        yield Line()
        yield from (line._replace(indent=line.indent + 4) for line in _finding_lines(finding))
        if not alone:
            yield from _command_lines(report, one.name, finding.case, 6)
    if len(diagnosis.findings) > len(detailed):
        cases = list({case_name(f.case): f.case for f in diagnosis.findings}.values())
        yield Line()
        yield Line(f"All {len(cases)} cases that show it: {_abbreviated(cases)}", 4)


def _telling(diagnosis: Diagnosis) -> list[Finding]:
    """One example of what is explained; of an unknown mistake up to three that differ."""
    explained = diagnosis.mistake or diagnosis.steps or diagnosis.stages[0] in ONCE
    differing: dict[tuple[Any, ...], Finding] = {}
    for f in diagnosis.findings:
        differing.setdefault((f.stage, f.what, f.got, f.expected, f.shown), f)
    return list(differing.values())[: 1 if explained else 3]


def _rule_lines(rule: str) -> Iterator[Line]:
    if rule in RULES:
        title, section, words = RULES[rule]
        yield Line(f"{rule}  {title}  (docs/spec.md#{section})", style="head", whole=True)
        yield Line(words, 4)
    else:
        yield Line(f"{rule}  (docs/spec.md)", style="head", whole=True)


def _finding_lines(finding: Finding) -> Iterator[Line]:
    text = f"{case_name(finding.case)}, stage {finding.stage}"
    if finding.index:
        text += f", at [{_index(finding)}]"
    if finding.of > 1:
        verb = "is" if finding.wrong == 1 else "are"
        text += f"; {finding.wrong} of {finding.of} elements {verb} wrong"
    yield Line(text)
    if finding.what:
        yield Line(finding.what, 2)
    rows = [*finding.shown, ("got", finding.got), ("expected", finding.expected)]
    rows = [(name, value) for name, value in rows if value]
    wide = max((len(name) for name, _ in rows), default=0)
    yield from (Line(f"{name:<{wide}}  {value}", 2, whole=True) for name, value in rows)


def _index(finding: Finding) -> str:
    return ", ".join(f"{axis} {i}" for axis, i in zip(axes_of(finding), finding.index, strict=True))


def _command_lines(report: Report, scheme: str, case: Case, indent: int) -> Iterator[Line]:
    command = command_for(report, scheme, case)
    if command:
        yield Line("Just this case:", indent)
        yield Line(command, indent + 2, whole=True)


def _abbreviated(cases: Iterable[Case]) -> str:
    """Case ids in order, those of a family together: ``encode/ties/0 to 3, 7; encode/sum/1``."""
    families: dict[str, list[str]] = {}
    for name in dict.fromkeys(map(case_name, cases)):
        family, _, member = name.rpartition("/")
        families.setdefault(family, []).append(member)
    named = [f"{family}/{', '.join(_runs(of))}" for family, of in families.items()]
    left_off = sum(len(of) for of in list(families.values())[MOST_FAMILIES:])
    more = [f"and {left_off} more cases"] if left_off else []
    return "; ".join(named[:MOST_FAMILIES] + more)


def _runs(members: Sequence[str]) -> list[str]:
    numbers = sorted({int(m) for m in members if m.isdecimal() and m.isascii()})
    words = [m for m in members if not (m.isdecimal() and m.isascii())]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    ranges = [
        f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    ]
    return [*dict.fromkeys(words), *ranges]


def _not_implemented_lines(report: Report) -> Iterator[Line]:
    cases = [case for one in report.schemes for case in one.not_implemented]
    if not cases:
        return
    effect = "listed, not failed" if report.partial else "which fails the check"
    yield Line()
    yield Line(f"Not implemented, {effect}: {_count(len(cases), 'case')}", style="head")
    yield Line(_abbreviated(cases), 2)
    for reason in dict.fromkeys(reason for one in report.schemes for reason in one.reasons):
        yield from _message_lines(reason, 6, in_full=False)


def _deviation_lines(report: Report) -> Iterator[Line]:
    """Known deviations, those that are none any more first: each must still fail."""
    several = len(report.schemes) > 1
    for title, attribute, style in (
        ("Known to fail, but right now; take them out of the list of known deviations", "mended",
         "bad"),
        ("Known to fail", "known", "head"),
    ):  # fmt: skip
        found = [(one, d) for one in report.schemes for d in getattr(one, attribute)]
        if not found:
            continue
        yield Line()
        yield Line(f"{title}: {_count(len(found), 'case')}", style=style)
        reasons: dict[tuple[str, str], list[Case]] = {}
        for one, deviation in found:
            where = f"{one.name}: " if several else ""
            reasons.setdefault((where, deviation.reason), []).append(deviation.case)
        for (where, reason), cases in reasons.items():
            yield Line(f"{where}{_abbreviated(cases)}", 2)
            yield Line(reason, 6)


def _explained_lines(report: Report, alone: Case | None) -> Iterator[Line]:
    latitudes: dict[str, list[Explained]] = {}
    for one in report.schemes:
        for explained in one.explained:
            latitudes.setdefault(explained.latitude, []).append(explained)
    for latitude, found in latitudes.items():
        differences = _count(sum(explained.count for explained in found), "difference")
        cases = {case_name(explained.case): explained.case for explained in found}
        yield Line()
        yield Line(
            f"Allowed by {latitude}: {differences} in {_count(len(cases), 'case')}", 0, "head"
        )
        for explained in found if alone else found[:1]:
            at = Finding(explained.case, explained.stage, "", "", explained.index)
            where = f", at [{_index(at)}]" if explained.index else ""
            name = case_name(explained.case)
            yield Line(f"{name}, stage {explained.stage}{where}: {explained.what}", 2)
        if len(cases) > 1:
            yield Line(f"All {len(cases)} cases: {_abbreviated(cases.values())}", 2)


def _stage_lines(report: Report) -> Iterator[Line]:
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    for one in report.schemes:
        for (operation, stage), (judged, wrong) in one.stages.items():
            before = counts.setdefault(operation, {}).get(stage, (0, 0))
            counts[operation][stage] = (before[0] + judged, before[1] + wrong)
    if not counts:
        return
    yield Line()
    yield Line("Cases in which each stage is right, given the port's own stage before it:")
    for operation, stages in counts.items():
        right = [f"{stage} {judged - wrong}/{judged}" for stage, (judged, wrong) in stages.items()]
        yield Line(f"{operation}: {', '.join(right)}", 2)


def _input_lines(case: Case) -> Iterator[Line]:
    yield Line()
    yield Line(f"Input of {case_name(case)}", style="head")
    for flag in case.flags:
        yield Line(f"{flag}: {FLAGS[flag].description}", 2)
    if case.refused_by:
        yield Line(f"must be refused by rule {case.refused_by}", 2)
    for name, array in case.inputs.items():
        yield Line(f"{name}: {array.dtype.name} {list(array.shape)}", 2)
        yield from (Line(row, 4, whole=True) for row in _rows(array))


def _rows(array: Array) -> Iterator[str]:
    """Yield the elements, a line a row; floats as the hexadecimal digits of their bits."""
    rows = array.reshape(-1, array.shape[-1] if array.ndim else 1)
    wide = 2 * array.itemsize
    as_bits = array.dtype.kind not in "iu"
    if as_bits:
        rows = np.ascontiguousarray(rows).view(f"u{array.itemsize}")
    most = max(MOST_ELEMENTS // max(rows.shape[1], 1), 1)
    for row in rows[:most].tolist():
        shown = [f"{v:0{wide}x}" if as_bits else str(v) for v in row[:MOST_ELEMENTS]]
        yield " ".join(shown) + (" ..." if len(row) > MOST_ELEMENTS else "")
    if len(rows) > most:
        yield f"... {len(rows) - most} rows left out ..."

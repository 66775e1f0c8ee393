"""Reports for programs: JSON, and the JUnit XML that CI systems read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from nsq_ref.conformance.findings import Finding, Report, SchemeReport
from nsq_ref.conformance.operations import OPERATIONS, Case
from nsq_ref.conformance.report.text import finding_text
from nsq_ref.conformance.report.words import (
    axes_of,
    case_name,
    command_for,
    findings_of,
    printable,
)
from nsq_ref.conformance.rules import RULES
from nsq_ref.scheme import SPEC_VERSION


def as_json(report: Report) -> dict[str, Any]:
    """Return a report as plain values for ``json.dumps``; keys are only ever added.

    Parameters
    ----------
    report : Report

    Returns
    -------
    dict
        ``specVersion``, ``port``, ``command``, ``seed``, ``latitudes``, ``partial``, ``conforms``,
        ``whole`` (whether all was asked), ``notAsked`` (what was not), ``required``, ``unmet``
        (what of it was not asked), ``notes``, ``notChecked``, the operations of which no case was
        asked or implemented, and ``schemes``, a list with, for each scheme:

        ``name``, ``scheme``, ``conforms``
            The scheme as `Scheme.to_dict` gives it.
        ``cases``
            Ids of all that were asked, each with its operation before it: ``encode/ties/3``.
        ``judged``
            Operation to the number of cases that were answered.
        ``stages``
            List of ``operation``, ``stage``, and in how many cases it was ``judged`` and ``wrong``.
        ``diagnoses``
            List of ``rule``, ``title``, ``mistake``, ``says``, ``stages``, ``alike``, ``steps`` and
            ``findings``, each of which has ``case``, ``flags``, ``stage``, ``rule``, ``what``,
            ``index``, ``axes`` (what the index counts), ``got``, ``expected``, ``shown`` (list of
            ``name`` and ``value``), ``wrong``, ``of`` and ``command``.
        ``explained``
            List of ``case``, ``stage``, ``latitude``, ``index``, ``what`` and ``count``.
        ``failures``
            List of ``case``, ``kind`` and ``message``.
        ``notImplemented``
            Ids of cases.
        ``known``, ``mended``
            Lists of ``case``, ``reason`` and ``what``: deviations that are known, and those that
            are no more.

    Examples
    --------
    >>> from nsq_ref import Scheme
    >>> one = SchemeReport("pchan4", Scheme.named("pchan4"), {"encode": 83}, {})
    >>> found = as_json(Report("./libmine.so", 0, (), [one]))
    >>> found["specVersion"], found["conforms"], found["schemes"][0]["judged"]
    ('NSQ-1', True, {'encode': 83})
    """
    return {
        "specVersion": SPEC_VERSION,
        "port": printable(report.port),
        "command": report.command,
        "seed": report.seed,
        "latitudes": list(report.latitudes),
        "partial": report.partial,
        "conforms": report.conforms,
        "whole": report.is_whole,
        "notAsked": [printable(what) for what in report.not_asked],
        "required": list(report.required),
        "unmet": report.unmet,
        "notes": [
            *(f"not asked: {what}" for what in report.left_out),
            *map(printable, report.notes),
        ],
        "notChecked": [name for name in OPERATIONS if not _checked(report, name)],
        "schemes": [_scheme_json(report, one) for one in report.schemes],
    }


def _scheme_json(report: Report, one: SchemeReport) -> dict[str, Any]:
    return {
        "name": one.name,
        "scheme": one.scheme.to_dict(),
        "conforms": report.conforms_to(one),
        "cases": _plain(one.cases),
        "judged": dict(one.judged),
        "stages": [
            {"operation": operation, "stage": stage, "judged": judged, "wrong": wrong}
            for (operation, stage), (judged, wrong) in one.stages.items()
        ],
        "diagnoses": [
            {
                "rule": diagnosis.rule,
                "title": RULES[diagnosis.rule].title if diagnosis.rule in RULES else "",
                **_fields(diagnosis, "mistake", "says", "stages", "alike", "steps"),
                "findings": [
                    _finding_json(finding, command_for(report, one.name, finding.case))
                    for finding in diagnosis.findings
                ],
            }
            for diagnosis in one.diagnoses
        ],
        "explained": [
            _fields(explained, "case", "stage", "latitude", "index", "what", "count")
            for explained in one.explained
        ],
        "failures": [
            {"case": case_name(case), **_fields(failure, "kind", "message")}
            for case, failure in one.failures
        ],
        "notImplemented": _plain(one.not_implemented),
        "reasons": list(one.reasons),
        "known": [_fields(known, "case", "reason", "what") for known in one.known],
        "mended": [_fields(mended, "case", "reason", "what") for mended in one.mended],
    }


def _checked(report: Report, operation: str) -> int:
    """Return how many cases of an operation the verdict rests on."""
    return sum(one.checked(operation) for one in report.schemes)


def _finding_json(finding: Finding, command: str) -> dict[str, Any]:
    return {
        "case": case_name(finding.case),
        "flags": list(finding.case.flags),
        **_fields(finding, "stage", "rule", "what", "index"),
        "axes": list(axes_of(finding)),
        **_fields(finding, "got", "expected"),
        "shown": [{"name": name, "value": printable(value)} for name, value in finding.shown],
        **_fields(finding, "wrong", "of"),
        "command": command,
    }


def _fields(one: object, *names: str) -> dict[str, Any]:
    """Return attributes as JSON can hold them."""
    return {name: _plain(getattr(one, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Case):
        return case_name(value)
    return [_plain(one) for one in value] if isinstance(value, Sequence) else int(value)


def as_junit(report: Report) -> str:
    """Return a report as the JUnit XML that CI systems read.

    A scheme is a test suite, a case a test case. Wrong ones fail, those without an answer are
    errors, and those not implemented fail too, or are skipped in a partial check. Operations that a
    port need not have and does not have are skipped, and so are known deviations, which fail where
    they are none any more. What is required and was not asked is an error of its own.

    Parameters
    ----------
    report : Report

    Returns
    -------
    str

    Examples
    --------
    >>> from nsq_ref import Scheme
    >>> case = Case("ties/3", "encode", Scheme(), (), {})
    >>> one = SchemeReport("nsep+pchan4", Scheme(), {"encode": 1}, {}, cases=[case])
    >>> print(as_junit(Report("./libmine.so", 0, (), [one])))
    <?xml version="1.0" encoding="utf-8"?>
    <testsuites name="nsq check ./libmine.so" tests="1" failures="0" errors="0" skipped="0">
      <testsuite name="nsep+pchan4" tests="1" failures="0" errors="0" skipped="0">
        <testcase classname="nsq.nsep+pchan4.encode" name="ties/3" />
      </testsuite>
    </testsuites>
    """
    root = ElementTree.Element("testsuites", name=f"nsq check {printable(report.port)}")
    for one in report.schemes:
        suite = ElementTree.SubElement(root, "testsuite", name=printable(one.name))
        wrong: dict[str, list[Finding]] = {}
        for finding in findings_of(one):
            wrong.setdefault(case_name(finding.case), []).append(finding)
        failures = {case_name(case): failure for case, failure in one.failures}
        missing = {case_name(case) for case in one.not_implemented}
        checked = {operation for operation in OPERATIONS if one.checked(operation)}
        known = {case_name(deviation.case): deviation for deviation in one.known}
        mended = {case_name(deviation.case): deviation for deviation in one.mended}
        allowed: dict[str, list[str]] = {}
        for explained in one.explained:
            text = f"allowed by {explained.latitude}: {explained.what}"
            allowed.setdefault(case_name(explained.case), []).append(text)
        for case in _all_cases(one):
            name = case_name(case)
            element = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"nsq.{printable(one.name)}.{case.operation}",
                name=case.id,
            )
            if name in wrong:
                first = wrong[name][0]
                message = f"{first.rule}, stage {first.stage}: {first.what}"
                command = command_for(report, one.name, case)
                texts = [finding_text(finding) for finding in wrong[name]] + [command] * bool(
                    command
                )
                _outcome(element, "failure", first.rule, message, "\n\n".join(texts))
            if name in failures:
                failed = failures[name]
                _outcome(element, "error", failed.kind, failed.kind, failed.message)
            if name in missing or case.operation not in checked:
                kind = "failure" if name in missing and not report.partial else "skipped"
                _outcome(element, kind, "not implemented", "not implemented", "")
            if name in known:
                _outcome(
                    element, "skipped", "known", f"known: {known[name].reason}", known[name].what
                )
            if name in mended:
                said = f"no longer fails, though known: {mended[name].reason}"
                _outcome(element, "failure", "mended", said, "")
            if name in allowed:
                out = ElementTree.SubElement(element, "system-out")
                out.text = printable("\n".join(allowed[name]))
        if not report.conforms_to(one) and not (wrong or failures or missing or mended):
            element = ElementTree.SubElement(
                suite, "testcase", classname=f"nsq.{printable(one.name)}", name="any case"
            )
            _outcome(element, "error", "nothing was checked", "no case was answered", "")
    for name in report.unmet:
        for suite in root[:1]:  # a test case needs a suite
            element = ElementTree.SubElement(suite, "testcase", classname="nsq.required", name=name)
            _outcome(element, "error", "not asked", f"{name} is required, and was not asked", "")
    for element in [*root, root]:
        counted = {"tests": "testcase", "failures": "failure", "errors": "error"}
        for name, tag in {**counted, "skipped": "skipped"}.items():
            element.set(name, str(len(element.findall(f".//{tag}"))))
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}'


def _outcome(element: ElementTree.Element, tag: str, kind: str, message: str, text: str) -> None:
    outcome = ElementTree.SubElement(element, tag, message=printable(message))
    if tag != "skipped":  # the schema gives it no type
        outcome.set("type", printable(kind))
    outcome.text = printable(text) or None


def _all_cases(one: SchemeReport) -> list[Case]:
    """All that were asked, and all that anything was found about, so that nothing is lost."""
    found = [finding.case for finding in findings_of(one)]
    failed = [case for case, _ in one.failures]
    known = [*one.cases, *found, *failed, *one.not_implemented]
    return list({case_name(case): case for case in known}.values())

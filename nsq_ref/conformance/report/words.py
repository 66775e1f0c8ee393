"""What all reports share: names, commands, what an index counts, text that hurts no reader."""

from __future__ import annotations

import shlex

from nsq_ref.conformance.findings import Finding, Report, SchemeReport
from nsq_ref.conformance.operations import Case

# The last axes of the array of a stage; those before them are heads and batches.
AXES: dict[str, tuple[str, ...]] = {
    "norm": ("token",),
    "gain": ("token",),
    "packed": ("token", "byte"),
    "scale": ("block", "channel"),
    "zero": ("block", "channel"),
    "outlier_index": ("block", "outlier"),
    "outliers": ("token", "outlier"),
    "output": ("query", "channel"),
    "weights": ("query", "token"),
}
LEADING: tuple[tuple[str, ...], ...] = ((), ("head",), ("batch", "head"))


def printable(text: str) -> str:
    r"""Return text with all but printable characters and line ends escaped.

    Examples
    --------
    >>> printable("\x1b[31mred\0 \udcff")
    '\\x1b[31mred\\x00 \\udcff'
    """
    lines = text.replace("\r\n", "\n").expandtabs(4)
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii")
        for c in lines
    )


def case_name(case: Case) -> str:
    """Return operation and id, as ``--case`` takes them.

    Examples
    --------
    >>> from nsq_ref import Scheme
    >>> case_name(Case("ties/3", "encode", Scheme(), (), {}))
    'encode/ties/3'
    """
    return f"{case.operation}/{case.id}"


def command_for(report: Report, scheme: str, case: Case) -> str:
    """Return the command that checks one case; empty if the report has no command.

    Examples
    --------
    >>> from nsq_ref import Scheme
    >>> report = Report("./mine", 0, (), [], command="nsq check ./mine")
    >>> command_for(report, "nsep4", Case("ties/3", "encode", Scheme(), (), {}))
    'nsq check ./mine --scheme nsep4 --case encode/ties/3'
    """
    if not report.command:
        return ""
    return f"{report.command} --scheme {shlex.quote(scheme)} --case {shlex.quote(case_name(case))}"


def axes_of(finding: Finding) -> tuple[str, ...]:
    """Return what the numbers of a finding's index count.

    Examples
    --------
    >>> from nsq_ref import Scheme
    >>> case = Case("ties/3", "encode", Scheme(axis="token"), (), {})
    >>> axes_of(Finding(case, "codes", "Q1", "", (0, 2, 5)))
    ('head', 'token', 'channel')
    >>> axes_of(Finding(case, "scale", "S1", "", (2, 0)))
    ('token', 'column')
    """
    last = AXES.get(finding.stage, ("token", "channel"))
    if finding.stage in ("scale", "zero") and finding.case.scheme.axis == "token":
        last = ("token", "column")
    leading = len(finding.index) - len(last)
    if not 0 <= leading < len(LEADING):
        return tuple(f"axis {i}" for i in range(len(finding.index)))
    return (*LEADING[leading], *last)


def findings_of(one: SchemeReport) -> list[Finding]:
    """Return all that was found wrong."""
    return [finding for diagnosis in one.diagnoses for finding in diagnosis.findings]

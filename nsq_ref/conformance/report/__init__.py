"""What the judge found, as text for people, JSON for programs and JUnit XML for CI.

Ports write what they like into their messages. Nothing of it reaches a terminal or a parser
unescaped: see `printable`.
"""

from nsq_ref.conformance.report.programs import as_json, as_junit
from nsq_ref.conformance.report.text import as_text, finding_text
from nsq_ref.conformance.report.words import axes_of, case_name, command_for, printable

__all__ = [
    "as_json", "as_junit", "as_text", "axes_of", "case_name", "command_for", "finding_text",
    "printable",
]  # fmt: skip
